"""Gold scores of a study's run: for what the run has kept, and for its files `eval-<k>.json`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from conch.config import RewardConfig, load
from conch.evaluation.gold import (
    Gold,
    GoldRow,
    Present,
    add_gold,
    as_it_stands,
    gold_row,
    gold_source,
)
from conch.evaluation.records import EVALUATIONS, GOLD, records_of
from conch.evaluation.seed_files import (
    evaluation_files,
    read_evaluation,
    read_rows,
    seed_files_of,
    write_seed_files,
)
from examples.overoptimisation.prompts import alpaca, with_marks
from examples.overoptimisation.served import Serving, has_address, hosting
from examples.overoptimisation.settings import GoldSettings


def gold_scores(eval_dir: Path, gold: GoldSettings, store: Path, *, force: bool = False) -> list[GoldRow]:
    """Add gold scores to the evaluations of a run. Returns a row for each.

    The gold model is served for that alone, and only where scores are missing. Where the run's own records
    lie beside `eval_dir`, they get the scores, and the files are made of them anew.

    Raises:
        ConchError: there are no evaluations, or the model cannot be had; what was scored is kept.
    """
    run_dir = eval_dir.resolve().parent
    records = records_of(run_dir) if (run_dir / EVALUATIONS).is_dir() else []
    try:
        return _scored(records or evaluation_files(eval_dir), gold, store, force)
    finally:
        if records:
            write_eval_files(run_dir, eval_dir)


def write_eval_files(run_dir: Path, eval_dir: Path) -> None:
    """Make a run's files `eval-<k>.json` of its records; files of evaluations that a run which went on from
    an older checkpoint has not come to yet are deleted."""
    written = write_seed_files(records_of(run_dir), eval_dir)
    for path in set(seed_files_of(eval_dir)) - set(written):
        path.unlink()


def _scored(paths: Sequence[Path], gold: GoldSettings, store: Path, force: bool) -> list[GoldRow]:
    before = [read_evaluation(path) for path in paths]
    whole = all(
        sample.scores.get(GOLD) is not None for record in before for sample in record.samples
    ) and all(record.sources.get(GOLD) == gold.model_name for record in before)
    if whole and not force:
        return [gold_row(record) for record in before]
    config = load(RewardConfig, {"client": {"batch_rows": gold.batch_size}})
    keys = [*dict.fromkeys(key for record in before for sample in record.samples for key in sample.metadata)]
    with _address(gold, store) as address, closing(gold_source(address, config, keys)) as source:
        asked = Gold(
            source,
            present=_present(paths[0], gold),
            batch_size=gold.batch_size,
            at_once=config.client.max_in_flight,
            force=force,
            who=gold.model_name,
        )
        return add_gold(paths, asked)


@contextmanager
def _address(gold: GoldSettings, store: Path) -> Iterator[str]:
    """Where the gold reward is asked: of a checkpoint, a server that lives as long as the context."""
    if has_address(gold.model_name):
        yield gold.model_name
        return
    # Alpaca's prompt is followed by the answer alone; other models close a text as they have learned to.
    template = gold.template or ("{text}" if gold.is_alpacafarm_rm else None)
    with hosting([gold.model_name], Serving(store, template, gold.dtype)) as endpoints:
        yield endpoints[gold.model_name]


def _present(path: Path, gold: GoldSettings) -> Present:
    """What the gold model reads of a sample. Files of the paper's code have the instruction alone, and its
    models read it between marks; ours hold what the policy read."""
    if gold.is_alpacafarm_rm:
        return alpaca
    is_foreign = path.suffix == ".json" and "prompt" not in read_rows(path)[0]
    return with_marks if is_foreign else as_it_stands
