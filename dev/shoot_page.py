"""Take the picture of the chat page that the README shows, from a server with a model just trained.

ziphius serve runs/quickstart
python dev/shoot_page.py http://127.0.0.1:8000 docs/images/page.png
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

START = '''def read_lines(path):
    """Return the lines of a file."""
'''
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
        page.get_by_role("button", name="Complete", exact=True).click()
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Max tokens").first.fill(str(options.tokens))
        page.get_by_label("Temperature").first.fill("0.5")
        page.get_by_label("Seed").first.fill("4")
        page.keyboard.press("Escape")
        page.get_by_label("Document").fill(START)
        page.keyboard.press("Control+Enter")
        page.locator(".mirror .model").first.wait_for(state="attached")
        page.get_by_role("button", name="Go on").wait_for()
        page.locator("#probabilities").click()
        page.locator(".mirror .token").nth(options.point_at).hover(force=True)
        page.get_by_role("tooltip").wait_for()
        page.screenshot(path=options.picture)
        browser.close()


if __name__ == "__main__":
    main()
