"""The study of overoptimisation: its entries and settings, its folders, what becomes of Conch's, and the
texts that policy and gold model read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from conch.errors import ConfigError, ConversionError, DataError, ServerStartError
from conch.evaluation.records import EvaluatedSample, EvaluationRecord, record_path, write_record
from conch.evaluation.seed_files import read_seed_file
from examples.hosting import launchers_note, tell
from examples.overoptimisation import gold as study_gold
from examples.overoptimisation.entries import read_settings
from examples.overoptimisation.layout import run_folder, write_names
from examples.overoptimisation.prompts import alpaca, names_of, read_prompts, with_marks
from examples.overoptimisation.run_ppo_gold_eval import main as gold_eval
from examples.overoptimisation.served import (
    Serving,
    check_together,
    has_address,
    in_store,
    joined,
    served,
    served_rewards,
    stored_name,
)
from examples.overoptimisation.settings import GoldSettings, RankSettings, StudyConfig
from examples.overoptimisation.translation import batches_of, run_config
from tests.fakes.json_rewards import endpoint
from tests.integration.overoptimisation_models import reward_model
from tests.stores import store_model

BASE = ["--configs", "defaults", "defaults_rlhf"]
MINE: dict[str, Any] = {
    "datasets": ["rows.jsonl"],
    "rank_config": {"model_names": ["models/rm_seed{seed}"]},
    "sft_config": {"model_name": "models/sft"},
}


def entries_in(folder: Path, **entries: Any) -> list[str]:
    """Words that take the project's defaults and entries of one's own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config_rl.yaml").write_text(yaml.safe_dump({"defaults": {}, "mine": MINE, **entries}))
    (folder / "config_ppo.yaml").write_text("method: {num_rollouts: 4}\n")
    return ["--config_dir", str(folder), "--configs"]


def settings(*words: str) -> StudyConfig:
    return read_settings(list(words))[0]


# -------------------------------------------------------------------------------------------------- the
# settings


@pytest.mark.parametrize("entry", ["pythia_rlhf_individual", "pythia_rlhf_ensemble"])
def test_the_entries_that_come_with_the_study_are_valid(entry: str) -> None:
    seed = ["--rm_seed", "3"] if entry.endswith("individual") else []
    config = settings(*BASE, entry, *seed)
    assert config.gold_config is not None and config.gold_config.is_alpacafarm_rm
    assert config.reward_models[0].startswith("models/rm-pythia-44m_seed")
    if seed:
        assert config.reward_models == ("models/rm-pythia-44m_seed3",)


def test_entries_are_laid_over_each_other_and_words_over_all(tmp_path: Path) -> None:
    words = entries_in(
        tmp_path,
        low={"ppo_config": {"train": {"total_steps": 8}, "method": {"lam": 0.9}}, "eval_size": 7},
        high={
            "ppo_config": {"train": {"total_steps": 9}},
            "gold_config": {"model_name": "g"},
            "cache_dir": ".cache",
        },
    )
    more = ["gold_config.batch_size=5", "--rm_seed", "4", "--debug", "conch.train.eval_repeats=3"]
    names = ["--rank_config.objective_name=WCO", "--sft-config.model_name", "other"]
    config, notes = read_settings([*words, "mine,low", "high", *more, *names])
    assert (config.ppo_config.train.total_steps, config.ppo_config.method.lam, config.eval_size) == (
        9,
        0.9,
        7,
    )
    assert config.gold_config == GoldSettings(model_name="g", batch_size=5)
    assert config.reward_models == ("models/rm_seed4",) and config.debug
    assert config.rank_config.objective_name == "WCO" and config.sft_config.model_name == "other"
    assert config.conch == {"train": {"eval_repeats": 3}}
    assert any(".cache" in note for note in notes) and not any("datasets_extra" in note for note in notes)


