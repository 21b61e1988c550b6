"""The sheet: chunks over the tokens they belong to, maps over the pixels, and text that can be read."""
import numpy as np
import pytest
import torch
from matplotlib.text import Text

from convneur_mm.models import ConvNeur
from convneur_mm.visualization import GateRecorder
from convneur_mm.visualization.sheet import chunk_columns, cover, draw_sheet, gate_columns

TINY = dict(depths=[1, 1, 1, 1], channels=[8, 16, 24, 32], mem_channels=16)


def parts_of(height, width, **options):
    backbone = ConvNeur(**{'arch': TINY, 'memory_cfg': dict(chunk_size=7), **options}).eval()
    with torch.no_grad(), GateRecorder(backbone) as recorder:
        backbone(torch.randn(1, 3, height, width))
    return recorder.parts


def test_each_pixel_belongs_to_its_position():
    index = torch.arange(15).view(3, 5) // 4
    found = cover(index, 4, (14, 19))
    assert found.shape == (14, 19)
    for y, x in np.ndindex(14, 19):
        assert found[y, x] == (-1 if y >= 12 else (y // 4 * 5 + x // 4) // 4)
    assert (cover(index, 4, (9, 20)) == found[:9].max(1, keepdims=True)).any() and cover(index, 4, (9, 20)).min() >= 0


@pytest.mark.parametrize('retrieve', ['previous', 'final'])
def test_strips_lie_over_the_tokens_of_their_chunks(retrieve):
    part = parts_of(70, 90, memory_cfg=dict(chunk_size=7, retrieve=retrieve))[2]  # 4 x 5 tokens of 16 x 16 pixels
    chunks = {column.title: column.panels[0] for column in chunk_columns([part], (70, 90))}
    assert list(chunks) == ['surprise of a chunk', 'size of its write', 'step θ', 'momentum η', 'decay α']
    for panel, values in zip(chunks.values(), part.memory[2:][:1] + part.memory[-1:] + part.memory[3:-1]):
        for y, x in np.ndindex(70, 90):
            token = y // 16 * 5 + x // 16 if y < 64 and x < 80 else None
            unwritten = token is not None and token >= 14 and retrieve == 'previous'
            assert panel.hatched[y, x] == unwritten
            if token is None or unwritten:
                assert np.isnan(panel.values[y, x])
            else:
                assert panel.values[y, x] == pytest.approx(values[token // 7, 0].mean().item())


def test_a_memory_that_is_never_written_says_so():
    part = parts_of(64, 64, memory_cfg=dict(chunk_size=4096))[0]
    for column in chunk_columns([part], (64, 64)):
        panel, = column.panels
        assert panel.caption == 'not written' and panel.hatched.all() and np.isnan(panel.values).all()


def test_maps_lie_over_their_pixels():
    """Interpolation goes through the value of a position in the middle of its pixels."""
    part, = [part for part in parts_of(64, 96) if part.stage == 2]
    columns = {column.title: column for column in gate_columns([part], (64, 96))}
    assert list(columns) == ['local features,\nwithout any global path', 'local features,\nbefore the gate',
                             'after the gate', 'gate', 'influence map']
    maps = [x[0].abs().mean(0) for x in (part.local_only, part.before, part.after)]
    maps = [x / max(x.max() for x in maps) for x in maps]
    influence = (part.before - part.after).abs().sum(1)[0]
    for column, expected in zip(columns.values(), [*maps, part.gate[0].mean(0), influence / influence.max()]):
        panel, = column.panels
        middles = panel.values[3::8, 3::8] + panel.values[4::8, 4::8]
        # Between the four pixels around the middle, which are an eighth of a position apart.
        np.testing.assert_allclose((middles + panel.values[3::8, 4::8] + panel.values[4::8, 3::8]) / 4,
                                   expected.numpy(), atol=0.2 * float(expected.max() - expected.min()))
        low, high = column.limits
        assert low <= panel.values.min() and panel.values.max() <= high


def boxes(figure):
    """All texts that are drawn, with the rectangles they take."""
    renderer = figure.canvas.get_renderer()
    # A colour bar has numbers beyond its ends, which are not drawn.
    beyond = {tick.label1 for axis in figure.axes for tick in axis.xaxis.get_major_ticks()
              if not axis.get_xlim()[0] - 1e-9 <= tick.get_loc() <= axis.get_xlim()[1] + 1e-9}
    return [(text.get_text(), text.get_window_extent(renderer)) for text in figure.findobj(Text)
            if text.get_text().strip() and text.get_visible() and text not in beyond]


@pytest.mark.parametrize('size, options', [
    ((64, 200), dict(memory_cfg=dict(chunk_size=196))),
    ((200, 64), dict(memory_cfg=dict(chunk_size=4096))),
    ((64, 64), dict(global_branch='cbam', memory_cfg=None, fusion='concat')),
])
def test_no_text_overlaps_another_or_leaves_the_sheet(size, options):
    figure = draw_sheet(np.zeros((*size, 3), np.uint8), parts_of(*size, **options), 'config\ncheckpoint\npicture')
    figure.canvas.draw()
    found = boxes(figure)
    for i, (text, box) in enumerate(found):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
        for other, other_box in found[:i]:
            assert not box.overlaps(other_box), (text, other)
    titles = [text for text, _ in found]
    assert ('surprise of a chunk' in titles) == ('global_branch' not in options)
    assert ('gate' in titles) == ('fusion' not in options)


def test_a_sheet_of_nothing_is_refused():
    with pytest.raises(ValueError, match='no parts to draw'):
        draw_sheet(np.zeros((64, 64, 3), np.uint8), [], '')
