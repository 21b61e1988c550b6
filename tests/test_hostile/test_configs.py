"""Configs with wrong values: refused where the model or the data are built, with the key and the value."""
import copy
import re

import pytest
import torch
from hostile import HANDLED, Row, built, config, ids, training_data
from mmengine.config import Config
from tiny_models import CONFIGS, TINY

from convneur_mm.apis import init_model
from convneur_mm.datasets import make_shapes_coco
from convneur_mm.engine.files.errors import LaunchError
from convneur_mm.engine.launch import find_config
from convneur_mm.engine.settings import apply_settings

pytestmark = pytest.mark.needs('mmdet', 'mmseg', 'mmpretrain')
BACKBONE, MEMORY = 'model.backbone.', 'model.backbone.memory_cfg.'


def setting(key, value):
    return lambda: {key: value}


def refused(key, value, words=None):
    name = key.rpartition('.')[2]
    return Row(f'{key}={value!r}', setting(key, value), run=words or f'{name} must .*got {re.escape(repr(value))}')


ARCH = dict(depths=[1] * 4, channels=[8, 16, 24, 32], mem_channels=16)
# ``make`` gives overrides of the classifier's config.
MODELS = [
    Row('as it is', dict),
    refused(BACKBONE + 'unknown', 1, "unexpected keyword argument 'unknown'"),
    refused(MEMORY + 'unknown', 1, r"memory_cfg takes the keys .*, got \['unknown'\]"),
    refused(BACKBONE + 'memory_cfg', 'chunk_size=9', "memory_cfg must be a dict of options, got 'chunk_size=9'"),
    Row('memory_cfg of another branch', lambda: {BACKBONE + 'global_branch': 'cbam', MEMORY + 'chunk_size': 9},
        run=r"memory_cfg takes the keys .* with global_branch='cbam', got \['chunk_size'\]"),
    *(refused(MEMORY + 'chunk_size', value) for value in (0, -1, 1.5, '196', None, True)),
    *(refused(MEMORY + 'num_chunks', value) for value in (0, -2, 2.0)),
    *(refused(MEMORY + 'inner_step', value) for value in (float('nan'), float('inf'), 2, -0.1, '1')),
    *(refused(MEMORY + 'max_write_norm', value) for value in (0, float('nan'), float('inf'), '1')),
    *(refused(MEMORY + 'head_dim', value) for value in (0, -16, 16.0)),
    refused(MEMORY + 'head_dim', 5, 'channels must be a multiple of head_dim, got channels=16, head_dim=5'),
    refused(MEMORY + 'mem_channels', 0),
    refused(MEMORY + 'mem_channels', 24, 'channels must be a multiple of head_dim, got channels=24, head_dim=16'),
    refused(MEMORY + 'update_rule', 'serial'),
    refused(MEMORY + 'retrieve', 'next'),
    refused(MEMORY + 'backend', 'cudnn'),
    refused(BACKBONE + 'placement', 'all'),
    refused(BACKBONE + 'fusion', None),
    refused(BACKBONE + 'global_branch', 'mamba'),
    refused(BACKBONE + 'arch', 'm9'),
    *(refused(BACKBONE + 'arch', value, 'a custom arch must be a dict of .*channels.* at least 1, got ') for value in (
        5, dict(depths=[1], _delete_=True), dict(ARCH, depths=[1, 1], _delete_=True),
        dict(ARCH, depths=[1, 0, 1, 1], _delete_=True), dict(ARCH, channels=[8, 16, -24, 32], _delete_=True),
        dict(ARCH, depths='1111', _delete_=True))),
    *(refused(BACKBONE + 'in_channels', value) for value in (0, 'three', 3.0)),
    *(refused(BACKBONE + 'drop_path_rate', value) for value in (1.0, -0.1, float('nan'), '0.1', None)),
    *(refused(BACKBONE + 'frozen_stages', value) for value in (5, -2, 1.5, True, None)),
    *(refused(BACKBONE + 'out_indices', value) for value in (4, (0, 9), (3, 0), (1, 1), (), 'last', None, (0.0, 1))),
    *(refused(BACKBONE + name, 'no') for name in ('with_cp', 'channels_last', 'gap_before_final_norm')),
]


@pytest.mark.parametrize('row', MODELS, ids=ids(MODELS))
def test_model(row):
    if row.run is HANDLED:
        built('classifier', **row.make())
        return
    with pytest.raises((ValueError, TypeError), match=row.run):
        built('classifier', **row.make())


@pytest.mark.parametrize('options, other', [
    (dict(chunk_size=10**9), dict(chunk_size=256)), (dict(num_chunks=10**9), dict(chunk_size=1)),
    (dict(num_chunks=1), dict(chunk_size=256)), (dict(num_chunks=4), dict(chunk_size=64))], ids=str)
def test_chunks_longer_than_the_image_and_shorter_than_a_token(options, other):
    """64 x 64 pixels are 16 x 16 tokens in the first stage."""
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    backbones = [built('classifier', **{
        BACKBONE + 'memory_cfg': memory_cfg, BACKBONE + 'out_indices': 0,
        BACKBONE + 'gap_before_final_norm': False, 'model.head.in_channels': 8}).backbone.double()
        for memory_cfg in (options, other)]
    # Gate maps that are not nearly the same everywhere.
    weights = {name: value + 0.3 * torch.randn_like(value) for name, value in backbones[0].state_dict().items()}
    outputs = []
    for backbone in backbones:
        backbone.load_state_dict(weights)
        with torch.no_grad():
            outputs += backbone(x)
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return make_shapes_coco(tmp_path_factory.mktemp('configs') / 'data', num_train=3, num_val=2, image_size=64)


