"""The steps of a conversion: read, write, prove, publish."""

from __future__ import annotations

import contextlib
import gc
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from transformers.utils import logging as transformers_logging

from conch.converters.backends import graph as graph_form
from conch.converters.backends import onnx as onnx_text
from conch.converters.backends import python as python_form
from conch.converters.backends import python as torchao_int8
from conch.converters.backends.version_files import write_beside
from conch.converters.checkpoints.reader import Checkpoint, check_dense, checkpoint_sha256, read_checkpoint
from conch.converters.options import Conversion, ConversionOptions
from conch.converters.parity.compare import Expected, compare
from conch.converters.parity.reference import expected_scores, golden_of
from conch.converters.parity.report import ParityReport
from conch.converters.parity.samples import Case, build_cases, requests_of
from conch.converters.parity.subprocess_model import Request, ServedForm
from conch.errors import ConversionError, ParityError
from conch.log import get_logger
from conch.store.manifest import MANIFEST, Backend, Golden, Manifest
from conch.store.store import owner_of, publish, staged_version
from conch.triton.contract import Engine, RewardModelSpec, TokenizerSpec, ensemble_parts

_log = get_logger(__name__)

_TOOLS = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
_MORE_TOOLS: dict[Backend, tuple[str, ...]] = {"onnx": ("onnx", "onnxscript", "onnxruntime")}

WriteVersion = Callable[[Path, Checkpoint, Manifest], None]
"""Writes into a folder all that a back end needs, a runner `model.py` for the parity check among it."""

WRITERS: dict[Backend, WriteVersion] = {
    "python": python_form.write_version,
    "onnx": graph_form.write_onnx,
    "torchscript": graph_form.write_torchscript,
}
_ENGINES: dict[Backend, Engine] = {"python": "python", "onnx": "onnxruntime", "torchscript": "pytorch"}


@dataclass(frozen=True, slots=True)
class Written:
    """A version that was written aside, and what it must score. The original is no longer in memory."""

    manifest: Manifest
    cases: Sequence[Case]
    requests: list[Request]
    expected: Expected


def convert(options: ConversionOptions) -> Conversion:
    """Read the checkpoint, write a version aside, compare its scores, and publish it if they agree.

    Raises:
        ConversionError: the checkpoint cannot be served faithfully, or the name is another checkpoint's.
        ParityError: it was written but scores differ.
        ModelStoreError: the store cannot be written.
    """
    if options.backend != "python":
        graph_form.check_options(options)
    if (options.backend, options.form) == ("onnx", "text"):
        return _convert_onnx_text(options)
    with quiet_transformers(), _staged(options) as folder:
        if options.dtype == "int8":
            torchao_int8.check_torchao()
        _refuse_other_checkpoint(options)
        runner = python_form.MODEL_PY if options.backend == "python" else graph_form.GRAPH_PY
        shutil.copyfile(runner, folder / "model.py")
        with ServedForm(folder) as served:  # imports its libraries while we read and write
            written = _write(options, folder)
            gc.collect()  # before the served form loads, the original must be gone
            _log.info("scoring %d requests with the served form", len(written.requests))
            replies = served.score(written.requests, options.reading.device)
        invariant = options.batch_invariant
        report = compare(written.cases, replies, written.expected, options.dtype, batch_invariant=invariant)
        if not report.ok:
            raise ParityError(_parity_failure(report, options))
        golden = golden_of(written.cases, options.form, written.expected, options.dtype)
        spec = _finish(folder, options, written.manifest, golden, report)
        if options.dry_run:
            return Conversion(None, spec, report)
        placement = {"kind": options.instance_kind, "gpu": options.gpu, "keep": options.keep}
        return Conversion(publish(folder, spec, options.model_store, **placement), spec, report)


def _convert_onnx_text(options: ConversionOptions) -> Conversion:
    """Three models: tokenizer, token form, and the ensemble of both; checked before any is published."""
    tokenizer_name, onnx_name = ensemble_parts(options.name)
    as_token = replace(options, form="token", name=onnx_name)
    with quiet_transformers(), _staged(options) as folder:
        for owned in (options, as_token):
            _refuse_other_checkpoint(owned)
        token = convert(replace(as_token, model_store=folder.parent / "parts", dry_run=False))
        assert token.path is not None
        checkpoint = read_checkpoint(options.checkpoint, options.reading)
        manifest = _manifest(options, checkpoint)
        cases = build_cases(checkpoint, "text", max_batch_size=options.max_batch_size)
        expected = expected_scores(checkpoint, cases)
        tokenizer = folder.parent / "tokenizer" / "version"
        tokenizer.parent.mkdir()
        onnx_text.write_tokenizer(tokenizer, checkpoint, manifest)
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
        requests = requests_of(cases, "text", checkpoint.pad_token_id)
        replies = onnx_text.score_texts(tokenizer, token.path, requests, options.reading.device)
        report = compare(cases, replies, expected, options.dtype)
        if not report.ok:
            raise ParityError(_parity_failure(report, options))
        golden = golden_of(cases, "text", expected, options.dtype)
        spec = _finish(folder, options, manifest, golden, report)
        # It has no batcher and no instances of its own.
        spec = replace(spec, engine="ensemble", max_queue_delay_us=0, instances=1)
        if options.dry_run:
            return Conversion(None, spec, report)
        placement = {"kind": options.instance_kind, "gpu": options.gpu, "keep": options.keep}
        limits = TokenizerSpec(tokenizer_name, options.max_batch_size, checkpoint.max_length)
        publish(token.path, token.spec, options.model_store, **placement)
        publish(tokenizer, limits, options.model_store, **placement)
        return Conversion(publish(folder, spec, options.model_store, **placement), spec, report)


