"""What a run needs to resume after it was killed: kept outside its outputs, found again by what it is a run of.

The state of a run is one file, tensors and numbers together, replaced as a whole: at any moment there is a whole one or
none. It is safetensors with the numbers as metadata, and a checksum behind it. Directories of runs lie under
``$EFFVIT_STATE``, by default the user's directory for state, so that a run resumes in another checkout as well (as
``dvc exp run --temp`` makes one for each attempt), and are removed when the run has written its outputs. A small file
then remembers that they are complete.
"""

import hashlib
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from platformdirs import user_state_path
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from effvit.data.loading.prepared import Meta, PreparedDataset
from effvit.device import Machine
from effvit.files import sync_directory
from effvit.model.vit import ViTConfig
from effvit.provenance import version_of
from effvit.training.recipe import TrainConfig

_FORGOTTEN_S = 60 * 86400  # a run that nobody continued for so long is removed
_NAME = "[0-9a-f]" * 32  # a fingerprint, as a pattern
_SAMPLED_BYTES = 2**28  # all of CIFAR; of images of 224 pixels some 1,800
_MOVES_NO_RESULT = {"devices", "workers", "checkpoint_s"}
_FOLLOWS_DEVICES = "threads"  # Fabric divides the processors among the processes
# Of other packages: arithmetic, RandAugment, decoding and resizing, precision.
_DECIDING = ("torch", "numpy", "torchvision", "pillow", "lightning-fabric")
_NO_PART_OF_TRAINING = ("analysis", "cli", "deploy", "evaluation", "figures", "measure", "report", "study")


