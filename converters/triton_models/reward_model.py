"""A reward model inside Triton's python back end. The converter copies this file into every version folder.

It stands alone: torch, transformers and numpy, nothing of the package that wrote it. What it must know is in
`manifest.json` beside it. Four layers, top to bottom:

    ServedModel         padded token ids [rows, length] -> scores [rows, rewards]
    Scorer              samples -> rows of token ids -> scores, of steps or tokens too if the manifest says so
    score_requests      many requests in one batch; a bad one fails alone
    TritonPythonModel   what Triton calls

By hand, `python model.py < requests.json` scores without a server; see `main` for the format.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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

# Longest row times rows in one forward pass. On a GPU it bounds the memory of a batch that the server has put
# together. On a CPU small passes are the fastest: their activations stay in the caches, and less is padding.
# On dialogues, samples/s: 83 with 512 tokens a pass, 81 with 1,024, 60 with 4,096, 29 with 32,768.
TOKENS_PER_FORWARD = {"cpu": 512, "cuda": 32_768}


class RejectedError(ValueError):
    """The request is at fault, not the model: the same request fails again."""


@dataclass(frozen=True, slots=True)
class Row:
    """A sample as the model reads it.

    ids: the tokens.
    places: which tokens end a step and so have a score of their own, ascending; () where the model scores
        samples only.
    ends: how much of the sample lies before the end of each such step, in characters of the client's text, or
        in tokens where the client sends those; () where the model scores samples only.
    """

    ids: list[int]
    places: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of some rows.

    rewards: float32 [rows, rewards].
    steps: per row float32 [its steps]; empty unless steps are scored.
    """

    rewards: np.ndarray
    steps: list[np.ndarray]


