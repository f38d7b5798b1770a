"""lm-evaluation-harness with MindMerger among its models: the same answers and scores as run_evaluation.py."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

pytest.importorskip("lm_eval", reason='pip install "lm_eval>=0.4.13,<0.5"')

import lm_eval
from lm_eval._cli import HarnessCLI
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from mindmerger.generation import answers
from mindmerger.integrations import lm_eval as command
from mindmerger.integrations.lm_eval_model import HarnessModel, choose_device
from mindmerger.integrations.lm_eval_table import TABLE, find_query, source_text
from mindmerger.model.mindmerger import MindMerger
from mindmerger.runtime.errors import UserError
from mindmerger.tasks import find_task
from mindmerger.tasks.languages import find_language
from run_evaluation import main

TOKENS = 24
FP32 = {"precision": "fp32"}
HARNESS = Path(lm_eval.__file__).parent / "tasks"


def build_parser():
    """The harness's own parser of what `run` is given, for the test of the commands in the pages."""
    return HarnessCLI()._subparsers.choices["run"]


@pytest.fixture(scope="module")
def mapping(tmp_path_factory, tiny_llm, tiny_encoder):
    """A folder of a mapping between the tiny models that gives other answers to other sources."""
    folder = tmp_path_factory.mktemp("mapping")
    torch.manual_seed(5)
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32)
    torch.nn.init.normal_(model.mapping.mlp.linear2.weight, std=0.5)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(mapping):
    return HarnessModel(init_checkpoint=mapping, device="cpu", batch_size=3, **FP32)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A data folder of 20 rows of XNLI's form and 20 of MGSM's in Swahili."""
    root = tmp_path_factory.mktemp("data")
    (root / "evaluation/xnli").mkdir(parents=True)
    (root / "evaluation/mgsm").mkdir()
    labels = find_task("xnli").labels
    xnli = [
        {
            "sentence1": f"Mtu {i} ana vitabu {i * 7}." + " Anasoma." * (i % 4),
            "sentence2": f"Mtu {i} hana vitabu.",
            "label": labels[i % 3],
            "language": "Swahili",
        }
        for i in range(20)
    ]
    (root / "evaluation/xnli/test.json").write_text(json.dumps(xnli))
    mgsm = [
        f"Juma ana maembe {i}. Ananunua {i * i} zaidi{'.' * (i % 5)} Ana mangapi?\t{i + i * i}\n" for i in range(20)
    ]
    (root / "evaluation/mgsm/mgsm_sw.tsv").write_text("".join(mgsm))
    return str(root)


def run_harness(model, task, data_root, **more):
    """The harness's results of one of our own tasks."""
    manager = TaskManager(include_path=str(command.TASKS), include_defaults=False, metadata={"data_root": data_root})
    return lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0, **more)


