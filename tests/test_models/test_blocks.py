"""The blocks of the backbone against their plain form, mmpretrain's and timm's; what training drops and recomputes."""
import copy

import plain_convneur as plain
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from convneur_mm.models.blocks import GRN, ConvNeurBlock, LayerNorm2d
from convneur_mm.models.global_branch import GlobalBranch


def make_block(channels: int, memory: dict | None, fusion: str, **kwargs) -> ConvNeurBlock:
    return ConvNeurBlock(channels, None if memory is None else GlobalBranch(channels, **memory), fusion, **kwargs)


@pytest.mark.parametrize('name', plain.BLOCK_CASES)
def test_equals_the_equations_and_stored_vectors(name):
    plain.check(make_block(**plain.BLOCK_CASES[name][0]), 'block', name)


def check_peer(peer: nn.Module, renames: dict[str, str], size: tuple[int, int]) -> None:
    """Output and gradients of another library's ConvNeXt-V2 block, with a plain block's weights under its names."""
    options, weights, _ = plain.case('block', 'local 3x5')
    block = make_block(**options).double()
    block.load_state_dict(weights)

    def theirs(name: str) -> str:
        for ours, other in renames.items():
            name = name.replace(ours, other)
        return name

    peer.double().load_state_dict({theirs(name): value for name, value in weights.items()})
    x = torch.randn(1, 6, *size, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)
    results = []
    for module, parameters in ((block, list(weights)), (peer, [theirs(name) for name in weights])):
        own, y = dict(module.named_parameters()), module(x)
        results.append([y, *torch.autograd.grad(y, [x, *(own[name] for name in parameters)], direction)])
    for what, found, expected in zip(['the output', 'the input', *weights], *results):
        plain.assert_close(found, expected, what)


@pytest.mark.needs('mmpretrain')
@pytest.mark.parametrize('size', [(3, 5), (9, 7), (1, 1)])
def test_local_branch_is_that_of_mmpretrain(size):
    from mmpretrain.models.backbones.convnext import ConvNeXtBlock

    peer = ConvNeXtBlock(6, norm_cfg=dict(type='LN2d', eps=1e-6), layer_scale_init_value=0.0, use_grn=True)
    check_peer(peer, {}, size)


@pytest.mark.needs('timm')
@pytest.mark.parametrize('size', [(3, 5), (9, 7), (1, 1)])
def test_local_branch_is_that_of_timm(size):
    from timm.models.convnext import ConvNeXtBlock

    check_peer(ConvNeXtBlock(6, use_grn=True, ls_init_value=None), {
        'depthwise_conv': 'conv_dw', 'pointwise_conv1': 'mlp.fc1', 'pointwise_conv2': 'mlp.fc2',
        'grn.gamma': 'mlp.grn.weight', 'grn.beta': 'mlp.grn.bias'}, size)


def test_unknown_fusion_is_named():
    with pytest.raises(ValueError, match=r"fusion must be one of \('gate', 'add', 'concat'\), got 'mul'"):
        ConvNeurBlock(4, fusion='mul')


@pytest.mark.parametrize('fusion', ['gate', 'add', 'concat'])
def test_fusion_without_a_global_branch_has_no_parameters(fusion):
    assert list(ConvNeurBlock(4, fusion=fusion).state_dict()) == list(plain.block_shapes(4, None, fusion))


@pytest.mark.parametrize('fusion', ['gate', 'add', 'concat'])
def test_drop_path_drops_the_fused_output(fusion):
    """Images that are dropped keep X alone, without G; the others get the whole of it, scaled."""
    torch.manual_seed(0)
    block = make_block(4, dict(mem_channels=16), fusion, drop_path_rate=0.5).eval()
    nn.init.normal_(block.grn.gamma)
    x = torch.randn(1, 4, 3, 3).repeat(64, 1, 1, 1)
    full = update(block, x)
    found = update(block.train(), x)
    dropped = (found == 0).flatten(1).all(1)
    assert 10 < dropped.sum() < 54
    assert torch.allclose(found[~dropped], 2 * full[~dropped], atol=1e-5)


