"""The comparison of bridges: equal target tokens, the choice of a learning rate, the table, and the whole script."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment
from test_comparison_table import write_results

from mindmerger.bridges import BRIDGES
from mindmerger.evaluation import bridge_table
from mindmerger.evaluation.statistics import bootstrap_intervals, holm, mean_difference_test
from mindmerger.runtime.errors import UserError
from scripts import bridge_plan

# -- the table


def write_training(folder, init_file=None, rows=10, batch=4, steps=((30, 8.0), (30, 8.0), (20, 4.0))):
    """What the table reads of a stage: settings, and a log of (target tokens, examples per second)."""
    folder.mkdir(parents=True)
    settings = {"arguments": {"train_batch_size": batch, "dev_size": 2}, "init_file": init_file and str(init_file)}
    (folder / "args.json").write_text(json.dumps(settings | {"data": {"counts": {"rows": {"Swahili": rows + 2}}}}))
    lines = [{"step": i, "target_tokens": n, "samples_per_s": rate} for i, (n, rate) in enumerate(steps, 1)]
    lines.insert(2, {"step": 2, "dev_loss": 0.5})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "mapping.safetensors"


def evaluation(folder, correct, **more):
    """A finished evaluation with more entries in its results.json."""
    write_results(folder, correct)
    file = folder / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"form": "soft"} | more))
    return folder


TWO = {"Swahili": "1100000000" * 3, "Thai": "1111100000" * 3}


@pytest.fixture
def made(tmp_path):
    """Two seeds of MindMerger, two of another bridge, the LLM alone, and the other one with another prefix."""
    better = {"Swahili": "1111100000" * 3, "Thai": "1111100000" * 3}
    folders = {
        "mindmerger": [evaluation(tmp_path / "m0", TWO), evaluation(tmp_path / "m1", TWO | {"Thai": "1" * 30})],
        "other": [evaluation(tmp_path / "o0", better), evaluation(tmp_path / "o1", better)],
        "LLM alone": [evaluation(tmp_path / "l", dict.fromkeys(TWO, "0" * 30))],
        "other (shuffled prefix)": [evaluation(tmp_path / "p", better, probe_prefix={"kind": "shuffled", "seed": 0})],
    }
    return [flag for label, found in folders.items() for one in found for flag in ("--row", f"{label}={one}")]


def table_of(tmp_path, *flags):
    assert bridge_table.main([*map(str, flags), "--output_dir", str(tmp_path / "out")]) == 0
    rows = csv.DictReader((tmp_path / "out/bridges.csv").read_text().splitlines())
    return {(row["method"], row["language"]): row for row in rows}


def test_rows_of_one_label_are_seeds_of_one_method_with_mean_and_spread(made, tmp_path):
    found = table_of(tmp_path, *made)
    thai = found["mindmerger", "th"]
    assert (thai["seeds"], thai["items"], thai["accuracy"]) == ("2", "30", "75.0")
    assert (thai["lowest_seed"], thai["highest_seed"]) == ("50.0", "100.0")
    average = found["mindmerger", "avg"]
    assert (average["accuracy"], average["lowest_seed"], average["highest_seed"]) == ("47.5", "35.0", "60.0")
    text = (tmp_path / "out/bridges.md").read_text()
    assert "| method | seeds | sw | th | avg |" in text and " 75.0 [" in text and "(50.0 to 100.0) |" in text
    assert (tmp_path / "out/bridges.png").read_bytes().startswith(b"\x89PNG")


def test_an_interval_draws_questions_with_all_their_seeds(made, tmp_path):
    """Two seeds that agree on every item tell as much of it as one of them: the interval must not shrink."""
    found = table_of(tmp_path, *made)
    width = {label: float(found[label, "sw"]["high"]) - float(found[label, "sw"]["low"]) for label in ("other",)}
    asked = {"Swahili": [(str(i), "1.0", 0) for i in range(30)]}
    one = bootstrap_intervals(asked, {"Swahili": [*[1] * 5, *[0] * 5] * 3}, 0)[1]
    assert abs(width["other"] - (one[1] - one[0])) < 4


def test_tests_take_whole_questions_and_are_corrected_over_languages_and_rows(made, tmp_path):
    found = table_of(tmp_path, *made)
    asked = [(str(i), "1.0", 0) for i in range(30)]
    gained = [0, 0, 1, 1, 1, *[0] * 5] * 3
    lost = [*[0] * 5, *[-0.5] * 5] * 3  # half of MindMerger's seeds had these Thai items
    p = [mean_difference_test({"x": asked}, {"x": d}, 0) for d in (gained, lost)]
    row = {code: found["other", code] for code in ("sw", "th", "avg")}
    assert [float(row[code]["p"]) for code in ("sw", "th")] == pytest.approx(p, abs=2e-4)
    assert [float(row[code]["p_holm"]) for code in ("sw", "th")] == pytest.approx(holm(p), abs=4e-4)
    assert (
        row["sw"]["against"] == "mindmerger"
        and row["sw"]["difference"] == "30.0"
        and row["th"]["difference"] == "-25.0"
    )
    means = [float(found[label, "avg"]["p"]) for label in ("other", "LLM alone")]
    assert [float(found[label, "avg"]["p_holm"]) for label in ("other", "LLM alone")] == holm(means)
    assert found["mindmerger", "sw"]["p"] == ""


def test_a_row_with_another_prefix_is_tested_against_its_own_bridge(made, tmp_path):
    found = table_of(tmp_path, *made)
    probe = found["other (shuffled prefix)", "avg"]
    assert (probe["against"], probe["difference"], float(probe["p"])) == ("other", "0.0", 1.0)
    text = (tmp_path / "out/bridges.md").read_text()
    main, probes = text.split("## With another prefix")
    assert "shuffled prefix" not in main and "| other | 50.0 [" in probes and "| shuffled | 50.0 [" in probes


def test_costs_come_from_the_training_that_the_results_name_and_from_the_plan(tmp_path):
    """Its second stage starts from the first, whose costs count too; another run's mapping would not."""
    import torch
    from safetensors.torch import save_file

    foreign = write_training(tmp_path / "elsewhere/math/pairs")
    first = write_training(tmp_path / "run/math/translation", init_file=foreign)
    last = write_training(tmp_path / "run/math/task", init_file=first)
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, last)
    timing = {"examples_per_s": 12.5}
    trained = evaluation(tmp_path / "m", TWO, checkpoint=str(last), timing=timing)
    resumed = evaluation(tmp_path / "n", TWO, checkpoint=str(tmp_path / "gone.bin"), timing={"examples_per_s": None})
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"costs": {"mindmerger": {"flop_per_target_token": 2.5e9}}}))
    flags = ["--row", f"mindmerger={trained}", "--row", f"other={resumed}", "--costs", plan]
    found = table_of(tmp_path, *flags, "--lr", "mindmerger=1e-3 of 3e-4, 1e-3")
    row = found["mindmerger", "avg"]
    # Batches of 4, 4 and 2 examples: 0.5 s each, in two stages.
    assert (row["target_tokens"], float(row["seconds"])) == (
        "160.0",
        3.0,
    )
    assert (row["trained_parameters"], float(row["flop_per_target_token"])) == ("10", 2.5e9)
    assert (row["questions_per_s"], row["learning_rate"]) == ("12.5", "1e-3 of 3e-4, 1e-3")
    text = (tmp_path / "out/bridges.md").read_text()
    assert "| mindmerger | 1e-3 of 3e-4, 1e-3 | 10 | 160 | 2.5e+09 | 3 | 12.50 |" in text
    assert "| other | – | – | – | – | – | – |" in text