def test_the_fields_of_the_papers_own_files_are_taken(tmp_path: Path) -> None:
    theirs = {
        "datasets_extra": [],
        "rank_config": {"is_reward_model": True, "cache_dir": ".cache", "pooling": "last", "dtype": "bf16"},
        "sft_config": {
            "quantization": False,
            "seq2seqmodel": False,
            "freeze_layer": None,
            "residual_dropout": 0.2,
        },
        "ppo_config": {
            "train": {"pipeline": "PromptPipeline", "seq_length": 2032},
            "method": {"ref_mean": None},
        },
    }
    config, notes = read_settings([*entries_in(tmp_path, theirs=theirs), "mine", "theirs", "--rm_seed", "1"])
    assert config.rank_config.dtype == "bfloat16" and len(notes) >= 5


ENSEMBLE = {"rank_config": {"model_names": ["a/rm", "b/rm", "c"]}}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["mine"], "say which by --rm_seed N"),
        (["mine", "ensemble", "--rm_seed", "1"], "--rm_seed 1 has no `{seed}`"),
        (["mine", "rank_config.model_names=['a{seed}', b]", "--rm_seed", "1"], "one seed of a single model"),
        (["mine", "rank_config.model_names=[a, a]"], "a twice"),
        (["mine", "ensembel"], "did you mean ensemble?"),
        (["mine", "--rm_seed", "1", "gold_config.modle_name=x"], "did you mean `gold_config.model_name`"),
        (["mine", "--rm_seed", "1", "--gold_cnfig.model_name", "x"], "did you mean `gold_config`"),
        (["mine", "ensemble", "rank_config.objective_name=median"], "objective_name"),
        (["mine", "ensemble", "sft_config.quantization=true"], "no weights are quantised"),
        (["mine", "ensemble", "prompt_template=hi"], "no {instruction} in it"),
        (["mine", "rank_config.model_names=[a{seed}]"], "quotes stand around a text with braces"),
        (["mine", "ensemble", "oops"], "there is no entry `oops`"),
    ],
)
def test_mistakes_are_told_in_a_sentence(words: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(*entries_in(tmp_path, ensemble=ENSEMBLE), *words)
    assert sentence in str(caught.value), str(caught.value)


def test_one_dataset_need_not_be_a_list(tmp_path: Path) -> None:
    words = [*entries_in(tmp_path, ensemble=ENSEMBLE), "mine", "ensemble"]
    assert settings(*words, "datasets=rows.jsonl").datasets == ("rows.jsonl",)
    assert settings(*words, "datasets={train: a, eval: b}").datasets == ({"train": "a", "eval": "b"},)


def test_a_folder_without_entries_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no config_rl"):
        settings("--config_dir", str(tmp_path), "--configs", "a")


# -------------------------------------------------------------------------------------------------- the
# folders


def study(tmp_path: Path, *words: str, **entries: Any) -> StudyConfig:
    return settings(
        *entries_in(tmp_path / "cfg", ensemble=ENSEMBLE, **entries), *words, f"output_dir={tmp_path}"
    )


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["mine", "--rm_seed", "3"], "seed3"),
        (["mine", "rank_config.model_names=./models/rm"], "models_rm"),
        (["mine", "ensemble"], "ensemble_mean"),
        (
            ["mine", "ensemble", "rank_config.objective_name=WCO", "rank_config.uwo_weight=0.5"],
            "ensemble_WCO",
        ),
        (
            ["mine", "ensemble", "rank_config.objective_name=UWO", "rank_config.uwo_weight=0.5"],
            "ensemble_UWO-0.5",
        ),
        (["mine", "ensemble", "--rng_seed", "7"], "ensemble_mean_rng7"),
    ],
)
def test_folders_are_named_as_the_papers(words: list[str], name: str, tmp_path: Path) -> None:
    assert run_folder(study(tmp_path, *words)) == tmp_path / name


