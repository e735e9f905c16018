"""Conversations become token ids, and which of them the assistant wrote: for training, sampling and export alike.

    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    ids, mask = render_conversation(messages, CHAT_TEMPLATES["chatml"], tokenizer)

A ChatTemplate is Jinja as Hugging Face models carry it; a PromptTemplate takes conversations too. Names of special
tokens that a template writes become their ids; in what users or assistants wrote they stay text.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data.chat_spans import Rendering, rendered
from data.prompt_template import PromptTemplate, Record

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer  # brings NumPy, which settings modules do without

Message = dict[str, str]  # role, content; a user's may have a context, as records do

_ROLES = ("system", "user", "assistant", "tool")
_CONTEXT = "message['context']"  # a template that writes this renders contexts itself, as those of `as_jinja` do


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja source that renders `messages`, as in tokenizer_config.json or a GGUF file.

    bos_token, eos_token: what these variables stand for in it. stop: contents of the tokens that end an answer.
    """

    name: str
    source: str
    bos_token: str = ""
    eos_token: str = ""
    stop: tuple[str, ...] = ()

    def text(self, messages: Sequence[Message], add_generation_prompt: bool = False, **variables: Any) -> str:
        """The conversation as text, the same that transformers renders. ValueError for what the template refuses."""
        from data.sandbox import render

        tokens = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        given = {
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            **{name: content for name, content in tokens.items() if content},
            **variables,
        }
        return render(self.source, given, f"chat template {self.name}")

    def spec(self) -> dict[str, Any]:
        """Plain values for dataset.json and checkpoints; `template_from_spec` reads them."""
        return {
            "kind": "chat",
            "name": self.name,
            "source": self.source,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "stop": list(self.stop),
        }


Template = PromptTemplate | ChatTemplate

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' ~ message['content']|trim ~ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


def _with_system(text: str) -> str:
    """ChatML where a conversation without a system message gets this one."""
    turn = json.dumps(f"<|im_start|>system\n{text}<|im_end|>\n")
    return "{% if messages[0]['role'] != 'system' %}{{ " + turn + " }}{% endif %}" + _CHATML


