"""Models measured by tools/analysis/benchmark.py: backbones alone, in a detector and in a segmentor.

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

from convneur_mm import config
from convneur_mm.models import ConvNeur, OverLoCK
from convneur_mm.stack import require

OBJECTS = 128  # as many as a mask head trains on in an image, so that random proposals do not matter


class Task(NamedTuple):
    """Model in which a backbone is measured.

    Attributes:
        title (str): Title in the table.
        shape (tuple[int, int, int]): Images, height and width.
        config (str): The shipped config of the model, '' for none.
        compiled (bool): Whether it is also measured with ``torch.compile``.
    """

    title: str
    shape: tuple[int, int, int]
    config: str = ''
    compiled: bool = False


TASKS = {
    'backbone': Task('Backbone alone', (8, 224, 224), compiled=True),
    'detector': Task('Cascade Mask R-CNN', (1, 800, 1344), 'cascade_rcnn_convneur_m1_1x_coco'),
    'segmentor': Task('Semantic FPN', (1, 512, 2048), 'semantic_fpn_convneur_m1_80k_ade20k'),
}
MODES = ('inference', 'training')


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


YARDSTICK = 'the inference of ResNet-50 for 4 x 224 x 224'


def make_yardstick() -> Callable[[], None]:
    """Make a call of a few tenths of a second whose time measures the machine's current speed."""
    return make_call('backbone', build('backbone', 'ResNet-50', 'inference'), 'inference', (4, 224, 224))


def import_packages(task: str) -> None:
    """Import what :func:`build` needs, which takes as much memory as a small model."""
    for name in ('mmdet.models', 'mmpretrain.models', *['mmseg.models'] * (task == 'segmentor')):
        require(name)


def build(task: str, model: str, mode: str) -> nn.Module:
    """Build the model on the CPU, in the measured mode; for inference OverLoCK is merged.

    Args:
        task (str): A key of ``TASKS``.
        model (str): A key of ``BACKBONES``.
        mode (str): One of ``MODES``.
    """
    import_packages(task)
    backbone = BACKBONES[model]
    if not TASKS[task].config:
        module = whole = REGISTRY.build(backbone.settings)
    else:
        cfg = Config.fromfile(config(TASKS[task].config))
        settings, frame = dict(backbone.settings), cfg.model
        if settings['type'] == 'ConvNeur':  # use the task's memory settings
            settings = dict(frame.backbone, **settings)
            del settings['init_cfg']
        frame.backbone = settings
        frame.neck.in_channels = list(backbone.channels)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            # SyncBN needs GPUs.
            whole = revert_sync_batchnorm(REGISTRY.build(frame))
        module = whole.backbone
    # Hide the logs of each parameter's initialisation and of missing pretrained weights.
    MMLogger.get_current_instance().setLevel('ERROR')
    whole.init_weights()
    if mode == 'inference' and isinstance(module, OverLoCK):
        module.switch_to_deploy()
    whole.train(mode == 'training')  # mmpretrain's backbones return None
    return whole


def make_call(task: str, model: nn.Module, mode: str, shape: tuple[int, int, int],
              compiled: bool = False) -> Callable[[], None]:
    """Make a call of one inference or one training step on random images, for a model from :func:`build`.

    A training step is a forward pass, the loss, a backward pass and a step of AdamW. A backbone alone has no loss, so
    random gradients go into its outputs.
    """
    batch, height, width = shape
    images = torch.randn(batch, 3, height, width)
    if mode == 'training':
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    module = torch.compile(model) if compiled else model
    if task == 'backbone':
        loss = _Cotangents(module, images) if mode == 'training' else None
        infer = lambda: module(images)  # noqa: E731
    elif task == 'detector':
        samples = _detection_samples(batch, height, width, model.roi_head.bbox_head[-1].num_classes)
        loss = lambda: _sum_losses(model, images, samples)  # noqa: E731
        infer = _DetectorInference(model, images, samples)
    else:
        samples = _segmentation_samples(batch, height, width, model.decode_head.num_classes)
        loss = lambda: _sum_losses(model, images, samples)  # noqa: E731
        # Passing samples would keep the last call's scores, half a gigabyte, during the next call.
        infer = lambda: model.predict(images)  # noqa: E731

    def inference() -> None:
        with torch.no_grad():
            infer()

    def training() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return inference if mode == 'inference' else training


class _Cotangents:
    """Sum of a backbone's outputs times random numbers, which become the outputs' gradients."""

    def __init__(self, module: nn.Module, images: Tensor) -> None:
        self.module, self.images = module, images
        self.cotangents: list[Tensor] = []

    def __call__(self) -> Tensor:
        outputs = self.module(self.images)
        if not self.cotangents:
            self.cotangents = [torch.randn_like(output) for output in outputs]
        return sum((output * cotangent).sum() for output, cotangent in zip(outputs, self.cotangents))


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
