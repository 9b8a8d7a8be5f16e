"""Which tokens a served model reads of texts and dialogues: no special token twice in a row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conch.converters.checkpoints.reader import read_checkpoint
from conch.converters.options import ConversionOptions, ReadOptions
from conch.converters.parity.samples import build_cases
from conch.converters.parts import plan_parts, write_part
from conch.converters.triton_models.reward_model import RejectedError, Scorer
from conch.converters.triton_models.tokenizer_model import TextEncoder
from conch.data import preferences
from conch.data.chat import dialogue_of_row, reserved_names
from conch.errors import DataError
from tests.chats import CHATS, WINDOW, chat_reward_model, chat_tokenizer

ASKED = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]
AS_TEXT = "{text}{eos}"
SYSTEM = [{"role": "system", "content": "Be brief."}, *ASKED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    for family in CHATS:
        chat_reward_model(folder / family, family)
    return folder


def served(folder: Path, family: str, template: str | None, **reading: Any) -> Scorer:
    """What is written of the checkpoint, without the comparison."""
    return Scorer(written(folder, family, template, **reading), "cpu")


def written(folder: Path, family: str, template: str | None, **reading: Any) -> Path:
    options = ConversionOptions(template=template, **reading)
    checkpoint = read_checkpoint(str(folder / family), options)
    version = folder / f"{family}-{len(list(folder.iterdir()))}"
    version.mkdir()
    (part,) = plan_parts("model", options)
    write_part(version, part, checkpoint, options)
    return version


def ids_of(scorer: Scorer, sample: Any) -> list[int]:
    text = sample if isinstance(sample, str) else json.dumps(sample)
    return scorer.rows_from_texts([text.encode()])[0].ids


def shown(scorer: Scorer, sample: Any) -> str:
    return scorer.tokenizer.decode(ids_of(scorer, sample), skip_special_tokens=False)


@pytest.mark.parametrize("family", CHATS)
def test_a_dialogue_is_read_as_its_own_template_renders_it(folder: Path, family: str) -> None:
    scorer = served(folder, family, "chat")
    tokenizer = chat_tokenizer(family)
    text = str(tokenizer.apply_chat_template(ASKED, tokenize=False))
    assert shown(scorer, ASKED) == text
    if tokenizer.bos_token:
        assert text.count(str(tokenizer.bos_token)) == 1


@pytest.mark.parametrize("family", CHATS)
def test_a_text_that_begins_with_bos_and_ends_with_eos_gets_neither_again(folder: Path, family: str) -> None:
    scorer = served(folder, family, AS_TEXT)
    bos, eos = scorer.tokenizer.bos_token or "", scorer.tokenizer.eos_token
    assert shown(scorer, "four") == f"{bos}four{eos}"
    assert shown(scorer, f"{bos}four{eos}") == f"{bos}four{eos}"
    assert shown(scorer, f"{bos}{bos}four{eos}{eos}") == f"{bos}four{eos}"
    assert shown(scorer, f"four{eos}five") == f"{bos}four{eos}five{eos}"


def test_the_tokenizer_of_a_graph_makes_the_same_ids(folder: Path) -> None:
    """Its `model.py` is another file."""
    for family in CHATS:
        for side in ("left", "right"):
            version = written(folder, family, AS_TEXT, truncation_side=side, max_length=20)
            scorer = Scorer(version, "cpu")
            bos, eos = scorer.tokenizer.bos_token or "", scorer.tokenizer.eos_token
            for text in (
                "four",
                f"{bos}four{eos}",
                "x" * 30,
                f"{bos}{'ab' * 30}{eos}",
                f"{'a' * 18}{eos}b" * 2,
            ):
                (row,), (mask,) = TextEncoder(version).encode([text.encode()])
                assert row[mask.astype(bool)].tolist() == ids_of(scorer, text), (family, side, text)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_cut_leaves_one_bos_and_one_eos(folder: Path, side: Any) -> None:
    scorer = served(folder, "llama", AS_TEXT, truncation_side=side, max_length=6)
    bos, eos = scorer.tokenizer.bos_token, scorer.tokenizer.eos_token
    left = "fghi" if side == "left" else "abcd"
    for text in ("abcdefghi", f"{bos}abcdefghi", f"{bos}abcdefghi{eos}"):
        assert shown(scorer, text) == f"{bos}{left}{eos}"


def test_a_dialogue_of_a_model_that_was_trained_with_eos_ends_with_it_once(folder: Path) -> None:
    """`four<|im_end|>\\n<|im_end|>` in training, `four<|im_end|>` when asked: another score."""
    told = {"template": "{text}{eos}"}
    (folder / "chatml" / "reward_model.json").write_text(json.dumps(told))
    try:
        scorer = served(folder, "chatml", "chat")
    finally:
        (folder / "chatml" / "reward_model.json").unlink()
    assert scorer.manifest["template"] == "chat{eos}"
    assert shown(scorer, ASKED).endswith("assistant\nfour<|im_end|>")
    # Gemma's turns end with another token than its eos.
    assert shown(served(folder, "gemma", "chat{eos}"), ASKED).endswith("four<end_of_turn><eos>")


def test_tools_and_template_variables_reach_the_template(folder: Path) -> None:
    scorer = served(folder, "chatml", "chat")
    whole = {"messages": ASKED, "tools": [{"name": "add"}], "chat_template_kwargs": {"unused": True}}
    assert shown(scorer, whole).startswith('<|im_start|>tools\n[{"name": "add"}]<|im_end|>\n')
    assert shown(scorer, {"messages": ASKED}) == shown(scorer, ASKED)


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ("four", "no JSON list of messages"),
        ("[]", "no JSON list of messages"),
        ({"messages": ASKED, "tool": []}, "unknown key `tool`"),
        ({"messages": ASKED, "tools": {}}, "`tools` of the dialogue is no list"),
        ({"messages": ASKED, "chat_template_kwargs": {"chat_template": "x"}}, "may not set 'chat_template'"),
        (SYSTEM, "this model has no system turn"),
    ],
)
def test_what_is_no_dialogue_for_the_template_is_refused(folder: Path, sample: Any, reason: str) -> None:
    with pytest.raises(RejectedError, match=reason):
        ids_of(served(folder, "gemma", "chat"), sample)


@pytest.mark.parametrize("family", CHATS)
def test_the_comparison_has_dialogues_of_several_turns(folder: Path, family: str) -> None:
    """And a system message where the template takes one; all of them are read alike here and there."""
    scorer = served(folder, family, "chat", max_length=120)
    checkpoint = read_checkpoint(str(folder / family), ReadOptions(template="chat", max_length=120))
    cases = build_cases(checkpoint, "text", max_batch_size=8)
    samples = {sample for case in cases for sample in case.samples if sample.ids}
    for sample in samples:
        assert ids_of(scorer, sample.text) == list(sample.ids)
    whole = [json.loads(sample.text) for sample in samples]
    dialogues = [each["messages"] if isinstance(each, dict) else each for each in whole]
    kinds = {type(message["content"]) for each in dialogues for message in each}
    assert kinds == {str, list}
    roles = {tuple(message["role"] for message in each) for each in dialogues}
    assert ("user", "assistant", "user", "assistant") in roles
    assert (("system", "user", "assistant") in roles) == (family != "gemma")


@torch.inference_mode()
def test_the_score_is_the_checkpoints_on_what_its_card_tells_to_feed(folder: Path) -> None:
    scorer = served(folder, "llama", "chat")
    row = scorer.tokenizer.apply_chat_template(SYSTEM, return_dict=True, return_tensors="pt")
    right = chat_reward_model(folder / "again", "llama")(**row).logits.item()
    rewards = scorer.score(scorer.rows_from_texts([json.dumps(SYSTEM).encode()])).rewards
    np.testing.assert_allclose(rewards, [[right]], atol=1e-5)


def test_a_long_window_is_compared_up_to_what_is_affordable(folder: Path, tmp_path: Path) -> None:
    chat_reward_model(tmp_path / "long", "llama")
    config = json.loads((tmp_path / "long" / "config.json").read_text())
    config["max_position_embeddings"] = 32_768
    (tmp_path / "long" / "config.json").write_text(json.dumps(config))

    def compared(**settings: Any) -> tuple[int, int]:
        checkpoint = read_checkpoint(str(tmp_path / "long"), ReadOptions(**settings))
        return checkpoint.longest_compared, checkpoint.rules.max_length

    longest, limit = compared()
    assert 4096 < longest < limit == 32_768
    assert compared(max_length=32_768) == (longest, limit)
    assert compared(max_length=4096) == (4096, 4096)
    short = read_checkpoint(str(folder / "llama"), ReadOptions())
    assert short.longest_compared == short.rules.max_length == WINDOW
    checkpoint = read_checkpoint(str(tmp_path / "long"), ReadOptions(max_length=3000))
    cases = build_cases(replace(checkpoint, longest_compared=2048), "text", max_batch_size=4)
    scored = max(len(s.ids) for case in cases if not case.only_ids for s in case.samples)
    assert 1900 < scored <= 2048
    (too_long,), (fits,) = (case.samples for case in cases if case.only_ids)
    assert len(too_long.ids) == 3000 and 2990 <= len(fits.ids) <= 3000


TEXTS = ["four", "", "two and two? " * 9, "{bos}four{eos}", "{bos}{bos}four{eos}{eos}", "four{eos}five"]
DIALOGUES = [
    ASKED,
    SYSTEM,
    [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in ASKED],
    [*ASKED, *ASKED],
    [{"role": "user", "content": "two and two? " * 9}, ASKED[1]],
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("limit", [12, WINDOW])
@pytest.mark.parametrize("family", CHATS)
def test_a_reward_model_learns_from_the_ids_that_it_is_served(
    folder: Path, family: str, limit: int, side: str
) -> None:
    """Training encodes by its own code: `conch.data.preferences`."""
    tokenizer = chat_tokenizer(family)
    tokenizer.truncation_side = side
    reading = {"max_length": limit, "truncation_side": side}
    texts = [text.format(bos=tokenizer.bos_token or "", eos=tokenizer.eos_token) for text in TEXTS]
    for template in ("{text}", "{text}{eos}", "four {text}{eos}"):
        scorer = served(folder, family, template, **reading)
        given = [text for text in texts if ids_of_or_none(scorer, text) is not None]
        learned = preferences.TextEncoder(tokenizer, template, limit).encode(given)
        assert [list(ids) for ids in learned] == [ids_of(scorer, text) for text in given]
    for template, learned_in in (("chat", "chat"), ("chat{eos}", "{text}{eos}")):
        scorer = served(folder, family, template, **reading)
        taken = [messages for messages in DIALOGUES if ids_of_or_none(scorer, messages) is not None]
        learned = preferences.TextEncoder(tokenizer, learned_in, limit).encode(taken)
        assert len(taken) >= 3
        assert [list(ids) for ids in learned] == [ids_of(scorer, messages) for messages in taken]


PARTS_ONLY = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)
EITHER = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}[{{ part.text }}]{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
)
SYSTEM_AS_TEXT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'system' %}{{ message.content | trim }}"
    "{% else %}{{ message.content[0].text }}{% endif %}<|im_end|>\n{% endfor %}"
)
CALLS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}: ARGUMENTS{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)
TEMPLATES = {
    "strings only": CHATS["chatml"]["template"],
    "parts only": PARTS_ONLY,
    "either": EITHER,
    "system as text": SYSTEM_AS_TEXT,
    "arguments as dict": CALLS.replace("ARGUMENTS", "{{ call.function.arguments | tojson }}"),
    "arguments as JSON": CALLS.replace("ARGUMENTS", "{{ '' + call.function.arguments }}"),
}


def in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every content in two parts, with keys as Arrow tables fill them up."""
    return [
        {
            **message,
            "tool_calls": None,
            "content": [
                {"type": "text", "text": message["content"][:2], "image": None},
                {"type": "text", "text": message["content"][2:], "image": None},
            ],
        }
        for message in messages
    ]


