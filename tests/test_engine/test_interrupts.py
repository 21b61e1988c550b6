"""Ctrl-C and SIGTERM: in this process, and sent to real runs of the tools with data workers, in one process and in two.
"""
import argparse
import logging
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn

from convneur_mm.datasets import make_shapes_imagenet
from convneur_mm.engine import interrupts
from convneur_mm.engine.interrupts import Interrupted, command, going_on, ignore, leave, no_more_signals, raised_signals

ROOT = Path(__file__).parents[2]
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM


@pytest.fixture
def restored():
    """Signals are as before afterwards, the timer of pytest-timeout among them."""
    handlers, timer = {signum: signal.getsignal(signum) for signum in SIGNALS}, signal.getitimer(signal.ITIMER_REAL)
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    signal.setitimer(signal.ITIMER_REAL, *timer)


def send(signum):
    """To this process, which gets it before the next line."""
    os.kill(os.getpid(), signum)
    time.sleep(0)


@pytest.mark.usefixtures('restored')
class TestRaisedSignals:
    @pytest.mark.parametrize('signum, name', [(signal.SIGINT, 'Ctrl-C'), (signal.SIGTERM, 'SIGTERM')])
    def test_raise_once(self, signum, name):
        signal.signal(signal.SIGCHLD, signal.default_int_handler)
        with pytest.raises(Interrupted) as raised, raised_signals():
            send(signum)
            pytest.fail('not raised')
        assert raised.value.signum == signum
        assert str(raised.value) == f'ended by {name} before the run began'
        # torchrun sends one again to processes that have got it from the terminal.
        for other in signal.SIGINT, signal.SIGTERM:
            send(other)
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
        # PyTorch's handler raises an error when a data worker ends.
        send(signal.SIGCHLD)

    @pytest.mark.filterwarnings('error::pytest.PytestUnraisableExceptionWarning')
    def test_with_others_under_way(self):
        """Data workers end, and torchrun hands the signal on, while the first one is looked at."""
        signal.signal(signal.SIGCHLD, lambda *_: None)  # PyTorch's handler is one of Python's too
        together = {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD}
        with pytest.raises(Interrupted), raised_signals():
            signal.pthread_sigmask(signal.SIG_BLOCK, together)
            try:
                for signum in together:
                    send(signum)
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, together)

    @pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
    def test_are_raised_again_where_python_drops_the_exception(self):
        class Swallows:
            def __del__(self):
                send(signal.SIGTERM)

        started = time.monotonic()
        with pytest.raises(Interrupted, match='SIGTERM'), raised_signals():
            swallows = Swallows()
            del swallows
            time.sleep(30)
        assert time.monotonic() - started < 1

    def test_leave_everything_as_it_was(self):
        before = [signal.getsignal(signum) for signum in SIGNALS]
        for error in None, ZeroDivisionError:
            with pytest.raises(error) if error else nullcontext(), raised_signals():
                assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is not before[0]
                if error:
                    raise error
            assert [signal.getsignal(signum) for signum in SIGNALS] == before

    def test_keep_what_others_have_set_meanwhile(self):
        with raised_signals():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN

    def test_end_forked_workers_by_sigterm_alone(self):
        """The main process, which gets Ctrl-C from the terminal as they do, ends them."""
        with raised_signals():
            worker = os.fork()
            if not worker:
                try:
                    send(signal.SIGINT)
                    os.write(2, b'still at work')
                    send(signal.SIGTERM)
                finally:
                    os._exit(1)
            _, status = os.waitpid(worker, 0)
        assert os.waitstatus_to_exitcode(status) == 0

    def test_forked_workers_of_a_training_go_on_for_a_while(self, monkeypatch):
        """The main process needs their batches until it has saved. Slurm may send the signal twice."""
        monkeypatch.setattr(interrupts, 'WORKERS_STAY', 0.2)
        begun = time.monotonic()
        with raised_signals():
            monkeypatch.setattr(interrupts.sigterm, 'held', True)
            worker = os.fork()
            if not worker:
                try:
                    for _ in range(2):
                        send(signal.SIGTERM)
                        time.sleep(0.15)
                    time.sleep(30)
                finally:
                    os._exit(1)
            _, status = os.waitpid(worker, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert 0.2 <= time.monotonic() - begun < 10

    @pytest.mark.parametrize('how', ['before', 'while it stays'])
    def test_forked_workers_end_at_once_when_the_training_is_over(self, how):
        """Python ends them so when it ends itself, and waits for them."""
        begun = time.monotonic()
        with raised_signals():
            interrupts.sigterm.held = True
            read, write = os.pipe()
            worker = os.fork()
            if not worker:
                try:
                    if how == 'while it stays':
                        send(signal.SIGTERM)
                    os.write(write, b'.')
                    time.sleep(30)
                finally:
                    os._exit(1)
            os.read(read, 1)
            interrupts.sigterm.held = False
            os.kill(worker, signal.SIGTERM)
            _, status = os.waitpid(worker, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert time.monotonic() - begun < 20

    def test_runs_of_forked_processes_do_not_share_what_is_held_back(self):
        with raised_signals():
            process = os.fork()
            if not process:
                with raised_signals():
                    interrupts.sigterm.held = True
                    os._exit(0)
            os.waitpid(process, 0)
            assert not interrupts.sigterm.held

    def test_forked_workers_do_not_report_a_lost_main_process(self, capfd, monkeypatch):
        """Multiprocessing hands on a batch in a thread, which reports a connection that is gone."""
        # A process group of another test has set its own, which writes the rank before each line.
        monkeypatch.setattr(sys, 'excepthook', sys.__excepthook__)
        with raised_signals():
            worker = os.fork()
            if not worker:
                for error in ConnectionResetError('gone'), ValueError('wrong'):
                    sys.excepthook(type(error), error, None)
                os._exit(0)
            os.waitpid(worker, 0)
        assert capfd.readouterr().err == 'ValueError: wrong\n'

    def test_no_more_of_them(self):
        signal.setitimer(signal.ITIMER_REAL, 1000)
        no_more_signals()
        for signum in signal.SIGINT, signal.SIGTERM:
            send(signum)
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.usefixtures('restored')
class TestLeave:
    @pytest.fixture(autouse=True)
    def shut_down(self, monkeypatch):
        calls = []
        monkeypatch.setattr(logging, 'shutdown', lambda: calls.append('shutdown'))
        yield
        assert calls == ['shutdown']

    @pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
    def test_with_a_shells_exit_code(self, signum, capsys):
        no_more_signals()
        with pytest.raises(SystemExit) as left:
            leave(Interrupted(signum), 'one line')
        assert left.value.code == 128 + signum
        assert capsys.readouterr() == ('', 'one line\n')
        # What Python does at its end may take long, and may be ended.
        assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def test_without_a_word(self, capsys):
        with pytest.raises(SystemExit):
            leave(Interrupted(signal.SIGINT), None)
        assert capsys.readouterr() == ('', '')

    def test_without_workers(self):
        worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
        worker.start()
        with pytest.raises(SystemExit):
            leave(Interrupted(signal.SIGINT), None)
        worker.join(10)
        assert worker.exitcode == -signal.SIGKILL

    def test_at_once_where_there_are_other_processes(self, monkeypatch):
        """gloo's threads would abort this one now and then."""
        def leave_at_once(code):
            raise InterruptedError(code)

        monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
        monkeypatch.setattr(os, '_exit', leave_at_once)
        flushed = []
        monkeypatch.setattr(sys.stdout, 'flush', lambda: flushed.append(True))
        with pytest.raises(InterruptedError, match='^143$'):
            leave(Interrupted(signal.SIGTERM), None)
        assert flushed == [True]


@pytest.mark.usefixtures('restored')
class TestGoingOn:
    """The advice, around a Runner with a checkpoint of an earlier run."""

    @pytest.fixture
    def interrupt(self, toy_runner, tmp_path, monkeypatch):
        def interrupt(*saved, resume=False, checkpoint=None):
            """What is said after files are saved; of a test, if a checkpoint is named."""
            runner = toy_runner(nn.Sequential(nn.Conv2d(3, 4, 3)))
            runner._resume = resume
            closed = []
            monkeypatch.setattr(runner.visualizer, 'close', lambda: closed.append(True))
            kind = dict(checkpoint=checkpoint) if checkpoint else dict(resume=None)
            args = argparse.Namespace(work_dir='w', launcher='none', **kind)
            with pytest.raises(Interrupted) as raised, going_on(runner, args):
                for name, value in saved:
                    self.save(tmp_path / name, value)
                raise Interrupted(signal.SIGINT)
            assert closed == [True]
            assert signal.getsignal(signal.SIGINT) is ignore
            return str(raised.value)

        monkeypatch.setattr(sys, 'orig_argv', ['tools/train.py', 'x.py', '--work-dir', 'w'])
        monkeypatch.chdir(tmp_path)
        self.save(tmp_path / 'iter_1.pth', dict(w=torch.ones(1)))
        os.utime(tmp_path / 'iter_1.pth', (1, 1))
        return interrupt

    def save(self, path, value):
        if value is None:
            path.mkdir()
        elif isinstance(value, bytes):
            path.write_bytes(value)
        else:
            torch.save(value, path)

    RESTART = 'ended by Ctrl-C before a checkpoint was saved; to start again: tools/train.py x.py --work-dir w'

    def test_that_of_an_earlier_run_does_not_count(self, interrupt, tmp_path):
        (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_1.pth'))
        assert interrupt() == self.RESTART

    def test_a_record_without_its_file_does_not_count(self, interrupt, tmp_path):
        (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_2.pth'))
        assert interrupt() == self.RESTART

    @pytest.mark.parametrize('saved, newest', [
        ([('iter_1.pth', {})], 'iter_1.pth'),  # once more
        ([('iter_2.pth', {}), ('iter_3.pth', {})], 'iter_3.pth'),
        ([('iter_2.pth', {}), ('iter_3.pth', b'cut off')], 'iter_2.pth'),
        # Sound, for who allows pickle.
        ([('iter_2.pth', dict(args=argparse.Namespace()))], 'iter_2.pth'),
        # Written in parts.
        ([('iter_2.pth', None)], 'iter_2.pth'),
    ])
    def test_the_newest_intact_one_counts(self, interrupt, saved, newest):
        assert interrupt(*saved) == (f'ended by Ctrl-C after {newest} was saved; to go on: tools/train.py x.py '
                                     '--work-dir w --resume')

    def test_damaged_ones_do_not_count(self, interrupt):
        assert interrupt(('iter_2.pth', b'cut off')) == self.RESTART

    def test_a_resumed_training_can_go_on_from_where_it_began(self, interrupt):
        assert interrupt(resume=True) == (
            'ended by Ctrl-C after iter_1.pth was saved; to go on: tools/train.py x.py --work-dir w --resume')

    def test_a_test_has_no_results(self, interrupt):
        assert interrupt(checkpoint='x.pth') == (
            'ended by Ctrl-C without results; to test again: tools/train.py x.py --work-dir w')

    def test_all_else_passes(self, toy_runner):
        runner = toy_runner(nn.Sequential(nn.Conv2d(3, 4, 3)))
        with going_on(runner, argparse.Namespace(resume=None)):
            runner.train()
        with pytest.raises(ZeroDivisionError), going_on(runner, argparse.Namespace(resume=None)):
            raise ZeroDivisionError
        assert signal.getsignal(signal.SIGINT) is not ignore


@pytest.mark.parametrize('argv, settings, expected', [
    (['python', 'tools/train.py', 'x.py'], {}, 'python tools/train.py x.py --work-dir work --resume'),
    (['python', '-u', 'tools/train.py', 'x.py', '--resume', '--amp'], {},
     'python -u tools/train.py x.py --amp --work-dir work --resume'),
    (['./tools/train.py', 'x.py', '--resume', 'a.pth', '--work-dir', 'a b'], dict(work_dir='a b'),
     "./tools/train.py x.py --work-dir 'a b' --resume"),
    (['tools/train.py', 'x.py', '--resume=a.pth', 'b', '--cfg-options', 'a=[1,2]'], {},
     "tools/train.py x.py b --cfg-options 'a=[1,2]' --work-dir work --resume"),
    (['tools/train.py', '--resume', 'a.pth', 'x.py'], {}, 'tools/train.py x.py --work-dir work --resume'),
    (['tools/train.py', '--resume', '--amp', 'bf16', 'x.py'], {},
     'tools/train.py --amp bf16 x.py --work-dir work --resume'),
    (['python', '-u', 'tools/train.py', 'x.py', '--amp', '--launcher', 'pytorch'], dict(launcher='pytorch'),
     'tools/dist_train.sh x.py 4 --amp --work-dir work --resume'),
    (['python', 'tools/train.py', 'x.py', '--launcher', 'slurm'], dict(launcher='slurm'),
     'the same command with --resume'),
])
def test_commands(argv, settings, expected):
    args = argparse.Namespace(**{**dict(work_dir=None, launcher='none', resume=None), **settings})
    assert command(args, 'work', '--resume', argv=argv, env=dict(LOCAL_WORLD_SIZE='4')) == expected


def test_the_command_of_a_test(monkeypatch):
    args = argparse.Namespace(work_dir='work', launcher='pytorch', checkpoint='x.pth')
    argv = ['python', 'tools/test.py', 'x.py', 'x.pth', '--work-dir', 'work', '--launcher', 'pytorch']
    assert command(args, 'work', argv=argv, env=dict(LOCAL_WORLD_SIZE='2')) == (
        'tools/dist_test.sh x.py x.pth 2 --work-dir work')
    assert command(args, 'work', argv=argv, env={}) == 'tools/dist_test.sh x.py x.pth 1 --work-dir work'
    monkeypatch.setattr(sys, 'orig_argv', argv)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '3')
    assert command(args, 'work') == 'tools/dist_test.sh x.py x.pth 3 --work-dir work'
    args.launcher = 'slurm'
    assert command(args, 'work') == 'the same command'


# ---- the tools


@HOOKS.register_module()
class InterruptTestHook(Hook):
    """Sends this process a signal before the training, in its second epoch, or in a test."""

    def __init__(self, place):
        self.place = place

    def before_run(self, runner):
        if self.place == 'start':
            send(signal.SIGTERM)

    def before_train_epoch(self, runner):
        if self.place == 'training' and runner.epoch == 1:
            send(signal.SIGTERM)

    def before_test_iter(self, runner, batch_idx, data_batch=None):
        send(signal.SIGTERM)


@pytest.mark.usefixtures('restored')
@pytest.mark.parametrize('args, place, said', [
    (['train'], 'training', 'after work/interrupted.pth was saved; to go on: tools/x/train.py --resume'),
    (['train'], 'start', 'before a checkpoint was saved; to start again: tools/x/train.py'),
    (['test', 'x.pth'], 'test', 'without results; to test again: tools/x/test.py'),
])
def test_the_tools_end_with_one_line(args, place, said, run, trained, monkeypatch, capfd):
    Path('x.pth').write_bytes((trained / 'epoch_1.pth').read_bytes())
    monkeypatch.setattr(logging, 'shutdown', lambda: None)  # this process goes on
    monkeypatch.setattr(sys, 'orig_argv', [f'tools/x/{args[0]}.py'])
    with Path('config.py').open('a') as file:
        file.write(f'\ncustom_hooks = [dict(type="InterruptTestHook", place={place!r})]\n')
    assert run(*args, code=143) == f'ended by SIGTERM {said}'


CONFIG = """
_base_ = __import__('convneur_mm').config('convneur_m1_shapes')
arch = dict(depths=[1, 1, 1, 1], channels=[8, 16, 24, 32], mem_channels=16)
model = dict(
    backbone=dict(_delete_=True, type='ConvNeur', arch=arch, out_indices=3, gap_before_final_norm=True),
    head=dict(in_channels=32))
train_dataloader = dict(batch_size=2, num_workers=2)
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


def end(arguments, signum, line, cwd, send=os.killpg):
    """Starts a command, sends it a signal when it has printed such a line; returns exit code, output after that.

    By default all processes of the command get the signal, as they do from a terminal.
    """
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHON': sys.executable}
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


def test_a_training_with_workers_names_its_checkpoint_and_how_to_go_on(folder, tmp_path):
    arguments = [sys.executable, ROOT / 'tools' / 'train.py', 'child.py', '--work-dir', tmp_path / 'work']
    code, output = end(arguments, signal.SIGINT, r'Epoch\(train\) +\[2\]', folder)
    assert code == 130, output
    said = shlex.join([*map(str, arguments), '--resume'])
    assert_one_line(output, rf'ended by Ctrl-C after .*epoch_\d+\.pth was saved; to go on: {re.escape(said)}')


@pytest.mark.parametrize('signum, name, send, saved', [(signal.SIGINT, 'Ctrl-C', os.killpg, r'epoch_\d+'),
                                                       (signal.SIGTERM, 'SIGTERM', os.kill, 'interrupted')],
                         ids=['from the terminal', 'to torchrun alone'])
def test_a_training_of_two_processes(folder, tmp_path, signum, name, send, saved):
    """torchrun hands a signal on, which reaches the processes twice from a terminal, and once from Slurm."""
    arguments = [ROOT / 'tools' / 'dist_train.sh', 'child.py', 2, '--work-dir', tmp_path / 'work']
    code, output = end(arguments, signum, r'Epoch\(train\) +\[2\]', folder, send)
    assert code == 128 + signum, output
    said = shlex.join([*map(str, arguments), '--resume'])
    assert_one_line(output, rf'ended by {name} after .*{saved}\.pth was saved; to go on: {re.escape(said)}')
