"""Write the version folder of an ensemble, compare the ensemble with its formula, and publish it."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from conch.converters import triton_models
from conch.converters.backends.version_files import write_beside, write_manifest
from conch.converters.options import Conversion, EnsembleOptions
from conch.converters.parity.ensemble import EnsembleReference
from conch.converters.parity.subprocess_model import SubprocessModel
from conch.errors import ConversionError, ParityError
from conch.store.manifest import EnsembleManifest, EnsembleMember
from conch.store.store import StoredModel, publish
from conch.triton.contract import RewardModelSpec

ENSEMBLE_PY = Path(triton_models.__file__).parent / "ensemble_model.py"


def publish_ensemble(
    folder: Path,
    store: Path,
    options: EnsembleOptions,
    stored: Sequence[StoredModel],
    members: tuple[EnsembleMember, ...],
    reference: EnsembleReference,
) -> Conversion:
    """Fill an empty staging folder and make it the ensemble's latest version.

    stored: the members' models, in the order of `members`.
    reference: what the ensemble must return.

    Raises:
        ParityError: the written `model.py` combines other than the formula.
        ConversionError: the folder cannot be written.
        ModelStoreError: the store cannot be written.
    """
    manifest = ensemble_manifest(options, stored, members)
    try:
        shutil.copyfile(ENSEMBLE_PY, folder / "model.py")
        write_manifest(folder, manifest)
        with SubprocessModel(folder) as model:
            report = reference.report(model.score([case.request for case in reference.cases], "cpu"))
        if not report.ok:
            raise ParityError(
                f"ensemble {options.name} does not combine as its formula says, nothing was published "
                f"(worst: {report.worst.name})\n{report.table()}"
            )
        content_sha256 = write_beside(folder, manifest, reference.golden, report)
    except OSError as error:
        raise ConversionError(f"could not write the ensemble below {store}: {error}") from error
    spec = ensemble_spec(options, stored, members, manifest, content_sha256)
    return Conversion(publish(folder, spec, store), spec, report)


def ensemble_manifest(
    options: EnsembleOptions, stored: Sequence[StoredModel], members: tuple[EnsembleMember, ...]
) -> EnsembleManifest:
    """Return the manifest of an ensemble that asks its members."""
    rewards = {member.reward for member in members}
    return EnsembleManifest(
        name=options.name,
        form=stored[0].spec.form,
        reads=stored[0].spec.reads,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        members=members,
        objective=options.objective,
        uwo_weight=options.uwo_weight,
        variance=options.variance,
        on_member_failure=options.on_member_failure,
        reward_names=(rewards.pop() if len(rewards) == 1 else "reward",),
        max_length=min(model.spec.max_length for model in stored),
        tools={"python": platform.python_version(), "numpy": version("numpy")},
    )


def ensemble_spec(
    options: EnsembleOptions,
    stored: Sequence[StoredModel],
    members: Sequence[EnsembleMember],
    manifest: EnsembleManifest,
    content_sha256: str,
) -> RewardModelSpec:
    """Return the contract of an ensemble that asks its members."""
    return RewardModelSpec(
        name=options.name,
        form=manifest.form,
        max_batch_size=min(model.spec.max_batch_size for model in stored),
        reward_names=manifest.reward_names,
        max_length=manifest.max_length,
        max_queue_delay_us=0,  # the members wait to fill their batches; waiting twice gains nothing
        content_sha256=content_sha256,
        members=member_labels(members),
        variance=options.variance,
        reads=manifest.reads,
        special_tokens=_known_to_all(stored),
    )


def member_labels(members: Sequence[EnsembleMember]) -> tuple[str, ...]:
    """Return what clients call the members: their models' names, with the reward where one stands twice."""
    names = [member.name for member in members]
    return tuple(
        member.name if names.count(member.name) == 1 else f"{member.name}:{member.reward}"
        for member in members
    )


def _known_to_all(stored: Sequence[StoredModel]) -> tuple[str, ...]:
    """Return the special tokens of every member; none if one does not say which it has."""
    return tuple(sorted(set.intersection(*(set(model.spec.special_tokens) for model in stored))))
