"""``effvit choose``: which mechanism to take on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from effvit.cli import options

if TYPE_CHECKING:
    from effvit.measure.choose import Build

_IMAGE_SIZES = (224, 384, 512)


def choose(
    model: Annotated[
        options.Size | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=options.MODEL,
            help="tiny, small, deit_tiny, deit_small or vit_base.",
            show_default="deit_tiny",
        ),
    ] = None,
    timm: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=options.MODEL,
            help="Instead of --model: timm's own model of that name, with its attention swapped.",
        ),
    ] = None,
    image_sizes: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N,...",
            parser=options.whole_numbers,
            callback=options.joined,
            rich_help_panel=options.MEASUREMENT,
            help="Image sizes in pixels.",
            show_default=",".join(map(str, _IMAGE_SIZES)),
        ),
    ] = None,
    attention: options.ComparedAttentions = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="NAME.KEY=VALUE",
            rich_help_panel=options.ATTENTION,
            help="Option of a mechanism, e.g. -o linformer.k=128; repeatable.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(rich_help_panel=options.MEASUREMENT, help="Images per batch.")] = 1,
    precision: Annotated[
        Literal["float32", "tf32", "bfloat16"],
        typer.Option(rich_help_panel=options.DEVICE, help="bfloat16 runs under autocast; tf32 needs CUDA."),
    ] = "float32",
    budget_s: Annotated[
        float, typer.Option(rich_help_panel=options.MEASUREMENT, help="Seconds of measuring, all image sizes together.")
    ] = 100.0,
    threads: options.Threads = None,
    device: options.Device = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=options.FILES,
            help="CSV file to write, or a directory for a file named after this machine; rows are added to it.",
        ),
    ] = None,
) -> None:
    """Say which mechanism is fastest on this machine at each image size.

    It times whole models and attention blocks of all mechanisms in turns. Every time is also given as a ratio to
    `fused` from the same rounds, with its 95 % interval. The defaults take two minutes on two cores.
    """
    import pandas as pd
    import torch
    from rich.progress import Progress

    from effvit import policy
    from effvit.attention import attention_class, available_attention, check_options
    from effvit.cli.options import parse_options
    from effvit.device import measuring_device, this_machine
    from effvit.errors import UserError
    from effvit.measure.alone import measuring_alone
    from effvit.measure.choices import add_rows, open_output
    from effvit.measure.choose import builder, measure_choice, verdict
    from effvit.measure.compare import require_positive
    from effvit.measure.display import print_choice
    from effvit.model.presets import preset

    if timm is not None and model is not None:
        raise UserError(f"--model {model} --timm {timm}: expected one of them")
    if timm == "":
        raise UserError("--timm '': expected the name of a model in timm, e.g. deit_tiny_patch16_224")
    subject = timm or model or "deit_tiny"
    require_positive(batch_size=batch_size, budget_s=budget_s, threads=threads)
    sizes = sorted(set(image_sizes or _IMAGE_SIZES))
    where = measuring_device(device)
    names = attention or list(available_attention())
    for name in names:
        attention_class(name)
    settings: dict[str, dict[str, Any]] = {}
    for key, value in parse_options(option).items():
        name, dot, field = key.partition(".")
        if not dot or name not in names:
            raise UserError(f"--option {key}={value}: expected NAME.KEY=VALUE with NAME one of {', '.join(names)}")
        settings.setdefault(name, {})[field] = value
    for name, given in settings.items():
        check_options(name, given)
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    machine = this_machine(where)
    file, earlier = open_output(output, machine, precision) if output else (None, None)
    build = _timm_builder(timm, settings) if timm else builder(preset(subject), settings)
    rows = []
    with measuring_alone(where), policy.kept(), Progress(transient=True) as bar:
        policy.apply(where, deterministic=False, tf32=precision != "float32")
        task = bar.add_task(f"measuring {subject}", total=1.0)

        def progress(share: float, what: str) -> None:
            bar.update(task, completed=share, description=what)

        points = measure_choice(
            build,
            names,
            sizes,
            batch_size=batch_size,
            precision=precision,
            budget_s=budget_s,
            device=where,
            progress=progress,
        )
        for of_size in points:
            rows += of_size
    place: dict[str, Any] = {
        "machine": machine.name,
        "device": machine.device,
        "threads": machine.threads,
        "precision": precision,
    }
    table = (
        pd.DataFrame(rows)
        .astype(dict.fromkeys(("n", "memory_bytes", "macs"), "Int64"))
        .assign(model=subject, **place, torch=machine.torch)
    )
    print_choice(f"{subject} on {machine.name}, {machine.threads} threads, {precision}, batch {batch_size}", rows)
    for size in sizes:
        typer.echo(verdict([row for row in rows if row["image_size"] == size]))
    if file is not None:
        add_rows(file, earlier, table)
        typer.echo(f"written: {file}")


def _timm_builder(name: str, settings: dict[str, dict[str, Any]]) -> "Build":
    """Build timm's model of that name with each mechanism in its blocks."""
    import torch

    from effvit.adapters.swap import swap_attention
    from effvit.attention import Attention
    from effvit.errors import UserError
    from effvit.measure.choose import Candidate
    from effvit.measure.macs import count_macs
    from effvit.memory import is_out_of_memory

    try:
        from timm import create_model
    except ModuleNotFoundError as error:
        raise UserError(f"--timm {name}: needs the package timm: pip install 'effvit[peers]'") from error

    def build(attention: str, image_size: int) -> Candidate:
        try:
            model = create_model(name, pretrained=False, img_size=image_size)
        except Exception as error:  # of whatever kind: there are many in so many models
            if is_out_of_memory(error):
                raise
            raise UserError(f"--timm {name}: timm cannot build it for {image_size} pixels: {error}") from error
        swap_attention(model, attention, **settings.get(attention, {}))
        block = next(module for module in model.modules() if isinstance(module, Attention))
        image_shape = (3, image_size, image_size)
        macs = {"model": None, "block": block.macs()}
        if not next(model.parameters()).is_meta:  # as where only sizes are looked at
            macs["model"] = count_macs(model, torch.empty(1, *image_shape))
        return Candidate(model, block, image_shape, (block.num_tokens, block.dim), macs)

    return build
