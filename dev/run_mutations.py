#!/usr/bin/env python
"""Change the package in one place at a time, and list the changes that no test notices.

    dev/run_mutations.py                                     ops, models, engine, checks of data and of the stack
    dev/run_mutations.py convneur_mm/stack.py                one file, or a folder
    dev/run_mutations.py --survivors convneur_mm/stack.py    after new tests: rerun what survived
    dev/run_mutations.py --sample 300                        300 of all changes, drawn at random

Needs requirements/mutation.txt. The changes (mutants) and the results file are cosmic-ray's; an interrupted run can be
continued. tests/README.md lists the kinds of changes and the tests that run.
"""
import argparse
import ast
import contextlib
import difflib
import gc
import hashlib
import importlib
import importlib.util
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / 'tools/_environment.py'))['prepare']()

if importlib.util.find_spec('cosmic_ray') is None:
    sys.exit('run_mutations: error: cosmic-ray is not installed: python -m pip install -r requirements/mutation.txt')

import parso  # noqa: F401  import before cosmic_ray, whose own import order fails
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkItem, WorkResult
from parso.python.tree import Keyword
from parso.tree import NodeOrLeaf

ROOT = Path(__file__).resolve().parents[1]
PATHS = ('convneur_mm/ops', 'convneur_mm/models', 'convneur_mm/engine', 'convneur_mm/datasets/check',
         'convneur_mm/stack.py')
# Tests besides those of the same name, which are tests/test_X/test_Y.py for convneur_mm/X/Y.py.
MORE_TESTS = {
    **{f'convneur_mm/ops/neural_memory/{name}.py': ['tests/test_models/test_neural_memory.py', *(
        f'tests/test_ops/test_{test}.py' for test in tests)] for name, tests in dict(
            cpu=('cpu', ), exported=('exported', ), memory=('memory', 'layer', 'op'), op=('op', ),
            operators=('memory', ), pytorch=('memory', 'op'), reference=('memory', 'op'), rule=('op', 'memory'),
            triton=('triton', ), triton_kernels=('triton', ), types=('memory', 'op')).items()},
    **{f'convneur_mm/engine/launch/{name}.py': [f'tests/test_engine/test_{test}.py' for test in ('launch', 'settings')]
       for name in ('command_line', 'config', 'entry', 'processes')},
    'convneur_mm/engine/runner/interrupts.py': ['tests/test_engine/test_hooks/test_sigterm.py'],
    'convneur_mm/engine/runner/loops.py': ['tests/test_engine/test_hooks/test_sigterm.py'],
    'convneur_mm/engine/runner/model_wrappers.py': ['tests/test_engine/test_hooks/test_start_summary.py'],
    'convneur_mm/engine/runner/quiet_console.py': ['tests/test_engine/test_checks/test_data_files.py',
                                                   'tests/test_engine/test_runner/test_written_config.py'],
    'convneur_mm/engine/hooks/start_summary.py': ['tests/test_engine/test_runner/test_quiet_console.py'],
    'convneur_mm/models/_mmengine.py': ['tests/test_timm.py'],
    **{f'convneur_mm/models/{name}.py': [f'tests/test_models/test_{test}.py'] for name, test in dict(
        blocks='stream', **{'overlock/blocks': 'overlock', 'overlock/head': 'overlock'}).items()},
    'convneur_mm/models/base.py': ['tests/test_models/test_convneur.py', 'tests/test_models/test_overlock.py'],
    'convneur_mm/datasets/check/coco.py': ['tests/test_datasets/test_check/test_images.py'],
    'convneur_mm/datasets/check/folders.py': ['tests/test_datasets/test_check/test_images.py'],
}
# Imported once, before the process forks for each mutant; not the package itself, nor what must be imported after it.
SLOW_IMPORTS = ('torch', 'torchvision', 'mmengine.runner', 'pycocotools.coco', 'timm', 'hypothesis.extra.numpy',
                'PIL.Image')
