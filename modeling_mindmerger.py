"""Front door to the model: what users import, and where it lives.

| name | what it is | file |
|---|---|---|
| `MindMerger` | encoder, bridge and LLM as one module: `from_models`, `from_pretrained`, `forward`, `generate` | mindmerger/model/mindmerger.py |
| `Mapping` | the trained part of the paper | mindmerger/bridges/mapping.py |
| `MindMergerConfig`, `read_mapping`, `save_released` | mapping files, ours and the released format | mindmerger/model/mapping_files.py |
| `load_encoder`, `load_llm` | the frozen towers | mindmerger/model/towers.py |
"""  # noqa: E501

from mindmerger.bridges.mapping import Mapping
from mindmerger.hub.model_files import ModelError
from mindmerger.model.mapping_files import (
    MindMergerConfig,
    check_mapping,
    find_mapping_file,
    read_config,
    read_mapping,
    save_released,
)
from mindmerger.model.mindmerger import MindMerger, MindMergerOutput
from mindmerger.model.towers import load_encoder, load_llm

__all__ = [
    "Mapping",
    "MindMerger",
    "MindMergerConfig",
    "MindMergerOutput",
    "ModelError",
    "check_mapping",
    "find_mapping_file",
    "load_encoder",
    "load_llm",
    "read_config",
    "read_mapping",
    "save_released",
]
