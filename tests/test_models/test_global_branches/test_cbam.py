"""CBAM against its equations, position by position."""
import math

import pytest
import torch

from convneur_mm.models.global_branches import CBAM


def make(channels: int) -> CBAM:
    cbam = CBAM(channels).double()
    for param in cbam.parameters():
        torch.nn.init.normal_(param, std=0.5)
    return cbam


def plain(cbam: CBAM, image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Eqs. 1 to 3 of an image of tokens (H·W, Cm), in Python numbers."""
    (w1, b1), (w2, b2) = ((cbam.mlp[i].weight.tolist(), cbam.mlp[i].bias.tolist()) for i in (0, 2))
    rows, channels = image.tolist(), len(w2)

    def mlp(values):
        hidden = [max(0.0, b + sum(w * v for w, v in zip(line, values))) for line, b in zip(w1, b1)]
        return [b + sum(w * v for w, v in zip(line, hidden)) for line, b in zip(w2, b2)]

    def sigmoid(value):
        return 1 / (1 + math.exp(-value))

    columns = list(zip(*rows))
    average, largest = mlp([sum(c) / len(c) for c in columns]), mlp([max(c) for c in columns])
    scale = [sigmoid(a + b) for a, b in zip(average, largest)]
    rows = [[value * s for value, s in zip(row, scale)] for row in rows]

    kernel, bias = cbam.conv.weight[0].tolist(), cbam.conv.bias.item()
    pooled = [[sum(row) / channels for row in rows], [max(row) for row in rows]]
    result = []
    for i in range(height):
        for j in range(width):
            total = bias
            for plane, weights in zip(pooled, kernel):
                for y in range(7):
                    for x in range(7):
                        a, b = i + y - 3, j + x - 3
                        if 0 <= a < height and 0 <= b < width:
                            total += weights[y][x] * plane[a * width + b]
            result.append([value * sigmoid(total) for value in rows[i * width + j]])
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize('channels, height, width', [(32, 9, 5), (8, 1, 3), (48, 2, 8)])
def test_equals_the_equations(channels, height, width):
    cbam = make(channels)
    x = torch.randn(2, height * width, channels, dtype=torch.float64)
    expected = torch.stack([plain(cbam, image, height, width) for image in x])
    torch.testing.assert_close(cbam.mix(x, (height, width)), expected, rtol=0, atol=1e-12)


def test_hidden_layer_is_a_sixteenth():
    assert [CBAM(channels).mlp[0].out_features for channels in (128, 80, 15)] == [8, 5, 1]


def test_a_symmetric_kernel_makes_it_equivariant_to_flips():
    """No branch but this one is built from convolutions and pooling alone."""
    cbam = make(16)
    with torch.no_grad():
        cbam.conv.weight.copy_((cbam.conv.weight + cbam.conv.weight.flip(3)) / 2)
    x = torch.randn(1, 4, 6, 16, dtype=torch.float64)
    flipped = cbam(x.flip(2).flatten(1, 2), (4, 6)).unflatten(1, (4, 6)).flip(2)
    torch.testing.assert_close(flipped, cbam(x.flatten(1, 2), (4, 6)).unflatten(1, (4, 6)), rtol=0, atol=1e-12)
