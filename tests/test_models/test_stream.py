"""Memories carried from frame to frame: stream() around any model, resetting, detaching, and 10,000 frames."""
import pytest
import torch
from torch import nn

from convneur_mm.models import ConvNeur, OverLoCK, global_branch
from convneur_mm.models.global_branch import MAX_STATE_NORM, GlobalBranch
from convneur_mm.models.stream import detach_states, reset_states, stream

TINY = dict(depths=[1, 1], channels=[8, 12], mem_channels=16)


def make_backbone(**options) -> ConvNeur:
    """Weights far enough from their first values for each frame to change the next one's features."""
    torch.manual_seed(0)
    model = ConvNeur(TINY, memory_cfg=dict(chunk_size=4), out_indices=(0, 1), **options).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


class Detector(nn.Module):
    """Calls its backbone with images alone, as those of mmdet, mmseg and mmpretrain do."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.backbone(images)
        assert len(features) == 2
        return sum(f.mean((2, 3)).sum(1) for f in features)


def make_frames(number: int = 3, batch: int = 2) -> list[torch.Tensor]:
    return list(torch.randn(number, batch, 3, 16, 24, dtype=torch.float64))


def equal(found: tuple, expected: tuple) -> bool:
    return all(torch.equal(a, b) for x, y in zip(found, expected) for a, b in zip(x, y))


def test_stream_carries_the_states():
    model, frames = Detector(make_backbone()), make_frames()
    alone = [model(frame) for frame in frames]
    with stream(model) as state:
        assert state.states is None
        found = [model(frame) for frame in frames]
    states = None
    for frame, result, single in zip(frames, found, alone):
        features, states = model.backbone(frame, states=states, return_states=True)
        assert torch.equal(result, sum(f.mean((2, 3)).sum(1) for f in features))
        assert torch.equal(result, single) == (frame is frames[0])
    assert equal(state.states, states)
    assert torch.equal(model(frames[2]), alone[2]), 'behind the stream images stand alone again'


def test_an_error_in_a_stream_ends_it():
    model, (frame, *_) = Detector(make_backbone()), make_frames()
    with pytest.raises(RuntimeError, match='stop'), stream(model):
        model(frame)
        raise RuntimeError('stop')
    assert len(model.backbone(frame)) == 2 and not model.backbone._forward_hooks


def test_another_hook_sees_features_alone():
    model, (frame, *_) = Detector(make_backbone()), make_frames()
    seen = []
    model.backbone.register_forward_hook(lambda module, args, output: seen.append(output))
    with stream(model):
        model(frame)
    assert all(isinstance(feature, torch.Tensor) for feature in seen[0])


def test_reset():
    model, (first, second, _) = Detector(make_backbone()), make_frames()
    alone = model(second)
    with stream(model) as state:
        state.reset()
        model(first)
        state.reset()
        assert torch.equal(model(second), alone)
        state.reset()
        assert model(second[:1]).shape == (1, ), 'another number of videos'


def test_reset_of_one_of_two_videos():
    model, (first, second, _) = Detector(make_backbone()), make_frames()
    alone = model(second)
    with stream(model) as state:
        state.reset(torch.tensor([True, False]))  # nothing to forget yet
        model(first)
        carried = state.states
        going_on = model(second)
        state.states = carried
        state.reset(torch.tensor([True, False]))
        found = model(second)
    torch.testing.assert_close(found[0], alone[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[1], going_on[1], rtol=1e-12, atol=0)
    assert (alone - going_on).abs().min() > 1e-6


@pytest.mark.parametrize('mask, got', [
    (torch.tensor([1, 0]), r'torch.int64 of shape \(2,\)'), (torch.tensor([True]), r'torch.bool of shape \(1,\)')])
def test_bad_masks_are_named(mask, got):
    backbone = make_backbone()
    with pytest.raises(ValueError, match=rf'mask must be a bool tensor of shape \(2,\).*got {got}'):
        reset_states(backbone, backbone.initial_states(2), mask)


def test_detach():
    """Without it, gradients go back through all frames."""
    model, (first, second, _) = Detector(make_backbone()), make_frames()
    first.requires_grad_()
    with stream(model) as state:
        state.detach()
        model(first)
        assert torch.autograd.grad(model(second).sum(), first)[0].abs().max() > 0
        state.reset()
        model(first)
        kept = state.states
        state.detach()
        assert equal(state.states, kept) and equal(detach_states(kept), kept)
        assert not any(tensor.requires_grad for of_memory in state.states for tensor in of_memory)
        model(second).sum().backward()
    assert first.grad is None


@pytest.mark.parametrize('build, message', [
    (lambda: nn.Linear(2, 2), 'no other backbone has such a state: Linear has none'),
    (lambda: Detector(OverLoCK('xt')), 'no other backbone has such a state: Detector has none'),
    (lambda: nn.ModuleList([make_backbone(), make_backbone()]), r"ModuleList has \['0', '1'\]"),
    (lambda: make_backbone(placement='none'), "has none: it has placement='none'"),
    (lambda: ConvNeur(TINY, out_indices=0, global_branch='cbam'), "placement='stage', global_branch='cbam'"),
])
def test_models_without_a_state_to_carry(build, message):
    with torch.device('meta'):
        model = build()
    with pytest.raises(ValueError, match=message), stream(model):
        pass


def test_streams_do_not_nest():
    model, (frame, *_) = Detector(make_backbone()), make_frames()
    with stream(model), pytest.raises(ValueError, match='streams do not nest'), stream(model):
        model(frame)
    with stream(model), pytest.raises(ValueError, match='streams do not nest'):
        model.backbone(frame, None, True)


@pytest.mark.slow
def test_ten_thousand_frames():
    """The rule, weights and inputs that grow most: full steps in one direction, no decay, all of the momentum kept.

    Without the limit, the norms are over a million times those of the learned memory at the end.
    """
    torch.manual_seed(0)
    branch = GlobalBranch(4, 16, chunk_size=4, update_rule='parallel')
    memory = branch.memory
    step, momentum, decay = memory.generators[2].bias.data.chunk(3)
    step.fill_(4)
    momentum.fill_(20)  # to float32 a sigmoid of one
    decay.fill_(-200)
    still = torch.randn(4, 2, 2)
    limit = MAX_STATE_NORM * global_branch._norm(memory.w1, memory.w2)
    state = None
    with torch.inference_mode():
        for _ in range(10_000):
            y, state = branch(torch.stack((still, 1e3 * torch.randn(4, 2, 2))), state, return_state=True)
    assert y.isfinite().all()
    for pair in (state[:2], state[2:]):
        norms = global_branch._norm(*pair)
        assert norms.isfinite().all() and (norms <= 1.0001 * limit).all()
    assert (global_branch._norm(*state[:2]) > 0.99 * limit).all(), 'the limit was reached'
