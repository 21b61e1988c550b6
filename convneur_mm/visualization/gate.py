"""Parts of ConvNeur's gated blocks (Figure 4 of the paper), as the model computes them for an image."""
from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn

from ..models import ConvNeur
from ..models.blocks import ConvNeurBlock
from ..models.global_branch import GlobalBranch
from ..ops.neural_memory import MemoryState
from .trace import ChunkTrace, trace


@dataclass(frozen=True)
class BlockParts:
    """Feature maps of a block with a global branch for B images; its output is its input plus ``after``.

    Attributes:
        stage (int): Number of the stage, from 1.
        block (int): Number of the block within the stage, from 1.
        stride (int): Pixels of the image between adjacent positions of the features, in both directions.
        branch (str): Name of the global branch, such as 'neural_memory'.
        fusion (str): 'gate', 'add' or 'concat'.
        local_only (Tensor): F_loc of the same weights if no block has a global path, (B, C, H, W).
        before (Tensor): F_loc before its fusion with the global branch's map, (B, C, H, W).
        context (Tensor): The global branch's map G, (B, C, H, W).
        after (Tensor): Result of the fusion, with 'gate' sigmoid(G) ⊙ F_loc (Eq. 6), (B, C, H, W).
        memory (ChunkTrace | None): The chunks of the neural memory; None with another branch.
    """

    stage: int
    block: int
    stride: int
    branch: str
    fusion: str
    local_only: Tensor
    before: Tensor
    context: Tensor
    after: Tensor
    memory: ChunkTrace | None

    @property
    def name(self) -> str:
        return f'stage{self.stage}.block{self.block}'

    @property
    def gate(self) -> Tensor | None:
        """Return sigmoid(G), (B, C, H, W), or None if fusion is not 'gate'."""
        return self.context.sigmoid() if self.fusion == 'gate' else None

    @property
    def influence(self) -> Tensor:
        """Return the influence map Σ_c |before − after|, (B, H, W)."""
        return (self.before - self.after).abs().sum(dim=1)

    def arrays(self, image: int = 0) -> dict[str, np.ndarray]:
        """Return all arrays of one image by name: (C, H, W), (H, W) or, of the memory, (T, Cm) and (T, h).

        ``chunk`` (H, W) of int64 is each position's chunk number, an index of the T writes, or T if the chunk is not
        written.
        """
        found = dict(local_only=self.local_only, before=self.before, context=self.context, gate=self.gate,
                     after=self.after, influence=self.influence)
        found = {name: x[image] for name, x in found.items() if x is not None}
        if self.memory is not None:
            found['chunk'] = self.memory.chunk_of_tokens().view(self.before.shape[2:])
            found.update((name, getattr(self.memory, name)[:, image])
                         for name in ('surprise', 'step', 'momentum', 'decay', 'write_norm'))
        return {name: x.cpu().numpy() for name, x in found.items()}


