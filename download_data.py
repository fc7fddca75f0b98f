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

The parts, each built on those before: downloading (safely, from strangers), pictures (decoding, copies, the
single face), data set (pictures and their journal), collecting (until there are enough), Google (a browser
that searches), other engines (public APIs, ddgs, lists), report (contact sheets, a table), command line.

Usage:
    python download_data.py emotions --limit 100
    python download_data.py imagenet --limit 1
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import html
import importlib.util
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
import unicodedata
from array import array
from collections import Counter, defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from http.client import HTTPException
from http.cookiejar import CookieJar
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode, urljoin, urlsplit
from urllib.request import Request, getproxies, proxy_bypass

import certifi
import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm
from urllib3 import HTTPResponse, Retry
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import DecodeError, HTTPError, InvalidHeader, LocationParseError, ProtocolError
from urllib3.util import Url, make_headers, parse_url

import model as shared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from selenium.webdriver import Chrome

    # (url, fields) -> what a public API answers; None: it has no more
    Ask = Callable[[str, dict], dict | None]
    SearchFor = Callable[["Query"], Iterator["Result"]]
    Fetch = Callable[["Result"], Future]  # starts a download; the result is its path, or it raises Refusal
    FindFace = Callable[[Image.Image], list[float]]  # raises Refusal unless there is exactly one face

OPENVERSE = "https://api.openverse.org/v1/images/"
COMMONS = "https://commons.wikimedia.org/w/api.php"
COMMONS_SEARCH = "action=query&format=json&formatversion=2&generator=search&gsrnamespace=6"
COMMONS_SEARCH += "&prop=imageinfo&iiprop=url|extmetadata&iiextmetadatafilter=LicenseShortName"
ENGINES = ("google", "openverse", "commons", "duckduckgo", "bing", "urls")

MIN_SIDE = 64  # pixels, chosen here: less is an icon or a counting pixel
FLAT_LEVELS = 4  # of 255, chosen here: what JPEG makes of one colour; the darkest photo varies more
MAX_PIXELS = 50_000_000  # chosen here: 150 MB decoded; cameras take up to that
# Of 500 scraped photos, copies of 220 pixels at JPEG quality 60 differ in 0 or 2 of the 64 bits; of their
# 124,750 pairs 32 do not differ at all, being the same picture, one by 4 bits, and the others by 6 and more.
NEAR_BITS = 4

# Which addresses are special: https://www.iana.org/assignments/iana-ipv4-special-registry and -ipv6-.
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # the last 32 bits are an IPv4 address
# What ipaddress of Python 3.11 does not know: protocol assignments, 6to4 relays, documentation.
NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20")))

PER_HOST = 2  # downloads at a time from one host; chosen here, browsers take six
PORTS = {"http": 80, "https": 443}
MAX_REDIRECTS = 5
MAX_BYTES = 20_000_000  # of a download once it is decoded, chosen here
BACKOFF_S = 1.0  # before the first retry; doubles from one to the next
MAX_REST_S = 120.0  # how long to wait for a host that asks for it, chosen here; for longer it is left alone
API_PAGE = 20  # results a request; Openverse allows no more without a key

UNREACHABLE, BUSY, REMOVED, NOT_TRIED = "unreachable", "busy", "removed", "not tried"
PASSING = (UNREACHABLE, BUSY, "not allowed")  # a later run, or one with other options, may fare better
# Why a picture is not kept, in the order of the table.
REASONS = (*PASSING, "http error", "too big", "no image", "too small", "one colour", "changed", "no face")
REASONS += ("several faces", "copy", "two labels")
FOUND = ("url", "page", "title", "license", "is_thumbnail")  # what the journal keeps of each Result


class Query(NamedTuple):
    """Something to search for."""

    label: str  # also the folder's name
    text: str
    limit: int  # results to look at


class Result(NamedTuple):
    """A picture that an engine found; unknown fields are empty."""

    url: str  # empty too where an engine shows a picture without its address
    page: str = ""
    title: str = ""
    license: str = ""
    is_thumbnail: bool = False
    sha256: str = ""  # known beforehand, like `face_box`, only where a manifest is the source
    face_box: Sequence[float] = ()


class Refusal(Exception):  # noqa: N818 (it is an outcome, not an error)
    """A picture is not kept; `reason` is one of REASONS or REMOVED, `copy_of` the SHA-256 of the original."""

    def __init__(self, reason: str, detail: str, copy_of: str = ""):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.copy_of = reason, detail, copy_of


# --- downloading ---


def is_public(address: str) -> bool:
    """Return whether an IP address is on the open internet, an IPv6 one also by the IPv4 one in it."""
    ip = ipaddress.ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None) or ip
    if ip in NAT64:
        ip = ipaddress.IPv4Address(ip.packed[-4:])
    if any(ip in network for network in NOT_PUBLIC):
        return False
    # Of IPv6 only 2000::/3 is given out; the rest is reserved, which is_global does not look at.
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or getattr(ip, "is_site_local", False))


def parse_http_url(url: str) -> Url:
    """Split and normalise a URL, international names included; raises Refusal unless it is http or https."""
    try:
        parts = parse_url(url)
    except LocationParseError:
        raise Refusal("not allowed", "not a URL") from None
    if parts.scheme not in PORTS or not parts.host:
        raise Refusal("not allowed", f"the scheme is {parts.scheme}, expected http or https")
    return parts


def resolve(host: str, port: int, allow_private: bool) -> list[str]:
    """Return the addresses of a host; raises Refusal if one of them is private, OSError if there is none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(info[4][0] for info in found))
    if not allow_private and not all(map(is_public, addresses)):
        raise Refusal("not allowed", f"{host} is at a private address; --allow-private permits that")
    return addresses


def connect(addresses: Sequence[str], port: int, timeout_s: float) -> socket.socket:
    """Connect to the first address that answers, each in an equal share of the time; raises OSError."""
    *others, last = addresses
    for address in others:
        with contextlib.suppress(OSError):
            return socket.create_connection((address, port), timeout_s / len(addresses))
    return socket.create_connection((last, port), timeout_s / len(addresses))


def shut_down(connection: socket.socket) -> None:
    """End a connection for whoever reads from it in another thread."""
    with contextlib.suppress(OSError):  # it has ended already
        connection.shutdown(socket.SHUT_RDWR)


def read_answer(response: HTTPResponse) -> tuple[bytes, str]:
    """Read a body of limited size, or a redirect's target; raises Refusal, and what urllib3 raises."""
    if location := response.get_redirect_location():
        with contextlib.suppress(UnicodeDecodeError):  # many send UTF-8, though headers are Latin-1
            location = location.encode("latin-1").decode()
        return b"", location
    if response.status != 200:
        is_passing = response.status in (407, 408, 429) or response.status >= 500
        raise Refusal(UNREACHABLE if is_passing else "http error", f"HTTP {response.status}")
    announced_bytes = response.length_remaining or 0
    if announced_bytes > MAX_BYTES or len(body := response.read(MAX_BYTES + 1)) > MAX_BYTES:
        raise Refusal("too big", f"more than {MAX_BYTES / 1e6:g} MB")
    return body, ""


