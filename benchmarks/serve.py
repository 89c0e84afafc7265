"""How soon the gallery is painted, beside an empty Gradio page, in the same Chromium and the same rounds.

First contentful paint from the start of the navigation, each page in a new browser context (nothing cached), both
servers on loopback, interleaved; and how long each server takes to answer, without a browser. Bars: the gallery's
median within 300 ms and no later than the empty Gradio page.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright
from timing import ratio, verdict

ROUNDS = 15
ROOT = Path(__file__).parents[1]
OURS = [sys.executable, "-m", "paperworks", "serve", "--port", "0"]
GRADIO = """
import gradio as gr
with gr.Blocks(analytics_enabled=False) as page:
    pass
_, address, _ = page.launch(quiet=True, prevent_thread_lock=True, inbrowser=False)
print(address, flush=True)
page.block_thread()
"""
PAINT = """() => new Promise(resolve => new PerformanceObserver(list => {
  for (const entry of list.getEntries()) if (entry.name === "first-contentful-paint") resolve(entry.startTime);
}).observe({ type: "paint", buffered: true }))"""


@contextmanager
def serving(command: list[str], folder: Path) -> Iterator[str]:
    """A server in a folder; gives the address that it prints."""
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as server:
        line = server.stdout.readline()
        yield next(word for word in line.split() if word.startswith("http")).rstrip("/")
        server.terminate()


def painted(browser: Browser, address: str) -> float:
    """Milliseconds until the first contentful paint."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.goto(f"{address}/", wait_until="commit")
    found = page.evaluate(PAINT)
    context.close()
    return found


def answered(address: str) -> float:
    begun = time.perf_counter()
    with urllib.request.urlopen(f"{address}/") as answer:
        answer.read()
    return 1e3 * (time.perf_counter() - begun)


def main() -> int:
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        shutil.copytree(ROOT / "results", folder / "results")
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with serving(OURS, folder) as ours, serving([sys.executable, "-c", GRADIO], folder) as gradio:
            rows = [
                (painted(browser, ours), painted(browser, gradio), answered(ours), answered(gradio))
                for _ in range(ROUNDS + 1)
            ][1:]
        browser.close()
    paint, paint_gradio, answer, answer_gradio = map(list, zip(*rows, strict=True))
    print(f"first paint: {statistics.median(paint):.0f} ms, empty Gradio page {statistics.median(paint_gradio):.0f} ms")
    print(f"answer: {statistics.median(answer):.1f} ms, Gradio {statistics.median(answer_gradio):.1f} ms")
    met = [
        verdict("gallery: first paint, ms", statistics.median(paint), at_most=300),
        verdict("gallery: first paint / empty Gradio page's", ratio(paint, paint_gradio), at_most=1.0),
    ]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
