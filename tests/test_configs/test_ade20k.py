"""The ADE20K configs: published cost, the recipe as built, and the data pipeline."""
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, HOOKS, MODELS, PARAM_SCHEDULERS
from mmengine.runner import Runner, set_random_seed
from PIL import Image

from convneur_mm.paths import config_root

CONFIGS = sorted(path.stem for path in config_root().glob('*_ade20k.py'))
HEADS = ('semantic_fpn_convneur', 'upernet_convneur')
HEAD_PARTS = ('neck.', 'decode_head.', 'auxiliary_head.')


def test_every_head_comes_with_every_backbone():
    assert {f'{head}_{arch}_80k_ade20k' for head in HEADS for arch in ('m1', 'm2', 'm3', 'm4')} <= set(CONFIGS)


@pytest.mark.parametrize('name, gmacs', [
    ('semantic_fpn_convneur_m2_80k_ade20k', 106),
    ('semantic_fpn_convneur_m3_80k_ade20k', 123),
    ('upernet_convneur_m4_80k_ade20k', 908),
])
@pytest.mark.slow
def test_published_flops(name, gmacs, open_config, build_model, count_macs):
    model = build_model(open_config(name)).eval()
    # Neck and head are counted without computing them.
    neck, head = (model.neck if model.with_neck else nn.Identity()).to('meta'), model.decode_head.to('meta')
    macs = count_macs(
        lambda image: head(neck([feature.to('meta') for feature in model.backbone(image)])), 1, 3, 512, 2048)
    assert round(macs / 1e9) == gmacs


@pytest.mark.parametrize('name', CONFIGS)
def test_learning_rates_and_decay_of_each_parameter(name, open_config, build_model, param_groups, undecayed):
    cfg = open_config(name)
    model = build_model(cfg)
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(optim_wrapper.optimizer) is torch.optim.AdamW
    groups = param_groups(model, optim_wrapper)
    spared = undecayed(model)
    for prefix in ('decode_head.', 'neck.') if model.with_neck else ('decode_head.', 'auxiliary_head.'):
        assert any(param.startswith(prefix) and param not in spared for param in groups)
    for param, group in groups.items():
        assert group['lr'] == pytest.approx(6e-4 if param.startswith(HEAD_PARTS) else 6e-5), param
        assert group['betas'] == (0.9, 0.999)
        assert group['weight_decay'] in (0, 0.01), param
    assert {param for param, group in groups.items() if group['weight_decay'] == 0} == spared


OTHER_HEADS = dict(
    FPNHead=dict(in_channels=[16] * 4, in_index=[0, 1, 2, 3], feature_strides=[4, 8, 16, 32]),
    UPerHead=dict(in_channels=[16] * 4, in_index=[0, 1, 2, 3], pool_scales=(1, 2)),
    SegformerHead=dict(in_channels=[16] * 4, in_index=[0, 1, 2, 3]),
    SegmenterMaskTransformerHead=dict(
        in_channels=16, in_index=3, num_layers=1, num_heads=2, embed_dims=16),
    OCRHead=dict(in_channels=16, in_index=3, ocr_channels=8),
    DAHead=dict(in_channels=16, in_index=3, pam_channels=8),
)


@pytest.mark.parametrize('head', OTHER_HEADS)
def test_weights_of_any_head_decay_and_its_norms_and_biases_do_not(head, open_config, param_groups):
    from mmseg.registry import MODELS as MMSEG_MODELS
    cfg = open_config('semantic_fpn_convneur_m3_80k_ade20k')
    norm = dict(type='LN') if head.startswith('Segmenter') else dict(type='BN')
    kwargs = dict(type=head, channels=16, num_classes=3, norm_cfg=norm, **OTHER_HEADS[head])
    model = nn.ModuleDict(dict(
        backbone=nn.Linear(2, 2), neck=nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)),
        decode_head=MMSEG_MODELS.build(kwargs)))
    groups = param_groups(model, build_optim_wrapper(model, cfg.optim_wrapper))
    for name, param in model.named_parameters():
        assert groups[name]['lr'] == pytest.approx(6e-5 if name.startswith('backbone') else 6e-4), name
        assert groups[name]['weight_decay'] == (0.01 if param.ndim > 1 else 0), name
    assert sum(group['weight_decay'] == 0 for group in groups.values()) > 3


