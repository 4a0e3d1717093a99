"""OpenAI's requests and errors, as far as they are served (https://platform.openai.com/docs/api-reference)."""

from __future__ import annotations

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


class ApiError(Exception):
    """An answer in OpenAI's shape of errors, with its HTTP status."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"Retry-After": "1"} if status in (429, 503) else None
        kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}


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


class TextRequest(Request):
    prompt: str | list[int] | Annotated[list[str], Field(min_length=1, max_length=1)]

    def tokens(self, encode: Callable[[str], list[int]]) -> list[int]:
        """Token ids of the prompt."""
        if isinstance(self.prompt, str):
            return encode(self.prompt)
        return [token for item in self.prompt for token in (encode(item) if isinstance(item, str) else [item])]


R = TypeVar("R", bound=Request)


def parse(kind: type[R], body: bytes) -> R:
    """The request in a body of JSON. Raises ApiError 400 for what is none."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(map(str, first["loc"])) or None
        raise ApiError(400, f"{param or 'body'}: {first['msg']}", param=param) from error
    for name, value in (request.model_extra or {}).items():
        if value is not None and value not in REFUSED.get(name, (value,)):
            accepted = REFUSED[name][0] if REFUSED[name] else None
            raise ApiError(400, f"{name}={value!r}: accepted is {accepted!r}", "unsupported_parameter", name)
    return request
