"""What the tools that read one config share: its arguments, and how it is read."""
from __future__ import annotations

import argparse
from collections.abc import Callable

from mmengine.config import Config

from convneur_mm.engine.files.errors import one_line_errors
from convneur_mm.engine.launch import OverridesAction, find_config, read_config


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The config and its overrides, as tools/train.py takes them."""
    parser.add_argument('config', metavar='CONFIG', help='path of a config, or the name of one that convneur_mm ships')
    parser.add_argument('--cfg-options', nargs='+', action=OverridesAction, default={}, metavar='KEY=VALUE',
                        help='override settings, e.g. model.backbone.memory_cfg.chunk_size=196; a list is '
                        'written "key=[a,b]"')


def load_config(args: argparse.Namespace) -> Config:
    """The config as tools/train.py would run it: with overrides, and its settings brought to where they belong.

    Raises:
        LaunchError: If there is no such config, it is no valid one, or a setting or package in it is not there.
    """
    return read_config(find_config(args.config), args.cfg_options)


def run(main: Callable[[], None]) -> None:
    """Run ``main``; what the user gave wrong ends it with one line and exit code 2."""
    with one_line_errors():
        main()
