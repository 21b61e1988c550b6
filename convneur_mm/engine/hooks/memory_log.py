"""Log what the memories and gates of a model do during training, as curves."""
from __future__ import annotations

from collections import defaultdict

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ...models import ConvNeur
from ...models.blocks import ConvNeurBlock
from ...visualization import context_of, gated_blocks, trace
from ..files.errors import LaunchError
from ..runner.model_wrappers import unwrapped


@HOOKS.register_module()
class MemoryLogHook(Hook):
    """Log every few iterations what the global branches do with the batch, to the visualizer's backends.

    Each value is a mean over images, chunks, channels or heads, and over the blocks of a stage:

    - ``memory/stage1/surprise``: mean squared error of the memory on what it is about to write
    - ``memory/stage1/write_norm``: norm of a head's write, at most ``max_write_norm``
    - ``memory/stage1/decay``: α
    - ``gate/stage1/mean`` and ``gate/stage1/spread``: mean and standard deviation of sigmoid(G)

    A memory that is never written, because its image is one chunk, has no curves. A gate has none if ``fusion`` is not
    'gate'. A logged iteration writes its memories twice, but the numbers of the training stay the same. With several
    processes, the first one logs its own batches. ::

        custom_hooks = [dict(type='MemoryLogHook', interval=100)]
        visualizer = dict(vis_backends=[dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')])

    Args:
        interval (int): Iterations from one log to the next. Defaults to 100.

    Raises:
        ValueError: If the interval is not an integer of at least 1.
    """

    def __init__(self, interval: int = 100) -> None:
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f'interval must be an integer of at least 1, got {interval!r}')
        self.interval = interval
        self._stages: dict[str, list[ConvNeurBlock]] = {}
        self._watches: list[_Watch] = []

    def before_train(self, runner: Runner) -> None:
        """Find the blocks to watch.

        Raises:
            LaunchError: If there are none, or the model is compiled, which would skip the hooks of its modules.
        """
        if runner.cfg.get('compile'):
            raise LaunchError('MemoryLogHook cannot look into a compiled model: set compile=False, or leave the hook '
                              'out of custom_hooks')
        model = unwrapped(runner.model)
        self._stages = gated_stages(model)
        if not self._stages:
            raise LaunchError(f'MemoryLogHook found no ConvNeur with a global branch in a {type(model).__name__}: '
                              'leave the hook out of custom_hooks')

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Start to watch the blocks if this iteration is to be logged."""
        if runner.rank == 0 and self.every_n_train_iters(runner, self.interval):
            self._watches = [_Watch(stage, block) for stage, blocks in self._stages.items() for block in blocks]

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        """Log the observed values."""
        found = defaultdict(list)
        for watch in self._watches:
            watch.stop()
            for name, value in watch.seen.items():
                found[name].append(value)
        self._watches = []
        if found:
            runner.visualizer.add_scalars(
                {name: torch.stack(values).mean().item() for name, values in found.items()}, step=runner.iter + 1)


class _Watch:
    """Observe the first run of a block; it runs a second time if a gradient checkpoint recomputes it."""

    def __init__(self, stage: str, block: ConvNeurBlock) -> None:
        self.stage = stage
        self.seen: dict[str, Tensor] = {}
        branch = block.global_branch
        self._handles = []
        if block.fusion == 'gate':
            self._handles.append(branch.register_forward_hook(self._see_gate))
        if branch.branch == 'neural_memory':
            self._handles.append(branch.memory.register_forward_pre_hook(self._see_memory))

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _see_gate(self, branch: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        if f'gate/{self.stage}/mean' in self.seen:
            return
        gate = context_of(output).float().sigmoid()
        self.seen.update({f'gate/{self.stage}/mean': gate.mean(), f'gate/{self.stage}/spread': gate.std()})

    def _see_memory(self, memory: nn.Module, args: tuple) -> None:
        if f'memory/{self.stage}/surprise' in self.seen:
            return
        found = trace(memory, *args)
        if found.surprise.numel():
            self.seen.update({f'memory/{self.stage}/{name}': getattr(found, name).mean()
                              for name in ('surprise', 'write_norm', 'decay')})


def gated_stages(model: nn.Module) -> dict[str, list[ConvNeurBlock]]:
    """Return the blocks with a global branch by stage: 'stage1', …, after the ConvNeur's name if there are several."""
    backbones = {name: module for name, module in model.named_modules() if isinstance(module, ConvNeur)}
    stages = defaultdict(list)
    for name, backbone in backbones.items():
        for (stage, _), block in gated_blocks(backbone).items():
            stages[f'stage{stage}' if len(backbones) == 1 else f'{name}.stage{stage}'].append(block)
    return dict(stages)
