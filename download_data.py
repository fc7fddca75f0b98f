"""Download labelled photos from the web: what was searched for is the label.

Two data sets: photos of emotions with one face each, for finetune_emotion.py, and a small "fake ImageNet", a
handful of photos for each of the 1000 classes, for finetune_gray_imagenet.py. An engine finds the pictures:
Google Images through one headless Chromium (the query comes from google_images_download), the public APIs of
Openverse and Wikimedia Commons, which name the licence, DuckDuckGo or Bing, or a list of URLs. A picture is
kept if it can be decoded, is no copy of another, and, for an emotion, shows exactly one face.

manifest.jsonl in the output folder is a journal of each search and each picture. A run that was stopped, in
whatever way, goes on from there; no search is made and no picture downloaded a second time. What a search
brings is only weakly labelled, and its copyright stays with its owners: look at the contact sheets in
<out-dir>_sheets/, and train with the photos for research only.

Usage:
    python download_data.py emotions --limit 100
    python download_data.py imagenet --engine openverse --limit 5
    python download_data.py emotions --engine urls --list manifest.jsonl --out-dir data/rebuilt
    python download_data.py emotions --remove https://example.org/me.jpg
"""

import argparse
import contextlib
import functools
import hashlib
import html
import http.client
import io
import ipaddress
import itertools
import json
import os
import re
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, parse_qsl, urlencode, urljoin, urlsplit

import certifi
import imagehash
import urllib3
from PIL import Image, ImageDraw, UnidentifiedImageError
from tqdm import tqdm

import model as shared

RESOURCES = Path(__file__).parent / "resources"
OPENVERSE = "https://api.openverse.org/v1/images/"
COMMONS = "https://commons.wikimedia.org/w/api.php"
ENGINES = ("google", "openverse", "commons", "duckduckgo", "bing", "urls")

SHORTER_SIDE = 256  # pixels, of an ImageNet photo; what the usual ImageNet transform resizes to
MIN_SIDE = 64  # pixels, chosen here: less is an icon or a counting pixel
MAX_PIXELS = 50_000_000  # chosen here: 150 MB decoded; cameras take up to that
# Of 500 scraped photos, copies of 220 pixels at JPEG quality 60 differ in 0 or 2 of the 64 bits; of their
# 124,750 pairs 32 do not differ at all, being the same picture, one by 4 bits, and the others by 6 and more.
NEAR_BITS = 4
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP")  # no others are opened: EPS, say, starts a program

PER_HOST = 2  # downloads at a time from one host; chosen here, browsers take six
MAX_REDIRECTS = 5
MAX_BYTES = 20_000_000  # of a download, chosen here
BACKOFF_S = 1.0  # before the first retry; doubles from one to the next
CHUNK_BYTES = 2**16
API_PAGE = 20  # results a request; Openverse allows no more without a key

# Why a picture is not kept, in the order of the table. Only what was unreachable is tried again.
UNREACHABLE, REMOVED = "unreachable", "removed"
REASONS = (
    *(UNREACHABLE, "http error", "not allowed", "too big", "no image", "too small", "changed"),
    *("no face", "several faces", "copy", "two labels"),
)

FindFace = Callable[[Image.Image], list[float]]  # raises Refusal unless there is exactly one face


class Query(NamedTuple):
    """Something to search for."""

    label: str  # also the folder's name
    text: str
    limit: int  # results to look at


class Result(NamedTuple):
    """A picture that an engine found; unknown fields are empty."""

    url: str
    page: str = ""
    title: str = ""
    license: str = ""
    is_thumbnail: bool = False
    sha256: str = ""  # known beforehand, like `face_box`, only where a manifest is the source
    face_box: Sequence[float] = ()


class Refusal(Exception):  # noqa: N818 (it is an outcome, not an error)
    """A picture is not kept; `reason` is one of REASONS or REMOVED, `detail` says more."""

    def __init__(self, reason: str, detail: str, original: dict | None = None):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail
        self.original = original  # the record of the picture that this one is a copy of


# --- downloading ---


def is_public(address: str) -> bool:
    """Tell whether an IP address is on the open internet: not private, loopback, link-local, reserved."""
    ip = ipaddress.ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None) or ip
    return ip.is_global and not ip.is_multicast


def parse_http_url(url: str) -> urllib3.util.Url:
    """Split and normalise a URL, international names and paths included.

    Raises:
        Refusal: it is not http or https.
    """
    try:
        parts = urllib3.util.parse_url(url)
    except urllib3.exceptions.LocationParseError:
        raise Refusal("not allowed", "not a URL") from None
    if parts.scheme not in ("http", "https") or not parts.host:
        raise Refusal("not allowed", f"the scheme is {parts.scheme}, expected http or https")
    return parts


