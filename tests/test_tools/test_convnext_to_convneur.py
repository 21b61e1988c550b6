"""tools/model_converters/convnext_to_convneur.py: what it makes computes what the source computes."""
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from safetensors.torch import save_file
from torch import Tensor, nn

from convneur_mm import config
from convneur_mm.apis.convnext import convert
from convneur_mm.apis.sources import SOURCES
from convneur_mm.engine.files.checkpoint import read_checkpoint
from convneur_mm.models import ConvNeur

pytestmark = pytest.mark.needs('timm', 'mmpretrain')
FOLDER = Path(__file__).parents[2] / 'tools' / 'model_converters'
NAMES = {'m1': 'atto', 'm2': 'femto', 'm3': 'pico', 'm4': 'nano', 'm5': 'tiny', 'm6': 'base'}


@pytest.fixture(scope='module')
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import convnext_to_convneur
        yield convnext_to_convneur


def filled(model: nn.Module) -> nn.Module:
    """Random weights of ordinary scales for a model, with biases, norms, GRNs and layer scales that take part."""
    model.eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2:
                p.normal_(1.0 if 'norm' in name and name.endswith('weight') else 0.0, 0.3)
            else:
                p.normal_(0.0, p[0].numel() ** -0.5)
    return model


def timm_model(arch: str, version: int = 2, suffix: str = '', **options: object) -> nn.Module:
    name = f'convnext{"v2" if version == 2 else ""}_{NAMES[arch]}{suffix}'
    return named_timm_model(name, num_classes=7, **options)


def named_timm_model(name: str, **options: object) -> nn.Module:
    import timm
    with torch.device('meta'):  # its own random weights would take longer than all else here
        model = timm.create_model(name, **options)
    return filled(model.to_empty(device='cpu'))


def mmpretrain_classifier(arch: str, version: int = 2, **options: object) -> nn.Module:
    from mmpretrain import models  # noqa: F401  registers them
    variant = dict(use_grn=True, layer_scale_init_value=0.0) if version == 2 else {}
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return filled(MODELS.build(dict(
            type='ImageClassifier', backbone=dict(type='ConvNeXt', arch=NAMES[arch], **variant, **options),
            head=dict(type='LinearClsHead', num_classes=7, in_channels=ConvNeur.arch_settings[arch]['channels'][-1]))))


def authors_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's weights as the authors' code names and shapes them."""
    renames = (
        (r'^stem\.', 'downsample_layers.0.'), (r'^stages\.(\d)\.downsample\.', r'downsample_layers.\1.'),
        (r'\.blocks\.', '.'), (r'conv_dw', 'dwconv'), (r'mlp\.fc', 'pwconv'), (r'mlp\.grn\.weight', 'grn.gamma'),
        (r'mlp\.grn\.bias', 'grn.beta'), (r'^head\.norm\.', 'norm.'), (r'^head\.fc\.', 'head.'))
    result = {}
    for name, value in weights.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if '.grn.' in name:
            value = value.view(1, 1, 1, -1)
        result[name] = value.flatten(1) if 'pwconv' in name and value.dim() == 4 else value
    return result


def mmpretrain_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's weights as mmpretrain's classifier names and shapes them."""
    result = {}
    for name, value in authors_weights(weights).items():
        if name.startswith('head.'):
            name = name.replace('head.', 'head.fc.')
        else:
            name = f'backbone.{re.sub("^norm", "norm3", name)}'.replace('.dw', '.depthwise_')
            name = name.replace('.pw', '.pointwise_')
        result[name] = value.flatten() if '.grn.' in name else value
    return result


