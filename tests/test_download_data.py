"""download_data.py against web servers on this machine: a real Chromium, real sockets, real faces."""

import contextlib
import gzip
import hashlib
import io
import ipaddress
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from email.utils import formatdate
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from conftest import NO_BROWSER, file_size_limit
from image_server import (
    CERTIFICATE,
    CONSENT_WORDS,
    HOSTILE,
    MORE_CONTROLS,
    FakeGoogle,
    chromium_script,
    picture,
    serve,
    serve_commons,
    serve_hostile,
    serve_openverse,
    serve_pictures,
)
from PIL import Image
from selenium.common.exceptions import WebDriverException
from urllib3 import HTTPResponse

import download_data

QUICK = ["--allow-private", "--delay", "0", "--timeout", "2", "--retries", "0"]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """Ask servers on this machine directly, whatever the environment says."""
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def out_dir(tmp_path):
    return tmp_path / "set"


@pytest.fixture
def pictures():
    with serve(serve_pictures) as server:
        yield server


@pytest.fixture
def google(tmp_path, pictures, monkeypatch):
    """Start the imitation of Google, and lead the Chromium that the script finds to it."""
    chromium = shutil.which("chromium")
    if not chromium or not shutil.which("chromedriver"):
        pytest.skip(NO_BROWSER)
    fake = FakeGoogle(pictures.url("/photo"))
    fake.temp = Path(tempfile.mkdtemp(prefix="test_"))  # its name is short, for Chromium's socket there
    monkeypatch.setattr(tempfile, "tempdir", str(fake.temp))
    monkeypatch.setenv("TMPDIR", str(fake.temp))
    with serve(fake, tls=True) as server:
        programs = tmp_path / "bin"
        programs.mkdir()
        chromium_script(programs / "chromium", chromium, server)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        yield fake
    shutil.rmtree(fake.temp, ignore_errors=True)


def imagenet(out_dir, *options):
    """Download with the quick options; ImageNet's labels want no faces."""
    download_data.main(["imagenet", "--out-dir", str(out_dir), *QUICK, *options])


def emotions(out_dir, *options):
    download_data.main(["emotions", "--out-dir", str(out_dir), "--device", "cpu", *QUICK, *options])


def write_list(path, *lines):
    """Write a list for --engine urls; return the options that read it."""
    path.write_text("".join(f"{label} {url}\n" for label, url in lines))
    return ["--engine", "urls", "--list", str(path)]


def records(out_dir, *statuses):
    """Read the manifest's records that have one of the statuses."""
    lines = (out_dir / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["status"] in statuses]


def reasons(out_dir):
    """Count why the manifest rejects what it does."""
    return Counter(record["reason"] for record in records(out_dir, "rejected", "failed"))


def files(out_dir):
    """List the pictures of a data set, by label."""
    return sorted(str(path.relative_to(out_dir)) for path in out_dir.glob("[!.]*/*"))


