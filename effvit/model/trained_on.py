"""What a model was trained on, as far as its use depends on it: the names of its classes and how images are scaled."""

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from effvit.errors import UserError, explain

_Deviation = Annotated[float, Field(gt=0)]  # images are divided by it


class TrainedOn(BaseModel):
    """Class names by index, and mean and standard deviation per channel of images from 0 to 1; None where unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[_Deviation, ...] | None = None

    @model_validator(mode="after")
    def _mean_and_deviation_belong_together(self) -> "TrainedOn":
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std: expected both or neither")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} entries, std {len(self.std)}; expected one for each channel")
        return self

    @classmethod
    def of(
        cls, classes: Iterable[str] | None, mean: Iterable[float] | None, std: Iterable[float] | None
    ) -> "TrainedOn":
        """Check what a caller says of a model; raises ``UserError``."""
        given: dict[str, Any] = {"classes": classes, "mean": mean, "std": std}
        for name, values in given.items():
            if values is not None and (isinstance(values, str) or not isinstance(values, Iterable)):
                what = "names" if name == "classes" else "numbers, one for each channel"
                raise UserError(f"{name}={values!r}: expected a list of {what}")
        try:
            return cls(**{key: None if values is None else tuple(values) for key, values in given.items()})
        except ValidationError as error:
            raise UserError(explain(error)) from error

    def check(self, num_classes: int | None, num_channels: int | None) -> None:
        """Raise ``UserError`` where this is not of a model with so many classes and channels, None where unknown."""
        for name, values, wanted in (
            ("classes", self.classes, num_classes),
            ("mean", self.mean, num_channels),
            ("std", self.std, num_channels),
        ):
            if values is not None and wanted is not None and len(values) != wanted:
                raise UserError(f"{name}: has {len(values)} entries, the model has {wanted}")

    def known(self) -> dict[str, Any]:
        """Return what is known, as plain lists."""
        return {key: list(values) for key, values in self if values is not None}
