"""Two gloo processes through tools/dist_train.sh and dist_test.sh, from another folder, without any flag."""
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch

from convneur_mm.datasets import make_shapes_coco

ROOT = Path(__file__).parents[2]

# At 64 x 64 a chunk of 4096 tokens is the whole map of every stage: the generators of every memory are unused.
CONFIG = """
_base_ = __import__('convneur_mm').config('cascade_rcnn_convneur_m1_shapes')
custom_imports = dict(imports=['convneur_mm', 'save_every_rank'])
custom_hooks = [dict(type='SaveEveryRank')]
model = dict(backbone=dict(memory_cfg=dict(chunk_size=4096, inner_step=1e-3)))
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
val_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1)
"""
HOOK = """
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class SaveEveryRank(Hook):
    def after_train(self, runner):
        torch.save(dict(weights=runner.model.module.state_dict(), iters=runner.iter),
                   f'{runner.work_dir}/rank{runner.rank}.pth')
"""


def run(*command, cwd, **env):
    path = os.pathsep.join([str(cwd), *filter(None, [os.environ.get('PYTHONPATH')])])
    return subprocess.run([str(c) for c in command], cwd=cwd, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT,
                          env={**os.environ, 'PYTHONPATH': path, 'PYTHON': sys.executable, **env})


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('project')
    make_shapes_coco(folder / 'data' / 'shapes', num_train=8, num_val=5, image_size=64)
    (folder / 'child.py').write_text(CONFIG)
    (folder / 'save_every_rank.py').write_text(HOOK)
    size = ['train_dataloader.dataset.pipeline.2.scale=(64,64)', 'val_dataloader.dataset.pipeline.1.scale=(64,64)',
            'test_dataloader.dataset.pipeline.1.scale=(64,64)']
    done = run(ROOT / 'tools' / 'dist_train.sh', 'child.py', 2, '--work-dir', 'work', '--cfg-options', *size,
               cwd=folder)
    assert done.returncode == 0, done.stdout[-4000:]
    return folder, size, done.stdout


def test_both_ranks_end_with_equal_weights(trained):
    folder, _, _ = trained
    ranks = [torch.load(folder / 'work' / f'rank{i}.pth') for i in range(2)]
    assert ranks[0]['iters'] == ranks[1]['iters'] == 2  # 8 images, 2 processes of 2
    assert ranks[0]['weights'].keys() == ranks[1]['weights'].keys()
    for name, value in ranks[0]['weights'].items():
        assert torch.equal(value, ranks[1]['weights'][name]), name
    moved = torch.load(folder / 'work' / 'epoch_1.pth', weights_only=False)['state_dict']
    assert torch.equal(moved['backbone.stages.0.0.depthwise_conv.weight'],
                       ranks[0]['weights']['backbone.stages.0.0.depthwise_conv.weight'])


def test_no_warning_of_unused_parameters_or_launchers(trained):
    _, _, output = trained
    assert 'find_unused_parameters' not in output.replace('find_unused_parameters=False', '')
    assert 'torch.distributed.launch' not in output


def test_two_processes_test_as_one(trained):
    """Five images do not divide by two: the padding of the last batch may not count."""
    folder, size, _ = trained
    metrics = {}
    # One thread in each process: with more, matrix products may add in another order.
    for processes in (1, 2):
        done = run(ROOT / 'tools' / 'dist_test.sh', 'child.py', 'work/epoch_1.pth', processes, '--work-dir',
                   f'test{processes}', '--out', f'out{processes}.pkl', '--show-dir', f'pictures{processes}',
                   '--cfg-options', *size, cwd=folder, OMP_NUM_THREADS='1')
        assert done.returncode == 0, done.stdout[-4000:]
        path, = (folder / f'test{processes}').glob('*/*.json')
        metrics[processes] = {k: v for k, v in json.loads(path.read_text()).items() if k.startswith('coco/')}
    assert metrics[1] == metrics[2]
    assert len(metrics[1]) == 12
    results = [pickle.loads((folder / f'out{i}.pkl').read_bytes()) for i in (1, 2)]
    assert [r['img_id'] for r in results[0]] == [r['img_id'] for r in results[1]] == [1, 2, 3, 4, 5]
    for a, b in zip(*results):
        assert torch.equal(a['pred_instances']['bboxes'], b['pred_instances']['bboxes'])
    for i in (1, 2):
        pictures = sorted((folder / f'pictures{i}').iterdir())
        assert [path.name for path in pictures] == [f'{image:06}.jpg' for image in range(1, 6)]
        # The truth and, beside it, the prediction.
        assert [cv2.imread(str(path)).shape for path in pictures] == [(64, 128, 3)] * 5


def test_fewer_classes_than_the_checkpoint_has_are_refused(trained):
    """mmdet would take the head's first labels for the two, whatever they are, and fail on the others."""
    folder, size, _ = trained
    done = run(sys.executable, ROOT / 'tools' / 'test.py', 'child.py', 'work/epoch_1.pth', '--work-dir', 'subset',
               '--cfg-options', *size, "test_dataloader.dataset.metainfo.classes=('square','ring')", cwd=folder)
    assert done.returncode != 0
    assert 'the checkpoint tells (disk, square, triangle, star, ring, cross) apart, but ' in done.stdout
    assert 'has the classes (square, ring)' in done.stdout
    assert 'classwise=True' in done.stdout


def test_resume_goes_on(trained):
    folder, size, _ = trained
    done = run(ROOT / 'tools' / 'dist_train.sh', 'child.py', 2, '--work-dir', 'work', '--resume', '--cfg-options',
               *size, 'train_cfg.max_epochs=2', cwd=folder, PORT='29611')
    assert done.returncode == 0, done.stdout[-4000:]
    assert 'resumed epoch: 1, iter: 2' in done.stdout
    assert (folder / 'work' / 'epoch_2.pth').exists()
