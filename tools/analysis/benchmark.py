#!/usr/bin/env python
r"""Measure time and memory of ConvNeur beside other backbones, alone or in a model, or of its memories within it.

    # ConvNeur and its peers at 8 x 224 x 224
    tools/analysis/benchmark.py
    # selected models at a detector's size; -local is the same backbone without its memories
    tools/analysis/benchmark.py ConvNeur-m3 ConvNeur-m3-local convnextv2_pico --shape 1,800,1344 --chunk-size 4096
    # in Cascade Mask R-CNN, or in Semantic FPN
    tools/analysis/benchmark.py ConvNeur-m3 ResNet-50 --task detector
    # the share of the memories in the backbone's time, at the paper's two settings
    tools/analysis/benchmark.py ConvNeur-m3 --split

Every backbone maps images to the feature maps of its last four stages. A backbone alone may also have a name of timm's.
"""
import argparse
import copy
import runpy
from collections.abc import Sequence
from pathlib import Path

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / '_environment.py'))['prepare']()

import torch
from torch import Tensor, nn

from convneur_mm.analysis import bench, cases
from convneur_mm.analysis.bench import MissingPeer
from convneur_mm.analysis.flops import add_up, count_flops, count_parameters, count_parts
from convneur_mm.engine.files.errors import one_line_errors
from convneur_mm.models.global_branch import GlobalBranch
from convneur_mm.ops.neural_memory import BACKENDS, UPDATE_RULES

OURS = tuple(name for name in cases.BACKBONES if name.startswith('ConvNeur'))
# (shape, chunk size, inner step) for classification and COCO.
SPLIT_SETTINGS = (((8, 224, 224), 196, 1.0), ((1, 800, 1344), 4096, 1e-3))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', metavar='MODEL',
                        help=f'models: {", ".join(cases.BACKBONES)}, or timm names (default: all of these; ConvNeur-m3 '
                        'for --split)')
    parser.add_argument('--task', choices=list(cases.TASKS), default='backbone', help='measure backbones alone or in '
                        'this model (default: %(default)s)')
    parser.add_argument('--split', action='store_true',
                        help="measure the share of the four memories in each model's time; without --shape at "
                        + ' and '.join(f'{"x".join(map(str, shape))} with chunks of {chunk} and inner step {step:g}'
                                       for shape, chunk, step in SPLIT_SETTINGS))
    parser.add_argument('--shape', metavar='B,H,W', help='batch size, height and width (default: '
                        + '; '.join(f'{name} {",".join(map(str, task.shape))}' for name, task in cases.TASKS.items())
                        + ')')
    parser.add_argument('--chunk-size', type=int, metavar='L', help="tokens per chunk (default: the task's)")
    parser.add_argument('--inner-step', type=float, help="factor of the generated step (default: the task's)")
    parser.add_argument('--rule', choices=UPDATE_RULES, default='sequential', help='update rule (default: %(default)s)')
    parser.add_argument('--backend', choices=['auto', *BACKENDS], default='auto',
                        help="implementation of the memory (default: %(default)s)")
    bench.add_common_arguments(parser, repeats=10)
    args = parser.parse_args(argv)
    if not args.models:
        args.models = ['ConvNeur-m3'] if args.split else list(cases.BACKBONES)
    return args


def parse_shape(text: str) -> tuple[int, int, int]:
    """Parse 'B,H,W' as three integers.

    Raises:
        ValueError: If it is malformed, or the sides are not multiples of 32, which a detector would pad.
    """
    try:
        batch, height, width = (int(part) for part in text.split(','))
    except ValueError:
        raise ValueError(f'--shape must be B,H,W, three integers, got {text!r}') from None
    if batch < 1 or min(height, width) < 32 or height % 32 or width % 32:
        raise ValueError(f'--shape must be at least one image with sides that are multiples of 32, got {text!r}')
    return batch, height, width


# ---- models


def count_macs(module: nn.Module, x: Tensor) -> int:
    """Count the multiply-accumulates of one forward pass at inference; of a detector or segmentor, of all its parts."""
    module = copy.deepcopy(module).to('meta')
    module.eval()  # some of mmpretrain's return None
    image = torch.empty_like(x, device='meta', dtype=next(module.parameters()).dtype)
    if hasattr(module, 'backbone'):
        return int(add_up(count_parts(module, image)).macs)
    return int(count_flops(module, image))


