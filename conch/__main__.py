"""`conch VERB ...`: the programs of Conch under one name; `python -m conch VERB ...` is the same.

    conch ppo model.path=gpt2 data.train=prompts.jsonl --reward 127.0.0.1:8001/walks
    conch convert --checkpoint outputs/reward_model --name walks
    conch serve up --model walks

A verb runs what `python -m conch.<module>` runs, with the same options, exit code and tracebacks. What it
needs is imported once it is known, so that `conch --help` answers at once.
"""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from conch import __version__
from conch.machine.output import reader_may_leave

_USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns its exit code, or leaves with it. 2 for a command line that names none.

    A reader of stdout that leaves before the end, as `head` does, is no error.
    """
    with reader_may_leave():
        return _run_verb(list(sys.argv[1:] if argv is None else argv))
    return 0


def _run_verb(words: list[str]) -> int:
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help"):
        print(_help(), end="", file=sys.stdout if words else sys.stderr)
        return 0 if words else _USAGE_ERROR
    if words[0] in ("-V", "--version", "version"):
        print(f"conch {__version__}")
        return 0
    verb = words[0].lower().replace("_", "-")
    if verb in _SHORT:
        verb, *others = _SHORT[verb]
        return _VERBS[verb]([*others, *words[1:]])
    if verb not in _VERBS:
        hint = _NO_VERBS.get(verb, "")
        return _refuse("conch", words[0], () if hint else [*_VERBS, *_SHORT], hint)
    return _VERBS[verb](words[1:])


def train(words: Sequence[str]) -> int:
    """Train a model: `conch train ALGORITHM key=value ...`, in short `conch ppo key=value ...`."""
    summaries = _algorithms()
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  {name:<16}{summary}" for name, summary in summaries.items()]
        text = "\n".join(["usage: conch train ALGORITHM key=value ...", "", "algorithms:", *lines])
        more = "conch train ALGORITHM --help lists the keys of an algorithm."
        print(f"{text}\n\n{more}", file=sys.stdout if words else sys.stderr)
        return 0 if words else _USAGE_ERROR
    name = words[0].lower().replace("_", "-")
    if name not in summaries:
        return _refuse("conch train", words[0], summaries)
    from conch import training

    _run(f"conch train {name}", lambda argv: training.train(name.replace("-", "_"), argv), words[1:])


def convert(words: Sequence[str]) -> int:
    """Convert a reward model for Triton; `conch convert ensemble` joins several models into one."""
    if words[:1] == ["ensemble"]:
        from conch.converters import ensemble

        return ensemble.main(words[1:])
    if words and not words[0].startswith("-"):
        return _refuse("conch convert", words[0], ["ensemble"], "a checkpoint is named by --checkpoint")
    from conch.converters import to_triton

    return to_triton.main(words)


def serve(words: Sequence[str]) -> int:
    """Serve converted models: `conch serve install|up|down|status|logs|swap`."""
    from conch.serving import __main__ as serving

    if words and not words[0].startswith("-") and words[0] not in serving.COMMANDS:
        return _refuse("conch serve", words[0], serving.COMMANDS)
    return serving.main(words)


def score(words: Sequence[str]) -> int:
    """Score samples or pairs with any reward: `conch score --url host:port/model FILE`."""
    from conch.scoring import run

    return run.main(words)


def gold_eval(words: Sequence[str]) -> int:
    """Score a run's evaluations by another reward: `conch gold-eval RUN_OR_EVAL_DIR GOLD`."""
    from conch.evaluation import gold

    return gold.main(words)


def rollout_server(words: Sequence[str]) -> int:
    """Start a server that trainers sample from: `conch rollout-server key=value ...`."""
    from conch.rollouts import serve as server

    _run("conch rollout-server", server.main, words)


def reward_server(words: Sequence[str]) -> int:
    """Give rewards to other trainers over HTTP: `conch reward-server reward=host:8001/model`."""
    from conch.reward_server import __main__ as server

    _run("conch reward-server", server.main, words)


def reference_server(words: Sequence[str]) -> int:
    """Start a server that holds the reference of PPO and GRPO: `conch reference-server key=value ...`."""
    from conch.reference import serve as server

    _run("conch reference-server", server.main, words)


def service(words: Sequence[str]) -> int:
    """Train on what clients ask for and reward, over HTTP: `conch service output_dir=DIR`."""
    from conch.service import __main__ as server

    _run("conch service", server.main, words)


def size(words: Sequence[str]) -> int:
    """Tell how much GPU memory a run takes, and what fits."""
    from conch.sizing import __main__ as sizing

    _run("conch size", sizing.main, words)


def plot(words: Sequence[str]) -> int:
    """Draw the curves of runs: `conch plot RUN [RUN ...] [METRIC ...]`."""
    from conch.runs import plots

    _run("conch plot", plots.main, words)


