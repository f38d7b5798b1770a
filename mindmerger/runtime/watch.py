"""The thread by which a rank learns that another has failed, though it waits in a collective call."""

import contextlib
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

from mindmerger.runtime.messages import say_error
from mindmerger.runtime.place import Place

# Seconds that a rank which has finished waits for the others before it leaves.
LEAVING_WAIT_S = 20.0


# Seconds between two looks at what other ranks have reported, and between two signs of life.
POLL_S, BEAT_S = 0.25, 15.0
# Seconds that the ranks have to agree on an error before it ends them all: some may be inside a collective call that
# the failing one will never join.
GRACE_S = 10.0
# Seconds without a sign of life after which a rank counts as dead.
LOST_S = 600.0
HALF_WRITTEN: set[Path] = set()  # folders that go with this process, unless it ends as it should


class _Watch:
    """Watch that ends this process when another rank has failed and cannot tell it otherwise.

    Ranks agree on errors by a collective call (`on_all_ranks`). One that is inside another collective call, waiting
    for the rank that failed, would never come to that. So the failing rank also writes its error into the store, and a
    thread of each rank looks there. NCCL does not notice either that a node has gone, so each rank also gives signs of
    life.
    """

    def __init__(self, place: Place, store):
        self._place, self._store = place, store
        self._calls, self._open = 0, set()  # of `on_all_ranks`: how many were begun, which are not agreed on yet
        self._seen = {}  # reports by their text, with the time of the first look
        self._stopped = threading.Event()
        self._impatient = False
        self.ending = False
        self._thread = threading.Thread(target=self._run, name="other ranks", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def call(self):
        """Context manager: one call of `on_all_ranks`, whose errors end nobody once it is over."""
        self._calls += 1
        number = self._calls
        self._open.add(number)
        yield number
        self._open.discard(number)

    def report(self, message: str, code: int, call: int | None = None) -> None:
        """Tells all ranks of an error."""
        entry = {"rank": self._place.rank, "message": message, "code": code, "call": call}
        self._store.append("errors", json.dumps(entry) + "\n")

    def hurry(self) -> bool:
        """Makes reported errors end this process without the usual grace; returns whether there are any."""
        self._impatient = True
        with contextlib.suppress(sys.modules["torch"].distributed.DistError):
            return bool(self._open_errors(time.monotonic()))
        return False

    def stop(self) -> None:
        """Ends the watching: the rank that holds the store may leave.

        Waits for the thread: one that is inside the store's C++ code while the interpreter ends would abort the process
        ("terminate called without an active exception") and replace its exit code.
        """
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    def count_out(self, key: str, patience: float) -> None:
        """Waits until every rank has come here, but no longer than `patience` seconds."""
        with contextlib.suppress(sys.modules["torch"].distributed.DistError):  # the store's rank counted all and left
            end = time.monotonic() + patience
            here = self._store.add(key, 1)
            while here < self._place.world_size and time.monotonic() < end:
                time.sleep(0.02)
                here = self._store.add(key, 0)
            if self._place.rank == 0:  # whose process holds the store
                time.sleep(0.1)

    def _run(self) -> None:
        beats, next_beat = 0, 0.0
        # Each rank looks at the next one's signs of life.
        neighbour = f"alive/{(self._place.rank + 1) % self._place.world_size}"
        last, since = None, time.monotonic()
        try:
            while not self._stopped.wait(POLL_S):
                now = time.monotonic()
                if now >= next_beat:
                    beats, next_beat = beats + 1, now + BEAT_S
                    self._store.set(f"alive/{self._place.rank}", str(beats))
                    sign = self._store.get(neighbour) if self._store.check([neighbour]) else None
                    last, since = (sign, now) if sign != last else (last, since)
                if now - since > LOST_S:
                    self._end([f"{neighbour.replace('alive/', 'rank ')} gave no sign of life for {LOST_S:.0f} s"], 1)
                entries = self._open_errors(now)
                # Once one of them has had its time, all are said: ranks that fail alike, such as by running out of
                # memory in the same step, should share one line.
                if any(now - since_when >= self._grace(entry) for entry, since_when in entries):
                    self._end_by([entry for entry, _ in entries])
        except sys.modules["torch"].distributed.DistError:
            # The process that holds the store is gone. The main thread hears of it too, unless NCCL keeps it waiting.
            if not self._stopped.wait(LEAVING_WAIT_S):
                self._end([f"rank {self._place.rank}: lost contact with rank 0"], 1)

    def _open_errors(self, now: float) -> list[tuple[dict, float]]:
        """Returns all errors that are not agreed on, with the time of the first look at each."""
        if not self._store.check(["errors"]):
            return []
        entries = []
        for line in self._store.get("errors").decode().splitlines():
            entry, first_look = json.loads(line), self._seen.setdefault(line, now)
            call = entry["call"]
            if call is None or call > self._calls or call in self._open:
                entries.append((entry, first_look))
        return entries

    def _grace(self, entry: dict) -> float:
        return 2 * POLL_S if entry["call"] is None or self._impatient else GRACE_S

    def _end_by(self, entries: list[dict]) -> None:
        ranks = {}
        for entry in entries:
            ranks.setdefault(entry["message"], []).append(entry["rank"])
        own = [text for text, whose in ranks.items() if 0 in whose]
        others = [f"rank {whose[0]}: {text}" for text, whose in ranks.items() if 0 not in whose]
        self._end(own + others if self._place.rank == 0 else [], min(entry["code"] for entry in entries))

    def _end(self, messages: list[str], code: int) -> None:
        self.ending = True
        clear_away()
        # All at the same time: the first to leave breaks the others' collective calls, and a launcher then sends them
        # signals. They would speak of both below the line that says what has happened.
        self.count_out("ended", 5.0)
        if messages:
            say_error("; ".join(messages))
        # Nor is there more to read when the first connection breaks.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with contextlib.suppress(sys.modules["torch"].distributed.DistError):
            self._store.set(f"said/{self._place.rank}", "")
            end = time.monotonic() + 2.0
            while not self._store.check(["said/0"]) and time.monotonic() < end:
                time.sleep(0.02)
            if self._place.rank == 0:
                time.sleep(0.1)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)


def clear_away() -> None:
    """Ends the processes that tokenise and removes what is half-written: os._exit skips what otherwise does so."""
    for name in ("multiprocessing", "multiprocess"):  # datasets has a multiprocessing of its own
        if (module := sys.modules.get(name)) is not None:
            for child in module.active_children():
                child.kill()
    for folder in list(HALF_WRITTEN):
        shutil.rmtree(folder, ignore_errors=True)
