"""
Take the pictures of the page of `diffusionvmr app` for the documentation, with Chromium: in light and dark mode, on a
desktop and on a phone.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import pipeline

from modeling_diffusionvmr import DEFAULT_MODEL
from modeling_diffusionvmr.app.server import running
from modeling_diffusionvmr.cli.errors import run_safely
from modeling_diffusionvmr.cli.options import CommandParser, check_output

ROOT = Path(__file__).resolve().parents[1]
DESKTOP = {"viewport": {"width": 1280, "height": 1000}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
# Options of the visitor, and whether the picture shows the whole page
PICTURES = {
    "app.png": ({**DESKTOP, "color_scheme": "light"}, True),
    "app_dark.png": ({**DESKTOP, "color_scheme": "dark"}, True),
    "app_phone.png": ({**PHONE, "color_scheme": "light"}, False),
}
EXAMPLE = 1
SENTENCES = 3  # the last one is true nowhere


def main(arguments: argparse.Namespace) -> None:
    """Take all pictures."""
    from playwright.sync_api import sync_playwright

    check_output(arguments.output_dir, "--output_dir")
    chromium = arguments.chromium or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise ValueError("no Chromium found; name it with --chromium")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    with running(pipeline("video-moment-retrieval", model=DEFAULT_MODEL)) as app, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (options, whole) in PICTURES.items():
            page = browser.new_context(**options).new_page()
            page.goto(app.url)
            example = app.examples[EXAMPLE]
            page.get_by_role("button", name=example.title).click()
            page.wait_for_selector("#player video")
            page.fill("#sentences textarea", "\n".join((*example.sentences[: SENTENCES - 1], example.sentences[-1])))
            page.click("#find")
            page.click("#timeline li button")
            page.wait_for_timeout(2000)
            page.evaluate("document.querySelector('#player video').pause()")
            if not whole:
                page.locator("#find").scroll_into_view_if_needed()
                page.evaluate(
                    "window.scrollTo(0, document.querySelector('#find').getBoundingClientRect().top + scrollY)"
                )
            page.mouse.move(0, 0)
            page.wait_for_timeout(500)
            page.screenshot(path=arguments.output_dir / name, full_page=whole)
            print(f"saved {arguments.output_dir / name}")
        browser.close()


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="python scripts/take_screenshots.py", description=__doc__)
    parser.add_argument(
        "--output_dir", type=Path, default=ROOT / "docs" / "images", help="where to save them (default: docs/images)"
    )
    parser.add_argument("--chromium", help="the program (default: chromium or google-chrome on the path)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_safely(main, parse_arguments())
