"""Score evaluations again that a run has kept, by a reward that it did not learn from.

    conch gold-eval outputs/run 127.0.0.1:8001/gold
    python -m conch.evaluation.gold outputs/run verifier:gsm8k --name correct
    python -m conch.evaluation.gold runs/ppo/seed1/eval http://127.0.0.1:9000/score --batch-size 32

RUN_OR_EVAL_DIR is a run's folder, also of one that was stopped, its `evaluations/`, or a folder of files
`eval-<k>.json` (see `conch.evaluation.seed_files`). GOLD is `host:port/model`, `http://host:port/path`,
`verifier:gsm8k`, or a Python function as `file.py:name`.

Scores are added to the files as they stand; a sample that has one is not asked for again. Each file is
replaced as a whole, a long one every half minute by what there is of it: whatever ends the program, the same
command goes on from there.

Exit codes: 0 all samples have scores, 1 it could not begin or the server went away, 2 some have none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from conch.cli import CommandParser, add_options, parse_options, written_with
from conch.config import RewardConfig
from conch.errors import ConchError, ConfigError, DataError, RewardUnavailableError
from conch.evaluation.metrics import mean_of_finite
from conch.evaluation.records import (
    GOLD,
    PROXY,
    EvaluatedSample,
    EvaluationRecord,
)
from conch.evaluation.seed_files import (
    RECORD,
    evaluation_files,
    read_evaluation,
    write_evaluation,
    write_seed_files,
)
from conch.log import get_logger, progress, setup_logging
from conch.rewards.base import RewardSource, sources_closed_on_failure
from conch.rewards.combined import refuse_groups
from conch.rewards.factory import from_user, is_function_name, named_function
from conch.rewards.function import FunctionReward
from conch.rewards.score import AskOptions
from conch.rewards.scorer import total_reward
from conch.triton.contract import TEMPLATE_KWARGS, TOOLS
from conch.types import Completion, Dialogue, Prompt, RewardResult, RewardStatus, Rollout

_log = get_logger(__name__)

Present = Callable[[EvaluatedSample], Rollout]
"""From a sample to what the gold reward reads of it."""

_SAVE_EVERY_S = 30.0
_FEWEST_TO_COMPARE = 4
"""Different scores of a file, of which the gold reward's tell whether it is the one that was learned from."""
_OF_TEMPLATE = (TOOLS, TEMPLATE_KWARGS)


class GoldOptions(AskOptions):
    """Score the evaluations that a run has kept by a reward that it did not learn from."""

    batch_size: int = Field(default=32, ge=1)
    """Most samples in a request."""

    name: str = GOLD
    """Name of the scores, in files and tables; another one adds scores beside those of the first reward."""

    prompt_template: str | None = None
    """What the gold reward reads in front of an answer, where that is not what the policy read: a text with
    {prompt} in it, the text that the policy read, or of messages the user's only one."""

    write_seed_files: Path | None = None
    """Folder for a run's evaluations as files `eval-<k>.json` as well."""

    force: bool = False
    """Score anew what has scores."""

    @field_validator("name")
    @classmethod
    def _is_no_other_score(cls, name: str) -> str:
        if name == PROXY or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(
                f"--name {name}: it is the name of the score that was learned from, or no word: give another"
            )
        return name

    @field_validator("prompt_template")
    @classmethod
    def _has_prompt(cls, template: str | None) -> str | None:
        if template is not None and "{prompt}" not in template:
            raise ValueError("--prompt-template has no {prompt} in it, so the gold reward would not see it")
        return template


@dataclass(frozen=True)
class GoldRow:
    """What came of one evaluation.

    label: its step, with the suffix of a variant.
    kl: from the start, in nats per sample; NaN where it was not measured.
    proxy, gold: means of the samples that have a score.
    failed: samples without a gold score.
    total: samples.
    """

    label: str
    kl: float
    proxy: float
    gold: float
    failed: int
    total: int


# ------------------------------------------------------------------------------------- what a reward reads


@sources_closed_on_failure()
def gold_source(gold: str, config: RewardConfig, metadata_keys: Sequence[str] = ()) -> RewardSource:
    """Make the source that a word of the command line names.

    metadata_keys: extra keys of the prompts, which a function must take.

    Raises:
        ConfigError: it names none.
    """
    reward = named_function(gold, "GOLD") if is_function_name(gold) else gold
    source = from_user(reward, config, metadata_keys=metadata_keys)
    refuse_groups(source, "a column of kept scores")
    return source


