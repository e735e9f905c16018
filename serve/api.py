"""OpenAI's wire format of chat completions: requests read and checked, answers and errors put into its shapes.

Fields that change nothing here may be given with the value that means so; any other is refused by name, so that nobody
believes it has an effect.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

from data.chat import Message, check_messages
from evaluation.compare import Sampling
from training.settings import nearest

# Ours by OpenAI's name; the last two are our own.
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "seed": "seed",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
}
_WHOLE = ("max_tokens", "max_completion_tokens", "seed", "top_k")
_READ = ("model", "messages", "stop", "stream", "stream_options", *_SAMPLING)
_IDLE = ("user", "metadata", "store", "safety_identifier", "service_tier", "prompt_cache_key")  # about accounts
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_MAX_STOPS, _MAX_STOP = 4, 200  # as many as OpenAI takes, each of so many characters


class ApiError(Exception):
    """A request that is refused, in OpenAI's shape."""

    def __init__(
        self,
        message: str,
        status: HTTPStatus = HTTPStatus.BAD_REQUEST,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class ChatRequest:
    """What one completion is asked to be."""

    model: str
    messages: list[Message]
    sampling: Sampling
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False


def read_request(body: bytes, defaults: Sampling) -> ChatRequest:
    """The request in a body of JSON; `defaults` is what it does not say. Raises ApiError naming the field."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError("the body is not JSON") from None
    if not isinstance(given, dict):
        raise ApiError("the body is not a JSON object")
    given = {name: value for name, value in given.items() if value is not None}  # null: as if it were not there
    _refuse_others(given)
    if not isinstance(given.get("model"), str):
        raise ApiError("model: expected the name of one, see /v1/models", param="model")
    stream = _typed(given, "stream", bool, False)
    options = _typed(given, "stream_options", dict, {})
    return ChatRequest(
        model=given["model"],
        messages=_messages(given.get("messages")),
        sampling=_sampling(given, defaults),
        stop=_stops(given.get("stop", [])),
        stream=stream,
        include_usage=bool(options.get("include_usage")),
    )


def _refuse_others(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            raise ApiError(f"{name} is not supported here: leave it out", param=name)
        if name not in (*_READ, *_IDLE, *_NEUTRAL):
            near = nearest(name, (*_READ, *_NEUTRAL))
            raise ApiError(f"unknown field {name!r:.60}.{near}", param=name[:60])


def _typed(given: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = given.get(name, default)
    if not isinstance(value, kind):
        raise ApiError(f"{name}: expected {kind.__name__}, found {type(value).__name__}", param=name)
    return value


def _messages(given: Any) -> list[Message]:
    """Checked, texts in parts joined, `developer` read as `system`; names of speakers are dropped."""
    if not isinstance(given, list):
        raise ApiError("messages: expected a list", param="messages")
    plain = []
    for message in given:
        if isinstance(message, dict):
            message = {name: value for name, value in message.items() if value is not None and name != "name"}
            message["content"] = _joined(message.get("content"))
            if message.get("role") == "developer":
                message["role"] = "system"
        plain.append(message)
    try:
        return check_messages(plain)
    except ValueError as error:
        raise ApiError(str(error), param="messages") from None


def _joined(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
        raise ApiError("messages: a content in parts may hold text only", param="messages")
    return "".join(part["text"] for part in content)


def _sampling(given: dict[str, Any], defaults: Sampling) -> Sampling:
    if "max_tokens" in given and "max_completion_tokens" in given:
        raise ApiError("max_tokens and max_completion_tokens are the same: give one", param="max_tokens")
    changes: dict[str, Any] = {}
    for name, ours in _SAMPLING.items():
        if name not in given:
            continue
        value = given[name]
        if isinstance(value, bool) or not isinstance(value, int if name in _WHOLE else (int, float)):
            raise ApiError(f"{name}: expected a {'whole ' if name in _WHOLE else ''}number", param=name)
        low, high = {"max_new_tokens": (1, 1 << 20), "seed": (-(1 << 63), 1 << 64)}.get(ours, (0, 1 << 20))
        if not (low <= value <= high and math.isfinite(value)) or (name == "top_p" and value > 1):
            raise ApiError(f"{name}: {value!r:.40} is out of range", param=name)
        changes[ours] = value
    if changes.get("repetition_penalty") == 0:
        raise ApiError("repetition_penalty: expected a number above 0 (1 = off)", param="repetition_penalty")
    return replace(defaults, **changes)


def _stops(given: Any) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) and 0 < len(stop) <= _MAX_STOP for stop in stops):
        raise ApiError(f"stop: expected a text or a list of texts of 1 to {_MAX_STOP} characters", param="stop")
    if len(stops) > _MAX_STOPS:
        raise ApiError(f"stop: {len(stops)} texts; at most {_MAX_STOPS}", param="stop")
    return tuple(stops)


def model_list(names: list[str], started: int) -> dict[str, Any]:
    """The answer to /v1/models."""
    models = [{"id": name, "object": "model", "created": started, "owned_by": "espalier"} for name in names]
    return {"object": "list", "data": models}


class Reply:
    """The shapes of one completion: whole, or in chunks."""

    def __init__(self, number: int, model: str) -> None:
        self.common = {"id": f"chatcmpl-{number}", "created": int(time.time()), "model": model}

    def whole(self, text: str, finish: str, usage: dict[str, int]) -> dict[str, Any]:
        """The answer at once."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return {"object": "chat.completion", **self.common, "choices": [choice], "usage": usage}

    def chunk(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        """A piece of it."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {"object": "chat.completion.chunk", **self.common, "choices": [choice]}

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last chunk, where it was asked for."""
        return {"object": "chat.completion.chunk", **self.common, "choices": [], "usage": usage}