def running(folder):
    """List the command lines of the processes that were given a folder of this test."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if str(folder) in line:
            found.append(line)
    return found


def wait_for(condition):
    """Return once it is so; where it never is, a test fails rather than hangs."""
    for _ in range(10_000):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("it did not come to this")


# --- collecting ---


def test_what_was_found_before_a_browser_crashed_is_settled(out_dir):
    found = [download_data.Result(f"http://a.example/{n}.jpg") for n in range(3)]

    def search(query):
        yield from found
        raise WebDriverException("tab crashed")

    out_dir.mkdir()
    dataset, settled = download_data.DataSet(out_dir, None), []
    query = download_data.Query("hen", "hen", 10)
    with pytest.raises(WebDriverException):
        download_data.work_off(
            query, "google", lambda: search, dataset, lambda _, results: settled.extend(results), target=None
        )
    assert settled == found
    assert [len(search["results"]) for search in dataset.searches.values()] == [3]


def test_a_search_that_found_nothing_is_made_again(out_dir):
    answers = iter([[], [download_data.Result("http://a.example/1.jpg")]])
    out_dir.mkdir()
    settled = []
    for _ in range(2):
        download_data.work_off(
            download_data.Query("hen", "hen", 10),
            "google",
            lambda: lambda query: iter(next(answers)),
            download_data.DataSet(out_dir, None),
            lambda search, results: settled.extend(results),
            target=None,
        )
    assert len(settled) == 1


def test_a_search_for_more_that_finds_nothing_is_made_again(out_dir):
    found = [download_data.Result(f"http://a.example/{i}.jpg") for i in range(9)]
    answers = iter([found[:3], [], found])
    out_dir.mkdir()
    settled = []
    for limit in (3, 9, 9):
        download_data.work_off(
            download_data.Query("hen", "hen", limit),
            "google",
            lambda: lambda query: iter(next(answers)),
            download_data.DataSet(out_dir, None),
            lambda search, results: settled.extend(results),
            target=None,
        )
    assert {result.url for result in settled} == {result.url for result in found}


# --- Google ---


@pytest.mark.slow
def test_google_gives_all_60_originals_after_consent_and_scrolling(google, pictures, out_dir, capsys):
    google.consent = "page"
    imagenet(out_dir, "--labels", "tench", "--limit", "60")
    wanted = {google.original("tench", n) for n in range(60)}
    kept = records(out_dir, "kept")
    assert {record["url"] for record in kept} == wanted
    assert {google.layer(n) for n in range(60)} == {"json", "fetched", "link", "click"}
    assert all(record["page"].startswith("https://pages.example/") for record in kept)
    assert all(record["title"].startswith("Title ") and not record["is_thumbnail"] for record in kept)
    assert len(files(out_dir)) == 60
    assert set(pictures.hits.values()) == {1}
    assert capsys.readouterr().out.splitlines()[1].split() == ["tench", "60", "60", "60"]
    [listed] = download_data.read_list(out_dir / "manifest.jsonl").values()
    assert {result.url for result in listed} == wanted


@pytest.mark.slow
@pytest.mark.parametrize("language", CONSENT_WORDS)
def test_the_consent_page_is_answered_with_no_in_any_language(language, google, out_dir):
    google.consent, google.language = "page", language
    imagenet(out_dir, "--labels", "tench", "hen", "--limit", "2")
    [answer] = google.answers  # the cookie is kept, and the way leads back to the first search
    assert answer["set_eom"] == "true"
    assert "set_sc" not in answer
    assert google.queries == ["tench", "hen"]


@pytest.mark.slow
def test_the_consent_dialog_is_answered_with_no(google):
    google.consent = "dialog"
    with download_data.open_browser(None, headful=False) as driver:
        engine = download_data.Google(driver, {}, is_watched=False)
        assert len(list(itertools.islice(engine.search("tench"), 3))) == 3
        assert driver.get_cookie("SOCS")
        assert not driver.execute_script("return document.getElementById('W0wltc')")


@pytest.mark.slow
@pytest.mark.parametrize("control", MORE_CONTROLS)
def test_more_results_are_asked_for_where_scrolling_ends(control, google, out_dir):
    google.more_after, google.more = 40, control
    imagenet(out_dir, "--labels", "tench", "--limit", "60")
    assert {record["url"] for record in records(out_dir, "kept")} == {
        google.original("tench", n) for n in range(60)
    }


@pytest.mark.slow
def test_a_browser_and_a_driver_of_different_versions_are_named(google, out_dir, tmp_path):
    # Stands in for a chromedriver of another version: it answers as that does.
    (tmp_path / "bin" / "chromedriver").write_text(f"#!{sys.executable}\n{OTHER_DRIVER}")
    (tmp_path / "bin" / "chromedriver").chmod(0o755)
    with pytest.raises(SystemExit) as stop:
        imagenet(out_dir, "--labels", "tench")
    assert "\n" not in stop.value.code
    assert "only supports Chrome version 114 Current browser version is 156.0.8078.108" in stop.value.code
    assert stop.value.code.endswith("must be of one version")


OTHER_DRIVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self, status=200, value={"ready": True, "message": "ready"}):
        body = json.dumps({"value": value}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if self.path == "/shutdown":
            os._exit(0)
    def do_POST(self):
        message = "session not created: This version of ChromeDriver only supports Chrome version 114\\n"
        message += "Current browser version is 156.0.8078.108 with binary path /usr/bin/chromium"
        trace = "#0 0x55c932b7d4e3 <unknown>\\n"
        self.do_GET(500, {"error": "session not created", "message": message, "stacktrace": trace})
    def log_message(self, *args):
        pass
[port] = [int(arg.partition("=")[2]) for arg in sys.argv if arg.startswith("--port=")]
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.mark.slow
def test_the_browser_is_driven_directly_where_there_is_a_proxy(proxy, google):
    with download_data.open_browser(None, headful=False) as driver:
        assert driver.execute_script("return 6 * 7") == 42
    assert not [url for url in proxy.hits if "localhost" in url]


@pytest.mark.slow
def test_the_browser_says_what_it_is(google):
    with download_data.open_browser(None, headful=False) as driver:
        driver.get(download_data.google_url("tench", {}))
        agent, is_driven = driver.execute_script("return [navigator.userAgent, navigator.webdriver]")
    assert "HeadlessChrome" in agent
    assert is_driven


@pytest.mark.slow
def test_a_captcha_stops_the_run_and_the_next_one_goes_on(google, pictures, out_dir, capsys):
    google.captcha_after = 1
    options = ["--labels", "tench", "goldfish", "--limit", "5"]
    with pytest.raises(SystemExit) as stop:
        imagenet(out_dir, *options)
    assert "wants to see a person (captcha)" in stop.value.code
    assert "--headful --profile DIR" in stop.value.code
    assert "\n" not in stop.value.code
    assert len(records(out_dir, "kept")) == 5
    assert "tench         5      5      5" in capsys.readouterr().out  # the table comes all the same
    google.captcha_after = None
    imagenet(out_dir, *options)
    assert google.queries == ["tench", "goldfish"]
    assert len(records(out_dir, "kept")) == 10
    assert set(pictures.hits.values()) == {1}


@pytest.mark.slow
def test_somebody_who_watches_can_solve_the_captcha(google):
    google.captcha_after, google.solved_after_s = 0, 0.5
    with download_data.open_browser(None, headful=False) as driver:
        watched = download_data.Google(driver, {}, is_watched=True)
        results = list(itertools.islice(watched.search("tench"), 10))
    assert [result.url for result in results] == [google.original("tench", n) for n in range(10)]


@pytest.fixture
def screen(monkeypatch):
    """Start a virtual screen, and make it the one to be used."""
    if not shutil.which("Xvfb"):
        pytest.skip("no Xvfb, on which a window can open; apt-get install xvfb")
    read_end, write_end = os.pipe()
    with subprocess.Popen(
        ["Xvfb", "-displayfd", str(write_end)], pass_fds=[write_end], stderr=subprocess.DEVNULL
    ) as server:
        os.close(write_end)
        with os.fdopen(read_end) as file:
            monkeypatch.setenv("DISPLAY", f":{file.readline().strip()}")
        yield
        server.terminate()


@pytest.mark.slow
def test_a_visible_browser_waits_until_somebody_has_solved_the_captcha(screen, google, out_dir, capsys):
    google.consent, google.captcha_after, google.solved_after_s = "page", 0, 3
    imagenet(out_dir, "--headful", "--labels", "tench", "--limit", "3")
    assert "solve the captcha in the browser's window" in capsys.readouterr().err
    assert len(records(out_dir, "kept")) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is always a screen")
def test_a_visible_browser_without_a_screen_is_one_line(out_dir, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(SystemExit) as stop:
        imagenet(out_dir, "--headful", "--labels", "tench")
    assert stop.value.code == "error: there is no screen for --headful; go without it, see --help"
    assert not out_dir.exists()


@pytest.mark.slow
def test_a_wall_stops_the_run(google, out_dir):
    google.blocked_by = "wall"
    with pytest.raises(SystemExit, match="Google does not believe"):
        imagenet(out_dir, "--labels", "tench")


@pytest.mark.slow
def test_no_results_are_a_result(google, out_dir, capsys, monkeypatch):
    monkeypatch.setattr(download_data, "GROW_WAIT_S", 0.3)
    google.blocked_by = "empty"
    imagenet(out_dir, "--labels", "tench")
    assert capsys.readouterr().out.splitlines()[1].split() == ["tench", "0", "0", "0"]


@pytest.mark.slow
def test_a_thumbnail_is_the_marked_last_resort(google, out_dir):
    google.num_results, google.is_plain, google.lost = 8, True, {2}
    imagenet(out_dir, "--labels", "tench", "--limit", "8")
    kept = records(out_dir, "kept")
    assert len(kept) == 8
    assert [record["url"] for record in kept if record["is_thumbnail"]] == [f"{google.originals}?n=2"]


@pytest.mark.slow
def test_one_browser_serves_all_queries_and_is_closed(google, out_dir, tmp_path):
    google.is_plain = True
    imagenet(out_dir, "--labels", "tench", "goldfish", "hen", "--limit", "3")
    assert len(google.queries) == 3
    assert not running(google.temp)  # the folder of its profile


def command(out_dir, *options):
    """Return what a download as a process of its own is started with."""
    return "download_data.py", "imagenet", "--out-dir", out_dir, *QUICK, *options


@contextlib.contextmanager
def held(server, number):
    """Let a server answer `number` requests, and the others when the block ends."""
    released, respond = threading.Event(), server.respond

    def answer(handler):
        if sum(server.hits.values()) > number:
            released.wait()
        respond(handler)

    server.respond = answer
    try:
        yield
    finally:
        server.respond = respond
        released.set()


@pytest.mark.slow
def test_a_terminated_run_closes_the_browser_and_goes_on(start, google, pictures, out_dir):
    google.is_plain = True
    options = ["--labels", "tench", "goldfish", "--limit", "30"]
    with held(pictures, 15):
        run = start(*command(out_dir, *options, "--timeout", "10000"))
        wait_for(lambda: len(pictures.hits) > 15)
        assert running(google.temp)
        run.send_signal(signal.SIGTERM)
        _, story = run.communicate(timeout=200)  # it does not wait for the downloads, which stand still
    assert run.returncode == 130
    assert "Traceback" not in story
    wait_for(lambda: not running(google.temp))
    imagenet(out_dir, *options)
    assert len(records(out_dir, "kept")) == 60
    assert google.queries == ["tench", "goldfish"]


@pytest.mark.slow
def test_killing_the_driver_leaves_no_browser_and_loses_nothing(start, google, pictures, out_dir):
    google.num_results, google.is_plain = 400, True
    options = ["--labels", "tench", "goldfish", "--limit", "10", "--timeout", "120"]
    run = start(*command(out_dir, *options))
    with held(pictures, 5):
        wait_for(lambda: len(pictures.hits) > 5)
        [driver] = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(driver), signal.SIGKILL)
    _, story = run.communicate(timeout=200)
    wait_for(lambda: not running(google.temp))
    assert run.returncode == 1
    assert story.strip().splitlines()[-1].startswith("error: the browser gave up")
    assert "Traceback" not in story
    assert len(records(out_dir, "kept")) == 10


def test_without_a_browser_it_says_what_is_needed(out_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="needs Chromium and chromedriver"):
        imagenet(out_dir, "--labels", "tench")


def test_a_driver_that_this_machine_cannot_run_is_one_line(out_dir, tmp_path, monkeypatch):
    for name in ("chromium", "chromedriver"):
        (tmp_path / name).write_bytes(b"\x7fELF of another architecture")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        imagenet(out_dir, "--labels", "tench")
    assert stop.value.code == f"error: [Errno 8] Exec format error: '{tmp_path / 'chromedriver'}'"


def test_google_url_takes_the_filters_of_google_images_download():
    url = download_data.google_url("happy face", {"type": "face", "size": "large", "safe_search": "on"})
    assert url == "https://www.google.com/search?q=happy+face&tbs=isz%3Al%2Citp%3Aface&safe=active&udm=2"
    with pytest.raises(ValueError, match="no value 'huge'"):
        download_data.google_url("happy face", {"size": "huge"})


@pytest.mark.slow
def test_a_filter_is_in_the_address_of_each_search(google, out_dir, monkeypatch):
    def answer(handler, query):
        asked.append(parse_qs(urlsplit(handler.path).query)["tbs"])
        search(handler, query)

    asked, search = [], google.search
    monkeypatch.setattr(google, "search", answer)
    imagenet(out_dir, "--labels", "tench", "hen", "--limit", "1", "--filter", "size=large", "type=clipart")
    assert asked == 2 * [["isz:l,itp:clipart"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size", "size is no NAME=VALUE of "),
        ("size=", "size= is no NAME=VALUE of "),
        ("weight=heavy", "weight=heavy is no NAME=VALUE of "),
        ("size=huge", "--filter has no value 'huge'"),
    ],
)
def test_a_filter_that_google_does_not_have_is_named(text, message, out_dir, capsys):
    with pytest.raises(SystemExit) as stop:
        imagenet(out_dir, "--labels", "tench", "--filter", text)
    assert message in f"{stop.value.code} {capsys.readouterr().err}"
    assert not out_dir.exists()


def test_parse_records_decodes_escapes_and_passes_over_other_shapes():
    good = (
        r'[0,"docid_1-x",["https://t/",1,2],["http://a/?b\u003dc\u0026d",3,4],{"2003":[0,0,"http://p","T"]}]'
    )
    odd = '[0,"docid_2-x",["https://t/",1,2],null]'
    records = download_data.parse_records(f"var a=[{odd},{good},{good}];")
    assert records == {"docid_1-x": download_data.Result("http://a/?b=c&d", "http://p", "T")}


# --- hostile servers ---

OUTCOMES = {
    "/page.jpg": ("rejected", "no image", "a web page"),
    "/endless.jpg": ("rejected", "too big", "more than 20 MB"),
    "/huge.jpg": ("rejected", "too big", "more than 20 MB"),
    "/to-loopback.jpg": ("failed", "not allowed", "127.0.0.1 is at a private address"),
    "/to-file.jpg": ("failed", "not allowed", "the scheme is file"),
    "/to-nonsense.jpg": ("failed", "not allowed", "redirected to what is not a URL"),
    "/to-itself.jpg": ("rejected", "http error", "more than 5 redirects"),
    "/dripping.jpg": ("failed", "unreachable", "not done after 1 s"),
    "/dripping-header.jpg": ("failed", "unreachable", "not done after 1 s"),
    "/truncated.jpg": ("rejected", "no image", "damaged"),
    "/broken-off.jpg": ("failed", "unreachable", "the connection broke off"),
    "/bomb.png": ("rejected", "too big", "more than 50 million pixels"),
    "/gzip-bomb.jpg": ("rejected", "too big", "more than 20 MB"),
    "/no-gzip.jpg": ("rejected", "no image", "not encoded as it says"),
    "/brotli.jpg": ("rejected", "no image", "an unknown format"),  # which was not asked for
    "/pixel.gif": ("rejected", "too small", "1x1 pixels"),
    "/script.eps": ("rejected", "no image", "an unknown format"),
    "/missing.jpg": ("rejected", "http error", "HTTP 404"),
    "/busy.jpg": ("failed", "unreachable", "HTTP 503"),
}


def test_hostile_answers_are_named_and_leave_nothing(out_dir, tmp_path, monkeypatch):
    # The server's own address passes for public, so that the redirect's is what is refused.
    monkeypatch.setattr(download_data, "is_public", lambda address: address == "127.0.0.2")
    with serve(serve_hostile) as server:
        base = f"http://localtest:{server.server_port}"
        lookup = socket.getaddrinfo
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda host, *rest, **more: lookup("127.0.0.2" if host == "localtest" else host, *rest, **more),
        )
        dial = socket.create_connection
        monkeypatch.setattr(
            socket, "create_connection", lambda address, timeout: dial(("127.0.0.1", address[1]), timeout)
        )
        options = [option for option in QUICK if option != "--allow-private"]
        dripping = [path for path in HOSTILE if "dripping" in path]
        others = [path for path in [*HOSTILE, "/good?n=5"] if path not in dripping]
        for label, paths, timeout in ("hen", dripping, "1"), ("tench", others, "100"):
            listed = write_list(tmp_path / "list", *((label, base + path) for path in paths))
            download_data.main(
                ["imagenet", "--out-dir", str(out_dir), *options, "--timeout", timeout, *listed]
            )
    found = {r["url"].removeprefix(base): r for r in records(out_dir, "rejected", "failed")}
    assert found.keys() == OUTCOMES.keys() == HOSTILE.keys()
    for path, (status, reason, detail) in OUTCOMES.items():
        assert (found[path]["status"], found[path]["reason"]) == (status, reason), path
        assert found[path]["detail"].startswith(detail), path
    assert [record["url"] for record in records(out_dir, "kept")] == [base + "/good?n=5"]
    assert len(files(out_dir)) == 1
    assert not list((out_dir / ".incoming").iterdir())


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://example.org/a.jpg", "data:image/gif;base64,R0", "http://", "a.jpg"]
)
def test_only_http_is_fetched(url, out_dir, tmp_path):
    imagenet(out_dir, *write_list(tmp_path / "list", ("tench", url)))
    assert reasons(out_dir) == {"not allowed": 1}


PUBLIC = ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"]
PUBLIC += ["::ffff:93.184.215.14", "2002:5db8:d70e::", "64:ff9b::93.184.215.14"]
# IANA's special-purpose registries for IPv4 and IPv6, as of 2025: all blocks that are not globally reachable.
# A block of addresses for protocols counts as a whole, though some of it can be reached.
SPECIAL = """
    0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24
    192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 240.0.0.0/4 255.255.255.255/32
    ::/128 ::1/128 64:ff9b:1::/48 100::/64 100:0:0:1::/64 2001::/32 2001:2::/48 2001:10::/28 2001:db8::/32
    3fff::/20 5f00::/16 fc00::/7 fe80::/10"""
SPECIAL += " 224.0.0.0/4 ff00::/8 fec0::/10"  # multicast, and what was site-local
REACHABLE = "192.31.196.0/24 192.52.193.0/24 192.175.48.0/24 2620:4f:8000::/48"


@pytest.mark.parametrize("block", SPECIAL.split())
def test_no_address_of_a_special_block_is_public_in_any_guise(block):
    network = ipaddress.ip_network(block)
    for address in network[0], network[network.num_addresses // 2], network[-1]:
        assert not download_data.is_public(str(address))
        if address.version == 4:
            last = address.packed.hex(":", 2)  # ::1.2.3.4 mapped, compatible, translated, by NAT64, by 6to4
            starts = ("::ffff:", "::", "::ffff:0:", "64:ff9b::", "64:ff9b:1::")
            for guise in (*(start + last for start in starts), f"2002:{last}::1"):
                assert not download_data.is_public(guise), guise


@pytest.mark.parametrize("address", [*PUBLIC, *(block.partition("/")[0] for block in REACHABLE.split())])
def test_other_addresses_are_public(address):
    assert download_data.is_public(address)


@pytest.mark.parametrize("address", ["fe80::1%eth0", "::127.0.0.1", "::ffff:0:7f00:1", "::93.184.215.14"])
def test_is_public_knows_link_local_and_outdated_forms(address):
    assert not download_data.is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1"])
def test_private_addresses_are_not_fetched_unless_allowed(host, pictures, out_dir, tmp_path):
    url = f"http://{host}:{pictures.server_port}/photo?n=1"
    listed = write_list(tmp_path / "list", ("tench", url))
    download_data.main(["imagenet", "--out-dir", str(out_dir), "--retries", "0", *listed])
    assert reasons(out_dir) == {"not allowed": 1}
    assert not pictures.hits


def test_a_private_address_is_fetched_by_the_next_run_if_that_allows_it(pictures, out_dir, tmp_path):
    listed = write_list(tmp_path / "list", ("tench", pictures.url("/photo?n=1")))
    download_data.main(["imagenet", "--out-dir", str(out_dir), *listed])
    assert not records(out_dir, "kept")
    imagenet(out_dir, *listed)
    assert len(records(out_dir, "kept")) == 1


def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch):
    answers = iter(["93.184.215.14", "127.0.0.1"])  # a name server that changes its mind
    dialled = []

    def dial(address, timeout):
        dialled.append(address)
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [(0, 0, 0, "", (next(answers), 80))])
    monkeypatch.setattr(socket, "create_connection", dial)
    downloader = download_data.Downloader(1, 0, allow_private=False, contact="")
    with pytest.raises(download_data.Refusal, match="unreachable"):
        downloader.get("http://rebinding.example/a.jpg")
    assert dialled == [("93.184.215.14", 80)]


def test_tls_certificates_are_checked(out_dir, tmp_path, monkeypatch):
    with serve(serve_pictures, tls=True) as server:
        right, wrong = server.url("/photo?n=1", "localhost"), server.url("/photo?n=2", "127.0.0.1")
        imagenet(out_dir, *write_list(tmp_path / "list", ("tench", right), ("tench", wrong)))
        assert [r["detail"] for r in records(out_dir, "failed")] == 2 * [
            "TLS certificate: self-signed certificate"
        ]
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
        trusting = tmp_path / "trusting"
        imagenet(trusting, *write_list(tmp_path / "list", ("tench", right), ("tench", wrong)))
    assert [record["url"] for record in records(trusting, "kept")] == [right]
    assert [r["url"] for r in records(trusting, "failed")] == [wrong]
    assert "IP address mismatch" in records(trusting, "failed")[0]["detail"]


@pytest.mark.parametrize(
    ("name", "encode"),
    [
        ("gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", lambda body: zlib.compress(body, wbits=-15)),  # without zlib's header, as some send it
    ],
)
def test_an_answer_is_decoded_as_it_was_asked_for(name, encode, out_dir, tmp_path):
    asked = []

    def answer(handler):
        asked.extend(handler.headers["Accept-Encoding"].split(","))
        handler.answer(encode(picture(1)), "image/jpeg", Content_Encoding=name)

    with serve(answer) as server:
        imagenet(out_dir, *write_list(tmp_path / "list", ("tench", server.url("/photo"))))
    assert name in asked
    assert set(asked) <= set(HTTPResponse.CONTENT_DECODERS)  # nothing that could not be decoded
    [record] = records(out_dir, "kept")
    assert record["sha256"] == hashlib.sha256(picture(1)).hexdigest()


def test_a_redirect_is_followed(pictures, out_dir, tmp_path):
    with serve(lambda handler: handler.redirect(pictures.url("/photo?n=1"))) as server:
        imagenet(out_dir, *write_list(tmp_path / "list", ("tench", server.url("/moved"))))
    [record] = records(out_dir, "kept")
    assert record["url"] == server.url("/moved")
    assert pictures.hits == {"/photo?n=1": 1}


def test_a_redirect_may_have_raw_utf8_in_it(out_dir, tmp_path):
    def respond(handler):
        if handler.path == "/moved":
            handler.redirect("/größe/写真.jpg".encode().decode("latin-1"))  # so that the bytes are UTF-8
        else:
            handler.answer(picture(1), "image/jpeg")

    with serve(respond) as server:
        imagenet(out_dir, *write_list(tmp_path / "list", ("tench", server.url("/moved"))))
        assert "/" + quote("größe/写真.jpg") in server.hits
    assert len(records(out_dir, "kept")) == 1


def test_a_redirect_that_wants_a_cookie_gets_it(out_dir, tmp_path):
    def respond(handler):
        if handler.headers["Cookie"] == "seen=yes":
            serve_pictures(handler)
        else:
            handler.redirect(handler.path, Set_Cookie="seen=yes; Path=/; HttpOnly")

    with serve(respond) as server:
        imagenet(out_dir, *write_list(tmp_path / "list", ("tench", server.url("/photo?n=1"))))
        assert server.hits == {"/photo?n=1": 2}
    assert len(records(out_dir, "kept")) == 1


@pytest.mark.parametrize("page", ["", "https://user:pass@pages.example/größe#top", "no page at all"])
def test_a_picture_refused_to_strangers_is_asked_for_once_more_from_its_page(page):
    referers = []

    def respond(handler):
        referers.append(handler.headers["Referer"])
        handler.answer(b"picture" if referers[-1] else b"", status=200 if referers[-1] else 403)

    with serve(respond) as server:
        downloader = download_data.Downloader(2, 0, allow_private=True, contact="")
        assert downloader.get(server.url("/a.jpg"), page=page) == b"picture"
        expected = "https://pages.example/gr%C3%B6%C3%9Fe" if "user" in page else server.url("/")
    assert referers == [None, expected]


def test_a_picture_that_stays_refused_is_asked_for_twice(out_dir, tmp_path):
    with serve(lambda handler: handler.answer(b"", status=403)) as server:
        imagenet(out_dir, *write_list(tmp_path / "list", ("tench", server.url("/a.jpg"))), "--retries", "3")
        assert server.hits == {"/a.jpg": 2}
    assert reasons(out_dir) == {"http error": 1}


@pytest.mark.slow
@pytest.mark.parametrize("is_date", [False, True])
def test_a_host_is_left_alone_for_as_long_as_it_asks(is_date, out_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(download_data, "BACKOFF_S", 0.01)
    times = []

    def respond(handler):
        times.append(time.time())
        if len(times) == 1:
            header = formatdate(times[0] + 3, usegmt=True) if is_date else "2"
            handler.answer(b"", status=429, Retry_After=header)
        else:
            serve_pictures(handler)

    with serve(respond) as server:
        lines = [("tench", server.url(f"/photo?n={n}")) for n in range(3)]
        imagenet(out_dir, *write_list(tmp_path / "list", *lines), "--retries", "1", "--workers", "1")
    assert len(records(out_dir, "kept")) == 3
    assert times[1] - times[0] >= 1.9  # a date has no fractions


@pytest.mark.slow
def test_a_host_that_wants_hours_is_not_asked_again_in_this_run(out_dir, tmp_path):
    with serve(lambda handler: handler.answer(b"", status=503, Retry_After="3600")) as server:
        lines = [("tench", server.url(f"/photo?n={n}")) for n in range(5)]
        imagenet(out_dir, *write_list(tmp_path / "list", *lines), "--retries", "2", "--workers", "1")
        assert sum(server.hits.values()) == 1
        assert reasons(out_dir) == {"busy": 5}
        imagenet(out_dir, "--engine", "urls", "--list", str(tmp_path / "list"), "--workers", "1")
        assert sum(server.hits.values()) == 2


@pytest.mark.parametrize("value", ["soon", "Mon, 99 Foo 99999 99:99:99 GMT", "9" * 5000, "-5"])
def test_a_time_to_wait_that_makes_no_sense_is_passed_over(value, out_dir, tmp_path):
    with serve(lambda handler: handler.answer(b"", status=503, Retry_After=value)) as server:
        imagenet(out_dir, *write_list(tmp_path / "list", ("tench", server.url("/a.jpg"))))
    assert [record["detail"] for record in records(out_dir, "failed")] == ["HTTP 503"]


# --- proxies ---


def serve_proxy(handler):
    """Pass a GET or a CONNECT on to this machine, whatever host it names, but not without the password."""
    if handler.headers["Proxy-Authorization"] != "Basic dXNlcjpwYXNzOg==":  # user:pass:
        handler.answer(b"", status=407)
        return
    port = urlsplit(f"//{handler.path}" if handler.command == "CONNECT" else handler.path).port
    with socket.create_connection(("127.0.0.1", port)) as target:
        if handler.command == "CONNECT":
            handler.send_response(200)
            handler.end_headers()
            handler.wfile.flush()
            back = threading.Thread(target=pass_on, args=[target, handler.connection])
            back.start()
            pass_on(handler.connection, target)
            back.join()
        else:
            path = "/" + handler.path.split("/", 3)[3]
            target.sendall(f"GET {path} HTTP/1.0\r\nHost: {handler.headers['Host']}\r\n\r\n".encode())
            pass_on(target, handler.connection)


def pass_on(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy(no_proxy, monkeypatch):
    with serve(serve_proxy) as server:
        for name in "http_proxy", "https_proxy":
            monkeypatch.setenv(name, server.url("").replace("//", "//user:pass%3A@"))
        yield server


def test_pictures_come_through_the_proxies_of_the_environment(
    proxy, pictures, out_dir, tmp_path, monkeypatch
):
    def respond(handler):
        seen.append(handler.headers["Proxy-Authorization"])
        serve_pictures(handler)

    seen = []
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    with serve(respond, tls=True) as secure:
        plain = pictures.url("/photo?n=1", host="pictures.example")  # a name that only the proxy knows
        urls = [plain, secure.url("/photo?n=2", host="localhost")]
        imagenet(out_dir, *write_list(tmp_path / "list", *(("tench", url) for url in urls)))
        assert proxy.hits == {plain: 1, f"localhost:{secure.server_port}": 1}
    assert [record["url"] for record in records(out_dir, "kept")] == urls
    assert seen == [None]  # the password is not for the site


def test_no_proxy_names_what_is_asked_directly(proxy, pictures, out_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "example.org,127.0.0.1")
    imagenet(out_dir, *write_list(tmp_path / "list", ("tench", pictures.url("/photo?n=1"))))
    assert len(records(out_dir, "kept")) == 1
    assert not proxy.hits


def test_a_private_address_is_refused_before_the_proxy_hears_of_it(proxy, pictures, out_dir, tmp_path):
    listed = write_list(tmp_path / "list", ("tench", pictures.url("/photo?n=1")))
    download_data.main(["imagenet", "--out-dir", str(out_dir), "--retries", "0", *listed])
    assert reasons(out_dir) == {"not allowed": 1}
    assert not proxy.hits


@pytest.mark.parametrize("address", ["socks5://127.0.0.1:1080", "http://[", "https://127.0.0.1:3128"])
def test_a_proxy_of_another_kind_is_named_at_once(address, proxy, out_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", address)
    with pytest.raises(SystemExit) as stop:
        imagenet(out_dir, *write_list(tmp_path / "list", ("tench", "http://a.example/b.jpg")))
    assert stop.value.code == f"error: https_proxy is {address}, expected http://HOST:PORT"


def test_a_contact_is_told_to_every_server(out_dir, tmp_path):
    def respond(handler):
        agents.append(handler.headers["User-Agent"])
        serve_pictures(handler)

    agents = []
    with serve(respond) as server:
        listed = write_list(tmp_path / "list", ("hen", server.url("/photo?n=1")))
        imagenet(out_dir, *listed, "--contact", "me@example.org")
    assert agents == ["emotion-detector/1.0 (me@example.org)"]


@pytest.mark.parametrize("contact", ["Łukasz, l@example.org", "two\nlines"])
def test_a_contact_that_no_header_can_hold_is_refused(contact, out_dir, capsys):
    with pytest.raises(SystemExit) as stop:
        imagenet(out_dir, "--contact", contact)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: --contact goes into a header, which holds ")


# --- hosts ---


def test_another_address_is_tried_where_the_first_does_not_answer(pictures, out_dir, tmp_path, monkeypatch):
    lookup, dial, dialled = socket.getaddrinfo, socket.create_connection, []
    entries = [(0, 0, 0, "", (address, 0)) for address in ("127.0.0.2", "127.0.0.1")]

    def find(host, *rest, **more):
        return entries if host == "several.example" else lookup(host, *rest, **more)

    def refuse_first(address, timeout):
        dialled.append(address[0])
        if len(dialled) == 1:
            raise ConnectionRefusedError("refused")
        return dial(address, timeout)

    monkeypatch.setattr(socket, "getaddrinfo", find)
    monkeypatch.setattr(socket, "create_connection", refuse_first)
    url = pictures.url("/photo?n=1", host="several.example")
    imagenet(out_dir, *write_list(tmp_path / "list", ("tench", url)))
    assert [record["url"] for record in records(out_dir, "kept")] == [url]
    assert dialled == ["127.0.0.2", "127.0.0.1"]


@pytest.mark.parametrize("status", [503, 407])
def test_what_may_be_passing_is_tried_again(status, out_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(download_data, "BACKOFF_S", 0.01)

    def recover(handler):
        answer = {1: lambda: handler.answer(b"", status=status), 2: handler.connection.close}
        answer.get(handler.server.hits[handler.path], lambda: serve_pictures(handler))()

    with serve(recover) as server:
        listed = write_list(tmp_path / "list", ("tench", server.url("/photo?n=1")))
        imagenet(out_dir, *listed, "--retries", "1")
        assert reasons(out_dir) == {"unreachable": 1}
        imagenet(out_dir, *listed, "--retries", "1")  # the next run tries again
        assert len(records(out_dir, "kept")) == 1
        assert sum(server.hits.values()) == 3


def test_a_host_is_asked_for_two_pictures_at_a_time(out_dir, tmp_path):
    lock, now, most = threading.Lock(), [0], [0]
    together = threading.Barrier(download_data.PER_HOST)

    def count(handler):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        together.wait(60)
        time.sleep(0.05)  # one more would come now
        with lock:
            now[0] -= 1
        serve_pictures(handler)

    with serve(count) as server:
        listed = write_list(tmp_path / "list", *(("tench", server.url(f"/photo?n={n}")) for n in range(12)))
        imagenet(out_dir, *listed, "--workers", "6")
    assert most == [download_data.PER_HOST]


# --- what is kept ---


def serve_files(contents):
    """Serve bytes by path."""
    return serve(lambda handler: handler.answer(contents[handler.path], "application/octet-stream"))


def resized(data, size):
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).resize(size).save(file, "PNG")
    return file.getvalue()


def test_copies_are_dropped_across_the_set_and_two_labels_reported(out_dir, tmp_path, capsys):
    contents = {
        "/a.jpg": picture(1),
        "/same.jpg": picture(1),
        "/smaller.jpg": resized(picture(1), (120, 90)),
        "/other.jpg": picture(2),
    }
    with serve_files(contents) as server:
        labels = ("tench", "tench", "hen", "hen")
        listed = write_list(tmp_path / "list", *zip(labels, map(server.url, contents), strict=True))
        imagenet(out_dir, *listed)
    kept = records(out_dir, "kept")
    assert [record["url"] for record in kept] == [server.url("/a.jpg"), server.url("/other.jpg")]
    refused = {record["url"]: record for record in records(out_dir, "rejected")}
    assert refused[server.url("/same.jpg")]["reason"] == "copy"
    assert refused[server.url("/smaller.jpg")]["reason"] == "two labels"
    assert {record["copy_of"] for record in refused.values()} == {kept[0]["sha256"]}
    out = capsys.readouterr().out
    assert f"two labels: {server.url('/smaller.jpg')} was found for 'list' and is the same as tench/" in out


def test_one_url_under_two_labels_is_fetched_once_and_reported(pictures, out_dir, tmp_path, capsys):
    url = pictures.url("/photo?n=1")
    imagenet(out_dir, *write_list(tmp_path / "list", ("tench", url), ("hen", url)))
    assert reasons(out_dir) == {"two labels": 1}
    assert pictures.hits == {"/photo?n=1": 1}
    assert "two labels" in capsys.readouterr().out


def test_the_extension_is_the_real_format_and_the_name_is_never_the_servers(out_dir, tmp_path):
    contents = {
        "/..%2F..%2Fpasswd.jpg": picture(1, form="PNG"),
        "/x.exe": picture(2, form="WEBP"),
        "/y": picture(3, form="GIF"),
    }
    with serve_files(contents) as server:
        listed = write_list(tmp_path / "list", *(("happy", server.url(path)) for path in contents))
        emotions(out_dir, *listed)
        assert reasons(out_dir) == {"no face": 3}
        dataset = download_data.DataSet(tmp_path / "any", None)
        downloader = download_data.Downloader(2, 0, allow_private=True, contact="")
        names = []
        for path in contents:
            (tmp_path / "download").write_bytes(downloader.get(server.url(path)))
            fields = download_data.examine(
                tmp_path / "download", "happy", download_data.Result(""), dataset, find_face=None
            )
            names.append(fields["file"])
    assert [Path(name).suffix for name in names] == [".png", ".webp", ".gif"]
    assert all(Path(name).parent == Path("happy") for name in names)


def test_an_emotion_wants_exactly_one_face_that_is_large_enough(out_dir, tmp_path, sample_photo):
    montage = Image.open(sample_photo)  # four portraits of 480 pixels
    portrait = montage.crop((480, 0, 960, 480))

    def jpeg(image):
        file = io.BytesIO()
        image.save(file, "JPEG")
        return file.getvalue()

    contents = {
        "/one.jpg": jpeg(portrait),
        "/four.jpg": sample_photo.read_bytes(),
        "/none.jpg": picture(1),
        "/small.jpg": jpeg(montage.crop((0, 0, 480, 480)).resize((80, 80))),
    }
    with serve_files(contents) as server:
        listed = write_list(tmp_path / "list", *(("happy", server.url(path)) for path in contents))
        emotions(out_dir, *listed)
    [kept] = records(out_dir, "kept")
    assert kept["url"] == server.url("/one.jpg")
    left, top, right, bottom = kept["face_box"]
    assert 0 < left < right < 480
    assert 0 < top < bottom < 480
    assert max(right - left, bottom - top) >= 64
    assert {r["url"].rsplit("/", 1)[1]: r["reason"] for r in records(out_dir, "rejected")} == {
        "four.jpg": "several faces",
        "none.jpg": "no face",
        "small.jpg": "no face",
    }
    assert len(files(out_dir)) == 1


def test_imagenet_photos_are_shrunk_to_a_shorter_side_of_256(out_dir, tmp_path):
    contents = {"/big.png": picture(1, (900, 600), "PNG"), "/small.jpg": picture(2, (200, 100))}
    with serve_files(contents) as server:
        imagenet(out_dir, *write_list(tmp_path / "list", *(("hen", server.url(path)) for path in contents)))
    big, small = records(out_dir, "kept")
    assert (big["width"], big["height"]) == (900, 600)
    with Image.open(out_dir / big["file"]) as image:
        assert (image.format, image.size) == ("JPEG", (384, 256))
    with Image.open(out_dir / small["file"]) as image:
        assert image.size == (200, 100)


def test_a_contact_sheet_shows_each_picture_of_a_class(pictures, out_dir, tmp_path):
    lines = [("hen", pictures.url(f"/photo?n={n}")) for n in range(12)]
    imagenet(out_dir, *write_list(tmp_path / "list", *lines))
    with Image.open(tmp_path / "set_sheets" / "hen.png") as sheet:
        assert sheet.size == (1280, 2 * 142)
        colors = {sheet.getpixel((n % 10 * 128 + 60, n // 10 * 142 + 40)) for n in range(12)}
    assert len(colors) == 12


def test_contact_sheets_are_drawn_again_only_where_they_change(pictures, out_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(download_data, "PER_SHEET", 3)
    lines = [("hen", pictures.url(f"/photo?n={n}")) for n in range(8)]
    sheets = tmp_path / "set_sheets"
    imagenet(out_dir, *write_list(tmp_path / "list", *lines[:7]))
    first = {path.name: path.stat().st_mtime_ns for path in sheets.iterdir()}
    assert first.keys() == {"hen.png", "hen.2.png", "hen.3.png"}
    imagenet(out_dir, *write_list(tmp_path / "list", *lines))
    second = {path.name: path.stat().st_mtime_ns for path in sheets.iterdir()}
    assert [name for name in first if first[name] != second[name]] == ["hen.3.png"]
    for record in records(out_dir, "kept")[2:]:
        (out_dir / record["file"]).unlink()
    imagenet(out_dir, *write_list(tmp_path / "list", *lines))
    assert [path.name for path in sheets.iterdir()] == ["hen.png"]


def test_a_picture_that_was_damaged_later_leaves_its_place_white(pictures, out_dir, tmp_path):
    listed = write_list(tmp_path / "list", *(("hen", pictures.url(f"/photo?n={n}")) for n in range(2)))
    imagenet(out_dir, *listed)
    (out_dir / records(out_dir, "kept")[0]["file"]).write_bytes(b"damaged")
    (tmp_path / "set_sheets" / "hen.png").unlink()
    imagenet(out_dir, *listed)
    with Image.open(tmp_path / "set_sheets" / "hen.png") as sheet:
        assert len(sheet.crop((0, 0, 128, 96)).getcolors()) == 1


def test_copies_are_found_as_by_comparing_each_with_all():
    generator = random.Random(0)
    finder, marks = download_data.CopyFinder(), []
    for number in range(500):
        bits = generator.getrandbits(64)
        if number % 2:  # like an earlier one, or almost
            bits = int(generator.choice(marks)["phash"], 16)
            for place in generator.sample(range(64), number % 8):
                bits ^= 1 << place
        mark = {"sha256": f"{generator.getrandbits(256):064x}", "phash": f"{bits:016x}"}
        near = [m for m in marks if (int(m["phash"], 16) ^ bits).bit_count() <= download_data.NEAR_BITS]
        assert finder.find(**mark) == (near[0] if near else None)
        assert finder.find("", "f" * 16) is None
        finder.add(mark)
        marks.append(mark)
        assert finder.find(mark["sha256"]) is mark


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF"])
def test_a_picture_of_one_colour_is_no_photo(form, out_dir, tmp_path):
    flat = io.BytesIO()
    Image.new("RGB", (300, 200), (200, 30, 90)).save(flat, form)
    dark = io.BytesIO()  # a photo all the same
    Image.open(io.BytesIO(picture(1))).point(lambda level: level // 16).save(dark, "PNG")
    with serve_files({"/flat": flat.getvalue(), "/dark": dark.getvalue()}) as server:
        lines = [("hen", server.url("/flat")), ("hen", server.url("/dark"))]
        imagenet(out_dir, *write_list(tmp_path / "list", *lines))
    assert reasons(out_dir) == {"one colour": 1}
    assert len(files(out_dir)) == 1


def test_the_table_counts_what_was_asked_found_kept_and_rejected(out_dir, tmp_path, capsys):
    with serve(serve_hostile) as server:
        paths = ["/photo?n=1", "/photo?n=2", "/page.jpg", "/missing.jpg"]
        lines = [("hen", server.url(path)) for path in paths] + [("tench", server.url("/photo?n=3"))]
        imagenet(out_dir, *write_list(tmp_path / "list", *lines))
    assert capsys.readouterr().out.splitlines()[:4] == [
        "label  asked  found   kept  http error  no image",
        "hen        4      4      2           1         1",
        "tench      1      1      1           0         0",
        "total      5      5      3           1         1",
    ]


# --- a target ---


@pytest.fixture
def openverse(pictures, monkeypatch):
    """Start an imitation of Openverse with 60 results, of which every third is gone."""
    with serve(lambda handler: serve_openverse(handler, server.pictures, 60)) as server:
        respond, server.pictures = pictures.respond, pictures.url("/photo")
        pictures.respond = lambda h: h.answer(b"", status=404) if int(h.path[9:]) % 3 == 0 else respond(h)
        monkeypatch.setattr(download_data, "OPENVERSE", server.url("/api"))
        yield server


def test_a_target_counts_what_is_kept_over_as_many_pages_as_that_takes(openverse, out_dir, capsys):
    hen = ["--engine", "openverse", "--labels", "hen"]
    imagenet(out_dir, *hen, "--target", "25")
    assert len(files(out_dir)) == 25
    assert len(openverse.hits) == 2
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "hen: 25 of 25 pictures, the target is reached"
    assert out[2].split()[1:] == ["38", "38", "25", "13"]
    (out_dir / files(out_dir)[0]).unlink()  # one that somebody did not like is made up for
    imagenet(out_dir, *hen, "--target", "25")
    assert len(files(out_dir)) == 25
    imagenet(out_dir, *hen, "--target", "50")
    assert len(files(out_dir)) == 39
    assert "hen: 39 of 50 pictures, its searches are exhausted\n" in capsys.readouterr().out
    asked = sum(openverse.hits.values())
    imagenet(out_dir, *hen, "--target", "50")
    assert sum(openverse.hits.values()) == asked


def test_a_target_stops_at_the_limit_too(openverse, out_dir, capsys):
    imagenet(out_dir, "--engine", "openverse", "--labels", "hen", "--target", "25", "--limit", "30")
    assert len(files(out_dir)) == 20
    assert "hen: 20 of 25 pictures, its searches are at their --limit\n" in capsys.readouterr().out


def test_a_target_goes_on_to_the_next_query(pictures, out_dir, tmp_path, capsys):
    found = [("calm face", 1), ("calm face", 1), ("calm face", 2), ("poker face", 2), ("poker face", 3)]
    found += [("poker face", 4), ("poker face", 5)]
    fields = {"status": "kept", "label": "hen", "page": "", "title": "", "license": "", "face_box": []}
    fields |= {"is_thumbnail": False, "sha256": ""}
    lines = [
        {**fields, "query": text, "url": pictures.url(f"/photo?n={n}#{i}")}
        for i, (text, n) in enumerate(found)
    ]
    (tmp_path / "list").write_text("".join(json.dumps(line) + "\n" for line in lines))
    imagenet(out_dir, "--engine", "urls", "--list", str(tmp_path / "list"), "--target", "3")
    kept = [(record["query"], record["url"][-5:-2]) for record in records(out_dir, "kept")]
    assert kept == [("calm face", "n=1"), ("calm face", "n=2"), ("poker face", "n=3")]
    assert reasons(out_dir) == {"copy": 2}
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == [
        "hen: 3 of 3 pictures, the target is reached",
        "label  asked  found   kept   copy",
        "hen        5      5      3      2",
    ]


# --- the manifest ---


def test_a_manifest_names_where_a_picture_is_from(pictures, out_dir, tmp_path):
    imagenet(out_dir, *write_list(tmp_path / "list", ("hen", pictures.url("/photo?n=1"))))
    [record] = records(out_dir, "kept")
    assert record.keys() == {
        *("status", "label", "query", "engine", "url", "page", "title", "license", "is_thumbnail", "file"),
        *("width", "height", "bytes", "sha256", "phash", "face_box", "time"),
    }
    assert record["file"] == f"hen/{record['sha256'][:16]}.jpg"
    assert record["bytes"] == len(picture(1))


@pytest.mark.slow
def test_a_killed_run_goes_on_without_a_second_download(start, out_dir, tmp_path):
    arrived = threading.Semaphore(0)

    def slowly(handler):
        time.sleep(0.05)
        serve_pictures(handler)
        arrived.release()

    with serve(slowly) as server:
        urls = [server.url(f"/photo?n={n}") for n in range(40)]
        listed = write_list(tmp_path / "list", *(("hen", url) for url in urls))
        run = start(*command(out_dir, *listed, "--workers", "3"))
        for _ in range(20):
            assert arrived.acquire(timeout=120)
        run.kill()
        run.wait()
        in_flight = {path for path in server.hits if not has_arrived(out_dir, server.url(path))}
        assert len(in_flight) <= 3
        imagenet(out_dir, *listed)
    assert [record["url"] for record in records(out_dir, "kept")] == urls
    assert {path: n for path, n in server.hits.items() if n > 1}.keys() <= in_flight
    assert len(files(out_dir)) == 40


def has_arrived(out_dir, url):
    """Return whether a download is on the disk or settled."""
    settled = {record["url"] for record in records(out_dir, "kept")} if out_dir.exists() else set()
    return url in settled or (out_dir / ".incoming" / download_data.url_digest(url)).exists()


def test_a_run_killed_between_record_and_file_is_repaired(pictures, out_dir, tmp_path):
    listed = write_list(tmp_path / "list", ("hen", pictures.url("/photo?n=1")))
    imagenet(out_dir, *listed)
    [record] = records(out_dir, "kept")
    (out_dir / record["file"]).unlink()
    (out_dir / ".incoming" / download_data.url_digest(record["url"])).write_bytes(picture(1))
    (out_dir / ".incoming" / ".emotion-0123456789abcdef.tmp").write_bytes(picture(2)[:500])
    imagenet(out_dir, *listed)
    assert not list((out_dir / ".incoming").iterdir())
    assert files(out_dir) == [record["file"]]
    assert pictures.hits == {"/photo?n=1": 1}


def test_a_line_that_breaks_off_is_dropped_but_a_damaged_one_is_named(pictures, out_dir, tmp_path):
    listed = write_list(tmp_path / "list", *(("hen", pictures.url(f"/photo?n={n}")) for n in range(2)))
    imagenet(out_dir, *listed)
    manifest = out_dir / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-30])
    imagenet(out_dir, *listed)
    assert len(records(out_dir, "kept")) == 2
    manifest.write_text("{}\n" + manifest.read_text())
    with pytest.raises(SystemExit) as stop:
        imagenet(out_dir, *listed)
    assert stop.value.code == f"error: {manifest}, line 1 is no record of this script; delete that line"


def test_a_whole_line_without_its_end_counts_as_an_editor_may_leave_it(pictures, out_dir, tmp_path):
    listed = write_list(tmp_path / "list", *(("hen", pictures.url(f"/photo?n={n}")) for n in range(2)))
    imagenet(out_dir, *listed)
    manifest = out_dir / "manifest.jsonl"
    written = manifest.read_bytes()
    manifest.write_bytes(written[:-1])
    imagenet(out_dir, *listed)
    assert manifest.read_bytes() == written
    assert set(pictures.hits.values()) == {1}
    manifest.write_text('{"a stranger\'s": true}')
    with pytest.raises(SystemExit, match="line 1 is no record of this script"):
        imagenet(out_dir, *listed)
    assert manifest.read_text() == '{"a stranger\'s": true}'


def test_a_full_disk_is_named_and_the_next_run_goes_on(out_dir, tmp_path):
    listed = write_list(tmp_path / "list", *(("hen", f"ftp://a.example/{n}.jpg") for n in range(40)))
    with file_size_limit(8000), pytest.raises(SystemExit) as stop:
        imagenet(out_dir, *listed)
    assert stop.value.code == f"error: cannot write {out_dir / 'manifest.jsonl'}: File too large"
    imagenet(out_dir, *listed)
    assert len({record["url"] for record in records(out_dir, "failed")}) == 40


def test_half_a_picture_on_a_full_disk_does_not_stay_and_the_next_run_has_all_of_it(out_dir, tmp_path):
    file = io.BytesIO()  # its copy of 256 pixels, which is what is kept, takes more
    Image.effect_noise((300, 300), 50).convert("RGB").save(file, "JPEG", quality=10)
    with serve_files({"/noise.jpg": file.getvalue()}) as server:
        listed = write_list(tmp_path / "list", ("hen", server.url("/noise.jpg")))
        with file_size_limit(20_000), pytest.raises(SystemExit, match=r"cannot write .*hen/.*: File too"):
            imagenet(out_dir, *listed)
        assert files(out_dir) == []
        imagenet(out_dir, *listed)
    [kept] = files(out_dir)
    with Image.open(out_dir / kept) as image:
        image.load()


def test_a_run_that_finds_nothing_new_writes_nothing(pictures, out_dir, tmp_path):
    listed = write_list(tmp_path / "list", ("hen", pictures.url("/photo?n=1")))
    imagenet(out_dir, *listed)
    written = (out_dir / "manifest.jsonl").read_bytes()
    imagenet(out_dir, *listed)
    assert (out_dir / "manifest.jsonl").read_bytes() == written


def test_a_picture_deleted_by_hand_stays_away(pictures, out_dir, tmp_path):
    listed = write_list(tmp_path / "list", ("hen", pictures.url("/photo?n=1")))
    imagenet(out_dir, *listed)
    (out_dir / files(out_dir)[0]).unlink()
    imagenet(out_dir, *listed)
    assert files(out_dir) == []
    assert pictures.hits == {"/photo?n=1": 1}


CRAFTED = {
    "above": {"file": "../victim.jpg"},
    "deep": {"file": "hen/../../victim.jpg"},
    "absolute": {"file": "/etc/passwd"},
    "nul": {"file": "hen/0123456789abcdef.jpg\0"},
    "other_name": {"file": "hen/victim.jpg"},
    "other_label": {"file": "cock/0123456789abcdef.jpg"},
    "label": {"label": "..", "file": "../0123456789abcdef.jpg"},
    "label_list": {"label": ["hen"]},
    "digest": {"sha256": "../victim"},
    "phash": {"phash": "-1"},
    "box": {"face_box": [9, 9, 1, 10**400]},
    "url": {"url": ["http://a.example/b.jpg"]},
    "half": {"url": "http://a.example/\ud83d"},
    "status": {"status": "perhaps"},
}


@pytest.mark.parametrize("case", CRAFTED)
def test_a_crafted_manifest_is_refused_and_deletes_nothing(case, pictures, out_dir, tmp_path):
    imagenet(out_dir, *write_list(tmp_path / "list", ("hen", pictures.url("/photo?n=1"))))
    (tmp_path / "victim.jpg").write_bytes(b"mine")
    [record] = records(out_dir, "kept")
    with (out_dir / "manifest.jsonl").open("a") as file:
        file.write(json.dumps({**record, "url": "http://a.example/b.jpg", **CRAFTED[case]}) + "\n")
    with pytest.raises(SystemExit) as stop:
        imagenet(out_dir, "--remove", record["sha256"])
    assert stop.value.code.endswith("manifest.jsonl, line 3 is no record of this script; delete that line")
    assert (tmp_path / "victim.jpg").exists()
    assert files(out_dir) == [record["file"]]


@pytest.mark.parametrize("name", ["picture", "hen", ".incoming", "manifest.jsonl"])
def test_links_are_not_followed(name, pictures, out_dir, tmp_path):
    listed = write_list(tmp_path / "list", ("hen", pictures.url("/photo?n=1")))
    imagenet(out_dir, *listed)
    [record] = records(out_dir, "kept")
    path = out_dir / (record["file"] if name == "picture" else name)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    for options in listed, ["--remove", record["sha256"]]:
        with pytest.raises(SystemExit) as stop:
            imagenet(out_dir, *options)
        assert stop.value.code == f"error: {path} is a link, expected what this script wrote; delete the link"
    assert len([*tmp_path.glob("elsewhere"), *tmp_path.glob("elsewhere/*.jpg")]) == 1 + (name == "hen")


def test_a_link_among_the_downloads_is_no_download(pictures, out_dir, tmp_path):
    (tmp_path / "secret.jpg").write_bytes(picture(9))
    url = pictures.url("/photo?n=1")
    (out_dir / ".incoming").mkdir(parents=True)
    (out_dir / ".incoming" / download_data.url_digest(url)).symlink_to(tmp_path / "secret.jpg")
    imagenet(out_dir, *write_list(tmp_path / "list", ("hen", url)))
    [record] = records(out_dir, "kept")
    assert record["sha256"] == hashlib.sha256(picture(1)).hexdigest()


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "null", "[]", '"kept"'])
def test_a_manifest_of_strange_json_is_one_line(line, out_dir, tmp_path):
    out_dir.mkdir()
    (out_dir / "manifest.jsonl").write_text(line + "\n")
    with pytest.raises(SystemExit) as stop:
        imagenet(out_dir, *write_list(tmp_path / "list", ("hen", "http://a.example/b.jpg")))
    assert stop.value.code.endswith("manifest.jsonl, line 1 is no record of this script; delete that line")
    with pytest.raises(SystemExit) as stop:
        imagenet(tmp_path / "new", "--engine", "urls", "--list", str(out_dir / "manifest.jsonl"))
    assert "line 1 is neither 'label url' nor a manifest's record" in stop.value.code
    assert len(stop.value.code) < 500
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_second_run_over_one_folder_stops_at_once(start, pictures, out_dir, tmp_path):
    listed = write_list(tmp_path / "list", *(("hen", pictures.url(f"/photo?n={n}")) for n in range(4)))
    with held(pictures, 2):
        first = start(*command(out_dir, *listed, "--timeout", "10000"))
        wait_for(lambda: len(pictures.hits) > 2)
        with pytest.raises(SystemExit) as stop:
            imagenet(out_dir, *listed)
        assert f"{out_dir} is in use by download_data.py (process {first.pid})" in stop.value.code
        with pytest.raises(SystemExit, match="is in use by"):
            imagenet(out_dir, "--remove", pictures.url("/photo?n=0"))
    assert first.wait(timeout=200) == 0
    assert len(files(out_dir)) == 4


def test_what_strangers_wrote_does_not_reach_the_terminal_as_it_is(pictures, out_dir, tmp_path, capsys):
    url = pictures.url("/photo?n=1")
    imagenet(out_dir, *write_list(tmp_path / "list", ("tench", url), ("hen", url + "#\x1b[31m\u202e")))
    assert r"#\x1b[31m\u202e was found" in capsys.readouterr().out


@pytest.mark.parametrize("by", ["sha256", "url", "copy"])
def test_a_removed_picture_never_comes_back(by, out_dir, tmp_path, capsys):
    contents = {
        "/me.jpg": picture(1),
        "/me-again.jpg": picture(1),
        "/other.jpg": picture(2),
        "/new-copy.jpg": resized(picture(1), (140, 105)),
    }
    with serve_files(contents) as server:
        urls = {path: server.url(path) for path in contents}
        lines = [("hen", url) for path, url in urls.items() if path != "/new-copy.jpg"]
        imagenet(out_dir, *write_list(tmp_path / "list", *lines))
        me, other = records(out_dir, "kept")
        name = {"sha256": me["sha256"][:16], "url": urls["/me.jpg"], "copy": urls["/me-again.jpg"]}[by]
        imagenet(out_dir, "--remove", name)
        assert f"removed {out_dir / me['file']}" in capsys.readouterr().out
        assert files(out_dir) == [other["file"]]
        imagenet(out_dir, *write_list(tmp_path / "list", *(("hen", url) for url in urls.values())))
        assert files(out_dir) == [other["file"]]
        manifest = (out_dir / "manifest.jsonl").read_text()
        assert not [path for path in contents if path != "/other.jpg" and path in manifest]
        assert server.hits == {"/me.jpg": 1, "/me-again.jpg": 1, "/other.jpg": 1, "/new-copy.jpg": 1}
        imagenet(out_dir, *write_list(tmp_path / "list", *(("hen", url) for url in urls.values())))
        assert server.hits["/new-copy.jpg"] == 1
    with Image.open(tmp_path / "set_sheets" / "hen.png") as sheet:
        assert len(sheet.crop((128, 0, 1280, 128)).getcolors()) == 1  # one picture, and white


def test_remove_counts_only_what_was_there(pictures, out_dir, tmp_path, capsys):
    imagenet(out_dir, *write_list(tmp_path / "list", ("hen", pictures.url("/photo?n=1"))))
    (out_dir / files(out_dir)[0]).unlink()
    imagenet(out_dir, "--remove", pictures.url("/photo?n=1"))
    assert "\n0 files removed; " in capsys.readouterr().out


def test_remove_names_what_it_does_not_know(out_dir):
    with pytest.raises(SystemExit, match=r"lists 0 pictures https://example\.org/never\.jpg"):
        imagenet(out_dir, "--remove", "https://example.org/never.jpg")
    assert not out_dir.exists()


def test_a_folder_that_cannot_be_written_stops_the_run(tmp_path, pictures):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="Not a directory"):
        imagenet(
            tmp_path / "file" / "set", *write_list(tmp_path / "list", ("hen", pictures.url("/photo?n=1")))
        )
    assert not pictures.hits


# --- other engines ---


def test_openverse_and_commons_name_the_licence(pictures, tmp_path, monkeypatch):
    for name, answer, licence in (
        ("openverse", serve_openverse, "by-sa 4.0"),
        ("commons", serve_commons, "CC BY-SA 4.0"),
    ):
        with serve(lambda handler, answer=answer: answer(handler, pictures.url("/photo"), 33)) as server:
            monkeypatch.setattr(download_data, name.upper(), server.url("/api"))
            imagenet(tmp_path / name, "--labels", "hen", "--limit", "30", "--engine", name)
            assert len(server.hits) == 2
        kept = records(tmp_path / name, "kept")
        assert [record["url"] for record in kept] == [pictures.url(f"/photo?n={n}") for n in range(30)]
        assert {record["license"] for record in kept} == {licence}
        assert all("/" in record["page"] and record["title"] for record in kept)


@pytest.mark.parametrize("engine", ["openverse", "commons"])
def test_an_api_without_more_results_ends_the_search(engine, pictures, out_dir, monkeypatch):
    answer = {"openverse": serve_openverse, "commons": serve_commons}[engine]
    with serve(lambda handler: answer(handler, pictures.url("/photo"), 3)) as server:
        monkeypatch.setattr(download_data, engine.upper(), server.url("/api"))
        imagenet(out_dir, "--labels", "hen", "--limit", "30", "--engine", engine)
    assert len(records(out_dir, "kept")) == 3


def spoil(answer, number):
    """Make of an answer's entries what APIs have sent, once each."""
    entries = answer["results"] if "results" in answer else answer["query"]["pages"]
    if number == 1 and "results" in answer:
        entries[0] = None
        entries[1] = {}
        entries[2]["url"] = None
        entries[3] |= dict.fromkeys(("title", "license", "license_version", "foreign_landing_url", "creator"))
    elif number == 1:
        entries[0] = None
        del entries[1]["imageinfo"]
        entries[2]["imageinfo"] = []
        entries[3]["imageinfo"][0]["extmetadata"] = None
        entries[4]["imageinfo"][0]["extmetadata"]["LicenseShortName"] = None


