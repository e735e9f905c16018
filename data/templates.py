"""How a record becomes a prompt and an answer: templates as plain data, and the one renderer that everything uses.

    record = normalize_record({"instruction": "Name a colour.", "response": "Blue."}, "colours.jsonl:1")
    ids, mask = render_record(record, TEMPLATES["dolly"], tokenizer)

Training, evaluation, sampling and export all call this module, so a prompt has the same ids everywhere: prompt and
answer are encoded apart and joined, never as one string whose border a BPE merge could cross.
"""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.chat import CHAT_TEMPLATES, ChatTemplate, Template, messages_of, render_conversation
from data.choices import check_choice
from data.prompt_template import TEMPLATES, PromptTemplate, Record

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer  # brings NumPy, which settings modules do without

TEMPLATE_NAMES = (*TEMPLATES, *CHAT_TEMPLATES)

# The names that a field goes by in the wild, in the order in which they are looked for.
_FIELD_NAMES = {
    "instruction": ("instruction", "problem"),
    "context": ("context", "input"),
    "response": ("response", "output", "solution"),
    "category": ("category",),
}


def get_template(name: str) -> Template:
    """The built-in template of that name. ValueError with the nearest name for any other."""
    check_choice("prompt template", name, TEMPLATE_NAMES)
    return TEMPLATES[name] if name in TEMPLATES else CHAT_TEMPLATES[name]


def template_from_file(path: Path, tokenizer: "Tokenizer | None") -> ChatTemplate:
    """The chat template in a Jinja file, with the bos_token and eos_token of `tokenizer`, or of one that is learned.

    Raises ValueError that names the file.
    """
    from data.tokenizer_base import END_OF_TEXT

    try:
        source = path.read_text("utf-8")
    except OSError as error:
        raise ValueError(f"--prompt_template {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt_template {path}: not UTF-8 at byte {error.start}; convert the file") from error
    if tokenizer is None:
        return ChatTemplate(path.stem, source, "", END_OF_TEXT, (END_OF_TEXT,))
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    bos = "" if tokenizer.bos_id is None else names.get(tokenizer.bos_id, "")
    eos = names[tokenizer.eot_id]
    return ChatTemplate(path.stem, source, bos, eos, (eos,))


def template_from_spec(spec: dict[str, Any] | None) -> Template | None:
    """The template that `spec()` described; None stays None (raw text). ValueError for other fields.

    "kind": "chat" tells a ChatTemplate; a PromptTemplate has none, as before there were two.
    """
    if spec is None:
        return None
    if not isinstance(spec, dict) or not all(isinstance(name, str) for name in spec):
        raise ValueError(f"prompt template: is a {type(spec).__name__}, expected its fields by name")
    if "kind" in spec:
        return _chat_from_spec(spec)
    known = [field.name for field in fields(PromptTemplate)]
    if sorted(spec) != sorted(known) or not all(isinstance(value, str) for value in spec.values()):
        found = str(sorted(spec))[:200]
        raise ValueError(f"prompt template: has the fields {found}, expected {sorted(known)}, each a string")
    return PromptTemplate(**spec)


def has_instruction_fields(raw: dict[str, Any]) -> bool:
    """Whether a record has an instruction and a response, under any of the names that `normalize_record` takes."""
    return all(_present(raw, field) for field in ("instruction", "response"))


def normalize_record(raw: Any, where: str) -> Record:
    """A record with the four fields as stripped strings, from instruction/context/response, instruction/input/output or
    problem/solution.

    An empty response is kept (the caller decides). A field that is missing or no text: ValueError, `where` first.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: expected a record with fields, found {type(raw).__name__}")
    record = {}
    for field, names in _FIELD_NAMES.items():
        name = _present(raw, field)
        value = raw[name] if name else None
        if value is None and field in ("instruction", "response"):
            found = ", ".join(map(repr, raw)) or "none"
            raise ValueError(
                f"{where}: the record has no {' or '.join(map(repr, names))}; its fields are {found}"[:400]
            )
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where}: the field {name!r} is {type(value).__name__}, expected text")
        record[field] = (value or "").strip()
    return record


def render_record(record: Record, template: Template, tokenizer: "Tokenizer") -> tuple[list[int], list[int]]:
    """Ids of prompt, response and end of text, and the loss mask of the same length: 1 from the response on, else 0."""
    return render_conversation(messages_of(record), template, tokenizer)


def render_prompt(text_or_record: str | Record, template: Template | None, tokenizer: "Tokenizer") -> list[int]:
    """Ids that sampling feeds: the unsupervised part of `render_record`. Without a template, the raw text."""
    record = {"instruction": text_or_record, "context": ""} if isinstance(text_or_record, str) else text_or_record
    if template is not None:
        return render_conversation(messages_of(record, answered=False), template, tokenizer, True)[0]
    text = "\n\n".join(part for part in (record["instruction"], record.get("context")) if part)
    return [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tokenizer.encode(text)]


def _chat_from_spec(spec: dict[str, Any]) -> ChatTemplate:
    names = [field.name for field in fields(ChatTemplate) if field.name != "stop"]
    stop = spec.get("stop")
    is_sound = isinstance(stop, (list, tuple)) and all(isinstance(text, str) for text in [*stop, *map(spec.get, names)])
    if spec["kind"] != "chat" or set(spec) != {"kind", "stop", *names} or not is_sound:
        raise ValueError(
            f"prompt template: has the kind {spec['kind']!r:.40} and the fields {str(sorted(spec))[:200]}, "
            f"expected 'chat' with {', '.join(names)}, each a string, and stop, a list of them"
        )
    return ChatTemplate(spec["name"], spec["source"], spec["bos_token"], spec["eos_token"], tuple(spec["stop"]))


def _present(raw: dict[str, Any], field: str) -> str | None:
    """The first of the field's names that the record has."""
    return next((name for name in _FIELD_NAMES[field] if name in raw), None)
