"""The checks of ADE20K's and ImageNet's layouts, whose annotations are folders and label maps."""
from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ...stack import require
from ..shapes import checked_int
from .images import checked_workers, decode_image, existing_folder, files_under, in_parallel, unreadable
from .report import ClassCount, Fault, Report

# What mmpretrain takes for an image in a class folder, in lower or upper case; it passes over all other files.
IMAGENET_SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')


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
        StackError: ``num_classes`` is 150 and mmseg, which knows their names, is not installed.
    """
    start = time.perf_counter()
    workers, num_classes = checked_workers(workers), checked_int('num_classes', num_classes, 1, 254)
    image_dir, label_dir = existing_folder(image_dir), existing_folder(label_dir)
    class_names = ['other', *_ade20k_names(num_classes)]
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
              str(label_dir / (name + label_suffix)) if name in labels else None, num_classes)
             for name in sorted(images | labels)]
    pixels, with_class = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for faults, histogram in in_parallel(_check_pair, tasks, workers):
        report.faults += faults
        pixels += histogram
        with_class += histogram > 0
    report.counts = [ClassCount(name, int(with_class[value]), pixels=int(pixels[value]))
                     for value, name in enumerate(class_names)]
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
    workers = checked_workers(workers)
    folder = existing_folder(folder)
    report = Report(f'ImageNet data set {folder}')
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        report.add(folder, 'no class folders', 'holds no class folders')
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
    counts = Counter(dict.fromkeys(classes, 0))
    for name, faults in in_parallel(_check_class_image, tasks, workers):
        report.faults += faults
        counts[name] += not faults
    report.counts = [ClassCount(name, counts[name]) for name in classes]
    report.images = len(tasks)
    report.seconds = time.perf_counter() - start
    return report


def _ade20k_names(num_classes: int) -> Sequence[str]:
    if num_classes != 150:
        return [f'class {value}' for value in range(1, num_classes + 1)]
    # Here, since it takes the better part of a second and the other checks do without mmseg.
    return [name.strip() for name in require('mmseg.utils').ade_classes()]


def _check_class_image(task: tuple[str, str]) -> tuple[str, list[Fault]]:
    name, path = task
    fault, _, _ = decode_image(path)
    return name, [] if fault is None else [fault]


def _check_pair(task: tuple[str | None, str | None, int]) -> tuple[list[Fault], np.ndarray]:
    """Faults of an image and its label map, and how many pixels have each value, int64, shape (256,)."""
    image_path, label_path, num_classes = task
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
                # Of a palette the numbers of the colours count: mmsegmentation reads labels with Pillow, as here.
                if label.mode in ('L', 'P'):
                    histogram += label.histogram()
                else:
                    faults.append(Fault(label_path, 'wrong label format', 'must have one channel of 8 bit, got mode '
                                                                          f'{label.mode} of Pillow'))
        except Exception as error:
            faults.append(unreadable(label_path, error))
    outside = [f'{value} ({histogram[value]} pixels)' for value in np.flatnonzero(histogram) if value > num_classes]
    if outside:
        faults.append(Fault(label_path, 'label out of range', f'has values above {num_classes}: {", ".join(outside)}'))
    if size is not None and label_size is not None and size != label_size:
        hint = ' after the turn that its EXIF orientation asks for' if size != stored else ''
        faults.append(Fault(label_path, 'sizes differ', f'is {label_size[0]} x {label_size[1]} (width x height), its '
                                                        f'image {size[0]} x {size[1]}{hint}'))
    return faults, histogram
