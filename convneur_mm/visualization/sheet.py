"""A figure for one picture: the parts of the gated blocks (Figure 4 of the paper) and the chunks of the memories."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from .gate import BlockParts

# Lengths in inches. At 100 dots per inch, text of 9 points is legible at 100 %.
DPI, FONT = 100, 9
LABELS, PANEL, GAP, TITLES, CAPTION, BAR, MARGIN = 1.5, 2.2, 0.18, 0.55, 0.3, 0.6, 0.15
PANEL_HEIGHTS = 1.1, 3.3  # minimum and maximum
OPACITY = 0.65  # opacity of colours over the picture


class Column(NamedTuple):
    """A column of panels.

    Attributes:
        title (str): Title in plain words, of at most two lines.
        bar (str): Meaning of the colours.
        panels (list[Panel]): One panel for each block.
        limits (tuple[float, float]): Values of the first and the last colour.
        colours (str): Name of matplotlib's colour map.
        over_picture (bool): Whether the picture is visible below the colours.
    """

    title: str
    bar: str
    panels: list[Panel]
    limits: tuple[float, float]
    colours: str = 'viridis'
    over_picture: bool = False


class Panel(NamedTuple):
    """A map as large as the picture.

    Attributes:
        values (np.ndarray): (H, W), NaN where there is no value.
        caption (str): The line below the map.
        hatched (np.ndarray | None): (H, W) of bool: pixels of chunks that are not written.
    """

    values: np.ndarray
    caption: str
    hatched: np.ndarray | None = None


def draw_sheet(picture: np.ndarray, parts: Sequence[BlockParts], title: str) -> Figure:
    """Draw a sheet of the first image of ``parts``; ``figure.savefig(path)`` writes it to a file.

    Args:
        picture (np.ndarray): Input of the network, without padding, (H, W, 3), RGB, uint8.
        parts (Sequence[BlockParts]): Parts recorded by a :class:`GateRecorder`, one for each row.
        title (str): Title of the sheet, such as the names of config, checkpoint and picture, in lines.

    Raises:
        ValueError: If there are no parts.
    """
    if not parts:
        raise ValueError('there are no parts to draw: no image was run while they were recorded')
    with_memory = [part for part in parts if part.memory is not None]
    blocks = [(parts, gate_columns(parts, picture.shape[:2]))]
    if with_memory:
        blocks.append((with_memory, chunk_columns(with_memory, picture.shape[:2])))
    height, width = picture.shape[:2]
    panel_height = float(np.clip(PANEL * height / width, *PANEL_HEIGHTS))
    num_columns = len(blocks[0][1])
    total_width = LABELS + num_columns * (PANEL + GAP) + MARGIN
    heights = [TITLES + len(rows) * (panel_height + CAPTION) + BAR + MARGIN for rows, _ in blocks]
    header = max(panel_height, 1.6) + 2 * MARGIN
    total_height = header + sum(heights)
    figure = Figure((total_width, total_height), dpi=DPI)
    FigureCanvasAgg(figure)  # draws without a display, whatever backend the user has
    layout = _Layout(figure, total_width, total_height, panel_height)

    axis = layout.axis(LABELS, MARGIN, PANEL, panel_height)
    axis.imshow(picture)
    layout.text(LABELS + PANEL + 2 * GAP, MARGIN, title + '\n\n' + '\n'.join(legend(parts)), va='top')
    top = header
    for (rows, columns), block_height in zip(blocks, heights):
        _draw_block(layout, top, rows, columns, picture)
        top += block_height
    return figure


def legend(parts: Sequence[BlockParts]) -> list[str]:
    """Return lines that explain the sheet."""
    first = parts[0]
    lines = [f"Left: the picture as the network gets it. Rows: blocks with a global branch ('{first.branch}', fusion "
             f"'{first.fusion}').",
             'Under a panel: smallest and largest value of the map, in its own unit.']
    if first.memory is None:
        return [*lines, 'No chunks: this global branch is not the neural memory, and writes none.']
    return [*lines,
            'Second block: one value for each chunk of tokens, over the tokens it belongs to, in raster order.',
            'Hatched: a last chunk that is not written, as no token would read what it writes.']


class _Layout:
    """Place axes and text by inches from the top left corner."""

    def __init__(self, figure: Figure, width: float, height: float, panel_height: float) -> None:
        self.figure, self.width, self.height, self.panel_height = figure, width, height, panel_height

    def axis(self, left: float, top: float, width: float, height: float) -> Axes:
        axis = self.figure.add_axes(
            (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height))
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
        return axis

    def text(self, left: float, top: float, text: str, **style: str) -> None:
        self.figure.text(left / self.width, 1 - top / self.height, text, fontsize=FONT, **style)


def _draw_block(layout: _Layout, top: float, rows: Sequence[BlockParts], columns: Sequence[Column],
                picture: np.ndarray) -> None:
    step = layout.panel_height + CAPTION
    for i, part in enumerate(rows):
        layout.text(MARGIN, top + TITLES + i * step + layout.panel_height / 2, row_label(part), va='center')
    for j, column in enumerate(columns):
        left = LABELS + j * (PANEL + GAP)
        layout.text(left + PANEL / 2, top + TITLES - 0.08, column.title, ha='center', va='bottom', fontweight='bold')
        mappable = ScalarMappable(Normalize(*column.limits), colormaps[column.colours])
        for i, panel in enumerate(column.panels):
            axis = layout.axis(left, top + TITLES + i * step, PANEL, layout.panel_height)
            axis.imshow(_coloured(panel, mappable, picture if column.over_picture else None), interpolation='nearest'
                        if min(picture.shape[:2]) < 100 * PANEL else 'antialiased')
            if panel.hatched is not None and panel.hatched.any():
                rows_, cols = panel.hatched.shape
                # Padded, as a contour that ends at the edge would not be filled.
                axis.contourf(np.arange(-1, cols + 1), np.arange(-1, rows_ + 1), np.pad(panel.hatched, 1).astype(float),
                              levels=[0.5, 1.5], colors='none', hatches=['////'])
                axis.set(xlim=(-0.5, cols - 0.5), ylim=(rows_ - 0.5, -0.5))
            axis.text(0.5, -0.04, panel.caption, transform=axis.transAxes, fontsize=FONT - 1, ha='center', va='top')
        bar = layout.axis(left + 0.2, top + TITLES + len(rows) * step + 0.03, PANEL - 0.4, 0.12)
        layout.figure.colorbar(mappable, cax=bar, orientation='horizontal')
        bar.tick_params(labelsize=FONT - 1, length=2, pad=1)
        bar.locator_params(nbins=3)
        bar.xaxis.set_major_formatter(lambda value, _: f'{value:.4g}')
        bar.set_xlabel(column.bar, fontsize=FONT - 1, labelpad=1)


def row_label(part: BlockParts) -> str:
    """Return the text at the left of a row."""
    channels, height, width = part.before.shape[1:]
    lines = [f'stage {part.stage}, block {part.block}', f'{height} x {width} positions', f'{channels} channels']
    if part.memory is not None:
        chunks = -(-part.memory.num_tokens // part.memory.chunk_size)
        written = len(part.memory.surprise)
        lines += [f'{chunks} chunk{"s" * (chunks != 1)} of', f'up to {part.memory.chunk_size} tokens',
                  f'{written} of them written' if written else 'never written']
    return '\n'.join(lines)


def _coloured(panel: Panel, mappable: ScalarMappable, picture: np.ndarray | None) -> np.ndarray:
    """Return a panel's colours, (H, W, 3) from 0 to 1."""
    colours = mappable.to_rgba(np.nan_to_num(panel.values, nan=mappable.norm.vmin))[..., :3]
    if picture is None:
        return colours
    grey = np.repeat((picture @ np.array([0.299, 0.587, 0.114]) / 255)[..., None], 3, axis=2)
    colours = OPACITY * colours + (1 - OPACITY) * grey
    # Pixels without a value are light, so that hatching is visible on dark pictures too.
    return np.where(np.isnan(panel.values)[..., None], 0.5 + grey / 2, colours)


