"""Blocks of OverLoCK: merging, ContMix and its gradients, and the flow of the context prior."""
import pytest
import torch
from plain_overlock import Plain, randomised

from convneur_mm.models.overlock.blocks import BaseBlock, ChannelScale, DilatedRepConv, DynamicBlock, GRN2d


@pytest.mark.parametrize('kernel_size', [7, 13, 15, 17])
def test_a_merged_convolution_is_the_sum_of_its_branches(kernel_size):
    layer = randomised(DilatedRepConv(6, kernel_size)).double().eval()
    x = torch.randn(2, 6, 20, 23, dtype=torch.float64)
    expected = layer(x)
    layer.switch_to_deploy()
    assert set(layer.state_dict()) == {'lk_origin.weight', 'lk_origin.bias'}
    assert layer.lk_origin.weight.requires_grad and layer.lk_origin.weight.dtype == torch.float64
    torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-11)


def test_only_known_kernel_sizes():
    with pytest.raises(ValueError, match=r'kernel_size must be one of \(7, 13, 15, 17\), got 11'):
        DilatedRepConv(4, 11)


def test_gradients_of_contmix_equal_those_of_the_loop():
    block = randomised(DynamicBlock(16, 8, kernel_size=7, groups=2, first=True)).double().eval()
    plain = Plain({f'b.{name}': value for name, value in block.state_dict(keep_vars=True).items()}, [], [])
    x, fused = (torch.randn(2, channels, 7, 8, dtype=torch.float64, requires_grad=True) for channels in (16, 24))
    found, expected = block.mix(fused, x), plain.mix(x, fused, 'b', 7, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    inputs = [x, fused, *(getattr(block, name) for name in ('rpb1', 'rpb2')), block.weight_proj.weight,
              block.weight_query[0].weight, block.weight_key[1].weight]
    output = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(out, inputs, output) for out in (found, expected))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize('height, width', [(7, 7), (5, 8), (3, 2), (9, 4)])
def test_contmix_on_maps_of_any_size(height, width):
    """Maps smaller than the kernel are enlarged and the result is averaged back."""
    block = randomised(DynamicBlock(16, 8, kernel_size=7, groups=2, first=True)).double().eval()
    plain = Plain({f'b.{name}': value for name, value in block.state_dict().items()}, [], [])
    x, fused = (torch.randn(1, channels, height, width, dtype=torch.float64) for channels in (16, 24))
    with torch.no_grad():
        torch.testing.assert_close(block.mix(fused, x), plain.mix(x, fused, 'b', 7, 4), rtol=0, atol=1e-10)


def test_the_context_prior_is_renewed_from_the_initial_one():
    """P = α P' + β P_0: a later block is the first one with that sum as its context prior."""
    block = randomised(DynamicBlock(16, 8, kernel_size=7, groups=2, first=False)).double().eval()
    first = DynamicBlock(16, 8, kernel_size=7, groups=2, first=True).double().eval()
    first.load_state_dict({name: value for name, value in block.state_dict().items() if '_scale.' not in name})
    x, context, initial = (torch.randn(2, channels, 7, 7, dtype=torch.float64) for channels in (16, 8, 8))
    block.x_scale.bias.data.zero_(), block.h_scale.bias.data.zero_()
    renewed = block.x_scale.weight[:, 0] * context + block.h_scale.weight[:, 0] * initial
    torch.testing.assert_close(block(x, context, initial), first(x, renewed, torch.zeros_like(initial)))
    fresh = DynamicBlock(16, 8, kernel_size=7, groups=2, first=False)
    assert torch.equal(fresh.x_scale(context.float()), context.float())


def test_each_channel_has_its_scale_and_bias():
    layer = randomised(ChannelScale(5, init_value=1e-5))
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(layer(x), x * layer.weight[:, 0] + layer.bias.view(5, 1, 1))
    assert torch.equal(ChannelScale(5, init_value=0.5).weight, torch.full((5, 1, 1, 1), 0.5))


def test_grn_takes_its_statistics_in_float32():
    """In half precision the sum of squares of 1e3 would be infinite."""
    layer = randomised(GRN2d(4))
    x = 1e3 * torch.randn(2, 4, 16, 16)
    half = layer(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), layer(x), rtol=5e-3, atol=2.0)


def test_dropped_images_keep_the_residual_path_alone():
    block = BaseBlock(8, 7, scaled=True, drop_path_rate=0.5)
    x = torch.randn(64, 8, 7, 7)
    dropped = (block(x) - block.ls(block.dwconv(x))).flatten(1).abs().amax(1) == 0
    assert 16 < dropped.sum() < 48
