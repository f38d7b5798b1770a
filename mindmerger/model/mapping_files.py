"""Mapping files: our folder (config.json, mapping.safetensors, model card) and the released `pytorch_model.bin`.

A released file is unpickled with `weights_only=True` only; anything else in it is refused unread.
"""

import dataclasses
import hashlib
import os
import pickle
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import load

from mindmerger.bridges import BRIDGES, Bridge, Stage, Towers
from mindmerger.bridges.base import nearest
from mindmerger.hub.model_configs import load_config
from mindmerger.hub.model_files import ModelError, begins_as_zip, read_json_object, refuse_unreadable
from mindmerger.model.attention_memory import check_attention_memory
from mindmerger.model.trained_head import refuse_tied_head
from mindmerger.runtime.errors import UserError, one_line
from mindmerger.runtime.files import is_utf8, model_path, sha256_of_file, write_bytes_atomic

FORMAT_VERSION = 1
ADAPTER_STAGE = "adapter"
MAPPING_FILE = "mapping.safetensors"
RELEASED_FILE = "pytorch_model.bin"
CONFIG_FILE = "config.json"
SHARD = re.compile(r"(pytorch_model|model)-\d{5}-of-(\d{5})\.(bin|safetensors)")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class MindMergerConfig:
    """Content of `config.json` beside a mapping: which models it belongs to and what it was trained for."""

    mt_path: str | None
    llm_path: str
    encoder_width: int | None
    llm_width: int
    stage: str | None = None
    task: str | None = None
    augmentation: bool | None = None
    model_type: str = "mindmerger"
    format_version: int = FORMAT_VERSION
    bridge: str = "mindmerger"  # folders without the entry are older and hold this one
    bridge_options: dict = dataclasses.field(default_factory=dict)  # without an option, its default
    # Folders without these are older, and their bridge needs none of them.
    encoder_depth: int | None = None
    llm_depth: int | None = None
    vocabulary: int | None = None
    encoder_layers: list | None = None  # the hidden states that the bridge reads
    memory_key_norm: bool | None = None  # whether the keys of a memory pass the LLM's norm of keys; None: no memory
    precision: str | None = None  # of the two models in training: bf16 or fp32
    quantization: str | None = None  # of the LLM in training: none, nf4 or int8
    languages: list | None = None  # codes of those in the training rows
    chat_template: dict | None = None  # around the prompts, as `ChatTemplate.record` gives it
    adapter: dict | None = None  # what the adapter in the folder beside is, by the names of its flags; None: none there

    @property
    def towers(self) -> Towers:
        """The two models as the bridge is built from them."""
        return Towers(*(getattr(self, name) or 0 for name in Towers._fields))


def find_bridge(name: str) -> type[Bridge]:
    """Returns the class of a bridge, by the name in `config.json`.

    Raises:
        ModelError: for a name that is not in `BRIDGES`, listing those that are.
    """
    if name not in BRIDGES:
        raise ModelError(f"unknown bridge {name!r}: choose one of {', '.join(BRIDGES)}{nearest(name, BRIDGES)}")
    return BRIDGES[name]


def stages_of(bridge: str, options: dict[str, str]) -> dict[str, Stage]:
    """Returns a bridge's own stages in their order, its further ones, and the adapter stage, which every bridge has.

    An adapter is trained on what the bridge's last task stage is trained on, which it starts from.
    """
    own = find_bridge(bridge).stages_with(options)
    last = [name for name, stage in own.items() if "task" in stage.data][-1:] or list(own)[-1:]
    return (
        own
        | find_bridge(bridge).further_stages
        | {ADAPTER_STAGE: own[last[0]]._replace(trains=("adapter",), starts_from=last[0])}
    )


def stage_of(config: MindMergerConfig) -> Stage:
    """Returns the stage that a mapping was trained in, the bridge's last one where `config` does not say."""
    stages = stages_of(config.bridge, config.bridge_options)
    return stages.get(config.stage, list(stages.values())[-1])


def form_of(config: MindMergerConfig, augmentation: bool | None) -> str:
    """Returns the form that answers have: soft where the LLM reads the prompt after the prefix, else hard.

    Without a word on `augmentation` it is what the bridge's last stage trains.
    """
    if augmentation is None:
        augmentation = list(find_bridge(config.bridge).stages_with(config.bridge_options).values())[-1].with_prompt
    return "soft" if augmentation else "hard"


