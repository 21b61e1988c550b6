"""The Triton backend against the float64 reference; test_triton.py runs this, in Triton's interpreter or on CUDA.

Not collected by itself, since Triton decides when it is imported whether it interprets its kernels.
"""
import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from convneur_mm.models import NeuralMemory
from convneur_mm.ops import MemoryState, UpdateGenerators, neural_memory
from convneur_mm.ops.neural_memory import triton as backend
from convneur_mm.ops.neural_memory import written_tokens
from convneur_mm.ops.neural_memory.reference import neural_memory_reference

sys.path.insert(0, str(Path(__file__).parent))
from test_op import RETRIEVALS, RULES, make_inputs, relative_error

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
NAMES = ('q', 'k', 'v', 'w1', 'w2', *UpdateGenerators._fields, *(f'state.{name}' for name in MemoryState._fields))


@pytest.fixture(params=['split', 'fused'])
def variant(request, monkeypatch):
    """Both variants, at a tile so small that few tokens take several and that several programs share a chunk."""
    monkeypatch.setattr(backend, 'TILE', 16)
    monkeypatch.setattr(backend, '_multiprocessors', lambda device: 4)
    monkeypatch.setattr(backend, '_use_fused', lambda *args: request.param == 'fused')
    return request.param


def make_tensors(batch=1, heads=2, tokens=50, d=16, e=8, dtypes=(torch.float32,) * 3, seed=0):
    """q, k, v, w1, w2, the generators and a state that differs from w1 and w2, all of them leaves."""
    inputs = [x.detach() for x in make_inputs(batch, heads, tokens, d, e, seed=seed)]
    g = torch.Generator().manual_seed(seed + 1)
    w1, w2 = inputs[3:5]
    state = [scale * torch.randn(batch, *w.shape, generator=g, dtype=torch.float64) + offset * w
             for w, scale, offset in ((w1, 0.1, 1), (w2, 0.1, 1), (w1, 0.05, 0), (w2, 0.05, 0))]
    dtypes = (*dtypes, *(torch.float32,) * 10)
    return [x.to(DEVICE, dtype).requires_grad_() for x, dtype in zip([*inputs, *state], dtypes)]


def call(function, tensors, **options):
    options = dict(dict(chunk_size=20, inner_step=0.9, max_write_norm=0.8, update_rule='sequential',
                        retrieve='previous', return_state=False), **options)
    q, k, v, w1, w2, *rest = tensors
    written = written_tokens(q.size(2), options['chunk_size'], options['retrieve'], options['return_state'])
    y, state = function(q, k[:, :, :written], v[:, :, :written], w1, w2, UpdateGenerators(*rest[:4]),
                        MemoryState(*rest[4:]), **options)
    return [y, *(state or ())]


def project(outputs):
    g = torch.Generator().manual_seed(1)
    return sum((x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x)).sum() for x in outputs)


def gradients(outputs, tensors):
    found = torch.autograd.grad(project(outputs), tensors, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(tensors, found)]


