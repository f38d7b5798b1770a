"""The process group: who am I, joining it, agreeing on errors, messages, and leaving it together.

Heavy libraries are imported inside functions only, so that `--help` stays quick.
"""

import contextlib
import gc
import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta

from mindmerger.runtime.errors import ReportedError, StartError, UserError, one_line
from mindmerger.runtime.files import FolderLock
from mindmerger.runtime.messages import _Lines, say, say_error
from mindmerger.runtime.place import LAUNCHER_VARIABLES, Place, _place_or_alone, find_place
from mindmerger.runtime.watch import LEAVING_WAIT_S, _Watch, clear_away

# Ranks wait for one another as long as it takes to tokenise, to download, to read a slow disk: the libraries' ten
# minutes would end such a run. A rank that has died is noticed otherwise.
WAIT = timedelta(days=30)
# At the start: seconds until a rank says whom it waits for, and until it gives up.
START_NOTICE_S, START_TIMEOUT_S = 10.0, 600.0


# Seconds between two lines of a progress bar in a log file.
LOG_INTERVAL_S = 30.0


def _group_is_up() -> bool:
    # Asking sys.modules keeps torch out of commands that never needed it.
    torch = sys.modules.get("torch")
    return bool(torch and torch.distributed.is_available() and torch.distributed.is_initialized())


def rank() -> int:
    """Returns this process's number among all processes of the run, 0 when it is alone."""
    if _group_is_up():
        return sys.modules["torch"].distributed.get_rank()
    # Before the ranks have met the launcher's variables tell: messages of that time come once, too.
    place = None if _runs_alone else _place_or_alone()
    return place.rank if place else 0


def world_size() -> int:
    """Returns how many processes the run has."""
    if _group_is_up():
        return sys.modules["torch"].distributed.get_world_size()
    place = _place_or_alone()
    return place.world_size if place else 1


def local_rank() -> int:
    """Returns this process's number on its own node."""
    place = _place_or_alone()
    return place.local_rank if place else 0


def is_main() -> bool:
    """Returns True on the one process that prints and writes."""
    return rank() == 0


_runs_alone = False  # a command that never joins a group: it prints whatever the environment says
_watch = None  # the `_Watch` of a run of several ranks
_talk = None  # the group of what the ranks say to one another, apart from those of models and gradients


def init_distributed(force: bool = False):
    """Joins the process group that the launcher's environment describes and returns this rank's `torch.device`.

    A plain `python` run has no such environment and stays alone, unless `force` asks for a group of one (DeepSpeed
    needs a group even then).

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
                f"rank {rank()} needs GPU {local_rank()} but this node shows {torch.cuda.device_count()}: "
                "start no more processes than there are GPUs (deepspeed --num_gpus)"
            )
        torch.cuda.set_device(local_rank())
    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    if _group_is_up() or not (place or force):
        return device
    # device_id: else NCCL takes the GPU from the rank among all nodes, which a second node does not have.
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
            wait_for_workers=False,  # the waiting is done below, where it can say for whom
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
        reason = one_line(error)
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
                f"{waiting_for()} since {START_TIMEOUT_S:.0f} s: are all processes started, and can every node "
                "reach that address"
            )
        time.sleep(0.05)


def stay_alone(alone: bool) -> None:
    """Says whether this command never joins a process group, so that each of its processes prints."""
    global _runs_alone
    _runs_alone = alone


def is_watched() -> bool:
    """Tells whether this process is one of several ranks, which end together."""
    return _watch is not None


def is_ending() -> bool:
    """Tells whether this process is being ended for an error of another rank."""
    return _watch is not None and _watch.ending


def gather_objects(value) -> list:
    """Returns the values of all ranks, by rank, on every rank."""
    if _talk is None:
        return [value]
    values = [None] * world_size()
    sys.modules["torch"].distributed.all_gather_object(values, value, group=_talk)
    return values


def on_all_ranks(function, *args, **kwargs):
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
    # Ranks mostly fail for the same reason, and then share one line.
    distinct = list(dict.fromkeys(text for text in messages if text is not None))
    if distinct:
        raise ReportedError("; ".join(distinct))
    return result


def first_on_each_node(function, *args, **kwargs):
    """Calls `function` on the first process of each node, then on the others, which find its work on disk."""

    def call(is_turn):
        return function(*args, **kwargs) if is_turn else None

    # Both are calls of all ranks: an error in the first ends all, and nobody waits for the second.
    first = on_all_ranks(call, local_rank() == 0)
    others = on_all_ranks(call, local_rank() != 0)
    return first if local_rank() == 0 else others


def on_rank_0(function, *args, **kwargs):
    """Calls `function` on rank 0 alone and returns its result on every rank; where it fails, all fail.

    Raises:
        ReportedError: on every rank, when `function` raised `UserError`.
    """
    return broadcast_object(on_all_ranks(lambda: function(*args, **kwargs) if is_main() else None))


@contextlib.contextmanager
def locked_folder(folder, flag: str = "--save_name"):
    """Context manager: a folder belongs to this run alone.

    Args:
        flag: the one that chooses another folder, for the message.

    Raises:
        ReportedError: on every rank, when another run holds it.
    """
    # Rank 0's lock alone: it writes everything, and on another node the folder may be another disk's.
    lock = on_all_ranks(lambda: FolderLock(folder, flag) if is_main() else None)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


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
                    f"rank {rank()} reads another {name} than rank 0: every node needs the same data and models"
                )

    on_all_ranks(compare)
    return first


def broadcast_weights(module) -> None:
    """Gives every rank's `module` the weights of rank 0's: the others need no access to the file they came from."""
    if _talk is not None:
        # By the CPU: the ranks talk over gloo, and a mapping is small.
        weights = {name: tensor.cpu() for name, tensor in module.state_dict().items()} if is_main() else None
        module.load_state_dict(broadcast_object(weights))


def log(message: str) -> None:
    """Prints one line to standard error, on rank 0."""
    if is_main():
        say(message)


def warn(message: str) -> None:
    """Prints one warning line to standard error, on rank 0."""
    log(f"warning: {message}")


def progress_bar(iterable=None, **options):
    """Returns a tqdm bar of rank 0: live on a terminal, in a log file a line every `LOG_INTERVAL_S` seconds."""
    from tqdm import tqdm

    options = {"disable": not is_main(), **options}
    if not sys.stderr.isatty():
        options |= {"file": _Lines(sys.stderr), "mininterval": LOG_INTERVAL_S, "maxinterval": LOG_INTERVAL_S}
    return tqdm(iterable, **options)


def _exit_watched(code) -> None:
    if _watch is not None:
        _watch.stop()
    gc.freeze()  # else Python would look for garbage among all that the libraries have made, for a second
    sys.exit(code)


def _fail(message: str, code: int) -> None:
    """Tells the other ranks of this rank's error, so that all end; rank 0 prints it."""
    with contextlib.suppress(sys.modules["torch"].distributed.DistError):
        _watch.report(message, code)
        time.sleep(LEAVING_WAIT_S)  # the watching thread ends this process before that
    say_error(f"rank {rank()}: {message}")  # rank 0 is gone
    os._exit(code)


