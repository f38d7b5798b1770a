"""The model card beside a mapping or an adapter."""

import torch

from mindmerger.model.adapters import show_adapter
from mindmerger.model.mapping_files import MindMergerConfig, find_bridge, shown_options

FORMS = {True: "Soft (mapped source and prompt)", False: "Hard (mapped source only)", None: "not recorded"}


def model_card(config: MindMergerConfig, tensors: dict[str, torch.Tensor]) -> str:
    """Returns the text of a `README.md`.

    Args:
        tensors: of the mapping, none for the LLM alone.
    """
    title, bridge, adapter = "mapping", config.bridge + shown_options(config), ""
    if config.mt_path is not None:
        text = _about_mapping(config, tensors)
    else:
        title, bridge, text = "control: an adapter without a mapping", "none", f"The LLM `{config.llm_path}` alone."
    if config.adapter is not None:
        text += "\nThen an adapter of the LLM was trained: the folder `adapter/`, which `peft` loads too."
        adapter = f"\n| adapter | {show_adapter(config.adapter)} |"
    return f"""---
library_name: mindmerger
tags: [mindmerger, multilingual]
---

# MindMerger {title}

{text}

| | |
|---|---|
| bridge | {bridge} |{adapter}
| task | {config.task or "not recorded"} |
| stage | {config.stage or "not recorded"} |
| form | {FORMS[config.augmentation]} |

```python
from modeling_mindmerger import MindMerger

model = MindMerger.from_pretrained("this/folder")
```

Method: {find_bridge(config.bridge).paper}
"""


def _about_mapping(config: MindMergerConfig, tensors: dict[str, torch.Tensor]) -> str:
    # Of the gathered tensors: at ZeRO 3 the module's own parameters are empty.
    parameters = sum(tensor.numel() for tensor in tensors.values())
    head = ", with the LLM's output head, which is in the file too" if "lm_head.weight" in tensors else ""
    encoder = f"the multilingual encoder `{config.mt_path}`"
    return f"""A mapping of {parameters:,} parameters from the states of {encoder} (width
{config.encoder_width}) into the input embeddings of the LLM `{config.llm_path}` (width {config.llm_width}).
Both models stay as they are; only this mapping was trained{head}."""
