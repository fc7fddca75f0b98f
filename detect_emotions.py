"""Find every face in photos and videos, classify its emotion, and write labelled copies, <name>_emotions.

MTCNN (Zhang et al. 2016, https://arxiv.org/abs/1604.02878) finds the faces, the trained gray ResNet
classifies a square crop of each. In a video the faces are followed from frame to frame, known again after a
while out of sight, and their probabilities are smoothed over time; beside the labelled video stand a table of
all faces in all frames, one of the tracks, and a plot of their emotions over time. stdout has a line for each
face of a photo and for each video, tab-separated, or JSON Lines, or CSV. On request there are tables of all
inputs, the faces cut out, and a page for a browser; a run that was stopped goes on where it was. --blur hides
faces before anything that shows pixels sees them. Photos are labelled side by side, a core for each, and
torchrun shares a folder out to several processes.

The parts stand in the order in which a picture passes through them: sources (what is to be labelled), plan
(where the outputs go), frames (reading videos and cameras), tracks, privacy (hiding faces), labels (drawing),
outputs (tables, crops, videos, plots, the live window), report, results (all of these together), main.

Usage:
    python detect_emotions.py resources/sample.jpg --out-dir runs/labelled
    python detect_emotions.py holiday --recursive --out-dir runs/hidden --blur all
"""

from __future__ import annotations

import argparse
import base64
import csv
import functools
import glob
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.parse
import warnings
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import model as shared

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Sequence
    from types import ModuleType
    from typing import TextIO

    import av
    import pandas as pd

    Font = ImageFont.FreeTypeFont

# --- sources ---

