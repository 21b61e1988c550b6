"""What the console leaves out, and that it leaves out nothing else."""
import sys

from torch import nn

from convneur_mm.engine.quiet_console import quiet_prints


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
