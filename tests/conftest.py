"""Tiny models with real tokenizers, made once for each test run, and the excerpt of real data."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

# Two ranks share two cores in the tests; more threads would only make them wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
# The languages that the project ships: a user's own rows in the table must not fail a test.
SHIPPED = [
    *("sq", "ar", "bn", "bg", "zh", "hr", "en", "nl", "fr", "de", "el", "hi", "hu", "it", "ja", "lt", "mk", "pl"),
    *("pt", "ru", "sr", "es", "sw", "te", "th", "tr", "ur", "vi"),
]


def pytest_configure(config):
    """Registers the tests' own bridge before any file is collected: whichever file runs, alone or among all, its
    parameters over `BRIDGES` are the same."""
    import toy_bridge  # noqa: F401


def byte_tokenizer(folder, specials: dict[str, str], template: str | None = None):
    """Saves a byte-level tokenizer without training: 256 bytes after the special tokens, any text round-trips.

    Args:
        specials: role to token, in id order, for instance {"pad_token": "<pad>", "eos_token": "</s>"}.
        template: what the tokenizer puts around a text, for instance "$A </s>".
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials.values(), *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if template is not None:
        used = [(token, vocabulary[token]) for token in specials.values() if token in template]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials).save_pretrained(folder)
    return len(vocabulary)


def make_tiny_llm(folder, width=32, layers=2, seed=0, **changes):
    """A random Llama of `layers` layers with a byte tokenizer, as an ordinary model folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = byte_tokenizer(folder, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, "<s> $A")
    torch.manual_seed(seed)
    settings = {
        "vocab_size": size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,  # large, so that different inputs give different answers
        **changes,
    }
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    return str(folder)


def make_tiny_encoder(folder, width=16, layers=2, seed=1):
    """A random mT5 (encoder and decoder, as the hub's folders are) with a byte tokenizer."""
    import torch
    from transformers import MT5Config, MT5ForConditionalGeneration

    size = byte_tokenizer(folder, {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}, "$A </s>")
    torch.manual_seed(seed)
    config = MT5Config(
        vocab_size=size, d_model=width, d_kv=8, d_ff=2 * width, num_layers=layers, num_decoder_layers=1, num_heads=2
    )
    MT5ForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory):
    """Folder of a tiny Llama."""
    return make_tiny_llm(tmp_path_factory.mktemp("models") / "llm")


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    """Folder of a tiny mT5."""
    return make_tiny_encoder(tmp_path_factory.mktemp("models") / "mt5")


def made_once(tmp_path_factory, name: str, make) -> Path:
    """Returns a folder that `make(folder)` fills in the first of the suite's workers that asks for it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    with FileLock(root / f"{name}.lock"):
        if not (root / name).exists():
            make(root / f"{name}.unfinished")
            os.rename(root / f"{name}.unfinished", root / name)
    return root / name


@pytest.fixture(scope="session")
def datas():
    """The excerpt of real data in the released layout (read only)."""
    return str(DATA / "datas")


def clean_environment(home=None) -> dict[str, str]:
    """A user's environment without a compiler on PATH and, given `home`, with an empty extension cache."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    # Only the interpreter's own folder and what the launcher calls: a hidden need for g++ or ninja must show.
    environment["PATH"] = str(Path(sys.executable).parent)
    environment["CC"] = environment["CXX"] = "/nonexistent/compiler"
    environment["OMP_NUM_THREADS"] = "1"
    if home is not None:
        environment["TORCH_EXTENSIONS_DIR"] = str(home / "extensions")
    return environment


@pytest.fixture
def run(tmp_path):
    """Runs a command in a fresh folder as a user would; returns the finished process with text output."""

    def call(*command, timeout=240, cwd=None, env=None, ranks=None, preexec_fn=None, input=None):
        command = [str(part) for part in command]
        if ranks is not None:
            launcher = shutil.which("deepspeed", path=str(Path(sys.executable).parent))
            port = str(free_port())
            command = [sys.executable, launcher, "--num_gpus", str(ranks), "--master_port", port, *command]
        elif command[0].endswith(".py"):
            command = [sys.executable, *command]
        return subprocess.run(
            command,
            cwd=cwd or tmp_path,
            env={**clean_environment(tmp_path), **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            preexec_fn=preexec_fn,
            input=input,
        )

    return call


def free_port() -> int:
    """A port that is free now, so that launchers do not meet on DeepSpeed's default one."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def flags(tiny_llm, tiny_encoder, datas):
    """Flags of a short fp32 run of the math mapping stage on the excerpt."""
    return [
        *("--deepspeed", "--llm_path", tiny_llm, "--mt_path", tiny_encoder, "--data_root", datas, "--task", "math"),
        *("--precision", "fp32", "--dev_size", "5", "--train_batch_size", "8", "--train_micro_batch_size_per_gpu", "2"),
        *("--max_seq_len", "60", "--max_gen_len", "80", "--lr", "1e-2", "--num_workers", "1"),
    ]


def read_log(folder, key="loss"):
    """Values of one key in a run's log, in order."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@functools.cache
def _prepared() -> subprocess.Popen:
    """The process of `drivers/prepared.py`, which ends with this one."""
    command = [sys.executable, str(ROOT / "tests/drivers/prepared.py")]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean_environment())


def run_prepared(*command, cwd, ranks=1, timeout=240, env=None) -> tuple[list[int | None], list[str]]:
    """Runs a program in processes that have imported torch and DeepSpeed already, several ranks without a launcher.

    Returns:
        the ranks' exit codes, None for one that had to be killed, and what they printed.
    """
    outputs = [str(Path(cwd) / f"printed-{number}.txt") for number in range(ranks)]
    request = {
        "command": [str(part) for part in command],
        "cwd": str(cwd),
        "env": {**clean_environment(cwd), **(env or {})},
    }
    request |= {"ranks": ranks, "output": outputs, "seconds": timeout}
    process = _prepared()
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    codes = json.loads(process.stdout.readline())
    return codes, [Path(path).read_bytes().decode(errors="replace") for path in outputs]


def run_many(tmp_path, runs, ranks=1, driver="many_runs.py"):
    """Returns the outcomes of several argument lists in one launch of a program of `drivers/`."""
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    driver = ROOT / "tests/drivers" / driver
    codes, printed = run_prepared(driver, tmp_path / "runs.json", tmp_path / "outcomes.json", cwd=tmp_path, ranks=ranks)
    assert codes == [0] * ranks, "\n".join(printed)[-3000:]
    return json.loads((tmp_path / "outcomes.json").read_text())
