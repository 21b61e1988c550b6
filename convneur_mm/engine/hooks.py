"""Hooks of the training and test loops."""
from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from .checkpoint import check_some_match, checkpoint_weights


@HOOKS.register_module()
class CheckpointKeysHook(Hook):
    """Stops a run whose checkpoint has none of the model's weights; MMEngine would go on with random ones."""

    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compares the names in ``checkpoint`` with the model's before they are loaded."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        check_some_match(model.state_dict(), checkpoint_weights(checkpoint), runner._load_from or 'the checkpoint')
