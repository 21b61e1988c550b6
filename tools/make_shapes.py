#!/usr/bin/env python
"""Generate the shapes data set, a small stand-in for COCO, ADE20K or ImageNet: pictures of simple shapes.

    tools/make_shapes.py data/shapes
    tools/make_shapes.py data/shapes_large --num-train 4000 --num-val 500 --image-size 256
    tools/make_shapes.py data/shapes_ade20k --format ade20k
    tools/make_shapes.py data/shapes_imagenet --format imagenet --num-train 1200 --num-val 300

A folder that already holds the same set is not changed.
"""
import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

if __name__ == '__main__':
    from _environment import prepare
    prepare()

import cv2
import numpy as np

from convneur_mm.datasets import SHAPE_CLASSES, make_shapes_ade20k, make_shapes_coco, make_shapes_imagenet
from convneur_mm.datasets.shapes import SPLITS
from convneur_mm.datasets.shapes_formats import ADE20K_SPLITS
from convneur_mm.engine.files.errors import one_line_errors

MAKERS = {'coco': make_shapes_coco, 'ade20k': make_shapes_ade20k, 'imagenet': make_shapes_imagenet}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', metavar='OUT', help='output folder: missing, empty or made by this tool')
    parser.add_argument('--format', choices=list(MAKERS), default='coco',
                        help='layout: COCO instances, ADE20K label maps (of the same pictures), or ImageNet class '
                        'folders (of pictures with one object) (default: %(default)s)')
    parser.add_argument('--num-train', type=int, default=400, help='number of training images (default: %(default)s)')
    parser.add_argument('--num-val', type=int, default=100, help='number of validation images (default: %(default)s)')
    parser.add_argument('--image-size', type=int, default=160,
                        help='side length in pixels, 64 to 2048 (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='seed of everything random (default: %(default)s)')
    return parser.parse_args(argv)


def summary(root: Path, form: str) -> str:
    """Summarise the data set under ``root``, one line for each split."""
    lines = {'coco': coco_lines, 'ade20k': ade20k_lines, 'imagenet': imagenet_lines}[form](root)
    return '\n'.join([f'The shapes are in {root}', *(f'  {line}' for line in lines)])


def coco_lines(root: Path) -> Iterator[str]:
    for split in SPLITS:
        content = json.loads((root / 'annotations' / f'instances_{split}.json').read_text(encoding='utf-8'))
        counts = Counter(annotation['category_id'] for annotation in content['annotations'])
        classes = ', '.join(f"{category['name']} {counts[category['id']]}" for category in content['categories'])
        yield f"{split}: {len(content['images'])} images, {len(content['annotations'])} objects: {classes}"


def ade20k_lines(root: Path) -> Iterator[str]:
    names = 'background', *SHAPE_CLASSES
    for folder in ADE20K_SPLITS.values():
        paths = list((root / 'annotations' / folder).glob('*.png'))
        pixels = sum(np.bincount(cv2.imread(str(path), cv2.IMREAD_UNCHANGED).ravel(), minlength=len(names))
                     for path in paths)
        classes = ', '.join(f'{name} {share:.1%}' for name, share in zip(names, pixels / pixels.sum(), strict=True))
        yield f'{folder}: {len(paths)} images, pixels: {classes}'


def imagenet_lines(root: Path) -> Iterator[str]:
    for split in SPLITS:
        counts = {name: len(list((root / split / name).glob('*.jpg'))) for name in SHAPE_CLASSES}
        classes = ', '.join(f'{name} {count}' for name, count in counts.items())
        yield f'{split}: {sum(counts.values())} images: {classes}'


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors():
        root = MAKERS[args.format](args.out, args.num_train, args.num_val, args.image_size, args.seed)
    print(summary(root, args.format))


if __name__ == '__main__':
    main()
