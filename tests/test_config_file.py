"""`--config` of both programs, and the second names of flags."""

import json

import pytest
from conftest import read_log, run_many

import run_evaluation
from mindmerger.evaluation import flags as evaluation_flags
from mindmerger.runtime.errors import UserError
from mindmerger.training import flags as training_flags
from mindmerger.training import settings as training_settings

PARSERS = {"training": training_flags.build_parser, "evaluation": evaluation_flags.build_parser}


@pytest.fixture
def parse(tmp_path):
    """Parses flags with a file of settings before them; `kind` is the program, and `.json` what is not a text."""

    def call(content, *more, kind="training", name=None):
        file = tmp_path / (name or ("settings.yaml" if isinstance(content, str) else "settings.json"))
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        args = vars(PARSERS[kind]().parse_args(["--config", str(file), *more]))
        assert args.pop("config") == str(file)
        return args

    return call


def by_flags(*words, kind="training") -> dict:
    args = vars(PARSERS[kind]().parse_args(words))
    del args["config"]
    return args


# -- what a file sets


def test_a_file_sets_what_its_names_set_as_flags(parse):
    text = (
        "# a comment\nlr: 1e-4\nepoch_num: 2\nlanguages: sw,th\naugmentation: false\ncompile: true\nliger: no\n"
        "bridge_option:\n  - a=1\n  - b=-2\nallow_changed: lr\ndev_size: auto\nhead_lr:\nsave_name: -x\n"
        "chat_template: auto\nquantization: nf4\n"
    )
    words = ["--lr", "1e-4", "--epoch_num", "2", "--languages", "sw,th", "--augmentation", "False", "--compile"]
    words += ["--bridge_option", "a=1", "--bridge_option", "b=-2", "--allow_changed", "lr", "--dev_size", "auto"]
    words += ["--chat_template", "auto", "--quantization", "nf4"]
    assert parse(text) == by_flags(*words, "--save_name=-x")
    text = "limit: 5\ncompare: [one, two]\nllm_only: yes\naugmentation: 'True'\n"
    expected = by_flags(
        *("--limit", "5", "--compare", "one", "two", "--llm_only", "--augmentation", "True"), kind="evaluation"
    )
    assert parse(text, kind="evaluation") == expected
    assert parse("") == parse("# nothing\n") == by_flags()


def test_a_value_is_the_text_that_stands_there_and_not_what_yaml_takes_it_for(parse):
    """To YAML 1.1 `no` is false, 007 is 7, 12:30 is 750, 1_0 is 10, and 2026-01-02 a date."""
    for text in ("no", "007", "12:30", "1_0", "2026-01-02", "0x10", "yes"):
        assert parse(f"save_name: {text}")["save_name"] == text
    assert parse("languages: no")["languages"] == "no"  # Norwegian
    assert parse("lr: 1e-4")["lr"] == 1e-4 and parse("lr: .5")["lr"] == 0.5


def test_flags_win_over_the_file_by_either_name_and_wherever_they_stand(parse, tmp_path):
    text = "lr: 1e-4\nepoch_num: 9\nbridge_option: [a=1, b=2]\n"
    args = parse(text, "--lr", "3e-4", "--bridge_option", "c=3", "--num_train_epochs=4")
    assert (args["lr"], args["epoch_num"], args["bridge_option"]) == (3e-4, 4, ["c=3"])
    args = training_flags.build_parser().parse_args(["--lr", "5e-4", "--config", str(tmp_path / "settings.yaml")])
    assert (args.lr, args.epoch_num) == (5e-4, 9)
    assert parse("learning_rate: 1e-4", "--lr", "2e-4")["lr"] == 2e-4
    assert parse("learning_rate: 1e-4")["lr"] == 1e-4


