"""Shared code of the benchmarks: interleaved timing, peak memory, rates of the machine, tables and plots.

It measures as follows:

- Time: all cases run in one process, one call of each in every round (A B C A B C …), so a slow or shared machine slows
  all of them alike. For the same reason, a ratio is the median of the rounds' ratios.
- Memory: the most bytes that the device's allocator had handed out during one call, above those before it. Inputs and
  weights are therefore not counted, and gradients are. On CUDA the caching allocator keeps that count. On a CPU torch's
  profiler records every allocation and release, including kernels' scratch space. That count is exact and the same for
  all code; the resident set of the process is not, because malloc keeps freed memory. Neither method sees memory that
  libraries allocate themselves, such as oneDNN's scratch space. The profiler keeps about 2 kB for each operator, so
  use ``--no-memory`` for calls of millions of them; the footer gives the process' own peak.
- Gradients go to inputs and parameters and are set to None after every call.
"""
from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ..ops.neural_memory.cpu import kernels as cpu_kernels

DTYPES = {name: getattr(torch, name) for name in ('float32', 'float64', 'bfloat16', 'float16')}
HALF = torch.bfloat16, torch.float16
MODES = ('forward', 'forward+backward')


class MissingPeer(Exception):
    """Raised if a peer's package is not installed; the message says how to install it."""


def import_peer(module: str) -> ModuleType:
    """Import a package with peers.

    Raises:
        MissingPeer: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPeer(f'{module} is not installed ({error}); pip install -r requirements/bench.txt') from error


# ---- command line


def add_common_arguments(parser: argparse.ArgumentParser, repeats: int) -> None:
    """Add the options of every benchmark."""
    parser.add_argument('--device', default='cpu', help="device: 'cpu', 'cuda' or 'cuda:N' (default: %(default)s)")
    parser.add_argument('--dtype', choices=list(DTYPES), default='float32',
                        help='data type; half precision runs float32 weights under autocast, as in training '
                        '(default: %(default)s)')
    parser.add_argument('--threads', type=int, metavar='N', help="number of CPU threads (default: torch's)")
    parser.add_argument('--compile', action='store_true', help='apply torch.compile to everything measured')
    parser.add_argument('--forward-only', action='store_true', help='skip forward+backward')
    parser.add_argument('--repeats', type=int, default=repeats, metavar='N',
                        help='number of rounds (default: %(default)s)')
    parser.add_argument('--warmup', type=int, default=1, metavar='N',
                        help='untimed warm-up calls (default: %(default)s)')
    parser.add_argument('--budget', type=float, default=120, metavar='SECONDS',
                        help='start no further round of a comparison after this time (default: %(default)s)')
    parser.add_argument('--memory', action=argparse.BooleanOptionalAction, default=True,
                        help='measure peak memory (default: yes)')
    parser.add_argument('--baseline', metavar='NAME', help='case that ratios are relative to (default: the first row)')
    parser.add_argument('--seed', type=int, default=0, help='seed of weights and inputs (default: %(default)s)')
    parser.add_argument('--json', metavar='FILE', help='write all measurements to FILE')
    parser.add_argument('--plot', metavar='FILE.png', help='plot time and memory')


def parse_device(name: str) -> torch.device:
    """Return the device called ``name``.

    Raises:
        ValueError: If it is neither a CPU nor a CUDA device of this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ('cpu', 'cuda'):
        raise ValueError(f"--device must be 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f'--device {name} is not there: this machine has {torch.cuda.device_count()} CUDA devices')
    return device


def check_at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """Raise a ValueError for the first option that is given and less than ``least``."""
    for name in names:
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f'--{name.replace("_", "-")} must be at least {least}, got {getattr(args, name)}')


def set_up(args: argparse.Namespace) -> torch.device:
    """Check the common options, seed, set the number of threads and return the device.

    Raises:
        ValueError: For the first option outside its range.
    """
    check_at_least(args, 1, 'repeats', 'threads')
    check_at_least(args, 0, 'warmup', 'budget')
    device = parse_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler's library logs to stderr
    return device


# ---- what is measured


