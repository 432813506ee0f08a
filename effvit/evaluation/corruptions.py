"""CIFAR-10-C and CIFAR-100-C: the test images under corruptions, each at several severities.

Hendrycks and Dietterich 2019 (arXiv 1903.12261). Their files are ``gaussian_noise.npy`` and so on, uint8
``(50000, 32, 32, 3)``: the test split five times, severity 1 first; and ``labels.npy``, ``(50000,)``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from effvit.data.loading.prepared import PreparedDataset
from effvit.errors import UserError
from effvit.evaluation.score import predict_logits, summarise
from effvit.model.vit import ViT

if TYPE_CHECKING:
    import pandas as pd

_LABELS = "labels.npy"
_SEVERITIES = 5


def score_corruptions(model: ViT, dataset: PreparedDataset, folder: Path, batch_size: int) -> "pd.DataFrame":
    """Score a model on each ``.npy`` of images in a folder: columns corruption, severity, num_images, top1, loss.

    ``dataset`` is the one of the model, as `check_fits` returns it. Severities are five equal parts if their labels are
    the same; of other files all images are severity 1.

    Raises:
        UserError: no such files, or arrays that do not fit one another or the model's classes.
    """
    import pandas as pd

    files = sorted(path for path in folder.glob("*.npy") if path.name != _LABELS)
    if not files or not (folder / _LABELS).is_file():
        raise UserError(f"{folder}: expected {_LABELS} and files of images such as gaussian_noise.npy")
    labels = _read_labels(folder / _LABELS, len(dataset.classes))
    rows = []
    for path in files:
        images = _Fitted(_read_images(path, len(labels)), dataset.image_size)
        for severity, part in enumerate(_severities(labels), start=1):
            logits = predict_logits(model, images.part(part), dataset.mean, dataset.std, batch_size)
            scores = summarise(logits, torch.from_numpy(labels[part]))
            found = {name: scores[name] for name in ("num_images", "top1", "loss")}
            rows.append({"corruption": path.stem, "severity": severity, **found})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class _Fitted:
    """Images ``(n, H, W, 3)`` at the size that a model takes, resized when indexed."""

    array: np.ndarray
    size: int

    def __len__(self) -> int:
        return len(self.array)

    def part(self, rows: slice) -> np.ndarray:
        """Some of them; to the model's code an array."""
        return _Fitted(self.array[rows], self.size)  # type: ignore[return-value]

    def __getitem__(self, rows: slice) -> np.ndarray:
        from PIL import Image

        from effvit.data.sources.images import fit

        if self.array.shape[1:3] == (self.size, self.size):
            return np.array(self.array[rows])
        return np.stack([fit(Image.fromarray(image), self.size) for image in self.array[rows]])


def _severities(labels: np.ndarray) -> list[slice]:
    size, rest = divmod(len(labels), _SEVERITIES)
    if rest or (labels.reshape(_SEVERITIES, size) != labels[:size]).any():
        return [slice(0, len(labels))]
    return [slice(start, start + size) for start in range(0, len(labels), size)]


def _read(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: damaged or not an array ({error}); fetch it again") from error


def _read_labels(path: Path, num_classes: int) -> np.ndarray:
    labels = _read(path)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise UserError(f"{path}: {labels.dtype} {labels.shape}, expected whole numbers (n,)")
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise UserError(f"{path}: has labels {labels.min()} to {labels.max()}, the model 0 to {num_classes - 1}")
    return labels.astype(np.int64)


def _read_images(path: Path, count: int) -> np.ndarray:
    images = _read(path)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) != count:
        raise UserError(f"{path}: {images.dtype} {images.shape}, expected uint8 ({count}, H, W, 3)")
    return images
