"""Low-rank adapters on the LLM: LoRA (Hu et al., arXiv 2106.09685) and DoRA (Liu et al., arXiv 2402.09353), by PEFT.

An adapter is a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`), which plain `peft` loads. What it is
travels as the values of that config: the layers it changes, and with it the names and shapes of its tensors, follow
from them and the LLM. PEFT is imported inside functions: it is an extra.
"""

import hashlib
import importlib.util
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn
from transformers import AutoModelForCausalLM

from mindmerger.bridges.base import nearest
from mindmerger.hub.model_configs import llm_config
from mindmerger.hub.model_files import ModelError, read_json_object, refuse_unreadable
from mindmerger.runtime.errors import one_line
from mindmerger.runtime.files import model_path, sha256_of_file, write_bytes_atomic, write_json_atomic
from mindmerger.runtime.processes import warn

ADAPTER_FOLDER = "adapter"  # beside a mapping
ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
KINDS = ("lora", "dora")
NAME = "default"  # PEFT's own, in the names of parameters but not in those of a file
PREFIX = "base_model.model."  # of a file's tensors, before the LLM's own names


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter folder that was checked against an LLM. values: its config. sha256: of both of its files."""

    folder: str
    values: dict
    sha256: str


def require_peft() -> None:
    """Makes sure that PEFT is installed.

    Raises:
        ModelError: naming what installs it.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError("adapters need the package peft: pip install peft")


def adapter_values(
    kind: str, rank: int, alpha: float, dropout: float, targets: list[str], llm_path: str | None
) -> dict:
    """Returns what PEFT needs to know of a new adapter, as its `adapter_config.json` will hold it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model_path(llm_path),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(targets),
        "use_dora": kind == "dora",
    }


def describe_adapter(values: dict) -> dict:
    """Returns the choices that make an adapter, by the names of their flags, as `config.json` and results hold them."""
    targets = values.get("target_modules")
    return {
        "adapter": "dora" if values.get("use_dora") else "lora",
        "adapter_rank": values.get("r"),
        "adapter_alpha": values.get("lora_alpha"),
        "adapter_dropout": values.get("lora_dropout"),
        "adapter_targets": targets if isinstance(targets, str) else sorted(targets or ()),
    }


def show_adapter(described: dict) -> str:
    """Returns what `describe_adapter` says in a few words."""
    kind = {"lora": "LoRA", "dora": "DoRA"}[described["adapter"]]
    targets = described["adapter_targets"]
    return (
        f"{kind}, rank {described['adapter_rank']}, alpha {described['adapter_alpha']}, dropout "
        f"{described['adapter_dropout']}, on {targets if isinstance(targets, str) else ', '.join(targets)}"
    )


def inject(llm: nn.Module, values: dict) -> None:
    """Puts a new adapter into an LLM, in place: it leaves every output equal to the bit, and its tensors are fp32.

    At ZeRO 3, inside of `sharded_loading`: DoRA reads the weights, and PEFT gathers them there.

    Raises:
        ModelError: for targets that the LLM does not have, and a config that PEFT refuses.
    """
    require_peft()
    from peft import PeftConfig, inject_adapter_in_model

    _check_targets(llm, values.get("target_modules"), values.get("base_model_name_or_path"))
    try:
        # A saved config has inference_mode, in which PEFT freezes what it puts in.
        inject_adapter_in_model(PeftConfig.from_peft_type(**values | {"inference_mode": False}), llm, NAME)
    except (TypeError, ValueError, AttributeError, KeyError, NotImplementedError) as error:
        llm_path = values.get("base_model_name_or_path")
        raise ModelError(f"PEFT refuses this adapter for {llm_path}: {one_line(error)}") from error
    for parameter in adapter_parameters(llm).values():
        parameter.data = parameter.data.float()  # steps of a small learning rate would vanish in bf16
    for layer in adapted_layers(llm).values():
        for name, magnitude in getattr(layer, "lora_magnitude_vector", {}).items():
            # PEFT took the norms in the LLM's dtype: in bf16 the adapter would not start as nothing.
            factors = {"lora_A": layer.lora_A[name].weight, "lora_B": layer.lora_B[name].weight}
            magnitude.update_layer(base_layer=layer.get_base_layer(), scaling=layer.scaling[name], **factors)


def _check_targets(llm: nn.Module, targets, llm_path) -> None:
    """Refuses names of layers that the LLM does not have: PEFT is content with one that it has."""
    if not isinstance(targets, list | tuple | set):
        return  # a pattern, which is PEFT's business
    linear = {name for name, module in llm.named_modules() if isinstance(module, nn.Linear)}
    known = sorted({name.rpartition(".")[2] for name in linear})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise ModelError(
                f"--adapter_targets {target}: the LLM {llm_path} has no linear layer of this name"
                f"{nearest(target, known)}: it has {', '.join(known)}"
            )


def adapted_layers(llm: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers that an adapter changes, by the LLM's own names for them."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in llm.named_modules() if isinstance(module, LoraLayer)}


def adapter_parameters(llm: nn.Module) -> dict[str, nn.Parameter]:
    """Returns an adapter's parameters by the names of its file."""
    found = {}
    for name, parameter in llm.named_parameters():
        if ".lora_" in name:
            # DoRA's magnitude is a module's weight, and a tensor by itself in a file.
            short = name.removesuffix(".weight") if ".lora_magnitude_vector." in name else name
            found[PREFIX + short.replace(f".{NAME}", "", 1)] = parameter
    return found


