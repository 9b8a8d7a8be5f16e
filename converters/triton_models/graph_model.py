"""A reward model that was exported as a graph (ONNX or TorchScript), inside Triton's python back end. The
converter copies this file into version folders as `model.py`.

It stands alone: numpy, onnxruntime or torch, and for texts the tokenizer; nothing of the package that wrote
it. It starts without torch where the graph is ONNX. What it must know is in `manifest.json` beside it:

    OnnxGraph, TorchScriptGraph   padded token ids [rows, length] -> scores [rows, rewards]
    Scorer                        samples -> rows of token ids -> scores
    score_requests                many requests in one batch; a bad one fails alone
    TritonPythonModel             what Triton calls

By hand, `python model.py < requests.json` scores without a server; see `main` for the format.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:  # run by hand: only Triton provides it
    pb_utils: Any = None

Rows = list[list[int]]
ONNX_FILE = "model.onnx"
TORCHSCRIPT_FILE = "model.pt"

# Longest row times rows in one forward pass. On a GPU it bounds the memory of a batch that the server has put
# together. On a CPU small passes are the fastest: their activations stay in the caches, and less is padding.
TOKENS_PER_FORWARD = {"cpu": 512, "cuda": 32_768}


class RejectedError(ValueError):
    """The request is at fault, not the model: the same request fails again."""


class OnnxGraph:
    """`model.onnx` in onnxruntime. device: `cpu`, or `cuda:N` with the package onnxruntime-gpu."""

    def __init__(self, path: Path, device: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # onnxruntime pins threads of its own, one per core, unless a number is set.
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
        providers: list[Any] = ["CPUExecutionProvider"]
        if device != "cpu":
            cuda = {"device_id": device.removeprefix("cuda:").removeprefix("cuda") or "0"}
            # Or each new length would make the arena double what it holds.
            providers = [("CUDAExecutionProvider", {**cuda, "arena_extend_strategy": "kSameAsRequested"})]
        self._session = onnxruntime.InferenceSession(path, options, providers=providers)
        self.versions = f"onnxruntime {onnxruntime.__version__}"

    def __call__(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return np.asarray(self._session.run(["rewards"], inputs)[0])


class TorchScriptGraph:
    """`model.pt` in torch, which is deprecated there and may go with a later version."""

    def __init__(self, path: Path, device: str) -> None:
        import torch

        self._torch = torch
        self._device = device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the converter has said so
            self._module = torch.jit.load(path, map_location=device).eval()
        self.versions = f"torch {torch.__version__}"

    def __call__(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        with self._torch.inference_mode():
            tensors = (
                self._torch.from_numpy(values).to(self._device) for values in (input_ids, attention_mask)
            )
            return self._module(*tensors).cpu().numpy()


class Scorer:
    """Scores rows of token ids by the graph of one version folder."""

    def __init__(self, folder: Path, device: str) -> None:
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.device = device
        self.tokens_per_forward = TOKENS_PER_FORWARD[device.split(":")[0]]
        graph, file = (OnnxGraph, ONNX_FILE)
        if not (folder / file).exists():
            graph, file = (TorchScriptGraph, TORCHSCRIPT_FILE)
        self.graph = graph(folder / file, device)

    def rows_from_tokens(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> Rows:
        """Return the token ids of padded rows, int [n, length]; padding, on either side, has 0 in the mask.

        Raises:
            RejectedError: shapes differ, a mask has a hole, or a row is empty, too long or out of range.
        """
        if input_ids.shape != attention_mask.shape:
            raise RejectedError(
                f"input_ids is {list(input_ids.shape)}, attention_mask {list(attention_mask.shape)}"
            )
        pairs = enumerate(zip(input_ids, attention_mask, strict=True))
        return [self._row(row, ids, np.flatnonzero(mask)) for row, (ids, mask) in pairs]

    def _row(self, row: int, ids: np.ndarray, places: np.ndarray) -> list[int]:
        vocabulary, limit = self.manifest["vocab_size"], self.manifest["max_length"]
        if not places.size:
            raise RejectedError(f"row {row} has no tokens")
        if places[-1] - places[0] + 1 != places.size:
            raise RejectedError(f"row {row}: attention_mask has a hole; padding goes at the ends")
        if places.size > limit:
            raise RejectedError(f"row {row} has {places.size} tokens, at most {limit} are allowed")
        tokens = ids[places]
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise RejectedError(f"row {row} has token ids outside 0..{vocabulary - 1}")
        return tokens.tolist()

    def score(self, rows: Rows) -> np.ndarray:
        """Return scores float32 [len(rows), rewards]; a row's score does not depend on the others'."""
        scores = np.empty((len(rows), len(self.manifest["reward_names"])), dtype=np.float32)
        for indices in _batches_by_length([len(row) for row in rows], self.tokens_per_forward):
            scores[indices] = self._forward([rows[index] for index in indices])
        return scores

    def _forward(self, rows: Rows) -> np.ndarray:
        shape = (len(rows), max(len(row) for row in rows))
        input_ids = np.full(shape, self.manifest["pad_token_id"], dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)] = ids
            mask[row, : len(ids)] = 1
        return self.graph(input_ids, mask)


def score_requests(scorer: Scorer, requests: Sequence[Rows | Exception]) -> list[np.ndarray | Exception]:
    """Score the rows of many requests together; what is already an exception stays one.

    If the batch fails, each request is scored once more alone, so that only the bad ones fail.

    Returns:
        per request float32 [its rows, rewards], or why there are no scores.
    """
    accepted = [rows for rows in requests if not isinstance(rows, Exception)]
    outcomes = iter(_split(_scores(scorer, [ids for rows in accepted for ids in rows]), accepted))
    first_outcomes = [rows if isinstance(rows, Exception) else next(outcomes) for rows in requests]
    final = []
    for outcome, rows in zip(first_outcomes, requests, strict=True):
        failed_together = isinstance(outcome, Exception) and not isinstance(rows, Exception)
        is_scored_again = failed_together and len(accepted) > 1
        final.append(_finite(_scores(scorer, rows) if is_scored_again else outcome))
    return final


def _scores(scorer: Scorer, rows: Any) -> np.ndarray | Exception:
    try:
        return scorer.score(rows)
    except Exception as error:  # any failure of the engine becomes the error of the requests that cause it
        return error


def _split(scores: np.ndarray | Exception, requests: Sequence[Rows]) -> list[np.ndarray | Exception]:
    if isinstance(scores, Exception):
        return [scores] * len(requests)
    return list(np.split(scores, np.cumsum([len(rows) for rows in requests])[:-1])) if requests else []


def _finite(scores: np.ndarray | Exception) -> np.ndarray | Exception:
    if isinstance(scores, Exception) or np.isfinite(scores).all():
        return scores
    row = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
    return ArithmeticError(f"row {row}: the model's score is {scores[row].tolist()}")


def _batches_by_length(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Group indices so that rows of like length share a forward pass, within `tokens`."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and (len(batch) + 1) * lengths[index] > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class TritonPythonModel:
    """Triton's interface: one object per instance, its methods called in turn."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph. A failure here is the reason that the server shows for not being ready."""
        refuse_numpy_2(np.__version__)
        gpu = args["model_instance_kind"] == "GPU"
        device = f"cuda:{args['model_instance_device_id']}" if gpu else "cpu"
        self.scorer = Scorer(Path(__file__).parent, device)
        pb_utils.Logger.log_info(
            f"{args['model_name']} version {args['model_version']}: python {platform.python_version()}, "
            f"numpy {np.__version__}, {self.scorer.graph.versions}, prefix {sys.prefix}, device {device}"
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer every request, each with its scores or its own error."""
        outcomes = score_requests(self.scorer, [self._rows(request) for request in requests])
        return [_response(outcome) for outcome in outcomes]

    def _rows(self, request: Any) -> Rows | Exception:
        try:
            return self.scorer.rows_from_tokens(
                *(
                    pb_utils.get_input_tensor_by_name(request, name).as_numpy()
                    for name in ("input_ids", "attention_mask")
                )
            )
        except RejectedError as error:
            return error


def _response(outcome: np.ndarray | Exception) -> Any:
    if isinstance(outcome, np.ndarray):
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("rewards", outcome)])
    rejected = isinstance(outcome, RejectedError)
    code = pb_utils.TritonError.INVALID_ARG if rejected else pb_utils.TritonError.INTERNAL
    message = str(outcome) if rejected else f"scoring failed: {type(outcome).__name__}: {outcome}"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def refuse_numpy_2(version: str) -> None:
    """Raise RuntimeError for numpy 2, with which Triton's python stub silently turns tensors into zeros."""
    if int(version.split(".")[0]) >= 2:
        raise RuntimeError(
            f"numpy {version} in the model's Python: Triton's python stub corrupts tensors with numpy 2; "
            "install numpy<2 there"
        )


def main() -> None:
    """Score requests read from stdin as one JSON object; write the answers to stdout.

    in:  {"device": "cpu", "requests": [{"input_ids": [[...]], "attention_mask": [[...]]}, ...]}
    out: [{"scores": [[...], ...]} or {"error": "..."}, ...]
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print; only answers belong on stdout
    job = json.load(sys.stdin)
    scorer = Scorer(Path(__file__).parent, job["device"])
    with answers:
        json.dump([_answer(scorer, request) for request in job["requests"]], answers)


def _answer(scorer: Scorer, request: dict[str, Any]) -> dict[str, Any]:
    try:
        rows = scorer.rows_from_tokens(np.array(request["input_ids"]), np.array(request["attention_mask"]))
    except RejectedError as error:
        return {"error": str(error)}
    (outcome,) = score_requests(scorer, [rows])
    if isinstance(outcome, Exception):
        return {"error": f"scoring failed: {type(outcome).__name__}: {outcome}"}
    return {"scores": outcome.tolist()}


if __name__ == "__main__":
    main()
