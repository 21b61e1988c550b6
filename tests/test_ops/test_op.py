"""The op: fast path against reference against stored vectors, gradients, chaining, causality, extremes."""
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convneur_mm.ops.neural_memory import (
    MemoryOptions,
    MemoryState,
    UpdateGenerators,
    neural_memory,
    written_tokens,
)
from convneur_mm.ops.neural_memory.memory import begin, write_all
from convneur_mm.ops.neural_memory.op import resolve_backend
from convneur_mm.ops.neural_memory.operators import implementation
from convneur_mm.ops.neural_memory.reference import curvature, read
from convneur_mm.ops.neural_memory.types import MIN_WRITE_NORM

pytestmark = pytest.mark.usefixtures('both_codes')

RULES = ('sequential', 'parallel')
RETRIEVALS = ('previous', 'final')
# Of each option, for every implementation.
CHANGES = (dict(chunk_size=12), dict(inner_step=0.9), dict(max_write_norm=0.9), dict(update_rule='parallel'),
           dict(retrieve='final'), dict(qk_norm_eps=2.0), dict(step_normalization=0.25))
VECTORS = Path(__file__).parents[1] / 'data' / 'neural_memory.npz'


def make_inputs(batch=2, heads=2, tokens=50, d=16, e=8, dtype=torch.float64, seed=0, scale=1.0, normalize=True):
    """Tensors of :func:`neural_memory` that write more than the default bound, all of them leaves."""
    g = torch.Generator().manual_seed(seed)
    channels = heads * d

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * std

    q, k, v = (draw(batch, heads, tokens, d, std=std * scale) for std in (1, 1, 3))
    if normalize:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    w1, w2 = draw(heads, d, e, std=d**-0.5), draw(heads, e, d, std=e**-0.5)
    out_bias = draw(3 * channels, std=0.1) + torch.tensor([-2.0, 0.0, -4.0], dtype=torch.float64).repeat_interleave(
        channels)
    generators = (draw(4 * channels, channels, std=channels**-0.5), draw(4 * channels, std=0.1),
                  draw(3 * channels, 4 * channels, std=channels**-0.5), out_bias)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, w1, w2, *generators)]


def call(inputs, **kwargs):
    return neural_memory(*inputs[:5], UpdateGenerators(*inputs[5:9]), **kwargs)


def write_norms(inputs, tokens: int, inner_step: float = 1.0) -> Tensor:
    """Norms of the first chunk's writes before they are bounded, (B, h): those of the momentum without a bound."""
    _, state = call([x[:, :, :tokens] for x in inputs[:3]] + inputs[3:], chunk_size=tokens, inner_step=inner_step,
                    max_write_norm=1e12, return_state=True, backend='reference')
    return (state.p1.square().sum((-2, -1)) + state.p2.square().sum((-2, -1))).sqrt().detach()


def with_gradients(inputs, loss_scale: float = 1.0, **kwargs):
    """Outputs, state and the gradients of a random projection of both."""
    y, state = call(inputs, **kwargs)
    outputs = [y, *(state or ())]
    g = torch.Generator().manual_seed(1)
    loss = loss_scale * sum((o * torch.randn(o.shape, generator=g, dtype=torch.float64).to(o)).sum() for o in outputs)
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    return outputs, [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, gradients)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def assert_equal(found, expected, tolerance=1e-10):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if b.norm() == 0:
            assert a.norm() == 0, i
        else:
            assert relative_error(a, b) <= tolerance, i


