"""The Vision Transformer, with attention left open.

Dosovitskiy et al. 2021 (arXiv 2010.11929). B batch, S prefix tokens (a class token, then registers), P patches,
N = S + P tokens, C width. Parameters are named as in timm's ``VisionTransformer``, so that with ``fused`` attention
state dicts map one to one.
"""

from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.fx import Proxy

from effvit.attention import Attention, build_attention, check_options, check_value_conv
from effvit.errors import UserError, explain
from effvit.kernels.layers import apply_linear
from effvit.model.trained_on import TrainedOn

# Far beyond any ViT: typing errors are reported at once, and a product of sizes fits 64 bits.
Size = Annotated[int, Field(ge=1, le=2**16)]
Depth = Annotated[int, Field(ge=1, le=1024)]


class ViTConfig(BaseModel):
    """Shape of a ViT, in Hugging Face's names; raises pydantic's ``ValidationError`` (a ``ValueError``) if invalid.

    ``image_size`` in pixels is one number or a pair of height and width. Of ``prefix_tokens`` the first is the class
    token, further ones are registers; with none the patches are averaged. ``value_conv`` is the side of a depthwise
    convolution of the patches' values in every block (see `effvit.attention.build_attention`), 0 for none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    image_size: Size | Annotated[tuple[Size, Size], Field(strict=False)] = 32
    patch_size: Size = 4
    num_channels: Size = 3
    num_classes: Size = 10
    hidden_size: Size = 48
    num_hidden_layers: Depth = 4
    num_attention_heads: Size = 4
    intermediate_size: Size = 192
    prefix_tokens: Annotated[int, Field(ge=0, le=1024)] = 1
    qkv_bias: bool = True
    hidden_dropout_prob: float = Field(0.0, ge=0, lt=1)
    attention_probs_dropout_prob: float = Field(0.0, ge=0, lt=1)
    initializer_range: float = Field(0.02, gt=0)
    layer_norm_eps: float = Field(1e-6, gt=0)
    value_conv: int = 0
    attention: str = "fused"
    attention_options: dict[str, Any] = Field({})

    @model_validator(mode="after")
    def _fits(self) -> "ViTConfig":
        if any(side % self.patch_size for side in self.image_shape):
            raise ValueError(f"patch_size={self.patch_size}: must divide image_size={self.image_size}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads}: must divide hidden_size={self.hidden_size}"
            )
        check_value_conv(self.value_conv)
        check_options(self.attention, self.attention_options, self.grid_size, self.prefix_tokens)
        return self

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of images in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Prefix tokens and patches."""
        return self.prefix_tokens + self.grid_size[0] * self.grid_size[1]

    def to_dict(self) -> dict[str, Any]:
        """All fields and values, as libraries of Hugging Face ask a model's ``config`` for them."""
        return self.model_dump()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ViTConfig":
        """Read a dictionary of this class's fields, or the flat form in which mechanisms have prefixed options.

        The flat form has ``attention_type`` with ``linformer_k``, ``performer_features`` and ``nystrom_landmarks``;
        ``use_faster_attention`` turns ``standard`` into ``fused``. Options of mechanisms not chosen are ignored.

        Raises:
            UserError: an unknown key, or a value that does not fit.
        """
        values = dict(values)
        flat = {
            key: values.pop(key) for key in (*_FLAT_OPTIONS, "attention_type", "use_faster_attention") if key in values
        }
        if flat:
            if clash := {"attention", "attention_options"} & values.keys():
                raise UserError(f"{clash.pop()}: not together with {next(iter(flat))}, which says the same")
            attention = flat.get("attention_type", "standard")
            if attention == "standard" and flat.get("use_faster_attention", False):
                attention = "fused"
            values["attention"] = attention
            values["attention_options"] = {
                option: flat[key] for key, (of, option) in _FLAT_OPTIONS.items() if of == attention and key in flat
            }
        try:
            return cls(**values)
        except ValidationError as error:
            raise UserError(explain(error)) from error


_FLAT_OPTIONS = {
    "linformer_k": ("linformer", "k"),
    "performer_features": ("performer", "num_features"),
    "nystrom_landmarks": ("nystromformer", "num_landmarks"),
}


class PatchEmbedding(nn.Module):
    """Cut images into patches and map each to a token."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=size, stride=size)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, channels, height, width)`` to patches ``(B, P, C)``, row-major."""
        return self.proj(images).flatten(2).transpose(1, 2)


