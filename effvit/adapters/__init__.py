"""Attention into other people's models. None of their libraries is imported: their modules are known by name."""
