"""Optimizer wrappers of our own, and what --amp makes of a config's."""
import contextlib
import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from mmcv.ops import ModulatedDeformConv2dPack
from mmengine.optim import AmpOptimWrapper, OptimWrapper, build_optim_wrapper
from torch import nn

from convneur_mm.engine import BFloat16OptimWrapper
from convneur_mm.engine.launch import LaunchError
from convneur_mm.models import ConvNeur

TRAIN = Path(__file__).parents[3] / 'tools' / 'train.py'


@pytest.fixture(scope='module')
def train():
    spec = importlib.util.spec_from_file_location('train_tool', TRAIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sgd(**kwargs):
    return dict(optimizer=dict(type='SGD', lr=0.5), **kwargs)


class Net(nn.Module):
    """Notes the dtype in which its layer computes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        self.out = self.layer(x)
        return self.out.float().square().mean()


def step(net, optim_wrapper, x):
    with optim_wrapper.optim_context(net):
        loss = net(x)
    optim_wrapper.update_params(loss)


def test_bfloat16_on_a_cpu():
    """Layers compute in it; weights, gradients and the step stay in float32, and no loss is scaled."""
    torch.manual_seed(0)
    net, other, x = Net(), Net(), torch.randn(8, 4)
    other.load_state_dict(net.state_dict())
    optim_wrapper = build_optim_wrapper(net, sgd(type='BFloat16OptimWrapper'))
    assert type(optim_wrapper) is BFloat16OptimWrapper
    step(net, optim_wrapper, x)
    assert net.out.dtype == torch.bfloat16
    step(other, OptimWrapper(torch.optim.SGD(other.parameters(), lr=0.5)), x)
    assert other.out.dtype == torch.float32
    assert net.layer.weight.dtype == torch.float32
    assert not torch.equal(net.layer.weight, other.layer.weight)
    torch.testing.assert_close(net.layer.weight, other.layer.weight, rtol=0.02, atol=0.01)
    assert 'loss_scaler' not in optim_wrapper.state_dict()


def test_bfloat16_is_not_left_to_the_device(monkeypatch):
    """A GPU's own is float16, which needs a scaler."""
    found = {}
    monkeypatch.setattr('convneur_mm.engine.runner.optim.autocast', lambda **kwargs: found.update(kwargs) or
                        contextlib.nullcontext())
    net = Net()
    step(net, build_optim_wrapper(net, sgd(type='BFloat16OptimWrapper')), torch.ones(1, 4))
    assert found == dict(dtype=torch.bfloat16)


def test_bfloat16_accumulates():
    """As OptimWrapper does: it is one, but for the context."""
    torch.manual_seed(0)
    net, x = Net(), torch.randn(8, 4)
    optim_wrapper = build_optim_wrapper(net, sgd(type='BFloat16OptimWrapper', accumulative_counts=2))
    before = net.layer.weight.clone()
    step(net, optim_wrapper, x)
    assert torch.equal(net.layer.weight, before)
    step(net, optim_wrapper, x)
    assert not torch.equal(net.layer.weight, before)


@pytest.mark.parametrize('scale, scaler', [
    (dict(), dict()), (dict(loss_scale=512.0), dict(init_scale=512.0)),
    (dict(loss_scale=dict(init_scale=256.0, growth_interval=7)), dict(init_scale=256.0, growth_interval=7)),
])
def test_a_loss_scale_of_the_config_stays(scale, scaler, train, monkeypatch):
    cfg = sgd(type='OptimWrapper', **scale)
    train.use_amp(cfg, 'fp16')
    # MMEngine asks for a GPU when it builds the wrapper.
    amp, found = 'mmengine.optim.optimizer.amp_optimizer_wrapper', []
    monkeypatch.setattr(f'{amp}.is_cuda_available', lambda: True)
    monkeypatch.setattr(f'{amp}.GradScaler', lambda **kwargs: found.append(kwargs))
    assert type(build_optim_wrapper(Net(), cfg)) is AmpOptimWrapper
    assert found == [scaler]


def test_bf16_takes_its_own_wrapper(train):
    cfg = sgd(clip_grad=dict(max_norm=1.0))
    train.use_amp(cfg, 'bf16')
    optim_wrapper = build_optim_wrapper(Net(), cfg)
    assert type(optim_wrapper) is BFloat16OptimWrapper and optim_wrapper.clip_grad_kwargs == dict(max_norm=1.0)


@pytest.mark.parametrize('settings, precision, message', [
    (dict(loss_scale=512.0), 'bf16', '--amp bf16 takes no optim_wrapper.loss_scale, got 512.0'),
    (dict(type='AmpOptimWrapper', dtype='float16'), 'bf16', "--amp bf16 takes no optim_wrapper.dtype, got 'float16'"),
    (dict(type='ApexOptimWrapper'), 'fp16', '--amp fp16 goes with .* OptimWrapper, got ApexOptimWrapper'),
    (dict(type='BFloat16OptimWrapper'), 'fp16', '--amp fp16 .* got BFloat16OptimWrapper'),
])
def test_what_does_not_go_together_is_named(settings, precision, message, train):
    with pytest.raises(LaunchError, match=message):
        train.use_amp(sgd(**settings), precision)


class Head(nn.Module):

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(2, 2), nn.BatchNorm2d(2)
        self.factor = nn.Parameter(torch.ones(()))


def test_flat_parameters_of_custom_keys():
    model = nn.ModuleDict(dict(backbone=Head(), head=Head(), other=Head()))
    optim_wrapper = build_optim_wrapper(model, dict(
        constructor='GroupingConstructor', optimizer=dict(type='SGD', lr=1.0, weight_decay=0.1),
        paramwise_cfg=dict(flat_decay_mult=0.5, custom_keys={
            'head.': dict(lr_mult=3.0), 'other.': dict(lr_mult=2.0, decay_mult=0.25)})))
    groups = {id(param): group for group in optim_wrapper.param_groups for param in group['params']}
    found = {name: (groups[id(param)]['lr'], groups[id(param)]['weight_decay'])
             for name, param in model.named_parameters()}
    for name, lr_decay in {
            'backbone.linear.weight': (1, 0.1), 'backbone.linear.bias': (1, 0.05), 'backbone.norm.weight': (1, 0.05),
            'head.linear.weight': (3, 0.1), 'head.linear.bias': (3, 0.05), 'head.norm.weight': (3, 0.05),
            'head.factor': (3, 0.05), 'other.linear.weight': (2, 0.025), 'other.linear.bias': (2, 0.025)}.items():
        assert found[name] == pytest.approx(lr_decay), name


def test_parameters_of_the_same_options_share_a_group():
    """Each parameter is in one, and is updated as on its own."""
    torch.manual_seed(0)
    paramwise = dict(flat_decay_mult=0.0, custom_keys={'head.': dict(lr_mult=3.0)})
    settings = dict(optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.1), paramwise_cfg=paramwise)
    model = nn.ModuleDict(dict(backbone=Head(), head=Head(), other=Head()))
    twin = copy.deepcopy(model)
    wrapper = build_optim_wrapper(model, dict(settings, constructor='GroupingConstructor'))
    groups = wrapper.optimizer.param_groups
    assert sorted(len(group['params']) for group in groups) == [1, 4, 4, 6]
    assert len({id(param) for group in groups for param in group['params']}) == 15

    # MMEngine's, with what it lacks written out for each parameter.
    names = {name: dict(lr_mult=3.0, decay_mult=float(param.ndim > 1))
             for name, param in twin.named_parameters() if name.startswith('head')}
    paramwise = dict(flat_decay_mult=0.0, custom_keys=names)
    reference = build_optim_wrapper(twin, dict(settings, paramwise_cfg=paramwise))
    for _ in range(3):
        for param, other in zip(model.parameters(), twin.parameters()):
            param.grad = torch.randn_like(param)
            other.grad = param.grad.clone()
        wrapper.step()
        reference.step()
    for (name, param), other in zip(model.named_parameters(), twin.parameters()):
        assert torch.equal(param, other), name


