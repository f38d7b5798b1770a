"""Labels of a task, and answers chosen among them by their log-probabilities."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_attention_memory import remembering
from test_modeling_mindmerger import LLMS, batch, make_pair, rows

from mindmerger.evaluation.comparison import keep_common, read_row
from mindmerger.evaluation.flags import build_parser
from mindmerger.evaluation.settings import settle
from mindmerger.generation import answers, likelihood
from mindmerger.generation.likelihood import encode_labels, label_tensors, size_of
from mindmerger.hub.model_files import ModelError
from mindmerger.model import likelihood as model_likelihood
from mindmerger.model.mindmerger import MindMerger
from mindmerger.runtime.errors import UserError
from mindmerger.tasks import TASKS, find_task
from mindmerger.tasks.languages import find_language
from run_evaluation import main

LANGUAGES = ("English", "Swahili", "Urdu")
FEW = ("--task", "xnli", "--languages", ",".join(LANGUAGES), "--eval_batch_size", "4")  # 9 rows, 3 batches
CHOSEN = (*FEW, "--scoring", "likelihood")
PLAIN = {"encoder_input_ids": None, "encoder_attention_mask": None}


def option_row(letters, answer):
    """A row in X-CSQA's form."""
    choices = [{"label": letter, "text": f"thing {i}"} for i, letter in enumerate(letters)]
    return {"lang": "en", "question": {"stem": "What flies?", "choices": choices}, "answerKey": answer}


def write_options(root, rows):
    """Writes rows as X-CSQA's English test set; returns the data folder."""
    file = root / "evaluation/x-csqa/en/dev.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row | {"id": f"q{i}"}) + "\n" for i, row in enumerate(rows)))
    return root


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


# -- labels of a task


def test_rows_have_the_labels_of_their_task_or_their_own_options(tmp_path, datas):
    english = find_language("en")
    rows = [option_row("ABCDE", "E"), option_row("BA", "A"), option_row("12", "2")]
    examples = list(find_task("x-csqa").read_evaluation(write_options(tmp_path, rows), english))
    assert [example.labels for example in examples] == [tuple("ABCDE"), tuple("BA"), tuple("12")]
    xnli, math = (next(find_task(name).read_evaluation(datas, english)) for name in ("xnli", "math"))
    assert xnli.labels == ("entailment", "neutral", "contradiction") == find_task("xnli").labels
    assert math.labels == ()
    assert find_task("math").labels is None


@pytest.mark.parametrize("name", ["xnli", "x-csqa"])
def test_the_gold_answer_of_every_row_is_one_of_its_labels(name, datas):
    task = find_task(name)
    examples = list(task.read_evaluation(datas, find_language("en")))
    assert examples and all(example.target in example.labels for example in examples)
    assert all(set(example.labels) <= set(task.labels) for example in examples)


# -- losses of labels, by the model


