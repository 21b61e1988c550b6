"""Tasks of small_ablation.py, and the training of a model on one of them.

A task draws batches, builds a model around given backbone options, and measures a trained model on fresh data. All its
settings are fields, so that a result can record exactly what it was trained on. A model's first figure is the one by
which runs are compared.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _inner_variants import replace_memories
from mmengine.registry import MODELS
from PIL import Image
from torch import Tensor, nn

from convneur_mm.datasets.shapes import SHAPE_CLASSES, single_scene_at
from convneur_mm.models import ConvNeur, NeuralMemory
from convneur_mm.models.global_branches import branch_options
from convneur_mm.visualization.gate import GateRecorder, gated_blocks
from convneur_mm.visualization.sheet import draw_sheet

IGNORED = -1  # label where nothing is asked
WARMUP_ITERATIONS = 50
MAX_GRAD_NORM = 1.0
# Red, green, blue and yellow, whose sums of squares differ by a few percent at most.
LEGEND_COLOURS = ((1.0, 0.1, 0.1), (0.1, 1.0, 0.1), (0.1, 0.1, 1.0), (0.7, 0.7, 0.1))
CELL = 4  # pixels, as the patch of the backbone's stem
PIXEL_MEAN, PIXEL_STD = 0.25, 0.4
CLOSED = 0.5  # grey of a closed box


@dataclass(frozen=True)
class Task:
    """Common settings and methods of all tasks.

    Attributes:
        iterations: Length of a training at budget factor 1.
        batch: Sequences or pictures per iteration.
        lr: Peak learning rate of AdamW.
        chunk_size: Tokens per chunk of the memory, unless a variant sets it.
        solved: First figure from which a run counts as solved; None if a task is never solved, only better or worse.
        chance: First figure of guessing.
        seeds: Default number of seeds.
        cost: Time of an iteration relative to other tasks; for estimates of the remaining time.
    """

    iterations: int
    batch: int
    lr: float
    chunk_size: int
    solved: float | None
    chance: float
    seeds: int
    cost: float

    def build(self, **options) -> nn.Module:
        """Build a model; ``options`` are those of :class:`ConvNeur`."""
        raise NotImplementedError

    def draw(self, batch: int, g: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        """Draw a batch: model inputs, and labels of the logits (B, classes, ...), IGNORED where nothing is asked."""
        raise NotImplementedError

    def measure(self, model: nn.Module, g: torch.Generator) -> dict[str, float]:
        """Measure a trained model's figures on unseen data, the one by which runs are compared first."""
        raise NotImplementedError

    def show(self, model: nn.Module, path: Path) -> None:
        """Write a picture of a trained model's work to ``path``, if the task has one."""

    def backbone(self, arch: dict | str, tile: int | None = None, inner: dict | None = None, **options) -> ConvNeur:
        """Build a ConvNeur with this task's chunk size and initial weights.

        With ``tile``, its memories take the tokens in square tiles of ``tile`` rows and columns instead of row by row;
        with ``inner`` they have another inner rule, see :func:`replace_memories`.
        """
        memory_cfg = options.pop('memory_cfg', {})
        if 'chunk_size' in branch_options(options.get('global_branch', 'neural_memory')):
            memory_cfg = {'chunk_size': self.chunk_size, **memory_cfg}
        model = ConvNeur(arch, memory_cfg=memory_cfg, **options)
        model.init_weights()
        if inner is not None:
            replace_memories(model, inner)
        if tile is not None:
            for memory in model.modules():
                if isinstance(memory, NeuralMemory):
                    memory.register_forward_pre_hook(
                        lambda _, args: (args[0][:, tile_order(args[0].size(1), tile)], *args[1:]))
                    memory.register_forward_hook(
                        lambda _, args, out: out[:, tile_order(out.size(1), tile).argsort()])
        return model


def tile_order(num_tokens: int, tile: int) -> Tensor:
    """Return the row-major positions of a square map's tokens, tile by tile, and row by row within each tile."""
    side = math.isqrt(num_tokens)
    row, column = torch.arange(side)[:, None], torch.arange(side)
    tiles = row // tile * side + column // tile
    return tiles.flatten().argsort(stable=True)


