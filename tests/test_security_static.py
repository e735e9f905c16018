"""What no program here may do, read from its syntax tree: unpickle, evaluate text, start a shell, trust a template."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_house import ROOT, tracked

# Files that may do one of these things, with the reason.
ALLOWED = {
    ("tests/evil_pickles.py", "pickle"): "makes the files that must not be unpickled, and shows what they do",
    ("tests/evil_pickles.py", "exec, eval"): "names them for evil pickles to call",
    ("tests/evil_pickles.py", "os.system, os.popen"): "names it for evil pickles to call",
    ("tests/evil_pickles.py", "torch.load without weights_only=True"): "shows what such files do",
    ("tests/evil_pickles.py", "numpy.load"): "shows what such files do",
    ("tests/test_formats_damage.py", "pickle"): "makes a file that must not be unpickled",
    ("tests/test_formats_damage.py", "os.system, os.popen"): "names it for such a file to call",
    ("tests/test_formats_hf_bad.py", "os.system, os.popen"): "names it for such a file to call",
    ("bench/tokenizing.py", "numpy.load"): "arrays that a peer wrote; without allow_pickle, objects are refused",
    ("training/objectives/rewards.py", "a module from a file"): "--reward FILE.py:function, given by the user alone",
}

MODULES = {
    **dict.fromkeys(("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"), "pickle"),
    **dict.fromkeys(("code", "codeop", "pty"), "exec, eval"),
    **dict.fromkeys(("torch.package", "torch.hub"), "code of strangers"),
}
NAMES = {
    **dict.fromkeys(("eval", "exec", "__import__"), "exec, eval"),
    **dict.fromkeys(("Unpickler", "Pickler"), "pickle"),
    **dict.fromkeys(("extractall", "unpack_archive"), "an archive unpacked"),
    **dict.fromkeys(("exec_module", "spec_from_file_location", "run_module"), "a module from a file"),
    **dict.fromkeys(("FileSystemReader", "DefaultLoadPlanner"), "a checkpoint whose .metadata is a pickle"),
    **dict.fromkeys(("Environment", "NativeEnvironment", "SandboxedEnvironment"), "a template outside the sandbox"),
    **dict.fromkeys(("unsafe_load", "full_load", "UnsafeLoader", "FullLoader"), "YAML that makes objects"),
}
ATTRIBUTES = {
    **dict.fromkeys(("os.system", "os.popen", "os.execv", "os.spawnv"), "os.system, os.popen"),
    **dict.fromkeys(("np.load", "numpy.load"), "numpy.load"),
    **dict.fromkeys(("yaml.load", "yaml.load_all", "yaml.Loader"), "YAML that makes objects"),
    **dict.fromkeys(("torch.jit.load", "torch.export.load", "torch.hub.load"), "code of strangers"),
}
# Keyword -> the value that is forbidden, and what that is.
KEYWORDS = {
    "weights_only": (False, "torch.load without weights_only=True"),
    "allow_pickle": (True, "numpy.load"),
    "shell": (True, "a shell"),
    "trust_remote_code": (True, "code of strangers"),
}


def findings(source: str) -> Iterator[tuple[int, str]]:
    """(line, what is forbidden there)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, MODULES[alias.name]) for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            if node.module in MODULES:
                yield node.lineno, MODULES[node.module]
            for alias in node.names:
                what = NAMES.get(alias.name) or ATTRIBUTES.get(f"{node.module}.{alias.name}")
                if what:
                    yield node.lineno, what
        elif isinstance(node, ast.Name) and node.id in NAMES:
            yield node.lineno, NAMES[node.id]
        elif isinstance(node, ast.Attribute):
            yield from _attribute(node)
        elif isinstance(node, ast.Call):
            yield from _call(node)


