"""Tokenising: texts to ids, the encoder's language tags, and what is dropped where a text is too long."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mindmerger.runtime.files import model_path
from mindmerger.tasks.base import Example
from mindmerger.tasks.languages import LANGUAGES, Language, _names, find_language
from mindmerger.tasks.readers import DataError

if TYPE_CHECKING:  # the hub's modules import transformers, which takes seconds
    from mindmerger.hub.chat_template import ChatTemplate

# Languages of version 0.1.0. Their tags stand in the name of every cache of an encoder that takes tags; those of later
# languages do not, or each row added would have all data tokenised anew.
_FIRST_LANGUAGES = _names("sq ar bn bg zh hr en nl fr de el hi hu it ja lt mk pl pt ru sr es sw te th tr ur vi")


@dataclass
class Tokenizers:
    """The encoder's and the LLM's tokenizer (either may be None), the ids that frame a text, and the chat template that
    prompts stand in, if any: `eos_id` is then what ends its assistant's turn."""

    encoder: object | None
    llm: object | None
    encoder_pad_id: int
    llm_pad_id: int
    eos_id: int | None
    bos_id: int | None
    chat: "ChatTemplate | None" = None

    def within(self, chat: "ChatTemplate | None", llm_path: str) -> "Tokenizers":
        """Returns the tokenizers with prompts inside a chat template; themselves for None.

        Raises:
            UserError: for an LLM without the token that ends a turn.
        """
        return self if chat is None else replace(self, chat=chat, eos_id=chat.end_id(self.llm, llm_path))


def load_tokenizers(mt_path: str | None, llm_path: str | None, chat: "ChatTemplate | None" = None) -> Tokenizers:
    """Loads both tokenizers from folders or hub names.

    Args:
        chat: the template that prompts for the LLM stand in; None for none.

    Raises:
        DataError: for a folder or a tokenizer that is missing or damaged, and an LLM tokenizer without EOS.
    """
    encoder = _load_tokenizer(mt_path, "--mt_path") if mt_path else None
    llm = _load_tokenizer(llm_path, "--llm_path") if llm_path else None
    if llm is not None and llm.eos_token_id is None:
        raise DataError(f"the tokenizer of {llm_path} has no EOS token: targets could not end (set its eos_token)")
    tokenizers = Tokenizers(
        encoder=encoder,
        llm=llm,
        encoder_pad_id=_padding_id(encoder, mt_path) if encoder else 0,
        llm_pad_id=_padding_id(llm, llm_path) if llm else 0,
        eos_id=llm.eos_token_id if llm else None,
        bos_id=llm.bos_token_id if llm else None,
    )
    return tokenizers.within(chat, llm_path)


def _load_tokenizer(path: str, flag: str):
    from mindmerger.hub.model_files import ModelError
    from mindmerger.hub.tokenizer_files import load_tokenizer

    name = model_path(path)
    if not os.path.isdir(name) and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise DataError(f"no folder {path} ({flag})")
    try:
        tokenizer = load_tokenizer(name)
    except ModelError as error:
        raise DataError(f"{error} ({flag})") from error
    tokenizer.truncation_side = "right"  # the folder's own may drop the start of a question
    tokenizer.model_max_length = sys.maxsize  # the limits are ours; the folder's may be anything
    return tokenizer


def _padding_id(tokenizer, path: str) -> int:
    """Returns an id to fill rows up with, masked out later: the pad or EOS token's if the model has its row, else 0."""
    from mindmerger.hub.model_configs import embedding_rows, load_config
    from mindmerger.hub.model_files import find_file

    rows = embedding_rows(load_config(path)) if find_file(str(path), "config.json") is not None else None
    named = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((one for one in named if one is not None and (rows is None or one < rows)), 0)