@pytest.mark.parametrize('backend', ['reference', 'auto'])
def test_stored_vectors(backend):
    """Vectors that the reference made when it agreed with the equations' author; they hold the equations in place."""
    data = {name: torch.from_numpy(value) for name, value in np.load(VECTORS).items()}
    tensors = [data[name] for name in ('q', 'k', 'v', 'w1', 'w2')]
    generators = UpdateGenerators(*(data[f'generators_{name}'] for name in UpdateGenerators._fields))
    for rule, retrieve, step in product(RULES, RETRIEVALS, (1.0, 1e-3)):
        y, state = neural_memory(*tensors, generators, chunk_size=8, inner_step=step, update_rule=rule,
                                 retrieve=retrieve, return_state=True, backend=backend)
        name = f'{rule}_{retrieve}_{step}'
        assert (y - data[f'y_{name}']).abs().max() <= 1e-10
        for field in MemoryState._fields:
            assert (getattr(state, field) - data[f'{field}_{rule}_{step}']).abs().max() <= 1e-10


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('retrieve', RETRIEVALS)
@pytest.mark.parametrize('return_state', [False, True])
@pytest.mark.parametrize('tokens, chunk_size', [
    (50, 16),  # ragged last chunk
    (48, 16),  # whole chunks
    (16, 16),  # one chunk, T = 1
    (5, 16),   # N < L
    (7, 1),    # L = 1
    (1, 1),    # one token
    (17, 16),  # last chunk of one token
])
def test_fast_equals_reference(rule, retrieve, return_state, tokens, chunk_size):
    inputs = make_inputs(tokens=tokens)
    if tokens >= 16:
        assert write_norms(inputs, 16).min() > 1  # the bound of 1 is active
    options = dict(chunk_size=chunk_size, update_rule=rule, retrieve=retrieve, return_state=return_state)
    expected, expected_gradients = with_gradients(inputs, backend='reference', **options)
    found, found_gradients = with_gradients(inputs, backend='auto', **options)
    assert len(found) == (5 if return_state else 1)
    assert_equal(found, expected)
    assert_equal(found_gradients, expected_gradients)


@pytest.mark.usefixtures('nan_in_new_tensors')
@pytest.mark.parametrize('rule, retrieve', product(RULES, RETRIEVALS))
@pytest.mark.parametrize('tokens, chunk_size', [(50, 16), (5, 16)])
def test_nothing_is_read_before_it_is_written(rule, retrieve, tokens, chunk_size):
    options = dict(chunk_size=chunk_size, update_rule=rule, retrieve=retrieve, return_state=True, backend='auto')
    for dtype in torch.float32, torch.float64:
        outputs, gradients = with_gradients(make_inputs(tokens=tokens, dtype=dtype), **options)
        assert all(x.isfinite().all() for x in (*outputs, *gradients))
        # Nor does what is kept for the backward hold any of it: two runs would differ.
        q, k, v, w1, w2, *weights = (x.detach() for x in make_inputs(tokens=tokens, dtype=dtype))
        *kept, _ = write_all(torch.stack((q.mT, k.mT, v.mT), 1), *begin(2, w1, w2, None), UpdateGenerators(*weights),
                         MemoryOptions(chunk_size, update_rule=rule), implementation(resolve_backend('auto'), w1.mT))
        assert all(x.isfinite().all() for chunk in kept for x in chunk)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3), heads=st.integers(1, 3), tokens=st.integers(0, 40), chunk_size=st.integers(1, 45),
    sizes=st.sampled_from([(16, 8), (16, 8), (1, 1), (3, 5), (9, 4), (16, 4)]), rule=st.sampled_from(RULES),
    retrieve=st.sampled_from(RETRIEVALS), inner_step=st.sampled_from([0.0, 1e-3, 0.5, 1.0]),
    max_write_norm=st.sampled_from([0.01, 1.0, 100.0]), return_state=st.booleans(), seed=st.integers(0, 99))
def test_fast_equals_reference_everywhere(batch, heads, tokens, sizes, seed, rule, **options):
    inputs = make_inputs(batch, heads, tokens, *sizes, seed=seed)
    options['update_rule'] = rule
    expected, expected_gradients = with_gradients(inputs, backend='reference', **options)
    found, found_gradients = with_gradients(inputs, backend='auto', **options)
    assert_equal(found, expected)
    # The gradient of one channel or token can vanish but for rounding, so all of them are measured together.
    assert_equal([torch.cat([g.flatten() for g in found_gradients])],
                 [torch.cat([g.flatten() for g in expected_gradients])])


