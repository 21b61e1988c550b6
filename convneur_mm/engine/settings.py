"""Apply top-level settings of the shipped configs, such as ``classes``, wherever a config needs them.

MMEngine evaluates ``num_classes=len(classes)`` when it reads the file with that line. A child config or
``--cfg-options`` that sets ``classes`` afterwards changes that variable and nothing else. The shipped configs therefore
name the values they were written for in their :class:`SettingsHook`, and :func:`apply_settings` updates a config whose
variables differ from those. The tools call it, and so does :class:`SettingsRunner`, which the configs name as their
``runner_type``, so that most tools of other projects apply the settings too. The hook stops a run of any other tool.

| setting                                               | where it goes                                              |
|-------------------------------------------------------|------------------------------------------------------------|
| classes                                               | num_classes of all heads, names of all data sets           |
| palette, class_weight, topk                           | data sets; losses; accuracies. For classes alone see below |
| data_root                                             | all data sets, annotation files of the evaluators          |
| train_ann, val_ann, train_images, val_images          | data sets below data_root, annotation files of evaluators  |
| train_labels, val_labels, img_suffix, seg_map_suffix  | data sets below data_root                                  |
| image_size                                            | Resize and its random variants, crops, padding, Mosaic     |
| max_epochs, max_iters                                 | the training loop, ends of the schedules                   |
| switch_epoch                                          | PipelineSwitchHook. With max_epochs alone: scaled          |
| milestones                                            | the schedules. With max_epochs alone: scaled               |
| pretrained                                            | init_cfg.checkpoint of the backbone, by its arch           |

If only classes is set, the palette, the class weights and each k of an accuracy beyond the number of classes are
removed.

A config has the settings that its SettingsHook names; other variables of these names are the user's own. If a child
config or the command line sets one of these places itself, that value stays.
"""
from __future__ import annotations

import os.path as osp
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import Runner

from .checks.file_checks import data_sets, walk
from .files.errors import LaunchError

Settings = Mapping[str, object]


class SettingsError(LaunchError):
    """A setting has an invalid value, contradicts another part of the config, or has no place in it."""


class _Place(NamedTuple):
    """Place in the config where a setting goes.

    Attributes:
        owner (dict): Part of the config.
        key (str): Key of a value in ``owner``; with dots, of a value in a dict within it.
        name (str): Full name of ``owner``.
        settings (tuple[str, ...]): Settings that the value depends on.
        value (Callable): Returns the value, given all settings; None is no value.
        fill (bool): Whether it is also set if it has no value yet.
    """

    owner: dict
    key: str
    name: str
    settings: tuple[str, ...]
    value: Callable[[Settings], object]
    fill: bool = False

    def get(self) -> object:
        node = self.owner
        for part in self.key.split('.'):
            node = node.get(part) if isinstance(node, dict) else None
        return node

    def set(self, value: object) -> None:
        *parents, last = self.key.split('.')
        node = self.owner
        for part in parents:
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value


class _Change(NamedTuple):
    place: _Place
    value: object


def apply_settings(cfg: Config) -> Config:
    """Apply the top-level settings of a config wherever it needs them, in place.

    Configs without a :class:`SettingsHook` among their ``default_hooks`` stay as they are.

    Args:
        cfg (Config): Loaded config, with the overrides of the command line.

    Returns:
        Config: The same config. A second call changes nothing.

    Raises:
        SettingsError: Names the setting, its value, and what was expected or contradicts it.
    """
    written_for = _written_for(cfg)
    if written_for is None:
        if cfg.get('runner_type') == 'SettingsRunner':
            raise SettingsError('default_hooks.settings is missing, by which settings such as classes find their '
                                'places: keep it where you replace default_hooks, or set runner_type = \'Runner\'')
        return cfg
    wanted = _wanted(cfg, written_for)
    for place, value in list(_changes(cfg, written_for, wanted)):
        place.set(value)
    for name, value in wanted.items():
        cfg.default_hooks.settings[name] = value
        if name in cfg:
            cfg[name] = value
    # From now on a plain Runner will do.
    if cfg.get('runner_type') == 'SettingsRunner':
        cfg.pop('runner_type')
    return cfg


