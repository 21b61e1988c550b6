"""Early checks of the tools: what cannot work is named before any long work starts."""
import argparse
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

import convneur_mm
from convneur_mm.datasets import make_shapes_coco
from convneur_mm.engine import launch
from convneur_mm.engine.launch import (
    LaunchError,
    find_config,
    load_config,
    set_up_processes,
    slurm_variables,
    why_no_gpu,
    without_sync_bn,
)

ROOT = Path(__file__).parents[2]
SHAPES = 'cascade_rcnn_convneur_m1_shapes'


def run_tool(*args, cwd=ROOT, tool='train.py', env=None):
    return subprocess.run([sys.executable, str(ROOT / 'tools' / tool), *map(str, args)], cwd=cwd, text=True,
                          capture_output=True, env={**os.environ, **(env or {})})


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


def test_the_process_group_is_left_in_the_end(tmp_path):
    """Left to the end of the interpreter, gloo's threads abort it now and then, after all work is done."""
    def main():
        torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)

    launch.run(main)
    assert not torch.distributed.is_initialized()
    launch.run(lambda: None)


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


# ---- several processes


@pytest.fixture
def failing(monkeypatch, capsys):
    """Calls run() with a failing tool under these variables; returns what it printed and how long it waited."""

    def call(**env):
        for name in ('LOCAL_RANK', 'RANK', 'GROUP_RANK', 'GROUP_WORLD_SIZE', 'SLURM_LOCALID', 'SLURM_NODEID',
                     'SLURM_NNODES'):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        waited = []
        monkeypatch.setattr(launch.time, 'sleep', waited.append)

        def main():
            raise LaunchError('no data')

        with pytest.raises(SystemExit) as exit_info:
            launch.run(main)
        assert exit_info.value.code == 2
        return capsys.readouterr().err, sum(waited)

    return call


def test_the_first_process_of_a_machine_prints_at_once(failing):
    assert failing() == ('error: no data\n', 0)
    assert failing(RANK='0', LOCAL_RANK='0', GROUP_RANK='0', GROUP_WORLD_SIZE='1') == ('error: no data\n', 0)
    host = socket.gethostname()
    assert failing(RANK='4', LOCAL_RANK='0', GROUP_RANK='1', GROUP_WORLD_SIZE='2') == (
        f'error: node 1 ({host}): no data\n', 0)
    assert failing(SLURM_LOCALID='0', SLURM_NODEID='3', SLURM_NNODES='4') == (
        f'error: node 3 ({host}): no data\n', 0)
    # torchrun on one of the nodes that Slurm gave.
    assert failing(RANK='0', LOCAL_RANK='0', GROUP_RANK='0', GROUP_WORLD_SIZE='1', SLURM_NODEID='3',
                   SLURM_NNODES='4') == ('error: no data\n', 0)


@pytest.mark.parametrize('env', [dict(RANK='1', LOCAL_RANK='1'), dict(SLURM_LOCALID='2')])
def test_the_others_wait_to_be_ended_first(failing, env):
    output, waited = failing(**env)
    assert output == 'error: no data\n' and waited >= 1


SLURM = dict(SLURM_PROCID='5', SLURM_NTASKS='8', SLURM_LOCALID='1', SLURM_NODELIST='n[3-4]', SLURM_JOB_ID='71234')


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Puts a program that prints its last argument and another line in scontrol's place."""
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'scontrol').write_text('#!/bin/sh\necho "first of $3"\necho second\n')
    (tmp_path / 'bin' / 'scontrol').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}/bin:/usr/bin:/bin')
    return tmp_path / 'bin' / 'scontrol'


def test_slurm_variables(scontrol):
    scontrol.write_text('#!/bin/sh\necho "$*" | tr -d " "\necho second\n')
    found = slurm_variables(SLURM)
    port = found.pop('MASTER_PORT')
    assert 1024 < int(port) < 32768  # Linux gives the ports from there on to clients
    assert found == dict(RANK='5', WORLD_SIZE='8', LOCAL_RANK='1', MASTER_ADDR='showhostnamesn[3-4]')
    # All processes of a job agree; other jobs, and other steps of the same one, may run on the same node.
    assert slurm_variables({**SLURM, 'SLURM_PROCID': '0'})['MASTER_PORT'] == port
    others = [slurm_variables({**SLURM, **other})['MASTER_PORT'] for other in (
        dict(SLURM_JOB_ID='71235'), dict(SLURM_STEP_ID='1'), dict(SLURM_STEP_ID='2'))]
    assert len({port, *others}) == 4
    # A step may run on some of the job's nodes.
    assert slurm_variables({**SLURM, 'SLURM_STEP_NODELIST': 'n4'})['MASTER_ADDR'] == 'showhostnamesn4'


