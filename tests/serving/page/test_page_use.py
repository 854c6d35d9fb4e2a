"""The chat page in a browser: conversations, settings, keyboard, phone."""

import re
from pathlib import Path

import pytest

from tests.serving.page.browser import Visitor, saved

api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
expect = api.expect


# Conversations and settings


def test_conversations_are_listed_deleted_and_had_back(visitor: Visitor, tmp_path: Path) -> None:
    visitor.say("about whales")
    visitor.page.get_by_role("button", name="New conversation").click()
    visitor.say("about squid")
    rows = visitor.page.locator("#talks li")
    expect(rows).to_have_count(2)
    rows.filter(has_text="whales").hover()
    with visitor.page.expect_download() as download:
        visitor.page.get_by_label("Export “about whales” as JSON").click()
    talk = saved(tmp_path, download.value)
    assert talk["title"] == "about whales"
    visitor.page.get_by_label("Delete “about whales”").click()
    expect(rows).to_have_count(1)
    visitor.page.get_by_role("button", name="Undo").click()
    expect(rows).to_have_count(2)
    expect(visitor.page.locator(".message.user")).to_have_text("about whales")
    visitor.page.reload()
    expect(rows).to_have_count(2)


def test_an_answer_goes_on_while_another_conversation_is_open(visitor: Visitor) -> None:
    visitor.say("slow please", wait=False)
    expect(visitor.answer().locator(".body")).to_contain_text("Paragraph 1")
    early = visitor.text()
    visitor.page.get_by_role("button", name="New conversation").click()
    expect(visitor.page.locator("#talks .pulse")).to_be_visible()
    visitor.say("hello")
    visitor.page.locator("#talks .open").filter(has_text="slow").click()
    assert len(visitor.text()) > len(early)
    visitor.page.keyboard.press("Escape")
    expect(visitor.page.locator("#talks .pulse")).to_have_count(0)


def test_settings_reach_the_server_and_wrong_ones_do_not(visitor: Visitor) -> None:
    page = visitor.page
    page.locator("#settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    expect(page.get_by_label("Temperature")).to_have_attribute(
        "placeholder", re.compile(r"[\d.]+|server")
    )
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_label("Top-p").fill("7")
    expect(page.get_by_label("Top-p")).to_have_attribute("aria-invalid", "true")
    page.get_by_label("Seed").fill("5")
    page.get_by_label("Max tokens").fill("64")
    page.keyboard.press("Escape")
    visitor.say("Hello")
    body = visitor.bodies[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.3, 5, 64)
    assert "top_p" not in body


def test_the_theme_is_chosen_and_kept(visitor: Visitor) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light = visitor.page.evaluate(paper)
    visitor.page.locator("#theme").click()
    assert visitor.page.evaluate(paper) != light
    visitor.page.reload()
    assert visitor.page.evaluate(paper) != light


# Ways to use it


def test_the_keyboard_is_enough(visitor: Visitor) -> None:
    page = visitor.page
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    visitor.finished()
    page.keyboard.press("ArrowUp")
    expect(page.get_by_label("Edit your message")).to_be_focused()
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("Shortcuts")
    page.keyboard.press("Escape")
    page.keyboard.press("n")
    expect(page.locator(".welcome")).to_be_visible()
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.press("Escape")
    page.keyboard.press("l")
    page.keyboard.press("Enter")
    expect(page.locator(".message.user")).to_have_text("Hello")


def test_everything_that_takes_the_focus_has_a_name_and_shows_it(visitor: Visitor) -> None:
    visitor.say("sample")
    page = visitor.page
    nameless = page.locator("button, input, textarea, a, summary").evaluate_all(
        "all => all.filter((e) => e.checkVisibility() && !e.getAttribute('aria-label')"
        " && !e.textContent.trim() && !e.labels?.length).map((e) => e.outerHTML)"
    )
    assert nameless == []
    page.evaluate("document.activeElement.blur()")
    seen = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        where, outline, shadow, border = page.evaluate(
            "(() => { const e = document.activeElement; const s = getComputedStyle(e);"
            " const name = e.id || e.className || e.tagName;"
            " return [name, s.outlineStyle, s.boxShadow, Boolean(e.closest('.composer'))]; })()"
        )
        seen.add(where)
        assert outline != "none" or shadow != "none" or border or where == "BODY", where
    assert {"input", "settings", "probabilities", "new", "menu"} <= seen


def test_a_folded_list_is_out_of_the_way(visitor: Visitor) -> None:
    page = visitor.page
    page.get_by_role("button", name="Conversations").click()
    assert page.locator("main").bounding_box()["x"] == 0
    assert page.locator("#new").evaluate("e => { e.focus(); return document.activeElement !== e; }")
    page.get_by_role("button", name="Conversations").click()
    assert page.locator("main").bounding_box()["x"] > 200


def test_a_phone_shows_everything_without_sideways_scrolling(phone: Visitor) -> None:
    page = phone.page
    wide = (
        "[document.documentElement, document.querySelector('#scroll')]"
        ".some((e) => e.scrollWidth > e.clientWidth)"
    )
    assert not page.evaluate(wide)
    phone.page.locator("#input").fill("sample")
    phone.page.get_by_role("button", name="Send").tap()
    phone.finished()
    assert not page.evaluate(wide)
    page.locator("#probabilities").tap()
    assert not page.evaluate(wide)
    phone.answer().locator(".body .token").nth(5).tap()
    card = page.get_by_role("tooltip").bounding_box()
    assert card["x"] >= 0
    assert card["x"] + card["width"] <= 360
    page.get_by_role("button", name="Conversations").tap()
    expect(page.locator("#talks .open")).to_be_visible()
    page.locator("#talks .open").tap()
    expect(page.locator("#talks .open")).not_to_be_visible()
    page.locator("#settings").tap()
    assert not page.evaluate(wide)
    box = page.get_by_role("dialog").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360.5
