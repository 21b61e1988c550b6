"""Format configs quickly for checkpoints and work dirs, and read such texts without running them."""
from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

# Keys of a model's config for its initial weights and its training and testing, not for what it computes.
NOT_COMPARED = ('init_cfg', 'pretrained', 'train_cfg', 'test_cfg', 'data_preprocessor')


@cache
def lay_out_once() -> None:
    """Make ``Config.pretty_text`` format equal settings only once; a run asks for its own five times."""
    from mmengine.config import config
    from yapf.yapflib import yapf_api
    # MMEngine 0.10.7 imports the name with its module, and its fork at each call.
    place = config if hasattr(config, 'FormatCode') else yapf_api
    format_code, found = place.FormatCode, {}

    def format_once(text: str, **options: object) -> tuple[str, bool]:
        key = text, repr(options)
        if key not in found:
            found[key] = format_code(text, **options)
        return found[key]

    place.FormatCode = format_once


def written_settings(text: str) -> dict:
    """Return the values in a config's text as ``Config.pretty_text`` writes it.

    Args:
        text (str): Python source that assigns plain values, also within ``dict(…)``, to names.

    Returns:
        dict: Value by name, with tuples as lists and other expressions as their source. {} if the text is not Python.
    """
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return {}
    return {statement.targets[0].id: _value(statement.value) for statement in body
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)}


def _value(node: ast.expr) -> object:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        # Keys that are not identifiers are in braces: dict({'neck.': 1}).
        values = {name: value for inner in node.args for name, value in _value(inner).items()}
        return values | {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def model_differences(there: object, here: object, key: str = 'model') -> Iterator[str]:
    """Yield what two models compute differently, by their settings.

    Args:
        there (object): Settings of one model, as :func:`written_settings` returns them.
        here (object): Settings of the other model.
        key (str): Name of the settings. Defaults to 'model'.

    Yields:
        str: A key with its two values. Initial weights and the settings of training and testing are not compared, and
        SyncBN counts as BN, which replaces it on a CPU.
    """
    if isinstance(there, dict) and isinstance(here, dict):
        for name in sorted({*there, *here} - {*NOT_COMPARED}, key=str):
            yield from model_differences(there.get(name), here.get(name), f'{key}.{name}')
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for i, (one, other) in enumerate(zip(there, here)):
            yield from model_differences(one, other, f'{key}[{i}]')
    elif there != here and {str(there), str(here)} != {'BN', 'SyncBN'}:
        yield f'{key} is {there!r} there and {here!r} here'


def started_from(settings: object) -> list[str]:
    """Return the weights files that a config's settings name, as ``init_cfg.checkpoint`` or ``load_from``."""
    if isinstance(settings, list):
        return [name for item in settings for name in started_from(item)]
    if not isinstance(settings, dict):
        return []
    names = [settings[key] for key in ('checkpoint', 'load_from') if isinstance(settings.get(key), str)]
    names += [name for value in settings.values() for name in started_from(value)]
    return list(dict.fromkeys(names))