COPIED = ('convneur_mm', 'configs', 'tests', 'tools', 'experiments', 'dev', 'docs', 'requirements', 'setup.py',
          'pyproject.toml', 'README.md', 'LICENSE', 'model-index.yml')
# Plain asserts: nobody reads the compared values, and rewriting asserts takes half of a short run.
PYTEST_OPTIONS = ('-x', '-q', '--tb=line', '--assert=plain', '-p', 'no:cacheprovider', '-p', 'no:randomly',
                  '-p', 'no:xdist')


# ---- the changes


class RemoveKeyword(Operator):
    """Removal of a keyword argument from a call, so that an option is ignored."""

    @staticmethod
    def _found(node: NodeOrLeaf) -> list[int]:
        if node.type not in ('arglist', 'trailer'):
            return []
        return [i for i, child in enumerate(node.children)
                if child.type == 'argument' and len(child.children) == 3 and child.children[1].value == '=']

    def mutation_positions(self, node: NodeOrLeaf) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        # Return a list, because cosmic-ray changes the node while it iterates.
        return [(node.children[i].start_pos, node.children[i].end_pos) for i in self._found(node)]

    def mutate(self, node: NodeOrLeaf, index: int) -> NodeOrLeaf:
        i = self._found(node)[index]
        comma = node.type == 'arglist' and i + 1 < len(node.children)
        del node.children[i:i + 1 + comma]
        return node

    @classmethod
    def examples(cls) -> tuple:
        return ()


class RemoveCall(Operator):
    """Removal of a statement that is only a call, such as a check or the registration of a hook."""

    @staticmethod
    def _found(node: NodeOrLeaf) -> bool:
        return (node.type == 'atom_expr' and node.parent.type == 'simple_stmt' and node.children[-1].type == 'trailer'
                and node.children[-1].children[0].value == '(')

    def mutation_positions(self, node: NodeOrLeaf) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        return [(node.start_pos, node.end_pos)] if self._found(node) else []

    def mutate(self, node: NodeOrLeaf, index: int) -> NodeOrLeaf:
        first = node.get_first_leaf()
        return Keyword('pass', first.start_pos, first.prefix)

    @classmethod
    def examples(cls) -> tuple:
        return ()


# Use one or two replacements of each operator. Most others of cosmic-ray's, such as >> for +, raise a TypeError, which
# any test notices.
OPERATORS: dict[str, Operator] = {name: get_operator(f'core/{name}')() for name in (
    *(f'ReplaceBinaryOperator_{pair}' for pair in (
        'Add_Sub', 'Sub_Add', 'Mul_Div', 'Div_Mul', 'FloorDiv_Mul', 'Mod_Mul', 'BitOr_BitAnd', 'BitAnd_BitOr',
        'BitXor_BitOr', 'LShift_RShift', 'RShift_LShift')),
    *(f'ReplaceComparisonOperator_{pair}' for pair in (
        'Eq_NotEq', 'NotEq_Eq', 'Lt_LtE', 'Lt_GtE', 'LtE_Lt', 'LtE_Gt', 'Gt_GtE', 'Gt_LtE', 'GtE_Gt', 'GtE_Lt',
        'Is_IsNot', 'IsNot_Is')),
    'ReplaceUnaryOperator_Delete_Not', 'ReplaceUnaryOperator_USub_UAdd', 'AddNot', 'ReplaceAndWithOr',
    'ReplaceOrWithAnd', 'ReplaceTrueWithFalse', 'ReplaceFalseWithTrue', 'ReplaceContinueWithBreak',
    'ReplaceBreakWithContinue', 'NumberReplacer', 'ZeroIterationForLoop', 'RemoveDecorator')}
OPERATORS.update(RemoveKeyword=RemoveKeyword(), RemoveCall=RemoveCall())