def build_bridge(config: MindMergerConfig) -> Bridge:
    """Returns a fresh bridge between the two models of `config`.

    Raises:
        UserError: for an unknown bridge, and options that it does not have.
    """
    return find_bridge(config.bridge)(*config.towers, **config.bridge_options)


def empty_bridge(config: MindMergerConfig) -> Bridge:
    """Returns the bridge of `config` without storage: it has names, shapes and prefix lengths before weights load."""
    with torch.device("meta"):
        return build_bridge(config)


def config_of_models(
    mt_path: str, llm_path: str, bridge: str = "mindmerger", bridge_options: dict | None = None
) -> MindMergerConfig:
    """Returns the configuration of a bridge between two models, from their configs alone.

    Raises:
        ModelError: when one of them has no usable config.
    """
    llm, encoder = load_config(llm_path).get_text_config(), load_config(mt_path)
    encoder = encoder.get_text_config(encoder=encoder.is_encoder_decoder or None)
    config = new_config(
        mt_path,
        llm_path,
        # OPT-350m's embeddings are narrower than its layers.
        Towers(
            encoder.hidden_size,
            getattr(llm, "word_embed_proj_dim", None) or llm.hidden_size,
            encoder.num_hidden_layers,
            llm.num_hidden_layers,
            llm.vocab_size,
        ),
        bridge,
        bridge_options,
    )
    # From the configs: the loaded LLM would refuse the same, after both models have been read.
    if "lm_head" in {
        part for stage in find_bridge(bridge).stages_with(config.bridge_options).values() for part in stage.trains
    }:
        refuse_tied_head(llm_path, llm.tie_word_embeddings)
    if find_bridge(bridge).uses_memory:
        check_attention_memory(llm_path, llm)
    return config


def new_config(
    mt_path: str | None, llm_path: str, towers: Towers, bridge: str, bridge_options: dict | None
) -> MindMergerConfig:
    """Returns the configuration of a bridge, its options settled.

    Raises:
        UserError: for an unknown bridge, and options that it does not have.
    """
    return MindMergerConfig(
        mt_path=model_path(mt_path),
        llm_path=model_path(llm_path),
        bridge=bridge,
        bridge_options=find_bridge(bridge).settle(bridge_options or {}),
        **towers._asdict(),
    )


