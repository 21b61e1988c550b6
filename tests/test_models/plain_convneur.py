"""ConvNeur written a second time from the paper's equations: plain, slow, and without a line of the package.

Loops over images, chunks and heads; autograd for the inner gradient; every parameter under its name in a checkpoint.
The tests compare the package with these functions and with vectors stored from them, which
``python tests/test_models/plain_convneur.py`` writes to ``data/convneur.npz``. Stored vectors stay as they are unless
the model itself is meant to change: compare before you overwrite them.
"""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
Heads = list[tuple[Tensor, Tensor]]  # W1 and W2 of each, or their momentum

VECTORS = Path(__file__).parent / 'data' / 'convneur.npz'
STORED_VALUES = 100  # of each output at most

MEMORY_DEFAULTS = dict(chunk_size=196, inner_step=1.0, head_dim=16, hidden_dim=8, update_rule='sequential',
                       retrieve='previous', max_write_norm=1.0)
ARCHS = {'m1': dict(depths=[2, 2, 6, 2], channels=[40, 80, 160, 320], mem_channels=80)}

# Options of GlobalBranch(in_channels, mem_channels, **memory_cfg), and the shape of its input.
GLOBAL = dict(in_channels=6, mem_channels=32, chunk_size=9)
GLOBAL_CASES = {name: (dict(GLOBAL, **options), (2, 6, 5, 8)) for name, options in {
    'chunks of 9': dict(),
    'chunks of 40': dict(chunk_size=40),
    'chunks of 1': dict(chunk_size=1),
    'inner_step': dict(inner_step=0.25),
    'update_rule': dict(update_rule='parallel'),
    'retrieve': dict(retrieve='final'),
    'parallel and final': dict(update_rule='parallel', retrieve='final'),
    'max_write_norm': dict(max_write_norm=0.3),
    'head_dim': dict(head_dim=8),
    'hidden_dim': dict(hidden_dim=4),
    'mem_channels': dict(mem_channels=48),
}.items()}
GLOBAL_CASES['one image'] = (GLOBAL, (1, 6, 7, 3))
GLOBAL_CASES['one token'] = (GLOBAL, (1, 6, 1, 1))
GLOBAL_CASES['defaults'] = (dict(in_channels=6, mem_channels=16), (1, 6, 15, 17))

# Options of a block (memory: those of its GlobalBranch, None for a block without), and the shape of its input: of fewer
# and of more positions than the block has hidden channels.
BLOCK_MEMORY = dict(mem_channels=16, chunk_size=4)
BLOCK_CASES = {
    f'{name} {height}x{width}': (dict(channels=6, fusion=fusion, memory=memory), (2, 6, height, width))
    for height, width in ((3, 5), (9, 7))
    for name, fusion, memory in (('gate', 'gate', BLOCK_MEMORY), ('add', 'add', BLOCK_MEMORY),
                                 ('concat', 'concat', BLOCK_MEMORY), ('local', 'gate', None))}

# Options of ConvNeur, and the shape of its images. The stages' maps have 9x13, 4x6 and 2x3 positions.
ARCH = dict(depths=[1, 2, 1], channels=[6, 8, 10], mem_channels=16)
MEMORY = dict(chunk_size=5)
BACKBONE = dict(arch=ARCH, memory_cfg=MEMORY, out_indices=(0, 1, 2))
BACKBONE_CASES = {name: (dict(BACKBONE, **options), (1, options.get('in_channels', 3), 36, 52)) for name, options in {
    'base': dict(),
    'depths': dict(arch=dict(ARCH, depths=[2, 1, 1])),
    'channels': dict(arch=dict(ARCH, channels=[6, 8, 12])),
    'arch mem_channels': dict(arch=dict(ARCH, mem_channels=32)),
    'mem_channels': dict(memory_cfg=dict(MEMORY, mem_channels=48)),
    'chunk_size': dict(memory_cfg=dict(chunk_size=4)),
    'inner_step': dict(memory_cfg=dict(MEMORY, inner_step=0.25)),
    'update_rule': dict(memory_cfg=dict(MEMORY, update_rule='parallel')),
    'retrieve': dict(memory_cfg=dict(MEMORY, retrieve='final')),
    'max_write_norm': dict(memory_cfg=dict(MEMORY, max_write_norm=0.3)),
    'head_dim': dict(memory_cfg=dict(MEMORY, head_dim=8)),
    'hidden_dim': dict(memory_cfg=dict(MEMORY, hidden_dim=4)),
    'placement block': dict(placement='block'),
    'placement none': dict(placement='none'),
    'fusion add': dict(fusion='add'),
    'fusion concat': dict(fusion='concat'),
    'out_indices': dict(out_indices=(0, 2)),
    'one of out_indices': dict(out_indices=1),
    'gap_before_final_norm': dict(gap_before_final_norm=True),
    'in_channels 1': dict(in_channels=1),
    'in_channels 4': dict(in_channels=4),
}.items()}
BACKBONE_CASES['two images'] = (BACKBONE, (2, 3, 36, 52))
BACKBONE_CASES['m1'] = (dict(arch='m1', out_indices=(0, 1, 2, 3)), (1, 3, 64, 96))


