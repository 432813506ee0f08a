"""The recipe of a training: its settings and the rules that make them valid."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from effvit.data.loading.augmentation import Augmentation
from effvit.errors import UserError

Count = Annotated[int, Field(ge=1, lt=2**31)]
CountOrNone = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
_SHORTENED_WARMUP = 0.1  # of the epochs


def _on_or_off(value: Any) -> Any:
    """YAML reads off and on as false and true."""
    return {False: "off", True: "on"}.get(value, value) if isinstance(value, bool) else value


Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
Compile = Annotated[Literal["off", "on", "graphs"], BeforeValidator(_on_or_off)]


class Strict(BaseModel):
    """Settings of which every key is known and every value of its own type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TrainConfig(Strict):
    """The recipe, the same for every mechanism; `docs/training.md` explains each field. 0 and false are off."""

    epochs: Count
    batch_size: Count  # of all devices together
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup_epochs: float = Field(0.0, ge=0)
    label_smoothing: Fraction = 0.0
    clip_norm: float = Field(0.0, ge=0)
    crop_padding: CountOrNone = 0
    min_crop_area: float = Field(1.0, gt=0, le=1)  # of images that are stored larger than they are used
    randaugment: int = Field(0, ge=0, le=30)  # magnitude
    random_erasing: float = Field(0.0, ge=0, le=1)  # probability
    mixup: float = Field(0.0, ge=0)  # alpha
    cutmix: float = Field(0.0, ge=0)  # alpha
    ema_decay: Fraction = 0.0
    save_every: CountOrNone = 0  # also keeps the weights of every n-th epoch
    precision: Precision = "auto"
    compile: Compile = "off"
    deterministic: bool = True  # same machine, same bytes
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = Field(1, ge=1, le=1024)
    micro_batch_size: CountOrNone = 0  # images at once on a device
    threads: int = Field(0, ge=0, le=1024)  # on a CPU; results depend on it in their last digits
    workers: int = Field(0, ge=0, le=1024)
    checkpoint_s: float = Field(60.0, ge=0)
    logger: Literal["csv", "tensorboard", "dvclive"] = Field("csv", exclude=True)  # moves no result: not recorded

    def with_warmup_that_fits(self) -> "TrainConfig":
        """Return the recipe with a warm-up of a tenth of the epochs, if it would take all of them or more."""
        if self.warmup_epochs < self.epochs:
            return self
        return self.model_copy(update={"warmup_epochs": self.epochs * _SHORTENED_WARMUP})

    def check_image_size(self, image_size: int) -> None:
        """Raise ``UserError`` where the recipe does not suit images of so many pixels a side."""
        if self.crop_padding >= image_size:
            raise UserError(f"train.crop_padding={self.crop_padding}: must be less than image_size={image_size}")

    def augmentation(self, horizontal_flip: bool) -> Augmentation:
        """What the recipe does to images, of which it depends on the data set whether they may be mirrored."""
        return Augmentation(
            crop_padding=self.crop_padding,
            min_crop_area=self.min_crop_area,
            horizontal_flip=horizontal_flip,
            randaugment=self.randaugment,
            random_erasing=self.random_erasing,
            mixup=self.mixup,
            cutmix=self.cutmix,
        )
