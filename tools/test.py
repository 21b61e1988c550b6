#!/usr/bin/env python
"""Evaluate a checkpoint on the test split of a config.

    tools/test.py configs/cascade_rcnn_convneur_m3_1x_coco.py CHECKPOINT

For several GPUs, or several CPU processes: ``tools/dist_test.sh CONFIG CHECKPOINT GPUS``.
"""
import argparse
import os
import signal

if __name__ == '__main__':
    # Without this, Ctrl-C during the imports would print a traceback. Later, launch.run reports it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from _environment import prepare
    prepare()

from mmengine.config import Config
from mmengine.evaluator import DumpResults

from convneur_mm.engine import launch, safe_loading
from convneur_mm.engine.runner.interrupts import report_on_interrupt
from convneur_mm.engine.runner.quiet_console import build_runner


def parse_args() -> argparse.Namespace:
    parser = launch.make_parser(__doc__.splitlines()[0])
    parser.add_argument('checkpoint', help='path or URL of the checkpoint')
    parser.add_argument('--out', metavar='PATH', help='save the predictions: detections and classifications in this '
                        'pickle file; segmentations as label pictures in this folder, numbered as in the annotation '
                        'files (so from 1 on for ADE20K, whose 0 is no class)')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', metavar='DIR', help='save a picture of each prediction in this folder')
    parser.add_argument('--wait-time', type=float, default=2,
                        help='seconds to show each window with --show (default: 2)')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation: average the predictions of several '
                        'views of each image, set by tta_model and tta_pipeline in the config; without them, a '
                        'classifier flips images')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with safe_loading(args.allow_pickle):
        test(args)


def test(args: argparse.Namespace) -> None:
    """Test as the command line says."""
    cfg = launch.load_config(args, splits=('test',))
    if args.tta:
        use_tta(cfg, args.config)
    segments = cfg.get('default_scope') == 'mmseg'
    if args.out:
        check_out(args.out, segments)
    cfg.load_from = launch.readable_checkpoint(args.checkpoint, 'checkpoint', args.allow_pickle)
    if args.show or args.show_dir:
        cfg.custom_hooks.append(drawing_hook(cfg, args))
    if args.out and segments:
        save_label_pictures(cfg, args.out)
    runner = build_runner(cfg)
    if args.out and not segments:
        runner.test_evaluator.metrics.append(result_dumper(cfg, args.out))
    with report_on_interrupt(runner, trains=False):
        runner.test()


def use_tta(cfg: Config, name: str) -> None:
    """Wrap the config's model in its ``tta_model``, and use its ``tta_pipeline`` for the test data.

    Raises:
        LaunchError: If the config lacks them; ``name`` is its name in the message.
    """
    if cfg.get('default_scope') == 'mmpretrain' and 'tta_pipeline' not in cfg:
        # mmpretrain's own tool does the same.
        flips = [dict(type='RandomFlip', prob=prob) for prob in (0.0, 1.0)]
        *transforms, pack = cfg.test_dataloader.dataset.pipeline
        cfg.tta_pipeline = [*transforms, dict(type='TestTimeAug', transforms=[flips, [pack]])]
        cfg.setdefault('tta_model', dict(type='AverageClsScoreTTA'))
    missing = [key for key in ('tta_model', 'tta_pipeline') if key not in cfg]
    if missing:
        why = '; mmdet merges boxes of several views, but no masks' if cfg.get('default_scope') == 'mmdet' else ''
        raise launch.LaunchError(f'--tta needs {" and ".join(missing)}, which {name} lacks{why}')
    cfg.model = dict(cfg.tta_model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline


def check_out(path: str, segments: bool) -> None:
    """Raise a LaunchError if ``--out`` is not of the kind to which the task's predictions are saved."""
    is_pickle = path.endswith(('.pkl', '.pickle'))
    if segments and is_pickle:
        raise launch.LaunchError(f'--out of a segmentor is a folder for label pictures, got {path}')
    if not segments and not is_pickle:
        raise launch.LaunchError(f'--out must end in .pkl or .pickle, got {path}')


def drawing_hook(cfg: Config, args: argparse.Namespace) -> dict:
    """Return the settings of the hook that draws predictions, with the config's score threshold for detections."""
    if not cfg.get('visualizer'):
        raise launch.LaunchError(f'--show and --show-dir need a visualizer, which {args.config} lacks')
    draw_args = {}
    if cfg.get('default_scope') == 'mmdet':
        settings = cfg.get('default_hooks', {}).get('visualization') or {}
        draw_args['pred_score_thr'] = settings.get('score_thr', 0.3)
    return dict(type='DrawPredictionsHook', out_dir=args.show_dir, show=args.show, wait_time=args.wait_time,
                draw_args=draw_args)


def save_label_pictures(cfg: Config, folder: str) -> None:
    """Make mmseg's metric also write its predictions to ``folder``."""
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    writers = [evaluator for evaluator in evaluators if evaluator['type'] == 'IoUMetric']
    if not writers:
        raise launch.LaunchError('--out of a segmentor needs an IoUMetric among test_evaluator, which writes the files')
    # Make the folder now, before another process could write to it ahead of the first one.
    os.makedirs(folder, exist_ok=True)
    writers[0]['output_dir'] = folder


def result_dumper(cfg: Config, path: str) -> DumpResults:
    """Return the metric that saves predictions; mmdet's also encodes the masks as run lengths."""
    if cfg.get('default_scope') == 'mmdet':
        from mmdet.evaluation import DumpDetResults
        return DumpDetResults(out_file_path=path)
    return DumpResults(out_file_path=path)


if __name__ == '__main__':
    launch.run(main)
