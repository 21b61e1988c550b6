"""What the console leaves out, and that it leaves out nothing else."""
import logging
import uuid

import noisy_training  # noqa: F401  its model and data
import pytest
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from convneur_mm.engine.runner.quiet_console import ON_CONSOLE, ConsoleFilter, QuietRunner, build_runner


@pytest.mark.parametrize('level, extra, at_start', [
    ('DEBUG', {}, False), ('INFO', {}, False), ('INFO', ON_CONSOLE, True), ('WARNING', {}, True), ('ERROR', {}, True)])
def test_what_the_console_shows(level, extra, at_start):
    console = ConsoleFilter()
    record = logging.makeLogRecord(dict(msg='x', levelno=getattr(logging, level), **extra))
    assert console.filter(record) is at_start
    console.starting = False
    assert console.filter(record)


@pytest.mark.parametrize('runner_type, kind', [({}, QuietRunner), (dict(runner_type='Runner'), Runner)])
def test_only_our_own_runner_is_quiet(runner_type, kind, tmp_path):
    runner = build_runner(Config(dict(
        model=dict(type='CheckpointTestModel'), work_dir=str(tmp_path), experiment_name=uuid.uuid4().hex,
        **runner_type)))
    assert type(runner) is kind
    quiet = {isinstance(handler, logging.FileHandler): any(isinstance(f, ConsoleFilter) for f in handler.filters)
             for handler in runner.logger.handlers}
    assert quiet == {False: kind is QuietRunner, True: False}


def test_console_is_as_ever_after_the_first_batch(toy_runner, tmp_path, capsys):
    runner = toy_runner(nn.Sequential(nn.Conv2d(3, 4, 3)))
    runner.logger.info('before: hidden')
    runner.logger.warning('a warning')
    runner.train()
    runner.logger.info('after: shown')
    out = capsys.readouterr().out
    assert 'hidden' not in out
    assert 'a warning' in out and 'training starts' in out and 'after: shown' in out
    assert 'before: hidden' in next(tmp_path.glob('*/*.log')).read_text()


def test_log_level_debug_shows_everything(toy_runner, capsys):
    toy_runner(nn.Sequential(nn.Conv2d(3, 4, 3)), log_level='DEBUG')
    assert 'System environment' in capsys.readouterr().out


@pytest.mark.parametrize('rank', [0, 1])
@pytest.mark.parametrize('runner_type', [{}, dict(runner_type='FlexibleRunner', env_cfg={})],
                         ids=['ours', 'FlexibleRunner'])
def test_one_process_writes_the_metrics_of_a_test(rank, runner_type, tmp_path, monkeypatch):
    """All of them at once would leave a mixture of the times of each."""
    monkeypatch.setattr('convneur_mm.engine.runner.quiet_console.get_rank', lambda: rank)
    runner = build_runner(Config(dict(
        model=dict(type='NoisyModel'), work_dir=str(tmp_path), experiment_name=uuid.uuid4().hex, test_cfg={},
        test_dataloader=dict(dataset=dict(type='NoisyData'), sampler=dict(type='DefaultSampler', shuffle=False)),
        test_evaluator=dict(type='DumpResults', out_file_path=str(tmp_path / 'results.pkl')), **runner_type)))
    runner.test()
    assert [path.suffix for path in tmp_path.rglob('*.json')] == ['.json'] * (rank == 0)
