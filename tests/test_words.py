"""The words of documentation, docstrings, comments, messages and `--help` are plain terms.

Data, files and programs do not speak, live or decide, and there is no history of the project.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "mtl_ranker", "flows", "benchmarks", "sql", "docker")
KINDS = (".md", ".py", ".toml", ".html", ".sql", ".yaml")
# Pattern → what to write instead.
PLAIN = {
    r"\bli(ves|ved)\b": "is, runs, is stored",
    r"\bhears?\b|\bheard\b": "reads, uses, gets",
    r"\bputs? aside\b": "quarantine, leave out",
    r"\bsa(y|ys|id) so\b": "name what is printed, set or raised",
    r"\bwithout a (say|word)\b": "not counted; without a message",
    r"\bwhatever (it|they|he|she) says?\b": "with any value",
    r"\bnewcomers?\b|\bstrangers?\b(?! ?=|\))": "first steps, default settings",
    r"\bdisappoint": "is worse",
    r"\bunknown territory\b": "outside of the training range",
    r"\breseed": "a training with another seed",
    r"\bnews of\b": "message",
    r"\bin doubt\b|\bbeyond doubt\b": "unless it is significant",
    r"\bmade up for\b": "run later, corrected",
    r"\bput (them|it) right\b": "correct",
    r"\bone would think\b": "expected",
    r"\b(stand|stands|stood) (in|beside|below|side by side|there)\b": "is in, is beside",
    r"\b(database|file|files|workspace|\.yaml|table|model|it) lies (in the|beside)\b": "is in",
    r"\bwhere (it|they) lies?\b": "its path or address",
    r"\bno longer\b|\bnowadays\b|\bused to be\b": "what is true, without history",
    r"\bearlier this (week|month)\b|\bpreviously, we\b": "what is true, without history",
    r"\bissue #?\d+\b": "the reason itself",
    r"\b(dearer|dear) (than|is|are|to)\b": "expensive",
    r"\b(leaves?|leave) the house\b": "is used elsewhere",
    r"\beats?\b|\bate\b|\bhungry\b": "reads, needs",
    r"\bwhat lies beside\b": "the tables beside it",
    r"\b(rows?|days?|models?|experts?|that) sees?\b": "uses, reads, has",
    r"\b(tells?|know|knows) (the values|what happened|what came)\b": "has, contains",
    r"\bhonou?r(s|ed)?\b": "supports",
    r"\b(is|are) announced\b": "is printed",
    r"\bours (is|are)\b|\b(nothing|something) of ours\b|\| ours\b|\"ours\b": "mtl_ranker",
    r"\bof 1 (days|rows|nights|lists)\b": "1 day",
    r"\bin the morning\b": "of the next day",
    r"\bsigns? of life\b": "heartbeat",
    r"\bputs? .{0,30}(on top|ahead of)\b": "ranks first; has a higher value than",
    r"\bneither helps nor harms\b|\bdoes no(t)? harm\b": "the difference with its interval",
    r"\b(model|night|log|data|ranker|feature|column|row|expert)s? (thinks?|believes?|wants?|hopes?"
    r"|forgets?|remembers?|dreams?|sleeps?|wakes?|dies|tells?|speaks?)\b": "a technical verb",
}


def texts() -> list[Path]:
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "mkdocs.yml", ROOT / "Makefile"]
    inside = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*")]
    return files + sorted(file for file in inside if file.suffix in KINDS)


def found_in(text: str) -> list[str]:
    """Each passage with a pattern, as line, words and what to write instead."""
    joined = re.sub(r"^[ \t]*#+ ", lambda m: " " * len(m[0]), text, flags=re.MULTILINE)
    passages = []
    for pattern, instead in PLAIN.items():
        for match in re.finditer(pattern.replace(" ", r"\s+"), joined, re.IGNORECASE):
            line = joined.count("\n", 0, match.start()) + 1
            passages.append(f"{line}: {match[0]!r}; write: {instead}")
    return passages


def test_words_are_plain():
    wrong = {
        str(file.relative_to(ROOT)): passages
        for file in texts()
        if (passages := found_in(file.read_text("utf-8")))
    }
    assert wrong == {}


@pytest.mark.parametrize(
    ("words", "passages"),
    [
        ("It lives one night on it.", ["1: 'lives'; write: is, runs, is stored"]),
        ("plain\n# a file that no\n# longer grows", 1),
        ("an expert hears the row; rows put aside", 2),
        ("Feeds of 1 days; what lies beside it\nis announced. Each row sees the day.", 4),
        ("The interval lies in the bounds. A live page for the living.", []),
    ],
)
def test_the_patterns(words, passages):
    found = found_in(words)
    assert len(found) == passages if isinstance(passages, int) else found == passages
