"""tools/analysis/benchmark.py: one cell at a tiny size, the order of all of them, resuming, and the tables."""
import itertools
import json
import subprocess

import pytest
import torch
from mmengine.config import Config

MODEL, OTHER = 'ConvNeur-m1', 'ResNet-50'


@pytest.fixture
def tool(analysis_tool):
    return analysis_tool('benchmark')


@pytest.fixture
def cases(analysis_tool):
    return analysis_tool('_benchmark_cases')


@pytest.fixture
def processes(tool, monkeypatch):
    """Every process of a run, by the cell that it measures; what it would print is made up."""
    ran, run_really = [], subprocess.run

    def run(command, **kwargs):
        if '--measure' not in command:  # Python asks the system for the processor's name
            return run_really(command, **kwargs)
        at = command.index('--measure')
        task, model, mode, engine = command[at + 1:at + 5]
        ran.append((task, model, mode, engine))
        if (model, mode) == ('Swin-T', 'training'):
            return subprocess.CompletedProcess(command, 1, '', 'Traceback\nRuntimeError: no such luck\n')
        if mode == 'count':
            content = dict.fromkeys(('inference', 'training'), dict(parameters=2_500_000, macs=1.5e9))
        else:
            slower = len(ran)  # the machine, from process to process
            content = dict(times_s=[0.5 * slower, 0.25 * slower, 0.125 * len(ran) * slower],
                           yardstick_s=[0.125 * slower] * 3, peak_memory_bytes=2**20 * len(ran))
        return subprocess.CompletedProcess(command, 0, f'chatter\n{json.dumps(content)}\n', '')

    monkeypatch.setattr(tool.subprocess, 'run', run)
    return ran


def read(path):
    return json.loads(path.read_text())


# ---- one cell


def test_a_cell_is_measured_in_a_process_of_its_own(tool, tmp_path, capsys):
    """From end to end, in real processes."""
    tool.main(['--tasks', 'backbone', '--models', MODEL, '--modes', 'inference', '--no-compile', '--rounds', '1',
               '--calls', '2', '--shape', '2,64,64', '--threads', '1', '--out', str(tmp_path)])
    one, = read(tmp_path / 'backbone' / f'{MODEL}-inference-eager.json')['rounds']
    assert len(one['times_s']) == len(one['yardstick_s']) == 2
    assert all(0 < seconds < one['wall_s'] for seconds in one['times_s'] + one['yardstick_s'])
    weights = 4_004_880 * 4
    assert weights < one['peak_memory_bytes'] < 20 * weights
    counted, = read(tmp_path / 'backbone' / f'{MODEL}-count.json')['rounds']
    assert counted['inference']['parameters'] == 4_004_880
    captured = capsys.readouterr()
    assert f'| {MODEL} ' in captured.out and 'threads 1' in captured.out
    assert '2 processes to run, about 1 min' in captured.err


def test_training_steps_change_every_part(cases):
    torch.manual_seed(0)
    model = cases.build('backbone', MODEL, 'training')
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    call = cases.make_call('backbone', model, 'training', (1, 64, 64))
    call()
    call()
    unchanged = [name for name, param in model.named_parameters() if torch.equal(param, before[name])]
    # What generates the updates has no part in stages of one chunk, and there is no second chunk at 64 x 64 but in
    # the first stage.
    assert all('global_branch' in name for name in unchanged) and len(unchanged) < len(before) / 2


def test_random_gradients_stay_the_same_from_call_to_call(cases):
    torch.manual_seed(0)
    loss = cases._Cotangents(torch.nn.Identity(), torch.randn(1, 3, 4, 4))
    first = loss()
    assert loss() == first != 0


def test_overlock_is_merged_for_inference_alone(cases):
    merged, trained = (sum(p.numel() for p in cases.build('backbone', 'OverLoCK-XT', mode).parameters())
                       for mode in cases.MODES)
    assert merged < trained


@pytest.mark.parametrize('name', ['ConvNeur-m4', 'OverLoCK-T', 'ConvNeXt-V2-nano', 'PVTv2-B1', 'Swin-T', 'ResNet-50'])
def test_channels_are_those_that_the_backbone_returns(cases, name):
    model = cases.build('backbone', name, 'inference').to('meta')
    with torch.no_grad():
        features = model(torch.empty(1, 3, 64, 64, device='meta'))
    assert tuple(feature.size(1) for feature in features) == cases.BACKBONES[name].channels


@pytest.fixture
def small_detector(cases, monkeypatch):
    """The detector of the light config, whose heads take seconds less."""
    task = cases.TASKS['detector']._replace(config='cascade_rcnn_convneur_m1_shapes')
    monkeypatch.setitem(cases.TASKS, 'detector', task)
    monkeypatch.setattr(cases, 'OBJECTS', 16)
    return cases


