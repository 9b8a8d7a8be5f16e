"""Completion of `conch` in a shell: verbs, algorithms, keys and options with their choices, configurations.

    source <(conch completion bash)               in ~/.bashrc
    source <(conch completion zsh)                in ~/.zshrc, behind compinit
    conch completion fish | source                in ~/.config/fish/config.fish

The shell asks `conch completion --line "conch ppo mod"`, which loads no more than the settings of that verb:
about a third of a second where keys or options are asked for, a tenth where verbs are. It prints nothing
where only the shell knows what may follow: the name of a file.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, get_origin

if TYPE_CHECKING:
    from conch.config import Section

_BASH = r"""
_conch() {
    local line="${COMP_LINE:0:COMP_POINT}" breaks="${COMP_WORDBREAKS//[^=:]/}" IFS=$'\n'
    local word="${line##*[[:space:]]}" head=""
    COMPREPLY=($(conch completion --line "$line" 2>/dev/null))
    # bash takes = and : for ends of words: what stands before the last of them is on the line already.
    [[ -n $breaks ]] && head="${word%"${word##*[$breaks]}"}"
    COMPREPLY=("${COMPREPLY[@]#"$head"}")
    [[ ${COMPREPLY[*]} == *[=.] ]] && compopt -o nospace
}
complete -o default -F _conch conch
"""
_ZSH = r"""
_conch() {
    local -a found unfinished finished
    found=("${(@f)$(conch completion --line "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)}")
    found=(${found:#})
    unfinished=(${(M)found:#*[=.]})
    finished=(${found:#*[=.]})
    if (( ${#found} )); then
        compadd -Q -S '' -a unfinished
        compadd -Q -a finished
    else
        compset -P '*='
        _files
    fi
}
compdef _conch conch
"""
_FISH = r"""
function __conch_complete
    conch completion --line (commandline -cp | string collect) 2>/dev/null
end
complete -c conch -a '(__conch_complete)'
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}

_BELOW = {
    "convert": ("ensemble",),
    "runs": ("diff",),
    "completion": tuple(SCRIPTS),
}
"""Verb -> words that may stand behind it, where no parser of options names them."""


def main(argv: Sequence[str], verbs: Mapping[str, Sequence[str]], run: Callable[[list[str]], object]) -> int:
    """Print a shell's script, or what may stand at the end of a line.

    verbs: word -> the words that it stands for: of a verb itself, of a short form others.
    run: runs the command line of words, for the options that its help names.
    """
    if argv[:1] == ["--line"] and len(argv) == 2:
        for candidate in candidates(argv[1], verbs, run):
            print(candidate)
        return 0
    if len(argv) == 1 and argv[0] in SCRIPTS:
        print(SCRIPTS[argv[0]].strip())
        return 0
    wants_help = argv[:1] in (["-h"], ["--help"])
    text = f"usage: conch completion {{{','.join(SCRIPTS)}}}\n\n{__doc__ or ''}".rstrip()
    print(text, file=sys.stdout if wants_help else sys.stderr)
    return 0 if wants_help else 2


def candidates(
    line: str, verbs: Mapping[str, Sequence[str]], run: Callable[[list[str]], object]
) -> list[str]:
    """Return what the last word of `line` may become, in full. An unfinished key ends with `.` or `=`."""
    words = line.split()[1:]
    last = "" if not words or line[-1:].isspace() else words.pop()
    if not words:
        return _beginning(last, verbs)
    before = [*verbs.get(words[0].replace("_", "-"), ()), *words[1:]]
    if not before:
        return []
    if before == ["train"]:
        return _beginning(
            last, [words[-1] for words in verbs.values() if len(words) == 2 and words[0] == "train"]
        )
    below = _BELOW.get(before[0], ()) if len(before) == 1 else ()
    if last and not last.startswith("-") and below:
        return _beginning(last, below)
    section = _section_of(before)
    if last.startswith("-") or before[-1].startswith("-") or section is None:
        return [*_beginning(last, below), *_of_program(before, last, section, run)]
    key, sign, value = last.partition("=")
    if sign:
        return [f"{key}={choice}" for choice in _beginning(value, _choices(section, key.split(".")))]
    return _beginning(last, _keys(section, last))


def _beginning(text: str, words: Iterable[str]) -> list[str]:
    return [word for word in dict.fromkeys(words) if word.startswith(text)]


def _section_of(words: Sequence[str]) -> type[Section] | None:
    """The section whose keys stand behind these words; None for programs with options."""
    match words:
        case ["train", algorithm, *_]:
            from conch.config.algorithms import run_config_of

            with contextlib.suppress(ModuleNotFoundError):
                return run_config_of(algorithm.replace("-", "_"))
        case ["best-of-n", *_]:
            from conch.evaluation.sampling.config import BestOfNRunConfig

            return BestOfNRunConfig
        case ["rollout-server", *_]:
            from conch.rollouts.server_config import ServerConfig

            return ServerConfig
        case ["reference-server", *_]:
            from conch.reference.server_config import ReferenceServerConfig

            return ReferenceServerConfig
        case ["reward-server", *_]:
            from conch.reward_server.server_config import RewardServerConfig

            return RewardServerConfig
        case ["service", *_]:
            from conch.service.service_config import ServiceConfig

            return ServiceConfig
    return None


def _keys(section: type[Section], text: str) -> list[str]:
    """Keys of the section that the dots in `text` lead to: `generation.` is one, `train.seed=` is a value."""
    from conch.config.base import nested_section, section_at

    *parents, _ = text.split(".")
    owner = section_at(section, parents)
    prefix = "".join(f"{name}." for name in parents)
    fields = owner.model_fields.items() if owner is not None else ()
    return [f"{prefix}{name}" + ("." if nested_section(field.annotation) else "=") for name, field in fields]


def _choices(section: type[Section], location: Sequence[str]) -> list[str]:
    """The values of a key that has few: of a switch, or of words that its type names.

    Where `null` is the only one that is known, the others may be files, which the shell names.
    """
    from conch.config.base import section_at

    owner = section_at(section, location[:-1])
    field = owner.model_fields.get(location[-1]) if owner is not None else None
    words = [] if field is None else list(_words_of(field.annotation))
    return words if words != ["null"] else []


def _words_of(annotation: object) -> Iterable[str]:
    if annotation is bool:
        return ("true", "false")
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    if annotation is type(None):
        return ("null",)
    return [word for part in get_args(annotation) for word in _words_of(part)]


def _of_program(
    words: Sequence[str], last: str, section: type[Section] | None, run: Callable[[list[str]], object]
) -> list[str]:
    """What a program's parser of options takes behind these words: its options, choices and commands."""
    parser = _parser_of(words, run)
    if parser is None:
        return []
    parser, commands = _parser_below(parser, words)
    if commands:
        return _beginning(last, [*parser_options(parser), *commands] if last.startswith("-") else commands)
    name, sign, value = last.partition("=")
    if sign and last.startswith("--"):
        return [f"{name}={choice}" for choice in _beginning(value, _values_of(parser, name, words, section))]
    option = _open_option(parser, words)
    if option is not None and not last.startswith("-"):
        return _beginning(last, _values_of(parser, option, words, section))
    is_place = any(not action.option_strings for action in parser._actions)
    if is_place and not last.startswith("-"):
        if section is not None:
            return _beginning(last, _keys(section, last))
        return []  # a file, as far as anybody knows
    return _beginning(last, parser_options(parser))


def _parser_of(words: Sequence[str], run: Callable[[list[str]], object]) -> argparse.ArgumentParser | None:
    """The parser of a program, taken when it begins to parse; None where it makes none."""
    parsers: list[argparse.ArgumentParser] = []

    def take(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        parsers.append(parser)
        raise SystemExit

    named = [word for word in words if not word.startswith("-")][:2]
    parse, silence = argparse.ArgumentParser.parse_known_args, io.StringIO()
    argparse.ArgumentParser.parse_known_args = take  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            run([*named, "--help"])
    except SystemExit:
        pass
    finally:
        argparse.ArgumentParser.parse_known_args = parse
    return parsers[0] if parsers else None


def _parser_below(
    parser: argparse.ArgumentParser, words: Sequence[str]
) -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser of the command that these words hold, and else the names of all commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            held = next((word for word in words[1:] if word in action.choices), None)
            return (action.choices[held], []) if held else (parser, list(action.choices))
    return parser, []


def parser_options(parser: argparse.ArgumentParser) -> list[str]:
    """Long names of the options that a parser takes, in the order of its help."""
    return [
        name
        for action in parser._actions
        for name in action.option_strings
        if name.startswith("--") and action.help != argparse.SUPPRESS
    ]


def _open_option(parser: argparse.ArgumentParser, words: Sequence[str]) -> str | None:
    """The option whose value comes next: the last word, or of an option with several values one before."""
    number = next((number for number, word in enumerate(reversed(words)) if word.startswith("-")), None)
    action = None if number is None else _action_of(parser, words[len(words) - 1 - number])
    if number is None or action is None or action.nargs == 0 or "=" in words[len(words) - 1 - number]:
        return None
    takes_several = action.nargs in ("+", "*") and bool(action.choices)
    return words[len(words) - 1 - number] if number == 0 or takes_several else None


def _values_of(
    parser: argparse.ArgumentParser, option: str, words: Sequence[str], section: type[Section] | None
) -> Iterable[str]:
    """The values of an option that has few; none of one that takes a file or a number."""
    action = _action_of(parser, option)
    if action is None:
        return ()
    if action.dest == "config_name" and section is not None:
        folders = [after for word, after in itertools.pairwise(words) if word == "--config-dir"]
        return _configurations(
            Path((folders or [parser.get_default("config_dir")])[-1]), action.default, section
        )
    return [str(choice) for choice in action.choices or ()]


def _action_of(parser: argparse.ArgumentParser, option: str) -> argparse.Action | None:
    return parser._option_string_actions.get(option.replace("_", "-"))


def _configurations(folder: Path, program: str, section: type[Section]) -> Iterator[str]:
    """Names of the files below `folder` that a program takes.

    Their sections are its own, and they are not named after another program. `folder` has a file of each.
    """
    programs = sorted((path.stem for path in folder.glob("*.yaml")), key=len, reverse=True)
    for path in sorted(folder.rglob("*.yaml")):
        name = str(path.relative_to(folder).with_suffix(""))
        keys = set(re.findall(r"^(\w+):", path.read_text(encoding="utf-8", errors="replace"), re.M))
        if next((each for each in programs if each in name), program) == program and (
            keys <= {*section.model_fields, "defaults"}
        ):
            yield name
