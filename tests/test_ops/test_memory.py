"""The memory's operators and loop: the precision of the inner loop, and what PyTorch asks of operators."""
import itertools
import warnings

import pytest
import torch

from convneur_mm.ops.neural_memory import MemoryOptions, MemoryState, UpdateGenerators
from convneur_mm.ops.neural_memory import memory as memory_module
from convneur_mm.ops.neural_memory.operators import implementation
from convneur_mm.ops.neural_memory.reference import neural_memory_reference

BATCH, HEADS, TOKENS, D, E = 2, 2, 25, 16, 8
EPS = 1.2  # about the median of the tokens' norms
N, CHANNELS = BATCH * HEADS, HEADS * D


def draw(*shape: int, dtype=torch.float64) -> torch.Tensor:
    return 0.3 * torch.randn(shape, dtype=torch.float64).to(dtype)


def weights(dtype=torch.float32) -> list[torch.Tensor]:
    return [draw(*shape, dtype=dtype) for shape in ((HEADS, D, E), (HEADS, E, D), (4 * CHANNELS, CHANNELS),
                                                    (4 * CHANNELS,), (3 * CHANNELS, 4 * CHANNELS), (3 * CHANNELS,))]


def tokens(length: int = TOKENS) -> torch.Tensor:
    """A slice of a larger tensor, as queries, keys and values are."""
    return draw(BATCH, 3, HEADS, D, length)[:, 1]


def arguments(name: str, chunk_size: int = 10) -> tuple:
    """Arguments of an operator; tokens make a ragged last chunk."""
    chunks = -(-TOKENS // chunk_size)
    memories, errors, bounds = draw(chunks, N, 2 * E, D), draw(chunks, N, D), draw(chunks, N)
    rows = [draw(1, N, 2 * E, D) for _ in range(5)]
    outputs, rule = draw(BATCH, 3 * CHANNELS), (0.9, 0.7)
    return dict(
        read=(tokens(), memories, chunk_size, EPS),
        read_backward=(tokens(), tokens(), memories, chunk_size, EPS, tokens()),
        surprise=(tokens(), tokens(), memories, chunk_size, EPS, True),
        surprise_backward=(draw(*memories.shape), errors, bounds, tokens(), tokens(), memories, chunk_size, EPS, True,
                           tokens(), tokens()),
        step=(rows[0], draw(1, N, D), *rows[1:3], *weights(torch.float64)[2:], *rule),
        step_backward=(*rows[:3], draw(BATCH, 4 * CHANNELS), outputs, *rows[3:5], *weights(torch.float64)[2::2],
                       *rule))[name]


NAMES = ('read', 'read_backward', 'surprise', 'surprise_backward', 'step', 'step_backward')


@pytest.mark.needs('kernels')
@pytest.mark.usefixtures('nan_in_new_tensors')
@pytest.mark.parametrize('chunk_size', [10, 25])
@pytest.mark.parametrize('name', NAMES)
def test_both_implementations_agree(name, chunk_size):
    """Also in what they fill, and with tokens in half precision beside a memory in float32."""
    for token_dtype, dtype, tolerance in ((torch.float64, torch.float64, 1e-12), (torch.bfloat16, torch.float32, 1e-2)):
        given = [x if not torch.is_tensor(x) else x.to(token_dtype if x.dim() == 4 and x.size(3) == TOKENS else dtype)
                 for x in arguments(name, chunk_size)]
        found = {}
        for backend in ('torch', 'cpp'):
            copies = [x.clone() if torch.is_tensor(x) else x for x in given]
            outputs = getattr(implementation(backend, torch.zeros(2 * E, D)), name)(*copies)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            found[backend] = [*outputs, *(x for x in copies if torch.is_tensor(x))]
        for a, b in zip(found['torch'], found['cpp'], strict=True):
            assert a.dtype == b.dtype and (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize('name', ['read', 'surprise'])
def test_the_backward_is_the_derivative(name):
    """Of every output by every tensor, numerically; the curvature bound's too."""
    operators = implementation('torch', torch.zeros(2 * E, D))
    given = arguments(name)
    inputs, others = ([x for x in given if torch.is_tensor(x) is wanted] for wanted in (True, False))

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return getattr(operators, name)(*inputs, *others)

        @staticmethod
        def backward(ctx, *grads):
            filled = [torch.empty_like(x) for x in ctx.saved_tensors[:-1]]
            found = getattr(operators, f'{name}_backward')(*grads, *ctx.saved_tensors, *others, *filled)
            return *filled, found

    assert torch.autograd.gradcheck(Function.apply, [x.requires_grad_() for x in inputs], fast_mode=True)


@pytest.mark.usefixtures('nan_in_new_tensors')
@pytest.mark.parametrize('options', [
    MemoryOptions(20), MemoryOptions(40), MemoryOptions(20, step_normalization=0.25),
    MemoryOptions(20, update_rule='parallel', retrieve='final', return_state=True)], ids=str)
def test_operator_of_the_loop(options):
    w1, w2, *generators = weights()
    tensors = draw(BATCH, 3, HEADS, D, TOKENS, dtype=torch.float32), *memory_module.begin(BATCH, w1, w2, None)
    given = [x.clone().requires_grad_() for x in (*tensors, *generators)], True, 'auto', *options
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.library.opcheck(memory_module.memory_operator, (*given[0], *given[1:]))


@pytest.mark.parametrize('field', MemoryState._fields)
def test_the_reference_gets_no_half_precision(field):
    q, k, v = draw(3, BATCH, HEADS, TOKENS, D, dtype=torch.float32)
    w1, w2, *generators = weights()
    state = MemoryState(*(w.expand(BATCH, *w.shape) for w in (w1, w2) * 2))
    with pytest.raises(ValueError, match=f'^the inner loop .* float64, got {field} in torch.bfloat16$'):
        neural_memory_reference(q, k, v, w1, w2, UpdateGenerators(*generators),
                                state._replace(**{field: getattr(state, field).bfloat16()}), MemoryOptions(20))


@pytest.mark.parametrize('update_rule, retrieve', itertools.product(('sequential', 'parallel'), ('previous', 'final')))
def test_flops_of_the_fast_path(update_rule, retrieve):
    """Counted by formulas, as many as the products of the equations have."""
    from torch.utils.flop_counter import FlopCounterMode
    w1, w2, *generators = weights()
    qkv = draw(BATCH, 3, HEADS, D, TOKENS, dtype=torch.float32)
    options = MemoryOptions(10, update_rule=update_rule, retrieve=retrieve)
    written, chunks = (25, 3) if retrieve == 'final' else (20, 2)
    # A read multiplies a token by both weights. A surprise does, too, and multiplies for the gradients of both and for
    # what comes back to the hidden units.
    expected = [2 * (reads * TOKENS + surprises * written) * N * D * E + 2 * steps * chunks * BATCH * 16 * CHANNELS**2
                for reads, surprises, steps in ((2, 5, 1), (5, 13, 2))]
    for device, function in itertools.product(('cpu', 'meta'), (memory_module.run, torch.compile(memory_module.run))):
        given = [x.detach().to(device).requires_grad_() for x in (qkv, w1, w2, *generators)]
        with FlopCounterMode(display=False) as counter:
            y, _ = function(*given[:3], UpdateGenerators(*given[3:]), None, 'auto', options)
            assert counter.get_total_flops() == expected[0]
            y.sum().backward()
        assert counter.get_total_flops() == sum(expected)
