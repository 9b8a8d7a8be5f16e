"""Rows and responses on which IFEval's checkers are compared: every row is checked against every response."""

from __future__ import annotations

import json
from typing import Any

ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "keywords:existence": [{"keywords": ["river"]}, {"keywords": ["Bridge", "stone"]}, {"keywords": ["art"]}],
    "keywords:frequency": [
        {"keyword": "river", "frequency": 2, "relation": "at least"},
        {"keyword": "the", "frequency": 3, "relation": "less than"},
        {"keyword": "an", "frequency": 1, "relation": "less than"},
    ],
    "keywords:forbidden_words": [
        {"forbidden_words": ["river", "sea"]},
        {"forbidden_words": ["art"]},
        {"forbidden_words": ["Yes", "no"]},
    ],
    "keywords:letter_frequency": [
        {"letter": "e", "let_frequency": 10, "let_relation": "at least"},
        {"letter": "Q", "let_frequency": 1, "let_relation": "less than"},
        {"letter": "i", "let_frequency": 3, "let_relation": "less than"},
    ],
    "language:response_language": [{"language": code} for code in ("en", "de", "hi", "ur", "sw")],
    "length_constraints:number_sentences": [
        {"num_sentences": 3, "relation": "at least"},
        {"num_sentences": 2, "relation": "less than"},
        {"num_sentences": 5, "relation": "less than"},
    ],
    "length_constraints:number_paragraphs": [{"num_paragraphs": number} for number in (1, 2, 3)],
    "length_constraints:number_words": [
        {"num_words": 12, "relation": "at least"},
        {"num_words": 5, "relation": "less than"},
        {"num_words": 40, "relation": "at least"},
    ],
    "length_constraints:nth_paragraph_first_word": [
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "water"},
        {"num_paragraphs": 3, "nth_paragraph": 1, "first_word": "The"},
        {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "yes"},
    ],
    "detectable_content:number_placeholders": [{"num_placeholders": number} for number in (1, 3)],
    "detectable_content:postscript": [
        {"postscript_marker": "P.S."},
        {"postscript_marker": "P.P.S"},
        {"postscript_marker": "Note:"},
    ],
    "detectable_format:number_bullet_lists": [{"num_bullets": number} for number in (1, 2, 3)],
    "detectable_format:constrained_response": [{}],
    "detectable_format:number_highlighted_sections": [{"num_highlights": number} for number in (1, 2, 4)],
    "detectable_format:multiple_sections": [
        {"section_spliter": "SECTION", "num_sections": 2},
        {"section_spliter": "Section", "num_sections": 1},
        {"section_spliter": "Day", "num_sections": 3},
    ],
    "detectable_format:json_format": [{}],
    "detectable_format:title": [{}],
    "combination:two_responses": [{}],
    "combination:repeat_prompt": [{"prompt_to_repeat": "Describe a river in your own words."}],
    "startend:end_checker": [
        {"end_phrase": "Is there anything else I can help with?"},
        {"end_phrase": "That is all."},
    ],
    "startend:quotation": [{}],
    "change_case:capital_word_frequency": [
        {"capital_frequency": 2, "capital_relation": "at least"},
        {"capital_frequency": 1, "capital_relation": "less than"},
        {"capital_frequency": 6, "capital_relation": "at least"},
    ],
    "change_case:english_capital": [{}],
    "change_case:english_lowercase": [{}],
    "punctuation:no_comma": [{}],
}
"""Arguments by type, each a row of its own."""

