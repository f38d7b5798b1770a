"""Translation into English by a sequence-to-sequence model of any of the usual families.

| family | says the source language | is told to write English |
|---|---|---|
| NLLB, M2M100, mBART-50 | a tag in the encoder's input | the tag is forced as the decoder's first token |
| mBART-cc25 | a tag behind the encoder's input | the decoder starts with the tag |
| MADLAD-400 | nothing | `<2en>` stands before the text |
| untagged (opus-mt-mul-en, …) | nothing | nothing: it has learned no other target |

Dimension letters: B batch, S source tokens, T new tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mindmerger.runtime.processes import explain_out_of_memory
from mindmerger.tasks.languages import Language, find_language

MADLAD_ENGLISH = "<2en>"
TAGGED = "translator {} takes language tags, without which it may write any language: leave --untagged out"
UNTAGGED = (
    "translator {} takes no language tags that are known here, those of NLLB, M2M100, mBART or MADLAD-400: pass "
    "--untagged if it translates every language into English without any"
)


class Translation(NamedTuple):
    """One translation, whether its source was truncated, and whether it ran into the limit of new tokens."""

    text: str
    truncated: bool
    hit_limit: bool


class Tags(NamedTuple):
    """What tells a model that English is wanted: a prefix of the text, a forced first token, the decoder's start."""

    prefix: str = ""
    forced_bos: int | None = None
    decoder_start: int | None = None


@dataclass
class Limits:
    """Limits and form of a translation: source tokens, new tokens, texts of a batch, beams (1 is greedy)."""

    max_seq_len: int
    max_new_tokens: int
    batch_size: int
    num_beams: int


def load_tags(path: str, untagged: bool, languages: Sequence[Language]) -> tuple:
    """Returns the tokenizer of a translator and the tags that it needs for English.

    Args:
        untagged: the model takes no tags and writes nothing but English.
        languages: of the texts, each of which the translator must know.

    Raises:
        UserError: for a tokenizer that cannot be read, takes no tags that are known here, or lacks a language.
    """
    from transformers import MBartTokenizer

    from mindmerger.data.tokenising import _knows, _load_tokenizer, _tag_column
    from mindmerger.hub.model_files import ModelError

    tokenizer = _load_tokenizer(path, "--translator")
    column = _tag_column(tokenizer)
    if column is None:
        return tokenizer, _madlad_tags(tokenizer, path, untagged)
    if untagged:
        raise ModelError(TAGGED.format(path))
    for language in languages:
        code = getattr(language, column)
        if code is None or not _knows(tokenizer, column, code):
            raise ModelError(
                f"translator {path} has no code for {language.name}: leave it out with --languages, or take another "
                "--translator"
            )
    code = getattr(find_language("English"), column)
    token = tokenizer.convert_tokens_to_ids(f"__{code}__" if column == "m2m100" else code)
    # The first mBART was trained with the language in the place of the decoder's start token.
    if isinstance(tokenizer, MBartTokenizer):
        return tokenizer, Tags(decoder_start=token)
    return tokenizer, Tags(forced_bos=token)


def _madlad_tags(tokenizer, path: str, untagged: bool) -> Tags:
    from mindmerger.hub.model_files import ModelError

    tag = tokenizer.convert_tokens_to_ids(MADLAD_ENGLISH)
    # Asked of a text: a vocabulary may hold the tag while its tokenizer takes it apart.
    known = tag not in (None, tokenizer.unk_token_id) and tag in tokenizer(f"{MADLAD_ENGLISH} a")["input_ids"]
    if known == untagged:
        raise ModelError((TAGGED if known else UNTAGGED).format(path))
    return Tags(prefix=f"{MADLAD_ENGLISH} ") if known else Tags()


def check_translator(path: str, limits: Limits) -> None:
    """Refuses a model that cannot translate, before its weights load.

    Raises:
        ModelError: for one that is no sequence-to-sequence model, cannot be read, or has too few positions.
    """
    from transformers import AutoModelForSeq2SeqLM

    from mindmerger.hub.model_configs import check_quantisation, load_config
    from mindmerger.hub.model_files import ModelError, check_weights
    from mindmerger.model.towers import check_positions

    config = load_config(path)
    if type(config) not in AutoModelForSeq2SeqLM._model_mapping:
        raise ModelError(
            f"{path} is a {config.model_type} model, which is no sequence-to-sequence model: pass NLLB, M2M100, mBART "
            "or MADLAD-400 to --translator"
        )
    check_quantisation(path, config, backward=False)
    check_weights(path, config)
    check_positions(path, limits.max_seq_len, "--max_seq_len", "--max_seq_len")
    # 1 for the decoder's start token.
    check_positions(path, 1 + limits.max_new_tokens, "a translation of --max_new_tokens", "--max_new_tokens")


