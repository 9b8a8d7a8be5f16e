"""Scores of answers by reward models: served ones, or checkpoints that this process serves meanwhile."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from conch.addresses import SCHEMES, Endpoint
from conch.atomic_files import replace_text
from conch.config import RewardConfig, load
from conch.converters.to_triton import to_triton
from conch.errors import ConfigError, missing_path
from conch.log import get_logger, progress
from conch.rewards.factory import from_user
from conch.rewards.scorer import RewardScorer, total_reward
from conch.serving.server.server import ServerOptions, TritonServer
from conch.store.store import is_valid_name, list_models
from conch.types import Completion, Dialogue, Prompt, Rollout
from examples.hosting import last_gpu
from examples.overoptimisation.bon_files import Entry

_log = get_logger("conch.overoptimisation")

TEMPLATE = "<|prompter|>{instruction}<|endoftext|><|assistant|>"
"""What the paper's reward models read in front of an answer."""

_ROWS_AT_ONCE = 1024
_READY_WITHIN_S = 600.0


def _fingerprint(model: str) -> str:
    """What changes with a model's name and with a checkpoint's files: one trained anew is another."""
    folder = Path(model).expanduser()
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    content = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    told = json.dumps([str(folder.resolve()) if files else model, content])
    return hashlib.sha256(told.encode()).hexdigest()


@contextmanager
def address_of(model: str, store: Path) -> Iterator[str]:
    """Address of a reward model, for as long as the context lasts.

    model: an address, a model of the store, or a checkpoint's folder or hub id, which is converted first.

    Raises:
        ConfigError: there is no such model.
        ConchError: it cannot be converted or served.
    """
    if _is_address(model):
        yield model
        return
    gpu = last_gpu()
    name = _in_store(model, store, gpu)
    server = TritonServer(store, [name], options=ServerOptions(gpu=gpu), ready_timeout_s=_READY_WITHIN_S)
    with server:
        _log.info("serving %s on %s", name, f"GPU {gpu}" if gpu else "the CPU")
        yield server.endpoint(name)


def _is_address(model: str) -> bool:
    if model.startswith(SCHEMES) or ".py:" in model:
        return True
    try:
        return bool(Endpoint.parse_all(model))
    except ConfigError:
        return False


def _in_store(model: str, store: Path, gpu: str) -> str:
    stored = list_models(store) if store.is_dir() else []
    folder = Path(model).expanduser()
    if is_valid_name(model) and model in stored and not folder.is_dir():
        return model
    if not folder.is_dir() and model.count("/") != 1:
        raise ConfigError(
            f"{model} is no reward model: no folder{missing_path(folder)}, no model of {store} (there are: "
            f"{', '.join(stored) or 'none'}), and no address host:port/model"
        )
    short = re.sub(r"[^A-Za-z0-9._-]", "-", model.rstrip("/").rpartition("/")[2]).lstrip("._-") or "reward"
    name = f"{short}-{_fingerprint(model)[:8]}"
    if name not in stored:
        _log.info("converting %s into %s", model, store / name)
        to_triton(
            model,
            name=name,
            model_store=store,
            dtype="float16" if gpu else "float32",
            instance_kind="gpu" if gpu else "cpu",
        )
    return name


def score_entries(
    model: str, entries: Sequence[Entry], folder: Path, *, store: Path, template: str = TEMPLATE
) -> list[np.ndarray]:
    """Score all answers; of each entry one number per answer, in their order.

    Scores are written to `folder` entry by entry, and taken from there where they are of the same answers and
    the same model: a call that was cut short goes on.

    template: what a model of texts reads in front of an answer; a model with a chat template reads the
        instruction as the user's message.

    Raises:
        ConchError: see `address_of`; or the model gave an answer no score.
    """
    marks = [mark_of(model, entry, template) for entry in entries]
    paths = [folder / f"entry_{number:06d}.json" for number in range(len(entries))]
    known = [_known(path, mark) for path, mark in zip(paths, marks, strict=True)]
    if all(scores is not None for scores in known):
        return [scores for scores in known if scores is not None]
    folder.mkdir(parents=True, exist_ok=True)
    with address_of(model, store) as address:
        key = "function" if ".py:" in address else "url"
        config = load(RewardConfig, {key: address, "client": {"cache_size": 0}})
        with closing(from_user(None, config)) as source:
            source.check()
            scorer = RewardScorer(source, config)
            for number, entry in enumerate(progress(entries, desc=f"scoring by {model}")):
                if known[number] is None:
                    scores = _scores(scorer, entry, template)
                    value = {"of": marks[number], "scores": scores.tolist()}
                    replace_text(paths[number], json.dumps(value))
                    known[number] = scores
    return [scores for scores in known if scores is not None]


def _scores(scorer: RewardScorer, entry: Entry, template: str) -> np.ndarray:
    messages = ({"role": "user", "content": entry.instruction},)
    text = template.replace("{instruction}", entry.instruction, 1)
    prompt = Prompt(text, (), dialogue=Dialogue(messages))
    scores: list[float] = []
    for start in range(0, len(entry.answers), _ROWS_AT_ONCE):
        answers = entry.answers[start : start + _ROWS_AT_ONCE]
        scorer.submit([Rollout(prompt, Completion(answer, (), (), "eos"), 0) for answer in answers])
        scores += [total_reward(result, {}) for result in scorer.gather()]
    return np.array(scores)


def mark_of(model: str, entry: Entry, template: str) -> str:
    """What scores are of: the model, and the texts that it reads."""
    told: list[Any] = [_fingerprint(model), template, entry.instruction, entry.answers]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _known(path: Path, mark: str) -> np.ndarray | None:
    try:
        value = json.loads(path.read_bytes())
        return np.array(value["scores"], dtype=float) if value["of"] == mark else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
