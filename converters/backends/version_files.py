"""The files of every version folder beside those that the back end reads."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from conch.converters.parity.report import ParityReport
from conch.store.manifest import GOLDEN, MANIFEST, EnsembleManifest, Golden, Manifest, sha256_of


def write_beside(
    folder: Path, manifest: Manifest | EnsembleManifest, golden: Golden, report: ParityReport
) -> str:
    """Write golden samples, report and manifest; the manifest last, since it hashes all other files.

    Returns:
        the manifest's sha256, which stands for the whole version.
    """
    (folder / GOLDEN).write_text(golden.model_dump_json(indent=2, exclude_none=True), encoding="utf-8")
    (folder / "parity.txt").write_text(report.table() + "\n", encoding="utf-8")
    (folder / "parity.json").write_text(json.dumps(asdict(report), indent=2), encoding="utf-8")
    files = {
        str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    del files[MANIFEST]
    final = manifest.model_copy(update={"parity": report.summary(), "files": files})
    write_manifest(folder, final)
    return sha256_of(folder / MANIFEST)


def write_manifest(folder: Path, manifest: Manifest | EnsembleManifest) -> None:
    """Write `manifest.json`, which the runner `model.py` reads."""
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
