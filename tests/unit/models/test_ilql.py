"""Heads on a language model: which state they are read at, how targets follow, what decoding draws from."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conch.config import GenerationConfig
from conch.errors import ModelError
from conch.models.ilql import ILQLPolicy
from conch.models.loading import fuse_activations
from conch.rollouts.hf.engine import HFEngine
from conch.runs.checkpoint import save_model
from conch.types import Prompt
from tests.numerics import family_rounding, rounding
from tests.odd_families import odd_model
from tests.runs import EOS, LETTERS, PAD, TOKENIZER, policy, shake_heads
from tests.tiny import DECODERS, tiny_decoder

PROMPT, RESPONSE = 4, 3


def awake(lm: PreTrainedModel, **options: object) -> ILQLPolicy:
    """In evaluation mode, with heads that have left their zeros."""
    made = ILQLPolicy(lm, **options).eval()  # pyright: ignore[reportArgumentType]
    shake_heads(made)
    return made


def a_batch(num_rows: int = 3, highest: int = 20) -> tuple[Tensor, Tensor]:
    """Rows of 4 prompt and 3 response tokens, all real."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, highest, (num_rows, PROMPT + RESPONSE), generator=generator)
    return ids, torch.ones_like(ids, dtype=torch.bool)


def assert_near(found: Tensor, expected: Tensor, family: str = "gpt2") -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=family_rounding(family, expected))


def last_state(lm: PreTrainedModel, ids: Tensor) -> Tensor:
    """What the language-model head reads after the last of `ids`, which are not padded: [B, D]."""
    return lm(ids, output_hidden_states=True).hidden_states[-1][:, -1]


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_everything_is_read_at_the_token_before_the_action(family: str) -> None:
    lm = tiny_decoder(family)
    made = awake(lm)
    ids, mask = a_batch()
    output = made(ids, mask, RESPONSE)

    for action in range(RESPONSE):
        state = last_state(lm, ids[:, : PROMPT + action])
        chosen = ids[:, PROMPT + action : PROMPT + action + 1]
        targets = [head(state).gather(1, chosen)[:, 0] for head in made.target_q_heads]
        assert not torch.equal(*targets)
        for q, head in zip(output.qs, made.q_heads, strict=True):
            assert_near(q[:, action], head(state), family)
        assert_near(output.target_q[:, action], torch.minimum(*targets), family)
        assert_near(output.values[:, action], made.value_head(state)[:, 0], family)


@torch.no_grad()
def test_values_and_qs_do_not_see_their_action_but_the_token_before() -> None:
    made = awake(tiny_decoder("gpt2"))
    ids, mask = a_batch()
    before = made(ids, mask, RESPONSE)
    for action in range(RESPONSE):
        changed = ids.clone()
        changed[:, PROMPT + action] = (changed[:, PROMPT + action] + 1) % 20
        after = made(changed, mask, RESPONSE)
        moved = (after.values != before.values) & (after.qs[0] != before.qs[0]).any(dim=-1)

        assert not moved[:, : action + 1].any()
        assert moved[:, action + 1 :].all()


@torch.no_grad()
def test_padding_on_either_side_changes_nothing() -> None:
    made = awake(tiny_decoder("gpt2"))
    ids, mask = a_batch()
    wide = torch.nn.functional.pad(ids, (2, 1), value=21)
    plain, padded = made(ids, mask, RESPONSE), made(wide, torch.nn.functional.pad(mask, (2, 1)), RESPONSE + 1)

    assert_near(padded.qs[1][:, :RESPONSE], plain.qs[1])
    assert_near(padded.target_q[:, :RESPONSE], plain.target_q)
    assert_near(padded.values[:, :RESPONSE], plain.values)


