"""Compiles every Triton kernel of the neural memory for a GPU that need not be there, as real settings launch them.

``python compile_triton.py 90 80:classification,detection`` calls the operation forward and backward on tensors without
memory, compiles what it launches for sm_90 in all settings and for sm_80 in these two, instead of running it, and
prints a line per kernel: the registers, spilled bytes and shared memory that ptxas gives it.
"""
from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from convneur_mm.ops.neural_memory import MemoryOptions, UpdateGenerators, memory
from convneur_mm.ops.neural_memory import triton as backend

SETTINGS = {
    'classification': dict(batch=128, heads=8, tokens=3136, chunk_size=196),
    'detection': dict(batch=2, heads=8, tokens=67000, chunk_size=4096),
    # Triton compiles sizes of 1 into a kernel, which then sees no tensor in their place.
    'ones': dict(batch=1, heads=1, tokens=1, chunk_size=1, d=3, e=2),
    'ones_parallel': dict(batch=1, heads=1, tokens=1, chunk_size=1, d=3, e=2, update_rule='parallel'),
}


class NoDriver:
    """Stands in for the CUDA driver where Triton asks what to compile for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget('cuda', capability, 32)

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps what it has compiled by the number of the device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def call(batch, heads, tokens, chunk_size, update_rule='sequential', retrieve='previous', d=16, e=8,
         between=lambda: None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return inputs and their gradients of the loop on the meta device, forward and backward, with a call in between.

    It goes past the operator, which only asks for shapes on that device and would launch nothing.
    """
    channels = heads * d

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device='meta')

    generators = UpdateGenerators(empty(4 * channels, channels), empty(4 * channels),
                                  empty(3 * channels, 4 * channels), empty(3 * channels))
    options = MemoryOptions(chunk_size, update_rule=update_rule, retrieve=retrieve, qk_norm_eps=1e-2)
    start = memory.begin(batch, empty(heads, d, e), empty(heads, e, d), None)
    tensors = [empty(batch, 3, heads, d, tokens), *start, *generators]
    y, *state, kept = memory._memory(*tensors, True, 'triton', *options)
    between()
    return tensors, memory._memory_backward(tensors, kept, [y, *state], 'triton', *options)


def registers_and_spills(ptx: str, capability: int) -> tuple[int, int]:
    """What ptxas reports of the one kernel in ``ptx``."""
    with tempfile.NamedTemporaryFile('w', suffix='.ptx') as file:
        file.write(ptx)
        file.flush()
        report = subprocess.run([get_ptxas(capability).path, '-v', f'--gpu-name={sm_arch_from_capability(capability)}',
                                 file.name, '-o', '/dev/null'], check=True, text=True, capture_output=True).stderr
    return int(re.search(r'Used (\d+) registers', report)[1]), int(re.search(r'(\d+) bytes spill stores', report)[1])


def compile_all(capability: int, settings: Iterable[str]) -> None:
    """Compiles and prints every kernel of the settings for one kind of GPU."""
    driver.set_active(NoDriver(capability))
    compiled = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[setting, self.fn.__name__, kernel.hash] = kernel
        return kernel

    with patch.object(JITFunction, 'run', compile_only):
        for setting in settings:
            call(**SETTINGS[setting])
    for (setting, name, _), kernel in compiled.items():
        assert f'.target sm_{capability}' in kernel.asm['ptx'], 'compiled for another kind of GPU'
        registers, spills = registers_and_spills(kernel.asm['ptx'], capability)
        print(f'sm_{capability} {setting} {name}: {registers} registers, {spills} bytes spilled, '
              f'{kernel.metadata.shared} bytes shared')


def main(args: Iterable[str]) -> None:
    backend.is_available = lambda tensor: True
    backend._multiprocessors = lambda device: 132
    for arg in args:
        capability, _, settings = arg.partition(':')
        compile_all(int(capability), settings.split(',') if settings else SETTINGS)


if __name__ == '__main__':
    main(sys.argv[1:])
