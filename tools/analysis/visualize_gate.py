#!/usr/bin/env python
"""Draw what the global branches of a trained model do with a picture, as in Figure 4 of the paper.

    tools/analysis/visualize_gate.py configs/semantic_fpn_convneur_m1_shapes.py CHECKPOINT picture.jpg

The sheet is a PNG. For each block with a global branch it shows the local features without any global path, before and
after the gate, the gate, and its influence on the picture. For each chunk of tokens it shows surprise, size of the
write, step, momentum and decay. docs/gate.md explains them.
"""
import argparse
import os
import os.path as osp
import runpy
from collections.abc import Sequence
from pathlib import Path

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / '_environment.py'))['prepare']()

import numpy as np

from convneur_mm.apis import init_model
from convneur_mm.engine import launch
from convneur_mm.visualization.sheet import draw_sheet
from convneur_mm.visualization.view import look


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    launch.add_model_arguments(parser)
    parser.add_argument('image', metavar='IMAGE', help='input picture')
    parser.add_argument('--out', type=Path, metavar='FILE.png', help='output file of the sheet (default: '
                        '<name of the picture>_gate.png in the current folder)')
    parser.add_argument('--arrays', type=Path, metavar='FILE.npz', help='also write all arrays to this file, see '
                        'docs/gate.md')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    out = args.out or Path(f'{Path(args.image).stem}_gate.png')
    # Check before building the model, which takes a while.
    for option, path, end in (('--out', out, '.png'), ('--arrays', args.arrays, '.npz')):
        if path is not None:
            check_output(option, path, end)
    if not osp.isfile(args.image):
        raise launch.LaunchError(f'IMAGE: no such file: {args.image}')
    model = init_model(args.config, args.checkpoint, args.device, args.cfg_options, args.allow_pickle)
    try:
        view = look(model, args.image)
    except ValueError as error:
        raise launch.LaunchError(f'{args.config}: {error}') from None
    title = f'{args.config}\n{args.checkpoint}\n{args.image}'
    draw_sheet(view.picture, view.parts, title).savefig(out)
    print(f'sheet of {len(view.parts)} blocks with a global branch: {out}')
    if args.arrays:
        arrays = view.arrays()
        np.savez_compressed(args.arrays, **arrays)
        print(f'{len(arrays)} arrays: {args.arrays}')


def check_output(option: str, path: Path, end: str) -> None:
    """Raise a LaunchError if a file is not writable, or its name has the wrong ending."""
    if path.suffix != end:
        raise launch.LaunchError(f'{option} must end in {end}, got {path}')
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise launch.LaunchError(f'{option}: {path.parent} is not a folder that can be written to')


if __name__ == '__main__':
    launch.run(main)