class MLP(nn.Module):
    """Two linear maps with a GELU between."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.drop = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(B, N, C)`` to tokens ``(B, N, C)``, each by itself."""
        return self.drop(apply_linear(self.fc2, self.act(apply_linear(self.fc1, x))))


class Block(nn.Module):
    """Pre-norm transformer block: attention mixes tokens, the MLP works on each."""

    def __init__(self, config: ViTConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = build_attention(
            config.attention,
            config.hidden_size,
            config.num_attention_heads,
            config.grid_size,
            prefix_tokens=config.prefix_tokens,
            layer=layer,
            depth=config.num_hidden_layers,
            qkv_bias=config.qkv_bias,
            attn_drop=config.attention_probs_dropout_prob,
            proj_drop=config.hidden_dropout_prob,
            value_conv=config.value_conv,
            **config.attention_options,
        )
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, return_map: bool = False) -> tuple[Tensor, Tensor | None]:
        """Tokens ``(B, N, C)`` to tokens ``(B, N, C)`` and, if asked for, the attention matrix ``(B, H, N, N)``."""
        mixed, attention_map = self.attn(self.norm1(x), True) if return_map else (self.attn(self.norm1(x)), None)
        x = x + mixed
        return x + self.mlp(self.norm2(x)), attention_map


class ViT(nn.Module):
    """Images to class logits. ``trained_on`` has the names of classes and how images are normalised, where known."""

    trained_on = TrainedOn()

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        c = config.hidden_size
        self.patch_embed = PatchEmbedding(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, c)) if config.prefix_tokens else None
        self.reg_token = nn.Parameter(torch.empty(1, config.prefix_tokens - 1, c)) if config.prefix_tokens > 1 else None
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_tokens, c))
        self.pos_drop = nn.Dropout(config.hidden_dropout_prob)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(c, eps=config.layer_norm_eps)
        self.head = nn.Linear(c, config.num_classes)
        self._initialise()

    def forward(self, images: Tensor, output_attentions: bool = False) -> Any:
        """Classify images.

        Args:
            images: normalised images ``(B, num_channels, height, width)``.
            output_attentions: also return the attention matrix that each block's mechanism implies.

        Returns:
            Logits ``(B, num_classes)``; with ``output_attentions`` a pair of those and a list of ``(B, H, N, N)``.
        """
        if isinstance(images, Proxy):  # torch.fx, which knows no shape and would make an input of the flag as well
            output_attentions = False
        else:
            self._check_shape(images)
        prefix = [
            token.expand(images.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None
        ]
        x = torch.cat([*prefix, self.patch_embed(images)], dim=1)  # (B, N, C)
        x = self.pos_drop(x + self.pos_embed)
        maps = []
        for block in self.blocks:
            x, attention_map = block(x, output_attentions)
            maps.append(attention_map)
        pooled = self.norm(x[:, 0]) if self.cls_token is not None else self.norm(x).mean(dim=1)
        logits = apply_linear(self.head, pooled)
        return (logits, maps) if output_attentions else logits

    def attentions(self) -> list[Attention]:
        """Return the attention module of each block, in order."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    def macs(self) -> int:
        """Multiply-adds of one image, in closed form: patches, attention, MLPs, head."""
        config = self.config
        c, tokens = config.hidden_size, config.num_tokens
        patches = (tokens - config.prefix_tokens) * c * config.num_channels * config.patch_size**2
        mlps = config.num_hidden_layers * 2 * tokens * c * config.intermediate_size
        return patches + self.attention_macs() + mlps + c * config.num_classes

    def attention_macs(self) -> int:
        """Multiply-adds of all blocks' attention for one image, in closed form."""
        return sum(attention.macs() for attention in self.attentions())

    def _check_shape(self, images: Tensor) -> None:
        wanted = (self.config.num_channels, *self.config.image_shape)
        if images.shape[1:] != wanted:
            channels, height, width = wanted
            raise UserError(f"images of shape {tuple(images.shape)}: expected (batch, {channels}, {height}, {width})")

    def _initialise(self) -> None:
        std = self.config.initializer_range
        for embedding in (self.cls_token, self.pos_embed, self.reg_token):
            if embedding is not None:
                nn.init.trunc_normal_(embedding, std=std)
        for module in self.modules():
            if isinstance(module, nn.Linear) or module is self.patch_embed.proj:
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for attention in self.attentions():
            attention.reset_mechanism()
            attention.share_with(self.attentions()[0])
