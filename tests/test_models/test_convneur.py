"""The backbone: published counts, its plain form, ConvNeXt-V2, contiguity, gradients, options, errors."""
import re
import warnings
from contextlib import contextmanager
from functools import partial
from importlib import import_module

import plain_convneur as plain
import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.model import PretrainedInit
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convneur_mm.models import ConvNeur, NeuralMemory

ARCHS = ('m1', 'm2', 'm3', 'm4', 'm5', 'm6')
TINY = dict(depths=[1, 2, 1, 1], channels=[16, 24, 32, 48], mem_channels=16)


def randomize(model: nn.Module, seed: int = 0, std: float = 0.1) -> nn.Module:
    """Moves every parameter off its initial value, so that GRN, biases and gates all take part."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=torch.float64).to(p) * std)
    return model


@pytest.mark.parametrize('name', plain.BACKBONE_CASES)
def test_equals_the_equations_and_stored_vectors(name):
    plain.check(ConvNeur(**plain.BACKBONE_CASES[name][0]), 'backbone', name)


@pytest.mark.parametrize('options', [dict(with_cp=True), dict(channels_last=False), dict(out_indices=(-3, -2, -1))],
                         ids=str)
def test_options_that_change_no_value(options):
    plain.check(ConvNeur(**dict(plain.BACKBONE, **options)), 'backbone', 'base')


def classifier_counts(**kwargs) -> tuple[float, float]:
    """Millions of parameters and G multiply-accumulates at 224² of the backbone with a 1000-class linear head."""
    model = ConvNeur(out_indices=3, gap_before_final_norm=True, **kwargs).eval()
    head = nn.Linear(model.channels[-1], 1000)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        head(model(torch.zeros(1, 3, 224, 224))[-1])
    params = sum(p.numel() for module in (model, head) for p in module.parameters())
    return params / 1e6, counter.get_total_flops() / 2 / 1e9


def test_archs_are_those_of_the_docstring():
    table = re.findall(r'^ +\| (m\d) +\| (.+?) +\| (.+?) +\| (\d+) +\|$', ConvNeur.__doc__, re.MULTILINE)
    assert {arch: (settings['depths'], settings['channels'], settings['mem_channels'])
            for arch, settings in ConvNeur.arch_settings.items()} == {
        arch: ([int(depth) for depth in depths.split(',')], [int(number) for number in channels.split(',')],
               int(mem_channels)) for arch, depths, channels, mem_channels in table}


@pytest.mark.parametrize('arch, params, flops', [
    ('m1', 4.3, 0.71), ('m2', 6.1, 1.01), ('m3', 10.6, 1.77), ('m4', 18.1, 3.06)])
def test_published_size(arch, params, flops):
    """Table 1 and 2 of the paper."""
    found = classifier_counts(arch=arch)
    assert round(found[0], 1) == params
    assert round(found[1], 2) == flops


@pytest.mark.parametrize('arch, params, flops', [('m5', 32.2, 5.34), ('m6', 95.0, 16.90)])
def test_size_of_the_archs_that_the_paper_lacks(arch, params, flops):
    with torch.device('meta'):
        found = classifier_counts(arch=arch)
    assert round(found[0], 1) == params
    assert round(found[1], 2) == flops


@pytest.mark.parametrize('options, flops', [
    (dict(placement='none'), 1.4),
    (dict(placement='stage'), 1.8),
    (dict(placement='block'), 2.3),
    (dict(memory_cfg=dict(mem_channels=64)), 1.5),
    (dict(memory_cfg=dict(mem_channels=128)), 1.8),
    (dict(memory_cfg=dict(mem_channels=256)), 2.7),
    (dict(fusion='add'), 1.8),
    (dict(fusion='concat'), 1.9),
    (dict(fusion='gate'), 1.8),
])
def test_published_ablations(options, flops):
    """Table 5 of the paper: placement, memory channels, fusion."""
    assert round(classifier_counts(arch='m3', **options)[1], 1) == flops


def test_concat_adds_parameters():
    """Table 5: 0.7 M for the concatenation's pointwise reduction."""
    assert round(classifier_counts(fusion='concat')[0] - classifier_counts(fusion='gate')[0], 1) == 0.7