def fingerprint(
    config: ViTConfig,
    dataset: PreparedDataset,
    recipe: TrainConfig,
    machine: Machine,
    *,
    seed: int,
    horizontal_flip: bool,
    start: str | None = None,
) -> str:
    """Name of a run: a digest of everything that determines its result, down to pixels, code, versions and machine.

    ``start`` is the digest of the weights that the model starts from, None for random ones.
    """
    digest = hashlib.blake2b(digest_size=16)
    meta = {name: getattr(dataset, name) for name in Meta.__dataclass_fields__}
    values = {
        "model": config.model_dump(),
        "train": recipe.model_dump(exclude=_MOVES_NO_RESULT),
        "seed": seed,
        "horizontal_flip": horizontal_flip,
        "start": start,
        "data": meta,
        "machine": {name: value for name, value in asdict(machine).items() if name != _FOLLOWS_DEVICES},
        "versions": [sys.version, *map(version_of, _DECIDING)],
    }
    digest.update(json.dumps(values, sort_keys=True).encode())
    for split in ("train", "validation"):
        images, labels = dataset.split(split)
        digest.update(labels.tobytes())
        for batch in images.batches(_sample(len(images), dataset.image_size), seed=0, workers=0):
            digest.update(batch.tobytes())
    for path in _code(config.attention):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sample(count: int, size: int) -> list[np.ndarray]:
    """Indices of the images that stand for all: every one, or of large data an even choice that is quick to read.

    A change elsewhere in the training part still shows, in the mean and deviation of all of its pixels.
    """
    most = max(1, _SAMPLED_BYTES // (3 * size**2))
    return [index for index in np.array_split(np.arange(0, count, -(-count // most)), 64) if len(index)]


def _code(attention: str) -> Iterator[Path]:
    """Yield the files of the package that have a say in training with this mechanism, and some more."""
    package = Path(__file__).parents[1]
    mechanisms = {"__init__.py", "base.py", f"{attention}.py"}
    for path in sorted(package.rglob("*.py")):
        folder = path.relative_to(package).parts[0]
        if folder not in _NO_PART_OF_TRAINING and (folder != "attention" or path.name in mechanisms):
            yield path


class Store:
    """The directory of one run."""

    def __init__(self, directory: Path, report: Callable[[str], None]) -> None:
        self.directory = directory
        self._report = report
        self._file = directory / "state"

    def save(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Replace the state, so that it outlives the process and the machine as soon as this returns."""
        content = save(tensors, {"numbers": json.dumps(numbers)})
        aside = self.directory / "state.new"
        try:
            with aside.open("wb") as file:
                file.write(content)
                file.write(_checksum(content))
                file.flush()
                os.fsync(file.fileno())
            aside.replace(self._file)
            sync_directory(self.directory)
        except OSError as error:
            error.filename = error.filename or str(self._file)
            raise

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and numbers as they were saved; None, after one line, where the file is not whole."""
        if not self._file.exists():
            return None
        state = _read(self._file)
        if state is None:
            self._report(f"{self._file}: damaged, so the run starts from the beginning")
        return state

    def kept(self, epoch: int) -> Path:
        """Where the weights of an epoch are kept until the run is over."""
        return self.directory / f"epoch-{epoch:03d}"

    def remove(self) -> None:
        """Forget the run."""
        shutil.rmtree(self.directory, ignore_errors=True)


@contextmanager
def open_store(name: str, report: Callable[[str], None]) -> Iterator[Store]:
    """Give the directory of the run of this name to this process alone.

    If another process trains the same at the same time, each has a directory of its own; the one that is started again
    after a kill gets back a directory with a state, whichever of them is over.
    """
    root = _state_dir() / "runs"
    root.mkdir(parents=True, exist_ok=True)
    _remove_forgotten(root)
    earlier = sorted(root.glob(f"{name}-*"))
    if len(earlier) > 1:  # reading takes a while: only for a choice
        earlier.sort(key=lambda directory: _read(directory / "state") is None)
    for directory in chain(earlier, (root / f"{name}-{number}" for number in count())):
        directory.mkdir(exist_ok=True)
        lock = FileLock(directory / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            yield Store(directory, report)
        finally:
            lock.release()
        return


def record_finished(name: str, *outputs: Path) -> None:
    """Remember that the run of this name has written these directories."""
    file = _record_of(name, outputs)
    file.parent.mkdir(parents=True, exist_ok=True)
    for other in file.parent.glob(f"*-{file.name.rpartition('-')[2]}"):
        other.unlink()  # of a run that was here before
    file.write_text(_digest(outputs), encoding="utf-8")


def is_finished(name: str, *outputs: Path) -> bool:
    """Whether the run of this name wrote these directories, and they are as it left them."""
    file = _record_of(name, outputs)
    return file.exists() and file.read_text(encoding="utf-8") == _digest(outputs)


def _record_of(name: str, outputs: tuple[Path, ...]) -> Path:
    where = hashlib.blake2b("\n".join(str(path.resolve()) for path in outputs).encode(), digest_size=8).hexdigest()
    return _state_dir() / "finished" / f"{name}-{where}"


def _digest(directories: tuple[Path, ...]) -> str:
    """Digest of all files in directories, by name and content."""
    digest = hashlib.blake2b(digest_size=16)
    for directory in directories:
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(directory).as_posix()}\n{path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while chunk := file.read(2**22):
                    digest.update(chunk)
    return digest.hexdigest()


def _state_dir() -> Path:
    return Path(os.environ.get("EFFVIT_STATE") or user_state_path("effvit"))


def _remove_forgotten(root: Path) -> None:
    ours = {file.parent for name in ("lock", "state") for file in root.glob(f"{_NAME}-*/{name}")}
    for directory in ours:  # whatever else is there is somebody else's
        try:
            last = max(path.stat().st_mtime for path in (directory, *directory.glob("state")))
        except FileNotFoundError:  # another run is just over
            continue
        if time.time() - last > _FORGOTTEN_S:
            shutil.rmtree(directory, ignore_errors=True)


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Give back what is in the file; None where it is not there or not whole."""
    try:
        content = file.read_bytes()
        content, checksum = content[:-4], content[-4:]
        if _checksum(content) == checksum:
            return load(content), json.loads(_metadata(content)["numbers"])
    except (FileNotFoundError, SafetensorError, KeyError, ValueError):
        pass  # zeros are a sound checksum of nothing, and another's file can have one too
    return None


def _metadata(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"]


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")
