"""Titans' memory as context against its equations, segment by segment, and what a token sees of others."""
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
    """One image (N, Cm), its memories head by head; the inner gradient by autograd."""
    own = {name: value.detach() for name, value in mixer.named_parameters()}
    heads, d = own['memory.w1'].shape[:2]
    step_size, bound = mixer.memory.inner_step, mixer.memory.max_write_norm

    def split(x):
        return [x[:, h * d:(h + 1) * d] for h in range(heads)]

    def unit(x):
        return [part / part.norm(dim=1, keepdim=True).clamp_min(1e-2) for part in split(x)]

    def read(z, w1, w2):
        return z + F.gelu(z @ w1) @ w2

    x = F.layer_norm(tokens, tokens.shape[-1:], own['memory.norm.weight'], own['memory.norm.bias'], 1e-6)
    state = [(own['memory.w1'][h], own['memory.w2'][h], 0.0, 0.0) for h in range(heads)]
    outputs = []
    for segment in x.split(segment_size):
        q = unit(segment @ own['memory.query.weight'].T)
        h_t = torch.cat([read(q[h], *state[h][:2]) for h in range(heads)], dim=1)

        context = torch.cat((own['persistent'], h_t, segment))
        attended = []
        for q, k, v in zip(*(split(context @ own[f'attention.{name}.weight'].T) for name in ('query', 'key', 'value'))):
            attended.append((q @ k.T / d ** 0.5).softmax(dim=1) @ v)
        y = (torch.cat(attended, dim=1) @ own['attention.output.weight'].T)[-len(segment):]

        keys, values = unit(y @ own['memory.key.weight'].T), split(y @ own['memory.value.weight'].T)
        errors, gradients = [], []
        for k, v, (w1, w2, *_) in zip(keys, values, state):
            w1, w2 = (w.clone().requires_grad_() for w in (w1, w2))
            error = read(k, w1, w2) - v
            gradients.append(torch.autograd.grad(error.square().mean(1).sum(), (w1, w2)))
            errors.append(error.detach().square().mean(0))
        hidden = F.gelu(own['memory.generators.0.weight'] @ torch.cat(errors) + own['memory.generators.0.bias'])
        generated = own['memory.generators.2.weight'] @ hidden + own['memory.generators.2.bias']
        theta, eta, alpha = (c.view(heads, d) for c in generated.sigmoid().chunk(3))
        for h, ((w1, w2, p1, p2), (g1, g2)) in enumerate(zip(state, gradients)):
            u1, u2 = step_size * theta[h][:, None] * g1, step_size * theta[h] * g2
            shrink = (1 + (u1.square().sum() + u2.square().sum()) / bound ** 2) ** -0.5
            p1, p2 = eta[h][:, None] * p1 - shrink * u1, eta[h] * p2 - shrink * u2
            state[h] = (1 - alpha[h][:, None]) * w1 + p1, (1 - alpha[h]) * w2 + p2, p1, p2
        outputs.append(y * torch.cat([read(z, *state[h][:2]) for h, z in enumerate(unit(y))], dim=1))
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
    for backend in ('chunked', 'reference'):
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
    (dict(chunk_size=0), 'chunk_size must be an integer of at least 1, got 0'),
    (dict(head_dim=3), 'channels=8, head_dim=3'),
    (dict(backend='fast'), "backend must be one of .*got 'fast'"),
])
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
