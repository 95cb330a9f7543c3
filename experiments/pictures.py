"""The pictures of the page that README shows: python -m experiments.pictures

Opens look.html, as `python look.py` writes it after `python train.py`, in Chromium, wide and narrow, light and dark, and writes
docs/look-WIDTH-SCHEME.png, each below 300 KB. Needs playwright and Chromium.
"""
import sys
from pathlib import Path

import look
from inside.browser import browser, missing, opened

DOCS = Path(__file__).resolve().parent.parent / "docs"
SIZES = {1280: 1010, 390: 844}


def main():
    if why := missing():
        sys.exit(f"experiments.pictures: error: {why}")
    page_file = Path("look.html")
    look.main(["--out", str(page_file)])
    with browser() as one:
        for width, height in SIZES.items():
            for scheme in ("light", "dark"):
                path = DOCS / f"look-{width}-{scheme}.png"
                with opened(one, page_file.resolve(), width, height, dark=scheme == "dark") as page:
                    if page.said:
                        sys.exit(f"experiments.pictures: error: the page complains: {page.said[0]}")
                    page.screenshot(path=path)
                print(f"{path}: {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
