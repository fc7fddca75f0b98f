"""Web servers on this machine for the tests of download_data.py: pictures, hostile answers, search engines.

`FakeGoogle` imitates how Google's result page behaves towards a browser, written from a description of it:
results as JSON in the page, further ones by XHR and fetch on scrolling, links that are there or come only
with a click, the consent page, the captcha, the JavaScript wall. Served with TLS, it stands in for
www.google.com where a Chromium is led here instead (`chromium_script`).

image_server.pem is a self-signed certificate for localhost and *.google.com with its key, for these tests
alone: no browser or library trusts it by itself.
"""

import contextlib
import gzip
import io
import json
import ssl
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, urlencode, urlsplit

import numpy as np
from PIL import Image

CERTIFICATE = Path(__file__).with_suffix(".pem")
# What Chromium calls the certificate: SHA-256 of its public key.
CERTIFICATE_HASH = "ULDusrqY1BeRSNGD4TJEzr0jemOejJyMW3Vxke7nWpA="


def picture(seed: int | list[int], size: tuple[int, int] = (160, 120), form: str = "JPEG") -> bytes:
    """Return a picture like no other: smooth noise, so that even perceptual hashes differ."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(file, form)
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers with what the server's `respond` makes of the path."""

    def do_GET(self) -> None:
        self.server.hits[self.path] += 1
        with contextlib.suppress(ConnectionError):  # the client may hang up on a hostile answer
            self.server.respond(self)

    do_POST = do_CONNECT = do_GET  # noqa: N815 (http.server calls them so)

    def answer(self, body: bytes, kind: str = "text/html; charset=utf-8", status: int = 200, **headers: str):
        """Send a whole answer."""
        self.send_response(status)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **named}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def redirect(self, target: str, **headers: str) -> None:
        """Send the client elsewhere."""
        self.answer(b"", status=302, Location=target, **headers)

    def log_message(self, *args: object) -> None:
        """Keep silent."""


class Server(ThreadingHTTPServer):
    """A server on a free port of this machine.

    Attributes:
        hits: how often each path was asked for.
    """

    daemon_threads = True
    request_queue_size = 50

    def __init__(self, respond: Callable[[Handler], None], tls: bool = False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.respond, self.hits, self.scheme = respond, Counter(), "https" if tls else "http"
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE)
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        """Return the address of a path."""
        return f"{self.scheme}://{host}:{self.server_port}{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep silent about clients that hang up."""


@contextlib.contextmanager
def serve(respond: Callable[[Handler], None], tls: bool = False) -> Iterator[Server]:
    """Run a server while the block runs."""
    with Server(respond, tls) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def serve_pictures(handler: Handler) -> None:
    """Answer /photo?n=7 with picture 7, and /photo?n=7&q=cat with one of its own."""
    fields = parse_qs(urlsplit(handler.path).query)
    seed = [int(fields["n"][0]), *(zlib.crc32(text.encode()) for text in fields.get("q", []))]
    handler.answer(picture(seed), "image/jpeg")


# --- hostile answers ---


def send_endless(handler: Handler) -> None:
    """Send a picture's start, and then bytes without end."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(picture(0))
    while True:
        handler.wfile.write(bytes(65536))


def send_dripping(handler: Handler) -> None:
    """Send a byte every tenth of a second, so that no single read takes long."""
    handler.send_response(200)
    handler.end_headers()
    for byte in picture(0):
        handler.wfile.write(bytes([byte]))
        time.sleep(0.1)


def send_dripping_header(handler: Handler) -> None:
    """Never come to the header's end."""
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
    while True:
        handler.wfile.write(b"X: y\r\n")
        time.sleep(0.2)


def make_bomb() -> bytes:
    """Return a small PNG file of 196 million pixels."""
    file = io.BytesIO()
    Image.new("1", (14000, 14000)).save(file, "PNG", compress_level=1)
    return file.getvalue()


BOMB = make_bomb()  # once: it takes a while
# A picture in Brotli (RFC 7932): a header that says that so many bytes follow as they are, and an end.
BROTLI = (len(picture(1)) - 1 << 4 | 1 << 20).to_bytes(3, "little") + picture(1) + b"\x03"
GZIP_BOMB = gzip.compress(bytes(100_000_000), compresslevel=1)


