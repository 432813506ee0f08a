"""``effvit hardware``: what a deployed model costs on one thread, one image at a time."""

from pathlib import Path
from typing import Annotated

import typer

from effvit.cli import options


def hardware(
    deployed_dir: Annotated[
        Path, typer.Option(rich_help_panel=options.FILES, help="Directory written by `effvit deploy`.")
    ],
    output_dir: options.OutputDir,
    budget_s: options.Budget = 1.0,
) -> None:
    """Measure latency and memory under PyTorch, onnxruntime and onnxruntime with int8 weights.

    Writes hardware.json and provenance.json. A runtime that does not support the model has no figures.
    """
    from dataclasses import replace

    from effvit.deploy.display import print_costs
    from effvit.deploy.hardware import measure
    from effvit.device import pick_device, this_machine
    from effvit.files import check_apart, staged_dir, write_json
    from effvit.measure.alone import measuring_alone
    from effvit.measure.compare import require_positive
    from effvit.model.checkpoint import load_model
    from effvit.provenance import write_provenance

    require_positive(budget_s=budget_s)
    check_apart(output_dir, deployed_dir)
    model = load_model(deployed_dir)
    with staged_dir(output_dir, ("hardware.json", "*.json")) as staged:
        with measuring_alone():
            figures = measure(model, deployed_dir, budget_s)
        write_json(staged / "hardware.json", figures)
        settings: dict[str, object] = {"batch_size": 1, "budget_s": budget_s, "dtype": "float32"}
        settings["model"] = model.config.model_dump()
        write_provenance(staged, settings, replace(this_machine(pick_device("cpu")), threads=1))
    print_costs(model.config.attention, figures)