@torch.no_grad()
def stage_outputs(model: nn.Module, head: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The output of every stage, and that of the head."""
    seen = []
    handles = [stage.register_forward_hook(lambda _, __, out: seen.append(out)) for stage in model.stages]
    logits = head(model(x))
    for handle in handles:
        handle.remove()
    assert len(seen) == 4
    return [*seen, logits]


def assert_same_function(weights: dict[str, Tensor], arch: str, expected: list[Tensor], x: Tensor) -> None:
    with torch.device('meta'):
        backbone = ConvNeur(arch, out_indices=3, gap_before_final_norm=True).eval()
        head = nn.Linear(backbone.channels[-1], len(weights['head.fc.bias']))
    model = nn.ModuleDict(dict(backbone=backbone, head=nn.ModuleDict(dict(fc=head))))
    own = model.state_dict()
    model.load_state_dict({name: value for name, value in weights.items() if name in own}, assign=True)
    for found, wanted in zip(stage_outputs(backbone, lambda outs: head(outs[-1]), x), expected, strict=True):
        assert wanted.std() > 0.05
        assert (found - wanted).norm() / wanted.norm() <= 1e-5


@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize('arch', [pytest.param(name, marks=[pytest.mark.slow] * (name in ('m5', 'm6')))
                                  for name in NAMES])
def test_features_and_logits_are_those_of_the_source(tool, arch, version):
    """timm's model against ours, and its weights in the two other layouts.

    Of m5 and m6 in one layout if they are ConvNeXt-V1: they are large, and names depend on size and version apart.
    """
    source, x = timm_model(arch, version), torch.randn(1, 3, 64, 96)
    weights = source.state_dict()
    layouts = {'timm': weights}
    if version == 2 or arch not in ('m5', 'm6'):
        layouts.update({"the authors'": authors_weights(weights), 'mmpretrain': mmpretrain_weights(weights)})
    results = {}
    for layout, saved in layouts.items():
        before = {name: value.clone() for name, value in saved.items()} if arch == 'm1' else {}
        done = convert(saved)
        assert (done.arch, done.layout, done.version) == (arch, layout, 'ConvNeXt-V2' if version == 2 else 'ConvNeXt')
        assert all(torch.equal(saved[name], value) for name, value in before.items())
        results[layout] = done.weights
    assert_same_function(results['timm'], arch, stage_outputs(source, lambda logits: logits, x), x)
    for found in list(results.values())[1:]:
        assert found.keys() == results['timm'].keys()
        for name, value in found.items():
            assert torch.equal(value, results['timm'][name]), name


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[pytest.mark.slow] * (source.arch in ('m5', 'm6'))) for name, source in SOURCES.items()])
def test_named_sources(tool, name, tmp_path, monkeypatch, capsys):
    """timm's own model of each published name converts, to the arch and under the licence that are promised."""
    import timm
    known = timm.get_pretrained_cfg(name)
    source, expected = named_timm_model(name), SOURCES[name]
    assert (known.license, bool(known.num_classes)) == (expected.licence, expected.top1 is not None)
    monkeypatch.chdir(tmp_path)
    Path('weights').mkdir()
    save_file(source.state_dict(), f'weights/{name}.safetensors')
    tool.main([name, 'ours.pth'])
    assert f'licence: {expected.licence}\n' in capsys.readouterr().out
    saved = read_checkpoint('ours.pth')
    assert (saved['meta']['arch'], saved['meta']['licence']) == (expected.arch, expected.licence)
    x = torch.randn(1, 3, 64, 96)
    if expected.top1 is None:
        ours = ConvNeur(expected.arch, out_indices=3, gap_before_final_norm=True).eval()
        ours.load_state_dict({name[9:]: value for name, value in saved['state_dict'].items()})
        with torch.no_grad():
            found, wanted = ours(x)[0].flatten(), source(x).flatten()
        assert (found - wanted).norm() / wanted.norm() <= 1e-5
    else:
        assert_same_function(saved['state_dict'], expected.arch, stage_outputs(source, lambda logits: logits, x), x)


@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize('options', [
    {}, dict(linear_pw_conv=False), dict(out_indices=(0, 1, 2, 3), gap_before_final_norm=False)], ids=str)
def test_features_are_those_of_mmpretrain(tool, version, options):
    source, x = mmpretrain_classifier('m1', version, **options), torch.randn(2, 3, 65, 96)
    if not options:
        expected = mmpretrain_weights(timm_model('m1', version).state_dict())
        assert {name: value.shape for name, value in source.state_dict().items()} == {
            name: value.shape for name, value in expected.items()}
    weights = convert(source.state_dict()).weights
    norms = [i for i in range(4) if f'backbone.norm{i}.weight' in source.state_dict()]
    assert [i for i in range(4) if f'backbone.norm{i}.weight' in weights] == norms
    model = ConvNeur('m1', out_indices=norms, gap_before_final_norm=source.backbone.gap_before_final_norm).eval()
    model.load_state_dict({name[9:]: value for name, value in weights.items() if name.startswith('backbone.')})
    with torch.no_grad():
        for found, wanted in zip(model(x), source.backbone(x), strict=True):
            assert (found - wanted).norm() / wanted.norm() <= 1e-5


@pytest.mark.parametrize('version', [1, 2])
def test_each_weight_is_reported_once(tool, version):
    source = timm_model('m1', version).state_dict()
    for saved in (source, authors_weights(source), mmpretrain_weights(source)):
        saved['ema.step'] = torch.zeros(1)
        done = convert(saved)
        assert sorted([*done.taken, *done.renamed, *done.folded, *done.left_out]) == sorted(saved)
        assert len(done.weights) == len(done.taken) + len(done.renamed) + len(done.new)
        assert done.left_out == ['ema.step']
        assert len(done.folded) == (12 if version == 1 else 0)
        assert all(name.endswith('.gamma') and '.grn.' not in name for name in done.folded)
        kinds = {'.global_branch.'} | ({'.grn.'} if version == 1 else set())
        assert {kind for name in done.new for kind in ('.global_branch.', '.grn.') if kind in name} == kinds
        assert len(done.doubled) == 8
        if done.layout == 'mmpretrain':
            assert not done.renamed
        else:
            assert 'head.norm.weight' in done.renamed or 'norm.weight' in done.renamed


def test_new_weights_are_those_of_the_initialisation(tool):
    """The same in each run, without a step of the caller's generator, at the scales that training starts from."""
    source = timm_model('m1').state_dict()
    state = torch.get_rng_state()
    first = convert(source)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)  # so that the second starts from another state of the generator
    second = convert(source)
    model = ConvNeur('m1', out_indices=3)
    model.init_weights()
    for name in first.new:
        found, usual = first.weights[name], model.state_dict()[name.removeprefix('backbone.')]
        assert torch.equal(found, second.weights[name])
        if '.expand.' in name:
            assert not found.any()
        else:
            assert found.std().item() == pytest.approx(usual.std().item(), rel=0.3), name
            assert found.mean().item() == pytest.approx(usual.mean().item(), abs=0.1), name


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_results_are_float32(tool, dtype):
    source = {name: value.to(dtype) for name, value in timm_model('m1', 1).state_dict().items()}
    found = convert(source).weights
    assert {value.dtype for value in found.values()} == {torch.float32}
    name = 'stages.2.blocks.3.'
    product = source[f'{name}gamma'].float() * source[f'{name}mlp.fc2.bias'].float()
    assert torch.equal(found['backbone.stages.2.3.pointwise_conv2.bias'], product)


