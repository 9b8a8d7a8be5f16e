"""An ensemble that holds its members, inside Triton's python back end. The converter copies this file into
the ensemble's version folders as `model.py`, and beside it the files that it uses.

Together they stand alone: torch, transformers and numpy, nothing of the package that wrote them. What they
must know is in `manifest.json` beside them and in `members/<number>/`, a version folder of each member.

    StackedScorer       samples -> rows of token ids, once for all -> every member's scores
    TritonPythonModel   what Triton calls

Short batches go through all members in one pass, others through one member after another: see
`stacking.StackedNetwork`.

By hand, `python model.py < requests.json` scores without a server; see `main` for the format.
"""

# ruff: noqa: E402  the libraries below are imported while the collector is off

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The collector would walk all that is there again and again, a fifth of the time until a server is ready.
_collects = gc.isenabled()
gc.disable()

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:  # for readers and type checkers: a version folder has no such package
    from conch.converters.triton_models import encoding, ensemble_model, network, reward_model, stacking
    from conch.converters.triton_models.encoding import RejectedError, Rows
    from conch.converters.triton_models.ensemble_model import Column, MemberFailure
else:
    if not __package__:  # `python -I model.py` does not look into the script's own folder
        sys.path.insert(0, str(Path(__file__).resolve().parent))
    _beside = f"{__package__}." if __package__ else ""  # Triton calls the package by the version's number
    encoding, ensemble_model, network, reward_model, stacking = (
        importlib.import_module(f"{_beside}{name}")
        for name in ("encoding", "ensemble_model", "network", "reward_model", "stacking")
    )
    RejectedError, Rows = encoding.RejectedError, encoding.Rows
    Column, MemberFailure = ensemble_model.Column, ensemble_model.MemberFailure

try:
    import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:  # run by hand: only Triton provides it
    pb_utils: Any = None

if _collects:
    gc.enable()
    gc.freeze()  # what was imported stays: later walks need not look at it

# Longest row times rows of a batch that all members score in one pass. It saves the interpreter's work of
# all members but one, which for longer batches is little, while their activations leave the caches.
TOKENS_IN_ONE_PASS = {"cpu": 128, "cuda": 4_096}