class Downloader:
    """Fetches over http and https what strangers serve, from several threads at once.

    urllib3 makes the requests, also through a proxy, and decodes the answers. The sockets and redirects are
    our own: each address is checked, that very address is connected to, so that a name server cannot change
    its mind in between, and one deadline holds for the whole of a request.

    Args:
        timeout_s: seconds for one request.
        retries: how often to try again what may be a passing failure.
        contact: who is asking, for the user agent.

    Raises:
        ValueError: the environment names a proxy that cannot be used.
    """

    def __init__(self, timeout_s: float, retries: int, allow_private: bool, contact: str | None):
        self.timeout_s, self.retries, self.allow_private = timeout_s, retries, allow_private
        agent = f"emotion-detector/1.0 ({contact or 'data for research'})"
        self.headers = make_headers(user_agent=agent, accept_encoding=True)  # what urllib3 can decode here
        self.headers |= {"Accept": "image/*, application/json", "Connection": "close"}
        self._proxies = {}  # by scheme
        for scheme, address in getproxies().items():
            if scheme in PORTS:
                url = address if "://" in address else f"http://{address}"
                with contextlib.suppress(Refusal):
                    self._proxies[scheme] = parse_http_url(url)
                if scheme not in self._proxies or self._proxies[scheme].scheme != "http":
                    raise ValueError(f"{scheme}_proxy is {address}, expected http://HOST:PORT")
        self._tls = ssl.create_default_context()
        self._tls.load_verify_locations(certifi.where())  # not every system brings its own
        self._slots = {}  # by host
        self._rests = {}  # by host: when it may be asked again
        self._connections = set()
        self._is_closed = threading.Event()

    def close(self) -> None:
        """Break off what is under way, so that nobody waits for it."""
        self._is_closed.set()
        for connection in list(self._connections):
            shut_down(connection)

    def get(self, url: str, *, page: str = "", token: str = "") -> bytes:
        """Fetch a body, through redirects and retries; raises Refusal.

        Args:
            page: where `url` is shown, for sites that refuse it to those who do not come from there.
            token: a key for `url`, not for what it redirects to.
        """
        for attempt in range(self.retries):
            try:
                return self._follow(url, page, token)
            except Refusal as refusal:
                if refusal.reason != UNREACHABLE or self._is_closed.wait(BACKOFF_S * 2**attempt):
                    raise
        return self._follow(url, page, token)

    def _follow(self, url: str, page: str, token: str) -> bytes:
        """Fetch a body through redirects, each of which is checked like the first URL and may set cookies."""
        cookies, headers = CookieJar(), {"Authorization": f"Bearer {token}"} if token else {}
        for _ in range(1 + MAX_REDIRECTS):
            parts = parse_http_url(url)
            try:
                body, location = self._exchange(parts, headers, cookies)
            except Refusal as refusal:
                if refusal.detail != "HTTP 403" or "Referer" in headers:
                    raise
                headers["Referer"] = f"{parts.scheme}://{parts.netloc}/"
                with contextlib.suppress(Refusal):
                    headers["Referer"] = parse_http_url(page)._replace(auth=None, fragment=None).url
                continue
            if not location:
                return body
            headers.pop("Authorization", None)
            try:
                url = urljoin(url, location)
            except ValueError:
                raise Refusal("not allowed", "redirected to what is not a URL") from None
        raise Refusal("http error", f"more than {MAX_REDIRECTS} redirects")

    def _exchange(self, url: Url, headers: dict[str, str], cookies: CookieJar) -> tuple[bytes, str]:
        """Make one request; return the body, or where it is redirected to."""
        request = Request(url.url, headers={**self.headers, **headers, "Host": url.netloc})
        cookies.add_cookie_header(request)
        with self._slots.setdefault(url.host, threading.Semaphore(PER_HOST)):
            wait_s = max(self._rests.get(url.host, 0) - time.monotonic(), 0)
            if wait_s > MAX_REST_S or self._is_closed.wait(wait_s):
                raise Refusal(BUSY, f"{url.host} asks for {wait_s:.0f} s of rest")
            try:
                with self._asked(url, dict(request.header_items())) as response:
                    cookies.extract_cookies(response, request)
                    with contextlib.suppress(InvalidHeader, ValueError, OverflowError):  # no date, or no such
                        if rest_s := Retry().get_retry_after(response):
                            self._rests[url.host] = time.monotonic() + rest_s
                    return read_answer(response)
            except ssl.SSLCertVerificationError as error:
                raise Refusal("not allowed", f"TLS certificate: {error.verify_message}") from None
            except DecodeError:
                raise Refusal("no image", "not encoded as it says") from None
            except ProtocolError:
                raise Refusal(UNREACHABLE, "the connection broke off") from None
            except (OSError, HTTPException, HTTPError, UnicodeError) as error:
                detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise Refusal(UNREACHABLE, detail) from None

    @contextlib.contextmanager
    def _asked(self, url: Url, headers: dict[str, str]) -> Iterator[HTTPResponse]:
        """Connect to a URL's host, or its proxy, and ask for it; yield the answer, its body not read yet."""
        end = time.monotonic() + self.timeout_s
        host, port, target = url.host.strip("[]"), url.port or PORTS[url.scheme], url.request_uri
        proxy = None if proxy_bypass(url.netloc) else self._proxies.get(url.scheme)
        if not (proxy and self.allow_private):  # else only the proxy need know the host
            addresses = resolve(host, port, self.allow_private)
        if url.scheme == "https":
            client = HTTPSConnection(host, port, timeout=self.timeout_s, ssl_context=self._tls)
        else:
            client = HTTPConnection(host, port, timeout=self.timeout_s)
        if proxy:
            login = make_headers(proxy_basic_auth=unquote(proxy.auth)) if proxy.auth else {}
            if url.scheme == "https":
                client.set_tunnel(host, port, headers=login)
            else:
                headers, target = headers | login, url.url
            port = proxy.port or PORTS["http"]
            addresses = resolve(proxy.host.strip("[]"), port, allow_private=True)
        with connect(addresses, port, self.timeout_s) as connection, contextlib.closing(client):
            client._new_conn = lambda: connection  # as urllib3's own contrib.socks brings its socket in
            with self._watched(connection.dup(), end):  # TLS takes the socket away, but not its double
                client.request("GET", target, headers=headers, preload_content=False)
                yield client.getresponse()

    @contextlib.contextmanager
    def _watched(self, connection: socket.socket, end: float) -> Iterator[None]:
        """Shut a connection down at `end`, however steadily it drips; then raise TimeoutError."""
        timer = threading.Timer(max(end - time.monotonic(), 0), shut_down, [connection])
        self._connections.add(connection)
        timer.start()
        try:
            if self._is_closed.is_set():  # close() came too early to see this connection
                shut_down(connection)
            yield
        finally:
            timer.cancel()
            self._connections.discard(connection)
            connection.close()
            if time.monotonic() >= end or self._is_closed.is_set():
                raise TimeoutError(f"not done after {self.timeout_s:g} s")


# --- pictures ---

EXTENSIONS = {"JPEG": ".jpg", "MPO": ".jpg", "JPEG2000": ".jp2"}  # others are named like their format


def read_photo(path: Path) -> tuple[Image.Image, str]:
    """Decode a file of unknown origin; return the upright RGB photo and its real format's extension.

    Raises Refusal if it is no picture of a known format, damaged, too small, too big, or of one colour.
    """
    try:
        photo = shared.open_picture(path, max_pixels=MAX_PIXELS)
    except shared.PictureError as error:
        if error.reason == "too large":
            raise Refusal("too big", f"more than {MAX_PIXELS / 1e6:g} million pixels") from None
        is_page = path.read_bytes()[:500].lstrip().startswith(b"<")
        unknown = "a web page" if is_page else "an unknown format"
        raise Refusal("no image", "damaged" if error.reason == "damaged" else unknown) from None
    if min(photo.size) < MIN_SIDE:
        raise Refusal("too small", f"{photo.width}x{photo.height} pixels")
    if all(high - low <= FLAT_LEVELS for low, high in photo.getextrema()):
        raise Refusal("one colour", "a flat area")
    return photo, EXTENSIONS.get(photo.format, f".{photo.format.lower()}")