@pytest.mark.needs('mmpretrain')
@pytest.mark.parametrize('ours, theirs', [('m1', 'atto'), ('m2', 'femto'), ('m3', 'pico'), ('m4', 'nano')])
def test_without_global_branch_equals_mmpretrain(ours, theirs):
    from mmpretrain.models.backbones import ConvNeXt

    model = randomize(ConvNeur(ours, placement='none')).eval()
    peer = ConvNeXt(theirs, use_grn=True, layer_scale_init_value=0.0, out_indices=(0, 1, 2, 3),
                    gap_before_final_norm=False)
    peer.eval()  # its train() returns None
    peer.load_state_dict(model.state_dict())  # same names: their checkpoints load as they are
    x = torch.randn(2, 3, 65, 96)
    with torch.no_grad():
        for found, expected in zip(model(x), peer(x)):
            assert (found - expected).norm() / expected.norm() <= 1e-5
        model.gap_before_final_norm = peer.gap_before_final_norm = True
        for found, expected in zip(model(x), peer(x)):
            assert (found - expected).norm() / expected.norm() <= 1e-5


@pytest.mark.needs('timm')
def test_without_global_branch_equals_timm():
    import timm

    model = randomize(ConvNeur('m3', placement='none', out_indices=3, gap_before_final_norm=True)).eval()
    peer = timm.create_model('convnextv2_pico', num_classes=0).eval()
    renames = {
        'downsample_layers.0.': 'stem.', '.depthwise_conv.': '.conv_dw.', '.pointwise_conv1.': '.mlp.fc1.',
        '.pointwise_conv2.': '.mlp.fc2.', '.grn.gamma': '.mlp.grn.weight', '.grn.beta': '.mlp.grn.bias',
        'norm3.': 'head.norm.'}
    weights = {}
    for name, value in model.state_dict().items():
        if name.startswith('stages.'):
            stage, block, rest = name.split('.', 3)[1:]
            name = f'stages.{stage}.blocks.{block}.{rest}'
        elif name.startswith('downsample_layers.') and name[18] != '0':
            name = f'stages.{name[18]}.downsample{name[19:]}'
        for ours, theirs in renames.items():
            name = name.replace(ours, theirs)
        if 'mlp.fc' in name and value.dim() == 2 and peer.state_dict()[name].dim() == 4:
            value = value[:, :, None, None]
        weights[name] = value.reshape(peer.state_dict()[name].shape)
    peer.load_state_dict(weights)
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        found, expected = model(x)[-1], peer(x)
    assert (found - expected).norm() / expected.norm() <= 1e-5


@pytest.mark.parametrize('channels_last', [True, False])
def test_channels_last(channels_last):
    """The memory that the first convolution sees; the outputs' is NCHW in both cases."""
    model, seen = ConvNeur(TINY, **({} if channels_last else dict(channels_last=False))), []
    model.downsample_layers[0][0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].stride()))
    outs = model(torch.randn(2, 3, 32, 64))
    assert seen == [(6144, 1, 192, 3) if channels_last else (6144, 2048, 64, 1)]
    assert all(o.is_contiguous() for o in outs)