class StackedScorer:
    """Scores samples by all members of one version folder.

    why_apart: why the members never run in one pass; "" if they do.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.names = [member["name"] for member in self.manifest["members"]]
        self._columns = [member["column"] for member in self.manifest["members"]]
        folders = [folder / "members" / str(number) for number in range(len(self.names))]
        self.encoder = encoding.Encoder(folders[0])
        self._scorers = [reward_model.Scorer(each, device, self.encoder) for each in folders]
        self._tokens_in_one_pass = TOKENS_IN_ONE_PASS[torch.device(device).type]
        self._stack: Any = None
        self.why_apart: str = self.manifest["why_apart"]
        if self.manifest["in_one_pass"]:
            try:
                self._stack = _Stack([scorer.model for scorer in self._scorers], self.encoder)
            except stacking.UnstackableError as error:  # other libraries than those of the conversion
                self.why_apart = str(error)

    def rows_from_texts(self, texts: Sequence[bytes]) -> Rows:
        """Return rows as `Encoder.rows_from_texts` does."""
        return self.encoder.rows_from_texts(texts)

    def rows_from_tokens(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> Rows:
        """Return rows as `Encoder.rows_from_tokens` does."""
        return self.encoder.rows_from_tokens(input_ids, attention_mask)

    def score(self, rows: Rows) -> list[Column]:
        """Return per row every member's score, or why there is none."""
        scores: list[Column] = [[] for _ in rows]
        for indices in self._batches(rows):
            for index, row_scores in zip(
                indices, self._score([rows[index] for index in indices]), strict=True
            ):
                scores[index] = row_scores
        return scores

    def score_apart(self, rows: Rows) -> list[Column]:
        """Return what `score` does, by one member after another."""
        columns = [self._member_column(number, rows) for number in range(len(self.names))]
        return [list(row) for row in zip(*columns, strict=True)]

    def score_in_one_pass(self, rows: Rows) -> np.ndarray:
        """Return scores float32 [rows, members], of all members in one pass, whatever it costs.

        Raises:
            Exception: whatever the pass raises; UnstackableError where there is none.
        """
        if self._stack is None:
            raise stacking.UnstackableError(self.why_apart)
        return self._in_one_pass(rows)

    def _batches(self, rows: Rows) -> Iterator[list[int]]:
        lengths = [len(row.ids) for row in rows]
        return reward_model.batches_by_length(lengths, self._scorers[0].tokens_per_forward)

    def _score(self, batch: Rows) -> list[Column]:
        longest = max(len(row.ids) for row in batch)
        is_short = len(batch) * longest <= self._tokens_in_one_pass
        columns = self._columns_together(batch) if self._stack is not None and is_short else None
        columns = columns or [self._member_column(number, batch) for number in range(len(self.names))]
        return [
            [self._checked(score, number) for number, score in enumerate(row)]
            for row in zip(*columns, strict=True)
        ]

    def _columns_together(self, batch: Rows) -> list[Column] | None:
        """Return the members' scores from one pass; None where it fails, so that each is asked by itself and
        only the member at fault fails."""
        try:
            return self._in_one_pass(batch).T.tolist()
        except Exception as error:  # any failure of torch
            if pb_utils is not None:
                pb_utils.Logger.log_warn(
                    f"all members in one pass: {type(error).__name__}: {error}; scoring one after another"
                )
            return None

    @torch.inference_mode()
    def _in_one_pass(self, batch: Rows) -> np.ndarray:
        first = self._scorers[0]
        scores = self._stack.scores(*first.padded(batch), first.types(batch))
        return np.stack(
            [rewards[:, column] for rewards, column in zip(scores, self._columns, strict=True)], axis=1
        )

    def _member_column(self, number: int, batch: Rows) -> Column:
        try:
            return self._scorers[number].score(batch).rewards[:, self._columns[number]].tolist()
        except Exception as error:  # any failure of torch is the member's
            message = f"scoring failed: {type(error).__name__}: {error}"
            return [MemberFailure(self.names[number], message)] * len(batch)

    def _checked(self, score: Any, number: int) -> Any:
        if isinstance(score, MemberFailure) or np.isfinite(score):
            return score
        return MemberFailure(self.names[number], f"scoring failed: the score is {score}")


class _Stack:
    """All members' networks as one, and each member's own rule that makes scores of its outputs.

    Raises:
        UnstackableError: the networks cannot run as one.
    """

    def __init__(self, models: Sequence[Any], encoder: encoding.Encoder) -> None:
        if encoder.reads_places or any(model.is_custom for model in models):
            what = "a class of the checkpoint's own" if models[0].is_custom else "steps or tokens with scores"
            raise stacking.UnstackableError(f"{what} cannot run in one pass")
        self._models = models
        self._stacked = stacking.StackedNetwork([model.network for model in models])
        # It passes masks and sentence types on as the members do; their own make rewards of its outputs.
        self._all = network.ServedModel(self._stacked.network, models[0].head(), models[0].manifest)

    def scores(self, input_ids: Tensor, mask: Tensor, types: Tensor | None) -> list[np.ndarray]:
        """Return per member float32 [rows, its rewards]."""
        repeated = self._stacked.repeated
        outputs = self._all.outputs(
            repeated(input_ids), repeated(mask), None if types is None else repeated(types)
        )
        parts = outputs.chunk(len(self._models))
        return [
            model.rewards(part, input_ids, mask).cpu().numpy()
            for model, part in zip(self._models, parts, strict=True)
        ]


