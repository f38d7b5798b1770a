"""The contract of a bridge: the one trained part between two frozen towers, its options and its stages of training.

Dimension letters: B batch, S encoder tokens, K prefix length, E encoder width, D LLM width, n encoder layers,
N LLM layers, V rows of the LLM's output head.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from mindmerger.runtime.errors import UserError


class Towers(NamedTuple):
    """The two frozen models, as far as the shapes of a bridge follow from them: E, D, n, N, V.

    The encoder has n + 1 hidden states. A number that nobody gave is 0; a bridge that needs it is always given it.
    """

    encoder_width: int
    llm_width: int
    encoder_depth: int = 0
    llm_depth: int = 0
    vocabulary: int = 0


class Option(NamedTuple):
    """A choice that a bridge leaves open: its default, and the values that it may have.

    Without a list of values it is a whole number above 0. Values are texts, as `--bridge_option KEY=VALUE` gives them.
    """

    default: str
    values: tuple[str, ...] = ()


class LayerMemory(NamedTuple):
    """Memory that one LLM layer attends to beside its own input: sources of keys and of values at each encoder token,
    which pass the layer's own projections, and the gate (1,) by which the result is multiplied."""

    key_BSD: torch.Tensor
    value_BSD: torch.Tensor
    gate_1: torch.Tensor


class BridgeOutput(NamedTuple):
    """Input of the LLM that comes from the encoder.

    prefix_BKD: soft tokens, markers included, in the bridge's own dtype. prefix_mask_BK: 1 on real ones, on the device
    of the mask that the bridge was given. memory: one for each LLM layer, masked as the encoder's tokens are; None
    leaves the LLM's attention untouched.
    """

    prefix_BKD: torch.Tensor
    prefix_mask_BK: torch.Tensor
    memory: list[LayerMemory] | None = None


class Stage(NamedTuple):
    """One stage of training.

    data: "pairs" (sentences, X → English), "question_pairs" (the task's questions, likewise), "task" (the task's
    queries) or "english_task" (the English ones alone).
    with_prompt: whether the LLM reads the prompt after the prefix. encoder_text: what the encoder reads, the "source"
    or the templated "prompt". trains: the parts that get gradients, "bridge" and perhaps "lm_head", or "adapter" alone.
    starts_from: the stage whose best result this one continues. Other values of `data`, `encoder_text` and `trains` are
    refused.
    """

    data: str
    with_prompt: bool
    encoder_text: str = "source"
    trains: tuple[str, ...] = ("bridge",)
    starts_from: str | None = None


