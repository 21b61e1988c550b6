"""Parts of optimizers that the recipes need beyond MMEngine's own."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from mmengine.runner.amp import autocast
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GroupingConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's constructor with three differences.

    ``flat_decay_mult`` also applies if a custom key has no ``decay_mult``. MMEngine's ignores it there: a key that
    gives a head another learning rate makes the head's norms, biases and single factors decay.

    Parameters with the same options share a group. MMEngine's gives each its own, and PyTorch updates them one by one.

    ``layer_decay_rate`` below 1 makes learning rates fall towards the image, for fine-tuning: that of a parameter in
    layer i of n is multiplied by ``layer_decay_rate ** (n - 1 - i)``, after its ``lr_mult``. The backbone's
    ``get_layer_depth`` tells the layer, see :meth:`.ConvNeur.get_layer_depth`; heads and necks keep their learning
    rate. mmdet and mmseg know the layers of their own ConvNeXt alone.
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '',
                   is_dcn_module: bool | None = None) -> None:
        """Add the groups of a module's parameters to ``params``; MMEngine calls this for its children in turn."""
        super().add_params(params, module, prefix=prefix, is_dcn_module=is_dcn_module)
        if prefix:
            return
        flat_decay_mult = self.paramwise_cfg.get('flat_decay_mult')
        scale_of = self._scales(module)
        groups: dict[str, dict] = {}
        for group in params:
            param, = group.pop('params')
            if scale_of:
                group['lr'] = group.get('lr', self.base_lr) * scale_of[param]
            # A group holds the options of its custom key.
            by_key = 'lr_mult' in group and 'decay_mult' not in group
            if by_key and param.ndim < 2 and flat_decay_mult is not None and self.base_wd is not None:
                group['weight_decay'] = self.base_wd * flat_decay_mult
            groups.setdefault(repr(sorted(group.items())), dict(group, params=[]))['params'].append(param)
        params[:] = groups.values()

    def _scales(self, model: nn.Module) -> dict[nn.Parameter, float]:
        """Return the factor of each parameter's learning rate, or nothing if layers do not differ.

        Raises:
            ValueError: If the rate is out of range, or the backbone does not tell the layers of its parameters.
        """
        rate = self.paramwise_cfg.get('layer_decay_rate', 1.0)
        if not 0 < rate <= 1:
            raise ValueError(f'paramwise_cfg.layer_decay_rate must be in (0, 1], got {rate!r}')
        if rate == 1:
            return {}
        backbone = getattr(model, 'backbone', None)
        if not hasattr(backbone, 'get_layer_depth'):
            raise ValueError(f'paramwise_cfg.layer_decay_rate={rate} needs a backbone with get_layer_depth, such as '
                             f'ConvNeur or the ConvNeXt of mmpretrain, got {type(backbone).__name__}')
        scales = {}
        for name, param in model.named_parameters():
            layer, num_layers = backbone.get_layer_depth(name, 'backbone.')
            scales[param] = rate ** (num_layers - 1 - layer)
        return scales


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Train in mixed precision with bfloat16, also on CPUs.

    bfloat16 has the range of float32, so no loss is scaled. MMEngine's AmpOptimWrapper always has a scaler for the loss
    and refuses CPUs. Arguments are those of MMEngine's :class:`OptimWrapper`.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast to bfloat16; see :meth:`OptimWrapper.optim_context`."""
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield
