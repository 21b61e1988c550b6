"""Hooks that save checkpoints, and hooks that compare loaded ones with the model and its classes."""
from __future__ import annotations

import os.path as osp
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.dist import utils as dist_utils
from mmengine.fileio import BaseStorageBackend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.optim import Optimizer

from ..files.checkpoint import (
    as_parts,
    check_all_match,
    check_backbone_shapes,
    check_some_match,
    checkpoint_weights,
    compare_weights,
)
from ..files.errors import LaunchError, some
from ..files.weights_file import CheckpointError
from ..files.whole_files import remove_parts, write_files_whole, write_whole
from ..runner.model_wrappers import is_resumed, is_test, own_weights, started_from

# Checkpoint of a run that SIGTERM ended, in its work dir.
INTERRUPTED = 'interrupted.pth'


@HOOKS.register_module()
class CheckpointKeysHook(Hook):
    """Stop a run with another model's checkpoint; MMEngine would silently keep random values for missing weights.

    A test and a resumed training need every weight, and the latter also needs its training state. A training that
    starts from a checkpoint may have another head.
    """

    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare names and shapes in ``checkpoint`` with the model's before they are loaded.

        A classifier's weights that have its backbone's and head's own names get those of the model.

        Raises:
            CheckpointError: If they are not the model's, or the training state is missing where it is needed.
        """
        name = started_from(runner) or 'the checkpoint'
        if is_resumed(runner) and not (isinstance(checkpoint.get('message_hub'), dict)
                                   and {'epoch', 'iter'} <= checkpoint.get('meta', {}).keys()):
            raise CheckpointError(f'{name} cannot be resumed from, as it holds weights but no state of training; name '
                                  'it as load_from instead')
        own, weights = own_weights(runner), checkpoint_weights(checkpoint)
        renamed = as_parts(own, weights)
        if renamed:
            runner.logger.info(f'{name} holds the weights of backbone and head by their own names, and is loaded by '
                               'those of the model')
            checkpoint['state_dict'] = weights = renamed
        check_some_match(own, weights, name)
        differences = compare_weights(own, weights)
        if not (is_resumed(runner) or is_test(runner)):
            check_backbone_shapes(differences, name)
            return
        if not is_resumed(runner):
            differences = differences.for_prediction()
        trained, used = _trained_classes(checkpoint), _used_classes(runner)
        check_all_match(own, differences, name, (len(trained), len(used)) if trained and used else None)
        if is_resumed(runner) and isinstance(runner.optim_wrapper, OptimWrapper):
            _check_optimizer(runner.optim_wrapper.optimizer, checkpoint.get('optimizer'), name)


def _check_optimizer(optimizer: Optimizer, state: dict | None, name: str) -> None:
    """Raise a CheckpointError if a state was saved by another optimizer, or by one of other parameters."""
    groups = state.get('param_groups') if isinstance(state, dict) else None
    if not groups:
        raise CheckpointError(f'{name} cannot be resumed from, as it holds no state of the optimizer; name it as '
                              'load_from instead')
    advice = 'set optim_wrapper as it was, or name the checkpoint as load_from instead'
    # Adam and its like call momentum 'betas', and SGD calls it 'momentum'.
    for option in ('betas', 'momentum', 'alpha'):
        if (option in groups[0]) != (option in optimizer.defaults):
            settings = ', '.join(sorted(groups[0].keys() - {'params'}))
            raise CheckpointError(f'{name} cannot be resumed from, as another optimizer than {type(optimizer).__name__}'
                                  f' was at work: its settings were {settings}; {advice}')
    there, here = ([len(group['params']) for group in found] for found in (groups, optimizer.param_groups))
    if there != here:
        raise CheckpointError(f'{name} cannot be resumed from, as its optimizer had {sum(there)} parameters in '
                              f'{len(there)} groups, and has {sum(here)} in {len(here)} here; {advice}')


@HOOKS.register_module()
class SaveThenDeleteHook(CheckpointHook):
    """MMEngine's ``CheckpointHook``, but a run that ends at any moment leaves a checkpoint to resume from.

    MMEngine deletes an outdated checkpoint before the new one has been saved: a run with ``max_keep_ckpts=1`` that ends
    in between loses everything. Here it is deleted afterwards. MMEngine also writes checkpoints and ``last_checkpoint``
    in place. Here they are renamed when they are complete, and so are all other files that this process writes through
    MMEngine from then on.
    """

    def before_train(self, runner: Runner) -> None:
        """Write files whole from now on; see :meth:`CheckpointHook.before_train`."""
        write_files_whole()
        super().before_train(runner)

    def _save_checkpoint(self, runner: Runner) -> None:
        with self._deleting_later(runner):
            super()._save_checkpoint(runner)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        with self._deleting_later(runner):
            super()._save_best_checkpoint(runner, metrics)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        super()._save_checkpoint_with_step(runner, step, meta)
        # MMEngine wrote last_checkpoint in place, so write it again.
        record_checkpoint(runner, self.last_ckpt)
        if dist_utils.is_main_process():
            Path(runner.work_dir, INTERRUPTED).unlink(missing_ok=True)

    @contextmanager
    def _deleting_later(self, runner: Runner) -> Iterator[None]:
        if dist_utils.is_main_process():
            remove_parts(self.out_dir, runner.work_dir)
        backend = self.file_backend
        self.file_backend = later = _LateRemovals(backend)
        try:
            yield
        finally:
            self.file_backend = backend
        # A checkpoint that was saved again, such as the best one of a repeated epoch, is not outdated.
        current = {self.last_ckpt, getattr(self, 'best_ckpt_path', None),
                   *getattr(self, 'best_ckpt_path_dict', {}).values()}
        for remove, path in later.removals:
            if path not in current:
                remove(path)


def record_checkpoint(runner: Runner, path: str) -> None:
    """Write the newest checkpoint's path to ``last_checkpoint``, where MMEngine and our code look for it."""
    if dist_utils.is_main_process():
        write_whole(osp.join(runner.work_dir, 'last_checkpoint'), path.encode())


