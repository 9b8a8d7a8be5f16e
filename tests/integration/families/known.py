"""Tests that fail for a fault that is known and not mended yet, each with the fault.

They are expected to fail. Whoever mends one sees them pass, which counts as a failure, and deletes the lines.
"""

from __future__ import annotations

KNOWN: dict[str, dict[str, tuple[str, ...]]] = {
    "A6: routers are noisy in training mode": {
        "test_policy_begins_at_its_reference_and_its_sampler": (
            "mixtral-grpo",
            "mixtral-ppo",
            "phimoe-grpo",
            "phimoe-ppo",
            "switch_transformers-grpo",
            "switch_transformers-ppo",
        ),
        "test_sft_loss_is_that_of_each_sample_alone": ("mixtral", "phimoe", "switch_transformers"),
    },
    "A7: an encoder's prompts are padded left": {
        "test_completions_end_where_those_of_transformers_end": (
            "bart",
            "blenderbot",
            "marian",
            "mbart",
            "pegasus",
        ),
        "test_policy_begins_at_its_reference_and_its_sampler": (
            "bart-ppo",
            "blenderbot-ppo",
            "marian-ppo",
            "mbart-ppo",
            "pegasus-ppo",
        ),
        "test_sampled_logprobs_are_those_of_each_sample_alone": (
            "bart-grpo",
            "bart-ppo",
            "blenderbot-grpo",
            "blenderbot-ppo",
            "marian-grpo",
            "marian-ppo",
            "mbart-grpo",
            "mbart-ppo",
            "pegasus-grpo",
            "pegasus-ppo",
        ),
        "test_sft_loss_is_that_of_each_sample_alone": ("bart", "blenderbot", "marian", "mbart", "pegasus"),
    },
    "A7: its states see the padding before a prompt": {
        "test_completions_end_where_those_of_transformers_end": ("rwkv",),
        "test_policy_begins_at_its_reference_and_its_sampler": (
            "recurrent_gemma-ppo",
            "rwkv-grpo",
            "rwkv-ppo",
        ),
        "test_sampled_logprobs_are_those_of_each_sample_alone": (
            "recurrent_gemma-grpo",
            "recurrent_gemma-ppo",
            "rwkv-grpo",
            "rwkv-ppo",
        ),
        "test_sft_loss_is_that_of_each_sample_alone": ("recurrent_gemma", "rwkv"),
    },
    "A7: its positions are counted from behind the pad token's id": {
        "test_sampled_logprobs_are_those_of_each_sample_alone": ("roberta-grpo", "roberta-ppo"),
        "test_sft_loss_is_that_of_each_sample_alone": ("roberta",),
    },
    "A12: the trial of packed rows ends in an error of the model's": {
        "test_policy_begins_at_its_reference_and_its_sampler": (
            "falcon_alibi-grpo",
            "falcon_alibi-ppo",
            "openai_gpt-grpo",
            "openai_gpt-ppo",
        ),
        "test_reward_reads_what_decoding_prompt_and_response_together_gives": (
            "falcon_alibi-grpo",
            "falcon_alibi-ppo",
            "openai_gpt-grpo",
            "openai_gpt-ppo",
        ),
        "test_sampled_logprobs_are_those_of_each_sample_alone": (
            "falcon_alibi-grpo",
            "falcon_alibi-ppo",
            "openai_gpt-grpo",
            "openai_gpt-ppo",
        ),
        "test_completions_end_where_those_of_transformers_end": ("falcon_alibi", "openai_gpt"),
        "test_prompts_have_the_special_tokens_of_their_tokenizer_or_template_once": (
            "falcon_alibi",
            "openai_gpt",
        ),
    },
    "A12: packed rows lose its local attention": {
        "test_completions_end_where_those_of_transformers_end": ("gemma3_images", "llama4"),
        "test_policy_begins_at_its_reference_and_its_sampler": (
            "gemma3_images-grpo",
            "gemma3_images-ppo",
            "llama4-grpo",
            "llama4-ppo",
        ),
        "test_sampled_logprobs_are_those_of_each_sample_alone": (
            "gemma3_images-grpo",
            "gemma3_images-ppo",
            "llama4-grpo",
            "llama4-ppo",
        ),
    },
    "a model whose tokens see later ones is taken for a policy": {
        "test_family_is_refused_by_name": (
            "bert_encoder-grpo",
            "bert_encoder-ppo",
            "bert_encoder-sft",
            "roberta_encoder-grpo",
            "roberta_encoder-ppo",
            "roberta_encoder-sft",
            "xlm-grpo",
            "xlm-ppo",
            "xlm-sft",
            "xlnet-grpo",
            "xlnet-ppo",
            "xlnet-sft",
        ),
    },
    "refused by an error of transformers' own": {
        "test_family_is_refused_by_name": ("reformer-grpo", "reformer-ppo", "reformer-sft"),
    },
}
"""Fault -> test -> its parameters."""


def known_fault(test: str, parameters: str) -> str | None:
    """The fault that this test fails for; None where it must pass."""
    return next((fault for fault, tests in KNOWN.items() if parameters in tests.get(test, ())), None)
