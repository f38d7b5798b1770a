"""Damaged mapping and model files that are refused in one line, with the file's name and the cause."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mindmerger.baselines.model_folder import open_model
from mindmerger.hub.model_configs import load_config
from mindmerger.model.mapping_files import MindMergerConfig, check_mapping, empty_bridge, read_config, read_mapping
from mindmerger.model.towers import check_models
from mindmerger.runtime.errors import UserError

BETWEEN = MindMergerConfig(mt_path="encoder", llm_path="llm", encoder_width=16, llm_width=16)


def refusal(call, *arguments, **named) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def llm(tmp_path, tiny_llm):
    """A copy of the tiny LLM to damage."""
    return Path(shutil.copytree(tiny_llm, tmp_path / "llm"))


def edit_json(file, **changes):
    """Changes values of a JSON object in a file."""
    Path(file).write_text(json.dumps(json.loads(Path(file).read_text()) | changes))


def mapping_state() -> dict:
    """A mapping's tensors, all zero."""
    return {name: torch.zeros(p.shape) for name, p in empty_bridge(BETWEEN).named_parameters()}


def of_dtype(dtype):
    return lambda tensor: tensor.to(dtype)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (of_dtype(torch.float8_e4m3fn), "float8_e4m3fn"),
        (of_dtype(torch.int64), "int64"),
        (of_dtype(torch.bool), "bool"),
        (of_dtype(torch.complex64), "complex64"),
        (torch.Tensor.to_sparse, "float32 in a nested or sparse layout"),
        (lambda tensor: tensor.to("meta"), "float32 without values (meta)"),
    ],
)
def test_a_mapping_of_other_than_dense_floating_point_tensors_is_refused_by_name_and_dtype(tmp_path, damage, named):
    state = mapping_state()
    state["end_boundary"] = damage(state["end_boundary"])
    file = tmp_path / "mapping.bin"
    torch.save(state, file)
    message = refusal(check_mapping, str(file), BETWEEN)
    assert message.startswith(f"{file}: end_boundary is {named}: ")
    if state["end_boundary"].layout == torch.strided and not state["end_boundary"].is_meta:
        save_file(state, tmp_path / "mapping.safetensors")
        assert f": end_boundary is {named}: " in refusal(check_mapping, str(tmp_path / "mapping.safetensors"), BETWEEN)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_mapping_is_taken_in_every_floating_point_dtype_whose_values_fp32_can_hold(tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in mapping_state().items()}
    save_file(state, tmp_path / "mapping.safetensors")
    assert check_mapping(str(tmp_path / "mapping.safetensors"), BETWEEN).keys() == state.keys()
    if dtype == torch.float64:
        state["end_boundary"].fill_(1e300)
        save_file(state, tmp_path / "mapping.safetensors")
        assert "NaN or infinite" in refusal(check_mapping, str(tmp_path / "mapping.safetensors"), BETWEEN)


@pytest.mark.parametrize(
    ("name", "changes", "cause"),
    [
        ("generation_config.json", {"eos_token_id": [[2]]}, "eos_token_id must be a number or a list of numbers, not"),
        ("generation_config.json", {"eos_token_id": {"a": 2}}, "eos_token_id must be a number or a list of numbers"),
        ("generation_config.json", {"eos_token_id": True}, "eos_token_id must be a number or a list of numbers"),
        ("config.json", {"model_type": ["x"]}, 'model_type must be a text, not ["x"]'),
        ("config.json", {"model_type": {}}, "model_type must be a text, not {}"),
    ],
)
def test_a_value_of_the_wrong_kind_in_a_model_folder_is_refused_with_its_file(llm, name, changes, cause):
    edit_json(llm / name, **changes)
    assert refusal(check_models, None, str(llm), backward=False).startswith(f"{llm / name}: {cause}")


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b"])
def test_a_path_in_a_mapping_config_that_no_file_can_have_is_refused_with_its_file(tmp_path, path):
    known = {"llm_width": 16, "encoder_width": 16, "mt_path": "encoder", "model_type": "mindmerger"}
    (tmp_path / "config.json").write_text(json.dumps({**known, "llm_path": path}))
    assert refusal(read_config, str(tmp_path)).startswith(f"{tmp_path / 'config.json'}: llm_path cannot be 'a\\")


def test_a_config_value_of_the_wrong_type_is_refused_with_its_reason(llm):
    edit_json(llm / "config.json", vocab_size="many")
    message = refusal(load_config, str(llm))
    assert str(llm) in message and "vocab_size" in message and "'many'" in message


def test_text_in_the_place_of_torch_weights_is_refused_by_file_as_model_mapping_and_expert(llm):
    (llm / "model.safetensors").unlink()
    file = llm / "pytorch_model.bin"
    file.write_text("hello, these are not weights")
    for message in (
        refusal(check_models, None, str(llm), backward=False),
        refusal(read_mapping, str(file)),
        refusal(open_model, "math expert", str(llm)),
    ):
        assert message.startswith(f"{file} is not a file that torch saved")
