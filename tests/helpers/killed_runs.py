"""Kills trainings at random moments, resumes them, and compares their weights with those of one that was not killed.

    .venv/bin/python tests/helpers/killed_runs.py FOLDER --trials 20 --kills 1

Imports everything once: each training is a fork of this process. The last line is JSON, a record for each trial.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sys
from functools import partial
from pathlib import Path
from threading import Timer

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from tiny_models import CONFIGS, TINY
from torch import Tensor

import convneur_mm
from convneur_mm.datasets import make_shapes_ade20k, make_shapes_coco, make_shapes_imagenet
from convneur_mm.engine import launch

sys.path.append(str(Path(__file__).parents[2] / 'tools'))
import train

MAKERS = dict(detector=make_shapes_coco, segmentor=make_shapes_ade20k, classifier=make_shapes_imagenet)
# Data workers of each task: MMEngine seeds them, and the process itself, in different ways.
WORKERS = dict(detector=0, segmentor=2, classifier=1)
SETTINGS = dict(
    detector=dict(max_epochs=2, image_size=(64, 64), train_cfg=dict(val_interval=10),
                  default_hooks=dict(checkpoint=dict(interval=1))),
    segmentor=dict(image_size=(64, 64), train_cfg=dict(max_iters=5, val_interval=10),
                   default_hooks=dict(checkpoint=dict(interval=2))),
    classifier=dict(max_epochs=2, train_cfg=dict(val_interval=10), default_hooks=dict(checkpoint=dict(interval=1))))
PRETTY_TEXT = Config.pretty_text


class Events:
    """The moments of a training, noted in a file: beginnings and ends of iterations, and of what a save writes.

    Args:
        file (Path): Gets a letter for each moment: ``s`` while it saves, else ``.``.
        moment (int): After so many moments of a kind the process kills itself and its workers: nobody else could
            do so before it goes on. 0 for never.
        kind (bytes): The letter of these moments; empty for any.
        delay (float): Seconds from then to the kill.
    """
    latest: Events

    def __init__(self, file: Path, moment: int, kind: bytes, delay: float) -> None:
        Events.latest = self
        self.file = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.left, self.kind = moment, kind
        # SIGKILL to the process group, which is that of this process and its workers alone.
        self.kill = partial(os.killpg, 0, signal.SIGKILL)
        self.later = Timer(delay, self.kill) if delay else None

    def add(self, letter: bytes) -> None:
        os.write(self.file, letter)
        if self.left and letter.startswith(self.kind):
            self.left -= 1
            if not self.left:
                self.later.start() if self.later else self.kill()

    def end(self) -> None:
        """A kill that is due comes, even if the training was faster."""
        if self.later and self.later.is_alive():
            self.later.join()


@HOOKS.register_module()
class EventHook(Hook):
    """Tells of the beginning and the end of each iteration."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        Events.latest.add(b'.')

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        Events.latest.add(b'.')


def watched(function, *letters):
    """``function``, which tells of its beginning and its end."""
    def call(*args):
        Events.latest.add(letters[0])
        function(*args)
        Events.latest.add(letters[1])

    return call


def write_config(task: str, folder: Path) -> Path:
    """A training of a few seconds, with all that draws random numbers."""
    MAKERS[task](folder / 'data', num_train=6, num_val=6, image_size=64)
    cfg = Config.fromfile(convneur_mm.config(CONFIGS[task]))
    cfg.merge_from_dict({**TINY[task], **SETTINGS[task], 'data_root': f'{folder}/data/'})
    cfg.model.backbone.drop_path_rate = 0.5
    for split in 'train', 'val':
        workers = WORKERS[task] if split == 'train' else 0
        cfg[f'{split}_dataloader'].update(batch_size=2, num_workers=workers, persistent_workers=False)
    cfg.default_hooks.logger.interval = 1
    cfg.randomness = dict(seed=0, deterministic=True)
    cfg.custom_hooks = [dict(type='EventHook')]
    path = folder / 'config.py'
    path.write_text(PRETTY_TEXT.fget(cfg))
    return path


