"""What the speed benchmark runs on: models of random weights in a preset's shapes, tokenizers of the data's text."""

import json
import os
import platform
import re
import time
from pathlib import Path

from mindmerger.runtime.processes import is_main

# Llama-2's size: the output head's share of the arithmetic depends on it.
VOCABULARY = 32_000
PRESETS = {
    "tiny": {  # where only the data path is measured
        "encoder": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
        "llm": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    },
    # Large enough for matrix products to take most of the time, small enough for two cores.
    "cpu-small": {
        "encoder": {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
        "llm": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    },
    "7b": {  # mT5-xl's encoder and Llama-2-7B
        "encoder": {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
        "llm": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    },
}


def build_world(folder: Path, preset: str, data_root: str) -> None:
    """Makes tokenizers and configs of the preset, unless the folder has them."""
    if is_main() and not (folder / "llm" / "config.json").is_file():
        train_tokenizers(folder, data_root)
        make_configs(folder, preset)


def train_tokenizers(folder: Path, data_root: str) -> None:
    """Trains one BPE vocabulary of the preset's size for each model on the data's own text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    # On the data's own text: random ids would have none of the real texts' lengths, on which padding depends.
    pairs = sorted(Path(data_root).glob("bilingual_pairs/*/train_100k.*"))
    queries = Path(data_root) / "query_translation" / "math.json"
    rows = json.loads(queries.read_text(encoding="utf-8"))
    english = [line for p in pairs if p.suffix == ".en" for line in p.read_text(encoding="utf-8").split("\n")]
    others = [line for p in pairs if p.suffix != ".en" for line in p.read_text(encoding="utf-8").split("\n")]
    sets = {
        "llm": (english + [row["response"] for row in rows], ["<unk>", "<s>", "</s>"], "<s> $A"),
        "encoder": (others + english + [row["query"] for row in rows], ["<pad>", "</s>", "<unk>"], "$A </s>"),
    }
    for name, (texts, specials, template) in sets.items():
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        # Bytes as pieces: no text is unknown, whatever the vocabulary lacks.
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=specials + alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        used = [(token, tokenizer.token_to_id(token)) for token in specials if token in template]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
        roles = {"<pad>": "pad_token", "<s>": "bos_token", "</s>": "eos_token", "<unk>": "unk_token"}
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{roles[token]: token for token in specials})
        wrapped.save_pretrained(folder / name)


def make_configs(folder: Path, preset: str) -> None:
    """Writes both models' configs beside their tokenizers."""
    from transformers import LlamaConfig, MT5Config

    shapes = PRESETS[preset]
    encoder = MT5Config(vocab_size=VOCABULARY, **shapes["encoder"], num_decoder_layers=shapes["encoder"]["num_layers"])
    encoder.save_pretrained(folder / "encoder")
    llm = LlamaConfig(
        vocab_size=VOCABULARY, **shapes["llm"], max_position_embeddings=4096, bos_token_id=1, eos_token_id=2
    )
    llm.save_pretrained(folder / "llm")


def make_model(folder: Path, precision: str, device):
    """Makes a MindMerger with random towers directly on the device in the run's dtype."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM, MT5EncoderModel

    from mindmerger.model.mindmerger import MindMerger

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    # Made in the run's dtype and place: a 7B model in fp32 on the host first would take 28 GB.
    torch.set_default_dtype(dtype)
    try:
        with device:
            encoder = MT5EncoderModel(AutoConfig.from_pretrained(folder / "encoder", trust_remote_code=False))
            llm = LlamaForCausalLM(AutoConfig.from_pretrained(folder / "llm", trust_remote_code=False))
    finally:
        torch.set_default_dtype(before)
    return MindMerger.from_towers(encoder, llm, str(folder / "encoder"), str(folder / "llm")).to(device)


def machine(device) -> dict:
    """Returns what the figures were measured on."""
    import torch

    found = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if Path("/proc/cpuinfo").is_file():
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        found |= {"processor": names[0]} if names else {}
    found |= {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}
    return found | ({"device": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def synchronise(device) -> None:
    """Waits for the GPU, where there is one."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_rate(precision: str, device) -> float:
    """Measures FLOP per second of a large square matmul, against a transposed matrix as linear layers run it."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Large enough that the rate is the machine's, not that of starting kernels.
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(size, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
    best = 0.0
    for _ in range(8):
        synchronise(device)
        started = time.perf_counter()
        a @ b.T
        synchronise(device)
        # The best, not the median: utilisation is a share of what the machine can do.
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best
