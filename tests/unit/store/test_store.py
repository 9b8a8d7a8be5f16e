from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conch.errors import ModelStoreError
from conch.store.manifest import GOLDEN, MANIFEST
from conch.store.store import (
    Owner,
    is_valid_name,
    latest_version,
    list_models,
    owner_of,
    publish,
    read_model,
    staged_version,
    verify_files,
    versions,
)
from conch.triton.contract import RewardModelSpec, TokenizerSpec
from tests.stores import store_model

NOBODY = 65534


def everything_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_publish_then_read_gives_it_back(tmp_path: Path) -> None:
    path = store_model(tmp_path / "new" / "store")
    model = read_model(tmp_path / "new" / "store", "lengths")
    verify_files(model)

    assert (model.path, model.version, model.spec.max_length) == (path, 1, 8)
    assert model.golden.samples[0].text == "ab"


def test_publish_takes_the_next_version_and_leaves_the_old_one(tmp_path: Path) -> None:
    first = store_model(tmp_path, weights=b"one")
    before = everything_below(first)
    second = store_model(tmp_path, weights=b"two")

    assert (first.name, second.name) == ("1", "2")
    assert everything_below(first) == before
    assert latest_version(tmp_path, "lengths") == 2
    verify_files(read_model(tmp_path, "lengths"))


@pytest.fixture
def umask() -> Iterator[Callable[[int], object]]:
    """What sets it until the test's end."""
    before = os.umask(0o022)
    os.umask(before)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "shared"), [(0o022, 0o055), (0o077, 0)])
def test_publish_leaves_no_staging_folder_and_a_version_as_the_umask_says(
    tmp_path: Path, umask: Callable[[int], object], mask: int, shared: int
) -> None:
    umask(mask)
    path = store_model(tmp_path)

    assert [entry.name for entry in tmp_path.iterdir()] == ["lengths"]
    assert path.stat().st_mode & 0o077 == shared
    files = [file for file in (tmp_path / "lengths").rglob("*") if file.is_file()]
    assert {file.stat().st_mode & 0o077 for file in files} == {shared & 0o066}


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Root reads everything, so it becomes another user for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("closed", [".", "lengths", "lengths/1/manifest.json"])
def test_store_that_this_user_may_not_read_is_told_with_who_can_help(tmp_path: Path, closed: str) -> None:
    # Below pytest's own folder nobody else reads anything.
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        store_model(store)
        Path(folder).chmod(0o755)
        (store / closed).chmod(0)
        for read in (read_model, owner_of):
            with as_nobody(), pytest.raises(ModelStoreError, match=r"Permission denied.* chmod -R a\+rX"):
                read(store, "lengths")
        (store / closed).chmod(0o755)


def test_published_files_can_be_read_by_whoever_reads_the_config(tmp_path: Path) -> None:
    with staged_version(tmp_path, "walks") as folder:
        (folder / "weights").mkdir()
        for name in ("model.safetensors", "weights/part"):
            (folder / name).touch(mode=0o600)
        published = publish(folder, TokenizerSpec("walks", max_batch_size=4, max_length=8), tmp_path)

    mode = (tmp_path / "walks" / "config.pbtxt").stat().st_mode
    assert {
        file.stat().st_mode for file in (published / "model.safetensors", published / "weights/part")
    } == {mode}


def test_staged_version_is_gone_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged_version(tmp_path, "walks") as folder:
        (folder / "half").write_text("written")
        raise RuntimeError

    assert list(tmp_path.iterdir()) == []


def test_publish_that_fails_changes_nothing(tmp_path: Path) -> None:
    store_model(tmp_path)
    before = everything_below(tmp_path)
    with staged_version(tmp_path, "lengths") as folder:
        (folder.parent / "cpu.pbtxt").mkdir()  # in the way of a config that publish has to write
        with pytest.raises(ModelStoreError, match="could not publish 'lengths'"):
            publish(folder, RewardModelSpec("lengths"), tmp_path)

    assert everything_below(tmp_path) == before
    assert versions(tmp_path, "lengths") == [1]


