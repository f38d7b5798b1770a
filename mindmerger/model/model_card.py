"""The model card beside a mapping or an adapter: its metadata, which the Hugging Face hub reads, and its text."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from mindmerger.hub.repositories import split_id
from mindmerger.model.adapters import show_adapter
from mindmerger.model.mapping_files import MindMergerConfig, find_bridge, shown_options

FORMS = {True: "Soft (mapped source and prompt)", False: "Hard (mapped source only)", None: "not recorded"}


def model_card(
    config: MindMergerConfig,
    tensors: dict[str, torch.Tensor],
    name: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    eval_results: Sequence = (),
) -> str:
    """Returns the text of a `README.md`.

    Args:
        tensors: of the mapping, none for the LLM alone.
        name: the hub's of the repository that it is a card for; None for a folder.
        license, datasets: by the hub's names of them.
        eval_results: `huggingface_hub.EvalResult`s.
    """
    title, bridge, adapter = "mapping", config.bridge + shown_options(config), ""
    if config.mt_path is not None:
        text = _about_mapping(config, tensors)
    else:
        title, bridge, text = "control: an adapter without a mapping", "none", f"The LLM `{config.llm_path}` alone."
    if config.adapter is not None:
        text += "\nThen an adapter of the LLM was trained: the folder `adapter/`, which `peft` loads too."
        adapter = f"\n| adapter | {show_adapter(config.adapter)} |"
    # As it was trained: whoever loads it otherwise should know.
    how = f', quantization="{config.quantization}"' if config.quantization not in (None, "none") else ""
    return f"""---
{_metadata(config, name, license, datasets, eval_results)}
---

# MindMerger {title}

{text}

| | |
|---|---|
| bridge | {bridge} |{adapter}
| task | {config.task or "not recorded"} |
| stage | {config.stage or "not recorded"} |
| form | {FORMS[config.augmentation]}{", the prompt in the LLM's chat template" if config.chat_template else ""} |

```python
from mindmerger import MindMerger

model = MindMerger.from_pretrained("{name or "this/folder"}"{how})
```
{_table(eval_results)}
Method: {find_bridge(config.bridge).paper}
"""


def _metadata(config: MindMergerConfig, name, license, datasets, eval_results) -> str:
    """Returns the card's metadata in YAML."""
    from huggingface_hub import ModelCardData

    bases = [found for path in (config.llm_path, config.mt_path) if path and (found := hub_name(path))]
    # The hub's are ISO 639: a script behind the language has no place there. Answers are English whatever is asked.
    languages = list(dict.fromkeys([*(code.split("_")[0] for code in config.languages or ()), "en"]))
    scores = {"model_name": (name or "MindMerger").split("/")[-1], "eval_results": list(eval_results)}
    return ModelCardData(
        library_name="mindmerger",
        pipeline_tag="text-generation",
        license=license,
        base_model=bases or None,
        # Of two base models the hub would say that they were merged.
        base_model_relation="adapter" if bases else None,
        datasets=list(datasets) or None,
        language=languages if config.languages else None,
        tags=["mindmerger", "multilingual", *([config.task] if config.task else [])],
        **(scores if eval_results else {}),
    ).to_yaml()


def hub_name(path: str) -> str | None:
    """Returns the hub's name of a model that is no folder here or lies in the hub's cache, None of another folder."""
    if not os.path.lexists(path):
        return (split_id(path) or (None,))[0]
    cached = [part for part in Path(path).resolve().parts if part.startswith("models--")]
    return cached[-1].removeprefix("models--").replace("--", "/") if cached else None


def _table(eval_results: Sequence) -> str:
    lines = [f"| {one.dataset_name} | {one.metric_name} | {one.metric_value} |" for one in eval_results]
    return "\n".join(["", "| evaluation | measure | score |", "|---|---|---:|", *lines, ""]) if lines else ""


def _about_mapping(config: MindMergerConfig, tensors: dict[str, torch.Tensor]) -> str:
    # Of the gathered tensors: at ZeRO 3 the module's own parameters are empty.
    parameters = sum(tensor.numel() for tensor in tensors.values())
    head = ", with the LLM's output head, which is in the file too" if "lm_head.weight" in tensors else ""
    encoder = f"the multilingual encoder `{config.mt_path}`"
    return f"""A mapping of {parameters:,} parameters from the states of {encoder} (width
{config.encoder_width}) into the input embeddings of the LLM `{config.llm_path}` (width {config.llm_width}).
Both models stay as they are; only this mapping was trained{head}."""
