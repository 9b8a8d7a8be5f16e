"""What others' clients send and read: a form each, from a body to samples and from scores to an answer."""

from __future__ import annotations

from collections.abc import Iterator

from conch.reward_server.forms.base import Form
from conch.reward_server.forms.kserve import KSERVE
from conch.reward_server.forms.plain import DIALOGUE, PAIRS, TEXTS
from conch.reward_server.forms.trainers import OPENRLHF, SLIME, SLIME_SCORES
from conch.reward_server.forms.vllm import CLASSIFY, EMBEDDINGS, POOLING, RERANK, SCORE, SGLANG

ADDRESSES: dict[str, tuple[Form, ...]] = {
    "/get_reward": (OPENRLHF,),
    "/slime": (SLIME,),
    "/slime/scores": (SLIME_SCORES,),
    "/": (OPENRLHF, TEXTS, PAIRS, SLIME, DIALOGUE),
    "/classify": (CLASSIFY, SGLANG),
    "/pooling": (POOLING,),
    "/v1/embeddings": (EMBEDDINGS,),
    "/score": (SCORE,),
    "/v1/score": (SCORE,),
    "/rerank": (RERANK,),
    "/v1/rerank": (RERANK,),
    "/v2/rerank": (RERANK,),
}
"""Address -> the forms that it reads, the first that fits. KServe's has the model's name in it."""


def addresses(name: str) -> Iterator[tuple[str, tuple[Form, ...]]]:
    """All addresses of the reward of this name, where it need not be the only one."""
    yield from ((f"/models/{name}{path}".rstrip("/"), forms) for path, forms in ADDRESSES.items())
    yield f"/v2/models/{name}/infer", (KSERVE,)
