"""Hook that draws predictions."""
from __future__ import annotations

import os.path as osp
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from mmengine import fileio
from mmengine.dist import utils as dist_utils
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement

from ...stack import require


@HOOKS.register_module()
class DrawPredictionsHook(Hook):
    """Draw all test images with their predictions: detections, segmentations and classifications alike.

    The hooks of mmdet, mmseg and mmpretrain draw only in the first of several processes, so the images of the others
    are missing. Here each process draws its own images, under their paths below the folder of the images.

    Args:
        out_dir (str | None): Folder for the pictures. Defaults to None.
        show (bool): Whether the first process shows its pictures in a window. Defaults to False.
        wait_time (float): Seconds for which a window stays. Defaults to 2.0.
        draw_args (dict | None): Other arguments of the visualizer, such as ``pred_score_thr``. Defaults to None.
    """

    def __init__(self, out_dir: str | None = None, show: bool = False, wait_time: float = 2.0,
                 draw_args: dict | None = None) -> None:
        self.out_dir = out_dir
        self.show = show
        self.wait_time = wait_time
        self.draw_args = draw_args or {}

    def before_test(self, runner: Runner) -> None:
        """Set the classes of all processes' visualizers; the loop sets them only in the first."""
        with _as_main_process():
            runner.visualizer.dataset_meta = runner.test_loop.dataloader.dataset.metainfo

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                        outputs: Sequence[BaseDataElement] | None = None) -> None:
        """Draw the images of a batch; the data samples ``outputs`` name the files."""
        mmcv = require('mmcv')  # training and testing by themselves do not need it
        visualizer, dataset = runner.visualizer, runner.test_loop.dataloader.dataset
        classifies = hasattr(visualizer, 'visualize_cls')
        draw = visualizer.visualize_cls if classifies else visualizer.add_datasample
        for sample in outputs:
            name = _path_below_prefix(sample.img_path, dataset)
            out_file = osp.join(self.out_dir, name) if self.out_dir else None
            image = mmcv.imfrombytes(fileio.get(sample.img_path), channel_order='rgb')
            if classifies and min(image.shape[:2]) < 224:
                # Text on small images is not legible.
                image = mmcv.imrescale(image, 224 / min(image.shape[:2]))
            # Without a folder, pictures also go to the visualizer's backends, to which only one process may write.
            with _as_main_process() if out_file else nullcontext():
                draw(name=name, image=image, data_sample=sample, show=self.show and dist_utils.get_rank() == 0,
                     wait_time=self.wait_time, out_file=out_file, **self.draw_args)


def _path_below_prefix(path: str, dataset: object) -> str:
    """Return an image's path below the data set's folder, which keeps equal names in subfolders apart."""
    for prefix in getattr(dataset, 'data_prefix', {}).values():
        relative = osp.relpath(path, prefix) if prefix else '..'
        if not relative.startswith('..'):
            return relative
    return osp.basename(path)


@contextmanager
def _as_main_process() -> Iterator[None]:
    """Let methods run that MMEngine restricts to the first process, such as all those of its visualizers."""
    original = dist_utils.is_main_process
    dist_utils.is_main_process = lambda group=None: True
    try:
        yield
    finally:
        dist_utils.is_main_process = original
