#!/usr/bin/env python
r"""Measure time and memory of the neural memory layer beside its peers: one shape, or a sweep over the token count.

    # the layer and its peers, 4 x 3136 tokens of 128 channels
    tools/analysis/benchmark_memory.py
    # our own implementations only
    tools/analysis/benchmark_memory.py --backends auto reference --peers
    # 784 to 262,144 tokens, and the exponents of time and memory
    tools/analysis/benchmark_memory.py --sweep
    # four million tokens; the last line gives the peak memory of the process
    tools/analysis/benchmark_memory.py --tokens 4000000 --batch 1 --rules sequential --peers --forward-only \
        --no-memory --warmup 0 --repeats 1

Every layer maps tokens (B, N, Cm) to tokens (B, N, Cm), norm and projections included. Peers that are not installed
are skipped with a line that says how to install them.
"""
import argparse
import math
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / '_environment.py'))['prepare']()

import torch.nn.functional as F
from torch import Tensor, nn

from convneur_mm.analysis import bench
from convneur_mm.analysis.bench import MODES, Measurement, MissingPeer
from convneur_mm.engine.files.errors import one_line_errors
from convneur_mm.models import NeuralMemory
from convneur_mm.ops.neural_memory import BACKENDS, UPDATE_RULES, written_tokens

SWEEP = (784, 3136, 12544, 50176, 262144)


# ---- peers


class TitansMemory(nn.Module):
    """titans-pytorch's NeuralMemory with settings as close to ours as possible.

    Equal: width, heads, chunks, the memory ``z + GELU(z·W1)·W2`` of each head and its learned start, a mean squared
    error summed over the chunk, momentum and decay for each chunk, a bound on the write. With ``sequential`` the
    gradients of a chunk are taken at the memory before it (the library updates its weights every ``batch_size``
    tokens), otherwise all of them at the start.

    Differences that remain:

    - Its step is a linear map of each token, and its momentum and decay of each chunk's mean token, all for a whole
      head. Ours come from a two-layer MLP on the chunk's surprise, for every channel (16 Cm² multiply-accumulates per
      chunk and image).
    - It RMS-normalises queries and keys per head with a learned scale; ours are L2-normalised. It has an RMSNorm of the
      tokens for reading and another for writing; ours has one LayerNorm.
    - It bounds each weight matrix's gradient with a tanh; ours bounds a head's whole write with a square root.
    - It gates what it reads with a linear map of the token, reads each new memory one token before the chunk's end,
      writes the last chunk too, and recurs over chunks with an associative scan, in the dtype of its input.
    """

    def __init__(self, args: argparse.Namespace, sequential: bool) -> None:
        super().__init__()
        titans = bench.import_peer('titans_pytorch')

        class Residual(titans.MemoryMLP):
            """MemoryMLP with a residual; unlike the library's wrapper, and like ours, it has no norm."""

            def forward(self, x: Tensor) -> Tensor:
                return x + super().forward(x)

        self.memory = titans.NeuralMemory(
            dim=args.channels, heads=args.channels // args.head_dim, dim_head=args.head_dim,
            chunk_size=args.chunk_size, batch_size=args.chunk_size if sequential else None,
            model=Residual(args.head_dim, depth=2, expansion_factor=args.hidden_dim / args.head_dim),
            mem_model_norm_add_residual=False, momentum=True, qk_rmsnorm=True, max_grad_norm=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, Cm) to (B, N, Cm)."""
        return self.memory(x)[0]


class Attention(nn.Module):
    """Scaled dot-product attention among all tokens, by torch's fused kernels."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, Cm) to (B, N, Cm)."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class NonLocal(nn.Module):
    """Non-local block, embedded Gaussian with Cm/2 inner channels; its N × N weights are stored."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.theta = nn.Linear(channels, channels // 2)
        self.phi = nn.Linear(channels, channels // 2)
        self.g = nn.Linear(channels, channels // 2)
        self.proj = nn.Linear(channels // 2, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, Cm) to (B, N, Cm)."""
        x = self.norm(x)
        weights = (self.theta(x) @ self.phi(x).transpose(1, 2)).softmax(dim=-1)
        return self.proj(weights @ self.g(x))


PEERS: dict[str, Callable[[argparse.Namespace], nn.Module]] = {
    'titans-sequential': lambda args: TitansMemory(args, sequential=True),
    'titans-parallel': lambda args: TitansMemory(args, sequential=False),
    'attention': lambda args: Attention(args.channels, args.head_dim),
    'non-local': lambda args: NonLocal(args.channels),
}
QUADRATIC = ('attention', 'non-local')


