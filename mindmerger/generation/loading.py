"""From an evaluation's settings to a model on its device, and to the engine that decodes where the model does not."""

from contextlib import contextmanager

from mindmerger.generation.answers import input_positions
from mindmerger.runtime.processes import explain_out_of_memory, is_main


def load_model(settings, device):
    """Loads both towers and what stands between them on this rank's device; with vLLM without the LLM's layers.

    Rank 0 alone reads mapping and adapter, since its node alone may have the files: the caller gives them to the other
    ranks.

    Raises:
        UserError: out of memory, or for a model that cannot be loaded.
    """
    import torch

    from mindmerger.generation.vllm_engine import keep_input_side
    from mindmerger.model.adapters import load_adapter
    from mindmerger.model.decoding import end_at
    from mindmerger.model.mindmerger import MindMerger

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[settings.precision]
    paths = settings.mt_path, settings.llm_path
    between = settings.bridge_name, settings.bridge.options if settings.bridge is not None else None
    advice = "use a larger GPU, --precision bf16 or --quantization nf4"
    with explain_out_of_memory(f"while placing the models on {device}", {}, advice):
        model = MindMerger.from_models(
            *paths, dtype, settings.attn_implementation, *between, quantization=settings.quantization
        )
        if settings.tokenizers.chat is not None:  # whose turn may end in a token that no config names
            end_at(model, settings.tokenizers.eos_id)
        if settings.mapping_file is not None and is_main():
            model.load_mapping(settings.mapping_file)
        if settings.adapter is not None:
            load_adapter(model, settings.adapter, read=is_main())
        if settings.engine == "vllm":  # which loads the LLM itself: twice would not fit
            keep_input_side(model)
        if settings.probe_prefix is not None and settings.probe_prefix["kind"] == "zero":
            model.mapping.register_forward_hook(zero_output)
        return model.to(device).eval()


def zero_output(bridge, given, output):
    """Returns a bridge's output with zeros in the place of all its numbers; its mask stays, and with it all positions.

    As a forward hook it reaches every use of the bridge, and no bridge has to know of it.
    """
    import torch

    memory = output.memory
    if memory is not None:
        memory = [type(one)(*map(torch.zeros_like, one)) for one in memory]
    return output._replace(prefix_BKD=torch.zeros_like(output.prefix_BKD), memory=memory)


@contextmanager
def started_engine(settings, device_type: str):
    """Context manager: what decodes where that is not the model itself, None where it is. Enter it when the model has
    its place on the device."""
    if settings.engine == "hf":
        yield None
        return
    from mindmerger.generation import vllm_engine

    longest = max(input_positions(settings.columns, settings.bridge)) + settings.max_new_tokens
    engine = vllm_engine.start(settings.llm_path, settings.precision, longest, device_type)
    try:
        yield engine
    finally:
        vllm_engine.stop(engine)
