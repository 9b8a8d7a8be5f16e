"""Models of a run that were asked for: `exports/version_N.zip`, the newest of them."""

from __future__ import annotations

import shutil
import threading
import zipfile
from pathlib import Path

from conch.service.refusals import CONFLICT, NOT_FOUND, RefusedError

EXPORTS = "exports"
_KEPT = 3
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


class Exports:
    """Zip files of a run's models. Any thread may call.

    folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._run = folder
        self._folder = folder / EXPORTS
        self._lock = threading.Lock()

    def known(self, version: int) -> Path | None:
        """The file of a version that was asked for before; None where it is not kept."""
        path = self._folder / f"version_{version}.zip"
        return path if path.exists() else None

    def zipped(self, model: Path) -> Path:
        """The file of a model's folder, `version_N`, which is deleted."""
        with self._lock:
            path = self._folder / f"{model.name}.zip"
            if not path.exists():
                _zip(model, path)
            self._tidy()
            return path

    def saved(self, version: int | None) -> Path:
        """The file of a version that is kept, of None that of the newest checkpoint.

        Raises:
            RefusedError: there is none.
        """
        if version is not None and (path := self.known(version)) is not None:
            return path
        # What reads checkpoints loads torch.
        from conch.runs.checkpoint import STATE_FOLDER, newest_checkpoint

        checkpoint = newest_checkpoint(self._run / "train")
        if checkpoint is None:
            raise RefusedError(CONFLICT, f"run {self._run.name} has saved no model")
        newest = int(checkpoint.state["trainer"]["policy_version"])
        if version not in (None, newest):
            raise RefusedError(
                NOT_FOUND, f"version {version} of run {self._run.name} is not kept; the newest is {newest}"
            )
        if (path := self.known(newest)) is not None:
            return path
        model = self._folder / f"version_{newest}"
        inner = ("trainer_state.json", "files.json", STATE_FOLDER)
        shutil.copytree(checkpoint.folder, model, ignore=shutil.ignore_patterns(*inner), dirs_exist_ok=True)
        return self.zipped(model)

    def _tidy(self) -> None:
        """Keep the newest files, and no folder that a file has all of."""
        names = [path.name.removesuffix(".zip") for path in self._folder.glob("version_*")]
        versions = sorted({int(name.partition("_")[2]) for name in names}, reverse=True)
        for version in versions:
            if self.known(version) is not None:
                shutil.rmtree(self._folder / f"version_{version}", ignore_errors=True)
        for version in versions[_KEPT:]:
            shutil.rmtree(self._folder / f"version_{version}", ignore_errors=True)
            (self._folder / f"version_{version}.zip").unlink(missing_ok=True)


def _zip(folder: Path, target: Path) -> None:
    """Zip a folder's files; the same files give the same bytes, so that a download can be gone on with."""
    partial = target.with_name(f".{target.name}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(each for each in folder.rglob("*") if each.is_file()):
            info = zipfile.ZipInfo(str(path.relative_to(folder)), _ZIP_DATE)
            with path.open("rb") as source, archive.open(info, "w", force_zip64=True) as inside:
                shutil.copyfileobj(source, inside, 1 << 20)
    partial.replace(target)