@pytest.mark.parametrize('changed', CHANGES, ids=str)
def test_every_option_changes_the_result(changed):
    """Outputs, state and gradients; and the reference follows."""
    inputs, options = make_inputs(tokens=50), dict(chunk_size=16, return_state=True)
    assert write_norms(inputs, 16).min() > 1
    (y, *_), gradients = with_gradients(inputs, backend='auto', **options)
    found, found_gradients = with_gradients(inputs, backend='auto', **{**options, **changed})
    expected, expected_gradients = with_gradients(inputs, backend='reference', **{**options, **changed})
    assert relative_error(found[0], y) > 1e-3
    assert all(relative_error(a, b) > 1e-3 for a, b in zip(found_gradients, gradients))
    assert_equal([*found, *found_gradients], [*expected, *expected_gradients])


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('retrieve', RETRIEVALS)
def test_gradcheck(rule, retrieve):
    """Numerical derivatives, by every element of the keys and by one direction of all."""
    inputs = make_inputs(batch=1, heads=1, tokens=5)
    inputs[2].data *= 2
    assert write_norms(inputs, 2).min() > 1

    def outputs(*tensors):
        y, state = call(tensors, chunk_size=2, update_rule=rule, retrieve=retrieve, return_state=True,
                        step_normalization=0.25 if retrieve == 'final' else 0.0)
        return y, *state

    few = [x.detach().requires_grad_(i == 1) for i, x in enumerate(inputs)]  # keys, whose gradient goes all ways
    assert torch.autograd.gradcheck(outputs, few, fast_mode=False)
    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True)


@pytest.mark.parametrize('normalization', [0.0, 0.25])
def test_gradgradcheck(normalization):
    inputs = make_inputs(batch=1, heads=1, tokens=5)
    assert torch.autograd.gradgradcheck(
        lambda *x: call(x, chunk_size=2, step_normalization=normalization)[0], inputs, fast_mode=True)


