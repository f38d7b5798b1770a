"""`--dry_run`: the effective settings, the number of steps and an estimate of memory, without loading a weight."""

import json
import math
from typing import TYPE_CHECKING

from mindmerger.runtime.processes import is_main, world_size
from mindmerger.training.encoder_cache import describe, size_of
from mindmerger.training.settings import ASSUMED_GPU, ASSUMED_SHARE, Settings

if TYPE_CHECKING:
    from mindmerger.data.loader import TrainingData

# By the A100's data sheet, without sparsity; fp32 without TF32, which torch leaves off.
PEAK_FLOPS = {"bf16": 312e12, "fp32": 19.5e12}


def training_flop(args, data, merged, rows, llm, encoder, bridge=None, adapter: int = 0) -> float:
    """Estimates the arithmetic of one pass over training rows from their real lengths, without padding and attention.

    Each weight of the LLM's layers takes 4 FLOP for a position (forward, and backward to the inputs alone; 6 where
    gradient checkpointing computes the forward pass again), each of its output head 4 for a target token (6 where the
    bridge trains it), each of the encoder's 2 for a source token. Embeddings are looked up. The bridge takes what torch
    counts in its own passes, and 4 for a source token and weight of the LLM's key and value projections where it gives
    a memory. Under an adapter, whose weights take 6 for a position, both go forward alone.

    Args:
        merged: positions of every merged row of the data set.
        rows: (n,) row numbers.
        llm, encoder: the models, which may be without storage; None without an encoder.
        bridge: between the two, without storage; None leaves its arithmetic out.
        adapter: trained parameters of an adapter; 0 where the bridge is trained.
    """
    head = llm.get_output_embeddings().weight
    tables = {id(table): table.numel() for table in (llm.get_input_embeddings().weight, head)}
    layers = sum(p.numel() for p in llm.parameters()) - sum(tables.values())
    positions, targets, sources = (
        int(lengths[rows].sum(dtype="int64")) for lengths in (merged, data.target_lengths, data.encoder_lengths)
    )
    passes = 6 if args.gradient_checkpointing else 4
    total = passes * layers * positions + 4 * head.numel() * targets + encoding_flop(encoder, sources)
    total += 6 * adapter * positions
    if bridge is None or encoder is None:
        return float(total)
    # At the mean length: counting each length would take a pass for every one of them.
    mean = max(1, round(sources / len(rows)))
    total += bridge_flop(bridge, mean, trained=not adapter) / mean * sources
    if bridge.uses_memory:
        attentions = [layer.self_attn for layer in llm.get_decoder().layers]
        projecting = sum(one.k_proj.weight.numel() + one.v_proj.weight.numel() for one in attentions)
        total += (2 if adapter else 4) * projecting * sources
    if hasattr(bridge, "lm_head") and not adapter:
        total += 2 * head.numel() * targets
    return float(total)


def encoding_flop(encoder, tokens: int) -> float:
    """Estimates the arithmetic of an encoder, which may be without storage, over source tokens; none without one."""
    if encoder is None:
        return 0
    return 2 * (sum(p.numel() for p in encoder.parameters()) - encoder.get_input_embeddings().weight.numel()) * tokens


