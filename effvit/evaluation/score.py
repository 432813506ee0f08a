"""What a trained model gets right: accuracy, calibration and confusion over a split."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    import pandas as pd

    from effvit.data.loading.prepared import Images


@torch.inference_mode()
def predict_logits(
    model: nn.Module, images: "Images | np.ndarray", mean: Sequence[float], std: Sequence[float], batch_size: int
) -> Tensor:
    """Logits ``(n, classes)`` on the CPU, in float32, of uint8 images ``(n, H, W, 3)``; ``model`` in eval mode."""
    from effvit.data.loading.transforms import to_float
    from effvit.model.logits import logits_of

    device = next(model.parameters()).device
    logits = []
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(images[start : start + batch_size]).to(device)
        logits.append(logits_of(model(to_float(batch, mean, std))).float().cpu())
    return torch.cat(logits)


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Fraction of rows whose label is among the k largest logits (all classes where there are fewer than k)."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return int((top == labels[:, None]).any(dim=1).sum()) / len(labels)


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean |accuracy - confidence| over equal bins of confidence, weighted by size.

    Guo et al. 2017 (arXiv 1706.04599, eq. 3).
    """
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    gap = (predicted == labels).float() - confidence
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    return torch.zeros(bins).index_add_(0, bin_of, gap).abs().sum().item() / len(labels)


def summarise(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return ``top1``, ``top5`` and ``ece`` as fractions, mean cross-entropy ``loss`` in nats, and ``num_images``."""
    return {
        "top1": top_k_accuracy(logits, labels, 1),
        "top5": top_k_accuracy(logits, labels, 5),
        "loss": F.cross_entropy(logits, labels).item(),
        "ece": calibration_error(logits, labels),
        "num_images": len(labels),
    }


def per_class(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> "pd.DataFrame":
    """Top-1 accuracy of each class: columns class, num_images, top1."""
    import pandas as pd

    right = (logits.argmax(dim=1) == labels).numpy()
    of_class = [labels.numpy() == index for index in range(len(classes))]
    return pd.DataFrame(
        {
            "class": list(classes),
            "num_images": [int(mask.sum()) for mask in of_class],
            "top1": [float(right[mask].mean()) if mask.any() else None for mask in of_class],
        }
    )


def confusion(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> "pd.DataFrame":
    """How often each class was taken for which: columns actual, predicted, count; one row for each pair seen."""
    import pandas as pd

    pairs, counts = np.unique(np.stack([labels.numpy(), logits.argmax(dim=1).numpy()]), axis=1, return_counts=True)
    names = np.array(classes, dtype=object)
    return pd.DataFrame({"actual": names[pairs[0]], "predicted": names[pairs[1]], "count": counts})


def predictions(logits: Tensor, labels: Tensor, files: Sequence[str] | None = None) -> "pd.DataFrame":
    """Class of each image and class it was taken for, as numbers: columns index, label, prediction.

    Where the images' ``files`` are known, they are a fourth column, file.
    """
    import pandas as pd

    predicted = logits.argmax(dim=1).numpy()
    table = {"index": range(len(labels)), "label": labels.numpy(), "prediction": predicted}
    return pd.DataFrame(table if files is None else table | {"file": files})


def worst_mistakes(logits: Tensor, labels: Tensor, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of wrong predictions, the most confident first, at most so many, and the confidence of each, 0 to 1."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    wrong = (predicted != labels).nonzero().flatten()
    rows = wrong[confidence[wrong].argsort(descending=True, stable=True)][:most]
    return rows.numpy(), confidence[rows].numpy()


def attention_rollout(maps: Sequence[Tensor], prefix_tokens: int = 1, *, class_token: bool = True) -> Tensor:
    """What the class token's output rests on, or that of all patches where there is none, through all blocks.

    Abnar and Zuidema 2020 (arXiv 2005.00928, eq. 1): heads averaged, the residual path as half an identity, rows
    normalised, blocks multiplied. Implied matrices may have negative entries (Nyström's do); magnitudes are taken.

    Args:
        maps: one ``(B, H, N, N)`` per block, first block first.
        prefix_tokens: how many tokens come before the patches.
        class_token: whether the first of them, if any, is what the output is made from, rather than all patches.

    Returns:
        ``(B, P)``: share of each patch, summing to one.
    """
    n = maps[0].shape[-1]
    identity = torch.eye(n, device=maps[0].device)
    rollout = identity.expand(len(maps[0]), n, n)
    for attention_map in maps:
        mixed = attention_map.float().mean(dim=1).abs()
        mixed = mixed / mixed.sum(dim=-1, keepdim=True)
        rollout = (0.5 * mixed + 0.5 * identity) @ rollout
    rows = rollout[:, 0] if prefix_tokens and class_token else rollout[:, prefix_tokens:].mean(dim=1)
    patches = rows[:, prefix_tokens:]
    return patches / patches.sum(dim=-1, keepdim=True)
