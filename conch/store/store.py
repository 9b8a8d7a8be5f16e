"""The model store: `<store>/<name>/config.pbtxt`, `configs/embedded.pbtxt` and `<version>/...`.

An unmodified Triton can read it. Versions are never changed in place: a new one is written aside and renamed.

An ensemble that does not hold its members needs them beside it: `read_with_members` lists the models that a
server must load.
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
_AGAIN = "convert the model again with conch convert"
# Conversions keep to the umask of whoever runs them, and a server may be somebody else.
_LET_READ = "whoever made it must let this user read it: chmod -R a+rX {}"

SectionT = TypeVar("SectionT", bound=Section)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """One version of a model: the files that a server needs to load it.

    path: the version folder.
    shared_files: path below the model's folder -> content, of the configurations and the warm-up data, which
        the next version will replace.
    """

    name: str
    version: int
    path: Path
    shared_files: dict[str, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class StoredModel(ModelFolder):
    """One version of a reward model in the store, whose files fit together.

    tokenizer: of a text-form ensemble, the model that makes token ids, which the server loads with it.
    """

    spec: RewardModelSpec
    manifest: Manifest | EnsembleManifest
    golden: Golden
    tokenizer: ModelFolder | None = None

    @property
    def folders(self) -> tuple[ModelFolder, ...]:
        """Folders that a server loads under names of their own, the tokenizer's first."""
        return (self,) if self.tokenizer is None else (self.tokenizer, self)

    @property
    def submodels(self) -> tuple[str, ...]:
        """Names of the models that this one passes samples on to."""
        if self.spec.engine == "ensemble":
            return ensemble_parts(self.name)
        if not isinstance(self.manifest, EnsembleManifest) or self.manifest.holds_members:
            return ()
        return tuple(member.name for member in self.manifest.members)


@dataclass(frozen=True, slots=True)
class Owner:
    """Checkpoint that a name of the store belongs to.

    source: the checkpoint's folder name or hub id.
    sha256: hash of its weights, "" if not known.
    """

    source: str
    sha256: str


def is_valid_name(name: str) -> bool:
    """Whether `name` is a plain folder name of letters, digits, dot, dash and underscore."""
    return _NAME.fullmatch(name) is not None and ".." not in name


def list_models(model_store: Path) -> list[str]:
    """Return the names of the models in the store, sorted; a folder counts if it holds `config.pbtxt`.

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
        remedy = "give an existing folder, or make one with conch convert"
        if isinstance(error, PermissionError):
            remedy = _LET_READ.format(model_store)
        raise ModelStoreError(
            f"model store {model_store} cannot be read ({error.strerror}); {remedy}"
        ) from error


def versions(model_store: Path, name: str) -> list[int]:
    """Return the version numbers of a model, ascending; empty for a model that is not in the store.

    Raises:
        ModelStoreError: this user may not read the folder.
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
    """Return the version that a server loads.

    Raises:
        ModelStoreError: the model is not in the store or has no version.
    """
    names = list_models(model_store)
    if name not in names:
        content = f"there are: {', '.join(names)}" if names else f"it is empty; {_AGAIN}"
        raise ModelStoreError(f"model {name!r} is not in model store {model_store}; {content}")
    numbers = versions(model_store, name)
    if not numbers:
        raise ModelStoreError(f"model {name!r} in {model_store} has no version folder (1, 2, ...); {_AGAIN}")
    return numbers[-1]


def owner_of(model_store: Path, name: str) -> Owner | None:
    """Return the checkpoint that the name belongs to, by its latest version; None where it is free.

    Raises:
        ModelStoreError: the version's manifest is missing or damaged.
    """
    numbers = versions(model_store, name)
    if not numbers:
        return None
    path = model_store / name / str(numbers[-1]) / MANIFEST
    try:
        manifest = TypeAdapter(dict[str, Any]).validate_json(_read_text(path))
    except ValidationError as error:
        raise ModelStoreError(f"{path} is damaged: it is no JSON object; {_AGAIN}") from error
    return Owner(str(manifest.get("source", "not known")), str(manifest.get("source_sha256", "")))


