"""Errors of one rank of two: the other ends too, within seconds, with one line. Real processes of drivers/ranks.py."""

import json

import pytest
from conftest import DATA, ROOT, run_prepared

pytestmark = pytest.mark.slow

SECONDS = 30  # on a busy machine; a hang lasts until the driver kills it after 60


def training(name, tiny_llm, tiny_encoder, *more, zero=0):
    """A short training as a run of a scenario."""
    flags = ["--llm_path", tiny_llm, "--mt_path", tiny_encoder, "--data_root", str(DATA / "datas"), "--task", "math"]
    flags += ["--precision", "fp32", "--dev_size", "4", "--train_batch_size", "4", "--max_seq_len", "40"]
    flags += ["--max_gen_len", "40", "--languages", "German,Thai", "--lr", "1e-2", "--num_workers", "0"]
    flags += ["--train_micro_batch_size_per_gpu", "1", "--max_steps", "2", "--save_name", name]
    return {
        "program": "training",
        "argv": [*flags, "--deepspeed_config", str(ROOT / f"scripts/ds_zero{zero}.json"), *more],
    }


def evaluation(name, tiny_llm, *more):
    """A short evaluation as a run of a scenario: of the LLM alone unless `more` says otherwise."""
    flags = ["--task", "math_mgsm", "--llm_path", tiny_llm, "--data_root", str(DATA / "datas")]
    flags += ["--languages", "German,Thai", "--limit", "2", "--eval_batch_size", "1", "--max_new_tokens", "4"]
    flags += ["--precision", "fp32"]
    return {"program": "evaluation", "argv": [*flags, *(more or ["--llm_only"]), "--save_name", name]}


