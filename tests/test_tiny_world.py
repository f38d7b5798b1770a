"""The quickstart's small world: its sentences, data files, tokenizers and models, and the shell scripts around them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import made_once

from scripts.tiny_world import __main__, templates
from scripts.tiny_world import models as tiny_world_models

ROOT = Path(__file__).resolve().parent.parent

SMALL = ["--pairs", "30", "--problems", "14", "--test_problems", "21", "--llm_steps", "2", "--encoder_steps", "2"]
SMALL += ["--llm_batch_size", "8", "--encoder_batch_size", "8"]
EXPERTS = ["--experts", "--expert_steps", "2", "--expert_batch_size", "4"]
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
    command = [sys.executable, "-m", "scripts.tiny_world", "--output_dir", str(folder), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, cwd=folder.parent, env=environment)
    # Decoded here: subprocess would make line ends of carriage returns.
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """A whole world whose models have seen two batches."""

    def build(folder):
        folder.mkdir()
        done = make(folder / "first", *SMALL)
        assert done.returncode == 0, done.stderr
        (folder / "first.log").write_bytes(done.stderr.encode())

    made = made_once(tmp_path_factory, "small_world", build)
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("world") / "own")) / "first"


@pytest.fixture(scope="module")
def world_with_experts(small_world, tmp_path_factory):
    """A copy of the small world, as if made before it had French, to which experts were added."""

    def build(folder):
        shutil.copytree(small_world, folder)
        (folder / "datas/evaluation/mgsm/mgsm_fr.tsv").unlink()
        done = make(folder, *EXPERTS)
        assert done.returncode == 0, done.stderr

    made = made_once(tmp_path_factory, "world_with_experts", build)
    return Path(shutil.copytree(made, small_world.with_name("with_experts")))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def all_problems():
    return [
        templates.Problem(kind, name, thing, numbers)
        for kind in range(len(templates.KINDS))
        for name in range(len(templates.NAMES))
        for thing in range(len(templates.THINGS))
        for numbers in [(12, 3, 5), (6, 2, 4), (15, 7, 7)]
    ]


def test_every_language_says_the_same_numbers_sentence_by_sentence():
    """A translation with another order or another number of sentences would be a wrong pair."""
    for problem in all_problems():
        english = [numbers_in(sentence) for sentence in problem.sentences("en")]
        for language in templates.EVALUATION_LANGUAGES:
            assert [numbers_in(sentence) for sentence in problem.sentences(language)] == english, (problem, language)
            assert not re.search(r"[{}\t\n]", problem.question(language))


def test_questions_of_all_languages_and_problems_differ():
    """A slot that a language forgets would make two different problems look alike."""
    problems = all_problems()
    for language in templates.EVALUATION_LANGUAGES:
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
    assert templates.russian_form(number, "few", "many") == form


def test_french_elides_before_vowels_and_only_there():
    for problem in all_problems():
        text = problem.question("fr")
        assert not re.search(r"\b(d|j|l|n|qu)e [aeiouhœ]", text, re.IGNORECASE), text
        assert not re.search(r"'[^aeiouœ]", text), text


def test_progress_in_a_log_file_is_whole_lines(small_world):
    """It was one line of half a thousand states, joined by carriage returns."""
    written = small_world.with_name("first.log").read_bytes().decode()
    for title in ("English LLM", "translating mT5"):
        assert re.search(rf"^{title}: +100%\|[^\r]*$", written, re.MULTILINE), written


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
    from mindmerger.tasks import find_task
    from mindmerger.tasks.examples import StageData, evaluation_examples
    from mindmerger.tasks.languages import find_language

    task, root = find_task("math"), small_world / "datas"
    foreign = [find_language(code) for code in templates.LANGUAGES if code != "en"]
    pairs = list(StageData(task, "mapping", root, foreign).examples())
    assert len(pairs) == 30 * 5
    queries = list(StageData(task, "augmentation", root).examples())
    assert len(queries) == 14 * 6
    english = {row.source for row in evaluation_examples(task, root, find_language("en"), None)}
    for code in templates.EVALUATION_LANGUAGES:
        rows = evaluation_examples(task, root, find_language(code), None)
        assert len(rows) == len({row.source for row in rows}) == 21
        for row, question in zip(rows, evaluation_examples(task, root, find_language("en"), None), strict=True):
            formula = next(formula for words, formula in FORMULAS.items() if words in question.source)
            right = str(formula(*numbers_in(row.source)))
            assert task.score(f"1+1=2. The answer is: {right}", row.target).correct
            assert not task.score(f"The answer is: {right}1", row.target).correct
    assert len(english) == 21


def test_french_is_nowhere_but_in_the_evaluation(small_world):
    """In training it would change what the quickstart takes and shows."""
    named = [str(path.relative_to(small_world)) for path in small_world.rglob("*fr*")]
    assert named == ["datas/evaluation/mgsm/mgsm_fr.tsv"]
    texts = [path.read_text("utf-8") for path in (small_world / "datas").rglob("train_100k.*")]
    texts.append((small_world / "datas/query_translation/math.json").read_text("utf-8"))
    texts += [(small_world / name / "tokenizer.json").read_text("utf-8") for name in ("llm", "mt5")]
    assert len(texts) == 13 and not any("œ" in text or "Combien" in text for text in texts)
    assert "Combien d'œufs" in (small_world / named[0]).read_text("utf-8")


def test_world_has_languages_enough_for_six_translations(small_world):
    from mindmerger.evaluation.parallel_input import ParallelInput, apply_parallel_input
    from mindmerger.tasks import find_task
    from mindmerger.tasks.examples import evaluation_examples
    from mindmerger.tasks.languages import find_language

    task, root = find_task("math"), small_world / "datas"
    script = (ROOT / "scripts" / "quickstart_compare.sh").read_text()
    extra = tuple(map(find_language, re.search(r"PARALLEL_LANGUAGES=(\S+)", script)[1].split(",")))
    for code in templates.LANGUAGES:
        examples = evaluation_examples(task, root, find_language(code))
        built, chosen = apply_parallel_input(task, root, examples, ParallelInput(6, languages=extra))
        assert len(chosen[templates.LANGUAGES[code]]) == 6 and "fr" in chosen[templates.LANGUAGES[code]]
        assert all(example.prompt.count("[French] ") == 1 for example in built)


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

    problem = templates.Problem(1, 5, 4, (13, 2, 7))
    for name in ("llm", "mt5"):
        tokenizer = AutoTokenizer.from_pretrained(small_world / name)
        for text in [*(problem.question(language) for language in templates.LANGUAGES), problem.solution()[0]]:
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


def test_same_seed_writes_the_same_bytes_and_another_seed_does_not(world_with_experts):
    """Made at once or with the experts added later: the same world."""
    again = world_with_experts.with_name("again")
    assert make(again, *SMALL, *EXPERTS).returncode == 0
    first, second = contents(world_with_experts), contents(again)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert templates.split_numbers(0) != templates.split_numbers(1)


def test_experts_are_added_and_the_world_stays_as_it_was(small_world, world_with_experts):
    before, after = contents(small_world), contents(world_with_experts)
    assert {name: after[name] for name in before} == before
    llm = {name.split("/")[1] for name in before if name.startswith("llm/")}
    assert after.keys() - before.keys() == {
        f"{expert}/{name}" for expert in ("math_expert", "language_expert") for name in llm
    }
    assert sorted(path.name for path in world_with_experts.iterdir()) == [
        "datas",
        "language_expert",
        "llm",
        "math_expert",
        "mt5",
    ]


def test_experts_differ_from_their_base_in_weights_alone(world_with_experts):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = [world_with_experts / name for name in ("llm", "math_expert", "language_expert")]
    base, *experts = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    vocabulary = AutoTokenizer.from_pretrained(folders[0]).get_vocab()
    weights = [model.state_dict() for model in (base, *experts)]
    for folder, expert in zip(folders[1:], experts, strict=True):
        assert json.loads((folder / "config.json").read_text()) == json.loads((folders[0] / "config.json").read_text())
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == vocabulary
        assert all(not value.equal(weights[0][name]) for name, value in expert.state_dict().items())
    assert all(not value.equal(weights[2][name]) for name, value in weights[1].items())


def test_experts_can_be_merged(world_with_experts, tmp_path):
    from transformers import AutoModelForCausalLM

    from mindmerger.baselines.layer_swap import main as layer_swap

    experts = [f"--{name}={world_with_experts / name}" for name in ("math_expert", "language_expert")]
    layer_swap([*experts, "--output", str(tmp_path / "merged")])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.num_hidden_layers == 3


@pytest.mark.parametrize("kind", ["math", "language"])
def test_expert_reads_its_own_texts_and_no_test_problem(small_world, monkeypatch, kind):
    """A math expert that reads the other languages, or a language expert that reads solutions, would be neither."""
    batches = []

    def record(model, given, loss_of, title, **rates):
        batches.extend(given)
        return 0.0

    monkeypatch.setattr(tiny_world_models, "optimise", record)
    _, tokenizer, _ = tiny_world_models.tune_expert(kind, small_world / "llm", 0, 10, 16)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for batch in batches for ids, _ in batch]
    assert len(texts) == 160
    assert all(("### Instruction:" in text and "The answer is:" in text) == (kind == "math") for text in texts)
    questions = (
        [re.search(r"Instruction:\s*(.*?)\s*### Response", text)[1] for text in texts] if kind == "math" else texts
    )
    assert {numbers_in(question) for question in questions} <= set(templates.split_numbers(0)[0])
    english = [bool(re.search(r"\b(How many|the)\b", question)) for question in questions]
    assert set(english) == {kind == "math"}
    if kind == "language":
        for marker in ("jumla", "Wie viele", "tiene", "Сколько", "多少"):
            assert any(marker in question for question in questions), marker


def test_experts_are_refused_where_they_do_not_fit_and_nothing_changes(small_world, world_with_experts, tmp_path):
    """Of another seed, they would have read this world's test problems."""
    (tmp_path / "note").write_text("mine")
    for folder, arguments, message in (
        (world_with_experts, EXPERTS, "language_expert exist already: add --overwrite"),
        (small_world, [*EXPERTS, "--seed", "1"], "mgsm_en.tsv does not follow from --seed 1"),
        (tmp_path, EXPERTS, "is not a finished small world"),
        (tmp_path, [*EXPERTS, "--overwrite"], "is not a finished small world"),
    ):
        before = contents(folder)
        refused = make(folder, *arguments)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1) and message in refused.stderr
        assert contents(folder) == before