def read_model(model_store: Path, name: str) -> StoredModel:
    """Read the latest version of a model and check that its parts fit together; weights are not hashed.

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
    return StoredModel(name, folder.version, path, folder.shared_files, spec, manifest, golden, tokenizer)


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
    """Yield an empty folder inside the store to write a version into; removed at the end unless published,
    and so is a store that was made for it.

    Raises:
        ModelStoreError: the store cannot be created or written.
    """
    absent = [folder for folder in (model_store, *model_store.parents) if not folder.exists()]
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
        with contextlib.suppress(OSError):  # something stands in it
            for folder in absent:
                folder.rmdir()


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

    kind, gpu: device in `config.pbtxt`; in the bundled server's `configs/embedded.pbtxt` it is the CPU.
    keep: number of older versions that stay, the newest ones; None keeps all. The others are removed last.

    Returns:
        the version folder, `<model_store>/<name>/<number>`.

    Raises:
        ModelStoreError: the disk is full or the store cannot be written; the store is as it was.
    """
    # Everything that a full disk can stop is written here, in the staging folder; what remains are renames.
    new_configs = {CONFIG: staged.parent / "gpu.pbtxt", EMBEDDED_CONFIG: staged.parent / "cpu.pbtxt"}
    folder = model_store / spec.name
    try:
        _apply_folder_permissions(staged)
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


def _remove_all_but(folder: Path, numbers: Sequence[int]) -> None:
    for entry in list(folder.iterdir()):
        if entry.name.isdecimal() and entry.is_dir() and int(entry.name) not in numbers:
            # Out of the server's sight in one step, so that it never finds half a version.
            doomed = entry.rename(folder / f".removed-{entry.name}")
            shutil.rmtree(doomed)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the store against other conversions while a version number is chosen and taken."""
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
    shared_files = {path: _read_bytes(folder / path) for path in (CONFIG, EMBEDDED_CONFIG)}
    for file in sorted((folder / WARMUP).glob("*")):
        shared_files[f"{WARMUP}/{file.name}"] = _read_bytes(file)
    return ModelFolder(name, version, folder / str(version), shared_files)


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
        return from_pbtxt(_as_text(folder.shared_files[config], path))
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
    """Add warm-up requests to the configurations, and write their data into the staging folder.

    Returns:
        folder of the data; None for a tokenizer, which has nothing to warm up.
    """
    if isinstance(spec, TokenizerSpec):
        return None
    golden = _read_section(Golden, staged / GOLDEN)
    addition = write_warmup(staged.parent / WARMUP, spec, golden.samples[0])
    for config in configs.values():
        config.write_text(config.read_text(encoding="utf-8") + addition, encoding="utf-8")
    return staged.parent / WARMUP


def _apply_folder_permissions(folder: Path) -> None:
    """Give every file of a folder the folder's own read and write permissions, which follow the umask.

    A file that safetensors wrote is its owner's alone, and a server often runs as another user.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(folder.stat().st_mode & 0o666)


def read_with_members(model_store: Path, names: Sequence[str]) -> list[StoredModel]:
    """Read the named models and the members of ensembles, each once, members before ensembles.

    Raises:
        ModelStoreError: a model or member is missing or damaged, or a member is not the one that the ensemble
            was made with.
    """
    models: dict[str, StoredModel] = {}
    for name in names:
        model = read_model(model_store, name)
        if isinstance(model.manifest, EnsembleManifest) and not model.manifest.holds_members:
            models |= _members(model_store, model.name, model.manifest)
        if model.spec.engine == "ensemble":  # the server loads its tokenizer by itself
            _, part = ensemble_parts(name)
            models[part] = read_model(model_store, part)
        models[name] = model
    return list(models.values())


def _members(model_store: Path, ensemble: str, manifest: EnsembleManifest) -> dict[str, StoredModel]:
    members = {member.name: read_model(model_store, member.name) for member in manifest.members}
    for member in manifest.members:
        stored = members[member.name]
        if stored.spec.content_sha256 != member.content_sha256:
            raise ModelStoreError(
                f"ensemble {ensemble} in {model_store} was made with version {member.version} of its member "
                f"{member.name}, and there is version {stored.version} now: make the ensemble again with "
                "conch convert ensemble"
            )
    return members
