"""The page of the routes on the server itself: it lists, filters, sends, stops, and shows text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serving.page.browser import Site, Visitor, visit
from tests.serving.support import NAME, TestServer, make_engine, make_tokenizer, running
from ziphius.model.transformer import Transformer
from ziphius.serving.app import Application

api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
expect = api.expect

COMPLETIONS = "post/v1/completions"
HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script>'


def opened(visitor: Visitor) -> Visitor:
    visitor.page.goto(visitor.site.url + "/docs")
    visitor.page.locator("details.route").first.wait_for()
    return visitor


@pytest.fixture
def guest(browser: Any, server: TestServer) -> Iterator[Visitor]:
    """A person at the page of the routes."""
    for one in visit(browser, Site(server.url, None)):
        yield opened(one)
    server.until_idle()


def route(visitor: Visitor, name: str) -> Any:
    """Open a route and return it; ``name`` is its method and path."""
    row = visitor.page.locator(f'details.route[id="{name}"]')
    row.locator("> summary").click()
    row.locator(".trial").wait_for()
    return row


def test_every_route_is_listed_with_what_it_takes_and_gives(
    guest: Visitor, server: TestServer
) -> None:
    document = httpx.get(server.url + "/openapi.json").json()
    named = {f"{method}{path}" for path, ways in document["paths"].items() for method in ways}
    rows = guest.page.locator("details.route")
    assert set(rows.evaluate_all("rows => rows.map(row => row.id)")) == named
    expect(guest.page.locator("#talks a")).to_have_count(len(named))
    for method, path in [(m, p) for p, ways in document["paths"].items() for m in ways]:
        told = document["paths"][path][method]
        row = guest.page.locator(f'details.route[id="{method}{path}"]')
        row.evaluate("row => { row.open = true; }")
        expect(row.locator("h3")).to_have_text(told["summary"])
        expect(row.locator("> summary")).to_contain_text(told["description"].split("\n\n")[0])
        codes = row.locator(".response .code").all_inner_texts()
        assert codes == sorted(told["responses"])
        if "requestBody" not in told:
            continue
        name = told["requestBody"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
        row.locator(".told > .fold").evaluate_all("all => all.forEach(one => { one.open = true; })")
        fields = row.locator(".told > .fields .name, .told > .fold:not(.response) .name")
        wanted = document["components"]["schemas"][name]["properties"]
        expect(fields).to_have_count(len(wanted))
        assert set(fields.all_text_contents()) == set(wanted)


def test_a_field_says_its_type_bounds_and_whether_it_is_needed(guest: Visitor) -> None:
    row = route(guest, COMPLETIONS)
    fields = row.locator(".told > .fields > li")
    expect(fields.first).to_contain_text(re.compile(r"prompt.*string.*required"))
    temperature = fields.filter(has=guest.page.get_by_text("temperature", exact=True))
    expect(temperature).to_have_text(re.compile(r"temperature number \| null\s*0 – 2"))
    options = fields.filter(has=guest.page.get_by_text("stream_options", exact=True))
    expect(options.locator(".name")).to_have_count(1)
    options.locator(".fold summary").click()
    expect(options.get_by_text("include_usage")).to_be_visible()


def test_the_example_is_sent_and_answered(guest: Visitor) -> None:
    row = route(guest, COMPLETIONS)
    body = row.get_by_label("Body", exact=True)
    given = {**json.loads(body.input_value()), "max_tokens": 2, "ignore_eos": True}
    body.fill(json.dumps(given))
    body.press("Control+Enter")
    expect(row.locator(".status .code")).to_have_text("200 OK")
    expect(row.locator(".status")).to_contain_text(re.compile(r"x-request-id: req-\w+"))
    expect(row.locator(".status .time")).to_be_visible()
    answer = json.loads(row.locator(".answer pre").inner_text())
    assert answer["usage"]["completion_tokens"] == 2
    assert guest.bodies == [given]


def test_a_refusal_is_shown_as_it_came(guest: Visitor) -> None:
    row = route(guest, COMPLETIONS)
    row.get_by_label("Body", exact=True).fill('{"prompt": 3}')
    row.get_by_role("button", name="Send").click()
    expect(row.locator(".status .code")).to_have_text("400 Bad Request")
    expect(row.locator(".answer pre")).to_contain_text('"error"')


def test_a_stream_shows_as_it_comes_and_is_stopped(guest: Visitor, server: TestServer) -> None:
    row = route(guest, COMPLETIONS)
    row.get_by_label("Body", exact=True).fill(
        json.dumps({"prompt": "a", "max_tokens": 500, "ignore_eos": True})
    )
    row.get_by_role("checkbox", name="stream").check()
    expect(row.locator(".curl")).to_contain_text("curl -N")
    server.runner.frozen.set()
    row.get_by_role("button", name="Send").click()
    server.runner.frozen.clear()
    expect(row.locator(".answer pre")).to_contain_text("data: {")
    server.runner.frozen.set()  # in the middle of it
    row.get_by_role("button", name="Stop").click()
    server.runner.frozen.clear()
    expect(row.locator(".status")).to_contain_text("Stopped.")
    expect(row.get_by_role("button", name="Send")).to_be_focused()
    assert "[DONE]" not in row.locator(".answer pre").inner_text()
    server.until_idle()


def test_a_stream_that_ends_is_whole(guest: Visitor) -> None:
    row = route(guest, COMPLETIONS)
    given = {"prompt": "a", "max_tokens": 3, "stream": True}
    row.get_by_label("Body", exact=True).fill(json.dumps(given))
    expect(row.get_by_role("checkbox", name="stream")).to_be_checked()
    row.get_by_role("button", name="Send").click()
    expect(row.locator(".answer pre")).to_contain_text("data: [DONE]")
    expect(row.locator(".status .code")).to_have_text("200 OK")


def test_a_path_is_filled_in(guest: Visitor) -> None:
    row = route(guest, "get/v1/models/{model}")
    row.get_by_role("button", name="Send").click()
    expect(row.get_by_text("model is needed.")).to_be_visible()
    field = row.get_by_label("model (in the path)")
    expect(field).to_be_focused()
    field.fill(NAME)
    expect(row.locator(".curl")).to_have_text(re.compile(rf"'http://[^']+/v1/models/{NAME}'"))
    field.press("Enter")
    expect(row.locator(".answer pre")).to_contain_text(f'"id": "{NAME}"')


def test_the_curl_line_is_that_request(guest: Visitor) -> None:
    row = route(guest, COMPLETIONS)
    row.get_by_label("Body", exact=True).fill('{"prompt": "it\'s"}')
    line = row.locator(".curl").inner_text()
    assert line.startswith(f"curl '{guest.site.url}/v1/completions'")
    assert line.endswith("""-d '{"prompt": "it'\\''s"}'""")
    assert "Authorization" not in line


