"""The frozen LLM's weights in 4 or 8 bits, by bitsandbytes: as `--quantization` asks, or as a folder holds them.

Its linear layers are quantised; embeddings, norms and the output head stay in the dtype of `--precision`. Gradients go
through to what is before the LLM. bitsandbytes is an extra.
"""

import copy
import importlib.util
import logging

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.auto import AutoQuantizationConfig

from mindmerger.hub.model_configs import load_config, own_quantisation, quantisation_method
from mindmerger.hub.model_files import ModelError
from mindmerger.runtime.errors import one_line
from mindmerger.runtime.precision import QUANTIZATIONS

PACKAGE = "bitsandbytes"
INSTALL = 'pip install "bitsandbytes>=0.50,<0.51"'
# NF4 in blocks of 64 weights with a scale in fp32, LLM.int8() with one for each row.
BLOCK = 64

# The first says at every product that int8 casts to fp16, the second at import that a kernel cannot be fetched from the
# hub, which nothing here needs.
for _name in ("autograd._functions", "backends.cpu.ops"):
    logging.getLogger(f"{PACKAGE}.{_name}").setLevel(logging.ERROR)


def settings_of(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Returns what transformers needs to quantise an LLM while it loads, None for "none".

    Args:
        dtype: of the arithmetic.

    Raises:
        ModelError: for an unknown kind, and without bitsandbytes.
    """
    if kind not in QUANTIZATIONS:
        raise ModelError(f"quantization {kind!r} is unknown: choose one of {', '.join(QUANTIZATIONS)}")
    if kind == "none":
        return None
    if importlib.util.find_spec(PACKAGE) is None:
        raise ModelError(f"--quantization {kind} needs the package bitsandbytes: {INSTALL}")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    # By name: the library's default, FP4, is far worse. Its scales stay whole: quantising them too saves 0.4 bits a
    # weight and rounds once more.
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def check_requested(path: str, config, kind: str) -> None:
    """Makes sure that an LLM can be quantised here while it loads, as `kind` says, before its weights are read.

    Raises:
        ModelError: for a folder whose weights are quantised already, and where bitsandbytes cannot be used.
    """
    settings = settings_of(kind, torch.float32)
    if settings is None:
        return
    if own_quantisation(config) is not None:
        raise ModelError(
            f"{path} is quantised already ({quantisation_method(config)}): leave --quantization {kind} out"
        )
    try:
        AutoHfQuantizer.from_config(settings, pre_quantized=False).validate_environment(device_map=None)
    except Exception as error:  # of many types: a package too old, no device that the library knows
        raise ModelError(f"--quantization {kind} cannot be used here: {one_line(error)}; {INSTALL}") from error


def refuse_quantised(path: str, what: str) -> None:
    """Refuses a model folder whose weights are quantised where they have to be numbers.

    Raises:
        ModelError: naming the method and `what` needs plain weights.
    """
    config = load_config(path)
    if own_quantisation(config) is not None:
        raise ModelError(
            f"{path} is quantised ({quantisation_method(config)}), and {what}: pass weights in bf16, fp16 or fp32"
        )


def computing_in(settings, dtype: torch.dtype | str):
    """Returns a folder's own settings with the arithmetic of its 4-bit layers in `dtype`; others as they are."""
    if not isinstance(settings, dict) or not settings.get("load_in_4bit") or not isinstance(dtype, torch.dtype):
        return settings
    return settings | {"bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}


def is_packed(parameter: nn.Parameter) -> bool:
    """Returns whether a parameter's numbers are codes of bitsandbytes, whatever dtype they are stored in."""
    return type(parameter).__name__ in ("Params4bit", "Int8Params")


def check_packed(path: str, model: nn.Module) -> None:
    """Makes sure that all layers which a folder calls quantised are so, and that this machine reads them right.

    Raises:
        ModelError: naming the first that is not.
    """
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt") and _scales(module) is None:
            raise ModelError(
                f"{path}: its config.json calls the weights quantised, but those of {name} have no scales: fetch the "
                "folder again, or remove quantization_config there and pass --quantization"
            )
        if type(module).__name__ == "Linear4bit" and _is_misread(module):
            width, block = module.in_features, module.weight.quant_state.blocksize
            raise ModelError(
                f"{path}: bitsandbytes misreads 4-bit layers on this CPU whose width is no multiple of {block}, such "
                f"as {name} ({width}): use int8 or no quantisation here, or a GPU"
            )


def _is_misread(layer: nn.Module) -> bool:
    """Returns whether a 4-bit layer's numbers come out otherwise than the same codes in one row: the kernel for AVX-512
    takes each row for the start of a block."""
    from bitsandbytes import functional

    codes, state = layer.weight.data, layer.weight.quant_state
    if codes.device.type != "cpu" or state.shape[-1] % state.blocksize == 0:
        return False
    one_row = copy.copy(state)
    one_row.shape = torch.Size([state.shape.numel()])
    read = functional.dequantize_4bit(codes, state).flatten()
    return not torch.equal(read.nan_to_num(), functional.dequantize_4bit(codes, one_row).flatten().nan_to_num())


def _scales(layer: nn.Module) -> torch.Tensor | None:
    """Returns the scales of a quantised layer; of quantised scales, their own."""
    weight = layer.weight
    if type(weight).__name__ == "Params4bit":
        state = weight.quant_state
        return None if state is None else (state.state2 if state.nested else state).absmax
    # The first pass moves them from the parameter to the layer.
    found = getattr(weight, "SCB", None)
    return found if found is not None else layer.state.SCB if hasattr(layer, "state") else None


def finite(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Returns whether all numbers of a model's parameter are finite, those of codes by their scales."""
    if is_packed(parameter):
        parameter = _scales(model.get_submodule(name.rpartition(".")[0]))
    # isfinite does not know the 8-bit floats
    return bool(torch.isfinite(parameter.float() if parameter.element_size() == 1 else parameter).all())


def forbid_repacking(model: nn.Module) -> None:
    """Keeps 4-bit layers in one form on a CPU with AVX512-BF16.

    bitsandbytes would change it at the first pass without a gradient, such as an evaluation on the dev split, to one
    that computes in bf16 whatever the dtype, and through which no gradient goes.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def saved_bytes(config, kind: str, dtype: torch.dtype) -> int:
    """Returns how much less memory the quantised weights of an LLM take than in `dtype`, from its config alone; 0 where
    none is quantised by bitsandbytes.

    Args:
        kind: a value of --quantization; with "none" a folder's own settings count.
    """
    settings, own = settings_of(kind, dtype), own_quantisation(config)
    if settings is None and own is not None and quantisation_method(config) == PACKAGE:
        settings = AutoQuantizationConfig.from_dict(copy.deepcopy(own))
    if settings is None:
        return 0
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    quantiser = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    # The library's own choice of layers: which ones it leaves out depends on the model.
    quantiser.preprocess_model(model=llm, dtype=dtype, device_map=None, checkpoint_files=None, use_kernels=False)
    packed = [one for one in llm.parameters() if is_packed(one)]
    return sum(one.numel() * dtype.itemsize - _packed_bytes(one, settings) for one in packed)


def _packed_bytes(parameter: nn.Parameter, settings: BitsAndBytesConfig) -> int:
    size = parameter.numel()
    if settings.load_in_8bit:
        return size + 4 * parameter.shape[0]
    blocks = -(-size // BLOCK)
    # Quantised scales: one byte each, and one in fp32 for 256 of them.
    scales = blocks + 4 * -(-blocks // 256) if settings.bnb_4bit_use_double_quant else 4 * blocks
    return -(-size // 2) + scales