# ---- recall


@dataclass(frozen=True)
class Recall(Task):
    """Task of naming a key's value, which earlier tokens showed; values are drawn anew for each sequence.

    It uses only the global branch, on a map of tokens. The first half of the rows shows keys with values, the second
    half keys alone.
    """

    iterations: int = 150
    batch: int = 32
    lr: float = 2e-3
    chunk_size: int = 32
    solved: float = 0.95
    chance: float = 1 / 8
    seeds: int = 5
    cost: float = 2.0
    keys: int = 12
    values: int = 8
    side: int = 16
    channels: int = 64

    def build(self, **options) -> nn.Module:
        arch = dict(depths=[1], channels=[self.channels], mem_channels=self.channels)
        block = self.backbone(arch, out_indices=(0, ), **options).stages[0][0]
        return _RecallModel(self, nn.Identity() if block.global_branch is None else block.global_branch)

    def draw(self, batch: int, g: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        table = torch.randint(self.values, (batch, self.keys), generator=g)
        keys = torch.randint(self.keys, (batch, self.side**2), generator=g)
        labels = table.gather(1, keys)
        shown = labels.clone()
        half = self.side // 2 * self.side
        shown[:, half:] = self.values  # index of "no value"
        labels[:, :half] = IGNORED
        return (keys, shown), labels

    def measure(self, model: nn.Module, g: torch.Generator) -> dict[str, float]:
        inputs, labels = self.draw(256, g)
        return dict(accuracy=accuracy(predict(model, inputs), labels))


class _RecallModel(nn.Module):

    def __init__(self, task: Recall, branch: nn.Module) -> None:
        super().__init__()
        self.side = task.side
        self.key = nn.Embedding(task.keys, task.channels)
        self.value = nn.Embedding(task.values + 1, task.channels)
        self.branch = branch
        self.norm = nn.LayerNorm(task.channels)
        self.head = nn.Linear(task.channels, task.values)

    def forward(self, keys: Tensor, shown: Tensor) -> Tensor:
        """Map two (B, N) to logits (B, values, N)."""
        x = (self.key(keys) + self.value(shown)).mT.unflatten(2, (self.side, self.side))
        return self.head(self.norm(self.branch(x).flatten(2).mT)).mT


# ---- legend


@dataclass(frozen=True)
class Legend(Task):
    """Pictures of stem-patch cells: a legend of coloured patterns, and queries, the same patterns in white.

    The legend is along the top or the bottom, and the queries along the other side, outside the local branch's view. A
    query's label is the colour of its pattern in the legend. Patterns are drawn anew for each picture. Each pattern
    appears equally often, and so does each colour, so their counts say nothing about the labels.
    """

    iterations: int = 900
    batch: int = 16
    lr: float = 1e-3
    chunk_size: int = 64
    solved: float = 0.9
    chance: float = 1 / 4
    seeds: int = 5
    cost: float = 1.0
    side: int = 16  # cells per side of the picture
    band: int = 3  # rows of cells of the legend, and of the queries
    pairs: int = 4
    noise: float = 0.05
    channels: int = 48
    mem_channels: int = 64

    def build(self, **options) -> nn.Module:
        arch = dict(depths=[2], channels=[self.channels], mem_channels=self.mem_channels)
        return _LegendModel(self.backbone(arch, out_indices=(0, ), **options))

    def draw(self, batch: int, g: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        images, labels, _ = self.pictures(batch, g)
        return (images, ), labels

    def pictures(self, batch: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return images (B, 3, H, W), labels of cells (B, H/4, W/4), and whether the legend is at the top (B,)."""
        patterns = _ranks((batch, self.pairs, CELL * CELL), g) < CELL * CELL // 2
        patterns = patterns.float().unflatten(-1, (1, CELL, CELL))
        colours = _ranks((batch, self.pairs), g) % len(LEGEND_COLOURS)
        at_top = torch.rand(batch, generator=g) < 0.5

        cells = torch.zeros(batch, self.side, self.side, 3, CELL, CELL)
        labels = torch.full((batch, self.side, self.side), IGNORED)
        image = torch.arange(batch)[:, None, None]
        legend, queries = (_ranks((batch, self.band * self.side), g).unflatten(1, (self.band, self.side)) % self.pairs
                           for _ in range(2))
        rgb = torch.tensor(LEGEND_COLOURS)[colours][..., None, None]  # (B, pairs, 3, 1, 1)
        cells[:, :self.band] = (patterns * rgb)[image, legend]
        cells[:, -self.band:] = patterns[image, queries]
        labels[:, -self.band:] = colours[image, queries]
        cells[~at_top], labels[~at_top] = cells[~at_top].flip(1), labels[~at_top].flip(1)

        pixels = self.side * CELL
        images = cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, pixels, pixels)
        images = images + self.noise * torch.randn(images.shape, generator=g)
        return (images - PIXEL_MEAN) / PIXEL_STD, labels, at_top

    def measure(self, model: nn.Module, g: torch.Generator) -> dict[str, float]:
        images, labels, at_top = self.pictures(256, g)
        predicted = predict(model, (images, ))
        return dict(accuracy=accuracy(predicted, labels),
                    legend_at_top=accuracy(predicted[at_top], labels[at_top]),
                    legend_at_bottom=accuracy(predicted[~at_top], labels[~at_top]))


class _LegendModel(nn.Module):

    def __init__(self, backbone: ConvNeur) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(backbone.channels[0], len(LEGEND_COLOURS), 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) to logits (B, colours, H/4, W/4)."""
        return self.head(self.backbone(images)[0])


def _ranks(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Draw a permutation of 0 to n - 1 along the last axis."""
    return torch.rand(shape, generator=g).argsort(-1)


# ---- shapes


@dataclass(frozen=True)
class Shapes(Task):
    """The quick start's pictures for classification: one shape each, told by its outline alone."""

    iterations: int = 600
    batch: int = 16
    lr: float = 1.5e-3
    chunk_size: int = 64
    solved: float = 0.35  # twice the accuracy of guessing shows that something was learned
    chance: float = 1 / len(SHAPE_CLASSES)
    seeds: int = 3
    cost: float = 0.5
    size: int = 64
    num_train: int = 2000
    num_val: int = 600
    depths: tuple[int, ...] = (1, 1, 2, 1)
    channels: tuple[int, ...] = (24, 48, 96, 192)
    mem_channels: int = 48

    def build(self, **options) -> nn.Module:
        arch = dict(depths=self.depths, channels=self.channels, mem_channels=self.mem_channels)
        last = len(self.depths) - 1
        return _ShapesModel(self.backbone(arch, out_indices=(last, ), gap_before_final_norm=True, **options))

    def draw(self, batch: int, g: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        images, labels = shapes_pictures('train', self.num_train, self.size)
        chosen = torch.randint(self.num_train, (batch, ), generator=g)
        images = images[chosen]
        for axis in (2, 3):
            flipped = torch.rand(batch, generator=g) < 0.5
            images[flipped] = images[flipped].flip(axis)
        return (_normalised(images), ), labels[chosen]

    def measure(self, model: nn.Module, g: torch.Generator) -> dict[str, float]:
        images, labels = shapes_pictures('val', self.num_val, self.size)
        return dict(accuracy=accuracy(predict(model, (_normalised(images), )), labels))


class _ShapesModel(nn.Module):

    def __init__(self, backbone: ConvNeur) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.channels[-1], len(SHAPE_CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) to logits (B, classes)."""
        return self.head(self.backbone(images)[0])


@lru_cache(maxsize=2)
def shapes_pictures(split: str, number: int, size: int) -> tuple[Tensor, Tensor]:
    """Return uint8 pictures (number, 3, size, size) and their classes, the same in every run."""
    scenes = [single_scene_at(0, split, index, size) for index in range(number)]
    images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([scene.instances[0].label for scene in scenes])


def _normalised(images: Tensor) -> Tensor:
    return (images / 255 - 0.5) / 0.25


# ---- hidden object


@dataclass(frozen=True)
class HiddenObject(Task):
    """Clips of boxes with marks, which move at random: open at first, each with a colour, and then closed and grey.

    A model names the colour of each box in every frame, and is measured in the last frames. Only a state that it
    carries from frame to frame can tell it the colour of a closed box.

    Attributes:
        shown: Frames with open boxes, at the start of a clip.
        hidden: Frames after them, with closed boxes; the last ``hidden`` are measured.
        side: Side of a frame, in boxes.
        box: Side of a box, in patches, which are all the same: a mark above a colour.
        boxes: Boxes in a clip, each with its own mark.
        marks: Marks to choose from, the same in all clips.
        noise: Standard deviation of the pixel noise.
        channels: Channels of the backbone, which has one block.
        mem_channels: Channels of its memory.
        long: Closed frames of the longer clips.
    """

    iterations: int = 500
    batch: int = 16
    lr: float = 2e-3
    chunk_size: int = 64
    solved: float = 0.9
    chance: float = 1 / len(LEGEND_COLOURS)
    seeds: int = 5
    cost: float = 1.0
    shown: int = 3
    hidden: int = 3
    side: int = 4
    box: int = 2
    boxes: int = 4
    marks: int = 6
    noise: float = 0.05
    channels: int = 48
    mem_channels: int = 64
    long: int = 30

    def build(self, carry: bool) -> nn.Module:
        arch = dict(depths=[1], channels=[self.channels], mem_channels=self.mem_channels)
        return _HiddenObjectModel(self.backbone(arch, out_indices=(0, )), carry)

    def draw(self, batch: int, g: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        clips, labels = self.clips(batch, g, self.hidden)
        return (clips, ), labels

    def clips(self, batch: int, g: torch.Generator, hidden: int) -> tuple[Tensor, Tensor]:
        """Draw clips (B, T, 3, H, W), T = shown + ``hidden`` frames, and all boxes' colours, (B, T, H/4, W/4)."""
        frames, places = self.shown + hidden, self.side**2
        # Half of each mark's pixels are lit, and the marks are the same in all clips.
        half = CELL // 2 * CELL
        marks = torch.rand(self.marks, half, generator=torch.Generator().manual_seed(0)).argsort(-1) < half // 2
        marks = marks.float().view(self.marks, 1, CELL // 2, CELL).expand(-1, 3, -1, -1)
        chosen = torch.rand(batch, self.marks, generator=g).argsort(-1)[:, :self.boxes]
        colours = torch.randint(len(LEGEND_COLOURS), (batch, self.boxes), generator=g)
        taken = torch.rand(batch, frames, places, generator=g).argsort(-1)[..., :self.boxes]  # (B, T, boxes)

        inside = torch.tensor(LEGEND_COLOURS)[colours][:, None].repeat(1, frames, 1, 1)  # (B, T, boxes, 3)
        inside[:, self.shown:] = CLOSED
        inside = inside[..., None, None].expand(-1, -1, -1, -1, CELL // 2, CELL)
        patches = torch.cat((marks[chosen][:, None].expand_as(inside), inside), -2)  # (B, T, boxes, 3, 4, 4)

        clip, frame = torch.arange(batch)[:, None, None], torch.arange(frames)[:, None]
        size = self.side * self.box * CELL
        pixels = torch.zeros(batch, frames, places, 3, self.box * CELL, self.box * CELL)
        pixels[clip, frame, taken] = patches.repeat(1, 1, 1, 1, self.box, self.box)
        pixels = pixels.unflatten(2, (self.side, self.side)).permute(0, 1, 4, 2, 5, 3, 6)
        pixels = pixels.reshape(batch, frames, 3, size, size)
        pixels = pixels + self.noise * torch.randn(pixels.shape, generator=g)
        labels = torch.full((batch, frames, places), IGNORED)
        labels[clip, frame, taken] = colours[:, None].expand_as(taken)
        labels = labels.unflatten(2, (self.side, self.side))
        labels = labels.repeat_interleave(self.box, 2).repeat_interleave(self.box, 3)
        return (pixels - PIXEL_MEAN) / PIXEL_STD, labels

    def measure(self, model: nn.Module, g: torch.Generator) -> dict[str, float]:
        """Measure accuracy on clips as in training, on longer ones, without any states, and on open boxes."""
        def measured(number: int, hidden: int, carry: bool, frames: slice) -> float:
            clips, labels = self.clips(number, g, hidden)
            model.carry = carry
            return accuracy(predict(model, (clips, ))[:, frames], labels[:, frames])

        last, carry = slice(-self.hidden, None), model.carry
        return dict(accuracy=measured(128, self.hidden, carry, last),
                    hidden_for_30_frames=measured(32, self.long, carry, last),
                    state_thrown_away=measured(128, self.hidden, False, last),
                    open_boxes=measured(128, self.hidden, carry, slice(self.shown)))


class _HiddenObjectModel(nn.Module):

    def __init__(self, backbone: ConvNeur, carry: bool) -> None:
        super().__init__()
        self.backbone, self.carry = backbone, carry
        self.head = nn.Conv2d(backbone.channels[-1], len(LEGEND_COLOURS), 1)

    def forward(self, clips: Tensor) -> Tensor:
        """Map (B, T, 3, H, W) to logits (B, colours, T, H/4, W/4)."""
        if not self.carry:
            features, = self.backbone(clips.flatten(0, 1))
            return self.head(features).unflatten(0, clips.shape[:2]).transpose(1, 2)
        logits, states = [], None
        for frame in clips.unbind(1):
            (features, ), states = self.backbone(frame, states=states, return_states=True)
            logits.append(self.head(features))
        return torch.stack(logits, 2)


# ---- street photos


CAMVID_CLASSES = ('sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence', 'car', 'pedestrian',
                  'bicyclist')
# Folders of pictures and label maps, for training and for validation, in MMSeg's layout and in SegNet's.
CAMVID_LAYOUTS = ((('images/training', 'annotations/training'), ('images/validation', 'annotations/validation')),
                  (('train', 'trainannot'), ('val', 'valannot')))


@dataclass(frozen=True)
class CamVid(Task):
    """Segmentation of street photos in 11 classes by a Semantic FPN, from random weights.

    Attributes:
        width: Width of the pictures, which are resized if they have another.
        height: Height of the pictures.
        neck_channels: Channels of the FPN and of its head.
        folder: Where the data set is, with pictures and label maps (labels 0 to 10; higher ones are not asked).
    """

    iterations: int = 300
    batch: int = 4
    lr: float = 1e-3
    chunk_size: int = 196
    solved: None = None
    chance: float = 1 / len(CAMVID_CLASSES)
    seeds: int = 3
    cost: float = 8.0
    width: int = 320
    height: int = 240
    neck_channels: int = 64
    folder: str = 'data/camvid'

    def build(self, backbone: dict | None = None, **options) -> nn.Module:
        """Build the model; ``backbone`` is the config of another backbone than ConvNeur-m1."""
        if backbone is None:
            return _SegmentationModel(self.backbone('m1', **options), (40, 80, 160, 320), self.neck_channels)
        other = MODELS.build(backbone)
        other.init_weights()
        return _SegmentationModel(other, CHANNELS_OF_OTHERS[backbone['type']], self.neck_channels)

    def draw(self, batch: int, g: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        images, labels = street_photos(self.folder, 0, self.width, self.height)
        chosen = torch.randint(len(images), (batch, ), generator=g)
        images, labels = images[chosen], labels[chosen].long()
        mirrored = torch.rand(batch, generator=g) < 0.5
        images[mirrored], labels[mirrored] = images[mirrored].flip(3), labels[mirrored].flip(2)
        return (_normalised(images), ), labels

    def measure(self, model: nn.Module, g: torch.Generator) -> dict[str, float]:
        images, labels = street_photos(self.folder, 1, self.width, self.height)
        predicted = torch.cat([predict(model, (_normalised(part), )) for part in images.split(8)])
        return dict(mean_iou=mean_iou(predicted, labels.long(), len(CAMVID_CLASSES)),
                    pixel_accuracy=accuracy(predicted, labels))

    def show(self, model: nn.Module, path: Path) -> None:
        """Write the gate sheet of the first validation picture, if the model has gates."""
        if not isinstance(model.backbone, ConvNeur) or not gated_blocks(model.backbone):
            return
        image = street_photos(self.folder, 1, self.width, self.height)[0][:1]
        with torch.no_grad(), GateRecorder(model) as recorder:
            model(_normalised(image))
        draw_sheet(image[0].permute(1, 2, 0).numpy(), recorder.parts, path.stem).savefig(path)


CHANNELS_OF_OTHERS = {'mmseg.ResNet': (64, 128, 256, 512), 'mmdet.PyramidVisionTransformerV2': (32, 64, 160, 256)}


class _SegmentationModel(nn.Module):

    def __init__(self, backbone: nn.Module, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = MODELS.build(
            dict(type='mmseg.FPN', in_channels=list(in_channels), out_channels=channels, num_outs=4))
        self.head = MODELS.build(dict(
            type='mmseg.FPNHead', in_channels=[channels] * 4, in_index=[0, 1, 2, 3], feature_strides=[4, 8, 16, 32],
            channels=channels, num_classes=len(CAMVID_CLASSES), norm_cfg=dict(type='BN'), align_corners=False))
        self.neck.init_weights()
        self.head.init_weights()

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) to logits (B, classes, H, W)."""
        logits = self.head(self.neck(self.backbone(images)))
        return F.interpolate(logits, images.shape[2:], mode='bilinear', align_corners=False)


@lru_cache(maxsize=2)
def street_photos(folder: str, split: int, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Return uint8 pictures (number, 3, height, width) and labels (number, height, width) of a folder.

    Raises:
        ValueError: If the folder has none of the layouts, or a picture has no label map.
    """
    for layout in CAMVID_LAYOUTS:
        pictures, maps = (Path(folder, part) for part in layout[split])
        if pictures.is_dir():
            break
    else:
        raise ValueError(f'{folder} is not a folder of CamVid: expected one of '
                         f'{", ".join(layout[split][0] for layout in CAMVID_LAYOUTS)} in it; name it with --camvid')
    images, labels = [], []
    for path in sorted(pictures.iterdir()):
        label = maps / f'{path.stem}.png'
        if not label.is_file():
            raise ValueError(f'{path} has no label map {label}')
        images.append(np.asarray(Image.open(path).convert('RGB').resize((width, height), Image.Resampling.BILINEAR)))
        labels.append(np.asarray(Image.open(label).resize((width, height), Image.Resampling.NEAREST)).astype(np.int8))
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(np.stack(labels))
    labels[(labels < 0) | (labels >= len(CAMVID_CLASSES))] = IGNORED
    return images, labels


def mean_iou(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """Return the mean over classes of intersection over union, of all pixels together, without IGNORED labels."""
    asked = labels != IGNORED
    pairs = torch.bincount(labels[asked] * classes + predicted[asked], minlength=classes**2).view(classes, classes)
    hits = pairs.diagonal().double()
    union = (pairs.sum(0) + pairs.sum(1) - pairs.diagonal()).double()
    return (hits / union)[union > 0].mean().item()


# ---- training


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the share of correct predictions, without IGNORED labels."""
    asked = labels != IGNORED
    return (predicted[asked] == labels[asked]).float().mean().item()


@torch.no_grad()
def predict(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return the class of each logit, in batches small enough for any machine."""
    return torch.cat([model(*part).argmax(1) for part in zip(*(x.split(64) for x in inputs))])


def train(task: Task, options: dict, seed: int, iterations: int,
          report: Callable[[int, float], None] = lambda iteration, loss: None) -> nn.Module:
    """Train a model from random weights: AdamW, a warm-up, and a linear decay to zero over the second half.

    Args:
        task: What to train on.
        options: Options of the backbone.
        seed: Seed of the weights and of the data.
        iterations: Length of the training.
        report: Called after each iteration with its number, starting at 1, and its loss.

    Returns:
        The model, in evaluation mode.

    Raises:
        RuntimeError: If a gradient is not finite.
    """
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    model = task.build(**options).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / WARMUP_ITERATIONS, 2 * (iterations - i) / iterations))
    for iteration in range(1, iterations + 1):
        inputs, labels = task.draw(task.batch, g)
        loss = F.cross_entropy(model(*inputs), labels, ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        report(iteration, loss.item())
    return model.eval()
