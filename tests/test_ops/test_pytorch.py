"""The kernels in plain PyTorch: how many operations they launch; their values are test_op.py's and test_layer.py's."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from convneur_mm.ops.neural_memory import UpdateGenerators, neural_memory


class Launches(TorchDispatchMode):
    """Counts what a device would be asked to do: neither views nor fresh memory."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        makes_memory = 'empty' in function.overloadpacket.__name__
        self.number += not function.is_view and not makes_memory
        return function(*args, **(kwargs or {}))


def launches(chunks: int, rule: str) -> tuple[int, int]:
    """Forward and backward, with this many written chunks, on tensors without numbers."""
    batch, heads, d, e, channels = 2, 2, 16, 8, 32

    def empty(*shape):
        return torch.empty(*shape, device='meta', requires_grad=True)

    tokens = [empty(batch, heads, 10 * (chunks + 1), d) for _ in range(3)]
    generators = UpdateGenerators(empty(4 * channels, channels), empty(4 * channels),
                                  empty(3 * channels, 4 * channels), empty(3 * channels))
    with Launches() as forward:
        y, _ = neural_memory(*tokens, empty(heads, d, e), empty(heads, e, d), generators, chunk_size=10,
                             update_rule=rule)
    with Launches() as backward:
        y.sum().backward()
    return forward.number, backward.number


@pytest.mark.parametrize('rule, forward, backward', [('sequential', 24, 46), ('parallel', 10, 15)])
def test_launches_of_a_chunk(rule, forward, backward):
    """On a GPU these, not arithmetic, are what few images of many chunks wait for: none may be added unseen."""
    few, many = launches(20, rule), launches(120, rule)
    assert [(b - a) / 100 for a, b in zip(few, many)] == [forward, backward]
