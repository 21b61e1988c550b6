#!/usr/bin/env python
"""Train a small model of each task in float32 and in bfloat16, and compare their losses.

    experiments/precision.py
    experiments/precision.py --tasks segmentation --iterations 500 --seeds 3

Both start from the same weights and see the same pictures in the same order: generated shapes of 64 x 64, with the
shipped config for them and a backbone, neck and heads of a few channels. bfloat16 is the same as --amp bf16, autocast
around the whole model. A detector has autocast only around backbone and neck, because mmdet would also round anchors
and boxes to the features' precision, and mmcv's NMS and RoIAlign do not accept it.
"""
import argparse
import math
import runpy
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / 'tools/_environment.py'))['prepare']()

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor

from convneur_mm.analysis import bench
from convneur_mm.datasets import make_shapes_ade20k, make_shapes_coco, make_shapes_imagenet
from convneur_mm.engine.files.errors import one_line_errors
from convneur_mm.engine.launch import find_config, read_config
from convneur_mm.engine.runner.quiet_console import build_runner

IMAGE_SIZE, BATCH = 64, 4
CHANNELS, WIDTH = [16, 24, 32, 48], 16
COMMON = {
    'image_size': (IMAGE_SIZE, IMAGE_SIZE),
    'model.backbone.arch': dict(_delete_=True, depths=[1] * 4, channels=CHANNELS, mem_channels=16),
    # The paper's rule; stage 1 has six chunks and stage 2 two.
    'model.backbone.memory_cfg.chunk_size': 49,
    'model.backbone.memory_cfg.num_chunks': None,
    'model.backbone.memory_cfg.step_normalization': 0.0,
    'model.backbone.memory_cfg.retrieve': 'previous',
    'train_dataloader.batch_size': BATCH,
    'train_dataloader.num_workers': 0,
    'train_dataloader.persistent_workers': False,
}
# Config, data set, and the overrides that make the model small.
TASKS = dict(
    detection=('cascade_rcnn_convneur_m1_shapes', make_shapes_coco, {
        'model.neck.in_channels': CHANNELS,
        'model.neck.out_channels': WIDTH,
        'model.rpn_head.in_channels': WIDTH,
        'model.rpn_head.feat_channels': WIDTH,
        'model.roi_head.bbox_roi_extractor.out_channels': WIDTH,
        'model.roi_head.mask_roi_extractor.out_channels': WIDTH,
        **{f'model.roi_head.bbox_head.{stage}.in_channels': WIDTH for stage in range(3)},
        **{f'model.roi_head.bbox_head.{stage}.fc_out_channels': 2 * WIDTH for stage in range(3)},
        **{f'model.train_cfg.rcnn.{stage}.sampler.num': 16 for stage in range(3)},
        'model.roi_head.mask_head.num_convs': 1,
        'model.roi_head.mask_head.in_channels': WIDTH,
        'model.roi_head.mask_head.conv_out_channels': WIDTH,
        'model.train_cfg.rpn_proposal.nms_pre': 100,
        'model.train_cfg.rpn_proposal.max_per_img': 40,
    }),
    segmentation=('semantic_fpn_convneur_m1_shapes', make_shapes_ade20k, {
        'model.neck.in_channels': CHANNELS,
        'model.neck.out_channels': WIDTH,
        'model.decode_head.in_channels': [WIDTH] * 4,
        'model.decode_head.channels': WIDTH,
    }),
    classification=('convneur_m1_shapes', make_shapes_imagenet, {'model.head.in_channels': CHANNELS[-1]}),
)
PRECISIONS = 'float32', 'bfloat16'


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tasks', nargs='+', choices=list(TASKS), default=list(TASKS), metavar='TASK',
                        help=f'tasks to train, from: {", ".join(TASKS)} (default: all)')
    parser.add_argument('--iterations', type=int, default=200, metavar='N',
                        help='training steps (default: %(default)s)')
    parser.add_argument('--window', type=int, default=50, metavar='N',
                        help='average losses over the last N steps (default: %(default)s)')
    parser.add_argument('--seeds', type=int, default=1, metavar='N',
                        help='training runs of each task (default: %(default)s)')
    args = parser.parse_args(argv)
    for name, least in (('iterations', 2), ('window', 1), ('seeds', 1)):
        if getattr(args, name) < least:
            parser.error(f'--{name} must be at least {least}, got {getattr(args, name)}')
    if args.window > args.iterations:
        parser.error(f'--window must be at most --iterations, which is {args.iterations}, got {args.window}')
    return args


