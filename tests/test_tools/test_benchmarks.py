"""tools/analysis/benchmark.py and benchmark_memory.py at tiny shapes: what they report, not how fast anything is."""
import json
import math
import sys
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from convneur_mm.analysis import bench, cases
from convneur_mm.models import NeuralMemory

TINY_LAYER = ['--tokens', '40', '--chunk-size', '16', '--channels', '16', '--head-dim', '8', '--hidden-dim', '4',
              '--batch', '2', '--repeats', '2']
TINY_IMAGES = ['--shape', '1,32,64', '--chunk-size', '16', '--repeats', '2']
MODES = 'forward', 'forward+backward'


@pytest.fixture(autouse=True)
def small_rates(monkeypatch):
    """Take the machine's rates from small products and copies."""
    monkeypatch.setattr(bench, 'gemm_rate', partial(bench.gemm_rate, size=64))
    monkeypatch.setattr(bench, 'copy_rate', partial(bench.copy_rate, nbytes=2**16))


@pytest.fixture
def layers(script, tmp_path):
    """Run the benchmark of layers and return what it writes."""
    return lambda *args: run(script('benchmark_memory'), tmp_path, *TINY_LAYER, *args)


@pytest.fixture
def models(script, tmp_path):
    """Run the benchmark of models and return what it writes."""
    return lambda *args: run(script('benchmark'), tmp_path, *args)


def run(benchmark, path, *args):
    benchmark.main([*args, '--json', str(path / 'out.json')])
    return json.loads((path / 'out.json').read_text())


def assert_rows(rows, repeats=2):
    for row in rows:
        assert len(row['times_s']) == repeats
        assert min(row['times_s']) == row['min_s'] <= row['median_s'] <= max(row['times_s'])
        for name in ('median_s', 'min_s', 'ratio'):
            assert 0 < row[name] < math.inf
        assert row['name'] != row['baseline'] or row['ratio'] == 1


# ---- the layer


def test_layers_beside_each_other(layers, tmp_path, capsys):
    found = layers('--peers', 'attention', 'non-local', '--plot', str(tmp_path / 'a.png'))
    names = ['memory-sequential', 'memory-parallel', 'attention', 'non-local']
    assert [(row['mode'], row['name']) for row in found['results']] == [(m, n) for m in MODES for n in names]
    assert_rows(found['results'])
    assert all(row['peak_memory_bytes'] > 2 * 40 * 16 * 4 for row in found['results'])  # more than its output
    assert {row['baseline'] for row in found['results']} == {'memory-sequential'}
    assert found['settings']['chunk_size'] == 16
    assert found['machine']['torch'] == torch.__version__
    assert min(found['rates'].values()) > 0
    assert found['floor']['forward']['flops'] * 3 == found['floor']['forward+backward']['flops'] > 0
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
    out = capsys.readouterr().out
    assert out.count('| non-local') == 2 and 'GFLOP' in out


def test_half_precision_reference_forward_only_and_baseline(layers):
    found = layers('--rules', 'sequential', '--backends', 'auto', 'reference', '--peers',
                   '--dtype', 'bfloat16', '--forward-only', '--no-memory', '--baseline', 'memory-sequential:reference')
    assert [row['name'] for row in found['results']] == ['memory-sequential', 'memory-sequential:reference']
    assert_rows(found['results'])
    assert {row['baseline'] for row in found['results']} == {'memory-sequential:reference'}
    assert {row['peak_memory_bytes'] for row in found['results']} == {None}
    assert {row['mode'] for row in found['results']} == {'forward'}


def test_sweep_prints_slopes_and_leaves_attention_out(layers, tmp_path, capsys):
    found = layers('--sweep', '32', '128', '256', '--rules', 'parallel', '--peers',
                   'non-local', '--max-quadratic-tokens', '128', '--forward-only', '--plot', str(tmp_path / 'a.png'))
    assert_rows(found['results'])
    slopes = {row['name']: row for row in found['slopes']}
    assert slopes['memory-parallel']['tokens'] == [32, 128, 256] and slopes['non-local']['tokens'] == [32, 128]
    assert all(math.isfinite(row['time']) and math.isfinite(row['memory']) for row in slopes.values())
    assert slopes['non-local']['memory'] > 1.2 > slopes['memory-parallel']['memory']
    assert [(row['name'], row['tokens']) for row in found['skipped']] == [('non-local', 256)]
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
    captured = capsys.readouterr()
    assert 'exponent of N' in captured.out and 'left out non-local, 256 tokens' in captured.err


def test_sweep_stops_before_it_takes_too_long(layers):
    found = layers('--sweep', '16', '32', '--rules', 'parallel', '--peers',
                   '--max-seconds', '1e-9', '--forward-only')
    assert [row['tokens'] for row in found['results']] == [16] and found['slopes'] == []
    assert '--max-seconds' in found['skipped'][0]['reason']


