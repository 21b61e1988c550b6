#!/usr/bin/env python
"""Says whether this environment is fit to train and to predict: a line for each part, with the remedy if it is not.

    tools/doctor.py

The exit code is 1 if a part is broken. What is merely not there, such as a GPU, is a note.
"""
import argparse
import platform
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

if __name__ == '__main__':
    from _environment import prepare
    prepare()
    from _known_warnings import hide
    hide()

OK, NOTE, BROKEN = 'ok', 'note', 'broken'


class Finding(NamedTuple):
    """What is known of a part of the environment.

    Attributes:
        state (str): OK, NOTE or BROKEN.
        text (str): The part, and unless it is ok what is wrong and what helps.
    """

    state: str
    text: str


def findings() -> Iterator[Finding]:
    """Looks at the parts one after another."""
    yield Finding(OK, f'Python {platform.python_version()}, {sys.executable}')
    try:
        # Checks versions and compiled operators, and refuses to be imported if they do not fit.
        import convneur_mm
    except ImportError as error:
        yield Finding(BROKEN, f'packages: {error}')
        return
    yield Finding(OK, f'convneur_mm {convneur_mm.__version__}, configs in {convneur_mm.paths.config_root()}')
    yield from packages()
    yield from gpus()
    yield from memory()


def packages() -> Iterator[Finding]:
    from convneur_mm.stack import StackError, installed_versions, require
    versions = installed_versions()
    yield Finding(OK, ', '.join(f'{name} {versions[name]}' for name in sorted(versions)))
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
    from convneur_mm.stack import StackError, check_cuda_operators, installed_versions
    if not torch.cuda.is_available():
        yield Finding(NOTE, f'no GPU, {why_no_gpu()}: all runs on the CPU. If the machine has one, it needs NVIDIA\'s '
                      'driver and a torch built for CUDA, as tools/setup_env.sh installs')
        return
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Finding(OK, f'{len(names)} GPU{"s" * (len(names) > 1)} ({", ".join(names)}), CUDA {torch.version.cuda}')
    try:
        if find_spec('mmcv'):
            check_cuda_operators(installed_versions())
            yield Finding(OK, 'mmcv has its CUDA operators')
    except StackError as error:
        yield Finding(BROKEN, str(error))


def memory() -> Iterator[Finding]:
    """Which code computes the neural memory, and that a forward and a backward of it work."""
    import torch

    from convneur_mm.models import NeuralMemory
    from convneur_mm.ops.neural_memory import cpu
    from convneur_mm.ops.neural_memory.op import resolve_backend
    if cpu.missing:
        yield Finding(NOTE, 'neural memory: PyTorch\'s operators on a CPU, which are slower than its compiled kernels: '
                      f'{cpu.missing}. With a C++ compiler, install again by pip install --no-build-isolation CHECKOUT')
    else:
        yield Finding(OK, 'neural memory: compiled kernels on a CPU')
    for device in ('cpu', *(['cuda'] if torch.cuda.is_available() else [])):
        try:
            backend = resolve_backend('auto')
            layer = NeuralMemory(32).to(device)
            loss = layer(torch.randn(1, 400, 32, device=device)).square().sum()
            loss.backward()
        except (ValueError, RuntimeError) as error:
            yield Finding(BROKEN, f'neural memory on {device}: {" ".join(str(error).split())}; tools/analysis/'
                          'check_gpu.py tries each backend, and CONVNEUR_MEMORY_BACKEND=chunked sets the plainest')
        else:
            yield Finding(OK, f'neural memory on {device}: backend {backend} works')


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
