"""What became of the parameters when attention was swapped."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SwappedLayer:
    """One attention module that was put in another's place.

    ``kept`` has the parameters, by their names now, that hold what was trained, with the names they had; ``new`` those
    that start fresh; ``unused`` the former names of what has no place in the mechanism. Names are those in the layer.
    Of ``new``, ``drawn`` are not trained: buffers such as Performer's features.
    """

    name: str
    kept: dict[str, str]
    new: list[str]
    unused: list[str]
    drawn: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SwapReport:
    """What ``swap_attention`` did: ``places`` says where, ``notes`` what to know of the mechanism there."""

    attention: str
    places: list[str]
    layers: list[SwappedLayer]
    notes: list[str]

    @property
    def kept(self) -> list[str]:
        """Parameters of the model that hold what was trained."""
        return [f"{layer.name}.{name}" for layer in self.layers for name in layer.kept]

    @property
    def new(self) -> list[str]:
        """Parameters and buffers of the model that start fresh."""
        return [f"{layer.name}.{name}" for layer in self.layers for name in layer.new]

    @property
    def new_parameters(self) -> list[str]:
        """Those of ``new`` that can be trained."""
        return [f"{layer.name}.{name}" for layer in self.layers for name in layer.new if name not in layer.drawn]

    @property
    def unused(self) -> list[str]:
        """Former parameters of the model that have no place in the mechanism."""
        return [f"{layer.name}.{name}" for layer in self.layers for name in layer.unused]

    def lines(self) -> list[str]:
        """Tell it in a few lines, blocks taken together."""
        lines = [f"{self.attention} in {place}" for place in self.places]
        kept = (_with_origin(name, origin) for layer in self.layers for name, origin in layer.kept.items())
        lines += [f"  kept: {_together(kept)}"]
        new = (f"{name} (not trained)" if name in layer.drawn else name for layer in self.layers for name in layer.new)
        lines += [f"  new: {_together(new)}"]
        lines += [f"  unused: {_together(name for layer in self.layers for name in layer.unused)}"]
        return lines + [f"  note: {note}" for note in self.notes]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def pattern(names: Iterable[str]) -> str:
    """Names with all blocks as one: ``blocks.*.attn``."""
    return ", ".join(dict.fromkeys(re.sub(r"(?<=[._])\d+(?=\.)", "*", name) for name in names))


def _together(names: Iterable[str]) -> str:
    return pattern(names) or "nothing"


def _with_origin(name: str, origin: str) -> str:
    return name if name == origin else f"{name} (from {origin})"
