"""What all global branches have in common: their place in the bottleneck, options, gradients, dtypes, export."""
import pytest
import torch

from convneur_mm.models import ConvNeur, NeuralMemory
from convneur_mm.models.global_branch import GlobalBranch
from convneur_mm.models.global_branches import GLOBAL_BRANCHES, branch_options

OTHERS = tuple(name for name in GLOBAL_BRANCHES if name != 'neural_memory')
TINY = dict(depths=[1, 1], channels=[8, 12], mem_channels=16)
OPTIONS = {'titans': dict(chunk_size=9)}  # so that the maps below have several segments, the last one short


def make(branch: str, **kwargs) -> GlobalBranch:
    """A branch whose parameters are far enough from their initial values for all of them to show."""
    model = GlobalBranch(6, 16, branch, **OPTIONS.get(branch, {}), **kwargs)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.3 * torch.randn_like(param))
    return model


def test_names():
    assert tuple(GLOBAL_BRANCHES) == ('neural_memory', 'cbam', 'non_local', 'self_attention', 'rwkv', 'titans')
    with pytest.raises(ValueError, match=r"global_branch must be one of .*'titans'.*got 'memory'"):
        ConvNeur(TINY, global_branch='memory', out_indices=0)
    with pytest.raises(ValueError, match=r"global_branch must be one of .*'titans'.*got 'memory'"):
        GlobalBranch(6, 16, 'memory')


@pytest.mark.parametrize('branch', GLOBAL_BRANCHES)
@pytest.mark.parametrize('placement, blocks', [('stage', [1, 1]), ('block', [1, 2])])
def test_backbone_has_the_branch_where_it_is_placed(branch, placement, blocks):
    model = ConvNeur(dict(TINY, depths=[1, 2]), global_branch=branch, placement=placement, out_indices=(0, 1),
                     memory_cfg=dict(mem_channels=32))
    assert [sum(isinstance(m, GLOBAL_BRANCHES[branch]) for m in stage.modules()) for stage in model.stages] == blocks
    for module in model.modules():
        if isinstance(module, GlobalBranch):
            assert module.reduce.out_channels == module.expand.in_channels == 32


def test_a_branch_without_a_place_is_refused():
    with pytest.raises(ValueError, match="global_branch='cbam' needs placement='stage' or 'block', got 'none'"):
        ConvNeur(TINY, global_branch='cbam', placement='none', out_indices=0)


def test_all_have_the_memorys_bottleneck():
    """The same convolutions, norm and output projection around all, under names that tell the branches apart."""
    shared = ('reduce.weight', 'reduce.bias', 'expand.weight', 'expand.bias')
    memory = GlobalBranch(6, 16).state_dict()
    assert set(memory) > {*shared, 'memory.norm.weight', 'memory.norm.bias', 'memory.proj.weight', 'memory.w1'}
    for branch in OTHERS:
        state = make(branch).state_dict()
        assert all(name in shared or name.startswith('mixer.') for name in state), branch
        prefix = 'mixer.memory' if branch == 'titans' else 'mixer'
        assert all(state[name].shape == memory[name].shape for name in shared), branch
        for name in ('norm.weight', 'norm.bias', 'proj.weight'):
            assert state[f'{prefix}.{name}'].shape == memory[f'memory.{name}'].shape, (branch, name)


@pytest.mark.parametrize('branch, options', [
    ('neural_memory', {'chunk_size', 'inner_step', 'head_dim', 'hidden_dim', 'update_rule', 'retrieve',
                       'max_write_norm', 'backend', 'num_chunks', 'step_normalization'}),
    ('cbam', set()), ('non_local', set()), ('self_attention', {'head_dim'}), ('rwkv', set()),
    ('titans', {'chunk_size', 'num_persistent', 'inner_step', 'head_dim', 'hidden_dim', 'max_write_norm', 'backend',
                'num_chunks'}),
])
def test_options_that_a_branch_does_not_have_are_refused(branch, options):
    assert set(branch_options(branch)) == options
    for name in {*branch_options('neural_memory'), 'num_persistent', 'reduction'} - options:
        with pytest.raises(ValueError, match=rf"'mem_channels'.*global_branch='{branch}', got \['{name}'\]"):
            ConvNeur(TINY, global_branch=branch, memory_cfg={name: 1}, out_indices=0)


