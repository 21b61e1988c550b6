"""What the tests of the shipped configs share."""
import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, DefaultScope
from torch.nn.modules.batchnorm import _BatchNorm

from convneur_mm import config
from convneur_mm.analysis.flops import count_call
from convneur_mm.models.blocks import GRN
from convneur_mm.models.global_branches.neural_memory import NeuralMemory


@functools.cache
def read_config(name: str) -> Config:
    """A shipped config, not to be changed: reading one of mmdet's takes more than half a second."""
    return Config.fromfile(config(name))


@pytest.fixture
def open_config() -> Iterator[Callable[[str], Config]]:
    """Loads a shipped config and stays in its scope until the test ends."""
    with ExitStack() as stack:

        def load(name: str) -> Config:
            cfg = copy.deepcopy(read_config(name))
            stack.enter_context(DefaultScope.overwrite_default_scope(cfg.default_scope))
            return cfg

        yield load


@pytest.fixture(scope='session')
def build_model() -> Callable[[Config], nn.Module]:
    """Builds a config's model as the Runner does, with a preprocessor that may stand beside it."""

    def build(cfg: Config) -> nn.Module:
        settings = dict(cfg.model)
        if 'data_preprocessor' in cfg:
            settings.setdefault('data_preprocessor', cfg.data_preprocessor)
        return MODELS.build(settings)

    return build


@pytest.fixture(scope='session')
def param_groups() -> Callable[[nn.Module, OptimWrapper], dict[str, dict]]:
    """The optimizer's group of each trainable parameter, by the parameter's name."""

    def by_name(model: nn.Module, optim_wrapper: OptimWrapper) -> dict[str, dict]:
        names = {id(param): name for name, param in model.named_parameters() if param.requires_grad}
        groups = optim_wrapper.optimizer.param_groups
        found = [(names.get(id(param)), group) for group in groups for param in group['params']]
        assert sorted(name for name, _ in found) == sorted(names.values())
        return dict(found)

    return by_name


@pytest.fixture(scope='session')
def undecayed() -> Callable[[nn.Module], set[str]]:
    """Names of the parameters that weight decay should spare: norms, biases, GRN's scales, and the memory's M_0."""

    def names(model: nn.Module) -> set[str]:
        return {
            f'{prefix}.{name}'
            for prefix, module in model.named_modules()
            for name, _ in module.named_parameters(recurse=False)
            if name == 'bias' or isinstance(module, (nn.LayerNorm, _BatchNorm, GRN)) or
            (isinstance(module, NeuralMemory) and name in ('w1', 'w2'))
        }

    return names


@pytest.fixture(scope='session')
def count_macs() -> Callable[..., float]:
    """Multiply-accumulates of a call on a zero image of the given shape, as the tools count them."""
    return lambda call, *shape: count_call(lambda: call(torch.zeros(shape)))[1]
