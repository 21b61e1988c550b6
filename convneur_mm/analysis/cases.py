"""Models for benchmarks: backbones by themselves, and the same in a detector and in a segmentor.

The detector and the segmentor are those of the shipped ConvNeur configs; only the backbone and the matching input
channels are exchanged. Weights are random and nothing is frozen.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS as REGISTRY
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from .. import config
from ..models import ConvNeur, OverLoCK
from ..stack import require
from . import bench

OBJECTS = 128  # as many as a mask head trains on in an image, so that random proposals do not matter


class Task(NamedTuple):
    """Model in which a backbone is measured: title, shape of the images, and the shipped config, '' for none."""

    title: str
    shape: tuple[int, int, int]
    config: str = ''


TASKS = {
    'backbone': Task('backbone alone', (8, 224, 224)),
    'detector': Task('Cascade Mask R-CNN', (1, 800, 1344), 'cascade_rcnn_convneur_m1_1x_coco'),
    'segmentor': Task('Semantic FPN', (1, 512, 2048), 'semantic_fpn_convneur_m1_80k_ade20k'),
}


class Backbone(NamedTuple):
    """Settings of a backbone that returns four stages, and the stages' channels."""

    settings: dict[str, object]
    channels: tuple[int, int, int, int]


def _convneur(arch: str) -> Backbone:
    return Backbone(dict(type='ConvNeur', arch=arch), tuple(ConvNeur.arch_settings[arch]['channels']))


def _overlock(arch: str, *channels: int) -> Backbone:
    return Backbone(dict(type='OverLoCK', arch=arch), channels)


def _convnext_v2(arch: str, width: int) -> Backbone:
    return Backbone(dict(type='mmpretrain.ConvNeXt', arch=arch, use_grn=True, layer_scale_init_value=0.0,
                         out_indices=(0, 1, 2, 3), gap_before_final_norm=False),
                    (width, 2 * width, 4 * width, 8 * width))


BACKBONES = {
    **{f'ConvNeur-{arch}': _convneur(arch) for arch in ('m1', 'm2', 'm3', 'm4')},
    'OverLoCK-XT': _overlock('xt', 56, 112, 340, 420),
    'OverLoCK-T': _overlock('t', 64, 128, 384, 640),
    **{f'ConvNeXt-V2-{arch}': _convnext_v2(arch, width)
       for arch, width in (('atto', 40), ('femto', 48), ('pico', 64), ('nano', 80))},
    'PVTv2-B1': Backbone(dict(type='mmdet.PyramidVisionTransformerV2', embed_dims=64, num_layers=[2, 2, 2, 2]),
                         (64, 128, 320, 512)),
    'Swin-T': Backbone(dict(type='mmdet.SwinTransformer', embed_dims=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24],
                            window_size=7), (96, 192, 384, 768)),
    'ResNet-50': Backbone(dict(type='mmdet.ResNet', depth=50, norm_eval=False), (256, 512, 1024, 2048)),
}


def build(task: str, name: str, shape: tuple[int, int, int], memory_cfg: dict[str, object],
          merged: bool = False) -> nn.Module:
    """Build a model on the CPU, with random weights.

    Args:
        task (str): A key of :data:`TASKS`.
        name (str): A key of :data:`BACKBONES`, with '-local' for a ConvNeur without its memories; for the backbone
            alone also a name of timm's.
        shape (tuple[int, int, int]): Images, height and width; timm's Swin depends on it.
        memory_cfg (dict): Settings of ConvNeur's memories that replace the task's.
        merged (bool): Whether OverLoCK's parallel convolutions are merged, as for inference. Defaults to False.

    Raises:
        MissingPeer: If timm is needed and not installed.
        ValueError: If the name is unknown.
    """
    known, local = name.removesuffix('-local'), name.endswith('-local')
    if known not in BACKBONES:
        if task != 'backbone':
            raise ValueError(f'unknown model {name!r}: expected one of {", ".join(BACKBONES)}')
        return _from_timm(name, shape)
    backbone = BACKBONES[known]
    settings, frame = dict(backbone.settings), None
    # mmdet and mmpretrain register the other backbones.
    for package in ['mmdet.models', 'mmpretrain.models'] if settings['type'] not in ('ConvNeur', 'OverLoCK') else []:
        require(package)
    if TASKS[task].config:
        cfg = Config.fromfile(config(TASKS[task].config))
        require(f'{cfg.default_scope}.models')
        frame = cfg.model
    if settings['type'] == 'ConvNeur':
        memory = dict(frame.backbone.get('memory_cfg') or {}) if frame else {}
        settings |= dict(memory_cfg={**memory, **memory_cfg}, placement='none' if local else 'stage')
        if local:
            del settings['memory_cfg']
    MMLogger.get_current_instance().setLevel('ERROR')  # hides a line for each parameter's initialisation
    if frame is None:
        return _initialised(REGISTRY.build(settings), merged)
    frame.backbone = settings
    frame.neck.in_channels = list(backbone.channels)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        # SyncBN needs GPUs.
        return _initialised(revert_sync_batchnorm(REGISTRY.build(frame)), merged)