def runs(words: Sequence[str]) -> int:
    """List runs and how they stand, or what differs: `conch runs [FOLDER]`, `conch runs diff RUN RUN`."""
    from conch.runs import command

    first, *others = [word for word in words if not word.startswith("-")] or [""]
    is_unknown = first != "diff" and not Path(first).exists()
    if is_unknown and (others or difflib.get_close_matches(first, ["diff"])):
        return _refuse(
            "conch runs", first, ["diff"], "conch runs FOLDER lists runs, conch runs diff compares"
        )
    _run("conch runs", command.main, words)


def doctor(words: Sequence[str]) -> int:
    """Look whether this machine and environment can run Conch, and say what to do where not."""
    from conch import doctor as looking

    _run("conch doctor", looking.main, words)


def completion(words: Sequence[str]) -> int:
    """Complete verbs, algorithms and keys in a shell: `source <(conch completion bash)`; zsh, fish."""
    from conch import completion as completing

    return completing.main(words, {**{verb: (verb,) for verb in _VERBS}, **_SHORT}, main)


def trlx(words: Sequence[str]) -> int:
    """Translate a configuration of trlX: `conch trlx FILE > conch.yaml`."""
    from conch.interop import trlx as translating

    _run("conch trlx", translating.main, words)


def best_of_n(words: Sequence[str]) -> int:
    """Judge the proxy's best of n completions by gold, for all n: `conch best-of-n key=value ...`."""
    _run("conch best-of-n", _best_of_n, words)


def _best_of_n(argv: Sequence[str]) -> None:
    from conch.cli import load_run_config
    from conch.evaluation.sampling.config import CONFIG_NAME, BestOfNRunConfig, check_sources_named

    config = load_run_config(BestOfNRunConfig, argv, default_name=CONFIG_NAME, check=check_sources_named)
    from conch.evaluation.sampling.run import run_best_of_n  # torch, once there is something to sample

    run_best_of_n(config)


def overoptimisation(words: Sequence[str]) -> int:
    """Draw proxy and gold against sqrt(KL): `conch overoptimisation RUN_OR_FOLDER ... --output DIR`."""
    from conch.evaluation import pictures

    _run("conch overoptimisation", pictures.main, words)


def report(words: Sequence[str]) -> int:
    """Make one HTML page of runs, or follow them: `conch report RUN ... [--live]`."""
    from conch.report import __main__ as program

    _run("conch report", program.main, words)


_VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    verb.__name__.replace("_", "-"): verb
    for verb in (
        *(train, convert, serve, score, rollout_server, reference_server, reward_server, service, size),
        *(runs, report, plot, gold_eval, best_of_n, overoptimisation, trlx, doctor, completion),
    )
}
_SHORT = {
    **{name: ("train", name) for name in ("ppo", "grpo", "async-grpo", "rft", "ilql", "sft", "reward-model")},
    "ensemble": ("convert", "ensemble"),
    "gold": ("gold-eval",),
}
"""Short form -> the words that it stands for."""

_NO_VERBS = {
    "resume": "a run goes on by the command that began it, with `train.resume=RUN_DIR` behind it",
    "generate": "a checkpoint is a folder that transformers and vLLM load, and `conch best-of-n` samples "
    "many completions of each prompt",
}
"""Word that other programs have a command for -> what does it here."""


def _run(program: str, main: Callable[[list[str]], None], words: Sequence[str]) -> NoReturn:
    """Run a program that takes its words from the command line, under the name that its help shows."""
    from conch.cli import run_main

    sys.argv = [program, *words]
    run_main(main)


def _algorithms() -> dict[str, str]:
    """Algorithm, with hyphens -> first sentence of its file's docstring, read without importing it, which
    would bring torch."""
    from conch import trainers

    files = sorted(Path(trainers.__path__[0]).glob("[!_]*.py"))
    trees = {file.stem: ast.parse(file.read_text(encoding="utf-8")) for file in files}
    texts = {name: ast.get_docstring(tree) or "" for name, tree in trees.items()}
    return {name.replace("_", "-"): _first_sentence(text) for name, text in texts.items()}


def _first_sentence(text: str) -> str:
    """The first sentence of a docstring, or its first paragraph, on one line and without the full stop."""
    return " ".join(text.partition("\n\n")[0].split()).partition(". ")[0].removesuffix(".")


def _help() -> str:
    head = ["usage: conch [--help] [--version] VERB ...", ""]
    about = ["Train language models with RL from served reward models.", "", "verbs:"]
    verbs = [f"  {name:<18}{(verb.__doc__ or '').strip()}" for name, verb in _VERBS.items()]
    verbs += ["", "in short:"]
    verbs += [f"  {name:<18}conch {' '.join(words)}" for name, words in _SHORT.items()]
    return "\n".join([*head, *about, *verbs, "", "conch VERB --help says more about a verb.", ""])


def _refuse(command: str, word: str, choices: Iterable[str], otherwise: str = "") -> int:
    close = difflib.get_close_matches(word.lower(), list(choices), n=1)
    hint = otherwise or f"there are: {', '.join(sorted(choices))}"
    if close:
        hint = f"did you mean `{command} {close[0]}`?"
    print(f"error: `{command} {word}` is no command; {hint}", file=sys.stderr)
    return _USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
