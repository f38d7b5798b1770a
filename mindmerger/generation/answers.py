"""The one way from texts to texts: batches of prompts in, greedy answers out, by transformers or by vLLM.

`answer` is for use from Python. An evaluation takes the same steps batch by batch, so that each batch is on disk before
the next begins.
"""

import os
from dataclasses import dataclass
from functools import lru_cache, partial

from mindmerger.runtime.errors import UserError
from mindmerger.runtime.processes import explain_out_of_memory

# The released evaluation's defaults.
DEFAULT_BATCH_SIZE = 8
# By how many batches of its token budget an evaluation proceeds where rows change places.
BATCHES_AT_ONCE = 4
DEFAULT_MAX_LEN = 512  # tokens, of the encoder's input and of the prompt
MEMORY_FLAGS = "lower --eval_max_tokens, --eval_batch_size (it continues where this run stopped), --max_new_tokens or "
MEMORY_FLAGS += "--max_gen_len"


def tokenise_inputs(
    tokenizers,
    examples: list,
    *,
    with_source: bool,
    with_prompt: bool,
    max_seq_len: int,
    max_gen_len: int,
    encoder_text: str = "source",
    with_target: bool = False,
) -> dict:
    """Returns the columns that the model reads: `encoder_ids` and `source_cut` (whether a source was truncated) with
    the source, `prompt_ids` and `prompt_cut` with the prompt, `target_ids` with the target, as in training.

    Args:
        encoder_text: what the encoder reads, as the bridge's stage says: "source", or the whole "prompt".
    """
    from mindmerger.data.tokenising import tokenise
    from mindmerger.tasks.examples import read_by_encoder

    columns = tokenise(
        tokenizers,
        list(read_by_encoder(examples, encoder_text)),
        max_seq_len=max_seq_len,
        max_gen_len=max_gen_len,
        with_source=with_source,
        with_prompt=with_prompt,
        with_target=with_target,
        shrink_source=encoder_text == "prompt",
    )
    # No empty columns: by a column's absence later steps know which segments the form has.
    kept = ["encoder_ids", "source_cut"] * with_source + ["prompt_ids", "prompt_cut"] * with_prompt
    kept += ["target_ids"] * with_target
    return {name: columns[name] for name in kept}


def check_tokens(tokenizers, columns: dict, encoder: tuple, llm: tuple) -> None:
    """Refuses tokens that a model has no embedding for.

    Args:
        encoder, llm: (path, rows of the embedding table).

    Raises:
        UserError: naming the first such token.
    """
    from mindmerger.data.tokenising import check_rows

    readers = ((tokenizers.encoder, encoder, "encoder_ids"), (tokenizers.llm, llm, "prompt_ids"))
    for tokenizer, model, name in (*readers, (tokenizers.llm, llm, "target_ids")):
        check_rows(tokenizer, model[0], (one for ids in columns.get(name, ()) for one in ids), model[1])
    if tokenizers.bos_id is not None:
        check_rows(tokenizers.llm, llm[0], [tokenizers.bos_id], llm[1])


def input_positions(columns: dict, bridge) -> list[int]:
    """Returns the positions of each example's merged input: BOS, prefix and prompt, as far as it has them.

    Args:
        bridge: whose `prefix_length` says how many positions an encoded question takes; None for the LLM alone.
    """
    prompts = columns.get("prompt_ids") or [[]] * len(columns["encoder_ids"])
    if bridge is None:
        # 1 for BOS, also where the LLM has none: a limit that counts one too many is safe.
        return [1 + len(prompt) for prompt in prompts]
    sources = columns["encoder_ids"]
    return [1 + bridge.prefix_length(len(s)) + len(prompt) for s, prompt in zip(sources, prompts, strict=True)]


@dataclass
class Generation:
    """One answer: its text, its tokens including the end token, and whether it ran into the limit instead."""

    output: str
    generated_tokens: int
    hit_limit: bool


