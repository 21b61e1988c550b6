"""The ImageNet-1K configs: published size and cost, the recipe as built, and the data pipeline."""
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner, set_random_seed
from PIL import Image
from torch.utils.data import DataLoader

from convneur_mm import config
from convneur_mm.engine.launch import read_config

GPUS = 8


@pytest.mark.parametrize('arch, mparams, gmacs', [
    ('m1', 4.3, 0.71), ('m2', 6.1, 1.01), ('m3', 10.6, 1.77), ('m4', 18.1, 3.06),
])
def test_published_parameters_and_flops(arch, mparams, gmacs, open_config, build_model, count_macs):
    model = build_model(open_config(f'convneur_{arch}_300e_in1k')).eval()
    assert round(sum(param.numel() for param in model.parameters()) / 1e6, 1) == mparams
    assert round(count_macs(model, 1, 3, 224, 224) / 1e9, 2) == gmacs


@pytest.mark.parametrize('arch', ['m1', 'm4'])
def test_optimizer_and_decay_of_each_parameter(arch, open_config, build_model, param_groups, undecayed):
    cfg = open_config(f'convneur_{arch}_300e_in1k')
    model = build_model(cfg)
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(optim_wrapper.optimizer) is torch.optim.AdamW
    groups = param_groups(model, optim_wrapper)
    for param, group in groups.items():
        assert (group['lr'], group['betas'], group['eps']) == (4e-3, (0.9, 0.999), 1e-8), param
        assert group['weight_decay'] in (0, 0.05), param
    assert {param for param, group in groups.items() if group['weight_decay'] == 0} == undecayed(model)


