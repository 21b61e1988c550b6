"""Layers whose weights may be used without calling them, and faster products with those weights."""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.neural_memory.types import in_autocast, is_exporting

HAS_ONEDNN = torch.backends.mkldnn.is_available()  # at import, as the query would break a compiled graph


def has_forward_of(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module has the forward of ``kind``, unlike an adapter or a quantised layer."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module has the forward of its ``kind`` and no hook that would be bypassed."""
    return has_forward_of(module, kind) and not (module._forward_pre_hooks or has_output_hooks(module))


def has_output_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks on its output or on gradients."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def are_plain(*layers: nn.Linear) -> bool:
    """Return whether linear layers are plain and without biases, so that their weights may be merged."""
    return all(is_plain(layer, nn.Linear) and layer.bias is None for layer in layers)


def may_fuse(x: Tensor) -> bool:
    """Return whether products may be merged: not in exported graphs, nor where FLOPs are counted."""
    if torch.compiler.is_compiling():
        return not is_exporting()
    return type(x) is Tensor and not torch._C._len_torch_dispatch_stack()  # modes, for which no public function exists


def columns(weight: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``weight`` (M, C) times tokens (B, N, C) as columns, (B, M, N), without a copy of either.

    Args:
        weight (Tensor): (M, C).
        x (Tensor): (B, N, C).
        out (Tensor | None): Buffer for the product, used if it fits and no gradient is needed. Defaults to None.
    """
    if torch.compiler.is_compiling() or in_autocast(x):
        # Each image has its own product: under autocast their gradients are summed in the weight's dtype.
        return torch.bmm(weight.expand(x.size(0), -1, -1), x.mT)
    if torch.is_grad_enabled():
        return _Columns.apply(weight, x)
    fits = out is not None and out.shape == (x.size(0), weight.size(0), x.size(1)) and out.dtype == x.dtype
    return torch.bmm(weight.expand(x.size(0), -1, -1), x.mT, out=out if fits else None)


def rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``weight`` (M, C) times (B, N, C), a view of columns, as (B, N, M), without a copy of the columns."""
    if torch.is_grad_enabled() and not (torch.compiler.is_compiling() or in_autocast(x)):
        return _Rows.apply(x, weight, bias)
    return _rows(x, weight, bias)


def _rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight = weight.mT.expand(x.size(0), -1, -1)
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)


class _Columns(torch.autograd.Function):
    """The product of :func:`columns`; autograd's own derivative would transpose the gradient of the tokens."""

    @staticmethod
    def forward(weight: Tensor, x: Tensor) -> Tensor:
        return torch.bmm(weight.expand(x.size(0), -1, -1), x.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight, x), (of_weight, of_x) = ctx.saved_tensors, ctx.needs_input_grad
        grad_weight = torch.bmm(grad, x).sum(0) if of_weight else None
        return grad_weight, torch.bmm(grad.mT, weight.expand(x.size(0), -1, -1)) if of_x else None


class _Rows(torch.autograd.Function):
    """The product of :func:`rows`; autograd's own derivative would transpose the gradient of the columns."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _rows(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (of_x, of_weight, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
        grad_x = torch.bmm(weight.mT.expand(x.size(0), -1, -1), grad.mT).mT if of_x else None
        grad_weight = torch.bmm(grad.mT, x).sum(0) if of_weight else None
        return grad_x, grad_weight, grad.sum((0, 1)) if of_bias else None


def pointwise(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a plain linear layer or 1×1 convolution to (N, C, H, W) in channels_last memory.

    On a CPU it is a convolution: oneDNN is up to 1.7 times as fast as an MKL matrix product with so few columns, and
    never slower. Elsewhere, and in float64, which oneDNN does not support, it is a matrix product.
    """
    weight = layer.weight.flatten(1)
    if x.device.type == 'cpu' and x.dtype != torch.float64 and HAS_ONEDNN:
        return F.conv2d(x, weight[:, :, None, None], layer.bias)
    return F.linear(x.permute(0, 2, 3, 1), weight, layer.bias).permute(0, 3, 1, 2)
