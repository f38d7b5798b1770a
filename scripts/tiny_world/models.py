"""The quickstart's two models, trained from scratch: a Llama that has only read English and an mT5 that translates.

Both get real tokenizers learnt from the world's own texts. Two experts can be tuned from the Llama, for what merges
models. Everything is drawn from the seed.
"""

import json
import random
from pathlib import Path

from mindmerger.runtime.processes import progress_bar
from scripts.tiny_world.templates import (
    FIRST_NUMBERS,
    KINDS,
    LANGUAGES,
    OTHER_NUMBERS,
    Problem,
    draw_pair,
    draw_problems,
    split_numbers,
)

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def train_tokenizer(
    texts: list[str], vocabulary: int, special: dict[str, str], markers: list[str], byte_fallback: bool
):
    """Trains a byte-pair tokenizer with single digits, as a Hugging Face fast tokenizer.

    Args:
        texts: what to learn pieces from.
        special: role (`bos_token`, …) to token text; their ids follow this order from 0.
        markers: fixed strings that become one token each.
        byte_fallback: True spells unknown characters in bytes, False makes them the unknown token.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    tokenizer = Tokenizer(models.BPE(unk_token=special["unk_token"], fuse_unk=True, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            # Digits one by one: `garbled` keeps them while it exchanges everything between them.
            pre_tokenizers.Split(Regex(r"\d|\p{Han}|[^\w▁]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*special.values(), *byte_tokens],
        # All of ASCII: a letter that the world's sentences lack would be unknown to the encoder.
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Special tokens are skipped in decoding: text spelt in bytes would vanish.
    tokenizer = plain_byte_tokens(tokenizer, byte_tokens)
    tokenizer.add_tokens([AddedToken(marker, normalized=False, special=False) for marker in markers])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def plain_byte_tokens(tokenizer, byte_tokens: list[str]):
    """Makes the tokenizer's byte pieces ordinary pieces: the trainer can only take them as special ones."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in byte_tokens]
    return Tokenizer.from_str(json.dumps(state))


def build_tokenizers(seed: int, vocabulary: int):
    """Builds the LLM's tokenizer, learnt from English only, and the encoder's, learnt from all languages."""
    from tokenizers import processors

    from mindmerger.tasks import find_task

    rng = random.Random(f"tokenizers {seed}")
    problems = draw_problems(1400, split_numbers(seed)[0], rng)
    # A question stands behind a line end in the prompt and at the start elsewhere: its first word is spelt both ways.
    english = [start + problem.question("en") for problem in problems for start in ("", "\n")]
    english += [problem.solution()[0] for problem in problems]
    prompt, (start, end) = find_task("math").format_query("?")
    # The template's fixed lines are one token each, as chat markers are, and cost the small model no attention.
    markers = [line for line in (prompt[:start] + "\n" + prompt[end:]).split("\n") if line.strip()]
    # English alone: other scripts reach the LLM as bytes.
    llm = train_tokenizer(
        english,
        vocabulary,
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        markers,
        byte_fallback=True,
    )
    everything = [problem.question(language) for problem in problems for language in LANGUAGES]
    encoder = train_tokenizer(
        everything,
        vocabulary,
        {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
        [],
        byte_fallback=False,
    )
    encoder._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", encoder.eos_token_id)]
    )
    return llm, encoder


# ---------------------------------------------------------------------------------------------------------------------
# Training from scratch


