"""Activations of MLP neurons, observed while a model answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mindmerger.runtime.errors import UserError

# What makes a module an MLP of a known family: the parts it must have, its activation, the layer that has its width.
_MLP_FORMS = (
    (("gate_proj", "up_proj", "act_fn"), "act_fn", "gate_proj"),
    (("wi_0", "wi_1", "act"), "act", "wi_0"),
    (("wi", "act"), "act", "wi"),
    (("dense_h_to_4h", "gelu_impl"), "gelu_impl", "dense_h_to_4h"),
)


class NeuronError(UserError):
    """A model whose neurons cannot be observed, or counts that cannot be read; the message is one line."""


def find_activations(model) -> tuple[list, int]:
    """Finds the activation module of every layer's MLP, bottom-up, and the number of neurons per layer.

    Raises:
        NeuronError: for a family that is not known, such as a mixture of experts.
    """
    found = []
    # By parts, not by class: each family of transformers has an MLP class of its own, with similar insides.
    for name, module in model.named_modules():
        for parts, activation, wide in _MLP_FORMS:
            if all(hasattr(module, part) for part in parts):
                found.append((name, getattr(module, activation), getattr(module, wide).out_features))
                break
    config = model.config.get_text_config()
    kind = config.model_type
    # A mixture of experts has several MLPs in a layer, an unknown family none of these forms.
    if len(found) != config.num_hidden_layers:
        raise NeuronError(
            f"cannot observe the neurons of this {kind} model: {len(found)} MLPs of a known form in "
            f"{config.num_hidden_layers} layers; known are Llama, Mistral, Qwen2, Qwen3, Gemma, Bloom and T5's encoder"
        )
    if len({id(module) for _, module, _ in found}) < len(found):
        raise NeuronError(f"layers of this {kind} model share one activation module: they cannot be told apart")
    if len({width for *_, width in found}) > 1:
        raise NeuronError(f"layers of this {kind} model have different widths, which one table cannot hold")
    return [module for _, module, _ in found], found[0][2]


@dataclass
class Observation:
    """Counts of one forward pass: `counts` (layers, width), `row_counts` (rows, layers) and the `tokens` of each row
    (rows,), all int64."""

    counts: object
    row_counts: object
    tokens: object


@contextmanager
def observe(model, positions_M, rows_M, rows: int) -> Iterator[Observation]:
    """Context manager: one forward pass of `model` is counted; the model's outputs stay exactly as they are.

    Args:
        positions_M: the counted positions, flat indices into B*L of the hidden states.
        rows_M: the row each of them belongs to, 0 to rows - 1.

    Raises:
        NeuronError: on leaving, when a layer's activation was not called: a fused MLP computes it elsewhere.
    """
    import torch

    activations, width = find_activations(model)
    device = next(model.parameters()).device
    positions_M, rows_M = positions_M.to(device), rows_M.to(device)
    counts = torch.zeros(len(activations), width, dtype=torch.int64, device=device)
    row_counts = torch.zeros(rows, len(activations), dtype=torch.int64, device=device)
    calls = [0] * len(activations)

    def hook_of(layer: int):
        def hook(_module, _inputs, output) -> None:
            # No return value: a returned tensor would replace the activation.
            calls[layer] += 1
            # Counted on the device: a copy of the activations to the CPU would wait for the GPU at every layer.
            active_MW = output.detach().reshape(-1, width).index_select(0, positions_M) > 0
            counts[layer] += active_MW.sum(0)
            row_counts[:, layer].index_add_(0, rows_M, active_MW.sum(1))

        return hook

    handles = [module.register_forward_hook(hook_of(layer)) for layer, module in enumerate(activations)]
    seen = Observation(counts, row_counts, torch.bincount(rows_M, minlength=rows))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
    # Zero counts would look like a result: a fused kernel that bypasses the module must be an error.
    silent = [layer for layer, number in enumerate(calls) if number == 0]
    if silent:
        raise NeuronError(
            f"the activation of layer {silent[0]} was never called ({len(silent)} of {len(calls)} layers): a fused MLP "
            "(Liger, a hub kernel, a compiled model) bypasses it; load the model without fused kernels"
        )
    if max(calls) > 1:
        raise RuntimeError(f"an activation was called {max(calls)} times in what should be one forward pass")


def predicting_positions(prefix_B, targets_B):
    """Finds the flat positions that predict a token, in right-padded rows of input tokens and generated ones.

    Row b counts from its last input token (prefix - 1) to its last generated token but one; the padded length is the
    longest row's, as in `MindMerger.forward`.

    Returns:
        positions_M and rows_M, int64 on the CPU.
    """
    import torch

    length = int((prefix_B + targets_B).max())
    rows_M = torch.repeat_interleave(torch.arange(len(prefix_B)), targets_B)
    first_B = torch.cumsum(targets_B, 0) - targets_B
    step_M = torch.arange(len(rows_M)) - first_B[rows_M]
    return rows_M * length + prefix_B[rows_M] - 1 + step_M, rows_M


def generated_mask(ids_BT, eos_token_ids: list[int]):
    """Returns (B, T) int64: 1 up to and with the first end token of each row, 0 on what fills the row after it."""
    import torch

    ends_BT = torch.isin(ids_BT, torch.tensor(eos_token_ids, device=ids_BT.device))
    return ((torch.cumsum(ends_BT, 1) - ends_BT.long()) == 0).long()


def observe_answers(model, inputs: dict, max_new_tokens: int) -> Observation:
    """Lets a `MindMerger` (with or without encoder) answer greedily, and counts its LLM's activity while it does.

    One full forward pass over input and answer shows the same as step-by-step decoding, since attention is causal.

    Args:
        inputs: what `MindMerger.generate` takes.
    """
    import torch

    # Counting while decoding would need hooks that know which rows have ended; one pass afterwards costs about as much
    # as reading the input once more.
    ids_BT = model.generate(**inputs, max_new_tokens=max_new_tokens)
    mask_BT = generated_mask(ids_BT, model.eos_token_ids).cpu()
    prefix_B = torch.zeros(len(ids_BT), dtype=torch.int64)
    if model.bos_token_id is not None:
        prefix_B += 1
    if inputs.get("encoder_input_ids") is not None:
        prefix_B += model.mapping.prefix_length(inputs["encoder_attention_mask"].sum(1).cpu())
    if inputs.get("prompt_ids") is not None:
        prefix_B += inputs["prompt_mask"].sum(1).cpu()
    positions_M, rows_M = predicting_positions(prefix_B, mask_BT.sum(1))
    # The LLM alone has neither: forward() takes both by name all the same.
    given = {"encoder_input_ids": None, "encoder_attention_mask": None} | inputs
    with torch.no_grad(), observe(model.llm, positions_M, rows_M, len(ids_BT)) as seen:
        model(**given, target_ids=ids_BT, target_mask=mask_BT)
    return seen


def observe_encoder(model, inputs: dict) -> Observation:
    """Counts the encoder's activity on every real token of its input."""
    import torch

    mask_BS = inputs["encoder_attention_mask"].cpu()
    # encode() packs every row to the left of a block as long as the longest one.
    lengths_B = mask_BS.sum(1)
    width = int(lengths_B.max())
    rows_M, columns_M = torch.nonzero(torch.arange(width) < lengths_B[:, None], as_tuple=True)
    with torch.no_grad(), observe(model.encoder, rows_M * width + columns_M, rows_M, len(mask_BS)) as seen:
        model.encode(inputs["encoder_input_ids"], inputs["encoder_attention_mask"])
    return seen
