"""What is measured as tokens grow: one attention block, or a whole model."""

from dataclasses import dataclass
from math import isqrt
from typing import Any, Protocol

import torch
from pydantic import ValidationError

from effvit.attention import BASELINE, Attention, build_attention, check_options
from effvit.errors import UserError, explain
from effvit.measure.execution import EAGER, Execution
from effvit.measure.latency import Call
from effvit.measure.workload import adamw, block_forward, block_training, inference, training_step
from effvit.model.vit import ViT, ViTConfig

FORWARD, TRAIN = MODES = "forward", "train"


class Subject(Protocol):
    """Something whose number of tokens is free."""

    @property
    def scope(self) -> str:
        """What it is: ``block`` or ``model``."""

    @property
    def attention(self) -> str:
        """Name of its mechanism."""

    @property
    def width(self) -> int:
        """Its number of channels C."""

    def baseline(self) -> "Subject":
        """Return the same with ``fused`` attention."""

    def check(self, tokens: int) -> None:
        """Raise ``UserError`` where it cannot have so many tokens, naming the count or the option that is wrong."""

    def macs(self, tokens: int) -> int:
        """Multiply-adds of one forward pass for one sample, in closed form."""

    def call(self, mode: str, tokens: int, batch_size: int, device: torch.device, how: Execution = EAGER) -> Call:
        """Build it, with random input, for a pass of the mode ``forward`` or ``train``."""


@dataclass(frozen=True)
class Block:
    """One attention block; its training pass is forward and backward."""

    attention: str
    options: dict[str, Any]
    dim: int
    num_heads: int
    value_conv: int = 0
    scope = "block"

    @property
    def width(self) -> int:
        return self.dim

    def baseline(self) -> "Block":
        return Block(BASELINE, {}, self.dim, self.num_heads, self.value_conv)

    def check(self, tokens: int) -> None:
        _check(self.attention, self.options, tokens)

    def build(self, tokens: int) -> Attention:
        """Build the block for a square grid of ``tokens - 1`` patches."""
        grid_size = square_grid(tokens)
        return build_attention(
            self.attention, self.dim, self.num_heads, grid_size, value_conv=self.value_conv, **self.options
        )

    def macs(self, tokens: int) -> int:
        return self.build(tokens).macs()

    def call(self, mode: str, tokens: int, batch_size: int, device: torch.device, how: Execution = EAGER) -> Call:
        passes = {FORWARD: block_forward, TRAIN: block_training}
        block = self.build(tokens).to(device)
        how.prepare(block, device)
        return passes[mode](block, torch.randn(batch_size, tokens, self.dim, device=device), how)


@dataclass(frozen=True)
class Model:
    """A whole ViT whose images grow while its patches keep their size; its training pass includes the optimiser's."""

    config: ViTConfig
    scope = "model"

    @property
    def attention(self) -> str:
        return self.config.attention

    @property
    def width(self) -> int:
        return self.config.hidden_size

    def baseline(self) -> "Model":
        return Model(self.config.model_copy(update={"attention": BASELINE, "attention_options": {}}))

    def check(self, tokens: int) -> None:
        _check(self.attention, self.config.attention_options, tokens)
        self.at(tokens)

    def at(self, tokens: int) -> ViTConfig:
        """Configuration for images of so many tokens."""
        image_size = self.config.patch_size * square_grid(tokens)[0]
        try:
            return ViTConfig(**self.config.model_dump() | {"image_size": image_size})
        except ValidationError as error:
            raise UserError(f"tokens={tokens}: {explain(error)}") from error

    def macs(self, tokens: int) -> int:
        return ViT(self.at(tokens)).macs()

    def call(self, mode: str, tokens: int, batch_size: int, device: torch.device, how: Execution = EAGER) -> Call:
        model = ViT(self.at(tokens)).to(device)
        how.prepare(model, device)
        if mode == FORWARD:
            return inference(model, batch_size, device, how)
        return training_step(model, adamw(model), batch_size, device, how)


def square_grid(tokens: int) -> tuple[int, int]:
    """Return the grid of a class token and a square of patches.

    Raises:
        UserError: ``tokens`` is not 1 + n².
    """
    side = isqrt(max(0, tokens - 1))
    if side < 1 or side**2 != tokens - 1:
        side = max(1, side)
        raise UserError(
            f"tokens={tokens}: must be 1 + n², a class token and a square grid of patches, "
            f"for example {1 + side**2} or {1 + (side + 1) ** 2}"
        )
    return side, side


def parse_width(text: str) -> tuple[int, int]:
    """``"192x3"`` to width 192 and 3 heads; raises ``UserError`` where it is not of that form."""
    width, _, heads = text.partition("x")
    if not (width.isdecimal() and heads.isdecimal() and int(heads) and int(width) and int(width) % int(heads) == 0):
        raise UserError(f"width={text!r}: expected WIDTHxHEADS with heads that divide the width, for example 192x3")
    return int(width), int(heads)


def fits(subject: Subject, tokens: int) -> bool:
    """Whether it can have so many tokens."""
    try:
        subject.check(tokens)
    except UserError:
        return False
    return True


def _check(attention: str, options: dict[str, Any], tokens: int) -> None:
    check_options(attention, options)
    try:
        check_options(attention, options, square_grid(tokens))
    except UserError as error:
        raise UserError(f"tokens={tokens}: {error}") from error
