"""Ctrl-C and SIGTERM, sent to real runs of the tools with data workers, in one process and in two."""
import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from convneur_mm.datasets import make_shapes_imagenet
from convneur_mm.engine.interrupts import Interrupted, command, raised_signals

ROOT = Path(__file__).parents[2]
CONFIG = """
_base_ = __import__('convneur_mm').config('convneur_m1_shapes')
arch = dict(depths=[1, 1, 1, 1], channels=[8, 16, 24, 32], mem_channels=16)
model = dict(
    backbone=dict(_delete_=True, type='ConvNeur', arch=arch, out_indices=3, gap_before_final_norm=True),
    head=dict(in_channels=32))
train_dataloader = dict(batch_size=2, num_workers=2)
val_dataloader = dict(batch_size=1, num_workers=2)
test_dataloader = val_dataloader
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1))
train_cfg = dict(max_epochs=1000, val_interval=1000)
param_scheduler = []
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('interrupted')
    make_shapes_imagenet(folder / 'data' / 'shapes_imagenet', num_train=24, num_val=6, image_size=64)
    (folder / 'child.py').write_text(CONFIG)
    return folder


def end(arguments, signum, line, cwd, send=os.killpg, **env):
    """Starts a command, sends it a signal when it has printed such a line; returns exit code, output after that.

    By default all processes of the command get the signal, as they do from a terminal.
    """
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHON': sys.executable, **env}
    process = subprocess.Popen([str(argument) for argument in arguments], cwd=cwd, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, env=env, start_new_session=True)
    try:
        lines = []
        for printed in process.stdout:
            lines.append(printed)
            if re.search(line, printed):
                break
        else:
            raise AssertionError(''.join(lines[-40:]))
        send(process.pid, signum)
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def assert_one_line(output, expected):
    """Beside the lines of the log that were under way."""
    said = [line for line in output.splitlines() if not re.search('mmengine - (INFO|WARNING)', line)]
    assert len(said) == 1, output
    assert re.fullmatch(expected, said[0]), said[0]


TRAIN = [sys.executable, ROOT / 'tools' / 'train.py', 'child.py']
DIST = [ROOT / 'tools' / 'dist_train.sh', 'child.py', 2]


def test_a_training_names_its_checkpoint_and_how_to_go_on(folder, tmp_path):
    arguments = [*TRAIN, '--work-dir', tmp_path / 'work']
    code, output = end(arguments, signal.SIGINT, r'Epoch\(train\) +\[2\]', folder)
    assert code == 130, output
    said = shlex.join([*map(str, arguments), '--resume'])
    assert_one_line(output, rf'ended by Ctrl-C after \S*epoch_\d+\.pth was saved; to go on: {re.escape(said)}')
    code, output = end(shlex.split(output.partition('to go on: ')[2]), signal.SIGTERM, 'resumed epoch: ', folder)
    assert code == 143, output
    # Of the earlier run, or of this one, if it got that far.
    assert_one_line(output, r'ended by SIGTERM (after \S*epoch_\d+\.pth was saved; .*|before the run began)')


@pytest.mark.parametrize('signum, name, send', [
    (signal.SIGINT, 'Ctrl-C', os.killpg), (signal.SIGTERM, 'SIGTERM', os.killpg), (signal.SIGTERM, 'SIGTERM', os.kill),
], ids=['Ctrl-C', 'SIGTERM', 'SIGTERM to torchrun alone'])
def test_a_training_of_two_processes(folder, tmp_path, signum, name, send):
    """torchrun hands a signal on, which reaches the processes twice from a terminal, and once from Slurm."""
    arguments = [*DIST, '--work-dir', tmp_path / 'work']
    code, output = end(arguments, signum, r'Epoch\(train\) +\[2\]', folder, send)
    assert code == 128 + signum, output
    said = shlex.join([*map(str, arguments), '--resume'])
    assert_one_line(output, rf'ended by {name} after \S*epoch_\d+\.pth was saved; to go on: {re.escape(said)}')


def test_a_training_without_a_checkpoint(folder, tmp_path):
    """That of an earlier run in the same work dir does not count."""
    (tmp_path / 'epoch_1.pth').write_bytes(b'')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    code, output = end([*TRAIN, '--work-dir', tmp_path, '--cfg-options', 'default_hooks.checkpoint.interval=1000'],
                       signal.SIGTERM, r'Epoch\(train\) +\[1\]', folder)
    assert code == 143
    assert_one_line(output, r'ended by SIGTERM before a checkpoint was saved; to start again: \S+ \S+/tools/train\.py '
                            r'child\.py --work-dir \S+ --cfg-options default_hooks\.checkpoint\.interval=1000')


def test_a_test(folder, tmp_path):
    cfg = Config.fromfile(folder / 'child.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict(), meta={}), tmp_path / 'x.pth')
    (tmp_path / 'slow.py').write_text(SLOW)
    (tmp_path / 'config.py').write_text(
        f"{CONFIG}custom_imports = dict(imports=['convneur_mm', 'slow'])\ncustom_hooks = [dict(type='Slow')]")
    arguments = [sys.executable, ROOT / 'tools' / 'test.py', tmp_path / 'config.py', tmp_path / 'x.pth', '--work-dir',
                 tmp_path]
    code, output = end(arguments, signal.SIGINT, 'slowly', folder, PYTHONPATH=str(tmp_path))
    assert code == 130, output
    assert_one_line(output, 'ended by Ctrl-C without results; to test again: ' + re.escape(
        shlex.join(map(str, arguments))))


SLOW = """
import time
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class Slow(Hook):
    def before_test_iter(self, runner, batch_idx, data_batch=None):
        print('slowly', flush=True)
        time.sleep(60)