class Toy(BaseModel):
    """Its gradient is 100 in every iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: torch.Tensor, mode: str = 'tensor') -> dict:
        return dict(loss=100 * self.weight.sum())


class Recorder(Hook):
    """The learning rate of each iteration, and the gradients that reach the optimizer."""

    def __init__(self) -> None:
        self.lrs, self.grads = [], []

    def before_train(self, runner: Runner) -> None:
        runner.optim_wrapper.optimizer.register_step_pre_hook(
            lambda *args: self.grads.append(runner.model.weight.grad.item()))

    def before_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        self.lrs.append(runner.optim_wrapper.param_groups[0]['lr'])


def test_schedule_over_a_whole_run(open_config, tmp_path):
    cfg = open_config('convneur_m3_300e_in1k')
    per_epoch = 10
    recorder = Recorder()
    runner = Runner(
        Toy(), str(tmp_path),
        train_dataloader=DataLoader([dict(inputs=torch.zeros(1))] * per_epoch, batch_size=1),
        train_cfg=cfg.train_cfg, optim_wrapper=cfg.optim_wrapper, param_scheduler=cfg.param_scheduler,
        default_hooks=dict(timer=None, logger=None, checkpoint=None, sampler_seed=None), custom_hooks=[recorder],
        log_level='ERROR', default_scope=cfg.default_scope, experiment_name=tmp_path.name)
    runner.train()

    assert len(recorder.lrs) == 300 * per_epoch
    warmup = 20 * per_epoch
    expected = np.array([
        1e-6 + (4e-3 - 1e-6) * i / (warmup - 1) if i < warmup else
        1e-6 + (4e-3 - 1e-6) / 2 * (1 + math.cos(math.pi * (i - warmup) / (280 * per_epoch)))
        for i in range(300 * per_epoch)
    ])
    np.testing.assert_allclose(recorder.lrs, expected, rtol=1e-4)
    assert recorder.lrs[0] == pytest.approx(1e-6)
    assert recorder.lrs[warmup] == pytest.approx(4e-3)
    assert recorder.lrs[-1] == pytest.approx(1e-6, rel=0.01)
    # Every second iteration updates the weights, with the mean of two gradients and no clipping.
    assert recorder.grads == [100] * (150 * per_epoch)


def test_an_update_sees_4096_images_and_keeps_its_learning_rate(open_config):
    cfg = open_config('convneur_m3_300e_in1k')
    optim_wrapper = build_optim_wrapper(Toy(), cfg.optim_wrapper)
    assert GPUS * cfg.train_dataloader.batch_size * optim_wrapper._accumulative_counts == 4096
    runner = SimpleNamespace(
        world_size=GPUS, _train_dataloader=cfg.train_dataloader, logger=logging.getLogger(__name__),
        param_schedulers=None)
    Runner.scale_lr(runner, optim_wrapper, dict(cfg.auto_scale_lr, enable=True))
    assert optim_wrapper.param_groups[0]['lr'] == pytest.approx(4e-3)


def test_label_smoothing(open_config, build_model):
    head = build_model(open_config('convneur_m1_300e_in1k')).head
    torch.manual_seed(0)
    scores, labels = 5 * torch.randn(8, 1000), torch.randint(1000, (8,))
    torch.testing.assert_close(head.loss_module(scores, labels), F.cross_entropy(scores, labels, label_smoothing=0.1))


def test_batches_are_mixed_by_mixup_and_cutmix_in_turn(open_config, build_model):
    from mmpretrain.structures import DataSample
    preprocess = build_model(open_config('convneur_m1_300e_in1k')).data_preprocessor
    set_random_seed(0)
    kinds = set()
    for _ in range(20):
        images = [torch.full((3, 64, 64), value, dtype=torch.uint8) for value in (0, 255)]
        batch = preprocess(
            dict(inputs=images, data_samples=[DataSample().set_gt_label(label) for label in (3, 7)]), training=True)
        image, score = batch['inputs'][0], batch['data_samples'][0].gt_score
        values = image[0].unique()
        assert score.shape == (1000,)
        assert score[3] + score[7] == pytest.approx(1)
        if len(values) == 2:
            kinds.add('cutmix')
            assert (image[0] == values.min()).float().mean() == pytest.approx(score[3].item(), abs=1e-3)
        elif 0 < score[3] < 1:
            kinds.add('mixup')
    assert kinds == {'mixup', 'cutmix'}
    evaluated = preprocess(dict(inputs=images, data_samples=[DataSample().set_gt_label(3) for _ in images]))
    assert [len(image.unique()) for image in evaluated['inputs'][:, 0]] == [1, 1]


@pytest.fixture
def imagenet_root(tmp_path):
    """Two 300 x 400 pictures for training and for validation; the first is plain grey."""
    (tmp_path / 'meta').mkdir()
    for split in ('train', 'val'):
        (tmp_path / split).mkdir()
        (tmp_path / 'meta' / f'{split}.txt').write_text('0.png 0\n1.png 999\n')
        noise = np.random.default_rng(0).integers(256, size=(300, 400, 3)).astype(np.uint8)
        for i, image in enumerate((np.full_like(noise, 128), noise)):
            Image.fromarray(image).save(tmp_path / split / f'{i}.png')
    return str(tmp_path)


def test_training_pictures(imagenet_root, open_config):
    cfg = open_config('convneur_m3_300e_in1k')
    dataset = DATASETS.build(dict(cfg.train_dataloader.dataset, data_root=imagenet_root))
    set_random_seed(0)
    noise = [dataset[1] for _ in range(8)]
    assert all(draw['inputs'].shape == (3, 224, 224) for draw in noise)
    assert all(draw['data_samples'].gt_label.item() == 999 for draw in noise)
    assert not any(torch.equal(a['inputs'], b['inputs']) for a, b in zip(noise, noise[1:]))
    # On plain grey, what varies from pixel to pixel without end is Random Erasing: a quarter of the pictures.
    erased = sum(len(dataset[0]['inputs'].unique()) > 64 for _ in range(200))
    assert 30 <= erased <= 70


def test_policies_of_randaugment_are_drawn(imagenet_root, open_config):
    cfg = open_config('convneur_m3_300e_in1k')
    dataset = DATASETS.build(dict(cfg.train_dataloader.dataset, data_root=imagenet_root))
    set_random_seed(0)
    # Colours of the plain grey picture away from any erased rectangle: its most frequent one.
    greys = {int(dataset[0]['inputs'].flatten().mode().values) for _ in range(40)}
    assert len(greys) > 4


def test_validation_takes_the_centre(imagenet_root, open_config):
    cfg = open_config('convneur_m3_300e_in1k')
    dataset = DATASETS.build(dict(cfg.val_dataloader.dataset, data_root=imagenet_root))
    assert dataset[1]['inputs'].shape == (3, 224, 224)
    assert torch.equal(dataset[1]['inputs'], dataset[1]['inputs'])
    assert dataset[0]['inputs'].unique().tolist() == [128]
    normalised = MODELS.build(dict(type='ClsDataPreprocessor', **cfg.data_preprocessor))(
        dict(inputs=dataset[0]['inputs'][None]))['inputs']
    expected = [(128 - mean) / std for mean, std in ((123.675, 58.395), (116.28, 57.12), (103.53, 57.375))]
    assert normalised[0, :, 0, 0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_batch_is_one_tensor(imagenet_root, workers, tmp_path):
    """The loaders' defaults are those of mmpretrain's own tool, so that a batch is copied and normalised at once."""
    cfg = read_config(config('convneur_m1_300e_in1k'), {})
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert (loader.collate_fn, loader.pin_memory) == (dict(type='default_collate'), torch.cuda.is_available())
    settings = dict(cfg.val_dataloader, batch_size=2, num_workers=workers, persistent_workers=workers > 0)
    settings['dataset'] = dict(settings['dataset'], data_root=imagenet_root)
    batch = next(iter(Runner.build_dataloader(settings)))
    assert isinstance(batch['inputs'], torch.Tensor) and batch['inputs'].dtype == torch.uint8
    assert batch['inputs'].shape == (2, 3, 224, 224)
    preprocess = MODELS.build(dict(type='mmpretrain.ClsDataPreprocessor', **cfg.data_preprocessor))
    done = preprocess(batch)
    assert [sample.gt_label.item() for sample in done['data_samples']] == [0, 999]
    for image, result in zip(batch['inputs'], done['inputs']):
        torch.testing.assert_close(result, preprocess(dict(inputs=image[None]))['inputs'][0])
        mean, std = (torch.tensor(cfg.data_preprocessor[key]).view(3, 1, 1) for key in ('mean', 'std'))
        torch.testing.assert_close(result, (image.flip(0) - mean) / std)


def test_what_a_config_says_of_its_loaders_stays(tmp_path):
    (tmp_path / 'child.py').write_text(
        f"_base_ = {config('convneur_m1_shapes')!r}\ntrain_dataloader = dict(num_workers=0, persistent_workers=False, "
        "collate_fn=dict(type='pseudo_collate'), pin_memory=False)\n")
    loader = read_config(str(tmp_path / 'child.py'), {}).train_dataloader
    assert loader.collate_fn == dict(type='pseudo_collate')
    assert (loader.pin_memory, loader.persistent_workers) == (False, False)


def test_other_tasks_keep_their_loaders():
    """mmdet's and mmseg's tools add nothing: their images differ in size."""
    for name in ('cascade_rcnn_convneur_m1_shapes', 'semantic_fpn_convneur_m1_shapes'):
        assert not {'collate_fn', 'pin_memory'} & read_config(config(name), {}).train_dataloader.keys()