@pytest.mark.parametrize('arch', ARCHS)
def test_every_arch_gives_contiguous_pyramid(arch):
    model = ConvNeur(arch).eval()
    with torch.no_grad():
        outs = model(torch.randn(1, 3, 64, 96))
    assert [o.shape for o in outs] == [(1, c, 64 // s, 96 // s) for c, s in zip(model.channels, (4, 8, 16, 32))]
    assert all(o.is_contiguous() for o in outs)
    assert all(o.isfinite().all() for o in outs)


@pytest.mark.parametrize('placement', ['stage', 'block'])
@pytest.mark.parametrize('fusion', ['gate', 'add', 'concat'])
@pytest.mark.parametrize('memory_cfg', [
    dict(chunk_size=20), dict(chunk_size=20, update_rule='parallel'), dict(chunk_size=20, retrieve='final'),
    dict(chunk_size=4096, inner_step=1e-3)])
@pytest.mark.parametrize('size', [(33, 47), (64, 64)])
def test_every_parameter_has_a_gradient(placement, fusion, memory_cfg, size):
    """Also where stages have a single chunk and parameters feed nothing but the update: plain DDP asks for that."""
    model = randomize(ConvNeur(TINY, placement=placement, fusion=fusion, memory_cfg=memory_cfg))
    sum(o.square().mean() for o in model(torch.randn(2, 3, *size))).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


def test_every_working_parameter_has_a_nonzero_gradient():
    """Where every stage has several chunks, nothing is left untrained."""
    model = randomize(ConvNeur(TINY, memory_cfg=dict(chunk_size=1)).double())
    sum(o.square().mean() for o in model(torch.randn(2, 3, 96, 64, dtype=torch.float64))).backward()
    for name, p in model.named_parameters():
        assert p.grad.norm() > 0, name


@pytest.mark.parametrize('size', [(33, 47), (224, 320), (32, 32), (97, 41)])
def test_odd_sizes(size):
    model = ConvNeur(TINY, memory_cfg=dict(chunk_size=50)).eval()
    with torch.no_grad():
        outs = model(torch.randn(1, 3, *size))
    assert [tuple(o.shape[2:]) for o in outs] == [(size[0] // s, size[1] // s) for s in (4, 8, 16, 32)]


def count_forwards(model: ConvNeur, x: torch.Tensor) -> list[int]:
    """How often each block computes its features in one training step."""
    blocks = [block for stage in model.stages for block in stage]
    counts = [0] * len(blocks)
    for i, block in enumerate(blocks):
        def count(*_, i=i):
            counts[i] += 1
        block.depthwise_conv.register_forward_hook(count)
    sum(o.square().mean() for o in model(x)).backward()
    return counts


def test_with_cp_recomputes_every_block():
    x = torch.randn(1, 3, 32, 32)
    assert count_forwards(ConvNeur(TINY), x) == [1, 1, 1, 1, 1]
    assert count_forwards(ConvNeur(TINY, with_cp=True), x) == [2, 2, 2, 2, 2]
    assert count_forwards(ConvNeur(TINY, with_cp=True, frozen_stages=2), x) == [1, 1, 1, 2, 2]


def test_with_cp_keeps_drop_path():
    """The recomputation draws the same paths, so the gradients are those without it."""
    results = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = randomize(ConvNeur(TINY, drop_path_rate=0.5, with_cp=with_cp).double(), seed=3)
        torch.manual_seed(1)
        outs = model(torch.randn(4, 3, 64, 64, dtype=torch.float64))
        sum(o.square().mean() for o in outs).backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in results[0].items():
        plain.assert_close(results[1][name], gradient, name)


def dropped_shares(model: ConvNeur, images: int) -> list[float]:
    """The share of images that each block passes on unchanged."""
    shares = []
    for stage in model.stages:
        for block in stage:
            block.register_forward_hook(
                lambda _, inputs, y: shares.append((y == inputs[0]).flatten(1).all(1).float().mean().item()))
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32).repeat(images, 1, 1, 1))
    return shares


def test_drop_path_rises_linearly():
    """Over all blocks, from 0 in the first to the given rate in the last; to 0 in all of them outside training."""
    torch.manual_seed(0)
    model = randomize(ConvNeur(TINY, drop_path_rate=0.6, placement='none'))
    for found, expected in zip(dropped_shares(model, 3000), (0, 0.15, 0.3, 0.45, 0.6), strict=True):
        assert abs(found - expected) < (0.03 if expected else 1e-9)
    assert dropped_shares(model.eval(), 2)[-5:] == [0, 0, 0, 0, 0]
    rates = [getattr(b.drop_path, 'p', 0.0) for stage in ConvNeur('m1', drop_path_rate=0.11).stages for b in stage]
    assert rates == pytest.approx([0.01 * i for i in range(12)])


def test_drop_path_rates_count_stages_that_are_not_built():
    """So that the blocks of a cut backbone train as those of the whole one."""
    rates = [[getattr(b.drop_path, 'p', 0.0) for stage in model.stages for b in stage] for model in (
        ConvNeur(TINY, drop_path_rate=0.4), ConvNeur(TINY, drop_path_rate=0.4, out_indices=1))]
    assert rates[1] == rates[0][:3]


def test_drop_path_of_a_single_block():
    model = ConvNeur(dict(depths=[1], channels=[8], mem_channels=16), drop_path_rate=0.5, out_indices=0)
    assert isinstance(model.stages[0][0].drop_path, nn.Identity)


@pytest.mark.parametrize('frozen_stages, out_indices', [
    (-1, (0, 1, 2, 3)), (0, (0, 1, 2, 3)), (1, (0, 1, 2, 3)), (2, (0, 1, 2, 3)), (4, (0, 1, 2, 3)), (4, 1)])
def test_frozen_stages(frozen_stages, out_indices):
    """Frozen from the start and after train(): no gradient, no drop path; what returns their features still learns."""
    model = ConvNeur(TINY, frozen_stages=frozen_stages, drop_path_rate=0.5, out_indices=out_indices)
    frozen_names = tuple(f'{part}.{i}.' for i in range(frozen_stages) for part in ('downsample_layers', 'stages'))

    def check():
        for name, p in model.named_parameters():
            assert p.requires_grad != name.startswith(frozen_names), name
        for name, module in model.named_modules():
            assert module.training != f'{name}.'.startswith(frozen_names), name

    check()
    assert model.eval() is model and not any(m.training for m in model.modules())
    assert model.train() is model
    check()
    sum(o.square().mean() for o in model(torch.randn(2, 3, 64, 64))).backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith(frozen_names), name


def test_placement():
    for placement, expected in [('none', [0, 0, 0, 0]), ('stage', [1, 1, 1, 1]), ('block', [1, 2, 1, 1])]:
        model = ConvNeur(TINY, placement=placement)
        assert [sum(isinstance(m, NeuralMemory) for m in s.modules()) for s in model.stages] == expected
    assert model.stages[1][1].global_branch is not None


@pytest.mark.parametrize('placement', ['none', 'stage'])
def test_image_padding_does_not_break_training(placement):
    """Were padding zero behind the stem, LayerNorms and the memory's L2 norms would blow its gradient up (to 1e12)."""
    x = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    norms = []
    for padded in (False, True):
        torch.manual_seed(0)
        model = ConvNeur('m1', memory_cfg=dict(chunk_size=64), placement=placement)
        model.init_weights()
        x[..., 64:] *= not padded
        sum((o * torch.randn(o.shape)).mean() for o in model(x)).backward()
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm())
    assert norms[1] < 10 * norms[0]


def test_zero_tokens_do_not_break_training():
    """The memory alone, where tokens are zero: F.normalize's own eps would multiply their gradient by 1e12."""
    memory = NeuralMemory(32, chunk_size=8)
    x = torch.randn(1, 32, 32)
    norms = []
    for zero in (False, True):
        x[:, 16:] *= not zero
        memory.zero_grad()
        (memory(x) * torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(0))).sum().backward()
        norms.append(memory.norm.bias.grad.norm())
    assert norms[1] < 100 * norms[0]