def test_rows_by_likelihood_keep_their_costs_and_mindmerger_as_what_they_are_tested_against(tmp_path, capsys):
    """Their labels say how they were scored, and costs and rates are named without that."""
    rows = [evaluation(tmp_path / name, TWO, scoring="likelihood") for name in ("m", "o")]
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"costs": {"mindmerger": {"flop_per_target_token": 2.5e9}}}))
    flags = ["--row", f"other={rows[1]}", "--row", f"mindmerger={rows[0]}", "--costs", plan, "--lr", "mindmerger=1e-3"]
    found = table_of(tmp_path, *flags)
    row = found["mindmerger (likelihood)", "avg"]
    assert (row["learning_rate"], float(row["flop_per_target_token"])) == ("1e-3", 2.5e9)
    assert found["other (likelihood)", "avg"]["against"] == "mindmerger (likelihood)"
    assert "no row is called" not in capsys.readouterr().err
    found = table_of(tmp_path, *flags, "--against", "other")
    assert found["mindmerger (likelihood)", "avg"]["against"] == "other (likelihood)"


def test_missing_rows_keep_their_place_and_reason(made, tmp_path):
    found = table_of(tmp_path, *made[:4], "--missing", "st_merge=not reproduced", *made[4:])
    assert found["st_merge", ""]["missing"] == "not reproduced" and found["st_merge", ""]["accuracy"] == ""
    text = (tmp_path / "out/bridges.md").read_text()
    assert "|\n| st_merge | missing | missing | missing | missing |\n| other |" in text
    assert "- st_merge: not reproduced" in text


