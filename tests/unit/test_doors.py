"""What users import and start by name stays where it is."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conch.__main__ import main
from conch.config.algorithms import run_config_of
from conch.errors import DataError, ParityError
from tests.starts import started

ROOT = Path(__file__).resolve().parents[2]

COMMANDS = [
    "conch.converters.to_triton",
    "conch.converters.ensemble",
    "conch.serving.__main__",
    "conch.rewards.score",
    "conch.scoring.run",
    "conch.evaluation.gold",
    "conch.rollouts.serve",
    "conch.reference.serve",
    "conch.service.__main__",
    "conch.sizing.__main__",
    "conch.plots.__main__",
    "conch.runs.command",
    "conch.doctor",
    "conch.evaluation.sampling.run",
    "conch.evaluation.pictures",
    "conch.report.__main__",
    "conch.interop.trlx",
    "conch.__main__",
]
# Verb of `conch` -> the module whose `main` it runs.
VERBS = {
    "convert": "conch.converters.to_triton",
    "convert ensemble": "conch.converters.ensemble",
    "ensemble": "conch.converters.ensemble",
    "serve": "conch.serving.__main__",
    "score": "conch.scoring.run",
    "gold-eval": "conch.evaluation.gold",
    "gold": "conch.evaluation.gold",
    "rollout-server": "conch.rollouts.serve",
    "rollout_server": "conch.rollouts.serve",
    "reference-server": "conch.reference.serve",
    "reward-server": "conch.reward_server.__main__",
    "service": "conch.service.__main__",
    "size": "conch.sizing.__main__",
    "runs": "conch.runs.command",
    "doctor": "conch.doctor",
    "plot": "conch.runs.plots",
    "overoptimisation": "conch.evaluation.pictures",
    "report": "conch.report.__main__",
    "trlx": "conch.interop.trlx",
}
ALGORITHMS = ["async_grpo", "grpo", "ilql", "ppo", "reward_model", "rft", "sft"]
NAMES = {
    "conch": ["train", "score", "__version__"],
    "conch.rewards": ["RewardSource"],
    "conch.runs": ["load", "Run"],
    "conch.service.client": ["TrainingClient", "AsyncTrainingClient", "TrainingSettings"],
    "conch.converters.to_triton": ["to_triton"],
    "conch.trainers.ppo": ["PPOTrainer", "PPORunConfig"],
    "conch.trainers.grpo": ["GRPOTrainer", "GRPORunConfig"],
    "conch.trainers.async_grpo": ["AsyncGRPOTrainer", "AsyncGRPORunConfig"],
    "conch.trainers.rft": ["RFTTrainer", "RFTRunConfig"],
    "conch.trainers.ilql": ["ILQLTrainer", "ILQLRunConfig"],
    "conch.trainers.sft": ["SFTTrainer", "SFTRunConfig"],
    "conch.trainers.reward_model": ["RewardModelTrainer", "RewardModelRunConfig"],
}


@pytest.mark.parametrize("module", COMMANDS)
def test_module_can_be_started_with_python_m(module: str) -> None:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    last = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body[-1]

    assert isinstance(last, ast.If) and "__name__" in ast.unparse(last.test), "nothing stands behind the call"
    assert "main" in ast.unparse(last.body[-1])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_trainer_can_be_started_with_python_m_and_reads_its_settings_before_it_loads(algorithm: str) -> None:
    spec = importlib.util.find_spec(f"conch.trainers.{algorithm}")
    assert spec is not None and spec.origin is not None
    _docstring, _future, first, *_ = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body

    assert isinstance(first, ast.If) and "__name__" in ast.unparse(first.test)
    assert ast.unparse(first.body[-1]) == f"run_program('{algorithm}')"


@pytest.mark.parametrize(("module", "names"), NAMES.items())
def test_module_has_the_names_that_users_import(module: str, names: list[str]) -> None:
    loaded: Any = importlib.import_module(module)

    assert [name for name in names if not hasattr(loaded, name)] == []


@pytest.mark.parametrize(("verb", "module"), VERBS.items())
def test_verb_runs_the_module_with_the_words_behind_it(
    verb: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def stand_in(words: Sequence[str]) -> int:
        calls.append(list(words))
        return 0

    monkeypatch.setattr(importlib.import_module(module), "main", stand_in)
    monkeypatch.setattr(sys, "argv", ["conch"])

    assert exit_code([*verb.split(), "--help", "train.seed=1"]) == 0
    assert calls == [["--help", "train.seed=1"]]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_train_runs_the_trainer_by_the_settings_of_the_words(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer: Any = importlib.import_module(f"conch.trainers.{algorithm}")
    configs: list[Any] = []
    monkeypatch.setattr(trainer, "run", configs.append)
    monkeypatch.setattr(sys, "argv", ["conch"])
    monkeypatch.setenv("TRITON_HOST", "127.0.0.1:8001/walks")

    words = ["model.path=m", "train.seed=5", "data.train=some/rows"]
    assert exit_code(["train", algorithm.replace("_", "-"), *words]) == 0
    assert exit_code(["train", algorithm, *words]) == 0
    assert exit_code([algorithm.replace("_", "-"), *words]) == 0
    trainer.main(words)

    assert configs == [configs[0]] * 4 and configs[0].train.seed == 5
    assert [type(config) for config in configs] == [run_config_of(algorithm)] * 4


def test_best_of_n_runs_by_the_settings_of_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[Any] = []
    module = importlib.import_module("conch.evaluation.sampling.run")
    monkeypatch.setattr(module, "run_best_of_n", configs.append)
    monkeypatch.setattr(sys, "argv", ["conch"])
    monkeypatch.setenv("TRITON_HOST", "127.0.0.1:8001/walks")

    for verb in ("best-of-n", "best_of_n"):
        assert exit_code([verb, "model.path=m", "data.eval=some/rows", "best_of_n.seed=3"]) == 0
    assert [config.best_of_n.seed for config in configs] == [3, 3]


@pytest.mark.parametrize(
    ("verb", "module"), [("plot", "conch.runs.plots"), ("size", "conch.sizing.__main__")]
)
@pytest.mark.parametrize(("error", "code"), [(DataError("no rows"), 1), (KeyboardInterrupt(), 130)])
def test_verb_leaves_with_the_exit_code_of_the_door(
    verb: str, module: str, error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(words: Sequence[str]) -> None:
        raise error

    monkeypatch.setattr(importlib.import_module(module), "main", fail)
    monkeypatch.setattr(sys, "argv", ["conch"])

    assert exit_code(verb.split()) == code


def test_verb_keeps_the_traceback_of_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(words: Sequence[str]) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(importlib.import_module("conch.runs.plots"), "main", fail)
    monkeypatch.setattr(sys, "argv", ["conch"])

    with pytest.raises(ZeroDivisionError):
        main(["plot"])


def test_verb_convert_leaves_with_2_where_scores_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(checkpoint: str, **settings: object) -> None:
        raise ParityError("differs")

    monkeypatch.setattr(importlib.import_module("conch.converters.to_triton"), "to_triton", fail)

    assert exit_code(["convert", "--checkpoint", "x", "--quiet"]) == 2


def exit_code(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as leaving:
        assert isinstance(leaving.code, int)
        return leaving.code


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "`conch trian` is no command; did you mean `conch train`?"),
        (["pppo"], "`conch pppo` is no command; did you mean `conch ppo`?"),
        (["train", "pppo"], "`conch train pppo` is no command; did you mean `conch train ppo`?"),
        (
            ["zzz"],
            "there are: async-grpo, best-of-n, co",
        ),
        (["train", "zzz"], "there are: async-grpo, grpo, ilql, ppo, reward-model, rft, sft"),
        (["PPPO"], "`conch PPPO` is no command; did you mean `conch ppo`?"),
        (["resume", "runs/a"], "a run goes on by the command that began it, with `train.resume=RUN_DIR`"),
        (["generate"], "`conch best-of-n` samples many completions"),
        (["serve", "statu"], "`conch serve statu` is no command; did you mean `conch serve status`?"),
        (["serve", "zzz"], "there are: down, install, logs, status, swap, up"),
        (
            ["convert", "ensmble"],
            "no command; did you mean `conch convert ensemble`?",
        ),
        (["runs", "dff"], "`conch runs dff` is no command; did you mean `conch runs diff`?"),
        (["runs", "dif", "a", "b"], "`conch runs dif` is no command; did you mean `conch runs diff`?"),
        (["runs", "a", "b"], "`conch runs a` is no command; conch runs FOLDER lists runs, conch runs diff c"),
        (["convert", "outputs/x"], "`conch convert outputs/x` is no command; a checkpoint is named by --ch"),
    ],
)
def test_mistyped_verb_names_the_nearest(words: list[str], sentence: str, capsys: Any) -> None:
    assert main(words) == 2

    written = capsys.readouterr().err
    assert written.startswith("error: ") and sentence in written


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_help_lists_every_verb_with_a_line_of_its_own(words: list[str], capsys: Any) -> None:
    assert main(words) == 0

    listed = [
        line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")
    ]
    verbs = {verb.split()[0] for verb in VERBS} - {"rollout_server"} | {"train", "best-of-n", "completion"}
    verbs |= {algorithm.replace("_", "-") for algorithm in ALGORITHMS}
    algorithms = {algorithm.replace("_", "-") for algorithm in ALGORITHMS}
    assert sorted(name for name, _ in listed) == sorted(algorithms if words[0] == "train" else verbs)
    assert all(summary for _, summary in listed)


def test_algorithms_are_told_by_whole_sentences(capsys: Any) -> None:
    main(["train", "--help"])
    shown = capsys.readouterr().out
    for algorithm in ALGORITHMS:
        spec = importlib.util.find_spec(f"conch.trainers.{algorithm}")
        assert spec is not None and spec.origin is not None
        text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
        (line,) = (line for line in shown.splitlines() if line.split()[:1] == [algorithm.replace("_", "-")])
        said = line.split(maxsplit=1)[1]
        assert " ".join(text.split()).startswith(f"{said}.") and len(said) < 110


@pytest.mark.parametrize("word", ["version", "-V", "--version"])
def test_version_is_a_word_too(word: str, capsys: Any) -> None:
    assert main([word]) == 0
    assert capsys.readouterr().out == f"conch {importlib.import_module('conch').__version__}\n"


@pytest.mark.parametrize(
    ("words", "same"),
    [(["help"], ["--help"]), (["help", "train"], ["train", "--help"]), (["TRAIN", "-h"], ["train", "-h"])],
)
def test_help_is_a_word_too_and_case_does_not_count(words: list[str], same: list[str], capsys: Any) -> None:
    assert (main(words), shown := capsys.readouterr().out) == (0, shown)
    assert main(same) == 0
    assert shown == capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["train"]])
def test_command_line_without_a_verb_shows_the_help_and_fails(words: list[str], capsys: Any) -> None:
    assert main(words) == 2
    assert "usage: conch" in capsys.readouterr().err


def test_version_is_the_package_s() -> None:
    module = [sys.executable, "-m", "conch", "--version"]
    done = subprocess.run(module, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)

    assert done.stdout == f"conch {importlib.import_module('conch').__version__}\n"


@pytest.mark.parametrize("words", ["--help", "train --help", "service --help", "ppo --help", "serve --help"])
def test_reader_that_leaves_before_the_end_is_no_error(words: str) -> None:
    command = [sys.executable, "-m", "conch", *words.split()]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None and program.stderr is not None
        program.stdout.close()
        assert (program.stderr.read(), program.wait(timeout=120)) == ("", 0)


HEAVY = ("torch", "transformers", "accelerate", "datasets", "tritonclient", "hydra", "matplotlib", "fastapi")
FIRST_WORDS = [
    *(f"train {algorithm}" for algorithm in ALGORITHMS),
    *(f"-m conch.trainers.{algorithm}" for algorithm in ALGORITHMS),
    *("convert", "convert ensemble", "serve up", "score", "gold-eval", "rollout-server", "reference-server"),
    *(
        "doctor",
        "runs",
        "runs diff",
        "reward-server",
        "service",
        "size",
        "plot",
        "best-of-n",
        "overoptimisation",
        "report",
        "ensemble",
        "gold",
        "trlx",
    ),
]
# A key or an option that is none, and what is said of it.
MISTAKES = {
    **{f"train {algorithm} model.path=m train.sed=1": "`train.seed`?" for algorithm in ALGORITHMS},
    **{
        f"-m conch.trainers.{algorithm} model.path=m train.sed=1": "`train.seed`?" for algorithm in ALGORITHMS
    },
    "ppo pp0.gamma=1": "unknown key `pp0.gamma`",
    "grpo model.path=m data.train=a/b --reward nowhere.at.all:f": "there is no module nowhere",
    "async-grpo model.path=m data.train=a/b --reward json:dumbs": "no function dumbs; did you mean dumps?",
    "rft model.path=m data.train=a/b --reward conch.errors:__doc__": "is of type str and no function",
    "ppo model.path=m --reward nowhere.py:f": "there is no such file",
    "ppo model.path=m": "no reward given",
    "best-of-n model.path=m": "no reward given",
    "sft model.path=m": "no samples: set `data.train`",
    "reward-model model.path=m": "no samples: set `data.train`",
    "ilql model.path=m": "no samples: set `data.train`",
    "ppo model.path=m --reward verifier:gsm8k": "no prompts: set `data.train`",
    "best-of-n model.path=m --reward verifier:gsm8k": "no prompts: set `data.eval`",
    "grpo model.path=m --reward verifier:gsm8k data.train=prompt.jsonl": "there is no such file",
    "sft model.path=m data.train=a/b data.eval=prompt.jsonl": "prompt.jsonl cannot be read",
    "ppo model.path=m data.train=a/b --reward foo": "`foo` names nothing that gives rewards: `file.py:",
    "ppo model.path=m data.train=a/b --reward rewards.py": "of this file write `rewards.py:NAME`",
    "ppo model.path=m data.train=a/b --reward rewards.short": "of a module write `rewards:short`",
    "ppo model.path=m data.train=a/b --reward 127.0.0.1:8001": "not of the form `host:port/model`",
    "ppo model.path=m data.train=a/b --reward judge:none.yaml": "none.yaml cannot be read",
    "sft model.path=m data.train=a/b evaluation.gold=gsm8k": "gold: reward `gsm8k` names nothing",
    "best-of-n best_of_n.sed=1": "unknown key `best_of_n.sed`",
    "rollout-server model=m prot=1": "did you mean `port`?",
    "reference-server model=m prot=1": "did you mean `port`?",
    "reward-server prot=1": "did you mean `port`?",
    "size --model m --gpus 0": "is not positive",
    "size --modle m": "error: unknown option --modle; did you mean --model?\n",
    "size model=m": "error: `model=m` is no option; write --model m\n",
    "convert --chekpoint m": "error: unknown option --chekpoint; did you mean --checkpoint?\n",
    "serve up --modle m": "error: unknown option --modle; did you mean --model?\n",
    "serve up model=m": "error: `model=m` is no option; write --model m\n",
    "score --ulr m": "error: unknown option --ulr; did you mean --url?\n",
    "ppo --confg-name m": "error: unknown option --confg-name; did you mean --config-name?\n",
    "ppo --train.total_steps=3": "settings are written without dashes: train.total_steps=3\n",
    "ppo --config-name ppp": "did you mean `ppo`?",
    "best-of-n polic=1": "unknown key `polic`; valid here: model, tokenizer,",
    "PPO train.sed=1": "did you mean `train.seed`?",
}


@pytest.fixture(scope="module")
def quick_commands() -> dict[str, dict[str, Any]]:
    """Command -> exit code, which of `HEAVY` it loaded, and what it wrote."""
    commands = [*(f"{words} --help" for words in FIRST_WORDS), *MISTAKES]
    return started(commands, HEAVY)


@pytest.mark.parametrize("words", FIRST_WORDS)
def test_help_loads_no_heavy_library(words: str, quick_commands: dict[str, dict[str, Any]]) -> None:
    result = quick_commands[f"{words} --help"]
    assert (result["code"], result["heavy"]) == (0, [])
    assert "train.seed: int" in result["text"] if "train" in words else result["text"]


@pytest.mark.parametrize(("command", "sentence"), MISTAKES.items())
def test_mistake_is_refused_before_anything_heavy_is_loaded(
    command: str, sentence: str, quick_commands: dict[str, dict[str, Any]]
) -> None:
    result = quick_commands[command]
    assert result["code"] in (1, 2) and sentence in result["text"]
    # Rewards and data are looked for once the configuration is whole, which Hydra composes.
    assert result["heavy"] == (
        [] if "unknown" in result["text"] or "model.path" not in command else ["hydra"]
    )


@pytest.mark.parametrize("words", ["--help", "train --help", "trian"])
def test_list_of_verbs_loads_no_library_at_all(words: str) -> None:
    program = (
        "import sys\nfrom conch.__main__ import main\n"
        f"main({words.split()!r})\n"
        "print([name for name in ('pydantic', 'numpy', 'yaml') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_console_script_is_the_module() -> None:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    assert 'conch = "conch.__main__:main"' in lines


def test_dir_of_the_package_shows_what_is_loaded_at_first_use() -> None:
    program = "import sys, conch; assert dir(conch) == conch.__all__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120, check=True)
