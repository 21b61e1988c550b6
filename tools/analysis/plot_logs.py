#!/usr/bin/env python
r"""Draw the curves of one or more trainings: losses, validated metrics, learning rate.

    tools/analysis/plot_logs.py work_dirs/cascade_rcnn_convneur_m3_1x_coco
    tools/analysis/plot_logs.py work_dirs/a work_dirs/b --keys loss 'coco/*_mAP' --labels 'chunks of 196' 'of 4096' \
        --out curves.png

Each key has its own plot, with a curve for each training. The runs of a work dir, several if it was resumed, are
joined: a later run replaces the earlier values from its own first step on.
"""
import argparse
import fnmatch
import math
import runpy
import textwrap
from collections.abc import Sequence
from pathlib import Path

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / '_environment.py'))['prepare']()

from convneur_mm.analysis.logs import Curve, read_training
from convneur_mm.engine.files.errors import one_line_errors

DEFAULT_KEYS = ('loss', '*/*', 'lr')  # metrics are named evaluator/metric, or like mIoU
METRIC_KEYS = ('mIoU', 'mAcc', 'aAcc')
COLUMNS = 3


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('logs', nargs='+', type=Path, metavar='WORK_DIR', help='work dir or scalars.json file')
    parser.add_argument('--keys', nargs='+', metavar='KEY',
                        help="quantities to plot; * matches any text, e.g. 'loss*' (default: loss, metrics and lr)")
    parser.add_argument('--labels', nargs='+', metavar='LABEL',
                        help='names of the curves (default: those of the work dirs)')
    parser.add_argument('--smooth', type=int, default=1, metavar='N',
                        help='plot the mean of the last N values of training quantities (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=Path('curves.png'), metavar='FILE.png',
                        help='output picture (default: %(default)s)')
    return parser.parse_args(argv)


def choose_keys(patterns: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """Return the keys to draw, in the order of the patterns.

    Raises:
        ValueError: If a user's pattern matches no key; the message lists the keys.
    """
    chosen = {}
    for pattern in patterns or (*DEFAULT_KEYS[:2], *METRIC_KEYS, DEFAULT_KEYS[2]):
        matches = fnmatch.filter(known, pattern)
        if patterns and not matches:
            raise ValueError(f'--keys {pattern}: no such key in the logs, which have: {", ".join(known)}')
        chosen.update(dict.fromkeys(matches))
    if not chosen:
        raise ValueError(f'neither loss nor metrics in the logs, which have: {", ".join(known)}; choose with --keys')
    return list(chosen)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Average each value with up to ``window`` - 1 values before it."""
    return [sum(part) / len(part) for i in range(len(values)) for part in [values[max(0, i + 1 - window):i + 1]]]


def draw(trainings: dict[str, dict[str, Curve]], keys: Sequence[str], window: int, out: Path) -> None:
    """Draw a plot for each key, with the legend below, where long names fit.

    Args:
        trainings (dict[str, dict[str, Curve]]): Label → key → curve.
        keys (Sequence[str]): Keys to draw.
        window (int): Number of values to average; metrics are not smoothed.
        out (Path): PNG to write.
    """
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    columns = min(COLUMNS, len(keys))
    rows = math.ceil(len(keys) / columns)
    width = max(6.0, 4.8 * columns)
    labels = {label: textwrap.fill(label, int(11 * width), break_on_hyphens=False) for label in trainings}
    lines = sum(label.count('\n') + 1 for label in labels.values())
    legend_height = 0.2 * lines + 0.2
    figure, axes = plt.subplots(rows, columns, figsize=(width, 3.4 * rows + legend_height), squeeze=False)
    handles = {}
    for axis, key in zip(axes.flat, keys):
        for i, (label, curves) in enumerate(trainings.items()):
            if key not in curves:
                continue
            steps, values = curves[key]
            metric = '/' in key or key in METRIC_KEYS
            handles[label], = axis.plot(
                steps, values if metric else smoothed(values, window), color=f'C{i % 10}',
                linestyle=('-', '--', ':', '-.')[i // 10 % 4], marker='o' if metric or len(values) == 1 else None,
                markersize=3, linewidth=1.2)
        axis.set_title(textwrap.fill(key, 44), fontsize=10)
        # MMEngine logs metrics against the training loop's own counter.
        axis.set_xlabel('epoch, or iteration of an iteration-based loop' if '/' in key or key in METRIC_KEYS
                        else 'iteration', fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(keys):]:
        axis.remove()
    figure.legend([handles[label] for label in labels if label in handles],
                  [text for label, text in labels.items() if label in handles], loc='lower left', fontsize=9,
                  frameon=False)
    figure.tight_layout(rect=(0, legend_height / figure.get_figheight(), 1, 1))
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.labels and len(args.labels) != len(args.logs):
        raise ValueError(f'--labels must be one for each of the {len(args.logs)} work dirs, got {len(args.labels)}')
    if args.smooth < 1:
        raise ValueError(f'--smooth must be at least 1, got {args.smooth}')
    if args.out.suffix != '.png' or not args.out.absolute().parent.is_dir():
        raise ValueError(f'--out must be a .png in a folder that exists, got {args.out}')
    labels = args.labels or [path.absolute().name if path.is_dir() else str(path) for path in args.logs]
    if len(set(labels)) < len(labels):  # several folders have the same name
        labels = args.labels or list(map(str, args.logs))
    if len(set(labels)) < len(labels):
        raise ValueError(f'every curve needs a label of its own, got {labels}')
    trainings = {label: read_training(path) for label, path in zip(labels, args.logs)}
    for path, curves in zip(args.logs, trainings.values()):
        if not curves:
            raise ValueError(f'{path}: nothing is logged there; expected a work dir with '
                             'TIMESTAMP/vis_data/scalars.json, or such a file')
    keys = choose_keys(args.keys, list(dict.fromkeys(key for curves in trainings.values() for key in curves)))
    draw(trainings, keys, args.smooth, args.out)
    print(f'{args.out}: {", ".join(keys)}')


if __name__ == '__main__':
    with one_line_errors():
        main()
