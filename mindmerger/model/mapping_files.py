"""Mapping files: our folder (config.json, mapping.safetensors, model card) and the released `pytorch_model.bin`.

A released file is unpickled with `weights_only=True` only; anything else in it is refused unread.
"""

import dataclasses
import os
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load

from mindmerger.bridges import BRIDGES, Bridge
from mindmerger.hub.model_files import (
    ModelError,
    begins_as_zip,
    load_config,
    model_path,
    one_line,
    read_json_object,
    refuse_unreadable,
)
from mindmerger.runtime.files import write_bytes_atomic

FORMAT_VERSION = 1
MAPPING_FILE = "mapping.safetensors"
RELEASED_FILE = "pytorch_model.bin"
CONFIG_FILE = "config.json"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class MindMergerConfig:
    """Content of `config.json` beside a mapping: which models it belongs to and what it was trained for."""

    mt_path: str | None
    llm_path: str
    encoder_width: int | None
    llm_width: int
    stage: str | None = None
    task: str | None = None
    augmentation: bool | None = None
    model_type: str = "mindmerger"
    format_version: int = FORMAT_VERSION
    bridge: str = "mindmerger"  # folders without the entry are older and hold this one


def find_bridge(name: str) -> type[Bridge]:
    """The class of a bridge, by the name in `config.json`.

    Raises:
        ModelError: for a name that is not in `BRIDGES`, listing those that are.
    """
    if name not in BRIDGES:
        raise ModelError(f"unknown bridge {name!r}: choose one of {', '.join(BRIDGES)}")
    return BRIDGES[name]


def build_bridge(config: MindMergerConfig) -> Bridge:
    """A fresh bridge between the two models of `config`."""
    return find_bridge(config.bridge)(config.encoder_width, config.llm_width)


def empty_bridge(config: MindMergerConfig) -> Bridge:
    """The bridge of `config` without storage: asked for names, shapes and prefix lengths before weights load."""
    with torch.device("meta"):
        return build_bridge(config)


def config_of_models(mt_path: str, llm_path: str, bridge: str = "mindmerger") -> MindMergerConfig:
    """The configuration of a bridge between two models, from their configs alone.

    Raises:
        ModelError: when one of them has no usable config.
    """
    llm, encoder = load_config(llm_path).get_text_config(), load_config(mt_path)
    return MindMergerConfig(
        mt_path=model_path(mt_path),
        llm_path=model_path(llm_path),
        encoder_width=encoder.get_text_config(encoder=encoder.is_encoder_decoder or None).hidden_size,
        # OPT-350m's embeddings are narrower than its layers.
        llm_width=getattr(llm, "word_embed_proj_dim", None) or llm.hidden_size,
        bridge=bridge,
    )


