"""Compiles every Triton kernel of the neural memory for a GPU that need not be there, as real settings launch them.

``python compile_triton.py 90 [setting …]`` calls the operation forward and backward on tensors without memory,
compiles what it launches for sm_90 instead of running it, and prints a line per kernel: the registers, spilled bytes
and shared memory that ptxas gives it.
"""
from __future__ import annotations

import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from convneur_mm.ops import MemoryState, UpdateGenerators
from convneur_mm.ops.neural_memory import triton as backend

SETTINGS = {
    'classification': dict(batch=128, heads=8, tokens=3136, chunk_size=196, dtype=torch.float16),
    'detection': dict(batch=2, heads=8, tokens=67000, chunk_size=4096, dtype=torch.bfloat16),
    # Triton compiles sizes of 1 into a kernel, which then sees no tensor in their place.
    'ones_fused': dict(batch=1, heads=1, tokens=1, chunk_size=1, dtype=torch.float32, d=3, e=2),
    'ones_split': dict(batch=1, heads=1, tokens=1, chunk_size=1, dtype=torch.float32, d=3, e=2, update_rule='parallel'),
}


class NoDriver:
    """Stands in for the CUDA driver where Triton asks what to compile for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget('cuda', capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def call(batch, heads, tokens, chunk_size, dtype, update_rule='sequential', d=16, e=8) -> None:
    channels = heads * d

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device='meta', requires_grad=True)

    q, k, v = (empty(batch, tokens, heads, d, dtype=dtype).transpose(1, 2) for _ in range(3))
    generators = UpdateGenerators(empty(4 * channels, channels), empty(4 * channels),
                                  empty(3 * channels, 4 * channels), empty(3 * channels))
    w1, w2 = empty(heads, d, e), empty(heads, e, d)
    state = MemoryState(*(empty(batch, *w.shape) for w in (w1, w2, w1, w2)))
    y, _ = backend.neural_memory_triton(
        q, k, v, w1, w2, generators, state, chunk_size=chunk_size, inner_step=1.0, max_write_norm=1.0,
        update_rule=update_rule, retrieve='previous', return_state=True)
    y.sum().backward()


def registers_and_spills(ptx: str, capability: int) -> tuple[int, int]:
    """What ptxas reports of the one kernel in ``ptx``."""
    with tempfile.NamedTemporaryFile('w', suffix='.ptx') as file:
        file.write(ptx)
        file.flush()
        # sm_90a: Triton's PTX for Hopper uses that architecture's own features.
        arch = f'sm_{capability}' + ('a' if capability == 90 else '')
        report = subprocess.run([triton.knobs.nvidia.ptxas.path, '-v', f'--gpu-name={arch}', file.name, '-o',
                                 '/dev/null'], check=True, text=True, capture_output=True).stderr
    return int(re.search(r'Used (\d+) registers', report)[1]), int(re.search(r'(\d+) bytes spill stores', report)[1])


def main(capability: int, *settings: str) -> None:
    driver.set_active(NoDriver(capability))
    backend.is_available = lambda *tensors: True
    backend._multiprocessors = lambda device: 132
    compiled = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[setting, self.fn.__name__, kernel.hash] = kernel
        return kernel

    JITFunction.run = compile_only
    for setting in settings or SETTINGS:
        call(**SETTINGS[setting])
    for (setting, name, _), kernel in compiled.items():
        registers, spills = registers_and_spills(kernel.asm['ptx'], capability)
        print(f'sm_{capability} {setting} {name}: {registers} registers, {spills} bytes spilled, '
              f'{kernel.metadata.shared} bytes shared')


if __name__ == '__main__':
    main(int(sys.argv[1]), *sys.argv[2:])
