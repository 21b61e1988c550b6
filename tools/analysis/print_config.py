#!/usr/bin/env python
r"""Print a config as tools/train.py would run it: bases joined, overrides and settings applied.

    tools/analysis/print_config.py configs/cascade_rcnn_convneur_m3_1x_coco.py
    tools/analysis/print_config.py cascade_rcnn_convneur_m3_1x_coco --key model.backbone \
        --cfg-options model.backbone.arch=m4
    tools/analysis/print_config.py configs/semantic_fpn_convneur_m3_finetune_80k_ade20k.py --optimizer
"""
import argparse
import runpy
from collections.abc import Sequence
from pathlib import Path

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / '_environment.py'))['prepare']()

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope

from convneur_mm.analysis import bench
from convneur_mm.engine.files.errors import one_line_errors
from convneur_mm.engine.launch import add_config_arguments, config_of


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument('--key', metavar='KEY', help='print only this part, e.g. model.backbone or '
                        'train_dataloader.dataset.pipeline.0')
    parser.add_argument('--optimizer', action='store_true', help='print learning rate and weight decay of each part of '
                        'the model instead')
    parser.add_argument('--out', type=Path, metavar='FILE.py', help='write a self-contained config to FILE.py instead')
    args = parser.parse_args(argv)
    if args.optimizer and (args.key or args.out):
        parser.error('--optimizer prints a table, without --key and --out')
    return args


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


def optimizer_table(cfg: Config) -> str:
    """Return a table of the parts of a config's model: number of weights, peak learning rate, and weight decay."""
    MMLogger.get_current_instance().setLevel('WARNING')  # the constructor logs each parameter
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    names = {id(param): name for name, param in model.named_parameters()}
    rows: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    for group in groups:
        for param in group['params']:
            key = part_and_kind(names[id(param)], param.ndim)
            rows.setdefault(key, []).append((param.numel(), group['lr'], group['weight_decay']))
    order = {key: number for number, key in enumerate(dict.fromkeys(
        part_and_kind(name, param.ndim) for name, param in model.named_parameters()))}
    return bench.format_table(('part', 'parameters', 'count', 'learning rate', 'weight decay'), [
        (*key, f'{sum(counts):,}', span(rates), span(decays))
        for key in sorted(rows, key=order.get) for counts, rates, decays in [zip(*rows[key])]])


def part_and_kind(name: str, ndim: int) -> tuple[str, str]:
    """Return the part of the model that a parameter belongs to, and what it is there."""
    words = name.split('.')
    place = '.'.join(words[:3 if words[1:2] in (['downsample_layers'], ['stages']) else 1])
    if '.memory.w' in name:
        return place, 'learned memory M_0'
    if '.generators.' in name:
        return place, 'update generators'
    kind = 'weights' if ndim > 1 else 'norms, biases, scales'
    return place, f'global branch: {kind}' if '.global_branch.' in name else kind


def span(values: Sequence[float]) -> str:
    return f'{min(values):.3g}' if min(values) == max(values) else f'{min(values):.3g} to {max(values):.3g}'


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = config_of(args)
    if args.optimizer:
        print(optimizer_table(cfg))
        return
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
