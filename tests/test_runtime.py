"""Meeting and leaving, stray variables, messages and bars, locks, links in the place of files, and output."""

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest
import torch
from conftest import ROOT, free_port

from mindmerger.evaluation import results
from mindmerger.runtime import command as runtime_command
from mindmerger.runtime import files, processes
from mindmerger.runtime import place as runtime_place
from mindmerger.runtime import watch as runtime_watch
from mindmerger.runtime.errors import UserError, one_line
from mindmerger.training import checkpoints
from mindmerger.training.record import Recorder

M = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29876"}
PROGRAM = """
import sys, time
from mindmerger.runtime import command
from mindmerger.runtime import processes

def main():
    processes.init_distributed()
    processes.on_all_ranks(lambda: None)
    if processes.rank() == int(sys.argv[1]):
        time.sleep(3)
    print(time.time(), flush=True)
    return 7

command.run_main(main)
"""


def test_the_thread_that_watches_other_ranks_has_ended_before_its_process_does():
    """Inside the store's C++ code at the interpreter's end it aborted the process, once in some hundred runs."""
    watch = runtime_watch._Watch(runtime_place.Place(0, 2, 0, "localhost", 1), torch.distributed.HashStore())
    assert "other ranks" in {thread.name for thread in threading.enumerate()}
    watch.stop()
    assert "other ranks" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_no_rank_leaves_before_the_slowest_has_finished_its_last_collective(slow_rank):
    """A rank that closed its connections early could break the last collective on a slower one."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(slow_rank)],
            env={**os.environ, **place, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    ends = [0.0, 0.0]
    while any(process.poll() is None for process in ranks):
        for number, process in enumerate(ranks):
            if process.poll() is None:
                ends[number] = time.time()
        time.sleep(0.01)
    printed = [float(process.communicate()[0]) for process in ranks]
    assert [process.returncode for process in ranks] == [7, 7]
    assert ends[1 - slow_rank] >= printed[slow_rank], "the quick rank was gone before the slow one was through"


# The main thread of rank 0 or 1 waits in a call that does not notice what becomes of the other, as NCCL's do not.
LOST = """
import os, signal, sys, time
from mindmerger.runtime import command
from mindmerger.runtime import processes
from mindmerger.runtime import watch

watch.BEAT_S, watch.LOST_S, watch.LEAVING_WAIT_S = 0.2, 2.0, 1.0

def main():
    processes.init_distributed()
    processes.on_all_ranks(lambda: None)
    if processes.rank() == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGSTOP if sys.argv[2] == "stops" else signal.SIGKILL)
    time.sleep(60)

command.run_main(main)
"""


@pytest.mark.parametrize(
    ("lost", "how", "says"),
    [
        (1, "stops", "error: rank 1 gave no sign of life for 2 s"),
        (0, "dies", "error: rank 1: lost contact with rank 0"),
    ],
)
def test_a_rank_that_is_lost_without_a_word_ends_the_others_whatever_they_wait_in(lost, how, says):
    """A node without power; gloo notices a closed connection, NCCL nothing at all."""
    place = {"WORLD_SIZE": "2", **M, "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LOST, str(lost), how],
            env={**os.environ, **place, "RANK": str(number), "LOCAL_RANK": str(number)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        error = ranks[1 - lost].communicate(timeout=40)[1]
        assert ranks[1 - lost].returncode == 1 and error.splitlines() == [says]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
            process.stderr.close()


@pytest.fixture
def variables(monkeypatch):
    """Sets a launcher's variables, and no others, for one test."""

    def call(values):
        for name in runtime_place.LAUNCHER_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return call


