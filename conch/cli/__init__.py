"""Command lines: run configurations by Hydra (`run_config.py`), options of other programs (`options.py`)."""

from __future__ import annotations

from conch.cli.options import (
    Option,
    add_options,
    describe,
    keywords_of,
    option_names,
    parse_options,
    written_with,
)
from conch.cli.parser import CommandParser
from conch.cli.run_config import (
    compose,
    default_config_dir,
    load_run_config,
    run_main,
    save_resolved,
    to_yaml,
)

__all__ = [
    "CommandParser",
    "Option",
    "add_options",
    "compose",
    "default_config_dir",
    "describe",
    "keywords_of",
    "load_run_config",
    "option_names",
    "parse_options",
    "run_main",
    "save_resolved",
    "to_yaml",
    "written_with",
]
