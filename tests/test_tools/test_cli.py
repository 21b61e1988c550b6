"""The command convneur-mm: which tools it has, and that it runs them as their paths would, also from a wheel."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from convneur_mm import cli
from convneur_mm.apis import init_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(monkeypatch):
    """Returns what the process would be replaced by."""
    def run(*args):
        calls = []
        monkeypatch.setattr(os, 'execv', lambda *call: calls.append(call))
        cli.main(list(args))
        (program, command), = calls
        assert program == command[0] == sys.executable
        return command[1:]
    return run


def test_each_tool_is_a_command():
    folders = [ROOT / 'tools' / name for name in ('', 'analysis', 'deploy', 'model_converters')]
    paths = [path for folder in folders for path in folder.glob('*.py') if not path.name.startswith('_')]
    tools = cli.find_tools()
    assert sorted(tools.values()) == sorted(paths)  # so that no two have the same name
    assert tools['train'] == ROOT / 'tools/train.py'
    assert tools['check'] == ROOT / 'tools/check_dataset.py'
    assert {'test', 'infer', 'doctor', 'make-shapes', 'check-gpu', 'convnext-to-convneur'} <= tools.keys()


def test_help_has_a_line_for_each(capsys):
    for args in ([], ['--help'], ['-h'], ['help']):
        cli.main(args)
        lines = capsys.readouterr().out.splitlines()
        for name, path in cli.find_tools().items():
            line, = (line for line in lines if line.split()[:1] == [name])
            assert line.split(maxsplit=1)[1] == cli.summary(path)
            assert cli.summary(path).endswith('.')


def test_summaries_are_read_without_running_the_tool(tmp_path):
    (tmp_path / 'x.py').write_text('"""The first line.\n\nMore.\n"""\nraise SystemExit\n')
    assert cli.summary(tmp_path / 'x.py') == 'The first line.'
    (tmp_path / 'x.py').write_text('raise SystemExit\n')
    assert cli.summary(tmp_path / 'x.py') == ''


def test_arguments_are_handed_on(run):
    assert run('train', 'x.py', '--amp', '--help') == [str(ROOT / 'tools/train.py'), 'x.py', '--amp', '--help']
    for name in ('check', 'check-dataset', 'check_dataset'):
        assert run(name, 'coco') == [str(ROOT / 'tools/check_dataset.py'), 'coco']
    assert run('make_shapes') == [str(ROOT / 'tools/make_shapes.py')]


@pytest.mark.parametrize('name, hint', [
    ('trian', 'did you mean train?'), ('xyz', 'convneur-mm --help lists the commands'),
    ('_environment', 'convneur-mm --help lists the commands')])
def test_other_names_are_refused(name, hint, run, capsys):
    with pytest.raises(SystemExit) as error:
        run(name)
    assert error.value.code == 2
    assert capsys.readouterr().err == f'error: convneur-mm has no command {name!r}; {hint}\n'


@pytest.mark.needs('mmpretrain')
def test_an_installed_wheel_predicts_from_any_folder(wheel, tmp_path):
    """By the command alone, and the name of a config that is found nowhere but in the wheel."""
    site, folder = tmp_path / 'site', tmp_path / 'elsewhere'
    subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', '--target', site,
                    wheel], check=True, capture_output=True)
    folder.mkdir()
    configs = site / 'convneur_mm' / '.mim' / 'configs'
    shutil.copy(configs / 'convneur_m1_shapes.py', configs / 'only_in_the_wheel.py')
    torch.save(init_model('convneur_m1_shapes', device='cpu').state_dict(), folder / 'x.pth')
    cv2.imwrite(str(folder / 'a.png'), np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    done = subprocess.run([site / 'bin' / 'convneur-mm', 'infer', 'only_in_the_wheel', 'x.pth', 'a.png'], cwd=folder,
                          text=True, capture_output=True, env=dict(os.environ, PYTHONPATH=str(site)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ('predictions: predictions/classifications.jsonl, '
                                            'drawn: predictions/pictures')
    entry = json.loads((folder / 'predictions/classifications.jsonl').read_text())
    assert (entry['file'], len(entry['top'])) == ('a.png', 5)
