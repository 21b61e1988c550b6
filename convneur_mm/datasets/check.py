"""Checks of a data set before training: that every file is there and decodes, and that the annotations fit.

A fault is something that stops a run, perhaps hours later, or lets it learn from wrong data without a word. A function
for each layout, :func:`check_coco`, :func:`check_ade20k` and :func:`check_imagenet`, finds all of them at once.
"""
from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, TypeVar

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as ProgressTask
from rich.text import Text

from .shapes import checked_int

# What mmpretrain takes for an image in a class folder, in lower or upper case; it passes over all other files.
IMAGENET_SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')
# A box may reach this many pixels over the border: rounding does that, and it changes nothing.
BOX_TOLERANCE = 0.5
MAX_WORKERS = 1024

_EXIF_ORIENTATION = 0x0112
# The EXIF orientations that swap width and height.
_TURNED = (5, 6, 7, 8)
_COCO_KEYS = {'categories': ('id', 'name'), 'images': ('id', 'file_name', 'width', 'height'),
              'annotations': ('id', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd')}
_SINGULAR = {'categories': 'category', 'images': 'image', 'annotations': 'annotation'}

_Item = TypeVar('_Item')
_Result = TypeVar('_Result')


@dataclass(frozen=True)
class Fault:
    """Something to mend.

    Attributes:
        path: The file, or for an annotation the annotation file.
        kind: What sort of fault it is, in few words, the same for all of the sort.
        reason: What is wrong with this one.
    """

    path: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f'{self.path}: {self.reason}'


@dataclass(frozen=True)
class ClassCount:
    """How often a class occurs.

    Attributes:
        name: Name of the class.
        images: Images it occurs in.
        instances: Its annotations; only of COCO.
        pixels: Its pixels; only of ADE20K.
    """

    name: str
    images: int
    instances: int | None = None
    pixels: int | None = None


@dataclass
class Report:
    """What a check found.

    Attributes:
        name: What was checked.
        images: Number of images that should be there.
        counts: A count for each class, those that do not occur included.
        faults: All faults, in the order of the files.
        notes: What is no fault, but good to know.
        seconds: How long the check took.
    """

    name: str
    images: int = 0
    counts: list[ClassCount] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        """Whether there are no faults."""
        return not self.faults

    def add(self, path: str | os.PathLike[str], kind: str, reason: str) -> None:
        """Adds a fault."""
        self.faults.append(Fault(str(path), kind, reason))

    def text(self, max_shown: int = 10, width: int | None = None) -> str:
        """The report for a person to read.

        Args:
            max_shown: How many faults to show; of the others, how many there are.
            width: Characters in a line of the classes and notes; None for those of the terminal.

        Returns:
            Lines without a last line break.
        """
        width = width or shutil.get_terminal_size().columns
        rate = f' ({self.images / self.seconds:.0f} images/s)' if self.images and self.seconds else ''
        lines = [f'{self.name}: {self.images} images, checked in {self.seconds:.1f} s{rate}']
        occurring = [count for count in self.counts if count.images or count.instances]
        lines += ['', *_class_table(occurring, width)] if occurring else []
        absent = [count.name for count in self.counts if not (count.images or count.instances)]
        notes = list(self.notes)
        if absent:
            notes.append(f'classes that do not occur: {len(absent)} ({", ".join(absent)})')
        if notes:
            lines += ['', *(textwrap.fill(f'note: {note}', width, subsequent_indent='  ') for note in notes)]
        if not self.faults:
            return '\n'.join([*lines, '', 'no faults'])
        kinds = Counter(fault.kind for fault in self.faults)
        lines += ['', f'faults: {len(self.faults)} ({", ".join(f"{n} {kind}" for kind, n in kinds.most_common())})']
        lines += [f'  {fault}' for fault in self.faults[:max_shown]]
        if len(self.faults) > max_shown:
            lines.append(f'  ... and {len(self.faults) - max_shown} more')
        return '\n'.join(lines)


def check_coco(ann_file: str | os.PathLike[str], image_dir: str | os.PathLike[str],
               workers: int | None = None) -> Report:
    """Checks a data set in COCO's instance format.

    Finds images that are missing, do not decode to their end or differ in size from what the annotation file says;
    and in that file: JSON that does not parse, missing keys, ids that occur twice, annotations of an unknown image or
    category, boxes without area or reaching outside the image, and segmentations that give no mask of the image.

    Args:
        ann_file: The annotation file, ``instances_*.json``.
        image_dir: Folder that the file names in ``ann_file`` are relative to.
        workers: Processes to decode images with; None for one on each core.

    Returns:
        The report, with images and instances of each class.

    Raises:
        FileNotFoundError: ``ann_file`` or ``image_dir`` does not exist.
        NotADirectoryError: ``image_dir`` is no folder.
        ValueError: ``workers`` is not a positive integer.
    """
    start = time.perf_counter()
    workers = _checked_workers(workers)
    ann_file, image_dir = _existing_file(ann_file), _existing_folder(image_dir)
    report = Report(f'COCO data set {ann_file}')
    content = _read_coco(ann_file, report)
    if content is not None:
        categories, images, annotations = (_by_id(content[key], key, ann_file, report) for key in _COCO_KEYS)
        _check_annotations(ann_file, categories, images, annotations, report)
        # Entries with other faults name files that should decode all the same.
        tasks = [(str(image_dir / image['file_name']), _size_of(image)) for image in content['images']
                 if isinstance(image, dict) and isinstance(image.get('file_name'), str)]
        for faults in _in_parallel(_check_sized_image, tasks, workers):
            report.faults += faults
        report.images = len(content['images'])
    report.seconds = time.perf_counter() - start
    return report


def check_ade20k(image_dir: str | os.PathLike[str], label_dir: str | os.PathLike[str], num_classes: int = 150,
                 image_suffix: str = '.jpg', label_suffix: str = '.png', workers: int | None = None) -> Report:
    """Checks a split of a data set in ADE20K's layout: images, and a label map of the same name for each.

    Finds images without a label map and the reverse, files that do not decode to their end, pairs that differ in size,
    and label maps that are not single-channel 8 bit or have values above ``num_classes``. Values are 0 for what belongs
    to no class and 1 to ``num_classes`` for the classes.

    Args:
        image_dir: Folder of the images, searched with its subfolders.
        label_dir: Folder of the label maps, searched likewise.
        num_classes: Number of classes, 1 to 254; 255 means "ignore" once labels are loaded.
        image_suffix: How the names of images end, in this case; mmsegmentation's ``img_suffix``.
        label_suffix: How the names of label maps end instead; mmsegmentation's ``seg_map_suffix``.
        workers: Processes to decode files with; None for one on each core.

    Returns:
        The report, with images and pixels of each class; the first is "other", value 0.

    Raises:
        FileNotFoundError: ``image_dir`` or ``label_dir`` does not exist.
        NotADirectoryError: One of them is no folder.
        ValueError: ``workers`` or ``num_classes`` is not an integer in its range.
    """
    start = time.perf_counter()
    workers, num_classes = _checked_workers(workers), checked_int('num_classes', num_classes, 1, 254)
    image_dir, label_dir = _existing_folder(image_dir), _existing_folder(label_dir)
    report = Report(f'ADE20K data set {image_dir}')
    images = {path.removesuffix(image_suffix) for path in _files_under(image_dir) if path.endswith(image_suffix)}
    labels = {path.removesuffix(label_suffix) for path in _files_under(label_dir) if path.endswith(label_suffix)}
    for folder, names, suffix in ((image_dir, images, image_suffix), (label_dir, labels, label_suffix)):
        if not names:
            report.add(folder, 'no files', f'no file in this folder ends in {suffix}')
    for name in sorted(images - labels):
        report.add(image_dir / (name + image_suffix), 'image without label map',
                   f'has no label map {label_dir / (name + label_suffix)}')
    for name in sorted(labels - images):
        report.add(label_dir / (name + label_suffix), 'label map without image',
                   f'has no image {image_dir / (name + image_suffix)}')

    tasks = [(str(image_dir / (name + image_suffix)) if name in images else None,
              str(label_dir / (name + label_suffix)) if name in labels else None, num_classes)
             for name in sorted(images | labels)]
    pixels, with_class = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for faults, histogram in _in_parallel(_check_pair, tasks, workers):
        report.faults += faults
        pixels += histogram
        with_class += histogram > 0
    report.counts = [ClassCount(name, int(with_class[value]), pixels=int(pixels[value]))
                     for value, name in enumerate(['other', *_ade20k_names(num_classes)])]
    report.images = len(images)
    report.seconds = time.perf_counter() - start
    return report


def check_imagenet(folder: str | os.PathLike[str], workers: int | None = None) -> Report:
    """Checks a split of a data set in ImageNet's layout: a folder for each class, with its images.

    Finds classes without an image, files that are no images or do not decode to their end, and images that lie beside
    the class folders instead of in one. As for mmpretrain, hidden files do not count, and subfolders of a class do.

    Args:
        folder: Folder of the class folders.
        workers: Processes to decode images with; None for one on each core.

    Returns:
        The report, with images of each class that decode, the classes in the order in which mmpretrain numbers them.

    Raises:
        FileNotFoundError: ``folder`` does not exist.
        NotADirectoryError: ``folder`` is no folder.
        ValueError: ``workers`` is not a positive integer.
    """
    start = time.perf_counter()
    workers = _checked_workers(workers)
    folder = _existing_folder(folder)
    report = Report(f'ImageNet data set {folder}')
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        report.add(folder, 'no class folders', 'holds no class folders')
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir() and entry.name.lower().endswith(IMAGENET_SUFFIXES):
            report.add(entry, 'outside the class folders', 'lies in no class folder, so it would not be used')
    tasks: list[tuple[str, str]] = []
    for name in classes:
        files = sorted(_files_under(folder / name))
        images = [file for file in files if file.lower().endswith(IMAGENET_SUFFIXES)]
        tasks += [(name, str(folder / name / file)) for file in images]
        if not images:
            report.add(folder / name, 'empty class', 'class folder without an image')
        for file in sorted(set(files).difference(images)):
            report.add(folder / name / file, 'not an image', f'its name ends in none of {" ".join(IMAGENET_SUFFIXES)}')
    counts = Counter(dict.fromkeys(classes, 0))
    for name, faults in _in_parallel(_check_class_image, tasks, workers):
        report.faults += faults
        counts[name] += not faults
    report.counts = [ClassCount(name, counts[name]) for name in classes]
    report.images = len(tasks)
    report.seconds = time.perf_counter() - start
    return report


def _checked_workers(workers: int | None) -> int:
    if workers is not None:
        return checked_int('workers', workers, 1, MAX_WORKERS)
    # Where the system says which cores this process may use, those, since a job often has a share of the machine.
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _existing_file(path: str | os.PathLike[str]) -> Path:
    if not Path(path).is_file():
        raise FileNotFoundError(f'no such file: {path}')
    return Path(path)


def _existing_folder(path: str | os.PathLike[str]) -> Path:
    if not Path(path).exists():
        raise FileNotFoundError(f'no such folder: {path}')
    if not Path(path).is_dir():
        raise NotADirectoryError(f'not a folder: {path}')
    return Path(path)


def _files_under(folder: Path) -> Iterator[str]:
    """The files below a folder as mmengine lists them, relative to it: without hidden ones, through links."""
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if not name.startswith('.'):
                yield Path(parent, name).relative_to(folder).as_posix()


def _ade20k_names(num_classes: int) -> Sequence[str]:
    if num_classes != 150:
        return [f'class {value}' for value in range(1, num_classes + 1)]
    from mmseg.utils import ade_classes  # Here, since it takes the better part of a second and the others need it not.
    return [name.strip() for name in ade_classes()]


def _class_table(counts: list[ClassCount], width: int) -> list[str]:
    """The counts as a table, with several classes side by side where the lines are long enough."""
    rows = [['class', 'images']]
    total = sum(count.pixels or 0 for count in counts)
    if counts[0].instances is not None:
        rows[0].append('instances')
    if counts[0].pixels is not None:
        rows[0].append('pixels')
    for count in counts:
        rows.append([count.name, str(count.images)])
        if count.instances is not None:
            rows[-1].append(str(count.instances))
        if count.pixels is not None:
            rows[-1].append(f'{count.pixels / max(total, 1):.2%}')
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = ['  '.join(text.ljust(size) if i == 0 else text.rjust(size)
                       for i, (text, size) in enumerate(zip(row, widths, strict=True))) for row in rows]
    header, cells = cells[0], cells[1:]
    # A column fewer than ten classes high is not worth the search for where the next one starts.
    columns = max(1, min((width - 2) // (len(header) + 4), -(-len(cells) // 10)))
    height = -(-len(cells) // columns)
    columns = -(-len(cells) // height)
    lines = ['    '.join([header] * columns)]
    lines += ['    '.join(cells[row::height]) for row in range(height)]
    return [f'  {line}' for line in lines]


def _read_coco(ann_file: Path, report: Report) -> dict[str, list[Any]] | None:
    """The lists of an annotation file, or None if there is nothing to check further."""
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
    if not content['images']:
        report.add(ann_file, 'no images', "its list 'images' is empty")
    return content


def _by_id(entries: list[Any], key: str, ann_file: Path, report: Report) -> dict[int, dict[str, Any]]:
    """The entries that have all keys, by id; of those that share one the first."""
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
    """Checks all but the image files, counts the classes, and notes what is unusual."""
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
    """Kind and reason of what is wrong with an annotation by itself and with the ``size`` (W, H) of its image."""
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
            return  # A polygon that is not in a list of its own would else be reported for every number.
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
    # pycocotools does not notice when they end early, and gives whatever was in memory for the rest.
    if sum(lengths) != shape[0] * shape[1]:
        yield 'run lengths of another size', (f'run lengths cover {sum(lengths)} pixels, their size {shape} '
                                              f'(height, width) has {shape[0] * shape[1]}')


def _uncompressed(counts: Any) -> list[int]:
    """The run lengths of an encoding.

    Args:
        counts: The lengths, or the string that COCO packs them into: little endian in digits of 5 bits, a sixth bit
            to go on, 48 added to make them printable; from the fourth length on, as difference to the last but one.

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
    """(W, H) as the annotation file says, or None if that is no size."""
    sides = image.get('width'), image.get('height')
    return sides if all(_is_integer(side) and side > 0 for side in sides) else None


def _check_sized_image(task: tuple[str, tuple[int, int] | None]) -> list[Fault]:
    path, expected = task
    fault, size, stored = _decode_image(path)
    if fault is not None:
        return [fault]
    if expected is not None and size != expected:
        hint = ' after the turn that its EXIF orientation asks for' if size != stored else ''
        return [Fault(path, 'wrong size', f'is {size[0]} x {size[1]} (width x height){hint}, its annotation says '
                                          f'{expected[0]} x {expected[1]}')]
    return []


def _check_class_image(task: tuple[str, str]) -> tuple[str, list[Fault]]:
    name, path = task
    fault, _, _ = _decode_image(path)
    return name, [] if fault is None else [fault]


def _check_pair(task: tuple[str | None, str | None, int]) -> tuple[list[Fault], np.ndarray]:
    """Faults of an image and its label map, and how many pixels have each value, int64, shape (256,)."""
    image_path, label_path, num_classes = task
    faults: list[Fault] = []
    histogram = np.zeros(256, np.int64)
    size = stored = label_size = None
    if image_path is not None:
        fault, size, stored = _decode_image(image_path)
        faults += [fault] if fault is not None else []
    if label_path is not None:
        try:
            with Image.open(label_path) as label:
                label.load()
                label_size = label.size
                # Of a palette the numbers of the colours count: mmsegmentation reads labels with Pillow, as here.
                if label.mode in ('L', 'P'):
                    histogram += label.histogram()
                else:
                    faults.append(Fault(label_path, 'wrong label format', 'must have one channel of 8 bit, got mode '
                                                                          f'{label.mode} of Pillow'))
        except Exception as error:
            faults.append(_unreadable(label_path, error))
    outside = [f'{value} ({histogram[value]} pixels)' for value in np.flatnonzero(histogram) if value > num_classes]
    if outside:
        faults.append(Fault(label_path, 'label out of range', f'has values above {num_classes}: {", ".join(outside)}'))
    if size is not None and label_size is not None and size != label_size:
        hint = ' after the turn that its EXIF orientation asks for' if size != stored else ''
        faults.append(Fault(label_path, 'sizes differ', f'is {label_size[0]} x {label_size[1]} (width x height), its '
                                                        f'image {size[0]} x {size[1]}{hint}'))
    return faults, histogram


def _decode_image(path: str) -> tuple[Fault | None, tuple[int, int] | None, tuple[int, int] | None]:
    """A fault, or the size (W, H) of an image as training will see it, and as it is stored.

    Pillow decodes it, since it insists on the last byte where OpenCV may fill up what is missing.
    """
    try:
        with Image.open(path) as image:
            stored = image.size
            # OpenCV turns images of these formats as their EXIF orientation says, and no others.
            turned = image.format in ('JPEG', 'MPO', 'PNG') and image.getexif().get(_EXIF_ORIENTATION) in _TURNED
            # For JPEG an eighth of the size, in greys: all of the file is read, in half the time.
            image.draft('L', (max(stored[0] // 8, 1), max(stored[1] // 8, 1)))
            image.load()
        if not cv2.haveImageReader(path):
            reason = f'is {image.format}, which OpenCV cannot read, and so training cannot'
            return Fault(path, 'unknown format', reason), None, None
    except Exception as error:
        return _unreadable(path, error), None, None
    return None, stored[::-1] if turned else stored, stored


def _unreadable(path: str, error: Exception) -> Fault:
    # A damaged file makes Pillow raise errors of any kind, depending on the format and the place of the damage.
    if isinstance(error, FileNotFoundError):
        return Fault(path, 'missing', 'does not exist')
    if isinstance(error, UnidentifiedImageError):
        empty = os.path.getsize(path) == 0
        return Fault(path, 'unreadable', 'is empty' if empty else 'is no image')
    return Fault(path, 'unreadable', f'does not decode: {str(error) or type(error).__name__}')


class _RateColumn(ProgressColumn):
    def render(self, task: ProgressTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f'{speed:.0f} images/s' if speed else '')


def _in_parallel(function: Callable[[_Item], _Result], items: Sequence[_Item], workers: int) -> Iterator[_Result]:
    """Yields ``function`` of each item, in order, computed by ``workers`` processes, and shows how far it is."""
    if not items:
        return
    workers = min(workers, len(items))
    # Linux's fork spares the workers seconds of imports. Elsewhere it is missing or unsafe.
    context = multiprocessing.get_context('fork' if sys.platform == 'linux' else None)
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), _RateColumn(),
               TimeRemainingColumn())
    try:
        # The processes start here, before the progress bar starts a thread: forking with threads may deadlock.
        results = pool.map(function, items, chunksize=max(1, min(32, len(items) // (4 * workers))))
        with Progress(*columns, console=Console(stderr=True)) as progress:
            yield from progress.track(results, total=len(items), description='checking')
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # The parent handles Ctrl-C; without this every worker would print a traceback of its own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Pillow refuses images as large as aerial photos, which OpenCV reads.
    Image.MAX_IMAGE_PIXELS = None
    # What Pillow warns of is no fault, and its lines would tear up the progress bar.
    warnings.simplefilter('ignore')
