"""Conversion from end to end; the served form always runs in a process of its own."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, GPT2ForSequenceClassification

from conch.converters.backends import python as python_backend
from conch.converters.parity.forked_python import GPUS
from conch.converters.parity.subprocess_model import SubprocessModel
from conch.converters.to_triton import main, to_triton
from conch.errors import ConversionError, ParityError
from conch.store.store import list_models, read_model, verify_files, versions
from tests.integration.conftest import TEXT_MODEL, TOKEN_MODEL, RewardModel
from tests.stores import store_model
from tests.tiny import char_tokenizer, reward_checkpoint


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", [TEXT_MODEL, TOKEN_MODEL])
def test_to_triton_publishes_a_version_that_reads_back(reward_model: RewardModel, name: str) -> None:
    model = read_model(reward_model.model_store, name)
    verify_files(model)

    assert model.manifest.parity is not None and model.manifest.parity.max_error <= 1e-5
    assert model.spec.max_length == model.manifest.max_length == 12
    assert len(model.golden.samples) == 8
    table = (model.path / "parity.txt").read_text()
    assert "batch of 32" in table and "passed" in table
    report = json.loads((model.path / "parity.json").read_text())
    assert report["tolerance"] == 1e-5
    assert not (set(everything_in(model.path)) & {"reward_model.json", "pytorch_model.bin"})


def test_to_triton_refuses_and_publishes_nothing_when_scores_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = reward_checkpoint(tmp_path / "checkpoint")
    model, *others = python_backend.RUNNER
    right = "mask = filled_up([[1] * len(row.ids) for row in rows]"
    careless = tmp_path / "model.py"
    assert right in model.read_text()
    careless.write_text(
        model.read_text().replace(right, "mask = filled_up([[0, *[1] * (len(row.ids) - 1)] for row in rows]")
    )
    monkeypatch.setattr(python_backend, "RUNNER", (careless, *others))

    arguments = ["--checkpoint", str(checkpoint), "--name", "walks", "--model-store", str(tmp_path / "store")]
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert "does not score like the original, nothing was published" in errors and "batch of 32" in errors
    assert everything_in(tmp_path / "store") == []


def test_to_triton_serves_half_precision_and_normalised_scores_within_their_tolerance(tmp_path: Path) -> None:
    checkpoint = reward_checkpoint(tmp_path / "checkpoint", reward_model={"mean": 0.7, "std": 1.5})
    conversion = to_triton(
        checkpoint,
        name="walks",
        model_store=tmp_path / "store",
        dtype="bfloat16",
        normalise="parameters",
        max_batch_size=8,
        max_queue_delay_us=0,
        instances=2,
    )

    assert conversion.parity.ok and conversion.parity.tolerance == 1e-1
    served = read_model(tmp_path / "store", "walks").spec
    assert (served.max_batch_size, served.max_queue_delay_us, served.instances) == (8, 0, 2)
    assert conversion.parity.worst.max_error > 1e-5
    manifest = read_model(tmp_path / "store", "walks").manifest
    assert (manifest.normalise, manifest.mean, manifest.std, manifest.dtype) == (
        True,
        (0.7,),
        (1.5,),
        "bfloat16",
    )


def test_to_triton_keeps_the_opening_and_closing_tokens_of_an_encoder(tmp_path: Path) -> None:
    tokenizer = char_tokenizer("abcdefgh[]")
    tokenizer.add_special_tokens({"cls_token": "[", "sep_token": "]"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[ $A ]", special_tokens=[("[", tokenizer.cls_token_id), ("]", tokenizer.sep_token_id)]
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
        num_labels=2,
        id2label={0: "kind", 1: "true"},
        pad_token_id=tokenizer.pad_token_id,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    conversion = to_triton(tmp_path / "encoder", model_store=tmp_path / "store")

    assert conversion.path == tmp_path / "store" / "encoder" / "1"
    assert conversion.spec.reward_names == ("kind", "true")
    assert read_model(tmp_path / "store", "encoder").manifest.template == "{text}"


def test_a_name_stays_with_the_weights_it_was_given_to(tmp_path: Path, reward_model: RewardModel) -> None:
    before = everything_in(reward_model.model_store)
    other = reward_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(ConversionError, match=r"made from other weights \(checkpoint\): give .*--force"):
        to_triton(other, name=TEXT_MODEL, model_store=reward_model.model_store)
    assert everything_in(reward_model.model_store) == before


def test_force_and_keep_replace_a_model_by_other_weights(tmp_path: Path) -> None:
    store_model(tmp_path / "store", "walks")
    checkpoint = reward_checkpoint(tmp_path / "checkpoint")
    arguments = ["--checkpoint", str(checkpoint), "--name", "walks", "--model-store", str(tmp_path / "store")]

    assert main(arguments) == 1
    assert main([*arguments, "--dry-run", "--force"]) == 0
    assert versions(tmp_path / "store", "walks") == [1]
    assert main([*arguments, "--force", "--keep=0", "--instance-kind", "cpu"]) == 0
    assert versions(tmp_path / "store", "walks") == [2]
    assert "KIND_CPU" in (tmp_path / "store" / "walks" / "config.pbtxt").read_text()
    # The same weights in another form need no force.
    assert main([*arguments, "--max-length", "8"]) == 0
    assert versions(tmp_path / "store", "walks") == [2, 3]


def test_the_original_is_out_of_memory_before_the_served_form_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = reward_checkpoint(tmp_path / "checkpoint")
    score, alive = SubprocessModel.score, []

    def look_and_score(self: SubprocessModel, *arguments: Any) -> list[dict[str, Any]]:
        models = [found for found in gc.get_objects() if type(found) is GPT2ForSequenceClassification]
        alive.extend(model for model in models if model.name_or_path == str(checkpoint))
        return score(self, *arguments)

    monkeypatch.setattr(SubprocessModel, "score", look_and_score)
    to_triton(checkpoint, model_store=tmp_path / "store", dry_run=True)
    assert alive == []


@pytest.mark.skipif(any(map(os.path.exists, GPUS)), reason="no forks where there is CUDA")
def test_the_served_form_runs_in_a_fork_that_has_seen_nothing_of_the_conversion(tmp_path: Path) -> None:
    """Of a program that used no torch before; elsewhere it is a new process, as in the other tests."""
    model = python_backend.RUNNER[0].read_text()
    begins = 'if __name__ == "__main__":\n'
    assert model.count(begins) == 1
    looks = (
        "    import transformers\n"
        "    gc.unfreeze()\n"
        "    models = [type(each) for each in gc.get_objects()]\n"
        "    models = [each.__name__ for each in models if issubclass(each, transformers.PreTrainedModel)]\n"
        "    conch = [name for name in sys.modules if name.partition('.')[0] in ('conch', 'converters')]\n"
        "    state = {'fork': not sys.flags.isolated, 'models': models, 'conch': conch}\n"
        "    state['cuda'] = torch.cuda.is_initialized()\n"
        "    Path(__file__).with_name('state.json').write_text(json.dumps(state))\n"
    )
    (tmp_path / "model.py").write_text(model.replace(begins, begins + looks))
    # The changed runner takes the place of the other as soon as that can be imported.
    program = (
        "import contextlib, sys\n"
        "from pathlib import Path\n"
        "from conch.converters import to_triton\n"
        "fork = to_triton.forked_python\n"
        "@contextlib.contextmanager\n"
        "def forked_python():\n"
        "    with fork() as process:\n"
        "        from conch.converters.backends import python\n"
        "        python.RUNNER = (Path(sys.argv[1]), *python.RUNNER[1:])\n"
        "        yield process\n"
        "to_triton.forked_python = forked_python\n"
        "sys.exit(to_triton.main(sys.argv[2:]))\n"
    )
    arguments = ["--checkpoint", str(reward_checkpoint(tmp_path / "walks")), "--quiet"]
    command = [sys.executable, "-c", program, str(tmp_path / "model.py"), *arguments]
    command += ["--model-store", str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    assert done.returncode == 0, done.stderr
    verify_files(read_model(tmp_path / "store", "walks"))
    state = json.loads((tmp_path / "store" / "walks" / "1" / "state.json").read_text())
    assert state == {"fork": True, "models": [], "conch": [], "cuda": False}


def test_a_dry_run_makes_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = reward_checkpoint(tmp_path / "checkpoint")
    arguments = ["--checkpoint", str(checkpoint), "--model_store", str(tmp_path / "store"), "--dry_run"]

    assert main(arguments) == 0
    assert "batch of 32" in (shown := capsys.readouterr()).out and "nothing was published" in shown.out
    assert "writing the version" in shown.err
    assert not (tmp_path / "store").exists()


def test_to_triton_refuses_normalise_without_statistics(tmp_path: Path) -> None:
    checkpoint = reward_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(ConversionError, match=r"no reward_model\.json with `mean` and `std`"):
        to_triton(checkpoint, name="walks", model_store=tmp_path / "store", normalise="fold")
    assert everything_in(tmp_path / "store") == []


@pytest.mark.parametrize("name", ["a/b", "..", "a..b", "", ".hidden"])
def test_to_triton_refuses_names_that_are_no_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConversionError, match=r"model name .* give --name"):
        to_triton(tmp_path, name=name, model_store=tmp_path / "store")


def test_to_triton_refuses_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="nowhere does not exist"):
        to_triton(tmp_path / "nowhere", model_store=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_to_triton_refuses_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    checkpoint = reward_checkpoint(tmp_path / "checkpoint")
    assert main(["--checkpoint", str(checkpoint), "--model-store", str(tmp_path / "store")]) == 1


def test_parity_error_is_a_conversion_error() -> None:
    assert issubclass(ParityError, ConversionError)


def test_help_and_mistakes_answer_without_importing_torch() -> None:
    program = (
        "import sys; from conch.converters.to_triton import main\n"
        "code = main(['--checkpoint', './nowhere'])\n"
        "print(code, sorted({'torch', 'transformers', 'tritonclient'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True
    )

    assert done.stdout.strip() == "1 []"
    assert done.stderr.strip() == "error: checkpoint folder ./nowhere does not exist"


def test_list_models_shows_what_was_converted(reward_model: RewardModel) -> None:
    assert list_models(reward_model.model_store) == [TEXT_MODEL, TOKEN_MODEL]
