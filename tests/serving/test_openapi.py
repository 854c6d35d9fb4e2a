"""``/openapi.json`` says what the routes do: answers, errors and examples are held to it."""

from __future__ import annotations

import copy
import re
from typing import Any

import jsonschema
import pytest

from tests.serving.support import NAME, TestServer, make_engine, make_tokenizer, running
from ziphius.model.transformer import Transformer

TALK: Any = [{"role": "user", "content": "a whale"}]
SHORT: Any = {"max_tokens": 3, "temperature": 0}
TOOL: Any = {"type": "function", "function": {"name": "dive", "parameters": {"type": "object"}}}

# Method, route, path, body, status.
ASKED: list[tuple[str, str, str, Any, int]] = [
    ("get", "/v1/models", "/v1/models", None, 200),
    ("get", "/v1/models/{model}", f"/v1/models/{NAME}", None, 200),
    ("get", "/v1/models/{model}", "/v1/models/another", None, 404),
    ("get", "/health", "/health", None, 200),
    ("get", "/ready", "/ready", None, 200),
    ("get", "/tokenizer_info", "/tokenizer_info", None, 200),
    ("post", "/tokenize", "/tokenize", {"prompt": "a whale", "return_token_strs": True}, 200),
    ("post", "/tokenize", "/tokenize", {"messages": TALK}, 200),
    ("post", "/tokenize", "/tokenize", {}, 400),
    ("post", "/detokenize", "/detokenize", {"tokens": [0, 5]}, 200),
    ("post", "/detokenize", "/detokenize", {"tokens": [10**9]}, 400),
    ("post", "/v1/chat/completions", "/v1/chat/completions", {"messages": TALK, **SHORT}, 200),
    (
        "post", "/v1/chat/completions", "/v1/chat/completions",
        {"messages": TALK, **SHORT, "n": 2, "logprobs": True, "top_logprobs": 2,
         "return_token_ids": True, "prompt_logprobs": 1},
        200,
    ),
    (
        "post", "/v1/chat/completions", "/v1/chat/completions",
        {"messages": TALK, "max_tokens": 60, "tools": [TOOL], "tool_choice": "required"}, 200,
    ),
    ("post", "/v1/chat/completions", "/v1/chat/completions", {"messages": []}, 400),
    (
        "post", "/v1/chat/completions", "/v1/chat/completions",
        {"messages": TALK, "model": "another"}, 404,
    ),
    ("post", "/v1/completions", "/v1/completions", {"prompt": "a whale", **SHORT}, 200),
    (
        "post", "/v1/completions", "/v1/completions",
        {"prompt": ["a", [0, 5]][:1], **SHORT, "echo": True, "logprobs": 2, "prompt_logprobs": 1,
         "return_token_ids": True},
        200,
    ),
    ("post", "/v1/completions", "/v1/completions", {"prompt": 3}, 400),
    ("post", "/v1/messages", "/v1/messages", {"messages": TALK, **SHORT}, 200),
    (
        "post", "/v1/messages", "/v1/messages",
        {"messages": TALK, "max_tokens": 60, "tool_choice": {"type": "any"}, "tools": [
            {"name": "dive", "input_schema": {"type": "object"}},
        ]},
        200,
    ),
    ("post", "/v1/messages", "/v1/messages", {"messages": TALK}, 400),
    (
        "post", "/v1/messages/count_tokens", "/v1/messages/count_tokens", {"messages": TALK}, 200,
    ),
    ("post", "/v1/responses", "/v1/responses", {"input": "a whale", "max_output_tokens": 3}, 200),
    (
        "post", "/v1/responses", "/v1/responses",
        {"input": TALK, "max_output_tokens": 60, "tool_choice": "required", "top_logprobs": 1,
         "include": ["message.output_text.logprobs"],
         "tools": [{"type": "function", "name": "dive", "parameters": {"type": "object"}}]},
        200,
    ),
    ("post", "/v1/responses", "/v1/responses", {"input": "a whale", "truncation": "auto"}, 400),
    ("get", "/v1/responses/{response_id}", "/v1/responses/nobody", None, 404),
    ("get", "/v1/responses/{response_id}", "/v1/responses/nobody?stream=whale", None, 400),
    ("delete", "/v1/responses/{response_id}", "/v1/responses/nobody", None, 404),
    ("post", "/v1/responses/{response_id}/cancel", "/v1/responses/nobody/cancel", None, 404),
    ("post", "/admin/cache/clear", "/admin/cache/clear", {}, 403),
    ("post", "/admin/engine/restart", "/admin/engine/restart", {}, 403),
]  # fmt: skip


@pytest.fixture(scope="module")
def document(server: TestServer) -> Any:
    with server.client() as client:
        return client.get("/openapi.json").json()


