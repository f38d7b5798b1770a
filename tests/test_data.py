"""Tokenising, the cache of the tokenised training set, batch order, and collation."""

import hashlib
import itertools
import json
import os
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import multiprocess
import numpy as np
import pytest
from conftest import SHIPPED, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from mindmerger.data import tokenising, training_set
from mindmerger.data.batches import (
    MICRO_BATCH_COST,
    automatic_dev_size,
    collate,
    epoch_batches,
    split_dev,
    split_global_batch,
)
from mindmerger.data.tokenising import (
    Tokenizers,
    _tokenizer_identity,
    load_tokenizers,
    source_language_code,
    tokenise,
)
from mindmerger.data.training_set import open_or_build
from mindmerger.generation.answers import tokenise_inputs
from mindmerger.tasks import find_task, math
from mindmerger.tasks.base import Example
from mindmerger.tasks.examples import StageData, read_by_encoder
from mindmerger.tasks.languages import LANGUAGES, Language, find_language, parse_languages
from mindmerger.tasks.readers import DataError

DATAS = Path(__file__).parent / "data" / "datas"
END = "\n\n### Response: Let's think step by step."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of an encoder tokenizer (`$A </s>`) and an LLM tokenizer (BOS, EOS, no pad)."""
    root = tmp_path_factory.mktemp("tokenizers")
    byte_tokenizer(root / "mt", {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}, "$A </s>")
    byte_tokenizer(root / "llm", {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, "<s> $A")
    return str(root / "mt") + "/", str(root / "llm")


@pytest.fixture
def tokenizers(folders):
    return load_tokenizers(*folders)


def error_of(call) -> str:
    with pytest.raises(DataError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def math_example(query="How many?", target="It is 3.", language="German"):
    prompt, shrinkable = find_task("math").format_query(query)
    return Example("x-1", language, query, prompt, target, shrinkable)


LIMITS = {"max_seq_len": 512, "max_gen_len": 512, "with_prompt": True}


# ---------------------------------------------------------------------------------------------------------------------
# Loading tokenizers


def test_pad_falls_back_to_eos_and_missing_bos_is_fine(tmp_path, folders):
    loaded = load_tokenizers(*folders)
    assert (loaded.encoder_pad_id, loaded.bos_id, loaded.eos_id, loaded.llm_pad_id) == (0, 1, 2, 2)
    byte_tokenizer(tmp_path / "llm", {"eos_token": "</s>"})
    assert load_tokenizers(None, tmp_path / "llm").bos_id is None


def test_llm_tokenizer_without_eos_is_refused(tmp_path):
    byte_tokenizer(tmp_path / "llm", {"unk_token": "<unk>"})
    assert "EOS" in error_of(lambda: load_tokenizers(None, str(tmp_path / "llm")))


@pytest.mark.parametrize("config", [{"model_type": "mt5"}, {"model_type": "llama"}, {}, None])
def test_folder_without_tokenizer_is_refused(tmp_path, config):
    """transformers makes an empty T5 tokenizer out of a bare config.json and says nothing."""
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert "--mt_path" in error_of(lambda: load_tokenizers(str(tmp_path), None))


def test_missing_folder_and_damaged_tokenizer_are_refused(tmp_path, folders):
    assert "no folder" in error_of(lambda: load_tokenizers(str(tmp_path / "nowhere"), None))
    shutil.copytree(folders[0], tmp_path / "mt")
    text = (tmp_path / "mt/tokenizer.json").read_text()
    (tmp_path / "mt/tokenizer.json").write_text(text[: len(text) // 2])
    assert "cannot load the tokenizer" in error_of(lambda: load_tokenizers(str(tmp_path / "mt"), None))


# ---------------------------------------------------------------------------------------------------------------------
# Tokenising


def test_segments_keep_encoder_specials_and_only_targets_end_in_eos(tokenizers):
    example = math_example()
    columns = tokenise(tokenizers, [example], with_target=True, **LIMITS)
    plain = {
        name: tokenizer(text, add_special_tokens=False)["input_ids"]
        for name, tokenizer, text in (
            ("source", tokenizers.encoder, example.source),
            ("prompt", tokenizers.llm, example.prompt),
            ("target", tokenizers.llm, example.target),
        )
    }
    assert columns["encoder_ids"] == [plain["source"] + [tokenizers.encoder.eos_token_id]]
    assert columns["prompt_ids"] == [plain["prompt"]]
    assert columns["target_ids"] == [plain["target"] + [tokenizers.eos_id]]
    assert not any(columns[name][0] for name in ("source_cut", "prompt_cut", "target_cut"))


def test_what_is_not_asked_for_stays_empty(tokenizers):
    limits = LIMITS | {"with_prompt": False}
    columns = tokenise(tokenizers, [math_example()], with_target=False, with_source=False, **limits)
    assert columns["encoder_ids"] == columns["prompt_ids"] == columns["target_ids"] == [[]]


def test_cut_source_keeps_the_encoders_end_token(tokenizers):
    columns = tokenise(tokenizers, [math_example("a" * 50)], with_target=False, **LIMITS | {"max_seq_len": 10})
    (ids,) = columns["encoder_ids"]
    assert len(ids) == 10 and ids[-1] == tokenizers.encoder.eos_token_id and columns["source_cut"] == [True]


def test_target_that_does_not_fit_with_eos_is_cut_without_one(tokenizers):
    for length, has_eos in ((9, True), (10, False), (11, False)):
        example = math_example(target="a" * length)
        limits = LIMITS | {"max_gen_len": 10, "with_prompt": False}
        columns = tokenise(tokenizers, [example], with_target=True, **limits)
        (ids,) = columns["target_ids"]
        assert len(ids) == 10 and (ids[-1] == tokenizers.eos_id) is has_eos
        assert columns["target_cut"] == [not has_eos]


@pytest.mark.parametrize("query", ["word " * 200, "字" * 200, "é" * 3000])
def test_long_prompt_loses_the_querys_end_and_never_the_templates(tokenizers, query):
    """Cutting on the right dropped "### Response:", so the LLM no longer knew that it should answer."""
    for max_gen_len in (180, 200, 300):
        limits = LIMITS | {"max_gen_len": max_gen_len}
        columns = tokenise(tokenizers, [math_example(query)], with_target=False, **limits)
        text = tokenizers.llm.decode(columns["prompt_ids"][0])
        template = len(find_task("math").format_query("")[0])
        kept = text[: -len(END)].split("### Instruction:\n")[1]
        assert text.endswith(END) and query.startswith(kept)
        # As much of the query as fits: one more character would be too long.
        room = max_gen_len - template
        assert room - len(query[0].encode()) < len(kept.encode()) <= room
        assert columns["prompt_cut"] == [True]


@pytest.mark.parametrize("query", ["word " * 200, "é" * 3000])
def test_a_long_prompt_that_the_encoder_reads_loses_the_querys_end_and_never_the_templates(tokenizers, query):
    """LangBridge's encoder no longer read that an answer should follow, nor the question's last words: its own end."""
    (example,) = read_by_encoder([math_example(query)], "prompt")
    limits = LIMITS | {"max_seq_len": 200, "with_prompt": False}
    columns = tokenise(tokenizers, [example, math_example()], with_target=False, shrink_source=True, **limits)
    ids = columns["encoder_ids"][0]
    assert ids[-1] == tokenizers.encoder.eos_token_id and columns["source_cut"] == [True, False]
    text = tokenizers.encoder.decode(ids[:-1])
    kept = text[: -len(END)].split("### Instruction:\n")[1]
    assert text.endswith(END) and query.startswith(kept) and kept
    assert 200 - len(query[0].encode()) < len(ids) <= 200
    # An evaluation tokenises in the same way.
    read = {"with_source": True, "with_prompt": False, "max_seq_len": 200, "max_gen_len": 512, "encoder_text": "prompt"}
    assert tokenise_inputs(tokenizers, [math_example(query)], **read)["encoder_ids"] == [ids]


def test_a_template_too_long_for_the_encoder_keeps_its_last_tokens_between_the_special_ones(tokenizers, tagged):
    (example,) = read_by_encoder([math_example("a" * 99)], "prompt")
    limits = {"max_seq_len": 20, "max_gen_len": 8, "with_prompt": False, "with_target": False}
    (ids,) = tokenise(tokenizers, [example], shrink_source=True, **limits)["encoder_ids"]
    end = tokenizers.encoder.eos_token_id
    assert len(ids) == 20 and ids[-1] == end and tokenizers.encoder.decode(ids[:-1]) == END[-19:]
    # Later texts are truncated at the other end, as ever.
    (ids,) = tokenise(tokenizers, [math_example("a" * 30)], **limits)["encoder_ids"]
    assert tokenizers.encoder.decode(ids[:-1]) == "a" * 19
    for encoder in tagged.values():
        pair = Tokenizers(encoder, None, 1, 0, 0, None)
        (ids,) = tokenise(pair, [example], shrink_source=True, **limits)["encoder_ids"]
        (whole,) = tokenise(pair, [example], **limits | {"max_seq_len": 10_000})["encoder_ids"]
        assert len(ids) == 20 and [ids[0], ids[-1]] == [whole[0], whole[-1]] and encoder.truncation_side == "right"


def test_prompt_whose_template_is_too_long_keeps_its_last_tokens(tokenizers):
    columns = tokenise(tokenizers, [math_example("a" * 99)], with_target=False, **LIMITS | {"max_gen_len": 20})
    assert tokenizers.llm.decode(columns["prompt_ids"][0]) == END[-20:]


def test_very_long_query_is_cut_to_the_limit_exactly(tokenizers):
    (ids,) = tokenise(tokenizers, [math_example("a" * 300_000)], with_target=False, **LIMITS)["prompt_ids"]
    assert len(ids) == 512


@pytest.mark.parametrize(
    ("limit", "flag"), [({"max_seq_len": 1}, "--max_seq_len"), ({"max_gen_len": 0}, "--max_gen_len")]
)
def test_limits_without_room_are_refused(tokenizers, limit, flag):
    assert flag in error_of(lambda: tokenise(tokenizers, [math_example()], with_target=True, **LIMITS | limit))


def test_long_texts_draw_no_warning_from_the_tokenizer(tokenizers, capfd, caplog):
    tokenizers.llm.model_max_length = tokenizers.encoder.model_max_length = 4
    tokenise(tokenizers, [math_example()], with_target=True, **LIMITS)
    assert "longer" not in capfd.readouterr().err + caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Source languages


def sentencepiece_model(folder: Path) -> Path:
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    texts = [(DATAS / f"evaluation/mgsm/mgsm_{code}.tsv").read_text("utf-8") for code in ("de", "sw", "te")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(texts).splitlines()),
        model_prefix=str(folder / "sentencepiece.bpe"),
        vocab_size=260,
        model_type="bpe",
        minloglevel=2,
        num_threads=1,
    )
    return folder / "sentencepiece.bpe.model"


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    """Tiny tokenizers of every kind that takes a source language, saved and loaded like a user's."""
    from transformers import M2M100Tokenizer, MBart50Tokenizer, MBartTokenizer, NllbTokenizer

    root = tmp_path_factory.mktemp("tagged")
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    # Language codes of M2M100 are ordinary pieces elsewhere: they must not be taken for tags.
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz", "en", "de", "te"]
    nllb = NllbTokenizer(vocab={piece: i for i, piece in enumerate(special + pieces)}, merges=[("e", "n"), ("d", "e")])
    scored = [(piece, 0.0 if piece in special else -2.0) for piece in special + pieces]
    model = sentencepiece_model(root / "spm")
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    vocabulary = special + [processor.id_to_piece(i) for i in range(3, processor.get_piece_size())]
    (root / "spm/vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
    m2m100 = M2M100Tokenizer(vocab_file=str(root / "spm/vocab.json"), spm_file=str(model))
    loaded = {}
    for name, tokenizer in {
        "nllb": nllb,
        "mbart50": MBart50Tokenizer(vocab=scored),
        "mbart": MBartTokenizer(vocab=scored),
        "m2m100": m2m100,
    }.items():
        tokenizer.save_pretrained(root / name)
        loaded[name] = load_tokenizers(str(root / name), None).encoder
    return loaded


@pytest.mark.parametrize(
    ("name", "code", "position"),
    [("nllb", "{nllb}", 0), ("mbart50", "{mbart}", 0), ("mbart", "{mbart}", -1), ("m2m100", "__{m2m100}__", 0)],
)
def test_each_row_carries_its_own_language_whatever_the_order(tagged, name, code, position):
    tokenizer = tagged[name]
    pair = Tokenizers(tokenizer, None, 1, 0, 0, None)
    names = ["German", "French", "German", "English", "Japanese", "French"]
    examples = [math_example(f"abc {chr(97 + i)}", language=language) for i, language in enumerate(names)]
    limits = {"max_seq_len": 64, "max_gen_len": 8, "with_prompt": False, "with_target": False}
    rows = tokenise(pair, examples, **limits)["encoder_ids"]
    for example, ids in zip(examples, rows, strict=True):
        language = LANGUAGES[example.language]
        tag = code.format(nllb=language.nllb, mbart=language.mbart, m2m100=language.m2m100)
        assert tokenizer.convert_ids_to_tokens(ids[position]) == tag
        assert tokenizer.eos_token_id in ids
        assert tokenise(pair, [example], **limits)["encoder_ids"] == [ids]


@pytest.mark.parametrize(
    ("name", "missing"),
    [("nllb", ""), ("mbart50", "Albanian Bulgarian Greek Hungarian Serbian"), ("m2m100", "Telugu")],
)
def test_exactly_the_languages_that_an_encoder_lacks_are_refused_by_name(tagged, name, missing):
    refused = []
    for language in map(find_language, SHIPPED):
        try:
            assert source_language_code(tagged[name], language)
        except DataError as error:
            assert language.name in str(error) and name in str(error)
            refused.append(language.name)
    assert refused == missing.split()


@pytest.mark.parametrize(
    ("name", "column", "unknown"),
    # Seven of the tags are FLORES-200's or Belebele's alone.
    [("nllb", "nllb", 7), ("mbart50", "mbart", 0), ("m2m100", "m2m100", 0)],
)
def test_every_language_of_the_table_with_a_tag_is_known_to_its_encoder(tagged, name, column, unknown):
    known, refused = [], []
    for language in LANGUAGES.values():
        try:
            known.append(source_language_code(tagged[name], language) == getattr(language, column))
        except DataError:
            refused.append(language)
    assert all(known) and len(known) == sum(getattr(one, column) is not None for one in LANGUAGES.values()) - unknown
    assert sum(getattr(one, column) is not None for one in refused) == unknown


def test_older_mbart_is_asked_for_its_own_list(tagged):
    assert source_language_code(tagged["mbart"], LANGUAGES["German"]) == "de_DE"
    assert "Swahili" in error_of(lambda: source_language_code(tagged["mbart"], LANGUAGES["Swahili"]))


def test_untagged_encoder_needs_no_code(tokenizers):
    assert source_language_code(tokenizers.encoder, Language("Klingon", "tlh", None, None, None)) is None


def test_slow_tokenizer_cuts_and_keeps_order(tagged):
    pair = Tokenizers(tagged["m2m100"], None, 1, 0, 0, None)
    assert not tagged["m2m100"].is_fast
    examples = [math_example("wort " * n, language="German") for n in (1, 50, 2)]
    columns = tokenise(pair, examples, max_seq_len=12, max_gen_len=8, with_prompt=False, with_target=False)
    assert columns["source_cut"] == [False, True, False] and len(columns["encoder_ids"][1]) == 12
    assert all(ids[-1] == tagged["m2m100"].eos_token_id for ids in columns["encoder_ids"])


# ---------------------------------------------------------------------------------------------------------------------
# The training set on disk


def build(tokenizers, cache, stage="augmentation", root=DATAS, **changes):
    of_stage = {name: changes.pop(name) for name in ("languages", "train_num", "skip_faulty_rows") if name in changes}
    limits = {"max_seq_len": 200, "max_gen_len": 200, "with_prompt": stage == "augmentation", "cache_dir": cache}
    return open_or_build(StageData(find_task("math"), stage, root, **of_stage), tokenizers, **limits | changes)


def test_faulty_rows_are_refused_with_the_flags_name_or_left_out_counted_and_listed(tokenizers, tmp_path):
    shutil.copytree(DATAS, tmp_path / "datas")
    file = tmp_path / "datas/query_translation/math.json"
    content = file.read_text(encoding="utf-8")
    whole = build(tokenizers, tmp_path / "cache", root=tmp_path / "datas")
    rows = json.loads(content)
    rows[3]["query"] = ""
    file.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]", encoding="utf-8")
    line = f"{file}:5: field 'query' is empty"
    message = error_of(lambda: build(tokenizers, tmp_path / "cache", root=tmp_path / "datas"))
    assert message == f"{line} (--skip_faulty_rows leaves such rows out and lists them)"
    skipped = build(tokenizers, tmp_path / "cache", root=tmp_path / "datas", skip_faulty_rows=True)
    assert skipped.faults == [line] and skipped.counts["faulty_rows"] == 1
    assert len(skipped.dataset) == len(whole.dataset) - 1
    # Opened again, and from a copy elsewhere, the cached set still tells.
    shutil.copytree(tmp_path / "datas", tmp_path / "copy")
    again = build(tokenizers, tmp_path / "cache", root=tmp_path / "copy", skip_faulty_rows=True)
    assert again.fingerprint == skipped.fingerprint
    assert again.faults == [line.replace("/datas/", "/copy/")]
    # Whole data with and without the flag are different sets: the second may be read another way.
    file.write_text(content, encoding="utf-8")
    clean = build(tokenizers, tmp_path / "cache", root=tmp_path / "datas", skip_faulty_rows=True)
    assert clean.fingerprint not in (whole.fingerprint, skipped.fingerprint) and clean.faults == []