@pytest.mark.parametrize("engine", ["openverse", "commons"])
def test_an_api_keeps_its_good_entries_and_the_rest_is_counted(engine, api, out_dir, capsys):
    api(engine, 33, spoil)
    imagenet(out_dir, "--labels", "hen", "--limit", "100", "--engine", engine)
    assert len(records(out_dir, "kept")) == 30
    captured = capsys.readouterr()
    assert "hen: 3 of 33 results have no address and are left out\n" in captured.err
    assert captured.out.splitlines()[1].split() == ["hen", "100", "30", "30"]


def limited(answer, number):
    if number == 3:
        raise ConnectionError(429)


def failing(answer, number):
    if number == 3 and "results" in answer:
        answer.clear()
        answer["detail"] = "Request was throttled. Expected available in 86400 seconds."
    elif number == 3:
        answer.clear()
        info = "You've exceeded your rate limit. Please wait some time and try again."
        answer["error"] = {"code": "ratelimited", "info": info, "docref": "See https://..."}


@pytest.mark.parametrize("change", [limited, failing])
@pytest.mark.parametrize("engine", ["openverse", "commons"])
def test_pages_before_an_error_are_kept_and_the_next_run_goes_on(engine, change, api, out_dir, capsys):
    server = api(engine, 50, change)
    options = ["--labels", "hen", "--limit", "50", "--engine", engine]
    with pytest.raises(SystemExit) as stop:
        imagenet(out_dir, *options)
    assert stop.value.code.startswith(f"error: {engine} does not answer (")
    assert ("HTTP 429" if change is limited else "rate limit" if engine == "commons" else "throttled") in str(
        stop.value.code
    )
    assert len(records(out_dir, "kept")) == 40
    server.change = lambda answer, number: None
    imagenet(out_dir, *options)
    assert len(records(out_dir, "kept")) == 50
    assert capsys.readouterr().out.splitlines()[-2].split() == ["total", "50", "50", "50"]