Rows = list[Row]
Token = tuple[int, int | None]
"""An id, and how much of the client's sample lies before its end; None where the client did not send it."""


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
        self.weight: Any = head and nn.Parameter(head["weight"], requires_grad=False)
        self.bias: Any = head and nn.Parameter(head["bias"], requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return scores float32 [rows, rewards] of padded rows, int64 [rows, length]; mask 0 is padding."""
        output = self.network(input_ids=input_ids, attention_mask=attention_mask)
        if self.weight is None:
            scores = output.logits.float()
        elif self.manifest["pooling"] == "steps":
            every = self._token_scores(output.last_hidden_state)
            scores = _aggregate(self.manifest["aggregate"], every, self._step_ends(input_ids, attention_mask))
        else:
            scores = self._linear(self._pooled(output.last_hidden_state, input_ids, attention_mask))
        return self._served(scores)

    def dense(self, input_ids: Tensor, attention_mask: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores [rows, 1] as `forward` does, and one of every token [rows, length], in the same unit.

        ends: bool [rows, length], True where a step ends; aggregated are the scores there.
        """
        states = self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        every = self._token_scores(states)
        if self.manifest["pooling"] == "steps":
            scores = _aggregate(self.manifest["aggregate"], every, ends)
        else:
            scores = self._linear(self._pooled(states, input_ids, attention_mask))
        return self._served(scores), self._served(every).squeeze(-1)

    def _served(self, scores: Tensor) -> Tensor:
        """Choose of all outputs [..., outputs] the rewards [..., rewards], normalised by the manifest."""
        if self.manifest.get("columns") is not None:
            scores = scores[..., self.manifest["columns"]]
        if self.manifest["normalise"]:
            mean, std = (torch.tensor(self.manifest[name], device=scores.device) for name in ("mean", "std"))
            scores = (scores - mean) / std
        return scores

    def _token_scores(self, states: Tensor) -> Tensor:
        """Return the head's outputs at every token, [rows, length, outputs].

        Several outputs of a process reward are kinds of steps: these become probabilities.
        """
        logits = self._linear(states)
        if self.manifest["pooling"] != "steps" or logits.shape[-1] == 1:
            return logits
        return logits.softmax(dim=-1)

    def _linear(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states.float(), self.weight, self.bias)

    def _pooled(self, states: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Pool states [rows, length, width] -> [rows, width]."""
        rule = self.manifest["pooling"]
        if rule == "mean":
            weights = mask.unsqueeze(-1).float()
            return (states.float() * weights).sum(dim=1) / weights.sum(dim=1)
        where = self._position(rule, input_ids, mask)
        return states[torch.arange(len(states), device=states.device), where]

    def _position(self, rule: str, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Return the place at which each row is read, [rows]."""
        if rule == "cls":
            return mask.int().argmax(dim=1)
        if rule == "hf":  # as transformers' decoders do it: by the ids, whatever the mask says
            return _last_true(input_ids != self.manifest["pad_token_id"])
        last = _last_true(mask.bool())
        if rule == "last_token":
            return last
        is_eos = (input_ids == self.manifest["eos_token_id"]) & mask.bool()
        return torch.where(is_eos.any(dim=1), is_eos.int().argmax(dim=1), last)

    def _step_ends(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Return where steps end, bool [rows, length]: at separators, and at the last token but an eos."""
        body = mask.bool()
        if self.manifest["eos_token_id"] is not None:
            body = body & (input_ids != self.manifest["eos_token_id"])
        last = _last_true(torch.where(body.any(dim=1, keepdim=True), body, mask.bool()))
        places = torch.arange(mask.shape[1], device=mask.device)
        return (input_ids == self.manifest["separator_id"]) & mask.bool() | (places == last.unsqueeze(1))


def _last_true(where: Tensor) -> Tensor:
    """Return the index of the last True of each row, [rows, length] -> [rows]; 0 where there is none."""
    return (where.int() * torch.arange(where.shape[1], device=where.device)).argmax(dim=1)


def _aggregate(how: str, scores: Tensor, ends: Tensor) -> Tensor:
    """Aggregate scores [rows, length, outputs] where `ends` [rows, length] is True -> [rows, outputs]."""
    where = ends.unsqueeze(-1)
    if how == "min":
        return scores.masked_fill(~where, torch.inf).amin(dim=1)
    if how == "prod":
        return scores.masked_fill(~where, 1.0).prod(dim=1)
    if how == "mean":
        return (scores * where).sum(dim=1) / where.sum(dim=1)
    return scores[torch.arange(len(scores), device=scores.device), _last_true(ends)]


def load_model(folder: Path, manifest: dict[str, Any]) -> ServedModel:
    """Load the model of a version folder, on the CPU, in evaluation mode."""
    is_trunk = manifest.get("layout", "classifier") == "trunk"
    auto_class: Any = AutoModel if is_trunk else AutoModelForSequenceClassification
    head = load_file(folder / "head.safetensors") if is_trunk else None
    # config.json describes the format of int8 weights; everything beside them is float32.
    dtype = torch.float32 if manifest["dtype"] == "int8" else getattr(torch, manifest["dtype"])
    network = auto_class.from_pretrained(
        folder, local_files_only=True, trust_remote_code=manifest["trust_remote_code"], dtype=dtype
    )
    return ServedModel(network, head, manifest).eval()


class Scorer:
    """Scores samples by the model and tokenizer of one version folder."""

    def __init__(self, folder: Path, device: str) -> None:
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=self.manifest["trust_remote_code"]
        )
        side = self.manifest.get("truncation_side")
        self.tokenizer.truncation_side = side or self.tokenizer.truncation_side
        self.eos: int | None = self.tokenizer.eos_token_id
        self.added = added_tokens(self.tokenizer)
        added = self.tokenizer.added_tokens_decoder.values()
        self.special_tokens = tuple(token.content for token in added if token.special and token.content)
        # Arguments of the call, which no client may set; training refuses the same.
        self.reserved = {*inspect.signature(self.tokenizer.apply_chat_template).parameters, "messages"}
        self.granularity: str = self.manifest.get("granularity", "sample")
        self.is_dense = self.granularity != "sample"
        self.model = load_model(folder, self.manifest).to(device)
        self.device = device
        # Kernels round by the shape of what they get: a row is safe only alone in its pass: budget 0.
        is_alone = self.manifest.get("batch_invariant", False)
        self.tokens_per_forward = 0 if is_alone else TOKENS_PER_FORWARD[torch.device(device).type]

    def rows_from_texts(self, texts: Sequence[bytes]) -> Rows:
        """Return the token ids of UTF-8 samples.

        Raises:
            RejectedError: a sample is not UTF-8, or has no tokens.
        """
        return self._checked([self._encode(text, row) for row, text in enumerate(texts)])

    def rows_from_tokens(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> Rows:
        """Return the token ids of padded rows, int [n, length]; padding, on either side, has 0 in the mask.

        Raises:
            RejectedError: shapes differ, a mask has a hole, or a row is empty, too long or out of range.
        """
        if input_ids.shape != attention_mask.shape:
            shapes = list(input_ids.shape), list(attention_mask.shape)
            raise RejectedError("input_ids is {}, attention_mask {}".format(*shapes))
        rows = []
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            places = np.flatnonzero(mask)
            if places.size and places[-1] - places[0] + 1 != places.size:
                raise RejectedError(f"row {row}: attention_mask has a hole; padding goes at the ends")
            rows.append(self._row(ids[places].tolist(), list(range(1, places.size + 1))))
        return self._checked(rows)

    def score(self, rows: Rows) -> Scores:
        """Return the scores of all rows, in their order; a row's scores do not depend on the other rows."""
        rewards = np.empty((len(rows), len(self.manifest["reward_names"])), dtype=np.float32)
        steps: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(rows) if self.is_dense else []
        for indices in _batches_by_length([len(row.ids) for row in rows], self.tokens_per_forward):
            batch = [rows[index] for index in indices]
            if not self.is_dense:
                rewards[indices] = self._forward(batch)
                continue
            rewards[indices], every = self._dense(batch)
            for index, row, scores in zip(indices, batch, every, strict=True):
                steps[index] = scores[list(row.places)]
        return Scores(rewards, steps)

    def _row(self, ids: list[int], ends: Sequence[int | None]) -> Row:
        """Build the row of these tokens.

        ends: how much of the client's sample lies before the end of each token; None for a token that the
            template or the tokenizer added. Those end no step; where there are no others, the row is one step
            that ends at 0.
        """
        if not self.is_dense or not ids:
            return Row(ids)
        end_of = {place: end for place, end in enumerate(ends) if end is not None}
        own = list(end_of or range(len(ids)))
        words = [place for place in own if ids[place] != self.manifest["eos_token_id"]] or own
        if not end_of:
            return Row(ids, (words[-1],), (0,))
        if self.granularity == "step":
            separators = {place for place in own if ids[place] == self.manifest["separator_id"]}
            own = sorted(separators | {words[-1]})
        return Row(ids, tuple(own), tuple(end_of[place] for place in own))

    def _ends_in(self, sample: str, encoded: Any) -> list[int | None]:
        """Return where each token ends in the client's text, by the offsets into the template's."""
        if not self.is_dense:
            return [None] * len(encoded.input_ids)
        before = self.manifest["template"].partition("{text}")[0]
        start = len(before.format(eos=self.tokenizer.eos_token or ""))
        return [
            end - start if sequence is not None and start < end <= start + len(sample) else None
            for (_, end), sequence in zip(encoded.offset_mapping, encoded.sequence_ids(), strict=True)
        ]

    def _encode(self, text: bytes, row: int) -> Row:
        """Return the ids of a sample, a text or a dialogue as JSON, in the model's template.

        No bos stands twice at the beginning and no eos twice at the end, whoever wrote the first. A sample
        that is too long loses tokens on the tokenizer's truncation side; the special tokens that the
        tokenizer adds to a text, and an {eos} that closes the template, stay: the score may be read there.
        """
        try:
            sample = text.decode("utf-8")
        except UnicodeDecodeError as error:
            why = f"{error.reason} at byte {error.start}"
            raise RejectedError(f"row {row}: text is not UTF-8 ({why})") from error
        template = self.manifest["template"]
        if template in ("chat", "chat{eos}"):
            return Row(self._encode_dialogue(_dialogue(sample, row), row))
        eos = self.tokenizer.eos_token or ""
        offsets = {"return_offsets_mapping": True} if self.is_dense else {}
        whole = self.tokenizer(template.format(text=sample, eos=eos), verbose=False, **offsets)
        tokens = self._once(list(zip(whole.input_ids, self._ends_in(sample, whole), strict=True)))
        head, tail = self.added
        if template.endswith("{eos}") and [id for id, _ in tokens[: len(tokens) - tail]][-1:] == [self.eos]:
            tail += 1
        tokens = self._once(self._cut(tokens, head, tail))
        return self._row([token for token, _ in tokens], [end for _, end in tokens])

    def _once(self, tokens: list[Token]) -> list[Token]:
        """Drop what repeats a bos at the beginning or an eos at the end; what the client wrote stays."""
        first, last = 0, len(tokens)
        while last - first > 1 and tokens[first][0] == tokens[first + 1][0] == self.tokenizer.bos_token_id:
            first += 1
        while last - first > 1 and tokens[last - 1][0] == tokens[last - 2][0] == self.eos:
            last -= 1
        return tokens[first:last]

    def _cut(self, tokens: list[Token], head: int, tail: int) -> list[Token]:
        """Drop what exceeds the limit on the truncation side, but not the first `head` and last `tail`."""
        limit = self.manifest["max_length"]
        excess = len(tokens) - limit
        if excess <= 0:
            return tokens
        start = head if self.tokenizer.truncation_side == "left" else len(tokens) - tail - excess
        return (tokens[: max(0, start)] + tokens[max(0, start) + excess :])[-limit:]

    def _encode_dialogue(self, dialogue: dict[str, Any], row: int) -> list[int]:
        """Return the ids of a dialogue in the model's own chat template, which writes all special tokens."""
        variables = dialogue.get("chat_template_kwargs") or {}
        if taken := sorted(self.reserved & set(variables)):
            raise RejectedError(f"row {row}: chat_template_kwargs may not set {taken[0]!r}")
        try:
            for message in dialogue["messages"]:
                _make_readable(message, self.manifest)
            text = self.tokenizer.apply_chat_template(
                dialogue["messages"], tools=dialogue.get("tools") or None, tokenize=False, **variables
            )
        except Exception as error:  # templates raise their own kinds, for example where roles must alternate
            raise RejectedError(f"row {row}: the chat template refuses these messages: {error}") from error
        is_closed = self.manifest["template"] == "chat{eos}"
        if is_closed and text.rstrip().endswith(self.special_tokens):
            text = text.rstrip()  # white space that a template puts behind a turn, before the next one
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        ids = [*ids, self.eos] if is_closed and ids[-1:] != [self.eos] else ids
        tail = int(ids[-1:] == [self.eos])
        return [token for token, _ in self._cut([(token, None) for token in ids], 0, tail)]

    def _checked(self, rows: Rows) -> Rows:
        vocabulary, limit = self.manifest["vocab_size"], self.manifest["max_length"]
        for row, ids in enumerate(row.ids for row in rows):
            if not ids:
                raise RejectedError(f"row {row} has no tokens")
            if len(ids) > limit:
                raise RejectedError(f"row {row} has {len(ids)} tokens, at most {limit} are allowed")
            if min(ids) < 0 or max(ids) >= vocabulary:
                raise RejectedError(f"row {row} has token ids outside 0..{vocabulary - 1}")
        return rows

    @torch.inference_mode()
    def _forward(self, rows: Rows) -> np.ndarray:
        return self.model(*self._padded(rows)).cpu().numpy()

    @torch.inference_mode()
    def _dense(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        input_ids, mask = self._padded(rows)
        ends = torch.zeros(mask.shape, dtype=torch.bool)
        for row, places in enumerate(row.places for row in rows):
            ends[row, list(places)] = True
        scores, every = self.model.dense(input_ids, mask, ends.to(self.device))
        return scores.cpu().numpy(), every.cpu().numpy()

    def _padded(self, rows: Rows) -> tuple[Tensor, Tensor]:
        # Padded on the right, so that position i is token i for every architecture.
        shape = (len(rows), max(len(row.ids) for row in rows))
        input_ids = torch.full(shape, self.manifest["pad_token_id"], dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.long)
        for row, ids in enumerate(row.ids for row in rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        return input_ids.to(self.device), mask.to(self.device)


def _dialogue(sample: str, row: int) -> dict[str, Any]:
    """Return {"messages", "tools", "chat_template_kwargs"} of a dialogue's JSON; the last two may lack."""
    value: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        value = _without_none(json.loads(sample))
    dialogue: dict[str, Any] = {"messages": value} if isinstance(value, list) else value
    messages = dialogue.get("messages") if isinstance(dialogue, dict) else None
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise RejectedError(
            f'row {row}: text is no JSON list of messages, such as [{{"role": "user", "content": "Hi"}}], '
            "which the chat template takes"
        )
    for key, kind in {"tools": list, "chat_template_kwargs": dict}.items():
        if not isinstance(dialogue.get(key), kind | None):
            raise RejectedError(f"row {row}: `{key}` of the dialogue is no {kind.__name__}")
    if unknown := sorted(set(dialogue) - {"messages", "tools", "chat_template_kwargs"}):
        raise RejectedError(f"row {row}: the dialogue has an unknown key `{unknown[0]}`")
    return dialogue


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _make_readable(message: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Bring a message into the form that the chat template reads, as the manifest tells and training does."""
    content, form = message.get("content"), manifest.get("contents", {}).get(message.get("role"))
    if form == "text" and isinstance(content, list):
        message["content"] = "".join(part["text"] for part in content)
    elif form == "parts" and isinstance(content, str):
        message["content"] = [{"type": "text", "text": content}]
    for call in message.get("tool_calls", ()):
        function: Any = call.get("function") if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if manifest.get("arguments") == "json" and isinstance(arguments, dict):
            function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        elif manifest.get("arguments") == "dict" and isinstance(arguments, str):
            with contextlib.suppress(json.JSONDecodeError):
                parsed = json.loads(arguments)
                function["arguments"] = parsed if isinstance(parsed, dict) else arguments


def added_tokens(tokenizer: Any) -> tuple[int, int]:
    """Return how many tokens the tokenizer adds before and behind a text."""
    around = tokenizer("").input_ids
    for word in ("x", "a", "1", "c", "."):
        plain = tokenizer(word, add_special_tokens=False).input_ids
        if plain and not set(plain) & set(around):
            before = tokenizer(word).input_ids.index(plain[0])
            return before, len(around) - before
    return len(around), 0


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


def _batches_by_length(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
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
         {"texts": [...]} or {"input_ids": [[...]], "attention_mask": [[...]]}
    out: [{"scores": [[...], ...]} or {"error": "..."}, ...]; a model that scores steps or tokens adds
         "step_scores": [[...], ...] and "step_ends": [[...], ...]
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
