"""Top-level settings of the shipped configs, such as ``classes``, carried to wherever a config needs them.

MMEngine evaluates ``num_classes=len(classes)`` when it reads the file that says so. A child config or ``--cfg-options``
that sets ``classes`` afterwards changes that variable and nothing else. The shipped configs therefore name the values
they were written for in their :class:`SettingsHook`, and :func:`apply_settings` brings a config whose variables differ
from those up to date. The tools call it, and so does :class:`SettingsRunner`, which the configs name as their
``runner_type``, so that most tools of other projects do too; the hook stops a run of any other.

| setting                                               | where it goes                                              |
|-------------------------------------------------------|------------------------------------------------------------|
| classes                                               | num_classes of all heads, names of all data sets           |
| palette, class_weight, topk                           | data sets; losses; accuracies. With classes alone: without |
| data_root                                             | all data sets, annotation files of the evaluators          |
| train_ann, val_ann, train_images, val_images          | data sets below data_root, annotation files of evaluators  |
| train_labels, val_labels, img_suffix, seg_map_suffix  | data sets below data_root                                  |
| image_size                                            | Resize and its random kinds; mmseg's crops and padding     |
| max_epochs, max_iters                                 | the training loop, ends of the schedules                   |
| milestones                                            | the schedules. With max_epochs alone: in proportion        |
| pretrained                                            | init_cfg.checkpoint of the backbone, by its arch           |

Where classes alone is set, there is neither a palette nor weights of classes, and no k of an accuracy beyond their
number.

A config has those that its SettingsHook names; other variables of these names are the user's own. Where a child config
or the command line sets one of these places itself, that stays.
"""
from __future__ import annotations

import os.path as osp
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import Runner

from .checks.file_checks import data_sets
from .files.errors import LaunchError

Settings = Mapping[str, object]


class SettingsError(LaunchError):
    """A setting has a value that cannot be, contradicts another part of the config, or has no place in it."""


class _Place(NamedTuple):
    """Where a setting goes.

    Attributes:
        owner (dict): A part of the config.
        key (str): Of a value in ``owner``; with dots, of one in a dict within it.
        name (str): Full name of ``owner``.
        settings (tuple[str, ...]): Names of the settings it depends on.
        value (Callable): What it should be, given all settings. None stands for no value.
        fill (bool): Whether it is also set where it has no value yet.
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
    """Carries the top-level settings of a config to wherever it needs them, in place.

    Configs without a :class:`SettingsHook` among their ``default_hooks`` stay as they are.

    Args:
        cfg (Config): As loaded, with the overrides of the command line.

    Returns:
        Config: The same one. A second call changes nothing.

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
    # Its work is done.
    if cfg.get('runner_type') == 'SettingsRunner':
        cfg.pop('runner_type')
    return cfg


@HOOKS.register_module()
class SettingsHook(Hook):
    """Holds the settings that a config was written for, and stops a run in which others were set but not applied.

    Args:
        **settings: See :mod:`.settings`. Of ``classes`` the number is enough where the data sets know the names.
    """

    priority = 'VERY_HIGH'

    def __init__(self, **settings: object) -> None:
        self.settings = settings

    def before_run(self, runner: Runner) -> None:
        """Compares the Runner's config with the settings.

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
    """A Runner that applies the settings of its config; tools build what ``runner_type`` names."""

    @classmethod
    def from_cfg(cls, cfg: Config) -> Runner:
        """See :meth:`Runner.from_cfg`."""
        return Runner.from_cfg(apply_settings(cfg))


def _written_for(cfg: Config) -> dict[str, object] | None:
    hook = (cfg.get('default_hooks') or {}).get('settings')
    return None if hook is None else {name: value for name, value in hook.items() if name not in ('type', '_scope_')}


def _wanted(cfg: Config, written_for: Settings) -> dict[str, object]:
    """The settings as the config's variables have them, checked; where one has none, as it was written for."""
    wanted = {}
    for name, value in written_for.items():
        given = cfg.get(name)
        wanted[name] = value if given is None else _CHECKS.get(name, _check_text)(name, given)

    def changed(name: str) -> bool:
        return name in wanted and not _same(wanted[name], written_for[name])

    # Colours and weights are those of particular classes.
    for name in ('palette', 'class_weight'):
        if changed('classes') and name in wanted and not changed(name):
            wanted[name] = None
    if changed('classes') and 'topk' in wanted and not changed('topk'):
        wanted['topk'] = [k for k in written_for['topk'] if k <= _num_classes(wanted)]
    if changed('max_epochs') and 'milestones' in wanted and not changed('milestones'):
        wanted['milestones'] = [round(epoch * wanted['max_epochs'] / written_for['max_epochs'])
                                for epoch in written_for['milestones']]
    return wanted


def _changes(cfg: Config, written_for: Settings, wanted: Settings) -> Iterator[_Change]:
    """What the settings change of a config; see :func:`apply_settings`."""
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
    for name in ('train_pipeline', 'test_pipeline', 'tta_pipeline'):
        yield from _pipeline_places(cfg.get(name), name)
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
    # A folder's name alone in mmpretrain, else one for each kind of file.
    prefix = dataset.get('data_prefix')
    images = ('img' if 'img' in prefix else 'img_path') if isinstance(prefix, dict) else None
    yield place(f'data_prefix.{images}' if images else 'data_prefix', f'{side}_images')
    yield place('data_prefix.seg_map_path', f'{side}_labels')
    yield place('img_suffix', 'img_suffix')
    yield place('seg_map_suffix', 'seg_map_suffix')
    yield from _pipeline_places(dataset.get('pipeline'), f'{name}.pipeline')


def _pipeline_places(pipeline: object, name: str) -> Iterator[_Place]:
    for owner, full_name in _dicts(pipeline, name):
        if owner.get('type') in ('Resize', 'RandomResize', 'RandomResizedCrop') and 'scale' in owner:
            yield _Place(owner, 'scale', full_name, ('image_size',), _setting('image_size'))
        if owner.get('type') == 'RandomCrop':  # of mmseg, in the order of an array's axes
            yield _Place(owner, 'crop_size', full_name, ('image_size',), lambda s: s['image_size'][::-1])


def _dicts(node: object, name: str) -> Iterator[tuple[dict, str]]:
    """All dicts of a part of the config, with their full names."""
    if isinstance(node, dict):
        yield node, name
        for key, value in node.items():
            yield from _dicts(value, f'{name}.{key}')
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _dicts(value, f'{name}[{i}]')


INIT_CFG = 'model.backbone.init_cfg'


def _backbone(cfg: Config) -> dict:
    return (cfg.get('model') or {}).get('backbone') or {}


def _arch(cfg: Config) -> str | None:
    arch = _backbone(cfg).get('arch')
    return arch if isinstance(arch, str) else None


def _check_arch(cfg: Config, before: Mapping[str, str | None], wanted: Mapping[str, str | None]) -> None:
    """Raises a SettingsError if weights were named, but not for the config's arch, or it has no place for them."""
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
    pretrained=_check_pretrained, palette=_check_list, class_weight=_check_list, milestones=_check_list,
    topk=_check_list)


def _names(names: object) -> str:
    return f'({", ".join(map(str, names))})'


def _same(a: object, b: object) -> bool:
    return _plain(a) == _plain(b)


def _plain(value: object) -> object:
    """``value`` with tuples as lists, which configs and the command line do not keep apart."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value
