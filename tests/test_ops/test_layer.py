"""The layer's function: stored vectors, bad and empty inputs, sums in float32, and CUDA tensors.

How it chains, compiles and learns is tested with the module, tests/test_models/test_neural_memory.py.
"""
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from convneur_mm.ops.neural_memory import (
    RETRIEVALS,
    UPDATE_RULES,
    LayerWeights,
    MemoryOptions,
    MemoryState,
    neural_memory_layer,
)
from convneur_mm.ops.neural_memory import memory as memory_module

pytestmark = pytest.mark.usefixtures('both_codes')

VECTORS = Path(__file__).parents[1] / 'data' / 'neural_memory_layer.npz'
DEFAULTS = dict(eps=1e-6, chunk_size=8, inner_step=1.0, max_write_norm=1.0, update_rule='sequential',
                retrieve='previous', return_state=True)
STORED = [
    *(dict(update_rule=rule, retrieve=retrieve, inner_step=step)
      for rule, retrieve, step in product(UPDATE_RULES, RETRIEVALS, (1.0, 1e-3))),
    dict(max_write_norm=0.3), dict(max_write_norm=0.3, update_rule='parallel'), dict(chunk_size=5), dict(eps=0.1)]


def make_inputs(batch: int = 2, tokens: int = 21, heads: int = 2) -> tuple[Tensor, LayerWeights]:
    """Tokens and weights in float64, from a generator whose numbers NumPy promises to keep."""
    draw = np.random.RandomState(0).standard_normal
    channels = 16 * heads

    def tensor(*shape: int, std: float, mean: float = 0.0) -> Tensor:
        return torch.from_numpy(mean + std * draw(shape))

    shapes = ((4 * channels, channels), (4 * channels,), (3 * channels, 4 * channels), (3 * channels,))
    weights = LayerWeights(
        tensor(channels, std=0.1, mean=1), tensor(channels, std=0.1),
        *(tensor(channels, channels, std=std * channels**-0.5) for std in (1, 1, 4, 1)),  # values: to write much
        tensor(heads, 16, 8, std=0.25), tensor(heads, 8, 16, std=0.35),
        *(tensor(*shape, std=std) for shape, std in zip(shapes, (0.2, 0.1, 0.1, 0.5))))
    return tensor(batch, tokens, channels, std=2, mean=0.5), weights


def as_leaves(*tensors: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x in tensors]


def call(x: Tensor, weights: LayerWeights, backend: str = 'chunked', **options) -> tuple[Tensor, MemoryState | None]:
    return neural_memory_layer(x, weights, backend=backend, **{**DEFAULTS, **options})


def stored(y: Tensor, state: MemoryState) -> dict[str, Tensor]:
    """A fourth of the output's and of the state's numbers, from all of the tokens and heads."""
    return dict(y=y[..., ::4], **{name: x[..., ::4] for name, x in state._asdict().items()})


def write_vectors() -> None:
    """Made with the reference when it agreed, to 1e-10, with vectors of the equations' author."""
    found = {}
    for options in STORED:
        for name, x in stored(*call(*make_inputs(), 'reference', **options)).items():
            if name == 'y' or options.get('retrieve') != 'final':  # which reads the same state
                found[f'{options}.{name}'] = x.numpy()
    np.savez_compressed(VECTORS, **found)


@pytest.mark.parametrize('backend', ['reference', 'chunked'])
@pytest.mark.parametrize('options', STORED, ids=str)
def test_stored_vectors(backend, options):
    """They hold each option in place, which all backends could otherwise ignore together."""
    expected = np.load(VECTORS)
    found = stored(*call(*make_inputs(), backend, **options))
    names = [name for name in found if f'{options}.{name}' in expected]
    assert names == (['y'] if options.get('retrieve') == 'final' else ['y', 'w1', 'w2', 'p1', 'p2'])
    for name in names:
        assert (found[name] - torch.from_numpy(expected[f'{options}.{name}'])).abs().max() <= 1e-10


def test_stored_vectors_are_bounded():
    """Of each head's first write, which without a bound is the first chunk's momentum."""
    x, weights = make_inputs()
    _, state = call(x[:, :8], weights, 'reference', max_write_norm=1e12)
    assert (state.p1.square().sum((-2, -1)) + state.p2.square().sum((-2, -1))).sqrt().min() > 1


