"""Records as they are found in the wild, whatever their fields, as samples: conversations, or pairs of answers.

    format = format_of(row, "chat.jsonl:1")             # which format its fields tell
    sample = sample_of(row, format, "chat.jsonl:1")

Policy. After a system message, if there is one, user and assistant take turns, the user first; a tool speaks after an
assistant, which answers it. Another order, an unknown role and a field that is missing or no text are damage: a
ValueError that names file and line. A record that is sound but holds nothing to learn from (an empty question or
answer, two equal answers) raises Unusable: published sets hold such records, so they are left out and counted.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from data.chat import Message, messages_of
from data.templates import has_instruction_fields, normalize_record

Kind = Literal["text", "instruction", "preference", "prompts"]

KINDS: dict[str, Kind] = {
    "text": "text",
    "instruction": "instruction",
    "sharegpt": "instruction",
    "messages": "instruction",
    "code": "instruction",
    "preference": "preference",
    "prompts": "prompts",
}

# Who speaks, as ShareGPT's descendants and OpenAI's interface spell it.
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "ipython"), "tool"),
}
_MAY_FOLLOW = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
# All that is ever looked at, for files that can read some columns alone.
FIELD_NAMES = frozenset(
    (
        *("text", "instruction", "problem", "question", "prompt", "context", "input", "system", "category"),
        *("response", "output", "solution", "completion", "chosen", "rejected", "conversations", "messages"),
    )
)
_TURNS = ("conversations", "messages")
_BLANK_LINES = re.compile(r"\A(?:[^\S\n]*\n)+")
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class Sample(NamedTuple):
    """What one record gives.

    where: its place in the input. messages: the conversation; it ends with an answer, in a set of prompts with the
    question. rejected: for a pair, the same conversation with the worse answer.
    """

    where: str
    messages: list[Message]
    rejected: list[Message] | None = None

    @property
    def text(self) -> str:
        """All that is said in it, a part a line."""
        spoken = itertools.chain(self.messages, self.rejected or [])
        return "\n".join(part for message in spoken for part in (message["content"], message.get("context")) if part)


class Unusable(ValueError):
    """A sound record that holds nothing to learn from; `why` completes "left out 3 records ..."."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: a record {why}")
        self.why = why


def format_of(row: Any, where: str) -> str:
    """The format that a record's fields tell: a key of KINDS. ValueError that lists the fields if they tell none."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a record with fields, found {type(row).__name__}")
    if "chosen" in row and "rejected" in row:
        return "preference"
    turns = next((row[name] for name in _TURNS if isinstance(row.get(name), list)), None)
    if turns is not None:
        return "sharegpt" if turns and isinstance(turns[0], dict) and "from" in turns[0] else "messages"
    if "prompt" in row and "completion" in row:
        return "messages"
    if "problem" in row and "solution" in row:
        return "code"
    if has_instruction_fields(row):  # before "text": some instruction sets carry their rendered text as well
        return "instruction"
    if "text" in row:
        return "text"
    if "prompt" in row:
        return "prompts"
    wanted = "'text', 'instruction' and 'response' or 'output', 'messages', 'conversations', 'chosen' and 'rejected'"
    raise ValueError(f"{where}: expected a field {wanted}, or 'prompt'; found {fields_of(row)}"[:400])


def sample_of(row: Any, format: str, where: str) -> Sample:
    """A record as a sample. Raises ValueError for damage, Unusable for a record to leave out; see above."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a record with fields, found {type(row).__name__}")
    if format == "preference":
        return _pair(row, where)
    if format == "prompts":
        messages = _without_answer(_prompt(row, where))
        return Sample(where, _checked(messages, where, last=("user", "tool")))
    if format == "code":
        messages = [*_system(row, where), *_code(row, where)]
    elif format == "instruction":
        messages = [*_system(row, where), *messages_of(normalize_record(row, where))]
    elif "prompt" in row and "completion" in row:
        messages = [*_prompt(row, where), *_turns(row["completion"], where, "completion", "assistant")]
    else:
        messages = _prompt(row, where, _TURNS)
    return Sample(where, _checked(messages, where))


def fields_of(row: Any) -> str:
    """What a message of error says was found instead of a record's fields."""
    if not isinstance(row, dict):
        return type(row).__name__
    return f"the fields {', '.join(map(repr, row))}" if row else "no fields"


# ---- the parts of a record


