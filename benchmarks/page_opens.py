"""How long a browser takes to open the report's page: the best of five, until its `load` event is over.

    WORKBENCH_CHROMIUM=/path/to/chromium python -P benchmarks/page_opens.py OUT

A page of 24 pairs of artifact and engine and one of 200, written to OUT. The claim: the first is there in a second.
Exit code 1 if not. What the page holds, and that it asks nothing of a network, is in tests/report/site/. Run from the
repository root on an idle machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from tests.report.site import chromium  # noqa: E402
from tests.rows import a_house  # noqa: E402
from workbench.report.site import page  # noqa: E402
from workbench.report.table import build  # noqa: E402

LIMIT_S = 1.0
LOADED = "(e => e.loadEventEnd || e.domComplete)(performance.getEntriesByType('navigation')[0])"


def main() -> int:
    folder, took = Path(sys.argv[1]), {}
    if chromium.executable() is None:
        sys.exit(chromium.WHY_NOT)
    folder.mkdir(parents=True, exist_ok=True)
    with chromium.browser(folder) as tab:
        for pairs in (24, 200):
            file = folder / f"{pairs}.html"
            file.write_text(page.page(build(a_house(pairs))))
            seconds = []
            for _ in range(5):
                tab.open(file, 1280)
                seconds.append(float(tab(LOADED)) / 1000)
            took[pairs] = min(seconds)
            print(f"{pairs} pairs: {took[pairs]:.2f} s")
    return int(took[24] >= LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
