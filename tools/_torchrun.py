"""Run torchrun with CPU threads, and without a traceback if a process has reported its error in one line."""
import logging
import os
import signal
import sys
from tempfile import TemporaryDirectory

if __name__ == '__main__':
    # Without this, Ctrl-C during the import of torch would print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main, parse_args

# Exit codes after such a line: 2 for wrong input, as in argparse, and those of signals.
SAID = (2, 128 + signal.SIGINT, 128 + signal.SIGTERM)


def set_threads(processes: int) -> None:
    """Divide a CPU machine's cores among the processes; torchrun alone would give each process one thread."""
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        os.environ.setdefault('OMP_NUM_THREADS', str(max(1, cores // processes)))


if __name__ == '__main__':
    arguments = parse_args(sys.argv[1:])
    set_threads(int(arguments.nproc_per_node))
    # torchrun warns that --standalone ignores the address, although none was given.
    logging.getLogger('torch.distributed.run').setLevel(logging.ERROR)
    if arguments.max_restarts == 0:
        # The error below repeats its report of a failed process. Before a restart, nothing else reports it.
        logging.getLogger('torch.distributed.elastic.multiprocessing.api').setLevel(logging.CRITICAL)
    # Hide its report of a signal, because the processes report it themselves.
    logging.getLogger('torch.distributed.elastic.agent.server.api').setLevel(logging.ERROR)
    try:
        with TemporaryDirectory(prefix='convneur_launch_') as folder:
            # The processes record here what they need after a restart.
            os.environ['CONVNEUR_LAUNCH_DIR'] = folder
            main()
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode not in SAID:
            raise
        sys.exit(first.exitcode)
