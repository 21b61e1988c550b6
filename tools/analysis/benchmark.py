#!/usr/bin/env python
r"""Measure time and memory of ConvNeur and other backbones on a CPU: alone, in a detector and in a segmentor.

    # everything, into work_dirs/benchmark/; if interrupted, the same command continues
    tools/analysis/benchmark.py
    # a choice
    tools/analysis/benchmark.py --tasks detector --models ConvNeur-m3 ResNet-50 --modes inference
    # print the tables of what has been measured so far, as Markdown
    tools/analysis/benchmark.py --table

Each table cell is a JSON file, and each of its rounds is measured in a separate process. Between its calls a process
times a yardstick, the same for all, and a cell's time is a multiple of the yardstick's. A machine that is temporarily
slower, as shared ones are, slows both.
"""
import argparse
import itertools
import json
import math
import operator
import os
import os.path as osp
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == '__main__':
    sys.path.append(osp.dirname(osp.dirname(osp.realpath(__file__))))  # tools/
    from _environment import prepare
    prepare()

import _benchmark as bench
import _benchmark_cases as cases
import torch
from _flops import Count, count_flops, count_parameters, count_parts

from convneur_mm.engine.files.errors import one_line_errors

COUNT, ENGINES = 'count', ('eager', 'compiled')
WARMUP = 2  # the optimizer's state exists from the second training step on
# Estimated seconds of a round on two cores, until one of the same kind has been measured.
FIRST_GUESS = {'backbone': 15, 'detector': 60, 'segmentor': 30}
COUNT_GUESS, COMPILED_GUESS = 10, 45

NOTES = """\
params: of everything that works at inference, frozen parameters included, buffers not. GMAC: multiply-accumulates of
  one image, convolutions and matrix products alone, the memory's inner loop and attention included; in the detector
  {proposals} proposals go through each box head and {detections} boxes through each mask head, in the time too.
training: forward pass, loss, backward pass and a step of AdamW, float32, nothing frozen; the detector has {objects}
  objects in the image. The backbone alone has random gradients at its four outputs instead of a loss.
ms: of the whole batch, the median over {rounds} of the median of up to {calls} calls each, every call as a multiple of
  the yardstick before and after it, times {yardstick:.0f} ms, the median of the yardstick over all processes; the
  yardstick is {yardstick_name}. compiled: torch.compile, once it has compiled.
MiB: largest resident set of the process above that after its imports, eager: weights, activations, gradients,
  optimizer, libraries' scratch space, and what malloc keeps."""


class Cell(NamedTuple):
    """What is measured at once, and its file. ``engine`` is '' for the count."""

    task: str
    model: str
    mode: str
    engine: str

    @property
    def label(self) -> str:
        return ', '.join(filter(None, self))

    def path(self, out: Path) -> Path:
        return out / self.task / f'{"-".join(filter(None, self[1:]))}.json'


# ---- command line


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tasks', nargs='+', choices=list(cases.TASKS), default=list(cases.TASKS), metavar='TASK',
                        help=f'tasks to measure, from: {", ".join(cases.TASKS)} (default: all)')
    parser.add_argument('--models', nargs='+', choices=list(cases.BACKBONES), default=list(cases.BACKBONES),
                        metavar='MODEL', help=f'models to measure, from: {", ".join(cases.BACKBONES)} (default: all)')
    parser.add_argument('--modes', nargs='+', choices=cases.MODES, default=list(cases.MODES), metavar='MODE',
                        help=f'modes to measure, from: {", ".join(cases.MODES)} (default: both)')
    parser.add_argument('--compile', action=argparse.BooleanOptionalAction, default=True,
                        help='also measure backbones alone with torch.compile (default: yes)')
    parser.add_argument('--rounds', type=int, default=3, metavar='N',
                        help='number of processes per cell (default: %(default)s)')
    parser.add_argument('--calls', type=int, default=5, metavar='N',
                        help='timed calls per process, after two untimed ones (default: %(default)s)')
    parser.add_argument('--seconds', type=float, default=15, metavar='S',
                        help='start no further call in a process after this time; the first is always timed '
                        '(default: %(default)s)')
    parser.add_argument('--shape', metavar='B,H,W', help='batch size, height and width for all tasks (default: '
                        + ', '.join(f'{name} {",".join(map(str, task.shape))}' for name, task in cases.TASKS.items())
                        + ')')
    parser.add_argument('--threads', type=int, metavar='N', help="number of CPU threads (default: torch's)")
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmark'), metavar='DIR',
                        help='output folder of the JSON files (default: %(default)s)')
    parser.add_argument('--table', action='store_true',
                        help='print the tables of the results in --out, without measuring')
    parser.add_argument('--measure', nargs=4, metavar=('TASK', 'MODEL', 'MODE', 'ENGINE'),
                        help='measure one round of one cell in this process and print it as JSON')
    return parser.parse_args(argv)


