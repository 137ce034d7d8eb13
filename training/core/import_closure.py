"""The modules that a module imports, directly or not, and a digest of their code.

Imports inside functions count; imports under `TYPE_CHECKING` do not. The digest ignores comments,
docstrings and layout: only a change of code changes it.
"""

import ast
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_TYPE_CHECKING = "TYPE_CHECKING"


@dataclass(frozen=True)
class _Import:
    """An import statement: `level` counts the dots of a relative `module`; `names` follow `import`."""

    module: str
    level: int = 0
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Code:
    """The digest of a source file's code and its imports."""

    digest: bytes
    imports: tuple[_Import, ...]


@dataclass(frozen=True)
class _Source:
    content: bytes
    is_package: bool


class SourceTree:
    """The modules of some top-level packages, with the contents of their files at construction.

    `packages` maps a package's name to its directory. A closure contains no modules of other packages.
    """

    def __init__(self, packages: Mapping[str, Path]) -> None:
        self._sources: dict[str, _Source] = {}
        self._packages: set[str] = set()
        for name, directory in packages.items():
            self.add(name, directory)

    def add(self, name: str, directory: Path) -> None:
        """Read one more package. A package that is already in the tree is not read again."""
        if name in self._packages:
            return
        self._packages.add(name)
        for path in directory.rglob("*.py"):
            parts = [name, *path.relative_to(directory).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            if is_package:
                parts.pop()
            if all(part.isidentifier() for part in parts):
                self._sources[".".join(parts)] = _Source(path.read_bytes(), is_package)

    def closure(self, module: str) -> list[str]:
        """The module, all modules of the tree that it imports, directly or not, and their packages, sorted.

        Raises:
            ValueError: the tree has no such module.
        """
        if module not in self._sources:
            raise ValueError(f"{module} is not a module of {', '.join(sorted(self._packages))}")
        reached: set[str] = set()
        pending = [module]
        while pending:
            name = pending.pop()
            if name not in reached and name in self._sources:
                reached.add(name)
                pending += self._imports(name)
                pending.append(name.rpartition(".")[0])  # Python runs the package first
        return sorted(reached)

    def digest(self, module: str) -> str:
        """A digest of the code of the module's closure.

        Raises:
            ValueError: the tree has no such module.
        """
        state = hashlib.blake2b(digest_size=16)
        for name in self.closure(module):
            state.update(f"{name}\0".encode())
            state.update(_parse(self._sources[name].content).digest)
        return state.hexdigest()

    def _imports(self, module: str) -> list[str]:
        """The absolute names that a module may import, including names that may be attributes."""
        source = self._sources[module]
        package = module if source.is_package else module.rpartition(".")[0]
        names: list[str] = []
        for statement in _parse(source.content).imports:
            target = _absolute(statement, package)
            names.append(target)
            if "*" in statement.names:  # `__all__` may name any submodule
                names += [name for name in self._sources if name.rpartition(".")[0] == target]
            names += [f"{target}.{name}" for name in statement.names]
        return names


def _absolute(statement: _Import, package: str) -> str:
    """The module of an import statement in a module of `package`."""
    if not statement.level:
        return statement.module
    parts = package.split(".")
    parents = parts[: len(parts) - statement.level + 1]
    return ".".join([*parents, *filter(None, [statement.module])])


@cache
def _parse(content: bytes) -> _Code:
    tree = _Normalizer().visit(ast.parse(content))
    digest = hashlib.blake2b(ast.dump(tree).encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return _Code(digest, tuple(_imports_of(ast.walk(tree))))


def _imports_of(nodes: Iterable[ast.AST]) -> list[_Import]:
    statements: list[_Import] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            statements += [_Import(alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            statements.append(_Import(node.module or "", node.level, names))
    return statements


class _Normalizer(ast.NodeTransformer):
    """Removes code that does not run from a syntax tree: docstrings and `TYPE_CHECKING` blocks."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        test = node.test
        name = test.id if isinstance(test, ast.Name) else test.attr if isinstance(test, ast.Attribute) else ""
        return node.orelse if name == _TYPE_CHECKING else node

    def visit_Module(self, node: ast.Module) -> ast.AST:
        return self._without_docstring(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._without_docstring(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._without_docstring(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._without_docstring(node)

    def _without_docstring(
        self, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    ) -> ast.AST:
        if ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        return self.generic_visit(node)