@pytest.mark.parametrize('backend', ['reference', 'chunked'])
def test_short_queries_are_not_stretched_to_unit_length(backend):
    """Below a length of 0.01 they keep a hundredfold of theirs; a memory of zeros returns them as they are."""
    x, weights = make_inputs(tokens=8)
    weights = weights._replace(query=weights.query * 1e-4, w1=torch.zeros_like(weights.w1))
    tokens = torch.nn.functional.layer_norm(x, (32,), weights.norm_weight, weights.norm_bias, 1e-6)
    queries = tokens @ weights.query.T
    assert queries.unflatten(-1, (2, 16)).norm(dim=-1).max() < 0.01
    expected = 100 * queries @ weights.proj.T
    found, _ = call(x, weights, backend, return_state=False)
    assert (found - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize('backend', ['reference', 'chunked'])
@pytest.mark.parametrize('batch, tokens', [(0, 21), (2, 0), (0, 0)])
def test_nothing_to_read(backend, batch, tokens):
    """As torch.nn's layers: an empty output, and gradients of zero for all parameters. The states are test_op.py's."""
    x, *weights = as_leaves(*make_inputs(batch, tokens)[:1], *make_inputs()[1])
    y, _ = call(x, LayerWeights(*weights), backend)
    assert y.shape == x.shape and y.dtype == x.dtype
    for gradient, tensor in zip(torch.autograd.grad(y.sum(), [x, *weights]), [x, *weights]):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize('batch, tokens', [(0, 21), (2, 0)])
def test_nothing_to_read_compiled(batch, tokens):
    def forward(x, *weights):
        return call(x, LayerWeights(*weights))

    inputs = as_leaves(*make_inputs(batch, tokens)[:1], *make_inputs()[1])
    y, state = torch.compile(forward, fullgraph=True, backend='aot_eager')(*inputs)
    assert y.shape == (batch, tokens, 32)
    assert all(torch.equal(g, torch.zeros_like(x)) for g, x in zip(torch.autograd.grad(y.sum(), inputs), inputs))
    assert torch.equal(state.w1, inputs[7].expand(batch, -1, -1, -1))


def test_tensors_that_do_not_fit_are_named():
    """As by the operator, whose tests go through all of them; float64 would be rounded, half precision is no loss."""
    x, weights = make_inputs()
    single = LayerWeights(*(w.float() for w in weights))
    state = call(x, weights)[1]
    for args, options, message in (
            ((x[..., :31], weights), {}, r'^x must have shape \(B, N, 32\), got \('),
            ((x[0], weights), {}, r'^x must have shape \(B, N, 32\), got \('),
            ((x, single), {}, '^x of dtype torch.float64 and norm_weight of dtype torch.float32 do'),
            ((x.float(), single._replace(w2=weights.w2)), {}, '^x of dtype torch.float32 and w2 of dtype'),
            ((x, weights), dict(state=state._replace(p2=state.p2[:1])), '^state.p2 must have shape'),
            ((x, weights), dict(chunk_size=0), 'chunk_size must be an integer of at least 1, got 0')):
        with pytest.raises(ValueError, match=message):
            call(*args, **options)
    exact, _ = call(x.bfloat16().float(), single)
    found, state = call(x.bfloat16(), single)
    assert torch.equal(found.float(), exact.to(found.dtype).float()) and state.w1.dtype == torch.float32


@pytest.mark.parametrize('segment_tokens', [1, 1000], ids='segment={}'.format)
def test_images_are_summed_in_float32(monkeypatch, segment_tokens):
    """Under autocast each image's gradients are products in half precision, and their sum is not rounded to that."""
    monkeypatch.setattr(memory_module, 'CPU_SEGMENT_TOKENS_TO_KEEP', segment_tokens)
    x, *weights = as_leaves(*make_inputs(batch=24)[:1], *make_inputs()[1], dtype=torch.float32)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).bfloat16()

    def gradients(images):
        with torch.autocast('cpu', dtype=torch.bfloat16):
            y, _ = call(x[images], LayerWeights(*weights), return_state=False)
        return torch.autograd.grad(y, weights, grad[images])

    together = gradients(slice(None))
    alone = [torch.stack(found).double().sum(0) for found in zip(*(gradients(slice(i, i + 1)) for i in range(24)))]
    for name in ('query', 'key', 'value', 'proj'):
        found, expected = (LayerWeights(*tensors)._asdict()[name] for tensors in (together, alone))
        # A sum in bfloat16 is wrong by 1.6e-3. Some numbers of a product are rounded up in one and down in the other.
        assert (found - expected).norm() < 4e-4 * expected.norm(), name


@pytest.mark.parametrize('rule', UPDATE_RULES)
@pytest.mark.parametrize('retrieve', RETRIEVALS)
@pytest.mark.parametrize('return_state', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_cuda_tensors_that_are_not_there(monkeypatch, rule, retrieve, return_state, dtype):
    """Neither tensors of the host nor their own numbers decide what is done with them: both would raise here.

    The backward is called by hand, as autograd would look for the device. 21 tokens are two segments, the last chunk a
    ragged one.
    """
    monkeypatch.setattr(memory_module, 'SEGMENT_TOKENS', 32)
    real = make_inputs()
    options = dict(DEFAULTS, update_rule=rule, retrieve=retrieve, return_state=return_state)
    inner = MemoryOptions(**{name: value for name, value in options.items() if name != 'eps'})
    settings = memory_module.Settings(True, options['eps'], dtype, 'chunked', inner)
    with FakeTensorMode(), torch.no_grad():
        x, *weights = (torch.empty(z.shape, device='cuda') for z in (real[0], *real[1]))
        rows = torch.empty(2, 2, 16, 16, device='cuda')
        weights = LayerWeights(*weights)
        y, state = call(x, weights, **options)
        call(x, weights, state=state, **options)
        tensors = rows, rows, x, *weights
        results = memory_module._forward(tensors, settings)
        grads = memory_module._backward(tensors, results[3:], results[:3], settings)
    assert [g.shape for g in grads] == [z.shape for z in tensors]
    assert y.device == grads[0].device == torch.device('cuda', 0)


if __name__ == '__main__':
    write_vectors()
