"""Languages: the table against the installed tokenizers, how a language is found, and a user's own languages."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, SHIPPED, run_many
from hypothesis import given, settings
from hypothesis import strategies as st

from mindmerger.data.tokenising import _tokenizer_identity, load_tokenizers
from mindmerger.data.training_set import open_or_build
from mindmerger.tasks import find_task
from mindmerger.tasks.examples import StageData, evaluation_examples
from mindmerger.tasks.languages import (
    LANGUAGES,
    code_of,
    find_language,
    own_languages,
    parse_languages,
    use_languages,
    use_languages_file,
)
from mindmerger.tasks.numbers import read_number
from mindmerger.tasks.readers import DataError

# With the tags of German, whose word a tiny vocabulary knows.
OWN = "name\tiso639_3\tnllb\talso\nSwiss German\tgsw\tdeu_Latn\tAlemannic, Schwyzerdütsch\nVõro\tvro\n"


@pytest.fixture(autouse=True)
def no_own_languages():
    yield
    use_languages(())


@pytest.fixture
def own(tmp_path):
    """Path of a file with two languages, not yet read."""
    (tmp_path / "own.tsv").write_text(OWN, "utf-8")
    return str(tmp_path / "own.tsv")


def error_of(call) -> str:
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500
    return message


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# The table


def test_every_tag_of_the_installed_tokenizers_names_one_language():
    from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES as m2m100
    from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES as mbart
    from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as nllb

    for column, known in (("nllb", nllb), ("m2m100", m2m100["m2m100"]), ("mbart", mbart)):
        tags = [getattr(language, column) for language in LANGUAGES.values() if getattr(language, column)]
        assert len(tags) == len(set(tags))
        assert set(known) <= set(tags), column
        beyond = set(tags) - set(known)
        # FLORES-200's and Belebele's, which NLLB-200 was not trained on: written in another script there.
        other_script = {"arb_Latn", "min_Arab", "ben_Latn", "hin_Latn", "npi_Latn", "sin_Latn", "urd_Latn"}
        assert beyond == (other_script if column == "nllb" else set())
    assert len([language for language in LANGUAGES.values() if language.nllb]) == 204 + 5


def test_codes_and_names_of_the_released_rows_stay_and_all_are_unique():
    """File names, ids of results and cached data depend on them."""
    released = {find_language(code).name: code for code in SHIPPED}
    assert list(released) == sorted(released) and len(released) == 28
    assert released["Flemish"] == "nl" and released["Albanian"] == "sq" and released["Chinese"] == "zh"
    assert [name for name in released if LANGUAGES[name].m2m100 is None] == ["Telugu"]
    assert {code for name, code in released.items() if LANGUAGES[name].mbart is None} == {"el", "bg", "hu", "sq", "sr"}
    for known in (LANGUAGES, {language.code for language in LANGUAGES.values()}):
        assert len({one.casefold() for one in known}) == len(LANGUAGES)
    assert not [language for language in LANGUAGES.values() if "-" in language.code or "," in language.name]


def test_a_code_is_the_two_letter_one_where_there_is_one():
    for language in LANGUAGES.values():
        plain = language.iso1 or language.iso3
        assert language.code in (plain, language.nllb), language
        if language.code != plain:
            same = [one for one in LANGUAGES.values() if one.iso3 == language.iso3]
            assert len(same) == 2, f"{language} has a tag for its code although its script is the only one"


def test_the_tag_begins_with_the_three_letter_code():
    assert [one.name for one in LANGUAGES.values() if one.nllb and not one.nllb.startswith(f"{one.iso3}_")] == []


def test_an_encoders_cached_data_keep_their_name_when_languages_are_added(own):
    """The tags of the whole table were part of it: each row added had all data tokenised anew."""

    class Tagged:
        src_lang, is_fast, unk_token_id, name_or_path = "", False, 3, "tagged"

        def convert_tokens_to_ids(self, token):
            return 7 if token == "eng_Latn" else 3

        def get_vocab(self):
            return {}

        def __call__(self, texts, **options):
            return {"input_ids": [[1] for _ in texts]}

    before = _tokenizer_identity(Tagged())
    # Recorded with version 0.1.0's table of 28 rows.
    assert before == "f242e911dda077f05fcfb11bff9a343c7cbdf12242edfa300c1eef21e373c8db"
    use_languages_file(own)
    assert _tokenizer_identity(Tagged()) == before


def test_the_wheel_holds_the_table_and_the_mark_for_type_checkers(tmp_path):
    """`pip install .` left the table out: the package could not be imported."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "mindmerger/tasks", tmp_path / "mindmerger/tasks")
    for name in ("__init__.py", "py.typed"):
        shutil.copy(ROOT / "mindmerger" / name, tmp_path / "mindmerger")
    build = "import sys\nfrom setuptools import build_meta\nbuild_meta.build_wheel(sys.argv[1])\n"
    done = subprocess.run([sys.executable, "-c", build, tmp_path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert {"mindmerger/tasks/languages.tsv", "mindmerger/py.typed"} <= set(zipfile.ZipFile(wheel).namelist())


# ---------------------------------------------------------------------------------------------------------------------
# How one is found


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *(("swahili", "Swahili"), ("SW", "Swahili"), (" Swahili ", "Swahili"), ("swh", "Swahili"), ("swa", "Swahili")),
        *(("SWH_latn", "Swahili"), ("Dutch", "Flemish"), ("nl", "Flemish"), ("nld", "Flemish"), ("zho", "Chinese")),
        *(("zho_Hant", "Chinese (Traditional)"), ("chinese (traditional)", "Chinese (Traditional)")),
        *(("Kabiye", "Kabiyè"), ("KABIYE\u0300", "Kabiyè"), ("arb", "Arabic"), ("sat_Olck", "Santali")),
        *(("mni", "Meitei"), ("yue", "Yue Chinese")),
    ],
)
def test_a_language_is_found_by_name_code_and_tag_in_any_case(text, name):
    assert find_language(text) is LANGUAGES[name]


