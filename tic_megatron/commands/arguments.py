"""Settings from a YAML file and the command line.

jsonargparse makes the help page and checks the types. The values of the file go through the same door as the flags, each
with the place that it came from, so that every complaint is one line that names that place.
"""

from __future__ import annotations

import argparse
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from tic_megatron.commands import Command
from tic_megatron.config import SettingsError
from tic_megatron.config_checks import nearest, shorten

FLAGS = "the command line"


@dataclass(frozen=True)
class Given:
    """One setting as it was written: `text` is None for YAML's null; `where` is `FILE:LINE` or the command line."""

    key: str
    text: str | None
    where: str


def build_parser(name: str, command: Command, *, documented: bool = False) -> ArgumentParser:
    """The jsonargparse parser of a subcommand: its settings with types and defaults, and docstrings for the help page."""
    set_parsing_settings(docstring_parse_attribute_docstrings=documented)  # reading the sources takes 0.1 s
    setting = "section.setting" if _sections(command.settings) else "setting"
    parser = ArgumentParser(
        prog=f"tic-megatron {name}",
        usage=f"tic-megatron {name} {_short_usage(command)}[--config FILE.yaml] [--{setting} VALUE ...]",
        description=f"{command.summary} Flags win over the config file, which wins over the defaults.{_short_help(command)}",
        exit_on_error=False,
        add_help=False,
    )
    hidden = argparse.SUPPRESS  # as a default, which would say nothing
    parser.add_argument("-h", "--help", action="store_true", default=hidden, help="Show this page.")
    parser.add_argument("--config", metavar="FILE.yaml", default=hidden, help="YAML file of settings, in the sections below.")
    parser.add_argument("--print_config", action="store_true", default=hidden, help="Print the settings as YAML, do nothing.")
    parser.add_class_arguments(command.settings)
    for action in parser._actions:  # jsonargparse's second ways for the same things
        action.option_strings = [option for option in action.option_strings if not option.endswith("+")]
        if action.dest in _sections(command.settings):
            action.help = argparse.SUPPRESS
    return parser


def _short_usage(command: Command) -> str:
    return "".join(f"[--{short} VALUE] " for short, _ in command.short)


def _short_help(command: Command) -> str:
    return "".join(f" --{short} is short for --{key}." for short, key in command.short)


def read_settings(
    parser: ArgumentParser, settings_class: type, arguments: Sequence[str], short: Iterable[tuple[str, str]] = ()
) -> tuple[Any, bool]:
    """Fill the settings from a command line (after the subcommand). `short`: further names of settings, for flags.

    Returns the settings, not yet validated, and whether `--print_config` was given. Raises SettingsError for anything that
    cannot be read, is no setting, or has the wrong type.
    """
    kinds = setting_types(settings_class)
    files, flags, print_config = _split(arguments, kinds, dict(short))
    given = [entry for file in files for entry in read_file(file, kinds)] + flags
    last = {entry.key: entry for entry in given}  # flags come last, so they win
    for entry in last.values():
        if ":" in (entry.text or "") and _is_number(kinds[entry.key]):
            raise _ill_typed(entry, kinds[entry.key])  # YAML reads 1:30 as 90
    try:
        values = parser.parse_args([f"--{entry.key}={_argument(entry, kinds[entry.key])}" for entry in last.values()])
    except argparse.ArgumentError as error:
        raise _translate(error, last, kinds) from error
    for entry in last.values():
        if _is_text(kinds[entry.key]):  # jsonargparse reads text as YAML, where `#5` is null
            values[entry.key] = _text(entry, kinds[entry.key])
    return _build(settings_class, values), print_config


def setting_types(settings_class: type) -> dict[str, Any]:
    """The type of every setting under its name: `section.setting`, or `setting` where the class has no sections."""
    kinds: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(settings_class).items():
        members = typing.get_type_hints(kind) if is_dataclass(kind) else None
        kinds |= {name: kind} if members is None else {f"{name}.{member}": type_ for member, type_ in members.items()}
    return kinds


def _sections(settings_class: type) -> set[str]:
    return {name for name, kind in typing.get_type_hints(settings_class).items() if is_dataclass(kind)}


def read_file(path: str, kinds: dict[str, Any]) -> list[Given]:
    """The settings of a YAML file, in its order."""
    root = _compose(path)
    given = [] if root is None else list(_walk(root, "", path, kinds))
    seen: dict[str, str] = {}
    for entry in given:
        if entry.key in seen:
            raise SettingsError(f"{entry.where}: {entry.key} is set for the second time (first at {seen[entry.key]}); remove one")
        seen[entry.key] = entry.where
    return given


def _compose(path: str) -> yaml.Node | None:
    try:
        return yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise SettingsError(f"--config {path}: is not UTF-8 text; give a YAML file") from error
    except RecursionError as error:
        raise SettingsError(
            f"--config {path}: its lists or mappings are nested too deep; give settings as `name: value`"
        ) from error
    except OSError as error:
        raise SettingsError(f"--config {path}: cannot be read ({error.strerror}); give an existing YAML file") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise SettingsError(f"{path}{line}: malformed YAML: {error.problem or error.context}; correct it") from error
    except yaml.reader.ReaderError as error:
        raise SettingsError(f"{path}: malformed YAML: {error.reason} (character {error.position}); correct it") from error
    except (ValueError, OverflowError) as error:  # "\UFFFFFFFF"
        raise SettingsError(f"{path}: malformed YAML: it names a character that does not exist; correct it") from error