VIDEO_SUFFIXES = {".avi", ".f4v", ".flv", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"}
VIDEO_SUFFIXES |= {".3g2", ".3gp", ".asf", ".mts", ".mxf", ".ogv", ".qt", ".ts", ".vob", ".webm", ".wmv"}
# FFmpeg's names of formats that hold their own data. Others open what a file names (HLS, DASH, concat, SDP),
# are no videos, or are seen in files of any kind.
VIDEO_FORMATS = (
    "amv,asf,av1,avi,cavsvideo,dirac,dv,evc,flv,gxf,h264,hevc,ivf,m4v,matroska,mov,mpeg,mpegts,mpegvideo,mxf,"
    "nsv,nut,obu,ogg,rm,vvc,wtv,yuv4mpegpipe"
)
PICTURE_BRANDS = shared.HEIC_BRANDS | {b"avif", b"avis"}  # FFmpeg would open these as MP4
KEPT_FORMATS = ("AVIF", "BMP", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP")  # copies of all others are PNGs
# An output is replaced only by --overwrite, unless it has this in its metadata or, a table, begins so.
MARK = "Emotion detector, detect_emotions.py"
TABLES = (b"file,face,", b"file,track,", b"file,frame,track,", b"frame,time,track,", b"track,first,last,")
MARKED_WITHIN = 2**27  # bytes; an MP4's metadata stand behind the index of its frames, 1 MB for 20 minutes
OWN = "made by this program"  # of the reasons why a file is left out
REPORT_PAGE = shared.RESOURCES / "report.html"
ENDINGS = {"video": ".mp4", "faces": ".csv", "tracks": "_tracks.csv", "timeline": "_timeline.png"}


def load_opencv() -> ModuleType:
    """Import OpenCV.

    Raises:
        ValueError: it, or a system library that it needs, is not there.
    """
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            f"cameras and windows need OpenCV, which does not load here ({error}); on Debian, apt-get "
            "install libgl1 libglib2.0-0, or pip install opencv-python-headless for cameras without a window"
        ) from None
    return cv2


def load_av() -> ModuleType:
    """Import PyAV, which photos do not need, after OpenCV.

    In the other order OpenCV's windows hang on Linux, for both bring their own libxcb along
    (https://github.com/PyAV-Org/PyAV/issues/978).
    """
    with suppress(ValueError):
        load_opencv()
    import av

    return av


def open_video(path: Path) -> av.container.InputContainer:
    """Open a video file, and never an address, a program or another file that its name or content may mean.

    Raises:
        ValueError: it is not a video that FFmpeg can read.
    """
    av = load_av()
    options = {"protocol_whitelist": "file", "format_whitelist": VIDEO_FORMATS}
    try:
        return av.open(f"file:{path}", metadata_errors="ignore", container_options=options)
    except av.error.FFmpegError as error:
        is_refused = isinstance(error, av.error.ArgumentError)
        reason = "a playlist, or of a format that is not read" if is_refused else error.strerror
        raise ValueError(f"{path} is not a video that can be read: {reason}") from None


class Source(NamedTuple):
    """Something to label."""

    path: Path
    kind: str  # "photo", "video" or "camera"
    folder: Path | None  # for its outputs
    is_named: bool = True  # on the command line, not found in a folder or by a pattern
    device: str | None = None  # of a camera: its number, or a stream's address


def path_kind(path: Path) -> str | None:
    """Return "file", "folder" or "device", pipes included; None if it is missing or may not be looked at."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return None
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "device"


def source_kind(path: Path) -> str:
    """Return whether a file is a "photo" or a "video", by its content; if that is neither, by its suffix."""
    named = "video" if path.suffix.lower() in VIDEO_SUFFIXES else "photo"
    if path_kind(path) != "file":
        return named
    formats = [each for each in shared.FORMATS if named == "photo" or each != "TGA"]  # it has no signature
    with suppress(*shared.PILLOW_ERRORS), Image.open(path, formats=formats):
        return "photo"
    with suppress(OSError, ValueError), path.open("rb") as file:
        if named == "photo" and file.read(12)[8:12] not in PICTURE_BRANDS:
            open_video(path).close()
            return "video"
    return named


def list_files(
    text: str, recursive: bool, left_out: Counter[str], unreadable: list[Path]
) -> list[Path] | None:
    """List the files of a folder or pattern, sorted; return None if the text is the name of one file.

    Folders that are not looked into are counted in `left_out`, those that cannot be get into `unreadable`.
    """
    path, files = Path(text), []
    if path_kind(path) == "folder":
        for folder, subfolders, names in os.walk(path, onerror=lambda e: unreadable.append(Path(e.filename))):
            files += [Path(folder, name) for name in names]
            if not recursive:
                left_out["subfolder (see --recursive)"] += len(subfolders)
                break
            paths = [Path(folder, name) for name in subfolders]
            left_out["linked folder"] += sum(map(os.path.islink, paths))  # the method of Path may raise
        return sorted(files)
    if not glob.has_magic(text) or path_kind(path):
        return None
    base = next(folder for folder in path.parents if path_kind(folder))  # whose name may have brackets
    pattern = str(path.relative_to(base))
    if not glob.has_magic(pattern):
        return None
    return sorted(base / name for name in glob.glob(pattern, root_dir=base, recursive=True))  # noqa: PTH207


def why_left_out(path: Path) -> str | None:
    """Return why a file that was found in a folder is not to be labelled, None if it is."""
    if path_kind(path) != "file":
        return "not a regular file"
    if path.name.startswith("._"):
        return "side file of macOS"
    if re.search(r"_emotions(_timeline|_tracks)?\.\w+$|_\d+_\d+\.png$", path.name) and is_own(path):
        return OWN
    is_known = path.suffix.lower() in shared.picture_suffixes() | VIDEO_SUFFIXES
    return None if is_known else "unknown suffix"


def find_sources(
    inputs: Sequence[str], recursive: bool, out_dir: Path | None, left_out: Counter[str]
) -> list[Source]:
    """List the photos and videos that the inputs name, each once: files, folders, patterns with * ? [].

    A folder's subfolders return in `out_dir`; those that cannot be read are sources too, which fail. Other
    files of folders and patterns are counted in `left_out`.

    Raises:
        ValueError: a folder or pattern has none, or an input is no file.
    """
    sources = {}
    for text in inputs:
        path, reasons, unreadable = Path(text), Counter(), []
        kind = path_kind(path)
        if kind is None and re.match(r"[\w+.-]+://", text):
            raise ValueError(f"{text} is an address; name a file, or label a stream with --camera ADDRESS")
        if kind == "device":
            raise ValueError(f"{text} is a pipe or a device; save what it gives as a file")
        files = list_files(text, recursive, reasons, unreadable)
        is_named = files is None
        if is_named:
            files = [path]
        else:
            why = {file: why_left_out(file) for file in files}
            reasons.update(filter(None, why.values()))
            files = [file for file, reason in why.items() if not reason]
            if not (files or unreadable or reasons[OWN]):
                others = f" ({in_words(reasons)})" if +reasons else ""
                remedy = "name files, or a folder with --recursive"
                raise ValueError(f"{text} has no photos or videos{others}; {remedy}")
        left_out.update(reasons)
        for file in files:
            below = file.parent.relative_to(path) if kind == "folder" else ""
            source = Source(file, source_kind(file), out_dir / below if out_dir else file.parent, is_named)
            if is_named or real_path(file) not in sources:
                sources[real_path(file)] = source
        for folder in unreadable:  # it fails in its turn, as a photo that cannot be read does
            sources[real_path(folder)] = Source(folder, "photo", None, is_named=False)
    return list(sources.values())


def in_words(left_out: Counter[str]) -> str:
    """Return why files were left out, and how many for each reason."""
    return "left out: " + ", ".join(f"{reason} {count}" for reason, count in (+left_out).items())


def real_path(path: Path) -> Path:
    """Return where a file is, through links to its folders, but not through one that it is itself."""
    return Path(os.path.realpath(path.parent), path.name)


def is_own(path: Path) -> bool:
    """Return whether a file says that this script wrote it: by MARK, or a table by its columns."""
    if path_kind(path) != "file":
        return False
    with suppress(OSError), path.open("rb") as file:
        near_end = max(0, path.stat().st_size - 2**16)
        pieces = ((start, 2**20 + len(MARK)) for start in range(0, MARKED_WITHIN, 2**20))  # each laps over
        for start, length in ((0, 2**16), (near_end, 2**16), *pieces):
            file.seek(start)
            part = file.read(length)
            if MARK.encode() in part or part.startswith(TABLES):
                return True
    return False


# --- plan ---

VIDEO_WORK = 30  # times as much as a photo of as many bytes: 7 s a MB, and 0.24 s, on two cores


class Kit(NamedTuple):
    """What labels faces, and how."""

    finder: shared.FaceFinder
    classifier: shared.Classifier
    colors: dict[str, str]  # of all that a label may be
    font_path: Path | None = None
    unsure: float = 0.0  # see `model.face_record`
    hidden: Container[str] = ()  # labels whose faces no picture may show
    has_labels: bool = True  # else nothing is drawn
    overwrite: bool = False  # files that do not say that this script wrote them
    start: float = 0.0  # s, of what is labelled of a video
    end: float = math.inf
    every: int = 3  # frames, from one in which a video's faces are classified to the next, new ones apart
    search_every: float = 0.3  # s, from a search of the whole frame to the next; there is one at cuts too
    smooth: float = 0.5  # s, time constant of a video's probabilities; 0: they are not smoothed
    rejoin: float = 30.0  # s, within which a face that comes back gets its number back


def name_outputs(source: Source, base: str, has_copies: bool) -> dict[str, Path]:
    """Name what is made of a photo ("copy") or a video ("video", "faces", "tracks", "timeline")."""
    if source.folder is None:
        return {}
    if source.kind == "photo":
        if not has_copies:
            return {}
        is_kept = Image.registered_extensions().get(source.path.suffix.lower()) in KEPT_FORMATS
        return {"copy": source.folder / f"{base}_emotions{source.path.suffix if is_kept else '.png'}"}
    parts = ENDINGS if has_copies else [part for part in ENDINGS if part != "video"]
    return {part: source.folder / f"{base}_emotions{ENDINGS[part]}" for part in parts}


def name_apart(sources: Sequence[Source], name: Callable[[Source, str], Iterable[Path]]) -> dict[Source, str]:
    """Choose what the outputs of each begin with, x for x.png, or more of its path where others are x too.

    a.gif and a.png of one folder become a.gif_emotions.png and a.png_emotions.png, b.png of two folders
    one_b.png_emotions.png and two_b.png_emotions.png, whatever their order. Names that differ in case alone,
    which are one file for many systems, get a digest of their path too.

    Args:
        name: returns the outputs of a source that begin with a text.
    """
    bases = {source: source.path.stem for source in sources}
    for has_digest in (False, True):
        sharing = defaultdict(list)
        for source in sources:
            for path in name(source, bases[source]):
                sharing[unicodedata.normalize("NFC", str(real_path(path))).casefold()].append(source)
        for _, group in sorted(sharing.items()):
            if len(group) == 1:
                continue
            paths = {source: real_path(source.path) for source in group}
            common = os.path.commonpath([path.parent for path in paths.values()])
            for source, path in paths.items():
                below = path.relative_to(common)
                bases[source] = "_".join(below.parts)
                if has_digest:
                    bases[source] += "_" + hashlib.sha256(os.fsencode(below)).hexdigest()[:8]
    return bases


def plan_outputs(
    sources: Sequence[Source], has_copies: bool, results: dict[str, Path], left_out: Counter[str]
) -> dict[Source, dict[str, Path]]:
    """Name all outputs; leave out what stands where one goes: a copy, most likely, and to be replaced.

    Raises:
        ValueError: an output would overwrite a source that was named, or one of the `results`, by their
            options, a source, an output or another.
    """

    def name(source: Source, base: str) -> Iterable[Path]:
        return name_outputs(source, base, has_copies).values()

    bases = name_apart(sources, name)
    outputs = {real_path(path) for source in sources for path in name(source, bases[source])}
    kept = [
        source
        for source in sources
        if real_path(source.path) not in outputs or (source.is_named and not is_own(source.path))
    ]
    left_out["in the place of a copy"] += len(sources) - len(kept)
    bases = name_apart(kept, name)
    plan = {source: name_outputs(source, bases[source], has_copies) for source in kept}
    owners = {path: source for source, outputs in plan.items() for path in outputs.values()}
    named = {real_path(source.path) for source in kept if source.is_named}
    for path, source in owners.items():
        if real_path(path) in named:
            raise ValueError(
                f"the copy of {source.path} would overwrite {path}, an input too; leave that one out"
            )
    taken = {real_path(path) for path in (*owners, *(source.path for source in kept))}
    for option, path in results.items():
        if real_path(path) in taken:
            raise ValueError(f"{option} {path} would overwrite another input or output; name another file")
        taken.add(real_path(path))
    return plan


def leave_out_finished(
    plan: dict[Source, dict[str, Path]], tables: Sequence[Table], left_out: Counter[str]
) -> dict[Source, dict[str, Path]]:
    """Leave out what has all its outputs, newer than itself, and its rows of all tables.

    A video that was not labelled to its end has a timeline of the year 1970, see `label_all`.

    What was named, and not found in a folder or by a pattern, is left out only where there are tables.
    """

    def is_finished(source: Source) -> bool:
        with suppress(OSError):
            changed = source.path.stat().st_mtime
            is_whole = all(path.stat().st_mtime >= changed and is_own(path) for path in plan[source].values())
            has_rows = all(table.has(source) for table in tables)
            return is_whole and has_rows and bool(plan[source] or tables)
        return False

    is_asked = {source for source in plan if source.is_named and not tables}
    left = {source: plan[source] for source in plan if source in is_asked or not is_finished(source)}
    left_out["finished before (--overwrite does it again)"] += len(plan) - len(left)
    return left


def share_out(plan: dict[Source, dict[str, Path]], num_shares: int) -> list[dict[Source, dict[str, Path]]]:
    """Share out a plan so that each share is about as much work; what is most work goes first."""

    def work(source: Source) -> float:
        with suppress(OSError):
            return source.path.stat().st_size * (VIDEO_WORK if source.kind == "video" else 1)
        return 0

    works, loads, owners = {source: work(source) for source in plan}, [0.0] * num_shares, {}
    for source in sorted(plan, key=works.get, reverse=True):
        owners[source] = loads.index(min(loads))
        loads[owners[source]] += works[source]
    return [
        {source: plan[source] for source in plan if owners[source] == share} for share in range(num_shares)
    ]


def why_not_writable(path: Path) -> str | None:
    """Return why a file cannot be written, as far as can be known before, or None."""
    reason = {"folder": "Is a directory", "device": "Not a regular file"}.get(path_kind(path))
    if reason is None:
        try:
            there = next(parent for parent in path.parents if os.path.lexists(parent))
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            reason = error.strerror
    return reason and f"cannot write {path}: {reason}"


def check_replaceable(paths: Iterable[Path], overwrite: bool) -> None:
    """Find out whether outputs may be written.

    Raises:
        ValueError: one is there, does not say that this script wrote it, and is not to be overwritten.
    """
    for path in paths:
        if not overwrite and path_kind(path) == "file" and not is_own(path):
            remedy = "--overwrite replaces it, as copies of earlier versions need, --out-dir writes elsewhere"
            raise ValueError(f"{path} does not say that this program wrote it; {remedy}")


def check_outputs(plan: dict[Source, dict[str, Path]], results: Sequence[Path], overwrite: bool) -> None:
    """Raise before the work starts if any result, or every other output, cannot be written.

    Raises:
        OSError: the reason.
        ValueError: a result is not to be replaced, see `check_replaceable`, or a camera's earlier recording.
    """
    paths = [path for each in plan.values() for path in each.values()]
    for group in (*([path] for path in results), paths):
        failures = [why_not_writable(path) for path in {path.parent: path for path in group}.values()]
        if failures and all(failures):
            raise OSError(failures[0])
    check_replaceable(results, overwrite)
    for source, outputs in plan.items():
        for path in (*outputs.values(), *results) if source.device and not overwrite else ():
            if path_kind(path):
                why = "is of an earlier run, and what a camera saw does not come again"
                raise ValueError(f"{path} {why}; --overwrite replaces it, or name another place")


# --- frames ---

# Chosen here, but for what H.264 and libx264 allow.
MISSED = 0.5  # s that the last frame may end before a video should, and times may be off
MAX_LATE = 5  # frames' durations that the first picture may come late; putting them in order takes two or so
MPEG = {"mpeg", "mpegts"}  # FFmpeg's names of formats for broadcasts and discs
MAX_DELAY = 16  # pictures that H.264 may hold back to put them in order
MAX_SIDE, MAX_PIXELS = 16_384, 8192 * 4320  # of a frame: libx264's limit, and 8K
BATCH_PIXELS = 2**25  # that are worked on together: 16 frames of full HD
# s between two pictures in MPEG's own formats, ISO/IEC 13818-1. Elsewhere they may be rarer; in Matroska more
# than usual means little, unless so many bytes between two packets belong to none.
MAX_GAP, USUAL_GAP, HOLE_BYTES = 0.7, 0.1, 1000
BT709 = 1  # FFmpeg's number for the colours of HD video
COLORSPACES = {*range(8), 9}  # its numbers of those that it makes RGB
PASSWORD = re.compile("(?<=//)[^/]*@")  # of a camera's address, with the user


class Frame(NamedTuple):
    """One picture of a video."""

    number: int  # from 0
    time: Fraction  # s, since the first frame of the whole video
    duration: Fraction  # s
    image: Image.Image  # RGB, upright


def demux(
    container: av.container.InputContainer, stream: av.stream.Stream, shifts: list[Fraction]
) -> Iterator[av.Packet]:
    """Read a stream's packets; mend their times.

    A time that fits neither the packet before nor the one after is damaged, and left out. Where times begin
    anew, as in files joined end to end, they go on, in all streams by the same `shifts`, s, one a joint.
    """

    def read() -> Iterator[av.Packet | None]:
        with suppress(IndexError):  # of PyAV at a file's end, if a stream has come up on the way
            yield from container.demux(stream)
        yield None

    slack, last, end, shift, num_joints = round(MISSED / stream.time_base), None, None, 0, 0
    for packet, after in itertools.pairwise(read()):
        if packet.dts is not None:
            time, duration, is_damaged = packet.dts + shift, packet.duration or 0, False
            is_odd = end is not None and not last - slack <= time <= end + slack  # durations may be too long
            if is_odd and after and after.dts is not None:
                is_damaged = abs(after.dts + shift - end) < abs(after.dts - packet.dts)
                if time < end and not is_damaged:
                    if num_joints == len(shifts):
                        shifts.append((end - packet.dts) * stream.time_base)
                    shift = round(shifts[num_joints] / stream.time_base)
                    time, num_joints = packet.dts + shift, num_joints + 1
            max_delay = max(slack, MAX_DELAY * duration)
            is_known = not is_damaged and packet.pts is not None
            if container.format.name in MPEG:  # elsewhere the picture may pause, and be shown much later
                is_known = is_known and abs(packet.pts - packet.dts) <= max_delay
            packet.pts = packet.pts + shift if is_known else None
            packet.dts = None if is_damaged else time
            last = end if is_damaged else time
            end = last + duration
        yield packet


def decode(packets: Iterator[av.Packet], stream: av.stream.Stream) -> Iterator[av.frame.Frame | None]:
    """Decode what can be of a stream; yield None for each damaged part."""
    av = load_av()
    packet = True
    while packet:
        try:
            packet = next(packets, None)  # the last, an empty one, lets the decoder give what it holds
            if packet and packet.is_corrupt:
                yield None
            yield from stream.decode(packet)
        except EOFError:
            break
        except av.error.FFmpegError:
            yield None


def upright(image: Image.Image, matrix: Sequence[int]) -> Image.Image:
    """Mirror and turn an image by a display matrix (ISO/IEC 14496-12): x goes to (a, b), y to (c, d)."""
    a, b, _, c, d, *_ = matrix
    if a * d < b * c:
        image, a, b = ImageOps.mirror(image), -a, -b
    angle = -round(math.degrees(math.atan2(b, a)))
    return image.rotate(angle, expand=angle % 90 == 0)


def read_picture(picture: av.VideoFrame) -> tuple[Image.Image, Sequence[int] | None]:
    """Return a picture's RGB image, upright, and its display matrix if it has one.

    PyAV's `to_image` copies the pixels twice more, and its `side_data` keeps each picture in memory until
    Python collects garbage.
    """
    from av.sidedata.sidedata import SideDataContainer

    [plane] = picture.reformat(format="rgb24").planes
    image = Image.frombytes("RGB", (plane.width, plane.height), plane, "raw", "RGB", plane.line_size, 1)
    matrix = SideDataContainer(picture).get("DISPLAYMATRIX")
    matrix = matrix and np.frombuffer(matrix, np.int32).tolist()
    return upright(image, matrix) if matrix else image, matrix


def has_hole(path: Path) -> bool:
    """Return whether bytes between the packets of a Matroska file belong to none, as where it is damaged."""
    last, end = None, math.inf
    with open_video(path) as container, suppress(load_av().error.FFmpegError, IndexError):
        for packet in container.demux():
            if not packet.size or packet.pos is None:
                continue
            if packet.pos > end + HOLE_BYTES:
                return True
            end = packet.size + (end if packet.pos == last else packet.pos)  # several may share a place
            last = packet.pos
    return False


class Video:
    """A video file.

    Attributes:
        rate: frames/s, the mean.
        num_frames: about how many there are, or None.
        origin: when it begins, s, by the clock of its file, which is that of its sound too.
        sample_aspect_ratio: of the upright frames' pixels, width by height; known with the first of them.
        lost: what could not be read of it, in words; complete once all frames were read.
        shifts: of `demux`.
        batch_size: frames that are worked on together.
    """

    def __init__(self, path: Path, start: float, end: float):
        """Open a file to read it from `start` until `end`, s.

        Raises:
            ValueError: it is not a video that FFmpeg can read.
        """
        self.name, self.path, self.start, self.end = str(path), path, start, end
        self.lost, self.shifts = [], []
        self._container = open_video(path)
        self._stream = self._container.streams.best("video")
        if self._stream is None:
            raise ValueError(f"{path} has no picture, only sound; name a video")
        codec = self._stream.codec_context
        if codec is None or codec.colorspace not in COLORSPACES:
            raise ValueError(f"{path} has a picture of a kind that FFmpeg cannot decode; convert it")
        if max(codec.width, codec.height) > MAX_SIDE or codec.width * codec.height > MAX_PIXELS:
            size = f"{codec.width}x{codec.height}"
            raise ValueError(f"{path} has frames of {size} pixels, which is too large; scale it down first")
        codec.options, codec.thread_type = {"max_pixels": str(MAX_PIXELS)}, "AUTO"
        self.batch_size = max(1, min(16, BATCH_PIXELS // max(1, codec.width * codec.height)))
        self.rate = self._stream.average_rate or self._stream.guessed_rate or Fraction(25)
        self.time_base = self._stream.time_base
        self.colors = (codec.colorspace or BT709, codec.color_primaries, codec.color_trc)  # 0 is RGB
        self.sample_aspect_ratio = self._stream.sample_aspect_ratio
        self.origin = (self._stream.start_time or 0) * self.time_base
        self._length = self._promised_length()
        self.num_frames = self._length and round((min(end, self._length) - start) * self.rate)

    def _promised_length(self) -> float | None:
        """Return how long the picture should be, or in some formats when it should end, s."""
        if self._container.format.name == "avi":  # where FFmpeg has the duration of what is there
            return float(self._stream.frames / self.rate) or None
        if self._stream.duration:
            return float(self._stream.duration * self.time_base)
        with suppress(argparse.ArgumentTypeError):
            end = clock_time(self._stream.metadata.get("DURATION", ""))
            return min(end, (self._container.duration or math.inf) / 10**6)  # the tag may be out of date
        return None

    def frames(self) -> Iterator[Frame]:
        """Read the frames from `start` until `end`, numbered from 0, all as large as the first."""
        numbers, size, time, last, ends = itertools.count(), None, Fraction(-1), Fraction(-1), Fraction(0)
        num_damaged, num_early, missing = 0, 0, 0.0
        kind = self._container.format.name
        max_gap = MAX_GAP if kind in MPEG else USUAL_GAP if kind == "matroska,webm" else math.inf
        for picture, after in itertools.pairwise(itertools.chain(self._pictures(), [None])):
            if picture is None:
                num_damaged += 1
                continue
            num_damaged += picture.is_corrupt
            is_timed = picture.pts is not None and not (after and (after.pts or math.inf) <= picture.pts)
            time = picture.pts * self.time_base - self.origin if is_timed else ends
            if time <= last:  # the timestamps are damaged, or it comes before what the file says is its start
                num_early += time < last - MISSED
                continue
            if time >= self.end:
                break
            image, matrix = read_picture(picture)
            if size is None:
                size, ends = image.size, time
                if matrix and abs(matrix[1]) > abs(matrix[0]) and self.sample_aspect_ratio:
                    self.sample_aspect_ratio = 1 / self.sample_aspect_ratio
                if time > self.start + MAX_LATE / self.rate:
                    self.lost.append(f"what comes before {float(time):.1f} s cannot be read")
            missing += float(time - ends) * (time - ends > max_gap)
            duration = (picture.duration or 0) * self.time_base or 1 / self.rate
            last, ends = time, time + duration
            pause = is_timed and after and after.pts and (after.pts - picture.pts) * self.time_base
            is_hole = pause and kind in MPEG and pause - duration > max_gap
            duration = duration if is_hole else pause or duration  # the file's own may be wrong
            if time >= self.start:
                image = image if image.size == size else image.resize(size)
                yield Frame(next(numbers), time, duration, image)
        if num_damaged:
            self.lost.append(f"damaged parts were left out or guessed: {num_damaged}")
        if missing and (max_gap != USUAL_GAP or has_hole(self.path)):
            self.lost.append(f"{missing:.1f} s in between are missing")
        if num_early:
            self.lost.append(f"pictures were left out, as the times in it go back: {num_early}")
        is_whole = time < self.end  # it was read to its own end
        if is_whole and self._length and max(ends, self.origin + ends) < self._length - MISSED:
            text = f"it ends at {float(ends):.1f} of {self._length:.1f} s"
            self.lost.append(f"{text}, or its header is wrong")

    def _pictures(self) -> Iterator[av.VideoFrame | None]:
        """Decode the pictures from `start` or a little earlier on."""
        av = load_av()
        if not self.start or self._stream.start_time is None:  # no times that could be searched for
            return decode(demux(self._container, self._stream, self.shifts), self._stream)
        for early in (0, 10, self.start + 10):  # s; MPEG-TS is searched by time, not for a keyframe
            target = self.origin + Fraction(self.start - early)
            with suppress(av.error.FFmpegError):
                self._container.seek(int(target / self.time_base), stream=self._stream)
            pictures = decode(demux(self._container, self._stream, self.shifts), self._stream)
            first = next(filter(None, pictures), None)
            if first and (first.pts is None or first.pts * self.time_base - self.origin <= self.start):
                break
        return itertools.chain(filter(None, [first]), pictures)

    def close(self) -> None:
        """Close the file."""
        self._container.close()


class Camera:
    """A camera, or a stream that OpenCV opens, until Ctrl-C or SIGTERM. Attributes as of `Video`."""

    batch_size = 1  # so that the window shows what is now
    path, num_frames, time_base = None, None, Fraction(1, 90_000)
    colors, sample_aspect_ratio = (BT709, BT709, BT709), None

    def __init__(self, device: str, start: float, end: float):
        """Open a camera by its number, or a stream by its address, to read it from `start` until `end`, s.

        Raises:
            ValueError: it does not open.
        """
        cv2 = load_opencv()
        cv2.utils.logging.setLogLevel(
            cv2.utils.logging.LOG_LEVEL_SILENT
        )  # the error below says what is wrong
        self.name, self.start, self.end, self.lost = camera_name(device), start, end, []
        self._capture = cv2.VideoCapture(int(device) if device.isdecimal() else device)
        if not self._capture.isOpened():
            name = PASSWORD.sub("", device)
            raise ValueError(f"camera {name} does not open; is it there, and does no other program use it?")
        self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        rate = self._capture.get(cv2.CAP_PROP_FPS)  # 0, -1, infinite or arbitrary where it is not known
        self.rate = Fraction(rate if 0.1 < rate < 1000 else 30).limit_denominator(1001)
        self._is_ended = threading.Event()
        self._handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
        for each, handler in self._handlers.items():
            if handler != signal.SIG_IGN:  # a background run's stays ignored
                signal.signal(each, lambda *_: self._is_ended.set())

    def frames(self) -> Iterator[Frame]:
        """Read the frames as they come, as `Video.frames`; their times are those at which they were read."""
        opened, last, numbers = time.monotonic(), -1 / self.rate, itertools.count()
        while not self._is_ended.is_set():
            is_read, pixels = self._capture.read()
            now = round((time.monotonic() - opened) / self.time_base) * self.time_base
            if not is_read or now >= self.end:
                break
            if now >= self.start:
                yield Frame(next(numbers), now, now - last, Image.fromarray(pixels[:, :, ::-1]))
            last = now

    def close(self) -> None:
        """Give the camera back, and the signals their meaning."""
        for each, handler in self._handlers.items():
            signal.signal(each, handler)
        self._capture.release()


def camera_name(device: str) -> str:
    """Name a camera's outputs: camera0 for 0."""
    return "camera" + re.sub(r"\W+", "_", PASSWORD.sub("", device))


def clock_time(text: str) -> float:
    """Read a time as seconds or as [h:]mm:ss, for argparse."""
    if not re.fullmatch(r"(\d+:){0,2}\d+(\.\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text} is not a time; expected seconds, mm:ss or h:mm:ss")
    return sum(float(part) * 60**power for power, part in enumerate(reversed(text.split(":"))))


def in_background(items: Iterator, ahead: int) -> Iterator:
    """Let a thread of its own run an iterator, up to `ahead` items ahead of the reader."""
    end = object()
    worker = ThreadPoolExecutor(1)
    try:
        upcoming = deque(worker.submit(next, items, end) for _ in range(ahead))
        while (item := upcoming.popleft().result()) is not end:
            upcoming.append(worker.submit(next, items, end))
            yield item
    finally:
        worker.shutdown(cancel_futures=True)


# --- tracks ---

LOST_AFTER = 0.5  # s without a sight of the face, then its track ends; chosen here
MIN_IOU = 0.3  # of the box where a track is expected and a box that may be its face; as in SORT (Bewley 2016)
# Of the box where a face is expected and what the last stage makes of it. Over and over on one frame, it is
# 0.98 and more for a whole face, but 0.77 to 0.79 for one that the edge cuts: such a box grows without end.
NEAR_IOU = 0.8
KEEP_PROB = 0.7  # of the last stage for a known face; MTCNN's own threshold
# Mean difference of two frames' gray thumbnails that makes a cut. In four videos, neighbouring frames of a
# shot differ by 10.3 at most, frames of two videos by 57 at least (32x18 pixels, values 0-255).
CUT, THUMBNAIL = 25, (32, 18)
SWITCH_LEAD = 0.1  # by which another emotion's smoothed probability must lead for the label to change
MEMORY = 5  # time constants of smoothing after which a classification no longer counts
AHEAD = 1  # time constants that the smoothing of a file looks ahead: 86 % of what is to come
AHEAD_PIXELS = 2**26  # of the frames that wait for it: 32 of full HD
# How a face is known again: by a small colour picture of the head, less its mean, of unit length. Of 10,202
# pairs of two people in three videos and the photos, the most alike had a cosine of 0.797, and 0.1 % reach
# ALIKE_HERE; of one person's views in the videos, 0.5 to 10 s apart, 87 % reach ALIKE, and 96 % ALIKE_HERE.
# The classifier's embedding tells no people apart: two had 0.989, and 2 % of one person's views reached that.
VIEW_MARGIN, VIEW_SIZE, VIEW_EVERY, NUM_VIEWS = 1.0, 16, 0.5, 10  # pixels; s
ALIKE, ALIKE_HERE = 0.82, 0.75  # the latter where the face was lost, in the same shot


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Areas that boxes (N, 4) share with others (M, 4): (N, M)."""
    starts = np.maximum(boxes[:, None, :2], others[None, :, :2])
    ends = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return (ends - starts).clip(0).prod(2)


def box_ious(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (N, 4) with others (M, 4): (N, M)."""
    areas, other_areas = ((part[:, 2:] - part[:, :2]).prod(1) for part in (boxes, others))
    common = overlaps(boxes, others)
    return common / (areas[:, None] + other_areas - common)


def match_boxes(boxes: np.ndarray, others: np.ndarray) -> dict[int, int]:
    """Pair boxes (N, 4) with others (M, 4), the best IoU first, none below MIN_IOU; return index to index."""
    ious, pairs = box_ious(boxes, others), {}
    while ious.size and ious.max() >= MIN_IOU:
        i, j = map(int, np.unravel_index(ious.argmax(), ious.shape))
        pairs[i] = j
        ious[i], ious[:, j] = 0, 0
    return pairs


@dataclass(eq=False)
class Track:
    """One face over time: where it is, and what it looks like."""

    box: np.ndarray  # (4,) xyxy, where it was last seen
    time: float  # s, when
    number: int = 0  # from 1
    velocity: np.ndarray = field(default_factory=lambda: np.zeros(2))  # of the box's centre, pixels/s
    is_lost: bool = False  # no longer looked for where it should be, but known again if it comes back
    has_place: bool = True  # there was no cut since it was last seen
    is_classified: bool = False  # or is about to be
    samples: list[tuple[float, np.ndarray]] = field(default_factory=list)  # s and probabilities (C,)
    emotion: int | None = None  # index of the class that labels it
    views: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=NUM_VIEWS))  # of `face_view`
    viewed: float = -math.inf  # s, when the last of them was taken

    def expected(self, time: float) -> np.ndarray:
        """Return where the face should be at a time, going on as it did: (4,)."""
        return self.box + np.tile(self.velocity * (time - self.time), 2)

    def move(self, box: np.ndarray, time: float) -> None:
        """Take in that the face was seen."""
        if self.is_lost:
            self.velocity, self.is_lost, self.is_classified = np.zeros(2), False, False
        elif time > self.time:
            shift = (box - self.box).reshape(2, 2).mean(0)
            self.velocity = (self.velocity + shift / (time - self.time)) / 2
        self.box, self.time, self.has_place = box, time, True

    def smooth(self, time: float, time_constant: float, is_centred: bool) -> np.ndarray:
        """Return the probabilities (C,) at a time, smoothed, and choose the label, for times that go on.

        A sample's weight falls exponentially with its distance in time. If `is_centred`, those that came
        later count like those before, and the weight falls twice as fast, which removes as much noise.
        """
        recent = [each for each in self.samples if each[0] >= time - MEMORY * time_constant]
        self.samples = recent or self.samples[-1:]
        times, probs = zip(*self.samples, strict=True)
        smoothed = probs[-1]
        if time_constant:
            distances = np.abs(np.array(times) - time) * (2 if is_centred else 1)
            weights = np.exp((distances.min() - distances) / time_constant)
            smoothed = weights @ np.array(probs) / weights.sum()
        top = int(smoothed.argmax())
        lead = SWITCH_LEAD if time_constant else 0
        if self.emotion is None or smoothed[top] > smoothed[self.emotion] + lead:
            self.emotion = top
        return smoothed