def split_batches(
    indices: list[int], lengths: list[int], batch_size: int | None, token_budget: int | None = None, new_tokens: int = 0
) -> list[list[int]]:
    """Returns batches of similar length, longest first, so that running out of memory shows at the start.

    Taking whole batches out of `indices` leaves the other batches as they were: a continued run relies on it.

    Args:
        lengths: positions of every example's input, by its number.
        batch_size: most examples of a batch; None for any number.
        token_budget: most positions of a batch, padding and `new_tokens` for each row included; a longer row stands
            alone.
    """
    # By number where lengths are equal: the same examples must make the same batches in every run.
    order = sorted(indices, key=lambda i: (-lengths[i], i))
    batches, start = [], 0
    while start < len(order):
        rows = batch_size or len(order)
        # The first row is the longest: every other one of the batch is padded to it.
        if token_budget is not None:
            rows = min(rows, max(1, token_budget // (lengths[order[start]] + new_tokens)))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def split_evaluation(remaining: list[int], settings, model=None) -> list[list[int]]:
    """Returns the examples numbered `remaining` in the batches that an evaluation's settings ask for.

    Args:
        model: whose rows then change places in larger batches, where it can and the settings let them.
    """
    lengths = input_positions(settings.columns, settings.bridge)
    limits = settings.batch_size, settings.token_budget, settings.max_new_tokens
    batches = split_batches(remaining, lengths, *limits)
    if model is None or not rows_change_places(model, settings):
        return batches
    # What is on disk at once, and generated as a whole again after a kill: with other rows in the other places bf16
    # would round differently.
    parts = [batches[i : i + BATCHES_AT_ONCE] for i in range(0, len(batches), BATCHES_AT_ONCE)]
    return [[i for batch in part for i in batch] for part in parts]


def rows_change_places(model, settings) -> bool:
    """Tells whether an evaluation decodes by continuous batching: by transformers, with a token budget alone, where
    answers are generated, and with a model that can."""
    from mindmerger.generation.continuous import can_run

    by_budget = settings.token_budget is not None and settings.batch_size is None
    return by_budget and settings.engine == "hf" and settings.label_ids is None and can_run(model)


def batch_inputs(model, tokenizers, columns: dict, batch: list[int], with_target: bool = False) -> dict:
    """Returns the arguments of `MindMerger.generate` for the examples numbered `batch`, with a target of `forward`."""
    from mindmerger.data.batches import collate

    kept = ("encoder_ids", "prompt_ids", "target_ids") if with_target else ("encoder_ids", "prompt_ids")
    rows = [{name: columns[name][i] for name in kept if name in columns} for i in batch]
    return collate(rows, tokenizers.encoder_pad_id, tokenizers.llm_pad_id).to(model.device).tensors


def explain_batch_out_of_memory(inputs: dict, max_new_tokens: int):
    """Context manager: running out of memory on a batch becomes an error that names its size and what to lower."""
    names = {"encoder_input_ids": "encoder", "prompt_ids": "prompt", "target_ids": "target"}
    sizes = {name: inputs[key].shape[1] for key, name in names.items() if key in inputs}
    rows = next(len(value) for value in inputs.values())
    return explain_out_of_memory(f"on a batch of {rows} examples", sizes | {"answer": max_new_tokens}, MEMORY_FLAGS)


def to_generation(model, tokenizers, ids: list[int]) -> Generation:
    """Returns new ids as an answer, up to the first end token where there is one."""
    # What follows an end token is padding, which an LLM without a pad token fills with an ordinary one.
    end = next((i for i, token in enumerate(ids) if token in model.eos_token_ids), None)
    text = tokenizers.llm.decode(ids[:end], skip_special_tokens=True)
    return Generation(text, len(ids) if end is None else end + 1, end is None)


def generate_batch(
    model, tokenizers, columns: dict, batch: list[int], max_new_tokens: int, step=None
) -> list[Generation]:
    """Returns greedy answers to the examples numbered `batch`, in that order.

    Args:
        step: one of transformers' stopping criteria, which is shown the new ids (B, T) after every token.

    Raises:
        UserError: out of memory, naming what to lower.
    """
    inputs = batch_inputs(model, tokenizers, columns, batch)
    more = {} if step is None else {"stopping_criteria": [step]}
    with explain_batch_out_of_memory(inputs, max_new_tokens):
        ids_BT = model.generate(**inputs, max_new_tokens=max_new_tokens, **more)
    return [to_generation(model, tokenizers, ids) for ids in ids_BT.tolist()]


def shared_positions(model, columns: dict) -> int:
    """Returns how many positions all inputs of these columns begin with, BOS and the words before the question, where
    the LLM alone reads them and can keep them; each input has more. Behind a mapped question no two are alike."""
    from mindmerger.generation.continuous import can_share

    if "encoder_ids" in columns or not can_share(model.llm):
        return 0
    # Of lists too: what the first and the last of them in order begin with, all do.
    alike = len(os.path.commonprefix(columns["prompt_ids"]))
    shortest = min(len(ids) for ids in columns["prompt_ids"])
    return (model.bos_token_id is not None) + max(0, min(alike, shortest - 1))


def generate_in_places(
    model,
    tokenizers,
    columns: dict,
    batch: list[int],
    lengths: list[int],
    places,
    max_new_tokens: int,
    advance=lambda ended: None,
) -> list[Generation]:
    """Returns greedy answers to the examples numbered `batch`, longest input first, in that order, by continuous
    batching.

    Args:
        lengths, places, advance: as `continuous.generate_rows` takes them.

    Raises:
        UserError: out of memory, naming what to lower.
    """
    from mindmerger.generation.continuous import generate_rows

    read = partial(batch_inputs, model, tokenizers, columns)
    sizes = {"input": lengths[batch[0]], "answer": max_new_tokens}
    rows = max(1, min(len(batch), places(lengths[batch[0]])))
    shared = shared_positions(model, columns)
    with explain_out_of_memory(f"on {rows} examples at once", sizes, MEMORY_FLAGS):
        ids = generate_rows(model, batch, lengths, read, places, max_new_tokens, advance, shared)
    return [to_generation(model, tokenizers, ids[i]) for i in batch]


def merge_batch(model, settings, batch: list[int]) -> list:
    """Returns the merged embeddings (L, D) of each example numbered `batch`, without padding, on the CPU.

    Raises:
        UserError: out of memory, or for embeddings that are not numbers.
    """
    inputs = batch_inputs(model, settings.tokenizers, settings.columns, batch)
    with explain_batch_out_of_memory(inputs, settings.max_new_tokens):
        embeds_BLD, mask_BL = model.merged_embeddings(**inputs)
        # Off the GPU at once: a chunk holds hundreds of rows, and vLLM takes them from the CPU.
        embeds_BLD = embeds_BLD.cpu()
    lengths = mask_BL.sum(1).tolist()
    rows = [row_LD[-length:] for row_LD, length in zip(embeds_BLD, lengths, strict=True)]
    # Checked on our side: vLLM would answer something, and nothing would say that it was made from NaN.
    if not all(row_LD.isfinite().all() for row_LD in rows):
        raise model.not_finite_error()
    return rows


def answer_batches(model, engine, settings, batches: list[list[int]], advance=lambda ended: None):
    """Yields (batches, answers to all their examples in order): one batch by transformers, a chunk of them by vLLM.

    Args:
        advance: called with how many answers have ended since, as a rule before they are yielded.
    """
    tokenizers, new_tokens = settings.tokenizers, settings.max_new_tokens
    if engine is None:
        for batch in batches:
            yield [batch], answer_batch(model, settings, batch, advance)
        return
    from mindmerger.generation import vllm_engine

    for chunk in vllm_engine.chunks(batches):
        rows = [row for batch in chunk for row in merge_batch(model, settings, batch)]
        answers = vllm_engine.decode(engine, rows, model.eos_token_ids, new_tokens, settings.llm_path)
        advance(len(answers))
        yield chunk, [to_generation(model, tokenizers, ids) for ids in answers]


def answer_batch(model, settings, batch: list[int], advance) -> list:
    """Returns answers to the examples numbered `batch` by transformers, in order; `advance` as for `answer_batches`."""
    from mindmerger.generation.likelihood import choose_labels

    given = model, settings.tokenizers, settings.columns, batch
    if rows_change_places(model, settings):
        lengths = input_positions(settings.columns, settings.bridge)

        def places(longest: int) -> int:
            return settings.token_budget // (longest + settings.max_new_tokens)

        return generate_in_places(*given, lengths, places, settings.max_new_tokens, advance)
    if settings.label_ids is not None:
        answers = choose_labels(model, settings, batch)
    else:
        answers = generate_batch(*given, settings.max_new_tokens)
    advance(len(answers))
    return answers


def answer(
    model,
    texts: list[str],
    task: str = "math",
    languages: list[str] | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    augmentation: bool | None = None,
    chat_template: str | None = None,
) -> list[str]:
    """Answers texts in any language: strings in, strings out, in the same order.

    Args:
        model: a `MindMerger`; one built without an encoder answers as the LLM alone.
        texts: questions (math), or what the task's prompt looks like (x-csqa, xnli).
        task: whose prompt is put around the texts.
        languages: of each text, by name or code; one string for all alike; None only where the encoder's tokenizer
            takes no source language.
        max_new_tokens: default the task's.
        batch_size: texts generated at once.
        augmentation: True for the Soft form, False for Hard; None for the one that the bridge's last stage trains.
        chat_template: "auto" for the LLM's own around the prompt, "none"; None for that which the model or its LLM was
            trained with.

    Raises:
        UserError: an unknown task or language, lists of different lengths, a model without a usable tokenizer, another
            chat template than the model was trained with, logits that are not numbers.
    """
    from mindmerger.generation.continuous import can_run
    from mindmerger.tasks import find_task

    # A string is a sequence too: it would be answered character by character.
    if isinstance(texts, str):
        raise UserError("answer() takes a list of texts, got one string: put it in a list")
    if not texts:
        return []
    task = find_task(task)
    tokenizers, columns = tokenise_texts(model, texts, task, languages, augmentation, chat_template)
    lengths, new_tokens = input_positions(columns, model.mapping), max_new_tokens or task.max_new_tokens
    # Filled by number: batches come by length, callers expect their own order.
    outputs = [""] * len(texts)
    batches = split_batches(list(range(len(texts))), lengths, batch_size)
    if changing := can_run(model):
        batches = [[i for batch in batches for i in batch]]
    for batch in batches:
        given = model, tokenizers, columns, batch
        if changing:
            answers = generate_in_places(*given, lengths, lambda longest: batch_size, new_tokens)
        else:
            answers = generate_batch(*given, new_tokens)
        for i, one in zip(batch, answers, strict=True):
            outputs[i] = one.output
    return outputs


def tokenise_texts(
    model,
    texts: list[str],
    task,
    languages: list[str] | str | None,
    augmentation: bool | None,
    chat_template: str | None,
) -> tuple:
    """Returns the tokenizers of a model's towers, and the columns of ids of texts that `answer` is given.

    Raises:
        UserError: as `answer` does, before anything is generated.
    """
    from mindmerger.model.mapping_files import form_of, stage_of

    tokenizers = tokenizers_of(model)
    with_prompt = model.mapping is None or form_of(model.config, augmentation) == "soft"
    examples = build_examples(task, texts, name_languages(model, tokenizers, languages, len(texts)))
    if with_prompt:
        tokenizers = put_in_template(model, tokenizers, chat_template)
    columns = tokenise_inputs(
        tokenizers,
        examples,
        with_source=model.mapping is not None,
        with_prompt=with_prompt,
        max_seq_len=DEFAULT_MAX_LEN,
        max_gen_len=DEFAULT_MAX_LEN,
        encoder_text=stage_of(model.config).encoder_text,
    )
    rows = [tower and tower.get_input_embeddings().num_embeddings for tower in (model.encoder, model.llm)]
    check_tokens(tokenizers, columns, (model.config.mt_path, rows[0]), (model.config.llm_path, rows[1]))
    return tokenizers, columns


def put_in_template(model, tokenizers, given: str | None):
    """Returns the tokenizers with prompts inside the chat template that a model was trained with, else `given`, whose
    turn's end then ends the model's generation too.

    Raises:
        UserError: for another one than that of training.
    """
    from mindmerger.hub.chat_template import keep_template
    from mindmerger.model.decoding import end_at
    from mindmerger.runtime.chat_template import AUTO, NONE

    if given not in (AUTO, NONE, None):
        raise UserError(f"chat_template must be {AUTO!r}, {NONE!r} or None, not {given!r}")
    config = model.config
    trained = "the model" if config.augmentation and (model.mapping is not None or model.adapter is not None) else None
    template = keep_template(given, config.llm_path, config.chat_template, trained)
    tokenizers = tokenizers.within(template, config.llm_path)
    if template is not None:
        end_at(model, tokenizers.eos_id)
    return tokenizers


def name_languages(model, tokenizers, languages: list[str] | str | None, number: int) -> list[str]:
    """Returns the English name of each text's language, as `answer` is given them.

    Raises:
        UserError: for an unknown language, another number of them, or none where the encoder needs one.
    """
    from mindmerger.tasks.languages import find_language

    languages = [languages] * number if languages is None or isinstance(languages, str) else languages
    if len(languages) != number:
        raise UserError(f"answer() needs one language for each text: {number} texts, {len(languages)} languages")
    # An encoder that is silently told the wrong language answers worse, and nobody sees why.
    if None in languages and hasattr(tokenizers.encoder, "src_lang"):
        raise UserError(f"answer() needs the texts' languages: encoder {model.config.mt_path} reads a language tag")
    # An untagged encoder ignores the name, so that any will do.
    return ["English" if language is None else find_language(language).name for language in languages]


def build_examples(task, texts: list[str], languages: list[str]) -> list:
    """Returns each text with the task's prompt around it and without a gold answer."""
    from mindmerger.tasks.base import Example

    examples = []
    for i, (text, language) in enumerate(zip(texts, languages, strict=True)):
        prompt, shrinkable = task.format_query(text)
        examples.append(Example(str(i), language, text, prompt, "", shrinkable))
    return examples


def tokenizers_of(model):
    """Returns the tokenizers of a model's towers, which are kept: one text may be asked for after another."""
    return _cached_tokenizers(model.config.mt_path if model.mapping is not None else None, model.config.llm_path)


@lru_cache(maxsize=4)
def _cached_tokenizers(mt_path: str | None, llm_path: str):
    from mindmerger.data.tokenising import load_tokenizers

    return load_tokenizers(mt_path, llm_path)