def find_single_face(finder: shared.FaceFinder, min_size: int, photo: Image.Image) -> list[float]:
    """Return the box, xyxy in pixels, of the only face whose longer side has `min_size`; raises Refusal."""
    boxes = finder.find(photo).boxes
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2]).max(1, initial=0) >= min_size]
    if len(boxes) != 1:
        raise Refusal("several faces" if len(boxes) else "no face", f"{len(boxes)} faces")
    return [round(float(edge), 1) for edge in boxes[0]]


class CopyFinder:
    """Finds pictures that are the same, to the byte or to the eye."""

    def __init__(self):
        self._records, self._numbers = [], {}  # by SHA-256: which record it is
        self._phashes = array("Q")  # of the records, 64 bits each

    def add(self, record: dict) -> None:
        """Remember a picture; raises ValueError unless `sha256` and `phash` are hashes."""
        if not re.fullmatch("[0-9a-f]{64} [0-9a-f]{16}", f"{record['sha256']} {record['phash']}"):
            raise ValueError("no hashes")
        self._numbers.setdefault(record["sha256"], len(self._records))
        self._phashes.append(int(record["phash"], 16))
        self._records.append(record)

    def find(self, sha256: str, phash: str = "") -> dict | None:
        """Return the first record of the same picture, or None."""
        numbers = [self._numbers[sha256]] if sha256 in self._numbers else []
        if phash:
            num_differing = np.bitwise_count(np.asarray(self._phashes) ^ np.uint64(int(phash, 16)))
            numbers += np.flatnonzero(num_differing <= NEAR_BITS).tolist()
        return self._records[min(numbers)] if numbers else None


# --- data set ---

MAX_LABEL_BYTES = 200  # file systems allow 255, and a contact sheet's name is longer than its label
DEVICE = re.compile("con|prn|aux|nul|(com|lpt)[0-9]", re.IGNORECASE)  # what names no folder on Windows


def timestamp() -> str:
    """Return the time in UTC, by ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def url_digest(url: str) -> str:
    """Return a name for a URL that does not give it away."""
    return hashlib.sha256(url.encode()).hexdigest()


def refuse_links(*paths: Path) -> None:
    """Raise ValueError if one of some files and folders is a link, which may lead anywhere."""
    for path in paths:
        if path.is_symlink():
            raise ValueError(f"{path} is a link, expected what this script wrote; delete the link")


def check_label(label: object) -> str:
    """Return a label, in Unicode's composed form, that can name a folder anywhere, else raise ValueError."""
    name = unicodedata.normalize("NFC", str(label))
    letters = "".join(letter for letter in name if unicodedata.category(letter)[0] != "M")  # accents are fine
    is_name = isinstance(label, str) and letters[:1] == name[:1] and re.fullmatch(r"\w[\w'-]*", letters)
    if not is_name or len(name.encode()) > MAX_LABEL_BYTES or DEVICE.fullmatch(name):
        raise ValueError(
            f"label {name[:50]!r}, expected letters, digits, - and _, {MAX_LABEL_BYTES} bytes at most, "
            "and no name of a device"
        )
    return name


def check_texts(*values: object) -> None:
    """Raise ValueError if one of some values is no text."""
    if not all(isinstance(value, str) for value in values):
        raise ValueError("what should be a text is none")


def read_result(fields: dict) -> Result:
    """Return the Result that a line of JSON describes; raises ValueError or TypeError if it does not."""
    result = Result(**fields)
    check_texts(result.url, result.page, result.title, result.license, result.sha256)
    left, top, right, bottom = result.face_box or (0, 0, 0, 0)
    if not (-1e6 < left <= right < 1e6 and -1e6 < top <= bottom < 1e6 and result.url.encode()):
        raise ValueError("no box, or no URL")
    return result


