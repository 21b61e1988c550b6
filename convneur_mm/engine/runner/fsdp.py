"""Divide weights, gradients and optimizer state among processes: FSDP for MMEngine's FlexibleRunner."""
from __future__ import annotations

import os
from functools import partial

import torch
from mmengine._strategy.fsdp import FSDP, FSDPStrategy
from mmengine.config import ConfigDict
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import STRATEGIES
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from ...models.blocks import ConvNeurBlock
from ..files.errors import LaunchError


@STRATEGIES.register_module()
class BlockFSDPStrategy(FSDPStrategy):
    """MMEngine's FSDPStrategy with each block of ConvNeur as a unit, and a checkpoint of the whole model.

    It fixes these faults of MMEngine's:

    - Parameter options follow the shapes before FSDP flattens them; else ``flat_decay_mult`` would apply to all.
    - Gradients are clipped by their norm over all processes, not by that of the local part.
    - The optimizer's state can be loaded.
    - It also runs on CPUs, over gloo.

    Args:
        model_wrapper (dict | None): Further arguments of MMFullyShardedDataParallel. Defaults to None.
        **kwargs: See :class:`mmengine._strategy.DDPStrategy`.

    Attributes:
        whole_weights (dict[str, Tensor]): Parameters and buffers of the unwrapped model as full-size meta tensors.
    """

    def __init__(self, *, model_wrapper: dict | None = None, **kwargs: object) -> None:
        on_gpu = torch.cuda.is_available()
        wrapper = dict(
            auto_wrap_policy=partial(transformer_auto_wrap_policy, transformer_layer_cls={ConvNeurBlock}),
            device_id=int(os.environ['LOCAL_RANK']) if on_gpu else 'cpu')
        # On a CPU there is nothing to offload, and PyTorch would free what it still needs.
        whole = dict(rank0_only=True, offload_to_cpu=on_gpu)
        super().__init__(
            model_wrapper={**wrapper, **(model_wrapper or {})},
            state_dict_cfg=dict(state_dict_type='FULL_STATE_DICT',
                                state_dict_config=dict(type='FullStateDictConfig', **whole),
                                optim_state_dict_config=dict(type='FullOptimStateDictConfig', **whole)), **kwargs)

    def prepare(self, model: nn.Module | dict, *, optim_wrapper: OptimWrapper | dict | None = None, **kwargs: object
                ) -> tuple | nn.Module:
        """Build the optimizer before the model is wrapped; see :meth:`SingleDeviceStrategy.prepare`.

        Raises:
            LaunchError: If the training has only one process.
        """
        if optim_wrapper is not None and not is_distributed():
            raise LaunchError('strategy BlockFSDPStrategy has nothing to divide in one process; train with several '
                              '(tools/dist_train.sh CONFIG NUMBER), or without strategy and runner_type')
        if isinstance(optim_wrapper, dict):
            model = self.build_model(model)
            # All processes must agree on whether a step is skipped.
            scaler = dict(use_fsdp=True) if optim_wrapper.get('type') == 'AmpOptimWrapper' else {}
            optim_wrapper = build_optim_wrapper(model, ConfigDict(optim_wrapper, **scaler))
        return super().prepare(model, optim_wrapper=optim_wrapper, **kwargs)

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        """Set ``whole_weights`` too; see :meth:`BaseStrategy.build_model`."""
        model = super().build_model(model)
        self.whole_weights = {
            name: nn.Parameter(value.to('meta'), value.requires_grad) if isinstance(value, nn.Parameter) else
            value.to('meta') for name, value in model.state_dict(keep_vars=True).items()}
        return model

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        # A test in one process keeps the whole model.
        return super()._wrap_model(model) if is_distributed() else model.to(get_device())

    def build_optim_wrapper(self, optim_wrapper: OptimWrapper, model: nn.Module) -> OptimWrapper:
        """Replace the optimizer's parameters by those of the wrapped model."""
        parts = {name.replace('_fsdp_wrapped_module.', ''): part for name, part in model.named_parameters()}
        for group in optim_wrapper.optimizer.param_groups:
            group['params'] = [parts[self.id_to_name[id(whole)]] for whole in group['params']]
        if getattr(optim_wrapper, 'clip_func', None) is torch.nn.utils.clip_grad_norm_:
            optim_wrapper.clip_func = lambda parts, **settings: model.clip_grad_norm_(**settings)
        return optim_wrapper

    def model_state_dict(self) -> dict[str, Tensor]:
        """Return the whole model's weights in the first process, only buffers in the others."""
        # detach() drops the marks that FSDP leaves, which need pickle.
        return {name: value.detach() for name, value in super().model_state_dict().items()}

    def optim_state_dict(self) -> dict:
        """Return the whole optimizer's state by parameter name in the first process, and {} in the others."""
        return FSDP.optim_state_dict(self.model, self.optim_wrapper.optimizer)

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load what :meth:`optim_state_dict` has returned."""
        self.optim_wrapper.load_state_dict(
            FSDP.optim_state_dict_to_load(self.model, self.optim_wrapper.optimizer, state_dict))
