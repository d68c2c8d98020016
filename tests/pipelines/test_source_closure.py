"""Tests of pipelines.source_closure: which code counts, and which changes do."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.source_closure import closure, closure_digest

PACKAGE = {
    "pack/__init__.py": "",
    "pack/stage.py": "import json\nfrom . import near\nfrom .inner.deep import one\n"
    "import beside\n",
    "pack/near.py": "def late():\n    from pack.inner import later\n",
    "pack/inner/__init__.py": "",
    "pack/inner/deep.py": "from ..near import late\none = 1\n",
    "pack/inner/later.py": "import pipelines.stage\n",
    "pack/alone.py": "nobody imports this\n",
    "beside.py": "import torch\n",
    "pipelines/stage.py": "ours, though it lies here\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with that package."""
    for name, text in PACKAGE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_everything_that_is_imported_from_there_counts(root: Path) -> None:
    """Packages, relative imports, imports inside functions, circles; nothing of ours."""
    assert set(closure("pack.stage", root)) == {
        *("pack", "pack.stage", "pack.near", "pack.inner", "pack.inner.deep", "pack.inner.later"),
        "beside",
    }


def test_of_an_installed_package_only_itself_counts(root: Path) -> None:
    """What lies beside it in site-packages is no code of the user's."""
    root = root.rename(root.with_name("site-packages"))
    assert "beside" not in closure("pack.stage", root)
    assert "pack.inner.later" in closure("pack.stage", root)


@pytest.mark.parametrize(
    ("name", "text", "counts"),
    [
        ("pack/inner/later.py", "import pipelines.stage\nsize = 2\n", True),
        ("pack/inner/later.py", "import pipelines.stage  # why\n\n\n# and so on\n", False),
        ("pack/alone.py", "more\n", False),
        ("pack/inner/deep.py", "from ..near import late\none = '''1\n\n# 2'''\n", True),
    ],
)
def test_what_changes_the_digest(root: Path, name: str, text: str, counts: bool) -> None:
    """Code does, wherever in the closure; comments and blank lines do not."""
    before = closure_digest("pack.stage", root)
    (root / name).write_text(text)
    assert (closure_digest("pack.stage", root) != before) == counts


def test_lines_inside_strings_count(root: Path) -> None:
    """A blank line or a hash in a string is a part of it."""
    path = root / "beside.py"
    digests = set()
    for text in ("'''a\nb'''\n", "'''a\n\nb'''\n", "'''a\n# c\nb'''\n"):
        path.write_text(f"words = {text}")
        digests.add(closure_digest("pack.stage", root))
    assert len(digests) == 3


def test_a_file_that_is_no_python_is_named(root: Path) -> None:
    """The error says which file and line."""
    (root / "beside.py").write_text("import\n")
    with pytest.raises(ValueError, match=r"beside\.py: must be Python, but .*line 1"):
        closure_digest("pack.stage", root)
