"""One answer as it grows, for a page or a terminal; the tokens are those of `answer`."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue

import torch

from mindmerger.generation.answers import Generation, generate_batch, input_positions, to_generation, tokenise_texts
from mindmerger.model.towers import check_positions
from mindmerger.tasks import find_task


class Steps:
    """A stopping criterion that hands on the ids of one answer after every token, and ends it once nobody reads on."""

    def __init__(self):
        self._ids: SimpleQueue[list[int] | None] = SimpleQueue()
        self.wanted = True

    def __call__(self, ids_BT: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        """Returns for the one row, (1,), whether generation ends."""
        self._ids.put(ids_BT[0].tolist())  # waits for a GPU, as `generate` does at every token anyway
        return torch.full((1,), not self.wanted, dtype=torch.bool, device=ids_BT.device)

    def close(self) -> None:
        """Says that no more ids follow."""
        self._ids.put(None)

    def latest(self) -> list[int] | None:
        """Waits for new ids and returns all so far; None after the last ones."""
        ids = self._ids.get()
        # A reader that is slower than the model skips what is out of date, and never falls behind.
        while ids is not None and not self._ids.empty():
            ids = self._ids.get()
        return ids


def stream_answer(
    model,
    text: str,
    task: str = "math",
    language: str | None = None,
    max_new_tokens: int | None = None,
    augmentation: bool | None = None,
    chat_template: str | None = None,
) -> Iterator[Generation]:
    """Yields the answer to one text as far as it is written, again and again; the last one is whole.

    Closing the iterator ends the generation at the next token. One model answers one text at a time.

    Args:
        text, language: as one entry of `answer`'s lists; the other arguments are as there.

    Raises:
        UserError: as `answer` does, and for a text that the LLM has too few positions for.
    """
    task = find_task(task)
    tokenizers, columns = tokenise_texts(model, [text], task, language, augmentation, chat_template)
    limit = max_new_tokens or task.max_new_tokens
    [positions] = input_positions(columns, model.mapping)
    check_positions(model.config.llm_path, positions + limit, "the text with its answer", "max_new_tokens")
    steps = Steps()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generate_batch, model, tokenizers, columns, [0], limit, steps)
        running.add_done_callback(lambda _: steps.close())
        try:
            while (ids := steps.latest()) is not None:
                one = to_generation(model, tokenizers, ids)
                # The last character may lack some of its bytes yet.
                yield replace(one, output=one.output.rstrip("\N{REPLACEMENT CHARACTER}"))
        finally:
            steps.wanted = False
        [whole] = running.result()
    yield whole
