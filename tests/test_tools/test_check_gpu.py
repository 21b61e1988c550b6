"""tools/analysis/check_gpu.py: in Triton's interpreter, and what it says of results that a GPU may give."""
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HAS_TRITON = importlib.util.find_spec('triton') is not None

FOLDER = Path(__file__).parents[2] / 'tools' / 'analysis'


@pytest.fixture
def tool(script):
    return script('check_gpu')


@pytest.mark.skipif(not HAS_TRITON, reason='needs Triton')
def test_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, FOLDER / 'check_gpu.py', '--device', 'cpu', '--tokens', '6', '--repeats', '0'], text=True,
        capture_output=True, env={**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert len([line for line in lines if '(right)' in line]) == 8
    assert last == "Both sets of operators are right; times of Triton's interpreter say nothing of a GPU."


@pytest.mark.parametrize('arguments, message', [
    (['--device', 'cpu'], 'no Triton that runs kernels on cpu'), (['--device', 'cuda:99'], 'cuda:99')])
def test_where_nothing_can_be_checked(arguments, message, tool, monkeypatch):
    monkeypatch.setattr(tool.triton, 'is_available', lambda x: False)
    with pytest.raises(ValueError, match=message):
        tool.main(arguments)


@pytest.mark.parametrize('triton, said', [
    ({'a': (1e-6, 1.0), 'b': (1e-6, 1.0)}, "backend='triton'.* for every task"),
    ({'a': (1e-6, 1.0), 'b': (1e-6, 3.0)}, "backend='triton'.* for a, and leave it"),
    ({'a': (1e-6, 3.0), 'b': (1e-6, 3.0)}, "'torch' is the faster one"),
    ({'a': (1e-6, 1.0), 'b': (1e-2, 1.0)}, 'Do not train with triton .b.'),
    ({'a': (1e-6, 1.0), 'b': (float('inf'), 1.0)}, 'Do not train with triton .b.')])
def test_the_closing_line(triton, said, tool):
    found = {task: dict(torch=(1e-6, 2.0), triton=of) for task, of in triton.items()}
    assert re.search(said, tool.advice(found, torch.device('cuda')))


def test_programs_fill_an_h100(tool, monkeypatch):
    """Of each task, also of detection with its two images: sequential chunks come one after the other."""
    monkeypatch.setattr(tool.triton, '_multiprocessors', lambda device: 132)
    assert all(tool.programs_of_a_chunk(task, 8, torch.device('cpu')) >= 128 for task in tool.TASKS.values())


def test_a_nan_is_an_error(tool):
    one = torch.ones(2)
    assert tool.largest_error([one, one * float('nan')], [one.double(), one.double()]) == float('inf')
    assert tool.largest_error([one, one * 1.5], [one.double(), one.double()]) == 0.5
