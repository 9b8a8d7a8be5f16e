"""The model store: `<store>/<name>/config.pbtxt`, `configs/embedded.pbtxt` and `<version>/...`.

An unmodified Triton can read it. Versions are never changed in place: a new one is written aside and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from conch.config import Section
from conch.disk import sync, sync_tree
from conch.errors import ModelStoreError, ServingError
from conch.serving.manifest import GOLDEN, MANIFEST, Golden, Manifest, sha256_of
from conch.serving.pbtxt import from_pbtxt, to_pbtxt
from conch.serving.spec import RewardModelSpec

CONFIG = "config.pbtxt"
EMBEDDED_NAME = "embedded"
EMBEDDED_CONFIG = f"configs/{EMBEDDED_NAME}.pbtxt"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_AGAIN = "convert the model again with conch-to-triton"

SectionT = TypeVar("SectionT", bound=Section)


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One version of a model in the store, read and found consistent.

    path: the version folder.
    """

    name: str
    version: int
    path: Path
    spec: RewardModelSpec
    manifest: Manifest
    golden: Golden


def is_valid_name(name: str) -> bool:
    """Whether a model may be called so: a plain folder name of letters, digits, dot, dash and underscore."""
    return _NAME.fullmatch(name) is not None and ".." not in name


def list_models(model_store: Path) -> list[str]:
    """Names of the models in the store, sorted; a folder counts if it holds `config.pbtxt`.

    Raises:
        ModelStoreError: the store is no readable folder.
    """
    try:
        return sorted(
            entry.name
            for entry in model_store.iterdir()
            if is_valid_name(entry.name) and (entry / CONFIG).is_file()
        )
    except OSError as error:
        raise ModelStoreError(
            f"model store {model_store} cannot be read ({error.strerror}); "
            "give an existing folder, or make one with conch-to-triton"
        ) from error


def versions(model_store: Path, name: str) -> list[int]:
    """Version numbers of a model, ascending; empty for a model that is not there."""
    folder = model_store / name
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(entry.name) for entry in entries if entry.name.isdecimal() and entry.is_dir())


def latest_version(model_store: Path, name: str) -> int:
    """The version that a server loads.

    Raises:
        ModelStoreError: the model is not in the store or has no version.
    """
    names = list_models(model_store)
    if name not in names:
        there = f"there are: {', '.join(names)}" if names else f"it is empty; {_AGAIN}"
        raise ModelStoreError(f"model {name!r} is not in model store {model_store}; {there}")
    found = versions(model_store, name)
    if not found:
        raise ModelStoreError(f"model {name!r} in {model_store} has no version folder (1, 2, ...); {_AGAIN}")
    return found[-1]


def read_model(model_store: Path, name: str) -> StoredModel:
    """Read the latest version of a model and check that its parts fit together. Weights are not hashed here.

    Raises:
        ModelStoreError: something is missing, unreadable or of another version; names the file.
    """
    version = latest_version(model_store, name)
    path = model_store / name / str(version)
    spec = _read_spec(model_store / name / CONFIG)
    if _read_spec(model_store / name / EMBEDDED_CONFIG) != spec or spec.name != name:
        raise ModelStoreError(f"{model_store / name}: {CONFIG} and {EMBEDDED_CONFIG} disagree; {_AGAIN}")
    manifest = _read_section(Manifest, path / MANIFEST)
    golden = _read_section(Golden, path / GOLDEN)
    if sha256_of(path / MANIFEST) != spec.content_sha256:
        raise ModelStoreError(f"{path / MANIFEST} is not the one that {CONFIG} was written for; {_AGAIN}")
    return StoredModel(name, version, path, spec, manifest, golden)


def verify_files(model: StoredModel) -> None:
    """Hash every file of the version folder, at disk speed.

    Raises:
        ModelStoreError: a file is missing or its content is not what was converted; names it.
    """
    for relative, expected in model.manifest.files.items():
        path = model.path / relative
        if not path.is_file():
            raise ModelStoreError(f"{path} is missing; {_AGAIN}")
        if sha256_of(path) != expected:
            raise ModelStoreError(f"{path} is damaged: its sha256 is not that of {MANIFEST}; {_AGAIN}")


@contextlib.contextmanager
def staged_version(model_store: Path, name: str) -> Iterator[Path]:
    """An empty folder inside the store to write a version into; gone at the end unless it was published.

    Raises:
        ModelStoreError: the store cannot be made or written.
    """
    try:
        model_store.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".staging-{name}-", dir=model_store))
        version = staging / "version"
        version.mkdir()
    except OSError as error:
        raise ModelStoreError(
            f"model store {model_store} cannot be written ({error.strerror}); "
            "give another folder, or permission to write"
        ) from error
    try:
        yield version
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staged: Path, spec: RewardModelSpec, model_store: Path) -> Path:
    """Make a folder from `staged_version` the model's latest version, all of it or nothing.

    Returns:
        the version folder, `<model_store>/<name>/<number>`.

    Raises:
        ModelStoreError: the disk is full or the store cannot be written; the store is as it was.
    """
    # Everything that a full disk can stop is written here, in the staging folder; what remains are renames.
    new_configs = {CONFIG: staged.parent / "gpu.pbtxt", EMBEDDED_CONFIG: staged.parent / "cpu.pbtxt"}
    folder = model_store / spec.name
    try:
        _share(staged)
        new_configs[CONFIG].write_text(to_pbtxt(spec, kind="gpu"), encoding="utf-8")
        new_configs[EMBEDDED_CONFIG].write_text(to_pbtxt(spec, kind="cpu"), encoding="utf-8")
        sync_tree(staged.parent)
        with _locked(model_store):
            (folder / EMBEDDED_CONFIG).parent.mkdir(parents=True, exist_ok=True)
            published = folder / str(max(versions(model_store, spec.name), default=0) + 1)
            staged.rename(published)
            for relative, new in new_configs.items():
                new.replace(folder / relative)
            sync(folder)
        return published
    except OSError as error:
        raise ModelStoreError(
            f"could not publish {spec.name!r} in {model_store}: {error.strerror or error}"
        ) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold off other conversions into the same store while a version number is chosen and taken."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ModelStoreError(f"{path} is missing; {_AGAIN}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ModelStoreError(f"{path} cannot be read ({error}); {_AGAIN}") from error


def _read_spec(path: Path) -> RewardModelSpec:
    try:
        return from_pbtxt(_read_text(path))
    except ModelStoreError:
        raise
    except ServingError as error:
        raise ModelStoreError(f"{path}: {error}; {_AGAIN}") from error


def _read_section(section: type[SectionT], path: Path) -> SectionT:
    try:
        return section.model_validate_json(_read_text(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ModelStoreError(f"{path} is damaged: {where}: {first['msg']}; {_AGAIN}") from None


def _share(folder: Path) -> None:
    """Let whoever may read the folder read its files.

    What safetensors writes, its owner alone can read, and a server often runs as another user.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(folder.stat().st_mode & 0o666)
