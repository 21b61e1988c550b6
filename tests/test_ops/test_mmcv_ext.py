"""mmcv's operators by torchvision's: they compute what compiled mmcv does, or what their definitions say.

``data/mmcv_ops.npz`` holds what mmcv 2.3.6, compiled for torch 2.12.1 on a CPU, returns for the cases below. With such
an mmcv, ``python tests/test_ops/test_mmcv_ext.py`` writes it.
"""
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import convneur_mm  # noqa: F401 before mmcv.ops, which asks for the operators

VALUES = Path(__file__).parent / 'data' / 'mmcv_ops.npz'
pytestmark = pytest.mark.needs('mmcv')


class Numbers:
    """Draw the inputs of a case, the same with every version of PyTorch."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = np.random.default_rng(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.from_numpy(scale * self.generator.standard_normal(shape)).requires_grad_()

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.generator.random(shape))

    def boxes(self, count: int, size: float) -> torch.Tensor:
        """Return (count, 4) boxes, some of which lie partly outside of an image of this size."""
        corners = self.uniform(count, 2, 2) * 1.2 * size - 0.1 * size
        return torch.cat((corners.amin(1), corners.amax(1) + 1), dim=1)


def gradients(output: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Return the output and its gradients by the inputs, for a fixed weighting of its elements."""
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)]


def nms(offset: int, **options: float) -> list[torch.Tensor]:
    from mmcv.ops import nms
    numbers = Numbers()
    return list(nms(numbers.boxes(200, 50).float(), numbers.uniform(200).float(), 0.4, offset=offset, **options))


def soft_nms(method: str, offset: int) -> list[torch.Tensor]:
    from mmcv.ops import soft_nms
    numbers = Numbers()
    return list(soft_nms(numbers.boxes(100, 50).float(), numbers.uniform(100).float(), 0.3, 0.5, 0.1, method, offset))


def roi_align(aligned: bool, sampling_ratio: int) -> list[torch.Tensor]:
    from mmcv.ops import roi_align
    numbers = Numbers()
    x = numbers.normal(2, 3, 15, 20)
    rois = torch.cat((torch.tensor([[0.], [1.], [1.], [0.], [1.]]).double(), numbers.boxes(5, 35)), dim=1)
    return gradients(roi_align(x, rois, (4, 3), 0.5, sampling_ratio, 'avg', aligned), x)


