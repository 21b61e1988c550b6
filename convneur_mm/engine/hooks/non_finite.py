"""Stop a training whose loss is NaN or infinite, or skip the batch."""
from __future__ import annotations

import math
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ..files.errors import LaunchError, some
from ..runner.model_wrappers import own_weights

# Key of their number in the message hub, and so in checkpoints.
SKIPPED = 'skipped_batches'


@HOOKS.register_module()
class NonFiniteLossHook(Hook):
    """Stop a training whose loss is not finite, or whose weights are not finite when they are to be saved.

    The loss is the value that MMEngine has fetched for its log, so that a GPU is not waited for once more. With
    ``max_skips``, each step waits for the losses of all processes, and the weights stay unchanged if one is not
    finite. ::

        custom_hooks = [dict(type='NonFiniteLossHook', max_skips=10)]

    Args:
        max_skips (int): Number of batches to skip in the whole training before it stops. Defaults to 0.

    Raises:
        ValueError: If ``max_skips`` is not an integer of at least 0.
    """

    priority = 'HIGH'  # runs before anything is saved

    def __init__(self, max_skips: int = 0) -> None:
        if isinstance(max_skips, bool) or not isinstance(max_skips, int) or max_skips < 0:
            raise ValueError(f'max_skips must be an integer of at least 0, got {max_skips!r}')
        self.max_skips = max_skips
        self._skips = False

    def before_train(self, runner: Runner) -> None:
        """Make the optimizer check each loss first, if batches may be skipped."""
        if not self.max_skips:
            return
        update = runner.optim_wrapper.update_params

        def update_if_finite(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            finite = torch.isfinite(loss.detach()).all().float()
            all_reduce(finite, 'min')
            self._skips = not finite
            if not self._skips:
                update(loss, *args, **kwargs)

        runner.optim_wrapper.update_params = update_if_finite

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        """Check the loss.

        Raises:
            LaunchError: If it is not finite and may not be skipped. Names iteration, rank and images.
        """
        loss = torch.as_tensor((outputs or {}).get('loss', 0.0)).item()
        broken = not math.isfinite(loss)
        if not (broken or self._skips):
            return
        if broken:
            parts = [name for name, value in outputs.items() if name != 'loss' and not _is_finite(value)]
            what = f'loss is {loss}{f" ({some(parts)})" if parts else ""} at iteration {runner.iter + 1} in ' \
                   f'process {runner.rank}, images {some(_images(data_batch) or ["unknown"])}'
        else:
            what = f'the loss of another process is not finite at iteration {runner.iter + 1}'
        if not self.max_skips:
            raise LaunchError(
                f'{what}; the checkpoint before it can be gone on from: look at the images, lower '
                'optim_wrapper.optimizer.lr, set optim_wrapper.clip_grad, or have such batches left out by '
                "custom_hooks=[dict(type='NonFiniteLossHook', max_skips=10)]")
        skipped = runner.message_hub.get_info(SKIPPED, 0) + 1
        if skipped > self.max_skips:
            raise LaunchError(f'{what}, after {self.max_skips} batches were left out (max_skips): look at the images, '
                              'lower optim_wrapper.optimizer.lr, or set optim_wrapper.clip_grad')
        runner.message_hub.update_info(SKIPPED, skipped)
        runner.logger.warning(f'{what}: skipping this batch ({skipped} of at most {self.max_skips}, max_skips)')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check the weights: a gradient may not be finite although this process's loss is.

        Raises:
            LaunchError: If one is not finite. The previous checkpoint still exists then.
        """
        weights = checkpoint['state_dict']
        broken = [name for name, value in own_weights(runner).items() if isinstance(value, nn.Parameter)
                  and name in weights and not torch.isfinite(weights[name]).all()]
        if broken:
            raise LaunchError(f'after iteration {checkpoint["meta"]["iter"]} these weights are not finite, and were '
                              f'not saved: {some(broken)}; go on from the checkpoint before, with a lower '
                              'optim_wrapper.optimizer.lr or with optim_wrapper.clip_grad')


def _is_finite(value: object) -> bool:
    return not isinstance(value, (int, float, Tensor)) or bool(torch.as_tensor(value).isfinite().all())


def _images(batch: object) -> list[str]:
    """Return the image paths of a batch, or 'without a path' for a sample without."""
    samples = batch.get('data_samples') if isinstance(batch, dict) else None
    return [str(getattr(sample, 'img_path', 'without a path')) for sample in samples or ()]
