#!/usr/bin/env bash
# Best-of-n in its_hub says that a reward is 1.0 where all answers agree, and never asks the reward model.
#
# Seen with its_hub 1.2.0 (Python 3.11).
# Guess: `BestOfNResult.scores` holds what the reward model said of each answer; equal answers may be scored once and
#   share that score. So the best score for n = 1, 2, 4, ... answers, averaged over prompts, is a best-of-n curve of
#   the proxy: it rises with n, and its first point is the mean reward.
# Seen: equal answers are scored once, unless there is but one kind: then the scores are [1.0, 1.0, ...], and the
#   reward model is not called. With one answer that is always so, with two where both are the same. Rewards here are
#   -3.5 and -2.0, so the mean best reward rises: -2.73, -2.36, -2.09, -2.00 for 1, 2, 4 and 8 answers. What the
#   results say falls: 1.00, -0.57, -1.64, -1.99, since fewer and fewer prompts have the 1.0. Nothing in a result tells
#   it from a reward.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet its-hub==1.2.0
"$folder/venv/bin/python" - <<'PY'
import asyncio
import random
from statistics import mean

from its_hub import AbstractLanguageModel, AbstractOutcomeRewardModel, BestOfN

REWARDS = {"yes": -2.0, "no": -3.5}


class Coin(AbstractLanguageModel):
    """Answers yes or no at random."""

    def __init__(self):
        self.draws = random.Random(0)

    async def agenerate(self, messages_lst, **kwargs):
        return [await self.agenerate_single(messages) for messages in messages_lst]

    async def agenerate_single(self, messages, **kwargs):
        return {"role": "assistant", "content": self.draws.choice(["yes", "no"])}


class Proxy(AbstractOutcomeRewardModel):
    """Rewards an answer by the table, and counts those that it was asked about."""

    asked = 0

    async def ascore(self, conversations, **kwargs):
        self.asked += len(conversations)
        return [REWARDS[conversation[-1].content] for conversation in conversations]

    def score(self, conversations, **kwargs):
        return asyncio.run(self.ascore(conversations))


async def curve_point(num_answers, num_prompts=400):
    lm, proxy = Coin(), Proxy()
    results = [
        await BestOfN(proxy).ainfer(lm, f"prompt {i}", budget=num_answers, return_response_only=False)
        for i in range(num_prompts)
    ]
    said = mean(max(result.scores) for result in results)
    true = mean(max(REWARDS[response["content"]] for response in result.responses) for result in results)
    invented = sum(set(result.scores) == {1.0} for result in results)
    agree = sum(len({response["content"] for response in result.responses}) == 1 for result in results)
    print(f"n = {num_answers}: mean best score {said:.2f}, of the rewards {true:.2f}; ", end="")
    print(f"{invented} of {num_prompts} prompts have 1.0 (all answers agree: {agree}); {proxy.asked} answers scored")
    assert invented == agree and proxy.asked == 2 * (num_prompts - agree)
    return said, true


async def main():
    points = [await curve_point(num_answers) for num_answers in (1, 2, 4, 8)]
    said, true = zip(*points)
    assert list(true) == sorted(true) and max(true) < -2.0, true
    assert list(said) == sorted(said, reverse=True) and said[0] == 1.0, said
    print("as stated")


asyncio.run(main())
PY
