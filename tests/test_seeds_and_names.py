"""Demands of every command on --seed, and on a flag that names what it writes."""

import json

import pytest

from mindmerger.analysis import embeddings
from mindmerger.baselines import parallel_input
from mindmerger.evaluation import comparison_table
from mindmerger.runtime.command import check_save_name
from mindmerger.runtime.errors import UserError
from scripts.tiny_world import __main__ as tiny_world

COMMANDS = {
    "comparison_table": (comparison_table.main, ["--row", "A=a"]),
    "embeddings": (embeddings.main, ["--task", "math", "--init_checkpoint", "a"]),
    "parallel_input": (parallel_input.main, ["--task", "math", "--parallel_input", "1", "--translations", "aligned"]),
    "tiny_world": (tiny_world.main, ["--output_dir", "world"]),
}


@pytest.mark.parametrize("seed", ["-1", "99999999999999999999"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_seed_that_no_generator_takes_is_one_line_and_writes_nothing(name, seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main, flags = COMMANDS[name]
    with pytest.raises(UserError, match=rf"^--seed must be at least 0 and below 2\^64, not {seed}$"):
        main([*flags, "--seed", seed])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../../x", "/x", "", "a\u202eb"])
def test_a_table_is_not_written_outside_its_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "predictions").mkdir(parents=True)
    row = {"id": "th-0", "source": "s", "answer": "1", "correct": True}
    (tmp_path / "a/predictions/Thai.jsonl").write_text(json.dumps(row))
    results = {"task": "math_mgsm", "form": "llm_only", "languages": {"Thai": {"n": 1}}}
    (tmp_path / "a/results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="^--name '"):
        comparison_table.main(["--row", "A=a", "--output_dir", "out/tables", "--name", name])
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


@pytest.mark.parametrize("name", ["a\u200bb", "a\u202eb", "a\u2028b", "a\u2029b", "a\x7fb", "\ufeffa"])
def test_a_name_with_characters_that_no_terminal_shows_is_refused(name):
    with pytest.raises(UserError, match="--save_name .* has control characters or other invisible ones") as e:
        check_save_name(name)
    assert str(e.value).isprintable()


@pytest.mark.parametrize("name", ["\u3000", "\u00a0.\u2003", " ./ ", ". / .", "a/ /b", "a/ ./", " ../a", "./"])
def test_a_name_of_blanks_of_any_script_is_refused(name):
    with pytest.raises(UserError, match="--save_name .* names no folder"):
        check_save_name(name)


@pytest.mark.parametrize("name", ["run-1", "a/b", "数学 1", "größer", "a.b"])
def test_a_plain_name_of_any_script_is_taken(name):
    check_save_name(name)
