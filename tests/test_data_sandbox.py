"""Templates of strangers: what real ones use works as in transformers, what is meant to harm ends at once."""

import resource
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import _compile_jinja_template

from data.sandbox import render

MESSAGES = [
    {"role": "system", "content": " Be <b>brief</b> & kind. "},
    {"role": "user", "content": "\u4f60\u597d 'there'\n\tand \"here\" \U0001f600"},
    {"role": "assistant", "content": "<think>hm</think>yes"},
    {"role": "user", "content": ""},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"b": [1, 2.5, None, True], "a": "<\u4e2d>"}}}]
VARIABLES = {"messages": MESSAGES, "tools": TOOLS, "bos_token": "<s>", "add_generation_prompt": True}

WORKING = {
    "loops": """{%- for m in messages %}
        {%- if loop.first and m.role != 'system' %}a{% elif loop.last -%} last {{ loop.index0 }}/{{ loop.length }}
        {%- else %}
          {{ loop.index ~ ':' ~ loop.revindex0 ~ m['content'] }}
        {% endif %}
    {%- endfor %}""",
    "break": "{% for m in messages if m.content %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}"
    "{% if m.role == 'assistant' %}{% break %}{% endif %}{% else %}none{% endfor %}",
    "macros": "{%- macro line(m, end='\\n') -%}{{ m.role + ': ' + m.content|trim + end }}{%- endmacro -%}"
    "{% for m in messages %}{{ line(m) }}{{ line(m, end='') }}{% endfor %}"
    "{% macro box() %}[{{ caller('x') }}]{% endmacro %}{% call(y) box() %}{{ y }}{% endcall %}",
    "namespaces": "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.found = true %}{% set ns.n = ns.n + 1 %}{% endif %}{% endfor %}{{ ns.found }} {{ ns.n }}",
    "slices": "{% set rest = messages[1:] if messages[0]['role'] == 'system' else messages %}{{ rest|length }}"
    "{{ messages[::-1][0].role }}{{ messages[-1].role }}{{ messages[0].content[2:5] }}"
    "{{ (messages + messages)|length }}",
    "tests": "{{ x is defined }}{{ messages is iterable }}{{ messages[0] is mapping }}{{ none is none }}"
    "{{ 'a' is string }}"
    "{{ messages is sequence }}{{ 3 is odd }}{{ true is boolean }}{{ 1.5 is number }}{{ 1 is in [1, 2] }}"
    "{{ 2 is eq 2 }}",
    "filters": "{{ messages|map(attribute='role')|join(', ') }}"
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}"
    "{{ messages|rejectattr('content')|list|length }}{{ (messages|last).role|upper|lower|title|capitalize }}"
    "{{ messages[0].content|replace('b', 'q')|trim|length }}{{ y|default('none') }}{{ '7'|int + 1 }}{{ 'a'|safe }}"
    "{{ {'b': 1, 'a': 2}|items|list }}{{ {'b': 1, 'a': 2}|dictsort }}{{ [3, 1, 2]|sort|first }}{{ [1, 1]|unique|list }}"
    "{{ 'a\\nb'|indent(2) }}{{ '%s-%05.1f-%d%%'|format('x', 2, 3) }}{{ 5|string ~ 2.5|float }}{{ [1, 2]|reverse|list }}"
    "{{ ['a', 'b']|map('upper')|list }}{{ [3, 1]|max }}{{ -3|abs }}{{ messages|count }}{{ 'a<b'|e }}",
    "json": "{{ tools|tojson }}{{ tools[0]|tojson(indent=4) }}{{ messages[1].content|tojson }}"
    "{% for k, v in tools[0].function.items() %}{{ k }}={{ v|tojson(sort_keys=true) }};{% endfor %}",
    "strings": "{% set c = messages[2].content %}{{ c.split('</think>')[-1].strip('\\n') }}"
    "{{ c.startswith('<think>') }}"
    "{{ c.rstrip('s').lstrip('<').upper().lower().title() }}{{ c.replace('think', 'x', 1) }}"
    "{{ c.endswith(('s', 't')) }}"
    "{{ ', '.join(['a', 'b']) }}{{ '{} {x!r:>6}'.format(1, x='b') }}{{ 'ab' * 3 }}{{ '%s %d' % ('a', 3) }}{{ 7 % 4 }}"
    "{% for m in messages %}{{ m.content.strip().split('\\n')|length }}{{ m.get('name', '-') }}"
    "{{ m.content.find('b') }}"
    "{% endfor %}{{ c.splitlines()|first }}{{ 'a'.center(5) ~ '7'.zfill(3) }}{{ 'x' in c }}{{ 'role' in messages[0] }}",
    "arithmetic": "{{ 2 ** 10 }}{{ 7 // 2 }}{{ 1 / 4 }}{{ 3 - 5 }}{{ -2 * 3 }}{{ 1 < 2 <= 2 }}{{ not (1 == 2) }}"
    "{{ [1, 2] + [3] }}",
    "capture": "{% set text %}{% for m in messages %}{{ m.role }} {% endfor %}{% endset %}{{ text|trim }}"
    "{% filter upper %}abc{% endfilter %}{% with a = 1 %}{{ a }}{% endwith %}{# a comment #}{% raw %}{{ x }}"
    "{% endraw %}",
    "whitespace": "  {% if true %}\n  a\n  {% endif %}\n  b {%- if true %}  c{% endif %}  \n\n",
    "recursion": "{% for n in [[1, [2]], [3]] recursive %}({{ loop(n) if n is iterable else n }}){% endfor %}",
    "objects": "{{ messages }}{{ {'a': (1, none)} }}{{ missing }}{{ true }}{{ dict(a=1).get('a') }}{{ range(3)|list }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
}