LOADER = 'train_dataloader.'
# ``make`` gives overrides of the detector's config.
DATA = [
    Row('as it is', dict),
    Row('unknown key of the data set', setting(LOADER + 'dataset.unknown', 1), run="unexpected keyword .*'unknown'"),
    Row('unknown data set', setting(LOADER + 'dataset.type', 'NutsDataset'), run='NutsDataset is not in the'),
    Row('unknown transform', setting(LOADER + 'dataset.pipeline.0.type', 'LoadNuts'), run='LoadNuts is not in the'),
    Row('unknown key of a transform', setting(LOADER + 'dataset.pipeline.2.scales', 1), run="keyword .*'scales'"),
    Row('batch size that is a word', setting(LOADER + 'batch_size', 'four'), run='batch_size.*four'),
    Row('batch size of 0', setting(LOADER + 'batch_size', 0), run='batch_size.*0'),
    Row('negative number of workers', setting(LOADER + 'num_workers', -1), run='num_workers'),
    Row('unknown sampler', setting(LOADER + 'sampler.type', 'NutSampler'), run='NutSampler is not in the'),
    Row('folder that is missing', setting(LOADER + 'dataset.data_prefix.img', 'nowhere/'),
        run=r'train_dataloader\.dataset\.data_prefix\.img: .+/nowhere does not exist'),
    Row('file that is missing', setting(LOADER + 'dataset.ann_file', 'nowhere.json'),
        run=r'train_dataloader\.dataset\.ann_file: .+/nowhere\.json does not exist'),
    Row('file that is a folder', setting(LOADER + 'dataset.ann_file', 'train'),
        run=r'/data/train cannot be read: Is a directory'),
    Row('classes that the file lacks', setting(LOADER + 'dataset.metainfo.classes', ('nut', 'bolt')),
        run=r'metainfo\.classes has 2 classes \(nut, bolt\), but .+ has no category \(nut, bolt\)'),
    Row('head of other classes', setting('model.roi_head.mask_head.num_classes', 80),
        run=r'model\.roi_head\.mask_head\.num_classes=80, but .* has 6 classes'),
]


@pytest.mark.parametrize('row', DATA, ids=ids(DATA))
def test_data(row, root):
    cfg = config('detector', root, **row.make())
    if row.run is HANDLED:
        assert len(training_data(cfg)) == 3
        return
    with pytest.raises(LaunchError, match=row.run) as error:
        training_data(cfg)
    assert '\n' not in str(error.value)


# Settings at the top of a config, which are carried to where they belong.
SETTINGS = [
    refused('classes', 5), refused('classes', 'nut'), refused('classes', ('nut', 'nut')), refused('classes', ()),
    refused('image_size', 0), refused('image_size', (160, -160)), refused('image_size', 'large'),
    refused('max_epochs', 0), refused('max_epochs', '12'), refused('max_epochs', 1.5),
    refused('pretrained', 'weights.pth'), refused('data_root', 5),
]


@pytest.fixture(scope='module')
def shipped():
    return Config.fromfile(find_config(CONFIGS['detector']))


@pytest.mark.parametrize('row', SETTINGS, ids=ids(SETTINGS))
def test_setting(row, shipped):
    cfg = copy.deepcopy(shipped)
    cfg.merge_from_dict(row.make())
    with pytest.raises(LaunchError, match=row.run):
        apply_settings(cfg)


# ``make`` writes the file.
FILES = [
    Row('empty', lambda path: path.write_text(''), run='default_scope must be one of .*, got None'),
    Row('web page', lambda path: path.write_text('<!DOCTYPE html>\n<html>'),
        run=r'config\.py: the config cannot be read: SyntaxError'),
    Row('without a model', lambda path: path.write_text("default_scope = 'mmdet'"), run='config.py has no model'),
    Row('of another package', lambda path: path.write_text("default_scope = 'mmocr'"), run="default_scope .* 'mmocr'"),
    Row('base that is missing', lambda path: path.write_text("_base_ = './nowhere.py'"),
        run=r'config\.py: the config cannot be read: FileNotFoundError: .*nowhere\.py'),
    Row('name that is not defined', lambda path: path.write_text('model = dict(x=y)'),
        run=r"config\.py: the config cannot be read: NameError: name 'y'"),
    Row('folder', lambda path: path.mkdir(), run='no config '),
    Row('link to itself', lambda path: path.symlink_to(path), run='no config '),
    Row('missing', lambda path: None, run='no config '),
]


@pytest.mark.parametrize('row', FILES, ids=ids(FILES))
def test_config_file(row, tmp_path):
    path = tmp_path / 'config.py'
    row.make(path)
    with pytest.raises(LaunchError, match=row.run):
        init_model(path, device='cpu')


def test_a_tiny_model_is_what_the_rows_change():
    assert TINY['classifier'][BACKBONE + 'arch'] == dict(ARCH, _delete_=True)