def _fail_by_fault(error: Exception) -> None:
    reason = one_line(error)
    if isinstance(error, RuntimeError) and is_lost_peer(error):
        # The process group is broken: leave without the clean-up that would wait for the peer again.
        leave_at_once(
            f"rank {rank()}: lost contact with another rank ({reason}); start the same command again to continue "
            "from what is saved"
        )
    import traceback

    traceback.print_exc()
    _fail(f"{type(error).__name__}: {reason} (its traceback is above, or in that rank's output)", 1)


def leave_together() -> None:
    """Waits until every rank has finished its last collective, but no longer than `LEAVING_WAIT_S`.

    A rank that closes its connections too early can break that collective on a slower one, and a launcher ends the
    others as soon as one has left. So the ranks count one another in the store that the group was started with, which
    needs none of these connections.
    """
    if _watch is not None:
        _watch.count_out("leaving", LEAVING_WAIT_S)
        _watch.stop()


def is_lost_peer(error: RuntimeError) -> bool:
    """Tells whether a collective failed because another process of the run is gone."""
    # gloo and NCCL raise plain RuntimeErrors: their texts, of changing capitals, are all there is to go by.
    torch = sys.modules["torch"]
    signs = ("onnection closed by peer", "onnection reset by peer", "ocket Timeout", "imed out", "roken pipe")
    signs += ("onnection refused", "emote process exited")
    return isinstance(error, torch.distributed.DistError) or any(sign in str(error) for sign in signs)


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether an error says that memory ran out, on a GPU or on the host."""
    torch = sys.modules["torch"]
    signs = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in signs)


@contextlib.contextmanager
def explain_out_of_memory(where: str, sizes: Mapping[str, int], advice: str):
    """Context manager: running out of memory becomes an error that says where, on how many tokens, and what to do.

    Args:
        where: as it follows "out of memory": on a batch of 8 examples.
        sizes: the longest row of each kind, in tokens; empty where there is no batch.
        advice: the flags to lower, or to add.

    Raises:
        UserError: when memory ran out, on a GPU or on the host.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        longest = ", ".join(f"{name} {tokens}" for name, tokens in sizes.items())
        longest = f", longest {longest} tokens" if longest else ""
        raise UserError(f"out of memory {where}{longest}: {advice}") from error


def leave_at_once(message: str):
    """Prints one line and ends the process without any clean-up, exit code 1; an error that another rank has reported
    is the better explanation and ends the process first."""
    if _watch is not None and _watch.hurry():
        time.sleep(LEAVING_WAIT_S)
    say_error(message)
    # Not sys.exit: NCCL's clean-up would wait for the rank that is gone.
    clear_away()
    os._exit(1)