HOSTILE: dict[str, Callable[[Handler], None]] = {
    "/page.jpg": lambda handler: handler.answer(
        b"<!doctype html><title>Buy this photo</title>", "image/jpeg"
    ),
    "/endless.jpg": send_endless,
    "/huge.jpg": lambda handler: handler.answer(b"", "image/jpeg", Content_Length=str(10 * 2**30)),
    "/to-loopback.jpg": lambda handler: handler.redirect("http://127.0.0.1:1/secret.jpg"),
    "/to-file.jpg": lambda handler: handler.redirect("file:///etc/passwd"),
    "/to-nonsense.jpg": lambda handler: handler.redirect("//["),
    "/to-itself.jpg": lambda handler: handler.redirect("/to-itself.jpg"),
    "/dripping.jpg": send_dripping,
    "/dripping-header.jpg": send_dripping_header,
    "/truncated.jpg": lambda handler: handler.answer(picture(1)[:-900], "image/jpeg"),
    "/broken-off.jpg": lambda handler: handler.answer(picture(1), "image/jpeg", Content_Length="99999"),
    "/bomb.png": lambda handler: handler.answer(BOMB, "image/png"),
    "/gzip-bomb.jpg": lambda handler: handler.answer(GZIP_BOMB, "image/jpeg", Content_Encoding="gzip"),
    "/no-gzip.jpg": lambda handler: handler.answer(picture(1), "image/jpeg", Content_Encoding="gzip"),
    "/brotli.jpg": lambda handler: handler.answer(BROTLI, "image/jpeg", Content_Encoding="br"),
    "/pixel.gif": lambda handler: handler.answer(picture(1, (1, 1), "GIF"), "image/gif"),
    "/script.eps": lambda handler: handler.answer(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n"),
    "/missing.jpg": lambda handler: handler.answer(b"", status=404),
    "/busy.jpg": lambda handler: handler.answer(b"", status=503),
}


def serve_hostile(handler: Handler) -> None:
    """Answer by HOSTILE, else as `serve_pictures`."""
    HOSTILE.get(handler.path, serve_pictures)(handler)


# --- Google ---

# Of the consent page: its title, "accept all", "reject all", "more options".
CONSENT_WORDS = {
    "en": ("Before you continue to Google Search", "Accept all", "Reject all", "More options"),
    "de": ("Bevor Sie zur Google Suche weitergehen", "Alle akzeptieren", "Alle ablehnen", "Weitere Optionen"),
    "fr": ("Avant d'accéder à la recherche Google", "Tout accepter", "Tout refuser", "Plus d'options"),
    "ja": ("Google 検索にアクセスする前に", "すべて受け入れる", "すべて拒否", "その他のオプション"),
}
# How Google has had further results asked for, at different times and in different languages.
MORE_CONTROLS = (
    '<a class="T7sFge sW9g3e VknLRd" jsname="oHxHid" aria-label="More results" href="/search?start=10">'
    '<h3><div class="GNJvt ipz2Oe"><span class="RVQdVd">More results</span></div></h3></a>',
    '<input class="mye4qd" type="button" value="Show more results">',
    '<div role="button" tabindex="0"><span>Weitere Ergebnisse anzeigen</span></div>',
    '<button value="1" aria-label="10 of 60"> More results </button>',
)


class FakeGoogle:
    """An imitation of Google Images; called with each request.

    A query's results are of four layers, a quarter each: JSON in the page (also all that it shows at once),
    JSON in what is fetched on scrolling (by XHR and fetch in turn), a link to /imgres, and such a link that
    comes only with a click.

    Attributes:
        originals: address of the pictures: result n of a query is at <originals>?n=<n>&q=<query>.
        num_results: of each query.
        page_size: results at once.
        is_plain: all results are JSON in the page.
        consent: how consent is asked for first: by a "page" or a "dialog" over the results; "": not at all.
        language: of the consent page, one of CONSENT_WORDS.
        answers: what was answered to it: the form's fields.
        more_after: results after which a control wants to be pressed, `more`; None: never.
        captcha_after: number of searches after which only the captcha is shown; None: never.
        solved_after_s: seconds after which somebody solves the captcha.
        blocked_by: "wall" or "empty" to show that instead of results.
        lost: results that have no original, only a thumbnail.
        queries: the searches that were answered with results.
    """

    def __init__(self, originals: str, num_results: int = 60):
        self.originals, self.num_results, self.page_size = originals, num_results, 10
        self.is_plain, self.consent, self.blocked_by = False, "", ""
        self.language, self.answers, self.more_after, self.more = "en", [], None, MORE_CONTROLS[0]
        self.captcha_after, self.solved_after_s = None, None
        self.lost, self.queries = set(), []

    def original(self, query: str, number: int) -> str:
        """Return the address of a result's picture; like real ones it wants its = and & decoded."""
        return f"{self.originals}?{urlencode({'n': number, 'q': query})}"

    def __call__(self, handler: Handler) -> None:
        """Answer a request for any of Google's hosts."""
        url = urlsplit(handler.path)
        fields = {name: values[0] for name, values in parse_qs(url.query).items()}
        if handler.headers["Host"].startswith("consent."):
            if url.path == "/save":
                form = parse_qs(handler.rfile.read(int(handler.headers["Content-Length"])).decode())
                self.answers.append({name: values[0] for name, values in form.items()})
                cookie = "SOCS=CAESHAgBEhIaAB; Domain=.google.com; Path=/; Secure; SameSite=lax"
                handler.answer(b"", status=303, Location=self.answers[-1]["continue"], Set_Cookie=cookie)
            else:
                handler.answer(self.consent_page(fields["continue"]))
        elif url.path == "/search":
            self.search(handler, fields["q"])
        elif url.path == "/more":
            handler.answer(self.batch(fields["q"], int(fields["start"])).encode())
        elif url.path == "/sorry/index":
            handler.answer(self.captcha_page(fields["continue"]))
        elif url.path == "/httpservice/retry/enablejs":
            handler.answer(b"<title>Google Search</title>Please enable JavaScript")
        else:
            handler.answer(b"", status=404)

    def search(self, handler: Handler, query: str) -> None:
        """Answer /search."""
        here = "https://www.google.com" + handler.path
        cookies = handler.headers.get("Cookie", "")
        if self.consent == "page" and "SOCS=" not in cookies:
            there = {"continue": here, "gl": "DE", "m": "0", "pc": "srp", "hl": self.language, "src": "1"}
            handler.redirect("https://consent.google.com/ml?" + urlencode(there))
        elif (
            self.captcha_after is not None
            and len(self.queries) >= self.captcha_after
            and "SOLVED=" not in cookies
        ):
            handler.redirect("https://www.google.com/sorry/index?" + urlencode({"continue": here}))
        elif self.blocked_by == "wall":
            handler.redirect("https://www.google.com/httpservice/retry/enablejs?sei=x")
        elif self.blocked_by == "empty":
            handler.answer(b"<title>Search</title><p>Your search did not match any image results.</p>")
        else:
            self.queries.append(query)
            handler.answer(self.result_page(query))

    def consent_page(self, target: str) -> bytes:
        """Return the page with a form for each answer; only hidden fields tell them apart in any language."""
        title, accept, reject, more = CONSENT_WORDS[self.language]
        fields = {"gl": "DE", "m": "0", "app": "0", "pc": "srp", "continue": target, "x": "6", "cm": "2"}
        fields |= {"bl": "boq_identityfrontenduiserver_20261117.06_p0", "hl": self.language, "src": "1"}
        forms = [
            '<form action="https://consent.google.com/save" method="POST" jsaction="JIbuQc:fvXJ8d(b3VHJd)">'
            + "".join(f'<input type="hidden" name="{n}" value="{escape(v)}">' for n, v in own.items())
            + f'<div><div jscontroller="soHxf"><button jsname="tWT92d" aria-label="{words}"><div></div>'
            f'<span jsname="V67aGc">{words}</span></button></div></div></form>'
            for words, own in (
                (accept, fields | {"set_sc": "true", "set_aps": "true", "set_eom": "false"}),
                (reject, fields | {"set_eom": "true"}),
            )
        ]
        more = f'<a href="https://consent.google.com/d?{escape(urlencode(fields))}">{more}</a>'
        head = f'<!doctype html><html lang="{self.language}"><title>{title}</title>'
        return "".join([head, *forms, more]).encode()

    def dialog(self) -> str:
        """Return the dialog over the results, which Google's script closes."""
        if self.consent != "dialog":
            return ""
        _, accept, reject, _ = CONSENT_WORDS[self.language]
        close = "document.cookie = 'SOCS=CAES; domain=.google.com; path=/'; this.parentElement.remove()"
        return (
            f'<div id="CXQnmb" role="dialog"><button id="L2AGLb"><div role="none">{accept}</div></button>'
            f'<button id="W0wltc" onclick="{close}"><div role="none">{reject}</div></button></div>'
        )

    def captcha_page(self, target: str) -> bytes:
        """Return the captcha's page; with `solved_after_s` somebody solves it."""
        solve = ""
        if self.solved_after_s is not None:
            cookie = "SOLVED=yes; domain=.google.com; path=/"
            step = f"document.cookie = {json.dumps(cookie)}; location = {json.dumps(target)}"
            solve = f"<script>setTimeout(() => {{ {step} }}, {self.solved_after_s * 1000})</script>"
        return f'<form id="captcha-form">Unusual traffic</form>{solve}'.encode()

    def layer(self, number: int) -> str:
        """Return how a result is shown."""
        if number in self.lost:
            return "thumbnail"
        if self.is_plain or number < self.page_size:
            return "json"
        return ("json", "fetched", "link", "click")[number * 4 // self.num_results]

    def record(self, query: str, number: int) -> str:
        """Write a result, escapes included; its title has a rare line end and half a letter."""
        docid = f"doc_{number:04}-id"
        thumbnail = [f"https://encrypted-tbn0.gstatic.com/images?q=tbn:{docid}", 168, 300]
        original = [self.original(query, number), 120, 160]
        page, title = f"https://pages.example/{number}", f"Title <{number}> \u2028\ud83d"
        origin = {"2003": [None, f"ref{number}", page, title]}
        record = [0, docid, thumbnail, original, None, 0, "rgb(9,9,9)", None, 0, origin]
        text = json.dumps([1, record, "x"], separators=(",", ":"))
        return text.replace("=", "\\u003d").replace("&", "\\u0026").replace("<", "\\u003c")

    def tile(self, query: str, number: int) -> str:
        """Write a result's tile."""
        layer, docid = self.layer(number), f"doc_{number:04}-id"
        fields = {"imgurl": self.original(query, number), "imgrefurl": f"https://pages.example/{number}"}
        link = f"/imgres?{urlencode(fields)}".replace("&", "&amp;")
        href = {"link": f'href="{link}"', "click": f'data-later="{link}"'}.get(layer, "")
        source = "data:image/gif;base64,R0lGODlhAQABAAAAACw="
        if layer == "thumbnail":
            source = f"{self.originals}?n={number}"
        return (
            f'<div class="x{number % 7}" data-attrid="images universal" data-docid="{docid}" '
            f'data-lpage="https://pages.example/{number}"><a {href}><img src="{source}" '
            f'alt="Title {number}" width="150" height="150"></a></div>'
        )

    def batch(self, query: str, start: int) -> str:
        """Write what is fetched for results from `start` on: their records, a line, and their tiles."""
        numbers = range(start, min(start + self.page_size, self.num_results))
        records = [self.record(query, n) for n in numbers if self.layer(n) == "fetched"]
        return ")]}'" + ",".join(records) + "\n" + "".join(self.tile(query, n) for n in numbers)

    def result_page(self, query: str) -> bytes:
        """Write the result page; a record may come twice, and one is of a shape that nobody knows."""
        first = range(self.num_results if self.is_plain else min(self.page_size, self.num_results))
        records = [self.record(query, n) for n in first if self.layer(n) == "json"]
        later = [
            self.record(query, n) for n in range(len(first), self.num_results) if self.layer(n) == "json"
        ]
        odd = '[0,"strange_docid",["https://x.example/t.jpg",1],null]'
        data = ",".join([*records, *records[:1], odd, *later])
        tiles = "".join(self.tile(query, n) for n in first)
        return f"""<!doctype html><title>{quote(query)}</title>
<style>#grid div {{ height: 150px }}</style>
<noscript><a href="/httpservice/retry/enablejs?sei=y">Enable JavaScript</a></noscript>
<script>var m = {{"data": [{data}]}};</script>
{self.dialog()}
<div id="grid">{tiles}</div>
<div id="more" style="display: none">{self.more}</div>
<script>
const grid = document.getElementById('grid'), more = document.getElementById('more');
let start = {len(first)}, isBusy = false, stop = {self.more_after or 9999};
const show = (text) => {{
  grid.insertAdjacentHTML('beforeend', text.slice(text.indexOf('\\n') + 1));
  start += {self.page_size};
  isBusy = false;
}};
const load = () => {{
  if (isBusy || start >= {self.num_results}) return;
  if (start >= stop) {{ setTimeout(() => {{ more.style.display = 'block'; }}, 50); return; }}
  isBusy = true;
  const path = '/more?q={quote(query)}&start=' + start;
  if (start / {self.page_size} % 2) {{
    const request = new XMLHttpRequest();
    request.onload = () => show(request.responseText);
    request.open('GET', path);
    request.send();
  }} else {{
    fetch(path).then((response) => response.text()).then(show);
  }}
}};
addEventListener('scroll', load);
more.addEventListener('click', (event) => {{
  event.preventDefault();
  more.style.display = 'none';
  stop = 9999;
  load();
}});
grid.addEventListener('click', (event) => {{
  const link = event.target.closest('a');
  if (link?.dataset.later) setTimeout(() => {{ link.href = link.dataset.later; }}, 50);
  event.preventDefault();
}});
</script>""".encode()


def chromium_script(path: Path, chromium: str, google: Server) -> None:
    """Write a program that starts Chromium with Google's hosts led to `google`, and all others nowhere."""
    rules = f"MAP *.google.com:443 127.0.0.1:{google.server_port}, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    path.write_text(
        f'#!/bin/sh\nexec "{chromium}" "--host-resolver-rules={rules}" '
        f'"--ignore-certificate-errors-spki-list={CERTIFICATE_HASH}" "$@"\n'
    )
    path.chmod(0o755)


# --- public APIs ---


Change = Callable[[dict, int], None]  # (answer, its number from 1) -> None


def leave(answer: dict, number: int) -> None:
    """Change nothing."""


def serve_openverse(handler: Handler, pictures: str, num_results: int, change: Change = leave) -> None:
    """Answer as https://api.openverse.org/v1/images/ does, but for a change."""
    fields = {name: values[0] for name, values in parse_qs(urlsplit(handler.path).query).items()}
    page, size = int(fields["page"]), int(fields["page_size"])
    numbers = range((page - 1) * size, min(page * size, num_results))
    results = [
        {
            "id": f"id-{n}",
            "title": f"{fields['q']} {n}",
            "foreign_landing_url": f"https://pages.example/{n}",
            "url": f"{pictures}?n={n}",
            "creator": "Somebody",
            "license": "by-sa",
            "license_version": "4.0",
            "license_url": "https://creativecommons.org/licenses/by-sa/4.0/",
        }
        for n in numbers
    ]
    answer = {
        "result_count": num_results,
        "page_count": -(-num_results // size),
        "page_size": size,
        "page": page,
        "results": results,
    }
    change(answer, page)
    handler.answer(json.dumps(answer).encode(), "application/json")


def serve_commons(handler: Handler, pictures: str, num_results: int, change: Change = leave) -> None:
    """Answer as https://commons.wikimedia.org/w/api.php does to a search for files, but for a change.

    Pages come unordered.
    """
    fields = {name: values[0] for name, values in parse_qs(urlsplit(handler.path).query).items()}
    offset, size = int(fields.get("gsroffset", 0)), int(fields["gsrlimit"])
    numbers = range(offset, min(offset + size, num_results))
    pages = [
        {
            "pageid": 1000 - n,
            "ns": 6,
            "title": f"File:{n}.jpg",
            "index": n + 1,
            "imageinfo": [
                {
                    "url": f"{pictures}?n={n}",
                    "descriptionurl": f"https://commons.example/File:{n}.jpg",
                    "extmetadata": {
                        "LicenseShortName": {"value": "CC BY-SA 4.0", "source": "commons-desc-page"}
                    },
                }
            ],
        }
        for n in reversed(numbers)
    ]
    answer = {"batchcomplete": True, "query": {"pages": pages}} if pages else {"batchcomplete": True}
    if numbers.stop < num_results:
        answer["continue"] = {"gsroffset": numbers.stop, "continue": "gsroffset||"}
    change(answer, offset // size + 1)
    handler.answer(json.dumps(answer).encode(), "application/json")
