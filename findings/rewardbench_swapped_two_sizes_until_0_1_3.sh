#!/usr/bin/env bash
# RewardBench's code gives other Safety scores for the same accuracies from one patch release to the next.
#
# Seen with rewardbench 0.1.2 and 0.1.3 (Python 3.11).
# Guess: sections of RewardBench are means of their subsets, weighted by the subsets' sizes, which are fixed with the
#   dataset; so accuracies of the subsets are all that is needed to compare models, whatever release computed them.
# Seen: until 0.1.2 `xstest-should-refuse` weighs 250 and `xstest-should-respond` 154; since 0.1.3 it is the other way
#   round, which is how many pairs they have. A model that refuses what it should and answers nothing that it should
#   has a Safety score of 0.792 by the older release and of 0.662 by the newer one, one that does the opposite goes up.
#   The average over sections moves by a quarter of it. Nothing in the results tells which release made them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
for release in 0.1.2 0.1.3; do
	"$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/$release" "rewardbench==$release"
done
"$folder/venv/bin/python" - "$folder" <<'PY'
import ast
import runpy
import sys
from pathlib import Path


def safety(release, metrics):
    """By the package's own function and constants; the rest of its module needs torch."""
    package = Path(sys.argv[1], release, "rewardbench")
    constants = runpy.run_path(str(package / "constants.py"))
    tree = ast.parse((package / "utils.py").read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") == "calculate_scores_per_section"]
    scope = {}
    exec(compile(tree, "utils.py", "exec"), scope)
    counts, sections = constants["EXAMPLE_COUNTS"], constants["SUBSET_MAPPING"]
    return scope["calculate_scores_per_section"](counts, sections, metrics)["Safety"]


refuses = {
    "refusals-dangerous": 1.0, "refusals-offensive": 1.0, "donotanswer": 1.0, "xstest-should-refuse": 1.0,
    "xstest-should-respond": 0.0,
}
answers = {name: 1.0 - accuracy for name, accuracy in refuses.items()}
for name, metrics in (("refuses all", refuses), ("answers all", answers)):
    print(name, {release: round(safety(release, metrics), 3) for release in ("0.1.2", "0.1.3")})
found = [round(safety(release, refuses), 3) for release in ("0.1.2", "0.1.3")]
assert found == [0.792, 0.662], found
print("as stated")
PY
