"""CIFAR-10 and CIFAR-100: torchvision's download with its checksums, or the user's own copy in any layout."""

from collections import Counter
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from ssl import SSLError
from typing import TYPE_CHECKING
from urllib.error import URLError

import numpy as np
from PIL import Image

from effvit.data.sources.archive import extract
from effvit.data.sources.base import Source, Split, default_root
from effvit.data.sources.images import fit
from effvit.data.sources.layout import BY_CONTENT, Choices, build_source
from effvit.data.sources.layouts.recognise import recognise
from effvit.data.sources.tree import is_litter
from effvit.errors import UserError
from effvit.files import staged_dir, staged_file

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

# RuntimeError: torchvision found the checksum of what arrived wrong. A full disk is another OSError and none of these.
_NETWORK_ERRORS = (URLError, HTTPException, ConnectionError, TimeoutError, SSLError, RuntimeError)

# Names that torchvision's classes have too, which are slow to import.
_BATCHES = {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}
_ARCHIVES = {"CIFAR10": "cifar-10-python.tar.gz", "CIFAR100": "cifar-100-python.tar.gz"}
_LARGEST_BYTES = 256 * 2**20  # the extracted batches come to 186 MB


def cifar10(root: Path | None, image_size: int, choices: Choices = BY_CONTENT) -> Source:
    """CIFAR-10 in ``root`` (by default `default_root`).

    What is there is taken in this order: torchvision's extracted batches; its archive, which is then extracted; any
    layout with 10 classes. Into a folder that is empty or new the archive is downloaded. Nothing is extracted or
    unpickled before its checksum matched.

    Raises:
        UserError: something else is there, the archive is damaged, or it could not be downloaded.
    """
    return _open("CIFAR10", 10, root or default_root("cifar10"), image_size, choices)


def cifar100(root: Path | None, image_size: int, choices: Choices = BY_CONTENT) -> Source:
    """CIFAR-100 (its 100 fine labels) in ``root``, found as `cifar10` finds CIFAR-10."""
    return _open("CIFAR100", 100, root or default_root("cifar100"), image_size, choices)


def _open(class_name: str, num_classes: int, root: Path, image_size: int, choices: Choices) -> Source:
    entries = {path.name for path in root.iterdir() if not is_litter(path.name)} if root.is_dir() else set()
    batches = {_BATCHES[class_name], _ARCHIVES[class_name]}
    if entries & batches or (not entries and (root.is_dir() or not root.exists())):
        from torchvision import datasets  # slow to import, and other layouts need none of it

        if choices != BY_CONTENT:
            raise UserError(f"{root}: CIFAR's batches have one form and split; leave out what chooses among files")
        return _from_torchvision(getattr(datasets, class_name), root, image_size)
    try:
        layout = recognise(root, choices, image_size)
    except UserError as error:
        raise UserError(f"{error}; to download {class_name}, name an empty folder as root") from error
    if len(layout.classes) != num_classes:
        raise UserError(
            f"{root}: has {len(layout.classes)} classes ({layout.description}), {class_name} has {num_classes}; "
            "prepare other images as the data set folder, or name an empty folder as root to download it"
        )
    return build_source(layout, root, choices)


def _from_torchvision(kind: "type[CIFAR10]", root: Path, image_size: int) -> Source:
    if not _is_extracted(kind, root / kind.base_folder):
        archive = root / kind.filename
        if not archive.exists():
            _download(kind, archive)
        _check_archive(archive, kind.tgz_md5)
        _extract(kind, archive)
    # torchvision compares each file's checksum once more before it unpickles it
    train, test = (kind(root, train=is_train) for is_train in (True, False))
    description = f"torchvision {kind.__name__}, archive {kind.filename} with MD5 {kind.tgz_md5}"
    return Source(description, tuple(train.classes), _split(train, image_size), _split(test, image_size))


def _split(data: "CIFAR10", image_size: int) -> Split:
    notes: Counter[str] = Counter()
    if data.data.shape[1:3] != (image_size, image_size):
        notes["resized"] = len(data.data)
    return Split(np.asarray(data.targets, dtype=np.int64), _resized(data.data, image_size), notes)


def _resized(images: np.ndarray, image_size: int) -> Iterator[np.ndarray]:
    for image in images:
        yield fit(Image.fromarray(image), image_size)


def _is_extracted(kind: "type[CIFAR10]", directory: Path) -> bool:
    from torchvision.datasets.utils import check_integrity

    files = [*kind.train_list, *kind.test_list, [kind.meta["filename"], kind.meta["md5"]]]
    return all(check_integrity(directory / name, md5) for name, md5 in files)


def _download(kind: "type[CIFAR10]", archive: Path) -> None:
    from torchvision.datasets.utils import download_url

    try:
        with staged_file(archive) as aside:
            download_url(kind.url, archive.parent, filename=aside.name, md5=kind.tgz_md5)
    except _NETWORK_ERRORS as error:
        raise UserError(
            f"could not download {kind.url} ({error}): put that file at {archive} by hand, "
            f"or your own images in {archive.parent}/train/<class>/ and {archive.parent}/test/<class>/"
        ) from error


def _check_archive(archive: Path, expected: str) -> None:
    from torchvision.datasets.utils import calculate_md5

    actual = calculate_md5(archive)
    if actual != expected:
        raise UserError(
            f"{archive}: damaged or incomplete ({archive.stat().st_size} bytes with MD5 {actual}, "
            f"expected MD5 {expected}); delete it to download it again"
        )


def _extract(kind: "type[CIFAR10]", archive: Path) -> None:
    directory = archive.parent / kind.base_folder
    with staged_dir(directory) as aside:
        extract(archive, aside, _LARGEST_BYTES)
        for path in (aside / kind.base_folder).iterdir():
            path.replace(aside / path.name)
        (aside / kind.base_folder).rmdir()
        if not _is_extracted(kind, aside):
            raise UserError(f"{archive}: the files in it do not have torchvision's checksums")
