"""Replace mmcv's operators by those of torchvision and PyTorch, for an mmcv that was installed without compiling.

mmcv's Python files import their operators from one compiled module, ``mmcv._ext``. Where mmcv has none,
:mod:`convneur_mm.stack` makes Python load this file under that name. The functions here have the names, arguments and
effects of the compiled ones: most write their results into tensors that mmcv allocates. All are computed by torchvision
or PyTorch on the device of their inputs. bfloat16, and float16 on a CPU, are computed in float32, as torchvision has no
kernels for them. Any other operator of mmcv can be imported, and raises NotImplementedError when called.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torchvision import ops

# Users, among mmdet, mmseg and mmpretrain, of the mmcv operators that are missing here.
USERS = {
    'psamask': 'mmseg\'s PSANet', 'nms_match': 'mmdet\'s ScoreHLRSampler (PISA)',
    'line_nms': 'mmdet\'s CLRNet', 'deform_roi_pool': 'DeformRoIPoolPack and ModulatedDeformRoIPoolPack',
    'roi_pool': 'RoIPool layers', 'carafe_naive': 'CARAFENaive layers', 'softmax_focal_loss': 'SoftmaxFocalLoss',
}


# ---- boxes


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Return the indices of the boxes that non-maximum suppression keeps, by descending score.

    Args:
        boxes (Tensor): (N, 4), as x1, y1, x2, y2.
        scores (Tensor): (N,).
        iou_threshold (float): Boxes whose overlap with a better one exceeds this are dropped.
        offset (int): 0 or 1; the width of a box is x2 - x1 + offset.
    """
    boxes, scores = _computable(boxes, scores)
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return ops.nms(boxes, scores, iou_threshold)


def softnms(boxes: Tensor, scores: Tensor, dets: Tensor, iou_threshold: float, sigma: float, min_score: float,
            method: int, offset: int) -> Tensor:
    """Lower the scores of boxes that overlap better ones, and return the indices of the boxes that are kept.

    Args:
        boxes (Tensor): (N, 4), on the CPU.
        scores (Tensor): (N,).
        dets (Tensor): (N, 5); its first rows are overwritten by the boxes that are kept and their new scores.
        iou_threshold (float): For methods 0 and 1: smallest overlap that counts.
        sigma (float): For method 2: the width of the Gaussian.
        min_score (float): Boxes whose score falls below this are dropped.
        method (int): 0 drops boxes, 1 lowers scores linearly with the overlap, 2 by a Gaussian of the overlap.
        offset (int): See :func:`nms`.
    """
    boxes, scores, left = boxes.detach(), scores.detach().clone(), torch.arange(len(boxes))
    far = boxes[:, 2:] + offset
    area = (far - boxes[:, :2]).prod(1)
    kept = []
    while len(left):
        best = int(scores[left].argmax())
        chosen = left[best]
        dets[len(kept)] = torch.cat((boxes[chosen], scores[chosen, None]))
        kept.append(chosen)
        left = torch.cat((left[:best], left[best + 1:]))
        sides = torch.minimum(far[chosen], far[left]) - torch.maximum(boxes[chosen, :2], boxes[left, :2])
        common = sides.clamp(min=0).prod(1)
        overlap = common / (area[chosen] + area[left] - common)
        if method == 2:
            scores[left] *= torch.exp(-overlap.square() / sigma)
        else:
            scores[left] *= torch.where(overlap >= iou_threshold, 0 if method == 0 else 1 - overlap, 1)
        left = left[scores[left] >= min_score]
    return torch.stack(kept) if kept else left


# ---- features of boxes


def roi_align_forward(input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor,
                      aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int,
                      pool_mode: int, aligned: bool) -> None:
    """Write the features of boxes, averages of interpolated samples, into ``output``.

    Args:
        input (Tensor): (B, C, H, W), in any memory format.
        rois (Tensor): (N, 5), as image index, x1, y1, x2, y2.
        output (Tensor): (N, C, aligned_height, aligned_width), overwritten.
        argmax_y (Tensor): Not used, like ``argmax_x``, as both are for max pooling.
        argmax_x (Tensor): See ``argmax_y``.
        aligned_height (int): Rows of a box's features.
        aligned_width (int): Columns of a box's features.
        spatial_scale (float): Ratio of the size of the features to that of the image.
        sampling_ratio (int): Samples along each side of a bin, or 0 for as many as it has pixels.
        pool_mode (int): 1, average pooling.
        aligned (bool): Whether pixel centres lie at half-integer coordinates.

    Raises:
        NotImplementedError: If ``pool_mode`` is 0, max pooling.
        ValueError: If a box is NaN or infinite, on a CPU, where torchvision's kernel would end the process.
    """
    if pool_mode != 1:
        _missing('roi_align with pool_mode=\'max\'', 'RoIAlign layers with pool_mode=\'max\'')
    if rois.device.type == 'cpu' and not rois.isfinite().all():  # On a GPU this check would wait for the device.
        wrong = rois[~rois.isfinite().all(1)]
        raise ValueError(f'roi_align: expected finite boxes, got {len(wrong)} of {len(rois)} that are NaN or infinite, '
                         f'such as {wrong[0].tolist()} (image, x1, y1, x2, y2)')
    x, boxes = _computable(input, rois.to(input.dtype))
    output.copy_(ops.roi_align(x, boxes, (aligned_height, aligned_width), spatial_scale, sampling_ratio, aligned))