class _LateRemovals:
    """A file backend that only records what is to be removed."""

    def __init__(self, backend: BaseStorageBackend) -> None:
        self._backend = backend
        self.removals: list[tuple[Callable[[str], None], str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self.removals.append((self._backend.remove, path))

    def rmtree(self, path: str) -> None:
        self.removals.append((self._backend.rmtree, path))


@HOOKS.register_module()
class ClassNamesHook(Hook):
    """Stop a run in which a label means one class to the checkpoint and another to the data set.

    Labels are mere numbers, so nothing else would notice: the scores, or the names in pictures, would be wrong.
    """

    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare the classes of a checkpoint with those of the data on which it is tested or resumed.

        Raises:
            LaunchError: If there are more or fewer classes, or the same ones in another order.
        """
        if not (is_resumed(runner) or is_test(runner)):
            return
        trained, used = _trained_classes(checkpoint), _used_classes(runner)
        if trained is None or used is None or list(trained) == list(used):
            return
        split = 'test' if is_test(runner) else 'train'
        if len(trained) != len(used) or set(trained) == set(used):
            advice = 'Test on the classes it was trained for; for figures of each class add --cfg-options ' \
                     'test_evaluator.classwise=True to a detector\'s test, while a segmentor\'s log lists them anyway'
            if split == 'train':
                advice = 'Resume with the classes it was trained for, or name it as load_from instead'
            raise LaunchError(
                f'the checkpoint tells ({some(trained)}) apart, but {split}_dataloader.dataset has the classes '
                f'({some(used)}): its predictions would count for the wrong ones. {advice}')
        runner.logger.warning(f'the checkpoint calls its classes ({some(trained)}), the {split} data set '
                              f'({some(used)})')


def _trained_classes(checkpoint: dict) -> Sequence[str] | None:
    return ((checkpoint.get('meta') or {}).get('dataset_meta') or {}).get('classes')


def _used_classes(runner: Runner) -> Sequence[str] | None:
    loop = runner.test_loop if is_test(runner) else runner.train_loop
    return (getattr(loop.dataloader.dataset, 'metainfo', None) or {}).get('classes')