def run_own(tmp_path, mapping, data_root, task, *more):
    """The results and predictions of run_evaluation.py on the same rows."""
    flags = ["--task", task, "--languages", "sw", "--data_root", data_root, "--init_checkpoint", mapping]
    flags += ["--precision", "fp32", "--results_dir", str(tmp_path), "--eval_batch_size", "3", *more]
    assert main(flags) == 0
    [folder] = (tmp_path / "MindMerger").iterdir()
    lines = (folder / "predictions/Swahili.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((folder / "results.json").read_text()), [json.loads(line) for line in lines]


def request(kind, prompt, second, row=None, task="mgsm_direct_sw", number=0):
    """A request as a task of the harness makes it."""
    return Instance(kind, row or {"question": "Ngapi?"}, (prompt, second), 0, (task, number, 1))


# -- the same as run_evaluation.py


def test_twenty_rows_get_the_same_answers_and_scores_from_the_harness(model, mapping, rows, tmp_path):
    found = run_harness(model, "mindmerger_mgsm_sw", rows, gen_kwargs={"max_gen_toks": TOKENS})
    results, expected = run_own(tmp_path, mapping, rows, "math", "--max_new_tokens", str(TOKENS))
    samples = sorted(found["samples"]["mindmerger_mgsm_sw"], key=lambda one: one["doc_id"])
    assert [one["resps"] for one in samples] == [[[row["output"]]] for row in expected]
    assert len({row["output"] for row in expected}) > 15, "equal answers to all show little"
    scores = found["results"]["mindmerger_mgsm_sw"]
    [own] = results["languages"].values()
    assert 100 * scores["corrected,none"] == pytest.approx(own["accuracy"])
    assert found["config"]["form"] == "soft" and found["config"]["mapping_sha256"]


def test_the_harness_log_likelihoods_of_twenty_rows_are_those_of_likelihood_scoring(model, mapping, rows, tmp_path):
    found = run_harness(model, "mindmerger_xnli_sw", rows)
    results, expected = run_own(tmp_path, mapping, rows, "xnli", "--scoring", "likelihood")
    samples = sorted(found["samples"]["mindmerger_xnli_sw"], key=lambda one: one["doc_id"])
    assert len(samples) == 20
    for one, row in zip(samples, expected, strict=True):
        [first, *_] = one["arguments"]
        assert tuple(first)[1] == "entailment"
        log_probs = [score for [(score, _)] in one["resps"]]
        assert log_probs == pytest.approx(list(row["label_log_probs"].values()), rel=1e-5)
    [own] = results["languages"].values()
    assert 100 * found["results"]["mindmerger_xnli_sw"]["acc,none"] == pytest.approx(own["accuracy"])


def test_a_group_has_every_language_and_their_unweighted_mean(model, datas):
    found = run_harness(model, "mindmerger_xnli", datas)["results"]
    group = found.pop("mindmerger_xnli")
    assert len(found) == len(find_task("xnli").evaluation_languages)
    scores = [one["acc,none"] for one in found.values()]
    assert group["acc,none"] == pytest.approx(sum(scores) / len(scores)) and any(scores)


def test_a_log_likelihood_is_minus_the_summed_loss_of_the_bare_continuation(model):
    row = {"question": "Mbili na tatu ni ngapi?"}
    wanted = [request("loglikelihood", "Swali?\nAnswer:", text, row) for text in (" tano", " sita", " kumi na moja")]
    scores = model.loglikelihood(wanted)
    own, tokenizers = model.model, model.tokenizers
    source = tokenizers.encoder(row["question"])["input_ids"]
    prompt = tokenizers.llm("Swali?\nAnswer:", add_special_tokens=False)["input_ids"]
    for one, (score, _) in zip(wanted, scores, strict=True):
        target = tokenizers.llm(one.args[1], add_special_tokens=False)["input_ids"]
        columns = {"encoder_ids": [source], "prompt_ids": [prompt], "target_ids": [target]}
        inputs = answers.batch_inputs(own, tokenizers, columns, [0], with_target=True)
        with torch.no_grad():
            assert score == pytest.approx(-own(**inputs).loss_sum.item(), rel=1e-5)


def test_a_continuation_is_greedy_where_decoding_gives_it(model):
    prompts = [f"Swali {i}:" for i in range(30)]
    one_token = {"until": [], "max_gen_toks": 1}
    found = model.generate_until([request("g", one, one_token, number=i) for i, one in enumerate(prompts)])
    # A token is a byte, and not every byte is a text.
    pairs = [(one, text) for one, text in zip(prompts, found, strict=True) if text.isascii() and text.isprintable()]
    assert len(pairs) > 2
    for number, (prompt, text) in enumerate(pairs):
        wanted = [request("l", prompt, one, number=number) for one in (text, text + "~~~~", "~~")]
        assert [greedy for _, greedy in model.loglikelihood(wanted)] == [True, False, False]


def test_a_task_of_the_harness_itself_runs_on_local_rows(model, rows, tmp_path):
    lines = Path(f"{rows}/evaluation/mgsm/mgsm_sw.tsv").read_text().splitlines()
    questions = [line.split("\t")[0] for line in lines]
    file = tmp_path / "rows.jsonl"
    lines = [{"question": one, "answer": None, "answer_number": 7} for one in questions]
    file.write_text("".join(json.dumps(one) + "\n" for one in lines))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/local.yaml").write_text(
        f"include: {HARNESS}/mgsm/direct/mgsm_direct_sw.yaml\ndataset_path: json\ndataset_name: null\n"
        f"training_split: null\ndataset_kwargs:\n  data_files:\n    test: {file}\n"
    )
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    read = []
    handle = model.model.encoder.register_forward_pre_hook(
        lambda module, given, named: read.extend(named["input_ids"].tolist()), with_kwargs=True
    )
    found = lm_eval.simple_evaluate(
        model, tasks=["mgsm_direct_sw"], task_manager=manager, bootstrap_iters=0, gen_kwargs={"max_gen_toks": 8}
    )
    handle.remove()
    texts = sorted(model.tokenizers.encoder.decode(ids, skip_special_tokens=True) for ids in read)
    assert texts == sorted(questions)  # the question alone
    [first, *_] = found["samples"]["mgsm_direct_sw"]
    assert first["arguments"][0][0] == f"Swali: {questions[0]}\nAnswer:"  # and the LLM the harness's own prompt


