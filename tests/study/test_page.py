"""The report's page as a browser shows it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
from study import made
from waiting import PATIENCE

from lorica.study.page import page
from lorica.study.report import gather

pytest.importorskip("matplotlib")

BROWSER = next(
    (found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name))), None
)


def _reported(html: str, browser: list[str]) -> dict[str, str]:
    """Show a page in a browser until it posts what it found.

    The clock is the real one: in a browser's virtual time a page may see no frame at all.
    """
    found: Queue[dict[str, str]] = Queue()

    class Serve(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(html.encode() if self.path == "/" else b"")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(b"")
            found.put(json.loads(body))

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        process = subprocess.Popen(
            [*browser, f"http://127.0.0.1:{server.server_port}/"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return found.get(timeout=PATIENCE)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            server.shutdown()


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize(("width", "dark", "blocks"), [(1200, False, 3), (1200, True, 70), (390, False, 24)])
def test_in_a_browser(width: int, dark: bool, blocks: int, tmp_path: Path) -> None:
    """It draws itself without an error, has something in every section, and is no wider than a phone."""
    names = ("q_proj", "v_proj", "down")
    paths = [f"h.{i}.{name}" for i in range(blocks) for name in names]
    one, two = (
        made.adapter({path: made.gaussian(24, 24, r, seed=7 * i + r) for i, path in enumerate(paths)})
        for r in (4, 6)
    )
    base = made.write_base(tmp_path / "base", {f"{path}.weight": torch.randn(24, 24) for path in paths})
    report = gather(one, name="mine", base=base, against=two, against_name="other")
    probe = """<script>
    addEventListener("error", event => document.body.dataset.failed = event.message);
    const tell = found => fetch("/found", {method: "POST", body: JSON.stringify(found)});
    addEventListener("unhandledrejection", event => tell({failed: String(event.reason)}));
    addEventListener("load", async () => {
      const boxes = [...document.querySelectorAll("details.section")];
      const folded = boxes.filter(b => !b.open).length;
      for (const link of document.querySelectorAll("nav a")) link.click();
      for (const fold of document.querySelectorAll("details")) fold.open = true;
      // A ResizeObserver is called in a frame, after its animation callbacks: in the second, all have been.
      await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
      let off = 0, named = 0, covered = 0;
      for (const heat of document.querySelectorAll(".heat")) {
        const canvas = heat.querySelector("canvas"), map = canvas.getBoundingClientRect();
        for (const [kind, n, from, size, a, b] of [
          [".rows", canvas.height, map.top, map.height, "top", "bottom"],
          [".columns", canvas.width, map.left, map.width, "left", "right"],
        ]) {
          const spans = [...heat.querySelectorAll(kind + " span")];
          const every = JSON.parse(heat.dataset[kind.slice(1)]);
          spans.forEach((span, k) => {
            const at = span.getBoundingClientRect(), i = every.indexOf(span.textContent);
            off = Math.max(off, Math.abs((at[a] + at[b]) / 2 - from - (i + .5) / n * size));
            const next = spans[k + 1] && spans[k + 1].getBoundingClientRect();
            if (next && next[a] < at[b] - 2) covered++;
            named++;
          });
        }
      }
      const button = document.querySelectorAll("th button")[1];
      button.click();
      const rows = [...button.closest("table").querySelectorAll("tbody tr")];
      const column = rows.map(r => +r.children[1].textContent);
      const over = new PointerEvent("pointermove", {clientX: 60, clientY: 60});
      document.querySelector("canvas").dispatchEvent(over);
      Object.assign(document.body.dataset, {
        sections: boxes.length, empty: boxes.filter(b => b.children.length < 2).length, folded, off, named,
        covered, contents: document.querySelectorAll("nav a").length,
        sorted: column.every((x, i) => !i || column[i - 1] >= x),
        tip: document.getElementById("tip").textContent,
        wide: document.documentElement.scrollWidth > innerWidth,
        back: getComputedStyle(document.body).backgroundColor,
      });
      await tell(document.body.dataset);
    });</script>"""
    written = tmp_path / "index.html"
    written.write_text(page(report), encoding="utf-8")
    theme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", *theme]
    if folder := os.environ.get("LORICA_SCREENSHOTS"):
        shot = Path(folder) / f"report-{width}-{'dark' if dark else 'light'}.png"
        subprocess.run(
            [*command, f"--screenshot={shot}", written.as_uri()],
            check=True,
            timeout=PATIENCE,
            capture_output=True,
        )
    found = _reported(page(report).replace("<head>", "<head>" + probe), command)
    assert "failed" not in found, found
    assert int(found["sections"]) >= 8
    assert (found["empty"], found["sorted"], found["wide"]) == ("0", "true", "false")
    assert re.search(r": \d", found["tip"])
    assert (found["back"] == "rgb(20, 24, 28)") is dark
    assert found["contents"] == found["sections"]
    assert int(found["folded"]) >= 5
    # Each name stands at the middle of its row or column, and none covers the next.
    assert int(found["named"]) > 20
    assert float(found["off"]) < 1.5
    assert found["covered"] == "0"
