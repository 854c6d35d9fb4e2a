"""The chat page in a browser: asking, faults, attacks, and looking closer at an answer."""

import re
from typing import Any

import pytest

from tests.serving.page.browser import Site, Visitor, visit

api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
expect = api.expect


# Asking


def test_a_question_is_answered_as_it_streams(visitor: Visitor) -> None:
    visitor.say("slow please", wait=False)
    expect(visitor.answer()).to_have_attribute("aria-busy", "true")
    expect(visitor.answer().locator(".body")).to_contain_text("Paragraph 1")
    early = len(visitor.text())
    visitor.page.wait_for_timeout(400)
    late = len(visitor.text())
    assert 0 < early < late
    assert "running" in str(visitor.answer().get_attribute("class"))


def test_the_request_asks_for_what_the_page_shows(visitor: Visitor) -> None:
    visitor.say("Hello")
    body = visitor.bodies[-1]
    assert body["messages"] == [{"role": "user", "content": "Hello"}]
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert (body["logprobs"], body["top_logprobs"]) == (True, 5)
    assert "temperature" not in body
    expect(visitor.answer().locator(".stats")).to_contain_text(
        re.compile(r"\d+ tokens · .*tokens/s · first after")
    )


def test_shift_enter_breaks_the_line_and_does_not_send(visitor: Visitor) -> None:
    field = visitor.page.locator("#input")
    field.press_sequentially("one")
    field.press("Shift+Enter")
    field.press_sequentially("two")
    assert field.input_value() == "one\ntwo"
    assert visitor.bodies == []


@pytest.mark.parametrize("by", ["key", "button"])
def test_stopping_ends_the_request_and_keeps_what_came(visitor: Visitor, by: str) -> None:
    visitor.say("slow please", wait=False)
    expect(visitor.answer().locator(".body")).to_contain_text("Paragraph 1")
    if by == "key":
        visitor.page.keyboard.press("Escape")
    else:
        visitor.page.get_by_role("button", name="Stop").click()
    expect(visitor.answer().locator(".fault")).to_contain_text("Stopped")
    kept = visitor.text()
    assert kept.startswith("Paragraph 1")
    visitor.page.wait_for_timeout(250)
    assert visitor.text() == kept
    assert visitor.site.script().aborted == 1


def test_a_stopped_answer_can_be_continued(visitor: Visitor) -> None:
    visitor.say("slow please", wait=False)
    expect(visitor.answer().locator(".body")).to_contain_text("Paragraph 1")
    visitor.page.keyboard.press("Escape")
    kept = visitor.text()
    visitor.answer().get_by_role("button", name="Continue").click()
    visitor.finished()
    assert visitor.text().startswith(kept)
    assert visitor.text().endswith("And it goes on.")
    body = visitor.bodies[-1]
    assert body["messages"][-1]["role"] == "assistant"
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)


def test_a_reload_in_the_middle_keeps_the_part_that_came(visitor: Visitor) -> None:
    visitor.say("slow please", wait=False)
    expect(visitor.answer().locator(".body")).to_contain_text("Paragraph 1")
    kept = visitor.text()
    visitor.page.reload()
    expect(visitor.answer().locator(".body")).to_contain_text(kept[:40])
    assert len(visitor.text()) >= len(kept)
    expect(visitor.answer().locator(".fault")).to_contain_text("was closed")
    visitor.answer().get_by_label("Answer again").click()
    expect(visitor.answer()).to_have_attribute("aria-busy", "true")
    visitor.page.keyboard.press("Escape")
    expect(visitor.answer().locator(".switcher")).to_contain_text("2 / 2")