def resolve(host: str, port: int, allow_private: bool) -> list[str]:
    """Look up the addresses of a host, in the order in which to try them.

    Raises:
        Refusal: one of them is not public, and private ones are not allowed.
        OSError: there are none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(info[4][0] for info in found))
    if not allow_private and not all(map(is_public, addresses)):
        raise Refusal("not allowed", f"{host} is at a private address; --allow-private permits that")
    return addresses


def connect(addresses: Sequence[str], port: int, timeout: float) -> socket.socket:
    """Connect to the first address that answers; raises OSError if none does."""
    *others, last = addresses
    for address in others:
        with contextlib.suppress(OSError):
            return socket.create_connection((address, port), timeout)
    return socket.create_connection((last, port), timeout)


def shut(connection: socket.socket) -> None:
    """Wake whoever reads from a connection with its end."""
    with contextlib.suppress(OSError):  # it has ended already
        connection.shutdown(socket.SHUT_RDWR)


class Downloader:
    """Fetches over http and https what strangers serve, from several threads at once.

    The standard library's client, because the socket must be ours: a name is resolved once, the address is
    checked, and that very address is connected to, so a name server cannot change its mind in between; and a
    deadline holds for the whole exchange.

    Args:
        timeout: seconds for one request.
        retries: how often to try again what may be a passing failure.
        contact: who is asking, for the user agent.
    """

    def __init__(self, timeout: float, retries: int, allow_private: bool, contact: str):
        self.timeout, self.retries, self.allow_private = timeout, retries, allow_private
        self.headers = {
            "User-Agent": f"emotion-detector/1.0 ({contact or 'data for research'})",
            "Accept": "image/*, application/json",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        self._tls = ssl.create_default_context()
        self._tls.load_verify_locations(certifi.where())  # not every system brings its own
        self._slots = {}
        self._connections = set()
        self._is_closed = threading.Event()

    def close(self) -> None:
        """Break off what is under way, so that nobody waits for it."""
        self._is_closed.set()
        for connection in list(self._connections):
            shut(connection)

    def get(self, url: str) -> bytes:
        """Fetch a body, through redirects and retries; raises Refusal."""
        for attempt in range(self.retries):
            try:
                return self._follow(url)
            except Refusal as refusal:
                if refusal.reason != UNREACHABLE or self._is_closed.wait(BACKOFF_S * 2**attempt):
                    raise
        return self._follow(url)

    def _follow(self, url: str) -> bytes:
        """Fetch a body through redirects, each of which is checked like the first URL."""
        for _ in range(1 + MAX_REDIRECTS):
            body, location = self._exchange(parse_http_url(url))
            if not location:
                return body
            try:
                url = urljoin(url, location)
            except ValueError:
                raise Refusal("not allowed", "redirected to what is not a URL") from None
        raise Refusal("http error", f"more than {MAX_REDIRECTS} redirects")

    def _exchange(self, url: urllib3.util.Url) -> tuple[bytes, str]:
        """Make one request; return the body, or where it is redirected to."""
        host, port = url.host.strip("[]"), url.port or {"http": 80, "https": 443}[url.scheme]
        with self._slots.setdefault(host, threading.Semaphore(PER_HOST)):
            try:
                addresses = resolve(host, port, self.allow_private)
                with contextlib.closing(http.client.HTTPConnection(host, port)) as client:
                    client.sock = connect(addresses, port, self.timeout)
                    if url.scheme == "https":
                        client.sock = self._tls.wrap_socket(
                            client.sock, server_hostname=host, do_handshake_on_connect=False
                        )
                    with self._watched(client.sock):
                        if url.scheme == "https":
                            client.sock.do_handshake()
                        client.request("GET", url.request_uri, headers={**self.headers, "Host": url.netloc})
                        return self._read(client.getresponse())
            except ssl.SSLCertVerificationError as error:
                raise Refusal("not allowed", f"TLS certificate: {error.verify_message}") from None
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise Refusal(UNREACHABLE, detail) from None

    @contextlib.contextmanager
    def _watched(self, connection: socket.socket) -> Iterator[None]:
        """Shut a connection when its time is over, however steadily it drips; then raise TimeoutError."""
        end = time.monotonic() + self.timeout
        timer = threading.Timer(self.timeout, shut, [connection])
        self._connections.add(connection)
        timer.start()
        try:
            if self._is_closed.is_set():  # close() came too early to see this connection
                shut(connection)
            yield
        finally:
            timer.cancel()
            self._connections.discard(connection)
            if time.monotonic() >= end or self._is_closed.is_set():
                raise TimeoutError(f"not done after {self.timeout:g} s")

    def _read(self, response: http.client.HTTPResponse) -> tuple[bytes, str]:
        """Read a body of limited size, or a redirect's target."""
        location = response.getheader("Location")
        if 300 <= response.status < 400 and location:
            return b"", location
        if response.status != 200:
            is_passing = response.status in (408, 429) or response.status >= 500
            raise Refusal(UNREACHABLE if is_passing else "http error", f"HTTP {response.status}")
        body = io.BytesIO()
        if (response.length or 0) <= MAX_BYTES:  # what is announced; None if nothing is
            while body.tell() <= MAX_BYTES and (chunk := response.read(CHUNK_BYTES)):
                body.write(chunk)
        if body.tell() > MAX_BYTES or (response.length or 0) > MAX_BYTES:
            raise Refusal("too big", f"more than {MAX_BYTES / 1e6:g} MB")
        if response.length:  # what is left of it
            raise Refusal(UNREACHABLE, "the connection broke off")
        return body.getvalue(), ""


# --- pictures ---


def read_photo(path: Path) -> tuple[Image.Image, str]:
    """Decode a file of unknown origin; return the upright RGB photo and the extension of its real format.

    Raises:
        Refusal: it is no picture of a known format, damaged, too small or too big.
    """
    try:
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(path, formats=FORMATS) as image,
        ):
            kind, (width, height) = image.format, image.size
    except UnidentifiedImageError:
        is_markup = path.read_bytes()[:500].lstrip().startswith(b"<")
        raise Refusal("no image", "a web page" if is_markup else "an unknown format") from None
    except Image.DecompressionBombError:
        raise Refusal("too big", "a decompression bomb") from None
    except shared.PILLOW_ERRORS:
        raise Refusal("no image", "damaged") from None
    if width * height > MAX_PIXELS:
        raise Refusal("too big", f"{width}x{height} pixels")
    if min(width, height) < MIN_SIDE:
        raise Refusal("too small", f"{width}x{height} pixels")
    try:
        return shared.load_photo(path), ".jpg" if kind in ("JPEG", "MPO") else f".{kind.lower()}"
    except ValueError:
        raise Refusal("no image", "damaged") from None


def shrink(photo: Image.Image, side: int) -> Image.Image:
    """Scale a photo so that its shorter side has `side` pixels; smaller ones stay as they are."""
    scale = side / min(photo.size)
    if scale >= 1:
        return photo
    size = tuple(round(length * scale) for length in photo.size)
    return photo.resize(size, Image.Resampling.LANCZOS, reducing_gap=3)


def single_face(faces: shared.Faces, min_size: int) -> list[float]:
    """Return the box of the only face whose longer side has `min_size` pixels, xyxy in pixels.

    Raises:
        Refusal: there is none, or more than one.
    """
    sizes = (faces.boxes[:, 2:] - faces.boxes[:, :2]).max(1, initial=0)
    boxes = faces.boxes[sizes >= min_size]
    if len(boxes) != 1:
        raise Refusal("several faces" if len(boxes) else "no face", f"{len(boxes)} faces")
    return [round(float(edge), 1) for edge in boxes[0]]


def differing_bits(one: str, other: str) -> int:
    """Count the bits in which two perceptual hashes, written in hex, differ."""
    return (int(one, 16) ^ int(other, 16)).bit_count()


def find_copy(records: Iterable[dict], sha256: str, phash: str) -> dict | None:
    """Find a picture that is the same, to the byte or to the eye."""
    for record in records:
        if record["sha256"] == sha256 or differing_bits(record["phash"], phash) <= NEAR_BITS:
            return record
    return None


