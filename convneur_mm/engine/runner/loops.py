"""Training loops that continue a resumed run as if it had never ended.

MMEngine saves no states of random number generators, and could not save those of data workers, which are some batches
ahead. Here nothing depends on earlier draws: all generators are seeded anew for each sample and for each step, by the
seed of the run, the rank, the iteration, and the sample's place in the batch. So the number of data workers does not
change the weights of a training either.
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

# MMEngine's loops, and the loops that the tools use instead.
RESUMABLE_LOOPS = dict(EpochBasedTrainLoop='ResumableEpochBasedTrainLoop',
                       IterBasedTrainLoop='ResumableIterBasedTrainLoop')


def seeds_of(*key: int) -> list[int]:
    """Return seeds for Python, NumPy and PyTorch that differ for each key of up to four numbers."""
    return np.random.SeedSequence(key).generate_state(3).tolist()


def seed_sample(*key: int) -> None:
    """Seed what transforms of a data set draw from; skip the generators of GPUs, as that takes longer."""
    for_python, for_numpy, for_torch = seeds_of(*key)
    random.seed(for_python)
    np.random.seed(for_numpy)  # noqa: NPY002 mmcv and mmdet draw from it
    torch.default_generator.manual_seed(for_torch)


def seed_step(*key: int) -> None:
    """Seed what a model and the hooks draw from, on all devices."""
    seed_sample(*key)
    torch.manual_seed(torch.initial_seed())


class SeededIndices:
    """Indices of a batch that seed the generators for each sample before its index is taken.

    Args:
        indices (Sequence[int]): Indices of samples in the data set.
        key (tuple[int, int, int]): (Seed, rank, iteration).
    """

    def __init__(self, indices: Sequence[int], key: tuple[int, int, int]) -> None:
        self.indices = indices
        self.key = key

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        for place, index in enumerate(self.indices, start=1):  # 0 is for the step
            seed_sample(*self.key, place)
            yield index


class SeededBatchSampler(Sampler):
    """Yield the batches of another batch sampler as :class:`SeededIndices`, from any iteration on.

    Args:
        sampler (Sampler): Sampler of the samples.
        batch_size (int): Batch size of each process.
        batch_sampler (dict | None): Config of the other batch sampler. Defaults to one that takes samples in order.
        drop_last (bool): Whether that default drops a last, smaller batch. Defaults to False.
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
        """Set what the next pass yields.

        Args:
            seed (int): Seed of the run.
            rank (int): Rank of this process.
            iteration (int): Number of the first batch in the whole training.
            skipped (int): Number of batches before that one, whose samples are not loaded. Defaults to 0.
            endless (bool): Whether to repeat passes, each in the order of the next epoch. Defaults to False.
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
    """Build a data loader as MMEngine does, with a :class:`SeededBatchSampler` around its batches.

    Raises:
        ValueError: If ``dataloader`` is not a config.
    """
    if not isinstance(dataloader, dict):
        raise ValueError(f'train_dataloader must be a config for this loop, got a {type(dataloader).__name__}')
    config = dict(dataloader)
    inner = config.pop('batch_sampler', None)
    if inner is None:
        config['batch_sampler'] = dict(type=SeededBatchSampler, drop_last=config.pop('drop_last', False))
    else:
        config['batch_sampler'] = dict(type=SeededBatchSampler, batch_sampler=inner)
    diff_rank_seed = (runner.cfg.get('randomness') or {}).get('diff_rank_seed', False)
    return runner.build_dataloader(config, runner.seed, diff_rank_seed)


class _Resumable:
    """Methods of both loops."""

    # Seed with which the data loader was built.
    _seed: int

    def run(self) -> nn.Module:
        """Run the training."""
        # Without a configured seed, a resumed run's seed is only known after loading.
        sampler = self.dataloader.batch_sampler.sampler
        if getattr(sampler, 'seed', None) == self._seed:
            sampler.seed = self.runner.seed
        model = super().run()
        # Persistent data workers live as long as their iterator, and a runner is in reference cycles: when these are
        # collected, PyTorch would wait up to five seconds for each worker.
        for loop in (self, self.runner.val_loop):
            if isinstance(getattr(loop, 'dataloader', None), DataLoader):
                loop.dataloader._iterator = None
        return model

    def run_iter(self, *args: Any) -> None:
        """Seed and run one iteration."""
        seed_step(self.runner.seed, self.runner.rank, self._iter)
        super().run_iter(*args)


@LOOPS.register_module()
class ResumableEpochBasedTrainLoop(_Resumable, EpochBasedTrainLoop):
    """MMEngine's ``EpochBasedTrainLoop``, but a resumed training ends with the same weights as an uninterrupted one.

    Args:
        runner (Runner): Runner of the training.
        dataloader (dict): Config of the data loader.
        **kwargs: See :class:`EpochBasedTrainLoop`.

    Attributes:
        epoch_begin (int): Number of the first iteration of the current epoch.
    """

    def __init__(self, runner: Runner, dataloader: dict, **kwargs: Any) -> None:
        self._seed = runner.seed
        self._skipped = self.epoch_begin = 0
        super().__init__(runner, seeded_loader(runner, dataloader), **kwargs)

    def skip_in_epoch(self, batches: int) -> None:
        """Start the first epoch after this many batches."""
        self._skipped = batches

    def run_epoch(self) -> None:
        """Run an epoch, or the rest of it."""
        self.epoch_begin = self._iter - self._skipped
        self.dataloader.batch_sampler.begin(self.runner.seed, self.runner.rank, self._iter, self._skipped)
        super().run_epoch()
        self._skipped = 0

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Run an iteration; its number within the epoch counts the skipped ones too."""
        super().run_iter(idx + self._skipped, data_batch)


@LOOPS.register_module()
class ResumableIterBasedTrainLoop(_Resumable, IterBasedTrainLoop):
    """MMEngine's ``IterBasedTrainLoop``, but a resumed training ends with the same weights as an uninterrupted one.

    MMEngine would load and drop all data before the iteration to resume from. Here only indices are taken.

    Args:
        runner (Runner): Runner of the training.
        dataloader (dict): Config of the data loader.
        **kwargs: See :class:`IterBasedTrainLoop`.
    """

    def __init__(self, runner: Runner, dataloader: dict, **kwargs: Any) -> None:
        self._seed = runner.seed
        loader = seeded_loader(runner, dataloader)
        # MMEngine may iterate over its loader at once.
        super().__init__(runner, DataLoader(loader.dataset), **kwargs)
        self.dataloader = loader
        # If this is off, the maintained fork drops batches by skip_iter() below.
        self.fast_forward_on_resume = False

    def run(self) -> nn.Module:
        """Run the training from the iteration that was resumed."""
        self.dataloader.batch_sampler.begin(self.runner.seed, self.runner.rank, self._iter, self._iter, endless=True)
        self.dataloader_iterator = _LaterBatches(self.dataloader, self._iter)
        model = super().run()
        self.dataloader_iterator = None  # ends its workers
        return model


class _LaterBatches:
    """Iterate over a loader, but first yield None for the batches that a resuming loop drops."""

    def __init__(self, loader: DataLoader, dropped: int) -> None:
        self._loader = loader
        self._dropped = dropped
        self._iterator: Iterator | None = None

    def skip_iter(self, batches: int) -> None:
        """Drop batches; the maintained fork calls this."""
        self._dropped -= batches

    def __next__(self) -> Any:
        if self._dropped:
            self._dropped -= 1
            return None
        if self._iterator is None:
            self._iterator = iter(self._loader)
        return next(self._iterator)
