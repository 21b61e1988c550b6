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
from convneur_mm.ops.neural_memory import MemoryState, UpdateGenerators, neural_memory, pytorch
from convneur_mm.ops.neural_memory import triton as backend

sys.path.insert(0, str(Path(__file__).parent))
from test_op import CHANGES, RETRIEVALS, RULES, make_inputs, relative_error

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
NAMES = ('q', 'k', 'v', 'w1', 'w2', *UpdateGenerators._fields, *(f'state.{name}' for name in MemoryState._fields))


@pytest.fixture(autouse=True)
def nan_in_new_tensors():
    """As PyTorch fills the memory it hands out in its deterministic mode, which on CUDA refuses cuBLAS' products."""
    torch.use_deterministic_algorithms(DEVICE == 'cpu')


@pytest.fixture
def small_tiles(monkeypatch):
    """Few tokens take several tiles, and several programs share a chunk."""
    monkeypatch.setattr(backend, 'TILE', 16)
    monkeypatch.setattr(backend, '_multiprocessors', lambda device: 4)


def make_tensors(batch=1, heads=2, tokens=50, d=16, e=8, dtypes=(torch.float32,) * 3, seed=0):
    """q, k, v, w1, w2, the generators and a state that differs from w1 and w2, all of them leaves."""
    inputs = [x.detach() for x in make_inputs(batch, heads, tokens, d, e, seed=seed)]
    g = torch.Generator().manual_seed(seed + 1)
    w1, w2 = inputs[3:5]
    state = [scale * torch.randn(batch, *w.shape, generator=g, dtype=torch.float64) + offset * w
             for w, scale, offset in ((w1, 0.1, 1), (w2, 0.1, 1), (w1, 0.05, 0), (w2, 0.05, 0))]
    dtypes = (*dtypes, *(torch.float32,) * 10)
    return [x.to(DEVICE, dtype).requires_grad_() for x, dtype in zip([*inputs, *state], dtypes)]


def call(name, tensors, **options):
    """Reads and state of the backend called ``name``."""
    options = {**dict(chunk_size=20, inner_step=0.9, max_write_norm=0.8), **options}
    y, state = neural_memory(*tensors[:5], UpdateGenerators(*tensors[5:9]), state=MemoryState(*tensors[9:]),
                             backend=name, **options)
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
    outputs = call('triton', tensors, **options)
    twins = doubled(tensors)
    expected = call('reference', twins, **options)
    assert_close(outputs, expected, tolerance)
    assert_close(gradients(outputs, tensors), gradients(expected, twins), tolerance)


@pytest.mark.parametrize('rule, retrieve, return_state', itertools.product(RULES, RETRIEVALS, (False, True)))
def test_equals_reference(small_tiles, rule, retrieve, return_state):
    assert_equals_reference(make_tensors(batch=2, tokens=25), update_rule=rule, retrieve=retrieve,
                            return_state=return_state)


@pytest.mark.parametrize('changed', CHANGES, ids=str)
def test_options(small_tiles, changed):
    assert_equals_reference(make_tensors(tokens=41), **changed)


@pytest.mark.parametrize('tokens, chunk_size, return_state', [
    (40, 20, False),  # whole chunks
    (33, 33, True),   # one chunk
    (16, 20, False),  # N < L: nothing is written
    (3, 1, True),     # L = 1
    (1, 1, False),    # one token
])
@pytest.mark.parametrize('rule', RULES)
def test_lengths(small_tiles, rule, tokens, chunk_size, return_state):
    assert_equals_reference(make_tensors(tokens=tokens), chunk_size=chunk_size, return_state=return_state,
                            update_rule=rule)


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('heads, d, e', [(3, 5, 3), (1, 20, 17)])
def test_widths(small_tiles, rule, heads, d, e):
    assert_equals_reference(make_tensors(heads=heads, d=d, e=e, tokens=24), return_state=True, update_rule=rule)


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('batch, heads, d, e', [(1, 1, 16, 8), (1, 1, 20, 8)])
def test_tiles_that_would_run(rule, batch, heads, d, e):
    """Tiles as large as a GPU works with, 64 and 32 tokens; a chunk takes whole tiles and a ragged one."""
    assert backend.tile_of(16 if d == 16 else 32) == {16: 64, 20: 32}[d]
    assert_equals_reference(make_tensors(batch, heads, 150, d, e), chunk_size=70, return_state=True, update_rule=rule)


@pytest.mark.parametrize('rule', RULES)
def test_checkpoint(small_tiles, rule):
    """The usual kind lets the backward unpack what it saved only once, and makes it anew for that."""
    tensors, options = make_tensors(tokens=25), dict(update_rule=rule, return_state=True)
    expected = call('triton', tensors, **options)
    outputs = checkpoint(lambda *x: tuple(call('triton', x, **options)), *tensors, use_reentrant=False)
    for a, b in zip([*outputs, *gradients(outputs, tensors)], [*expected, *gradients(expected, tensors)]):
        assert torch.equal(a, b)


@pytest.mark.parametrize('batch, tokens', [(0, 20), (2, 0)])
def test_nothing_to_read(batch, tokens):
    inputs = make_tensors(batch=batch, tokens=tokens)[:9]
    y, state = neural_memory(*inputs[:5], UpdateGenerators(*inputs[5:]), chunk_size=8, return_state=True,
                             backend='triton')
    assert y.shape == inputs[0].shape and torch.equal(state.w2, inputs[4].expand(batch, -1, -1, -1))
    assert all(torch.equal(g, torch.zeros_like(x)) for g, x in zip(torch.autograd.grad(y.sum(), inputs), inputs))


