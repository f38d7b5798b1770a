"""The quickstart's small world: its sentences, data files, tokenizers and models, and the shell scripts around them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import tiny_world_templates as world  # noqa: E402

SMALL = ["--pairs", "30", "--problems", "14", "--test_problems", "21", "--llm_steps", "2", "--encoder_steps", "2"]
SMALL += ["--llm_batch_size", "8", "--encoder_batch_size", "8"]
# What each kind of problem asks, written down a second time.
FORMULAS = {
    "gives away": lambda a, b, c: a + b - c,
    "on Tuesday": lambda a, b, c: a + b + c,
    "in the shop": lambda a, b, c: a - b - c,
    "then finds": lambda a, b, c: a - b + c,
    "in each box": lambda a, b, c: a + b * c,
    "cannot come": lambda a, b, c: (a - b) * c,
    "takes out": lambda a, b, c: a * b - c,
}


def numbers_in(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "make_tiny_world.py"), "--output_dir", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """A whole world whose models have seen two batches."""
    folder = tmp_path_factory.mktemp("world") / "first"
    done = make(folder, *SMALL)
    assert done.returncode == 0, done.stderr
    return folder


def all_problems():
    return [
        world.Problem(kind, name, thing, numbers)
        for kind in range(len(world.KINDS))
        for name in range(len(world.NAMES))
        for thing in range(len(world.THINGS))
        for numbers in [(12, 3, 5), (6, 2, 4), (15, 7, 7)]
    ]


def test_every_language_says_the_same_numbers_sentence_by_sentence():
    """A translation with another order or another number of sentences would be a wrong pair."""
    for problem in all_problems():
        english = [numbers_in(sentence) for sentence in problem.sentences("en")]
        for language in world.LANGUAGES:
            assert [numbers_in(sentence) for sentence in problem.sentences(language)] == english, (problem, language)
            assert not re.search(r"[{}\t\n]", problem.question(language))


def test_questions_of_all_languages_and_problems_differ():
    """A slot that a language forgets would make two different problems look alike."""
    problems = all_problems()
    for language in world.LANGUAGES:
        assert len({problem.question(language) for problem in problems}) >= len(problems) * 0.85
    by_thing = {problem.question("ru") for problem in problems}
    assert by_thing.isdisjoint(problem.question("en") for problem in problems)


def test_solutions_calculate_what_the_question_asks():
    for problem in all_problems():
        formula = next(formula for words, formula in FORMULAS.items() if words in problem.question("en"))
        text, answer = problem.solution()
        assert answer == formula(*problem.numbers) >= 0
        assert text.endswith(f"The answer is: {answer}")
        for left, operator, right, result in re.findall(r"(\d+)([+*-])(\d+)=(\d+)\.", text):
            left, right = int(left), int(right)
            assert {"+": left + right, "-": left - right, "*": left * right}[operator] == int(result)


@pytest.mark.parametrize(
    ("number", "form"), [(2, "few"), (4, "few"), (5, "many"), (11, "many"), (14, "many"), (20, "many")]
)
def test_russian_nouns_follow_their_numeral(number, form):
    assert world.russian_form(number, "few", "many") == form


def test_train_and_test_share_no_number_combination(small_world):
    """Read from the files, not from the code that splits: an unseen problem must be unseen in every file."""
    datas = small_world / "datas"
    tested = set()
    for path in (datas / "evaluation" / "mgsm").iterdir():
        tested |= {numbers_in(line.split("\t")[0]) for line in path.read_text("utf-8").splitlines()}
    trained = {numbers_in(row["query"]) for row in json.loads((datas / "query_translation" / "math.json").read_text())}
    for path in (datas / "bilingual_pairs").glob("*/*"):
        trained |= {numbers_in(line) for line in path.read_text("utf-8").splitlines()}
    assert {len(numbers) for numbers in tested} == {3}
    assert tested.isdisjoint(trained)


def test_project_readers_take_the_world_as_it_is(small_world):
    from data_utils import evaluation_examples, find_language, find_task, training_examples

    task, root = find_task("math"), small_world / "datas"
    foreign = [find_language(code) for code in world.LANGUAGES if code != "en"]
    pairs = list(training_examples(task, "mapping", root, foreign, None))
    assert len(pairs) == 30 * 5
    queries = list(training_examples(task, "augmentation", root, None, None))
    assert len(queries) == 14 * 6
    english = {row.source for row in evaluation_examples(task, root, find_language("en"), None)}
    for code in world.LANGUAGES:
        rows = evaluation_examples(task, root, find_language(code), None)
        assert len(rows) == len({row.source for row in rows}) == 21
        for row, question in zip(rows, evaluation_examples(task, root, find_language("en"), None), strict=True):
            formula = next(formula for words, formula in FORMULAS.items() if words in question.source)
            right = str(formula(*numbers_in(row.source)))
            assert task.score(f"1+1=2. The answer is: {right}", row.target).correct
            assert not task.score(f"The answer is: {right}1", row.target).correct
    assert len(english) == 21


def test_folders_load_as_ordinary_models(small_world):
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        MT5EncoderModel,
        MT5ForConditionalGeneration,
    )

    llm = AutoModelForCausalLM.from_pretrained(small_world / "llm")
    tokenizer = AutoTokenizer.from_pretrained(small_world / "llm")
    assert llm.config.model_type == "llama" and llm.config.vocab_size == len(tokenizer)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert llm.config.bos_token_id == tokenizer.bos_token_id and llm.config.eos_token_id == tokenizer.eos_token_id

    assert AutoConfig.from_pretrained(small_world / "mt5").model_type == "mt5"
    _, report = MT5ForConditionalGeneration.from_pretrained(small_world / "mt5", output_loading_info=True)
    assert not report["missing_keys"]
    encoder, tokenizer = (
        MT5EncoderModel.from_pretrained(small_world / "mt5"),
        AutoTokenizer.from_pretrained(small_world / "mt5"),
    )
    ids = tokenizer("У Анны 12 книг.", return_tensors="pt")["input_ids"]
    assert ids[0, -1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in ids
    assert torch.isfinite(encoder(ids).last_hidden_state).all()


def test_tokenizers_split_digits_and_lose_nothing(small_world):
    from transformers import AutoTokenizer

    problem = world.Problem(1, 5, 4, (13, 2, 7))
    for name in ("llm", "mt5"):
        tokenizer = AutoTokenizer.from_pretrained(small_world / name)
        for text in [*(problem.question(language) for language in world.LANGUAGES), problem.solution()[0]]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == text
            digits = [token for token in tokenizer.convert_ids_to_tokens(ids) if re.fullmatch(r".*[0-9].*", token)]
            assert [token for token in digits if not token.startswith("<0x")] == re.findall(r"\d", text)


def test_llm_has_only_read_english(small_world):
    """Its pieces come from English alone: other scripts reach it as bytes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_world / "llm")
    pieces = [piece for piece in tokenizer.get_vocab() if not piece.replace("▁", "").isascii()]
    assert pieces == []
    byte_pieces = tokenizer.tokenize("книга")
    assert [piece for piece in byte_pieces if not piece.startswith("<0x")] == ["▁"]