def roi_align_backward(grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor,
                       aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int,
                       pool_mode: int, aligned: bool) -> None:
    """Write the gradient of :func:`roi_align_forward` with respect to its input; arguments as there."""
    grad, boxes = _computable(grad_output, rois.to(grad_output.dtype))
    # torchvision has no public function for this, and going through autograd would repeat the forward pass.
    grad_input.copy_(torch.ops.torchvision._roi_align_backward(
        grad, boxes, spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned))


# ---- deformable convolutions


def deform_conv_forward(input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor,
                        **sizes: int) -> None:
    """Write a convolution whose samples are shifted by ``offset`` into ``output``.

    Args:
        input (Tensor): (B, C, H, W).
        weight (Tensor): (C', C / groups, kH, kW).
        offset (Tensor): (B, 2·groups'·kH·kW, H', W'), rows before columns.
        output (Tensor): (B, C', H', W'), overwritten.
        columns (Tensor): Not used, like ``ones``, as both are scratch space.
        ones (Tensor): See ``columns``.
        **sizes: kW, kH, dW, dH, padW, padH, dilationW, dilationH, group, deformable_group, im2col_step.
    """
    output.copy_(_deform_conv(input, offset, weight, **_geometry(sizes)))


def deform_conv_backward_input(input: Tensor, offset: Tensor, grad_output: Tensor, grad_input: Tensor,
                               grad_offset: Tensor, weight: Tensor, columns: Tensor, **sizes: int) -> None:
    """Write the gradients of :func:`deform_conv_forward` with respect to input and offset; arguments as there."""
    _write_gradients(lambda x, shift: _deform_conv(x, shift, weight, **_geometry(sizes)), (input, offset), grad_output,
                     (grad_input, grad_offset))


def deform_conv_backward_parameters(input: Tensor, offset: Tensor, grad_output: Tensor, grad_weight: Tensor,
                                    columns: Tensor, ones: Tensor, scale: float, **sizes: int) -> None:
    """Write ``scale`` times the gradient of :func:`deform_conv_forward` for its weight; arguments as there."""
    _write_gradients(lambda weight: _deform_conv(input, offset, weight, **_geometry(sizes)), (grad_weight,),
                     scale * grad_output, (grad_weight,))


def modulated_deform_conv_forward(input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor,
                                  mask: Tensor, output: Tensor, columns: Tensor, with_bias: bool, **sizes: int) -> None:
    """Write a deformable convolution whose samples are weighted by ``mask`` into ``output``.

    Args:
        input (Tensor): (B, C, H, W).
        weight (Tensor): (C', C / groups, kH, kW).
        bias (Tensor): (C',), or empty.
        ones (Tensor): Not used, like ``columns``, as both are scratch space.
        offset (Tensor): (B, 2·groups'·kH·kW, H', W'), rows before columns. It may be larger than the output, as in
            mmdet's DyHead. Like mmcv, this then uses each image's first numbers in memory order.
        mask (Tensor): (B, groups'·kH·kW, H', W'), or larger like ``offset``.
        output (Tensor): (B, C', H', W'), overwritten.
        columns (Tensor): See ``ones``.
        with_bias (bool): Whether there is a bias.
        **sizes: kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group.
    """
    output.copy_(_modulated(sizes, output.shape[2:], with_bias)(input, weight, bias, offset, mask))


def modulated_deform_conv_backward(input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor,
                                   mask: Tensor, columns: Tensor, grad_input: Tensor, grad_weight: Tensor,
                                   grad_bias: Tensor, grad_offset: Tensor, grad_mask: Tensor, grad_output: Tensor,
                                   with_bias: bool, **sizes: int) -> None:
    """Write the gradients of :func:`modulated_deform_conv_forward`; arguments as there."""
    found = grad_input, grad_weight, grad_bias, grad_offset, grad_mask
    _write_gradients(_modulated(sizes, grad_output.shape[2:], with_bias), (input, weight, bias, offset, mask),
                     grad_output, found)


