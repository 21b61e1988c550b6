"""Projects of other people: a folder outside the repository, the installed wheel, the stock tools and inferencers."""
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from warm_python import warm_python

from convneur_mm.datasets import make_shapes_ade20k, make_shapes_coco, make_shapes_imagenet

# Each trains a few iterations at 64 x 64 on the data of its own folder, on other classes than the config inherited.
DETECTION = """
_base_ = __import__('convneur_mm').config('cascade_rcnn_convneur_m1_shapes')
model = dict(backbone=dict(memory_cfg=dict(chunk_size=64)))
classes = ('disk', 'square', 'triangle')
image_size, max_epochs = (64, 64), 1
train_dataloader = dict(num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
"""
SEGMENTATION = """
_base_ = '{configs}/semantic_fpn_convneur_m1_shapes.py'
model = dict(backbone=dict(memory_cfg=dict(chunk_size=64)))
classes = ('background', 'disk', 'square', 'triangle', 'star', 'ring', 'cross', 'moon')
image_size, max_iters = (64, 64), 2
param_scheduler = []
train_dataloader = dict(num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
"""
CLASSIFICATION = """
_base_ = 'mmpretrain::_base_/default_runtime.py'
custom_imports = dict(imports=['convneur_mm'])
model = dict(
    type='ImageClassifier',
    backbone=dict(type='ConvNeur', arch='m1', out_indices=-1, memory_cfg=dict(chunk_size=64)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=6, in_channels=320, topk=(1, ),
              loss=dict(type='CrossEntropyLoss', loss_weight=1.0)))
data_preprocessor = dict(mean=[127.0] * 3, std=[60.0] * 3, to_rgb=True, num_classes=6)
pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=64), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='CustomDataset', data_root='data/shapes_imagenet/train', pipeline=pipeline))
val_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root='data/shapes_imagenet/val', pipeline=pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, ))
test_evaluator = val_evaluator
train_cfg = dict(by_epoch=True, max_epochs=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
"""


@pytest.fixture(scope='module')
def project(tmp_path_factory, wheel):
    """A project folder whose Python path holds the unpacked wheel, and not the checkout."""
    folder = tmp_path_factory.mktemp('project')
    subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', folder / 'site', wheel],
                   check=True, capture_output=True)
    make_shapes_coco(folder / 'data' / 'shapes', num_train=8, num_val=2, image_size=64)
    make_shapes_ade20k(folder / 'data' / 'shapes_ade20k', num_train=8, num_val=2, image_size=64)
    make_shapes_imagenet(folder / 'data' / 'shapes_imagenet', num_train=12, num_val=6, image_size=64)
    configs = folder / 'site' / 'convneur_mm' / '.mim' / 'configs'
    for name, text in (('mmdet', DETECTION), ('mmseg', SEGMENTATION.format(configs=configs)),
                       ('mmpretrain', CLASSIFICATION)):
        (folder / f'{name}_child.py').write_text(text)
    return folder