def _attribute(node: ast.Attribute) -> Iterator[tuple[int, str]]:
    dotted = ast.unparse(node)
    if dotted in ATTRIBUTES:
        yield node.lineno, ATTRIBUTES[dotted]
    if node.attr in NAMES and node.attr not in ("eval", "exec", "run_module"):  # model.eval() is a mode
        yield node.lineno, NAMES[node.attr]
    if node.attr.endswith(("_object", "_object_list")) and dotted.startswith(("dist.", "torch.distributed.")):
        yield node.lineno, "objects pickled between processes"


def _call(node: ast.Call) -> Iterator[tuple[int, str]]:
    called = ast.unparse(node.func)
    for keyword in node.keywords:
        if keyword.arg in KEYWORDS:
            forbidden, what = KEYWORDS[keyword.arg]
            # What is decided elsewhere might be the forbidden value.
            if not isinstance(keyword.value, ast.Constant) or keyword.value.value is forbidden:
                yield node.lineno, what
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if called == "torch.load" and given.get("weights_only") != "True":
        yield node.lineno, "torch.load without weights_only=True"
    if called.startswith("yaml.compose") and given.get("Loader") != "yaml.SafeLoader":
        yield node.lineno, "YAML that makes objects"
    if called == "Template" or called == "jinja2.Template":
        yield node.lineno, "a template outside the sandbox"


@pytest.mark.parametrize("room", ["code", "tests"])
def test_no_program_does_what_none_may(room: str) -> None:
    looked_at = 0
    for file in tracked(".py"):
        name = file.relative_to(ROOT).as_posix()
        if name.startswith("tests/") is not (room == "tests"):
            continue
        looked_at += 1
        for line, what in findings(file.read_text("utf-8")):
            assert (name, what) in ALLOWED, f"{name}:{line}: {what}"
    assert looked_at > 50


FORBIDDEN = [
    "import pickle", "import os, pickle as p", "from pickle import loads", "import marshal", "import joblib",
    "from torch.serialization import Unpickler", "torch.serialization.Unpickler(f)",
    "torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=safe)", "np.load(f)",
    "anything(f, allow_pickle=True)", "eval(text)", "exec(text)", "f = eval", "__import__(name)",
    "os.system(c)", "os.popen(c)", "from os import system", "subprocess.run(c, shell=True)",
    "subprocess.run(c, shell=how)", "yaml.load(f)", "yaml.unsafe_load(f)", "yaml.compose(f)",
    "yaml.compose(f, Loader=yaml.Loader)", "from yaml import UnsafeLoader", "tar.extractall(folder)",
    "shutil.unpack_archive(f)", "jinja2.Environment()", "from jinja2 import Environment", "jinja2.Template(text)",
    "SandboxedEnvironment()", "AutoModel.from_pretrained(name, trust_remote_code=True)", "torch.jit.load(f)",
    "dist.all_gather_object(out, value)", "torch.distributed.broadcast_object_list(values)",
    "from torch.distributed.checkpoint import FileSystemReader", "spec.loader.exec_module(module)",
    "import torch.hub", "from torch.hub import load",
]  # fmt: skip
HARMLESS = [
    "model.eval()", "torch.load(f, map_location='cpu', weights_only=True, mmap=is_archive)", "json.loads(text)",
    "yaml.safe_load(text)", "yaml.compose(text, Loader=yaml.SafeLoader)", "subprocess.run(words)",
    "from jinja2.sandbox import ImmutableSandboxedEnvironment", "dist.all_gather(out, tensor)", "re.compile(text)",
    "torch.compile(model)", "subprocess.run(words, shell=False)", "import pickletools", "Template = A | B",
]  # fmt: skip


@pytest.mark.parametrize("source", FORBIDDEN)
def test_each_of_these_is_found(source: str) -> None:
    assert list(findings(source))


@pytest.mark.parametrize("source", HARMLESS)
def test_none_of_these_is(source: str) -> None:
    assert not list(findings(source))


def test_what_is_allowed_is_still_needed() -> None:
    for (name, what), reason in ALLOWED.items():
        found = {what for _, what in findings(Path(ROOT / name).read_text("utf-8"))}
        assert what in found and reason, f"{name} does no longer: {what}"
