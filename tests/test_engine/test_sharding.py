"""FSDP, in two processes over gloo."""
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).parents[1] / 'helpers' / 'sharded_training.py'


def test_trains_as_distributed_data_parallel_does(tmp_path):
    """Two iterations with weight decay and clipped gradients, the second one resumed. One process has loaded it too."""
    done = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    first, sharded, replicated = [torch.load(tmp_path / path, weights_only=False) for path in (
        'sharded_first/iter_1.pth', 'sharded/iter_2.pth', 'replicated/iter_2.pth')]
    assert sharded['state_dict'].keys() == replicated['state_dict'].keys()
    for name, value in replicated['state_dict'].items():
        torch.testing.assert_close(sharded['state_dict'][name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert any((value - first['state_dict'][name]).norm() > 1e-3 for name, value in replicated['state_dict'].items())
    decays = [{group['weight_decay']: len(group['params']) for group in saved['optimizer']['param_groups']}
              for saved in (sharded, replicated)]
    assert decays[0] == decays[1] and len(decays[0]) == 2
