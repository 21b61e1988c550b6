#!/usr/bin/env python
"""Evaluates a checkpoint on the test split of a config.

    tools/test.py configs/cascade_rcnn_convneur_m3_1x_coco.py CHECKPOINT

On several GPUs, or several CPU processes: ``tools/dist_test.sh CONFIG CHECKPOINT GPUS``.
"""
import argparse
import os

from mmengine.evaluator import DumpResults
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from convneur_mm.engine import launch


def parse_args() -> argparse.Namespace:
    parser = launch.make_parser(__doc__.splitlines()[0])
    parser.add_argument('checkpoint', help='path or URL of the checkpoint')
    parser.add_argument('--out', metavar='PATH', help='save the predictions: detections and classifications in this '
                        'pickle file, segmentations as label pictures in this folder')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', metavar='DIR', help='save pictures of the predictions in this folder')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds a window stays with --show (default: 2)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = launch.load_config(args, splits=('test',))
    segments = cfg.get('default_scope') == 'mmseg'
    if args.out and not segments and not args.out.endswith(('.pkl', '.pickle')):
        raise launch.LaunchError(f'--out must end in .pkl or .pickle, got {args.out}')
    cfg.load_from = launch.readable_checkpoint(args.checkpoint, 'checkpoint', args.allow_pickle)
    if args.show or args.show_dir:
        draw_predictions(cfg, args)
    if args.out and segments:
        cfg.test_evaluator.update(output_dir=args.out, keep_results=True)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    if args.out and not segments:
        runner.test_evaluator.metrics.append(result_dumper(cfg, args.out))
    runner.test()


def draw_predictions(cfg: launch.Config, args: argparse.Namespace) -> None:
    """Turns on the visualization hook, which each package words in its own way."""
    hook = cfg.default_hooks.get('visualization')
    if hook is None:
        raise launch.LaunchError(f'--show and --show-dir need default_hooks.visualization, which {args.config} lacks')
    # Absolute, as mmdet joins a relative folder to the work dir once for every batch, ever deeper.
    folder = os.path.abspath(args.show_dir) if args.show_dir else None
    scope = cfg.get('default_scope')
    hook.update(show=args.show, wait_time=args.wait_time, interval=1)
    if scope == 'mmpretrain':
        hook.update(enable=True, out_dir=folder)
    elif scope == 'mmseg':
        hook.update(draw=True)
        cfg.visualizer.save_dir = folder
    else:
        hook.update(draw=True, test_out_dir=folder)


def result_dumper(cfg: launch.Config, path: str) -> DumpResults:
    """The metric that saves predictions; mmdet's also packs the masks into run lengths."""
    if cfg.get('default_scope') == 'mmdet':
        from mmdet.evaluation import DumpDetResults
        return DumpDetResults(out_file_path=path)
    return DumpResults(out_file_path=path)


if __name__ == '__main__':
    launch.run(main)
