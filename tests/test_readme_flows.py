"""The commands of the docs, run by tiny models in the order in which they stand."""

import importlib
import re
import shlex
import shutil

import pytest
import torch
from conftest import DATA, ROOT, make_tiny_encoder, make_tiny_llm
from expert_folders import base_state, save_expert, tiny_config, tuned
from test_translate_test import make_translator

FEW = ["--languages", "sw,th", "--limit", "2"]
# What keeps each program short; given after the page's own flags, so that these count.
SHORTER = {
    "run_evaluation": [*FEW, "--max_new_tokens", "2"],
    "mindmerger.analysis.neurons count": [*FEW, "--max_new_tokens", "2"],
    "mindmerger.baselines.parallel_input": FEW,
    "mindmerger.baselines.translate_test": [*FEW, "--max_new_tokens", "8"],
    "mindmerger.analysis.contamination": FEW[:2],
    "mindmerger.analysis.embeddings": ["--languages", "sw,en", "--limit", "3"],
}
# The reproduction scripts as the commands that they start.
# What runs outside of this process: scripts, and vLLM's own environment, whose lines tests/test_vllm_engine.py is for.
ELSEWHERE = ("bash", "LLM_PATH=", "python3.11 -m venv vllm_env", "vllm_env/")
SCRIPTS = {
    "bash scripts/evaluation_mgsm.sh": "python run_evaluation.py --llm_path meta-math/MetaMath-7B-V1.0 --mt_path "
    "google/mt5-xl --init_checkpoint outputs/MindMerger/math/augmentation/pytorch_model.bin --max_gen_len 512",
    "bash scripts/evaluation_mgsm.sh --llm_only": "python run_evaluation.py --llm_path meta-math/MetaMath-7B-V1.0 "
    "--max_gen_len 512 --llm_only",
}


def commands_of(page: str) -> list[str]:
    """Commands of a page's shell blocks, in order, continuation lines joined."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split(" #")[0].split()) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """A folder with the models, mappings and data that the pages name, all tiny."""
    from mindmerger.model.mapping_files import save_released
    from mindmerger.model.mindmerger import MindMerger

    root = tmp_path_factory.mktemp("newcomer")
    (root / "datas").symlink_to(DATA / "datas")
    config = tiny_config(layers=32)
    start = base_state(config)
    for i, name in enumerate(("base-7b", "math-7b", "swahili-7b", "thai-7b")):
        save_expert(root / name, config, tuned(start, i) if i else start, torch.float32)
    (root / "meta-math").mkdir()
    (root / "google").mkdir()
    llm = make_tiny_llm(root / "meta-math/MetaMath-7B-V1.0")
    encoder = make_tiny_encoder(root / "google/mt5-xl")
    make_translator("nllb", root / "facebook/nllb-200-distilled-600M")
    model = MindMerger.from_models(encoder, llm, torch.float32)
    for task, stage in (("math", "mapping"), ("math", "augmentation"), ("xnli", "augmentation")):
        model.config.task, model.config.stage, model.config.augmentation = task, stage, stage == "augmentation"
        folder = root / "outputs/MindMerger" / task / stage
        model.save_pretrained(folder)
        save_released(folder / "pytorch_model.bin", model.mapping.state_dict())
    return root


def run(command: str) -> None:
    """Runs one command line in this process, as its program would be started."""
    words = shlex.split(SCRIPTS.get(command, command))
    if words[0] == "deepspeed":
        words = ["python", *words[1:]]
    if words[:2] == ["python", "-m"]:
        program, arguments = words[2], words[3:]
        name = f"{program} {arguments[0]}" if program == "mindmerger.analysis.neurons" else program
    else:
        program = name = words[1].removeprefix("scripts/").removesuffix(".py")
        arguments = words[2:]
    extra = [] if "--compare" in arguments else SHORTER.get(name, [])
    assert importlib.import_module(program).main([*arguments, *extra]) == 0


@pytest.mark.parametrize(
    ("page", "needed"),
    [
        (
            "docs/baselines.md",
            ("layer_swap", "--middle", "maet", "--task_arithmetic", "--soup", "--parallel_input", "--translate_test"),
        ),
        ("docs/analysis.md", ("neurons count", "neurons analyse", "contamination", "embeddings")),
    ],
)
def test_commands_of_a_page_succeed_in_the_order_in_which_they_stand(newcomer, monkeypatch, page, needed):
    """Two merges into one folder, or two models into one results folder, would refuse the second command."""
    monkeypatch.chdir(newcomer)
    for folder in ("results", "merged"):
        shutil.rmtree(folder, ignore_errors=True)
    commands = commands_of("docs/evaluation.md") + commands_of(page)
    commands = [c for c in commands if c in SCRIPTS or not c.startswith(ELSEWHERE)]
    assert [word for word in needed if word not in " ".join(commands)] == []
    for i, command in enumerate(commands):
        try:
            run(command)
        except Exception as error:
            raise AssertionError("\n".join(["this fails:", command, "after:", *commands[:i]])) from error
