"""Models with the weights of a checkpoint, the class names that go with them, and what is refused."""
import copy
import logging
import os

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from tiny_models import CHANNELS, CLASSES, CONFIGS, TINY, save_weights, tiny_model

import convneur_mm
from convneur_mm.apis import init_model
from convneur_mm.apis import model as module
from convneur_mm.engine.files.errors import LaunchError
from convneur_mm.engine.files.weights_file import CheckpointError, CheckpointNotFoundError, UnsafeCheckpointError

pytestmark = pytest.mark.needs('mmdet', 'mmseg', 'mmpretrain')
TASKS = tuple(CONFIGS)


@pytest.fixture
def lines():
    """Messages that are logged."""
    messages = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.mark.parametrize('task', TASKS)
def test_weights_and_classes_of_a_checkpoint(task, tmp_path, monkeypatch, lines):
    monkeypatch.chdir(tmp_path)
    source = tiny_model(task)
    assert 'no checkpoint was given: the weights are random' in lines
    path = save_weights(source, tmp_path / 'x.pth', CLASSES=CLASSES[task])
    lines.clear()
    model = tiny_model(task, path)
    assert lines == [f'{len(CLASSES[task])} classes ({", ".join(CLASSES[task][:6])}'
                     f'{", …" if len(CLASSES[task]) > 6 else ""}) of the checkpoint {path}'
                     + (', colours of the config' if task != 'classifier' else '')]
    assert not model.training
    assert model.dataset_meta['classes'] == CLASSES[task]
    assert len(model.dataset_meta['palette']) == len(CLASSES[task])
    for (name, expected), found in zip(source.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(expected, found), name
    assert os.listdir(tmp_path) == ['x.pth']  # no logs, no work dir


def test_a_config_as_loaded_is_not_changed():
    cfg = Config.fromfile(convneur_mm.config(CONFIGS['classifier']))
    before = copy.deepcopy(cfg.to_dict())
    model = init_model(cfg, device='cpu', cfg_options=TINY['classifier'])
    assert cfg.to_dict() == before
    assert model.cfg.model.head.in_channels == CHANNELS[3]
    # Settings are carried to their places in one as well.
    assert init_model(cfg, device='cpu', cfg_options={**TINY['classifier'], 'classes': ('a', 'b')}).dataset_meta[
        'classes'] == ('a', 'b')


def test_preprocessor_of_a_classifier_is_that_of_its_config():
    mean = tiny_model('classifier').data_preprocessor.mean
    assert mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])


class TestClasses:
    def test_those_of_the_checkpoint_go_first(self, tmp_path, lines):
        names, palette = tuple('abcdefg'), [(i, i, i) for i in range(7)]
        path = save_weights(tiny_model('segmentor'), tmp_path / 'x.pth', classes=names, palette=palette,
                            reduce_zero_label=True)
        meta = tiny_model('segmentor', path).dataset_meta
        assert meta == dict(classes=names, palette=palette, reduce_zero_label=True)
        assert lines[-1] == (f'7 classes (a, b, c, d, e, f, …) of the checkpoint {path}, '
                             f'colours of the checkpoint {path}')

    def test_other_names_do_not_take_the_colours_of_the_config(self, tmp_path, lines):
        path = save_weights(tiny_model('segmentor'), tmp_path / 'x.pth', classes=tuple('abcdefg'))
        palette = tiny_model('segmentor', path).dataset_meta['palette']
        assert lines[-1].endswith(', colours made up')
        assert len({tuple(colour) for colour in palette}) == 7
        assert palette != tiny_model('segmentor').dataset_meta['palette']

    def test_bare_weights_have_those_of_the_config(self, tmp_path, lines):
        torch.save(tiny_model('detector').state_dict(), tmp_path / 'x.pth')
        meta = tiny_model('detector', tmp_path / 'x.pth').dataset_meta
        assert lines[-1].endswith(' of the config, colours of the config')
        assert meta['classes'] == CLASSES['detector']
        assert len(meta['palette']) == 6  # of COCO's 80

    def test_names_of_former_releases(self, tmp_path):
        weights = tiny_model('segmentor').state_dict()
        torch.save(dict(state_dict=weights, meta=dict(CLASSES=tuple('abcdefg'), PALETTE=[[9, 9, 9]] * 7)),
                   tmp_path / 'x.pth')
        meta = tiny_model('segmentor', tmp_path / 'x.pth').dataset_meta
        assert (meta['classes'], meta['palette']) == (tuple('abcdefg'), [(9, 9, 9)] * 7)

    def test_without_any_the_place_for_them_is_named(self, lines):
        meta = tiny_model('classifier', options={
            'runner_type': 'Runner', 'default_hooks.settings': None,
            'test_dataloader.dataset.classes': None}).dataset_meta
        assert not {'classes', 'palette'} & meta.keys()
        assert 'set test_dataloader.dataset.classes of the config' in lines[-1]