def test_images_of_other_channels(tool):
    found = convert(timm_model('m1', in_chans=5).state_dict()).weights
    ConvNeur('m1', in_channels=5, out_indices=3).load_state_dict(
        {name[9:]: value for name, value in found.items() if name.startswith('backbone.')})


@pytest.mark.parametrize('build', [
    lambda: timm_model('m1', head_hidden_size=320).state_dict(),
    lambda: {name: value for name, value in timm_model('m1').state_dict().items() if name != 'head.norm.weight'},
], ids=['hidden layer', 'no final norm'])
def test_other_heads_are_left_out(tool, build):
    done = convert(build())
    assert not [name for name in done.weights if name.startswith('head.')]
    assert {'head.fc.weight', 'head.fc.bias'} <= set(done.left_out)


def test_encoders_without_a_head_get_a_new_norm(tool):
    """As timm's of masked autoencoders."""
    source = {name: value for name, value in timm_model('m1').state_dict().items() if not name.startswith('head.')}
    done = convert(source)
    new = [name for name in done.new if '.global_branch.' not in name]
    assert new == ['backbone.norm3.weight', 'backbone.norm3.bias']
    assert torch.equal(done.weights['backbone.norm3.weight'], torch.ones(320))
    assert not done.left_out


def without(name: str) -> dict[str, Tensor]:
    weights = timm_model('m1', 1).state_dict()
    del weights[name]
    return weights


def reshaped(name: str, *shape: int) -> dict[str, Tensor]:
    return {**timm_model('m1', 1).state_dict(), name: torch.zeros(shape)}


def features_only() -> dict[str, Tensor]:
    return {re.sub(r'^(stem|stages)\.(\d)', r'\1_\2', name): value
            for name, value in timm_model('m1').state_dict().items()}


