"""How a sequence is continued: the options of `transformers.GenerationConfig` that decide about its tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from teq_graph.errors import InputError
from teq_graph.onnx.runtime import arguments

DEFAULT_NEW_TOKENS = 128

SAMPLED_BY = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Options without effect on greedy decoding: giving one asks for sampling."""

NEUTRAL: Mapping[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "encoder_repetition_penalty": 1.0,
    **dict.fromkeys(("sequence_bias", "exponential_decay_length_penalty", "guidance_scale"), None),
    **dict.fromkeys(("watermarking_config", "penalty_alpha", "dola_layers", "max_time", "top_h"), None),
    **dict.fromkeys(("constraints", "force_words_ids"), None),
}
"""Options of transformers that would change the tokens and are not implemented, at the values where they do not."""


def is_neutral(name: str, value: Any) -> bool:
    """Whether an option of `NEUTRAL` asks for nothing: not set, at its neutral value, or empty where that is None."""
    neutral = NEUTRAL[name]
    return value is None or bool(value == neutral) or (neutral is None and value in (0, [], {}))


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """Names, meanings and defaults of `transformers.GenerationConfig`.

    max_new_tokens: tokens at most; None leaves it to `max_length` (of prompt and new tokens), or is 128.
    min_new_tokens, min_length: tokens before which no end token is chosen; `min_length` counts the prompt's, too.
    do_sample: False takes the most likely token; None samples where an option of sampling is given, and `temperature`
        is not 0.
    temperature: samples from softmax(logits / temperature).
    top_k: keeps the k most likely tokens; 0 all.
    top_p: then keeps the smallest set that holds this probability (nucleus sampling, arXiv 1904.09751).
    min_p: then keeps tokens at least this share as likely as the likeliest (arXiv 2407.01082).
    typical_p: then keeps those whose information is nearest to the expected, of this probability (arXiv 2202.00666).
    epsilon_cutoff, eta_cutoff: then keep tokens from this probability on, absolute, or relative to the entropy
        (arXiv 2210.15191).
    repetition_penalty: divides positive logits of tokens that were there, the prompt's too, and multiplies negative
        ones (arXiv 1909.05858). From 0.001 to 1000, where such tokens are all but certain or never come, and no
        logit in float32 leaves the range of numbers.
    presence_penalty, frequency_penalty: lower the logits of new tokens, once and by their count, as OpenAI's API has
        it.
    no_repeat_ngram_size: no run of this many tokens comes twice; 0 allows all.
    suppress_tokens: tokens that never come.
    begin_suppress_tokens: tokens that do not come first.
    bad_words_ids: words that never come, each of one token.
    forced_bos_token_id, forced_eos_token_id: the token that comes after a prompt of one token, as an encoder-decoder's
        is, and that which comes last where nothing has ended the sequence before.
    eos_token_id: token or tokens before which a sequence ends; None: the model's.
    stop_strings: text before which a sequence ends.
    prompt_lookup_num_tokens: how many tokens are guessed at a time from the text before, for a sequence by itself:
        faster where text is copied or repeats. They stay as far as they are what is chosen anyway, up to the
        rounding of logits that are computed together. 0 or None: none.
    seed: of sampling; the same one gives the same tokens for the same logits.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    do_sample: bool | None = None
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int], ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    eos_token_id: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    prompt_lookup_num_tokens: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                object.__setattr__(self, field.name, _CHECKS[field.name](field.name, value))

    def tokens(self) -> dict[str, tuple[int, ...]]:
        """The tokens that options name."""
        forced = ("forced_bos_token_id", "forced_eos_token_id")
        return {
            **{name: getattr(self, name) or () for name in ("suppress_tokens", "begin_suppress_tokens")},
            "bad_words_ids": tuple(token for (token,) in self.bad_words_ids),
            "eos_token_id": self.eos_token_id or (),
            **{name: () if (token := getattr(self, name)) is None else (token,) for name in forced},
        }

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return bool(self.do_sample) and self.temperature > 0

    def changed(self, **options: Any) -> GenerationOptions:
        """These options with others in their place. Raises InputError for a name or a value that there is not."""
        names = [field.name for field in dataclasses.fields(self)]
        for name, value in options.items():
            if name in NEUTRAL:
                if not is_neutral(name, value):
                    raise InputError(f"{name}={value!r}: accepted is {NEUTRAL[name]}")
            elif name not in names:
                raise InputError(f"option {name!r}: accepted are {', '.join(names)}")
        given = {name: value for name, value in options.items() if name in names}
        if given.get("do_sample") is None and not given.keys().isdisjoint(SAMPLED_BY):
            given["do_sample"] = True
        if given.get("max_length") is not None:
            given.setdefault("max_new_tokens", None)
        return dataclasses.replace(self, **given)

    def with_config(self, config: Any) -> GenerationOptions:
        """These options with what a `GenerationConfig`, or a mapping of its fields, sets.

        Raises InputError where it asks for what is not implemented.
        """
        content = config if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
        if not isinstance(content, Mapping) or (config is not None and not content):
            raise InputError(f"generation_config={config!r}: accepted are a GenerationConfig and a mapping")
        known = {field.name for field in dataclasses.fields(self)} | set(NEUTRAL)
        given = {name: value for name, value in content.items() if name in known and value is not None}
        # A configuration that does not say so does not sample, whatever else it sets.
        return self.changed(**{"do_sample": bool(self.do_sample), **given})

    def new_tokens(self, prompt: int) -> int:
        """How many tokens may follow a prompt of so many."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return DEFAULT_NEW_TOKENS if self.max_length is None else max(0, self.max_length - prompt)


