"""tools/analysis/benchmark.py: one cell at a tiny size, the order of all of them, resuming, and the tables."""
import json
import subprocess

import pytest
import torch

MODEL, OTHER = 'ConvNeur-m1', 'ResNet-50'


@pytest.fixture
def tool(script):
    return script('benchmark')


@pytest.fixture
def cases(script):
    return script('_benchmark_cases')


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


@pytest.mark.slow
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
    assert '2 processes to run' in captured.err


@pytest.mark.parametrize('task', ['backbone', 'detector', 'segmentor'])
def test_every_task_trains_and_predicts(cases, task, monkeypatch):
    """Training changes all parts of a model; an untrained detector's heads get as many boxes as a trained one's."""
    torch.manual_seed(0)
    # The heads of the light config take seconds less.
    light = cases.TASKS['detector']._replace(config='cascade_rcnn_convneur_m1_shapes')
    monkeypatch.setitem(cases.TASKS, 'detector', light)
    monkeypatch.setattr(cases, 'OBJECTS', 8)
    for mode in cases.MODES:
        model, boxes = cases.build(task, MODEL, mode), []
        if task == 'detector':
            model.roi_head.mask_head[0].register_forward_pre_hook(lambda _, args, seen=boxes: seen.append(len(args[0])))
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        cases.make_call(task, model, mode, (1, 64, 96))()
        changed = {name.split('.')[0] for name, param in model.named_parameters() if not param.equal(before[name])}
        assert changed == ({name.split('.')[0] for name in before} if mode == 'training' else set())
        if task == 'detector':
            assert boxes == [100 if mode == 'inference' else 8]


# ---- all cells


ARGS = ['--tasks', 'backbone', 'segmentor', '--models', MODEL, OTHER, '--modes', 'inference', '--calls', '3']


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


@pytest.mark.parametrize(('content', 'message'), [
    (dict(shape=[1, 64, 64]), r'was measured with shape \[1, 64, 64\], this run has \[1, 512, 2048\]'),
    (dict(machine=dict(cpu='abacus')), "was measured with machine {'cpu': 'abacus'}"),
    ('{', r'ConvNeur-m1-inference-eager\.json: expected JSON'),
])
def test_cells_of_another_run_are_not_mixed(tool, processes, tmp_path, content, message, refused):
    args = [*ARGS, '--tasks', 'segmentor', '--rounds', '1', '--out', str(tmp_path)]
    tool.main(args)
    path = tmp_path / 'segmentor' / f'{MODEL}-inference-eager.json'
    path.write_text(content if content == '{' else json.dumps({**read(path), **content}))
    with refused(message):
        tool.main(args)


@pytest.mark.parametrize(('args', 'message'), [
    (['--rounds', '0'], '--rounds must be at least 1, got 0'),
    (['--shape', '1,40,64'], "multiples of 32, got '1,40,64'"),
])
def test_bad_options(tool, args, message, refused):
    with refused(message):
        tool.main(args)