def test_studies_of_other_members_do_not_write_over_each_other(tmp_path: Path) -> None:
    first = study(tmp_path, "mine", "ensemble")
    folder = run_folder(first)
    write_names(folder, first.reward_models)
    assert run_folder(first) == folder
    other = study(tmp_path, "mine", "ensemble", "rank_config.model_names=[a/rm, b/rm, d]")
    assert run_folder(other) != folder and run_folder(other).name.startswith("ensemble_mean_")
    write_names(run_folder(other), other.reward_models)
    assert run_folder(other) == run_folder(other) and run_folder(first) == folder


def test_members_have_names_of_their_own() -> None:
    assert names_of(["a/rm", "b/rm/", "c"]) == {"rm-1": "a/rm", "rm-2": "b/rm/", "c": "c"}


# --------------------------------------------------------------------------------------------------- the run


def made(config: StudyConfig, processes: int = 1, *, on_gpu: bool = False) -> Any:
    reward = {"url": "127.0.0.1:1/a"}
    return run_config(config, Path("run"), reward, num_processes=processes, on_gpu=on_gpu)


def test_the_papers_settings_become_a_run() -> None:
    config = settings(*BASE, "pythia_rlhf_individual", "--rm_seed", "1")
    run = made(config, on_gpu=True)
    assert (run.train.total_steps, run.train.eval_every, run.train.save_every) == (750, 25, 250)
    assert (run.ppo.rollouts_per_step, run.ppo.epochs, run.ppo.minibatches) == (4, 4, 1)
    assert (run.ppo.kl.coef, run.ppo.kl.target, run.ppo.kl.horizon) == (0.1, 6.0, 10_000)
    assert (run.ppo.lam, run.ppo.clip_ratio, run.ppo.clip_value, run.shaping.clip) == (0.95, 0.2, 0.2, 10.0)
    assert (run.optimizer.learning_rate, run.optimizer.weight_decay) == (1e-6, 1e-6)
    assert run.scheduler.name == "constant", "their cosine lasts for more than three runs"
    assert (run.generation.max_new_tokens, run.generation.chunk_size) == (256, 2)
    assert run.model.num_layers_unfrozen == 2 and run.train.mixed_precision == "bf16"
    assert made(config).train.mixed_precision is None
    assert run.train.resume == "auto"


@pytest.mark.parametrize(
    ("rollouts", "batch", "processes", "expected"),
    [
        (4, 32, 1, (4, 1)),
        (128, 32, 1, (128, 4)),
        (128, 32, 2, (256, 4)),
        (100, 32, 1, (100, 4)),
        (5, 2, 1, (5, 5)),
    ],
)
def test_samples_of_a_process_become_samples_of_all(
    rollouts: int, batch: int, processes: int, expected: tuple[int, int], tmp_path: Path
) -> None:
    words = [f"ppo_config.method.num_rollouts={rollouts}", f"ppo_config.train.batch_size={batch}"]
    batches = batches_of(study(tmp_path, "mine", "ensemble", *words), processes)
    assert (batches.rollouts, batches.minibatches) == expected
    assert batches.updates == 4 * batches.minibatches
    assert batches.steps == -(-3000 // batches.updates)


def test_settings_of_conchs_own_go_through_and_those_with_a_name_here_do_not(tmp_path: Path) -> None:
    run = made(
        study(tmp_path, "mine", "ensemble", "conch.train.eval_repeats=8", "conch.ppo.whiten_rewards=true")
    )
    assert run.train.eval_repeats == 8 and run.ppo.whiten_rewards and run.ppo.epochs == 4
    with pytest.raises(ConfigError, match=r"conch.train.run_dir"):
        made(study(tmp_path, "mine", "ensemble", "conch.train.run_dir=x"))
    for word in ("conch.evaluation.keep=false", "conch.train.eval_every=0"):
        with pytest.raises(ConfigError, match="evaluations that its runs keep"):
            made(study(tmp_path, "mine", "ensemble", word))
    cosine = study(tmp_path, "mine", "ensemble", "ppo_config.scheduler.kwargs.T_max=3000")
    assert made(cosine).scheduler.name == "cosine"


# -------------------------------------------------------------------------------------------------- the texts


def rows(file: Path, content: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in content))
    return file


