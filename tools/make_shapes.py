"""Makes the shapes data set, a small stand-in for COCO: pictures of simple shapes in COCO's instance format.

    python tools/make_shapes.py data/shapes
    python tools/make_shapes.py data/shapes_large --num-train 4000 --num-val 500 --image-size 256

A folder that already holds the same set is left alone.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from convneur_mm.datasets.shapes import SPLITS, make_shapes_coco


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', metavar='OUT', help='folder to write to: missing, empty or made by this tool')
    parser.add_argument('--num-train', type=int, default=400, help='training images (default: %(default)s)')
    parser.add_argument('--num-val', type=int, default=100, help='validation images (default: %(default)s)')
    parser.add_argument('--image-size', type=int, default=160, help='side in pixels, 64 to 2048 (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='seed of everything random (default: %(default)s)')
    return parser.parse_args(argv)


def summary(root: Path) -> str:
    """Counts what the annotation files under ``root`` hold: a line for each split."""
    lines = [f'The shapes are in {root}']
    for split in SPLITS:
        content = json.loads((root / 'annotations' / f'instances_{split}.json').read_text(encoding='utf-8'))
        counts = Counter(annotation['category_id'] for annotation in content['annotations'])
        classes = ', '.join(f"{category['name']} {counts[category['id']]}" for category in content['categories'])
        lines.append(f"  {split}: {len(content['images'])} images, {len(content['annotations'])} objects: {classes}")
    return '\n'.join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        root = make_shapes_coco(args.out, args.num_train, args.num_val, args.image_size, args.seed)
    except (ValueError, OSError) as error:
        sys.exit(f'make_shapes: error: {error}')
    print(summary(root))


if __name__ == '__main__':
    main()
