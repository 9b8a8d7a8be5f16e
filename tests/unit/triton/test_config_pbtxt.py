from __future__ import annotations

from dataclasses import replace

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from conch.errors import ServingError
from conch.triton.config_pbtxt import from_pbtxt, spec_from_model_config, to_pbtxt
from conch.triton.contract import Engine, RewardModelSpec

# As the converter of an older trainer writes it: ids only, half precision on the wire, its width not stated.
FOREIGN = """
name: "gptj-rm"
backend: "pytorch"
default_model_filename: "traced-model.pt"
max_batch_size: 25
input [ { name: "input_ids" data_type: TYPE_INT32 dims: [ -1 ] } ]
output [ { name: "rewards" data_type: TYPE_FP16 dims: [ -1 ] } ]
"""


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize(
    "spec",
    [
        RewardModelSpec("walks"),
        RewardModelSpec(
            "walks", max_batch_size=3, max_length=12, max_queue_delay_us=0, instances=2, content_sha256="ab12"
        ),
        RewardModelSpec("two", reward_names=("helpful", "harm less")),
        RewardModelSpec("ids", form="token"),
        RewardModelSpec(
            "ids", form="token", takes_attention_mask=False, input_dtype="INT32", output_dtype="FP16"
        ),
        RewardModelSpec("ens", members=("a", "b", "b"), max_queue_delay_us=0),
        RewardModelSpec("ens", form="token", members=("a", "b")),
        RewardModelSpec("ens", members=("a:x", "a:y"), variance="sample", holds_members=True),
        RewardModelSpec("steps", granularity="step"),
        RewardModelSpec("tokens", form="token", granularity="token"),
        RewardModelSpec("chat", reads="dialogues", special_tokens=('<"quoted">', "<|é|>")),
        RewardModelSpec("graph", form="token", engine="onnxruntime"),
        RewardModelSpec("graph", form="token", engine="pytorch"),
    ],
)
def test_pbtxt_round_trip_is_exact(spec: RewardModelSpec, kind) -> None:
    assert from_pbtxt(to_pbtxt(spec, kind=kind)) == spec


def test_spec_fills_in_the_input_type_of_its_form() -> None:
    assert RewardModelSpec("m").input_dtype == "BYTES"
    assert RewardModelSpec("m", form="token").input_dtype == "INT64"


def test_to_pbtxt_batches_ragged_rows_and_sets_no_queue_policy() -> None:
    config = model_config_pb2.ModelConfig()
    text_format.Parse(to_pbtxt(RewardModelSpec("m", form="token"), kind="cpu"), config)

    assert all(tensor.allow_ragged_batch for tensor in config.input)
    assert config.HasField("dynamic_batching")
    assert not config.dynamic_batching.HasField("default_queue_policy")
    assert config.version_policy.latest.num_versions == 1
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU


def test_to_pbtxt_declares_dense_scores_of_any_number() -> None:
    config = model_config_pb2.ModelConfig()
    text_format.Parse(to_pbtxt(RewardModelSpec("m", granularity="step")), config)

    outputs = {(output.name, output.data_type, *output.dims) for output in config.output}
    floats, integers = model_config_pb2.TYPE_FP32, model_config_pb2.TYPE_INT32
    assert outputs == {("rewards", floats, 1), ("step_rewards", floats, -1), ("step_ends", integers, -1)}


def test_from_pbtxt_refuses_dense_scores_that_do_not_fit() -> None:
    text = to_pbtxt(RewardModelSpec("m", granularity="step"))
    with pytest.raises(ServingError, match="parameter granularity is 'word', none of"):
        from_pbtxt(text.replace('"step"', '"word"'))
    with pytest.raises(ServingError, match=r"other tensors; .*step_ends INT64"):
        from_pbtxt(text.replace("TYPE_INT32", "TYPE_INT64"))
    with pytest.raises(ServingError, match="other tensors"):
        from_pbtxt(text.replace('"step"', '"sample"'))


def test_from_pbtxt_accepts_a_foreign_token_model() -> None:
    spec = from_pbtxt(FOREIGN)

    assert spec == RewardModelSpec(
        "gptj-rm",
        form="token",
        max_batch_size=25,
        max_queue_delay_us=0,
        takes_attention_mask=False,
        input_dtype="INT32",
        output_dtype="FP16",
    )