def _walk(node: yaml.Node, key: str, path: str, kinds: dict[str, Any]) -> Iterator[Given]:
    where = f"{path}:{node.start_mark.line + 1}"
    is_section = not key or any(name.startswith(f"{key}.") for name in kinds)
    if not is_section and key not in kinds:
        raise _unknown(key, where, kinds)
    if is_section and isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise SettingsError(f"{path}:{name.start_mark.line + 1}: a setting's name must be plain text")
            full = f"{key}.{name.value}" if key else name.value
            if full not in kinds and not any(known.startswith(f"{full}.") for known in kinds):
                raise _unknown(full, f"{path}:{name.start_mark.line + 1}", kinds)
            yield from _walk(value, full, path, kinds)
    elif is_section and not (key and _is_null(node)):
        what = f"the section {key}" if key else "the file"
        raise SettingsError(f"{where}: {what} must hold settings as `name: value` lines")
    elif not is_section:
        yield Given(key, _node_text(node, key, kinds[key], where), where)


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _node_text(node: yaml.Node, key: str, kind: Any, where: str) -> str | None:
    """The text of a scalar as written (so `off` stays `off` for a text setting); JSON for a list. Nothing else is a value."""
    if isinstance(node, yaml.ScalarNode):
        return None if _is_null(node) else node.value
    is_list = isinstance(node, yaml.SequenceNode)
    if is_list and typing.get_origin(kind) is list and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return json.dumps([_node_text(item, key, kind, where) for item in node.value])
    shape = "a mapping" if not is_list else "a list of lists or mappings" if typing.get_origin(kind) is list else "a list"
    raise SettingsError(f"{key} is {shape} ({where}): expected {describe_type(kind)}")


def _split(arguments: Sequence[str], kinds: dict[str, Any], short: dict[str, str]) -> tuple[list[str], list[Given], bool]:
    """Config files, flags and whether to print the settings, from `--key value` and `--key=value` words."""
    files: list[str] = []
    flags: list[Given] = []
    words = iter(arguments)
    print_config = False
    for word in words:
        if word == "--print_config":
            print_config = True
            continue
        if not word.startswith("--"):
            raise SettingsError(f"unexpected argument {word!r}: settings are given as --section.setting VALUE")
        key, equals, value = word[2:].partition("=")
        if not key:
            raise SettingsError(f"unexpected argument {word!r}: settings are given as --section.setting VALUE")
        if key == "print_config":
            raise SettingsError(f"{word} on the command line: give --print_config without a value")
        key = short.get(key, key)
        if key != "config" and key not in kinds:
            raise _unknown(key, FLAGS, kinds)
        text = value if equals else next(words, None)
        if text is None or (not equals and text.startswith("--")):
            raise SettingsError(f"--{key} needs a value on the command line, such as --{key} VALUE")
        if key == "config":
            files.append(text)
        else:
            flags.append(Given(key, text, FLAGS))
    return files, flags, print_config


def _argument(entry: Given, kind: Any) -> str:
    """The text for jsonargparse; `a,b` is a list too."""
    if entry.text is None:
        return "null"
    if typing.get_origin(kind) is list and entry.where == FLAGS and not entry.text.lstrip().startswith("["):
        return json.dumps([item.strip() for item in entry.text.split(",") if item.strip()])
    return entry.text


def _is_text(kind: Any) -> bool:
    return kind is str or (_is_optional(kind) and str in typing.get_args(kind))


def _is_number(kind: Any) -> bool:
    return not {int, float}.isdisjoint({kind, *typing.get_args(kind)})


def _is_optional(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType) and type(None) in typing.get_args(kind)


def _text(entry: Given, kind: Any) -> str | None:
    if entry.text is None and not _is_optional(kind):
        raise _ill_typed(entry, kind)
    return None if entry.where == FLAGS and entry.text in ("null", "~") and _is_optional(kind) else entry.text


def _build(settings_class: type, values: Namespace) -> Any:
    kinds, sections = typing.get_type_hints(settings_class), _sections(settings_class)
    return settings_class(
        **{name: kind(**vars(values[name])) if name in sections else values[name] for name, kind in kinds.items()}
    )


def _translate(error: argparse.ArgumentError, given: dict[str, Given], kinds: dict[str, Any]) -> SettingsError:
    match = re.search(r'"([\w.]+)"', str(error))
    if match and match[1] in given:
        return _ill_typed(given[match[1]], kinds[match[1]])
    return SettingsError(" ".join(str(error).split()))


def _ill_typed(entry: Given, kind: Any) -> SettingsError:
    shown = "null" if entry.text is None else shorten(repr(entry.text))
    return SettingsError(f"{entry.key} is {shown} ({_place(entry.where)}): expected {describe_type(kind)}")


def _unknown(key: str, where: str, kinds: dict[str, Any]) -> SettingsError:
    members = [name for name in kinds if name.startswith(f"{key}.")]
    if members:
        return SettingsError(f"{key} is a section ({_place(where)}): set one of its settings, such as --{members[0]} VALUE")
    return SettingsError(f"unknown setting {shorten(key)} ({_place(where)}): did you mean {nearest(key, kinds)}?")


def _place(where: str) -> str:
    return f"on {where}" if where == FLAGS else where


def describe_type(kind: Any) -> str:
    """What a setting's type accepts, in words."""
    if _is_optional(kind):
        return " or ".join(describe_type(part) for part in typing.get_args(kind) if part is not type(None)) + ", or null"
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is list:
        return "a list, such as [a, b]"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
