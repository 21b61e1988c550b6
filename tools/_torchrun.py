"""torchrun with threads for CPUs, and in silence where a process has said in one line what is wrong."""
import logging
import os
import signal
import sys
import time

if __name__ == '__main__':
    # While torch is imported, Ctrl-C ends this without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from torch.distributed.elastic.agent.server import WorkerState
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main, parse_args

# Exit codes of the tools after such a line: of wrong input, as argparse's, and of signals.
WRONG_INPUT = 2
SAID = (WRONG_INPUT, 128 + signal.SIGINT, 128 + signal.SIGTERM)


def set_threads(processes: int) -> None:
    """On CPUs the processes share the cores; torchrun alone would give each process one thread."""
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        os.environ.setdefault('OMP_NUM_THREADS', str(max(1, cores // processes)))


def watch_restarts(most: int) -> None:
    """Has torchrun say why it starts the processes again, and not do so where the same would come again.

    Args:
        most (int): Number of its restarts.
    """
    monitor = LocalElasticAgent._monitor_workers

    def monitor_and_judge(agent: LocalElasticAgent, *args: object) -> RunResult:
        result = monitor(agent, *args)
        if result.state != WorkerState.FAILED or not agent._remaining_restarts:
            return result
        rank, failure = min(result.failures.items(), key=lambda item: item[1].timestamp)
        if any(other.exitcode == WRONG_INPUT for other in result.failures.values()):
            agent._remaining_restarts = 0
        else:
            how = failure.signal_name() if failure.exitcode < 0 else f'exit code {failure.exitcode}'
            print(f'note: process {rank} has ended ({how}); restart {most - agent._remaining_restarts + 1} of {most}',
                  file=sys.stderr, flush=True)
        return result

    LocalElasticAgent._monitor_workers = monitor_and_judge


if __name__ == '__main__':
    arguments = parse_args(sys.argv[1:])
    watch_restarts(arguments.max_restarts)
    # Processes that are started again tell the checkpoints of this run from older ones by it.
    os.environ['CONVNEUR_LAUNCHED'] = str(time.time())
    set_threads(int(arguments.nproc_per_node))
    # torchrun warns that --standalone needs no address, which is that of none given.
    logging.getLogger('torch.distributed.run').setLevel(logging.ERROR)
    # What it says of a failed process is in the error below as well.
    logging.getLogger('torch.distributed.elastic.multiprocessing.api').setLevel(logging.CRITICAL)
    # That it has got a signal, which the processes say themselves.
    logging.getLogger('torch.distributed.elastic.agent.server.api').setLevel(logging.ERROR)
    try:
        main()
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode not in SAID:
            raise
        sys.exit(first.exitcode)