def set_mode(llm: nn.Module, training: bool) -> None:
    """Switches an adapter's dropout on or off; the layers under it stay in eval mode."""
    for layer in adapted_layers(llm).values():
        layer.train(training)
        # train() has gone down into the frozen layer as well.
        layer.get_base_layer().eval()


def empty_llm(llm_path: str, values: dict) -> nn.Module:
    """Returns the LLM of a folder with an adapter, without storage: asked for names and shapes before weights load."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(llm_config(llm_path)[0], trust_remote_code=False)
        inject(llm, values)
    return llm


def adapter_shapes(llm_path: str, values: dict) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of an adapter by its name in the file, from the LLM's config alone.

    Raises:
        ModelError: for targets that the LLM does not have, and a config that PEFT refuses.
    """
    return {name: tuple(one.shape) for name, one in adapter_parameters(empty_llm(llm_path, values)).items()}


def check_adapter(folder: str, llm_path: str) -> SavedAdapter:
    """Reads an adapter folder and makes sure that it is whole and belongs to the LLM; needs no weight of the LLM.

    Raises:
        ModelError: for a missing or damaged folder, another kind of adapter, and one of another LLM.
    """
    require_peft()
    values = read_adapter_config(folder)
    _refuse_other_llm(folder, values.get("base_model_name_or_path"), llm_path)
    try:
        expected = adapter_shapes(llm_path, values | {"base_model_name_or_path": llm_path})
    except ModelError as error:
        raise ModelError(f"the adapter {folder} does not fit: {error}") from error
    _check_tensors(folder, read_adapter(folder), expected, llm_path)
    return SavedAdapter(str(folder), values, adapter_sha256(folder))


def adapter_sha256(folder: str) -> str:
    """Returns the sha256 over those of an adapter's two files: the same tensors with another alpha are another one.

    Raises:
        ModelError: when one of them cannot be read.
    """
    digests = []
    for name in (ADAPTER_CONFIG, ADAPTER_FILE):
        refuse_unreadable(Path(folder) / name)
        digests.append(sha256_of_file(Path(folder) / name))
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def read_adapter_config(folder: str) -> dict:
    """Reads an adapter's config.

    Raises:
        ModelError: when the folder or the file is not there, or it is of another kind.
    """
    file = Path(folder) / ADAPTER_CONFIG
    if not Path(folder).is_dir():
        raise ModelError(f"no adapter folder {folder}: pass a folder with {ADAPTER_CONFIG} and {ADAPTER_FILE}")
    if not file.is_file():
        there = ", ".join(sorted(entry.name for entry in Path(folder).iterdir())[:10]) or "nothing"
        raise ModelError(f"{folder} holds no {ADAPTER_CONFIG} (it holds: {there}): pass an adapter's own folder")
    values = read_json_object(file)
    if values.get("peft_type") != "LORA":
        raise ModelError(f"{file}: peft_type is {str(values.get('peft_type'))[:40]!r}, only LORA adapters are read")
    return values


