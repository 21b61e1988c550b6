"""A process that dies: what MMEngine imports of the config in tests/test_engine/test_many_processes.py."""
import os
import signal

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class DyingHook(Hook):
    """Ends the second process, in each start as the variable DEATHS says: in its place 'killed@5' or 'raised@7'.

    The numbers are those of iterations.
    """

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        deaths = dict(enumerate(os.environ.get('DEATHS', '').split()))
        start = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))
        how, _, iteration = deaths.get(start, 'no@-1').partition('@')
        if runner.rank == 1 and runner.iter == int(iteration):
            if how == 'killed':
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError('the reason of this death')