def labels_of(number, seed=1):
    """Tokens of one to three labels for each of some rows, one to four tokens long."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, size=()):
        return torch.randint(low, high, size, generator=generator)

    return [[draw(3, 120, (int(draw(1, 5)),)).tolist() for _ in range(int(draw(1, 4)))] for _ in range(number)]


def as_tensors(labels):
    """Ids and mask (B, C, T) of labels given by row."""
    ids_of = {str(ids): ids for row in labels for ids in row}
    texts = [tuple(map(str, row)) for row in labels]
    ids, mask = label_tensors(ids_of, texts, 0, size_of(ids_of, texts))
    return {"target_ids": ids, "target_mask": mask}


def check_losses_equal_full_passes(model, with_encoder=True):
    examples = rows()
    labels = labels_of(len(examples))
    options = {"with_target": False}
    kept = (lambda name: True) if with_encoder else (lambda name: not name.startswith("encoder"))
    for with_prompt in (True, False) if with_encoder else (True,):
        given = {k: v for k, v in batch(examples, "left", with_prompt, **options).items() if kept(k)}
        found = model(**given, **as_tensors(labels)).label_losses
        assert not found.requires_grad and found.shape == (len(examples), 3)
        for i, example in enumerate(examples):
            alone = {k: v for k, v in batch([example], "right", with_prompt, **options).items() if kept(k)}
            assert found[i, len(labels[i]) :].isinf().all()
            for c, ids in enumerate(labels[i]):
                target = {"target_ids": torch.tensor([ids]), "target_mask": torch.ones(1, len(ids), dtype=torch.long)}
                with torch.no_grad():
                    expected = model(**alone, **target).loss_sum.item()
                assert found[i, c].item() == pytest.approx(expected, rel=1e-5, abs=1e-5), (i, c)


@pytest.mark.parametrize("llm", LLMS)
def test_the_loss_of_a_label_is_that_of_a_whole_pass_with_it_in_every_family(tmp_path, llm):
    check_losses_equal_full_passes(make_pair(tmp_path, "mt5", llm))


@pytest.mark.parametrize("llm", ["llama", "gemma2", "opt"])
def test_the_loss_of_a_label_is_that_of_a_whole_pass_with_a_memory_beside_the_prefix(tmp_path, llm):
    check_losses_equal_full_passes(remembering(tmp_path, llm))


def test_the_loss_of_a_label_is_that_of_a_whole_pass_for_the_llm_alone(tmp_path):
    check_losses_equal_full_passes(make_pair(tmp_path, "mt5", "gpt2"), with_encoder=False)


def test_a_score_is_minus_the_loss_and_says_whether_greedy_decoding_gives_the_target(tmp_path):
    model, examples = make_pair(tmp_path, "mt5", "llama"), rows()
    inputs = batch(examples, "left", with_target=False)
    decoded = model.generate(**inputs, max_new_tokens=5).tolist()
    assert not {token for ids in decoded for token in ids} & set(model.eos_token_ids)
    places = [(ids, row % 5) for row, ids in enumerate(decoded)]
    changed = [[*ids[:at], (ids[at] + 1) % 100, *ids[at + 1 :]] for ids, at in places]
    targets = as_tensors([[ids, ids[:1], other] for ids, other in zip(decoded, changed, strict=True)])
    log_probs, greedy = model.score(**inputs, **targets)
    assert greedy.tolist() == [[True, True, False]] * len(examples)
    losses = model(**inputs, **targets).label_losses
    assert torch.equal(log_probs, -losses) and not log_probs.requires_grad
    log_probs, greedy = model.score(**inputs, **as_tensors([[ids] for ids in decoded[:7]] + [[decoded[7], decoded[7]]]))
    assert log_probs[:7, 1].isneginf().all() and greedy.tolist() == [[True, False]] * 7 + [[True, True]]


def test_the_input_is_read_once_for_all_labels(tmp_path):
    model = make_pair(tmp_path, "mt5", "llama")
    passed = []
    model.llm.register_forward_pre_hook(
        lambda module, given, named: passed.append(tuple(named["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    inputs = batch(rows(), "left", with_target=False)
    model(**inputs, **as_tensors([[[5, 6, 7], [8, 9]]] * 8))
    length = max(1 + len(source) + 2 + len(prompt) for source, prompt, _ in rows()) - 1  # BOS, both boundaries
    assert passed == [(8, length), (8, 2), (8, 2)]
    passed.clear()
    model(**inputs, **as_tensors([[[5], [8], [9]]] * 8))  # of one token each: they are in the first pass
    assert passed == [(8, length)]


def test_an_llm_whose_past_cannot_be_kept_is_refused(tmp_path, monkeypatch):
    model = make_pair(tmp_path, "mt5", "llama")
    monkeypatch.setattr(model_likelihood, "growing_cache", lambda llm: {})
    inputs = batch(rows(), "left", with_target=False)
    with pytest.raises(ModelError, match="LlamaForCausalLM keeps its past in a way of its own"):
        model(**inputs, **as_tensors([[[5, 6], [8, 9]]] * 8))


# -- an evaluation


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llm, tiny_encoder):
    """Mappings of two bridges between the tiny models, by form: the model and the flags of its evaluation."""
    made = {}
    for form, bridge in (("soft", "mindmerger"), ("layalign", "layalign")):
        folder = tmp_path_factory.mktemp(form)
        torch.manual_seed(5)
        model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32, bridge=bridge)
        torch.nn.init.normal_(model.mapping.mlp.linear2.weight, std=0.5)
        for name, parameter in model.mapping.named_parameters():
            if name.startswith("gate"):
                torch.nn.init.constant_(parameter, 1.5)
        last = list(model.mapping.stages)[-1]
        model.config.task, model.config.stage, model.config.augmentation = "xnli", last, True
        model.save_pretrained(folder)
        made[form] = SimpleNamespace(model=model, flags=("--init_checkpoint", str(folder)))
    made["hard"] = SimpleNamespace(model=made["soft"].model, flags=(*made["soft"].flags, "--augmentation", "False"))
    alone = MindMerger.from_models(None, tiny_llm, torch.float32)
    made["llm_only"] = SimpleNamespace(model=alone, flags=("--llm_only", "--llm_path", tiny_llm))
    return made


@pytest.fixture
def evaluate(world, datas, tmp_path, monkeypatch, capsys):
    """Runs the command in this process, in a fresh folder; returns (stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, form="soft", data=datas):
        # In fp32 on every CPU: some would take bf16.
        given = ["--data_root", data, *world[form].flags, "--precision", "fp32", *arguments]
        assert main([str(part) for part in given]) == 0
        return capsys.readouterr()

    return call