def read_adapter(folder: str) -> dict[str, torch.Tensor]:
    """Reads an adapter's tensors, by their names in the file.

    Raises:
        ModelError: when the file is not there or cannot be read.
    """
    file = Path(folder) / ADAPTER_FILE
    if not file.is_file():
        raise ModelError(f"the adapter {folder} lacks {ADAPTER_FILE}: fetch it too")
    refuse_unreadable(file)
    try:
        # Not by name: the library opens no path that is not UTF-8.
        return load(file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read, it may be cut short: {one_line(error)}") from error


def _check_tensors(folder: str, found: dict, expected: dict, llm_path: str) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        raise ModelError(
            f"the adapter {folder} does not fit the LLM {llm_path}: missing {missing[:3] or 'nothing'}, unknown "
            f"{extra[:3] or 'nothing'}: pass the LLM that it was trained on"
        )
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise ModelError(
                f"the adapter {folder}: {name} has shape {tuple(found[name].shape)}, the LLM {llm_path} needs {shape}: "
                "pass the LLM that it was trained on"
            )
        # As fp32, since isfinite does not know the 8-bit floats.
        if not found[name].is_floating_point() or not torch.isfinite(found[name].float()).all():
            raise ModelError(
                f"the adapter {folder}: {name} has values that are not finite numbers: the file is damaged or its "
                "training diverged; take an earlier one, or train again with a lower --lr"
            )


def _refuse_other_llm(folder: str, recorded, llm_path: str) -> None:
    """Refuses an adapter that names another LLM, unless it is the same one elsewhere.

    Raises:
        ModelError: naming both.
    """
    from mindmerger.model.towers import model_fingerprint

    # PEFT lets the entry be empty.
    if not isinstance(recorded, str) or not recorded:
        return
    recorded, llm_path = model_path(recorded), model_path(llm_path)
    if recorded == llm_path or Path(recorded).resolve() == Path(llm_path).resolve():
        return
    same_name = Path(recorded).name == Path(llm_path).name
    with suppress(ModelError):
        if Path(recorded).is_dir() and Path(llm_path).is_dir():
            # Two folders are told apart by content; a folder and a hub name only by the last part of their names.
            same_name = model_fingerprint(recorded) == model_fingerprint(llm_path)
    if not same_name:
        raise ModelError(
            f"the adapter {folder} was trained on the LLM {recorded}, not {llm_path}: pass that one (where it is the "
            f"same one elsewhere, correct base_model_name_or_path in {ADAPTER_CONFIG})"
        )
    warn(f"the adapter {folder} was trained on the LLM {recorded}, by its name the same as {llm_path}")


def add_adapter(model: nn.Module, values: dict) -> None:
    """Puts a new adapter on a `MindMerger`'s LLM, which changes nothing yet, and freezes the bridge.

    Args:
        values: as `adapter_values` returns them, or a PEFT folder's config.

    Raises:
        ModelError: for layers that the LLM does not have.
    """
    inject(model.llm, values)
    # The bridge too is frozen, as in MERLIN's last stage.
    model.adapter, model.config.adapter = values, describe_adapter(values)
    model.requires_grad_(False)
    for parameter in model.trained_parameters().values():
        parameter.requires_grad_(True)
    model.train(False)


def load_adapter(model: nn.Module, saved: SavedAdapter, read: bool = True) -> None:
    """Puts a saved adapter on a `MindMerger`'s LLM, for evaluation.

    Args:
        read: whether to read its tensors; else `load_trained` is to be given them.
    """
    add_adapter(model, saved.values)
    model.requires_grad_(False)
    if read:
        model.load_trained(read_adapter(saved.folder))


def save_adapter(folder: Path, values: dict, state: dict[str, torch.Tensor]) -> None:
    """Writes an adapter as PEFT does, each file whole or not at all."""
    from peft import PeftConfig

    full = PeftConfig.from_peft_type(**values | {"inference_mode": True}).to_dict()
    # JSON has no sets, and their order changes from one process to the next.
    plain = {name: sorted(one) if isinstance(one, set) else one for name, one in full.items()}
    # safetensors refuses tensors that are not contiguous.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_bytes_atomic(folder / ADAPTER_FILE, save(tensors, metadata={"format": "pt"}))
    write_json_atomic(folder / ADAPTER_CONFIG, plain)
