"""The experiment with small pretrained models: its data, the random encoder, and the whole script on tiny ones."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, clean_environment
from test_comparison_table import write_results

from mindmerger.runtime.errors import UserError
from scripts import small_models

LABELS = ("entailment", "neutral", "contradiction")
NAMES = {"en": "English", "sw": "Swahili", "de": "German"}


def write_xnli(root, premises=12, test_premises=4, pairs=("de",)):
    """XNLI in the released layout: three hypotheses to each premise, in three languages, row by row translations."""

    def records(first, number):
        for code, name in NAMES.items():
            for premise, label in itertools.product(range(first, first + number), LABELS):
                yield {
                    "sentence1": f"{code} premise {premise}.",
                    "sentence2": f"{code} hypothesis {premise} {label[0]}.",
                    "label": label,
                    "language": name,
                }

    for file, rows in (
        (small_models.ROWS_FILE, records(0, premises)),
        (small_models.TEST_FILE, records(100, test_premises)),
    ):
        (root / file).parent.mkdir(parents=True)
        (root / file).write_text(json.dumps(list(rows)))
    for code in pairs:
        folder = root / "bilingual_pairs" / f"en-{code}"
        folder.mkdir(parents=True)
        (folder / f"train_100k.{code}").write_text("".join(f"{code} sentence {i}\n" for i in range(40)))
        (folder / "train_100k.en").write_text("".join(f"en sentence {i}\n" for i in range(40)))
    return root


def numbers_of(rows):
    """Numbers of the premises that rows are about, by language."""
    found = {}
    for row in rows:
        found.setdefault(row["language"], set()).add(row["sentence1"].split()[2])
    return found


def test_no_premise_tunes_the_llm_and_trains_a_mapping(tmp_path):
    root = write_xnli(tmp_path / "datas")
    made = tmp_path / "made"
    small_models.main(
        ["data", "--data_root", str(root), "--output_dir", str(made), "--languages", "sw,de", "--tuning_share", "0.25"]
    )
    tuning = json.loads((made / "tuning.json").read_text())
    stages = json.loads((made / small_models.ROWS_FILE).read_text())
    assert {row["language"] for row in tuning} == {"English"} and len(tuning) == 9
    of_tuning, of_stages = numbers_of(tuning)["English"], numbers_of(stages)
    assert set(of_stages) == set(NAMES.values())
    assert all(found.isdisjoint(of_tuning) and len(found) == 9 for found in of_stages.values())
    given = json.loads((root / small_models.ROWS_FILE).read_text())
    assert [row for row in given if row in stages] == stages  # order, labels and texts are the file's
    assert json.loads((made / small_models.TEST_FILE).read_text()) == json.loads(
        (root / small_models.TEST_FILE).read_text()
    )


def test_the_seed_decides_which_premises_tune_and_english_alone_is_asked_for(tmp_path):
    root = write_xnli(tmp_path / "datas")
    parts = []
    for number, seed in enumerate((0, 0, 1)):
        made = tmp_path / f"made{number}"
        small_models.write_data(root, made, "sw", 0.5, seed)
        parts.append(numbers_of(json.loads((made / "tuning.json").read_text()))["English"])
        rows = json.loads((made / small_models.ROWS_FILE).read_text())
        assert {row["language"] for row in rows} == {"English", "Swahili"}
    assert parts[0] == parts[1] != parts[2]


def test_sentence_pairs_are_the_given_ones_or_else_the_dev_sets_sentences_once_each(tmp_path):
    root = write_xnli(tmp_path / "datas")
    small_models.write_data(root, tmp_path / "made", "sw,de", 0.5, 0)
    made = {}
    for code in ("de", "sw"):
        folder = tmp_path / f"made/bilingual_pairs/en-{code}"
        made[code] = [(folder / f"train_100k.{end}").read_text().splitlines() for end in (code, "en")]
    for side, end in zip(made["de"], ("de", "en"), strict=True):
        assert side == (root / f"bilingual_pairs/en-de/train_100k.{end}").read_text().splitlines()
    swahili, english = made["sw"]
    # 12 premises, each said once though three rows have it, and 36 hypotheses.
    assert len(swahili) == len(english) == len(set(swahili)) == 48
    assert all(one.replace("sw ", "en ") == other for one, other in zip(swahili, english, strict=True))


@pytest.mark.parametrize(
    "damage, languages, message",
    [
        (None, "en", "no language beside English"),
        (None, "sw,fr", "no rows in French"),
        (None, "xx", "unknown language"),
        ("short", "sw", "35 rows in Swahili, 36 in English"),
        ("label", "sw", "label"),
        ("missing", "sw", "no file"),
        ("there", "sw", "is there already"),
    ],
)
def test_data_that_cannot_be_parted_are_one_line_and_leave_nothing(tmp_path, run, damage, languages, message):
    root, made = write_xnli(tmp_path / "datas"), tmp_path / "made"
    file = root / small_models.ROWS_FILE
    rows = json.loads(file.read_text())
    if damage == "short":
        rows.remove(next(row for row in rows if row["language"] == "Swahili"))
    if damage == "label":
        del rows[3]["label"]
    file.write_text(json.dumps(rows))
    if damage == "missing":
        file.unlink()
    if damage == "there":
        made.mkdir()
    with pytest.raises(UserError, match=message) as error:
        small_models.write_data(root, made, languages, 0.5, 0)
    assert "\n" not in str(error.value)
    assert not made.exists() or damage == "there" and not any(made.iterdir())


def test_a_random_encoder_has_the_shape_and_the_tokenizer_and_none_of_the_weights(tmp_path, tiny_encoder):
    import torch
    from transformers import AutoTokenizer

    from mindmerger.model.towers import load_encoder

    for number, seed in enumerate((0, 0, 1)):
        flags = ["--mt_path", tiny_encoder, "--output_dir", str(tmp_path / f"made{number}"), "--seed", str(seed)]
        assert small_models.main(["random_encoder", *flags]) == 0
    real, first, again, other = (
        load_encoder(str(path), torch.float32, None).state_dict()
        for path in (tiny_encoder, *(tmp_path / f"made{number}" for number in range(3)))
    )
    assert {name: one.shape for name, one in real.items()} == {name: one.shape for name, one in first.items()}
    matrices = [name for name, one in real.items() if one.ndim == 2]
    assert matrices and not any(torch.equal(real[name], first[name]) for name in matrices)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(other[name], first[name]) for name in matrices)
    text = "Wanyama wawili, 3.5"
    ids = [AutoTokenizer.from_pretrained(path)(text)["input_ids"] for path in (tiny_encoder, tmp_path / "made0")]
    assert ids[0] == ids[1]
    with pytest.raises(UserError, match="is there already"):
        small_models.write_random_encoder(tiny_encoder, tmp_path / "made0", 0)


def test_a_classifier_on_the_encoder_alone_reads_what_its_states_say(tmp_path, tiny_encoder, capsys):
    root, made = write_xnli(tmp_path / "datas", premises=40, test_premises=10), tmp_path / "made"
    small_models.write_data(root, made, "sw,de", 0.5, 0)
    flags = ["--mt_path", tiny_encoder, "--data_root", str(made), "--languages", "en,sw,de"]
    assert small_models.main(["encoder_alone", *flags, "--limit", "30"]) == 0
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert list(lines) == [*NAMES.values(), "mean without English"]
    # The hypotheses give the label away by a letter.
    assert all(float(value.rstrip("%")) > 80 for value in lines.values()), lines
    # Labels that nothing gives away are guessed.
    rows = json.loads((made / small_models.TEST_FILE).read_text())
    for row in rows:
        row["sentence2"] = row["sentence2"].replace(f" {row['label'][0]}.", ".")
    (made / small_models.TEST_FILE).write_text(json.dumps(rows))
    assert small_models.main(["encoder_alone", *flags]) == 0
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert float(lines["mean without English"].rstrip("%")) < 50, lines


def test_what_the_classifier_finds_is_folded_for_states_as_they_are():
    import torch

    from scripts import encoder_alone

    draw = torch.Generator().manual_seed(0)
    x_NF = torch.randn(300, 4, generator=draw) * torch.tensor([1e-2, 1.0, 10.0, 1.0]) + 5
    labels_N = ((x_NF[:, 0] - 5) * 100 > -0.5).long() + ((x_NF[:, 0] - 5) * 100 > 0.5).long()
    assert encoder_alone.accuracy(encoder_alone.fit(x_NF, labels_N, 1e-4), x_NF, labels_N) > 0.97


# -- the whole script


def script_environment(tmp_path, tiny_llm, tiny_encoder):
    steps = {"ENCODER_LAYER": "1", "TUNING_STEPS": "2", "MAPPING_STEPS": "2", "HARD_STEPS": "2", "SOFT_STEPS": "2"}
    return clean_environment(tmp_path) | {
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
        **{"LLM_PATH": tiny_llm, "MT_PATH": tiny_encoder, "DATA_ROOT": str(tmp_path / "datas"), "PRECISION": "fp32"},
        **{"SMALL_MODELS_DIR": str(tmp_path / "small"), "LANGUAGES": "sw,de", "LIMIT": "6", "DEV_SIZE": "6"},
        **steps,
    }


def start(environment):
    command = ["bash", str(ROOT / "scripts/small_real_models.sh")]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_other_languages_and_what_a_kill_left_make_the_folders_anew(tmp_path):
    calls, work = tmp_path / "calls", tmp_path / "small"
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    # It lacks no package, and does nothing but note down what it is called for.
    python.write_text(f'#!/bin/bash\n[[ $1 == -c ]] && exit; echo "$*" >>{calls}\n')
    python.chmod(0o755)
    environment = {"PATH": f"{python.parent}:/usr/bin:/bin", "SMALL_MODELS_DIR": str(work), "CONTROLS": "1"}

    def made(languages):
        calls.unlink(missing_ok=True)
        done = start(environment | {"LANGUAGES": languages})
        output = done.communicate(timeout=60)[0]
        assert done.returncode == 0, output
        called = [line.split(" --")[0] for line in calls.read_text().splitlines()]
        assert called[-1] == "-m scripts.small_models summary"  # made of the results each time
        return [line for line in calls.read_text().splitlines()[:-1] if "small_models" in line.split(" --")[0]]

    (work / "results").mkdir(parents=True)
    for folder in ("datas", "random_encoder"):  # finished by a run that was killed before it could note that down
        (work / folder).mkdir(parents=True)
    data, random_encoder, alone = made("sw,de")
    assert "--languages en,sw,de " in alone
    assert "--languages sw,de " in data and random_encoder.startswith("-m scripts.small_models random_encoder")
    assert not (work / "datas").exists() and not (work / "random_encoder").exists()
    assert made("sw,de") == []
    data, alone = made("sw,zh")
    assert "--languages sw,zh " in data and "--languages en,sw,zh " in alone


def test_what_is_made_from_something_new_is_made_anew_and_more_rows_extend_the_evaluations(tmp_path):
    """A table of a tuning that is gone and of one that is there would look like any other."""
    calls, work = tmp_path / "calls", tmp_path / "small"
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    # Notes the call down, and leaves the folder that it would.
    python.write_text(
        f"""#!/bin/bash
        [[ $1 == -c ]] && exit
        echo "$*" >>{calls}
        name= folder= stage= results= form=
        while [[ $# -gt 0 ]]; do
            case $1 in
                --save_name) name=$2 ;;
                --output_dir) folder=$2 ;;
                --stage_name) stage=$2 ;;
                --results_dir) results=$2 ;;
                --llm_only) form=-llm_only ;;
            esac
            shift
        done
        if [[ -n $stage ]]; then folder+=/$name/xnli/$stage; fi
        if [[ -n $results ]]; then folder=$results/$name/xnli$form-likelihood; fi
        mkdir -p "$folder" && date +%N >>"$folder/made"
        exit $(cat {tmp_path}/code)
        """
    )
    python.chmod(0o755)
    environment = {"PATH": f"{python.parent}:/usr/bin:/bin", "SMALL_MODELS_DIR": str(work), "LLM_PATH": "smollm"}
    (tmp_path / "code").write_text("0")

    def made(**changed):
        """The programs that were called but for the tables, by what they train or evaluate."""
        calls.unlink(missing_ok=True)
        started = start(environment | changed)
        output = started.communicate(timeout=60)[0]
        assert (started.returncode == 0) == ((tmp_path / "code").read_text() == "0"), output
        lines = [line for line in calls.read_text().splitlines() if "table" not in line and " summary " not in line]
        return [(re.search(r"--save_name (\S+)", line) or re.search(r"scripts\.(\S+)", line))[1] for line in lines]

    def times(folder):
        return len((work / folder / "made").read_text().split())

    training = ["small_models", "tune_llm", "start_mapping", "real", "real-hard", "real"]
    evaluations = ["llm", "real", "real-150", "real"]
    assert made() == training + evaluations and made() == []
    # Other settings of the tuning: not what came before it, nor the mapping stage, which goes through the other LLM.
    assert made(TUNING_STEPS="9") == ["tune_llm", "real-hard", "real", *evaluations]
    llm = "results/llm/xnli-llm_only-likelihood"
    assert [times(one) for one in ("llm", "outputs/real-hard/xnli/augmentation", llm)] == [1, 1, 1]
    # More rows: added to what is there.
    assert made(TUNING_STEPS="9", LIMIT="200") == ["llm", "real", "real-200", "real"] and times(llm) == 2
    # What was stopped goes on, unless it was begun with other settings.
    (tmp_path / "code").write_text("1")
    assert made(TUNING_STEPS="9", LIMIT="200", HARD_STEPS="7") == ["real-hard"]
    assert made(TUNING_STEPS="9", LIMIT="200", HARD_STEPS="7") == ["real-hard"]
    assert times("outputs/real-hard/xnli/augmentation") == 2
    (tmp_path / "code").write_text("0")
    assert made(TUNING_STEPS="9", LIMIT="200", HARD_STEPS="8") == ["real-hard", "real", "real", "real-200", "real"]
    assert times("outputs/real-hard/xnli/augmentation") == 1 and times(llm) == 2
    assert made(TUNING_STEPS="9", LIMIT="200", HARD_STEPS="8", DATA_ROOT="other") == training + [
        one.replace("150", "200") for one in evaluations
    ]


def test_the_summary_resamples_premises_and_leaves_english_out_of_the_mean(tmp_path, capsys):
    """Three hypotheses of one premise in two languages are six rows, and one observation."""
    write_xnli(tmp_path / "datas")
    # Items are numbered from 1: the first mark is none.
    llm = {"English": " 110000000000", "Swahili": " 000110000000", "German": " 000110000000"}
    soft = {"English": " 110000000001", "Swahili": " 111110000000", "German": " 111110000000"}
    folders = [write_results(tmp_path / "llm", llm, "xnli"), write_results(tmp_path / "soft", soft, "xnli")]
    words = ["summary", "--data_root", str(tmp_path / "datas"), "--output", str(tmp_path / "summary.md")]
    rows = [f"--row={name}={folder}" for name, folder in zip(("LLM", "Soft"), folders, strict=True)]
    assert small_models.main([*words, *rows, "--against", "LLM"]) == 0
    table = (tmp_path / "summary.md").read_text()
    assert table in capsys.readouterr().out and "4 premises are resampled, each with all its rows in 2 lang" in table
    plain, ours = (line.split(" | ") for line in table.splitlines()[2:4])
    assert plain[1] == "16.7" and plain[2].startswith("16.7 [") and ours[1] == "25.0" and ours[2].startswith("41.7 [")
    # One premise that differs could as well have differed the other way round; by rows it would be six of them.
    assert ours[3].startswith("+25.0 (p 1)")
    with pytest.raises(UserError, match="--against 'Hard' is none of the rows: LLM, Soft"):
        small_models.main([*words, *rows, "--against", "Hard"])


@pytest.mark.slow
def test_the_whole_recipe_runs_is_killed_continues_and_writes_its_tables(tmp_path, tiny_llm, tiny_encoder):
    write_xnli(tmp_path / "datas", premises=24)
    environment = script_environment(tmp_path, tiny_llm, tiny_encoder) | {"CONTROLS": "1"}
    killed, work = start(environment), tmp_path / "small"
    deadline = time.monotonic() + 240
    while not (work / "finished/real-mapping").exists():
        assert killed.poll() is None and time.monotonic() < deadline, killed.stdout.read()
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    finished = start(environment)
    output = finished.communicate(timeout=560)[0]
    assert finished.returncode == 0, output
    assert "Tuning of the LLM on English rows: finished before" in output and "real: mapping: finished before" in output
    table = (work / "results/table.md").read_text()
    soft, shuffled = "MindMerger-Soft", "MindMerger-Soft, shuffled prefix"
    controls = (shuffled, f"{soft}, random encoder", "LLM with LoRA, same rows")
    for label in ("LLM alone", soft, "MindMerger-Hard", *controls):
        assert f"| {label} (likelihood) |" in table
    assert (work / "results/table.png").stat().st_size > 0
    assert "mean without English: " in (work / "results/encoder_alone.txt").read_text()
    assert f"| {soft}, random encoder | " in (work / "results/summary.md").read_text()
    control = (work / "results/against_shuffled/table.md").read_text()
    assert f"Difference to {shuffled} (likelihood)" in control
    # The same command again trains and evaluates nothing.
    again = start(environment)
    output = again.communicate(timeout=240)[0]
    assert again.returncode == 0 and output.count("finished before") == len(list((work / "finished").iterdir()))
    # More rows: the evaluations alone are extended.
    bridges = {"BRIDGES": "mindmerger", "TARGET_TOKENS": "300", "ADAPTER": "none"}
    wider = start(environment | {"LIMIT": "9", "CONTROLS": "0"} | bridges)
    output = wider.communicate(timeout=400)[0]
    assert wider.returncode == 0, output
    assert "real: mapping: finished before" in output
    results = json.loads((work / "results/llm/xnli-llm_only-likelihood/results.json").read_text())
    assert {name: one["n"] for name, one in results["languages"].items()} == dict.fromkeys(NAMES.values(), 9)
    assert len(results["earlier_runs"]) == 1
    assert "| mindmerger (likelihood) | 1 | " in (work / "bridges/bridges.md").read_text()
