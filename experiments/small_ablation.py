#!/usr/bin/env python
r"""Measure what each part of ConvNeur contributes, on generated tasks that train in a minute or two on one core.

    # everything, two trainings at a time; run it again to continue after an interruption
    experiments/small_ablation.py --jobs 2
    # does the model without memory catch up with three times the budget?
    experiments/small_ablation.py --tasks legend --variants none --budget-factor 3
    # only read the runs' files
    experiments/small_ablation.py --table --plot ablation.png
    # what a memory gains that is carried from frame to frame of a clip
    experiments/small_ablation.py --tasks "hidden object"
    # street photos (CamVid), 4 to 15 minutes a training
    experiments/small_ablation.py --tasks camvid --camvid data/camvid --out-dir work_dirs/camvid

Tasks: recall (key and value, the global branch alone), legend (a pattern's meaning is given elsewhere in the picture,
outside the local branch's view), shapes (one generated shape, told by its outline), and, if asked for, hidden object
(clips whose first frames show what later ones hide) and camvid (segmentation of street photos; a folder with
images/training, annotations/training and the same of validation, or SegNet's train, trainannot, val, valannot). Every
run writes its own JSON file, and the first seed of camvid a gate sheet; a run whose file exists is not repeated.
"""
import argparse
import json
import multiprocessing
import os
import platform
import runpy
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / 'tools/_environment.py'))['prepare']()

import mmengine
import torch
from _small_tasks import CamVid, HiddenObject, Legend, Recall, Shapes, Task, train
from mmengine.logging import MMLogger

from convneur_mm.analysis import bench
from convneur_mm.engine.files.errors import one_line_errors

TASKS: dict[str, Task] = {'recall': Recall(), 'legend': Legend(), 'shapes': Shapes(), 'hidden object': HiddenObject(),
                          'camvid': CamVid()}
DEFAULT_TASKS = ('recall', 'legend', 'shapes')
# Options of the backbone, and the side of the tiles if the memory takes the tokens in tiles and not row by row.
VARIANTS: dict[str, dict] = {
    'none': dict(placement='none'),
    'previous': dict(),
    'previous, parallel': dict(memory_cfg=dict(update_rule='parallel')),
    'final': dict(memory_cfg=dict(retrieve='final')),
    'final, parallel': dict(memory_cfg=dict(retrieve='final', update_rule='parallel')),
    'previous, normalised': dict(memory_cfg=dict(step_normalization=0.125)),
    'final, normalised': dict(memory_cfg=dict(retrieve='final', step_normalization=0.125)),
    'previous, tiles': dict(tile=8, memory_cfg=dict(chunk_size=64)),
    'final, tiles': dict(tile=8, memory_cfg=dict(chunk_size=64, retrieve='final')),
    'final, 1 chunk': dict(memory_cfg=dict(retrieve='final', num_chunks=1)),
    'final, 16 chunks': dict(memory_cfg=dict(retrieve='final', num_chunks=16)),
    # What of the inner rule is needed.
    'final, ascent': dict(inner=dict(direction=-1.0), memory_cfg=dict(retrieve='final')),
    'final, q = k': dict(inner=dict(query_is_key=True), memory_cfg=dict(retrieve='final')),
    'final, last layer': dict(inner=dict(last_layer=True), memory_cfg=dict(retrieve='final')),
    'final, dot product': dict(inner=dict(loss='dot'), memory_cfg=dict(retrieve='final')),
    'final, resets': dict(inner=dict(reset_every=2), memory_cfg=dict(retrieve='final')),
    'previous, resets': dict(inner=dict(reset_every=2)),
    'linear attention': dict(inner=dict(linear_attention=True)),
    'final, never written': dict(memory_cfg=dict(retrieve='final', inner_step=0.0)),
    'cbam': dict(global_branch='cbam'),
    'non-local': dict(global_branch='non_local'),
    'self-attention': dict(global_branch='self_attention'),
    'rwkv': dict(global_branch='rwkv'),
    'titans': dict(global_branch='titans'),
    'final, add': dict(fusion='add', memory_cfg=dict(retrieve='final')),
    'final, concat': dict(fusion='concat', memory_cfg=dict(retrieve='final')),
}
# Options of the model of hidden objects, whose backbone is always the same.
STATES: dict[str, dict] = {'without state': dict(carry=False), 'carried state': dict(carry=True)}
# On street photos: the paper's setting, the one for dense tasks, what lies between them, and others' backbones.
STREET: dict[str, dict] = {
    **{name: VARIANTS[name] for name in ('none', 'previous', 'final', 'cbam', 'self-attention')},
    'final, normalised, 4 chunks': dict(memory_cfg=dict(num_chunks=4, retrieve='final', step_normalization=0.125)),
    'ResNet-18': dict(backbone=dict(type='mmseg.ResNet', depth=18)),
    'PVTv2-B0': dict(backbone=dict(type='mmdet.PyramidVisionTransformerV2', embed_dims=32, num_layers=[2, 2, 2, 2])),
}