@HOOKS.register_module()
class SettingsHook(Hook):
    """Hold the settings that a config was written for, and stop a run in which others were set but not applied.

    Args:
        **settings: See :mod:`.settings`. For ``classes`` the number is enough if the data sets know the names.
    """

    priority = 'VERY_HIGH'

    def __init__(self, **settings: object) -> None:
        self.settings = settings

    def before_run(self, runner: Runner) -> None:
        """Check that the Runner's config has its settings applied.

        Raises:
            SettingsError: If :func:`apply_settings` would change the config.
        """
        written_for = _written_for(runner.cfg)
        if written_for is None:
            return
        change = next(_changes(runner.cfg, written_for, _wanted(runner.cfg, written_for)), None)
        if change:
            place, value = change
            names = ' and '.join(name for name in place.settings if not _same(
                runner.cfg.get(name, written_for[name]), written_for[name]))
            raise SettingsError(
                f'{names} was set, but {place.name}.{place.key} is still {place.get()!r} instead of {value!r}: use '
                'tools/train.py and tools/test.py of convneur_mm, or call convneur_mm.engine.apply_settings(cfg) on '
                'the config as loaded')


@RUNNERS.register_module()
class SettingsRunner(Runner):
    """Apply the settings of the config first; tools build the Runner that ``runner_type`` names."""

    @classmethod
    def from_cfg(cls, cfg: Config) -> Runner:
        """Apply the settings; see :meth:`Runner.from_cfg`."""
        return Runner.from_cfg(apply_settings(cfg))


def _written_for(cfg: Config) -> dict[str, object] | None:
    hook = (cfg.get('default_hooks') or {}).get('settings')
    return None if hook is None else {name: value for name, value in hook.items() if name not in ('type', '_scope_')}


def _wanted(cfg: Config, written_for: Settings) -> dict[str, object]:
    """Return the settings in the config's variables, checked, or the value it was written for if none is set."""
    wanted = {}
    for name, value in written_for.items():
        given = cfg.get(name)
        wanted[name] = value if given is None else _CHECKS.get(name, _check_text)(name, given)

    def changed(name: str) -> bool:
        return name in wanted and not _same(wanted[name], written_for[name])

    # Colours and weights belong to particular classes.
    for name in ('palette', 'class_weight'):
        if changed('classes') and name in wanted and not changed(name):
            wanted[name] = None
    if changed('classes') and 'topk' in wanted and not changed('topk'):
        wanted['topk'] = [k for k in written_for['topk'] if k <= _num_classes(wanted)]
    if changed('max_epochs') and 'milestones' in wanted and not changed('milestones'):
        wanted['milestones'] = [round(epoch * wanted['max_epochs'] / written_for['max_epochs'])
                                for epoch in written_for['milestones']]
    if changed('max_epochs') and 'switch_epoch' in wanted and not changed('switch_epoch'):
        wanted['switch_epoch'] = max(1, round(
            written_for['switch_epoch'] * wanted['max_epochs'] / written_for['max_epochs']))
    return wanted


def _changes(cfg: Config, written_for: Settings, wanted: Settings) -> Iterator[_Change]:
    """Yield what the settings change in a config; see :func:`apply_settings`."""
    if all(_same(wanted[name], value) for name, value in written_for.items()):
        return
    if 'pretrained' in wanted:
        _check_arch(cfg, written_for['pretrained'], wanted['pretrained'])
    for place in _places(cfg):
        if any(name not in written_for for name in place.settings):
            continue
        before, value, found = place.value(written_for), place.value(wanted), place.get()
        if _same(before, value) or _same(found, value):
            continue
        if _same(found, before) or (place.fill and found is None):
            if place.key == 'end' and value <= place.owner.get('begin', 0):
                raise SettingsError(f'{place.settings[0]} must be more than {place.owner["begin"]}, where {place.name} '
                                    f'begins, got {value}')
            yield _Change(place, value)


