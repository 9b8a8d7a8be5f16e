"""Judged texts for reward models: checked, put into the template, tokenised once, and padded into batches.

A row judges one text, {"text", "score": 0.5} or {"text", "scores": {"helpful": 1, "brief": 0}}, or compares
two, {"chosen", "rejected"}, where it may add a "margin" and the "objective" that they were compared by. A
text is a whole sample, prompt and output, or a dialogue for the tokenizer's chat template. The forms that
`conch.data.formats` brings into these are taken too.

Legend: B rows, K objectives, T tokens (padded right).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from conch.config import DataConfig
from conch.config.algorithms.reward_model import CHAT
from conch.data.chat import dialogue_of_row, render_dialogue
from conch.data.files import like_rows, place_of, rows_at, usable
from conch.data.formats import JUDGEMENT_FORMS, about, fitting, judgement_form, listed, text_of
from conch.data.text import special_frame, special_tokens
from conch.errors import DataError
from conch.log import get_logger
from conch.types import DEFAULT_OBJECTIVE, Dialogue

_log = get_logger(__name__)

_FORMS = '{"text", "score"}, or all {"text", "scores"}, or all {"chosen", "rejected"}'


@dataclass(frozen=True)
class RowForm:
    """What the rows of a data set have in common.

    compares: rows are pairs.
    objectives: the names that rows give; none where there is but one objective.
    """

    compares: bool
    objectives: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """Keys of a row's texts, in the order in which they are scored."""
        return ("chosen", "rejected") if self.compares else ("text",)

    @property
    def reward_names(self) -> tuple[str, ...]:
        """One name per output of the reward model."""
        return self.objectives or (DEFAULT_OBJECTIVE,)


