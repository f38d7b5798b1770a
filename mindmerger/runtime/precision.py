"""One rule for the dtype of the frozen models, in every command: bf16 where the device multiplies matrices in it."""

from mindmerger.runtime.processes import broadcast_object, log

AUTO = "auto"
QUANTIZATIONS = ("none", "nf4", "int8")


def add_argument(add) -> None:
    """Adds the flag, by a parser's or a group's `add_argument`."""
    # No fp16: T5 overflows in it.
    add("--precision", choices=(AUTO, "bf16", "fp32"), default=AUTO, help="dtype of the frozen models: bf16, fp32, or "
        "what auto finds: bf16 where the device multiplies matrices in it (NVIDIA GPUs of compute capability 8.0 and "
        "higher, AMD GPUs, CPUs with AVX512-BF16 or AMX), else fp32")  # fmt: skip


def add_quantization(add) -> None:
    """Adds the flag of the LLM's quantisation, by a parser's or a group's `add_argument`."""
    add("--quantization", choices=QUANTIZATIONS, default="none", help="the LLM's linear layers in 4 bits (nf4), in 8 "
        "bits (int8) or in the dtype of --precision (none, the default); package bitsandbytes; not with an LLM that is "
        "quantised already, ZeRO 3, --compile, --liger and --engine vllm")  # fmt: skip


def settle_precision(given: str, on_gpu: bool) -> str:
    """Returns bf16 or fp32 for a value of --precision. A collective call: rank 0's device decides for all ranks."""
    if given != AUTO:
        return given
    # Without its own instructions a CPU computes bf16 by way of fp32, several times slower than in fp32 itself.
    chosen = broadcast_object("bf16" if multiplies_bf16(on_gpu) else "fp32")
    reason = "multiplies" if chosen == "bf16" else "does not multiply"
    log(f"--precision auto: {chosen}, since this {'GPU' if on_gpu else 'CPU'} {reason} matrices in bf16")
    return chosen


def multiplies_bf16(on_gpu: bool) -> bool:
    """Returns whether this rank's GPU, or the CPU, has instructions for products of bf16 matrices."""
    import torch

    if on_gpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Not torch's public list of abilities, which versions before 2.13 may lack.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
