"""Write the version folder of an ensemble that holds its members, prove it, and publish it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from conch.converters import triton_models
from conch.converters.backends.ensemble import ensemble_manifest, ensemble_spec
from conch.converters.backends.version_files import write_beside, write_manifest
from conch.converters.options import Conversion, EnsembleOptions
from conch.converters.parity.report import TOLERANCES, ParityReport
from conch.converters.parity.stacked import StackedReference
from conch.converters.parity.subprocess_model import SubprocessModel
from conch.errors import ConversionError, ParityError
from conch.log import get_logger
from conch.store.manifest import GOLDEN, EnsembleManifest, EnsembleMember, Manifest
from conch.store.store import StoredModel, publish

_log = get_logger(__name__)

_MODELS = Path(triton_models.__file__).parent
_BESIDE = ("ensemble_model.py", "reward_model.py", "network.py", "encoding.py", "stacking.py")
# Of a member's version: the program that runs it alone, and its proofs, which the ensemble's own replace.
_NOT_COPIED = ("model.py", "network.py", "encoding.py", "__pycache__", GOLDEN, "parity.txt", "parity.json")


def publish_stacked(
    folder: Path,
    store: Path,
    options: EnsembleOptions,
    stored: Sequence[StoredModel],
    members: tuple[EnsembleMember, ...],
    reference: StackedReference,
) -> Conversion:
    """Fill an empty staging folder and make it the ensemble's latest version.

    Members that do not score in one pass what each scores alone run one after another; the manifest says why.

    stored: the members' models, in the order of `members`.
    reference: what the ensemble must return.

    Raises:
        ParityError: a member scores other than by itself even so, or the scores are combined wrong.
        ConversionError: the folder cannot be written.
        ModelStoreError: the store cannot be written.
    """
    manifest = ensemble_manifest(options, stored, members)
    manifest = manifest.model_copy(update={"holds_members": True, "in_one_pass": True})
    try:
        _copy_files(folder, stored)
        report = _report(folder, manifest, stored, reference)
        if not report.ok:
            why = report.worst.problem or f"scores are off by {report.worst.max_difference:.1e}"
            _log.warning("%s: members are run one after another, not in one pass: %s", options.name, why)
            manifest = manifest.model_copy(update={"in_one_pass": False, "why_apart": why})
            report = _report(folder, manifest, stored, reference)
        if not report.ok:
            raise ParityError(
                f"ensemble {options.name} does not score as its members do, nothing was published "
                f"(worst: {report.worst.name})\n{report.table()}"
            )
        content_sha256 = write_beside(folder, manifest, reference.formula.golden, report)
    except OSError as error:
        raise ConversionError(f"could not write the ensemble below {store}: {error}") from error
    spec = replace(
        ensemble_spec(options, stored, members, manifest, content_sha256),
        holds_members=True,
        max_queue_delay_us=max(model.spec.max_queue_delay_us for model in stored),
    )
    path = publish(folder, spec, store, kind=options.instance_kind, gpu=options.gpu)
    return Conversion(path, spec, report)


def _copy_files(folder: Path, stored: Sequence[StoredModel]) -> None:
    shutil.copyfile(_MODELS / "stacked_model.py", folder / "model.py")
    for name in _BESIDE:
        shutil.copyfile(_MODELS / name, folder / name)
    for number, model in enumerate(stored):
        target = folder / "members" / str(number)
        shutil.copytree(
            model.path, target, ignore=shutil.ignore_patterns(*_NOT_COPIED), copy_function=shutil.copyfile
        )


def _report(
    folder: Path, manifest: EnsembleManifest, stored: Sequence[StoredModel], reference: StackedReference
) -> ParityReport:
    """Score the reference's samples by the written files in a fresh process."""
    write_manifest(folder, manifest)
    requests = reference.requests(in_one_pass=manifest.in_one_pass)
    with SubprocessModel(folder) as model:
        replies = model.score(requests, reference.device)
    dtypes = [model.manifest.dtype for model in stored if isinstance(model.manifest, Manifest)]
    tolerance = max(TOLERANCES[dtype] for dtype in dtypes)
    names = [model.name for model in stored]
    return reference.report(replies, names, tolerance, in_one_pass=manifest.in_one_pass)