# ---------------------------------------------------------------------------------------------------------- checks

Check = Callable[[str, Any], Any]


def _integer(least: int, accepted: str = "") -> Check:
    return lambda name, value: arguments.integer(name, value, least, accepted)


def _real(accepted: str, accepts: Callable[[float], bool]) -> Check:
    return lambda name, value: arguments.real(name, value, accepted, accepts)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name}={value!r}: accepted are True and False")
    return bool(value)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    is_one = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return tuple(arguments.tokens(name, [value] if is_one else () if value is None else value))


def _words(name: str, value: Any) -> tuple[tuple[int], ...]:
    words = [arguments.tokens(name, word) for word in (() if value is None else value)]
    if longer := [word for word in words if len(word) != 1]:
        raise InputError(f"{name}={longer[0]}: accepted are words of one token")
    return tuple((token,) for (token,) in words)


def _token(name: str, value: Any) -> int:
    found = _token_ids(name, value)
    if len(found) != 1:
        raise InputError(f"{name}={value!r}: accepted is one token id")
    return found[0]


def _strings(name: str, value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else () if value is None else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) and item for item in items):
        raise InputError(f"{name}={value!r}: accepted is a string that is not empty, or a list of them")
    return tuple(items)


_SHARE = _real("numbers above 0, up to 1", lambda value: 0.0 < value <= 1.0)
_CUTOFF = _real("numbers from 0 up to, not including, 1", lambda value: 0.0 <= value < 1.0)
_PENALTY = _real("numbers from -2 to 2", lambda value: -2.0 <= value <= 2.0)

_CHECKS: Mapping[str, Check] = {
    "max_new_tokens": _integer(0),
    "max_length": _integer(1),
    "min_new_tokens": _integer(0),
    "min_length": _integer(0),
    "do_sample": _boolean,
    "temperature": _real("finite numbers >= 0 (0 is greedy)", lambda value: 0.0 <= value < float("inf")),
    "top_k": _integer(0, "integers >= 0 (0 keeps all tokens)"),
    "top_p": _SHARE,
    "min_p": _real("numbers from 0 to 1", lambda value: 0.0 <= value <= 1.0),
    "typical_p": _SHARE,
    "epsilon_cutoff": _CUTOFF,
    "eta_cutoff": _CUTOFF,
    "repetition_penalty": _real("numbers from 0.001 to 1000", lambda value: 1e-3 <= value <= 1e3),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "no_repeat_ngram_size": _integer(0),
    "suppress_tokens": _token_ids,
    "begin_suppress_tokens": _token_ids,
    "bad_words_ids": _words,
    "forced_bos_token_id": _token,
    "forced_eos_token_id": _token,
    "eos_token_id": _token_ids,
    "stop_strings": _strings,
    "prompt_lookup_num_tokens": _integer(0),
    "seed": _integer(0),
}
