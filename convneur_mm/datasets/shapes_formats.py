"""Data sets of generated shapes in three layouts, for detectors, segmentors and classifiers.

:func:`make_shapes_coco` writes pictures with masks of the objects, :func:`make_shapes_ade20k` pictures of larger
objects with label maps, and :func:`make_shapes_imagenet` pictures of one object each. ``shapes`` makes the pictures.
"""
from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.progress import track

from .shapes import (
    MAX_IMAGE_SIZE,
    MIN_IMAGE_SIZE,
    SHAPE_CLASSES,
    SPLITS,
    Instance,
    Scene,
    checked_int,
    scene_at,
    single_scene_at,
)

# Increase this with every change to the results of the same arguments, so that older folders are made again.
FORMAT_VERSION = 4
ADE20K_SPLITS = {'train': 'training', 'val': 'validation'}

_COMPLETE_NAME = 'shapes.json'
_UNFINISHED_NAME = 'shapes.unfinished.json'
_MADE_NAME = re.compile(r'\d{6,}\.(jpg|png)')


def make_shapes_coco(root: str | os.PathLike[str], num_train: int = 400, num_val: int = 100, image_size: int = 160,
                     seed: int = 0) -> Path:
    """Write the shapes as a data set in COCO's instance format.

    This makes ``train/*.jpg``, ``val/*.jpg``, ``annotations/instances_train.json``,
    ``annotations/instances_val.json`` and, last, ``shapes.json`` with the arguments. The same arguments give the same
    bytes with the same versions of numpy and OpenCV; an image depends on its split, its place there, ``image_size`` and
    ``seed``, but not on the number of images. A complete folder with the same arguments is left unchanged; one with
    other arguments, or an unfinished one, is made again. Images are 8 bit RGB; boxes and areas are those of the visible
    part, in pixels.

    Args:
        root: Folder to write to: missing, empty or an earlier result of this function.
        num_train: Number of training images, 1 to 999999.
        num_val: Number of validation images, 1 to 999999.
        image_size: Side of the square images, in pixels, 64 to 2048.
        seed: Random seed, 0 to 2**32 - 1.

    Returns:
        ``root`` as a path.

    Raises:
        ValueError: An argument is out of its range, or ``root`` is a file or has other content.
    """
    return _make(_Coco(), root, num_train, num_val, image_size, seed)


def make_shapes_ade20k(root: str | os.PathLike[str], num_train: int = 400, num_val: int = 100, image_size: int = 160,
                       seed: int = 0) -> Path:
    """Write the shapes as a data set in ADE20K's layout, for semantic segmentation.

    This makes ``images/training/*.jpg``, ``images/validation/*.jpg``, a label map of the same name for each,
    ``annotations/training/*.png`` and ``annotations/validation/*.png``, and, last, ``shapes.json``. A label map is
    single-channel uint8, shape (image_size, image_size): 0 is the background, which ``reduce_zero_label=True`` ignores,
    and 1 to 6 are ``SHAPE_CLASSES`` in order. The images hold three to six objects, more and larger ones than those of
    :func:`make_shapes_coco`, as a segmentor learns from pixels. Repeated runs behave as in that function.

    Args:
        root: Folder to write to: missing, empty or an earlier result of this function.
        num_train: Number of training images, 1 to 999999.
        num_val: Number of validation images, 1 to 999999.
        image_size: Side of the square images, in pixels, 64 to 2048.
        seed: Random seed, 0 to 2**32 - 1.

    Returns:
        ``root`` as a path.

    Raises:
        ValueError: An argument is out of its range, or ``root`` is a file or has other content.
    """
    return _make(_Ade20k(), root, num_train, num_val, image_size, seed)


def make_shapes_imagenet(root: str | os.PathLike[str], num_train: int = 400, num_val: int = 100, image_size: int = 160,
                         seed: int = 0) -> Path:
    """Write shapes as a data set in ImageNet's layout, for classification.

    This makes ``train/<class>/*.jpg``, ``val/<class>/*.jpg`` and, last, ``shapes.json``. Each picture shows one object,
    and the classes have equal numbers of pictures, up to one. A loader that numbers the classes by their folders, such
    as mmpretrain's ``CustomDataset``, takes them in alphabetical order: ``sorted(SHAPE_CLASSES)``. Repeated runs behave
    as in :func:`make_shapes_coco`.

    Args:
        root: Folder to write to: missing, empty or an earlier result of this function.
        num_train: Number of training images, 6 to 999999.
        num_val: Number of validation images, 6 to 999999.
        image_size: Side of the square images, in pixels, 64 to 2048.
        seed: Random seed, 0 to 2**32 - 1.

    Returns:
        ``root`` as a path.

    Raises:
        ValueError: An argument is out of its range, or ``root`` is a file or has other content.
    """
    return _make(_ImageNet(), root, num_train, num_val, image_size, seed)


