"""Save and end a training that gets SIGTERM, as jobs do that have to make room or run out of time."""
from __future__ import annotations

import os.path as osp
import signal
from collections.abc import Sequence

import torch
import torch.distributed
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..files.whole_files import write_files_whole
from ..runner.interrupts import Interrupted, signals
from ..runner.loops import ResumableEpochBasedTrainLoop, ResumableIterBasedTrainLoop
from ..runner.model_wrappers import is_resumed
from .checkpoints import INTERRUPTED, record_checkpoint


@HOOKS.register_module()
class SaveAtSigtermHook(Hook):
    """Defer SIGTERM to the end of an iteration, and save ``interrupted.pth`` there for ``--resume``.

    All processes stop after the same iteration, whichever of them got the signal. During a validation, it ends the run
    after a batch, and the training before it is saved. The hook needs :func:`..launch.run` around the training, and one
    of our loops: others cannot resume within an epoch.
    """

    priority = 'LOWEST'  # runs after a step's schedulers and a checkpoint that is due

    def __init__(self) -> None:
        self._active = False
        self._group: torch.distributed.ProcessGroup | None = None
        # Number of completed iterations, and whether one is under way.
        self._done = 0
        self._inside = True
        self._in_epoch = self._averaged = False
        # (Epoch, iteration) of the newest checkpoint.
        self._saved: tuple[int, int] | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Resume a training that ended within an epoch at that place."""
        if not (is_resumed(runner) and isinstance(runner.train_loop, ResumableEpochBasedTrainLoop)):
            return
        done, length = checkpoint['meta'].get('epoch_progress', (0, len(runner.train_dataloader)))
        if length == len(runner.train_dataloader):
            runner.train_loop.skip_in_epoch(done)
        else:
            runner.logger.warning(f'the epoch is begun again: the checkpoint was saved after {done} of {length} '
                                  f'batches, and it has {len(runner.train_dataloader)} now')

    def before_train(self, runner: Runner) -> None:
        """Start to defer the signal."""
        # A FlexibleRunner can be saved only at the end of an epoch or iteration.
        self._active = isinstance(runner, Runner) and isinstance(
            runner.train_loop, (ResumableEpochBasedTrainLoop, ResumableIterBasedTrainLoop))
        self._done, self._inside = runner.iter, False
        write_files_whole()
        if runner.world_size > 1 and self._active:
            # In the model's group, all processes must run operations in the same order, so use another one.
            self._group = torch.distributed.new_group(backend='gloo')
        signals.sigterm_deferred = self._active

    def before_train_epoch(self, runner: Runner) -> None:
        """Record that an epoch is under way."""
        self._in_epoch = True

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Start asking the other processes for SIGTERM, which takes no time beside a step."""
        self._inside = True
        if self._group:
            self._came = torch.tensor([signals.sigterm_received], dtype=torch.uint8)
            self._asked = torch.distributed.all_reduce(self._came, torch.distributed.ReduceOp.MAX, self._group,
                                                       async_op=True)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        """Save and end the run if SIGTERM was received.

        Raises:
            Interrupted: In all processes, after the first one has saved.
        """
        self._done, self._inside = runner.iter + 1, False
        came = signals.sigterm_received
        if self._group:
            self._asked.wait()
            came = bool(self._came)
        # Checkpoints lack accumulated gradients, so wait for the update.
        if came and not (isinstance(runner.optim_wrapper, OptimWrapper) and not runner.optim_wrapper.should_update()):
            self.save_interrupted(runner)
            if self._group:
                torch.distributed.barrier(self._group)
            raise Interrupted(signal.SIGTERM)

    def after_train_epoch(self, runner: Runner) -> None:
        """Record that the epoch is over, with all that is done at its end."""
        self._in_epoch = False

    def before_val(self, runner: Runner) -> None:
        """End the run if SIGTERM came at the end of an epoch."""
        self._end_if_sigterm_came()

    def before_val_epoch(self, runner: Runner) -> None:
        """Record that the model may have averaged weights now."""
        self._averaged = True

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                       outputs: Sequence | None = None) -> None:
        """End the run if SIGTERM came."""
        self._end_if_sigterm_came()

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Record that the model has its own weights again."""
        self._averaged = False

    def after_val(self, runner: Runner) -> None:
        """End the run if SIGTERM came while the metrics were computed."""
        self._end_if_sigterm_came()

    @staticmethod
    def _end_if_sigterm_came() -> None:
        # report_on_interrupt() around the training calls save_interrupted().
        if signals.sigterm_received:
            raise Interrupted(signal.SIGTERM)

    def after_train(self, runner: Runner) -> None:
        """Stop deferring the signal."""
        signals.sigterm_deferred = False

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Record from where a training can resume."""
        if 'optimizer' in checkpoint:
            self._saved = checkpoint['meta']['epoch'], checkpoint['meta']['iter']

    def save_interrupted(self, runner: Runner) -> None:
        """Save the training in the first process, unless it is within an iteration or saved already."""
        if self._inside or not self._active or self._saved == (runner.epoch, self._done):
            return
        if self._averaged:
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):
                    hook.after_val_epoch(runner)
        meta = dict(epoch=runner.epoch, iter=self._done)
        if self._in_epoch and isinstance(runner.train_loop, ResumableEpochBasedTrainLoop):
            meta['epoch_progress'] = self._done - runner.train_loop.epoch_begin, len(runner.train_dataloader)
        runner.save_checkpoint(runner.work_dir, INTERRUPTED, meta=meta)
        record_checkpoint(runner, osp.join(runner.work_dir, INTERRUPTED))
