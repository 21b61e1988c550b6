"""Early checks of the tools: what cannot work is named before any long work starts."""
import argparse
import os
import pickle
import re
import signal
import socket
import subprocess
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from warm_python import warm_python

import convneur_mm
from convneur_mm.datasets import make_shapes_coco
from convneur_mm.engine import launch
from convneur_mm.engine.launch import (
    LaunchError,
    OverridesAction,
    entry,
    find_config,
    load_config,
    make_parser,
    read_config,
    readable_checkpoint,
    set_loader_defaults,
    use_resumable_loop,
    why_no_gpu,
    without_sync_bn,
)
from convneur_mm.engine.launch import config as launch_config
from convneur_mm.engine.launch.processes import set_up_processes, slurm_variables, use_new_store
from convneur_mm.engine.runner.interrupts import Interrupted
from convneur_mm.stack import StackError

ROOT = Path(__file__).parents[2]
SHAPES = 'cascade_rcnn_convneur_m1_shapes'


@pytest.mark.parametrize('word, expected', [
    ('data_root=/my data/set 1/', '/my data/set 1/'),
    ('x=/a  b', '/a  b'),
    ('x="/a b/c"', '/a b/c'),
    ("x=['/a b', \"c d\", e]", ['/a b', 'c d', 'e']),
    ('x=(a b, (c d , [e f]))', ('a b', ('c d', ['e f']))),
    ('x=/a b,/c d', ['/a b', '/c d']),
    ('x=/a (1) [b]/c', '/a (1) [b]/c'),
    ('x=( 1 , 2.5 , True , None )', (1, 2.5, True, None)),
    ('x= 1 ', 1),
    ('x=', ''),
    ('x=a=b c', 'a=b c'),
])
def test_blanks_within_a_setting_stay(word, expected):
    assert list(make_parser('').parse_args(['x.py', '--cfg-options', word]).cfg_options.values()) == [expected]


@given(st.recursive(st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none() | st.from_regex(
    r'[a-z_/.]+', fullmatch=True), lambda values: st.lists(values, min_size=1) | st.tuples(values, values)))
def test_settings_without_blanks_are_read_as_mmengine_does(value):
    """And with blanks that only set them apart."""
    text = str(value).replace("'", '')
    parsers = [argparse.ArgumentParser(), argparse.ArgumentParser()]
    for parser, action in zip(parsers, (OverridesAction, DictAction)):
        parser.add_argument('--cfg-options', nargs='+', action=action)
    ours, theirs = (parser.parse_args(['--cfg-options', f'a.b={text}', 'c=1']) for parser in parsers)
    assert ours == theirs