def doubled(tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def assert_close(found, expected, tolerance=1e-5):
    assert len(found) == len(expected)
    for name, a, b in zip(NAMES if len(found) == len(NAMES) else range(len(found)), found, expected):
        error = relative_error(a.double(), b) if b.norm() else a.norm().item()
        assert error <= tolerance, f'{name}: {error}'


def assert_equals_reference(tensors, tolerance=1e-5, **options):
    outputs = call(backend.neural_memory_triton, tensors, **options)
    twins = doubled(tensors)
    expected = call(neural_memory_reference, twins, **options)
    assert_close(outputs, expected, tolerance)
    assert_close(gradients(outputs, tensors), gradients(expected, twins), tolerance)


@pytest.mark.parametrize('retrieve, return_state', itertools.product(RETRIEVALS, (False, True)))
def test_sequential(variant, retrieve, return_state):
    assert_equals_reference(make_tensors(batch=2, tokens=41), retrieve=retrieve, return_state=return_state)


@pytest.mark.parametrize('retrieve, return_state', itertools.product(RETRIEVALS, (False, True)))
@pytest.mark.parametrize('variant', ['split'], indirect=True)
def test_parallel(variant, retrieve, return_state):
    assert_equals_reference(make_tensors(batch=2, tokens=41), update_rule='parallel', retrieve=retrieve,
                            return_state=return_state)


@pytest.mark.parametrize('tokens, chunk_size, return_state', [
    (40, 20, False),  # whole chunks
    (33, 33, True),   # one chunk
    (16, 20, False),  # N < L: nothing is written
    (3, 1, True),     # L = 1
    (1, 1, False),    # one token
])
def test_lengths(variant, tokens, chunk_size, return_state):
    assert_equals_reference(make_tensors(tokens=tokens), chunk_size=chunk_size, return_state=return_state)


@pytest.mark.parametrize('heads, d, e', [(3, 5, 3), (1, 20, 17)])
def test_widths(variant, heads, d, e, monkeypatch):
    monkeypatch.setattr(backend, 'BLOCK', 16)  # the generators' weights take several blocks, the last ones in part
    assert_equals_reference(make_tensors(heads=heads, d=d, e=e, tokens=24), return_state=True)


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('batch, heads, d, e', [(1, 1, 16, 8), (1, 1, 20, 8)])
def test_tiles_that_would_run(monkeypatch, fused, batch, heads, d, e):
    """Tiles and blocks as large as a GPU works with, 64 and 32 tokens; a chunk takes whole tiles and a ragged one."""
    monkeypatch.setattr(backend, '_use_fused', lambda *args: fused)
    assert backend._tile(backend._sizes(d, e)) == {16: 64, 20: 32}[d] and backend.BLOCK == 64
    assert_equals_reference(make_tensors(batch, heads, 150, d, e), chunk_size=70, return_state=True)


def test_checkpoint(variant):
    """The usual kind lets the backward unpack what it saved only once, and makes it anew for that."""
    tensors = make_tensors(tokens=25)
    expected = call(backend.neural_memory_triton, tensors, return_state=True)
    outputs = checkpoint(lambda *x: tuple(call(backend.neural_memory_triton, x, return_state=True)), *tensors,
                         use_reentrant=False)
    for a, b in zip([*outputs, *gradients(outputs, tensors)], [*expected, *gradients(expected, tensors)]):
        assert torch.equal(a, b)


@pytest.mark.parametrize('batch, tokens', [(0, 20), (2, 0)])
def test_nothing_to_read(batch, tokens):
    inputs = make_tensors(batch=batch, tokens=tokens)[:9]
    y, state = neural_memory(*inputs[:5], UpdateGenerators(*inputs[5:]), chunk_size=8, return_state=True,
                             backend='triton')
    assert y.shape == inputs[0].shape and torch.equal(state.w2, inputs[4].expand(batch, -1, -1, -1))
    assert all(torch.equal(g, torch.zeros_like(x)) for g, x in zip(torch.autograd.grad(y.sum(), inputs), inputs))


def test_layer(variant):
    """The module hands all of its options on: to the kernels as to the reference."""
    torch.manual_seed(0)
    layer = NeuralMemory(32, chunk_size=10, inner_step=0.9, max_write_norm=0.3, backend='triton').to(DEVICE)
    x = torch.randn(2, 25, 32, device=DEVICE)
    found = {}
    for name in ('triton', 'reference'):
        layer.backend = name
        y, state = layer(x, return_state=True)
        found[name] = [y, *state, *torch.autograd.grad(y.sin().sum(), list(layer.parameters()))]
    for a, b in zip(found['triton'], found['reference']):
        assert relative_error(a, b) <= 1e-5


def test_half_precision(variant):
    """Each of q, k and v in a dtype of its own, computed in float32; what has their dtype is rounded once."""
    dtypes = torch.float16, torch.bfloat16, torch.float16
    tensors = make_tensors(dtypes=dtypes)
    outputs = call(backend.neural_memory_triton, tensors, return_state=True)
    twins = doubled(tensors)
    expected = call(neural_memory_reference, twins, return_state=True)
    # The same gradient of y for both, or the reference's would not be rounded to half precision.
    for outs in (outputs, expected):
        outs[0] = outs[0].double()
    assert_close(outputs[:1], expected[:1], 2**-11)
    assert_close(outputs[1:], expected[1:])
    found, expected = gradients(outputs[1:], tensors), gradients(expected[1:], twins)
    assert [x.dtype for x in found[:3]] == list(dtypes)
    assert_close([found[1]], [expected[1]], 2**-8)
    assert_close([found[2]], [expected[2]], 2**-11)
    assert_close(found[3:], expected[3:])


def test_strides(variant):
    """Views of any strides in, the gradient of y included; y and the gradients lie in (B, N, h, d) order."""
    leaves = make_tensors(batch=2, tokens=41)
    q, k, v = leaves[:3]
    views = [q.transpose(1, 2).contiguous().transpose(1, 2), k.flip(3).transpose(2, 3).contiguous().transpose(2, 3),
             torch.stack((v, v), -1)[..., 0], *leaves[3:]]
    assert not any(x.is_contiguous() for x in views[:3])
    views = [x.detach().requires_grad_() for x in views]
    y, = call(backend.neural_memory_triton, views)
    found = torch.autograd.grad(y.sum(), views[:3])  # the gradient of a sum has strides of 0
    twins = doubled(views)
    expected, = call(neural_memory_reference, twins)
    assert_close([y, *found], [expected, *torch.autograd.grad(expected.sum(), twins[:3])])
    assert y.transpose(1, 2).is_contiguous()
    assert found[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('variant', ['split'], indirect=True)
def test_double_backward(variant, rule):
    """State and weights are one tensor here, as in a call that starts at M_0: it must not be counted twice."""
    def second_order(function, tensors):
        state = [w.expand(1, *w.shape) for w in tensors[3:5]] + tensors[11:13]
        outputs = call(function, [*tensors[:9], *state], update_rule=rule)
        first = torch.autograd.grad(project(outputs), tensors[:9], create_graph=True)
        return gradients([x for x in first if x is not None], tensors[:9])

    tensors = make_tensors(tokens=25)
    assert_close(second_order(backend.neural_memory_triton, tensors),
                 second_order(neural_memory_reference, doubled(tensors)))


@pytest.mark.parametrize('variant', ['split'], indirect=True)
def test_shared_weights(variant):
    """As in a call that starts at M_0: what is read and what is written from is the same parameter."""
    def gradient(function, tensors):
        state = [w.expand(1, *w.shape) for w in tensors[3:5]] + tensors[11:13]
        return gradients(call(function, [*tensors[:9], *state], update_rule='parallel'), tensors[:9])

    tensors = make_tensors(tokens=25)
    assert_close(gradient(backend.neural_memory_triton, tensors),
                 gradient(neural_memory_reference, doubled(tensors)))


def test_without_grad(variant):
    tensors = make_tensors(tokens=41)
    expected = call(backend.neural_memory_triton, tensors, return_state=True)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = call(backend.neural_memory_triton, tensors, return_state=True)
        assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(found, expected))


def test_backward_under_autocast(variant):
    tensors = make_tensors(tokens=25)
    expected = gradients(call(backend.neural_memory_triton, tensors), tensors)
    outputs = call(backend.neural_memory_triton, tensors)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = gradients(outputs, tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_large_values_stay_finite(variant):
    tensors = [(x.detach() * 1e3).requires_grad_() if i < 3 else x for i, x in enumerate(make_tensors(tokens=41))]
    outputs = call(backend.neural_memory_triton, tensors, return_state=True, max_write_norm=1.0)
    assert all(x.isfinite().all() for x in [*outputs, *gradients(outputs, tensors)])


def test_returned_state_may_change_in_place():
    tensors = make_tensors(tokens=20)
    expected = gradients(call(backend.neural_memory_triton, tensors, return_state=True)[:1], tensors)
    outputs = call(backend.neural_memory_triton, tensors, return_state=True)
    with torch.no_grad():
        for x in outputs[1:]:
            x.zero_()
    for a, b in zip(gradients(outputs[:1], tensors), expected):
        assert torch.equal(a, b)


def test_what_it_does_not_take():
    tensors = make_tensors(tokens=4)
    with pytest.raises(ValueError, match="backend 'triton' takes q of dtype float32, bfloat16 or float16, got .*64"):
        call(backend.neural_memory_triton, doubled(tensors))
    with pytest.raises(ValueError, match='takes heads of at most 64 channels and hidden units, got w1 of shape'):
        call(backend.neural_memory_triton, make_tensors(tokens=4, d=65))