def _geometry(sizes: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Return torchvision's arguments, as (rows, columns), from those of either convolution of mmcv."""
    names = ((('stride', ('stride_h', 'stride_w')), ('padding', ('pad_h', 'pad_w')),
              ('dilation', ('dilation_h', 'dilation_w'))) if 'stride_h' in sizes else
             (('stride', ('dH', 'dW')), ('padding', ('padH', 'padW')), ('dilation', ('dilationH', 'dilationW'))))
    return {name: (sizes[rows], sizes[columns]) for name, (rows, columns) in names}


def _deform_conv(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None,
                 **geometry: tuple[int, int]) -> Tensor:
    x, offset, weight, bias, mask = _computable(x, offset, weight, bias, mask)
    return ops.deform_conv2d(x, offset, weight, bias, mask=mask, **geometry)


def _modulated(sizes: dict[str, int], size: Sequence[int], with_bias: bool) -> Callable[..., Tensor]:
    """Return the modulated convolution as a function of its tensors, with an output of the size (H', W')."""

    def first(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :x.size(1) * size[0] * size[1]].reshape(len(x), x.size(1), *size)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return _deform_conv(x, first(offset), weight, bias if with_bias else None, first(mask), **_geometry(sizes))

    return convolve


# ---- masked convolution, upsampling, attention, loss


def masked_im2col_forward(features: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, data_col: Tensor, kernel_h: int,
                          kernel_w: int, pad_h: int, pad_w: int) -> None:
    """Write the patches around n positions of an image's features (1, C, H, W) into ``data_col`` (C·kH·kW, n)."""
    padded = F.pad(features[0], (pad_w, pad_w + kernel_w, pad_h, pad_h + kernel_h))
    rows = mask_h_idx[:, None] + torch.arange(kernel_h, device=features.device)
    columns = mask_w_idx[:, None] + torch.arange(kernel_w, device=features.device)
    patches = padded[:, rows[:, :, None], columns[:, None]]  # (C, n, kH, kW)
    data_col.copy_(patches.movedim(1, -1).flatten(0, 2))


def masked_col2im_forward(col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, output: Tensor, height: int, width: int,
                          channels: int) -> None:
    """Write the columns ``col`` (C, n) to n positions of ``output`` (1, C, height, width)."""
    output[0, :, mask_h_idx, mask_w_idx] = col


def carafe_forward(features: Tensor, masks: Tensor, rfeatures: Tensor, routput: Tensor, rmasks: Tensor, output: Tensor,
                   kernel_size: int, group_size: int, scale_factor: int) -> None:
    """Write features (B, C, H, W), upsampled by weighted sums of k × k neighbours, into ``output``.

    Args:
        features (Tensor): (B, C, H, W).
        masks (Tensor): Weights, (B, groups·k², s·H, s·W).
        rfeatures (Tensor): (B, C, H, W); overwritten by ``features``, for the backward pass.
        routput (Tensor): Not used, like ``rmasks``, as both are scratch space.
        rmasks (Tensor): See ``routput``.
        output (Tensor): (B, C, s·H, s·W), overwritten.
        kernel_size (int): k, an odd number.
        group_size (int): Number of channel groups, each with its own weights.
        scale_factor (int): s.
    """
    rfeatures.copy_(features)
    output.copy_(_carafe(features, masks, kernel_size, group_size, scale_factor))


def carafe_backward(grad_output: Tensor, rfeatures: Tensor, masks: Tensor, rgrad_output: Tensor, rgrad_input_hs: Tensor,
                    rgrad_input: Tensor, rgrad_masks: Tensor, grad_input: Tensor, grad_masks: Tensor, kernel_size: int,
                    group_size: int, scale_factor: int) -> None:
    """Write the gradients of :func:`carafe_forward` for features and masks; the tensors r… are scratch space."""
    _write_gradients(lambda x, weights: _carafe(x, weights, kernel_size, group_size, scale_factor), (rfeatures, masks),
                     grad_output, (grad_input, grad_masks))


def _carafe(features: Tensor, masks: Tensor, kernel: int, groups: int, scale: int) -> Tensor:
    batch, channels, height, width = features.shape
    patches = F.unfold(features, kernel, padding=kernel // 2).view(
        batch, groups, channels // groups, kernel ** 2, height, width)
    weights = masks.view(batch, groups, kernel ** 2, height, scale, width, scale)
    return torch.einsum('bgckhw,bgkhiwj->bgchiwj', patches, weights).reshape(
        batch, channels, height * scale, width * scale)


def ms_deform_attn_forward(value: Tensor, value_spatial_shapes: Tensor, value_level_start_index: Tensor,
                           sampling_locations: Tensor, attention_weights: Tensor, im2col_step: int) -> Tensor:
    """Return multi-scale deformable attention (B, queries, C), computed by mmcv's own function for CPUs.

    Args:
        value (Tensor): (B, keys of all levels, heads, C / heads).
        value_spatial_shapes (Tensor): (levels, 2), the height and width of each level.
        value_level_start_index (Tensor): Not used; it follows from ``value_spatial_shapes``.
        sampling_locations (Tensor): (B, queries, heads, levels, points, 2), as x, y from 0 to 1.
        attention_weights (Tensor): (B, queries, heads, levels, points).
        im2col_step (int): Not used.
    """
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch
    return multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_backward(value: Tensor, value_spatial_shapes: Tensor, value_level_start_index: Tensor,
                            sampling_locations: Tensor, attention_weights: Tensor, grad_output: Tensor,
                            grad_value: Tensor, grad_sampling_loc: Tensor, grad_attn_weight: Tensor,
                            im2col_step: int) -> None:
    """Write the gradients of :func:`ms_deform_attn_forward`; arguments as there."""

    def attend(values: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn_forward(values, value_spatial_shapes, value_level_start_index, locations, weights,
                                      im2col_step)

    _write_gradients(attend, (value, sampling_locations, attention_weights), grad_output,
                     (grad_value, grad_sampling_loc, grad_attn_weight))


def sigmoid_focal_loss_forward(input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float,
                               alpha: float) -> None:
    """Write the focal loss of each class into ``output``.

    Args:
        input (Tensor): Logits, (N, C).
        target (Tensor): Classes, (N,); C is the background.
        weight (Tensor): (C,), a factor for the rows of each class, or empty.
        output (Tensor): (N, C), overwritten.
        gamma (float): Focusing exponent.
        alpha (float): Weight of positives; negatives have 1 - alpha.
    """
    output.copy_(_focal_loss(input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float,
                                alpha: float) -> None:
    """Write the derivative of each loss of :func:`sigmoid_focal_loss_forward` for its logit; arguments as there."""
    _write_gradients(lambda x: _focal_loss(x, target, weight, gamma, alpha), (input,), torch.ones_like(input),
                     (grad_input,))


def _focal_loss(x: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    positive = target[:, None] == torch.arange(x.size(1), device=x.device)
    loss = ops.sigmoid_focal_loss(x, positive.to(x.dtype), alpha, gamma)
    if weight.numel():
        loss = loss * F.pad(weight, (0, 1), value=1)[target][:, None]  # the background has a weight of 1
    return loss


# ---- module attributes


def get_compiler_version() -> str:
    """Return the text shown as compiler version in MMEngine's list of the environment."""
    return 'none, mmcv is not compiled'


def get_compiling_cuda_version() -> str:
    """Return the origin of these operators, for MMEngine's list of the environment."""
    return f'operators of torchvision {torchvision.__version__}, by convneur_mm'


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """Return a function that raises, for a missing operator, as mmcv looks up all operators when imported."""
    if name.startswith('__'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        users = next((user for operator, user in USERS.items() if name.startswith(operator)), '')
        _missing(name, users or 'packages for 3D, rotated boxes or text, such as mmdet3d and mmrotate')

    return missing


def _missing(operator: str, users: str) -> NoReturn:
    from convneur_mm.stack import compile_command
    raise NotImplementedError(
        f'mmcv was installed without compiling, and convneur_mm has no substitute for its operator {operator}, which '
        f'{users} use. To compile mmcv, with a C++ compiler and, for GPUs, CUDA\'s nvcc: {compile_command()}')


# ---- helpers


def _computable(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors in a dtype for which torchvision has kernels on their device."""
    first = tensors[0]
    lacking = first.dtype == torch.bfloat16 or (first.dtype == torch.float16 and first.device.type == 'cpu')
    return [x.float() if lacking and x is not None else x for x in tensors]


def _write_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor,
                     gradients: Sequence[Tensor]) -> None:
    """Write the gradients of ``function(*inputs)`` into the tensors ``gradients``, by autograd."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in inputs]
        output = function(*inputs)
    found = torch.autograd.grad(output, inputs, grad_output.to(output.dtype), allow_unused=True)
    for target, gradient in zip(gradients, found, strict=True):
        if gradient is not None:  # an empty bias does not affect the output
            target.copy_(gradient)
