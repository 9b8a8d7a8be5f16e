"""A reward model inside Triton's python back end. The converter copies this file into every version folder.

It stands alone: torch, transformers and numpy, nothing of the package that wrote it. What it must know is in
`manifest.json` beside it. Three layers, top to bottom:

    Scorer              samples -> rows of token ids -> scores [rows, rewards]
    score_requests      many requests in one batch; a bad one fails alone
    TritonPythonModel   what Triton calls

By hand, `python model.py < requests.json` scores without a server; see `main` for the format.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

try:
    import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:  # run by hand: only Triton provides it
    pb_utils: Any = None

Rows = list[list[int]]

# Longest row times rows in one forward pass. On a GPU it bounds the memory of a batch that the server has put
# together. On a CPU small passes are the fastest: their activations stay in the caches, and less is padding.
# On dialogues, samples/s: 83 with 512 tokens a pass, 81 with 1,024, 60 with 4,096, 29 with 32,768.
TOKENS_PER_FORWARD = {"cpu": 1024, "cuda": 32_768}


class RejectedError(ValueError):
    """The request is at fault, not the model: the same request fails again."""


class Scorer:
    """The classifier and tokenizer of one version folder."""

    def __init__(self, folder: Path, device: str) -> None:
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        code = self.manifest["trust_remote_code"]
        self.tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=code
        )
        self.model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=code,
            dtype=getattr(torch, self.manifest["dtype"]),
        )
        self.model.to(device).eval()
        self.device = device
        self.tokens_per_forward = TOKENS_PER_FORWARD[torch.device(device).type]

    def rows_from_texts(self, texts: Sequence[bytes]) -> Rows:
        """Token ids of UTF-8 samples.

        Raises:
            RejectedError: a sample is not UTF-8, or has no tokens.
        """
        return self._checked([self._encode(text, row) for row, text in enumerate(texts)])

    def rows_from_tokens(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> Rows:
        """Token ids of padded rows, int [n, length]; the padding, on either side, is where the mask is 0.

        Raises:
            RejectedError: shapes differ, a mask has a hole, or a row is empty, too long or out of range.
        """
        if input_ids.shape != attention_mask.shape:
            raise RejectedError(
                f"input_ids is {list(input_ids.shape)}, attention_mask {list(attention_mask.shape)}"
            )
        rows = []
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            kept = np.flatnonzero(mask)
            if kept.size and kept[-1] - kept[0] + 1 != kept.size:
                raise RejectedError(f"row {row}: attention_mask has a hole; padding goes at the ends")
            rows.append(ids[kept].tolist())
        return self._checked(rows)

    def score(self, rows: Rows) -> np.ndarray:
        """Scores float32 [len(rows), rewards]; a row's score does not depend on the others'."""
        rewards = len(self.manifest["reward_names"])
        scores = np.empty((len(rows), rewards), dtype=np.float32)
        for indices in _batches_by_length([len(row) for row in rows], self.tokens_per_forward):
            scores[indices] = self._forward([rows[index] for index in indices])
        return scores

    def _encode(self, text: bytes, row: int) -> list[int]:
        """Ids of a sample in its template.

        A sample that is too long loses tokens on the tokenizer's truncation side; the special tokens that the
        tokenizer adds, and an {eos} that closes the template, stay, because the score may be read there.
        """
        try:
            sample = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RejectedError(
                f"row {row}: text is not UTF-8 ({error.reason} at byte {error.start})"
            ) from error
        template, limit = self.manifest["template"], self.manifest["max_length"]
        eos = self.tokenizer.eos_token or ""
        ids = self.tokenizer(template.format(text=sample, eos=eos)).input_ids
        if len(ids) <= limit:
            return ids
        closing = [self.tokenizer.eos_token_id] if template.endswith("{eos}") else []
        opened = template.removesuffix("{eos}").format(text=sample, eos=eos)
        cut = self.tokenizer(opened, truncation=True, max_length=limit - len(closing)).input_ids
        return [*cut, *closing]

    def _checked(self, rows: Rows) -> Rows:
        vocabulary, limit = self.manifest["vocab_size"], self.manifest["max_length"]
        for row, ids in enumerate(rows):
            if not ids:
                raise RejectedError(f"row {row} has no tokens")
            if len(ids) > limit:
                raise RejectedError(f"row {row} has {len(ids)} tokens, at most {limit} are allowed")
            if min(ids) < 0 or max(ids) >= vocabulary:
                raise RejectedError(f"row {row} has token ids outside 0..{vocabulary - 1}")
        return rows

    @torch.inference_mode()
    def _forward(self, rows: Rows) -> np.ndarray:
        # Padded on the right, so that position i is token i for every architecture.
        shape = (len(rows), max(len(row) for row in rows))
        input_ids = torch.full(shape, self.manifest["pad_token_id"], dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.long)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        output = self.model(input_ids=input_ids.to(self.device), attention_mask=mask.to(self.device))
        scores = output.logits.float().cpu()
        if self.manifest["normalise"]:
            mean, std = torch.tensor(self.manifest["mean"]), torch.tensor(self.manifest["std"])
            scores = (scores - mean) / std
        return scores.numpy()


def score_requests(scorer: Scorer, requests: Sequence[Rows | Exception]) -> list[np.ndarray | Exception]:
    """Score the rows of many requests together; what is already an exception stays one.

    If the batch fails, each request is scored once more alone, so that only the bad ones fail.

    Returns:
        per request float32 [its rows, rewards], or why there are no scores.
    """
    accepted = [rows for rows in requests if not isinstance(rows, Exception)]
    try:
        outcomes = iter(_score_together(scorer, accepted))
    except Exception as error:  # any failure of torch; told below, to the requests that cause it
        outcomes = iter([error] if len(accepted) == 1 else [_score_alone(scorer, rows) for rows in accepted])
    return [rows if isinstance(rows, Exception) else _finite(next(outcomes)) for rows in requests]


def _score_together(scorer: Scorer, requests: Sequence[Rows]) -> list[np.ndarray | Exception]:
    scores = scorer.score([ids for rows in requests for ids in rows])
    ends = np.cumsum([len(rows) for rows in requests])[:-1]
    return list(np.split(scores, ends)) if requests else []


def _score_alone(scorer: Scorer, rows: Rows) -> np.ndarray | Exception:
    try:
        return scorer.score(rows)
    except Exception as error:  # becomes this request's error
        return error


def _finite(scores: np.ndarray | Exception) -> np.ndarray | Exception:
    if isinstance(scores, Exception) or np.isfinite(scores).all():
        return scores
    row = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
    return ArithmeticError(f"row {row}: the model's score is {scores[row].tolist()}")


def _batches_by_length(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices grouped so that rows of like length share a forward pass, within `budget` tokens."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and (len(batch) + 1) * lengths[index] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class TritonPythonModel:
    """Triton's interface: one object per instance, its methods called in turn."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model. A failure here is the reason that the server shows for not being ready."""
        refuse_numpy_2(np.__version__)
        gpu = args["model_instance_kind"] == "GPU"
        self.scorer = Scorer(
            Path(__file__).parent, f"cuda:{args['model_instance_device_id']}" if gpu else "cpu"
        )
        self.is_text = self.scorer.manifest["form"] == "text"
        versions = f"python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}"
        pb_utils.Logger.log_info(
            f"{args['model_name']} version {args['model_version']}: {versions}, prefix {sys.prefix}, "
            f"device {self.scorer.device}, {torch.get_num_threads()} threads"
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer every request, each with its scores or its own error."""
        outcomes = score_requests(self.scorer, [self._rows(request) for request in requests])
        return [self._response(outcome) for outcome in outcomes]

    def _rows(self, request: Any) -> Rows | Exception:
        try:
            if self.is_text:
                return self.scorer.rows_from_texts(_input(request, "text").reshape(-1).tolist())
            return self.scorer.rows_from_tokens(
                _input(request, "input_ids"), _input(request, "attention_mask")
            )
        except RejectedError as error:
            return error

    def _response(self, outcome: np.ndarray | Exception) -> Any:
        if isinstance(outcome, np.ndarray):
            return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("rewards", outcome)])
        rejected = isinstance(outcome, RejectedError)
        code = pb_utils.TritonError.INVALID_ARG if rejected else pb_utils.TritonError.INTERNAL
        message = str(outcome) if rejected else f"scoring failed: {type(outcome).__name__}: {outcome}"
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def _input(request: Any, name: str) -> np.ndarray:
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()


def refuse_numpy_2(version: str) -> None:
    """Raise RuntimeError for numpy 2, with which Triton's python stub silently turns tensors into zeros."""
    if int(version.split(".")[0]) >= 2:
        raise RuntimeError(
            f"numpy {version} in the model's Python: Triton's python stub corrupts tensors with numpy 2; "
            "install numpy<2 there"
        )


def main() -> None:
    """Score requests read from stdin as one JSON object; write the answers to stdout.

    in:  {"device": "cpu", "requests": [request, ...]} where a request is
         {"texts": [...]} or {"input_ids": [[...]], "attention_mask": [[...]]}
    out: [{"scores": [[...], ...]} or {"error": "..."}, ...]
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print; only answers belong on stdout
    asked = json.load(sys.stdin)
    scorer = Scorer(Path(__file__).parent, asked["device"])
    with answers:
        json.dump([_answer(scorer, request) for request in asked["requests"]], answers)


def _answer(scorer: Scorer, request: dict[str, Any]) -> dict[str, Any]:
    try:
        if "texts" in request:
            rows = scorer.rows_from_texts([text.encode("utf-8") for text in request["texts"]])
        else:
            rows = scorer.rows_from_tokens(
                np.array(request["input_ids"]), np.array(request["attention_mask"])
            )
    except RejectedError as error:
        return {"error": str(error)}
    (outcome,) = score_requests(scorer, [rows])
    if isinstance(outcome, Exception):
        return {"error": f"scoring failed: {type(outcome).__name__}: {outcome}"}
    return {"scores": outcome.tolist()}


if __name__ == "__main__":
    main()