# ---- contents of the columns


def gate_columns(parts: Sequence[BlockParts], shape: tuple[int, int]) -> list[Column]:
    """Return columns of the local features alone, before and after the fusion, the gate, and its influence."""
    maps = {name: [_mean_size(getattr(part, name)) for part in parts] for name in ('local_only', 'before', 'after')}
    # The maps of a row share a scale, so that they can be compared; those of different stages differ by orders.
    largest = [max(float(of_block.max()) for of_block in row) or 1.0 for row in zip(*maps.values())]
    gated = parts[0].fusion == 'gate'
    titles = dict(local_only='local features,\nwithout any global path', before='local features,\nbefore the '
                  + ('gate' if gated else 'fusion'), after='after the ' + ('gate' if gated else 'fusion'))
    columns = [Column(titles[name], "mean |F| over channels,\nshare of the row's largest",
                      [Panel(_smooth(x / unit, part.stride, shape), _range(x))
                       for x, unit, part in zip(maps[name], largest, parts)], (0.0, 1.0), 'magma') for name in maps]
    if gated:
        shown, title, bar = [part.gate[0].mean(0) for part in parts], 'gate', 'sigmoid(G), mean over channels'
    else:
        shown, title, bar = [_mean_size(part.context) for part in parts], 'global map', 'mean |G| over channels'
    columns.append(Column(title, bar, [Panel(_smooth(x, part.stride, shape), _range(x))
                                       for x, part in zip(shown, parts)], _limits(shown)))
    influences = [part.influence[0] for part in parts]
    columns.append(Column(
        'influence map', "Σ |before - after| over channels,\nshare of the row's largest",
        [Panel(_smooth(x / (float(x.max()) or 1.0), part.stride, shape), _range(x))
         for x, part in zip(influences, parts)], (0.0, 1.0), 'inferno', over_picture=True))
    return columns


