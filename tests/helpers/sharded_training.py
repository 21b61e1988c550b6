"""Trainings of two processes over gloo, with FSDP and with DistributedDataParallel.

    .venv/bin/python tests/helpers/sharded_training.py FOLDER

Writes ``FOLDER/NAME/iter_<n>.pth`` of three: 'replicated', 'sharded_first', and 'sharded', which resumes the second.
Beside them ``units.json`` has what FSDP wrapped, and the number of weights that one process keeps.
"""
from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from many_processes import TASKS, prepare, run
from tiny_models import TINY
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

import convneur_mm.engine.runner.fsdp  # noqa: F401
from convneur_mm.apis import init_model
from convneur_mm.engine import launch, safe_loading
from convneur_mm.engine.runner.quiet_console import build_runner

# As docs/scaling.md has it.
SHARDED = dict(runner_type='FlexibleRunner', strategy=dict(type='BlockFSDPStrategy'))


def train_iterations(root: Path, name: str, iterations: int, sharded: bool, resume: str | None = None) -> None:
    """What one process does of a training whose last iteration is saved: with DistributedDataParallel, or with FSDP.

    By SGD, whose steps are as near to each other as the gradients.
    """
    args = launch.make_parser('').parse_args([
        f'{root}/classifier.py', '--launcher', 'pytorch', '--work-dir', f'{root}/{name}'])
    args.cfg_options = {
        **TINY['classifier'], **TASKS['classifier'], 'data_root': f'{root}/classifier/', 'randomness': dict(seed=0),
        'train_cfg': dict(type='IterBasedTrainLoop', max_iters=iterations, val_begin=9, _delete_=True),
        'optim_wrapper.clip_grad': dict(max_norm=0.1), 'param_scheduler': None,
        'optim_wrapper.optimizer': dict(type='SGD', lr=0.5, momentum=0.9, weight_decay=0.05, _delete_=True),
        'default_hooks.checkpoint': dict(type='CheckpointHook', interval=iterations, by_epoch=False),
        'train_dataloader.num_workers': 0, 'train_dataloader.persistent_workers': False,
        'train_dataloader.batch_size': 2, **(SHARDED if sharded else {})}
    cfg = launch.load_config(args, ('train', 'val'))
    if resume:
        cfg.update(load_from=f'{root}/{resume}', resume=True)
    with safe_loading():
        runner = build_runner(cfg)
        runner.train()
    if sharded and runner.rank == 0:
        units = [type(unit.module).__name__ for unit in FSDP.fsdp_modules(runner.model)]
        kept = sum(parameter.numel() for parameter in runner.model.parameters())
        (root / name / 'units.json').write_text(json.dumps(dict(units=units, kept=kept)))


def load(root: Path, path: str) -> None:
    """Loads a checkpoint as tools for trained models do, which fails if a weight is missing."""
    init_model(f'{root}/classifier.py', f'{root}/{path}', 'cpu', TINY['classifier'])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='for data and results')
    root = parser.parse_args().folder.absolute()
    prepare(root)
    for name, settings in dict(replicated=(2, False), sharded_first=(1, True),
                               sharded=(2, True, 'sharded_first/iter_1.pth')).items():
        run(name, 2, partial(train_iterations, root, name, *settings))
    run('load', 1, partial(load, root, 'sharded/iter_2.pth'))