def test_layer(small_tiles):
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


def test_half_precision(small_tiles):
    """Each of q, k and v in a dtype of its own, computed in float32; what has their dtype is rounded once."""
    dtypes = torch.float16, torch.bfloat16, torch.float16
    tensors = make_tensors(dtypes=dtypes)
    outputs = call('triton', tensors, return_state=True)
    twins = doubled(tensors)
    expected = call('reference', twins, return_state=True)
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


@pytest.mark.parametrize('name', ['surprise', 'surprise_backward', 'read', 'read_backward'])
def test_operators_equal_pytorch(small_tiles, name):
    """With normalised tokens, some of them short, and the curvature bound and its gradient."""
    from test_memory import arguments
    given = [x.float().to(DEVICE) if torch.is_tensor(x) else x for x in arguments(name)]
    found = {}
    for module in (backend, pytorch):
        copies = [x.clone() if torch.is_tensor(x) else x for x in given]
        outputs = getattr(module, name)(*copies)
        found[module] = [*(outputs if isinstance(outputs, tuple) else (outputs,)), *filter(torch.is_tensor, copies)]
    assert_close(found[backend], [x.double() for x in found[pytorch]])


def test_precision(small_tiles, monkeypatch):
    """The interpreter multiplies alike; a name that tl.dot does not know is named."""
    monkeypatch.setenv('CONVNEUR_MEMORY_PRECISION', 'tf32x3')
    assert_equals_reference(make_tensors(tokens=41))
    monkeypatch.setenv('CONVNEUR_MEMORY_PRECISION', 'tf32')
    with pytest.raises(ValueError, match="CONVNEUR_MEMORY_PRECISION must be one of .*, got 'tf32'"):
        call('triton', make_tensors(tokens=41))


def test_strides(small_tiles):
    """Views of any strides in, the gradient of y included."""
    leaves = make_tensors(batch=2, tokens=41)
    q, k, v = leaves[:3]
    views = [q.transpose(1, 2).contiguous().transpose(1, 2), k.flip(3).transpose(2, 3).contiguous().transpose(2, 3),
             torch.stack((v, v), -1)[..., 0], *leaves[3:]]
    assert not any(x.is_contiguous() for x in views[:3])
    views = [x.detach().requires_grad_() for x in views]
    y, = call('triton', views)
    found = torch.autograd.grad(y.sum(), views[:3])  # the gradient of a sum has strides of 0
    twins = doubled(views)
    expected, = call('reference', twins)
    assert_close([y, *found], [expected, *torch.autograd.grad(expected.sum(), twins[:3])])


@pytest.mark.parametrize('rule', RULES)
def test_double_backward(small_tiles, rule):
    """State and weights are one tensor here, as in a call that starts at M_0: it must not be counted twice."""
    def second_order(function, tensors):
        state = [w.expand(1, *w.shape) for w in tensors[3:5]] + tensors[11:13]
        outputs = call(function, [*tensors[:9], *state], update_rule=rule)
        first = torch.autograd.grad(project(outputs), tensors[:9], create_graph=True)
        return gradients([x for x in first if x is not None], tensors[:9])

    tensors = make_tensors(tokens=25)
    assert_close(second_order('triton', tensors),
                 second_order('reference', doubled(tensors)))


def test_shared_weights(small_tiles):
    """As in a call that starts at M_0: what is read and what is written from is the same parameter."""
    def gradient(function, tensors):
        state = [w.expand(1, *w.shape) for w in tensors[3:5]] + tensors[11:13]
        return gradients(call(function, [*tensors[:9], *state], update_rule='parallel'), tensors[:9])

    tensors = make_tensors(tokens=25)
    assert_close(gradient('triton', tensors),
                 gradient('reference', doubled(tensors)))


def test_without_grad(small_tiles):
    tensors = make_tensors(tokens=41)
    expected = call('triton', tensors, return_state=True)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = call('triton', tensors, return_state=True)
        assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(found, expected))


def test_backward_under_autocast(small_tiles):
    tensors = make_tensors(tokens=25)
    expected = gradients(call('triton', tensors), tensors)
    outputs = call('triton', tensors)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = gradients(outputs, tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_large_values_stay_finite(small_tiles):
    tensors = [(x.detach() * 1e3).requires_grad_() if i < 3 else x for i, x in enumerate(make_tensors(tokens=41))]
    outputs = call('triton', tensors, return_state=True, max_write_norm=1.0)
    assert all(x.isfinite().all() for x in [*outputs, *gradients(outputs, tensors)])


def test_returned_state_may_change_in_place():
    tensors = make_tensors(tokens=20)
    expected = gradients(call('triton', tensors, return_state=True)[:1], tensors)
    outputs = call('triton', tensors, return_state=True)
    with torch.no_grad():
        for x in outputs[1:]:
            x.zero_()
    for a, b in zip(gradients(outputs[:1], tensors), expected):
        assert torch.equal(a, b)


def test_what_it_does_not_take():
    tensors = make_tensors(tokens=4)
    with pytest.raises(ValueError, match="backend 'triton' takes memories in float32, got torch.float64"):
        call('triton', doubled(tensors))
    with pytest.raises(ValueError, match='takes heads of at most 64 channels and hidden units, got 65 and 8'):
        call('triton', make_tensors(tokens=4, d=65))