def predictions(folder):
    """The lines of an evaluation's predictions, by id."""
    return {row["id"]: row for path in (folder / "predictions").glob("*.jsonl") for row in read_lines(path)}


def log_probs_by_hand(model, settings):
    """The log-probabilities of each example's labels, each by a whole pass with one row."""
    found = {}
    for i, example in enumerate(settings.examples):
        found[example.id] = {}
        inputs = answers.batch_inputs(model, settings.tokenizers, settings.columns, [i])
        for label in example.labels:
            ids = [*settings.tokenizers.llm(label, add_special_tokens=False)["input_ids"], settings.tokenizers.eos_id]
            target = {"target_ids": torch.tensor([ids]), "target_mask": torch.ones(1, len(ids), dtype=torch.long)}
            with torch.no_grad():
                found[example.id][label] = -model(**PLAIN | inputs | target).loss_sum.item()
    return found


def outcome(folder):
    """All bytes of a results folder but what depends on when, where and how often it was started."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    results = json.loads(files.pop("results.json"))
    for name in ("timing", "arguments", "command"):
        del results[name]
    return files, results


SUFFIX = {"soft": "", "hard": "-hard", "llm_only": "-llm_only", "layalign": ""}


@pytest.mark.parametrize("task", ["xnli", "x-csqa"])
@pytest.mark.parametrize("form", SUFFIX)
def test_the_chosen_label_is_the_likeliest_by_whole_passes(evaluate, world, tmp_path, datas, form, task):
    flags = (*CHOSEN, "--task", task, "--limit", "3")
    out, _ = evaluate(*flags, form=form)
    folder = tmp_path / f"results/MindMerger/{task}{SUFFIX[form]}-likelihood"
    results, rows = json.loads((folder / "results.json").read_text()), predictions(folder)
    given = ["--data_root", datas, *world[form].flags, *flags]
    settings = settle(build_parser().parse_args(given), on_gpu=False)
    expected = log_probs_by_hand(world[form].model, settings)
    assert rows.keys() == expected.keys() and len(rows) >= 6
    right = 0
    for id, row in rows.items():
        assert list(row["label_log_probs"]) == list(find_task(task).labels)
        assert row["label_log_probs"] == pytest.approx(expected[id], rel=1e-5)
        best = max(expected[id], key=expected[id].get)
        assert (row["output"], row["prediction"], row["correct"]) == (best, best, best == row["answer"])
        right += row["correct"]
    assert results["scoring"] == "likelihood" == results["identity"]["--scoring"]
    assert results["mean"]["accuracy"] == pytest.approx(100 * right / len(rows), abs=1e-3)
    assert results["counts"]["hit_limit"] == 0 and "likeliest label: accuracy in percent" in out
    if task == "x-csqa":  # of XNLI's labels a random LLM of bytes prefers the shortest
        assert len({row["prediction"] for row in rows.values()}) > 1, "one label for all shows little"


def test_the_prefix_of_another_question_changes_the_log_probabilities(evaluate, tmp_path):
    evaluate(*CHOSEN)
    evaluate(*CHOSEN, "--probe_prefix", "shuffled")
    root = tmp_path / "results/MindMerger"
    own, probed = (predictions(root / f"xnli{probe}-likelihood") for probe in ("", "-prefix_shuffled"))
    assert own.keys() == probed.keys()
    assert all(own[id]["label_log_probs"] != probed[id]["label_log_probs"] for id in own)


def test_rows_are_chosen_for_among_their_own_options_alone(evaluate, tmp_path):
    options = [option_row("ABCDE", "E"), option_row("BA", "A"), option_row("12", "2"), option_row("C", "C")]
    write_options(tmp_path / "data", options)
    flags = ("--task", "x-csqa", "--languages", "en", "--scoring", "likelihood")
    evaluate(*flags, data=tmp_path / "data")
    rows = predictions(tmp_path / "results/MindMerger/x-csqa-likelihood")
    assert [tuple(row["label_log_probs"]) for row in rows.values()] == [tuple("ABCDE"), ("B", "A"), ("1", "2"), ("C",)]
    assert all(row["prediction"] in row["label_log_probs"] for row in rows.values())
    assert rows["en-4"]["correct"]


def test_batches_change_nothing(evaluate, tmp_path):
    for name, flags in (("one", (1,)), ("nine", (9,)), ("tokens", (4, "--eval_max_tokens", 400))):
        evaluate(*FEW[:-1], *flags, "--scoring", "likelihood", "--results_dir", name)
    one, *others = (predictions(tmp_path / n / "MindMerger/xnli-likelihood") for n in ("one", "nine", "tokens"))
    for other in others:
        for id, row in one.items():
            assert row["label_log_probs"] == pytest.approx(other[id]["label_log_probs"], rel=1e-5)
            assert row["prediction"] == other[id]["prediction"]


def test_an_interrupted_choice_continues_to_the_same_bytes_and_mixes_with_no_answers(evaluate, tmp_path, monkeypatch):
    begun, real = [], likelihood.choose_labels

    def stopped(model, settings, batch):
        begun.append(batch)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return real(model, settings, batch)

    evaluate(*CHOSEN, "--results_dir", "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(likelihood, "choose_labels", stopped)
        evaluate(*CHOSEN, "--results_dir", "parts")
    folder = tmp_path / "parts/MindMerger/xnli-likelihood"
    assert not (folder / "results.json").exists()
    _, err = evaluate(*CHOSEN, "--results_dir", "parts")
    assert "continuing: 8 of 9 examples are finished" in err and "choosing labels for 1 answers" in err
    assert outcome(folder) == outcome(tmp_path / "whole/MindMerger/xnli-likelihood")
    folder.rename(folder.with_name("xnli"))
    with pytest.raises(UserError, match="finished evaluation with another .*then, .* now: pass --overwrite"):
        evaluate(*FEW, "--results_dir", "parts")
    evaluate(*FEW, "--results_dir", "other")
    results = json.loads((tmp_path / "other/MindMerger/xnli/results.json").read_text())
    assert results["identity"]["--scoring"] is None and "scoring" not in results


def test_a_finished_choice_is_extended_without_choosing_again(evaluate, tmp_path, datas, monkeypatch):
    more = ("--task", "x-csqa", "--languages", "en,sw,de", "--scoring", "likelihood", "--score_gold")
    evaluate(*more, "--results_dir", "whole")
    evaluate(*more, "--results_dir", "growing", "--languages", "sw", "--limit", "1")
    chosen, real = [], likelihood.choose_labels
    monkeypatch.setattr(
        likelihood, "choose_labels", lambda model, settings, batch: chosen.extend(batch) or real(model, settings, batch)
    )
    _, err = evaluate(*more, "--results_dir", "growing")
    whole, grown = (tmp_path / name / "MindMerger/x-csqa-likelihood" for name in ("whole", "growing"))
    assert "is extended: 1 answers are kept" in err and len(chosen) == len(predictions(whole)) - 1
    assert predictions(grown).keys() == predictions(whole).keys()
    for id, row in predictions(whole).items():
        assert predictions(grown)[id]["label_log_probs"] == pytest.approx(row["label_log_probs"], rel=1e-5)
    # Other labels for a row that is there are another evaluation.
    fewer = TASKS["x-csqa"]
    monkeypatch.setattr(type(fewer), "_example", relabelled(type(fewer)._example))
    with pytest.raises(UserError, match=r"another data \(sha256\)"):
        evaluate(*more, "--results_dir", "growing", "--languages", "en,sw,de,fr")


def relabelled(real):
    """The labels of every row in another order."""

    def example(*arguments):
        made = real(*arguments)
        return replace(made, labels=made.labels[::-1])

    return example


def test_gold_losses_are_the_same_whether_answers_are_generated_or_chosen(evaluate, tmp_path):
    evaluate(*FEW, "--score_gold", "--max_new_tokens", "2")
    out, _ = evaluate(*CHOSEN, "--score_gold")
    generated, chosen = (predictions(tmp_path / f"results/MindMerger/xnli{end}") for end in ("", "-likelihood"))
    for id, row in chosen.items():
        assert row["gold_loss"] == pytest.approx(generated[id]["gold_loss"], rel=1e-5)
        assert row["gold_tokens"] == generated[id]["gold_tokens"]
        assert row["gold_loss"] == -row["label_log_probs"][row["answer"]]
    assert "gold loss" in out


def test_comparisons_name_both_ways_to_an_answer(evaluate, tmp_path, capsys):
    evaluate(*FEW, "--max_new_tokens", "2")
    evaluate(*CHOSEN)
    folders = [str(tmp_path / "results/MindMerger" / name) for name in ("xnli", "xnli-likelihood")]
    main(["--compare", *folders])
    table = capsys.readouterr().out
    assert "(MindMerger-Soft (mapped source and prompt), likeliest label)" in table
    assert "Not all answers were found alike" in table
    made = [read_row("Soft", folder) for folder in folders]
    assert [row.label for row in made] == ["Soft", "Soft (likelihood)"]
    assert read_row("Soft, likelihood", folders[1]).label == "Soft, likelihood"
    assert any("Not all answers were found alike" in note for note in keep_common(made))
    assert not keep_common([read_row("A", folders[1]), read_row("B", folders[1])])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--task", "math"), "--scoring likelihood chooses among the labels of a task, and math_mgsm has none: leave"),
        (("--task", "xnli", "--engine", "vllm"), "--scoring likelihood needs the LLM's logits, which --engine vllm"),
    ],
)
def test_what_has_no_labels_or_no_logits_is_refused_in_one_line(world, datas, flags, message):
    given = [*world["soft"].flags, "--data_root", datas, "--scoring", "likelihood", *flags]
    with pytest.raises(UserError, match=message) as caught:
        settle(build_parser().parse_args(given), on_gpu=False)
    assert "\n" not in str(caught.value)


def test_labels_of_the_same_tokens_are_refused_and_so_is_an_answer_that_is_no_label(world, datas, monkeypatch):
    tokenizers = answers._cached_tokenizers(None, world["llm_only"].flags[2])
    assert encode_labels(tokenizers, [("a", "b"), ("b",)]).keys() == {"a", "b"}
    monkeypatch.setattr(tokenizers, "llm", lambda texts, **named: {"input_ids": [[7]] * len(texts)})
    with pytest.raises(UserError, match="the labels 'a' and 'b' are the same tokens"):
        encode_labels(tokenizers, [("a", "b"), ("b",)])
    monkeypatch.setitem(TASKS, "xnli", TASKS["xnli"].__class__(**vars(TASKS["xnli"]) | {"labels": ("yes", "no")}))
    given = [*world["soft"].flags, "--data_root", datas, *CHOSEN]
    with pytest.raises(UserError, match=r"the answer 'entailment' of en-1 is none of its labels \(yes, no\)"):
        settle(build_parser().parse_args(given), on_gpu=False)


def test_a_log_probability_that_is_not_a_number_names_the_weight_that_makes_it_so(world, evaluate, monkeypatch):
    def broken(settings, device):
        model = MindMerger.from_models(None, settings.llm_path, torch.float32)
        with torch.no_grad():
            model.llm.model.norm.weight[0] = float("nan")
        return model

    monkeypatch.setattr("run_evaluation.load_model", broken)
    with pytest.raises(UserError, match=r"llm\.model\.norm\.weight of the LLM .* has values that are NaN"):
        evaluate(*CHOSEN, form="llm_only")
