"""Chat templates are programs of strangers: Jinja that reaches nothing, and ends soon with little memory.

    render("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", {"messages": messages})

On top of Jinja's own sandbox, three things hold. Only the kinds of statement, filters, methods and names that are
listed here exist. The parsed template is rewritten before it is compiled, so that every turn of a loop and every
operation whose result may be large goes through data.sandbox_checks, which takes its price from one budget. Nothing
is computed while compiling. What is left behaves as in transformers, which renders the same text.

Imports Jinja: for use inside the functions that render.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import TemplateSyntaxError, nodes, pass_context
from jinja2.environment import Template
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.tests import TESTS
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from data import sandbox_checks as checks

_SOURCE_BYTES = 256 << 10  # the longest published ones have about 30 KB
_NODES = 10_000  # of the parsed template; the largest published ones have about 3,000
_UNITS = 1 << 23  # and sixteen for each character of the messages, which templates may trim, split and join


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TEXT_FILTERS = _names("capitalize e escape lower safe title trim upper")  # of what they are given as text
_FINITE_FILTERS = _names(
    "abs count d default first float items last length map reject rejectattr reverse select selectattr"
)
_ORDERING_FILTERS = _names("dictsort max min sort unique")
_PLAIN_TESTS = _names(
    "boolean defined false float integer iterable mapping none number sameas sequence string true undefined"
)
_COMPARING_TESTS = _names("!= < <= == > >= eq equalto ge greaterthan gt le lessthan lower lt ne upper")
_METHODS: dict[type, frozenset[str]] = {
    str: _names(
        "capitalize casefold center count endswith find format format_map index isalnum isalpha isascii isdecimal "
        "isdigit islower isnumeric isspace istitle isupper join ljust lower lstrip partition removeprefix "
        "removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase "
        "title upper zfill"
    ),
    dict: _names("get items keys values"),
    list: _names("count index"),
    tuple: _names("count index"),
    LoopContext: _names(
        "changed cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0"
    ),
}
_STATEMENTS = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock,
    nodes.FilterBlock, nodes.With, nodes.Assign, nodes.AssignBlock, nodes.Scope, nodes.Break, nodes.Continue,
)  # fmt: skip


def render(source: str, variables: Mapping[str, Any], name: str = "chat template") -> str:
    """What the template `source` writes for `variables`, which are plain values as JSON has them.

    Raises ValueError, one line that begins with `name`, for whatever goes wrong in it, within about a second.
    """
    template = compiled(source, name)
    try:
        size = sum(_plain_size(value) for value in variables.values())
        with checks.spending(checks.Budget(_UNITS + 16 * size)):
            return template.render(variables)
    except Exception as error:  # it runs a stranger's program, which may fail in any way
        raise ValueError(f"{name}: {_reason(error)}") from error


@functools.lru_cache(maxsize=32)
def compiled(source: str, name: str = "chat template") -> Template:
    """The compiled template. Raises ValueError, one line that begins with `name`, for one that cannot be allowed."""
    size = len(source.encode("utf-8", "replace"))
    if size > _SOURCE_BYTES:
        raise ValueError(f"{name}: has {size:,} bytes, expected at most {_SOURCE_BYTES >> 10} KiB")
    try:
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise ValueError(f"{name}, line {error.lineno}: {_reason(error)}") from error
    except Exception as error:  # a parser may meet anything, and Python's compiler too
        raise ValueError(f"{name}: cannot be compiled: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep, or calls itself without end"
    return " ".join(f"{error}".split())[:300] or type(error).__name__


def _plain_size(value: Any) -> int:
    """Characters and elements in a value of plain JSON types. Raises ValueError for another type.

    A richer object may have methods that the sandbox does not know to be harmful.
    """
    if isinstance(value, str):
        return len(value)
    if value is None or type(value) in (bool, int, float):
        return 1
    if type(value) is dict:
        return sum(_plain_size(key) + _plain_size(part) for key, part in value.items()) + 1
    if type(value) in (list, tuple):
        return sum(map(_plain_size, value)) + 1
    raise ValueError(f"was given a value of type {type(value).__name__}, expected plain JSON values")


# ---- the environment


@functools.cache
def _environment() -> "_Sandbox":
    return _Sandbox()


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # it would compute constant expressions while compiling, unchecked
            finalize=_emitted,
            extensions=[LoopControlExtension, _Generation],
        )
        self.binop_table |= {
            "+": checks.added,
            "*": checks.multiplied,
            "**": checks.power,
            "%": checks.percent,
        }
        self.globals = {
            "dict": _dict,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "range": self.globals["range"],  # of at most 100,000 numbers
            "strftime_now": checks.now,
        }
        self.filters = _filters(self)
        self.tests = {name: TESTS[name] for name in _PLAIN_TESTS}
        self.tests |= {name: _comparing(TESTS[name]) for name in _COMPARING_TESTS}
        self.tests |= {
            "divisibleby": lambda value, number: checks.percent(value, number) == 0,
            "even": lambda value: checks.percent(value, 2) == 0,
            "in": lambda value, container: checks.compared(value) in checks.searched(container),
            "odd": lambda value: checks.percent(value, 2) == 1,
        }

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        """Jinja's hook between parsing and generating code."""
        _allow(source)
        guarded = _Guard().visit(source)
        guarded.set_environment(self)
        return super()._generate(guarded, *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, Namespace):
            return not attr.startswith("_")
        return any(isinstance(obj, kind) and attr in names for kind, names in _METHODS.items())

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        if value.__name__ == "format":
            return lambda *args, **kwargs: _Formatter(self).vformat(value.__self__, args, kwargs)
        return lambda mapping: _Formatter(self).vformat(value.__self__, (), mapping)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        checks.charge()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            # Inside loops and blocks Jinja hands its own variables over, which functions of Python do not take.
            plain = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
            return checks.call_method(owner, __obj.__name__, args, plain)
        if isinstance(owner, (list, tuple)):  # count and index compare
            checks.compared(owner)
        if isinstance(__obj, LoopContext):  # a loop that is recursive
            args = (checks.turns(args[0]), *args[1:])
        return super().call(__context, __obj, *args, **kwargs)


