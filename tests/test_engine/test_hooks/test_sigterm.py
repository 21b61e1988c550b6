"""SIGTERM during a training: it is saved at the end of the iteration, and goes on as if it had never ended."""
import multiprocessing
import os
import signal
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, METRICS
from mmengine.runner import Runner
from noisy_training import assert_goes_on, train_noisily

from convneur_mm.engine.files import whole_files
from convneur_mm.engine.runner.interrupts import Interrupted, raised_signals, report_on_interrupt, signals


@HOOKS.register_module()
class SigtermTestHook(Hook):
    """Sends this process SIGTERM when a method is called at an iteration."""

    def __init__(self, place, iteration):
        self.iteration = iteration
        self.sent = False
        setattr(self, place, self.send)

    def send(self, runner, *args, **kwargs):
        if runner.iter >= self.iteration and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)


@HOOKS.register_module()
class FailTestHook(Hook):
    """Ends a training by an error."""

    def after_train_epoch(self, runner):
        raise KeyError('the reason')


@METRICS.register_module()
class NoScore(BaseMetric):
    seen = staticmethod(lambda batch: None)

    def process(self, data_batch, data_samples):
        self.seen(data_batch)
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(score=0)


EPOCHS, ITERATIONS = dict(max_epochs=3), dict(max_iters=8)
VALIDATION = dict(
    val_dataloader=dict(dataset=dict(type='NoisyData'), batch_size=2,
                        sampler=dict(type='DefaultSampler', shuffle=False)),
    val_cfg={}, val_evaluator=dict(type='NoScore'))


