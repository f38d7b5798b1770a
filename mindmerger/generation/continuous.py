"""Continuous batching: a row that has ended leaves the batch, and a waiting one takes its place.

Answers end after very different numbers of tokens. A batch that runs until its longest answer has ended computes for
rows that nobody waits for; here their places are filled, and inputs are read in batches of their own, of similar
length.

Dimension letters: B rows decoded at once, H key-value heads, C columns of the cache, L positions of an input, P of them
that all inputs begin with, D head width, V vocabulary.
"""

import inspect
from collections import deque
from collections.abc import Callable

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mindmerger.model.decoding import GrowingLayer, fast_decoding

# Columns behind the longest row: attention reads half of them on average for nothing, and once in so many tokens all
# keys and values are copied.
ROOM = 32
# A share of the places has to be free before inputs are read for them: one row at a time would read all weights for it.
REFILL_SHARE = 1 / 8
# Padded positions of inputs that are read at once: beyond some thousands a CPU's caches no longer hold the activations,
# and a GPU gains nothing.
READ_POSITIONS = 4096


def can_run(model) -> bool:
    """Tells whether a `MindMerger`'s rows can change places: its LLM keeps nothing of the past but keys and values, and
    takes positions as they are given."""
    if model.mapping is not None and model.mapping.uses_memory:  # made for one batch of rows
        return False
    needed = {"past_key_values", "position_ids", "attention_mask", "inputs_embeds"}
    if not needed <= inspect.signature(model.llm.forward).parameters.keys():
        return False
    if not model.llm._supports_default_dynamic_cache():
        return False
    kinds = {type(layer) for layer in DynamicCache(config=model.llm.config).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def can_share(llm: nn.Module) -> bool:
    """Tells whether what all inputs begin with can be read once: where rows are shorter, a gap then follows it while
    they are read, which a sliding window would count."""
    return {type(layer) for layer in DynamicCache(config=llm.config).layers} == {DynamicLayer}


class PlaceLayer(DynamicLayer):
    """Keys and values of the rows being decoded: a buffer (B, H, C, D) each, rows aligned at column `end`.

    Attention gets the whole buffer, and a mask hides what lies behind the rows: of a part of it bf16 products on a CPU
    would lay out a copy at every token, which took half of attention's time.
    """

    def __init__(self, rows: int, columns: int, keys_BHLD: torch.Tensor, values_BHLD: torch.Tensor):
        """Makes room for a number of rows and columns; the tensors show heads, widths, dtype and device."""
        super().__init__()
        self.lazy_initialization(keys_BHLD, values_BHLD)
        self.end = 0
        self.keys, self.values = (_room(one, rows, columns) for one in (keys_BHLD, values_BHLD))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Writes the states (B, H, 1, D) of a token of each row; returns all keys and all values, (B, H, C, D)."""
        end = self.end + key_states.shape[2]
        self.keys[:, :, self.end : end], self.values[:, :, self.end : end] = key_states, value_states
        self.end = end
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Returns the column of the next token."""
        return self.end

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns how many columns attention gets, and that the first is number 0."""
        return self.keys.shape[2], 0

    def put(self, places: list[int], end: int, layer: DynamicLayer, from_BL: torch.Tensor | None) -> None:
        """Copies rows that were read into places, aligned at column `end`; `from_BL` says from which column each of
        theirs is, None from the same."""
        self.end = end
        for own, new in ((self.keys, layer.keys), (self.values, layer.values)):
            if from_BL is not None:
                new = new.take_along_dim(from_BL[:, None, :, None], dim=2)
            own[places, :, end - new.shape[2] : end] = new

    def lay_out(self, places: list[int], longest: int, columns: int) -> None:
        """Keeps the rows in some places, and of them the last `longest` columns, in buffers of another width."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = _room(old, len(places), columns)
            new[:, :, :longest] = old[places, :, self.end - longest : self.end]
            setattr(self, name, new)
        self.end = longest


def _room(like_BHLD: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    # Zeros: what is masked still meets a weight of 0, and free memory may hold NaN.
    return like_BHLD.new_zeros(rows, like_BHLD.shape[1], columns, like_BHLD.shape[3])


def full_cache(llm: nn.Module, layer: Callable[[int], DynamicLayer]) -> DynamicCache:
    """Returns a cache of an LLM whose layer number i is `layer(i)`: also those with a sliding window keep all columns
    there, and the mask hides what lies before the window."""
    cache = DynamicCache(config=llm.config)
    cache.layers = [layer(i) for i in range(len(cache.layers))]
    return cache


class Rows:
    """The rows that are decoded at once, each in a place of the batch.

    The state is always that of an ordinary left-padded batch, only that rows differ in how many tokens they have made.
    """

    def __init__(self, model, places: int, max_new_tokens: int, start: DynamicCache | None = None):
        """Makes a number of places, all of them free; `start` is what `read_start` returns."""
        self.start = start
        self.model, self.llm, self.max_new_tokens = model, model.llm, max_new_tokens
        self.numbers: list[int | None] = [None] * places  # of the example in each place, None where it has ended
        self.cached = [0] * places  # columns of each row
        self.cache: DynamicCache | None = None
        self.answers: dict[int, list[int]] = {}
        parameters = inspect.signature(self.llm.forward).parameters
        self.last_logits = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    @property
    def running(self) -> list[int]:
        """The places of rows that have not ended."""
        return [place for place, number in enumerate(self.numbers) if number is not None]

    @property
    def free(self) -> int:
        """The number of places whose rows have ended, or that had none yet."""
        return self.numbers.count(None)

    def admit(self, numbers: list[int], inputs: dict) -> None:
        """Reads the inputs of examples, which become rows in free places, and decodes their first tokens.

        Args:
            inputs: as `MindMerger.generate` takes them, none longer than what the running rows had.
        """
        names = ("encoder_input_ids", "encoder_attention_mask", "prompt_ids", "prompt_mask")
        embeds_BLD, mask_BL, _ = self.model._merged(*(inputs.get(name) for name in names))
        mask_BL = mask_BL.to(embeds_BLD.device)
        read, logits_BV, from_BL = self._read(embeds_BLD, mask_BL)
        free = [place for place, number in enumerate(self.numbers) if number is None]
        places, width = free[: len(numbers)], mask_BL.shape[1]
        if self.cache is None:
            self._make_room(read, mask_BL)
        if width > self.end:  # a slice from a negative column would be an empty one
            raise RuntimeError(f"an input of {width} positions follows shorter ones ({self.end})")
        for own, new in zip(self.cache.layers, read.layers, strict=True):
            if isinstance(own, PlaceLayer):
                own.put(places, self.end, new, from_BL)
        self.mask_BC[places] = 0
        self.mask_BC[places, self.end - width : self.end] = mask_BL
        lengths = mask_BL.sum(1)
        self.positions_B[places] = lengths
        for place, number, length in zip(places, numbers, lengths.tolist(), strict=True):
            self.numbers[place], self.cached[place], self.answers[number] = number, length, []
        self._append(places, logits_BV)

    def _read(self, embeds_BLD: torch.Tensor, mask_BL: torch.Tensor) -> tuple:
        """Passes left-padded inputs; returns their cache, the logits behind them, and which of the cache's columns each
        column of theirs is, None where it is the same."""
        read = full_cache(self.llm, lambda i: GrowingLayer())
        length, shared, from_BL = embeds_BLD.shape[1], 0, None
        seen_BL, positions_BL = mask_BL, (mask_BL.cumsum(1) - 1).clamp(min=0)
        if self.start is not None:
            shared = self.start.get_seq_length()
            for layer, known in zip(read.layers, self.start.layers, strict=True):
                if known.is_initialized:
                    layer.update(*(one.expand(len(embeds_BLD), -1, -1, -1) for one in (known.keys, known.values)))
            # The cache has the start in its first columns, before the padding instead of behind it.
            column_L, padding_B1 = torch.arange(length, device=mask_BL.device), length - mask_BL.sum(1, keepdim=True)
            from_BL = torch.where(column_L < padding_B1 + shared, (column_L - padding_B1).clamp(min=0), column_L)
            seen_BL = torch.cat([mask_BL.new_ones(len(mask_BL), shared), mask_BL[:, : length - shared]], dim=1)
        output = self.llm(
            inputs_embeds=embeds_BLD[:, shared:],
            attention_mask=seen_BL,
            position_ids=positions_BL[:, shared:],
            past_key_values=read,
            use_cache=True,
            **self.last_logits,
        )
        return read, output.logits[:, -1], from_BL

    def _make_room(self, read: DynamicCache, mask_BL: torch.Tensor) -> None:
        rows, self.end = len(self.numbers), mask_BL.shape[1]

        def place_layer(i: int) -> DynamicLayer:
            layer = read.layers[i]
            if not layer.is_initialized:  # it shares another's keys and values
                return GrowingLayer()
            return PlaceLayer(rows, self.end + ROOM, layer.keys, layer.values)

        self.cache = full_cache(self.llm, place_layer)
        self.mask_BC = mask_BL.new_zeros(rows, self.end + ROOM)
        self.tokens_B, self.positions_B = mask_BL.new_zeros(rows), mask_BL.new_zeros(rows)

    def _lay_out(self, places: list[int]) -> None:
        """Keeps the rows in some places, with room behind the longest one."""
        longest = max(self.cached[place] for place in self.running)
        for layer in self.cache.layers:
            if isinstance(layer, PlaceLayer):
                layer.lay_out(places, longest, longest + ROOM)
        old = self.mask_BC[places, self.end - longest : self.end]
        self.mask_BC = torch.nn.functional.pad(old, (0, ROOM))
        self.end = longest

    def step(self) -> None:
        """Decodes one token of every row."""
        if self.end == self.mask_BC.shape[1]:
            self._lay_out(list(range(len(self.numbers))))
        # Ended rows are computed too, until another takes the place; each sees itself at least.
        self.mask_BC[:, self.end] = 1
        self.end += 1
        output = self.llm(
            input_ids=self.tokens_B.unsqueeze(1),
            attention_mask=self.mask_BC,
            position_ids=self.positions_B.unsqueeze(1),
            past_key_values=self.cache,
            use_cache=True,
            **self.last_logits,
        )
        running = self.running
        for place in running:
            self.cached[place] += 1
        self.positions_B[running] += 1  # those of ended rows stay: learned positions have an end
        self._append(running, output.logits[running, -1])

    def _append(self, places: list[int], logits_BV: torch.Tensor) -> None:
        """Adds the best token to each row; those that end leave their places.

        Raises:
            ModelError: for logits that are not numbers.
        """
        largest_B, tokens_B = logits_BV.max(dim=-1)
        # Of NaN, infinity and nothing but -inf argmax makes a token too. One read of the device for all of it.
        tokens = torch.where(largest_B.isfinite(), tokens_B, -1).tolist()
        if -1 in tokens:
            raise self.model.not_finite_error()
        self.tokens_B[places] = tokens_B
        for place, token in zip(places, tokens, strict=True):
            ids = self.answers[self.numbers[place]]
            ids.append(token)
            if token in self.model.eos_token_ids or len(ids) == self.max_new_tokens:
                self.numbers[place] = None

    def close_up(self) -> None:
        """Drops the places of rows that have ended."""
        kept = self.running
        self._lay_out(kept)
        self.tokens_B, self.positions_B = self.tokens_B[kept], self.positions_B[kept]
        self.numbers, self.cached = ([one[place] for place in kept] for one in (self.numbers, self.cached))


def read_start(model, inputs: dict, shared: int) -> DynamicCache:
    """Returns the cache (1, H, P, D) of the first positions of one example's input, as `MindMerger.generate` takes it,
    which all other inputs begin with too."""
    cache = full_cache(model.llm, lambda i: GrowingLayer())
    embeds_BLD, *_ = model._merged(None, None, inputs["prompt_ids"], inputs["prompt_mask"])
    model.llm(inputs_embeds=embeds_BLD[:, :shared], past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def generate_rows(
    model,
    order: list[int],
    lengths: list[int],
    read: Callable[[list[int]], dict],
    places: Callable[[int], int],
    max_new_tokens: int,
    advance: Callable[[int], object] = lambda ended: None,
    shared: int = 0,
) -> dict[int, list[int]]:
    """Decodes greedily, as `MindMerger.generate` does, with rows that change places.

    Args:
        order: numbers of examples, longest input first.
        lengths: positions of every example's input, by its number.
        read: gives the arguments of `MindMerger.generate` for some examples.
        places: gives how many rows are decoded at once where the longest input has that many positions.
        advance: called with how many rows have ended since.
        shared: positions that all inputs begin with; they are read once.

    Returns:
        the new ids of each example, up to and with its end token.

    Raises:
        ModelError: for logits that are not numbers.
    """
    from mindmerger.generation.answers import split_batches

    waiting, answers = deque(order), {}

    def fill(rows: Rows) -> None:
        following = [waiting.popleft() for _ in range(min(rows.free, len(waiting)))]
        for part in split_batches(following, lengths, None, READ_POSITIONS):
            rows.admit(part, read(part))

    with fast_decoding(model.llm):
        start = read_start(model, read(order[:1]), shared) if shared else None
        # Anew where all have ended: of shorter inputs more rows fit.
        while waiting:
            number, told = min(len(waiting), max(1, places(lengths[waiting[0]]))), 0
            rows = Rows(model, number, max_new_tokens, start)
            fill(rows)
            while rows.running:
                rows.step()
                if not rows.running:
                    break
                if waiting and rows.free >= REFILL_SHARE * len(rows.numbers):
                    fill(rows)
                elif not waiting and 2 * rows.free >= len(rows.numbers):
                    rows.close_up()
                ended = len(rows.answers) - len(rows.running)
                advance(ended - told)
                told = ended
            advance(len(rows.answers) - told)
            answers |= rows.answers
    return answers