def test_each_language_is_found_by_its_own_name_code_and_tag():
    for language in LANGUAGES.values():
        assert find_language(language.name.upper()) is find_language(language.code) is language
        assert language.nllb is None or find_language(language.nllb) is language


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("ace", ["ace_Arab", "ace_Latn"]),
        ("acehnese", ["ace_Arab", "ace_Latn"]),
        ("kr", ["knc_Arab", "knc_Latn"]),
        ("Kurdish", ["ckb", "ku"]),
    ],
)
def test_a_name_of_several_languages_is_refused_with_the_candidates(text, codes):
    message = error_of(lambda: parse_languages(f"sw,{text}"))
    assert "may mean" in message and re.findall(r" \((\w+)\)(?=[,:])", message) == codes


@pytest.mark.parametrize(("given_name", "nearest"), [("Swahilli", "Swahili"), ("Duch", "Flemish"), ("germn", "German")])
def test_unknown_language_is_answered_with_the_nearest_ten_only(given_name, nearest):
    message = error_of(lambda: find_language(given_name))
    assert f"did you mean {nearest}?" in message and "--languages_file" in message
    listed = [language.name for language in LANGUAGES.values() if f" {language.name} ({language.code})" in message]
    assert nearest in listed and len(listed) == 10


def test_a_code_of_no_language_is_answered_with_codes_like_it():
    message = error_of(lambda: find_language("eb"))
    listed = re.findall(r" \((\w+)\)(?=[,;])", message)
    assert len(listed) == 10 and all("e" in code or "b" in code for code in listed)


@pytest.mark.parametrize("text", ["", " , "])
def test_empty_language_list_is_refused(text):
    error_of(lambda: parse_languages(text))


def test_repeated_languages_count_once():
    assert [language.code for language in parse_languages("Swahili, th,sw,swh_Latn,")] == ["sw", "th"]


# ---------------------------------------------------------------------------------------------------------------------
# A user's own


def test_own_languages_are_found_like_those_of_the_table_until_another_file_is_read(own):
    use_languages_file(own)
    swiss = find_language("gsw")
    assert swiss is find_language("alemannic") is find_language("SWISS GERMAN") is LANGUAGES["Swiss German"]
    assert (swiss.code, swiss.nllb, swiss.m2m100) == ("gsw", "deu_Latn", None)
    assert find_language("deu_Latn").name == "German", "a borrowed tag still means the language that it is of"
    assert own_languages() == [swiss, find_language("Võro")] and own_languages([swiss]) == [swiss]
    assert own_languages([LANGUAGES["Thai"]]) == []
    use_languages_file(None)
    error_of(lambda: find_language("gsw"))
    assert code_of("Swiss German") == "Swiss German" and code_of("Swahili") == "sw"


