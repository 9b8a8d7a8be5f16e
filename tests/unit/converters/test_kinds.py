"""What a checkpoint is, by its configuration, the names and shapes of its tensors, and its code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conch.converters.checkpoints.files import TensorInfo, find_source
from conch.converters.checkpoints.kinds import head_layers, known_type, trunk_root
from conch.converters.checkpoints.normalizers import statistics_of
from conch.converters.checkpoints.own_code import activation_in_code
from conch.converters.checkpoints.pickles import tensors_in_pickle
from conch.converters.explain import explain
from conch.converters.options import ReadOptions
from conch.converters.recipes import check_table, recipe_for, recipe_list, recipe_table, with_recipe
from conch.converters.to_triton import main
from conch.errors import ConversionError
from tests.chats import chat_reward_model
from tests.tiny import char_tokenizer

LLAMA = {"model_type": "llama", "hidden_size": 8, "vocab_size": 30, "architectures": ["LlamaForScore"]}
TRUNK = {
    "model.embed_tokens.weight": (30, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.norm.weight": (8,),
}
LM_HEAD = {"lm_head.weight": (30, 8)}


def described(*parts: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(shape, "float32") for part in parts for name, shape in part.items()}


@pytest.mark.parametrize(
    ("head", "layers"),
    [
        ({"score.weight": (1, 8)}, ("score",)),
        ({"value_head.weight": (1, 8), "value_head.bias": (1,)}, ("value_head",)),
        ({"v_head.summary.weight": (3, 8), "v_head.summary.bias": (3,)}, ("v_head.summary",)),
        ({"score.0.weight": (8, 8), "score.0.bias": (8,), "score.2.weight": (1, 8)}, ("score.0", "score.2")),
        ({"rm.dense.weight": (20, 8), "rm.out.weight": (2, 20)}, ("rm.dense", "rm.out")),
        ({"rm.proj.weight": (20, 8), "rm.final.weight": (2, 20)}, ("rm.proj", "rm.final")),
    ],
)
@pytest.mark.parametrize("beside", [{}, LM_HEAD])
def test_a_head_of_any_name_is_found_beside_its_trunk(
    head: dict[str, Any], layers: tuple[str, ...], beside: dict[str, Any]
) -> None:
    tensors = described(TRUNK, beside, head)
    assert head_layers(tensors, trunk_root(tensors), LLAMA) == (layers, tuple(head))


@pytest.mark.parametrize(
    "head",
    [
        {"score.weight": (1, 9)},
        {"a.weight": (8, 8), "b.weight": (1, 8), "c.weight": (1, 1)},
        {"score.weight": (1, 8), "gate.scale": (1,)},
        {"score.weight": (19, 8), "reward_transform_matrix": (19, 19)},
    ],
)
def test_what_is_no_chain_of_linear_layers_is_no_head(head: dict[str, Any]) -> None:
    tensors = described(TRUNK, head)
    assert head_layers(tensors, trunk_root(tensors), LLAMA) == ((), tuple(head))


def test_a_trunk_without_a_name_of_its_own_is_told_from_its_head() -> None:
    bare = {name.removeprefix("model."): shape for name, shape in TRUNK.items()}
    tensors = described(bare, {"regression_layer.weight": (1, 8)})
    assert trunk_root(tensors) == ""
    assert head_layers(tensors, "", LLAMA)[0] == ("regression_layer",)


@pytest.mark.parametrize(
    ("names", "root"),
    [
        (("model.embed_tokens.weight", "model.layers.0.a"), "model."),
        (("gpt_neox.embed_in.weight", "gpt_neox.layers.3.b"), "gpt_neox."),
        (("model.decoder.embed_tokens.weight", "model.decoder.layers.0.c"), "model.decoder."),
        (("deberta.embeddings.word_embeddings.weight", "deberta.encoder.layer.0.d"), "deberta."),
        (
            ("backbone_model.model.layers.0.e", "backbone_model.model.embed_tokens.weight"),
            "backbone_model.model.",
        ),
        (("h.0.attn.f", "wte.weight"), ""),
    ],
)
def test_the_root_of_a_trunk_is_what_its_names_share(names: tuple[str, ...], root: str) -> None:
    assert trunk_root(described(dict.fromkeys(names, (2, 2)))) == root


def test_an_unknown_type_over_a_known_trunk_is_known_by_its_names() -> None:
    tensors = described({"gpt_neox.layers.0.a.weight": (2, 2), "out_proj.weight": (1, 2)})
    assert known_type({"model_type": "gpt_neox_reward_model"}, tensors) == "gpt_neox"
    assert known_type({"model_type": "gpt_neox_reward_model"}, described(TRUNK)) == ""
    assert known_type({"model_type": "reward_model"}, tensors) == ""
    assert known_type({"model_type": "deberta-v2"}, tensors) == "deberta-v2"


@pytest.mark.parametrize(
    ("code", "activation", "why"),
    [
        ("self.score = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))", "relu", "modeling.py"),
        ("self.score = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())", "tanh", "modeling.py"),
        ("self.score = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.GELU())", None, "several: gelu, relu"),
        ("self.other = nn.Sequential(nn.Linear(1, 1), nn.ReLU())", None, "does not say"),
        ("this is no Python", None, "does not say"),
    ],
)
def test_the_activation_is_read_from_the_code_that_is_not_run(
    tmp_path: Path, code: str, activation: str | None, why: str
) -> None:
    (tmp_path / "modeling.py").write_text(f"{code}\nraise SystemExit('run')\n", encoding="utf-8")
    found, reason = activation_in_code(tmp_path, "score")
    assert found == activation and why in reason


def test_statistics_are_read_from_the_config_or_the_buffers() -> None:
    config = {"mean": 1.5, "std": 2.0}
    plain = statistics_of(config, {})
    assert plain is not None and (plain.mean, plain.std, plain.applied) == ((1.5,), (2.0,), False)
    applied = statistics_of({**config, "normalize_reward": True}, {})
    assert applied is not None and applied.applied
    buffers = {"normalizer.mean": torch.tensor([3.0]), "normalizer.var": torch.tensor([4.0])}
    reward = statistics_of({"score_type": "reward", "do_normalize": True}, buffers)
    cost = statistics_of({"score_type": "cost", "do_normalize": True}, buffers)
    assert reward is not None and reward.mean == (3.0,) and reward.std == pytest.approx((2.0,))
    assert cost is not None and cost.mean == (0.0,) and cost.std == pytest.approx((2.0,))
    assert statistics_of({}, {}) is None


# ------------------------------------------------------------------------------------------------------ files


def test_a_head_in_a_file_of_its_own_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    save_file({"model.layers.0.a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    torch.save({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, tmp_path / "regression_layer.pt")
    torch.save({"step": torch.ones(1)}, tmp_path / "optimizer.pt")
    source = find_source(str(tmp_path))
    assert [path.name for path in source.heads] == ["regression_layer.pt"]
    assert (
        set(source.tensors())
        == set(source.described())
        == {
            "model.layers.0.a.weight",
            "regression_layer.weight",
            "regression_layer.bias",
        }
    )


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickle_is_described_as_torch_reads_it(tmp_path: Path, wrapped: bool) -> None:
    tensors = {
        "a": torch.zeros(3, 2, dtype=torch.bfloat16),
        "b": torch.nn.Parameter(torch.zeros(4)),
        "c": torch.zeros(2, 3).T,
        "d": torch.zeros((), dtype=torch.int64),
    }
    torch.save({"state_dict": tensors} if wrapped else tensors, tmp_path / "pytorch_model.bin")
    found = find_source(str(tmp_path)).described()
    assert found == {
        name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    }


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_glance_at_a_pickle_runs_nothing(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1), "b": Bomb(tmp_path / "ran")}, tmp_path / "model.bin")
    with pytest.raises(ConversionError, match="more than tensors"):
        tensors_in_pickle(tmp_path / "model.bin")
    assert not (tmp_path / "ran").exists()


# -------------------------------------------------------------------------------------- recipes and --explain


def test_every_recipe_sets_options_that_there_are() -> None:
    check_table()
    listed = recipe_list()
    assert all(name in listed for name in recipe_table().recipes)


def test_a_recipe_yields_to_what_is_given() -> None:
    settings = with_recipe({"recipe": "nemotron-70b-reward", "function_to_apply": "sigmoid"})
    assert settings == {
        "recipe": "nemotron-70b-reward",
        "score_tokens": ["id:0"],
        "function_to_apply": "sigmoid",
    }
    with pytest.raises(ConversionError, match=r"no recipe 'athena-rm' \(did you mean athene-rm\?\)"):
        with_recipe({"recipe": "athena-rm"})


def test_a_recipe_is_found_by_the_name_of_its_models() -> None:
    assert recipe_for("Nexusflow/Athene-RM-8B") == recipe_for("models/athene-rm-8b/") == "athene-rm"
    assert recipe_for("outputs/reward_model") is None


def test_the_recipe_of_a_hub_id_is_taken_and_a_folder_of_that_name_must_say(tmp_path: Path) -> None:
    assert with_recipe({}, "Nexusflow/Athene-RM-8B")["recipe"] == "athene-rm"
    assert with_recipe({"recipe": "none"}, "Nexusflow/Athene-RM-8B") == {}
    assert with_recipe({}, "outputs/reward_model") == {}
    assert with_recipe({}, "Dahoas/gptj-rm-static") == {}  # of texts, as examples/hh sends them
    folder = tmp_path / "Athene-RM-8B"
    folder.mkdir()
    with pytest.raises(ConversionError, match="--recipe athene-rm if it is that model, else --recipe none"):
        with_recipe({}, str(folder))
    with pytest.raises(ConversionError, match="--recipe athene-rm if"):
        with_recipe({}, "somebody/Athene-RM-8B")


def test_the_command_lists_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "list"]) == 0
    assert "nemotron-70b-reward" in capsys.readouterr().out


def test_explain_says_what_would_be_done(tmp_path: Path) -> None:
    chat_reward_model(tmp_path, "llama")
    told = explain(str(tmp_path), ReadOptions())
    assert "LlamaForSequenceClassification, a class of transformers (config.json)" in told
    assert "chat (the tokenizer has a chat template)" in told
    assert "to be said  nothing" in told


def test_explain_says_why_a_checkpoint_cannot_be_converted(tmp_path: Path) -> None:
    save_file(
        {name: torch.zeros(shape) for name, shape in {**TRUNK, **LM_HEAD}.items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    char_tokenizer("abc").save_pretrained(tmp_path)
    told = explain(str(tmp_path), ReadOptions())
    assert "cannot be done" in told and "language model (LlamaForCausalLM) without a reward head" in told


def test_explain_needs_no_torch(tmp_path: Path) -> None:
    chat_reward_model(tmp_path, "llama")
    program = (
        "import sys; from conch.converters.to_triton import main; "
        f"code = main(['--explain', {str(tmp_path)!r}]); sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