def test_the_curvature_is_a_bound():
    """The largest eigenvalue of Eq. 3's Gauss-Newton matrix is below it, and not far below where tokens agree."""
    _, k, _, w1, w2, *_ = [x.detach() for x in make_inputs(batch=2, heads=3, tokens=6, d=5, e=4)]
    for keys in k, k[:, :, :1].expand_as(k):
        bounds = curvature(keys, w1.expand(2, -1, -1, -1), w2.expand(2, -1, -1, -1))[..., 0, 0]
        for image, head in product(range(2), range(3)):
            jacobians = torch.autograd.functional.jacobian(
                lambda a, b: read(keys[image, head], a, b).flatten(), (w1[head], w2[head]))  # noqa: B023
            jacobian = torch.cat([x.flatten(1) for x in jacobians], dim=1)
            largest = torch.linalg.matrix_norm(jacobian, 2).square() * 2 / k.size(-1)
            assert largest <= bounds[image, head] * (1 + 1e-12)
            if keys is not k:
                assert bounds[image, head] <= 6 * largest


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('retrieve', RETRIEVALS)
@pytest.mark.parametrize('tokens, return_state', [(20, False), (20, True), (8, True)])  # 8: read before it is written
def test_second_order_equals_reference(rule, retrieve, tokens, return_state):
    """Gradients made with create_graph, and the gradient of their squares."""
    inputs = make_inputs(tokens=tokens)
    assert write_norms(inputs, 8).min() > 0.6
    found = {}
    for backend in ('reference', 'auto'):
        related = [*inputs[:2], inputs[2] + inputs[1].sin(), *inputs[3:]]  # v made of k
        y, state = call(related, chunk_size=8, max_write_norm=0.6, inner_step=0.9, update_rule=rule, retrieve=retrieve,
                        return_state=return_state, backend=backend)
        first = torch.autograd.grad(sum(o.square().sum() for o in (y, *(state or ()))), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        found[backend] = [*first, *second]
    assert_equal(found['auto'], found['reference'])


@pytest.mark.parametrize('backend', ['reference', 'auto'])
@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('split', [16, 32])
def test_two_calls_equal_one(backend, rule, split):
    inputs = make_inputs(tokens=50)
    options = dict(chunk_size=16, update_rule=rule, return_state=True, backend=backend)
    whole, whole_state = call(inputs, **options)
    first = [x[:, :, :split] for x in inputs[:3]] + inputs[3:]
    second = [x[:, :, split:] for x in inputs[:3]] + inputs[3:]
    y1, state = call(first, **options)
    y2, state = call(second, state=state, **options)
    assert_equal([torch.cat((y1, y2), dim=2), *state], [whole, *whole_state])
    whole_gradients = torch.autograd.grad(whole.square().sum() + whole_state.w1.sum(), inputs)
    gradients = torch.autograd.grad(y1.square().sum() + y2.square().sum() + state.w1.sum(), inputs)
    assert_equal(gradients, whole_gradients)


@pytest.mark.parametrize('rule', RULES)
def test_previous_is_causal_over_chunks(rule):
    inputs = make_inputs(tokens=50)
    before, _ = call(inputs, chunk_size=16, update_rule=rule)
    changed = [x.detach().clone() for x in inputs]
    for x in changed[:3]:
        x[:, :, 32:] = torch.randn_like(x[:, :, 32:])
    after, _ = call(changed, chunk_size=16, update_rule=rule)
    assert torch.equal(before[:, :, :32], after[:, :, :32])
    assert not torch.allclose(before[:, :, 32:], after[:, :, 32:])
    # Its own keys and values reach a chunk's later readers, not the chunk itself.
    changed = [x.detach().clone() for x in inputs]
    changed[1][:, :, 16:32] = F.normalize(torch.randn_like(changed[1][:, :, 16:32]), dim=-1)
    after, _ = call(changed, chunk_size=16, update_rule=rule)
    assert torch.equal(before[:, :, :32], after[:, :, :32])
    assert not torch.allclose(before[:, :, 32:], after[:, :, 32:])


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('retrieve', RETRIEVALS)
def test_images_do_not_mix(rule, retrieve):
    inputs = make_inputs(batch=3, tokens=50)
    together, _ = call(inputs, chunk_size=16, update_rule=rule, retrieve=retrieve)
    for i in range(3):
        alone, _ = call([x[i:i + 1] for x in inputs[:3]] + inputs[3:], chunk_size=16, update_rule=rule,
                        retrieve=retrieve)
        assert relative_error(alone, together[i:i + 1]) <= 1e-12
    grad, = torch.autograd.grad(together[0].sum(), inputs[1])
    assert grad[0].norm() > 0
    assert grad[1:].norm() == 0


@pytest.mark.parametrize('backend', ['reference', 'auto'])
def test_without_grad_equals_with_grad(backend):
    inputs = make_inputs(tokens=50)
    expected, _ = call(inputs, chunk_size=16, backend=backend)
    with torch.no_grad():
        found, _ = call(inputs, chunk_size=16, backend=backend)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    if backend == 'auto':
        with torch.inference_mode():
            assert torch.equal(call(inputs, chunk_size=16, backend=backend)[0], expected)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('backend', ['reference', 'auto'])
def test_inner_loop_is_float32(dtype, rule, backend):
    """Half-precision inputs, also under autocast, give the float32 result of the same inputs, rounded once."""
    half = [x.detach().to(dtype) for x in make_inputs(tokens=50)]
    options = dict(chunk_size=16, update_rule=rule, return_state=True, backend=backend)
    expected, expected_state = call([x.float() for x in half], **options)
    for enabled in (False, True):
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled):
            found, state = call(half, **options)
        assert found.dtype == dtype
        assert torch.equal(found, expected.to(dtype))
        assert state.w1.dtype == torch.float32
        assert torch.equal(state.w1, expected_state.w1)


def test_reads_have_the_dtype_of_the_queries():
    """Whatever keys and values have; all of them are computed in float32."""
    inputs = [x.detach().to(dtype) for x, dtype in zip(make_inputs(tokens=50), (
        torch.bfloat16, torch.float16, *[torch.float32] * 7))]
    found, _ = call(inputs, chunk_size=16)
    expected, _ = call([x.float() for x in inputs], chunk_size=16)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected.bfloat16())


@pytest.mark.parametrize('rule', RULES)
def test_backward_under_autocast_is_float32(rule):
    inputs = make_inputs(tokens=50, dtype=torch.float32)
    _, expected = with_gradients(inputs, chunk_size=16, update_rule=rule, return_state=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        _, found = with_gradients(inputs, chunk_size=16, update_rule=rule, return_state=True)
    for a, b in zip(found, expected):
        assert torch.equal(a, b)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 300), fraction=st.floats(0, 1), inner_step=st.floats(1e-6, 1), seed=st.integers(0, 99),
    scale=st.sampled_from([1e-3, 1.0, 1e3]), rule=st.sampled_from(RULES), retrieve=st.sampled_from(RETRIEVALS))
