#!/usr/bin/env python
r"""Export a classifier, a segmentor or any config's backbone to ONNX, and compare the file with the model.

    # the config's own image size, one image
    tools/deploy/export_onnx.py configs/convneur_m3_300e_in1k.py CHECKPOINT --out m3.onnx
    # images and batches of any size; the number of chunks follows
    tools/deploy/export_onnx.py configs/upernet_convneur_m3_80k_ade20k.py CHECKPOINT --out m3.onnx --dynamic
    # compare with the model at your own sizes
    tools/deploy/export_onnx.py configs/convneur_m3_300e_in1k.py CHECKPOINT --out m3.onnx --dynamic \
        --check-shapes 224x224 16x384x384
    # the backbone of a detector
    tools/deploy/export_onnx.py configs/cascade_rcnn_convneur_m3_1x_coco.py CHECKPOINT --out m3.onnx --part backbone

The graph takes "image", (N, 3, H, W) of float32, RGB from 0 to 255, and normalises it as the config says. It returns
"scores", the logits (N, classes) of a classifier; "logits", (N, classes, H, W), of a segmentor; or "stage0" … of a
backbone. It needs the packages of requirements/export.txt.
"""
import argparse
import copy
import importlib.util
import json
import math
import os
import re
import runpy
import warnings
from collections.abc import Sequence
from pathlib import Path

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / '_environment.py'))['prepare']()

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from torch import Tensor, nn

from convneur_mm.apis import init_model
from convneur_mm.engine.files.errors import one_line_errors
from convneur_mm.engine.launch import OverridesAction
from convneur_mm.models import NeuralMemory

# Sizes (N, H, W) at which a dynamic graph is compared: small, odd, and as large as a detector's images.
SIZES = ((1, 64, 64), (1, 224, 224), (2, 333, 517), (1, 512, 1024), (1, 800, 1344))
MAX_ERROR = 1e-4  # as a fraction of the largest value
MARGIN = 10  # allowed error against float64, as a multiple of PyTorch's in float32


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('config', help='path or name of a config')
    add('checkpoint', nargs='?', help='path or URL of the weights (default: random weights)')
    add('--out', required=True, type=Path, metavar='FILE', help='output .onnx file')
    add('--part', choices=('model', 'backbone'), default='model', help='part to export (default: model)')
    add('--dynamic', action='store_true', help='make batch size, height and width dynamic')
    add('--shape', type=int, nargs=2, metavar=('H', 'W'), help='height and width of the images (default: those of the '
        'config; not with --dynamic)')
    add('--batch-size', type=int, default=1, metavar='N', help='images per batch (default: 1; not with --dynamic)')
    add('--check-shapes', type=shape_of, nargs='+', metavar='[Nx]HxW', help='with --dynamic: compare the file with the '
        f'model at these sizes (default: {" ".join("x".join(map(str, shape)) for shape in SIZES)})')
    add('--no-check', action='store_true', help='do not compare the file with the model')
    add('--cfg-options', nargs='+', action=OverridesAction, metavar='KEY=VALUE', help='override settings of the config')
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
    """Parse (N, H, W) from a command-line word such as 64x96 or 3x64x96.

    Raises:
        ArgumentTypeError: If it is malformed, or smaller than 32 x 32, which leaves no pixel at stride 32.
    """
    found = re.fullmatch(r'(?:([1-9]\d*)x)?(\d+)x(\d+)', text)
    if not found or min(map(int, found.groups()[1:])) < 32:
        raise argparse.ArgumentTypeError(f'expected HxW or NxHxW of at least 32 x 32, such as 3x224x224, got {text!r}')
    number, height, width = found.groups()
    return int(number or 1), int(height), int(width)


class UncheckedGraphError(ValueError):
    """Raised if a graph is not known to compute what the model does."""


