"""CIFAR-10 and CIFAR-100: torchvision's download with its checksums, or a folder tree of the user's own."""

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
from effvit.data.sources.folder import has_tree, read_tree
from effvit.data.sources.images import fit
from effvit.errors import UserError
from effvit.files import staged_dir, staged_file

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

# RuntimeError: torchvision found the checksum of what arrived wrong. A full disk is another OSError and none of these.
_NETWORK_ERRORS = (URLError, HTTPException, ConnectionError, TimeoutError, SSLError, RuntimeError)

_LARGEST_BYTES = 256 * 2**20  # the extracted batches come to 186 MB


def cifar10(root: Path | None, image_size: int) -> Source:
    """CIFAR-10 in ``root`` (by default `default_root`).

    What is there is taken in this order: a folder tree ``train/<class>/*``, ``test/<class>/*``; torchvision's extracted
    batches; its archive, which is then extracted; else the archive is downloaded. Nothing is extracted or unpickled
    before its checksum matched.
    """
    return _open("CIFAR10", root or default_root("cifar10"), image_size)


def cifar100(root: Path | None, image_size: int) -> Source:
    """CIFAR-100 (its 100 fine labels) in ``root``, found as `cifar10` finds CIFAR-10."""
    return _open("CIFAR100", root or default_root("cifar100"), image_size)


def _open(class_name: str, root: Path, image_size: int) -> Source:
    if has_tree(root):
        return read_tree(root)
    from torchvision import datasets  # slow to import, and a folder tree needs none of it

    return _from_torchvision(getattr(datasets, class_name), root, image_size)


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