@torch.no_grad()
def test_first_values_and_advantages_are_exactly_zero() -> None:
    made = ILQLPolicy(tiny_decoder("gpt2"))
    output = made(*a_batch(), RESPONSE)

    assert (output.values == 0).all() and (output.target_q == 0).all()
    assert all((q == 0).all() for q in output.qs)
    assert (made.advantages(torch.randn(5, 32)) == 0).all()


def test_all_but_the_targets_are_trained_and_share_nothing() -> None:
    made = awake(tiny_decoder("gpt2"))
    output = made(*a_batch(), RESPONSE)
    total = output.logits.square().mean() + output.values.square().mean() + output.target_q.sum()
    (total + sum(q.square().mean() for q in output.qs)).backward()
    without = {name for name, parameter in made.named_parameters() if parameter.grad is None}

    assert without == {name for name, _ in made.named_parameters() if name.startswith("target_q_heads.")}
    assert len({p.data_ptr() for p in made.parameters()}) == len(list(made.parameters()))


def test_twin_heads_start_apart_and_targets_as_their_heads() -> None:
    made = ILQLPolicy(tiny_decoder("gpt2"))
    first, second = (head.hidden.weight for head in made.q_heads)

    assert not torch.equal(first, second)
    assert torch.equal(made.target_q_heads[0].hidden.weight, first)
    assert torch.equal(made.target_q_heads[1].hidden.weight, second)


def test_targets_move_a_part_of_the_way() -> None:
    made = awake(tiny_decoder("gpt2"))
    online = [p.detach().clone() for p in made.q_heads.parameters()]
    before = [p.detach().clone() for p in made.target_q_heads.parameters()]
    made.sync_targets(0.25)

    for moved, old, goal in zip(made.target_q_heads.parameters(), before, online, strict=True):
        torch.testing.assert_close(moved, 0.75 * old + 0.25 * goal)
    for kept, old in zip(made.q_heads.parameters(), online, strict=True):
        assert torch.equal(kept, old)


def test_targets_of_a_bfloat16_policy_keep_small_steps() -> None:
    made = awake(tiny_decoder("gpt2")).bfloat16()
    weight = made.target_q_heads[0].out.weight
    start = weight.detach().clone()
    for _ in range(100):
        made.sync_targets(0.001)
    with torch.no_grad():
        covered = (weight - start).norm() / (made.q_heads[0].out.weight - start).norm()

    assert made.q_heads[0].out.weight.dtype == torch.bfloat16 and weight.dtype == torch.float32
    assert float(covered) == pytest.approx(1 - 0.999**100, rel=1e-3)
    assert made(*a_batch(), RESPONSE).target_q.dtype == torch.float32


# -------------------------------------------------------------------------------------------------- decoding


def shaped_by_hand(made: ILQLPolicy, ids: Tensor, beta: float) -> Tensor:
    """log pi + beta * (min target Q - V) after unpadded `ids`, not normalised."""
    state = last_state(made.lm, ids)
    first, second = (head(state) for head in made.target_q_heads)
    log_pi = made.lm(ids).logits[:, -1].log_softmax(-1)
    return log_pi + beta * (torch.minimum(first, second) - made.value_head(state))


@pytest.mark.parametrize("beta", [0.0, 1.0, 100.0])
@torch.no_grad()
def test_decoding_scores_are_log_pi_plus_beta_advantages(beta: float) -> None:
    made = awake(policy())
    prompt = torch.tensor([[PAD, PAD, 0, 3], [5, 1, 2, 7]])
    mask = (prompt != PAD).long()
    made.lm.generation_config.pad_token_id = PAD
    torch.manual_seed(0)
    found = made.generate(
        prompt, mask, beta=beta, max_new_tokens=4, output_scores=True, return_dict_in_generate=True
    )
    for row, start in ((0, 2), (1, 0)):
        for step, scores in enumerate(found["scores"]):
            ids = found["sequences"][row : row + 1, start : 4 + step]
            if EOS in ids[0]:
                break
            expected = shaped_by_hand(made, ids, beta)[0]
            # `generate` hands scores on in float32.
            bound = rounding(expected[expected.isfinite()], 8)
            torch.testing.assert_close(scores[row].double(), expected, rtol=0, atol=bound)


