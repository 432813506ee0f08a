"""What ``config.json`` of transformers or timm, or of a swapped model of theirs, tells beyond the weights."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from effvit.errors import UserError, explain
from effvit.model.settings import is_of_other, read_json
from effvit.model.trained_on import TrainedOn

_PREPROCESSOR = "preprocessor_config.json"


class Told(BaseModel):
    """What is known of a model in addition to its weights; None where it is not recorded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_attention_heads: int | None = None
    layer_norm_eps: float | None = None
    image_shape: tuple[int, int] | None = None
    trained_on: TrainedOn = TrainedOn()


class _Transformers(BaseModel):
    model_type: Literal["vit", "deit"]
    num_attention_heads: int = 12
    layer_norm_eps: float = 1e-12
    hidden_act: Literal["gelu"] = "gelu"
    image_size: int | tuple[int, int] = 224
    id2label: dict[int, str] = {}


class _Pretrained(BaseModel):
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_size: tuple[int, int, int] | None = None  # channels, height, width


class _Arguments(BaseModel):
    num_heads: int | None = None


class _Timm(BaseModel):
    architecture: str
    global_pool: Literal["token", "avg"] | None = None
    label_names: tuple[str, ...] | dict[int, str] | None = None
    model_args: _Arguments = _Arguments()
    pretrained_cfg: _Pretrained = _Pretrained()


class _Tower(BaseModel):
    num_heads: int | None = None


class _Swapped(BaseModel):
    """What ``save_model`` wrote of another library's model."""

    towers: tuple[_Tower, ...]
    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class _Preprocessor(BaseModel):
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None


def read_told(config: Path, values: dict[str, Any], has_class_token: bool) -> Told:
    """Read what a library's ``config.json``, which holds ``values``, tells; nothing where it is of neither library.

    Raises:
        UserError: it tells of a model that this ViT cannot be.
    """
    try:
        if is_of_other(values):
            return _of_swapped(_Swapped(**values))
        if "model_type" in values:
            return _of_transformers(config, _Transformers(**values))
        if "architecture" in values:
            return _of_timm(_Timm(**values), has_class_token)
    except ValidationError as error:
        raise UserError(f"{config.name}: {explain(error)}") from error
    return Told()


def _of_transformers(config: Path, values: _Transformers) -> Told:
    preprocessor = config.with_name(_PREPROCESSOR)
    images = _Preprocessor(**read_json(preprocessor)) if preprocessor.is_file() else _Preprocessor()
    names = tuple(values.id2label[index] for index in sorted(values.id2label))
    placeholders = tuple(f"LABEL_{index}" for index in range(len(names)))
    size = values.image_size
    return Told(
        num_attention_heads=values.num_attention_heads,
        layer_norm_eps=values.layer_norm_eps,
        image_shape=(size, size) if isinstance(size, int) else size,
        trained_on=TrainedOn(
            classes=names if names != placeholders else None, mean=images.image_mean, std=images.image_std
        ),
    )


def _of_swapped(values: _Swapped) -> Told:
    heads = {tower.num_heads for tower in values.towers}
    about = TrainedOn(**{key: getattr(values, key) for key in TrainedOn.model_fields})
    return Told(num_attention_heads=heads.pop() if len(heads) == 1 else None, trained_on=about)


def _of_timm(values: _Timm, has_class_token: bool) -> Told:
    if values.global_pool is not None and (values.global_pool == "token") != has_class_token:
        raise UserError(f"pools by {values.global_pool}; expected the class token, or the mean where there is none")
    about, names = values.pretrained_cfg, values.label_names
    if isinstance(names, dict):
        names = tuple(names[index] for index in sorted(names))
    return Told(
        num_attention_heads=values.model_args.num_heads,
        image_shape=about.input_size and about.input_size[1:],
        trained_on=TrainedOn(classes=names, mean=about.mean, std=about.std),
    )