def test_same_seed_writes_the_same_bytes_and_another_seed_does_not(small_world):
    again = small_world.with_name("again")
    assert make(again, *SMALL).returncode == 0
    names = sorted(path.relative_to(small_world) for path in small_world.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for name in names:
        assert (small_world / name).read_bytes() == (again / name).read_bytes(), name
    assert world.split_numbers(0) != world.split_numbers(1)


def test_existing_folder_is_refused_and_kept(small_world):
    before = (small_world / "llm" / "config.json").read_bytes()
    refused = make(small_world, *SMALL)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1 and "--overwrite" in refused.stderr
    assert (small_world / "llm" / "config.json").read_bytes() == before


def test_numbers_below_one_are_refused_before_anything_is_written(tmp_path):
    refused = make(tmp_path / "none", "--llm_steps", "0")
    assert refused.returncode == 2 and "--llm_steps" in refused.stderr and refused.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def copy_setup(folder: Path) -> Path:
    """A project with nothing but requirements and setup_venv.sh, and a command that sources it."""
    (folder / "scripts").mkdir()
    (folder / "requirements.txt").write_text("one==1\n")
    script = folder / "scripts" / "setup_venv.sh"
    script.write_text((ROOT / "scripts" / "setup_venv.sh").read_text())
    return script


def source_setup(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    command = 'set -euo pipefail; source scripts/setup_venv.sh; echo "active: $VIRTUAL_ENV"'
    environment = {"PATH": "/usr/bin:/bin", **variables}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)


def test_setup_refuses_an_interpreter_that_is_not_one(tmp_path):
    copy_setup(tmp_path)
    refused = source_setup(tmp_path, PYTHON="/bin/false")
    assert refused.returncode != 0 and "PYTHON=/bin/false" in refused.stderr and refused.stderr.count("\n") == 1
    assert "active" not in refused.stdout and not (tmp_path / ".venv").exists()


def test_setup_installs_again_only_when_requirements_change(tmp_path):
    """A second start of the quickstart or of the tests must not wait for pip, and must not need a network."""
    copy_setup(tmp_path)
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "activate").write_text(f"VIRTUAL_ENV={tmp_path}/.venv\n")
    python = binaries / "python"
    python.write_text(
        f'#!/bin/bash\nif [[ "$*" == *"-m pip"* ]]; then echo "$*" >>{tmp_path}/calls; exit 0; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    for expected in (1, 1):
        done = source_setup(tmp_path)
        assert done.returncode == 0 and f"active: {tmp_path}/.venv" in done.stdout, done.stderr
        assert len((tmp_path / "calls").read_text().splitlines()) == expected
    (tmp_path / "requirements.txt").write_text("one==2\n")
    assert source_setup(tmp_path).returncode == 0
    assert len((tmp_path / "calls").read_text().splitlines()) == 2
