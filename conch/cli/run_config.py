"""From a command line to a validated run configuration.

    conch train ppo --config-name randomwalks/ppo train.seed=1 generation.temperature=0.7

A YAML file below `configs/` is composed by Hydra (its `defaults` list may pull in other files, from its own
folder or from `configs/`), `key=value` overrides are laid over it, and the result is validated against the
program's section. Hydra changes no working directory and writes no files here. Overrides may name keys that
the YAML leaves out: the section alone decides which keys exist.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import yaml
from pydantic_core import to_jsonable_python

import conch
from conch.cli.options import describe, over_defaults
from conch.cli.parser import CommandParser
from conch.config import RewardConfig, Section, load
from conch.config.base import has_key, nearest_key, nested_section, refuse_unknown_keys
from conch.config.reward import source_in_short
from conch.errors import ConchError, ConfigError
from conch.log import setup_logging
from conch.machine.output import reader_may_leave

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

SectionT = TypeVar("SectionT", bound=Section)


def default_config_dir() -> Path:
    """The configurations that come with the package: in a checkout, where they are a link, its `configs/`."""
    return (Path(conch.__file__).parent / "configs").resolve()


def compose(name: str, overrides: Sequence[str], config_dir: Path) -> dict[str, Any]:
    """Compose `<config_dir>/<name>.yaml` and `overrides` into a plain dict, interpolations resolved.

    name: path of the file below `config_dir`, without suffix: `randomwalks/ppo`.
    overrides: in Hydra's syntax: `key=value` sets a key whether or not the file has it, `~key` removes one,
        and `group=choice` takes another file from the folder `group`.

    Raises:
        ConfigError: no such file (those that exist are listed), YAML or an override that cannot be read.
    """
    # Hydra takes most of a second to import: not before a program really composes something.
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    file = _find_config(name, config_dir)
    # Hydra nests a file under its folder's name; so that folder is made the root and `configs/` searched too.
    search = f"hydra.searchpath=['file://{config_dir.resolve()}']"
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(file.parent), version_base="1.3"):
            forced = [_force(text, (file.parent, config_dir)) for text in overrides]
            config = hydra_compose(file.stem, overrides=[search, *forced])
            values = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"cannot compose {file}: {_readable(error)}") from None
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def load_run_config(
    section: type[SectionT],
    argv: Sequence[str],
    *,
    default_name: str,
    config_dir: Path | None = None,
    check: Callable[[SectionT], object] | None = None,
) -> SectionT:
    """Turn command-line arguments into a validated `section`.

    Understands `[--config-name NAME] [--config-dir DIR] [--print-config] [--multirun] [--reward SOURCE]
    [--help] [key=value ...]`. `--help` prints every key with its type, default and meaning, where a file is
    named with the file's values for defaults; `--print-config` prints the composed configuration, and
    without any `key=value` also one that lacks something, with a comment that says what; both exit 0. With
    `--multirun` this process becomes the parent of a sweep, which starts the program anew for each job.

    default_name: the configuration that runs when none is named.
    config_dir: folder of the configurations; None takes `default_config_dir()`.
    check: raises a ConfigError for what is wrong that the section alone does not see; of a sweep it is asked
        for every job before the first one starts.

    Raises:
        ConfigError: see `compose` and `conch.config.load`.
        SystemExit: after `--help` and `--print-config` (0), for an unknown option (2), and after a sweep (see
            `conch.cli.sweeps.run_sweep`).
    """
    parser = _parser(section, default_name, config_dir or default_config_dir())
    arguments = parser.parse_intermixed_args(list(argv))
    arguments.overrides += _reward_overrides(getattr(arguments, "reward", None))
    _find_config(arguments.config_name, arguments.config_dir, default_name)
    if arguments.help:
        shown = None
        if (arguments.config_name, arguments.config_dir) != (default_name, parser.get_default("config_dir")):
            shown = load(section, compose(arguments.config_name, (), arguments.config_dir))
        keys = "keys" if shown is None else f"keys, with the values of {arguments.config_name} as defaults"
        text = f"{parser.format_help()}\n{keys}:\n{describe(section, shown)}\n"
        if _may_sweep(section):
            from conch.cli.sweeps import SweepConfig

            text += f"\nkeys of --multirun:\n{describe(SweepConfig, prefix='sweep.')}\n"
        print(text, end="")
        raise SystemExit(0)
    if getattr(arguments, "multirun", False):
        options = _file_options(arguments, default_name, parser.get_default("config_dir"))
        raise SystemExit(_sweep(section, argv, arguments, options, check))
    if _may_sweep(section) and any(text.lstrip("+").startswith("sweep.") for text in arguments.overrides):
        raise ConfigError("keys sweep.* say how a sweep runs: add --multirun, or leave them out")
    roots = config_roots(arguments.config_name, arguments.config_dir)
    # Before Hydra is loaded, which takes longer than all that is done before.
    refuse_unknown_keys(section, _keys_set(arguments.overrides, roots))
    values = compose(arguments.config_name, arguments.overrides, arguments.config_dir)
    try:
        config = load(section, values)
    except ConfigError as error:
        if not arguments.print_config or arguments.overrides:
            raise
        print(_incomplete(section, values, error), end="")
        raise SystemExit(0) from None
    if arguments.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    if check is not None:
        check(config)
    return config


def _file_options(arguments: argparse.Namespace, default_name: str, default_dir: Path) -> list[str]:
    """The words that name another configuration file than the default."""
    options: list[str] = []
    if arguments.config_name != default_name:
        options += ["--config-name", arguments.config_name]
    if arguments.config_dir != default_dir:
        options += ["--config-dir", str(arguments.config_dir)]
    return options


def _may_sweep(section: type[Section]) -> bool:
    """True for a configuration of a run: one that says where the run is and whether it resumes."""
    train = section.model_fields.get("train")
    fields = getattr(nested_section(train.annotation), "model_fields", {}) if train is not None else {}
    return {"run_dir", "resume"} <= set(fields)


def _sweep(
    section: type[Section],
    argv: Sequence[str],
    arguments: argparse.Namespace,
    options: Sequence[str],
    check: Callable[[Any], object] | None,
) -> int:
    from conch.cli.sweeps import Request, run_sweep

    return run_sweep(
        Request(
            section,
            words=tuple(argv),
            overrides=tuple(arguments.overrides),
            options=tuple(options),
            config_name=arguments.config_name,
            config_dir=arguments.config_dir,
            print_only=arguments.print_config,
            check=None if arguments.print_config else check,  # printed, a run is not checked either
        )
    )


def config_roots(name: str, config_dir: Path) -> tuple[Path, Path]:
    """Folders in which the groups of a configuration file are searched: its own, then `config_dir`.

    Raises:
        ConfigError: no such file.
    """
    return _find_config(name, config_dir).parent, config_dir


def _incomplete(section: type[Section], values: Mapping[str, Any], error: ConfigError) -> str:
    """A file's values over the defaults as YAML, below what it lacks to run, required keys among that."""
    lacks = "".join(f"# {line}\n" for line in str(error).splitlines())
    return lacks + _yaml(to_jsonable_python(over_defaults(section, values)))


