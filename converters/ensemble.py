"""Join reward models of a store into one served model: the mean of their scores, the lowest, or the mean less
their disagreement (Coste et al. 2023, arXiv:2310.02743).

    conch convert ensemble --members a b c --objective uwo --uwo-weight 0.1 --name ens
    conch convert ensemble --members a b c --objective uwo --stacked --name ens
    python -m conch.converters.ensemble --members a b:helpful --objective mean --name ens

Exit codes: 0 published, 1 cannot be done, 2 written but it combines wrong; nothing is published then.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conch.cli import CommandParser, add_options, keywords_of, written_with
from conch.config import load
from conch.converters.options import Conversion, EnsembleOptions
from conch.converters.stacked import check_stackable
from conch.errors import ConchError, ConversionError, ParityError
from conch.log import quieten_libraries
from conch.store.manifest import EnsembleMember, Manifest
from conch.store.store import StoredModel, list_models, read_model, staged_version, verify_files

# Files that decide which text becomes which ids; other tokenizer files hold defaults of no effect here.
_VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
_VOCABULARY_SUFFIXES = (".model", ".tiktoken")


@keywords_of(EnsembleOptions)
def to_ensemble(members: Sequence[str], **settings: Any) -> Conversion:
    """Publish an ensemble of models of a store as the next version of `name`.

    Args:
        members: two or more models of the store, of one form; `model:reward` takes one of several rewards.
        settings: fields of `EnsembleOptions`, which documents them.

    Raises:
        ConfigError: a setting is missing, unknown or of a wrong type.
        ConversionError: a member is unfit, or the members do not fit together.
        ParityError: the ensemble combines other than its formula; nothing was published.
        ModelStoreError: a member is missing or damaged, or the store cannot be written.
    """
    options = load(EnsembleOptions, settings)
    store = Path(options.model_store)
    stored, chosen = _read_members(store, members)
    _check_together(store, options, stored)
    if options.stacked:
        check_stackable(stored)
    # These bring torch and transformers: not for `--help` or a mistake.
    from conch.converters.backends.ensemble import publish_ensemble
    from conch.converters.backends.stacked import publish_stacked
    from conch.converters.parity.ensemble import ensemble_reference, member_scores
    from conch.converters.parity.stacked import StackedReference

    samples, scores = member_scores(stored, chosen, options.device)
    reference = ensemble_reference(samples, scores, options)
    with staged_version(store, options.name) as folder:
        if options.stacked:
            expected = StackedReference(samples, scores, reference, options.device)
            return publish_stacked(folder, store, options, stored, chosen, expected)
        return publish_ensemble(folder, store, options, stored, chosen, reference)


def _read_members(store: Path, names: Sequence[str]) -> tuple[list[StoredModel], tuple[EnsembleMember, ...]]:
    if len(names) < 2:
        raise ConversionError(f"an ensemble needs at least 2 members, got {len(names)}: give --members a b")
    stored = [read_model(store, name.partition(":")[0]) for name in names]
    members = tuple(_member(model, name.partition(":")[2]) for model, name in zip(stored, names, strict=True))
    keys = [f"{member.name}:{member.reward}" for member in members]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ConversionError(f"member {twice} is given twice: it would count double")
    for model in stored:
        verify_files(model)
    return stored, members


def _member(model: StoredModel, reward: str) -> EnsembleMember:
    names = model.spec.reward_names
    if model.spec.members:
        raise ConversionError(f"member {model.name} is an ensemble itself: give its members instead")
    if not reward and len(names) > 1:
        raise ConversionError(
            f"member {model.name} has the rewards {', '.join(names)}: say which, as {model.name}:{names[0]}"
        )
    if reward and reward not in names:
        raise ConversionError(f"member {model.name} has no reward {reward!r}; it has {', '.join(names)}")
    return EnsembleMember(
        name=model.name,
        reward=reward or ",".join(names),
        column=names.index(reward) if reward else 0,
        columns=len(names),
        version=model.version,
        content_sha256=model.spec.content_sha256,
    )


def _check_together(store: Path, options: EnsembleOptions, stored: Sequence[StoredModel]) -> None:
    first = stored[0]
    for other in stored[1:]:
        if other.spec.form != first.spec.form:
            raise ConversionError(
                f"members must be of one form: {first.name} is {first.spec.form}, "
                f"{other.name} is {other.spec.form}; convert one of them again with --form"
            )
        if other.spec.reads != first.spec.reads:
            raise ConversionError(
                f"members of a served ensemble get the same sample, but {first.name} reads "
                f"{first.spec.reads} and {other.name} {other.spec.reads}: serve both and combine them "
                "in the trainer, with reward.members and reward.combine"
            )
        if first.spec.form == "token" and _vocabulary(other) != _vocabulary(first):
            raise ConversionError(
                f"members {first.name} and {other.name} take token ids of different tokenizers; "
                "convert them in the text form, where each has its own"
            )
    if options.name in list_models(store) and not read_model(store, options.name).spec.members:
        raise ConversionError(
            f"{options.name!r} is a reward model in {store}, not an ensemble: give another --name"
        )


def _vocabulary(model: StoredModel) -> dict[str, str]:
    assert isinstance(model.manifest, Manifest)
    files = {Path(file).name: digest for file, digest in model.manifest.files.items()}
    if "tokenizer.json" in files:  # holds all that the older files hold
        return {"tokenizer.json": files["tokenizer.json"]}
    return {
        name: digest
        for name, digest in files.items()
        if name in _VOCABULARY_FILES or name.endswith(_VOCABULARY_SUFFIXES)
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    settings = vars(_parser().parse_args(written_with("-", sys.argv[1:] if argv is None else argv)))
    quieten_libraries()
    try:
        conversion = to_ensemble(settings.pop("members"), **settings)
    except ConchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ParityError) else 1
    print(conversion.parity.table())
    print(f"published {conversion.path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="conch convert ensemble",
        description="Join reward models of a store into one served model.",
    )
    parser.add_argument(
        "--members",
        nargs="+",
        required=True,
        metavar="MODEL[:REWARD]",
        help="models of the store; name the reward of a model that has several",
    )
    add_options(parser, EnsembleOptions)
    return parser


if __name__ == "__main__":
    sys.exit(main())
