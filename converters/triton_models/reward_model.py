"""A reward model inside Triton's python back end. The converter copies this file into every version folder,
as `model.py`, and beside it the two files that it uses.

Together they stand alone: torch, transformers and numpy, nothing of the package that wrote them. What they
must know is in `manifest.json` beside them. Top to bottom:

    network.ServedModel   padded token ids [rows, length] -> scores [rows, rewards]
    encoding.Encoder      samples -> rows of token ids
    Scorer                rows -> scores, of steps or tokens too if the manifest says so
    score_requests        many requests in one batch; a bad one fails alone
    TritonPythonModel     what Triton calls

By hand, `python model.py < requests.json` scores without a server; see `main` for the format.
"""

# ruff: noqa: E402  the libraries below are imported while the collector is off

from __future__ import annotations

import gc
import importlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The collector would walk all that is there again and again, a fifth of the time until a server is ready.
_collects = gc.isenabled()
gc.disable()

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:  # for readers and type checkers: a version folder has no such package
    from conch.converters.triton_models import encoding, network
    from conch.converters.triton_models.encoding import RejectedError, Row, Rows
else:
    if not __package__:  # `python -I model.py` does not look into the script's own folder
        sys.path.insert(0, str(Path(__file__).resolve().parent))
    _beside = f"{__package__}." if __package__ else ""  # Triton calls the package by the version's number
    encoding, network = (importlib.import_module(f"{_beside}{name}") for name in ("encoding", "network"))
    RejectedError, Row, Rows = encoding.RejectedError, encoding.Row, encoding.Rows

try:
    import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:  # run by hand: only Triton provides it
    pb_utils: Any = None

if _collects:
    gc.enable()
    gc.freeze()  # what was imported stays: later walks need not look at it