def as_it_stands(sample: EvaluatedSample) -> Rollout:
    """What the policy read and wrote; messages stay messages."""
    metadata = {name: value for name, value in sample.metadata.items() if name not in _OF_TEMPLATE}
    if isinstance(sample.input, str):
        return _rollout(Prompt(sample.input, (), metadata), sample)
    tools, variables = (sample.metadata.get(name) for name in _OF_TEMPLATE)
    messages = tuple(sample.input)
    dialogue = Dialogue(messages, tuple(tools) if tools else None, dict(variables or {}))
    text = json.dumps(list(map(dict, messages)), ensure_ascii=False)  # names the prompt in messages
    return _rollout(Prompt(text, (), metadata, dialogue), sample)


def templated(template: str) -> Present:
    """Present each sample as a template with its prompt in place of {prompt}, then the answer.

    What is returned raises a ConfigError for a dialogue of more messages than one.
    """

    def present(sample: EvaluatedSample) -> Rollout:
        text: Any = sample.input
        if not isinstance(text, str):
            text = text[0].get("content") if len(text) == 1 else None
        if not isinstance(text, str):
            raise ConfigError(
                f"--prompt-template takes one text a prompt, and prompt {sample.prompt} is a dialogue of "
                f"{len(sample.input)} messages: serve the gold reward with a chat template instead"
            )
        return _rollout(Prompt(template.replace("{prompt}", text), (), sample.metadata), sample)

    return present


def _rollout(prompt: Prompt, sample: EvaluatedSample) -> Rollout:
    return Rollout(prompt, Completion(sample.output, (), (), "eos"), policy_version=0)


# ------------------------------------------------------------------------------------------------ the scoring


@dataclass(frozen=True)
class Gold:
    """A reward that scores evaluations, and how.

    source: the reward.
    name: of its scores in the files.
    present: makes what it reads of a sample.
    batch_size: samples that are submitted together.
    at_once: batches under way at once.
    force: scores anew what has scores.
    who: what the files say that gave the scores; "" takes the source's name.
    """

    source: RewardSource
    name: str = GOLD
    present: Present = as_it_stands
    batch_size: int = 32
    at_once: int = 4
    force: bool = False
    who: str = ""

    @property
    def told(self) -> str:
        """What gave the scores."""
        return self.who or self.source.name


def add_gold(paths: Sequence[Path], gold: Gold) -> list[GoldRow]:
    """Add a reward's scores to evaluations, file by file. Returns a row for each.

    Raises:
        ConfigError: the reward cannot read the samples, is the one that was learned from, or the files hold
            another one's scores.
        DataError: a file is damaged; nothing was written.
        RewardUnavailableError: the server is away; what was scored is written.
    """
    missing = [_missing(path, read_evaluation(path), gold) for path in paths]
    if any(missing):
        gold.source.check()
    for path, number in zip(paths, missing, strict=True):
        if number:
            _check_readable(path, read_evaluation(path), gold)
    with progress(total=sum(missing), desc=f"scoring by {gold.told}") as bar:
        for path, number in zip(paths, missing, strict=True):
            if number:
                _score_file(path, gold, bar.update)
    return [gold_row(read_evaluation(path), gold.name) for path in paths]


def _missing(path: Path, record: EvaluationRecord, gold: Gold) -> int:
    """How many samples are to be scored."""
    proxy, before = record.sources.get(PROXY), record.sources.get(gold.name)
    # Functions of different files may have one name: their scores tell.
    if proxy in (gold.told, gold.source.name) and not isinstance(gold.source, FunctionReward):
        raise ConfigError(
            f"{gold.told} is the reward that {path} was learned from: give one that training did not see"
        )
    has_scores = any(sample.scores.get(gold.name) is not None for sample in record.samples)
    if not gold.force and has_scores and before is not None and _model(before) != _model(gold.told):
        raise ConfigError(
            f"{path} holds scores `{gold.name}` of {before}, not of {gold.told}: keep both with --name, or "
            "have these in their place with --force"
        )
    return sum(gold.force or sample.scores.get(gold.name) is None for sample in record.samples)


