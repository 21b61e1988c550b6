"""The memory as a layer: its options, equality of its backends, segments, autocast, initial weights."""
import numpy as np
import plain_convneur as plain
import pytest
import torch
from mmengine.model import BaseModule
from torch import nn
from torch.nn.utils import prune

from convneur_mm.models import ConvNeur, NeuralMemory
from convneur_mm.models.global_branches import neural_memory as memory_module
from convneur_mm.ops.neural_memory import NORMALIZE_EPS, MemoryState

pytestmark = pytest.mark.usefixtures('both_codes')


def make_layer(seed: int = 0, **kwargs) -> NeuralMemory:
    torch.manual_seed(seed)
    layer = NeuralMemory(32, **kwargs)
    for p in layer.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return layer


@pytest.mark.parametrize('name', ['chunks of 9', 'inner_step', 'update_rule', 'retrieve', 'max_write_norm', 'head_dim',
                                  'hidden_dim', 'mem_channels', 'defaults'])
def test_options_are_those_of_the_plain_form(name):
    """Also the defaults, over two chunks."""
    options, weights, x = plain.case('global', name)
    weights, options = plain.part(weights, 'memory'), plain.without(options, 'in_channels')
    layer = NeuralMemory(options.pop('mem_channels'), **options).double()
    layer.load_state_dict(weights)
    tokens = plain.uniform((1, x[0, 0].numel(), layer.channels), np.random.default_rng(3))
    plain.assert_close(layer(tokens)[0], plain.neural_memory(tokens[0], weights, **options), 'the tokens')


def test_a_normalised_step():
    """Equals the reference, at sizes that are segments too, and begins with a larger step."""
    layer = make_layer(chunk_size=9, step_normalization=0.25).double()
    x = torch.randn(2, 9000, 32, dtype=torch.float64)
    with torch.no_grad():
        found = layer(x), layer(x[:, :40])
        layer.backend = 'reference'
        assert all((y - layer(x[:, :y.size(1)])).norm() <= 1e-12 * y.norm() for y in found)
        layer.step_normalization = 0.0
        assert (layer(x[:, :40]) - found[1]).norm() > 1e-3 * found[1].norm()
    step, _, _ = NeuralMemory(32, step_normalization=0.25).generators[2].bias.chunk(3)
    assert (step == 2).all()
    with pytest.raises(ValueError, match='step_normalization must be a finite number of at least 0, got -1'):
        NeuralMemory(32, step_normalization=-1)


@pytest.mark.parametrize('tokens, chunk_size', [(50, 13), (52, 13), (3, 1)])
def test_chunks_by_their_number(tokens, chunk_size):
    x = torch.randn(2, tokens, 32)
    expected = make_layer(chunk_size=chunk_size)(x)
    assert torch.equal(make_layer(num_chunks=4)(x), expected)
    assert (make_layer(chunk_size=chunk_size + 1)(x) - expected).norm() > 1e-3 * expected.norm()


def test_backend_is_the_one_asked_for():
    with pytest.raises(ValueError, match="backend 'triton' needs Triton and CUDA tensors"):
        NeuralMemory(16, backend='triton')(torch.randn(1, 3, 16))


def assert_initial(layer: NeuralMemory) -> None:
    """Projections of std 0.02, M_0 of its fan-in's, a small step, a half momentum and hardly any decay."""
    linears = (layer.query, layer.key, layer.value, layer.proj, layer.generators[0], layer.generators[2])
    for linear in linears:
        assert abs(linear.weight.std().item() - 0.02) < 0.001 and abs(linear.weight.mean().item()) < 0.002
    assert all(linear.bias is None for linear in linears[:4])
    assert abs(layer.w1.std().item() - 16**-0.5) < 0.02 and abs(layer.w2.std().item() - 8**-0.5) < 0.02
    assert (layer.norm.weight == 1).all() and (layer.norm.bias == 0).all()
    assert (layer.generators[0].bias == 0).all()
    step, momentum, decay = layer.generators[2].bias.chunk(3)
    assert (step == -2).all() and (momentum == 0).all() and (decay == -4).all()


