"""OverLoCK: published size and cost, its authors' weights by name, and its equations, written out plainly."""
import pytest
import torch
from plain_overlock import BRANCHES, LIGHT, Plain, randomised
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convneur_mm.models import OverLoCK
from convneur_mm.models.overlock import blocks as overlock_blocks

ARCHS = ('xt', 't', 's', 'b')
def light(**options) -> OverLoCK:
    return OverLoCK(LIGHT, **options)


# Published size and cost.

# Parameters (M) as trained and merged; multiply-accumulates (G) as trained, merged, and without the weighted sums.
COUNTED = {
    'xt': (17.31, 16.45, 2.86, 2.70, 2.67), 't': (34.99, 33.47, 5.99, 5.65, 5.59),
    's': (58.31, 56.16, 10.44, 9.89, 9.79), 'b': (98.01, 94.94, 17.96, 17.10, 16.95),
}


@pytest.fixture(scope='module')
def classifiers():
    """Backbone, classifier and auxiliary classifier of an arch, without memory for their weights."""
    def build(arch: str) -> tuple[OverLoCK, nn.Module, nn.Module]:
        with torch.device('meta'):
            backbone = OverLoCK(arch, out_indices=3, for_classifier=True)
            channels = backbone.arch_settings[arch]['channels'][3]
            # As in the authors' code.
            head = nn.Sequential(
                nn.Conv2d(channels * 5 // 4, 1024, 1, bias=False), nn.BatchNorm2d(1024), nn.SiLU(),
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(1024, 1000, 1))
            aux_head = nn.Sequential(
                nn.BatchNorm2d(channels), nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 1000, 1))
        return backbone.eval(), head.eval(), aux_head.eval()
    return build


def gmacs(backbone: nn.Module, head: nn.Module) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        head(backbone(torch.zeros(1, 3, 224, 224, device='meta'))[-1])
    return counter.get_total_flops() / 2e9


def mparams(*modules: nn.Module) -> float:
    return round(sum(param.numel() for module in modules for param in module.parameters()) / 1e6, 2)


@pytest.mark.parametrize('arch', [pytest.param(arch, marks=[pytest.mark.slow] * (arch in ('s', 'b')))
                                  for arch in ARCHS])