def _places(cfg: Config) -> Iterator[_Place]:
    for owner, name in (*_dicts(cfg.get('model'), 'model'), *_dicts(cfg.get('data_preprocessor'), 'data_preprocessor')):
        # A region proposal network tells objects from background, whatever their classes.
        if isinstance(owner.get('num_classes'), int) and '.rpn_head' not in name:
            yield _Place(owner, 'num_classes', name, ('classes',), _num_classes)
        if 'class_weight' in owner:
            yield _Place(owner, 'class_weight', name, ('class_weight',), _setting('class_weight'))
        if name == 'model.data_preprocessor':
            yield _Place(owner, 'size', name, ('image_size',), lambda s: s['image_size'][::-1])
        if name == INIT_CFG and owner.get('type') == 'Pretrained':
            yield _Place(owner, 'checkpoint', name, ('pretrained',), lambda s: s['pretrained'].get(_arch(cfg)),
                         fill=True)
    for split in ('train', 'val', 'test'):
        for name, dataset in data_sets(cfg, split):
            yield from _dataset_places(cfg, dataset, name, 'train' if split == 'train' else 'val')
    for split in ('val', 'test'):
        for evaluator, name in _dicts(cfg.get(f'{split}_evaluator'), f'{split}_evaluator'):
            if 'ann_file' in evaluator:
                yield _Place(evaluator, 'ann_file', name, ('data_root', 'val_ann'),
                             lambda s: osp.join(s['data_root'], s['val_ann']))
            if 'topk' in evaluator:
                yield _Place(evaluator, 'topk', name, ('topk',), _setting('topk'))
    for name in ('train_pipeline', 'train_pipeline_stage2', 'test_pipeline', 'tta_pipeline'):
        yield from _pipeline_places(cfg, cfg.get(name), name)
    for hook, name in _dicts(cfg.get('custom_hooks') or [], 'custom_hooks'):
        if hook.get('type') == 'PipelineSwitchHook':
            yield _Place(hook, 'switch_epoch', name, ('switch_epoch',), _setting('switch_epoch'))
            yield from _pipeline_places(cfg, hook.get('switch_pipeline'), f'{name}.switch_pipeline')
    for unit in ('max_epochs', 'max_iters'):
        yield _Place(cfg.get('train_cfg') or {}, unit, 'train_cfg', (unit,), _setting(unit))
    for owner, name in _dicts(cfg.get('param_scheduler') or [], 'param_scheduler'):
        unit = 'max_epochs' if owner.get('by_epoch', True) else 'max_iters'
        for key in ('end', 'T_max', 'total_iters'):
            if key in owner:
                yield _Place(owner, key, name, (unit,), _setting(unit))
        if 'milestones' in owner:
            yield _Place(owner, 'milestones', name, ('milestones',), _setting('milestones'))


def _dataset_places(cfg: Config, dataset: dict, name: str, side: str) -> Iterator[_Place]:
    def place(key: str, setting: str) -> _Place:
        return _Place(dataset, key, name, (setting,), _setting(setting))

    classes = 'classes' if cfg.get('default_scope') == 'mmpretrain' else 'metainfo.classes'
    yield _Place(dataset, classes, name, ('classes',), _class_names, fill=True)
    yield place('metainfo.palette', 'palette')
    yield place('data_root', 'data_root')
    yield place('ann_file', f'{side}_ann')
    # mmpretrain's is a folder's name; others have one for each kind of file.
    prefix = dataset.get('data_prefix')
    images = ('img' if 'img' in prefix else 'img_path') if isinstance(prefix, dict) else None
    yield place(f'data_prefix.{images}' if images else 'data_prefix', f'{side}_images')
    yield place('data_prefix.seg_map_path', f'{side}_labels')
    yield place('img_suffix', 'img_suffix')
    yield place('seg_map_suffix', 'seg_map_suffix')
    yield from _pipeline_places(cfg, dataset.get('pipeline'), f'{name}.pipeline')


def _pipeline_places(cfg: Config, pipeline: object, name: str) -> Iterator[_Place]:
    for owner, full_name in _dicts(pipeline, name):
        key = _SIZES.get(owner.get('type')) if isinstance(owner.get('type'), str) else None
        if key == 'crop_size' and cfg.get('default_scope') == 'mmseg':  # it has the order of an array's axes
            yield _Place(owner, key, full_name, ('image_size',), lambda s: s['image_size'][::-1])
        elif key in owner:
            yield _Place(owner, key, full_name, ('image_size',), _setting('image_size'))


