"""`--max_minutes`: training that ends in time, with a learning rate that has come to its end by then. *(ours)*"""

import contextlib
import time
from collections import deque
from collections.abc import Callable

from mindmerger.runtime.command import positive
from mindmerger.runtime.processes import broadcast_object

# The slowest of so many steps is what the next one is expected to take: their lengths differ, and the first compiles.
RECENT_STEPS = 20


def add_arguments(add) -> None:
    """Adds the flag, by a group's `add_argument`."""
    add("--max_minutes", type=positive, help="end training within this many minutes of steps, dev evaluations and "
        "checkpoints (loading is not counted), and let the decay of the learning rate end with them")  # fmt: skip


class TimeLimit:
    """The minutes that a run may take and has taken, its earlier parts included. Rank 0's clock counts for all ranks:
    `share` and `is_over` are collective calls, unless there is no limit."""

    def __init__(self, minutes: float | None = None, used: float = 0.0, now: Callable[[], float] = time.monotonic):
        """Starts the clock.

        Args:
            minutes: the limit; None for none.
            used: minutes that the run had taken when it was stopped.
            now: seconds since any moment.
        """
        self.limit_s = None if minutes is None else 60 * minutes
        self._now, self._started, self._before_s = now, now(), 60 * used
        self._steps = deque(maxlen=RECENT_STEPS)
        self._longest = {"evaluation": None, "saving": 0.0}
        self._guess = 0.0
        self._ended = False

    @contextlib.contextmanager
    def timing(self, what: str):
        """Context manager: times a "step", an "evaluation" or "saving", which tells how long the next one takes."""
        began = self._now()
        yield
        seconds = self._now() - began
        if what == "step":
            self._steps.append(seconds)
        else:
            self._longest[what] = max(seconds, self._longest[what] or 0.0)

    def guess_evaluation(self, seconds: float) -> None:
        """Takes what an evaluation may last at most, for as long as none was timed; the least guess counts."""
        self._guess = min(seconds, self._guess or seconds)

    def minutes(self) -> float:
        """Returns the minutes that the run has taken: all of them once `is_over` said so, lest the time that is left
        is trained in when the same command is given again."""
        return (max(self._used_s(), self.limit_s) if self._ended else self._used_s()) / 60

    def share(self) -> float:
        """Returns how much of the time for steps is used, from 0 to 1; without a limit 0."""
        if self.limit_s is None:
            return 0.0
        for_steps_s = self.limit_s - self._closing_s()
        return broadcast_object(min(1.0, self._used_s() / for_steps_s) if for_steps_s > 0 else 1.0)

    def is_over(self) -> bool:
        """Returns whether one more step and what follows the last one would not end in time, as far as timed."""
        if self.limit_s is None:
            return False
        # Saving twice: the next step may be one with a checkpoint of its own.
        needed_s = max(self._steps, default=0.0) + self._closing_s() + self._longest["saving"]
        # Rounding: minutes that a checkpoint holds came out of seconds.
        in_time = self._used_s() + needed_s < self.limit_s - 1e-6
        self._ended = broadcast_object(self._ended or not in_time)
        return self._ended

    def _used_s(self) -> float:
        return self._before_s + self._now() - self._started

    def _closing_s(self) -> float:
        evaluation = self._longest["evaluation"]
        return (self._guess if evaluation is None else evaluation) + self._longest["saving"]