# --- the data set ---


def now() -> str:
    """Tell the time in UTC, by ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def url_digest(url: str) -> str:
    """Name a URL without telling it."""
    return hashlib.sha256(url.encode()).hexdigest()


def whole_text(text: object) -> str:
    """Make a string of what a stranger's JSON has for one: None is empty, half a surrogate pair becomes ?."""
    return str(text or "").encode(errors="replace").decode()


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that is whole and on the disk, or not there."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class DataSet:
    """The pictures <folder>/<label>/<start of sha256>.<ext>, and their journal, manifest.jsonl.

    Each line is a JSON object with a `status`:
        searched: a query was made; with its results.
        kept, rejected, failed: what became of one result. What failed is tried again by the next run.
        removed: what somebody asked to take out, hashes only; it never comes back.
    Of several lines about one thing the last counts. A line is on the disk before the next thing is done.
    Downloads land in <folder>/.incoming first, named after their URL.

    Args:
        shorter_side: shrink the pictures to that many pixels, and store them as JPEG.

    Raises:
        ValueError: the manifest is damaged, other than by a last line that breaks off.
    """

    def __init__(self, folder: Path, shorter_side: int | None):
        self.folder, self.shorter_side = folder, shorter_side
        self.manifest = folder / "manifest.jsonl"
        self.incoming = folder / ".incoming"
        self.incoming.mkdir(parents=True, exist_ok=True)
        self.searches = {}  # (engine, label, query): its record
        self.outcomes = {}  # (engine, label, query, url): its record
        self.by_url = {}  # url: the first record that settled it
        self.removed = []
        self._load()

    def _load(self) -> None:
        """Read the manifest, and finish what a killed run had begun."""
        data = self.manifest.read_bytes() if self.manifest.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self.manifest, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._remember(json.loads(line))
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{self.manifest}, line {number} is no record of this script; delete that line"
                ) from None
        waiting = {path.name for path in self.incoming.iterdir()}
        for url, record in self.by_url.items():
            if url_digest(url) in waiting:
                self._place(record)

    def _remember(self, record: dict) -> None:
        """Take a record in."""
        if record["status"] == "removed":
            self.removed.append(record)
            return
        key = record["engine"], record["label"], record["query"]
        if record["status"] == "searched":
            self.searches[key] = record
            return
        self.outcomes[*key, record["url"]] = record
        if record["status"] != "failed":
            self.by_url.setdefault(record["url"], record)

    def _append(self, record: dict) -> dict:
        """Write a record down, with the time, and take it in."""
        record = {**record, "time": now()}
        with self.manifest.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._remember(record)
        return record

    def _place(self, record: dict) -> None:
        """Move a download to where its record says, or away if it was rejected."""
        source = self.incoming / url_digest(record["url"])
        if record["status"] != "kept":
            source.unlink(missing_ok=True)
            return
        target = self.folder / record["file"]
        target.parent.mkdir(exist_ok=True)
        if self.shorter_side:
            photo, buffer = shared.load_photo(source), io.BytesIO()
            shrink(photo, self.shorter_side).save(
                buffer, "JPEG", quality=90, icc_profile=photo.info.get("icc_profile")
            )
            replace_file(target, buffer.getvalue())
            source.unlink()
        else:
            source.replace(target)

    def kept(self, label: str | None = None) -> list[dict]:
        """List the records of what is kept, of one label or all."""
        kept = [record for record in self.outcomes.values() if record["status"] == "kept"]
        return [record for record in kept if label in (None, record["label"])]

    def find_search(self, engine: str, query: Query) -> dict | None:
        """Return the record of a search that was made before and asked for as many results, or None."""
        record = self.searches.get((engine, query.label, query.text))
        return record if record and record["asked"] >= query.limit else None

    def note_search(self, engine: str, query: Query, results: Iterable[Result]) -> dict:
        """Write down what a search brought, beside what it did before, and without what is to stay away."""
        gone = {digest for record in self.removed for digest in record["url_sha256"]}
        before = self.searches.get((engine, query.label, query.text), {"results": []})
        found = {fields["url"]: fields for fields in before["results"]}
        for result in results:
            if url_digest(result.url) not in gone:
                found[result.url] = {name: value for name, value in result._asdict().items() if value}
        named = {"engine": engine, "label": query.label, "query": query.text, "asked": query.limit}
        return self._append({"status": "searched", **named, "results": list(found.values())})

    def pending(self, search: dict) -> list[Result]:
        """List the results of a search that are not settled yet."""
        key = search["engine"], search["label"], search["query"]
        outcomes = [self.outcomes.get((*key, fields["url"])) for fields in search["results"]]
        return [
            Result(**fields)
            for fields, outcome in zip(search["results"], outcomes, strict=True)
            if not outcome or outcome["status"] == "failed"
        ]

    def fetch(self, downloader: Downloader, url: str) -> Path:
        """Download into .incoming, unless it is there, and return the path; raises Refusal."""
        path = self.incoming / url_digest(url)
        if not path.exists():
            replace_file(path, downloader.get(url))
        return path

    def refuse_known(self, url: str, label: str) -> None:
        """Raise the Refusal of a URL that was settled before, under whatever label; return if it was not."""
        record = self.by_url.get(url)
        if not record:
            return
        originals = (kept for kept in self.kept() if kept["sha256"] == record.get("copy_of"))
        original = record if record["status"] == "kept" else next(originals, None)
        if original:
            refuse_copy(original, label)
        raise Refusal(record["reason"], record["detail"])

    def settle(self, search: dict, result: Result, outcome: dict | Refusal) -> None:
        """Write down what became of a result: the fields of a kept picture, or why it is refused."""
        record = {
            "status": "kept",
            **{name: search[name] for name in ("label", "query", "engine")},
            **{name: getattr(result, name) for name in ("url", "page", "title", "license", "is_thumbnail")},
        }
        if isinstance(outcome, Refusal):
            if outcome.reason == REMOVED:
                self.forget({result.url}, [])
                return
            record["status"] = "failed" if outcome.reason == UNREACHABLE else "rejected"
            record |= {"reason": outcome.reason, "detail": outcome.detail}
            if outcome.original:
                record["copy_of"] = outcome.original["sha256"]
        else:
            record |= outcome
        self._place(self._append(record))

    def remove(self, sha_or_url: str) -> list[Path]:
        """Take a picture, and all that were found to be copies of it, out for good; return the files deleted.

        Raises:
            ValueError: nothing, or more than one picture, goes by that name.
        """
        outcomes = list(self.outcomes.values())
        if re.fullmatch(r"[0-9a-f]{12,64}", sha_or_url):
            shas = {r["sha256"] for r in self.kept() if r["sha256"].startswith(sha_or_url)}
            urls = set()
        else:
            same = [record for record in outcomes if record["url"] == sha_or_url]
            shas = {record.get("sha256") or record.get("copy_of") for record in same} - {None}
            found = {fields["url"] for search in self.searches.values() for fields in search["results"]}
            urls = {sha_or_url} & found
        if len(shas) > 1 or not shas | urls:
            raise ValueError(
                f"{self.manifest} lists {len(shas)} pictures {sha_or_url}; expected the URL of one, "
                "or 12 or more digits of its SHA-256, such as the file's name"
            )
        copies = [r for r in outcomes if r.get("sha256") in shas or r.get("copy_of") in shas]
        kept = [record for record in copies if record["status"] == "kept"]
        files = [self.folder / record["file"] for record in kept]
        for path in files:
            path.unlink(missing_ok=True)
        self.forget(urls | {record["url"] for record in copies}, kept)
        return files

    def forget(self, urls: set[str], kept: Sequence[dict]) -> None:
        """Rewrite the manifest without `urls`, and bar them and whatever looks like the `kept` pictures."""
        marks = [{"sha256": record["sha256"], "phash": record["phash"]} for record in kept]
        digests = sorted(map(url_digest, urls))
        tombstone = {"status": "removed", "url_sha256": digests, "pictures": marks, "time": now()}
        for url in urls:
            (self.incoming / url_digest(url)).unlink(missing_ok=True)
        for search in self.searches.values():
            search["results"] = [fields for fields in search["results"] if fields["url"] not in urls]
        outcomes = [record for record in self.outcomes.values() if record["url"] not in urls]
        records = [*self.removed, tombstone, *self.searches.values(), *outcomes]
        lines = [json.dumps(record) + "\n" for record in records]
        replace_file(self.manifest, "".join(lines).encode())
        self.searches, self.outcomes, self.by_url, self.removed = {}, {}, {}, []
        self._load()