class DataSet:
    """The pictures <folder>/<label>/<start of sha256>.<ext>, and their journal, manifest.jsonl.

    Each line of the journal is a JSON object with a `status`:
        searched: a query was made; with its results.
        kept, rejected, failed: what became of one result. What failed is tried again by the next run.
        removed: what somebody asked to take out, hashes only; it never comes back.
    Of several lines about one thing the last counts. A line is on the disk before the next thing is done.
    Downloads land in <folder>/.incoming first, named after their URL.

    Args:
        shorter_side: shrink the pictures to that many pixels, and store them as JPEG.

    Raises:
        ValueError: the journal is damaged, other than by a last line that breaks off, or not this script's.
    """

    def __init__(self, folder: Path, shorter_side: int | None):
        self.folder, self.shorter_side = folder, shorter_side
        self.journal, self.incoming = folder / "manifest.jsonl", folder / ".incoming"
        named = folder if folder.name not in ("", "..") else folder.resolve()
        self.sheets = named.with_name(f"{named.name}_sheets")
        refuse_links(self.journal, self.incoming)
        for path in self.incoming.glob("*"):
            if path.is_symlink() or shared.TEMPORARY.fullmatch(path.name):  # of a run that was killed
                path.unlink()
        self._load_journal()

    def _load_journal(self) -> None:
        """Read the journal, and finish what a killed run had begun."""
        self.searches = {}  # (engine, label, query): its record
        self.outcomes = {}  # (engine, label, query, url): its record
        self.by_url = {}  # url: the first record that settled it
        self.kept = defaultdict(list)  # label: records
        self.copies = CopyFinder()  # of what is kept or removed
        self.removed, self.barred_urls = [], set()
        data = self.journal.read_bytes() if self.journal.exists() else b""
        *lines, last = data.split(b"\n")
        with contextlib.suppress(ValueError, RecursionError):  # as for a line that breaks off
            json.loads(last)
            lines.append(last)  # an editor left its end out
        for number, line in enumerate(lines, 1):
            try:
                self._take_in(json.loads(line))
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                message = f"{self.journal}, line {number} is no record of this script; delete that line"
                raise ValueError(message) from None
        if last:
            with shared.replacing(self.journal, sync=True) as temporary:
                temporary.write_bytes(b"".join(line + b"\n" for line in lines))
        waiting = {path.name for path in self.incoming.glob("*")}
        for url, record in self.by_url.items() if waiting else ():
            if url_digest(url) in waiting:
                self._place(record)

    def _take_in(self, record: dict) -> None:
        """Remember a record of the journal; raises some error if it is not one that this script writes."""
        status = record["status"]
        if status == "removed":
            self.removed.append(record)
            self.barred_urls.update(record["url_sha256"])
            for mark in record["pictures"]:
                self.copies.add({"sha256": mark["sha256"], "phash": mark["phash"]})
            return
        key = record["engine"], check_label(record["label"]), record["query"]
        check_texts(*key, record.get("copy_of", ""), record.get("detail", ""))
        if status == "searched":
            if not isinstance(record["asked"], int):
                raise ValueError("not a number")
            for fields in record["results"]:
                read_result(fields)
            self.searches[key] = record
            return
        url = read_result({name: record[name] for name in Result._fields if name in record}).url
        if status == "kept":
            self.copies.add(record)
            name, _, suffix = record["file"].rpartition(".")
            if name != f"{key[1]}/{record['sha256'][:16]}" or not suffix.isalnum():
                raise ValueError("not where a picture of this label belongs")
            self.kept[key[1]].append(record)
        elif status not in ("rejected", "failed") or record["reason"] not in REASONS:
            raise ValueError("no outcome")
        self.outcomes[*key, url] = record
        if status != "failed":
            self.by_url.setdefault(url, record)

    def _append_to_journal(self, record: dict) -> dict:
        """Write a record down, with the time, and remember it; return it."""
        record = {**record, "time": timestamp()}
        try:
            with self.journal.open("ab") as file:
                file.write(json.dumps(record).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"cannot write {self.journal}: {error.strerror}") from None
        self._take_in(record)
        return record

    def _place(self, record: dict) -> None:
        """Move a download to where its record says, or away if it was rejected."""
        source = self.incoming / url_digest(record["url"])
        if record["status"] == "kept" and self.shorter_side:
            photo = shared.open_picture(source)
            scale = min(self.shorter_side / min(photo.size), 1)
            size = [round(length * scale) for length in photo.size]
            small = photo.resize(size, Image.Resampling.LANCZOS, reducing_gap=3)
            file = io.BytesIO()  # on a disk that gets full, Pillow leaves half a file and says nothing
            small.save(file, "JPEG", quality=90, icc_profile=photo.info.get("icc_profile"))
            with shared.replacing(self.path(record), sync=True) as temporary:
                temporary.write_bytes(file.getvalue())
        elif record["status"] == "kept":
            self.path(record).parent.mkdir(exist_ok=True)
            source.replace(self.path(record))
        source.unlink(missing_ok=True)

    def path(self, record: dict) -> Path:
        """Return where a kept picture is; raises ValueError if a link could lead elsewhere."""
        path = self.folder / record["file"]
        refuse_links(path.parent, path)
        return path

    def there(self, label: str) -> list[dict]:
        """Return the records of a label's pictures that are kept and that nobody has deleted by hand."""
        return [record for record in self.kept[label] if self.path(record).exists()]

    def note_search(self, search: dict, results: Iterable[Result], asked: int, is_exhausted: bool) -> dict:
        """Write down what a search has brought beside what it brought before; return its new record."""
        found = [{name: value for name, value in result._asdict().items() if value} for result in results]
        progress = {"asked": asked, "exhausted": is_exhausted, "results": search["results"] + found}
        noted = {"status": "searched", **search, **progress}
        return search if noted == search else self._append_to_journal(noted)

    def pending(self, search: dict) -> list[Result]:
        """Return the results of a search that are not settled yet."""
        key = search["engine"], search["label"], search["query"]
        unsettled = {"status": "failed"}
        return [
            Result(**fields)
            for fields in search["results"]
            if self.outcomes.get((*key, fields["url"]), unsettled)["status"] == "failed"
        ]

    def fetch(self, downloader: Downloader, result: Result) -> Path:
        """Download into .incoming, unless it is there, and return the path; raises Refusal."""
        path = self.incoming / url_digest(result.url)
        if not path.exists():
            body = downloader.get(result.url, page=result.page)
            with shared.replacing(path, sync=True) as temporary:
                temporary.write_bytes(body)
        return path

    def refuse_copy(self, label: str, sha256: str, phash: str = "") -> None:
        """Raise the Refusal of a picture found for `label` if it is a copy of one that is kept or removed."""
        original = self.copies.find(sha256, phash)
        if original and "file" not in original:
            raise Refusal(REMOVED, "")
        if original and original["label"] == label:
            raise Refusal("copy", f"of {original['file']}", original["sha256"])
        if original:
            raise Refusal("two labels", f"the same as {original['file']}", original["sha256"])

    def settle(self, search: dict, result: Result, outcome: dict | Refusal) -> None:
        """Write down what became of a result: the fields of a kept picture, or why it is refused."""
        record = {"status": "kept"} | {name: search[name] for name in ("label", "query", "engine")}
        record |= {name: getattr(result, name) for name in FOUND}
        if isinstance(outcome, Refusal):
            if outcome.reason == REMOVED:
                self.forget({result.url}, [])
                return
            record["status"] = "failed" if outcome.reason in PASSING else "rejected"
            record |= {"reason": outcome.reason, "detail": outcome.detail}
            if outcome.copy_of:
                record["copy_of"] = outcome.copy_of
        else:
            record |= outcome
        self._place(self._append_to_journal(record))

    def remove(self, sha_or_url: str) -> list[Path]:
        """Take a picture, and all that were found to be copies of it, out for good; return the files deleted.

        Raises ValueError if nothing, or more than one picture, goes by that name.
        """
        is_sha = bool(re.fullmatch("[0-9a-f]{12,64}", sha_or_url))
        same = [r for r in self.outcomes.values() if is_sha and r.get("sha256", "").startswith(sha_or_url)]
        same += [r for r in self.outcomes.values() if r["url"] == sha_or_url]
        shas = {r.get("sha256") or r.get("copy_of") for r in same} - {None}
        found = {fields["url"] for search in self.searches.values() for fields in search["results"]}
        urls = {sha_or_url} & found
        if len(shas) > 1 or not shas | urls:
            raise ValueError(
                f"{self.journal} lists {len(shas)} pictures {sha_or_url}; expected the URL of one, "
                "or 12 or more digits of its SHA-256, such as the file's name"
            )
        copies = [r for r in self.outcomes.values() if (r.get("sha256") or r.get("copy_of")) in shas]
        kept = [record for record in copies if record["status"] == "kept"]
        files = [path for path in map(self.path, kept) if path.exists()]
        for path in files:
            path.unlink()
        self.forget(urls | {record["url"] for record in copies}, kept)
        return files

    def forget(self, urls: set[str], kept: Sequence[dict]) -> None:
        """Rewrite the journal without `urls`, and bar them and whatever looks like the `kept` pictures."""
        marks = [{"sha256": record["sha256"], "phash": record["phash"]} for record in kept]
        digests = sorted(map(url_digest, urls))
        tombstone = {"status": "removed", "url_sha256": digests, "pictures": marks, "time": timestamp()}
        for digest in digests:
            (self.incoming / digest).unlink(missing_ok=True)
        for search in self.searches.values():
            search["results"] = [fields for fields in search["results"] if fields["url"] not in urls]
        outcomes = [record for record in self.outcomes.values() if record["url"] not in urls]
        records = [*self.removed, tombstone, *self.searches.values(), *outcomes]
        with shared.replacing(self.journal, sync=True) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        self._load_journal()


def examine(path: Path, label: str, result: Result, dataset: DataSet, find_face: FindFace | None) -> dict:
    """Examine a downloaded file; return what the journal keeps of a picture, or raise Refusal.

    `find_face` is None where faces do not matter. A picture that a manifest vouches for is not searched.
    """
    import imagehash

    sha256 = shared.file_digest(path)
    photo, extension = read_photo(path)
    phash = str(imagehash.phash(photo))
    dataset.refuse_copy(label, sha256, phash)
    if result.sha256 and result.sha256 != sha256:
        raise Refusal("changed", f"SHA-256 is {sha256}, the manifest has {result.sha256}")
    return {
        "file": f"{label}/{sha256[:16]}{'.jpg' if dataset.shorter_side else extension}",
        "width": photo.width,
        "height": photo.height,
        "bytes": path.stat().st_size,
        "sha256": sha256,
        "phash": phash,
        "face_box": find_face(photo) if find_face and not result.sha256 else list(result.face_box),
    }


# --- collecting ---