def calling(arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": arguments}}
    answer = {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": "4"}
    return [ASKED[0], {"role": "assistant", "content": None, "tool_calls": [call]}, answer, ASKED[1]]


FORMS = {
    "strings": ASKED,
    "parts": in_parts(ASKED),
    "strings with system": SYSTEM,
    "parts with system": in_parts(SYSTEM),
    "JSON": calling('{"a": 2, "b": "Ü"}'),
    "dict": calling({"a": 2, "b": "Ü", "c": None}),
    "no JSON": calling("2 + 2"),
}


@pytest.mark.parametrize("named", TEMPLATES)
def test_every_form_of_a_message_is_served_as_it_is_learned(folder: Path, tmp_path: Path, named: str) -> None:
    """What the template reads is found at the conversion, and at training for each dialogue."""
    chat_reward_model(tmp_path / "chatml", "chatml")
    (tmp_path / "chatml" / "chat_template.jinja").write_text(TEMPLATES[named])
    scorer = served(tmp_path, "chatml", "chat", max_length=WINDOW)
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = TEMPLATES[named]
    assert scorer.tokenizer.chat_template == tokenizer.chat_template
    encoder = preferences.TextEncoder(tokenizer, "chat", WINDOW)
    texts = {}
    for form, messages in FORMS.items():
        try:
            (learned,) = encoder.encode([{"messages": messages}])
        except DataError:
            with pytest.raises(RejectedError):
                ids_of(scorer, messages)
            continue
        assert list(learned) == ids_of(scorer, messages), form
        texts[form] = shown(scorer, messages)
    assert "two and two?" in texts["strings"] or named == "system as text"
    if named in ("strings only", "parts only"):
        assert texts["parts"] == texts["strings"]
    if named.startswith("arguments"):
        assert texts["JSON"] == texts["dict"]
        assert 'add: {"a": 2, "b": "Ü"}<|im_end|>' in texts["JSON"]


def test_a_manifest_of_an_earlier_conversion_leaves_messages_as_they_are(folder: Path) -> None:
    version = written(folder, "chatml", "chat")
    manifest = json.loads((version / "manifest.json").read_text())
    assert manifest["contents"] == {"system": "text", "user": "text", "assistant": "text", "tool": "text"}
    del manifest["contents"], manifest["arguments"]
    (version / "manifest.json").write_text(json.dumps(manifest))
    assert "[{'type': 'text', 'text': 'tw'}" in shown(Scorer(version, "cpu"), in_parts(ASKED))


def test_training_and_server_refuse_the_same_template_variables(folder: Path) -> None:
    scorer = served(folder, "chatml", "chat")
    assert reserved_names() == scorer.encoder.reserved
    assert {"documents", "messages", "conversation", "tokenize"} <= reserved_names()
    for name in ("documents", "messages"):
        sample = {"messages": ASKED, "chat_template_kwargs": {name: []}}
        with pytest.raises(RejectedError, match=f"may not set '{name}'"):
            ids_of(scorer, sample)
        with pytest.raises(DataError, match=name):
            dialogue_of_row(sample, "messages")


def ids_of_or_none(scorer: Scorer, sample: Any) -> list[int] | None:
    try:
        return ids_of(scorer, sample)
    except RejectedError:
        return None