class _Formatter(SandboxedFormatter):
    """str.format with its price."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion in ("r", "a"):
            checks.text([value])
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        return checks.formatted(value, format_spec)


class _Namespace(Namespace):
    """What `set` inside a loop can write to; no names with an underscore in front, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise ValueError(f"it stores {name!r} in a namespace; names there begin with a letter")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # Jinja's own shows what it holds, of any size


class _Generation(Extension):
    """{% generation %}: what the assistant wrote. Rendering puts the marks in front and behind that it was given."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            nodes.Output([nodes.Name(name, "load", lineno=line)], lineno=line)
            for name in ("generation_begin", "generation_end")
        )
        return nodes.Scope([begin, *body, end], lineno=line)


@pass_context
def _emitted(_: Context, value: Any) -> str:
    # With a context, so that Jinja does not call it on constants while compiling.
    return checks.emitted(value)


def _raise_exception(message: str) -> None:
    raise ValueError(f"refuses these messages: {message}")


def _dict(*args: Any, **kwargs: Any) -> Any:
    return checks.built(dict(*args, **kwargs))


def _filters(environment: _Sandbox) -> dict[str, Callable[..., Any]]:
    def join(value: Any, d: str = "", attribute: str | int | None = None) -> str:
        return checks.joined(value if attribute is None else map(make_attrgetter(environment, attribute), value), d)

    def finite(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(function)(lambda *args, **kwargs: checks.everything(function(*args, **kwargs)))

    return {
        **{name: functools.partial(checks.as_text, FILTERS[name]) for name in _TEXT_FILTERS},
        **{name: finite(FILTERS[name]) for name in _FINITE_FILTERS},
        **{
            name: functools.wraps(f := FILTERS[name])(functools.partial(checks.ordered, f))
            for name in _ORDERING_FILTERS
        },
        "format": lambda value, *args, **kwargs: checks.percent(checks.text(value), kwargs or args),
        "indent": functools.partial(checks.indented, FILTERS["indent"]),
        "int": functools.partial(checks.integer, FILTERS["int"]),
        "join": join,
        "list": lambda value: checks.everything(iter(value)),
        "replace": checks.replaced,
        "string": checks.text,
        "tojson": checks.as_json,
        # What the rewritten template calls; no template can write these names.
        **{f":{check.__name__}": check for check in (checks.built, checks.compared, checks.searched, checks.turns)},
        ":joined": checks.joined,
        ":made": checks.made,
    }


def _comparing(test: Any) -> Callable[..., bool]:
    return lambda *args: bool(test(*map(checks.compared, args)))


# ---- rewriting


def _allow(template: nodes.Template) -> None:
    """Raises ValueError for a kind of statement that is not listed, and for a template of too many parts."""
    todo: list[nodes.Node] = [template]
    seen = 0
    while todo:
        node = todo.pop()
        seen += 1
        if isinstance(node, (nodes.Stmt, nodes.Template)) and not isinstance(node, _STATEMENTS):
            raise ValueError(f"it has a statement {type(node).__name__} (line {node.lineno}), which none needs here")
        if seen > _NODES:
            raise ValueError(f"it has more than {_NODES:,} parts")
        todo += node.iter_child_nodes()


def _checked(check: str, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, ":" + check, [], [], None, None, lineno=node.lineno)


def _is_constant(node: nodes.Node) -> bool:
    if isinstance(node, (nodes.List, nodes.Tuple)):
        return all(map(_is_constant, node.items))
    return isinstance(node, nodes.Const)


class _Guard(NodeTransformer):
    """Puts the checks around what may be large."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _checked("turns", node.iter)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        # Text between the tags is counted like any other value.
        node.nodes = [
            nodes.Const(each.data, lineno=each.lineno) if isinstance(each, nodes.TemplateData) else each
            for each in node.nodes
        ]
        return node

    def visit_Call(self, node: nodes.Call | nodes.Filter | nodes.Test) -> nodes.Node:
        self.generic_visit(node)
        if node.dyn_args is not None:  # f(*text) makes a tuple of its characters
            node.dyn_args = _checked("turns", node.dyn_args)
        return node

    visit_Filter = visit_Test = visit_Call

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _checked("joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _checked("made", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return node if _is_constant(node) else _checked("built", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return node if node.ctx != "load" or _is_constant(node) else _checked("built", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _checked("built", node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        contains = any(operand.op in ("in", "notin") for operand in node.ops)
        # Against a constant, as in role == "user" or role in ["user", "tool"], it takes no longer than that is long.
        if len(node.ops) == 1 and (_is_constant(node.ops[0].expr) or (_is_constant(node.expr) and not contains)):
            return node
        if not _is_constant(node.expr):
            node.expr = _checked("compared", node.expr)
        for operand in node.ops:
            operand.expr = _checked("searched" if operand.op in ("in", "notin") else "compared", operand.expr)
        return node
