"""The documentation that every Python carries: the docstrings of its library and the topics of its language reference.

Source files are parsed with `ast` and never imported, so reading them runs nothing. What is found depends on the Python
that runs this, and on nothing else.
"""

import ast
import functools
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Folders of the library that hold tests, other people's packages, or programs rather than a library.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
_LEFT_OUT |= {"__pycache__", "lib-dynload", "pydoc_data", "__phello__", "this.py", "antigravity.py"}
# Public modules whose Python source stands under a private name.
_PUBLIC_NAMES = {
    "_pydecimal": "decimal",
    "_pydatetime": "datetime",
    "_pyio": "io",
    "_collections_abc": "collections.abc",
    "genericpath": "os.path",
    "posixpath": "os.path",
}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Argument:
    """One argument of a function: `name` with its stars, `default` as source text or None."""

    name: str
    default: str | None = None


@dataclass(frozen=True)
class Docstring:
    """One docstring of the library, cleaned of its indentation."""

    kind: Literal["module", "class", "function", "method"]
    module: str
    name: str  # inside the module, "Sniffer.sniff"; "" for the module itself
    text: str
    arguments: tuple[Argument, ...] = ()

    @property
    def full_name(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module

    @property
    def is_public(self) -> bool:
        return not any(part.startswith("_") for part in self.full_name.split("."))

    @property
    def signature(self) -> str:
        """`csv.Sniffer.sniff(sample, delimiters=None)`; without the parentheses for what is no function."""
        if self.kind in ("module", "class"):
            return self.full_name
        shown = [each.name if each.default is None else f"{each.name}={each.default}" for each in self.arguments]
        return f"{self.full_name}({', '.join(shown)})"


@functools.cache
def library_docstrings() -> tuple[Docstring, ...]:
    """Every docstring of modules, classes, functions and methods, by module name, then in the order of the source.

    About 7,000, 1.6 MB. A text that stands in several places counts once. Raises OSError where there are no sources.
    """
    library = Path(sysconfig.get_path("stdlib"))
    found: list[Docstring] = []
    seen: set[str] = set()
    for name, path in sorted(_source_files(library)):
        for docstring in _docstrings_of(name, path):
            if docstring.text not in seen:
                seen.add(docstring.text)
                found.append(docstring)
    if not found:
        raise FileNotFoundError(
            f"{library}: this Python has no source files, so there is no embedded text; give your own with --input"
        )
    return tuple(found)


@functools.cache
def language_topics() -> dict[str, str]:
    """Topic -> text of the language reference (what `help("assert")` prints): about 80, 0.5 MB. Empty if missing."""
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if not path.is_file():
        return {}
    for statement in _parse(path).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="topics")], value=value):
                topics: dict[str, str] = ast.literal_eval(value)
                return {name: text.strip() for name, text in sorted(topics.items())}
    return {}


def _source_files(library: Path) -> Iterator[tuple[str, Path]]:
    for path in library.rglob("*.py"):
        parts = path.relative_to(library).parts
        if any(part in _LEFT_OUT or part.startswith("config-") for part in parts):
            continue
        name = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        if not name.endswith("__main__"):
            yield _PUBLIC_NAMES.get(name, name), path


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes in somebody else's strings
        return ast.parse(path.read_bytes(), filename=str(path))


def _docstrings_of(module: str, path: Path) -> Iterator[Docstring]:
    try:
        tree = _parse(path)
    except (SyntaxError, ValueError):  # deliberately broken files of test suites
        return
    text = ast.get_docstring(tree)
    if text:
        yield Docstring("module", module, "", text.strip())
    yield from _in_body(tree, module, "")


def _in_body(parent: ast.AST, module: str, prefix: str) -> Iterator[Docstring]:
    """Docstrings of the classes and functions under `parent`, also inside `if` and `try`, not inside functions."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef):
            text = ast.get_docstring(node)
            if text:
                yield Docstring("class", module, prefix + node.name, text.strip())
            yield from _in_body(node, module, f"{prefix}{node.name}.")
        elif isinstance(node, _FUNCTIONS):
            text = ast.get_docstring(node)
            if text:
                kind: Literal["method", "function"] = "method" if prefix else "function"
                yield Docstring(kind, module, prefix + node.name, text.strip(), _arguments(node, kind == "method"))
        elif isinstance(node, ast.stmt | ast.ExceptHandler):
            yield from _in_body(node, module, prefix)


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef, is_method: bool) -> tuple[Argument, ...]:
    spec = node.args
    plain = [*spec.posonlyargs, *spec.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(spec.defaults))
    found = [_argument(each, default) for each, default in zip(plain, [*defaults, *spec.defaults])]
    if is_method and found and found[0].name in ("self", "cls", "mcls", "metacls"):
        del found[0]
    if spec.vararg:
        found.append(Argument("*" + spec.vararg.arg))
    found += [_argument(each, default) for each, default in zip(spec.kwonlyargs, spec.kw_defaults)]
    if spec.kwarg:
        found.append(Argument("**" + spec.kwarg.arg))
    return tuple(found)


def _argument(argument: ast.arg, default: ast.expr | None) -> Argument:
    return Argument(argument.arg, None if default is None else ast.unparse(default))