def test_initial_weights():
    layer = NeuralMemory(128)
    assert_initial(layer)
    for p in layer.parameters():
        p.data.fill_(0.5)
    layer.reset_parameters()
    assert_initial(layer)


def test_a_model_s_init_cfg_does_not_reach_the_memory():
    """It comes first, and the memory's own initialisation after it, once."""
    torch.manual_seed(0)
    model = BaseModule(init_cfg=[dict(type='Constant', layer=['Linear', 'LayerNorm'], val=0.5, bias=0.5)])
    model.memory, model.other = NeuralMemory(128), nn.Linear(3, 3)
    model.init_weights()
    assert (model.other.weight == 0.5).all()
    assert_initial(model.memory)
    model.memory.w1.data.fill_(0.5)
    model.memory.init_weights()
    assert (model.memory.w1 == 0.5).all(), 'a second call changes nothing'


def test_init_cfg():
    """One's own comes on top of the layer's, and keeps what it does not name."""
    layer = NeuralMemory(128, init_cfg=dict(type='Constant', layer='LayerNorm', val=0.25, bias=0.75))
    model = BaseModule(init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0))
    model.memory = layer
    model.init_weights()
    assert (layer.norm.weight == 0.25).all() and (layer.norm.bias == 0.75).all()
    layer.norm.reset_parameters()
    assert_initial(layer)  # whatever the model around it says of linear layers


def test_the_state_is_returned_if_asked_for():
    layer = NeuralMemory(16, chunk_size=2)
    y, state = layer(torch.randn(1, 5, 16), return_state=True)
    assert isinstance(state, MemoryState) and y.shape == (1, 5, 16)
    assert isinstance(layer(torch.randn(1, 5, 16)), torch.Tensor)


def gradients(layer, x, state, backend, order=1):
    """Outputs of the layer, and gradients of all its inputs and parameters, of the second order if asked for."""
    layer.backend = backend
    y, new_state = layer(x, state=state, return_state=True)
    outputs = (y, *new_state)
    torch.manual_seed(1)
    loss = sum((torch.randn(o.shape) * o.sin()).sum() for o in outputs)
    inputs = [x, *(state or ()), *layer.parameters()]
    grads = torch.autograd.grad(loss, inputs, create_graph=order > 1, allow_unused=True, materialize_grads=True)
    if order > 1:
        grads = (*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), inputs))
    return [*outputs, *grads]


def short_tokens(layer):
    """Queries of the first head shorter than NORMALIZE_EPS, and keys of the second one around it."""
    with torch.no_grad():
        layer.query.weight[:16] *= 1e-4
        layer.key.weight[16:] *= NORMALIZE_EPS / layer.key(layer.norm(torch.randn(9, 32)))[:, 16:].norm(dim=1).median()


@pytest.mark.parametrize('options', [
    dict(), dict(update_rule='parallel'), dict(retrieve='final'), dict(chunk_size=100)], ids=str)
@pytest.mark.parametrize('with_state', [False, True], ids=['fresh', 'state'])
def test_layer_equals_reference(options, with_state):
    """All gradients; 45 tokens are 5.6 chunks."""
    layer = make_layer(**dict(dict(chunk_size=8), **options))
    short_tokens(layer)
    layer.double()
    x = torch.randn(2, 45, 32, dtype=torch.float64)
    x[0, 7] = 0.5  # nothing is left of it by the LayerNorm
    state = None
    if with_state:
        state = MemoryState(*(s.detach().requires_grad_() for s in layer(torch.randn_like(x), return_state=True)[1]))
    x.requires_grad_()
    for fast, exact in zip(gradients(layer, x, state, 'auto'), gradients(layer, x, state, 'reference')):
        assert (fast - exact).norm() <= 1e-10 * exact.norm()


