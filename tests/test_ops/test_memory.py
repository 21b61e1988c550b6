"""The memory around a set of kernels: the precision of the inner loop, and what PyTorch asks of operators."""
import warnings

import pytest
import torch

from convneur_mm.ops.neural_memory import LayerWeights, MemoryOptions, MemoryState
from convneur_mm.ops.neural_memory import memory as memory_module
from convneur_mm.ops.neural_memory.reference import neural_memory_reference
from convneur_mm.ops.neural_memory.types import MemoryWeights


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


@pytest.mark.usefixtures('nan_in_new_tensors')
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


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('backend', ['chunked', 'triton'])
def test_no_set_of_kernels_gets_half_precision(backend, dtype):
    """Neither tokens nor a memory, whatever a change of the code around them does."""
    tokens, rows, options = torch.zeros(1, 1, 16, 5), torch.zeros(1, 1, 16, 16), MemoryOptions()
    for given, name in ((tokens.to(dtype), rows), 'tokens'), ((tokens, rows.to(dtype)), 'memory'):
        with pytest.raises(ValueError, match=f'^the inner loop of a memory runs in float32 or float64, got {name} in '
                                             f'{dtype}$'):
            memory_module.kernels_for(backend, *given, options)


@pytest.mark.parametrize('field', MemoryState._fields)
def test_the_reference_gets_no_half_precision(field):
    _, _, q, k, v, *weights = tensors('memory')
    weights = MemoryWeights(*weights)
    state = MemoryState(*(w.detach().expand(2, *w.shape) for w in (weights.w1, weights.w2) * 2))
    with pytest.raises(ValueError, match=f'^the inner loop .* float64, got {field} in torch.bfloat16$'):
        neural_memory_reference(q, k, v, weights, state._replace(**{field: getattr(state, field).bfloat16()}),
                                MemoryOptions(20))
