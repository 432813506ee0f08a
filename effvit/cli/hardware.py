"""``effvit hardware``: what a trained model costs on one thread, one image at a time, and where it runs."""

from typing import Annotated

import typer

from effvit.cli import options


def hardware(
    model_dir: options.ModelDir,
    dataset_dir: options.DatasetDir,
    output_dir: options.OutputDir,
    budget_s: Annotated[float, typer.Option(help="Seconds of sampling latencies.")] = 1.0,
) -> None:
    """Measure latency, memory, size and accuracy under PyTorch, onnxruntime and onnxruntime with int8 weights.

    Writes deployment.json (always the same), hardware.json (measured) and provenance.json. Accuracy is of the
    validation split. What a runtime does not support is said in its status.
    """
    import tempfile
    from pathlib import Path

    from effvit.data.loading.prepared import PreparedDataset
    from effvit.deploy.display import print_figures
    from effvit.deploy.hardware import deploy, measure, sizes_and_accuracy
    from effvit.evaluation.predict import check_fits
    from effvit.files import check_apart, staged_dir, write_json
    from effvit.measure.alone import measuring_alone
    from effvit.measure.compare import require_positive
    from effvit.model.checkpoint import load_model
    from effvit.provenance import write_provenance

    require_positive(budget_s=budget_s)
    check_apart(output_dir, model_dir, dataset_dir)
    model = load_model(model_dir)
    dataset = PreparedDataset.load(dataset_dir)
    check_fits(model, dataset)
    with staged_dir(output_dir, ("deployment.json", "*.json")) as staged, tempfile.TemporaryDirectory() as exported:
        files, figures = deploy(model, dataset, Path(exported))
        figures |= sizes_and_accuracy(model, model_dir, dataset, files)
        write_json(staged / "deployment.json", figures)
        with measuring_alone():
            measured = measure(model, model_dir, files, budget_s)
        write_json(staged / "hardware.json", measured)
        settings: dict[str, object] = {"threads": 1, "batch_size": 1, "budget_s": budget_s, "dataset": dataset.name}
        write_provenance(staged, settings | {"dtype": "float32", "model": model.config.model_dump()})
    print_figures(model.config.attention, figures | measured)