class TestOtherCheckpoints:
    def test_another_model(self, tmp_path):
        path = save_weights(tiny_model('classifier'), tmp_path / 'x.pth')
        with pytest.raises(CheckpointError, match=f'{path} is not of this model: .*neck: 16 of 16 weights missing; '):
            tiny_model('segmentor', path)

    def test_other_classes(self, tmp_path):
        path = save_weights(tiny_model('classifier'), tmp_path / 'x.pth', classes=CLASSES['classifier'])
        with pytest.raises(CheckpointError, match=r'Different classes\? The checkpoint has 6, the config 2\.'):
            tiny_model('classifier', path, {'classes': ('a', 'b')})

    def test_nothing_in_common(self, tmp_path):
        torch.save(dict(other=torch.ones(2)), tmp_path / 'x.pth')
        with pytest.raises(CheckpointError, match='holds none of the model\'s weights'):
            tiny_model('classifier', tmp_path / 'x.pth')

    def test_no_file(self):
        with pytest.raises(CheckpointNotFoundError, match='no such checkpoint: missing.pth'):
            tiny_model('classifier', 'missing.pth')

    def test_one_that_needs_pickle(self, tmp_path):
        model = tiny_model('classifier')
        torch.save(dict(state_dict=model.state_dict(), object=print), tmp_path / 'x.pth')
        with pytest.raises(UnsafeCheckpointError, match='allow_pickle=True in Python'):
            tiny_model('classifier', tmp_path / 'x.pth')
        loaded = init_model(CONFIGS['classifier'], tmp_path / 'x.pth', 'cpu', TINY['classifier'], allow_pickle=True)
        assert torch.equal(loaded.head.fc.weight, model.head.fc.weight)

    def test_weights_without_a_place_are_named(self, tmp_path, lines):
        weights = tiny_model('classifier').state_dict()
        weights['spare.weight'] = torch.ones(1)
        torch.save(weights, tmp_path / 'x.pth')
        tiny_model('classifier', tmp_path / 'x.pth')
        assert f'1 weights of {tmp_path / "x.pth"} are not used: spare.weight' in lines


def test_the_auxiliary_head_of_a_training_may_be_missing_or_another(tmp_path):
    def options(classes):
        return {'model.auxiliary_head': dict(
            type='FCNHead', in_channels=CHANNELS[2], in_index=2, channels=8, num_classes=classes)}

    path = save_weights(tiny_model('segmentor', options=options(3)), tmp_path / 'x.pth')
    head = tiny_model('segmentor', path, options(3)).decode_head.conv_seg.weight
    for other in (options(7), {}):
        assert torch.equal(tiny_model('segmentor', path, other).decode_head.conv_seg.weight, head)
    path = save_weights(tiny_model('segmentor'), tmp_path / 'x.pth')
    tiny_model('segmentor', path, options(7))


