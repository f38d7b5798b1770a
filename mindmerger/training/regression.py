"""A start for MindMerger's mapping: least squares from the encoder's states to the LLM's input embeddings.

A fresh mapping gives the LLM vectors that mean nothing to it, and all it learns has to come back through the LLM. But
what a mapped state should roughly be is known without running the LLM's layers: the input embedding of the LLM's token
at the same place of an English sentence. Sentences in other languages get theirs from their English translation, token
by token where the encoder's states of the two agree. Ours, no part of the published method; docs/small_models.md has
what it brings.

Dimension letters: N tokens, S encoder tokens of a sentence, E encoder width, D LLM width.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from mindmerger.data.tokenising import source_language_code, tokenise
from mindmerger.model.mindmerger import MindMerger
from mindmerger.runtime.processes import progress_bar
from mindmerger.tasks.languages import LANGUAGES

BATCH_TOKENS = 4096  # of the encoder
FIT_BATCH = 512
WEIGHT_DECAY = 0.01
DEV_SHARE = 0.05  # of the pairs, kept aside to say how far the fit carries
NEAREST_ROWS = 2000  # dev tokens of each kind whose nearest LLM token is looked up
FREQUENT = 100  # LLM tokens that a chance hit is likely for ("the", a comma), but no more than a tenth of all


@dataclass
class Tokens:
    """States of encoder tokens and the vectors that they should be mapped to, with the language of each."""

    states_NE: torch.Tensor
    targets_ND: torch.Tensor
    llm_ids: list[set[int]]  # the LLM's tokens at the place of each
    languages: list[str]


@dataclass
class Gathered:
    """Tokens of many sentences, in the order in which they were added."""

    states: list[torch.Tensor] = field(default_factory=list)
    targets: list[torch.Tensor] = field(default_factory=list)
    llm_ids: list[set[int]] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)

    def add(self, states_NE: torch.Tensor, targets: Sequence[tuple[torch.Tensor, set[int]]], language: str) -> None:
        """Adds the tokens of one sentence. fp16 holds embeddings at half the memory, but not a T5's hidden layers."""
        if targets:
            self.states.append(states_NE)
            self.targets.append(torch.stack([vector_D for vector_D, _ in targets]).half())
            self.llm_ids += [ids for _, ids in targets]
            self.languages += [language] * len(targets)

    def joined(self) -> Tokens:
        """Returns all of them."""
        return Tokens(torch.cat(self.states), torch.cat(self.targets), self.llm_ids, self.languages)


def token_targets(encoder_spans: list, llm_spans: list, llm_ids: list[int], text: str) -> list[dict[int, float] | None]:
    """Returns for each encoder token how much of its characters each LLM token covers, None for a token without any.

    Args:
        encoder_spans, llm_spans: (start, end) of each token in `text`. Special tokens have none, and a space at a
            token's start belongs to no word.
    """
    found: list[dict[int, float] | None] = []
    for start, end in encoder_spans:
        while start < end and text[start].isspace():
            start += 1
        shares: dict[int, float] = {}
        for one, (left, right) in zip(llm_ids, llm_spans, strict=True):
            overlap = min(end, right) - max(start, left)
            if overlap > 0:
                shares[one] = shares.get(one, 0.0) + overlap
        total = sum(shares.values())
        found.append({one: share / total for one, share in shares.items()} if shares else None)
    return found


def mutual_matches(first_SE: torch.Tensor, second_SE: torch.Tensor) -> list[tuple[int, int]]:
    """Returns the pairs of tokens that are each other's nearest by cosine (SimAlign's argmax, Jalili Sabet et al.,
    Findings of EMNLP 2020)."""
    similarity = F.normalize(first_SE, dim=1) @ F.normalize(second_SE, dim=1).T
    forth, back = similarity.argmax(1).tolist(), similarity.argmax(0).tolist()
    return [(i, j) for i, j in enumerate(forth) if back[j] == i]


