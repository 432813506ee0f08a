"""Images as people have them, as a model takes them and as figures show them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from effvit.data.loading.loaders import checked_batches
from effvit.data.loading.prepared import PreparedDataset
from effvit.data.loading.stored import Images as Stored
from effvit.data.loading.transforms import to_float
from effvit.errors import UserError
from effvit.evaluation.predict import view_of
from effvit.memory import is_out_of_memory
from effvit.model.logits import logits_of
from effvit.model.trained_on import TrainedOn
from effvit.model.vit import ViT

Images: TypeAlias = np.ndarray | Stored | Tensor | Sequence[str | Path]
"""uint8 ``(n, H, W, 3)``, an array or a data set's own; normalised floats ``(n, channels, H, W)``; or image files."""
_EXPECTED = (
    "expected uint8 (n, height, width, 3), normalised floats (n, channels, height, width), or a list of image files"
)


def device_of(model: nn.Module) -> torch.device:
    """Where a model is."""
    parameter = next(iter(model.parameters()), None)
    return torch.device("cpu") if parameter is None else parameter.device


def trained_on(model: nn.Module | None) -> TrainedOn:
    """What a model knows of what it was trained on."""
    about = getattr(model, "trained_on", None)
    return about if isinstance(about, TrainedOn) else TrainedOn()


def known(name: str, model: nn.Module | None, data: PreparedDataset | None) -> Any:
    """``classes``, ``mean`` or ``std`` of what a model was trained on, else of the data set; None where unknown."""
    own = getattr(trained_on(model), name)
    return getattr(data, name, None) if own is None else own


def read_images(images: Images, data: PreparedDataset | None, model: nn.Module | None = None) -> Tensor:
    """Return images as a tensor, uint8 ``(n, H, W, 3)`` or floats ``(n, channels, H, W)``.

    Raises:
        UserError: they are neither, there are none, or some of their numbers are not finite; files, and neither a data
            set nor a ``ViT`` says at which size to read them.
    """
    if isinstance(images, list | tuple) and images and all(isinstance(path, str | Path) for path in images):
        if data is None and not isinstance(model, ViT):
            raise UserError("images: files are read at the size of a data set's images; give data=")
        images = _read_files([Path(path) for path in images], data, model)
    if isinstance(images, list | tuple) and not images:
        raise UserError(f"images: there are none; {_EXPECTED}")
    if isinstance(images, Stored):
        images = images[:]
    if isinstance(images, np.ndarray) and images.dtype in (np.uint8, np.float32, np.float64):
        images = torch.from_numpy(np.ascontiguousarray(images))
    if not isinstance(images, Tensor):
        raise UserError(f"images: got {type(images).__name__}, {_EXPECTED}")
    pixels = images.dtype == torch.uint8 and images.shape[-1:] == (3,)
    if images.ndim != 4 or not (pixels or images.is_floating_point()):
        raise UserError(f"images: got {str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}, {_EXPECTED}")
    if not len(images):
        raise UserError("images: there are none")
    if not images.isfinite().all():
        raise UserError("images: have numbers that are not finite")
    return images


def _read_files(paths: list[Path], data: PreparedDataset | None, model: nn.Module | None) -> np.ndarray:
    from effvit.data.sources.images import load_image

    if data is not None:
        return np.stack([load_image(path, data.image_size, data.storage) for path in paths])
    assert isinstance(model, ViT)
    return view_of(model, None).read(paths)


def require_module(model: Any) -> None:
    """Raise ``UserError`` where that is no model."""
    if not isinstance(model, nn.Module):
        raise UserError(f"model: got {type(model).__name__}, expected a torch.nn.Module")


def require_batch_size(batch_size: int) -> None:
    """Raise ``UserError`` where that is no number of images."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size={batch_size!r}: expected a whole number from 1")


def first_batch(loader: DataLoader[Any], name: str = "data") -> tuple[Tensor, Tensor]:
    """Images and labels of a loader's first batch; raises ``UserError`` where it gives something else or nothing."""
    batch = next(checked_batches(loader, name), None)
    if batch is None:
        raise UserError(f"{name}: the loader gives no batches")
    return batch


def as_inputs(images: Tensor, model: nn.Module, data: PreparedDataset | None) -> Tensor:
    """Images as the model takes them, floats ``(n, channels, H, W)`` where it is.

    Raises:
        UserError: uint8 images, and neither model nor data set says how they are normalised.
    """
    if images.is_floating_point():
        return images.float().to(device_of(model))  # in this order, as MPS has no float64
    images = images.to(device_of(model))
    mean, std = known("mean", model, data), known("std", model, data)
    if mean is None or std is None:
        raise UserError("images: uint8, which the model takes normalised; give data= or normalised floats")
    return to_float(images, mean, std)


def as_pictures(images: Tensor, model: nn.Module | None, data: PreparedDataset | None) -> np.ndarray:
    """Images to be shown, uint8 ``(n, H, W, 3)``: floats as they were before, or stretched from black to white."""
    if images.dtype == torch.uint8:
        return images.cpu().numpy()
    pictures = images.detach().cpu().float()
    pictures = pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures[:, :3]
    mean, std = known("mean", model, data), known("std", model, data)
    if mean is None or std is None:
        low, high = (each(pictures, dim=(1, 2, 3), keepdim=True) for each in (torch.amin, torch.amax))
        pictures = (pictures - low) / (high - low).clamp(min=1e-12)
    else:
        offset, scale = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        pictures = pictures * scale + offset
    return (255 * pictures).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for as long as the context lasts."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@torch.no_grad()
def count_classes(model: nn.Module, images: Tensor) -> int:
    """Number of classes that a model tells apart, found by showing it an image of ``(n, channels, H, W)``.

    Raises:
        UserError: it does not take such images, or returns no logits for them.
    """
    try:
        with evaluating(model):
            logits = logits_of(model(images[:1].to(device_of(model), torch.float32)))
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the model does not take images of shape {(1, *images.shape[1:])}: {why}") from error
    if logits.ndim != 2 or len(logits) != 1:
        raise UserError(f"the model returns {tuple(logits.shape)} for one image, expected logits (1, classes)")
    return logits.shape[1]


def check_classes(model: nn.Module, data: PreparedDataset) -> None:
    """Raise ``UserError`` where a model does not take a data set's images, or has another number of classes."""
    there = count_classes(model, torch.zeros(1, 3, data.image_size, data.image_size))
    if there != len(data.classes):
        raise UserError(f"the model has {there} classes, {data.name} has {len(data.classes)}")