class GateRecorder:
    """Record the parts of all blocks with a global branch while a model runs.

    The model's results stay bitwise the same: hooks are only on blocks, global branches and memories, and layers inside
    them keep their fast paths. Values that no hook sees are computed a second time.

    ::

        with GateRecorder(model) as recorder:
            model.test_step(data)
        recorder.parts[0].gate

    Args:
        model (nn.Module): A ConvNeur, or a model with one inside.

    Attributes:
        image (Tensor | None): Input of the backbone, (B, in_channels, H, W); None before it ran.
        parts (list[BlockParts]): Parts in the order of the blocks.

    Raises:
        ValueError: If the model has no ConvNeur or several, or its ConvNeur has no global branch.
    """

    def __init__(self, model: nn.Module) -> None:
        self.backbone = find_backbone(model)
        self._blocks = gated_blocks(self.backbone)
        if not self._blocks:
            raise ValueError("the ConvNeur has no global branch to show (placement='none')")
        self.image: Tensor | None = None
        self.parts: list[BlockParts] = []
        self._contexts: dict[ConvNeurBlock, Tensor] = {}
        self._traces: dict[ConvNeurBlock, ChunkTrace] = {}
        self._inputs: dict[ConvNeurBlock, Tensor] = {}

    def __enter__(self) -> GateRecorder:
        self._handles = [self.backbone.register_forward_hook(self._see_backbone)]
        for block in self._blocks.values():
            self._handles.append(block.register_forward_pre_hook(self._see_input))
            self._handles.append(block.global_branch.register_forward_hook(
                lambda module, args, output, block=block: self._contexts.update({block: context_of(output)})))
            if block.global_branch.branch == 'neural_memory':
                self._handles.append(block.global_branch.memory.register_forward_pre_hook(
                    lambda memory, args, block=block: self._traces.update({block: trace(memory, *args)})))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
                 ) -> None:
        for handle in self._handles:
            handle.remove()

    def _see_input(self, block: ConvNeurBlock, args: tuple[Tensor, ...]) -> None:
        self._inputs[block] = args[0].detach()

    @torch.no_grad()
    def _see_backbone(self, backbone: ConvNeur, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        if self.image is not None:
            raise ValueError('the model ran its backbone twice for one input, as it does with windows '
                             "(model.test_cfg.mode='slide') or test-time augmentation: the parts of a single run can "
                             'be shown')
        self.image = args[0].detach()
        alone = local_only_features(backbone, self.image)
        for (stage, number), block in self._blocks.items():
            before, context = block.local_features(self._inputs[block]), self._contexts[block]
            self.parts.append(BlockParts(
                stage, number, 2**(1 + stage), block.global_branch.branch, block.fusion, alone[stage, number], before,
                context, block.join(before, context), self._traces.get(block)))


def context_of(output: Tensor | tuple[Tensor, MemoryState]) -> Tensor:
    """Return the map G from a global branch's output, which may be a pair of the map and the memory's state."""
    return (output[0] if isinstance(output, tuple) else output).detach()


def find_backbone(model: nn.Module) -> ConvNeur:
    """Return the ConvNeur of a model.

    Raises:
        ValueError: If it has none, or several.
    """
    found = [module for module in model.modules() if isinstance(module, ConvNeur)]
    if len(found) == 1:
        return found[0]
    backbone = getattr(model, 'backbone', None)
    got = f'{len(found)} of them' if found or backbone is None else f'a {type(backbone).__name__}'
    raise ValueError(f'the backbone of a {type(model).__name__} must be a ConvNeur, and the only one, got {got}')


def gated_blocks(backbone: ConvNeur) -> dict[tuple[int, int], ConvNeurBlock]:
    """Return the blocks with a global branch by stage and place within it, both counted from 1."""
    return {(i, j): block for i, stage in enumerate(backbone.stages, 1) for j, block in enumerate(stage, 1)
            if isinstance(block.global_branch, GlobalBranch)}


@torch.no_grad()
def local_only_features(backbone: ConvNeur, image: Tensor) -> dict[tuple[int, int], Tensor]:
    """Compute F_loc of the blocks with a global branch as if no block had one: all blocks output X + F_loc.

    The weights are the backbone's, trained with its global branches. The paper does not say whether its local-only
    features are from such a model or from one trained without them.

    Args:
        backbone (ConvNeur): The backbone, which is not changed.
        image (Tensor): Input of the backbone's forward, (B, in_channels, H, W).

    Returns:
        dict[tuple[int, int], Tensor]: (B, C, H, W) by stage and block, both counted from 1.
    """
    found, gated = {}, gated_blocks(backbone)
    x = image.contiguous(memory_format=torch.channels_last) if backbone.channels_last else image
    for i, (downsample, stage) in enumerate(zip(backbone.downsample_layers, backbone.stages), 1):
        x = downsample(x)
        for j, block in enumerate(stage, 1):
            local = block.local_features(x)
            if (i, j) in gated:
                found[i, j] = local
            x = x + local
    return found