def _initialised(model: nn.Module, merged: bool) -> nn.Module:
    model.init_weights()
    backbone = getattr(model, 'backbone', model)
    if merged and isinstance(backbone, OverLoCK):
        backbone.switch_to_deploy()
    return model


def _from_timm(name: str, shape: tuple[int, int, int]) -> nn.Module:
    timm = bench.import_peer('timm')
    if not timm.is_model(name):
        raise ValueError(f'unknown model {name!r}: expected one of {", ".join(BACKBONES)}, or a name of timm')
    # Swin's windows and masks depend on the image size.
    extra = dict(img_size=shape[1:]) if name.startswith('swin') else {}
    return timm.create_model(name, pretrained=False, features_only=True, out_indices=(-4, -3, -2, -1), **extra)


def make_call(task: str, model: nn.Module, images: Tensor, mode: str, dtype: torch.dtype) -> Callable[[], None]:
    """Make a call of one forward, or forward and backward, pass of a model from :func:`build`.

    A detector's or segmentor's forward pass is its prediction from random images, its backward pass that of its loss
    on random targets. A backbone has no loss, so random gradients go into its outputs.
    """
    if task == 'backbone':
        return bench.make_call(model, images, mode, dtype)
    train = mode != 'forward'
    batch, _, height, width = images.shape
    if task == 'detector':
        samples = _detection_samples(batch, height, width, model.roi_head.bbox_head[-1].num_classes)
        infer = _DetectorInference(model, images, samples)
    else:
        samples = _segmentation_samples(batch, height, width, model.decode_head.num_classes)
        # Passing samples would keep the last call's scores, half a gigabyte, during the next call.
        infer = lambda: model.predict(images)  # noqa: E731

    def call() -> None:
        model.train(train)
        with torch.set_grad_enabled(train), bench.autocast(images.device, dtype):
            if not train:
                infer()
                return
            loss = _sum_losses(model, images, samples)
        loss.backward()
        model.zero_grad()

    return call


def _sum_losses(model: nn.Module, images: Tensor, samples: Sequence) -> Tensor:
    return model.parse_losses(model.loss(images, samples))[0]


class _DetectorInference:
    """Inference of a two-stage detector whose RoI heads get the same boxes for any weights.

    With random weights no object would be found, and no mask head would run. All parts run, including the RPN's choice
    of proposals and the suppression of overlapping boxes. But the box heads get ``max_per_img`` random proposals, and
    the mask heads the first ``max_per_img`` of these.
    """

    def __init__(self, model: nn.Module, images: Tensor, samples: Sequence) -> None:
        from mmengine.structures import InstanceData
        self.model, self.images, self.samples = model, images, samples
        proposals, detections = model.test_cfg.rpn.max_per_img, model.test_cfg.rcnn.max_per_img
        self.proposals = [InstanceData(bboxes=_boxes(proposals, *images.shape[2:])) for _ in samples]
        self.detections = [
            InstanceData(bboxes=result.bboxes[:detections], scores=torch.ones(detections),
                         labels=torch.zeros(detections, dtype=torch.long)) for result in self.proposals]

    def __call__(self) -> None:
        model, metas = self.model, [sample.metainfo for sample in self.samples]
        features = model.extract_feat(self.images)
        model.rpn_head.predict(features, self.samples, rescale=False)
        model.roi_head.predict_bbox(features, metas, self.proposals, model.roi_head.test_cfg)
        model.roi_head.predict_mask(features, metas, [result.clone() for result in self.detections], rescale=True)


def _meta(height: int, width: int) -> dict[str, object]:
    shape = height, width
    return dict(img_shape=shape, pad_shape=shape, ori_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0))


def _boxes(count: int, height: int, width: int) -> Tensor:
    """Draw boxes (count, 4), x1 y1 x2 y2, with log-uniform sides from 16 pixels to two thirds of the image."""
    limits = torch.tensor([width, height])
    sides = 16 * (limits / 24.0) ** torch.rand(count, 2)
    corners = torch.rand(count, 2) * (limits - sides)
    return torch.cat([corners, corners + sides], 1)


def _detection_samples(batch: int, height: int, width: int, classes: int) -> list:
    """Draw samples with ``OBJECTS`` rectangles each."""
    from mmengine.structures import InstanceData
    structures, masks = require('mmdet.structures'), require('mmdet.structures.mask')
    samples = []
    for _ in range(batch):
        boxes = _boxes(OBJECTS, height, width)
        polygons = [[box[[0, 1, 2, 1, 2, 3, 0, 3]]] for box in boxes.double().numpy()]
        sample = structures.DetDataSample(metainfo=_meta(height, width))
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.randint(classes, (OBJECTS,)),
                                           masks=masks.PolygonMasks(polygons, height, width))
        samples.append(sample)
    return samples


def _segmentation_samples(batch: int, height: int, width: int, classes: int) -> list:
    """Draw samples with a random class at every pixel."""
    from mmengine.structures import PixelData
    structures = require('mmseg.structures')
    samples = []
    for _ in range(batch):
        sample = structures.SegDataSample(metainfo=_meta(height, width))
        sample.gt_sem_seg = PixelData(data=torch.randint(classes, (1, height, width)))
        samples.append(sample)
    return samples
