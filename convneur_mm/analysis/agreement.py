"""Compare a memory's output and gradients with those of the float64 reference."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models import NeuralMemory

# Relative error of float32 against float64; rounding grows with the number of dependent chunks.
TOLERANCE = 1e-3


def results(layer: NeuralMemory, x: Tensor, weight: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of tokens and parameters."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()])]


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest of the tensors' relative errors; infinite if one is NaN."""
    errors = [((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(found, expected)]
    return max(error if error == error else float('inf') for error in errors)