def refuse_copy(original: dict, label: str) -> None:
    """Raise the Refusal of a copy of a kept picture, found for `label`."""
    if original["label"] == label:
        raise Refusal("copy", f"of {original['file']}", original)
    raise Refusal("two labels", f"the same as {original['file']}", original)


def judge(path: Path, label: str, result: Result, dataset: DataSet, find_face: FindFace | None) -> dict:
    """Examine a downloaded file; return what the manifest tells of a picture that is kept.

    Args:
        find_face: None where faces do not matter. A picture that a manifest vouches for is not searched.

    Raises:
        Refusal: the picture is not to be kept.
    """
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    photo, extension = read_photo(path)
    phash = str(imagehash.phash(photo))
    if find_copy((mark for record in dataset.removed for mark in record["pictures"]), sha256, phash):
        raise Refusal(REMOVED, "")
    if result.sha256 and result.sha256 != sha256:
        raise Refusal("changed", f"SHA-256 is {sha256}, the manifest has {result.sha256}")
    original = find_copy(dataset.kept(), sha256, phash)
    if original:
        refuse_copy(original, label)
    face_box = find_face(photo) if find_face and not result.sha256 else list(result.face_box)
    extension = ".jpg" if dataset.shorter_side else extension
    return {
        "file": f"{label}/{sha256[:16]}{extension}",
        **{"width": photo.width, "height": photo.height, "bytes": len(data)},
        **{"sha256": sha256, "phash": phash, "face_box": face_box},
    }


def collect(
    search: dict, dataset: DataSet, fetch: Callable[[str], Future], find_face: FindFace | None
) -> None:
    """Settle each result of a search, in order, so that chance does not decide which copy is kept.

    Args:
        fetch: starts a download; the future's result is the file's path, or it raises Refusal.
    """
    results = dataset.pending(search)
    futures = {result.url: fetch(result.url) for result in results if result.url not in dataset.by_url}
    try:
        for result in results:
            try:
                dataset.refuse_known(result.url, search["label"])
                path = futures[result.url].result()
                outcome = judge(path, search["label"], result, dataset, find_face)
            except Refusal as refusal:
                outcome = refusal
            dataset.settle(search, result, outcome)
    finally:
        for future in futures.values():
            future.cancel()


# --- Google's result page ---

GOOGLE = "https://www.google.com/search"
FILTERS = ("color", "color_type", "language", "safe_search", "size", "time", "type", "usage_rights")
# What Google's result page is known by. Class names change, these attributes have not from 2024 to 2026.
TILE = 'div[data-attrid="images universal"][data-docid]'
REJECT_COOKIES, ACCEPT_COOKIES = "#W0wltc", "#L2AGLb"
RECORD_START = re.compile(r'\[0,"([\w-]{6,24})",\["https?:')
TROUBLE = {
    "captcha": "wants to see a person (captcha)",
    "consent": "does not go on from its consent page",
    "wall": "does not believe that this browser has JavaScript",
}
GROW_WAIT_S = 3.0  # how long a page may take to show something, or more after scrolling
CLICK_WAIT_S = 1.0  # how long a tile may take to show its link after a click
SOLVE_WAIT_S = 600.0  # how long somebody may take to solve a captcha

# Keeps the bodies of what the page fetches; later results come that way.
KEEP_BODIES = """(() => {
  window.keptBodies = [];
  const keep = (text) => window.keptBodies.push(text);
  const fetchAsBefore = window.fetch;
  window.fetch = async (...args) => {
    const response = await fetchAsBefore(...args);
    response.clone().text().then(keep, () => {});
    return response;
  };
  const sendAsBefore = XMLHttpRequest.prototype.send;
  XMLHttpRequest.prototype.send = function (...args) {
    this.addEventListener('load', () => {
      if (['', 'text'].includes(this.responseType)) keep(this.responseText);
    });
    return sendAsBefore.apply(this, args);
  };
})()"""
# Returns the tiles and the bodies kept since the last look.
LOOK = f"""return [[...document.querySelectorAll('{TILE}')].map((tile) => ({{
  docid: tile.dataset.docid,
  page: tile.dataset.lpage || '',
  link: tile.querySelector('a[href*="/imgres?"]')?.href || '',
  thumbnail: tile.querySelector('img')?.src || '',
  title: tile.querySelector('img')?.alt || '',
}})), (window.keptBodies || []).splice(0)]"""
IS_VISIBLE = (
    "return [...document.querySelectorAll(arguments[0])].some((element) => element.checkVisibility())"
)
CLICK_TILE = f"""const tile = document.querySelector(`{TILE}[data-docid="${{arguments[0]}}"]`);
(tile?.querySelector('a, img') || tile)?.click()"""