@pytest.mark.parametrize("engine", ["openverse", "commons"])
def test_an_api_is_asked_again_only_after_the_delay(engine, api, out_dir, monkeypatch):
    events = []
    api(engine, 40, lambda answer, number: events.append("asked"))
    monkeypatch.setattr(time, "sleep", events.append)
    labels = ["--labels", "hen", "tench", "--limit", "40"]
    imagenet(out_dir, *labels, "--engine", engine, "--delay", "10000")
    assert events[::2] == 4 * ["asked"]  # two pages for each label
    assert all(9000 < slept_s <= 10_000 for slept_s in events[1::2])


def shrinking(answer, number):
    if number == 2 and "results" in answer:
        del answer["results"][5:]
        answer["page_count"] = 2
    elif number == 2:
        del answer["query"]["pages"][5:], answer["continue"]


def gone(answer, number):
    if number == 2:
        raise ConnectionError(404)


def repeating(answer, number):
    if number > 1:
        answer.clear()
        answer.update(REPEATED[0])
    else:
        REPEATED[:] = [dict(answer)]


REPEATED = []


@pytest.mark.parametrize(("change", "kept"), [(shrinking, 25), (gone, 20), (repeating, 20)])
@pytest.mark.parametrize("engine", ["openverse", "commons"])
def test_an_api_may_have_less_than_it_said(engine, change, kept, api, out_dir):
    api(engine, 90, change)
    imagenet(out_dir, "--labels", "hen", "--limit", "80", "--engine", engine)
    assert len(records(out_dir, "kept")) == kept