def test_a_missing_titans_is_left_out(layers, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'titans_pytorch', None)
    found = layers('--rules', 'sequential', '--peers', 'titans-sequential')
    assert {row['name'] for row in found['results']} == {'memory-sequential'}
    assert [row['name'] for row in found['skipped']] == ['titans-sequential']
    assert 'left out titans-sequential: titans_pytorch is not installed' in (err := capsys.readouterr().err)
    assert 'pip install -r requirements/bench.txt' in err


@pytest.mark.needs('titans_pytorch')
def test_titans_has_both_rules(script):
    """M_2 is the first memory whose gradients were taken at M_0 by one and at M_1 by the other."""
    memory = script('benchmark_memory')
    args = memory.parse_args(TINY_LAYER)
    layers = []
    for rule in ('sequential', 'parallel'):
        torch.manual_seed(0)
        layers.append(memory.build(f'titans-{rule}', args))
    sequential, parallel = layers
    x = torch.randn(2, 64, 16)
    a, b = sequential(x), parallel(x)
    assert a.shape == x.shape
    torch.testing.assert_close(a[:, :31], b[:, :31])  # it starts to read M_2 with one token less than two chunks
    assert (a - b)[:, 31:].abs().max() > 1e-4
    assert [tuple(p.shape) for p in sequential.memory.memory_model_parameters] == [(2, 8, 4), (2, 4, 8)]


def test_flops_of_the_inner_loop_are_those_counted(script):
    batch, tokens, channels, chunk_size, hidden_dim = 2, 40, 16, 16, 4
    layer = NeuralMemory(channels, chunk_size=chunk_size, head_dim=8, hidden_dim=hidden_dim, backend='reference')
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(torch.randn(batch, tokens, channels))
    # The layer projects every token to a key and a value, the floor only the 32 that are written.
    unused = 2 * batch * (tokens - 32) * 2 * channels**2
    counted = script('benchmark_memory').layer_flops(batch, tokens, channels, chunk_size, hidden_dim)
    assert counted == counter.get_total_flops() - unused


# ---- backbones


def test_backbones_beside_each_other(models, tmp_path, capsys):
    found = models('ConvNeur-m1-local', 'ConvNeur-m1', 'ConvNeXt-V2-atto', 'resnet18', *TINY_IMAGES,
                   '--plot', str(tmp_path / 'a.png'))
    assert_rows(found['results'])
    for mode in MODES:
        rows = {row['name']: row for row in found['results'] if row['mode'] == mode}
        local, m1, atto, _ = rows.values()
        assert list(rows) == ['ConvNeur-m1-local', 'ConvNeur-m1', 'ConvNeXt-V2-atto', 'resnet18']
        assert local['macs'] == atto['macs'] < m1['macs'] and local['parameters'] < m1['parameters']
        assert all(row['images_per_s'] == 1 / row['median_s'] for row in rows.values())
        assert all(row['peak_memory_bytes'] > 0 for row in rows.values())
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
    assert 'images/s' in capsys.readouterr().out


@pytest.mark.needs('mmdet', 'mmseg')
@pytest.mark.parametrize('task', ['detector', 'segmentor'])
def test_backbones_in_a_model(models, task, monkeypatch):
    # The heads of the light config take seconds less.
    light = cases.TASKS['detector']._replace(config='cascade_rcnn_convneur_m1_shapes')
    monkeypatch.setitem(cases.TASKS, 'detector', light)
    monkeypatch.setattr(cases, 'OBJECTS', 8)
    found = models('ConvNeur-m1', '--task', task, '--shape', '1,64,96', '--repeats', '1')
    assert [row['mode'] for row in found['results']] == list(MODES)
    assert all(row['macs'] > 1e8 for row in found['results'])


@pytest.mark.needs('mmdet')
def test_every_head_works_whatever_the_weights(monkeypatch):
    """An untrained detector's mask heads get as many boxes as a trained one's, and every part learns."""
    monkeypatch.setitem(cases.TASKS, 'detector',
                        cases.TASKS['detector']._replace(config='cascade_rcnn_convneur_m1_shapes'))
    monkeypatch.setattr(cases, 'OBJECTS', 8)
    torch.manual_seed(0)
    model, boxes, learn = cases.build('detector', 'ConvNeur-m1', (1, 64, 96), {}), [], set()
    model.roi_head.mask_head[0].register_forward_pre_hook(lambda _, args: boxes.append(len(args[0])))
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: learn.add(name.split('.')[0]))
    for mode in MODES:
        cases.make_call('detector', model, torch.randn(1, 3, 64, 96), mode, torch.float32)()
    assert boxes == [100, 8] and learn == {name.split('.')[0] for name, _ in model.named_parameters()}


def test_overlock_is_merged_for_inference():
    counts = [sum(p.numel() for p in cases.build('backbone', 'OverLoCK-XT', (1, 64, 64), {}, merged).parameters())
              for merged in (False, True)]
    assert counts[1] < counts[0]


