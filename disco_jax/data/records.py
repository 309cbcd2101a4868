"""Encoded records of a prepared TFDS split, by row: TFRecord files in runs, array_record at will.

TFDS says which files hold a split; they are read by tf.data, or by array_record's own reader.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from disco_jax.data.encoded import Record
from disco_jax.errors import UserError

_READ_AT_ONCE = 256  # records handed over by TensorFlow together
_FILES_AT_ONCE = 16  # read side by side
_BLOCK = 16  # records of one file before the next has its turn


def tensorflow():
    """(tensorflow, tensorflow_datasets), kept off the accelerators and silent."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # it says on standard error that it is on
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.get_logger().setLevel("ERROR")
    tf.config.set_visible_devices([], "GPU")
    return tf, tfds


class Rows:
    """The records of one split, numbered in the stored order.

    Attributes:
      count: how many there are.
      runs: i64[F, 2], the first row of each file's part of the split and that after its last.
      at_will: whether any rows can be read in any order at no cost (array_record).
    """

    def __init__(self, builder: Any, split: str, image: str, label: str, text: str = ""):
        """Reads the description of a split, no record.

        Args:
          builder: of TFDS, read-only.
          split: as TFDS writes it, "train" or "train[:80%]".
          image: the feature to read, not decoded.
          label: likewise; "": there is none.
          text: likewise, a text that tells records apart; "": there is none.
        """
        _, tfds = tensorflow()
        self._builder, self._split = builder, split
        self._image, self._label, self._text = image, label, text
        self._instructions = parts = builder.info.splits[split].file_instructions
        self._files = [os.fspath(part.filename) for part in parts]
        self._skips = np.array([part.skip for part in parts], np.int64)
        takes = [part.examples_in_shard if part.take < 0 else part.take for part in parts]
        ends = np.cumsum(takes, dtype=np.int64)
        self.runs = np.stack([ends - takes, ends], axis=1)
        self.count = int(ends[-1]) if len(parts) else 0
        self.at_will = builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD
        self._source: Any = None

    def name(self, row: int) -> str:
        """What TFDS calls a record: its file and the number in it."""
        file = int(np.searchsorted(self.runs[:, 1], row, side="right"))
        number = self._skips[file] + row - self.runs[file, 0]
        return f"{os.path.basename(self._files[file])}__{number}"

    def stored(self, first: int, last: int) -> Iterator[Record]:
        """The records from `first` to before `last`, in the stored order."""
        return (record for record, _ in self._any(first, last))

    def told_apart(self) -> Iterator[tuple[str, Record]]:
        """(its text, record) of the whole split, in the stored order."""
        return ((text, record) for record, text in self._any(0, self.count))

    def chosen(self, rows: Sequence[int] | np.ndarray) -> Iterator[Record]:
        """The records of any rows in any order; where `at_will`."""
        return (record for record, _ in self._at_will(rows))

    def mixed(self, runs: Sequence[tuple[int, int]]) -> list[Record]:
        """All records of some runs of rows, read side by side; the order is always the same.

        Raises:
          UserError: the files hold fewer records than their description says, or are damaged.
        """
        return [record for record, _ in self._in_runs(runs, _FILES_AT_ONCE)]

    def _any(self, first: int, last: int) -> Iterator[tuple[Record, str]]:
        return self._at_will(range(first, last)) if self.at_will else self._in_runs([(first, last)])

    def _at_will(self, rows: Sequence[int] | np.ndarray) -> Iterator[tuple[Record, str]]:
        decoders, features = self._decoding()
        for begin in range(0, len(rows), _READ_AT_ONCE):
            part = [int(row) for row in rows[begin : begin + _READ_AT_ONCE]]
            with self._whole_files():
                if self._source is None:
                    from array_record.python.array_record_data_source import ArrayRecordDataSource

                    self._source = ArrayRecordDataSource(self._instructions)
                found = self._source.__getitems__(part)
            for row, raw in zip(part, found, strict=True):
                record = features.deserialize_example_np(raw, decoders=decoders.decoders)
                label = int(record[self._label]) if self._label else -1
                text = bytes(record[self._text]).decode() if self._text else ""
                yield Record(row, bytes(record[self._image]), label), text

    def _in_runs(self, runs, files_at_once: int = 1) -> Iterator[tuple[Record, str]]:
        wanted, found = sum(last - first for first, last in runs), 0
        with self._whole_files():
            for columns in self._dataset(runs, files_at_once).as_numpy_iterator():
                found += len(columns[0])
                for row, encoded, label, text in zip(*columns, strict=True):
                    yield Record(int(row), encoded, int(label)), text.decode()
        if found < wanted:
            raise UserError(
                f"The files of the split {self._split!r} of {self._builder.info.name} in "
                f"{self._builder.data_path} lack {wanted - found} of {wanted} records; prepare "
                "the data set again."
            )

    def _dataset(self, runs, files_at_once: int):
        """Batches of (row, encoded, label, text)."""
        tf, _ = tensorflow()
        decoders, features = self._decoding()

        def records(file, skip, take, first):
            raw = tf.data.TFRecordDataset(file).skip(skip).take(take)
            return tf.data.Dataset.zip(tf.data.Dataset.range(first, first + take), raw)

        def parsed(row, raw):
            record = features.deserialize_example(raw, decoders=decoders.decoders)
            label = tf.cast(record[self._label], tf.int64) if self._label else tf.constant(-1)
            text = record[self._text] if self._text else tf.constant("")
            return row, record[self._image], label, text

        parts = list(zip(*self._parts(runs), strict=True)) or [(), (), (), ()]
        types = (tf.string, tf.int64, tf.int64, tf.int64)
        columns = tuple(tf.constant(c, t) for c, t in zip(parts, types, strict=True))
        read = tf.data.Dataset.from_tensor_slices(columns).interleave(
            records,
            cycle_length=files_at_once,
            block_length=_BLOCK,
            num_parallel_calls=files_at_once,
            deterministic=True,
        )
        read = read.map(parsed, num_parallel_calls=2, deterministic=True)
        return read.batch(_READ_AT_ONCE).prefetch(2)

    def _parts(self, runs) -> Iterator[tuple[str, int, int, int]]:
        """(file, records to skip, records to take, row of the first) that make up the runs."""
        for first, last in runs:
            file = int(np.searchsorted(self.runs[:, 1], first, side="right"))
            while first < last:
                start, end = self.runs[file].tolist()
                stop = min(last, end)
                yield self._files[file], int(self._skips[file]) + first - start, stop - first, first
                first, file = stop, file + 1

    def _decoding(self) -> tuple[Any, Any]:
        """What to decode of a record, and the features that are read for it."""
        _, tfds = tensorflow()
        wanted = {key: True for key in (self._image, self._label, self._text) if key}
        skip = {self._image: tfds.decode.SkipDecoding()}
        decoders = tfds.decode.PartialDecoding(wanted, decoders=skip)
        return decoders, decoders.extract_features(self._builder.info.features)

    @contextlib.contextmanager
    def _whole_files(self) -> Iterator[None]:
        """Turns a reader's error about a damaged file into one that names the data set."""
        tf, _ = tensorflow()
        try:
            yield
        except (tf.errors.OpError, OSError, RuntimeError, IndexError) as error:
            reason = getattr(error, "message", None) or str(error)
            raise UserError(
                f"A file of the split {self._split!r} of {self._builder.info.name} in "
                f"{self._builder.data_path} is damaged ({reason}); prepare the data set again."
            ) from error