def test_meta_device():
    """Shapes and FLOPs of large inputs can be had without their memory."""
    with torch.device('meta'):
        model = ConvNeur('m3', drop_path_rate=0.1)
        outs = model(torch.zeros(1, 3, 512, 2048))
    assert outs[0].shape == (1, 64, 128, 512)


def test_out_indices():
    x = torch.randn(1, 3, 64, 64)
    full = randomize(ConvNeur(TINY)).eval()
    expected = full(x)
    for indices in (2, -2, (0, 2), [1], (0, 1, 2, 3), (-4, -1)):
        model = ConvNeur(TINY, out_indices=indices).eval()
        missing, _ = model.load_state_dict(full.state_dict(), strict=False)
        assert not missing
        wanted = [i % 4 for i in ([indices] if isinstance(indices, int) else indices)]
        assert {n.split('.')[0] for n, _ in model.named_parameters() if n.startswith('norm')} == {
            f'norm{i}' for i in wanted}
        for i, found in zip(wanted, model(x), strict=True):
            assert torch.allclose(found, expected[i], atol=1e-6)


def test_init_weights_keeps_the_generators_biases():
    model = ConvNeur('m1')
    model.init_weights()
    for memory in (m for m in model.modules() if isinstance(m, NeuralMemory)):
        step, momentum, decay = memory.generators[2].bias.chunk(3)
        assert (step == -2).all() and (momentum == 0).all() and (decay == -4).all()
        assert abs(memory.w1.std().item() - 16**-0.5) < 0.05
        assert abs(memory.w2.std().item() - 8**-0.5) < 0.07
    conv = model.stages[2][3].pointwise_conv1
    assert abs(conv.weight.std().item() - 0.02) < 0.001
    assert (conv.bias == 0).all()
    stem_bias = model.downsample_layers[0][0].bias
    assert (stem_bias != 0).all() and stem_bias.abs().max() < 0.1


