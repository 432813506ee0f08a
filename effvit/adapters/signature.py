"""A mechanism under the signature of the module whose place it takes.

Such a module is the mechanism itself, of a class that extends it by another ``forward``: its parameters keep their
names, ``qkv.weight`` and ``proj.weight``, at the place where the other module was.
"""

from typing import Any, ClassVar, TypeVar

from effvit.attention import Attention

A = TypeVar("A", bound="Adapted")


class Adapted(Attention):
    """What all signatures share: classes made for a mechanism, which can be copied and pickled.

    Their ``forward`` takes the host's arguments in place of a mechanism's, so for mypy it is an override that does not
    fit: that is what these classes are for.
    """

    parts: ClassVar[tuple[type, ...]] = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, type(self).parts, self.__dict__


def adapted_class(signature: type[Adapted], mechanism: type[Attention], *host: type) -> type[Adapted]:
    """Class of a mechanism under a signature; ``host`` is the class that others must find it to be an instance of."""
    parts = (signature, mechanism, *host)
    if parts not in _made:
        _made[parts] = type(mechanism.__name__ + signature.__name__, parts, {"parts": parts, "__module__": __name__})
    return _made[parts]


_made: dict[tuple[type, ...], type[Adapted]] = {}


def adapt(attention: Attention, signature: type[A], *host: type) -> A:
    """Give a mechanism another signature, in place."""
    attention.__class__ = adapted_class(signature, type(attention), *host)
    assert isinstance(attention, signature)
    return attention


def mechanism_of(attention: Attention) -> type[Attention]:
    """The mechanism's own class, whatever its signature."""
    return type(attention).parts[1] if isinstance(attention, Adapted) else type(attention)


def _blank(signature: type[Adapted], mechanism: type[Attention], *host: type) -> Adapted:
    cls = adapted_class(signature, mechanism, *host)
    return cls.__new__(cls)