def test_the_filter_keeps_what_has_all_the_words(guest: Visitor) -> None:
    shown = guest.page.locator("details.route:visible")
    every = shown.count()
    guest.page.keyboard.press("/")
    expect(guest.page.get_by_label("Filter the routes")).to_be_focused()
    guest.page.keyboard.type("GET stored")
    expect(shown).to_have_count(1)
    expect(guest.page.locator("#found")).to_have_text(f"1 of {every} routes")
    expect(guest.page.locator("#talks a:visible")).to_have_count(1)
    guest.page.keyboard.press("Enter")
    expect(shown.first).to_have_attribute("open", "")
    guest.page.keyboard.press("/")
    guest.page.get_by_label("Filter the routes").fill("no such thing")
    expect(guest.page.get_by_text("No route has that.")).to_be_visible()
    guest.page.keyboard.press("Escape")
    expect(shown).to_have_count(every)


def test_an_address_opens_its_route(guest: Visitor) -> None:
    guest.page.goto(guest.site.url + "/docs#get/v1/responses/{response_id}")
    row = guest.page.locator("details.route[open]")
    expect(row.locator("> summary")).to_be_focused()
    expect(row.locator(".path")).to_have_text("/v1/responses/{response_id}")


def test_the_pages_lead_to_each_other(guest: Visitor) -> None:
    guest.page.get_by_role("link", name="Chat", exact=True).click()
    expect(guest.page.locator("#model")).to_have_text(NAME)
    guest.page.get_by_role("link", name="API", exact=True).click()
    expect(guest.page).to_have_url(guest.site.url + "/docs")
    expect(guest.page.locator("details.route").first).to_be_visible()


