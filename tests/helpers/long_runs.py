"""Long runs on pictures of changing sizes: the memory of their processes, and what they leave behind.

    .venv/bin/python tests/helpers/long_runs.py FOLDER --iterations 2000 --calls 10000

Prints a line now and then, and last a JSON record for each run: resident megabytes of the process and its data workers
(those of data workers together), at equal distances.
"""
from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from tiny_models import CONFIGS, TINY, tiny_model

import convneur_mm
from convneur_mm.apis import iter_inference
from convneur_mm.datasets import make_shapes_ade20k, make_shapes_coco, make_shapes_imagenet
from convneur_mm.engine.launch import read_config, use_resumable_loop
from convneur_mm.engine.runner.quiet_console import build_runner

MAKERS = dict(detector=make_shapes_coco, segmentor=make_shapes_ade20k, classifier=make_shapes_imagenet)
# In place of the config's size; a batch of a classifier is of one size, and its sizes change in the inference alone.
SIZES = dict(detector=dict(type='RandomResize', scale=(64, 64), ratio_range=(0.5, 2.0), keep_ratio=True),
             segmentor=dict(type='RandomResize', scale=(64, 64), ratio_range=(0.5, 2.0), keep_ratio=True),
             classifier=dict(type='RandomResizedCrop', scale=64))
SAMPLES = 40  # of the memory, over a run


def resident() -> tuple[float, float]:
    """Megabytes of this process, and of its data workers together."""
    process = psutil.Process()
    workers = [child.memory_info().rss for child in process.children(recursive=True)]
    return process.memory_info().rss / 1e6, sum(workers) / 1e6


def growth(values: Sequence[float]) -> float:
    """By how much the median of the last quarter is above that of the second."""
    quarter = len(values) // 4
    return statistics.median(values[-quarter:]) - statistics.median(values[quarter:2 * quarter])


@HOOKS.register_module()
class ResidentHook(Hook):
    """Notes the memory at equal distances."""

    seen: list[tuple[float, float]] = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if (runner.iter + 1) % max(1, runner.max_iters // SAMPLES) == 0:
            self.seen.append(resident())
            print(f'{runner.iter + 1} iterations: {self.seen[-1]}', flush=True)


def training(task: str, folder: Path, iterations: int) -> dict:
    """Trains on pictures of changing sizes, with a data worker, validations and checkpoints."""
    MAKERS[task](folder / 'data', num_train=24, num_val=6, image_size=64)
    cfg = read_config(convneur_mm.config(CONFIGS[task]), {**TINY[task], 'data_root': f'{folder}/data/'})
    pipeline = cfg.train_dataloader.dataset.pipeline
    number, = [i for i, each in enumerate(pipeline) if 'Resize' in each.type]
    pipeline[number] = SIZES[task]
    if task == 'segmentor':
        cfg.model.data_preprocessor.update(size=None, size_divisor=32)
        # With weights of classes, mmseg 1.2 fails at the pixels that pad a picture.
        cfg.model.decode_head.loss_decode.class_weight = None
    for split in 'train', 'val':
        cfg[f'{split}_dataloader'].update(batch_size=2, num_workers=1, persistent_workers=split == 'train')
    by_epoch = 'max_epochs' in cfg.train_cfg
    length = iterations // 12 if by_epoch else iterations
    cfg.train_cfg.update({'max_epochs' if by_epoch else 'max_iters': length, 'val_interval': max(1, length // 4)})
    cfg.default_hooks.checkpoint.update(interval=max(1, length // 4))
    cfg.default_hooks.logger.interval = 100
    cfg.param_scheduler, cfg.work_dir = [], str(folder / 'work')
    cfg.log_level = 'ERROR'
    cfg.custom_hooks = [dict(type='ResidentHook')]
    ResidentHook.seen.clear()
    use_resumable_loop(cfg.train_cfg)
    runner = build_runner(cfg)
    runner.train()
    main, workers = zip(*ResidentHook.seen)
    return dict(run=f'{task}, {iterations} iterations', main=main, workers=workers, growth=growth(main),
                growth_of_workers=growth(workers), left=len(psutil.Process().children()))


def inferences(task: str, calls: int) -> dict:
    """Predicts pictures of other sizes again and again."""
    key = 'test_dataloader.dataset.pipeline'
    pipeline = Config.fromfile(convneur_mm.config(CONFIGS[task])).test_dataloader.dataset.pipeline
    pipeline = [each for each in pipeline if 'Resize' not in each.type]
    if task == 'detector':  # reads the scale
        pipeline.insert(1, dict(type='Resize', scale_factor=1.0, keep_ratio=True))
    model = tiny_model(task, options={key: pipeline})
    draw = np.random.default_rng(0)

    def pictures():
        for _ in range(calls):
            yield draw.integers(256, size=(*draw.integers(33, 161, size=2), 3), dtype=np.uint8)

    seen = []
    for number, _ in enumerate(iter_inference(model, pictures()), 1):
        if number % max(1, calls // SAMPLES) == 0:
            seen.append(resident()[0])
            print(f'{number} calls: {seen[-1]:.1f}', flush=True)
    return dict(run=f'{task}, {calls} calls', main=seen, growth=growth(seen))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='new folder for data and work dirs')
    parser.add_argument('--tasks', nargs='+', choices=list(MAKERS), default=list(MAKERS))
    parser.add_argument('--iterations', type=int, default=2000)
    parser.add_argument('--calls', type=int, default=10000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    records = [record for name in args.tasks for record in (
        training(name, args.folder.absolute() / name, args.iterations), inferences(name, args.calls))]
    print(json.dumps(records))
