"""Checks of ADE20K's and ImageNet's layouts, whose annotations are folders and label maps."""
from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ...stack import require
from ..shapes import checked_int
from .images import (
    checked_workers,
    decode_image,
    existing_file,
    existing_folder,
    files_under,
    in_parallel,
    label_fault,
    unreadable,
)
from .report import ClassCount, Fault, Report

# Endings, in any case, by which mmpretrain recognises images in a class folder; it ignores all other files.
IMAGENET_SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')

MAX_CLASSES = 1_000_000
IGNORED = 255  # value of a label map that mmsegmentation's losses and metrics ignore


def check_ade20k(image_dir: str | os.PathLike[str], label_dir: str | os.PathLike[str], num_classes: int = 150,
                 image_suffix: str = '.jpg', label_suffix: str = '.png', workers: int | None = None,
                 reduce_zero_label: bool = True) -> Report:
    """Check a split of a data set in ADE20K's layout: images, and a label map of the same name for each.

    This finds images without a label map and the reverse, files that do not decode completely, pairs that differ in
    size, and label maps that are not single-channel 8 bit, are JPEG, or have values without a class. The value 0 is
    outside all classes and 1 to ``num_classes`` are the classes; with ``reduce_zero_label=False`` the classes are 0 to
    ``num_classes - 1``. In both cases training ignores 255.

    Args:
        image_dir: Folder of the images, searched with its subfolders.
        label_dir: Folder of the label maps, searched with its subfolders.
        num_classes: Number of classes, 1 to 254.
        image_suffix: Ending of the names of images, case-sensitive; mmsegmentation's ``img_suffix``.
        label_suffix: Ending of the names of label maps; mmsegmentation's ``seg_map_suffix``.
        workers: Number of decoding processes; None for one per core.
        reduce_zero_label: Whether 0 is outside all classes; the data set's setting of this name, which is true for
            ``ADE20KDataset`` and false for most others.

    Returns:
        The report, with images and pixels of each class; the first is "other", value 0, if 0 is not a class.

    Raises:
        FileNotFoundError: ``image_dir`` or ``label_dir`` does not exist.
        NotADirectoryError: One of them is not a folder.
        ValueError: ``workers`` or ``num_classes`` is not an integer in its range.
        StackError: ``num_classes`` is 150 and mmseg, which provides the class names, is not installed.
    """
    start = time.perf_counter()
    workers, num_classes = checked_workers(workers), checked_int('num_classes', num_classes, 1, 254)
    image_dir, label_dir = existing_folder(image_dir), existing_folder(label_dir)
    classes = _ade20k_names(num_classes)
    values = dict(enumerate(['other', *classes] if reduce_zero_label else classes))
    report = Report(f'ADE20K data set {image_dir}')
    images = {path.removesuffix(image_suffix) for path in files_under(image_dir) if path.endswith(image_suffix)}
    labels = {path.removesuffix(label_suffix) for path in files_under(label_dir) if path.endswith(label_suffix)}
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
              str(label_dir / (name + label_suffix)) if name in labels else None, max(values))
             for name in sorted(images | labels)]
    pixels, with_class = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for faults, histogram in in_parallel(_check_pair, tasks, workers):
        report.faults += faults
        pixels += histogram
        with_class += histogram > 0
    report.counts = [ClassCount(name, int(with_class[value]), pixels=int(pixels[value]))
                     for value, name in values.items()]
    if pixels[IGNORED]:
        report.notes.append(f'pixels of the value {IGNORED}, which training ignores: {pixels[IGNORED]}, in '
                            f'{with_class[IGNORED]} label maps')
    report.images = len(images)
    report.seconds = time.perf_counter() - start
    return report


def check_imagenet(folder: str | os.PathLike[str], workers: int | None = None,
                   ann_file: str | os.PathLike[str] | None = None, num_classes: int | None = None) -> Report:
    """Check a split of a data set in ImageNet's layout: a folder for each class, or a list of images and labels.

    In class folders, this finds folders without an image, files that are not images, and images outside the class
    folders. As in mmpretrain, hidden files are ignored, and subfolders of a class are included. In a list, it finds
    lines that are not a name and a label, labels out of range, images that occur twice, and images in the folder that
    are not in the list. In both, it finds images that do not decode completely.

    Args:
        folder: Folder of the class folders, or the one to which the names in ``ann_file`` are relative.
        workers: Number of decoding processes; None for one per core.
        ann_file: The list, with a line ``name label`` for each image, such as mmpretrain's ``meta/val.txt``; None for
            class folders.
        num_classes: Expected number of classes, that of the model's head; None for any.

    Returns:
        The report, with the number of images of each class that decode, in mmpretrain's order of classes.

    Raises:
        FileNotFoundError: ``folder`` or ``ann_file`` does not exist.
        NotADirectoryError: ``folder`` is not a folder.
        ValueError: ``workers`` or ``num_classes`` is not a positive integer.
    """
    start = time.perf_counter()
    workers = checked_workers(workers)
    folder = existing_folder(folder)
    if num_classes is not None:
        num_classes = checked_int('num_classes', num_classes, 1, MAX_CLASSES)
    report = Report(f'ImageNet data set {folder}')
    if ann_file is None:
        classes, tasks = _read_class_folders(folder, num_classes, report)
    else:
        classes, tasks = _read_list(existing_file(ann_file), folder, num_classes, report)
    counts = Counter(dict.fromkeys(classes, 0))
    for name, faults in in_parallel(_check_class_image, tasks, workers):
        report.faults += faults
        counts[name] += not faults
    report.counts = [ClassCount(name, counts[name]) for name in classes]
    report.images = len(tasks)
    report.seconds = time.perf_counter() - start
    return report