@torch.no_grad()
def test_prompts_that_are_alike_are_each_shaped_by_their_own_states_in_slots() -> None:
    made = awake(policy(), logit_mask=torch.eye(policy().config.vocab_size).bool())
    texts = ("abc", "de", "abc", "f", "de", "abc")
    prompts = [Prompt(text, tuple(TOKENIZER(text).input_ids)) for text in texts]
    config = GenerationConfig(max_new_tokens=5, chunk_size=4)
    engine = HFEngine(
        lambda: made.lm, TOKENIZER, config, version=lambda: 0, processors=lambda: made.shaping(3.0)
    )
    for rollout in (each for chunk in engine.generate(prompts, greedy=True) for each in chunk):
        ids = list(rollout.prompt.token_ids)
        for token in rollout.completion.token_ids:
            scores = shaped_by_hand(made, torch.tensor([ids]), 3.0)[0]
            scores[ids[-1]] = -torch.inf
            assert token == int(scores.argmax())
            ids.append(token)


@torch.no_grad()
def test_top_k_chooses_among_the_shaped_scores() -> None:
    made = awake(policy())
    prompt = torch.tensor([[0, 3]]).repeat(50, 1)
    best = shaped_by_hand(made, prompt[:1], beta=20.0).argmax()
    assert best != made.lm(prompt[:1]).logits[0, -1].argmax()
    ids = made.generate(
        prompt, torch.ones_like(prompt), beta=20.0, max_new_tokens=1, top_k=1, pad_token_id=PAD
    )

    assert (ids[:, -1] == best).all()


@torch.no_grad()
def test_logit_mask_forbids_by_the_token_before() -> None:
    size = len(TOKENIZER)
    only_next = torch.ones(size, size, dtype=torch.bool)
    only_next[torch.arange(size), (torch.arange(size) + 1) % size] = False
    made = awake(policy(), logit_mask=only_next)
    prompt = torch.tensor([[5, 0], [5, 2]])
    ids = made.generate(prompt, torch.ones_like(prompt), beta=3.0, max_new_tokens=3, pad_token_id=PAD)

    assert ids[:, 2:].tolist() == [[1, 2, 3], [3, 4, 5]]


def test_logit_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ModelError, match=r"shape \[3, 3\], the model knows 11 tokens"):
        ILQLPolicy(policy(), logit_mask=torch.zeros(3, 3, dtype=torch.bool))


def test_logit_mask_that_lets_nothing_follow_is_refused() -> None:
    size = len(TOKENIZER)
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[4] = True
    with pytest.raises(ModelError, match="nothing follow token 4 "):
        ILQLPolicy(policy(), logit_mask=mask)


def test_generate_without_a_beta_is_refused() -> None:
    with pytest.raises(ModelError, match="pass `beta=`"):
        awake(policy()).generate(torch.tensor([[0, 1]]))


# ------------------------------------------------------------------------------------------------------ files


def save(folder: Path, made: ILQLPolicy) -> Path:
    return save_model(
        folder, made.lm, TOKENIZER, heads=made.head_tensors(), extra={"ilql.json": made.settings()}
    )