def mask_to_segmentation(mask: np.ndarray) -> list[list[float]] | dict[str, Any]:
    """Convert a mask to a COCO segmentation that pycocotools decodes to exactly this mask.

    Args:
        mask: bool, shape (H, W).

    Returns:
        Polygons, each a flat list x0, y0, x1, y1, ... in pixels from the outer corner of the first pixel; or, for a
        mask that polygons cannot represent, such as one with holes, a compressed run-length encoding: ``size`` as
        [H, W] and ``counts`` as str.

    Raises:
        ValueError: The mask is not a two-dimensional bool array, or it is empty.
    """
    if mask.dtype != bool or mask.ndim != 2 or not mask.any():
        raise ValueError(f'mask must be a bool array of shape (H, W) with a pixel set, got {mask.dtype} of shape '
                         f'{mask.shape} with {np.count_nonzero(mask)} set')
    # OpenCV's outlines run through the centres of the outermost pixels and so lose half a pixel on all sides. On the
    # doubled mask this is a quarter, and the centres of the original pixels stay clearly inside.
    doubled = mask.repeat(2, 0).repeat(2, 1).astype(np.uint8)
    contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    # Straightened outlines are shorter and look better, so they come first; if they gain or lose a pixel, the
    # unchanged outline is used. Neither can represent a mask with holes.
    for tolerance in (0.8, 0.6, 0.0):
        lines = [cv2.approxPolyDP(contour, tolerance, True) if tolerance else contour for contour in contours]
        polygons = [((line.reshape(-1) + 0.5) / 2).tolist() for line in lines if len(line) >= 3]
        if polygons and np.array_equal(_decode(polygons, mask.shape), mask):
            return polygons
    from pycocotools import mask as coco_mask  # an optional dependency, imported where needed
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {'size': [int(side) for side in mask.shape], 'counts': encoded['counts'].decode('ascii')}


class _Form:
    """A layout on disk: the files of a scene and their content."""

    name: str
    """Tells the forms apart in ``shapes.json``."""
    maker: str
    """The public function, for messages."""
    min_images = 1
    """The least number of images of a split."""

    def scene(self, seed: int, split: str, index: int, size: int) -> Scene:
        return scene_at(seed, split, index, size)

    def paths(self, split: str, index: int) -> tuple[str, ...]:
        """Return the files of the scene at a place, relative to the root."""
        raise NotImplementedError

    def write(self, scene: Scene, paths: tuple[Path, ...]) -> Any:
        """Write a scene to its files, and return its record for :meth:`finish`."""
        _write_image(paths[0], scene.image)

    def split_paths(self, split: str) -> tuple[str, ...]:
        """Return the files of a split, other than those of its scenes, relative to the root."""
        return ()

    def finish(self, paths: tuple[Path, ...], split: str, records: list[Any]) -> None:
        """Write the files of a split from the records that :meth:`write` returned, in the order of the scenes."""

    def folders(self, split: str) -> set[str]:
        # One scene of each class covers all folders of any layout.
        paths = [path for index in range(len(SHAPE_CLASSES)) for path in self.paths(split, index)]
        return {str(PurePosixPath(path).parent) for path in paths}


