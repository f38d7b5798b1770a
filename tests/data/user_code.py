"""A user's program, which is type-checked and never run: what a checker knows of the names that the package exports."""

from pathlib import Path
from typing import assert_type

import data_utils
import modeling_mindmerger
from mindmerger import Mapping, MindMerger, __version__, answer

assert_type(__version__, str)

model = MindMerger.from_models("encoder", "llm", dtype="auto", bridge="mindmerger", bridge_options=None)
assert_type(model, MindMerger)
assert_type(MindMerger.from_pretrained("folder", mt_path=None, llm_path="llm"), MindMerger)
model.load_mapping("outputs/MindMerger/math/augmentation")
model.save_pretrained("folder")
assert_type(model.bad_weight(), str | None)
assert_type(model.released_names(), dict[str, str])
assert_type(answer(model, ["a question"], task="math", languages=["Swahili"], batch_size=2), list[str])

bridge: modeling_mindmerger.Mapping = Mapping(16, 32)
assert_type(modeling_mindmerger.read_config("folder"), modeling_mindmerger.MindMergerConfig | None)
assert_type(modeling_mindmerger.find_mapping_file("folder"), Path)
modeling_mindmerger.save_released("pytorch_model.bin", modeling_mindmerger.read_mapping("folder"))

assert_type(data_utils.find_task("math"), data_utils.Task)
assert_type(data_utils.find_language("sw"), data_utils.Language)
assert_type(data_utils.parse_languages("sw,th"), list[data_utils.Language])
assert_type(data_utils.LANGUAGES["Swahili"].code, str)
