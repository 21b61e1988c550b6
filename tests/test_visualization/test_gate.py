"""The parts of gated blocks: what the block computes, and nothing of it changed by looking."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convneur_mm.models import ConvNeur
from convneur_mm.models.blocks import ConvNeurBlock
from convneur_mm.ops.neural_memory import UpdateGenerators
from convneur_mm.ops.neural_memory.reference import neural_memory_reference
from convneur_mm.visualization import GateRecorder, local_only_features
from convneur_mm.visualization.gate import gated_blocks

TINY = dict(depths=[2, 1, 2, 1], channels=[8, 16, 24, 32], mem_channels=16)


def make_backbone(**options):
    """With weights as if it had learned something: as constructed, GRN does nothing."""
    backbone = ConvNeur(**{'arch': TINY, 'memory_cfg': dict(chunk_size=7), **options}).eval()
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return backbone


def record(backbone, image):
    with torch.no_grad(), GateRecorder(backbone) as recorder:
        outputs = backbone(image)
    return recorder, outputs


def plain_local(block, x):
    """F_loc by the layers themselves."""
    x = block.norm(block.depthwise_conv(x)).permute(0, 2, 3, 1)
    return block.pointwise_conv2(block.grn(F.gelu(block.pointwise_conv1(x)))).permute(0, 3, 1, 2)


def plain_context(block, x):
    """G by the layers and the reference of the memory."""
    branch = block.global_branch
    memory, tokens = branch.memory, branch.reduce(x).flatten(2).mT
    q, k, v = (layer(memory.norm(tokens)).unflatten(2, (memory.num_heads, -1)).transpose(1, 2)
               for layer in (memory.query, memory.key, memory.value))
    first, _, last = memory.generators
    y, _ = neural_memory_reference(
        q, k, v, memory.w1, memory.w2, UpdateGenerators(first.weight, first.bias, last.weight, last.bias), None,
        memory.options(tokens.size(1)))
    return branch.expand(memory.proj(y.transpose(1, 2).flatten(2)).mT.unflatten(2, x.shape[2:]))


@pytest.mark.parametrize('retrieve', ['previous', 'final'])
def test_the_parts_are_those_of_the_equations(retrieve, both_codes):
    backbone = make_backbone(memory_cfg=dict(chunk_size=7, retrieve=retrieve)).double()
    seen = {}
    for block in gated_blocks(backbone).values():
        block.register_forward_hook(lambda block, args, output: seen.update({block: (args[0], output)}))
    recorder, _ = record(backbone, torch.randn(2, 3, 75, 101, dtype=torch.float64))
    assert [part.name for part in recorder.parts] == [f'stage{i}.block1' for i in (1, 2, 3, 4)]
    for part, block in zip(recorder.parts, gated_blocks(backbone).values()):
        x, output = seen[block]
        close = dict(rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(part.before, plain_local(block, x), **close)
        torch.testing.assert_close(part.context, plain_context(block, x), **close)
        torch.testing.assert_close(part.after, part.before / (1 + (-part.context).exp()), **close)  # Eq. 6
        assert torch.equal(part.gate * part.before, part.after)
        assert torch.equal(x + part.after, output)
        torch.testing.assert_close(part.influence, sum(
            abs(part.before[:, c] - part.after[:, c]) for c in range(part.before.size(1))), **close)
        assert part.before.shape[2:] == tuple(size // part.stride for size in (75, 101))
        assert part.memory.num_tokens == part.before[0, 0].numel() and part.memory.surprise.size(1) == 2


@pytest.mark.parametrize('options', [
    dict(arch='m1', memory_cfg=dict(chunk_size=196)),
    dict(arch='m1', memory_cfg=dict(chunk_size=4096, inner_step=1e-3)),
    dict(memory_cfg=dict(chunk_size=7, retrieve='final')),
    dict(fusion='concat', placement='block', channels_last=False),
    dict(global_branch='cbam', memory_cfg=None),
])
def test_looking_changes_no_bit(options):
    backbone = make_backbone(**options)
    image = torch.randn(1, 3, 130, 107)
    with torch.no_grad():
        expected = backbone(image)
    _, outputs = record(backbone, image)
    assert all(torch.equal(*pair) for pair in zip(expected, outputs))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())


def test_local_only_features_are_those_of_a_backbone_without_global_path():
    backbone = make_backbone(placement='block').double()
    alone = ConvNeur(arch=TINY, placement='none').double()
    alone.load_state_dict({name: x for name, x in backbone.state_dict().items() if 'global_branch' not in name})
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    expected = []
    for module in alone.modules():
        if isinstance(module, ConvNeurBlock):
            module.register_forward_hook(lambda block, args, output: expected.append(output - args[0]))
    alone(image)
    found = local_only_features(backbone, image)
    assert list(found) == [(1, 1), (1, 2), (2, 1), (3, 1), (3, 2), (4, 1)]
    recorder, _ = record(backbone, image)
    for x, (place, y), part in zip(expected, found.items(), recorder.parts):
        torch.testing.assert_close(y, x, rtol=1e-10, atol=1e-12)
        assert torch.equal(part.local_only, y) and (part.stage, part.block) == place
    # The first block has the same input either way.
    assert torch.equal(recorder.parts[0].local_only, recorder.parts[0].before)
    assert not torch.allclose(recorder.parts[1].local_only, recorder.parts[1].before)


def test_arrays_of_one_image():
    recorder, _ = record(make_backbone(), torch.randn(2, 3, 64, 96))
    part = recorder.parts[1]
    arrays = part.arrays(image=1)
    assert arrays['before'].shape == (16, 8, 12) and arrays['influence'].shape == (8, 12)
    assert (arrays['gate'] == part.gate[1].numpy()).all()
    assert arrays['chunk'].ravel().tolist() == [i // 7 for i in range(96)]
    assert arrays['surprise'].shape == (13, 16) and arrays['write_norm'].shape == (13, 1)
    assert (arrays['decay'] == part.memory.decay[:, 1].numpy()).all()


@pytest.mark.parametrize('fusion', ['add', 'concat'])
def test_other_fusions_have_no_gate_but_the_other_parts(fusion):
    backbone = make_backbone(fusion=fusion).double()
    recorder, _ = record(backbone, torch.randn(1, 3, 64, 64, dtype=torch.float64))
    for part, block in zip(recorder.parts, gated_blocks(backbone).values()):
        expected = part.before + part.context if fusion == 'add' else block.fuse(
            torch.cat((part.before, part.context), 1))
        assert torch.equal(part.after, expected)
        assert part.gate is None and 'gate' not in part.arrays() and 'surprise' in part.arrays()


def test_other_branches_have_no_chunks_but_the_other_parts():
    recorder, _ = record(make_backbone(global_branch='cbam', memory_cfg=None), torch.randn(1, 3, 64, 64))
    assert {part.branch for part in recorder.parts} == {'cbam'}
    assert set(recorder.parts[0].arrays()) == {'local_only', 'before', 'context', 'gate', 'after', 'influence'}


class Model(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


@pytest.mark.parametrize('model, message', [
    (Model(nn.Linear(1, 1)), 'backbone of a Model must be a ConvNeur, and the only one, got a Linear'),
    (nn.ModuleList([make_backbone(), make_backbone()]), 'got 2 of them'),
    (make_backbone(placement='none', memory_cfg=None), "no global branch to show .placement='none'"),
])
def test_a_model_without_parts_is_named(model, message):
    with pytest.raises(ValueError, match=message):
        GateRecorder(model)


def test_a_backbone_that_runs_twice_is_refused():
    backbone, image = make_backbone(), torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match='ran its backbone twice'), GateRecorder(backbone):
        backbone(image)
        backbone(image)
    assert not backbone._forward_hooks
