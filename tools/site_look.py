"""Look at the built site in a browser: screenshots of every page, and what a reader would trip over.

    python -m tools.site_look site --output build/look            # `make look` builds the site first
    python -m tools.site_look site --output build/look --pages index losses

Chromium shows each page at 1,280 and 390 pixels, light and dark. Reported are requests to other hosts
and failed ones, errors of scripts, whatever is wider than its place, text with too little contrast, and search
boxes that do not find what they should.
It needs the package playwright (not its browsers) and Chromium.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

WIDTHS, SCHEMES = (1280, 390), ("light", "dark")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

# What is typed into a page's search box, and what the first thing shown has then; nothing is shown for "".
BOXES = {
    "models": {
        "Llama-3.1-8B": "llama",
        "llama 3.2": "llama",
        "SmolLM2-135M": "llama",
        "mistral-7b": "mistral",
        "Qwen/Qwen2.5-7B-Instruct": "qwen2",
        "google/gemma-2-2b-it": "gemma2",
        "no such model": "",
    },
    "losses": {"simpo": "simpo", "noisy": "robust", "slic": "hinge", "no such loss": ""},
}

# Runs in the page; returns messages. What scrolls sideways is reported on a wide screen, where code
# and tables have to fit; on a narrow one only what sticks out of the page.
INSPECT = """
(wide) => {
  const found = [], seen = new Set();
  const say = (message, key = message) => { if (!seen.has(key)) { seen.add(key); found.push(message); } };
  const shown = (text) => text.trim().replace(/\\s+/g, ' ').slice(0, 70);
  const root = document.documentElement;
  document.querySelectorAll('details').forEach((details) => (details.open = true));
  if (root.scrollWidth > root.clientWidth) say(`the page is ${root.scrollWidth} wide`);
  for (const box of document.querySelectorAll('.md-content :is(pre > code, .md-typeset__scrollwrap, div.math)')) {
    if (wide && box.clientWidth && box.scrollWidth > box.clientWidth + 1)
      say(`${box.scrollWidth - box.clientWidth} pixels cut: ${shown(box.innerText)}`);
  }
  for (const math of document.querySelectorAll('.md-content math')) {
    const inner = math.getBoundingClientRect(), outer = math.closest('p, li, td, div').getBoundingClientRect();
    if (inner.right > outer.right + 1 && getComputedStyle(math.closest('p, li, td, div')).overflowX === 'visible')
      say(`a formula sticks out: ${shown(math.textContent)}`);
  }
  for (const image of document.querySelectorAll('.md-content img'))
    if (!image.naturalWidth && image.loading !== 'lazy') say(`no picture: ${image.src}`);
  const parse = (colour) => {
    const n = colour.match(/[\\d.]+/g).map(Number);
    const scale = colour.startsWith('color(srgb') ? 255 : 1;
    return [n[0] * scale, n[1] * scale, n[2] * scale, n[3] ?? 1];
  };
  const over = (a, b) => a.slice(0, 3).map((x, i) => x * a[3] + b[i] * (1 - a[3])).concat(1);
  const light = (c) => c.slice(0, 3).map((x) => x / 255)
    .map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const background = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]);
  };
  const walk = document.createTreeWalker(document.querySelector('.md-content'), NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement, text = walk.currentNode.textContent;
    if (!text.trim() || !element.checkVisibility({ visibilityProperty: true, opacityProperty: true })) continue;
    if (element.closest('.headerlink, script, style, svg')) continue;
    const below = background(element), colour = over(parse(getComputedStyle(element).color), below);
    const [a, b] = [light(colour), light(below)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const kind = element.className || element.tagName;
    if (ratio < 4.5) say(`contrast ${ratio.toFixed(2)}: ${kind} ${shown(text).slice(0, 20)}`, kind);
  }
  return found;
}
"""


def pages(site: Path) -> list[str]:
    """Names of all pages, "" for the first."""
    found = [path.parent.relative_to(site).as_posix() for path in site.rglob("index.html")]
    return ["" if name == "." else name for name in sorted(found)] + ["404.html"]


def serve(site: Path, prefix: str) -> http.server.ThreadingHTTPServer:
    """The site under `prefix`, as it stands on the web, on a free port."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            return super().translate_path(path.removeprefix(prefix))

        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def look(browser: Any, base: str, name: str, output: Path) -> list[str]:
    """Screenshots of one page into `output`; what is wrong with it."""
    found = []
    for scheme in SCHEMES:
        for width in WIDTHS:
            where = f"{name or 'index'} at {width}, {scheme}"
            page = browser.new_page(
                viewport={"width": width, "height": 900},
                color_scheme=scheme,
                reduced_motion="reduce",
            )
            said: list[str] = []
            page.on("request", functools.partial(_foreign, said, base))
            page.on("requestfailed", lambda r, said=said: said.append(f"failed: {r.url}"))
            page.on("response", lambda r, said=said: _bad_status(said, r))
            page.on("pageerror", lambda error, said=said: said.append(f"script: {error}"))
            page.on(
                "console", lambda m, said=said: said.append(m.text) if m.type == "error" else None
            )
            page.goto(f"{base}{name}{'' if not name or name.endswith('.html') else '/'}")
            page.wait_for_timeout(150)
            said += page.evaluate(INSPECT, width == max(WIDTHS))
            file = output / f"{(name or 'index').replace('/', '-')}-{width}-{scheme}.png"
            page.screenshot(path=file, full_page=True)
            page.close()
            found += [f"{where}: {message}" for message in said]
    return found


