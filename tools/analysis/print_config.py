#!/usr/bin/env python
r"""Print a config as tools/train.py would run it: bases joined, overrides and settings applied.

    tools/analysis/print_config.py configs/cascade_rcnn_convneur_m3_1x_coco.py
    tools/analysis/print_config.py cascade_rcnn_convneur_m3_1x_coco --key model.backbone \
        --cfg-options model.backbone.arch=m4
"""
import argparse
import runpy
from collections.abc import Sequence
from pathlib import Path

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / '_environment.py'))['prepare']()

from mmengine.config import Config

from convneur_mm.engine.files.errors import one_line_errors
from convneur_mm.engine.launch import add_config_arguments, config_of


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument('--key', metavar='KEY', help='print only this part, e.g. model.backbone or '
                        'train_dataloader.dataset.pipeline.0')
    parser.add_argument('--out', type=Path, metavar='FILE.py', help='write a self-contained config to FILE.py instead')
    return parser.parse_args(argv)


def part(cfg: Config, key: str) -> object:
    """Return the value of a dotted key; numbers are positions in a list.

    Raises:
        ValueError: If the key does not exist; names its longest existing part and what that holds.
    """
    value, found = cfg.to_dict(), ''
    for name in key.split('.'):
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, (list, tuple)) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            holds = (', '.join(sorted(map(str, value))) if isinstance(value, dict) else
                     f'0 to {len(value) - 1}' if isinstance(value, (list, tuple)) and value else repr(value))
            raise ValueError(f'--key {key}: there is no {name!r} in {found or "the config"}, which holds: {holds}')
        found = f'{found}.{name}' if found else name
    return value


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = config_of(args)
    if args.key:
        cfg = Config({args.key.replace('.', '_'): part(cfg, args.key)})
    if args.out is None:
        print(cfg.pretty_text)
    elif args.out.parent.is_dir():
        args.out.write_text(cfg.pretty_text, encoding='utf-8')
    else:
        raise ValueError(f'--out {args.out}: there is no folder {args.out.parent}')


if __name__ == '__main__':
    with one_line_errors():
        main()
