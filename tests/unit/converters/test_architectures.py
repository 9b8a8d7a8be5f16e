"""Every kind and family of checkpoint scores the same when served: `model.py` against plain transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from conch.converters.backends.python import check_layers
from conch.converters.checkpoints.reader import read_checkpoint
from conch.converters.options import ConversionOptions, ReadOptions
from conch.converters.parity.inputs import Sample
from conch.converters.parity.reference import expected_scores, in_precision
from conch.converters.parity.samples import ParityCase
from conch.converters.parts import plan_parts, write_part
from conch.converters.triton_models.reward_model import Scorer
from conch.errors import ConversionError
from tests.checkpoints import (
    EOS,
    FAMILIES,
    LETTERS,
    PAD,
    base_model,
    classifier,
    process_reward,
    save_value_head,
    value_head_tensors,
)
from tests.numerics import assert_scores_close
from tests.tiny import DECODERS

SEMICOLON = LETTERS.index(";")
# peft asks transformers by the older name when it wraps a model.
PEFT_WARNING = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
ROWS = [
    [(start * 5 + step * 3) % 19 for step in range(length)]
    for start, length in enumerate((1, 2, 5, 9, 17, 31))
]
ROWS += [[3, EOS, 4, EOS], [EOS], [5, 6, 7, EOS], [2, SEMICOLON, 3, SEMICOLON], [1, SEMICOLON, 2, 3, EOS]]


def served(name: Path, reading: ReadOptions | None = None, *, dtype: Any = "float32") -> np.ndarray:
    """Scores of ROWS, all in one batch, by the version folder that is written of a checkpoint."""
    checkpoint = read_checkpoint(str(name), reading)
    options = ConversionOptions(dtype=dtype, **dict(reading or ReadOptions()))
    folder = name.parent / f"{name.stem}-version"
    folder.mkdir(exist_ok=True)
    # What the converter compares with must be right too.
    cases = [ParityCase("rows", tuple(Sample("", tuple(row)) for row in ROWS))]
    expected = expected_scores(checkpoint, cases)
    write_part(folder, *plan_parts("model", options), checkpoint, options)
    scorer = Scorer(folder, "cpu")
    rows = [scorer.rows_from_tokens(np.array([ids]), np.ones((1, len(ids))))[0] for ids in ROWS]
    scores = scorer.score(rows).rewards
    if dtype == "float32":
        assert_scores_close(scores, [expected.scores[tuple(row)] for row in ROWS])
    return scores


def each_alone(score: Callable[[torch.Tensor], Any]) -> np.ndarray:
    with torch.inference_mode():
        return np.array([np.array(score(torch.tensor([row]))).reshape(-1) for row in ROWS])


def pooled(trunk: Any, head: torch.Tensor, where: Callable[[list[int]], int]) -> np.ndarray:
    """Scores read at one token of each row."""
    return each_alone(lambda ids: trunk(ids).last_hidden_state[0, where(ids[0].tolist())] @ head.T)


def first_eos(row: list[int]) -> int:
    return row.index(EOS) if EOS in row else len(row) - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_of_any_family_scores_the_same(tmp_path: Path, family: str) -> None:
    model = classifier(tmp_path / "model", family, num_labels=2)

    assert_scores_close(served(tmp_path / "model"), each_alone(lambda ids: model(ids).logits))


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_run_in_float32_to_the_last_bit(tmp_path: Path, family: str, dtype: str) -> None:
    classifier(tmp_path, family, dtype=dtype)
    ids = torch.tensor([ROWS[5]])
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    stored = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=getattr(torch, dtype)).eval()
    before = stored(ids).logits

    with torch.inference_mode(), in_precision(stored, torch.float32):
        assert torch.equal(stored(ids).logits, whole(ids).logits)
    assert {parameter.dtype for parameter in stored.parameters()} == {getattr(torch, dtype)}
    assert torch.equal(stored(ids).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_half_precision_checkpoint_is_served_in_any_precision(tmp_path: Path, family: str) -> None:
    model = classifier(tmp_path / "model", family, dtype="bfloat16")
    exact = each_alone(lambda ids: model(ids).logits)

    assert_scores_close(served(tmp_path / "model"), exact)
    half = served(tmp_path / "model", dtype="bfloat16")
    assert 0 < np.abs(half - exact).max() < 0.1


@pytest.mark.parametrize(
    ("family", "how"),
    [*((family, "pt") for family in DECODERS), ("gpt2", "bin"), ("gpt2", "safetensors"), ("gpt2", "sharded")],
)
def test_a_value_head_is_read_at_the_first_eos(tmp_path: Path, family: str, how: str) -> None:
    tensors = value_head_tensors(base_model(tmp_path / "base", family))
    save_value_head(tmp_path / "head", tensors, how)
    trunk = AutoModelForCausalLM.from_pretrained(tmp_path / "base").base_model.eval()
    trunk.load_state_dict(
        {k.removeprefix("transformer."): v for k, v in tensors.items() if "v_head" not in k}
    )

    right = pooled(trunk, tensors["v_head.weight"], first_eos)
    reading = ReadOptions(base_model=str(tmp_path / "base"))
    assert_scores_close(served(tmp_path / "head", reading), right)


def test_a_half_precision_value_head_with_old_buffers_stays_in_half_precision(tmp_path: Path) -> None:
    """GPT-J checkpoints of 2022 hold the causal mask of each layer, and a float32 scalar beside it."""
    tensors = value_head_tensors(base_model(tmp_path / "base", "gptj"))
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e9)
    tensors["lm_head.weight"] = torch.zeros(24, 32)
    save_value_head(tmp_path / "head", tensors, "pt")

    checkpoint = read_checkpoint(str(tmp_path / "head"), ReadOptions(base_model=str(tmp_path / "base")))
    assert {parameter.dtype for parameter in checkpoint.model.parameters()} == {torch.float16}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub client's cache, in which models count as fetched."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(hub: Path, name: str, revision: str) -> Path:
    """Where the client looks for that revision of a model."""
    entry = hub / f"models--{name.replace('/', '--')}"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / revision).write_text("c" * 40)
    return entry / "snapshots" / ("c" * 40)


def test_checkpoint_and_base_model_are_found_on_the_hub(hub: Path) -> None:
    base = base_model(cached(hub, "EleutherAI/gpt-j-6B", "main"), "gptj")
    save_value_head(cached(hub, "Dahoas/gptj-rm-static", "676bfd4d"), value_head_tensors(base), "pt")

    reading = ReadOptions(base_model="EleutherAI/gpt-j-6B", revision="676bfd4d")
    checkpoint = read_checkpoint("Dahoas/gptj-rm-static", reading)
    assert (checkpoint.rules.pooling, checkpoint.rules.max_length) == ("first_eos", 32)
    with pytest.raises(ConversionError, match="is no folder here, and cannot be had from the model hub"):
        read_checkpoint(
            "Dahoas/gptj-rm-static", ReadOptions(base_model="EleutherAI/gpt-j-6B", revision="0" * 8)
        )


@pytest.mark.parametrize(
    ("rule", "where"),
    [
        ("last_token", lambda row: len(row) - 1),
        ("first_eos", first_eos),
        ("cls", lambda row: 0),
    ],
)
def test_pooling_reads_where_it_says(tmp_path: Path, rule: Any, where: Callable[[list[int]], int]) -> None:
    model = classifier(tmp_path / "model", "llama")

    right = pooled(model.model, model.score.weight, where)
    assert_scores_close(served(tmp_path / "model", ReadOptions(pooling=rule)), right)


def test_pooling_takes_the_mean_over_the_samples_own_tokens(tmp_path: Path) -> None:
    model = classifier(tmp_path / "model", "gpt2")
    right = each_alone(
        lambda ids: model.transformer(ids).last_hidden_state.mean(dim=1) @ model.score.weight.T
    )

    assert_scores_close(served(tmp_path / "model", ReadOptions(pooling="mean")), right)


def step_probabilities(model: Any, row: list[int]) -> list[float]:
    """Of label 1 at every `;` and at the last token that is no eos."""
    last = max((place for place, token in enumerate(row) if token != EOS), default=len(row) - 1)
    ends = [place for place, token in enumerate(row) if token == SEMICOLON or place == last]
    logits = model(torch.tensor([row])).logits[0].double()
    return [float(torch.sigmoid(logits[place, 1] - logits[place, 0])) for place in ends]


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize(
    ("aggregate", "combine"),
    [("min", min), ("prod", math.prod), ("mean", lambda s: sum(s) / len(s)), ("last", lambda s: s[-1])],
)
def test_a_process_reward_combines_the_scores_of_the_steps(
    tmp_path: Path, family: str, aggregate: Any, combine: Callable[[list[float]], float]
) -> None:
    model = process_reward(tmp_path / "model", family)
    with torch.inference_mode():
        right = [[combine(step_probabilities(model, row))] for row in ROWS]

    scores = served(tmp_path / "model", ReadOptions(step_separator=";", aggregate=aggregate))
    assert_scores_close(scores, right)


@pytest.mark.parametrize("function", ["none", "sigmoid"])
def test_a_process_reward_of_one_output_is_its_score_or_probability(tmp_path: Path, function: Any) -> None:
    model = process_reward(tmp_path / "model", "llama", num_labels=1)
    with torch.inference_mode():
        right = [model(torch.tensor([row])).logits[0, :, 0] for row in ROWS]
    right = [torch.sigmoid(row) for row in right] if function == "sigmoid" else right
    reading = ReadOptions(step_separator=";", aggregate="last", function_to_apply=function)
    scores = served(tmp_path / "model", reading)

    last = [max((p for p, token in enumerate(row) if token != EOS), default=0) for row in ROWS]
    assert_scores_close(scores[:, 0], [r[p] for r, p in zip(right, last, strict=True)])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
def test_mean_and_std_are_folded_into_the_head(tmp_path: Path, family: str) -> None:
    model = classifier(tmp_path / "model", family, num_labels=2)
    (tmp_path / "model" / "reward_model.json").write_text('{"mean": [0.5, -2.0], "std": [0.25, 4.0]}')
    right = (each_alone(lambda ids: model(ids).logits) - [0.5, -2.0]) / [0.25, 4.0]

    assert_scores_close(served(tmp_path / "model", ReadOptions(normalise="fold")), right)
    assert_scores_close(served(tmp_path / "model", ReadOptions(normalise="parameters")), right)


def test_rewards_are_chosen_by_name_or_number_with_their_statistics(tmp_path: Path) -> None:
    labels = {0: "kind", 1: "true", 2: "brief"}
    model = classifier(tmp_path / "model", "llama", num_labels=3, id2label=labels)
    (tmp_path / "model" / "reward_model.json").write_text('{"mean": [1, 2, 3], "std": [0.5, 1, 2]}')
    right = (each_alone(lambda ids: model(ids).logits)[:, [2, 0]] - [3, 1]) / [2, 0.5]

    for normalise in ("fold", "parameters"):
        reading = ReadOptions(rewards=("brief", "0"), normalise=normalise)
        assert read_checkpoint(str(tmp_path / "model"), reading).rules.reward_names == ("brief", "kind")
        assert_scores_close(served(tmp_path / "model", reading), right)


def save_adapter(folder: Path, base: Any, task: TaskType) -> Any:
    """Save a random adapter with its head, and return the adapted model."""
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task)
    adapted = get_peft_model(base, lora).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.filterwarnings(PEFT_WARNING)
@pytest.mark.parametrize("named_by", ["the adapter", "the option"])
def test_an_adapter_is_merged_into_its_base(tmp_path: Path, named_by: str) -> None:
    base_model(tmp_path / "base", "llama")
    config = AutoConfig.from_pretrained(tmp_path / "base", num_labels=1, pad_token_id=PAD)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", config=config)
    adapted = save_adapter(tmp_path / "adapter", base, TaskType.SEQ_CLS)
    right = each_alone(lambda ids: adapted(ids).logits)
    reading = ReadOptions()
    if named_by == "the option":
        (tmp_path / "base").rename(tmp_path / "moved")
        reading = ReadOptions(base_model=str(tmp_path / "moved"))

    assert_scores_close(served(tmp_path / "adapter", reading), right)


# ---------------------------------------------------------------------------------------------------- refused


def refused(name: Path, expected: str, **reading: Any) -> None:
    with pytest.raises(ConversionError, match=expected):
        read_checkpoint(str(name), ReadOptions(**reading))


@pytest.fixture
def value_head(tmp_path: Path) -> dict[str, torch.Tensor]:
    return value_head_tensors(base_model(tmp_path / "base", "gpt2"))


def test_a_value_head_needs_its_base_model(tmp_path: Path, value_head: dict[str, torch.Tensor]) -> None:
    refused(
        save_value_head(tmp_path / "head", value_head, "pt"), r"no tokenizer files.*or give the --base_model"
    )
    refused(tmp_path / "head", "neither has", base_model=str(base_without_tokenizer(tmp_path)))


def base_without_tokenizer(tmp_path: Path) -> Path:
    for file in (tmp_path / "base").glob("token*"):
        file.unlink()
    return tmp_path / "base"


def test_a_value_head_names_the_tensors_that_are_missing_or_unknown(
    tmp_path: Path, value_head: dict[str, torch.Tensor]
) -> None:
    missing = {name: tensor for name, tensor in value_head.items() if name != "transformer.h.1.ln_1.weight"}
    refused(
        save_value_head(tmp_path / "missing", missing, "pt"),
        r"h\.1\.ln_1\.weight missing",
        base_model=str(tmp_path / "base"),
    )
    extra = {**value_head, "transformer.h.9.ln_1.weight": torch.zeros(32)}
    refused(
        save_value_head(tmp_path / "extra", extra, "pt"),
        r"does not know, h\.9\.ln_1\.weight",
        base_model=str(tmp_path / "base"),
    )


def test_a_value_head_refuses_a_base_model_of_another_width(
    tmp_path: Path, value_head: dict[str, torch.Tensor]
) -> None:
    folder = save_value_head(tmp_path / "head", value_head, "safetensors")
    base_model(tmp_path / "wide", "gpt2", n_embd=64)
    refused(
        folder,
        r"v_head\.weight is \[1, 32\], but the base model's states are 64 wide",
        base_model=str(tmp_path / "wide"),
    )
    base_model(tmp_path / "short", "gpt2", n_positions=16)
    refused(folder, r"wpe\.weight is \[32, 32\] instead of \[16, 32\]", base_model=str(tmp_path / "short"))


def test_a_value_head_with_nan_is_refused(tmp_path: Path, value_head: dict[str, torch.Tensor]) -> None:
    value_head["v_head.weight"][0, 3] = math.nan
    refused(
        save_value_head(tmp_path / "head", value_head, "pt"),
        r"weight v_head\.weight holds NaN",
        base_model=str(tmp_path / "base"),
    )


def test_a_head_that_is_no_chain_of_linear_layers_is_refused(
    tmp_path: Path, value_head: dict[str, torch.Tensor]
) -> None:
    value_head["v_head.summary.weight"] = torch.zeros(1, 32)
    refused(
        save_value_head(tmp_path / "head", value_head, "pt"),
        r"no chain of one or two linear layers on states of width 32 \(v_head\.summary\.weight, "
        r"v_head\.weight\)",
        base_model=str(tmp_path / "base"),
    )


class Bomb:
    """What unpickling this would do."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(self.path),))

    def __init__(self, path: Path) -> None:
        self.path = str(path)


