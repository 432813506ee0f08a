"""A model that starts from trained weights: timm's of a ViT or DeiT, or effvit's of any mechanism.

All mechanisms share everything outside attention and, inside it, the maps to queries, keys, values and output; what a
mechanism adds of its own starts fresh unless the weights are of that mechanism.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from effvit.attention.base import Grid
from effvit.errors import UserError
from effvit.model.resize import resize_positions, resize_projection
from effvit.model.vit import ViT, ViTConfig
from effvit.model.weights import Weights, read_weights

StateDict = dict[str, Tensor]
_OWN = re.compile(r"blocks\.\d+\.attn\.(?!(qkv|proj|heads)\.).*")  # what a mechanism adds to the maps that all share
_ON_TRUST = ("the number of heads", "pooling by the class token", "GELU", "norms with epsilon 1e-6")
_FOREIGN = {
    "dist_token": "a distillation token",
    "head_dist": "a distillation head",
    "fc_norm": "average pooling",
    "norm_pre": "a norm before the blocks",
    "reg_token": "register tokens",
    "ls1": "layer scale",
    "q_norm": "normed queries",
}
_OTHER_NAMES = {
    "module.": "they begin with module., as under DistributedDataParallel: save model.module.state_dict()",
    "encoder.layer": "they are Hugging Face's: take timm's release of the model",
}


@dataclass(frozen=True)
class StartReport:
    """What became of each weight; ``adapted`` and ``ignored`` say how and why, ``fresh`` are the model's own.

    ``on_trust`` is what the weights do not tell of the model that they are of, and what its logits depend on.
    """

    source: str
    sha256: str
    on_trust: list[str]
    loaded: list[str]
    adapted: dict[str, str]
    fresh: list[str]
    ignored: dict[str, str]

    def lines(self) -> list[str]:
        """Tell it in a few lines, blocks taken together."""
        lines = [f"start from {self.source} (sha256 {self.sha256[:12]}): {len(self.loaded)} weights as they are"]
        for what, reasons in (("adapted", self.adapted), ("ignored", self.ignored)):
            for reason in dict.fromkeys(reasons.values()):
                lines.append(f"  {what}: {_together(n for n in reasons if reasons[n] == reason)} ({reason})")
        if self.fresh:
            lines.append(f"  fresh: {_together(self.fresh)}")
        return lines + ([f"  taken on trust: {', '.join(self.on_trust)}"] if self.on_trust else [])


def start_from(path: Path, model: ViT) -> StartReport:
    """Overwrite a freshly built model's weights with those of a file or a model directory that fit it.

    Position embeddings are carried over to another grid of patches, and so are Linformer's E and F. A head of other
    classes is left out.

    Raises:
        UserError: the file is not one of weights; they are of another width, depth, MLP, patch size, number of
            channels or heads; or they have parts that this ViT has none of. The model is then as it was.
    """
    weights = read_weights(path)
    try:
        taken, report = _fit(weights, model)
    except (ValueError, RuntimeError, IndexError, TypeError) as error:  # all but the first from shapes without sense
        raise UserError(f"{path}: {error}") from error
    with torch.no_grad():
        for name, target in _once(model).items():
            if name in taken:
                target.copy_(taken[name])
    return report


def _fit(weights: Weights, model: ViT) -> tuple[StateDict, StartReport]:
    """What each weight of the model becomes, and the report on it."""
    config, source = model.config, _renamed(weights.tensors, model.config)
    grid = _require_same_model(weights, source, config)
    stored, targets = model.state_dict(), _once(model)
    unknown = [name for name in source if name not in stored and not (weights.config and _OWN.fullmatch(name))]
    if unknown:
        raise UserError(f"has {_together(unknown)}, of which this ViT has none; expected a plain ViT")
    taken: StateDict = {}
    adapted: dict[str, str] = {}
    ignored = {name: f"not of {config.attention}" for name in source if name not in targets}
    for name in source.keys() & targets.keys():
        tensor, how = source[name], "" if name in weights.tensors else "the same maps under other names"
        if grid != config.grid_size and (moved := _to_grid(name, tensor, grid, config)) is not None:
            tensor, how = moved, "{}x{} to {}x{} patches".format(*grid, *config.grid_size)
        if tensor.shape == targets[name].shape:
            taken[name] = tensor
            adapted |= {name: how} if how else {}
        else:
            ignored[name] = f"of shape {tuple(tensor.shape)}, here {tuple(targets[name].shape)}"
    fresh = [name for name in targets if name not in taken]
    for name in fresh:
        if not (_OWN.fullmatch(name) or name.startswith("head.")):
            raise UserError(f"{name}: {ignored.get(name, 'missing')}; expected all weights of a plain ViT of this size")
    loaded = [name for name in targets if name in taken and name not in adapted]
    report = StartReport(
        source=str(weights.path),
        sha256=weights.sha256,
        on_trust=[] if weights.config else list(_ON_TRUST),
        loaded=loaded,
        adapted=dict(sorted(adapted.items())),
        fresh=fresh,
        ignored=dict(sorted(ignored.items())),
    )
    return taken, report


def _once(model: ViT) -> StateDict:
    """The model's weights, a shared one under its first name only, so that none overwrites another."""
    stored = model.state_dict()
    return {name: t for name, t in (*model.named_parameters(), *model.named_buffers()) if name in stored}


