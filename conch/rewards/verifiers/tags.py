"""Thoughts and answers that a completion puts into tags: `<think>9 * 2 = 18</think><answer>18</answer>`.

Tags are found as text, in a time that grows with the text's length: "<" and "&" between them mean nothing.
"""

from __future__ import annotations

from typing import NamedTuple


class Tags(NamedTuple):
    """Contents of a completion's tags.

    thoughts: each <think>; text before a lone </think> is one, since the prompt may have opened it.
    answers: each <answer> outside of the thoughts, stripped.
    outside: the text without its thoughts, up to an open <think>.
    """

    thoughts: list[str]
    answers: list[str]
    outside: str


def read_tags(completion: str) -> Tags:
    """Find the thoughts and, in what is left without them, the answers.

    A tag that is not closed holds nothing, and nothing after an open <think> is an answer.
    """
    start, end = completion.find("<think>"), completion.find("</think>")
    if end >= 0 and not 0 <= start < end:
        completion = f"<think>{completion}"
    thoughts, rest = _split_tags(completion, "think")
    outside = rest.partition("<think>")[0]
    answers, _ = _split_tags(outside, "answer")
    return Tags(thoughts, [answer.strip() for answer in answers], outside)


def _split_tags(text: str, tag: str) -> tuple[list[str], str]:
    """Contents of each `<tag>...</tag>`, and the text without them."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    contents: list[str] = []
    rest: list[str] = []
    end = 0
    while (start := text.find(opening, end)) >= 0:
        stop = text.find(closing, start)
        if stop < 0:
            break
        contents.append(text[start + len(opening) : stop])
        rest.append(text[end:start])
        end = stop + len(closing)
    return contents, "".join([*rest, text[end:]])