def boxes(browser: Any, base: str, name: str) -> list[str]:
    """What the search box of a page does not find, does not say, or forgets on the way back."""
    found = []
    page = browser.new_page(reduced_motion="reduce")
    shown = page.locator(".filterable :is(.item h4, tbody td:first-child):visible")
    for typed, expected in BOXES.get(name, {}).items():
        page.goto(f"{base}{name}/")
        page.fill(".filter input", typed)
        first = shown.first.inner_text().split("\n")[0].rstrip("¶").strip() if shown.count() else ""
        if first != expected:
            found.append(f"{name}: {typed!r} finds {first!r} first, expected {expected!r}")
        if not expected and not page.locator(".filter p:visible").count():
            found.append(f"{name}: no word of advice where {typed!r} finds nothing")
        count = shown.count()
        page.goto(base)
        page.go_back()
        if page.input_value(".filter input") == typed and shown.count() != count:
            found.append(
                f"{name}: on the way back to {typed!r} {shown.count()} are shown, not {count}"
            )
    page.close()
    return found


def _foreign(said: list[str], base: str, request: Any) -> None:
    if not request.url.startswith((base, "data:", "blob:")):
        said.append(f"asked elsewhere: {request.url}")


def _bad_status(said: list[str], response: Any) -> None:
    if response.status >= 400:
        said.append(f"{response.status}: {response.url}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("site", type=Path, help="folder of the built site")
    parser.add_argument(
        "--pages", nargs="+", help="names of pages, such as losses; all without any"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the screenshots")
    parser.add_argument("--prefix", default="/fastdpop", help="path of the site on its host")
    options = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright  # type: ignore[import-not-found]
    except ImportError:
        print("tools.site_look needs the package playwright: make look", file=sys.stderr)
        return 1
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("no Chromium was found: on Debian and Ubuntu, apt install chromium", file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    server = serve(options.site, options.prefix)
    base = f"http://127.0.0.1:{server.server_port}{options.prefix}/"
    count = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        for name in ["" if n == "index" else n for n in options.pages or []] or pages(options.site):
            for message in [
                *look(browser, base, name, options.output),
                *boxes(browser, base, name),
            ]:
                print(message, flush=True)
                count += 1
        browser.close()
    server.shutdown()
    print(f"{count} findings; screenshots are in {options.output}")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
