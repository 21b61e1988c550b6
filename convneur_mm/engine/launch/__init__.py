"""Start a training or a test: the command line, the config, and the processes."""
from ..files.errors import LaunchError
from .command_line import OverridesAction, add_config_arguments, add_model_arguments, config_of, make_parser
from .config import (
    SCOPES,
    find_config,
    read_config,
    readable_checkpoint,
    set_loader_defaults,
    use_resumable_loop,
    without_sync_bn,
)
from .entry import load_config, run
from .processes import why_no_gpu

__all__ = [
    'LaunchError', 'OverridesAction', 'SCOPES', 'add_config_arguments', 'add_model_arguments', 'config_of',
    'find_config', 'load_config', 'make_parser', 'read_config', 'readable_checkpoint', 'run', 'set_loader_defaults',
    'use_resumable_loop', 'why_no_gpu', 'without_sync_bn',
]