@pytest.mark.parametrize(
    "content, message",
    [
        ("learning_rat: 1", r"learning_rat: no such setting, did you mean learning_rate\? \(see .*--help\)$"),
        ("epoch-num: 1", r"epoch-num: no such setting, did you mean epoch_num\?"),
        ("colour: red", r"colour: no such setting \(see"),
        ("config: other.yaml", "config: no such setting"),
        ("help: true", "help: no such setting"),
        ("lr: fast", "lr: expected a finite number above 0, got 'fast'"),
        ("epoch_num: 0", "epoch_num: expected a whole number of at least 1, got '0'"),
        ("lr_scheduler: step", "lr_scheduler: invalid choice: 'step'"),
        ("compile: maybe", "compile: expected True or False, got 'maybe'"),
        ("lr:", "lr: takes one value, as on the command line, not null"),
        ("lr: [1, 2]", r"lr: takes one value, as on the command line, not \[\"1\", \"2\"\]"),
        ("save_name: {a: 1}", 'save_name: takes one value, as on the command line, not {"a": "1"}'),
        ("bridge_option: [[a]]", r"bridge_option: takes a list of texts, not \[\[\"a\"\]\]"),
        ("lr: 1\nseed: 1\nlr: 2", "settings.yaml cannot be read: lr is given twice"),
        ("lr: 1\nlearning_rate: 1", "lr and learning_rate name one setting: keep one of them"),
        ("lr: [1", "settings.yaml cannot be read: while parsing"),
        ("lr: !!python/object/apply:os.getcwd []", "settings.yaml cannot be read: could not determine a constructor"),
        ("- lr", "settings.yaml holds no settings: write one 'name: value' a line"),
        ("a: 1\n--- \nb: 2", "settings.yaml cannot be read: expected a single document"),
        ({"lr": "fast"}, "settings.json: lr: expected a finite number above 0"),
        ([1], "settings.json holds no settings"),
    ],
)
def test_what_a_file_may_not_hold_is_refused_in_one_line_with_file_and_key(parse, content, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(content, "--seed", "3")
    assert "settings." in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_value_is_refused_although_a_flag_wins_over_it(parse):
    with pytest.raises(UserError, match="lr: expected a finite number"):
        parse("lr: fast", "--lr", "1")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"save_name: \xe9\n")
    (tmp_path / "half.json").write_text('{"lr": ')
    for name, message in (
        ("none.yaml", "No such file"),
        ("", "Is a directory"),
        ("latin.yaml", "cannot be read: 'utf-8' codec"),
        ("half.json", "cannot be read: Expecting value"),
    ):
        with pytest.raises(UserError, match=f"^--config {tmp_path}.*{message}"):
            training_flags.build_parser().parse_args(["--config", str(tmp_path / name)])


# -- the record of an earlier run


def test_the_record_of_a_run_trains_it_again(flags, tmp_path):
    run = [*flags, "--max_steps", "2", "--eval_steps", "1", "--languages", "sw,th", "--seed", "4"]
    record = "outputs/MindMerger/math/mapping/args.json"
    first, second = run_many(tmp_path, [run, ["--config", record, "--save_name", "again"]])
    assert (first["code"], second["code"]) == (0, 0), second
    one, other = (tmp_path / "outputs" / name / "math/mapping" for name in ("MindMerger", "again"))
    assert read_log(one) == read_log(other) and len(read_log(one)) == 2
    before, after = (json.loads((folder / "args.json").read_text())["arguments"] for folder in (one, other))
    assert before | {"config": record, "save_name": "again"} == after


def test_the_record_of_an_evaluation_repeats_it_and_warns_of_nothing(tiny_llm, datas, tmp_path, monkeypatch, capsys):
    """--augmentation, which the LLM alone has no use for, stood in its record."""
    monkeypatch.chdir(tmp_path)
    few = ["--data_root", datas, "--languages", "sw", "--limit", "2", "--max_new_tokens", "3", "--precision", "fp32"]
    assert run_evaluation.main(["--llm_only", "--llm_path", tiny_llm, *few]) == 0
    record, other = (tmp_path / f"results/{name}/math_mgsm-llm_only/results.json" for name in ("MindMerger", "again"))
    capsys.readouterr()
    assert run_evaluation.main(["--config", str(record), "--save_name", "again"]) == 0
    assert "no use of" not in capsys.readouterr().err
    before, after = (json.loads(file.read_text()) for file in (record, other))
    assert before["identity"] == after["identity"] and before["languages"] == after["languages"]
    assert before["arguments"] | {"config": str(record), "save_name": "again"} == after["arguments"]


