"""A step and a validation of each task in 1, 2 and 4 processes over gloo, built as tools/train.py builds them.

    .venv/bin/python tests/helpers/many_processes.py FOLDER

Imports everything once: each process is a fork of this one. Process ``r`` of a case writes ``FOLDER/CASE/rank<r>.pth``:
its loss, the gradients that its optimizer got, and the metrics.
"""
from __future__ import annotations

import argparse
import gc
import importlib
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from tiny_models import CONFIGS, TINY, separated
from torch import nn

import convneur_mm
from convneur_mm.datasets import make_shapes_ade20k, make_shapes_coco, make_shapes_imagenet
from convneur_mm.engine import launch, safe_loading
from convneur_mm.engine.runner.model_wrappers import unwrapped
from convneur_mm.engine.runner.quiet_console import build_runner

sys.path.append(str(Path(__file__).parents[2] / 'tools'))
import train

MAKERS = dict(detector=make_shapes_coco, segmentor=make_shapes_ade20k, classifier=make_shapes_imagenet)
# Images of a step of all processes, and of the validation, which neither 2 nor 4 divides.
STEP, VALIDATED = 8, 7
# One step, whose gradients nobody changes.
ONE_STEP = {'train_cfg': dict(type='IterBasedTrainLoop', max_iters=1, val_begin=2, _delete_=True),
            'optim_wrapper.clip_grad': None, 'param_scheduler': None, 'default_hooks.checkpoint': None,
            'randomness': dict(seed=0)}
# Nothing that looks across the images of one process: in training BatchNorm does on CPUs, and on GPUs SyncBN looks
# across all processes.
GROUP_NORM = {'model.decode_head.norm_cfg': dict(type='GN', num_groups=2, _delete_=True)}
TASKS = dict(
    classifier={'image_size': (32, 32)},
    # A weight for each class divides the loss by the weights of a process's own pixels.
    segmentor={'image_size': (64, 64), 'class_weight': [1.0] * 7, 'model.decode_head.dropout_ratio': 0.0},
    # Takes all anchors and all proposals, in whatever order, so that nothing is drawn.
    detector={'image_size': (64, 64), 'train_dataloader.sampler.shuffle': False,
              'model.train_cfg.rpn.sampler.num': 10 ** 6,
              'model.train_cfg.rpn_proposal': dict(nms_pre=10 ** 6, max_per_img=10 ** 6),
              'model.train_cfg.rpn_proposal.nms.iou_threshold': 1.0})


class Case(NamedTuple):
    """A run.

    Attributes:
        name (str): Of its folder.
        task (str): 'detector', 'segmentor' or 'classifier'.
        processes (int): Their number.
        options (Mapping): Overrides of the task's config.
        images (Sequence[int] | None): Indices of those that are trained on, in the processes in turn; None stands for
            eight as the sampler draws them, validated afterwards.
    """

    name: str
    task: str
    processes: int
    options: Mapping[str, object] = {}
    images: Sequence[int] | None = None


CASES = [
    *(Case(f'classifier_{n}', 'classifier', n) for n in (1, 2, 4)),
    *(Case(f'segmentor_{n}', 'segmentor', n, GROUP_NORM) for n in (1, 2)),
    *(Case(f'batch_norm_{n}', 'segmentor', n) for n in (1, 2)),
    *(Case(f'weighted_{n}', 'segmentor', n, {**GROUP_NORM, 'class_weight': [0.1] + [1.0] * 6}) for n in (1, 2)),
    *(Case(f'detector_{n}', 'detector', n, images=[0, 1]) for n in (1, 2)),
    *(Case(f'{name}_1', 'detector', 1, images=images) for name, images in dict(first=[0], second=[1], twins=[0, 0]
                                                                               ).items()),
]


