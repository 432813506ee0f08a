"""The study's configuration: what ``params.yaml`` may say, and every rule that makes it valid."""

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from effvit import policy
from effvit.data.sources import available_datasets
from effvit.errors import UserError, did_you_mean, explain
from effvit.model.presets import of_timm
from effvit.model.vit import Depth, Size, ViTConfig
from effvit.training.recipe import Count, Fraction, Strict, TrainConfig

Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy takes


def _distinct(values: list[int]) -> list[int]:
    if len(set(values)) != len(values):
        raise ValueError("must name each only once")
    return values


class DatasetConfig(Strict):
    """One data set: image and patch size in pixels, classes, where the user's own files are, what suits its images.

    ``classes`` is a file with the classes to take. For ``test_share``, ``label_level``, ``image_column`` and
    ``label_column`` see `effvit.data.preparing.prepare`.
    """

    image_size: Size
    patch_size: Size
    num_classes: Size
    root: str | None = None
    classes: str | None = None
    test_share: float | None = None
    label_level: int = 1
    image_column: str | None = None
    label_column: str | None = None
    horizontal_flip: bool = True


_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_USUAL = {"prefix_tokens": 1, "qkv_bias": True, "layer_norm_eps": 1e-6}


class ModelConfig(Strict):
    """Size of the ViT, in Hugging Face's names, and the weights that it starts from (a path; see `pretrained`).

    With ``name``, the name of a ViT in timm, sizes that are not given are those of that model.
    """

    name: str | None = None
    hidden_size: Size
    num_hidden_layers: Depth
    num_attention_heads: Size
    intermediate_size: Size
    initializer_range: float = Field(0.02, gt=0)
    hidden_dropout_prob: Fraction = 0.0
    attention_probs_dropout_prob: Fraction = 0.0
    value_conv: int = 0
    init_from: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _sizes_of_timm(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not values.get("name"):
            return values
        theirs = of_timm(str(values["name"]))
        if unusual := {key: theirs[key] for key, usual in _USUAL.items() if theirs[key] != usual}:
            raise ValueError(f"model.name={values['name']}: this study's ViT has {_USUAL}, not {unusual}")
        given = {key: value for key, value in values.items() if value is not None}
        return {key: theirs[key] for key in _SIZES} | given

    def vit_fields(self) -> dict[str, Any]:
        """Fields of `ViTConfig`."""
        return self.model_dump(exclude={"name", "init_from"})


class BenchmarkConfig(Strict):
    """How one mechanism's cost is measured: batch, memory for the largest batch, seconds spent on each quantity.

    The first precision and execution are those of tables and figures.
    """

    batch_size: Count
    memory_mib: Count
    budget_s: float = Field(gt=0)
    precision: list[policy.Precision] = Field(["float32"], min_length=1)
    execution: list[policy.Execution] = Field(["eager"], min_length=1)


class ScalingConfig(Strict):
    """How cost against tokens is measured: token counts, batches, patches, memory and seconds at which it stops.

    ``width`` has the block's widths and heads as ``192x3``, by default the model's. The first width, precision and
    execution are those of tables and figures.
    """

    tokens: list[Count] = Field(min_length=1)
    tokens_per_batch: Count
    patch_size: Size
    memory_mib: Count
    budget_s: float = Field(gt=0)
    width: list[Annotated[str, Field(pattern=r"^[1-9]\d*x[1-9]\d*$")]] = Field([])
    precision: list[policy.Precision] = Field(["float32"], min_length=1)
    execution: list[policy.Execution] = Field(["eager"], min_length=1)


class Study(Strict):
    """The whole of ``params.yaml``."""

    attention: dict[str, dict[str, Any]] = Field(min_length=1)
    dataset: dict[str, DatasetConfig] = Field(min_length=1)
    model: ModelConfig
    train: TrainConfig
    seeds: Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)]
    benchmark: BenchmarkConfig
    scaling: ScalingConfig

    @model_validator(mode="after")
    def _every_cell_is_possible(self) -> "Study":
        for dataset in self.dataset:
            if dataset not in available_datasets():
                known = available_datasets()
                hint = did_you_mean(dataset, known)
                raise ValueError(f"dataset={dataset!r}: unknown, expected one of {', '.join(known)}{hint}")
            self.train.check_image_size(self.dataset[dataset].image_size)
            patch_size = self.dataset[dataset].patch_size
            if self.model.name and of_timm(self.model.name)["patch_size"] != patch_size:
                theirs = of_timm(self.model.name)["patch_size"]
                raise ValueError(
                    f"dataset.{dataset}.patch_size={patch_size}: {self.model.name} has patches of {theirs}"
                )
            for attention in self.attention:
                self.vit(dataset, attention)
        return self

    @classmethod
    def load(cls, path: Path | str = "params.yaml") -> "Study":
        """Read and validate ``params.yaml``.

        Raises:
            UserError: one line that names the key as one writes it after ``-S``.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not valid YAML: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}: expected a mapping of attention, dataset, model, train, ...")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(explain(error, model=cls)) from error

    def vit(self, dataset: str, attention: str) -> ViTConfig:
        """Return the model of one cell.

        Raises:
            UserError: the model does not fit the data set's images or the mechanism.
        """
        data = self.dataset[dataset]
        try:
            return ViTConfig(
                image_size=data.image_size,
                patch_size=data.patch_size,
                num_classes=data.num_classes,
                attention=attention,
                attention_options=self.attention[attention],
                **self.model.vit_fields(),
            )
        except ValidationError as error:
            message = explain(error)
            for group, values in ((f"dataset.{dataset}", data), ("model", self.model)):
                if message.partition("=")[0] in type(values).model_fields:
                    message = f"{group}.{message}"
            raise UserError(message) from error
