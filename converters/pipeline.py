"""The steps of a conversion: read, write, prove, publish."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from conch import serving
from conch.converters.cases import build_cases, requests_of
from conch.converters.checkpoint import Checkpoint, read_checkpoint
from conch.converters.conversion import Conversion, Options
from conch.converters.parity import ParityReport
from conch.converters.reference import Reference, compare, golden_of
from conch.converters.served_form import ServedForm
from conch.errors import ConversionError, ParityError
from conch.serving.manifest import GOLDEN, MANIFEST, Golden, Manifest, sha256_of
from conch.serving.spec import RewardModelSpec
from conch.serving.store import publish, staged_version

MODEL_PY = Path(serving.__file__).parent / "python_backend" / "model.py"

_TOOLS = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


def convert(options: Options) -> Conversion:
    """Read the checkpoint, write a version aside, compare its scores, and publish it if they agree.

    Raises:
        ConversionError: the checkpoint cannot be served faithfully.
        ParityError: it was written but scores differ.
        ModelStoreError: the store cannot be written.
    """
    with _quiet_transformers(), staged_version(options.model_store, options.name) as folder:
        shutil.copyfile(MODEL_PY, folder / "model.py")
        with ServedForm(folder) as served:  # imports its libraries while we read and write
            checkpoint = read_checkpoint(
                options.checkpoint,
                revision=options.revision,
                template=options.template,
                max_length=options.max_length,
                normalise=options.normalise,
                device=options.device,
                trust_remote_code=options.trust_remote_code,
            )
            manifest = _manifest(options, checkpoint)
            reference = Reference(checkpoint, normalise=checkpoint.normalise)
            cases = build_cases(checkpoint, options.form, max_batch_size=options.max_batch_size)
            reference.score_all(cases)  # before _write_model, which may lower the live model's precision
            golden = golden_of(cases, options.form, reference, options.dtype)
            _write_model(folder, checkpoint, manifest)
            requests = requests_of(cases, options.form, checkpoint.pad_token_id)
            report = compare(cases, served.score(requests, options.device), reference, options.dtype)
        if not report.ok:
            raise ParityError(_parity_failure(report, options))
        spec = _finish(folder, options, manifest, golden, report)
        return Conversion(publish(folder, spec, options.model_store), spec, report)


def _manifest(options: Options, checkpoint: Checkpoint) -> Manifest:
    if checkpoint.normalise and (checkpoint.mean is None or checkpoint.std is None):
        raise ConversionError(
            f"normalise was asked for, but {options.checkpoint} has no reward_model.json "
            "with `mean` and `std`"
        )
    local = Path(options.checkpoint).is_dir()
    return Manifest(
        name=options.name,
        form=options.form,
        source=Path(options.checkpoint).resolve().name if local else options.checkpoint,
        revision=options.revision,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        template=checkpoint.template,
        max_length=checkpoint.max_length,
        reward_names=checkpoint.reward_names,
        normalise=checkpoint.normalise,
        mean=checkpoint.mean,
        std=checkpoint.std,
        dtype=options.dtype,
        pad_token_id=checkpoint.pad_token_id,
        eos_token_id=checkpoint.tokenizer.eos_token_id,
        vocab_size=checkpoint.vocab_size,
        trust_remote_code=options.trust_remote_code,
        tools={"python": platform.python_version(), **{name: version(name) for name in _TOOLS}},
    )


def _write_model(folder: Path, checkpoint: Checkpoint, manifest: Manifest) -> None:
    try:
        checkpoint.model.to(getattr(torch, manifest.dtype)).save_pretrained(folder)
        checkpoint.tokenizer.save_pretrained(folder)
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
    except OSError as error:
        raise ConversionError(f"could not write the model below {folder.parents[1]}: {error}") from error


def _finish(
    folder: Path, options: Options, manifest: Manifest, golden: Golden, report: ParityReport
) -> RewardModelSpec:
    """Write what stands beside the weights; the manifest last, since it hashes all the rest."""
    (folder / GOLDEN).write_text(golden.model_dump_json(indent=2, exclude_none=True), encoding="utf-8")
    (folder / "parity.txt").write_text(report.table() + "\n", encoding="utf-8")
    (folder / "parity.json").write_text(json.dumps(asdict(report), indent=2), encoding="utf-8")
    files = {
        str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    del files[MANIFEST]
    final = manifest.model_copy(update={"parity": report.summary(), "files": files})
    (folder / MANIFEST).write_text(final.model_dump_json(indent=2), encoding="utf-8")
    return RewardModelSpec(
        name=options.name,
        form=options.form,
        max_batch_size=options.max_batch_size,
        reward_names=manifest.reward_names,
        max_length=manifest.max_length,
        content_sha256=sha256_of(folder / MANIFEST),
    )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and load reports; what matters in them becomes our errors."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _parity_failure(report: ParityReport, options: Options) -> str:
    return (
        f"{options.checkpoint}: the converted model does not score like the original, nothing was published "
        f"(worst: {report.worst.name})\n{report.table()}"
    )