def test_wrong_input_of_the_table_is_one_line_and_leaves_nothing(made, tmp_path):
    for flags, message in (
        ([*made, "--against", "nobody"], "--against 'nobody' is none of the rows: mindmerger, other, LLM alone"),
        ([*made[:2], *made[:2]], "is given twice"),
        ([*made, "--missing", "other=gone"], "'other' is given as a row and as missing"),
        ([*made[-2:]], "all rows have another question's prefix"),
        ([*made, "--costs", tmp_path / "absent"], "absent is not a plan of scripts.bridge_plan"),
    ):
        with pytest.raises(UserError, match=message):
            bridge_table.main([*map(str, flags), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_without_mindmerger_the_first_row_is_tested_against(made, tmp_path, capsys):
    found = table_of(tmp_path, *made[4:])
    assert found["LLM alone", "avg"]["against"] == "other"
    assert "no row is called mindmerger: the others are tested against other" in capsys.readouterr().err


# -- the plan


@pytest.fixture
def plan_flags(tiny_llm, tiny_encoder, datas):
    """Words for stages of every kind."""
    flags = ["--task", "math", "--llm_path", tiny_llm, "--mt_path", tiny_encoder, "--data_root", datas]
    flags += ["--precision", "fp32", "--train_batch_size", "2", "--dev_size", "1", "--epoch_num", "2"]
    return [f"--{kind}={word}" for kind in bridge_plan.KINDS for word in flags]


def plan_of(tmp_path, *flags):
    assert bridge_plan.main(["plan", "--output", str(tmp_path / "plan.json"), *map(str, flags)]) == 0
    return json.loads((tmp_path / "plan.json").read_text())


def test_every_bridge_is_planned_and_reads_the_same_number_of_target_tokens(plan_flags, tmp_path, capsys):
    plan = plan_of(tmp_path, *plan_flags, "--seeds", "0,3", "--target_tokens", 3000, "--control")
    assert {line["bridge"] for line in plan["lines"]} == set(plan["costs"]) == {*BRIDGES, bridge_plan.CONTROL}
    control = [line["target_tokens"] for line in plan["lines"] if line["bridge"] == bridge_plan.CONTROL]
    assert len(control) == 2 and all(abs(tokens - 3000) < 300 for tokens in control)
    for name, bridge in BRIDGES.items():
        for seed in (0, 3):
            lines = [line for line in plan["lines"] if (line["bridge"], line["seed"]) == (name, seed)]
            assert lines[-1]["stage"] == list(bridge.stages)[-1]
            # Each stage is where the next one starts.
            before = [bridge.stages[line["stage"]].starts_from for line in lines]
            assert before == [None, *(line["stage"] for line in lines[:-1])]
            # A step is at most a few hundred tokens: each stage is off by half of one.
            assert abs(sum(line["target_tokens"] for line in lines) - 3000) < 300 * len(lines)
        assert plan["costs"][name]["trained_parameters"] > 0
    printed = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[:4] for line in printed[:2]] == [
        ["full", "mindmerger", "0", "mapping"],
        ["full", "mindmerger", "0", "augmentation"],
    ]
    # A memory costs what the others have not.
    flop = {name: one["flop_per_target_token"] for name, one in plan["costs"].items()}
    assert flop["layalign"] > flop["mindmerger"] > 0 and flop["xbridge"] > flop["mindmerger"]


def test_without_a_number_the_budget_is_what_mindmergers_stages_read_in_their_epochs(plan_flags, tmp_path):
    plan = plan_of(tmp_path, *plan_flags, "--bridges", "mindmerger,langbridge", "--search_tokens", 100)
    full = [line for line in plan["lines"] if line["phase"] == "full" and line["bridge"] == "mindmerger"]
    assert [line["epochs"] for line in full] == [2, 2]
    assert sum(line["target_tokens"] for line in full) == plan["target_tokens"]
    assert {line["bridge"] for line in plan["lines"] if line["phase"] == "search"} == {"mindmerger", "langbridge"}


def test_options_of_a_bridge_reach_its_stages_name_its_row_and_change_its_costs(plan_flags, tmp_path, capsys):
    asked = ["--bridges", "mindmerger,langbridge", "--target_tokens", 400]
    options = ["--bridge_option", "langbridge:mapper=latent", "--bridge_option", "langbridge:latents=3"]
    costs = plan_of(tmp_path, *plan_flags, *asked)["costs"] | plan_of(tmp_path, *plan_flags, *asked, *options)["costs"]
    label = "langbridge (mapper latent, latents 3)"
    assert list(costs) == ["mindmerger", "langbridge", label]
    assert costs["langbridge"]["trained_parameters"] != costs[label]["trained_parameters"]
    last = capsys.readouterr().out.splitlines()[-1].split("\t")
    assert last[1] == label
    assert last[-1] == "--bridge langbridge --bridge_option mapper=latent --bridge_option latents=3"
    for text, message in (
        ("langbridge", "--bridge_option 'langbridge' must be BRIDGE:KEY=VALUE"),
        ("langbridge:mapper", "--bridge_option 'mapper' must be KEY=VALUE"),
        ("langbridge:maper=ffn", "maper: LangBridge has no such option .did you mean mapper"),
        ("layalign:structure=mlp", "'layalign' is none of the compared bridges: mindmerger, langbridge"),
    ):
        with pytest.raises(UserError, match=message):
            plan_of(tmp_path, *plan_flags, *asked, "--bridge_option", text)


def test_the_rate_with_the_lowest_dev_loss_is_chosen_and_kept(tmp_path, capsys):
    for name, losses in {"a": (0.9, 0.5), "b": (0.4, 0.6), "c": (0.45,)}.items():
        (tmp_path / name).mkdir()
        lines = [{"step": i, "dev_loss": loss} for i, loss in enumerate(losses)] + [{"step": 9, "loss": 0.1}]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rates = [f"{rate}={tmp_path / name}" for rate, name in (("1e-4", "a"), ("1e-3", "b"), ("1e-2", "c"))]
    assert bridge_plan.main(["choose", "--output", str(tmp_path / "lr.json"), *rates]) == 0
    assert capsys.readouterr().out == "1e-3\n"
    kept = json.loads((tmp_path / "lr.json").read_text())
    assert kept == {"chosen": "1e-3", "dev_loss": {"1e-4": 0.5, "1e-3": 0.4, "1e-2": 0.45}}
    (tmp_path / "a/log.jsonl").write_text('{"step": 1, "loss": 0.1}\n')
    with pytest.raises(UserError, match="holds no dev loss, by which a learning rate is chosen"):
        bridge_plan.main(["choose", "--output", str(tmp_path / "lr.json"), rates[0]])


# -- the script


@pytest.fixture
def script(tmp_path, tiny_llm, tiny_encoder, datas):
    """Command and environment of the script on the tiniest models, two bridges, one seed and one learning rate."""
    environment = clean_environment(tmp_path) | {"LLM_PATH": tiny_llm, "MT_PATH": tiny_encoder, "DATA_ROOT": datas}
    environment |= {
        "BRIDGES": "mindmerger langbridge",
        "SEEDS": "0",
        "LRS": "1e-3",
        "ADAPTER": "none",
        "TARGET_TOKENS": "400",
    }
    environment |= {
        "TRAIN_BATCH_SIZE": "4",
        "TRAIN_MICRO_BATCH_SIZE_PER_GPU": "2",
        "DEV_SIZE": "1",
        "LANGUAGES": "sw,th",
        "PAIRS_SHARE": "0.5",  # the script's own, among variables for stages on pairs
    }
    environment |= {"PRECISION": "fp32", "LIMIT": "2", "MAX_NEW_TOKENS": "2", "NUM_WORKERS": "0", "HF_HUB_OFFLINE": "1"}
    environment |= {"RESULTS_DIR": str(tmp_path / "r"), "OUTPUT_DIR": str(tmp_path / "o")}
    environment["PATH"] += os.pathsep + os.environ["PATH"]
    return ["bash", str(ROOT / "scripts/compare_bridges.sh")], environment


@pytest.mark.slow
def test_the_script_trains_chooses_evaluates_and_continues_where_a_kill_left_it(script, tmp_path):
    """A first call is killed when its first training starts; the second one finishes and repeats nothing."""
    command, environment = script
    with open(tmp_path / "first.log", "wb") as log:
        first = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("r/logs/bridges-mindmerger-*.log")) and time.monotonic() < deadline:
            time.sleep(0.1)
            assert first.poll() is None, (tmp_path / "first.log").read_text()[-3000:]
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("r/finished/*")}
    assert [file.name for file in kept] == ["evaluation-math_mgsm-llm"] and not (tmp_path / "r/bridges.csv").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    # The only rate's trainings in the search are the first seed's: three stages are not trained again either.
    assert done.stdout.count("finished before") == 1 + 3 and done.stdout.count("    python run_") == 3 + 4
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    found = {
        (row["method"], row["language"]): row
        for row in csv.DictReader((tmp_path / "r/bridges.csv").read_text().splitlines())
    }
    assert {name for name, language in found if language == "avg"} == {
        "LLM alone",
        "mindmerger",
        "mindmerger (shuffled prefix)",
        "langbridge",
        "langbridge (shuffled prefix)",
    }
    missing = {name: row["missing"] for (name, _), row in found.items() if row["missing"]}
    assert set(missing) == {"LLM + adapter", "st_merge"}
    plan = json.loads((tmp_path / "r/plan.json").read_text())
    for name in ("mindmerger", "langbridge"):
        row, costs = found[name, "avg"], plan["costs"][name]
        # What was trained is what was planned, to the token.
        assert float(row["target_tokens"]) == costs["target_tokens"]
        assert int(row["trained_parameters"]) == costs["trained_parameters"]
        assert row["learning_rate"].endswith(" of 1e-3") and float(row["questions_per_s"]) > 0
        chosen = json.loads((tmp_path / f"r/lr/{name}.json").read_text())
        assert row["learning_rate"].startswith(chosen["chosen"]) and set(chosen["dev_loss"]) == {"1e-3"}