def test_a_pickle_that_would_run_code_is_not_opened(tmp_path: Path, value_head: dict[str, Any]) -> None:
    value_head["bomb"] = Bomb(tmp_path / "ran")
    refused(
        save_value_head(tmp_path / "head", value_head, "pt"),
        "other Python objects, which are not loaded since they can run code",
        base_model=str(tmp_path / "base"),
    )
    assert not (tmp_path / "ran").exists()


def test_files_without_an_index_must_be_told_apart(
    tmp_path: Path, value_head: dict[str, torch.Tensor]
) -> None:
    folder = save_value_head(tmp_path / "head", value_head, "pt")
    (folder / "older.pt").write_bytes((folder / "hf_ckpt.pt").read_bytes())
    refused(folder, "several files of tensors", base_model=str(tmp_path / "base"))
    assert (
        read_checkpoint(
            str(folder / "hf_ckpt.pt"), ReadOptions(base_model=str(tmp_path / "base"))
        ).rules.pooling
        == "first_eos"
    )


def test_extra_tensors_of_a_classifier_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    classifier(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, r"does not know, model\.layers\.7\.mlp\.up_proj\.weight")


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        ({}, "say with --step_separator"),
        ({"step_separator": "Z"}, "no text that the tokenizer knows"),
        ({"step_separator": ""}, "no text that the tokenizer knows"),
        ({"step_separator": ";", "pooling": "mean"}, "read at the ends of their steps"),
        ({"step_separator": ";", "normalise": "fold"}, "no reward_model.json"),
        ({"step_separator": ";", "rewards": ("2",)}, r"no reward '2'; it has: 0 LABEL_0, 1 LABEL_1"),
    ],
)
def test_a_process_reward_refuses(tmp_path: Path, reading: dict[str, Any], expected: str) -> None:
    process_reward(tmp_path, "llama")
    refused(tmp_path, expected, **reading)