def test_without_weight_decay():
    model = nn.ModuleDict(dict(head=Head()))
    optim_wrapper = build_optim_wrapper(model, dict(
        constructor='GroupingConstructor', optimizer=dict(type='SGD', lr=1.0),
        paramwise_cfg=dict(flat_decay_mult=0.0, custom_keys={'head.': dict(lr_mult=3.0)})))
    assert {(group['lr'], group['weight_decay']) for group in optim_wrapper.optimizer.param_groups} == {(3.0, 0)}


def test_offsets_of_deformable_convolutions():
    """MMEngine's option for them: their biases are no biases of a layer, and have a learning rate of their own."""
    model = nn.ModuleDict(dict(dcn=ModulatedDeformConv2dPack(2, 2, 1), linear=nn.Linear(2, 2)))
    optim_wrapper = build_optim_wrapper(model, dict(
        constructor='GroupingConstructor', optimizer=dict(type='SGD', lr=1.0, weight_decay=0.1),
        paramwise_cfg=dict(dcn_offset_lr_mult=0.25, bias_decay_mult=0.0)))
    groups = {id(param): group for group in optim_wrapper.param_groups for param in group['params']}
    offset, bias = groups[id(model.dcn.conv_offset.bias)], groups[id(model.linear.bias)]
    assert (offset['lr'], offset['weight_decay']) == (0.25, 0.1)
    assert (bias['lr'], bias['weight_decay']) == (1.0, 0.0)


