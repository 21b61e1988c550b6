"""Training loops that go on, after a run has been resumed, as if it had never ended.

MMEngine saves no states of random number generators, and none could be saved of data workers that are some batches
ahead. Here nothing depends on what was drawn before: all generators are seeded anew for each sample and for each step,
by the seed of the run, the rank, the number of the iteration, and the sample's place in the batch. So a training also
ends with the same weights whatever the number of its data workers.
"""
from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from mmengine.registry import DATA_SAMPLERS, LOOPS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Sampler

# MMEngine's loops, and those that the tools use instead.
RESUMABLE_LOOPS = dict(EpochBasedTrainLoop='ResumableEpochBasedTrainLoop',
                       IterBasedTrainLoop='ResumableIterBasedTrainLoop')


def seeds_of(*key: int) -> list[int]:
    """Seeds for Python, NumPy and PyTorch that differ from those of any other key of up to four numbers."""
    return np.random.SeedSequence(key).generate_state(3).tolist()


def seed_sample(*key: int) -> None:
    """Seeds what transforms of a data set draw from; not the generators of GPUs, which takes longer."""
    for_python, for_numpy, for_torch = seeds_of(*key)
    random.seed(for_python)
    np.random.seed(for_numpy)  # noqa: NPY002 what mmcv and mmdet draw from
    torch.default_generator.manual_seed(for_torch)


def seed_step(*key: int) -> None:
    """Seeds what a model and the hooks draw from, on all devices."""
    seed_sample(*key)
    torch.manual_seed(torch.initial_seed())


class SeededIndices:
    """Indices of a batch; before each of them is taken, the generators are seeded for its sample.

    Args:
        indices (Sequence[int]): Of samples in the data set.
        key (tuple[int, int, int]): (Seed, rank, iteration).
    """

    def __init__(self, indices: Sequence[int], key: tuple[int, int, int]) -> None:
        self.indices = indices
        self.key = key

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        for place, index in enumerate(self.indices, start=1):  # 0 is the step itself
            seed_sample(*self.key, place)
            yield index


