"""How a recipe moves weights: learning rate by step, which parameters decay, and what steps with them."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from effvit.attention import Attention
from effvit.errors import UserError
from effvit.training.muon import Joint, Muon

if TYPE_CHECKING:
    from effvit.training.recipe import TrainConfig


def schedule(step: int, steps_per_epoch: int, recipe: "TrainConfig") -> float:
    """Factor of the learning rate at a step (from 0): linear warm-up, then half a cosine down to zero."""
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    total = recipe.epochs * steps_per_epoch
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def clip_gradients(fabric: Fabric, optimizer: Optimizer, max_norm: float) -> None:
    """Scale the gradient of all parameters down to ``max_norm`` at most.

    One that is not finite is no error: float16's scaler skips such a step, and otherwise the next loss shows it. Not by
    Fabric's own, which has no clipping for optimisers that can undo float16's scale themselves, as a fused AdamW.
    """
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    if scaler is not None:
        scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)


# Learned vectors of positions and prefix tokens, under the names of this package, timm, transformers and torchvision.
_EMBEDDING = re.compile(
    r"(?:^|[._])(?:(?:abs_?)?pos|position|cls|class|reg|register|dist|distillation|mask)_?(?:embed\w*|emb|tokens?)(?:\.weight)?$"
    r"|rel(?:ative)?_pos"
)
_SPLIT_MAPS = ("query", "key", "value"), ("q_proj", "k_proj", "v_proj")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with and without weight decay: none on biases, norms, positions and prefix tokens.

    Nor on parameters that a model exempts by ``no_weight_decay``, as timm's do.
    """
    own_choice: set[str] = getattr(model, "no_weight_decay", set)()
    decayed: list[Tensor] = []
    exempt: list[Tensor] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and not _EMBEDDING.search(name) and name not in own_choice
        (decayed if matrix else exempt).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, recipe: "TrainConfig") -> Optimizer:
    """Return the recipe's optimiser of all parameters; Muon takes the matrices of the blocks, AdamW what is left.

    Merged query, key and value maps count as one matrix per head, as separate maps do: `standard` and `fused`
    stay the same model.

    Raises:
        UserError: Muon, for a model in which no blocks with attention are known.
    """
    groups = parameter_groups(model, recipe.weight_decay)
    if recipe.optimizer == "adamw":
        return AdamW(groups, lr=recipe.lr, fused=True)
    attentions = attention_maps(model)
    merged = {weight: count for maps in attentions.values() for weight, count in maps.items()}
    of_blocks = {parameter for block in blocks_of(model, attentions) for parameter in block.parameters()}
    exempt = set(groups[1]["params"])
    matrices: dict[int, list[Tensor]] = defaultdict(list)  # by the number of maps in each
    for parameter in model.parameters():
        if parameter in of_blocks and parameter.ndim == 2 and parameter not in exempt:
            matrices[merged.get(parameter, 1)].append(parameter)
    if not matrices:
        raise UserError(
            f"optimizer=muon: no blocks with attention are known in {type(model).__name__}, whose matrices it could "
            "take; use adamw"
        )
    taken = {parameter for parameters in matrices.values() for parameter in parameters}
    muon = Muon(
        [{"params": parameters, "maps": maps} for maps, parameters in matrices.items()], recipe.lr, recipe.weight_decay
    )
    rest = [{**group, "params": [p for p in group["params"] if p not in taken]} for group in groups]
    return Joint(muon, AdamW(rest, lr=recipe.lr, fused=True))


def attention_maps(model: nn.Module) -> dict[nn.Module, dict[Tensor, int]]:
    """By attention module: its weights that hold several maps, and how many."""
    return {module: maps for module in model.modules() if (maps := _maps(module)) is not None}


def _maps(module: Any) -> dict[Tensor, int] | None:
    """Weights of an attention module that hold several maps, and how many; None where it is no attention module.

    Known are those of this package, timm, transformers and PyTorch.
    """
    heads = getattr(module, "num_heads", None) or getattr(module, "num_attention_heads", None)
    if not isinstance(heads, int):
        return None
    if isinstance(module, nn.MultiheadAttention):
        return {} if module.in_proj_weight is None else {module.in_proj_weight: 3 * heads}
    if isinstance(getattr(module, "qkv", None), nn.Module):
        return _weights([module.qkv], 3 * heads)
    for names in _SPLIT_MAPS:
        if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
            return _weights([getattr(module, name) for name in names], heads)
    return {} if isinstance(module, Attention) else None


def _weights(layers: list[Any], maps: int) -> dict[Tensor, int]:
    return {layer.weight: maps for layer in layers if isinstance(getattr(layer, "weight", None), nn.Parameter)}


def blocks_of(model: nn.Module, attentions: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The nearest element of a sequence of modules around each attention."""
    names = {module: name for name, module in model.named_modules()}
    for attention in attentions:
        parts = names[attention].split(".")
        for length in range(len(parts), 0, -1):
            parent = model.get_submodule(".".join(parts[: length - 1]))
            if isinstance(parent, nn.ModuleList | nn.Sequential):
                yield parent.get_submodule(parts[length - 1])
                break
