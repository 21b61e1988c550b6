"""Build a detector, segmentor or classifier from its config, with a checkpoint's weights and class names."""
from __future__ import annotations

import colorsys
import copy
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS, DefaultScope

from ..engine.checks.file_checks import data_sets
from ..engine.files.checkpoint import (
    check_all_match,
    check_some_match,
    checkpoint_weights,
    compare_weights,
    read_checkpoint,
)
from ..engine.files.errors import LaunchError, some
from ..engine.files.safe_files import safe_loading
from ..engine.files.weights_file import weights_of
from ..engine.launch import SCOPES, find_config, read_config, why_no_gpu, without_sync_bn
from ..engine.settings import apply_settings
from ..stack import StackError, check_cuda_operators, require


def init_model(config: str | os.PathLike | Config, checkpoint: str | os.PathLike | None = None,
               device: str | torch.device | None = None, cfg_options: dict | None = None, allow_pickle: bool = False
               ) -> BaseModel:
    """Build the model of a config for inference.

    Weights named by the config itself (``load_from``, ``init_cfg``) are not loaded.

    Args:
        config (str | PathLike | Config): Path of a config of mmdet, mmseg or mmpretrain, the name of one that
            convneur_mm ships, or a loaded config, which is not changed.
        checkpoint (str | PathLike | None): Path or URL of the weights. Defaults to None, which keeps the initial
            weights of the model's constructor, whose predictions are meaningless.
        device (str | torch.device | None): For example 'cpu', 'cuda' or 'cuda:1'. Defaults to None, for the GPU if
            there is one, else the CPU.
        cfg_options (dict | None): Overrides of the config, such as ``{'model.test_cfg.rcnn.score_thr': 0.3}``.
        allow_pickle (bool): Whether to load also checkpoints that hold more than tensors and plain values, which can
            run any code. Defaults to False.

    Returns:
        BaseModel: The model in eval mode, on the device. Its ``cfg`` is the config. Its ``dataset_meta`` is a dict with
        ``classes`` (tuple of names by label) and ``palette`` (list of tuples of red, green and blue, 0 to 255, by
        label) from the checkpoint, or else from the config's test data set. If that has none either, both are missing.

    Raises:
        LaunchError: If there is no such config or device, or the config belongs to none of the three packages.
        CheckpointError: If the checkpoint cannot be read, or belongs to another model.
        ValueError: Base class of both errors above.
    """
    device = _device(device)
    # Some models load their own files while they are built, such as a distillation's teacher.
    with safe_loading(allow_pickle):
        cfg = _read(config, copy.deepcopy(cfg_options or {}))  # copied, as merging removes parts of the options
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = _build(cfg)
            if checkpoint is None:
                MMLogger.get_current_instance().warning('no checkpoint was given: the weights are random')
                saved = {}
            else:
                saved = _load(model, os.fspath(checkpoint), cfg)
            model.dataset_meta = _dataset_meta(saved, cfg, checkpoint)
    model.cfg = cfg
    return model.to(device).eval()


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    others = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    known = {'cpu', 'cuda', *([others.type] if others else [])}
    if device is None or device.type not in known:
        raise LaunchError(f'device must be one of {", ".join(sorted(known))} on this machine, or one of several by '
                          f'number such as cuda:1, got {str(name)!r}')
    if device.type == 'cuda':
        if not torch.cuda.is_available():
            raise LaunchError(f'device {str(name)!r}: no GPU, {why_no_gpu()}; use the device cpu')
        if (device.index or 0) >= torch.cuda.device_count():
            raise LaunchError(f'device {str(name)!r}: {torch.cuda.device_count()} GPUs are visible, numbered from 0')
    return device


def _read(config: str | os.PathLike | Config, options: dict) -> Config:
    if isinstance(config, Config):
        cfg, name = copy.deepcopy(config), config.filename or 'the config'
        cfg.merge_from_dict(options)
        apply_settings(cfg)
    else:
        name = os.fspath(config)
        cfg = read_config(find_config(name), options)
    scope = cfg.get('default_scope')
    if scope not in SCOPES:
        raise LaunchError(f'{name}: default_scope must be one of {", ".join(SCOPES)}, got {scope!r}')
    if not isinstance(cfg.get('model'), dict):
        raise LaunchError(f'{name} has no model')
    try:
        require(f'{scope}.models')
        if scope == 'mmdet':
            check_cuda_operators()
    except StackError as error:
        raise LaunchError(str(error)) from None
    return cfg


