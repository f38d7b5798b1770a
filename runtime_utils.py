"""What both command lines share: the process group, errors of one line, and files that are never half-written.

A leaf: it imports no other module of the project, and heavy libraries only inside functions, so that `--help` stays
quick.
"""

import argparse
import contextlib
import errno
import io
import json
import os
import sys
import threading
import time
import unicodedata
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path

__version__ = "0.1.0"

# Seconds that a rank which has finished waits for the others before it leaves.
PATIENCE_S = 20.0
# Ranks wait for one another as long as it takes to tokenise, to download, to read a slow disk: the libraries' ten
# minutes would end such a run. A rank that has died is noticed otherwise.
WAIT = timedelta(days=30)
# At the start: seconds until a rank says whom it waits for, and until it gives up.
START_NOTICE_S, START_TIMEOUT_S = 10.0, 600.0
# Seconds between two looks at what other ranks have reported, and between two signs of life.
POLL_S, BEAT_S = 0.25, 15.0
# Seconds that the ranks have to agree on an error before it ends them all: some may be inside a collective call that
# the failing one will never join.
GRACE_S = 10.0
# Seconds without a sign of life after which a rank counts as dead.
LOST_S = 600.0
# Seconds between two lines of a progress bar in a log file.
LOG_INTERVAL_S = 30.0
# The variables that launchers (deepspeed, torchrun, accelerate) set for each rank.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class UserError(Exception):
    """A mistake the user can mend. The message is one line: what is wrong, where, and what to do."""


class ReportedError(UserError):
    """A `UserError` that all ranks have agreed on, so that rank 0 alone prints it."""


class StartError(UserError):
    """A rank's own `UserError` before the ranks have met: each rank prints its own."""


class DefaultsShown(argparse.ArgumentDefaultsHelpFormatter):
    """Adds its default to a flag's help, where there is one."""

    def _get_help_string(self, action):
        # A switch is off and a list is empty unless given: nothing to say. (0 equals False, but is a default.)
        silent = action.default is None or action.default is False or action.default == []
        return action.help if silent else super()._get_help_string(action)


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s: one line, printed by rank 0 alone, no usage text."""

    def error(self, message: str):
        """Raises the error."""
        raise UserError(f"{message} (see {self.prog} --help)")


def parse_bool(text: str) -> bool:
    """Reads a flag's True/False given as text.

    Raises:
        argparse.ArgumentTypeError: for anything that is neither.
    """
    lowered = text.strip().lower()
    if lowered in ("true", "yes", "1"):
        return True
    if lowered in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


def check_save_name(name: str) -> None:
    """Makes sure that --save_name names a folder inside the outputs.

    Raises:
        UserError: for a name that is empty, leaves the folder, or has characters that no terminal shows.
    """
    if not os.path.normpath(name).strip(". \t"):
        raise UserError(f"--save_name {name!r} names no folder: give the run a name")
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise UserError(f"--save_name {name!r} leaves the outputs: give a plain name, the folder has a flag of its own")
    if any(unicodedata.category(c) == "Cc" for c in name):
        raise UserError(f"--save_name {name!r} has control characters: leave them out")


def check_seed(seed: int) -> None:
    """Makes sure that the random generators take a seed.

    Raises:
        UserError: for a negative one, and one of more than 64 bits.
    """
    if not 0 <= seed < 2**64:
        raise UserError(f"--seed must be at least 0 and below 2^64, not {seed}")


# ---------------------------------------------------------------------------------------------------------------------
# The process group


@dataclass(frozen=True)
class Place:
    """Which process of a run this is, and where its rank 0 is met."""

    rank: int
    world_size: int
    local_rank: int
    host: str
    port: int


def find_place() -> Place | None:
    """Reads from the launcher's variables which process this is; None when it is alone.

    Batch systems and outer shells leave some of these variables behind: without both a rank and a world size above 1
    there is no run to join.

    Raises:
        UserError: when both are there and something else is missing or is not what a launcher sets.
    """
    text = {name: os.environ.get(name, "").strip() for name in LAUNCHER_VARIABLES}
    if not (text["RANK"] and text["WORLD_SIZE"]):
        return None

    def number(name: str, least: int, most: int) -> int:
        if text[name].isdecimal() and least <= int(text[name]) <= most:
            return int(text[name])
        raise UserError(
            f"the environment has {name}={text[name]!r}, which is not a whole number from {least} to {most}: start "
            f"with deepspeed or torchrun, or run alone after: unset {' '.join(LAUNCHER_VARIABLES)}"
        )

    size = number("WORLD_SIZE", 1, 10**6)
    if size == 1:
        return None
    if not (text["MASTER_ADDR"] and text["MASTER_PORT"]):
        raise UserError(
            f"the environment has WORLD_SIZE={size} but no MASTER_ADDR and MASTER_PORT, where the processes meet: "
            f"start with deepspeed or torchrun, or run alone after: unset {' '.join(LAUNCHER_VARIABLES)}"
        )
    text["LOCAL_RANK"] = text["LOCAL_RANK"] or "0"
    return Place(
        rank=number("RANK", 0, size - 1),
        world_size=size,
        local_rank=number("LOCAL_RANK", 0, size - 1),
        host=text["MASTER_ADDR"],
        port=number("MASTER_PORT", 1, 65535),
    )


def _place_or_alone() -> Place | None:
    # What is wrong with the variables is said where the ranks meet; who asks before that prints as if alone.
    with contextlib.suppress(UserError):
        return find_place()
    return None


def _group_is_up() -> bool:
    # Asking sys.modules keeps torch out of commands that never needed it.
    torch = sys.modules.get("torch")
    return bool(torch and torch.distributed.is_available() and torch.distributed.is_initialized())


def rank() -> int:
    """Returns this process's number among all processes of the run, 0 when it is alone."""
    if _group_is_up():
        return sys.modules["torch"].distributed.get_rank()
    place = None if _runs_alone else _place_or_alone()
    return place.rank if place else 0


