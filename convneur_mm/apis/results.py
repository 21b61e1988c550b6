"""Output files of predictions, and drawn pictures, for detectors, segmentors and classifiers."""
from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement

from ..engine.files.errors import LaunchError
from ..stack import require

# Name of the predictions in a data sample, by package.
FIELDS = dict(mmdet='pred_instances', mmseg='pred_sem_seg', mmpretrain='pred_score')
# In pixels: text over a classified picture is not legible if its shorter side is shorter.
LEGIBLE = 224
TOP = 5


class Results:
    """Write predictions to a folder one by one, and complete the files at the end of the context.

    Args:
        model (BaseModel): Model from :func:`init_model`.
        folder (Path): Existing folder to write to.

    Attributes:
        path (Path): File or folder of the predictions.
    """

    path: Path

    def __init__(self, model: BaseModel, folder: Path) -> None:
        self.classes: tuple[str, ...] = model.dataset_meta['classes']
        self.field = FIELDS[model.cfg.default_scope]

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *error: object) -> None:
        """Complete the files, even if the run was interrupted."""

    def add(self, name: str, file: str, sample: BaseDataElement) -> None:
        """Write the predictions of a picture.

        Args:
            name (str): For file names: its path below the input folder, without parts that all pictures share.
            file (str): For entries of one file: its path below the input folder.
            sample (BaseDataElement): The data sample.

        Raises:
            LaunchError: If the model's predictions are of another kind.
        """
        if self.field not in sample:
            found = [key for key in sample.keys() if key.startswith('pred')]  # noqa: SIM118  no dict
            raise LaunchError('the model is no detector, segmentor or classifier: its predictions are called '
                              f'{", ".join(found) or "nothing"}, expected {self.field}')
        self.write(name, file, sample)

    def write(self, name: str, file: str, sample: BaseDataElement) -> None:
        """Write a checked data sample, see :meth:`add`."""
        raise NotImplementedError


class Detections(Results):
    """Write ``detections.json`` in COCO's format for data sets, with a score for each annotation.

    ``categories`` are the model's classes, numbered from 1; masks are compressed run lengths. COCO's ``loadRes`` takes
    ``annotations`` alone.
    """

    def __init__(self, model: BaseModel, folder: Path) -> None:
        super().__init__(model, folder)
        self.path = folder / 'detections.json'
        self._images: list[dict] = []
        self._count = 0
        self._file = open(self.path, 'w', encoding='utf-8')  # noqa: SIM115  closed by __exit__
        categories = [dict(id=i, name=name) for i, name in enumerate(self.classes, 1)]
        self._file.write(f'{{"categories": {json.dumps(categories)},\n"annotations": [')

    def __exit__(self, *error: object) -> None:
        """Complete the files, see :meth:`Results.__exit__`."""
        self._file.write(f'\n],\n"images": {json.dumps(self._images)}}}\n')
        self._file.close()

    def write(self, name: str, file: str, sample: BaseDataElement) -> None:
        """Write a detector's predictions, see :meth:`Results.add`."""
        height, width = map(int, sample.ori_shape)
        self._images.append(dict(id=len(self._images) + 1, file_name=file, width=width, height=height))
        found = sample.pred_instances
        boxes, scores, labels = found.bboxes.tolist(), found.scores.tolist(), found.labels.tolist()
        masks = _run_lengths(found.masks) if 'masks' in found else [None] * len(boxes)
        for (left, top, right, bottom), score, label, mask in zip(boxes, scores, labels, masks, strict=True):
            self._count += 1
            entry = dict(id=self._count, image_id=len(self._images), category_id=label + 1,
                         bbox=[round(value, 2) for value in (left, top, right - left, bottom - top)],
                         area=round((right - left) * (bottom - top), 2), iscrowd=0, score=round(score, 5))
            if mask:
                entry.update(segmentation=mask, area=_area(mask))
            self._file.write(f'{"," if self._count > 1 else ""}\n{json.dumps(entry)}')


class LabelMaps(Results):
    """Write ``labels/NAME.png``, a one-channel picture with the class of each pixel, and ``classes.json``.

    The numbers are those of the annotation files, as in ``tools/test.py --out``: they start at 1 for data in which 0 is
    not a class, such as ADE20K. ``classes.json`` maps them to names and RGB colours.
    """

    def __init__(self, model: BaseModel, folder: Path) -> None:
        super().__init__(model, folder)
        self.path = folder / 'labels'
        self._first = int(bool(model.dataset_meta.get('reduce_zero_label')))
        classes = zip(self.classes, model.dataset_meta['palette'], strict=True)
        lines = [f'"{i}": {json.dumps(dict(name=name, color=color))}' for i, (name, color) in enumerate(
            classes, self._first)]
        (folder / 'classes.json').write_text('\n'.join(['{', ',\n'.join(lines), '}\n']), encoding='utf-8')
        self._dtype = np.uint8 if len(lines) + self._first <= 256 else np.uint16

    def write(self, name: str, file: str, sample: BaseDataElement) -> None:
        """Write a segmentor's prediction, see :meth:`Results.add`."""
        labels = sample.pred_sem_seg.data.squeeze(0).numpy() + self._first
        require('mmcv').imwrite(labels.astype(self._dtype), str(self.path / f'{name}.png'))


