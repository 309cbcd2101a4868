"""TensorBoard event files: without TensorFlow on a local disk, by clu in a bucket.

clu's writer imports TensorFlow, which takes seconds and about half a gigabyte of memory in every
process. In a bucket nothing else can write, and TensorFlow has been imported to reach it.
"""

import io
import os
import time
from collections.abc import Mapping

import numpy as np
from etils import epath

PREFIX = "events.out.tfevents."  # TensorBoard recognises its files by this prefix


class Events:
    """A TensorBoard event file of scalars and images."""

    def __init__(self, file: epath.PathLike):
        """Creates a new file.

        Args:
          file: a path on a local disk; its name begins with `PREFIX`.
        """
        # Unlike other modules of `tensorboard`, these do not import TensorFlow.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer import record_writer

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._file = epath.Path(file).open("wb")
        self._records = record_writer.RecordWriter(self._file)
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds scalars at a step."""
        value = self._summary.Value
        self._add(step, [value(tag=tag, simple_value=float(x)) for tag, x in values.items()])

    def image(self, step: int, name: str, image: np.ndarray | bytes) -> None:
        """Adds an image at a step: u8[H, W, 3], or the bytes of a PNG file."""
        from PIL import Image

        if not isinstance(image, bytes):
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, format="PNG")
            image = stream.getvalue()
        width, height = Image.open(io.BytesIO(image), formats=("PNG",)).size
        encoded = self._summary.Image(
            width=width, height=height, colorspace=3, encoded_image_string=image
        )
        self._add(step, [self._summary.Value(tag=name, image=encoded)])

    def close(self) -> None:
        """Closes the file."""
        self._records.close()

    def _add(self, step: int, values: list) -> None:
        summary = self._summary(value=values)
        self._write(self._event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()


class BucketEvents:
    """TensorBoard event files in a bucket, with the methods of `Events`."""

    def __init__(self, folder: epath.PathLike):
        """Creates a new file.

        Args:
          folder: directory of the file.
        """
        from clu import metric_writers

        from disco_jax.data.tensorflow_import import tensorflow

        tensorflow()  # hides the GPUs from TensorFlow
        self._writer = metric_writers.create_default_writer(os.fspath(folder), asynchronous=False)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds scalars at a step."""
        self._writer.write_scalars(step, dict(values))
        self._writer.flush()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds an image, u8[H, W, 3], at a step."""
        self._writer.write_images(step, {name: image[None]})
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def open_events(folder: epath.PathLike) -> Events | BucketEvents:
    """Creates a new event file in a folder; its name sorts after those of earlier starts."""
    if "://" in os.fspath(folder):
        return BucketEvents(folder)
    name = f"{PREFIX}{time.time_ns() // 1000}.{os.getpid()}"
    return Events(epath.Path(folder) / name)