def test_commons_may_bring_a_batch_in_parts(pictures, out_dir, monkeypatch):
    def respond(handler):
        fields = parse_qs(urlsplit(handler.path).query)
        is_second = "iistart" in fields

        def halve(answer, number):
            del answer["continue"]
            if not is_second:
                del answer["batchcomplete"]
                answer["continue"] = {"iistart": "2019-01-01T00:00:00Z", "continue": "||"}
            for page in answer["query"]["pages"]:
                if (page["pageid"] % 2 == 0) != is_second:
                    del page["imageinfo"]

        serve_commons(handler, pictures.url("/photo"), 30, halve)

    with serve(respond) as server:
        monkeypatch.setattr(download_data, "COMMONS", server.url("/api"))
        imagenet(out_dir, "--labels", "hen", "--limit", "20", "--engine", "commons")
    expected = [pictures.url(f"/photo?n={n}") for n in range(20)]
    assert [record["url"] for record in records(out_dir, "kept")] == expected


def test_openverse_gets_its_key_and_nobody_else_does(pictures, out_dir, monkeypatch):
    keys = []

    def respond(handler):
        keys.append((handler.path[:5], handler.headers["Authorization"]))
        if handler.path.startswith("/api?"):
            handler.redirect(handler.path.replace("/api", "/moved"))
        else:
            serve_openverse(handler, pictures.url("/photo"), 3)

    monkeypatch.setenv("OPENVERSE_TOKEN", "secret\n")
    with serve(respond) as server:
        monkeypatch.setattr(download_data, "OPENVERSE", server.url("/api"))
        imagenet(out_dir, "--labels", "hen", "--engine", "openverse")
    assert keys == [("/api?", "Bearer secret"), ("/move", None)]
    assert len(records(out_dir, "kept")) == 3