class Classifications(Results):
    """Write ``classifications.jsonl``, a line for each picture with its five best classes, the best first."""

    def __init__(self, model: BaseModel, folder: Path) -> None:
        super().__init__(model, folder)
        self.path = folder / 'classifications.jsonl'
        self._file = open(self.path, 'w', encoding='utf-8')  # noqa: SIM115  closed by __exit__

    def __exit__(self, *error: object) -> None:
        """Complete the file, see :meth:`Results.__exit__`."""
        self._file.close()

    def write(self, name: str, file: str, sample: BaseDataElement) -> None:
        """Write a classifier's prediction, see :meth:`Results.add`."""
        scores, labels = sample.pred_score.topk(min(TOP, len(sample.pred_score)))
        top = [dict(label=label, name=self.classes[label], score=round(score, 5))
               for score, label in zip(scores.tolist(), labels.tolist(), strict=True)]
        self._file.write(json.dumps(dict(file=file, top=top)) + '\n')


def open_results(model: BaseModel, folder: Path) -> Results:
    """Return the object that writes the predictions of a model to a folder.

    Raises:
        LaunchError: If the names of the classes are not known.
    """
    if 'classes' not in model.dataset_meta:
        key = 'classes' if model.cfg.default_scope == 'mmpretrain' else 'metainfo.classes'
        raise LaunchError('neither the checkpoint nor the config has the names of the classes: add --cfg-options '
                          f'test_dataloader.dataset.{key}="[a,b]"')
    kinds = dict(mmdet=Detections, mmseg=LabelMaps, mmpretrain=Classifications)
    return kinds[model.cfg.default_scope](model, folder)


class Painter:
    """Draw predictions by the visualizers of mmdet, mmseg and mmpretrain, without a display.

    Args:
        model (BaseModel): Model from :func:`init_model`.
        score_thr (float): Detections with a lower score are not drawn. Defaults to 0.3.
    """

    def __init__(self, model: BaseModel, score_thr: float = 0.3) -> None:
        scope = model.cfg.default_scope
        require(scope)
        module, kind = dict(mmdet=('mmdet.visualization', 'DetLocalVisualizer'),
                            mmseg=('convneur_mm.visualization.segmentation', 'SegmentationVisualizer'),
                            mmpretrain=('mmpretrain.visualization', 'UniversalVisualizer'))[scope]
        visualizer = getattr(import_module(module), kind)()
        visualizer.dataset_meta = model.dataset_meta
        # Without a file name, the visualizer passes the drawn picture to its backends, of which there are none.
        visualizer.add_image = self._keep
        self._classifies = scope == 'mmpretrain'
        self._draw = visualizer.visualize_cls if self._classifies else visualizer.add_datasample
        self._options = dict(pred_score_thr=score_thr) if scope == 'mmdet' else {}
        self._drawn: np.ndarray | None = None

    def _keep(self, name: str, image: np.ndarray, step: int = 0) -> None:
        self._drawn = image

    def __call__(self, picture: np.ndarray, sample: BaseDataElement) -> np.ndarray:
        """Draw predictions on a picture (H, W, 3) of uint8 in BGR and return the same kind; small classified pictures
        are enlarged."""
        if self._classifies and min(picture.shape[:2]) < LEGIBLE:
            picture = require('mmcv').imrescale(picture, LEGIBLE / min(picture.shape[:2]))
        image = np.ascontiguousarray(picture[..., ::-1])
        self._draw(name='', image=image, data_sample=sample, draw_gt=False, **self._options)
        return np.ascontiguousarray(self._drawn[..., ::-1])


def _run_lengths(masks: object) -> list[dict]:
    """Encode masks (N, H, W), tensor or array of bool, in COCO's compressed form."""
    encode = require('mmdet.structures.mask').encode_mask_results
    return [dict(size=[int(side) for side in mask['size']], counts=mask['counts'].decode())
            for mask in encode(np.asarray(masks))]


def _area(mask: dict) -> int:
    from pycocotools.mask import area
    return int(area(mask))
