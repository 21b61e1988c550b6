"""Counts known beforehand, on every device, fused attention included."""
import pytest
import torch
from torch import nn

from convneur_mm.analysis import flops
from convneur_mm.models import NeuralMemory
from convneur_mm.models.global_branches.self_attention import MultiHeadAttention


def test_parameters():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    model[0].weight.requires_grad_(False)
    assert flops.count_parameters(model) == 3 * 5 + 5 + 5 + 5


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_convolutions_and_products(device):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2, groups=8),
                          nn.Flatten(2), nn.Linear(20, 6)).to(device)
    expected = 20 * (3 * 8 * 9 + 8 * 25) + 8 * 20 * 6
    assert flops.count_flops(model, torch.zeros(2, 3, 4, 5, device=device)) == 2 * expected


@pytest.mark.parametrize('device', ['cpu', 'meta'])
@pytest.mark.parametrize('head_dim', [4, 16])
def test_attention_is_counted_with_its_two_products(device, head_dim):
    """PyTorch's counter does not know the CPU's fused attention and counts nothing for it."""
    model = MultiHeadAttention(16, head_dim).to(device)
    assert flops.count_flops(model, torch.zeros(2, 9, 16, device=device)) == 2 * (4 * 9 * 16 * 16 + 2 * 9 * 9 * 16)


def test_attention_to_others_of_another_width():

    class Cross(nn.Module):

        def forward(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(q, k, v)

    for device in ('cpu', 'meta'):
        q, k, v = (torch.zeros(2, 3, n, d, device=device) for n, d in ((5, 8), (7, 8), (7, 4)))
        assert flops.count_flops(Cross(), q, k, v) == 2 * 3 * 5 * 7 * (8 + 4)


def test_the_memorys_inner_loop_counts_the_same_on_every_device():
    memory = NeuralMemory(32, chunk_size=10)
    counts = {flops.count_flops(memory.to(device), torch.zeros(1, 30, 32, device=device)) for device in ('cpu', 'meta')}
    assert len(counts) == 1 and counts.pop() > 4 * 30 * 32 * 32


def test_leaves_no_gradients_and_the_mode_alone():
    model = nn.Linear(2, 2).train()
    flops.count_flops(model, torch.zeros(1, 2))
    assert model.training and model.weight.grad is None


def test_norms_pooling_and_upsampling_are_counted_apart():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.LayerNorm(6), nn.AdaptiveAvgPool2d(2), nn.Upsample(scale_factor=2),
                          nn.Upsample(scale_factor=2, mode='bilinear')).eval().to('meta')
    _, macs, norms = flops.count_call(lambda: model(torch.zeros(1, 3, 4, 6, device='meta')))
    assert macs == 0 and norms == 2 * 72 + 5 * 72 + 72 + 48 + 4 * 192
