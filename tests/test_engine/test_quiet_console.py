"""What the console leaves out, and that it leaves out nothing else."""
import logging
import sys
import uuid

import noisy_training  # noqa: F401  its model and data
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from convneur_mm.engine.quiet_console import ON_CONSOLE, ConsoleFilter, QuietRunner, build_runner, quiet_prints


@pytest.mark.parametrize('message, level, extra, at_start, later', [
    ('one line', 'INFO', {}, True, True),
    ('two\nlines', 'INFO', {}, False, True),
    ('two\nlines', 'DEBUG', {}, False, True),
    ('two\nlines', 'WARNING', {}, True, True),
    ('two\nlines', 'INFO', ON_CONSOLE, True, True),
    ('Checkpoints will be saved to work', 'INFO', {}, False, True),
    ('ConvNeur-m3 starts from random weights: …', 'WARNING', {}, False, True),
    ('ConvNeur-m6 starts from random weights: …', 'WARNING', {}, False, True),
    ('"FileClient" will be deprecated in future', 'WARNING', {}, False, False),
    ('The prefix is not set in metric class X.', 'WARNING', ON_CONSOLE, False, False),
])
def test_what_the_console_shows(message, level, extra, at_start, later):
    console = ConsoleFilter()
    record = logging.makeLogRecord(dict(msg=message, levelno=getattr(logging, level), **extra))
    assert console.filter(record) is at_start
    console.starting = False
    assert console.filter(record) is later


@pytest.mark.parametrize('runner_type, kind', [({}, QuietRunner), (dict(runner_type='Runner'), Runner)])
def test_only_our_own_runner_is_quiet(runner_type, kind, tmp_path):
    runner = build_runner(Config(dict(
        model=dict(type='CheckpointTestModel'), work_dir=str(tmp_path), experiment_name=uuid.uuid4().hex,
        **runner_type)))
    assert type(runner) is kind
    quiet = {isinstance(handler, logging.FileHandler): any(isinstance(f, ConsoleFilter) for f in handler.filters)
             for handler in runner.logger.handlers}
    assert quiet == {False: kind is QuietRunner, True: False}


def test_weights_that_do_not_fit_are_not_printed(toy_runner, tmp_path, capsys):
    torch.save(dict(state_dict={'other': torch.ones(1)}), tmp_path / 'x.pth')
    runner = toy_runner(nn.Conv2d(3, 4, 3))
    assert list(runner.load_checkpoint(str(tmp_path / 'x.pth'))['state_dict']) == ['other']
    assert 'do not match' not in capsys.readouterr().out


def test_console_is_as_ever_after_the_first_batch(toy_runner, tmp_path, capsys):
    runner = toy_runner(nn.Sequential(nn.Conv2d(3, 4, 3)))
    runner.logger.info('before\nhidden')
    runner.logger.info('before, one line')
    runner.logger.warning('a warning\nof two lines')
    runner.train()
    runner.logger.info('after\nshown')
    out = capsys.readouterr().out
    assert 'hidden' not in out
    for text in ('before, one line', 'a warning\nof two lines', 'after\nshown'):
        assert text in out
    assert 'before\nhidden' in next(tmp_path.glob('*/*.log')).read_text()


def test_log_level_debug_shows_everything(toy_runner, capsys):
    toy_runner(nn.Sequential(nn.Conv2d(3, 4, 3)), log_level='DEBUG')
    assert 'System environment' in capsys.readouterr().out


def test_printed_chatter_is_dropped(capsys):
    with quiet_prints():
        print('loading annotations into memory...')
        print('Done (t=0.25s)')
        print('creating index...')
        print('index created!')
        print('mine: creating index...')
        print()
        print('a', 'b', end=' ')
        print('c')
        # Dropped only where a Runner loads, and the summary counts the weights.
        print('The model and loaded state dict do not match exactly\n\nmissing keys')
        sys.stdout.flush()
    assert capsys.readouterr().out == (
        'mine: creating index...\n\na b c\nThe model and loaded state dict do not match exactly\n\nmissing keys\n')


def test_standard_output_stays_one(capsys):
    stream = sys.stdout
    with quiet_prints():
        assert sys.stdout.write('\n') == 1
        assert sys.stdout.write('creating index...') == 17
        assert sys.stdout.write('\n') == 1
        assert sys.stdout.write('\n') == 1
        assert sys.stdout.write('shown') == 5
        assert sys.stdout.encoding == stream.encoding
    assert sys.stdout is stream
    assert capsys.readouterr().out == '\n\nshown'


@pytest.mark.parametrize('rank', [0, 1])
@pytest.mark.parametrize('runner_type', [{}, dict(runner_type='FlexibleRunner', env_cfg={})],
                         ids=['ours', 'FlexibleRunner'])
def test_one_process_writes_the_metrics_of_a_test(rank, runner_type, tmp_path, monkeypatch):
    """All of them at once would leave a mixture of the times of each."""
    monkeypatch.setattr('convneur_mm.engine.quiet_console.get_rank', lambda: rank)
    runner = build_runner(Config(dict(
        model=dict(type='NoisyModel'), work_dir=str(tmp_path), experiment_name=uuid.uuid4().hex, test_cfg={},
        test_dataloader=dict(dataset=dict(type='NoisyData'), sampler=dict(type='DefaultSampler', shuffle=False)),
        test_evaluator=dict(type='DumpResults', out_file_path=str(tmp_path / 'results.pkl')), **runner_type)))
    runner.test()
    assert [path.suffix for path in tmp_path.rglob('*.json')] == ['.json'] * (rank == 0)