def google_url(text: str, filters: dict[str, str]) -> str:
    """Build the address of a result page with google_images_download's knowledge of Google's filters.

    The package also puts in made-up traces of a browser session, which are left out.

    Raises:
        ValueError: a filter has a value that the package does not know.
    """
    from google_images_download import google_images_download as package  # noqa: PLC0415 (Google's alone)

    arguments = {**dict.fromkeys(package.args_list), **filters}
    builder = package.googleimagesdownload()
    try:
        parameters = builder.build_url_parameters(arguments)
    except KeyError as error:
        raise ValueError(f"--filter has no value {error}; see the help of google_images_download") from None
    url = builder.build_search_url(text, parameters, None, None, None, arguments["safe_search"])
    fields = [field for field in parse_qsl(urlsplit(url).query) if field[0] in ("q", "tbs", "lr", "safe")]
    return f"{GOOGLE}?{urlencode([*fields, ('udm', '2')])}"  # udm=2: the tab of images


def parse_records(text: str) -> dict[str, Result]:
    """Decode the results that stand as JSON in a page or in what it fetched, by docid.

    [0, docid, [thumbnail, height, width], [original, height, width], ..., {"2003": [_, _, page, title]}]
    """
    records = {}
    for match in RECORD_START.finditer(text):
        with contextlib.suppress(ValueError, IndexError, TypeError, AttributeError):  # of another shape
            record, _ = json.JSONDecoder().raw_decode(text, match.start())
            about = next((part["2003"] for part in record if isinstance(part, dict) and "2003" in part), None)
            page, title = about[2:4] if about else ("", "")
            if record[3][0].startswith("http"):
                records[match[1]] = Result(*map(whole_text, (record[3][0], page, title)))
    return records


def parse_imgres(link: str) -> Result | None:
    """Read the original's address out of a link /imgres?imgurl=...&imgrefurl=..."""
    fields = {name: values[0] for name, values in parse_qs(urlsplit(link).query).items()}
    return Result(fields["imgurl"], fields.get("imgrefurl", "")) if "imgurl" in fields else None


