"""``effvit fidelity``: how close mechanisms come to exact attention, and at what cost."""

from typing import TYPE_CHECKING

import typer

from effvit.cli import options

if TYPE_CHECKING:
    from effvit.model.vit import ViT

_RANDOM = 16  # samples of random q, k, v
_COMPARED, _SCORED = 64, 1000  # validation images at most: for q, k, v of layers, and for accuracy
_REPLACED = ["attention", "option", "value", "top1", "top1_fused", "n_images"]


def fidelity(
    model_dirs: options.ModelDirs,
    dataset_dir: options.DatasetDir,
    output_dir: options.OutputDir,
    device: options.Device = "auto",
) -> None:
    """Measure each mechanism's error relative to exact attention for the same q, k, v, at several sizes.

    Random q, k, v have the shape of the models. If one of the models has `fused` attention, q, k, v of its layers on
    validation images are used too, and its attention is replaced by each mechanism without retraining. Writes
    fidelity.csv, replaced.csv and provenance.json, always the same for the same models.
    """
    import pandas as pd
    from rich.progress import track

    from effvit.analysis.fidelity import compare, random_qkv, replaced_accuracy, trained_qkv, variants
    from effvit.data.loading.prepared import PreparedDataset
    from effvit.device import pick_device, this_machine
    from effvit.evaluation.probe import accuracy, load_models, normalised, validation_images
    from effvit.files import check_apart, staged_dir, write_csv
    from effvit.provenance import write_provenance

    check_apart(output_dir, dataset_dir, *model_dirs)
    where = pick_device(device)
    dataset = PreparedDataset.load(dataset_dir)
    models, places, dataset = load_models(model_dirs, dataset, where)
    fused = models.get("fused")
    config = next(iter(models.values())).config
    grid, heads = config.grid_size, config.num_attention_heads
    images, labels = validation_images(dataset, _SCORED)
    qkv = {"random": [random_qkv(_RANDOM, heads, config.num_tokens, config.hidden_size // heads)]}
    if fused:
        qkv["trained"] = trained_qkv(fused, normalised(fused, validation_images(dataset, _COMPARED)[0], dataset))
        top1_fused = accuracy(fused, images, labels, dataset)

    def score(model: "ViT") -> float:
        return accuracy(model.to(where), images, labels, dataset)

    errors, replaced = [], []
    tried = [v for a, m in models.items() for v in variants(a, m.config.attention_options, grid)]
    with staged_dir(output_dir, ("fidelity.csv", "replaced.csv", "provenance.json")) as directory:
        for variant in track(tried, "comparing with exact attention", transient=True):
            for source, layers in qkv.items():
                rows = compare(variant, layers, grid)
                errors += [{"attention": variant.attention, "source": source} | row for row in rows]
            if fused:
                key = {"attention": variant.attention, "option": variant.option, "value": variant.value}
                top1 = replaced_accuracy(variant, places["fused"], config, score)
                replaced.append(key | {"top1": top1, "top1_fused": top1_fused, "n_images": len(images)})
        table = pd.DataFrame(errors).astype({"value": "Int64", "layer": "Int64"})
        table["layer"] = table["layer"].mask(table["source"] == "random")
        write_csv(directory / "fidelity.csv", table)
        write_csv(directory / "replaced.csv", pd.DataFrame(replaced, columns=_REPLACED).astype({"value": "Int64"}))
        settings = {"dataset": dataset.name, "models": {a: str(p) for a, p in places.items()}}
        write_provenance(directory, settings, this_machine(where))
    typer.echo(f"{len(tried)} variants of {len(models)} mechanisms vs exact attention on {', '.join(qkv)} q, k, v")
    if not fused:
        typer.echo("no model with fused attention given: trained q, k, v and replaced attention were not measured")
