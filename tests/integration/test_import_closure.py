"""The import closure of a module and the digest of its code are exact."""

from pathlib import Path

import pytest

from training.core.import_closure import SourceTree

FILES = {
    "shop/__init__.py": '"""A package."""\nfrom shop import settings\n',
    "shop/settings.py": "import os\n",
    "shop/entry.py": """
        from __future__ import annotations
        import typing
        from typing import TYPE_CHECKING
        import numpy
        from . import sibling
        from .inner.leaf import value
        from shop.attributes import name, other
        if TYPE_CHECKING:
            from shop import types_only
        else:
            from shop import runtime_only
        if typing.TYPE_CHECKING:
            import shop.types_too
        try:
            import shop.optional
        except ImportError:
            pass
        def run():
            import shop.lazy as lazy
            def nested():
                from shop import deep
            return nested
    """,
    "shop/sibling.py": "from shop import cycle\n",
    "shop/cycle.py": "from shop import entry, sibling\n",
    "shop/inner/__init__.py": "",
    "shop/inner/leaf.py": "from .. import top\nfrom ..inner import beside\nfrom . import *\n",
    "shop/inner/beside.py": "value = 1\n",
    "shop/inner/starred.py": "value = 1\n",
    "shop/top.py": "import extra.far.part\n",
    "shop/attributes.py": "name = other = 1\n",
    "shop/optional.py": "",
    "shop/lazy.py": "",
    "shop/deep.py": "",
    "shop/runtime_only.py": "",
    "shop/types_only.py": "",
    "shop/types_too.py": "",
    "shop/unrelated.py": "from shop import entry\n",
    "extra/__init__.py": "",
    "extra/far/__init__.py": "",
    "extra/far/part.py": "import outside\n",
    "extra/unused.py": "",
    "outside/__init__.py": "",
}


def tree_of(root: Path, changes: dict[str, str] | None = None) -> SourceTree:
    """The tree of `FILES` with `changes`; the package `outside` is not ours."""
    for name, text in {**FILES, **(changes or {})}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.strip("\n").splitlines()
        indent = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
        path.write_text("".join(f"{line[indent:]}\n" for line in lines))
    return SourceTree({name: root / name for name in ("shop", "extra")})


def test_a_closure_holds_what_the_module_imports_at_run_time(tmp_path: Path) -> None:
    names = """
    shop shop.settings shop.entry shop.sibling shop.cycle shop.inner shop.inner.leaf shop.inner.beside
    shop.inner.starred shop.top shop.attributes shop.optional shop.lazy shop.deep shop.runtime_only
    extra extra.far extra.far.part
    """
    assert tree_of(tmp_path).closure("shop.entry") == sorted(names.split())


def test_a_closure_may_be_small(tmp_path: Path) -> None:
    assert tree_of(tmp_path).closure("shop.lazy") == ["shop", "shop.lazy", "shop.settings"]


def test_a_module_that_is_not_ours_has_no_closure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="outside is not a module of extra, shop"):
        tree_of(tmp_path).closure("outside")


@pytest.mark.parametrize(
    ("name", "text", "changes_digest"),
    [
        ("shop/lazy.py", "value = 2\n", True),
        ("extra/far/part.py", "import outside\nvalue = 2\n", True),
        ("extra/far/__init__.py", "value = 2\n", True),
        ("shop/sibling.py", "from shop import cycle, unrelated\n", True),
        ("shop/unrelated.py", "value = 2\n", False),
        ("shop/types_only.py", "value = 2\n", False),
        ("outside/__init__.py", "value = 2\n", False),
        ("shop/sibling.py", '"""What it does."""\n\n# Why.\nfrom shop import (\n    cycle,\n)\n', False),
        ("shop/inner/beside.py", "value = 1  # one\nif TYPE_CHECKING:\n    import shop.unrelated\n", False),
        ("shop/attributes.py", 'name = other = 1\n"""Not the docstring, but no code either."""\n', True),
    ],
)
def test_the_digest_changes_with_the_code_of_the_closure(
    tmp_path: Path, name: str, text: str, *, changes_digest: bool
) -> None:
    before = tree_of(tmp_path / "before").digest("shop.entry")
    assert tree_of(tmp_path / "same").digest("shop.entry") == before
    after = tree_of(tmp_path / "after", {name: text}).digest("shop.entry")
    assert (after != before) == changes_digest


def test_a_docstring_is_no_code(tmp_path: Path) -> None:
    plain = (
        "class A:\n    x = 1\n    async def f(self):\n        pass\n    def g(self):\n        return 'text'\n"
    )
    documented = (
        'class A:\n    """A."""\n    x = 1\n    async def f(self):\n        """F."""\n        pass\n'
        '    def g(self):\n        "G."\n        return "text"\n'
    )
    before, after = (
        tree_of(tmp_path / str(at), {"shop/lazy.py": text}).digest("shop.lazy")
        for at, text in enumerate((plain, documented))
    )
    assert before == after


def test_a_tree_keeps_the_files_of_its_construction(tmp_path: Path) -> None:
    tree = tree_of(tmp_path)
    before = tree.digest("shop.entry")
    (tmp_path / "shop" / "entry.py").write_text("value = 2\n")
    tree.add("shop", tmp_path / "shop")
    assert tree.digest("shop.entry") == before