def test_a_product_of_raw_scores_is_refused(tmp_path: Path) -> None:
    process_reward(tmp_path, "llama", num_labels=1)
    raw = {"step_separator": ";", "function_to_apply": "none"}
    refused(tmp_path, "scores that are no probabilities", **raw, aggregate="prod")


def test_which_of_three_kinds_of_steps_is_the_reward_must_be_said(tmp_path: Path) -> None:
    process_reward(tmp_path, "llama", num_labels=3)
    refused(tmp_path, r"say with --reward .*", step_separator=";")
    chosen = read_checkpoint(str(tmp_path), ReadOptions(step_separator=";", rewards=("LABEL_2",)))
    assert (chosen.rules.columns, chosen.rules.reward_names) == ((2,), ("LABEL_2",))


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        ({"pooling": "steps"}, "only they are"),
        ({"pooling": "mean"}, "more than one linear layer, which only its own class can run"),
        ({"step_separator": ";"}, "no process reward model"),
        ({"template": "Q: {prompt} A: {output}"}, "joined as one text"),
        ({"template": "chat"}, "no chat template"),
    ],
)
def test_an_encoder_refuses(tmp_path: Path, reading: dict[str, Any], expected: str) -> None:
    classifier(tmp_path, "bert")
    refused(tmp_path, expected, **reading)


