"""Arguments and loading of a config, shared by the tools that read one."""
from __future__ import annotations

import argparse
from collections.abc import Callable

from mmengine.config import Config

from convneur_mm.engine.files.errors import one_line_errors
from convneur_mm.engine.launch import OverridesAction, find_config, read_config


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the config and its overrides as arguments, as in tools/train.py."""
    parser.add_argument('config', metavar='CONFIG', help='path of a config, or the name of one that convneur_mm ships')
    parser.add_argument('--cfg-options', nargs='+', action=OverridesAction, default={}, metavar='KEY=VALUE',
                        help='override settings, e.g. model.backbone.memory_cfg.chunk_size=196; a list is '
                        'written "key=[a,b]"')


def load_config(args: argparse.Namespace) -> Config:
    """Load the config as tools/train.py would run it, with overrides and settings applied.

    Raises:
        LaunchError: If there is no such config, it is invalid, or a setting or package in it is missing.
    """
    return read_config(find_config(args.config), args.cfg_options)


def run(main: Callable[[], None]) -> None:
    """Run ``main``; a wrong argument ends the tool with one line and exit code 2."""
    with one_line_errors():
        main()
