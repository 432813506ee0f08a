"""How every command looks: help in groups, at any width, and errors that name flags as typed."""

import re
from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup

from effvit.cli.options import TITLES
from effvit.errors import UserError

_LAST = "Other options"
_TEXT_AS_DEFAULT = re.compile(r"(\[default: )\((.*?)\)(?=[];])")  # which Typer puts in brackets
_OPTION = re.compile(r"\battention\.(\w+)\.(\w+)(=?)")
_MISSING = re.compile(r"\A\w+(?=: missing\b)")
_KEY = re.compile(r"(?<![\w.'/-])((?:train|model)\.)?(\w+)(=?)")


class Command(TyperCommand):
    """One command."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options by group."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                title = "Arguments" if parameter.param_type_name == "argument" else _LAST
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or title, []).append(record)
        _write(formatter, groups)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what is wrong with an argument is said of its flag."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise UserError(as_typed(str(error), self.params)) from error


class Group(TyperGroup):
    """All commands."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands by group, each with the first sentence of its help, then the options."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            groups.setdefault(command.rich_help_panel or _LAST, []).append((name, _first_sentence(command.help)))
        records = (parameter.get_help_record(ctx) for parameter in self.get_params(ctx))
        _write(formatter, groups | {"Options": [record for record in records if record]})


def as_typed(message: str, parameters: Iterable[Any]) -> str:
    """Return a message with ``--flag value`` in place of ``key=value`` and of ``train.key``, and flags missing as such.

    Args:
        message: names arguments as Python and params.yaml do. Keys without a prefix are arguments only if it begins
            with one: in "weights.pt: hidden_size=16, here 32" they are the file's.
        parameters: those of the command. Other names stay unchanged.
    """
    flags = {p.name: max(p.opts, key=len) for p in parameters if p.param_type_name == "option"}
    named = any("NAME." in (p.metavar or "") for p in parameters)

    about_argument = (first := _KEY.match(message)) is not None and first[2] in flags and bool(first[3])

    def option(match: re.Match[str]) -> str:
        mechanism, key, equals = match.groups()
        return f"{flags['option']} {f'{mechanism}.' if named else ''}{key}{equals}"

    def key(match: re.Match[str]) -> str:
        prefix, name, equals = match.groups()
        if name not in flags or not (prefix or (equals and about_argument)):
            return match[0]
        return flags[name] + (" " if equals else "")

    if "option" in flags:
        message = _OPTION.sub(option, message)
    message = _MISSING.sub(lambda match: flags.get(match[0], match[0]), message)
    return _KEY.sub(key, message)


def _first_sentence(text: str | None) -> str:
    paragraph = " ".join((text or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.) ", paragraph, maxsplit=1)[0]


def _write(formatter: Any, groups: dict[str, list[tuple[str, str]]]) -> None:
    known = ("Arguments", *TITLES)
    for title in sorted(groups, key=lambda each: known.index(each) if each in known else len(known) + (each == _LAST)):
        with formatter.section(title):
            formatter.write_dl([(name, _TEXT_AS_DEFAULT.sub(r"\1\2", text)) for name, text in groups[title]])