@HOOKS.register_module()
class RecordStepHook(Hook):
    """Writes what the optimizer of this process gets.

    Args:
        path (str): Of the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.record = {}

    def before_train(self, runner):
        def keep_gradients(*_):
            self.record['gradients'] = {name: p.grad.clone() for name, p in unwrapped(runner.model).named_parameters()
                                        if p.grad is not None}

        runner.optim_wrapper.optimizer.register_step_pre_hook(keep_gradients)

    def after_val_epoch(self, runner, metrics=None):
        self.record['metrics'] = metrics

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.record['loss'] = outputs['loss'].item()
        torch.save(self.record, self.path)


def import_everything() -> None:
    """Imports what the processes would each import, and lets mmcv's NMS, which takes float32, choose among float64."""
    for scope in launch.SCOPES:
        for part in ('models', 'datasets', 'engine', 'evaluation', 'visualization'):
            importlib.import_module(f'{scope}.{part}')
    operators = importlib.import_module('mmcv.ops.nms').ext_module
    nms = operators.nms
    operators.nms = lambda boxes, scores, **settings: nms(boxes.float(), scores.float(), **settings)


def doubles(model: nn.Module) -> None:
    """Gives the backbone float64; preprocessors make float32 of images."""
    model.backbone.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))


def step(case: Case, folder: Path) -> None:
    """What one process does."""
    torch.set_default_dtype(torch.float64)
    args = launch.make_parser('').parse_args([
        f'{folder}/{case.task}.py', '--launcher', 'pytorch', '--work-dir', str(folder / case.name)])
    images = STEP if case.images is None else len(case.images)
    args.cfg_options = {
        **TINY[case.task], **ONE_STEP, **TASKS[case.task], 'data_root': f'{folder}/{case.task}/', **case.options,
        **{f'{split}_dataloader.{key}': value for split in ('train', 'val') for key, value in dict(
            num_workers=0, persistent_workers=False, batch_size=images // case.processes).items()}}
    cfg = launch.load_config(args, ('train', 'val'))
    pipeline = cfg.train_dataloader.dataset.pipeline
    # Random numbers depend on the process.
    pipeline[:] = [transform for transform in pipeline if transform.type != 'RandomFlip']
    if case.task == 'detector':
        for stage in cfg.model.train_cfg.rcnn:
            stage.sampler.num = 10 ** 6
    cfg.train_dataloader.dataset.indices = case.images
    cfg.custom_hooks.append(dict(type='RecordStepHook', path=f'{cfg.work_dir}/rank{os.environ["RANK"]}.pth'))
    with safe_loading():
        runner = build_runner(cfg)
        model = unwrapped(runner.model)
        doubles(model)
        torch.manual_seed(0)
        separated(model)
        # Weights stay as they are when the training begins.
        model.init_weights = lambda: None
        if case.images is None:
            runner.val()
        runner.train()


def train_whole(folder: Path) -> None:
    """What one process of a training does that tools/train.py begins."""
    os.chdir(folder)
    sys.argv = ['train.py', 'config.py', '--work-dir', 'whole', '--launcher', 'pytorch']
    train.main()


def run(name: str, processes: int, function: Callable[[], None]) -> None:
    """Runs a function in so many processes, with the variables that torchrun gives them.

    Raises:
        RuntimeError: If a process fails; it has printed why.
    """
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    numbers = []
    for rank in range(processes):
        numbers.append(os.fork())
        if numbers[-1]:
            continue
        code = 1
        try:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                              LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
            launch.run(function)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    failed = [rank for rank, number in enumerate(numbers) if os.waitpid(number, 0)[1]]
    if failed:
        raise RuntimeError(f'{name}: processes {failed} of {processes} failed')


def prepare(folder: Path) -> None:
    """Makes data and configs, and this process ready to be forked."""
    torch.set_num_threads(1)
    import_everything()
    for task, make in MAKERS.items():
        make(folder / task, num_train=STEP, num_val=VALIDATED, image_size=64)
        # Without bases: to find those of mmdet takes a second.
        Config.fromfile(convneur_mm.config(CONFIGS[task])).dump(folder / f'{task}.py')
    # Most of the time of so short a run would go into the layout of the config's text.
    Config.pretty_text = property(repr)
    # The data sets collect garbage, which there would be much to look through for.
    gc.collect()
    gc.freeze()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='for data and results; a training of a config.py in it is run too')
    parser.add_argument('--cases', nargs='+', choices=[case.name for case in CASES],
                        default=[case.name for case in CASES])
    arguments = parser.parse_args()
    prepare(arguments.folder)
    root = arguments.folder.absolute()
    for each in CASES:
        if each.name in arguments.cases:
            (root / each.name).mkdir()
            run(each.name, each.processes, partial(step, each, root))
    if (root / 'config.py').exists():
        run('config.py', 2, partial(train_whole, root))
