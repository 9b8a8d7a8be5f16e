"""The steps of a conversion: read, write, prove, publish."""

from __future__ import annotations

import contextlib
import gc
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers.utils import logging as transformers_logging

from conch.converters.backends.python import check_layers, check_torchao
from conch.converters.backends.version_files import write_beside
from conch.converters.checkpoints.reader import RewardCheckpoint, checkpoint_sha256, read_checkpoint
from conch.converters.checkpoints.rules import check_dense
from conch.converters.options import Conversion, ConversionOptions
from conch.converters.parity.compare import compare
from conch.converters.parity.forked_python import ForkedPython
from conch.converters.parity.readings import refuse_lost_separators, refuse_two_readings
from conch.converters.parity.reference import ParityReference, golden_of, reference_of, rounding_of_failures
from conch.converters.parity.report import ParityReport
from conch.converters.parity.subprocess_model import SubprocessModel, score_in_sequence
from conch.converters.parts import Part, plan_parts, spec_of, write_part
from conch.errors import ConversionError, ParityError
from conch.log import get_logger
from conch.store.manifest import Manifest
from conch.store.store import owner_of, publish, staged_version
from conch.triton.contract import RewardModelSpec, TokenizerSpec

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PartVersion:
    """The next version of a part, in its staging folder.

    reference: what the part must score; None for a part that gives no scores.
    """

    part: Part
    folder: Path
    manifest: Manifest
    reference: ParityReference | None


def convert(
    checkpoint: str, name: str, options: ConversionOptions, fork: ForkedPython | None = None
) -> Conversion:
    """Read a checkpoint, write its parts aside, compare their scores, and publish the parts if they agree.

    checkpoint: folder, file of tensors, or hub id.
    name: model in the store.
    fork: runs the model of a conversion that writes a single one; None starts a process for each model.

    Raises:
        ConversionError: the checkpoint cannot be served faithfully, or the name is another checkpoint's.
        ParityError: the parts were written but score differently; nothing was published.
        ModelStoreError: the store cannot be written.
    """
    parts = plan_parts(name, options)
    if options.dtype == "int8":
        check_torchao()
    with quiet_transformers(), contextlib.ExitStack() as stack:
        folders = {part.name: stack.enter_context(_staging_folder(part.name, options)) for part in parts}
        _refuse_other_checkpoint(checkpoint, parts, options)
        for part in parts:
            for number, file in enumerate(part.runner):
                shutil.copyfile(file, folders[part.name] / (file.name if number else "model.py"))
        # The processes import their libraries while this one reads and writes.
        routes = {
            part.name: [stack.enter_context(SubprocessModel(folders[step], fork)) for step in part.route]
            for part in parts
        }
        versions = _read_and_write(checkpoint, parts, folders, options)
        gc.collect()  # before the written models load, the original must be gone
        reports = [_prove(each, routes[each.part.name], checkpoint, options) for each in versions]
        specs = [_finish(each, report, options) for each, report in zip(versions, reports, strict=True)]
        paths = [
            publish(
                each.folder,
                spec,
                Path(options.model_store),
                kind=options.instance_kind,
                gpu=options.gpu,
                keep=options.keep,
            )
            for each, spec in zip(versions, specs, strict=True)
            if not options.dry_run
        ]
    spec, report = specs[-1], reports[-1]
    assert isinstance(spec, RewardModelSpec) and report is not None  # the last part is the model itself
    return Conversion(paths[-1] if paths else None, spec, report)


def _read_and_write(
    name: str, parts: Sequence[Part], folders: Mapping[str, Path], options: ConversionOptions
) -> list[PartVersion]:
    """Do all that needs the original: its model is freed on return."""
    _log.info("reading %s", name)
    checkpoint = read_checkpoint(name, options)
    for decision, value in checkpoint.decisions.items():
        _log.info("  %-16s %s", decision, value)
    for part in parts:
        _check_servable(part, checkpoint, options)
    refuse_two_readings(checkpoint)
    refuse_lost_separators(checkpoint)
    if checkpoint.longest_compared < checkpoint.rules.max_length:
        _log.warning(
            "scores are compared on samples of up to %d tokens, longer ones take too long; up to the limit "
            "of %d the token ids are compared that are read",
            *(checkpoint.longest_compared, checkpoint.rules.max_length),
        )
    _log.info("scoring samples of up to %d tokens with the original", checkpoint.longest_compared)
    # Every reference comes before the first part: once its weights are written, the model is not fit for use.
    references = [
        reference_of(checkpoint, part.form, max_batch_size=options.max_batch_size) if part.route else None
        for part in parts
    ]
    _log.info("writing the version")
    return [
        PartVersion(
            part, folders[part.name], write_part(folders[part.name], part, checkpoint, options), reference
        )
        for part, reference in zip(parts, references, strict=True)
    ]


