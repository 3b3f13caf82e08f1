"""mkdocs hook: the reference pages that are made from the code when the site is built.

`reference/settings.md` has every key of a project file, from `mtl_ranker/config.py`,
`reference/commands.md` every command with its options, from typer. `contributing.md` and
`benchmarks.md` are pages of the repository outside of `docs/`.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mtl_ranker.commands.app import app
from mtl_ranker.config import Project
from mtl_ranker.models.presets import COMMON, PRESETS, settings_of

ROOT = Path(__file__).parents[2]
OUTSIDE = {"contributing.md": "CONTRIBUTING.md", "benchmarks.md": "benchmarks/README.md"}
# The only version so far; with a second one, `settings_page` has to name a version for each key.
SINCE = "0.1.0"
PLURAL = ("text", "number", "table", "whole number")
CONSTRAINTS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}"}


class Key(NamedTuple):
    """A key of the project file.

    Attributes:
        section: the dotted place of its table, such as `log.items`; empty at the top.
        field: as pydantic has it.
    """

    section: str
    name: str
    field: FieldInfo

    @property
    def place(self) -> str:
        return f"{self.section}.{self.name}".lstrip(".")


def settings_keys(model: type[BaseModel] = Project, section: str = "") -> Iterator[Key]:
    """Every key below a table of settings, depth first, with those of nested tables."""
    for name, field in model.model_fields.items():
        key = Key(section, field.alias or name, field)
        yield key
        for inner in tables_of(field.annotation):
            yield from settings_keys(inner, key.place)


def tables_of(annotation: Any) -> list[type[BaseModel]]:
    """The tables of settings in a type, such as that of the list `objectives`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in tables_of(inner)]


def type_name(annotation: Any) -> str:
    """A type in the words of TOML."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(inner[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(each) for each in inner if each is not type(None))
    if origin is list:
        of = type_name(inner[0])
        return f"list of {of}s" if of in PLURAL else f"list of {of}"
    if origin is dict:
        if get_origin(inner[1]) is dict:
            return "tables"
        return f"table: {type_name(inner[0])} → {type_name(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(annotation, "any value")


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel):
        return ""
    if isinstance(value, dict) and value:
        return ", ".join(f"`{name}`" for name in value)
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if isinstance(value, str | int | float) else f"`{json.dumps(value)}`"


def range_of(field: FieldInfo) -> str:
    found = [
        text.format(getattr(limit, name))
        for limit in field.metadata
        for name, text in CONSTRAINTS.items()
        if getattr(limit, name, None) is not None
    ]
    return f" ({', '.join(found)})" if found else ""


def settings_page() -> str:
    """A table for each section of the project file."""
    lines = [
        "# Settings",
        "",
        "Every key of a project file (TOML). Paths are relative to the folder of the data. "
        "An unknown key is an error that names the closest one. "
        f"All keys exist since version {SINCE}.",
    ]
    described = {key.place: key.field for key in settings_keys()}
    sections: dict[str, list[Key]] = {}
    for key in settings_keys():
        sections.setdefault(key.section, []).append(key)
    for section, own in sections.items():
        lines += ["", *heading(section, described), "", "| key | type | default | meaning |"]
        lines += ["| --- | --- | --- | --- |"]
        for key in own:
            kind = cell(type_name(key.field.annotation) + range_of(key.field))
            default, meaning = cell(default_of(key.field)), cell(key.field.description or "")
            lines.append(f"| `{key.name}` | {kind} | {default} | {meaning} |")
    return "\n".join([*lines, "", *models_section()])


def heading(section: str, described: dict[str, FieldInfo]) -> list[str]:
    """A section's heading as it is written in TOML, and what it is."""
    if not section:
        return ["## The top of the file"]
    field = described[section]
    many = get_origin(field.annotation) is list
    model = tables_of(field.annotation)[0]
    written = f"[[{section}]]" if many else f"[{section}]"
    if get_origin(field.annotation) is dict:
        written = f"[{section}.COLUMN]"
    return [f"## `{written}`", "", summary(model.__doc__) or (field.description or "")]