def check_rows(tokenizer, path: str, ids: Iterable[int], rows: int | None) -> None:
    """Makes sure that the model at `path` has an embedding row for each of the ids that will be used.

    Args:
        rows: of the model's embedding table; None where it is not known.

    Raises:
        DataError: naming the token.
    """
    # On a GPU such an id is an assertion inside a kernel, which names neither the token nor the model.
    largest = max(ids, default=-1)
    if rows is not None and largest >= rows:
        raise DataError(
            f"the tokenizer of {path} makes token {tokenizer.convert_ids_to_tokens(largest)!r} (id {largest}) of the "
            f"data, but the model's embedding table ends at id {rows - 1}: take the tokenizer that belongs to the "
            "model, or give the token a row (resize_token_embeddings)"
        )


def _tag_column(tokenizer) -> str | None:
    """Returns the column of the language table that a tokenizer's source languages are named by; None without any."""
    if not hasattr(tokenizer, "src_lang"):
        return None
    # Every family of encoders knows English: its tag for it tells which family's tags a vocabulary holds.
    english = LANGUAGES["English"]
    for column in ("nllb", "mbart", "m2m100"):
        if _knows(tokenizer, column, getattr(english, column)):
            return column
    raise DataError(f"{_named(tokenizer)} takes a source language but its codes are none of NLLB's, M2M100's, mBART's")


def _knows(tokenizer, column: str, code: str) -> bool:
    token = f"__{code}__" if column == "m2m100" else code
    return tokenizer.convert_tokens_to_ids(token) not in (None, tokenizer.unk_token_id)


def _named(tokenizer) -> str:
    return f"encoder {tokenizer.name_or_path or type(tokenizer).__name__}"


def source_language_code(tokenizer, language: Language) -> str | None:
    """Returns the tag that an encoder's tokenizer wants for a language, None where it takes none.

    Raises:
        DataError: naming encoder and language where the encoder has no code for the language.
    """
    column = _tag_column(tokenizer)
    if column is None:
        return None
    code = getattr(language, column)
    if code is None or not _knows(tokenizer, column, code):
        raise DataError(
            f"{_named(tokenizer)} has no code for {language.name}: leave it out with --languages, "
            "or take an encoder that knows it"
        )
    return code


def languages_of(tokenizer) -> list[str] | None:
    """Returns the names of the languages that an encoder's tokenizer has a tag for, None where it takes no tag.

    Raises:
        DataError: for a tokenizer whose tags are of no known family.
    """
    column = _tag_column(tokenizer)
    if column is None:
        return None
    tags = {name: getattr(language, column) for name, language in LANGUAGES.items()}
    return [name for name, tag in tags.items() if tag is not None and _knows(tokenizer, column, tag)]


def _ids(tokenizer, texts: list[str], special: bool, max_length: int | None = None) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(
        texts,
        add_special_tokens=special,
        truncation=max_length is not None,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no "longer than the maximum": the limits are ours
    )["input_ids"]


def _encode_sources(
    tokenizer, examples: Sequence[Example], max_seq_len: int, shrink: bool
) -> tuple[list[list[int]], list[bool]]:
    """Returns encoder ids with the tokenizer's own special tokens, and for each row whether it was too long: then it is
    truncated on the right inside them, or with `shrink` in its shrinkable span."""
    if max_seq_len <= tokenizer.num_special_tokens_to_add():
        raise DataError(f"--max_seq_len {max_seq_len} leaves no room for text in {_named(tokenizer)}")
    # One call for each language: the tag is a state of the tokenizer, not an argument of its call.
    groups: dict[str, list[int]] = {}
    tagged = hasattr(tokenizer, "src_lang")
    for row, example in enumerate(examples):
        groups.setdefault(example.language if tagged else "", []).append(row)
    ids: list[list[int]] = [[]] * len(examples)
    truncated = [False] * len(examples)
    for language, rows in groups.items():
        if tagged:
            tokenizer.src_lang = source_language_code(tokenizer, find_language(language))
        for row, row_ids in zip(rows, _ids(tokenizer, [examples[row].source for row in rows], True), strict=True):
            ids[row], truncated[row] = row_ids, len(row_ids) > max_seq_len
        # Only the long rows a second time: ids that are truncated at once do not tell that they were.
        long = [row for row in rows if truncated[row]]
        if shrink:
            for row, example in ((row, examples[row]) for row in long):
                ids[row] = _shorten(tokenizer, example.source, example.shrinkable, max_seq_len, special=True)
            continue
        short_ids = _ids(tokenizer, [examples[row].source for row in long], True, max_seq_len)
        for row, row_ids in zip(long, short_ids, strict=True):
            ids[row] = row_ids
    return ids, truncated