_PLAIN = [
    "A river carries water from the hills down to the sea.",
    "The river runs fast. It passes the old stone bridge. Then the river widens, and boats can pass.",
    "Water wears the stone away; the smart artisans of Quebec knew it.",
    "yes",
    "Yes, of course! No art is needed here.",
    "the small river is slow in summer and fast in spring because the snow melts then",
    "THE RIVER IS HIGH TODAY AND THE BRIDGE IS CLOSED UNTIL THE WATER FALLS AGAIN.",
    "The NASA and ESA teams met in the USA. I think WELL-KNOWN faces spoke, e.g. A. B. Carter.",
    "I DON'T KNOW. WE CAN'T SWIM, AND THEY'LL CANNOT WAIT. JOHN'S BOAT ISN'T HERE!",
    "Dr. Smith crossed at 5 p.m. on Jan. 3. He paid $3.50 to Mr. Lee. Was it worth it? Hardly!",
    "Wow!!! Really?!! No... yes... Perhaps.",
    "One. Two. Three. Four. Five. Six.",
    "e.g. this is one, i.e. not two.",
]
_FORMS = [
    "First part about water.\n***\nSecond part about stone.",
    "***\nFirst part.\n***\nSecond part.\n***\nThird part.\n***",
    "First.\n***\n\n***\nThird.",
    "The hills are first.\n\nWater comes second.",
    "The hills are first.\n\nWater, comes second.\n\nThird.",
    "The hills are first.\n\n\n\n'Water' comes after two blank lines.",
    '"Water" begins here.\n\nwater! begins there too.',
    "Dear [name],\nplease send [amount] to [address] by [date].",
    "An open [bracket\nends] on the next line. [] is empty.",
    "Text first.\n\nP.S. Bring boots.",
    "Text first.\nP. S. not close enough\np.p. s. is, with blanks",
    "Text first.\n\nP.P.S Bring a map, too. Note: the map is old.",
    "* one\n* two\n* three",
    "- one\n  - nested\n* two\n** not a bullet **",
    "*\n* after an empty bullet\n---\n*",
    "A line.\n*emphasis* at the start of a line\n\n   * indented",
    "This is *one* and **two** and ***three*** and * * and **  ** and *open",
    "**Bold title**\n\n*Italic* words, *more* of them, and *yet* more.",
    "SECTION 1\nFirst.\nSECTION 2\nSecond.",
    "Section 1: the river. section 2: the bridge. Section2.",
    "Day 1 we rest. Day 2 we walk. Day  3 has two blanks. Day 4\nDay5.",
    '{"river": "Rhine", "length": 1230}',
    '```json\n{"bridges": [1, 2, {"stone": null}]}\n```',
    "```JSON\n[1, 2.5e3, true]```",
    "```\n{'single': 'quotes'}\n```",
    '{"open": [1, 2}',
    "12",
    '"a quoted string alone"',
    '"It is quoted," she said, "twice."',
    '"The whole text is quoted.\n\nIt has two paragraphs."',
    "<<A River Poem>>\nThe water falls.",
    "<< >>\n<<>>\n<<<>>>",
    "x << y and y >> z, and <<title >> at the end",
    "First response.\n******\nSecond response.",
    "Same.\n******\nSame.",
    "One.\n******\nTwo.\n******\nThree.",
    "******\nOne.\n******\nTwo.\n******",
    "My answer is yes.",
    "I'd say: My answer is maybe. My answer is no, later.",
    "my answer is yes.",
    "Describe a river in your own words. It is water that moves.",
    "describe a RIVER in your own words.\n\nThe river is long.",
    "Sure: Describe a river in your own words. It moves.",
    "The boat leaves at noon. That is all.",
    '"The boat leaves at noon. THAT IS ALL."',
    "That is all. But wait.",
    "We went on foot. Is there anything else I can help with?",
    "We went on foot. Is there anything else I can help with?\n",
]
_TONGUES = [
    "Der Fluss ist lang und tief, und im Winter friert er manchmal zu.",
    "नदी पहाड़ों से निकलकर समुद्र तक जाती है और गाँवों को पानी देती है।",
    "دریا پہاڑوں سے نکل کر سمندر تک جاتا ہے اور کھیتوں کو پانی دیتا ہے",
    "Mto huu unatoka milimani na kufika baharini, na watu wengi huishi kando yake.",
    "La rivière est longue et les ponts sont en pierre.",
    "12345 67890",
    "!!! ??? ...",
    "OK",
    "hello world",
    "HELLO WORLD",
    "こんにちは、川はとても長いです。",
]
_BLANK = ["", " \n\t ", "\n", "*", "* *", "\n\n***\n\n"]


def responses() -> list[str]:
    """Responses of every kind, each as it is and in the dress in which a model may put it."""
    plain = [*_PLAIN, *_FORMS, *_TONGUES]
    dressed = [
        text
        for response in plain
        for text in (
            f"Sure, here is my answer:\n{response}",
            f"{response}\nI hope that it helps!",
            f"Here you are:\n\n{response}\n\nAnything else?",
            f"**{response}**",
        )
    ]
    return list(dict.fromkeys((*plain, *dressed, *_BLANK)))


def rows() -> list[dict[str, Any]]:
    """One row of google/IFEval for each type and arguments."""
    return [
        {
            "key": number,
            "prompt": "Describe a river in your own words.",
            "instruction_id_list": [name],
            "kwargs": [arguments],
        }
        for number, (name, arguments) in enumerate(
            (name, arguments) for name, each in ARGUMENTS.items() for arguments in each
        )
    ]


def responses_to(row: dict[str, Any]) -> list[str]:
    """Responses to a row of google/IFEval, built from its arguments to follow it or to fail by little."""
    prompt = row["prompt"]
    texts = [prompt, f"{prompt}\n\nHere is the answer. It is short, and it is not what was asked for!"]
    pieces: list[str] = []
    for arguments in row["kwargs"]:
        words = [*arguments.get("keywords", ()), *arguments.get("forbidden_words", ())]
        pieces += [
            *(f"The word {word} stands here." for word in words),
            *[f"Say {arguments.get('keyword')} once more."] * arguments.get("frequency", 0),
            arguments.get("letter", "") * arguments.get("let_frequency", 0),
            *[f"* point {number}" for number in range(arguments.get("num_bullets", 0))],
            *[f"*part {number}* is lit" for number in range(arguments.get("num_highlights", 0))],
            *[f"[blank {number}]" for number in range(arguments.get("num_placeholders", 0))],
            *[
                f"{arguments.get('section_spliter')} {number + 1}\nSome text."
                for number in range(arguments.get("num_sections", 0))
            ],
            *["WORD"] * arguments.get("capital_frequency", 0),
            *["Short one."] * arguments.get("num_sentences", 0),
            " ".join(["word"] * arguments.get("num_words", 0)),
            arguments.get("postscript_marker", ""),
            arguments.get("end_phrase", ""),
        ]
    body = "\n".join(filter(None, pieces))
    repeated = next((each["prompt_to_repeat"] for each in row["kwargs"] if "prompt_to_repeat" in each), "")
    first = next((each["first_word"] for each in row["kwargs"] if "first_word" in each), "Text")
    texts += [
        body,
        f"{repeated}\n\n{body}",
        f"Sure!\n{body}\nDone.",
        f'"{body}"',
        body.upper(),
        body.lower().replace(",", ""),
        f"<<Title>>\n{body}\n******\n{body}!",
        *("\n***\n".join([f"{first} and {body[:200]}"] * number) for number in (2, 3, 5)),
        *("\n\n".join([f"{first} and {body[:200]}"] * number) for number in (2, 3, 4)),
        json.dumps({"answer": body}),
    ]
    return list(dict.fromkeys(texts))