def models_section() -> list[str]:
    """The settings of `[models.NAME]`, which depend on its preset."""
    lines = [
        "## `[models.NAME]`",
        "",
        "`preset` is one of the names below; without it, NAME is. Each preset has its own sizes, "
        "and those of all presets. [Models](../models.md) describes them.",
        "",
        "| preset | its sizes | meaning |",
        "| --- | --- | --- |",
    ]
    for name, preset in PRESETS.items():
        sizes = ", ".join(f"`{k} = {toml(v)}`" for k, v in settings_of(name).items())
        lines.append(f"| `{name}` | {sizes} | {cell(summary(preset.__doc__))} |")
    lines += ["", "| key of all presets | default |", "| --- | --- |"]
    return [*lines, *(f"| `{key}` | `{toml(value)}` |" for key, value in COMMON.items()), ""]


def toml(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def commands() -> dict[str, Any]:
    """Name → command, with those of groups as `study census`."""
    found = {}
    for name, each in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(each, "commands", None)
        found |= {f"{name} {k}": v for k, v in inner.items()} if inner else {name: each}
    return found


def commands_page() -> str:
    """Every command: what it does, its options, an example."""
    lines = [
        "# Commands",
        "",
        "`mtl-ranker COMMAND --help` prints the same. Exit codes: 0 success, 1 unexpected error, "
        "2 a mistake in project file, data or command.",
    ]
    for name, each in commands().items():
        lines += ["", f"## {name}", "", text(each.help), "", "| option | default | meaning |"]
        lines += ["| --- | --- | --- |"]
        for option in each.params:
            names = ", ".join(f"`{word}`" for word in (*option.opts, *option.secondary_opts))
            shown = "" if option.default in (None, False, ()) else f"`{option.default}`"
            shown = "required" if option.required else shown
            lines.append(f"| {names} | {shown} | {cell(text(getattr(option, 'help', '')))} |")
        example = (each.epilog or "").removeprefix("Example: ")
        lines += ["", "```sh", example, "```"] if example else []
    return "\n".join([*lines, ""])


def text(words: str | None) -> str:
    return "\n\n".join(re.sub(r"\s+", " ", part) for part in (words or "").split("\n\n")).strip()


def summary(docstring: str | None) -> str:
    """A docstring's first paragraph."""
    return re.sub(r"\s+", " ", (docstring or "").strip().split("\n\n")[0])


def cell(words: str) -> str:
    """Text in a cell of a Markdown table."""
    words = words.replace("|", "\\|").replace("\n", " ")
    # A backslash in code would be shown.
    parts = re.split(r"(`[^`]*`)", words)
    return "".join(p if p.startswith("`") else p.replace("[", "\\[") for p in parts)


def outside_page(file: str) -> str:
    """A page of the repository, with the links that the site has."""
    content = (ROOT / file).read_text("utf-8")
    content = re.sub(r"\]\((?:\.\./)?docs/", "](", content)
    return re.sub(r"\[([^\]]+)\]\([\w/]+\.py\)", r"\1", content)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """mkdocs event: the decisions in the navigation, in order."""
    decisions = sorted((ROOT / "docs/decisions").glob("*.md"))
    for entry in config.nav or []:
        if "Decisions" in entry:
            entry["Decisions"] = [f"decisions/{file.name}" for file in decisions]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """mkdocs event: add the pages."""
    pages: dict[str, Callable[[], str]] = {
        "reference/settings.md": settings_page,
        "reference/commands.md": commands_page,
    }
    made = {name: page() for name, page in pages.items()}
    made |= {name: outside_page(file) for name, file in OUTSIDE.items()}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs event: links to the pages outside of `docs/`."""
    for name, file in OUTSIDE.items():
        markdown = markdown.replace(f"](../{file}", f"]({name}")
    return markdown
