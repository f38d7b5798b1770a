"""Guards that stop a run before it loses anything: memory probed on the longest rows, losses that are not finite."""

import contextlib
import math

from mindmerger.runtime.errors import ReportedError, UserError
from mindmerger.runtime.processes import gather_objects, is_out_of_memory, rank
from mindmerger.training.trainer import Trainer

# What to do when memory runs out in the passes of a step, in its update, in an evaluation on the dev split.
STEP_MEMORY_FLAGS = "lower --train_micro_batch_size_per_gpu, --micro_batch_tokens, --max_seq_len or --max_gen_len, or "
STEP_MEMORY_FLAGS += "use --gradient_checkpointing"
UPDATE_MEMORY_FLAGS = "Adam's moments come on top: share or offload them (--deepspeed_config), or "
UPDATE_MEMORY_FLAGS += STEP_MEMORY_FLAGS
EVAL_MEMORY_FLAGS = "lower --eval_batch_size, --max_seq_len or --max_gen_len"


@contextlib.contextmanager
def out_of_memory_named(batch: dict, instead: str = STEP_MEMORY_FLAGS, where: str = ""):
    """Turns running out of memory into an error that names the micro-batch and what to do `instead`.

    Raises:
        UserError: when memory ran out within it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        rows, longest = batch["encoder_input_ids"].shape
        sizes = ", ".join(
            f"{name} {tuple(batch[key].shape)[1]}"
            for name, key in (("encoder", "encoder_input_ids"), ("prompt", "prompt_ids"), ("target", "target_ids"))
            if batch.get(key) is not None
        )
        raise UserError(
            f"out of memory on rank {rank()} {where}with a micro-batch of {rows} rows, longest {sizes} tokens: "
            f"{instead}"
        ) from error


def probe_memory(trainer: Trainer) -> None:
    """Forward and backward passes on the heaviest micro-batches there can be, and forward passes on the dev split's:
    what does not fit ends the run before its first step. The update of the weights is not part of it.

    Raises:
        UserError: when it does.
    """
    import torch

    args = trainer.args
    for rows in trainer.heaviest(trainer.train, args.train_micro_batch_size_per_gpu, args.micro_batch_tokens):
        batch = trainer.to_device(next(iter(trainer.loader([rows]))))
        trainer.engine.set_gradient_accumulation_boundary(False)
        with out_of_memory_named(batch):
            trainer.engine.backward(trainer.engine(**batch).loss_sum * 0.0, scale_wrt_gas=False)
    for rows in trainer.heaviest(trainer.dev, args.eval_batch_size):
        batch = trainer.to_device(next(iter(trainer.loader([rows]))))
        with out_of_memory_named(batch, EVAL_MEMORY_FLAGS), torch.no_grad():
            trainer.engine(**batch)


def not_finite_error(trainer: Trainer, loss, norm, losses, micro_batches) -> UserError:
    """The error that ends a run whose loss or gradient is not finite, naming the examples that were in it."""
    from mindmerger.model.towers import CHECK_WEIGHTS

    bad = [m for value, m in zip(losses, micro_batches, strict=True) if not math.isfinite(value.item())]
    rows = [i for m in (bad or micro_batches) for i in m.indices.tolist()]
    ids = trainer.data.dataset[rows]["id"]
    everywhere = gather_objects((bool(bad), ids))
    chosen = [ids for is_bad, ids in everywhere if is_bad] or [ids for _, ids in everywhere]
    names = ", ".join([name for ids in chosen for name in ids][:20])
    weight = trainer.engine.module.bad_weight()  # no lower rate helps against a damaged model
    instead = f"{weight} is not finite: {CHECK_WEIGHTS}" if weight else "lower --lr, or use --precision fp32"
    return ReportedError(
        f"loss {loss} with gradient norm {norm} at step {trainer.step + 1} is not finite: stopped before the update, "
        f"earlier checkpoints are kept; examples: {names}; {instead}"
    )