def python(project, *args, check=True):
    # Upstream's stock scripts cannot read their own checkpoints otherwise.
    env = {**os.environ, 'PYTHONPATH': str(project / 'site'), 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD': '1'}
    done = subprocess.run([warm_python(), *map(str, args)], cwd=project, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=env)
    if check:
        assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def stock_tool(package, name):
    return Path(importlib.util.find_spec(package).origin).parent / '.mim' / 'tools' / name


def test_the_wheel_is_what_runs(project):
    where = python(project, '-c', 'import convneur_mm; print(convneur_mm.__file__, convneur_mm.config("upernet_convneur'
                   '_m4_80k_ade20k.py"))')
    assert where.count(str(project / 'site')) == 2


@pytest.fixture(scope='module')
def trained(project):
    """Trains a package's child with that package's own script, once; returns the checkpoint and what was printed."""

    @functools.cache
    def train(package):
        output = python(project, stock_tool(package, 'train.py'), f'{package}_child.py', '--work-dir', package,
                        '--cfg-options', 'model.backbone.memory_cfg.inner_step=0.5')
        return project / (project / package / 'last_checkpoint').read_text().strip(), output

    return train


@pytest.mark.parametrize('package', ['mmdet', 'mmseg', 'mmpretrain'])
def test_stock_scripts_run_unchanged(project, trained, package):
    checkpoint, output = trained(package)
    assert 'inner_step=0.5' in output and 'chunk_size=64' in output
    saved = torch.load(checkpoint, weights_only=False)
    assert {'cfg', 'dataset_meta'} <= saved['meta'].keys()
    num_classes = {'mmdet': 3, 'mmseg': 8, 'mmpretrain': 6}[package]
    assert len(saved['meta']['dataset_meta']['classes']) == num_classes
    weight = {'mmdet': 'roi_head.mask_head.0.conv_logits', 'mmseg': 'decode_head.conv_seg', 'mmpretrain': 'head.fc'}
    assert saved['state_dict'][f'{weight[package]}.weight'].size(0) == num_classes
    # mmseg's test.py, unlike the others, does not ask for the runner_type, which applies the child's classes; the
    # config that the training saved has them applied.
    args = ['mmseg/mmseg_child.py', checkpoint, '--tta'] if package == 'mmseg' else [f'{package}_child.py', checkpoint]
    output = python(project, stock_tool(package, 'test.py'), *args, '--work-dir', f'{package}_test')
    assert {'mmdet': 'coco/bbox_mAP', 'mmseg': 'mIoU', 'mmpretrain': 'accuracy/top1'}[package] in output


@pytest.mark.slow
def test_a_stock_script_that_would_ignore_the_classes_is_stopped(project, trained):
    output = python(project, stock_tool('mmseg', 'test.py'), 'mmseg_child.py', trained('mmseg')[0], check=False)
    last = output.strip().splitlines()[-1]
    assert 'SettingsError: classes was set, but model.decode_head.num_classes is still 7 instead of 8' in last, output


INFER = {
    'mmdet': """
from mmdet.apis import DetInferencer
inferencer = DetInferencer(model='mmdet/mmdet_child.py', weights={checkpoint!r}, device='cpu')
result = inferencer('picture.png', return_datasamples=True)['predictions'][0]
assert inferencer.visualizer.dataset_meta['classes'] == CLASSES, inferencer.visualizer.dataset_meta
assert result.pred_instances.bboxes.shape[1] == 4
""",
    'mmseg': """
from mmseg.apis import MMSegInferencer
inferencer = MMSegInferencer(model='mmseg/mmseg_child.py', weights={checkpoint!r}, device='cpu')
result = inferencer('picture.png', return_datasamples=True)
assert tuple(inferencer.model.dataset_meta['classes']) == CLASSES, inferencer.model.dataset_meta
assert result.pred_sem_seg.data.shape == (1, 50, 70), result
""",
    'mmpretrain': """
from mmpretrain import ImageClassificationInferencer
inferencer = ImageClassificationInferencer('mmpretrain_child.py', pretrained={checkpoint!r}, device='cpu')
result = inferencer('picture.png')[0]
assert result['pred_class'] in CLASSES, result
""",
}


@pytest.mark.parametrize('package', ['mmdet', 'mmseg', 'mmpretrain'])
@pytest.mark.slow
def test_stock_inferencers(project, trained, package):
    """With the config that the training saved; the class names come from the checkpoint."""
    checkpoint, _ = trained(package)
    cv2.imwrite(str(project / 'picture.png'), np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8))
    shapes = ('disk', 'square', 'triangle', 'star', 'ring', 'cross')
    classes = {'mmdet': shapes[:3], 'mmseg': ('background', *shapes, 'moon'), 'mmpretrain': shapes}[package]
    python(project, '-c', f'CLASSES = {classes!r}\n' + INFER[package].format(checkpoint=str(checkpoint)))


def test_unknown_names_list_near_ones(project):
    output = python(project, '-c', 'import convneur_mm; convneur_mm.config("upernet_convneur_m9")', check=False)
    assert "no config 'upernet_convneur_m9'" in output
    assert 'upernet_convneur_m4_80k_ade20k' in output