def test_layer_equals_reference_to_second_order():
    layer = make_layer(chunk_size=8).double()
    x = torch.randn(2, 21, 32, dtype=torch.float64, requires_grad=True)
    for fast, exact in zip(gradients(layer, x, None, 'auto', 2), gradients(layer, x, None, 'reference', 2)):
        assert (fast - exact).norm() <= 1e-9 * exact.norm()


def test_single_chunk_has_zero_gradients():
    """A single chunk writes nothing; plain DDP still wants gradients of what only writing needs."""
    for backend in ('auto', 'reference'):
        layer = make_layer(chunk_size=8, backend=backend)
        layer(torch.randn(2, 8, 32)).sum().backward()
        for p in (layer.key.weight, layer.value.weight, *layer.generators.parameters()):
            assert p.grad.eq(0).all()
        assert layer.w1.grad.ne(0).any() and layer.query.weight.grad.ne(0).any()


@pytest.mark.parametrize('rule', ['sequential', 'parallel'])
def test_segments_without_gradients(monkeypatch, rule):
    """Long inputs pass in segments of whole chunks: of 16 tokens of two images here, the last of them shorter."""
    layer = make_layer(chunk_size=8, update_rule=rule).double()
    x = torch.randn(2, 45, 32, dtype=torch.float64)
    expected, expected_state = layer(x, return_state=True)
    monkeypatch.setattr(memory_module, 'CPU_TOKENS', 40)
    monkeypatch.setattr(memory_module, 'CPU_SEGMENT_TOKENS', 40)
    with torch.no_grad():
        y, state = layer(x, return_state=True)
        assert (layer(x) - expected).norm() <= 1e-12 * expected.norm()
    assert (y - expected).norm() <= 1e-12 * expected.norm()
    for a, b in zip(state, expected_state):
        assert (a - b).norm() <= 1e-12 * b.norm()


def test_what_is_kept_for_the_backward():
    """Per token its own numbers, LayerNorm's, queries, keys and values, and the reads; per chunk three memories."""
    layer, kept, chunks, tokens = make_layer(chunk_size=64), {}, 512, 4 * 2**13

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(1, tokens, 32).requires_grad_()).sum()
    assert sum(kept.values()) < 1.05 * 4 * (6 * 32 * tokens + chunks * (3 * 2 * 16 * 16 + 8 * 32) + 2 * tokens) + 2**18