@dataclass(frozen=True)
class Mutant:
    """Change at the ``occurrence``-th place where the operator applies in the module ``path``."""

    path: str
    operator: str
    occurrence: int
    start: tuple[int, int]
    end: tuple[int, int]
    key: str

    def code(self, source: str) -> str:
        return mutate_code(source, OPERATORS[self.operator], self.occurrence)


def mutants_of(path: str) -> list[Mutant]:
    """Return all changes of a module except those that no test could notice.

    It excludes changes in annotations, which ``from __future__ import annotations`` leaves unevaluated; in f-strings,
    which are message texts; and in lines with ``# pragma: no mutate``.
    """
    source = (ROOT / path).read_text()
    tree = ast.parse(source)
    annotations = [a for node in ast.walk(tree) for a in (getattr(node, 'annotation', None),
                                                          getattr(node, 'returns', None)) if a is not None]
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    spans = [((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
             for node in [*annotations, *texts]]
    lines = source.splitlines()
    found = []
    nodes = list(ast_nodes(get_ast(source)))
    for name, operator in OPERATORS.items():
        positions = [position for node in nodes for position in operator.mutation_positions(node)]
        for occurrence, (start, end) in enumerate(positions):
            if any(low <= start and end <= high for low, high in spans):
                continue
            if '# pragma: no mutate' in lines[start[0] - 1]:
                continue
            key = hashlib.sha256(f'{path} {name} {occurrence} {source}'.encode()).hexdigest()
            found.append(Mutant(path, name, occurrence, start, end, key))
    return sorted(found, key=lambda mutant: mutant.start)


def modules_under(paths: Sequence[str]) -> list[str]:
    """Return the modules of files and folders, relative to the checkout."""
    modules = []
    for path in paths:
        full = (ROOT / path).resolve()
        if not full.exists() or not full.is_relative_to(ROOT / 'convneur_mm'):
            raise SystemExit(f'run_mutations: error: {path} is no file or folder of {ROOT / "convneur_mm"}')
        files = sorted(full.rglob('*.py')) if full.is_dir() else [full]
        modules += [file.relative_to(ROOT).as_posix() for file in files if file.name != '__init__.py']
    return modules


def tests_of(module: str) -> list[str]:
    """Return the files with the tests of a module."""
    *folders, name = module.split('/')[1:]
    mirror = '/'.join(['tests', *(f'test_{folder}' for folder in folders), f'test_{name}'])
    files = [file for file in (mirror, *MORE_TESTS.get(module, ())) if (ROOT / file).exists()]
    if not files:
        raise SystemExit(f'run_mutations: error: {module} has no tests: neither {mirror} nor an entry in MORE_TESTS')
    return files


# ---- a process for each


class Fastest:
    """Pytest plugin that logs the seconds of each test, and runs the fastest first."""

    def __init__(self, seconds: dict[str, float], log: Path | None = None) -> None:
        self.seconds = seconds
        self.log = log

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self.seconds.get(item.nodeid, 0))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.log is not None and report.when == 'call':
            with self.log.open('a') as file:
                file.write(f'{report.duration} {report.nodeid}\n')


@dataclass
class Run:
    """Process that runs tests in a copy of the checkout."""

    folder: Path
    started: float
    pid: int
    mutant: Mutant | None = None
    diff: str = ''


@dataclass
class Module:
    """Module under test: its tests, the seconds each took, and the time limit of a run."""

    path: str
    tests: list[str]
    seconds: dict[str, float] = field(default_factory=dict)
    limit: float = 600.0


def start(module: Module, folder: Path, log: Path | None = None) -> Run:
    """Fork a process that runs the module's tests in a copy of the checkout."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Run(folder, time.monotonic(), pid)
    code = 3
    try:
        os.setsid()  # stop() kills this process group
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with open(os.devnull) as null, open(folder.with_suffix('.log'), 'w') as output:
            os.dup2(null.fileno(), 0)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.chdir(folder)
        sys.path[0] = str(folder)
        sys.dont_write_bytecode = True
        os.environ.update(PYTHONPATH=str(folder), PYTHON=sys.executable, PYTHONDONTWRITEBYTECODE='1')
        code = int(pytest.main([*PYTEST_OPTIONS, f'--rootdir={folder}', *module.tests],
                               plugins=[Fastest(module.seconds, log)]))
    finally:
        os._exit(code)


def wait(runs: list[Run], module: Module) -> tuple[Run, int | None]:
    """Return the first process to end, and its exit code; None if it exceeded the limit."""
    while True:
        for run in runs:
            pid, status = os.waitpid(run.pid, os.WNOHANG)
            if pid:
                stop(run)
                return run, os.waitstatus_to_exitcode(status)
            if time.monotonic() - run.started > module.limit:
                stop(run)
                os.waitpid(run.pid, 0)
                return run, None
        time.sleep(0.02)


def stop(run: Run) -> None:
    """Kill the process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)


