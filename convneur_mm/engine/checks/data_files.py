"""Check before a run that data files exist, and name a file that cannot be used during the run."""
from __future__ import annotations

import math
import os
import os.path as osp
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.dataset import BaseDataset, Compose
from PIL import Image

from ...datasets.check.images import label_fault, too_large
from ..files.errors import LaunchError
from ..files.weights_file import CheckpointError, one_line
from .file_checks import data_sets, local_path

CHECK = 'tools/check_dataset.py finds all such faults at once'
# Functions in which MMEngine's data sets read annotations, and mmpretrain's read class folders.
READING = {'full_init', 'load_data_list', '_find_samples'}


class DataError(LaunchError):
    """A data file cannot be used.

    A data loader's worker passes an error on as the text of its traceback, whose last line is the message.

    Args:
        message (str): One line that names the file, or the text of such a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rstrip().rpartition(f'{__name__}.DataError: ')[2])


def check_samples(dataset: object, key: str) -> None:
    """Find faults before a run that would otherwise end it at some image, hours later.

    Check that there are images; that listed image and label map files exist, if they are on this machine's disk; that
    boxes are finite; and that objects have masks if the pipeline loads them.

    Args:
        dataset (object): Data set of a data loader. Only MMEngine's data sets are checked.
        key (str): Config key of the data set.

    Raises:
        DataError: Names the first image with a fault, and the number of missing files if there are any.
    """
    found = list(base_data_sets(dataset))
    if found and not len(dataset):
        raise DataError(_no_images(next((each.ann_file for each in found if each.ann_file), key)))
    for each in found:
        _check_samples(each, key)


def _no_images(path: str) -> str:
    return (f'{path} has no image to use: it names none, or none that has an annotation of one of the classes and that '
            'filter_cfg of the data set leaves')


def base_data_sets(dataset: object) -> Iterator[BaseDataset]:
    """Yield MMEngine's data sets inside any wrappers."""
    if isinstance(dataset, BaseDataset):
        yield dataset
        return
    for inner in (*(getattr(dataset, 'datasets', None) or ()), getattr(dataset, 'dataset', None)):
        if inner is not None:
            yield from base_data_sets(inner)


def _check_samples(dataset: BaseDataset, key: str) -> None:
    # Class folders are listed when the data set is built, so their files exist.
    if not len(dataset) or not dataset.ann_file and 'seg_map_path' not in dataset.get_data_info(0):
        return
    files = _Files(dataset)
    with_mask = any(getattr(transform, 'with_mask', False) for transform in dataset.pipeline.transforms)
    missing: list[str] = []
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        missing += [path for name in ('img_path', 'seg_map_path')
                    if isinstance(path := info.get(name), str) and not files.has(path)]
        for instance in info.get('instances') or ():
            box = instance.get('bbox')
            if box is not None and not all(map(math.isfinite, box)):
                raise DataError(f'{key}: {info.get("img_path")} has an object with the box {box}, in '
                                f'{dataset.ann_file}; {CHECK}')
            if with_mask and not instance.get('mask'):
                raise DataError(f'{key}: {info.get("img_path")} has an object without a segmentation, in '
                                f'{dataset.ann_file}, and the pipeline loads masks (with_mask=True); {CHECK}')
    if missing:
        raise DataError(f'{key}: {missing[0]} does not exist{_others(missing)} that {dataset.ann_file or "it"} '
                        f'names; {CHECK}')


def _others(missing: list[str]) -> str:
    return f', nor do {len(missing) - 1} other files' if len(missing) > 1 else ', a file'


class _Files:
    """Find files by listing each folder once, as network disks are slow at looking up each file."""

    def __init__(self, dataset: BaseDataset) -> None:
        self._is_remote = bool(getattr(dataset, 'backend_args', None))
        self._names: dict[str, set[str]] = {}

    def has(self, path: str) -> bool:
        """Return whether a file exists; files on other machines are assumed to exist."""
        if self._is_remote or '://' in path:
            return True
        folder, name = osp.split(path)
        if folder not in self._names:
            self._names[folder] = set(os.listdir(folder or '.')) if osp.isdir(folder or '.') else set()
        # Some file systems also find a file by other names, such as those in capital letters.
        return name in self._names[folder] or osp.isfile(path)


