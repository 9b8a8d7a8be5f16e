"""Join reward models of a store into one served model: the mean of their scores, the lowest, or the mean less
their disagreement (Coste et al. 2023, arXiv:2310.02743).

    conch-to-triton-ensemble --members a b c --objective uwo --uwo_weight 0.1 --name ens
    python -m conch.converters.ensemble --members a b:helpful --objective mean --name ens

Exit codes: 0 published, 1 cannot be done, 2 written but it combines wrong; nothing is published then.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from conch.cli import written_with
from conch.converters.backends.ensemble import publish_ensemble
from conch.converters.options import Conversion, EnsembleOptions
from conch.converters.parity.ensemble import member_scores, prove
from conch.errors import ConchError, ConversionError, ParityError
from conch.store.manifest import EnsembleMember, Manifest
from conch.store.store import (
    StoredModel,
    list_models,
    read_model,
    staged_version,
    verify_files,
)
from conch.triton.contract import Objective, OnMemberFailure

# Files that decide which text becomes which ids; other tokenizer files hold defaults of no effect here.
_VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
_VOCABULARY_SUFFIXES = (".model", ".tiktoken")


def to_ensemble(
    members: Sequence[str],
    *,
    name: str,
    objective: Objective,
    uwo_weight: float = 0.1,
    on_member_failure: OnMemberFailure = "fail",
    model_store: str | Path = "model_store",
    device: str = "cpu",
) -> Conversion:
    """Publish an ensemble of models of a store as the next version of `name`.

    Args:
        members: two or more models of the store, of one form; `model:reward` takes one of several rewards.
        objective: `mean`, `wco` (the lowest score) or `uwo` (mean - uwo_weight * population variance).
        on_member_failure: for a sample that a member gave no score, `fail` refuses the sample and names the
            member, `renormalise` combines the scores there are and says how many in `members_used`.
        device: where the members score the golden samples, `cpu` or `cuda`.

    Raises:
        ConversionError: a member is unfit, or the members do not fit together.
        ParityError: the ensemble combines other than its formula; nothing was published.
        ModelStoreError: a member is missing or damaged, or the store cannot be written.
    """
    options = EnsembleOptions(name, objective, uwo_weight, on_member_failure)
    store = Path(model_store)
    stored, chosen = _read_members(store, members)
    _check_together(store, options, stored)
    samples, scores = member_scores(stored, chosen, device)
    with staged_version(store, name) as folder:
        return publish_ensemble(folder, store, options, stored, chosen, prove(samples, scores, options))


def _read_members(store: Path, names: Sequence[str]) -> tuple[list[StoredModel], tuple[EnsembleMember, ...]]:
    if len(names) < 2:
        raise ConversionError(f"an ensemble needs at least 2 members, got {len(names)}: give --members a b")
    stored = [read_model(store, name.partition(":")[0]) for name in names]
    members = tuple(_member(model, name.partition(":")[2]) for model, name in zip(stored, names, strict=True))
    taken = [f"{member.name}:{member.reward}" for member in members]
    if len(set(taken)) < len(taken):
        twice = next(member for member in taken if taken.count(member) > 1)
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
    """The command. Returns the exit code."""
    arguments = vars(_parser().parse_args(written_with("_", sys.argv[1:] if argv is None else argv)))
    try:
        conversion = to_ensemble(**arguments)
    except ConchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ParityError) else 1
    print(conversion.parity.table())
    print(f"published {conversion.path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="conch convert ensemble", description="Join reward models of a store into one served model."
    )
    add = parser.add_argument
    add(
        "--members",
        nargs="+",
        required=True,
        metavar="MODEL[:REWARD]",
        help="models of the store; name the reward of a model that has several",
    )
    add("--name", required=True, help="the ensemble's name in the store")
    add(
        "--objective",
        required=True,
        choices=get_args(Objective),
        help="mean; wco: the lowest score; uwo: mean - uwo_weight * variance",
    )
    add(
        "--uwo_weight",
        "--uwo-weight",
        type=float,
        default=0.1,
        help="weight of the members' variance in uwo; default: %(default)s",
    )
    add(
        "--on_member_failure",
        "--on-member-failure",
        choices=get_args(OnMemberFailure),
        default="fail",
        help="fail: such a sample is refused, with the member's name; renormalise: the other members decide, "
        "and the reply says how many; default: %(default)s",
    )
    add("--model_store", "--model-store", default="model_store", help="default: %(default)s")
    add("--device", default="cpu", help="where members score the golden samples; default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