def test_an_answer_ends_before_the_first_stop_string_and_is_not_generated_further(model):
    free = {"until": [], "max_gen_toks": 40}
    prompts = [f"Swali {i}:" for i in range(5)]
    whole = model.generate_until([request("generate_until", one, free, number=i) for i, one in enumerate(prompts)])
    stop = whole[0][8:10]
    steps = []
    handle = model.model.llm.register_forward_hook(lambda *_: steps.append(1))
    try:
        limited = {"until": ["", stop], "max_gen_toks": 40}
        [short] = model.generate_until([request("generate_until", prompts[0], limited)])
    finally:
        handle.remove()
    assert short == whole[0].split(stop)[0] and len(steps) < 40
    many = [request("generate_until", one, limited, number=i) for i, one in enumerate(prompts)]
    assert model.generate_until(many) == [one.split(stop)[0] for one in whole]


def test_the_llm_alone_reads_the_prompt_and_knows_any_task(tiny_llm):
    alone = HarnessModel(llm_only=True, llm_path=tiny_llm, device="cpu", **FP32)
    assert alone.form == "llm_only"
    [answer] = alone.generate_until(
        [request("generate_until", "Two and", {"until": []} | {"max_gen_toks": 5}, task="x")]
    )
    [(score, _)] = alone.loglikelihood([request("loglikelihood", "Two and", " three", task="x")])
    assert answer and score < 0


# -- what the encoder reads


def names_of_the_harness():
    """The tasks of the harness's folders that the table speaks of."""
    for folder in ("mgsm", "afrimgsm", "afrixnli", "belebele", "global_mmlu"):
        for file in sorted((HARNESS / folder).rglob("*.yaml")):
            if match := re.search(r"^task: *(\w+)", file.read_text(encoding="utf-8"), re.MULTILINE):
                yield match[1]


def test_every_task_of_the_harness_that_the_table_speaks_of_has_a_query_and_a_language():
    names = list(names_of_the_harness())
    assert len(names) > 1500
    for name in names:
        find_language(find_query(name).language)
    assert find_language(find_query("afrimgsm_swa_prompt_1").language).name == "Swahili"
    assert find_query("afrimgsm_translate_swa_prompt_1").language == "English"
    assert find_query("belebele_npi_Latn").language == "npi_Latn"
    assert find_query("global_mmlu_full_am_anatomy").language == "am"


def test_own_tasks_are_those_of_the_languages_that_run_evaluation_reads():
    paths = {path.stem: path for path in command.TASKS.glob("*_*_*.yaml")}
    found = {name: load_yaml(path, resolve_func=False) for name, path in paths.items()}
    expected = {
        f"mindmerger_{short}_{find_language(name).code}": (task.name, find_language(name).code)
        for short, task in (("mgsm", find_task("math")), ("xnli", find_task("xnli")))
        for name in task.evaluation_languages
    }
    assert {
        name: (one["dataset_kwargs"]["benchmark"], one["dataset_kwargs"]["code"]) for name, one in found.items()
    } == expected
    assert all(one["task"] == name for name, one in found.items())
    groups = [load_yaml(command.TASKS / f"mindmerger_{name}.yaml") for name in ("mgsm", "xnli")]
    assert {name for group in groups for name in group["task"]} == found.keys()


