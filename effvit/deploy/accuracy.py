"""What a deployed model's files weigh, and what they get right."""

from pathlib import Path

from effvit.data.loading.prepared import PreparedDataset
from effvit.deploy.files import RUNTIMES, Figures, files_of
from effvit.deploy.runtime import open_session, predict_one_by_one
from effvit.evaluation.score import predict_logits
from effvit.model.settings import WEIGHTS
from effvit.model.vit import ViT

SPLIT = "validation"  # the test split is read by `evaluate` alone


def sizes_and_accuracy(model: ViT, directory: Path, dataset: PreparedDataset) -> Figures:
    """Bytes of each file, and top-1 on the validation split (fractions), images one by one but for PyTorch.

    ``int8_lost`` and ``int8_gained`` count the images that int8 alone gets wrong, and right.

    Args:
        model: the deployed one, on the CPU, in eval mode.
        directory: its files, see `effvit.deploy.files`.
        dataset: has images of the model's size and its classes.
    """
    images, labels = dataset.split(SPLIT)
    right = predict_logits(model, images, dataset.mean, dataset.std, 256).argmax(dim=1).numpy() == labels
    figures: Figures = {"split": SPLIT, "n_images": len(labels), "top1": float(right.mean())}
    figures["model_bytes"] = (directory / WEIGHTS).stat().st_size
    figures |= dict.fromkeys(f"{runtime}_{what}" for what in ("bytes", "top1") for runtime in RUNTIMES)
    figures |= {"int8_lost": None, "int8_gained": None}
    for runtime, file in files_of(directory).items():
        figures[f"{runtime}_bytes"] = file.stat().st_size
        now = predict_one_by_one(open_session(file), images, dataset.mean, dataset.std) == labels
        figures[f"{runtime}_top1"] = float(now.mean())
        if runtime == "int8":
            figures |= {"int8_lost": int((right & ~now).sum()), "int8_gained": int((now & ~right).sum())}
    return figures
