"""Which layers may be done without being called, and 1×1 convolutions and linear layers as what is faster."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convneur_mm.models.plain import columns, has_forward_of, is_plain, pointwise, rows


class Scaled(nn.Linear):
    """Does something else with its weights."""

    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.Linear):
    """Does the same."""


class Borrowed(nn.Module):
    """Is none of them, but does as they do."""

    forward = nn.Linear.forward


@pytest.mark.parametrize('module, does', [
    (nn.Linear(2, 2), True), (Named(2, 2), True), (Scaled(2, 2), False), (Borrowed(), False), (nn.Identity(), False)])
def test_layers_that_do_as_a_linear_one(module, does):
    assert has_forward_of(module, nn.Linear) is does
    assert is_plain(module, nn.Linear) is does


@pytest.mark.parametrize('register', [
    'register_forward_hook', 'register_forward_pre_hook', 'register_full_backward_hook',
    'register_full_backward_pre_hook'])
def test_a_layer_with_a_hook_is_not_plain(register):
    layer = nn.Linear(2, 2)
    hook = getattr(layer, register)(lambda *_: None)
    assert has_forward_of(layer, nn.Linear) and not is_plain(layer, nn.Linear)
    hook.remove()
    assert is_plain(layer, nn.Linear)


@pytest.mark.parametrize('kind', ['linear', 'convolution', 'without a bias'])
@pytest.mark.parametrize('size', [(2, 5, 7), (1, 1, 1), (3, 1, 9)])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_pointwise_is_a_linear_map_of_the_channels(kind, size, dtype, tolerance):
    torch.manual_seed(0)
    batch, height, width = size
    layer = nn.Conv2d(6, 11, 1) if kind == 'convolution' else nn.Linear(6, 11, bias=kind == 'linear')
    layer = layer.to(dtype)
    x = torch.randn(batch, 6, height, width, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    wanted = torch.einsum('nchw,dc->ndhw', x, layer.weight.flatten(1))
    if layer.bias is not None:
        wanted = wanted + layer.bias[:, None, None]
    found, weights = pointwise(layer, x), [x, *layer.parameters()]
    grad = torch.randn_like(wanted)
    for a, b in zip([found, *torch.autograd.grad(found, weights, grad)],
                    [wanted, *torch.autograd.grad(wanted, weights, grad)]):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert found.permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize('name', ['columns', 'rows', 'rows with a bias'])
def test_products_of_columns_are_linear_maps(name):
    """Values and gradients, each alone, and second derivatives; without gradients in what is given, if it fits."""
    weight, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 5), (7,)))
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    given = (x, weight, bias) if 'bias' in name else (x, weight)

    def function(x, weight, bias=None):
        return columns(weight, x) if name == 'columns' else rows(x.mT.contiguous().mT, weight, bias)

    def expected(x, weight, bias=None):
        y = torch.einsum('bnc,mc->bnm', x, weight) + (0 if bias is None else bias)
        return y.mT if name == 'columns' else y

    torch.testing.assert_close(function(*given), expected(*given))
    grad = torch.randn_like(expected(*given))
    for wanted in given:
        alone = [z if z is wanted else z.detach() for z in given]
        torch.testing.assert_close(torch.autograd.grad(function(*alone), wanted, grad),
                                   torch.autograd.grad(expected(*given), wanted, grad))
    assert torch.autograd.gradgradcheck(function, given)
    with torch.no_grad():
        torch.testing.assert_close(function(*given), expected(*given))
        for length in 4, 9:
            out = torch.empty(3, 7, length, dtype=torch.float64)
            y = columns(weight, x, out)
            torch.testing.assert_close(y, torch.einsum('bnc,mc->bmn', x, weight))
            assert (y is out) is (length == 4)


def test_half_precision_under_autocast():
    layer, x = nn.Linear(6, 11), torch.randn(2, 6, 5, 5)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found, wanted = pointwise(layer, x), F.linear(x.permute(0, 2, 3, 1), layer.weight, layer.bias)
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found.permute(0, 2, 3, 1), wanted, rtol=2e-2, atol=2e-2)