def test_layer_norm_2d():
    torch.manual_seed(0)
    norm = LayerNorm2d(5, eps=0.1).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    centred = x - x.mean(1, keepdim=True)
    expected = centred / (x.var(1, unbiased=False, keepdim=True) + 0.1).sqrt()
    plain.assert_close(norm(x), expected * norm.weight[:, None, None] + norm.bias[:, None, None], 'the norm')


def make_grn(**kwargs) -> GRN:
    torch.manual_seed(0)
    grn = GRN(8, **kwargs).double()
    for p in grn.parameters():
        nn.init.normal_(p)
    return grn


@pytest.mark.parametrize('kwargs, eps', [(dict(), 1e-6), (dict(eps=0.1), 0.1)])
@pytest.mark.parametrize('scale', [1.0, 1e-6])
def test_grn(kwargs, eps, scale):
    """Also at a scale at which the mean response is of eps' order."""
    grn = make_grn(**kwargs)
    x = scale * torch.randn(2, 3, 4, 8, dtype=torch.float64)
    response = x.norm(dim=(1, 2), keepdim=True)
    expected = grn.gamma * x * response / (response.mean(-1, keepdim=True) + eps) + grn.beta + x
    plain.assert_close(grn(x), expected, 'the response')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_grn_scale_of_half_precision(dtype):
    """Norms of 90,000 here, beyond float16; statistics and scale are float32's."""
    grn = make_grn().float()
    x = (1e4 * torch.randn(2, 9, 9, 8)).to(dtype)
    assert grn.scale(x).dtype == torch.float32
    plain.assert_close(grn.scale(x), grn.scale(x.float()), 'the scale', tolerance=1e-5)


def test_grn_in_half_precision():
    """In bfloat16: not all supported versions of torch have float16's operators on a CPU."""
    grn, x = make_grn().float(), torch.randn(2, 9, 9, 8).bfloat16()
    y, expected = grn(x), grn(x.float())
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() < 2 * torch.finfo(torch.bfloat16).eps * expected.norm()


def test_grn_of_a_channel_of_zeros():
    """Such a channel is dead, not a NaN in every gradient."""
    grn = make_grn()
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    x[..., 2] = 0
    y = grn(x.requires_grad_())
    y.square().sum().backward()
    assert torch.equal(y[..., 2], grn.beta[2].expand(2, 3, 4))
    for gradient in (x.grad, grn.gamma.grad, grn.beta.grad):
        assert gradient.isfinite().all()


def test_with_cp_gives_the_same_gradients():
    """Also of some inputs alone, which PyTorch's older, reentrant checkpoint refuses."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for with_cp in (False, True):
        torch.manual_seed(1)
        block = make_block(4, dict(mem_channels=16), 'gate', with_cp=with_cp).double()
        y = block(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, block.norm.weight])))
    for found, expected in zip(*results):
        plain.assert_close(found, expected, 'with_cp')


@pytest.mark.parametrize('fusion', ['gate', 'add', 'concat'])
def test_with_cp_keeps_less(fusion):
    """Of a block nothing stays for the backward pass but its input."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 7, requires_grad=True)
    kept = {}
    for with_cp in (False, True):
        block, tensors = make_block(4, dict(mem_channels=16), fusion, with_cp=with_cp), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=tensors: to.append(t) or t, lambda t: t):
            block(x)
        parameters = {p.untyped_storage().data_ptr() for p in [x, *block.parameters()]}
        kept[with_cp] = sum(t.numel() for t in tensors if t.untyped_storage().data_ptr() not in parameters)
    assert kept[False] > 16 * x.numel()
    assert kept[True] <= x.numel()