def _model(source: str) -> tuple[str, bool]:
    """What of a source's name does not change when its server moves: the model, and whether it has one."""
    name, at, _ = source.partition(" at ")
    return name, bool(at)


def _check_readable(path: Path, record: EvaluationRecord, gold: Gold) -> None:
    """Find out whether the reward reads what stands in a file.

    Raises:
        ConfigError: it does not.
    """
    source = gold.source
    prompts = [gold.present(sample).prompt for sample in record.samples]
    for sample, prompt in zip(record.samples, prompts, strict=True):
        try:
            source.check_row(prompt.metadata)
        except DataError as error:
            raise ConfigError(f"{source.name} cannot score {path}: prompt {sample.prompt} {error}") from error
    reads = getattr(source, "reads", "both")
    dialogues = sum(prompt.dialogue is not None for prompt in prompts)
    if reads == "tokens":
        raise ConfigError(
            f"{source.name} takes token ids of the policy's tokenizer, and evaluations hold texts: convert "
            "the model again with --form text"
        )
    if reads == "texts" and dialogues:
        raise ConfigError(
            f"{source.name} reads texts, and {dialogues} of {len(prompts)} inputs of {path} are dialogues: "
            "convert the model with --template chat, or make texts of them by --prompt-template"
        )
    source.check_prompts(prompts)


def _score_file(path: Path, gold: Gold, told: Callable[[float], object]) -> None:
    """Score what a file lacks, and write it: at its end, every half minute, and when this ends early.

    told: gets how many samples more have been asked for.
    """
    record = read_evaluation(path)
    column = [None if gold.force else sample.scores.get(gold.name) for sample in record.samples]
    places = [place for place, score in enumerate(column) if score is None]
    saved, unsaved = time.monotonic(), 0
    try:
        for batch, results in _in_turn(record, places, gold):
            for place, result in zip(batch, results, strict=True):
                column[place] = total_reward(result, {}) if result.ok else None
                unsaved += result.ok
            told(len(batch))
            _look_at_failures(path, results, gold)
            if unsaved and time.monotonic() - saved > _SAVE_EVERY_S:
                _save(path, record, column, gold)
                saved, unsaved = time.monotonic(), 0
    finally:
        if unsaved:
            _save(path, record, column, gold)


def _in_turn(
    record: EvaluationRecord, places: Sequence[int], gold: Gold
) -> Iterator[tuple[Sequence[int], list[RewardResult]]]:
    """Yield batches of places with their results, while the next ones are under way."""
    waiting: deque[tuple[Sequence[int], Future[list[RewardResult]]]] = deque()
    for first in range(0, len(places), gold.batch_size):
        batch = places[first : first + gold.batch_size]
        rollouts = [gold.present(record.samples[place]) for place in batch]
        waiting.append((batch, gold.source.submit(rollouts)))
        if len(waiting) == gold.at_once:
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()


def _look_at_failures(path: Path, results: Sequence[RewardResult], gold: Gold) -> None:
    """Tell of samples without a score.

    Raises:
        RewardUnavailableError: the server is away.
    """
    failed = [result for result in results if not result.ok]
    away = [result for result in failed if result.status.is_infrastructure]
    # A late reply to one sample is that sample's failure; to a whole batch, the server's.
    if any(result.status is RewardStatus.UNAVAILABLE for result in away) or len(away) == len(results):
        raise RewardUnavailableError(
            f"{gold.told} went away while it scored {path}: {away[0].detail}; the scores that it gave are "
            "kept, and the same command goes on from there"
        )
    if failed:
        detail = f"{failed[0].detail} ({failed[0].status.value})"
        told = "%d of %d samples of %s got no score; first: %s"
        _log.warning(told, len(failed), len(results), path, detail)


def _save(path: Path, record: EvaluationRecord, column: Sequence[float | None], gold: Gold) -> None:
    """Write a file with the scores that there are.

    Raises:
        ConfigError: they are those of the reward that was learned from, or of a member of it.
    """
    learned = {"": [sample.scores.get(PROXY) for sample in record.samples]}
    for name in dict.fromkeys(name for sample in record.samples for name in sample.members):
        learned[f" by its member `{name}`"] = [sample.members.get(name) for sample in record.samples]
    for member, scores in learned.items():
        if _is_same(scores, column):
            raise ConfigError(
                f"{gold.told} gives each sample of {path} the score that it was learned from{member}: it is "
                "the same reward, so give one that training did not see"
            )
    write_evaluation(path, record.with_scores(gold.name, column, gold.told))


