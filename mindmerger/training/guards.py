"""Guards that stop a run before it loses anything: memory probed on the longest rows, losses that are not finite."""

import math
from typing import TYPE_CHECKING

from mindmerger.runtime.errors import ReportedError, UserError
from mindmerger.runtime.processes import explain_out_of_memory, gather_objects, rank
from mindmerger.training.dev_accuracy import likeliest_labels
from mindmerger.training.trainer import Run

if TYPE_CHECKING:
    from mindmerger.data.batches import Batch
    from mindmerger.data.loader import GlobalBatch

# What to do when memory runs out in the passes of a step, in its update, in an evaluation on the dev split.
STEP_MEMORY_FLAGS = "lower --train_micro_batch_size_per_gpu, --micro_batch_tokens, --max_seq_len or --max_gen_len, or "
STEP_MEMORY_FLAGS += "use --gradient_checkpointing"
UPDATE_MEMORY_FLAGS = "Adam's moments come on top: share or offload them (--deepspeed_config), or "
UPDATE_MEMORY_FLAGS += STEP_MEMORY_FLAGS
EVAL_MEMORY_FLAGS = "lower --eval_batch_size or --micro_batch_tokens, --max_seq_len or --max_gen_len"


def explain_step_out_of_memory(batch: "Batch", advice: str = STEP_MEMORY_FLAGS, where: str = ""):
    """Context manager: running out of memory on a micro-batch becomes an error that names its size and what to do."""
    what = f"on rank {rank()} {where}with a micro-batch of {len(batch)} rows"
    return explain_out_of_memory(what, batch.sizes, advice)


def probe_memory(run: Run) -> None:
    """Passes the heaviest micro-batches there can be through the model, forward and backward, and the dev split's
    forward, also over its labels: what does not fit ends the run before its first step. The update of the weights is
    not part of it.

    Raises:
        UserError: when it does.
    """
    import torch

    for rows in run.loader.heaviest():
        batch = run.loader.load(rows)
        run.engine.set_gradient_accumulation_boundary(False)
        with explain_step_out_of_memory(batch):
            # Times 0: the gradients that stay behind are zeros, and the first step adds to them.
            run.engine.backward(run.engine(**batch.arguments).loss_sum * 0.0, scale_wrt_gas=False)
    # Rows of the dev split may be longer than any that are trained on, and their batch size is another flag.
    for rows in run.loader.heaviest_of_dev():
        batch = run.loader.load(rows)
        with explain_step_out_of_memory(batch, EVAL_MEMORY_FLAGS), torch.no_grad():
            run.engine(**batch.arguments)
    # Here also an LLM shows whose past cannot be kept while labels are passed behind it.
    if run.loader.data.labels is not None:
        rows = run.loader.heaviest_of_dev(run.loader.data.labels.rows)[0]
        likeliest_labels(run, run.loader.load(rows), rows.tolist())


def not_finite_error(run: Run, step: int, batch: "GlobalBatch", loss: float, norm: float, losses: list) -> UserError:
    """Returns the error that ends a run whose loss or gradient is not finite, naming the examples that were in it.
    A collective call.

    Args:
        step: optimizer steps taken before this one.
        loss, norm: of the global batch.
        losses: of this rank's micro-batches, tensors.
    """
    from mindmerger.model.towers import CHECK_WEIGHTS

    # A gradient can overflow where every loss is finite: then all rows of the step are named.
    bad = [m for value, m in zip(losses, batch.micro_batches, strict=True) if not math.isfinite(value.item())]
    rows = [i for micro in (bad or batch.micro_batches) for i in micro.rows.tolist()]
    ids = run.data.dataset[rows]["id"]
    everywhere = gather_objects((bool(bad), ids))
    chosen = [ids for is_bad, ids in everywhere if is_bad] or [ids for _, ids in everywhere]
    names = ", ".join([name for ids in chosen for name in ids][:20])
    weight = run.engine.module.bad_weight()  # no lower rate helps against a damaged model
    instead = f"{weight} is not finite: {CHECK_WEIGHTS}" if weight else "lower --lr, or use --precision fp32"
    return ReportedError(
        f"loss {loss} with gradient norm {norm} at step {step + 1} is not finite: stopped before the update, "
        f"earlier checkpoints are kept; examples: {names}; {instead}"
    )
