"""Score samples or pairs with any reward, from the command line: docs/scoring.md has recipes.

    conch score --url 127.0.0.1:8001/walks samples.jsonl > scores.jsonl
    conch score --url 127.0.0.1:8001/walks pairs.parquet --output scores.parquet --report report.json
    conch score --reward verifier:gsm8k answers.csv --output scores.csv --keep
    conch score --url 127.0.0.1:8001/walks --against outputs/reward_model --tolerance 1e-3 samples.jsonl
    echo '{"text": "The film was fine."}' | conch score --url 127.0.0.1:8001/walks

Each row gets a line, in order: {"index", "status", "scores", ...}, of a pair {"chosen_score",
"rejected_score", "margin", "correct"}. A row without a score has another status than "ok" and says why in
"detail"; it never gets a number.

Exit codes: 0 all rows have scores, 1 nothing could be asked, 2 some rows have none, 3 scores differ from
those of --against by more than --tolerance.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from conch.cli import CommandParser, add_options, parse_options, written_with
from conch.errors import ConchError
from conch.log import setup_logging
from conch.scoring.options import ScoreOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = CommandParser(
        prog="conch score",
        description=ScoreOptions.__doc__,
        epilog="Underscores will do for dashes. Exit codes: 0 all rows have scores, 1 nothing could be "
        "asked, 2 some rows have none, 3 scores differ by more than --tolerance.",
    )
    add_options(parser, ScoreOptions)
    arguments = vars(parser.parse_args(written_with("-", sys.argv[1:] if argv is None else argv)))
    setup_logging()
    # `--help` answers at once: what reads rows brings transformers.
    from conch.scoring.session import Scoring

    scoring: Scoring | None = None
    try:
        with contextlib.ExitStack() as stack:
            scoring = Scoring(parse_options(ScoreOptions, arguments), stack)
            scoring.run()
    except ConchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if scoring is not None and scoring.report.rows else 1
    except KeyboardInterrupt:
        print("stopped: with --output, the same command goes on from there", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the scores has left; what Python still has for them must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    return scoring.conclude()


if __name__ == "__main__":
    sys.exit(main())