def test_init_weights_twice_is_harmless():
    """As for every module of MMEngine: what was trained since the first call stays."""
    model = ConvNeur(TINY)
    model.init_weights()
    before = {name: value.clone() for name, value in randomize(model).state_dict().items()}
    for module in (m for m in model.modules() if hasattr(m, 'init_weights')):
        module.init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


CONSTANT = dict(type='Constant', layer='Conv2d', val=0.5, bias=0.25)


@pytest.mark.parametrize('init_cfg', [CONSTANT, [CONSTANT, dict(type='Constant', layer='LayerNorm2d', val=0.75)]])
def test_init_cfg_of_ones_own(init_cfg):
    """It replaces the default altogether; the memories' own initialisation stays, and so does the stem's bias."""
    torch.manual_seed(0)
    model = ConvNeur(TINY, init_cfg=init_cfg)
    linear = model.stages[0][0].pointwise_conv1.weight.clone()
    model.init_weights()
    for module in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        assert (module.weight == 0.5).all() and (module.bias == 0.25).all()
    assert (model.norm0.weight == (0.75 if isinstance(init_cfg, list) else 1)).all()
    assert torch.equal(model.stages[0][0].pointwise_conv1.weight, linear)
    assert (model.stages[0][0].global_branch.memory.generators[2].bias[-16:] == -4).all()


def test_init_cfg_of_ones_own_leaves_no_zero_bias_in_the_stem():
    """mmpretrain's ConvNeXt asks for zero, which padded images do not survive: see the test of image padding."""
    model = ConvNeur(TINY, init_cfg=[dict(type='TruncNormal', layer=['Conv2d', 'Linear'], std=0.02, bias=0.0),
                                     dict(type='Constant', layer=['LayerNorm2d'], val=1.0, bias=0.0)])
    model.init_weights()
    assert (model.downsample_layers[0][0].bias != 0).all()
    assert (model.downsample_layers[1][1].bias == 0).all()


def test_arguments_are_not_changed():
    arch, memory_cfg = dict(TINY), dict(mem_channels=32, chunk_size=10)
    init_cfg = dict(type='Pretrained', checkpoint=None)
    before = [dict(x) for x in (arch, memory_cfg, init_cfg)]
    model = ConvNeur(arch, memory_cfg=memory_cfg, init_cfg=init_cfg)
    model.init_weights()
    assert [arch, memory_cfg, init_cfg] == before
    assert model.stages[0][0].global_branch.memory.channels == 32


@pytest.mark.parametrize('scope', [
    'mmengine', *(pytest.param(name, marks=pytest.mark.needs(name)) for name in ('mmdet', 'mmseg', 'mmpretrain'))])
def test_resolves_from_every_scope(scope):
    with DefaultScope.overwrite_default_scope(scope):
        registry = MODELS if scope == 'mmengine' else import_module(f'{scope}.registry').MODELS
        model = registry.build(dict(type='ConvNeur', arch=TINY))
    assert type(model) is ConvNeur