def test_finite_at_extremes(tokens, fraction, inner_step, seed, scale, rule, retrieve):
    """float32, any chunk size from 1 to N, values of scale 1e3: the bound on the write keeps everything finite."""
    inputs = make_inputs(tokens=tokens, scale=scale, dtype=torch.float32, seed=seed)
    chunk_size = max(1, round(fraction * tokens))
    outputs, gradients = with_gradients(inputs, chunk_size=chunk_size, inner_step=inner_step, update_rule=rule,
                                        retrieve=retrieve, return_state=True)
    assert all(x.isfinite().all() for x in outputs + gradients)


@pytest.mark.parametrize('backend', ['reference', 'auto'])
@pytest.mark.parametrize('max_write_norm', [MIN_WRITE_NORM, 1.0, 100.0])
@pytest.mark.parametrize('rule', RULES)
def test_finite_under_stress(backend, max_write_norm, rule):
    """Values of scale 3e3 and gradients of scale 1e4, at the ends of what the other options may be."""
    inputs = make_inputs(batch=1, tokens=24, scale=1e3, dtype=torch.float32)
    for chunk_size, inner_step, retrieve in product((1, 7, 24, 30), (1e-12, 1.0), RETRIEVALS):
        if backend == 'reference' and chunk_size == 1 and retrieve == 'final':
            continue  # is slow, and the writes are those of 'previous'
        outputs, gradients = with_gradients(
            inputs, loss_scale=1e4, chunk_size=chunk_size, inner_step=inner_step, max_write_norm=max_write_norm,
            update_rule=rule, retrieve=retrieve, return_state=True, backend=backend)
        case = chunk_size, inner_step, retrieve
        assert all(x.isfinite().all() for x in outputs), case
        assert all(x.isfinite().all() for x in gradients), case
        assert gradients[2].norm() > 0 or retrieve == 'previous', case


@pytest.mark.parametrize('rule', RULES)
def test_smallest_bound_is_exact(rule):
    """Of float32, whose powers of a much smaller bound would be zero or infinite."""
    options = dict(chunk_size=16, max_write_norm=MIN_WRITE_NORM, update_rule=rule, return_state=True)
    inputs = make_inputs(tokens=50)
    _, expected = with_gradients(inputs, backend='reference', **options)
    single = [x.detach().float().requires_grad_() for x in inputs]
    _, found = with_gradients(single, **options)
    assert_equal([x.double() for x in found], expected, tolerance=1e-3)


def test_write_is_bounded():
    """With no decay and no momentum, one chunk moves each head's memory by less than max_write_norm."""
    inputs = make_inputs(tokens=64, scale=1e3)
    inputs[8].data[64:] = -50.0  # biases of momentum and decay; d·h is 32, so these are the last two thirds
    inputs[8].data[32:] = -50.0
    inputs[7].data[32:] = 0
    _, state = call(inputs, chunk_size=64, return_state=True, max_write_norm=0.5)
    change = (state.w1 - inputs[3]).square().sum((-2, -1)) + (state.w2 - inputs[4]).square().sum((-2, -1))
    assert (change.sqrt() <= 0.5).all()
    assert (change.sqrt() > 0.45).all()  # writes this large come close to the bound


def test_step_zero_never_writes():
    inputs = make_inputs(tokens=50)
    inputs[8].data[64:] = -1e4  # no decay either
    inputs[7].data[64:] = 0
    y, state = call(inputs, chunk_size=16, inner_step=0.0, return_state=True)
    assert torch.equal(state.w1, inputs[3].expand_as(state.w1))
    q, w1, w2 = inputs[0], inputs[3], inputs[4]
    assert relative_error(y, q + F.gelu(q @ w1) @ w2) <= 1e-12


@pytest.mark.parametrize('tokens, chunk_size, expected', [
    (50, 16, 48), (48, 16, 32), (16, 16, 0), (1, 1, 0), (3, 1, 2), (0, 16, 0)])
