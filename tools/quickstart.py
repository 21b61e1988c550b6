#!/usr/bin/env python
"""Generates data, trains, tests and reports; ``tools/quickstart.sh`` makes the environment first and calls this."""
from __future__ import annotations

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
CONFIG = ROOT / 'configs' / 'cascade_rcnn_convneur_m1_shapes.py'
OUT = ROOT / 'work_dirs' / 'quickstart'
DATA = ROOT / 'data' / 'shapes'
METRICS = {'bbox_mAP': 'coco/bbox_mAP', 'segm_mAP': 'coco/segm_mAP'}
# Lines of MMEngine's log that a person wants to see, without its time stamps.
PROGRESS = re.compile(r'Epoch\((train|val|test)\)\s+(.*)')
WANTED = re.compile(r'^\[|eta: |^loss: |coco/(bbox|segm)_mAP: ')


def say(text: str) -> None:
    print(f'[quickstart] {text}', flush=True)


def run(command: Sequence[str | Path], log: Path) -> float:
    """Runs a command in the project's folder, shows its progress, and returns the minutes it took.

    Everything it prints goes to ``log``.

    Raises:
        SystemExit: With the end of its output, if it fails.
    """
    words = [str(c) for c in command]
    shown = ' '.join(os.path.relpath(w, ROOT) if w.startswith(str(ROOT)) else w for w in words)
    say(f'$ {shown}')
    start = time.time()
    tail: deque[str] = deque(maxlen=30)
    with log.open('w') as file, subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            file.write(line)
            file.flush()
            tail.append(line)
            match = PROGRESS.search(line)
            if match:
                parts = re.split(r'\s{2,}', match[2].strip())
                print(f'    {match[1]:5s} ' + '  '.join(p for p in parts if WANTED.search(p)), flush=True)
    if process.returncode:
        sys.exit(f'{"".join(tail)}\n[quickstart] error: the command above failed; its whole output: {log}')
    return (time.time() - start) / 60


def scalars(work_dir: Path) -> list[dict]:
    """What the newest run in a work dir logged, a dict a line."""
    path = max(work_dir.glob('*/vis_data/scalars.json'), key=lambda p: p.stat().st_mtime)
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def tested_metrics(work_dir: Path) -> dict[str, float]:
    """The metrics of the newest test in a work dir."""
    path = max(work_dir.glob('*/*.json'), key=lambda p: p.stat().st_mtime)
    logged = json.loads(path.read_text())
    return {name: logged[key] for name, key in METRICS.items()}


def plot_curves(lines: list[dict], path: Path) -> None:
    """Training loss over iterations, and the validation metrics over epochs."""
    train = [line for line in lines if 'loss' in line]
    val = [line for line in lines if METRICS['bbox_mAP'] in line]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    left.plot([line['step'] for line in train], [line['loss'] for line in train], color='tab:blue')
    left.set(xlabel='iteration', ylabel='training loss', ylim=(0, None))
    for (name, key), marker in zip(METRICS.items(), 'os'):
        right.plot([line['step'] for line in val], [line[key] for line in val], marker=marker, label=name)
    right.set(xlabel='epoch', ylabel='on the val split', ylim=(0, 1))
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(loc='lower right')
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def contact_sheet(folder: Path, path: Path, count: int = 12, columns: int = 3) -> None:
    """The first pictures of a folder (ground truth left, prediction right) in one."""
    files = sorted(folder.rglob('*.jpg'))[:count] or sorted(folder.rglob('*.png'))[:count]
    pictures = [cv2.imread(str(f)) for f in files]
    height, width = pictures[0].shape[:2]
    pictures = [cv2.copyMakeBorder(cv2.resize(p, (width, height)), 6, 6, 6, 6, cv2.BORDER_CONSTANT,
                                   value=(255, 255, 255)) for p in pictures]
    rows = [np.hstack(pictures[i:i + columns]) for i in range(0, len(pictures) - columns + 1, columns)]
    header = np.full((26, rows[0].shape[1], 3), 255, np.uint8)
    cv2.putText(header, 'each pair: ground truth left, prediction right', (8, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5,
                (0, 0, 0), 1, cv2.LINE_AA)
    cv2.imwrite(str(path), np.vstack([header, *rows]))


def main() -> None:
    start = time.time()
    if OUT.exists():
        say(f'starting anew: removing {OUT.relative_to(ROOT)}')
        shutil.rmtree(OUT)
    OUT.mkdir(parents=True)
    # Two processes even on one machine's cores: several parts of a detector use a single thread.
    processes = torch.cuda.device_count() or min(2, os.cpu_count() or 1)
    minutes = {}
    say(f'1/4 data: {DATA.relative_to(ROOT)}')
    minutes['data'] = run([sys.executable, TOOLS / 'make_shapes.py', DATA, '--num-train', '1000'], OUT / 'data.log')
    say(f'2/4 training on {processes} {"GPU(s)" if torch.cuda.is_available() else "CPU process(es)"}; '
        'about ten minutes on two cores')
    train_dir, test_dir = OUT / 'train', OUT / 'test'
    minutes['train'] = run([TOOLS / 'dist_train.sh', CONFIG, str(processes), '--work-dir', train_dir,
                            '--auto-scale-lr'], OUT / 'train.log')
    checkpoint = Path((train_dir / 'last_checkpoint').read_text().strip())
    say(f'3/4 testing {checkpoint.relative_to(ROOT)}')
    minutes['test'] = run([TOOLS / 'dist_test.sh', CONFIG, checkpoint, str(processes), '--work-dir', test_dir,
                           '--show-dir', OUT / 'pictures'], OUT / 'test.log')
    say('4/4 report')
    plot_curves(scalars(train_dir), OUT / 'curves.png')
    contact_sheet(OUT / 'pictures', OUT / 'predictions.png')
    minutes['total'] = (time.time() - start) / 60
    summary = dict(
        tested_metrics(test_dir),
        minutes={name: round(value, 2) for name, value in minutes.items()},
        config=str(CONFIG.relative_to(ROOT)), checkpoint=str(checkpoint.relative_to(ROOT)), processes=processes,
        versions=dict(convneur_mm=__version__, torch=torch.__version__))
    (OUT / 'summary.json').write_text(json.dumps(summary, indent=2) + '\n')
    figures = ', '.join(f'{name} {summary[name]:.3f}' for name in METRICS)
    say(f'done: {figures} after {minutes["total"]:.1f} minutes')
    say(f'see {OUT.relative_to(ROOT)}/: summary.json, curves.png, predictions.png')


if __name__ == '__main__':
    main()
