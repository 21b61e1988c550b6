#!/usr/bin/env python
r"""Measure the gain of a memory carried from frame to frame, when a frame hides objects that earlier ones showed.

    # all trainings, a minute each on one core; run it again to continue after an interruption
    experiments/hidden_object.py
    # only read the runs' files
    experiments/hidden_object.py --table --plot hidden_object.png

Clips of six frames show four boxes with marks, which move at random. In the first three frames they are open, each
showing one of four colours; in the last three they are closed and grey. A model names the colour of each box in every
frame, and is measured in the last three. Every run writes a JSON file; a run whose file exists is not repeated.
"""
import argparse
import json
import os
import platform
import runpy
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / 'tools/_environment.py'))['prepare']()

import mmengine
import torch
from _small_tasks import IGNORED, LEGEND_COLOURS, PIXEL_MEAN, PIXEL_STD, Task, accuracy, predict, train
from mmengine.logging import MMLogger
from torch import Tensor, nn

from convneur_mm.analysis import bench
from convneur_mm.engine.files.errors import one_line_errors
from convneur_mm.models import ConvNeur

CLOSED = 0.5  # grey of a closed box's front
PATCH = 4  # pixels of a side: patch of the backbone's stem, and area of one logit
LONG = 30  # closed frames of the longer clips
VARIANTS = {'without state': False, 'carried state': True}
RESULT_KEYS = ('variant', 'seed', 'settings', 'figures', 'seconds', 'parameters', 'versions')


