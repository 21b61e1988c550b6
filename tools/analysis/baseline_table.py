#!/usr/bin/env python
r"""Print the cost of ConvNeur and of the other backbones in the paper's Tables 3 and 4, under the same heads.

    tools/analysis/baseline_table.py
    tools/analysis/baseline_table.py --json table.json

Everything is counted on tensors without data, so no weights are read and no GPU is needed.
"""
import argparse
import runpy
from collections.abc import Sequence
from pathlib import Path

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / '_environment.py'))['prepare']()

import torch
from mmengine.config import Config

from convneur_mm import config
from convneur_mm.analysis.bench import Progress, format_table, write_json
from convneur_mm.analysis.flops import add_up, build_on_meta, count_parts
from convneur_mm.analysis.paper import DENSE, RESULTS, DenseRow
from convneur_mm.engine.files.errors import one_line_errors

# A landscape image at 1333 x 800, padded to a multiple of 32, and Table 4's size.
DETECTION_IMAGE, SEGMENTATION_IMAGE = (1, 3, 800, 1344), (1, 3, 512, 2048)
NOTES = """\
paper: the paper's own figures, no runs of ours. Of its rows BiViT, FLatten-PVT-T and FLatten-Swin-T are missing here:
  mmdet, mmseg and mmpretrain have no such backbone.
params: of the backbone, and of all that works at inference; UperNet's auxiliary head does not.
FLOPs: multiply-accumulates of all convolutions and matrix products, the memory's inner loop and attention included,
  of the backbone and of everything. Detection: one image of 1333 x 800, padded to 1344 x 800; 1000 proposals go
  through the three box heads, and 100 boxes through the three mask heads. Segmentation: one image of 2048 x 512.
+ norms: with norms, pooling and upsampling, as MMEngine's get_model_complexity_info counts them. The paper's figures of
  other backbones agree with that count to 1 G, its figures of ConvNeur with the one without."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--json', metavar='FILE', help='write the table to FILE')
    return parser.parse_args(argv)


def measure_row(row: DenseRow) -> dict:
    """Count M parameters and G multiply-accumulates of the row's config, beside the paper's figures."""
    model = build_on_meta(Config.fromfile(config(row.config)))
    image = torch.empty(SEGMENTATION_IMAGE if hasattr(model, 'decode_head') else DETECTION_IMAGE, device='meta')
    parts = count_parts(model, image)
    backbone, whole = parts['backbone'], add_up(parts)
    gflops, gflops_with_norms = whole.macs / 1e9, (whole.macs + whole.norms) / 1e9
    # The paper counts other backbones with MMEngine's counter; see NOTES.
    counted = gflops if 'convneur' in row.config else gflops_with_norms
    return dict(
        row._asdict(), backbone_params_m=backbone.parameters / 1e6, params_m=whole.parameters / 1e6,
        backbone_gflops=backbone.macs / 1e9, gflops=gflops, gflops_with_norms=gflops_with_norms,
        difference_gflops=None if row.paper_gflops is None else counted - row.paper_gflops)


def report(rows: Sequence[dict]) -> str:
    """Format a table for each head, and the notes."""
    parts = []
    for head, results in RESULTS.items():
        of_head = [row for row in rows if row['head'] == head]
        if not of_head:
            continue
        header = [head, 'params (M)', 'all (M)', 'FLOPs (G)', 'all (G)', '+ norms (G)']
        published = any(row['paper_gflops'] is not None for row in of_head)
        header += ['paper (G)', 'difference'] if published else []
        header += [f'paper {result}' for result in results]
        cells = []
        for row in of_head:
            line = [row['backbone'], *(f'{row[key]:.{digits}f}' for key, digits in (
                ('backbone_params_m', 2), ('params_m', 2), ('backbone_gflops', 1), ('gflops', 1),
                ('gflops_with_norms', 1)))]
            if published:
                line += ['-', '-'] if row['paper_gflops'] is None else [
                    str(row['paper_gflops']), f'{row["difference_gflops"]:+.1f}']
            decimals = 2 if published else 1  # as in the paper's Tables 4 and 3
            line += [f'{result:.{decimals}f}' for result in row['paper_results']] or ['-'] * len(results)
            cells.append(line)
        parts.append(format_table(header, cells))
    return '\n\n'.join([*parts, NOTES])


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    progress, rows = Progress(), []
    for number, row in enumerate(DENSE, 1):
        progress(f'{number}/{len(DENSE)} {row.config}')
        rows.append(measure_row(row))
    progress.clear()
    print(report(rows))
    if args.json:
        write_json(args.json, dict(rows=rows))


if __name__ == '__main__':
    with one_line_errors():
        main()
