"""The model repository of one server: links to the versions that it is to serve, and to no other.

The store goes on changing while a server runs. The server loads only versions of its repository, at the
start, to heal a model and after a crash: a new version is not served because it was published, and a bad one
is not loaded again.

A version that is tested stands here under a candidate name, which no model of the store can have.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from conch.store.manifest import MANIFEST
from conch.store.store import ModelFolder, StoredModel

_CANDIDATE = "_candidate-"


def candidate(name: str) -> str:
    """Return the name of a model's new version while that is tested."""
    return _CANDIDATE + name


class Repository:
    """A folder `<name>/{config.pbtxt, configs/, warmup/, <version>}` for Triton; one thread at a time.

    folder: path of the repository; created where it is missing.
    store: path of the model store as the server sees it, which in a container is another one.
    """

    def __init__(self, folder: Path, store: str) -> None:
        self._folder = folder
        self._store = Path(store)
        folder.mkdir(parents=True, exist_ok=True)

    def place(self, model: StoredModel, aliases: Mapping[str, str] | None = None) -> None:
        """Make this version the only one under the model's name.

        aliases: name -> other name, for the model itself and for its submodels.
        """
        for part in model.folders:
            self._place(part, model, aliases or {})

    def redirect(self, ensemble: StoredModel, aliases: Mapping[str, str]) -> None:
        """Have an ensemble send samples to its members under other names; the members stay as they are."""
        self._place(ensemble, ensemble, aliases)

    def remove(self, name: str) -> None:
        """Delete the model of this name, if there is one."""
        shutil.rmtree(self._folder / name, ignore_errors=True)

    def _place(self, part: ModelFolder, model: StoredModel, aliases: Mapping[str, str]) -> None:
        folder = self._folder / aliases.get(part.name, part.name)
        for path, content in part.shared_files.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            is_config = target.suffix == ".pbtxt"
            target.write_bytes(_renamed(content, aliases) if aliases and is_config else content)
        for entry in folder.iterdir():
            if entry.name.isdecimal():
                entry.unlink() if entry.is_symlink() else shutil.rmtree(entry)
        version = folder / str(part.version)
        inside = self._store / part.name / str(part.version)
        if part is model and model.spec.asks_members and aliases:
            _write_ensemble(version, part.path, inside, aliases)
        else:
            version.symlink_to(inside)


def _renamed(config: bytes, aliases: Mapping[str, str]) -> bytes:
    """Return a configuration with other names in it, and one instance: a candidate serves nobody yet."""
    pb: Any = model_config_pb2  # built at run time, so nothing is known of its types
    parsed = text_format.Parse(config.decode("utf-8"), pb.ModelConfig())
    if parsed.name in aliases:
        parsed.name = aliases[parsed.name]
        for group in parsed.instance_group:
            group.count = 1
    for step in parsed.ensemble_scheduling.step:
        step.model_name = aliases.get(step.model_name, step.model_name)
    return text_format.MessageToString(parsed).encode("utf-8")


def _write_ensemble(folder: Path, version: Path, inside: Path, aliases: Mapping[str, str]) -> None:
    """Link an ensemble's files into `folder`, and write a manifest there that has members' other names.

    inside: path of `version` as the server sees it.
    """
    folder.mkdir()
    for file in version.iterdir():
        (folder / file.name).symlink_to(inside / file.name)
    (folder / MANIFEST).unlink()
    manifest = json.loads((version / MANIFEST).read_text(encoding="utf-8"))
    for member in manifest["members"]:
        member["name"] = aliases.get(member["name"], member["name"])
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