def make_call(module: nn.Module, x: Tensor, mode: str, dtype: torch.dtype) -> Callable[[], None]:
    """Make a call of one forward pass without a graph, or of one forward and backward pass to parameters and input.

    With gradients the module is in training mode, which affects batch norms. It returns one or more tensors.
    """
    train = mode != 'forward'
    module.train(train)
    x = x.detach().requires_grad_(train)
    leaves = [*module.parameters(), x]
    cotangents: list[Tensor] = []

    def call() -> None:
        with torch.set_grad_enabled(train), autocast(x.device, dtype):
            outputs = module(x)
        if not train:
            return
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        if not cotangents:  # made in the first call, which is not timed
            cotangents.extend(torch.randn_like(output) for output in outputs)
        torch.autograd.backward(outputs, cotangents)
        for leaf in leaves:
            leaf.grad = None

    return call


def autocast(device: torch.device, dtype: torch.dtype):
    return torch.autocast(device.type, dtype=dtype) if dtype in HALF else nullcontext()


def weight_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of weights and inputs, given the dtype of the computation."""
    return torch.float32 if dtype in HALF else dtype


# ---- measuring


@dataclass
class Measurement:
    """Times of the rounds in seconds and peak memory of one call in bytes; None if not measured."""

    times: list[float] = field(default_factory=list)
    peak_memory: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def fastest(self) -> float:
        return min(self.times)

    @property
    def spread(self) -> float:
        """Return (slowest - fastest) / median."""
        return (max(self.times) - min(self.times)) / self.median

    def ratio(self, baseline: Measurement) -> float:
        """Return how many times as long as ``baseline`` this takes: the median of the rounds' ratios."""
        return statistics.median(a / b for a, b in zip(self.times, baseline.times))


class Progress:
    """Progress line on stderr: rewritten in a terminal, printed at most every ten seconds elsewhere."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.last = time.monotonic()

    def __call__(self, text: str) -> None:
        if self.terminal:
            print(f'\r\033[K{text}', end='', file=sys.stderr, flush=True)
        elif time.monotonic() - self.last >= 10:
            print(text, file=sys.stderr, flush=True)
            self.last = time.monotonic()

    def clear(self) -> None:
        if self.terminal:
            print('\r\033[K', end='', file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Print a line that is not overwritten."""
        self.clear()
        print(text, file=sys.stderr, flush=True)


def synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, until its last kernel has ended."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes allocated at once during ``call``, above those before it; see the module."""
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    # Use the raw events, because the profiler's own tables take minutes for long calls.
    events = [event for event in profile.kineto_results.events() if event.name() == '[memory]']
    events.sort(key=lambda event: event.start_ns())
    held = most = 0
    for event in events:
        held += event.nbytes()
        most = max(most, held)
    return most


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ('out of memory' in text or "can't allocate memory" in text))


def measure(calls: dict[str, Callable[[], object]], device: torch.device, *, repeats: int, warmup: int = 1,
            budget: float = math.inf, memory: bool = True, label: str = '', optional: Iterable[str] = (),
            progress: Progress | None = None) -> tuple[dict[str, Measurement], dict[str, str]]:
    """Run all calls side by side: warm-up and memory one after the other, then rounds of one call each.

    Args:
        calls (dict[str, Callable]): Name → call to measure.
        device (torch.device): Where the calls run.
        repeats (int): Rounds.
        warmup (int): Untimed calls of each before the rounds. Defaults to 1.
        budget (float): Seconds after which no further round starts; the first one always runs. Defaults to infinity.
        memory (bool): Whether to measure peak memory, by one more call of each. Defaults to True.
        label (str): Start of the progress line. Defaults to ''.
        optional (Iterable[str]): Calls that may fail for any reason; others may only run out of memory.
            Defaults to ().
        progress (Progress | None): Progress line. Defaults to a new one.

    Returns:
        tuple[dict[str, Measurement], dict[str, str]]: The measurements, and the reasons of the failures.
    """
    progress = progress or Progress()
    optional = set(optional)
    results: dict[str, Measurement] = {}
    failures: dict[str, str] = {}
    for name, call in calls.items():
        progress(f'{label}: warm-up of {name}')
        try:
            for _ in range(warmup):
                timed(call, device)
            results[name] = Measurement(peak_memory=peak_memory(call, device) if memory else None)
        except Exception as error:
            if is_out_of_memory(error):
                failures[name] = 'out of memory'
            elif name in optional:
                failures[name] = f'{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ""}'
            else:
                raise
            error = None  # its traceback holds the tensors
            gc.collect()
            if device.type == 'cuda':
                torch.cuda.empty_cache()
    started = time.monotonic()
    for done in range(repeats):
        elapsed = time.monotonic() - started
        if done:
            if elapsed * (done + 1) / done > budget:  # the next round would exceed the budget
                break
            progress(f'{label}: round {done + 1} of {repeats}, '
                     f'ETA {min(elapsed / done * (repeats - done), budget - elapsed):.0f} s')
        for name, result in results.items():
            result.times.append(timed(calls[name], device))
    progress.clear()
    return results, failures