def test_slurm_keeps_the_users_address_and_port(monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    found = slurm_variables({**SLURM, 'MASTER_ADDR': 'here', 'MASTER_PORT': '1234'})
    assert (found['MASTER_ADDR'], found['MASTER_PORT']) == ('here', '1234')
    with pytest.raises(LaunchError, match=r'scontrol, .* the nodes n\[3-4\], was not found: set MASTER_ADDR'):
        slurm_variables(SLURM)


def test_slurm_without_a_node_is_named(scontrol):
    scontrol.write_text('#!/bin/sh\necho no such thing >&2\nexit 1\n')
    with pytest.raises(LaunchError, match=r'scontrol does not name .* \(no such thing\): set MASTER_ADDR'):
        slurm_variables(SLURM)


@pytest.mark.parametrize('missing', SLURM)
def test_outside_slurm(missing):
    env = {name: value for name, value in SLURM.items() if name != missing}
    with pytest.raises(LaunchError, match=f'--launcher slurm is for .* {missing} is not set here: use tools/slurm_'):
        slurm_variables(env)


@pytest.mark.parametrize('launcher, name', [('slurm', 'SLURM_PROCID'), ('pytorch', 'RANK')])
@pytest.mark.parametrize('cuda', [False, True])
def test_a_launcher_that_did_not_start_this(launcher, name, cuda, monkeypatch):
    """With GPUs as without: MMEngine would raise a KeyError."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    monkeypatch.delenv(name, raising=False)
    args = argparse.Namespace(config=SHAPES, work_dir=None, launcher=launcher, local_rank=0, allow_pickle=False,
                              cfg_options={})
    with pytest.raises(LaunchError, match=f'--launcher {launcher} is for .* {name} is not set here: use tools/'):
        load_config(args, ())


@pytest.mark.parametrize('env', [dict(LOCAL_WORLD_SIZE='4', LOCAL_RANK='0'), dict(LOCAL_RANK='3')])
def test_more_processes_than_gpus(env, monkeypatch):
    """By torchrun's count, or by Slurm's number of a process."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(LaunchError, match='4 processes were asked for, but 2 GPUs are visible'):
        set_up_processes(Config())


def test_slurm_processes_without_gpus_join(tmp_path):
    """One of them here. The checkpoint is looked for afterwards."""
    make_shapes_coco(tmp_path / 'data' / 'shapes', num_train=1, num_val=1)
    env = dict(SLURM, SLURM_PROCID='0', SLURM_NTASKS='1', SLURM_LOCALID='0', MASTER_ADDR='127.0.0.1',
               CUDA_VISIBLE_DEVICES='')
    done = run_tool(SHAPES, '--launcher', 'slurm', '--cfg-options', 'load_from=x.pth', cwd=tmp_path, env=env)
    assert_only_error(done, 'error: load_from: no such file: x.pth')
    notes = [line for line in done.stderr.splitlines() if line.startswith('note: ')]
    assert len(notes) == 1 and notes[0].endswith('; 1 CPU process over gloo instead')


OLD_DRIVER = ('The NVIDIA driver on your system is too old (found version {}). Please update your GPU driver by '
              'downloading and installing a new version from the URL: …')


@pytest.mark.parametrize('cuda, error, expected', [
    ('13.0', 'Found no NVIDIA driver on your system. Please check that …', ['there is no NVIDIA driver here']),
    ('13.0', 'No CUDA GPUs are available', ['no usable CUDA device: No CUDA GPUs are available']),
    ('13.0', OLD_DRIVER.format(12040), ['is for CUDA 12.4', 'for CUDA 13.0', 'install a newer driver',
                                        'tools/setup_env.sh --stack openmmlab', 'TORCH_INDEX_URL']),
    ('13.0', OLD_DRIVER.format(11080), ['is for CUDA 11.8', 'for CUDA 13.0', '(tools/setup_env.sh with TORCH_']),
    ('12.1', OLD_DRIVER.format(11040), ['is for CUDA 11.4', 'for CUDA 12.1', '(tools/setup_env.sh with TORCH_']),
])
def test_why_no_gpu(cuda, error, expected, monkeypatch):
    def fail():
        raise RuntimeError(error)

    monkeypatch.setattr(torch.backends.cuda, 'is_built', lambda: True)
    monkeypatch.setattr(torch.cuda, 'init', fail)
    monkeypatch.setattr(torch.version, 'cuda', cuda)
    reason = why_no_gpu()
    assert all(part in reason for part in expected), reason
    assert '\n' not in reason


def test_a_torch_without_cuda_is_named(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, 'is_built', lambda: False)
    assert why_no_gpu() == f'torch {torch.__version__} is a build without CUDA'


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