def _prove(
    version: PartVersion, route: Sequence[SubprocessModel], checkpoint: str, options: ConversionOptions
) -> ParityReport | None:
    """Compare what a part scores with its reference; None for a part that gives no scores.

    Raises:
        ParityError: the scores differ.
    """
    reference = version.reference
    if reference is None:
        return None
    _log.info("scoring %d requests with %s as it was written", len(reference.requests), version.part.name)
    replies = score_in_sequence(route, reference.requests, options.device)
    compared = partial(
        compare,
        *(reference.cases, replies, reference.expected, options.dtype),
        batch_invariant=options.batch_invariant,
    )
    report = compared()
    if not report.ok:
        rounding = rounding_of_failures(
            *(reference.cases, replies, reference.expected, options.dtype),
            lambda: read_checkpoint(checkpoint, options),
        )
        reference.rounding.update(rounding)
        report = compared(rounding=rounding)
    if not report.ok:
        raise ParityError(
            f"{checkpoint}: the converted model does not score like the original, nothing was published "
            f"(worst: {report.worst.name})\n{report.table()}"
        )
    return report


def _finish(
    version: PartVersion, report: ParityReport | None, options: ConversionOptions
) -> RewardModelSpec | TokenizerSpec:
    """Write golden samples, report and hashes beside the weights, and return the part's contract."""
    part, manifest, reference = version.part, version.manifest, version.reference
    if report is None or reference is None:
        return TokenizerSpec(part.name, options.max_batch_size, manifest.max_length)
    golden = golden_of(
        reference.cases, part.form, reference.expected, options.dtype, left_out=reference.rounding
    )
    return spec_of(part, manifest, options, write_beside(version.folder, manifest, golden, report))


def _check_servable(part: Part, checkpoint: RewardCheckpoint, options: ConversionOptions) -> None:
    """Raise ConversionError for what only the checkpoint shows that the part cannot serve."""
    if part.route:
        check_dense(checkpoint.rules, checkpoint.tokenizer, part.form)
    if part.engine == "ensemble" and checkpoint.rules.reads == "dialogues":
        raise ConversionError(
            f"--backend onnx has no chat template, and {checkpoint.source} reads dialogues, since its "
            "tokenizer has one: take --backend python, or --form token; or --template '{text}{eos}' if "
            "it was trained on texts"
        )
    if options.dtype == "int8":
        check_layers(checkpoint.model)


@contextlib.contextmanager
def _staging_folder(name: str, options: ConversionOptions) -> Iterator[Path]:
    """Yield an empty folder for a version: in the store, or elsewhere for a dry run, which makes no store."""
    if not options.dry_run:
        with staged_version(Path(options.model_store), name) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix="conch-dry-run-") as scratch:
        folder = Path(scratch) / "version"
        folder.mkdir()
        yield folder


def _refuse_other_checkpoint(checkpoint: str, parts: Sequence[Part], options: ConversionOptions) -> None:
    """Raise ConversionError if a part's name belongs to other weights, unless the options force the name."""
    if options.force:
        return
    owners = {part.name: owner_of(Path(options.model_store), part.name) for part in parts}
    if not any(owners.values()):
        return
    sha256 = checkpoint_sha256(checkpoint, options)
    for name, owner in owners.items():
        if owner is not None and owner.sha256 != sha256:
            raise ConversionError(
                f"model {name!r} in {options.model_store} was made from other weights ({owner.source}): "
                "give another --name, or --force to make these its next version"
            )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and load reports; what matters in them becomes our errors."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
