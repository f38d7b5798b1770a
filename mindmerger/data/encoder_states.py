"""States of a frozen encoder for every row of a data set, on disk: read in the place of running the encoder.

Dimension letters: B rows, S encoder tokens, n layers, E encoder width.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mindmerger.data.training_set import release_pages_of

if TYPE_CHECKING:  # torch takes seconds to import, and only tensors need it
    import torch


class EncoderStates:
    """A file of states, memory-mapped: row after row without padding, (tokens, n, E) in all, one copy for all processes
    of a node."""

    def __init__(self, file: Path, lengths: np.ndarray, layers: int, width: int, dtype: "torch.dtype"):
        """Opens the file, which must be whole; reads nothing yet.

        Args:
            lengths: encoder tokens of every row, (rows,).
            layers, width: n and E.
            dtype: of the states, which are kept as they were computed.
        """
        self.lengths, self.dtype = np.asarray(lengths), dtype
        # By the path that the system shows: a link in it would hide the pages that are to be given back.
        self.file, self.starts = os.path.realpath(file), starts_of(lengths)
        shape = int(self.lengths.sum(dtype=np.int64)), layers, width
        # As plain bits: numpy knows no bf16. An empty file cannot be mapped.
        self._bits = np.memmap(self.file, f"i{dtype.itemsize}", "r", shape=shape) if shape[0] else np.empty(shape)

    def padded(self, rows: np.ndarray) -> "torch.Tensor":
        """Returns the states of rows as (n, B, S, E), zeros behind each row's end."""
        import torch

        lengths = self.lengths[rows]
        _, layers, width = self._bits.shape
        bits_nBSE = np.zeros((layers, len(rows), lengths.max(), width), dtype=self._bits.dtype)
        for i, (start, length) in enumerate(zip(self.starts[rows], lengths, strict=True)):
            bits_nBSE[:, i, :length] = self._bits[start : start + length].swapaxes(0, 1)
        return torch.from_numpy(bits_nBSE).view(self.dtype)

    def release_pages(self) -> None:
        """Takes the pages that reading has touched out of this process's resident memory, as `TrainingSet` does."""
        release_pages_of({self.file})


def starts_of(lengths: np.ndarray) -> np.ndarray:
    """Returns the number of the first token of each row in the file, (rows,) int64."""
    return np.cumsum(lengths, dtype=np.int64) - lengths


def bits(tensor: "torch.Tensor") -> np.ndarray:
    """Returns a tensor of the host's memory as an array of integers of its dtype's size, which shares its memory."""
    import torch

    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]).numpy()
