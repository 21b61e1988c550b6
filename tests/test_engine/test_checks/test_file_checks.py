"""Files that a config names are looked for, and those that could run code refused, before any of them is read."""
import copy
import re
from pathlib import Path

import pytest
from mmengine.config import Config

import convneur_mm
from convneur_mm.datasets import make_shapes_coco
from convneur_mm.engine.checks.file_checks import check_data_files, check_no_pickled_data
from convneur_mm.engine.files.errors import LaunchError

SHAPES = 'cascade_rcnn_convneur_m1_shapes'
SPLITS = ('train', 'val', 'test')


@pytest.fixture(scope='module')
def shipped():
    return Config.fromfile(convneur_mm.config(SHAPES))


@pytest.fixture
def cfg(shipped, tmp_path):
    make_shapes_coco(tmp_path, num_train=1, num_val=1, image_size=64)
    cfg = copy.deepcopy(shipped)
    for split in SPLITS:
        cfg[f'{split}_dataloader'].dataset.data_root = str(tmp_path)
    for split in ('val', 'test'):
        cfg[f'{split}_evaluator'].ann_file = str(tmp_path / 'annotations/instances_val.json')
    return cfg


@pytest.mark.parametrize('remove, key', [
    ('annotations/instances_train.json', 'train_dataloader.dataset.ann_file'),
    ('annotations/instances_val.json', 'val_dataloader.dataset.ann_file'),
])
def test_missing_annotations_are_named(tmp_path, cfg, remove, key):
    check_data_files(cfg, SPLITS)
    (tmp_path / remove).unlink()
    with pytest.raises(LaunchError, match=f'{key}: .*{Path(remove).name} does not exist'):
        check_data_files(cfg, SPLITS)


def test_wrapped_and_joined_datasets_are_checked():
    inner = dict(type='CocoDataset', data_root='nowhere', ann_file='a.json', data_prefix=dict(img='x/'))
    for dataset, key in [
        (dict(type='RepeatDataset', dataset=inner), 'dataset.dataset.ann_file'),
        (dict(type='ConcatDataset', datasets=[dict(type='CocoDataset'), inner]), r'dataset.datasets\[1\].ann_file'),
    ]:
        with pytest.raises(LaunchError, match=f'train_dataloader.{key}: nowhere/a.json'):
            check_data_files(Config(dict(train_dataloader=dict(dataset=dataset))), ('train',))
    with pytest.raises(LaunchError, match='train_dataloader.dataset.data_root: nowhere/imagenet does not exist'):
        dataset = dict(type='ImageNet', data_root='nowhere/imagenet', split='train')
        check_data_files(Config(dict(train_dataloader=dict(dataset=dataset))), ('train',))
    for remote in (dict(data_root='s3://bucket/'), dict(backend_args=dict(backend='petrel'))):
        remote = dict(type='CocoDataset', ann_file='a.json', data_prefix=dict(img='x/'), **remote)
        check_data_files(Config(dict(train_dataloader=dict(dataset=remote))), ('train',))


@pytest.mark.parametrize('dataset, key', [
    (dict(data_prefix=dict(img='a/', seg='b/')), 'data_prefix.seg: here/b'),
    (dict(ann_file='c.txt', data_prefix='a'), 'ann_file: here/c.txt'),
    (dict(data_prefix='b'), 'data_prefix.img_path: here/b'),
    (dict(data_prefix='a'), None),
    (dict(), None),
    (dict(data_root='there'), 'data_root: there'),
    (dict(data_root='there', ann_file=''), 'data_root: there'),
    (dict(data_root='', ann_file='there/c.txt', data_prefix=None), 'ann_file: there/c.txt'),
    (dict(data_root='', ann_file=''), None),
    (dict(data_root='', ann_file=['there/c.txt']), None),
    (dict(data_root='there', ann_file='/c.txt'), 'ann_file: /c.txt'),
])
def test_places_of_a_data_set(dataset, key, tmp_path, monkeypatch):
    """In data_root, unless they are absolute; without any of them data_root itself."""
    monkeypatch.chdir(tmp_path)
    Path('here/a').mkdir(parents=True)
    cfg = Config(dict(test_dataloader=dict(dataset={'data_root': 'here', **dataset})))
    if key is None:
        check_data_files(cfg, ('test',))
    else:
        with pytest.raises(LaunchError, match=rf'^test_dataloader\.dataset\.{re.escape(key)} does not exist \(looked '
                                              rf'for from {re.escape(str(tmp_path))}\); set data_root, ann_file'):
            check_data_files(cfg, ('test',))


