#!/usr/bin/env python
r"""Count parameters and FLOPs of a config's whole model, part by part, beside the paper's figures.

    tools/analysis/get_flops.py configs/convneur_m3_300e_in1k.py
    tools/analysis/get_flops.py configs/cascade_rcnn_convneur_m3_1x_coco.py --shape 800 1344 --json cost.json

FLOPs are multiply-accumulates of all convolutions and matrix products of one image at inference, the memory's inner
loop and attention included; norms, activations, pooling and interpolation are not counted. Everything runs on tensors
without data, so no weights are read and no GPU is needed. OverLoCK is counted as trained, with its auxiliary
classifier, and merged, without it.
"""
import argparse
import copy
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / '_environment.py'))['prepare']()

import torch
from torch import Tensor, nn

from convneur_mm.analysis.bench import format_table, write_json
from convneur_mm.analysis.flops import SHAPES, add_up, build_on_meta, count_flops, count_parameters, count_parts
from convneur_mm.analysis.paper import COSTS, Cost
from convneur_mm.engine.files.errors import one_line_errors
from convneur_mm.engine.launch import add_config_arguments, config_of, find_config
from convneur_mm.models import ConvNeur, NeuralMemory, OverLoCK
from convneur_mm.paths import config_root

PARTS = {'backbone': 'backbone', 'neck': 'neck', 'RPN': 'region proposal network', 'box heads': 'box heads',
         'mask heads': 'mask heads', 'head': 'head'}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument('--shape', nargs=2, type=int, metavar=('H', 'W'), help='height and width of the image '
                        '(default: 224 224 for a classifier, 800 1344 for a detector, 512 2048 for a segmentor)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all counts to FILE')
    return parser.parse_args(argv)


class StageCount(NamedTuple):
    """Multiply-accumulates of one stage of ConvNeur.

    Attributes:
        local (float): Downsampling layer, local branches, and the fusion of both branches.
        projections (float): 1×1 convolutions to the memory's channels and back, and the memory's linear layers for
            queries, keys, values and output.
        inner (float): Mixing of the tokens: reads, writes and update generators of the memory, or all of another branch
            between its two convolutions.
    """

    local: float
    projections: float
    inner: float


def count_stages(backbone: ConvNeur, image: Tensor) -> list[StageCount]:
    """Count each stage of ConvNeur; the stages add up to the whole."""
    inputs: dict[nn.Module, Tensor] = {}
    branches = [block.global_branch for stage in backbone.stages for block in stage if block.global_branch is not None]
    modules = [*backbone.downsample_layers, *backbone.stages, *branches]
    handles = [module.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]}))
               for module in modules]
    with torch.no_grad():
        backbone(image)
    for handle in handles:
        handle.remove()

    counts = []
    for downsample, stage in zip(backbone.downsample_layers, backbone.stages):
        whole = sum(count_flops(module, inputs[module]) for module in (downsample, stage))
        projections = inner = 0.0
        for block in stage:
            branch = block.global_branch
            if branch is None:
                continue
            batch, _, height, width = inputs[branch].shape
            tokens = batch * height * width
            linear = [branch.reduce, branch.expand]
            if isinstance(getattr(branch, 'memory', None), NeuralMemory):
                linear += [branch.memory.query, branch.memory.key, branch.memory.value, branch.memory.proj]
            projected = tokens * sum(layer.weight.numel() for layer in linear)
            projections += projected
            inner += count_flops(branch, inputs[branch]) - projected
        counts.append(StageCount(whole - projections - inner, projections, inner))
    return counts


def paper_figures(args: argparse.Namespace, shape: Sequence[int], scope: str) -> Cost | None:
    """Return the paper's figures if it has them for this config, unchanged, at this size."""
    path = Path(find_config(args.config)).resolve()
    root = config_root().resolve()
    if args.cfg_options or tuple(shape) != SHAPES[scope] or root not in path.parents:
        return None
    return COSTS.get(path.relative_to(root).with_suffix('').as_posix())