RESULT_KEYS = ('task', 'variant', 'budget_factor', 'seed', 'settings', 'figures', 'seconds', 'parameters', 'versions')
# Task fields that change neither a training nor its figures. Iterations are in a run's settings, with the budget.
REPORT_FIELDS = ('iterations', 'solved', 'chance', 'seeds', 'cost', 'folder')
# Task → (variant, budget factor) → results of its seeds.
Results = dict[str, dict[tuple[str, float], list[dict]]]


def variants_of(task: str) -> dict[str, dict]:
    """Return the options of each variant of a task."""
    return {'hidden object': STATES, 'camvid': STREET}.get(task, VARIANTS)


@dataclass(frozen=True)
class Run:
    """One training, and the path of its result."""

    task: str
    variant: str
    budget_factor: float
    seed: int

    @property
    def iterations(self) -> int:
        return max(1, round(TASKS[self.task].iterations * self.budget_factor))

    @property
    def settings(self) -> dict:
        """Return what the result depends on besides the seed, in JSON's types."""
        task = {name: value for name, value in asdict(TASKS[self.task]).items() if name not in REPORT_FIELDS}
        options = variants_of(self.task)[self.variant]
        return json.loads(json.dumps(dict(task=task, options=options, iterations=self.iterations)))

    def path(self, folder: Path) -> Path:
        name = f'{self.task}-{self.variant}-x{self.budget_factor:g}-seed{self.seed}'
        return folder / f'{name.replace(", ", "-").replace(" ", "-")}.json'

    def __str__(self) -> str:
        return f'{self.task}, {self.variant}, {self.iterations} iterations, seed {self.seed}'


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tasks', nargs='+', choices=list(TASKS), default=list(DEFAULT_TASKS), metavar='TASK',
                        help=f'tasks to train, from: {", ".join(TASKS)} (default: {", ".join(DEFAULT_TASKS)})')
    known = list(dict.fromkeys((*VARIANTS, *STATES, *STREET)))
    parser.add_argument('--variants', nargs='+', choices=known, default=known, metavar='VARIANT',
                        help='variants, from: ' + ', '.join(map(repr, VARIANTS)) + '; of hidden objects '
                        + ', '.join(map(repr, STATES)) + '; of camvid ' + ', '.join(map(repr, STREET))
                        + ' (default: all)')
    parser.add_argument('--seeds', type=int, metavar='N', help='train with seeds 0 to N - 1 (default: by task, '
                        + ', '.join(f'{name} {task.seeds}' for name, task in TASKS.items()) + ')')
    parser.add_argument('--budget-factor', type=float, default=1.0, metavar='X',
                        help='multiply the iterations of each task by X (default: %(default)g)')
    parser.add_argument('--jobs', type=int, default=1, metavar='N',
                        help='number of parallel training runs, one thread each (default: %(default)s)')
    parser.add_argument('--camvid', default=TASKS['camvid'].folder, metavar='DIR',
                        help='folder of the street photos (default: %(default)s)')
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/small_ablation'), metavar='DIR',
                        help='folder of the results (default: %(default)s)')
    parser.add_argument('--table', action='store_true',
                        help='print the tables of the existing results, without training')
    parser.add_argument('--plot', type=Path, metavar='FILE.png', help='plot the existing results, without training')
    args = parser.parse_args(argv)
    for name in ('seeds', 'jobs', 'budget_factor'):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f'--{name.replace("_", "-")} must be greater than 0, got {value}')
    return args


