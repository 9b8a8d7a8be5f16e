"""The documentation site is built without a warning, and its reference has what the code has."""

from __future__ import annotations

import html
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from conch.cli import describe
from conch.config import Section
from conch.evaluation.sampling.run import BestOfNRunConfig
from conch.reference.server_config import ReferenceServerConfig
from conch.reward_server.server_config import RewardServerConfig
from conch.rollouts.server_config import ServerConfig
from conch.service.service_config import ServiceConfig
from conch.trainers.async_grpo import AsyncGRPORunConfig
from conch.trainers.grpo import GRPORunConfig
from conch.trainers.ilql import ILQLRunConfig
from conch.trainers.ppo import PPORunConfig
from conch.trainers.reward_model import RewardModelRunConfig
from conch.trainers.rft import RFTRunConfig
from conch.trainers.sft import SFTRunConfig
from tests.forks import quick_python
from tests.unit.test_doors import NAMES, VERBS

ROOT = Path(__file__).resolve().parents[2]
PAGES: dict[str, type[Section]] = {
    "ppo": PPORunConfig,
    "grpo": GRPORunConfig,
    "async_grpo": AsyncGRPORunConfig,
    "rft": RFTRunConfig,
    "ilql": ILQLRunConfig,
    "sft": SFTRunConfig,
    "reward_model": RewardModelRunConfig,
    "best_of_n": BestOfNRunConfig,
    "rollout_server": ServerConfig,
    "reference_server": ReferenceServerConfig,
    "reward_server": RewardServerConfig,
    "service": ServiceConfig,
}
"""Page of the settings -> the section that it lists."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pages, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    recipe = re.search(r"-m sphinx (.+?) --doctree-dir", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert recipe is not None and "--fail-on-warning" in recipe[1]
    command = [quick_python(), "-m", "sphinx", *recipe[1].split(), "--doctree-dir", str(folder / "trees")]
    build = subprocess.run(
        [*command, ".", str(folder / "pages")], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert build.returncode == 0, build.stdout + build.stderr
    return folder / "pages"


def page(site: Path, name: str) -> str:
    return (site / "docs" / f"{name}.html").read_text(encoding="utf-8")


def words(text: str) -> str:
    """What a reader sees of a page, blanks as one."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())


def test_every_page_of_the_docs_is_in_the_site(site: Path) -> None:
    sources = [*(ROOT / "docs").rglob("*.md")]
    assert len(sources) > 40
    assert [
        str(path) for path in sources if not (site / path.relative_to(ROOT)).with_suffix(".html").is_file()
    ] == []


def test_what_a_block_needs_is_shown_above_it(site: Path) -> None:
    text = page(site, "eight_gpus")
    assert "Needs: GPUs; models or datasets of the Hugging Face hub." in words(text)
    assert "<!-- needs" not in text


@pytest.mark.parametrize("name", PAGES)
def test_every_key_is_listed_with_its_default_and_its_docstring(site: Path, name: str) -> None:
    text = page(site, f"reference/settings/{name}")
    shown = words(text)
    described = describe(PAGES[name]).splitlines()
    keys = [line.split(": ", 1) for line in described if not line.startswith("      ")]
    assert len(keys) > 5
    for key, about in keys:
        assert f'id="{key.strip()}"' in text
        assert words(html.escape(about.replace("NoneType", "None"))) in shown
    sentences = [line.strip() for line in described if line.startswith("      ")]
    lost = [line for line in sentences if " ".join(line.replace("`", "").split()) not in shown]
    assert lost == []


def test_every_run_configuration_has_a_page() -> None:
    doors = {name for names in NAMES.values() for name in names if name.endswith("RunConfig")}
    assert doors <= {section.__name__ for section in PAGES.values()}


def test_every_command_is_shown_with_its_help(site: Path) -> None:
    text = page(site, "reference/commands")
    shown = {name.replace("_", "-") for name in re.findall(r'<section id="conch-([\w-]+)"', text)}
    plain = html.unescape(re.sub(r"<[^>]+>", "", text))
    in_short = {*re.findall(r"^  ([\w-]+) +conch [\w -]+$", plain, re.MULTILINE)}
    verbs = {verb.replace("_", "-") for verb in VERBS} - in_short
    assert len(verbs) > 10 and {verb.replace(" ", "-") for verb in verbs} - shown == set()
    assert {"serve-up", "serve-swap"} <= shown
    assert "usage: conch" in words(text) and str(ROOT) not in text


def addresses(name: str) -> Iterator[str]:
    from conch.reward_server.forms import ADDRESSES
    from conch.service.app import make_app
    from conch.service.runs.runs import Runs

    if name == "reward":
        yield from (f"POST {path}" for path in ADDRESSES)
        yield from ("GET /health", "GET /metrics", "POST /v2/models/NAME/infer")
        return
    if name == "rollout":
        yield from ("GET /health", "POST /weights", "POST /generate")
        yield from (
            "GenerateRequest",
            "WeightUpdate",
            "CompletionReply",
            "Failure",
            "version that it samples from",
        )
        yield "A line for each completion, as it ends"
        return
    if name == "reference":
        yield from ("GET /health", "POST /logprobs", "ReferenceHealth", "LogprobRequest", "LogprobReply")
        yield from (
            "R, the columns that hold responses.",
            "application/octet-stream",
        )
        return
    schema = make_app(Runs(Path("never-made"), idle_s=1.0, stop_s=1.0), ServiceConfig()).openapi()
    yield from (f"{method.upper()} {path}" for path, each in schema["paths"].items() for method in each)


@pytest.mark.parametrize("server", ["reward", "training", "rollout", "reference"])
def test_every_address_is_listed(site: Path, server: str) -> None:
    sections = re.split(r"<h2>(\w+) (?:service|server)", page(site, "reference/http"))
    shown = words(dict(zip(sections[1::2], sections[2::2], strict=True))[server.capitalize()])
    listed = list(addresses(server))
    assert len(listed) > 6 and [name for name in listed if name not in shown] == []
    assert "ValidationError" not in shown, "what cannot be read is refused in a sentence"


def test_objects_that_users_import_are_listed(site: Path) -> None:
    shown = re.findall(r'<dt [^>]*id="([\w.]+)"', page(site, "reference/python"))
    known = {
        f"{module}.{name}"
        for module, names in NAMES.items()
        for name in names
        if not name.endswith("RunConfig") and not name.startswith("__") and name != "TrainingSettings"
    }
    assert len(known) > 10 and known - {*shown} == set()
