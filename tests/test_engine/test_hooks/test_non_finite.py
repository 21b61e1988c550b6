"""A loss that is not finite ends a training with one line, or its batch is left out."""
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS
from mmengine.structures import BaseDataElement
from noisy_training import NoisyModel, train_noisily

from convneur_mm.engine.files.checkpoint import read_checkpoint
from convneur_mm.engine.files.errors import LaunchError
from convneur_mm.engine.hooks.non_finite import NonFiniteLossHook

IMAGES = ', '.join(f'{index}.jpg' for index in range(6))


@MODELS.register_module()
class BrokenModel(NoisyModel):
    """Its loss is of this value for some samples."""

    def __init__(self, samples, value=math.nan):
        super().__init__()
        self.samples = samples
        self.value = value

    def forward(self, inputs, mode='loss'):
        loss = super().forward(inputs)['loss']
        if any(x[0].item() in self.samples for x in inputs):
            loss = loss * self.value
        return dict(loss_a=loss, loss_b=torch.ones(()))


@HOOKS.register_module()
class BreakWeightsHook(Hook):
    """As a gradient does that is not finite, of a loss that is, in the last iteration."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 7:
            runner.model.layer.bias.data[0] = math.inf


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Samples in order, 0 to 6, two a batch; an epoch has four batches."""
    monkeypatch.chdir(tmp_path)

    def train(samples, max_skips=0, hooks=(), resume=None, loop=None, settings=None, **model):
        return train_noisily(
            tmp_path, 'work', loop or dict(max_epochs=2), resume=resume,
            hooks=[*hooks, dict(type='NonFiniteLossHook', max_skips=max_skips)],
            settings=dict(model=dict(type='BrokenModel', samples=samples, **model), log_level='WARNING',
                          **(settings or {})),
            sampler=dict(type='DefaultSampler', shuffle=False))

    return train


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_ends_the_training(train, value):
    with pytest.raises(LaunchError, match=re.escape(
            f'loss is {value} (loss_a) at iteration 3 in process 0, images unknown; the checkpoint before it can be '
            'gone on from: look at the images, lower optim_wrapper.optimizer.lr, set optim_wrapper.clip_grad, or have '
            "such batches left out by custom_hooks=[dict(type='NonFiniteLossHook', max_skips=10)]")):
        train([4], value=value)
    assert not list(Path('work').glob('*.pth'))


def test_nothing_is_saved_of_it(train):
    """Neither at an iteration at which a checkpoint is due."""
    with pytest.raises(LaunchError, match='at iteration 3 '):
        train([4], loop=dict(max_iters=6))
    assert not list(Path('work').glob('*.pth'))


def test_a_finite_loss_passes(train):
    assert all(value.isfinite().all() for value in train([]).state_dict().values())
    assert Path('work/last_checkpoint').read_text().endswith('epoch_2.pth')


def test_broken_weights_are_not_saved(train):
    """Their loss is seen in the next iteration; here the last one of an epoch brings them."""
    with pytest.raises(LaunchError, match=r'^after iteration 8 these weights are not finite, and were not saved: '
                                          r'layer\.bias; go on from the checkpoint before, with a lower'):
        train([], hooks=[dict(type='BreakWeightsHook')])
    assert Path('work/last_checkpoint').read_text().endswith('epoch_1.pth')
    assert not Path('work/epoch_2.pth').exists()