def read_config(path: str) -> MindMergerConfig | None:
    """The `config.json` of a saved mapping, given its folder or a file in it; None where there is none of ours.

    Raises:
        ModelError: when it is there but cannot be read, or comes from a newer format.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    values = read_json_object(file)
    if values.get("model_type") != "mindmerger":
        return None
    known = {field.name: field.type for field in dataclasses.fields(MindMergerConfig)}
    for name, value in values.items():
        if name in known and not (isinstance(value, known[name]) and _could_name_a_file(value)):
            raise ModelError(f"{file}: {name} cannot be {str(value)[:80]!r}")
    if values.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
        raise ModelError(f"{file} has format version {values['format_version']}, this program knows {FORMAT_VERSION}")
    try:
        return MindMergerConfig(**{name: value for name, value in values.items() if name in known})
    except TypeError as error:
        raise ModelError(f"{file} is incomplete: {one_line(error)}") from error


def _could_name_a_file(value) -> bool:
    """False for a text with a NUL or half a surrogate pair, which the system's calls refuse in a path."""
    try:
        return not isinstance(value, str) or b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def find_mapping_file(path: str) -> Path:
    """The file a mapping is read from, given itself or its folder.

    Raises:
        ModelError: when there is none, listing what the folder holds.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ModelError(f"no mapping at {path}: pass a saved folder, a .safetensors file or a pytorch_model.bin")
    for name in (MAPPING_FILE, RELEASED_FILE):
        if (path / name).is_file():
            return path / name
    there = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
    raise ModelError(f"{path} holds neither {MAPPING_FILE} nor {RELEASED_FILE} (it holds: {there})")


def read_mapping(path: str) -> dict[str, torch.Tensor]:
    """Reads a mapping's tensors, without executing anything a file may contain.

    Raises:
        ModelError: when the file cannot be read or is a pickle of more than tensors.
    """
    file = find_mapping_file(path)
    refuse_unreadable(file)
    if file.suffix == ".safetensors":
        try:
            return load(file.read_bytes())  # not by name: the library opens no path that is not UTF-8
        except (OSError, safetensors.SafetensorError) as error:
            raise ModelError(f"{file} cannot be read: {one_line(error)}") from error
    begins_as_zip(file)
    try:
        with warnings.catch_warnings(action="ignore"):  # about the pickle's protocol, before the error that matters
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{file} is not a plain file of tensors and was not read, since unpickling it could run code: if you trust "
            "its origin, save its tensors alone with safetensors.torch.save_file and pass that"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{file} cannot be read, it may be cut short: {one_line(error)}") from error
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{file} holds no 'model_state_dict' of tensors, as released mappings do")
    return dict(state)


def check_mapping(path: str, config: MindMergerConfig) -> dict[str, torch.Tensor]:
    """Reads a mapping and makes sure that it fits the two models of `config`; needs no model.

    Raises:
        ModelError: naming both shapes and both models, the parameters that are missing or too many, or the first one
            that is not a plain tensor of floating-point numbers or has values that are not finite.
    """
    state = read_mapping(path)
    expected = {name: tuple(p.shape) for name, p in empty_bridge(config).named_parameters()}
    if state.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
        raise ModelError(f"{path} is not a mapping: missing {missing or 'nothing'}, unknown {extra or 'nothing'}")
    for name, shape in expected.items():
        _refuse_other_than_numbers(path, name, state[name])
        if tuple(state[name].shape) != shape:
            raise ModelError(
                f"{path}: {name} has shape {tuple(state[name].shape)} but encoder {config.mt_path} (width "
                f"{config.encoder_width}) and LLM {config.llm_path} (width {config.llm_width}) need {shape}: pass the "
                "models this mapping was trained with"
            )
        if not torch.isfinite(state[name].float()).all():  # as fp32, which the mapping is
            raise ModelError(
                f"{path}: {name} has values that are NaN or infinite: the file is damaged or its training diverged; "
                "take an earlier checkpoint, or train again with a lower --lr"
            )
    return state


def _refuse_other_than_numbers(path: str, name: str, tensor: torch.Tensor) -> None:
    """Refuses a tensor without plain storage or of a dtype whose values are not a mapping's, such as float8 codes."""
    if tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided or tensor.dtype not in DTYPES:
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_meta:
            kind += " without values (meta)"
        elif tensor.is_nested or tensor.layout != torch.strided:
            kind += " in a nested or sparse layout"
        raise ModelError(
            f"{path}: {name} is {kind}: a mapping is read from dense tensors in "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}, save it as one of these"
        )


def save_released(path: str, state: dict[str, torch.Tensor]) -> None:
    """Writes a mapping in the released code's format, whole or not at all."""
    import io

    buffer = io.BytesIO()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    torch.save({"model_state_dict": tensors}, buffer, _use_new_zipfile_serialization=False)
    write_bytes_atomic(path, buffer.getvalue())


def _model_card(config: MindMergerConfig, tensors: dict[str, torch.Tensor]) -> str:
    parameters = sum(tensor.numel() for tensor in tensors.values())
    form = {True: "Soft (mapped source and prompt)", False: "Hard (mapped source only)", None: "not recorded"}
    return f"""---
library_name: mindmerger
tags: [mindmerger, multilingual]
---

# MindMerger mapping

A mapping of {parameters:,} parameters from the states of the multilingual encoder `{config.mt_path}` (width
{config.encoder_width}) into the input embeddings of the LLM `{config.llm_path}` (width {config.llm_width}).
Both models stay as they are; only this mapping was trained.

| | |
|---|---|
| task | {config.task or "not recorded"} |
| stage | {config.stage or "not recorded"} |
| form | {form[config.augmentation]} |

```python
from modeling_mindmerger import MindMerger

model = MindMerger.from_pretrained("this/folder")
```

Method: Huang et al., "MindMerger: Efficiently Boosting LLM Reasoning in non-English Languages", NeurIPS 2024,
arXiv 2405.17386.
"""