def test_versions_of_modules_reach_those_that_rename_weights(tmp_path, monkeypatch):
    model = tiny_model('classifier')
    weights = model.state_dict()
    weights._metadata['backbone']['version'] = 7
    torch.save(dict(state_dict=weights), tmp_path / 'x.pth')
    versions = []
    kind, load = type(model.backbone), type(model.backbone)._load_from_state_dict

    def spy(self, weights, prefix, metadata, *args):
        versions.append(metadata.get('version'))
        return load(self, weights, prefix, metadata, *args)

    monkeypatch.setattr(kind, '_load_from_state_dict', spy)
    tiny_model('classifier', tmp_path / 'x.pth')
    assert versions == [7]


def test_sync_bn_works_without_a_gpu():
    options = {f'model.{name}.norm_cfg': dict(type='SyncBN') for name in ('neck', 'decode_head')}
    model = tiny_model('segmentor', options=options)
    kinds = {type(layer) for layer in model.modules()}
    assert torch.nn.BatchNorm2d in kinds
    assert torch.nn.SyncBatchNorm not in kinds
    assert model.cfg.model.neck.norm_cfg.type == 'SyncBN'


@pytest.mark.parametrize('device', ['gpu', 'mps', 'cuda:x'])
def test_a_device_of_another_kind_is_refused(device):
    with pytest.raises(LaunchError, match=f"^device must be one of cpu, cuda on this machine, .*, got '{device}'$"):
        init_model('missing', device=device)


def test_other_accelerators_are_taken(monkeypatch):
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device('mps'))
    assert module._device('mps') == torch.device('mps')
    with pytest.raises(LaunchError, match="^device must be one of cpu, cuda, mps on this machine, .* got 'xpu'$"):
        module._device('xpu')


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(module, 'why_no_gpu', lambda: 'the reason')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(LaunchError, match="^device 'cuda': no GPU, the reason; use the device cpu$"):
        init_model('missing', device='cuda')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(LaunchError, match="^device 'cuda:2': 2 GPUs are visible, numbered from 0$"):
        init_model('missing', device='cuda:2')


def test_without_a_device_the_gpu_is_taken_where_there_is_one(monkeypatch):
    for available, expected in ((False, 'cpu'), (True, 'cuda')):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda available=available: available)
        assert module._device(None) == torch.device(expected)


@pytest.mark.parametrize('text, message', [
    ("default_scope = 'mmaction'\nmodel = dict()", "default_scope must be one of mmdet, mmseg, mmpretrain, got 'mmac"),
    ('model = dict()', 'default_scope must be one of mmdet, mmseg, mmpretrain, got None'),
    ("default_scope = 'mmseg'", 'has no model'),
])
def test_configs_of_other_kinds_are_refused(text, message, tmp_path):
    (tmp_path / 'other.py').write_text(text)
    with pytest.raises(LaunchError, match=f'{tmp_path / "other.py"}:? {message}'):
        init_model(tmp_path / 'other.py', device='cpu')
    with pytest.raises(LaunchError, match=message):
        init_model(Config.fromfile(tmp_path / 'other.py'), device='cpu')


def test_no_config_of_that_name():
    with pytest.raises(LaunchError, match="no config 'missing'"):
        init_model('missing', device='cpu')


def test_models_of_several_packages_live_side_by_side():
    """Which package a name is looked up in is said by a variable of the whole process."""
    before = DefaultScope.get_current_instance()
    assert {type(tiny_model(task)).__module__.partition('.')[0] for task in TASKS} == {'mmdet', 'mmseg', 'mmpretrain'}
    after = DefaultScope.get_current_instance()
    assert (after and after.scope_name) == (before and before.scope_name)


def test_overrides_are_not_changed():
    options = copy.deepcopy(TINY['classifier'])
    for _ in range(2):
        init_model(CONFIGS['classifier'], device='cpu', cfg_options=options)
    assert options == TINY['classifier']