def world_size() -> int:
    """Returns how many processes the run has."""
    if _group_is_up():
        return sys.modules["torch"].distributed.get_world_size()
    place = _place_or_alone()
    return place.world_size if place else 1


def local_rank() -> int:
    """Returns this process's number on its own machine."""
    place = _place_or_alone()
    return place.local_rank if place else 0


def is_main() -> bool:
    """True on the one process that prints and writes."""
    return rank() == 0


_runs_alone = False  # a command that never joins a group: it prints whatever the environment says
_watch = None  # the `_Watch` of a run of several ranks
_talk = None  # the group of what the ranks say to one another, apart from those of models and gradients


def init_distributed(force: bool = False):
    """Joins the process group that the launcher's environment describes and returns this rank's `torch.device`.

    A plain `python` run has no such environment and stays alone, unless `force` asks for a group of one (DeepSpeed
    wants a group even then).

    Raises:
        UserError: when the environment is not what a launcher sets, the ranks cannot meet, or there is no GPU for one.
    """
    global _talk, _watch
    place = find_place()
    import torch

    distributed, cuda = torch.distributed, torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would warn at every start that it found no other
    store = None
    if place is None:
        for name in LAUNCHER_VARIABLES:  # nor must a library or a child process take this one for a rank
            os.environ.pop(name, None)
    elif not _group_is_up():
        os.environ["LOCAL_RANK"] = str(place.local_rank)  # DeepSpeed insists on it
        store = _meet(place)
        _watch = _Watch(place, store.clone())
    if cuda:
        if local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"rank {rank()} needs GPU {local_rank()} but this machine shows {torch.cuda.device_count()}: "
                "start no more processes than there are GPUs (deepspeed --num_gpus)"
            )
        torch.cuda.set_device(local_rank())
    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    if _group_is_up() or not (place or force):
        return device
    settings = {"backend": "nccl" if cuda else "gloo", "device_id": device if cuda else None, "timeout": WAIT}
    if place is None:
        distributed.init_process_group(store=distributed.HashStore(), rank=0, world_size=1, **settings)
    else:
        distributed.init_process_group(store=store, rank=place.rank, world_size=place.world_size, **settings)
        # Of its own: a rank that failed says so while others are inside a collective call of the default group.
        _talk = distributed.new_group(backend="gloo", timeout=WAIT)
    return device


