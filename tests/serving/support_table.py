"""The table in docs/api.md of what the API supports: every field that a body may have, and the tests that show it to work.

`make api-table` runs those tests, and writes the table from what has passed. A field that no passed test shows is written
down as untested, so nobody can add one in silence; fields of OpenAI's that are refused are listed with what to do instead.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import pytest

from shoal.serving.openapi import OPERATIONS
from shoal.serving.requests import UNSUPPORTED, WITHOUT_EFFECT, Body

TESTS = Path(__file__).parent
PAGE = TESTS.parent.parent / "docs" / "api.md"
BEGIN, END = "<!-- table: made by `make api-table` -->\n", "<!-- end of table -->\n"
Shown = Mapping[tuple[str, str], Iterable[str]]
"""Names of the tests that show a field of an endpoint; the field "" is the endpoint itself."""


def declared() -> dict[tuple[str, str], set[str]]:
    """What the tests say they show, read from their marks."""
    shown: dict[tuple[str, str], set[str]] = {}
    for path in sorted(TESTS.glob("test_*.py")):
        tree = ast.parse(path.read_text())
        names = {
            target.id: ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for function in tree.body:
            if isinstance(function, ast.FunctionDef):
                for mark in function.decorator_list:
                    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.shows":
                        values = [names[arg.id] if isinstance(arg, ast.Name) else ast.literal_eval(arg) for arg in mark.args]
                        _note(shown, values, function.name)
    return shown


class _Passed:
    """A plugin that keeps what tests that have passed show; a test with several cases counts if all of them pass."""

    def __init__(self) -> None:
        self.marks: dict[str, list[list[str]]] = {}
        self.failed: set[str] = set()

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        if isinstance(item, pytest.Function):
            self.marks[item.originalname] = [list(mark.args) for mark in item.iter_markers("shows")]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid.rpartition("::")[2].partition("[")[0])

    def shown(self) -> dict[tuple[str, str], set[str]]:
        shown: dict[tuple[str, str], set[str]] = {}
        for name, marks in self.marks.items():
            for values in marks if name not in self.failed else ():
                _note(shown, values, name)
        return shown


def _note(shown: dict[tuple[str, str], set[str]], values: list[str], name: str) -> None:
    endpoint, *fields = values
    for field in ("", *fields):
        shown.setdefault((endpoint, field), set()).add(name)


def write_table(shown: Shown) -> str:
    """The table as Markdown."""
    lines: list[str] = []
    for operation in OPERATIONS:
        lines += [f"### `{operation.method.upper()} {operation.path}`", "", operation.summary, ""]
        fields = _fields(operation.body) if operation.body is not None else []
        if not fields:
            lines += [f"Shown by {_tests(shown, operation.path, '')}.", ""]
            continue
        lines += ["| field | | shown by |", "|---|---|---|"]
        for name in fields:
            changes_nothing = operation.body in WITHOUT_EFFECT and name in WITHOUT_EFFECT[operation.body]
            word = "accepted, changes nothing" if changes_nothing else "yes"
            lines.append(f"| `{name}` | {word} | {_tests(shown, operation.path, name)} |")
        for name, advice in UNSUPPORTED.get(operation.body, {}).items() if operation.body is not None else ():
            lines.append(f"| `{name}` | 400: {advice} | `test_openais_fields_that_are_not_supported_are_named` |")
        lines.append("")
    return "\n".join(lines)


def _fields(body: type[Body]) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(body)]


def _tests(shown: Shown, endpoint: str, field: str) -> str:
    return ", ".join(f"`{name}`" for name in sorted(shown.get((endpoint, field), ()))) or "**no test**"


def put_table(page: str, table: str) -> str:
    """The page with its table replaced."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def main() -> None:
    """Runs the tests and writes the page."""
    passed = _Passed()
    status = pytest.main(["-q", "-m", "not full", str(TESTS)], plugins=[passed])
    PAGE.write_text(put_table(PAGE.read_text(), write_table(passed.shown())))
    sys.exit(status)


if __name__ == "__main__":
    main()
