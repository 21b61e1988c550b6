"""The task of hidden objects in experiments/_small_tasks.py: nothing in a closed frame tells a colour."""
from dataclasses import replace

import pytest
import torch


@pytest.fixture
def tool(script):
    return script('_small_tasks')


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_labels_are_the_colours_of_the_open_frames(tool):
    """Each mark has one colour in a clip, which its patches show while they are open, and grey afterwards."""
    task = replace(tool.HiddenObject(), noise=0.0)
    clips, labels = task.clips(8, generator(), task.hidden)
    assert clips.shape == (8, 6, 3, 32, 32) and labels.shape == (8, 6, 8, 8)
    pixels = (clips * tool.PIXEL_STD + tool.PIXEL_MEAN).unflatten(4, (8, 4)).unflatten(3, (8, 4))
    pixels = pixels.permute(0, 1, 3, 5, 4, 6, 2)  # (B, T, rows, columns, 4, 4, 3)
    assert ((labels != tool.IGNORED).flatten(2).sum(2) == task.boxes * task.box**2).all()
    colours = torch.tensor(tool.LEGEND_COLOURS)
    for clip, of_clip in zip(pixels, labels):
        known = {}
        for number, (frame, of_frame) in enumerate(zip(clip, of_clip)):
            for patch, label in zip(frame.flatten(0, 1), of_frame.flatten().tolist()):
                if label == tool.IGNORED:
                    assert patch.abs().max() < 1e-5
                    continue
                mark = tuple(patch[:2, :, 0].round().int().flatten().tolist())
                assert known.setdefault(mark, label) == label
                inside = colours[label] if number < task.shown else torch.full((3, ), tool.CLOSED)
                assert torch.allclose(patch[2:], inside.expand(2, 4, 3), atol=1e-5)
        assert len(known) == task.boxes
    moved = (labels[:, 1:] != labels[:, :-1]).flatten(2).any(2)
    assert moved.float().mean() > 0.9


def test_only_a_carried_state_sees_earlier_frames(tool):
    torch.manual_seed(0)
    task = replace(tool.HiddenObject(), side=2, boxes=2, channels=8, mem_channels=16, chunk_size=8)
    model = task.build(carry=True).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    clips = torch.randn(1, 3, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    for carry in (True, False):
        model.carry = carry
        gradient, = torch.autograd.grad(model(clips)[:, :, 1].sum(), clips)
        assert [gradient[:, t].abs().max() > 0 for t in range(3)] == [carry, True, False]
        one_by_one = torch.stack([model(clips[:, t:t + 1])[:, :, 0] for t in range(3)], 2)
        assert torch.allclose(model(clips), one_by_one, atol=1e-10) == (not carry)
