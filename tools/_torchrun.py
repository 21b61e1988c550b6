"""torchrun with threads for CPUs, and in silence where a process has said in one line what is wrong."""
import logging
import os
import sys

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main, parse_args

# Exit code of the tools, and of argparse, after such a line.
WRONG_INPUT = 2


def set_threads(processes: int) -> None:
    """On CPUs the processes share the cores; torchrun alone would give each process one thread."""
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        os.environ.setdefault('OMP_NUM_THREADS', str(max(1, cores // processes)))


if __name__ == '__main__':
    set_threads(int(parse_args(sys.argv[1:]).nproc_per_node))
    # torch 2.1 warns that --standalone needs no address, which is that of none given.
    logging.getLogger('torch.distributed.run').setLevel(logging.ERROR)
    # What it says of a failed process is in the error below as well.
    logging.getLogger('torch.distributed.elastic.multiprocessing.api').setLevel(logging.CRITICAL)
    try:
        main()
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode != WRONG_INPUT:
            raise
        sys.exit(WRONG_INPUT)
