"""Every family of the table; see `checks` for what holds."""

from __future__ import annotations

import pytest

from tests.integration.families.checks import (  # noqa: F401
    run,
    test_completions_end_where_those_of_transformers_end,
    test_policy_begins_at_its_reference_and_its_sampler,
    test_prompts_have_the_special_tokens_of_their_tokenizer_or_template_once,
    test_reward_reads_what_decoding_prompt_and_response_together_gives,
    test_sampled_logprobs_are_those_of_each_sample_alone,
    test_sft_learns_what_the_policy_would_have_to_sample,
    test_sft_loss_is_that_of_each_sample_alone,
)
from tests.integration.families.runs import FamilyRuns
from tests.integration.families.table import FAMILIES


@pytest.fixture(scope="module", params=[*FAMILIES])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FamilyRuns:
    return FamilyRuns(FAMILIES[request.param], tmp_path_factory.mktemp("family"))
