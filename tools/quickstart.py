#!/usr/bin/env python
"""Generate data, train, test and report; ``tools/quickstart.sh`` makes the environment first and calls this."""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

if __name__ == '__main__':
    from _environment import prepare
    prepare()

from dataclasses import dataclass, replace

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from convneur_mm import __version__

matplotlib.use('Agg')

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / 'tools'
# The lines of MMEngine's log to show, and the parts to keep.
PROGRESS = re.compile(r'(?:Epoch|Iter)\((train|val|test)\)\s+(.*)')
WANTED = re.compile(r'^\[|^eta: |^loss: |^coco/(bbox|segm)_mAP: |^mIoU: |^accuracy/top1: ')


@dataclass(frozen=True)
class Task:
    """Settings of one kind of quick start.

    Attributes:
        config (str): File in ``configs/``.
        form (str): Data format, as for ``tools/make_shapes.py --format``.
        data (str): Where the config expects the data.
        num_train (int): Number of training pictures.
        metrics (dict[str, str]): Name in the summary → name in MMEngine's log.
        unit (float): Factor that turns the logged metrics into fractions of 1.
        out (str): Folder for the results.
        caption (str): Caption of the contact sheet.
    """

    config: str
    form: str
    data: str
    num_train: int
    metrics: dict[str, str]
    unit: float
    out: str
    caption: str


TASKS = {
    'det': Task('cascade_rcnn_convneur_m1_shapes.py', 'coco', 'data/shapes', 1000,
                {'bbox_mAP': 'coco/bbox_mAP', 'segm_mAP': 'coco/segm_mAP'}, 1.0, 'work_dirs/quickstart',
                'each pair: ground truth left, prediction right'),
    'seg': Task('semantic_fpn_convneur_m1_shapes.py', 'ade20k', 'data/shapes_ade20k', 1200,
                {'mIoU': 'mIoU'}, 0.01, 'work_dirs/quickstart_seg', 'each pair: ground truth left, prediction right'),
    'cls': Task('convneur_m1_shapes.py', 'imagenet', 'data/shapes_imagenet', 4000,
                {'top1': 'accuracy/top1'}, 0.01, 'work_dirs/quickstart_cls', 'ground truth and prediction in each'),
}
RTMDET = replace(TASKS['det'], config='rtmdet/rtmdet-ins_convneur_m1_shapes.py', out='work_dirs/quickstart_rtmdet')


def say(text: str) -> None:
    print(f'[quickstart] {text}', flush=True)