@pytest.mark.parametrize('rule', ['sequential', 'parallel'])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_block_compiles_in_one_graph(rule, dtype, tolerance):
    """Three chunks, two of them written; the compiler's own kernels are left out, as they take a minute to build."""
    torch.manual_seed(0)
    block = ConvNeurBlock(8, GlobalBranch(8, 16, chunk_size=16, update_rule=rule)).to(dtype)
    torch.nn.init.normal_(block.grn.gamma)
    x = torch.randn(2, 8, 6, 6, dtype=dtype, requires_grad=True)
    inputs = [x, *block.parameters()]
    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend='aot_eager')):
        y = function(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for a, b in zip(*results):
        assert (a - b).norm() <= tolerance * b.norm()


class Adapted(nn.Module):
    """A linear layer or 1×1 convolution with something added, as adapters have it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias
        self.delta = nn.Parameter(torch.randn_like(base.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        function = F.conv2d if self.weight.dim() == 4 else F.linear
        return self.base(x) + function(x, self.delta)


@pytest.mark.parametrize('size', [(1, 3), (12, 16)])
@pytest.mark.parametrize('name', ['depthwise_conv', 'norm', 'pointwise_conv1', 'grn', 'pointwise_conv2',
                                  'global_branch.reduce', 'global_branch.memory', 'global_branch.expand'])
def test_hooks_run_at_every_size(name, size):
    """And change nothing: what is faster than a call gives way to it."""
    block = ConvNeurBlock(8, GlobalBranch(8, 16)).double()
    for p in block.parameters():
        nn.init.normal_(p)
    x, calls = torch.randn(2, 8, *size, dtype=torch.float64), []
    expected = block(x)
    block.get_submodule(name).register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    assert (block(x) - expected).norm() <= 1e-12 * expected.norm()
    assert len(calls) == 1


@pytest.mark.parametrize('size', [(1, 3), (12, 16)])
@pytest.mark.parametrize('name', ['pointwise_conv1', 'pointwise_conv2', 'global_branch.reduce', 'global_branch.expand'])
def test_adapters_work_at_every_size(name, size):
    block = ConvNeurBlock(8, GlobalBranch(8, 16)).double()
    for p in block.parameters():
        nn.init.normal_(p)
    merged, x = copy.deepcopy(block), torch.randn(2, 8, *size, dtype=torch.float64)
    parent, _, last = name.rpartition('.')
    adapted = Adapted(block.get_submodule(name))
    setattr(block.get_submodule(parent), last, adapted)
    merged.get_submodule(name).weight.data += adapted.delta.data
    assert (block(x) - merged(x)).norm() <= 1e-12 * merged(x).norm()


def update(block: ConvNeurBlock, x: torch.Tensor) -> torch.Tensor:
    """What a block adds to (N, C, H, W), the same for each equal image unless it is dropped."""
    with torch.no_grad():
        return block(x) - x


@pytest.mark.parametrize('rate', [0.25, 0.8])
def test_drop_path(rate):
    """Whole images are dropped, others scaled so that the mean stays; nothing is dropped outside training."""
    torch.manual_seed(0)
    block = ConvNeurBlock(4, drop_path_rate=rate).eval()
    x = torch.randn(1, 4, 3, 3).repeat(4000, 1, 1, 1)
    full = update(block, x)
    assert (full != 0).flatten(1).any(1).all()
    block.train()
    found = update(block, x)
    dropped = (found == 0).flatten(1).all(1)
    assert abs(dropped.float().mean() - rate) < 0.05
    assert torch.allclose(found[~dropped], full[~dropped] / (1 - rate), atol=1e-5)


@pytest.mark.parametrize('rule', ['sequential', 'parallel'])
def test_compiled_once_for_all_sizes(rule):
    """Of six image sizes: once for the first, once for all others; outputs and gradients equal the eager ones."""
    block = ConvNeurBlock(8, GlobalBranch(8, 16, chunk_size=30, update_rule=rule)).double()
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.1 * torch.randn_like(p))
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for size in (9, 7), (4, 5), (12, 11), (3, 40), (16, 2), (10, 10):
        x, results = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True), []
        for function in (block, compiled):
            y = function(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])])
        for a, b in zip(*results):
            assert (a - b).norm() <= 1e-10 * a.norm()
    assert counter.frame_count <= 2