def train_once(config: Path, work_dir: Path, moment: int = 0, kind: bytes = b'', delay: float = 0) -> bool:
    """Begins a training, or goes on with it; returns whether it ended before it was to be killed (see ``Events``)."""
    process = os.fork()
    if process:
        _, status = os.waitpid(process, 0)
        if status not in (0, signal.SIGKILL):
            raise RuntimeError(Path(f'{work_dir}.txt').read_text()[-3000:])
        return status == 0
    code = 1
    try:
        os.setsid()
        out = os.open(f'{work_dir}.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in 1, 2:
            os.dup2(out, stream)
        events = Events(events_file(work_dir), moment, kind, delay)
        os.replace, os.fsync = watched(os.replace, b's', b'.'), watched(os.fsync, b's', b's')
        resumes = (work_dir / 'last_checkpoint').exists() or any(work_dir.glob('*.pth'))
        sys.argv = ['train.py', str(config), '--work-dir', str(work_dir), *(['--resume'] if resumes else [])]
        launch.run(train.main)
        events.end()
        code = 0
    except SystemExit as error:
        code = error.code
    finally:
        sys.stdout.flush()
        os._exit(code)


def events_file(work_dir: Path) -> Path:
    return Path(f'{work_dir}.events')


def final_state(work_dir: Path) -> dict[str, Tensor]:
    """All tensors of the last checkpoint: of the model and of the optimizer."""
    saved = torch.load((work_dir / 'last_checkpoint').read_text(), weights_only=False)
    return {**saved['state_dict'], **{f'optimizer.{i}.{name}': value for i, state in saved['optimizer']['state'].items()
                                      for name, value in state.items()}}


def run(task: str, folder: Path, kills: int, trials: int, draw: random.Random) -> list[dict]:
    """Kills each of several trainings so many times, the first time while it saves."""
    folder.mkdir(parents=True)
    config = write_config(task, folder)
    train_once(config, folder / 'whole')
    told = events_file(folder / 'whole').read_bytes()
    expected, records = final_state(folder / 'whole'), []
    for trial in range(trials):
        work_dir, moments = folder / f'killed{trial}', []
        for number in range(kills):
            kind = b's' if number == 0 and trial % 4 == 0 else b''
            total = told.count(kind) if kind else len(told)
            moment = draw.randrange(1, 1 + total // (number + 1))
            # Within a save to the very operation.
            delay = 0 if kind else draw.choice([0, draw.uniform(0, 0.05)])
            if not train_once(config, work_dir, moment, kind, delay):
                parts = [path.name for path in work_dir.glob('*.saving')]
                moments.append(f'{moment} of {total} {kind.decode()} +{delay:.3f} s {parts}')
        train_once(config, work_dir)
        found = final_state(work_dir)
        differing = [name for name in expected if not torch.equal(expected[name], found[name])]
        records.append(dict(task=task, killed=moments, tensors=len(expected), differing=differing,
                            same_names=found.keys() == expected.keys(),
                            resumed=re.findall(r'resumed from .+ at epoch', Path(f'{work_dir}.txt').read_text()),
                            left=[path.name for path in work_dir.glob('*.saving')]))
        print(json.dumps(records[-1]), flush=True)
    return records


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='new folder for data and work dirs')
    parser.add_argument('--tasks', nargs='+', choices=list(MAKERS), default=list(MAKERS))
    parser.add_argument('--trials', type=int, default=1, help='trainings of each task')
    parser.add_argument('--kills', type=int, default=2, help='times that each of them is killed')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Most of the time of so short a run goes into the layout of the config's text, at each save too.
    Config.pretty_text = property(repr)
    drawn = random.Random(args.seed)
    print(json.dumps([record for name in args.tasks
                      for record in run(name, args.folder.absolute() / name, args.kills, args.trials, drawn)]))