# ---- runs


class Run(bench.Benchmark):
    """One run of the benchmark."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.shape = parse_shape(args.shape) if args.shape else cases.TASKS[args.task].shape
        self.memory_cfg = dict(update_rule=args.rule, backend=args.backend)
        for name in ('chunk_size', 'inner_step'):
            if getattr(args, name) is not None:
                self.memory_cfg[name] = getattr(args, name)

    def images(self, shape: tuple[int, int, int]) -> Tensor:
        return self.random(shape[0], 3, *shape[1:])

    def measure_modules(self, modules: dict[str, nn.Module], inputs: dict[str, Tensor], mode: str, label: str,
                        optional: Sequence[str] = ()) -> dict[str, bench.Measurement]:
        """Measure all modules side by side, each on its own input."""
        calls = {name: cases.make_call(self.args.task, module, inputs[name], mode, self.dtype)
                 for name, module in modules.items()}
        return self.measure(calls, label, optional, mode=mode)

    def compare(self) -> list[dict]:
        """Compare whole models."""
        args, shape = self.args, self.shape
        bench.check_baseline(args.baseline, args.models)
        if args.compile and args.task != 'backbone':
            raise ValueError(f'--compile is for backbones alone, got --task {args.task}')
        images = self.images(shape)
        size = ' x '.join(map(str, shape))
        rows = []
        for mode in self.modes:
            modules, about = {}, {}
            for name in args.models:
                self.progress(f'building {name}')
                try:
                    module = cases.build(args.task, name, shape, self.memory_cfg, merged=mode == 'forward')
                except MissingPeer as missing:
                    self.skip(name, str(missing))
                    continue
                about[name] = dict(parameters=count_parameters(module), macs=count_macs(module, images))
                modules[name] = self.prepare(module)
            results = self.measure_modules(
                modules, dict.fromkeys(modules, images), mode, mode,
                [name for name in modules if not name.startswith('ConvNeur')])
            if not results:
                continue
            baseline = self.baseline_of(results)
            of_mode = bench.result_rows(results, baseline, mode=mode, shape=shape)
            for row in of_mode:
                row.update(about[row['name']], images_per_s=shape[0] / row['median_s'])
            rows += of_mode
            print(f'\n{cases.TASKS[args.task].title}, {mode}, {size}; {len(of_mode[0]["times_s"])} rounds')
            print(bench.format_table(
                ('', 'params M', 'GMAC', 'images/s', 'median ms', 'min ms', 'spread', f'time / {baseline}', 'peak MiB'),
                [(row['name'], f'{row["parameters"] / 1e6:.1f}', f'{row["macs"] / shape[0] / 1e9:.2f}',
                  f'{row["images_per_s"]:.4g}', *bench.time_cells(row)) for row in of_mode]))
        if args.plot and rows:
            bench.plot_bars(args.plot, bench.time_and_memory(rows), size)
        return rows

    def split(self) -> list[dict]:
        """Measure the memories' share of each of our models, at one setting or at the two usual ones."""
        args = self.args
        bench.check_baseline(args.baseline, ['backbone'])
        unknown = [name for name in args.models if name not in OURS]
        if unknown or args.task != 'backbone':
            raise ValueError(f'--split is for {", ".join(OURS)} alone, got {unknown or args.task}')
        settings = SPLIT_SETTINGS if args.shape is None else (
            (self.shape, args.chunk_size or 196, 1.0 if args.inner_step is None else args.inner_step),)
        rows = []
        for name in args.models:
            for shape, chunk_size, inner_step in settings:
                rows += self.split_one(name, shape, {**self.memory_cfg, 'chunk_size': chunk_size,
                                                     'inner_step': inner_step})
        if args.plot:
            bench.plot_bars(args.plot, shares(rows))
        return rows

    def split_one(self, name: str, shape: tuple[int, int, int], memory_cfg: dict) -> list[dict]:
        """Measure one model at one setting: the whole, without branches, and each branch and memory alone.

        The parts run standalone on their recorded inputs, in the same rounds as the whole. The difference to the
        backbone without branches measures the same share in another way, gate included.
        """
        images = self.images(shape)
        model = cases.build('backbone', name, shape, memory_cfg)
        parts = {}
        for i, branch in enumerate(m for m in model.modules() if isinstance(m, GlobalBranch)):
            parts |= {f'branch {i + 1}': branch, f'memory {i + 1}': branch.memory}
        local = cases.build('backbone', f'{name}-local', shape, {})
        model, local = (m.to(self.device, bench.weight_dtype(self.dtype)) for m in (model, local))
        inputs = record_inputs(model, parts, images, self.dtype)
        modules = {'backbone': model, 'backbone without branches': local, **parts}
        inputs |= {'backbone': images, 'backbone without branches': images}
        macs = {part: count_macs(module, inputs[part]) for part, module in modules.items()}
        modules = {part: self.prepare(module) for part, module in modules.items()}

        label = f'{name}, {"x".join(map(str, shape))}, chunks of {memory_cfg["chunk_size"]}'
        rows: list[dict] = []
        for mode in self.modes:
            results = self.measure_modules(modules, inputs, mode, f'{label}, {mode}')
            if len(results) < len(modules):
                self.skip(name, 'not all parts ran, see above', shape=shape, mode=mode)
                continue
            for kind in ('branch', 'memory'):
                results[KINDS[kind]] = sum_of([m for part, m in results.items() if part.startswith(f'{kind} ')])
                macs[KINDS[kind]] = sum(count for part, count in macs.items() if part.startswith(f'{kind} '))
            for row in bench.result_rows(results, 'backbone', mode=mode, shape=shape, model=name, **memory_cfg):
                rows.append({**row, 'macs': macs[row['name']], 'mac_share': macs[row['name']] / macs['backbone']})
        print(f'\n{label}, inner step {memory_cfg["inner_step"]:g}: times and shares of the whole backbone')
        by_part: dict[str, dict[str, dict]] = {}
        for row in rows:
            by_part.setdefault(row['name'], {})[row['mode']] = row
        print(bench.format_table(
            ('', 'GMAC', 'share', *(cell for mode in self.modes for cell in (f'{mode} ms', 'share', 'peak MiB'))),
            [(part, f'{macs[part] / 1e9:.3f}', f'{macs[part] / macs["backbone"]:.1%}',
              *(cell for mode in self.modes for cell in split_cells(of_part.get(mode))))
             for part, of_part in by_part.items()]))
        return rows