@contextmanager
def naming_annotations(loader: object) -> Iterator[None]:
    """Make errors in annotations that occur while a data loader is built name their file or folder.

    Other errors, such as that of a misspelt sampler, become those of the data loader.

    Args:
        loader (object): Config of the data loader.

    Raises:
        DataError: In place of any error that a data set raises while it reads its annotations.
        LaunchError: In place of any other error.
    """
    try:
        yield
    except (LaunchError, CheckpointError):
        raise
    except Exception as error:  # malformed annotations can make the data sets raise anything
        frames = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        if not frames & READING:
            raise LaunchError(f'a data loader cannot be built: {_raised(error)}') from error
        dataset = next(data_sets(dict(data_dataloader=loader), 'data'), ('', {}))[1]
        path = local_path(dataset, 'ann_file') or dataset.get('data_root') or 'the data set'
        # MMEngine concatenates the data of all images, which fails if there are none.
        if '_serialize_data' in frames:
            raise DataError(_no_images(path)) from error
        raise DataError(f'{path} cannot be read: {_raised(error)}') from error


def name_faulty_files(dataset: object) -> None:
    """Make the pipelines of MMEngine's data sets name the file for which a transform fails, in place."""
    for each in base_data_sets(dataset):
        if type(each.pipeline) is Compose:
            each.pipeline = NamingPipeline(each.pipeline)


class NamingPipeline(Compose):
    """A pipeline whose errors name the file, and that refuses label maps which do not fit their image.

    mmseg casts label maps to 8 bits whatever they hold, and crops image and label map at the same place whatever their
    sizes are.
    """

    def __init__(self, pipeline: Compose) -> None:
        self.transforms = pipeline.transforms
        self._seen: set[str] = set()  # files that this process has checked already

    def __call__(self, data: dict) -> dict | None:
        """Apply the transforms; see :class:`Compose`.

        Raises:
            DataError: Names the image or label map, the transform and the reason.
        """
        image, labels = data.get('img_path'), data.get('seg_map_path')
        fault = too_large(image) if image and self._is_new(image) else None
        if fault:
            raise DataError(f'{image} {fault.reason}')
        for transform in self.transforms:
            name = type(transform).__name__
            try:
                data = transform(data)
            except LaunchError:
                raise
            except Exception as error:
                path = labels if labels and name == 'LoadAnnotations' else image
                raise DataError(f'{path or "image " + str(data["sample_idx"])} cannot be used: {_reason(error, name)}'
                                ) from error
            if data is None:
                return None
            if labels and name == 'LoadAnnotations' and type(transform).__module__.startswith('mmseg.'):
                _check_label_map(labels, data, look_inside=self._is_new(labels))
        return data

    def _is_new(self, path: str) -> bool:
        is_new = path not in self._seen
        self._seen.add(path)
        return is_new


def _reason(error: Exception, transform: str) -> str:
    if isinstance(error, FileNotFoundError):
        return 'it does not exist'
    return f'{transform} raised {_raised(error)}'


def _raised(error: Exception) -> str:
    """Return an error's type, message and place."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f'{type(error).__name__}: {one_line(error)} ({place.filename}:{place.lineno})'


def _check_label_map(path: str, data: dict, look_inside: bool) -> None:
    if look_inside and osp.isfile(path):
        with Image.open(path) as labels:
            fault = label_fault(labels)
        if fault:
            raise DataError(f'{path} {fault}; {CHECK}')
    # Test pipelines load label maps after resizing the image.
    (height, width), expected = data['gt_seg_map'].shape[:2], data.get('ori_shape')
    if expected and (height, width) != tuple(expected):
        raise DataError(f'{path} is {width} x {height} (width x height), its image {data.get("img_path")} '
                        f'{expected[1]} x {expected[0]}; {CHECK}')

