"""How a settings model looks on the command line and in the environment, and what `-h` teaches about it.

Flags are read as text and nothing is refused here, so that validation can report every problem at once.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from kvatlas_common.engines.spelling import camel, kebab

ENV_PREFIX = "KVATLAS_"
CONFIG_VARIABLE = "KVATLAS_CONFIG"
NO_VALUE = object()  # of a flag that was given without one


@dataclass(frozen=True, slots=True)
class Spelled:
    """Annotates a field that is written in its own way: a flag of another name, a list more than commas split."""

    flag: str | None = None
    split: Callable[[str], list[str]] | None = None


class _Help(argparse.HelpFormatter):
    """Shows a value as needed, which only the error report, not argparse, insists on."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.const is NO_VALUE:
            return str(action.metavar)
        return super()._format_args(action, default_metavar)


def build_parser(model: type[BaseModel], prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"Later wins: defaults, file, {ENV_PREFIX}* variables, flags. A list is a repeated flag, commas in a "
        "variable, a list in the file; the file takes names as shown or in snake_case.",
        usage="%(prog)s [settings]",
        formatter_class=_Help,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", metavar="FILE", nargs="?", const=NO_VALUE, help=f"YAML file ({CONFIG_VARIABLE})")
    for title, names in _groups(model):
        hidden = [f"{_help(name, model.model_fields[name])}" for name in names if is_secret(model.model_fields[name])]
        group = parser.add_argument_group(title, "; ".join(f"without a flag: {text}" for text in hidden) or None)
        for name in names:
            if not is_secret(model.model_fields[name]):
                _add_flag(group, name, model.model_fields[name])
    return parser


def _groups(model: type[BaseModel]) -> list[tuple[str, list[str]]]:
    """Fields by the class that says them, under the first line of its docstring."""
    groups: list[tuple[str, list[str]]] = []
    seen: set[str] = set()
    for owner in reversed(model.__mro__):
        names = [n for n in inspect.get_annotations(owner) if n in model.model_fields and n not in seen]
        seen.update(names)
        if names:
            groups.append(((owner.__doc__ or owner.__name__).strip().splitlines()[0].rstrip("."), names))
    return groups


def _add_flag(group: argparse._ArgumentGroup, name: str, info: FieldInfo) -> None:
    text = _help(name, info).replace("%", "%%")
    flag = flag_of(name, info)
    if info.annotation is bool:
        group.add_argument(flag, dest=name, nargs="?", const="true", metavar="true|false", help=text)
        group.add_argument(
            f"--no-{kebab(name)}", dest=name, action="store_const", const="false", help=argparse.SUPPRESS
        )
        return
    action = "append" if is_list(info) else "store"
    group.add_argument(flag, dest=name, action=action, nargs="?", const=NO_VALUE, metavar=_metavar(info), help=text)


def _help(name: str, info: FieldInfo) -> str:
    default = info.get_default(call_default_factory=True)
    shown = (
        ""
        if default is None or default == ()
        else f"default: {str(default).lower() if default in (True, False) else default}; "
    )
    return f"{info.description or 'undocumented'} ({shown}{variable_of(name)}, {camel(name)})"


def _metavar(info: FieldInfo) -> str:
    options = [str(o) for o in _alternatives(info.annotation) if isinstance(o, str)]
    if options:
        return "{" + ",".join(options) + "}"
    return "N" if {int, float} & set(_alternatives(info.annotation)) else "TEXT"


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types of a union and the values of a `Literal`, flattened."""
    inner = get_args(annotation)
    return tuple(a for arg in inner for a in _alternatives(arg)) if inner else (annotation,)


def is_list(info: FieldInfo) -> bool:
    return get_origin(info.annotation) in (tuple, list, frozenset, set)


def is_secret(info: FieldInfo) -> bool:
    """A secret has no flag: every user of the machine can read a command line."""
    return SecretStr in _alternatives(info.annotation)


def _spelled(info: FieldInfo) -> Spelled:
    return next((m for m in info.metadata if isinstance(m, Spelled)), Spelled())


def flag_of(name: str, info: FieldInfo) -> str:
    return _spelled(info).flag or f"--{kebab(name)}"


def variable_of(name: str) -> str:
    return ENV_PREFIX + name.upper()


def split_text(info: FieldInfo, text: str) -> list[str]:
    split = _spelled(info).split
    return split(text) if split else [piece.strip() for piece in text.split(",") if piece.strip()]
