"""The memory's rule from surprise to memory: update generators, the bound of a write, and Eq. 4, with derivatives.

Rows are cat(W1ᵀ, W2) of n = B·h memories, (n, 2e, d), as every coefficient acts on d. Export and PyTorch's operators
use these functions. To change the rule, start with :func:`write` and :func:`write_backward`, which are also in
``csrc/memory.cpp``, within ``step`` and ``step_backward``, and in ``triton_kernels.py``, as ``write_kernel`` and
``write_backward_kernel``.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import UpdateGenerators


def generate(errors: Tensor, generators: UpdateGenerators) -> tuple[Tensor, Tensor]:
    """Return the generators' hidden units before their GELU, (B, 4Cm), and outputs before the sigmoid, (B, 3Cm).

    ``errors`` (…, n, d) are the mean squared errors of n = B·h heads; the outputs are step, momentum and decay.
    """
    in_weight, in_bias, out_weight, out_bias = generators
    hidden = F.linear(errors.reshape(-1, in_weight.size(1)), in_weight, in_bias)
    return hidden, F.linear(F.gelu(hidden), out_weight, out_bias)


def generate_backward(grad_outputs: Tensor, hidden: Tensor, in_weight: Tensor,
                      out_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the hidden units and of the errors, (B, Cm)."""
    grad_hidden = torch.ops.aten.gelu_backward(grad_outputs @ out_weight, hidden)
    return grad_hidden, grad_hidden @ in_weight


def coefficients(outputs: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return step θ (without ``inner_step``), momentum η and decay α, each (…, n, 1, d), of outputs (…, B, 3Cm)."""
    heads = outputs.size(-1) // (3 * d)
    theta, eta, alpha = outputs.sigmoid().unflatten(-1, (3, heads, 1, d)).unbind(-4)
    return tuple(x.flatten(-4, -3) for x in (theta, eta, alpha))


def normalized(gradient: Tensor, curvature: Tensor, scale: float) -> Tensor:
    """Return the gradient of Eq. 3, (…, n, 2e, d), over 1 + ``scale`` times the head's ``curvature``, (…, n)."""
    return gradient / (1 + scale * curvature)[..., None, None]


def normalized_backward(grad: Tensor, result: Tensor, curvature: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of both tensors of :func:`normalized`, from its ``result`` and the gradient of that."""
    factor = 1 / (1 + scale * curvature)
    return factor[..., None, None] * grad, -scale * factor * (grad * result).sum((-2, -1))


def bounded(step: Tensor, max_norm: float) -> Tensor:
    """Return writes with bounded norms: u / sqrt(1 + ‖u‖² / max_norm²) for each head's ``step`` u."""
    return step * (1 + step.square().sum((-2, -1), keepdim=True) / max_norm**2).rsqrt()


def bounded_backward(grad: Tensor, step: Tensor, max_norm: float) -> Tensor:
    """Return the gradient of the ``step`` of :func:`bounded`."""
    factor = (1 + step.square().sum((-2, -1), keepdim=True) / max_norm**2).rsqrt()
    along = (grad * step).sum((-2, -1), keepdim=True)
    return factor * grad - step * (along * factor * (factor / max_norm).square())


def write(gradient: Tensor, outputs: Tensor, memory: Tensor, momentum: Tensor, inner_step: float,
          max_write_norm: float) -> tuple[Tensor, Tensor]:
    """Return memory and momentum after a chunk (Eq. 4), from its ``gradient`` of Eq. 3, all of them (…, n, 2e, d)."""
    theta, eta, alpha = coefficients(outputs, memory.size(-1))
    momentum = eta * momentum - bounded(inner_step * theta * gradient, max_write_norm)
    return (1 - alpha) * memory + momentum, momentum


def write_backward(grad_memory: Tensor, grad_momentum: Tensor, gradient: Tensor, outputs: Tensor, memory: Tensor,
                   momentum: Tensor, inner_step: float, max_write_norm: float) -> tuple[Tensor, ...]:
    """Return the gradients of the first four arguments of :func:`write`."""
    theta, eta, alpha = coefficients(outputs, memory.size(-1))
    grad_momentum = grad_momentum + grad_memory
    grad_step = bounded_backward(-grad_momentum, inner_step * theta * gradient, max_write_norm)
    grads = (inner_step * grad_step * gradient, grad_momentum * momentum, -grad_memory * memory)
    grad_outputs = torch.stack([(grad.sum(-2, keepdim=True) * x * (1 - x)).view(len(outputs), -1)
                                for grad, x in zip(grads, (theta, eta, alpha))], dim=1).flatten(1)
    return inner_step * theta * grad_step, grad_outputs, (1 - alpha) * grad_memory, eta * grad_momentum


def step(gradient: Tensor, errors: Tensor, memory: Tensor, momentum: Tensor, in_weight: Tensor, in_bias: Tensor,
         out_weight: Tensor, out_bias: Tensor, inner_step: float, max_write_norm: float) -> tuple[Tensor, ...]:
    """Return memory and momentum after a chunk, and both results of :func:`generate`."""
    hidden, outputs = generate(errors, UpdateGenerators(in_weight, in_bias, out_weight, out_bias))
    return *write(gradient, outputs, memory, momentum, inner_step, max_write_norm), hidden, outputs


def step_backward(grad_memory: Tensor, grad_momentum: Tensor, gradient: Tensor, hidden: Tensor, outputs: Tensor,
                  memory: Tensor, momentum: Tensor, in_weight: Tensor, out_weight: Tensor, inner_step: float,
                  max_write_norm: float) -> tuple[Tensor, ...]:
    """Return the gradients of the first four arguments of :func:`step`, and of hidden units and outputs."""
    grad_gradient, grad_outputs, grad_memory, grad_momentum = write_backward(
        grad_memory, grad_momentum, gradient, outputs, memory, momentum, inner_step, max_write_norm)
    grad_hidden, grad_errors = generate_backward(grad_outputs, hidden, in_weight, out_weight)
    grad_errors = grad_errors.view(*memory.shape[:-2], -1)
    return grad_gradient, grad_errors, grad_memory, grad_momentum, grad_hidden, grad_outputs
