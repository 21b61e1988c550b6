"""Early checks of the tools: what cannot work is named before any long work starts."""
import argparse
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

import convneur_mm
from convneur_mm.datasets import make_shapes_coco
from convneur_mm.engine.launch import (
    LaunchError,
    check_data_files,
    find_config,
    load_config,
    without_sync_bn,
)

ROOT = Path(__file__).parents[2]
SHAPES = 'cascade_rcnn_convneur_m1_shapes'


def run_tool(*args, cwd=ROOT, tool='train.py'):
    return subprocess.run([sys.executable, str(ROOT / 'tools' / tool), *map(str, args)], cwd=cwd, text=True,
                          capture_output=True)


def assert_only_error(done, message):
    """One line, the last one: the upstream stack's packages warn of each other when they are imported."""
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == message
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('name', [
    SHAPES, f'{SHAPES}.py', f'configs/{SHAPES}.py', str(ROOT / 'configs' / f'{SHAPES}.py')])
def test_configs_are_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(find_config(name)).samefile(ROOT / 'configs' / f'{SHAPES}.py')


def test_a_config_beside_goes_first(tmp_path, monkeypatch):
    (tmp_path / f'{SHAPES}.py').write_text('')
    monkeypatch.chdir(tmp_path)
    assert Path(find_config(f'{SHAPES}.py')).samefile(tmp_path / f'{SHAPES}.py')


def test_unknown_config_is_named():
    with pytest.raises(LaunchError, match="no config 'cascade_rcnn_m9'"):
        find_config('cascade_rcnn_m9')


def test_config_function_suggests_near_names():
    assert convneur_mm.config(SHAPES) == str(ROOT / 'configs' / f'{SHAPES}.py')
    with pytest.raises(ValueError, match='near ones: .*cascade_rcnn_convneur_m3_1x_coco'):
        convneur_mm.config('cascade_rcnn_convneur_m3_1x')


@pytest.mark.parametrize('remove, key', [
    ('annotations/instances_train.json', 'train_dataloader.dataset.ann_file'),
    ('annotations/instances_val.json', 'val_dataloader.dataset.ann_file'),
])
def test_missing_annotations_are_named(tmp_path, remove, key):
    make_shapes_coco(tmp_path, num_train=1, num_val=1)
    cfg = Config.fromfile(convneur_mm.config(SHAPES))
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = str(tmp_path)
    check_data_files(cfg, ('train', 'val', 'test'))
    (tmp_path / remove).unlink()
    with pytest.raises(LaunchError, match=f'{key}: .*{Path(remove).name} does not exist'):
        check_data_files(cfg, ('train', 'val', 'test'))


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
    remote = dict(type='CocoDataset', data_root='s3://bucket/', ann_file='a.json', data_prefix=dict(img='x/'))
    check_data_files(Config(dict(train_dataloader=dict(dataset=remote))), ('train',))


def test_sync_bn_becomes_bn():
    cfg = dict(head=dict(norm_cfg=dict(type='SyncBN', requires_grad=True)), necks=[dict(norm_cfg=dict(type='SyncBN'))])
    without_sync_bn(cfg)
    assert cfg == dict(head=dict(norm_cfg=dict(type='BN', requires_grad=True)), necks=[dict(norm_cfg=dict(type='BN'))])


def test_work_dir_and_options(tmp_path, monkeypatch):
    make_shapes_coco(tmp_path / 'data' / 'shapes', num_train=1, num_val=1)
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(config=SHAPES, work_dir=None, launcher='none', local_rank=0, allow_pickle=False,
                              cfg_options={'model.backbone.memory_cfg.chunk_size': 4096})
    cfg = load_config(args, ('train', 'val'))
    assert cfg.work_dir == f'work_dirs/{SHAPES}'
    assert cfg.model.backbone.memory_cfg == dict(chunk_size=4096, inner_step=1.0)