def _prompt(row: dict[str, Any], where: str, names: Sequence[str] = (*_TURNS, "prompt", "question")) -> list[Message]:
    """The messages under the first of `names` that the record has, else its instruction and context."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is not None:
        messages = _turns(row[name], where, name, "user")
        begins_with_system = bool(messages) and messages[0]["role"] == "system"
        return messages if begins_with_system else [*_system(row, where), *messages]
    if names == _TURNS:
        raise ValueError(f"{where}: the record has no 'conversations' or 'messages'; found {fields_of(row)}"[:400])
    record = normalize_record({"response": "", **row}, where)
    return [*_system(row, where), *messages_of(record, answered=False)]


def _system(row: dict[str, Any], where: str) -> list[Message]:
    text = row.get("system")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: the field 'system' is {type(text).__name__}, expected text")
    return [{"role": "system", "content": text}] if text and not text.isspace() else []


def _code(row: dict[str, Any], where: str) -> list[Message]:
    """Problem and solution; the solution keeps the indentation of its first line, which stripping would take."""
    record = normalize_record({name: row[name] for name in ("problem", "solution") if name in row}, where)
    return messages_of({**record, "response": _BLANK_LINES.sub("", row["solution"]).rstrip()})


def _pair(row: dict[str, Any], where: str) -> Sample:
    """Both answers with their prompt, which is a field of its own, or what two whole conversations share."""
    has_prompt = any(row.get(name) is not None for name in (*_TURNS, "prompt", "question", "instruction"))
    prompt = _prompt(row, where) if has_prompt else []
    whole = []
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise ValueError(f"{where}: the record has no {name!r}; found {fields_of(row)}"[:400])
        said = row[name]
        if not has_prompt and isinstance(said, str):
            said = _transcript(said)
            if not said:
                raise ValueError(f"{where}: the record has no 'prompt'; found {fields_of(row)}"[:400])
        answer = _turns(said, where, name, "assistant")
        is_whole = answer[: len(prompt)] == prompt or (answer and answer[0]["role"] in ("system", "user"))
        whole.append(_checked(answer if is_whole else [*prompt, *answer], f"{where}: {name}"))
    chosen, rejected = whole
    if chosen == rejected:
        raise Unusable(where, "whose two answers are equal")
    parting = [messages[_shared(chosen, rejected) :] for messages in (chosen, rejected)]
    if not all(rest and rest[0]["role"] == "assistant" for rest in parting):
        raise ValueError(f"{where}: 'chosen' and 'rejected' do not part at an answer, expected one question for both")
    return Sample(where, chosen, rejected)


def _transcript(text: str) -> list[Message]:
    """Turns of a conversation written as one text, in the form of Anthropic's HH pairs; none if it is not one."""
    before, *parts = _SPEAKER.split(text)
    if before.strip():
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]


def shared_answers(one: list[Message], other: list[Message]) -> int:
    """How many answers the prompt of a pair holds: those before its conversations part."""
    return sum(message["role"] == "assistant" for message in one[: _shared(one, other)])


def _shared(one: list[Message], other: list[Message]) -> int:
    """How many messages both conversations begin with."""
    return len(list(itertools.takewhile(lambda both: both[0] == both[1], zip(one, other))))


def _without_answer(messages: list[Message]) -> list[Message]:
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


# ---- messages


def _turns(value: Any, where: str, name: str, speaker: str) -> list[Message]:
    """Messages from a list of them, from one, or from a text that `speaker` says."""
    if isinstance(value, str):
        return [{"role": speaker, "content": value.strip()}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"{where}: the field {name!r} is {type(value).__name__}, expected text or a list of messages")
    return [_message(each, f"{where}: {name}[{number}]") for number, each in enumerate(value)]


def _message(raw: Any, where: str) -> Message:
    """One message, its role under the name that templates know, its content as text."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: expected a message with role and content, found {type(raw).__name__}")
    role = raw.get("role", raw.get("from"))
    known = _ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise ValueError(f"{where}: has the role {role!r:.60}, expected one of {', '.join(_ROLES)}")
    if raw.get("tool_calls"):
        raise ValueError(f"{where}: has tool_calls, which are not supported; write the call into its content")
    return {"role": known, "content": _content(raw.get("content", raw.get("value")), where)}


def _content(value: Any, where: str) -> str:
    """The text of a content: itself, or OpenAI's list of parts, all of them text."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(str(part.get("text") or "") for part in value)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: its content is {type(value).__name__}, expected text")
    return value or ""


def _checked(messages: list[Message], where: str, last: Sequence[str] = ("assistant",)) -> list[Message]:
    """`messages` in an order that the policy allows, an empty system message left out."""
    if messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]
    before = "start"
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in _MAY_FOLLOW[before]:
            begins = before == "start"
            found = f"begins with {role!r}" if begins else f"has {role!r} after {before!r} as message {number}"
            expected = " or ".join(map(repr, _MAY_FOLLOW[before]))
            raise ValueError(f"{where}: the conversation {found}, expected {expected}")
        before = role
    if before not in last:
        found = f"ends with {before!r}" if messages else "is empty"
        raise ValueError(f"{where}: the conversation {found}, expected {' or '.join(map(repr, last))} at its end")
    for message in messages:
        said = message["content"] + message.get("context", "")
        if message["role"] in ("user", "assistant") and not said.strip():
            raise Unusable(where, "without an instruction or a response")
    return messages