@contextlib.contextmanager
def open_browser(profile: Path | None, headful: bool) -> Iterator["webdriver.Chrome"]:  # noqa: F821
    """Start Chromium, and close it whatever happens.

    It says truly what it is: neither its user agent nor navigator.webdriver is touched.

    Raises:
        ValueError: there is none.
    """
    from selenium import webdriver  # noqa: PLC0415 (only Google needs it)
    from selenium.common.exceptions import WebDriverException  # noqa: PLC0415

    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    driver_path = shutil.which("chromedriver")
    if not browser or not driver_path:
        raise ValueError(
            "the google engine needs Chromium and chromedriver on the PATH (Debian: apt install chromium "
            "chromium-driver); or choose --engine openverse or commons"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = browser  # this and the path below keep Selenium from fetching its own
    options.add_argument("--disable-dev-shm-usage")  # containers have little of it
    options.add_argument("--remote-debugging-pipe")  # Chromium ends when chromedriver does, even if killed
    if not headful:
        options.add_argument("--headless=new")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # as root Chromium does not start with it
    # A session of its own: Ctrl-C reaches this script alone, which then closes the browser in order.
    service = webdriver.ChromeService(driver_path, popen_kw={"start_new_session": True})
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `finally` runs
    with tempfile.TemporaryDirectory(prefix="download_data_", ignore_cleanup_errors=True) as folder:
        options.add_argument(f"--user-data-dir={(profile or Path(folder)).absolute()}")
        try:
            driver = webdriver.Chrome(options, service)
            driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": KEEP_BODIES})
            yield driver
        except (WebDriverException, urllib3.exceptions.HTTPError) as error:
            reason = (getattr(error, "msg", None) or str(error)).splitlines()[0]
            raise ValueError(
                f"the browser gave up ({reason}); what is downloaded is kept, run the command again to go on"
            ) from None
        finally:
            service.stop()
            signal.signal(signal.SIGTERM, terminate)


class Google:
    """Searches Google Images in a running browser, the way a person would: open, scroll, click.

    Args:
        filters: google_images_download's names and values.
        is_watched: somebody sees the browser, and can solve a captcha.
    """

    def __init__(self, driver: "webdriver.Chrome", filters: dict[str, str], is_watched: bool):  # noqa: F821
        self.driver, self.filters, self.is_watched = driver, filters, is_watched
        self.records: dict[str, Result] = {}  # of the present page, by docid
        self.tiles: dict[str, dict] = {}

    def search(self, query: Query) -> list[Result]:
        """Return the results in the page's order.

        Raises:
            ValueError: Google wants to see a person, or something that this script does not know.
        """
        self.driver.get(google_url(query.text, self.filters))
        if self._reach_results() == "empty":
            return []
        self.records, self.tiles = parse_records(self.driver.page_source), {}
        self._scroll(query.limit)
        found = map(self._resolve, self.tiles | self.records)  # in the page's order
        return list(itertools.islice(filter(None, found), query.limit))

    def _state(self) -> str:
        """Tell what the browser shows: results, consent, captcha, wall (JavaScript is wanted), or empty."""
        url = urlsplit(self.driver.current_url)
        if url.path.startswith("/sorry/") or self._shows("#captcha-form"):
            return "captcha"
        if (url.hostname or "").startswith("consent.") or self._shows(f"{REJECT_COOKIES}, {ACCEPT_COOKIES}"):
            return "consent"
        if url.path.startswith("/httpservice/retry/enablejs"):
            return "wall"
        if self._shows(TILE) or RECORD_START.search(self.driver.page_source):
            return "results"
        return "empty"

    def _shows(self, selector: str) -> bool:
        """Tell whether something on the page is visible."""
        return self.driver.execute_script(IS_VISIBLE, selector)

    def _wait(self, condition: Callable[[], object], seconds: float) -> bool:
        """Wait until something holds; return whether it does."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def _reach_results(self) -> str:
        """Get past the consent page, or with somebody's help a captcha; return "results" or "empty"."""
        if self._state() == "consent":
            button = REJECT_COOKIES if self._shows(REJECT_COOKIES) else ACCEPT_COOKIES
            self.driver.execute_script("document.querySelector(arguments[0])?.click()", button)
            self._wait(lambda: self._state() != "consent", GROW_WAIT_S)
        if self._state() == "captcha" and self.is_watched:
            print("solve the captcha in the browser's window, the search then goes on", file=sys.stderr)
            self._wait(lambda: self._state() in ("results", "empty"), SOLVE_WAIT_S)
        if self._state() == "empty":  # or not complete yet
            self._wait(lambda: self._state() != "empty", GROW_WAIT_S)
        state = self._state()
        if state in TROUBLE:
            raise ValueError(
                f"Google {TROUBLE[state]}; what is downloaded is kept. Run the command again in some hours, "
                "or with --headful --profile DIR to solve it in the window, or with --engine openverse"
            )
        return state

    def _look(self) -> int:
        """Take in what the page shows and has fetched; return the number of results known by now."""
        tiles, bodies = self.driver.execute_script(LOOK)
        self.tiles |= {tile["docid"]: tile for tile in tiles}
        for body in bodies:
            self.records |= parse_records(body)
        return len(self.tiles | self.records)

    def _scroll(self, limit: int) -> None:
        """Scroll until the page shows `limit` results, or no more."""
        while (count := self._look()) < limit:
            self.driver.execute_script("window.scrollTo(0, document.body.scrollHeight)")
            if not self._wait(lambda count=count: self._look() > count, GROW_WAIT_S):
                break

    def _resolve(self, docid: str) -> Result | None:
        """Get a result from its record, else its link, after a click if need be, else its thumbnail."""

        def is_known() -> bool:
            self._look()
            return docid in self.records or bool(self.tiles[docid]["link"])

        if docid not in self.records and not is_known():
            self.driver.execute_script(CLICK_TILE, docid)
            self._wait(is_known, CLICK_WAIT_S)
        if docid in self.records:
            return self.records[docid]
        tile = self.tiles[docid]
        if original := parse_imgres(tile["link"]):
            return original._replace(title=tile["title"])
        if tile["thumbnail"].startswith("http"):
            return Result(tile["thumbnail"], tile["page"], tile["title"], is_thumbnail=True)
        return None


# --- other engines ---


class Pace:
    """Waits so that calls are at least `delay` seconds apart."""

    def __init__(self, delay: float):
        self.delay, self._next = delay, 0.0

    def __call__(self) -> None:
        """Wait for one's turn."""
        time.sleep(max(self._next - time.monotonic(), 0))
        self._next = time.monotonic() + self.delay


def get_json(name: str, url: str, fields: dict[str, object], downloader: Downloader, pace: Pace) -> dict:
    """Ask a public API; raises ValueError if it does not answer with JSON."""
    pace()
    try:
        return json.loads(downloader.get(f"{url}?{urlencode(fields)}"))
    except Refusal as refusal:
        raise ValueError(
            f"{name} does not answer ({refusal.detail}); run the command again later, it goes on from here"
        ) from None
    except ValueError:
        raise ValueError(f"{name} answers with what is no JSON; run the command again later") from None


def search_openverse(query: Query, downloader: Downloader, pace: Pace) -> list[Result]:
    """Search openly licensed pictures. Source: https://api.openverse.org/v1/ (image search)."""
    results, page = [], 1
    while len(results) < query.limit:
        fields = {"q": query.text, "page": page, "page_size": API_PAGE}
        answer = get_json("Openverse", OPENVERSE, fields, downloader, pace)
        for found in answer["results"]:
            name = f"{found['license']} {found['license_version'] or ''}".strip()
            results.append(
                Result(*map(whole_text, (found["url"], found["foreign_landing_url"], found["title"], name)))
            )
        if page >= answer["page_count"] or not answer["results"]:
            break
        page += 1
    return results[: query.limit]


def search_commons(query: Query, downloader: Downloader, pace: Pace) -> list[Result]:
    """Search Wikimedia Commons. Source: https://www.mediawiki.org/wiki/API:Search and API:Imageinfo."""
    results, go_on = [], {}
    while len(results) < query.limit:
        fields = {
            **{"action": "query", "format": "json", "formatversion": 2, "generator": "search"},
            **{"gsrsearch": f"filetype:bitmap {query.text}", "gsrnamespace": 6, "gsrlimit": API_PAGE},
            **{"prop": "imageinfo", "iiprop": "url|extmetadata", "iiextmetadatafilter": "LicenseShortName"},
            **go_on,
        }
        answer = get_json("Wikimedia Commons", COMMONS, fields, downloader, pace)
        pages = answer.get("query", {}).get("pages", [])
        for page in sorted(pages, key=lambda page: page["index"]):  # by relevance
            info = page["imageinfo"][0]
            name = html.unescape(info["extmetadata"].get("LicenseShortName", {}).get("value", ""))
            results.append(Result(info["url"], info["descriptionurl"], page["title"], name))
        go_on = answer.get("continue")
        if not go_on:
            break
    return results[: query.limit]


def search_api(query: Query, name: str, downloader: Downloader, pace: Pace) -> list[Result]:
    """Search with a public API; raises ValueError if it does not answer, or not as documented."""
    search = {"openverse": search_openverse, "commons": search_commons}[name]
    try:
        return search(query, downloader, pace)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name} answers in another shape than documented ({error!r}); choose another --engine"
        ) from None


def search_ddgs(query: Query, backend: str, pace: Pace) -> list[Result]:
    """Search DuckDuckGo or Bing through the package ddgs, which is an extra.

    Raises:
        ValueError: it is not installed, or the engine does not answer.
    """
    try:
        from ddgs import DDGS  # noqa: PLC0415 (an extra)
        from ddgs.exceptions import DDGSException  # noqa: PLC0415
    except ImportError:
        raise ValueError(f"--engine {backend} needs the package ddgs; pip install ddgs") from None
    results, page = {}, 1
    while len(results) < query.limit:
        pace()
        try:
            found = DDGS().images(query.text, backend=backend, page=page, max_results=None)
        except DDGSException as error:
            if results or "No results" in str(error):
                break
            raise ValueError(f"{backend} does not answer ({error}); run the command again later") from None
        fields = [[whole_text(item[name]) for name in ("image", "url", "title")] for item in found]
        new = {url: Result(url, page_url, title) for url, page_url, title in fields}
        if not new.keys() - results.keys():
            break
        results |= new
        page += 1
    return list(results.values())[: query.limit]


