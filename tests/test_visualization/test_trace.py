"""What is recorded of a memory's chunks: the equations' own numbers, and those that the memory goes by."""
import math

import pytest
import torch
import torch.nn.functional as F

from convneur_mm.models import NeuralMemory
from convneur_mm.ops.neural_memory import NORMALIZE_EPS, UpdateGenerators
from convneur_mm.ops.neural_memory.reference import curvature, read, update_coefficients
from convneur_mm.visualization import trace

pytestmark = pytest.mark.usefixtures('both_codes')
CHANNELS, BATCH = 32, 2
FIELDS = 'surprise', 'step', 'momentum', 'decay', 'write_norm'
CASES = [(tokens, chunk, rule, retrieve) for tokens, chunk in ((23, 5), (20, 5), (4, 9))
         for rule in ('sequential', 'parallel') for retrieve in ('previous', 'final')]


def make_memory(chunk_size, **options):
    memory = NeuralMemory(CHANNELS, chunk_size=chunk_size, inner_step=0.8, max_write_norm=0.3, **options).double()
    with torch.no_grad():
        for weight in memory.parameters():  # all channels with coefficients of their own
            weight.add_(torch.randn_like(weight), alpha=0.3)
    return memory


@torch.enable_grad()
def equations(memory, x, number):
    """Of the first ``number`` chunks, by Eqs. 3 and 4 and autograd, a list of tensors for each field."""

    def heads(z):
        return z.unflatten(2, (memory.num_heads, memory.head_dim)).transpose(1, 2)

    tokens = memory.norm(x)
    k, v = F.normalize(heads(memory.key(tokens)), dim=-1, eps=NORMALIZE_EPS), heads(memory.value(tokens))
    initial = [w.detach().expand(len(x), -1, -1, -1) for w in (memory.w1, memory.w2)]
    now, momenta = initial, [torch.zeros_like(w) for w in initial]
    first, _, last = memory.generators
    generators = UpdateGenerators(first.weight, first.bias, last.weight, last.bias)
    found = {name: [] for name in FIELDS}
    for t in range(number):
        span = slice(t * memory.chunk_size, (t + 1) * memory.chunk_size)
        at = [w.detach().requires_grad_() for w in (now if memory.update_rule == 'sequential' else initial)]
        error = read(k[:, :, span], *at) - v[:, :, span]
        gradients = torch.autograd.grad(error.square().mean(-1).sum(), at, retain_graph=True)
        divisor = 1 + memory.step_normalization * memory.inner_step * curvature(k[:, :, span], *at)
        gradients = [gradient / divisor for gradient in gradients]
        surprise = error.square().mean(2)
        step, eta, alpha = update_coefficients(surprise, generators, memory.inner_step)
        u = [step[..., :, None] * gradients[0], step[..., None, :] * gradients[1]]
        square = sum(part.square().sum((-2, -1)) for part in u)
        factor = 1 / (1 + square / memory.max_write_norm**2).sqrt()
        u = [factor[..., None, None] * part for part in u]
        momenta = [eta[..., :, None] * momenta[0] - u[0], eta[..., None, :] * momenta[1] - u[1]]
        now = [(1 - alpha[..., :, None]) * now[0] + momenta[0], (1 - alpha[..., None, :]) * now[1] + momenta[1]]
        norm = sum(part.square().sum((-2, -1)) for part in u).sqrt()
        for name, value in zip(FIELDS, (surprise.flatten(1), step.flatten(1), eta.flatten(1), alpha.flatten(1), norm)):
            found[name].append(value)
    return found


@pytest.mark.parametrize('tokens, chunk, rule, retrieve', CASES)
def test_every_number_is_that_of_the_equations(tokens, chunk, rule, retrieve):
    memory = make_memory(chunk, update_rule=rule, retrieve=retrieve, step_normalization=0.25 if tokens == 23 else 0.0)
    x = torch.randn(BATCH, tokens, CHANNELS, dtype=torch.float64)
    found = trace(memory, x)
    number = math.ceil(tokens / chunk) - (retrieve == 'previous')
    for name, expected in equations(memory, x, number).items():
        value = getattr(found, name)
        assert value.shape == (number, BATCH, memory.num_heads if name == 'write_norm' else CHANNELS)
        if number:
            torch.testing.assert_close(value, torch.stack(expected), rtol=1e-10, atol=1e-12)
    assert (found.chunk_size, found.num_tokens) == (chunk, tokens)
    assert found.chunk_of_tokens().tolist() == [i // chunk for i in range(tokens)]


def test_from_a_state_on_it_is_what_the_memory_itself_does():
    """The momentum of a state that the memory returns tells what was written: P_t = η P_{t-1} − u."""
    memory = make_memory(5)
    first, second = torch.randn(2, BATCH, 5, CHANNELS, dtype=torch.float64)
    _, before = memory(first, return_state=True)
    _, after = memory(second, before, return_state=True)
    found = trace(memory, second, before, return_state=True)
    eta = found.momentum[0].unflatten(-1, (memory.num_heads, -1))
    write = [eta[..., :, None] * before.p1 - after.p1, eta[..., None, :] * before.p2 - after.p2]
    norm = sum(part.square().sum((-2, -1)) for part in write).sqrt()
    torch.testing.assert_close(found.write_norm[0], norm, rtol=1e-10, atol=1e-12)
    whole = trace(memory, torch.cat((first, second), 1), return_state=True)
    for name in FIELDS:
        torch.testing.assert_close(getattr(whole, name)[1:], getattr(found, name), rtol=1e-10, atol=1e-12)


def test_chunks_by_their_number():
    found = trace(make_memory(196, num_chunks=4), torch.randn(1, 18, CHANNELS, dtype=torch.float64))
    assert found.chunk_size == 5 and len(found.surprise) == 3


def test_half_precision_and_the_reference_backend_are_traced_in_float32():
    memory, x = make_memory(5).float(), torch.randn(1, 23, CHANNELS)
    expected = trace(memory, x)
    memory.backend = 'reference'
    for ours, theirs in zip(trace(memory, x)[2:], expected[2:]):
        torch.testing.assert_close(ours, theirs)
    with torch.autocast('cpu', torch.bfloat16):
        found = trace(memory, x)
    assert found.surprise.dtype == torch.float32
    # As the memory's, its keys and values come of products in half precision.
    assert not torch.equal(found.surprise, expected.surprise)
    torch.testing.assert_close(found.surprise, expected.surprise, rtol=0.1, atol=0.02)


def test_the_memory_is_left_alone():
    memory, x = make_memory(5), torch.randn(1, 23, CHANNELS, dtype=torch.float64)
    before = memory(x)
    trace(memory, x)
    assert torch.equal(memory(x), before)
    assert not trace(memory, x).surprise.requires_grad
