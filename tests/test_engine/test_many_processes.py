"""Several processes: they compute what one does, one that dies ends the others, and MAX_RESTARTS starts them again."""
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from warm_python import warm_python

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / 'tests' / 'helpers'
# Two iterations an epoch.
CONFIG = """
custom_imports = dict(imports=['noisy_training', 'dying'])
model = dict(type='NoisyModel')
train_dataloader = dict(dataset=dict(type='NoisyData'), batch_size=2, sampler=dict(type='DefaultSampler', shuffle=True))
train_cfg = dict(by_epoch=True, max_epochs=5)
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.01))
default_hooks = dict(logger=dict(type='LoggerHook', interval=1), checkpoint=dict(type='CheckpointHook', interval=1))
custom_hooks = [dict(type='DyingHook')]
randomness = dict(seed=0, deterministic=True)
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Of all cases, and of a training that was never restarted."""
    folder = tmp_path_factory.mktemp('many') / 'runs'
    folder.mkdir()
    (folder / 'config.py').write_text(CONFIG)
    done = subprocess.run([warm_python(), HELPERS / 'many_processes.py', folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope='module')
def ranks(folder):
    """What the processes of a case have recorded."""
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


@pytest.fixture(scope='module')
def restarted(folder):
    """The output of a training whose second process dies twice."""
    path = os.pathsep.join([str(HELPERS), *filter(None, [os.environ.get('PYTHONPATH')])])
    old = folder / 'work'
    old.mkdir()
    # Of an earlier run: this one has nothing to do with it.
    torch.save(dict(state_dict={}, meta=dict(epoch=9, iter=18)), old / 'epoch_9.pth')
    (old / 'last_checkpoint').write_text(str(old / 'epoch_9.pth'))
    command = [ROOT / 'tools' / 'dist_train.sh', 'config.py', '2', '--work-dir', 'work']
    env = dict(PYTHONPATH=path, PYTHON=warm_python(), OMP_NUM_THREADS='1', MAX_RESTARTS='2',
               DEATHS='killed@1 raised@7')
    done = subprocess.run(command, cwd=folder, env={**os.environ, **env}, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def test_a_run_goes_on_after_restarts_as_if_it_had_never_ended(folder, restarted):
    """Bit by bit. Before the first checkpoint it starts again."""
    assert re.findall(r'resumed from work/(\S+) at epoch 3, iteration 6', restarted) == ['epoch_3.pth']
    whole, found = [torch.load(folder / name / 'epoch_5.pth', weights_only=False) for name in ('whole', 'work')]
    for part in (lambda saved: saved['state_dict'], lambda saved: saved['optimizer']['state'][0]):
        assert part(whole).keys() == part(found).keys()
        for name, value in part(whole).items():
            assert torch.equal(value, part(found)[name]), name


def test_the_console_says_which_process_died_how_and_why(restarted):
    """In torchrun's words, and those of the process."""
    assert re.findall(r'failed \(exitcode: (-?\d+)\) local_rank: (\d)', restarted) == [('-9', '1'), ('1', '1')]
    assert restarted.count('ZeroDivisionError: the reason of this death') == 1
    assert 'raise ZeroDivisionError' in restarted