def read_list(path: Path) -> dict[tuple[str, str], list[Result]]:
    """Read a manifest, or lines "label url"; return the results by label and query, in order.

    Raises:
        ValueError: a line is neither, or its label cannot be a folder's name.
    """
    results = defaultdict(list)
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                if line.startswith("{"):
                    record = json.loads(line)
                    if record["status"] != "kept":
                        continue
                    label, text = record["label"], record["query"]
                    result = Result(**{name: record[name] for name in Result._fields})
                else:
                    label, url = line.split()
                    text, result = path.name, Result(url)
                results[check_label(label), text].append(result)
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number} is neither 'label url' nor a manifest's record ({error})"
                ) from None
    if not results:
        raise ValueError(f"{path} lists no picture, expected a manifest.jsonl or lines 'label url'")
    return results


@contextlib.contextmanager
def open_engine(
    args: argparse.Namespace, listed: dict, downloader: Downloader
) -> Iterator[Callable[[Query], list[Result]]]:
    """Make the function that searches with args.engine; it waits for its turn by itself."""
    pace = Pace(args.delay)
    if args.engine == "google":
        with open_browser(args.profile, args.headful) as driver:
            google = Google(driver, args.filter, args.headful)
            yield lambda query: pace() or google.search(query)
    elif args.engine == "urls":
        yield lambda query: listed[query.label, query.text][: query.limit]
    elif args.engine in ("duckduckgo", "bing"):
        yield functools.partial(search_ddgs, backend=args.engine, pace=pace)
    else:
        yield functools.partial(search_api, name=args.engine, downloader=downloader, pace=pace)


# --- report ---


def draw_contact_sheet(dataset: DataSet, label: str) -> Path:
    """Draw the kept pictures of a label, with their faces and names, into <folder>_sheets/<label>.png."""
    path = dataset.folder.with_name(dataset.folder.name + "_sheets") / f"{label}.png"
    cell, columns = 128, 10  # pixels, pictures
    records = [record for record in dataset.kept(label) if (dataset.folder / record["file"]).exists()]
    if not records:
        path.unlink(missing_ok=True)
        return path
    rows = -(-len(records) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * (cell + 14)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, record in enumerate(records):
        x, y = i % columns * cell, i // columns * (cell + 14)
        photo = shared.load_photo(dataset.folder / record["file"])
        scale = min((cell - 4) / max(photo.size), 1)
        photo = photo.resize([max(round(length * scale), 1) for length in photo.size], reducing_gap=2)
        if record["face_box"]:
            ImageDraw.Draw(photo).rectangle([edge * scale for edge in record["face_box"]], outline="lime")
        sheet.paste(photo, (x, y))
        draw.text((x, y + cell - 2), Path(record["file"]).stem, "black", font_size=11)
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)
    return path


def summarise(dataset: DataSet, labels: Sequence[str]) -> str:
    """Lay out, for each label and in total: results asked for, found, kept, and rejected by reason."""
    counts = {label: Counter() for label in labels}
    for search in dataset.searches.values():
        if search["label"] in counts:
            counts[search["label"]] += Counter(asked=search["asked"], found=len(search["results"]))
    for record in dataset.outcomes.values():
        if record["label"] in counts:
            counts[record["label"]][record.get("reason", "kept")] += 1
    total = sum(counts.values(), Counter())
    columns = ["asked", "found", "kept", *(reason for reason in REASONS if total[reason])]
    width = max(map(len, ["label", *labels]))
    lines = [f"{'label':{width}}" + "".join(f"  {name:>5}" for name in columns)]
    for label, row in [*counts.items(), ("total", total)]:
        lines.append(f"{label:{width}}" + "".join(f"  {row[name]:{max(len(name), 5)}}" for name in columns))
    return "\n".join(lines)


def report(dataset: DataSet, labels: Sequence[str]) -> None:
    """Draw the contact sheets and print the table, and what was found under two labels."""
    sheets = [draw_contact_sheet(dataset, label) for label in labels]
    for record in dataset.outcomes.values():
        if record.get("reason") == "two labels" and record["label"] in labels:
            print(f"two labels: {record['url']} was found for {record['query']!r} and is {record['detail']}")
    print(summarise(dataset, labels))
    print(f"pictures in {dataset.folder}, contact sheets to look at in {sheets[0].parent}")


# --- command line ---


def check_label(label: object) -> str:
    """Return a label that can name a folder, else raise ValueError."""
    if not isinstance(label, str) or not re.fullmatch(r"\w[\w'-]*", label):
        raise ValueError(f"label {label!r}, expected letters, digits, - and _")
    return label


def read_emotions(path: Path) -> dict[str, list[str]]:
    """Read which queries stand for which emotion: {label: [main word, synonyms...]}.

    Raises:
        ValueError: the file is something else.
    """
    try:
        queries = json.loads(path.read_text(encoding="utf-8"))
        for texts in queries.values():
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{texts!r} is no list of queries")
        return {check_label(label): texts for label, texts in queries.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} is no JSON object of lists of words, like {RESOURCES / 'emotion_queries.json'} ({error})"
        ) from None


def read_imagenet_labels() -> dict[str, list[str]]:
    """Read the 1000 classes' names, each its own query; a label has _ for blanks."""
    names = json.loads((RESOURCES / "imagenet_labels.json").read_text(encoding="utf-8"))
    return {name.replace(" ", "_"): [name] for name in names}


def list_queries(args: argparse.Namespace, listed: dict) -> list[Query]:
    """List what to search for, the main word of a label before its synonyms.

    Raises:
        ValueError: --labels names one that there is not.
    """
    if args.engine == "urls":
        limits = {key: args.limit or len(results) for key, results in listed.items()}
        queries = [Query(*key, limit) for key, limit in limits.items()]
    else:
        texts = read_emotions(args.emotions_file) if args.set == "emotions" else read_imagenet_labels()
        queries = [
            Query(label, text, args.synonym_limit if i else args.limit or args.default_limit)
            for label, words in texts.items()
            for i, text in enumerate(words)
        ]
    known = {query.label for query in queries}
    unknown = [label for label in args.labels or [] if label not in known]
    if unknown:
        raise ValueError(f"no label {unknown[0]!r}, expected some of: {', '.join(sorted(known))[:200]}")
    return [query for query in queries if query.limit and query.label in (args.labels or known)]