@pytest.mark.slow
def test_the_control_of_the_script_is_an_adapter_on_the_llm_alone_with_as_many_target_tokens(script, tmp_path):
    command, environment = script
    environment |= {"BRIDGES": "langbridge", "ADAPTER": "dora", "ADAPTER_RANK": "2", "LRS": "", "LR": "1e-3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = csv.DictReader((tmp_path / "r/bridges.csv").read_text().splitlines())
    found = {row["method"]: row for row in rows if row["language"] == "avg"}
    control = found["LLM + adapter"]
    costs = json.loads((tmp_path / "r/plan.json").read_text())["costs"]["LLM + adapter"]
    assert float(control["target_tokens"]) == costs["target_tokens"] and control["learning_rate"] == "1e-3, given"
    assert int(control["trained_parameters"]) == costs["trained_parameters"] > 0 and float(control["seconds"]) > 0
    saved = json.loads(next(tmp_path.glob("o/*/math/llm_adapter/adapter/adapter_config.json")).read_text())
    assert (saved["r"], saved["use_dora"]) == (2, True)


# Notes each training and evaluation down and leaves what they leave; FAKE_FAULTS names trainings that end otherwise.
FAKE_PYTHON = """#!{python}
import fnmatch, json, os, pathlib, shutil, sys, time
sys.path.insert(0, "{tests}")
arguments = sys.argv[1:]
if arguments[0] not in ("run_training.py", "run_evaluation.py"):
    os.execv("{python}", ["{python}", *arguments])
from test_comparison_table import write_results
flags = dict(zip(arguments, arguments[1:]))
name = "{{}} {{}} {{}} {{}}".format(*(flags.get(f"--{{one}}", "") for one in ("bridge", "stage_name", "lr", "seed")))
with open("{record}", "a") as record:
    record.write((name if arguments[0] == "run_training.py" else flags["--save_name"]) + "\\n")
if arguments[0] == "run_evaluation.py":
    folder = pathlib.Path(flags["--results_dir"], flags["--save_name"], flags["--task"])
    shutil.rmtree(folder, ignore_errors=True)
    write_results(folder, {{"Swahili": "1100"}})
    if "--probe_prefix" in flags:
        results = json.loads((folder / "results.json").read_text())
        results |= {{"form": "soft", "probe_prefix": {{"kind": "shuffled", "seed": 0}}}}
        (folder / "results.json").write_text(json.dumps(results))
    sys.exit(0)
for pattern, code in json.loads(os.environ.get("FAKE_FAULTS", "{{}}")).items():
    if fnmatch.fnmatch(name, pattern):
        if code == "waits":
            pathlib.Path("{record}-" + str(os.getpid())).touch()
            time.sleep(100)
        print("error: loss nan at step 3 is not finite", file=sys.stderr)
        sys.exit(code)
folder = pathlib.Path(flags["--output_dir"], flags["--save_name"], "math", flags["--stage_name"])
folder.mkdir(parents=True)
(folder / "config.json").write_text("{{}}")
loss = {{"1e-4": 0.9, "1e-3": 0.4, "1e-2": 0.1}}[flags["--lr"]]
(folder / "log.jsonl").write_text(json.dumps({{"step": 1, "dev_loss": loss}}))
"""


@pytest.fixture
def noted(script, tmp_path):
    """Returns a function that runs the script with programs that only note down how they were called."""
    command, environment = script
    record, fake = tmp_path / "record", tmp_path / "bin/python"
    fake.parent.mkdir()
    fake.write_text(FAKE_PYTHON.format(python=sys.executable, tests=ROOT / "tests", record=record))
    fake.chmod(0o755)
    environment |= {"PATH": f"{fake.parent}:{environment['PATH']}", "LRS": "1e-4 1e-3 1e-2", "SEEDS": "0,1,2"}
    environment |= {"PYTHONPATH": str(ROOT)}

    def run(faults, **more):
        record.write_text("")
        environment["FAKE_FAULTS"] = json.dumps(faults)
        done = subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=300)
        return done, record.read_text().splitlines()

    run.environment = environment
    return run