class TestLayerDecay:

    @staticmethod
    def rates(model, **paramwise):
        """Learning rate by name of parameter, with a rate of 1 for all."""
        optim_wrapper = build_optim_wrapper(model, dict(
            constructor='GroupingConstructor', optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.1),
            paramwise_cfg=dict(flat_decay_mult=0.0, **paramwise)))
        names = {id(param): name for name, param in model.named_parameters()}
        return {names[id(param)]: group['lr'] for group in optim_wrapper.optimizer.param_groups
                for param in group['params']}

    @pytest.fixture(scope='class')
    def model(self):
        arch = dict(depths=[1, 1, 7, 1], channels=[8] * 4, mem_channels=16)
        return nn.ModuleDict(dict(backbone=ConvNeur(arch), neck=nn.Linear(2, 2), head=nn.Linear(2, 2)))

    def test_rates_fall_towards_the_image(self, model):
        """The stem is layer 0 of eight; three blocks of the third stage share one; heads keep their rate."""
        rates = self.rates(model, layer_decay_rate=0.5, custom_keys={
            'head.': dict(lr_mult=10.0), '.global_branch.': dict(lr_mult=3.0)})
        for name, layer, mult in (
                ('backbone.downsample_layers.0.0.weight', 0, 1), ('backbone.downsample_layers.1.1.weight', 2, 1),
                ('backbone.downsample_layers.2.1.bias', 3, 1), ('backbone.downsample_layers.3.1.weight', 6, 1),
                ('backbone.stages.0.0.depthwise_conv.weight', 1, 1), ('backbone.stages.1.0.depthwise_conv.bias', 2, 1),
                ('backbone.stages.2.0.pointwise_conv1.bias', 3, 1), ('backbone.stages.2.2.pointwise_conv1.bias', 3, 1),
                ('backbone.stages.2.3.pointwise_conv1.bias', 4, 1), ('backbone.stages.2.6.pointwise_conv1.bias', 5, 1),
                ('backbone.stages.3.0.pointwise_conv1.bias', 6, 1), ('backbone.norm0.weight', 7, 1),
                ('backbone.stages.0.0.global_branch.memory.w1', 1, 3), ('neck.weight', 7, 1), ('head.weight', 7, 10)):
            assert rates[name] == pytest.approx(mult * 0.5 ** (7 - layer)), name

    def test_as_mmpretrain_has_it_for_convnext(self, model):
        convnext = pytest.importorskip('mmpretrain.models').ConvNeXt(dict(depths=[1, 1, 7, 1], channels=[8] * 4))
        for name in ('downsample_layers.0.0.weight', 'downsample_layers.3.1.bias', 'stages.2.5.x', 'stages.3.0.x',
                     'norm3.weight'):
            name = f'backbone.{name}'
            assert model['backbone'].get_layer_depth(name, 'backbone.') == convnext.get_layer_depth(name, 'backbone.')

    @pytest.mark.parametrize('depths, stages', [([3], [1]), ([1, 2], [1, 2]), ([2, 2, 27, 2], [1, 2, 11, 12])])
    def test_other_depths(self, depths, stages):
        """The last block of each stage, and the layers of the backbone, the stem and what is above them."""
        backbone = ConvNeur(dict(depths=depths, channels=[8] * len(depths), mem_channels=16),
                            out_indices=len(depths) - 1)
        assert [backbone.get_layer_depth(f'stages.{i}.{depth - 1}.x') for i, depth in enumerate(depths)] == [
            (layer, stages[-1] + 2) for layer in stages]

    def test_without_it_nothing_changes(self, model):
        assert set(self.rates(model).values()) == {1.0}

    def test_refusals(self, model):
        for rate in 0, 1.5:
            with pytest.raises(ValueError, match=fr'layer_decay_rate must be in \(0, 1\], got {rate}'):
                self.rates(model, layer_decay_rate=rate)
        with pytest.raises(ValueError, match='needs a backbone with get_layer_depth.*got Linear'):
            self.rates(nn.ModuleDict(dict(backbone=nn.Linear(2, 2))), layer_decay_rate=0.5)
