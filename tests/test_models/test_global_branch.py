"""The global branch against its plain form and stored vectors, for every option; whether these show the memory."""
import plain_convneur as plain
import pytest
import torch

from convneur_mm.models.global_branch import MAX_STATE_NORM, GlobalBranch, limit_norm
from convneur_mm.ops.neural_memory import UPDATE_RULES, MemoryState

pytestmark = pytest.mark.usefixtures('both_codes')


@pytest.mark.parametrize('name', plain.GLOBAL_CASES)
def test_equals_the_equations_and_stored_vectors(name):
    plain.check(GlobalBranch(**plain.GLOBAL_CASES[name][0]), 'global', name)


def test_cases_show_the_memory():
    """Writes near and above their bound, gates far from a half, and a map that is another one without any write."""
    options, weights, x = plain.case('global', 'chunks of 9')
    tokens = x[0].flatten(1).T @ weights['reduce.weight'][:, :, 0, 0].T + weights['reduce.bias']
    norms = []
    plain.neural_memory(tokens, plain.part(weights, 'memory'), norms, chunk_size=9)
    assert min(norms) > 0.3 and max(norms) > 1.5
    context, = plain.run('global', options, weights, x)
    gate = context.sigmoid()
    assert gate.min() < 0.1 and gate.max() > 0.85 and gate.std() > 0.2
    unwritten, = plain.run('global', dict(options, inner_step=0.0), weights, x)
    assert (context - unwritten).norm() > 0.1 * context.norm()


@pytest.mark.parametrize('kind', plain.KINDS)
def test_no_two_cases_store_the_same(kind):
    """An option that changes no stored value would not be seen to be ignored."""
    stored = [tuple(value for vector in plain.stored(kind, name) for value in vector) for name in plain.KINDS[kind]]
    assert len(set(stored)) == len(plain.KINDS[kind])


