"""``langchain-openai`` and ``litellm``: what agents are written with."""

from __future__ import annotations

from typing import Any

import litellm
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict

from tests.clients.checks.case import Case, Check, run

CHECKS: list[Check] = []


def check(function: Check) -> Check:
    """Add a check to the list."""
    CHECKS.append(function)
    return function


def lang(case: Case, **options: Any) -> ChatOpenAI:
    """Return LangChain's model."""
    body = {"ignore_eos": True, **options.pop("extra_body", {})}
    given = {"temperature": 0, "max_tokens": 16, "max_retries": 0, **options}
    return ChatOpenAI(
        model=case.model, base_url=f"{case.url}/v1", api_key="x", extra_body=body, **given
    )


def lite(case: Case, **options: Any) -> Any:
    """Ask by LiteLLM, as it asks vLLM's server."""
    given: dict[str, Any] = {
        "messages": [{"role": "user", "content": "a whale dives"}], "temperature": 0,
        "max_tokens": 16, "api_base": f"{case.url}/v1", "api_key": "x", "num_retries": 0,
        "extra_body": {"ignore_eos": True}, **options,
    }  # fmt: skip
    return litellm.completion(model=f"hosted_vllm/{case.model}", **given)


class Sighting(BaseModel):
    """What was seen."""

    # The model writes noise: blanks, where it may, without end.
    model_config = ConfigDict(json_schema_extra={"x-guidance": {"whitespace_flexible": False}})
    deep: bool


@check
def langchain_invokes_and_streams(case: Case) -> None:
    whole = lang(case).invoke("a whale dives")
    assert whole.content
    assert whole.response_metadata["finish_reason"] == "length"
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 16
    assert "".join(str(chunk.content) for chunk in lang(case).stream("a whale dives")) == (
        whole.content
    )
    chunks = list(lang(case, stream_usage=True).stream("a whale dives"))
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    assert total.usage_metadata is not None
    assert total.usage_metadata["output_tokens"] == 16


@check
def langchain_calls_tools(case: Case) -> None:
    bound = lang(case, max_tokens=100, extra_body={"ignore_eos": False}).bind_tools(
        [Sighting], tool_choice="Sighting", parallel_tool_calls=False
    )
    (call,) = bound.invoke("a whale dives").tool_calls
    assert call["name"] == "Sighting"
    assert isinstance(call["args"]["deep"], bool)


@check
def langchain_reads_formats(case: Case) -> None:
    model = lang(case, max_tokens=60, extra_body={"ignore_eos": False})
    for method in ("json_schema", "function_calling"):
        found = model.with_structured_output(Sighting, method=method).invoke("a whale dives")
        assert isinstance(found, Sighting)


@check
def litellm_completes_and_streams(case: Case) -> None:
    whole = lite(case)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 16
    text = "".join(chunk.choices[0].delta.content or "" for chunk in lite(case, stream=True))
    assert text == whole.choices[0].message.content


@check
def litellm_reads_reasoning(case: Case) -> None:
    how: Any = {
        "api_base": f"{case.strict_url}/v1", "api_key": case.keys[0],
        "extra_body": {"ignore_eos": True, "chat_template_kwargs": {"thinking": True}},
    }  # fmt: skip
    whole = lite(case, **how)
    assert whole.choices[0].message.reasoning_content
    pieces = [chunk.choices[0].delta for chunk in lite(case, stream=True, **how)]
    text = "".join(getattr(piece, "reasoning_content", None) or "" for piece in pieces)
    assert text == whole.choices[0].message.reasoning_content


@check
def litellm_knows_the_errors(case: Case) -> None:
    for given, kind in (
        ({"temperature": 3}, litellm.BadRequestError),
        ({"messages": [{"role": "user", "content": "whale " * 5000}]}, litellm.BadRequestError),
        (
            {"api_base": f"{case.strict_url}/v1", "api_key": "not-one-of-the-keys"},
            litellm.AuthenticationError,
        ),
    ):
        try:
            lite(case, **given)
        except kind:
            continue
        raise AssertionError(f"no {kind.__name__}")


if __name__ == "__main__":
    raise SystemExit(run(CHECKS, "langchain-openai"))