def test_a_wrong_key_is_named(api, out_dir, monkeypatch):
    def refuse(answer, number):
        raise ConnectionError(401)

    api("openverse", 60, refuse)
    monkeypatch.setenv("OPENVERSE_TOKEN", "expired")
    with pytest.raises(SystemExit, match=r"does not answer \(HTTP 401, is OPENVERSE_TOKEN right\?\)"):
        imagenet(out_dir, "--labels", "hen", "--engine", "openverse")


@pytest.fixture
def api(pictures, monkeypatch):
    """Return a function that starts an imitation of an API whose answers are changed."""
    with contextlib.ExitStack() as stack:

        def start_api(engine, num_results, change):
            def respond(handler):
                try:
                    answer(handler, pictures.url("/photo"), num_results, server.change)
                except ConnectionError as error:
                    handler.answer(b'{"detail": "refused"}', "application/json", status=error.args[0])

            answer = {"openverse": serve_openverse, "commons": serve_commons}[engine]
            server = stack.enter_context(serve(respond))
            server.change = change
            monkeypatch.setattr(download_data, engine.upper(), server.url("/api"))
            return server

        yield start_api


def test_an_api_that_does_not_answer_stops_the_run(out_dir, monkeypatch):
    with serve(serve_hostile) as server:
        monkeypatch.setattr(download_data, "OPENVERSE", server.url("/busy.jpg"))
        monkeypatch.setitem(HOSTILE, "/busy.jpg?q=hen&page=1&page_size=20", HOSTILE["/busy.jpg"])
        with pytest.raises(SystemExit) as stop:
            imagenet(out_dir, "--labels", "hen", "--engine", "openverse")
    assert stop.value.code.startswith("error: openverse does not answer (HTTP 503)")


