"""Rules that a machine can keep."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from shoal import errors, units
from shoal.ids import LayerRange

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
VAGUE = {"utils", "util", "common", "helpers", "misc", "shared", "manager"}


def test_the_tree_of_errors_is_drawn_completely() -> None:
    drawing = inspect.getdoc(errors) or ""
    drawn = {match[2]: len(match[1]) // 2 for match in re.finditer(r"^( *)([A-Z]\w+) {2,}\w", drawing, flags=re.MULTILINE)}
    classes = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert drawn.keys() == classes.keys()
    root_depth = drawn["ShoalError"]
    for name, kind in classes.items():
        assert drawn[name] - root_depth == len(kind.__mro__) - len(errors.ShoalError.__mro__), name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_say_what_they_are_and_leave_nothing_unfinished(path: Path) -> None:
    text = path.read_text()
    assert path.stem not in VAGUE
    assert text.lstrip().startswith('"""'), "a module says what it decides"
    for word in ("FIXME", "XXX", "PLACEHOLDER"):
        assert word not in text
    assert not re.search(r"TODO(?!\(#\d+\))", text), "a TODO names its issue"


def test_sizes_are_readable_and_read_back() -> None:
    assert units.format_bytes(98_362_432) == "98.4 MB"
    assert units.format_bytes(12) == "12 B"
    assert units.format_seconds(0.0000124) == "12.4 us"
    assert units.format_seconds(0) == "0 ns"
    assert units.parse_bytes("8GB") == 8 * 10**9
    assert units.parse_bytes("1.5 GiB") == 3 << 29
    assert units.parse_bytes("4096") == 4096
    for wrong in ("", "GB", "8 bananas", "-1MB", "1e3XB"):
        with pytest.raises(ValueError, match=r"size|negative"):
            units.parse_bytes(wrong)


def test_layer_ranges_are_ordered() -> None:
    assert str(LayerRange(0, 10)) == "0-9"
    assert str(LayerRange(3, 3)) == "none"
    with pytest.raises(ValueError, match="not ordered"):
        LayerRange(5, 3)
