"""Signals that reach all ranks, and launchers that vanish: what lets a run be stopped at any moment.

A launcher passes signals on to some ranks, late, or to none. So every rank listens for itself, and the ranks agree at
the end of each optimizer step on what any of them has heard.
"""

import contextlib
import os
import select
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

from mindmerger.runtime.messages import say
from mindmerger.runtime.processes import is_ending, world_size
from mindmerger.runtime.watch import HALF_WRITTEN, clear_away

# Seconds without a sign of life from the training thread, after a signal, before the rank gives up: it then waits in a
# collective for a rank that is gone. Launchers kill after 30.
STALL_LIMIT_S = 20.0
# The same while a checkpoint is written: a slow disk is not a dead peer, and ending then would lose what is saved.
SAVING_STALL_LIMIT_S = 600.0
POLL_S = 0.25

NODE_LAUNCHER = b"deepspeed.launcher.launch"


class LauncherWatch:
    """Watch that ends this rank when its launcher is gone: nobody else would, and it would hold its GPU for ever.

    The parents are those of the first look, so it must come before anything slow. A run without a launcher is not
    watched: its parent is a shell, which may go (nohup). Neither is a node launcher's parent unless it is DeepSpeed's
    own command.
    """

    def __init__(self):
        launched = _is_launched()
        self._parent = os.getppid() if launched else None
        self._runner = None
        command = _command(self._parent) if launched else b""
        if NODE_LAUNCHER in command:
            runner = _parent_of(self._parent)
            self._runner = runner if runner is not None and b"deepspeed" in _command(runner) else None
        # Only DeepSpeed's node launcher sets CROSS_RANK: with another parent, it was gone before the first look.
        self._lost_early = self._parent == 1 and "CROSS_RANK" in os.environ and NODE_LAUNCHER not in command
        self._handed_over = threading.Event()
        if launched:
            threading.Thread(target=self._watch, name="launcher watch", daemon=True).start()

    def is_gone(self) -> bool:
        """Tells whether the launcher, or the command that the user sees above it, has ended."""
        if self._parent is None:
            return False
        if self._lost_early or os.getppid() != self._parent:
            return True
        # The user's command may be killed and leave the node launcher alive, which then passes nothing on.
        return self._runner is not None and _parent_of(self._parent) not in (self._runner, None)

    def hand_over(self) -> None:
        """Leaves the looking to the caller: this rank is no longer ended on the spot."""
        self._handed_over.set()

    def _watch(self) -> None:
        while not self._handed_over.wait(POLL_S):
            if self.is_gone():
                _say("the launcher is gone, stopping; run the same command to resume")
                clear_away()
                os._exit(143)


_launcher_watch = None


@contextlib.contextmanager
def half_written(folder: Path):
    """Context manager: a folder is removed by whatever ends this rank in here: an error, its own or another rank's,
    Ctrl-C or SIGTERM, which raises `SystemExit` here, and the end of the launcher."""

    def leave(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers send more than one
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, leave)
    HALF_WRITTEN.add(folder)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        HALF_WRITTEN.discard(folder)
        if signal.getsignal(signal.SIGTERM) is leave:
            signal.signal(signal.SIGTERM, before)


def watch_launcher() -> None:
    """Watches this process's launcher until `Signals` does. The first statement of a command's `main()`."""
    global _launcher_watch
    if _launcher_watch is not None:
        _launcher_watch.hand_over()
    _launcher_watch = LauncherWatch()


