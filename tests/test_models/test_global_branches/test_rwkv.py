"""IR-RWKV: its recurrence token by token, its shift, and the block against its equations."""
import math

import pytest
import torch
import torch.nn.functional as F

from convneur_mm.models.global_branches import IRRWKV
from convneur_mm.models.global_branches.rwkv import bi_wkv, q_shift


def written_out(k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, bonus: torch.Tensor) -> torch.Tensor:
    """The definition: for every token and channel a weighted mean over all tokens."""
    batch, length, channels = k.shape
    result = torch.empty_like(v)
    for b in range(batch):
        for c in range(channels):
            for t in range(length):
                weights = [math.exp(k[b, i, c] + (bonus[c] if i == t else -(abs(t - i) - 1) * decay[c] / length))
                           for i in range(length)]
                result[b, t, c] = sum(w * v[b, i, c] for i, w in enumerate(weights)) / sum(weights)
    return result


def recurrence(k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, bonus: torch.Tensor) -> torch.Tensor:
    """The same as a state of two numbers a channel that goes over the tokens, once forwards and once backwards."""
    length = k.size(1)
    shrink = (-decay / length).exp()

    def sums(order):
        numerator = denominator = torch.zeros_like(k[:, 0])
        before = {}
        for t in order:
            before[t] = numerator, denominator
            numerator = shrink * numerator + k[:, t].exp() * v[:, t]
            denominator = shrink * denominator + k[:, t].exp()
        return before

    ahead, behind = sums(range(length)), sums(range(length - 1, -1, -1))
    outputs = []
    for t in range(length):
        own = (bonus + k[:, t]).exp()
        outputs.append((ahead[t][0] + behind[t][0] + own * v[:, t]) / (ahead[t][1] + behind[t][1] + own))
    return torch.stack(outputs, dim=1)


def draw(batch: int, length: int, channels: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    k, v = (torch.randn(batch, length, channels, dtype=dtype) for _ in range(2))
    return [k, v, 3 * torch.randn(channels, dtype=dtype), torch.randn(channels, dtype=dtype)]


@pytest.mark.parametrize('length', [1, 2, 3, 10])
def test_equals_the_definition(length):
    inputs = draw(2, length, 3)
    torch.testing.assert_close(bi_wkv(*inputs), written_out(*inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize('length', [1, 5, 196])
def test_equals_the_recurrence_over_tokens(length):
    inputs = [x.requires_grad_() for x in draw(2, length, 4)]
    fast, slow = bi_wkv(*inputs), recurrence(*inputs)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-11)
    direction = torch.randn_like(fast)
    grads = [torch.autograd.grad(y, inputs, direction, materialize_grads=True) for y in (fast, slow)]
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_gradients():
    assert torch.autograd.gradcheck(bi_wkv, [x.requires_grad_() for x in draw(1, 5, 2)])


def test_reversed_tokens_give_reversed_outputs():
    k, v, decay, bonus = draw(2, 11, 3)
    torch.testing.assert_close(bi_wkv(k.flip(1), v.flip(1), decay, bonus), bi_wkv(k, v, decay, bonus).flip(1),
                               rtol=0, atol=1e-12)


def test_keys_count_relative_to_each_other():
    k, v, decay, bonus = draw(1, 9, 3)
    torch.testing.assert_close(bi_wkv(k + 500, v, decay, bonus), bi_wkv(k, v, decay, bonus), rtol=0, atol=1e-11)


@pytest.mark.parametrize('decay', [-70.0, -20.0, 0.0, 20.0, 150.0])
@pytest.mark.parametrize('scale', [1.0, 10.0])
def test_long_sequences_in_single_precision(decay, scale):
    """A thousand tokens, strong decays and keys far apart: finite, and as exact as the sums themselves."""
    k, v, _, bonus = draw(1, 1000, 2)
    inputs = [scale * k, v, torch.full((2,), decay, dtype=torch.float64), bonus]
    expected = recurrence(*inputs)
    found = [x.float().requires_grad_() for x in inputs]
    y = bi_wkv(*found)
    assert y.dtype == torch.float32 and y.isfinite().all()
    y.sum().backward()
    assert all(x.grad.isfinite().all() for x in found)
    if abs(decay) <= 20:
        assert (y.double() - expected).norm() < 1e-5 * expected.norm()


def test_half_precision_is_computed_in_single():
    inputs = [x.bfloat16() for x in draw(1, 300, 2)]
    y = bi_wkv(*inputs)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, bi_wkv(*(x.float() for x in inputs)).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize('height, width, channels', [(3, 4, 8), (1, 1, 4), (2, 3, 7), (3, 2, 3)])
def test_shift(height, width, channels):
    x = torch.randn(2, height * width, channels)
    shifted = q_shift(x, (height, width)).unflatten(1, (height, width))
    maps, quarter = x.unflatten(1, (height, width)), channels // 4
    for i in range(height):
        for j in range(width):
            for c in range(channels):
                group = c // quarter if quarter else 4
                a, b = {0: (i, j - 1), 1: (i, j + 1), 2: (i - 1, j), 3: (i + 1, j)}.get(group, (i, j))
                inside = 0 <= a < height and 0 <= b < width
                expected = maps[:, a, b, c] if inside else torch.zeros(2)
                assert torch.equal(shifted[:, i, j, c], expected), (i, j, c)


def make(channels: int) -> IRRWKV:
    block = IRRWKV(channels).double()
    with torch.no_grad():
        for param in block.parameters():
            param.add_(0.5 * torch.randn_like(param))
    return block


def test_block_equals_its_equations():
    block, size = make(8), (3, 5)
    weights = {name: param.detach() for name, param in block.named_parameters()}

    def norm(x, name):
        mean = x.mean(-1, keepdim=True)
        scaled = (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * weights[f'{name}.weight'] + weights[f'{name}.bias']

    x = torch.randn(2, 15, 8, dtype=torch.float64)
    h = F.gelu(norm(x @ weights['pointwise1.weight'].T, 'norm1'))
    shifted = q_shift(h, size)
    parts = {}
    for name in ('receptance', 'key', 'value'):
        share = weights[f'spatial_mix.mix_{name}']
        parts[name] = (share * h + (1 - share) * shifted) @ weights[f'spatial_mix.{name}.weight'].T
    mean = written_out(parts['key'], parts['value'], weights['spatial_mix.decay'], weights['spatial_mix.bonus'])
    gated = parts['receptance'].sigmoid() * norm(mean, 'spatial_mix.norm')
    h = h + norm(gated @ weights['spatial_mix.output.weight'].T, 'norm2')
    local = torch.zeros(2, 3, 5, 8, dtype=torch.float64)
    padded = F.pad(h.unflatten(1, size), (0, 0, 2, 2, 2, 2))
    for i in range(5):
        for j in range(5):
            local += padded[:, i:i + 3, j:j + 5] * weights['depthwise_conv.weight'][:, 0, i, j]
    local = norm(local, 'norm3')
    h = h + (local * local.sigmoid()).flatten(1, 2)
    expected = x + h @ weights['pointwise2.weight'].T + weights['pointwise2.bias']
    torch.testing.assert_close(block.mix(x, size), expected, rtol=0, atol=1e-11)


def test_every_token_sees_the_whole_map():
    block = make(8)
    x = torch.randn(1, 30, 8, dtype=torch.float64, requires_grad=True)
    seen, = torch.autograd.grad(block(x, (5, 6))[0, 29].sum(), x)
    assert (seen[0].abs().sum(1) > 0).all()