# ---- runs


def wanted_runs(args: argparse.Namespace) -> list[Run]:
    """List the requested runs, sorted by seed, so that a stopped ablation has an even table."""
    seeds = {name: args.seeds or TASKS[name].seeds for name in args.tasks}
    return [Run(task, variant, args.budget_factor, seed) for seed in range(max(seeds.values()))
            for task in args.tasks if seed < seeds[task] for variant in args.variants if variant in variants_of(task)]


def execute(run: Run, task: Task, settings: dict, picture: Path) -> dict:
    """Train and measure on one thread; return the content of the run's file.

    Task and settings come from the calling process; a spawned process may have others. The first seed of a task that
    has something to show writes it to ``picture``.
    """
    torch.set_num_threads(1)
    MMLogger.get_current_instance().setLevel('WARNING')  # hide the initialisation log of every parameter
    task.draw(1, torch.Generator())  # generate cached pictures before the clock starts
    started = time.process_time()  # CPU time, because others may use the machine; this is the only thread
    model = train(task, settings['options'], run.seed, settings['iterations'])
    seconds = time.process_time() - started
    figures = task.measure(model, torch.Generator().manual_seed(2**32 + run.seed))
    if run.seed == 0:
        task.show(model, picture)
    return dict(task=run.task, variant=run.variant, budget_factor=run.budget_factor, seed=run.seed, settings=settings,
                figures=figures, seconds=seconds, parameters=sum(p.numel() for p in model.parameters()),
                versions=dict(python=platform.python_version(), torch=torch.__version__, mmengine=mmengine.__version__))


def results_of(runs: Sequence[Run], args: argparse.Namespace) -> Iterator[tuple[Run, dict]]:
    """Execute the runs and yield each with its result when it ends."""
    tasks = {**TASKS, 'camvid': replace(TASKS['camvid'], folder=args.camvid)}
    calls = [(run, tasks[run.task], run.settings, run.path(args.out_dir).with_suffix('.png')) for run in runs]
    if args.jobs == 1:
        for call in calls:
            yield call[0], execute(*call)
        return
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context('spawn')) as pool:
        try:
            pending = {pool.submit(execute, *call): call[0] for call in calls}
            for future in as_completed(pending):
                yield pending[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def train_missing(args: argparse.Namespace) -> None:
    """Execute the wanted runs that have no file yet, and write their files.

    Raises:
        ValueError: If a file has the result of other settings.
    """
    args.out_dir.mkdir(parents=True, exist_ok=True)
    runs = wanted_runs(args)
    missing = [run for run in runs if read(run, args.out_dir) is None]
    note(f'{len(runs) - len(missing)} of {len(runs)} runs are in {args.out_dir}, {len(missing)} to go')
    started, done = time.monotonic(), 0.0
    work = sum(cost(run) for run in missing)
    for number, (run, result) in enumerate(results_of(missing, args), start=1):
        path = run.path(args.out_dir)
        unfinished = path.with_suffix(f'.{os.getpid()}.tmp')
        bench.write_json(unfinished, result)
        unfinished.replace(path)
        done += cost(run)
        eta = (time.monotonic() - started) * (work - done) / done
        figures = ', '.join(f'{name} {value:.3f}' for name, value in result['figures'].items())
        note(f'[{number}/{len(missing)}] {run}: {figures}; {result["seconds"]:.0f} CPU s; {eta / 60:.0f} min to go')


def cost(run: Run) -> float:
    """Estimate the relative cost of a run: iterations times the task's cost of each."""
    return run.iterations * TASKS[run.task].cost


def read(run: Run, folder: Path) -> dict | None:
    """Read the result of a run; return None if it has none yet.

    Raises:
        ValueError: If its file has other content, or was made with other settings.
    """
    path = run.path(folder)
    if not path.exists():
        return None
    result = load(path)
    if result['settings'] != run.settings:
        raise ValueError(f'{path} was made with other settings than these: delete it, or name another --out-dir')
    return result


def load(path: Path) -> dict:
    """Read the file of a run.

    Raises:
        ValueError: If it is not the result of a run.
    """
    try:
        result = json.loads(path.read_text(encoding='utf-8'))
        return {key: result[key] for key in RESULT_KEYS}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f'{path} is not the result of a run ({type(error).__name__}: {error}): delete it') from None


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- reports