def test_from_pbtxt_names_the_rewards_of_a_wide_foreign_model() -> None:
    wide = FOREIGN.replace("TYPE_FP16 dims: [ -1 ]", "TYPE_FP32 dims: [ 2 ]")

    assert from_pbtxt(wide).reward_names == ("reward_0", "reward_1")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("input_ids", "pixels"), r"other tensors; inputs pixels INT32 \[-1\]; outputs rewards FP16 \[-1\]"),
        (('"rewards"', '"logits"'), "outputs logits FP16"),
        (("TYPE_INT32", "TYPE_FP32"), "an input type other than those"),
        (("TYPE_FP16", "TYPE_STRING"), "rewards of type BYTES"),
        (("max_batch_size: 25", "max_batch_size: 0"), "max_batch_size 0"),
        (("TYPE_FP16 dims: [ -1 ]", "TYPE_FP16 dims: [ 2, 3 ]"), r"dims \[2, 3\]"),
    ],
)
def test_from_pbtxt_refuses_other_models_and_says_what_they_are(
    change: tuple[str, str], expected: str
) -> None:
    with pytest.raises(ServingError, match=expected):
        from_pbtxt(FOREIGN.replace(*change))


def test_from_pbtxt_refuses_a_mask_of_another_type() -> None:
    mask = 'input [ { name: "attention_mask" data_type: TYPE_INT64 dims: [ -1 ] } ]'
    with pytest.raises(ServingError, match="attention_mask INT64"):
        from_pbtxt(FOREIGN + mask)


def test_from_pbtxt_refuses_reward_names_that_do_not_fit() -> None:
    text = to_pbtxt(RewardModelSpec("m", reward_names=("a", "b"))).replace('"a,b"', '"a,b,c"')
    with pytest.raises(ServingError, match="dims"):
        from_pbtxt(text)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"a,b"', '"a,b,c"'),  # two columns for three members
        ('name: "variance"', 'name: "spread"'),
        ("TYPE_INT32", "TYPE_INT64"),  # members_used
        ('key: "members"', 'key: "parts"'),
    ],
)
def test_from_pbtxt_refuses_an_ensemble_whose_outputs_do_not_fit(before: str, after: str) -> None:
    text = to_pbtxt(RewardModelSpec("ens", members=("a", "b")))
    assert before in text
    with pytest.raises(ServingError, match="other tensors"):
        from_pbtxt(text.replace(before, after))


def test_to_pbtxt_keeps_an_ensemble_on_the_cpu_unless_it_holds_its_members() -> None:
    assert "KIND_GPU" not in to_pbtxt(RewardModelSpec("ens", members=("a", "b")), kind="gpu")
    held = RewardModelSpec("ens", members=("a", "b"), holds_members=True)
    assert "KIND_GPU" in to_pbtxt(held, kind="gpu")


def test_an_ensemble_of_before_the_choice_has_the_variance_of_the_population() -> None:
    text = to_pbtxt(RewardModelSpec("ens", members=("a", "b")))
    start = text.index('parameters {\n  key: "variance"')
    older = text[:start] + text[text.index("\n}\n", start) + 3 :]
    assert "population" not in older and from_pbtxt(older) == from_pbtxt(text)
    with pytest.raises(ServingError, match="parameter variance is 'unbiased', none of"):
        from_pbtxt(text.replace('"population"', '"unbiased"'))


@pytest.mark.parametrize("engine", ["onnxruntime", "pytorch"])
def test_to_pbtxt_runs_a_graph_in_its_own_back_end_and_embedded_in_python(engine: Engine) -> None:
    spec = RewardModelSpec("graph", form="token", engine=engine)
    native, embedded = model_config_pb2.ModelConfig(), model_config_pb2.ModelConfig()
    text_format.Parse(to_pbtxt(spec), native)
    text_format.Parse(to_pbtxt(spec, kind="cpu", embedded=True), embedded)

    assert (native.backend, embedded.backend) == (engine, "python")
    # The C++ back ends would join ragged rows end to end.
    assert not any(tensor.allow_ragged_batch for tensor in native.input)
    assert all(tensor.allow_ragged_batch for tensor in embedded.input)
    assert spec_from_model_config(native) == spec_from_model_config(embedded) == spec


def test_from_pbtxt_refuses_an_engine_it_does_not_know() -> None:
    text = to_pbtxt(RewardModelSpec("m")).replace('string_value: "python"', 'string_value: "fortran"')
    with pytest.raises(ServingError, match="parameter engine is 'fortran'"):
        from_pbtxt(text)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("dialogues", "poems", "parameter reads is 'poems', none of"),
        ('[\\"<s>\\"]', "<s>", "parameter special_tokens is '<s>', no JSON list of strings"),
    ],
)
def test_from_pbtxt_refuses_what_it_cannot_read_of_dialogues(before: str, after: str, words: str) -> None:
    text = to_pbtxt(RewardModelSpec("chat", reads="dialogues", special_tokens=("<s>",)))
    assert before in text
    with pytest.raises(ServingError, match=words):
        from_pbtxt(text.replace(before, after))


def test_from_pbtxt_refuses_text_that_is_no_config() -> None:
    with pytest.raises(ServingError, match="not a Triton model configuration"):
        from_pbtxt("name = walks")


def test_replace_keeps_the_input_type() -> None:
    spec = RewardModelSpec("m", form="token", input_dtype="INT32")
    assert replace(spec, name="n").input_dtype == "INT32"