@pytest.mark.parametrize("name", WORKING)
def test_what_real_templates_use_renders_as_in_transformers(name: str) -> None:
    expected = _compile_jinja_template(WORKING[name]).render(**VARIABLES)
    assert render(WORKING[name], VARIABLES) == expected
    assert expected


def doubling(expression: str, start: str = "'aa'") -> str:
    return (
        "{% set ns = namespace(x=" + start + ") %}{% for i in range(200) %}"
        "{% set ns.x = " + expression + " %}{% endfor %}{{ ns.x }}"
    )


HARMFUL = {
    "times": "{{ 'a' * 200000000 }}",
    "times in steps": "{% set x = 'a' * 1000 %}{% set y = x * 1000 %}{{ y * 1000 }}",
    "list times": "{{ [1] * 1000000000 }}",
    "power": "{{ 2 ** 1000000000 }}",
    "power while compiling": "{% if false %}{% endif %}{% if 2 ** 1000000000 %}{% endif %}",
    "squares": doubling("ns.x * ns.x", "9"),
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent precision": "{{ '%.1000000000f' % 1.5 }}",
    "percent key": "{{ '%(a(b))1000000000d'|format(**{'a(b)': 1}) }}",
    "percent often": "{{ ('%(a)s' * 100000) % {'a': 'x' * 100000} }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format nested": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "format often": "{{ ('{0}' * 100000).format('x' * 100000) }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "center": "{{ 'a'.center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "indent": "{{ 'a\n'|indent(1000000000) }}",
    "json indent": "{{ [[1]]|tojson(indent=1000000000) }}",
    "concatenate": doubling("ns.x ~ ns.x"),
    "add": doubling("ns.x + ns.x"),
    "add lists": doubling("ns.x + ns.x", "[1]"),
    "lists of lists": doubling("[ns.x, ns.x]"),
    "tuples of tuples": doubling("(ns.x, ns.x)"),
    "keys of keys": doubling("{ns.x: ns.x}.items()|first"),
    "tuples in tuples": "{% set ns = namespace(x=1) %}{% for i in range(99999) %}{% set ns.x = (ns.x,) %}{% endfor %}",
    "capture": "{% set ns = namespace(x='aa') %}{% for i in range(200) %}{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = x %}{% endfor %}",
    "replace": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "replace nothing": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "join": "{{ range(100000)|join('a' * 100000) }}",
    "join attribute": "{{ ([{'a': 'x' * 1000}] * 5000)|join(attribute='a') }}{{ ('a' * 100000).join('b' * 100000) }}",
    "join method": "{{ ('a' * 100000).join('b' * 100000) }}",
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
    "text in loops": "{% for i in range(100000) %}" + "x" * 100_000 + "{% endfor %}",
    "captured text": "{% filter upper %}{% for i in range(100000) %}" + "x" * 1000 + "{% endfor %}{% endfilter %}",
    "recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "recursive loop in breadth": "{% for i in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}"
    "{% endif %}{% endfor %}",
    "recursive macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive macro in breadth": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(40) }}",
    "range": "{% for i in range(10 ** 12) %}{% endfor %}",
    "membership": "{% for i in range(100000) %}{% if 'a' in range(100000) %}{% endif %}{% endfor %}",
    "comparison": "{% set x = 'a' * 2000000 %}{% set y = x ~ '' %}{% for i in range(100000) %}{{ x == y }}{% endfor %}",
    "search": "{% set x = 'a' * 2000000 %}{% for i in range(100000) %}{% if x.find('b') %}{% endif %}{% endfor %}",
    "slices": "{% set x = 'a' * 2000000 %}{% for i in range(100000) %}{% set y = x[::-1] %}{% endfor %}",
    "sort": "{{ ([[1] * 1000] * 1000)|sort|length }}",
    "split": "{{ ('a ' * 2000000).split()|length }}",
    "map": doubling("ns.x|map('string')", "range(100000)"),
    "text of lists": doubling("[ns.x, ns.x]|upper"),
    "remainder of a text": "{{ '%1000000000d' is odd }}",
    "remainder of a text again": "{{ '%1000000000d' is divisibleby 1 }}",
    "list of characters": "{{ ('\u4e2d' * 4000000)|list|length }}",
    "arguments of characters": "{{ namespace(*('\u4e2d' * 4000000)) }}",
    "sorted characters": "{{ ('\u4e2d' * 4000000)|sort|length }}",
    "strip": "{{ ('a' * 1000000).strip('b' * 1000000 ~ 'a') }}",
    "trim": "{{ ('a' * 1000000)|trim('b' * 1000000 ~ 'a') }}",
    "equal lists": "{% set a = ['x'] * 9999 %}{% set b = ['x'] * 9999 %}{% for i in range(99999) %}{{ a == b }}"
    "{% endfor %}",
    "changed": "{% set a = ['x'] * 50000 %}{% set b = ['x'] * 50000 %}{% for i in range(99999) %}"
    "{% if loop.changed(a if i is odd else b) %}{% endif %}{% endfor %}",
    "big integer": "{{ ('f' * 1000000)|int(0, 16) }}",
    "time": "{{ strftime_now('%Y' * 1000000) }}",
    "deep": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "deep list": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "long sum": "{{ " + "+".join("1" * 9000) + " }}",
    "many parts": "{{ a }}" * 30_000,
    "long": "x" * 300_000,
    "braces": "{" * 250_000,
    "comments": "{#" * 100_000,
    # what reaches outside
    "class": "{{ ''.__class__.__mro__ }}",
    "attribute by filter": "{{ ''|attr('__class__') }}",
    "attribute by format": "{{ '{0.__class__}'.format(1).x }}{{ missing.y }}",
    "globals of a function": "{{ raise_exception.__globals__ }}{{ missing.y }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "tabs": "{{ '\t'.expandtabs(1000000000) }}",
    "append": "{% set x = [] %}{{ x.append(1) }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as y %}",
    "extends": "{% extends 'x' %}",
    "block": "{% block a %}{{ self.a() }}{% endblock %}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "hidden names": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    # what is merely wrong
    "syntax": "{% for %}",
    "unclosed": "{{ 'a",
    "undefined": "{{ missing.name }}",
    "division": "{{ 1 / 0 }}",
    "unknown filter": "{{ 1|batch(1000000000) }}{{ 'a'|center(1000000000) }}",
    "unknown test": "{{ 1 is callable }}",
    "message": "{{ raise_exception('Roles must alternate') }}",
}