@pytest.mark.parametrize('args, message', [
    (['no_such_config'], "error: no config 'no_such_config'"),
    (['cascade_rcnn_convneur_m3_1x_coco'], 'error: train_dataloader.dataset.ann_file: data/coco/annotations/instances_'
                                           'train2017.json does not exist'),
    ([SHAPES, '--amp'], 'error: --amp needs a CUDA GPU'),
])
def test_train_names_what_is_wrong(args, message, tmp_path):
    if '--amp' in args and torch.cuda.is_available():
        args = ['no_such_config']
        message = "error: no config 'no_such_config'"
    done = run_tool(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(message)
    assert 'Traceback' not in done.stderr


def test_test_names_what_is_wrong(tmp_path):
    make_shapes_coco(tmp_path / 'data' / 'shapes', num_train=1, num_val=1)
    for args, message in [
        (['x.pth'], 'error: checkpoint: no such file: x.pth'),
        (['x.pth', '--out', 'results.json'], 'error: --out must end in .pkl or .pickle, got results.json'),
    ]:
        done = run_tool(SHAPES, *args, cwd=tmp_path, tool='test.py')
        assert_only_error(done, message)


def test_bad_architecture_is_named_by_the_tool(tmp_path):
    make_shapes_coco(tmp_path / 'data' / 'shapes', num_train=1, num_val=1)
    done = run_tool(SHAPES, '--cfg-options', 'model.backbone.arch=m7', cwd=tmp_path)
    assert done.returncode != 0
    assert "arch must be one of ('m1', 'm2', 'm3', 'm4') or a dict, got 'm7'" in done.stderr


def test_dist_scripts_name_what_is_wrong(tmp_path):
    for command, message in [
        (['dist_train.sh'], 'usage: '), (['dist_train.sh', SHAPES, '0'], "GPUS must be a positive number, got '0'"),
        (['dist_train.sh', SHAPES, 'two'], "GPUS must be a positive number, got 'two'"),
        (['dist_test.sh', SHAPES, 'x.pth'], 'usage: '), (['slurm_train.sh', 'part'], 'usage: '),
    ]:
        done = subprocess.run([str(ROOT / 'tools' / command[0]), *command[1:]], cwd=tmp_path, text=True,
                              capture_output=True)
        assert done.returncode == 2
        assert message in done.stderr


def test_slurm_starts_one_process_a_gpu(tmp_path):
    """srun is replaced by a script that writes its arguments down."""
    srun = tmp_path / 'srun'
    srun.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/args\n')
    srun.chmod(0o755)
    done = subprocess.run(
        [str(ROOT / 'tools' / 'slurm_train.sh'), 'gpu', 'job', SHAPES, 'work', '--amp'],
        env={'PATH': f'{tmp_path}:/usr/bin:/bin', 'PYTHON': sys.executable, 'GPUS': '16', 'SRUN_ARGS': '--qos high'})
    args = (tmp_path / 'args').read_text().split()
    assert done.returncode == 0
    assert {'--ntasks=16', '--gres=gpu:8', '--ntasks-per-node=8', '--qos', 'high'} <= set(args)
    assert args[args.index(sys.executable):] == [
        sys.executable, '-u', str(ROOT / 'tools' / 'train.py'), SHAPES, '--work-dir', 'work', '--amp', '--launcher',
        'slurm']


def test_results_file_is_readable(tmp_path):
    """--out of a tiny evaluation holds one prediction per image."""
    make_shapes_coco(tmp_path / 'data' / 'shapes', num_train=1, num_val=3, image_size=64)
    cfg = Config.fromfile(convneur_mm.config(SHAPES))
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope
    init_default_scope('mmdet')
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict(), meta={}), tmp_path / 'random.pth')
    done = run_tool(SHAPES, 'random.pth', '--out', 'out/results.pkl', '--show-dir', 'pictures', cwd=tmp_path,
                    tool='test.py')
    assert done.returncode == 0, done.stderr
    results = pickle.loads((tmp_path / 'out' / 'results.pkl').read_bytes())
    assert [r['img_id'] for r in results] == [1, 2, 3]
    assert sorted(p.name for p in (tmp_path / 'pictures').iterdir()) == ['000001.jpg', '000002.jpg', '000003.jpg']
