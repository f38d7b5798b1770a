"""One rule for the dtype of the frozen models in training and evaluation: what auto finds, prints and records."""

import json

import pytest
import torch
from conftest import run_many

from mindmerger.evaluation import flags as evaluation_flags
from mindmerger.evaluation import settings as evaluation_settings
from mindmerger.model.mapping_files import read_config
from mindmerger.model.mindmerger import MindMerger
from mindmerger.runtime import precision
from mindmerger.training import flags as training_flags
from mindmerger.training import settings as training_settings


def parsers():
    """The parsers of both programs."""
    return training_flags.build_parser(), evaluation_flags.build_parser()


def cpu_with(monkeypatch, avx512_bf16=False, amx=False):
    """Makes torch see a CPU with or without these instructions, and no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


def gpu_of(monkeypatch, capability):
    """Makes torch see an NVIDIA GPU of a compute capability."""
    properties = type("Properties", (), {"major": capability[0], "minor": capability[1]})()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)  # by emulation, on any
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ({}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({"amx": True}, "bf16"),
        ((7, 5), "fp32"),  # torch emulates bf16 there, and says that it is supported unless asked without emulation
        ((8, 0), "bf16"),
        ((9, 0), "bf16"),
    ],
)
def test_auto_takes_bf16_where_the_device_multiplies_in_it_and_a_given_value_counts(monkeypatch, device, expected):
    on_gpu = isinstance(device, tuple)
    if on_gpu:
        gpu_of(monkeypatch, device)
    else:
        cpu_with(monkeypatch, **device)
    assert precision.settle_precision("auto", on_gpu) == expected
    assert [precision.settle_precision(given, on_gpu) for given in ("bf16", "fp32")] == ["bf16", "fp32"]


def test_both_programs_have_one_flag_with_one_default():
    one, other = ({a.dest: a for a in parser._actions}["precision"] for parser in parsers())
    assert (one.choices, one.default, one.help) == (other.choices, other.default, other.help)
    assert (one.choices, one.default) == (("auto", "bf16", "fp32"), "auto")


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_both_programs_settle_on_the_same_and_print_it(flags, datas, tmp_path, monkeypatch, capsys, native, expected):
    cpu_with(monkeypatch, avx512_bf16=native)
    auto = ["--precision", "auto"]
    args = training_settings.parse([*flags, *auto, "--output_dir", str(tmp_path)])
    args.precision = training_settings.settle_precision(args)
    llm = flags[flags.index("--llm_path") + 1]
    given = ["--llm_only", "--llm_path", llm, "--data_root", datas, "--languages", "en", "--limit", "1", *auto]
    settings = evaluation_settings.settle(evaluation_flags.build_parser().parse_args(given), on_gpu=False)
    assert (args.precision, settings.precision, settings.identity["--precision"]) == (expected, expected, expected)
    assert capsys.readouterr().err.count(f"--precision auto: {expected}, since this CPU") == 2


def test_a_dry_run_without_a_gpu_assumes_the_one_that_its_hours_are_for(flags, monkeypatch, capsys):
    cpu_with(monkeypatch)
    args = training_settings.parse([*flags, "--precision", "auto", "--dry_run"])
    assert training_settings.settle_precision(args) == "bf16"
    assert "--precision auto: bf16, as on an A100" in capsys.readouterr().err


def test_rank_0_s_device_decides_for_all_ranks(monkeypatch):
    cpu_with(monkeypatch)
    monkeypatch.setattr(precision, "broadcast_object", lambda own: {"fp32": "bf16"}[own])  # rank 0 has found bf16
    assert precision.settle_precision("auto", False) == "bf16"


def test_a_checkpoint_of_the_other_precision_is_refused_with_the_flag_to_pass_and_it_then_resumes(flags, tmp_path):
    """A run begun on a GPU and resumed on a laptop, where auto finds fp32; or the other way round."""
    found = precision.settle_precision("auto", torch.cuda.is_available())
    other = {"bf16": "fp32", "fp32": "bf16"}[found]
    auto = [*flags, "--precision", "auto", "--dev_size", "0", "--max_steps", "2", "--allow_changed", "max_steps"]
    first, refused, resumed = run_many(
        tmp_path,
        [[*auto, "--precision", other, "--max_steps", "1"], auto, [*auto, "--precision", other]],
    )
    assert first["code"] == 0, first
    expected = f"trained with another precision ('{other}', this run has '{found}' - pass --precision {other}): use the"
    assert refused["code"] == 2 and expected in refused["error"] and "\n" not in refused["error"]
    assert resumed["code"] == 0, resumed
    folder = tmp_path / "outputs/MindMerger/math/mapping"
    assert json.loads((folder / "args.json").read_text())["arguments"]["precision"] == other
    assert json.loads((folder / "checkpoint-000002/state.json").read_text())["identity"]["precision"] == other
    assert read_config(str(folder)).precision == other


def test_an_evaluation_in_another_precision_than_the_mapping_s_says_so_and_goes_ahead(
    tiny_encoder, tiny_llm, datas, tmp_path, capsys
):
    model = MindMerger.from_models(tiny_encoder, tiny_llm)
    said = {}
    for recorded in (None, "fp32", "bf16"):
        model.config.precision = recorded
        model.save_pretrained(tmp_path / str(recorded))
        given = ["--init_checkpoint", str(tmp_path / str(recorded)), "--data_root", datas, "--languages", "en"]
        given += ["--limit", "1", "--precision", "fp32"]
        settings = evaluation_settings.settle(evaluation_flags.build_parser().parse_args(given), on_gpu=False)
        assert settings.precision == "fp32"
        said[recorded] = "was trained with --precision bf16, now evaluated with fp32" in capsys.readouterr().err
    assert said == {None: False, "fp32": False, "bf16": True}
