"""Reward models of a study, served for as long as they are asked: those that have no address are converted,
and one server of this machine has them all."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from conch.addresses import SCHEMES, Endpoint
from conch.config.reward import VERIFIER
from conch.converters.ensemble import to_ensemble
from conch.converters.stacked import check_stackable
from conch.converters.to_triton import to_triton
from conch.errors import ConfigError, ConversionError, ServerStartError, missing_path
from conch.log import get_logger
from conch.models.folders import model_folder
from conch.serving.server.server import ServerOptions, TritonServer
from conch.store.manifest import ServedDtype
from conch.store.store import is_valid_name, list_models, read_model
from examples.hosting import last_gpu, launchers_note, tell, wait_for_host
from examples.overoptimisation.settings import OBJECTIVES, RankSettings

_log = get_logger("conch.overoptimisation")

ENSEMBLE = "ensemble"
"""Stands for the models that are joined."""

_READY_WITHIN_S = 600.0
_DIGEST_LETTERS = 8
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FUNCTION = re.compile(r".+\.py:\w+")


@dataclass(frozen=True)
class Serving:
    """How checkpoints are served.

    store: folder of converted models.
    template: how a text is presented to them; None takes their own.
    dtype: precision; None takes float16 on a GPU, float32 on a CPU.
    """

    store: Path
    template: str | None = None
    dtype: ServedDtype | None = None


def has_address(name: str) -> bool:
    """Whether a reward is asked where it is: a served model, an endpoint, a verifier or a function."""
    if name.startswith((*SCHEMES, VERIFIER)) or _FUNCTION.fullmatch(name):
        return True
    try:
        return bool(Endpoint.parse_all(name))
    except ConfigError:
        return False


@contextmanager
def served(
    names: Sequence[str], serving: Serving, ensemble: RankSettings | None = None
) -> Iterator[dict[str, str]]:
    """Address of each reward model, for as long as the context lasts. Processes of one launcher share a
    server.

    The first process of a machine hosts what has no address, on the last GPU, or on the CPU where there is
    none; the others wait until it is ready.

    ensemble: joins all models into one of the store, whose address is that of `ENSEMBLE`.

    Raises:
        ConchError: a model cannot be found, converted or served. The launcher then ends the processes that
            wait.
    """
    addresses = {name: name for name in names if has_address(name)}
    hosted = [name for name in names if name not in addresses]
    if ensemble is not None and addresses:
        raise ConfigError(
            f"`rank_config.serve_as` = {ensemble.serve_as} joins models of the store, and "
            f"{next(iter(addresses))} is served already: leave it at members"
        )
    if not hosted:
        yield addresses
        return
    processes, here = (int(os.environ.get(key) or 1) for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if processes != here:
        raise ServerStartError(
            f"a run on several machines needs servers for its reward models: give {hosted[0]} as "
            "host:port/model"
        )
    if int(os.environ.get("LOCAL_RANK") or 0):
        yield addresses | json.loads(wait_for_host())
        return
    with hosting(hosted, serving, ensemble) as endpoints:
        note = launchers_note() if processes > 1 else None
        if note is not None:
            tell(note, json.dumps(endpoints))
        try:
            yield addresses | endpoints
        finally:
            if note is not None:
                note.unlink(missing_ok=True)


@contextmanager
def hosting(
    names: Sequence[str], serving: Serving, ensemble: RankSettings | None = None
) -> Iterator[dict[str, str]]:
    """Address of each reward model, or that of `ENSEMBLE`, which this process serves.

    Raises:
        ConchError: one cannot be found, converted or served.
    """
    gpu = last_gpu()
    stored = {name: in_store(name, serving, gpu) for name in names}
    check_together(stored, serving.store)
    if ensemble is not None:
        stored = {ENSEMBLE: joined([*stored.values()], ensemble, serving.store)}
    models = [*dict.fromkeys(stored.values())]
    options = ServerOptions(gpu=gpu)
    with TritonServer(serving.store, models, options=options, ready_timeout_s=_READY_WITHIN_S) as server:
        _log.info("serving %s on %s", ", ".join(models), f"GPU {gpu}" if gpu else "the CPU")
        yield {name: server.endpoint(model) for name, model in stored.items()}


def joined(models: Sequence[str], rank: RankSettings, store: Path) -> str:
    """Name of the ensemble of these models in the store, which is made where it is missing.

    Raises:
        ConversionError: they do not fit together, or cannot be stacked.
    """
    objective, is_stacked = OBJECTIVES[rank.objective_name], rank.serve_as == "stacked"
    told = json.dumps([*models, objective, rank.uwo_weight, *_named_variance(rank)])
    prefix = "stacked" if is_stacked else "ensemble"
    name = f"{prefix}-{objective}-{hashlib.sha256(told.encode()).hexdigest()[:_DIGEST_LETTERS]}"
    if name not in _models(store):
        if is_stacked:
            _check_stackable(models, store)
        to_ensemble(
            models,
            name=name,
            objective=objective,
            uwo_weight=rank.uwo_weight,
            variance=rank.variance,
            stacked=is_stacked,
            model_store=store,
        )
    return name


def _check_stackable(models: Sequence[str], store: Path) -> None:
    try:
        check_stackable([read_model(store, model) for model in models])
    except ConversionError as error:
        raise ConversionError(f"{error} (here: `rank_config.serve_as=ensemble`)") from None


def _named_variance(rank: RankSettings) -> list[str]:
    """What tells an ensemble of another variance from that of the population."""
    return [] if rank.variance == "population" else [rank.variance]


def in_store(name: str, serving: Serving, gpu: str) -> str:
    """Name of a reward model in the store; one that is not there is converted.

    Raises:
        ConfigError: there is no such model.
        ConchError: it cannot be converted.
    """
    if is_valid_name(name) and name in _models(serving.store) and not Path(name).is_dir():
        return name
    if not Path(name).expanduser().exists() and not _HUB_ID.fullmatch(name):
        models = ", ".join(_models(serving.store)) or "none"
        raise ConfigError(
            f"{name} is no reward model: no folder{missing_path(Path(name))}, no model of {serving.store} "
            f"(there are: {models}), and no address host:port/model"
        )
    checkpoint = model_folder(name, "model_names")
    model = stored_name(name, checkpoint, serving)
    if model not in _models(serving.store):
        _log.info("converting %s into %s", name, serving.store / model)
        to_triton(
            checkpoint,
            name=model,
            model_store=serving.store,
            template=serving.template,
            dtype=serving.dtype or ("float16" if gpu else "float32"),
            instance_kind="gpu" if gpu else "cpu",
        )
    return model


def stored_name(name: str, checkpoint: str, serving: Serving) -> str:
    """Name that a checkpoint gets in the store: its own, and letters that change with its files and with how
    it is presented, so that one that was trained anew is converted anew."""
    told = json.dumps([*identity_of(checkpoint), serving.template, serving.dtype])
    digest = hashlib.sha256(told.encode()).hexdigest()[:_DIGEST_LETTERS]
    short = re.sub(r"[^A-Za-z0-9._-]", "-", name.rstrip("/").rpartition("/")[2]).lstrip("._-") or "reward"
    return f"{short}-{digest}"


def identity_of(model: str) -> tuple[str, list[tuple[str, int, int]]]:
    """What changes with a model's name and, of a checkpoint here, with its place and its files."""
    folder = Path(model).expanduser()
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    content = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return (str(folder.resolve()) if files else model, content)


