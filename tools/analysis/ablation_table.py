#!/usr/bin/env python
r"""Print Table 5 of the paper, its ablations of ConvNeur-m3, with our counts beside the paper's figures.

    tools/analysis/ablation_table.py
    # with the best accuracies of finished trainings, e.g. by tools/dist_train.sh configs/ablation/NAME.py 8
    tools/analysis/ablation_table.py --work-dirs work_dirs --json table.json

Accuracies are read from the logs of the configs' work dirs; no weights are opened.
"""
import argparse
import runpy
from collections.abc import Sequence
from functools import cache
from operator import itemgetter
from pathlib import Path

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / '_environment.py'))['prepare']()

import torch
from mmengine.config import Config
from torch import Tensor, nn

from convneur_mm import config
from convneur_mm.analysis.bench import format_table, write_json
from convneur_mm.analysis.flops import add_up, build_on_meta, count_parts
from convneur_mm.analysis.logs import read_training
from convneur_mm.analysis.paper import ABLATION, SELF_ATTENTION
from convneur_mm.engine.files.errors import one_line_errors
from convneur_mm.models.global_branches.self_attention import MultiHeadAttention

NOTES = """\
FLOPs: multiply-accumulates of all convolutions and matrix products at 224 x 224, the memory's inner loop included.
paper: the paper's own figures, no runs of ours. difference: our FLOPs less the paper's.
Self-attention: the paper's 1.8 G leave out the products with the attention matrix, q kT and the one with v. They are
  {products:.2f} G; with them it is {whole:.2f} G. The difference is of the count without them.
  In the paper's rows of non-local and Titans such products are counted.
IR-RWKV: its recurrence is sums over the tokens, no matrix product, and counts for nothing.
Every branch stands between the same convolutions, LayerNorm and output projection as the memory."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work-dirs', type=Path, metavar='DIR',
                        help='folder of the work dirs, each named after its config (default: work_dirs, if it exists)')
    parser.add_argument('--json', metavar='FILE', help='write the table to FILE')
    return parser.parse_args(argv)


def attention_products(module: nn.Module, *inputs: Tensor) -> int:
    """Count the multiply-accumulates of q kᵀ and of its product with v in all attention of one forward pass."""
    found = []
    handles = [attention.register_forward_pre_hook(
        lambda _, args: found.append(2 * args[0].numel() * args[0].size(1)))
        for attention in module.modules() if isinstance(attention, MultiHeadAttention)]
    with torch.no_grad():
        module(*inputs)
    for handle in handles:
        handle.remove()
    return sum(found)


def best_top1(work_dir: Path) -> tuple[float, int] | None:
    """Return the best validated top-1 accuracy of a work dir's runs, with its epoch; None without validations."""
    steps, values = read_training(work_dir).get('accuracy/top1', ([], []))
    return max(zip(values, steps), key=itemgetter(0), default=None)


@cache
def count(name: str) -> dict[str, float]:
    """Count a config's classifier at 224 × 224: M parameters and G multiply-accumulates."""
    model, image = build_on_meta(Config.fromfile(config(name))), torch.empty(1, 3, 224, 224, device='meta')
    whole = add_up(count_parts(model, image))
    products = attention_products(model.backbone, image) if name == SELF_ATTENTION else 0
    return dict(params_m=whole.parameters / 1e6, gflops=whole.macs / 1e9, attention_products_gflops=products / 1e9)


def measure(work_dirs: Path) -> list[dict]:
    """Return the table's rows: the paper's figures, ours, and the accuracies found below ``work_dirs``."""
    rows = []
    for row in ABLATION:
        counted, best = count(row.config), best_top1(work_dirs / Path(row.config).name)
        rows.append(dict(
            row._asdict(), **counted,
            difference_gflops=counted['gflops'] - counted['attention_products_gflops'] - row.paper_gflops,
            top1=best and best[0], top1_epoch=best and best[1]))
    return rows


def report(rows: list[dict]) -> str:
    """Format the table and its notes."""
    cells = []
    for row in rows:
        flops = f'{row["gflops"]:.2f}'
        if row['attention_products_gflops']:
            flops = f'{row["gflops"] - row["attention_products_gflops"]:.2f} ({flops})'
        top1 = '-' if row['top1'] is None else f'{row["top1"]:.1f} (epoch {row["top1_epoch"]})'
        cells.append((row['experiment'], row['variant'], f'{row["params_m"]:.2f}', flops, f'{row["paper_gflops"]:.1f}',
                      f'{row["difference_gflops"]:+.3f}', top1, f'{row["paper_top1"]:.1f}'))
    attention = next(row for row in rows if row['config'] == SELF_ATTENTION)
    notes = NOTES.format(products=attention['attention_products_gflops'], whole=attention['gflops'])
    header = ('experiment', 'variant', 'params (M)', 'FLOPs (G)', 'paper FLOPs (G)', 'difference', 'top-1',
              'paper top-1')
    return f'{format_table(header, cells)}\n\n{notes}'


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    work_dirs = args.work_dirs or Path('work_dirs')
    with one_line_errors():
        if args.work_dirs and not args.work_dirs.is_dir():
            raise ValueError(f'--work-dirs must be a folder, got {str(args.work_dirs)!r}')
        rows = measure(work_dirs)
        print(report(rows))
        if all(row['top1'] is None for row in rows):
            print(f'top-1: no validated run of these configs in {work_dirs}/')
        if args.json:
            write_json(args.json, dict(rows=rows))


if __name__ == '__main__':
    main()