class KeepLosses(Hook):
    """Hook that keeps the loss of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None,
                         outputs: dict | None = None) -> None:
        self.losses.append(outputs['loss'].item())


def config_of(task: str, data: Path, iterations: int, seed: int) -> Config:
    """Return a small shipped config, with warm-up and cosine schedule in ``iterations`` steps, saving nothing."""
    name, _, options = TASKS[task]
    cfg = read_config(find_config(name), {
        **COMMON, **options, 'data_root': str(data), 'randomness.seed': seed, 'randomness.deterministic': True})
    warm_up = max(1, iterations // 4)
    cfg.merge_from_dict(dict(
        train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=iterations, val_interval=iterations + 1),
        default_hooks=dict(checkpoint=dict(_delete_=True, type='CheckpointHook', interval=-1, save_last=False)),
        log_level='ERROR'))
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=warm_up),
        dict(type='CosineAnnealingLR', by_epoch=False, begin=warm_up, end=iterations, T_max=iterations - warm_up)]
    for split in ('val', 'test'):
        for part in ('cfg', 'dataloader', 'evaluator'):
            cfg[f'{split}_{part}'] = None
    return cfg


def lower_features(model: BaseModel) -> None:
    """Make backbone and neck compute in bfloat16, and the heads in float32."""
    extract = model.extract_feat

    def extract_feat(inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(inputs.device.type, torch.bfloat16):
            features = extract(inputs)
        return tuple(x.float() for x in features)

    model.extract_feat = extract_feat


def losses_of(cfg: Config, precision: str, work_dir: Path) -> list[float]:
    """Train once, and return the loss of each step."""
    cfg = Config(dict(cfg.to_dict(), work_dir=str(work_dir), experiment_name=work_dir.name))
    is_detector = cfg.default_scope == 'mmdet'
    if precision == 'bfloat16' and not is_detector:
        cfg.optim_wrapper.type = 'BFloat16OptimWrapper'
    runner = build_runner(cfg)
    if precision == 'bfloat16' and is_detector:
        lower_features(runner.model)
    keep = KeepLosses()
    runner.register_hook(keep)
    runner.train()
    return keep.losses


def row(task: str, seed: int, losses: dict[str, list[float]], window: int) -> tuple[str, ...]:
    """Return a row of the table: mean losses of the last steps, and by how much bfloat16's is higher."""
    means = [statistics.fmean(losses[name][-window:]) for name in PRECISIONS]
    broken = sum(not math.isfinite(loss) for of_one in losses.values() for loss in of_one)
    return (task, str(seed), *(f'{mean:.4f}' for mean in means), f'{100 * (means[1] / means[0] - 1):+.2f} %',
            str(broken))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for task in args.tasks:
            make_data = TASKS[task][1]
            data = make_data(Path(folder, task), max(6, args.iterations * BATCH // 2), 6, IMAGE_SIZE)
            for seed in range(args.seeds):
                cfg = config_of(task, data, args.iterations, seed)
                losses = {name: losses_of(cfg, name, Path(folder, f'{task}_{seed}_{name}')) for name in PRECISIONS}
                rows.append(row(task, seed, losses, args.window))
                print(' '.join(rows[-1]), file=sys.stderr, flush=True)
    print(bench.format_table(('task', 'seed', *PRECISIONS, 'difference', 'steps not finite'), rows))


if __name__ == '__main__':
    with one_line_errors():
        main()
