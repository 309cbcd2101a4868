"""Metrics of a run: metrics.jsonl, TensorBoard, and a progress line."""

import contextlib
import datetime
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from etils import epath

from disco_jax.files import whole
from disco_jax.run import events

_LOG = logging.getLogger(__name__)

FILE = "metrics.jsonl"


class Logger:
    """A writer of a run's metrics; only process 0 writes.

    It always writes the JSON-lines file, and TensorBoard event files on request.
    """

    def __init__(self, workdir: str | None, *, tensorboard: bool, step: int = 0):
        """Opens the files.

        Args:
          workdir: the run's directory; None: nothing is written.
          tensorboard: whether to write event files for TensorBoard.
          step: the step from which the run resumes. Lines of later steps are dropped, because
            these steps were lost.
        """
        self._file: epath.Path | None = None
        self._lines: list[str] = []
        self._events: events.Events | events.BucketEvents | None = None
        if workdir is not None and jax.process_index() == 0:
            self._file = path = epath.Path(workdir) / FILE
            self._copy_earlier_lines(path, step)
            if tensorboard:
                self._events = events.open_events(workdir)

    def _copy_earlier_lines(self, path: epath.Path, step: int) -> None:
        """Keeps the lines of earlier starts up to `step`, and warns about damaged ones."""
        if path.exists():
            lines, damaged = read(path)
            if damaged:
                backup = path.with_name(f"{path.name}.damaged")
                backup.write_bytes(path.read_bytes())
                _LOG.warning(
                    "%d lines of %s are damaged and were dropped; %s contains them.",
                    damaged,
                    path,
                    backup,
                )
            self._lines = [json.dumps(line) + "\n" for line in lines if line["step"] <= step]
        with whole(path) as file:
            file.write_text("".join(self._lines))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds the scalars of `step`, and waits until they are on the disk."""
        if self._file is None:
            return
        line = json.dumps({"step": step, **{key: float(v) for key, v in scalars.items()}}) + "\n"
        if "://" in str(self._file):  # object stores cannot append
            self._lines.append(line)
            self._file.write_text("".join(self._lines))
        else:
            with open(self._file, "a") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        if self._events is not None:
            self._events.scalars(step, scalars)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds an image, u8[H, W, 3], to the event files if they are written."""
        if self._events is not None:
            self._events.image(step, name, image)

    def close(self) -> None:
        """Closes the event files."""
        if self._events is not None:
            self._events.close()


def read(path: epath.PathLike) -> tuple[list[dict[str, float]], int]:
    """Reads the lines of a metrics file and counts damaged ones.

    An incomplete last line does not count as damaged, because a killed process may leave one.

    Args:
      path: path of the file, which may be missing.

    Returns:
      The metrics of the valid lines, and the number of damaged lines.
    """
    path = epath.Path(path)
    if not path.exists():
        return [], 0
    *texts, rest = path.read_bytes().split(b"\n")
    lines = [line for text in texts if (line := _parse(text))]
    damaged = len(texts) - len(lines) + (b"\0" in rest)
    last = _parse(rest)
    return lines + ([last] if last else []), damaged


def _parse(text: bytes) -> dict[str, float]:
    """Parses a line; returns {} if it is invalid."""
    try:
        line = json.loads(text)
        return {**line, "step": int(line["step"])}
    except (ValueError, KeyError, TypeError):  # UnicodeDecodeError is a ValueError
        return {}


class Progress:
    """Rates and remaining time of a loop."""

    def __init__(self, start: int, total: int, steps_per_epoch: int, batch_size: int):
        self._total, self._steps_per_epoch = total, steps_per_epoch
        self._batch_size = batch_size
        self._last_step, self._last_time, self._last_waited = start, time.monotonic(), 0.0
        self._rate: float | None = None

    def measure(self, step: int, waited_s: float) -> dict[str, float]:
        """Computes rates since the last call: steps and images per second, share of data wait."""
        now = time.monotonic()
        elapsed = max(now - self._last_time, 1e-9)
        self._rate = rate = (step - self._last_step) / elapsed
        share = (waited_s - self._last_waited) / elapsed
        self._last_step, self._last_time, self._last_waited = step, now, waited_s
        return {
            "epoch": step / self._steps_per_epoch,
            "steps_per_s": rate,
            "images_per_s": rate * self._batch_size,
            "images_per_s_per_device": rate * self._batch_size / jax.device_count(),
            "data_wait_share": min(max(share, 0.0), 1.0),
        }

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Excludes the time inside the context from the rates."""
        began = time.monotonic()
        yield
        self._last_time += time.monotonic() - began

    def line(self, step: int, scalars: Mapping[str, float]) -> str:
        """Formats the progress line: step, epoch, speed, remaining time and losses."""
        remaining_s = (self._total - step) / self._rate if self._rate else 0.0
        losses = " ".join(
            f"{key.removesuffix('/loss')} {value:.4f}"
            for key, value in scalars.items()
            # Of jointly trained students ("NAME/contrast/loss"), only the total losses.
            if key == "loss" or (key.endswith("/loss") and key.count("/") == 1)
        )
        return (
            f"step {step}/{self._total}  epoch {scalars['epoch']:.2f}"
            f"/{self._total / self._steps_per_epoch:.0f}  {scalars['images_per_s']:.0f} images/s"
            f"  data wait {100 * scalars['data_wait_share']:.0f} %"
            f"  eta {datetime.timedelta(seconds=round(remaining_s))}  {losses}"
        )