@dataclass(frozen=True)
class HiddenObject(Task):
    """Task that the top of the file describes.

    Attributes:
        shown: Frames with open boxes, at the start of a clip.
        hidden: Frames after them, with closed boxes; the last ``hidden`` are measured.
        side: Side of a frame, in boxes.
        box: Side of a box, in patches, which are all the same: a mark above a colour.
        boxes: Boxes in a clip, each with its own mark.
        marks: Marks to choose from, the same in all clips.
        noise: Standard deviation of the pixel noise.
        channels: Channels of the backbone, which has one block.
        mem_channels: Channels of its memory.
    """

    iterations: int = 500
    batch: int = 16
    lr: float = 2e-3
    chunk_size: int = 64
    solved: float = 0.9
    chance: float = 1 / len(LEGEND_COLOURS)
    seeds: int = 5
    cost: float = 1.0
    shown: int = 3
    hidden: int = 3
    side: int = 4
    box: int = 2
    boxes: int = 4
    marks: int = 6
    noise: float = 0.05
    channels: int = 48
    mem_channels: int = 64

    def build(self, carry: bool) -> nn.Module:
        arch = dict(depths=[1], channels=[self.channels], mem_channels=self.mem_channels)
        return _Model(self.backbone(arch, out_indices=(0, )), carry)

    def draw(self, batch: int, g: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        clips, labels = self.clips(batch, g, self.hidden)
        return (clips, ), labels

    def clips(self, batch: int, g: torch.Generator, hidden: int) -> tuple[Tensor, Tensor]:
        """Draw clips (B, T, 3, H, W), T = shown + ``hidden`` frames, and all boxes' colours, (B, T, H/4, W/4)."""
        frames, places = self.shown + hidden, self.side**2
        # Half of each mark's pixels are lit, and the marks are the same in all clips.
        half = PATCH // 2 * PATCH
        marks = torch.rand(self.marks, half, generator=torch.Generator().manual_seed(0)).argsort(-1) < half // 2
        marks = marks.float().view(self.marks, 1, PATCH // 2, PATCH).expand(-1, 3, -1, -1)
        chosen = torch.rand(batch, self.marks, generator=g).argsort(-1)[:, :self.boxes]
        colours = torch.randint(len(LEGEND_COLOURS), (batch, self.boxes), generator=g)
        taken = torch.rand(batch, frames, places, generator=g).argsort(-1)[..., :self.boxes]  # (B, T, boxes)

        inside = torch.tensor(LEGEND_COLOURS)[colours][:, None].repeat(1, frames, 1, 1)  # (B, T, boxes, 3)
        inside[:, self.shown:] = CLOSED
        inside = inside[..., None, None].expand(-1, -1, -1, -1, PATCH // 2, PATCH)
        patches = torch.cat((marks[chosen][:, None].expand_as(inside), inside), -2)  # (B, T, boxes, 3, 4, 4)

        clip, frame = torch.arange(batch)[:, None, None], torch.arange(frames)[:, None]
        size = self.side * self.box * PATCH
        pixels = torch.zeros(batch, frames, places, 3, self.box * PATCH, self.box * PATCH)
        pixels[clip, frame, taken] = patches.repeat(1, 1, 1, 1, self.box, self.box)
        pixels = pixels.unflatten(2, (self.side, self.side)).permute(0, 1, 4, 2, 5, 3, 6)
        pixels = pixels.reshape(batch, frames, 3, size, size)
        pixels = pixels + self.noise * torch.randn(pixels.shape, generator=g)
        labels = torch.full((batch, frames, places), IGNORED)
        labels[clip, frame, taken] = colours[:, None].expand_as(taken)
        labels = labels.unflatten(2, (self.side, self.side))
        labels = labels.repeat_interleave(self.box, 2).repeat_interleave(self.box, 3)
        return (pixels - PIXEL_MEAN) / PIXEL_STD, labels

    def measure(self, model: nn.Module, g: torch.Generator) -> dict[str, float]:
        """Measure accuracy on clips as in training, on longer ones, without any states, and on open boxes."""
        def measured(number: int, hidden: int, carry: bool, frames: slice) -> float:
            clips, labels = self.clips(number, g, hidden)
            model.carry = carry
            return accuracy(predict(model, (clips, ))[:, frames], labels[:, frames])

        last, carry = slice(-self.hidden, None), model.carry
        return dict(accuracy=measured(128, self.hidden, carry, last),
                    hidden_for_30_frames=measured(32, LONG, carry, last),
                    state_thrown_away=measured(128, self.hidden, False, last),
                    open_boxes=measured(128, self.hidden, carry, slice(self.shown)))


class _Model(nn.Module):

    def __init__(self, backbone: ConvNeur, carry: bool) -> None:
        super().__init__()
        self.backbone, self.carry = backbone, carry
        self.head = nn.Conv2d(backbone.channels[-1], len(LEGEND_COLOURS), 1)

    def forward(self, clips: Tensor) -> Tensor:
        """Map (B, T, 3, H, W) to logits (B, colours, T, H/4, W/4)."""
        if not self.carry:
            features, = self.backbone(clips.flatten(0, 1))
            return self.head(features).unflatten(0, clips.shape[:2]).transpose(1, 2)
        logits, states = [], None
        for frame in clips.unbind(1):
            (features, ), states = self.backbone(frame, states=states, return_states=True)
            logits.append(self.head(features))
        return torch.stack(logits, 2)


TASK = HiddenObject()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=TASK.seeds, metavar='N',
                        help='train with seeds 0 to N - 1 (default: %(default)s)')
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/hidden_object'), metavar='DIR',
                        help='folder of the results (default: %(default)s)')
    parser.add_argument('--table', action='store_true',
                        help='print the table of the existing results, without training')
    parser.add_argument('--plot', type=Path, metavar='FILE.png', help='plot the existing results, without training')
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f'--seeds must be at least 1, got {args.seeds}')
    return args


def settings() -> dict:
    """Return what a result depends on besides variant and seed, in JSON's types."""
    return json.loads(json.dumps(dict(asdict(TASK), long=LONG)))


def path_of(folder: Path, variant: str, seed: int) -> Path:
    return folder / f'{variant.replace(" ", "-")}-seed{seed}.json'


def load(path: Path) -> dict | None:
    """Read the result in a file; return None if there is none yet.

    Raises:
        ValueError: If the file has other content, or the result of other settings.
    """
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding='utf-8'))
        result = {key: result[key] for key in RESULT_KEYS}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f'{path} is not the result of a run ({type(error).__name__}: {error}): delete it') from None
    if result['settings'] != settings():
        raise ValueError(f'{path} was made with other settings than these: delete it, or name another --out-dir')
    return result