def bridge_flop(bridge, tokens: int, trained: bool) -> int:
    """Returns the FLOP of the forward pass of a bridge without storage over one row of that many encoder tokens, and
    where it is trained of the backward pass too."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    # On the meta device nothing is computed: shapes are all that the counter asks for. With gradients in either case:
    # its hooks fail on a view of a parameter that was made without.
    with torch.device("meta"), torch.enable_grad(), FlopCounterMode(display=False) as counter:
        states = [torch.empty(1, tokens, bridge.towers.encoder_width) for _ in bridge.encoder_layers]
        made = bridge(states, torch.ones(1, tokens, dtype=torch.long))
        if trained:
            outputs = [made.prefix_BKD, *(part for layer in made.memory or () for part in layer)]
            torch.autograd.grad([one.float().sum() for one in outputs], list(bridge.parameters()), allow_unused=True)
    return counter.get_total_flops()


def describe_states(settings: Settings, examples, dtype) -> str:
    """Returns what the states of the encoder will take on the disk, in a line."""
    from mindmerger.data.training_set import cache_root

    tokens, layers = int(examples.encoder_lengths.sum(dtype="int64")), len(settings.bridge.encoder_layers)
    size = size_of(tokens, layers, settings.bridge.towers.encoder_width, dtype)
    return (
        f"{describe(len(examples.encoder_lengths), tokens, size)} in {cache_root()}, computed before training by the "
        "encoder alone, which is then not kept in memory"
    )


def print_estimate(settings: Settings, data: "TrainingData") -> None:
    """Prints the effective settings, the steps and the memory that weights and optimizer take on each GPU."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    from mindmerger.data.loader import BatchLoader
    from mindmerger.hub.model_configs import llm_config, load_config
    from mindmerger.hub.quantisation import saved_bytes
    from mindmerger.training.deepspeed_config import offloaded, zero_stage

    if not is_main():
        return
    args = settings.args
    # Counted without memory: a dry run needs the configs and no weight file.
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(llm_config(args.llm_path)[0], trust_remote_code=False)
        encoder = None
        if args.mt_path is not None:
            encoder = AutoModel.from_config(load_config(args.mt_path), trust_remote_code=False)
            encoder = encoder.get_encoder() if encoder.config.is_encoder_decoder else encoder
    trained = sum(math.prod(shape) for shape in settings.shapes.values())
    bridge = settings.bridge if settings.adapter is not None else None  # frozen under an adapter
    loaded = None if args.cache_encoder_states else encoder
    frozen = sum(p.numel() for model in (llm, loaded, bridge) if model is not None for p in model.parameters())
    if hasattr(settings.bridge, "lm_head"):  # in the place of the LLM's own, which is let go
        frozen -= settings.bridge.lm_head.weight.numel()
    stage, size = zero_stage(settings.config), world_size()
    shards = {"weights": size if stage == 3 else 1, "gradient": size if stage >= 2 else 1, "Adam": size if stage else 1}
    # Gradient and moments of what is trained alone: what is frozen has neither.
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    saved = saved_bytes(llm_config(args.llm_path)[0], args.quantization, dtype)
    frozen_gb = (frozen * dtype.itemsize - saved) / shards["weights"] / 1e9
    parts_gb = {"frozen weights": frozen_gb, settings.trains: trained * 4 / shards["weights"] / 1e9}
    parts_gb |= {"gradient": trained * 4 / shards["gradient"] / 1e9, "Adam": trained * 8 / shards["Adam"] / 1e9}
    moved = {"offload_param": ("frozen weights", settings.trains), "offload_optimizer": ("Adam",)}
    host_gb = {name: parts_gb.pop(name) for key in offloaded(settings.config) for name in moved[key]}
    print(json.dumps({"arguments": vars(args), "deepspeed": settings.config}, indent=2, default=str))
    print(f"output folder: {settings.output_dir}")
    counts = json.dumps(data.examples.counts, ensure_ascii=False)
    print(f"examples: {len(data.train)} training, {len(data.dev)} dev; {counts}")
    # The run's own loader, so that the steps announced are those made.
    loader = BatchLoader(args, data, settings.bridge.prefix_length, torch.device("meta"))
    steps, lengths = loader.steps_per_epoch, loader.lengths
    within = f", or those of {args.max_minutes:g} minutes" if args.max_minutes else ""
    print(f"steps per epoch: {steps}; in all: {min(args.max_steps or math.inf, steps * args.epoch_num)}{within}")
    print(f"longest row: {int(lengths.max())} positions, mean {lengths.mean():.0f}")
    less = f" (the LLM's quantised layers take {saved / 1e9:.3f} GB less)" if saved else ""
    print(f"parameters: {frozen:,} frozen in {args.precision}{less}, {trained:,} trained in fp32")
    print(
        f"memory on each of {size} GPUs at ZeRO {stage}: {parts_gb.pop('frozen weights', 0):.3f} GB frozen weights, "
        f"{sum(parts_gb.values()):.3f} GB {', '.join(parts_gb).replace(', Adam', ' and Adam')}; activations come on top"
    )
    if host_gb:
        print(
            f"offloaded, for each GPU: {sum(host_gb.values()):.3f} GB {', '.join(host_gb)}; of offloaded weights, the "
            "layers at work come on top of the GPU's memory too"
        )
    total = min(args.max_steps or math.inf, steps * args.epoch_num)
    adapter = trained if settings.adapter is not None else 0
    models = (llm, encoder, settings.bridge, adapter)
    flop = training_flop(args, data.examples, lengths, data.train, *models) * total / steps
    if args.cache_encoder_states:  # over all rows once, in the place of the training rows in each epoch
        sources = data.examples.encoder_lengths.astype("int64")
        flop += encoding_flop(encoder, sources.sum() - sources[data.train].sum() * total / steps)
    rate = PEAK_FLOPS[args.precision]
    print(
        f"arithmetic: {flop:.3g} FLOP in all; at an assumed {ASSUMED_SHARE:.0%} of the {rate / 1e12:g} TFLOP/s in "
        f"{args.precision} of an {ASSUMED_GPU}, {flop / (size * rate * ASSUMED_SHARE) / 3600:.3g} h on {size} of them "
        "(an estimate, not measured; loading, evaluations and checkpoints come on top)"
    )
    if args.cache_encoder_states:
        print(describe_states(settings, data.examples, dtype))
    print("dry run: nothing was written")
