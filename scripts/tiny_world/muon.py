"""Muon in float32."""

from collections import defaultdict

import torch

# Of the quintic iteration in Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon), as torch.optim.Muon.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum whose matrices are orthogonalised before they are applied.

    The same as torch.optim.Muon but for the number format. That one orthogonalises in bfloat16, which a CPU without
    instructions for it emulates: on one, `python -m scripts.tiny_world` took 1,419 s with it and takes 525 s with this.
    Here matrices of one shape are orthogonalised together, in float32.

    Args:
        matrices: the parameters, of two dimensions each.
        lr: learning rate; a matrix (rows, columns) gets √(rows/columns) times as much where that is more than 1.
        momentum: of Nesterov's kind.
        weight_decay: decoupled, times `lr`.
    """

    def __init__(self, matrices, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """Makes one step from the gradients that are there."""
        if closure is not None:
            raise ValueError("a step of Muon takes no closure")
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[tuple(matrix.shape)].append(matrix)
            for matrices in by_shape.values():
                self._step_together(matrices, group)

    def _step_together(self, matrices: list[torch.Tensor], group: dict) -> None:
        updates = []
        for matrix in matrices:
            state = self.state[matrix]
            if not state:
                state["momentum"] = torch.zeros_like(matrix)
            state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
            updates.append(matrix.grad.lerp(state["momentum"], group["momentum"]))
        rows, columns = matrices[0].shape
        rate = group["lr"] * max(1, rows / columns) ** 0.5
        for matrix, update in zip(matrices, orthogonalise(torch.stack(updates)), strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Returns matrices with the same singular vectors and singular values near 1.

    Args:
        matrices: (count, rows, columns). X ← aX + bXXᵀX + c(XXᵀ)²X from X of Frobenius norm 1, five times: singular
            values come between about 0.7 and 1.2, which is as near as the optimizer needs.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