@pytest.mark.parametrize('build, message', [
    (lambda: nn.Linear(2, 3).state_dict(), r'no ConvNeXt in a known layout: expected one of the weights '
     r"stages\.0\.blocks\.0\.conv_dw\.weight \(timm\), .*\(the authors'\), .*\(mmpretrain\), got weight, bias"),
    (features_only, 'no ConvNeXt in a known layout: .*got stem_0.weight'),
    (lambda: ConvNeur('m1').state_dict(), 'these are weights of ConvNeur already'),
    (lambda: timm_model('m1', depths=(2, 2, 3, 2)).state_dict(), r'no arch of ConvNeur has depths \[2, 2, 3, 2\] and '
     r'channels \[40, 80, 160, 320\]; there are m1 \[2, 2, 6, 2\], \[40, 80, 160, 320\]; m2'),
    (lambda: timm_model('m1', 1, '_rms').state_dict(), r'it lacks downsample_\S+ \(4\), stages\S+norm.bias \(12\)$'),
    (lambda: timm_model('m1', 1, '_ols').state_dict(), r'it has also downsample_layers\.\*\.\*\.weight'),
    (lambda: timm_model('m1', 1, head_norm_first=True).state_dict(), 'has also norm_pre.weight, norm_pre.bias'),
    (lambda: without('stages.2.blocks.4.gamma'), r'it lacks stages\.\*\.\*\.gamma$'),
    (lambda: without('stages.2.blocks.4.mlp.fc1.bias'), r'it lacks stages\.\*\.\*\.pointwise_conv1\.bias$'),
    (lambda: reshaped('stages.1.blocks.0.gamma', 40), r'stages.1.blocks.0.gamma must be \(80,\), got \(40,\)'),
    (lambda: reshaped('stem.0.weight', 40, 3, 2, 2), r'stem.0.weight must be \(40, 3, 4, 4\), got \(40, 3, 2, 2\)'),
    (lambda: reshaped('stem.0.weight', 40), r'stem.0.weight must be \(40, 3, 4, 4\), got \(40,\)'),
], ids=['linear', 'flattened', 'ours', 'depths', 'rms', 'overlap', 'norm first', 'gamma', 'bias', 'shape of gamma',
        'shape of stem', 'axes of stem'])
def test_other_models_are_refused(tool, build, message, tmp_path, refused):
    torch.save(build(), tmp_path / 'x.pt')
    with refused(rf'{tmp_path}/x.pt: .*{message}'):
        tool.main([str(tmp_path / 'x.pt'), str(tmp_path / 'y.pth')])
    assert not (tmp_path / 'y.pth').exists()


