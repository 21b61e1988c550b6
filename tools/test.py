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
    parser.add_argument('--out', metavar='FILE.pkl', help='save the predictions to this pickle file')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', metavar='DIR', help='save pictures of the predictions in this folder')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds a window stays with --show (default: 2)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise launch.LaunchError(f'--out must end in .pkl or .pickle, got {args.out}')
    cfg = launch.load_config(args, splits=('test',))
    cfg.load_from = launch.existing_file(args.checkpoint, 'checkpoint')
    if args.show or args.show_dir:
        draw_predictions(cfg, args)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    if args.out:
        runner.test_evaluator.metrics.append(result_dumper(cfg, args.out))
    runner.test()


def draw_predictions(cfg: launch.Config, args: argparse.Namespace) -> None:
    """Turns on the visualization hook that every OpenMMLab runtime config has."""
    hook = cfg.default_hooks.get('visualization')
    if hook is None:
        raise launch.LaunchError(f'--show and --show-dir need default_hooks.visualization, which {args.config} lacks')
    hook.draw = True
    hook.show = args.show
    hook.wait_time = args.wait_time
    if args.show_dir:
        # mmdet joins a relative folder to the work dir once for every batch, ever deeper.
        hook.test_out_dir = os.path.abspath(args.show_dir)


def result_dumper(cfg: launch.Config, path: str) -> DumpResults:
    """The metric that saves predictions; mmdet's also packs the masks into run lengths."""
    if cfg.get('default_scope') == 'mmdet':
        from mmdet.evaluation import DumpDetResults
        return DumpDetResults(out_file_path=path)
    return DumpResults(out_file_path=path)


if __name__ == '__main__':
    launch.run(main)
