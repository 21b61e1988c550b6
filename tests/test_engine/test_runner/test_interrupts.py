"""Ctrl-C and SIGTERM: in this process, and sent to real runs of the tools with data workers, in one process and in two.
"""
import argparse
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn
from torch.utils.data import DataLoader, Dataset

from convneur_mm.datasets import make_shapes_imagenet
from convneur_mm.engine.runner import interrupts
from convneur_mm.engine.runner.interrupts import Interrupted, leave, raised_signals, report_on_interrupt, signals
from convneur_mm.engine.runner.quiet_console import QuietRunner

ROOT = Path(__file__).parents[3]
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGCHLD


@pytest.fixture
def restored():
    """Restore the signal handlers afterwards."""
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def send(signum):
    """To this process, which gets it before the next line."""
    os.kill(os.getpid(), signum)
    time.sleep(0)


def exit_code_of_fork(function):
    """The exit code of a forked process that calls ``function``; negative if a signal ended it."""
    process = os.fork()
    if not process:
        try:
            function()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.usefixtures('restored')
class TestRaisedSignals:
    @pytest.mark.parametrize('signum, name', [(signal.SIGINT, 'Ctrl-C'), (signal.SIGTERM, 'SIGTERM')])
    def test_raise_once(self, signum, name):
        signal.signal(signal.SIGCHLD, signal.default_int_handler)
        with pytest.raises(Interrupted) as raised, raised_signals():
            send(signum)
            pytest.fail('not raised')
        assert str(raised.value) == f'ended by {name}'
        # Launchers may repeat it at once.
        for other in signal.SIGINT, signal.SIGTERM:
            send(other)
        # PyTorch's handler raises an error when a data worker ends.
        send(signal.SIGCHLD)

    @pytest.mark.parametrize('signum, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_second_one_ends_a_process_that_hangs(self, signum, code, monkeypatch):
        monkeypatch.setattr(interrupts, 'REPEATED_WITHIN', 0)

        def hang():
            with raised_signals():
                try:
                    send(signal.SIGINT)
                finally:
                    send(signum)
                    time.sleep(30)

        begun = time.monotonic()
        assert exit_code_of_fork(hang) == code
        assert time.monotonic() - begun < 20

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

    @pytest.mark.parametrize('error', [None, ZeroDivisionError])
    def test_leave_everything_as_it_was(self, error):
        before = [signal.getsignal(signum) for signum in SIGNALS]
        try:
            with raised_signals():
                assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is not before[0]
                if error:
                    raise error
        except ZeroDivisionError:
            pass
        assert [signal.getsignal(signum) for signum in SIGNALS] == before

    @pytest.mark.parametrize('deferred', [False, True])
    def test_forked_processes_end_at_sigterm(self, deferred, capfd):
        """Those that are no data workers of a training do not stay, and Ctrl-C is left to the main process."""
        def work():
            send(signal.SIGINT)
            os.write(2, b'still at work')
            send(signal.SIGTERM)

        with raised_signals():
            signals.sigterm_deferred = deferred
            assert exit_code_of_fork(work) == -signal.SIGTERM
        assert capfd.readouterr().err == 'still at work'


class SignalledData(Dataset):
    """A sample that loads while the data worker gets the signals that a terminal, Slurm and torchrun send to all."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        sender = 'import os, sys\nfor signum in 2, 15, 15: os.kill(int(sys.argv[1]), signum)'
        subprocess.run([sys.executable, '-c', sender, str(os.getpid())], check=True)
        time.sleep(0.05)
        return index


class TestDataWorkers:
    @pytest.fixture
    def batches(self):
        loader = QuietRunner.build_dataloader(dict(
            dataset=SignalledData(), num_workers=1, persistent_workers=True, batch_size=1,
            sampler=dict(type='DefaultSampler', shuffle=False), collate_fn=dict(type='default_collate')))
        assert isinstance(loader, DataLoader)
        return iter(loader)

    def test_stay_when_others_signal_them(self, batches):
        """The main process needs their batches until it has saved."""
        assert [batch.tolist() for batch in batches] == [[0]]

    def test_end_at_once_when_the_main_process_ends_them(self, batches):
        next(batches)
        worker, = batches._workers
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 0

    def test_do_not_report_a_lost_main_process(self, capfd, monkeypatch):
        """Multiprocessing hands on a batch in a thread, which reports a connection that is gone."""
        # A process group of another test has set its own, which writes the rank before each line.
        monkeypatch.setattr(sys, 'excepthook', sys.__excepthook__)

        def report():
            interrupts.begin_worker(None, 0)
            for error in ConnectionResetError('gone'), ValueError('wrong'):
                sys.excepthook(type(error), error, None)

        exit_code_of_fork(report)
        assert capfd.readouterr().err == 'ValueError: wrong\n'


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('message', ['one line\n', ''])
@pytest.mark.parametrize('joined', [False, True], ids=['alone', 'one of several processes'])
def test_leave(signum, message, joined, capfd, monkeypatch):
    """A shell's exit code, and no data worker stays."""
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: joined)

    def leave_worker():
        worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
        worker.start()
        try:
            leave(Interrupted(signum), message.strip())
        except SystemExit as left:
            worker.join(20)
            os._exit(left.code if worker.exitcode else 1)

    assert exit_code_of_fork(leave_worker) == 128 + signum
    assert capfd.readouterr().err == message