class Sighting(NamedTuple):
    """A track's face in one frame; the last three as in a row of `model.Faces`."""

    track: Track
    box: np.ndarray
    prob: float
    landmarks: np.ndarray


def face_view(image: Image.Image, box: np.ndarray) -> np.ndarray:
    """Return what a head looks like, for ALIKE: (3 * VIEW_SIZE ** 2,) float32; zeros if it is all one."""
    [crop] = shared.crop_faces(image, box[None], VIEW_MARGIN)
    size = (VIEW_SIZE, VIEW_SIZE)
    view = np.asarray(crop.resize(size, Image.Resampling.BILINEAR, reducing_gap=2), np.float32).ravel()
    view -= view.mean()
    return view / max(np.linalg.norm(view), 1e-6)


class Tracker:
    """Finds out which face of a frame is which face of the frames before."""

    def __init__(self, finder: shared.FaceFinder, rejoin: float = 0.0):
        """Start without a face; one that comes back within `rejoin` s is known again."""
        self._finder, self._rejoin = finder, rejoin
        self._tracks: list[Track] = []
        self._numbers = itertools.count(1)

    def forget_places(self) -> None:
        """Take in that there is a cut: no face is where it was."""
        for track in self._tracks:
            track.is_lost, track.has_place = True, False

    def follow(self, image: Image.Image, time: float, found: shared.Faces | None) -> list[Sighting]:
        """See where the faces are in the next frame, by track number.

        Args:
            image: RGB.
            time: of the frame, s.
            found: all its faces if it was searched; they start tracks. A known face that is not among them is
                looked for where it should be, with the cascade's last stage alone.
        """
        image_box = np.array([(0, 0, *image.size)], np.float32)
        present = [track for track in self._tracks if not track.is_lost]
        expected = np.array([track.expected(time) for track in present], np.float32).reshape(-1, 4)
        pairs = match_boxes(expected, found.boxes) if found else {}
        seen = [Sighting(present[i], *(part[j] for part in found)) for i, j in pairs.items()]

        missed = [
            i for i in range(len(expected)) if i not in pairs and overlaps(expected[[i]], image_box) > 0
        ]
        refined = self._finder.refine(image, expected[missed])
        is_face = refined.probs >= min(KEEP_PROB, self._finder.min_prob)
        is_near = box_ious(expected[missed], refined.boxes).diagonal() >= NEAR_IOU
        if found:
            is_face &= is_near
        else:  # at the image's edge the last stage may drift off; the next search puts it right
            refined = refined._replace(boxes=np.where(is_near[:, None], refined.boxes, expected[missed]))
        is_face &= overlaps(refined.boxes, image_box)[:, 0] > 0
        seen += [
            Sighting(present[missed[i]], *(part[i] for part in refined)) for i in np.flatnonzero(is_face)
        ]
        # A box that has drifted off may lie on another face, whose own sighting then has to come first.
        drifted = {present[missed[i]].number for i in np.flatnonzero(~is_near)}
        seen.sort(key=lambda each: (each.track.number in drifted, each.track.number))

        for j in sorted(set(range(len(found.boxes) if found else 0)) - set(pairs.values())):
            seen.append(Sighting(Track(found.boxes[j], time), *(part[j] for part in found)))
        boxes = np.array([sighting.box for sighting in seen]).reshape(-1, 4)
        kept = list(itertools.compress(seen, shared.is_distinct(boxes, of_smaller=True)))
        unseen = set(self._tracks) - {sighting.track for sighting in seen}
        away = [track for track in self._tracks if track in unseen]
        if self._rejoin:
            kept = self._known_again(image, time, kept, away)
        for sighting in kept:
            sighting.track.move(sighting.box, time)
            sighting.track.number = sighting.track.number or next(self._numbers)
        here = [sighting.track for sighting in kept]
        for track in away:
            track.is_lost |= time - track.time > LOST_AFTER
        kept_away = [
            track
            for track in away
            if track not in here and (not track.is_lost or time - track.time <= self._rejoin)
        ]
        self._tracks = here + kept_away
        return sorted(kept, key=lambda sighting: sighting.track.number)

    def _known_again(
        self, image: Image.Image, time: float, sightings: Sequence[Sighting], away: Sequence[Track]
    ) -> list[Sighting]:
        """Give new tracks' sightings to those tracks `away` whose faces they are; keep views of all."""
        due = [each for each in sightings if time - each.track.viewed >= VIEW_EVERY]
        for sighting in due:
            sighting.track.views.append(face_view(image, sighting.box))
            sighting.track.viewed = time
        new = [each.track for each in due if not each.track.number]
        scores = np.zeros((len(new), len(away)))
        for i, j in np.ndindex(scores.shape):
            alike = float(np.max(np.array(away[j].views) @ new[i].views[-1]))
            is_near = box_ious(away[j].box[None], new[i].box[None])[0, 0] >= MIN_IOU
            is_here = away[j].has_place and is_near
            scores[i, j] = alike + is_here if alike >= (ALIKE_HERE if is_here else ALIKE) else 0
        known = {}
        while scores.size and scores.max():
            i, j = map(int, np.unravel_index(scores.argmax(), scores.shape))
            away[j].views.append(new[i].views[-1])
            away[j].viewed, away[j].is_lost, known[new[i]] = time, True, away[j]
            scores[i], scores[:, j] = 0, 0
        return [each._replace(track=known.get(each.track, each.track)) for each in sightings]


def is_cut(thumbnail: np.ndarray, before: np.ndarray) -> bool:
    """Return whether a new shot begins, from the gray thumbnails of a frame and the one before."""
    return float(np.abs(thumbnail - before).mean()) > CUT


def sight_faces(frames: Iterator[Frame], kit: Kit, batch_size: int) -> Iterator[tuple[Frame, list[Sighting]]]:
    """Find, follow and classify the faces of a video; yield each frame once its tracks have its samples."""
    tracker, searched, before = Tracker(kit.finder, kit.rejoin), -math.inf, None
    while batch := list(itertools.islice(frames, batch_size)):
        cuts, searches = set(), []
        for frame in batch:
            small = frame.image.resize(THUMBNAIL, Image.Resampling.NEAREST)
            thumbnail = np.asarray(small.convert("L"), float)
            if before is not None and is_cut(thumbnail, before):
                cuts.add(frame.number)
            if frame.number in cuts or frame.time - searched >= kit.search_every:
                searches.append(frame)
                searched = frame.time
            before = thumbnail
        results = kit.finder.find_all([frame.image for frame in searches])
        found = {frame.number: faces for frame, faces in zip(searches, results, strict=True)}

        seen, asked = [], []
        for frame in batch:
            if frame.number in cuts:
                tracker.forget_places()
            seen.append(tracker.follow(frame.image, float(frame.time), found.get(frame.number)))
            is_due = frame.number % kit.every == 0
            asked.append([each for each in seen[-1] if is_due or not each.track.is_classified])
            for sighting in asked[-1]:
                sighting.track.is_classified = True
        boxes = [np.array([each.box for each in part], np.float32).reshape(-1, 4) for part in asked]
        answers = kit.classifier.predict_all([frame.image for frame in batch], boxes)
        for frame, sightings, part, probs in zip(batch, seen, asked, answers, strict=True):
            for sighting, face_probs in zip(part, probs, strict=True):
                sighting.track.samples.append((float(frame.time), face_probs.astype(float)))
            yield frame, sightings