def test_store_made_for_a_version_is_gone_after_an_error(tmp_path: Path) -> None:
    store = tmp_path / "models" / "store"
    with pytest.raises(RuntimeError), staged_version(store, "walks"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    store.mkdir(parents=True)
    with pytest.raises(RuntimeError), staged_version(store, "walks"):
        raise RuntimeError
    assert list(store.iterdir()) == []


def test_staged_version_refuses_a_store_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with (
        pytest.raises(ModelStoreError, match="store cannot be written"),
        staged_version(tmp_path / "store", "walks"),
    ):
        pass


@pytest.mark.parametrize("name", ["walks", "gpt2-rm_v1.2", "7b"])
def test_is_valid_name_accepts_folder_names(name: str) -> None:
    assert is_valid_name(name)


@pytest.mark.parametrize("name", ["", "a/b", "..", "a..b", ".hidden", "-x", "a b", "ä", "a\n"])
def test_is_valid_name_refuses_the_rest(name: str) -> None:
    assert not is_valid_name(name)


def test_list_models_refuses_a_missing_store(tmp_path: Path) -> None:
    with pytest.raises(ModelStoreError, match=r"nowhere cannot be read .*conch convert"):
        list_models(tmp_path / "nowhere")


def test_read_model_names_what_is_there_instead(tmp_path: Path) -> None:
    store_model(tmp_path, "lengths")
    store_model(tmp_path, "talks")
    with pytest.raises(ModelStoreError, match=r"'lenghts' is not in .*there are: lengths, talks"):
        read_model(tmp_path, "lenghts")


def test_read_model_says_that_the_version_folder_is_missing(tmp_path: Path) -> None:
    store_model(tmp_path).rename(tmp_path / "elsewhere")
    with pytest.raises(ModelStoreError, match="has no version folder"):
        read_model(tmp_path, "lengths")


@pytest.mark.parametrize("relative", ["configs/embedded.pbtxt", f"1/{MANIFEST}", f"1/{GOLDEN}"])
def test_read_model_names_a_missing_file(tmp_path: Path, relative: str) -> None:
    store_model(tmp_path)
    (tmp_path / "lengths" / relative).unlink()
    with pytest.raises(ModelStoreError, match=f"{relative} is missing"):
        read_model(tmp_path, "lengths")


@pytest.mark.parametrize("relative", ["config.pbtxt", f"1/{MANIFEST}", f"1/{GOLDEN}"])
def test_read_model_names_an_unreadable_file(tmp_path: Path, relative: str) -> None:
    store_model(tmp_path)
    (tmp_path / "lengths" / relative).write_text("{ nonsense")
    with pytest.raises(ModelStoreError, match=relative):
        read_model(tmp_path, "lengths")


def test_read_model_refuses_a_manifest_that_was_edited(tmp_path: Path) -> None:
    path = store_model(tmp_path) / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_length": 9}))
    with pytest.raises(ModelStoreError, match=r"not the one that config\.pbtxt was written for"):
        read_model(tmp_path, "lengths")


def test_read_model_refuses_configs_that_disagree(tmp_path: Path) -> None:
    store_model(tmp_path)
    config = tmp_path / "lengths" / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 64", "max_batch_size: 32"))
    with pytest.raises(ModelStoreError, match="disagree"):
        read_model(tmp_path, "lengths")


def test_verify_files_names_a_damaged_file(tmp_path: Path) -> None:
    (store_model(tmp_path) / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(ModelStoreError, match=r"model\.safetensors is damaged"):
        verify_files(read_model(tmp_path, "lengths"))


def test_verify_files_names_a_missing_file(tmp_path: Path) -> None:
    (store_model(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(ModelStoreError, match=r"model\.safetensors is missing"):
        verify_files(read_model(tmp_path, "lengths"))


def test_publish_keeps_as_many_old_versions_as_it_is_told(tmp_path: Path) -> None:
    for _ in range(4):
        store_model(tmp_path)
    assert versions(tmp_path, "lengths") == [1, 2, 3, 4]
    store_model(tmp_path, keep=2)
    assert versions(tmp_path, "lengths") == [3, 4, 5]
    store_model(tmp_path, keep=0)

    assert versions(tmp_path, "lengths") == [6]
    verify_files(read_model(tmp_path, "lengths"))
    assert sorted(entry.name for entry in (tmp_path / "lengths").iterdir()) == [
        "6",
        "config.pbtxt",
        "configs",
        "warmup",
    ]


def test_publish_removes_nothing_if_the_new_version_cannot_be_published(tmp_path: Path) -> None:
    store_model(tmp_path)
    store_model(tmp_path)
    (tmp_path / "lengths" / "config.pbtxt").unlink()
    (tmp_path / "lengths" / "config.pbtxt").mkdir()  # nothing can be renamed onto it
    with pytest.raises(ModelStoreError, match="could not publish"):
        store_model(tmp_path, keep=0)

    assert versions(tmp_path, "lengths") == [1, 2]


def test_publish_writes_where_the_model_shall_run(tmp_path: Path) -> None:
    store_model(tmp_path, kind="gpu", gpu=3)
    config, embedded = (tmp_path / "lengths" / name for name in ("config.pbtxt", "configs/embedded.pbtxt"))
    assert "KIND_GPU" in config.read_text() and "gpus: 3" in config.read_text()
    assert "KIND_CPU" in embedded.read_text()
    store_model(tmp_path, kind="cpu")

    assert "KIND_CPU" in config.read_text() and "gpus" not in config.read_text()


def test_owner_of_is_none_for_a_free_name(tmp_path: Path) -> None:
    assert owner_of(tmp_path / "nowhere", "lengths") is None
    manifest = store_model(tmp_path) / MANIFEST
    assert owner_of(tmp_path, "lengths") == Owner(source="here", sha256="")
    manifest.write_text("[]")
    with pytest.raises(ModelStoreError, match="damaged: it is no JSON object"):
        owner_of(tmp_path, "lengths")