# Names and shapes of the parameters, and their values

def with_prefix(prefix: str, shapes: Shapes) -> Shapes:
    return {f'{prefix}.{name}': shape for name, shape in shapes.items()}


def part(weights: Weights, prefix: str) -> Weights:
    """The weights of one part, by their names within it."""
    return {name[len(prefix) + 1:]: value for name, value in weights.items() if name.startswith(f'{prefix}.')}


def without(options: dict, *names: str) -> dict:
    return {name: value for name, value in options.items() if name not in names}


def linear_shapes(inputs: int, outputs: int, bias: bool = True) -> Shapes:
    return dict(weight=(outputs, inputs), bias=(outputs,)) if bias else dict(weight=(outputs, inputs))


def conv_shapes(inputs: int, outputs: int, size: int) -> Shapes:
    return dict(weight=(outputs, inputs, size, size), bias=(outputs,))


def norm_shapes(channels: int) -> Shapes:
    return dict(weight=(channels,), bias=(channels,))


def global_shapes(in_channels: int, mem_channels: int, head_dim: int = 16, hidden_dim: int = 8, **_) -> Shapes:
    heads = mem_channels // head_dim
    return {
        **with_prefix('reduce', conv_shapes(in_channels, mem_channels, 1)),
        'memory.w1': (heads, head_dim, hidden_dim),
        'memory.w2': (heads, hidden_dim, head_dim),
        **with_prefix('memory.norm', norm_shapes(mem_channels)),
        **with_prefix('memory.query', linear_shapes(mem_channels, mem_channels, bias=False)),
        **with_prefix('memory.key', linear_shapes(mem_channels, mem_channels, bias=False)),
        **with_prefix('memory.value', linear_shapes(mem_channels, mem_channels, bias=False)),
        **with_prefix('memory.generators.0', linear_shapes(mem_channels, 4 * mem_channels)),
        **with_prefix('memory.generators.2', linear_shapes(4 * mem_channels, 3 * mem_channels)),
        **with_prefix('memory.proj', linear_shapes(mem_channels, mem_channels, bias=False)),
        **with_prefix('expand', conv_shapes(mem_channels, in_channels, 1)),
    }


def block_shapes(channels: int, memory: dict | None, fusion: str) -> Shapes:
    shapes = {
        **with_prefix('depthwise_conv', conv_shapes(1, channels, 7)),
        **with_prefix('norm', norm_shapes(channels)),
        **with_prefix('pointwise_conv1', linear_shapes(channels, 4 * channels)),
        'grn.gamma': (4 * channels,),
        'grn.beta': (4 * channels,),
        **with_prefix('pointwise_conv2', linear_shapes(4 * channels, channels)),
    }
    if memory is not None:
        shapes |= with_prefix('global_branch', global_shapes(channels, **memory))
        if fusion == 'concat':
            shapes |= with_prefix('fuse', conv_shapes(2 * channels, channels, 1))
    return shapes


def layout(arch: str | dict, memory_cfg: dict | None = None, placement: str = 'stage',
           out_indices: int | tuple[int, ...] = (0, 1, 2, 3), **_) -> tuple[list, tuple[int, ...]]:
    """For each stage built its channels and its blocks' memories, and the stages returned."""
    arch = ARCHS.get(arch, arch) if isinstance(arch, str) else arch
    memory = dict(dict(mem_channels=arch['mem_channels']), **(memory_cfg or {}))
    returned = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
    stages = []
    for depth, channels in zip(arch['depths'][:max(returned) + 1], arch['channels']):
        has_memory = {'none': [False] * depth, 'stage': [True] + [False] * (depth - 1), 'block': [True] * depth}
        stages.append((channels, [memory if has else None for has in has_memory[placement]]))
    return stages, returned


