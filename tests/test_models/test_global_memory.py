"""The global branch against its plain form and stored vectors, for every option; whether these show the memory."""
import plain_convneur as plain
import pytest
import torch

from convneur_mm.models.global_memory import GlobalMemory

pytestmark = pytest.mark.usefixtures('both_codes')


@pytest.mark.parametrize('name', plain.GLOBAL_CASES)
def test_equals_the_equations_and_stored_vectors(name):
    plain.check(GlobalMemory(**plain.GLOBAL_CASES[name][0]), 'global', name)


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
    model = GlobalMemory(4, 16, chunk_size=5).double()
    x = torch.randn(1, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    seen, = torch.autograd.grad(model(x)[0, :, 1].sum(), x)
    assert (seen[0].abs().sum((0, 2)) > 0).tolist() == [True, True, False]


def test_works_on_any_memory_format():
    torch.manual_seed(0)
    model = GlobalMemory(4, 16, chunk_size=5).double()
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    plain.assert_close(model(x.contiguous(memory_format=torch.channels_last)), model(x), 'the map')


def test_init_cfg():
    model = GlobalMemory(4, 16, init_cfg=dict(type='Constant', layer='Conv2d', val=0.5, bias=0.25))
    model.init_weights()
    for conv in (model.reduce, model.expand):
        assert (conv.weight == 0.5).all() and (conv.bias == 0.25).all()
