"""What a request may ask for, and how the rest is refused."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from ziphius.config.errors import BadInput
from ziphius.inference.params import Constraint, SamplingParams


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temprature": 1}, "unknown sampling option 'temprature'; did you mean 'temperature'?"),
        ({"max_new_tokens": 1}, "did you mean 'max_tokens'?"),
        ({"xyzzy": 1}, "known: allowed_token_ids, bad_words"),
        ({"n": 0}, "n = 0: use a whole number of at least 1"),
        ({"n": True}, "n = True"),
        ({"n": 1.5}, "n = 1.5"),
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": "hot"}, "temperature = 'hot': use a number"),
        ({"temperature": 10**400}, "use a smaller number"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"top_p": math.nan}, "top_p = nan"),
        ({"top_k": -2}, "top_k = -2"),
        ({"min_p": -0.1}, "min_p = -0.1"),
        ({"min_p": 1.01}, "min_p = 1.01"),
        ({"presence_penalty": 2.1}, "presence_penalty = 2.1: use -2 to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty = -3"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty = inf"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**63}, "from 0 to 9223372036854775807"),
        ({"stop": ""}, "stop = ''"),
        ({"stop": ["a", ""]}, "stop = ''"),
        ({"stop": [1]}, "stop = 1"),
        ({"stop": "\ud800"}, "not valid UTF-8"),
        ({"bad_words": [""]}, "bad_words = ''"),
        ({"stop_token_ids": [-1]}, "stop_token_ids = -1"),
        ({"stop_token_ids": "12"}, "stop_token_ids = '12': give a list"),
        ({"stop_token_ids": 12}, "stop_token_ids = 12: give a list"),
        ({"ignore_eos": 1}, "ignore_eos = 1: use true or false"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"min_tokens": -1}, "min_tokens = -1"),
        ({"min_tokens": 17}, "min_tokens = 17 is above max_tokens 16"),
        ({"logprobs": -2}, "logprobs = -2"),
        ({"prompt_logprobs": 0.5}, "prompt_logprobs = 0.5"),
        ({"logit_bias": [1]}, r"logit_bias = \[1\]"),
        ({"logit_bias": {"x": 1}}, "logit_bias = 'x'"),
        ({"logit_bias": {"²": 1}}, "logit_bias = '²'"),
        ({"logit_bias": {1: math.nan}}, "logit_bias of token 1 = nan"),
        ({"logit_bias": {1: "1"}}, "logit_bias of token 1 = '1'"),
        ({"allowed_token_ids": []}, "allow at least one"),
        ({"detokenize": False, "stop": "x"}, "need detokenize"),
        ({"detokenize": False, "bad_words": ["x"]}, "need detokenize"),
        ({"regex": "a", "grammar": "start: /a/"}, "regex and grammar: give one"),
        ({"regex": 3}, "regex = 3"),
        ({"json_schema": 3}, "json_schema = 3"),
        ({"json_schema": "{"}, "json_schema is no JSON: Expecting property name"),
        ({"json_schema": '{"a":' * 100_000}, "json_schema is no JSON"),
        ({"json_schema": {"a": object()}}, "json_schema is no JSON"),
    ],
)
def test_impossible_options_are_refused_in_one_line(options: Any, expected: str) -> None:
    with pytest.raises(BadInput, match=expected) as error:
        SamplingParams(**options)
    assert "\n" not in str(error.value)


def test_extremes_are_possible() -> None:
    SamplingParams(max_tokens=1, min_tokens=1, temperature=0, top_p=1, min_p=1)
    SamplingParams(temperature=1e300, top_p=1e-6, max_tokens=None, min_tokens=10**6)
    SamplingParams(seed=2**63 - 1, logprobs=-1, prompt_logprobs=0, presence_penalty=-2)


def test_lists_become_tuples_and_none_an_empty_one() -> None:
    params = SamplingParams(
        stop="end", stop_token_ids=[np.int64(3)], logit_bias={"7": 1, 8: -2.5}, top_k=-1
    )  # type: ignore[dict-item]
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3,)
    assert params.logit_bias == {7: 1.0, 8: -2.5}
    assert params.top_k == 0
    nothing: dict[str, Any] = dict.fromkeys(
        ("stop", "stop_token_ids", "logit_bias", "allowed_token_ids", "banned_token_ids"), None
    )
    assert SamplingParams(**nothing, bad_words=None) == SamplingParams()  # type: ignore[arg-type]


def test_parameters_are_values() -> None:
    params = SamplingParams(temperature=0.5, stop=["a"], json_schema={"type": "object"})
    assert replace(params, n=2) == replace(params, n=2) != params
    assert pickle.loads(pickle.dumps(params)) == params
    with pytest.raises(AttributeError):
        params.n = 3  # type: ignore[misc]


def test_a_bias_is_a_copy() -> None:
    bias: dict[int, float] = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[2] = 1.0
    assert params.logit_bias == {1: 2.0}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"json_schema": {"type": "null"}}, Constraint("json_schema", '{"type": "null"}')),
        ({"json_schema": '{"type":"null"}'}, Constraint("json_schema", '{"type":"null"}')),
        ({"regex": "a+"}, Constraint("regex", "a+")),
        ({"grammar": 'start: "a"'}, Constraint("grammar", 'start: "a"')),
    ],
)
def test_the_constraint(options: Mapping[str, Any], expected: Constraint | None) -> None:
    assert SamplingParams(**options).constraint == expected


@pytest.mark.parametrize(
    "options",
    [
        {"stop_token_ids": [10]},
        {"banned_token_ids": [3, 10]},
        {"allowed_token_ids": [10]},
        {"logit_bias": {10: 1}},
    ],
)
def test_ids_outside_the_vocabulary_are_refused(options: Any) -> None:
    SamplingParams(**options).check_vocabulary(11)
    with pytest.raises(BadInput, match="token id 10 is outside the model's vocabulary of 10"):
        SamplingParams(**options).check_vocabulary(10)


def test_the_names_are_those_users_know() -> None:
    names = {f.name for f in fields(SamplingParams)}
    assert names >= {
        *("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos"),
        *("include_stop_str_in_output", "max_tokens", "min_tokens", "logprobs"),
        *("prompt_logprobs", "logit_bias", "allowed_token_ids", "bad_words", "detokenize"),
        "skip_special_tokens",
    }
    assert (SamplingParams().temperature, SamplingParams().max_tokens) == (1.0, 16)
