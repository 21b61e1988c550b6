#!/usr/bin/env python
"""Check the memory's kernels on this machine's GPU, and say which backend to set.

    tools/analysis/check_gpu.py
    # test the check itself without a GPU: Triton's kernels in its interpreter, a few tokens of each task
    TRITON_INTERPRET=1 tools/analysis/check_gpu.py --device cpu --tokens 40

At the shapes of the four tasks it prints how many programs of a kernel work on a written chunk at once, next to the
GPU's number of multiprocessors. It compares the layer's output and gradients by each set of operators with the float64
reference, captures forward and backward in a CUDA graph, and times both. The last line says what to set. The exit code
is 1 if a set of operators is wrong.
"""
import argparse
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / '_environment.py'))['prepare']()

import torch

from convneur_mm.analysis import bench
from convneur_mm.analysis.agreement import TOLERANCE, largest_error, results
from convneur_mm.engine.files.errors import one_line_errors
from convneur_mm.models import NeuralMemory
from convneur_mm.ops.neural_memory import triton

# For each task: images per GPU, tokens of stage 1, and the memory's settings, as in the configs.
TASKS = {
    'classification, 224 x 224': dict(batch=64, tokens=56 * 56, chunk_size=196, inner_step=1.0),
    'detection, 800 x 1216': dict(batch=2, tokens=200 * 304, chunk_size=4096, inner_step=1e-3),
    'Semantic FPN, 512 x 512': dict(batch=8, tokens=128 * 128, chunk_size=196, inner_step=1.0),
    'UperNet, 512 x 512': dict(batch=4, tokens=128 * 128, chunk_size=196, inner_step=1.0),
}
BACKENDS = ('torch', 'triton')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='cuda', help="device: 'cuda', 'cuda:N' or 'cpu' (default: %(default)s)")
    parser.add_argument('--tokens', type=int, metavar='N', help='use one image of N tokens and 16 channels, in '
                        'chunks of N / 3 tokens, instead of the sizes of the tasks')
    parser.add_argument('--repeats', type=int, default=20, metavar='N', help='timed rounds (default: %(default)s)')
    return parser.parse_args(argv)


def captured(call: Callable[[], object]) -> str:
    """Capture a call in a CUDA graph; return 'captured', or why it failed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            call()
    except RuntimeError as error:
        return f'not captured: {str(error).splitlines()[0]}'
    return 'captured'


def programs_of_a_chunk(task: dict, heads: int, device: torch.device) -> int:
    """Return how many programs of Triton's surprise kernel work on a chunk of all images and heads."""
    return triton.grid_of(task['batch'] * heads, task['chunk_size'], task['chunk_size'], 16, device)[0]


def check(name: str, task: dict, device: torch.device, repeats: int) -> dict[str, tuple[float, float]]:
    """Print a line for each backend; return its error and seconds of forward and backward."""
    torch.manual_seed(0)
    channels = task.get('channels', 128)
    layer = NeuralMemory(channels, chunk_size=task['chunk_size'], inner_step=task['inner_step']).to(device)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.05 * torch.randn_like(p)
    x, weight = (torch.randn(task['batch'], task['tokens'], channels, device=device) for _ in range(2))
    errors, calls = {}, {}
    # Images are independent, so the first two are enough.
    double = NeuralMemory(channels, chunk_size=task['chunk_size'], inner_step=task['inner_step'], backend='reference')
    double.load_state_dict(layer.state_dict())
    expected = results(double.to(device).double(), x[:2].double(), weight[:2].double())
    programs = programs_of_a_chunk(task, layer.num_heads, device)
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1
    print(f'{name}: {programs} programs work on a written chunk of {task["chunk_size"]} tokens, on {units} '
          'multiprocessors', flush=True)
    for backend in BACKENDS:
        layer.backend = backend
        errors[backend] = largest_error(results(layer, x[:2], weight[:2]), expected)
        calls[backend] = bench.make_call(layer, x, 'forward+backward', torch.float32)
    seconds = {backend: [] for backend in BACKENDS}
    for _ in range(repeats + 1):
        for backend in BACKENDS:
            layer.backend = backend
            seconds[backend].append(bench.timed(calls[backend], device))
    found = {}
    for backend in BACKENDS:
        layer.backend = backend
        found[backend] = errors[backend], median(seconds[backend][1:] or seconds[backend])
        graph = f'; CUDA graph {captured(calls[backend])}' if device.type == 'cuda' else ''
        verdict = 'right' if errors[backend] <= TOLERANCE else f'WRONG, more than {TOLERANCE:g}'
        print(f'{name}, {task["batch"]} images of {task["tokens"]} tokens, chunks of {task["chunk_size"]}: {backend:8s}'
              f'{1e3 * found[backend][1]:9.2f} ms forward and backward, error {errors[backend]:.1e} ({verdict}){graph}',
              flush=True)
    return found


def advice(found: dict[str, dict[str, tuple[float, float]]], device: torch.device) -> str:
    """Return the closing line: which backend to set for which task."""
    wrong = [f'{backend} ({task})' for task, of in found.items() for backend, (error, _) in of.items()
             if error > TOLERANCE]
    if wrong:
        return f'Do not train with {", ".join(wrong)}: please report the lines above.'
    if device.type == 'cpu':
        return "Both sets of operators are right; times of Triton's interpreter say nothing of a GPU."
    faster = [task for task, of in found.items() if of['triton'][1] < of['torch'][1]]
    if not faster:
        return "Leave memory_cfg.backend as it is: 'torch' is the faster one for every task on this GPU."
    if len(faster) == len(found):
        return "Set memory_cfg=dict(backend='triton') or CONVNEUR_MEMORY_BACKEND=triton: the faster one for every task."
    return f"Set memory_cfg=dict(backend='triton') for {'; '.join(faster)}, and leave it as it is for the others."


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    device = bench.parse_device(args.device)
    if not triton.is_available(torch.empty(0, device=device)):
        raise ValueError(f'no Triton that runs kernels on {device} (on a CPU: with TRITON_INTERPRET=1)')
    bench.print_machine(bench.describe_machine(device))
    found = {}
    for name, task in TASKS.items():
        if args.tokens:
            task = dict(task, batch=1, tokens=args.tokens, chunk_size=max(1, args.tokens // 3), channels=16)
        found[name] = check(name, task, device, args.repeats)
    print(advice(found, device))
    return int(any(error > TOLERANCE for of in found.values() for error, _ in of.values()))


if __name__ == '__main__':
    with one_line_errors():
        sys.exit(main())
