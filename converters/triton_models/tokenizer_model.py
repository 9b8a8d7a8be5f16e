"""The tokenizer of a text-form ONNX model, inside Triton's python back end. The converter copies this file as
`model.py` of `<name>-tokenizer`; a Triton ensemble `<name>` passes its ids on to `<name>-onnx`.

It stands alone: numpy and transformers, nothing of the package that wrote it. What it must know is in
`manifest.json` beside it.

By hand, `python model.py < requests.json` tokenises without a server; see `main` for the format.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

try:
    import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:  # run by hand: only Triton provides it
    pb_utils: Any = None

# The C++ back ends batch only rows of equal length, so lengths are rounded up: fewer kinds meet more often.
LENGTH_STEP = 8


class RejectedError(ValueError):
    """The request is at fault: the same request fails again."""


class TextEncoder:
    """Makes token ids of texts by the tokenizer, template and limit of one version folder."""

    def __init__(self, folder: Path) -> None:
        self._manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if self._manifest["truncation_side"]:
            self._tokenizer.truncation_side = self._manifest["truncation_side"]
        self._added = added_tokens(self._tokenizer)

    def encode(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and mask, int64 [n, length], padded on the right.

        Raises:
            RejectedError: a sample is not UTF-8, or has no tokens.
        """
        rows = [self._row(text, row) for row, text in enumerate(texts)]
        longest = max(len(ids) for ids in rows)
        length = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, self._manifest["max_length"])
        input_ids = np.full((len(rows), length), self._manifest["pad_token_id"], dtype=np.int64)
        mask = np.zeros_like(input_ids)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)] = ids
            mask[row, : len(ids)] = 1
        return input_ids, mask

    def _row(self, text: bytes, row: int) -> list[int]:
        """Return the ids of a sample in the template.

        No bos stands twice at the beginning and no eos twice at the end, whoever wrote the first. Text that
        is too long loses tokens on the tokenizer's truncation side; the special tokens that the tokenizer
        adds, and an {eos} that closes the template, stay, because the score may be read there.
        """
        try:
            sample = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RejectedError(
                f"row {row}: text is not UTF-8 ({error.reason} at byte {error.start})"
            ) from error
        template, limit = self._manifest["template"], self._manifest["max_length"]
        eos = self._tokenizer.eos_token or ""
        ids = self._once(self._tokenizer(template.format(text=sample, eos=eos), verbose=False).input_ids)
        if not ids:
            raise RejectedError(f"row {row} has no tokens")
        excess = len(ids) - limit
        if excess <= 0:
            return ids
        head, tail = self._added
        if template.endswith("{eos}") and ids[: len(ids) - tail][-1:] == [self._tokenizer.eos_token_id]:
            tail += 1
        start = max(0, head if self._tokenizer.truncation_side == "left" else len(ids) - tail - excess)
        return self._once((ids[:start] + ids[start + excess :])[-limit:])

    def _once(self, ids: list[int]) -> list[int]:
        """Drop what repeats a bos at the beginning or an eos at the end."""
        first, last = 0, len(ids)
        while last - first > 1 and ids[first] == ids[first + 1] == self._tokenizer.bos_token_id:
            first += 1
        while last - first > 1 and ids[last - 1] == ids[last - 2] == self._tokenizer.eos_token_id:
            last -= 1
        return ids[first:last]


def added_tokens(tokenizer: Any) -> tuple[int, int]:
    """Return how many tokens the tokenizer adds before and behind a text."""
    around = tokenizer("").input_ids
    for word in ("x", "a", "1", "c", "."):
        plain = tokenizer(word, add_special_tokens=False).input_ids
        if plain and not set(plain) & set(around):
            before = tokenizer(word).input_ids.index(plain[0])
            return before, len(around) - before
    return len(around), 0


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
    out: [{"input_ids": [[...]], "attention_mask": [[...]]} or {"error": "..."}, ...]
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
    return {"input_ids": input_ids.tolist(), "attention_mask": mask.tolist()}


if __name__ == "__main__":
    main()
