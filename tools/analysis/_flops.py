"""Parameters and FLOPs of a module, as all tools count them."""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, frozen ones included, buffers not."""
    return sum(param.numel() for param in module.parameters())


def count_flops(module: nn.Module, *inputs: Tensor) -> float:
    """Multiply-accumulates of all convolutions and matrix products in one forward pass without gradients.

    Half of what :class:`FlopCounterMode` counts, and the products of attention on a CPU, whose fused operator it does
    not know. On the meta device the count takes neither time nor memory.

    Args:
        module (nn.Module): What is called, as it is: evaluation mode, if wanted, is the caller's to set.
        *inputs (Tensor): Its arguments, on its device.

    Returns:
        float: Multiply-accumulates.
    """
    attention = getattr(torch.ops.aten, '_scaled_dot_product_flash_attention_for_cpu', None)  # torch 2.2 and later
    mapping = {} if attention is None else {attention: _attention_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        module(*inputs)
    return counter.get_total_flops() / 2


def _attention_flops(query: Tensor | torch.Size, key: Tensor | torch.Size, value: Tensor | torch.Size, *args: object,
                     **kwargs: object) -> int:
    """FLOPs of q kᵀ and of its product with v. PyTorch hands on shapes, before 2.2 the tensors themselves."""
    (*batch, rows, channels), (*_, columns, _), (*_, out_channels) = (
        getattr(x, 'shape', x) for x in (query, key, value))
    return 2 * math.prod((*batch, rows, columns, channels + out_channels))