def test_the_file_of_the_docs_is_read_as_it_stands(tmp_path):
    page = (ROOT / "docs/extending.md").read_text("utf-8")
    (table,) = re.findall(r"```text\n(name\t.*?)```", page, flags=re.DOTALL)
    write(tmp_path / "own.tsv", table)
    use_languages_file(str(tmp_path / "own.tsv"))
    assert {one.name: one.code for one in own_languages()} == {"Swiss German": "gsw", "Serbian (Latin)": "srp_Latn"}
    assert find_language("sr").name == "Serbian"


@pytest.mark.parametrize(
    ("rows", "line", "what"),
    [
        ("name\tiso639_3\nGerman\tgsw\n", 2, "means German (de) already"),
        ("name\tiso639_3\nFranconian\tgsw\nSwiss\tSW\n", 3, "iso639_3 'SW' is not three small letters"),
        ("name\tiso639_3\nFranconian\tgsw\n\nSwiss\tdeu\n", 4, "'deu' means German (de) already"),
        ("name\tiso639_3\tcode\nSwiss\tgsw\tde\n", 2, "'de' means German (de) already"),
        ("name\tiso639_3\talso\nSwiss\tgsw\tDutch\n", 2, "'dutch' means Flemish (nl) already"),
        ("name\tnllb\nSwiss\tdeu_Latn\n", 2, "means German (de) already"),
        ("name\tiso639_3\nSwiss\tgsw\nOther\tgsw\n", 3, "'gsw' means Swiss (gsw) already"),
        ("name\tiso639_3\nSwiss\tgsw\tdeu_Latn\n", 2, "3 columns, but the first line names 2"),
        ("name\tiso639_3\nSwiss gsw\n", 2, "no code"),
        ("name\tiso639_3\nSwiss, German\tgsw\n", 2, "without a comma"),
        ("name\tiso639_3\n../Swiss\tgsw\n", 2, "begins with a letter"),
        ("name\tiso639_3\n\tgsw\n", 2, "name ''"),
        ("name\tnllb\tiso639_3\nSwiss\tde\tgsw\n", 2, "a tag such as swh_Latn"),
        ("name\tiso639_3\tcode\nSwiss\tgsw\tgs-w\n", 2, "code 'gs-w'"),
        ("Swiss\tgsw\n", 1, "names the columns"),
        ("name\tiso\nSwiss\tgsw\n", 1, "names the columns"),
        ("name\tname\nSwiss\tgsw\n", 1, "names the columns"),
        ("", 1, "names the columns"),
        (b"name\tiso639_3\nSwiss\xff\tgsw\n", 2, "UTF-8"),
    ],
)
def test_a_faulty_row_is_one_line_with_file_and_line_and_changes_nothing(tmp_path, rows, line, what):
    path = tmp_path / "own.tsv"
    path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    before = dict(LANGUAGES)
    message = error_of(lambda: use_languages_file(str(path)))
    assert message.startswith(f"{path}:{line}: ") and what in message
    assert before == LANGUAGES and not own_languages()


CELLS = st.text(st.sampled_from("aäD_ (),/-\r\x85\u0301\u200b\t")) | st.sampled_from(["gsw", "de", "deu_Latn", "Swiss"])


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    st.lists(st.sampled_from(["name", "iso639_1", "iso639_3", "nllb", "m2m100", "code", "also", ""]), max_size=5),
    st.lists(st.lists(CELLS, max_size=6), max_size=3),
    st.binary(max_size=3),
)
def test_any_file_is_read_or_refused_in_one_line(tmp_path_factory, columns, rows, end):
    path = tmp_path_factory.getbasetemp() / "any.tsv"
    lines = "\n".join("\t".join(cells) for cells in (columns, *rows))
    path.write_bytes(lines.encode() + end)
    try:
        use_languages_file(str(path))
    except DataError as error:
        assert str(error).startswith(str(path)) and str(error).isprintable() and not own_languages()
    else:
        for language in own_languages():
            assert find_language(language.name) is find_language(f" {language.code} ") is language


