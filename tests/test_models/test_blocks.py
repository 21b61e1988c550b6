"""The blocks of the backbone: what they drop while training."""
import pytest
import torch

from convneur_mm.models.blocks import ConvNeurBlock


def update(block: ConvNeurBlock, x: torch.Tensor) -> torch.Tensor:
    """What a block adds to (N, C, H, W), the same for each equal image unless it is dropped."""
    with torch.no_grad():
        return block(x) - x


@pytest.mark.parametrize('rate', [0.25, 0.8])
def test_drop_path(rate):
    """Whole images are dropped, others scaled so that the mean stays; nothing is dropped outside training."""
    torch.manual_seed(0)
    block = ConvNeurBlock(4, drop_path_rate=rate).eval()
    x = torch.randn(1, 4, 3, 3).repeat(4000, 1, 1, 1)
    full = update(block, x)
    assert (full != 0).flatten(1).any(1).all()
    block.train()
    found = update(block, x)
    dropped = (found == 0).flatten(1).all(1)
    assert abs(dropped.float().mean() - rate) < 0.05
    assert torch.allclose(found[~dropped], full[~dropped] / (1 - rate), atol=1e-5)


def test_drop_path_adds_no_names_to_checkpoints():
    with_rate, without = ConvNeurBlock(4, drop_path_rate=0.5), ConvNeurBlock(4)
    assert list(with_rate.state_dict()) == list(without.state_dict())


@pytest.mark.needs('mmcv')
def test_drop_path_is_that_of_mmcv():
    """As mmpretrain's ConvNeXt uses it: the same values, drawn in another way."""
    from mmcv.cnn.bricks import DropPath

    x = torch.ones(4000, 2, 3, 3)
    ours, theirs = ConvNeurBlock(2, drop_path_rate=0.3).drop_path, DropPath(0.3)
    torch.manual_seed(0)
    found, expected = ours(x), theirs(x)
    assert torch.equal(found.unique(), expected.unique())
    assert abs(found.mean() - expected.mean()) < 0.05
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