ROWS = {
    "mgsm_en_cot_de": ({"question": "Wie viele?", "answer": None}, "Wie viele?"),
    "afrixnli_native_direct_hau": ({"premise": "A.", "hypothesis": "B."}, "Premise: A.\nHypothesis: B.\nLabel:"),
    "belebele_swh_Latn": (
        {"flores_passage": "P.", "question": "Q?", **{f"mc_answer{i}": f"m{i}" for i in range(1, 5)}},
        "P.\nQ?\nOptions:A. m1\tB. m2\tC. m3\tD. m4\nAnswer:",
    ),
    "global_mmlu_sw_stem": (
        {"question": "Q?", **{f"option_{letter}": letter * 2 for letter in "abcd"}},
        "Q?\nOptions:A. aa\tB. bb\tC. cc\tD. dd\nAnswer:",
    ),
    "mindmerger_xnli_ur": ({"source": "S", "prompt": "P"}, "S"),
}


@pytest.mark.parametrize("task", ROWS)
def test_the_encoder_reads_the_text_that_mappings_are_trained_on(task):
    row, expected = ROWS[task]
    assert source_text(find_query(task), task, row) == expected
    assert find_query(task).end_token == task.startswith("mindmerger_")
    assert len({pattern for pattern, _ in TABLE if re.fullmatch(pattern, task)}) == 1
    missing = next(iter(row))
    with pytest.raises(UserError, match=f"task {task}: the rows have no field '{missing}'.*other.*query=FIELD"):
        source_text(find_query(task), task, {"other": ""} | {k: v for k, v in row.items() if k != missing})


def test_a_query_takes_the_table_s_place():
    row = {"question": "Q?", "premise": "A", "hypothesis": "B", "number": 3}
    for query, expected in (("question", "Q?"), ("{premise}\\n{hypothesis}", "A\nB"), ("{question} {number}", "Q? 3")):
        for task in ("anything", "mgsm_direct_sw"):
            assert source_text(find_query(task, query), task, row) == expected
    assert find_query("mgsm_direct_sw", "question").language == "sw" and find_query("x", "question").language is None
    for wrong in ("{", "{0}", "{question.upper}", "{}", "a b"):
        with pytest.raises(UserError, match="^query="):
            find_query("x", wrong)


def test_an_encoder_with_tags_is_told_the_task_s_language(mapping, model, monkeypatch):
    tagged = HarnessModel(init_checkpoint=mapping, device="cpu", **FP32)
    monkeypatch.setattr(tagged.tokenizers, "encoder", SimpleNamespace(src_lang=""))
    row = {"question": "Q?"}
    for task, expected in (("mgsm_direct_sw", "Swahili"), ("afrimgsm_translate_orm_prompt_2", "English")):
        assert tagged._example(0, request("generate_until", "P", {}, row, task)).language == expected
    tagged.query = "question"
    with pytest.raises(UserError, match="reads a language tag, and the language of task other is not known"):
        tagged._example(0, request("generate_until", "P", {}, row, "other"))
    tagged.language = "Hausa"
    assert tagged._example(0, request("generate_until", "P", {}, row, "other")).language == "Hausa"


def test_a_tokenizer_that_begins_texts_with_a_blank_gets_no_second_one(model, monkeypatch):
    ids = model._continuation_ids(request("loglikelihood", "P", " tano"))
    assert ids == model.tokenizers.llm(" tano", add_special_tokens=False)["input_ids"]
    monkeypatch.setitem(vars(model), "_blank_is_added", True)
    ids = model._continuation_ids(request("loglikelihood", "P", " tano"))
    assert ids == model.tokenizers.llm("tano", add_special_tokens=False)["input_ids"]


# -- refusals