def parse_filter(text: str) -> tuple[str, str]:
    """Split a filter NAME=VALUE."""
    name, _, value = text.partition("=")
    if name not in FILTERS or not value:
        raise argparse.ArgumentTypeError(f"{text} is no NAME=VALUE of {', '.join(FILTERS)}")
    return name, value


def add_common_options(parser: argparse.ArgumentParser, *, out_dir: str, limit: int, kind: str) -> None:
    """Add what both data sets understand, with a set's own defaults."""
    add = parser.add_argument
    natural, positive = shared.number(int, 0), shared.number(int, 1)
    parser.set_defaults(default_limit=limit, kind=kind)
    add("--out-dir", type=Path, default=Path(out_dir), help="where the folders go (default: %(default)s)")
    add("--engine", choices=ENGINES, default="google", help="what searches (default: %(default)s)")
    add("--list", type=Path, metavar="FILE", help="for --engine urls: a manifest.jsonl, or lines 'label url'")
    add("--labels", nargs="+", metavar="LABEL", help="download only these (default: all there are)")
    limit_help = f"results to look at for each query (default: {limit}, and all of a list)"
    add("--limit", type=positive, metavar="N", help=limit_help)
    filter_help = f"Google's filters: {', '.join(FILTERS)}; values as in google_images_download"
    filter_help += f" (default: type={kind})"
    add("--filter", type=parse_filter, nargs="+", default=[], metavar="NAME=VALUE", help=filter_help)
    delay_help = "seconds between two requests to a search engine (default: %(default)s)"
    add("--delay", type=shared.number(float, 0), default=5.0, metavar="S", help=delay_help)
    workers_help = f"downloads at a time, {PER_HOST} from one host (default: %(default)s)"
    add("--workers", type=positive, default=8, metavar="N", help=workers_help)
    timeout_help = "seconds that a download may take (default: %(default)s)"
    add("--timeout", type=shared.number(float, 0.1), default=30.0, metavar="S", help=timeout_help)
    retries_help = "further tries when a server does not answer (default: %(default)s)"
    add("--retries", type=natural, default=2, metavar="N", help=retries_help)
    add("--allow-private", action="store_true", help="download from private and local addresses too")
    contact_help = "mail address or page of yours that servers are told, as Wikimedia asks for"
    add("--contact", default="", metavar="TEXT", help=contact_help)
    add("--headful", action="store_true", help="show the browser, so that a captcha can be solved in it")
    add("--profile", type=Path, metavar="DIR", help="keep the browser's cookies there (default: nowhere)")
    remove_help = "download nothing; take a picture and its copies out of --out-dir for good"
    add("--remove", metavar="SHA_OR_URL", help=remove_help)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sets = parser.add_subparsers(dest="set", required=True, metavar="{emotions,imagenet}")
    imagenet = sets.add_parser("imagenet", help="a few photos for each of the 1000 ImageNet classes")
    add_common_options(imagenet, out_dir="data/imagenet", limit=5, kind="photo")
    emotions = sets.add_parser("emotions", help="photos of emotions with one face each")
    add_common_options(emotions, out_dir="data/google", limit=100, kind="face")
    add = emotions.add_argument
    file_help = "JSON object, label: [main query, synonyms...] (default: the five emotions)"
    default_file = RESOURCES / "emotion_queries.json"
    add("--emotions-file", type=Path, default=default_file, metavar="FILE", help=file_help)
    synonym_help = "results to look at for each synonym, 0 for none (default: %(default)s)"
    add("--synonym-limit", type=shared.number(int, 0), default=30, metavar="N", help=synonym_help)
    size_help = "longer side of the smallest face that counts, pixels (default: %(default)s)"
    add("--min-face-size", type=shared.number(int, 20), default=64, metavar="PX", help=size_help)
    prob_help = "how sure the detector must be of a face, 0-1 (default: %(default)s)"
    add("--min-face-prob", type=shared.number(float, 0, 1), default=0.95, metavar="X", help=prob_help)
    shared.add_device_option(emotions)
    args = parser.parse_args(argv)
    args.filter = {"type": args.kind, **dict(args.filter)}
    if args.engine == "urls" and not args.list:
        parser.error("--engine urls needs --list FILE")
    return args


def build_face_finder(args: argparse.Namespace) -> FindFace:
    """Make the function that finds the box of a photo's single face."""
    device = shared.pick_device(args.device)
    finder = shared.FaceFinder(device, min_face_size=args.min_face_size, min_prob=args.min_face_prob)
    return lambda photo: single_face(finder.find(photo), args.min_face_size)


def remove(dataset: DataSet, sha_or_url: str) -> None:
    """Take a picture out, draw its contact sheets anew, and say what is left to do."""
    files = dataset.remove(sha_or_url)
    for path in files:
        print(f"removed {path}; if finetune_emotion.py has cut its face, delete that too: {path.name}.png")
    print(f"{len(files)} files removed; they are barred from {dataset.folder} from now on")
    for label in {path.parent.name for path in files}:
        draw_contact_sheet(dataset, label)


@shared.one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Search, download, judge and report, going on where an earlier run stopped."""
    args = parse_args(argv)
    dataset = DataSet(args.out_dir, SHORTER_SIDE if args.set == "imagenet" else None)
    if args.remove:
        remove(dataset, args.remove)
        return
    listed = read_list(args.list) if args.engine == "urls" else {}
    queries = list_queries(args, listed)
    find_face = build_face_finder(args) if args.set == "emotions" else None
    downloader = Downloader(args.timeout, args.retries, args.allow_private, args.contact)
    with contextlib.ExitStack() as stack:
        stack.callback(report, dataset, list(dict.fromkeys(query.label for query in queries)))
        pool = stack.enter_context(ThreadPoolExecutor(args.workers))
        stack.callback(downloader.close)
        fetch = functools.partial(pool.submit, dataset.fetch, downloader)
        engine = None
        for query in tqdm(queries, "searching", unit="query", disable=None):
            search = dataset.find_search(args.engine, query)
            if not search or args.engine == "urls":  # a list may have changed, and is read in no time
                engine = engine or stack.enter_context(open_engine(args, listed, downloader))
                search = dataset.note_search(args.engine, query, engine(query))
            collect(search, dataset, fetch, find_face)


if __name__ == "__main__":
    main()