@pytest.mark.parametrize(
    "strays",
    [
        *({"RANK": "3"}, {"WORLD_SIZE": "4"}, {"WORLD_SIZE": "words"}, {"RANK": "", "WORLD_SIZE": "4", **M}),
        *({"RANK": "words", "WORLD_SIZE": ""}, {"WORLD_SIZE": "4", "LOCAL_RANK": "2", **M}, {"LOCAL_RANK": "words"}),
        *({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "nowhere", "MASTER_PORT": "words"}, M),
    ],
)
def test_stray_variables_of_a_launcher_leave_a_process_alone(variables, strays, capsys):
    variables(strays)
    processes.log("heard")  # before anything is known of a group
    device = processes.init_distributed()
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert (processes.rank(), processes.world_size(), processes.local_rank()) == (0, 1, 0)
    assert capsys.readouterr().err == "heard\n"
    assert not [name for name in runtime_place.LAUNCHER_VARIABLES if name in os.environ]  # nor do children see them


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"RANK": "x"}, "RANK='x'"),
        ({"RANK": "4"}, "RANK='4'"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE='four'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT='99999'"),
        ({"MASTER_PORT": "words"}, "MASTER_PORT='words'"),
        ({"MASTER_ADDR": ""}, "no MASTER_ADDR and MASTER_PORT"),
        ({"MASTER_PORT": " "}, "no MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_variables_that_no_launcher_sets_are_one_line_that_names_them(variables, wrong, named, capsys):
    variables({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **M, **wrong})
    with pytest.raises(SystemExit) as ended:
        runtime_command.run_main(processes.init_distributed)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ") and named in error


def test_commands_that_join_no_group_speak_whatever_rank_the_environment_names():
    """A refusal was silent with `RANK=1`: rank 0 was left to print it."""
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **M}
    done = subprocess.run(
        [sys.executable, "-m", "mindmerger.baselines.layer_swap", "--unknown"],
        cwd=ROOT,
        env={**os.environ, **place},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("rank", "waits_for"), [(0, "rank 0 waits for 2 more processes"), (1, "rank 1 waits for rank 0")]
)
def test_a_rank_that_waits_at_the_start_says_for_whom_and_ends_in_one_line(
    variables, rank, waits_for, capsys, monkeypatch
):
    """It waited for half an hour without a word, then came a traceback."""
    monkeypatch.setattr(processes, "START_NOTICE_S", 0.3)
    monkeypatch.setattr(processes, "START_TIMEOUT_S", 1.0)
    port = str(free_port())
    variables({"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": "0", **M, "MASTER_PORT": port})
    with pytest.raises(SystemExit) as ended:
        runtime_command.run_main(processes.init_distributed)
    notice, error, end = capsys.readouterr().err.split("\n")
    assert notice == f"{waits_for} at 127.0.0.1:{port}"
    assert error.startswith(f"error: {notice} since 1 s") and end == "" and ended.value.code == 2


def test_a_port_that_another_program_uses_is_named_in_one_line(variables, capsys):
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        where = f"127.0.0.1:{other.getsockname()[1]}"
        variables({"RANK": "0", "WORLD_SIZE": "2", **M, "MASTER_PORT": where.split(":")[1]})
        with pytest.raises(SystemExit) as ended:
            runtime_command.run_main(processes.init_distributed)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1, error
    assert f"the ranks cannot meet at {where}" in error and "--master_port" in error


BAR = """
from mindmerger.runtime import processes
with processes.progress_bar(total=3, desc="steps") as bar:
    for number in range(3):
        bar.update()
        bar.refresh()
        processes.log(f"message {number}")
"""


def test_messages_stand_on_lines_of_their_own_above_a_live_progress_bar():
    """They began where the bar's line ended."""
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", BAR], stderr=terminal, env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # so ends the reading of a terminal whose other end is closed
        while chunk := os.read(controller, 4096):
            shown += chunk
    os.close(controller)
    assert process.wait() == 0
    for number in range(3):
        assert f"\rmessage {number}\r\n".encode() in shown, shown
    assert b"steps: 100%" in shown.rsplit(b"message 2", 1)[1]


def test_a_progress_bar_in_a_log_file_is_a_line_every_30_seconds(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with processes.progress_bar(total=100, desc="steps", dynamic_ncols=False) as bar:
        for _ in range(100):
            now[0] += 1
            bar.update()
    error = capsys.readouterr().err
    states = [int(line.split("%")[0].removeprefix("steps:")) for line in error.splitlines()]
    assert "\r" not in error and states == [0, 30, 60, 90, 100], error


@pytest.mark.parametrize(
    "setting",
    ["MININTERVAL=abc", "MININTERVAL=", "NCOLS=wide", "TOTAL=all", "BAR_FORMAT={nothing}", "ASCII=x", "FILE=log"],
)
def test_a_variable_with_which_no_bar_can_be_drawn_is_named_in_one_line(setting):
    """The drawing library reads them as it loads, so that any command ended in its traceback."""
    name, _, value = f"TQDM_{setting}".partition("=")
    command = [sys.executable, "-m", "mindmerger.analysis.contamination", "--train", "absent.txt"]
    # Tests before this one may have drawn bars in this process, which leaves such variables for the libraries'.
    rest = {one: text for one, text in os.environ.items() if not one.startswith("TQDM_")}
    done = subprocess.run(command, env={**rest, name: value}, capture_output=True, text=True, cwd=ROOT)
    start = f"error: the environment has {name}={value!r}, with which tqdm draws no progress bar ("
    assert done.returncode == 2 and done.stderr.startswith(start), done.stderr
    assert done.stderr.endswith(f"): unset {name}\n") and done.stderr.count("\n") == 1


def test_variables_with_which_bars_can_be_drawn_are_taken(monkeypatch):
    for name, value in (("TQDM_MININTERVAL", "5"), ("TQDM_DISABLE", "1"), ("TQDM_OTHER", "abc")):
        monkeypatch.setenv(name, value)
    runtime_command.check_progress_settings()


def test_a_lock_file_removed_while_it_was_being_locked_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    """The run that held the folder removes the file when it ends, maybe after the next run has opened it."""
    lockf, calls = files.fcntl.lockf, []

    def lock_late(file, how):
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        return lockf(file, how)

    monkeypatch.setattr(files.fcntl, "lockf", lock_late)
    lock = files.FolderLock(tmp_path)
    assert len(calls) == 2 and str(os.getpid()) in (tmp_path / ".lock").read_text()
    lock.release()
    assert not (tmp_path / ".lock").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Links in the place of files


@pytest.fixture
def victim(tmp_path):
    """A file elsewhere whose content must stay."""
    file = tmp_path / "elsewhere" / "victim"
    file.parent.mkdir()
    file.write_text("precious")
    yield file
    assert file.read_text() == "precious"


@pytest.fixture(params=["symbolic", "hard"])
def plant(request, victim):
    """Puts a link to the victim at a path."""

    def call(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(victim) if request.param == "symbolic" else os.link(victim, path)

    return call


def test_a_lock_never_writes_through_a_link(tmp_path, plant):
    """The lock emptied whatever file a link in its place led to."""
    path = tmp_path / "outputs" / ".lock"
    plant(path)
    with pytest.raises(UserError, match=r"outputs/\.lock is .*: remove it$"):
        files.FolderLock(path.parent)
    path.unlink()
    files.FolderLock(path.parent).release()


def test_a_lock_that_is_a_pipe_is_refused_in_one_line(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UserError, match=r"\.lock"):
        files.FolderLock(tmp_path)


def test_an_atomic_write_never_writes_through_a_link_in_place_of_its_temporary_file(tmp_path, plant, victim):
    path = tmp_path / "outputs" / "args.json"
    plant(path.with_name(f".args.json.{os.getpid()}.tmp"))
    plant(path)
    files.write_json_atomic(path, {"a": 1})
    assert path.read_text() == '{\n  "a": 1\n}\n' and not path.is_symlink()
    assert [entry.name for entry in path.parent.iterdir()] == ["args.json"]
    assert victim.stat().st_nlink == 1
    path.with_name(f".args.json.{os.getpid()}.tmp").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*args\.json \(13 bytes\)"):
        files.write_json_atomic(path, {"a": 1})


def test_a_checkpoint_never_writes_into_the_folder_a_link_leads_to(tmp_path, victim):
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    (outputs / "checkpoint-000001.tmp").symlink_to(victim.parent)
    checkpoints.write_checkpoint(outputs, 1, {"x": torch.zeros(1)}, {}, None)
    assert checkpoints.damage_in(outputs / "checkpoint-000001") is None
    (outputs / ".args.json.1.tmp").mkdir()  # a folder where a temporary file would be
    checkpoints.remove_leftovers(outputs)
    assert [entry.name for entry in victim.parent.iterdir()] == ["victim"]


def test_unfinished_answers_and_logs_never_go_through_a_link(tmp_path, victim):
    folder = tmp_path / "results"
    (folder / ".partial").mkdir(parents=True)
    (folder / ".partial" / "rank0.jsonl").symlink_to(victim)
    with pytest.raises(UserError, match=r"rank0\.jsonl"):
        results.open_shard(folder, 0)
    results.open_results(folder, {}, [], False)
    results.open_shard(folder, 0).close()
    other = tmp_path / "others"
    other.mkdir()
    (other / ".partial").symlink_to(victim.parent)
    results.open_results(other, {}, [], False)
    assert [entry.name for entry in victim.parent.iterdir()] == ["victim"]
    (tmp_path / "log.jsonl").symlink_to(victim)
    record = Recorder(argparse.Namespace(report_to="none", logging_steps=1), tmp_path)
    with pytest.raises(UserError, match=r"cannot write .*log\.jsonl"):
        record({"loss": 1.0}, 0)
    record.rewind(0)  # a run begins so: the link is replaced by a file
    record({"loss": 1.0}, 0)


def test_the_cache_of_tokenised_data_never_goes_through_a_link(tmp_path, victim, tiny_llm, tiny_encoder, datas):
    from mindmerger.data.tokenising import load_tokenizers
    from mindmerger.data.training_set import open_or_build
    from mindmerger.tasks import find_task
    from mindmerger.tasks.examples import StageData

    cache = tmp_path / "cache"
    settings = {"max_seq_len": 20, "max_gen_len": 20, "with_prompt": False, "cache_dir": cache}
    stage = StageData(find_task("math"), "mapping", datas, train_num=2)
    inputs = (stage, load_tokenizers(tiny_encoder, tiny_llm))
    name = open_or_build(*inputs, **settings).fingerprint
    shutil.rmtree(cache)
    cache.mkdir()
    (cache / f".{name}.lock").symlink_to(victim)
    with pytest.raises(UserError, match=f"cannot write the tokenised data.*{name}"):
        open_or_build(*inputs, **settings)
    (cache / f".{name}.lock").unlink()
    (cache / f".{name[:16]}-planted.tmp").symlink_to(victim.parent)
    open_or_build(*inputs, **settings)


SPINNING = """
from mindmerger.runtime import command

def main():
    import torch
    torch.ones(2, 2) @ torch.ones(2, 2)

command.run_main(main)
"""


@pytest.mark.parametrize(
    ("given", "shown"),
    [({}, runtime_command.SPIN_COUNT), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
)
def test_threads_spin_for_as_long_as_we_or_the_user_say(given, shown):
    """As torch's own OpenMP library says it when it loads: set too late, it would have its default."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "VERBOSE", **given}
    done = subprocess.run([sys.executable, "-c", SPINNING], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)) == {shown}


COLLECTING = """
import atexit, gc
from mindmerger.runtime import command

def main():
    atexit.register(lambda: print(gc.get_freeze_count() > 1000))
    print(gc.get_threshold()[2])
    command.collect_as_usual()
    print(gc.get_threshold() == usual)

usual = gc.get_threshold()
command.run_main(main)
"""


def test_garbage_is_hardly_looked_for_at_the_start_as_usual_afterwards_and_not_at_the_end():
    """Of a program that has loaded torch and transformers Python's last look took more than a second."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COLLECTING]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.split() == ["1000", "True", "True"], done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Where output goes: encodings that lack a character, readers that go away, full disks, closed streams

PRINTING = """
import sys
from mindmerger.runtime import command, processes

def main():
    for i in range(20_000):  # more than a pipe holds
        print("line", i, "é中", "\\udcff")
    processes.log("almost done é")
    open(sys.argv[1], "w").write("whole")
    return int(sys.argv[2])

command.run_main(main)
"""


@pytest.fixture
def printing(tmp_path):
    """Runs a command that prints much, by a line of bash: exit codes, output, and whether it got through."""

    def call(line, encoding="utf-8", code=0):
        command = f'set -o pipefail; prog() {{ "{sys.executable}" -c "$PROGRAM" "{tmp_path}/ran" {code}; }}; {line}'
        command += '; echo "${PIPESTATUS[@]}" > codes'
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "PROGRAM": PRINTING}
        done = subprocess.run(["bash", "-c", command], capture_output=True, env=environment, cwd=tmp_path, timeout=60)
        got_through = (tmp_path / "ran").exists() and (tmp_path / "ran").read_text() == "whole"
        return (tmp_path / "codes").read_text().split(), done, got_through

    return call


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("latin-1", b"line 0 \xe9\\u4e2d \\udcff"),
        ("ascii", b"line 0 \\xe9\\u4e2d \\udcff"),
        ("utf-8", "line 0 é中 \\udcff".encode()),
    ],
)
def test_a_character_that_the_output_encoding_lacks_is_escaped_and_ends_nothing(printing, encoding, shown):
    codes, done, got_through = printing("prog", encoding)
    assert codes == ["0"] and got_through and b"Traceback" not in done.stderr
    assert done.stdout.splitlines()[0] == shown and len(done.stdout.splitlines()) == 20_000


@pytest.mark.parametrize(
    "line", ["prog | head -1", "prog 2>&1 | head -1", "prog 2> >(exit 0) | head -1", "prog 2>&- | head -1"]
)
@pytest.mark.parametrize("code", [0, 3])
def test_a_reader_that_goes_away_ends_nothing_and_changes_no_exit_code(printing, line, code):
    codes, done, got_through = printing(line, code=code)
    assert codes == [str(code), "0"] and got_through
    assert done.stdout.decode().splitlines() == ["line 0 é中 \\udcff"]
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


def test_output_that_a_full_disk_refuses_is_one_line_and_exit_code_2_once_the_work_is_done(printing):
    codes, done, got_through = printing("prog > /dev/full")
    assert codes == ["2"] and got_through
    said = done.stderr.decode().splitlines()
    assert said == ["almost done é", "error: cannot write to standard output: No space left on device"]


def test_closed_streams_are_dropped_and_no_file_takes_their_place(printing):
    """Messages for a closed standard error came out on standard output, or in the next file that was opened."""
    codes, done, got_through = printing("prog 2>&-")
    assert codes == ["0"] and got_through and b"almost done" not in done.stdout
    codes, done, got_through = printing("prog <&- >&- 2>&-")
    assert codes == ["0"] and got_through and done.stdout == done.stderr == b""


@pytest.mark.parametrize(
    "module", ["run_training", "run_evaluation", "scripts.prepare_data", "mindmerger.evaluation.comparison_table"]
)
def test_help_can_be_read_in_ascii_and_cut_short(module):
    line = f'cd "{ROOT}" && "{sys.executable}" -m {module} --help'
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for tail, codes in (("> /dev/null", "0"), ("| head -1", "0 0")):
        shell = ["bash", "-c", f'exec 3>&1; {line} {tail} ; echo "${{PIPESTATUS[@]}}" >&3']
        done = subprocess.run(shell, capture_output=True, text=True, env=environment, timeout=60)
        assert done.stderr == "" and done.stdout.splitlines()[-1] == codes, done


def test_json_keeps_a_path_that_is_not_utf_8(tmp_path):
    folder = os.fsdecode(b"out\xff")
    files.write_json_atomic(tmp_path / folder / "args.json", {folder: "é中"})
    written = (tmp_path / folder / "args.json").read_bytes()
    assert json.loads(written.decode("utf-8")) == {folder: "é中"} and "é中".encode() in written


def test_the_reason_of_an_error_is_one_line_of_bounded_length_with_the_type_of_one_without_a_message():
    """The first line of no message is none: asking for it would hide the error behind an IndexError."""
    assert one_line(ValueError("Validation error for 'x':\n    it is\ttoo large\n")) == (
        "Validation error for 'x': it is too large"
    )
    assert one_line(KeyError("metadata")) == "KeyError: 'metadata'"
    assert one_line(EOFError()) == "EOFError"
    assert len(one_line(ValueError("long " * 1000))) == 300


@pytest.mark.parametrize(
    "stack", ["frame #0: c10::Error", "Exception raised from recv at Utils.hpp:682", "C++ CapturedTraceback:"]
)
def test_the_stack_that_torch_appends_is_no_part_of_an_error_s_reason(stack):
    assert one_line(RuntimeError(f"\nconnection lost\nby peer\n{stack}\n#1 more")) == "connection lost by peer"


def test_a_rank_that_reads_other_data_or_models_than_rank_0_is_named(monkeypatch):
    """Nodes with copies of their own would train on one half of this and one half of that."""
    monkeypatch.setattr(processes, "broadcast_object", lambda mine: {"data": "a", "mapping": "rank 0's alone"})
    monkeypatch.setattr(processes, "rank", lambda: 3)
    agreed = processes.agree_on({"data": "a", "mapping": None}, but="mapping")
    assert agreed == {"data": "a", "mapping": "rank 0's alone"}
    with pytest.raises(UserError, match="^rank 3 reads another data than rank 0: every node needs the same"):
        processes.agree_on({"data": "b", "mapping": None}, but="mapping")


def test_more_processes_than_gpus_are_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(processes, "local_rank", lambda: 2)
    with pytest.raises(UserError, match="needs GPU 2 but this node shows 2: start no more processes than there are"):
        processes.init_distributed()