# Longest row times rows in one forward pass. On a GPU it bounds the memory of a batch that the server has put
# together. On a CPU small passes are the fastest: their activations stay in the caches, and less is padding.
# On dialogues, samples/s: 83 with 512 tokens a pass, 81 with 1,024, 60 with 4,096, 29 with 32,768.
TOKENS_PER_FORWARD = {"cpu": 512, "cuda": 32_768}


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of some rows.

    rewards: float32 [rows, rewards].
    steps: per row float32 [its steps]; empty unless steps are scored.
    """

    rewards: np.ndarray
    steps: list[np.ndarray]


class Scorer:
    """Scores samples by the model and tokenizer of one version folder.

    encoder: that makes the rows; None loads the folder's own tokenizer.
    """

    def __init__(self, folder: Path, device: str, encoder: encoding.Encoder | None = None) -> None:
        self.encoder = encoder or encoding.Encoder(folder)
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.tokenizer = self.encoder.tokenizer
        self.is_dense = self.encoder.is_dense
        self.model = network.load_model(folder, self.manifest).to(device)
        self.device = device
        # Kernels round by the shape of what they get: a row is safe only alone in its pass: budget 0.
        is_alone = self.manifest.get("batch_invariant", False)
        self.tokens_per_forward = 0 if is_alone else TOKENS_PER_FORWARD[torch.device(device).type]

    def rows_from_texts(self, texts: Sequence[bytes]) -> Rows:
        """Return rows as `Encoder.rows_from_texts` does."""
        return self.encoder.rows_from_texts(texts)

    def rows_from_tokens(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> Rows:
        """Return rows as `Encoder.rows_from_tokens` does."""
        return self.encoder.rows_from_tokens(input_ids, attention_mask)

    def score(self, rows: Rows) -> Scores:
        """Return the scores of all rows, in their order; a row's scores do not depend on the other rows."""
        rewards = np.empty((len(rows), len(self.manifest["reward_names"])), dtype=np.float32)
        steps: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(rows) if self.is_dense else []
        for indices in batches_by_length([len(row.ids) for row in rows], self.tokens_per_forward):
            batch = [rows[index] for index in indices]
            if not self.encoder.reads_places:
                rewards[indices] = self._forward(batch)
                continue
            rewards[indices], every = self._dense(batch)
            if self.is_dense:
                for index, row, scores in zip(indices, batch, every, strict=True):
                    steps[index] = scores[list(row.places)]
        return Scores(rewards, steps)

    @torch.inference_mode()
    def _forward(self, rows: Rows) -> np.ndarray:
        return self.model(*self.padded(rows), self.types(rows)).cpu().numpy()

    @torch.inference_mode()
    def _dense(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        input_ids, mask = self.padded(rows)
        ends = torch.zeros(mask.shape, dtype=torch.bool)
        for row, places in enumerate(row.places for row in rows):
            ends[row, list(places)] = True
        scores, every = self.model.dense(input_ids, mask, ends.to(self.device))
        return scores.cpu().numpy(), every.cpu().numpy()

    def padded(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return ids and mask, int64 [rows, longest]."""
        # Padded on the right, so that position i is token i for every architecture.
        input_ids = filled_up([row.ids for row in rows], self.manifest["pad_token_id"], np.int64)
        mask = filled_up([[1] * len(row.ids) for row in rows], 0, np.int64)
        return torch.from_numpy(input_ids).to(self.device), torch.from_numpy(mask).to(self.device)

    def types(self, rows: Rows) -> Tensor | None:
        """Return which sentence each token of pairs belongs to, [rows, length]; None of anything else."""
        if not any(row.types for row in rows):
            return None
        return torch.from_numpy(filled_up([row.types for row in rows], 0, np.int64)).to(self.device)


def score_requests(scorer: Scorer, requests: Sequence[Rows | Exception]) -> list[Scores | Exception]:
    """Score the rows of many requests together; what is already an exception stays one.

    If the batch fails, each request is scored once more alone, so that only the bad ones fail.

    Returns:
        per request the scores of its rows, or why there are none.
    """
    accepted = [rows for rows in requests if not isinstance(rows, Exception)]
    try:
        outcomes = iter(_score_together(scorer, accepted))
    except Exception as error:  # any failure of torch; becomes the error of the requests that cause it
        alone = (score_requests(scorer, [rows])[0] for rows in accepted)
        outcomes = iter([error]) if len(accepted) == 1 else alone
    return [rows if isinstance(rows, Exception) else _finite(next(outcomes)) for rows in requests]


def _score_together(scorer: Scorer, requests: Sequence[Rows]) -> list[Scores | Exception]:
    scores, start, parts = scorer.score([row for rows in requests for row in rows]), 0, []
    for rows in requests:
        own = slice(start, start + len(rows))
        parts.append(Scores(scores.rewards[own], scores.steps[own]))
        start += len(rows)
    return parts


def _finite(scores: Scores | Exception) -> Scores | Exception:
    if isinstance(scores, Exception):
        return scores
    for row, values in [*enumerate(scores.rewards), *enumerate(scores.steps)]:
        if not np.isfinite(values).all():
            return ArithmeticError(f"row {row}: the model's score is {values.tolist()}")
    return scores


def batches_by_length(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Group indices so that rows of like length share a forward pass, within `budget` tokens."""
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
        is_gpu = args["model_instance_kind"] == "GPU"
        device = f"cuda:{args['model_instance_device_id']}" if is_gpu else "cpu"
        self.scorer = Scorer(Path(__file__).parent, device)
        self.is_text = self.scorer.manifest["form"] == "text"
        versions = f"python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}"
        pb_utils.Logger.log_info(
            f"{args['model_name']} version {args['model_version']}: {versions}, prefix {sys.prefix}, "
            f"device {self.scorer.device}, {torch.get_num_threads()} threads"
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer every request, each with its scores or its own error."""
        rows = [self._rows(request) for request in requests]
        outcomes = score_requests(self.scorer, rows)
        return [self._response(each, outcome) for each, outcome in zip(rows, outcomes, strict=True)]

    def _rows(self, request: Any) -> Rows | Exception:
        try:
            if self.is_text:
                return self.scorer.rows_from_texts(_input(request, "text").reshape(-1).tolist())
            ids, mask = _input(request, "input_ids"), _input(request, "attention_mask")
            return self.scorer.rows_from_tokens(ids, mask)
        except RejectedError as error:
            return error

    def _response(self, rows: Rows | Exception, outcome: Scores | Exception) -> Any:
        if isinstance(outcome, Scores) and not isinstance(rows, Exception):
            tensors = {"rewards": outcome.rewards}
            if self.scorer.is_dense:
                tensors["step_rewards"] = filled_up(outcome.steps, np.nan, np.float32)
                tensors["step_ends"] = filled_up([row.ends for row in rows], -1, np.int32)
            outputs = [pb_utils.Tensor(name, values) for name, values in tensors.items()]
            return pb_utils.InferenceResponse(output_tensors=outputs)
        rejected = isinstance(outcome, RejectedError)
        code = pb_utils.TritonError.INVALID_ARG if rejected else pb_utils.TritonError.INTERNAL
        message = str(outcome) if rejected else f"scoring failed: {type(outcome).__name__}: {outcome}"
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def filled_up(rows: Sequence[Any], filler: int | float, dtype: Any) -> np.ndarray:
    """Fill rows of any lengths up to one array [rows, longest]: Triton knows rectangles only."""
    values = np.full((len(rows), max(map(len, rows))), filler, dtype=dtype)
    for index, row in enumerate(rows):
        values[index, : len(row)] = row
    return values


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
         {"texts": [...]} or {"input_ids": [[...]], "attention_mask": [[...]]}; with "only_ids": true beside
         it nothing is scored
    out: [{"scores": [[...], ...]} or {"error": "..."}, ...]; a model that scores steps or tokens adds
         "step_scores": [[...], ...] and "step_ends": [[...], ...]; where nothing is scored
         {"ids": [[...], ...]}, what the model reads
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print; only answers belong on stdout
    job = json.load(sys.stdin)
    scorer = Scorer(Path(__file__).parent, job["device"])
    with answers:
        json.dump([_answer(scorer, request) for request in job["requests"]], answers)


def _answer(scorer: Scorer, request: dict[str, Any]) -> dict[str, Any]:
    try:
        if "texts" in request:
            rows = scorer.rows_from_texts([text.encode("utf-8") for text in request["texts"]])
        else:
            ids, mask = np.array(request["input_ids"]), np.array(request["attention_mask"])
            rows = scorer.rows_from_tokens(ids, mask)
    except RejectedError as error:
        return {"error": str(error)}
    if request.get("only_ids"):
        return {"ids": [row.ids for row in rows]}
    (outcome,) = score_requests(scorer, [rows])
    if isinstance(outcome, Exception):
        return {"error": f"scoring failed: {type(outcome).__name__}: {outcome}"}
    answer: dict[str, Any] = {"scores": outcome.rewards.tolist()}
    if scorer.is_dense:
        answer["step_scores"] = [scores.tolist() for scores in outcome.steps]
        answer["step_ends"] = [row.ends for row in rows]
    return answer


if __name__ == "__main__":
    main()
