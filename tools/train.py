#!/usr/bin/env python
"""Train a detector, segmentor or classifier from a config.

    tools/train.py configs/cascade_rcnn_convneur_m3_1x_coco.py

For several GPUs, or several CPU processes: ``tools/dist_train.sh CONFIG GPUS``.
"""
import argparse
import signal

if __name__ == '__main__':
    # Without this, Ctrl-C during the imports would print a traceback. Later, launch.run reports it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from _environment import prepare
    prepare()

import torch

from convneur_mm.engine import launch, safe_loading
from convneur_mm.engine.files.resume import check_same_checkpoint, checkpoint_after_restart, latest_checkpoint
from convneur_mm.engine.runner.interrupts import report_on_interrupt
from convneur_mm.engine.runner.quiet_console import build_runner
from convneur_mm.stack import uses_compiled_mmcv


def parse_args() -> argparse.Namespace:
    parser = launch.make_parser(__doc__.splitlines()[0])
    parser.add_argument('--amp', nargs='?', const='fp16', choices=['fp16', 'bf16'], help='use automatic mixed '
                        'precision: fp16 (default) on GPUs only; bf16 on newer GPUs and on CPUs, without loss scaling')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate by the actual batch size over that of the recipe')
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='resume from this checkpoint, or from the newest intact one of the work dir if none is '
                        'given')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with safe_loading(args.allow_pickle):
        train(args)


def train(args: argparse.Namespace) -> None:
    """Train as the command line says."""
    if args.amp == 'fp16' and not torch.cuda.is_available():
        raise launch.LaunchError('--amp needs a CUDA GPU, and none is visible; --amp bf16 does not')
    cfg = launch.load_config(args, splits=('train', 'val'))
    if (args.amp == 'bf16' and cfg.get('default_scope') == 'mmdet' and not torch.cuda.is_available()
            and uses_compiled_mmcv()):
        raise launch.LaunchError('--amp bf16 trains no detector on a CPU with a compiled mmcv, whose NMS takes float32 '
                                 'alone')
    if args.amp:
        use_amp(cfg.optim_wrapper, args.amp)
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise launch.LaunchError(f'--auto-scale-lr needs auto_scale_lr.base_batch_size, which {args.config} lacks')
        cfg.auto_scale_lr.enable = True
    args.resume = checkpoint_after_restart(cfg.work_dir, args.allow_pickle) or args.resume
    if args.resume not in (None, 'auto'):
        cfg.load_from = launch.readable_checkpoint(args.resume, '--resume', args.allow_pickle)
        cfg.resume = True
    elif args.resume or cfg.get('resume') and not cfg.get('load_from'):
        cfg.load_from = latest_checkpoint(cfg.work_dir, args.config, args.allow_pickle)
        cfg.resume = True
    runner = build_runner(cfg)
    check_same_checkpoint(cfg.load_from if cfg.get('resume') else None)
    with report_on_interrupt(runner):
        runner.train()


def use_amp(optim_wrapper: dict, precision: str) -> None:
    """Change a config's ``optim_wrapper`` to mixed precision, keeping its ``loss_scale`` and ``dtype``.

    Raises:
        LaunchError: If its type would be lost, or it sets ``loss_scale`` or ``dtype``, which bf16 does not take.
    """
    name = dict(fp16='AmpOptimWrapper', bf16='BFloat16OptimWrapper')[precision]
    current = optim_wrapper.get('type', 'OptimWrapper')
    if current not in ('OptimWrapper', 'AmpOptimWrapper', name):
        raise launch.LaunchError(f'--amp {precision} goes with optim_wrapper.type OptimWrapper, got {current}')
    if precision == 'bf16':
        for key in ('loss_scale', 'dtype'):
            if key in optim_wrapper:
                raise launch.LaunchError(f'--amp bf16 takes no optim_wrapper.{key}, got {optim_wrapper[key]!r}: leave '
                                         'one of the two out')
    optim_wrapper['type'] = name


if __name__ == '__main__':
    launch.run(main)