class Benchmark:
    """One run of a benchmark: its options, and the cases it left out."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = set_up(args)
        self.dtype = DTYPES[args.dtype]
        self.modes = MODES[:1] if args.forward_only else MODES
        self.progress = Progress()
        self.skipped: list[dict] = []
        self.machine = describe_machine(self.device)

    def skip(self, name: str, reason: str, **where: object) -> None:
        """Note that a case is left out, on stderr and for the JSON."""
        self.skipped.append(dict(name=name, reason=reason, **where))
        at = ''.join(f', {value:,} tokens' if key == 'tokens' else f', {value}' for key, value in where.items())
        self.progress.note(f'left out {name}{at}: {reason}')

    def prepare(self, module: nn.Module) -> nn.Module:
        """Move ``module`` to the device and dtype, and compile it if asked."""
        module = module.to(self.device, weight_dtype(self.dtype))
        return torch.compile(module) if self.args.compile else module

    def random(self, *shape: int) -> Tensor:
        """Draw an input."""
        return torch.randn(shape, device=self.device, dtype=weight_dtype(self.dtype))

    def baseline_of(self, results: dict[str, Measurement]) -> str:
        """Return the case that ratios are relative to: the one asked for if it was measured, else the first."""
        return self.args.baseline if self.args.baseline in results else next(iter(results))

    def measure(self, calls: dict[str, Callable[[], object]], label: str, optional: Iterable[str] = (),
                **where: object) -> dict[str, Measurement]:
        """Measure all calls side by side; those that fail are left out."""
        args = self.args
        results, failures = measure(
            calls, self.device, repeats=args.repeats, warmup=args.warmup, budget=args.budget, memory=args.memory,
            label=label, optional=optional, progress=self.progress)
        for name, reason in failures.items():
            self.skip(name, reason, **where)
        return results

    def finish(self, benchmark: str, results: list[dict], **more: object) -> None:
        """Write the JSON, if one was asked for; end the program if nothing was measured."""
        if not results:
            sys.exit('error: nothing could be measured, see above')
        if self.args.json:
            write_json(self.args.json, dict(benchmark=benchmark, settings=vars(self.args), machine=self.machine,
                                            results=results, skipped=self.skipped, **more))


# ---- the machine


def describe_machine(device: torch.device) -> dict[str, object]:
    """Return what a reader needs to judge the figures."""
    cpu = platform.processor()
    info = Path('/proc/cpuinfo')
    if info.exists():
        models = [line.split(':', 1)[1].strip() for line in info.read_text().splitlines() if line.startswith('model n')]
        cpu = models[-1] if models else cpu
    machine = dict(cpu=cpu, cores=os.cpu_count(), threads=torch.get_num_threads(), python=platform.python_version(),
                   torch=torch.__version__, device=str(device))
    if device.type == 'cpu':
        machine['memory kernels'] = 'not compiled' if cpu_kernels is None else cpu_kernels.instruction_set()
    if device.type == 'cuda':
        machine.update(gpu=torch.cuda.get_device_name(device), cuda=torch.version.cuda)
    return machine


def available_memory(device: torch.device) -> float:
    """Return the bytes that can still be allocated, or infinity if the system does not report them."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    info = Path('/proc/meminfo')
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith('MemAvailable')), math.inf)


def process_peak_memory() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def gemm_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Measure FLOP/s: the best of twenty large square matrix products."""
    size = size or (8192 if device.type == 'cuda' else 1024)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(20))


def copy_rate(device: torch.device, nbytes: int = 2**28) -> float:
    """Measure bytes/s, read and written: the best of ten copies of ``nbytes``."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / min(timed(lambda: target.copy_(source), device) for _ in range(10))


