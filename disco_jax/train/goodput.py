"""Where a run's time goes, over all its starts."""

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
    """Seconds by what they went to.

    "init" is all before the first step but compiling; "compile" the compiler; "data" waiting for
    batches; "eval" evaluations in between; "save" waiting for checkpoints; "step" everything else
    in the loop; "lost" what was spent after the last checkpoint of a start that did not end by
    itself.
    """

    def __init__(self, workdir: str | None, started: float, also: Sequence[str] = ()):
        """Reads what earlier starts have noted.

        Args:
          workdir: of the run; None keeps nothing.
          started: `time.monotonic()` when this start began.
          also: directories of runs that take their steps together with it, and get the same notes.
        """
        self._also = [epath.Path(other) / FILE for other in also]
        self._file = epath.Path(workdir) / FILE if workdir is not None else None
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._unsaved = 0.0
        self.starts = 1
        self._take_over()
        self._then, self._init = started, True
        self._waited = self._compiled = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _take_over(self) -> None:
        """Adds what earlier starts have noted; a damaged note is set aside with a warning."""
        before = read_or_set_aside(self._file) if self._file is not None else None
        if before is None:
            return
        seconds, unsaved = before.get("seconds"), before.get("unsaved_s")
        if not (isinstance(seconds, dict) and isinstance(unsaved, int | float)):
            return
        self._seconds |= {part: float(seconds.get(part, 0.0)) for part in PARTS}
        self.starts += int(before.get("starts", 0))
        # The steps of that time are done again: they count once, as lost.
        self._seconds["step"] -= unsaved
        self._seconds["lost"] += unsaved

    def begin(self) -> None:
        """The loop begins: what came before was not a step."""
        self._book("init", 0.0)

    def step(self, waited_s: float) -> None:
        """Books the time since the last call as steps.

        Args:
          waited_s: for batches, since the loop began.
        """
        before = self._seconds["step"]
        self._book("step", waited_s - self._waited)
        self._waited = waited_s
        self._unsaved += self._seconds["step"] - before

    def evaluate(self) -> None:
        """Books the time since the last call as an evaluation."""
        self._book("eval", 0.0)

    def save(self) -> None:
        """Books the time since the last call as waiting for the checkpoint of all steps so far."""
        self._book("save", 0.0)
        self._unsaved = 0.0

    def report(self) -> dict[str, float]:
        """{"goodput/init_s", ..., "goodput/share": steps that count, as a share of all time}."""
        total = max(sum(self._seconds.values()), 1e-9)
        kept = {f"goodput/{part}_s": seconds for part, seconds in self._seconds.items()}
        return {**kept, "goodput/share": self._seconds["step"] / total}

    def write(self) -> None:
        """Keeps the figures for the next start; process 0 does."""
        if self._file is None or jax.process_index():
            return
        noted: Mapping = {
            "seconds": self._seconds,
            "unsaved_s": self._unsaved,
            "starts": self.starts,
        }
        for kept in (self._file, *self._also):
            with whole(kept) as file:
                file.write_text(json.dumps(noted, indent=2) + "\n")

    def close(self) -> None:
        """Stops listening to the compiler."""
        jax.monitoring.unregister_event_duration_listener(self._listen)

    @property
    def compile_s(self) -> float:
        """Seconds in the compiler, of all starts."""
        return self._seconds["compile"] + self._compiled

    def _book(self, part: str, waited_s: float) -> None:
        now = time.monotonic()
        spent, self._then = now - self._then, now
        self._seconds["compile"] += self._compiled
        self._seconds["data"] += waited_s
        self._seconds[part] += max(spent - self._compiled - waited_s, 0.0)
        self._compiled = 0.0

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILATION:
            self._compiled += duration_secs