def run(command: Sequence[str | Path], log: Path) -> float:
    """Run a command in the project's folder, show its progress, and return the minutes it took.

    All its output goes to ``log``.

    Raises:
        SystemExit: If the command fails; shows the end of its output.
    """
    words = [str(c) for c in command]
    shown = ' '.join(os.path.relpath(w, ROOT) if w.startswith(str(ROOT)) else w for w in words)
    say(f'$ {shown}')
    start = time.time()
    tail: deque[str] = deque(maxlen=30)
    # This interpreter has the packages; the launchers might otherwise choose another environment.
    env = {**os.environ, 'PYTHON': sys.executable}
    with log.open('w') as file, subprocess.Popen(
            words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            file.write(line)
            file.flush()
            tail.append(line)
            match = PROGRESS.search(line)
            if match:
                parts = re.split(r'\s{2,}', re.sub(r'\[\s+', '[', match[2].strip()))
                print(f'    {match[1]:5s} ' + '  '.join(p for p in parts if WANTED.search(p)), flush=True)
    if process.returncode:
        sys.exit(f'{"".join(tail)}\n[quickstart] error: the command above failed; its whole output: {log}')
    return (time.time() - start) / 60


def scalars(work_dir: Path) -> list[dict]:
    """Return what the newest run in a work dir logged, one dict for each line."""
    path = max(work_dir.glob('*/vis_data/scalars.json'), key=lambda p: p.stat().st_mtime)
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def tested_metrics(work_dir: Path, task: Task) -> dict[str, float]:
    """Return the metrics of the newest test in a work dir, as fractions of 1."""
    path = max(work_dir.glob('*/*.json'), key=lambda p: p.stat().st_mtime)
    logged = json.loads(path.read_text())
    return {name: round(logged[key] * task.unit, 4) for name, key in task.metrics.items()}


def plot_curves(lines: list[dict], task: Task, path: Path) -> None:
    """Plot the training loss over iterations, and the validation metrics over epochs or iterations."""
    train = [line for line in lines if 'loss' in line]
    val = [line for line in lines if next(iter(task.metrics.values())) in line]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    left.plot([line['step'] for line in train], [line['loss'] for line in train], color='tab:blue')
    left.set(xlabel='iteration', ylabel='training loss', ylim=(0, None))
    for (name, key), marker in zip(task.metrics.items(), 'os'):
        right.plot([line['step'] for line in val], [line[key] * task.unit for line in val], marker=marker, label=name)
    by_epoch = val[-1]['step'] < train[-1]['step']
    right.set(xlabel='epoch' if by_epoch else 'iteration', ylabel='on the val split', ylim=(0, 1))
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(loc='lower right')
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def contact_sheet(folder: Path, caption: str, path: Path, count: int = 12) -> None:
    """Draw pictures from all over a folder, so from all class folders, as one captioned sheet."""
    files = sorted(f for f in folder.rglob('*') if f.suffix in ('.jpg', '.png'))
    files = files[::max(1, len(files) // count)][:count]
    pictures = [cv2.imread(str(f)) for f in files]
    height, width = pictures[0].shape[:2]
    pictures = [cv2.copyMakeBorder(cv2.resize(p, (width, height)), 6, 6, 6, 6, cv2.BORDER_CONSTANT,
                                   value=(255, 255, 255)) for p in pictures]
    columns = 3 if width > height else 6
    rows = [np.hstack(pictures[i:i + columns]) for i in range(0, len(pictures) - columns + 1, columns)]
    header = np.full((26, rows[0].shape[1], 3), 255, np.uint8)
    cv2.putText(header, caption, (8, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    cv2.imwrite(str(path), np.vstack([header, *rows]))


def quickstart(name: str, task: Task) -> None:
    """Run one task from data to report."""
    config, data, out = ROOT / 'configs' / task.config, ROOT / task.data, ROOT / task.out
    start = time.time()
    if out.exists():
        say(f'starting anew: removing {task.out}')
        shutil.rmtree(out)
    out.mkdir(parents=True)
    # Two processes help even on one machine's cores, because parts of a model use one thread.
    processes = torch.cuda.device_count() or min(2, os.cpu_count() or 1)
    minutes = {}
    say(f'{name} 1/4: data')
    minutes['data'] = run([sys.executable, TOOLS / 'make_shapes.py', data, '--format', task.form, '--num-train',
                           str(task.num_train)], out / 'data.log')
    device = 'GPU(s)' if torch.cuda.is_available() else 'CPU process(es)'
    say(f'{name} 2/4: training on {processes} {device}, about ten minutes on two cores')
    train_dir, test_dir, pictures = out / 'train', out / 'test', out / 'pictures'
    minutes['train'] = run([TOOLS / 'dist_train.sh', config, str(processes), '--work-dir', train_dir,
                            '--auto-scale-lr'], out / 'train.log')
    checkpoint = Path((train_dir / 'last_checkpoint').read_text().strip())
    say(f'{name} 3/4: testing the checkpoint')
    minutes['test'] = run([TOOLS / 'dist_test.sh', config, checkpoint, str(processes), '--work-dir', test_dir,
                           '--show-dir', pictures], out / 'test.log')
    say(f'{name} 4/4: report')
    plot_curves(scalars(train_dir), task, out / 'curves.png')
    contact_sheet(pictures, task.caption, out / 'predictions.png')
    minutes['total'] = (time.time() - start) / 60
    metrics = tested_metrics(test_dir, task)
    summary = dict(
        metrics,
        minutes={key: round(value, 2) for key, value in minutes.items()},
        config=f'configs/{task.config}', checkpoint=str(checkpoint.relative_to(ROOT)), processes=processes,
        versions=dict(convneur_mm=__version__, torch=torch.__version__))
    (out / 'summary.json').write_text(json.dumps(summary, indent=2) + '\n')
    figures = ', '.join(f'{key} {value:.3f}' for key, value in metrics.items())
    say(f'{name} done: {figures} after {minutes["total"]:.1f} minutes; see summary.json, curves.png and '
        f'predictions.png in {task.out}/')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--task', choices=[*TASKS, 'all'], default='det',
                        help='task: detection (the default), segmentation, classification, or all in turn')
    parser.add_argument('--head', choices=['cascade', 'rtmdet'], default='cascade',
                        help="of the detector: the paper's Cascade R-CNN (the default), or RTMDet, which is light")
    args = parser.parse_args()
    if args.head == 'rtmdet' and args.task not in ('det', 'all'):
        parser.error(f'--head is for --task det, got --task {args.task}')
    for name in TASKS if args.task == 'all' else [args.task]:
        quickstart(name, RTMDET if name == 'det' and args.head == 'rtmdet' else TASKS[name])


if __name__ == '__main__':
    main()