@pytest.mark.parametrize('options, message', [
    (dict(arch='m7'), "arch must be one of .*'m1', 'm2', 'm3', 'm4', 'm5', 'm6'.* got 'm7'"),
    (dict(arch=dict(depths=[1])), 'a custom arch must be a dict of'),
    (dict(arch=dict(TINY, channels=[16, 24])), 'with as many depths as channels'),
    (dict(arch=dict(depths=[], channels=[], mem_channels=16)), 'with as many depths as channels'),
    (dict(memory_cfg=dict(chunks=3)), r"memory_cfg takes the keys .*got \['chunks'\]"),
    (dict(memory_cfg=dict(mem_channels=16.0)), 'mem_channels must be an integer of at least 1, got 16.0'),
    (dict(memory_cfg=dict(mem_channels=0)), 'mem_channels must be an integer of at least 1, got 0'),
    (dict(placement='head'), "placement must be one of .*got 'head'"),
    (dict(fusion='mul'), "fusion must be one of .*got 'mul'"),
    (dict(out_indices=(0, 4)), r'out_indices must name stages from -4 to 3, got \(0, 4\)'),
    (dict(out_indices=()), r'out_indices must name stages from -4 to 3, got \(\)'),
    (dict(out_indices=(2, 1)), 'ascending order'),
    (dict(out_indices=(3, -1)), 'ascending order'),
    (dict(frozen_stages=5), 'frozen_stages must be an integer from -1 to 4, got 5'),
    (dict(frozen_stages=-2), 'frozen_stages must be an integer from -1 to 4, got -2'),
    (dict(frozen_stages=True), 'frozen_stages must be an integer from -1 to 4, got True'),
    (dict(frozen_stages=1.0), 'frozen_stages must be an integer from -1 to 4, got 1.0'),
    (dict(out_indices=True), 'out_indices must name stages from -4 to 3, got True'),
    (dict(drop_path_rate=-0.1), r'drop_path_rate must be in \[0, 1\), got -0.1'),
    (dict(drop_path_rate=1.0), r'drop_path_rate must be in \[0, 1\), got 1.0'),
])
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ConvNeur(**options)


def test_too_small_an_image_is_named():
    with pytest.raises(ValueError, match=r'at least 32 x 32 pixels, got \(31, 64\)'):
        ConvNeur(TINY)(torch.zeros(1, 3, 31, 64))


def test_smallest_image_of_a_cut_backbone():
    model = ConvNeur(TINY, out_indices=1)
    assert model(torch.zeros(1, 3, 8, 8))[0].shape == (1, 24, 1, 1)
    with pytest.raises(ValueError, match=r'at least 8 x 8 pixels, got \(8, 7\)'):
        model(torch.zeros(1, 3, 8, 7))


