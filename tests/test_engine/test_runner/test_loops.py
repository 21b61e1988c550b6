"""Trainings that are resumed see the same samples, and draw the same numbers, as one that never ended."""
import random
from functools import partial
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from noisy_training import LOADED, NoisyData, assert_goes_on, train_noisily
from torch.utils.data import BatchSampler, DataLoader

from convneur_mm.engine.runner.loops import SeededBatchSampler, SeededIndices, seed_step, seeded_loader, seeds_of


def order(sampler):
    return [list(batch.indices) for batch in sampler]


class TestSeeds:
    def test_differ_by_every_number_of_the_key(self):
        keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 1), (0, 0, 1, 1), (0, 1, 0, 1),
                (2**31, 7, 10**6, 9)]
        seeds = [tuple(seeds_of(*key)) for key in keys]
        assert len({seed for three in seeds for seed in three}) == 3 * len(keys)
        assert seeds == [tuple(seeds_of(*key)) for key in keys]

    def test_all_generators(self):
        def draw(*key):
            seed_step(*key)
            return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

        first = draw(3, 0, 5)
        assert draw(3, 0, 5) == first
        assert all(a != b for a, b in zip(first, draw(3, 0, 6)))


class TestBatches:
    def test_are_those_of_a_batch_sampler(self):
        for drop_last, expected in (False, [[0, 1, 2], [3, 4, 5], [6]]), (True, [[0, 1, 2], [3, 4, 5]]):
            sampler = SeededBatchSampler(DefaultSampler(range(7), shuffle=False), 3, drop_last=drop_last)
            assert order(sampler) == expected
            assert len(sampler) == len(expected) and sampler.batch_size == 3 and sampler.drop_last is drop_last

    def test_of_a_config(self):
        config = dict(type=BatchSampler, drop_last=True)
        sampler = SeededBatchSampler(DefaultSampler(range(7), shuffle=False), 3, config)
        assert order(sampler) == [[0, 1, 2], [3, 4, 5]] and sampler.drop_last

    def test_from_any_iteration_on(self):
        sampler = SeededBatchSampler(DefaultSampler(range(7), shuffle=False), 3)
        assert [batch.key for batch in sampler] == [(0, 0, 0), (0, 0, 1), (0, 0, 2)]
        sampler.begin(5, 1, 20, skipped=1)
        assert [(batch.indices, batch.key) for batch in sampler] == [([3, 4, 5], (5, 1, 20)), ([6], (5, 1, 21))]
        sampler.begin(5, 1, 20)
        assert [batch.key for batch in sampler] == [(5, 1, 20), (5, 1, 21), (5, 1, 22)]

    @pytest.mark.parametrize('kind', [DefaultSampler, InfiniteSampler])
    def test_without_end(self, kind):
        def take(skipped, number):
            sampler = SeededBatchSampler(kind(range(7), seed=3), 2)
            sampler.begin(0, 0, skipped, skipped, endless=True)
            return [batch.indices for batch in islice(sampler, number)]

        whole = take(0, 12)
        assert all(take(i, 12 - i) == whole[i:] for i in range(12))
        # Each pass has an order of its own.
        passes = [sum(whole[:4], []), sum(whole[4:8], [])] if kind is DefaultSampler else [
            sum(whole, [])[:7], sum(whole, [])[7:14]]
        assert sorted(passes[0]) == sorted(passes[1]) == list(range(7)) and passes[0] != passes[1]

    def test_none_is_an_error(self):
        sampler = SeededBatchSampler(DefaultSampler(range(2), shuffle=False), 3, drop_last=True)
        sampler.begin(0, 0, 0, endless=True)
        with pytest.raises(ValueError, match='no batch: 2 samples, batch_size=3, drop_last=True'):
            next(iter(sampler))

    def test_samples_are_the_same_whatever_the_workers(self):
        def load(workers, skipped=0):
            sampler = SeededBatchSampler(DefaultSampler(range(7), seed=3), 2)
            sampler.begin(5, 0, 8 + skipped, skipped)
            loader = DataLoader(NoisyData(), batch_sampler=sampler, num_workers=workers)
            return [batch['inputs'] for batch in loader]

        whole = load(0)
        noise = torch.cat(whole)[:, 1]
        assert len(set(noise.tolist())) == 7
        for workers in 1, 2:
            assert all(map(torch.equal, load(workers), whole))
        assert all(map(torch.equal, load(2, skipped=3), whole[3:])) and len(load(0, skipped=3)) == 1

    def test_of_another_rank_have_other_noise(self):
        draws = []
        for rank in 0, 1:
            for _ in SeededIndices([4], (0, rank, 0)):
                draws.append(torch.rand(()).item())
        assert draws[0] != draws[1]


@pytest.fixture
def train(tmp_path):
    return partial(train_noisily, tmp_path)


class TestResumed:
    INFINITE = dict(sampler=dict(type='InfiniteSampler', shuffle=True))

    @pytest.mark.parametrize('loader', [{}, INFINITE, dict(num_workers=2, persistent_workers=True, **INFINITE)])
    def test_by_iteration(self, train, loader):
        whole = train('whole', dict(max_iters=8), **loader)
        resumed = train('resumed', dict(max_iters=8), resume='whole/iter_6.pth', **loader)
        assert_goes_on(whole, resumed, 6)

    def test_loads_no_sample_before(self, train):
        train('whole', dict(max_iters=8), **self.INFINITE)
        expected = LOADED[12:]
        train('resumed', dict(max_iters=8), resume='whole/iter_6.pth', **self.INFINITE)
        assert expected == LOADED and len(expected) == 4

    @pytest.mark.parametrize('loader', [{}, dict(num_workers=2, persistent_workers=True), dict(
        drop_last=True, batch_sampler=None)])
    def test_by_epoch(self, train, loader):
        whole = train('whole', dict(max_epochs=3), **loader)
        resumed = train('resumed', dict(max_epochs=3), resume='whole/epoch_2.pth', **loader)
        assert_goes_on(whole, resumed, 6 if 'drop_last' in loader else 8)

    def test_each_epoch_draws_other_noise(self, train):
        """Of workers that are begun anew for each, MMEngine's draw the same."""
        seen = train('whole', dict(max_epochs=2), num_workers=1).seen
        assert len(set(torch.cat(seen)[:, 1].tolist())) == 14

    @pytest.mark.parametrize('loop, first, checkpoint', [(dict(max_iters=8), 6, 'iter_6'), (dict(max_epochs=2), 4,
                                                                                           'epoch_1')])
    def test_without_a_seed_in_the_config(self, train, loop, first, checkpoint):
        """That of the first run is drawn, and in its checkpoint."""
        np.random.seed(1)  # noqa: NPY002 what MMEngine draws it from
        whole = train('whole', loop, seed=None)
        np.random.seed(2)  # noqa: NPY002
        assert_goes_on(whole, train('resumed', loop, seed=None, resume=f'whole/{checkpoint}.pth'), first)


def test_a_loader_cannot_be_seeded_afterwards():
    with pytest.raises(ValueError, match='^train_dataloader must be a config for this loop, got a DataLoader$'):
        seeded_loader(SimpleNamespace(), DataLoader(range(2)))
