"""Runs programs in forks of one process that has imported what they import: a start then costs a tenth of a second, not
the seconds that torch, transformers and DeepSpeed take.

Reads requests from standard input until it closes, a JSON object on each line: {"command": [script, flag, …], "cwd",
"env", "ranks", "output": [a file for each rank], "seconds"}. Answers each with a line: the ranks' exit codes as a list,
None for a rank that had to be killed.
"""

import importlib
import json
import os
import pkgutil
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import mindmerger

HEAVY = ["datasets", "multiprocess", "pyarrow.compute", "matplotlib.figure", "matplotlib.backends.backend_agg"]
HEAVY += ["transformers.models.llama.modeling_llama", "transformers.models.mt5.modeling_mt5", "transformers.generation"]
HEAVY += ["transformers.models.auto.tokenization_auto", "run_training", "run_evaluation"]
HEAVY += [module.name for module in pkgutil.walk_packages(mindmerger.__path__, "mindmerger.")]


def load():
    """Imports what the programs import, none of which starts a thread."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as `run_main` does, which comes after torch here
    for name in HEAVY:
        importlib.import_module(name)
    if not Path("/dev/nvidiactl").exists():  # where there is a GPU, DeepSpeed's import opens it, and no fork may use it
        os.environ["DS_ACCELERATOR"] = "cpu"
        from mindmerger.training.deepspeed_engine import import_deepspeed_quietly

        import_deepspeed_quietly()


def become(request, number, port):
    """Becomes one rank of a program; never returns but by an exception."""
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["output"][number], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(path, flags, 0o666), descriptor)
    os.dup2(1, 2)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if request["ranks"] > 1:
        place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": request["ranks"], "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in (place | {"MASTER_PORT": port}).items()})
    script, *_ = sys.argv = request["command"]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
    raise SystemExit(0)


def fork(request, number, port):
    """The process id of one rank."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        become(request, number, port)
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def outcome(request):
    """The exit codes of a program's ranks."""
    from conftest import free_port

    port, end = free_port(), time.monotonic() + request["seconds"]
    codes = dict.fromkeys(fork(request, number, port) for number in range(request["ranks"]))
    while None in codes.values() and time.monotonic() < end:
        time.sleep(0.02)
        for pid, code in codes.items():
            if code is None and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
    for pid, code in codes.items():
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return list(codes.values())


def main():
    """Serves requests."""
    load()
    for line in sys.stdin:
        print(json.dumps(outcome(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
