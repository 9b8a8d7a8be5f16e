"""The model repository of one server: links to the versions that it is to serve, and to no other.

The store goes on changing while a server runs. What the server loads, at the start, to heal a model and after
a crash, is what stands here: nothing is served because it was published, and nothing bad is taken up again.

A version that is tried out stands here under another name, which no model of the store can have.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from conch.store.manifest import MANIFEST, EnsembleManifest
from conch.store.store import ModelFolder, StoredModel

_TRIED_OUT = "_candidate-"


def candidate(name: str) -> str:
    """What a model is called while it is tried out."""
    return _TRIED_OUT + name


class Repository:
    """A folder `<name>/{config.pbtxt, configs/, warmup/, <version>}` for Triton; one thread at a time.

    folder: made if need be. store: the model store's path as the server sees it, in a container another one.
    """

    def __init__(self, folder: Path, store: str) -> None:
        self._folder = folder
        self._store = Path(store)
        folder.mkdir(parents=True, exist_ok=True)

    def place(self, model: StoredModel, called: Mapping[str, str] | None = None) -> None:
        """Have this version, and no other, stand under the model's name.

        called: other names, for the model itself and for models that it asks.
        """
        for part in model.folders:
            self._place(part, model, called or {})

    def redirect(self, ensemble: StoredModel, called: Mapping[str, str]) -> None:
        """Have an ensemble ask models under other names; what it asks stays as it is."""
        self._place(ensemble, ensemble, called)

    def remove(self, name: str) -> None:
        """Forget what stands under a name, if anything does."""
        shutil.rmtree(self._folder / name, ignore_errors=True)

    def _place(self, part: ModelFolder, model: StoredModel, called: Mapping[str, str]) -> None:
        folder = self._folder / called.get(part.name, part.name)
        for path, content in part.beside.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(_renamed(content, called) if called and target.suffix == ".pbtxt" else content)
        for entry in folder.iterdir():
            if entry.name.isdecimal():
                entry.unlink() if entry.is_symlink() else shutil.rmtree(entry)
        version = folder / str(part.version)
        inside = self._store / part.name / str(part.version)
        if part is model and isinstance(model.manifest, EnsembleManifest) and called:
            _write_ensemble(version, part.path, inside, called)
        else:
            version.symlink_to(inside)


def _renamed(config: bytes, called: Mapping[str, str]) -> bytes:
    """A configuration with other names in it, and one instance: what is tried out serves nobody yet."""
    pb: Any = model_config_pb2  # built at run time, so nothing is known of its types
    parsed = text_format.Parse(config.decode("utf-8"), pb.ModelConfig())
    if parsed.name in called:
        parsed.name = called[parsed.name]
        for group in parsed.instance_group:
            group.count = 1
    for step in parsed.ensemble_scheduling.step:
        step.model_name = called.get(step.model_name, step.model_name)
    return text_format.MessageToString(parsed).encode("utf-8")


def _write_ensemble(folder: Path, version: Path, inside: Path, called: Mapping[str, str]) -> None:
    """Links to an ensemble's files, but a manifest of its own, in which members go by other names."""
    folder.mkdir()
    for file in version.iterdir():
        (folder / file.name).symlink_to(inside / file.name)
    (folder / MANIFEST).unlink()
    manifest = json.loads((version / MANIFEST).read_text(encoding="utf-8"))
    for member in manifest["members"]:
        member["name"] = called.get(member["name"], member["name"])
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