CHAT_TEMPLATES: dict[str, ChatTemplate] = {
    template.name: template
    for template in (
        ChatTemplate("chatml", _CHATML, eos_token="<|im_end|>", stop=("<|im_end|>",)),
        ChatTemplate("llama3", _LLAMA3, "<|begin_of_text|>", "<|eot_id|>", ("<|eot_id|>", "<|end_of_text|>")),
        ChatTemplate(
            "qwen2.5",
            _with_system("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
            eos_token="<|im_end|>",
            stop=("<|im_end|>", "<|endoftext|>"),
        ),
        ChatTemplate(
            "smollm2",
            _with_system("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
            eos_token="<|im_end|>",
            stop=("<|im_end|>",),
        ),
    )
}


def check_messages(messages: Any, where: str = "messages") -> list[Message]:
    """`messages` as they are. ValueError that names the first of them which is not a role and text, `where` first.

    The order of roles is the template's business.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        found = "an empty list" if isinstance(messages, (list, tuple)) else type(messages).__name__
        raise ValueError(f"{where}: expected a list of messages with role and content, found {found}")
    for number, message in enumerate(messages):
        here = f"{where}[{number}]"
        if not isinstance(message, dict):
            raise ValueError(f"{here}: expected an object with role and content, found {type(message).__name__}")
        allowed = {"role", "content", "context"} if message.get("role") == "user" else {"role", "content"}
        if not {"role", "content"} <= set(message) <= allowed:
            found = ", ".join(sorted(map(repr, message)))[:200] or "none"
            raise ValueError(f"{here}: has the fields {found}, expected 'role' and 'content'")
        if message["role"] not in _ROLES:
            raise ValueError(f"{here}: has the role {message['role']!r:.60}, expected one of {', '.join(_ROLES)}")
        for field in ("content", "context"):
            if not isinstance(message.get(field, ""), str):
                raise ValueError(f"{here}: its {field} is {type(message[field]).__name__}, expected text")
    return list(messages)


def messages_of(record: Record, answered: bool = True) -> list[Message]:
    """A record as a conversation: instruction and context are the user's, the response is the assistant's."""
    user = {"role": "user", "content": record["instruction"]}
    if record.get("context"):
        user["context"] = record["context"]
    return [user, {"role": "assistant", "content": record["response"]}] if answered else [user]


def render_conversation(
    messages: Sequence[Message],
    template: Template,
    tokenizer: "Tokenizer",
    add_generation_prompt: bool = False,
    supervised: slice = slice(None),
) -> tuple[list[int], list[int]]:
    """Ids of a conversation, and the loss mask of the same length: 1 where a token holds what the assistant wrote.

    That is each answer up to and with the token that ends its turn. add_generation_prompt: the assistant answers next.
    supervised: which of the answers count, all by default; the mask of the others is 0.
    Raises ValueError for messages that are none, that the template refuses, or whose answers cannot be told apart.
    """
    from data.tokenizer_base import utf8

    checked = [{key: utf8(value) for key, value in message.items()} for message in check_messages(messages)]
    if isinstance(template, PromptTemplate):
        return _render_turns(checked, template, tokenizer, add_generation_prompt, supervised)
    if _CONTEXT not in template.source:
        checked = [_context_in_content(message) for message in checked]

    def text(some: Sequence[Message], prompt: bool, **variables: str) -> str:
        return utf8(template.text(some, prompt, **variables))

    rendering = rendered(text, checked, tokenizer.special_names, add_generation_prompt, template.name, template.source)
    return _encode(rendering, template, tokenizer, supervised)


def conversation_text(messages: Sequence[Message], template: Template) -> str:
    """The text around and in a conversation, for learning a vocabulary."""
    if isinstance(template, ChatTemplate):
        return template.text([_context_in_content(message) for message in messages])
    parts = []
    for message in messages:
        record = {"instruction": message["content"], "context": message.get("context", "")}
        parts.append(template.prompt(record) if message["role"] == "user" else message["content"])
    return "".join(parts)


def stop_ids(template: Template | None, tokenizer: "Tokenizer") -> tuple[int, ...]:
    """The ids that end an answer: the template's stop tokens and end of text, as far as they are one id, and eot_id."""
    names = (*template.stop, template.eos_token) if isinstance(template, ChatTemplate) else ()
    encoded = [tokenizer.encode_special(name) for name in names]
    return tuple(dict.fromkeys([*(ids[0] for ids in encoded if len(ids) == 1), tokenizer.eot_id]))


def as_jinja(template: PromptTemplate, eot: str, bos: str = "") -> str:
    """Jinja source that renders a conversation to the text that `template` makes of it, for models that are exported.

    eot, bos: contents of the tokens that end an answer and begin a text. A user's message['context'] is optional.
    """

    def writes(text: str, field: str) -> str:
        parts = [json.dumps(part, ensure_ascii=False) for part in text.split("{" + field + "}")]
        name = "content" if field == "instruction" else field
        return "{{ " + f" ~ message['{name}'] ~ ".join(parts) + " }}"

    return (
        "{{ " + json.dumps(bos) + " }}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] ~ \"\\n\\n\" }}"
        "{% elif message['role'] == 'user' %}"
        + writes(template.instruction, "instruction")
        + "{% if message['context'] %}"
        + writes(template.context, "context")
        + "{% endif %}{{ "
        + json.dumps(template.answer, ensure_ascii=False)
        + " }}{% elif message['role'] == 'assistant' %}{{ message['content'] ~ "
        + json.dumps(template.end + eot, ensure_ascii=False)
        + " }}{% else %}{{ raise_exception('the roles are system, user and assistant') }}{% endif %}{% endfor %}"
    )


# ---- behind the doors


def _context_in_content(message: Message) -> Message:
    context = message.get("context")
    content = f"{message['content']}\n\n{context}" if context else message["content"]
    return {"role": message["role"], "content": content}


def _render_turns(
    messages: list[Message],
    template: PromptTemplate,
    tokenizer: "Tokenizer",
    add_generation_prompt: bool,
    supervised: slice,
) -> tuple[list[int], list[int]]:
    """Prompt, answer, prompt, answer, each encoded apart; a system message stands in front of the first prompt."""
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    mask = [0] * len(ids)
    system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
    turns = messages[1:] if system else messages
    if add_generation_prompt and len(turns) % 2 == 0:
        raise ValueError("messages: the last is not a user's, so there is nothing to answer")
    counting = range(len(turns) // 2)[supervised]
    for number, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[number % 2]:
            raise ValueError(
                f"messages: prompt template {template.name} takes turns of user and assistant, "
                f"found {message['role']!r} as number {number + 1} of {len(turns)}"
            )
        if message["role"] == "user":
            record = {"instruction": message["content"], "context": message.get("context", "")}
            new = tokenizer.encode((system if number == 0 else "") + template.prompt(record))
        else:
            new = [*tokenizer.encode(message["content"] + template.end), tokenizer.eot_id]
        ids += new
        mask += [int(message["role"] == "assistant" and number // 2 in counting)] * len(new)
    return ids, mask


def _encode(
    rendering: Rendering, template: ChatTemplate, tokenizer: "Tokenizer", supervised: slice
) -> tuple[list[int], list[int]]:
    """Ids and mask of a rendered conversation: section by section between its special tokens."""
    text = rendering.text
    special = tokenizer.special_spans(text)
    answers = rendering.answers([(start, end) for start, end, _ in special], (*template.stop, template.eos_token))
    by_assistant = bytearray(len(text) + 1)
    for start, end in answers[supervised]:
        by_assistant[start:end] = b"\1" * (end - start)
    # Cut where an answer begins too, so that the ids of the prompt are the same whatever the answer is.
    cuts = [start for start, _ in answers] if tokenizer.may_cut else []
    ids: list[int] = []
    mask: list[int] = []
    done = 0
    for start, end, token in [*special, (len(text), len(text), None)]:
        borders = [done, *(cut for cut in cuts if done < cut < start), start]
        for left, right in itertools.pairwise(borders):
            if left < right:
                new, spans = tokenizer.encode_section(rendering.restored(left, right), first=left == 0)
                ids += new
                mask += [int(1 in by_assistant[left + a : left + max(b, a + 1)]) for a, b in spans]
        if token is not None:
            ids.append(token)
            name = start + len(text[start:end]) - len(text[start:end].lstrip())  # it may take in spaces beside it
            mask.append(by_assistant[name])
        done = end
    return ids, mask