def _models(store: Path) -> list[str]:
    """Models of a store, which need not be there."""
    return list_models(store) if store.is_dir() else []


def check_together(stored: Mapping[str, str], store: Path) -> None:
    """Refuse models whose scores do not make one ensemble.

    Raises:
        ConfigError: they have different outputs.
    """
    outputs: dict[tuple[str, ...], str] = {}
    for name, model in stored.items():
        rewards = read_model(store, model).spec.reward_names
        outputs.setdefault(rewards if len(rewards) > 1 else ("reward",), name)
    if len(outputs) > 1:
        (first, one), (second, other), *_ = outputs.items()
        raise ConfigError(
            f"members of an ensemble need the same outputs, but {one} has {', '.join(first)} and {other} has "
            f"{', '.join(second)}: convert the one with --reward, or leave it out"
        )


@contextmanager
def served_rewards(names: Mapping[str, str], rank: RankSettings, store: Path) -> Iterator[dict[str, object]]:
    """Keys of Conch's section `reward` for one reward model or an ensemble, for as long as the context lasts.

    names: short names of the models -> the models.
    """
    joins = len(names) > 1 and rank.serve_as != "members"
    client = {"client": {"batch_rows": rank.batch_size}}
    serving = Serving(store, rank.template, rank.dtype)
    with served([*names.values()], serving, rank if joins else None) as endpoints:
        if joins or len(names) == 1:
            (endpoint,) = endpoints.values()
            yield {"url": endpoint, **client}
            return
        members = {short: endpoints[name] for short, name in names.items()}
        combine = {
            "combine": OBJECTIVES[rank.objective_name],
            "uwo_weight": rank.uwo_weight,
            "variance": rank.variance,
        }
        yield {"members": members, **combine, **client}
