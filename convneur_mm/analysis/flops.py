"""Counting of parameters and FLOPs of modules and whole models, shared by all tools."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

Output = TypeVar('Output')
# Height and width at which a model is counted, by its package.
SHAPES = dict(mmpretrain=(224, 224), mmdet=(800, 1344), mmseg=(512, 2048))


class Count(NamedTuple):
    """Parameters of a part of a model, and its multiply-accumulates in one call.

    Attributes:
        norms (int): What MMEngine's ``get_model_complexity_info`` counts beside them: norms, pooling, upsampling.
    """

    parameters: int
    macs: float
    norms: int = 0


class _NormCounter(TorchDispatchMode):
    """Count of norms, pooling and upsampling, with the factors of MMEngine's counter."""

    INPUT_FACTORS = {torch.ops.aten.native_batch_norm: 2, torch.ops.aten.native_layer_norm: 5,
                     torch.ops.aten._adaptive_avg_pool2d: 1}
    OUTPUT_FACTORS = {torch.ops.aten.upsample_nearest2d: 1, torch.ops.aten.upsample_bilinear2d: 4}

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        operator = func.overloadpacket
        if operator in self.INPUT_FACTORS:
            self.total += self.INPUT_FACTORS[operator] * args[0].numel()
        elif operator in self.OUTPUT_FACTORS:
            self.total += self.OUTPUT_FACTORS[operator] * output.numel()
        return output


def count_parameters(module: nn.Module) -> int:
    """Count the parameters, including frozen ones, without buffers."""
    return sum(param.numel() for param in module.parameters())


def count_flops(module: nn.Module, *inputs: Tensor) -> float:
    """Count the multiply-accumulates of all convolutions and matrix products in one forward pass without gradients.

    The count is half that of :class:`FlopCounterMode`, plus the products of attention on a CPU, whose fused operator it
    does not know. On the meta device counting takes neither time nor memory.

    Args:
        module (nn.Module): Called in its current mode; set evaluation mode first if wanted.
        *inputs (Tensor): Its arguments, on its device.

    Returns:
        float: Multiply-accumulates.
    """
    return count_call(lambda: module(*inputs))[1]


def count_call(call: Callable[[], Output]) -> tuple[Output, float, int]:
    """Return the result of ``call``, its multiply-accumulates as :func:`count_flops` counts them, and its norms."""
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    # The FLOP counter decomposes batch norm before it passes it on, so the other mode comes first.
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter, _NormCounter() as norms:
        output = call()
    return output, counter.get_total_flops() / 2, norms.total


def count_parts(model: nn.Module, image: Tensor) -> dict[str, Count]:
    """Count a classifier, detector or segmentor at inference, part by part, up to its last products.

    A two-stage detector's RoI heads get the most boxes that its config allows, as their number depends on the image:
    ``test_cfg.rpn.max_per_img`` proposals go through every box head and ``test_cfg.rcnn.max_per_img`` boxes
    through every mask head. Parts used only in training, such as an auxiliary head, are not counted.

    Args:
        model (nn.Module): A model of mmpretrain, mmdet or mmseg, in evaluation mode.
        image (Tensor): (N, 3, H, W), on the model's device.

    Returns:
        dict[str, Count]: 'backbone', and the existing parts of 'neck', 'RPN', 'box heads', 'mask heads' and 'head'.

    Raises:
        ValueError: If ``model`` is of another kind.
    """
    counts: dict[str, Count] = {}

    def run(part: str, modules: Sequence[nn.Module], call: Callable[[], Output]) -> Output:
        output, *counted = count_call(call)
        counts[part] = Count(sum(count_parameters(module) for module in modules), *counted)
        return output

    head = next((getattr(model, name) for name in ('decode_head', 'bbox_head', 'head') if hasattr(model, name)), None)
    if not hasattr(model, 'backbone') or (head is None and not hasattr(model, 'roi_head')):
        raise ValueError('expected a classifier, detector or segmentor: a model with a backbone and a head, a '
                         f'decode_head, a bbox_head or a roi_head, got {type(model).__name__}')
    features = run('backbone', [model.backbone], lambda: model.backbone(image))
    if getattr(model, 'neck', None) is not None:
        features = run('neck', [model.neck], lambda: model.neck(features))
    if head is not None:
        run('head', [head], lambda: head(features))
        return counts

    if getattr(model, 'rpn_head', None) is not None:
        run('RPN', [model.rpn_head], lambda: model.rpn_head(features))
    roi_head, test_cfg = model.roi_head, model.test_cfg
    for part, kind, boxes in (('box heads', 'bbox', test_cfg.rpn.max_per_img),
                              ('mask heads', 'mask', test_cfg.rcnn.max_per_img)):
        if getattr(roi_head, f'{kind}_head', None) is None:
            continue
        heads, extractors = (_as_list(getattr(roi_head, f'{kind}_{name}')) for name in ('head', 'roi_extractor'))
        rois = [features[0].new_empty(boxes * len(image), extractor.out_channels, *extractor.roi_layers[0].output_size)
                for extractor in extractors]
        run(part, heads, lambda heads=heads, rois=rois: [head(roi) for head, roi in zip(heads, rois)])
    return counts


def add_up(parts: dict[str, Count]) -> Count:
    """Return the sum of the counts of :func:`count_parts`."""
    return Count(*map(sum, zip(*parts.values())))


def build_on_meta(cfg: Config) -> nn.Module:
    """Build a config's model on the meta device, in evaluation mode, without loading weights."""
    model = dict(cfg.model)
    if cfg.default_scope == 'mmpretrain':
        model.pop('train_cfg', None)  # Mixup and CutMix, of which mmpretrain would log a line among what a tool prints
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(model).eval().to('meta')


def _as_list(modules: nn.Module) -> list[nn.Module]:
    """Return the stages of a cascade, or the single module, as a list."""
    return list(modules) if isinstance(modules, nn.ModuleList) else [modules]


def _attention_flops(query: torch.Size, key: torch.Size, *args: object, **kwargs: object) -> int:
    """Count the FLOPs of q kᵀ and of its product with v, which the operator takes to be as wide as q."""
    return 4 * math.prod(query) * key[-2]
