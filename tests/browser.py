"""A browser for tests of pages, Debian's Chromium without a window; and a listener that hears requests."""

import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

PROGRAMS = (Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver"))
_ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)


@dataclass(frozen=True)
class Browser:
    """A browser with one page open.

    Args:
        driver: Selenium's, for what is not here.
    """

    driver: object

    def open(self, path: Path, *, width: int = 1280, dark: bool = False) -> None:
        """Open a file, in a window of this width; under 600 pixels it is a phone."""
        sizes = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(path.resolve().as_uri())

    def run(self, script: str, *values: object) -> object:
        """What a script returns in the page; it may wait for promises with ``await``."""
        found = self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            f"(async (...given) => {{ {script} }})(...arguments)"
            ".then(value => done({value}), error => done({error: String(error.stack || error)}));",
            *values,
        )
        assert "error" not in found, found["error"]
        return found.get("value")

    def each(self, selector: str, expression: str) -> list[object]:
        """What an expression about ``one`` gives for each element that a selector finds."""
        return self.run(f"return [...document.querySelectorAll(given[0])].map(one => {expression})", selector)

    def press(self, *keys: str) -> None:
        """Press keys, one after the other."""
        for key in keys:
            self.run(
                "document.body.dispatchEvent(new KeyboardEvent('keydown', { key: given[0], bubbles: true }));"
                "await new Promise(done => setTimeout(done, 20));",
                key,
            )

    @property
    def processor_seconds(self) -> float:
        """What all processes of the browser have used of the cores so far."""
        children: dict[int, list[tuple[int, int]]] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended
                continue
            ticks = int(fields[11]) + int(fields[12])
            children.setdefault(int(fields[1]), []).append((int(folder.name), ticks))

        def below(process: int) -> int:
            return sum(ticks + below(child) for child, ticks in children.get(process, []))

        return below(self.driver.service.process.pid) / os.sysconf("SC_CLK_TCK")

    def messages(self) -> list[str]:
        """What the page, or the browser about it, wrote to the console since this was last asked."""
        return [one["message"] for one in self.driver.get_log("browser")]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A browser. Without one tests are skipped, unless VLCPT_BROWSER=1 says that there must be one."""
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        _without("selenium is not installed: pip install selenium")
    missing = [str(path) for path in PROGRAMS if not path.exists()]
    if missing:
        _without(f"no {' and no '.join(missing)}: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(PROGRAMS[0])
    for argument in _ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(PROGRAMS[1])))
    driver.set_script_timeout(60)
    try:
        yield Browser(driver)
    finally:
        driver.quit()


def _without(reason: str) -> None:
    if os.environ.get("VLCPT_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass
class Listener:
    """A server on this machine that keeps what it is asked for."""

    port: int = 0
    heard: list[str] = field(default_factory=list)


@pytest.fixture
def listener() -> Iterator[Listener]:
    """A server that answers any request, and knows of each."""
    found = Listener()

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.heard.append(self.path)
            self.send_response(200)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()
            self.wfile.write(b"window.hacked = 'loaded'")

        do_POST = do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    found.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def page_lines(text: str, name: str) -> list[object]:
    """What the page of ``vlcpt inspect`` has of documents, pictures or packs, as its script reads it."""
    blocks = re.findall(rf'id="data-{name}(?:-\d+)?">([^<]*)</script>', text)
    numbers = re.findall(rf'id="data-{name}-(\d+)">', text)
    assert [int(number) for number in numbers] == [*range(len(numbers))]
    lines = [line for block in blocks for line in block.split("\n") if line]
    return lines if name == "pictures" else [json.loads(line) for line in lines]


def hostile_texts(port: int) -> list[str]:
    """Texts that would run a script or load something from a port, were they taken for markup."""
    there = f"http://127.0.0.1:{port}"
    return [
        "<script>window.hacked = 1</script>",
        f'<script src="{there}/script.js"></script>',
        f'</script><script src="{there}/after.js"></script>',
        "</script><script>window.hacked = 2</script>",
        "<!--<script>window.hacked = 3</script>-->",
        f'<img src="{there}/image.png" onerror="window.hacked = 4">',
        f'"><img src={there}/quoted.png>',
        f"'><link rel=stylesheet href={there}/style.css>",
        f"<style>body {{ background: url({there}/css.png) }} @import '{there}/import.css';</style>",
        f"</style><style>* {{ background: url({there}/all.png) }}</style>",
        '<svg onload="window.hacked = 5"><animate onbegin="window.hacked = 6" attributeName=x dur=1s></svg>',
        f"<iframe src={there}/frame.html></iframe><object data={there}/object.swf></object>",
        '<iframe srcdoc="<script>parent.hacked = 7</script>"></iframe>',
        f'<base href="{there}/"><meta http-equiv="refresh" content="0;url={there}/refresh">',
        '<a href="javascript:window.hacked = 8" autofocus onfocus="window.hacked = 9">javascript:</a>',
        "javascript:window.hacked=10",
        "{{ 7 * 7 }} {% include '/etc/passwd' %} ${window.hacked = 11} \\u003cscript>window.hacked = 12",
        "</title></textarea></noscript></template><script>window.hacked = 13</script>",
        "line\u2028separator\u2029paragraph \u202egnirts\u202c \u2066isolate\u2069",
        "\x00 \x1b[31m \ufeff \u200b",
        "'; window.hacked = 14; //\n\"; window.hacked = 15; //\r\n`${window.hacked = 16}`",
        f"<details open ontoggle=window.hacked=17><video poster={there}/poster.png>",
        f"<audio autoplay><source src={there}/a.mp3 onerror=window.hacked=18>",
    ]
