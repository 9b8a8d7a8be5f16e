"""An ensemble needs its members beside it: which models a server must load for those that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conch.errors import ModelStoreError
from conch.serving.ensemble_manifest import EnsembleManifest
from conch.serving.spec import ensemble_parts
from conch.serving.store import StoredModel, read_model


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