@torch.no_grad()
def encoder_states(model: MindMerger, rows: list[list[int]], layer: int, desc: str) -> list[tuple]:
    """Returns for each row of encoder ids its states (S, E) of hidden layer `layer` and of the one that the mapping
    reads, fp32, on the CPU."""
    device, found = model.device, [None] * len(rows)
    order, at = sorted(range(len(rows)), key=lambda i: -len(rows[i])), 0
    model.mapping.encoder_layers = (layer, model.mapping.encoder_layers[-1])  # what `encode` gives
    with progress_bar(total=len(rows), desc=desc, unit="sentence") as bar:
        while at < len(order):
            batch = order[at : at + max(1, BATCH_TOKENS // len(rows[order[at]]))]
            width = len(rows[batch[0]])
            ids_BS = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in batch])
            mask_BS = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in batch])
            states, _ = model.encode(ids_BS.to(device), mask_BS.to(device))
            states = [one_BSE.float().cpu() for one_BSE in states]
            for place, i in enumerate(batch):
                found[i] = tuple(one_BSE[place, : len(rows[i])] for one_BSE in states)
            at += len(batch)
            bar.update(len(batch))
    return found


@torch.no_grad()
def gather(model: MindMerger, tokenizers, pairs: Sequence, max_seq_len: int, layer: int, desc: str) -> Tokens:
    """Returns the tokens of the English side of sentence pairs, and those of the other side that match one of them.

    Args:
        pairs: of `read_pairs`.
        max_seq_len: most encoder tokens of a sentence.
        layer: the encoder's hidden layer in which tokens are matched.
    """
    limits = {"max_seq_len": max_seq_len, "max_gen_len": 1}
    sources = tokenise(tokenizers, pairs, **limits, with_prompt=False, with_target=False)["encoder_ids"]
    english = [pair.target for pair in pairs]
    tag = source_language_code(tokenizers.encoder, LANGUAGES["English"])
    if tag is not None:
        tokenizers.encoder.src_lang = tag
    spans = {"return_offsets_mapping": True, "verbose": False}
    ours = tokenizers.encoder(english, truncation=True, max_length=max_seq_len, **spans)
    theirs = tokenizers.llm(english, add_special_tokens=False, **spans)
    states = encoder_states(model, ours["input_ids"] + sources, layer, desc)
    # States of one layer share a large mean vector: without it a cosine tells tokens apart.
    mean_E = torch.cat([matching_SE for matching_SE, _ in states]).mean(0)
    embed, gathered = model.llm.get_input_embeddings(), Gathered()
    for number, pair in enumerate(pairs):
        shares = token_targets(
            ours["offset_mapping"][number], theirs["offset_mapping"][number], theirs["input_ids"][number], pair.target
        )
        targets = {i: weighted_embedding(embed, share) for i, share in enumerate(shares) if share is not None}
        (matching_SE, read_SE), (their_matching_SE, their_read_SE) = states[number], states[len(pairs) + number]
        gathered.add(read_SE[list(targets)], list(targets.values()), "English")
        matches = mutual_matches(their_matching_SE - mean_E, matching_SE - mean_E)
        matches = {i: targets[j] for i, j in matches if j in targets}
        gathered.add(their_read_SE[list(matches)], list(matches.values()), pair.language)
    return gathered.joined()


def weighted_embedding(embed: torch.nn.Module, shares: dict[int, float]) -> tuple[torch.Tensor, set[int]]:
    """Returns the mean of input embeddings (D,), weighted, fp32 on the CPU, and the ids."""
    ids = torch.tensor(list(shares), device=next(embed.parameters()).device)
    weights_n = torch.tensor(list(shares.values()))
    return weights_n @ embed(ids).float().cpu(), set(shares)