def execute(variant: str, seed: int) -> dict:
    """Train and measure on one thread; return the content of the run's file."""
    torch.set_num_threads(1)
    MMLogger.get_current_instance().setLevel('WARNING')  # hide the initialisation log of every parameter
    started = time.process_time()
    model = train(TASK, dict(carry=VARIANTS[variant]), seed, TASK.iterations)
    seconds = time.process_time() - started
    figures = TASK.measure(model, torch.Generator().manual_seed(2**32 + seed))
    return dict(variant=variant, seed=seed, settings=settings(), figures=figures, seconds=seconds,
                parameters=sum(p.numel() for p in model.parameters()),
                versions=dict(python=platform.python_version(), torch=torch.__version__, mmengine=mmengine.__version__))


def train_missing(args: argparse.Namespace) -> None:
    """Execute the wanted runs that have no file yet, and write their files."""
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        for variant in VARIANTS:
            path = path_of(args.out_dir, variant, seed)
            if load(path) is not None:
                continue
            result = execute(variant, seed)
            unfinished = path.with_suffix(f'.{os.getpid()}.tmp')
            bench.write_json(unfinished, result)
            unfinished.replace(path)
            figures = ', '.join(f'{name} {value:.3f}' for name, value in result['figures'].items())
            print(f'{variant}, seed {seed}: {figures}; {result["seconds"]:.0f} CPU s', file=sys.stderr, flush=True)


def all_results(args: argparse.Namespace) -> dict[str, list[dict]]:
    """Read the existing results of the wanted seeds, by variant.

    Raises:
        ValueError: If a variant has none.
    """
    results = {}
    for variant in VARIANTS:
        found = [load(path_of(args.out_dir, variant, seed)) for seed in range(args.seeds)]
        results[variant] = [result for result in found if result is not None]
        if not results[variant]:
            raise ValueError(f'--out-dir {args.out_dir} holds no results of {variant!r}')
    return results


def print_table(results: dict[str, list[dict]]) -> None:
    figures = list(next(iter(results.values()))[0]['figures'])
    rows = []
    for variant, runs in results.items():
        values = [[run['figures'][name] for run in runs] for name in figures]
        solved = sum(value >= TASK.solved for value in values[0])
        rows.append((variant, f'{solved} of {len(runs)}', *(bench.spread(of_figure) for of_figure in values),
                     f'{min(values[0]):.2f}', f'{max(values[0]):.2f}', f'{runs[0]["parameters"]:,}',
                     f'{statistics.median(run["seconds"] for run in runs):.0f}'))
    header = '', 'solved', *(name.replace('_', ' ') for name in figures), 'least', 'most', 'parameters', 'CPU s'
    print(f'{TASK.iterations} iterations, chance {TASK.chance:.2f}, solved from {TASK.solved:.2f} on\n')
    print(bench.format_table(header, rows))


def plot(path: Path, results: dict[str, list[dict]]) -> None:
    """Plot for each figure a dot for each seed, their mean, and guessing."""
    names = list(next(iter(results.values()))[0]['figures'])
    figure, axes = bench.new_figure(len(names))
    for axis, name in zip(axes, names):
        axis.axvline(TASK.chance, color='grey', linestyle=':', label='guessing')
        for y, runs in enumerate(results.values()):
            values = [run['figures'][name] for run in runs]
            axis.plot(values, [y] * len(runs), 'o', color='tab:blue', alpha=0.5, label='a seed')
            axis.plot(statistics.mean(values), y, '|', color='black', markersize=16, label='mean')
        axis.set_yticks(range(len(results)), list(results))
        axis.invert_yaxis()
        axis.set(title=name.replace('_', ' '), xlabel='accuracy', xlim=(0, 1.02))
        axis.grid(axis='x', alpha=0.3)
    labels = dict(zip(*reversed(axes[0].get_legend_handles_labels())))
    figure.legend(labels.values(), labels, loc='outside lower center', ncols=len(labels))
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors():
        try:
            if not (args.table or args.plot):
                train_missing(args)
        except KeyboardInterrupt:
            sys.exit('stopped; the same command goes on from here')
        results = all_results(args)
        print_table(results)
        if args.plot:
            plot(args.plot, results)


if __name__ == '__main__':
    main()