"""


def test_before_the_run_begins(folder, tmp_path):
    """While data workers are forked, say, where Python drops exceptions."""
    code, output = end([*TRAIN, '--work-dir', tmp_path], signal.SIGINT, 'training starts', folder)
    assert code == 130, output
    assert_one_line(output[output.index('ended by'):], 'ended by Ctrl-C before .*')


def test_an_exception_that_python_drops_is_raised_again():
    class Swallows:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            [None for _ in range(10)]  # the interpreter looks for signals within

    before = signal.getsignal(signal.SIGCHLD)
    try:
        with pytest.raises(Interrupted, match='SIGTERM'), warnings.catch_warnings(), raised_signals():
            warnings.simplefilter('ignore')
            swallows = Swallows()
            del swallows
            time.sleep(30)
    finally:
        for signum, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL),
                                (signal.SIGCHLD, before)):
            signal.signal(signum, handler)


@pytest.mark.parametrize('argv, settings, expected', [
    (['python', 'tools/train.py', 'x.py'], {}, 'python tools/train.py x.py --work-dir work --resume'),
    (['python', '-u', 'tools/train.py', 'x.py', '--resume', '--amp'], {},
     'python -u tools/train.py x.py --amp --work-dir work --resume'),
    (['./tools/train.py', 'x.py', '--resume', 'a.pth', '--work-dir', 'a b'], dict(work_dir='a b'),
     "./tools/train.py x.py --work-dir 'a b' --resume"),
    (['tools/train.py', 'x.py', '--resume=a.pth', '--cfg-options', 'a=[1,2]'], {},
     "tools/train.py x.py --cfg-options 'a=[1,2]' --work-dir work --resume"),
    (['python', '-u', 'tools/train.py', 'x.py', '--amp', '--launcher', 'pytorch'], dict(launcher='pytorch'),
     'tools/dist_train.sh x.py 4 --amp --work-dir work --resume'),
    (['python', 'tools/train.py', 'x.py', '--launcher', 'slurm'], dict(launcher='slurm'),
     'the same command with --resume'),
])
def test_commands(argv, settings, expected):
    args = argparse.Namespace(**{**dict(work_dir=None, launcher='none', resume=None), **settings})
    assert command(args, 'work', '--resume', argv=argv, env=dict(LOCAL_WORLD_SIZE='4')) == expected


def test_the_command_of_a_test():
    args = argparse.Namespace(work_dir='work', launcher='pytorch', checkpoint='x.pth')
    argv = ['python', 'tools/test.py', 'x.py', 'x.pth', '--work-dir', 'work', '--launcher', 'pytorch']
    assert command(args, 'work', argv=argv, env=dict(LOCAL_WORLD_SIZE='2')) == (
        'tools/dist_test.sh x.py x.pth 2 --work-dir work')