def to_yaml(config: Section) -> str:
    """Return the configuration as YAML that `compose` and `load` turn into an equal one."""
    return _yaml(config.model_dump(mode="json"))


def _yaml(values: dict[str, Any]) -> str:
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Writes strings so that OmegaConf, too, reads them as such: `1e5`, a number by its rules and none by
    YAML 1.1's, in quotes, and `${name}` without its meaning."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    is_word = re.fullmatch(r"[A-Za-z_/][^\x85\u2028\u2029]*", literal) is not None
    return dumper.represent_scalar("tag:yaml.org,2002:str", literal, style=None if is_word else '"')


_Dumper.add_representer(str, _represent_text)


def save_resolved(config: Section, path: Path) -> None:
    """Write the validated configuration as YAML to `path`, in a new folder where it has none.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the resolved configuration to {path}: {error.strerror}") from error


def run_main(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a program's `main` on the command line and leave with its exit code.

    0 for success, 1 for a `ConchError` (its message goes to stderr after `error:`, without a traceback), 130
    for Ctrl-C. Any other exception is a bug of ours or of the user's code and keeps its traceback. A reader
    of stdout that leaves before the end, as `head` does, is no error.
    """
    setup_logging()
    try:
        with reader_may_leave():
            main(sys.argv[1:])
    except ConchError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(0)


class _RunParser(CommandParser):
    """The options of a program that takes settings beside them.

    section: its settings.
    """

    def __init__(self, section: type[Section]) -> None:
        super().__init__(description=(section.__doc__ or "").strip(), add_help=False)
        self._section = section

    def unknown_option(self, name: str, value: str) -> str:
        key = name.removeprefix("--").replace("-", "_")
        if has_key(self._section, key):
            return f"settings are written without dashes: {key}={value or 'VALUE'}"
        hint = super().unknown_option(name, value)
        if hint.startswith("did you mean"):
            return hint
        return f"settings are written without dashes, key=value; {nearest_key(self._section, key)}"


