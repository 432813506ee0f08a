"""``effvit deploy``: a trained model as the files that PyTorch, onnxruntime and int8 run."""

from pathlib import Path
from typing import Annotated

import typer

from effvit.cli import options


def deploy(
    model_dir: options.ModelDir,
    dataset_dir: options.DatasetDir,
    output_dir: options.OutputDir,
    log_dir: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=options.FILES, help="Directory for deployment.json.", show_default="<output-dir>-log"
        ),
    ] = None,
) -> None:
    """Write a trained model for PyTorch, onnxruntime and onnxruntime with int8 weights; compare size and accuracy.

    Writes model.safetensors, config.json, onnx.onnx and int8.onnx to the output directory, and deployment.json and
    provenance.json to the log directory. Accuracy is that of the validation split. If a runtime does not support the
    model, its status says so.
    """
    from effvit.data.loading.prepared import PreparedDataset
    from effvit.deploy.accuracy import sizes_and_accuracy
    from effvit.deploy.display import print_deployment
    from effvit.deploy.files import PATTERNS, write_files
    from effvit.device import this_machine
    from effvit.evaluation.predict import check_fits
    from effvit.files import check_apart, staged_dir, write_json
    from effvit.model.checkpoint import load_model
    from effvit.provenance import write_provenance

    log = log_dir or Path(f"{output_dir}-log")
    check_apart(output_dir, model_dir, dataset_dir, log)
    check_apart(log, model_dir, dataset_dir, output_dir)
    model = load_model(model_dir)
    dataset = PreparedDataset.load(dataset_dir)
    dataset = check_fits(model, dataset)
    with staged_dir(log, ("deployment.json", "*.json")) as record, staged_dir(output_dir, PATTERNS) as staged:
        figures = write_files(model, model_dir, dataset, staged)
        figures |= sizes_and_accuracy(model, staged, dataset)
        write_json(record / "deployment.json", figures)
        settings = {"dataset": dataset.name, "dtype": "float32", "model": model.config.model_dump()}
        write_provenance(record, settings, this_machine(next(model.parameters()).device))
    print_deployment(model.config.attention, figures)
