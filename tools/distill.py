#!/usr/bin/env python
"""Train a config's backbone to predict the features of a teacher, on a folder of pictures without labels.

    tools/distill.py configs/semantic_fpn_convneur_m1_shapes.py data/pictures --teacher timm:convnext_tiny.in12k_ft_in1k

The teacher is timm:NAME, torchvision:NAME or hf:PATH (a model that transformers' AutoBackbone loads). The result,
backbone.pth in the work dir, is what init_cfg=dict(type='Pretrained', checkpoint=...) of the backbone takes, and
tools/train_custom.py --checkpoint. On several GPUs: torchrun --nproc-per-node 4 tools/distill.py ... --launcher pytorch
"""
import argparse
import io
import os
import signal
from collections.abc import Sequence

if __name__ == '__main__':
    # Without this, Ctrl-C during the imports would print a traceback. Later, launch.run reports it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from _environment import prepare
    prepare()

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process

from convneur_mm.datasets import pictures
from convneur_mm.engine import launch
from convneur_mm.engine.files.resume import latest_checkpoint
from convneur_mm.engine.files.whole_files import write_whole
from convneur_mm.engine.runner.interrupts import report_on_interrupt
from convneur_mm.engine.runner.quiet_console import build_runner
from convneur_mm.models import ConvNeur, distillation  # noqa: F401  registers the model


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    launch.add_config_arguments(parser)
    add('data', metavar='DATA', help='folder of pictures; its subfolders are searched too')
    add('--teacher', required=True, metavar='NAME', help='timm:NAME, torchvision:NAME or hf:PATH')
    add('--teacher-weights', metavar='FILE', help="the teacher's weights (default: those of its library)")
    add('--work-dir', metavar='DIR', help='output folder (default: work_dirs/<CONFIG>_distilled)')
    add('--iterations', type=int, default=20000, metavar='N', help='number of steps (default: 20000)')
    add('--batch-size', type=int, default=32, metavar='N', help='pictures per step and process (default: 32)')
    add('--image-size', type=int, default=224, metavar='N', help='height and width of the crops (default: 224)')
    add('--lr', type=float, default=1e-3, help='largest learning rate (default: 1e-3)')
    add('--workers', type=int, default=2, metavar='N', help='processes that read pictures (default: 2)')
    add('--resume', action='store_true', help='go on from the newest checkpoint of the work dir')
    add('--launcher', choices=['none', 'pytorch'], default='none', help='pytorch: the process is started by torchrun')
    return parser.parse_args(argv)


def run_config(args: argparse.Namespace) -> Config:
    """Return the config of the training.

    Raises:
        LaunchError: If the config's backbone is not a ConvNeur, or a number is out of range.
    """
    for name in ('iterations', 'batch_size', 'image_size'):
        least = 32 if name == 'image_size' else 1
        if getattr(args, name) < least:
            raise launch.LaunchError(f'--{name.replace("_", "-")} must be at least {least}, got {getattr(args, name)}')
    cfg = launch.read_config(launch.find_config(args.config), args.cfg_options)
    backbone = dict(cfg.model.get('backbone') or {})
    if backbone.get('type') not in ('ConvNeur', ConvNeur):
        raise launch.LaunchError(f'{args.config}: the backbone must be a ConvNeur, got {backbone.get("type")!r}')
    for name in ('init_cfg', 'frozen_stages', 'gap_before_final_norm'):
        backbone.pop(name, None)
    name = os.path.splitext(os.path.basename(args.config))[0]
    every = max(1, args.iterations // 10)
    return Config(dict(
        default_scope='mmengine',
        model=dict(type='FeatureDistiller', backbone=dict(backbone, type='ConvNeur', out_indices=(0, 1, 2, 3)),
                   teacher=args.teacher, teacher_weights=args.teacher_weights),
        work_dir=args.work_dir or os.path.join('work_dirs', f'{name}_distilled'),
        train_dataloader=dict(
            batch_size=args.batch_size, num_workers=args.workers, drop_last=True, persistent_workers=args.workers > 0,
            sampler=dict(type='InfiniteSampler', shuffle=True),
            dataset=dict(type='UnlabelledPictures', root=os.path.abspath(args.data), size=args.image_size)),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=args.iterations),
        optim_wrapper=dict(
            type='OptimWrapper', constructor='GroupingConstructor', clip_grad=dict(max_norm=5.0),
            optimizer=dict(type='AdamW', lr=args.lr, weight_decay=0.05),
            paramwise_cfg=dict(flat_decay_mult=0.0, custom_keys={
                '.memory.w1': dict(decay_mult=0.0), '.memory.w2': dict(decay_mult=0.0)})),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=max(2, min(500, every))),
            dict(type='CosineAnnealingLR', eta_min=args.lr / 100, by_epoch=False, begin=0, end=args.iterations)],
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=max(1, min(50, every))),
            checkpoint=dict(type='SaveThenDeleteHook', by_epoch=False, interval=every, max_keep_ckpts=1)),
        custom_hooks=[dict(type='NonFiniteLossHook'), dict(type='SaveAtSigtermHook'), dict(type='StartSummaryHook')],
        log_processor=dict(by_epoch=False), launcher=args.launcher, randomness=dict(seed=0)))


def main() -> None:
    args = parse_args()
    cfg = run_config(args)
    launch.use_resumable_loop(cfg.train_cfg)
    if args.resume:
        cfg.load_from, cfg.resume = latest_checkpoint(cfg.work_dir, args.config, False), True
    try:
        pictures.UnlabelledPictures(args.data)
        runner = build_runner(cfg)
    except (ValueError, OSError) as error:  # the teacher's library raises them too, such as without a network
        raise launch.LaunchError(' '.join(str(error).split())) from error
    with report_on_interrupt(runner):
        runner.train()
    if is_main_process():
        weights = getattr(runner.model, 'module', runner.model).backbone.state_dict()
        content = io.BytesIO()
        torch.save(dict(meta=dict(source=args.teacher, version='distilled'), state_dict=weights), content)
        path = os.path.join(cfg.work_dir, 'backbone.pth')
        write_whole(path, content.getvalue())
        print(f"saved as {path}; start from it with backbone.init_cfg=dict(type='Pretrained', checkpoint={path!r}), or "
              f'tools/train_custom.py --checkpoint {path}')


if __name__ == '__main__':
    launch.run(main)
