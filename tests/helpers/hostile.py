"""Rows of the tables in tests/test_hostile, and what their entries share."""
import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from tiny_models import CONFIGS, TINY

from convneur_mm.apis import init_model
from convneur_mm.engine.checks.class_checks import check_classes
from convneur_mm.engine.checks.data_files import check_samples
from convneur_mm.engine.checks.file_checks import check_data_files
from convneur_mm.engine.launch import find_config, read_config
from convneur_mm.engine.runner.quiet_console import QuietRunner

HANDLED = None


class Row(NamedTuple):
    """Something that users have, or are sent.

    Attributes:
        name (str): What it is.
        make (Callable): Makes it; what it takes and returns, the table says.
        check (str | None): Words of the fault that tools/check_dataset finds in it; HANDLED if it finds none.
        run (str | None): Words of the refusal of training, test or inference; HANDLED if it is none.
    """

    name: str
    make: Callable[..., Any]
    check: str | None = HANDLED
    run: str | None = HANDLED


def ids(rows: list[Row]) -> list[str]:
    assert len({row.name for row in rows}) == len(rows)
    return [row.name for row in rows]


@functools.cache
def _shipped(task: str) -> Config:
    cfg = read_config(find_config(CONFIGS[task]), dict(TINY[task]))
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].update(num_workers=0, persistent_workers=False)
    return cfg


def config(task: str, root: Path, **options: object) -> Config:
    """A shipped config of a tiny model whose data lie below ``root``, loaded in this process."""
    cfg = copy.deepcopy(_shipped(task))
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = f'{root}/'
    for split in ('val', 'test'):
        if 'ann_file' in cfg[f'{split}_evaluator']:
            cfg[f'{split}_evaluator'].ann_file = f'{root}/annotations/instances_val.json'
    cfg.merge_from_dict(options)
    return cfg


def built(task: str, checkpoint: str | Path | None = None, **options: object) -> BaseModel:
    """The model of such a config on the CPU."""
    return init_model(config(task, Path('nowhere'), **options), checkpoint, 'cpu')


def training_data(cfg: Config) -> BaseDataset:
    """The training data of a config as tools/train.py builds them, after its checks."""
    check_data_files(cfg, ('train',))
    check_classes(cfg, ('train',))
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        dataset = QuietRunner.build_dataloader(cfg.train_dataloader).dataset
    check_samples(dataset, 'train_dataloader.dataset')
    return dataset