def test_a_file_that_is_none_is_refused(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    for name, what in (("absent.tsv", "is missing"), ("", "is a folder"), ("pipe", "is a pipe")):
        message = error_of(lambda name=name: use_languages_file(str(tmp_path / name)))
        assert "--languages_file" in message and what in message
    write(tmp_path / "empty.tsv", "name\tiso639_3\n\n")
    assert "holds no languages" in error_of(lambda: use_languages_file(str(tmp_path / "empty.tsv")))


def own_data(root: Path) -> None:
    """Pairs, questions and a test set in Swiss German, and some in German."""
    for code, texts in (("gsw", ["grüezi", "merci", "uf wiederluege"]), ("de", ["hallo", "danke", "tschau"])):
        write(root / f"bilingual_pairs/en-{code}/train_100k.{code}", "".join(f"{text}\n" for text in texts * 4))
        write(root / f"bilingual_pairs/en-{code}/train_100k.en", "hello\nthanks\ngoodbye\n" * 4)
        write(root / f"evaluation/mgsm/mgsm_{code}.tsv", "Wieviel?\t3\nWie viel?\t12\n")
    rows = [{"lang": lang, "query": "Wieviel?", "response": "It is 3."} for lang in ("Alemannic", "gsw", "German")]
    write(root / "query_translation/math.json", json.dumps(rows))


def test_all_readers_take_an_own_language(own, tmp_path):
    own_data(tmp_path)
    use_languages_file(own)
    task, languages = find_task("math"), parse_languages("gsw")
    assert [e.target for e in StageData(task, "mapping", tmp_path, languages, 1).examples()] == ["hello"]
    rows = list(StageData(task, "augmentation", tmp_path).examples())
    assert [(row.id, row.language) for row in rows] == [
        ("gsw-1", "Swiss German"),
        ("gsw-2", "Swiss German"),
        ("de-1", "German"),
    ]
    assert [e.id for e in evaluation_examples(task, tmp_path, languages[0])] == ["gsw-1", "gsw-2"]


def tagged_tokenizers(folder: Path, llm: str):
    """The tokenizers of a tiny NLLB and of an LLM."""
    from transformers import NllbTokenizer

    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    NllbTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]).save_pretrained(folder)
    return load_tokenizers(str(folder), llm)


def test_processes_that_tokenise_know_own_languages_and_their_tags(own, tmp_path, tiny_llm):
    own_data(tmp_path)
    tokenizers = tagged_tokenizers(tmp_path / "nllb", tiny_llm)
    use_languages_file(own)
    limits = {"max_seq_len": 32, "max_gen_len": 32, "with_prompt": False}
    stage = StageData(find_task("math"), "mapping", tmp_path, parse_languages("gsw,de"))
    built = [
        open_or_build(stage, tokenizers, **limits, cache_dir=tmp_path / f"cache{number}", num_proc=number)
        for number in (1, 2)
    ]
    assert built[0].fingerprint == built[1].fingerprint and built[0].dataset[:] == built[1].dataset[:]
    tag = tokenizers.encoder.convert_tokens_to_ids("deu_Latn")
    assert {ids[0] for ids in built[1].dataset["encoder_ids"]} == {tag}
    assert built[1].counts["rows"] == {"Swiss German": 12, "German": 12}


def test_only_own_languages_that_the_rows_are_in_are_part_of_a_caches_name(own, tmp_path, tiny_llm):
    own_data(tmp_path)
    tokenizers = tagged_tokenizers(tmp_path / "nllb", tiny_llm)

    def fingerprint(stage: str, languages: str | None) -> str:
        data = StageData(find_task("math"), stage, tmp_path, parse_languages(languages) if languages else None)
        limits = {"max_seq_len": 32, "max_gen_len": 32, "with_prompt": False}
        return open_or_build(data, tokenizers, **limits, cache_dir=tmp_path / "cache").fingerprint

    german = fingerprint("mapping", "de")
    use_languages_file(own)
    swiss, all_rows = fingerprint("mapping", "gsw"), fingerprint("augmentation", None)
    assert fingerprint("mapping", "de") == german
    rows = own_languages()
    use_languages([rows[0], replace(rows[1], name="Voro")])
    assert fingerprint("mapping", "gsw") == swiss and fingerprint("augmentation", None) != all_rows
    use_languages([replace(rows[0], nllb="nld_Latn")])
    assert fingerprint("mapping", "gsw") != swiss


