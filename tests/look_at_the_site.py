"""Open every page of a built site in headless Chromium, as on a phone, and say what is wrong with it.

python tests/look_at_the_site.py site

Needs Chromium and the package playwright. Errors on the console, requests to other hosts, missing files, formulas that
were not drawn and pages wider than the screen are faults; the exit status tells.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

WIDTH = 390


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def look(page: Page, origin: str, path: str) -> list[str]:
    """What is wrong with one page."""
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith((origin, "data:")) else faults.append(asked.url))
    page.on("response", lambda answer: None if answer.ok else faults.append(f"{answer.status}: {answer.url}"))
    page.goto(origin + path, wait_until="networkidle")
    width = page.evaluate("document.documentElement.scrollWidth")
    if width > WIDTH:
        faults.append(f"{width} pixels wide")
    if page.locator(".arithmatex, merror").count() or "\\(" in page.locator("article").inner_text():
        faults.append("a formula that is not drawn")
    for formula in page.locator("math").all():
        if formula.bounding_box() is None and formula.is_visible():
            faults.append("an empty formula")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--pictures", type=Path, help="a folder for pictures of Home, on a phone, light and dark")
    options = parser.parse_args()
    server = ThreadingHTTPServer(("localhost", 0), functools.partial(Quiet, directory=str(options.site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    origin = f"http://localhost:{server.server_port}/"
    paths = sorted(str(path.parent.relative_to(options.site)) for path in options.site.rglob("index.html"))
    faults = formulas = 0
    with sync_playwright() as browsers:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = browsers.chromium.launch(executable_path=chromium, args=arguments)
        for path in paths:
            page = browser.new_page(viewport={"width": WIDTH, "height": 844})
            for fault in look(page, origin, path + "/"):
                print(f"{path}: {fault}")
                faults += 1
            formulas += page.locator("math").count()
            page.close()
        for scheme in ("light", "dark") if options.pictures else ():
            page = browser.new_page(viewport={"width": WIDTH, "height": 844}, color_scheme=scheme)
            page.goto(origin, wait_until="networkidle")
            page.screenshot(path=options.pictures / f"home-{scheme}.png", full_page=True)
        browser.close()
    print(f"{len(paths)} pages, {formulas} formulas, {faults} faults")
    return 1 if faults or not formulas else 0


if __name__ == "__main__":
    sys.exit(main())
