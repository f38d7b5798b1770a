"""Lines on standard error, beside a live progress bar too."""

import errno
import io
import os
import sys


def say(line: str) -> None:
    """Prints one line to standard error, above the live progress bar if there is one."""
    # Asked for, not imported: where nobody loaded it there is no bar, and a message need not cost its import.
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        print(line, file=sys.stderr, flush=True)
    else:
        tqdm.tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


def say_error(message: str) -> None:
    """Prints an error as one line to standard error."""
    # Whatever a library put into its message: scripts look for lines that begin with "error: ".
    say("error: " + " ".join(message.split("\n")))


class _Lines:
    """A file for tqdm that writes each state of the bar as a line of its own."""

    def __init__(self, file):
        self._file = file

    def write(self, text: str) -> None:
        """Writes a state of the bar; what moves or clears a bar on a terminal is left out."""
        if text := text.strip():
            self._file.write(text + "\n")

    def flush(self) -> None:
        """Passes the lines on."""
        self._file.flush()


class SteadyStream(io.TextIOWrapper):
    """Standard output or error that never ends a run: neither by a reader that goes away (`| head -1`), nor by a full
    disk, nor by a character that its encoding lacks.

    `error` is what kept a part of the output from a file, None where nothing did or nobody reads any longer.
    """

    error: OSError | None = None

    def __init__(self, stream: io.TextIOWrapper):
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors="backslashreplace",  # characters that the encoding lacks, and bytes of paths that are not UTF-8
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )

    def write(self, text: str) -> int:
        """Writes the text, or drops it where nothing can be written."""
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Writes what is buffered, or drops it where nothing can be written."""
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: the terminal is gone
            self.error = self.error or error
        # Whatever else writes there, C libraries too, writes nowhere from here on.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)


def steady_streams() -> None:
    """Makes standard output and error a `SteadyStream` each; where one was closed (`2>&-`), what goes there is dropped.

    A closed one also leaves its number to the next file that is opened, and C libraries would write their messages into
    that file: so the first three numbers are taken.
    """
    while (taken := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(taken)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            nowhere = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            setattr(sys, name, nowhere)
        elif isinstance(stream, io.TextIOWrapper) and not isinstance(stream, SteadyStream):
            setattr(sys, name, SteadyStream(stream))


def _lost_output() -> int:
    """Says what kept standard output from being written; the exit code for that, 0 where nothing did."""
    # Buffered text fails only here, at the end: without a look the command would report success.
    sys.stdout.flush()
    error = getattr(sys.stdout, "error", None)
    if error is None:
        return 0
    print(f"error: cannot write to standard output: {error.strerror}", file=sys.stderr, flush=True)
    return 2
