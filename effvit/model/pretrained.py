"""A model that starts from trained weights: those of timm, transformers or torchvision, or effvit's of any mechanism.

All mechanisms share everything outside attention and, inside it, the maps to queries, keys, values and output; what a
mechanism adds of its own starts fresh unless the weights are of that mechanism.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from effvit.attention.base import Grid
from effvit.errors import UserError
from effvit.model.hub import Told, read_told
from effvit.model.names import Named, StateDict, fused_to_standard, read_names, standard_to_fused, together
from effvit.model.resize import resize_positions, resize_projection
from effvit.model.settings import CONFIG
from effvit.model.shape import Shape, positions_of_all_tokens, read_shape, refuse_foreign
from effvit.model.vit import ViT, ViTConfig
from effvit.model.weights import Weights, read_weights

# What a mechanism adds to the maps that all share.
_OWN = re.compile(r"blocks\.\d+\.attn\.(?!(qkv|proj|heads|value)\.).*")
COMPARED = ("hidden_size", "num_hidden_layers", "intermediate_size", "patch_size", "num_channels", "prefix_tokens")


@dataclass(frozen=True)
class StartReport:
    """What became of each weight; ``adapted`` and ``ignored`` say how and why, ``fresh`` are the model's own.

    ``names`` is the library in whose names the weights are (this ViT has timm's), ``taken_off`` what stood before all
    of them, as ``module.``. ``on_trust`` is what the weights do not record about their model, and what its
    logits depend on.
    """

    source: str
    sha256: str
    names: str
    taken_off: str
    on_trust: list[str]
    loaded: list[str]
    adapted: dict[str, str]
    fresh: list[str]
    ignored: dict[str, str]

    def lines(self) -> list[str]:
        """Tell it in a few lines, blocks taken together."""
        lines = [f"start from {self.source} (sha256 {self.sha256[:12]}): {len(self.loaded)} weights unchanged"]
        if self.names != "timm" or self.taken_off:
            lines.append(f"  names: {self.names}'s" + (f", {self.taken_off} taken off" if self.taken_off else ""))
        for what, reasons in (("adapted", self.adapted), ("ignored", self.ignored)):
            for reason in dict.fromkeys(reasons.values()):
                lines.append(f"  {what}: {together(n for n in reasons if reasons[n] == reason)} ({reason})")
        if self.fresh:
            lines.append(f"  fresh: {together(self.fresh)}")
        return lines + ([f"  taken on trust: {', '.join(self.on_trust)}"] if self.on_trust else [])


@dataclass(frozen=True)
class Source:
    """Weights of a ViT under this ViT's names, and all that is known of the model that they are of."""

    weights: Weights
    named: Named
    shape: Shape
    told: Told


def read_source(path: Path, image_shape: tuple[int, int] | None = None) -> Source:
    """Read a ViT's weights from a file or directory; ``image_shape`` is one that its images may have.

    Raises:
        UserError: the file is not one of weights, or they are not of a plain ViT.
    """
    weights = read_weights(path)
    with naming(path):
        refuse_foreign(weights.tensors)
        named = read_names(weights.tensors)
        told = read_told(weights.file.with_name(CONFIG), weights.settings, "cls_token" in named.tensors)
        known = weights.config.image_shape if weights.config else told.image_shape
        shape = read_shape(named.tensors, [each for each in (known, image_shape) if each])
    return Source(weights, named, shape, told)


def start_from(path: Path, model: ViT) -> StartReport:
    """Overwrite a freshly built model's weights with those of a file or a model directory that fit it.

    Position embeddings are carried over to another grid of patches, and so are Linformer's E and F. A head of other
    classes is left out.

    Raises:
        UserError: the file is not one of weights; they are of another width, depth, MLP, patch size, number of
            channels, heads or prefix tokens; or they have parts that this ViT has none of. The model is then as it was.
    """
    return start_with(read_source(path, model.config.image_shape), model)


def start_with(source: Source, model: ViT) -> StartReport:
    """Like ``start_from``, with weights that are read already."""
    with naming(source.weights.path):
        taken, report = _fit(source, model)
    with torch.no_grad():
        for name, target in stored_once(model).items():
            if name in taken:
                target.copy_(taken[name])
    return report


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what tensors of no sense lead to into a ``UserError`` that names their file."""
    try:
        yield
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error


def stored_once(model: nn.Module) -> StateDict:
    """The model's weights, a shared one under its first name only, so that none overwrites another."""
    stored = model.state_dict()
    return {name: t for name, t in (*model.named_parameters(), *model.named_buffers()) if name in stored}


def maps_as_in(config: ViTConfig, tensors: StateDict) -> StateDict:
    """The maps to queries, keys and values under the names that a model of ``config`` has for them."""
    if config.attention not in ("standard", "uniform") and not any(".attn.heads." in name for name in tensors):
        return tensors
    merged = standard_to_fused(tensors)
    if config.attention == "uniform":
        return {name.replace(".qkv.", ".value."): _values(name, tensor) for name, tensor in merged.items()}
    return fused_to_standard(merged, config.num_attention_heads) if config.attention == "standard" else merged


def _values(name: str, tensor: Tensor) -> Tensor:
    """Of a merged map the part that makes values; anything else as it is."""
    return tensor.chunk(3)[2] if ".attn.qkv." in name else tensor


def _fit(source: Source, model: ViT) -> tuple[StateDict, StartReport]:
    """What each weight of the model becomes, and the report on it."""
    config, weights, shape = model.config, source.weights, source.shape
    _require_same_model(source, config)
    tensors = maps_as_in(config, source.named.tensors)
    stored, targets = model.state_dict(), stored_once(model)
    unknown = [name for name in tensors if name not in stored and not (weights.config and _OWN.fullmatch(name))]
    if unknown:
        raise UserError(f"has {together(unknown)}, which this ViT lacks; expected a plain ViT")
    taken: StateDict = {}
    adapted: dict[str, str] = {}
    ignored = source.named.unused | {n: f"not of {config.attention}" for n in tensors if n not in targets}
    for name in tensors.keys() & targets.keys():
        tensor, changes = tensors[name], []
        if name not in source.named.tensors:
            changes.append("the same maps under other names")
        if name == "pos_embed" and not shape.embeds_prefix and shape.prefix_tokens:
            tensor = positions_of_all_tokens(tensor, shape)
            changes.append("zeros for the prefix tokens, of which theirs has none")
        if shape.grid != config.grid_size and (moved := _to_grid(name, tensor, shape.grid, config)) is not None:
            tensor = moved
            changes.append("{}x{} to {}x{} patches".format(*shape.grid, *config.grid_size))
        if tensor.shape == targets[name].shape:
            taken[name] = tensor
            adapted |= {name: "; ".join(changes)} if changes else {}
        else:
            ignored[name] = f"of shape {tuple(tensor.shape)}, here {tuple(targets[name].shape)}"
    fresh = [name for name in targets if name not in taken]
    for name in fresh:
        if not (_OWN.fullmatch(name) or name.startswith("head.")):
            raise UserError(f"{name}: {ignored.get(name, 'missing')}; expected all weights of a plain ViT of this size")
    report = StartReport(
        source=str(weights.path),
        sha256=weights.sha256,
        names=source.named.library,
        taken_off=source.named.taken_off,
        on_trust=[] if weights.config else _on_trust(source, config),
        loaded=[name for name in targets if name in taken and name not in adapted],
        adapted=dict(sorted(adapted.items())),
        fresh=fresh,
        ignored=dict(sorted(ignored.items())),
    )
    return taken, report


def _to_grid(name: str, tensor: Tensor, grid: Grid, config: ViTConfig) -> Tensor | None:
    """Carry what belongs to a grid of patches over to the model's; None for anything else."""
    if name == "pos_embed":
        return resize_positions(tensor, grid, config.grid_size, config.prefix_tokens)
    if config.attention == "linformer" and name.endswith((".attn.E", ".attn.F")):
        return resize_projection(tensor.float(), grid, config.grid_size, config.prefix_tokens)
    return None


def _require_same_model(source: Source, config: ViTConfig) -> None:
    """Refuse weights of another model than ``config`` describes."""
    if config.attention != "uniform" and any(".attn.value." in name for name in source.named.tensors):
        raise UserError(f"of uniform attention, which has no queries and keys for {config.attention}")
    theirs = {name: getattr(source.shape, name) for name in COMPARED}
    own = source.weights.config
    heads = own.num_attention_heads if own else source.told.num_attention_heads
    if heads is not None:
        theirs["num_attention_heads"] = heads
    if wrong := [f"{k}={v}, here {getattr(config, k)}" for k, v in theirs.items() if v != getattr(config, k)]:
        raise UserError(f"of a model with {'; '.join(wrong)}; both must be the same")


def _on_trust(source: Source, config: ViTConfig) -> list[str]:
    """What the logits depend on and nobody tells; a library's own configuration tells most of it."""
    told, shape = source.told, source.shape
    trusted = []
    if told.num_attention_heads is None:
        pooling = "the class token" if shape.prefix_tokens else "the mean of patches"
        trusted += ["the number of heads", f"pooling by {pooling}", "GELU"]
    if shape.grid[0] != shape.grid[1] and told.image_shape is None:
        trusted.append("a grid of {}x{} patches".format(*shape.grid))
    epsilon = f"norms with epsilon {_short(config.layer_norm_eps)}"
    if told.layer_norm_eps is None:
        trusted.append(epsilon)
    elif told.layer_norm_eps != config.layer_norm_eps:
        trusted.append(f"{epsilon} in place of {_short(told.layer_norm_eps)}")
    return trusted


def _short(epsilon: float) -> str:
    return f"{epsilon:.0e}".replace("e-0", "e-")
