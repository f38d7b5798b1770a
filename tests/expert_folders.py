"""Tiny random experts tuned from one base, saved in every form that model folders come in."""

import json
import shutil
from pathlib import Path

import torch
from conftest import byte_tokenizer
from safetensors.torch import load_file, save_file

VOCABULARY = 259  # of the byte tokenizer below
SPECIALS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def tiny_config(family="llama", layers=4, **changes):
    """A config of two-digit widths."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **changes,
    }
    return {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}[family](**settings)


def base_state(config, seed=0):
    """Random fp32 parameters of the architecture, biases and norms included."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def tuned(state, seed, scale=0.02):
    """The same parameters after some training: every scalar moved a little."""
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + scale * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def save_expert(folder, config, state, dtype=torch.bfloat16, form="safetensors", shards=1, tokenizer=True):
    """Writes a model folder as the hub has them: single file or shards with an index, safetensors or .bin."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.dtype = dtype
    config.save_pretrained(folder)
    if tokenizer:
        byte_tokenizer(folder, SPECIALS, "<s> $A")
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    state = {name: tensor.to(dtype).clone() for name, tensor in state.items()}
    if form == "bin" and config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]  # as torch.save of a tied model leaves it
    stem, suffix = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    names = sorted(state)
    groups = [names[i::shards] for i in range(shards)]
    weight_map = {}
    for i, group in enumerate(groups, start=1):
        name = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{i:05d}-of-{shards:05d}.{suffix}"
        part = {key: state[key] for key in group}
        if form == "safetensors":
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name)
        weight_map |= dict.fromkeys(group, name)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return str(folder)


def load_state(folder):
    """All tensors of a folder by the library's own reader."""
    files = sorted(Path(folder).glob("*.safetensors"))
    state = {}
    for file in files:
        state |= load_file(file)
    return state


def same_bits(first, second):
    """Whether two state dicts hold the same names, dtypes and bytes (signed zeros told apart)."""
    if first.keys() != second.keys():
        return False
    return all(
        first[name].dtype == second[name].dtype
        and torch.equal(first[name].contiguous().view(torch.uint8), second[name].contiguous().view(torch.uint8))
        for name in first
    )


def copy_folder(source, target):
    """A copy that a test may damage."""
    return str(shutil.copytree(source, target))
