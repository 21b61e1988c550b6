"""Predictions for pictures of any size, given as files or arrays."""
from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.model import BaseModel
from mmengine.registry import TRANSFORMS, DefaultScope
from mmengine.structures import BaseDataElement

from ..datasets.check.images import too_large
from ..engine.checks.data_files import DataError, NamingPipeline
from ..engine.checks.file_checks import data_sets
from ..engine.files.errors import LaunchError

Image = str | os.PathLike | np.ndarray


class ImageError(ValueError):
    """A picture cannot be read; the one-line message has its name and the reason."""


class Prediction(NamedTuple):
    """A model's prediction for a picture.

    Attributes:
        index (int): Number of the picture in the given order, from 0.
        picture (np.ndarray): (H, W, 3), BGR, as the config's pipeline loads it.
        sample (BaseDataElement): The model's data sample, on the CPU.
    """

    index: int
    picture: np.ndarray
    sample: BaseDataElement


def inference(model: BaseModel, images: Iterable[Image], batch_size: int = 1) -> list[BaseDataElement]:
    """Predict pictures by the test pipeline of the model's config, without annotations.

    Args:
        model (BaseModel): Model from :func:`init_model`.
        images (Iterable[str | PathLike | np.ndarray]): Paths of pictures, or arrays (H, W, 3) of uint8 in OpenCV's
            order of channels, blue, green, red. Their sizes may differ.
        batch_size (int): Largest number of pictures predicted at once. Those of one batch have the same size after the
            pipeline, so that none is padded to the size of another, and predictions do not depend on each other.
            Defaults to 1.

    Returns:
        list[BaseDataElement]: Data samples on the CPU, in the order of the images: mmdet's DetDataSample, mmseg's
        SegDataSample or mmpretrain's DataSample. A segmentor's samples hold the scores of all classes for each pixel,
        so use :func:`iter_inference` for many pictures.

    Raises:
        ImageError: If a picture cannot be read.
        ValueError: If an array or the batch size is not as described above.
    """
    return [prediction.sample for prediction in iter_inference(model, images, batch_size)]


def iter_inference(model: BaseModel, images: Iterable[Image], batch_size: int = 1,
                   on_error: Callable[[int, ImageError], None] | None = None) -> Iterator[Prediction]:
    """Yield the predictions of :func:`inference` one by one, with the pictures.

    At most ``batch_size`` pictures are in memory at a time, so ``images`` may be the frames of a long video.

    Args:
        model (BaseModel): Model from :func:`init_model`.
        images (Iterable[str | PathLike | np.ndarray]): See :func:`inference`.
        batch_size (int): See :func:`inference`. Defaults to 1.
        on_error (Callable | None): Function called with the number and the error of each unreadable picture, which is
            then skipped. Defaults to None, which raises the error.

    Yields:
        Prediction: One for each picture, in the order of the images.

    Raises:
        ImageError: If a picture cannot be read and ``on_error`` is not given.
        ValueError: If an array or the batch size is not as described in :func:`inference`.
    """
    if isinstance(images, (str, os.PathLike)):
        raise ValueError(f'images must be a list of paths or arrays, got {str(images)!r}')
    if batch_size < 1:
        raise ValueError(f'batch_size must be at least 1, got {batch_size}')
    with DefaultScope.overwrite_default_scope(model.cfg.default_scope):
        pipeline = _Pipeline(model.cfg)
    return _predictions(model, pipeline, enumerate(images), batch_size, on_error)


def _predictions(model: BaseModel, pipeline: _Pipeline, images: Iterator[tuple[int, Image]], batch_size: int,
                 on_error: Callable[[int, ImageError], None] | None) -> Iterator[Prediction]:
    while chunk := list(islice(images, batch_size)):
        loaded = []
        for index, image in chunk:
            try:
                loaded.append((index, *pipeline(image, index)))
            except ImageError as error:
                if on_error is None:
                    raise
                on_error(index, error)
        samples = _predict(model, [data for *_, data in loaded])
        yield from (Prediction(index, picture, sample)
                    for (index, picture, _), sample in zip(loaded, samples, strict=True))


def _predict(model: BaseModel, items: list[dict]) -> list[BaseDataElement]:
    """Return the data samples of packed pictures, predicting those of equal shapes together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, data in enumerate(items):
        groups.setdefault(tuple(data['inputs'].shape), []).append(i)
    samples = {}
    for numbers in groups.values():
        batch = {key: [items[i][key] for i in numbers] for key in ('inputs', 'data_samples')}
        with torch.no_grad(), DefaultScope.overwrite_default_scope(model.cfg.default_scope):
            samples.update(zip(numbers, model.test_step(batch), strict=True))
    return [samples[i].cpu() for i in range(len(items))]


class _Pipeline:
    """The test pipeline of a config for pictures without annotations."""

    def __init__(self, cfg: Config) -> None:
        key, dataset = next(data_sets(cfg, 'test'), ('test_dataloader.dataset', {}))
        loader, *transforms = copy.deepcopy(dataset.get('pipeline')) or [{}]
        if not _name(loader).endswith('LoadImageFromFile'):
            raise LaunchError(f'{key}.pipeline must begin with LoadImageFromFile, got {_name(loader) or "none"}')
        self._load = TRANSFORMS.build(loader)
        self._dtype = np.float32 if loader.get('to_float32') else np.uint8
        self._transform = NamingPipeline(Compose([step for step in transforms if 'Annotations' not in _name(step)]))

    def __call__(self, image: Image, index: int) -> tuple[np.ndarray, dict]:
        """Return a picture as loaded, (H, W, 3) in BGR, and packed for the model.

        Raises:
            ImageError: If the picture cannot be read.
            ValueError: If an array is not (H, W, 3) of uint8.
        """
        # The keys by which the data sets of mmdet and of the other two number their pictures.
        results = dict(img_id=index, sample_idx=index)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ValueError(f'image {index} must be an array (height, width, 3) of uint8, got {image.shape} of '
                                 f'{image.dtype}')
            size = image.shape[:2]
            results.update(img=image.astype(self._dtype), img_path=None, img_shape=size, ori_shape=size)
        else:
            results = self._read(os.fspath(image), results)
        # A copy, as transforms may write into the array.
        picture = results['img'].astype(np.uint8)
        try:
            return picture, self._transform(results)
        except DataError as error:
            raise ImageError(str(error)) from error

    def _read(self, path: str, results: dict) -> dict:
        fault = too_large(path)
        if fault:
            raise ImageError(f'{path} {fault.reason}')
        try:
            results = self._load(dict(results, img_path=path))
        except Exception as error:  # a damaged file can make the decoders raise any exception
            raise ImageError(_reason(path, error)) from None
        if results is None:  # from a loader with ignore_empty
            raise ImageError(f'{path} is no picture, or damaged')
        return results


def _name(transform: dict) -> str:
    kind = transform.get('type', '')
    return kind if isinstance(kind, str) else kind.__name__


def _reason(path: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f'{path} does not exist'
    if isinstance(error, OSError) and error.strerror:
        return f'{path} cannot be read: {error.strerror}'
    return f'{path} is no picture, or damaged'