def _shorten(tokenizer, text: str, shrinkable: tuple[int, int], limit: int, special: bool = False) -> list[int]:
    """Returns ids of a prompt with as much of its shrinkable span as fits, from its start; the template stays whole.

    Where even the template alone is too long, its last tokens, `limit` of them.

    Args:
        special: whether the tokenizer's special tokens are part of them.
    """
    start, end = shrinkable

    def ids_with(characters: int) -> list[int]:
        return _ids(tokenizer, [text[: start + characters] + text[end:]], special)[0]

    best = ids_with(0)
    if len(best) > limit:
        # The end, where the template says that an answer follows; the released code cuts that off.
        return _last_ids(tokenizer, text[:start] + text[end:], limit) if special else best[-limit:]
    return _longest(ids_with, end - start, best, limit)


def _longest(ids_with: Callable[[int], list[int]], most: int, best: list[int], limit: int) -> list[int]:
    """Returns the ids of as many characters as fit, of `most` that do not.

    Args:
        best: ids of none, which fit.
    """
    # Searched for, not computed: the tokens of two halves of a text are not those of the whole.
    # Doubling first: a span of megabytes is never tokenised whole.
    fits, too_long = 0, min(limit, most)
    while too_long < most and len(ids := ids_with(too_long)) <= limit:
        fits, best, too_long = too_long, ids, min(2 * too_long, most)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        ids = ids_with(middle)
        if len(ids) <= limit:
            fits, best = middle, ids
        else:
            too_long = middle
    return best


def _encode_prompts(
    tokenizers: Tokenizers, examples: Sequence[Example], limit: int
) -> tuple[list[list[int]], list[bool]]:
    """Returns prompt ids, the chat template's among them where there is one, and for each row whether it was too long:
    then it is shortened in its shrinkable span."""
    llm, chat = tokenizers.llm, tokenizers.chat
    if chat is None:
        ids = _ids(llm, [example.prompt for example in examples], False)
        truncated = [len(row) > limit for row in ids]
        return [
            _shorten(llm, example.prompt, example.shrinkable, limit) if too_long else row
            for example, row, too_long in zip(examples, ids, truncated, strict=True)
        ], truncated
    # Tokenised with the template's BOS, and then without its token: what follows one is spelt otherwise by some.
    extra = int(chat.drops_bos)
    wrapped = [chat.wrap(example.prompt, example.shrinkable) for example in examples]
    ids = _ids(llm, [text for text, _ in wrapped], False)
    truncated = [len(row) > limit + extra for row in ids]
    return [
        (_shorten_inside(llm, chat, *one, limit + extra) if too_long else row)[extra:]
        for one, row, too_long in zip(wrapped, ids, truncated, strict=True)
    ], truncated


def _shorten_inside(tokenizer, chat: "ChatTemplate", text: str, shrinkable: tuple[int, int], limit: int) -> list[int]:
    """Returns ids as `_shorten` does, the chat template whole also where the prompt is too long without its shrinkable
    span: then the start of the rest goes, since its end says that an answer follows.

    Raises:
        DataError: where the chat template alone is too long.
    """
    start, end = shrinkable
    rest = text[len(chat.before) : start] + text[end : len(text) - len(chat.after)]

    def ids_with(characters: int) -> list[int]:
        return _ids(tokenizer, [chat.before + rest[len(rest) - characters :] + chat.after], False)[0]

    if len(ids_with(len(rest))) <= limit:
        return _shorten(tokenizer, text, shrinkable, limit)
    best = ids_with(0)
    if len(best) > limit:
        raise DataError(
            f"--max_gen_len {limit - chat.drops_bos} leaves no room for a prompt: the chat template of "
            f"{tokenizer.name_or_path} alone takes {len(best) - chat.drops_bos} tokens"
        )
    return _longest(ids_with, len(rest), best, limit)