def record(module, seen):
    module.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))


def test_the_detectors_heads_see_the_same_boxes_whatever_the_weights(small_detector):
    torch.manual_seed(0)
    model = small_detector.build('detector', MODEL, 'inference')
    assert model.backbone.arch == 'm1'
    boxes, masks = [], []
    for stage in range(3):
        record(model.roi_head.bbox_head[stage], boxes)
        record(model.roi_head.mask_head[stage], masks)
    call = small_detector.make_call('detector', model, 'inference', (1, 64, 96))
    call()
    call()
    assert boxes == [200] * 6 and masks == [100] * 6


def test_the_detectors_mask_heads_train_on_their_full_number(small_detector):
    """A quarter of the 64 sampled boxes are objects."""
    torch.manual_seed(0)
    model = small_detector.build('detector', OTHER, 'training')
    masks = []
    for head in model.roi_head.mask_head:
        record(head, masks)
    before = model.neck.lateral_convs[3].conv.weight.detach().clone()
    small_detector.make_call('detector', model, 'training', (1, 64, 96))()
    assert masks == [16] * 3
    assert not torch.equal(before, model.neck.lateral_convs[3].conv.weight)


def test_the_segmentor_keeps_the_memorys_own_settings(cases):
    model = cases.build('segmentor', 'ConvNeur-m2', 'inference')
    assert model.backbone.stages[0][0].global_branch.memory.chunk_size == 196
    assert model.neck.in_channels == [48, 96, 192, 384]
    detector = Config.fromfile(cases.config(cases.TASKS['detector'].config))
    assert detector.model.backbone.memory_cfg.chunk_size == 4096


def test_the_segmentor_trains_and_predicts(cases):
    torch.manual_seed(0)
    for mode in cases.MODES:
        model = cases.build('segmentor', MODEL, mode)
        before = model.decode_head.conv_seg.weight.detach().clone()
        cases.make_call('segmentor', model, mode, (1, 32, 64))()
        assert torch.equal(before, model.decode_head.conv_seg.weight) == (mode == 'inference')


# ---- all cells


ARGS = ['--tasks', 'backbone', 'segmentor', '--models', MODEL, OTHER, '--modes', 'inference', '--calls', '3']


def test_rounds_go_through_all_models_before_the_next(tool, processes, tmp_path):
    tool.main([*ARGS, '--rounds', '2', '--out', str(tmp_path)])
    models = MODEL, OTHER

    def times(task, *engines):
        return [(task, model, 'inference', engine) for engine in engines for model in models]

    of_backbone = times('backbone', 'eager', 'compiled')
    assert processes == [
        *[('backbone', model, 'count', '') for model in models], *of_backbone, *of_backbone,
        *[('segmentor', model, 'count', '') for model in models], *times('segmentor', 'eager') * 2]


def test_goes_on_where_it_stopped(tool, processes, tmp_path):
    args = [*ARGS, '--no-compile', '--out', str(tmp_path)]
    tool.main([*args, '--rounds', '1'])
    (tmp_path / 'segmentor' / f'{OTHER}-inference-eager.json').unlink()
    processes.clear()
    tool.main([*args, '--rounds', '1'])
    assert processes == [('segmentor', OTHER, 'inference', 'eager')]
    processes.clear()
    tool.main([*args, '--rounds', '2'])
    assert len(processes) == 4
    tool.main([*args, '--rounds', '2'])
    assert len(processes) == 4


def test_medians_in_the_table(tool, processes, tmp_path, capsys):
    args = [*ARGS, '--no-compile', '--tasks', 'segmentor', '--models', MODEL, '--out', str(tmp_path)]
    tool.main([*args, '--rounds', '3'])
    capsys.readouterr()
    tool.main([*args, '--table'])
    # Processes 2, 3 and 4 measure: medians of (0.5, 0.25, 0.25), (.., 0.375) and (.., 0.5) on a machine of speed 1,
    # which was 2, 3 and 4 times as slow, as the yardstick shows; 3 times in the median; 2 to 4 MiB.
    output = capsys.readouterr().out
    row, = [line for line in output.splitlines() if line.startswith(f'| {MODEL}')]
    assert [cell.strip() for cell in row.strip('|').split('|')] == [MODEL, '2.5', '2', '1125', '3']
    assert 'times 375 ms' in output and 'ResNet-50 for 4 x 224 x 224' in output
    assert len(processes) == 4


