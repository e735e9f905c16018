"""How a record becomes a prompt and an answer: templates as plain data, and the one renderer that everything uses.

    record = normalize_record({"instruction": "Name a colour.", "response": "Blue."}, "colours.jsonl:1")
    ids, mask = render_record(record, TEMPLATES["dolly"], tokenizer)

Training, evaluation, sampling and export all call this module, so a prompt has the same ids everywhere: prompt and
answer are encoded apart and joined, never as one string whose border a BPE merge could cross.
"""

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from data.choices import check_choice

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer  # brings NumPy, which settings modules do without

Record = dict[str, str]  # instruction, context, response, category; what a record lacks is ""

# The names that a field goes by in the wild, in the order in which they are looked for.
_FIELD_NAMES = {
    "instruction": ("instruction", "problem"),
    "context": ("context", "input"),
    "response": ("response", "output", "solution"),
    "category": ("category",),
}


@dataclass(frozen=True)
class PromptTemplate:
    """The text around a record's fields; `{instruction}` and `{context}` stand for them, nothing else is replaced.

    A prompt is `instruction`, then `context` unless the record has none, then `answer`; the response and `end` follow,
    then the end of text. The tail from the response on is what training is scored on.
    """

    name: str
    instruction: str
    context: str
    answer: str
    end: str = ""

    def prompt(self, record: Record) -> str:
        """Everything before the response."""
        parts = [self.instruction.replace("{instruction}", record["instruction"])]
        if record.get("context"):
            parts.append(self.context.replace("{context}", record["context"]))
        return "".join([*parts, self.answer])

    def spec(self) -> dict[str, str]:
        """Plain values for dataset.json and checkpoints; `template_from_spec` reads them."""
        return asdict(self)


TEMPLATES: dict[str, PromptTemplate] = {
    template.name: template
    for template in (
        # No preamble: it would cost 20 to 30 tokens of every record, and a small model learns nothing from it.
        PromptTemplate(
            name="dolly",
            instruction="### Instruction:\n{instruction}\n\n",
            context="### Context:\n{context}\n\n",
            answer="### Response:\n",
        ),
        PromptTemplate(
            name="alpaca",
            instruction="Carry out the task that follows.\n\n### Instruction:\n{instruction}\n\n",
            context="### Input:\n{context}\n\n",
            answer="### Response:\n",
        ),
        PromptTemplate(
            name="zh_instruction",
            instruction="### 指令:\n{instruction}\n\n",
            context="### 输入:\n{context}\n\n",
            answer="### 输出:\n",
        ),
        PromptTemplate(
            name="human_assistant",
            instruction="Human: {instruction}\n",
            context="{context}\n",
            answer="Assistant: ",
            end="\n",
        ),
        PromptTemplate(
            name="zh_code",
            instruction="问题: {instruction}\n\n",
            context="{context}\n\n",
            answer="解决方案:\n```python\n",
            end="\n```",
        ),
    )
}


def get_template(name: str) -> PromptTemplate:
    """The built-in template of that name. ValueError with the nearest name for any other."""
    check_choice("prompt template", name, TEMPLATES)
    return TEMPLATES[name]


def template_from_spec(spec: dict[str, Any] | None) -> PromptTemplate | None:
    """The template that `PromptTemplate.spec()` described; None stays None (raw text). ValueError for other fields."""
    if spec is None:
        return None
    known = [field.name for field in fields(PromptTemplate)]
    if sorted(spec) != sorted(known) or not all(isinstance(value, str) for value in spec.values()):
        raise ValueError(f"prompt template: has the fields {sorted(spec)}, expected {sorted(known)}, each a string")
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


def render_record(record: Record, template: PromptTemplate, tokenizer: "Tokenizer") -> tuple[list[int], list[int]]:
    """Ids of prompt, response and end of text, and the loss mask of the same length: 1 from the response on, else 0."""
    prompt = render_prompt(record, template, tokenizer)
    answer = [*tokenizer.encode(record["response"] + template.end), tokenizer.eot_id]
    return prompt + answer, [0] * len(prompt) + [1] * len(answer)


def render_prompt(text_or_record: str | Record, template: PromptTemplate | None, tokenizer: "Tokenizer") -> list[int]:
    """Ids that sampling feeds: the unsupervised part of `render_record`. Without a template, the raw text."""
    record = {"instruction": text_or_record, "context": ""} if isinstance(text_or_record, str) else text_or_record
    if template is None:
        return tokenizer.encode("\n\n".join(part for part in (record["instruction"], record.get("context")) if part))
    return tokenizer.encode(template.prompt(record))


def _present(raw: dict[str, Any], field: str) -> str | None:
    """The first of the field's names that the record has."""
    return next((name for name in _FIELD_NAMES[field] if name in raw), None)