def test_instructions_become_prompts_with_the_instruction_beside(tmp_path: Path) -> None:
    content = [
        {"instruction": f"Do {n}.", "input": "x\ny" if n % 2 else "", "output": "no"} for n in range(20)
    ]
    file = rows(tmp_path / "rows.jsonl", content)
    config = study(tmp_path, "mine", "ensemble", f"datasets=[{file}]", "num_eval_prompts=1")
    train, held = read_prompts(config, "<|endoftext|>")
    assert train[1] == {
        "prompt": "<|prompter|>Do 1.\nx\ny<|endoftext|><|assistant|>",
        "instruction": "Do 1.",
        "input": "x\ny",
    }
    assert (
        (len(train), len(held)) == (18, 1) and held[0]["instruction"] == "Do 18." and "input" not in held[0]
    )
    chat = study(tmp_path, "mine", "ensemble", f"datasets=[{file}]", "prompt_template=chat", "--debug")
    train, held = read_prompts(chat, "")
    assert train[0]["prompt"] == [{"role": "user", "content": "Do 0."}] and (len(train), len(held)) == (10, 2)
    both = study(tmp_path, "mine", "ensemble", f"datasets=[{{train: {file}, eval: {file}, max_rows: 3}}]")
    assert [len(part) for part in read_prompts(both, "")] == [3, 4]


def test_rows_without_an_instruction_are_told(tmp_path: Path) -> None:
    file = rows(tmp_path / "rows.jsonl", [{"text": "a"}] * 3)
    with pytest.raises(DataError, match="no text `instruction`"):
        read_prompts(study(tmp_path, "mine", "ensemble", f"datasets=[{file}]"), "")
    with pytest.raises(ConfigError, match="`datasets`"):
        read_prompts(study(tmp_path, "mine", "ensemble", f"datasets=[{{trian: {file}}}]"), "")


def test_the_gold_model_of_alpacafarm_sees_the_instruction_and_its_input() -> None:
    told = {"instruction": "Say {input}.", "input": "{instruction} B"}
    text = alpaca(EvaluatedSample(0, "<|prompter|>any", " an answer", 2, {}, {}, told)).sample
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert "### Instruction:\nSay {input}.\n\n### Input:\n{instruction} B\n\n### Response: an answer" in text
    assert "<|prompter|>" not in text
    alone = alpaca(EvaluatedSample(0, "x", "y", 2, {}, {}, {"instruction": "Go."})).sample
    assert "paired with" not in alone and alone.endswith("### Instruction:\nGo.\n\n### Response:y")
    foreign = alpaca(EvaluatedSample(0, "Go on.", "y", 2, {})).sample
    assert foreign.endswith("### Instruction:\nGo on.\n\n### Response:y")


def test_files_of_the_papers_code_get_the_marks_that_its_models_read() -> None:
    text = with_marks(EvaluatedSample(0, "Go.", "Gone", 2, {})).sample
    assert text == "<|prompter|>Go.<|endoftext|><|assistant|>Gone"


# ------------------------------------------------------------------------------------------------- the
# servers


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("127.0.0.1:8001/rm", True),
        ("a:8001,b:8001/rm", True),
        ("http://a/score", True),
        ("verifier:gsm8k", True),
        ("dir/judge.py:judge", True),
        ("models/rm_seed1", False),
        ("owner/name", False),
        ("rm", False),
    ],
)
def test_an_address_is_no_checkpoint(name: str, expected: bool) -> None:
    assert has_address(name) is expected


