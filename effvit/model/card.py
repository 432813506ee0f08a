"""The model card of a model directory: ``README.md`` as the Hugging Face hub reads it."""

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from effvit.model.trained_on import TrainedOn
from effvit.model.vit import ViT

_MARK = "---\nlibrary_name: effvit\n"


class Notes(BaseModel):
    """What a card says beyond the configuration, where it is known.

    ``accuracy`` is top-1 as a fraction, by split; ``recipe`` are settings of the training.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    dataset: str | None = None
    accuracy: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field({})
    recipe: dict[str, Any] = Field({})
    license: str = "mit"


def write_card(model: ViT, trained_on: TrainedOn, notes: Notes) -> str:
    """Write the card of a ViT: front matter, its shape, data, accuracy, recipe, and how to load it."""
    config = model.config
    height, width = config.image_shape
    options = ", ".join(f"{key}={value}" for key, value in config.attention_options.items())
    shape: dict[str, str] = {
        "attention": f"`{config.attention}`" + (f" ({options})" if options else ""),
        "size": f"{config.num_hidden_layers} blocks of width {config.hidden_size}, {config.num_attention_heads} heads, "
        f"patches of {config.patch_size} pixels, {sum(p.numel() for p in model.parameters()):,} parameters",
        "images": f"{height} x {width} pixels, {config.num_channels} channels{_normalised(trained_on)}",
        "classes": f"{config.num_classes}" + (", named in `config.json`" if trained_on.classes else ""),
    }
    code = (
        "from effvit import load_model\n\n"
        'model = load_model("path/of/this/directory")  # in eval mode\n'
        f"logits = model(images)  # (B, {config.num_channels}, {height}, {width}) to (B, {config.num_classes})"
    )
    return _assembled(f"Vision Transformer with `{config.attention}` attention", [config.attention], shape, code, notes)


def write_card_of_other(
    model: nn.Module, attention: Mapping[str, str], build: str, trained_on: TrainedOn, notes: Notes
) -> str:
    """Write the card of another library's model.

    Args:
        model: the model.
        attention: of each mechanism that was put into it, where that is.
        build: code that builds such a model, or a word on how to.
        trained_on: names of classes and how images are normalised, where known.
        notes: what else is known.
    """
    shape = {"model": f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters"}
    if attention:
        shape["attention"] = "; ".join(f"`{name}` in {where}" for name, where in attention.items())
    if normalised := _normalised(trained_on):
        shape["images"] = normalised.removeprefix("; ")
    if trained_on.classes:
        shape["classes"] = f"{len(trained_on.classes)}, named in `config.json`"
    code = (
        "from effvit import load_model\n\n"
        f"model = ...  # {build}\n"
        'load_model("path/of/this/directory", into=model)  # swaps its attention, loads the weights; in eval mode'
    )
    title = type(model).__name__ + (
        f" with {' and '.join(f'`{name}`' for name in attention)} attention" * bool(attention)
    )
    return _assembled(title, list(attention), shape, code, notes)


def _assembled(title: str, attention: Iterable[str], shape: dict[str, str], code: str, notes: Notes) -> str:
    if notes.dataset:
        shape["data"] = notes.dataset
    shape |= {f"top-1, {split}": f"{share:.2%}" for split, share in notes.accuracy.items()}
    parts = [_front_matter(list(attention), notes), f"# {title}", _table(("", ""), shape), f"```python\n{code}\n```"]
    if notes.recipe:
        parts += ["## Recipe", _table(("setting", "value"), notes.recipe)]
    return "\n\n".join(parts) + "\n"


def is_card(text: str) -> bool:
    """Whether a file is a card of `write_card`."""
    return text.startswith(_MARK)


def _normalised(trained_on: TrainedOn) -> str:
    if trained_on.mean is None or trained_on.std is None:
        return ""
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (trained_on.mean, trained_on.std))
    return f"; values from 0 to 1, minus the mean ({mean}), divided by the deviation ({std})"


def _front_matter(attention: list[str], notes: Notes) -> str:
    """YAML, its values as JSON, which is YAML as well."""
    values: dict[str, Any] = {
        "license": notes.license,
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "vision-transformer", "efficient-attention", *attention],
        "metrics": ["accuracy"],
    }
    if notes.dataset and notes.accuracy:
        task = {"type": "image-classification", "name": "Image classification"}
        results = [
            {
                "task": task,
                "dataset": {"type": notes.dataset, "name": notes.dataset, "split": split},
                "metrics": [{"type": "accuracy", "name": "Top-1 accuracy", "value": share}],
            }
            for split, share in notes.accuracy.items()
        ]
        values["model-index"] = [{"name": "-".join(["vit", *attention]), "results": results}]
    lines = (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())
    return _MARK + "\n".join(lines) + "\n---"


def _table(heading: tuple[str, str], rows: Mapping[str, Any]) -> str:
    def line(cells: Iterable[object]) -> str:
        return f"| {' | '.join(_cell(cell) for cell in cells)} |"

    return "\n".join([line(heading), "|---|---|", *(line(row) for row in rows.items())])


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
