"""Files that are never half-written, and the lock that keeps a second run out of an output folder."""

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

from mindmerger.runtime.errors import UserError


def is_utf8(path) -> bool:
    """Tells whether a path can be written in UTF-8, as the libraries that read models and data sets need it."""
    return not any("\ud800" <= c <= "\udfff" for c in str(path))


def model_path(path: str | None) -> str | None:
    """Returns a path without slashes at its end: `google/mt5-xl/` is meant as `google/mt5-xl`."""
    return str(path).rstrip("/") or "/" if path is not None else None


ENDLESS = ("a pipe", "a socket", "a device")  # what `what_is` calls that from which a reader may wait forever


def what_is(path) -> str:
    """Says what stands where a file is expected, in words: reading a pipe would wait for its writer forever."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return f"a link to {os.readlink(path)}, which is not there" if os.path.islink(path) else "missing"
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def find_endless(folder, suffixes: Sequence[str]) -> Path | None:
    """Returns the first of what `ENDLESS` names with one of the suffixes in a folder, None where there is none."""
    with contextlib.suppress(OSError):  # why a folder cannot be listed is for its reader to say
        for path in sorted(Path(folder).iterdir()):
            if path.suffix in suffixes and what_is(path) in ENDLESS:
                return path
    return None


def open_new(path):
    """Opens a new file for writing bytes. What stands in its place, a link too, is removed and never written to.

    Raises:
        OSError: when that is a folder, comes back at once, or the disk refuses.
    """
    Path(path).unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb")


def unfollowed(path, flags: int) -> int:
    """Opens a file descriptor, as an `opener` of `open`, and refuses a symbolic link in place of the file."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_bytes_atomic(path, data: bytes) -> None:
    """Replaces `path` by `data` so that a reader, or a crash, meets the old content or the new, never a part.

    Raises:
        UserError: naming the path and the number of bytes when the disk refuses them.
    """
    path = Path(path)
    # Beside its target, since a rename is atomic within one file system only; with the pid, since two processes may
    # write the same file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_new(temporary) as file:
            file.write(data)
            file.flush()
            # A rename may reach the disk before the data does: a power cut would leave the name with nothing in it.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({len(data)} bytes): {error.strerror or error}") from error


def write_text_atomic(path, text: str) -> None:
    """Writes text as `write_bytes_atomic` does, in UTF-8; a byte of a path that is not is escaped as \\udcXX."""
    write_bytes_atomic(path, text.encode("utf-8", "backslashreplace"))


def write_json_atomic(path, value) -> None:
    """Writes a JSON value as `write_bytes_atomic` does, indented, with every script readable."""
    write_text_atomic(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_csv_atomic(path, rows) -> None:
    """Writes rows of a CSV file as `write_bytes_atomic` does; the first row names the columns."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text_atomic(path, text.getvalue())


class FolderLock:
    """Lock that keeps a second run out of an output folder. The system drops it when its owner dies in any way."""

    def __init__(self, folder, flag: str = "--save_name"):
        """Takes the lock.

        Args:
            flag: the one that chooses another folder, for the message.

        Raises:
            UserError: when another living run holds it, naming its host and process, or the folder cannot be written or
                locked.
        """
        self.path = Path(folder) / ".lock"
        while True:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # Held open as long as the lock; "a+", since until the lock is ours the text in it names the owner.
                self._file = open(self.path, "a+", encoding="utf-8", errors="replace", opener=unfollowed)  # noqa: SIM115
            except OSError as error:
                if self.path.is_symlink():
                    raise UserError(f"{self.path} is a link, which a lock never is: remove it") from error
                reason = f"{error.strerror}: {error.filename}" if error.strerror else f"{error}: {self.path}"
                raise UserError(f"cannot write to the folder {folder}: {reason}") from error
            self._refuse_a_foreign_file()
            try:
                # A POSIX record lock, unlike flock, is not inherited by child processes that outlive a killed run.
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._file.seek(0)
                owner = self._file.read().strip()
                self._file.close()
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise UserError(
                        f"cannot lock {self.path}: {error.strerror}: use a folder on a file system that has locks"
                    ) from error
                raise UserError(
                    f"another run is writing to {folder} ({owner or 'owner unknown'}): wait for it, stop it, or use "
                    f"another {flag}"
                ) from error
            if self._is_in_place():
                break
            self._file.close()  # the run that had it has just removed this very file: a lock on it keeps nobody out
        owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
        try:
            os.ftruncate(self._file.fileno(), 0)
            os.write(self._file.fileno(), owner.encode())
        except OSError as error:
            self.release()
            raise UserError(f"cannot write {self.path} ({len(owner)} bytes): {error.strerror}") from error

    def _refuse_a_foreign_file(self) -> None:
        found = os.fstat(self._file.fileno())
        # The owner's name is written over what the file holds: through a hard link that would be somebody's data.
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            self._file.close()
            raise UserError(f"{self.path} is not a plain file, or another name of one elsewhere: remove it")

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Gives the folder back."""
        # Removed while it is still locked: once closed, the file may be another run's lock already.
        self.path.unlink(missing_ok=True)
        self._file.close()


def remove(path: Path) -> None:
    """Removes a file, a folder, or a link without what it points to; whatever cannot be removed stays."""
    if path.is_symlink() or path.is_file():  # rmtree refuses links
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def sha256_of_file(path) -> str:
    """Returns the sha256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(path: Path) -> dict:
    """Returns the bytes and the sha256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def sync_folder(path: Path) -> None:
    """Flushes a folder's entries to disk, so that a rename in it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
