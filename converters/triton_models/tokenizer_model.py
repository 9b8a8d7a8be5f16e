"""The tokenizer of a text-form ONNX model, inside Triton's python back end. The converter copies this file as
`model.py` of `<name>-tokenizer`, and beside it `encoding.py`; a Triton ensemble `<name>` passes its ids on to
`<name>-onnx`.

Both stand alone: numpy and transformers, nothing of the package that wrote them. What they must know is in
`manifest.json` beside them.

By hand, `python model.py < requests.json` tokenises without a server; see `main` for the format.
"""

# ruff: noqa: E402  the libraries below are imported while the collector is off

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The collector would walk all that is there again and again, a fifth of the time until a server is ready.
_collects = gc.isenabled()
gc.disable()

import numpy as np

if TYPE_CHECKING:  # for readers and type checkers: a version folder has no such package
    from conch.converters.triton_models import encoding
    from conch.converters.triton_models.encoding import RejectedError
else:
    if not __package__:  # `python -I model.py` does not look into the script's own folder
        sys.path.insert(0, str(Path(__file__).resolve().parent))
    encoding = importlib.import_module(f"{__package__}.encoding" if __package__ else "encoding")
    RejectedError = encoding.RejectedError

try:
    import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:  # run by hand: only Triton provides it
    pb_utils: Any = None

if _collects:
    gc.enable()
    gc.freeze()  # what was imported stays: later walks need not look at it

# The C++ back ends batch only rows of equal length, so lengths are rounded up: fewer kinds meet more often.
LENGTH_STEP = 8


class TextEncoder:
    """Makes padded token ids of texts by the tokenizer, template and limit of one version folder."""

    def __init__(self, folder: Path) -> None:
        self._encoder = encoding.Encoder(folder)

    def encode(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and mask, int64 [n, length], padded on the right.

        Raises:
            RejectedError: a sample is not UTF-8, or has no tokens.
        """
        manifest = self._encoder.manifest
        rows = [row.ids for row in self._encoder.rows_from_texts(texts)]
        longest = max(len(ids) for ids in rows)
        length = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, manifest["max_length"])
        input_ids = np.full((len(rows), length), manifest["pad_token_id"], dtype=np.int64)
        mask = np.zeros_like(input_ids)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)] = ids
            mask[row, : len(ids)] = 1
        return input_ids, mask


class TritonPythonModel:
    """Triton's interface: one object per instance, its methods called in turn."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer. A failure here is the reason that the server shows for not being ready."""
        if int(np.__version__.split(".")[0]) >= 2:
            raise RuntimeError(
                f"numpy {np.__version__} in the model's Python: Triton's python stub corrupts tensors with "
                "numpy 2; install numpy<2 there"
            )
        self.encoder = TextEncoder(Path(__file__).parent)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer every request, each with its ids or its own error."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        texts = pb_utils.get_input_tensor_by_name(request, "text").as_numpy().reshape(-1).tolist()
        try:
            input_ids, mask = self.encoder.encode(texts)
        except RejectedError as error:
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            )
        tensors = [pb_utils.Tensor("input_ids", input_ids), pb_utils.Tensor("attention_mask", mask)]
        return pb_utils.InferenceResponse(output_tensors=tensors)


def main() -> None:
    """Tokenise requests read from stdin as one JSON object; write the answers to stdout.

    in:  {"requests": [{"texts": [...]}, ...]}
    out: [{"input_ids": [[...]], "attention_mask": [[...]]} or {"error": "..."}, ...]; a request with
         "only_ids": true is answered by {"ids": [[...], ...]}, without padding
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print; only answers belong on stdout
    job = json.load(sys.stdin)
    encoder = TextEncoder(Path(__file__).parent)
    with answers:
        json.dump([_by_hand(encoder, request) for request in job["requests"]], answers)


def _by_hand(encoder: TextEncoder, request: dict[str, Any]) -> dict[str, Any]:
    try:
        input_ids, mask = encoder.encode([text.encode("utf-8") for text in request["texts"]])
    except RejectedError as error:
        return {"error": str(error)}
    if request.get("only_ids"):
        rows = zip(input_ids, mask, strict=True)
        return {"ids": [ids[where.astype(bool)].tolist() for ids, where in rows]}
    return {"input_ids": input_ids.tolist(), "attention_mask": mask.tolist()}


if __name__ == "__main__":
    main()