@pytest.mark.usefixtures('restored')
class TestReport:
    """What is said of a training that Ctrl-C ends, by what is in its work dir."""

    @pytest.fixture
    def interrupt(self, toy_runner, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

        def interrupt(*saved, **kwargs):
            runner = toy_runner(nn.Sequential(nn.Conv2d(3, 4, 3)))
            closed = []
            monkeypatch.setattr(runner.visualizer, 'close', lambda: closed.append(True))
            with pytest.raises(Interrupted) as raised, report_on_interrupt(runner, **kwargs):
                for name, value in saved:
                    self.save(tmp_path / name, value)
                raise Interrupted(signal.SIGINT)
            assert closed == [True]
            return str(raised.value)

        return interrupt

    def save(self, path, value):
        if value is None:
            path.mkdir()
        elif isinstance(value, bytes):
            path.write_bytes(value)
        else:
            torch.save(value, path)

    @pytest.mark.parametrize('saved, newest', [
        ([('iter_2.pth', {}), ('iter_3.pth', {})], 'iter_3.pth'),
        ([('iter_2.pth', {}), ('iter_3.pth', b'cut off')], 'iter_2.pth'),
        # Intact for a user who allows pickle.
        ([('iter_1.pth', {}), ('iter_2.pth', dict(args=argparse.Namespace()))], 'iter_2.pth'),
        # Saved in parts, as a folder.
        ([('iter_1.pth', {}), ('iter_2.pth', None)], 'iter_2.pth'),
        ([('iter_1.pth', {}), ('last_checkpoint', b'iter_2.pth')], 'iter_1.pth'),
    ])
    def test_names_the_newest_intact_checkpoint(self, interrupt, saved, newest):
        assert interrupt(*saved) == f'ended by Ctrl-C (newest checkpoint: {newest}); to go on, add --resume'

    @pytest.mark.parametrize('saved', [[], [('iter_2.pth', b'cut off')]])
    def test_without_a_checkpoint(self, interrupt, saved):
        assert interrupt(*saved) == 'ended by Ctrl-C before a checkpoint was saved'

    def test_of_a_test(self, interrupt):
        assert interrupt(('iter_1.pth', {}), trains=False) == 'ended by Ctrl-C without results'

    def test_another_sigterm_does_not_end_the_save(self, toy_runner, monkeypatch):
        class SavingHook(Hook):
            def save_interrupted(self, runner):
                send(signal.SIGTERM)
                os._exit(7)

        def train():
            with raised_signals(), report_on_interrupt(runner):
                send(signal.SIGTERM)

        monkeypatch.setattr(interrupts, 'REPEATED_WITHIN', 0)
        runner = toy_runner(nn.Sequential(nn.Conv2d(3, 4, 3)))
        runner.register_hook(SavingHook())
        assert exit_code_of_fork(train) == 7

    def test_all_else_passes(self, toy_runner):
        runner = toy_runner(nn.Sequential(nn.Conv2d(3, 4, 3)))
        with report_on_interrupt(runner):
            runner.train()
        with pytest.raises(ZeroDivisionError), report_on_interrupt(runner):
            raise ZeroDivisionError


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
    (['train'], 'training', '(newest checkpoint: work/interrupted.pth); to go on, add --resume'),
    (['train'], 'start', 'before a checkpoint was saved'),
    (['test', 'x.pth'], 'test', 'without results'),
])
def test_the_tools_end_with_one_line(args, place, said, run, trained, monkeypatch, capfd):
    Path('x.pth').write_bytes((trained / 'epoch_1.pth').read_bytes())
    monkeypatch.setattr(logging, 'shutdown', lambda: None)  # this process goes on
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


@pytest.mark.parametrize('signum, name, saved', [
    (signal.SIGINT, 'Ctrl-C', r'epoch_\d+'),
    pytest.param(signal.SIGTERM, 'SIGTERM', 'interrupted', marks=pytest.mark.slow)])
def test_a_training_whose_workers_get_the_signal_too(folder, tmp_path, signum, name, saved):
    arguments = [sys.executable, ROOT / 'tools' / 'train.py', 'child.py', '--work-dir', tmp_path / 'work']
    code, output = end(arguments, signum, r'Epoch\(train\) +\[2\]', folder)
    assert code == 128 + signum, output
    assert_one_line(output, rf'ended by {name} \(newest checkpoint: .*{saved}\.pth\); to go on, add --resume')


@pytest.mark.parametrize('signum, name, send, saved', [
    pytest.param(signal.SIGINT, 'Ctrl-C', os.killpg, r'epoch_\d+', id='from the terminal', marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, 'SIGTERM', os.kill, 'interrupted', id='to torchrun alone')])
def test_a_training_of_two_processes(folder, tmp_path, signum, name, send, saved):
    """torchrun hands a signal on to its processes and their data workers."""
    arguments = [ROOT / 'tools' / 'dist_train.sh', 'child.py', 2, '--work-dir', tmp_path / 'work']
    code, output = end(arguments, signum, r'Epoch\(train\) +\[2\]', folder, send)
    assert code == 128 + signum, output
    assert_one_line(output, rf'ended by {name} \(newest checkpoint: .*{saved}\.pth\); to go on, add --resume')
