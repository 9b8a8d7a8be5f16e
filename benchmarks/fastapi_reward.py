"""One sample a POST: the reward model behind FastAPI, for `benchmarks.rewards` to compare with.

    python -m benchmarks.fastapi_reward CHECKPOINT PORT

Written as small as such servers are: every request is tokenised and scored by itself, as it comes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast


class Query(BaseModel):
    """The body of a request: samples."""

    query: list[str]


def make_app(checkpoint: Path) -> FastAPI:
    """`POST /score {"query": [text]} -> {"rewards": [number]}`."""
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    app = FastAPI()

    @app.post("/score")
    async def score(body: Query) -> dict[str, list[float]]:
        closed = [text + tokenizer.eos_token for text in body.query]
        inputs = tokenizer(closed, return_tensors="pt", padding=True)
        with torch.inference_mode():
            logits = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits
        return {"rewards": logits[:, 0].tolist()}

    return app


def main() -> None:
    """Serve until killed."""
    torch.set_num_threads(1)
    checkpoint, port = sys.argv[1:]
    app = make_app(Path(checkpoint))
    # Under uvloop an endpoint that computes in the loop would starve most of its callers.
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", loop="asyncio")


if __name__ == "__main__":
    main()
