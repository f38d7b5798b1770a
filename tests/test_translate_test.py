"""Translate-test: what each family of translators is told, the file of translations, and the prompts over them."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, byte_tokenizer
from test_benchmarks import ROWS, put
from test_data import sentencepiece_model

import run_evaluation
from mindmerger.baselines import parallel_input, translate_test
from mindmerger.evaluation import results as evaluation_results
from mindmerger.evaluation.comparison import compare_results, read_row
from mindmerger.evaluation.translate_test import apply_translate_test
from mindmerger.generation import translator as generation_translator
from mindmerger.generation.translator import Limits, Translator, load_tags
from mindmerger.runtime.errors import UserError
from mindmerger.tasks import TASKS, find_task
from mindmerger.tasks.examples import evaluation_examples, varying_text
from mindmerger.tasks.languages import find_language
from mindmerger.tasks.math import math_prompt
from mindmerger.tasks.texts import fill_row, read_rows
from mindmerger.tasks.x_csqa import x_csqa_prompt
from mindmerger.tasks.xnli import xnli_prompt

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
PIECES = ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789,.?"]
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 1024, "init_std": 0.5}
BART |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
FAMILIES = ("nllb", "m2m100", "mbart50", "mbart", "madlad")


def tokenizer_of(family: str, folder):
    """Saves a small tokenizer of a family, with the tags of the real one."""
    scored = [(piece, 0.0 if piece in SPECIAL else -2.0) for piece in SPECIAL + PIECES]
    if family == "nllb":
        made = transformers.NllbTokenizer(vocab={piece: i for i, piece in enumerate(SPECIAL + PIECES)}, merges=[])
    elif family == "m2m100":
        import sentencepiece

        model = sentencepiece_model(folder.with_name("spm"))
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        vocabulary = SPECIAL + [processor.id_to_piece(i) for i in range(3, processor.get_piece_size())]
        vocab = folder.with_name("spm") / "vocab.json"
        vocab.write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
        made = transformers.M2M100Tokenizer(vocab_file=str(vocab), spm_file=str(model))
    elif family == "madlad":
        byte_tokenizer(folder, {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}, "$A </s>")
        made = transformers.AutoTokenizer.from_pretrained(folder)
        made.add_tokens(["<2en>", "<2de>"])
    else:
        made = (transformers.MBart50Tokenizer if family == "mbart50" else transformers.MBartTokenizer)(vocab=scored)
    made.save_pretrained(folder)


def make_translator(family: str, folder, seed=0) -> str:
    """A random sequence-to-sequence model with a family's tokenizer, as an ordinary model folder."""
    folder.mkdir(parents=True)
    tokenizer_of(family, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    # Codes of M2M100 have ids behind the vocabulary that `len` counts.
    size = max(len(tokenizer), tokenizer.convert_tokens_to_ids("__en__") + 200 if family == "m2m100" else 0)
    if family == "madlad":
        config = transformers.T5Config(
            vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        model = transformers.T5ForConditionalGeneration(config)
    else:
        name = "MBart" if family.startswith("mbart") else "M2M100"
        config = getattr(transformers, f"{name}Config")(vocab_size=size, **BART)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    # Logits are products with these rows: a model whose tags and ends are short writes words.
    words = [i for i in range(size) if re.fullmatch(r"[^<>_]+", tokenizer.convert_ids_to_tokens(i) or "<>")]
    for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        with torch.no_grad():
            weight[[i for i in range(size) if i not in words]] *= 0.1
    # What the hub's folders ask for, and no flag here: five beams, and a limit of their own.
    model.generation_config.num_beams, model.generation_config.max_length = 5, 200
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def translators(tmp_path_factory):
    """Returns a function that gives the folder of a family's translator."""
    root, made = tmp_path_factory.mktemp("translators"), {}

    def folder_of(family: str) -> str:
        if family not in made:
            made[family] = make_translator(family, root / family / "model")
        return made[family]

    return folder_of


@pytest.fixture
def translate(translators, datas, tmp_path):
    """Runs the command in this process; returns the lines of the file that it leaves."""

    def call(*flags, folder="t", translator=None, languages="sw,de", task="math"):
        given = ["--task", task, "--data_root", datas, "--languages", languages, "--output_dir", str(tmp_path / folder)]
        given += ["--translator", translator or translators("nllb"), "--max_new_tokens", "12", "--batch_size", "3"]
        given += ["--max_seq_len", "200", "--precision", "fp32"]  # on every CPU: some would take bf16
        assert translate_test.main([*given, *map(str, flags)]) == 0
        return lines_of(tmp_path / folder / "translations.jsonl")

    return call


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def rows_of(task: str, root, code: str):
    return list(read_rows(find_task(task), root, find_language(code)))


def loaded(translators, family: str, **changes) -> Translator:
    path, limits = (
        translators(family),
        Limits(**{"max_seq_len": 64, "max_new_tokens": 9, "batch_size": 4, "num_beams": 1} | changes),
    )
    tokenizer, tags = load_tags(path, False, [find_language("de"), find_language("fr")])
    return Translator(path, tokenizer, tags, limits, torch.float32, "cpu")


# -- what a translator is told


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_told_both_languages_in_its_own_way(translators, monkeypatch, family):
    made = loaded(translators, family)
    seen = []
    generate = made.model.generate

    def watched(**arguments):
        ids = generate(**arguments)
        seen.append((arguments["input_ids"].tolist(), ids.tolist()))
        return ids

    monkeypatch.setattr(made.model, "generate", watched)
    sources, tokens = [], made.tokenizer.convert_ids_to_tokens
    for code in ("de", "fr"):
        language = find_language(code)
        made.translate(["abc", "abcd de"], language)
        (given, ids), _ = seen[-1], seen.clear()
        given = [[one for one in row if one != made.tokenizer.pad_token_id] for row in given]
        ends = {(tokens(row[0]), tokens(row[-1]), tokens(row[-2])) for row in given}
        sources.append(ends)
        first, second = {tokens(row[0]) for row in ids}, {tokens(row[1]) for row in ids}
        if family in ("nllb", "m2m100", "mbart50"):
            tag = {"nllb": language.nllb, "m2m100": f"__{language.m2m100}__", "mbart50": language.mbart}[family]
            assert {(a, b) for a, b, _ in ends} == {(tag, "</s>")}
            assert first == {"</s>"} and second == {
                {"nllb": "eng_Latn", "m2m100": "__en__", "mbart50": "en_XX"}[family]
            }
        elif family == "mbart":
            assert {(b, c) for _, b, c in ends} == {(language.mbart, "</s>")}
            assert first == {"en_XX"}
        else:
            assert {a for a, _, _ in ends} == {"<2en>"} and first == {"<pad>"}
    # MADLAD is not told where a text comes from; the others are.
    assert (sources[0] == sources[1]) == (family == "madlad")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_translation_is_the_models_own_greedy_choice_without_its_tags(translators, family):
    made = loaded(translators, family)
    texts = ["a b", "abcdefgh", "", "12 plus 3?"]
    [*found] = made.translate(texts, find_language("de"))
    for text, one in zip(texts, found, strict=True):
        if family != "madlad":
            made.tokenizer.src_lang = {"nllb": "deu_Latn", "m2m100": "de"}.get(family, "de_DE")
        inputs = made.tokenizer([("<2en> " if family == "madlad" else "") + text], return_tensors="pt")
        start = {"mbart": made.tokenizer.convert_tokens_to_ids("en_XX"), "madlad": 0}.get(family, 2)
        tag = {"nllb": "eng_Latn", "m2m100": "__en__", "mbart50": "en_XX"}.get(family)
        ids = [start, *([made.tokenizer.convert_tokens_to_ids(tag)] if tag else [])]
        first, end = len(ids), made.tokenizer.eos_token_id
        while len(ids) < 1 + made.limits.max_new_tokens and end not in ids[first:]:
            if len(ids) == made.limits.max_new_tokens and family.startswith("mbart"):
                ids.append(end)  # as mBART's config asks for
                break
            logits = made.model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                decoder_input_ids=torch.tensor([ids]),
            ).logits
            ids.append(int(logits[0, -1].argmax()))
        assert one.text == made.tokenizer.decode(ids[first:], skip_special_tokens=True).strip()
        assert one.hit_limit == (len(ids) == 1 + made.limits.max_new_tokens)
    assert len({one.text for one in found}) > 1


def test_beams_are_asked_for_by_the_flag_and_not_by_the_folder(translators):
    one, three = loaded(translators, "nllb"), loaded(translators, "nllb", num_beams=3)
    assert one.model.generation_config.num_beams == 5
    assert (one.generation.num_beams, three.generation.num_beams) == (1, 3)
    german = find_language("de")
    assert [len(found) for found in (one.translate(["ab"], german), three.translate(["ab"], german))] == [1, 1]


def test_a_text_over_the_limit_is_truncated_and_says_so(translators):
    made = loaded(translators, "nllb", max_seq_len=6)
    found = made.translate(["abc", "abcdefghijkl", "abc"], find_language("de"))
    assert [one.truncated for one in found] == [False, True, False] and found[0] == found[2]


def test_what_cannot_translate_is_refused_in_one_line_before_weights_load(
    translate, translators, tiny_llm, tiny_encoder, tmp_path, monkeypatch
):
    monkeypatch.setattr(generation_translator, "Translator", None)
    untagged = "takes no language tags that are known here, those of NLLB, M2M100, mBART or MADLAD-400: pass --untagged"
    for message, flags in {
        "is a llama model, which is no sequence-to-sequence model": {"translator": tiny_llm},
        untagged: {"translator": tiny_encoder},
        "has no code for Telugu: leave it out with --languages": {
            "translator": translators("m2m100"),
            "languages": "te,de",
        },
        "names English only": {"languages": "en"},
        "no model folder ./absent": {"translator": "./absent"},
        "task translation has no evaluation set": {"task": "translation"},
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            translate(**flags)
        assert "\n" not in str(caught.value)
    for family in ("nllb", "madlad"):
        with pytest.raises(UserError, match="takes language tags, without which it may write any language"):
            translate("--untagged", translator=translators(family))
    with pytest.raises(
        UserError, match="a translation of --max_new_tokens needs 1025 positions but .* has 1024: lower"
    ):
        translate("--max_new_tokens", 1024)
    assert not (tmp_path / "t").exists()


def test_a_model_that_knows_no_tags_translates_when_it_is_said_to(translate, tiny_encoder):
    lines = translate("--untagged", translator=tiny_encoder)
    assert len(lines) == 8 and {line["language"] for line in lines} == {"en"}


# -- prompts


def test_math_and_xnli_prompts_are_the_template_over_the_translated_texts(datas):
    for task in ("math_mgsm", "math_msvamp"):
        for row in rows_of(task, datas, "sw"):
            assert row.texts == {"": varying_text(row.example)}
            built = fill_row(find_task(task), row, {"": "How many?"})
            assert (built.prompt, built.shrinkable) == math_prompt("How many?")
            assert (built.id, built.source, built.target) == (row.example.id, row.example.source, row.example.target)
    for row in rows_of("xnli", datas, "th"):
        built = fill_row(find_task("xnli"), row, {"": "A man.", "sentence2": "A dog."})
        assert (built.prompt, built.shrinkable) == xnli_prompt("A man.", "A dog.")
        assert built.source == row.example.source == row.example.prompt


def test_x_csqa_options_are_translated_each_and_keep_their_letters_in_both_layouts(datas, tmp_path):
    source = ROOT / datas / "evaluation/x-csqa/de/dev.jsonl"
    records = [json.loads(line) for line in source.read_text("utf-8").splitlines()]
    for record in records:
        choices = record["question"]["choices"]
        record["question"]["choices"] = {name: [one[name] for one in choices] for name in ("label", "text")}
    (tmp_path / "evaluation/x-csqa/de").mkdir(parents=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "evaluation/x-csqa/de/dev.jsonl").write_text(lines)
    task = find_task("x-csqa")
    for root in (datas, tmp_path):
        for row, record in zip(rows_of("x-csqa", root, "de"), records, strict=True):
            texts = record["question"]["choices"]["text"]
            assert list(row.texts.values()) == [record["question"]["stem"], *texts]
            built = fill_row(task, row, {field: f"T({text})" for field, text in row.texts.items()})
            choices = [(label, f"T({text})") for label, text in zip("ABCDE", texts, strict=True)]
            assert (built.prompt, built.shrinkable) == x_csqa_prompt(f"T({record['question']['stem']})", choices)
            assert built.target == record["answerKey"]


def test_every_benchmark_says_which_of_its_texts_are_translated_the_question_first(datas, tmp_path):
    """One that says too little is answered half in its own language, and nobody sees it."""
    translated = {
        "xcopa": "T(0)\nWhat was the cause of this?\nOptions:A. T(1)\tB. T(2)\nAnswer:",
        "belebele": "T(0)\nT(1)\nOptions:A. T(2)\tB. T(3)\tC. T(4)\tD. T(5)\nAnswer:",
        "afrixnli": "Premise: T(0)\nHypothesis: T(1)\nLabel:",
        "americas_nli": "Premise: T(0)\nHypothesis: T(1)\nLabel:",
        "math_mgsm_rev2": math_prompt("T(0)")[0],
        "math_afrimgsm": math_prompt("T(0)")[0],
    }
    for name, prompt in translated.items():
        put(tmp_path, name, "Bribri" if name == "americas_nli" else "Swahili", ROWS.get(name, "Ngapi?\t3"))
        [row] = rows_of(name, tmp_path, "bzd" if name == "americas_nli" else "sw")
        built = fill_row(find_task(name), row, {field: f"T({i})" for i, field in enumerate(row.texts)})
        assert built.prompt == prompt and built.labels == row.example.labels
    for name in ("math_mgsm", "math_msvamp", "x-csqa", "xnli", *translated):
        root, code = (tmp_path if name in translated else datas), ("bzd" if name == "americas_nli" else "sw")
        for row in rows_of(name, root, code):
            assert row.texts[""] == varying_text(row.example)
            # With its own texts a row is itself: nothing is lost on the way, and nothing added.
            assert fill_row(find_task(name), row, row.texts) == row.example
    # Of these the translation is the answer itself.
    assert {name for name, task in TASKS.items() if not task.text_fields} == {"translation", "flores"}


# -- the file of translations


def test_the_command_leaves_a_line_for_every_text_and_a_record(translate, translators, datas, tmp_path):
    lines = translate(task="xnli", languages="sw,en,th")
    rows = [row for code in ("sw", "th") for row in rows_of("xnli", datas, code)]
    wanted = [(row.example.id, field, text) for row in rows for field, text in row.texts.items()]
    assert [(line["id"], line.get("field", ""), line["source"]) for line in lines] == wanted
    assert {line["language"] for line in lines} == {"en"} and {line["source_language"] for line in lines} == {
        "sw",
        "th",
    }
    record = json.loads((tmp_path / "t/translations.json").read_text())
    assert record["task"] == "xnli" and record["languages"] == ["sw", "th"]
    assert record["counts"]["texts"] == len(lines)
    assert record["counts"]["hit_limit"] == sum("hit_limit" in line for line in lines)
    expected = {"path": translators("nllb"), "num_beams": 1, "precision": "fp32", "untagged": False}
    assert expected.items() <= record["translator"].items() and len(record["translator"]["fingerprint"]) == 16
    assert {path.name for path in (tmp_path / "t").iterdir()} == {"translations.jsonl", "translations.json"}
    made = loaded(translators, "nllb", max_seq_len=200, max_new_tokens=12, batch_size=1)
    for line in lines[:4]:
        [alone] = made.translate([line["source"]], find_language("sw"))
        assert line["text"] == (alone.text or line["source"])


def test_a_killed_translation_continues_and_leaves_the_same_file(translate, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(translate_test, "CHUNK", 2)
    translate(folder="whole", task="x-csqa")
    append, calls = evaluation_results.append_records, []

    def killed(shard, records):
        calls.append(len(records))
        if len(calls) == 3:
            # As a kill leaves it: a part of the chunk, and its last line cut short.
            text = "".join(json.dumps(record) + "\n" for record in records)
            shard.write(text[: len(text) // 2].encode())
            raise KeyboardInterrupt
        append(shard, records)

    monkeypatch.setattr(evaluation_results, "append_records", killed)
    with pytest.raises(KeyboardInterrupt):
        translate(task="x-csqa")
    assert not (tmp_path / "t/translations.jsonl").exists()
    with pytest.raises(UserError, match="holds neither translations.jsonl, as .* leaves it when it has finished"):
        apply_translate_test(find_task("x-csqa"), "", [], str(tmp_path / "t"))
    monkeypatch.setattr(evaluation_results, "append_records", append)
    translated = []
    own = Translator.translate
    monkeypatch.setattr(
        Translator, "translate", lambda self, texts, one: translated.append(one) or own(self, texts, one)
    )
    translate(task="x-csqa")
    # Two of four chunks of two rows were whole: both of Swahili.
    assert [language.code for language in translated] == ["de", "de"]
    assert (tmp_path / "t/translations.jsonl").read_bytes() == (tmp_path / "whole/translations.jsonl").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(generation_translator, "Translator", None)
    translate(task="x-csqa")
    assert "holds these translations already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_killed_while_it_translates_has_lost_a_chunk_at_most(translate, translators, datas, tmp_path):
    languages, slow = "sw,de,fr,es,ru,zh", ("--max_new_tokens", 300)
    translate(*slow, folder="whole", languages=languages)
    flags = ["--task", "math", "--data_root", datas, "--languages", languages, "--output_dir", str(tmp_path / "t")]
    flags += ["--translator", translators("nllb"), "--max_seq_len", "200", "--batch_size", "3", *map(str, slow)]
    flags += ["--precision", "fp32"]
    command = [sys.executable, "-m", "mindmerger.baselines.translate_test", *flags]
    unfinished = tmp_path / "t/unfinished.jsonl"
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (unfinished.exists() and unfinished.stat().st_size):
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "t/translations.jsonl").exists()
    kept = lines_of(unfinished)
    lines = translate(*slow, languages=languages)
    assert 4 <= len(kept) < len(lines) == 24 and lines[: len(kept)] == kept
    assert (tmp_path / "t/translations.jsonl").read_bytes() == (tmp_path / "whole/translations.jsonl").read_bytes()


def test_more_rows_and_languages_are_added_to_what_is_there(translate, monkeypatch):
    first = translate("--limit", 2, languages="sw")
    translated = []
    own = Translator.translate
    monkeypatch.setattr(
        Translator, "translate", lambda self, texts, one: translated.append(one.code) or own(self, texts, one)
    )
    lines = translate("--limit", 2, languages="de")
    assert translated == ["de"] and [line for line in lines if line["source_language"] == "sw"] == first
    assert len(translate(languages="sw,de")) == 8 and translated == ["de", "sw", "de"]


def test_translations_of_another_model_or_setting_are_not_mixed_with_these(
    translate, translators, tmp_path, monkeypatch
):
    before = translate()
    other = make_translator("nllb", tmp_path / "other" / "model", seed=3)
    for message, call in {
        "another fingerprint": lambda: translate(translator=other),
        "another num_beams: 1 then, 2 now: pass --overwrite to start over": lambda: translate("--num_beams", 2),
        "another task: math_mgsm then, xnli now": lambda: translate(task="xnli"),
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    # Moved elsewhere it is the same model.
    moved = tmp_path / "moved"
    shutil.copytree(translators("nllb"), moved)
    assert translate(translator=str(moved)) == before
    after = translate("--overwrite", translator=other)
    assert after != before
    (tmp_path / "t/translations.json").unlink()
    with pytest.raises(UserError, match="holds translations without translations.json: pass --overwrite"):
        translate()
    # A model that did not load leaves its record, and does not keep the next one out.
    with monkeypatch.context() as patched:
        patched.setattr(generation_translator, "Translator", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            translate("--num_beams", 2, folder="new")
    assert translate(translator=other, folder="new") == after


def test_a_row_whose_text_has_changed_is_translated_again(translate, datas, tmp_path, monkeypatch):
    shutil.copytree(f"{datas}/evaluation/mgsm", tmp_path / "own/evaluation/mgsm")
    before = translate("--data_root", tmp_path / "own", languages="sw")
    file = tmp_path / "own/evaluation/mgsm/mgsm_sw.tsv"
    lines = file.read_text("utf-8").splitlines()
    file.write_text("\n".join([lines[0], "abc de fg\t3", *lines[2:]]) + "\n", "utf-8")
    examples = evaluation_examples(find_task("math"), tmp_path / "own", find_language("sw"))
    with pytest.raises(UserError, match="translation of item sw-2 was made of another text than the test set now has"):
        apply_translate_test(find_task("math"), tmp_path / "own", examples, str(tmp_path / "t"))
    after = translate("--data_root", tmp_path / "own", languages="sw")
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True, True]
    assert after[1]["source"] == "abc de fg"


def test_a_text_for_which_the_model_writes_nothing_stays_and_is_counted(translate, tmp_path, monkeypatch, capsys):
    def nothing(self, texts, language):
        return [generation_translator.Translation("" if i == 1 else "one", False, False) for i in range(len(texts))]

    monkeypatch.setattr(Translator, "translate", nothing)
    lines = translate(languages="sw")
    assert lines[1]["text"] == lines[1]["source"] and lines[1]["untranslated"] and lines[0]["text"] == "one"
    assert json.loads((tmp_path / "t/translations.json").read_text())["counts"]["untranslated"] == 1
    assert "warning: 1 of 4 texts stay untranslated" in capsys.readouterr().err


def test_parallel_input_reads_the_same_file(translate, datas, tmp_path, capsys):
    lines = translate(task="xnli", languages="sw")
    file = tmp_path / "t/translations.jsonl"
    flags = ["--task", "xnli", "--data_root", datas, "--languages", "sw", "--parallel_input", "1"]
    flags += ["--parallel_languages", "en", "--translations", str(file), "--show", "1"]
    capsys.readouterr()
    assert parallel_input.main(flags) == 0
    assert f"[English] {' '.join(lines[0]['text'].splitlines())}\nHypothesis: " in capsys.readouterr().out


# -- through the evaluation


@pytest.fixture
def evaluate(datas, tiny_llm, tmp_path, capsys):
    def call(*flags, task="math", languages="sw,de,en"):
        given = ["--llm_only", "--llm_path", tiny_llm, "--data_root", datas, "--task", task, "--languages", languages]
        given += ["--max_new_tokens", "4", "--results_dir", str(tmp_path / "results"), "--precision", "fp32"]
        assert run_evaluation.main([*given, *map(str, flags)]) == 0
        return capsys.readouterr()

    return call


def test_the_llm_reads_the_translations_and_results_say_that_a_machine_made_them(evaluate, translate, tmp_path):
    lines = translate()
    evaluate()
    out, _ = evaluate("--translate_test", tmp_path / "t")
    assert "LLM alone, translate-test (machine): translations into English in the prompt" in out
    assert "published" not in out
    root = tmp_path / "results/MindMerger"
    own, folder = root / "math_mgsm-llm_only", root / "math_mgsm-translate_test"
    results = json.loads((folder / "results.json").read_text())
    record = json.loads((tmp_path / "t/translations.json").read_text())
    assert results["translate_test"] == {
        "name": "translate-test (machine)",
        "translations": "machine",
        "source": str(tmp_path / "t"),
        "languages": ["Swahili", "German"],
        "translator": record["translator"],
    }
    assert results["identity"]["--translate_test"] == "machine" and results["form"] == "llm_only"
    assert "translate_test" not in json.loads((own / "results.json").read_text())
    for name in ("Swahili", "German"):
        rows, before = (lines_of(one / f"predictions/{name}.jsonl") for one in (folder, own))
        texts = {line["id"]: line["text"] for line in lines}
        for row, other in zip(rows, before, strict=True):
            assert row["prompt"] == math_prompt(texts[row["id"]])[0]
            assert [row[key] for key in ("id", "source", "answer")] == [
                other[key] for key in ("id", "source", "answer")
            ]
    english = [(one / "predictions/English.jsonl").read_bytes() for one in (folder, own)]
    assert english[0] == english[1]
    assert read_row("T", str(folder)).label == "T (machine)"
    assert "translate-test (machine)" in compare_results([str(own), str(folder)])


def test_a_finished_run_over_other_translations_is_not_taken_for_this_one(evaluate, translate, tmp_path):
    translate()
    flags = ("--translate_test", tmp_path / "t/translations.jsonl")
    evaluate(*flags)
    _, err = evaluate(*flags)
    assert "nothing is generated" in err
    lines = lines_of(tmp_path / "t/translations.jsonl")
    lines[0]["text"] = "another text"
    (tmp_path / "t/translations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="finished evaluation of other rows, the data have changed: prompt of sw-1"):
        evaluate(*flags)


def test_missing_translations_are_refused_with_their_number_and_the_first(evaluate, datas, tmp_path, monkeypatch):
    monkeypatch.setattr(run_evaluation, "load_model", None)
    rows = rows_of("xnli", datas, "sw")
    lines = [{"id": row.example.id, "language": "en", "text": "A man."} for row in rows]
    lines += [{"id": rows[0].example.id, "language": "en", "field": "sentence2", "text": "A dog."}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    message = r"t.jsonl: 2 of 3 items have no translation into English, the first is sw-2 \(sentence2\): translate them"
    with pytest.raises(UserError, match=message) as caught:
        evaluate("--translate_test", tmp_path / "t.jsonl", task="xnli", languages="sw,en")
    assert "\n" not in str(caught.value) and not (tmp_path / "results").exists()
    # English alone has nothing to translate.
    (tmp_path / "t.jsonl").write_text(json.dumps(lines[0] | {"language": "fr"}) + "\n")
    with pytest.raises(UserError, match=r"3 of 3 items have no translation into English, the first is sw-1: "):
        evaluate("--translate_test", tmp_path / "t.jsonl", task="xnli", languages="sw")


def test_wrong_flags_and_files_are_one_line_before_any_model_loads(datas, tiny_llm, tmp_path, monkeypatch):
    monkeypatch.setattr(run_evaluation, "load_model", None)
    (tmp_path / "t.jsonl").write_text('{"id": "sw-1", "language": "en", "text": "x"}\n' * 2)
    (tmp_path / "empty").mkdir()
    for message, flags in {
        "--translate_test is for the LLM alone, pass --llm_only too": ["--translate_test", "t"],
        "without --parallel_input: leave that out": [
            *("--llm_only", "--translate_test", "t", "--parallel_input", "1", "--translations", "aligned")
        ],
        "t.jsonl:2: item sw-1 has a second translation into English": [
            *("--llm_only", "--translate_test", str(tmp_path / "t.jsonl"))
        ],
        "no file .*absent.jsonl": ["--llm_only", "--translate_test", str(tmp_path / "absent.jsonl")],
        "empty holds neither translations.jsonl": ["--llm_only", "--translate_test", str(tmp_path / "empty")],
    }.items():
        given = [
            "--llm_path",
            tiny_llm,
            "--data_root",
            datas,
            "--languages",
            "sw",
            "--results_dir",
            str(tmp_path / "r"),
        ]
        with pytest.raises(UserError, match=message) as caught:
            run_evaluation.main([*given, *flags])
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "r").exists()


# -- a data set of the hub


@pytest.fixture
def hub(datas, tmp_path):
    """A clone in the form of masakhane/afrimgsm-translate-test: a head, quoted texts, the answer beside its number."""
    rows = rows_of("math", datas, "sw")
    texts = ['He said: "two"', "A pen costs 3,\nhow much?", "\tThree?", "Four?"]
    file = tmp_path / "afrimgsm-translate-test/data/swa/test.tsv"
    file.parent.mkdir(parents=True)
    with open(file, "w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, delimiter="\t")
        writer.writerow(["question", "answer", "answer_number", "equation_solution"])
        for row, text in zip(rows, texts, strict=True):
            writer.writerow([text, "", row.example.target, ""])
    return SimpleNamespace(folder=tmp_path / "afrimgsm-translate-test", file=file, texts=texts)


def test_rows_of_the_hub_are_read_by_number_and_checked_by_their_answers(hub, datas):
    task = find_task("math")
    examples = evaluation_examples(task, datas, find_language("sw"))
    built, record = apply_translate_test(task, datas, examples, str(hub.folder))
    assert [one.prompt for one in built] == [math_prompt(text.strip())[0] for text in hub.texts]
    assert [(one.id, one.target) for one in built] == [(one.id, one.target) for one in examples]
    assert record["translator"] is None and record["translations"] == "machine"
    german = evaluation_examples(task, datas, find_language("de"))
    with pytest.raises(UserError, match="4 of 8 items have no translation into English, the first is de-1: "):
        apply_translate_test(task, datas, [*examples, *german], str(hub.folder))
    lines = hub.file.read_text("utf-8").splitlines(keepends=True)
    hub.file.write_text("".join([lines[0], *lines[2:]]), "utf-8")
    with pytest.raises(UserError, match=r"row 1 has the answer '.*' but sw-1 has '.*': they are not the same item"):
        apply_translate_test(task, datas, examples, str(hub.folder))
    hub.file.write_text("text\tanswer\nA\t1\n", "utf-8")
    with pytest.raises(UserError, match="needs the columns question and answer_number, it has: text, answer"):
        apply_translate_test(task, datas, examples, str(hub.folder))


# -- the comparison of all methods


def compare(tmp_path, **given):
    """Calls of compare_all.sh with a stand-in for python that notes them down."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    # It lacks no package, and knows the task's name.
    known = "[[ $* == *safetensors* ]] && exit; [[ $1 == -c ]] && echo math_mgsm && exit"
    python.write_text(f'#!/bin/bash\n{known}; echo "$*" >>{tmp_path}/calls\n')
    python.chmod(0o755)
    (tmp_path / "calls").unlink(missing_ok=True)
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "LLM_PATH": "expert", "RESULTS_DIR": str(tmp_path / "r")}
    command = ["bash", str(ROOT / "scripts" / "compare_all.sh"), *given.pop("arguments", ())]
    done = subprocess.run(command, env=environment | given, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *calls, table = (tmp_path / "calls").read_text().splitlines()
    return [call for call in calls if "translate_test" in call], table


def test_the_comparison_translates_what_it_evaluates(tmp_path):
    row = f"--row translate-test (machine)={tmp_path}/r/compare/translate-test/math_mgsm-translate_test"
    made, table = compare(
        tmp_path,
        TRANSLATOR="nllb",
        LANGUAGES="sw,th",
        DATA_ROOT="d",
        TRANSLATOR_ARGS="--num_beams 4",
        arguments=["--limit", "5"],
    )
    folder = f"{tmp_path}/r/translations/math_mgsm"
    expected = f"-m mindmerger.baselines.translate_test --task math_mgsm --translator nllb --output_dir {folder}"
    assert made[0] == f"{expected} --data_root d --languages sw,th --limit 5 --num_beams 4"
    assert made[1].endswith(f"--llm_only --llm_path expert --translate_test {folder} --limit 5")
    assert len(made) == 2 and row in table
    # Translations that are there already, as such or as those of parallel input.
    made, table = compare(tmp_path, TRANSLATE_TEST="made", TRANSLATOR="nllb")
    assert len(made) == 1 and made[0].endswith("--translate_test made") and row in table
    made, table = compare(tmp_path, TRANSLATIONS="t.jsonl")
    assert len(made) == 1 and made[0].endswith("--translate_test t.jsonl") and row in table
    made, table = compare(tmp_path)
    assert not made
    assert "--missing translate-test (machine)=neither TRANSLATOR nor TRANSLATE_TEST is given" in table
