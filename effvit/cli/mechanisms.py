"""``effvit mechanisms``."""

_CAPABILITIES = {
    "exact": "exact",
    "has_map": "has a map",
    "needs_grid": "needs the grid",
    "fixed_length": "fixed length",
}


def mechanisms() -> None:
    """List the attention mechanisms: name, options with their defaults, capabilities, complexity, paper."""
    from rich import print as show
    from rich.table import Column, Table

    from effvit.attention import attention_class, available_attention

    table = Table("name and source", Column("options and defaults", min_width=26), "capabilities", "complexity")
    for name in available_attention():
        mechanism = attention_class(name)
        defaults = mechanism.Options().model_dump().items()
        settings = "\n".join(f"{key}={value}" for key, value in defaults).replace("[", r"\[")
        abilities = "\n".join(words for flag, words in _CAPABILITIES.items() if getattr(mechanism, flag))
        table.add_row(f"[bold]{name}[/bold]\n{mechanism.paper}", settings, abilities, mechanism.complexity)
    show(table)
