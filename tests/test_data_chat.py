"""Conversations: the text of transformers, ids in which nobody's words are special, and a mask of the assistant's."""

import json
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from data.chat import CHAT_TEMPLATES, ChatTemplate, as_jinja, check_messages, render_conversation, stop_ids
from data.encode import Encoder, Item
from data.prepare import prepare
from data.settings import PrepareSettings
from data.shards import open_dataset
from data.templates import TEMPLATES, get_template, render_prompt, render_record, template_from_spec
from data.tokenizer import BpeTokenizer, Tokenizer, load_tokenizer
from tests.test_data_tokenizer_special import LLAMA3_SPLIT, ours

NAMES = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>")
NAMES = (*NAMES, "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>")
BYTES = load_tokenizer("byte")
SMOLLM2_IN_ITS_GGUF = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def byte_level(split: bool = True) -> BpeTokenizer:
    """A small vocabulary with the special tokens of the built-in templates."""
    backend = Backend(models.BPE())
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if split:
        steps.insert(0, pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(NAMES),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(["assistant\n\nHello there. How are you\n", "user\nI am well.\n\n\nyes"] * 20, trainer)
    return BpeTokenizer(backend.to_str(), eot="<|endoftext|>")


@cache
def sentencepiece() -> BpeTokenizer:
    return ours("prepend")


def theirs(source: str, messages: list[dict[str, str]], prompt: bool = False, **variables: Any) -> str:
    texts, _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=prompt, **variables)
    return str(texts[0])