def _meet(place: Place):
    """Waits until all ranks have arrived at rank 0's store and returns it.

    Raises:
        StartError: when they do not within `START_TIMEOUT_S`, or another run is met there.
    """
    import socket

    distributed = sys.modules["torch"].distributed
    where, end = f"{place.host}:{place.port}", time.monotonic() + START_TIMEOUT_S
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own process holds the store
    hint = "another run may be using the port: pass the launcher another --master_port"

    def answers() -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection((place.host, place.port), timeout=5).close()
            return True
        return False

    def missing() -> int:
        return place.world_size - store.add("arrived", 0)

    try:
        if place.rank or by_agent:
            waiting = f"rank {place.rank} waits for rank 0 at {where}"
            _wait_until(answers, lambda: waiting, end)
        store = distributed.TCPStore(
            place.host,
            place.port,
            is_master=place.rank == 0 and not by_agent,
            wait_for_workers=False,
            timeout=timedelta(seconds=60),
        )
        # A restart by torchrun may meet the keys of the attempt before.
        store = distributed.PrefixStore("attempt" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        if store.add(f"arrived/{place.rank}", 1) > 1:
            time.sleep(2)  # rank 0 cannot have the port either, and says so
            raise StartError(f"rank {place.rank} finds another rank {place.rank} at {where}: {hint}")
        store.add("arrived", 1)

        def waiting_for() -> str:
            others = "1 more process" if missing() == 1 else f"{missing()} more processes"
            return f"rank {place.rank} waits for {others} at {where}"

        _wait_until(lambda: missing() <= 0, waiting_for, end, quiet=place.rank > 0)
    except distributed.DistError as error:
        reason = str(error).splitlines()[0][:160]
        raise StartError(f"rank {place.rank}: the ranks cannot meet at {where}, {hint} ({reason})") from error
    return store


def _wait_until(condition, waiting_for, end: float, quiet: bool = False) -> None:
    notice = time.monotonic() + START_NOTICE_S
    while not condition():
        now = time.monotonic()
        if now > notice and not quiet:
            notice = float("inf")
            say(waiting_for())
        if now > end:
            raise StartError(
                f"{waiting_for()} since {START_TIMEOUT_S:.0f} s: are all processes started, and can every machine "
                "reach that address"
            )
        time.sleep(0.05)


class _Watch:
    """Ends this process when another rank has failed and cannot tell it otherwise.

    Ranks agree on errors by a collective call (`together`). One that is inside another collective call, waiting for the
    rank that failed, would never come to that. So the failing rank also writes its error into the store, and a thread
    of each rank looks there. NCCL does not notice either that a machine has gone, so each rank also gives signs of
    life.
    """

    def __init__(self, place: Place, store):
        self._place, self._store = place, store
        self._calls, self._open = 0, set()  # of `together`: how many were begun, which are not agreed on yet
        self._seen = {}  # reports by their text, with the time of the first look
        self._stopped = threading.Event()
        self._impatient = False
        self.ending = False
        self._thread = threading.Thread(target=self._run, name="other ranks", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def call(self):
        """Context manager: one call of `together`, whose errors end nobody once it is over."""
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
            if not self._stopped.wait(PATIENCE_S):
                self._end([f"rank {self._place.rank}: lost contact with rank 0"], 1)

    def _open_errors(self, now: float) -> list[tuple[dict, float]]:
        """All errors that are not agreed on, with the time of the first look at each."""
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
        kill_children()
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


def is_ending() -> bool:
    """Whether this process is being ended for an error of another rank."""
    return _watch is not None and _watch.ending


def gather_objects(value) -> list:
    """Returns the values of all ranks, by rank, on every rank."""
    if _talk is None:
        return [value]
    values = [None] * world_size()
    sys.modules["torch"].distributed.all_gather_object(values, value, group=_talk)
    return values


def together(function, *args, **kwargs):
    """Calls `function` on every rank and returns its result; where one rank fails, all fail.

    `function` may contain collective calls: when one rank fails and others wait for it in there, all processes end
    after `GRACE_S` seconds with the message and exit code 2.

    Raises:
        ReportedError: on every rank, with every distinct message, when `function` raised `UserError` on any.
    """
    result, message = None, None
    with _watch.call() if _watch is not None else contextlib.nullcontext() as number:
        try:
            result = function(*args, **kwargs)
        except UserError as error:
            message = str(error)
            if _watch is not None:
                _watch.report(message, 2, number)
        messages = gather_objects(message)
    distinct = list(dict.fromkeys(text for text in messages if text is not None))
    if distinct:
        raise ReportedError("; ".join(distinct))
    return result


def first_on_each_node(function, *args, **kwargs):
    """Calls `function` on the first process of each machine, then on the others, which find its work on disk."""

    def call(is_turn):
        return function(*args, **kwargs) if is_turn else None

    first = together(call, local_rank() == 0)
    others = together(call, local_rank() != 0)
    return first if local_rank() == 0 else others


def broadcast_object(value):
    """Gives every rank the object that rank 0 holds."""
    if _talk is None:
        return value
    box = [value]
    sys.modules["torch"].distributed.broadcast_object_list(box, src=0, group=_talk)
    return box[0]


def agree_on(inputs: dict, but: str = "") -> dict:
    """Returns rank 0's `inputs`, which describe by name what a run reads.

    Args:
        but: the name of what rank 0 alone reads.

    Raises:
        ReportedError: on every rank, when another rank's differ.
    """
    first = broadcast_object(inputs)

    def compare():
        for name, value in first.items():
            if name != but and inputs[name] != value:
                raise UserError(
                    f"rank {rank()} reads another {name} than rank 0: every machine needs the same data and models"
                )

    together(compare)
    return first


def broadcast_weights(module) -> None:
    """Gives every rank's `module` the weights of rank 0's: the others need no access to the file they came from."""
    if _talk is not None:
        weights = {name: tensor.cpu() for name, tensor in module.state_dict().items()} if is_main() else None
        module.load_state_dict(broadcast_object(weights))


# ---------------------------------------------------------------------------------------------------------------------
# Messages and endings


def say(line: str) -> None:
    """Prints one line to standard error, above the live progress bar if there is one."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        print(line, file=sys.stderr, flush=True)
    else:
        tqdm.tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


def say_error(message: str) -> None:
    """Prints an error as one line to standard error."""
    say("error: " + " ".join(message.split("\n")))


def log(message: str) -> None:
    """Prints one line to standard error, on rank 0."""
    if is_main():
        say(message)


def warn(message: str) -> None:
    """Prints one warning line to standard error, on rank 0."""
    log(f"warning: {message}")


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


def progress_bar(iterable=None, **options):
    """Returns a tqdm bar of rank 0: live on a terminal, in a log file a line every `LOG_INTERVAL_S` seconds."""
    from tqdm import tqdm

    options = {"disable": not is_main(), **options}
    if not sys.stderr.isatty():
        options |= {"file": _Lines(sys.stderr), "mininterval": LOG_INTERVAL_S, "maxinterval": LOG_INTERVAL_S}
    return tqdm(iterable, **options)


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
    sys.stdout.flush()
    error = getattr(sys.stdout, "error", None)
    if error is None:
        return 0
    print(f"error: cannot write to standard output: {error.strerror}", file=sys.stderr, flush=True)
    return 2


def run_main(main, alone: bool = False) -> None:
    """Runs a command's `main()` and leaves the process with its exit code.

    A `UserError` becomes one line on standard error and exit code 2 on every rank. An error that all ranks share
    (found by `together`, or before the ranks have met, when every rank reads the same arguments) is printed by rank 0
    alone; one that a single rank has met ends the others too, and rank 0 prints it. Anything else is a fault of ours:
    it keeps its traceback and ends the other ranks with exit code 1.

    Args:
        alone: the command never joins a process group, so each of its processes prints.
    """
    global _runs_alone
    _runs_alone = alone
    steady_streams()
    # Before torch and tqdm load. Warnings of torch's C++ part concern sockets that are tried again.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", str(LOG_INTERVAL_S))
    try:
        code = main() or 0
        code = _lost_output() or code
    except UserError as error:
        if _watch is not None and not isinstance(error, ReportedError):
            _fail(str(error), 2)
        if is_main() or isinstance(error, StartError):
            say_error(str(error))
        code = 2
    except KeyboardInterrupt:
        _exit_watched(130)
    except SystemExit as leaving:  # --help
        _exit_watched(leaving.code or _lost_output())
    except Exception as error:
        if _watch is None:
            raise
        _fail_by_fault(error)
    if _group_is_up():
        leave_together()
        sys.modules["torch"].distributed.destroy_process_group()
    _exit_watched(code)


def _exit_watched(code) -> None:
    if _watch is not None:
        _watch.stop()
    sys.exit(code)


def _fail(message: str, code: int) -> None:
    """Tells the other ranks of this rank's error, so that all end; rank 0 prints it."""
    with contextlib.suppress(sys.modules["torch"].distributed.DistError):
        _watch.report(message, code)
        time.sleep(PATIENCE_S)  # the watching thread ends this process before that
    say_error(f"rank {rank()}: {message}")  # rank 0 is gone
    os._exit(code)


def _fail_by_fault(error: Exception) -> None:
    first_line = (str(error).splitlines() or [""])[0][:160]
    if isinstance(error, RuntimeError) and is_lost_peer(error):
        # The process group is broken: leave without the clean-up that would wait for the peer again.
        leave_at_once(
            f"rank {rank()}: lost contact with another rank ({first_line}); start the same command again to continue "
            "from what is saved"
        )
    import traceback

    traceback.print_exc()
    _fail(f"{type(error).__name__}: {first_line} (its traceback is above, or in that rank's output)", 1)


def leave_together() -> None:
    """Waits until every rank has finished its last collective, but no longer than `PATIENCE_S`.

    A rank that closes its connections too early can break that collective on a slower one, and a launcher ends the
    others as soon as one has left. So the ranks count one another in the store that the group was started with, which
    needs none of these connections.
    """
    if _watch is not None:
        _watch.count_out("leaving", PATIENCE_S)
        _watch.stop()


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process of the run is gone."""
    torch = sys.modules["torch"]
    signs = ("onnection closed by peer", "onnection reset by peer", "ocket Timeout", "imed out", "roken pipe")
    signs += ("onnection refused", "emote process exited")
    return isinstance(error, torch.distributed.DistError) or any(sign in str(error) for sign in signs)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    torch = sys.modules["torch"]
    signs = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in signs)


def leave_at_once(message: str):
    """Prints one line and ends the process without any clean-up, exit code 1; an error that another rank has reported
    is the better explanation and ends the process first."""
    if _watch is not None and _watch.hurry():
        time.sleep(PATIENCE_S)
    say_error(message)
    kill_children()
    os._exit(1)


def kill_children() -> None:
    """Ends the processes that tokenise: os._exit skips what otherwise ends them."""
    for name in ("multiprocessing", "multiprocess"):  # datasets has a multiprocessing of its own
        if (module := sys.modules.get(name)) is not None:
            for child in module.active_children():
                child.kill()


def versions() -> dict[str, str]:
    """Versions of everything a result may depend on."""
    found = {"mindmerger": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "transformers", "deepspeed", "datasets", "tokenizers", "sentencepiece", "safetensors"):
        found[name] = metadata.version(name)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Files


def is_utf8(path) -> bool:
    """Whether a path can be written in UTF-8, as the libraries that read models and data sets need it."""
    return not any("\ud800" <= c <= "\udfff" for c in str(path))


def open_new(path):
    """Opens a new file for writing bytes. What stands in its place, a link too, is removed and never written to.

    Raises:
        OSError: when that is a folder, comes back at once, or the disk refuses.
    """
    Path(path).unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb")


def unfollowed(path, flags: int) -> int:
    """An `opener` for `open` that refuses a symbolic link in place of the file."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_bytes_atomic(path, data: bytes) -> None:
    """Replaces `path` by `data` so that a reader, or a crash, meets the old content or the new, never a part.

    Raises:
        UserError: naming the path and the number of bytes when the disk refuses them.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_new(temporary) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({len(data)} bytes): {error.strerror or error}") from error


def write_text_atomic(path, text: str) -> None:
    """`write_bytes_atomic` for UTF-8 text. A byte of a path that is not UTF-8 becomes \\udcXX, JSON's own escape."""
    write_bytes_atomic(path, text.encode("utf-8", "backslashreplace"))


def write_json_atomic(path, value) -> None:
    """`write_bytes_atomic` for a JSON value, indented, with its own scripts readable."""
    write_text_atomic(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")