@pytest.mark.slow
def test_a_rate_that_diverges_is_out_and_a_bridge_that_no_rate_trains_is_missing(noted, tmp_path):
    done, calls = noted({"mindmerger * 1e-2 *": 2, "langbridge *": 2})
    assert done.returncode == 0, done.stderr[-3000:]
    stages = ("mapping", "augmentation")
    tried = [f"mindmerger {stage} {rate} 0" for rate in ("1e-4", "1e-3") for stage in stages]
    seeds = [
        [
            *(f"mindmerger {stage} 1e-3 {seed}" for stage in stages if seed),
            *(f"{name}{end}" for end in ("", "-shuffled-2")),
        ]
        for seed in range(3)
        for name in [f"math_mgsm-bridges-mindmerger-lr1e-3-seed{seed}"]
    ]
    others = [f"langbridge task {rate} 0" for rate in ("1e-4", "1e-3", "1e-2")]
    # The first seed's trainings are those of the search; of the rate that diverges, the second stage is not tried.
    assert calls == [
        "math_mgsm-llm",
        *tried,
        "mindmerger mapping 1e-2 0",
        *(call for seed in seeds for call in seed),
        *others,
    ]
    rows = list(csv.DictReader((tmp_path / "r/bridges.csv").read_text().splitlines()))
    assert {row["method"]: row["seeds"] for row in rows if not row["missing"]} == {
        "LLM alone": "1",
        "mindmerger": "3",
        "mindmerger (shuffled prefix)": "3",
    }
    missing = {row["method"]: row["missing"] for row in rows if row["missing"]}
    reason = "no learning rate of 1e-4 1e-3 1e-2 trains it: loss nan at step 3 is not finite"
    assert missing["langbridge"] == reason
    # Given again, only what was refused is tried again.
    done, calls = noted({"mindmerger * 1e-2 *": 2, "langbridge *": 2})
    assert done.returncode == 0 and calls == ["mindmerger mapping 1e-2 0", *others]