@pytest.mark.parametrize('backend', ['auto', 'reference'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_inner_loop_in_float32(backend, dtype):
    """The state is float32 and as close to float32's as projections in half precision allow."""
    layer = make_layer(chunk_size=8, backend=backend)
    x = torch.randn(2, 60, 32)
    exact, exact_state = layer(x, return_state=True)
    with torch.autocast('cpu', dtype=dtype):
        y, state = layer(x, return_state=True)
    assert y.dtype == dtype
    assert all(s.dtype == torch.float32 for s in state)
    assert (state.w1 - exact_state.w1).norm() < 0.02 * exact_state.w1.norm()
    assert (y - exact).norm() < 0.03 * exact.norm()
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize('options, message', [
    (dict(channels=40), 'channels must be a multiple of head_dim, got channels=40, head_dim=16'),
    (dict(channels=0), 'channels must be an integer of at least 1, got 0'),
    (dict(channels=16.0), 'channels must be an integer of at least 1, got 16.0'),
    (dict(channels=32, head_dim=-1), 'head_dim must be an integer of at least 1, got -1'),
    (dict(channels=32, hidden_dim=0), 'hidden_dim must be an integer of at least 1, got 0'),
    (dict(channels=32, num_chunks=0), 'num_chunks must be an integer of at least 1, got 0'),
    (dict(channels=32, num_chunks=2.0), 'num_chunks must be an integer of at least 1, got 2.0'),
    (dict(channels=32, inner_step=1.5), 'inner_step .*1.5'),
    (dict(channels=32, backend='gpu'), "backend .*'gpu'"),
])
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        NeuralMemory(**options)


def test_parameters_in_half_precision():
    layer = make_layer(chunk_size=8)
    x = torch.randn(2, 20, 32)
    exact = layer(x)
    y = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() < 0.03 * exact.norm()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r'expected tokens of shape \(B, N, 32\), got \(2, 5, 16\)'):
        make_layer()(torch.zeros(2, 5, 16))
    with pytest.raises(ValueError, match=r'expected tokens of shape \(B, N, 32\), got \(5, 32\)'):
        make_layer()(torch.zeros(5, 32))


class Adapter(nn.Module):
    """LoRA around a linear layer; as usual its second factor begins at zero."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize('size', [32, 224])
def test_parts_are_ordinary_modules(size):
    """An adapter, pruning and a hook train two steps, and each changes what the backbone returns."""
    arch = dict(depths=[1, 1], channels=[16, 16], mem_channels=32)
    model = ConvNeur(arch, out_indices=(1,), memory_cfg=dict(chunk_size=13))
    image, seen = torch.randn(2, 3, size, size), []
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    memory, (before,) = model.stages[0][0].global_branch.memory, model(image)
    memory.query = Adapter(memory.query)
    assert torch.allclose(model(image)[0], before, atol=1e-5)
    memory.norm.register_forward_hook(lambda module, args, output: (seen.append(output.shape), 0.5 * output)[1])
    (hooked,) = model(image)
    assert seen == [(2, (size // 4)**2, 32)] and not torch.allclose(hooked, before, atol=1e-4)
    prune.l1_unstructured(memory.key, 'weight', amount=0.9)
    (pruned,) = model(image)
    assert not torch.allclose(pruned, hooked, atol=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(image)[0].square().mean().backward()
        optimizer.step()
    assert memory.query.up.weight.abs().max() > 0
    assert memory.key.weight.eq(0).float().mean() > 0.89 and memory.key.weight_orig.grad.ne(0).any()
    assert not torch.allclose(model(image)[0], pruned, atol=1e-5)


@pytest.mark.parametrize('name', ['norm', 'query', 'key', 'value', 'proj'])
def test_hooks_of_every_part_run(name):
    """Also what they return is taken, with gradients and without, in segments and not."""
    layer, x, seen = make_layer(chunk_size=8), torch.randn(2, 45, 32), []
    before = layer(x)
    layer.get_submodule(name).register_forward_hook(
        lambda module, args, output: (seen.append(0), output + output.roll(1, -1))[1])
    found = layer(x)
    with torch.no_grad():
        assert torch.allclose(layer(x), found, atol=1e-5)
    assert len(seen) == 2 and not torch.allclose(found, before, atol=1e-4)


@pytest.mark.parametrize('index', [0, 2])
def test_generators_that_would_have_no_effect_are_refused(index):
    """They are never called, so an adapter and pruning would be ignored in silence."""
    pruned, adapted = make_layer(), make_layer()
    prune.l1_unstructured(pruned.generators[index], 'weight', amount=0.5)
    adapted.generators[index] = Adapter(adapted.generators[index])
    for layer in pruned, adapted:
        with pytest.raises(ValueError, match=f'generators.{index} of a NeuralMemory .* would have no effect'):
            layer(torch.zeros(1, 3, 32))
    prune.remove(pruned.generators[index], 'weight')
    pruned(torch.zeros(1, 3, 32))


def test_parametrised_weights_take_effect():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer, x = make_layer(), torch.randn(1, 20, 32)
    twin = make_layer()
    twin.proj.weight.data *= 2
    nn.utils.parametrize.register_parametrization(layer.proj, 'weight', Double())
    torch.testing.assert_close(layer(x), twin(x))
