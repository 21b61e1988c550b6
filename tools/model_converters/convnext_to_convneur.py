#!/usr/bin/env python
"""Convert weights of a ConvNeXt or ConvNeXt-V2 to those of a ConvNeur of the same depths and channels.

    tools/model_converters/convnext_to_convneur.py convnextv2_nano_1k_224_ema.pt convneur_m4_from_v2.pth

The source is a file of timm, of the ConvNeXt and ConvNeXt-V2 authors, or of mmpretrain (also a detector or segmentor
with that backbone); the arch follows from its shapes. The result holds ConvNeur's backbone and, if the source has one,
its linear head. Before training it computes the same as the source: the convolution that makes a gate map from a
memory's output is zero, so the gate is sigmoid(0) = 1/2 everywhere, and the last layer of each gated block is doubled.
"""
import argparse
import io
import os.path as osp
import runpy
from pathlib import Path

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / '_environment.py'))['prepare']()

import torch

from convneur_mm.apis.convnext import LICENCES, convert, report
from convneur_mm.apis.sources import SOURCES, find_source
from convneur_mm.engine.files.checkpoint import checkpoint_weights, read_checkpoint
from convneur_mm.engine.files.errors import one_line_errors
from convneur_mm.engine.files.weights_file import CheckpointError, CheckpointNotFoundError
from convneur_mm.engine.files.whole_files import write_whole
from convneur_mm.models import ConvNeur


def check_paths(src: str, dst: str) -> None:
    """Raise a ValueError if SRC or DST is not usable."""
    if not osp.isfile(src):
        raise CheckpointNotFoundError(f'SRC: no such file: {src}')
    folder = osp.dirname(dst) or '.'
    if not osp.isdir(folder):
        raise ValueError(f'DST: no such folder: {folder} (of {dst})')
    if osp.isdir(dst) or not dst.endswith('.pth'):
        raise ValueError(f'DST must be the name of a file that ends in .pth, got {dst}')
    if osp.exists(dst) and osp.samefile(src, dst):
        raise ValueError(f'DST must be another file than SRC, got {dst} for both')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', metavar='SRC', help='source .pth, .pt or .safetensors file, or the name of one of '
                        'docs/weights.md that lies in weights/ or in the cache of huggingface_hub')
    parser.add_argument('dst', metavar='DST', help='output .pth file, in an existing folder')
    parser.add_argument('--arch', choices=list(ConvNeur.arch_settings),
                        help='fail if the source does not fit this arch (default: the arch that fits)')
    parser.add_argument('--allow-pickle', action='store_true',
                        help='read a file that holds more than tensors and plain values, which can run any code')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors():
        named = args.src in SOURCES
        src = str(find_source(args.src)) if named else args.src
        check_paths(src, args.dst)
        weights = checkpoint_weights(read_checkpoint(src, args.allow_pickle))
        try:
            done = convert(weights, args.arch)
        except CheckpointError as error:
            raise CheckpointError(f'{src}: {error}') from None
        meta = dict(source=osp.basename(args.src), version=done.version, layout=done.layout, arch=done.arch,
                    licence=SOURCES[args.src].licence if named else LICENCES[done.version])
        content = io.BytesIO()
        torch.save(dict(meta=meta, state_dict=done.weights), content)
        write_whole(args.dst, content.getvalue())
    print(report(done, meta['licence']))
    print(f"saved as {args.dst}; start from it with backbone.init_cfg=dict(type='Pretrained', "
          f'checkpoint={args.dst!r})')


if __name__ == '__main__':
    main()
