"""Models and checkpoints that are whole or not there: written aside, then renamed.

A checkpoint is a folder `checkpoints/step_N`:

    config.json, model.safetensors, ...   the Hugging Face folder, which `from_pretrained` loads, or an
                                          adapter's: adapter_config.json, adapter_model.safetensors
    state/                                weights, optimizer and random states, as accelerate writes them
    state/rank_R.json                     what rank R alone has to go on with, where it has anything
    trainer_state.json                    step, data position, controllers, configuration, versions
    files.json                            size and CRC-32 of every file: what `verify` checks
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from conch.atomic_files import replace_folder, sync, sync_tree
from conch.errors import CheckpointError
from conch.log import get_logger
from conch.machine.imports import left_out
from conch.models.adapter import has_adapter, merged_copy, save_adapter
from conch.models.loading import original_dropout
from conch.models.policy import HEADS_FILE
from conch.runs.reading import CHECKPOINTS as CHECKPOINTS
from conch.runs.reading import steps_of as steps_of

_log = get_logger(__name__)

STATE_FOLDER = "state"
STATE_FILE = "trainer_state.json"
_RANK_FILE = "rank_{}.json"
FILES_FILE = "files.json"
BEST_LINK = "best"
FORMAT = 1
"""Of `trainer_state.json`; raised when a field changes its meaning."""


def save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    heads: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, Mapping[str, Any]] | None = None,
    merge_adapter: bool = False,
) -> Path:
    """Write a folder that `from_pretrained` and vLLM load; it replaces an older one of that name at once.

    heads: tensors for `heads.safetensors`.
    extra: file name -> content of JSON files beside the weights.
    merge_adapter: write an ordinary model with the adapter in its weights, instead of the adapter alone, as
        peft loads it onto the base model. The model in memory stays as it is.

    Raises:
        CheckpointError: no space, no permission, or another failure of the disk; nothing half-written stays,
            and an older checkpoint of that name is as it was.
    """
    check_space(folder.parent, model_bytes(model))
    partial = partial_of(folder)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if has_adapter(model) and not merge_adapter:
            save_adapter(model, partial)
        else:
            whole = merged_copy(model) if has_adapter(model) else model
            # transformers 5 would load DeepSpeed, seconds long, to see whether the model is one of its.
            with original_dropout(whole), no_model_bars(), left_out("deepspeed"):
                whole.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if heads:
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in heads.items()}
            safetensors.torch.save_file(on_cpu, partial / HEADS_FILE)
        for name, content in (extra or {}).items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n")
        replace_folder(partial, folder)
    # safetensors reports a full disk as its own error type, which is no OSError
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"the checkpoint {folder} cannot be written: {error}") from error
    return folder


@contextmanager
def no_model_bars() -> Iterator[None]:
    """Inside, transformers draws no bar over the files of a model, which would come in between a run's own.

    Downloads keep theirs, which may take minutes. A user who asks for bars (HF_HUB_DISABLE_PROGRESS_BARS=0)
    has all of them.
    """
    if not is_progress_bar_enabled() or HF_HUB_DISABLE_PROGRESS_BARS is False:
        yield
        return
    downloads_have_bars = not are_progress_bars_disabled()
    disable_progress_bar()
    try:
        if downloads_have_bars:
            enable_progress_bars()
        yield
    finally:
        enable_progress_bar()
        if not downloads_have_bars:
            disable_progress_bars()


def check_space(folder: Path, needed: int) -> None:
    """Check that `needed` bytes fit onto the disk of `folder`.

    Raises:
        CheckpointError: they do not; says how much is free, how much is needed, and where.
    """
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise CheckpointError(f"{existing} is a file, not a folder: choose another `train.output_dir`")
    if not os.access(existing, os.W_OK):
        raise CheckpointError(f"{existing} is not writable: choose another `train.output_dir`")
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            f"not enough disk space for a checkpoint in {folder}: {needed / 1e6:,.0f} MB needed, "
            f"{free / 1e6:,.0f} MB free; free some, or choose another `train.output_dir`"
        )


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters, each counted once, and a tenth for the tokenizer and the rest."""
    parameters: dict[int, torch.Tensor] = {id(p): p for p in model.parameters()}
    return int(1.1 * sum(_numel(p) * p.element_size() for p in parameters.values())) + 1_000_000


def checkpoint_bytes(module: nn.Module) -> int:
    """Return the bytes of a whole checkpoint: the model twice, two float32 moments of what is trained."""
    trained = sum(_numel(p) for p in module.parameters() if p.requires_grad)
    return 2 * model_bytes(module) + 8 * trained


