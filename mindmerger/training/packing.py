"""`--packing`: which LLMs keep rows apart that stand end to end in one, and a look whether the loaded one does.

transformers keeps them apart by masks or lengths that follow from their positions, in attention that asks for either. A
model that asks for neither silently attends across rows, and only its losses would tell.
"""

from typing import TYPE_CHECKING

from mindmerger.runtime.errors import UserError
from mindmerger.training.deepspeed_config import zero_stage

if TYPE_CHECKING:
    from mindmerger.training.trainer import Run

# LLMs whose mask follows from position ids and whose attention is handed the lengths of packed rows, with transformers
# 5.17 to 5.23: each is tested. Nemotron and StableLM pass no lengths on, GPT-OSS makes its mask without positions, OPT,
# BLOOM and others count positions by a mask, and linear attention, convolutions and state spaces run on into the next
# row.
MODEL_TYPES = {"apertus", "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm"}
MODEL_TYPES |= {"glm4", "gpt2", "gpt_neox", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "llama", "ministral"}
MODEL_TYPES |= {"ministral3", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2"}
MODEL_TYPES |= {"qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2"}
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
OF_ATTENTION = {"full_attention", "sliding_attention"}


def check_packing(args) -> None:
    """Makes sure that rows can be packed, from the flags and the LLM's config alone.

    Raises:
        UserError: for a bridge, an attention function or a type of LLM that is not known to keep packed rows apart.
    """
    if not args.packing:
        return
    from mindmerger.hub.model_configs import llm_config
    from mindmerger.model.mapping_files import find_bridge

    if not args.llm_only and find_bridge(args.bridge).uses_memory:
        raise UserError(
            f"--packing: bridge {args.bridge} gives the LLM's attention a memory for each row, which packed rows would "
            "share: leave --packing out"
        )
    if args.attn_implementation not in (None, *ATTENTION):
        raise UserError(
            f"--packing is not known to keep rows apart with --attn_implementation {args.attn_implementation}: use "
            f"{', '.join(ATTENTION[:-1])} or {ATTENTION[-1]}"
        )
    config = llm_config(args.llm_path)[0]
    others = set(getattr(config, "layer_types", None) or ()) - OF_ATTENTION
    if config.model_type in MODEL_TYPES and not others:
        return
    why = f" with {', '.join(sorted(others))} layers" if others else ""
    raise UserError(
        f"--packing: {args.llm_path} is a {config.model_type} model{why}, not known to keep packed rows apart: leave "
        f"--packing out, or take one of the types {', '.join(sorted(MODEL_TYPES))}"
    )


def check_rows_apart(run: "Run") -> None:
    """Makes sure that the loaded LLM, with its attention on this device, keeps packed rows apart: the loss of a row has
    no gradient in the row before it. Costs one pass over the shortest row, twice. A collective call at ZeRO 3.

    Raises:
        UserError: where it has one.
    """
    if not run.args.packing:
        return
    import numpy as np
    import torch

    train, seen = run.loader.data.train, []
    batch = run.loader.load(np.repeat(train[np.argmin(run.loader.lengths[train])], 2))
    batch.target_mask[0] = 0  # only the second row has a loss
    plan = run.loader.plan(batch.encoder_attention_mask, batch.prompt_mask, batch.target_mask)
    batch.plan = plan.to(run.device)

    def note(_, args, kwargs):
        seen.append(kwargs["inputs_embeds"].detach().requires_grad_())
        return args, kwargs | {"inputs_embeds": seen[0]}

    # Below ZeRO 3 the engine adds nothing, and takes a backward pass for one of training.
    model = run.engine if zero_stage(run.settings.config) == 3 else run.engine.module
    # On the embeddings that the LLM is handed: before them, the encoder's rows share nothing.
    handle = run.engine.module.llm.register_forward_pre_hook(note, with_kwargs=True)
    try:
        # Exact, while losses of other neighbours may differ by rounding.
        (gradient_1LD,) = torch.autograd.grad(model(**batch.arguments).loss_sum, seen)
    finally:
        handle.remove()
    own = int(plan.pack.start_B1[1])
    if gradient_1LD[:, :own].abs().max() > 0:
        raise UserError(
            f"--packing: {run.args.llm_path} attends across packed rows with its attention "
            f"{run.engine.module.llm.config._attn_implementation}: leave --packing out, or choose another "
            "--attn_implementation"
        )
