"""A classifier on an encoder's states without any LLM: the control that says whether the LLM is needed.

The usual one for sentence encoders (InferSent, Conneau et al. 2017; Sentence-BERT, Reimers and Gurevych 2019): softmax
regression on [u, v, |u - v|, u * v], where u and v are the mean final states of premise and hypothesis.

Dimension letters: N rows, S tokens, E encoder width.
"""

import random

import torch
import torch.nn.functional as F

from mindmerger.data.tokenising import load_tokenizers
from mindmerger.model.towers import load_encoder
from mindmerger.tasks.xnli import XNLI_LABELS

BATCH_TOKENS = 4096
MAX_TOKENS = 200  # of a sentence
DEV_SHARE = 0.1  # of the premises, which choose the weight decay
WEIGHT_DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)
STEPS = 100  # of L-BFGS


@torch.no_grad()
def mean_states(encoder, tokenizer, texts: list[str]) -> dict[str, torch.Tensor]:
    """Returns the mean of a text's final states (E,), for every text."""
    found = {}
    texts = sorted(dict.fromkeys(texts), key=len, reverse=True)
    rows = tokenizer(texts, truncation=True, max_length=MAX_TOKENS, verbose=False)["input_ids"]
    at = 0
    while at < len(rows):
        size = max(1, BATCH_TOKENS // max(map(len, rows[at : at + 64])))
        batch = rows[at : at + min(size, 64)]
        width = max(map(len, batch))
        pad = encoder.config.pad_token_id or 0
        ids_BS = torch.tensor([row + [pad] * (width - len(row)) for row in batch])
        mask_BS = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
        states_BSE = encoder(input_ids=ids_BS, attention_mask=mask_BS).last_hidden_state * mask_BS[..., None]
        means_BE = states_BSE.sum(1) / mask_BS.sum(1, keepdim=True)
        found |= dict(zip(texts[at : at + len(batch)], means_BE, strict=True))
        at += len(batch)
    return found


def features(states: dict[str, torch.Tensor], rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the rows' features (N, 4E) and the numbers of their labels (N,)."""
    u_NE, v_NE = (torch.stack([states[row[name]] for row in rows]) for name in ("sentence1", "sentence2"))
    labels_N = torch.tensor([XNLI_LABELS.index(row["label"]) for row in rows])
    return torch.cat([u_NE, v_NE, (u_NE - v_NE).abs(), u_NE * v_NE], dim=1), labels_N


def fit(x_NF: torch.Tensor, labels_N: torch.Tensor, weight_decay: float) -> torch.nn.Linear:
    """Returns a softmax regression on features of mean 0 and variance 1, folded into its weights."""
    mean_F, scale_F = x_NF.mean(0), x_NF.std(0).clamp_min(1e-6)
    x_NF = (x_NF - mean_F) / scale_F
    linear = torch.nn.Linear(x_NF.shape[1], len(XNLI_LABELS))
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(x_NF), labels_N) + weight_decay * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        linear.weight /= scale_F
        linear.bias -= linear.weight @ mean_F
    return linear


def accuracy(linear: torch.nn.Linear, x_NF: torch.Tensor, labels_N: torch.Tensor) -> float:
    """Returns the share of rows whose label is the likeliest."""
    return (linear(x_NF).argmax(1) == labels_N).float().mean().item()


def evaluate(mt_path: str, rows: dict[str, list[dict]], test: dict[str, list[dict]], seed: int) -> dict[str, float]:
    """Trains on rows of all languages and returns the accuracy on the test rows of each."""
    encoder, tokenizer = load_encoder(mt_path, torch.float32), load_tokenizers(mt_path, None).encoder
    train = [row | {"number": i} for found in rows.values() for i, row in enumerate(found)]
    everything = [*train, *(row for found in test.values() for row in found)]
    states = mean_states(encoder, tokenizer, [row[name] for row in everything for name in ("sentence1", "sentence2")])
    # Whole premises, in all languages at once: rows of the same number are translations of each other.
    first = next(iter(rows.values()))
    premises = sorted({row["sentence1"] for row in first})
    random.Random(seed).shuffle(premises)
    held = set(premises[: max(1, round(DEV_SHARE * len(premises)))])
    dev_numbers = {i for i, row in enumerate(first) if row["sentence1"] in held}
    dev = features(states, [row for row in train if row["number"] in dev_numbers])
    rest = features(states, [row for row in train if row["number"] not in dev_numbers])
    best = max(WEIGHT_DECAYS, key=lambda decay: accuracy(fit(*rest, decay), *dev))
    linear = fit(*features(states, train), best)
    return {name: accuracy(linear, *features(states, found)) for name, found in test.items()}
