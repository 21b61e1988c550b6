"""That the memory remembers: it learns to name the values of keys that it was shown earlier in a sequence."""
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convneur_mm.models import NeuralMemory

KEYS, VALUES, TOKENS = 12, 8, 256


def draw_recall(batch: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, shown values (VALUES stands for none: the second half of the tokens asks) and the true values."""
    table = torch.randint(VALUES, (batch, KEYS), generator=g)
    keys = torch.randint(KEYS, (batch, TOKENS), generator=g)
    values = table.gather(1, keys)
    shown = values.clone()
    shown[:, TOKENS // 2:] = VALUES
    return keys, shown, values


def recall_accuracy(**memory_cfg) -> float:
    """Trains key-value recall for 150 iterations and returns the share of values named right."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    model = nn.ModuleDict(dict(
        key=nn.Embedding(KEYS, 64), value=nn.Embedding(VALUES + 1, 64),
        memory=NeuralMemory(64, chunk_size=32, **memory_cfg), norm=nn.LayerNorm(64), head=nn.Linear(64, VALUES)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    def logits(keys, shown):
        x = model['memory'](model['key'](keys) + model['value'](shown))
        return model['head'](model['norm'](x))[:, TOKENS // 2:]

    for _ in range(150):
        keys, shown, values = draw_recall(32, g)
        loss = F.cross_entropy(logits(keys, shown).flatten(0, 1), values[:, TOKENS // 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        keys, shown, values = draw_recall(256, g)
        return (logits(keys, shown).argmax(-1) == values[:, TOKENS // 2:]).float().mean().item()


@pytest.mark.parametrize('options', [
    pytest.param({}, id='default'), pytest.param(dict(retrieve='final'), id='final', marks=pytest.mark.slow),
    pytest.param(dict(update_rule='parallel'), id='parallel', marks=pytest.mark.slow)])
def test_recall(options):
    assert recall_accuracy(**options) >= 0.99


@pytest.mark.slow
def test_recall_with_the_kernels_in_pytorch():
    assert recall_accuracy(backend='torch') >= 0.99


@pytest.mark.slow
def test_no_recall_without_writing():
    """What the decay alone can tell of a sequence does not name its values."""
    assert recall_accuracy(inner_step=0.0) <= 0.40
