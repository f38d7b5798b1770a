"""A finished evaluation is extended to more rows and languages, and scored again, with nothing lost or repeated."""

import json
import os
import re
import shutil

import pytest
import torch
from conftest import ROOT, run_prepared
from safetensors.torch import save_file

from mindmerger.evaluation import extension
from mindmerger.evaluation.comparison import compare_results
from mindmerger.generation import answers
from mindmerger.generation.answers import generate_batch
from mindmerger.model.mindmerger import MindMerger
from mindmerger.runtime.errors import UserError
from run_evaluation import main

TEXTS = {"sw": "Nina maembe {} na {}, jumla?", "th": "ฉันมี {} กับ {} รวมเท่าไร", "en": "I have {} and {}, how many?"}
SHORT = ("--max_new_tokens", "4", "--eval_batch_size", "2", "--precision", "fp32")
TWO = ("--languages", "sw,th")


@pytest.fixture
def data(tmp_path):
    """Six rows of MGSM's form in three languages."""
    folder = tmp_path / "data/evaluation/mgsm"
    folder.mkdir(parents=True)
    for code, text in TEXTS.items():
        lines = [f"{text.format(3 * i, i * i)}\t{3 * i + i * i}\n" for i in range(1, 7)]
        (folder / f"mgsm_{code}.tsv").write_text("".join(lines), encoding="utf-8")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def mapping(tmp_path_factory, tiny_llm, tiny_encoder):
    """The folder of a mapping between the tiny models that gives different sources different answers."""
    folder = tmp_path_factory.mktemp("mapping") / "saved"
    torch.manual_seed(5)
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32)
    torch.nn.init.normal_(model.mapping.mlp.linear2.weight, std=0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def generated(monkeypatch):
    """The number of rows of every batch that is generated; `generated.stop_after` ends a run as Ctrl-C does."""

    class Batches(list):
        stop_after = None

    batches = Batches()

    def counted(model, tokenizers, columns, batch, max_new_tokens):
        if len(batches) == batches.stop_after:
            raise KeyboardInterrupt
        batches.append(len(batch))
        return generate_batch(model, tokenizers, columns, batch, max_new_tokens)

    monkeypatch.setattr(answers, "generate_batch", counted)
    return batches


@pytest.fixture
def evaluate(tiny_llm, data, tmp_path, monkeypatch, capsys, generated):
    """Runs the command, of the LLM alone without `models`; returns (table, messages, rows generated)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, models=("--llm_only", "--llm_path", tiny_llm)):
        generated.clear()
        assert main([str(part) for part in ("--data_root", data, *models, *SHORT, *arguments)]) == 0
        return *capsys.readouterr(), sum(generated)

    return call


def place(tmp_path, results="results", suffix="-llm_only"):
    return tmp_path / results / f"MindMerger/math_mgsm{suffix}"


def predictions(folder):
    return {path.name: path.read_bytes() for path in (folder / "predictions").iterdir()}


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(folder):
    return json.loads((folder / "results.json").read_text())


def change(folder, **entries):
    results = read(folder)
    for name, entry in entries.items():
        results[name] = results[name] | entry
    (folder / "results.json").write_text(json.dumps(results))


def assert_same_results(folder, fresh):
    """Predictions and scores to the byte, and results.json but for what tells of the runs."""
    assert predictions(folder) == predictions(fresh)
    assert (folder / "scores.tsv").read_bytes() == (fresh / "scores.tsv").read_bytes()
    told = ("timing", "arguments", "command", "earlier_runs", "rescored")
    found, expected = ({k: v for k, v in read(one).items() if k not in told} for one in (folder, fresh))
    assert found == expected
    assert not list(folder.glob(".[!l]*")), "no .partial, no temporary file"


def test_a_larger_limit_generates_the_missing_rows_alone_and_ends_with_a_fresh_run_s_bytes(evaluate, tmp_path):
    _, _, first = evaluate(*TWO, "--limit", 3)
    _, said, more = evaluate(*TWO, "--limit", 6)
    assert (first, more) == (6, 6)
    assert "is extended: 6 answers are kept, 6 rows (Swahili 3, Thai 3) are to come" in said
    table, _, fresh = evaluate(*TWO, "--limit", 6, "--results_dir", "fresh")
    assert fresh == 12
    folder = place(tmp_path)
    assert_same_results(folder, place(tmp_path, "fresh"))
    [earlier] = read(folder)["earlier_runs"]
    assert earlier["rows"] == {"Swahili": 3, "Thai": 3} and earlier["timing"]["examples"] == 6
    assert earlier["command"] and "torch" in earlier["versions"]
    assert "earlier_runs" not in read(place(tmp_path, "fresh"))
    assert read(folder)["timing"]["examples"] == 6
    again, said, more = evaluate(*TWO, "--limit", 6)
    assert more == 0 and again == table and "holds this evaluation already" in said


def test_a_language_and_the_rest_of_the_rows_are_added_in_two_steps(evaluate, tmp_path):
    evaluate("--languages", "th", "--limit", 2)
    _, said, more = evaluate("--languages", "en,th", "--limit", 2)
    assert more == 2 and "2 answers are kept, 2 rows (English 2) are to come" in said
    _, _, more = evaluate("--languages", "sw,th,en")  # no limit: all six rows
    assert more == 14
    evaluate("--languages", "sw,th,en", "--results_dir", "fresh")
    assert_same_results(place(tmp_path), place(tmp_path, "fresh"))
    assert [one["rows"] for one in read(place(tmp_path))["earlier_runs"]] == [{"Thai": 2}, {"English": 2}]
    # As many rows by another flag are the same rows.
    before = everything(place(tmp_path))
    _, said, more = evaluate("--languages", "th,sw,en", "--limit", 6)
    assert more == 0 and "holds this evaluation already" in said and everything(place(tmp_path)) == before


def test_answers_that_hit_the_limit_are_counted_over_all_runs(evaluate, tmp_path, monkeypatch):
    def fixed(model, tokenizers, columns, batch, limit):
        numbers = [re.findall(r"\d+", tokenizers.llm.decode(columns["prompt_ids"][i])) for i in batch]
        return [answers.Generation("= 1", 3, "4" in found or "25" in found) for found in numbers]  # rows 2 and 5

    monkeypatch.setattr(answers, "generate_batch", fixed)
    counted = []
    for limit in (3, 4, 6):
        evaluate(*TWO, "--limit", limit)
        counted.append(read(place(tmp_path))["counts"]["hit_limit"])
    assert counted == [2, 2, 4]
    evaluate(*TWO, "--limit", 6, "--results_dir", "fresh")
    assert_same_results(place(tmp_path), place(tmp_path, "fresh"))


def test_fewer_rows_than_are_there_show_all_of_them_and_change_nothing(evaluate, tmp_path):
    whole, _, _ = evaluate(*TWO, "--limit", 3)
    before = everything(place(tmp_path))
    for fewer in ((*TWO, "--limit", 2), ("--languages", "th", "--limit", 3)):
        table, said, more = evaluate(*fewer)
        assert more == 0 and table == whole and everything(place(tmp_path)) == before
        assert "holds more than is asked for, " in said and "besides: the table is of all of it" in said
    assert "3 rows (Swahili 3) besides" in said


def test_other_rows_than_are_there_are_refused_naming_both_sides(evaluate, tmp_path):
    evaluate(*TWO, "--limit", 3)
    before = everything(place(tmp_path))
    message = r"holds 3 rows \(Swahili 3\) that this command leaves out, and lacks 3 rows \(Thai 3\): ask for all"
    with pytest.raises(UserError, match=message):
        evaluate("--languages", "th", "--limit", 6)
    assert everything(place(tmp_path)) == before


def test_a_changed_mapping_is_refused_by_name_and_loses_nothing(evaluate, tmp_path, mapping, tiny_llm, tiny_encoder):
    flags = ("--llm_path", tiny_llm, "--mt_path", tiny_encoder, "--init_checkpoint")
    evaluate(*TWO, "--limit", 2, models=(*flags, mapping))
    before = everything(place(tmp_path, suffix=""))
    model = MindMerger.from_pretrained(str(mapping), dtype=torch.float32)
    save_file({name: value + 1 for name, value in model.mapping.state_dict().items()}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"finished evaluation with another --init_checkpoint \(sha256\): .* then"):
        evaluate(*TWO, "--limit", 4, models=(*flags, tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="finished evaluation with another --precision: fp32 then, bf16 now"):
        evaluate(*TWO, "--limit", 4, "--precision", "bf16", models=(*flags, mapping))
    assert everything(place(tmp_path, suffix="")) == before
    _, _, more = evaluate(*TWO, "--limit", 4, models=(*flags, mapping))
    evaluate(*TWO, "--limit", 4, "--results_dir", "fresh", models=(*flags, mapping))
    assert more == 4
    assert_same_results(place(tmp_path, suffix=""), place(tmp_path, "fresh", ""))


def test_a_row_that_has_changed_is_named_and_new_rows_may_be_anything(evaluate, tmp_path, data):
    evaluate(*TWO, "--limit", 3)
    before, file = everything(place(tmp_path)), data / "evaluation/mgsm/mgsm_th.tsv"
    lines = file.read_text(encoding="utf-8").split("\n")
    for old, new, field in (("ฉันมี 6", "ฉันมี 7", "source"), ("\t10", "\t11", "answer")):
        assert old in lines[1]
        file.write_text("\n".join([lines[0], lines[1].replace(old, new), *lines[2:]]), encoding="utf-8")
        for limit in (2, 3, 6):
            with pytest.raises(UserError, match=f"the data have changed: {field} of th-2 was .*, now .*") as caught:
                evaluate(*TWO, "--limit", limit)
            assert "\n" not in str(caught.value)
    file.write_text("\n".join([*lines[:5], "ใหม่ 1 กับ 1\t2", *lines[6:]]), encoding="utf-8")
    assert everything(place(tmp_path)) == before
    _, _, more = evaluate(*TWO)
    assert more == 6
    assert json.loads(predictions(place(tmp_path))["Thai.jsonl"].splitlines()[5])["source"] == "ใหม่ 1 กับ 1"


def test_what_predictions_do_not_show_of_a_row_is_compared_too(evaluate, tmp_path):
    evaluate(*TWO, "--limit", 3)
    change(place(tmp_path), identity={"data (sha256)": "0" * 64})
    with pytest.raises(UserError, match=r"finished evaluation with another data \(sha256\)"):
        evaluate(*TWO, "--limit", 4)


def test_other_versions_than_the_old_answers_were_made_with_are_refused(evaluate, tmp_path):
    evaluate(*TWO, "--limit", 3)
    change(place(tmp_path), versions={"torch": "1.0", "datasets": "1.0"})
    before = everything(place(tmp_path))
    with pytest.raises(UserError, match="was generated with torch 1.0, now installed: torch .*: install that version"):
        evaluate(*TWO, "--limit", 4)
    assert everything(place(tmp_path)) == before
    _, said, more = evaluate(*TWO, "--limit", 3)  # nothing is mixed
    assert more == 0 and "was made with torch 1.0, datasets 1.0" in said
    change(place(tmp_path), versions={"torch": extension.versions()["torch"]})
    _, _, more = evaluate(*TWO, "--limit", 4)  # no answer depends on datasets
    assert more == 2 and read(place(tmp_path))["earlier_runs"][0]["versions"]["datasets"] == "1.0"


def test_exchanged_prefixes_allow_another_language_and_no_other_limit(evaluate, tmp_path, mapping):
    """A row's partner is drawn among all rows that are asked, so that its answer depends on their number."""
    models, suffix = ("--init_checkpoint", mapping, "--probe_prefix", "shuffled"), "-prefix_shuffled"
    evaluate("--languages", "th", "--limit", 3, models=models)
    with pytest.raises(UserError, match="th-. got the prefix of th-., now of th-.: rows exchange them"):
        evaluate("--languages", "th", models=models)
    _, _, more = evaluate(*TWO, "--limit", 3, models=models)
    evaluate(*TWO, "--limit", 3, "--results_dir", "fresh", models=models)
    assert more == 3
    assert_same_results(place(tmp_path, suffix=suffix), place(tmp_path, "fresh", suffix))


def test_whatever_else_a_record_holds_is_kept_with_its_answer(evaluate, tmp_path):
    evaluate(*TWO, "--limit", 3, "--score_gold")
    _, _, more = evaluate(*TWO, "--limit", 5, "--score_gold")
    evaluate(*TWO, "--limit", 5, "--score_gold", "--results_dir", "fresh")
    assert more == 4 and "gold_loss" in predictions(place(tmp_path))["Thai.jsonl"].decode()
    found, expected = read(place(tmp_path)), read(place(tmp_path, "fresh"))
    # The forward pass of other batches may round otherwise in its last bits.
    assert found["gold"]["gold_loss"] == pytest.approx(expected["gold"]["gold_loss"], rel=1e-5)
    assert found["gold"]["gold_tokens"] == expected["gold"]["gold_tokens"]


def test_a_kill_while_generating_leaves_the_finished_evaluation_and_what_was_generated(evaluate, tmp_path, generated):
    evaluate(*TWO, "--limit", 3)
    finished = place(tmp_path)
    shutil.copytree(finished, tmp_path / "copy")
    generated.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        evaluate(*TWO, "--limit", 6)
    generated.stop_after = None
    assert predictions(finished) == predictions(tmp_path / "copy")
    assert "6 items in common" in compare_results([str(finished), str(tmp_path / "copy")])
    # The smaller command neither loses what the larger one has generated so far nor takes it for its own.
    _, said, more = evaluate(*TWO, "--limit", 3)
    assert more == 0 and "holds this evaluation already" in said
    with pytest.raises(UserError, match="unfinished evaluation with another --limit: 6 then, 5 now: finish it"):
        evaluate(*TWO, "--limit", 5)
    _, said, more = evaluate(*TWO, "--limit", 6)
    assert more == 2 and "continuing: 10 of 12 examples are finished" in said
    evaluate(*TWO, "--limit", 6, "--results_dir", "fresh")
    assert_same_results(finished, place(tmp_path, "fresh"))
    assert read(finished)["earlier_runs"][0]["rows"] == {"Swahili": 3, "Thai": 3}


class Killed(BaseException):
    """Ends a run where nothing of it may catch that, as a kill does."""


def kill_at(monkeypatch, step):
    """Ends the run before the given call that changes a file or folder; returns the calls that there were."""
    calls = []

    def armed(name):
        call = getattr(os, name)

        def counted(*arguments, **named):
            calls.append((name, str(arguments[0])))
            if len(calls) == step:
                raise Killed
            return call(*arguments, **named)

        monkeypatch.setattr(os, name, counted)

    for name in ("replace", "unlink", "rmdir"):
        armed(name)
    return calls


@pytest.mark.parametrize("kind", ["extended", "rescored"])
def test_a_kill_at_any_change_of_a_file_loses_no_answer(evaluate, tmp_path, monkeypatch, kind):
    evaluate(*TWO, "--limit", 3, "--results_dir", "old")
    change(place(tmp_path, "old"), identity={} if kind == "extended" else {"version of the scorer": 2})
    flags = (*TWO, "--limit", 4 if kind == "extended" else 3)
    evaluate(*flags, "--results_dir", "fresh")
    step, killed = 0, True
    while killed:
        step += 1
        shutil.copytree(tmp_path / "old", tmp_path / f"killed{step}")
        with monkeypatch.context() as patch:
            calls = kill_at(patch, step)
            try:
                evaluate(*flags, "--results_dir", f"killed{step}")
                killed = False
            except Killed:
                (place(tmp_path, f"killed{step}") / ".lock").unlink(missing_ok=True)
        _, _, more = evaluate(*flags, "--results_dir", f"killed{step}")
        assert more <= 2 * (kind == "extended"), "no kept answer is generated again"
        assert_same_results(place(tmp_path, f"killed{step}"), place(tmp_path, "fresh"))
        results = read(place(tmp_path, f"killed{step}"))
        if kind == "extended":
            assert [one["rows"] for one in results["earlier_runs"]] == [{"Swahili": 3, "Thai": 3}]
        else:
            assert results["rescored"]["from"] == 2 and results["timing"]["examples"] == 6
    assert step > 8 and {name for name, _ in calls} == {"replace", "unlink", "rmdir"}


def test_results_of_an_older_scorer_are_scored_again_without_generating(evaluate, tmp_path):
    evaluate(*TWO, "--limit", 3)
    folder = place(tmp_path)
    shutil.copytree(folder, tmp_path / "fresh/MindMerger/math_mgsm-llm_only")
    for file in (folder / "predictions").iterdir():  # as another scorer may have read the outputs
        file.write_text(file.read_text(encoding="utf-8").replace('"correct": false', '"correct": true'), "utf-8")
    change(folder, identity={"version of the scorer": 2}, versions={"torch": "1.0"})
    old = read(folder)
    with pytest.raises(UserError, match="scored by version 2 of the scorer, now 3, and holds 3 rows .*: ask for all"):
        evaluate("--languages", "th", "--limit", 3)
    _, said, more = evaluate(*TWO, "--limit", 3)
    assert more == 0
    assert "scored by version 2 of the scorer, now 3: 6 kept answers are scored again" in said
    assert predictions(folder) == predictions(place(tmp_path, "fresh"))
    results = read(folder)
    # Speed and versions are those of the run that generated.
    assert [results[name] == old[name] for name in ("timing", "versions", "command", "arguments")] == [True] * 4
    assert (results["rescored"]["from"], results["rescored"]["to"]) == (2, 3)
    assert results["identity"] == read(place(tmp_path, "fresh"))["identity"]
    _, said, _ = evaluate(*TWO, "--limit", 3)
    assert "holds this evaluation already" in said and "scored again" not in said


def test_an_older_scorer_s_results_are_extended_and_scored_by_one_scorer(evaluate, tmp_path):
    evaluate(*TWO, "--limit", 3)
    change(place(tmp_path), identity={"version of the scorer": 2})
    _, said, more = evaluate(*TWO, "--limit", 4)
    assert more == 2 and "6 kept answers are scored again" in said
    evaluate(*TWO, "--limit", 4, "--results_dir", "fresh")
    assert_same_results(place(tmp_path), place(tmp_path, "fresh"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: change(folder, languages={"Thai": {"n": 3}}), "is not what an evaluation writes .*hit_limit"),
        (lambda folder: (folder / "predictions/Thai.jsonl").unlink(), "Thai.jsonl is missing although results.json"),
        (
            lambda folder: (folder / "predictions/Thai.jsonl").write_text(
                (folder / "predictions/Thai.jsonl").read_text(encoding="utf-8").replace('"output"', '"put"'), "utf-8"
            ),
            "th-1 has no output",
        ),
    ],
)
def test_a_damaged_evaluation_is_not_extended(evaluate, tmp_path, spoil, message):
    evaluate(*TWO, "--limit", 3)
    spoil(place(tmp_path))
    before = everything(place(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        evaluate(*TWO, "--limit", 4)
    assert "\n" not in str(caught.value) and everything(place(tmp_path)) == before


def test_two_ranks_extend_what_one_has_begun_and_continue_an_older_scorer_s_answers(
    evaluate, tmp_path, data, tiny_llm, generated
):
    """Where the scorer had changed, the second rank removed the first one's finished answers from their folder."""
    evaluate(*TWO, "--limit", 3)
    generated.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        evaluate(*TWO, "--results_dir", "older")
    generated.stop_after = None
    run_file = place(tmp_path, "older") / ".partial/run.json"
    run = json.loads(run_file.read_text())
    run["identity"]["version of the scorer"] = 2
    run_file.write_text(json.dumps(run))
    evaluate(*TWO, "--results_dir", "fresh")
    flags = ("--data_root", data, "--llm_only", "--llm_path", tiny_llm, *SHORT, *TWO)
    for results, kept in (("results", 6), ("older", 4)):
        codes, printed = run_prepared(
            ROOT / "run_evaluation.py", *flags, "--results_dir", results, cwd=tmp_path, ranks=2
        )
        assert codes == [0, 0], printed
        assert f"generating {12 - kept} answers in fp32 on 2 processes" in printed[0]
        assert_same_results(place(tmp_path, results), place(tmp_path, "fresh"))
