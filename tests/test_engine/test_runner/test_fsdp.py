"""FSDP, in two processes over gloo: what it divides, and that it trains as DistributedDataParallel does."""
import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from warm_python import warm_python

from convneur_mm.engine.files.errors import LaunchError
from convneur_mm.engine.runner import fsdp as sharding
from convneur_mm.engine.runner.fsdp import BlockFSDPStrategy

SCRIPT = Path(__file__).parents[2] / 'helpers' / 'sharded_training.py'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Of two iterations with weight decay and clipped gradients, the second one resumed; one process has loaded it."""
    folder = tmp_path_factory.mktemp('sharded')
    done = subprocess.run([warm_python(), SCRIPT, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / 'printed').write_text(done.stdout + done.stderr)
    return folder


def test_blocks_are_in_parts(folder):
    """And the summary has the number of weights of the whole model."""
    found = json.loads((folder / 'sharded' / 'units.json').read_text())
    assert Counter(found['units']) == {'ImageClassifier': 1, 'ConvNeurBlock': 4}
    whole = sum(parameter.numel() for parameter in tiny_model('classifier').parameters())
    assert whole / 2 <= found['kept'] < 0.6 * whole
    assert (folder / 'printed').read_text().count(f'; {whole / 1e6:.2f} M parameters, ') == 3


def test_trains_as_distributed_data_parallel_does(folder):
    first, sharded, replicated = [torch.load(folder / path, weights_only=False) for path in (
        'sharded_first/iter_1.pth', 'sharded/iter_2.pth', 'replicated/iter_2.pth')]
    assert sharded['state_dict'].keys() == replicated['state_dict'].keys()
    for name, value in replicated['state_dict'].items():
        torch.testing.assert_close(sharded['state_dict'][name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert any((value - first['state_dict'][name]).norm() > 1e-3 for name, value in replicated['state_dict'].items())
    decays = [{group['weight_decay']: len(group['params']) for group in saved['optimizer']['param_groups']}
              for saved in (sharded, replicated)]
    assert decays[0] == decays[1] and len(decays[0]) == 2


def test_one_process_has_the_whole_model_and_trains_nothing(tmp_path):
    strategy = BlockFSDPStrategy(work_dir=str(tmp_path))
    model = tiny_model('classifier')
    assert strategy.prepare(model) is model
    with pytest.raises(LaunchError, match='has nothing to divide in one process; train with several'):
        BlockFSDPStrategy(work_dir=str(tmp_path)).prepare(model, optim_wrapper=dict(optimizer=dict(type='SGD', lr=1.)))


@pytest.mark.parametrize('kind, settings', [('OptimWrapper', {}), ('AmpOptimWrapper', dict(use_fsdp=True))])
def test_processes_agree_on_the_steps_that_half_precision_leaves_out(kind, settings, tmp_path, monkeypatch):
    class Built(Exception):
        pass

    def build(model, config):
        raise Built({name: value for name, value in config.items() if name not in ('type', 'optimizer')})

    monkeypatch.setattr(sharding, 'is_distributed', lambda: True)
    monkeypatch.setattr(sharding, 'build_optim_wrapper', build)
    with pytest.raises(Built) as built:
        BlockFSDPStrategy(work_dir=str(tmp_path)).prepare(
            tiny_model('classifier'), optim_wrapper=dict(type=kind, optimizer=dict(type='SGD', lr=1.)))
    assert built.value.args == (settings,)