@pytest.mark.parametrize('src, dst, options, message', [
    ('nowhere.pt', 'y.pth', [], 'SRC: no such file: nowhere.pt'),
    ('x.pt', 'none/y.pth', [], r'DST: no such folder: none \(of none/y.pth\)'),
    ('x.pt', 'y.safetensors', [], 'DST must be the name of a file that ends in .pth, got y.safetensors'),
    ('x.pt', 'folder.pth', [], 'DST must be the name of a file that ends in .pth, got folder.pth'),
    ('x.pth', 'x.pth', [], 'DST must be another file than SRC, got x.pth for both'),
    ('x.pt', 'y.pth', ['--arch', 'm3'], r'x.pt: --arch m3 was asked for, and the weights are of m1: depths \[2, 2, 6'),
    ('text.pt', 'y.pth', [], 'text.pt is no checkpoint, or damaged'),
    ('code.pt', 'y.pth', [], 'code.pt was not loaded, because it needs pickle.*--allow-pickle'),
])
def test_bad_arguments_are_named(tool, src, dst, options, message, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    weights = timm_model('m1').state_dict()
    for name in ('x.pt', 'x.pth'):
        torch.save(weights, name)
    torch.save(dict(model=weights, path=Path('x')), 'code.pt')
    Path('text.pt').write_text('no weights')
    Path('folder.pth').mkdir()
    before = set(Path().iterdir())
    with refused(message):
        tool.main([src, dst, *options])
    assert set(Path().iterdir()) == before


@pytest.mark.parametrize('version, licence', [(1, 'MIT.*Apache-2.0'), (2, 'CC BY-NC 4.0.*MIT')])
@pytest.mark.parametrize('layout', ['timm', 'authors', 'mmpretrain'])
def test_files(tool, version, licence, layout, tmp_path, capsys):
    """As they are published: what the tool writes and prints, and a backbone that starts from it."""
    source = timm_model('m1', version)
    weights = source.state_dict()
    src, dst = tmp_path / f'{layout}.{"safetensors" if layout == "timm" else "pth"}', tmp_path / 'y.pth'
    if layout == 'timm':
        save_file(weights, src)
    elif layout == 'authors':
        torch.save(dict(model=authors_weights(weights)), src)
    else:
        torch.save(dict(state_dict=mmpretrain_weights(weights), meta=dict(epoch=1)), src)
    tool.main([str(src), str(dst), '--arch', 'm1'])
    assert sorted(tmp_path.iterdir()) == sorted([src, dst])

    printed = capsys.readouterr().out
    meta = read_checkpoint(str(dst))['meta']
    assert re.search(licence, meta['licence']) and f'licence: {meta["licence"]}\n' in printed
    assert (meta['source'], meta['arch']) == (src.name, 'm1')
    assert '-> ConvNeur-m1, head of 7 classes' in printed
    assert f"checkpoint='{dst}'" in printed
    for line in ('taken as they are', 'renamed', 'folded', 'doubled', 'made new', 'left out'):
        assert re.search(rf'^  {line} +\d', printed, re.MULTILINE), printed
    if version == 1:
        assert re.search(r'folded +12 layer scales', printed)

    model = ConvNeur('m1', init_cfg=dict(type='Pretrained', checkpoint=str(dst))).eval()
    model.init_weights()
    x = torch.randn(1, 3, 64, 64)
    expected = stage_outputs(source, lambda logits: logits, x)[:4]
    for found, wanted in zip(stage_outputs(model, lambda outs: outs, x), expected):
        assert (found - wanted).norm() / wanted.norm() <= 1e-5


def test_pickled_files_if_they_are_trusted(tool, tmp_path):
    torch.save(dict(model=timm_model('m1').state_dict(), path=Path('x')), tmp_path / 'x.pt')
    tool.main([str(tmp_path / 'x.pt'), str(tmp_path / 'y.pth'), '--allow-pickle'])
    assert (tmp_path / 'y.pth').is_file()


def test_it_finds_what_it_imports(monkeypatch, refused):
    monkeypatch.setattr(sys, 'argv', ['convnext_to_convneur.py', 'nowhere.pt', 'y.pth'])
    monkeypatch.setattr(sys, 'path', [path for path in sys.path if Path(path) != FOLDER.parent])
    monkeypatch.delitem(sys.modules, '_environment', raising=False)
    monkeypatch.setenv('OMP_WAIT_POLICY', 'PASSIVE')
    with refused('SRC: no such file: nowhere.pt'):
        runpy.run_path(str(FOLDER / 'convnext_to_convneur.py'), run_name='__main__')


def segmentation_batch() -> dict:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample
    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(2, (1, 96, 96)))) for _ in range(2)]
    return dict(inputs=[torch.randint(256, (3, 96, 96), dtype=torch.uint8) for _ in samples], data_samples=samples)


def detection_batch() -> dict:
    from mmdet.testing import demo_mm_inputs
    return demo_mm_inputs(1, (3, 64, 64), num_items=[3], num_classes=2, with_mask=True)


@pytest.mark.needs('mmdet', 'mmseg')
@pytest.mark.parametrize('name, batch', [
    ('cascade_rcnn_convneur_m1_shapes', detection_batch), ('semantic_fpn_convneur_m1_shapes', segmentation_batch)])
def test_detectors_and_segmentors_start_from_it(tool, name, batch, tmp_path):
    """Training reaches all of the memory: ``expand`` in the first step, what is before it from the second on."""
    torch.save(timm_model('m1').state_dict(), tmp_path / 'x.pt')
    tool.main([str(tmp_path / 'x.pt'), str(tmp_path / 'y.pth')])
    saved = torch.load(tmp_path / 'y.pth', weights_only=True)['state_dict']
    cfg = Config.fromfile(config(name))
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'y.pth'))
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        model.init_weights()
        optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        weights = model.state_dict()
        taken = [key for key in saved if key in weights]
        assert len(taken) == len(saved) - 2  # the head's
        assert all(torch.equal(weights[key], saved[key]) for key in taken)
        branch, reached = model.backbone.stages[0][0].global_branch, []
        for key in ('expand', 'memory.query'):
            branch.get_submodule(key).weight.register_hook(
                lambda gradient, key=key: reached.append((key, bool(gradient.any()))))
        for _ in range(2):
            losses = model.train_step(batch(), optim_wrapper)
            assert losses['loss'].isfinite()
    assert [sorted(reached[:2]), sorted(reached[2:])] == [
        [('expand', True), ('memory.query', False)], [('expand', True), ('memory.query', True)]]