def assistants(ids: list[int], mask: list[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each run of supervised ids."""
    runs: list[list[int]] = []
    for token, before, counts in zip(ids, [0, *mask], mask):
        if counts and not before:
            runs.append([])
        if counts:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind."}
GOLDEN = {
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>",
    "qwen2.5": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n",
    "smollm2": "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n",
}
GENERATION = dict.fromkeys(GOLDEN, "<|im_start|>assistant\n")
GENERATION["llama3"] = "<|start_header_id|>assistant<|end_header_id|>\n\n"


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_the_text_of_each_template(name: str) -> None:
    template, tokenizer = CHAT_TEMPLATES[name], byte_level()
    assert template.text([USER, ANSWER]) == GOLDEN[name]
    prompt = template.text([USER, ANSWER, USER], add_generation_prompt=True)
    assert prompt.startswith(GOLDEN[name])
    assert prompt.endswith(GENERATION[name])
    with_system = template.text([SYSTEM, USER, ANSWER])
    assert with_system.count("system") == with_system.count("Be kind.") == 1
    ids, mask = render_conversation([USER, ANSWER], template, tokenizer)
    assert ids == tokenizer.encode_special(GOLDEN[name])
    assert tokenizer.decode(ids) == GOLDEN[name]
    assert assistants(ids, mask, tokenizer) == ["Hello" + template.stop[0]]


contents = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", " ", "\n\n", "Hello there.", "\n yes \n", "\u4f60\u597d \U0001f600", "\ue000\ue001\ue002"]),
    st.lists(st.sampled_from([*NAMES, "<", "|>", " ", "im_end", "a"]), max_size=5).map("".join),
)
conversations = st.tuples(st.none() | contents, st.lists(st.tuples(contents, contents), min_size=1, max_size=3)).map(
    lambda drawn: (
        [{"role": "system", "content": drawn[0]}] * (drawn[0] is not None)
        + [
            {"role": role, "content": content.encode("utf-8", "replace").decode()}
            for pair in drawn[1]
            for role, content in zip(("user", "assistant"), pair)
        ]
    )
)


@pytest.mark.parametrize("name", [*CHAT_TEMPLATES, "smollm2 in its GGUF"])
@pytest.mark.parametrize("tokenizer", [byte_level(), byte_level(split=False), sentencepiece(), BYTES])
@settings(max_examples=50, deadline=None, derandomize=True)
@given(messages=conversations)
def test_text_ids_and_mask(name: str, tokenizer: Tokenizer, messages: list[dict[str, str]]) -> None:
    template = CHAT_TEMPLATES.get(name) or ChatTemplate(name, SMOLLM2_IN_ITS_GGUF, eos_token="<|im_end|>")
    special = {"bos_token": template.bos_token, "eos_token": template.eos_token}
    text = theirs(template.source, messages, **special)
    assert template.text(messages) == text
    ids, mask = render_conversation(messages, template, tokenizer)
    assert len(ids) == len(mask)
    # No word of a message is special: the special ids are those of the same conversation of empty messages.
    bare = template.text([{**message, "content": ""} for message in messages])
    known = set(tokenizer.special_tokens.values())
    assert [i for i in ids if i in known] == [i for i in tokenizer.encode_special(bare) if i in known]
    if tokenizer.may_cut:
        assert tokenizer.decode(ids) == text
        said = [
            m["content"].strip() if name == "llama3" else m["content"] for m in messages if m["role"] == "assistant"
        ]
        end = "<|eot_id|>" if name == "llama3" else "<|im_end|>"
        assert assistants(ids, mask, tokenizer) == [each + end for each in said]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("tokenizer", [byte_level(), byte_level(split=False), sentencepiece(), BYTES])
@settings(max_examples=50, deadline=None, derandomize=True)
@given(messages=conversations)
def test_sampling_feeds_the_ids_of_training(name: str, tokenizer: Tokenizer, messages: list[dict[str, str]]) -> None:
    messages = [{**message, "content": message["content"].strip()} for message in messages]
    template = CHAT_TEMPLATES[name]
    ids, mask = render_conversation(messages, template, tokenizer)
    prompt, nothing = render_conversation(messages[:-1], template, tokenizer, add_generation_prompt=True)
    if tokenizer.may_cut:
        assert ids[: len(prompt)] == prompt
        assert mask[: len(prompt)] == nothing
        assert mask[len(prompt)] == 1
    assert 1 not in render_conversation(messages[:1], template, tokenizer, add_generation_prompt=True)[1]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(messages=conversations)
def test_ids_are_those_of_transformers(messages: list[dict[str, str]]) -> None:
    """Where no message names a special token, and none begins with spaces that would merge with the prompt's end."""
    messages = [{**m, "content": m["content"].replace("<", "(").strip()} for m in messages]
    tokenizer, template = byte_level(), CHAT_TEMPLATES["chatml"]
    backend = Backend.from_str(tokenizer.tokenizer_json)
    hugging = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template.source)
    expected = hugging.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert render_conversation(messages, template, tokenizer)[0] == expected


# ---- which words are the assistant's, whatever the template does

TEMPLATES_OF_ALL_KINDS = {
    "trims": "{% for m in messages %}[{{ m.role }}] {{ m.content|trim }}</s>\n{% endfor %}",
    "upper case": "{% for m in messages %}[{{ m.role }}] {{ m.content|trim|upper }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}",
    "looks inside": "{% for m in messages %}[{{ m.role }}] {% if m.content.startswith('H') %}H:{% endif %}"
    "{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}",
    "blocks": "{% for m in messages %}[{{ m.role }}] {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content|upper }}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}</s>{% endif %}\n{% endfor %}",
}
ANSWERS = {"upper case": "HELLO</s>", "looks inside": "H:Hello</s>", "blocks": "HELLO</s>"}


@pytest.mark.parametrize("name", TEMPLATES_OF_ALL_KINDS)
def test_answers_are_found_in_templates_of_all_kinds(name: str) -> None:
    template = ChatTemplate(name, TEMPLATES_OF_ALL_KINDS[name], eos_token="</s>")
    messages = [USER, {"role": "assistant", "content": " Hello\n"}, USER, ANSWER]
    if name == "looks inside":
        messages[1] = ANSWER
    for tokenizer in (byte_level(), BYTES):
        ids, mask = render_conversation(messages, template, tokenizer)
        assert tokenizer.decode(ids) == theirs(template.source, messages)
        found = assistants(ids, mask, tokenizer)
        expected = ANSWERS.get(name, "Hello</s>")
        assert found == ([" " + expected[:-4].strip() + "\n</s>", expected] if name == "blocks" else [expected] * 2)


def test_thoughts_that_a_template_drops_later_on() -> None:
    source = (
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}{% if m.role == 'assistant' and not loop.last %}"
        "{{ m.content.split('</think>')[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    answer = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello <|im_end|>"}
    ids, mask = render_conversation([USER, answer, USER, answer], ChatTemplate("x", source), byte_level())
    assert byte_level().decode(ids) == theirs(source, [USER, answer, USER, answer])
    found = assistants(ids, mask, byte_level())
    assert found == ["Hello <|im_end|><|im_end|>", "<think>\nhm\n</think>\n\nHello <|im_end|><|im_end|>"]


