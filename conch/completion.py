"""Completion of `conch` in a shell: verbs, algorithms, keys with their choices, options.

    source <(conch completion bash)               in ~/.bashrc
    source <(conch completion zsh)                in ~/.zshrc, behind compinit
    conch completion fish | source                in ~/.config/fish/config.fish

The shell asks `conch completion --line "conch ppo mod"`, which loads no more than the settings of that verb:
about a third of a second where keys are asked for, a tenth where verbs are.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    local -a found
    found=("${(@f)$(conch completion --line "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
    found=(${found:#})
    if (( ${#found} )); then compadd -Q -S '' -a found; else _files; fi
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
    "serve": ("up", "down", "status", "logs", "swap"),
    "convert": ("ensemble",),
    "runs": ("diff",),
    "completion": tuple(SCRIPTS),
}
"""Verb -> words that may stand behind it, beside options."""
_RUN_OPTIONS = ("--help", "--config-name", "--config-dir", "--print-config")


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
    if section is None:
        return [*_beginning(last, below), *_beginning(last, _options_in_help(before, run))]
    if last.startswith("-"):
        fields = section.model_fields
        more = [name for name, key in (("--reward", "reward"), ("--multirun", "train")) if key in fields]
        return _beginning(last, [*_RUN_OPTIONS, *more])
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
    """The values of a key that has few: of a switch, or of words that its type names."""
    from conch.config.base import section_at

    owner = section_at(section, location[:-1])
    field = owner.model_fields.get(location[-1]) if owner is not None else None
    return [] if field is None else list(_words_of(field.annotation))


def _words_of(annotation: object) -> Iterable[str]:
    if annotation is bool:
        return ("true", "false")
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    if annotation is type(None):
        return ("null",)
    return [word for part in get_args(annotation) for word in _words_of(part)]


def _options_in_help(words: Sequence[str], run: Callable[[list[str]], object]) -> list[str]:
    """Options that the help of a command names, in its order."""
    text = io.StringIO()
    named = [word for word in words if not word.startswith("-")][:2]
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text), contextlib.suppress(SystemExit):
        run([*named, "--help"])
    return re.findall(r"(?<![\w-])--[a-z][\w-]*", text.getvalue())