def collect(
    search: dict, results: Sequence[Result], dataset: DataSet, fetch: Fetch, find_face: FindFace | None
) -> None:
    """Settle results of a search, in order, so that chance does not decide which copy is kept."""
    label = search["label"]
    futures = {result.url: fetch(result) for result in results if result.url not in dataset.by_url}
    try:
        for result in results:
            try:
                if known := dataset.by_url.get(result.url):  # settled before, under whatever label
                    dataset.refuse_copy(label, known.get("sha256") or known.get("copy_of", ""))
                    raise Refusal(known["reason"], known["detail"])
                outcome = examine(futures[result.url].result(), label, result, dataset, find_face)
            except Refusal as refusal:
                outcome = refusal
            dataset.settle(search, result, outcome)
    finally:
        for future in futures.values():
            future.cancel()


def new_results(found: Iterator[Result], known: set[str], barred: set[str], text: str) -> Iterator[Result]:
    """Pass on what is not `known` yet nor barred, make it known; at the end report what has no address."""
    total = num_lost = 0
    try:
        for result in found:
            total += 1
            num_lost += not result.url
            if result.url and result.url not in known and url_digest(result.url) not in barred:
                known.add(result.url)
                yield result
    finally:
        if num_lost:
            message = f"{text}: {num_lost} of {total} results have no address and are left out"
            print(shared.printable(message), file=sys.stderr)


def work_off(
    query: Query,
    engine: str,
    start_engine: Callable[[], SearchFor],
    dataset: DataSet,
    collect: Callable[[dict, list[Result]], None],
    *,
    target: int | None,
) -> None:
    """Settle what is pending of a query, then search, until its limit or its label's target is reached.

    What was found before a search breaks off is settled too; then its error is raised.

    Args:
        collect: the function above, given its last three arguments.
        target: pictures of the label to keep; None: settle all that is found.
    """
    key = {"engine": engine, "label": query.label, "query": query.text}
    search = dataset.searches.get(tuple(key.values()), {**key, "asked": 0, "results": []})
    known = {fields["url"] for fields in search["results"]}
    is_list = engine == "urls"  # it may have changed, and is read in no time

    def missing() -> int:
        return max(target - len(dataset.there(query.label)), 0) if target else sys.maxsize

    def wanted() -> int:
        return min(missing(), sys.maxsize if is_list else max(query.limit - len(known), 0))

    pending = iter(dataset.pending(search))
    while chunk := list(itertools.islice(pending, missing())):
        collect(search, chunk)
    is_done = search.get("exhausted") if target else search["asked"] >= query.limit
    if (is_done and not is_list) or not wanted():
        return
    results, is_exhausted = start_engine()(query), False
    first = next(results, None)
    if first is None:  # a page that is slow looks empty: the next run asks again
        return
    found = new_results(itertools.chain([first], results), known, dataset.barred_urls, query.text)
    with contextlib.closing(found):
        while not is_exhausted and (number := wanted()):
            chunk = []
            try:
                chunk.extend(itertools.islice(found, number))
            except Exception:  # a crash of the browser is no ValueError yet
                if chunk:  # what came before the error
                    collect(dataset.note_search(search, chunk, len(known), False), chunk)
                raise
            is_exhausted = len(chunk) < number
            asked = len(known) if target else query.limit
            search = dataset.note_search(search, chunk, asked, is_exhausted)
            collect(search, chunk)


# --- Google ---

GOOGLE = "https://www.google.com/search"
FILTERS = ("color", "color_type", "language", "safe_search", "size", "time", "type", "usage_rights")
RECORD_START = re.compile(r'\[0,"([\w-]{6,24})",\["https?:')
TROUBLE = {
    "captcha": "wants to see a person (captcha)",
    "consent": "does not go on from its consent page",
    "wall": "does not believe that this browser has JavaScript",
}
GROW_WAIT_S = 3.0  # how long a page may take to show something, or more after scrolling
CLICK_WAIT_S = 1.0  # how long a tile may take to show its link after a click
SOLVE_WAIT_S = 600.0  # how long somebody may take to solve a captcha


def google_url(text: str, filters: dict[str, str]) -> str:
    """Build the address of a result page with google_images_download's knowledge of Google's filters.

    The package also puts in made-up traces of a browser session, which are left out. Raises ValueError if it
    does not know a filter's value.
    """
    from google_images_download import google_images_download as package

    arguments = {**dict.fromkeys(package.args_list), **filters}
    builder = package.googleimagesdownload()
    try:
        parameters = builder.build_url_parameters(arguments)
    except KeyError as error:
        raise ValueError(f"--filter has no value {error}; see the help of google_images_download") from None
    url = builder.build_search_url(text, parameters, None, None, None, arguments["safe_search"])
    fields = [field for field in parse_qsl(urlsplit(url).query) if field[0] in ("q", "tbs", "lr", "safe")]
    return f"{GOOGLE}?{urlencode([*fields, ('udm', '2')])}"  # udm=2: the tab of images


def pick(value: object, *path: str | int) -> str:
    """Return a text from inside a stranger's JSON; "" if it is not there, a ? for half a surrogate pair."""
    try:
        for step in path:
            value = value[step]
    except (LookupError, TypeError):
        return ""
    return str(value or "").encode(errors="replace").decode()


def parse_records(text: str) -> dict[str, Result]:
    """Decode the results that stand as JSON in a page or in what it fetched, by docid.

    [0, docid, [thumbnail, height, width], [original, height, width], ..., {"2003": [_, _, page, title]}]
    """
    records = {}
    for match in RECORD_START.finditer(text):
        with contextlib.suppress(ValueError):  # of another shape
            record, _ = json.JSONDecoder().raw_decode(text, match.start())
            origin = next(
                (part["2003"] for part in record if isinstance(part, dict) and "2003" in part), None
            )
            url = pick(record, 3, 0)
            if url.startswith("http"):
                records[match[1]] = Result(url, pick(origin, 2), pick(origin, 3))
    return records