def run_mutants(module: Module, mutants: Sequence[Mutant], folders: Sequence[Path], database: WorkDB) -> None:
    """Run the tests on each mutant, with one process per folder, and store the results."""
    source = (ROOT / module.path).read_text()
    if not {mutant.key for mutant in mutants} <= {mutant.key for mutant in mutants_of(module.path)}:
        raise SystemExit(f'run_mutations: error: {module.path} was edited meanwhile; the same command goes on')
    waiting, idle, runs = list(reversed(mutants)), list(folders), []
    try:
        while waiting or runs:
            while waiting and idle:
                mutant, folder = waiting.pop(), idle.pop()
                code = mutant.code(source)
                (folder / module.path).write_text(code)
                run = start(module, folder)
                run.mutant = mutant
                run.diff = '\n'.join(difflib.unified_diff(
                    source.splitlines(), code.splitlines(), module.path, mutant.operator, n=0, lineterm=''))
                runs.append(run)
            run, code = wait(runs, module)
            runs.remove(run)
            idle.append(run.folder)
            outcome = TestOutcome.SURVIVED if code == 0 else TestOutcome.KILLED
            keep(database, run.mutant, WorkResult(
                WorkerOutcome.ABNORMAL if code is None else WorkerOutcome.NORMAL,
                'timeout' if code is None else f'exit code {code}', outcome, run.diff))
            print('T' if code is None else '.' if code else 'S', end='', flush=True)
    finally:
        for run in runs:
            stop(run)
            os.waitpid(run.pid, 0)
        for folder in folders:
            (folder / module.path).write_text(source)
    print()


def keep(database: WorkDB, mutant: Mutant, result: WorkResult) -> None:
    if not any(mutant.key == job for job in known(database)):
        database.add_work_item(WorkItem.single(mutant.key, MutationSpec(
            ROOT / mutant.path, mutant.operator, mutant.occurrence, mutant.start, mutant.end)))
    database.set_result(mutant.key, result)


def known(database: WorkDB) -> set[str]:
    return {job for job, _ in database.results}


def measure(module: Module, folder: Path) -> None:
    """Run the tests on the unchanged module, twice; their times set the order and the limit.

    They must pass in both orders: a test that fails in the second would seem to notice every mutant.
    """
    log = folder.with_suffix('.seconds')
    for order in ('as they stand', 'the fastest first'):
        log.unlink(missing_ok=True)
        run, code = wait([start(module, folder, log)], module)
        if code != 0:
            output = folder.with_suffix('.log').read_text().strip().splitlines()[-15:]
            raise SystemExit('\n'.join([*output, f'run_mutations: error: {" ".join(module.tests)}, {order}, do not '
                                        f'pass on {module.path} as it is (exit code {code})']))
        for line in log.read_text().splitlines():
            seconds, test = line.split(' ', 1)
            module.seconds[test] = float(seconds)
    module.limit = 20 + 5 * (time.monotonic() - run.started)


# ---- the whole