@pytest.mark.parametrize('words, expected', [
    (['a=[1,', '2]'], r"--cfg-options: brackets do not match in 'a=\[1,'; a list is written \"KEY=\[a,b\]\""),
    (['a=1', 'b'], '--cfg-options takes KEY=VALUE, got .b.; one with blanks is written "KEY=VALUE"'),
    (['=1'], "--cfg-options takes KEY=VALUE, got '=1'"),
])
def test_settings_that_cannot_be_read_are_named(words, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        make_parser('').parse_args(['x.py', '--cfg-options', *words])
    assert ended.value.code == 2 and re.search(expected, capsys.readouterr().err.replace('\n', ' '))


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


# As after a run on a busy machine: a reference cycle owns process groups, whose threads still have tensors to drop
# after the last barrier.
LATE_THREADS = """
import os, torch
from convneur_mm.engine import launch
from convneur_mm.engine.files.errors import LaunchError

class Runner:
    def __init__(self):
        self.itself = self
        self.model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
        self.group = torch.distributed.new_group(backend='gloo')

def gather():
    for group in list(torch.distributed.distributed_c10d._world.pg_map) * 10:
        torch.distributed.all_gather([torch.empty(10_000_000)], torch.ones(10_000_000), group, async_op=True)

def join():
    torch.distributed.init_process_group('gloo', init_method={address!r}, rank=0, world_size=1)
    torch.distributed.barrier = gather
    Runner()

def fail():
    join()
    gather()
    raise LaunchError('faulty')

torch.set_num_threads(1)
print(len(os.listdir('/proc/self/task')))
launch.run({main})
print(len(os.listdir('/proc/self/task')))
"""


def run_with_late_threads(main, folder):
    code = LATE_THREADS.format(address=f'file://{folder}/store', main=main)
    return subprocess.run([warm_python(), '-c', code], text=True, capture_output=True, timeout=60)


@pytest.mark.skipif(not os.path.isdir('/proc/self/task'), reason='counts threads as Linux lists them')
class TestThreadsOfTheProcessGroup:
    """gloo's would abort the interpreter while it shuts down."""

    def test_they_are_joined(self, tmp_path):
        done = run_with_late_threads('join', tmp_path)
        assert (done.returncode, done.stderr) == (0, '')
        before, after = done.stdout.split()
        assert before == after

    def test_an_error_keeps_its_exit_code(self, tmp_path):
        done = run_with_late_threads('fail', tmp_path)
        assert (done.returncode, done.stderr) == (2, 'error: faulty\n')
        assert len(done.stdout.split()) == 1


def test_sync_bn_becomes_bn():
    cfg = dict(head=dict(norm_cfg=dict(type='SyncBN', requires_grad=True)), necks=[dict(norm_cfg=dict(type='SyncBN'))])
    without_sync_bn(cfg)
    assert cfg == dict(head=dict(norm_cfg=dict(type='BN', requires_grad=True)), necks=[dict(norm_cfg=dict(type='BN'))])


def test_nested_sync_bn_is_found():
    assert without_sync_bn([dict(type='BN'), [dict(type='SyncBN')], dict(type='BN')])
    assert without_sync_bn(dict(type='SyncBN'))
    rtmdet = dict(type='mmdet.RTMDet', neck=dict(norm_cfg=dict(type='BN')))  # it makes SyncBN of them
    assert without_sync_bn(rtmdet) and rtmdet['use_syncbn'] is False
    assert not without_sync_bn(dict(head=dict(norm_cfg=dict(type='BN')), necks=[dict(type='FPN')]))


def test_the_tool_says_what_is_wrong_in_one_line(tmp_path):
    done = subprocess.run([warm_python(), str(ROOT / 'tools' / 'train.py'), 'no_such_config'], cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 2
    # The upstream stack's packages warn of each other when they are imported.
    assert done.stderr.splitlines()[-1] == (f"error: no config 'no_such_config', neither here ({tmp_path}) nor among "
                                            f"the shipped ones ({ROOT / 'configs'})")
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('args, message', [
    (['train'], 'train_dataloader.dataset.ann_file: data/coco/annotations/instances_train2017.json does not exist '),
    (['train', '--amp'], '--amp needs a CUDA GPU, and none is visible; --amp bf16 does not'),
])
def test_the_tools_name_what_is_wrong(args, message, run, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert run(*args, config='cascade_rcnn_convneur_m3_1x_coco').startswith(message)


def test_a_bad_architecture_is_named_by_the_tool(run, tmp_path):
    make_shapes_coco(tmp_path / 'data' / 'shapes', num_train=1, num_val=1, image_size=64)
    with pytest.raises(ValueError, match=r"arch must be one of \('m1', .*'m6'\) or a dict, got 'm7'"):
        run('train', '--cfg-options', 'model.backbone.arch=m7', config=SHAPES)


def test_predictions_and_pictures_are_saved(tiny_config, run):
    """One of each image."""
    config = tiny_config('cascade_rcnn')
    config.dump('config.py')
    with DefaultScope.overwrite_default_scope('mmdet'):
        torch.save(dict(state_dict=MODELS.build(config.model).state_dict(), meta={}), 'x.pth')
    assert run('test', 'x.pth', '--out', 'out/results.pkl', '--show-dir', 'pictures', '--cfg-options',
               'model.test_cfg.rcnn.max_per_img=2') is None
    assert [result['img_id'] for result in pickle.loads(Path('out/results.pkl').read_bytes())] == [*range(1, 7)]
    assert sorted(path.name for path in Path('pictures').iterdir()) == [f'{i:06}.jpg' for i in range(1, 7)]


# ---- the config


OWN = """
model = dict(type='CheckpointTestModel', necks=[dict(norm_cfg=dict(type='SyncBN'))])
train_dataloader = dict(dataset=dict(type='CheckpointTestData', ann_file='train.json'))
val_dataloader = dict(dataset=dict(type='CheckpointTestData', ann_file='val.json'))
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads the config above, with additions, as a tool with these arguments."""
    def load(text='', *args, splits=('train', 'val')):
        (tmp_path / 'own.py').write_text(f'{OWN}\n{text}')
        return load_config(make_parser('').parse_args(['own.py', *args]), splits)

    monkeypatch.chdir(tmp_path)
    for split in 'train', 'val':
        (tmp_path / f'{split}.json').write_text('{}')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    MMLogger.get_current_instance()  # where it is made it asks for the GPU, which there may be in name only
    with patch.dict(os.environ):
        yield load


CHECKS = ['CheckpointKeysHook', 'ClassNamesHook', 'LabelRangeHook', 'NonFiniteLossHook', 'SaveAtSigtermHook']


def test_the_arguments_by_default():
    args = vars(make_parser('').parse_args(['x.py']))
    assert args == dict(config='x.py', work_dir=None, cfg_options={}, launcher='none', allow_pickle=False, local_rank=0)
    for option in '--local-rank=3', '--local_rank=3':
        assert make_parser('').parse_args(['x.py', option]).local_rank == 3
    assert make_parser('').parse_args(['x.py', '--cfg-options', 'a.b=1', 'c=[x,2]']).cfg_options == {
        'a.b': 1, 'c': ['x', 2]}
    with pytest.raises(SystemExit):
        make_parser('').parse_args(['x.py', '--launcher', 'mpi'])


def test_the_help_of_the_arguments():
    shown = ' '.join(make_parser('What it does.').format_help().split())
    for part in ('What it does.', 'path of a config, or the name of one that convneur_mm ships',
                 '(default: work_dirs/<name of the config>)', '--cfg-options KEY=VALUE [KEY=VALUE ...]',
                 'a list is written "key=[a,b]"', 'job launcher', 'without it they are refused'):
        assert part in shown
    assert 'local_rank' not in shown and 'local-rank' not in shown


def test_the_work_dir(load):
    assert load().work_dir == 'work_dirs/own'
    assert load('work_dir = "there"').work_dir == 'there'
    assert load('work_dir = "there"', '--work-dir', 'here').work_dir == 'here'


def test_the_hooks_of_the_tools(load):
    cfg = load()
    assert [hook['type'] for hook in cfg.custom_hooks] == [*CHECKS, 'StartSummaryHook']
    assert cfg.launcher == 'none'
    note, = cfg.custom_hooks[-1]['notes']
    assert note.startswith('BN replaces SyncBN, which needs a GPU')
    assert 'SyncBN' not in str(cfg.model)
    # What an earlier run wrote to its work dir.
    again = load('custom_hooks = [dict(type="EMAHook"), dict(type="ClassNamesHook", priority=3), '
                 'dict(type="StartSummaryHook", notes=["old"])]\nmodel = dict(type="M")').custom_hooks
    assert [hook['type'] for hook in again] == ['EMAHook', 'ClassNamesHook', *(
        name for name in CHECKS if name != 'ClassNamesHook'), 'StartSummaryHook']
    assert again[1]['priority'] == 3
    assert again[-1]['notes'] == []


@pytest.mark.parametrize('given, kind', [
    (dict(by_epoch=True, max_epochs=3), 'ResumableEpochBasedTrainLoop'),
    (dict(by_epoch=False, max_iters=3), 'ResumableIterBasedTrainLoop'),
    (dict(type='EpochBasedTrainLoop', max_epochs=3), 'ResumableEpochBasedTrainLoop'),
    (dict(type='IterBasedTrainLoop', max_iters=3), 'ResumableIterBasedTrainLoop'),
    # As an earlier run wrote it to its work dir.
    (dict(type='ResumableIterBasedTrainLoop', max_iters=3), 'ResumableIterBasedTrainLoop'),
    (dict(type='OtherLoop', max_iters=3), 'OtherLoop'),
])
def test_loops_that_can_be_resumed(load, given, kind):
    length = {name: value for name, value in given.items() if name.startswith('max_')}
    assert load(f'train_cfg = {given!r}').train_cfg == dict(type=kind, **length)


@pytest.mark.parametrize('given', [dict(type='EpochBasedTrainLoop', by_epoch=True), dict(max_epochs=3)])
def test_mistaken_loops_are_left_for_mmengine_to_name(given):
    expected = {**given, 'type': 'ResumableEpochBasedTrainLoop'} if 'type' in given else given
    use_resumable_loop(given)
    assert given == expected


def test_sync_bn_stays_where_there_is_a_gpu(load, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    cfg = load()
    assert 'SyncBN' in str(cfg.model) and cfg.custom_hooks[-1]['notes'] == []


def test_the_local_rank_is_that_of_the_launcher(load):
    os.environ.pop('LOCAL_RANK', None)
    load('', '--local_rank', '2')
    assert os.environ['LOCAL_RANK'] == '2'
    load('', '--local_rank', '3')
    assert os.environ['LOCAL_RANK'] == '2'


def test_data_and_classes_are_checked(load, monkeypatch):
    checked = []
    monkeypatch.setattr(entry, 'check_classes', lambda cfg, splits: checked.append(splits))
    Path('train.json').unlink()
    with pytest.raises(LaunchError, match='^train_dataloader.dataset.ann_file: train.json does not exist'):
        load()
    load(splits=('val',))
    assert checked == [('val',)]
    Path('x.pkl').touch()
    pickled = 'val_dataloader["dataset"]["ann_file"] = "x.pkl"'
    with pytest.raises(LaunchError, match='x.pkl'):
        load(pickled, splits=('val',))
    load(pickled, '--allow-pickle', splits=('val',))


def test_the_checkpoint_to_start_from_is_looked_into(load):
    with pytest.raises(LaunchError, match='^load_from: no such file: x.pth$'):
        load('load_from = "x.pth"')
    torch.save(dict(state_dict={}), 'x.pth')
    assert load('load_from = "x.pth"').load_from == 'x.pth'
    torch.save(dict(state_dict={}, x=argparse.Namespace()), 'x.pth')
    with pytest.raises(LaunchError, match='^load_from: x.pth was not loaded, because it needs pickle'):
        load('load_from = "x.pth"')
    assert load('load_from = "x.pth"', '--allow-pickle').load_from == 'x.pth'


def test_names_of_mmengine_stay_as_they_are():
    assert readable_checkpoint('torchvision://resnet50', 'checkpoint', False) == 'torchvision://resnet50'


@pytest.mark.parametrize('scope, package', [('mmseg', 'mmseg.models'), ('mmpretrain', 'mmpretrain.models'),
                                            ('mmdet', 'mmdet.models'), (None, None), ('other', None)])
def test_the_package_of_a_config_is_imported(scope, package, tmp_path, monkeypatch):
    (tmp_path / 'x.py').write_text(f'default_scope = {scope!r}\ntrain_dataloader = dict(num_workers=1)')
    required, checked = [], []
    monkeypatch.setattr(launch_config, 'require', required.append)
    monkeypatch.setattr(launch_config, 'check_cuda_operators', lambda: checked.append(True))
    cfg = read_config(str(tmp_path / 'x.py'), {'a.b': 1})
    assert required == [package] * (package is not None)
    assert len(checked) == (scope == 'mmdet')
    assert cfg.a.b == 1
    assert ('collate_fn' in cfg.train_dataloader) is (scope == 'mmpretrain')


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    def missing(name):
        raise StackError(f'{name} is missing: install it')

    monkeypatch.setattr(launch_config, 'require', missing)
    (tmp_path / 'x.py').write_text('default_scope = "mmseg"')
    with pytest.raises(LaunchError, match='^mmseg.models is missing: install it$'):
        read_config(str(tmp_path / 'x.py'), {})
    # Where MMEngine does not find that of a base.
    for name, error in ('mmseg', LaunchError), ('other', ModuleNotFoundError):
        def fromfile(path, name=name):
            raise ModuleNotFoundError(f'{name} is not installed, please install {name}')

        monkeypatch.setattr(Config, 'fromfile', fromfile)
        with pytest.raises(error, match=f'^{name} is (missing: install it|not installed, please install other)$'):
            read_config('x.py', {})


@pytest.mark.parametrize('cuda', [False, True])
def test_loaders_of_a_classifier(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    cfg = Config(dict(train_dataloader=dict(num_workers=1), val_dataloader=dict(num_workers=0), test_dataloader=dict(
        collate_fn=dict(type='pseudo_collate'), pin_memory='as it is', persistent_workers=False, num_workers=2)))
    set_loader_defaults(cfg)
    default = dict(collate_fn=dict(type='default_collate'), pin_memory=cuda)
    assert cfg.train_dataloader == dict(num_workers=1, persistent_workers=True, **default)
    assert cfg.val_dataloader == dict(num_workers=0, persistent_workers=False, **default)
    assert cfg.test_dataloader == dict(collate_fn=dict(type='pseudo_collate'), pin_memory='as it is',
                                       persistent_workers=False, num_workers=2)
    without = Config(dict(test_dataloader={'dataset': {}}, val_dataloader=None))
    set_loader_defaults(without)
    assert without.to_dict() == dict(val_dataloader=None, test_dataloader=dict(
        dataset={}, persistent_workers=False, **default))


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
        monkeypatch.setattr(entry.time, 'sleep', waited.append)

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


@pytest.mark.parametrize('env, said', [
    (dict(), 'ended by SIGTERM'), (dict(LOCAL_RANK='1'), None), (dict(SLURM_LOCALID='1'), None),
    (dict(LOCAL_RANK='0', SLURM_LOCALID='1'), 'ended by SIGTERM'),
    (dict(LOCAL_RANK='0', GROUP_RANK='1', GROUP_WORLD_SIZE='2'),
     f'node 1 ({socket.gethostname()}): ended by SIGTERM')])
def test_a_signal_is_told_once_on_each_machine(env, said, monkeypatch):
    left = []
    monkeypatch.setattr(entry, 'leave', lambda interrupted, message: left.append(message))
    monkeypatch.setattr(entry, 'raised_signals', nullcontext)
    for name in ('LOCAL_RANK', 'GROUP_RANK', 'GROUP_WORLD_SIZE', 'SLURM_LOCALID', 'SLURM_NODEID', 'SLURM_NNODES'):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)

    def main():
        raise Interrupted(signal.SIGTERM)

    launch.run(main)
    assert left == [said]


@pytest.mark.parametrize('joined, waits', [(False, []), (True, [1])])
def test_an_error_among_processes_waits_for_the_signal_that_it_may_come_from(joined, waits, monkeypatch):
    waited = []
    monkeypatch.setattr(entry.time, 'sleep', waited.append)
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: joined)

    def main():
        raise RuntimeError('connection closed by peer')

    with pytest.raises(RuntimeError, match='connection closed'):
        launch.run(main)
    assert waited == waits


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


@pytest.mark.parametrize('code', [0, 1])
def test_slurm_without_a_node_is_named(scontrol, code):
    scontrol.write_text(f'#!/bin/sh\necho no such thing >&2\nexit {code}\n')
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


@pytest.fixture
def one_process(monkeypatch):
    """The variables of a launcher that starts one; its group is left afterwards."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.cuda, 'is_built', lambda: False)
    with socket.socket() as free, patch.dict(os.environ):
        free.bind(('127.0.0.1', 0))
        os.environ.update(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1',
                          MASTER_PORT=str(free.getsockname()[1]))
        free.close()
        yield
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_processes_without_gpus_join_over_gloo(one_process, capsys):
    cfg = Config(dict(env_cfg=dict(dist_cfg=dict(timeout=7)), find_unused_parameters=True))
    set_up_processes(cfg)
    assert torch.distributed.get_backend() == 'gloo'
    assert capsys.readouterr().err == (f'note: torch {torch.__version__} is a build without CUDA; 1 CPU process over '
                                       'gloo instead\n')
    assert cfg.env_cfg.dist_cfg == dict(timeout=7, backend='gloo')
    assert cfg.model_wrapper_cfg == dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False,
                                         find_unused_parameters=True)


@pytest.mark.parametrize('wrapper, found', [
    ({}, dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False,
              find_unused_parameters=False)),
    (dict(model_wrapper_cfg=dict(type='Own')), dict(type='Own'))])
def test_the_others_join_without_a_word(wrapper, found, one_process, monkeypatch, capsys):
    joined = []
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda *args, **kwargs: joined.append((args, kwargs)))
    os.environ.update(RANK='1', WORLD_SIZE='2')
    cfg = Config(wrapper)
    set_up_processes(cfg)
    assert joined == [(('gloo',), dict(timeout=timedelta(seconds=1800)))]
    assert capsys.readouterr().err == ''
    assert cfg.model_wrapper_cfg == found
    os.environ['RANK'] = '0'
    set_up_processes(cfg)
    assert '; 2 CPU processes over gloo' in capsys.readouterr().err


@pytest.mark.parametrize('error', [RuntimeError, OSError])
def test_who_does_not_join_is_missed(error, one_process, monkeypatch):
    def fail(*args, **kwargs):
        raise error('timed out\nsomewhere')

    monkeypatch.setattr(torch.distributed, 'init_process_group', fail)
    os.environ['WORLD_SIZE'] = '3'
    with pytest.raises(LaunchError, match=r'^the 3 processes did not all join within 5 s \(timed out\); see what the '
                                          'others printed, on every machine$'):
        set_up_processes(Config(dict(env_cfg=dict(dist_cfg=dict(timeout=5)))))


@pytest.mark.parametrize('env', [dict(LOCAL_WORLD_SIZE='2', LOCAL_RANK='0'), dict(LOCAL_RANK='1')])
def test_with_gpus_mmengine_sets_up_the_processes(env, one_process, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    os.environ.pop('LOCAL_WORLD_SIZE', None)
    os.environ.update(env)
    cfg = Config()
    set_up_processes(cfg)
    assert cfg.to_dict() == {} and not torch.distributed.is_initialized()


def test_slurm_processes_join(one_process, load):
    """The checkpoint is looked for afterwards."""
    port = os.environ['MASTER_PORT']
    for name in 'RANK', 'WORLD_SIZE', 'LOCAL_RANK':
        del os.environ[name]
    os.environ.update(SLURM, SLURM_PROCID='0', SLURM_NTASKS='1', SLURM_LOCALID='0', MASTER_PORT=port)
    with pytest.raises(LaunchError, match='^load_from: no such file: x.pth$'):
        load('', '--launcher', 'slurm', '--cfg-options', 'load_from=x.pth')
    assert torch.distributed.is_initialized()


OLD_DRIVER = ('The NVIDIA driver on your system is too old (found version {}). Please update your GPU driver by '
              'downloading and installing a new version from the URL: …')


@pytest.mark.parametrize('cuda, error, expected', [
    ('13.0', 'Found no NVIDIA driver on your system. Please check that …', ['there is no NVIDIA driver here']),
    ('13.0', 'No CUDA GPUs are available', ['no usable CUDA device: No CUDA GPUs are available']),
    ('13.0', OLD_DRIVER.format(12040), ['is for CUDA 12.4', 'for CUDA 13.0', 'install a newer driver',
                                        '(tools/setup_env.sh with TORCH_INDEX_URL)']),
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


def test_a_gpu_that_cannot_be_used_for_no_known_reason(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, 'is_built', lambda: True)
    monkeypatch.setattr(torch.cuda, 'init', lambda: None)
    assert why_no_gpu() == 'no usable CUDA device: torch.cuda.is_available() is false'


class TestANewStore:
    """Of processes that torchrun has started again, beside the store that it keeps."""

    @pytest.fixture
    def agent(self):
        return torch.distributed.TCPStore('127.0.0.1', 0, is_master=True)

    @staticmethod
    def variables(agent, **settings):
        """Of a process, after it has asked for a store."""
        given = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(agent.port), TORCHELASTIC_RESTART_COUNT='1',
                     TORCHELASTIC_USE_AGENT_STORE='True', RANK='0')
        with patch.dict(os.environ, {**given, **settings}):
            use_new_store()
            return os.environ['MASTER_PORT'], os.environ['TORCHELASTIC_USE_AGENT_STORE']

    def test_is_that_of_the_first_process_and_of_this_start(self, agent):
        port, shared = self.variables(agent)
        assert port != str(agent.port) and shared == 'False'
        assert self.variables(agent, RANK='1') == (port, shared)
        again, _ = self.variables(agent, TORCHELASTIC_RESTART_COUNT='2')
        assert self.variables(agent, RANK='1', TORCHELASTIC_RESTART_COUNT='2') == (again, 'False')
        # What the processes before have left is still for them alone.
        assert self.variables(agent, RANK='1') == (port, 'False')

    @pytest.mark.parametrize('settings', [dict(TORCHELASTIC_RESTART_COUNT='0'),
                                          dict(TORCHELASTIC_USE_AGENT_STORE='False')])
    def test_is_not_needed(self, agent, settings):
        """At first; and where torchrun gives each start a port of its own."""
        assert self.variables(agent, **settings)[0] == str(agent.port)
