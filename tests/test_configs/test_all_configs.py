"""Every shipped config builds in its own scope and learns on a small input."""
import re
import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, PARAM_SCHEDULERS, TRANSFORMS, VISUALIZERS
from mmengine.runner import set_random_seed

from convneur_mm.paths import config_root

CONFIGS = sorted(path.stem for path in config_root().glob('*.py'))
SIZE = (64, 96)
# What may have a gradient of zero on so small an image: whatever only the memory's writes depend on, as a map of one
# chunk has none, and in a detector the levels whose anchors do not fit in.
IDLE = {scope: re.compile(r'\.memory\.(key|value|generators)\.') for scope in ('mmseg', 'mmpretrain')}
IDLE['mmdet'] = re.compile(r'\.memory\.(key|value|generators)\.|^neck\.fpn_convs\.[23]\.')


def test_all_are_found():
    archs = ('m1', 'm2', 'm3', 'm4')
    assert {
        'cascade_rcnn_convneur_m1_shapes',
        'semantic_fpn_convneur_m1_shapes',
        'convneur_m1_shapes',
        *(f'cascade_rcnn_convneur_{arch}_1x_coco' for arch in archs),
        *(f'semantic_fpn_convneur_{arch}_80k_ade20k' for arch in archs),
        *(f'upernet_convneur_{arch}_80k_ade20k' for arch in archs),
        *(f'convneur_{arch}_300e_in1k' for arch in archs),
    } <= set(CONFIGS)


def detection_batch(cfg: Config) -> dict:
    """One image with three objects; few regions of it are sampled, and the box heads are narrow.

    They would be 40 of a model's 60 million parameters, and their initialization most of a test's time.
    """
    from mmdet.testing import demo_mm_inputs
    for head in cfg.model.roi_head.bbox_head:
        head.fc_out_channels = 32
    cfg.model.train_cfg.rpn_proposal.max_per_img = 32
    for stage in cfg.model.train_cfg.rcnn:
        stage.sampler.num = 16
    classes = cfg.model.roi_head.bbox_head[0].num_classes
    return demo_mm_inputs(1, (3, *SIZE), num_items=[3], num_classes=classes, with_mask=True)


def segmentation_batch(cfg: Config) -> dict:
    """Two images, for batch norm after a pooling to one pixel; no padding to the crop's size, and narrow heads."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample
    cfg.model.data_preprocessor.size = SIZE
    cfg.model.decode_head.channels = 32
    classes = cfg.model.decode_head.num_classes
    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(classes, (1, *SIZE)))) for _ in range(2)]
    return dict(inputs=[torch.randint(256, (3, *SIZE), dtype=torch.uint8) for _ in samples], data_samples=samples)


def classification_batch(cfg: Config) -> dict:
    """Two images of different classes."""
    from mmpretrain.structures import DataSample
    samples = [DataSample().set_gt_label(label) for label in (0, cfg.model.head.num_classes - 1)]
    return dict(inputs=[torch.randint(256, (3, *SIZE), dtype=torch.uint8) for _ in samples], data_samples=samples)


BATCHES: dict[str, Callable[[Config], dict]] = {
    'mmdet': detection_batch, 'mmseg': segmentation_batch, 'mmpretrain': classification_batch,
}


@pytest.mark.parametrize('name', CONFIGS)
def test_losses_are_finite_and_every_parameter_learns(name, open_config, build_model, param_groups):
    cfg = open_config(name)
    set_random_seed(0)
    data = BATCHES[cfg.default_scope](cfg)
    model = build_model(cfg)
    model.init_weights()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert set(param_groups(model, optim_wrapper)) == {
        param for param, value in model.named_parameters() if value.requires_grad}

    loss, losses = model.parse_losses(model(**model.data_preprocessor(data, training=True), mode='loss'))
    assert [key for key, value in losses.items() if not value.isfinite().all()] == []
    loss.backward()
    gradients = {param: value.grad for param, value in model.named_parameters() if value.requires_grad}
    assert [param for param, gradient in gradients.items() if gradient is None] == []
    assert [param for param, gradient in gradients.items() if not gradient.isfinite().all()] == []
    idle = [param for param, gradient in gradients.items() if not gradient.any()]
    assert [param for param in idle if not IDLE[cfg.default_scope].search(param)] == []


@pytest.mark.parametrize('name', CONFIGS)
def test_pipelines_hooks_and_schedule_build(name, open_config, tmp_path):
    cfg = open_config(name)
    for split in ('train', 'val', 'test'):
        for transform in cfg[f'{split}_dataloader'].dataset.pipeline:
            TRANSFORMS.build(transform)
    VISUALIZERS.build(dict(cfg.visualizer, name=f'{name}-{tmp_path}', save_dir=str(tmp_path)))
    for hook in (*cfg.default_hooks.values(), *cfg.get('custom_hooks', ())):
        HOOKS.build(hook)
    optim_wrapper = build_optim_wrapper(nn.Linear(1, 1), cfg.optim_wrapper)
    schedulers = [
        PARAM_SCHEDULERS.build(scheduler, default_args=dict(optimizer=optim_wrapper, epoch_length=10))
        if scheduler.get('convert_to_iter_based') else
        PARAM_SCHEDULERS.build(scheduler, default_args=dict(optimizer=optim_wrapper))
        for scheduler in cfg.param_scheduler
    ]
    assert schedulers


def test_pretrained_weights_are_those_of_the_arch(tmp_path):
    root = tmp_path / 'configs'
    shutil.copytree(config_root(), root)
    (root / '_base_' / 'pretrained.py').write_text(
        "pretrained = dict(m1='m1.pth', m2='m2.pth', m3='m3.pth', m4='m4.pth')\n")
    names = [name for name in CONFIGS if name.endswith(('_coco', '_ade20k'))]
    assert len(names) >= 12
    backbones = [Config.fromfile(root / f'{name}.py').model.backbone for name in names]
    found = [(backbone.arch, backbone.init_cfg.checkpoint) for backbone in backbones]
    assert [checkpoint for _, checkpoint in found] == [f'{arch}.pth' for arch, _ in found]