def length_sorted_batches(examples: list, batch_size: int, length, rng: random.Random) -> list[list]:
    """Returns batches of similar lengths, in random order: padding is what a small model's time is lost on."""
    pool = batch_size * 16
    batches = []
    for start in range(0, len(examples), pool):
        ordered = sorted(examples[start : start + pool], key=length)
        batches += [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    rng.shuffle(batches)
    return batches


def pad(rows: list[list[int]], value: int):
    """Returns rows of ids as one tensor, padded on the right."""
    import torch

    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def optimise(model, batches: list, loss_of, title: str, matrix_lr: float = 0.01, lr: float = 3e-3) -> float:
    """Trains on `batches` once, with a short warm-up and a cosine to zero; returns the last steps' mean loss.

    Muon for the layers' matrices, AdamW for embeddings and norms: copying, which everything here rests on, is learnt
    in a third of the steps that AdamW alone needs.
    """
    import torch
    from transformers import get_cosine_schedule_with_warmup

    from scripts.tiny_world.muon import Muon

    head = model.get_output_embeddings()
    # The head goes with the embeddings, whose weights it shares in the LLM.
    matrices = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    inside = set(map(id, matrices))
    others = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    optimizers = [
        Muon(matrices, lr=matrix_lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    warmup = max(1, len(batches) // 20)
    schedules = [get_cosine_schedule_with_warmup(optimizer, warmup, len(batches)) for optimizer in optimizers]
    model.train()
    losses: list[float] = []
    progress = progress_bar(batches, desc=title)
    for batch in progress:
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for step in (*optimizers, *schedules):
            step.step()
        model.zero_grad()
        # Waits for the model at every step, which on a CPU costs nothing.
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.eval()
    # One batch's loss says little: each batch holds rows of one length or nearly so.
    return sum(losses[-20:]) / len(losses[-20:])


# Shares of the LLM's training texts. Without `repeated`, `merged` and `headless` it never learns to use what stands
# before a question, and no mapping can help it then.
TEXT_SHARES = {"problem": 0.25, "repeated": 0.20, "merged": 0.35, "headless": 0.10, "arithmetic": 0.10}


class EnglishTexts:
    """Maker of the LLM's training texts from problems: rows of (ids, labels).

    Forms: `problem` is prompt and answer; `repeated` the question twice; `merged` the question, then a prompt whose
    question is garbled but for its digits, then the answer; `headless` the question and the answer without a prompt;
    `arithmetic` single calculations.
    """

    def __init__(self, tokenizer, rng: random.Random):
        from mindmerger.tasks import find_task

        self.tokenizer, self.rng = tokenizer, rng
        self.bos, self.eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
        self.digits = set(self.encode("0123456789"))
        self.format_query = find_task("math").format_query
        markers = set(tokenizer.added_tokens_decoder)
        self.words = [token for token in range(len(tokenizer)) if token not in self.digits | markers]

    def encode(self, text: str) -> list[int]:
        """Returns a text's ids, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def row(self, problem: Problem, form: str) -> tuple[list[int], list[int]]:
        """Returns (ids, labels) of a problem in one of the forms, -100 where nothing is scored."""
        if form == "arithmetic":
            ids = self.bos + self.encode(draw_calculations(8, self.rng)) + self.eos
            return ids, ids
        text = problem.question("en")
        question, answer = self.encode(text), self.encode(problem.solution()[0]) + self.eos
        prompt, (start, end) = self.format_query(text)
        if form == "problem":
            ids = self.bos + self.encode(prompt) + answer
            return ids, ids
        # As MindMerger hands it over: the question first, then a prompt that the LLM cannot read but for its digits.
        if form == "merged":
            noise = self.garbled(question)
            before, after = self.encode(prompt[:start]), self.encode(prompt[end:])
            second, scored = before + noise + after + answer, before + [-100] * len(noise) + after + answer
        else:
            second = scored = question + self.eos if form == "repeated" else answer
        # What cannot be predicted (the question's first mention, noise) would only blur the gradient.
        first = self.bos + question + self.eos
        return first + second, [-100] * len(first) + scored

    def garbled(self, question: list[int]) -> list[int]:
        """Garbles the question as if in an unknown language: digits stay, runs between them become random tokens."""
        stretch = 0.5 * 12 ** self.rng.random()  # other scripts need up to six times as many tokens
        noise, run = [], 0
        for token in [*question, None]:
            if token is not None and token not in self.digits:
                run += 1
                continue
            noise += self.rng.choices(self.words, k=round(run * stretch))
            run = 0
            if token is not None:
                noise.append(token)
        return noise


def draw_calculations(count: int, rng: random.Random) -> str:
    """Draws single steps of solutions, of any split's numbers: the two numbers of a step are not a combination."""
    steps = []
    while len(steps) < count:
        a, b, c = rng.choice(FIRST_NUMBERS), rng.choice(OTHER_NUMBERS), rng.choice(OTHER_NUMBERS)
        if b + c <= a:
            steps += rng.sample(rng.choice(KINDS).steps(a, b, c), 1)
    return " ".join(f"{left}{operator}{right}={result}." for left, operator, right, result in steps)


def train_llm(tokenizer, seed: int, steps: int, batch_size: int):
    """Trains a tiny Llama that has only ever read English."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            # Tied: a head of its own would add more than a quarter to the model's weights.
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            # As Llama has it: the program must do without a pad token.
            pad_token_id=None,
        )
    )
    rng = random.Random(f"llm {seed}")
    texts = EnglishTexts(tokenizer, rng)
    problems = draw_problems(steps * batch_size, split_numbers(seed)[0], rng)
    forms = rng.choices(list(TEXT_SHARES), TEXT_SHARES.values(), k=len(problems))
    examples = [texts.row(problem, form) for problem, form in zip(problems, forms, strict=True)]

    batches = length_sorted_batches(examples, batch_size, lambda example: len(example[0]), rng)
    loss = optimise(model, batches, causal_loss(model), "English LLM")
    return model, loss


def causal_loss(model):
    """Returns the function from a batch of (ids, labels) rows to the LLM's loss on it."""

    def loss_of(batch):
        # Padding stands on the right, after everything that is scored: causal attention needs no mask.
        ids, labels = pad([ids for ids, _ in batch], 0), pad([labels for _, labels in batch], -100)
        return model(input_ids=ids, labels=labels, use_cache=False).loss

    return loss_of


# A fifth of the rates of training from scratch: an expert stays near its base, as merging takes for granted.
EXPERT_RATES = {"matrix_lr": 0.002, "lr": 6e-4}


def tune_expert(kind: str, base: Path, seed: int, steps: int, batch_size: int):
    """Tunes all weights of the English LLM further.

    Args:
        kind: "math" reads English problems with their solutions, "language" plain questions in the other languages.
        base: folder of the LLM, written by `train_llm`'s caller with the same seed.

    Returns:
        (model, its tokenizer, mean loss of the last steps)
    """
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(base, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    rng = random.Random(f"{kind} expert {seed}")
    texts = EnglishTexts(tokenizer, rng)
    problems = draw_problems(steps * batch_size, split_numbers(seed)[0], rng)
    if kind == "math":
        examples = [texts.row(problem, "problem") for problem in problems]
    else:
        foreign = [language for language in LANGUAGES if language != "en"]
        # Without solutions: a language expert that reads them would be a math expert too.
        plain = [texts.bos + texts.encode(problem.question(rng.choice(foreign))) + texts.eos for problem in problems]
        examples = [(ids, ids) for ids in plain]
    batches = length_sorted_batches(examples, batch_size, lambda example: len(example[0]), rng)
    loss = optimise(model, batches, causal_loss(model), f"{kind} expert", **EXPERT_RATES)
    return model, tokenizer, loss


def train_encoder(tokenizer, seed: int, steps: int, batch_size: int):
    """Trains a tiny mT5 that translates every language of the world into English."""
    import torch
    from transformers import MT5Config, MT5ForConditionalGeneration

    torch.manual_seed(seed)
    model = MT5ForConditionalGeneration(
        MT5Config(
            vocab_size=len(tokenizer),
            d_model=96,
            d_kv=24,
            d_ff=256,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )
    rng = random.Random(f"encoder {seed}")
    problems = draw_problems(steps * batch_size, split_numbers(seed)[0], rng)
    drawn = [draw_pair(problem, rng.choice(list(LANGUAGES)), rng) for problem in problems]
    sources = tokenizer([source for source, _ in drawn])["input_ids"]
    targets = tokenizer([target for _, target in drawn])["input_ids"]

    def loss_of(batch):
        ids = pad([source for source, _ in batch], tokenizer.pad_token_id)
        labels = pad([target for _, target in batch], -100)
        return model(input_ids=ids, attention_mask=ids.ne(tokenizer.pad_token_id).long(), labels=labels).loss

    examples = list(zip(sources, targets, strict=True))
    batches = length_sorted_batches(examples, batch_size, lambda pair: len(pair[0]) + len(pair[1]), rng)
    loss = optimise(model, batches, loss_of, "translating mT5")
    return model, loss