def test_experts_that_could_not_be_finished_leave_the_earlier_ones(world_with_experts, monkeypatch):
    def half(base, folder, args):
        (folder / "math_expert").mkdir(parents=True)
        (folder / "math_expert" / "config.json").write_text("{}")
        raise KeyboardInterrupt

    before = contents(world_with_experts)
    monkeypatch.setattr(__main__, "write_experts", half)
    with pytest.raises(KeyboardInterrupt):
        __main__.main(["--output_dir", str(world_with_experts), "--experts", "--overwrite"])
    assert contents(world_with_experts) == before and not list(world_with_experts.glob(".*"))


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
    (tmp_path / "oldest.txt").write_text("one==0\n")
    for _ in range(2):
        assert source_setup(tmp_path, REQUIREMENTS=str(tmp_path / "oldest.txt")).returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 3 and calls[-1].endswith(f"-r {tmp_path}/oldest.txt")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/requirements.txt").write_text("two==1\n")
    # The tests' packages come on top, once, and again where another file may have replaced them.
    for more, installed in ((1, "tests/"), (1, None), (0, None), (1, None)):
        assert source_setup(tmp_path, **{"WITH_TESTS": "1"} if more else {}).returncode == 0
        new = (tmp_path / "calls").read_text().splitlines()[len(calls) :]
        names = [call.rsplit(f"{tmp_path}/", 1)[1] for call in new]
        assert names == (["requirements.txt", "tests/requirements.txt"] if installed else []), names
        calls += new