def snapshot_bytes(module: nn.Module, *, sharded: bool, num_ranks: int, local_ranks: int) -> int:
    """Return the bytes that copies of a checkpoint's tensors take on rank 0's machine, which has the most.

    sharded: whether each rank holds its part of the float32 weights and moments, as DeepSpeed's do; otherwise
        rank 0 alone saves, two moments beside the weights.
    num_ranks, local_ranks: processes of the run, and those of a machine.
    """
    trained = sum(_numel(p) for p in module.parameters() if p.requires_grad)
    moments = 12 * trained * local_ranks // num_ranks if sharded else 8 * trained
    return model_bytes(module) + moments


def _numel(parameter: Tensor) -> int:
    """Return the elements of a parameter, also of one that ZeRO-3 shards and that is empty here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


# ------------------------------------------------------------------------------------------ whole checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk.

    folder: its folder, `checkpoints/step_N`.
    state: content of its `trainer_state.json`.
    """

    folder: Path
    state: dict[str, Any]

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return self.folder.parent.parent

    @property
    def step(self) -> int:
        """Steps done when the checkpoint was saved."""
        return int(self.state["step"])


def partial_of(folder: Path) -> Path:
    """Return the path at which a folder is written before it gets its name."""
    return folder.with_name(f".{folder.name}.partial")


def state_text(state: Mapping[str, Any]) -> str:
    """Return the content of `trainer_state.json`: the state as it is now."""
    return json.dumps({"format": FORMAT, **state}, indent=2) + "\n"


def seal(partial: Path, folder: Path, state: str) -> None:
    """Complete the folder `partial` with state and checksums, and give it its name at once.

    state: see `state_text`.

    Everything is on disk before the rename: neither a kill nor a power cut leaves half a checkpoint under a
    checkpoint's name.

    Raises:
        CheckpointError: the disk failed; nothing half-written stays.
    """
    try:
        (partial / STATE_FILE).write_text(state)
        listing = {str(file.relative_to(partial)): _fingerprint(file) for file in _files(partial)}
        (partial / FILES_FILE).write_text(json.dumps(listing, indent=2) + "\n")
        sync_tree(partial)
        replace_folder(partial, folder)
        sync(folder.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"the checkpoint {folder} cannot be written: {error}") from error


def save_rank_state(folder: Path, rank: int, state: Mapping[str, Any]) -> None:
    """Write what one rank alone has to go on with into a checkpoint that is being written.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        (folder / STATE_FOLDER / _RANK_FILE.format(rank)).write_text(json.dumps(state))
    except OSError as error:
        raise CheckpointError(f"the state of rank {rank} in {folder} cannot be written: {error}") from error


def read_rank_state(folder: Path, rank: int) -> dict[str, Any]:
    """Read what `save_rank_state` wrote into a checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    file = folder / STATE_FOLDER / _RANK_FILE.format(rank)
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and check every file against its size and checksum.

    Raises:
        CheckpointError: the folder is no checkpoint, or damaged; the file is named.
    """
    try:
        listing = json.loads((folder / FILES_FILE).read_text())
        damaged = [name for name, written in listing.items() if _fingerprint(folder / name) != written]
        if damaged:
            raise CheckpointError(f"{folder} is damaged: {damaged[0]} is not as it was written")
        state = json.loads((folder / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no whole checkpoint: {error}") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"the checkpoint {folder} has format {state.get('format')}, this version of Conch reads {FORMAT}"
        )
    return Checkpoint(folder, state)


def newest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """Return the newest whole checkpoint of a run; damaged ones are named in a warning and passed over."""
    for folder in steps_of(run_dir).values():
        try:
            return read_checkpoint(folder)
        except CheckpointError as error:
            _log.warning("%s; going back to the one before", error)
    return None


def link_best(folder: Path) -> None:
    """Point the link `checkpoints/best` to this checkpoint."""
    aside = folder.with_name(f".{BEST_LINK}.partial")
    aside.unlink(missing_ok=True)
    aside.symlink_to(folder.name)
    os.replace(aside, folder.with_name(BEST_LINK))


def delete_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; a kill meanwhile leaves nothing that looks like one."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def delete_leftovers(run_dir: Path) -> None:
    """Remove checkpoints that a killed process was writing or deleting."""
    for pattern in (".*.partial", ".*.old"):
        for path in (run_dir / CHECKPOINTS).glob(pattern):
            path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _fingerprint(file: Path) -> dict[str, int]:
    checksum = 0
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return {"bytes": file.stat().st_size, "crc32": checksum}
