"""How a recipe moves weights: learning rate by step, which parameters decay, and what steps with them."""

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with and without weight decay: none on biases, norms, positions and prefix tokens."""
    decayed: list[Tensor] = []
    exempt: list[Tensor] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and name not in ("pos_embed", "cls_token", "reg_token")
        (decayed if matrix else exempt).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, recipe: "TrainConfig") -> Optimizer:
    """Return the recipe's optimiser of all parameters; Muon takes the matrices of the blocks, AdamW what is left.

    Merged query, key and value maps are matrices of each head, as they are where they lie apart: `standard` and `fused`
    stay the same model.
    """
    groups = parameter_groups(model, recipe.weight_decay)
    if recipe.optimizer == "adamw":
        return AdamW(groups, lr=recipe.lr, fused=True)
    attentions: list[Any] = [module for module in model.modules() if hasattr(module, "qkv")]
    merged: dict[Tensor, int] = {attention.qkv.weight: 3 * attention.num_heads for attention in attentions}
    matrices: dict[int, list[Tensor]] = defaultdict(list)  # by the number of maps in each
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and parameter.ndim == 2:
            matrices[merged.get(parameter, 1)].append(parameter)
    taken = {parameter for parameters in matrices.values() for parameter in parameters}
    muon = Muon(
        [{"params": parameters, "maps": maps} for maps, parameters in matrices.items()], recipe.lr, recipe.weight_decay
    )
    rest = [{**group, "params": [p for p in group["params"] if p not in taken]} for group in groups]
    return Joint(muon, AdamW(rest, lr=recipe.lr, fused=True))