@pytest.mark.parametrize('loader', [None, dict(), dict(dataset=[1, 2]), [dict(dataset=dict(ann_file='no.json'))]])
def test_loaders_of_other_kinds_pass(loader):
    check_data_files(Config(dict(train_dataloader=loader)), ('train', 'val'))


@pytest.mark.parametrize('split', ['val', 'test'])
def test_files_of_evaluators_are_looked_for(tmp_path, cfg, split):
    cfg[f'{split}_evaluator'].ann_file = 'data/coco/annotations/instances_val2017.json'
    own = str(tmp_path / 'annotations/instances_val.json')
    with pytest.raises(LaunchError, match=rf'^{split}_evaluator\.ann_file: data/coco/\S* does not exist \(.*\); set it '
                                          rf"to '{re.escape(own)}', the file of {split}_dataloader$"):
        check_data_files(cfg, SPLITS)
    check_data_files(cfg, ('train',))


@pytest.mark.parametrize('name', ['ann_file', 'seg_prefix'])
def test_files_of_one_of_several_evaluators_are_looked_for(cfg, name):
    """A panoptic metric's pictures of segments too; what is not on this disk is not."""
    cfg.val_evaluator = [cfg.val_evaluator, dict(type='CocoPanopticMetric', **{name: 'nowhere/panoptic'})]
    with pytest.raises(LaunchError, match=rf'^val_evaluator\[1\]\.{name}: nowhere/panoptic does not exist'):
        check_data_files(cfg, SPLITS)
    cfg.val_evaluator[1].backend_args = dict(backend='petrel')
    check_data_files(cfg, SPLITS)
    cfg.val_evaluator[1] = dict(type='CocoPanopticMetric', **{name: 's3://bucket/panoptic'})
    check_data_files(cfg, SPLITS)
    cfg.val_evaluator[1] = dict(type='CocoPanopticMetric', **{name: None}, outfile_prefix='results/not_yet')
    check_data_files(cfg, SPLITS)


def test_without_a_data_sets_file_the_evaluators_is_just_missed():
    cfg = Config(dict(val_dataloader=dict(dataset=dict(ann_file='s3://bucket/a.json')),
                      val_evaluator=[object, dict(ann_file='no.json')]))
    with pytest.raises(LaunchError, match=r'^val_evaluator\[1\]\.ann_file: no.json .*; set it to where the data is$'):
        check_data_files(cfg, ('val',))
    cfg.val_dataloader.dataset = dict(ann_file=__file__)
    cfg.val_evaluator = dict(seg_prefix='no')
    with pytest.raises(LaunchError, match=r'^val_evaluator\.seg_prefix: no .*; set it to where the data is$'):
        check_data_files(cfg, ('val',))


def test_what_is_not_unpickled_passes():
    pipeline = [dict(type='LoadBiomedicalData', decode_backend='numpy'), dict(name='pickle')]
    dataset = dict(ann_file='a.pkl.json', pipeline=pipeline, classes=('a', 3, None))
    check_no_pickled_data(Config(dict(val_dataloader=dict(dataset=dataset))), ('val',))


@pytest.mark.parametrize('dataset, key', [
    (dict(ann_file='a.pkl'), 'dataset.ann_file: a.pkl'),
    (dict(proposal_file='b.pickle'), 'dataset.proposal_file: b.pickle'),
    (dict(datasets=[dict(), dict(dataset=dict(ann_file='a.pkl'))]), 'dataset.datasets[1].dataset.ann_file: a.pkl'),
    (dict(pipeline=[dict(type='LoadBiomedicalData', decode_backend='pickle')]),
     'dataset.pipeline[0].decode_backend: the data'),
])
def test_pickled_data_are_named(dataset, key):
    cfg = Config(dict(val_dataloader=dict(dataset=dataset), test_dataloader=None))
    check_no_pickled_data(cfg, ('train', 'test'))
    with pytest.raises(LaunchError, match=rf'^val_dataloader\.{re.escape(key)}.*--allow-pickle'):
        check_no_pickled_data(cfg, ('val',))