def measure(args: argparse.Namespace) -> dict:
    """Count the config's model.

    Raises:
        ValueError: If the model cannot be counted, or not at this size.
    """
    cfg = config_of(args)
    scope = cfg.get('default_scope')
    if scope not in SHAPES or not cfg.get('model'):
        raise ValueError(f'{args.config}: expected a model and a default_scope out of {", ".join(SHAPES)}, got '
                         f'default_scope {scope!r}')
    shape = tuple(args.shape or SHAPES[scope])
    if min(shape) < 32:
        raise ValueError(f'--shape must be at least 32 32, got {shape[0]} {shape[1]}')
    model, image = build_on_meta(cfg), torch.empty(1, 3, *shape, device='meta')
    try:
        parts = count_parts(model, image)
    except (RuntimeError, AssertionError, IndexError) as error:
        message = ' '.join(str(error).split())
        raise ValueError(f'{args.config}: its model fails on an image of {shape[0]} x {shape[1]}: '
                         f'{type(error).__name__}: {message}') from error
    result = dict(config=args.config, shape=shape, parts={name: part._asdict() for name, part in parts.items()},
                  total=add_up(parts)._asdict(), training_parameters=count_parameters(model))
    if isinstance(model.backbone, ConvNeur):
        result['stages'] = [stage._asdict() for stage in count_stages(model.backbone, image)]
    if 'box heads' in parts:
        result['boxes'] = dict(proposals=model.test_cfg.rpn.max_per_img, detections=model.test_cfg.rcnn.max_per_img)
    if isinstance(model.backbone, OverLoCK):
        merged = copy.deepcopy(model)
        merged.backbone.switch_to_deploy()
        if hasattr(getattr(merged, 'head', None), 'aux_head'):
            del merged.head.aux_head  # only used in training
        of_merged = count_parts(merged.to('meta'), image)
        result['merged'] = dict(backbone=of_merged['backbone']._asdict(), total=add_up(of_merged)._asdict())
    paper = paper_figures(args, shape, scope)
    result['paper'] = paper and paper._asdict()
    return result


def report(result: dict) -> str:
    """Format the counts as text."""
    def cells(name: str, count: dict) -> tuple[str, str, str]:
        return name, f'{count["parameters"] / 1e6:.2f}', f'{count["macs"] / 1e9:.3f}'

    height, width = result['shape']
    rows = [cells(PARTS[name], part) for name, part in result['parts'].items()]
    rows.append(cells('total', result['total']))
    if 'merged' in result:
        rows = [(f'{name}, as trained' if name in ('backbone', 'total') else name, *rest) for name, *rest in rows]
        rows += [cells(f'{name}, merged', count) for name, count in result['merged'].items()]
    if result['paper']:
        params = result['paper']['params_m']
        rows.append(('paper', '-' if params is None else f'{params:g}', f'{result["paper"]["gflops"]:g}'))
    blocks = [format_table((f'one image, {height} x {width}', 'params (M)', 'FLOPs (G)'), rows)]
    if 'stages' in result:
        stages = result['stages']
        lines = [(f'stage {i}', *(f'{value / 1e9:.3f}' for value in (*stage.values(), sum(stage.values()))))
                 for i, stage in enumerate(stages, 1)]
        sums = [sum(stage[key] for stage in stages) for key in StageCount._fields]
        lines.append(('backbone', *(f'{value / 1e9:.3f}' for value in (*sums, sum(sums)))))
        blocks.append(format_table(('FLOPs (G)', 'local', 'projections', 'inner loop', 'all'), lines))
    notes = ['FLOPs: multiply-accumulates of all convolutions and matrix products at inference.']
    if 'stages' in result:
        notes.append('projections: to the memory\'s channels and back; queries, keys, values and output. inner loop: '
                     'reads, writes and\n  update generators, or all of another branch between its two convolutions.')
    if 'boxes' in result:
        notes.append('{proposals} proposals go through every box head and {detections} boxes through every mask head, '
                     'the most that the config\n  lets through.'.format(**result['boxes']))
    extra = result['training_parameters'] - result['total']['parameters']
    if extra:
        notes.append(f'Another {extra / 1e6:.2f} M parameters work in training alone.')
    if result['paper'] and result['paper']['note']:
        notes.append(f'paper: {result["paper"]["note"]}.')
    return '\n\n'.join([*blocks, '\n'.join(notes)])


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.json and not args.json.absolute().parent.is_dir():
        raise ValueError(f'--json {args.json}: there is no folder {args.json.absolute().parent}')
    result = measure(args)
    print(report(result))
    if args.json:
        write_json(args.json, result)


if __name__ == '__main__':
    with one_line_errors():
        main()