def follow_faces(
    frames: Iterator[Frame], kit: Kit, *, batch_size: int, is_live: bool
) -> Iterator[tuple[Frame, list[dict]]]:
    """Find, follow and classify the faces of a video; yield each frame with its faces, by track number.

    The faces are of `model.face_record`, with the number of their `track` and smoothed probabilities.

    Args:
        frames: all of one size.
        batch_size: frames that are searched and classified together.
        is_live: yield a frame at once; else it waits for those that smoothing looks ahead to.
    """
    waiting, ahead = deque(), 0 if is_live else AHEAD * kit.smooth
    for last in itertools.chain(sight_faces(frames, kit, batch_size), [None]):  # at the end nothing waits
        if last:
            waiting.append(last)
            most = AHEAD_PIXELS // (last[0].image.width * last[0].image.height)
        while waiting and (not last or last[0].time - waiting[0][0].time >= ahead or len(waiting) > most):
            frame, sightings = waiting.popleft()
            faces = []
            for track, *face in sightings:
                probs, size = track.smooth(float(frame.time), kit.smooth, not is_live), frame.image.size
                record = shared.face_record(
                    face, probs, kit.classifier.classes, size, unsure=kit.unsure, emotion=track.emotion
                )
                faces.append({"track": track.number, **record})
            yield frame, faces


# --- privacy ---

# By finders and an identity network on 31 photos and three videos, see resources/EXPERIMENTS.md.
HEAD = (-0.35, -0.45, 0.35, 0.2)  # what a head has beyond its face's box, in the box's sides
NUM_TILES = 6  # squares along the longer side of a hidden head
HIDDEN_AROUND = 0.5  # s before and after each sight of a face to be hidden; chosen here
HIDDEN_GROWTH = 1.0  # of the box's sides, by which it grows each way for each s away from a sight
DELAY_PIXELS = 2**28  # of the frames that wait for it, which is half a second of 4K at 60 frames/s


def labels_to_hide(names: Sequence[str], labels: Iterable[str]) -> set[str]:
    """Return the labels that --blur hides: UNSURE too, for such a face may look like any of them.

    Raises:
        ValueError: there is no such label.
    """
    labels = list(labels)
    if unknown := [name for name in names if name not in {*labels, "all"}]:
        known = ", ".join(labels)
        raise ValueError(f"--blur {unknown[0]} is none of {known}, or all; put INPUT before --blur")
    return {*(labels if "all" in names else names), shared.UNSURE} if names else set()


def hide_heads(image: Image.Image, boxes: Iterable[Sequence[float]]) -> Image.Image:
    """Return a copy of the image where an oval around each face, as large as the head, is a few squares."""
    copy = image.copy()
    for x0, y0, x1, y1 in boxes:
        head = np.array((x0, y0, x1, y1)) + np.array(HEAD) * np.tile((x1 - x0, y1 - y0), 2)
        corner = np.floor(head[:2]).clip(0, image.size).astype(int)
        size = np.ceil(head[2:]).clip(0, image.size).astype(int) - corner
        if (size <= 0).any():
            continue
        tile = (head[2:] - head[:2]).max() / NUM_TILES
        part = image.crop((*corner.tolist(), *(corner + size).tolist()))
        tiles = part.resize((size / tile).round().clip(1).astype(int).tolist(), Image.Resampling.BOX)
        mask = Image.new("L", part.size)
        ImageDraw.Draw(mask).ellipse((head - np.tile(corner, 2)).tolist(), fill=255)
        copy.paste(tiles.resize(part.size, Image.Resampling.NEAREST), corner.tolist(), mask)
    return copy


def hide_in_frames(
    followed: Iterable[tuple[Frame, list[dict]]],
    hidden: Container[str],
    look_ahead: float,
    look_back: float = HIDDEN_AROUND,
) -> Iterator[tuple[Frame, list[dict]]]:
    """Pass on what `follow_faces` gives, the heads of faces whose label is `hidden` made squares.

    A face is hidden from `look_ahead` s before each such sight of it until `look_back` s after it, whatever
    its label there, and also where it is not found. The frames come as much later, or a little earlier if
    they are very large.
    """
    waiting, sights = deque(), defaultdict(deque)

    def hide_next() -> tuple[Frame, list[dict]]:
        frame, faces = waiting.popleft()
        now, boxes = float(frame.time), []
        for track, seen in list(sights.items()):
            while seen and seen[0][0] < now - look_back:
                seen.popleft()
            near = [sight for sight in seen if sight[0] <= now + look_ahead]
            if any(is_hidden for _, _, is_hidden in near):
                times, known, _ = (np.array(part) for part in zip(*near, strict=True))
                box = np.array([np.interp(now, times, side) for side in known.T])
                away = min(np.abs(times - now).min(), HIDDEN_AROUND) * HIDDEN_GROWTH
                boxes.append(box + away * np.tile(box[2:] - box[:2], 2) * (-1, -1, 1, 1))
            elif not seen:
                del sights[track]
        return frame._replace(image=hide_heads(frame.image, boxes)), faces

    for frame, faces in followed:
        waiting.append((frame, faces))
        for face in faces:
            sights[face["track"]].append((float(frame.time), face["box"], face["emotion"] in hidden))
        max_waiting = DELAY_PIXELS // (frame.image.width * frame.image.height)
        while waiting and (frame.time - waiting[0][0].time >= look_ahead or len(waiting) > max_waiting):
            yield hide_next()
    while waiting:
        yield hide_next()


# --- labels ---

# Okabe and Ito's colours, which the colour-blind can tell apart too (https://jfly.uni-koeln.de/color/). The
# five classes of the shipped model have those that they confuse least.
COLORS = {
    "angry": "#D55E00",
    "disgusted": "#009E73",
    "happy": "#F0E442",
    "sad": "#0072B2",
    "surprised": "#56B4E9",
    "fearful": "#CC79A7",
    "neutral": "#E69F00",
    "contemptuous": "#000000",
}
SPARE_COLORS = ("#332288", "#DDCC77", "#882255", "#117733")  # of Paul Tol's "muted" scheme, the four farthest
UNSURE_COLOR = "#8A8A8A"  # of no emotion
# Chosen here by looking at portraits and at groups of up to 67 faces.
MIN_FONT_SIZE = 12  # pixels; smaller letters run together
LINE_WIDTH, PADDING, LABEL_HEIGHT = 1 / 7, 1 / 4, 5 / 4  # in font sizes
NUM_PLACES = 12  # for a label: above, below, inside its box at the top or bottom; flush left, right, centred
# What a place costs, in squares of the label's height: for each step down the list of places, and for each
# square of its own face and of other labels that it hides. A square of another face costs 1.
STEP_COST, OWN_FACE_COST, LABEL_COST = 0.02, 0.5, 4.0
NUM_SWEEPS = 4  # times that each label may look for a better place
MOVE_COST = 1.0  # in a video, for any other place than in the frame before
# Chosen here by looking at labelled videos. What is drawn rests until the truth is this far off.
STEADY_BOX = 0.04  # of the box's longer side
STEADY_PROB = 0.05
STEADY_FONT = 0.2  # of the font's size


def class_colors(classes: Sequence[str]) -> dict[str, str]:
    """Give each class its colour; one that has none gets one that no other has, up to twelve classes."""
    free = [color for name, color in COLORS.items() if name not in classes]
    spare = itertools.cycle([*free, *SPARE_COLORS])
    return {name: COLORS.get(name) or next(spare) for name in classes}


def text_color(color: str) -> str:
    """Return "black" or "white", whichever has more contrast on `color`.

    Source: WCAG 2.1, relative luminance and contrast ratio.
    """
    values = np.array(ImageColor.getrgb(color)) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"


@functools.cache
def load_font(path: Path | None, size: int) -> Font:
    """Load a font file, or else the font that Pillow brings along, at a size in pixels."""
    try:
        return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)
    except OSError as error:
        raise ValueError(f"{path} is not a font ({error}); name a TrueType or OpenType file") from None


def report_letters(words: Iterable[str], font: Font) -> None:
    """Print on stderr for which letters of some words a font has nothing but its sign for missing ones."""

    def drawn(letter: str) -> tuple:
        mask = font.getmask(letter)
        return mask.size, bytes(mask)

    sign = drawn("\U0010ffff")  # which is no character
    letters = {letter for letter in "".join(words) if letter.strip() and drawn(letter) == sign}
    if letters:
        lacking = "".join(sorted(letters))
        print(f"the labels' font lacks {lacking}; name one that has them by --font", file=sys.stderr)


def label_size(text: str, font: Font) -> tuple[int, int]:
    """Return width and height in pixels of a label with its padding."""
    width = font.getlength(text) + 2 * PADDING * font.size
    return math.ceil(width), math.ceil(LABEL_HEIGHT * font.size)


def fit_font(path: Path | None, word: str, box: Sequence[float], image_size: Sequence[int]) -> Font:
    """Choose a face's font, readable unless a `word` of MIN_FONT_SIZE would not fit into the image."""
    face = min(box[2] - box[0], box[3] - box[1])
    suiting_both = (face / 6 * min(image_size) / 32) ** 0.5  # geometric mean: what suits the face, the image
    size = max(round(min(suiting_both, face / 3)), MIN_FONT_SIZE)
    while size > 1 and np.greater(label_size(word, load_font(path, size)), image_size).any():
        size -= 1
    return load_font(path, size)