@contextlib.contextmanager
def open_browser(profile: Path | None, headful: bool) -> Iterator[Chrome]:
    """Start Chromium, ready for `Google`, and close it whatever happens.

    It says truly what it is: neither its user agent nor navigator.webdriver is touched. Raises ValueError if
    there is none, or it ends.
    """
    from selenium import webdriver
    from selenium.common.exceptions import SessionNotCreatedException, WebDriverException

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
    # Selenium would look for chromedriver, which is on this machine, behind a proxy.
    bypassed = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = f"{bypassed},localhost" if bypassed else "localhost"
    # A session of its own: Ctrl-C reaches this script alone, which then closes the browser in order.
    service = webdriver.ChromeService(driver_path, popen_kw={"start_new_session": True})
    service.process = None  # else `stop` fails if it could not be started
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `finally` runs
    with tempfile.TemporaryDirectory(prefix="download_data_", ignore_cleanup_errors=True) as folder:
        options.add_argument(f"--user-data-dir={(profile or Path(folder)).absolute()}")
        try:
            driver = webdriver.Chrome(options, service)
            script = (shared.RESOURCES / "google_images.js").read_text(encoding="utf-8")
            driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
            yield driver
        except SessionNotCreatedException as error:
            reason = " ".join(error.msg.partition("; For documentation")[0].split())
            is_other = "only supports" in reason
            remedy = f"{driver_path} and it must be of one version" if is_other else "try it by hand"
            raise ValueError(f"{browser} does not start ({reason}); {remedy}") from None
        except (WebDriverException, HTTPError) as error:
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
        driver: of `open_browser`.
        filters: google_images_download's names and values.
        is_watched: somebody sees the browser, and can solve a captcha.
    """

    def __init__(self, driver: Chrome, filters: dict[str, str], is_watched: bool):
        self.driver, self.filters, self.is_watched = driver, filters, is_watched
        self.found: dict[str, Result] = {}  # by docid

    def search(self, text: str) -> Iterator[Result]:
        """Find results in order; raises ValueError if Google shows another page."""
        self.driver.get(google_url(text, self.filters))
        if not self._reach_results():
            return
        self.found, passed_on = {}, set()
        self._look()
        self.found |= parse_records(self.driver.page_source)
        is_more = True
        while is_more:
            for docid in [docid for docid in self.found if docid not in passed_on]:
                passed_on.add(docid)
                yield self._resolve(docid)
            is_more = self._grow(len(passed_on))

    def _run(self, name: str, *args: str) -> object:
        """Call a function of google_images.js."""
        return self.driver.execute_script(f"return googleImages.{name}(...arguments)", *args)

    def _wait_until(self, condition: Callable[[], object], timeout_s: float) -> bool:
        """Wait until something holds; return whether it does."""
        from selenium.common.exceptions import TimeoutException
        from selenium.webdriver.support.wait import WebDriverWait

        try:
            return bool(WebDriverWait(self.driver, timeout_s, 0.1).until(lambda _: condition()))
        except TimeoutException:
            return False

    def _state(self) -> str:
        """Return what the browser shows: results, empty, or one of TROUBLE."""
        state = self._run("state")
        return "results" if state == "empty" and RECORD_START.search(self.driver.page_source) else state

    def _refuse_cookies(self) -> None:
        if self._state() == "consent":
            self._wait_until(lambda: self._run("rejectCookies"), GROW_WAIT_S)
            self._wait_until(lambda: self._state() != "consent", GROW_WAIT_S)

    def _reach_results(self) -> bool:
        """Get past the consent page, or with somebody's help a captcha; return whether there are results."""
        self._refuse_cookies()
        if self.is_watched and self._state() == "captcha":
            print("solve the captcha in the browser's window, the search then goes on", file=sys.stderr)
            self._wait_until(lambda: self._state() != "captcha", SOLVE_WAIT_S)
            self._refuse_cookies()
        self._wait_until(lambda: self._state() != "empty", GROW_WAIT_S)  # it may be incomplete
        state = self._state()
        if state in TROUBLE:
            raise ValueError(
                f"Google {TROUBLE[state]}; what is downloaded is kept. Run the command again in some hours, "
                "or with --headful --profile DIR to solve it in the window, or with --engine openverse"
            )
        return state == "results"

    def _look(self) -> int:
        """Take in what the page shows and has fetched; return the number of results known by now."""
        tiles, bodies = self._run("look")
        for docid, *texts, is_thumbnail in tiles:
            tile = Result(*map(pick, texts), is_thumbnail=is_thumbnail)
            if docid not in self.found or self.found[docid].is_thumbnail:
                self.found[docid] = tile
        for body in bodies:
            self.found |= parse_records(body)
        return len(self.found)

    def _grow(self, count: int) -> bool:
        """Scroll to the page's end, press "More results" if it is there; return whether that helps."""
        self._run("scrollToEnd")
        is_moving = self._wait_until(lambda: self._look() > count or self._run("askForMore"), GROW_WAIT_S)
        return is_moving and self._wait_until(lambda: self._look() > count, GROW_WAIT_S)

    def _resolve(self, docid: str) -> Result:
        """Return a result; a click on its tile may bring its link. The last resort is the thumbnail."""

        def is_known() -> bool:
            self._look()
            return not self.found[docid].is_thumbnail

        if self.found[docid].is_thumbnail and not is_known():
            self._run("clickTile", docid)
            self._wait_until(is_known, CLICK_WAIT_S)
        return self.found[docid]


# --- other engines ---


def take_turns(delay_s: float) -> Iterator[None]:
    """Return from each `next` at least `delay_s` seconds after the one before."""
    while True:
        end = time.monotonic() + delay_s
        yield
        time.sleep(max(end - time.monotonic(), 0))


def search_openverse(text: str, ask: Ask) -> Iterator[Result]:
    """Search openly licensed pictures, page by page. Source: https://api.openverse.org/v1/ (image search)."""
    for page in itertools.count(1):
        answer = ask(OPENVERSE, {"q": text, "page": page, "page_size": API_PAGE})
        if answer is None or not answer["results"]:
            return
        for found in answer["results"]:
            url, origin, title = (pick(found, name) for name in ("url", "foreign_landing_url", "title"))
            licence = f"{pick(found, 'license')} {pick(found, 'license_version')}".strip()
            yield Result(url, origin, title, licence)
        num_pages = answer.get("page_count")
        if isinstance(num_pages, int) and page >= num_pages:
            return


def search_commons(text: str, ask: Ask) -> Iterator[Result]:
    """Search Wikimedia Commons, batch by batch. Source: https://www.mediawiki.org/wiki/API:Continue."""
    fields = dict(parse_qsl(COMMONS_SEARCH)) | {"gsrsearch": f"filetype:bitmap {text}", "gsrlimit": API_PAGE}
    batch, go_on = {}, {}
    while go_on is not None and (answer := ask(COMMONS, fields | go_on)) is not None:
        for page in (answer.get("query") or {}).get("pages") or []:
            part = page if isinstance(page, dict) else {}  # a batch may come in several answers
            batch.setdefault(str(part.get("pageid") or -len(batch)), {}).update(part)
        go_on = answer.get("continue")
        if go_on is None or "batchcomplete" in answer:
            for page in sorted(batch.values(), key=lambda page: pick(page, "index").zfill(6)):  # by relevance
                url, origin = (pick(page, "imageinfo", 0, name) for name in ("url", "descriptionurl"))
                licence = pick(page, "imageinfo", 0, "extmetadata", "LicenseShortName", "value")
                yield Result(url, origin, pick(page, "title"), html.unescape(licence))
            batch = {}


APIS = {"openverse": search_openverse, "commons": search_commons}


def search_api(name: str, downloader: Downloader, turns: Iterator[None], query: Query) -> Iterator[Result]:
    """Search with a public API; raises ValueError if it does not answer, or not as documented."""
    token = os.environ.get("OPENVERSE_TOKEN", "").strip() if name == "openverse" else ""
    last = None

    def ask(url: str, fields: dict) -> dict | None:
        nonlocal last
        next(turns)
        try:
            answer = json.loads(downloader.get(f"{url}?{urlencode(fields)}", token=token))
            trouble = answer.get("error") or answer.get("errors") or answer.get("detail")
        except Refusal as refusal:
            if last and refusal.detail in ("HTTP 400", "HTTP 404"):  # there are fewer pages than it said
                return None
            is_key_wrong = token and refusal.detail == "HTTP 401"
            trouble = refusal.detail + (", is OPENVERSE_TOKEN right?" if is_key_wrong else "")
        except (ValueError, RecursionError):
            trouble = "what it sends is no JSON"
        if trouble:
            raise ValueError(
                f"{name} does not answer ({str(trouble)[:200]}); run the command again later to go on"
            )
        is_repeated, last = answer == last, answer
        return None if is_repeated else answer

    try:
        yield from APIS[name](query.text, ask)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name} answers in another shape than documented ({error!r}); choose another --engine"
        ) from None


def search_ddgs(backend: str, turns: Iterator[None], query: Query) -> Iterator[Result]:
    """Search DuckDuckGo or Bing through the package ddgs, an extra; raises ValueError if it cannot."""
    from ddgs import DDGS
    from ddgs.exceptions import DDGSException

    urls = set()
    for page in itertools.count(1):
        next(turns)
        try:
            found = DDGS().images(query.text, backend=backend, page=page, max_results=None)
        except DDGSException as error:
            if "No results" in str(error):
                return
            raise ValueError(f"{backend} does not answer ({error}); run the command again later") from None
        results = [Result(*(pick(row, name) for name in ("image", "url", "title"))) for row in found]
        if urls.issuperset(result.url for result in results):
            return
        urls.update(result.url for result in results)
        yield from results