def _last_ids(tokenizer, text: str, limit: int) -> list[int]:
    """Returns a text's last ids between the tokenizer's special tokens, `limit` with them."""
    tokenizer.truncation_side = "left"
    try:
        return _ids(tokenizer, [text], True, limit)[0]
    finally:
        tokenizer.truncation_side = "right"


def tokenise(
    tokenizers: Tokenizers,
    examples: Sequence[Example],
    *,
    max_seq_len: int,
    max_gen_len: int,
    with_prompt: bool,
    with_target: bool,
    with_source: bool = True,
    shrink_source: bool = False,
) -> dict[str, list]:
    """Turns examples into columns of ids, in their order; what is not asked for is an empty list.

    Args:
        max_seq_len: most encoder tokens, its special ones included.
        max_gen_len: most prompt tokens, those of a chat template included, and most target tokens with EOS.
        shrink_source: whether sources are whole prompts, which lose of their shrinkable span where they are too long.

    Returns:
        `encoder_ids`, `prompt_ids`, `target_ids` (lists of ids) and `source_cut`, `prompt_cut`, `target_cut` (bools).
        A target that fits ends in EOS, a truncated one does not: the LLM must not learn to stop in mid-sentence.

    Raises:
        DataError: for a language that the encoder has no code for, or limits without room.
    """
    if max_gen_len < 1:
        raise DataError(f"--max_gen_len must be positive, got {max_gen_len}")
    empty = [[] for _ in examples]
    columns = {"encoder_ids": empty, "prompt_ids": empty, "target_ids": empty}
    columns |= {name: [False] * len(examples) for name in ("source_cut", "prompt_cut", "target_cut")}
    if with_source:
        found = _encode_sources(tokenizers.encoder, examples, max_seq_len, shrink_source)
        columns["encoder_ids"], columns["source_cut"] = found
    if with_prompt:
        columns["prompt_ids"], columns["prompt_cut"] = _encode_prompts(tokenizers, examples, max_gen_len)
    if with_target:
        ids = _ids(tokenizers.llm, [example.target for example in examples], False)
        columns["target_cut"] = [len(row) + 1 > max_gen_len for row in ids]
        columns["target_ids"] = [
            # By hand: the switches by which the released code asks for an EOS do nothing on most tokenizers.
            row[:max_gen_len] if truncated else [*row, tokenizers.eos_id]
            for row, truncated in zip(ids, columns["target_cut"], strict=True)
        ]
    return columns


def encode_targets(tokenizers: Tokenizers, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of whole targets, with EOS, whatever their length."""
    return [[*row, tokenizers.eos_id] for row in _ids(tokenizers.llm, list(texts), False)]


def _tokenizer_identity(tokenizer) -> str | None:
    """Returns a hash of everything that decides which ids a tokenizer gives, whatever it was used for before."""
    if tokenizer is None:
        return None
    column = _tag_column(tokenizer)
    tags = [getattr(LANGUAGES[name], column) for name in _FIRST_LANGUAGES] if column else None
    parts = [type(tokenizer).__name__, column, tags]
    if column:
        # Whoever used the tokenizer last has left a language in its state.
        tokenizer.src_lang = getattr(LANGUAGES["English"], column)
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left behind by earlier calls; each of ours sets its own.
        parts.append({key: value for key, value in state.items() if key not in ("truncation", "padding")})
    else:
        parts.append(sorted(tokenizer.get_vocab().items()))
        model = getattr(tokenizer, "sp_model", None)
        parts.append(hashlib.sha256(model.serialized_model_proto()).hexdigest() if model else None)
    # The files alone do not say what another version of the library makes of them.
    probe = "Two  words, 3.5 and ﬁve: नौ 十 ۱۱"
    parts += [_ids(tokenizer, [probe], True), _ids(tokenizer, [probe], False)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
