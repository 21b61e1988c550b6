#!/usr/bin/env python
r"""Exports a classifier, a segmentor or the backbone of any config to ONNX, and compares the file with the model.

    # the config's own image size, one image
    tools/deploy/export_onnx.py configs/convneur_m3_300e_in1k.py CHECKPOINT --out m3.onnx
    # images of every size in batches of every size; the number of chunks follows
    tools/deploy/export_onnx.py configs/upernet_convneur_m3_80k_ade20k.py CHECKPOINT --out m3.onnx --dynamic
    # compared with the model at sizes of your own
    tools/deploy/export_onnx.py configs/convneur_m3_300e_in1k.py CHECKPOINT --out m3.onnx --dynamic \
        --check-shapes 224x224 16x384x384
    # of a detector, too
    tools/deploy/export_onnx.py configs/cascade_rcnn_convneur_m3_1x_coco.py CHECKPOINT --out m3.onnx --part backbone

The graph takes "image", (N, 3, H, W) of float32, RGB from 0 to 255, and normalises it as the config says. It returns
"scores", the logits (N, classes) of a classifier; "logits", (N, classes, H, W), of a segmentor; "stage0" … of a
backbone. Needs the packages of requirements/export.txt.
"""
import argparse
import copy
import importlib.util
import json
import math
import os
import os.path as osp
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

if __name__ == '__main__':
    sys.path.append(osp.dirname(osp.dirname(osp.realpath(__file__))))  # tools/
    from _environment import prepare
    prepare()
    from _known_warnings import hide
    hide()

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from torch import Tensor, nn

from convneur_mm.apis import init_model
from convneur_mm.engine.files.errors import one_line_errors
from convneur_mm.engine.launch import OverridesAction
from convneur_mm.models import NeuralMemory

# Sizes that a dynamic graph is compared at, (N, H, W): small, odd, and as large as a detector's images.
SIZES = ((1, 64, 64), (1, 224, 224), (2, 333, 517), (1, 512, 1024), (1, 800, 1344))
MAX_ERROR = 1e-4  # as a share of the largest value
MARGIN = 10  # how much farther than PyTorch in float32 a graph may be from float64


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('config', help='path or name of a config')
    add('checkpoint', nargs='?', help='path or URL of the weights; without it they are random')
    add('--out', required=True, type=Path, metavar='FILE', help='the file to write, .onnx')
    add('--part', choices=('model', 'backbone'), default='model', help='what to export (default: model)')
    add('--dynamic', action='store_true', help='leave batch, height and width open')
    add('--shape', type=int, nargs=2, metavar=('H', 'W'), help='height and width of the images (default: those of the '
        'config; not with --dynamic)')
    add('--batch-size', type=int, default=1, metavar='N', help='images (default: 1; not with --dynamic)')
    add('--check-shapes', type=shape_of, nargs='+', metavar='[Nx]HxW', help='with --dynamic: compare the file with the '
        f'model at these sizes (default: {" ".join("x".join(map(str, shape)) for shape in SIZES)})')
    add('--no-check', action='store_true', help='do not compare the file with the model')
    add('--cfg-options', nargs='+', action=OverridesAction, metavar='KEY=VALUE', help='overrides of the config')
    args = parser.parse_args(argv)
    if args.dynamic and (args.shape or args.batch_size != 1):
        parser.error('--shape and --batch-size are of a graph of one size: leave them or --dynamic out')
    if args.check_shapes and (args.no_check or not args.dynamic):
        parser.error('--check-shapes goes with --dynamic, and not with --no-check')
    if args.batch_size < 1 or min(args.shape or (32, 32)) < 32:
        parser.error(f'expected --batch-size of at least 1 and --shape of at least 32 x 32, got {args.batch_size} and '
                     f'{args.shape}')
    if args.out.suffix != '.onnx' or not args.out.absolute().parent.is_dir():
        parser.error(f'--out must be a file that ends with .onnx in a folder that exists, got {args.out}')
    missing = [name for name in ('onnx', 'onnxscript', *['onnxruntime'] * (not args.no_check))
               if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f'{", ".join(missing)} missing: pip install {" ".join(missing)}')
    return args


def shape_of(text: str) -> tuple[int, int, int]:
    """(N, H, W) of a word of the command line, such as 64x96 or 3x64x96.

    Raises:
        ArgumentTypeError: If it is none, or one of a graph that would have no pixel at a stride of 32.
    """
    found = re.fullmatch(r'(?:([1-9]\d*)x)?(\d+)x(\d+)', text)
    if not found or min(map(int, found.groups()[1:])) < 32:
        raise argparse.ArgumentTypeError(f'expected HxW or NxHxW of at least 32 x 32, such as 3x224x224, got {text!r}')
    number, height, width = found.groups()
    return int(number or 1), int(height), int(width)