class SeededBatchSampler(Sampler):
    """Batches of another batch sampler as :class:`SeededIndices`, from any iteration on.

    Args:
        sampler (Sampler): Of the samples.
        batch_size (int): Of each process.
        batch_sampler (dict | None): Config of the other batch sampler. Defaults to one that takes samples in order.
        drop_last (bool): Whether that one leaves out a last, smaller batch. Defaults to False.
    """

    def __init__(self, sampler: Sampler, batch_size: int, batch_sampler: dict | None = None, drop_last: bool = False
                 ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.batches = BatchSampler(sampler, batch_size, drop_last) if batch_sampler is None else DATA_SAMPLERS.build(
            batch_sampler, default_args=dict(sampler=sampler, batch_size=batch_size))
        self.drop_last = self.batches.drop_last
        self.begin(0, 0, 0)

    def begin(self, seed: int, rank: int, iteration: int, skipped: int = 0, endless: bool = False) -> None:
        """Sets what the next pass yields.

        Args:
            seed (int): Of the run.
            rank (int): Of this process.
            iteration (int): Number of the first batch in the whole training.
            skipped (int): Batches before that one, of which no sample is loaded. Defaults to 0.
            endless (bool): Whether one pass follows the other, each with the next epoch's order. Defaults to False.
        """
        self._begin = (seed, rank), iteration, skipped, endless

    def __iter__(self) -> Iterator[SeededIndices]:
        key, iteration, skipped, endless = self._begin
        batches = islice(self._endless() if endless else self.batches, skipped, None)
        for number, indices in enumerate(batches, start=iteration):
            yield SeededIndices(indices, (*key, number))

    def __len__(self) -> int:
        return len(self.batches)

    def _endless(self) -> Iterator[Sequence[int]]:
        if not len(self.batches):
            raise ValueError(f'train_dataloader has no batch: {len(self.sampler)} samples, batch_size='
                             f'{self.batch_size}, drop_last={self.drop_last}')
        for epoch in count():
            if hasattr(self.sampler, 'set_epoch'):
                self.sampler.set_epoch(epoch)
            yield from self.batches


def seeded_loader(runner: Runner, dataloader: dict) -> DataLoader:
    """Builds a data loader as MMEngine does, with a :class:`SeededBatchSampler` around its batches.

    Raises:
        ValueError: If it is no config.
    """
    if not isinstance(dataloader, dict):
        raise ValueError(f'train_dataloader must be a config for this loop, got a {type(dataloader).__name__}')
    config = dict(dataloader)
    inner = config.pop('batch_sampler', None)
    if inner is None:
        config['batch_sampler'] = dict(type=SeededBatchSampler, drop_last=config.pop('drop_last', False))
    else:
        config['batch_sampler'] = dict(type=SeededBatchSampler, batch_sampler=inner)
    return runner.build_dataloader(config, runner.seed, runner._randomness_cfg.get('diff_rank_seed', False))


class _Resumable:
    """What the two loops share."""

    # The seed that the data loader was built with.
    _seed: int

    def run(self) -> nn.Module:
        """Runs the training."""
        # That of a run which is resumed, and has no seed in its config, is known only now.
        sampler = self.dataloader.batch_sampler.sampler
        if getattr(sampler, 'seed', None) == self._seed:
            sampler.seed = self.runner.seed
        model = super().run()
        # Persistent data workers stay as long as there is an iterator, and a runner is in reference cycles: when these
        # are collected PyTorch would wait up to five seconds for each.
        for loop in (self, self.runner.val_loop):
            if isinstance(getattr(loop, 'dataloader', None), DataLoader):
                loop.dataloader._iterator = None
        return model

    def run_iter(self, *args: Any) -> None:
        """Runs one iteration."""
        seed_step(self.runner.seed, self.runner.rank, self._iter)
        super().run_iter(*args)


@LOOPS.register_module()
class ResumableEpochBasedTrainLoop(_Resumable, EpochBasedTrainLoop):
    """MMEngine's ``EpochBasedTrainLoop``, in which a resumed training ends with the weights of one that never ended.

    Args:
        runner (Runner): Of the training.
        dataloader (dict): Config of the data loader.
        **kwargs: See :class:`EpochBasedTrainLoop`.

    Attributes:
        epoch_begin (int): Number of the first iteration of the epoch that is under way.
    """

    def __init__(self, runner: Runner, dataloader: dict, **kwargs: Any) -> None:
        self._seed = runner.seed
        self._skipped = self.epoch_begin = 0
        super().__init__(runner, seeded_loader(runner, dataloader), **kwargs)

    def skip_in_epoch(self, batches: int) -> None:
        """Has the first epoch begin after as many batches."""
        self._skipped = batches

    def run_epoch(self) -> None:
        """Runs an epoch, or what is left of it."""
        self.epoch_begin = self._iter - self._skipped
        self.dataloader.batch_sampler.begin(self.runner.seed, self.runner.rank, self._iter, self._skipped)
        super().run_epoch()
        self._skipped = 0

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Runs an iteration, whose number within the epoch counts those that were skipped."""
        super().run_iter(idx + self._skipped, data_batch)


@LOOPS.register_module()
class ResumableIterBasedTrainLoop(_Resumable, IterBasedTrainLoop):
    """MMEngine's ``IterBasedTrainLoop``, in which a resumed training ends with the weights of one that never ended.

    MMEngine would load all data up to the iteration that is resumed from, and drop it. Here indices alone are taken.

    Args:
        runner (Runner): Of the training.
        dataloader (dict): Config of the data loader.
        **kwargs: See :class:`IterBasedTrainLoop`.
    """

    def __init__(self, runner: Runner, dataloader: dict, **kwargs: Any) -> None:
        self._seed = runner.seed
        loader = seeded_loader(runner, dataloader)
        # MMEngine may iterate what it gets at once.
        super().__init__(runner, DataLoader(loader.dataset), **kwargs)
        self.dataloader = loader
        # A setting of the maintained fork, without which it drops batches below.
        self.fast_forward_on_resume = False

    def run(self) -> nn.Module:
        """Runs the training from the iteration that was resumed."""
        self.dataloader.batch_sampler.begin(self.runner.seed, self.runner.rank, self._iter, self._iter, endless=True)
        self.dataloader_iterator = _LaterBatches(self.dataloader, self._iter)
        model = super().run()
        self.dataloader_iterator = None  # its workers end
        return model


class _LaterBatches:
    """Batches of a loader, for a loop that drops those before the iteration that is resumed, which are not in it."""

    def __init__(self, loader: DataLoader, dropped: int) -> None:
        self._loader = loader
        self._dropped = dropped
        self._iterator: Iterator | None = None

    def skip_iter(self, batches: int) -> None:
        """Drops as many: what the maintained fork calls."""
        self._dropped -= batches

    def __next__(self) -> Any:
        if self._dropped:
            self._dropped -= 1
            return None
        if self._iterator is None:
            self._iterator = iter(self._loader)
        return next(self._iterator)