def test_a_small_phone_need_not_scroll_sideways(browser: Any, server: TestServer) -> None:
    size = {"width": 360, "height": 640}
    for one in visit(browser, Site(server.url, None), viewport=size, is_mobile=True):
        opened(one)
        one.page.locator("details.route").evaluate_all(
            "rows => rows.forEach(row => { row.open = true; })"
        )
        one.page.locator(".trial").last.wait_for()
        one.page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true; })")
        wide = "all => all.filter(one => one.scrollWidth > one.clientWidth).length"
        for part in ("html", "#scroll", "details.route", ".trial", ".told"):
            assert one.page.locator(part).evaluate_all(wide) == 0, part


def test_a_key_is_sent_and_shared_with_the_chat_and_text_stays_text(
    browser: Any, whale: Transformer
) -> None:
    """The description is spoilt too: whatever it says is shown, letter by letter."""

    def spoil(application: Application) -> None:
        document = application.fastapi.openapi()
        operation = document["paths"]["/v1/completions"]["post"]
        operation["description"] = operation["summary"] = HOSTILE
        operation["tags"] = [HOSTILE]
        operation["responses"]["200"]["description"] = HOSTILE
        schema = document["components"]["schemas"]["CompletionFields"]
        schema["properties"] = {
            HOSTILE: {"type": HOSTILE, "description": HOSTILE, "pattern": HOSTILE},
            "__proto__x": {"$ref": "#/components/schemas/__proto__"},
            "itself": {"anyOf": [{"$ref": "#/components/schemas/CompletionFields"}]},
            "loop": {"$ref": "#/components/schemas/Loop"},
        }
        document["components"]["schemas"]["Loop"] = {"$ref": "#/components/schemas/Loop"}

    tokenizer = make_tokenizer()
    keys: Any = {"api_keys": ("a-key-of-clients",)}
    with running(
        lambda: make_engine(whale, tokenizer), tokenizer=tokenizer, spoil=spoil, **keys
    ) as server:
        for one in visit(browser, Site(server.url, None)):
            row = route(opened(one), COMPLETIONS)
            expect(row.locator(".lead")).to_have_text(HOSTILE)
            expect(row.locator("h3")).to_have_text(HOSTILE)
            expect(row.locator(".name").first).to_have_text(HOSTILE)
            assert one.page.locator("main img, main script, #side img").count() == 0
            row.get_by_label("Body", exact=True).fill('{"prompt": "a", "max_tokens": 1}')
            row.get_by_role("button", name="Send").click()
            expect(row.locator(".status .code")).to_have_text("401 Unauthorized")
            one.page.get_by_label("API key").fill("a-key-of-clients")
            row.get_by_role("button", name="Send").click()
            expect(row.locator(".status .code")).to_have_text("200 OK")
            expect(row.locator(".curl")).to_contain_text("Bearer $API_KEY")
            assert "a-key-of-clients" not in row.inner_text()
            one.page.get_by_role("link", name="Chat", exact=True).click()
            expect(one.page.locator("#model")).to_have_text(NAME)  # it knows the key


def test_without_the_chat_page_the_routes_are_described(browser: Any, whale: Transformer) -> None:
    tokenizer = make_tokenizer()
    with running(lambda: make_engine(whale, tokenizer), tokenizer=tokenizer, page=False) as server:
        with server.client() as client:
            assert client.get("/").status_code == 404
            assert client.get("/page/index.html").status_code == 404
            assert "text/html" in client.head("/docs").headers["content-type"]
        for one in visit(browser, Site(server.url, None)):
            opened(one)
            expect(one.page.get_by_role("link", name="Chat", exact=True)).to_have_count(0)


def test_pages_come_only_under_their_policy(server: TestServer) -> None:
    with server.client() as client:
        for path in ("/", "/docs"):
            policy = client.get(path).headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
        for path in ("/page/index.html", "/page/docs.html", "/page/DOCS.HTML", "/redoc"):
            assert client.get(path).status_code == 404, path
        assert "cdn" not in client.get("/docs").text