def _parser(section: type[Section], default_name: str, config_dir: Path) -> argparse.ArgumentParser:
    parser = _RunParser(section)
    parser.add_argument("-h", "--help", action="store_true", help="show this text and every key, and leave")
    parser.add_argument(
        "--config-name", default=default_name, metavar="NAME", help=f"file to run (default: {default_name})"
    )
    parser.add_argument(
        "--config-dir",
        type=Path,
        default=config_dir,
        metavar="DIR",
        help=f"its folder (default: {config_dir})",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="show the composed configuration, and leave"
    )
    if _may_sweep(section):
        parser.add_argument(
            *("-m", "--multirun"),
            action="store_true",
            help="run once for each combination of values: key=a,b other=range(1,4); keys sweep.* say how",
        )
    reward = section.model_fields.get("reward")
    if reward is not None and nested_section(reward.annotation) is RewardConfig:
        parser.add_argument(
            "--reward",
            metavar="SOURCE",
            help="what gives rewards, in short: module:function, file.py:function, host:port/model, "
            "http://host:port/path, verifier:gsm8k or judge:FILE.yaml",
        )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="laid over the file")
    return parser


def _find_config(name: str, config_dir: Path, default_name: str = "") -> Path:
    """The file of a configuration.

    default_name: that which runs where none is named: a message lists those of this kind, if there are any.

    Raises:
        ConfigError: there is none; with the nearest name, else all.
    """
    file = (config_dir / f"{name.removesuffix('.yaml')}.yaml").absolute()
    if file.is_file():
        return file
    if not config_dir.is_dir():
        raise ConfigError(f"no configuration folder {config_dir.resolve()}; name one with --config-dir")
    names = sorted(str(path.relative_to(config_dir).with_suffix("")) for path in config_dir.rglob("*.yaml"))
    kind = default_name.rpartition("/")[2]
    names = [each for each in names if kind and each.rpartition("/")[2].startswith(kind)] or names
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"there is: {', '.join(names) or 'none'}"
    raise ConfigError(f"no configuration `{name}` in {config_dir}; {hint}")


def _reward_overrides(source: str | None) -> list[str]:
    """What `--reward SOURCE` stands for: `reward.function='rewards.py:f'`."""
    if source is None:
        return []
    ((key, value),) = source_in_short(source).items()
    if isinstance(value, Mapping):  # the file of a judge
        ((inner, value),) = value.items()
        key = f"{key}.{inner}"
    literal = value.replace("'", "\\'")
    return [f"reward.{key}='{literal}'"]


def _keys_set(overrides: Iterable[str], roots: Sequence[Path]) -> list[str]:
    """The keys that overrides plainly set; choices of files, and what else Hydra knows, are left out."""
    matches = [re.match(r"\+{0,2}([\w.]+)=", text) for text in overrides]
    keys = [match[1] for match in matches if match]
    return [key for key in keys if not any((root / key).is_dir() for root in roots)]


def _force(text: str, roots: Sequence[Path]) -> str:
    """Return the override in a form that may add a key that the file leaves out, which Hydra refuses."""
    from hydra.core.override_parser.types import OverrideType

    override = parse_override(text)
    if override.is_sweep_override():
        key, _, value = text.partition("=")
        remedy = (
            f"write {key}=[{value}] for a list, {shell_word(text)} for text; --multirun tries each of them"
        )
        raise ConfigError(f"override `{text}` holds several values; {remedy}")
    picks_file = any((root / override.key_or_group).is_dir() for root in roots)
    return f"++{text}" if override.type is OverrideType.CHANGE and not picks_file else text


def parse_override(text: str) -> Override:
    """Parse an override by Hydra's grammar.

    Raises:
        ConfigError: says how a shell and Hydra are told to read the text as a value.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        remedy = (
            f"in a shell, {shell_word(text)} with both kinds of quotes" if "=" in text else "write key=value"
        )
        raise ConfigError(f"cannot read the override `{text}`: {_readable(error)}; {remedy}") from None


def shell_word(override: str) -> str:
    """Return an override with the quotes that a shell and Hydra want around a value of special characters."""
    key, _, value = override.partition("=")
    bare = value.strip("\"'").replace("'", "\\'")
    return f"\"{key}='{bare}'\""


def _readable(error: Exception) -> str:
    """Return the error's text without the pointers to Hydra's handbook and to its search path."""
    message = str(error).partition("\nConfig search path:")[0]
    lines = [line.strip() for line in message.splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith("See http"))