# ---------------------------------------------------------------------------------------------------------------------
# The comparison in the small world, with stand-ins for what takes minutes


def fake_command(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def fake_python(calls: Path) -> str:
    """A python that lacks no package, knows the task's name and some flags, and notes every other call down."""
    flags = "[[ $* == *build_parser* ]] && echo limit probe_prefix scoring && echo llm_only && echo && exit"
    task = "[[ $1 == -c ]] && echo math_mgsm && exit"
    return f'[[ $* == *safetensors* ]] && exit; {flags}; {task}; echo "$*" >>{calls}'


def test_comparison_makes_experts_once_and_hands_over_every_model(tmp_path):
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    shutil.copy(ROOT / "scripts" / "quickstart_compare.sh", scripts)
    (scripts / "setup_venv.sh").write_text("")
    (scripts / "quickstart.sh").write_text(f'echo "quickstart $QUICKSTART_DIR" >>{tmp_path}/calls\n')
    (scripts / "compare_all.sh").write_text(f'env >{tmp_path}/env; echo "compare $*" >>{tmp_path}/calls\n')
    fake_command(
        tmp_path / "bin" / "python",
        f'[[ $1 == -c ]] && echo 2 && exit; echo "$*" >>{tmp_path}/calls; mkdir -p w/math_expert w/language_expert',
    )
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "QUICKSTART_DIR": "w", "QUICKSTART_SEED": "5"}
    for _ in range(2):
        command = ["bash", "scripts/quickstart_compare.sh", "--overwrite"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    experts = "-m scripts.tiny_world --output_dir w --seed 5 --experts --overwrite"
    first = [f"quickstart {tmp_path}/w", experts, "compare --overwrite"]
    assert (tmp_path / "calls").read_text().splitlines() == [*first, first[0], first[2]]
    given = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    models = {"LLM_PATH": "math_expert", "BASE_PATH": "llm", "LANGUAGE_EXPERT": "language_expert", "MT_PATH": "mt5"}
    models |= {"MINDMERGER_LLM": "llm", "DATA_ROOT": "datas", "RESULTS_DIR": "comparison", "TRANSLATOR": "mt5"}
    assert {name: given[name] for name in models} == {name: f"w/{path}" for name, path in models.items()}
    assert given["PROBE_PREFIX"] == "shuffled"
    # The quickstart trains under these very names.
    quickstart = (ROOT / "scripts" / "quickstart.sh").read_text()
    for name, run in (("HARD_CHECKPOINT", "quickstart-hard"), ("SOFT_CHECKPOINT", "quickstart")):
        assert given[name] == f"w/outputs/{run}/math/augmentation"
        assert f'--init_checkpoint "$folder/outputs/{run}/math/augmentation"' in quickstart


def test_the_quickstart_ends_with_a_table_that_has_softs_own_control(tmp_path):
    """Soft above the LLM alone may be a learned prompt: with another question's prefix it has to fall."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    shutil.copy(ROOT / "scripts" / "quickstart.sh", scripts)
    (scripts / "setup_venv.sh").write_text("")
    for name in ("python", "deepspeed"):
        fake_command(tmp_path / "bin" / name, f'[[ $1 == -c ]] && echo 2 && exit; echo "$*" >>{tmp_path}/calls')
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "QUICKSTART_DIR": "w"}
    command = ["bash", "scripts/quickstart.sh"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, soft, control, table = (tmp_path / "calls").read_text().splitlines()
    assert soft.endswith("--augmentation True --init_checkpoint w/outputs/quickstart/math/augmentation")
    assert control == f"{soft} --probe_prefix shuffled"
    results = "w/results/quickstart/math_mgsm"
    rows = f"--row MindMerger-Soft={results} --row MindMerger-Soft, shuffled prefix={results}-prefix_shuffled"
    assert table.startswith("-m mindmerger.evaluation.comparison_table") and table.endswith(rows)


def test_comparison_refuses_a_folder_with_blanks_in_one_line(tmp_path):
    environment = os.environ | {"QUICKSTART_DIR": str(tmp_path / "my world")}
    command = ["bash", str(ROOT / "scripts" / "quickstart_compare.sh")]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "my world" in refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "suffix"), [({}, ""), ({"MINDMERGER_LLM": "other/llm/"}, " (with llm)")])
def test_mindmerger_rows_name_their_llm_where_it_is_not_the_others(tmp_path, given, suffix):
    """Unnamed, a reader would take the difference between two LLMs for the method's."""
    fake_command(tmp_path / "bin" / "python", fake_python(tmp_path / "calls"))
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "LLM_PATH": "expert", "MT_PATH": "mt5", **given}
    environment |= {"SOFT_CHECKPOINT": "soft", "RESULTS_DIR": str(tmp_path / "r")}
    command = ["bash", str(ROOT / "scripts" / "compare_all.sh")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *evaluations, table = (tmp_path / "calls").read_text().splitlines()
    assert f"--row MindMerger-Soft{suffix}={tmp_path}/r/compare/mindmerger-soft/math_mgsm" in table
    assert f"--missing MindMerger-Hard{suffix}=HARD_CHECKPOINT is not given" in table
    soft = [line for line in evaluations if "--init_checkpoint soft" in line]
    assert len(soft) == 1 and f"--llm_path {given.get('MINDMERGER_LLM', 'expert')} " in soft[0]
    assert sum("--llm_path expert " in f"{line} " for line in evaluations) == (4 if not given else 3)


def test_the_row_of_a_probe_stands_behind_soft_when_it_is_asked_for(tmp_path):
    fake_command(tmp_path / "bin" / "python", fake_python(tmp_path / "calls"))
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "LLM_PATH": "expert", "MT_PATH": "mt5"}
    environment |= {"SOFT_CHECKPOINT": "soft", "RESULTS_DIR": str(tmp_path / "r"), "PROBE_PREFIX": "shuffled"}
    environment |= {"LIMIT": "7"}  # for all rows
    command = ["bash", str(ROOT / "scripts" / "compare_all.sh")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *evaluations, table = (tmp_path / "calls").read_text().splitlines()
    plain, probe = [line for line in evaluations if "--init_checkpoint soft" in line]
    assert all("--limit 7" in line for line in evaluations)
    assert [line for line in evaluations if "--probe_prefix" in line] == [probe]
    assert "--probe_prefix" not in plain and probe.endswith("--augmentation True --probe_prefix shuffled")
    folders = f"{tmp_path}/r/compare/mindmerger-soft"
    expected = f"--row MindMerger-Soft={folders}/math_mgsm --row MindMerger-Soft, shuffled prefix={folders}-shuffled"
    assert f"{expected}-limit7/math_mgsm-prefix_shuffled --against" in table
    assert "shuffled prefix" not in table.split("--row MindMerger-Soft=")[0]


def compare_all(tmp_path: Path, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Runs the comparison with the real flags and programs that are only noted down."""
    real = f'[[ $1 == -c || $* == *config_file* ]] && exec "{sys.executable}" "$@"'
    fake_command(tmp_path / "bin" / "python", f'{real}; echo "$*" >>{tmp_path}/calls')
    (tmp_path / "calls").unlink(missing_ok=True)
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "LLM_PATH": "expert", "MT_PATH": "mt5"}
    environment |= {"SOFT_CHECKPOINT": "soft", "RESULTS_DIR": str(tmp_path / "r"), **variables}
    command = ["bash", str(ROOT / "scripts" / "compare_all.sh"), *arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    return done, calls


@pytest.mark.parametrize(
    ("arguments", "instead"),
    [
        (["--scoring", "likelihood"], "say SCORING=likelihood, generate or both before the script"),
        (["--limit", "3", "--scoring=likelihood"], "say SCORING=likelihood, generate or both before the script"),
        (["--adapter_path", "a"], "merge it into its LLM"),
        (["--probe_prefix=shuffled"], "say PROBE_PREFIX=shuffled or zero before the script"),
        (["--save_name", "mine"], "leave it out, every row has a name"),
        (["--results_dir=there"], "say RESULTS_DIR=FOLDER before the script"),
        (["--task", "xnli"], "say TASK=NAME before the script"),
        (["--llm_only"], "leave it out"),
        (["--llm_path=other"], "say LLM_PATH=FOLDER"),
        (["--mt_path", "other"], "say MT_PATH=FOLDER before the script"),
        (["--init_checkpoint=soft"], "say HARD_CHECKPOINT=FOLDER or SOFT_CHECKPOINT=FOLDER before the script"),
        (["--augmentation", "False"], "HARD_CHECKPOINT is evaluated without the prompt"),
    ],
)
def test_the_comparison_refuses_an_argument_in_which_its_rows_differ(tmp_path, arguments, instead):
    """With --scoring likelihood it read the folders of generated answers, old ones without a word."""
    done, calls = compare_all(tmp_path, *arguments)
    flag = next(word for word in arguments[-2:] if word.startswith("--") and word != "--limit").split("=")[0][2:]
    assert done.returncode == 2 and not calls and not (tmp_path / "r").exists()
    assert done.stderr.startswith(f"error: {flag} among the arguments is the script's own: ")
    assert instead in done.stderr and done.stderr.count("\n") == 1


def test_an_adapter_that_a_variable_names_would_be_for_all_rows_of_the_comparison(tmp_path):
    """It reached all rows, whose results then lay in other folders than the table was told."""
    done, calls = compare_all(tmp_path, ADAPTER_PATH="a")
    said = "error: a variable sets --adapter_path to 'a', which has no part in this comparison: unset it, an adapter"
    assert done.returncode == 2 and done.stderr.startswith(said) and not calls


def test_a_file_of_settings_reaches_every_row_of_the_comparison_but_may_not_say_what_they_differ_in(tmp_path):
    """CONFIG was ignored, which the script's head says it takes."""
    file = tmp_path / "settings.yaml"
    file.write_text("limit: 7\nper_device_eval_batch_size: 4\n")
    done, calls = compare_all(tmp_path, CONFIG=str(file), PROBE_PREFIX="shuffled")
    assert done.returncode == 0, done.stderr
    *evaluations, table = calls
    assert len(evaluations) == 5 and all("--limit 7 --eval_batch_size 4" in call for call in evaluations)
    assert "/compare/mindmerger-soft-shuffled-limit7/math_mgsm-prefix_shuffled" in table
    done, calls = compare_all(tmp_path, CONFIG=str(file), LIMIT="3")
    assert all("--limit 3 --eval_batch_size 4" in call for call in calls[:-1])
    file.write_text("limit: 7\nscoring: likelihood\n")
    done, calls = compare_all(tmp_path, CONFIG=str(file))
    assert done.returncode == 2 and not calls
    expected = (
        "error: scoring in the file that CONFIG names is the script's own: say SCORING=likelihood, generate or both"
    )
    assert done.stderr == f"{expected} before the script\n"


def test_the_comparison_finds_the_results_of_a_mapping_that_has_an_adapter(tmp_path):
    """Their folder ends in -adapter: the table was told of one that nobody had written."""
    soft = tmp_path / "r/compare/mindmerger-soft"
    for folder in (soft / "math_mgsm-adapter", tmp_path / "r/compare/task-llm/math_mgsm-llm_only-adapter"):
        folder.mkdir(parents=True)
        (folder / "results.json").write_text("{}")
    _, calls = compare_all(tmp_path)
    assert f"--row MindMerger-Soft={soft}/math_mgsm-adapter --against" in calls[-1]
    assert f"--row task LLM alone={tmp_path}/r/compare/task-llm/math_mgsm-llm_only --missing" in calls[-1]
    (soft / "math_mgsm").mkdir()
    (soft / "math_mgsm/results.json").write_text("{}")
    done, calls = compare_all(tmp_path)
    reason = f"{soft}/math_mgsm and {soft}/math_mgsm-adapter are both there: remove the one of another checkpoint"
    assert done.returncode == 0 and f"--missing MindMerger-Soft={reason} --against" in calls[-1]


def test_a_larger_limit_keeps_the_row_of_another_question_s_prefix(tmp_path):
    """Of more rows every row's partner is another, so that the evaluation refuses to extend what is there."""
    for arguments, variables, name in (
        ([], {}, "shuffled"),
        (["--limit=9"], {"LIMIT": "3"}, "shuffled-limit9"),
        ([], {"LIMIT": "3"}, "shuffled-limit3"),
        (["--limit", "9"], {"PROBE_PREFIX": "zero"}, "zero"),
    ):
        _, calls = compare_all(tmp_path, *arguments, **{"PROBE_PREFIX": "shuffled", **variables})
        assert f"--save_name mindmerger-soft-{name} " in calls[-2]
        assert f"/compare/mindmerger-soft-{name}/math_mgsm-prefix_{name.split('-')[0]} --against" in calls[-1]