class Translator:
    """A sequence-to-sequence model that translates texts into English."""

    def __init__(self, path: str, tokenizer, tags: Tags, limits: Limits, dtype, device):
        """Loads the model.

        Raises:
            UserError: out of memory, or for weights that cannot be read.
        """
        from transformers import AutoModelForSeq2SeqLM, GenerationConfig

        from mindmerger.hub.model_configs import load_config
        from mindmerger.model.towers import _from_pretrained

        self.path, self.tokenizer, self.tags, self.limits = path, tokenizer, tags, limits
        with explain_out_of_memory(f"while placing the translator on {device}", {}, "use --precision bf16"):
            self.model = _from_pretrained(AutoModelForSeq2SeqLM, path, load_config(path), dtype, None).to(device)
        # Of the folder's own generation settings its limit goes: two limits would be warned of in every batch.
        self.model.generation_config.max_length = None
        # Said and not left to the folder, which may ask for five beams or sampling. Its other settings, such as the
        # tokens that may not be written, hold; early stopping and the length penalty have a meaning for beams alone.
        greedy = {"early_stopping": False, "length_penalty": 1.0} if limits.num_beams == 1 else {}
        self.generation = GenerationConfig(
            do_sample=False,
            num_beams=limits.num_beams,
            max_new_tokens=limits.max_new_tokens,
            forced_bos_token_id=tags.forced_bos,
            decoder_start_token_id=tags.decoder_start,
            **greedy,
        )

    def translate(self, texts: Sequence[str], language: Language) -> list[Translation]:
        """Translates texts of one language into English, in their order; texts that stand twice are translated once.

        Raises:
            UserError: out of memory, a token without an embedding, logits that are not numbers.
        """
        from mindmerger.data.tokenising import Tokenizers, _padding_id, check_rows, tokenise
        from mindmerger.generation.answers import split_batches
        from mindmerger.tasks.base import Example

        different = list(dict.fromkeys(texts))
        examples = [Example("", language.name, self.tags.prefix + text, "", "") for text in different]
        pad_id = _padding_id(self.tokenizer, self.path)
        columns = tokenise(
            Tokenizers(self.tokenizer, None, pad_id, 0, None, None),
            examples,
            max_seq_len=self.limits.max_seq_len,
            max_gen_len=1,  # no prompt and no target is tokenised: any limit does
            with_prompt=False,
            with_target=False,
        )
        sources, truncated = columns["encoder_ids"], columns["source_cut"]
        rows = self.model.get_input_embeddings().num_embeddings
        check_rows(self.tokenizer, self.path, (one for ids in sources for one in ids), rows)
        found: dict[str, Translation] = {}
        for batch in split_batches(list(range(len(different))), [len(ids) for ids in sources], self.limits.batch_size):
            outputs = self._generate([sources[i] for i in batch], pad_id)
            for i, (text, hit_limit) in zip(batch, outputs, strict=True):
                found[different[i]] = Translation(text, truncated[i], hit_limit)
        return [found[text] for text in texts]

    def _generate(self, sources: list[list[int]], pad_id: int) -> list[tuple[str, bool]]:
        import torch

        from mindmerger.data.batches import collate
        from mindmerger.hub.model_files import ModelError
        from mindmerger.model.decoding import FiniteLogits

        batch = collate([{"encoder_ids": ids} for ids in sources], pad_id, 0).to(self.model.device)
        sizes = {"source": batch.encoder_input_ids.shape[1], "translation": self.limits.max_new_tokens}
        watch = FiniteLogits()
        with explain_out_of_memory(f"on a batch of {len(sources)} texts", sizes, "lower --batch_size"), torch.no_grad():
            ids_BT = self.model.generate(
                input_ids=batch.encoder_input_ids,
                attention_mask=batch.encoder_attention_mask,
                generation_config=self.generation,
                logits_processor=[watch.note],
                stopping_criteria=[watch.stop],
            )
        if watch.found():
            raise ModelError(f"translator {self.path} computes logits that are NaN or infinite: use --precision fp32")
        return [self._read(ids) for ids in ids_BT.tolist()]

    def _read(self, ids: list[int]) -> tuple[str, bool]:
        """Returns the text of new ids, and whether they ended at the limit."""
        end_ids = self.model.generation_config.eos_token_id
        end_ids = end_ids if isinstance(end_ids, list) else [end_ids]
        new = ids[1:]  # behind the decoder's start token, which is the end token itself in NLLB
        length = next((i + 1 for i, one in enumerate(new) if one in end_ids), len(new))
        # The tag is left out by its place: not every tokenizer counts its own among the special tokens.
        words = new[1 if self.tags.forced_bos is not None else 0 : length]
        return self.tokenizer.decode(words, skip_special_tokens=True).strip(), length >= self.limits.max_new_tokens
