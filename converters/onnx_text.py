"""The text form of an ONNX model: a tokenizer before the token-form model, joined by a Triton ensemble."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conch import serving
from conch.converters.checkpoint import Checkpoint
from conch.converters.served_form import Request, ServedForm
from conch.errors import ConversionError
from conch.serving.manifest import MANIFEST, Manifest

TOKENIZER_PY = Path(serving.__file__).parent / "python_backend" / "tokenizer.py"


def write_tokenizer(folder: Path, checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Fill the version folder of the tokenizer.

    Raises:
        ConversionError: the template is a chat template, or the folder cannot be written.
    """
    if manifest.template == "chat":
        raise ConversionError("--backend onnx has no chat template: take --backend python")
    try:
        folder.mkdir()
        shutil.copyfile(TOKENIZER_PY, folder / "model.py")
        checkpoint.tokenizer.save_pretrained(folder)
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
    except OSError as error:
        raise ConversionError(f"could not write the tokenizer below {folder.parent}: {error}") from error


def score_texts(
    tokenizer: Path, model: Path, requests: Sequence[Request], device: str
) -> list[dict[str, Any]]:
    """Send requests of texts through both written parts, each in a fresh process, as the ensemble does.

    Raises:
        ConversionError: a process failed.
    """
    with ServedForm(tokenizer) as process:
        encoded = process.score(list(requests), device)
    with ServedForm(model) as process:
        scored = iter(process.score([reply for reply in encoded if "error" not in reply], device))
    return [reply if "error" in reply else next(scored) for reply in encoded]