def test_members_that_are_served_already_are_asked_where_they_are(tmp_path: Path) -> None:
    words = ["rank_config.model_names=[127.0.0.1:1/a, 127.0.0.1:2/b]", "rank_config.objective_name=UWO"]
    config = study(tmp_path, "mine", *words)
    with served_rewards(names_of(config.reward_models), config.rank_config, tmp_path) as reward:
        assert reward["members"] == {"a": "127.0.0.1:1/a", "b": "127.0.0.1:2/b"}
        assert (reward["combine"], reward["uwo_weight"]) == ("uwo", 0.1)
        assert reward["variance"] == "population"
        assert made(config).reward.combine == "sum", "one model has nothing to combine"
    other = study(tmp_path, "mine", *words, "rank_config.variance=sample")
    with served_rewards(names_of(other.reward_models), other.rank_config, tmp_path) as reward:
        assert reward["variance"] == "sample"
    assert run_folder(other).name == f"{run_folder(config).name}_sample" == "ensemble_UWO-0.1_sample"
    for serve_as in ("ensemble", "stacked"):
        together = study(tmp_path, "mine", *words, f"rank_config.serve_as={serve_as}")
        with (
            pytest.raises(ConfigError, match=f"serve_as` = {serve_as} joins .* is served already"),
            served_rewards(names_of(together.reward_models), together.rank_config, tmp_path),
        ):
            pass


def test_members_that_cannot_be_stacked_are_told_what_to_set(tmp_path: Path) -> None:
    for name, family in (("a", "gpt2"), ("b", "gpt_neox")):
        (store_model(tmp_path, name) / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ConversionError, match=r"differ in architecture, .*serve_as=ensemble`\)$") as refused:
        joined(["a", "b"], RankSettings(model_names=("a", "b"), serve_as="stacked"), tmp_path)
    assert "\n" not in str(refused.value)


def test_processes_of_a_launcher_share_a_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    tell(launchers_note(), json.dumps({"models/a": "127.0.0.1:5/a-1"}))
    with served(["models/a", "h:1/b"], Serving(tmp_path)) as endpoints:
        assert endpoints == {"models/a": "127.0.0.1:5/a-1", "h:1/b": "h:1/b"}
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ServerStartError, match="several machines"), served(["models/a"], Serving(tmp_path)):
        pass


def test_members_of_different_outputs_make_no_ensemble(tmp_path: Path) -> None:
    for name, rewards in (("a", ("reward",)), ("b", ("quality",)), ("c", ("helpful", "short"))):
        store_model(tmp_path, name, reward_names=rewards)
    check_together({"models/a": "a", "models/b": "b"}, tmp_path)
    with pytest.raises(ConfigError, match=r"models/a has reward and models/c has helpful, short"):
        check_together({"models/a": "a", "models/b": "b", "models/c": "c"}, tmp_path)
    assert in_store("a", Serving(tmp_path), "") == "a"


def test_a_model_that_is_nowhere_is_told(tmp_path: Path) -> None:
    (tmp_path / "models/rm_seed1").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"did you mean .*rm_seed1\?"):
        in_store(str(tmp_path / "models/rm_sed1"), Serving(tmp_path / "store"), "")
    with pytest.raises(ConfigError, match="is no reward model"):
        in_store("rm", Serving(tmp_path / "store"), "")


def test_a_checkpoint_that_was_trained_anew_gets_another_name_in_the_store(tmp_path: Path) -> None:
    folder = reward_model(tmp_path / "rm seed{1}", 1)

    def name(template: str | None = None) -> str:
        return stored_name(str(folder), str(folder), Serving(tmp_path, template))

    before = name()
    assert before == name() != name("{text}") and before.startswith("rm-seed-1--")
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert name() != before
    assert stored_name("owner/rm", "owner/rm", Serving(tmp_path)).startswith("rm-")


# ---------------------------------------------------------------------------------------------- gold,
# afterwards


SAMPLES = (
    EvaluatedSample(0, "Q: Go.", "a", 1, {"reward": 0.5}, {}, {"instruction": "Go."}),
    EvaluatedSample(1, "Q: Stay.", "bcd", 1, {"reward": 0.25}, {}, {"instruction": "Stay."}),
)


def asked(running: Any) -> list[str]:
    return [text for body in running.asked for text in body["query"] if "Stay." in text or "Go." in text]


