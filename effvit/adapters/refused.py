"""Why there is no attention in a model whose place a mechanism can take."""

import inspect

from torch import nn

from effvit.adapters.host import comes_from
from effvit.errors import UserError

_LIBRARIES = ("timm", "transformers")
_ROTARY = "has rotary position embeddings inside"
_RELATIVE = "has a relative position bias inside"
_MASKS = "is called with masks"
_MODELS = {
    "NaFlexVit": _MASKS,
    "Siglip2VisionModel": _MASKS,
    "Siglip2VisionTransformer": _MASKS,
    "BeitModel": _RELATIVE,
    "Data2VecVisionModel": _RELATIVE,
}
_PARAMETERS = {  # of its forward
    "rope": _ROTARY,
    "position_embeddings": _ROTARY,
    "shared_rel_pos": _RELATIVE,
    "shared_rel_pos_bias": _RELATIVE,
    "relative_position_bias": _RELATIVE,
}
_ATTRIBUTES = {
    "relative_position_bias_table": _RELATIVE,
    "relative_position_bias": _RELATIVE,
    "continuous_position_bias_mlp": _RELATIVE,
    "cpb_mlp": _RELATIVE,
    "rel_pos": _RELATIVE,
    "rel_pos_h": _RELATIVE,
    "attention_biases": _RELATIVE,
}
_MOST_TOLD = 4


def nothing_known(model: nn.Module) -> UserError:
    """Return the one line that says which modules were looked at."""
    seen: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if "attention" in type(module).__name__.lower() and not isinstance(module, nn.ModuleList):
            seen.setdefault(_told(model, module), []).append(name or "itself")
    looked = [
        f"{first}{f' and {len(others)} more' if others else ''} ({what})" for what, (first, *others) in seen.items()
    ]
    modules = f"its {sum(1 for _ in model.modules())} modules, none of which is called attention"
    return UserError(
        f"no Vision Transformer that swap_attention knows in this {type(model).__name__} (timm's, torchvision's and "
        "effvit's, and transformers' ViT, DeiT, DINOv2, CLIP and SigLIP are known); looked at "
        + ("; ".join(looked[:_MOST_TOLD]) or modules)
    )


def _told(model: nn.Module, attention: nn.Module) -> str:
    """An attention's class, and what stands in the way where that is known."""
    name, taken = type(attention).__name__, inspect.signature(type(attention).forward).parameters
    reasons = [
        *(
            why
            for cls, why in _MODELS.items()
            if any(comes_from(module, _LIBRARIES, cls) for module in model.modules())
        ),
        *(why for parameter, why in _PARAMETERS.items() if parameter in taken),
        *(why for attribute, why in _ATTRIBUTES.items() if getattr(attention, attribute, None) is not None),
    ]
    return f"{name}, which {reasons[0]}" if reasons else name
