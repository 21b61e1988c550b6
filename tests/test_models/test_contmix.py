"""The weighted sums of ContMix, compared with a loop over positions."""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from convneur_mm.models.overlock.contmix import neighborhood_sum, relative_position_bias, window_starts


def plain_start(position: int, size: int, kernel_size: int) -> int:
    """The window around a position, shifted by as much as it would stand out."""
    start = position - kernel_size // 2
    return max(start, 0) if start + kernel_size <= size else size - kernel_size


def plain_sum(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    height, width, kernel_size = weights.shape[2:5]
    rows = []
    for h in range(height):
        row = []
        for w in range(width):
            top, left = plain_start(h, height, kernel_size), plain_start(w, width, kernel_size)
            window = values[:, :, top:top + kernel_size, left:left + kernel_size]
            row.append((weights[:, :, h, w, ..., None] * window).sum((2, 3)))
        rows.append(torch.stack(row, dim=2))
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize('height, width, kernel_size', [(7, 7, 7), (9, 8, 5), (7, 12, 7), (3, 3, 3), (14, 15, 13)])
def test_equals_a_loop_over_positions(height, width, kernel_size):
    weights = torch.randn(2, 2, height, width, kernel_size, kernel_size, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 2, height, width, 3, dtype=torch.float64, requires_grad=True)
    seen, expected = neighborhood_sum(weights, values), plain_sum(weights, values)
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(neighborhood_sum(weights, values), expected, rtol=0, atol=1e-10)
    output = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(out, (weights, values), output) for out in (seen, expected))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize('trained', ['weights', 'values'])
def test_gradient_of_one_input_alone(trained):
    tensors = dict(weights=torch.randn(1, 1, 5, 6, 3, 3), values=torch.randn(1, 1, 5, 6, 2))
    tensors[trained].requires_grad_()
    found, = torch.autograd.grad(neighborhood_sum(**tensors).square().sum(), tensors[trained])
    expected, = torch.autograd.grad(plain_sum(**tensors).square().sum(), tensors[trained])
    torch.testing.assert_close(found, expected)


def test_neighbourhoods_at_the_border_are_shifted_inwards():
    assert window_starts(7, 5).tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert window_starts(5, 5).tolist() == [0] * 5


def test_a_map_smaller_than_a_neighbourhood_is_refused():
    with pytest.raises(ValueError, match='5 x 5, got a side of 4'):
        neighborhood_sum(torch.zeros(1, 1, 6, 4, 5, 5), torch.zeros(1, 1, 6, 4, 2))


def test_the_bias_depends_on_the_offset_alone():
    height, width, kernel_size = 6, 8, 5
    table = torch.randn(2, 2 * kernel_size - 1, 2 * kernel_size - 1)
    bias = relative_position_bias(table, height, width)
    assert bias.shape == (2, height, width, kernel_size, kernel_size)
    for h in range(height):
        for w in range(width):
            top, left = plain_start(h, height, kernel_size), plain_start(w, width, kernel_size)
            for i in range(kernel_size):
                for j in range(kernel_size):
                    down, right = top + i - h, left + j - w
                    expected = table[:, down + kernel_size - 1, right + kernel_size - 1]
                    assert torch.equal(bias[:, h, w, i, j], expected)


def test_cost_is_that_of_a_plain_product():
    weights, values = torch.zeros(2, 3, 9, 8, 5, 5, device='meta'), torch.zeros(2, 3, 9, 8, 4, device='meta')
    with FlopCounterMode(display=False) as counter:
        neighborhood_sum(weights, values)
    assert counter.get_total_flops() == 2 * weights.numel() * values.size(-1)


def test_training_holds_no_copy_of_the_neighbourhoods():
    """What is saved for the backward pass is the weights and the values, in the memory where they are anyway."""
    weights = torch.randn(1, 2, 9, 9, 7, 7, requires_grad=True)
    values = torch.randn(1, 2, 9, 9, 4, requires_grad=True)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = neighborhood_sum(weights, values)
    own = {tensor.untyped_storage().data_ptr() for tensor in (weights, values)}
    assert sum(size for pointer, size in saved.items() if pointer not in own) < values.nbytes
    out.sum().backward()
    assert values.grad.any() and weights.grad.any()
