"""The model store: `<store>/<name>/config.pbtxt`, `configs/embedded.pbtxt` and `<version>/...`.

An unmodified Triton can read it. Versions are never changed in place: a new one is written aside and renamed.

An ensemble needs its members beside it: which models a server must load for those that were asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from conch.atomic_files import sync, sync_tree
from conch.config import Section
from conch.errors import ModelStoreError, ServingError
from conch.store.manifest import GOLDEN, MANIFEST, EnsembleManifest, Golden, Manifest, sha256_of
from conch.store.warmup import FOLDER as WARMUP
from conch.store.warmup import take_warmup, write_warmup
from conch.triton.config_pbtxt import Kind, from_pbtxt, to_pbtxt
from conch.triton.contract import EMBEDDED_NAME, RewardModelSpec, TokenizerSpec, ensemble_parts

CONFIG = "config.pbtxt"
EMBEDDED_CONFIG = f"configs/{EMBEDDED_NAME}.pbtxt"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_AGAIN = "convert the model again with conch-to-triton"
# Conversions keep to the umask of whoever runs them, and a server may be somebody else.
_LET_READ = "whoever made it must let this user read it: chmod -R a+rX {}"

SectionT = TypeVar("SectionT", bound=Section)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """One version of a model, as much as a server needs to load it.

    path: the version folder.
    beside: path below the model's folder -> content, of the configurations and the warm-up data, which the
        next version will replace.
    """

    name: str
    version: int
    path: Path
    beside: dict[str, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class StoredModel(ModelFolder):
    """One version of a reward model in the store, read and found consistent.

    tokenizer: of a text-form ensemble, which the server loads with it.
    """

    spec: RewardModelSpec
    manifest: Manifest | EnsembleManifest
    golden: Golden
    tokenizer: ModelFolder | None = None

    @property
    def folders(self) -> tuple[ModelFolder, ...]:
        """All that is to be loaded under names of its own."""
        return (self,) if self.tokenizer is None else (self.tokenizer, self)

    @property
    def asks(self) -> tuple[str, ...]:
        """Names of the models that it passes samples on to."""
        return ensemble_parts(self.name) if self.spec.engine == "ensemble" else self.spec.members


@dataclass(frozen=True, slots=True)
class Owner:
    """What a name of the store was given to. sha256: of the checkpoint's weights, "" if not known."""

    source: str
    sha256: str


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
        remedy = "give an existing folder, or make one with conch-to-triton"
        if isinstance(error, PermissionError):
            remedy = _LET_READ.format(model_store)
        raise ModelStoreError(
            f"model store {model_store} cannot be read ({error.strerror}); {remedy}"
        ) from error


def versions(model_store: Path, name: str) -> list[int]:
    """Version numbers of a model, ascending; empty for a model that is not there.

    Raises:
        ModelStoreError: this user may not look.
    """
    folder = model_store / name
    try:
        entries = folder.iterdir() if folder.is_dir() else ()
        return sorted(int(entry.name) for entry in entries if entry.name.isdecimal() and entry.is_dir())
    except PermissionError as error:
        raise ModelStoreError(
            f"{folder} cannot be read ({error.strerror}); {_LET_READ.format(folder)}"
        ) from error


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


def owner_of(model_store: Path, name: str) -> Owner | None:
    """Whose the name is, by its latest version; None where it is free.

    Raises:
        ModelStoreError: the version's manifest is missing or damaged.
    """
    found = versions(model_store, name)
    if not found:
        return None
    path = model_store / name / str(found[-1]) / MANIFEST
    try:
        manifest = TypeAdapter(dict[str, Any]).validate_json(_read_text(path))
    except ValidationError as error:
        raise ModelStoreError(f"{path} is damaged: it is no JSON object; {_AGAIN}") from error
    return Owner(str(manifest.get("source", "not known")), str(manifest.get("source_sha256", "")))


def read_model(model_store: Path, name: str) -> StoredModel:
    """Read the latest version of a model and check that its parts fit together. Weights are not hashed here.

    Raises:
        ModelStoreError: something is missing, unreadable or of another version; names the file.
    """
    folder = _read_folder(model_store, name)
    path = folder.path
    spec = _read_spec(folder, CONFIG)
    if _read_spec(folder, EMBEDDED_CONFIG) != spec or spec.name != name:
        raise ModelStoreError(f"{model_store / name}: {CONFIG} and {EMBEDDED_CONFIG} disagree; {_AGAIN}")
    manifest = _read_section(EnsembleManifest if spec.members else Manifest, path / MANIFEST)
    golden = _read_section(Golden, path / GOLDEN)
    if sha256_of(path / MANIFEST) != spec.content_sha256:
        raise ModelStoreError(f"{path / MANIFEST} is not the one that {CONFIG} was written for; {_AGAIN}")
    tokenizer = None
    if spec.engine == "ensemble":
        tokenizer = _read_folder(model_store, ensemble_parts(name)[0])
    return StoredModel(name, folder.version, path, folder.beside, spec, manifest, golden, tokenizer)


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