def label_places(box: np.ndarray, sizes: Sequence, image_size: Sequence[int]) -> np.ndarray:
    """List a label's places at a box, inside the image, for T sizes, best first: (T * NUM_PLACES, 4)."""
    x0, y0, x1, y1 = box
    corners_and_sizes = [
        (min(max(x, 0), image_size[0] - width), min(max(y, 0), image_size[1] - height), width, height)
        for width, height in sizes
        for y in (y0 - height, y1, y0, y1 - height)
        for x in (x0, x1 - width, (x0 + x1 - width) // 2)
    ]
    corners, sizes = np.hsplit(np.array(corners_and_sizes, float), 2)
    return np.hstack([corners, corners + sizes])


def place_labels(
    boxes: np.ndarray, sizes: Sequence, image_size: Sequence[int], before: Sequence[int | None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Choose each label's wording and place so that little of the faces and of the other labels is hidden.

    Each label in turn takes the place that costs least beside the others' present ones, several times over.

    Args:
        boxes: N faces, (N, 4) xyxy.
        sizes: width and height of each label's T wordings, (N, T, 2), the preferred wording first; the last
            must fit into the image.
        image_size: width and height.
        before: what this function chose for the frame before, which is kept unless another is much better.

    Returns:
        What was chosen (N,), wording * NUM_PLACES + place, and the labels (N, 4) xyxy, inside the image.
    """
    chosen, labels = np.zeros(len(boxes), int), np.zeros((len(boxes), 4))
    before = before or [None] * len(boxes)
    places = [label_places(box, size, image_size) for box, size in zip(boxes, sizes, strict=True)]
    for i, place in enumerate(before):
        if place is not None:
            labels[i] = places[i][place]
    for _ in range(NUM_SWEEPS):
        earlier = labels.copy()
        for i in range(len(boxes)):
            labels[i] = 0
            face_costs = np.where(np.arange(len(boxes)) == i, OWN_FACE_COST, 1)
            covered = overlaps(places[i], boxes) @ face_costs
            covered += LABEL_COST * overlaps(places[i], labels).sum(1)
            cost = covered / sizes[i][0][1] ** 2 + STEP_COST * np.arange(len(places[i]))
            if before[i] is not None:
                cost += MOVE_COST * (np.arange(len(cost)) != before[i])
            cost[(places[i] < 0).any(1)] = np.inf  # does not fit into the image
            chosen[i] = cost.argmin()
            labels[i] = places[i][chosen[i]]
        if (labels == earlier).all():
            break
    return chosen, labels


class Drawn(NamedTuple):
    """How a face was drawn in the frame before."""

    box: np.ndarray
    emotion: str
    prob: float
    font: Font
    place: int


def steady_face(face: dict, font: Font, last: Drawn | None) -> tuple[np.ndarray, float, Font]:
    """Choose box, probability and font to draw: those of the frame before until the true ones are far off."""
    box = np.array(face["box"])
    if last is None:
        return box, face["prob"], font
    slack = STEADY_BOX * max(box[2] - box[0], box[3] - box[1])
    box = box + (last.box - box).clip(-slack, slack)
    keeps_prob = face["emotion"] == last.emotion and abs(face["prob"] - last.prob) < STEADY_PROB
    keeps_font = abs(font.size - last.font.size) <= STEADY_FONT * last.font.size
    return box, last.prob if keeps_prob else face["prob"], last.font if keeps_font else font


def draw_faces(
    image: Image.Image,
    faces: Sequence[dict],
    colors: dict[str, str],
    font_path: Path | None = None,
    drawn: dict[int, Drawn] | None = None,
) -> Image.Image:
    """Return a copy of the image with a box and a label for each of the `faces`, of `model.face_record`.

    `drawn` makes a video's labels stand still: the same dict for each frame in turn; it holds, by track, what
    was drawn last, and is changed in place.
    """
    last = [drawn.get(face["track"]) if drawn else None for face in faces]
    names = [f"{face['track']} {face['emotion']}" if "track" in face else face["emotion"] for face in faces]
    fonts = [
        fit_font(font_path, name, face["box"], image.size) for name, face in zip(names, faces, strict=True)
    ]
    steady = [steady_face(*each) for each in zip(faces, fonts, last, strict=True)]
    boxes, probs, fonts = zip(*steady, strict=True) if steady else ((), (), ())
    edges = np.array(boxes).reshape(-1, 4).round()
    emotions = [face["emotion"] for face in faces]
    texts = [(f"{name} {prob:.0%}", name) for name, prob in zip(names, probs, strict=True)]
    sizes = [[label_size(text, font) for text in pair] for pair, font in zip(texts, fonts, strict=True)]
    chosen, labels = place_labels(edges, sizes, image.size, [each and each.place for each in last])

    copy = image.copy()
    draw = ImageDraw.Draw(copy)
    fills = [colors[name] for name in emotions]
    for (x0, y0, x1, y1), fill, font in zip(edges, fills, fonts, strict=True):
        corners = (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1))  # Pillow's rectangles include their last pixel
        draw.rectangle(corners, outline=fill, width=max(1, round(LINE_WIDTH * font.size)))
    for i, (x0, y0, x1, y1) in enumerate(labels):
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fills[i], outline=text_color(fills[i]))
        center, text = ((x0 + x1) / 2, (y0 + y1) / 2), texts[i][chosen[i] // NUM_PLACES]
        draw.text(center, text, text_color(fills[i]), fonts[i], anchor="mm")
    if drawn is not None:
        tracks = [face["track"] for face in faces]
        drawn.clear()
        drawn.update(zip(tracks, map(Drawn, boxes, emotions, probs, fonts, chosen), strict=True))
    return copy


# --- outputs ---

# libx264 on 200 frames of 640x360, one run, CPU ms a frame and size: superfast 2.4 and 1144 kB, veryfast 3.3
# and 621 kB, faster 5.8 and 653 kB, medium 9.4 and 666 kB; PSNR at this crf 44.1, 42.8, 44.0, 44.4 dB.
ENCODER_OPTIONS = {"preset": "veryfast", "crf": "20"}
LARGE_OPTIONS = {**ENCODER_OPTIONS, "tune": "zerolatency"}  # it holds no frames back, 2 GB of them in 8K
MPEG_RANGE = 1  # FFmpeg's number for 16-235 as black to white
COPIED_SOUND = ("aac", "mp3", "opus", "flac")  # what browsers play from MP4; all else becomes AAC
AAC_LAYOUTS = ("mono", "stereo", "3.0", "4.0", "5.0", "5.1")  # by the number of channels
NUM_BINS, BIN_WIDTH = 600, Fraction(1, 10)  # of a timeline; s, doubled when the video is longer than all bins
NUM_PLOTTED, NUM_PICTURED = 8, 32  # tracks in the plot; tracks whose picture is kept to choose from
PICTURE_SIZE = 96  # pixels, of a face beside its timeline, and in the report
CROP_EVERY = 1.0  # s, from a crop of a track to the next
CHUNK = 5000  # faces that wait to be summed up together
STDOUT = Path("-")  # of --csv
TABLES_END, PAGES_END = (".csv", ".parquet"), (".html", ".htm")
OTHERS_END = (".json", ".jsonl", ".ods", ".pdf", ".xls", ".xlsx")  # what a table or page might be taken for
TEXT_COLUMNS = ("file", "emotion")  # of Parquet; all others are numbers


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image in the format that the path's suffix names, with its colour profile and MARK only."""
    image_format = Image.registered_extensions()[path.suffix.lower()]
    options = {"quality": 95, "subsampling": "4:4:4", "icc_profile": image.info.get("icc_profile")}
    options["exif"], options["comment"] = Image.Exif(), MARK  # JPEG 2000 has comments, no EXIF
    options["exif"][ExifTags.Base.Software] = MARK
    file = io.BytesIO()  # on a disk that gets full, Pillow leaves half a file and says nothing
    image.save(file, image_format, **options)
    if image_format == "BMP":  # has no place for texts, but its readers ignore what follows
        file.write(MARK.encode())
    with shared.replacing(path) as temporary:
        temporary.write_bytes(file.getvalue())


def text_cell(text: object) -> str:
    """Return a text as a cell that a spreadsheet takes for text, not for a formula, and that is one line."""
    text = shared.printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def write_rows(file: TextIO, rows: Iterable[Sequence], num_columns: int) -> None:
    """Write rows as CSV, each filled up with empty cells."""
    for row in rows:
        cells = [text_cell(cell) if isinstance(cell, str) else cell for cell in row]
        csv.writer(file).writerow(cells + [None] * (num_columns - len(cells)))


@contextmanager
def fatal_if_unwritable(name: str | Path) -> Iterator[None]:
    """Let a result that cannot be written end the run, however many inputs are left."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.exit(f"error: cannot write {shared.printable(name)}: {error.strerror}")


JOURNAL_FORMAT = 1  # to be raised when a column comes to hold something else; new ones are noticed
# The options on which rows depend, beside the model.
ROW_OPTIONS = ("emotions", "unsure", "min_face_prob", "min_face_size", "start", "end", "every")
ROW_OPTIONS += ("search_every", "smooth", "rejoin", "empty_rows", "blur")


class Table:
    """A table of all inputs, whose rows wait in a journal beside it until it is complete.

    The journal of faces.csv is .faces.csv.journal, JSON Lines: first who wrote it and the settings; then, for
    each input, its rows, as lists, and once all are there an object with its `file` and `stamp`, its size
    and time of change. A later run with the same settings takes from it the rows of what has not changed.
    Where several processes work together, each has a journal, and the first writes the table.

    Attributes:
        parts: where the rows of finished inputs are: a journal, and first and last byte.
    """

    def __init__(self, path: Path, settings: dict, sources: Sequence[Source], is_anew: bool):
        """Find out what the journal has of the `sources`, in whose order the rows will be.

        Args:
            path: of the table; .parquet says that it is to be Parquet, anything else CSV.
            settings: on which the rows depend, as JSON.
            sources: all, be they finished or not.
            is_anew: take nothing from the journal.

        Raises:
            ValueError: there is no package that writes Parquet.
        """
        if path.suffix.lower() == ".parquet" and not importlib.util.find_spec("pyarrow"):
            raise ValueError(f"{path} needs pyarrow, which is not there; pip install pyarrow, or name a .csv")
        self.path, self._is_anew, (rank, _) = path, is_anew, shared.place()
        self.journal = path.with_name(f".{path.name}.journal{f'-{rank}' if rank else ''}")
        head = {"written_by": MARK, "format": JOURNAL_FORMAT, **settings}
        self._head = f"{json.dumps(head)}\n".encode()
        self._stamps = {}
        for source in sources:
            with suppress(OSError):  # a camera, or a file that is missing, which is found out later
                state = source.path.stat()
                self._stamps[str(source.path)] = [state.st_size, state.st_mtime_ns]
        self._order = [str(source.path) for source in sources]
        self._read()

    def _journals(self) -> list[Path]:
        """List this process's journal, and those that others have or had."""
        others = self.path.parent.glob(f"{glob.escape(f'.{self.path.name}.journal')}*")
        return sorted({self.journal, *others})

    def _read(self) -> None:
        """Find where in the journals the rows of inputs begin and end, in bytes."""
        self.parts, self._end = {}, 0
        for journal in [] if self._is_anew else self._journals():
            damages = (OSError, ValueError, LookupError, TypeError, RecursionError)
            with suppress(*damages), journal.open("rb") as file:
                if file.readline() != self._head:
                    continue
                start = end = file.tell()
                for line in file:
                    end += len(line)
                    note = json.loads(line)
                    if not isinstance(note, list):  # of which each is a row
                        if note["stamp"] and note["stamp"] == self._stamps.get(note["file"]):
                            self.parts[note["file"]] = (journal, start, end - len(line))
                        start = end
                        if journal == self.journal:
                            self._end = end

    def has(self, source: Source) -> bool:
        """Return whether all rows of an input are in a journal."""
        return str(source.path) in self.parts

    def rows(self) -> Iterator[list]:
        """Read the rows of all inputs that have them."""
        for journal, start, end in [self.parts[name] for name in self._order if name in self.parts]:
            with journal.open("rb") as file:
                file.seek(start)
                while file.tell() < end:
                    yield json.loads(file.readline())

    @contextmanager
    def writing(self, columns: Sequence[str], todo: Iterable[Source]) -> Iterator[None]:
        """Let the block add the rows of what is to do, and no other run; write the table once it ends well.

        Raises:
            BlockingIOError: another run is at work on it.
            ValueError: another run has just taken its journal away.
        """
        rank, num_processes = shared.place()
        with shared.only_writer_of(self.path):
            for journal in self._journals() if self._is_anew and rank == 0 else ():
                number = journal.name.rpartition("-")[2]
                if number.isdecimal() and int(number) >= num_processes and is_own(journal):
                    journal.unlink()  # of an earlier run; those of this one begin their own anew
            known = self.parts
            self._read()
            if not known.items() <= self.parts.items():
                raise ValueError(f"another run has just begun {self.path} anew; start again")
            for source in todo:
                self.parts.pop(str(source.path), None)
            try:
                if not self._end:
                    with shared.replacing(self.journal) as temporary:
                        self._end = temporary.write_bytes(self._head)
                with self.journal.open("ab") as self._file:
                    self.begin()
                    yield
                if rank == 0 and (self.parts or not todo):  # of nothing but failures there is no table
                    self._write(columns)
            finally:
                if not self.parts:
                    self.journal.unlink(missing_ok=True)

    def begin(self) -> None:
        """Begin an input; what was added of one that failed is dropped."""
        with fatal_if_unwritable(self.path):
            self._file.flush()
            self._file.truncate(self._end)

    def add(self, rows: Iterable[Sequence]) -> None:
        """Add rows of the input that was begun; their cells are what JSON has."""
        with fatal_if_unwritable(self.path):
            self._file.writelines(f"{json.dumps(row)}\n".encode() for row in rows)

    def finish(self, source: Source) -> None:
        """Take in that an input has all its rows."""
        name = str(source.path)
        with fatal_if_unwritable(self.path):
            self._file.flush()
            end = self._file.seek(0, os.SEEK_END)
            self._file.write(f"{json.dumps({'file': name, 'stamp': self._stamps.get(name)})}\n".encode())
            self._file.flush()
            self.parts[name], self._end = (self.journal, self._end, end), self._file.tell()

    def _write(self, columns: Sequence[str]) -> None:
        with shared.replacing(self.path) as temporary:
            if self.path.suffix.lower() != ".parquet":
                with temporary.open("w", newline="", encoding="utf-8") as file:
                    write_rows(file, [columns, *self.rows()], len(columns))
                return
            import pandas as pd

            rows = [[*row, *[None] * (len(columns) - len(row))] for row in self.rows()]
            table = pd.DataFrame(rows, columns=columns)
            for name in table.columns.difference(TEXT_COLUMNS):
                table[name] = pd.to_numeric(table[name])
            table[list(TEXT_COLUMNS)] = table[list(TEXT_COLUMNS)].map(shared.printable, na_action="ignore")
            table.attrs["written_by"] = MARK
            table.to_parquet(temporary, index=False)


def print_rows(rows: Iterable[Sequence], num_columns: int) -> None:
    """Print rows as CSV, for --csv -."""
    text = io.StringIO()
    write_rows(text, rows, num_columns)
    with fatal_if_unwritable("standard output"):
        tqdm.write(text.getvalue(), end="")
        sys.stdout.flush()


def print_record(record: dict, style: str) -> None:
    """Print a photo's record, as "json" or "text", a line for each face; of a video, its frames' as JSON."""
    file = shared.printable(record["file"])
    if not record["faces"] and "frame" not in record:
        tqdm.write(f"{file}: no face found", file=sys.stderr)
    with fatal_if_unwritable("standard output"):
        if style == "json":
            tqdm.write(f"{json.dumps(record)}\n", end="")  # in one piece, for others may write there too
        elif style == "text" and "frame" not in record:
            for face in record["faces"]:
                box = ",".join(str(round(value)) for value in face["box"])
                tqdm.write(f"{file}\t{box}\t{face['emotion']}\t{face['prob']:.2f}\n", end="")
        sys.stdout.flush()  # whoever reads a live pipe should not wait


def face_picture(image: Image.Image, face: dict) -> Image.Image:
    """Cut a face out of an image, PICTURE_SIZE pixels square."""
    (crop,) = shared.crop_faces(image, np.array([face["box"]]), 0.2)
    return crop.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BILINEAR, reducing_gap=2)


class Crops:
    """The faces of --save-crops, DIR/<emotion>/<input>_<frame>_<track>.png, as the classifier sees them.

    At most one each CROP_EVERY of a track, and none that looks like one before of the same emotion.
    DIR/crops.csv lists them.
    """

    columns = ("file", "frame", "track", "emotion", "prob", "crop", "hash")

    def __init__(self, table: Table, sources: Sequence[Source], overwrite: bool):
        """Take the list, all sources, and whether files that are not this script's may be replaced."""
        self.table, self._overwrite = table, overwrite
        self._before: dict[str, set[str]] = defaultdict(set)  # crops of a former run, by file as in its table
        damages = (OSError, ValueError, KeyError, csv.Error)
        with suppress(*damages), table.path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                self._before[row["file"] or ""].add(row["crop"] or "")
        bases = name_apart(sources, lambda _, base: [table.path.parent / base])
        self._bases = {str(source.path): base for source, base in bases.items()}
        self._cut: dict[int, float] = {}  # s, when a crop of a track was last cut
        self._hashes: dict[str, list[int]] | None = None  # of the crops, by emotion; None: not read yet

    def begin(self) -> None:
        """Begin an input."""
        self._cut.clear()
        self._names: set[str] = set()
        if self._hashes is None:
            self._hashes = defaultdict(list)
            for *_, emotion, _, _, text in self.table.rows():
                self._hashes[emotion].append(int(text, 16))

    def add(self, record: dict, image: Image.Image, margin: float) -> None:
        """Cut what is due of a photo's faces, whose number stands for a track, or of a frame's.

        Raises:
            ValueError: there is a file of that name that does not say that this script wrote it.
            OSError: a crop cannot be written.
        """
        import imagehash

        frame, time = record.get("frame", 0), record.get("time", 0.0)
        for number, face in enumerate(record["faces"], start=1):
            track = face.get("track", number)
            is_due = time - self._cut.get(track, -math.inf) >= CROP_EVERY
            if face["emotion"] == shared.UNSURE or not is_due:
                continue
            self._cut[track] = time
            [crop] = shared.crop_faces(image, np.array([face["box"]]), margin)
            text, others = str(imagehash.phash(crop)), self._hashes[face["emotion"]]
            value = int(text, 16)
            if any((value ^ other).bit_count() <= shared.DUPLICATE_BITS for other in others):
                continue
            name = f"{face['emotion']}/{self._bases[record['file']]}_{frame}_{track}.png"
            path = self.table.path.parent / name
            check_replaceable([path], self._overwrite)
            save_image(crop, path)
            self._names.add(name)
            others.append(value)
            self.table.add([[record["file"], frame, track, face["emotion"], face["prob"], name, text]])

    def finish(self, source: Source) -> None:
        """Remove the crops that a former run made of an input and this one did not."""
        for name in self._before[text_cell(str(source.path))] - self._names:
            with suppress(OSError, ValueError):  # a name that leads elsewhere
                path = shared.inside(self.table.path.parent, name)
                if is_own(path):
                    path.unlink()


def summary_columns(labels: Sequence[str]) -> list[str]:
    """Name the columns of `Summary.rows`; `labels` are what a face may be called."""
    shares = [f"share_{name}" for name in labels]
    return ["file", "track", "faces", "seconds", "first", "last", "emotion", *shares, "prob", "changes"]


class Summary:
    """Tracks and emotions of a video, in memory that does not grow with its length but with its tracks.

    A photo is a frame whose faces are one track, 0.

    Faces are summed up by track and bin of time, CHUNK of them at a time. When the video outgrows NUM_BINS,
    pairs of bins become one.

    Attributes:
        start: s, of the first frame; None before there is one.
        end: s, when the last frame ends.
        seen: number of frames by track.
        pictures: of the longest tracks, the probability of the surest label and the face at that time.
        poster: the frame with the most and surest faces, and these.
    """

    def __init__(self, classes: Sequence[str], labels: Sequence[str] = ()):
        """Start empty; `labels` are the classes and what else a face may be called, if there is more."""
        self.classes, self.labels = classes, labels or classes
        self.start: Fraction | None = None
        self.end = Fraction(0)
        self._bin_width = BIN_WIDTH
        self._rows: list[tuple] = []  # of faces that are not summed up yet
        self._sums: pd.DataFrame | None = None
        self.seen = Counter()
        self._emotions: dict[int, str] = {}  # by track, the last
        self.pictures: dict[int, tuple[float, Image.Image]] = {}
        self.poster: tuple[Frame, Sequence[dict]] | None = None

    def add(self, frame: Frame, faces: Sequence[dict]) -> None:
        """Take in a frame with its faces."""
        if self.start is None:
            self.start, self.poster = frame.time, (frame, faces)
        if sum(face["prob"] for face in faces) > sum(face["prob"] for face in self.poster[1]):
            self.poster = (frame, faces)
        self.end = frame.time + frame.duration
        for face in faces:
            track, probs = face["track"], face["probs"].values()
            seconds = [float(frame.duration) * (name == face["emotion"]) for name in self.labels]
            when = int((frame.time - self.start) / BIN_WIDTH)
            is_changed = self._emotions.get(track, face["emotion"]) != face["emotion"]
            about = (float(frame.time), float(self.end), face["prob"], is_changed)
            self._rows.append((track, when, *about, *seconds, *probs))
            self._emotions[track] = face["emotion"]
            self.seen[track] += 1
            self._keep_picture(frame.image, face)
        if len(self.pictures) > NUM_PICTURED:
            present = {face["track"] for face in faces}
            del self.pictures[min(self.pictures, key=lambda track: (track in present, self.seen[track]))]
        if len(self._rows) >= CHUNK:
            self._sum_up()

    def _keep_picture(self, image: Image.Image, face: dict) -> None:
        """Keep the face's picture if its label is clearly surer than the kept one's."""
        best, _ = self.pictures.get(face["track"], (0.0, None))
        if face["prob"] > best + 0.02:
            self.pictures[face["track"]] = (face["prob"], face_picture(image, face))

    def _sum_up(self) -> pd.DataFrame:
        """Return a row for each track and bin: `first` and `last`, s, and sums of all else."""
        import pandas as pd

        if not self._rows and self._sums is not None:
            return self._sums
        sums = ["prob", "changes", *(f"seconds_{name}" for name in self.labels)]
        sums += [f"prob_{name}" for name in self.classes]
        rows = pd.DataFrame(self._rows, columns=["track", "bin", "first", "last", *sums])
        rows = rows.astype({"track": int, "bin": int, **dict.fromkeys(["first", "last", *sums], float)})
        rows["bin"] //= int(self._bin_width / BIN_WIDTH)
        table = rows if self._sums is None else pd.concat([self._sums, rows])
        while self.start is not None and (self.end - self.start) / self._bin_width > NUM_BINS:
            self._bin_width *= 2
            table["bin"] //= 2
        how = {"first": "min", "last": "max", **dict.fromkeys(sums, "sum")}
        self._sums, self._rows = table.groupby(["track", "bin"], as_index=False).agg(how), []
        return self._sums

    def tracks(self) -> pd.DataFrame:
        """Return a row for each track, with `summary_columns` but `file`; times are in s.

        `faces` is how often it was seen, `emotion` its commonest label, `share_` each label's share of its
        time, `prob` the mean probability of the labels, `changes` how often the label changed.
        """
        table = self._sum_up().groupby("track")
        seconds = table[[f"seconds_{name}" for name in self.labels]].sum()
        seconds.columns = self.labels
        shares = seconds.div(seconds.sum(axis=1), axis=0)
        tracks = table.agg({"first": "min", "last": "max", "prob": "sum", "changes": "sum"})
        tracks["faces"] = tracks.index.map(self.seen).astype(int)
        tracks["prob"] = (tracks["prob"] / tracks["faces"]).round(4)
        tracks["changes"] = tracks["changes"].astype(int)
        tracks["seconds"] = seconds.sum(axis=1)
        tracks["emotion"] = shares.idxmax(axis=1) if len(shares) else ""
        tracks = tracks.round({"first": 3, "last": 3, "seconds": 3})
        tracks = tracks.join(shares.add_prefix("share_").round(4))
        return tracks.reset_index()[summary_columns(self.labels)[1:]]

    def rows(self, file: str) -> list[list]:
        """Return the rows of --summary: a row for each track, one for a photo."""
        tracks = self.tracks().astype(object)
        if self.seen[0]:
            tracks[["track", "seconds", "first", "last", "changes"]] = None
        return [[file, *row] for row in tracks.to_numpy().tolist()]

    def save_tracks(self, file: str, path: Path) -> None:
        """Write a video's tracks as CSV."""
        columns = summary_columns(self.labels)
        with path.open("w", newline="", encoding="utf-8") as table:
            write_rows(table, [columns, *self.rows(file)], len(columns))

    def print_line(self, path: Path, style: str) -> None:
        """Print file, tracks and length, top emotion and its share as "text"; else only what has no face."""
        if not self.seen:
            tqdm.write(f"{shared.printable(path)}: no face found", file=sys.stderr)
        elif style == "text":
            tracks = self.tracks()
            seconds = [(tracks["seconds"] * tracks[f"share_{name}"]).sum() for name in self.labels]
            top = int(np.argmax(seconds))
            counts = f"{len(tracks)} track{'s' * (len(tracks) > 1)}, {float(self.end - self.start):.1f} s"
            name, share = shared.printable(path), seconds[top] / sum(seconds)
            with fatal_if_unwritable("standard output"):
                tqdm.write(f"{name}\t{counts}\t{self.labels[top]}\t{share:.2f}\n", end="")

    def runs(self, track: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Cut a track where it is out of sight; yield bin edges, s (T + 1,), and mean probs (T + 1, C)."""
        table = self._sum_up()
        rows = table[table["track"] == track]
        bins, width = rows["bin"].to_numpy(), float(self._bin_width)
        probs = rows[[f"prob_{name}" for name in self.classes]].to_numpy()
        firsts, lasts = rows["first"].to_numpy(), rows["last"].to_numpy()
        gaps = np.flatnonzero(firsts[1:] - lasts[:-1] > LOST_AFTER) + 1
        for run in np.split(np.arange(len(bins)), gaps):
            edges = np.append(float(self.start) + bins[run] * width, lasts[run[-1]])
            means = probs[run] / probs[run].sum(1, keepdims=True)
            yield edges.clip(None, float(self.end)), np.vstack([means, means[-1]])

    def mean_probs(self, track: int) -> np.ndarray:
        """Return a track's mean probabilities (C,)."""
        table = self._sum_up()
        columns = [f"prob_{name}" for name in self.classes]
        return table.loc[table["track"] == track, columns].sum().to_numpy() / self.seen[track]

    def sample(self, track: int, times: np.ndarray) -> np.ndarray:
        """Return a track's probabilities at `times` (T,), s: (T, C); 0 where it is out of sight."""
        probs = np.zeros((len(times), len(self.classes)))
        for edges, means in self.runs(track):
            inside = (times >= edges[0]) & (times < edges[-1])
            probs[inside] = means[np.searchsorted(edges, times[inside], "right") - 1]
        return probs

    def plot(self, colors: dict[str, str], font_path: Path | None, path: Path) -> None:
        """Draw the longest tracks' probabilities over time into a PNG, each beside its face."""
        from matplotlib.figure import Figure
        from matplotlib.font_manager import FontProperties
        from matplotlib.patches import Patch

        tracks = self.tracks()
        pictured = tracks[tracks["track"].isin(list(self.pictures))]
        shown = pictured.nlargest(NUM_PLOTTED, "seconds").sort_values("track")
        keys = [Patch(color=colors[name], label=name) for name in self.classes]
        columns = min(len(keys), max(1, 120 // (max(map(len, self.classes)) + 6)))  # 120 letters fill a line
        height = 1.15 + 0.25 * math.ceil(len(keys) / columns) + 1.2 * max(len(shown), 1)
        figure = Figure(figsize=(11, height), layout="constrained")
        axes = figure.subplots(max(len(shown), 1), 2, width_ratios=(1, 11), squeeze=False)
        for track, (left, right) in zip(shown.to_dict("records"), axes, strict=False):
            left.imshow(self.pictures[track["track"]][1])
            for times, parts in self.runs(track["track"]):
                right.stackplot(times, parts.T, colors=[colors[name] for name in self.classes], step="post")
            share = track[f"share_{track['emotion']}"]
            title = f"track {track['track']}: {track['seconds']:.1f} s, {share:.0%} {track['emotion']}"
            right.set_title(title, loc="left", font=FontProperties(fname=font_path, size=9))
        for left, right in axes:
            left.axis("off")
            right.set(xlim=(float(self.start), float(self.end)), ylim=(0, 1), yticks=(0, 0.5, 1))
            right.tick_params(labelbottom=right is axes[-1, 1])
        axes[-1, 1].set_xlabel("time, s")
        if shown.empty:
            axes[0, 1].set_title("no face", loc="left", fontsize=9)
        font = FontProperties(fname=font_path, size=10)
        figure.legend(handles=keys, loc="outside upper center", ncols=columns, frameon=False, prop=font)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of letters; main has told
            figure.savefig(path, dpi=120, format="png", metadata={"Software": MARK})


def fits_mp4(source: av.AudioStream) -> bool:
    """Return whether a stream can be copied to MP4, which takes no MP3 below 16 kHz and nothing unknown."""
    av = load_av()
    try:
        output = av.open(io.BytesIO(), "w", format="mp4")
        output.add_stream_from_template(source)
        output.start_encoding()
    except (av.error.FFmpegError, ValueError):
        return False
    return True


def read_sound(video: Video, output: av.container.OutputContainer, start: Fraction) -> Iterator[av.Packet]:
    """Read a video's sound from `start` on, s by its file's clock, for a still empty `output`.

    Packets are copied where browsers can play them from MP4, else made AAC; with the first, the output gets
    their stream. Sound that cannot be read is left out, and stands in `video.lost`.
    """
    av = load_av()
    with open_video(video.path) as container:
        best = container.streams.best("audio", related=container.streams.best("video"))
        source = best or next(iter(container.streams.audio), None)  # what cannot be decoded is never the best
        if source is None:
            return
        if video.start:
            with suppress(av.error.FFmpegError):
                container.seek(round((start - 2) * av.time_base))  # 2 s: sound may stand before its picture
        codec, last = source.codec_context, -math.inf
        is_copied = codec and codec.codec.canonical_name in COPIED_SOUND and fits_mp4(source)
        packets = demux(container, source, video.shifts)
        try:
            target = output.add_stream_from_template(source) if is_copied else None
            for packet in packets if is_copied else encode_sound(packets, source, output):
                if packet.pts is None:
                    continue
                packet.pts -= round(start / packet.time_base)
                if packet.pts > last and packet.pts + (packet.duration or 0) >= 0:
                    packet.dts, packet.stream, last = packet.pts, target or packet.stream, packet.pts
                    yield packet
        except (av.error.FFmpegError, ValueError) as error:
            video.lost.append(f"sound was left out: {getattr(error, 'strerror', None) or error}")


def encode_sound(
    packets: Iterator[av.Packet], source: av.AudioStream, output: av.container.OutputContainer
) -> Iterator[av.Packet]:
    """Encode sound, whose format may change on the way, as AAC.

    Raises:
        ValueError: none of it can be decoded.
    """
    av = load_av()
    target, made, is_damaged = None, None, False
    for frame in decode(packets, source):
        if frame is None:
            is_damaged = True
            continue
        if target is None:
            rate = min(av.Codec("aac", "w").audio_rates, key=lambda rate: abs(rate - frame.sample_rate))
            layout = AAC_LAYOUTS[min(frame.layout.nb_channels, len(AAC_LAYOUTS)) - 1]
        if made != (made := (frame.format.name, frame.layout.name, frame.sample_rate)):
            resampler = av.AudioResampler("fltp", layout, rate)
        parts = resampler.resample(frame)
        target = target or output.add_stream("aac", rate=rate, layout=layout)
        for part in parts:
            yield from target.encode(part)
    if target is not None:
        for part in [*resampler.resample(None), None]:
            yield from target.encode(part)
    elif is_damaged:
        raise ValueError("none of it can be decoded")


class VideoWriter:
    """Writes H.264 in MP4 that plays in browsers, with the times, colours and sound of its source."""

    def __init__(self, path: Path, video: Video | Camera, first: Frame):
        """Begin a file for the frames from `first` on.

        H.264 for browsers has even sides only: an odd one grows by a copy of its last row or column.
        """
        self._start, self._time_base, self._colors = first.time, video.time_base, video.colors
        self._output = load_av().open(f"file:{path}", "w", format="mp4", options={"movflags": "+faststart"})
        self._output.metadata["comment"] = MARK
        options = LARGE_OPTIONS if video.path and video.batch_size == 1 else ENCODER_OPTIONS
        self._stream = self._output.add_stream("libx264", rate=video.rate, options=options)
        self._odd = [(0, side % 2) for side in first.image.size[::-1]]
        self._stream.height, self._stream.width = (side + side % 2 for side in first.image.size[::-1])
        self._stream.pix_fmt = "yuv420p"
        codec = self._stream.codec_context
        codec.time_base, codec.color_range = video.time_base, MPEG_RANGE
        codec.colorspace, codec.color_primaries, codec.color_trc = video.colors
        if video.sample_aspect_ratio:
            codec.sample_aspect_ratio = video.sample_aspect_ratio
        has_sound = video.path is not None
        self._sound = read_sound(video, self._output, video.origin + first.time) if has_sound else iter(())
        self._packet = next(self._sound, None)

    def write(self, frame: Frame, image: Image.Image) -> None:
        """Add a frame's labelled image and the sound until its end."""
        av = load_av()
        picture = av.VideoFrame.from_image(image)
        if any(after for _, after in self._odd):
            picture = av.VideoFrame.from_ndarray(np.pad(np.asarray(image), [*self._odd, (0, 0)], "edge"))
        picture = picture.reformat(None, None, "yuv420p", None, self._colors[0], dst_color_range=MPEG_RANGE)
        picture.time_base = self._time_base
        picture.pts = round((frame.time - self._start) / self._time_base)
        picture.duration = round(frame.duration / self._time_base)
        self._output.mux(self._stream.encode(picture))
        self.add_sound(frame.time + frame.duration - self._start)

    def add_sound(self, end: float) -> None:
        """Add the sound until `end`, s since the first frame."""
        while self._packet is not None and self._packet.pts * self._packet.time_base < end:
            with suppress(load_av().error.InvalidDataError):  # a damaged one
                self._output.mux(self._packet)
            self._packet = next(self._sound, None)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is None:  # else FFmpeg may have no file to write to, and ends the process
            self._output.mux(self._stream.encode(None))
        self._output.close()


class Window:
    """A live window."""

    def __init__(self, name: str):
        """Open it.

        Raises:
            ValueError: there is no screen.
        """
        self._cv2, self._name, self.is_left = load_opencv(), name, False
        has_screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        if sys.platform == "linux" and not has_screen:  # Qt would end the process
            raise ValueError("there is no screen for a live window; leave --show out, or record by --out-dir")
        try:
            self._cv2.namedWindow(name, self._cv2.WINDOW_AUTOSIZE | self._cv2.WINDOW_GUI_NORMAL)
        except self._cv2.error:
            raise ValueError("this OpenCV has no windows; pip install opencv-python, not -headless") from None

    def show(self, frame: Frame, image: Image.Image) -> bool:
        """Show a frame's image when it is due; return whether nobody pressed q or closed the window."""
        if frame.number == 0:
            self._began = time.monotonic() - float(frame.time)
        self._cv2.imshow(self._name, np.asarray(image)[:, :, ::-1])
        ahead = float(frame.time) - (time.monotonic() - self._began)
        wait_ms = max(5, round(1000 * ahead))  # in less a window on a busy machine was never painted
        is_quit = self._cv2.waitKey(wait_ms) == ord("q")
        self.is_left = is_quit or self._cv2.getWindowProperty(self._name, self._cv2.WND_PROP_VISIBLE) < 1
        return not self.is_left


# --- report ---


POSTER_SIZE = 880  # pixels, of the longer side of a picture in the report
NUM_COLUMNS = 160  # of a track's timeline there


def as_jpeg(image: Image.Image) -> str:
    """Return an image as base64 of a JPEG that carries its colour profile and nothing else."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75, icc_profile=image.info.get("icc_profile"))
    return base64.b64encode(file.getvalue()).decode()


class Report:
    """Writes the page of --report, each input as soon as it is labelled, so that memory does not grow."""

    def __init__(self, add: Callable[[object], None], folder: Path, kit: Kit, model_path: Path):
        """Begin the page; `add` is of `model.filling_page`, `folder` the page's."""
        self._add, self._folder, self._has_hidden = add, folder, bool(kit.hidden)
        self._classes, self._labels = kit.classifier.classes, list(kit.colors)
        labels = [{"name": name, "color": each, "ink": text_color(each)} for name, each in kit.colors.items()]
        model = {"model": shared.printable(model_path.name), "digest": shared.file_digest(model_path)[:12]}
        self._add({"classes": self._classes, "labels": labels, **model})

    def add_photo(self, record: dict, image: Image.Image) -> None:
        """Add a photo's record, and the photo as may be shown."""
        faces = [
            self._face(face["emotion"], face["probs"].values(), face_picture(image, face))
            | {"box": per_mille(face["box"], image.size)}
            for face in record["faces"]
        ]
        self._add_input(record["file"], image, faces, {"num_faces": len(faces)})

    def add_video(self, path: Path, copy: Path | None, summary: Summary) -> None:
        """Add a video, its labelled copy if there is one, and its tracks that are longest in sight."""
        frame, present = summary.poster
        boxes = {face["track"]: per_mille(face["box"], frame.image.size) for face in present}
        tracks = summary.tracks()
        shown = tracks[tracks["track"].isin(list(summary.pictures))].sort_values("seconds", ascending=False)
        start, end = float(summary.start), float(summary.end)
        times = start + (np.arange(NUM_COLUMNS) + 0.5) / NUM_COLUMNS * (end - start)
        faces = []
        for place, row in enumerate(shown.to_dict("records")):
            track = row["track"]
            face = self._face(row["emotion"], summary.mean_probs(track), summary.pictures[track][1])
            face |= {"number": track, "times": [row["first"], row["last"]], "box": boxes.get(track)}
            if place < NUM_PLOTTED:
                lane = (summary.sample(track, times) * 255).round().astype(np.uint8)
                face["lane"] = base64.b64encode(lane.tobytes()).decode()
            faces.append(face)
        about = {"num_faces": len(tracks), "start": start, "end": end, "offset": start if copy else 0}
        film = copy or (None if self._has_hidden else path)  # the source shows every face
        with suppress(ValueError):  # it is on another drive than the page
            if film and path_kind(film) == "file":
                link = os.path.relpath(film.absolute(), self._folder.absolute())
                about["video"] = urllib.parse.quote(Path(link).as_posix(), errors="surrogateescape")
        self._add_input(path, frame.image, faces, about)

    def _face(self, emotion: str, probs: Iterable[float], picture: Image.Image) -> dict:
        parts = [round(1000 * prob) for prob in probs]
        return {"label": self._labels.index(emotion), "probs": parts, "crop": as_jpeg(picture)}

    def _add_input(self, file: str | Path, image: Image.Image, faces: list[dict], about: dict) -> None:
        poster = image.copy()
        poster.thumbnail((POSTER_SIZE, POSTER_SIZE))
        name = shared.printable(Path(file).as_posix())
        about = {"file": name, "size": image.size, "poster": as_jpeg(poster), **about}
        self._add({**about, "faces": faces})


def per_mille(box: Sequence[float], size: Sequence[int]) -> list[int]:
    """Return a box in thousandths of an image's size."""
    return (1000 * np.array(box) / np.tile(size, 2)).round().astype(int).tolist()


@contextmanager
def open_report(
    path: Path | None, kit: Kit, model_path: Path, failures: dict[Source, str]
) -> Iterator[Report | None]:
    """Write the page of --report, if there is a path; it ends with the `failures` that there are by then."""
    if path is None:
        yield None
        return
    with shared.filling_page(REPORT_PAGE, path) as add_line:

        def add(value: object) -> None:
            with fatal_if_unwritable(path):
                add_line(value)

        yield Report(add, path.parent, kit, model_path)
        add({"failed": [shared.printable(failure) for failure in failures.values()]})


# --- results ---


def columns_by_option(classes: Sequence[str], labels: Sequence[str]) -> dict[str, Sequence[str]]:
    """Name the columns of each table, of a model's classes and of the labels that faces get."""
    faces, summary = shared.table_columns(classes), summary_columns(labels)
    return {"--csv": faces, "--summary": summary, "--save-crops": Crops.columns}


class Results:
    """What all inputs make together: standard output, --csv, --summary, --save-crops and --report.

    Attributes:
        style: of standard output: "text", "json" or "csv".
        tables: by option, those of --csv, --summary and --save-crops that are asked for.
        failures: what is wrong with an input, in words.
        is_first: whether this process, of several that work together, speaks for all.
    """

    def __init__(
        self,
        style: str,
        paths: dict[str, Path],
        sources: Sequence[Source],
        settings: dict,
        *,
        is_anew: bool,
        overwrite: bool,
        keep_empty: bool,
    ):
        """Find out what there is already.

        Args:
            style: see above.
            paths: of the files, by option.
            sources, settings, is_anew: see `Table`.
            overwrite: see `check_replaceable`.
            keep_empty: see `model.face_rows`.

        Raises:
            ValueError: as `Table`.
        """
        self.style, self._keep_empty, self._report_path = style, keep_empty, paths.get("--report")
        self.failures: dict[Source, str] = {}
        self.is_first, columns = shared.place()[0] == 0, columns_by_option((), ())
        self.tables = {
            option: Table(path, {"table": option, "columns": columns[option], **settings}, sources, is_anew)
            for option, path in paths.items()
            if option != "--report"
        }
        self._crops = None
        if "--save-crops" in self.tables:
            self._crops = Crops(self.tables["--save-crops"], sources, overwrite)

    @contextmanager
    def writing(self, kit: Kit, model_path: Path, todo: Sequence[Source]) -> Iterator[None]:
        """Let the block add the results of what is to do; write tables and report once it ends well."""
        columns, self._kit = columns_by_option(kit.classifier.classes, list(kit.colors)), kit
        with ExitStack() as stack:
            for option, table in self.tables.items():
                stack.enter_context(table.writing(columns[option], todo))
            page = open_report(self._report_path, kit, model_path, self.failures)
            self._report = stack.enter_context(page)
            if self.style == "csv":
                print_rows([columns["--csv"]], len(columns["--csv"]))
            shared.gather(None)  # before any process writes, the first has the locks
            yield
            for parts, failures in shared.gather(([t.parts for t in self.tables.values()], self.failures)):
                self.failures.update(failures)
                for table, its_parts in zip(self.tables.values(), parts, strict=True):
                    table.parts.update(its_parts)

    def begin(self) -> None:
        """Begin an input."""
        for table in self.tables.values():
            table.begin()
        if self._crops:
            self._crops.begin()

    def add(self, record: dict, image: Image.Image) -> list[list]:
        """Add a photo or a frame of a video, as it may be shown; return its rows of --csv.

        Args:
            record: what --json prints.
        """
        print_record(record, self.style)
        rows = shared.face_rows(record, self._keep_empty)
        if self.style == "csv":
            print_rows(rows, len(shared.table_columns(self._kit.classifier.classes)))
        elif "--csv" in self.tables:
            self.tables["--csv"].add(rows)
        if self._crops:
            self._crops.add(record, image, self._kit.classifier.crop_margin)
        return rows

    def finish_photo(self, source: Source, record: dict, image: Image.Image) -> None:
        """Add a photo, as `add` does, and take in that it is done."""
        self.add(record, image)
        if self._report:
            self._report.add_photo(record, image)
        summary = Summary(self._kit.classifier.classes, list(self._kit.colors))
        if "--summary" in self.tables:
            summary.add(
                Frame(0, Fraction(0), Fraction(1), image), [{"track": 0, **face} for face in record["faces"]]
            )
        self._finish(source, summary)

    def finish_video(self, source: Source, outputs: dict[str, Path], summary: Summary) -> None:
        """Take in that a video, whose frames were added, is done."""
        if self._report:
            self._report.add_video(source.path, outputs.get("video"), summary)
        summary.print_line(source.path, self.style)
        self._finish(source, summary)

    def _finish(self, source: Source, summary: Summary) -> None:
        if "--summary" in self.tables:
            name = str(source.path)
            self.tables["--summary"].add(summary.rows(name) or [[name, None, 0]])
        if self._crops:
            self._crops.finish(source)
        for table in self.tables.values():
            table.finish(source)


# --- main ---

LARGE = 2**25  # pixels; of photos that large one is worked on at a time, for each takes half a gigabyte


def label_photo(path: Path, copy: Path | None, kit: Kit) -> tuple[dict, Image.Image]:
    """Write a photo's labelled copy, if it is to have one; return its record, and it as it may be shown."""
    check_replaceable([copy] if copy else [], kit.overwrite)
    image = shared.open_picture(path)
    faces = shared.label_faces(image, kit.finder, kit.classifier, kit.unsure)
    if kit.hidden:
        image = hide_heads(image, [face["box"] for face in faces if face["emotion"] in kit.hidden])
    if copy:
        save_image(draw_faces(image, faces, kit.colors, kit.font_path) if kit.has_labels else image, copy)
    return {"file": str(path), "width": image.width, "height": image.height, "faces": faces}, image


def is_large(path: Path) -> bool:
    """Return whether a photo has more than LARGE pixels."""
    with suppress(*shared.PILLOW_ERRORS), Image.open(path, formats=shared.FORMATS) as image:
        return image.width * image.height > LARGE
    return False


def label_ahead(
    plan: dict[Source, dict[str, Path]], kit: Kit, num_threads: int
) -> Iterator[tuple[Source, dict[str, Path], Callable[[], tuple[dict, Image.Image]]]]:
    """Label photos in threads, up to `num_threads` ahead of the reader, but large ones when it is their turn.

    Yields, in the order of the plan:
        A source, its outputs and, for a photo, what returns the result of `label_photo` or raises its error.
    """
    pool, waiting = ThreadPoolExecutor(num_threads), deque()
    try:
        for source, outputs in plan.items():
            label = functools.partial(label_photo, source.path, outputs.get("copy"), kit)
            if source.kind == "photo" and not is_large(source.path):
                label = pool.submit(label).result
            waiting.append((source, outputs, label))
            if len(waiting) > num_threads:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def writing_outputs(name: str) -> Iterator[None]:
    """Have errors name the input whose outputs are being written, not whichever of these was opened last."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, load_av().error.FFmpegError) as error:
        if error.errno is None:  # it has its message
            raise
        raise OSError(f"cannot write the outputs of {name}: {error.strerror}") from None


def label_video(
    video: Video | Camera,
    outputs: dict[str, Path],
    kit: Kit,
    results: Results,
    window: Window | None,
) -> Summary:
    """Write what `outputs`, of `name_outputs`, names of an opened video; if something fails, nothing.

    The `results` get each frame. Once the `window`, which shows the frames, is left, the video ends.

    Raises:
        ValueError: no frame could be read.
        OSError: an output could not be written.
    """
    summary, drawn, writer = Summary(kit.classifier.classes, list(kit.colors)), {}, None
    with ExitStack() as stack:
        parts = {part: stack.enter_context(shared.replacing(path)) for part, path in outputs.items()}
        stack.enter_context(writing_outputs(video.name))
        file = parts.get("faces", Path(os.devnull)).open("w", newline="", encoding="utf-8")
        table, columns = stack.enter_context(file), shared.table_columns(kit.classifier.classes)
        write_rows(table, [columns], len(columns))
        ahead = video.batch_size
        if kit.hidden:  # of very large frames few can wait for the search that finds their faces
            delay = DELAY_PIXELS // BATCH_PIXELS * ahead / video.rate
            kit = kit._replace(search_every=min(kit.search_every, delay))
        frames = stack.enter_context(closing(in_background(video.frames(), ahead)))
        faces_of = follow_faces(frames, kit, batch_size=ahead, is_live=video.path is None)
        followed = stack.enter_context(closing(in_background(faces_of, ahead)))
        if kit.hidden:  # from here on no picture shows them
            around = max(HIDDEN_AROUND, 1.5 / video.rate)  # the neighbouring frames at least
            followed = hide_in_frames(followed, kit.hidden, around if video.path else 0, around)
        name = shared.printable(video.name)
        is_silent = None if results.is_first else True  # None: unless stderr is a screen
        for frame, faces in tqdm(followed, name, video.num_frames, unit="frame", disable=is_silent):
            summary.add(frame, faces)
            about = {"file": video.name, "width": frame.image.width, "height": frame.image.height}
            about |= {"frame": frame.number, "time": round(float(frame.time), 4)}
            record = {**about, "faces": faces}
            write_rows(table, results.add(record, frame.image), len(columns))
            image = frame.image
            if kit.has_labels and ("video" in parts or window):
                image = draw_faces(image, faces, kit.colors, kit.font_path, drawn)
            if "video" in parts:
                writer = writer or stack.enter_context(VideoWriter(parts["video"], video, frame))
                writer.write(frame, image)
            if window and not window.show(frame, image):
                break
        else:
            if writer and video.end == math.inf:  # the sound may be longer than the picture
                writer.add_sound(math.inf)
        if summary.start is None:
            reason = "; ".join(video.lost) or "it is empty, or --start and --end leave none"
            raise ValueError(f"{video.name} has no frames that can be read: {reason}")
        if parts:
            summary.plot(kit.colors, kit.font_path, parts["timeline"])
            summary.save_tracks(video.name, parts["tracks"])
    return summary


@contextmanager
def surviving(source: Source, failures: dict[Source, str]) -> Iterator[None]:
    """Let an error of one source be a line on stderr and in `failures`; the others are still worth it."""
    try:
        yield
    except Exception as error:
        lacks_memory = shared.lacks_memory(error)
        is_known = lacks_memory or isinstance(error, ValueError | OSError)
        if not is_known or isinstance(error, BrokenPipeError):
            raise
        failures[source] = f"{source.path} needs more memory than there is" if lacks_memory else str(error)
        tqdm.write(f"error: {shared.printable(failures[source])}", file=sys.stderr)


def label_all(
    plan: dict[Source, dict[str, Path]], kit: Kit, results: Results, window: Window | None, num_threads: int
) -> None:
    """Label what is planned, photos in so many threads, and add it to the results."""
    is_silent = True if len(plan) == 1 or not results.is_first else None  # None: unless stderr is a screen
    with closing(label_ahead(plan, kit, num_threads)) as labelled:
        for source, outputs, label in tqdm(labelled, total=len(plan), unit="file", disable=is_silent):
            results.begin()
            with surviving(source, results.failures):
                if source.kind == "photo":
                    results.finish_photo(source, *label())
                    continue
                check_replaceable(outputs.values(), kit.overwrite)
                opened = Camera if source.device else Video
                with closing(opened(source.device or source.path, kit.start, kit.end)) as video:
                    summary = label_video(video, outputs, kit, results, window)
                results.finish_video(source, outputs, summary)
                if video.lost or (window and window.is_left and not source.device):
                    os.utime(outputs["timeline"], (0, 0))  # older than the video, so it is not finished
                if video.lost:
                    raise ValueError(f"{source.path}: {'; '.join(video.lost)}; the rest is labelled")
            if window and window.is_left:
                break


def describe_version(model_path: Path) -> str:
    """Name the versions of this project, in a clone, and of what runs the networks; and the model."""
    root, lines = Path(__file__).parent, []
    if shutil.which("git") and (root / ".git").exists():
        describe = ["git", "-C", root, "describe", "--tags", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
        lines = [f"Emotion detector {commit or '(git does not say which)'}"]
    for name in ("torch", "openvino"):
        with suppress(importlib.metadata.PackageNotFoundError):
            lines.append(f"{name} {importlib.metadata.version(name)}")
    return "\n".join([*lines, f"{model_path.name} sha256:{shared.file_digest(model_path)}"])


def face_size(text: str) -> float:
    """Read a size in pixels, MTCNN's window of 12 or more, or below 1 a share of the shorter side."""
    value = float(text)
    if not (0 < value < 1 or 12 <= value < math.inf):
        raise argparse.ArgumentTypeError(f"{text} is neither 12 pixels or more nor a share below 1")
    return value


def add_picture_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of what pictures show, and which are written."""
    add = parser.add_argument_group("what pictures show").add_argument
    blur_help = (
        "make the heads of faces with these labels, or of all, a few squares in everything that shows them; "
        "unsure faces too; in videos from half a second, or a frame, before (not live) until as long after, "
        "and the whole frame is searched at least as often. What is finished is done again. Faces that are "
        "not found stay as they are (a lower --min-face-prob finds more), and so does the sound"
    )
    add("--blur", nargs="+", default=(), metavar="NAME", help=blur_help)
    add("--no-labels", action="store_true", help="draw no boxes and labels into the copies")
    no_copies = "write no labelled photos and videos, only tables, plots and the report"
    add("--font", type=Path, metavar="FILE", help="TrueType or OpenType (default: the one in Pillow)")
    add("--no-copies", "--no-video", action="store_true", help=no_copies)


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of how videos are labelled, and which part."""
    add, not_negative = parser.add_argument_group("videos").add_argument, shared.number(float, 0)
    add("--start", type=clock_time, default=0.0, metavar="T", help="begin videos there, s or h:mm:ss")
    add("--end", type=clock_time, default=math.inf, metavar="T", help="end videos there, s or h:mm:ss")
    each = "classify a video's faces in every so many frames"
    add("--every", type=shared.number(int, 1), default=3, metavar="N", help=each)
    search = "search a whole frame so often, s; 0: each frame; between, faces are followed"
    add("--search-every", type=not_negative, default=0.3, metavar="S", help=search)
    smooth = "time constant of smoothing probabilities in videos, s; 0: do not"
    add("--smooth", type=not_negative, default=0.5, metavar="S", help=smooth)
    rejoin = "a face that comes back within so many s keeps its number, if it looks the same; 0: never"
    add("--rejoin", type=not_negative, default=30.0, metavar="S", help=rejoin)


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of what all inputs make together."""
    add = parser.add_argument_group("results of all inputs").add_argument
    add("--json", action="store_true", help="print an object for each photo and frame, not lines of text")
    csv_help = (
        "also write a table of all faces, of videos in each frame; .parquet instead of .csv needs pyarrow, - "
        "is standard output. After a stop, the same command goes on: what is done waits in .FILE.journal"
    )
    add("--csv", type=Path, metavar="FILE", help=csv_help)
    add("--empty-rows", action="store_true", help="tables have a row for a photo or frame without faces too")
    summary_help = (
        "also write a table with a row for each photo and each track of a video: how long, top emotion, each "
        "emotion's share, mean probability, changes; .parquet and stops as --csv"
    )
    add("--summary", type=Path, metavar="FILE", help=summary_help)
    crops_help = (
        "also cut out the faces, DIR/<emotion>/*.png, without those that are unsure or look like one before; "
        "of a video at most one a second and track"
    )
    add("--save-crops", type=Path, metavar="DIR", help=crops_help)
    report_help = (
        "also write a page to open in a browser, offline: pictures, faces, timelines, a table; it is of all "
        "inputs, so what is finished is labelled again"
    )
    add("--report", type=Path, metavar="FILE.html", help=report_help)


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a line on stderr if options do not go together, or name what is not written."""
    if not (args.inputs or args.camera is not None or args.version or args.export):
        parser.error("name an INPUT or a --camera; an INPUT stands before --emotions and --blur")
    if args.start >= args.end:
        parser.error("--start must come before --end")
    if args.summary == STDOUT:
        parser.error("--summary - is not possible; name a file")
    endings = {"csv": TABLES_END, "summary": TABLES_END, "report": PAGES_END}
    for name, own in endings.items():
        path = getattr(args, name)
        if path and path.suffix.lower() in {*TABLES_END, *PAGES_END, *OTHERS_END} - {*own}:
            parser.error(f"--{name} cannot write {path}; name a file that ends in {' or '.join(own)}")
    if args.export and (args.inputs or args.emotions):
        parser.error("--export writes all of --model and labels nothing; leave INPUT and --emotions out")
    if args.json and args.csv == STDOUT:
        parser.error("--json and --csv - would both go to standard output; name a file for --csv")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = shared.build_parser(__doc__)
    add, share = parser.add_argument, shared.number(float, 0, 1)
    add("inputs", nargs="*", metavar="INPUT", help="photo, video, folder of them, or pattern")
    add("--recursive", action="store_true", help="look into a folder's subfolders too")
    overwrite = (
        "do again what is finished in a folder or pattern, and replace a camera's recording, or files that "
        "do not say, by their metadata or a table's first columns, that this program wrote them"
    )
    add("--overwrite", action="store_true", help=overwrite)
    add("--camera", metavar="N", help="label a camera live: its number, or a stream's address")
    add("--show", action="store_true", help="watch videos in a live window; q ends them there")
    add("--out-dir", type=Path, metavar="DIR", help="folder for the outputs (default: beside each input)")
    add_result_options(parser)
    add(
        "--min-face-prob",
        type=share,
        default=0.9,
        metavar="P",
        help="how sure the detector must be of a face, 0-1",
    )
    small = (
        "smallest face to look for, pixels (12 or more), or a share of the shorter side (below 1), which "
        "means 20 pixels or more; smaller ones take longer"
    )
    add("--min-face-size", type=face_size, default=shared.MIN_FACE_SIZE, metavar="X", help=small)
    add_picture_options(parser)
    add_video_options(parser)
    add("--model", type=Path, default=shared.DEFAULT_MODEL, metavar="FILE", help="checkpoint")
    emotions_help = (
        "tell these apart, or all that the model has learned (default: those that it was made for)"
    )
    add("--emotions", nargs="+", default=(), metavar="NAME", help=emotions_help)
    add(
        "--unsure",
        type=share,
        default=0.0,
        metavar="P",
        help=f"call faces whose likeliest emotion is less likely {shared.UNSURE}; 0: none",
    )
    shared.add_options(parser, device="auto")
    add(
        "--export",
        type=Path,
        metavar="FILE",
        help="only write --model for use without torch: .onnx or .xml",
    )
    add("--version", action="store_true", help="print the versions of what labels, and the model's hash")
    args = parser.parse_args(argv)
    check_options(parser, args)
    return args


def check_shareable(args: argparse.Namespace) -> None:
    """Find out whether several processes can do what is asked for together.

    Raises:
        ValueError: they cannot.
    """
    options = {"--camera": args.camera is not None, "--show": args.show, "--json": args.json}
    options |= {"--csv -": args.csv == STDOUT, "--report": args.report, "--save-crops": args.save_crops}
    if asked := [option for option, is_asked in options.items() if is_asked]:
        raise ValueError(f"{asked[0]} is for one process; leave it out, or start without torchrun")


def build_kit(args: argparse.Namespace, num_threads: int) -> Kit:
    """Load what the options ask for; `num_threads` will use it at once.

    Raises:
        ValueError: an option or its file is wrong.
    """
    device = shared.find_device(args.device)
    classifier = shared.Classifier(args.model, device, ["all"], num_threads)
    unknown = [name for name in args.emotions if name not in {*classifier.classes, "all"}]
    if swallowed := [name for name in unknown if path_kind(Path(name))]:
        known = ", ".join(classifier.classes)
        raise ValueError(f"{swallowed[0]} is no emotion, of {known}; put INPUT before --emotions")
    classifier = classifier.among(args.emotions)
    colors = class_colors(classifier.classes) | ({shared.UNSURE: UNSURE_COLOR} if args.unsure else {})
    hidden, search_every = labels_to_hide(args.blur, colors), args.search_every
    if hidden:
        search_every = min(search_every, 0 if args.camera is not None else HIDDEN_AROUND)
    finder = shared.FaceFinder(device, args.min_face_size, args.min_face_prob, num_threads)
    report_letters(colors, load_font(args.font, MIN_FONT_SIZE))  # a wrong font is refused before the work
    return Kit(
        finder=finder,
        classifier=classifier,
        colors=colors,
        font_path=args.font,
        unsure=args.unsure,
        hidden=hidden,
        has_labels=not args.no_labels,
        overwrite=args.overwrite,
        start=args.start,
        end=args.end,
        every=args.every,
        search_every=search_every,
        smooth=args.smooth,
        rejoin=args.rejoin,
    )


@shared.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Label what the command line names; exit with 1 if one of them could not be, or only in part."""
    args, left_out = parse_args(argv), Counter()
    if args.version:
        print(describe_version(args.model))
    if args.export:
        replaced = args.export
        if replaced.suffix == ".xml" and not path_kind(replaced):
            replaced = replaced.with_suffix(".bin")  # has no mark; beside an .xml it is part of that
        check_replaceable([replaced], args.overwrite)
        shared.export_network(args.model, args.export, MARK)
        print(shared.printable(f"wrote {args.export}"))
    if args.version or args.export:
        return
    rank, num_processes = shared.join_others()
    if num_processes > 1:
        check_shareable(args)
    sources = find_sources(args.inputs, args.recursive, args.out_dir, left_out)
    if args.camera is not None:
        sources.append(Source(Path(camera_name(args.camera)), "camera", args.out_dir, device=args.camera))
    style = "json" if args.json else "csv" if args.csv == STDOUT else "text"
    paths = {"--csv": args.csv, "--summary": args.summary, "--report": args.report}
    paths["--save-crops"] = args.save_crops and args.save_crops / "crops.csv"
    paths = {option: path for option, path in paths.items() if path and path != STDOUT}
    plan = plan_outputs(sources, not args.no_copies, paths, left_out)
    plan = shared.gather(None if rank else plan)[0]  # here and below the first's: the folder may change
    settings = {name: getattr(args, name) for name in ROW_OPTIONS}
    settings["model"] = args.model.is_file() and shared.file_digest(args.model)
    is_anew = bool(args.overwrite or style != "text" or args.blur or args.report)  # these are of all inputs
    results = Results(
        style,
        paths,
        list(plan),
        settings,
        is_anew=is_anew,
        overwrite=args.overwrite,
        keep_empty=args.empty_rows,
    )
    tables = list(results.tables.values())
    if not is_anew:
        plan = shared.gather(None if rank else leave_out_finished(plan, tables, left_out))[0]
    check_outputs(plan, [*paths.values(), *(table.journal for table in tables)], args.overwrite)
    is_live = args.show or (args.camera is not None and not (args.json or args.out_dir))
    window = Window("emotions, q ends") if is_live else None
    # A thread more than there are cores, for a photo that is being read or written.
    num_threads = shared.num_cores() + 1 if len(plan) > 1 and not window else 1
    # Photos only: each thread calls the networks on one core. With a video, one call uses all cores.
    is_album = all(source.kind == "photo" for source in plan)
    kit = build_kit(args, num_threads if is_album else 1)
    with results.writing(kit, args.model, list(plan)):
        label_all(share_out(plan, num_processes)[rank], kit, results, window, num_threads)
    left_out["failed, see above"] += sum(not source.is_named for source in results.failures)
    if +left_out and results.is_first:
        print(in_words(left_out), file=sys.stderr)
    if results.failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
