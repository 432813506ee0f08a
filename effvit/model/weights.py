"""Weights from a file of anyone's, read without running what it may hold: safetensors, or a torch file of tensors."""

import zipfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from effvit.errors import UserError
from effvit.model.settings import CONFIG, WEIGHTS, is_ours, parse, read_json
from effvit.model.vit import ViTConfig

_WRAPPERS = ("model", "state_dict")  # the key under which DeiT's releases and many training scripts keep the weights
_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *_TORCH_SUFFIXES)
_WITH_CONFIG = (WEIGHTS, "pytorch_model.bin")  # files whose directory may hold their configuration


@dataclass(frozen=True)
class Weights:
    """Tensors by name, the SHA-256 of their file, and the configuration next to it.

    That is ``config`` of an effvit model, or ``settings`` of another library, empty where there are none.
    """

    path: Path
    file: Path
    sha256: str
    tensors: dict[str, Tensor]
    config: ViTConfig | None
    settings: dict[str, Any]


def read_weights(path: Path) -> Weights:
    """Read a ``.safetensors`` file, a torch file (``.pth``, ``.pt``, ``.bin``, ``.ckpt``), or a model directory.

    Raises:
        UserError: there is no such file, it is damaged, or it holds anything but finite floating-point tensors.
    """
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected a checkpoint (.safetensors, .pth) or a model directory")
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file}: expected a name that ends in {', '.join(SUFFIXES)}")
    tensors = read_safetensors(file) if file.suffix == ".safetensors" else _torch(file)
    for name, tensor in tensors.items():
        if problem := _what_is_wrong(name, tensor):
            raise UserError(f"{file}: {str(name)[:80]} {problem}")
    return Weights(path, file, _digest(file), tensors, *_beside(file))


def _what_is_wrong(name: Any, tensor: Any) -> str | None:
    if not (isinstance(name, str) and isinstance(tensor, Tensor)):
        return f"is {type(tensor).__name__}, expected a state dict of tensors"
    if tensor.layout != torch.strided or not tensor.is_floating_point() or tensor.element_size() < 2:
        return f"is of {tensor.layout} and {tensor.dtype}, expected dense floating point of 16 bits or more"
    # A view can repeat a few numbers without end.
    if tensor.is_meta or tensor.is_nested or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "is not stored in full; expected each of its numbers in the file"
    if not tensor.isfinite().all():
        return "has numbers that are not finite; expected weights of a sound model"
    return None


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file; raises ``UserError`` where it is not a whole one."""
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file}: not a whole safetensors file ({error})") from error


def _torch(file: Path) -> dict[str, Any]:
    try:
        _refuse_compressed(file)
        # Unpickles tensors and plain containers only. (Before PyTorch 2.6 even this could run code.)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damaged or hostile bytes make of it
        if isinstance(error, OSError) and error.filename:  # the system's
            raise
        raise UserError(
            f"{file}: damaged or not a torch file of tensors alone, and nothing else is unpickled; "
            f"save its state dict as safetensors ({type(error).__name__})"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds {type(content).__name__}, expected a state dict of tensors")
    return content


def _refuse_compressed(file: Path) -> None:
    """Raise where a zip may unpack to more than it is: torch writes members uncompressed, the first at the beginning.

    A second directory, one for this check and one for torch's, would move all members away from where they are.
    """
    with file.open("rb") as stream:
        if stream.read(4) != b"PK\3\4":  # how torch tells its older format
            return
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if min(member.header_offset for member in members) or sum(m.file_size for m in members) > file.stat().st_size:
            raise ValueError("unpacks to more than it is")


def _beside(file: Path) -> tuple[ViTConfig | None, dict[str, Any]]:
    """The configuration next to a model's weights, of this package or of another library."""
    neighbour = file.with_name(CONFIG)
    if file.name not in _WITH_CONFIG or not neighbour.is_file():
        return None, {}
    try:
        values = read_json(neighbour)
        return (parse(neighbour, values)[0], {}) if is_ours(values) else (None, values)
    except UserError:
        return None, {}


def _digest(file: Path) -> str:
    digest = sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()