def run_scenarios(folder, scenarios):
    """Outcomes of scenarios by name."""
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    driver = (ROOT / "tests/drivers/ranks.py", folder / "scenarios.json", folder / "ends/outcomes.json")
    codes, printed = run_prepared(*driver, cwd=folder, timeout=60 * len(scenarios) + 60)
    assert codes == [0], printed
    return json.loads((folder / "ends/outcomes.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the scenarios run."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ends(folder, tiny_llm, tiny_encoder):
    """How the ranks ended in each scenario."""

    def scenario(at, rank=1, zero=0, step=0):
        name = f"{at}-{rank}-{zero}".replace(" ", "_")
        run = evaluation(name, tiny_llm) if "generate" in at else training(name, tiny_llm, tiny_encoder, zero=zero)
        fault = {"at": at, "rank": rank, "step": step}
        return {"name": name, "runs": [run], "fault": fault, "settings": {"GRACE_S": 1.0}}

    scenarios = [scenario("probe", zero=zero) for zero in (0, 2, 3)] + [scenario("probe", rank=0)]
    scenarios += [scenario("load", zero=3), scenario("arguments"), scenario("step", step=2)]
    scenarios += [scenario("fault in a step", step=2), scenario("checkpoint", rank=0)]
    scenarios += [scenario("generate"), scenario("fault in generate", rank=0)]
    # What a batch system or a launcher may have left in the shell.
    strays = {"RANK": "", "WORLD_SIZE": "4", "LOCAL_RANK": "", "MASTER_ADDR": "nowhere", "MASTER_PORT": "words"}
    runs = [training("alone", tiny_llm, tiny_encoder), evaluation("alone", tiny_llm)]
    scenarios.append({"name": "alone", "runs": runs, "alone": strays})
    return run_scenarios(folder, scenarios + patient(tiny_llm, tiny_encoder) + nodes(folder, tiny_llm, tiny_encoder))


def patient(tiny_llm, tiny_encoder):
    """A scenario in which one rank waits for the other for longer than the libraries' default time."""
    runs = [training("patient", tiny_llm, tiny_encoder), evaluation("patient", tiny_llm)]
    waits = [{"at": "tokenising", "rank": 0, "seconds": 6}, {"at": "reading", "rank": 1, "seconds": 6}]
    return [{"name": "patient", "runs": runs, "waits": waits, "timeout_s": 4}]


def nodes(folder, tiny_llm, tiny_encoder):
    """Scenarios of two nodes: with one output folder, with one each, and with an interruption."""
    for name in ("shared", "node0", "node1"):
        (folder / name).mkdir()
    runs = [
        training("two", tiny_llm, tiny_encoder),
        training("two", tiny_llm, tiny_encoder, "--stage_name", "augmentation", zero=3),
        evaluation("two", tiny_llm, "--mt_path", tiny_encoder, "--init_checkpoint", "outputs/two/math/augmentation"),
    ]
    apart, stopped = [str(folder / "node0"), str(folder / "node1")], evaluation("stopped", tiny_llm)
    return [
        {"name": "together", "runs": runs, "folders": [str(folder / "shared")] * 2},
        {"name": "apart", "runs": runs, "folders": apart},
        {
            "name": "stopped",
            "runs": [stopped],
            "folders": apart,
            "waits": [{"at": "generating", "rank": 0, "seconds": 3}],
            "fault": {"at": "generate", "rank": 0},
        },
        {"name": "continued", "runs": [stopped], "folders": apart},
    ]


def assert_one_line(end, text):
    """All ranks ended within seconds with exit code 2 and, all together, one error of one line."""
    assert end["codes"] == [2, 2] and end["seconds"] < SECONDS, end
    lines = [line for error in end["err"] for line in error.splitlines() if "rror" in line or "rank 1" in line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and text in lines[0], end["err"]
    assert "Traceback" not in "".join(end["err"])


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_out_of_memory_on_one_rank_ends_all_ranks_before_training_at_every_zero_stage(ends, zero):
    """From ZeRO 2 on the other rank hung in the pass's own collective calls."""
    assert_one_line(ends[f"probe-1-{zero}"], "out of memory on rank 1 with a micro-batch of")


def test_out_of_memory_on_the_printing_rank_ends_all_ranks_too(ends):
    assert_one_line(ends["probe-0-0"], "out of memory on rank 0 with a micro-batch of")


def test_an_error_of_one_rank_while_sharded_models_load_ends_all_ranks(ends):
    """The other rank waited for its share of the first weight."""
    assert_one_line(ends["load-1-3"], "error: rank 1: a mistake of one rank, as a test has it")


def test_an_error_that_ranks_can_agree_on_is_said_by_rank_0_without_a_number(ends):
    assert_one_line(ends["arguments-1-0"], "error: a mistake of one rank, as a test has it")
    assert_one_line(ends["checkpoint-0-0"], "error: a mistake of one rank, as a test has it")


def test_out_of_memory_of_one_rank_in_the_training_loop_ends_all_ranks(ends):
    assert_one_line(ends["step-1-0"], "error: rank 1: out of memory on rank 1 with a micro-batch of")
    assert ends["step-1-0"]["err"][0].splitlines()[-1].startswith("error: ")  # the bar does not follow it


def test_a_fault_of_ours_on_one_rank_keeps_its_traceback_and_ends_all_ranks(ends):
    for name, rank in (("fault_in_a_step-1-0", 1), ("fault_in_generate-0-0", 0)):
        end = ends[name]
        assert end["codes"] == [1, 1] and end["seconds"] < SECONDS, end
        assert [error.count("Traceback") for error in end["err"]] == [1 - rank, rank]
        assert "ValueError: a fault of ours, as a test has it\n" in end["err"][rank]
        last = end["err"][0].splitlines()[-1]
        assert last.startswith("error: " + "rank 1: " * rank + "ValueError: a fault of ours"), end["err"][0]


def test_out_of_memory_of_one_rank_in_an_evaluation_ends_all_ranks(ends):
    """The other rank generated on, and then waited."""
    assert_one_line(ends["generate-1-0"], "error: rank 1: out of memory on a batch of 1 examples")


def test_ranks_wait_for_one_that_tokenises_or_reads_longer_than_the_libraries_time_limit(ends):
    """NCCL's ten minutes, gloo's thirty: a training whose data took longer to tokenise was ended."""
    assert ends["patient"]["codes"] == [0, 0], ends["patient"]["err"]


def contents(folder):
    """Returns what an evaluation or a training leaves, by path, but for what names times and folders."""
    wanted = ("mapping.safetensors", "scores.tsv", "German.jsonl", "Thai.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.name in wanted}


def test_nodes_without_a_common_output_folder_train_both_stages_and_evaluate_as_with_one(ends, folder):
    """Stage 2 ended on the second node, which lacks stage 1's mapping, and so did the evaluation."""
    assert [ends[name]["codes"] for name in ("together", "apart")] == [[0, 0]] * 2, ends["apart"]["err"]
    one, two = contents(folder / "shared"), contents(folder / "node0")
    assert len(one) == 7 and two.keys() >= one.keys() and all(two[name] == one[name] for name in one)
    assert "mapping: starts from outputs/two/math/mapping/mapping.safetensors" in ends["apart"]["err"][0]
    assert not [path for path in (folder / "node1").rglob("*") if path.is_file()]


def test_an_evaluation_continues_with_the_answers_of_a_node_that_has_a_folder_of_its_own(ends, folder):
    assert ends["stopped"]["codes"] == [2, 2] and ends["continued"]["codes"] == [0, 0], ends["continued"]["err"]
    assert "generating 4 answers" in ends["stopped"]["err"][0]
    assert "generating 2 answers" in ends["continued"]["err"][0]
    results = json.loads((folder / "node0/results/stopped/math_mgsm-llm_only/results.json").read_text())
    assert results["counts"]["examples"] == 4 and results["timing"]["examples"] == 2


def test_stray_variables_of_a_launcher_leave_training_and_evaluation_alone(ends):
    """`LOCAL_RANK=""` was a traceback of DeepSpeed's, `WORLD_SIZE` without `RANK` one of torch's."""
    end = ends["alone"]
    assert end["codes"] == [0] and "ZeRO 0, 1 processes" in end["err"][0], end["err"]
    assert "generating 4 answers in fp32 on cpu" in end["err"][0]


def test_progress_in_a_log_file_is_whole_lines_in_training_and_in_evaluation(ends):
    """Without a terminal the training's bar wrote ten states a second, joined by carriage returns."""
    error = ends["alone"]["err"][0]
    assert "\r" not in error and "\nmapping: 100%|" in error and "\nrank 0 of 1: 100%|" in error, error