def report(modules: Sequence[str], database: WorkDB, diffs: bool) -> None:
    results = dict(database.results)
    rows, survivors = [], []
    for path in modules:
        mutants = mutants_of(path)
        counts = Counter('left' if mutant.key not in results else 'timeouts' if
                         results[mutant.key].output == 'timeout' else results[mutant.key].test_outcome.value
                         for mutant in mutants)
        rows.append((path, len(mutants), *(counts[kind] for kind in ('killed', 'timeouts', 'survived', 'left'))))
        survivors += [results[mutant.key].diff for mutant in mutants if mutant.key in results and
                      results[mutant.key].test_outcome == TestOutcome.SURVIVED]
    rows.append(('all', *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    if diffs:
        print('\n\n'.join(['', *survivors, '']))
    print(f'{"":44}{"mutants":>9}{"killed":>9}{"timeouts":>9}{"survived":>9}{"not run":>9}{"noticed":>9}')
    for path, total, killed, timeouts, survived, left in rows:
        done = killed + timeouts + survived
        share = f'{(killed + timeouts) / done:.1%}' if done else ''
        print(f'{path:44}{total:9}{killed:9}{timeouts:9}{survived:9}{left:9}{share:>9}')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('paths', nargs='*', default=list(PATHS), metavar='PATH', help='files or folders to mutate')
    parser.add_argument('--session', type=Path, default=ROOT / 'work_dirs' / 'mutations.sqlite', metavar='FILE',
                        help='file that stores the results (default: work_dirs/mutations.sqlite)')
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), metavar='N',
                        help='number of parallel processes (default: one per core)')
    parser.add_argument('--sample', type=int, metavar='N',
                        help='run N mutants sampled from all paths, the same ones each time')
    parser.add_argument('--survivors', action='store_true', help='rerun the mutants that survived')
    parser.add_argument('--report', action='store_true', help='only print the stored results')
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f'--jobs must be 1 or more, got {args.jobs}')
    if args.sample is not None and args.sample < 1:
        parser.error(f'--sample must be 1 or more, got {args.sample}')
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    modules = modules_under(args.paths)
    args.session.parent.mkdir(parents=True, exist_ok=True)
    database = WorkDB(args.session, WorkDB.Mode.create)
    try:
        if not args.report:
            run_all(modules, args, database)
    except KeyboardInterrupt:
        print('\ninterrupted; the same command goes on from here')
        return 130
    report(modules, database, diffs=True)
    return 0


def run_all(modules: Sequence[str], args: argparse.Namespace, database: WorkDB) -> None:
    os.environ['OMP_NUM_THREADS'] = '1'
    for name in SLOW_IMPORTS:
        if importlib.util.find_spec(name.partition('.')[0]):
            importlib.import_module(name)
    if 'convneur_mm' in sys.modules:
        raise SystemExit('run_mutations: error: convneur_mm was imported before its mutants')
    gc.freeze()  # otherwise the children's collector would copy every page
    with tempfile.TemporaryDirectory(prefix='mutations') as scratch:
        folders = [Path(scratch, f'copy{i}') for i in range(args.jobs)]
        for folder in folders:
            for name in COPIED:
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                folder.mkdir(exist_ok=True)
                copy(ROOT / name, folder / name)
        chosen = [mutant for path in modules for mutant in mutants_of(path)]
        if args.sample is not None:
            chosen = random.Random(0).sample(chosen, min(args.sample, len(chosen)))
        for path in modules:
            results = dict(database.results)
            mutants = [mutant for mutant in chosen if mutant.path == path and (mutant.key not in results or (
                args.survivors and results[mutant.key].test_outcome == TestOutcome.SURVIVED))]
            if not mutants:
                continue
            module = Module(path, tests_of(path))
            measure(module, folders[0])
            print(f'{path}: {len(mutants)} mutants, tests take {(module.limit - 20) / 5:.0f} s', flush=True)
            started = time.monotonic()
            run_mutants(module, mutants, folders, database)
            print(f'{(time.monotonic() - started) / 60:.1f} min', flush=True)


if __name__ == '__main__':
    sys.exit(main())
