"""A trained model as a state dict under another library's names, for that library's own ViT."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save

from effvit.errors import UserError
from effvit.files import staged_file
from effvit.model.names import standard_to_fused, to_transformers
from effvit.model.vit import ViT, ViTConfig

_SAME_ATTENTION = ("standard", "fused")
_TIMMS_EPSILON = 1e-6  # unless another norm is asked for


def export_state_dict(model: ViT, path: Path, library: str) -> str:
    """Write the weights of a model with exact attention as safetensors under the names of ``library``.

    For transformers these are the names in its files, which versions 4 and 5 read. The file's metadata has class names
    and normalisation where the model knows them.

    Returns:
        The call that builds the library's model for them.

    Raises:
        UserError: the library has no such attention or no such tokens, or ``path`` is no place for it.
    """
    config = model.config
    if config.attention not in _SAME_ATTENTION:
        raise UserError(
            f"{library} has no {config.attention} attention; expected a model with {' or '.join(_SAME_ATTENTION)}"
        )
    if config.value_conv:
        raise UserError(f"value_conv={config.value_conv}: {library}'s attention has no such convolution")
    if library == "transformers" and config.prefix_tokens != 1:
        raise UserError(f"prefix_tokens={config.prefix_tokens}: a ViT of transformers has exactly one, the class token")
    state = standard_to_fused(model.state_dict())
    tensors = to_transformers(state) if library == "transformers" else state
    about = {key: json.dumps(value) for key, value in model.trained_on.known().items()}
    with staged_file(path) as aside:
        aside.write_bytes(save({n: t.contiguous() for n, t in tensors.items()}, {"format": "pt", **about}))
    return _call(config, library)


def _call(config: ViTConfig, library: str) -> str:
    shared: dict[str, Any] = {"patch_size": config.patch_size, "qkv_bias": config.qkv_bias}
    if library == "transformers":
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps")
        arguments = {"image_size": config.image_size, "num_channels": config.num_channels} | shared
        arguments |= {name: getattr(config, name) for name in names} | {"num_labels": config.num_classes}
        return f"ViTForImageClassification(ViTConfig({_listed(arguments)}))"
    arguments = {"img_size": config.image_size, "in_chans": config.num_channels} | shared
    arguments |= {"num_classes": config.num_classes, "embed_dim": config.hidden_size}
    arguments |= {"depth": config.num_hidden_layers, "num_heads": config.num_attention_heads}
    arguments |= {"mlp_ratio": config.intermediate_size / config.hidden_size}
    if not config.prefix_tokens:
        arguments |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    elif config.prefix_tokens > 1:
        arguments |= {"reg_tokens": config.prefix_tokens - 1}
    epsilon = config.layer_norm_eps
    norm = "" if epsilon == _TIMMS_EPSILON else f", norm_layer=partial(LayerNorm, eps={epsilon})"
    return f"VisionTransformer({_listed(arguments)}{norm})"


def _listed(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())