@contextmanager
def signals_of_before():
    """A process that a signal ends ignores further ones, and so would data workers that it starts here later."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """Trains until a SIGTERM at a place, and says how it ended."""
    monkeypatch.chdir(tmp_path)

    def interrupted(loop, place, iteration, name='ended', hooks=(), **kwargs):
        runners = []

        def train(runner):
            runners.append(runner)
            with report_on_interrupt(runner):
                original(runner)

        hooks = [dict(type='SaveAtSigtermHook'), dict(type='SigtermTestHook', place=place, iteration=iteration), *hooks]
        with monkeypatch.context() as patch, signals_of_before(), pytest.raises(Interrupted) as raised, \
                raised_signals():
            original = Runner.train
            patch.setattr(Runner, 'train', train)
            workers = set(multiprocessing.active_children())
            try:
                train_noisily(tmp_path, name, loop, hooks=hooks, **kwargs)
            finally:
                for worker in set(multiprocessing.active_children()) - workers:  # as Python's end would
                    worker.kill()
                    worker.join()
        assert raised.value.signum == signal.SIGTERM
        assert str(raised.value).startswith('ended by SIGTERM (newest checkpoint: ')
        return Path(name, 'last_checkpoint').read_text(), str(raised.value)

    return interrupted


@pytest.fixture
def train(tmp_path):
    return partial(train_noisily, tmp_path, hooks=[dict(type='SaveAtSigtermHook')])


@pytest.mark.parametrize('place, iteration, done', [
    ('before_train_iter', 0, 1), ('after_train_iter', 4, 5), ('before_train_iter', 5, 6),
    # Of the last iteration of an epoch, at whose end there is more to do.
    ('before_train_iter', 3, 4), ('after_train_epoch', 4, 5)])
def test_by_epoch(train, interrupted, place, iteration, done):
    schedule = dict(param_scheduler=[dict(type='ExponentialLR', gamma=0.5)])
    whole = train('whole', EPOCHS, settings=schedule)
    assert not signals.sigterm_deferred  # what follows a training ends at once
    saved, said = interrupted(EPOCHS, place, iteration, settings=schedule)
    assert saved.endswith('ended/interrupted.pth') and 'checkpoint: ended/interrupted.pth)' in said
    assert torch.load(saved, weights_only=False)['meta']['iter'] == done
    resumed = train('ended', EPOCHS, resume='ended/interrupted.pth', settings=schedule)
    assert_goes_on(whole, resumed, done)
    # Once there is a newer one.
    assert not os.path.exists(saved)
    assert Path('ended/last_checkpoint').read_text().endswith('epoch_3.pth')


@pytest.mark.parametrize('place, iteration, done, name', [
    ('before_train_iter', 0, 1, 'interrupted'), ('after_train_iter', 4, 5, 'interrupted'),
    # A checkpoint is due there.
    ('before_train_iter', 5, 6, 'iter_6')])
def test_by_iteration(train, interrupted, place, iteration, done, name):
    loader = dict(num_workers=1, sampler=dict(type='InfiniteSampler', shuffle=True))
    saved, _ = interrupted(ITERATIONS, place, iteration, **loader)
    assert saved.endswith(f'ended/{name}.pth')
    assert_goes_on(train('whole', ITERATIONS, **loader),
                   train('ended', ITERATIONS, resume=f'ended/{name}.pth', **loader), done)


@pytest.mark.parametrize('persistent', [True, False])
@pytest.mark.parametrize('loop', [EPOCHS, ITERATIONS])
def test_data_workers_end_with_the_training(train, loop, persistent):
    """Those of the validation too."""
    before = set(multiprocessing.active_children())
    loader = dict(num_workers=1, persistent_workers=persistent)
    validation = {**VALIDATION, 'val_dataloader': {**VALIDATION['val_dataloader'], **loader}}
    train('whole', loop, settings=validation, **loader)
    assert set(multiprocessing.active_children()) == before


def test_data_workers_of_a_training_that_failed_end_without_an_error(train):
    """Python ends them by SIGTERM as it ends, and waits for them."""
    before = set(multiprocessing.active_children())
    with raised_signals(), pytest.raises(KeyError) as failure:
        train('failed', EPOCHS, num_workers=1, persistent_workers=True,
              hooks=[dict(type='SaveAtSigtermHook'), dict(type='FailTestHook')])
    worker, = set(multiprocessing.active_children()) - before
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0
    del failure


@pytest.mark.parametrize('place', ['before_val', 'before_val_iter', 'after_val_epoch', 'after_train_epoch'])
def test_in_a_validation(train, interrupted, place, monkeypatch):
    """What the training did before is saved, where no checkpoint is due. Meanwhile the model has averaged weights."""
    settings = dict(default_hooks=dict(checkpoint=dict(type='SaveThenDeleteHook', interval=3)), **VALIDATION)
    average = dict(type='EMAHook', momentum=0.3)
    batches = []
    monkeypatch.setattr(NoScore, 'seen', batches.append)
    saved, _ = interrupted(EPOCHS, place, 4, settings=settings, hooks=[average])
    assert saved.endswith('interrupted.pth')
    assert len(batches) == {'before_val_iter': 1, 'after_val_epoch': 4}.get(place, 0)
    meta = torch.load(saved, weights_only=False)['meta']
    assert (meta['epoch'], meta['iter'], 'epoch_progress' in meta) == (1, 4, False)
    hooks = [dict(type='SaveAtSigtermHook'), average]
    whole = train('whole', EPOCHS, settings=settings, hooks=hooks)
    assert_goes_on(whole, train('ended', EPOCHS, resume='ended/interrupted.pth', settings=settings, hooks=hooks), 4)
    averages = [torch.load(f'{name}/epoch_3.pth', weights_only=False)['state_dict'] for name in ('whole', 'ended')]
    assert all(map(torch.equal, averages[0].values(), averages[1].values()))


def test_gradients_that_add_up_are_awaited(train, interrupted):
    settings = dict(optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01), accumulative_counts=3))
    saved, _ = interrupted(ITERATIONS, 'before_train_iter', 3, settings=settings)
    assert torch.load(saved, weights_only=False)['meta']['iter'] == 6
    assert_goes_on(train('whole', ITERATIONS, settings=settings),
                   train('ended', ITERATIONS, resume='ended/iter_6.pth', settings=settings), 6)


@HOOKS.register_module()
class LostWorkerHook(Hook):
    """Fails between two iterations, or within one, as a training does whose workers or other processes have ended."""

    priority = 'VERY_LOW'

    def __init__(self, place, iteration):
        self.iteration = iteration
        setattr(self, place, self.fail)

    def fail(self, runner, *args, **kwargs):
        if runner.iter == self.iteration:
            raise RuntimeError('lost')


@pytest.mark.parametrize('sent, lost, iteration, interval, saved, done', [
    ('before_train_epoch', 'before_train_epoch', 4, 1, 'epoch_1', 4),
    ('before_train_epoch', 'before_train_epoch', 4, 3, 'interrupted', 4),
    ('before_train_epoch', 'before_train_epoch', 0, 1, 'interrupted', 0),
    # In the midst of an iteration nothing can be saved.
    ('before_train_iter', 'after_train_iter', 5, 1, 'epoch_1', 4)])
def test_lost_processes_are_those_that_the_signal_ended(interrupted, sent, lost, iteration, interval, saved, done):
    settings = dict(default_hooks=dict(checkpoint=dict(type='SaveThenDeleteHook', interval=interval)))
    path, _ = interrupted(EPOCHS, sent, iteration, settings=settings,
                          hooks=[dict(type='LostWorkerHook', place=lost, iteration=iteration)])
    assert path.endswith(f'/{saved}.pth') and torch.load(path, weights_only=False)['meta']['iter'] == done


class Group:
    """Stands for two processes, the other of which gets SIGTERM before an iteration; they agree by reductions."""

    def __init__(self, iteration):
        self.iteration = iteration
        self.reductions = self.barriers = 0

    def all_reduce(self, tensor, op, group, async_op=False):
        assert op == torch.distributed.ReduceOp.MAX and group is self
        self.reductions += 1
        came = self.reductions > self.iteration
        # The answer is there when it is waited for.
        return SimpleNamespace(wait=lambda: tensor.fill_(came)) if async_op else None

    def barrier(self, group):
        assert group is self
        self.barriers += 1


def test_all_processes_save_what_one_got_the_signal_for(tmp_path, monkeypatch):
    group, asked = Group(5), []
    monkeypatch.setattr(Runner, 'world_size', 2)
    monkeypatch.setattr(torch.distributed, 'new_group', lambda **kwargs: asked.append(kwargs) or group)
    monkeypatch.setattr(torch.distributed, 'all_reduce', group.all_reduce)
    monkeypatch.setattr(torch.distributed, 'barrier', group.barrier)
    with signals_of_before(), raised_signals(), pytest.raises(Interrupted):
        train_noisily(tmp_path, 'ended', EPOCHS, hooks=[dict(type='SaveAtSigtermHook')])
    # Of its own, as the model's may have other operations under way, and on the CPU, where the answer is.
    assert asked == [dict(backend='gloo')] and group.barriers == 1
    assert torch.load(tmp_path / 'ended' / 'interrupted.pth', weights_only=False)['meta']['iter'] == 6


def test_is_written_whole_whatever_hook_saves_the_others(interrupted, monkeypatch):
    written = []
    register_backend('local', LocalBackend, prefixes='', force=True)
    monkeypatch.setattr(whole_files, 'write_whole', lambda path, data, original=whole_files.write_whole: (
        written.append(Path(path).name), original(path, data)))
    interrupted(EPOCHS, 'before_train_iter', 1, settings=dict(
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1))))
    assert 'interrupted.pth' in written


def test_other_errors_stay(tmp_path):
    with pytest.raises(RuntimeError, match='lost'), raised_signals(), report_on_interrupt(None):
        raise RuntimeError('lost')


def test_another_length_of_the_epoch_begins_it_again(train, interrupted):
    interrupted(EPOCHS, 'before_train_iter', 5)
    model = train('ended', EPOCHS, resume='ended/interrupted.pth', batch_size=1, settings=dict(log_level='WARNING'))
    assert len(model.seen) == 14
    assert any('the epoch is begun again: the checkpoint was saved after 2 of 4 batches, and it has 7 now' in
               path.read_text() for path in Path('ended').rglob('*.log'))


def test_other_loops_end_at_once(train, interrupted):
    """They could not go on within an epoch."""
    saved, _ = interrupted(EPOCHS, 'before_train_iter', 5, settings=dict(
        train_cfg=dict(type='EpochBasedTrainLoop', **EPOCHS)))
    assert saved.endswith('epoch_1.pth')