class Bridge(nn.Module):
    """The part that is trained between two frozen towers. One subclass per method, one file per subclass.

    A subclass is built from `Towers` and its options, sets `stages`, and implements `forward` and `prefix_length`. Its
    parameters are what a mapping file and a checkpoint hold. One that is given the LLM's output head to train keeps it
    as `lm_head`, a linear layer without bias: the model fills it with the LLM's weights and has the LLM use it.
    """

    # Where the method is published, for the model card.
    paper: ClassVar[str] = "not published"
    # By --bridge_option.
    choices: ClassVar[dict[str, Option]] = {}
    # By --stage_name, in the order in which they are trained.
    stages: ClassVar[dict[str, Stage]] = {}
    # By --stage_name too, but no part of the method as published: another curriculum has them.
    further_stages: ClassVar[dict[str, Stage]] = {}
    # Released weights: how the names of its parameters begin → how their keys begin there. The longest one counts.
    released: ClassVar[dict[str, str]] = {"": ""}
    # How the keys of what else released files hold begin: both towers, which are not read.
    released_others: ClassVar[tuple[str, ...]] = ()
    # hidden_states of the encoder that it reads: 0 = embeddings, -1 = the final output.
    encoder_layers: tuple[int, ...] = (-1,)
    # Whether it gives a memory, so that what cannot take one is refused before anything loads.
    uses_memory: ClassVar[bool] = False
    # The dtype of the LLM's embeddings, set before each call. The prefix is cast to it afterwards in any case.
    llm_dtype: torch.dtype | None = None

    def __init__(self, *towers: int, **options):
        super().__init__()
        self.towers, self.options = Towers(*towers), self.settle(options)

    @classmethod
    def settle(cls, given: Mapping[str, object]) -> dict[str, str]:
        """Returns the value of every option, the default where none is given.

        Raises:
            UserError: for an option or a value that there is not, naming the nearest.
        """
        settled = {name: option.default for name, option in cls.choices.items()}
        for name, value in given.items():
            if name not in cls.choices:
                known = ", ".join(f"{one}={'|'.join(o.values) or 'NUMBER'}" for one, o in cls.choices.items())
                raise UserError(f"--bridge_option {name}: {cls.__name__} has no such option"
                    f"{nearest(name, cls.choices)}: its options are {known or 'none'}")  # fmt: skip
            # One spelling of each value: a resume compares options as texts.
            values, text = cls.choices[name].values, str(value).strip().lower()
            if values and text not in values:
                raise UserError(
                    f"--bridge_option {name}={value} of {cls.__name__} must be {' or '.join(values)}"
                    f"{nearest(text, values)}"
                )
            number = text.isascii() and text.isdecimal() and 0 < int(text) < 2**31
            if not values and not number and text != cls.choices[name].default:
                raise UserError(
                    f"--bridge_option {name}={value} of {cls.__name__} must be a whole number of at least 1"
                )
            settled[name] = text
        return settled

    @classmethod
    def stages_with(cls, options: Mapping[str, str]) -> dict[str, Stage]:
        """Returns the stages of a bridge with these settled options."""
        return cls.stages

    def forward(self, states_BSE: list[torch.Tensor], mask_BS: torch.Tensor) -> BridgeOutput:
        """Returns the prefix for right-padded encoder states, one tensor (B, S, E) for each of `encoder_layers`."""
        raise NotImplementedError

    def prefix_mask(self, mask_BS: torch.Tensor) -> torch.Tensor:
        """Returns the mask (B, K) of the prefix that `forward` makes: here that of the encoder's tokens and one marker
        behind them. Rows are laid out by it beforehand, without states."""
        return with_marker(mask_BS)

    def prefix_length(self, encoder_tokens):
        """Returns K, the real positions of the prefix for a number (or an array of numbers) of encoder tokens S.

        Token budgets and position checks ask here, before any weight is loaded.
        """
        raise NotImplementedError

    def released_names(self) -> dict[str, str]:
        """Returns the released weights' key of each parameter: key → name of the parameter."""
        names = {}
        for name, _ in self.named_parameters():
            start = max((one for one in self.released if name.startswith(one)), key=len)
            names[self.released[start] + name.removeprefix(start)] = name
        return names


def contradiction(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, str] | None:
    """Returns the first option in which two settlements differ, as each has it; None where they are equal."""
    for name in sorted(before.keys() | now.keys()):
        one, other = (f"{name}={found[name]}" if name in found else f"no {name}" for found in (before, now))
        if one != other:
            return one, other
    return None


class NoBridge(Bridge):
    """The place of a bridge where an LLM is trained without one: no parameters and no positions."""

    encoder_layers = ()

    def __init__(self):
        super().__init__(0, 0)

    def prefix_length(self, encoder_tokens):
        """Returns none."""
        return 0 * encoder_tokens


def with_end(mapped_BSD: torch.Tensor, mask_BS: torch.Tensor, end_D: torch.Tensor) -> BridgeOutput:
    """Returns mapped states with a learned end marker behind them, (B, S + 1, D)."""
    end_B1D = end_D.reshape(1, 1, -1).expand(mask_BS.shape[0], 1, -1)
    return BridgeOutput(torch.cat([mapped_BSD, end_B1D], dim=1), with_marker(mask_BS))


def with_marker(mask_BS: torch.Tensor) -> torch.Tensor:
    """Returns a mask with one more position at its end, (B, S + 1)."""
    return torch.cat([mask_BS, mask_BS.new_ones(mask_BS.shape[0], 1)], dim=1)


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a hint at the known name that is most similar, "" where none is."""
    found = get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def parse_options(texts: Iterable[str]) -> dict[str, str]:
    """Reads the texts of `--bridge_option`, KEY=VALUE each.

    Raises:
        UserError: for a text without a key or a value, and a key that is given twice.
    """
    options = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not (name.strip() and sign and value.strip()):
            raise UserError(f"--bridge_option {text!r} must be KEY=VALUE")
        if name.strip() in options:
            raise UserError(f"--bridge_option {name.strip()} is given twice")
        options[name.strip()] = value.strip()
    return options