@pytest.mark.slow
def test_several_at_once_make_what_one_after_the_other_makes(noted, tmp_path):
    faults, few = {"mindmerger * 1e-2 *": 2}, {"BRIDGES": "mindmerger", "SEEDS": "0,1", "LRS": "1e-3 1e-2"}
    done, calls = noted(faults, **few)
    alone = (tmp_path / "r/bridges.csv").read_text()
    shutil.rmtree(tmp_path / "r")
    shutil.rmtree(tmp_path / "o")
    together, calls_together = noted(faults, **few, JOBS="2")
    assert done.returncode == together.returncode == 0, together.stderr[-3000:]
    assert (tmp_path / "r/bridges.csv").read_text() == alone and "2 at once" in together.stdout
    # What is refused in the background is asked once more, for its reason.
    assert sorted(calls_together) == sorted([*calls, "mindmerger mapping 1e-2 0"])
    assert "learning rate 1e-2 is out: loss nan at step 3 is not finite" in together.stdout


@pytest.mark.slow
def test_what_runs_at_once_ends_with_the_script(noted, script, tmp_path):
    noted({}, BRIDGES="unknown")  # writes the programs
    command, environment = script
    environment |= {"FAKE_FAULTS": json.dumps({"mindmerger * 1e-? *": "waits"}), "JOBS": "2"}
    with open(tmp_path / "log", "wb") as log:
        running = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while len(pids := [int(file.name.split("-")[1]) for file in tmp_path.glob("record-*")]) < 2:
            assert time.monotonic() < deadline and running.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.1)
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=30) != 0
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline + 10
        time.sleep(0.1)


