"""The non-local block against its sum over all positions."""
import pytest
import torch

from convneur_mm.models.global_branches import NonLocal


def make(channels: int) -> NonLocal:
    block = NonLocal(channels).double()
    for param in block.parameters():
        torch.nn.init.normal_(param, std=0.5)
    return block


@pytest.mark.parametrize('channels', [2, 7, 16])
def test_equals_the_sum_over_all_positions(channels):
    """y_i = Σ_j exp(θ_i·φ_j) g_j / Σ_j exp(θ_i·φ_j), unscaled, and z_i = W_z y_i + x_i."""
    block = make(channels)
    x = torch.randn(2, 12, channels, dtype=torch.float64)
    expected = torch.empty_like(x)
    for b, image in enumerate(x):
        theta, phi, g = (image @ layer.weight.T + layer.bias for layer in (block.theta, block.phi, block.g))
        for i, token in enumerate(image):
            affinities = [theta[i].dot(phi[j]).exp() for j in range(12)]
            y = sum(affinity * g[j] for j, affinity in enumerate(affinities)) / sum(affinities)
            expected[b, i] = block.output.weight.mv(y) + block.output.bias + token
    torch.testing.assert_close(block.mix(x, (3, 4)), expected, rtol=0, atol=1e-12)


def test_halves_the_channels():
    block = NonLocal(128)
    assert [layer.out_features for layer in (block.theta, block.phi, block.g)] == [64] * 3
    assert block.output.in_features == 64
    with pytest.raises(ValueError, match='channels must be at least 2.*got 1'):
        NonLocal(1)


def test_is_equivariant_to_any_order_of_the_positions():
    block, order = make(16), torch.randperm(12)
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    torch.testing.assert_close(block(x[:, order], (3, 4)), block(x, (3, 4))[:, order], rtol=0, atol=1e-12)
