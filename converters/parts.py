"""The models of the store that one conversion writes: one, or three for texts through an ONNX graph."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from conch.converters import triton_models
from conch.converters.backends import graph, python
from conch.converters.backends.onnx import check_onnx_installed
from conch.converters.backends.version_files import write_manifest
from conch.converters.checkpoints.reader import RewardCheckpoint
from conch.converters.checkpoints.tokenizer import used_special_tokens
from conch.converters.options import ConversionOptions
from conch.converters.recipes import recipe_version
from conch.errors import ConversionError
from conch.store.manifest import Backend, Manifest
from conch.triton.contract import Engine, Form, RewardModelSpec, ensemble_parts

_MODELS = Path(triton_models.__file__).parent
_TOKENIZER_RUNNER = (_MODELS / "tokenizer_model.py", _MODELS / "encoding.py")

_TOOLS = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
_MORE_TOOLS: dict[Backend, tuple[str, ...]] = {"onnx": ("onnx", "onnxscript", "onnxruntime")}


@dataclass(frozen=True, slots=True)
class Part:
    """One model of the store that a conversion writes.

    name: the model's name in the store.
    form: what is sent to the model.
    engine: Triton's back end, see `RewardModelSpec`.
    route: names of the parts that a sample passes through to get a score; () for a part that gives none.
    runner: the code of the version, of which the first file becomes its `model.py`; () for an ensemble, which
        Triton runs by itself.
    write_weights: fills the version folder with the model; None for a part without weights.
    """

    name: str
    form: Form
    engine: Engine
    route: tuple[str, ...]
    runner: tuple[Path, ...]
    write_weights: Callable[[Path, RewardCheckpoint, Manifest], None] | None


def plan_parts(name: str, options: ConversionOptions) -> tuple[Part, ...]:
    """List the parts of the model `name`, in the order of publication; the last has that name.

    Raises:
        ConversionError: a library that the back end needs is not installed.
    """
    if options.backend == "python":
        return (Part(name, options.form, "python", (name,), python.RUNNER, python.write_weights),)
    if options.backend == "torchscript":
        return (Part(name, "token", "pytorch", (name,), graph.RUNNER, graph.write_torchscript),)
    check_onnx_installed()
    if options.form == "token":
        return (Part(name, "token", "onnxruntime", (name,), graph.RUNNER, graph.write_onnx),)
    tokenizer, token_form = ensemble_parts(name)
    return (
        Part(token_form, "token", "onnxruntime", (token_form,), graph.RUNNER, graph.write_onnx),
        Part(tokenizer, "text", "python", (), _TOKENIZER_RUNNER, None),
        Part(name, "text", "ensemble", (tokenizer, token_form), (), None),
    )


def write_part(
    folder: Path, part: Part, checkpoint: RewardCheckpoint, options: ConversionOptions
) -> Manifest:
    """Write weights, tokenizer and manifest into a version folder, all but the runner.

    The checkpoint's model is not fit for use afterwards where the part has weights.

    Raises:
        ConversionError: the disk is full, a weight does not fit into the served precision, or the
            architecture cannot be exported.
    """
    manifest = manifest_of(part, checkpoint, options)
    try:
        if part.write_weights is not None:
            part.write_weights(folder, checkpoint, manifest)
        if part.runner:
            checkpoint.tokenizer.save_pretrained(folder)
        write_manifest(folder, manifest)
    except OSError as error:
        raise ConversionError(f"could not write the model below {folder.parents[1]}: {error}") from error
    return manifest


def manifest_of(part: Part, checkpoint: RewardCheckpoint, options: ConversionOptions) -> Manifest:
    """Describe a part: where it comes from, and the checkpoint's scoring rules."""
    tools = [*_TOOLS, *_MORE_TOOLS.get(options.backend, ())] + ["torchao"] * (options.dtype == "int8")
    return Manifest(
        **{**dict(checkpoint.rules), "reads": checkpoint.rules.reads if part.form == "text" else "texts"},
        name=part.name,
        form=part.form,
        backend=options.backend,
        source=_public_name(checkpoint.source),
        source_sha256=checkpoint.sha256,
        base_model=_public_name(checkpoint.base_model) if checkpoint.base_model else None,
        revision=options.revision,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        layout=python.layout_of(checkpoint),
        auto_class=checkpoint.kind.auto_class if checkpoint.kind else None,
        output=checkpoint.output,
        recipe=recipe_version(options.recipe) if options.recipe else None,
        decisions=checkpoint.decisions,
        batch_invariant=options.batch_invariant,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        special_tokens=used_special_tokens(checkpoint.tokenizer) if part.form == "text" else (),
        tools={"python": platform.python_version(), **{tool: version(tool) for tool in tools}},
    )


def spec_of(
    part: Part, manifest: Manifest, options: ConversionOptions, content_sha256: str
) -> RewardModelSpec:
    """Return the contract of a part that gives scores.

    content_sha256: hash of the version's manifest.
    """
    is_ensemble = part.engine == "ensemble"  # which has no batcher and no instances of its own
    return RewardModelSpec(
        name=part.name,
        form=part.form,
        max_batch_size=options.max_batch_size,
        max_queue_delay_us=0 if is_ensemble else options.max_queue_delay_us,
        instances=1 if is_ensemble else options.instances,
        reward_names=manifest.reward_names,
        max_length=manifest.max_length,
        content_sha256=content_sha256,
        engine=part.engine,
        granularity=manifest.granularity,
        reads=manifest.reads,
        special_tokens=manifest.special_tokens,
    )


def _public_name(name: str) -> str:
    """Return a hub id as it is, and of a folder or file on this machine only the last part."""
    return Path(name).resolve().name if Path(name).exists() else name
