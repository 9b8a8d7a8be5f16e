"""What becomes of a network's states and outputs, against plain torch; and of a checkpoint's own classes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from conch.converters.checkpoints.heads import Head, LinearLayer
from conch.converters.checkpoints.kinds import Kind
from conch.converters.checkpoints.reader import RewardCheckpoint
from conch.converters.options import ConversionOptions
from conch.converters.parity.compare import compare
from conch.converters.parity.reference import expected_scores, reference_of
from conch.converters.parity.samples import build_cases, requests_of
from conch.converters.parts import plan_parts, write_part
from conch.converters.triton_models.reward_model import Row, Scorer
from conch.errors import ConversionError
from conch.store.manifest import Manifest, ScoringRules
from tests.chats import CHATS, chat_tokenizer
from tests.checkpoints import EOS, PAD, config_of, random_model, tokenizer_for
from tests.forks import Forks
from tests.launches import ROOT
from tests.numerics import assert_scores_close

ACTIVATIONS: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "tanh": nn.Tanh(),
    "selu": nn.SELU(),
}
ROWS = [[1, 2, 3, 4], [5, EOS, 6, EOS, 7], [8]]


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """Fresh processes with what a `model.py` imports, and nothing of ours."""
    trunk = "transformers.models.llama.modeling_llama"
    with Forks(
        "torch", "transformers:AutoModelForSequenceClassification", "safetensors.torch", trunk
    ) as made:
        yield made


def rules_of(tokenizer: Any, **settings: Any) -> ScoringRules:
    defaults: dict[str, Any] = {
        "template": "{text}",
        "max_length": 24,
        "reward_names": ("reward",),
        "normalise": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "vocab_size": len(tokenizer),
        "truncation_side": "right",
    }
    return ScoringRules(**{**defaults, **settings})


def layers(widths: list[int], *, bias: bool = True) -> tuple[LinearLayer, ...]:
    torch.manual_seed(3)
    return tuple(
        LinearLayer(torch.randn(out, into) / into**0.5, torch.randn(out) if bias else None)
        for into, out in itertools.pairwise(widths)
    )


def trunk_checkpoint(head: Head, **settings: Any) -> RewardCheckpoint:
    """A Llama without a head, and a head."""
    model = random_model(AutoModel, config_of("llama"))
    tokenizer = tokenizer_for("llama")
    rules = rules_of(tokenizer, **{"pooling": "last_token", **settings})
    return RewardCheckpoint("here", model, head, tokenizer, rules, longest_compared=rules.max_length)


def written(folder: Path, checkpoint: RewardCheckpoint, **settings: Any) -> Manifest:
    options = ConversionOptions(**settings)
    (part,) = plan_parts("model", options)
    for number, file in enumerate(part.runner):
        (folder / (file.name if number else "model.py")).write_bytes(file.read_bytes())
    return write_part(folder, part, checkpoint, options)


def rewards(folder: Path, rows: list[list[int]]) -> list[list[float]]:
    return Scorer(folder, "cpu").score([Row(ids) for ids in rows]).rewards.tolist()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_head_of_two_layers_has_its_activation_between_them(tmp_path: Path, activation: Any) -> None:
    first, last = layers([32, 8, 1])
    checkpoint = trunk_checkpoint(Head((first, last), activation), head_activation=activation)
    with torch.inference_mode():
        states = [checkpoint.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in ROWS]
        inner = [ACTIVATIONS[activation](nn.functional.linear(s, first.weight, first.bias)) for s in states]
        right = [nn.functional.linear(values, last.weight, last.bias).tolist() for values in inner]
    written(tmp_path, checkpoint)
    assert_scores_close(rewards(tmp_path, ROWS), right)


def test_the_mean_of_states_goes_through_a_head_of_two_layers(tmp_path: Path) -> None:
    """Not the mean of its outputs, which is another number."""
    head = Head(layers([32, 8, 1], bias=False), "relu")
    checkpoint = trunk_checkpoint(head, pooling="mean", head_activation="relu")
    with torch.inference_mode():
        means = [checkpoint.model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0) for ids in ROWS]
        right = [(head.layers[1].weight @ (head.layers[0].weight @ m).relu()).tolist() for m in means]
    written(tmp_path, checkpoint)
    assert_scores_close(rewards(tmp_path, ROWS), right)


def test_the_score_is_read_at_the_last_occurrence_of_a_token(tmp_path: Path) -> None:
    head = Head(layers([32, 1]))
    checkpoint = trunk_checkpoint(head, pooling="token", pooling_token_id=EOS)
    ((weight, bias),) = [(layer.weight, layer.bias) for layer in head.layers]
    with torch.inference_mode():
        states = [checkpoint.model(torch.tensor([ids])).last_hidden_state[0] for ids in ROWS]
        read = [states[0][3], states[1][3], states[2][0]]
        right = [nn.functional.linear(state, weight, bias).tolist() for state in read]
    written(tmp_path, checkpoint)
    assert_scores_close(rewards(tmp_path, ROWS), right)


@pytest.mark.parametrize(
    ("function", "apply"),
    [
        ("none", lambda outputs: outputs),
        ("softmax", lambda outputs: outputs.softmax(dim=-1)),
        ("sigmoid", lambda outputs: outputs.sigmoid()),
    ],
)
def test_a_function_is_applied_to_all_outputs_before_one_is_chosen(
    tmp_path: Path, function: Any, apply: Any
) -> None:
    head = Head(layers([32, 3]))
    checkpoint = trunk_checkpoint(head, function_to_apply=function, columns=(2,))
    with torch.inference_mode():
        states = [checkpoint.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in ROWS]
        outputs = [nn.functional.linear(s, head.layers[0].weight, head.layers[0].bias) for s in states]
        right = [[apply(each)[2].item()] for each in outputs]
    written(tmp_path, checkpoint)
    assert_scores_close(rewards(tmp_path, ROWS), right)


def test_mean_and_std_are_folded_into_the_last_of_two_layers(tmp_path: Path) -> None:
    head = Head(layers([32, 8, 1]), "silu")
    settings: dict[str, Any] = {"head_activation": "silu", "mean": (0.5,), "std": (4.0,)}
    written_raw, written_folded = tmp_path / "raw", tmp_path / "folded"
    for folder, folded in ((written_raw, False), (written_folded, True)):
        folder.mkdir()
        written(folder, trunk_checkpoint(head, folded=folded, **settings))
    raw = rewards(written_raw, ROWS)
    assert_scores_close(rewards(written_folded, ROWS), [[(score - 0.5) / 4.0] for (score,) in raw])


def test_mean_and_std_are_not_folded_below_a_function(tmp_path: Path) -> None:
    checkpoint = trunk_checkpoint(
        Head(layers([32, 1])), function_to_apply="sigmoid", folded=True, mean=(0.5,), std=(4.0,)
    )
    with pytest.raises(ConversionError, match="sigmoid is applied to its outputs: use --normalise param"):
        written(tmp_path, checkpoint)


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling": "mean", "head_activation": "gelu"},
        {"pooling": "token", "pooling_token_id": EOS, "head_activation": "selu"},
        {"pooling": "first_eos", "head_activation": "tanh", "function_to_apply": "sigmoid"},
        {
            "pooling": "steps",
            "aggregate": "prod",
            "function_to_apply": "softmax",
            "head_activation": "silu",
            "separator_id": 19,
            "step_separator": ";",
            "columns": (1,),
        },
        {"pooling": "last_token", "head_activation": "relu", "granularity": "token"},
    ],
    ids=lambda settings: settings["pooling"],
)
def test_the_reference_scores_as_the_server_does(
    forks: Forks, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """By code of its own, for texts and for token ids, in a fresh process."""
    outputs = 2 if settings.get("columns") else 1
    head = Head(layers([32, 8, outputs]), settings["head_activation"])
    checkpoint = trunk_checkpoint(head, **settings)
    for form in ("text", "token"):
        folder = tmp_path / form
        folder.mkdir()
        cases = build_cases(checkpoint, form, max_batch_size=8)
        expected = expected_scores(checkpoint, cases)
        written(folder, checkpoint, form=form)
        replies = forks.score(folder, requests_of(cases, form, PAD))
        report = compare(cases, replies, expected, "float32")
        assert report.ok, report.table()


# ------------------------------------------------------------------------------------------------ pairs


def test_token_types_reach_the_network_through_padding(tmp_path: Path) -> None:
    more: Any = {"num_labels": 1}
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        pad_token_id=0, **more,
    )  # fmt: skip
    model = random_model(AutoModelForSequenceClassification, config)
    model.save_pretrained(tmp_path)
    tokenizer_for("llama").save_pretrained(tmp_path)
    manifest = rules_of(tokenizer_for("llama"), template="pair", pad_token_id=0).model_dump(mode="json")
    manifest |= {"trust_remote_code": False, "dtype": "float32"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    rows = [Row([1, 2, 3, 4], types=(0, 0, 1, 1)), Row([1, 2], types=(0, 1))]
    with torch.inference_mode():
        right = [
            model(torch.tensor([row.ids]), token_type_ids=torch.tensor([row.types])).logits[0].tolist()
            for row in rows
        ]
    assert_scores_close(Scorer(tmp_path, "cpu").score(rows).rewards, right)


# --------------------------------------------------------------------- classes of the checkpoint's own

CODE = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel

from .own_parts import Answer


class OwnReward(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.v_head = nn.Linear(config.hidden_size, OUTPUTS, bias=False)
        self.post_init()

    def forward(self, input_ids, ARGUMENTS):
        ids = input_ids
        if not (ids == ANSWER).any(dim=1).all():
            raise ValueError("there is no answer")
        states = self.model(input_ids=ids).last_hidden_state
        last = (ids != self.config.pad_token_id).int().cumsum(dim=1).argmax(dim=1)
        scores = self.v_head(states[torch.arange(len(ids)), last])
        return RETURNS
"""
PARTS = """
from dataclasses import dataclass
from typing import Any

from transformers.utils import ModelOutput


@dataclass
class Answer(ModelOutput):
    score: Any = None
"""
RETURNS = {
    "": ("scores.squeeze(-1)", "attention_mask"),
    "0": ("(scores, states)", "attention_mask=None"),
    "score": ("Answer(score=scores)", "**others"),
    "end": ("{'end': scores}", "attention_mask=None"),
}


