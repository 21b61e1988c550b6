#!/usr/bin/env python
r"""Show what a training step on several processes sends, and how efficiently it scales.

    tools/analysis/scaling.py configs/convneur_m3_300e_in1k.py    # bytes of a step
    tools/analysis/scaling.py CONFIG --step-time 0.35 --bandwidth 12    # expected efficiency on your GPUs
    tools/analysis/scaling.py CONFIG --measure    # prediction and measurement on CPU processes

Each process has the whole model and its own images. All-reduce averages the gradients in buckets during the backward
pass. In a ring of n processes each sends 2 (n - 1) / n times the bytes of all gradients.

--measure trains the config's backbone on random images in processes over gloo. It times the step alone, with all
processes working and nothing sent; the all-reduce alone; and both together in DistributedDataParallel. On CPUs gloo
needs the same cores as the backward pass, so the prediction is the sum of the first two.
"""
import argparse
import runpy
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / '_environment.py'))['prepare']()

import torch
import torch.distributed as dist
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from convneur_mm.analysis.bench import format_table, milliseconds, write_json
from convneur_mm.engine.files.errors import one_line_errors
from convneur_mm.engine.launch import add_config_arguments, config_of, without_sync_bn

# Bucket sizes of DistributedDataParallel, in bytes: the first bucket to become ready, and the others.
BUCKETS = (2 ** 20, 25 * 2 ** 20)
MIB = 2 ** 20


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument('--step-time', type=float, metavar='SECONDS',
                        help='step time of one GPU alone, "time" in its log')
    parser.add_argument('--bandwidth', type=float, metavar='GB/S', help='send bandwidth of each process: "busbw" of '
                        'nccl-tests\' all_reduce_perf')
    parser.add_argument('--measure', action='store_true', help='measure on CPU processes')
    parser.add_argument('--processes', nargs='+', type=int, metavar='N',
                        help='process counts (default: 2 4 8 16 32; with --measure: 1 2 4)')
    parser.add_argument('--batch', type=int, default=4, metavar='N', help='images per process (default: %(default)s)')
    parser.add_argument('--size', type=int, default=64, metavar='PIXELS',
                        help='side length of the images (default: %(default)s)')
    parser.add_argument('--threads', type=int, default=1, metavar='N',
                        help='threads per process (default: %(default)s)')
    parser.add_argument('--repeats', type=int, default=7, metavar='N', help='timed rounds (default: %(default)s)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all results to FILE')
    args = parser.parse_args(argv)
    if (args.step_time is None) != (args.bandwidth is None):
        parser.error('--step-time and --bandwidth go together')
    for name in ('step_time', 'bandwidth', 'batch', 'size', 'threads', 'repeats'):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f'--{name.replace("_", "-")} must be more than 0, got {getattr(args, name)}')
    if min(args.processes or [1]) < 1:
        parser.error(f'--processes must be 1 or more, got {min(args.processes)}')
    return args


def build(args: argparse.Namespace) -> nn.Module:
    """Build the config's model on the CPU, with random weights.

    Raises:
        ValueError: If the config has no model.
    """
    cfg = config_of(args)
    if not cfg.get('model'):
        raise ValueError(f'{args.config}: expected a model, got none')
    without_sync_bn(cfg.model)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        return MODELS.build(cfg.model)


class Volume(NamedTuple):
    """Data sent in a step.

    Attributes:
        parameters (int): Trained parameters.
        nbytes (int): Bytes of their gradients.
        buckets (list[int]): Bytes of each bucket, in the order in which they become ready.
    """

    parameters: int
    nbytes: int
    buckets: list[int]


def volume(model: nn.Module) -> Volume:
    """Return a model's gradient volume, without SyncBN's statistics, a few numbers for each channel."""
    trained = [p for p in model.parameters() if p.requires_grad]
    indices, _ = dist._compute_bucket_assignment_by_size(trained[::-1], list(BUCKETS))
    sizes = [p.numel() * p.element_size() for p in trained[::-1]]
    buckets = [sum(sizes[i] for i in bucket) for bucket in indices]
    return Volume(sum(p.numel() for p in trained), sum(sizes), buckets)


def sent(nbytes: int, processes: int) -> float:
    """Return the bytes that each process sends, and receives, in a ring all-reduce."""
    return 2 * (processes - 1) / processes * nbytes


class Efficiency(NamedTuple):
    """Images per second and process, relative to a single process.

    Attributes:
        hidden (float): With the all-reduce during the whole backward pass, two thirds of a step.
        exposed (float): With the all-reduce after the step.
    """

    hidden: float
    exposed: float


def efficiency(step_time: float, nbytes: int, bandwidth: float, processes: int) -> Efficiency:
    """Predict the efficiency for a step of ``step_time`` seconds and ``bandwidth`` bytes per second."""
    seconds = sent(nbytes, processes) / bandwidth
    return Efficiency(step_time / (step_time / 3 + max(step_time * 2 / 3, seconds)), step_time / (step_time + seconds))