@contextmanager
def log_captured(caplog):
    """Lets pytest see what the current MMEngine logger, which does not propagate, writes."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)


class TestPretrained:

    def save(self, tmp_path, weights, name='weights.pth'):
        torch.save(weights, tmp_path / name)
        return str(tmp_path / name)

    @pytest.mark.parametrize('wrap', [
        lambda w: w,
        lambda w: dict(state_dict=w),
        lambda w: dict(state_dict={f'backbone.{k}': v for k, v in w.items()} | {'head.fc.weight': torch.zeros(2)}),
        lambda w: dict(state_dict={f'module.backbone.{k}': v for k, v in w.items()}),
    ])
    def test_loads(self, tmp_path, wrap):
        source = randomize(ConvNeur(TINY))
        path = self.save(tmp_path, wrap(source.state_dict()))
        model = ConvNeur(TINY, init_cfg=dict(type='Pretrained', checkpoint=path))
        model.init_weights()
        for name, value in model.state_dict().items():
            assert torch.equal(value, source.state_dict()[name]), name

    @pytest.mark.parametrize('prefix', ['', 'backbone.'])
    @pytest.mark.parametrize('pretrained_type', ['Pretrained', PretrainedInit], ids=['name', 'class'])
    def test_loads_beside_other_initialisations(self, tmp_path, prefix, pretrained_type):
        """In a list, as anywhere in MMEngine, the checkpoint has the last word on every weight it has."""
        source = randomize(ConvNeur(TINY, out_indices=3))
        path = self.save(tmp_path, {prefix + name: value for name, value in source.state_dict().items()})
        model = ConvNeur(TINY, init_cfg=[
            dict(type=pretrained_type, checkpoint=path), CONSTANT, dict(type='Constant', layer='LayerNorm2d', val=0.5)])
        assert model.pretrained['type'] == 'Pretrained'  # as the start's summary looks for it
        model.init_weights()
        for name, value in source.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        assert (model.norm0.weight == 0.5).all()

    def test_init_weights_twice_does_not_load_again(self, tmp_path):
        path = self.save(tmp_path, randomize(ConvNeur(TINY)).state_dict())
        model = ConvNeur(TINY, init_cfg=dict(type='Pretrained', checkpoint=path))
        model.init_weights()
        trained = {name: value.clone() for name, value in randomize(model, seed=1).state_dict().items()}
        model.init_weights()
        for name, value in model.state_dict().items():
            assert torch.equal(value, trained[name]), name

    def test_prefix_and_pickle(self, tmp_path):
        """Pickled objects are refused unless they are allowed."""
        source = randomize(ConvNeur(TINY))
        weights = {f'neck.{name}': value for name, value in source.state_dict().items()}
        cfg = dict(type='Pretrained', prefix='neck.', checkpoint=self.save(tmp_path, dict(weights, call=partial(int))))
        with pytest.raises(ValueError, match='allow_pickle'):
            ConvNeur(TINY, init_cfg=cfg).init_weights()
        model = ConvNeur(TINY, init_cfg=dict(cfg, allow_pickle=True))
        model.init_weights()
        assert torch.equal(model.stages[3][0].grn.gamma, source.stages[3][0].grn.gamma)

    def test_two_checkpoints_are_refused(self):
        two = [dict(type='Pretrained', checkpoint=name) for name in ('a.pth', 'b.pth')]
        with pytest.raises(ValueError, match=r"init_cfg must name one checkpoint at most, got 'a.pth', 'b.pth'"):
            ConvNeur(TINY, init_cfg=two)

    def test_classifier_weights_serve_a_detector(self, tmp_path, caplog):
        """The classifier has the last stage's LayerNorm only; the others are named as missing."""
        source = randomize(ConvNeur(TINY, out_indices=3, gap_before_final_norm=True))
        path = self.save(tmp_path, dict(state_dict={f'backbone.{k}': v for k, v in source.state_dict().items()}))
        model = ConvNeur(TINY, init_cfg=dict(type='Pretrained', checkpoint=path))
        with log_captured(caplog):
            model.init_weights()
        assert 'lacks 6 backbone weights' in caplog.text and 'norm0.weight' in caplog.text
        assert torch.equal(model.stages[3][0].grn.gamma, source.stages[3][0].grn.gamma)
        assert torch.equal(model.norm3.weight, source.norm3.weight)

    def test_none_warns_once(self, caplog):
        model = ConvNeur(TINY, init_cfg=dict(type='Pretrained', checkpoint=None))
        with log_captured(caplog):
            model.init_weights()
        warned = [r for r in caplog.records if 'starts from random weights' in r.getMessage()]
        assert len(warned) == 1
        assert abs(model.stages[3][0].pointwise_conv1.weight.std().item() - 0.02) < 0.002

    def test_no_init_cfg_does_not_warn(self, caplog):
        with log_captured(caplog), warnings.catch_warnings():
            warnings.simplefilter('error')
            ConvNeur(TINY).init_weights()
        assert 'random weights' not in caplog.text


# ---- states


def make_streaming(**options) -> ConvNeur:
    arch = dict(depths=[2, 1], channels=[8, 12], mem_channels=16)
    options = {'memory_cfg': dict(chunk_size=4), 'out_indices': (0, 1), **options}
    torch.manual_seed(0)
    return randomize(ConvNeur(arch, **options).double().eval(), std=0.3)


@pytest.mark.parametrize('options, memories', [
    (dict(), 2), (dict(placement='block'), 3), (dict(placement='block', out_indices=0), 2), (dict(fusion='concat'), 2),
    (dict(memory_cfg=dict(chunk_size=4, update_rule='parallel')), 2)], ids=str)
def test_frames_are_one_sequence_to_each_memory(options, memories):
    """Each memory's tokens of two frames of different sizes, in one call, give what the frames gave."""
    model, seen = make_streaming(**options), {}
    for module in model.modules():
        if isinstance(module, NeuralMemory):
            module.register_forward_hook(lambda module, args, output: seen.setdefault(module, []).append(
                (args[0], output)))
    first, second = (torch.randn(2, 3, *size, dtype=torch.float64) for size in ((16, 16), (32, 16)))
    _, states = model(first, return_states=True)
    features, states = model(second, states=states, return_states=True)
    assert len(seen) == len(states) == memories
    for (memory, ((x1, (y1, _)), (x2, (y2, state)))), returned in zip(list(seen.items()), states):
        memory._forward_hooks.clear()
        y, expected = memory(torch.cat((x1, x2), 1), return_state=True)
        for found, whole in zip((torch.cat((y1, y2), 1), *state, *returned), (y, *expected, *expected)):
            assert (found - whole).norm() <= 1e-10 * whole.norm()
    assert all((a - b).norm() > 1e-6 * b.norm() for a, b in zip(model(second), features))


