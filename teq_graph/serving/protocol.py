"""OpenAI's requests and errors, as far as they are served (https://platform.openai.com/docs/api-reference)."""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

REFUSED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
}
"""Fields that would change the result and are not implemented, with the values that ask for nothing."""


SAME_NAME = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
OPTIONS: Mapping[str, str] = {
    **{name: name for name in (*SAME_NAME, "seed")},
    "max_tokens": "max_new_tokens",
    "stop": "stop_strings",
}
"""Fields of a request -> the options of `OnnxDecoder.generate` that they are."""


_NUMBER = "a number"
_INTEGER = "an integer"
ACCEPTED: Mapping[str, str] = {
    "model": "a string",
    "stream": "true and false",
    "stream_options": '{"include_usage": true} and {"include_usage": false}',
    "include_usage": "true and false",
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "top_k", "seed"), _INTEGER),
    **dict.fromkeys(("temperature", "top_p", "min_p"), _NUMBER),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), _NUMBER),
    "stop": "a string, or a list of up to 4",
    "messages": 'a list of at least one {"role": …, "content": …}',
    "role": "a string",
    "content": 'a string, or a list of {"type": "text", "text": …}',
    "type": '"text"',
    "text": "a string",
    "prompt": "a string, a list of token ids, or a list of either",
}
"""What each field of a request may be, as its refusal says it."""


class ApiError(Exception):
    """An answer in OpenAI's shape of errors, with its HTTP status.

    Clients of OpenAI ask again by themselves after 408, 409, 429 and from 500 on, unless they are told otherwise.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = _HEADERS.get(status)
        kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": "1"},
    500: {"X-Should-Retry": "false"},
    503: {"Retry-After": "1"},
    504: {"X-Should-Retry": "false"},
}


class Strict(BaseModel):
    """Takes a number for a number, and nothing else for it."""

    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(Strict):
    include_usage: bool = False


class Request(Strict):
    """What both kinds of completion take; what is not named here is either refused (`REFUSED`) or of no effect."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: int | None = None

    def options(self) -> dict[str, Any]:
        """The options of `OnnxDecoder.generate` that are asked for."""
        return {ours: value for name, ours in OPTIONS.items() if (value := getattr(self, name)) not in (None, [])}

    def named(self, message: str) -> tuple[str, str | None]:
        """What the runtime says of an option, under the name that the request gave it; and that name."""
        option, is_option, rest = message.partition("=")
        name = next((theirs for theirs, ours in self._names() if is_option and ours == option), None)
        return (message, None) if name is None else (f"{name}={rest}", name)

    def _names(self) -> list[tuple[str, str]]:
        return list(OPTIONS.items())


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    role: str
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class ChatRequest(Request):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None

    def options(self) -> dict[str, Any]:
        count = self.max_completion_tokens
        return super().options() if count is None else {**super().options(), "max_new_tokens": count}

    def _names(self) -> list[tuple[str, str]]:
        new = [] if self.max_completion_tokens is None else [("max_completion_tokens", "max_new_tokens")]
        return [*new, *super()._names()]


class TextRequest(Request):
    prompt: str | list[str] | list[int] | list[list[int]]

    def prompts(self, encode: Callable[[str], list[int]]) -> list[Callable[[], list[int]]]:
        """What makes the token ids of each prompt."""
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or not prompt or isinstance(prompt[0], int)
        prompts: list[str | list[int]] = [prompt] if is_one else prompt
        return [
            functools.partial(encode, item) if isinstance(item, str) else functools.partial(list[int], item)
            for item in prompts
        ]


R = TypeVar("R", bound=Request)


def parse(kind: type[R], body: bytes) -> R:
    """The request in a body of JSON. Raises ApiError 400 for what is none."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _refused(error) from error
    for name, value in (request.model_extra or {}).items():
        if value is not None and value not in REFUSED.get(name, (value,)):
            accepted = f"accepted is {REFUSED[name][0]!r}" if REFUSED[name] else "it is not implemented"
            raise ApiError(400, f"{name}={_shown(value)}: {accepted}", "unsupported_parameter", name)
    return request


def _refused(error: ValidationError) -> ApiError:
    """The first field that is wrong: what it was, and what is accepted."""
    first = error.errors(include_url=False)[0]
    fields: list[int | str] = []
    for part in first["loc"]:
        # A field of several types is followed by the type that was tried.
        if isinstance(part, str) and part not in ACCEPTED:
            break
        fields.append(part)
    name = ".".join(map(str, fields))
    if first["type"] == "json_invalid":
        return ApiError(400, f"body: {first['msg']}")
    if not name:
        return ApiError(400, f"body: {_shown(first['input'])}; accepted is an object in JSON")
    accepted = next(ACCEPTED[field] for field in reversed(fields) if isinstance(field, str))
    given = ": missing" if first["type"] == "missing" else f"={_shown(first['input'])}"
    return ApiError(400, f"{name}{given}; accepted is {accepted}", param=name)


def _shown(value: object) -> str:
    return " ".join(reprlib.repr(value).split())
