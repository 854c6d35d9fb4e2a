"""The chat page on the server itself, whose model says what a script tells it to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.asking import post
from tests.serving.page.browser import Site, Visitor, visit
from tests.serving.scripted import ScriptedEngine
from tests.serving.support import TestServer

api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
expect = api.expect

LONG = "the whale swims " * 900


@pytest.fixture
def talker(browser: Any, scripted: TestServer) -> Iterator[Visitor]:
    """A person at the page of a model that was made for conversations."""
    for one in visit(browser, Site(scripted.url, None)):
        one.open()
        yield one
    scripted.until_idle()


@pytest.fixture
def writer(browser: Any, server: TestServer) -> Iterator[Visitor]:
    """A person at the page of a base model."""
    for one in visit(browser, Site(server.url, None)):
        one.open()
        yield one
    server.until_idle()


def say(server: TestServer, *parts: str, fails: bool = False) -> None:
    """Set what the model says."""
    assert isinstance(server.engine, ScriptedEngine)
    server.engine.say(*parts, fails=fails)


def test_an_answer_streams_and_is_drawn(talker: Visitor, scripted: TestServer) -> None:
    say(scripted, "Whales **dive** deep.")
    talker.say("How?")
    expect(talker.answer().locator("strong")).to_have_text("dive")
    expect(talker.answer().locator(".stats")).to_contain_text(re.compile(r"\d+ tokens"))
    assert talker.bodies[-1]["stream"] is True


def test_thinking_is_apart_and_folded(talker: Visitor, scripted: TestServer) -> None:
    say(scripted, "Let me\nthink.", "</think>", "Done.")
    talker.page.get_by_role("button", name="Think first").click()
    talker.say("How?")
    assert talker.text() == "Done."
    thoughts = talker.answer().locator(".thoughts")
    expect(thoughts).to_be_hidden()
    talker.answer().locator(".thinking summary").click()
    expect(thoughts).to_have_text("Let me think.")
    assert thoughts.inner_text() == "Let me\nthink."  # its lines are kept


def test_stopping_ends_the_request_in_the_engine(talker: Visitor, scripted: TestServer) -> None:
    say(scripted, LONG)
    talker.say("Tell me everything", wait=False)
    expect(talker.answer().locator(".body")).to_contain_text("the whale swims")
    assert not scripted.engine.idle
    talker.page.keyboard.press("Escape")
    expect(talker.answer().locator(".fault")).to_contain_text("Stopped")
    scripted.until_idle()
    assert "the whale swims" in talker.text()


def test_a_stopped_answer_is_continued(talker: Visitor, scripted: TestServer) -> None:
    say(scripted, LONG)
    talker.say("Tell me everything", wait=False)
    expect(talker.answer().locator(".body")).to_contain_text("the whale swims")
    talker.page.keyboard.press("Escape")
    expect(talker.answer().locator(".fault")).to_contain_text("Stopped")
    kept = talker.text()
    say(scripted, " and ends.")
    talker.answer().get_by_role("button", name="Continue").click()
    talker.finished()
    assert talker.text().startswith(kept[:200])
    assert talker.text().endswith("and ends.")


def test_a_reload_in_the_middle_keeps_what_came(talker: Visitor, scripted: TestServer) -> None:
    say(scripted, LONG)
    talker.say("Tell me everything", wait=False)
    expect(talker.answer().locator(".body")).to_contain_text("the whale swims")
    talker.page.reload()
    expect(talker.answer().locator(".body")).to_contain_text("the whale swims")
    expect(talker.page.locator(".message.user")).to_have_text("Tell me everything")
    scripted.until_idle()


def test_a_failure_is_told_and_the_next_try_answers(talker: Visitor, scripted: TestServer) -> None:
    say(scripted, "a whale", fails=True)
    talker.say("How?")
    expect(talker.answer().locator(".fault")).to_contain_text("the script says so")
    assert "a whale" in talker.text()
    say(scripted, "Well.")
    talker.answer().get_by_role("button", name=re.compile("again|Retry", re.I)).first.click()
    talker.finished()
    assert talker.text() == "Well."


def test_probabilities_are_the_servers(talker: Visitor, scripted: TestServer) -> None:
    say(scripted, "a whale dives")
    talker.say("How?")
    talker.page.get_by_role("button", name="Probabilities").click()
    talker.answer().locator(".body .token").nth(1).hover()
    card = talker.page.get_by_role("tooltip")
    expect(card).to_be_visible()
    listed = " ".join(card.locator("li").all_inner_texts())
    shown = [float(one) for one in re.findall(r"([\d.]+) %", listed)]
    asked = {**talker.bodies[-1], "stream": False}
    del asked["stream_options"]
    (choice,) = post(scripted, "/v1/chat/completions", **asked)["choices"]
    entry = choice["logprobs"]["content"][1]
    expected = [one["logprob"] for one in entry["top_logprobs"]]
    if entry["logprob"] not in expected:  # what was chosen is listed too
        expected.append(entry["logprob"])
    assert len(shown) == len(expected) >= 5
    for share, logprob in zip(sorted(shown), sorted(expected), strict=True):
        rounded = 0.051 if share < 10 else 0.51
        assert share == pytest.approx(100 * math.exp(logprob), abs=rounded)


def test_a_base_model_goes_on_with_a_text(writer: Visitor) -> None:
    document = writer.page.get_by_label("Document")
    document.fill("a whale")
    writer.page.keyboard.press("Control+Enter")
    expect(writer.page.locator(".mirror .model").first).to_be_attached()
    expect(writer.page.get_by_role("button", name="Go on")).to_be_visible()
    assert str(document.input_value()).startswith("a whale")
    assert len(str(document.input_value())) > len("a whale")