def test_a_record_repeats_neither_an_overwriting_nor_a_dry_run_nor_an_upload(parse):
    """A run that had been started over would have been removed by its own record, and its upload replaced."""
    started = {"overwrite_output_dir": True, "dry_run": True, "resume_from_checkpoint": "x", "allow_changed": ["lr"]}
    started |= {"push_to_hub": "me/it", "hub_private": True, "hub_license": "mit", "hub_dataset": ["a"]}
    record = {
        "arguments": by_flags("--lr", "1e-4") | started | {"local_rank": 3, "config": "gone.yaml"},
        "versions": {},
    }
    assert parse(record) == by_flags("--lr", "1e-4")
    record = {"arguments": by_flags("--limit", "3", kind="evaluation") | {"overwrite": True}, "identity": {}}
    assert parse(record, kind="evaluation") == by_flags("--limit", "3", kind="evaluation")


def test_the_record_of_another_program_is_refused(parse):
    with pytest.raises(UserError, match="settings.json is another program's record: there is no flag --"):
        parse({"arguments": by_flags()}, kind="evaluation")


# -- second names


@pytest.mark.parametrize(
    "second, first, value",
    [
        ("learning_rate", "lr", "1e-4"),
        ("lr_scheduler_type", "lr_scheduler", "cosine"),
        ("num_train_epochs", "epoch_num", "7"),
        ("per_device_train_batch_size", "train_micro_batch_size_per_gpu", "7"),
        ("per_device_eval_batch_size", "eval_batch_size", "7"),
        ("gradient_accumulation_steps", "gradient_accumulation", "7"),
        ("dataloader_num_workers", "num_workers", "7"),
        ("torch_compile", "compile", None),
        ("use_liger_kernel", "liger", None),
    ],
)
def test_hugging_face_s_name_of_a_flag_sets_it_and_both_at_once_are_refused(second, first, value):
    words = {name: [f"--{name}", *([value] if value else [])] for name in (second, first)}
    args = by_flags(*words[second])
    assert args == by_flags(*words[first]) != by_flags() and second not in args
    with pytest.raises(UserError, match=f"--{first} and --{second} name one setting: give one of them"):
        by_flags(*words[first], *words[second])
    if value:
        with pytest.raises(UserError, match=f"--{second} and --{first} name one setting"):
            by_flags(f"--{second}={value}", "--seed", "1", f"--{first}={value}")
        assert by_flags(f"--{second}={value}", f"--{second}={value}") == args  # one name twice: the last one wins


def test_the_batch_follows_from_gradient_accumulation_steps_as_at_hugging_face(monkeypatch, capsys):
    """By our own names the batch is the given number, whatever the accumulation: a habit would have trained with 24."""
    monkeypatch.setattr(training_settings, "world_size", lambda: 2)
    per_device = ["--per_device_train_batch_size", "4"]
    args = training_settings.parse([*per_device, "--gradient_accumulation_steps", "8"])
    assert args.train_batch_size == 64 and training_settings.settle_accumulation(args) == 8
    message = "--gradient_accumulation_steps 8: 64 examples in a step, 4 in a forward pass on each of 2 processes"
    assert message in capsys.readouterr().err
    given = [*per_device, "--gradient_accumulation_steps", "8", "--train_batch_size", "16"]
    assert training_settings.parse(given).train_batch_size == 16
    assert training_settings.parse([*per_device, "--gradient_accumulation", "8"]).train_batch_size == 24
    with pytest.raises(UserError, match="--gradient_accumulation_steps must be at least 1, not 0"):
        training_settings.parse(["--gradient_accumulation_steps", "0"])


def test_the_batch_follows_from_a_file_s_gradient_accumulation_steps_too(tmp_path):
    (tmp_path / "c.yaml").write_text("gradient_accumulation_steps: 8\nper_device_train_batch_size: 4\n")
    assert training_settings.parse(["--config", str(tmp_path / "c.yaml")]).train_batch_size == 32
    (tmp_path / "c.yaml").write_text("gradient_accumulation_steps: 8\ntrain_batch_size: 24\n")
    assert training_settings.parse(["--config", str(tmp_path / "c.yaml")]).train_batch_size == 24
