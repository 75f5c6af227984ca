"""Headless Chromium, for what only a browser can tell: complaints on its console, colours, and where text really is."""

import html
import json
import os
import re
import shutil
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
_SCHEMES = {"dark": 0, "light": 1}
_MEASURE = """<script>
const found = [];
for (const svg of document.querySelectorAll('svg[role=img]')) {
  const frame = svg.viewBox.baseVal, texts = [...svg.querySelectorAll('text')];
  const boxes = texts.map(text => text.getBBox());
  const name = text => text.lastChild.nodeValue;
  boxes.forEach((box, i) => {
    if (box.x < -1 || box.y < -1 || box.x + box.width > frame.width + 1 || box.y + box.height > frame.height + 1)
      found.push('outside: ' + name(texts[i]));
    boxes.slice(0, i).forEach((other, j) => {
      const wide = Math.min(box.x + box.width, other.x + other.width) - Math.max(box.x, other.x);
      const high = Math.min(box.y + box.height, other.y + other.height) - Math.max(box.y, other.y);
      if (wide > 2 && high > 4) found.push('overlap: ' + name(texts[i]) + ' / ' + name(texts[j]));
    });
  });
}
if (document.documentElement.scrollWidth > innerWidth) found.push('sideways: ' + document.documentElement.scrollWidth);
document.title = 'measured ' + JSON.stringify(found);
</script>"""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the browser saw."""

    console: list[str]
    """Every line on its console: errors, refused resources, broken styles."""
    corner: str
    """Colour of the top left pixel, as #rrggbb."""
    problems: list[str]
    """Texts outside their drawing or over each other, and a page wider than its window; only if asked to measure."""


def open_page(path: Path, *, scheme: str, width: int = 1200, measures: bool = False) -> Seen:
    """Open a page in a colour scheme; measuring adds a script to a copy of it."""
    folder = path.parent
    shot = folder / "shot.png"
    done = _run(path, f"--screenshot={shot}", scheme=scheme, width=width, folder=folder)
    console = [line.split("CONSOLE", 1)[1] for line in done.stderr.splitlines() if "CONSOLE" in line]
    problems: list[str] = []
    if measures:
        copy = folder / "measured.html"
        text = re.sub(r"<meta http-equiv=[^>]*>", "", path.read_text(encoding="utf-8"))
        copy.write_text(text.replace("</body>", _MEASURE + "</body>"), encoding="utf-8")
        dumped = _run(copy, "--dump-dom", scheme=scheme, width=width, folder=folder).stdout
        title = re.search(r"<title>measured (.*?)</title>", dumped, flags=re.DOTALL)
        assert title, dumped[:500]
        problems = json.loads(html.unescape(title.group(1)))
    return Seen(console, _first_pixel(shot.read_bytes()), problems)


def _run(path: Path, action: str, *, scheme: str, width: int, folder: Path) -> "subprocess.CompletedProcess[str]":
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={_SCHEMES[scheme]}",
        f"--window-size={width},1000",
        action,
        path.as_uri(),
    ]
    environment = os.environ | {"HOME": str(folder), "NO_AT_BRIDGE": "1"}
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=True, errors="replace"
    )


def _first_pixel(png: bytes) -> str:
    """Whatever a row's filter is, it leaves the very first pixel of a PNG as it is."""
    data = b"".join(png[match.end() : match.end() + int.from_bytes(png[match.start() - 4 : match.start()])]
                    for match in re.finditer(rb"IDAT", png))  # fmt: skip
    start = zlib.decompressobj().decompress(data, 4)
    return "#" + start[1:4].hex()