class TritonPythonModel:
    """Triton's interface: one object per instance, its methods called in turn."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the members. A failure here is the reason that the server shows for not being ready."""
        ensemble_model.refuse_numpy_2(np.__version__)
        is_gpu = args["model_instance_kind"] == "GPU"
        device = f"cuda:{args['model_instance_device_id']}" if is_gpu else "cpu"
        self.scorer = StackedScorer(Path(__file__).parent, device)
        self.manifest = self.scorer.manifest
        model = f"{args['model_name']} version {args['model_version']}"
        pb_utils.Logger.log_info(
            f"{model}: {self.manifest['objective']} of {', '.join(self.scorer.names)}, held here; on a "
            f"member's failure: {self.manifest['on_member_failure']}; numpy {np.__version__}, "
            f"torch {torch.__version__}, device {device}, {torch.get_num_threads()} threads"
        )
        if self.scorer.why_apart:
            pb_utils.Logger.log_warn(
                f"{model}: its members run one after another, not in one pass: {self.scorer.why_apart}"
            )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer every request, each with its scores or its own error; all rows are scored together."""
        rows = [self._rows(request) for request in requests]
        scores = self.scorer.score([row for each in rows if not isinstance(each, Exception) for row in each])
        ensemble_model.log_failures(scores, self.manifest)
        left = iter(scores)
        return [
            _rejection(each)
            if isinstance(each, Exception)
            else ensemble_model.response([next(left) for _ in each], self.manifest)
            for each in rows
        ]

    def _rows(self, request: Any) -> Rows | Exception:
        def tensor(name: str) -> np.ndarray:
            return pb_utils.get_input_tensor_by_name(request, name).as_numpy()

        try:
            if self.manifest["form"] == "text":
                return self.scorer.rows_from_texts(tensor("text").reshape(-1).tolist())
            return self.scorer.rows_from_tokens(tensor("input_ids"), tensor("attention_mask"))
        except RejectedError as error:
            return error


def _rejection(error: Exception) -> Any:
    code = pb_utils.TritonError.INVALID_ARG
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))


def main() -> None:
    """Score requests read from stdin as one JSON object; write the answers to stdout.

    in:  {"device": "cpu", "requests": [request, ...]} where a request is {"texts": [...]} or
         {"input_ids": [[...]], "attention_mask": [[...]]}, or, to combine alone, {"member_rewards": [[...],
         ...]} with null where a member gave no score; with "in_one_pass": true or false beside samples it is
         said how the members are to run
    out: [{"scores": [[...], ...], "member_scores": [[...], ...]} or {"error": "..."}, ...]
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print; only answers belong on stdout
    job = json.load(sys.stdin)
    scorer = StackedScorer(Path(__file__).parent, job["device"])
    with answers:
        json.dump([_answer(scorer, request) for request in job["requests"]], answers)


def _answer(scorer: StackedScorer, request: dict[str, Any]) -> dict[str, Any]:
    try:
        members = _member_scores(scorer, request)
    except Exception as error:  # whatever it is, it is this request's answer
        return {"error": f"{type(error).__name__}: {error}"}
    rewards, _, _ = ensemble_model.combined(members, scorer.manifest)
    return {"scores": rewards.astype(np.float32)[:, None].tolist(), "member_scores": members.tolist()}


def _member_scores(scorer: StackedScorer, request: dict[str, Any]) -> np.ndarray:
    if "member_rewards" in request:
        return np.array(request["member_rewards"], dtype=np.float64)
    if "texts" in request:
        rows = scorer.rows_from_texts([text.encode("utf-8") for text in request["texts"]])
    else:
        rows = scorer.rows_from_tokens(np.array(request["input_ids"]), np.array(request["attention_mask"]))
    if request.get("in_one_pass"):
        return scorer.score_in_one_pass(rows).astype(np.float64)
    scores = scorer.score(rows) if request.get("in_one_pass") is None else scorer.score_apart(rows)
    failures = [score for row in scores for score in row if isinstance(score, MemberFailure)]
    if failures:
        raise RuntimeError(f"member {failures[0].member}: {failures[0].message}")
    return np.array(scores, dtype=np.float64)


if __name__ == "__main__":
    main()
