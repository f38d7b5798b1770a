"""Merges an adapter into its LLM: an ordinary model folder, which anything that reads model folders reads.

    python -m mindmerger.baselines.merge_adapter --llm_path meta-math/MetaMath-7B-V1.0 \\
        --adapter_path outputs/MindMerger/math/llm_adapter/adapter --output merged
"""

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mindmerger.baselines.merge_flags import HelpFormatter, add_output_flags, evaluation_of
from mindmerger.runtime.command import CommandParser, run_main
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.processes import log

if TYPE_CHECKING:
    import torch

HELP = """\
Merges a LoRA or DoRA adapter into the LLM that it was trained on. For a layer with weight W, matrices A and B,
s = alpha / rank, and for DoRA the magnitudes m, one for each row:

  LoRA   W + s B A
  DoRA   m (W + s B A) / |W + s B A|        (norm of each row)

The arithmetic is fp32, cast once to the dtype that the LLM stores. In fp32 greedy answers are those of the LLM with the
adapter; in bf16 the sum is rounded where the adapter beside the LLM was not, so that close calls can end otherwise.

The output is an ordinary model folder: python run_evaluation.py --llm_only --llm_path merged --save_name merged
"""


@dataclass(frozen=True)
class Change:
    """Change of one weight (O, I) by an adapter: s, A (r, I), B (O, r) in fp32, and for DoRA m (O,)."""

    scaling: float
    a: "torch.Tensor"
    b: "torch.Tensor"
    magnitude: "torch.Tensor | None"

    def apply(self, rows: "torch.Tensor", start: int, stop: int) -> "torch.Tensor":
        """Returns rows `start` to `stop` of the merged weight, in fp32."""
        merged = rows.float() + self.scaling * (self.b[start:stop] @ self.a)
        if self.magnitude is None:
            return merged
        return merged * (self.magnitude[start:stop] / merged.norm(dim=1))[:, None]


def read_changes(saved, llm_path: str) -> dict[str, Change]:
    """Returns what a checked adapter changes, by the name of the weight.

    Raises:
        UserError: for layers that are not plain linear ones, and an adapter with more than these three tensors.
    """
    from torch import nn

    from mindmerger.model.adapters import NAME, PREFIX, adapted_layers, empty_llm, read_adapter

    tensors, changes = {name: tensor.float() for name, tensor in read_adapter(saved.folder).items()}, {}
    for name, layer in adapted_layers(
        empty_llm(llm_path, saved.values | {"base_model_name_or_path": llm_path})
    ).items():
        if type(layer.get_base_layer()) is not nn.Linear:
            kind = type(layer.get_base_layer()).__name__
            raise UserError(f"the adapter {saved.folder} changes {name}, a {kind}: only linear layers can be merged")
        parts = [tensors.pop(f"{PREFIX}{name}.{part}", None) for part in ("lora_A.weight", "lora_B.weight")]
        magnitude = tensors.pop(f"{PREFIX}{name}.lora_magnitude_vector", None)
        changes[f"{name}.weight"] = Change(layer.scaling[NAME], *parts, magnitude)
    if tensors:
        raise UserError(
            f"the adapter {saved.folder} holds {next(iter(tensors))}, which is not part of LoRA's or DoRA's formula: "
            "it cannot be merged here"
        )
    return changes


def merge(args: argparse.Namespace) -> None:
    """Writes the merged model folder.

    Raises:
        UserError: for anything that keeps it from being written; nothing is left behind then.
    """
    from mindmerger.baselines.merged_folder import check_output, write_merged
    from mindmerger.baselines.model_folder import open_model
    from mindmerger.model.adapters import check_adapter, describe_adapter, show_adapter

    output = check_output(args.output, args.overwrite, [args.llm_path, args.adapter_path])
    llm = open_model("LLM", args.llm_path)
    saved = check_adapter(args.adapter_path, args.llm_path)
    changes = read_changes(saved, args.llm_path)
    tied = next((name for name in changes if name not in llm.tensors), None)
    if tied is not None:
        raise UserError(f"{llm} has no weight {tied} of its own, which the adapter changes: it is tied to another one")
    log(f"merges {show_adapter(describe_adapter(saved.values))}: {len(changes)} of {len(llm.tensors)} tensors")

    def combine(name: str, start: int, stop: int):
        rows = llm.read(name, start, stop)
        return changes[name].apply(rows, start, stop) if name in changes else rows

    record = {
        "method": "adapter merged into its LLM",
        "formula": "W + s B A; DoRA: m (W + s B A) / |W + s B A|",
        "arguments": vars(args),
        "plan": {**describe_adapter(saved.values), "adapter_sha256": saved.sha256, "tensors": sorted(changes)},
    }
    every_row = {name: stored.shape[0] for name, stored in llm.tensors.items()}
    form = {"dtype": args.dtype, "max_shard_gb": args.max_shard_gb}
    write_merged(output, llm, [llm], every_row, combine, record, **form)
    log(f"wrote {args.output}; evaluate it with: {evaluation_of(output)}")


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the command."""
    parser = CommandParser(
        prog="python -m mindmerger.baselines.merge_adapter", description=HELP, formatter_class=HelpFormatter
    )
    parser.add_argument("--llm_path", required=True, help="model folder of the LLM that the adapter was trained on")
    parser.add_argument("--adapter_path", required=True, help="adapter folder, as the adapter stage or PEFT writes it")
    add_output_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    merge(build_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    run_main(main, alone=True)
