"""Refuse to choose in silence: where a checkpoint can be read in two ways, see whether the scores differ.

What nothing in the checkpoint says (`RewardCheckpoint.undecided`) is tried both ways on a few dialogues.
Where the scores are the same, the choice does not matter; where they differ, the conversion stops and shows
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from conch.converters.checkpoints.reader import RewardCheckpoint
from conch.converters.checkpoints.tokenizer import PAIR
from conch.converters.parity.inputs import DialogueInputs, Messages, Sample, inputs_of, places_of
from conch.converters.parity.reference import expected_scores
from conch.converters.parity.samples import ParityCase, golden_dialogues
from conch.errors import ConversionError
from conch.store.manifest import HeadActivation

_UNCUT = 1 << 20
"""Tokens, more than any sample here has."""

# Scores that rounding alone tells apart are the same reading.
_ALIKE = 1e-5


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read a checkpoint.

    option: what a user writes to have it.
    checkpoint: read so.
    """

    option: str
    checkpoint: RewardCheckpoint


def refuse_two_readings(checkpoint: RewardCheckpoint) -> None:
    """Try out what nothing in the checkpoint says.

    Raises:
        ConversionError: two readings give other scores; shows them on a dialogue, with the options to choose
            by.
    """
    for aspect in checkpoint.undecided:
        readings = _READINGS[aspect](checkpoint)
        if len(readings) > 1:
            _refuse_if_different(checkpoint, aspect, readings)


def refuse_lost_separators(checkpoint: RewardCheckpoint) -> None:
    """Look for the separators of an answer of three steps among its tokens.

    Raises:
        ConversionError: the tokenizer joins a separator with what stands before it, or the chat template
            takes the last one off, so that a step would have no score.
    """
    rules, inputs = checkpoint.rules, inputs_of(_reading(checkpoint, max_length=_UNCUT))
    if rules.pooling != "steps" or rules.step_separator is None:
        return
    divider = rules.step_delimiter or rules.step_separator
    answer = divider.join(("Two is one and one.", "So it is four", "That is all."))
    if isinstance(inputs, DialogueInputs):
        sample = inputs.sample_of(
            [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": answer}]
        )
        found, wanted = len(sample.separators or ()), 3
    else:
        sample = inputs.sample(answer, inputs.shapes[0])
        found, wanted = len(places_of(rules.separator_ids or (rules.separator_id,), sample.ids)), 2
    if sample.ids and (found != wanted or sample.separators == (len(sample.ids) - 1,)):
        read = checkpoint.tokenizer.convert_ids_to_tokens(list(sample.ids))
        raise ConversionError(
            f"{checkpoint.source}: of {wanted} separators {rules.step_separator!r} in {answer!r} {found} are "
            "found among its tokens, so steps would have no score of their own. The tokens: "
            f"{' '.join(map(repr, read))}. Give the separator as it is tokenised there, or --steps_apart, "
            "which encodes it by itself; where the chat template takes white space off an answer, a "
            "--chat_template that keeps it"
        )


def _refuse_if_different(checkpoint: RewardCheckpoint, aspect: str, readings: Sequence[Reading]) -> None:
    for messages in golden_dialogues():
        samples = [_sample(reading.checkpoint, messages) for reading in readings]
        if not all(sample.ids for sample in samples):
            continue  # the template takes no such dialogue
        scores = [
            _score(reading.checkpoint, sample) for reading, sample in zip(readings, samples, strict=True)
        ]
        if max(abs(score - scores[0]) for score in scores) <= _ALIKE * max(1.0, abs(scores[0])):
            continue
        shown = "\n".join(
            f"  {reading.option:<36} {score:>12.6f}   reads ...{_end_of(reading.checkpoint, sample)}"
            for reading, sample, score in zip(readings, samples, scores, strict=True)
        )
        said = "\n".join(f"  {message['role']}: {message['content']}" for message in messages)
        raise ConversionError(
            f"{checkpoint.source}: nothing in the checkpoint says its {aspect}, and scores differ by it. "
            "Add the one "
            f"that the model was trained with; its card says, or its recipe (--recipe "
            f"list):\n{shown}\nfor\n{said}"
        )


def _sample(checkpoint: RewardCheckpoint, messages: Messages) -> Sample:
    inputs = inputs_of(checkpoint)
    if isinstance(inputs, DialogueInputs):
        return inputs.sample_of(messages)
    return inputs.sample("\n\n".join(message["content"] for message in messages), inputs.shapes[0])


def _score(checkpoint: RewardCheckpoint, sample: Sample) -> float:
    return expected_scores(checkpoint, [ParityCase("reading", (sample,))]).scores[sample.key][0]


def _end_of(checkpoint: RewardCheckpoint, sample: Sample) -> str:
    return repr(checkpoint.tokenizer.decode(list(sample.ids[-12:])))


def _activations(checkpoint: RewardCheckpoint) -> list[Reading]:
    assert checkpoint.head is not None
    return [
        Reading(
            f"--head_activation {name}",
            replace(
                checkpoint,
                head=replace(checkpoint.head, activation=name),
                rules=_rules(checkpoint, head_activation=name),
            ),
        )
        for name in get_args(HeadActivation)
    ]


def _poolings(checkpoint: RewardCheckpoint) -> list[Reading]:
    """A `v_head` may be read at the first eos, as trlX does, any head at a token that is kept for it."""
    assert checkpoint.kind is not None
    tokenizer, rules = checkpoint.tokenizer, ["last_token"]
    if checkpoint.kind.head == ("v_head",) and tokenizer.eos_token_id is not None:
        rules.append("first_eos")
    cls = tokenizer.cls_token_id
    if cls is not None and tokenizer("a").input_ids[:1] == [cls]:
        return _each(checkpoint, "pooling", *rules, "cls", "mean")
    readings = _each(checkpoint, "pooling", *rules)
    if cls is not None:
        read_there = _reading(checkpoint, pooling="token", pooling_token_id=cls, closing_token_id=cls)
        readings.append(Reading(f"--closing_token '{tokenizer.cls_token}'", read_there))
    return readings


def _functions(checkpoint: RewardCheckpoint) -> list[Reading]:
    """One output of a step may be a score, or the logit of a probability."""
    return _each(checkpoint, "function_to_apply", "none", "sigmoid")


def _templates(checkpoint: RewardCheckpoint) -> list[Reading]:
    """An encoder may have learned from texts, or from prompt and answer as a pair of sentences."""
    return [
        Reading(f"--template '{checkpoint.rules.template}'", checkpoint),
        Reading("--template pair", _reading(checkpoint, template=PAIR, reads="dialogues")),
    ]


def _special_tokens(checkpoint: RewardCheckpoint) -> list[Reading]:
    return _each(checkpoint, "add_special_tokens", "never", "once")


def _each(checkpoint: RewardCheckpoint, option: str, *values: str) -> list[Reading]:
    """Return a reading for each value of an option that is a scoring rule of the same name."""
    return [Reading(f"--{option} {value}", _reading(checkpoint, **{option: value})) for value in values]


def _reading(checkpoint: RewardCheckpoint, **rules: Any) -> RewardCheckpoint:
    return replace(checkpoint, rules=_rules(checkpoint, **rules))


def _rules(checkpoint: RewardCheckpoint, **rules: Any) -> Any:
    return checkpoint.rules.model_copy(update=rules)


_READINGS: dict[str, Callable[[RewardCheckpoint], list[Reading]]] = {
    "head_activation": _activations,
    "pooling": _poolings,
    "add_special_tokens": _special_tokens,
    "function_to_apply": _functions,
    "template": _templates,
}