class _Coco(_Form):
    name = 'convneur_mm shapes, COCO instances'
    maker = 'make_shapes_coco'

    def paths(self, split: str, index: int) -> tuple[str, ...]:
        return (f'{split}/{_stem(index)}.jpg',)

    def write(self, scene: Scene, paths: tuple[Path, ...]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        super().write(scene, paths)
        height, width = scene.image.shape[:2]
        return ({'file_name': paths[0].name, 'width': width, 'height': height, 'license': 1},
                [_coco_annotation(instance) for instance in scene.instances])

    def split_paths(self, split: str) -> tuple[str, ...]:
        return (f'annotations/instances_{split}.json',)

    def finish(self, paths: tuple[Path, ...], split: str, records: list[Any]) -> None:
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        # pycocotools treats an annotation id of 0 as "no match", so both ids start at 1.
        for image_id, (image, image_annotations) in enumerate(records, start=1):
            images.append({'id': image_id, **image})
            for annotation in image_annotations:
                annotations.append({'id': len(annotations) + 1, 'image_id': image_id, **annotation})
        _write_json(paths[0], {
            'info': {'description': f'Shapes on textured backgrounds, {split}', 'version': str(FORMAT_VERSION)},
            'licenses': [{'id': 1, 'name': 'Apache License 2.0', 'url': 'https://www.apache.org/licenses/LICENSE-2.0'}],
            'images': images,
            'annotations': annotations,
            'categories': [{'id': label + 1, 'name': name, 'supercategory': 'shape'}
                           for label, name in enumerate(SHAPE_CLASSES)],
        })


class _Ade20k(_Form):
    name = 'convneur_mm shapes, ADE20K'
    maker = 'make_shapes_ade20k'

    def scene(self, seed: int, split: str, index: int, size: int) -> Scene:
        # A segmentor learns from pixels, of which few small objects have too few.
        return scene_at(seed, split, index, size, large=True)

    def paths(self, split: str, index: int) -> tuple[str, ...]:
        folder = ADE20K_SPLITS[split]
        return f'images/{folder}/{_stem(index)}.jpg', f'annotations/{folder}/{_stem(index)}.png'

    def write(self, scene: Scene, paths: tuple[Path, ...]) -> None:
        super().write(scene, paths)
        labels = np.zeros(scene.image.shape[:2], np.uint8)
        for instance in scene.instances:
            labels[instance.mask] = instance.label + 1
        _write_image(paths[1], labels)


class _ImageNet(_Form):
    name = 'convneur_mm shapes, ImageNet'
    maker = 'make_shapes_imagenet'
    # With fewer images, a class would have no folder, and the class numbers would differ between the splits.
    min_images = len(SHAPE_CLASSES)

    def scene(self, seed: int, split: str, index: int, size: int) -> Scene:
        return single_scene_at(seed, split, index, size)

    def paths(self, split: str, index: int) -> tuple[str, ...]:
        return (f'{split}/{SHAPE_CLASSES[index % len(SHAPE_CLASSES)]}/{_stem(index)}.jpg',)


def _make(form: _Form, root: str | os.PathLike[str], num_train: int, num_val: int, image_size: int, seed: int) -> Path:
    root = Path(root)
    counts = {'train': checked_int('num_train', num_train, form.min_images, 999999),
              'val': checked_int('num_val', num_val, form.min_images, 999999)}
    arguments = {'format': form.name, 'version': FORMAT_VERSION, 'num_train': counts['train'],
                 'num_val': counts['val'],
                 'image_size': checked_int('image_size', image_size, MIN_IMAGE_SIZE, MAX_IMAGE_SIZE),
                 'seed': checked_int('seed', seed, 0, 2**32 - 1)}
    if not _claim(form, root, arguments):
        return root
    for split, count in counts.items():
        split_paths = tuple(root / path for path in form.split_paths(split))
        for folder in {root / folder for folder in form.folders(split)} | {path.parent for path in split_paths}:
            folder.mkdir(parents=True, exist_ok=True)
        records = []
        for index in track(range(count), description=f'{split} images', console=Console(stderr=True)):
            scene = form.scene(arguments['seed'], split, index, arguments['image_size'])
            records.append(form.write(scene, tuple(root / path for path in form.paths(split, index))))
        form.finish(split_paths, split, records)
    os.replace(root / _UNFINISHED_NAME, root / _COMPLETE_NAME)
    return root


def _claim(form: _Form, root: Path, arguments: dict[str, Any]) -> bool:
    """Prepare ``root`` for writing; return False if there is nothing to do.

    While a set is written, a file of another name holds the arguments. So an interrupted run can be recognised as ours,
    and its files can be removed without a risk for other files.
    """
    if root.exists() and not root.is_dir():
        raise ValueError(f'root must be a folder, got a file: {root}')
    root.mkdir(parents=True, exist_ok=True)
    complete, unfinished = root / _COMPLETE_NAME, root / _UNFINISHED_NAME
    found = _read_arguments(form, complete)
    if found is None and _read_arguments(form, unfinished) is None and any(root.iterdir()):
        raise ValueError(f'root must be missing, empty or made by {form.maker}, got a folder with other content: '
                         f'{root}')
    if found == arguments and _is_complete(form, root, arguments):
        return False
    _write_json(unfinished, arguments)
    complete.unlink(missing_ok=True)
    for split in SPLITS:
        for path in form.split_paths(split):
            (root / path).unlink(missing_ok=True)
        for folder in form.folders(split):
            for path in (root / folder).glob('*'):
                if _MADE_NAME.fullmatch(path.name):
                    path.unlink()
    return True


def _is_complete(form: _Form, root: Path, arguments: dict[str, Any]) -> bool:
    for split in SPLITS:
        folders = form.folders(split)
        if not all((root / path).is_file() for path in form.split_paths(split)) or not all(
                (root / folder).is_dir() for folder in folders):
            return False
        # One listing per folder, since checking every file takes seconds on a network drive.
        present = {f'{folder}/{name}' for folder in folders for name in os.listdir(root / folder)}
        if not all(present.issuperset(form.paths(split, index)) for index in range(arguments[f'num_{split}'])):
            return False
    return True


def _read_arguments(form: _Form, path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get('format') == form.name else None


def _stem(index: int) -> str:
    return f'{index + 1:06d}'


def _decode(polygons: list[list[float]], shape: tuple[int, ...]) -> np.ndarray:
    from pycocotools import mask as coco_mask
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *shape))).astype(bool)


def _coco_annotation(instance: Instance) -> dict[str, Any]:
    rows, columns = np.flatnonzero(instance.mask.any(1)), np.flatnonzero(instance.mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    return {'category_id': instance.label + 1,
            'bbox': [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
            'area': int(instance.mask.sum()),
            'iscrowd': 0,
            'segmentation': mask_to_segmentation(instance.mask)}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, separators=(',', ':')) + '\n', encoding='utf-8')


def _write_image(path: Path, image: np.ndarray) -> None:
    """Write an RGB picture or a label map, uint8, shape (H, W, 3) or (H, W), in the format of ``path``'s suffix."""
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    # OpenCV ignores settings of other formats.
    done, buffer = cv2.imencode(path.suffix, image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    if not done:
        raise OSError(f'OpenCV could not encode {path}')
    path.write_bytes(buffer.tobytes())
