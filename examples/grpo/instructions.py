"""Requests with instructions in IFEval's form, made by a seeded generator: a subject, and one to three of six
types of instructions.

    {"key": 17,
     "prompt": "Write about the rain. Do not use commas. End with the words: Ask me again tomorrow.",
     "instruction_id_list": ["punctuation:no_comma", "startend:end_checker"],
     "kwargs": [{}, {"end_phrase": "Ask me again tomorrow."}]}

No held-out request is among those that are learned from: which of the two sets a subject with its
instructions belongs to is decided by these, whatever the words that ask for them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Part = Literal["train", "held_out"]

SUBJECTS = (
    *(
        "the rain",
        "the sea",
        "the moon",
        "the forest",
        "the city",
        "the old bridge",
        "my garden",
        "my sister",
    ),
    *("fresh bread", "black tea", "slow trains", "small dogs", "long walks", "good books", "cold winters"),
    *("warm soup", "paper boats", "wild birds", "night buses", "blue bicycles"),
)
END_PHRASES = ("Ask me again tomorrow.", "That is all for today.")
POSTSCRIPT_MARKERS = ("P.S.", "P.P.S")
HELD_OUT_SHARE = 0.2
FOLLOWED_SHARE = 0.3
UNASKED_SHARE = 0.05

REQUESTS = ("Write about {subject}.", "Tell me about {subject}.", "Please say something about {subject}.")
WORDINGS: Mapping[str, tuple[str, ...]] = {
    "punctuation:no_comma": ("Do not use commas.", "Your answer must not have any commas."),
    "change_case:english_lowercase": (
        "Use lowercase letters only.",
        "No capital letters are allowed in your answer.",
    ),
    "startend:quotation": (
        "Wrap all of it in double quotation marks.",
        "Put double quotes around the answer.",
    ),
    "startend:end_checker": ("End with the words: {end_phrase}", "Your last words must be: {end_phrase}"),
    "detectable_format:title": (
        "Begin with a title in double angular brackets.",
        "Your answer must have a title such as <<My thoughts>>.",
    ),
    "detectable_content:postscript": (
        "Add a postscript that starts with {postscript_marker}",
        "At the end put a note after {postscript_marker}",
    ),
}
"""Type of instruction -> ways to ask for it."""

_OPENINGS = (
    ("As far as I know, people like {subject}.", "People like {subject} as far as I know."),
    ("Well, there is much to say about {subject}.", "There is much to say about {subject}."),
    ("To me, nothing is better than {subject}.", "Nothing is better to me than {subject}."),
)
_CLOSINGS = (
    ("It makes us calm, happy and strong.", "It makes us calm and happy."),
    ("Young, old, rich and poor agree on that.", "Young and old agree on that."),
    ("In the end, we all need a bit of it.", "We all need a bit of it in the end."),
)
"""Sentences with a comma, and the same without one."""

_TITLES = ("<<A short answer>>", "<<What I think>>")
_NOTES = ("I wrote this at home.", "I thought about it for a long time.", "Please write back soon.")


@dataclass(frozen=True)
class Request:
    """One prompt with its instructions.

    number: names it.
    instructions: type -> arguments, in the order in which they are asked for.
    """

    number: int
    subject: str
    prompt: str
    instructions: Mapping[str, Mapping[str, Any]]

    @property
    def row(self) -> dict[str, Any]:
        """As google/IFEval has it."""
        return {
            "key": self.number,
            "prompt": self.prompt,
            "instruction_id_list": [*self.instructions],
            "kwargs": [{**arguments} for arguments in self.instructions.values()],
        }


def requests(part: Part, number: int, seed: int) -> list[Request]:
    """So many different requests of one of the two sets."""
    rng = random.Random(f"requests, {part}, {seed}")
    drawn: dict[str, Request] = {}
    while len(drawn) < number:
        subject = rng.choice(SUBJECTS)
        kinds = rng.sample([*WORDINGS], rng.randint(1, 3))
        instructions = {kind: _draw_arguments(kind, rng) for kind in kinds}
        if is_held_out(subject, instructions) == (part == "held_out"):
            asked = [rng.choice(WORDINGS[kind]).format(**instructions[kind]) for kind in kinds]
            prompt = " ".join([rng.choice(REQUESTS).format(subject=subject), *asked])
            drawn.setdefault(prompt, Request(len(drawn), subject, prompt, instructions))
    return list(drawn.values())


def is_held_out(subject: str, instructions: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether no request with this subject and these instructions, in any order, is learned from."""
    asked = sorted((kind, *map(str, arguments.values())) for kind, arguments in instructions.items())
    return random.Random(f"held out {subject} {asked}").random() < HELD_OUT_SHARE


def half_followed_rows(number: int, seed: int) -> list[dict[str, str]]:
    """Prompts and answers to learn from: each instruction is followed in three of ten answers that it is
    given for, and what nobody asked for is done now and then."""
    rng = random.Random(f"half followed, {seed}")
    return [
        {"prompt": request.prompt, "completion": half_followed_answer(request, rng)}
        for request in requests("train", number, seed)
    ]


def half_followed_answer(request: Request, rng: random.Random) -> str:
    """An answer that follows some of a request's instructions."""
    asked = request.instructions
    done = {
        kind: arguments
        for kind in WORDINGS
        if rng.random() < (FOLLOWED_SHARE if kind in asked else UNASKED_SHARE)
        for arguments in [asked.get(kind) or _draw_arguments(kind, rng)]
    }
    return answer(request.subject, done, rng)


def answer(subject: str, instructions: Mapping[str, Mapping[str, Any]], rng: random.Random) -> str:
    """An answer about a subject that follows these instructions, and no other type of the six."""
    with_comma = "punctuation:no_comma" not in instructions
    opening, closing = (
        rng.choice(sentences)[0 if with_comma else 1].format(subject=subject)
        for sentences in (_OPENINGS, _CLOSINGS)
    )
    lines = [rng.choice(_TITLES)] if "detectable_format:title" in instructions else []
    lines.append(f"{opening} {closing}")
    postscript = instructions.get("detectable_content:postscript")
    if postscript is not None:
        lines.append(f"{postscript['postscript_marker']} {rng.choice(_NOTES)}")
    end = instructions.get("startend:end_checker")
    if end is not None:
        lines.append(end["end_phrase"])
    text = "\n".join(lines)
    if "change_case:english_lowercase" in instructions:
        text = text.lower()
    return f'"{text}"' if "startend:quotation" in instructions else text


def _draw_arguments(kind: str, rng: random.Random) -> dict[str, Any]:
    """Arguments of an instruction, by the names of google/IFEval."""
    if kind == "startend:end_checker":
        return {"end_phrase": rng.choice(END_PHRASES)}
    if kind == "detectable_content:postscript":
        return {"postscript_marker": rng.choice(POSTSCRIPT_MARKERS)}
    return {}