def test_written_tokens(tokens, chunk_size, expected):
    assert written_tokens(tokens, chunk_size) == expected
    assert written_tokens(tokens, chunk_size, retrieve='final') == tokens
    assert written_tokens(tokens, chunk_size, return_state=True) == tokens
    # What is not written has no influence.
    inputs = make_inputs(tokens=tokens)
    y, _ = call(inputs, chunk_size=chunk_size)
    grad_k, = torch.autograd.grad(y.sum(), inputs[1], allow_unused=True, materialize_grads=True)
    assert grad_k[:, :, expected:].norm() == 0


@pytest.mark.parametrize('options, message', [
    (dict(chunk_size=0), 'chunk_size must be an integer of at least 1, got 0'),
    (dict(chunk_size=2.5), 'chunk_size must be an integer of at least 1, got 2.5'),
    (dict(inner_step=-1), r'inner_step must be a number in \[0, 1\], got -1'),
    (dict(inner_step=float('nan')), r'inner_step must be a number in \[0, 1\], got nan'),
    (dict(max_write_norm=1e-7), 'max_write_norm must be a finite number of at least 1e-06, got 1e-07'),
    (dict(max_write_norm=float('inf')), 'max_write_norm must be a finite number .*, got inf'),
    (dict(update_rule='serial'), "update_rule must be one of .*got 'serial'"),
    (dict(retrieve='next'), "retrieve must be one of .*got 'next'"),
    (dict(backend='cuda'), "backend must be one of .*got 'cuda'"),
])
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        call(make_inputs(), **options)


def test_environment_names_the_backend(monkeypatch):
    inputs = make_inputs(dtype=torch.float32)
    call(inputs)
    refused = pytest.raises(ValueError, match="backend 'triton' needs Triton and CUDA tensors, got .* on cpu")
    with refused:
        call(inputs, backend='triton')
    monkeypatch.setenv('CONVNEUR_MEMORY_BACKEND', 'triton')
    with refused:
        call(inputs)
    call(inputs, backend='torch')  # what is asked for by name stays
    monkeypatch.setenv('CONVNEUR_MEMORY_BACKEND', 'cuda')
    with pytest.raises(ValueError, match="CONVNEUR_MEMORY_BACKEND must be one of .*got 'cuda'"):
        call(inputs)


@pytest.mark.parametrize('index, name', enumerate(('k', 'v', 'w1', 'w2', *UpdateGenerators._fields), 1))
@pytest.mark.parametrize('backend', ['reference', 'auto', 'triton'])
def test_tensors_that_do_not_fit_are_named(backend, index, name):
    """Each in turn: in one of its sizes, in a dtype that would be rounded, and on another device."""
    inputs = [x.detach().float() for x in make_inputs(tokens=5)]
    x = inputs[index]
    for i in range(x.dim()):
        if (name, i) == ('w1', 2):  # e, which w2 does not fit then
            continue
        for wrong in (x.narrow(i, 0, x.size(i) - 1), torch.cat((x, x), dim=i), x.narrow(i, 0, 1)):
            with pytest.raises(ValueError, match=rf'^{name_of(name)} must have (the )?shape .* got \('):
                call([*inputs[:index], wrong, *inputs[index + 1:]], backend=backend)
    with pytest.raises(ValueError, match=f'^q of dtype torch.float32 and {name_of(name)} of dtype torch.float64 do'):
        call([*inputs[:index], x.double(), *inputs[index + 1:]], backend=backend)
    with pytest.raises(ValueError, match=f'^{name_of(name)} must have a floating-point dtype, got torch.int64'):
        call([*inputs[:index], x.long(), *inputs[index + 1:]], backend=backend)
    with pytest.raises(ValueError, match=f'^{name_of(name)} must be on cpu like q, got meta'):
        call([*inputs[:index], x.to('meta'), *inputs[index + 1:]], backend=backend)


def name_of(name: str) -> str:
    return f'generators.{name}' if name in UpdateGenerators._fields else name


