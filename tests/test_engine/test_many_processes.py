"""A step and a validation in 2 and in 4 processes are those of one process, where the loss allows it."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / 'helpers' / 'many_processes.py'


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    """What the processes of a case have recorded."""
    folder = tmp_path_factory.mktemp('many') / 'runs'
    done = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return lambda case, processes: [torch.load(folder / f'{case}_{processes}' / f'rank{rank}.pth', weights_only=False)
                                    for rank in range(processes)]


def difference(gradients, expected):
    """Relative norm over all parameters."""
    assert gradients.keys() == expected.keys() and len(expected) > 100
    squares = sum((gradients[name] - value).double().square().sum() for name, value in expected.items())
    return (squares / sum(value.double().square().sum() for value in expected.values())).sqrt().item()


def mean(records):
    """Of losses."""
    return sum(record['loss'] for record in records) / len(records)


@pytest.mark.parametrize('task, processes', [('classifier', 2), ('classifier', 4), ('segmentor', 2)])
def test_gradients_of_a_step(ranks, task, processes):
    """Up to what mmseg adds to the number of pixels that it divides by: 1e-7, be they of one process or of all."""
    (one, ), several = ranks(task, 1), ranks(task, processes)
    assert all(value.dtype == torch.float64 for value in one['gradients'].values())
    for record in several:
        assert difference(record['gradients'], one['gradients']) < 1e-10
    assert mean(several) == pytest.approx(one['loss'], rel=1e-10)
    # Of different images.
    assert len({record['loss'] for record in several}) == processes


@pytest.mark.parametrize('task, processes', [('classifier', 2), ('classifier', 4), ('segmentor', 2)])
def test_metrics(ranks, task, processes):
    """Of seven images: samplers fill up the last batch with images that may not count twice."""
    (one, ), several = ranks(task, 1), ranks(task, processes)
    assert all(value > 0 for value in one['metrics'].values())
    assert [record['metrics'] for record in several] == [one['metrics']] * processes


@pytest.mark.parametrize('case', ['batch_norm', 'weighted'])
def test_what_looks_across_the_images_of_a_process(ranks, case):
    """BatchNorm in SyncBN's place, on CPUs, and a loss that is divided by the weights of a process's pixels."""
    (one, ), several = ranks(case, 1), ranks(case, 2)
    assert torch.equal(*[record['gradients']['decode_head.conv_seg.weight'] for record in several])
    assert difference(several[0]['gradients'], one['gradients']) > 0.01


def test_a_detectors_gradients_are_the_mean_of_the_processes(ranks):
    """Each process divides by the number of its own samples. Where the images are the same, so are these numbers."""
    (first, ), (second, ), several = ranks('first', 1), ranks('second', 1), ranks('detector', 2)
    means = {name: (value + second['gradients'][name]) / 2 for name, value in first['gradients'].items()}
    for record in several:
        assert difference(record['gradients'], means) < 1e-10
    (both, ), (twins, ) = ranks('detector', 1), ranks('twins', 1)
    assert difference(means, both['gradients']) > 0.01
    # As everywhere, 1e-7 is added to the number.
    assert difference(first['gradients'], twins['gradients']) < 1e-8
    assert first['loss'] == pytest.approx(twins['loss'], rel=1e-8)