def _renamed(tensors: StateDict, config: ViTConfig) -> StateDict:
    """The maps to queries, keys and values under the names that the model has for them."""
    if config.attention != "standard" and not any(".attn.heads." in name for name in tensors):
        return tensors
    from effvit.attention.standard import fused_to_standard, standard_to_fused

    merged = standard_to_fused(tensors)
    return fused_to_standard(merged, config.num_attention_heads) if config.attention == "standard" else merged


def _to_grid(name: str, tensor: Tensor, grid: Grid, config: ViTConfig) -> Tensor | None:
    """Carry what belongs to a grid of patches over to the model's; None for anything else."""
    if name == "pos_embed":
        return resize_positions(tensor, grid, config.grid_size, config.prefix_tokens)
    if config.attention == "linformer" and name.endswith((".attn.E", ".attn.F")):
        return resize_projection(tensor.float(), grid, config.grid_size, config.prefix_tokens)
    return None


def _require_same_model(weights: Weights, source: StateDict, config: ViTConfig) -> Grid:
    """Refuse weights of another model than ``config`` describes; return their grid of patches."""
    if foreign := {_FOREIGN[part] for name in source for part in name.split(".") if part in _FOREIGN}:
        raise UserError(f"has {', '.join(sorted(foreign))}, of which this ViT has none; expected a plain ViT")
    try:
        hidden_size, num_channels, patch_size, _ = source["patch_embed.proj.weight"].shape
        _, positions, _ = source["pos_embed"].shape
        intermediate_size, _ = source["blocks.0.mlp.fc1.weight"].shape
        theirs = {
            "hidden_size": hidden_size,
            "num_hidden_layers": len({name.split(".")[1] for name in source if name.startswith("blocks.")}),
            "intermediate_size": intermediate_size,
            "patch_size": patch_size,
            "num_channels": num_channels,
        }
    except (KeyError, ValueError) as error:
        found = next((found for part, found in _OTHER_NAMES.items() if any(part in name for name in source)), error)
        raise UserError(f"not the weights of a ViT in timm's names ({found})") from error
    if weights.config is not None:
        theirs["num_attention_heads"] = weights.config.num_attention_heads
    ours = config.model_dump()
    if wrong := [f"{key}={value}, here {ours[key]}" for key, value in theirs.items() if value != ours[key]]:
        raise UserError(f"of a model with {'; '.join(wrong)}; both must be the same")
    side = isqrt(max(0, positions - 1))
    if side < 1 or side**2 != positions - 1:
        raise UserError(f"pos_embed has {positions} positions; expected a class token and n x n patches")
    return side, side


def _together(names: Iterable[str]) -> str:
    """Names with all blocks as one: ``blocks.*.attn.E``."""
    return ", ".join(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names))