# ---- the physical floor


def layer_flops(batch: int, tokens: int, channels: int, chunk_size: int = 196, hidden_dim: int = 8,
                backward: bool = False) -> int:
    """Return the FLOPs (twice the multiply-accumulates) of the neural memory layer's matrix products.

    Each token needs the query and output projections (2 Cm²) and the read (2 Cm·e). Each written token needs the key
    and value projections (2 Cm²) and the gradient (5 Cm·e: two products to the error, three back). Each written chunk
    needs the update generators (16 Cm²). The backward pass has two products for each one.
    """
    written = written_tokens(tokens, chunk_size)
    macs = (tokens * (2 * channels**2 + 2 * channels * hidden_dim)
            + written * (2 * channels**2 + 5 * channels * hidden_dim)
            + written // chunk_size * 16 * channels**2)
    return 2 * batch * macs * (3 if backward else 1)


def layer_bytes(batch: int, tokens: int, channels: int, num_parameters: int, itemsize: int = 4,
                backward: bool = False) -> int:
    """Return the bytes that any implementation must move over the memory bus.

    Forward: tokens in, tokens out, weights in. Backward: tokens and their gradient in, the other gradient out, weights
    in and their gradients out. Storing anything between two kernels moves more.
    """
    tensor = batch * tokens * channels
    return itemsize * (tensor * (5 if backward else 2) + num_parameters * (3 if backward else 1))


# ---- command line


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tokens', type=int, default=3136, metavar='N', help='number of tokens (default: %(default)s)')
    parser.add_argument('--sweep', type=int, nargs='*', metavar='N',
                        help=f'measure at each of these token counts (default: {" ".join(map(str, SWEEP))})')
    parser.add_argument('--batch', type=int, metavar='B', help='batch size (default: 4, or 1 with --sweep)')
    parser.add_argument('--channels', type=int, default=128, metavar='CM',
                        help='number of channels (default: %(default)s)')
    parser.add_argument('--chunk-size', type=int, default=196, metavar='L',
                        help='tokens per chunk (default: %(default)s)')
    parser.add_argument('--head-dim', type=int, default=16, metavar='D',
                        help='channels per head (default: %(default)s)')
    parser.add_argument('--hidden-dim', type=int, default=8, metavar='E',
                        help="hidden units in each head's memory (default: %(default)s)")
    parser.add_argument('--inner-step', type=float, default=1.0,
                        help='factor of the generated step (default: %(default)s)')
    parser.add_argument('--rules', nargs='+', choices=UPDATE_RULES, default=list(UPDATE_RULES),
                        help='our update rules to measure (default: all)')
    parser.add_argument('--backends', nargs='+', choices=['auto', *BACKENDS], default=['auto'],
                        help='our implementations to measure (default: auto)')
    parser.add_argument('--peers', nargs='*', choices=list(PEERS), default=list(PEERS),
                        help='peers to measure; --peers without names measures none (default: all)')
    parser.add_argument('--max-quadratic-tokens', type=int, default=65536, metavar='N',
                        help='skip attention and non-local above N tokens (default: %(default)s)')
    parser.add_argument('--max-seconds', type=float, default=60, metavar='SECONDS',
                        help='in a sweep, skip a case if one call is expected to take longer '
                        '(default: %(default)s)')
    bench.add_common_arguments(parser, repeats=10)
    args = parser.parse_args(argv)
    if args.sweep is not None:
        args.sweep = sorted(set(args.sweep or SWEEP))
    if args.batch is None:
        args.batch = 4 if args.sweep is None else 1
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raise a ValueError for the first number outside its range."""
    bench.check_at_least(args, 1, 'tokens', 'batch', 'channels', 'chunk_size', 'head_dim', 'hidden_dim')
    if args.sweep and args.sweep[0] < 1:
        raise ValueError(f'--sweep must be numbers of at least 1, got {args.sweep}')
    if args.channels % args.head_dim:
        raise ValueError(f'--channels must be a multiple of --head-dim, got {args.channels} and {args.head_dim}')


def case_names(args: argparse.Namespace) -> list[str]:
    ours = [f'memory-{rule}' + (f':{backend}' if backend != 'auto' else '')
            for backend in args.backends for rule in args.rules]
    return [*ours, *args.peers]


def build(name: str, args: argparse.Namespace) -> nn.Module:
    """Build the layer called ``name``, see :func:`case_names`."""
    if name in PEERS:
        return PEERS[name](args)
    rule, _, backend = name.removeprefix('memory-').partition(':')
    return NeuralMemory(args.channels, chunk_size=args.chunk_size, inner_step=args.inner_step, head_dim=args.head_dim,
                        hidden_dim=args.hidden_dim, update_rule=rule, backend=backend or 'auto')


# ---- runs


class Run(bench.Benchmark):
    """One run of the benchmark: its layers, and the rates of the machine."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        check_args(args)
        bench.check_baseline(args.baseline, case_names(args))
        self.layers: dict[str, nn.Module] = {}
        for name in case_names(args):
            try:
                self.layers[name] = self.prepare(build(name, args))
            except MissingPeer as missing:
                self.skip(name, str(missing))
        self.rates = dict(gemm_flops_per_s=bench.gemm_rate(self.device, self.dtype),
                          copy_bytes_per_s=bench.copy_rate(self.device))

    def measure_layers(self, tokens: int, mode: str, names: Sequence[str]) -> dict[str, Measurement]:
        """Measure the layers in ``names`` side by side on ``tokens`` tokens."""
        args, x, calls = self.args, self.random(self.args.batch, tokens, self.args.channels), {}
        for name in names:
            if name in QUADRATIC and tokens > args.max_quadratic_tokens:
                self.skip(name, f'more than --max-quadratic-tokens {args.max_quadratic_tokens}', tokens=tokens)
            else:
                calls[name] = bench.make_call(self.layers[name], x, mode, self.dtype)
        return self.measure(calls, f'{mode}, {tokens:,} tokens', PEERS, tokens=tokens, mode=mode)

    def floor(self, tokens: int, mode: str) -> dict[str, float]:
        """Return our layer's FLOPs and bytes, and the least time this machine needs for them."""
        args, backward = self.args, mode != 'forward'
        num_parameters = sum(p.numel() for p in build('memory-sequential', args).parameters())
        flops = layer_flops(args.batch, tokens, args.channels, args.chunk_size, args.hidden_dim, backward)
        nbytes = layer_bytes(args.batch, tokens, args.channels, num_parameters,
                             bench.weight_dtype(self.dtype).itemsize, backward)
        return dict(flops=flops, bytes=nbytes, seconds=max(flops / self.rates['gemm_flops_per_s'],
                                                           nbytes / self.rates['copy_bytes_per_s']))

    def report(self, tokens: int, mode: str, results: dict[str, Measurement]) -> list[dict]:
        """Print the table of one comparison and return its rows."""
        args, floor = self.args, self.floor(tokens, mode)
        baseline = self.baseline_of(results)
        rows = bench.result_rows(results, baseline, mode=mode, tokens=tokens)
        print(f'\n{mode}, {args.batch} x {tokens:,} tokens of {args.channels} channels, chunks of {args.chunk_size}; '
              f'{len(rows[0]["times_s"])} rounds')
        print(bench.format_table(('', 'median ms', 'min ms', 'spread', f'time / {baseline}', 'peak MiB'),
                                 [(row['name'], *bench.time_cells(row)) for row in rows]))
        ours = [m.median for name, m in results.items() if name not in PEERS]
        print(f'floor of the memory layer: {floor["flops"] / 1e9:.4g} GFLOP, {floor["bytes"] / 2**20:.4g} MiB, '
              f'{bench.milliseconds(floor["seconds"])} ms at the rates below'
              + (f'; our fastest takes {min(ours) / floor["seconds"]:.1f} times that' if ours else ''))
        return rows

    def compare(self) -> dict:
        """Compare all layers at one shape."""
        rows, floors = [], {}
        for mode in self.modes:
            results = self.measure_layers(self.args.tokens, mode, list(self.layers))
            if results:
                rows += self.report(self.args.tokens, mode, results)
            floors[mode] = self.floor(self.args.tokens, mode)
        if self.args.plot and rows:
            args = self.args
            bench.plot_bars(args.plot, bench.time_and_memory(rows), f'{args.batch} x {args.tokens:,} tokens of '
                            f'{args.channels} channels, chunks of {args.chunk_size}')
        return dict(results=rows, floor=floors)

    def sweep(self) -> dict:
        """Measure all layers at growing numbers of tokens, as far as they go."""
        rows, slopes = [], []
        for mode in self.modes:
            points: dict[str, dict[int, Measurement]] = {name: {} for name in self.layers}
            for tokens in self.args.sweep:
                names = [name for name in self.layers if self.fits(name, mode, points[name], tokens)]
                results = self.measure_layers(tokens, mode, names)
                for name, measurement in results.items():
                    points[name][tokens] = measurement
                if results:
                    rows += self.report(tokens, mode, results)
            slopes += self.report_slopes(mode, points)
        if self.args.plot:
            plot_sweep(self.args.plot, rows)
        return dict(results=rows, slopes=slopes)

    def fits(self, name: str, mode: str, points: dict[int, Measurement], tokens: int) -> bool:
        """Predict from smaller sizes whether a size fits; running out of memory cannot always be caught."""
        if not points:
            if tokens > self.args.sweep[0]:
                self.skip(name, 'did not run with fewer tokens', tokens=tokens, mode=mode)
            return tokens == self.args.sweep[0]
        seconds = extrapolate([(n, m.median) for n, m in points.items()], tokens)
        if seconds > self.args.max_seconds:
            self.skip(name, f'would take {seconds:.0f} s, over --max-seconds {self.args.max_seconds:g}', tokens=tokens,
                      mode=mode)
            return False
        nbytes = extrapolate([(n, m.peak_memory or 0) for n, m in points.items()], tokens)
        free = bench.available_memory(self.device)
        if nbytes > 0.9 * free:
            self.skip(name, f'would take {nbytes / 2**30:.1f} GiB, {free / 2**30:.1f} are free', tokens=tokens,
                      mode=mode)
            return False
        return True

    def report_slopes(self, mode: str, points: dict[str, dict[int, Measurement]]) -> list[dict]:
        """Print and return the exponents of time and memory over N, for cases with at least two sizes."""
        slopes = []
        for name, by_tokens in points.items():
            if len(by_tokens) < 2:
                continue
            memory = [m.peak_memory for m in by_tokens.values()]
            slopes.append(dict(name=name, mode=mode, tokens=list(by_tokens),
                               time=bench.fit_slope(list(by_tokens), [m.median for m in by_tokens.values()]),
                               memory=bench.fit_slope(list(by_tokens), memory) if all(memory) else None))
        print(f'\n{mode}: exponent of N by least squares (1 is linear, 2 quadratic)')
        print(bench.format_table(('', 'time', 'peak memory', 'from tokens', 'to'),
                           [(s['name'], f'{s["time"]:.3f}', '' if s['memory'] is None else f'{s["memory"]:.3f}',
                             f'{s["tokens"][0]:,}', f'{s["tokens"][-1]:,}') for s in slopes]))
        return slopes


def extrapolate(points: Sequence[tuple[int, float]], n: int) -> float:
    """Extrapolate to ``n`` by the last two points' power law, with at least linear growth."""
    last_n, last = points[-1]
    exponent = 1.0
    if len(points) > 1 and min(last, points[-2][1]) > 0:
        exponent = max(1.0, math.log(last / points[-2][1]) / math.log(last_n / points[-2][0]))
    return last * (n / last_n)**exponent


def plot_sweep(path: str, rows: Sequence[dict]) -> None:
    """Plot median time and peak memory over N on logarithmic axes; forward dashed, forward+backward solid."""
    figure, axes = bench.new_figure(2)
    names = list(dict.fromkeys(row['name'] for row in rows))
    for i, name in enumerate(names):
        for mode in MODES:
            of_case = [row for row in rows if row['name'] == name and row['mode'] == mode]
            for axis, key, scale in ((axes[0], 'median_s', 1), (axes[1], 'peak_memory_bytes', 2**-20)):
                axis.plot([row['tokens'] for row in of_case], [scale * (row[key] or math.nan) for row in of_case], 'o',
                          linestyle='-' if mode != 'forward' else '--', color=f'C{i}', markersize=3,
                          label=names[i] if mode == MODES[0] else None)
    for axis, label in zip(axes, ('median time (s)', 'peak memory (MiB)')):
        axis.set(xscale='log', yscale='log', xlabel='tokens', ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle('forward dashed, forward+backward solid')
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors():
        run = Run(args)
        bench.print_machine(run.machine)
        found = run.compare() if args.sweep is None else run.sweep()
    print(f'\nrates of this machine: {run.rates["gemm_flops_per_s"] / 1e9:.4g} GFLOP/s in one large {args.dtype} '
          f'matrix product, {run.rates["copy_bytes_per_s"] / 2**30:.4g} GiB/s in one large copy')
    print('largest resident set of the process' + (", the profiler's records included" if args.memory else '')
          + f': {bench.process_peak_memory() / 2**30:.2f} GiB')
    run.finish('memory', **found, rates=run.rates, process_peak_memory_bytes=bench.process_peak_memory())


if __name__ == '__main__':
    main()
