"""Best-of-n on served models: `conch best-of-n key=value ...`.

    conch best-of-n model.path=outputs/sft/checkpoints/best data.eval=prompts.jsonl \\
        reward.url=127.0.0.1:8001/proxy gold=127.0.0.1:8001/gold best_of_n.num_samples=1024

Samples completions of each prompt, has proxy and gold score them, and estimates for every n what the one that
the proxy holds best of n is worth by both. All completions and scores are kept: a later call with more
samples, another gold, another proxy or another objective over the same members samples and asks only for what
is missing, also after one that was cut short.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.atomic_files import replace_text
from conch.cli import load_run_config, run_main
from conch.config import RewardConfig, TrainConfig
from conch.data.files import Rows, evaluation_rows, place_of
from conch.data.formats import prompt_form, prompt_metadata
from conch.data.prompts import fit_prompts, usable_prompts
from conch.data.text import TextCodec, special_tokens
from conch.distributed.collectives import Collectives
from conch.distributed.random_state import own_generators
from conch.distributed.train_engine import TrainEngine
from conch.errors import ConchError, ConfigError, DataError
from conch.evaluation.best_of_n import BestOfN, best_of_n
from conch.evaluation.curves import RESULTS, Start, results_json
from conch.evaluation.pictures import draw_folder
from conch.evaluation.records import GOLD, PROXY, EvaluationRecord, read_record, write_record
from conch.evaluation.sampling.config import (
    CONFIG_NAME,
    BestOfNConfig,
    BestOfNRunConfig,
    check_sources_named,
)
from conch.evaluation.sampling.samples import Part, SampleFolder, about_samples, record_of, rollouts_of
from conch.evaluation.sampling.scoring import (
    Asked,
    RecordScorer,
    check_can_read_texts,
    named_sources,
    scores_of,
    sources_of,
    unscored,
)
from conch.log import get_logger, progress
from conch.models.loading import load_lm, load_tokenizer
from conch.reference.digest import weights_digest
from conch.rollouts.factory import RolloutEngineFactory, check_sampling
from conch.rollouts.hf.engine import HFEngine
from conch.rollouts.prompts import longest_prompt
from conch.types import Prompt, Rollout, RolloutEngine

_log = get_logger(__name__)

_VARIANCE = "members_variance"
_BEST_OF_N = 2
"""Keeps the seeds of sampling apart from those that training and evaluations make of the same numbers."""


@dataclass(frozen=True)
class _Session:
    """What all phases need. asked: "reward" and, where there is one, "gold" -> its sources."""

    config: BestOfNConfig
    collectives: Collectives
    folder: SampleFolder
    prompts: Sequence[Prompt]
    asked: Mapping[str, Sequence[Asked]]
    scorers: Sequence[RecordScorer]


def run_best_of_n(config: BestOfNRunConfig) -> Path:
    """Sample, score and estimate; returns the folder of the results.

    Raises:
        ConchError: bad settings or data, before anything is sampled where that can be known; a source that
            failed, when all else is written.
    """
    check_sampling(config.rollout)
    train = TrainConfig(
        seed=config.best_of_n.seed, collective_timeout_s=config.best_of_n.collective_timeout_s
    )
    with ExitStack() as stack:
        engine = stack.enter_context(closing(TrainEngine(train)))
        collectives = engine.collectives
        rows = evaluation_rows(config.data, form=prompt_form)
        if rows is None:
            raise ConfigError("no prompts: set `data.eval` to a file, a folder or a dataset of the hub")
        asked = stack.enter_context(_opened_sources(config, rows, collectives))
        tokenizer = load_tokenizer(config.tokenizer, config.model.path)
        lm = load_lm(config.model)
        prompts = _prompts_of(rows, config, lm, tokenizer)
        specials = special_tokens(tokenizer)
        for each in (each for sources in asked.values() for each in sources):
            collectives.run_on_all_ranks(lambda each=each: each.source.check_prompts(prompts, specials))
        lm.to(engine.device).eval()  # pyright: ignore[reportArgumentType]
        folder = SampleFolder(config.best_of_n.output_dir)
        about = about_samples(
            weights_digest(lm),
            str(config.model.path or config.model.architecture),
            prompts,
            config.generation,
        )
        collectives.run_on_all_ranks(lambda: folder.open(about) if collectives.is_main else None)
        scorers = [
            RecordScorer(each, collectives.all_reduce_int) for sources in asked.values() for each in sources
        ]
        session = _Session(config.best_of_n, collectives, folder, prompts, asked, scorers)
        _score_kept(session)
        factory = RolloutEngineFactory(config.rollout, engine, tokenizer, lambda: lm, lambda: 0)
        stack.callback(factory.close)
        _sample_missing(session, lambda: factory(config.generation))
        results = config.best_of_n.output_dir / config.best_of_n.name
        collectives.run_on_all_ranks(
            lambda: _write_results(session, config, results) if collectives.is_main else None
        )
        return results


@contextmanager
def _opened_sources(
    config: BestOfNRunConfig, rows: Rows[Any], collectives: Collectives
) -> Iterator[dict[str, list[Asked]]]:
    """The sources of proxy and gold, once they have answered and can read every row."""
    metadata = [prompt_metadata(row) for row in rows]
    keys = list(dict.fromkeys(key for each in metadata if each is not None for key in each))
    asked: dict[str, list[Asked]] = {}

    def make() -> None:
        asked[PROXY] = sources_of(config.reward, PROXY, keys)
        if config.gold is not None:
            asked[GOLD] = sources_of(config.gold, GOLD, keys)

    def check() -> None:
        for each in (each for sources in asked.values() for each in sources):
            each.source.check()
            for index, row in enumerate(metadata):
                _check_row(each, row, place_of(rows, index, "prompt"))

    collectives.run_on_all_ranks(make)
    with ExitStack() as stack:
        for sources in asked.values():
            for each in sources:
                stack.callback(each.source.close)
        collectives.run_on_all_ranks(check)
        yield asked


def _check_row(asked: Asked, row: Mapping[str, Any] | None, place: str) -> None:
    try:
        if row is not None:
            asked.source.check_row(row)
    except DataError as error:
        raise DataError(f"{asked.source.name} cannot check completions: {place} {error}") from error


def _prompts_of(
    rows: Rows[Any], config: BestOfNRunConfig, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[Prompt]:
    codec = TextCodec(
        tokenizer,
        encoder_decoder=bool(lm.config.is_encoder_decoder),
        add_special_tokens=config.tokenizer.add_special_tokens,
    )
    max_model_len = config.rollout.max_model_len if config.rollout.engine in ("vllm", "ray") else None
    limit = longest_prompt(lm, config.generation, max_model_len)
    return fit_prompts(usable_prompts(rows, codec), codec, config.tokenizer, max_tokens=limit)


def _score_kept(session: _Session) -> None:
    """Ask for the scores that kept completions lack. Each rank has its own files."""
    collectives = session.collectives
    paths = session.folder.paths()
    own = collectives.shard(paths)
    for number in progress(range(-(-len(paths) // collectives.num_ranks)), desc="scoring what is kept"):
        path = own[number] if number < len(own) else None
        record = EvaluationRecord(0, ()) if path is None else read_record(path)
        places = {scorer: unscored(record, scorer.asked) for scorer in session.scorers}
        collectives.run_on_all_ranks(lambda places=places: _check_texts(places))
        for scorer, missing in places.items():
            if missing:
                samples = [record.samples[place] for place in missing]
                scorer.scorer.submit(rollouts_of(samples, session.prompts))
        _fill_and_write(session, record, places, path if any(places.values()) else None)


def _check_texts(places: Mapping[RecordScorer, Sequence[int]]) -> None:
    for scorer, missing in places.items():
        if missing:
            check_can_read_texts(scorer.asked)


def _sample_missing(session: _Session, make_sampler: Callable[[], RolloutEngine]) -> None:
    """Sample what is missing of each prompt, and have it scored, part by part."""
    collectives, config = session.collectives, session.config
    parts: list[Part] = []
    if collectives.is_main:
        records = [read_record(path) for path in session.folder.paths()]
        parts = session.folder.missing_parts(
            records, len(session.prompts), config.num_samples, config.save_every
        )
    parts = collectives.broadcast(parts)
    if not parts:
        return
    sampler = make_sampler()
    tell_of_prefixes(sampler, session.prompts)
    with progress(total=sum(len(part.prompts) for part in parts), desc="sampling") as bar:
        for first in range(0, len(parts), collectives.num_ranks):
            under_way = parts[first : first + collectives.num_ranks]
            (part,) = under_way[collectives.rank :][:1] or (Part(0, ()),)
            rollouts = _sampled(part, sampler, session)
            places = {scorer: [*range(len(rollouts))] for scorer in session.scorers}
            path = session.folder.path(part.number) if part.prompts else None
            _fill_and_write(session, record_of(rollouts, part.prompts), places, path)
            bar.update(sum(len(each.prompts) for each in under_way))


def tell_of_prefixes(sampler: RolloutEngine, prompts: Sequence[Prompt]) -> None:
    """Log why each completion reads its prompt for itself, where that is so."""
    if isinstance(sampler, HFEngine) and not sampler.takes_joining(prompts):
        _log.info(
            "each completion reads its prompt anew: the model's attention does not keep rows apart in one "
            "cache, or its sliding window is shorter than a prompt with its completion"
        )


def _sampled(part: Part, sampler: RolloutEngine, session: _Session) -> list[Rollout]:
    """Completions of a part, whose first source is asked as they end and the others behind."""
    prompts = [session.prompts[index] for index in part.prompts]
    if not prompts:
        return []
    first, *others = session.scorers
    with own_generators(_BEST_OF_N, session.config.seed, part.number):
        rollouts = first.scorer.submit_each(sampler, prompts)
    for scorer in others:
        scorer.scorer.submit(rollouts)
    return rollouts


def _fill_and_write(
    session: _Session,
    record: EvaluationRecord,
    places: Mapping[RecordScorer, Sequence[int]],
    path: Path | None,
) -> None:
    """Wait for the scores and write the record, also where a source fails; called on all ranks.

    places: of the samples that each source was asked for.

    Raises:
        ConchError: on all ranks, where a source failed, once everything else is written.
    """
    problems: list[ConchError] = []
    for scorer, asked_for in places.items():
        record, problem = scorer.fill(record, asked_for)
        problems += [] if problem is None else [problem]

    def raise_first() -> None:
        if problems:
            raise problems[0]

    session.collectives.run_on_all_ranks(lambda: _write(path, record) if path is not None else None)
    session.collectives.run_on_all_ranks(raise_first)


def _write(path: Path, record: EvaluationRecord) -> None:
    try:
        write_record(path, record)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}; make room, and start again") from error


def _write_results(session: _Session, config: BestOfNRunConfig, folder: Path) -> None:
    """Estimate from all that is kept, and write `results.json`, a picture and its CSV."""
    sections: dict[str, RewardConfig] = {PROXY: config.reward}
    if config.gold is not None:
        sections[GOLD] = config.gold
    prompts = _columns(session, sections)
    pooled = {name: np.concatenate([columns[name] for columns in prompts]) for name in prompts[0]}
    if GOLD in pooled:
        _check_gold_is_another(pooled[PROXY], pooled[GOLD])
    has_members = bool(np.isfinite(pooled[_VARIANCE]).any())
    if not has_members:
        prompts = [{name: columns[name] for name in sections} for columns in prompts]
    result = best_of_n(
        prompts,
        session.config.choices(min(len(columns[PROXY]) for columns in prompts)),
        proxy=PROXY,
        resamples=session.config.bootstrap,
        seed=session.config.seed,
    )
    starts = {name: Start.of(pooled[name]) for name in sections}
    content = results_json(
        result, starts, named_sources(session.asked, sections), _VARIANCE if has_members else ""
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / RESULTS, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}") from error
    _tell(result, folder)
    draw_folder(folder)


def _columns(session: _Session, sections: Mapping[str, RewardConfig]) -> list[dict[str, np.ndarray]]:
    """For each prompt, proxy, gold and the proxy's members' variance of its kept completions."""
    rows: list[dict[str, list[float]]] = [
        {name: [] for name in (*sections, _VARIANCE)} for _ in session.prompts
    ]
    for path in session.folder.paths():
        record = read_record(path)
        rollouts = rollouts_of(record.samples, session.prompts)
        scores = {
            name: scores_of(record, session.asked[name], section, rollouts)
            for name, section in sections.items()
        }
        for place, sample in enumerate(record.samples):
            for name, column in scores.items():
                rows[sample.prompt][name].append(column.totals[place])
            rows[sample.prompt][_VARIANCE].append(scores[PROXY].variances[place])
    return [{name: np.array(column) for name, column in row.items()} for row in rows]


def _check_gold_is_another(proxy: np.ndarray, gold: np.ndarray) -> None:
    both = np.isfinite(proxy) & np.isfinite(gold)
    if len(np.unique(proxy[both])) > 1 and np.array_equal(proxy[both], gold[both]):
        raise ConfigError(
            "the gold model is the proxy: all their scores are equal; what the proxy chooses must be judged "
            "by another"
        )


def _tell(result: BestOfN, folder: Path) -> None:
    if result.left_out_samples:
        _log.warning(
            "%d completions lack a score and are left out, and %d prompts with fewer than %d whole ones",
            *(result.left_out_samples, result.left_out_prompts, max(result.ns)),
        )
    first, last = (
        ", ".join(f"{name} {values[place]:.4g}" for name, values in result.mean.items()) for place in (0, -1)
    )
    _log.info("best of %d: %s; of %d: %s", result.ns[0], first, result.ns[-1], last)
    _log.info("%d prompts with %d completions: %s", result.num_prompts, result.num_samples, folder)


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value ...`, with prompts from `data.eval`; `--help` lists the keys."""
    config = load_run_config(BestOfNRunConfig, argv, default_name=CONFIG_NAME, check=check_sources_named)
    run_best_of_n(config)


if __name__ == "__main__":
    run_main(main)
