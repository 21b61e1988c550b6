"""tools/test.py and dist_test.sh on ADE20K's and ImageNet's layouts: what they report, save and draw.

In one process and in two, among which the images cannot be divided.
"""
import importlib.util
import json
import os
import pickle
import subprocess
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from warm_python import warm_python

from convneur_mm.datasets import make_shapes_ade20k, make_shapes_imagenet
from convneur_mm.engine.launch import LaunchError

ROOT = Path(__file__).parents[2]

SEGMENTATION = """
_base_ = __import__('convneur_mm').config('semantic_fpn_convneur_m1_80k_ade20k')
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (96, 64)
test_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(data_root='data/ade20k', pipeline=test_pipeline))
"""
CLASSIFICATION = """
_base_ = __import__('convneur_mm').config('convneur_m1_shapes')
train_dataloader = dict(num_workers=0, persistent_workers=False)
val_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1)
param_scheduler = []
default_hooks = dict(checkpoint=dict(interval=1))
"""


def run(*command, cwd):
    # One thread in each process, however many there are: sums in another order would differ in their last digits.
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHON': warm_python()}
    done = subprocess.run([str(part) for part in command], cwd=cwd, text=True, env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def run_in_one_and_two_processes(folder, config, checkpoint, suffix=''):
    """Leaves out1, out2, pictures1 and pictures2 in the folder, and returns the metrics of both runs."""
    metrics = []
    tools = ROOT / 'tools'
    for processes, command in ((1, [warm_python(), tools / 'test.py', config, checkpoint]),
                               (2, [tools / 'dist_test.sh', config, checkpoint, 2])):
        run(*command, '--work-dir', f'work{processes}', '--out', f'out{processes}{suffix}', '--show-dir',
            f'pictures{processes}', cwd=folder)
        path, = (folder / f'work{processes}').glob('*/*.json')
        metrics.append({key: value for key, value in json.loads(path.read_text()).items() if 'time' not in key})
    return metrics


def contents(folder):
    """The files below a folder and their bytes, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def segmented(tmp_path_factory):
    """Five images of different widths, tested with random weights that find the first six of the 150 classes."""
    folder = tmp_path_factory.mktemp('segmentation')
    data = make_shapes_ade20k(folder / 'data' / 'ade20k', num_train=1, num_val=5, image_size=64)
    for kind in ('images', 'annotations'):
        for i, path in enumerate(sorted((data / kind / 'validation').iterdir())):
            cv2.imwrite(str(path), cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[:, :64 - 5 * i])
    (folder / 'child.py').write_text(SEGMENTATION)
    cfg = Config.fromfile(folder / 'child.py')
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        from mmseg.datasets import ADE20KDataset
        cfg.model.decode_head.norm_cfg.type = 'BN'
        model = MODELS.build(cfg.model).eval()
    seg = model.decode_head.conv_seg
    with torch.no_grad():
        # On noise all six are on a par, so that on the images each is found somewhere.
        logits = model.decode_head(model.extract_feat(torch.randn(1, 3, 64, 64)))
        seg.bias -= logits.mean((0, 2, 3))
        seg.bias[6:] = -100
    meta = dict(cfg=cfg.pretty_text, dataset_meta=ADE20KDataset.METAINFO)
    torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / 'model.pth')
    return folder, run_in_one_and_two_processes(folder, 'child.py', 'model.pth')


def test_segmentations_do_not_depend_on_the_processes(segmented):
    folder, metrics = segmented
    assert metrics[0] == metrics[1]
    assert set(metrics[0]) == {'aAcc', 'mIoU', 'mAcc'}
    assert len(contents(folder / 'out1')) == 5
    assert contents(folder / 'out1') == contents(folder / 'out2')


def test_saved_segmentations_are_numbered_as_the_annotations_and_give_the_metric(segmented):
    folder, metrics = segmented
    confusion = np.zeros((151, 151), np.int64)
    for path in sorted((folder / 'data' / 'ade20k' / 'annotations' / 'validation').iterdir()):
        truth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        saved = cv2.imread(str(folder / 'out1' / path.name), cv2.IMREAD_UNCHANGED)
        assert saved.shape == truth.shape
        assert saved.min() >= 1 and saved.max() <= 150
        np.add.at(confusion, (truth[truth > 0], saved[truth > 0]), 1)
    right, union = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    miou = 100 * np.mean(right[union > 0] / union[union > 0])
    assert 1 < miou < 99
    assert metrics[0]['mIoU'] == pytest.approx(round(miou, 2), rel=1e-6)


def test_every_segmentation_is_drawn_beside_its_truth(segmented):
    folder, _ = segmented
    pictures = contents(folder / 'pictures1')
    assert sorted(pictures) == [f'{i:06}.jpg' for i in range(1, 6)]
    assert pictures == contents(folder / 'pictures2')
    for name in pictures:
        height, width = cv2.imread(str(folder / 'data' / 'ade20k' / 'images' / 'validation' / name)).shape[:2]
        assert cv2.imread(str(folder / 'pictures1' / name)).shape[:2] == (height, 2 * width)


@pytest.fixture(scope='module')
def classified(tmp_path_factory):
    """Seven images in six folders, where the files of all folders have the same names, after an epoch of training."""
    folder = tmp_path_factory.mktemp('classification')
    data = make_shapes_imagenet(folder / 'data' / 'shapes_imagenet', num_train=12, num_val=7, image_size=64)
    for category in (data / 'val').iterdir():
        for i, path in enumerate(sorted(category.iterdir())):
            path.rename(category / f'{i}.jpg')
    (folder / 'child.py').write_text(CLASSIFICATION)
    run(warm_python(), ROOT / 'tools' / 'train.py', 'child.py', '--work-dir', 'train', cwd=folder)
    return folder, run_in_one_and_two_processes(folder, 'child.py', 'train/epoch_1.pth', '.pkl')


@pytest.mark.slow
def test_checkpoints_hold_config_and_classes(classified):
    folder, _ = classified
    meta = torch.load(folder / 'train' / 'epoch_1.pth', weights_only=False)['meta']
    assert tuple(meta['dataset_meta']['classes']) == ('cross', 'disk', 'ring', 'square', 'star', 'triangle')
    assert Config.fromstring(meta['cfg'], '.py').model.backbone.arch == 'm1'


@pytest.mark.slow
def test_classifications_do_not_depend_on_the_processes(classified):
    folder, metrics = classified
    assert metrics[0] == metrics[1]
    results = [pickle.loads((folder / f'out{i}.pkl').read_bytes()) for i in (1, 2)]
    assert len(results[0]) == len(results[1]) == 7
    for one, two in zip(*results):
        assert one['img_path'] == two['img_path']
        assert one['pred_label'] == two['pred_label']
        # Alone in its batch, the last image is computed by other kernels than beside another.
        torch.testing.assert_close(one['pred_score'], two['pred_score'])
    right = [Path(result['img_path']).parent.name == sorted(os.listdir(folder / 'data' / 'shapes_imagenet' / 'val'))[
        result['pred_label']] for result in results[0]]
    assert metrics[0] == {'accuracy/top1': pytest.approx(100 * np.mean(right))}


@pytest.mark.slow
def test_every_classification_is_drawn_in_its_colours(classified):
    folder, _ = classified
    images = folder / 'data' / 'shapes_imagenet' / 'val'
    assert sorted(contents(folder / 'pictures1')) == sorted(contents(images))
    assert contents(folder / 'pictures1') == contents(folder / 'pictures2')
    for name in contents(images):
        # The text stands at the top.
        drawn, image = (cv2.imread(str(path / name)) for path in (folder / 'pictures1', images))
        drawn, image = (picture[len(picture) // 2:].mean((0, 1)) for picture in (drawn, image))
        np.testing.assert_allclose(drawn, image, atol=3)


@pytest.fixture(scope='module')
def tool():
    """tools/test.py as a module."""
    spec = importlib.util.spec_from_file_location('test_tool', ROOT / 'tools' / 'test.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('path, segments, message', [
    ('labels.pkl', True, 'a folder for label pictures, got labels.pkl'),
    ('results', False, 'must end in .pkl or .pickle, got results'),
])
def test_out_of_the_wrong_kind_is_named(tool, path, segments, message):
    tool.check_out(path, not segments)
    with pytest.raises(LaunchError, match=message):
        tool.check_out(path, segments)


def test_label_pictures_are_written_by_one_of_several_metrics(tool, tmp_path):
    folder = str(tmp_path / 'a' / 'labels')
    cfg = Config(dict(test_evaluator=[dict(type='Other'), dict(type='IoUMetric'), dict(type='IoUMetric')]))
    tool.save_label_pictures(cfg, folder)
    assert [evaluator.get('output_dir') for evaluator in cfg.test_evaluator] == [None, folder, None]
    with pytest.raises(LaunchError, match='needs an IoUMetric'):
        tool.save_label_pictures(Config(dict(test_evaluator=dict(type='Other'))), folder)


def test_detections_are_drawn_from_the_threshold_of_the_config_on(tool):
    args = SimpleNamespace(config='x.py', show=False, show_dir='pictures', wait_time=2)
    cfg = Config(dict(default_scope='mmdet', visualizer=dict(type='DetLocalVisualizer'),
                      default_hooks=dict(visualization=dict(type='DetVisualizationHook', score_thr=0.7))))
    assert tool.drawing_hook(cfg, args)['draw_args'] == dict(pred_score_thr=0.7)
    cfg.visualizer = None
    with pytest.raises(LaunchError, match='need a visualizer, which x.py lacks'):
        tool.drawing_hook(cfg, args)
