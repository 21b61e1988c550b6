"""Several gloo processes through tools/dist_train.sh and dist_test.sh, from another folder, without any flag."""
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
from pathlib import Path

import cv2
import pytest
import torch
from warm_python import warm_python

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


# The machine's full name does not resolve, as on many a laptop.
UNRESOLVED = """
import socket
socket.getfqdn = lambda name='': 'nowhere.invalid'
"""
SIZE = ['train_dataloader.dataset.pipeline.2.scale=(64,64)', 'val_dataloader.dataset.pipeline.1.scale=(64,64)',
        'test_dataloader.dataset.pipeline.1.scale=(64,64)']


def start(*command, cwd, **env):
    path = os.pathsep.join([str(cwd), *filter(None, [os.environ.get('PYTHONPATH')])])
    return subprocess.Popen([str(c) for c in command], cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT,
                            env={**os.environ, 'PYTHONPATH': path, 'PYTHON': warm_python(), **env})


def run(*command, cwd, **env):
    with start(*command, cwd=cwd, **env) as process:
        output, _ = process.communicate(timeout=600)
    return subprocess.CompletedProcess(command, process.returncode, output)


def assert_equal_weights(paths, iters):
    """Of ranks that trained together, up to this iteration; returns the weights."""
    first, *others = (torch.load(path) for path in paths)
    for other in others:
        assert first['iters'] == other['iters'] == iters
        assert first['weights'].keys() == other['weights'].keys()
        for name, value in first['weights'].items():
            assert torch.equal(value, other['weights'][name]), name
    return first['weights']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('project')
    make_shapes_coco(folder / 'data' / 'shapes', num_train=8, num_val=5, image_size=64)
    (folder / 'child.py').write_text(CONFIG)
    (folder / 'save_every_rank.py').write_text(HOOK)
    (folder / 'sitecustomize.py').write_text(UNRESOLVED)
    done = run(ROOT / 'tools' / 'dist_train.sh', 'child.py', 2, '--work-dir', 'work', '--cfg-options', *SIZE,
               cwd=folder)
    assert done.returncode == 0, done.stdout[-4000:]
    return folder, SIZE, done.stdout


def test_both_ranks_end_with_equal_weights(trained):
    folder, _, _ = trained
    # An epoch: 8 images, 2 processes of 2.
    weights = assert_equal_weights([folder / 'work' / f'rank{i}.pth' for i in range(2)], iters=2)
    moved = torch.load(folder / 'work' / 'epoch_1.pth', weights_only=False)['state_dict']
    assert torch.equal(moved['backbone.stages.0.0.depthwise_conv.weight'],
                       weights['backbone.stages.0.0.depthwise_conv.weight'])


def test_rtmdet_trains_on_two_processes(trained, tmp_path):
    """It makes SyncBN of its BN where there are several processes, which a CPU does not have."""
    folder, _, _ = trained
    config = tmp_path / 'rtmdet.py'
    config.write_text("""
_base_ = __import__('convneur_mm').config('rtmdet/rtmdet-ins_convneur_m1_shapes')
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
val_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False)
image_size, max_epochs = 64, 1
""")
    done = run(ROOT / 'tools' / 'dist_train.sh', config, 2, '--work-dir', tmp_path / 'work', cwd=folder)
    assert done.returncode == 0, done.stdout[-4000:]
    weights = torch.load(tmp_path / 'work' / 'epoch_1.pth', weights_only=False)
    assert all(value.isfinite().all() for value in weights['state_dict'].values())


def test_no_warning_of_unused_parameters_or_launchers(trained):
    _, _, output = trained
    assert 'find_unused_parameters' not in output.replace('find_unused_parameters=False', '')
    assert 'torch.distributed.launch' not in output


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
def test_processes_on_cpus_are_named_once(trained):
    _, _, output = trained
    assert len(re.findall('^note: .*; 2 CPU processes over gloo instead$', output, re.MULTILINE)) == 1


@pytest.mark.slow
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


def start_nodes(folders, *args):
    """A launch in each of the folders, as if each were a machine, of one process; returns (exit code, output) of each.
    """
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = str(probe.getsockname()[1])
    nodes = [start(ROOT / 'tools' / 'dist_train.sh', 'child.py', 1, '--work-dir', f'node{i}', *args, cwd=folder,
                   NNODES=str(len(folders)), NODE_RANK=str(i), MASTER_ADDR='127.0.0.1', PORT=port, OMP_NUM_THREADS='1')
             for i, folder in enumerate(folders)]
    try:
        outputs = [node.communicate(timeout=300)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [(node.returncode, output) for node, output in zip(nodes, outputs)]


@pytest.mark.slow
def test_two_nodes_resume_and_end_with_equal_weights(trained):
    folder, _, _ = trained
    for i in range(2):  # other tests need the checkpoint that gives way to the next
        shutil.copytree(folder / 'work', folder / f'node{i}')
    nodes = start_nodes([folder, folder], '--resume', '--cfg-options', *SIZE, 'train_cfg.max_epochs=2')
    assert [code for code, _ in nodes] == [0, 0], nodes[0][1][-3000:] + nodes[1][1][-3000:]
    assert 'at epoch 1, iteration 2: ' in nodes[0][1]
    assert (folder / 'node0' / 'epoch_2.pth').exists()
    assert_equal_weights([folder / f'node{i}' / f'rank{i}.pth' for i in range(2)], iters=4)


@pytest.mark.slow
def test_data_missing_on_the_second_node(trained, tmp_path):
    """It says so, and the first one, which has its data, does not wait for ever."""
    folder, _, _ = trained
    for name in ('child.py', 'save_every_rank.py', 'sitecustomize.py'):
        (tmp_path / name).write_text((folder / name).read_text())
    (code, output), (other_code, other_output) = start_nodes(
        [folder, tmp_path], '--cfg-options', 'env_cfg.dist_cfg.timeout=4', *SIZE)
    assert code == other_code == 2
    host = re.escape(socket.gethostname())
    missing = 'train_dataloader.dataset.ann_file: data/shapes/annotations/instances_train.json does not exist'
    assert re.search(rf'^error: node 1 \({host}\): {re.escape(missing)}', other_output, re.MULTILINE)
    assert re.search(rf'^error: node 0 \({host}\): the 2 processes did not all join within 4 s \(', output,
                     re.MULTILINE)
    assert 'Traceback' not in output + other_output
