#!/usr/bin/env python
"""Check whether this environment can train and predict: a line for each part, with the remedy if it is not fit.

    tools/doctor.py

The exit code is 1 if a part is broken. A missing part, such as a GPU or a data set, is only a note. Data sets are
searched below the current folder, as the configs do.
"""
import argparse
import os
import platform
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

if __name__ == '__main__':
    from _environment import prepare
    prepare()

OK, NOTE, BROKEN = 'ok', 'note', 'broken'

# Files that the configs read, by data folder.
DATA = {
    'data/coco': ('annotations/instances_train2017.json', 'annotations/instances_val2017.json', 'train2017', 'val2017'),
    'data/ade/ADEChallengeData2016': ('images/training', 'images/validation', 'annotations/training',
                                      'annotations/validation'),
    'data/imagenet': ('train', 'val'),
}


class Finding(NamedTuple):
    """Result of checking one part of the environment.

    Attributes:
        state (str): OK, NOTE or BROKEN.
        text (str): The part and, unless it is ok, the problem and the remedy.
    """

    state: str
    text: str


def findings() -> Iterator[Finding]:
    """Check the parts one after another."""
    yield Finding(OK, f'Python {platform.python_version()}, {sys.executable}')
    try:
        # The import fails without the models' requirements.
        import convneur_mm
    except ImportError as error:
        yield Finding(BROKEN, f'packages: {error}')
        return
    yield Finding(OK, f'convneur_mm {convneur_mm.__version__}, configs in {convneur_mm.paths.config_root()}')
    yield from packages()
    yield from gpus()
    yield from memory()
    yield from data()


def packages() -> Iterator[Finding]:
    from convneur_mm.stack import StackError, installed_versions, require, uses_compiled_mmcv
    versions = installed_versions()
    yield Finding(OK, ', '.join(f'{name} {versions[name]}' for name in sorted(versions)))
    try:
        if find_spec('mmcv'):
            yield Finding(OK, 'mmcv\'s operators: its own, compiled' if uses_compiled_mmcv() else
                          'mmcv\'s operators: torchvision\'s in their place, as mmcv was not compiled')
    except StackError as error:
        yield Finding(BROKEN, str(error))
    for name in ('mmdet.models', 'mmseg.models', 'mmpretrain.models'):
        package = name.partition('.')[0]
        try:
            require(name)
        except StackError as error:
            yield Finding(BROKEN if find_spec(package) else NOTE, f'{package}: {error}')
        else:
            yield Finding(OK, f'{package} imports')


def gpus() -> Iterator[Finding]:
    import torch

    from convneur_mm.engine.launch import why_no_gpu
    from convneur_mm.stack import StackError, check_cuda_operators
    if not torch.cuda.is_available():
        yield Finding(NOTE, f'no GPU, {why_no_gpu()}: all runs on the CPU. If the machine has one, it needs NVIDIA\'s '
                      'driver and a torch built for CUDA, as tools/setup_env.sh installs')
        return
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Finding(OK, f'{len(names)} GPU{"s" * (len(names) > 1)} ({", ".join(names)}), CUDA {torch.version.cuda}')
    try:
        if find_spec('mmcv'):
            check_cuda_operators()
            yield Finding(OK, 'mmcv\'s operators are there for GPUs')
    except StackError as error:
        yield Finding(BROKEN, str(error))


def memory() -> Iterator[Finding]:
    """Name the backend of the neural memory and its reason, and compare it with the reference equations."""
    import torch

    from convneur_mm.ops.neural_memory import cpu
    from convneur_mm.ops.neural_memory.op import resolve_backend
    if cpu.missing:
        yield Finding(NOTE, 'neural memory: PyTorch\'s operators on a CPU, which are slower than its compiled kernels: '
                      f'{cpu.missing}. With a C++ compiler, install again by pip install --no-build-isolation CHECKOUT')
    else:
        yield Finding(OK, f'neural memory: compiled kernels on a CPU, instructions {cpu.kernels.instruction_set()}')
    asked = os.environ.get('CONVNEUR_MEMORY_BACKEND', 'auto')
    why = 'the default' if asked == 'auto' else 'by CONVNEUR_MEMORY_BACKEND'
    for device in ('cpu', *(['cuda'] if torch.cuda.is_available() else [])):
        try:
            backends = {resolve_backend('auto'): why}
            if device == 'cuda' and find_spec('triton'):
                backends.setdefault('triton', 'if asked for; tools/analysis/check_gpu.py says which is faster')
        except ValueError as error:
            yield Finding(BROKEN, f'neural memory on {device}: {error}')
            continue
        yield from (check_backend(backend, why, device) for backend, why in backends.items())


def check_backend(backend: str, why: str, device: str) -> Finding:
    """Compare a memory's output and gradients with the float64 reference, which takes milliseconds.

    Args:
        backend (str): 'auto', 'torch', 'cpp', 'triton' or 'reference'.
        why (str): Reason for this backend.
        device (str): 'cpu' or 'cuda'.
    """
    import torch

    from convneur_mm.analysis.agreement import TOLERANCE, largest_error, results
    from convneur_mm.models import NeuralMemory
    torch.manual_seed(0)
    layer = NeuralMemory(32, backend=backend).to(device)
    reference = NeuralMemory(32, backend='reference').to(device).double()
    reference.load_state_dict(layer.state_dict())
    tokens, weight = (torch.randn(2, 400, 32, device=device) for _ in range(2))
    name = f'neural memory on {device}: backend {backend} ({why})'
    try:
        error = largest_error(results(layer, tokens, weight), results(reference, tokens.double(), weight.double()))
    except (ValueError, RuntimeError) as failure:
        problem = ' '.join(str(failure).split())
    else:
        if error <= TOLERANCE:
            return Finding(OK, f'{name} agrees with the reference to {error:.0e}')
        problem = f'differs from the reference by {error:.0e}'
    return Finding(BROKEN, f'{name}: {problem}; tools/analysis/check_gpu.py tries each backend, and '
                   f'CONVNEUR_MEMORY_BACKEND={"reference" if backend == "torch" else "torch"} sets another')


def data() -> Iterator[Finding]:
    """Report which data sets are where the configs look for them."""
    for folder, parts in DATA.items():
        lacking = [part for part in parts if not _has_content(Path(folder, part))]
        if not lacking:
            yield Finding(OK, f'data: {folder} has all that the configs name')
        elif not Path(folder).is_dir():
            yield Finding(NOTE, f'data: no {folder} here; put or link it here, or set data_root in the config')
        else:
            yield Finding(NOTE, f'data: {folder} lacks {len(lacking)} of {len(parts)}, or they are empty: '
                          f'{", ".join(lacking)}; add them, or set data_root in the config')


def _has_content(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.is_file() and path.stat().st_size > 0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    broken = False
    for finding in findings():
        print(f'{finding.state:6}  {finding.text}', flush=True)
        broken = broken or finding.state == BROKEN
    sys.exit(int(broken))


if __name__ == '__main__':
    main()
