"""The memory as one operator: what PyTorch asks of operators."""
import warnings

import pytest
import torch

from convneur_mm.ops.neural_memory import LayerWeights, MemoryOptions
from convneur_mm.ops.neural_memory import memory as memory_module

pytestmark = pytest.mark.skipif(not memory_module.HAS_CUSTOM_OPS, reason='needs torch 2.4 or newer')


def tensors(form: str) -> list[torch.Tensor]:
    """All tensors of a call of 2 images, 25 tokens and 2 heads, leaves."""
    batch, tokens, heads, d, e = 2, 25, 2, 16, 8
    channels = heads * d
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (0.3 * torch.randn(shape, generator=g)).requires_grad_()

    rows = draw(batch, heads, 2 * e, d), draw(batch, heads, 2 * e, d)
    memory = (draw(heads, d, e), draw(heads, e, d), draw(4 * channels, channels), draw(4 * channels),
              draw(3 * channels, 4 * channels), draw(3 * channels))
    if form == 'layer':
        around = draw(channels), draw(channels), *(draw(channels, channels) for _ in range(4))
        return [*rows, draw(batch, tokens, channels), *LayerWeights(*around, *memory)]
    return [*rows, *(draw(batch, heads, tokens, d) for _ in range(3)), *memory]


@pytest.mark.parametrize('form, options', [
    ('layer', MemoryOptions(20)), ('layer', MemoryOptions(40)),
    ('memory', MemoryOptions(20, update_rule='parallel', retrieve='final', return_state=True))], ids=str)
def test_operator(form, options):
    """Its schema holds, and without numbers it has the shapes, strides and gradients that it has with them."""
    arguments = tensors(form), True, 1e-6, torch.float32, 'chunked', *options
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of PyTorch, about its own checks
        # Traced with sizes as symbols once, as that takes long.
        utils = 'test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic'
        torch.library.opcheck(memory_module.operator_forward, arguments,
                              test_utils=utils if form == 'layer' else utils[:3])


def test_schema_is_that_of_the_options():
    """An option that is added to the type reaches the operator by itself."""
    names = [argument.name for argument in torch.ops.convneur_mm.memory.default._schema.arguments]
    assert names[-len(MemoryOptions._fields):] == list(MemoryOptions._fields)
    assert torch.ops.convneur_mm.memory_backward.default._schema.arguments[-1].name == MemoryOptions._fields[-1]