def test_each_call_lies_between_two_of_the_yardstick(tool, cases, monkeypatch):
    """A machine that slows down from call to call: the ratios stay."""
    ticks = itertools.count(1)
    seconds = {'call': 10, 'yardstick': 1}
    monkeypatch.setattr(tool.cases, 'make_call', lambda *_, **__: lambda: 'call')
    monkeypatch.setattr(tool.cases, 'make_yardstick', lambda: lambda: 'yardstick')
    monkeypatch.setattr(tool.bench, 'timed', lambda call, device: seconds[call()] * next(ticks))
    one = tool.measure(tool.Cell('backbone', MODEL, 'inference', 'eager'), (1, 32, 32), 3, 60)
    # yardstick 1, call 2, yardstick 3, call 4, yardstick 5, call 6, yardstick 7
    assert one['times_s'] == [20, 40, 60] and one['yardstick_s'] == [2, 4, 6]
    assert tool.relative_time(dict(rounds=[one])) == 10


def test_a_failure_is_noted_and_the_others_are_measured(tool, processes, tmp_path, capsys):
    args = ['--tasks', 'detector', '--models', 'Swin-T', MODEL, '--rounds', '2', '--out', str(tmp_path)]
    with pytest.raises(SystemExit, match='1 cells failed'):
        tool.main(args)
    assert processes.count(('detector', 'Swin-T', 'training', 'eager')) == 1
    assert processes.count(('detector', MODEL, 'training', 'eager')) == 2
    captured = capsys.readouterr()
    assert 'detector, Swin-T, training, eager failed: RuntimeError: no such luck' in captured.err
    assert 'failed: detector, Swin-T, training, eager: RuntimeError: no such luck' in captured.out
    row, = [line for line in captured.out.splitlines() if line.startswith('| Swin-T')]
    assert row.count('failed') == 2


def test_what_is_not_measured_yet_is_a_dash(tool, tmp_path, capsys):
    tool.main(['--tasks', 'detector', '--models', MODEL, '--out', str(tmp_path), '--table'])
    row, = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f'| {MODEL}')]
    assert row.count(' - ') == 6


def test_the_estimate_takes_what_was_measured(tool, processes, tmp_path):
    args = tool.parse_args([*ARGS, '--tasks', 'segmentor', '--no-compile', '--rounds', '2', '--out', str(tmp_path)])
    run = tool.Run(args)
    cells = [cell for cell in run.contents if cell.mode == 'inference']
    assert run.estimate(cells) == 2 * tool.FIRST_GUESS['segmentor']
    run.contents[cells[0]]['rounds'].append(dict(wall_s=7.0))
    assert run.estimate(cells) == 14
    run.contents[cells[1]]['rounds'].append(dict(wall_s=3.0))
    assert run.estimate([*cells, cells[1]]) == 13


@pytest.mark.parametrize(('change', 'message'), [
    (dict(shape=[1, 64, 64]), r'was measured with shape \[1, 64, 64\], this run has \[1, 512, 2048\]'),
    (dict(machine=dict(cpu='abacus')), "was measured with machine {'cpu': 'abacus'}"),
])
def test_cells_of_another_size_or_machine_are_not_mixed(tool, processes, tmp_path, change, message):
    args = [*ARGS, '--tasks', 'segmentor', '--rounds', '1', '--out', str(tmp_path)]
    tool.main(args)
    path = tmp_path / 'segmentor' / f'{MODEL}-inference-eager.json'
    path.write_text(json.dumps({**read(path), **change}))
    with pytest.raises(SystemExit, match=message):
        tool.main(args)


@pytest.mark.parametrize(('args', 'message'), [
    (['--rounds', '0'], '--rounds must be at least 1, got 0'),
    (['--calls', '0'], '--calls must be at least 1, got 0'),
    (['--threads', '0'], '--threads must be at least 1, got 0'),
    (['--shape', '1,64'], "--shape must be B,H,W, three integers, got '1,64'"),
    (['--shape', '1,40,64'], "multiples of 32, got '1,40,64'"),
    (['--table', '--out', 'nowhere'], "--out must be the folder of an earlier run for --table, got 'nowhere'"),
    (['--measure', 'backbone', 'm1', 'inference', 'eager'], "--measure: model must be one of .*got 'm1'"),
])
def test_bad_options(tool, args, message):
    with pytest.raises(SystemExit, match=f'benchmark: error: .*{message}'):
        tool.main(args)


def test_a_broken_cell_is_named(tool, tmp_path):
    path = tmp_path / 'backbone' / f'{MODEL}-count.json'
    path.parent.mkdir()
    path.write_text('{')
    with pytest.raises(SystemExit, match=r'ConvNeur-m1-count\.json: expected JSON'):
        tool.main(['--tasks', 'backbone', '--models', MODEL, '--out', str(tmp_path)])