def fit(mapping: torch.nn.Module, tokens: Tokens, epochs: int, lr: float, seed: int) -> None:
    """Fits a mapping to tokens by AdamW on the squared error, in units of the targets' variance.

    It is fitted on states of mean 0 and variance 1 in each dimension, which is then folded into `linear1`: encoders'
    states have one direction that nearly all tokens share.
    """
    device, mlp = next(mapping.parameters()).device, mapping.mlp
    mean_E, scale_E = moments(tokens.states_NE)
    variance = tokens.targets_ND.float().var(0).sum().to(device)
    steps = epochs * -(-len(tokens.states_NE) // FIT_BATCH)
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(seed)
    order_N = torch.empty(0, dtype=torch.long)
    with progress_bar(total=steps, desc="regression", unit="step") as bar:
        for step in range(steps):
            if len(order_N) == 0:
                order_N = torch.randperm(len(tokens.states_NE), generator=generator)
            chosen, order_N = order_N[:FIT_BATCH], order_N[FIT_BATCH:]
            states_NE = ((tokens.states_NE[chosen] - mean_E) / scale_E).to(device)
            optimizer.param_groups[0]["lr"] = lr / 2 * (1 + math.cos(math.pi * step / steps))
            found_ND = mlp.linear2(F.relu(mlp.linear1(states_NE)))
            loss = (found_ND - tokens.targets_ND[chosen].float().to(device)).square().sum(1).mean() / variance
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update(1)
    with torch.no_grad():
        mean_E, scale_E = mean_E.to(device), scale_E.to(device)
        mlp.linear1.weight /= scale_E
        mlp.linear1.bias -= mlp.linear1.weight @ mean_E


def moments(states_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and standard deviation of each dimension; a constant one counts as of deviation 1."""
    scale_E = states_NE.std(0)
    return states_NE.mean(0), torch.where(scale_E > 0, scale_E, 1.0)


@torch.no_grad()
def quality(model: MindMerger, tokens: Tokens, seed: int) -> dict[str, dict[str, float]]:
    """Returns how well tokens that were not fitted are mapped, by language.

    r2: explained share of the targets' variance. nearest: share of tokens whose nearest LLM token, by cosine, is the
    one at their place; nearest_by_chance: the same with the places of other tokens. The LLM's most frequent tokens of
    the rows are left out of these two, since they are right by chance too often.
    """
    device, counts = model.device, {}
    for ids in tokens.llm_ids:
        for one in ids:
            counts[one] = counts.get(one, 0) + 1
    frequent = set(sorted(counts, key=lambda one: (-counts[one], one))[: min(FREQUENT, len(counts) // 10)])
    table_VD = F.normalize(model.llm.get_input_embeddings()(torch.arange(embedding_rows(model), device=device)).float())
    found = {}
    for language in dict.fromkeys(tokens.languages):
        rows = [i for i, one in enumerate(tokens.languages) if one == language]
        rows = random.Random(seed).sample(rows, min(NEAREST_ROWS, len(rows)))
        mapped_ND = mapped(model.mapping, tokens.states_NE[rows].to(device))
        targets_ND = tokens.targets_ND[rows].float().to(device)
        error = (mapped_ND - targets_ND).square().sum() / (targets_ND - targets_ND.mean(0)).square().sum()
        nearest = (F.normalize(mapped_ND) @ table_VD.T).argmax(1).tolist()
        ids = [tokens.llm_ids[i] for i in rows]
        hits = [one in own for one, own in zip(nearest, ids, strict=True) if one not in frequent]
        chance = [one in own for one, own in zip(nearest, ids[1:] + ids[:1], strict=True) if one not in frequent]
        found[language] = {
            "tokens": len(rows),
            "r2": 1 - float(error),
            "nearest": sum(hits) / max(1, len(hits)),
            "nearest_by_chance": sum(chance) / max(1, len(chance)),
        }
    return found


def embedding_rows(model: MindMerger) -> int:
    """Returns the number of rows of the LLM's input embedding."""
    return model.llm.get_input_embeddings().num_embeddings


def mapped(mapping: torch.nn.Module, states_NE: torch.Tensor) -> torch.Tensor:
    """Returns mapped states (N, D), without the boundary."""
    states_1NE, mask_1N = states_NE[None], torch.ones(1, len(states_NE), dtype=torch.long, device=states_NE.device)
    return mapping([states_1NE], mask_1N).prefix_BKD[0, :-1]