class Exported(nn.Module):
    """The exported computation: normalisation, then a model's logits or its backbone's features.

    Args:
        model (BaseModel): A classifier or segmentor, or for ``part='backbone'`` any model with a backbone.
        part (str): 'model' or 'backbone'.

    Raises:
        ValueError: If the model is of neither kind, or its backbone has no ``out_indices``.
    """

    def __init__(self, model: BaseModel, part: str) -> None:
        super().__init__()
        settings = model.cfg.model.get('data_preprocessor') or model.cfg.get('data_preprocessor') or {}
        # Images are read as BGR. A model trained without conversion to RGB needs BGR here too.
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
        """Map (N, 3, H, W), RGB from 0 to 255, to the outputs called ``names``."""
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
    """``nn.AdaptiveAvgPool2d`` to a fixed size from an open size, as two matrix products."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, h, w)."""
        rows, columns = (self._means(x.size(2 + i), self.size[i], x) for i in range(2))
        return rows @ x @ columns.mT

    @staticmethod
    def _means(length: int, number: int, x: Tensor) -> Tensor:
        """Return the weights (number, length); bin i spans [⌊i·length / number⌋, ⌈(i + 1)·length / number⌉)."""
        position = torch.arange(length, device=x.device)
        bins = torch.arange(number, device=x.device)[:, None]
        within = (position >= bins * length // number) & (position < ((bins + 1) * length + number - 1) // number)
        within = within.to(x.dtype)
        return within / within.sum(1, keepdim=True)


class _Upsample(nn.Module):
    """mmseg's ``Upsample`` by an integer factor; the original makes its output size a constant of the graph."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.factor, self.mode, self.align_corners = int(of.scale_factor), of.mode, of.align_corners

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, factor·H, factor·W)."""
        size = tuple(self.factor * n for n in x.shape[2:])
        return F.interpolate(x, size, mode=self.mode, align_corners=self.align_corners)


def _replace(module: nn.Module) -> None:
    """Replace layers that exporters cannot leave open by ones that follow the image size."""
    for name, child in module.named_children():
        if isinstance(child, nn.AdaptiveAvgPool2d):
            size = child.output_size
            setattr(module, name, _Pool((size, size) if isinstance(size, int) else tuple(size)))
        elif type(child).__module__.startswith('mmseg.') and type(child).__name__ == 'Upsample' and not child.size:
            setattr(module, name, _Upsample(child))
        else:
            _replace(child)


def input_size(cfg: dict) -> tuple[int, int]:
    """Return the height and width at which the config tests, or 224 x 224 if it names none."""
    pipeline = (cfg.get('test_dataloader') or {}).get('dataset', {}).get('pipeline', [])
    for step in reversed(pipeline):
        size = step.get('crop_size') or (step.get('scale') if step.get('type') == 'Resize' else None)
        if size:
            width, height = (size, size) if isinstance(size, int) else size[:2]
            return height, width
    return 224, 224


def traced_shape(model: nn.Module) -> tuple[int, int, int]:
    """Return the (N, H, W) at which a dynamic graph is traced.

    Every memory must have more than one chunk, and more than one token in each, because PyTorch's tracing treats a
    dimension of size one as a constant. No two sizes may be equal, because it treats equal sizes as one.
    """
    memories = [module for module in model.modules() if isinstance(module, NeuralMemory)]
    tokens = max((2 * memory.num_chunks if memory.num_chunks else memory.chunk_size for memory in memories), default=4)
    side = 32 * (math.isqrt(tokens) + 1)  # gives more tokens than that even at the last stage's stride of 32
    return 3, side, side + 32


def export(model: Exported, image: Tensor, dynamic: bool) -> 'torch.onnx.ONNXProgram':
    """Return the graph of ``model``, traced on ``image``."""
    # Copy the model, so that the file is compared with the original layers.
    model = copy.deepcopy(model)
    _replace(model)
    shapes, options = None, {}
    if dynamic:
        auto = torch.export.Dim.AUTO
        shapes = {'image': {0: auto, 2: auto, 3: auto}}
        options = dict(prefer_deferred_runtime_asserts_over_guards=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # PyTorch's exporter warns about its own functions
        program = torch.export.export(model, (image,), dynamic_shapes=shapes, strict=False, **options)
        return torch.onnx.export(program, dynamo=True, verbose=False, input_names=['image'],
                                 output_names=list(model.names))


def check(model: Exported, file: Path, sizes: Sequence[tuple[int, int, int]]) -> None:
    """Print the error of onnxruntime against the model at each of ``sizes`` (N, H, W).

    With many more chunks than in training, a memory can amplify rounding errors to the size of the result. If the model
    itself is that far from its own float64 result, the size cannot be compared, and a line says so.

    Raises:
        UncheckedGraphError: If the graph and the model differ, or none of the sizes can be compared.
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
    """Return each output's largest error (infinite if shapes differ) and its largest value (at least 1)."""
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
        UncheckedGraphError: If the graph and the model differ; nothing is written then.
    """
    shape = traced_shape(model) if args.dynamic else (args.batch_size, *(args.shape or input_size(model.model.cfg)))
    image = torch.rand(shape[0], 3, *shape[1:]) * 255
    print(f'tracing {"images of any size" if args.dynamic else " x ".join(map(str, shape))}; this takes a minute',
          flush=True)
    # The file gets its own name only after the check.
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