@pytest.mark.parametrize("name", HARMFUL)
def test_what_harms_is_refused_at_once_and_in_little_memory(name: str) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(ValueError, match=r"^mine[:,] ") as caught:
        render(HARMFUL[name], VARIABLES, "mine")
    assert time.thread_time() - start < 2
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << (0 if sys.platform == "darwin" else 10)
    assert grown < 100 << 20, f"{grown >> 20} MiB"
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_reason_is_told() -> None:
    for name, reason in {
        "message": "mine: refuses these messages: Roles must alternate",
        "recursive macro": "mine: it is nested too deep, or calls itself without end",
        "times": "mine: it makes too much text or takes too many steps",
        "membership": "mine: it takes longer than 1 s",
        "long": "mine: has 300,000 bytes, expected at most 256 KiB",
    }.items():
        with pytest.raises(ValueError) as caught:
            render(HARMFUL[name], VARIABLES, "mine")
        assert str(caught.value) == reason


def test_long_conversations_have_room() -> None:
    messages = [{"role": "user", "content": "word " * 2000}] * 1000  # 10 million characters
    source = (
        "{% for m in messages %}{{ (m.content|trim).split('x')[-1] ~ loop.index0 % 2 ~ messages|length }}{% endfor %}"
    )
    assert len(render(source, {"messages": messages})) == 1000 * (9999 + 1 + 4)


def test_a_value_with_methods_of_its_own_is_not_let_in() -> None:
    with pytest.raises(ValueError, match="value of type PosixPath, expected plain JSON"):
        render("{{ x.write_text('') }}", {"x": Path("/nowhere")})


def test_one_rendering_leaves_nothing_to_the_next() -> None:
    with pytest.raises(ValueError, match="too much"):
        render("{{ 'a' * 200000000 }}", {})
    assert render("{{ 'a' * 2000 }}", {}) == "a" * 2000


FRAGMENTS = """{{ }} {% %} {{ }} {% for x in range(99999) endfor if endif x * ** ~ + 'a' 9999 |join |list |upper ( )
[ ] .format set = , macro f() endmacro f() % messages loop.index"""


@settings(max_examples=300, deadline=None, derandomize=True)
@given(parts=st.lists(st.sampled_from(FRAGMENTS.split()), max_size=25))
def test_any_source_gives_text_or_a_value_error(parts: list[str]) -> None:
    try:
        assert isinstance(render(" ".join(parts), VARIABLES), str)
    except ValueError as error:
        assert "\n" not in str(error)
