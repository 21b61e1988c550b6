"""The mmcv that the set-up compiles: all operators are in it, and they do what torchvision's do."""
import ast
import importlib
from pathlib import Path

import pytest
import torch
import torchvision
from mmcv import ops as mmcv_ops


def asked_for():
    """Names of compiled functions that the modules of mmcv.ops load, read from their sources."""
    names = set()
    for path in Path(mmcv_ops.__file__).parent.glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'load_ext':
                names |= set(ast.literal_eval(node.args[1]))
    return names


def test_all_operators_are_compiled():
    names = asked_for()
    assert len(names) > 90
    module = importlib.import_module('mmcv._ext')
    assert not names - set(dir(module))


def boxes(count, generator):
    corners = torch.rand(count, 2, 2, generator=generator, dtype=torch.float64) * 50
    return torch.cat((corners.amin(1), corners.amax(1) + 1), dim=1)


@pytest.mark.parametrize('aligned', [False, True])
def test_roi_align(aligned):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 30, 40, generator=generator, dtype=torch.float64, requires_grad=True)
    rois = torch.cat((torch.tensor([[0.], [1.], [1.], [0.]], dtype=torch.float64), boxes(4, generator)), dim=1)
    ours = mmcv_ops.roi_align(x, rois, (7, 5), 0.5, 2, 'avg', aligned)
    theirs = torchvision.ops.roi_align(x, rois, (7, 5), 0.5, 2, aligned)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, theirs)))


def test_nms():
    generator = torch.Generator().manual_seed(0)
    candidates = boxes(200, generator).float()
    scores = torch.rand(200, generator=generator)
    _, kept = mmcv_ops.nms(candidates, scores, iou_threshold=0.4)
    expected = torchvision.ops.nms(candidates, scores, 0.4)
    assert 20 < len(expected) < 180
    assert torch.equal(kept, expected)


@pytest.mark.parametrize('modulated', [False, True])
def test_deformable_convolution(modulated):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    x, weight, offset = random(2, 4, 12, 9), random(6, 4, 3, 3), random(2, 18, 12, 9)
    mask = random(2, 9, 12, 9).sigmoid() if modulated else None
    if modulated:
        ours = mmcv_ops.modulated_deform_conv2d(x, offset, mask, weight, None, 1, 1, 1, 1, 1)
    else:
        ours = mmcv_ops.deform_conv2d(x, offset, weight, 1, 1, 1, 1, 1)
    theirs = torchvision.ops.deform_conv2d(x, offset, weight, padding=1, mask=mask)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x, weight, offset), retain_graph=True)
                      for y in (ours, theirs))):
        torch.testing.assert_close(a, b)