def test_pairs_with_an_empty_side_are_counted_and_said_by_runs_that_find_the_data_tokenised_too(
    tokenizers, tmp_path, capsys
):
    """The second run of the same training said nothing of them."""
    shutil.copytree(DATAS, tmp_path / "datas")
    file = tmp_path / "datas/bilingual_pairs/en-de/train_100k.de"
    lines = file.read_text(encoding="utf-8").split("\n")
    lines[1] = lines[2] = " "
    file.write_text("\n".join(lines), encoding="utf-8")
    german = {"languages": [find_language("de")]}
    whole = build(tokenizers, tmp_path / "cache", "mapping", **german)
    assert "empty_pairs" not in whole.counts and capsys.readouterr().err == ""
    for where in ("datas", "datas", "copy"):
        if where == "copy":
            shutil.copytree(tmp_path / "datas", tmp_path / "copy")
        found = build(tokenizers, tmp_path / "cache", "mapping", root=tmp_path / where, **german)
        assert found.counts["empty_pairs"] == 2 and len(found.dataset) == len(whole.dataset) - 2
        named = file if where == "datas" else tmp_path / "copy/bilingual_pairs/en-de/train_100k.de"
        said = f"warning: {named}: 2 pairs with an empty side are left out, the first at line 2\n"
        assert capsys.readouterr().err == said


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_a_full_disk_names_the_folder_the_bytes_and_what_to_do(tokenizers, tmp_path):
    """A limit on file sizes stops a write in its middle, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(DataError, match=rf"cannot write .* to {tmp_path} \(\d+ bytes were written\): .*make room"):
            build(tokenizers, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert visible(tmp_path) == set()


def test_training_set_equals_tokenising_in_memory(tokenizers, tmp_path):
    built = build(tokenizers, tmp_path)
    examples = list(StageData(find_task("math"), "augmentation", DATAS).examples())
    columns = tokenise(tokenizers, examples, with_target=True, max_seq_len=200, max_gen_len=200, with_prompt=True)
    assert built.dataset.column_names == ["id", "language", "encoder_ids", "prompt_ids", "target_ids"]
    assert built.dataset["id"][:] == [example.id for example in examples]
    for name in ("encoder_ids", "prompt_ids", "target_ids"):
        assert built.dataset[name][:] == columns[name]
    assert built.encoder_lengths.dtype == np.int32
    assert built.encoder_lengths.tolist() == [len(ids) for ids in columns["encoder_ids"]]
    assert built.prompt_lengths.tolist() == [len(ids) for ids in columns["prompt_ids"]]
    assert built.target_lengths.tolist() == [len(ids) for ids in columns["target_ids"]]
    assert built.merged_lengths(lambda tokens: tokens + 1)[0] == 2 + sum(
        len(columns[f"{name}_ids"][0]) for name in ("encoder", "prompt", "target")
    )
    assert built.counts == {
        "rows": dict.fromkeys(dict.fromkeys(example.language for example in examples), 4),
        **{name: sum(columns[name]) for name in ("source_cut", "prompt_cut", "target_cut")},
    }
    assert built.counts["source_cut"] > 0
    assert list(built.files) == ["query_translation/math.json"]


def test_cache_holds_one_folder_with_exactly_these_files(tokenizers, tmp_path):
    built = build(tokenizers, tmp_path)
    assert visible(tmp_path) == {built.fingerprint}
    assert visible(tmp_path / built.fingerprint) == {"ids.arrow", "manifest.json"}


def test_second_build_only_opens_the_first(tokenizers, tmp_path, monkeypatch):
    first = build(tokenizers, tmp_path)
    monkeypatch.setattr(training_set, "tokenise", lambda *_, **__: pytest.fail("tokenised again"))
    second = build(tokenizers, tmp_path)
    assert second.fingerprint == first.fingerprint and second.counts == first.counts
    assert second.dataset[:] == first.dataset[:]


def test_fingerprint_is_the_same_for_a_moved_data_folder_and_used_tokenizers(folders, tokenizers, tmp_path):
    first = build(tokenizers, tmp_path / "a").fingerprint
    shutil.copytree(DATAS / "query_translation", tmp_path / "moved/query_translation")
    tokenizers.encoder(["a", "bcd"], truncation=True, max_length=2, padding=True)
    assert build(tokenizers, tmp_path / "b", root=tmp_path / "moved").fingerprint == first
    assert build(load_tokenizers(*folders), tmp_path / "c").fingerprint == first


def test_fingerprint_changes_with_everything_that_changes_the_ids(tokenizers, tmp_path, monkeypatch):
    shutil.copytree(DATAS, tmp_path / "datas")
    cache = tmp_path / "cache"

    def fingerprint(tokenizers=tokenizers, **changes):
        return build(tokenizers, cache, root=tmp_path / "datas", **changes).fingerprint

    byte_tokenizer(tmp_path / "other", {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}, "<s> $A")
    other = load_tokenizers(str(tmp_path / "other"), str(tmp_path / "other"))
    found = [
        fingerprint(),
        fingerprint(stage="mapping"),
        fingerprint(stage="mapping", with_prompt=True),
        fingerprint(languages=parse_languages("German,Thai")),
        fingerprint(languages=parse_languages("Thai,German")),
        fingerprint(train_num=3),
        fingerprint(max_seq_len=100),
        fingerprint(max_gen_len=100),
        fingerprint(with_prompt=False),
        fingerprint(Tokenizers(other.encoder, tokenizers.llm, 0, 0, tokenizers.eos_id, 1)),
        fingerprint(Tokenizers(tokenizers.encoder, other.llm, 0, 0, tokenizers.eos_id, 1)),
        fingerprint(Tokenizers(tokenizers.encoder, tokenizers.llm, 0, 0, 0, 1)),
    ]
    path = tmp_path / "datas/query_translation/math.json"
    path.write_text(path.read_text("utf-8").replace("mangoes", "guavas"), "utf-8")
    found.append(fingerprint())
    monkeypatch.setattr(math, "math_prompt", lambda query: (f"Q: {query}", (3, 3 + len(query))))
    found.append(fingerprint())
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("languages", [None, "German,Thai"])
def test_a_cache_that_version_0_1_0_wrote_is_found_again(tokenizers, tmp_path, languages):
    """The key is spelt out as that version made it: a field more or less would tokenise everyone's data again."""
    languages = parse_languages(languages) if languages else None
    file = "query_translation/math.json"
    first = next(StageData(find_task("math"), "augmentation", DATAS, languages, 3).examples())
    settings = {
        **{"version": 1, "task": "math", "stage": "augmentation", "train_num": 3, "eos": tokenizers.eos_id},
        "files": {file: hashlib.sha256((DATAS / file).read_bytes()).hexdigest()},
        "languages": [language.code for language in languages] if languages else None,
        **{"max_seq_len": 200, "max_gen_len": 200, "with_prompt": True},
        "encoder": _tokenizer_identity(tokenizers.encoder),
        "llm": _tokenizer_identity(tokenizers.llm),
        "first_example": [first.id, first.source, first.prompt, first.target, list(first.shrinkable)],
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    assert build(tokenizers, tmp_path, languages=languages, train_num=3).fingerprint == key


@pytest.mark.parametrize("damage", ["cut", "missing", "manifest"])
def test_damaged_cache_is_built_again(tokenizers, tmp_path, damage):
    first = build(tokenizers, tmp_path)
    rows = first.dataset[:]
    folder = tmp_path / first.fingerprint
    del first
    if damage == "cut":
        os.truncate(folder / "ids.arrow", 1000)
    elif damage == "missing":
        (folder / "ids.arrow").unlink()
    else:
        (folder / "manifest.json").write_text('{"shards"')
    assert build(tokenizers, tmp_path).dataset[:] == rows


def test_interrupted_build_leaves_nothing_that_is_taken_for_a_cache(tokenizers, tmp_path, monkeypatch):
    real, calls = tokenising.tokenise, []

    def interrupted(*arguments, **options):
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(training_set, "tokenise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tokenizers, tmp_path)
    assert calls and visible(tmp_path) == set()
    monkeypatch.setattr(training_set, "tokenise", real)
    killed = tmp_path / f".{build(tokenizers, tmp_path / 'other').fingerprint[:16]}-killed.tmp"
    killed.mkdir()
    (killed / "texts.arrow").write_bytes(b"half")
    built = build(tokenizers, tmp_path)
    assert visible(tmp_path) == {built.fingerprint, "other"}


def test_fault_in_the_data_stops_the_build_with_its_line_and_leaves_nothing(tokenizers, tmp_path):
    path = tmp_path / "datas/query_translation/math.json"
    path.parent.mkdir(parents=True)
    rows = (DATAS / "query_translation/math.json").read_text("utf-8").splitlines()
    path.write_text("\n".join([*rows[:-1], ",{}", "]"]), "utf-8")
    message = error_of(lambda: build(tokenizers, tmp_path / "cache", root=tmp_path / "datas"))
    assert f"math.json:{len(rows)}: " in message
    assert visible(tmp_path / "cache") == set()


def test_unwritable_cache_is_one_line(tokenizers, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in error_of(lambda: build(tokenizers, tmp_path / "file/cache"))


def test_two_builders_at_once_give_one_cache(folders, tmp_path):
    """Two runs started together both built, and the second rename failed or replaced files in use."""
    with ThreadPoolExecutor(2) as pool:
        loaded = [load_tokenizers(*folders) for _ in range(2)]
        built = list(pool.map(lambda tokenizers: build(tokenizers, tmp_path), loaded))
    assert built[0].fingerprint == built[1].fingerprint and built[0].dataset[:] == built[1].dataset[:]
    assert visible(tmp_path) == {built[0].fingerprint}


@pytest.mark.parametrize("stage", ["mapping", "augmentation"])
def test_number_of_processes_changes_nothing(tokenizers, tmp_path, stage):
    one = build(tokenizers, tmp_path / "one", stage=stage, num_proc=1)
    two = build(tokenizers, tmp_path / "two", stage=stage, num_proc=2)
    assert visible(tmp_path / "two" / two.fingerprint) == {f"ids_0000{i}_of_00002.arrow" for i in (0, 1)} | {
        "manifest.json"
    }
    assert one.fingerprint == two.fingerprint and one.counts == two.counts
    assert one.dataset[:] == two.dataset[:]


class Witness:
    """A tokenizer that notes the class of each process it is called in."""

    def __init__(self, tokenizer, file):
        self.tokenizer, self.file = tokenizer, file

    def __call__(self, *arguments, **named):
        with open(self.file, "a") as file:
            file.write(type(multiprocess.current_process()).__name__ + "\n")
        return self.tokenizer(*arguments, **named)

    def __getattr__(self, name):
        return getattr(self.__dict__["tokenizer"], name) if "tokenizer" in self.__dict__ else object.__getattr__(name)


def test_processes_that_tokenise_are_spawned_not_forked(tokenizers, tmp_path):
    """`datasets` starts them with multiprocess, whose start method was left at fork: a forked child of a process with
    threads can hang."""
    tokenizers.llm = Witness(tokenizers.llm, tmp_path / "classes")
    built = build(tokenizers, tmp_path / "cache", num_proc=2)
    classes = (tmp_path / "classes").read_text().split()
    assert len(built.dataset) and set(classes) == {"_MainProcess", "SpawnProcess"}, classes
    assert multiprocess.get_start_method(allow_none=True) != "spawn", "the caller's start method is changed"


def test_language_unknown_to_the_encoder_stops_the_build_in_any_process(tagged, tokenizers, tmp_path):
    mixed = Tokenizers(tagged["m2m100"], tokenizers.llm, 1, 2, 2, 1)
    for num_proc in (1, 2):
        assert "Telugu" in error_of(lambda: build(mixed, tmp_path, num_proc=num_proc))  # noqa: B023
    built = build(mixed, tmp_path, languages=parse_languages("German,Thai"))
    assert built.counts["rows"] == {"Thai": 4, "German": 4}


# ---------------------------------------------------------------------------------------------------------------------
# Batch order


@given(st.integers(1, 300), st.data(), st.integers(0, 2**40))
def test_dev_and_train_split_every_example_once(examples, data, seed):
    dev_size = data.draw(st.integers(0, examples - 1))
    dev, train = split_dev(examples, dev_size, seed)
    assert dev.dtype == train.dtype == np.int64 and len(dev) == dev_size
    assert sorted([*dev, *train]) == list(range(examples))
    assert all((a == b).all() for a, b in zip((dev, train), split_dev(examples, dev_size, seed), strict=True))


@pytest.mark.parametrize("dev_size", [10, 11, -1])
def test_dev_split_that_leaves_nothing_to_train_on_is_refused(dev_size):
    message = error_of(lambda: split_dev(10, dev_size, 0))
    assert f"--dev_size {dev_size} " in message or "at least 0" in message and dev_size < 0


def test_dev_size_larger_than_the_data_names_the_share_it_would_take_and_what_to_do():
    message = error_of(lambda: split_dev(2000, 3000, 0))
    assert "--dev_size 3000 would take all of the 2000 examples (150% of them)" in message
    assert "--dev_size auto for a tenth (200)" in message


def test_automatic_dev_size_is_a_tenth_and_at_most_3000():
    assert [automatic_dev_size(n) for n in (9, 108, 29_999, 30_000, 10**6)] == [0, 10, 2999, 3000, 3000]


def test_negative_seed_is_refused():
    assert "--seed" in error_of(lambda: split_dev(10, 2, -1))


@given(st.integers(1, 200), st.integers(1, 50), st.integers(0, 99), st.integers(0, 9))
def test_epoch_is_a_permutation_in_batches_of_the_asked_size(examples, batch_size, seed, epoch):
    train = np.arange(examples) * 3 + 1
    batches = epoch_batches(train, batch_size, seed, epoch)
    assert sorted(np.concatenate(batches)) == train.tolist()
    assert {len(batch) for batch in batches[:-1]} <= {batch_size} and 0 < len(batches[-1]) <= batch_size
    again = epoch_batches(train, batch_size, seed, epoch)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))


def test_epochs_and_seeds_have_different_orders_that_never_change():
    """The order is part of resuming: a library that changed it would silently show some rows twice."""
    frozen = (13, 3, 19, 16, 5, 7, 6, 2, 11, 17, 9, 8, 0, 15, 4, 1, 12, 14, 10, 18)
    orders = {
        (seed, epoch): tuple(np.concatenate(epoch_batches(np.arange(20), 6, seed, epoch)))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert orders[0, 0] == frozen


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    world_size=st.integers(1, 9),
    micro_batch_size=st.integers(1, 9),
    token_budget=st.none() | st.integers(1, 200),
    data=st.data(),
)
def test_every_rank_gets_equally_many_micro_batches_and_every_row_once(
    lengths, world_size, micro_batch_size, token_budget, data
):
    """A rank with fewer micro-batches than the others hangs the run; a row lost or doubled changes the gradient."""
    lengths = np.array(lengths)
    indices = np.array(data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True)))
    ranks = split_global_batch(indices, lengths, world_size, micro_batch_size, token_budget)
    assert len(ranks) == world_size and len({len(rank) for rank in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    real = [batch for batch in batches if batch.weight == 1.0]
    assert sorted(np.concatenate([batch.indices for batch in real])) == sorted(indices)
    for batch in batches:
        assert batch.weight in (0.0, 1.0)
        assert len(batch.indices) == 1 if batch.weight == 0 else len(batch.indices) >= 1
        if token_budget is None:
            assert len(batch.indices) <= micro_batch_size
        else:
            assert len(batch.indices) == 1 or len(batch.indices) * lengths[batch.indices].max() <= token_budget
    # In the order in which they run, no row is longer than one of a micro-batch before it, on whatever rank.
    steps = [[length for b in step if b.weight for length in lengths[b.indices]] for step in zip(*ranks, strict=True)]
    assert all(min(before) >= max(after) for before, after in itertools.pairwise(steps))
    least = -(-len(indices) // (micro_batch_size * world_size))
    assert token_budget is not None or len(ranks[0]) == least


@settings(deadline=None)  # it tries all cuts, and a busy machine is not a fault
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=9), token_budget=st.integers(1, 200))
def test_a_token_budget_is_spent_on_the_cheapest_of_all_cuts(lengths, token_budget):
    """Against every way to cut: padded positions plus the fixed cost of each micro-batch."""
    lengths = np.array(sorted(lengths, reverse=True))

    def cost(parts):
        return sum(len(part) * part.max() + MICRO_BATCH_COST * token_budget for part in parts)

    cuts = (c for n in range(len(lengths)) for c in itertools.combinations(range(1, len(lengths)), n))
    fits = [
        parts
        for parts in (np.split(lengths, cut) for cut in cuts)
        if all(len(part) == 1 or len(part) * part.max() <= token_budget for part in parts)
    ]
    (mine,) = split_global_batch(np.arange(len(lengths)), lengths, 1, 1, token_budget)
    assert cost([lengths[batch.indices] for batch in mine]) == min(map(cost, fits))


def test_full_global_batch_is_cut_into_full_micro_batches():
    ranks = split_global_batch(np.arange(128), np.arange(128), world_size=2, micro_batch_size=8)
    assert [[len(batch.indices) for batch in rank] for rank in ranks] == [[8] * 8] * 2


def test_empty_global_batch_gives_every_rank_nothing():
    assert split_global_batch(np.array([], dtype=np.int64), np.arange(3), 2, 4) == [[], []]


# ---------------------------------------------------------------------------------------------------------------------
# Collation


def test_collate_pads_on_the_right_with_each_sides_pad_id():
    import torch

    rows = [
        {"encoder_ids": [5, 6, 7], "prompt_ids": [], "target_ids": [9]},
        {"encoder_ids": [8], "prompt_ids": [4, 4], "target_ids": [9, 2]},
    ]
    batch = collate(rows, encoder_pad_id=0, llm_pad_id=2)
    assert batch.encoder_input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.encoder_attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.prompt_ids.tolist() == [[2, 2], [4, 4]] and batch.prompt_mask.tolist() == [[0, 0], [1, 1]]
    assert batch.target_ids.tolist() == [[9, 2], [9, 2]] and batch.target_mask.tolist() == [[1, 0], [1, 1]]
    assert {tensor.dtype for tensor in batch.tensors.values()} == {torch.int64}


def test_collate_gives_none_for_segments_that_no_row_has(tokenizers, tmp_path):
    built = build(tokenizers, tmp_path, stage="mapping", languages=parse_languages("German"))
    batch = collate([built.dataset[0], built.dataset[3]], 0, 2)
    assert batch.prompt_ids is None and batch.prompt_mask is None
    assert batch.target_ids.shape[0] == 2
    assert collate([{"encoder_ids": [1]}], 0, 2).target_ids is None


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="resident pages are counted in Linux' /proc")
def test_released_pages_leave_the_process_and_the_rows_stay_the_same(tokenizers, tmp_path):
    """A rank that reads at random would otherwise soon count the whole training set as its own memory."""

    def resident(files):
        """kB of the files that this process has in memory."""
        total, counts = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split()[0]:
                counts = line.split(maxsplit=5)[-1] in files
            elif counts and line.startswith("Rss:"):
                total += int(line.split()[1])
        return total

    data = build(tokenizers, tmp_path)
    files = {file["filename"] for file in data.dataset.cache_files}
    rows = data.dataset[:]
    assert resident(files) > 0
    data.release_pages()
    assert resident(files) == 0
    assert data.dataset[:] == rows
