"""Read the logs of trainings."""
from __future__ import annotations

import json
from pathlib import Path

# Steps and values.
Curve = tuple[list[float], list[float]]
NO_CURVES = {'step', 'iter', 'epoch'}


def read_training(path: Path) -> dict[str, Curve]:
    """Read the curves of a training by key; a later run replaces the earlier values from its own first step on.

    Args:
        path (Path): Its work dir, the folder of one run, or a scalars.json.

    Returns:
        dict[str, Curve]: Empty if there is no log, or nothing in it.

    Raises:
        ValueError: If a line is not a JSON object with a step.
    """
    files = [path] if path.is_file() else (sorted(path.glob('*/vis_data/scalars.json'))
                                           or sorted(path.glob('vis_data/scalars.json')))
    joined: dict[str, Curve] = {}
    for file in files:
        for key, (steps, values) in _read_run(file).items():
            kept = [point for point in zip(*joined.get(key, ([], []))) if point[0] < steps[0]]
            joined[key] = [step for step, _ in kept] + steps, [value for _, value in kept] + values
    return joined


def _read_run(path: Path) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
        if not line.strip():
            continue
        try:
            scalars = json.loads(line)
            step = scalars['step']
        except (ValueError, TypeError, KeyError):
            raise ValueError(f'{path}, line {number}: expected a JSON object with a step, got {line[:80]!r}') from None
        for key, value in scalars.items():
            if key not in NO_CURVES and isinstance(value, (int, float)):
                steps, values = curves.setdefault(key, ([], []))
                steps.append(step)
                values.append(value)
    return curves
