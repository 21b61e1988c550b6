"""A process that dies: what MMEngine imports of the config in tests/test_engine/test_many_processes.py."""
import os
import signal
import time
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


def begin_of_process() -> float:
    """The time at which this process began, long before it has imported all it needs."""
    ticks = int(Path('/proc/self/stat').read_text().rpartition(')')[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK')
    return time.time() - age


@HOOKS.register_module()
class DyingHook(Hook):
    """Ends the second process, in each start as the variable DEATHS says: in its place 'killed@5' or 'raised@7'.

    The numbers are those of iterations. Files in the current folder hold the times: ``death<start>``, and
    ``start<start>``, at which torchrun started the first process, as soon as all before were gone.
    """

    def before_run(self, runner):
        if runner.rank == 0:
            Path(f'start{os.environ.get("TORCHELASTIC_RESTART_COUNT")}').write_text(str(begin_of_process()))

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        deaths = dict(enumerate(os.environ.get('DEATHS', '').split()))
        start = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))
        how, _, iteration = deaths.get(start, 'no@-1').partition('@')
        if runner.rank == 1 and runner.iter == int(iteration):
            Path(f'death{start}').write_text(str(time.time()))
            if how == 'killed':
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError('the reason of this death')