@pytest.mark.slow
def test_split_shares(models, tmp_path, capsys):
    found = models('ConvNeur-m1', '--split', *TINY_IMAGES, '--plot', str(tmp_path / 'a.png'))
    assert_rows(found['results'])
    parts = [f'{kind} {i}' for i in range(1, 5) for kind in ('branch', 'memory')]
    for mode in MODES:
        rows = {row['name']: row for row in found['results'] if row['mode'] == mode}
        assert list(rows) == ['backbone', 'backbone without branches', *parts, 'all branches', 'all memories']
        for total, kind in (('all branches', 'branch'), ('all memories', 'memory')):
            each = [rows[f'{kind} {i}'] for i in range(1, 5)]
            assert rows[total]['times_s'] == [sum(times) for times in zip(*(row['times_s'] for row in each))]
            assert rows[total]['macs'] == sum(row['macs'] for row in each)
        assert rows['all branches']['macs'] == rows['backbone']['macs'] - rows['backbone without branches']['macs']
        assert 0 < rows['all memories']['mac_share'] < rows['all branches']['mac_share'] < 1
        assert (rows['backbone']['chunk_size'], rows['backbone']['shape']) == (16, [1, 32, 64])
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
    assert '| all memories' in capsys.readouterr().out


# ---- what they share


@pytest.mark.parametrize(('benchmark', 'args', 'message'), [
    ('benchmark', ['ConvNeur-m1', '--shape', '1,16,64'], '--shape must be at least one image'),
    ('benchmark', ['ConvNeur-m1', '--shape', '1,40,64'], "multiples of 32, got '1,40,64'"),
    ('benchmark', ['no_such_net'], "unknown model 'no_such_net'"),
    ('benchmark', ['resnet18', '--task', 'detector'], "unknown model 'resnet18': expected one of ConvNeur-m1"),
    ('benchmark', ['ResNet-50', '--split'], "--split is for .* alone, got .'ResNet-50'."),
    ('benchmark', ['ConvNeur-m1', '--task', 'detector', '--compile'], '--compile is for backbones alone'),
    ('benchmark', ['ConvNeur-m1', '--repeats', '0'], '--repeats must be at least 1, got 0'),
    ('benchmark', ['ConvNeur-m1', '--device', 'tpu'], "--device must be 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
    ('benchmark_memory', ['--channels', '20'], '--channels must be a multiple of --head-dim, got 20 and 16'),
    ('benchmark_memory', ['--chunk-size', '0'], '--chunk-size must be at least 1, got 0'),
    ('benchmark_memory', ['--baseline', 'mlp'], '--baseline must be one of .*memory-parallel.* got .mlp.'),
])
def test_bad_options(script, benchmark, args, message, refused):
    with refused(message):
        script(benchmark).main(args)



def test_peak_memory_is_that_of_a_known_allocation():
    kept = torch.ones(1000)

    def call():
        x = torch.empty(250_000)  # 1 MB
        y = torch.empty(500_000)  # with it 3 MB, the peak
        del x
        z = torch.empty(125_000)
        del y, z
        kept.add_(1)

    for _ in range(2):
        assert bench.peak_memory(call, torch.device('cpu')) == 3_000_000


def test_what_fails_is_left_out():
    """For want of memory any, for another reason a peer; ours must not."""
    def fail():
        raise TypeError('no such layout\nand more')

    device = torch.device('cpu')
    calls = {'ours': lambda: None, 'large': lambda: torch.empty(2**60), 'peer': fail}
    results, failures = bench.measure(calls, device, repeats=1, optional=['peer'])
    assert list(results) == ['ours'] and failures == {'large': 'out of memory', 'peer': 'TypeError: no such layout'}
    with pytest.raises(TypeError, match='no such layout'):
        bench.measure({'ours': fail}, device, repeats=1)


def test_a_peer_that_fails_is_left_out_and_named(layers, script, monkeypatch, capsys):
    monkeypatch.setattr(script('benchmark_memory').NonLocal, 'forward', lambda self, x: x.no_such_method())
    found = layers('--peers', 'non-local', '--forward-only', '--rules', 'parallel')
    assert [row['name'] for row in found['results']] == ['memory-parallel']
    assert [(row['name'], row['tokens'], row['mode']) for row in found['skipped']] == [('non-local', 40, 'forward')]
    assert 'left out non-local, 40 tokens, forward: AttributeError' in capsys.readouterr().err


def test_slope_of_a_power_law():
    xs = [784, 3136, 12544, 262144]
    assert bench.fit_slope(xs, [3e-6 * x**1.37 for x in xs]) == pytest.approx(1.37, abs=1e-9)
    # Least squares by hand: log2 y = 0, 1, 5 over log2 x = 0, 1, 2 has slope 5/2.
    assert bench.fit_slope([1, 2, 4], [1, 2, 32]) == pytest.approx(2.5)


def test_ratios_are_paired_by_round():
    a, b = bench.Measurement([1.0, 2.0, 8.0]), bench.Measurement([2.0, 4.0, 4.0])
    assert b.ratio(a) == 2 and a.median == 2 and a.fastest == 1 and a.spread == 3.5