def test_every_rank_of_a_training_run_knows_own_languages(flags, own, tmp_path):
    own_data(tmp_path / "datas")
    short = [*flags, "--data_root", "datas", "--max_steps", "1", "--dev_size", "2", "--languages_file", own]
    runs = [
        [*short, "--languages", "gsw,de"],
        [*short, "--stage_name", "augmentation", "--languages", "Alemannic", "--dev_size", "0"],
        [*flags, "--data_root", "datas", "--languages", "gsw", "--max_steps", "1"],
    ]
    mapping, augmentation, without = run_many(tmp_path, runs, ranks=2)
    assert mapping["code"] == augmentation["code"] == 0, (mapping, augmentation)
    settings = json.loads((tmp_path / "outputs/MindMerger/math/mapping/args.json").read_text("utf-8"))
    assert settings["arguments"]["languages_file"] == own
    assert settings["data"]["counts"]["rows"] == {"Swiss German": 12, "German": 12}
    assert without["code"] == 2 and "unknown language 'gsw'" in without["printed"]


def test_an_evaluation_of_an_own_language_records_its_row_and_is_compared_without_the_file(
    own, tmp_path, tiny_llm, monkeypatch, capsys
):
    from mindmerger.evaluation import comparison_table
    from run_evaluation import main

    own_data(tmp_path / "datas")
    monkeypatch.chdir(tmp_path)
    call = ["--llm_only", "--llm_path", tiny_llm, "--languages", "gsw,de", "--max_new_tokens", "2", "--languages_file"]
    assert main([*call, own]) == main([*call, own, "--save_name", "other"]) == 0
    results = json.loads(Path("results/MindMerger/math_mgsm-llm_only/results.json").read_text("utf-8"))
    assert results["identity"]["--languages_file"] == [["Swiss German", "gsw", "deu_Latn", None, None]]
    assert list(results["languages"]) == ["Swiss German", "German"]
    assert main([*call, own]) == 0 and "holds this evaluation already" in capsys.readouterr().err
    write(tmp_path / "changed.tsv", OWN.replace("deu_Latn", "nld_Latn"))
    with pytest.raises(Exception, match="another row for Swiss German in --languages_file"):
        main([*call, "changed.tsv"])
    write(tmp_path / "datas/evaluation/mgsm/mgsm_vro.tsv", "Mitu?\t3\n")
    assert main([*call, own, "--languages", "gsw,de,vro"]) == 0
    assert "4 answers are kept" in capsys.readouterr().err
    folders = [f"results/{name}/math_mgsm-llm_only" for name in ("MindMerger", "other")]
    use_languages_file(None)
    assert main(["--compare", *folders]) == 0
    rows = [word for folder in folders for word in ("--row", f"{folder[8:13]}={folder}")]
    assert comparison_table.main([*rows, "--output_dir", "table"]) == 0
    assert "| Swiss German | de |" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# What is keyed by language


@pytest.mark.parametrize("language", LANGUAGES.values(), ids=lambda language: language.code)
def test_numbers_are_read_in_every_language(language):
    assert read_number("12", language.code) == 12
    assert read_number("1,234,567.5", language.code) == 1234567.5
    assert read_number("x = -3", language.code) == -3


@pytest.mark.parametrize(
    ("code", "comma"),
    [
        *((code, True) for code in ("ban", "ace_Latn", "lua", "ary")),
        ("acm", False),
        ("cni", False),
        ("zho_Hant", False),
    ],
)
def test_a_language_that_cldr_lacks_is_read_as_its_territory_writes_numbers(code, comma):
    """Balinese as Indonesian, Luba as French, Moroccan Arabic with Morocco's comma, Iraqi without."""
    assert read_number("12,34", code) == (12.34 if comma else 34)


def test_scripts_without_blanks_are_compared_by_characters():
    from mindmerger.analysis.contamination import splits_into_words

    unspaced = {language.code for language in LANGUAGES.values() if not splits_into_words(language)}
    assert unspaced == {"zh", "zho_Hant", "yue", "ja", "th", "lo", "km", "my", "shn", "bo", "dz"}


def test_help_and_exit_code_of_a_faulty_file(tmp_path):
    write(tmp_path / "own.tsv", "name\tiso639_3\nSwiss\n")
    for program in ("run_evaluation.py", "-m mindmerger.analysis.contamination --train x.txt"):
        command = [sys.executable, *program.split(), "--languages_file", str(tmp_path / "own.tsv")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1].count(f"{tmp_path}/own.tsv:2: the row has no code") == 1
