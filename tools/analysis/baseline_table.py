#!/usr/bin/env python
r"""Print the cost of ConvNeur and of the other backbones in the paper's Tables 3 and 4, under the same heads.

    tools/analysis/baseline_table.py
    tools/analysis/baseline_table.py --json table.json

Everything is counted on tensors without data, so no weights are read and no GPU is needed.
"""
import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / '_environment.py'))['prepare']()

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from convneur_mm import config
from convneur_mm.analysis.bench import format_table, write_json
from convneur_mm.analysis.flops import build_on_meta, count_flops, count_parameters
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


class _Heads(nn.Module):
    """All parts after the backbone at inference."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.neck = model.neck if model.with_neck else nn.Identity()
        parts = ('rpn_head', 'roi_head') if hasattr(model, 'roi_head') else ('decode_head', )
        self.heads = nn.ModuleDict({part: getattr(model, part) for part in parts})
        self.test_cfg = model.test_cfg

    def forward(self, features: Sequence[Tensor]) -> None:
        features = self.neck(features)
        if 'decode_head' in self.heads:
            self.heads['decode_head'](features)
            return
        self.heads['rpn_head'](features)
        # The proposals depend on data, but their maximal number does not.
        roi_head = self.heads['roi_head']
        for extractor, heads, count in (
            (roi_head.bbox_roi_extractor, roi_head.bbox_head, self.test_cfg.rpn.max_per_img),
            (roi_head.mask_roi_extractor, roi_head.mask_head, self.test_cfg.rcnn.max_per_img)):
            for stage, head in zip(extractor, heads):
                head(features[0].new_empty(count, stage.out_channels, *stage.roi_layers[0].output_size))


class NormCounter(TorchDispatchMode):
    """Count of norms, pooling and upsampling, with the factors of MMEngine's counter.

    Attributes:
        total (int): Count of all calls below this mode so far.
    """

    INPUT_FACTORS = {torch.ops.aten.native_batch_norm: 2, torch.ops.aten.native_layer_norm: 5,
                     torch.ops.aten._adaptive_avg_pool2d: 1}
    OUTPUT_FACTORS = {torch.ops.aten.upsample_nearest2d: 1, torch.ops.aten.upsample_bilinear2d: 4}

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        operator = func.overloadpacket
        if operator in self.INPUT_FACTORS:
            self.total += self.INPUT_FACTORS[operator] * args[0].numel()
        elif operator in self.OUTPUT_FACTORS:
            self.total += self.OUTPUT_FACTORS[operator] * output.numel()
        return output


class _Run(nn.Module):
    """Wrapper that keeps its module's last output and a NormCounter's total.

    The mode is entered within the FLOP counter's, which decomposes batch norm before passing it on.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> None:
        with NormCounter() as counter:
            self.output = self.module(*inputs)
        self.norms = counter.total


def measure_row(row: DenseRow) -> dict:
    """Count M parameters and G multiply-accumulates of the row's config, beside the paper's figures."""
    model = build_on_meta(Config.fromfile(config(row.config)))
    image = torch.empty(SEGMENTATION_IMAGE if hasattr(model, 'decode_head') else DETECTION_IMAGE, device='meta')
    backbone, heads = _Run(model.backbone), _Run(_Heads(model))
    of_backbone = count_flops(backbone, image)
    gflops = (of_backbone + count_flops(heads, backbone.output)) / 1e9
    gflops_with_norms = gflops + (backbone.norms + heads.norms) / 1e9
    # The paper counts other backbones with MMEngine's counter; see NOTES.
    counted = gflops if 'convneur' in row.config else gflops_with_norms
    return dict(
        row._asdict(), backbone_params_m=count_parameters(backbone) / 1e6,
        params_m=(count_parameters(backbone) + count_parameters(heads)) / 1e6,
        backbone_gflops=of_backbone / 1e9, gflops=gflops, gflops_with_norms=gflops_with_norms,
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
    rows = []
    for number, row in enumerate(DENSE, 1):
        if sys.stderr.isatty():
            print(f'\r\033[K{number}/{len(DENSE)} {row.config}', end='', file=sys.stderr, flush=True)
        rows.append(measure_row(row))
    if sys.stderr.isatty():
        print('\r\033[K', end='', file=sys.stderr)
    print(report(rows))
    if args.json:
        write_json(args.json, dict(rows=rows))


if __name__ == '__main__':
    with one_line_errors():
        main()
