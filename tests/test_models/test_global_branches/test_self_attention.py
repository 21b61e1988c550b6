"""Self-attention against a softmax written out and PyTorch's own multi-head attention."""
import math

import pytest
import torch
from torch import nn

from convneur_mm.models.global_branches import SelfAttention
from convneur_mm.models.global_branches.self_attention import MultiHeadAttention


def make(channels: int, head_dim: int) -> MultiHeadAttention:
    attention = MultiHeadAttention(channels, head_dim).double()
    for param in attention.parameters():
        nn.init.normal_(param, std=0.5)
    return attention


@pytest.mark.parametrize('channels, head_dim', [(16, 16), (16, 4), (6, 3), (5, 1)])
def test_equals_softmax_written_out(channels, head_dim):
    attention = make(channels, head_dim)
    x = torch.randn(2, 7, channels, dtype=torch.float64)
    q, k, v = (x @ layer.weight.T for layer in (attention.query, attention.key, attention.value))
    expected = torch.empty_like(x)
    for b in range(2):
        for h in range(0, channels, head_dim):
            part = slice(h, h + head_dim)
            for i in range(7):
                scores = torch.stack([(q[b, i, part] * k[b, j, part]).sum() / math.sqrt(head_dim) for j in range(7)])
                shares = scores.exp() / scores.exp().sum()
                expected[b, i, part] = sum(shares[j] * v[b, j, part] for j in range(7))
    torch.testing.assert_close(attention(x), expected @ attention.output.weight.T, rtol=0, atol=1e-12)


def test_equals_pytorchs_multi_head_attention():
    attention = make(12, 4)
    peer = nn.MultiheadAttention(12, 3, bias=False, batch_first=True).double()
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([attention.query.weight, attention.key.weight, attention.value.weight]))
        peer.out_proj.weight.copy_(attention.output.weight)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(attention(x), peer(x, x, x)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize('count', [1, 5, 7])
def test_outputs_of_the_last_tokens(count):
    attention = make(8, 4)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(attention(x, count), attention(x)[:, -count:], rtol=0, atol=1e-12)


def test_branch_is_equivariant_to_any_order_of_the_positions():
    branch, order = SelfAttention(16, head_dim=8).double(), torch.randperm(12)
    branch.attention = make(16, 8)
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    y = branch(x, (3, 4))
    torch.testing.assert_close(branch(x[:, order], (3, 4)), y[:, order], rtol=0, atol=1e-12)
    torch.testing.assert_close(y, branch.proj(branch.attention(branch.norm(x))), rtol=0, atol=1e-12)


@pytest.mark.parametrize('head_dim', [0, -4, 2.0, True, '4'])
def test_bad_head_dim_is_named(head_dim):
    with pytest.raises(ValueError, match=f'head_dim must be an integer of at least 1, got {head_dim!r}'):
        SelfAttention(16, head_dim)


def test_heads_must_fit():
    with pytest.raises(ValueError, match='channels=20, head_dim=16'):
        SelfAttention(20)