def read_list(path: Path) -> dict[tuple[str, str], list[Result]]:
    """Read a manifest, or lines "label url"; return the results by label and query, in order.

    Raises ValueError if a line is neither, or its label cannot be a folder's name.
    """
    results, number, data = defaultdict(list), 0, path.read_bytes()
    try:
        for line in data.decode(json.detect_encoding(data)).splitlines():
            number += 1
            if line.startswith("{"):
                record = json.loads(line)
                if record["status"] == "kept":
                    result = read_result({name: record[name] for name in Result._fields})
                    results[check_label(record["label"]), record["query"]].append(result)
            elif line.strip():
                label, url = line.split()
                results[check_label(label), path.name].append(Result(url))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path}, line {number} is neither 'label url' nor a manifest's record ({error})"
        ) from None
    if not results:
        raise ValueError(f"{path} lists no picture, expected a manifest.jsonl or lines 'label url'")
    return results


def check_engine(name: str, filters: dict[str, str], headful: bool) -> None:
    """Raise ValueError if an engine lacks a package or a screen, or does not know its filters."""
    if name in ("duckduckgo", "bing") and not importlib.util.find_spec("ddgs"):
        raise ValueError(f"--engine {name} needs the package ddgs; pip install ddgs")
    if name == "google":
        google_url("", filters)
        has_screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        if headful and sys.platform == "linux" and not has_screen:  # Chromium would try for a minute
            raise ValueError("there is no screen for --headful; go without it, see --help")


# --- report ---

PER_SHEET = 100  # pictures


def draw_contact_sheets(dataset: DataSet, labels: Iterable[str]) -> None:
    """Draw the kept pictures of each label into <folder>_sheets/<label>.png, <label>.2.png and so on.

    A sheet that shows what it should stays as it is, so that the work does not grow with each run.
    """
    for label in labels:
        records = dataset.there(label)
        for number in itertools.count(1):
            path = dataset.sheets / (f"{label}.{number}.png" if number > 1 else f"{label}.png")
            shown = records[(number - 1) * PER_SHEET : number * PER_SHEET]
            if shown:
                draw_contact_sheet(path, dataset, shown)
            elif path.exists():
                path.unlink()
            else:
                break