# Where transforms have the size of an image.
_SIZES = dict(
    Resize='scale', RandomResize='scale', RandomResizedCrop='scale', RandomCrop='crop_size', Pad='size',
    Mosaic='img_scale', CachedMosaic='img_scale', MixUp='img_scale', CachedMixUp='img_scale')


def _dicts(node: object, name: str) -> Iterator[tuple[dict, str]]:
    return ((value, key) for key, value in walk(node, name) if isinstance(value, dict))


INIT_CFG = 'model.backbone.init_cfg'


def _backbone(cfg: Config) -> dict:
    return (cfg.get('model') or {}).get('backbone') or {}


def _arch(cfg: Config) -> str | None:
    arch = _backbone(cfg).get('arch')
    return arch if isinstance(arch, str) else None


def _check_arch(cfg: Config, before: Mapping[str, str | None], wanted: Mapping[str, str | None]) -> None:
    """Raise a SettingsError if weights are named, but not for the config's arch, or it has no place for them."""
    named = [arch for arch, path in wanted.items() if path != before.get(arch)]
    if not named:
        return
    arch, init_cfg = _arch(cfg), _backbone(cfg).get('init_cfg') or {}
    if arch not in named and not wanted.get(arch):
        raise SettingsError(f'pretrained names weights of {_names(named)}, but model.backbone.arch is '
                            f'{_backbone(cfg).get("arch")!r}: set those of this arch')
    if init_cfg.get('type') != 'Pretrained':
        raise SettingsError(f'pretrained.{arch} is {wanted[arch]!r}, but {INIT_CFG} was set to {init_cfg or None!r}: '
                            'leave one of the two out')


def _setting(name: str) -> Callable[[Settings], object]:
    return lambda settings: settings[name]


def _num_classes(settings: Settings) -> int:
    classes = settings['classes']
    return classes if isinstance(classes, int) else len(classes)


def _class_names(settings: Settings) -> tuple[str, ...] | None:
    classes = settings['classes']
    return None if isinstance(classes, int) else classes


def _check_classes(name: str, value: object) -> object:
    if isinstance(value, int):
        raise SettingsError(f'{name} must be a list of names, got {value!r}')
    names = tuple(value) if isinstance(value, (list, tuple)) else ()
    if not names or not all(isinstance(n, str) and n for n in names) or len(set(names)) < len(names):
        hint = f'; one name is written ({value!r}, )' if isinstance(value, str) else ''
        raise SettingsError(f'{name} must be a list of different names, got {value!r}{hint}')
    return names


def _check_size(name: str, value: object) -> tuple[int, int]:
    size = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (list, tuple)) else ()
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise SettingsError(f'{name} must be (width, height) in pixels, or one number for both, got {value!r}')
    return size


def _check_length(name: str, value: object) -> int:
    if not isinstance(value, int) or value < 1:
        raise SettingsError(f'{name} must be a whole number of at least 1, got {value!r}')
    return value


def _check_pretrained(name: str, value: object) -> dict[str, str | None]:
    if not isinstance(value, dict) or not all(path is None or isinstance(path, str) for path in value.values()):
        raise SettingsError(f'{name} must name a path or URL for each arch, as in {name} = dict(m3=\'weights.pth\'), '
                            f'got {value!r}')
    return dict(value)


def _check_list(name: str, value: object) -> list:
    if not isinstance(value, (list, tuple)):
        raise SettingsError(f'{name} must be a list, got {value!r}')
    return list(value)


def _check_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise SettingsError(f'{name} must be a string, got {value!r}')
    return value


_CHECKS: dict[str, Callable[[str, object], object]] = dict(
    classes=_check_classes, image_size=_check_size, max_epochs=_check_length, max_iters=_check_length,
    switch_epoch=_check_length,
    pretrained=_check_pretrained, palette=_check_list, class_weight=_check_list, milestones=_check_list,
    topk=_check_list)


def _names(names: object) -> str:
    return f'({", ".join(map(str, names))})'


def _same(a: object, b: object) -> bool:
    return _plain(a) == _plain(b)


def _plain(value: object) -> object:
    """Return ``value`` with tuples as lists, which configs and the command line do not tell apart."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value
