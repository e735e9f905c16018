"""The tokenizer and chat template of a folder: which files say what, and what is missing."""

import json

import pytest

from data.chat import ChatTemplate
from data.tokenizer import load_tokenizer
from formats.errors import FormatError
from formats.hf_read import read_hf_tokenizer, read_huggingface
from tests.foreign_models import BEGIN, CHATML, END_OF_TEXT, END_OF_TURN, make_foreign, make_tokenizer


@pytest.fixture
def folder(tmp_path):
    """A tokenizer alone, with the two old ways of telling what transformers 5 writes otherwise."""
    make_tokenizer(chat_template=None).save_pretrained(tmp_path)
    put(tmp_path, "tokenizer_config.json", eos_token=END_OF_TEXT)
    return tmp_path


def put(folder, name, **values):
    (folder / name).write_text(json.dumps(values))


def test_without_anything_else_the_usual_names_are_taken(folder):
    (folder / "tokenizer_config.json").unlink()
    tokenizer, template = read_hf_tokenizer(folder)
    assert (tokenizer.eot_id, tokenizer.bos_id, template) == (0, None, None)


@pytest.mark.parametrize(
    "generation, config, settings, expected, stop",
    [
        ([3, 0], 0, END_OF_TEXT, 3, (END_OF_TURN, END_OF_TEXT)),
        (0, 3, END_OF_TURN, 0, (END_OF_TEXT, END_OF_TURN)),
        (None, [0, 3], None, 0, (END_OF_TEXT, END_OF_TURN)),
        (None, 3, END_OF_TEXT, 3, (END_OF_TURN, END_OF_TEXT)),
        (None, None, END_OF_TURN, 3, (END_OF_TURN,)),
        ([250, 3], None, None, 3, (END_OF_TURN,)),  # 250 is an ordinary token
        (None, None, None, 0, ()),
    ],
)
def test_where_the_model_stops(folder, generation, config, settings, expected, stop):
    put(folder, "generation_config.json", eos_token_id=generation)
    put(folder, "config.json", eos_token_id=config)
    put(folder, "tokenizer_config.json", eos_token=settings, chat_template=CHATML)
    tokenizer, template = read_hf_tokenizer(folder)
    assert tokenizer.eot_id == expected and template.stop == stop
    assert template.eos_token == (settings or "")


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("flag, expected", [(None, "file"), (True, 1), (False, None)])
def test_what_begins_a_text(tmp_path, in_file, flag, expected):
    make_tokenizer(bos=in_file).save_pretrained(tmp_path)
    settings = {"bos_token": {"content": BEGIN, "lstrip": False}, "eos_token": END_OF_TEXT}
    put(tmp_path, "tokenizer_config.json", **settings, **({} if flag is None else {"add_bos_token": flag}))
    tokenizer, template = read_hf_tokenizer(tmp_path)
    assert tokenizer.bos_id == ((1 if in_file else None) if expected == "file" else expected)
    assert template.bos_token == BEGIN


def test_a_chat_template_may_lie_in_three_files(folder):
    def source():
        template = read_hf_tokenizer(folder)[1]
        return template and template.source

    assert source() is None
    put(folder, "chat_template.json", chat_template="third")
    assert source() == "third"
    put(folder, "tokenizer_config.json", eos_token=END_OF_TEXT, chat_template="second")
    assert source() == "second"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    put(folder, "tokenizer_config.json", eos_token=END_OF_TEXT, chat_template=named)
    assert source() == "plain"
    (folder / "chat_template.jinja").write_text("first")
    assert source() == "first"


def test_a_template_renders_as_in_transformers(tmp_path):
    theirs = make_tokenizer(bos=True, chat_template="{{ bos_token }}" + CHATML + "{{ eos_token }}")
    theirs.save_pretrained(tmp_path)
    template = read_hf_tokenizer(tmp_path)[1]
    assert isinstance(template, ChatTemplate)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert template.text(talk) == theirs.apply_chat_template(talk, tokenize=False)


@pytest.mark.parametrize(
    "name, values, message",
    [
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "rag", "template": "x"}]},
            "named rag, expected one named",
        ),
        ("tokenizer_config.json", {"chat_template": 3}, "chat_template is a JSON int"),
        ("chat_template.json", {"chat_template": {"a": "b"}}, "chat_template is a JSON dict"),
        ("tokenizer_config.json", {"eos_token": 5}, "eos_token is 5, expected text"),
        ("tokenizer_config.json", {"bos_token": ["a"]}, "bos_token is .*expected text"),
        ("tokenizer_config.json", {"bos_token": "<x>", "add_bos_token": True}, "'<x>'"),
        ("tokenizer_config.json", {"add_bos_token": "yes"}, "add_bos_token is yes, expected true or false"),
        ("generation_config.json", {"eos_token_id": "0"}, "eos_token_id is 0, expected an id or a list"),
        ("generation_config.json", {"eos_token_id": [None]}, "eos_token_id is"),
        ("tokenizer.json", {}, "tokenizer.json: no"),
        ("tokenizer.json", {"added_tokens": []}, "not a tokenizer.json that can be read"),
        ("tokenizer.json", {"added_tokens": [{"id": []}]}, "tokenizer.json: no"),
        ("tokenizer.json", {"added_tokens": [{"id": [], "special": True, "content": ""}]}, "tokenizer.json: no"),
    ],
)
def test_damage_is_one_line(folder, name, values, message):
    put(folder, name, **values)
    with pytest.raises(FormatError, match=message) as caught:
        read_hf_tokenizer(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_gpt2_s_first_two_files(tmp_path):
    """vocab.json and merges.txt, before there was a tokenizer.json."""
    from transformers import AutoTokenizer

    from formats.tokenizer_json import to_tokenizer_json

    gpt2 = load_tokenizer("gpt2")
    model = json.loads(to_tokenizer_json(gpt2))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps({**model["vocab"], END_OF_TEXT: 50256}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    with pytest.raises(FormatError, match=r"holds vocab.json, expected a tokenizer.json"):
        read_hf_tokenizer(tmp_path)  # of which family? it says how text is split
    put(tmp_path, "config.json", model_type="gpt2", vocab_size=50257)
    tokenizer, template = read_hf_tokenizer(tmp_path)
    assert tokenizer.fingerprint == gpt2.fingerprint and template is None and tokenizer.eot_id == 50256
    text = "Hello  world's \N{GRINNING FACE} 12345\n\n don't<|endoftext|>"
    assert tokenizer.encode(text) == gpt2.encode(text)
    assert tokenizer.encode_special(text) == AutoTokenizer.from_pretrained(tmp_path)(text).input_ids
    (tmp_path / "merges.txt").write_text("#version: 0.2\nno such")
    with pytest.raises(FormatError, match=r"no vocabulary of merges\.txt"):
        read_hf_tokenizer(tmp_path)


def test_a_model_without_a_tokenizer_is_read_only_if_its_vocabulary_is_gpt2_s(tmp_path):
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16}
    make_foreign("gpt2", vocab_size=50257, **sizes).save_pretrained(tmp_path / "gpt2")
    payload = read_huggingface(tmp_path / "gpt2")
    assert payload["tokenizer"]["kind"] == "gpt2" and "GPT-2's is taken" in payload["notes"][0]
    make_foreign("gpt2", **sizes).save_pretrained(tmp_path / "other")
    with pytest.raises(FormatError, match=r"no tokenizer, expected a tokenizer.json: write one with"):
        read_huggingface(tmp_path / "other")
