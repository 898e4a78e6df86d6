"""Where this device's model files are, and which of them is meant: by path, by name, or by content.

Devices name a model to each other by the SHA-256 of its file, because a name may mean two things on two devices. Hashing
tens of gigabytes takes a while, so results are kept with the file's size and time; files of a Hugging Face cache carry
their hash as the name of their blob.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs

from shoal.errors import ModelNotFound
from shoal.ids import ModelHash
from shoal.runtime.kept import KeptRecords
from shoal.runtime.messages import ModelEntry, ModelFile

_CHUNK_BYTES = 8 * 1024 * 1024
_FOLDER_DEPTH_MAX = 6
_BLOB_NAME = re.compile(r"[0-9a-f]{64}")
_QUANTISATION = re.compile(r"(I?Q\d\w*|BF16|F16|F32|MXFP4)$", flags=re.IGNORECASE)

HashProgress = Callable[[int, int], None]


def default_folders() -> list[Path]:
    """The Hugging Face cache (its variables respected), and shoal's own folder."""
    home = Path(
        os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"
    )
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    return [Path(platformdirs.user_data_dir("shoal")) / "models", hub]


class ModelStore:
    """Finds models in `folders`; those of `default_folders` are searched after them."""

    def __init__(self, folders: list[Path], *, cache_folder: Path | None = None) -> None:
        self.folders = [*folders, *default_folders()]
        self._hashes = KeptRecords("model-hashes", folder=cache_folder)

    def resolve(self, name: str) -> Path:
        """The file that a user means: a path, `owner/repo[:QUANT]`, or a file's name with or without `.gguf`.

        Raises:
            ModelNotFound: names what was looked for and where; several matches are listed.
        """
        path = Path(name).expanduser()
        if path.is_file():
            return path.resolve(strict=True)
        matches = [file for file in self._files() if _is_meant(file, name)]
        distinct = sorted({file.resolve() for file in matches})
        if len(distinct) == 1:
            return distinct[0]
        if distinct:
            listed = ", ".join(str(file) for file in sorted(matches))
            raise ModelNotFound(
                f"'{name}' could be {listed}: give the path, or the quantisation as {name.split(':')[0]}:Q4_K_M"
            )
        raise ModelNotFound(
            f"no model '{name}': not a file, and no .gguf of that name in {self.describe_folders()}; "
            "give a path, or a folder with --models"
        )

    def entries(self) -> list[ModelEntry]:
        """Every model that can be found by name, each once."""
        found: dict[Path, ModelEntry] = {}
        for file in self._files():
            with contextlib.suppress(OSError):
                resolved, status = file.resolve(strict=True), file.stat()
                if resolved not in found:
                    found[resolved] = ModelEntry(name_of(file), str(file), status.st_size, status.st_mtime)
        return sorted(found.values(), key=lambda entry: entry.name)

    def find(self, model: ModelFile, *, progress: HashProgress | None = None) -> Path | None:
        """The file with this content, or None."""
        for file in self._files():
            with contextlib.suppress(OSError):
                if file.stat().st_size == model.num_bytes and self.hash_file(file, progress=progress) == model.hash:
                    return file.resolve()
        return None

    def identify(self, path: Path) -> ModelFile:
        """The content of a file."""
        return ModelFile(hash=self.hash_file(path), num_bytes=path.stat().st_size)

    def hash_file(self, path: Path, *, progress: HashProgress | None = None) -> ModelHash:
        """SHA-256 of a file; kept for as long as its size and time of change stay."""
        resolved = path.resolve(strict=True)
        if _BLOB_NAME.fullmatch(resolved.name) and resolved.parent.name == "blobs":
            return ModelHash(resolved.name)
        status = resolved.stat()
        key, stamp = str(resolved), [status.st_size, status.st_mtime_ns]
        entry = self._hashes.get(key)
        if isinstance(entry, dict) and entry.get("stamp") == stamp and isinstance(entry.get("sha256"), str):
            return ModelHash(entry["sha256"])
        digest = _hash(resolved, status.st_size, progress)
        self._hashes.put(key, {"stamp": stamp, "sha256": digest})
        return ModelHash(digest)

    def describe_folders(self) -> str:
        return ", ".join(str(folder) for folder in self.folders)

    def _files(self) -> Iterator[Path]:
        for folder in self.folders:
            yield from _gguf_files(folder, depth=_FOLDER_DEPTH_MAX)


def _gguf_files(folder: Path, *, depth: int) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.is_dir() and depth > 0:
            yield from _gguf_files(entry, depth=depth - 1)
        elif entry.suffix.lower() == ".gguf" and entry.is_file():
            yield entry


def name_of(file: Path) -> str:
    """What a model is called: `owner/repo:QUANT` in a Hugging Face cache, else the file's name without `.gguf`."""
    for part in file.parts:
        owner, separator, repository = part.removeprefix("models--").partition("--")
        if part.startswith("models--") and separator:
            quantisation = _QUANTISATION.search(file.stem)
            return f"{owner}/{repository}:{quantisation[0] if quantisation else file.stem}"
    return file.stem


def _is_meant(file: Path, name: str) -> bool:
    repository, _, quantisation = name.partition(":")
    if "/" in repository:
        return f"models--{repository.replace('/', '--')}" in file.parts and quantisation.lower() in file.name.lower()
    return file.name in (name, f"{name}.gguf")


def _hash(path: Path, size: int, progress: HashProgress | None) -> str:
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, size)
    return digest.hexdigest()