def test_parameters_and_flops(arch, classifiers, monkeypatch):
    """The cost of ContMix's weighted sums is test_contmix.py's; here they are left out, and added where they belong."""
    sums = []

    def counted(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        sums.append(weights.numel() * values.size(-1) / 1e9)
        return values

    monkeypatch.setattr(overlock_blocks, 'neighborhood_sum', counted)
    backbone, head, aux_head = classifiers(arch)
    trained_m, merged_m, trained_g, merged_g, without_sums_g = COUNTED[arch]
    assert mparams(backbone, head, aux_head) == trained_m
    assert round(gmacs(backbone, head) + sum(sums), 2) == trained_g
    sums.clear()
    backbone.switch_to_deploy()
    assert mparams(backbone, head) == merged_m
    without_sums = gmacs(backbone, head)
    # The paper's counter did not see them.
    assert round(without_sums, 2) == without_sums_g
    assert round(without_sums + sum(sums), 2) == merged_g


# Weights by their names.

def conv(name: str, out: int, into: int, size: int, bias: bool = True) -> dict[str, tuple]:
    return {f'{name}.weight': (out, into, size, size), **({f'{name}.bias': (out,)} if bias else {})}


def norm(name: str, channels: int) -> dict[str, tuple]:
    return {f'{name}.weight': (channels,), f'{name}.bias': (channels,)}


def batch_norm(name: str, channels: int) -> dict[str, tuple]:
    return {**norm(name, channels), f'{name}.running_mean': (channels,), f'{name}.running_var': (channels,),
            f'{name}.num_batches_tracked': ()}


def scale(name: str, channels: int) -> dict[str, tuple]:
    return {f'{name}.weight': (channels, 1, 1, 1), f'{name}.bias': (channels,)}


def conv_bn(name: str, out: int, into: int, size: int, first: int = 0) -> dict[str, tuple]:
    return {**conv(f'{name}.{first}', out, into, size, bias=False), **batch_norm(f'{name}.{first + 1}', out)}


def dilated(name: str, channels: int, kernel_size: int) -> dict[str, tuple]:
    shapes = {**conv(f'{name}.lk_origin', channels, 1, kernel_size, bias=False),
              **batch_norm(f'{name}.origin_bn', channels)}
    for branch in BRANCHES[kernel_size].split():
        shapes.update(conv(f'{name}.dil_conv_k{branch}', channels, 1, int(branch[0]), bias=False))
        shapes.update(batch_norm(f'{name}.dil_bn_k{branch}', channels))
    return shapes


def squeeze(name: str, channels: int) -> dict[str, tuple]:
    hidden = max(16, channels // 8)
    return {**conv(f'{name}.proj.1', hidden, channels, 1), **conv(f'{name}.proj.3', channels, hidden, 1)}


def ffn(name: str, first: int, channels: int, hidden: int) -> dict[str, tuple]:
    return {**conv(f'{name}.{first}', hidden, channels, 1), **conv(f'{name}.{first + 2}', hidden, 1, 3),
            f'{name}.{first + 3}.gamma': (1, hidden, 1, 1), f'{name}.{first + 3}.beta': (1, hidden, 1, 1),
            **conv(f'{name}.{first + 4}', channels, hidden, 1)}


def base_block(name: str, c: int, kernel_size: int, scaled: bool) -> dict[str, tuple]:
    return {**conv(f'{name}.dwconv', c, 1, 3), **norm(f'{name}.proj.0', c), **dilated(f'{name}.proj.1', c, kernel_size),
            **batch_norm(f'{name}.proj.2', c), **squeeze(f'{name}.proj.3', c), **ffn(f'{name}.proj', 4, c, 4 * c),
            **(scale(f'{name}.ls', c) if scaled else {})}


def focus_block(name: str, c: int, context: int, kernel_size: int, heads: int, first: bool) -> dict[str, tuple]:
    fused = c + context
    return {
        **({} if first else {**scale(f'{name}.x_scale', context), **scale(f'{name}.h_scale', context)}),
        f'{name}.rpb1': (heads, 9, 9), f'{name}.rpb2': (heads, 2 * kernel_size - 1, 2 * kernel_size - 1),
        **conv(f'{name}.dwconv1', fused, 1, 3), **norm(f'{name}.norm1', fused),
        **conv(f'{name}.fusion.0', fused, 1, 3), **batch_norm(f'{name}.fusion.1', fused),
        **conv(f'{name}.fusion.3', c, fused, 1), f'{name}.fusion.4.gamma': (1, c, 1, 1),
        f'{name}.fusion.4.beta': (1, c, 1, 1), **conv_bn(f'{name}.weight_query', c // 2, c, 1),
        **conv_bn(f'{name}.weight_key', c // 2, context, 1, first=1),
        **conv(f'{name}.weight_proj', kernel_size ** 2 + 25, 49, 1), **conv_bn(f'{name}.dyconv_proj', c, c, 1),
        **dilated(f'{name}.lepe.0', c, kernel_size), **batch_norm(f'{name}.lepe.1', c),
        **squeeze(f'{name}.se_layer', c), **conv_bn(f'{name}.gate', c, c, 1), **batch_norm(f'{name}.proj.0', c),
        **conv(f'{name}.proj.1', fused, c, 1), **conv(f'{name}.dwconv2', fused, 1, 3), **norm(f'{name}.norm2', fused),
        **ffn(f'{name}.mlp', 0, fused, 3 * c), **scale(f'{name}.ls1', fused), **scale(f'{name}.ls2', fused),
    }


def authors_shapes(depths, focus_depths, channels, kernel_sizes, heads) -> dict[str, tuple]:
    """Names and shapes of the weights in the authors' backbones, written down from their code."""
    a, b, c, d = channels
    context = d // 4
    shapes = {
        **conv_bn('patch_embed1', a // 2, 3, 3), **conv_bn('patch_embed1', a // 2, a // 2, 3, first=3),
        **conv_bn('patch_embed1', a, a // 2, 3, first=6), **conv_bn('patch_embed1', a, a, 3, first=9),
        **conv_bn('patch_embed2', b, a, 3), **conv_bn('patch_embed3', c, b, 3), **conv_bn('patch_embed4', d, c, 3),
        **conv('high_level_proj', context, d, 1), **conv_bn('patch_embedx.x_proj', d, c, 3),
        **conv_bn('patch_embedx.h_proj', context, context, 3),
    }
    for stage, depth in enumerate(depths):
        for i in range(depth):
            shapes.update(base_block(f'blocks{stage + 1}.{i}', channels[stage], kernel_sizes[stage], stage >= 2))
    for stage, depth in enumerate(focus_depths, 2):
        for i in range(depth):
            shapes.update(focus_block(f'sub_blocks{stage + 1}.{i}', channels[stage], context, kernel_sizes[stage],
                                      heads[stage - 2], first=stage == 2 and i == 0))
    return shapes


AUTHORS = {
    'xt': ([2, 2, 3, 2], [6, 2], [56, 112, 256, 336], [17, 15, 13, 7], [8, 12]),
    't': ([4, 4, 6, 2], [12, 2], [64, 128, 256, 512], [17, 15, 13, 7], [8, 16]),
    's': ([6, 6, 8, 3], [16, 3], [64, 128, 320, 512], [17, 15, 13, 7], [16, 32]),
    'b': ([8, 8, 10, 4], [20, 4], [80, 160, 384, 576], [17, 15, 13, 7], [12, 18]),
}


def dense_shapes(channels: list[int], detector: bool) -> dict[str, tuple]:
    """What the authors' dense models have besides."""
    context = channels[3] // 4
    out = [*channels[:2], channels[2] + context, channels[3] + context]
    shapes = {name: shape for i, width in enumerate(out) for name, shape in norm(f'extra_norm.{i}', width).items()}
    if detector:
        shapes.update({**norm('extra_norm.4', channels[3]), **conv('h_proj.0', out[3], channels[3], 1),
                       **scale('h_proj.1', out[3])})
    return shapes


def shapes_of(module: nn.Module) -> dict[str, tuple]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize('arch', ARCHS)
def test_weights_have_the_names_and_shapes_of_the_authors(arch):
    expected = authors_shapes(*AUTHORS[arch])
    with torch.device('meta'):
        classifier = OverLoCK(arch, out_indices=3, for_classifier=True)
        segmentor, detector = OverLoCK(arch), OverLoCK(arch, add_overview=True)
    assert shapes_of(classifier) == expected
    assert shapes_of(segmentor) == {**expected, **dense_shapes(AUTHORS[arch][2], detector=False)}
    assert shapes_of(detector) == {**expected, **dense_shapes(AUTHORS[arch][2], detector=True)}


def test_a_checkpoint_of_the_authors_is_loaded(tmp_path):
    """Their classification checkpoints are a bare state dict, with both classifiers and without the outputs' norms."""
    shapes = authors_shapes(LIGHT['depths'], LIGHT['focus_depths'], LIGHT['channels'], LIGHT['kernel_sizes'], [4, 4])
    weights = {name: torch.randn(shape) if shape else torch.tensor(7) for name, shape in shapes.items()}
    extra = {'head.0.weight': torch.randn(1024, 40, 1, 1), 'aux_head.2.weight': torch.randn(10, 32, 1, 1)}
    torch.save({**weights, **extra}, tmp_path / 'authors.pth')
    model = light(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'authors.pth')))
    model.init_weights()
    own = model.state_dict()
    for name, value in weights.items():
        assert torch.equal(own[name], value), name
    assert {name for name in own if name not in weights} == set(dense_shapes(LIGHT['channels'], detector=False))


# The equations.

@pytest.mark.parametrize('options', [dict(), dict(add_overview=True), dict(out_indices=3, for_classifier=True)])
def test_equals_the_equations(options):
    """At stage 3 the map is larger than the kernels, at stage 4 smaller."""
    model = randomised(light(**options)).double().eval()
    image = torch.randn(2, 3, 113, 144, dtype=torch.float64)
    with torch.no_grad():
        outs, expected = model(image), Plain(model.state_dict(), LIGHT['kernel_sizes'], [4, 4])(image)
    assert len(outs) == len(expected)
    for out, plain in zip(outs, expected):
        torch.testing.assert_close(out, plain, rtol=1e-10, atol=1e-10)


# As a backbone.

@pytest.mark.parametrize('height, width', [(224, 320), (130, 257), (33, 47)])
def test_strides_and_channels(height, width):
    model = light().eval()
    with torch.no_grad():
        outs = model(torch.randn(1, 3, height, width))
    expected = [(1, channels, -(-height // stride), -(-width // stride))
                for channels, stride in zip((8, 16, 40, 40), (4, 8, 16, 32))]
    assert [tuple(out.shape) for out in outs] == expected
    assert all(out.is_contiguous() and out.isfinite().all() for out in outs)


@pytest.mark.parametrize('options', [dict(), dict(add_overview=True), dict(out_indices=3, for_classifier=True),
                                     dict(out_indices=(0, 1)), dict(out_indices=(1, 2))])
def test_every_parameter_learns(options):
    model = randomised(light(drop_path_rate=0.0, **options))
    sum(out.square().mean() for out in model(torch.randn(2, 3, 64, 96))).backward()
    assert [name for name, param in model.named_parameters()
            if param.grad is None or not param.grad.isfinite().all() or not param.grad.any()] == []


@pytest.mark.parametrize('out_indices, last', [((0,), 'blocks1'), ((1,), 'blocks2'), ((-2,), 'sub_blocks3')])
def test_stages_after_the_last_one_returned_are_not_built(out_indices, last):
    whole, part = light().eval(), light(out_indices=out_indices).eval()
    names = [name for name, _ in part.named_children()]
    assert names[-2:] == [last, 'extra_norm'] and len(names) < len(list(whole.children()))
    assert list(part.extra_norm) == [str(out_indices[0] % 4)]
    part.load_state_dict(whole.state_dict(), strict=False)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(part(image)[0], whole(image)[out_indices[0]])


def test_drop_path_rates_rise_from_block_to_block():
    """In the order Base-Net, Overview-Net, Focus-Net; the first block never drops."""
    model = light(drop_path_rate=0.7)
    rates = [block.proj[-1] for i in range(4) for block in getattr(model, f'blocks{i + 1}')]
    rates += [block.drop_path for block in (*model.sub_blocks3, *model.sub_blocks4)]
    assert type(rates[0]) is nn.Identity
    assert [drop.p for drop in rates[1:]] == pytest.approx([0.7 * i / 7 for i in range(1, 8)])
    assert {drop.mode for drop in rates[1:]} == {'row'}


@pytest.mark.parametrize('frozen', range(5))
def test_frozen_stages(frozen):
    model = light(frozen_stages=frozen).train()
    stages = [('patch_embed1', 'blocks1'), ('patch_embed2', 'blocks2'),
              ('patch_embed3', 'blocks3', 'patch_embed4', 'blocks4', 'high_level_proj', 'sub_blocks3'),
              ('patch_embedx', 'sub_blocks4')]
    expected = {name for names in stages[:frozen] for name in names}
    for name, child in model.named_children():
        assert all(param.requires_grad != (name in expected) for param in child.parameters()), name
        assert all(module.training != (name in expected) for module in child.modules()), name
    before = {name: value.clone() for name, value in model.state_dict().items() if name.split('.')[0] in expected}
    sum(out.mean() for out in model(torch.randn(2, 3, 64, 64))).backward()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_recomputing_blocks_changes_nothing_but_memory():
    """Outputs, gradients, and the running statistics, which see each batch once."""
    found = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = randomised(light(with_cp=with_cp, drop_path_rate=0.5)).double()
        calls = []
        model.sub_blocks4[0].se_layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        out = model(torch.randn(2, 3, 64, 64, dtype=torch.float64))
        sum(level.square().sum() for level in out).backward()
        assert len(calls) == 1 + with_cp
        buffers = [value for name, value in model.named_buffers() if not name.endswith('num_batches_tracked')]
        found.append((*out, *(param.grad for param in model.parameters()), *buffers))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}


def test_images_of_a_batch_do_not_meet():
    model = randomised(light()).double().eval()
    images = torch.randn(3, 3, 64, 80, dtype=torch.float64)
    with torch.no_grad():
        for i, together in enumerate(zip(*model(images))):
            for a, b in zip(together, model(images[i:i + 1])):
                torch.testing.assert_close(a[None], b, rtol=1e-10, atol=1e-10)


# Merging.

@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_a_merged_model_computes_the_same(dtype, tolerance, tmp_path):
    model = light().to(dtype)
    image = torch.randn(2, 3, 96, 128, dtype=dtype)
    for _ in range(2):
        model(image)  # statistics of the BatchNorms
    model.eval()
    built_merged = light(deploy=True).to(dtype).eval()
    with torch.no_grad():
        expected = model(image)
        model.switch_to_deploy()
        merged = model(image)
        weights = model.state_dict()
        model.switch_to_deploy()
        assert weights.keys() == model.state_dict().keys() and not any('dil_' in name for name in weights)
        built_merged.load_state_dict(weights)
        for a, b, c in zip(expected, merged, built_merged(image)):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
            assert torch.equal(b, c)


# What is refused.

@pytest.mark.parametrize('options, message', [
    (dict(arch='xxl'), r"arch must be one of \('xt', 't', 's', 'b'\) or a dict, got 'xxl'"),
    (dict(arch=dict(LIGHT, depths=[1, 1])), r'lists of the lengths .*, got .*\[1, 1\]'),
    (dict(arch={key: value for key, value in LIGHT.items() if key != 'groups'}), 'lists of the lengths'),
    (dict(arch=dict(LIGHT, groups=2)), 'lists of the lengths'),
    (dict(arch=['t']), r"lists of the lengths .*, got \['t'\]"),
    (dict(arch=dict(LIGHT, groups=[2, 3])), 'multiple of 4 x groups, got 32 channels and 3 groups'),
    (dict(for_classifier=True), r'for_classifier needs out_indices=3, got \(0, 1, 2, 3\)'),
    (dict(add_overview=True, out_indices=(0, 1)), r'add_overview needs stage 3 .* got out_indices=\(0, 1\)'),
    (dict(add_overview=True, for_classifier=True, out_indices=3), 'for_classifier=True'),
])
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OverLoCK(**{'arch': LIGHT, **options})


def test_initial_weights():
    model = light()
    model.init_weights()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert 0 < module.weight.abs().max() <= 2, name
            assert module.bias is None or not module.bias.any(), name
    weights = torch.cat([module.weight.flatten() for module in model.modules() if isinstance(module, nn.Conv2d)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)
    assert not any(block.rpb2.any() for block in model.sub_blocks3)


def test_what_overview_net_adds_starts_small():
    model = light(add_overview=True)
    model.init_weights()
    assert torch.equal(model.h_proj[1].weight, torch.full((40, 1, 1, 1), 1e-5))


def test_norm_eval_keeps_running_statistics():
    model, other = light(norm_eval=True).train(), light().train()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = [m.running_mean.clone() for m in norms]
    for m in (model, other):
        m(torch.randn(2, 3, 64, 64))
    assert norms and all(torch.equal(m.running_mean, mean) for m, mean in zip(norms, before))
    assert any(m.running_mean.any() for m in other.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert model.training
