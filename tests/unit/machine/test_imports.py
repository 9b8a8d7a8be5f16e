"""Libraries are imported while the collector is off; it is then as it was."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from conch.machine.imports import left_out, uncollected

ROOT = Path(__file__).resolve().parents[3]


def test_collector_is_off_meanwhile_and_on_again_after_an_error() -> None:
    assert gc.isenabled()
    with pytest.raises(ImportError), uncollected():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


def test_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


_LOADS = """
import gc, sys
seen = []
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers"):
            seen.append((name, gc.isenabled()))
sys.meta_path.insert(0, Watch())
import importlib
importlib.import_module(sys.argv[1])
print(seen, gc.isenabled())
"""


@pytest.mark.parametrize("name", ["reward_model", "tokenizer_model", "stacked_model"])
def test_served_models_import_their_libraries_uncollected(name: str) -> None:
    command = [sys.executable, "-c", _LOADS, f"conch.converters.triton_models.{name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() and "True)" not in done.stdout and done.stdout.endswith(" True\n")
    assert "('transformers', False)" in done.stdout


def test_package_is_not_there_meanwhile_unless_it_was_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "package_of_a_test_of_imports"
    (tmp_path / f"{name}.py").write_text("VALUE = 3\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with left_out(name), pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, importlib.import_module(name))
    with left_out(name):
        assert importlib.import_module(name).VALUE == 3


_SAVES = """
import sys
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel
from conch.runs.checkpoint import save_model
from examples.letters import tokenizer_of
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8))
save_model(Path(sys.argv[1]), model, tokenizer_of("abc", 8))
print("deepspeed" in sys.modules)
"""


def test_checkpoint_is_saved_without_loading_deepspeed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _SAVES, str(tmp_path / "saved")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False" and (tmp_path / "saved" / "model.safetensors").exists()