def backbone_shapes(in_channels: int = 3, fusion: str = 'gate', **options) -> Shapes:
    stages, returned = layout(**options)
    shapes, inputs = {}, in_channels
    for i, (channels, memories) in enumerate(stages):
        norm, conv = (1, 0) if i == 0 else (0, 1)
        shapes |= with_prefix(f'downsample_layers.{i}.{norm}', norm_shapes(channels if i == 0 else inputs))
        shapes |= with_prefix(f'downsample_layers.{i}.{conv}', conv_shapes(inputs, channels, 4 if i == 0 else 2))
        for j, memory in enumerate(memories):
            shapes |= with_prefix(f'stages.{i}.{j}', block_shapes(channels, memory, fusion))
        if i in returned:
            shapes |= with_prefix(f'norm{i}', norm_shapes(channels))
        inputs = channels
    return shapes


def uniform(shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    """Of mean 0 and variance 1."""
    return torch.from_numpy(rng.uniform(-3**0.5, 3**0.5, shape))


def draw(shapes: Shapes, seed: int = 0) -> Weights:
    """Weights under which the memory matters: errors of about 1, writes near their bound, gates from 0.1 to 0.9."""
    rng, weights = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        value = uniform(shape, rng)
        if name.endswith(('.w1', '.w2')):
            value /= shape[1]**0.5
        elif len(shape) > 1:
            value /= math.prod(shape[1:])**0.5
            if name.endswith(('value.weight', 'proj.weight', 'expand.weight')):
                value *= 2
        elif 'grn.' in name:
            value *= 0.5
        else:
            value *= 0.3
            if name.endswith('.weight'):  # LayerNorm's
                value += 1
        weights[name] = value.requires_grad_()
    return weights


# The model

def layer_norm(x: Tensor, w: Weights) -> Tensor:
    """Over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + 1e-6).sqrt() * w['weight'] + w['bias']


def layer_norm_2d(x: Tensor, w: Weights) -> Tensor:
    """Over the channels of (B, C, H, W)."""
    return layer_norm(x.movedim(1, 3), w).movedim(3, 1)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def linear(x: Tensor, w: Weights) -> Tensor:
    return x @ w['weight'].T + w.get('bias', 0)


def patch_conv(x: Tensor, w: Weights) -> Tensor:
    """A convolution whose stride is its size; what is left at the right and lower borders is not seen."""
    size = w['weight'].shape[-1]
    height, width = x.shape[2] // size, x.shape[3] // size
    patches = x[:, :, :height * size, :width * size].reshape(len(x), -1, height, size, width, size)
    return torch.einsum('bciujv,ocuv->boij', patches, w['weight']) + w['bias'][:, None, None]


def depthwise_conv(x: Tensor, w: Weights) -> Tensor:
    """7×7, zeros around the map."""
    height, width = x.shape[2:]
    padded = F.pad(x, (3, 3, 3, 3))
    shifted = [w['weight'][:, 0, i, j, None, None] * padded[:, :, i:i + height, j:j + width]
               for i in range(7) for j in range(7)]
    return sum(shifted) + w['bias'][:, None, None]


def grn(x: Tensor, w: Weights) -> Tensor:
    """Global response normalisation of ConvNeXt-V2, on (B, H, W, C)."""
    response = (x**2).sum((1, 2), keepdim=True).sqrt()
    return w['gamma'] * (x * response / (response.mean(-1, keepdim=True) + 1e-6)) + w['beta'] + x


def read(z: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
    """M(z) = z + GELU(z·W1)·W2."""
    return z + gelu(z @ memory[0]) @ memory[1]


def unit(z: Tensor) -> Tensor:
    """Tokens (N, d) of length 1; the short ones, such as those of zeros, are divided by 0.01."""
    return z / (z**2).sum(1, keepdim=True).sqrt().clamp_min(0.01)


def write(k: list[Tensor], v: list[Tensor], at: Heads, memory: Heads, momentum: Heads, w: Weights,
          o: dict) -> list[float]:
    """Writes a chunk to ``memory`` and ``momentum``, with gradients at the memory ``at``; norms before their bound."""
    heads, norms = range(len(k)), []
    gradients, surprises = [], []
    for h in heads:
        error = read(k[h], at[h]) - v[h]
        loss = (error**2).mean(1).sum()  # Eq. 3
        gradients.append(torch.autograd.grad(loss, at[h], create_graph=True))
        surprises.append((error**2).mean(0))
    hidden = gelu(linear(torch.cat(surprises), part(w, 'generators.0')))
    step, keep, decay = linear(hidden, part(w, 'generators.2')).sigmoid().chunk(3)
    for h in heads:
        # θ, η and α of the head's channels, on the rows of W1 and the columns of W2
        theta, eta, alpha = (c.split(o['head_dim'])[h] for c in (o['inner_step'] * step, keep, decay))
        u1, u2 = theta[:, None] * gradients[h][0], theta[None, :] * gradients[h][1]
        norm = ((u1**2).sum() + (u2**2).sum()).sqrt()
        norms.append(norm.item())
        bound = (1 + (norm / o['max_write_norm'])**2).sqrt()
        p1 = eta[:, None] * momentum[h][0] - u1 / bound  # Eq. 4
        p2 = eta[None, :] * momentum[h][1] - u2 / bound
        momentum[h] = p1, p2
        memory[h] = (1 - alpha[:, None]) * memory[h][0] + p1, (1 - alpha[None, :]) * memory[h][1] + p2
    return norms


def neural_memory(x: Tensor, w: Weights, write_norms: list[float] | None = None, **options) -> Tensor:
    """Steps 1 to 5 of the memory on the tokens (N, Cm) of one image; norms before their bound go to ``write_norms``."""
    o = dict(MEMORY_DEFAULTS, **options)
    heads = range(len(w['w1']))
    s = layer_norm(x, part(w, 'norm'))
    q, k, v = (linear(s, part(w, name)).split(o['head_dim'], dim=1) for name in ('query', 'key', 'value'))
    q, k = [unit(q[h]) for h in heads], [unit(k[h]) for h in heads]
    initial = [(w['w1'][h], w['w2'][h]) for h in heads]
    memory = list(initial)
    momentum = [(torch.zeros_like(w1), torch.zeros_like(w2)) for w1, w2 in initial]
    outputs = []
    for start in range(0, len(x), o['chunk_size']):
        chunk = slice(start, start + o['chunk_size'])
        outputs.append(torch.cat([read(q[h][chunk], memory[h]) for h in heads], dim=1))  # Eq. 2
        at = memory if o['update_rule'] == 'sequential' else initial
        norms = write([k[h][chunk] for h in heads], [v[h][chunk] for h in heads], at, memory, momentum, w, o)
        if write_norms is not None:
            write_norms += norms
    y = torch.cat(outputs)
    if o['retrieve'] == 'final':
        y = torch.cat([read(q[h], memory[h]) for h in heads], dim=1)
    return linear(y, part(w, 'proj'))


def global_map(x: Tensor, w: Weights, **options) -> Tensor:
    """G of (B, C, H, W): tokens in row-major order."""
    height, width = x.shape[2:]
    maps = []
    for image in x:
        tokens = torch.stack([image[:, i, j] for i in range(height) for j in range(width)])
        tokens = tokens @ w['reduce.weight'][:, :, 0, 0].T + w['reduce.bias']
        tokens = neural_memory(tokens, part(w, 'memory'), **options)
        tokens = tokens @ w['expand.weight'][:, :, 0, 0].T + w['expand.bias']
        rows = [torch.stack([tokens[i * width + j] for j in range(width)], dim=1) for i in range(height)]
        maps.append(torch.stack(rows, dim=1))
    return torch.stack(maps)


def local_features(x: Tensor, w: Weights) -> Tensor:
    """F_loc, Sec. 3.2."""
    x = layer_norm(depthwise_conv(x, part(w, 'depthwise_conv')).movedim(1, 3), part(w, 'norm'))
    x = grn(gelu(linear(x, part(w, 'pointwise_conv1'))), part(w, 'grn'))
    return linear(x, part(w, 'pointwise_conv2')).movedim(3, 1)


def block(x: Tensor, w: Weights, memory: dict | None, fusion: str) -> Tensor:
    local = local_features(x, w)
    if memory is None:
        return x + local
    context = global_map(x, part(w, 'global_branch'), **without(memory, 'mem_channels'))
    if fusion == 'gate':
        return x + 1 / (1 + torch.exp(-context)) * local  # Eq. 6
    if fusion == 'add':
        return x + local + context
    both = torch.cat((local, context), dim=1)
    return x + torch.einsum('oc,bchw->bohw', w['fuse.weight'][:, :, 0, 0], both) + w['fuse.bias'][:, None, None]


def backbone(x: Tensor, w: Weights, fusion: str = 'gate', gap_before_final_norm: bool = False,
             **options) -> list[Tensor]:
    stages, returned = layout(**options)
    outputs = []
    for i, (_, memories) in enumerate(stages):
        if i == 0:
            x = layer_norm_2d(patch_conv(x, part(w, 'downsample_layers.0.0')), part(w, 'downsample_layers.0.1'))
        else:
            x = layer_norm_2d(x, part(w, f'downsample_layers.{i}.0'))
            x = patch_conv(x, part(w, f'downsample_layers.{i}.1'))
        for j, memory in enumerate(memories):
            x = block(x, part(w, f'stages.{i}.{j}'), memory, fusion)
        if i in returned:
            norm = part(w, f'norm{i}')
            outputs.append(layer_norm(x.mean((2, 3)), norm) if gap_before_final_norm else layer_norm_2d(x, norm))
    return outputs


# The cases

KINDS = {'global': GLOBAL_CASES, 'block': BLOCK_CASES, 'backbone': BACKBONE_CASES}


def case(kind: str, name: str) -> tuple[dict, Weights, Tensor]:
    """Options, weights and input; both of the last are leaves."""
    options, shape = KINDS[kind][name]
    shapes = {'global': global_shapes, 'block': block_shapes, 'backbone': backbone_shapes}[kind]
    return options, draw(shapes(**options)), uniform(shape, np.random.default_rng(1)).requires_grad_()


def run(kind: str, options: dict, weights: Weights, x: Tensor) -> list[Tensor]:
    """The outputs of a case."""
    if kind == 'global':
        return [global_map(x, weights, **without(options, 'in_channels', 'mem_channels'))]
    if kind == 'block':
        return [block(x, weights, **without(options, 'channels'))]
    return backbone(x, weights, **without(options, 'in_channels'))


def thinned(output: Tensor) -> np.ndarray:
    """Values spread evenly over an output."""
    values = output.detach().flatten().numpy()
    return values[np.linspace(0, len(values) - 1, min(len(values), STORED_VALUES)).round().astype(int)]


def stored(kind: str, name: str) -> list[np.ndarray]:
    """The vectors of a case of 'global', 'block' or 'backbone', one for each output."""
    with np.load(VECTORS) as vectors:
        return [vectors[key] for key in sorted(vectors.files) if key.rsplit('/', 1)[0] == f'{kind}/{name}']


def assert_close(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-10) -> None:
    """In relative norm; NaN is close to nothing."""
    assert found.shape == expected.shape, what
    error = (found - expected).norm().item()
    assert error <= tolerance * expected.norm().item(), f'{what}: off by {error:.1e} of {expected.norm():.1e}'


def check(module: nn.Module, kind: str, name: str) -> None:
    """Asserts that ``module`` has a case's parameters, outputs and gradients, and its outputs the stored values."""
    options, weights, x = case(kind, name)
    module.double().load_state_dict(weights)
    found = module(x)
    found = list(found) if isinstance(found, tuple) else [found]
    expected, vectors = run(kind, options, weights, x), stored(kind, name)
    assert len(found) == len(expected) == len(vectors)
    for i, (y, plain, vector) in enumerate(zip(found, expected, vectors)):
        assert_close(y, plain, f'output {i}')
        assert_close(torch.from_numpy(thinned(y)), torch.from_numpy(vector), f'output {i} and its stored vector')
    directions = [uniform(tuple(y.shape), np.random.default_rng(2)) for y in expected]
    plain_gradients = torch.autograd.grad(
        expected, [x, *weights.values()], directions, allow_unused=True, materialize_grads=True)
    own = dict(module.named_parameters())
    gradients = torch.autograd.grad(found, [x, *(own[parameter] for parameter in weights)], directions)
    for parameter, gradient, plain in zip(['the input', *weights], gradients, plain_gradients):
        assert_close(gradient, plain, f'gradient of {parameter}', tolerance=1e-9)


def main() -> None:
    vectors = {f'{kind}/{name}/{i}': thinned(output) for kind, cases in KINDS.items() for name in cases
               for i, output in enumerate(run(kind, *case(kind, name)))}
    VECTORS.parent.mkdir(exist_ok=True)
    np.savez_compressed(VECTORS, **vectors)
    print(f'{len(vectors)} vectors, {VECTORS.stat().st_size / 1e3:.0f} kB: {VECTORS}')


if __name__ == '__main__':
    main()
