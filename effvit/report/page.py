"""The report as one page that needs no network, and as Markdown."""

import json
import re
from base64 import b64encode
from dataclasses import dataclass
from functools import cache
from os.path import relpath
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from effvit.errors import UserError
from effvit.figures.style import look
from effvit.report import charts, overview
from effvit.report import wording as w
from effvit.report.answers import answers
from effvit.report.choice import which_one
from effvit.report.tables import Study

_CAPTIONS = {
    "curves": "Loss and validation accuracy while training",
    "tradeoff": "Test accuracy against computation, latency and training memory",
    "attention-maps": "Attention rollout from the class token, the same images for all mechanisms",
    "cka": "Similarity of all layers of all mechanisms: linear CKA",
    "fidelity": "Error to exact attention against cost, and accuracy where attention is replaced without training",
    "hardware": "Latency with one thread and one image at a time, and accuracy lost to eight-bit weights",
    "scaling": "Time and peak memory of one attention block against sequence length, one sample at a time",
    "scaling_model": "Time and peak memory of a model against sequence length, one image at a time",
}
_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


@dataclass(frozen=True)
class Picture:
    """A whole figure of the study for the page; `path` is its file."""

    path: Path
    caption: str

    @property
    def uri(self) -> str:
        """The picture itself as a data URI."""
        return f"data:{_TYPES[self.path.suffix]};base64,{b64encode(self.path.read_bytes()).decode()}"


def pictures(figures_dir: Path, vector_dir: Path | None, datasets: list[str]) -> dict[str, list[Picture]]:
    """Figures by data set, the others under the empty name; drawn lines in place of pixels where there are some.

    Raises:
        UserError: a directory is missing or has no figure, or a file is not the picture that its name says.
    """
    for option, directory, suffix in (("figures", figures_dir, "png"), ("vector", vector_dir, "svg")):
        if directory and not any(directory.glob(f"*.{suffix}")):
            problem = f"no {suffix.upper()} files in it" if directory.is_dir() else "no such directory"
            raise UserError(f"--{option}-dir {directory}: {problem}; `dvc repro plot` makes them")
    found: dict[str, list[Picture]] = {name: [] for name in ["", *datasets]}
    for path in sorted(figures_dir.glob("*.png")):
        # of "a" and "a-b" the longer name is meant by "a-b-curves"
        dataset = max((d for d in datasets if path.stem.startswith(f"{d}-")), key=len, default="")
        kind = path.stem.removeprefix(f"{dataset}-") if dataset else path.stem
        vector = vector_dir / f"{path.stem}.svg" if vector_dir else None
        caption = _CAPTIONS.get(kind, kind.replace("-", " ").capitalize())
        picture = Picture(vector if vector and vector.exists() else path, caption)
        _verify(picture.path)
        found[dataset].append(picture)
    return {name: sorted(group, key=_order) for name, group in found.items()}


def _verify(path: Path) -> None:
    try:
        if path.suffix == ".svg":
            if not ElementTree.parse(path).getroot().tag.endswith("svg"):
                raise ValueError("another XML file")
        else:
            with Image.open(path, formats=["PNG"]) as image:
                image.load()
    except (ValueError, SyntaxError, OSError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system, which says what it is
            raise
        kind = path.suffix[1:].upper()
        raise UserError(f"{path}: not a whole {kind} file; `dvc repro -f plot` makes it again") from error


def _order(picture: Picture) -> tuple[int, str]:
    captions = list(_CAPTIONS.values())
    return (captions.index(picture.caption) if picture.caption in captions else len(captions)), picture.path.stem


def html(study: Study, figures: dict[str, list[Picture]]) -> str:
    """The page: text, tables, figures, charts and the script library for them."""
    content = _content(study, figures)
    specs = {chart.id: list(chart.specs.values()) for chart in _all_charts(content)}
    safe = json.dumps(specs, ensure_ascii=False, allow_nan=False, sort_keys=True).replace("<", "\\u003c")
    return (
        _environment(autoescape=True)
        .get_template("report.html.jinja")
        .render(**content, specs=Markup(safe), library=Markup(_library()), assets=_assets())
    )


def markdown(study: Study, figures: dict[str, list[Picture]], directory: Path) -> str:
    """The same without charts; figures are links relative to `directory`."""
    return (
        _environment(autoescape=False)
        .get_template("report.md.jinja")
        .render(**_content(study, figures), link=lambda picture: Path(relpath(picture.path, directory)).as_posix())
    )


def _content(study: Study, figures: dict[str, list[Picture]]) -> dict[str, Any]:
    sections = []
    for dataset in study.datasets:
        makers = (overview.fine_tuning, overview.fidelity)
        sections.append(
            {
                "name": dataset,
                "facts": _facts(study, dataset),
                "chart": charts.tradeoff(study, dataset),
                "tables": [table for make in makers if (table := make(study, dataset)) is not None],
                "figures": figures[dataset],
            }
        )
    return {
        "which_one": which_one(study),
        "answers": answers(study),
        "mechanisms": [
            (a, label, colour, charts.SHAPES[marker]) for a in study.attentions for label, colour, marker in [look(a)]
        ],
        "scaling": charts.scaling(study),
        "efficiency": overview.efficiency(study),
        "origin": overview.origin(study),
        "figures": figures[""],
        "sections": sections,
    }


def _facts(study: Study, dataset: str) -> str:
    rows = study.of("accuracy", dataset)
    epochs = int(study.of("curves", dataset)["epoch"].max())
    classes = study.of("confusion", dataset)["actual"].nunique()
    seeds, mechanisms = int(rows["n_seeds"].max()), len(rows)
    return (
        f"{w.count(mechanisms, 'mechanism')}, {w.count(seeds, 'seed')} of each, {w.count(epochs, 'epoch')}; "
        f"{w.count(study.test_images(dataset), 'test image')} of {classes:,} classes."
    )


def _all_charts(content: dict[str, Any]) -> list[charts.Chart]:
    return [content["scaling"], *(section["chart"] for section in content["sections"])]


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script; takes some seconds to put together."""
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=charts.VEGA_LITE)
    return bundle.replace("</script", "<\\/script")


def _assets() -> dict[str, Markup]:
    directory = Path(__file__).parent / "templates"
    return {suffix: Markup((directory / f"report.{suffix}").read_text(encoding="utf-8")) for suffix in ("css", "js")}


def _slug(title: str) -> str:
    """A heading as an address: words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _environment(autoescape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("effvit.report"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["slug"] = _slug
    return environment