def test_an_answer_that_cannot_be_found_names_the_remedy() -> None:
    source = "{% for m in messages %}{{ m.content|upper if loop.last else m.content|length }};{% endfor %}"
    with pytest.raises(ValueError, match=r"chat template mine: .*put \{% generation %\}") as caught:
        render_conversation([USER, ANSWER, USER, ANSWER], ChatTemplate("mine", source), BYTES)
    assert "\n" not in str(caught.value)


def test_an_answer_that_ends_with_no_token_ends_with_its_text() -> None:
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    ids, mask = render_conversation([USER, ANSWER, USER], ChatTemplate("plain", source), BYTES)
    assert assistants(ids, mask, BYTES) == ["Hello"]


def test_a_token_that_holds_a_character_of_the_assistant_is_the_assistants() -> None:
    tokenizer = sentencepiece()
    source = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
    ids, mask = render_conversation(
        [USER, {"role": "assistant", "content": "cat"}], ChatTemplate("x", source), tokenizer
    )
    assert ids == tokenizer.encode_special("<s>user Hi</s><s>assistant cat</s>")
    assert assistants(ids, mask, tokenizer) == ["cat</s>"]  # its first token is "_cat", with the space in front


def test_names_within_names_are_broken() -> None:
    added = [*NAMES, "[A", "A]", "\u2588"]
    content = json.loads(byte_level().tokenizer_json)
    like = content["added_tokens"][0]
    content["added_tokens"] += [{**like, "id": 500 + n, "content": name} for n, name in enumerate(added[-3:])]
    tokenizer = BpeTokenizer(json.dumps(content))
    assert set(added) == set(tokenizer.special_tokens)
    messages = [{"role": "user", "content": "[A] \u2588 [[A]]"}, {"role": "assistant", "content": "\u2588A]"}]
    ids, mask = render_conversation(messages, CHAT_TEMPLATES["chatml"], tokenizer)
    assert tokenizer.decode(ids) == CHAT_TEMPLATES["chatml"].text(messages)
    assert assistants(ids, mask, tokenizer) == ["\u2588A]<|im_end|>"]
    ours = [tokenizer.special_tokens[name] for name in ("<|im_start|>", "<|im_end|>")]
    assert [token for token in ids if token in tokenizer.special_tokens.values()] == ours * 2


