"""Conversations: what the model reads at each turn, how an answer ends, what is forgotten, what the terminal shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import sample as script
from data.chat import CHAT_TEMPLATES, render_conversation
from data.templates import TEMPLATES
from evaluation.chat import Chat, converse, pieces
from evaluation.compare import Sampling
from evaluation.settings import SampleSettings
from formats.open_model import OpenModel, open_model
from model.generate import generate
from tests.foreign_models import save_foreign
from tests.scripts import one_line_error, run_main
from tests.tiny_checkpoints import save_tiny

ROOT = Path(__file__).resolve().parent.parent
GREEDY = Sampling(max_new_tokens=8, temperature=0.0)


@pytest.fixture
def opened(tmp_path: Path) -> OpenModel:
    return open_model(save_tiny(tmp_path / "m.pt", template="dolly", block_size=256))


def test_each_turn_reads_the_whole_conversation_as_the_template_writes_it(opened: OpenModel) -> None:
    chat = Chat(opened, GREEDY, system="Be brief.")
    first = "".join(chat.reply("Why?"))
    second = "".join(chat.reply("And then?"))
    expected = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    for answer, follow_up in ((first, "And then?"), (second, None)):
        ids, _ = render_conversation(expected, TEMPLATES["dolly"], opened.tokenizer, add_generation_prompt=True)
        (alone,) = generate(opened.model, [ids], max_new_tokens=8, temperature=0.0, stop_ids=opened.stop_ids)
        assert answer == opened.tokenizer.decode(alone)
        expected.append({"role": "assistant", "content": answer.strip()})
        if follow_up:
            expected.append({"role": "user", "content": follow_up})
    assert chat.messages() == expected


def test_an_answer_ends_at_any_stop_token_of_the_model(tmp_path: Path) -> None:
    save_foreign("smollm2", tmp_path / "model")
    opened = open_model(tmp_path / "model")
    ends = {opened.tokenizer.special_tokens[name] for name in ("<|im_end|>", "<|endoftext|>")}
    assert ends <= set(opened.stop_ids), "the end of a turn and the end of text"
    forward = opened.model.forward
    for stop in ends:

        def certain(*args: Any, stop: int = stop, **kwargs: Any) -> Any:
            logits = forward(*args, **kwargs)
            logits[..., stop] = 1e9
            return logits

        with mock.patch.object(opened.model, "forward", certain):
            assert list(Chat(opened, GREEDY).reply("Hello")) == []


def test_the_oldest_exchanges_go_when_the_context_is_full_the_system_message_stays(tmp_path: Path) -> None:
    opened = open_model(save_tiny(tmp_path / "m.pt", template="dolly", block_size=160))
    chat = Chat(opened, GREEDY, system="S" * 10)
    shown: list[str] = []
    converse(chat, ["question number one?", "number two?", "number three?", "number four?"], shown.append)
    assert chat.forgotten >= 1 and chat.messages()[0]["content"] == "S" * 10
    assert chat.messages()[1]["role"] == "user" and "one" not in chat.messages()[1]["content"]
    ids, _ = render_conversation(chat.messages(), TEMPLATES["dolly"], opened.tokenizer)
    assert len(ids) <= 160 + 8
    assert f"(the first {chat.forgotten} exchanges no longer fit the context)" in "".join(shown)


def test_stopping_an_answer_keeps_what_was_said(opened: OpenModel) -> None:
    chat = Chat(opened, Sampling(max_new_tokens=20, temperature=0.0))
    whole = "".join(chat.reply("Hello"))
    chat.reset()
    seen: list[str] = []

    def write(text: str) -> None:
        seen.append(text)
        if len(seen) == 4:  # the help line, then three pieces
            raise KeyboardInterrupt

    converse(chat, ["Hello"], write)
    said = chat.messages()[-1]
    assert said["role"] == "assistant" and said["content"] == "".join(seen[1:4]).strip()
    assert whole.startswith("".join(seen[1:4])) and " (stopped)" in seen


def test_what_a_template_puts_after_an_answer_is_not_said_twice(tmp_path: Path) -> None:
    opened = open_model(save_tiny(tmp_path / "m.pt", template="zh_code"))
    chat = Chat(opened, GREEDY)
    with mock.patch("evaluation.chat.stream", lambda *args, **kwargs: opened.tokenizer.encode("print(1)\n```")):
        assert "".join(chat.reply("Print one.")) == "print(1)\n```"
    assert chat.messages()[-1]["content"] == "print(1)"


def test_commands_of_the_conversation(opened: OpenModel) -> None:
    chat, shown = Chat(opened, GREEDY), []
    converse(chat, ["Hello", "/reset", "", "/system Rhyme.", "Hi", "/exit", "never read"], shown.append)
    assert [message["content"] for message in chat.messages()][:2] == ["Rhyme.", "Hi"] and len(chat.messages()) == 3
    assert shown.count("(new conversation)\n") == 2


def test_pieces_are_whole_characters() -> None:
    from data.tokenizer import ByteTokenizer

    tokenizer, text = ByteTokenizer(), "né 木 🌳"
    found = list(pieces(tokenizer, tokenizer.encode(text)))
    assert found == list(text)
    assert list(pieces(tokenizer, tokenizer.encode("木")[:2])) == ["�"]


def test_the_template_can_be_named_and_must_be_there(tmp_path: Path) -> None:
    bare = open_model(save_tiny(tmp_path / "m.pt"))
    for name in ("auto", "none"):
        with pytest.raises(ValueError, match=r"m\.pt: chatting needs a prompt template.*--prompt_template"):
            Chat(bare, GREEDY, name)
    assert Chat(bare, GREEDY, "chatml").template is CHAT_TEMPLATES["chatml"]


def test_chat_takes_one_checkpoint_and_no_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny(tmp_path / "m.pt", template="dolly")

    def fails(*words: object) -> str:
        return one_line_error(run_main(capsys, script.main, SampleSettings, "--chat", *words))

    assert "2 were given" in fails("--checkpoints", model, model)
    assert "--prompt does not go with it" in fails("--checkpoints", model, "--prompt", "Hi")
    assert "no such checkpoint" in fails("--checkpoints", tmp_path / "nowhere.pt")


def test_in_a_pipe(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "m.pt", template="dolly", block_size=256)
    command = [sys.executable, "sample.py", "--checkpoints", str(model), "--chat", "--max_new_tokens", "4"]
    done = subprocess.run(command, cwd=ROOT, input="Hello\n/exit\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("\n") >= 2, done.stderr
    assert "> " not in done.stdout.splitlines()[0] and "Traceback" not in done.stderr
