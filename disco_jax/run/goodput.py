"""An account of how the time of a run is spent, over all its starts."""

import json
import time
from collections.abc import Mapping, Sequence

import jax
from etils import epath

from disco_jax.files import read_or_set_aside, whole

FILE = "goodput.json"
PARTS = ("init", "compile", "data", "step", "eval", "save", "lost")
_COMPILATION = "/jax/core/compile/backend_compile_duration"


class Goodput:
    """Seconds of a run by activity.

    "init" is the time before the first step without compiling; "compile" compiling; "data" waiting
    for batches; "eval" evaluations during the run; "save" waiting for checkpoints; "step"
    everything else in the loop; "lost" the time after the last checkpoint of a start that was
    interrupted.
    """

    def __init__(self, workdir: str | None, started: float, also: Sequence[str] = ()):
        """Reads the account of earlier starts.

        Args:
          workdir: the run directory; None: the account is not stored.
          started: `time.monotonic()` at the beginning of this start.
          also: directories of runs trained jointly with this one, which get the same account.
        """
        self._also = [epath.Path(other) / FILE for other in also]
        self._file = epath.Path(workdir) / FILE if workdir is not None else None
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._unsaved = 0.0
        self.starts = 1
        self._add_earlier_starts()
        self._last_time = started
        self._waited = self._compiled = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _add_earlier_starts(self) -> None:
        """Adds the account of earlier starts; a damaged file is renamed with a warning."""
        before = read_or_set_aside(self._file) if self._file is not None else None
        if before is None:
            return
        seconds, unsaved = before.get("seconds"), before.get("unsaved_s")
        if not (isinstance(seconds, dict) and isinstance(unsaved, int | float)):
            return
        self._seconds |= {part: float(seconds.get(part, 0.0)) for part in PARTS}
        self.starts += int(before.get("starts", 0))
        # The unsaved steps are repeated, so their first execution counts as lost.
        self._seconds["step"] -= unsaved
        self._seconds["lost"] += unsaved

    def begin(self) -> None:
        """Records the time before the loop as "init"; call it when the loop begins."""
        self._record("init", 0.0)

    def step(self, waited_s: float) -> None:
        """Records the time since the last call as steps.

        Args:
          waited_s: seconds spent waiting for batches since the loop began.
        """
        before = self._seconds["step"]
        self._record("step", waited_s - self._waited)
        self._waited = waited_s
        self._unsaved += self._seconds["step"] - before

    def evaluate(self) -> None:
        """Records the time since the last call as an evaluation."""
        self._record("eval", 0.0)

    def save(self) -> None:
        """Records the time since the last call as waiting for the checkpoint of all steps."""
        self._record("save", 0.0)
        self._unsaved = 0.0

    def report(self) -> dict[str, float]:
        """Returns the seconds of each activity as "goodput/NAME_s", and "goodput/share".

        The share is the fraction of the total time spent in steps that were not lost.
        """
        total = max(sum(self._seconds.values()), 1e-9)
        seconds = {f"goodput/{part}_s": value for part, value in self._seconds.items()}
        return {**seconds, "goodput/share": self._seconds["step"] / total}

    def write(self) -> None:
        """Stores the account for the next start; only process 0 does this."""
        if self._file is None or jax.process_index():
            return
        account: Mapping = {
            "seconds": self._seconds,
            "unsaved_s": self._unsaved,
            "starts": self.starts,
        }
        for path in (self._file, *self._also):
            with whole(path) as file:
                file.write_text(json.dumps(account, indent=2) + "\n")

    def close(self) -> None:
        """Stops listening to the compiler."""
        jax.monitoring.unregister_event_duration_listener(self._listen)

    @property
    def compile_s(self) -> float:
        """Seconds spent compiling, over all starts."""
        return self._seconds["compile"] + self._compiled

    def _record(self, part: str, waited_s: float) -> None:
        now = time.monotonic()
        spent, self._last_time = now - self._last_time, now
        self._seconds["compile"] += self._compiled
        self._seconds["data"] += waited_s
        self._seconds[part] += max(spent - self._compiled - waited_s, 0.0)
        self._compiled = 0.0

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILATION:
            self._compiled += duration_secs
