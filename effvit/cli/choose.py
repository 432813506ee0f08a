"""``effvit choose``: which mechanism to take on this machine."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from effvit.cli import options


def choose(
    model: Annotated[str, typer.Option(help="tiny, small, deit_tiny, deit_small or vit_base.")] = "deit_tiny",
    image_sizes: Annotated[str, typer.Option(help="Image sizes in pixels, e.g. 224,384,512.")] = "224,384,512",
    attention: Annotated[
        list[str] | None, typer.Option(help="Mechanism to compare with fused; repeatable. All if not given.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="NAME.KEY=VALUE", help="A mechanism's option, e.g. -o linformer.k=128."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 1,
    precision: Annotated[str, typer.Option(help="float32, or bfloat16 by autocast.")] = "float32",
    budget_s: Annotated[float, typer.Option(help="Seconds of measuring, all image sizes together.")] = 100.0,
    threads: options.Threads = None,
    device: options.Device = "auto",
    output: Annotated[
        Path | None, typer.Option(help="CSV file to write, or a directory for one named after this machine.")
    ] = None,
) -> None:
    """Time whole models and attention blocks of all mechanisms in turns, and say which is fastest at each image size.

    Every time is also a ratio to `fused`, taken in the same rounds, with its 95 % interval. Two minutes for deit_tiny
    at 224, 384 and 512 pixels on two cores.
    """
    import pandas as pd
    import torch
    from rich.progress import track

    from effvit.attention import attention_class, available_attention
    from effvit.cli.options import parse_options
    from effvit.device import measuring_device, this_machine
    from effvit.errors import UserError
    from effvit.files import write_csv
    from effvit.measure.alone import measuring_alone
    from effvit.measure.choose import builder, measure_choice, verdict
    from effvit.measure.compare import require_positive
    from effvit.measure.display import print_choice
    from effvit.model.presets import preset

    require_positive(batch_size=batch_size, budget_s=budget_s, threads=threads)
    sizes = _numbers(image_sizes)
    where = measuring_device(device)
    names = attention or list(available_attention())
    for name in names:
        attention_class(name)
    settings: dict[str, dict[str, object]] = {}
    for key, value in parse_options(option).items():
        name, dot, field = key.partition(".")
        if not dot or name not in names:
            raise UserError(f"--option {key}={value}: expected NAME.KEY=VALUE with NAME one of {', '.join(names)}")
        settings.setdefault(name, {})[field] = value
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    machine = this_machine(where)
    rows = []
    with measuring_alone():
        build = builder(preset(model), settings)
        points = measure_choice(
            build, names, sizes, batch_size=batch_size, precision=precision, budget_s=budget_s, device=where
        )
        for of_size in track(points, f"measuring {model}", len(sizes), transient=True):
            rows += of_size
    place: dict[str, Any] = {
        "machine": machine.name,
        "device": machine.device,
        "threads": machine.threads,
        "precision": precision,
    }
    table = pd.DataFrame(rows).assign(model=model, **place, torch=machine.torch)
    print_choice(f"{model} on {machine.name}, {machine.threads} threads, {precision}, batch {batch_size}", rows)
    for size in sizes:
        typer.echo(verdict([row for row in rows if row["image_size"] == size]))
    if output is not None:
        name = re.sub(r"[^\w.]+", "-", f"{machine.name}-{machine.threads}t-{precision}") + ".csv"
        file = output / name if output.is_dir() or output.suffix != ".csv" else output
        file.parent.mkdir(parents=True, exist_ok=True)
        write_csv(file, table)
        typer.echo(f"written: {file}")


def _numbers(text: str) -> list[int]:
    from effvit.errors import UserError

    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise UserError(f"--image-sizes {text}: expected numbers of pixels, e.g. 224,384,512") from error
