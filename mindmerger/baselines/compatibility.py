"""Which experts fit each other: settings, shapes and vocabularies compared before a byte is merged."""

from mindmerger.baselines.model_folder import MergeError, ModelFolder, place_of
from mindmerger.hub.model_files import ModelError
from mindmerger.hub.tokenizer_files import VOCABULARY_FILES, load_tokenizer
from mindmerger.runtime.processes import warn

# Settings of config.json that decide what a weight means: experts must agree on them.
SAME_SETTINGS = {
    "model_type": "architecture",
    "num_hidden_layers": "number of layers",
    "hidden_size": "hidden width",
    "intermediate_size": "MLP width",
    "num_attention_heads": "number of attention heads",
    "num_key_value_heads": "number of key-value heads",
    "head_dim": "head width",
    "hidden_act": "activation",
    "rope_parameters": "rope settings",
    "tie_word_embeddings": "tie_word_embeddings",
}
# Settings that the task expert's config decides for the merged model; the other one's weights were tuned with its own.
WARNED_SETTINGS = ("rms_norm_eps", "sliding_window")


def check_compatible(task: ModelFolder, others: list[ModelFolder]) -> dict[str, int]:
    """Makes sure that every model can be merged with the task expert.

    Returns the number of rows of each tensor that all models have; it is below the task expert's own only where
    vocabularies differ by added tokens.

    Raises:
        MergeError: naming both models and both values.
    """
    for other in others:
        for setting, meaning in SAME_SETTINGS.items():
            values = [_setting(model.config, setting) for model in (task, other)]
            if values[0] != values[1]:
                raise MergeError(
                    f"different {meaning}: {task} has {values[0]}, {other} has {values[1]}; only experts tuned from "
                    "the same base can be merged"
                )
        for setting in WARNED_SETTINGS:
            values = [getattr(model.config, setting, None) for model in (task, other)]
            if values[0] != values[1]:
                warn(f"{task} has {setting} {values[0]}, {other} has {values[1]}: the former's is kept")
        # A config may leave out what differs, such as biases of attention: the tensors themselves decide.
        if task.tensors.keys() != other.tensors.keys():
            name = min(task.tensors.keys() ^ other.tensors.keys())
            holder, lacking = (task, other) if name in task.tensors else (other, task)
            raise MergeError(f"{holder} has a tensor {name}, {lacking} has none")
        _check_shapes(task, other)
        _check_vocabulary(task, other)
    # For its error alone: an unknown scheme of names is found now and not in the middle of the writing.
    for name in task.tensors:
        place_of(name)
    return {name: min(model.tensors[name].shape[0] for model in (task, *others)) for name in task.tensors}


def _setting(config, name: str):
    # A config that leaves these two out means what follows from others: it does not differ from one that spells it out.
    value = getattr(config, name, None)
    if name == "head_dim" and value is None:
        value = config.hidden_size // config.num_attention_heads
    if name == "num_key_value_heads" and value is None:
        value = config.num_attention_heads
    return value


def _check_shapes(task: ModelFolder, other: ModelFolder) -> None:
    for name, stored in task.tensors.items():
        shapes = stored.shape, other.tensors[name].shape
        if place_of(name).kind in ("embeddings", "head"):  # whose rows may differ by added tokens
            shapes = shapes[0][1:], shapes[1][1:]
        if shapes[0] != shapes[1]:
            raise MergeError(f"different shapes of {name}: {task} has {shapes[0]}, {other} has {shapes[1]}")


def _check_vocabulary(task: ModelFolder, other: ModelFolder) -> None:
    """Refuses vocabularies in which one id means two tokens; added tokens, which users name freely, only warn."""
    # Equal bytes settle it: loading two tokenizers takes seconds, and experts mostly keep their base's files.
    for name in VOCABULARY_FILES:
        files = [model.path / name for model in (task, other)]
        if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
            return
    vocabularies = [_vocabulary(model) for model in (task, other)]
    if None in vocabularies:
        return
    (tokens, added), (other_tokens, other_added) = vocabularies
    rows = min(model.tensors["model.embed_tokens.weight"].shape[0] for model in (task, other))
    # Beyond the rows that all models have nothing is merged, so ids there may mean what they like.
    different = sorted(i for i in tokens.keys() & other_tokens.keys() if i < rows and tokens[i] != other_tokens[i])
    if not different:
        return
    serious = [i for i in different if not (i in added and i in other_added)]
    i = (serious or different)[0]
    message = (
        f"{len(different)} token ids mean different tokens: {i} is {tokens[i]!r} in {task}, {other_tokens[i]!r} in "
        f"{other}"
    )
    if serious:
        raise MergeError(f"{message}; only experts with the same base vocabulary can be merged")
    warn(f"{message}; their embedding rows are merged all the same")


def _vocabulary(model: ModelFolder) -> tuple[dict[int, str], set[int]] | None:
    """Returns the token of each id, and the ids of added tokens; None for a folder without a tokenizer."""
    if not any((model.path / name).is_file() for name in VOCABULARY_FILES):
        return None
    try:
        tokenizer = load_tokenizer(model.path)
    except ModelError as error:
        raise MergeError(f"{model.role}: {error}") from error
    return {i: token for token, i in tokenizer.get_vocab().items()}, set(tokenizer.added_tokens_decoder)