# ---- measured


class Times(NamedTuple):
    """Seconds of a step's parts, medians over the rounds.

    Attributes:
        alone (float): Step with all processes working and nothing sent.
        reduce (float): All-reduce of the same number of bytes.
        step (float): Whole step.
    """

    alone: float
    reduce: float
    step: float

    @property
    def predicted(self) -> float:
        """Return the predicted time of the whole step."""
        return self.alone + self.reduce


def measure(backbone: nn.Module, processes: int, args: argparse.Namespace) -> Times:
    """Measure the times of ``processes`` forks of this process, which must not have started threads."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_run, (processes, backbone, args, folder), processes, start_method='fork')
        return Times(*torch.load(f'{folder}/times.pt').median(0).values.tolist())


def _run(rank: int, processes: int, backbone: nn.Module, args: argparse.Namespace, folder: str) -> None:
    dist.init_process_group('gloo', store=dist.FileStore(f'{folder}/store', processes), rank=rank,
                            world_size=processes)
    torch.set_num_threads(args.threads)
    model = DistributedDataParallel(backbone, broadcast_buffers=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    images = torch.rand(args.batch, 3, args.size, args.size)
    gradients = torch.zeros(sum(p.numel() for p in model.parameters() if p.requires_grad))

    def step() -> None:
        optimizer.zero_grad()
        features = model(images)
        sum(x.square().mean() for x in ([features] if isinstance(features, Tensor) else features)).backward()
        optimizer.step()

    def alone() -> None:
        with model.no_sync():
            step()

    def seconds(call: Callable[[], object]) -> float:
        dist.barrier()
        begun = time.perf_counter()
        call()
        dist.barrier()
        return time.perf_counter() - begun

    calls = alone, lambda: dist.all_reduce(gradients), step
    for _ in range(2):  # DistributedDataParallel rebuilds its buckets after the first
        for call in calls:
            call()
    rounds = [[seconds(call) for call in calls] for _ in range(args.repeats)]
    if rank == 0:
        torch.save(torch.tensor(rounds, dtype=torch.float64), f'{folder}/times.pt')
    dist.barrier()
    dist.destroy_process_group()


def bound(first: Times, times: Times) -> str:
    """Return 'cores' or 'all-reduce', the main cause of a longer step."""
    return 'cores' if times.alone - first.alone > times.reduce else 'all-reduce'


# ---- printed


def print_volume(name: str, of: Volume) -> None:
    print(f'{name}: {of.parameters / 1e6:.2f} M trained parameters, {of.nbytes / 1e6:.1f} MB of gradients a step in '
          f'{len(of.buckets)} bucket{"s" * (len(of.buckets) > 1)} ('
          f'{", ".join(f"{size / MIB:.1f}" for size in of.buckets)} MiB)')


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(1)  # this process is forked later
    model = build(args)
    whole = volume(model)
    result: dict[str, object] = dict(config=args.config, **whole._asdict())
    print_volume(args.config, whole)
    if args.step_time:
        result['expected'] = {n: efficiency(args.step_time, whole.nbytes, args.bandwidth * 1e9, n)._asdict()
                              for n in args.processes or (2, 4, 8, 16, 32)}
        print(f'Expected of a step of {args.step_time:g} s at {args.bandwidth:g} GB/s:')
        print(format_table(
            ('processes', 'MB sent by each', 'all-reduce ms', 'efficiency', 'if nothing is hidden'),
            [(str(n), f'{sent(whole.nbytes, n) / 1e6:.1f}',
              milliseconds(sent(whole.nbytes, n) / args.bandwidth / 1e9), f'{100 * row["hidden"]:.0f} %',
              f'{100 * row["exposed"]:.0f} %') for n, row in result['expected'].items()]))
    if args.measure:
        backbone = model.backbone.train()
        of_backbone = volume(backbone)
        print_volume('its backbone', of_backbone)
        times = {n: measure(backbone, n, args) for n in args.processes or (1, 2, 4)}
        first = times[min(times)]
        result['measured'] = {n: dict(row._asdict(), predicted=row.predicted) for n, row in times.items()}
        print(f'On CPUs: {args.batch} images of {args.size} x {args.size} and {args.threads} '
              f'thread{"s" * (args.threads > 1)} a process, median of {args.repeats} rounds:')
        print(format_table(
            ('processes', 'MB sent by each', 'step alone ms', 'all-reduce ms', 'predicted ms', 'measured ms',
             'efficiency', 'bound by'),
            [(str(n), f'{sent(of_backbone.nbytes, n) / 1e6:.1f}', milliseconds(row.alone), milliseconds(row.reduce),
              milliseconds(row.predicted), milliseconds(row.step), f'{100 * first.step / row.step:.0f} %',
              bound(first, row) if n > min(times) else '') for n, row in times.items()]))
    if args.json:
        write_json(args.json, result)


if __name__ == '__main__':
    with one_line_errors():
        main()