def publish(
    staged: Path,
    spec: RewardModelSpec | TokenizerSpec,
    model_store: Path,
    *,
    kind: Kind = "gpu",
    gpu: int = 0,
    keep: int | None = None,
) -> Path:
    """Make a folder from `staged_version` the model's latest version, all of it or nothing.

    kind, gpu: where `config.pbtxt` puts the model; the bundled server's `configs/embedded.pbtxt` always says
        the CPU.
    keep: older versions that stay, the newest ones; None keeps all. The others go once the new one stands.

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
        new_configs[CONFIG].write_text(to_pbtxt(spec, kind=kind, gpu=gpu), encoding="utf-8")
        new_configs[EMBEDDED_CONFIG].write_text(to_pbtxt(spec, kind="cpu", embedded=True), encoding="utf-8")
        warmup = _stage_warmup(staged, spec, new_configs)
        sync_tree(staged.parent)
        with _locked(model_store):
            (folder / EMBEDDED_CONFIG).parent.mkdir(parents=True, exist_ok=True)
            published = folder / str(max(versions(model_store, spec.name), default=0) + 1)
            if warmup is not None:
                take_warmup(warmup, folder)
            staged.rename(published)
            try:
                for relative, new in new_configs.items():
                    new.replace(folder / relative)
            except OSError:
                published.rename(staged)
                raise
            sync(folder)
            if keep is not None:
                _remove_all_but(folder, versions(model_store, spec.name)[-1 - keep :])
        return published
    except OSError as error:
        raise ModelStoreError(
            f"could not publish {spec.name!r} in {model_store}: {error.strerror or error}"
        ) from error


def _remove_all_but(folder: Path, kept: Sequence[int]) -> None:
    for entry in list(folder.iterdir()):
        if entry.name.isdecimal() and entry.is_dir() and int(entry.name) not in kept:
            # Out of the server's sight in one step, so that it never finds half a version.
            doomed = entry.rename(folder / f".removed-{entry.name}")
            shutil.rmtree(doomed)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold off other conversions into the same store while a version number is chosen and taken."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read_folder(model_store: Path, name: str) -> ModelFolder:
    version = latest_version(model_store, name)
    folder = model_store / name
    # Configurations first: the data that they name outlives the next publication.
    beside = {path: _read_bytes(folder / path) for path in (CONFIG, EMBEDDED_CONFIG)}
    for file in sorted((folder / WARMUP).glob("*")):
        beside[f"{WARMUP}/{file.name}"] = _read_bytes(file)
    return ModelFolder(name, version, folder / str(version), beside)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ModelStoreError(f"{path} is missing; {_AGAIN}") from error
    except PermissionError as error:
        raise ModelStoreError(f"{path} cannot be read ({error}); {_LET_READ.format(path.parent)}") from error
    except OSError as error:
        raise ModelStoreError(f"{path} cannot be read ({error}); {_AGAIN}") from error


def _read_text(path: Path) -> str:
    return _as_text(_read_bytes(path), path)


def _as_text(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelStoreError(f"{path} cannot be read ({error}); {_AGAIN}") from error


def _read_spec(folder: ModelFolder, config: str) -> RewardModelSpec:
    path = folder.path.parent / config
    try:
        return from_pbtxt(_as_text(folder.beside[config], path))
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


def _stage_warmup(
    staged: Path, spec: RewardModelSpec | TokenizerSpec, configs: dict[str, Path]
) -> Path | None:
    """Add warm-up requests to the configurations, and write their data beside them.

    Returns:
        the data's folder; None for a tokenizer, which has nothing to warm up.
    """
    if isinstance(spec, TokenizerSpec):
        return None
    golden = _read_section(Golden, staged / GOLDEN)
    addition = write_warmup(staged.parent / WARMUP, spec, golden.samples[0])
    for config in configs.values():
        config.write_text(config.read_text(encoding="utf-8") + addition, encoding="utf-8")
    return staged.parent / WARMUP


def _share(folder: Path) -> None:
    """Let whoever may read the folder read its files: as the umask says, which may be nobody else.

    What safetensors writes, its owner alone can read, and a server often runs as another user.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(folder.stat().st_mode & 0o666)


def read_with_members(model_store: Path, names: Sequence[str]) -> list[StoredModel]:
    """The named models and the members of those that are ensembles, each once, members before ensembles.

    Raises:
        ModelStoreError: a model or member is missing or damaged, or a member is not the one that the ensemble
            was made with.
    """
    models: dict[str, StoredModel] = {}
    for name in names:
        model = read_model(model_store, name)
        if isinstance(model.manifest, EnsembleManifest):
            models |= _members(model_store, model.name, model.manifest)
        if model.spec.engine == "ensemble":  # the server loads its tokenizer by itself
            _, part = ensemble_parts(name)
            models[part] = read_model(model_store, part)
        models[name] = model
    return list(models.values())


def _members(model_store: Path, ensemble: str, manifest: EnsembleManifest) -> dict[str, StoredModel]:
    members = {member.name: read_model(model_store, member.name) for member in manifest.members}
    for member in manifest.members:
        found = members[member.name]
        if found.spec.content_sha256 != member.content_sha256:
            raise ModelStoreError(
                f"ensemble {ensemble} in {model_store} was made with version {member.version} of its member "
                f"{member.name}, and there is version {found.version} now: make the ensemble again with "
                "conch-to-triton-ensemble"
            )
    return members