def test_states_do_not_change_their_own_frame():
    model, x = make_streaming(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    features, states = model(x, return_states=True)
    assert all(torch.equal(a, b) for a, b in zip(features, model(x)))
    begun = model(x, states=model.initial_states(2), return_states=True)
    for a, b in zip([*begun[0], *(t for s in begun[1] for t in s)], [*features, *(t for s in states for t in s)]):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(model(x, states=states), model(x, states, True)[0]))


def test_streams_of_a_batch_are_independent():
    model, (first, second) = make_streaming(), torch.randn(2, 3, 3, 16, 16, dtype=torch.float64)
    features, states = model(second, states=model(first, return_states=True)[1], return_states=True)
    alone = model(second[1:2], states=model(first[1:2], return_states=True)[1], return_states=True)
    for a, b in zip([*alone[0], *(t for s in alone[1] for t in s)], [*features, *(t for s in states for t in s)]):
        torch.testing.assert_close(a, b[1:2], rtol=1e-9, atol=1e-12)


def test_gradients_through_frames_with_checkpointing():
    frames = torch.randn(2, 1, 3, 16, 16, dtype=torch.float64)
    results = []
    for with_cp in (False, True):
        model, x = make_streaming(with_cp=with_cp), frames.clone().requires_grad_()
        _, states = model(x[0], return_states=True)
        features = model(x[1], states=states)
        results.append(torch.autograd.grad(sum(f.sin().sum() for f in features), [x, *model.parameters()],
                                           allow_unused=True, materialize_grads=True))
    assert results[0][0][0].abs().max() > 0, 'back to the first frame'
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_states_under_autocast_are_float32():
    model = make_streaming().float()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        for _ in range(2):
            _, states = model(torch.randn(1, 3, 16, 16), return_states=True)
            model(torch.randn(1, 3, 16, 16), states=states)
    assert all(t.dtype == torch.float32 for state in states for t in state)


@pytest.mark.parametrize('change, message', [
    (lambda states: states[:1], r'must be 2 MemoryStates, one for each of stages.0.0.global_branch.memory, '
                                r"stages.1.0.global_branch.memory, got \['MemoryState'\]"),
    (lambda states: [tuple(state) for state in states], r"got \['tuple', 'tuple'\]"),
    (lambda states: [states[0], type(states[1])(*(t[:1] for t in states[1]))],
     r'the state of stages.1.0.global_branch.memory has w1 of shape \(1, 1, 16, 8\), expected \(2, 1, 16, 8\) '
     'for 2 images'),
    (lambda states: [state._replace(p2=state.p2.float()) for state in states],
     'stages.0.0.global_branch.memory has p2 of dtype torch.float32, expected torch.float64'),
    (lambda states: [state._replace(w2=state.w2.to('meta')) for state in states],
     'has w2 of device meta, expected cpu'),
    (lambda states: [state._replace(w2=state.w2[..., :8]) for state in states], 'has w2 of shape'),
])
def test_states_that_do_not_fit_are_named(change, message):
    model, x = make_streaming(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        model(x, states=change(model.initial_states(2)))


@pytest.mark.parametrize('options, message', [
    (dict(placement='none'), "has none: it has placement='none'"),
    (dict(global_branch='cbam', memory_cfg={}), "it has placement='stage', global_branch='cbam'")])
@pytest.mark.parametrize('given', [dict(states=()), dict(return_states=True)], ids=str)
def test_backbones_without_a_memory_have_no_states(options, message, given):
    model = ConvNeur(dict(depths=[1], channels=[8], mem_channels=16), out_indices=0, **options)
    with pytest.raises(ValueError, match=message):
        model(torch.randn(1, 3, 16, 16), **given)
