"""Check the data before a run, and the labels of its first batch.

A label without a class would cause an obscure error of the loss or of CUDA.
"""
from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ..checks.data_files import DataError, check_samples
from ..files.errors import LaunchError
from ..runner.model_wrappers import unwrapped


class Allowed(NamedTuple):
    """The labels that a head takes.

    Attributes:
        key (str): Name of the head in the model.
        num_classes (int): Number of classes, whose labels begin at 0.
        ignored (int | None): A further label, which marks what has no class.
    """

    key: str
    num_classes: int
    ignored: int | None = None

    def wrong(self, labels: Tensor) -> list[int]:
        """Return the forbidden values in ``labels``, in order."""
        values = labels.unique()
        wrong = (values < 0) | (values >= self.num_classes)
        if self.ignored is not None:
            wrong &= values != self.ignored
        return values[wrong].tolist()


@HOOKS.register_module()
class LabelRangeHook(Hook):
    """Stop a training whose first batch has labels that the model's heads do not have.

    This checks mmseg's label maps, mmdet's boxes and mmpretrain's images on the CPU, before the model gets them.
    Before that, stop a run whose data lack files; see :func:`..checks.data_files.check_samples`.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._done = False

    def before_train(self, runner: Runner) -> None:
        """Check the data of training and validation.

        Raises:
            DataError: Names the data set and the file.
        """
        datasets = {'train_dataloader.dataset': runner.train_dataloader.dataset}
        if runner.val_loop is not None:
            datasets['val_dataloader.dataset'] = runner.val_dataloader.dataset
        _check_once(datasets)

    def before_test(self, runner: Runner) -> None:
        """Check the data of a test.

        Raises:
            DataError: Names the data set and the file.
        """
        _check_once({'test_dataloader.dataset': runner.test_dataloader.dataset})

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Check the labels of the first batch.

        Raises:
            LaunchError: Names the values, the file and the head, and what to set.
        """
        if self._done:
            return
        self._done = True
        samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
        if not isinstance(samples, (list, tuple)):
            return
        model = unwrapped(runner.model)
        for sample in samples:
            _check_label_map(model, sample)
            _check_boxes(model, sample)
            _check_image_label(model, sample)


def _check_once(datasets: dict[str, object]) -> None:
    """Check samples in one process of each machine, as machines may have different files.

    Raises:
        DataError: In all processes, with a fault that one of them found.
    """
    error = None
    if os.environ.get('LOCAL_RANK', '0') == '0':
        try:
            for key, dataset in datasets.items():
                check_samples(dataset, key)
        except DataError as found:
            error = str(found)
    errors = [found for found in all_gather_object(error) if found]
    if errors:
        raise DataError(error or errors[0])


def _check_label_map(model: nn.Module, sample: object) -> None:
    labels = getattr(getattr(sample, 'gt_sem_seg', None), 'data', None)
    if not isinstance(labels, Tensor):
        return
    heads = [_allowed_by(head, key) for key, head in _modules(model, 'decode_head', 'auxiliary_head')]
    for allowed in heads:
        wrong = allowed and allowed.wrong(labels)
        if not wrong:
            continue
        advice = 'mend the label maps, or set num_classes of all heads and metainfo.classes of the data sets'
        if len(wrong) == 1:
            advice += (f'; if {wrong[0]} is no class, set ignore_index={wrong[0]} in the data sets, in all heads and '
                       'in the evaluators')
            if wrong[0] == allowed.num_classes:
                advice += '; if the maps count the classes from 1, set reduce_zero_label=True in the data sets'
        raise LaunchError(
            f'{getattr(sample, "seg_map_path", "a label map")} has {_values(wrong)} after the pipeline: model.'
            f'{allowed.key} takes 0 to {allowed.num_classes - 1} (num_classes={allowed.num_classes}) and '
            f'{allowed.ignored} (ignore_index); {advice}')


def _check_boxes(model: nn.Module, sample: object) -> None:
    labels = getattr(getattr(sample, 'gt_instances', None), 'labels', None)
    if not isinstance(labels, Tensor):
        return
    roi_head = getattr(model, 'roi_head', None)
    for key, head in (*_modules(model, 'bbox_head', 'mask_head'),
                      *((f'roi_head.{key}', head) for key, head in _modules(roi_head, 'bbox_head', 'mask_head'))):
        number = getattr(head, 'num_classes', None)
        wrong = isinstance(number, int) and Allowed(key, number).wrong(labels)
        if wrong:
            raise LaunchError(
                f'{getattr(sample, "img_path", "an image")} has objects with {_values(wrong)}: model.{key} takes 0 to '
                f'{number - 1} (num_classes={number}); mend the annotations, or set num_classes of all heads and '
                'metainfo.classes of the data sets')


def _check_image_label(model: nn.Module, sample: object) -> None:
    number = getattr(getattr(model, 'head', None), 'num_classes', None)
    if not isinstance(number, int):
        return
    path = getattr(sample, 'img_path', 'an image')
    labels, scores = getattr(sample, 'gt_label', None), getattr(sample, 'gt_score', None)
    wrong = Allowed('head', number).wrong(labels) if isinstance(labels, Tensor) else []
    if wrong:
        raise LaunchError(
            f'{path} has {_values(wrong)}: model.head takes 0 to {number - 1} (num_classes={number}); mend the '
            'annotations, or set num_classes of head and data_preprocessor and the classes of the data sets')
    if isinstance(scores, Tensor) and len(scores) != number:
        raise LaunchError(f'{path} has scores of {len(scores)} classes: model.head takes {number} (num_classes); '
                          'set num_classes of head and data_preprocessor to the number of classes')


def _modules(model: nn.Module | None, *names: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of children with these names, also of those in lists."""
    for name in names:
        child = getattr(model, name, None)
        if isinstance(child, nn.ModuleList):
            yield from ((f'{name}[{i}]', module) for i, module in enumerate(child))
        elif isinstance(child, nn.Module):
            yield name, child


def _allowed_by(head: nn.Module, key: str) -> Allowed | None:
    """Return the labels that a head of mmseg takes, or None if the head does not tell."""
    number = getattr(head, 'num_classes', None)
    if not isinstance(number, int) or not hasattr(head, 'ignore_index'):
        return None
    # One output tells two classes apart.
    return Allowed(key, max(number, 2) if getattr(head, 'out_channels', None) == 1 else number, head.ignore_index)


def _values(labels: list[int]) -> str:
    shown = ', '.join(map(str, labels[:6]))
    return f'label {shown}' if len(labels) == 1 else f'labels {shown}{", …" if len(labels) > 6 else ""}'