def all_results(args: argparse.Namespace) -> Results:
    """Read the existing results.

    Raises:
        ValueError: If there are none, or one was made with other settings.
    """
    results: Results = {}
    if not args.out_dir.is_dir():
        raise ValueError(f'--out-dir {args.out_dir} is not a folder')
    found = [load(path) for path in sorted(args.out_dir.glob('*.json'))]
    for task in args.tasks:
        for variant in args.variants:
            of_variant = [result for result in found if (result['task'], result['variant']) == (task, variant)]
            for factor in sorted({result['budget_factor'] for result in of_variant}):
                seeds = sorted(result['seed'] for result in of_variant if result['budget_factor'] == factor)
                results.setdefault(task, {})[variant, factor] = [
                    read(Run(task, variant, factor, seed), args.out_dir) for seed in seeds]
    if not results:
        raise ValueError(f'{args.out_dir} holds no results of these tasks and variants')
    return results


def row_name(variant: str, factor: float) -> str:
    return variant if factor == 1 else f'{variant}, {factor:g} x the budget'


def print_tables(results: Results) -> None:
    for name, rows in results.items():
        task = TASKS[name]
        solved = '' if task.solved is None else f', solved from {task.solved:.2f} on'
        print(f'\n{name}: {task.iterations} iterations, chance {task.chance:.2f}{solved}\n')
        figures = list(next(iter(rows.values()))[0]['figures'])
        header = ('', 'solved', *(figure.replace('_', ' ') for figure in figures), 'least', 'most', 'parameters',
                  'CPU s')
        print(bench.format_table(header, [table_row(task, row, runs, figures) for row, runs in rows.items()]))


def table_row(task: Task, row: tuple[str, float], runs: Sequence[dict], figures: Sequence[str]) -> tuple[str, ...]:
    values = [run['figures'][figures[0]] for run in runs]
    solved = f'{sum(value >= task.solved for value in values)} of {len(runs)}' if task.solved else '-'
    return (row_name(*row), solved, *(bench.spread([run['figures'][name] for run in runs]) for name in figures),
            f'{min(values):.2f}', f'{max(values):.2f}', f'{runs[0]["parameters"]:,}',
            f'{statistics.median(run["seconds"] for run in runs):.0f}')


def plot(path: Path, results: Results) -> None:
    """Draw a plot for each task: a dot for each seed, their mean, the means of other figures, guessing and solving."""
    figure, axes = bench.new_figure(len(results))
    labels = {}
    for axis, (name, rows) in zip([axes] if len(results) == 1 else axes, results.items()):
        task = TASKS[name]
        axis.axvline(task.chance, color='grey', linestyle=':', label='guessing')
        if task.solved is not None:
            axis.axvline(task.solved, color='green', linestyle='--', label='solved')
        for y, runs in enumerate(rows.values()):
            values, *others = ([run['figures'][figure] for run in runs] for figure in runs[0]['figures'])
            axis.plot(values, [y] * len(runs), 'o', color='tab:blue', alpha=0.5, label='a seed')
            axis.plot(statistics.mean(values), y, '|', color='black', markersize=16, label='mean')
            for figure_name, other, marker in zip(list(runs[0]['figures'])[1:], others, '^vs'):
                axis.plot(statistics.mean(other), y, marker, color='tab:orange', markerfacecolor='none',
                          label=f'mean, {figure_name.replace("_", " ")}')
        axis.set_yticks(range(len(rows)), [row_name(*row) for row in rows])
        axis.invert_yaxis()
        axis.set(title=name, xlabel=next(iter(runs[0]['figures'])).replace('_', ' '), xlim=(0, 1.02))
        axis.grid(axis='x', alpha=0.3)
        labels.update(zip(*reversed(axis.get_legend_handles_labels())))
    figure.legend(labels.values(), labels, loc='outside lower center',
                  ncols=min(len(labels), 2 * len(results)))
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
        print_tables(results)
        if args.plot:
            plot(args.plot, results)


if __name__ == '__main__':
    main()