def _write(options: ConversionOptions, folder: Path) -> Written:
    """All that needs the original: its model is freed when this returns."""
    _log.info("reading %s", options.checkpoint)
    checkpoint = read_checkpoint(options.checkpoint, options.reading)
    check_dense(checkpoint, options.form)
    if options.dtype == "int8":
        torchao_int8.check_layers(checkpoint.model)
    manifest = _manifest(options, checkpoint)
    cases = build_cases(checkpoint, options.form, max_batch_size=options.max_batch_size)
    expected = expected_scores(checkpoint, cases)
    _log.info("writing the version")
    WRITERS[options.backend](folder, checkpoint, manifest)
    return Written(manifest, cases, requests_of(cases, options.form, checkpoint.pad_token_id), expected)


@contextlib.contextmanager
def _staged(options: ConversionOptions) -> Iterator[Path]:
    """Where the version is written: in the store, or for a dry run, which leaves it alone, elsewhere."""
    if not options.dry_run:
        with staged_version(options.model_store, options.name) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix="conch-dry-run-") as scratch:
        folder = Path(scratch) / "version"
        folder.mkdir()
        yield folder


def _refuse_other_checkpoint(options: ConversionOptions) -> None:
    there = owner_of(options.model_store, options.name) if not options.force else None
    if there is None or there.sha256 == checkpoint_sha256(options.checkpoint, options.reading):
        return
    raise ConversionError(
        f"model {options.name!r} in {options.model_store} was made from other weights ({there.source}): "
        "give another --name, or --force to make these its next version"
    )


def _manifest(options: ConversionOptions, checkpoint: Checkpoint) -> Manifest:
    return Manifest(
        name=options.name,
        form=options.form,
        backend=options.backend,
        source=_public_name(options.checkpoint),
        source_sha256=checkpoint.sha256,
        base_model=_public_name(checkpoint.base_model) if checkpoint.base_model else None,
        revision=options.reading.revision,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        template=checkpoint.template,
        truncation_side=checkpoint.tokenizer.truncation_side,
        pooling=checkpoint.pooling,
        layout=python_form.layout_of(checkpoint),
        columns=checkpoint.columns,
        separator_id=checkpoint.separator_id,
        aggregate=checkpoint.aggregate,
        granularity=checkpoint.granularity,
        batch_invariant=options.batch_invariant,
        max_length=checkpoint.max_length,
        reward_names=checkpoint.reward_names,
        normalise=checkpoint.normalise == "parameters",
        folded=checkpoint.normalise == "fold",
        mean=checkpoint.mean,
        std=checkpoint.std,
        dtype=options.dtype,
        pad_token_id=checkpoint.pad_token_id,
        eos_token_id=checkpoint.tokenizer.eos_token_id,
        vocab_size=checkpoint.vocab_size,
        trust_remote_code=options.reading.trust_remote_code,
        tools=_tools(options),
    )


def _public_name(name: str) -> str:
    """Of a folder or file on this machine only the last part."""
    return Path(name).resolve().name if Path(name).exists() else name


def _tools(options: ConversionOptions) -> dict[str, str]:
    names = [*_TOOLS, *_MORE_TOOLS.get(options.backend, ())] + ["torchao"] * (options.dtype == "int8")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _finish(
    folder: Path, options: ConversionOptions, manifest: Manifest, golden: Golden, report: ParityReport
) -> RewardModelSpec:
    """Write what stands beside the weights."""
    content_sha256 = write_beside(folder, manifest, golden, report)
    return RewardModelSpec(
        name=options.name,
        form=options.form,
        max_batch_size=options.max_batch_size,
        max_queue_delay_us=options.max_queue_delay_us,
        instances=options.instances,
        reward_names=manifest.reward_names,
        max_length=manifest.max_length,
        content_sha256=content_sha256,
        engine=_ENGINES[options.backend],
        granularity=manifest.granularity,
    )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
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


def _parity_failure(report: ParityReport, options: ConversionOptions) -> str:
    return (
        f"{options.checkpoint}: the converted model does not score like the original, nothing was published "
        f"(worst: {report.worst.name})\n{report.table()}"
    )
