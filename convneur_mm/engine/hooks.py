"""Hooks of the training and test loops."""
from __future__ import annotations

import os.path as osp
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from mmengine import fileio
from mmengine.dist import utils as dist_utils
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner, TestLoop, ValLoop
from mmengine.structures import BaseDataElement

from ..stack import require
from .checkpoint import check_some_match, checkpoint_weights
from .model_wrappers import unwrapped
from .weights_file import CheckpointError


@HOOKS.register_module()
class CheckpointKeysHook(Hook):
    """Stops a run whose checkpoint has none of the model's weights; MMEngine would go on with random ones.

    And one that is to be resumed from a checkpoint of weights alone.
    """

    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compares the names in ``checkpoint`` with the model's before they are loaded.

        Raises:
            CheckpointError: If none of them is the same, or the state of training is missing where it is needed.
        """
        name = runner._load_from or 'the checkpoint'
        if runner._resume and not (isinstance(checkpoint.get('message_hub'), dict)
                                   and {'epoch', 'iter'} <= checkpoint.get('meta', {}).keys()):
            raise CheckpointError(f'{name} cannot be resumed from, as it holds weights but no state of training; name '
                                  'it as load_from instead')
        check_some_match(unwrapped(runner.model).state_dict(), checkpoint_weights(checkpoint), name)


@HOOKS.register_module()
class ClassNamesHook(Hook):
    """Stops a run in which a label would mean one class to the model and another to the data set.

    Labels are mere numbers, so nothing else would notice: the scores would be wrong, or the names in the pictures.
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        """Compares the class names with the categories of COCO annotation files, which mmdet numbers in file order.

        Raises:
            ValueError: If the names are in another order than the file's, or some are not in it.
        """
        for loop in (runner._val_loop, runner._test_loop):
            for metric in loop.evaluator.metrics if isinstance(loop, (ValLoop, TestLoop)) else ():
                coco = getattr(metric, '_coco_api', None)
                if coco is not None:
                    categories = [category['name'] for category in coco.dataset['categories']]
                    _check_categories(metric.dataset_meta['classes'], categories)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compares the classes a checkpoint was trained for with those it is tested on.

        Raises:
            ValueError: If there are more or fewer of them, or the same ones in another order.
        """
        if not isinstance(runner._test_loop, TestLoop):
            return
        trained = checkpoint.get('meta', {}).get('dataset_meta', {}).get('classes')
        tested = runner.test_loop.dataloader.dataset.metainfo.get('classes')
        if trained is None or tested is None or list(trained) == list(tested):
            return
        if len(trained) != len(tested) or set(trained) == set(tested):
            raise ValueError(
                f'the checkpoint tells {_some(trained)} apart, but test_dataloader.dataset has the classes '
                f'{_some(tested)}: its predictions would count for the wrong ones. Test on the classes it was trained '
                'for; for figures of each class add --cfg-options test_evaluator.classwise=True to a detector\'s test, '
                'while a segmentor\'s log lists them anyway')
        runner.logger.warning(f'the checkpoint calls its classes {_some(trained)}, the test data set {_some(tested)}')


def _check_categories(classes: Sequence[str], categories: Sequence[str]) -> None:
    found = [name for name in categories if name in classes]
    if found == list(classes):
        return
    missing = [name for name in classes if name not in categories]
    if missing:
        raise ValueError(f'the annotation file has no category {_some(missing)}; it has {_some(categories)}. Set '
                         'metainfo.classes of all three data sets to those that are to be found')
    raise ValueError(f'mmdet numbers the classes in the order of the annotation file, {_some(found)}, whereas '
                     f'metainfo.classes has them as {_some(classes)}, so that names would be swapped: set them in the '
                     'order of the file')


def _some(names: Sequence[str], count: int = 8) -> str:
    shown = ', '.join(map(str, names[:count]))
    return f'({shown}, … {len(names)} in all)' if len(names) > count else f'({shown})'


@HOOKS.register_module()
class DrawPredictionsHook(Hook):
    """Draws all test images with their predictions: detections, segmentations and classifications alike.

    The hooks of mmdet, mmseg and mmpretrain draw in the first of several processes alone, so that the images of the
    others are missing. Here each process draws its own, under the image's path below the folder of the images.

    Args:
        out_dir (str | None): Folder for the pictures. Defaults to None.
        show (bool): Whether the first process shows its pictures in a window. Defaults to False.
        wait_time (float): Seconds that a window stays. Defaults to 2.0.
        draw_args (dict | None): What else the visualizer takes, such as ``pred_score_thr``. Defaults to None.
    """

    def __init__(self, out_dir: str | None = None, show: bool = False, wait_time: float = 2.0,
                 draw_args: dict | None = None) -> None:
        self.out_dir = out_dir
        self.show = show
        self.wait_time = wait_time
        self.draw_args = draw_args or {}

    def before_test(self, runner: Runner) -> None:
        """Names the classes to the visualizers of all processes; the loop names them to the first."""
        with _as_main_process():
            runner.visualizer.dataset_meta = runner.test_loop.dataloader.dataset.metainfo

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                        outputs: Sequence[BaseDataElement] | None = None) -> None:
        """Draws the images of a batch, whose data samples ``outputs`` name the files."""
        mmcv = require('mmcv')  # which training and testing by themselves do without
        visualizer, dataset = runner.visualizer, runner.test_loop.dataloader.dataset
        classifies = hasattr(visualizer, 'visualize_cls')
        draw = visualizer.visualize_cls if classifies else visualizer.add_datasample
        for sample in outputs:
            name = _path_below_prefix(sample.img_path, dataset)
            out_file = osp.join(self.out_dir, name) if self.out_dir else None
            image = mmcv.imfrombytes(fileio.get(sample.img_path), channel_order='rgb')
            if classifies and min(image.shape[:2]) < 224:
                # The text over it would not be legible.
                image = mmcv.imrescale(image, 224 / min(image.shape[:2]))
            # Without a folder the pictures also go to the visualizer's backends, which only one process may write to.
            with _as_main_process() if out_file else nullcontext():
                draw(name=name, image=image, data_sample=sample, show=self.show and dist_utils.get_rank() == 0,
                     wait_time=self.wait_time, out_file=out_file, **self.draw_args)


def _path_below_prefix(path: str, dataset: object) -> str:
    """An image's path relative to the folder that the data set names, so that equal names in subfolders stay apart."""
    for prefix in getattr(dataset, 'data_prefix', {}).values():
        relative = osp.relpath(path, prefix) if prefix else '..'
        if not relative.startswith('..'):
            return relative
    return osp.basename(path)


@contextmanager
def _as_main_process() -> Iterator[None]:
    """Lets the methods run that MMEngine keeps to the first process; its visualizers' are all of that kind."""
    original = dist_utils.is_main_process
    dist_utils.is_main_process = lambda group=None: True
    try:
        yield
    finally:
        dist_utils.is_main_process = original