@torch.no_grad()
def test_saved_policy_scores_and_generates_as_before(tmp_path: Path) -> None:
    size = len(TOKENIZER)
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[:, PAD] = True
    decoding = {"beta": 5.0, "max_new_tokens": 6, "top_k": 4, "eos_token_id": EOS, "pad_token_id": PAD}
    made = awake(policy(dtype=torch.float32), num_q_heads=3, logit_mask=mask, decoding=decoding)
    fuse_activations(made.lm)  # as what is loaded has them, in float32
    loaded = ILQLPolicy.from_pretrained(save(tmp_path / "saved", made))
    inputs = a_batch(highest=len(LETTERS))
    before, after = made(*inputs, RESPONSE), loaded(*inputs, RESPONSE)

    assert torch.equal(after.logits, before.logits) and torch.equal(after.values, before.values)
    assert torch.equal(after.target_q, before.target_q)
    assert len(after.qs) == 3 and all(map(torch.equal, after.qs, before.qs))
    assert not loaded.training and loaded.decoding == decoding
    assert loaded.logit_mask is not None and torch.equal(loaded.logit_mask, mask)
    prompts = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    outputs = []
    for one in (made, loaded):
        torch.manual_seed(3)
        outputs.append(one.generate(prompts, torch.ones_like(prompts)))
    assert torch.equal(*outputs)


def test_generate_does_not_sample_as_the_base_checkpoint_says(tmp_path: Path) -> None:
    """Its repetition penalty, its ends and its beams are not those that ILQL trained for."""
    made = ILQLPolicy(policy(), decoding={"beta": 2.0, "max_new_tokens": 5, "top_k": 0, "eos_token_id": EOS})
    shake_heads(made)
    ids = torch.tensor([[0, 1, 2], [3, 4, 5]])
    expected = made.eval().generate(ids, do_sample=False)
    foreign = {
        "repetition_penalty": 9.0,
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 4,
        "suppress_tokens": [1],
    }
    for name, value in foreign.items():
        setattr(made.lm.generation_config, name, value)
    loaded = ILQLPolicy.from_pretrained(save(tmp_path / "saved", made))
    assert loaded.lm.generation_config.repetition_penalty == 9.0  # pyright: ignore[reportOptionalMemberAccess]
    for each in (made, loaded):
        assert each.generate(ids, do_sample=False).tolist() == expected.tolist()
    assert loaded.generate(ids, do_sample=False, repetition_penalty=9.0).tolist() != expected.tolist()


def test_generate_pads_the_prompts_of_an_encoder_behind() -> None:
    lm = odd_model("bart")
    lm.generation_config.forced_bos_token_id = 4  # pyright: ignore[reportOptionalMemberAccess]
    made = ILQLPolicy(lm, decoding={"beta": 0.0, "max_new_tokens": 4, "top_k": 0, "pad_token_id": 21}).eval()
    ids, mask = torch.tensor([[21, 21, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    found = made.generate(ids, mask, do_sample=False, eos_token_id=None)
    assert found[:, :2].tolist() == [[2, 4], [2, 4]]
    alone = made.generate(ids[:1, 2:], do_sample=False, eos_token_id=None)
    assert found[0].tolist() == alone[0].tolist()


def test_folder_without_heads_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", awake(policy()))
    (folder / "heads.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no ILQL heads"):
        ILQLPolicy.from_pretrained(folder)


def test_damaged_heads_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", awake(policy()))
    (folder / "heads.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match="holds no ILQL heads"):
        ILQLPolicy.from_pretrained(folder)


def test_heads_of_another_width_or_number_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", awake(policy()))
    narrow = save(tmp_path / "narrow", awake(policy(n_embd=16)))
    shutil.copy(narrow / "heads.safetensors", folder)
    with pytest.raises(ModelError, match="do not fit its language model"):
        ILQLPolicy.from_pretrained(folder)
    (narrow / "ilql.json").write_text(json.dumps({"num_q_heads": 1}))
    with pytest.raises(ModelError, match=r"not whole: q_heads\.1"):
        ILQLPolicy.from_pretrained(narrow)


def test_casting_moves_the_policy_and_leaves_its_values_near() -> None:
    exact = awake(tiny_decoder("gpt2"))
    half = copy.deepcopy(exact).bfloat16()
    expected, found = exact(*a_batch(), RESPONSE), half(*a_batch(), RESPONSE)

    assert found.values.dtype == torch.float32
    torch.testing.assert_close(found.values.double(), expected.values, rtol=0, atol=0.3)
