"""Files of predictions and pictures of them, for detectors, segmentors and classifiers."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement

from ..engine.files.errors import LaunchError
from ..stack import require

# Of a data sample, by the package it is of.
FIELDS = dict(mmdet='pred_instances', mmseg='pred_sem_seg', mmpretrain='pred_score')
# In pixels: the text over a classified picture is not legible on a shorter side.
LEGIBLE = 224
TOP = 5


class Results:
    """Writes predictions to a folder as they come, and ends the files properly when its context does.

    Args:
        model (BaseModel): As :func:`init_model` returns it.
        folder (Path): Where to write; it exists.

    Attributes:
        path (Path): The file or folder that holds the predictions.
    """

    path: Path

    def __init__(self, model: BaseModel, folder: Path) -> None:
        self.classes: tuple[str, ...] = model.dataset_meta['classes']
        self.field = FIELDS[model.cfg.default_scope]

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the files, also of a run that was interrupted."""

    def add(self, name: str, file: str, sample: BaseDataElement) -> None:
        """Writes the predictions of a picture.

        Args:
            name (str): For files: its path below the input folder, without what no two pictures differ in.
            file (str): Its path below the input folder, for entries of one file.
            sample (BaseDataElement): The data sample.

        Raises:
            LaunchError: If the model makes predictions of another kind.
        """
        if self.field not in sample:
            found = [key for key in sample.keys() if key.startswith('pred')]  # noqa: SIM118  no dict
            raise LaunchError('the model is no detector, segmentor or classifier: its predictions are called '
                              f'{", ".join(found) or "nothing"}, expected {self.field}')
        self.write(name, file, sample)

    def write(self, name: str, file: str, sample: BaseDataElement) -> None:
        """See :meth:`add`."""
        raise NotImplementedError


class Detections(Results):
    """``detections.json`` in COCO's form for data sets, each annotation with a score.

    ``categories`` are the model's classes, from 1 on; masks are compressed run lengths. ``annotations`` alone is what
    COCO's ``loadRes`` takes.
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
        """See :meth:`Results.__exit__`."""
        self._file.write(f'\n],\n"images": {json.dumps(self._images)}}}\n')
        self._file.close()

    def write(self, name: str, file: str, sample: BaseDataElement) -> None:
        """See :meth:`Results.add`."""
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
    """``labels/NAME.png``, a picture of one channel with the class of each pixel, and ``classes.json``.

    The numbers are those of the annotation files: from 1 on for data whose 0 is no class, such as ADE20K, as
    ``tools/test.py --out`` writes them. ``classes.json`` maps them to names and RGB colours.
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
        """See :meth:`Results.add`."""
        labels = sample.pred_sem_seg.data.squeeze(0).numpy() + self._first
        require('mmcv').imwrite(labels.astype(self._dtype), str(self.path / f'{name}.png'))


class Classifications(Results):
    """``classifications.jsonl``: a line for each picture, with its five best classes, the best first."""

    def __init__(self, model: BaseModel, folder: Path) -> None:
        super().__init__(model, folder)
        self.path = folder / 'classifications.jsonl'
        self._file = open(self.path, 'w', encoding='utf-8')  # noqa: SIM115  closed by __exit__

    def __exit__(self, *error: object) -> None:
        """See :meth:`Results.__exit__`."""
        self._file.close()

    def write(self, name: str, file: str, sample: BaseDataElement) -> None:
        """See :meth:`Results.add`."""
        scores, labels = sample.pred_score.topk(min(TOP, len(sample.pred_score)))
        top = [dict(label=label, name=self.classes[label], score=round(score, 5))
               for score, label in zip(scores.tolist(), labels.tolist(), strict=True)]
        self._file.write(json.dumps(dict(file=file, top=top)) + '\n')


def open_results(model: BaseModel, folder: Path) -> Results:
    """What writes the predictions of a model to a folder.

    Raises:
        LaunchError: If the names of its classes are not known.
    """
    if 'classes' not in model.dataset_meta:
        key = 'classes' if model.cfg.default_scope == 'mmpretrain' else 'metainfo.classes'
        raise LaunchError('neither the checkpoint nor the config has the names of the classes: add --cfg-options '
                          f'test_dataloader.dataset.{key}="[a,b]"')
    kinds = dict(mmdet=Detections, mmseg=LabelMaps, mmpretrain=Classifications)
    return kinds[model.cfg.default_scope](model, folder)


class Painter:
    """Draws predictions by the visualizers of mmdet, mmseg and mmpretrain, without a display.

    Args:
        model (BaseModel): As :func:`init_model` returns it.
        score_thr (float): Detections with a lower score are not drawn. Defaults to 0.3.
    """

    def __init__(self, model: BaseModel, score_thr: float = 0.3) -> None:
        scope = model.cfg.default_scope
        kind = dict(mmdet='DetLocalVisualizer', mmseg='SegLocalVisualizer', mmpretrain='UniversalVisualizer')[scope]
        visualizer = getattr(require(f'{scope}.visualization'), kind)()
        visualizer.dataset_meta = model.dataset_meta
        # Where no file is named, the drawn picture goes to the backends, of which there are none.
        visualizer.add_image = self._keep
        self._classifies = scope == 'mmpretrain'
        self._draw = visualizer.visualize_cls if self._classifies else visualizer.add_datasample
        self._options = dict(pred_score_thr=score_thr) if scope == 'mmdet' else {}
        self._drawn: np.ndarray | None = None

    def _keep(self, name: str, image: np.ndarray, step: int = 0) -> None:
        self._drawn = image

    def __call__(self, picture: np.ndarray, sample: BaseDataElement) -> np.ndarray:
        """A picture (H, W, 3) of uint8 in BGR with its predictions, of the same kind; a small one that is classified
        is enlarged."""
        if self._classifies and min(picture.shape[:2]) < LEGIBLE:
            picture = require('mmcv').imrescale(picture, LEGIBLE / min(picture.shape[:2]))
        image = np.ascontiguousarray(picture[..., ::-1])
        self._draw(name='', image=image, data_sample=sample, draw_gt=False, **self._options)
        return np.ascontiguousarray(self._drawn[..., ::-1])


def _run_lengths(masks: object) -> list[dict]:
    """Masks (N, H, W), tensor or array of bool, in COCO's compressed form."""
    encode = require('mmdet.structures.mask').encode_mask_results
    return [dict(size=[int(side) for side in mask['size']], counts=mask['counts'].decode())
            for mask in encode(np.asarray(masks))]


def _area(mask: dict) -> int:
    from pycocotools.mask import area
    return int(area(mask))
