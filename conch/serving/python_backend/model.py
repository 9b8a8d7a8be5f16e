"""A reward model inside Triton's python back end. The converter copies this file into every version folder.

It stands alone: torch, transformers and numpy, nothing of the package that wrote it. What it must know is in
`manifest.json` beside it. Four layers, top to bottom:

    ServedModel         padded token ids [rows, length] -> scores [rows, rewards]
    Scorer              samples -> rows of token ids -> scores
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
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

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


class ServedModel(nn.Module):
    """A network, and the rule by which its outputs become scores.

    network: a sequence classifier, whose own class ends in scores; or a trunk, whose last hidden states are
        pooled as the manifest says and go through `head`.
    head: {"weight" [outputs, width], "bias" [outputs]} in float32; None for a classifier.
    """

    def __init__(self, network: Any, head: dict[str, Tensor] | None, manifest: dict[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.manifest = manifest
        self.has_head = head is not None
        self.weight: Any = None
        self.bias: Any = None
        if head is not None:
            self.weight = nn.Parameter(head["weight"], requires_grad=False)
            self.bias = nn.Parameter(head["bias"], requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores float32 [rows, rewards] of padded rows, int64 [rows, length]; 0 in the mask is padding."""
        output = self.network(input_ids=input_ids, attention_mask=attention_mask)
        if not self.has_head:
            scores = output.logits.float()
        elif self.manifest["pooling"] == "steps":
            scores = self._step_scores(output.last_hidden_state, input_ids, attention_mask)
        else:
            scores = self._linear(self._pooled(output.last_hidden_state, input_ids, attention_mask))
        if self.manifest.get("columns") is not None:
            scores = scores[:, self.manifest["columns"]]
        if self.manifest["normalise"]:
            mean, std = (torch.tensor(self.manifest[name], device=scores.device) for name in ("mean", "std"))
            scores = (scores - mean) / std
        return scores

    def _linear(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states.float(), self.weight, self.bias)

    def _pooled(self, states: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """States [rows, length, width] -> [rows, width]."""
        rule = self.manifest["pooling"]
        if rule == "mean":
            weights = mask.unsqueeze(-1).float()
            return (states.float() * weights).sum(dim=1) / weights.sum(dim=1)
        where = self._position(rule, input_ids, mask)
        return states[torch.arange(len(states), device=states.device), where]

    def _position(self, rule: str, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Where each row is read, [rows]."""
        if rule == "cls":
            return mask.int().argmax(dim=1)
        if rule == "hf":  # as transformers' decoders do it: by the ids, whatever the mask says
            return _last_true(input_ids != self.manifest["pad_token_id"])
        last = _last_true(mask.bool())
        if rule == "last_token":
            return last
        is_eos = (input_ids == self.manifest["eos_token_id"]) & mask.bool()
        return torch.where(is_eos.any(dim=1), is_eos.int().argmax(dim=1), last)

    def _step_scores(self, states: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """One number a row and output from the scores at the ends of its steps.

        A step ends at each separator, and where the text ends: at the last token that is no eos.
        """
        logits = self._linear(states)
        scores = logits if logits.shape[-1] == 1 else logits.softmax(dim=-1)
        body = mask.bool()
        if self.manifest["eos_token_id"] is not None:
            body = body & (input_ids != self.manifest["eos_token_id"])
        last = _last_true(torch.where(body.any(dim=1, keepdim=True), body, mask.bool()))
        places = torch.arange(mask.shape[1], device=mask.device)
        ends = (input_ids == self.manifest["separator_id"]) & mask.bool() | (places == last.unsqueeze(1))
        return _aggregate(self.manifest["aggregate"], scores, ends.unsqueeze(-1), last)


def _last_true(where: Tensor) -> Tensor:
    """Index of the last True of each row, [rows, length] -> [rows]; 0 where there is none."""
    return (where.int() * torch.arange(where.shape[1], device=where.device)).argmax(dim=1)


def _aggregate(how: str, scores: Tensor, ends: Tensor, last: Tensor) -> Tensor:
    """Scores [rows, length, outputs] where `ends` [rows, length, 1] -> [rows, outputs]."""
    if how == "min":
        return scores.masked_fill(~ends, torch.inf).amin(dim=1)
    if how == "prod":
        return scores.masked_fill(~ends, 1.0).prod(dim=1)
    if how == "mean":
        return (scores * ends).sum(dim=1) / ends.sum(dim=1)
    return scores[torch.arange(len(scores), device=scores.device), last]


def load_model(folder: Path, manifest: dict[str, Any]) -> ServedModel:
    """The model of a version folder, on the CPU, in evaluation mode."""
    auto_class: Any = AutoModelForSequenceClassification
    head = None
    if manifest.get("layout", "classifier") == "trunk":
        auto_class, head = AutoModel, load_file(folder / "head.safetensors")
    # int8 weights say in config.json how they are kept; everything beside them is float32.
    dtype = torch.float32 if manifest["dtype"] == "int8" else getattr(torch, manifest["dtype"])
    network = auto_class.from_pretrained(
        folder, local_files_only=True, trust_remote_code=manifest["trust_remote_code"], dtype=dtype
    )
    return ServedModel(network, head, manifest).eval()


class Scorer:
    """The model and tokenizer of one version folder."""

    def __init__(self, folder: Path, device: str) -> None:
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=self.manifest["trust_remote_code"]
        )
        if self.manifest.get("truncation_side"):
            self.tokenizer.truncation_side = self.manifest["truncation_side"]
        self.model = load_model(folder, self.manifest).to(device)
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
        if template == "chat":
            return self._encode_chat(sample, row)
        eos = self.tokenizer.eos_token or ""
        ids = self.tokenizer(template.format(text=sample, eos=eos)).input_ids
        if len(ids) <= limit:
            return ids
        closing = [self.tokenizer.eos_token_id] if template.endswith("{eos}") else []
        opened = template.removesuffix("{eos}").format(text=sample, eos=eos)
        cut = self.tokenizer(opened, truncation=True, max_length=limit - len(closing)).input_ids
        return [*cut, *closing]

    def _encode_chat(self, sample: str, row: int) -> list[int]:
        """Ids of a conversation, a JSON list of messages, in the model's own chat template.

        One that is too long loses tokens on the tokenizer's truncation side; an eos that closes it stays.
        """
        ids = self._rendered(_messages(sample, row), row)
        limit = self.manifest["max_length"]
        if len(ids) <= limit:
            return ids
        if self.tokenizer.truncation_side == "left":
            return ids[-limit:]
        closing = ids[-1:] if ids[-1] == self.tokenizer.eos_token_id else []
        return ids[: limit - len(closing)] + closing

    def _rendered(self, messages: list[dict[str, Any]], row: int) -> list[int]:
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates raise their own kinds, for example where roles must alternate
            raise RejectedError(f"row {row}: the chat template refuses these messages: {error}") from error
        return self.tokenizer(text, add_special_tokens=False).input_ids  # the template writes its own

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
        return self.model(input_ids.to(self.device), mask.to(self.device)).cpu().numpy()


def _messages(sample: str, row: int) -> list[dict[str, Any]]:
    try:
        messages = json.loads(sample)
    except ValueError:
        messages = None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RejectedError(
            f'row {row}: text is no JSON list of messages, such as [{{"role": "user", "content": "Hi"}}], '
            "which the chat template takes"
        )
    return messages


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
