"""The check of COCO's instance format."""
from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

from .images import checked_workers, decode_image, existing_file, existing_folder, in_parallel
from .report import ClassCount, Fault, Report

# Boxes may extend this many pixels beyond the border: rounding causes this, and it is harmless.
BOX_TOLERANCE = 0.5
# pycocotools counts pixels in 32 bit; a few more bits are harmless.
MAX_LENGTH_BITS = 40

_COCO_KEYS = {'categories': ('id', 'name'), 'images': ('id', 'file_name', 'width', 'height'),
              'annotations': ('id', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd')}
_SINGULAR = {'categories': 'category', 'images': 'image', 'annotations': 'annotation'}


def check_coco(ann_file: str | os.PathLike[str], image_dir: str | os.PathLike[str],
               workers: int | None = None) -> Report:
    """Check a data set in COCO's instance format.

    This finds images that are missing, do not decode completely or differ in size from the annotation file; and in that
    file: invalid JSON, missing keys, duplicate ids, annotations of an unknown image or category, boxes without area or
    reaching outside the image, and segmentations that do not give a mask of the image.

    Args:
        ann_file: The annotation file, ``instances_*.json``.
        image_dir: Folder to which the file names in ``ann_file`` are relative.
        workers: Number of decoding processes; None for one per core.

    Returns:
        The report, with images and instances of each class.

    Raises:
        FileNotFoundError: ``ann_file`` or ``image_dir`` does not exist.
        NotADirectoryError: ``image_dir`` is not a folder.
        ValueError: ``workers`` is not a positive integer.
    """
    start = time.perf_counter()
    workers = checked_workers(workers)
    ann_file, image_dir = existing_file(ann_file), existing_folder(image_dir)
    report = Report(f'COCO data set {ann_file}')
    content = _read_coco(ann_file, report)
    if content is not None:
        categories, images, annotations = (_by_id(content[key], key, ann_file, report) for key in _COCO_KEYS)
        _check_annotations(ann_file, categories, images, annotations, report)
        # Entries with other faults also name files that should decode.
        tasks = [(str(image_dir / image['file_name']), _size_of(image)) for image in content['images']
                 if isinstance(image, dict) and isinstance(image.get('file_name'), str)]
        for faults in in_parallel(_check_sized_image, tasks, workers):
            report.faults += faults
        report.images = len(content['images'])
    report.seconds = time.perf_counter() - start
    return report


def _read_coco(ann_file: Path, report: Report) -> dict[str, list[Any]] | None:
    """Return the lists of an annotation file, or None if it cannot be checked further."""
    try:
        content = json.loads(ann_file.read_bytes())
    except (ValueError, RecursionError) as error:
        report.add(ann_file, 'no JSON', f'is not valid JSON: {error}')
        return None
    if not isinstance(content, dict):
        report.add(ann_file, 'not COCO', f'must hold a JSON object, got {short_repr(content)}')
        return None
    lacking = [key for key in _COCO_KEYS if not isinstance(content.get(key), list)]
    for key in lacking:
        got = f'got {short_repr(content[key])}' if key in content else f'has only {", ".join(content) or "no keys"}'
        report.add(ann_file, 'not COCO', f'needs a list {key!r}, {got}')
    if lacking:
        return None
    for key in ('images', 'categories'):
        if not content[key]:
            report.add(ann_file, f'no {key}', f'its list {key!r} is empty')
    return content


def _by_id(entries: list[Any], key: str, ann_file: Path, report: Report) -> dict[int, dict[str, Any]]:
    """Return the entries that have all keys, by id; of entries with the same id the first."""
    what, required = _SINGULAR[key], _COCO_KEYS[key]
    found: dict[int, dict[str, Any]] = {}
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            report.add(ann_file, 'missing key', f'{key}[{index}] must be an object, got {short_repr(entry)}')
            continue
        name = f'{what} {entry["id"]}' if 'id' in entry else f'{key}[{index}]'
        if 'file_name' in entry:
            name += f' ({entry["file_name"]})'
        missing = [each for each in required if each not in entry]
        if missing:
            report.add(ann_file, 'missing key', f'{name} has no {", ".join(missing)}')
        elif not _is_integer(entry['id']):
            report.add(ann_file, 'bad id', f'{key}[{index}]: id must be an integer, got {short_repr(entry["id"])}')
        elif entry['id'] in found:
            report.add(ann_file, 'duplicate id', f'{name}: its id occurs before')
        else:
            found[entry['id']] = entry
    return found


def _check_annotations(ann_file: Path, categories: dict[int, dict[str, Any]], images: dict[int, dict[str, Any]],
                       annotations: dict[int, dict[str, Any]], report: Report) -> None:
    """Check all but the image files, count the classes, and note unusual data."""
    for category_id, category in categories.items():
        if not isinstance(category['name'], str):
            report.add(ann_file, 'bad category name', f'category {category_id}: name must be a string, '
                                                      f'got {short_repr(category["name"])}')
    names = Counter(str(category['name']) for category in categories.values())
    for name in sorted(name for name, count in names.items() if count > 1):
        report.add(ann_file, 'duplicate category name', f'{names[name]} categories are named {name!r}')
    for image_id, image in images.items():
        if not isinstance(image['file_name'], str):
            report.add(ann_file, 'bad file name', f'image {image_id}: file_name must be a string, '
                                                  f'got {short_repr(image["file_name"])}')
        if _size_of(image) is None:
            report.add(ann_file, 'bad size', f'image {image_id} ({image["file_name"]}): width and height must be '
                                             f'positive integers, got {image["width"]!r} and {image["height"]!r}')

    with_segmentation = sum(bool(annotation.get('segmentation')) for annotation in annotations.values())
    instances: Counter[int] = Counter()
    pairs: set[tuple[int, int]] = set()
    annotated: set[int] = set()
    thin = 0
    for annotation_id, annotation in annotations.items():
        image_id, category_id = annotation['image_id'], annotation['category_id']
        image = images.get(image_id) if _is_integer(image_id) else None
        name = f'annotation {annotation_id}' + (f' of {image["file_name"]}' if image else '')
        known = _is_integer(category_id) and category_id in categories
        if image is None:
            report.add(ann_file, 'unknown image', f'{name}: there is no image {image_id!r}')
        else:
            annotated.add(image_id)
        if not known:
            report.add(ann_file, 'unknown category', f'{name}: there is no category {category_id!r}')
        else:
            instances[category_id] += 1
            if image is not None:
                pairs.add((image_id, category_id))
        size = _size_of(image) if image is not None else None
        for kind, reason in _annotation_faults(annotation, size, with_segmentation > 0):
            report.add(ann_file, kind, f'{name}: {reason}')
        if _are_numbers(annotation['bbox'], 4) and 0 < min(annotation['bbox'][2:]) < 1:
            thin += 1

    in_images = Counter(category_id for _, category_id in pairs)
    report.counts = [ClassCount(str(category['name']), in_images[category_id], instances=instances[category_id])
                     for category_id, category in categories.items()]
    bare = len(images.keys() - annotated)
    if bare:
        report.notes.append(f'images without an annotation: {bare} (mmdet passes over them with filter_empty_gt=True)')
    if thin:
        report.notes.append(f'boxes less than a pixel wide or high: {thin} (mmdet passes over them)')
    if annotations and not with_segmentation:
        report.notes.append('there are boxes alone: no annotation has a segmentation, so no masks can be learned')
    if 0 in annotations:
        report.notes.append('an annotation has the id 0, which pycocotools takes for "no match": AP comes out too low')


def _annotation_faults(annotation: dict[str, Any], size: tuple[int, int] | None,
                       masks: bool) -> Iterator[tuple[str, str]]:
    """Yield kind and reason of each fault of an annotation, by itself and with its image's ``size`` (W, H)."""
    box, area = annotation['bbox'], annotation['area']
    if not _are_numbers(box, 4):
        yield 'bad box', f'bbox must be four numbers, got {short_repr(box)}'
    elif min(box[2:]) <= 0:
        yield 'box without area', f'box {box} (x, y, width, height) has no area'
    elif size is not None and (min(box[:2]) < -BOX_TOLERANCE or box[0] + box[2] > size[0] + BOX_TOLERANCE
                               or box[1] + box[3] > size[1] + BOX_TOLERANCE):
        yield 'box outside the image', (f'box {box} (x, y, width, height) reaches outside the image of '
                                        f'{size[0]} x {size[1]} (width x height)')
    if not _are_numbers([area], 1) or area <= 0:
        yield 'bad area', f'area must be a positive number, got {short_repr(area)}'
    if annotation['iscrowd'] not in (0, 1):
        yield 'bad iscrowd', f'iscrowd must be 0 or 1, got {short_repr(annotation["iscrowd"])}'
    segmentation = annotation.get('segmentation')
    if not segmentation:
        if masks:
            yield 'no segmentation', 'has no segmentation, unlike other annotations'
    elif isinstance(segmentation, dict):
        yield from _rle_faults(segmentation, size)
    elif isinstance(segmentation, list):
        yield from _polygon_faults(segmentation)
    else:
        yield 'bad segmentation', ('segmentation must be a list of polygons or a run-length encoding, '
                                   f'got {short_repr(segmentation)}')


def _polygon_faults(polygons: list[Any]) -> Iterator[tuple[str, str]]:
    for index, polygon in enumerate(polygons):
        if not isinstance(polygon, list):
            yield 'bad polygon', f'polygon {index} must be a list of numbers, got {short_repr(polygon)}'
            return  # A polygon without an enclosing list would else be reported for every number.
        if len(polygon) < 6 or len(polygon) % 2:
            yield 'bad polygon', (f'polygon {index} has {len(polygon)} numbers, where an even count of 6 or more is '
                                  'needed')
        elif not _are_numbers(polygon, len(polygon)):
            yield 'bad polygon', f'polygon {index} must hold finite numbers only'


def _rle_faults(rle: dict[str, Any], size: tuple[int, int] | None) -> Iterator[tuple[str, str]]:
    missing = [key for key in ('size', 'counts') if key not in rle]
    if missing:
        yield 'missing key', f'run-length encoding has no {", ".join(missing)}'
        return
    shape, counts = rle['size'], rle['counts']
    if not _are_numbers(shape, 2) or not all(_is_integer(side) for side in shape):
        yield 'bad run lengths', f'size of the run-length encoding must be [height, width], got {short_repr(shape)}'
        return
    if size is not None and (shape[1], shape[0]) != size:
        yield 'run lengths of another size', (
            f'run-length encoding is of size {shape} (height, width), the image of [{size[1]}, {size[0]}]')
    try:
        lengths = _uncompressed(counts)
    except ValueError as error:
        yield 'bad run lengths', str(error)
        return
    # pycocotools does not notice run lengths that end early, and fills the rest from uninitialised memory.
    if sum(lengths) != shape[0] * shape[1]:
        yield 'run lengths of another size', (f'run lengths cover {sum(lengths)} pixels, their size {shape} '
                                              f'(height, width) has {shape[0] * shape[1]}')


def _uncompressed(counts: Any) -> list[int]:
    """Return the run lengths of an encoding.

    Args:
        counts: The lengths, or COCO's string of them: little endian in digits of 5 bits, a sixth bit for continuation,
            48 added to make them printable; from the fourth length on, as difference to the last but one.

    Raises:
        ValueError: It is neither of these, or a length is negative.
    """
    if isinstance(counts, list):
        lengths = counts
    elif isinstance(counts, str):
        lengths = []
        value = shift = 0
        for character in counts:
            digit = ord(character) - 48
            if not 0 <= digit < 64:
                raise ValueError(f'run lengths hold the character {character!r}, which does not belong there')
            value |= (digit & 31) << shift
            shift += 5
            if shift > MAX_LENGTH_BITS:
                raise ValueError(f'run lengths hold a number of more than {MAX_LENGTH_BITS} bit')
            if digit & 32:
                continue
            if digit & 16:
                value -= 1 << shift
            lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
            value = shift = 0
        if shift:
            raise ValueError('run lengths end in the middle of a number')
    else:
        raise ValueError(f'run lengths must be a list or a string, got {short_repr(counts)}')
    if not all(_is_integer(length) and length >= 0 for length in lengths):
        raise ValueError('run lengths must be integers of 0 or more')
    return lengths


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) for value in values)


def _size_of(image: dict[str, Any]) -> tuple[int, int] | None:
    """Return (W, H) from the annotation file, or None if they are not a size."""
    sides = image.get('width'), image.get('height')
    return sides if all(_is_integer(side) and side > 0 for side in sides) else None


def _check_sized_image(task: tuple[str, tuple[int, int] | None]) -> list[Fault]:
    path, expected = task
    fault, size, stored = decode_image(path)
    if fault is not None:
        return [fault]
    if expected is not None and size != expected:
        hint = ' after the turn that its EXIF orientation asks for' if size != stored else ''
        return [Fault(path, 'wrong size', f'is {size[0]} x {size[1]} (width x height){hint}, its annotation says '
                                          f'{expected[0]} x {expected[1]}')]
    return []