def deform_conv(stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], groups: int,
                deform_groups: int) -> list[torch.Tensor]:
    from mmcv.ops import deform_conv2d
    numbers = Numbers()
    x, weight = numbers.normal(2, 4, 10, 9), numbers.normal(6, 4 // groups, 3, 2)
    size = F.conv2d(x, weight, None, stride, padding, dilation, groups).shape[2:]
    offset = numbers.normal(2, 2 * 6 * deform_groups, *size, scale=2.0)
    return gradients(deform_conv2d(x, offset, weight, stride, padding, dilation, groups, deform_groups), x, offset,
                     weight)


def modulated(groups: int, deform_groups: int, stride: int, offset_stride: int, with_bias: bool) -> list[torch.Tensor]:
    from mmcv.ops import modulated_deform_conv2d
    numbers = Numbers()
    x, weight, bias = numbers.normal(2, 4, 9, 8), numbers.normal(6, 4 // groups, 3, 3), numbers.normal(6)
    height, width = (9 - 1) // offset_stride + 1, (8 - 1) // offset_stride + 1
    offset = numbers.normal(2, 18 * deform_groups, height, width, scale=2.0)
    mask = numbers.uniform(2, 9 * deform_groups, height, width).requires_grad_()
    bias = bias if with_bias else None
    y = modulated_deform_conv2d(x, offset, mask, weight, bias, stride, 1, 1, groups, deform_groups)
    return gradients(y, *(z for z in (x, offset, mask, weight, bias) if z is not None))


CASES: dict[str, Callable[[], list[torch.Tensor]]] = {
    'nms': lambda: nms(0),
    'nms_offset': lambda: nms(1),
    'nms_limits': lambda: nms(0, score_threshold=0.3, max_num=20),
    **{f'soft_nms_{method}_{offset}': lambda method=method, offset=offset: soft_nms(method, offset)
       for method in ('naive', 'linear', 'gaussian') for offset in (0, 1)},
    **{f'roi_align_{aligned}_{ratio}': lambda aligned=aligned, ratio=ratio: roi_align(aligned, ratio)
       for aligned in (False, True) for ratio in (0, 2)},
    'deform_conv': lambda: deform_conv((1, 1), (1, 1), (1, 1), 1, 1),
    'deform_conv_general': lambda: deform_conv((2, 1), (1, 2), (1, 2), 2, 2),
    'modulated': lambda: modulated(1, 1, 1, 1, with_bias=False),
    'modulated_general': lambda: modulated(2, 2, 2, 2, with_bias=True),
    # As in DyHead, where offsets are those of a larger level.
    'modulated_larger_offset': lambda: modulated(1, 1, 2, 1, with_bias=True),
}


@pytest.mark.parametrize('name', CASES)
def test_values_and_gradients_are_those_of_compiled_mmcv(name):
    with np.load(VALUES) as file:
        expected = [file[key] for key in sorted(file.files) if key.rpartition('.')[0] == name]
    found = CASES[name]()
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-6 if ours.dtype == torch.float32 else 1e-12,
                                   atol=1e-7 if ours.dtype == torch.float32 else 1e-12)


# ---- what compiled mmcv has for GPUs alone, by its definition


def test_masked_convolution():
    from mmcv.ops import masked_conv2d
    numbers = Numbers()
    x, weight, bias = numbers.normal(1, 3, 7, 8), numbers.normal(5, 3, 3, 3), numbers.normal(5)
    mask = (numbers.uniform(1, 7, 8) > 0.6).double()
    torch.testing.assert_close(masked_conv2d(x, mask, weight, bias, 1), F.conv2d(x, weight, bias, padding=1) * mask)


def test_carafe():
    from mmcv.ops import carafe
    numbers = Numbers()
    k, groups, scale = 3, 2, 2
    x, masks = numbers.normal(2, 4, 3, 4), numbers.normal(2, groups * k * k, 6, 8)
    expected = torch.zeros(2, 4, 6, 8, dtype=torch.float64)
    padded = F.pad(x, (1, 1, 1, 1))
    for c in range(4):
        for i in range(6):
            for j in range(8):
                patch = padded[:, c, i // scale:i // scale + k, j // scale:j // scale + k].flatten(1)
                weights = masks[:, c // 2 * k * k:(c // 2 + 1) * k * k, i, j]
                expected[:, c, i, j] = (patch * weights).sum(1)
    for ours, theirs in zip(gradients(carafe(x, masks, k, groups, scale), x, masks), gradients(expected, x, masks)):
        torch.testing.assert_close(ours, theirs)


def test_multi_scale_attention():
    """Sampling points of two levels, some of them outside; on a CPU mmcv's layer would not call the operator."""
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
    numbers = Numbers()
    shapes = torch.tensor([[4, 5], [2, 3]])
    value, attention = numbers.normal(1, 26, 2, 3), numbers.normal(1, 2, 2, 2, 2)
    places = (numbers.uniform(1, 2, 2, 2, 2, 2) * 1.4 - 0.2).requires_grad_()
    y = MultiScaleDeformableAttnFunction.apply(value, shapes, torch.tensor([0, 20]), places, attention, 64)

    def pixel(level: int, head: int, row: int, column: int) -> torch.Tensor:
        height, width = shapes[level].tolist()
        if not (0 <= row < height and 0 <= column < width):
            return torch.zeros(3, dtype=torch.float64)
        return value[0, 20 * level + row * width + column, head]

    rows = []
    for query in range(2):
        for head in range(2):
            total = torch.zeros(3, dtype=torch.float64)
            for level in range(2):
                for point in range(2):
                    x, y0 = places[0, query, head, level, point] * shapes[level].flip(0) - 0.5
                    column, row = int(x.floor()), int(y0.floor())
                    dx, dy = x - column, y0 - row
                    sample = ((1 - dy) * (1 - dx) * pixel(level, head, row, column)
                              + (1 - dy) * dx * pixel(level, head, row, column + 1)
                              + dy * (1 - dx) * pixel(level, head, row + 1, column)
                              + dy * dx * pixel(level, head, row + 1, column + 1))
                    total = total + attention[0, query, head, level, point] * sample
            rows.append(total)
    expected = torch.stack(rows).view(1, 2, 6)
    for ours, theirs in zip(gradients(y, value, places, attention), gradients(expected, value, places, attention)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('weighted', [False, True])
def test_sigmoid_focal_loss(weighted):
    from mmcv.ops import sigmoid_focal_loss
    numbers = Numbers()
    x, target = numbers.normal(6, 3), torch.tensor([0, 1, 2, 3, 3, 1])  # 3 is the background
    weight = torch.tensor([0.5, 2.0, 3.0]).double() if weighted else None
    positive = F.one_hot(target, 4)[:, :3]
    p = x.sigmoid()
    expected = -torch.where(positive == 1, 0.25 * (1 - p) ** 2 * p.log(), 0.75 * p ** 2 * (1 - p).log())
    if weighted:
        expected = expected * torch.tensor([0.5, 2.0, 3.0, 1.0])[target][:, None]
    found = sigmoid_focal_loss(x, target, 2.0, 0.25, weight, 'none')
    for ours, theirs in zip(gradients(found, x), gradients(expected, x)):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(sigmoid_focal_loss(x, target, 2.0, 0.25, weight, 'mean'), expected.sum() / 6)


# ---- precision, memory formats, errors


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """It is that of the results alone: boxes are compared, and samples interpolated, in float32."""
    from mmcv.ops import deform_conv2d
    from mmcv.ops import nms as mmcv_nms
    from mmcv.ops import roi_align as mmcv_roi_align
    numbers = Numbers()
    boxes, scores = numbers.boxes(50, 50).to(dtype), numbers.uniform(50).to(dtype)
    x, weight, offset = (z.detach().to(dtype) for z in (
        numbers.normal(1, 2, 12, 12), numbers.normal(2, 2, 3, 3), numbers.normal(1, 18, 10, 10)))
    _, kept = mmcv_nms(boxes, scores, 0.4)
    _, expected = mmcv_nms(boxes.float(), scores.float(), 0.4)
    assert torch.equal(kept, expected) and 5 < len(kept) < 50
    rois = F.pad(boxes, (1, 0))
    for function in (lambda z: mmcv_roi_align(z, rois.to(z.dtype), 3, 0.2, 2),
                     lambda z: deform_conv2d(z, offset.to(z.dtype), weight.to(z.dtype))):
        half, whole = x.clone().requires_grad_(), x.float().requires_grad_()
        for ours, theirs in zip(gradients(function(half), half), gradients(function(whole), whole)):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, theirs.to(dtype), rtol=2 ** -6, atol=2 ** -6)


def test_features_in_channels_last():
    from mmcv.ops import roi_align as mmcv_roi_align
    numbers = Numbers()
    x, rois = numbers.normal(2, 3, 15, 20), F.pad(numbers.boxes(4, 30), (1, 0))
    expected = mmcv_roi_align(x, rois, 3, 0.5, 2)
    torch.testing.assert_close(mmcv_roi_align(x.to(memory_format=torch.channels_last), rois, 3, 0.5, 2), expected)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_boxes_that_are_not_finite_are_an_error(value):
    """torchvision's kernel would end the process."""
    from mmcv.ops import roi_align as mmcv_roi_align
    rois = F.pad(Numbers().boxes(4, 30), (1, 0))
    rois[2, 3] = value
    with pytest.raises(ValueError, match=rf'expected finite boxes, got 1 of 4 .*{value}'):
        mmcv_roi_align(torch.ones(1, 3, 15, 20).double(), rois, 3, 0.5, 2)


def test_an_operator_that_is_missing_says_who_uses_it_and_how_to_compile_it():
    from mmcv.ops import PSAMask, RoIAlign, box_iou_rotated
    with pytest.raises(NotImplementedError, match='psamask.*PSANet use.*MMCV_WITH_OPS=1 pip install'):
        PSAMask('collect', (3, 3))(torch.ones(1, 9, 2, 2))
    with pytest.raises(NotImplementedError, match='operator box_iou_rotated, which .*mmrotate'):
        box_iou_rotated(torch.ones(1, 5), torch.ones(1, 5))
    with pytest.raises(NotImplementedError, match="pool_mode='max'"):
        RoIAlign(3, pool_mode='max')(torch.ones(1, 1, 5, 5), torch.ones(1, 5))


def run(code: str, *paths: Path) -> subprocess.CompletedProcess:
    lines = '\n'.join(f'sys.path.insert(0, {str(path)!r})' for path in paths)
    return subprocess.run([sys.executable, '-c', f'import sys\n{lines}\n{code}'], capture_output=True, text=True)


def test_a_compiled_mmcv_keeps_its_own_operators(tmp_path):
    """The stand-in is asked for only where Python finds no other module of the name."""
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv' / '__init__.py').touch()
    (tmp_path / 'mmcv' / '_ext.py').write_text('nms = "compiled"')
    done = run('import convneur_mm.stack as stack, mmcv._ext\nprint(mmcv._ext.nms, stack.uses_compiled_mmcv())',
               tmp_path)
    assert done.stdout == 'compiled True\n', done.stderr


def test_packages_imported_too_early_are_named():
    done = run('import mmcv.cnn\nprint("now", file=sys.stderr)\nimport convneur_mm')
    assert 'mmcv.cnn was imported before convneur_mm' in done.stderr.partition('now')[2], done.stderr


if __name__ == '__main__':
    values = {f'{name}.{i}': x.numpy() for name, case in CASES.items() for i, x in enumerate(case())}
    np.savez_compressed(VALUES, **values)
    print(f'{VALUES}: {VALUES.stat().st_size} bytes')
