"""Make the pictures of docs/partition-viz.md: `python docs/screenshots.py` (Chromium and Playwright have to be there).

A measured run is made anew each time, so its pictures differ from time to time; the others do not.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).parent / "images"
GPT2 = '''
import torch
from stagecut.models.transformer import GPT

def small():
    """GPT-2 small: 12 layers, width 768, a batch of 32 times 1024 tokens."""
    with torch.device("meta"):
        model = GPT(vocab=50257, d_model=768, n_layers=12, n_heads=12, max_len=1024, tied=True)
        return model, (torch.zeros(32, 1024, dtype=torch.long),)
'''
A100S = ["--cluster", "sim:4xA100-80GB", "--stages", "4"]


def viz(*arguments: str) -> None:
    """Run the command."""
    subprocess.run([sys.executable, "-m", "stagecut.tools.partition_viz", *arguments], check=True)


def shoot(browser: Any, page: Path, name: str, hash: str = "", view: str = "", **options: Any) -> None:
    """Take a picture of a page as it opens, or of one of its views."""
    size = {"width": 1440, "height": 1800 if view else 900}  # a whole view, with nothing of the page's head over it
    context = browser.new_context(**{"viewport": size, "offline": True, **options})
    tab = context.new_page()
    tab.goto(f"{page.as_uri()}{hash}")
    tab.wait_for_selector("#report header")
    target = tab.locator(f"section#{view}") if view else tab
    target.screenshot(path=IMAGES / f"{name}.png")
    context.close()


def main() -> None:
    """Plan, measure, and take the pictures."""
    IMAGES.mkdir(exist_ok=True)
    chromium = shutil.which("chromium")
    assert chromium, "apt-get install chromium"
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        at = Path(folder)
        (at / "gpt2.py").write_text(GPT2)
        plans = {
            "unet": ["demo:unet", *A100S, "--batch", "64", "--microbatches", "8", "--schedule", "1f1b"],
            "resnet50": ["torchvision:resnet50", *A100S, "--batch", "256"],
            "gpt2": [f"{at / 'gpt2.py'}:small", *A100S, "--microbatches", "8", "--schedule", "1f1b"],
        }
        for name, arguments in plans.items():
            viz("report", *arguments, "-o", str(at / f"{name}.html"))
        gpt = ["demo:gpt", "--devices", "cpu,cpu", "--stages", "2", "--schedule", "1f1b", "--microbatches", "8"]
        viz("profile", *gpt, "--batch", "32", "--steps", "20", "-o", str(at / "run.json"))
        viz("report", str(at / "run.json"), "-o", str(at / "run.html"))
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name in plans:
            shoot(browser, at / f"{name}.html", name)
        shoot(browser, at / "gpt2.html", "gpt2-dark", "#stage=1", color_scheme="dark")
        shoot(browser, at / "resnet50.html", "resnet50-timeline", view="timeline")
        shoot(browser, at / "resnet50.html", "resnet50-whatif", view="whatif")
        shoot(browser, at / "unet.html", "unet-memory", view="memory")
        shoot(browser, at / "unet.html", "unet-telephone", viewport={"width": 390, "height": 844})
        shoot(browser, at / "run.html", "measured", view="timeline")
        browser.close()


if __name__ == "__main__":
    main()
