"""Tests of scripts/tiny_world/muon.py, the optimizer that makes the quickstart's models."""

import pytest
import torch

from scripts.tiny_world.muon import Muon, orthogonalise

SHAPES = [(8, 8), (8, 8), (24, 8), (8, 24)]


def matrices_and_gradients(steps: int):
    """Returns parameters and the gradients of each step, the same at every call."""
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    return matrices, [[torch.randn(shape) for shape in SHAPES] for _ in range(steps)]


def trained(optimizer_class, steps: int = 5):
    """Returns the matrices after steps with one optimizer."""
    matrices, gradients = matrices_and_gradients(steps)
    optimizer = optimizer_class(matrices, lr=0.01, momentum=0.95, weight_decay=0.1)
    for step in gradients:
        for matrix, gradient in zip(matrices, step, strict=True):
            matrix.grad = gradient
        optimizer.step()
    return [matrix.detach() for matrix in matrices]


def test_steps_are_those_of_torchs_muon_up_to_its_bfloat16():
    start = matrices_and_gradients(0)[0]
    for before, ours, theirs in zip(start, trained(Muon), trained(torch.optim.Muon), strict=True):
        moved = (theirs - before).norm()
        assert (ours - theirs).norm() < 0.02 * moved


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_orthogonalised_matrices_keep_their_singular_vectors(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    found = orthogonalise(matrix[None])[0]
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.T @ found @ right.T
    values = torch.diagonal(inside)
    assert values.min() > 0.6 and values.max() < 1.3
    assert (inside - torch.diag(values)).abs().max() < 1e-10


def test_a_matrix_without_gradient_stays_as_it_is():
    matrices, gradients = matrices_and_gradients(1)
    before = matrices[1].detach().clone()
    for index in (0, 2, 3):
        matrices[index].grad = gradients[0][index]
    Muon(matrices, lr=0.01).step()
    assert torch.equal(matrices[1], before)
