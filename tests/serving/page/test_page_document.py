"""Documents that the model goes on with, on the page of a model that cannot chat."""

import re

import pytest

from tests.serving.page.browser import Visitor

api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
expect = api.expect
START = "def fibonacci(n):\n"


def written(reader: Visitor) -> str:
    """Wait until nothing is being written and return the text."""
    expect(reader.page.get_by_role("button", name="Go on")).to_be_visible()
    return str(reader.page.get_by_label("Document").input_value())


def begin(reader: Visitor) -> str:
    """Have the model go on with a function and return the text."""
    reader.page.get_by_label("Document").fill(START)
    reader.page.keyboard.press("Control+Enter")
    expect(reader.page.locator(".mirror .model").first).to_be_attached()
    return written(reader)


def test_a_base_model_is_met_as_a_document(reader: Visitor) -> None:
    expect(reader.page.get_by_role("button", name="Complete", exact=True)).to_have_attribute(
        "aria-pressed", "true"
    )
    reader.page.get_by_role("button", name="def fibonacci(n)").click()
    text = written(reader)
    assert text.startswith(START)
    assert len(text) > len(START)
    body = reader.bodies[-1]
    assert body["prompt"] == START
    assert body["logprobs"] == 5
    assert body["max_tokens"] > 0
    expect(reader.page.locator(".toolbar .stats")).to_contain_text("tokens/s")


def test_a_base_model_can_be_asked_all_the_same(reader: Visitor) -> None:
    reader.page.get_by_role("button", name="Chat", exact=True).click()
    reader.say("Hello")
    assert reader.text()
    reader.page.reload()
    expect(reader.page.locator(".message.user")).to_have_text("Hello")


def test_the_mirror_is_the_text(reader: Visitor) -> None:
    text = begin(reader)
    mirror = reader.page.locator(".mirror")
    assert mirror.evaluate("e => e.textContent").rstrip("\u200b") == text
    sizes = reader.page.evaluate(
        "['.mirror', '.paper'].map((s) => { const e = document.querySelector(s);"
        " const c = getComputedStyle(e);"
        " return [e.clientWidth, e.scrollHeight, c.font, c.padding, c.letterSpacing, c.tabSize]; })"
    )
    assert sizes[0] == sizes[1]


def test_again_writes_another_and_undo_takes_it_back(reader: Visitor) -> None:
    text = begin(reader)
    reader.page.get_by_role("button", name="Again").click()
    expect(reader.page.locator(".mirror .model").first).to_be_attached()
    assert written(reader).startswith(START)
    assert reader.bodies[-1]["prompt"] == START
    reader.page.get_by_role("button", name="Undo").click()
    assert reader.page.get_by_label("Document").input_value() == text
    reader.page.get_by_role("button", name="Undo").click()
    assert reader.page.get_by_label("Document").input_value() == START


def test_another_token_can_be_chosen(reader: Visitor) -> None:
    begin(reader)
    page = reader.page
    page.locator("#probabilities").click()
    token = page.locator(".mirror .token").nth(3)
    before = "".join(
        page.locator(".mirror > span").nth(i).evaluate("e => e.textContent") for i in range(4)
    )
    box = token.bounding_box()
    page.mouse.move(box["x"] + 2, box["y"] + box["height"] / 2)
    card = page.get_by_role("tooltip")
    expect(card).to_be_visible()
    choice = card.locator("button.row").first
    chosen = choice.locator("code").inner_text().replace("·", " ").replace("↵", "\n")
    choice.click()
    page.wait_for_timeout(100)
    assert written(reader).startswith(before + chosen)
    assert reader.bodies[-1]["prompt"] == before + chosen


def test_the_keyboard_chooses_another_token_at_the_caret(reader: Visitor) -> None:
    begin(reader)
    page = reader.page
    page.locator("#probabilities").click()
    page.get_by_label("Document").press("Control+Home")
    page.get_by_label("Document").press("ArrowDown")
    card = page.get_by_role("tooltip")
    expect(card).to_be_visible()
    assert card.locator("li").first.locator("button").count() == 0
    page.keyboard.press("Alt+1")
    assert len(reader.bodies) == 1
    page.keyboard.press("Alt+2")
    page.wait_for_timeout(100)
    written(reader)
    assert len(reader.bodies) == 2
    assert reader.bodies[-1]["prompt"] != START


def test_what_a_person_changes_is_no_token_any_more(reader: Visitor) -> None:
    begin(reader)
    field = reader.page.get_by_label("Document")
    tokens = reader.page.locator(".mirror .token")
    before = tokens.count()
    field.press("Control+End")
    field.press_sequentially("x = 1")
    assert tokens.count() == before
    field.press("Control+Home")
    field.press_sequentially("# ")
    assert tokens.count() == before
    field.fill(field.input_value().replace("return n\n", "return m\n"))
    assert tokens.count() == before - 1
    expect(reader.page.get_by_role("button", name="Again")).to_have_count(0)


def test_a_document_survives_a_reload_in_the_middle(reader: Visitor) -> None:
    reader.page.get_by_label("Document").fill("# slow\n")
    reader.page.keyboard.press("Control+Enter")
    expect(reader.page.locator(".mirror .token").nth(4)).to_be_attached()
    kept = reader.page.get_by_label("Document").input_value()
    reader.page.reload()
    expect(reader.page.get_by_label("Document")).to_have_value(re.compile(re.escape(kept)))
    expect(reader.page.locator(".toolbar .stats")).to_contain_text("interrupted")


def test_escape_stops_the_writing(reader: Visitor) -> None:
    reader.page.get_by_label("Document").fill("# slow\n")
    reader.page.keyboard.press("Control+Enter")
    expect(reader.page.locator(".mirror .token").nth(2)).to_be_attached()
    reader.page.keyboard.press("Escape")
    text = written(reader)
    reader.page.wait_for_timeout(200)
    assert written(reader) == text
    expect(reader.page.locator(".toolbar .stats")).to_contain_text("stopped")
