"""Trainings of a few iterations of tiny models on generated pictures."""
from pathlib import Path

from managers import forget_runs
from mmengine.config import Config
from tiny_models import CONFIGS, TINY

from convneur_mm.datasets import make_shapes_ade20k, make_shapes_coco, make_shapes_imagenet
from convneur_mm.engine.launch import find_config, read_config
from convneur_mm.engine.runner.quiet_console import QuietRunner

MAKERS = dict(detector=make_shapes_coco, segmentor=make_shapes_ade20k, classifier=make_shapes_imagenet)
UNITS = dict(detector='epochs', segmentor='iters', classifier='epochs')


def train_tiny(task: str, folder: Path, length: int, options: dict | None = None) -> tuple[Path, Path]:
    """Trains a tiny model of a task on six pictures of 64 x 64, two at a time, and validates it at the end.

    Args:
        task (str): 'detector', 'segmentor' or 'classifier'.
        folder (Path): For config, data and work dir.
        length (int): Iterations of a segmentor, else epochs of three iterations.
        options (dict | None): More settings of the config. Defaults to None.

    Returns:
        tuple[Path, Path]: The config, and the checkpoint in the work dir.
    """
    MAKERS[task](folder / 'data', num_train=6, num_val=6, image_size=64)
    settings = {**TINY[task], f'max_{UNITS[task]}': length, 'train_cfg.val_interval': length,
                'default_hooks.checkpoint.interval': length, 'data_root': f'{folder}/data/', 'param_scheduler': None}
    for split in ('train', 'val', 'test'):
        loader = f'{split}_dataloader'
        settings |= {f'{loader}.batch_size': 2, f'{loader}.num_workers': 0, f'{loader}.persistent_workers': False}
    forget_runs()
    cfg = read_config(find_config(CONFIGS[task]), {**settings, **(options or {})})
    cfg.work_dir = str(folder / 'work')
    cfg.dump(folder / 'mine.py')
    QuietRunner.from_cfg(Config.fromfile(folder / 'mine.py')).train()
    checkpoint, = (folder / 'work').glob('*.pth')
    return folder / 'mine.py', checkpoint