def _read_class_folders(folder: Path, num_classes: int | None, report: Report) -> tuple[list[str],
                                                                                        list[tuple[str, str]]]:
    """Return the names of the classes, and class and path of each image."""
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        report.add(folder, 'no class folders', 'holds no class folders; a folder of all images needs the list of their '
                                               'labels (ann_file)')
    elif num_classes is not None and len(classes) != num_classes:
        report.add(folder, 'wrong number of classes', f'holds {len(classes)} class folders, expected {num_classes}')
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir() and entry.name.lower().endswith(IMAGENET_SUFFIXES):
            report.add(entry, 'outside the class folders', 'lies in no class folder, so it would not be used')
    tasks: list[tuple[str, str]] = []
    for name in classes:
        files = sorted(files_under(folder / name))
        images = [file for file in files if file.lower().endswith(IMAGENET_SUFFIXES)]
        tasks += [(name, str(folder / name / file)) for file in images]
        if not images:
            report.add(folder / name, 'empty class', 'class folder without an image')
        for file in sorted(set(files).difference(images)):
            report.add(folder / name / file, 'not an image', f'its name ends in none of {" ".join(IMAGENET_SUFFIXES)}')
    return classes, tasks


def _read_list(ann_file: Path, folder: Path, num_classes: int | None, report: Report) -> tuple[list[str],
                                                                                             list[tuple[str, str]]]:
    """Return the labels as names of classes, and label and path of each image."""
    try:
        lines = ann_file.read_text(encoding='utf-8').splitlines()
    except UnicodeDecodeError as error:
        report.add(ann_file, 'no text', f'is no text in UTF-8: {error}')
        return [], []
    labels: dict[str, int] = {}
    limit = num_classes if num_classes is not None else MAX_CLASSES
    for number, line in enumerate(lines, 1):
        name, _, label = line.strip().rpartition(' ')
        if not name or not label.isdecimal():
            report.add(ann_file, 'bad line', f'line {number} must be an image and its label, an integer of 0 or more, '
                                             f'got {line!r}')
        elif int(label) >= limit:
            report.add(ann_file, 'label out of range',
                       f'line {number} ({name}): the label must be below {limit}, got {label}')
        elif name in labels:
            report.add(ann_file, 'duplicate image', f'line {number}: {name} occurs before, with the label '
                                                    f'{labels[name]}')
        else:
            labels[name] = int(label)
    if not labels:
        report.add(ann_file, 'no images', 'names no image with a label')
    unused = {file for file in files_under(folder) if file.lower().endswith(IMAGENET_SUFFIXES)} - labels.keys()
    for name in sorted(unused):
        report.add(folder / name, 'not in the list', f'is not in {ann_file}, so it would not be used')
    highest = num_classes - 1 if num_classes is not None else max(labels.values(), default=-1)
    classes = [f'class {label}' for label in range(highest + 1)]
    return classes, [(f'class {label}', str(folder / name)) for name, label in sorted(labels.items())]


def _ade20k_names(num_classes: int) -> Sequence[str]:
    if num_classes != 150:
        return [f'class {value}' for value in range(1, num_classes + 1)]
    # Imported here, since it takes almost a second and the other checks do not need mmseg.
    return [name.strip() for name in require('mmseg.utils').ade_classes()]


def _check_class_image(task: tuple[str, str]) -> tuple[str, list[Fault]]:
    name, path = task
    fault, _, _ = decode_image(path)
    return name, [] if fault is None else [fault]


def _check_pair(task: tuple[str | None, str | None, int]) -> tuple[list[Fault], np.ndarray]:
    """Return the faults of an image and its label map, and the pixel count of each value, int64, shape (256,)."""
    image_path, label_path, highest = task
    faults: list[Fault] = []
    histogram = np.zeros(256, np.int64)
    size = stored = label_size = None
    if image_path is not None:
        fault, size, stored = decode_image(image_path)
        faults += [fault] if fault is not None else []
    if label_path is not None:
        try:
            with Image.open(label_path) as label:
                label.load()
                label_size = label.size
                reason = label_fault(label)
                if reason is None:
                    histogram += label.histogram()
                else:
                    faults.append(Fault(label_path, 'wrong label format', reason))
        except Exception as error:
            faults.append(unreadable(label_path, error))
    outside = [f'{value} ({histogram[value]} pixels)' for value in np.flatnonzero(histogram)
               if highest < value != IGNORED]
    if outside:
        faults.append(Fault(label_path, 'label out of range', f'has values above {highest}: {", ".join(outside)}'))
    if size is not None and label_size is not None and size != label_size:
        hint = ' after the turn that its EXIF orientation asks for' if size != stored else ''
        faults.append(Fault(label_path, 'sizes differ', f'is {label_size[0]} x {label_size[1]} (width x height), its '
                                                        f'image {size[0]} x {size[1]}{hint}'))
    return faults, histogram
