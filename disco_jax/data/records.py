"""Access to the encoded records of a prepared TFDS split by row.

TFDS lists the files of a split. TFRecord files are read in runs of consecutive rows by tf.data, or
row by row through an index. array_record files have an index of their own.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from disco_jax.data.encoded import Record
from disco_jax.data.record_index import RecordIndex, open_index
from disco_jax.data.tensorflow_import import tensorflow
from disco_jax.errors import UserError

_RECORDS_PER_READ = 256  # records per batch from TensorFlow
PARALLEL_FILES = 16
_BLOCK = 16  # consecutive records from one file when files are interleaved


class Rows:
    """The records of one split, indexed in the stored order.

    Attributes:
      count: number of records.
      runs: i64[F, 2], the row range [first, end) of each file.
      random_access: whether rows in any order cost no more than in the stored order
        (array_record). Other files are read by rows through an index, which is built when it is
        first needed, and which is slower.
    """

    def __init__(self, builder: Any, split: str, image: str, label: str, text: str = ""):
        """Reads the metadata of a split but no record.

        Args:
          builder: read-only TFDS builder.
          split: split in TFDS syntax, e.g. "train" or "train[:80%]".
          image: name of the image feature, which is not decoded.
          label: name of the label feature; "" if there is none.
          text: name of a text feature that identifies records; "" if there is none.
        """
        _, tfds = tensorflow()
        self._builder, self._split = builder, split
        self._image, self._label, self._text = image, label, text
        self._instructions = files = builder.info.splits[split].file_instructions
        self._files = [os.fspath(file.filename) for file in files]
        self._skips = np.array([file.skip for file in files], np.int64)
        counts = [file.examples_in_shard if file.take < 0 else file.take for file in files]
        ends = np.cumsum(counts, dtype=np.int64)
        self.runs = np.stack([ends - counts, ends], axis=1)
        self.count = int(ends[-1]) if len(files) else 0
        self.random_access = builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD
        self._source: Any = None
        self._index: RecordIndex | None = None  # of TFRecord files

    def name(self, row: int) -> str:
        """Returns the TFDS name of a record: its file and the index in it."""
        file = int(np.searchsorted(self.runs[:, 1], row, side="right"))
        number = self._skips[file] + row - self.runs[file, 0]
        return f"{os.path.basename(self._files[file])}__{number}"

    def stored(self, first: int, last: int) -> Iterator[Record]:
        """Returns the records first..last - 1 in the stored order."""
        return (record for record, _ in self._range(first, last))

    def iter_named(self) -> Iterator[tuple[str, Record]]:
        """Yields (text, record) for the whole split, in the stored order."""
        return ((text, record) for record, text in self._range(0, self.count))

    def take(self, rows: Sequence[int] | np.ndarray) -> Iterator[Record]:
        """Returns the records of `rows` in that order.

        Raises:
          UserError: a file is damaged or lacks records.
        """
        return (record for record, _ in self._read_rows(rows))

    def mixed(self, runs: Sequence[tuple[int, int]]) -> list[Record]:
        """Reads all records of some runs of rows with interleaved files, in a deterministic order.

        Raises:
          UserError: the files hold fewer records than the metadata states, or are damaged.
        """
        return [record for record, _ in self._read_runs(runs, PARALLEL_FILES)]

    def _range(self, first: int, last: int) -> Iterator[tuple[Record, str]]:
        return (
            self._read_rows(range(first, last))
            if self.random_access
            else self._read_runs([(first, last)])
        )

    def _read_rows(self, rows: Sequence[int] | np.ndarray) -> Iterator[tuple[Record, str]]:
        decoders, features = self._decoding()
        for start in range(0, len(rows), _RECORDS_PER_READ):
            chunk = [int(row) for row in rows[start : start + _RECORDS_PER_READ]]
            with self._damage_as_user_error():
                raw_records = self._raw(chunk)
                parsed = [
                    features.deserialize_example_np(raw, decoders=decoders.decoders)
                    for raw in raw_records
                ]
            for row, record in zip(chunk, parsed, strict=True):
                label = int(record[self._label]) if self._label else -1
                text = bytes(record[self._text]).decode() if self._text else ""
                yield Record(row, bytes(record[self._image]), label), text

    def _raw(self, rows: Sequence[int]) -> Iterable[bytes]:
        """Returns the serialized examples of `rows`."""
        if self.random_access:
            if self._source is None:
                from array_record.python.array_record_data_source import ArrayRecordDataSource

                self._source = ArrayRecordDataSource(self._instructions)
            return self._source.__getitems__(list(rows))
        files = np.searchsorted(self.runs[:, 1], rows, side="right")
        numbers = self._skips[files] + np.asarray(rows) - self.runs[files, 0]
        places = [(self._files[file], int(n)) for file, n in zip(files, numbers, strict=True)]
        if self._index is None:
            self._index = self._open_index()
        return self._index.read(places)

    def _open_index(self) -> RecordIndex:
        """Returns the index of all files of the stored splits that this split is a part of."""
        info = self._builder.info
        ends: dict[str, np.ndarray] = {}
        for name, stored in info.splits.items():
            files = [os.fspath(path) for path in stored.filepaths]
            if not set(files).isdisjoint(self._files):
                ends |= open_index(files, stored.shard_lengths, f"{info.name}-{name}")
        return RecordIndex(ends)

    def _read_runs(self, runs, parallel_files: int = 1) -> Iterator[tuple[Record, str]]:
        expected, num_read = sum(last - first for first, last in runs), 0
        with self._damage_as_user_error():
            for columns in self._dataset(runs, parallel_files).as_numpy_iterator():
                num_read += len(columns[0])
                for row, encoded, label, text in zip(*columns, strict=True):
                    yield Record(int(row), encoded, int(label)), text.decode()
        if num_read < expected:
            raise UserError(
                f"The files of the split {self._split!r} of {self._builder.info.name} in "
                f"{self._builder.data_path} lack {expected - num_read} of {expected} records; "
                "prepare the data set again."
            )

    def _dataset(self, runs, parallel_files: int):
        """Returns a tf.data pipeline of batches of (row, encoded image, label, text)."""
        tf, _ = tensorflow()
        types = (tf.string, tf.int64, tf.int64, tf.int64)
        columns = [tf.constant(c, t) for c, t in zip(self.parts(runs), types, strict=True)]
        return self.dataset(columns, parallel_files).batch(_RECORDS_PER_READ).prefetch(2)

    def dataset(self, columns: Sequence[Any], parallel_files: int = PARALLEL_FILES) -> Any:
        """Returns a tf.data pipeline of (row, encoded image, label, text) of TFRecord files.

        Args:
          columns: parts of files as tensors, see `parts`.
          parallel_files: number of parts that are read in turns, 16 records from each.
        """
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

        read = tf.data.Dataset.from_tensor_slices(tuple(columns)).interleave(
            records,
            cycle_length=parallel_files,
            block_length=_BLOCK,
            num_parallel_calls=parallel_files,
            deterministic=True,
        )
        return read.map(parsed, num_parallel_calls=2, deterministic=True)

    def parts(self, runs: Sequence[tuple[int, int]]) -> tuple[tuple, ...]:
        """Returns the parts of files that hold runs of rows.

        Returns:
          Four columns: file, number of records to skip, number of records to read, first row.
        """
        return tuple(zip(*self._parts(runs), strict=True)) or ((), (), (), ())

    def _parts(self, runs: Sequence[tuple[int, int]]) -> Iterator[tuple[str, int, int, int]]:
        for first, last in runs:
            file = int(np.searchsorted(self.runs[:, 1], first, side="right"))
            while first < last:
                start, end = self.runs[file].tolist()
                stop = min(last, end)
                yield self._files[file], int(self._skips[file]) + first - start, stop - first, first
                first, file = stop, file + 1

    def _decoding(self) -> tuple[Any, Any]:
        """Returns the partial decoding of a record and the features it reads."""
        _, tfds = tensorflow()
        features = {key: True for key in (self._image, self._label, self._text) if key}
        skip = {self._image: tfds.decode.SkipDecoding()}
        decoders = tfds.decode.PartialDecoding(features, decoders=skip)
        return decoders, decoders.extract_features(self._builder.info.features)

    @contextlib.contextmanager
    def _damage_as_user_error(self) -> Iterator[None]:
        """Converts a reader's error about a damaged file to a UserError that names the data set."""
        from google.protobuf.message import DecodeError

        tf, _ = tensorflow()
        try:
            yield
        except (tf.errors.OpError, OSError, RuntimeError, IndexError, DecodeError) as error:
            reason = getattr(error, "message", None) or str(error)
            raise UserError(
                f"A file of the split {self._split!r} of {self._builder.info.name} in "
                f"{self._builder.data_path} is damaged ({reason}); prepare the data set again."
            ) from error
