"""Every wrong line of the table is found by its tests, which pass on the right one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutation.mutants import MUTANTS, ROOT, Mutant, copied, mutated, run_tests, table
from tests.rotation import PARTS, of_today

TODAY = of_today(MUTANTS, PARTS)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("mutants"))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.what)
def test_each_mutant_changes_one_line(mutant: Mutant):
    text = (ROOT / "mtl_ranker" / mutant.file).read_text("utf-8")
    wrong = mutated(text, mutant)
    pairs = zip(text.splitlines(), wrong.splitlines(), strict=True)
    assert sum(one != other for one, other in pairs) == 1


def test_the_table_of_the_documentation_is_the_tables():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    assert table() in page


@pytest.mark.slow
def test_the_tests_pass_on_the_right_lines(copy: Path):
    files = sorted({m.tests for m in TODAY})
    chosen = {f"({m.only})" if m.only else Path(m.tests).name for m in TODAY}
    result = run_tests(copy, files, " or ".join(sorted(chosen)))
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mutant", TODAY, ids=lambda m: m.what)
def test_the_tests_find_the_wrong_line(copy: Path, mutant: Mutant):
    file = copy / "mtl_ranker" / mutant.file
    right = file.read_text("utf-8")
    file.write_text(mutated(right, mutant), "utf-8")
    try:
        result = run_tests(copy, [mutant.tests], mutant.only)
    finally:
        file.write_text(right, "utf-8")
    # 1: tests failed; others are errors of collection and the like.
    assert result.returncode == 1, result.stdout
    assert "error" not in result.stdout.splitlines()[-1], result.stdout
