"""``effvit mechanisms``."""


def mechanisms() -> None:
    """List the attention mechanisms: name, options with their defaults, complexity, paper."""
    from rich import print as show
    from rich.table import Table

    from effvit.attention import attention_class, available_attention

    table = Table("name", "options and defaults", "complexity", "source")
    for name in available_attention():
        mechanism = attention_class(name)
        defaults = mechanism.Options().model_dump().items()
        settings = "\n".join(f"{key}={value}" for key, value in defaults).replace("[", r"\[")
        table.add_row(name, settings, mechanism.complexity, mechanism.paper)
    show(table)
