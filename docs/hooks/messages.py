"""mkdocs hook: the page of error messages, made from the code and `remedies.toml`.

A message is the text of a `ProjectError`, or of a `ValueError` of the modules whose errors are
printed as they are (`SETTINGS`). Formatted values are shown as `<name>`. Each entry of
`remedies.toml` has a remedy and a pattern; the remedy of a message is that of the first pattern
that its text contains.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
# Modules whose ValueErrors are mistakes in settings.
SETTINGS = (
    "mtl_ranker/config.py",
    "mtl_ranker/models/embedding.py",
    "mtl_ranker/models/matmul.py",
    "mtl_ranker/models/presets.py",
)
# Functions that return the text of an error.
SENTENCES = ("_explain", "_key_problem")
# Area of the page → the beginnings of its modules. The first area that fits is taken.
AREAS = {
    "Project file": ("mtl_ranker/config.py", "mtl_ranker/models/", "mtl_ranker/training/specs.py"),
    "Actions": ("mtl_ranker/logs/actions.py",),
    "Simulation": ("mtl_ranker/logs/respond.py",),
    "Log, tables and stores": ("mtl_ranker/logs/",),
    "Features": ("mtl_ranker/features/",),
    "Training, promotion and blending": ("mtl_ranker/training/", "mtl_ranker/nightly/"),
    "Candidates, rankings and exported models": ("mtl_ranker/ranking/",),
    "Registered models": ("mtl_ranker/tracking/",),
    "Library": ("mtl_ranker/library.py",),
    "Census-Income": ("mtl_ranker/studies/",),
    "Commands and flows": ("mtl_ranker/", "flows/"),
}
INTRODUCTION = """# Error messages

This page lists the messages of mistakes in project file, data or command, with their remedies. \
`<name>` stands for a value. A command prints the message and ends with exit code 2; a flow run \
fails with it. `mtl-ranker check` finds most mistakes before a night. Errors of disks, servers and \
databases are printed as one sentence too, with exit code 1: \
[what can fail](../operations.md#what-can-fail-and-what-happens)."""


class Message(NamedTuple):
    """An error message.

    Attributes:
        module: path of the file in the repository.
        text: with `<name>` for each formatted value.
    """

    module: str
    text: str


class Remedy(NamedTuple):
    """What to do about the messages that contain a pattern."""

    pattern: re.Pattern[str]
    remedy: str


@cache
def messages() -> list[Message]:
    """All messages, in the order of files and lines, each once per file."""
    files = [*ROOT.glob("mtl_ranker/**/*.py"), *ROOT.glob("flows/**/*.py")]
    found: list[Message] = []
    for file in sorted(files):
        module = str(file.relative_to(ROOT))
        tree = ast.parse(file.read_text("utf-8"))
        nodes = sorted(_texts(tree, module), key=lambda node: (node.lineno, node.col_offset))
        found += [Message(module, text) for node in nodes if (text := sentence(node))]
    return list(dict.fromkeys(found))


def _texts(tree: ast.Module, module: str) -> Iterator[ast.expr]:
    """The expressions of a module that are texts of errors."""
    kinds = {"ProjectError", "ValueError"} if module.startswith(SETTINGS) else {"ProjectError"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in kinds and node.args:
            yield node.args[0]
        if isinstance(node, ast.FunctionDef) and node.name in SENTENCES:
            returned = (each.value for each in ast.walk(node) if isinstance(each, ast.Return))
            yield from (value for value in returned if isinstance(value, ast.JoinedStr))


def sentence(node: ast.expr) -> str:
    """The first line of a text, or nothing for the text of another error."""
    whole = _text(node).partition("\n")[0].strip()
    return "" if re.fullmatch(r"(<[^>]*>: )?<[^>]*>", whole) else whole


def _text(node: ast.expr) -> str:
    match node:
        case ast.Constant():
            return str(node.value)
        case ast.JoinedStr():
            return "".join(_text(value) for value in node.values)
        case ast.FormattedValue(conversion=114):  # !r
            return f"'<{_name(node.value)}>'"
        case ast.FormattedValue():
            return f"<{_name(node.value)}>"
        case ast.BinOp(op=ast.Add()):
            return _text(node.left) + _text(node.right)
        case ast.Call(func=ast.Attribute(attr="join"), args=[ast.List(elts=[first, *_])]):
            return _text(first)
    return f"<{_name(node)}>"


def _name(node: ast.expr) -> str:
    """A short name of a formatted value."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.strip("_")
        case ast.Call(func=ast.Name(id="first_line" | "str")):
            return "reason"
        case ast.Call(args=[first, *_], func=ast.Name()):
            return _name(first)
        case ast.Call(func=ast.Attribute(value=value)) if not isinstance(value, ast.Constant):
            return _name(value)
        case ast.Subscript(value=value) | ast.BinOp(left=value):
            return _name(value)
        case ast.BoolOp(values=[first, *_]):
            return _name(first)
    return "…"


@cache
def remedies() -> list[Remedy]:
    content = tomllib.loads((Path(__file__).parent / "remedies.toml").read_text("utf-8"))
    return [
        Remedy(re.compile(pattern), each["remedy"])
        for each in content["remedies"]
        for pattern in each["messages"]
    ]


def remedy_of(message: Message) -> Remedy | None:
    """The first remedy whose pattern a message contains."""
    return next((each for each in remedies() if each.pattern.search(message.text)), None)


def area_of(message: Message) -> str:
    return next(area for area, begins in AREAS.items() if message.module.startswith(begins))


def messages_page() -> str:
    """A list for each area: messages, followed by the remedy that they have in common."""
    areas: dict[str, dict[str, list[str]]] = {area: {} for area in AREAS}
    for message in messages():
        remedy = remedy_of(message)
        own = areas[area_of(message)].setdefault(remedy.remedy if remedy else "", [])
        if message.text not in own:
            own.append(message.text)
    lines = [INTRODUCTION]
    for area, by_remedy in areas.items():
        lines += ["", f"## {area}"]
        for remedy_text, texts in by_remedy.items():
            lines += ["", *(f"`` {text} ``" for text in texts), f":   {remedy_text}"]
    return "\n".join([*lines, ""])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """mkdocs event: add the page."""
    files.append(File.generated(config, "reference/messages.md", content=messages_page()))
    return files