def read_config(path: str) -> MindMergerConfig | None:
    """Reads the `config.json` of a saved mapping, given its folder or a file in it; None where there is none of ours.

    Raises:
        ModelError: when it is there but cannot be read, or comes from a newer format.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    values = read_json_object(file)
    # A model's own folder has a config.json too.
    if values.get("model_type") != "mindmerger":
        return None
    known = {field.name: field.type for field in dataclasses.fields(MindMergerConfig)}
    for name, value in values.items():
        if name in known and not (isinstance(value, known[name]) and _could_name_a_file(value)):
            raise ModelError(f"{file}: {name} cannot be {str(value)[:80]!r}")
    # A newer format may mean other things by the same entries.
    if values.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
        raise ModelError(f"{file} has format version {values['format_version']}, this program knows {FORMAT_VERSION}")
    try:
        # Entries that a later version has added are passed over, as long as the format's number stays.
        config = MindMergerConfig(**{name: value for name, value in values.items() if name in known})
    except TypeError as error:
        raise ModelError(f"{file} is incomplete: {one_line(error)}") from error
    if config.bridge in BRIDGES:
        try:
            config.bridge_options = BRIDGES[config.bridge].settle(config.bridge_options)
        except UserError as error:
            raise ModelError(f"{file}: {error}") from error
    return config


def _could_name_a_file(value) -> bool:
    """Returns False for a text with a NUL or half a surrogate pair, which the system's calls refuse in a path."""
    try:
        return not isinstance(value, str) or b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def find_mapping_file(path: str) -> Path:
    """Finds the file a mapping is read from, given itself or its folder; of a sharded one the first shard.

    Raises:
        ModelError: when there is none, listing what the folder holds.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ModelError(f"no mapping at {path}: pass a saved folder, a .safetensors file or a pytorch_model.bin")
    # A run's output folder holds the first two; the third is how XBridge's weights are saved.
    for name in (MAPPING_FILE, RELEASED_FILE, "model.safetensors"):
        if (path / name).is_file():
            return path / name
    # LangBridge's weights come with both models, in shards.
    shards = sorted(entry for entry in path.iterdir() if SHARD.fullmatch(entry.name))
    if shards:
        return shards[0]
    there = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
    raise ModelError(f"{path} holds neither {MAPPING_FILE} nor {RELEASED_FILE} (it holds: {there})")


def shards_of(file: Path) -> list[Path]:
    """Returns the files that one mapping is spread over: all shards where `file` is one of them, else itself.

    Raises:
        ModelError: when a shard is missing.
    """
    match = SHARD.fullmatch(file.name)
    if match is None:
        return [file]
    stem, number, suffix = match.groups()
    shards = [file.with_name(f"{stem}-{i:05d}-of-{number}.{suffix}") for i in range(1, int(number) + 1)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ModelError(f"{file.parent} lacks {missing[0]}, one of {int(number)} shards: fetch it too")
    return shards


def mapping_sha256(file: str) -> str:
    """Returns the sha256 of a mapping file, of a sharded one over those of its shards."""
    digests = [sha256_of_file(shard) for shard in shards_of(Path(file))]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def read_mapping(path: str, wanted: Collection[str] | None = None) -> dict[str, torch.Tensor | None]:
    """Reads a mapping's tensors, without executing anything a file may contain.

    Args:
        path: a folder or a file; of a sharded file all shards are read.
        wanted: the keys whose tensors are read; None for all. The others, a released file's towers perhaps, stay on
            disk and are None.

    Raises:
        ModelError: when a file cannot be read or is a pickle of more than tensors.
    """
    state = {}
    for file in shards_of(find_mapping_file(path)):
        refuse_unreadable(file)
        read = _read_safetensors if file.suffix == ".safetensors" else _read_pickle
        state |= read(file, wanted)
    return state


def _read_safetensors(file: Path, wanted: Collection[str] | None) -> dict[str, torch.Tensor | None]:
    try:
        if not is_utf8(file):  # the library opens no such path
            return load(file.read_bytes())
        with safe_open(file, "pt") as tensors:
            keys = tensors.keys()
            return {key: tensors.get_tensor(key) if wanted is None or key in wanted else None for key in keys}
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(f"{file} cannot be read: {one_line(error)}") from error


def _read_pickle(file: Path, wanted: Collection[str] | None) -> dict[str, torch.Tensor | None]:
    # Mapped, so that only the pages of wanted tensors are read; the format before torch 1.6 cannot be.
    mapped = begins_as_zip(file) and is_utf8(file)
    try:
        with warnings.catch_warnings(action="ignore"):  # about the pickle's protocol, before the error that matters
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{file} is not a plain file of tensors and was not read, since unpickling it could run code: if you trust "
            "its origin, save its tensors alone with safetensors.torch.save_file and pass that"
        ) from error
    # What torch raises of files that are cut short and of texts in their place.
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{file} cannot be read, it may be cut short: {one_line(error)}") from error
    # MindMerger's released files have this level; a dictionary of tensors without it is read as well.
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    # weights_only lets numbers, texts and lists through as well.
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{file} holds no 'model_state_dict' of tensors, as released mappings do")
    # Cloned: a view would keep the whole file mapped, both models of a released one included.
    return {key: value.clone() if wanted is None or key in wanted else None for key, value in state.items()}


def check_mapping(path: str, config: MindMergerConfig) -> dict[str, torch.Tensor]:
    """Reads a mapping, our own or released, and makes sure that it fits the two models of `config`; needs no model.

    Of released weights what belongs to the towers is passed over. They may lack an output head that the bridge trains:
    then it is the LLM's own.

    Raises:
        ModelError: naming both shapes and both models, the parameters that are missing or too many, or the first one
            that is not a plain tensor of floating-point numbers or has values that are not finite.
    """
    bridge = empty_bridge(config)
    expected = {name: tuple(p.shape) for name, p in bridge.named_parameters()}
    state = _by_own_names(path, config, bridge, expected)
    for name, shape in expected.items():
        if name not in state:
            continue
        _refuse_other_than_numbers(path, name, state[name])
        if tuple(state[name].shape) != shape:
            chosen = f" with{shown_options(config)}" if config.bridge_options else ""
            raise ModelError(
                f"{path}: {name} has shape {tuple(state[name].shape)} but encoder {config.mt_path} (width "
                f"{config.encoder_width}{_depth(config.encoder_depth)}) and LLM {config.llm_path} (width "
                f"{config.llm_width}{_depth(config.llm_depth)}){chosen} need {shape}: pass the models "
                f"{'and options ' if chosen else ''}this mapping was trained with"
            )
        if not torch.isfinite(state[name].float()).all():  # as fp32, which the mapping is
            raise ModelError(
                f"{path}: {name} has values that are NaN or infinite: the file is damaged or its training diverged; "
                "take an earlier checkpoint, or train again with a lower --lr"
            )
    return state


def _depth(layers: int | None) -> str:
    return f", {layers} layers" if layers else ""


def _by_own_names(path: str, config: MindMergerConfig, bridge: Bridge, expected) -> dict[str, torch.Tensor]:
    """Reads a mapping's tensors by the names of the bridge's parameters, whichever of the two forms the file has.

    Raises:
        ModelError: naming what is missing or too many, and the bridge whose weights they are instead.
    """
    released = bridge.released_names()
    # Only these keys: a released LayAlign checkpoint holds both models, 40 GB of which 134 MB are wanted.
    every = found = read_mapping(path, {*expected, *released})
    if found.keys() == expected.keys():
        return found
    names = expected
    # MindMerger's own names are its released ones: there is nothing to translate then.
    if any(key in released and key not in expected for key in found):
        names = released
        found = {key: value for key, value in found.items() if key in released or not _of_towers(key, bridge)}
    missing, extra = sorted(names.keys() - found.keys()), sorted(found.keys() - names.keys())
    if names is released:
        missing = [key for key in missing if not released[key].startswith("lm_head.")]
    if missing or extra:
        fits = [name for name in BRIDGES if name != config.bridge and _released_fits(every, config, name)]
        instead = f": these are weights of the bridge {fits[0]}, pass --bridge {fits[0]}" if fits else ""
        raise ModelError(
            f"{path} is not a mapping of the bridge {config.bridge}{shown_options(config)}: missing "
            f"{missing or 'nothing'}, unknown {extra[:20] or 'nothing'}{instead}"
        )
    return {released[key]: value for key, value in found.items()}


def _of_towers(key: str, bridge: Bridge) -> bool:
    return key.startswith(bridge.released_others)


def _released_fits(found: dict, config: MindMergerConfig, name: str) -> bool:
    bridge = empty_bridge(dataclasses.replace(config, bridge=name, bridge_options={}))
    names = bridge.released_names().keys()
    own = {one for one, _ in bridge.named_parameters()}
    return names <= found.keys() or own == found.keys()


def shown_options(config: MindMergerConfig) -> str:
    """Returns a bridge's options as they stand behind its name in messages, "" where it has none."""
    shown = ", ".join(f"{name}={value}" for name, value in config.bridge_options.items())
    return f" ({shown})" if shown else ""


def _refuse_other_than_numbers(path: str, name: str, tensor: torch.Tensor) -> None:
    """Refuses a tensor without plain storage or of a dtype whose values are not a mapping's, such as float8 codes."""
    if tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided or tensor.dtype not in DTYPES:
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_meta:
            kind += " without values (meta)"
        elif tensor.is_nested or tensor.layout != torch.strided:
            kind += " in a nested or sparse layout"
        raise ModelError(
            f"{path}: {name} is {kind}: a mapping is read from dense tensors in "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}, save it as one of these"
        )


def save_released(path: str, state: dict[str, torch.Tensor]) -> None:
    """Writes a mapping in the released code's format, whole or not at all."""
    import io

    buffer = io.BytesIO()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    # The format before torch 1.6, as the released code writes it. It cannot be mapped: a mapping is small.
    torch.save({"model_state_dict": tensors}, buffer, _use_new_zipfile_serialization=False)
    write_bytes_atomic(path, buffer.getvalue())