def test_a_run_that_was_stopped_gets_its_gold_scores(tmp_path: Path, capsys: Any) -> None:
    for step in (0, 25):
        write_record(record_path(tmp_path, step), EvaluationRecord(step, SAMPLES, {"eval/kl": step / 10}))
    stale = tmp_path / "eval/eval-2.json"
    stale.parent.mkdir()
    stale.write_text("[]")
    with endpoint() as running:
        gold_eval([str(tmp_path / "eval"), running.url, "--is_alpacafarm_rm", "--batch_size", "1"])
        assert len(asked(running)) == 2, "equal samples are asked for once"
        assert all("### Instruction:\n" in text and "Q: " not in text for text in asked(running))
    assert not stale.exists(), "an evaluation that the run has not come to again"
    record = read_seed_file(tmp_path / "eval/eval-1.json")
    assert record.metrics["eval/kl"] == 2.5 and record.step == 25
    scores = [sample.scores["gold"] for sample in record.samples]
    assert scores[0] == float(len(alpaca(SAMPLES[0]).sample)) and scores[1] == len(alpaca(SAMPLES[1]).sample)
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize("own", [True, False], ids=["own", "foreign"])
def test_files_alone_are_scored_as_they_say(own: bool, tmp_path: Path) -> None:
    content = {"instruction": "Go.", "answers": ["a", "bc"], "proxy_scores": [1.0, 2.0]}
    content |= {"prompt": "Q: Go."} if own else {}
    file = tmp_path / "eval-0.json"
    file.write_text(json.dumps([content]))
    with endpoint() as running:
        gold_eval([str(tmp_path), running.url, "--is-alpacafarm-rm", "false"])
        head = "Q: Go." if own else "<|prompter|>Go.<|endoftext|><|assistant|>"
        assert asked(running) == [f"{head}a", f"{head}bc"]
    assert json.loads(file.read_text())[0]["gold_scores"] == [len(head) + 1.0, len(head) + 2.0]


def test_the_reward_model_of_a_run_is_known_at_another_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {"reward": "rm-1234abcd at 127.0.0.1:1"}
    write_record(record_path(tmp_path, 0), EvaluationRecord(0, SAMPLES, sources=sources))
    served = {"models/rm": "127.0.0.1:9/rm-1234abcd"}
    monkeypatch.setattr(study_gold, "hosting", lambda *_: nullcontext(served))
    with pytest.raises(ConfigError, match=r"models/rm is the reward model that .* was learned from"):
        study_gold.gold_scores(tmp_path / "eval", GoldSettings(model_name="models/rm"), tmp_path)


def test_nobody_is_served_where_no_score_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = EvaluationRecord(0, SAMPLES).with_scores("gold", [1.0, 2.0], "models/gold")
    write_record(record_path(tmp_path, 0), record)
    monkeypatch.setattr(study_gold, "hosting", lambda *_: pytest.fail("served"))
    (row,) = study_gold.gold_scores(tmp_path / "eval", GoldSettings(model_name="models/gold"), tmp_path)
    assert row.gold == 1.5 and (tmp_path / "eval/eval-0.json").is_file()
    with endpoint() as running, pytest.raises(ConfigError, match="holds scores `gold` of models/gold"):
        study_gold.gold_scores(tmp_path / "eval", GoldSettings(model_name=running.url), tmp_path)


def test_samples_without_a_score_end_the_program_with_2(tmp_path: Path) -> None:
    write_record(record_path(tmp_path, 0), EvaluationRecord(0, SAMPLES))

    def choosy(samples: list[str]) -> tuple[int, bytes]:
        return 200, json.dumps({"rewards": [None if "Go." in text else 1.0 for text in samples]}).encode()

    with endpoint(choosy) as running, pytest.raises(SystemExit) as left:
        gold_eval([str(tmp_path / "eval"), running.url])
    assert left.value.code == 2
    with pytest.raises(ConfigError, match="no folder of evaluations"):
        gold_eval([str(tmp_path / "none/eval"), "http://127.0.0.1:9/score"])