def operations(document: Any) -> list[tuple[str, str, Any]]:
    return [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def resolved(document: Any, part: Any) -> Any:
    """Follow a reference."""
    while "$ref" in part:
        place = document
        for name in part["$ref"].removeprefix("#/").split("/"):
            place = place[name]
        part = place
    return part


def closed(document: Any) -> Any:
    """Return the document with schemas that allow no property which they do not name."""
    strict = copy.deepcopy(document)
    for schema in strict["components"]["schemas"].values():
        if "properties" in schema and "additionalProperties" not in schema:
            schema["additionalProperties"] = False
    return strict


def test_every_operation_says_what_it_answers(document: Any) -> None:
    assert len(operations(document)) >= 12
    for method, path, operation in operations(document):
        name = f"{method} {path}"
        assert len(operation["summary"]) > 3, name
        # It is for people: no name of ours, but of what the path is about.
        named, said = (
            set(re.findall(r"[a-z]+", one.lower())) for one in (path, operation["summary"])
        )
        assert {one.rstrip("s") for one in named} & {one.rstrip("s") for one in said}, name
        content = resolved(document, operation["responses"]["200"])["content"]
        if path == "/metrics":
            assert list(content) == ["text/plain"]
            continue
        schema = resolved(document, content["application/json"]["schema"])
        assert schema["properties"], f"{name}: an answer of any form"


def test_every_error_has_one_shape(document: Any) -> None:
    for method, path, operation in operations(document):
        name = f"{method} {path}"
        errors = {s: r for s, r in operation["responses"].items() if not s.startswith("2")}
        assert "422" not in errors, name
        if path in ("/health", "/ready"):
            assert list(errors) == ["503"], name
            continue
        for response in errors.values():
            content = resolved(document, response)["content"]
            schema = resolved(document, content["application/json"]["schema"])
            assert set(schema["required"]) == {"type", "error"}, name
        if "requestBody" in operation:
            assert {"400", "408", "413", "429", "500", "503"} <= set(errors), name
    retry = resolved(document, document["paths"]["/v1/completions"]["post"]["responses"]["503"])
    assert "Retry-After" in retry["headers"]


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: f"{asked[2]}-{asked[4]}")
def test_answers_are_as_documented(server: TestServer, document: Any, asked: Any) -> None:
    method, route, path, body, status = asked
    with server.client() as client:
        answer = client.request(method, path, json=body)
    assert answer.status_code == status, answer.text
    strict = closed(document)
    operation = strict["paths"][route if route in strict["paths"] else path][method]
    content = resolved(strict, operation["responses"][str(status)])["content"]
    schema = {**content["application/json"]["schema"], "components": strict["components"]}
    jsonschema.Draft202012Validator(schema).validate(answer.json())


def test_a_stored_response_is_as_documented(server: TestServer, document: Any) -> None:
    strict = closed(document)
    asked = {"input": "a whale", "max_output_tokens": 3, "reasoning": {"effort": "low"}}
    with server.client() as client:
        made = client.post("/v1/responses", json=asked).json()
        path = f"/v1/responses/{made['id']}"
        for method, answer in (("get", client.get(path)), ("delete", client.delete(path))):
            operation = strict["paths"]["/v1/responses/{response_id}"][method]
            media = operation["responses"]["200"]["content"]["application/json"]
            schema = {**media["schema"], "components": strict["components"]}
            jsonschema.Draft202012Validator(schema).validate(answer.json())


def test_examples_are_answered(server: TestServer, document: Any) -> None:
    """Each route with a body shows some, and they work as they stand."""
    for method, path, operation in operations(document):
        if path.startswith("/admin") or "requestBody" not in operation:
            continue
        media = operation["requestBody"]["content"]["application/json"]
        examples = resolved(document, media["schema"]).get("examples")
        assert examples, f"{method} {path}: no example"
        for example in examples:
            with server.client() as client:
                answer = client.request(method, path, json=example)
            assert answer.status_code == 200, answer.text


def test_messages_have_their_roles(document: Any) -> None:
    fields = document["components"]["schemas"]["ChatFields"]["properties"]
    roles = fields["messages"]["items"]["properties"]["role"]["enum"]
    assert set(roles) == {"system", "developer", "user", "assistant", "tool"}


def test_requests_name_the_model_that_is_served(document: Any) -> None:
    found = 0
    for _, _, operation in operations(document):
        if "requestBody" in operation:
            media = operation["requestBody"]["content"]["application/json"]
            properties = resolved(document, media["schema"])["properties"]
            assert {"const": NAME} in properties["model"]["anyOf"]
            found += 1
    assert found >= 4


def test_keys_are_documented_where_they_are_wanted(whale: Transformer, document: Any) -> None:
    assert all("security" not in operation for _, _, operation in operations(document))
    tokenizer = make_tokenizer()
    keys: Any = {"api_keys": ("a-key-of-clients",), "admin_key": "the-operators-key"}
    with (
        running(lambda: make_engine(whale, tokenizer), tokenizer=tokenizer, **keys) as server,
        server.client() as client,
    ):
        document = client.get("/openapi.json").json()
        assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
        for method, path, operation in operations(document):
            wanted = path.startswith(("/v1/", "/tokenize", "/detokenize", "/admin/"))
            assert ("security" in operation) == wanted, path
            assert ("401" in operation["responses"]) == wanted, path
            if wanted:
                named = {"model": NAME, "response_id": "resp_none"}
                answer = client.request(method, path.format(**named), json={})
                assert answer.status_code == 401, path


def test_a_route_names_all_its_methods(server: TestServer) -> None:
    with server.client() as client:
        for method in ("PUT", "OPTIONS"):
            answer = client.request(method, "/v1/responses/nobody")
            assert answer.status_code == 405
            assert answer.headers["allow"] == "DELETE, GET"
            assert answer.json()["error"]["type"] == "invalid_request_error"
