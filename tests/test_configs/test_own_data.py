"""Data of one's own, with other classes, sizes and folders: a child of a light config in at most six lines."""
import json
import os
import pickle
import re
import subprocess
from pathlib import Path

import cv2
import pytest
import torch
from warm_python import warm_python

from convneur_mm.datasets import make_shapes_ade20k, make_shapes_coco, make_shapes_imagenet
from convneur_mm.paths import config_root

ROOT = Path(__file__).parents[2]
CHILDREN = dict(
    detection="""
_base_ = __import__('convneur_mm').config('cascade_rcnn_convneur_m1_shapes')
data_root = 'data/nuts'
train_ann, train_images = 'train.json', 'images/'
val_ann, val_images = 'val.json', 'images/'
classes = ('date', 'fig', 'hazelnut')
image_size, max_epochs = (96, 64), 1
""",
    segmentation="""
_base_ = __import__('convneur_mm').config('semantic_fpn_convneur_m1_shapes')
data_root = 'data/fields'
train_images, train_labels = 'train', 'train_labels'
val_images, val_labels = 'val', 'val_labels'
classes = ('soil', 'crop', 'weed', 'path')
image_size, max_iters = (64, 64), 60
""",
    classification="""
_base_ = __import__('convneur_mm').config('convneur_m1_shapes')
data_root = 'data/leaves'
train_images, val_images = 'training', 'validation'
classes = ('ash', 'beech', 'oak', 'pine', 'willow')
image_size, max_epochs = 32, 1
""")


def own_coco(root):
    """Three categories, files beside each other and pictures in one folder."""
    source = make_shapes_coco(root.parent / 'source', num_train=4, num_val=2, image_size=64)
    (root / 'images').mkdir(parents=True)
    for split in ('train', 'val'):
        content = json.loads((source / 'annotations' / f'instances_{split}.json').read_text())
        content['categories'] = [dict(id=5 * i, name=name) for i, name in enumerate(('date', 'fig', 'hazelnut'))]
        for annotation in content['annotations']:
            annotation['category_id'] = 5 * (annotation['category_id'] % 3)
        for image in content['images']:
            (source / split / image['file_name']).rename(root / 'images' / f'{split}_{image["file_name"]}')
            image['file_name'] = f'{split}_{image["file_name"]}'
        (root / f'{split}.json').write_text(json.dumps(content))


def own_label_maps(root):
    source = make_shapes_ade20k(root.parent / 'source', num_train=4, num_val=2, image_size=64)
    root.mkdir()
    for name, split in (('train', 'training'), ('val', 'validation')):
        (source / 'images' / split).rename(root / name)
        (source / 'annotations' / split).rename(root / f'{name}_labels')
        for path in (root / f'{name}_labels').iterdir():
            cv2.imwrite(str(path), cv2.imread(str(path), cv2.IMREAD_UNCHANGED) % 4)


def own_folders(root):
    source = make_shapes_imagenet(root.parent / 'source', num_train=10, num_val=6, image_size=64)
    for name, split in (('training', 'train'), ('validation', 'val')):
        (root / name).mkdir(parents=True)
        for old, new in zip(sorted((source / split).iterdir()), ('ash', 'beech', 'oak', 'pine', 'willow')):
            old.rename(root / name / new)


MAKERS = dict(detection=('nuts', own_coco), segmentation=('fields', own_label_maps),
              classification=('leaves', own_folders))


def run(folder, tool, *args):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([warm_python(), str(ROOT / 'tools' / tool), *map(str, args)], cwd=folder, env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def trained(task, folder, *args, more=''):
    """Trains the task's child there, with more lines; returns its checkpoint, opened too, and what was printed."""
    text = CHILDREN[task].strip()
    assert len(text.splitlines()) <= 6
    (folder / 'data').mkdir()
    name, make = MAKERS[task]
    make(folder / 'data' / name)
    (folder / 'mine.py').write_text(f'{text}\n{more}')
    printed = run(folder, 'train.py', 'mine.py', *args)
    path, = (folder / 'work_dirs' / 'mine').glob('*.pth')
    return path, torch.load(path, weights_only=False), printed


@pytest.mark.slow
def test_detection(tmp_path):
    path, checkpoint, printed = trained('detection', tmp_path, '--auto-scale-lr')
    assert re.search(r'data +train 4 images; val 2 images; 3 classes: date, fig, hazelnut', printed)
    assert checkpoint['meta']['dataset_meta']['classes'] == ('date', 'fig', 'hazelnut')
    for stage in range(3):
        assert checkpoint['state_dict'][f'roi_head.mask_head.{stage}.conv_logits.weight'].size(0) == 3
    # One process of four images instead of two of four.
    assert {group['initial_lr'] for group in checkpoint['optimizer']['param_groups']} == {5e-4}
    printed = run(tmp_path, 'test.py', 'mine.py', path, '--show-dir', 'pictures', '--out', 'found.pkl')
    assert 'coco/segm_mAP' in printed
    assert len(list((tmp_path / 'pictures').iterdir())) == 2
    for found in pickle.loads((tmp_path / 'found.pkl').read_bytes()):
        assert tuple(found['ori_shape']) == (64, 64)
        assert set(found['pred_instances']['labels'].tolist()) <= {0, 1, 2}


def test_segmentation_in_bfloat16_and_with_test_time_augmentation(tmp_path):
    path, checkpoint, printed = trained('segmentation', tmp_path, '--amp', 'bf16',
                                        more='max_iters = 2\nparam_scheduler = []\n')
    assert '4 classes: soil, crop, weed, path' in printed and '; mixed precision' in printed
    assert checkpoint['state_dict']['decode_head.conv_seg.weight'].size(0) == 4
    assert all(value.dtype != torch.bfloat16 and value.isfinite().all() for value in checkpoint['state_dict'].values())
    printed = run(tmp_path, 'test.py', 'mine.py', path, '--tta')
    assert re.search(r'weights +from work_dirs/mine/.*: (\d+) of \1\n', printed), printed
    assert re.search(r'\|\s+weed\s+\|', printed) and 'mIoU: ' in printed


def test_classification_with_averaged_weights(tmp_path):
    """The weights are averaged by the line that mmpretrain_runtime.py gives for it."""
    line, = re.findall(r'custom_hooks = \[.*\]', (config_root() / '_base_' / 'mmpretrain_runtime.py').read_text())
    path, checkpoint, printed = trained('classification', tmp_path, more=f'\nmax_epochs = 2\n{line}\n')
    assert '5 classes: ash, beech, oak, pine, willow' in printed
    averaged, latest = checkpoint['state_dict'], checkpoint['ema_state_dict']
    weight = 'head.fc.weight'
    assert averaged[weight].size(0) == 5
    # Of the second step, which has moved the weights, the average has a ten thousandth.
    moved = (latest[f'module.{weight}'] - averaged[weight]).abs().max()
    assert 0 < moved < 0.01
    assert 'accuracy/top1' in printed
