"""torchrun with threads for CPUs, and in silence where a process has said in one line what is wrong."""
import logging
import os
import signal
import sys
from tempfile import TemporaryDirectory

if __name__ == '__main__':
    # While torch is imported, Ctrl-C ends this without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main, parse_args

# Exit codes of the tools after such a line: of wrong input, as argparse's, and of signals.
SAID = (2, 128 + signal.SIGINT, 128 + signal.SIGTERM)


def set_threads(processes: int) -> None:
    """On CPUs the processes share the cores; torchrun alone would give each process one thread."""
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        os.environ.setdefault('OMP_NUM_THREADS', str(max(1, cores // processes)))


if __name__ == '__main__':
    arguments = parse_args(sys.argv[1:])
    set_threads(int(arguments.nproc_per_node))
    # torchrun warns that --standalone needs no address, which is that of none given.
    logging.getLogger('torch.distributed.run').setLevel(logging.ERROR)
    if arguments.max_restarts == 0:
        # What it says of a failed process is in the error below as well; before a restart nothing else says it.
        logging.getLogger('torch.distributed.elastic.multiprocessing.api').setLevel(logging.CRITICAL)
    # That it has got a signal, which the processes say themselves.
    logging.getLogger('torch.distributed.elastic.agent.server.api').setLevel(logging.ERROR)
    try:
        with TemporaryDirectory(prefix='convneur_launch_') as folder:
            # The processes record there what they must know after a restart.
            os.environ['CONVNEUR_LAUNCH_DIR'] = folder
            main()
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode not in SAID:
            raise
        sys.exit(first.exitcode)
