"""The benchmark of best-of-n compares like with like."""

from __future__ import annotations

import pytest
import torch

from benchmarks.best_of_n import SHARED, SMALL, UNSHARED, main, model_of, prompts_of, sample


def test_sides_differ_in_nothing_but_how_many_prompts_there_are() -> None:
    one, other = (prompts_of(SMALL, side) for side in (SHARED, UNSHARED))

    assert len({prompt.token_ids for prompt in one}) == 1
    assert len({prompt.token_ids for prompt in other}) == SMALL.completions
    assert {len(prompt.token_ids) for prompt in (*one, *other)} == {SMALL.prompt_tokens}


@pytest.mark.parametrize(("side", "reads"), [(SHARED, 1), (UNSHARED, SMALL.completions)])
def test_prompt_is_read_as_often_as_the_side_says(side: str, reads: int) -> None:
    model = model_of(SMALL)
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(
            len(kwargs["input_ids"]) if kwargs["input_ids"].shape[1] == SMALL.prompt_tokens else 0
        ),
        with_kwargs=True,
    )
    torch.manual_seed(0)

    assert sample(SMALL, model, side) == SMALL.completions * SMALL.new_tokens
    assert sum(rows) == reads


def test_script_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--small", "--rounds", "1"]) == 0
    assert "| 12 completions behind 24 prompt tokens |" in capsys.readouterr().out
