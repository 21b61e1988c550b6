"""The spatially varying convolution of ContMix: each position weights its own K × K neighbourhood."""
from __future__ import annotations

import torch
import torch.utils.checkpoint as cp
from torch import Tensor


def window_starts(size: int, kernel_size: int, device: torch.device | None = None) -> Tensor:
    """Return the first position of each position's window on one axis; windows at the border are shifted inwards.

    Args:
        size (int): Length of the axis, at least ``kernel_size``.
        kernel_size (int): Length of a window, K, odd.
        device (torch.device | None): Device of the result. Defaults to None.

    Returns:
        Tensor: (size,), int64, from 0 to ``size - kernel_size``.

    Raises:
        ValueError: If a window is longer than the axis.
    """
    if size < kernel_size:
        raise ValueError(f'a map must be at least as large as its neighbourhoods of {kernel_size} x {kernel_size}, '
                         f'got a side of {size}')
    return (torch.arange(size, device=device) - kernel_size // 2).clamp(0, size - kernel_size)


def relative_position_bias(table: Tensor, height: int, width: int) -> Tensor:
    """Look up a bias for each position and each of its neighbours by their offset.

    Args:
        table (Tensor): (g, 2K - 1, 2K - 1), for the offsets from -(K - 1) to K - 1 in rows and columns.
        height (int): Height of the map.
        width (int): Width of the map.

    Returns:
        Tensor: (g, height, width, K, K), of the dtype of ``table``.
    """
    kernel_size = (table.size(1) + 1) // 2

    def indices(size: int) -> Tensor:
        positions = torch.arange(size, device=table.device)
        neighbours = torch.arange(kernel_size, device=table.device)
        first = window_starts(size, kernel_size, table.device) - positions + kernel_size - 1
        return first[:, None] + neighbours  # (size, K)

    rows, columns = indices(height), indices(width)
    return table[:, rows[:, None, :, None], columns[None, :, None, :]]


def neighborhood_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Compute the weighted sum of the values in each position's neighbourhood.

    The neighbourhoods are copied one kernel row at a time, and again in the backward pass, so that only K times the
    values are in memory at once. A single product over whole neighbourhoods would need K² times the values, and keep
    them for the backward pass.

    Args:
        weights (Tensor): (B, g, H, W, K, K), with H and W at least K.
        values (Tensor): (B, g, H, W, c), of the same dtype.

    Returns:
        Tensor: (B, g, H, W, c). Position (h, w) sums over K rows from ``window_starts(H, K)[h]`` and K columns from
        ``window_starts(W, K)[w]``.

    Raises:
        ValueError: If the map is smaller than a neighbourhood.
    """
    height, width, kernel_size = weights.shape[2:5]
    rows = window_starts(height, kernel_size, values.device)
    columns = window_starts(width, kernel_size, values.device)
    total = None
    for i, row_weights in enumerate(weights.unbind(4)):
        if torch.is_grad_enabled() and (weights.requires_grad or values.requires_grad):
            part = cp.checkpoint(_row_sum, row_weights, values, rows + i, columns, use_reentrant=False,
                                 preserve_rng_state=False)
        else:
            part = _row_sum(row_weights, values, rows + i, columns)
        total = part if total is None else total + part
    return total


def _row_sum(weights: Tensor, values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute the weighted sum of K neighbours in one row.

    Args:
        weights (Tensor): (B, g, H, W, K).
        values (Tensor): (B, g, H, W, c).
        rows (Tensor): (H,), for each position's row, the row of its neighbours.
        columns (Tensor): (W,), for each position's column, the first of its K neighbours.
    """
    windows = values.index_select(2, rows).unfold(3, weights.size(-1), 1)  # (B, g, H, W - K + 1, c, K), a view
    return torch.matmul(windows.index_select(3, columns), weights.unsqueeze(-1)).squeeze(-1)
