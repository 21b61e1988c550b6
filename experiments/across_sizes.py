#!/usr/bin/env python
"""Measure a segmentor that was trained on small pictures on larger ones, whose objects have the same size in pixels.

    tools/quickstart.sh --task seg
    experiments/across_sizes.py configs/semantic_fpn_convneur_m1_shapes.py work_dirs/quickstart_seg/train/iter_1850.pth

A larger picture is a mosaic of validation pictures, all of one size, chosen at random, and cut to the wanted size. The
columns are mean IoU over the classes, how far the logits in float32 are from those in float64, relative to the largest,
and the share of pixels to which float64 gives another label.
"""
import argparse
import copy
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / 'tools/_environment.py'))['prepare']()

import torch
import torch.nn.functional as F
from _small_tasks import IGNORED, mean_iou
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, DefaultScope
from mmseg.structures import SegDataSample
from torch import Tensor

from convneur_mm.analysis import bench
from convneur_mm.apis import init_model
from convneur_mm.engine import launch

SIZES = ((96, 96), (333, 517), (384, 384), (560, 560), (768, 768), (800, 1344))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    launch.add_model_arguments(parser)
    parser.add_argument('--sizes', nargs='+', type=size_of, default=SIZES, metavar='HxW', help='heights and widths of '
                        'mosaics (default: ' + ' '.join(f'{height}x{width}' for height, width in SIZES) + ')')
    parser.add_argument('--pixels', type=int, default=2_400_000, metavar='N',
                        help='pixels to measure at each size; at least one mosaic (default: %(default)s)')
    return parser.parse_args(argv)


def size_of(text: str) -> tuple[int, int]:
    """Return height and width of text such as 800x1344."""
    height, width = map(int, text.split('x'))
    if min(height, width) < 32:
        raise argparse.ArgumentTypeError(f'a side must be at least 32, got {text}')
    return height, width


def pictures_of(cfg: dict) -> tuple[Tensor, Tensor]:
    """Return a config's validation pictures (number, 3, H, W) and labels (number, H, W), made as large as the pictures.

    Raises:
        ValueError: If they differ in size.
    """
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        dataset = DATASETS.build(copy.deepcopy(cfg.val_dataloader.dataset))
    samples = [dataset[index] for index in range(len(dataset))]
    shapes = sorted({tuple(sample['inputs'].shape[1:]) for sample in samples})
    if len(shapes) > 1:
        raise ValueError(f'the validation pictures must have one size for a mosaic, got {shapes[0]} and {shapes[-1]}')
    # Labels have the size of the file, pictures that of the test pipeline.
    labels = torch.cat([F.interpolate(sample['data_samples'].gt_sem_seg.data[None].float(), shapes[0])[0]
                        for sample in samples]).long()
    return torch.stack([sample['inputs'] for sample in samples]), labels.masked_fill(labels == 255, IGNORED)


def mosaics(pictures: Tensor, labels: Tensor, size: tuple[int, int], pixels: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield mosaics (1, 3, H, W) of ``size`` and their labels (1, H, W), at least ``pixels`` in all."""
    height, width = pictures.shape[2:]
    rows, columns = -(-size[0] // height), -(-size[1] // width)
    g = torch.Generator().manual_seed(0)
    for _ in range(max(1, pixels // (size[0] * size[1]))):
        chosen = torch.randint(len(pictures), (rows, columns), generator=g)
        picture = pictures[chosen].permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        label = labels[chosen].permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        yield picture[None, :, :size[0], :size[1]], label[None, :size[0], :size[1]]


def logits_of(model: BaseModel, picture: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the logits of a picture, (1, classes, H, W), computed in ``dtype``."""
    inputs = model.data_preprocessor(dict(inputs=list(picture), data_samples=[SegDataSample()]))['inputs'].to(dtype)
    logits = model.to(dtype)(inputs, mode='tensor')
    logits = F.interpolate(logits, inputs.shape[2:], mode='bilinear', align_corners=model.align_corners)
    return logits[..., :picture.size(2), :picture.size(3)]  # without the preprocessor's padding


@torch.no_grad()
def row(model: BaseModel, pictures: Tensor, labels: Tensor, size: tuple[int, int], pixels: int) -> tuple[str, ...]:
    predicted, truth, error, other = [], [], 0.0, 0.0
    for number, (picture, label) in enumerate(mosaics(pictures, labels, size, pixels)):
        logits = logits_of(model, picture, torch.float32)
        predicted.append(logits.argmax(1))
        truth.append(label)
        if number == 0:  # float64 takes long
            exact = logits_of(model, picture, torch.float64)
            error = ((logits - exact).abs().max() / exact.abs().max()).item()
            other = (exact.argmax(1) != predicted[0]).double().mean().item()
    iou = mean_iou(torch.cat(predicted), torch.cat(truth), logits.size(1))
    print(f'{size[0]} x {size[1]}: {iou:.3f}', file=sys.stderr, flush=True)
    return f'{size[0]} x {size[1]}', str(len(truth)), f'{iou:.3f}', f'{error:.1e}', f'{100 * other:.2f} %'


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    model = init_model(args.config, args.checkpoint, args.device, args.cfg_options, args.allow_pickle)
    pictures, labels = pictures_of(model.cfg)
    rows = [row(model, pictures, labels, size, args.pixels) for size in args.sizes]
    print(bench.format_table(('size', 'mosaics', 'mean IoU', 'float32 from float64', 'other labels'), rows))


if __name__ == '__main__':
    launch.run(main)