def test_an_api_that_has_changed_stops_the_run(out_dir, monkeypatch):
    with serve(lambda handler: handler.answer(b"{}", "application/json")) as server:
        monkeypatch.setattr(download_data, "OPENVERSE", server.url("/api"))
        with pytest.raises(SystemExit) as stop:
            imagenet(out_dir, "--labels", "hen", "--engine", "openverse")
    assert stop.value.code.startswith("error: openverse answers in another shape than documented (KeyError")


def test_ddgs_is_an_extra_that_is_asked_for(out_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "ddgs", None)  # as if it were not installed
    with pytest.raises(SystemExit) as stop:
        imagenet(out_dir, "--labels", "hen", "--engine", "duckduckgo")
    assert stop.value.code == "error: --engine duckduckgo needs the package ddgs; pip install ddgs"
    assert not out_dir.exists()


def test_ddgs_is_read_page_by_page(pictures, out_dir, tmp_path, monkeypatch):
    # The package itself asks search engines, which no test may; this has its interface and its fields.
    (tmp_path / "ddgs").mkdir()
    (tmp_path / "ddgs" / "exceptions.py").write_text("class DDGSException(Exception): pass\n")
    (tmp_path / "ddgs" / "__init__.py").write_text(
        "from .exceptions import DDGSException\n"
        "class DDGS:\n"
        "    def images(self, query, *, backend, page, max_results):\n"
        "        if page == 3: raise DDGSException('No results found.')\n"
        f"        return [{{'image': '{pictures.url('/photo?n=')}' + str(4 * page + i), 'url': 'https://p.example',\n"
        "                 'title': backend} for i in range(4)]\n"
    )
    for name in ("ddgs", "ddgs.exceptions"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    imagenet(out_dir, "--labels", "hen", "--limit", "30", "--engine", "bing")
    kept = records(out_dir, "kept")
    assert [record["url"] for record in kept] == [pictures.url(f"/photo?n={n}") for n in range(4, 12)]
    assert {record["title"] for record in kept} == {"bing"}


def test_a_manifest_rebuilds_a_set_exactly_and_refuses_what_changed(out_dir, tmp_path, sample_photo):
    contents = {f"/{n}.jpg": picture(n) for n in range(5)}
    with serve_files(contents) as server:
        lines = [(("hen", "tench")[n % 2], server.url(path)) for n, path in enumerate(contents)]
        imagenet(out_dir, *write_list(tmp_path / "list", *lines))
        listed = ["--engine", "urls", "--list", str(out_dir / "manifest.jsonl")]
        imagenet(tmp_path / "again", *listed)
        contents["/3.jpg"] = picture(99)
        imagenet(tmp_path / "changed", *listed)
    assert files(tmp_path / "again") == files(out_dir)
    for name in files(out_dir):
        assert (tmp_path / "again" / name).read_bytes() == (out_dir / name).read_bytes()
    assert reasons(tmp_path / "changed") == {"changed": 1}
    assert len(files(tmp_path / "changed")) == 4


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_list_may_be_in_any_unicode(encoding, pictures, out_dir, tmp_path):
    (tmp_path / "list").write_text(f"größe {pictures.url('/photo?n=1')}\n", encoding=encoding)
    imagenet(out_dir, "--engine", "urls", "--list", str(tmp_path / "list"))
    assert [record["label"] for record in records(out_dir, "kept")] == ["größe"]


def test_a_list_in_another_encoding_is_named(out_dir, tmp_path):
    (tmp_path / "list").write_bytes("größe http://a.example/b.jpg\n".encode("latin-1"))
    with pytest.raises(SystemExit, match=f"^error: {tmp_path / 'list'}, line "):
        imagenet(out_dir, "--engine", "urls", "--list", str(tmp_path / "list"))


def test_an_empty_list_is_named(out_dir, tmp_path):
    with pytest.raises(SystemExit, match=f"^error: {tmp_path / 'list'} lists no picture"):
        imagenet(out_dir, *write_list(tmp_path / "list"))


@pytest.mark.parametrize(
    "line", ["../../etc http://a/b.jpg", ".git http://a/b.jpg", "hen", '{"status": "kept"}']
)
def test_a_list_cannot_lead_out_of_the_folder(line, out_dir, tmp_path):
    (tmp_path / "list").write_text(f"{line}\n")
    with pytest.raises(SystemExit, match="list, line 1 is neither 'label url' nor a manifest's record"):
        imagenet(out_dir, "--engine", "urls", "--list", str(tmp_path / "list"))
    assert files(out_dir) == []


# --- queries ---


def test_the_queries_are_those_of_the_resources():
    texts = download_data.read_emotions(download_data.EMOTION_QUERIES)
    queries = download_data.list_queries(texts, limit=7, synonym_limit=3)
    assert list(dict.fromkeys(query.label for query in queries)) == list(download_data.shared.EMOTIONS)
    assert queries[0] == ("angry", "angry face", 7)
    assert {query.limit for query in queries if query.text != f"{query.label} face"} == {3}
    queries = download_data.list_queries(download_data.read_imagenet_labels(), limit=5, synonym_limit=0)
    assert len({query.label for query in queries}) == 1000
    assert queries[2] == ("great_white_shark", "great white shark", 5)


def test_an_emotions_file_brings_other_words(tmp_path):
    path = tmp_path / "words.json"
    path.write_text('{"neutral": ["calm face", "poker face"]}')
    texts = download_data.read_emotions(path)
    assert download_data.list_queries(texts, limit=100, synonym_limit=0) == [("neutral", "calm face", 100)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_an_emotions_file_may_be_in_any_unicode(encoding, tmp_path):
    path = tmp_path / "words.json"
    path.write_text('{"größe": ["großes  Gesicht "]}', encoding=encoding)
    assert download_data.read_emotions(path) == {"größe": ["großes Gesicht"]}


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "{}", "{", '{"a": []}', '{"a": "b"}', '{"a": {"b": "c"}}', '{"../a": ["b"]}', '{"a": [""]}'),
        *('{"a": ["b", " "]}', '{"a": ["b", "B "]}', '{"a": ["b"], "c": ["b"]}', '{"a": ["b"], "a": ["c"]}'),
        *('{"e\u0301": ["b"], "\u00e9": ["c"]}', r'{"a": ["\ud83d"]}', '{"a":' * 100_000, "[" * 100_000),
    ],
)
def test_an_emotions_file_of_another_shape_is_named(text, tmp_path, out_dir):
    (tmp_path / "words.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        emotions(out_dir, "--emotions-file", str(tmp_path / "words.json"))
    assert "words.json is no JSON object of lists of words" in stop.value.code
    assert len(stop.value.code) < 500
    assert not out_dir.exists()  # nothing is written before this is checked


@pytest.mark.parametrize("label", ["happy", "great_white-shark", "jack-o'-lantern", "größe", "खुश", "悲しい"])
def test_a_label_may_be_a_word_of_any_language(label):
    assert download_data.check_label(label) == label


def test_a_label_is_one_however_its_accents_are_written():
    assert download_data.check_label("cafe\u0301") == "caf\u00e9"


@pytest.mark.parametrize(
    "label",
    [".", "..", "", " ", "a b", "a/b", "-a", "con", "NUL", "Com1", "\u0301a", "a\0", "ü" * 128, None, 7],
)
def test_a_label_that_can_be_no_folder_everywhere_is_refused(label):
    with pytest.raises(ValueError, match="expected letters, digits"):
        download_data.check_label(label)


def test_an_unknown_label_is_named(out_dir):
    with pytest.raises(SystemExit, match=r"^error: no label 'happpy', expected some of: angry, disgusted"):
        emotions(out_dir, "--labels", "happpy")
