"""Titans' memory as context against its equations, segment by segment, and what a token sees of others."""
import plain_convneur
import pytest
import torch
import torch.nn.functional as F

from convneur_mm.models.global_branches import MemoryAsContext

SIZE = (4, 5)


def make(**options) -> MemoryAsContext:
    mixer = MemoryAsContext(8, **dict(dict(chunk_size=6, num_persistent=3, head_dim=4, hidden_dim=2), **options))
    mixer = mixer.double()
    with torch.no_grad():
        for param in mixer.parameters():
            param.add_(0.5 * torch.randn_like(param))
    return mixer


def plain(mixer: MemoryAsContext, tokens: torch.Tensor, segment_size: int) -> torch.Tensor:
    """One image (N, Cm), with the memory's plain form."""
    own = {name: value.detach() for name, value in mixer.named_parameters()}
    heads, d = own['memory.w1'].shape[:2]
    options = {name: getattr(mixer.memory, name) for name in ('inner_step', 'max_write_norm', 'head_dim')}

    def split(x):
        return [x[:, h * d:(h + 1) * d] for h in range(heads)]

    def unit(x):
        return [plain_convneur.unit(head) for head in split(x)]

    def read(z, memory):
        return torch.cat([plain_convneur.read(z[h], memory[h]) for h in range(heads)], dim=1)

    x = F.layer_norm(tokens, tokens.shape[-1:], own['memory.norm.weight'], own['memory.norm.bias'], 1e-6)
    memory = [(own['memory.w1'][h], own['memory.w2'][h]) for h in range(heads)]
    momentum = [(torch.zeros_like(w1), torch.zeros_like(w2)) for w1, w2 in memory]
    outputs = []
    for segment in x.split(segment_size):
        h_t = read(unit(segment @ own['memory.query.weight'].T), memory)

        context = torch.cat((own['persistent'], h_t, segment))
        attended = []
        for q, k, v in zip(*(split(context @ own[f'attention.{name}.weight'].T) for name in ('query', 'key', 'value'))):
            attended.append((q @ k.T / d ** 0.5).softmax(dim=1) @ v)
        y = (torch.cat(attended, dim=1) @ own['attention.output.weight'].T)[-len(segment):]

        keys, values = unit(y @ own['memory.key.weight'].T), split(y @ own['memory.value.weight'].T)
        memory = [tuple(w.detach().requires_grad_() for w in pair) for pair in memory]
        plain_convneur.write(keys, values, memory, memory, momentum, plain_convneur.part(own, 'memory'), options)
        outputs.append(y * read(unit(y), memory))
    return torch.cat(outputs) @ own['memory.proj.weight'].T


@pytest.mark.parametrize('options, segment_size', [
    (dict(), 6), (dict(chunk_size=1), 1), (dict(chunk_size=20), 20), (dict(chunk_size=100), 20),
    (dict(num_chunks=3), 7), (dict(inner_step=0.25), 6), (dict(max_write_norm=0.2), 6), (dict(num_persistent=1), 6),
    (dict(head_dim=8), 6), (dict(hidden_dim=3), 6), (dict(backend='reference'), 6),
], ids=str)
def test_equals_the_equations(options, segment_size):
    mixer = make(**options)
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    expected = torch.stack([plain(mixer, image, segment_size) for image in x])
    torch.testing.assert_close(mixer(x, SIZE), expected, rtol=0, atol=1e-11)


def test_gradients_equal_those_of_the_reference():
    """Keys and values depend on the memory here, which the inner gradient must not see and the outer one must."""
    mixer = make()
    x = torch.randn(2, 20, 8, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)
    grads = []
    for backend in ('auto', 'reference'):
        mixer.memory.backend = backend
        grads.append(torch.autograd.grad(mixer(x, SIZE), [x, *mixer.parameters()], direction))
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_options_change_the_output():
    """Otherwise the equations above would not show that they are followed."""
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    base = make()
    for options in (dict(chunk_size=4), dict(num_chunks=2), dict(inner_step=0.25), dict(max_write_norm=0.2)):
        other = make(**options)
        other.load_state_dict(base.state_dict())
        assert (other(x, SIZE) - base(x, SIZE)).norm() > 1e-3 * base(x, SIZE).norm(), options


def test_tokens_see_their_own_segment_and_all_before():
    mixer = make()
    x = torch.randn(1, 20, 8, dtype=torch.float64, requires_grad=True)
    seen, = torch.autograd.grad(mixer(x, SIZE)[0, 6].sum(), x)  # the first token of the second segment
    assert (seen[0].abs().sum(1) > 0).tolist() == [True] * 12 + [False] * 8


def test_memory_starts_with_each_image():
    mixer = make()
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    first = mixer(x, SIZE)
    torch.testing.assert_close(mixer(x, SIZE), first, rtol=0, atol=0)


@pytest.mark.parametrize('options, message', [
    (dict(num_persistent=0), 'num_persistent must be an integer of at least 1, got 0'),
    (dict(num_persistent=True), 'num_persistent must be an integer of at least 1, got True'),
])
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