@dataclass(frozen=True, slots=True)
class ScoredText:
    """One text and the scores that it should get.

    token_ids: the text in its template.
    scores: one per objective.
    """

    token_ids: tuple[int, ...]
    scores: tuple[float, ...]

    @property
    def identity(self) -> Hashable:
        """Equal for rows that judge the same."""
        return self.token_ids


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two texts of which one is preferred.

    chosen, rejected: token ids of the texts in their template.
    margin: least difference between their scores that is asked for.
    objective: index of the model's output that is compared.
    """

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    margin: float = 0.0
    objective: int = 0

    @property
    def identity(self) -> Hashable:
        """Equal for rows that compare the same, whichever is preferred."""
        return frozenset((self.chosen, self.rejected))


Judgement = ScoredText | PreferencePair


@dataclass(frozen=True)
class Texts:
    """input_ids [B, T]; attention_mask [B, T], True at real tokens."""

    input_ids: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]


@dataclass(frozen=True)
class ScoredTexts:
    """Texts with the scores [B, K] they should get."""

    texts: Texts
    targets: Float[Tensor, "B K"]


@dataclass(frozen=True)
class Pairs:
    """Preferences: of each pair, text 0 is preferred to text 1.

    input_ids [B, 2, T]; attention_mask [B, 2, T], True at real tokens; margins [B]; objectives [B], the
    outputs that the pairs are about.
    """

    input_ids: Int[Tensor, "B 2 T"]
    attention_mask: Bool[Tensor, "B 2 T"]
    margins: Float[Tensor, " B"]
    objectives: Int[Tensor, " B"]


# ------------------------------------------------------------------------------------------------------- rows


def judgements(rows: Iterable[Any], *, what: str = "row", config: DataConfig | None = None) -> list[Any]:
    """Rows of any form with their prompts in their texts, for `check_rows`.

    what: how an error names a row.
    config: has the names of columns; see `listed`.

    Raises:
        DataError: a prompt does not go with its texts, or a label is none.
    """
    given = listed(rows, f"{what}s", config)
    return like_rows(given, [_in_form(row, place_of(given, index, what)) for index, row in enumerate(given)])


def _in_form(row: Any, name: str) -> Any:
    try:
        return judgement_form(row)
    except DataError as error:
        raise DataError(f"{name} {error}") from None


def judgement(row: Any) -> Any:
    """A row, alone, that a reward model can learn from, brought into form; how `read_rows` takes it.

    Raises:
        DataError: it can not, in words that follow its name.
    """
    judgement_row = judgement_form(row)
    try:
        _check_row(judgement_row, _form_of([judgement_row]), "")
    except DataError as error:
        raise DataError(str(error).lstrip(" :")) from None
    return judgement_row


def check_rows(rows: Sequence[Any], like: RowForm | None = None, *, what: str = "row") -> RowForm:
    """The form that these rows have in common; with `like`, that they have this very form.

    what: how an error names a row.

    Raises:
        DataError: there are none, a row has other keys, a text is no string, a number is not finite or a
            margin below 0, or an objective cannot be a name.
    """
    if not rows:
        raise DataError(f"no {what}s to make a reward model with: give at least one")
    form = like or _form_of(rows)
    for index, row in enumerate(rows):
        _check_row(row, form, place_of(rows, index, what))
    return form


def _form_of(rows: Sequence[Any]) -> RowForm:
    first = rows[0]
    if not isinstance(first, Mapping) or not ("score" in first or "scores" in first):
        named = [row["objective"] for row in rows if isinstance(row, Mapping) and "objective" in row]
        return RowForm(compares=True, objectives=_names(named))
    scores = first.get("scores")
    return RowForm(compares=False, objectives=_names(scores) if isinstance(scores, Mapping) else ())


def _names(values: Iterable[Any]) -> tuple[str, ...]:
    """Each name once."""
    names = list(values)
    for name in names:
        if not isinstance(name, str) or not name or "," in name:
            raise DataError(f"objective {name!r}: a name is a string that is not empty and holds no comma")
    return tuple(dict.fromkeys(names))


def _check_row(row: Any, form: RowForm, name: str) -> None:
    if not isinstance(row, Mapping):
        raise DataError(f"{name} is no dict: rows are all {_FORMS} ({row!r})")
    for key in form.texts:
        if text_of(row.get(key)) is None:
            remedy = about(row, *JUDGEMENT_FORMS)
            raise DataError(f'{name} has no string "{key}": rows are all {_FORMS}{remedy}')
    if form.compares:
        _check_pair(row, form, name)
    else:
        _check_scores(row, form, name)


def _check_pair(row: Mapping[str, Any], form: RowForm, name: str) -> None:
    margin = row.get("margin", 0.0)
    if not _is_finite_number(margin) or margin < 0:
        raise DataError(f"{name}: its margin {margin!r} is not a finite number of at least 0")
    if form.objectives and row.get("objective") not in form.objectives:
        known = ", ".join(form.objectives)
        raise DataError(
            f"{name} has the objective {row.get('objective')!r}: training rows have {known}, and every row "
            'needs an "objective" where one has it'
        )
    if not form.objectives and "objective" in row:
        raise DataError(f"{name} has the objective {row['objective']!r}, training rows have none")


def _check_scores(row: Mapping[str, Any], form: RowForm, name: str) -> None:
    scores = row.get("scores") if form.objectives else {DEFAULT_OBJECTIVE: row.get("score")}
    if not isinstance(scores, Mapping) or set(scores) != set(form.reward_names):
        scores_text = ", ".join(map(str, scores)) if isinstance(scores, Mapping) else repr(scores)
        raise DataError(
            f'{name} does not have the "scores" that rows have here, {", ".join(form.reward_names)} '
            f"({scores_text})"
        )
    for objective, score in scores.items():
        if not _is_finite_number(score):
            of = f" for {objective}" if form.objectives else ""
            raise DataError(f"{name}: its score {score!r}{of} is not a finite number")


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and bool(np.isfinite(value))


def check_texts(texts: Sequence[Any]) -> None:
    """Raise DataError unless there are reference texts, and all are strings or dialogues."""
    if isinstance(texts, str) or not texts:
        raise DataError("the reference texts must be a list of at least one string or dialogue")
    for index, text in enumerate(texts):
        if text_of(text) is None:
            raise DataError(
                f"reference text {index} is neither a string nor a dialogue (got {type(text).__name__})"
            )


def hold_out(
    rows: Sequence[Judgement], fraction: float, seed: int
) -> tuple[list[Judgement], list[Judgement]]:
    """Split at random into rows to train on and this share of rows, at least one, to evaluate on.

    Repetitions of a row stay with it: what is held out is not trained on.

    Raises:
        DataError: no row would be left to train on.
    """
    distinct = list(dict.fromkeys(row.identity for row in rows))
    order = np.random.default_rng(seed).permutation(len(distinct))
    held_out = {distinct[index] for index in order[: max(1, round(fraction * len(distinct)))]}
    if len(held_out) == len(distinct):
        raise DataError(
            f"`reward_model.eval_fraction` = {fraction} holds out all {len(distinct)} different rows: give "
            "more, or `reward_model.eval_fraction=0` to train without evaluation"
        )
    return [row for row in rows if row.identity not in held_out], [
        row for row in rows if row.identity in held_out
    ]


# ----------------------------------------------------------------------------------------------------- tokens


def default_template(tokenizer: Any) -> str:
    """The sample and an eos token; the sample alone if the tokenizer closes a text itself or has no eos."""
    _, closing = special_frame(tokenizer)
    return "{text}" if closing or not tokenizer.eos_token else "{text}{eos}"


def template_for(rows: Sequence[Mapping[str, Any]], form: RowForm, tokenizer: Any) -> str:
    """`chat` for rows of dialogues, `default_template` for rows of texts.

    rows: at least one, as `check_rows` has passed them.

    Raises:
        DataError: some rows are of texts, others of dialogues.
    """
    is_text = [isinstance(row[key], str) for row in rows for key in form.texts]
    if any(is_text) and not all(is_text):
        odd = is_text.index(not is_text[0]) // len(form.texts)
        kind = "texts" if is_text[len(form.texts) * odd] else "dialogues"
        raise DataError(
            f"{place_of(rows, odd, 'row')} is of {kind}, {place_of(rows, 0, 'row')} is not: a reward model "
            "reads one or the other; give rows of one kind, or set `reward_model.template`, in which "
            "dialogues stand as the chat template renders them"
        )
    return default_template(tokenizer) if is_text[0] else CHAT


class _Encoded(NamedTuple):
    """A text for the tokenizer with its ids, uncut, and whether it is a dialogue that a template rendered."""

    ids: tuple[int, ...]
    text: str
    is_dialogue: bool


class TextEncoder:
    """Shows texts and dialogues to a reward model as the server will, cut where they are too long.

    A text stands in the template, with the special tokens that the tokenizer adds; a dialogue is what the
    chat template renders, which writes its own. No special token is put twice, in front or behind:
    docs/text.md. What is too long loses tokens on the tokenizer's truncation side; special tokens in front
    and behind, and an {eos} that closes the template, stay, because the score may be read there.

    template: format string over {text} and {eos}, or `chat`, which takes dialogues alone.
    max_length: in tokens, special ones included; None sets no limit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, max_length: int | None) -> None:
        self._tokenizer = tokenizer
        self._template = "{text}" if template == CHAT else template
        self._reads_dialogues = template == CHAT
        self._max_length = max_length
        front, back = special_frame(tokenizer)
        self._num_added = len(front), len(back)
        self._specials = tuple(special_tokens(tokenizer))
        self._num_texts = self._num_cut = 0

    def encode(self, texts: Sequence[Any]) -> list[tuple[int, ...]]:
        """Token ids of each text or dialogue.

        Raises:
            DataError: one has no tokens, is a text for a model that reads dialogues, or a dialogue that the
                chat template refuses.
        """
        formatted = [
            self._formatted(_text({"text": text}, "text"), place_of(texts, index, "text"))
            for index, text in enumerate(texts)
        ]
        self._num_texts += len(texts)
        return [
            self._cut(self._checked(encoded, place_of(texts, index, "text")))
            for index, encoded in enumerate(self._tokenized(formatted))
        ]

    def encode_rows(
        self, rows: Sequence[Mapping[str, Any]], form: RowForm, lengths: DataConfig | None = None
    ) -> list[Judgement]:
        """Rows that `check_rows` has passed, tokenised.

        Rows that the chat template or the tokenizer refuses are left out, and so are pairs that are equal
        once tokenised and cut, which teach nothing; one warning each counts them.

        lengths: which rows to leave out for the length of their longest text, before any is cut.

        Raises:
            DataError: no row is left.
        """
        if not rows:
            return []
        formatted, indices = usable(
            rows, "row", lambda row, name: [self._formatted(_text(row, key), name) for key in form.texts]
        )
        rows = rows_at(rows, indices, "row")
        encoded = self._tokenized([text for texts in formatted for text in texts])
        width = len(form.texts)
        texts = like_rows(rows, [encoded[start : start + width] for start in range(0, len(encoded), width)])
        checked, indices = usable(texts, "row", lambda row, name: [self._checked(text, name) for text in row])
        rows = [rows[index] for index in indices]
        if lengths is not None and (lengths.min_tokens or lengths.max_tokens):
            fits = fitting([max(len(text.ids) for text in row) for row in checked], lengths, "rows")
            rows, checked = [rows[index] for index in fits], [checked[index] for index in fits]
        self._num_texts += len(rows) * width
        judged = [
            _judgement(row, tuple(self._cut(text) for text in own), form)
            for row, own in zip(rows, checked, strict=True)
        ]
        return _different(judged)

    def _formatted(self, text: str | Dialogue, name: str) -> tuple[str, bool]:
        """A text as the tokenizer gets it, and whether it is a dialogue, with all its special tokens."""
        eos = str(self._tokenizer.eos_token or "")
        if isinstance(text, str):
            if self._reads_dialogues:
                raise DataError(
                    f"{name} is a string, and the template `chat` takes dialogues: give messages, or set "
                    "`reward_model.template`"
                )
            return self._template.format(text=text, eos=eos), False
        rendered = render_dialogue(text, name, self._tokenizer)
        if self._reads_dialogues:
            return rendered, True
        # Behind the token that ends a turn templates put white space, which a policy's sample does not have.
        trimmed = rendered.rstrip()
        rendered = trimmed if trimmed.endswith(self._specials) else rendered
        closed = eos and rendered.endswith(eos)
        template = self._template.replace("{text}{eos}", "{text}") if closed else self._template
        return template.format(text=rendered, eos=eos), True

    def _tokenized(self, formatted: Sequence[tuple[str, bool]]) -> list[_Encoded]:
        """What `_formatted` gives, as token ids, uncut."""
        encoded: dict[int, _Encoded] = {}
        for kind in {is_dialogue for _, is_dialogue in formatted}:
            rows = [row for row, (_, is_dialogue) in enumerate(formatted) if is_dialogue == kind]
            texts = [formatted[row][0] for row in rows]
            columns: Any = self._tokenizer(texts, add_special_tokens=not kind, verbose=False)["input_ids"]
            for row, ids in zip(rows, map(tuple, columns), strict=True):
                encoded[row] = _Encoded(ids if kind else self._once(ids), formatted[row][0], kind)
        return [encoded[row] for row in range(len(formatted))]

    def _checked(self, encoded: _Encoded, name: str) -> _Encoded:
        if not encoded.ids:
            raise DataError(
                f"{name}: the text {encoded.text!r} has no tokens in the template {self._template!r}: drop "
                "it, or end the template with {eos}"
            )
        return encoded

    def _once(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Leave one bos in front and one eos behind, whoever wrote the others."""
        first, last = 0, len(ids)
        while last - first > 1 and ids[first] == ids[first + 1] == self._tokenizer.bos_token_id:
            first += 1
        while last - first > 1 and ids[last - 1] == ids[last - 2] == self._tokenizer.eos_token_id:
            last -= 1
        return ids[first:last]

    def report_cuts(self) -> None:
        """One warning, if any text so far was too long."""
        if self._num_cut:
            _log.warning(
                "%d of %d texts cut to %d tokens on the %s",
                *(self._num_cut, self._num_texts, self._max_length, self._tokenizer.truncation_side),
            )

    def _cut(self, encoded: _Encoded) -> tuple[int, ...]:
        """At most `max_length` ids, with the special ones that the tokenizer adds and an eos that closes."""
        ids, limit, eos = encoded.ids, self._max_length, self._tokenizer.eos_token_id
        excess = 0 if limit is None else len(ids) - limit
        if excess <= 0:
            return ids
        self._num_cut += 1
        front, back = (0, 0) if encoded.is_dialogue else self._num_added
        is_closed = encoded.is_dialogue or self._template.endswith("{eos}")
        if is_closed and ids[: len(ids) - back][-1:] == (eos,):
            back += 1
        start = max(0, front if self._tokenizer.truncation_side == "left" else len(ids) - back - excess)
        return self._once((ids[:start] + ids[start + excess :])[-(limit or 0) :])


def _text(row: Mapping[str, Any], key: str) -> str | Dialogue:
    return dialogue_of_row(row, key) or row[key]


def _different(rows: list[Judgement]) -> list[Judgement]:
    """Rows less the pairs whose two texts have become one.

    Raises:
        DataError: none is left.
    """
    left = [row for row in rows if not (isinstance(row, PreferencePair) and row.chosen == row.rejected)]
    if not left:
        raise DataError(
            f"the two texts of each of the {len(rows)} pairs are equal once tokenised and cut: raise "
            "`reward_model.max_length`, or cut the side that they share (`tokenizer.truncation_side`)"
        )
    if len(left) < len(rows):
        _log.warning(
            "%d of %d pairs left out: their texts are equal once tokenised and cut, which teaches nothing",
            *(len(rows) - len(left), len(rows)),
        )
    return left


def _judgement(row: Mapping[str, Any], texts: tuple[tuple[int, ...], ...], form: RowForm) -> Judgement:
    """A checked row with the token ids of its one text or two."""
    if form.compares:
        about = form.objectives.index(row["objective"]) if form.objectives else 0
        return PreferencePair(*texts, margin=float(row.get("margin", 0.0)), objective=about)
    scores = [row["scores"][name] for name in form.objectives] if form.objectives else [row["score"]]
    return ScoredText(*texts, scores=tuple(float(score) for score in scores))


# ---------------------------------------------------------------------------------------------------- batches


def collate_texts(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str) -> Texts:
    """Pad on the right to the longest text."""
    lengths = torch.tensor([len(ids) for ids in rows])
    longest = int(lengths.max())
    padded = torch.tensor([[*ids, *[pad_token_id] * (longest - len(ids))] for ids in rows])
    mask = torch.arange(longest) < lengths.unsqueeze(1)
    return Texts(padded.to(device), mask.to(device))


def collate_judgements(
    rows: Sequence[Judgement], pad_token_id: int, device: torch.device | str = "cpu"
) -> ScoredTexts | Pairs:
    """Pad rows, all of one kind, into a batch."""
    scored = [row for row in rows if isinstance(row, ScoredText)]
    if scored:
        texts = collate_texts([row.token_ids for row in scored], pad_token_id, device)
        return ScoredTexts(texts, torch.tensor([row.scores for row in scored], device=device))
    pairs = [row for row in rows if isinstance(row, PreferencePair)]
    flat = collate_texts([ids for row in pairs for ids in (row.chosen, row.rejected)], pad_token_id, device)
    return Pairs(
        flat.input_ids.unflatten(0, (-1, 2)),
        flat.attention_mask.unflatten(0, (-1, 2)),
        margins=torch.tensor([row.margin for row in pairs], device=device),
        objectives=torch.tensor([row.objective for row in pairs], device=device),
    )