def end_with_parent() -> None:
    """Makes this process end within a second or so after its parent, however that ends: the processes that tokenise
    would outlive a rank that was killed."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def _is_launched() -> bool:
    """Tells whether a launcher has started this process. Else its parent is a shell, whatever variables it left."""
    if "CROSS_RANK" in os.environ:  # DeepSpeed's
        return True
    numbers = [os.environ.get(name, "").strip() for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    return all(number.isdecimal() for number in numbers) and bool(os.environ.get("MASTER_ADDR"))


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # no /proc on this system, or the process is just ending
        return b""


def _parent_of(pid: int) -> int | None:
    try:
        # The name in parentheses may hold blanks; the parent's pid is the second field after it.
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _say(message: str) -> None:
    # The launcher may have taken the other end of standard error with it.
    with contextlib.suppress(OSError):
        say(f"rank {os.environ.get('RANK') or '0'}: {message}")


class Signals:
    """Listener for SIGTERM, SIGINT and SIGUSR1, and for the end of the launcher, which counts as SIGTERM.

    A thread does the listening, because Python runs signal handlers only when the main thread returns from C code,
    and a collective on a dead peer never does.
    """

    def __init__(self):
        self.stop_code = 0  # 130 or 143 once a stop was asked for
        self.save_asked = False  # this rank heard SIGUSR1
        self.save_agreed = False  # all ranks know of it; whoever writes the checkpoint clears it
        self._last_sign = time.monotonic()
        self._stall_limit = STALL_LIMIT_S
        self._asked_at = None
        self._closing = False
        self._launcher = _launcher_watch or LauncherWatch()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)  # Python asks this of a wake-up descriptor: a full one must not stop a handler
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            # The wake-up byte carries the news; a handler must be there for the default action not to be taken.
            signal.signal(number, lambda *_: None)
        self._launcher.hand_over()
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def alive(self) -> None:
        """Notes a sign of life; the training thread calls it between micro-batches."""
        self._last_sign = time.monotonic()

    @contextlib.contextmanager
    def saving(self):
        """Context manager: the rank is patient, since it writes to a slow disk or waits for the rank that does."""
        self._stall_limit = SAVING_STALL_LIMIT_S
        try:
            yield
        finally:
            self.alive()
            self._stall_limit = STALL_LIMIT_S

    def agree(self, device, *values) -> tuple[int, object]:
        """Adds up `values` over the ranks and shares what any rank has heard. A collective call.

        Returns:
            the stop code or 0, and the sums of the values as a float64 CPU tensor. `save_agreed` is then the same on
            all ranks.
        """
        import torch

        save_asked, self.save_asked = self.save_asked, False
        # float64: counts of tokens are exact up to 2^53, and sums of losses keep what fp32 would round away.
        heard = (float(self.stop_code), float(save_asked))
        sums = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
        if world_size() > 1:
            # One small all-gather instead of a maximum and a sum, read once: on a GPU each read waits.
            mine = torch.cat([torch.tensor(heard, dtype=torch.float64).to(device), sums])
            everywhere = torch.empty(world_size(), len(mine), dtype=torch.float64, device=device)
            torch.distributed.all_gather(list(everywhere.unbind()), mine)
            everywhere = everywhere.cpu()
            heard, sums = everywhere[:, :2].max(0).values.tolist(), everywhere[:, 2:].sum(0)
        self.alive()
        stop_code = int(heard[0])
        self.stop_code = max(self.stop_code, stop_code)
        self.save_agreed = self.save_agreed or bool(heard[1])
        return stop_code, sums.cpu()

    def close(self) -> None:
        """Ends the listening. After a stop further signals are ignored: the launcher sends one to each rank that has
        not left yet when the first one leaves, and that must not change the exit code. SIGUSR1 is ignored in any case:
        it asks for a checkpoint, and a run that has just ended must not be killed by it."""
        self._closing = True
        signal.set_wakeup_fd(-1)
        after = (signal.SIG_IGN, signal.SIG_IGN) if self.stop_code else (signal.SIG_DFL, signal.default_int_handler)
        signal.signal(signal.SIGTERM, after[0])
        signal.signal(signal.SIGINT, after[1])
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        self._thread.join()
        self._reader.close()
        self._writer.close()

    def _listen(self) -> None:
        codes = {signal.SIGTERM: 143, signal.SIGINT: 130}
        while not self._closing:
            if select.select([self._reader], [], [], POLL_S)[0]:
                for number in self._reader.recv(64):
                    if number in codes:
                        self._ask(codes[number], f"signal {signal.Signals(number).name}")
                    elif number == signal.SIGUSR1:
                        self.save_asked = True
            if self._asked_at is None and self._launcher.is_gone():
                self._ask(143, "the launcher is gone")
            limit = self._stall_limit
            if self._asked_at is not None and time.monotonic() - max(self._asked_at, self._last_sign) > limit:
                _say(
                    f"no progress for {limit:.0f} s after {self._reason}, another rank must be gone: stopping; run the "
                    "same command to resume from the last checkpoint"
                )
                os._exit(self.stop_code)

    def _ask(self, code: int, reason: str) -> None:
        # A rank that is being ended for another's error gets the launcher's signal too: there is nothing to add.
        if self._asked_at is None and not is_ending():
            self._asked_at, self._reason, self.stop_code = time.monotonic(), reason, code
            _say(f"{reason}: ending after this step, with a checkpoint")