# ---- prompt templates and records


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("context", ["", "2 and 3 {instruction}"])
def test_as_jinja_renders_the_same_text(name: str, context: str) -> None:
    template, tokenizer = TEMPLATES[name], byte_level()
    users = [{"role": "user", "content": 'Add "it" %} {{ 1 }} {context}'}, USER]
    if context:
        users[0]["context"] = context
    messages = [SYSTEM, users[0], ANSWER, users[1], ANSWER]
    ids, mask = render_conversation(messages, template, tokenizer)
    source = as_jinja(template, "<|endoftext|>")
    assert tokenizer.decode(ids) == theirs(source, messages)
    assert tokenizer.decode(ids).startswith(
        "Be kind.\n\n" + template.prompt({"instruction": users[0]["content"], "context": context})
    )
    assert assistants(ids, mask, tokenizer) == [f"Hello{template.end}<|endoftext|>"] * 2
    assert render_conversation(messages, ChatTemplate(name, source), tokenizer) == (ids, mask)
    prompt, _ = render_conversation(messages[:-1], template, tokenizer, add_generation_prompt=True)
    assert prompt == ids[: len(prompt)]
    assert tokenizer.decode(prompt) == theirs(source, messages[:-1], prompt=True)


def test_records_are_conversations_of_two() -> None:
    record = {"instruction": "Add.", "context": "2 and 3", "response": "5", "category": ""}
    for template in (
        *TEMPLATES.values(),
        *CHAT_TEMPLATES.values(),
        ChatTemplate("x", as_jinja(TEMPLATES["dolly"], "<s>")),
    ):
        ids, mask = render_record(record, template, byte_level())
        prompt = render_prompt(record, template, byte_level())
        assert ids[: mask.index(1)] == prompt
        assert "2 and 3" in byte_level().decode(prompt)
    chat = [{"role": "user", "content": "Add.\n\n2 and 3"}, {"role": "assistant", "content": "5"}]
    expected = render_conversation(chat, CHAT_TEMPLATES["chatml"], BYTES)
    assert render_record(record, CHAT_TEMPLATES["chatml"], BYTES) == expected
    dolly = ChatTemplate("x", as_jinja(TEMPLATES["dolly"], "<|endoftext|>"))
    assert render_record(record, dolly, byte_level()) == render_record(record, TEMPLATES["dolly"], byte_level())


def test_prompts_begin_with_the_first_token_of_the_model() -> None:
    first = BpeTokenizer(byte_level().tokenizer_json, bos="<s>")
    for template in (None, TEMPLATES["dolly"]):
        assert render_prompt("Hi", template, first) == [first.bos_id, *render_prompt("Hi", template, byte_level())]
    ids, mask = render_conversation([USER, ANSWER], TEMPLATES["dolly"], first)
    assert first.decode(ids) == theirs(as_jinja(TEMPLATES["dolly"], "<|endoftext|>", "<s>"), [USER, ANSWER])
    assert (ids[0], mask[0]) == (first.bos_id, 0)
    chatml = CHAT_TEMPLATES["chatml"]  # writes its own, which is none
    assert render_prompt("Hi", chatml, first) == render_prompt("Hi", chatml, byte_level())