def test_prompt_and_output_make_one_text(tmp_path: Path) -> None:
    classifier(tmp_path, "llama")
    assert (
        read_checkpoint(str(tmp_path), ReadOptions(template="{prompt}{output}{eos}")).rules.template
        == "{text}{eos}"
    )


def test_the_window_of_roberta_is_what_its_positions_leave(tmp_path: Path) -> None:
    classifier(tmp_path, "roberta")
    assert read_checkpoint(str(tmp_path)).rules.max_length == 32
    refused(tmp_path, "max_length is 33, the model's window is 32", max_length=33)


@pytest.mark.filterwarnings(PEFT_WARNING)
def test_an_adapter_without_a_head_is_refused(tmp_path: Path) -> None:
    base_model(tmp_path / "base", "llama")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "adapter", base, TaskType.CAUSAL_LM)
    refused(tmp_path / "adapter", "an adapter for CAUSAL_LM, which gives no scores")


def test_int8_refuses_a_model_without_linear_layers(tmp_path: Path) -> None:
    classifier(tmp_path / "gpt2", "gpt2")
    classifier(tmp_path / "llama", "llama")
    check_layers(read_checkpoint(str(tmp_path / "llama")).model)
    with pytest.raises(ConversionError, match=r"no nn\.Linear layers .* choose bfloat16"):
        check_layers(read_checkpoint(str(tmp_path / "gpt2")).model)


def test_a_weight_beyond_the_served_precision_is_named(tmp_path: Path) -> None:
    model = classifier(tmp_path / "model", "llama")
    model.model.norm.weight.data[0] = 1e6
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ConversionError, match=r"norm\.weight does not fit into torch\.float16"):
        served(tmp_path / "model", dtype="float16")