@pytest.mark.parametrize('branch', OTHERS)
@pytest.mark.parametrize('size', [(5, 7), (1, 1), (1, 6), (8, 8)])
def test_every_parameter_learns_at_odd_sizes(branch, size):
    model = make(branch).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    y = model(x)
    assert y.shape == x.shape and y.isfinite().all()
    (y * torch.randn_like(y)).sum().backward()
    for name, param in model.named_parameters():
        assert param.grad is not None and param.grad.isfinite().all(), name
        if size == (5, 7):
            assert param.grad.any(), name


@pytest.mark.parametrize('branch', OTHERS)
def test_images_do_not_see_each_other(branch):
    model = make(branch).double()
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(model(x), torch.cat([model(image[None]) for image in x]), rtol=0, atol=1e-12)


@pytest.mark.parametrize('branch', OTHERS)
def test_gradients(branch):
    model = GlobalBranch(3, 4, branch, **{'titans': dict(chunk_size=4, head_dim=2, hidden_dim=2, num_persistent=1),
                                          'self_attention': dict(head_dim=2)}.get(branch, {})).double()
    names, params = zip(*model.named_parameters())
    with torch.no_grad():
        for param in params:
            param.add_(0.3 * torch.randn_like(param))

    def call(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values)), (x,))

    x = torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *params), fast_mode=True)


@pytest.mark.parametrize('branch', OTHERS)
def test_half_precision_and_autocast(branch):
    model, x = make(branch), torch.randn(2, 6, 5, 7)
    expected = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        close = model(x)
    half = model.bfloat16()(x.bfloat16())
    assert half.dtype == close.dtype == torch.bfloat16
    for y in (half, close):
        assert (y.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize('branch', OTHERS)
def test_memory_formats_inference_mode_and_the_meta_device(branch):
    model = make(branch).double()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), expected, rtol=0, atol=1e-12)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert model.to('meta')(x.to('meta')).shape == x.shape


@pytest.mark.parametrize('branch', OTHERS)
def test_wrong_numbers_of_tokens_are_named(branch):
    mixer = make(branch).mixer
    for x in (torch.randn(1, 11, 16), torch.randn(1, 12, 15), torch.randn(12, 16)):
        with pytest.raises(ValueError, match=r'shape \(B, 3 \* 4, 16\), got \(' + ', '.join(map(str, x.shape))):
            mixer(x, (3, 4))


@pytest.mark.parametrize('branch', OTHERS)
@pytest.mark.parametrize('fusion', ['gate', 'add', 'concat'])
def test_backbone_trains_with_checkpointing(branch, fusion):
    """The same losses and gradients with blocks recomputed; init_weights leaves Titans' memory as it should be."""
    results = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = ConvNeur(TINY, global_branch=branch, fusion=fusion, with_cp=with_cp, out_indices=1)
        model.init_weights()
        loss = sum(y.square().mean() for y in model(torch.randn(1, 3, 33, 47)))
        loss.backward()
        results.append([loss.detach(), *(param.grad for param in model.parameters())])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)
    if branch == 'titans':
        generators = model.stages[0][0].global_branch.mixer.memory.generators
        assert (generators[2].bias.detach() == torch.tensor([-2.0, 0.0, -4.0]).repeat_interleave(16)).all()


@pytest.mark.parametrize('branch', [name for name in OTHERS if name != 'titans'])  # the memory has operators of its own
def test_export_takes_operators_of_pytorch_alone(branch):
    model = make(branch).eval()
    x = torch.randn(1, 6, 4, 5)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    targets = [node.target for node in program.graph.nodes if node.op == 'call_function']
    assert targets and all(getattr(target, 'namespace', 'aten') == 'aten' for target in targets)


@pytest.mark.parametrize('branch', OTHERS)
def test_deep_inputs_stay_finite(branch):
    for scale in (0.0, 1e-6, 1e3):
        model = make(branch)
        x = (scale * torch.randn(1, 6, 6, 6)).requires_grad_()
        y = model(x)
        y.sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all(), scale


def test_default_branch_is_the_memory():
    default, named = (GlobalBranch(6, 16, *args, chunk_size=9) for args in ((), ('neural_memory',)))
    assert list(default.state_dict()) == list(named.state_dict())
    assert [name for name, _ in default.named_children()] == ['reduce', 'memory', 'expand']
    assert type(default.memory) is NeuralMemory