def test_what_the_adapter_cannot_do_is_refused_by_name(model, mapping, tiny_llm, tmp_path):
    greedy = {"until": []}
    cases = (
        (lambda: model.generate_until([request("g", "P", greedy, task="xnli_sw")]), "encoder reads of task xnli_sw"),
        (lambda: model.loglikelihood([request("l", "P", " x", task="xnli_sw")]), "encoder reads of task xnli_sw"),
        (lambda: model.loglikelihood([request("l", "P", "")]), "probability of an empty text"),
        (lambda: model.loglikelihood_rolling([request("r", "P", None, task="wikitext")]), r"rolling \(task wikitext\)"),
        (lambda: model.generate_until([request("g", "P", greedy | {"do_sample": True})]), "asks for sampling"),
        (lambda: model.generate_until([request("g", "P", greedy | {"num_beams": 4})]), "asks for num_beams"),
        (lambda: model.chat_template(True), "--apply_chat_template"),
        (lambda: HarnessModel(init_checkpoint=mapping, device="cpu", batch_size="auto"), "--batch_size auto"),
        (lambda: HarnessModel(device="cpu"), "no model named"),
        (
            lambda: HarnessModel(device="cpu", init_checkpint=mapping),
            r"init_checkpint is unknown.*mean init_checkpoint",
        ),
        (lambda: HarnessModel(device="cpu", init_checkpoint=str(tmp_path)), str(tmp_path)),
        (lambda: HarnessModel(device="cpu", llm_only=True, llm_path=tiny_llm, precision="int4"), "precision"),
        (lambda: choose_device("gpu"), "--device gpu"),
        (lambda: choose_device("cuda:77"), "--device cuda:77"),
    )
    for call, message in cases:
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_launcher_s_processes_are_refused(mapping, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs in one process"):
        HarnessModel(init_checkpoint=mapping, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_the_harness_s_default_device_is_the_cpu_without_a_gpu(capsys):
    assert choose_device("cuda:0") == torch.device("cpu") and "no GPU is there" in capsys.readouterr().err


def test_truncated_inputs_are_said(mapping, capsys):
    short = HarnessModel(init_checkpoint=mapping, device="cpu", max_seq_len=5, max_gen_len=9, **FP32)
    columns = short._columns([request("g", "P" * 20 + "Answer:", {}), request("g", "P", {}, {"question": "a"})], 3)
    error = capsys.readouterr().err
    assert "1 of 2 inputs are longer than max_seq_len" in error and "1 of 2 inputs are longer than max_gen_len" in error
    # As the harness does it: the end stays, where the answer follows.
    assert short.tokenizers.llm.decode(columns["prompt_ids"][0]) == "PPAnswer:"


# -- the command


def test_the_command_adds_our_model_and_tasks_where_none_are_named():
    ours = ["--model", "mindmerger", "--include_path", str(command.TASKS)]
    assert command.harness_arguments(["--tasks", "a"]) == ["run", "--tasks", "a", *ours]
    assert command.harness_arguments(["run", "--tasks", "a"]) == ["run", "--tasks", "a", *ours]
    named = ["--model=hf", "--include_path", "x"]
    assert command.harness_arguments(named) == ["run", *named]
    assert command.harness_arguments(["--config", "x.yaml"]) == ["run", "--config", "x.yaml"]
    assert command.harness_arguments(["ls", "tasks"]) == ["ls", "tasks"]


@pytest.mark.slow
def test_the_command_runs_the_harness_and_leaves_its_results(mapping, rows, run, tmp_path):
    flags = ["--model_args", f"init_checkpoint={mapping},precision=fp32,data_root={rows}", "--tasks"]
    flags += ["mindmerger_xnli_sw", "--limit", "2", "--output_path", tmp_path / "out", "--log_samples"]
    done = run(sys.executable, "-m", "mindmerger.integrations.lm_eval", *flags, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mindmerger_xnli_sw" in done.stdout
    [file] = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["config"]["encoder_text"] == "by task"


def test_a_cache_is_refused_before_a_model_loads(mapping, tmp_path):
    fresh = HarnessModel(init_checkpoint=mapping, device="cpu", **FP32)
    with pytest.raises(UserError, match="--use_cache knows neither the model nor the encoder's text"):
        CachingLM(fresh, str(tmp_path / "cache.db"))
    assert "model" not in vars(fresh)


def test_what_the_harness_says_of_its_command_line_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lm-eval"])
    cases = ((["--log_samples"], "Specify --output_path"), (["--model_args", "a={b}"], "Invalid JSON: a={b}"))
    for flags, message in cases:
        with pytest.raises(UserError, match=f"^{message}"):
            command.main(["--tasks", "mgsm_direct_sw", *flags])


def test_an_error_inside_the_harness_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lm-eval"])
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        command.main(["--tasks", "x"])


def test_without_the_harness_the_command_names_its_package(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "lm_eval>=0\.4\.13,<0\.5"'):
        command.main([])