def test_a_hidden_page_has_kept_what_came(visitor: Visitor) -> None:
    visitor.say("slow please", wait=False)
    expect(visitor.answer().locator(".body")).to_contain_text("the water is dark", ignore_case=True)
    kept = "Object.values(localStorage).some((text) => text.includes('water is dark'))"
    assert not visitor.page.evaluate(kept)
    visitor.page.evaluate(
        "Object.defineProperty(document, 'hidden', { value: true });"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    assert visitor.page.evaluate(kept)


def test_what_another_tab_left_unfinished_is_called_so(visitor: Visitor) -> None:
    visitor.say("slow please", wait=False)
    expect(visitor.answer().locator(".body")).to_contain_text("Paragraph 1")
    other = visitor.page.context.new_page()
    other.goto(visitor.page.url)
    expect(other.locator(".message.assistant .fault")).to_contain_text("was closed")
    other.close()


def test_editing_asks_again_from_there_and_loses_nothing(visitor: Visitor) -> None:
    visitor.say("first question")
    visitor.say("second question")
    first = visitor.page.locator(".message.user").first
    first.hover()
    first.get_by_label("Edit and ask again").click()
    first.get_by_label("Edit your message").fill("another question")
    first.get_by_label("Edit your message").press("Enter")
    visitor.finished()
    expect(visitor.page.locator(".message.user")).to_have_count(1)
    assert visitor.bodies[-1]["messages"] == [{"role": "user", "content": "another question"}]
    visitor.page.locator(".message.user").get_by_label("Earlier version").click()
    expect(visitor.page.locator(".message.user")).to_have_count(2)
    expect(visitor.page.locator(".message.user").last).to_contain_text("second question")


def test_answering_again_keeps_both_answers(visitor: Visitor) -> None:
    visitor.say("Hello")
    before = visitor.text()
    visitor.answer().get_by_label("Answer again").click()
    visitor.finished()
    assert visitor.text() != before
    visitor.answer().get_by_label("Earlier version").click()
    assert visitor.text() == before


# Faults


def test_an_error_in_the_stream_is_shown_and_can_be_tried_again(visitor: Visitor) -> None:
    visitor.say("break")
    expect(visitor.page.get_by_role("alert").last).to_contain_text("A logit was not finite.")
    visitor.answer().get_by_role("button", name="Try again").click()
    visitor.finished()
    assert len(visitor.bodies) == 2


def test_a_busy_server_is_asked_again_when_it_said(visitor: Visitor) -> None:
    visitor.say("busy")
    retry = visitor.answer().get_by_role("button", name=re.compile("Try again in [12] s"))
    expect(retry).to_have_attribute("aria-disabled", "true")
    retry.click(force=True)
    assert len(visitor.bodies) == 1
    visitor.answer().get_by_role("button", name="Try again", exact=True).click()
    visitor.finished()
    assert "you said" in visitor.text()
    expect(visitor.page.locator(".message.assistant")).to_have_count(1)
    expect(visitor.page.locator(".switcher")).to_have_count(0)


@pytest.mark.parametrize(("ask", "words"), [("cut", "ended before"), ("refuse", "4096 fit")])
def test_other_faults_say_what_happened(visitor: Visitor, ask: str, words: str) -> None:
    visitor.say(ask)
    expect(visitor.answer().get_by_role("alert")).to_contain_text(words)


def test_a_server_that_is_gone_is_named(visitor: Visitor) -> None:
    visitor.page.route("**/v1/chat/completions", lambda route: route.abort())
    visitor.say("Hello")
    expect(visitor.answer().get_by_role("alert")).to_contain_text("cannot be reached")
    visitor.page.unroute("**/v1/chat/completions")
    visitor.answer().get_by_role("button", name="Try again").click()
    expect(visitor.answer().locator(".body .prose")).not_to_be_empty()


def test_a_key_is_asked_for_and_kept_for_this_tab_only(browser: Any, site: Site) -> None:
    site.script().key = "secret"
    for one in visit(browser, site):
        one.page.goto(site.url)
        one.page.get_by_role("button", name="Enter it").click()
        one.page.get_by_label("API key").fill("secret")
        one.page.keyboard.press("Tab")
        expect(one.page.locator("#model")).not_to_be_empty()
        assert one.page.evaluate("sessionStorage.getItem('ziphius.key')") == "secret"
        assert "secret" not in one.page.evaluate("JSON.stringify(localStorage)")


@pytest.mark.parametrize("storage", ["full", "off"])
def test_storage_that_fails_stops_nothing(browser: Any, site: Site, storage: str) -> None:
    fail = "throw new DOMException('', 'QuotaExceededError');"
    broken = {
        "full": f"Storage.prototype.setItem = () => {{ {fail} }};",
        "off": f"Object.defineProperty(window, 'localStorage', {{ get() {{ {fail} }} }});",
    }
    for one in visit(browser, site):
        one.page.add_init_script(broken[storage])
        one.open()
        one.say("Hello")
        assert one.text()
        expect(one.page.locator("#notices")).to_contain_text("storage is full or off")


# Safety


def test_nothing_in_an_answer_runs_loads_or_leads_astray(visitor: Visitor) -> None:
    visitor.say("attack")
    visitor.say("attack <img src=x onerror=window.hacked=20><script>window.hacked=21</script>")
    page = visitor.page
    page.locator("#probabilities").click()
    page.locator("#probabilities").click()
    for link in page.locator(".thread .dead-link").all():
        link.click()
    assert page.evaluate("window.hacked") is None
    assert (
        page.locator(
            ".thread :is(script, img, iframe, style, base, meta, object, embed, form)"
        ).count()
        == 0
    )
    addresses = page.locator(".thread a").evaluate_all(
        "all => all.map((a) => [a.href, a.rel, a.target])"
    )
    assert addresses
    for address, rel, target in addresses:
        assert re.match(r"https?:|mailto:", address)
        assert {"noopener", "noreferrer"} <= set(rel.split())
        assert target == "_blank"
    handlers = (
        "all => all.flatMap((e) => [...e.attributes]).filter((a) => a.name.startsWith('on')).length"
    )
    assert page.locator("body *").evaluate_all(handlers) == 0
    assert page.title().startswith("attack")


# Looking closer


def test_pointing_at_a_token_shows_what_else_was_possible(visitor: Visitor) -> None:
    visitor.say("Hello")
    visitor.page.locator("#probabilities").click()
    tokens = visitor.answer().locator(".body .token")
    tokens.nth(3).hover()
    card = visitor.page.get_by_role("tooltip")
    expect(card).to_be_visible()
    assert card.locator("li").count() >= 5
    expect(card.locator(".headline .share")).to_contain_text("%")
    expect(card.locator(".taken")).to_have_count(1)
    visitor.page.mouse.move(2, 2)
    expect(card).to_be_hidden()


def test_the_keyboard_walks_from_token_to_token(visitor: Visitor) -> None:
    visitor.say("Hello")
    visitor.page.keyboard.press("Escape")
    visitor.page.keyboard.press("p")
    first = visitor.answer().locator(".body .token").first
    first.focus()
    visitor.page.keyboard.press("ArrowRight")
    second = visitor.answer().locator(".body .token").nth(1)
    expect(second).to_be_focused()
    card = visitor.page.get_by_role("tooltip")
    expect(card.locator(".headline code")).to_have_text(re.compile(".+"))
    visitor.page.keyboard.press("Escape")
    expect(card).to_be_hidden()


def test_thinking_is_folded_with_its_duration(visitor: Visitor) -> None:
    visitor.page.get_by_role("button", name="Think first").click()
    visitor.say("Hello")
    assert visitor.bodies[-1]["chat_template_kwargs"] == {"thinking": True}
    summary = visitor.answer().locator("summary")
    expect(summary).to_have_text(re.compile(r"Thought for [\d.]+ s"))
    expect(visitor.answer().locator(".thoughts")).to_be_hidden()
    summary.click()
    expect(visitor.answer().locator(".thoughts em")).to_have_text("think")
    assert "whales" not in visitor.text()


def test_calls_of_functions_are_shown_and_can_be_answered(visitor: Visitor) -> None:
    visitor.say("tool")
    call = visitor.answer().locator(".call")
    expect(call.locator("code").first).to_have_text("depth")
    expect(call.locator("pre")).to_contain_text('"species": "Ziphius cavirostris"')
    call.get_by_label("Result of depth").fill("2992")
    visitor.answer().get_by_role("button", name="Send result").click()
    expect(visitor.page.locator(".message.assistant")).to_have_count(2)
    visitor.finished()
    sent = visitor.bodies[-1]["messages"]
    assert sent[1]["tool_calls"][0]["function"]["name"] == "depth"
    assert sent[2] == {"role": "tool", "tool_call_id": "call_1", "content": "2992"}


def test_the_page_follows_until_the_reader_scrolls_up(visitor: Visitor) -> None:
    visitor.site.script().rate = 900
    visitor.say("long", wait=False)
    box = visitor.page.locator("#scroll")
    gap = "e => e.scrollHeight - e.scrollTop - e.clientHeight"
    expect(visitor.answer().locator(".body")).to_contain_text("Paragraph 9")
    visitor.page.wait_for_timeout(50)
    assert box.evaluate("e => e.scrollTop") > 200
    assert box.evaluate(gap) < 60
    box.hover()
    visitor.page.mouse.wheel(0, -150)
    visitor.page.wait_for_timeout(300)
    assert box.evaluate(gap) > 60
    visitor.page.get_by_role("button", name="Jump to latest").click()
    visitor.page.wait_for_timeout(100)
    assert box.evaluate(gap) < 60


@pytest.mark.parametrize("by", ["key", "bar"])
def test_small_steps_up_leave_the_end_too(visitor: Visitor, by: str) -> None:
    visitor.site.script().rate = 300
    visitor.say("long", wait=False)
    expect(visitor.answer().locator(".body")).to_contain_text("Paragraph 11")
    box = visitor.page.locator("#scroll")
    box.focus()
    if by == "key":
        visitor.page.keyboard.press("ArrowUp")
    else:
        box.evaluate("e => { e.scrollTop -= 30; }")
    visitor.page.wait_for_timeout(400)
    top = box.evaluate("e => e.scrollTop")
    assert top > 100
    visitor.page.wait_for_timeout(400)
    assert box.evaluate("e => e.scrollTop") == top
    expect(visitor.page.get_by_role("button", name="Jump to latest")).to_be_visible()