def _is_same(scores: Sequence[float | None], others: Sequence[float | None]) -> bool:
    """Whether two columns agree wherever both have a score, and differ enough within for that to mean it."""
    pairs = [
        (one, other)
        for one, other in zip(scores, others, strict=True)
        if one is not None and other is not None
    ]
    varied = len({one for one, _ in pairs}) >= _FEWEST_TO_COMPARE
    return varied and all(math.isclose(*pair, rel_tol=1e-6, abs_tol=1e-9) for pair in pairs)


# ------------------------------------------------------------------------------------------------ the summary


def gold_row(record: EvaluationRecord, name: str = GOLD) -> GoldRow:
    """What an evaluation came to."""
    kl = record.metrics.get("eval/kl")
    gold = [score for score in record.column(name) if math.isfinite(score)]
    proxy = [score for score in record.column(PROXY) if math.isfinite(score)]
    return GoldRow(
        f"{record.step}{record.variant}",
        math.nan if kl is None else kl,
        mean_of_finite(proxy),
        mean_of_finite(gold),
        len(record.samples) - len(gold),
        len(record.samples),
    )


def summary(rows: Sequence[GoldRow], name: str = GOLD) -> str:
    """A table of evaluations; `-` for what was not measured."""
    heads = ("step", "KL (nats)", "proxy", name, "failed")
    cells = [
        (row.label, _shown(row.kl), _shown(row.proxy), _shown(row.gold), f"{row.failed} of {row.total}")
        for row in rows
    ]
    widths = [max(len(line[place]) for line in [heads, *cells]) for place in range(len(heads))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in [heads, *cells]
    )


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


# ------------------------------------------------------------------------------------------- the command line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = vars(_parser().parse_args(written_with("-", sys.argv[1:] if argv is None else argv)))
    setup_logging()
    try:
        where, gold = Path(arguments.pop("run_or_eval_dir")), arguments.pop("gold")
        rows, name = _run(where, gold, parse_options(GoldOptions, arguments))
    except ConchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    print(summary(rows, name))
    return 2 if any(row.failed for row in rows) else 0


def _run(where: Path, gold: str, options: GoldOptions) -> tuple[list[GoldRow], str]:
    paths = evaluation_files(where)
    if options.write_seed_files is not None and paths[0].suffix != RECORD:
        raise ConfigError(f"--write-seed-files: {where} holds such files already, and no records of a run")
    whole = [path for path in paths if "@" not in path.name]
    if options.write_seed_files is not None and not whole:
        raise ConfigError(
            f"--write-seed-files: {where} evaluated a sweep (`eval_generation`), for whose values such files "
            "have no place: leave it out"
        )
    keys = dict.fromkeys(
        key for path in paths for sample in read_evaluation(path).samples for key in sample.metadata
    )
    config = options.section(None, options.batch_size)
    template = options.prompt_template
    with contextlib.closing(gold_source(gold, config, [*keys])) as source:
        asked = Gold(
            source,
            options.name,
            as_it_stands if template is None else templated(template),
            options.batch_size,
            config.client.max_in_flight,
            options.force,
        )
        rows = add_gold(paths, asked)
    if options.write_seed_files is not None:
        write_seed_files(whole, options.write_seed_files)
    return rows, options.name


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="conch gold-eval",
        description=GoldOptions.__doc__,
        epilog="Underscores will do for dashes. Exit codes: 0 all samples have scores, 1 it could not begin "
        "or the server went away, 2 some have none.",
    )
    parser.add_argument(
        "run_or_eval_dir",
        metavar="RUN_OR_EVAL_DIR",
        help="A run's folder, its evaluations/, or a folder of files eval-<k>.json.",
    )
    parser.add_argument(
        "gold",
        metavar="GOLD",
        help="The reward: host:port/model, http://host:port/path, verifier:gsm8k, or file.py:function.",
    )
    add_options(parser, GoldOptions)
    return parser


if __name__ == "__main__":
    sys.exit(main())