def chunk_columns(parts: Sequence[BlockParts], shape: tuple[int, int]) -> list[Column]:
    """Return columns of each chunk's surprise, write norm, step, momentum and decay, drawn over its tokens."""
    columns = []
    for name, title, bar in (
            ('surprise', 'surprise of a chunk', 'mean squared error\nof tokens and channels'),
            ('write_norm', 'size of its write', 'norm of u, mean over heads\n(at most max_write_norm)'),
            ('step', 'step θ', 'with inner_step,\nmean over channels'),
            ('momentum', 'momentum η', 'mean over channels'), ('decay', 'decay α', 'mean over channels')):
        values = [getattr(part.memory, name)[:, 0].mean(-1) for part in parts]
        columns.append(Column(title, bar, [_strips(x, part, shape) for x, part in zip(values, parts)], _limits(values),
                              over_picture=True))
    return columns


def _strips(values: torch.Tensor, part: BlockParts, shape: tuple[int, int]) -> Panel:
    """Return a panel of one value for each of T chunks, drawn over the chunks' tokens."""
    chunk = cover(part.memory.chunk_of_tokens().view(part.before.shape[2:]), part.stride, shape)
    known = np.append(values.double().cpu().numpy(), np.nan)
    shown = known[np.where((chunk >= 0) & (chunk < len(values)), chunk, len(values))]
    return Panel(shown, _range(values) if len(values) else 'not written', chunk >= len(values))


def cover(index: torch.Tensor, stride: int, shape: tuple[int, int]) -> np.ndarray:
    """Draw the numbers (h, w) of positions over ``stride`` × ``stride`` pixels each; -1 beyond the last position."""
    pixels = index.cpu().numpy().repeat(stride, 0).repeat(stride, 1)[:shape[0], :shape[1]]
    return np.pad(pixels, [(0, size - have) for size, have in zip(shape, pixels.shape)], constant_values=-1)


def _smooth(values: torch.Tensor, stride: int, shape: tuple[int, int]) -> np.ndarray:
    """Draw a map (h, w) over the pixels of a picture, interpolated between the centres of its positions."""
    pixels = F.interpolate(values[None, None].double(), scale_factor=stride, mode='bilinear', align_corners=False)
    missing = [max(0, size - have) for size, have in zip(shape, pixels.shape[2:])]
    pixels = F.pad(pixels, (0, missing[1], 0, missing[0]), mode='replicate')
    return pixels[0, 0, :shape[0], :shape[1]].cpu().numpy()


def _mean_size(x: torch.Tensor) -> torch.Tensor:
    """Compute mean |x| over channels of the first image of (B, C, h, w), as (h, w)."""
    return x[0].abs().mean(0)


def _range(x: torch.Tensor) -> str:
    return f'{float(x.min()):.3g} to {float(x.max()):.3g}'


def _limits(values: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Return the smallest and the largest value, or 0 and 1 if there are none.

    They differ by at least 1 %: smaller differences should look the same, and numbers on the bar should stay short.
    """
    found = [x for x in values if x.numel()]
    if not found:
        return 0.0, 1.0
    low, high = min(float(x.min()) for x in found), max(float(x.max()) for x in found)
    missing = max(0.0, 0.01 * max(abs(low), abs(high), 1e-6) - (high - low))
    return low - missing / 2, high + missing / 2
