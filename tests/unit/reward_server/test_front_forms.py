"""Each wire form, with the bodies that its clients send, on a real socket."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from conch.reward_server.forms.kserve import RAW
from conch.types import RewardResult, RewardStatus
from tests.reward_servers import Lengths, Served, served

PARIS = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Paris"}]


@pytest.fixture(scope="module")
def source() -> Lengths:
    return Lengths()


@pytest.fixture(scope="module")
def server(source: Lengths) -> Iterator[Served]:
    with served(source) as running:
        yield running


def ok(server: Served, path: str, body: Any) -> Any:
    status, answer = server.post(path, body)
    assert status == 200, answer
    return answer


def test_openrlhf_gets_a_list_for_its_one_sample(server: Served, source: Lengths) -> None:
    body = {"query": ["2+2=4</s>"], "prompts": ["2+2="], "labels": ["4"]}
    rewards = [5.0]
    assert ok(server, "/get_reward", body) == {"rewards": rewards, "scores": rewards, "extra_logs": {}}
    (rollout,) = source.asked[-1]
    assert (rollout.prompt.text, rollout.completion.text) == ("2+2=", "4</s>")
    assert rollout.sample == "2+2=4</s>" and rollout.prompt.metadata == {"label": "4"}


def test_openrlhf_without_labels_gives_no_row(server: Served, source: Lengths) -> None:
    ok(server, "/get_reward", {"query": ["ab", "cde"], "prompts": ["a", "c"], "labels": ["", None]})
    assert [each.prompt.metadata for each in source.asked[-1]] == [{}, {}]
    assert [each.completion.text for each in source.asked[-1]] == ["b", "de"]


def test_openrlhf_sees_the_parts_of_a_reward_in_its_logs() -> None:
    def parts(text: str) -> RewardResult:
        absent = () if len(text) > 2 else ("long",)
        scores = {"all": 1.0} if absent else {"all": 1.0, "long": 2.0}
        return RewardResult(RewardStatus.OK, scores, absent=absent)

    with served(Lengths(parts), source={"weights": {"long": 3.0}}) as server:
        answer = ok(server, "/get_reward", {"query": ["abc", "a"], "prompts": ["", ""], "labels": ["", ""]})
        assert answer["rewards"] == [7.0, 1.0]
        assert answer["extra_logs"] == {
            "all": [1.0, 1.0],
            "long": [6.0, 0.0],
        }
        assert ok(server, "/slime/scores", {"prompt": "p", "response": "abc", "label": None}) == {
            "all": 1.0,
            "long": 2.0,
            "reward": 7.0,
        }
        assert ok(server, "/", {"texts": ["abc", "a"]})["scores"] == {"all": [1.0, 1.0], "long": [2.0, None]}


def test_query_that_lost_its_prompt_is_refused_where_completions_are_read(server: Served) -> None:
    status, answer = server.post("/get_reward", {"query": ["2= 4"], "prompts": ["2+2="], "labels": [""]})
    assert status == 422 and "does not begin with its prompt" in answer["detail"]


def test_slime_gets_a_number(server: Served, source: Lengths) -> None:
    assert ok(server, "/slime", {"prompt": "2+2=", "response": "four", "label": {"answer": "4"}}) == 4.0
    (rollout,) = source.asked[-1]
    assert rollout.prompt.text == "2+2=" and rollout.prompt.metadata == {"answer": "4"}
    assert rollout.dialogue is None


def test_slime_may_send_messages(server: Served, source: Lengths) -> None:
    assert ok(server, "/slime", {"prompt": PARIS[:1], "response": "Paris", "label": None}) == 5.0
    dialogue = source.asked[-1][0].dialogue
    assert dialogue is not None and list(dialogue.messages) == PARIS


def test_answer_with_more_than_a_text_is_read_by_its_text(server: Served, source: Lengths) -> None:
    answer = {"role": "assistant", "content": "Paris", "reasoning_content": "easy", "annotations": []}
    assert ok(server, "/", {"messages": [PARIS[0], answer]})["reward"] == 5.0
    dialogue = source.asked[-1][0].dialogue
    assert dialogue is not None and list(dialogue.messages) == [PARIS[0], answer]


PARTS = [{"type": "text", "text": "Par"}, {"type": "text", "text": "is"}]


@pytest.mark.parametrize(
    ("path", "key"), [("/", None), ("/classify", None), ("/pooling", None), ("/get_reward", "dialogues")]
)
def test_answer_in_parts_is_their_text(server: Served, source: Lengths, path: str, key: str | None) -> None:
    asked = {"role": "user", "content": [{"type": "text", "text": "Where?"}, {"type": "image", "url": "u"}]}

    def body(content: Any) -> dict[str, Any]:
        dialogue = {"messages": [asked, {"role": "assistant", "content": content}]}
        return dialogue if key is None else {"query": [""], key: [dialogue]}

    ok(server, path, body(PARTS))
    (rollout,) = source.asked[-1]
    assert rollout.completion.text == "Paris" and rollout.prompt.text == "Where?"
    assert rollout.dialogue is not None
    assert rollout.dialogue.messages[-1]["content"] == [{"type": "text", "text": "Paris"}]
    status, answer = server.post(path, body([*PARTS, {"type": "image", "url": "u"}]))
    assert status == 400 and "the last message has a part of type image" in answer["detail"]


def test_special_tokens_are_taken_off_the_end() -> None:
    source = Lengths()
    with served(source, strip=["<|im_end|>", "\n"]) as server:
        assert ok(server, "/slime", {"prompt": "a", "response": "four<|im_end|>\n", "label": ""}) == 4.0
        body = {"query": ["a<|im_end|>b<|im_end|>"], "prompts": ["a<|im_end|>"], "labels": [""]}
        assert ok(server, "/get_reward", body)["rewards"] == [1.0]


@pytest.mark.parametrize("sent", ["activation", "use_activation"])
def test_verl_reads_the_last_probability(server: Served, sent: str) -> None:
    body = {"model": "/models/skywork", "input": "<user>Where?<assistant>Paris", sent: False}
    answer = ok(server, "/classify", body)
    assert answer["data"][-1]["probs"][-1] == 28.0
    assert (
        answer["object"] == "list" and answer["model"] == "lengths" and answer["data"][0]["num_classes"] == 1
    )


def test_verl_with_sglang_reads_an_embedding(server: Served) -> None:
    answer = ok(server, "/v1/embeddings", {"model": "m", "input": "abcd"})
    assert answer["data"][-1]["embedding"][-1] == 4.0


@pytest.mark.parametrize(("path", "key"), [("/v1/embeddings", "embedding"), ("/pooling", "data")])
def test_base64_is_float32_little_endian_as_openai_s_client_reads_it(
    server: Served, path: str, key: str
) -> None:
    body = {"model": "m", "input": ["abc", "a"], "encoding_format": "base64"}
    entries = ok(server, path, body)["data"]
    assert [each["index"] for each in entries] == [0, 1]
    # 3.0 and 1.0 are 0x40400000 and 0x3f800000; the least byte comes first.
    assert [base64.b64decode(each[key]) for each in entries] == [b"\0\0\x40\x40", b"\0\0\x80\x3f"]
    for plain in ("float", None):
        assert ok(server, path, {**body, "encoding_format": plain})["data"][0][key] == [3.0]


def test_base64_of_a_reward_beyond_float32_is_refused() -> None:
    with served(Lengths(lambda text: RewardResult(RewardStatus.OK, {"reward": 1e39}))) as server:
        status, answer = server.post("/v1/embeddings", {"input": "a", "encoding_format": "base64"})
        assert status == 422 and "beyond float32" in answer["detail"]
        assert ok(server, "/v1/embeddings", {"input": "a"})["data"][0]["embedding"] == [1e39]


def test_vllm_pooling_takes_texts_and_messages(server: Served, source: Lengths) -> None:
    answer = ok(server, "/pooling", {"model": "m", "input": ["a", "bb"]})
    assert [each["data"] for each in answer["data"]] == [[1.0], [2.0]]
    assert ok(server, "/pooling", {"model": "m", "messages": PARIS})["data"][0]["data"] == [5.0]
    assert source.asked[-1][0].completion.text == "Paris"


@pytest.mark.parametrize(
    "body",
    [
        {"text_1": "q", "text_2": ["a", "bb"]},
        {"queries": ["q", "r"], "documents": ["a", "bb"]},
        {"queries": "q", "items": ["a", "bb"]},
        {"data_1": ["q"], "data_2": ["a", "bb"]},
    ],
)
def test_vllm_score_pairs_texts(server: Served, source: Lengths, body: dict[str, Any]) -> None:
    for path in ("/score", "/v1/score"):
        answer = ok(server, path, {"model": "m", **body})
        assert [(each["index"], each["score"]) for each in answer["data"]] == [(0, 1.0), (1, 2.0)]
    assert source.asked[-1][0].prompt.text == "q"


def test_vllm_rerank_sorts_documents(server: Served) -> None:
    body = {"model": "m", "query": "q", "documents": ["a", "ccc", "bb"], "top_n": 2}
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        results = ok(server, path, body)["results"]
        assert [(each["index"], each["relevance_score"]) for each in results] == [(1, 3.0), (2, 2.0)]
        assert results[0]["document"] == {"text": "ccc"}


def test_sglang_classify_answers_a_list(server: Served) -> None:
    answer = ok(server, "/classify", {"model": "m", "text": ["a", "bb"]})
    assert [each["embedding"][0] for each in answer] == [1.0, 2.0]
    assert ok(server, "/classify", {"text": "abc"})["embedding"] == [3.0]


def test_kserve_infers_and_describes(server: Served, source: Lengths) -> None:
    tensor = {"name": "text", "shape": [2, 1], "datatype": "BYTES", "data": [["a"], ["bb"]]}
    answer = ok(server, "/v2/models/lengths/infer", {"id": "7", "inputs": [tensor]})
    assert answer["id"] == "7" and answer["model_name"] == "lengths"
    assert answer["outputs"] == [{"name": "rewards", "shape": [2, 1], "datatype": "FP32", "data": [1.0, 2.0]}]
    pair = [
        {"name": name, "shape": [1], "datatype": "BYTES", "data": [text]}
        for name, text in (("prompt", "q"), ("completion", "abc"))
    ]
    assert ok(server, "/v2/models/lengths/infer", {"inputs": pair})["outputs"][0]["data"] == [3.0]
    assert source.asked[-1][0].prompt.text == "q"
    assert server.ask("GET", "/v2/models/lengths").json()["inputs"][0]["datatype"] == "BYTES"
    for path in (
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/lengths/ready",
        "/v2",
        "/health",
        "/ready",
    ):
        assert server.ask("GET", path).status_code == 200, path
    status, answer = server.post("/v2/models/other/infer", {"inputs": [tensor]})
    assert status == 404 and "there is no model 'other'" in answer["error"]


def test_kserve_reads_binary_tensors(server: Served) -> None:
    texts = [b"a", "\u00e9\u00e9".encode()]
    raw = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
    tensor = {"name": "text", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    reply = server.ask("POST", "/v2/models/lengths/infer", content=head + raw, headers=headers)
    assert reply.json()["outputs"][0]["data"] == [1.0, 2.0]
    for content, length in (
        (head + raw[:-1], len(head)),
        (head, len(head) + 1),
        (head + b"\xff" * 9, len(head)),
    ):
        headers = {"Inference-Header-Content-Length": str(length)}
        reply = server.ask("POST", "/v2/models/lengths/infer", content=content, headers=headers)
        assert reply.status_code == 400 and reply.json()["error"]


def test_triton_s_own_http_client_can_ask(server: Served) -> None:
    http = pytest.importorskip("tritonclient.http")
    import numpy as np

    client = http.InferenceServerClient(server.url.removeprefix("http://"))
    assert client.is_server_ready() and client.is_model_ready("lengths")
    for binary in (True, False):
        tensor = http.InferInput("text", [2, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([["a"], ["bbb"]], dtype=object), binary_data=binary)
        reply = client.infer("lengths", [tensor])
        assert reply.as_numpy("rewards").tolist() == [[1.0], [3.0]]
    tensor.set_data_from_numpy(np.array([["a"], ["[invalid]"]], dtype=object))
    with pytest.raises(Exception, match="1 of 2 samples got no reward"):
        client.infer("lengths", [tensor])
    client.close()


def test_plain_forms(server: Served, source: Lengths) -> None:
    assert ok(server, "/", {"texts": ["a", "bb"], "labels": ["x", {"k": 1}]}) == {
        "model": "lengths",
        "rewards": [1.0, 2.0],
    }
    assert [each.prompt.metadata for each in source.asked[-1]] == [{"label": "x"}, {"k": 1}]
    assert ok(server, "/", {"texts": "abc"}) == {"model": "lengths", "reward": 3.0}
    assert ok(server, "/", {"prompt": "q", "completion": "abc", "label": "y"})["reward"] == 3.0
    assert source.asked[-1][0].sample == "qabc"
    answer = ok(server, "/", {"prompts": ["q", PARIS[:1]], "completions": ["abc", "d"]})
    assert answer["rewards"] == [3.0, 1.0] and source.asked[-1][1].dialogue is not None
    assert ok(server, "/", {"messages": PARIS})["reward"] == 5.0
    assert ok(server, "/", {"prompt": "q", "response": "abc"}) == 3.0
    assert ok(server, "/", {"query": ["abc"]})["rewards"] == [3.0]


def test_partial_answers_tell_what_failed(server: Served) -> None:
    body = {"texts": ["a", "[invalid]"], "partial": True}
    answer = ok(server, "/", body)
    assert answer["rewards"] == [1.0, None] and answer["statuses"] == ["ok", "invalid"]
    assert answer["details"] == ["", "a sample is invalid"]
    assert server.post("/", {"texts": ["[invalid]"], "partial": True})[0] == 422


ODD: list[Any] = [None, 1, "x", [], [1], {}, {"a": 1}, [None], [{}], True, [["x"]], {"role": "user"}]
PLACES: dict[str, dict[str, Any]] = {
    "/get_reward": {"query": ["a"], "prompts": ["a"], "labels": ["x"], "dialogues": [None]},
    "/slime": {"prompt": "a", "response": "b", "label": "x"},
    "/classify": {"input": "a", "encoding_format": "float", "use_activation": False},
    "/pooling": {"messages": PARIS, "tools": [], "chat_template_kwargs": {}},
    "/score": {"text_1": "a", "text_2": "b"},
    "/rerank": {"query": "a", "documents": ["b"], "top_n": 1},
    "/v2/models/lengths/infer": {
        "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"], "parameters": {}}],
        "outputs": [{"name": "rewards"}],
        RAW: "x",
    },
    "/": {"prompts": ["a"], "completions": ["b"], "labels": ["x"], "partial": False},
}


@pytest.mark.parametrize("path", PLACES)
def test_odd_values_are_refused_in_a_sentence_and_break_nothing(server: Served, path: str) -> None:
    body = PLACES[path]
    bodies = [{**body, key: odd} for key in body for odd in ODD] + list(ODD)
    if "inputs" in body:
        (tensor,) = body["inputs"]
        bodies += [{"inputs": [{**tensor, key: odd}]} for key in tensor for odd in ODD]
    with httpx2.Client(base_url=server.url, trust_env=False, timeout=60) as client:
        for each in bodies:
            reply = client.post(path, json=each)
            assert reply.status_code in (200, 400, 422), (each, reply.text)
            assert reply.status_code == 200 or {"detail", "error"} & reply.json().keys()


def test_unknown_form_is_told_which_are_known(server: Served) -> None:
    for path in ("/", "/get_reward", "/classify", "/rerank"):
        status, answer = server.post(path, {"instances": [1]})
        reason = answer.get("detail") or answer["error"]["message"]
        assert status == 400 and f"no form that {path} reads" in reason
        for form in ("/get_reward", "/slime", "/classify", "/v2/models/NAME/infer"):
            assert form in reason
    reply = server.ask("POST", "/", content=b'{"texts": ')
    assert reply.status_code == 400 and "is no JSON" in reply.json()["detail"]
    reply = server.ask("POST", "/reward", json={})
    assert reply.status_code == 404 and "scores are had by a POST to /get_reward" in reply.json()["detail"]


def test_activation_and_token_ids_are_refused(server: Served) -> None:
    for path, body, reason in (
        ("/classify", {"input": "a", "activation": True}, "without a sigmoid"),
        ("/pooling", {"input": [1, 2]}, "no tokenizer"),
        ("/pooling", {"input": "a", "encoding_format": "bytes"}, "`encoding_format` is float or base64 here"),
        ("/pooling", {"input": "a", "encoding_format": ["float"]}, "`encoding_format`"),
        ("/pooling", {"input": "a", "encoding_format": "base64", "embed_dtype": "float16"}, "float32"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "base64", "endianness": "big"}, "little-endian"),
        ("/classify", {"input": "a", "encoding_format": "base64"}, "`encoding_format` is float here"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "one, or as many as"),
        ("/pooling", {"messages": PARIS[:1]}, "the last message is the user's"),
    ):
        status, answer = server.post(path, body)
        assert status == 400 and reason in answer["error"]["message"] and reason in answer["detail"]


@pytest.mark.parametrize("body", [{"texts": ["a", "b"]}, {"prompts": ["p"], "completions": ["a"]}])
def test_one_label_beside_a_list_of_samples_is_refused(server: Served, body: dict[str, Any]) -> None:
    status, answer = server.post("/", {**body, "label": "4"})
    assert status == 400 and "`labels`" in answer["detail"]


def test_one_text_may_have_one_label(server: Served, source: Lengths) -> None:
    assert ok(server, "/", {"texts": "abc", "label": "4"})["reward"] == 3.0
    assert source.asked[-1][0].prompt.metadata == {"label": "4"}


def test_kserve_wants_a_text_for_an_id(server: Served) -> None:
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}
    content = json.dumps({"id": float("nan"), "inputs": [tensor]})
    reply = server.ask("POST", "/v2/models/lengths/infer", content=content)
    assert reply.status_code == 400 and reply.json() == {"error": "`id` is a text"}