@pytest.mark.parametrize('name', MemoryState._fields)
@pytest.mark.parametrize('backend', ['reference', 'auto', 'triton'])
def test_states_that_do_not_fit_are_named(backend, name):
    """A momentum of one image, say, must not be that of all."""
    inputs = [x.detach().float() for x in make_inputs(tokens=5)]
    _, state = call(inputs, return_state=True)
    x = getattr(state, name)
    for i in range(x.dim()):
        with pytest.raises(ValueError, match=rf'^state.{name} must have shape .* got \('):
            call(inputs, state=state._replace(**{name: x.narrow(i, 0, 1)}), backend=backend)
    with pytest.raises(ValueError, match=f'^q of dtype torch.float32 and state.{name} of dtype torch.float64 do not'):
        call(inputs, state=state._replace(**{name: x.double()}), backend=backend)
    with pytest.raises(ValueError, match=f'^state.{name} must have dtype torch.float32, .* got torch.bfloat16'):
        call(inputs, state=state._replace(**{name: x.bfloat16()}), backend=backend)
    with pytest.raises(ValueError, match=f'^state.{name} must be on cpu like q, got meta'):
        call(inputs, state=state._replace(**{name: x.to('meta')}), backend=backend)


def test_other_bad_shapes_are_named():
    inputs = make_inputs()
    with pytest.raises(ValueError, match=r'^q must have shape \(B, h, N, d\), got \(2, 2, 50\)'):
        call([inputs[0][..., 0], *inputs[1:]])
    with pytest.raises(ValueError, match='^w2 must have shape'):
        call([*inputs[:3], inputs[3][..., 1:], *inputs[4:]])
    with pytest.raises(ValueError, match='^w1 must have shape .* and no empty dimension'):
        call([*inputs[:3], inputs[3][..., :0], inputs[4][:, :0], *inputs[5:]])
    with pytest.raises(ValueError, match='^q of dtype torch.float64 and k of dtype torch.float32 do not go together'):
        call([inputs[0], *(x.float() for x in inputs[1:])])


@pytest.mark.parametrize('backend', ['reference', 'auto'])
@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('retrieve', RETRIEVALS)
@pytest.mark.parametrize('batch, tokens', [(0, 20), (2, 0), (0, 0)])
def test_nothing_to_read(backend, rule, retrieve, batch, tokens):
    """Empty outputs, a state as it was, and gradients of zero, not None, for which other processes would wait."""
    inputs = make_inputs(batch=batch, tokens=tokens)
    options = dict(chunk_size=8, update_rule=rule, retrieve=retrieve, backend=backend)
    y, state = call(inputs, return_state=True, **options)
    assert y.shape == inputs[0].shape and y.dtype == torch.float64
    for found, w in zip(state, (*inputs[3:5], *map(torch.zeros_like, inputs[3:5]))):
        assert torch.equal(found, w.expand(batch, *w.shape))
    gradients = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(g, torch.zeros_like(x)) for g, x in zip(gradients, inputs))
    # The memory of the images that are there goes through.
    gradient, = torch.autograd.grad((2 * state.w1).sum(), inputs[3])
    assert torch.equal(gradient, torch.full_like(gradient, 2 * batch))
    given = MemoryState(*(torch.randn_like(x).requires_grad_() for x in state))
    y, state = call(inputs, state=given, return_state=True, **options)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(state, given))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(y.sum(), given))
    with torch.no_grad():
        assert call([x.bfloat16() for x in inputs], **options)[0].dtype == torch.bfloat16


@pytest.mark.parametrize('rule', ['sequential', 'parallel'])
def test_operator_compiles_in_one_graph(rule):
    """The operator by itself; what the layer gives to a compiler is tested with the block."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 36, 16, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3))
    w1, w2, *weights = (
        (0.1 * torch.randn(shape, dtype=torch.float64, generator=generator)).requires_grad_()
        for shape in ((2, 16, 8), (2, 8, 16), (128, 32), (128, ), (96, 128), (96, )))

    def read(q, k, v):
        return neural_memory(q, k, v, w1, w2, UpdateGenerators(*weights), chunk_size=16, update_rule=rule)[0]

    results = []
    for function in (read, torch.compile(read, fullgraph=True, backend='aot_eager')):
        y = function(q, k, v)
        results.append([y, *torch.autograd.grad(y.square().sum(), [q, k, v, w1, w2, *weights])])
    for a, b in zip(*results):
        assert (a - b).norm() <= 1e-10 * b.norm()
