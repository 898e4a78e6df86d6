"""Models are found by path, by name and by content; what is missing or ambiguous is said with what was searched."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from shoal.errors import ModelNotFound
from shoal.ids import ModelHash
from shoal.runtime.messages import ModelFile
from shoal.runtime.model_store import ModelStore

CONTENT = b"GGUF and then some"
HASH = ModelHash(hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelStore:
    hub = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    blobs = hub / "models--owner--repo-GGUF" / "blobs"
    snapshot = hub / "models--owner--repo-GGUF" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in ("repo-Q4_K_M.gguf", "repo-Q8_0.gguf"):
        blob = blobs / hashlib.sha256(name.encode()).hexdigest()
        blob.write_bytes(name.encode())
        (snapshot / name).symlink_to(blob)
    folder = tmp_path / "models" / "deep"
    folder.mkdir(parents=True)
    (folder / "mine.gguf").write_bytes(CONTENT)
    return ModelStore([tmp_path / "models"], cache_folder=tmp_path / "cache")


def test_a_path_a_name_and_a_repository_are_understood(store: ModelStore, tmp_path: Path) -> None:
    mine = tmp_path / "models" / "deep" / "mine.gguf"
    assert store.resolve(str(mine)) == mine
    assert store.resolve("mine") == store.resolve("mine.gguf") == mine
    assert store.resolve("owner/repo-GGUF:q8_0").read_bytes() == b"repo-Q8_0.gguf"


def test_what_is_ambiguous_or_missing_is_said(store: ModelStore, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"could be .*Q4_K_M\.gguf, .*Q8_0\.gguf: give the path, or the quantisation"):
        store.resolve("owner/repo-GGUF")
    with pytest.raises(
        ModelNotFound, match=rf"no model 'other': not a file, and no \.gguf of that name in {tmp_path}/models"
    ):
        store.resolve("other")


def test_content_is_found_wherever_it_lies(store: ModelStore, tmp_path: Path) -> None:
    assert store.find(ModelFile(HASH, len(CONTENT))) == tmp_path / "models" / "deep" / "mine.gguf"
    assert store.find(ModelFile(HASH, len(CONTENT) + 1)) is None
    assert store.find(ModelFile(ModelHash("0" * 64), len(CONTENT))) is None
    # A blob of the Hugging Face cache is named by its hash, and is not read.
    blob_hash = ModelHash(hashlib.sha256(b"repo-Q8_0.gguf").hexdigest())
    found = store.find(ModelFile(blob_hash, len("repo-Q8_0.gguf")))
    assert found is not None
    assert found.name == blob_hash


def test_a_hash_is_kept_until_the_file_changes(store: ModelStore, tmp_path: Path) -> None:
    mine = tmp_path / "models" / "deep" / "mine.gguf"
    read: list[int] = []
    assert store.hash_file(mine, progress=lambda done, _total: read.append(done)) == HASH
    assert store.hash_file(mine, progress=lambda done, _total: read.append(done)) == HASH
    assert read == [len(CONTENT)]
    mine.write_bytes(b"another")
    os.utime(mine, ns=(1, 1))
    assert store.identify(mine) == ModelFile(ModelHash(hashlib.sha256(b"another").hexdigest()), 7)


def test_a_damaged_or_unwritable_cache_costs_only_time(store: ModelStore, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "model-hashes.json").write_text("{nonsense")
    assert store.hash_file(tmp_path / "models" / "deep" / "mine.gguf") == HASH
    blocked = ModelStore([tmp_path / "models"], cache_folder=tmp_path / "models" / "deep" / "mine.gguf")
    assert blocked.hash_file(tmp_path / "models" / "deep" / "mine.gguf") == HASH