def draw_contact_sheet(path: Path, dataset: DataSet, records: Sequence[dict]) -> None:
    """Draw pictures, with their faces and names, into a PNG file, unless it shows just them."""
    names = " ".join(record["file"] for record in records)
    with contextlib.suppress(*shared.PILLOW_ERRORS), Image.open(path, formats=["PNG"]) as sheet:
        if sheet.info.get("pictures") == names:
            return
    cell, columns = 128, 10  # pixels, pictures
    rows = -(-len(records) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * (cell + 14)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, record in enumerate(records):
        x, y = i % columns * cell, i // columns * (cell + 14)
        draw.text((x, y + cell - 2), Path(record["file"]).stem, "black", font_size=11)
        with contextlib.suppress(shared.PictureError):  # somebody damaged it; its cell stays white
            photo = shared.open_picture(dataset.path(record))
            if face_box := record.get("face_box"):
                ImageDraw.Draw(photo).rectangle(face_box, outline="lime", width=max(photo.size) // 100 + 1)
            photo.thumbnail((cell - 4, cell - 4), reducing_gap=2)
            sheet.paste(photo, (x, y))
    about = PngInfo()
    about.add_text("pictures", names)
    with shared.replacing(path) as temporary:
        sheet.save(temporary, "PNG", pnginfo=about)


def print_report(dataset: DataSet, labels: Sequence[str]) -> None:
    """Draw the contact sheets; print what was found under two labels, and a table of all that was found."""
    draw_contact_sheets(dataset, labels)
    lines, counts = [], {label: Counter() for label in labels}
    for search in dataset.searches.values():
        if search["label"] in counts:
            counts[search["label"]] += Counter(asked=search["asked"], found=len(search["results"]))
    for record in dataset.outcomes.values():
        if record["label"] in counts:
            counts[record["label"]][record.get("reason", "kept")] += 1
            if record.get("reason") == "two labels":
                found = f"{record['url']} was found for {record['query']!r}"
                lines.append(f"two labels: {found} and is {record['detail']}")
    for row in counts.values():
        row[NOT_TRIED] = row["found"] - sum(row[name] for name in ("kept", *REASONS))
    total = sum(counts.values(), Counter())
    columns = ["asked", "found", "kept", *(name for name in (*REASONS, NOT_TRIED) if total[name])]
    width = max(map(len, ["label", *labels]))
    lines.append(f"{'label':{width}}" + "".join(f"  {name:>5}" for name in columns))
    for label, row in [*counts.items(), ("total", total)]:
        lines.append(f"{label:{width}}" + "".join(f"  {row[name]:{max(len(name), 5)}}" for name in columns))
    sheets = f", contact sheets to look at in {dataset.sheets}" if dataset.sheets.exists() else ""
    lines.append(f"pictures in {dataset.folder}{sheets}")
    print(*map(shared.printable, lines), sep="\n")


def remove_picture(dataset: DataSet, sha_or_url: str) -> None:
    """Take a picture out, draw its contact sheets anew, and print what is left to do."""
    labels = list(dataset.kept)
    files = dataset.remove(sha_or_url)
    lines = [
        f"removed {path}; if finetune_emotion.py has cut its face, delete that too: {path.name}.png"
        for path in files
    ]
    lines.append(f"{len(files)} files removed; what was found is barred from {dataset.folder} from now on")
    print(*map(shared.printable, lines), sep="\n")
    draw_contact_sheets(dataset, labels)


# --- command line ---

EMOTION_QUERIES = shared.RESOURCES / "emotion_queries.json"


def read_emotions(path: Path) -> dict[str, list[str]]:
    """Read which queries stand for which emotion, {label: [main word, synonyms...]}, or raise ValueError."""
    queries, seen = {}, set()
    try:
        # As bytes, which may be in any Unicode; an object becomes a tuple, in which a label may come twice.
        for name, texts in json.loads(path.read_bytes(), object_pairs_hook=tuple):
            label = check_label(name)
            if label in queries:
                raise ValueError(f"{label!r} is in it twice")
            if not isinstance(texts, list) or not texts:
                raise ValueError(f"{str(texts)[:50]!r} is no list of queries")
            check_texts(*texts)
            queries[label] = [" ".join(unicodedata.normalize("NFC", text).split()) for text in texts]
            for text in queries[label]:
                text.encode()  # fails for half a character
                if not text or text.casefold() in seen:
                    raise ValueError(f"{text!r} is in it twice" if text else "a query is blank")
                seen.add(text.casefold())
        if not queries:
            raise ValueError("no label is in it")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no JSON object of lists of words, like {EMOTION_QUERIES} ({error})"
        ) from None
    return queries


def read_imagenet_labels() -> dict[str, list[str]]:
    """Read the 1000 classes' names, each its own query; a label has _ for blanks."""
    names = json.loads((shared.RESOURCES / "imagenet_labels.json").read_text(encoding="utf-8"))
    return {name.replace(" ", "_"): [name] for name in names}


def list_queries(texts: dict[str, list[str]], limit: int, synonym_limit: int) -> list[Query]:
    """Return what to search for, the main word of a label before its synonyms; with limit 0 these are out."""
    return [
        Query(label, text, synonym_limit if i else limit)
        for label, words in texts.items()
        for i, text in enumerate(words if synonym_limit else words[:1])
    ]


def parse_filter(text: str) -> tuple[str, str]:
    """Split a filter NAME=VALUE."""
    name, _, value = text.partition("=")
    if name not in FILTERS or not value:
        raise argparse.ArgumentTypeError(f"{text} is no NAME=VALUE of {', '.join(FILTERS)}")
    return name, value


# Help, defaults of --out-dir and --limit, type of picture that Google is asked for, shorter side to shrink
# pictures to: 256 pixels are what the usual ImageNet transform resizes to.
SETS = {
    "emotions": ("photos of emotions with one face each", "data/google", 100, "face", None),
    "imagenet": ("a few photos for each of the 1000 ImageNet classes", "data/imagenet", 5, "photo", 256),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    common = argparse.ArgumentParser(add_help=False)
    add, positive, natural = common.add_argument, shared.number(int, 1), shared.number(int, 0)
    composed = functools.partial(unicodedata.normalize, "NFC")
    target_help = "pictures to keep of each label: look at results of its queries until there are so many"
    filter_help = f"Google's filters, of {', '.join(FILTERS)}; values as in google_images_download; "
    filter_help += "without it type=face for emotions, type=photo for imagenet"
    delay_help = "seconds between two requests to a search engine"
    workers_help = f"downloads at a time, {PER_HOST} from one host"
    private_help = "download from private and local addresses too, or have a proxy look up the names"
    add("--engine", choices=ENGINES, default="google", help="what searches")
    add("--list", type=Path, metavar="FILE", help="for --engine urls: a manifest.jsonl, or lines 'label url'")
    add("--labels", type=composed, nargs="+", metavar="LABEL", help="only these; without it all there are")
    add("--target", type=positive, metavar="N", help=target_help)
    add("--filter", type=parse_filter, nargs="+", metavar="NAME=VALUE", help=filter_help)
    add("--delay", type=shared.number(float, 0), default=5.0, metavar="S", help=delay_help)
    add("--workers", type=positive, default=8, metavar="N", help=workers_help)
    add("--timeout", type=shared.number(float, 0.1), default=30.0, metavar="S", help="seconds for a download")
    add("--retries", type=natural, default=2, metavar="N", help="further tries if a server does not answer")
    add("--allow-private", action="store_true", help=private_help)
    add("--contact", metavar="TEXT", help="your mail address or page, for servers; Wikimedia asks for it")
    add("--headful", action="store_true", help="show the browser, so that a captcha can be solved in it")
    add("--profile", type=Path, metavar="DIR", help="keep the browser's cookies there; without it nowhere")
    add("--remove", metavar="SHA_OR_URL", help="only take a picture and its copies out of --out-dir for good")
    parser = shared.build_parser(__doc__)
    sets = parser.add_subparsers(dest="set", required=True, metavar="{emotions,imagenet}")
    for name, (about, out_dir, limit, *_) in SETS.items():
        limit_help = f"results to look at for each query; without it {limit}, all of a list or for a target"
        own = sets.add_parser(name, parents=[common], help=about, formatter_class=shared.HelpFormatter)
        shared.add_options(own, out_dir=Path(out_dir))
        own.add_argument("--limit", type=positive, metavar="N", help=limit_help)
    add = sets.choices["emotions"].add_argument
    file_help = "JSON object, label: [main query, synonyms...]"
    synonym_help = "results to look at for each synonym, 0 for none"
    size_help = "longer side of the smallest face that counts, pixels"
    prob_help = "how sure the detector must be of a face, 0-1"
    add("--emotions-file", type=Path, default=EMOTION_QUERIES, metavar="FILE", help=file_help)
    add("--synonym-limit", type=natural, default=30, metavar="N", help=synonym_help)
    add("--min-face-size", type=shared.number(int, 20), default=64, metavar="PX", help=size_help)
    add("--min-face-prob", type=shared.number(float, 0, 1), default=0.95, metavar="X", help=prob_help)
    shared.add_options(sets.choices["emotions"], device="auto")
    args = parser.parse_args(argv)
    if args.engine == "urls" and not args.list:
        parser.error("--engine urls needs --list FILE")
    if re.search(r"[^\x20-\x7e\xa0-\xff]", args.contact or ""):
        parser.error("--contact goes into a header, which holds one line of Latin-1; write a mail address")
    return args


@shared.one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Search, download, examine and report, going on where an earlier run stopped."""
    args = parse_args(argv)
    _, _, default_limit, kind, shorter_side = SETS[args.set]
    if args.remove:
        with shared.only_run_in(args.out_dir):
            remove_picture(DataSet(args.out_dir, shorter_side), args.remove)
        return
    listed = read_list(args.list) if args.engine == "urls" else {}
    if listed:
        queries = [Query(*key, args.limit or len(results)) for key, results in listed.items()]
    else:
        limit = args.limit or (sys.maxsize if args.target else default_limit)
        if args.set == "imagenet":
            queries = list_queries(read_imagenet_labels(), limit, 0)
        else:
            synonym_limit = limit if args.target and args.synonym_limit else args.synonym_limit
            queries = list_queries(read_emotions(args.emotions_file), limit, synonym_limit)
    known = sorted({query.label for query in queries})
    for label in args.labels or ():
        if label not in known:
            raise ValueError(f"no label {label!r}, expected some of: {', '.join(known)[:200]}")
    queries = [query for query in queries if query.label in (args.labels or known)]
    labels = list(dict.fromkeys(query.label for query in queries))
    filters = {"type": kind, **dict(args.filter or [])}
    check_engine(args.engine, filters, args.headful)
    downloader = Downloader(args.timeout, args.retries, args.allow_private, args.contact)
    with contextlib.ExitStack() as stack:
        stack.enter_context(shared.only_run_in(args.out_dir))
        dataset = DataSet(args.out_dir, shorter_side)
        find_face = None
        if args.set == "emotions":
            device = shared.pick_device(args.device)
            finder = shared.FaceFinder(device, args.min_face_size, args.min_face_prob)
            find_face = functools.partial(find_single_face, finder, args.min_face_size)
        stack.callback(print_report, dataset, labels)
        pool = stack.enter_context(ThreadPoolExecutor(args.workers))
        stack.callback(downloader.close)
        fetch = functools.partial(pool.submit, dataset.fetch, downloader)
        collect_found = functools.partial(collect, dataset=dataset, fetch=fetch, find_face=find_face)

        @functools.cache
        def start_engine() -> SearchFor:
            turns = take_turns(args.delay)
            if args.engine == "google":
                driver = stack.enter_context(open_browser(args.profile, args.headful))
                return lambda query: next(turns) or Google(driver, filters, args.headful).search(query.text)
            if args.engine == "urls":
                return lambda query: iter(listed[query.label, query.text][: query.limit])
            if args.engine in APIS:
                return functools.partial(search_api, args.engine, downloader, turns)
            return functools.partial(search_ddgs, args.engine, turns)

        for query in tqdm(queries, "searching", unit="query", disable=None):
            work_off(query, args.engine, start_engine, dataset, collect_found, target=args.target)
        for label in labels if args.target else ():
            kept = len(dataset.there(label))
            end = "at their --limit" if args.limit else "exhausted"
            state = "the target is reached" if kept >= args.target else f"its searches are {end}"
            print(f"{label}: {kept} of {args.target} pictures, {state}")


if __name__ == "__main__":
    main()