@pytest.mark.slow
def test_a_variable_gives_one_bridge_options_and_its_row_names_them(noted, tmp_path):
    options = {"LANGBRIDGE_OPTIONS": "mapper=latent latents=3", "JAVA_OPTIONS": "-Xmx1g", "LR": "1e-3", "SEEDS": "0"}
    done, calls = noted({}, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    slug = "bridges-langbridge-mapper-latent-latents-3-lr1e-3-seed0"
    assert calls[-3:] == ["langbridge task 1e-3 0", f"math_mgsm-{slug}", f"math_mgsm-{slug}-shuffled-2"]
    ran = (tmp_path / f"r/finished/{slug}-task").read_text()
    assert " --bridge langbridge --bridge_option mapper=latent --bridge_option latents=3 --stage_name task " in ran
    label = "langbridge (mapper latent, latents 3)"
    rows = {row["method"]: row for row in csv.DictReader((tmp_path / "r/bridges.csv").read_text().splitlines())}
    assert {"mindmerger", label, f"{label} (shuffled prefix)"} < set(rows) and "langbridge" not in rows
    assert rows[f"{label} (shuffled prefix)"]["against"] == label and float(rows[label]["flop_per_target_token"]) > 0
    assert "bridge_option" not in (tmp_path / "r/finished/bridges-mindmerger-lr1e-3-seed0-mapping").read_text()
    done, calls = noted({}, **options | {"LANGBRIDGE_OPTIONS": "maper=ffn"})
    assert done.returncode == 2 and "maper: LangBridge has no such option (did you mean mapper?)" in done.stderr


@pytest.mark.slow
def test_tasks_names_and_numbers_of_rows_have_evaluations_of_their_own(noted, tmp_path):
    """Tasks may share their trainings, and in one folder the first one's numbers stood in the second one's table."""
    few = {"BRIDGES": "mindmerger", "LEARNING_RATE": "1e-3", "SEEDS": "0"}
    trained = [f"mindmerger {stage} 1e-3 0" for stage in ("mapping", "augmentation")]
    made = ["llm", "bridges-mindmerger-lr1e-3-seed0", "bridges-mindmerger-lr1e-3-seed0-shuffled-2"]
    done, calls = noted({}, **few)
    assert done.returncode == 0 and sorted(calls) == sorted([*trained, *(f"math_mgsm-{name}" for name in made)])
    done, calls = noted({}, **few, TASK="math_msvamp")
    assert calls == [f"math_msvamp-{name}" for name in made]
    done, calls = noted({}, **few, EVALUATION_LIMIT="3")
    assert calls == [f"math_mgsm-{name}".replace("-2", "-3") for name in made]
    done, calls = noted({}, **few, EVALUATION_LIMIT="3", SAVE_NAME="mine")
    mine = [f"math_mgsm-{name}".replace("bridges", "mine").replace("-2", "-3") for name in made[1:]]
    assert sorted(calls) == sorted([*trained, *mine])


@pytest.mark.slow
def test_the_control_has_no_states_of_an_encoder_to_keep(noted, tmp_path):
    done, calls = noted({}, BRIDGES="langbridge", LR="1e-3", SEEDS="0", ADAPTER="lora", CACHE_ENCODER_STATES="1")
    assert done.returncode == 0, done.stderr[-3000:]
    ran = {path.name: path.read_text() for path in (tmp_path / "r/finished").iterdir()}
    assert "--cache_encoder_states" in ran["bridges-langbridge-lr1e-3-seed0-task"]
    assert "--cache_encoder_states" not in ran["bridges-adapter-lr1e-3-seed0-adapter"]


@pytest.mark.slow
def test_variables_of_any_spelling_win_over_what_the_small_world_has(noted, tmp_path):
    world = tmp_path / "world"
    world.mkdir()
    environment = {
        "LLM_PATH": "",
        "MT_PATH": "",
        "QUICKSTART_DIR": str(world),
        "LANGUAGES": "sw",
        "LIMIT": "",
        "LRS": "",
    }
    for name, model in (("llm", "LLM_PATH"), ("mt5", "MT_PATH")):
        (world / name).symlink_to(noted.environment[model])
    (world / "datas").symlink_to(noted.environment["DATA_ROOT"])
    small = {"BRIDGES": "mindmerger", "limit": "7", "LEARNING_RATE": "1e-3", "SEEDS": "0", "JOBS": "1"}
    done, calls = noted({}, **environment, **small, per_device_train_batch_size="1", TRAIN_MICRO_BATCH_SIZE_PER_GPU="")
    assert done.returncode == 0, done.stderr[-3000:]
    ran = {path.name: f"{path.read_text()} " for path in (tmp_path / "r/finished").iterdir()}
    mapping = ran["bridges-mindmerger-lr1e-3-seed0-mapping"]
    assert " --languages sw " in mapping and " --train_micro_batch_size_per_gpu 1 " in mapping
    assert " --max_seq_len 200 " in mapping
    assert " --limit 7 " in ran["evaluation-math_mgsm-llm"] and " --languages sw " in ran["evaluation-math_mgsm-llm"]


@pytest.mark.slow
def test_a_translator_or_its_translations_give_the_row_of_translate_test(noted, tmp_path):
    few = {"BRIDGES": "mindmerger", "LR": "1e-3", "SEEDS": "0"}
    done, calls = noted({}, **few, TRANSLATE_TEST="made.jsonl")
    assert done.returncode == 0 and calls[-1] == "math_mgsm-translate-test", done.stderr[-3000:]
    ran = (tmp_path / "r/finished/evaluation-math_mgsm-translate-test").read_text()
    assert " --llm_only --llm_path " in ran and ran.endswith(" --translate_test made.jsonl")
    rows = {row["method"]: row for row in csv.DictReader((tmp_path / "r/bridges.csv").read_text().splitlines())}
    assert rows["translate-test (machine)"]["missing"] == ""
    done, calls = noted({}, **few, TRANSLATOR=str(tmp_path / "nowhere"))
    rows = {row["method"]: row for row in csv.DictReader((tmp_path / "r/bridges.csv").read_text().splitlines())}
    assert done.returncode == 0 and "nowhere" in rows["translate-test (machine)"]["missing"] and calls == []


@pytest.mark.slow
def test_a_crash_ends_the_script_with_its_exit_code_and_no_table(noted, tmp_path):
    done, calls = noted({"mindmerger augmentation *": 70}, LR="1e-3")
    assert done.returncode == 70 and calls == [
        "math_mgsm-llm",
        "mindmerger mapping 1e-3 0",
        "mindmerger augmentation 1e-3 0",
    ]
    assert "ended with exit code 70; its messages are in" in done.stderr and not (tmp_path / "r/bridges.md").exists()


def test_the_script_refuses_half_a_pair_of_models_an_unknown_bridge_and_a_misspelt_variable(script, tmp_path):
    command, environment = script
    world = tmp_path / "world"
    (world / "llm").mkdir(parents=True)
    (world / "llm/config.json").write_text("{}")
    # Under the launcher the small world, too, runs one at a time without being told.
    small = {"LLM_PATH": "", "MT_PATH": "", "QUICKSTART_DIR": str(world), "NUM_GPUS": "1"}
    for change, message in (
        (small | {"BRIDGES": "layaling"}, "error: unknown bridge 'layaling': choose one of "),
        ({"LLM_PATH": ""}, "error: MT_PATH is given and LLM_PATH is not: give both, or neither for the small world"),
        ({"JOBS": "two"}, "error: JOBS is 'two': a whole number of at least 1"),
        ({"JOBS": "2", "NUM_GPUS": "2"}, "error: JOBS is 2: under the launcher one training runs at a time"),
        ({"BRIDGES": "layaling"}, "error: unknown bridge 'layaling': choose one of "),
        ({"PAIRS_TRAIN_NUMBER": "5"}, "error: PAIRS_TRAIN_NUMBER is in the environment, but no flag --train_number"),
        ({"TASK_LR": "9e-9"}, "error: TASK_LR is in the environment, but no flag --lr of run_training.py is open"),
        (
            {"TASK_LEARNING_RATE": "9e-9"},
            "error: TASK_LEARNING_RATE is in the environment, but no flag --learning_rate",
        ),
        (
            {"EVALUATION_ADAPTER_PATH": "a"},
            "error: EVALUATION_ADAPTER_PATH is in the environment, but no flag --adapter",
        ),
        (
            {"SEED": "5"},
            "error: a variable sets --seed to '5', which has no part in this comparison: unset it, SEEDS is",
        ),
        ({"dry_run": "1"}, "error: a variable sets --dry_run to '1', which has no part in this comparison: unset it"),
        ({"DRY_RUN": "now"}, "error: dry_run is 'now' in the environment: --dry_run takes no value, so say 1 or 0"),
        ({"ORDER": "file"}, "error: a variable sets --order to 'file', which has no part in this comparison: unset it"),
        ({"DRY_RUN": "0", "CONFIG": "a.yaml"}, "error: CONFIG is 'a.yaml', and this script reads no such file: say"),
        ({"PAIRS_CONFIG": "a.yaml"}, "error: CONFIG is 'a.yaml', and this script reads no such file: say its settings"),
    ):
        done = subprocess.run(command, env=environment | change, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(message), done.stderr
        assert not list(tmp_path.glob("r/finished/*")) and not (tmp_path / "o").exists()
    for word in ("--config=a.yaml", "--save_name"):
        done = subprocess.run([*command, word], env=environment, capture_output=True, text=True, timeout=60)
        said = f"error: {word.split('=')[0][2:]} among the arguments is the script's own: leave it out"
        assert done.returncode == 2 and done.stderr.startswith(said)