def parse_shape(text: str) -> tuple[int, int, int]:
    """Parse 'B,H,W' as three integers.

    Raises:
        ValueError: If it is malformed, or the sides are not multiples of 32, which a detector would pad.
    """
    try:
        batch, height, width = (int(part) for part in text.split(','))
    except ValueError:
        raise ValueError(f'--shape must be B,H,W, three integers, got {text!r}') from None
    if batch < 1 or min(height, width) < 32 or height % 32 or width % 32:
        raise ValueError(f'--shape must be at least one image with sides that are multiples of 32, got {text!r}')
    return batch, height, width


def check_args(args: argparse.Namespace) -> None:
    """Raise a ValueError for the first option outside its range."""
    for name, least in (('rounds', 1), ('calls', 1), ('seconds', 0), ('threads', 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f'--{name} must be at least {least}, got {value}')
    if args.shape:
        parse_shape(args.shape)
    if args.table and not args.out.is_dir():
        raise ValueError(f'--out must be the folder of an earlier run for --table, got {str(args.out)!r}')


def shape_of(args: argparse.Namespace, task: str) -> tuple[int, int, int]:
    return parse_shape(args.shape) if args.shape else cases.TASKS[task].shape


# ---- one cell, in a process of its own


def resident_bytes(field: str) -> int:
    """Return 'VmRSS', the resident set of this process, or 'VmHWM', its largest so far.

    Unlike ``getrusage``, this does not include the parent process.

    Raises:
        ValueError: If the system does not report it.
    """
    status = Path('/proc/self/status')
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith(f'{field}:'):
            return int(line.split()[1]) * 1024
    raise ValueError(f'peak memory is read from {field} in {status}, which this system has not')


def measure(cell: Cell, shape: tuple[int, int, int], calls: int, seconds: float) -> dict:
    """Measure one round of a cell.

    Returns:
        dict: ``times_s`` (list[float]) of the calls; ``yardstick_s`` (list[float]), the yardstick's mean time around
            each; ``peak_memory_bytes`` (int) of an eager cell, else None.
    """
    cases.import_packages(cell.task)
    torch.manual_seed(0)
    baseline = resident_bytes('VmRSS')
    call = cases.make_call(cell.task, cases.build(*cell[:3]), cell.mode, shape, compiled=cell.engine == 'compiled')
    for _ in range(WARMUP):
        call()
    # The compiler also runs in this process and takes more memory than the model. Read the peak before the yardstick.
    peak = resident_bytes('VmHWM') - baseline if cell.engine == 'eager' else None
    device = torch.device('cpu')
    yardstick = cases.make_yardstick()
    yardstick()
    times, around = [], [bench.timed(yardstick, device)]
    started = time.monotonic()
    while not times or (len(times) < calls and time.monotonic() - started < seconds):
        times.append(bench.timed(call, device))
        around.append(bench.timed(yardstick, device))
    yardsticks = [statistics.mean(pair) for pair in zip(around, around[1:])]
    return dict(times_s=times, yardstick_s=yardsticks, peak_memory_bytes=peak)


def count(cell: Cell, shape: tuple[int, int, int]) -> dict:
    """Count parameters and one image's multiply-accumulates, for the model as measured in each mode."""
    counts = {}
    for mode in cases.MODES:
        model = cases.build(cell.task, cell.model, mode).to('meta')
        model.eval()
        image = torch.empty(1, 3, *shape[1:], device='meta')
        parts = ({'backbone': Count(count_parameters(model), count_flops(model, image))}
                 if cell.task == 'backbone' else count_parts(model, image))
        counts[mode] = dict(parameters=sum(part.parameters for part in parts.values()),
                            macs=sum(part.macs for part in parts.values()))
    return counts


def measure_here(args: argparse.Namespace) -> dict:
    """Measure the cell of ``--measure``.

    Raises:
        ValueError: If the cell does not exist.
    """
    cell = Cell(*args.measure)
    allowed = cases.TASKS, cases.BACKBONES, (*cases.MODES, COUNT), (*ENGINES, '')
    for name, value, values in zip(Cell._fields, cell, allowed):
        if value not in values:
            raise ValueError(f'--measure: {name} must be one of {", ".join(map(repr, values))}, got {value!r}')
    if args.threads:
        torch.set_num_threads(args.threads)
    shape = shape_of(args, cell.task)
    if cell.mode == COUNT:
        return count(cell, shape)
    return measure(cell, shape, args.calls, args.seconds)


# ---- all cells


def read_cell(path: Path) -> dict:
    """Read the file of a cell; return an empty dict if there is none.

    Raises:
        ValueError: If it is not JSON.
    """
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path}: expected JSON, got {error}; remove the file to measure it again') from None