def test_tokens_are_in_row_major_order():
    """With chunks of one row each, what a row sees depends on the rows above it and on no column to its right."""
    torch.manual_seed(0)
    model = GlobalBranch(4, 16, chunk_size=5).double()
    x = torch.randn(1, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    seen, = torch.autograd.grad(model(x)[0, :, 1].sum(), x)
    assert (seen[0].abs().sum((0, 2)) > 0).tolist() == [True, True, False]


def test_works_on_any_memory_format():
    torch.manual_seed(0)
    model = GlobalBranch(4, 16, chunk_size=5).double()
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    plain.assert_close(model(x.contiguous(memory_format=torch.channels_last)), model(x), 'the map')


def test_init_cfg():
    model = GlobalBranch(4, 16, init_cfg=dict(type='Constant', layer='Conv2d', val=0.5, bias=0.25))
    model.init_weights()
    for conv in (model.reduce, model.expand):
        assert (conv.weight == 0.5).all() and (conv.bias == 0.25).all()


def make_memory(**options) -> GlobalBranch:
    """In float64, with weights that write much."""
    torch.manual_seed(0)
    model = GlobalBranch(4, 32, **options).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def assert_same(found, expected):
    for a, b in zip(found, expected):
        assert (a - b).norm() <= 1e-10 * b.norm()


@pytest.mark.parametrize('backend', ['auto', 'reference'])
@pytest.mark.parametrize('rule', UPDATE_RULES)
def test_frames_equal_one_call_on_all_chunks(backend, rule):
    """Three frames of two chunks each, and all gradients back through them."""
    model = make_memory(chunk_size=10, update_rule=rule, backend=backend)
    tall = torch.randn(2, 4, 12, 5, dtype=torch.float64, requires_grad=True)
    whole, expected = model(tall, return_state=True)
    outputs, state = [], None
    for frame in tall.split(4, dim=2):
        y, state = model(frame, state, return_state=True)
        outputs.append(y)
    joined = torch.cat(outputs, 2)
    assert_same((joined, *state), (whole, *expected))
    assert_same((model(tall.split(4, dim=2)[0]), ), (whole[:, :, :4], ))  # the state takes no part in its own frame
    assert (model(tall[:, :, 8:]) - whole[:, :, 8:]).norm() > 1e-3 * whole.norm(), 'earlier frames count'
    assert_same(*(torch.autograd.grad(y[:, :, 8:].sin().sum() + sum(s.sin().sum() for s in last),
                                      [tall, *model.parameters()])
                  for y, last in ((joined, state), (whole, expected))))


@pytest.mark.parametrize('backend', ['auto', 'reference'])
@pytest.mark.parametrize('retrieve', ['previous', 'final'])
def test_frames_of_any_size_equal_their_chunks_in_sequence(backend, retrieve):
    """Frames of 15 and 8 tokens in chunks of ten, the last of each shorter."""
    model = make_memory(chunk_size=10, retrieve=retrieve, backend=backend)
    state = chunk_state = None
    for size in ((3, 5), (2, 4), (3, 5)):
        frame = torch.randn(2, 4, *size, dtype=torch.float64)
        y, state = model(frame, state, return_state=True)
        tokens = model.reduce(frame).flatten(2).mT
        reads = []
        for chunk in tokens.split(10, 1):
            before = chunk_state
            read, chunk_state = model.memory(chunk, before, return_state=True)
            reads.append(read)
        if retrieve == 'final':  # of the memory after the frame, which inner_step=0 would leave as it is
            model.memory.inner_step, kept = 0.0, model.memory.inner_step
            frozen = MemoryState(*chunk_state[:2], *(torch.zeros_like(p) for p in chunk_state[2:]))
            model.memory.retrieve = 'previous'
            reads = [model.memory(chunk, frozen) for chunk in tokens.split(10, 1)]
            model.memory.inner_step, model.memory.retrieve = kept, 'final'
        assert_same((y, *state), (model.expand(torch.cat(reads, 1).mT.unflatten(2, size)), *chunk_state))


def test_norms_are_limited_by_image_and_head():
    torch.manual_seed(0)
    w1, w2 = torch.randn(2, 16, 8), torch.randn(2, 8, 16)
    scale = torch.tensor([[0.5, 20.0], [9.99, 10.01]])[..., None, None]
    state = MemoryState(scale * w1, scale * w2, scale.flip(0) * w1, torch.zeros(2, 2, 8, 16))
    found = limit_norm(state, w1, w2)
    expected = scale.clamp(max=MAX_STATE_NORM)
    torch.testing.assert_close(found.w1, expected * w1)
    torch.testing.assert_close(found.w2, expected * w2)
    norm, limit = (w.square().sum((-2, -1)) for w in (w1, torch.cat((w1.flatten(1), w2.flatten(1)), 1)[..., None]))
    expected = torch.minimum(scale.flip(0)[..., 0, 0], MAX_STATE_NORM * (limit / norm).sqrt())[..., None, None]
    torch.testing.assert_close(found.p1, expected * w1)
    assert torch.equal(found.w1[0, 0], state.w1[0, 0]), 'unchanged below the limit'


def test_gradients_of_a_memory_that_was_never_written():
    """Its momentum is zero, and so is the norm of it, whose root has no gradient there."""
    model = make_memory(chunk_size=10, inner_step=0.0)
    y, state = model(torch.randn(1, 4, 3, 5, dtype=torch.float64), return_state=True)
    (y.sum() + sum(s.sum() for s in state)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('given', [dict(return_state=True), dict(state=())])
def test_other_branches_have_no_state(given):
    with pytest.raises(ValueError, match="only global_branch='neural_memory' has a state to carry, got 'cbam'"):
        GlobalBranch(4, 16, 'cbam')(torch.zeros(1, 4, 3, 5), **given)


@pytest.mark.parametrize('branch', ['neural_memory', 'cbam'])
def test_a_hook_sees_and_changes_what_a_branch_returns(branch):
    """It sees tokens of the bottleneck's channels, which are else never made apart from the last convolution."""
    model, x, seen = GlobalBranch(6, 16, branch), torch.randn(2, 6, 3, 5), []
    before = model(x)
    handle = model.token_mixer.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(model(x), before)
    assert seen[0].shape == (2, 15, 16)
    torch.testing.assert_close(model.expand(seen[0].mT.unflatten(2, (3, 5))), before)
    handle.remove()
    model.token_mixer.register_forward_hook(lambda module, args, output: 0 * output)
    torch.testing.assert_close(model(x), model.expand.bias[:, None, None].expand_as(x))