@pytest.mark.parametrize(
    ("messages", "prompt", "message"),
    [
        ([ANSWER, USER], False, "takes turns of user and assistant, found 'assistant' as number 1 of 2"),
        ([USER, USER], False, "found 'user' as number 2 of 2"),
        ([USER, {"role": "tool", "content": "5"}], False, "found 'tool' as number 2"),
        ([USER, ANSWER], True, "nothing to answer"),
        ([SYSTEM], True, "nothing to answer"),
    ],
)
def test_prompt_templates_take_turns(messages: list[dict[str, str]], prompt: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_conversation(messages, TEMPLATES["dolly"], BYTES, add_generation_prompt=prompt)


def test_token_sets_are_written_through_chat_templates(tmp_path: Path) -> None:
    rows = [{"instruction": f"Add {n}.", "context": "" if n % 2 else "and one", "response": str(n)} for n in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    folder = str(tmp_path / "set")
    common = {"source": "jsonl", "input": (str(file),), "val_fraction": 0.0, "prompt_template": "chatml", "workers": 1}
    for tokenizer in ("byte", "bpe"):
        meta = prepare(PrepareSettings(**common, tokenizer=tokenizer, vocab_size=300, data_dir=folder + tokenizer))
        assert template_from_spec(meta["template"]) == CHAT_TEMPLATES["chatml"]
        stored = load_tokenizer(folder + tokenizer)
        expected = [render_record({**row, "category": ""}, CHAT_TEMPLATES["chatml"], stored) for row in rows]
        tokens = open_dataset(folder + tokenizer, "train")
        starts = tokens.document_starts.tolist()
        written = [(tokens.tokens(a, b).tolist(), tokens.mask(a, b).tolist()) for a, b in pairwise(starts)]
        assert written == expected


def test_documents_begin_with_the_first_token_of_the_model() -> None:
    first = BpeTokenizer(byte_level().tokenizer_json, bos="<s>")
    items = [Item("train", "Hello", ends=False), Item("train", " there", begins=False), Item("train", "Hi")]
    for tokenizer, bos in ((first, [first.bos_id]), (byte_level(), [])):
        encoded = Encoder(tokenizer, None)(items)
        parts = [[*bos, *tokenizer.encode("Hello")], tokenizer.encode(" there"), [*bos, *tokenizer.encode("Hi")]]
        assert encoded.ids.tolist() == parts[0] + [*parts[1], tokenizer.eot_id] + [*parts[2], tokenizer.eot_id]
        assert [part[2] for part in encoded.parts] == [len(parts[0]), len(parts[1]) + 1, len(parts[2]) + 1]


def test_settings_load_neither_numpy_nor_jinja() -> None:
    program = "import sys, data.settings; print(sorted({'numpy', 'jinja2', 'tokenizers'} & set(sys.modules)))"
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True).stdout == "[]\n"


# ---- specifications, stop tokens, messages


def test_a_spec_is_json_and_rebuilds_the_template() -> None:
    for name, template in CHAT_TEMPLATES.items():
        spec = json.loads(json.dumps(template.spec()))
        assert template_from_spec(spec) == template == get_template(name)
        for wrong in ({**spec, "kind": "x"}, {**spec, "more": ""}, {**spec, "source": 3}, {**spec, "stop": "abc"}):
            with pytest.raises(ValueError, match="prompt template: has the kind"):
                template_from_spec(wrong)


def test_stop_ids() -> None:
    tokenizer = byte_level()
    special = tokenizer.special_tokens
    assert stop_ids(None, tokenizer) == stop_ids(TEMPLATES["dolly"], tokenizer) == (tokenizer.eot_id,)
    assert stop_ids(CHAT_TEMPLATES["llama3"], tokenizer) == (special["<|eot_id|>"], tokenizer.eot_id)
    assert stop_ids(CHAT_TEMPLATES["chatml"], tokenizer) == (special["<|im_end|>"], tokenizer.eot_id)
    assert stop_ids(CHAT_TEMPLATES["chatml"], BYTES) == (BYTES.eot_id,), "ten bytes are no stop token"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "here: expected a list of messages with role and content, found an empty list"),
        ("Hi", "found str"),
        (["Hi"], r"here\[0\]: expected an object with role and content, found str"),
        ([USER, {"role": "user"}], r"here\[1\]: has the fields 'role', expected"),
        ([{**USER, "tool_calls": []}], "has the fields 'content', 'role', 'tool_calls'"),
        ([{**ANSWER, "context": "x"}], "has the fields 'content', 'context', 'role'"),
        ([{"role": "human", "content": ""}], r"role 'human', expected one of system, user, assistant, tool"),
        ([{"role": ["user"], "content": ""}], r"role \['user'\]"),
        ([{"role": "user", "content": None}], "its content is NoneType, expected text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "its content is list, expected text"),
        ([{**USER, "context": 5}], "its context is int, expected text"),
    ],
)
def test_what_is_no_conversation_is_named_in_one_line(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_messages(messages, "here")
    assert "\n" not in str(caught.value)
    assert check_messages([USER, ANSWER]) == [USER, ANSWER]