def test_broken_weights_in_parts_are_not_saved():
    """FSDP's parameters are flat and have names of their own; the strategy knows those of the whole model."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    weights = model.state_dict(keep_vars=True)
    runner = SimpleNamespace(model=torch.nn.Module(), strategy=SimpleNamespace(whole_weights=weights))
    checkpoint = dict(state_dict=model.state_dict(), meta=dict(iter=8))
    model[0].running_mean[0] = math.inf  # is no parameter
    NonFiniteLossHook().before_save_checkpoint(runner, checkpoint)
    model[0].weight.data[1] = math.nan
    with pytest.raises(LaunchError, match=r'^after iteration 8 these weights are not finite, .*: 0\.weight;'):
        NonFiniteLossHook().before_save_checkpoint(runner, checkpoint)


class TestLeftOut:
    def test_the_weights_stay_as_they_are(self, train, capfd):
        weights = []

        @HOOKS.register_module(force=True)
        class KeepWeightsHook(Hook):
            def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
                weights.append(runner.model.layer.weight.detach().clone())

        train([4], max_skips=2, hooks=[dict(type='KeepWeightsHook')])
        moved = [not torch.equal(a, b) for a, b in zip(weights, weights[1:])]
        assert moved == [True, False, True, True, True, False, True]  # batches 2 and 6 are broken, counted from 0
        assert all(value.isfinite().all() for value in weights)
        assert ('loss is nan (loss_a) at iteration 3 in process 0, images unknown: skipping this batch (1 of at most '
                '2, max_skips)') in max(Path('work').glob('*/*.log')).read_text()

    def test_up_to_a_number(self, train):
        with pytest.raises(LaunchError, match=r'^loss is nan \(loss_a\) at iteration 7 .*, after 1 batches were left '
                                              r'out \(max_skips\): look at the images'):
            train([4], max_skips=1)

    def test_are_counted_on_after_a_resume(self, train):
        train([4], max_skips=1, loop=dict(max_epochs=1))
        assert read_checkpoint('work/epoch_1.pth')['message_hub']['runtime_info']['skipped_batches'] == 1
        with pytest.raises(LaunchError, match='at iteration 7 .*, after 1 batches were left out'):
            train([4], max_skips=1, resume='work/epoch_1.pth')

    def test_by_all_processes_if_by_one(self, train, monkeypatch):
        """Of which the second has a loss that is finite."""
        monkeypatch.setattr('convneur_mm.engine.hooks.non_finite.all_reduce', lambda value, op: value.zero_())
        with pytest.raises(LaunchError, match='^the loss of another process is not finite at iteration 2, after 1 bat'):
            train([], max_skips=1)


class Scaler:
    """A GradScaler's part in a step, on a CPU: leaves out an update whose gradients overflow, and lowers its scale."""

    def __init__(self, init_scale: float) -> None:
        self.factor = init_scale
        self.left_out: list[bool] = []

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.factor

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group['params']]
        self.left_out.append(not all(grad.isfinite().all() for grad in grads))
        if not self.left_out[-1]:
            for grad in grads:
                grad /= self.factor
            optimizer.step()

    def update(self, new_scale: None) -> None:
        if self.left_out[-1]:
            self.factor /= 16

    def state_dict(self) -> dict:
        return dict(scale=self.factor)


@pytest.mark.parametrize('max_skips', [0, 1])
def test_an_overflow_of_the_scaled_loss_is_the_scalers(train, monkeypatch, max_skips):
    """Of float16: the loss is finite, and neither ends the training nor counts as a batch that was left out."""
    scaler, weights = Scaler(2.0**140), []

    @HOOKS.register_module(force=True)
    class KeepLayerHook(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            weights.append(runner.model.layer.weight.detach().clone())

    amp = 'mmengine.optim.optimizer.amp_optimizer_wrapper'
    monkeypatch.setattr(f'{amp}.is_cuda_available', lambda: True)
    monkeypatch.setattr(f'{amp}.GradScaler', lambda **kwargs: scaler)
    model = train([], max_skips=max_skips, hooks=[dict(type='KeepLayerHook')], settings=dict(
        optim_wrapper=dict(type='AmpOptimWrapper', dtype='bfloat16', optimizer=dict(type='SGD', lr=0.01))))
    assert len(scaler.left_out) == 8
    assert all(scaler.left_out[:3]) and not scaler.left_out[-1]
    moved = [not torch.equal(a, b) for a, b in zip(weights, weights[1:])]
    assert moved == [not left_out for left_out in scaler.left_out[1:]]
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert 'skipped_batches' not in read_checkpoint('work/epoch_2.pth')['message_hub']['runtime_info']


def test_images_are_named():
    hook, samples = NonFiniteLossHook(), [BaseDataElement(metainfo=dict(img_path=f'{i}.jpg')) for i in range(9)]
    runner = SimpleNamespace(iter=41, rank=3)
    for number, shown in (2, '0.jpg, 1.jpg'), (6, IMAGES), (9, f'{IMAGES}, … 9 in all'):
        with pytest.raises(LaunchError, match=re.escape(
                f'loss is inf at iteration 42 in process 3, images {shown}; the checkpoint')):
            hook.after_train_iter(runner, 0, dict(data_samples=samples[:number]), dict(
                loss=torch.tensor(math.inf), a=1.0))
    for outputs in None, {}, dict(loss=1.0), dict(a=math.nan):
        hook.after_train_iter(runner, 0, None, outputs)


@pytest.mark.parametrize('number', [-1, 1.5, True, None])
def test_numbers_that_cannot_be(number):
    with pytest.raises(ValueError, match=f'^max_skips must be an integer of at least 0, got {number}$'):
        NonFiniteLossHook(number)
