"""``effvit mechanisms``."""

_CAPABILITIES = {
    "exact": "exact",
    "has_map": "has a map",
    "needs_grid": "needs the grid",
    "fixed_length": "fixed length",
}


def mechanisms() -> None:
    """List the attention mechanisms: name, options with their defaults, capabilities, complexity, paper."""
    from rich import box
    from rich import print as show
    from rich.table import Column, Table

    from effvit.attention import attention_class, available_attention

    # Widths of the longest words, so that 80 columns hold them whole.
    widths = {"name and source": 18, "options and defaults": 21, "capabilities": 14, "complexity": 18}
    columns = [Column(name, width=width) for name, width in widths.items()]
    table = Table(*columns, box=box.SIMPLE_HEAD, show_lines=True, pad_edge=False, collapse_padding=True)
    for name in available_attention():
        mechanism = attention_class(name)
        defaults = mechanism.Options().model_dump().items()
        settings = "\n".join(f"{key}={value}" for key, value in defaults).replace("[", r"\[")
        abilities = "\n".join(words for flag, words in _CAPABILITIES.items() if getattr(mechanism, flag))
        table.add_row(f"[bold]{name}[/bold]\n{mechanism.paper}", settings, abilities, mechanism.complexity)
    show(table)