class UncheckedGraphError(ValueError):
    """A graph is not known to compute what the model does."""


class Exported(nn.Module):
    """What the graph computes: normalisation, then the logits of a model or the features of its backbone.

    Args:
        model (BaseModel): A classifier or segmentor, or for ``part='backbone'`` any model with a backbone.
        part (str): 'model' or 'backbone'.

    Raises:
        ValueError: If the model is of neither kind, or its backbone has no ``out_indices``.
    """

    def __init__(self, model: BaseModel, part: str) -> None:
        super().__init__()
        settings = model.cfg.model.get('data_preprocessor') or model.cfg.get('data_preprocessor') or {}
        # Pictures are read as BGR; a model trained on them as they are sees them so here too.
        self.flip = not (settings.get('bgr_to_rgb') or settings.get('to_rgb'))
        for name, default in (('mean', 0.0), ('std', 1.0)):
            values = torch.tensor(settings.get(name) or [default] * 3, dtype=torch.float32)
            self.register_buffer(name, values.view(1, -1, 1, 1), persistent=False)
        self.model = model
        if part == 'backbone':
            if not hasattr(model.backbone, 'out_indices'):
                raise ValueError(f'a {type(model.backbone).__name__} has no out_indices, which name the outputs')
            self.names = tuple(f'stage{i}' for i in model.backbone.out_indices)
        elif model.cfg.default_scope == 'mmpretrain' and hasattr(model.head, 'fc'):
            self.names = ('scores',)
        elif model.cfg.default_scope == 'mmseg' and hasattr(model, 'encode_decode'):
            self.names = ('logits',)
        else:
            raise ValueError(f'{type(model).__name__} is neither a classifier nor a segmentor: export its backbone '
                             'with --part backbone')
        self.part = part

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, H, W), RGB from 0 to 255 → as ``names`` says."""
        x = (image.flip(1) if self.flip else image).sub(self.mean).div(self.std)
        model = self.model
        if self.part == 'backbone':
            return tuple(model.backbone(x))
        if self.names == ('scores',):
            return (model.head(model.extract_feat(x)),)
        features = model.extract_feat(x)
        logits = model.decode_head(features)
        return (F.interpolate(logits, size=x.shape[2:], mode='bilinear', align_corners=model.align_corners),)


class _Pool(nn.Module):
    """``nn.AdaptiveAvgPool2d`` to a fixed size from a size that the graph leaves open, as two matrix products."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, h, w)."""
        rows, columns = (self._means(x.size(2 + i), self.size[i], x) for i in range(2))
        return rows @ x @ columns.mT

    @staticmethod
    def _means(length: int, number: int, x: Tensor) -> Tensor:
        """(number, length): bin i goes from ⌊i·length / number⌋ to before ⌈(i + 1)·length / number⌉."""
        position = torch.arange(length, device=x.device)
        bins = torch.arange(number, device=x.device)[:, None]
        within = (position >= bins * length // number) & (position < ((bins + 1) * length + number - 1) // number)
        within = within.to(x.dtype)
        return within / within.sum(1, keepdim=True)


class _Upsample(nn.Module):
    """mmseg's ``Upsample`` by a whole factor; that one turns the size it computes into a constant of the graph."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.factor, self.mode, self.align_corners = int(of.scale_factor), of.mode, of.align_corners

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, factor·H, factor·W)."""
        size = tuple(self.factor * n for n in x.shape[2:])
        return F.interpolate(x, size, mode=self.mode, align_corners=self.align_corners)


def _replace(module: nn.Module) -> None:
    """Puts layers that follow the size of the image in the place of those that exporters cannot leave open."""
    for name, child in module.named_children():
        if isinstance(child, nn.AdaptiveAvgPool2d):
            size = child.output_size
            setattr(module, name, _Pool((size, size) if isinstance(size, int) else tuple(size)))
        elif type(child).__module__.startswith('mmseg.') and type(child).__name__ == 'Upsample' and not child.size:
            setattr(module, name, _Upsample(child))
        else:
            _replace(child)


def input_size(cfg: dict) -> tuple[int, int]:
    """Height and width that the config tests at, as far as it names them; else 224 x 224."""
    pipeline = (cfg.get('test_dataloader') or {}).get('dataset', {}).get('pipeline', [])
    for step in reversed(pipeline):
        size = step.get('crop_size') or (step.get('scale') if step.get('type') == 'Resize' else None)
        if size:
            width, height = (size, size) if isinstance(size, int) else size[:2]
            return height, width
    return 224, 224


def traced_shape(model: nn.Module) -> tuple[int, int, int]:
    """(N, H, W) that a dynamic graph is traced at.

    Every memory must have more than one chunk, and more than one token in each, as PyTorch's tracing takes a dimension
    of one for a constant; and no two sizes may be equal by chance, which it takes for one.
    """
    memories = [module for module in model.modules() if isinstance(module, NeuralMemory)]
    tokens = max((2 * memory.num_chunks if memory.num_chunks else memory.chunk_size for memory in memories), default=4)
    side = 32 * (math.isqrt(tokens) + 1)  # more tokens than that even at the last stage's stride of 32
    return 3, side, side + 32


def export(model: Exported, image: Tensor, dynamic: bool) -> 'torch.onnx.ONNXProgram':
    """The graph of ``model``, traced on ``image``."""
    # A copy, so that the file is compared with the layers that the model was trained with.
    model = copy.deepcopy(model)
    _replace(model)
    shapes, options = None, {}
    if dynamic:
        auto = torch.export.Dim.AUTO
        shapes = {'image': {0: auto, 2: auto, 3: auto}}
        options = dict(prefer_deferred_runtime_asserts_over_guards=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of PyTorch's exporter about its own functions
        program = torch.export.export(model, (image,), dynamic_shapes=shapes, strict=False, **options)
        return torch.onnx.export(program, dynamo=True, verbose=False, input_names=['image'],
                                 output_names=list(model.names))


def check(model: Exported, file: Path, sizes: Sequence[tuple[int, int, int]]) -> None:
    """Prints how far onnxruntime is from the model at each of ``sizes`` (N, H, W).

    Over many more chunks than it was trained on, a memory can multiply rounding errors until they are as large as the
    result. Where the model itself is that far from its own result in float64, nothing can be compared, and that is
    printed.

    Raises:
        UncheckedGraphError: If the graph computes something else than the model, or none of the sizes can be compared.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    compared = 0
    for size in sizes:
        image = torch.rand(size[0], 3, *size[1:], generator=torch.Generator().manual_seed(0)) * 255
        with torch.no_grad():
            expected = model(image)
        found = [torch.from_numpy(x) for x in session.run(None, {'image': image.numpy()})]
        errors = _errors(found, expected)
        error, largest = max(errors, key=lambda pair: pair[0] / pair[1])
        line = f'{" x ".join(map(str, size))}: largest error {error:.1e} at values of up to {largest:.1f}'
        if all(error <= MAX_ERROR * largest for error, largest in errors):
            compared += 1
            print(line, flush=True)
            continue
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(image.double())
        of_model = _errors(expected, exact)
        print(f'{line}; of PyTorch in float32 from float64 {max(error for error, _ in of_model):.1e}', flush=True)
        if not all(error <= max(MAX_ERROR * largest, MARGIN * rounding) for (error, largest), (rounding, _) in zip(
                _errors(found, exact), of_model)):
            raise UncheckedGraphError('the graph computes something else than the model; expected errors of at most '
                                      f'{MAX_ERROR:g} of the largest value')
        print('  cannot be compared: at this size the model multiplies rounding errors, in PyTorch too', flush=True)
    if not compared:
        raise UncheckedGraphError('no size could be compared, so that nothing shows that the graph is right; take '
                                  'smaller ones, or leave this out by --no-check')


def _errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[tuple[float, float]]:
    """Of each output the largest error, infinite for another shape, and the largest value, of at least 1."""
    return [((x - y).abs().max().item() if x.shape == y.shape else math.inf, max(1.0, y.abs().max().item()))
            for x, y in zip(found, expected)]


def main() -> None:
    args = parse_args()
    with one_line_errors():
        model = Exported(init_model(args.config, args.checkpoint, 'cpu', args.cfg_options), args.part).eval()
        write(model, args)
    print(f'{args.out}: {args.out.stat().st_size / 1e6:.1f} MB{", not checked" * args.no_check}')


def write(model: Exported, args: argparse.Namespace) -> None:
    """Export a model to ``args.out``, and check the graph unless ``args.no_check``.

    Raises:
        UncheckedGraphError: If the graph computes something else than the model; nothing is written then.
    """
    shape = traced_shape(model) if args.dynamic else (args.batch_size, *(args.shape or input_size(model.model.cfg)))
    image = torch.rand(shape[0], 3, *shape[1:]) * 255
    print(f'tracing {"images of any size" if args.dynamic else " x ".join(map(str, shape))}; this takes a minute',
          flush=True)
    # Under its own name only once it is known to be right.
    unchecked = args.out.with_name(f'{args.out.name}.unchecked')
    try:
        program = export(model, image, args.dynamic)
        program.model.metadata_props['classes'] = json.dumps(model.model.dataset_meta.get('classes', ()))
        program.save(str(unchecked))
        if not args.no_check:
            check(model, unchecked, (args.check_shapes or SIZES) if args.dynamic else [shape])
        os.replace(unchecked, args.out)
    except UncheckedGraphError as error:
        raise UncheckedGraphError(f'{args.out} is not written: {error}') from None
    finally:
        unchecked.unlink(missing_ok=True)


if __name__ == '__main__':
    main()