def write_cell(path: Path, content: dict) -> None:
    """Replace the file in one step, so that an interruption leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix('.part')
    bench.write_json(part, content)
    part.replace(path)


class Run:
    """All requested cells and their results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        if args.threads:
            torch.set_num_threads(args.threads)
        self.machine = bench.describe_machine(torch.device('cpu'))
        self.progress = bench.Progress()
        self.failed: set[Cell] = set()
        self.contents = {cell: self.read(cell) for task in args.tasks for cell in self.cells(task)}

    def cells(self, task: str) -> Iterator[Cell]:
        """Yield a task's cells in the order in which they are measured."""
        args = self.args
        for model in args.models:
            yield Cell(task, model, COUNT, '')
        engines = ENGINES if args.compile and cases.TASKS[task].compiled else ENGINES[:1]
        for mode, engine, model in itertools.product(args.modes, engines, args.models):
            yield Cell(task, model, mode, engine)

    def read(self, cell: Cell) -> dict:
        """Read a cell's file and check it against this run.

        Raises:
            ValueError: If it was measured on another machine or at another size.
        """
        path, here = cell.path(self.args.out), dict(shape=list(shape_of(self.args, cell.task)), machine=self.machine)
        content = read_cell(path) or {**cell._asdict(), **here, 'rounds': []}
        for key, value in here.items():
            if content.get(key) != value and not self.args.table:
                raise ValueError(f'{path} was measured with {key} {content.get(key)}, this run has {value}: choose '
                                 'another --out, or remove the file')
        return content

    def missing(self) -> list[Cell]:
        """Return what is left to measure: a cell for each missing round, task by task and round by round."""
        left = []
        for task in self.args.tasks:
            of_task = [cell for cell in self.contents if cell.task == task]
            for done in range(self.args.rounds):
                left += [cell for cell in of_task if len(self.contents[cell]['rounds']) <= done
                         and (cell.mode != COUNT or not done)]
        return left

    def estimate(self, left: Sequence[Cell]) -> float:
        """Estimate the seconds that ``left`` will take, from earlier rounds of the cell or else of its kind."""
        def kind(cell: Cell) -> tuple[str, str, str]:
            return cell.task, cell.mode, cell.engine

        of_kind: dict[tuple[str, str, str], list[float]] = {}
        for cell, content in self.contents.items():
            of_kind.setdefault(kind(cell), []).extend(one['wall_s'] for one in content['rounds'])

        def seconds(cell: Cell) -> float:
            own = [one['wall_s'] for one in self.contents[cell]['rounds']]
            if own or of_kind[kind(cell)]:
                return statistics.mean(own or of_kind[kind(cell)])
            if cell.mode == COUNT:
                return COUNT_GUESS
            return COMPILED_GUESS if cell.engine == 'compiled' else FIRST_GUESS[cell.task]

        return sum(seconds(cell) for cell in left)

    def run(self) -> None:
        """Measure everything that is missing; failures are noted and skipped."""
        left = self.missing()
        self.progress.note(f'{len(left)} processes to run, about {duration(self.estimate(left))}')
        for i, cell in enumerate(left):
            if cell in self.failed:
                continue
            rest = [other for other in left[i:] if other not in self.failed]
            self.progress(f'{i + 1}/{len(left)} {cell.label}; {duration(self.estimate(rest))} left')
            self.run_cell(cell)
        self.progress.clear()

    def run_cell(self, cell: Cell) -> None:
        """Measure one round of a cell in a new process, and add it to the cell's file."""
        args, content = self.args, self.contents[cell]
        command = [sys.executable, osp.realpath(__file__), '--measure', *cell, '--calls', str(args.calls),
                   '--seconds', str(args.seconds)]
        for option in ('threads', 'shape'):
            if getattr(args, option):
                command += [f'--{option}', str(getattr(args, option))]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True,
                              env=dict(os.environ, PYTHONWARNINGS='ignore'))
        content.pop('error', None)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            content['error'] = lines[-1] if lines else f'exit code {done.returncode}'
            self.failed.add(cell)
            self.progress.note(f'{cell.label} failed: {content["error"]}')
        else:
            content['rounds'].append(dict(json.loads(done.stdout.splitlines()[-1]),
                                          wall_s=time.monotonic() - started))
        write_cell(cell.path(args.out), content)

    # ---- the tables

    def report(self) -> str:
        """Format a table for each task, the machine, and notes."""
        parts = []
        for task in self.args.tasks:
            batch, height, width = shape_of(self.args, task)
            compiled = any(cell.engine == 'compiled' for cell in self.contents if cell.task == task)
            header = [f'{cases.TASKS[task].title}, {batch} x {height} x {width}', 'params (M)', 'GMAC']
            for mode in self.args.modes:
                header += [f'{mode} ms'] + ['compiled'] * compiled
            header += [f'{mode} MiB' for mode in self.args.modes]
            parts.append(bench.format_table(header, [self.table_row(task, model, compiled)
                                                     for model in self.args.models]))
        measured = [content for content in self.contents.values() if content['rounds'] and content['mode'] != COUNT]
        machines = [', '.join(f'{name} {value}' for name, value in machine.items()) for machine in
                    {json.dumps(content['machine']): content['machine'] for content in measured}.values()]
        rounds = sorted({len(content['rounds']) for content in measured}) or [0]
        calls = max((len(one['times_s']) for content in measured for one in content['rounds']), default=0)
        notes = NOTES.format(
            yardstick=self.yardstick() * 1000, yardstick_name=cases.YARDSTICK, proposals=1000, detections=100,
            objects=cases.OBJECTS, calls=calls,
            rounds=f'{rounds[0]} rounds' if len(rounds) == 1 else f'{rounds[0]} to {rounds[-1]} rounds')
        return '\n\n'.join([*parts, '\n'.join([notes, *self.remarks(), *machines])])

    def table_row(self, task: str, model: str, compiled: bool) -> list[str]:
        counted = self.contents[Cell(task, model, COUNT, '')]
        cells = [f'{number:.{digits}f}' for number, digits in
                 ((counted['rounds'][0]['inference']['parameters'] / 1e6, 1),
                  (counted['rounds'][0]['inference']['macs'] / 1e9, 2 if task == 'backbone' else 0))
                 ] if counted['rounds'] else [self.gap(counted)] * 2
        for mode in self.args.modes:
            for engine in ENGINES[:1 + compiled]:
                content = self.contents[Cell(task, model, mode, engine)]
                cells.append(bench.milliseconds(relative_time(content) * self.yardstick())
                             if content['rounds'] else self.gap(content))
        for mode in self.args.modes:
            content = self.contents[Cell(task, model, mode, 'eager')]
            peaks = [one['peak_memory_bytes'] for one in content['rounds']]
            cells.append(f'{statistics.median(peaks) / 2**20:.0f}' if peaks else self.gap(content))
        return [model, *cells]

    def yardstick(self) -> float:
        """Return the yardstick's seconds, the median over all processes."""
        return statistics.median([seconds for cell, content in self.contents.items() if cell.mode != COUNT
                                  for one in content['rounds'] for seconds in one['yardstick_s']] or [math.nan])

    @staticmethod
    def gap(content: dict) -> str:
        """Return the text for a missing number."""
        return 'failed' if 'error' in content else '-'

    def remarks(self) -> list[str]:
        """Return notes on OverLoCK's counts as trained, the spread of the rounds, and failures."""
        lines = []
        for cell, content in self.contents.items():
            if cell.mode == COUNT and content['rounds']:
                merged, trained = (content['rounds'][0][mode] for mode in cases.MODES)
                if merged != trained:
                    lines.append(f'{cell.model}, {cell.task}: merged at inference; as trained '
                                 f'{trained["parameters"] / 1e6:.1f} M, {trained["macs"] / 1e9:.2f} GMAC')
        spreads = [spread(content) for cell, content in self.contents.items()
                   if cell.mode != COUNT and len(content['rounds']) > 1]
        if spreads:
            lines.append('rounds of a cell, (slowest - fastest) / median: '
                         f'{statistics.median(spreads):.0%} in the median cell, {max(spreads):.0%} in the worst')
        lines += [f'failed: {cell.label}: {content["error"]}' for cell, content in self.contents.items()
                  if 'error' in content]
        return lines


def round_medians(content: dict) -> list[float]:
    """Return each round's median call time, as a multiple of the yardstick's."""
    return [statistics.median(map(operator.truediv, one['times_s'], one['yardstick_s'])) for one in content['rounds']]


def relative_time(content: dict) -> float:
    return statistics.median(round_medians(content))


def spread(content: dict) -> float:
    medians = round_medians(content)
    return (max(medians) - min(medians)) / statistics.median(medians)


def duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f'{minutes // 60} h {minutes % 60} min' if minutes >= 60 else f'{minutes} min'


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors():
        check_args(args)
        if args.measure:
            print(json.dumps(measure_here(args)))
            return
        run = Run(args)
        try:
            if not args.table:
                run.run()
        except KeyboardInterrupt:
            sys.exit('\ninterrupted; the same command goes on where this one stopped')
        print(run.report())
    if run.failed:
        sys.exit(f'error: {len(run.failed)} cells failed, see above')


if __name__ == '__main__':
    main()