def fit_slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Fit the exponent p of y ∝ x^p: the slope of log y over log x by least squares."""
    log_x, log_y = ([math.log(value) for value in values] for values in (xs, ys))
    return statistics.linear_regression(log_x, log_y).slope


# ---- reporting


def spread(values: Sequence[float]) -> str:
    """Format the mean and, for several values, the standard deviation."""
    mean = f'{statistics.mean(values):.2f}'
    return mean if len(values) == 1 else f'{mean} ± {statistics.stdev(values):.2f}'


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table with aligned columns, the first one to the left."""
    rows = [list(header), *(list(row) for row in rows)]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(header))]
    lines = [' | '.join(cell.rjust(width) if i else cell.ljust(width)
                        for i, (cell, width) in enumerate(zip(row, widths))) for row in rows]
    rule = ' | '.join(('-' * width if not i else '-' * (width - 1) + ':') for i, width in enumerate(widths))
    return '\n'.join(f'| {line} |' for line in (lines[0], rule, *lines[1:]))


def result_rows(results: dict[str, Measurement], baseline: str, **common) -> list[dict]:
    """Return one comparison for the JSON: a dict for each case, with ``common`` in all of them."""
    return [dict(name=name, **common, median_s=m.median, min_s=m.fastest, spread=m.spread, times_s=m.times,
                 baseline=baseline, ratio=m.ratio(results[baseline]), peak_memory_bytes=m.peak_memory)
            for name, m in results.items()]


def time_cells(row: dict) -> tuple[str, ...]:
    """Return the table's cells for median, fastest, spread, ratio and peak memory."""
    return (milliseconds(row['median_s']), milliseconds(row['min_s']), f'{row["spread"]:.0%}', f'{row["ratio"]:.2f}',
            mebibytes(row['peak_memory_bytes']))


def milliseconds(seconds: float) -> str:
    return f'{1e3 * seconds:.4g}' if seconds < 1 else f'{1e3 * seconds:.0f}'


def mebibytes(nbytes: float | None) -> str:
    return '' if nbytes is None else f'{nbytes / 2**20:.4g}' if nbytes < 2**30 else f'{nbytes / 2**20:.0f}'


def check_baseline(baseline: str | None, names: Sequence[str]) -> None:
    """Raise a ValueError if ``baseline`` is not among the cases to measure."""
    if baseline is not None and baseline not in names:
        raise ValueError(f'--baseline must be one of {list(names)}, got {baseline!r}')


def print_machine(machine: dict[str, object]) -> None:
    print(', '.join(f'{name} {value}' for name, value in machine.items()))


def write_json(path: str | Path, content: dict) -> None:
    Path(path).write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')


def new_figure(columns: int):
    """Return (figure, axes) for ``columns`` plots side by side, without a display."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    return plt.subplots(1, columns, figsize=(5.5 * columns, 4.5), layout='constrained')


def plot_bars(path: str | Path, panels: dict[str, dict[str, dict[str, float]]], title: str = '') -> None:
    """Plot panels side by side, with a bar for every case and a colour for each series.

    Args:
        path (str | Path): PNG to write.
        panels (dict[str, dict[str, dict[str, float]]]): Label of the panel → series → case → value.
        title (str): Title. Defaults to ''.
    """
    figure, _ = new_figure(len(panels))
    for axis, (label, series) in zip(figure.axes, panels.items()):
        names = list(dict.fromkeys(name for values in series.values() for name in values))
        height = 0.8 / len(series)
        for j, (of, values) in enumerate(series.items()):
            axis.barh([names.index(name) + j * height for name in values], list(values.values()), height, label=of)
        axis.set_yticks([i + 0.4 - height / 2 for i in range(len(names))], names)
        axis.invert_yaxis()
        axis.set_xlabel(label)
        axis.grid(axis='x', alpha=0.3)
    axis.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def time_and_memory(rows: Sequence[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the panels of :func:`plot_bars` for the rows of a comparison, a series for each mode."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        for label, value in (('median time (ms)', 1e3 * row['median_s']),
                             ('peak memory (MiB)', (row['peak_memory_bytes'] or 0) / 2**20)):
            panels.setdefault(label, {}).setdefault(row['mode'], {})[row['name']] = value
    return panels
