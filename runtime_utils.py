"""What both command lines share: the process group, errors of one line, and files that are never half-written.

A leaf: it imports no other module of the project, and heavy libraries only inside functions, so that `--help` stays
quick.
"""

import argparse
import contextlib
import json
import os
import sys
import time
import unicodedata
from importlib import metadata
from pathlib import Path

__version__ = "0.1.0"

# Seconds that a rank which has finished waits for the others before it leaves.
PATIENCE_S = 20.0


class UserError(Exception):
    """A mistake the user can mend. The message is one line: what is wrong, where, and what to do."""


class ReportedError(UserError):
    """A `UserError` that all ranks have agreed on, so that rank 0 alone prints it."""


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


def _group_is_up() -> bool:
    # Asking sys.modules keeps torch out of commands that never needed it.
    torch = sys.modules.get("torch")
    return bool(torch and torch.distributed.is_available() and torch.distributed.is_initialized())


def rank() -> int:
    """This process's number among all processes of the run, 0 when it is alone."""
    if _group_is_up():
        return sys.modules["torch"].distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes the run has."""
    if _group_is_up():
        return sys.modules["torch"].distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its own machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """True on the one process that prints and writes."""
    return rank() == 0


def init_distributed(force: bool = False):
    """Joins the process group that the launcher's environment describes and returns this rank's `torch.device`.

    A plain `python` run has no such environment and stays alone, unless `force` asks for a group of one (DeepSpeed
    wants a group even then).
    """
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        if local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"rank {rank()} needs GPU {local_rank()} but this machine shows {torch.cuda.device_count()}: "
                "start no more processes than there are GPUs (deepspeed --num_gpus)"
            )
        torch.cuda.set_device(local_rank())
    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    if _group_is_up() or not ("WORLD_SIZE" in os.environ or force):
        return device
    backend = "nccl" if cuda else "gloo"
    # Alone, the environment stays as it is: a child process must not take itself for a rank of this run.
    alone = {} if "WORLD_SIZE" in os.environ else {"init_method": _local_address(), "rank": 0, "world_size": 1}
    try:
        torch.distributed.init_process_group(backend, device_id=device if cuda else None, **alone)
    except torch.distributed.DistNetworkError as error:
        raise UserError(
            f"the ranks cannot meet at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}, another run "
            "may be using the port: pass the launcher another --master_port"
        ) from error
    return device


def _local_address() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def together(function, *args, **kwargs):
    """Calls `function` on every rank and returns its result; where one rank fails, all fail.

    Raises:
        ReportedError: on every rank, with every distinct message, when `function` raised `UserError` on any.
    """
    result, message = None, None
    try:
        result = function(*args, **kwargs)
    except UserError as error:
        message = str(error)
    if _group_is_up() and world_size() > 1:
        messages = [None] * world_size()
        sys.modules["torch"].distributed.all_gather_object(messages, message)
    else:
        messages = [message]
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
    if not (_group_is_up() and world_size() > 1):
        return value
    box = [value]
    sys.modules["torch"].distributed.broadcast_object_list(box, src=0)
    return box[0]


# ---------------------------------------------------------------------------------------------------------------------
# Messages and endings


def log(message: str) -> None:
    """Prints one line to standard error, on rank 0."""
    if is_main():
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Prints one warning line to standard error, on rank 0."""
    log(f"warning: {message}")


def run_main(main) -> None:
    """Runs a command's `main()` and leaves the process with its exit code.

    A `UserError` becomes one line on standard error and exit code 2 on every rank. An error that all ranks share
    (found by `together`, or before the process group is up, when every rank reads the same arguments) is printed by
    rank 0 alone. Anything else is a fault of ours and keeps its traceback.
    """
    try:
        code = main() or 0
    except UserError as error:
        shared = isinstance(error, ReportedError) or not _group_is_up()
        if is_main() or not shared:
            print("error: " + " ".join(str(error).split("\n")), file=sys.stderr, flush=True)
        code = 2
        if not shared:
            sys.exit(code)  # the others do not know of it yet
    except KeyboardInterrupt:
        sys.exit(130)
    if _group_is_up():
        leave_together()
        sys.modules["torch"].distributed.destroy_process_group()
    sys.exit(code)


def leave_together() -> None:
    """Waits until every rank has finished its last collective, but no longer than `PATIENCE_S`.

    A rank that closes its connections too early can break that collective on a slower one, and a launcher ends the
    others as soon as one has left. So the ranks count one another in the store that the group was started with, which
    needs none of these connections.
    """
    distributed = sys.modules["torch"].distributed
    try:
        store = distributed.distributed_c10d._get_default_store()
        end = time.monotonic() + PATIENCE_S
        here = store.add("mindmerger/leaving", 1)
        while here < world_size() and time.monotonic() < end:
            time.sleep(0.02)
            here = store.add("mindmerger/leaving", 0)
    except distributed.DistError:
        pass  # the rank that keeps the store has left: it counted all


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
    """Prints one line and ends the process without any clean-up, exit code 1."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def versions() -> dict[str, str]:
    """Versions of everything a result may depend on."""
    found = {"mindmerger": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "transformers", "deepspeed", "datasets", "tokenizers", "sentencepiece", "safetensors"):
        found[name] = metadata.version(name)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Files


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
    """`write_bytes_atomic` for UTF-8 text."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path, value) -> None:
    """`write_bytes_atomic` for a JSON value, indented, with its own scripts readable."""
    write_text_atomic(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")
