"""Take the pictures of the chat page in README and docs, from a server with a model just trained.

ziphius serve runs/quickstart
python dev/shoot_page.py document http://127.0.0.1:8000 docs/images/page.png
python dev/shoot_page.py chat http://127.0.0.1:8000 docs/images/chat.png
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

START = '''def read_lines(path):
    """Return the lines of a file."""
'''
QUESTIONS = ("Today is Friday. Which day is it in 4 5 days?", "What is 5 8 + 2 7?")
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def write_document(page: Page, tokens: int, point_at: int) -> None:
    """Have a document gone on with, and point at a token of it."""
    page.get_by_role("button", name="Complete", exact=True).click()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Max tokens").first.fill(str(tokens))
    page.get_by_label("Temperature").first.fill("0.5")
    page.get_by_label("Seed").first.fill("4")
    page.keyboard.press("Escape")
    page.get_by_label("Document").fill(START)
    page.keyboard.press("Control+Enter")
    page.locator(".mirror .model").first.wait_for(state="attached")
    page.get_by_role("button", name="Go on").wait_for()
    page.locator("#probabilities").click()
    page.locator(".mirror .token").nth(point_at).hover(force=True)
    page.get_by_role("tooltip").wait_for()


def ask(page: Page) -> None:
    """Ask problems that quickstarts learn, and unfold the first answer's reasoning."""
    page.get_by_role("button", name="Think first").click()
    answers = page.locator(".message.assistant")
    for number, question in enumerate(QUESTIONS):
        page.locator("#input").fill(question)
        page.keyboard.press("Enter")
        answers.nth(number).wait_for()
        page.locator(".message.running").wait_for(state="detached")
    answers.first.locator(".thinking summary").click()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("document", "chat"))
    parser.add_argument("url")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--tokens", type=int, default=110)
    parser.add_argument("--point-at", type=int, default=24, help="which token to look at")
    options = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=ARGUMENTS
        )
        size = {"width": 1200, "height": 760}
        page = browser.new_page(viewport=size, device_scale_factor=1.5)
        page.goto(options.url)
        if options.what == "chat":
            ask(page)
        else:
            write_document(page, options.tokens, options.point_at)
        page.screenshot(path=options.picture)
        browser.close()


if __name__ == "__main__":
    main()