class Toy(nn.Module):
    """One parameter at the base learning rate and one at ten times that."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(1, 1, bias=False)
        self.decode_head = nn.Linear(1, 1, bias=False)


def test_schedule(open_config):
    cfg = open_config('semantic_fpn_convneur_m3_80k_ade20k')
    assert cfg.train_cfg.max_iters == 80000
    optim_wrapper = build_optim_wrapper(Toy(), cfg.optim_wrapper)
    schedulers = [
        PARAM_SCHEDULERS.build(scheduler, default_args=dict(optimizer=optim_wrapper))
        for scheduler in cfg.param_scheduler
    ]
    expected = {
        0: 6e-5 * 1e-6,
        750: 6e-5 * 750 / 1499,
        1499: 6e-5,
        1500: 6e-5,
        40000: 6e-5 * (1 - (40000 - 1500) / 78499),
        79990: 6e-5 * 9 / 78499,
        80000: 0,
    }
    for iteration in range(80001):
        if iteration in expected:
            lrs = [group['lr'] for group in optim_wrapper.optimizer.param_groups]
            lr = expected[iteration]
            assert lrs == pytest.approx([lr, 10 * lr], rel=1e-4, abs=1e-14), iteration
        for scheduler in schedulers:
            scheduler.step()


def test_validation_and_checkpoints_every_8000_iterations(open_config):
    cfg = open_config('upernet_convneur_m4_80k_ade20k')
    hook = HOOKS.build(cfg.default_hooks.checkpoint)
    assert (hook.by_epoch, hook.interval, hook.key_indicators) == (False, 8000, ['mIoU'])
    assert cfg.train_cfg.val_interval == 8000


def test_gradients_are_clipped_to_norm_1(open_config):
    toy = Toy()
    optim_wrapper = build_optim_wrapper(toy, open_config('upernet_convneur_m4_80k_ade20k').optim_wrapper)
    norms = []
    optim_wrapper.optimizer.register_step_pre_hook(lambda *args: norms.append(
        torch.cat([param.grad.flatten() for param in toy.parameters()]).norm().item()))
    for scale in (1e3, 1e-3):
        optim_wrapper.update_params(scale * sum(param.sum() for param in toy.parameters()))
    assert norms == pytest.approx([1, 1e-3 * 2**0.5], rel=1e-4)


def test_the_recipe_batch_keeps_its_learning_rate(open_config):
    cfg = open_config('semantic_fpn_convneur_m2_80k_ade20k')
    optim_wrapper = build_optim_wrapper(Toy(), cfg.optim_wrapper)
    runner = SimpleNamespace(
        world_size=4, _train_dataloader=cfg.train_dataloader, logger=logging.getLogger(__name__), param_schedulers=None)
    Runner.scale_lr(runner, optim_wrapper, dict(cfg.auto_scale_lr, enable=True))
    assert optim_wrapper.param_groups[0]['lr'] == pytest.approx(6e-5)


@pytest.mark.parametrize('name', [f'{head}_m1_80k_ade20k' for head in HEADS])
def test_prediction_has_the_size_of_the_original_for_odd_images(name, open_config, build_model):
    from mmseg.structures import SegDataSample
    model = build_model(open_config(name)).eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    sample = SegDataSample(metainfo=dict(ori_shape=(141, 203), img_shape=(70, 101)))
    image = torch.randint(256, (3, 70, 101), dtype=torch.uint8)
    with torch.no_grad():
        prediction, = model.test_step(dict(inputs=[image], data_samples=[sample]))
    # One pass over the whole image, padded to whole strides of every stage.
    assert seen == [(1, 3, 96, 128)]
    assert prediction.pred_sem_seg.data.shape == (1, 141, 203)


@pytest.fixture
def ade_root(tmp_path):
    """Two pairs in the layout of ADE20K, 300 x 400 pixels; annotations hold 0, which is no class, and 1 to 150."""
    rng = np.random.default_rng(0)
    for split in ('training', 'validation'):
        for kind in ('images', 'annotations'):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(2):
            image = np.kron(rng.integers(256, size=(30, 40, 3)), np.ones((10, 10, 1))).astype(np.uint8)
            labels = np.kron(rng.permutation(1200).reshape(30, 40) % 151, np.ones((10, 10))).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / 'images' / split / f'{i}.jpg')
            Image.fromarray(labels).save(tmp_path / 'annotations' / split / f'{i}.png')
    return str(tmp_path)


def test_training_crops(ade_root, open_config):
    from mmseg.datasets.transforms import RandomCrop
    cfg = open_config('semantic_fpn_convneur_m3_80k_ade20k')
    dataset = DATASETS.build(dict(cfg.train_dataloader.dataset, data_root=ade_root))
    assert len(dataset) == 2 and len(dataset.metainfo['classes']) == 150
    crop, = (transform for transform in dataset.pipeline.transforms if isinstance(transform, RandomCrop))
    assert crop.cat_max_ratio == 0.75
    set_random_seed(0)
    draws = [dataset[i % 2] for i in range(8)]
    assert all(max(draw['inputs'].shape[1:]) <= 512 for draw in draws)
    # The short side is 512 times a factor from 0.5 to 2 before the crop: some are smaller than it, some are not.
    assert len({tuple(draw['inputs'].shape[1:]) for draw in draws}) > 2
    assert any(draw['inputs'].shape[1:] == (512, 512) for draw in draws)
    assert {draw['data_samples'].flip for draw in draws} == {True, False}
    batch = MODELS.build(cfg.model.data_preprocessor)(
        dict(inputs=[draw['inputs'] for draw in draws], data_samples=[draw['data_samples'] for draw in draws]), True)
    labels = torch.stack([sample.gt_sem_seg.data for sample in batch['data_samples']])
    assert batch['inputs'].shape == (8, 3, 512, 512)
    assert labels.shape == (8, 1, 512, 512)
    assert set(labels.unique().tolist()) == {*range(150), 255}


def test_photometric_distortion_in_training_alone(ade_root, open_config):
    for split in ('training', 'validation'):
        for i in range(2):
            Image.fromarray(np.full((300, 400, 3), 128, np.uint8)).save(f'{ade_root}/images/{split}/{i}.jpg')
    cfg = open_config('upernet_convneur_m4_80k_ade20k')
    set_random_seed(0)
    for loader, distorted in ((cfg.train_dataloader, True), (cfg.val_dataloader, False)):
        dataset = DATASETS.build(dict(loader.dataset, data_root=ade_root))
        greys = {int(value) for _ in range(4) for value in dataset[0]['inputs'].unique()}
        assert (greys != {128}) is distorted


def test_validation_scores_at_the_size_of_the_annotation(ade_root, open_config):
    cfg = open_config('upernet_convneur_m4_80k_ade20k')
    sample = DATASETS.build(dict(cfg.val_dataloader.dataset, data_root=ade_root))[0]
    assert sample['inputs'].shape == (3, 512, 683)
    assert sample['data_samples'].gt_sem_seg.shape == (300, 400)
    assert sample['data_samples'].ori_shape == (300, 400)