def own_class(folder: Path, output: str) -> RewardCheckpoint:
    """A checkpoint with code, which wants an answer in each sample, as ArmoRM's does."""
    folder.mkdir()
    tokenizer = chat_tokenizer("llama")
    returns, arguments = RETURNS[output]
    answer = tokenizer.convert_tokens_to_ids("<|end_header_id|>")
    code = CODE.replace("RETURNS", returns).replace("ARGUMENTS", arguments).replace("ANSWER", str(answer))
    code = code.replace("OUTPUTS", "2" if output == "0" else "1")
    (folder / "modeling_own.py").write_text(code)
    (folder / "own_parts.py").write_text(PARTS)
    config = config_of(
        "llama", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_position_embeddings=80
    )
    config.auto_map = {"AutoModel": "modeling_own.OwnReward"}
    config.architectures = ["OwnReward"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    own = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    fresh = AutoModel.from_config(own, trust_remote_code=True)
    fresh.save_pretrained(folder)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    names = ("help", "truth") if output == "0" else ("reward",)
    rules = rules_of(
        tokenizer, template="chat", reads="dialogues", max_length=80, reward_names=names,
        contents={role: "text" for role in ("system", "user", "assistant", "tool")},
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind = Kind("custom", auto_class="AutoModel")
    return RewardCheckpoint(
        str(folder), model, None, tokenizer, rules, kind=kind, output=output, longest_compared=80
    )


@pytest.mark.parametrize("output", RETURNS)
def test_a_class_of_the_checkpoints_own_is_served_from_the_version_alone(
    forks: Forks, tmp_path: Path, output: str
) -> None:
    checkpoint = own_class(tmp_path / f"own{output or '-'}", output)
    version = tmp_path / "1"
    version.mkdir()
    reference = reference_of(checkpoint, "text", max_batch_size=8)
    manifest = written(version, checkpoint, trust_remote_code=True)
    assert (manifest.layout, manifest.auto_class, manifest.output) == ("custom", "AutoModel", output)
    assert {"modeling_own.py", "own_parts.py"} <= {path.name for path in version.iterdir()}
    for file in (tmp_path / f"own{output or '-'}").iterdir():
        file.unlink()

    replies = forks.score(version, reference.requests)
    report = compare(reference.cases, replies, reference.expected, "float32")
    assert report.ok, report.table()


def test_rows_of_random_tokens_that_the_class_refuses_are_named(tmp_path: Path) -> None:
    checkpoint = own_class(tmp_path / "own", "")
    with pytest.raises(ConversionError, match=r"there is no answer; its code may demand .* use --form text"):
        reference_of(checkpoint, "token", max_batch_size=8)


# ---------------------------------------------------------------------------------- answers that are not read


@pytest.mark.parametrize("family", CHATS)
def test_a_model_that_is_read_before_the_answer_is_refused(tmp_path: Path, family: str) -> None:
    """Athene's: the first eos is the end of the user's turn."""
    tokenizer = chat_tokenizer(family)
    config = config_of("llama", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model = random_model(AutoModel, config)
    settings: dict[str, Any] = {"template": "chat", "reads": "dialogues", "max_length": 160}
    for pooling, reads in (("cls", False), ("last_token", True)):
        rules = rules_of(tokenizer, pooling=pooling, **settings)
        checkpoint = RewardCheckpoint(
            "here", model, Head(layers([32, 1])), tokenizer, rules, longest_compared=16
        )
        if reads:
            reference_of(checkpoint, "text", max_batch_size=4)
            continue
        with pytest.raises(ConversionError, match=r"same score \(pooling cls, . pairs\): .* --pooling_token"):
            reference_of(checkpoint, "text", max_batch_size=4)


OLDER_CODE = """
from torch import nn
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.models.llama.modeling_llama import LLAMA_INPUTS_DOCSTRING
from transformers.utils import add_start_docstrings_to_model_forward


class OldReward(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.v_head = nn.Linear(config.hidden_size, 1, bias=False)

    @add_start_docstrings_to_model_forward(LLAMA_INPUTS_DOCSTRING)
    def forward(self, input_ids, attention_mask=None):
        return self.v_head(self.model(input_ids=input_ids).last_hidden_state[:, -1])
"""
LOAD = """
import sys
from pathlib import Path
from transformers import AutoModel
sys.path.insert(0, sys.argv[3])
from conch.converters.triton_models.network import allow_older_code

if sys.argv[2] == "allowed":
    allow_older_code(Path(sys.argv[1]))
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


@pytest.mark.parametrize("how", ["allowed", "plain"])
def test_code_for_an_older_transformers_loads(forks: Forks, tmp_path: Path, how: str) -> None:
    (tmp_path / "modeling_old.py").write_text(OLDER_CODE)
    config = config_of("llama")
    config.auto_map = {"AutoModel": "modeling_old.OldReward"}
    config.save_pretrained(tmp_path)
    trunk = random_model(AutoModel, config_of("llama"))
    tensors = {f"model.{name}": tensor for name, tensor in trunk.state_dict().items()}
    save_file(
        {**tensors, "v_head.weight": torch.ones(1, 32)}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    (tmp_path / "load.py").write_text(LOAD)
    done = forks.run(tmp_path / "load.py", str(tmp_path), how, str(ROOT))
    assert (done.code == 0) is (how == "allowed"), done.err
    assert how == "allowed" or "LLAMA_INPUTS_DOCSTRING" in done.err