KINDS = {'branch': 'all branches', 'memory': 'all memories'}


def split_cells(row: dict | None) -> tuple[str, str, str]:
    if row is None:
        return '', '', ''
    return bench.milliseconds(row['median_s']), f'{row["ratio"]:.1%}', bench.mebibytes(row['peak_memory_bytes'])


def record_inputs(model: nn.Module, parts: dict[str, nn.Module], images: Tensor, dtype: torch.dtype
                  ) -> dict[str, Tensor]:
    """Return the input of each part in one forward pass of the model."""
    inputs: dict[str, Tensor] = {}

    def recorder(part: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[part] = args[0].detach()
        return hook

    hooks = [module.register_forward_pre_hook(recorder(part)) for part, module in parts.items()]
    bench.make_call(model, images, 'forward', dtype)()
    for hook in hooks:
        hook.remove()
    return inputs


def sum_of(parts: Sequence[bench.Measurement]) -> bench.Measurement:
    """Add the parts' times, round by round; the sum has no peak memory."""
    return bench.Measurement([sum(times) for times in zip(*(part.times for part in parts))])


def shares(rows: Sequence[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the panels of :func:`.bench.plot_bars`: shares of time and of multiply-accumulates at each setting."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if not row['name'].startswith('backbone'):
            panel = panels.setdefault(f'share of {row["model"]} (%), {"x".join(map(str, row["shape"]))}, chunks of '
                                      f'{row["chunk_size"]}', {})
            for series, share in ((row['mode'], row['ratio']), ('multiply-accumulates', row['mac_share'])):
                panel.setdefault(series, {})[row['name']] = 100 * share
    return panels


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors():
        run = Run(args)
        bench.print_machine(run.machine)
        rows = run.split() if args.split else run.compare()
    run.finish(args.task, rows)


if __name__ == '__main__':
    main()
