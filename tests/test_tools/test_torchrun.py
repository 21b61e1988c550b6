"""tools/_torchrun.py: which failures of processes start them again."""
import importlib.util
from pathlib import Path

import pytest
from torch.distributed.elastic.agent.server import WorkerState
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

TOOL = Path(__file__).parents[2] / 'tools' / '_torchrun.py'


@pytest.fixture
def restarts(monkeypatch, capsys):
    """What torchrun has left of its restarts after processes have ended with these exit codes, and what is said."""
    spec = importlib.util.spec_from_file_location('torchrun_of_tools', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def restarts(*codes, left=2, most=3, state=WorkerState.FAILED):
        agent = LocalElasticAgent.__new__(LocalElasticAgent)
        agent._remaining_restarts = left
        failures = {rank: ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file='')
                    for rank, code in enumerate(codes) if code}
        monkeypatch.setattr(LocalElasticAgent, '_monitor_workers', lambda agent, group: RunResult(state, {}, failures))
        module.watch_restarts(most)
        assert agent._monitor_workers(None).failures == failures
        return agent._remaining_restarts, capsys.readouterr().err

    return restarts


@pytest.mark.parametrize('codes, how', [((0, -9), '1 has ended (SIGKILL)'), ((1, 0), '0 has ended (exit code 1)'),
                                        ((0, 143), '1 has ended (exit code 143)')])
def test_what_may_not_come_again(restarts, codes, how):
    """torchrun itself counts them down."""
    assert restarts(*codes) == (2, f'note: process {how}; restart 2 of 3\n')


@pytest.mark.parametrize('codes', [(2, 2), (0, 2), (1, 2)])
def test_wrong_input_would_be_wrong_again(restarts, codes):
    assert restarts(*codes) == (0, '')


def test_nothing_is_said_without_a_restart(restarts):
    assert restarts(1, left=0) == (0, '')
    assert restarts(0, state=WorkerState.HEALTHY) == (2, '')
    assert restarts(0, state=WorkerState.SUCCEEDED) == (2, '')