def _build(cfg: Config) -> BaseModel:
    settings = copy.deepcopy(cfg.model)
    # SyncBN exists on GPUs only, and predicts the same as BN.
    without_sync_bn(settings)
    if cfg.get('data_preprocessor'):
        settings.setdefault('data_preprocessor', copy.deepcopy(cfg.data_preprocessor))
    return MODELS.build(settings)


def _load(model: BaseModel, name: str, cfg: Config) -> dict:
    """Load all weights of a checkpoint, and return its metadata of the training data."""
    checkpoint = read_checkpoint(name)
    weights, own = checkpoint_weights(checkpoint), model.state_dict()
    check_some_match(own, weights, name)
    differences = compare_weights(own, weights)
    needed = differences.for_prediction()
    meta = checkpoint.get('meta')
    saved = _saved_meta(meta if isinstance(meta, Mapping) else {})
    if needed.missing or needed.other_shape:
        trained, used = _names(saved), _names(config_meta(cfg))
        check_all_match(own, needed, name, (len(trained), len(used)) if trained and used else None)
    if needed.unused:
        MMLogger.get_current_instance().warning(
            f'{len(needed.unused)} weights of {name} are not used: {some(needed.unused, 4)}')
    fitting = OrderedDict((key, value) for key, value in weights.items() if key not in differences.other_shape)
    # Versions of the modules, by which some of them rename the weights of earlier versions.
    fitting._metadata = getattr(weights_of(checkpoint), '_metadata', None)
    model.load_state_dict(fitting, strict=False)
    return saved


def _saved_meta(meta: Mapping) -> dict:
    """Return a checkpoint's ``dataset_meta`` with names in lower case; before MMEngine it was one level higher."""
    found = meta.get('dataset_meta') or {name: meta[name] for name in ('CLASSES', 'PALETTE') if meta.get(name)}
    return {str(key).lower(): value for key, value in found.items()}


def config_meta(cfg: Config) -> dict:
    """Return the metadata of the config's first test data set without reading its data, or {} if there is none."""
    dataset = next((dataset for _, dataset in data_sets(cfg, 'test')), None)
    if dataset is None:
        return {}
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return dict(DATASETS.build(dict(copy.deepcopy(dataset), pipeline=[], lazy_init=True)).metainfo)


def _dataset_meta(saved: dict, cfg: Config, checkpoint: str | os.PathLike | None) -> dict:
    """Return class names and colours of a model, and log where they are from."""
    logger = MMLogger.get_current_instance()
    source, meta = f'checkpoint {checkpoint}', saved
    if not _names(meta):
        source, meta = 'config', config_meta(cfg)
    classes = _names(meta)
    if not classes:
        key = 'classes' if cfg.default_scope == 'mmpretrain' else 'metainfo.classes'
        logger.warning('no class names: neither the checkpoint nor the config has any; set '
                       f'test_dataloader.dataset.{key} of the config')
        return {name: value for name, value in meta.items() if name not in ('classes', 'palette')}
    palette, colours = meta.get('palette'), f'of the {source}'
    if not _fits(palette, classes):
        own = config_meta(cfg)
        palette, colours = own.get('palette') if _names(own) == classes else None, 'of the config'
    if not _fits(palette, classes):
        palette, colours = _colours(len(classes)), 'made up'
    shown = ', '.join(classes[:6]) + (', …' if len(classes) > 6 else '')
    drawn = f', colours {colours}' if cfg.default_scope != 'mmpretrain' else ''
    logger.info(f'{len(classes)} class{"es" * (len(classes) != 1)} ({shown}) of the {source}{drawn}')
    # If other classes replace COCO's, its 80 colours remain.
    return dict(meta, classes=classes, palette=[tuple(map(int, colour)) for colour in palette[:len(classes)]])


def _names(meta: dict) -> tuple[str, ...]:
    names = meta.get('classes')
    return tuple(map(str, names)) if isinstance(names, Sequence) and not isinstance(names, str) else ()


def _fits(palette: object, classes: Sequence[str]) -> bool:
    """Return whether there is a colour for each class."""
    return isinstance(palette, (list, tuple)) and len(palette) >= len(classes)


def _colours(count: int) -> list[tuple[int, ...]]:
    """Return any number of distinct colours: each hue is the golden section of the circle after the last."""
    hues = [0.618034 * i % 1 for i in range(count)]
    return [tuple(round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.75, 0.95)) for hue in hues]
