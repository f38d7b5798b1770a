"""What lets a run be stopped at any moment: signals that reach all ranks, launchers that vanish, a lock on the outputs.

A launcher passes signals on to some ranks, late, or to none. So every rank listens for itself, and the ranks agree at
the end of each optimizer step on what any of them has heard.
"""

import fcntl
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from runtime_utils import UserError, world_size

# Seconds without a sign of life from the training thread, after a signal, before the rank gives up: it then waits in a
# collective for a rank that is gone. Launchers kill after 30.
PATIENCE_S = 20.0


class Signals:
    """Listens for SIGTERM, SIGINT and SIGUSR1, and for the end of the launcher, which counts as SIGTERM.

    A thread does the listening, because Python runs signal handlers only when the main thread returns from C code,
    and a collective on a dead peer never does.
    """

    def __init__(self):
        self.stop_code = 0  # 130 or 143 once a stop was asked for
        self.save_asked = False  # this rank heard SIGUSR1
        self.save_agreed = False  # all ranks know of it; whoever writes the checkpoint clears it
        self._last_sign = time.monotonic()
        self._asked_at = None
        self._closing = False
        self._ancestors = _launcher_processes()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            # The wake-up byte carries the news; a handler must be there for the default action not to be taken.
            signal.signal(number, lambda *_: None)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def alive(self) -> None:
        """The training thread calls this between micro-batches."""
        self._last_sign = time.monotonic()

    def agree(self, device, *values) -> tuple[int, object]:
        """Adds up `values` over the ranks and shares what any rank has heard. A collective call.

        Returns:
            the stop code or 0, and the sums of the values as a float64 CPU tensor. `save_agreed` is then the same on
            all ranks.
        """
        import torch

        save_asked, self.save_asked = self.save_asked, False
        heard = torch.tensor([float(self.stop_code), float(save_asked)], dtype=torch.float64)
        sums = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
        if world_size() > 1:
            # One small all-gather instead of a maximum and a sum.
            mine = torch.cat([heard.to(device), sums])
            everywhere = torch.empty(world_size(), len(mine), dtype=torch.float64, device=device)
            torch.distributed.all_gather(list(everywhere.unbind()), mine)
            everywhere = everywhere.cpu()
            heard, sums = everywhere[:, :2].max(0).values, everywhere[:, 2:].sum(0)
        self.alive()
        self.stop_code = max(self.stop_code, int(heard[0]))
        self.save_agreed = self.save_agreed or bool(heard[1])
        return int(heard[0]), sums.cpu()

    def close(self) -> None:
        """Ends the listening. After a stop further signals are ignored: the launcher sends one to each rank that has
        not left yet when the first one leaves, and that must not change the exit code."""
        self._closing = True
        signal.set_wakeup_fd(-1)
        after = (signal.SIG_IGN, signal.SIG_IGN) if self.stop_code else (signal.SIG_DFL, signal.default_int_handler)
        signal.signal(signal.SIGTERM, after[0])
        signal.signal(signal.SIGUSR1, after[0])
        signal.signal(signal.SIGINT, after[1])
        self._thread.join()
        self._reader.close()
        self._writer.close()

    def _listen(self) -> None:
        codes = {signal.SIGTERM: 143, signal.SIGINT: 130}
        while not self._closing:
            if select.select([self._reader], [], [], 0.25)[0]:
                for number in self._reader.recv(64):
                    if number in codes:
                        self._ask(codes[number], f"signal {signal.Signals(number).name}")
                    elif number == signal.SIGUSR1:
                        self.save_asked = True
            if self._asked_at is None and _launcher_processes() != self._ancestors:
                self._ask(143, "the launcher has gone")
            if self._asked_at is not None and time.monotonic() - max(self._asked_at, self._last_sign) > PATIENCE_S:
                print(
                    f"rank {os.environ.get('RANK', '0')}: no progress for {PATIENCE_S:.0f} s after {self._reason}, "
                    "another rank must be gone: ending; the same command resumes from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(self.stop_code)

    def _ask(self, code: int, reason: str) -> None:
        if self._asked_at is None:
            self._asked_at, self._reason, self.stop_code = time.monotonic(), reason, code


def _launcher_processes() -> tuple[int, int]:
    """The parent's pid and, where the parent is DeepSpeed's per-node launcher, its parent's: the command the user
    sees. Killing that one leaves the per-node launcher alive."""
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
        if b"deepspeed.launcher.launch" not in command:
            return parent, 0
        # The name in parentheses may hold blanks; the parent's pid is the second field after it.
        return parent, int(Path(f"/proc/{parent}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, ValueError, IndexError):  # no /proc on this system, or the parent is just ending
        return parent, 0


class FolderLock:
    """Keeps a second run out of an output folder. The system drops the lock when its owner dies, however it dies."""

    def __init__(self, folder):
        """Takes the lock.

        Raises:
            UserError: when another living run holds it, naming its host and process, or the folder cannot be written.
        """
        self.path = Path(folder) / ".lock"
        while True:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 - held open as long as the lock
            except OSError as error:
                raise UserError(f"cannot write to the folder {folder}: {error.strerror}: {error.filename}") from error
            try:
                # A POSIX record lock, unlike flock, is not inherited by child processes that outlive a killed run.
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._file.seek(0)
                owner = self._file.read().strip()
                self._file.close()
                raise UserError(
                    f"another run is writing to {folder} ({owner or 'owner unknown'}): wait for it, stop it, or use "
                    "another --save_name"
                ) from error
            if self._is_in_place():
                break
            self._file.close()  # the run that had it has just removed this very file: a lock on it keeps nobody out
        self._file.truncate(0)
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        self._file.flush()

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Gives the folder back."""
        self.path.unlink(missing_ok=True)
        self._file.close()
