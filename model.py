"""What the scripts share; a script imports from here and from nowhere else in the project.

The parts stand in the order in which data flows through them, and use only what stands above them:

    constants     the emotions, the size and statistics of the network's input
    processes     several that torchrun starts, as one: `join_others`, `place`, `gather`
    files         writing whole files or none, one run at a time: `replacing`, `only_run_in`, `filling_page`
    pictures      the one way to open a picture: `open_picture`
    engine        a network ready to run, by OpenVINO or torch: `Engine`
    faces         MTCNN, made fast: `FaceFinder`, `crop_faces`
    network       the gray ResNet: `gray_resnet`, `freeze_except`
    data          reading, splitting, augmenting and feeding images: `load_images`, `FaceBatches`
    judging       figures and plots of how good a classifier is: `judge`, `report`
    checkpoints   what a training run writes, and reading it: `Run`, `load_checkpoint`, `load_network`
    training      the one loop of all stages: `fit`, `fit_classifier`
    inference     a trained classifier: `Classifier`
    command line  options that several scripts have, errors in one line: `add_options`, `one_line_errors`

torch and other large packages are imported by the functions that use them, so that importing this file, as
every `--help` does, takes a fraction of a second.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import ctypes
import datetime
import errno
import filecmp
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import pickletools
import re
import secrets
import shutil
import statistics
import sys
import textwrap
import threading
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, NoReturn, TextIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # on Windows, where nothing is locked
    fcntl = None

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import ModuleType

    import pandas as pd
    import torch
    from torch import Tensor, nn
    from torch.distributed import Store
    from torch.optim.swa_utils import AveragedModel

# --- constants ---

SPLITS = ("train", "val", "test")  # of FER, unpacked: val picks, test reports
EMOTIONS = ("angry", "disgusted", "happy", "sad", "surprised")
RESOURCES = Path(__file__).parent / "resources"
DEFAULT_MODEL = RESOURCES / "emotion_resnet50.pt"

MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 32, 512  # pixels, chosen here
IMAGE_SIZE = 96  # pixels, side of the network's input; 64 costs half the time, see resources/EXPERIMENTS.md
# Share of a detector box's longer side that a crop adds. FER's faces are cut as with -0.04 (median of the 170
# faces that MTCNN finds in 200 of PublicTest, quartiles -0.12 and 0.03).
CROP_MARGIN = 0.0

# Of a perceptual hash's 64. In 2,239 scraped faces all 23 pairs looked at up to 4 bits apart are one picture,
# half of the 8 at 6 bits, a few of 16 at 8, none of 16 at 10.
DUPLICATE_BITS = 8

# torchvision's statistics of ImageNet, channels R, G, B, for values in 0-1.
COLOR_MEAN, COLOR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GRAY_MEAN, GRAY_STD = 0.449, 0.226  # their means over the channels
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what Pillow's convert("L") uses


# --- processes ---

PATIENCE = datetime.timedelta(days=7)  # with one that works alone; torchrun ends those that wait in vain
GRACE = 10  # seconds in which torchrun ends a process after another has failed; it takes a tenth of one


def num_cores() -> int:
    """Return on how many cores this process may work: with torchrun, its share of the machine's."""
    able = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, able // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def join_others(*, is_quiet: bool = False) -> tuple[int, int]:
    """Join the processes that torchrun started together with this one, if it did.

    Each gets its share of the processor, and of the GPUs by `pick_device`.

    Args:
        is_quiet: all but the first write nothing more to stdout and stderr, see `one_line_errors`.

    Returns:
        This process's rank, and how many there are: (0, 1) without torchrun.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    import torch
    from torch import distributed

    agent, rank, world = next(distributed.rendezvous("env://", timeout=PATIENCE))
    store = _first_store(agent, rank)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    torch.set_num_threads(num_cores())
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if is_quiet and rank:
        sys.stdout = sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    return rank, world


def _first_store(agent: Store, rank: int) -> Store:
    """Return the store that the first process opens.

    torchrun's own outlives a restart, with the addresses of processes that died, and is asked for one alone.
    """
    from torch import distributed

    host = os.environ["MASTER_ADDR"]
    if rank == 0:
        store = distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
        agent.set("first", str(store.port))
        return store
    while True:
        port = int(agent.get("first"))
        with contextlib.suppress(distributed.DistError):  # that of one that died
            store = distributed.TCPStore(host, port, timeout=datetime.timedelta(seconds=1))
            store.set_timeout(PATIENCE)
            return store


def place() -> tuple[int, int]:
    """Return this process's rank among those that it joined, and how many they are: (0, 1) if it is alone."""
    torch = sys.modules.get("torch")  # who has joined others has imported it
    if not torch or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def gather(value: object) -> list:
    """Wait until all processes that joined each other are here; return what each gives, by rank."""
    values = [value] * place()[1]
    if len(values) > 1:
        import torch

        torch.distributed.all_gather_object(values, value)
    return values


def leave_others() -> None:
    """Go on alone: all processes but the first end here."""
    rank, _ = place()
    _end_group()
    if rank:
        sys.exit()


def _end_group() -> None:
    """Take the group of processes down, if there is one; else its threads may abort this one as it ends."""
    if place()[1] > 1:
        sys.modules["torch"].distributed.destroy_process_group()


# --- files ---


# What of a text would act on the terminal or split a line: control characters, line ends, marks that turn the
# direction of writing, and what Python makes of the bytes of a name that is not UTF-8.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
TEMPORARY = re.compile(r"\.emotion-[0-9a-f]{16}\.tmp")


def printable(text: object) -> str:
    """Return a text that others chose, such as a file's name or a label, as one line without side effects."""
    return UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], str(text))


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Give a temporary path that becomes `path` when the block ends well.

    So `path` is always whole: new, or what it was before. The temporary file has a random name in the same
    folder, is created by this call, never through a link, and is gone after any failure. What a killed run
    left of such files is removed by the next run that writes into the folder.

    Args:
        sync: have the content on the disk before it gets its name, where losing it would hurt.

    Raises:
        OSError: the file could not be written; the message names `path`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_strays(path.parent.absolute())
        temporary, descriptor = _create_temporary(path.parent)
        try:
            yield temporary
            if sync:
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
            if fcntl:
                os.close(descriptor)
    except OSError as error:
        if error.errno is None or isinstance(error, BrokenPipeError):  # it has its message; it is stdout's
            raise
        raise OSError(f"cannot write {path}: {error.strerror}") from None


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Give an empty folder in `parent` that is gone after the block, or renamed; strays as of `replacing`."""
    _remove_strays(parent.absolute())
    temporary, descriptor = _create_temporary(parent, is_folder=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if fcntl:
            os.close(descriptor)


def _create_temporary(parent: Path, *, is_folder: bool = False) -> tuple[Path, int | None]:
    """Create an empty file or folder; return its path, and a descriptor that holds a lock until closed."""
    while True:
        path = parent / f".emotion-{secrets.token_hex(8)}.tmp"
        if is_folder:
            path.mkdir(mode=0o700)
        else:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        if not fcntl:
            return path, None
        with contextlib.suppress(FileNotFoundError):  # another run took it for a stray before it was locked
            descriptor = os.open(path, os.O_NOFOLLOW | (os.O_RDONLY if is_folder else os.O_RDWR))
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.exists():
                return path, descriptor
            os.close(descriptor)


@functools.cache  # once a run is enough
def _remove_strays(folder: Path) -> None:
    """Remove the temporary files and folders that a killed run left, and no process holds."""
    strays = []
    with contextlib.suppress(PermissionError):  # a folder that may be written into but not listed
        strays = [path for path in folder.iterdir() if TEMPORARY.fullmatch(path.name)]
    for path in strays if fcntl else ():
        with contextlib.suppress(OSError):  # held, a link, another user's, or there are no locks
            descriptor = os.open(path, os.O_NOFOLLOW | (os.O_RDONLY if path.is_dir() else os.O_RDWR))
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def only_run_in(*folders: Path) -> Iterator[None]:
    """Let no other run of any script work in these folders while the block runs.

    The lock is the operating system's: it ends with the process, however that ends. Its file, .emotion.lock
    in the folder, says who holds it and goes when the block ends. Folders are made if need be, and go again
    if they stay empty. On a file system without locks the block just runs. Of processes that joined each
    other the first holds the locks, here and in `only_writer_of`.

    Raises:
        BlockingIOError: another run works there; the message names it.
        OSError: a folder cannot be made or written into.
    """
    missing = [path for folder in folders for path in (folder, *folder.parents) if not path.exists()]
    try:
        with contextlib.ExitStack() as stack:
            for path, folder in sorted({folder.resolve(): folder for folder in folders}.items()):
                stack.enter_context(_locked(path / ".emotion.lock", folder))
            yield
    finally:
        for path in missing if place()[0] == 0 else ():
            with contextlib.suppress(OSError):  # it holds something
                path.rmdir()


def only_writer_of(path: Path) -> contextlib.AbstractContextManager[None]:
    """Let no other run write one file while the block runs; the folder is made. Raises as `only_run_in`."""
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    return _locked(path.parent / f".emotion-{name}.lock", path)


@contextlib.contextmanager
def _locked(lock: Path, what: Path) -> Iterator[None]:
    """Hold a lock by its file while the block runs; `what` is what a message says is in use."""
    if not fcntl or place()[0]:
        yield
        return
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(lock, what)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(f"cannot write into {lock.parent}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _open_locked(lock: Path, what: Path) -> int:
    """Open and lock a file, and write into it who holds it; return its descriptor."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 100, 0).decode(errors="replace") or "another run"
            os.close(descriptor)
            raise BlockingIOError(f"{what} is in use by {holder}; wait for its end or name another") from None
        except OSError:  # a file system without locks
            return descriptor
        with contextlib.suppress(FileNotFoundError):  # the run that held it has just removed it
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                os.ftruncate(descriptor, 0)
                with contextlib.suppress(OSError):  # on a full disk it does without a name
                    os.pwrite(descriptor, f"{Path(sys.argv[0]).name} (process {os.getpid()})".encode(), 0)
                return descriptor
        os.close(descriptor)


def save_json(path: Path, value: object) -> None:
    """Write a value as indented JSON; raises OSError as `replacing`, ValueError for NaN, which JSON lacks."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def filling_page(template: Path, path: Path) -> Iterator[Callable[[object], None]]:
    """Write a page from a template that has __DATA__ where its data go; give the function that adds a value.

    Each value becomes a line of JSON in which no text, such as a file's name, can end the script element.
    """
    before, after = template.read_text(encoding="utf-8").split("__DATA__")
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as page:
        page.write(before)
        yield lambda value: page.write(json.dumps(value).replace("<", "\\u003c") + "\n")
        page.write(after)


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Return the digest of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


# How files begin that people pass by mistake, and the words for them.
BEGINNINGS = {
    b"version https://git-lfs.github.com": "a pointer of Git LFS, not the file itself (git lfs pull gets it)",
    b"\x89HDF\r\n": "HDF5, as Keras writes it",
    b"\x1f\x8b": "packed by gzip",
    b"\xfd7zXZ": "packed by xz",
    b"BZh": "packed by bzip2",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"PK\x03\x04": "a zip archive",
    b"\xff\xfe": "text in UTF-16, not in UTF-8",
    b"\xfe\xff": "text in UTF-16, not in UTF-8",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"%PDF": "a PDF document",
    b"\x80": "a pickle of Python",
}


def inside(folder: Path, name: str) -> Path:
    """Return the path below a folder that data names, ValueError if it leads out, be it by a link."""
    parts = PurePath(name).parts
    is_plain = parts and not PurePath(name).is_absolute() and ".." not in parts and "\0" not in name
    if not is_plain or not (folder / name).parent.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name[:100]!r} leads out of {folder}")
    return folder / name


def kind_of(head: bytes) -> str:
    """Return in words what a file is that begins with `head`, about 500 bytes of it; "" for other text."""
    for beginning, kind in BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "a web page"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 2**32:
        return "safetensors"
    if head[:1] == b"\x08" and head[2:3] == b"\x12":
        return "ONNX"
    return "empty" if not head else "of an unknown kind, not text" if b"\0" in head else ""


def read_table(
    path: Path, columns: set[str], parse: Callable[[dict[str, str]], object], expected: str
) -> list:
    """Return what `parse` makes of each row of a CSV in UTF-8, its cells by column.

    Args:
        columns: that it must have.
        parse: may raise ValueError, with what is wrong with the row.
        expected: what the file should be, for the message.

    Raises:
        ValueError: the file is no such table; the message says what it is, or which line is wrong.
    """
    with path.open("rb") as file:
        if kind := kind_of(file.read(512)):
            raise ValueError(f"{path} is {kind}, expected {expected}")
    rows = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        try:
            if missing := columns - set(table.fieldnames or ()):
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            for cells in table:
                if None in cells or None in cells.values():
                    raise ValueError("it has more or fewer columns than the first")
                rows.append(parse(cells))
        except (csv.Error, ValueError) as error:
            reason = "it is not in UTF-8" if isinstance(error, UnicodeDecodeError) else error
            raise ValueError(f"{path} is not {expected}, line {table.line_num}: {reason}") from None
    return rows


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_cores())


# --- pictures ---

# Pillow's other plugins are not asked: some start programs (EPS) or read further files.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA", "ICO")
HEIC_SUFFIXES = {".heic", ".heif"}  # not read, but worth a word
HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}  # ISO/IEC 23008-12
MAX_PIXELS = 178_956_970  # at twice its MAX_IMAGE_PIXELS Pillow itself refuses
KEPT_INFO = ("icc_profile", "transparency")
# What Pillow raises for files that it cannot read; found by damaging files of a dozen formats at random.
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)


class PictureError(ValueError):
    """A file cannot be used as a picture.

    Attributes:
        reason: "unknown format", "too large" or "damaged" (or not there); the message names the file too.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case and with their dot, that files of FORMATS, or HEIC, have."""
    kinds = {*FORMATS, "MPO"}  # the last is opened as JPEG
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in kinds}
    return frozenset(known | HEIC_SUFFIXES)


def open_picture(
    path: Path, mode: str = "RGB", *, max_pixels: int = MAX_PIXELS, draft: int | None = None
) -> Image.Image:
    """Read a picture, or an animation's first frame, upright by its EXIF, in 8 bits.

    Transparent parts become white; 16 bits a channel are scaled, not clipped. `format` of the result is that
    of the file, and `info` keeps an RGB colour profile.

    Args:
        mode: "RGB" or "L".
        max_pixels: larger pictures are refused before they are decoded.
        draft: decode a JPEG no larger than needed for a shorter side of so many pixels.

    Raises:
        PictureError: the file is missing, damaged, too large, or of a format that is not in FORMATS.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError
            if draft:
                image.draft(None, (draft, draft))
            image.load()
            _turn(image, image.getexif())  # a copy would take as long as reading
            profile, file_format = image.info.get("icc_profile") or b"", image.format
            picture = _in_mode(image, mode)
    except UnidentifiedImageError:
        with path.open("rb") as file:
            head = file.read(12)
        kind = "HEIC, which is not read" if head[8:12] in HEIC_BRANDS else "not an image that Pillow can read"
        raise PictureError("unknown format", f"{path} is {kind}; convert it to JPEG or PNG") from None
    except Image.DecompressionBombError:
        limit = max_pixels // 10**6
        message = f"{path} has more than {limit} million pixels; scale it down first"
        raise PictureError("too large", message) from None
    except PILLOW_ERRORS as error:
        reason = getattr(error, "strerror", None) or error
        raise PictureError("damaged", f"{path} cannot be read: {reason}") from None
    picture.format = file_format
    picture.info = {"icc_profile": profile} if profile[16:20] == b"RGB " else {}  # its colour space field
    return picture


def _turn(image: Image.Image, exif: Image.Exif) -> None:
    """Turn an image upright by an EXIF, in place; its own is lost, as is what KEPT_INFO does not name.

    Pillow would rewrite it, and fail if it is damaged.
    """
    image.info = {name: image.info[name] for name in KEPT_INFO if name in image.info}
    image.getexif()[ExifTags.Base.Orientation] = exif.get(ExifTags.Base.Orientation, 1)
    ImageOps.exif_transpose(image, in_place=True)


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image of any mode to "RGB" or "L"; return itself if it is that."""
    if image.mode.startswith(("I", "F")):  # 16 bits or more, which convert() would clip instead of scale
        values = np.asarray(image, np.float32)
        white = 65535 if image.mode.startswith("I") else max(values.max(), 1)
        image = Image.fromarray((values / white * 255).clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        if image.mode != "RGBA":  # into its own mode an image is copied, and a large one has no room for that
            image = image.convert("RGBA")
        picture = Image.new("RGB", image.size, "white")
        picture.paste(image, mask=image)
        image = picture
    return image if image.mode == mode else image.convert(mode)


# --- engine ---

# How many images an engine takes at once, filled up to one of these: OpenVINO prepares for each shape that it
# meets. Batches of more are no faster on two cores.
BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# Chosen here. Each model, and each change of versions, leaves up to 200 MB behind.
CACHE_DAYS = 30  # that what is kept may be unused
CACHE_KEPT = 4  # models, those used last
CACHED = re.compile(r"(pnet|rnet|onet|classifier)-[0-9a-f]{16}(\.bin)?")  # .bin: of earlier versions


def cache_dir() -> Path:
    """Return the folder for what can be made again; see the XDG base directory specification."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emotion-detector"
    except RuntimeError:  # the user has no home; nothing can be kept below a device
        return Path(os.devnull) / "emotion-detector"


def from_pixels(network: nn.Module, mean: float, std: float) -> nn.Module:
    """Wrap a network so that it takes images (N, H, W, C), values 0-255, and normalises them itself."""
    from torch import nn

    class FromPixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
            return self.network((images.permute(0, 3, 1, 2).float() - mean) / std)

    return FromPixels()


class Blueprint(NamedTuple):
    """What an engine is made of, asked for only where there is no converted one."""

    network: nn.Module | Path  # takes and returns batches; or the file of one that was exported
    example: Tensor | None  # a batch of images (2, H, W, C), as the network takes them; None with a file
    notes: dict  # plain values that are kept with the network


def find_device(name: str) -> str:
    """Return the name of the device that `pick_device` picks, without the second that importing torch takes.

    torch is asked only where a GPU's driver is: where OpenVINO runs networks on a CPU nothing else needs it.
    """
    driver = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    if name == "auto" and sys.platform != "darwin" and not Path("/dev/kfd").exists():  # Apple's GPU, AMD's
        try:
            ctypes.CDLL(driver)
        except OSError:
            return "cpu"
    return name if name == "cpu" else str(pick_device(name))


def pick_device(name: str) -> torch.device:
    """Return a device by its name; "auto" is the first that there is of cuda, mps and cpu.

    Each of the processes that torchrun starts on a machine has a GPU of its own.

    Raises:
        ValueError: this machine has none of that kind, or too few.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise ValueError(f"this machine has no {name} device that PyTorch can use; try --device auto")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = {"cuda": torch.cuda.device_count(), "mps": 1, "cpu": processes}[name]
    if processes > count:
        raise ValueError(f"{processes} processes share {count} {name} device; start {count}, or --device cpu")
    return torch.device(name, int(os.environ["LOCAL_RANK"]) if name != "cpu" and processes > 1 else None)


class Engine:
    """A network ready to run: compiled by OpenVINO for a CPU, else as it is by torch.

    What OpenVINO converts and compiles is kept in the user's cache folder, for converting takes seconds. What
    is kept there is good for one set of weights and versions; what is missing, damaged, or in reach of other
    users is made again.

    Attributes:
        notes: those of its blueprint.
    """

    def __init__(
        self,
        name: str,
        key: bytes,
        build: Callable[[], Blueprint],
        device: torch.device | str,
        *,
        any_size: bool = False,
        fast: bool = False,
        num_threads: int = 1,
    ):
        """Compile a network, or find it compiled.

        Args:
            name: of its folder in the cache; one that CACHED does not know is never removed.
            key: stands for all on which the blueprint depends, beside this file.
            build: makes the blueprint.
            device: where it runs.
            any_size: H and W may vary from call to call.
            fast: use bfloat16 on a CPU that is fast at it.
            num_threads: how many threads will call it at once; on a CPU they share the cores.
        """
        self._pads = not any_size
        how = {"any_size": any_size, "fast": fast, "num_threads": num_threads}
        made = _openvino_engine(name, key, build, **how) if str(device) == "cpu" else None
        self._infer, self.notes = made or _torch_engine(build(), device)
        self._nothing: list[np.ndarray] | None = None  # the outputs for no images, once they were asked for

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """Run images (N, H, W, C); return the network's outputs, float32 (N, ...)."""
        if not self._pads:
            return self._infer(images)
        if not len(images):
            one = np.zeros((1, *images.shape[1:]), images.dtype)
            self._nothing = self._nothing or [output[:0] for output in self._infer(one)]
            return self._nothing
        parts = []
        for start in range(0, len(images), BATCH_SIZES[-1]):
            batch = images[start : start + BATCH_SIZES[-1]]
            length = next(size for size in BATCH_SIZES if size >= len(batch))
            padding = np.zeros((length - len(batch), *batch.shape[1:]), batch.dtype)
            parts.append([output[: len(batch)] for output in self._infer(np.concatenate([batch, padding]))])
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def _torch_engine(blueprint: Blueprint, device: torch.device | str) -> tuple[Callable, dict]:
    """Return the function that runs a network by torch, and the notes."""
    import torch

    if isinstance(blueprint.network, Path):
        raise ValueError(f"{blueprint.network} is an exported network: it runs by OpenVINO on --device cpu")
    network = blueprint.network.eval().to(device, memory_format=torch.channels_last)

    def infer(images: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            outputs = network(torch.from_numpy(images).to(device))
        return [output.cpu().numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]

    return infer, blueprint.notes


def load_openvino() -> ModuleType:
    """Import OpenVINO, without its telemetry, which would report each import to Google Analytics."""
    sys.modules.setdefault("openvino_telemetry", None)
    import openvino

    # Its tables of types are made when they are first used, and two threads that do so wait for each other.
    openvino.Type(openvino.Tensor(np.zeros(1, np.uint8)).data.dtype).to_dtype()
    return openvino


def _openvino_engine(
    name: str, key: bytes, build: Callable[[], Blueprint], *, any_size: bool, fast: bool, num_threads: int
) -> tuple[Callable, dict] | None:
    """Return the function that runs a network by OpenVINO, and the notes; None where it is not installed."""
    try:
        openvino = load_openvino()
    except ImportError:
        return None
    core = openvino.Core()
    fast = fast and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    options = {"INFERENCE_NUM_THREADS": num_cores(), "NUM_STREAMS": min(num_threads, num_cores())}
    options["INFERENCE_PRECISION_HINT"] = "bf16" if fast else "f32"
    key = repr((openvino.__version__, any_size)).encode() + Path(__file__).read_bytes() + key
    digest = hashlib.sha256(key).hexdigest()
    folder = cache_dir() / f"{name}-{digest[:16]}"

    def compile_kept() -> tuple[openvino.CompiledModel, dict]:
        path = folder / "network.xml"
        _check_private(folder.parent, folder, *folder.iterdir())
        notes = json.loads(core.read_model(path).get_rt_info("emotion_detector").value)
        if notes["digest"] != digest:
            raise RuntimeError("the kept network is another one")
        return core.compile_model(path, "CPU", {**options, "CACHE_DIR": str(folder)}), notes

    try:
        compiled, notes = compile_kept()
    except (OSError, RuntimeError, ValueError, LookupError):  # not there, damaged, or in reach of others
        shutil.rmtree(folder, ignore_errors=True)
        blueprint = build()
        notes = {**blueprint.notes, "digest": digest}
        model = _convert(blueprint, any_size)
        model.set_rt_info(json.dumps(notes), "emotion_detector")
        try:
            _keep(model, folder)
            compiled, notes = compile_kept()
            for path in folder.iterdir():
                path.chmod(0o600)
        except (OSError, RuntimeError) as error:
            _report_unkept(
                folder.parent, getattr(error, "strerror", None) or "OpenVINO cannot write or read it"
            )
            compiled = core.compile_model(model, "CPU", options)
    with contextlib.suppress(OSError):
        os.utime(folder)  # it is in use
    requests = threading.local()  # a request takes one thread at a time

    def infer(images: np.ndarray) -> list[np.ndarray]:
        if not hasattr(requests, "own"):
            requests.own = compiled.create_infer_request()
        return list(requests.own.infer([np.ascontiguousarray(images)], share_inputs=True).values())

    return infer, notes


def _is_own(path: Path) -> bool:
    """Return whether a file or folder, not a link in its place, belongs to this user."""
    return os.name != "posix" or path.lstat().st_uid == os.getuid()


def _check_private(*paths: Path) -> None:
    """Raise PermissionError if other users could have written one of some files or folders."""
    for path in paths:
        if not _is_own(path) or (os.name == "posix" and path.stat().st_mode & 0o022):
            raise PermissionError(errno.EPERM, "other users can write there")


@functools.cache  # once for all networks
def _report_unkept(folder: Path, reason: str) -> None:
    """Print that each start will take its time."""
    line = f"networks cannot be kept in {folder} ({reason}), so each start takes some seconds more"
    print(printable(line), file=sys.stderr)


def _convert(blueprint: Blueprint, any_size: bool) -> openvino.Model:  # noqa: F821
    """Convert a network to OpenVINO's form, for batches of any length."""
    openvino = load_openvino()
    if isinstance(blueprint.network, Path):
        return openvino.Core().read_model(blueprint.network)
    height, width, channels = blueprint.example.shape[1:]
    shape = (-1, -1, -1, channels) if any_size else (-1, height, width, channels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that tracing will go some day
        return openvino.convert_model(
            blueprint.network.eval(), example_input=blueprint.example, input=[openvino.PartialShape(shape)]
        )


def _keep(model: openvino.Model, folder: Path) -> None:  # noqa: F821
    """Put a converted network into the cache, all of it or nothing, and take out what is little used."""
    import openvino

    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if _is_own(folder.parent):
        folder.parent.chmod(0o700)
    _check_private(folder.parent)
    with temporary_folder(folder.parent) as temporary:
        openvino.save_model(model, temporary / "network.xml", compress_to_fp16=False)
        for path in temporary.iterdir():
            path.chmod(0o600)
        try:
            temporary.rename(folder)
        except OSError as error:
            is_there = error.errno in {errno.ENOTEMPTY, errno.EEXIST}  # another process has kept it meanwhile
            if not is_there:
                raise
    with contextlib.suppress(FileNotFoundError):  # another process may be doing the same
        ages = {path: time.time() - path.stat().st_mtime for path in folder.parent.iterdir()}
        num_kept = Counter()
        for path in sorted(filter(lambda path: CACHED.fullmatch(path.name), ages), key=ages.get):
            name = path.name.split("-")[0]
            num_kept[name] += 1
            if num_kept[name] > CACHE_KEPT or ages[path] > CACHE_DAYS * 24 * 3600:
                path.unlink() if path.is_file() else shutil.rmtree(path)


# --- faces ---

PNET_WINDOW, RNET_SIZE, ONET_SIZE = 12, 24, 48  # pixels, what each stage sees of a face
MTCNN_FACTOR = 0.709  # from one level of the pyramid to the next: half the pixels
# What the next stage gets to see of PNet and of RNet. facenet-pytorch's first is 0.6, which finds the same
# 288 of its 290 surest faces in 32 photos and 200 frames of video; in 400 scraped photos, 381 faces, not 377.
MTCNN_THRESHOLDS = (0.8, 0.7)
SAME_FACE = 0.7  # candidates that overlap more are one face; facenet-pytorch's number
MIN_FACE_SIZE = 0.025  # share of the shorter side; never less than MIN_FACE_PIXELS
MIN_FACE_PIXELS = 20  # facenet-pytorch's default


class Faces(NamedTuple):
    """N faces that were found in one image, N may be 0."""

    boxes: np.ndarray  # (N, 4) float32, left, top, right, bottom in pixels
    probs: np.ndarray  # (N,) float32, the detector's confidence, 0-1
    landmarks: np.ndarray  # (N, 5, 2) float32, x and y: left and right eye, nose, left and right mouth corner


class FaceFinder:
    """MTCNN with facenet-pytorch's networks and weights, batched over candidates and images.

    PNet proposes 12-pixel windows at every level of an image pyramid, RNet sifts them at 24 pixels, ONet
    decides at 48 and places five landmarks. What differs from facenet-pytorch, all of it for speed:
    the pyramid is made of 8-bit pixels bilinearly, each level from one about twice as large, not by
    averaging areas of the whole image; of neighbouring windows of a level only the peak proposes;
    RNet's crops come from the level where the face is about 24 pixels wide; candidates that overlap are
    merged once they are corrected, so that ONet sees a face once or twice and not a dozen times.

    Source: Zhang et al. 2016, "Joint Face Detection and Alignment Using Multitask Cascaded Convolutional
    Networks", https://arxiv.org/abs/1604.02878.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        min_face_size: float = MIN_FACE_SIZE,
        min_prob: float = 0.9,
        num_threads: int = 1,
    ):
        """Load the networks.

        Args:
            device: where they run.
            min_face_size: the smallest face to look for, 12 pixels or more; or below 1, a share of the
                image's shorter side, which never means less than MIN_FACE_PIXELS.
            min_prob: how sure ONet must be of a face, 0-1.
            num_threads: see `Engine`.

        Raises:
            ValueError: `min_face_size` is neither.
        """
        if not (0 < min_face_size < 1 or min_face_size >= PNET_WINDOW):
            raise ValueError(
                f"min_face_size {min_face_size} is neither {PNET_WINDOW} pixels or more nor a share below 1"
            )
        self.min_face_size = min_face_size
        self.min_prob = min_prob
        self._pnet = _mtcnn_engine("PNet", None, device, num_threads)
        self._rnet = _mtcnn_engine("RNet", RNET_SIZE, device, num_threads)
        self._onet = _mtcnn_engine("ONet", ONET_SIZE, device, num_threads)

    def find(self, image: Image.Image) -> Faces:
        """Find the faces of an RGB image that are at least `min_prob` sure, the surest first.

        A box may reach over the image's edge but not lie outside.
        """
        return self.find_all([image])[0]

    def find_all(self, images: Sequence[Image.Image]) -> list[Faces]:
        """Find the faces of several RGB images; those of one size are searched together."""
        order = sorted(range(len(images)), key=lambda i: images[i].size)
        found = {}
        for _, group in itertools.groupby(order, key=lambda i: images[i].size):
            numbers = list(group)
            found |= zip(numbers, self._search([images[i] for i in numbers]), strict=True)
        return [found[i] for i in range(len(images))]

    def refine(self, image: Image.Image, boxes: np.ndarray) -> Faces:
        """Look again at N known faces that may have moved a little, with ONet alone.

        Args:
            image: RGB.
            boxes: (N, 4), as found in the frame before, say; N may be 0.

        Returns:
            N entries in the order of `boxes`, none left out; `probs` say whether each is still a face.
        """
        owners = np.zeros(len(boxes), int)
        once = self._decide([image], owners, _squares(boxes))
        # A second look costs half a millisecond a face; of boxes off by a fifth of their side, it takes the
        # overlap with the true ones from 0.89 to 0.94 (median of 81 faces).
        return self._decide([image], owners, _squares(once.boxes))

    def _search(self, images: Sequence[Image.Image]) -> list[Faces]:
        """Find the faces of images of one size."""
        size = np.array(images[0].size)
        min_pixels = self.min_face_size
        if min_pixels < 1:
            min_pixels = max(min_pixels * size.min(), MIN_FACE_PIXELS)
        scales, levels = _pyramid([np.asarray(image) for image in images], PNET_WINDOW / min_pixels)
        boxes, probs, owners = self._propose(scales[1:], levels[1:])
        kept = _distinct(boxes, probs, owners)
        boxes, owners = boxes[kept], owners[kept]

        shifts, probs = self._rnet(_level_crops(levels, owners, boxes, size))
        kept = np.flatnonzero(probs[:, 1] > MTCNN_THRESHOLDS[1])
        boxes, probs, owners = _shifted(boxes[kept], shifts[kept]), probs[kept, 1], owners[kept]
        boxes = _squares(boxes)
        kept = _distinct(boxes, probs, owners)

        faces, owners = self._decide(images, owners[kept], boxes[kept]), owners[kept]
        is_face = faces.probs >= self.min_prob
        is_face &= (faces.boxes[:, :2] < size).all(1) & (faces.boxes[:, 2:] > 0).all(1)
        kept = np.flatnonzero(is_face)
        kept = kept[_distinct(faces.boxes[kept], faces.probs[kept], owners[kept], of_smaller=True)]
        return [Faces(*(part[kept[owners[kept] == i]] for part in faces)) for i in range(len(images))]

    def _propose(
        self, scales: Sequence[float], levels: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Run PNet over the levels; return M squared boxes (M, 4), their probs (M,) and images (M,)."""
        proposals = [(np.empty((0, 4), np.float32), np.empty(0, np.float32), np.empty(0, int))]
        for scale, level in zip(scales, levels, strict=True):
            shifts, probs = self._pnet(level)
            owners, y, x = _peaks(probs[:, 1], MTCNN_THRESHOLDS[0])
            corners = 2 * np.stack([x, y], 1) + 1  # PNet's stride is 2
            windows = np.hstack([corners, corners + PNET_WINDOW - 1]) / scale
            windows = np.floor(windows).astype(np.float32)
            sides = (windows[:, 2:] - windows[:, :2])[:, [0, 1, 0, 1]]
            boxes = _squares(windows + shifts[owners, :, y, x] * sides)
            proposals.append((boxes, probs[owners, 1, y, x], owners))
        return tuple(np.concatenate(parts) for parts in zip(*proposals, strict=True))

    def _decide(self, images: Sequence[Image.Image], owners: np.ndarray, boxes: np.ndarray) -> Faces:
        """Run ONet on M square boxes (M, 4) of the images `owners` (M,); return M entries."""
        regions = _inside(boxes, np.array(images[0].size))
        crops = np.empty((len(boxes), ONET_SIZE, ONET_SIZE, 3), np.uint8)
        for i, region in enumerate(regions.tolist()):
            size, image = (ONET_SIZE, ONET_SIZE), images[owners[i]]
            crops[i] = image.resize(size, Image.Resampling.BILINEAR, region, reducing_gap=2)
        shifts, points, probs = self._onet(crops)
        points = points.reshape(-1, 2, 5).transpose(0, 2, 1)
        landmarks = points * (boxes[:, None, 2:] - boxes[:, None, :2] + 1) + boxes[:, None, :2] - 1
        return Faces(_shifted(boxes, shifts), probs[:, 1], landmarks)


def _mtcnn_engine(name: str, size: int | None, device: torch.device | str, num_threads: int) -> Engine:
    """Load PNet, RNet or ONet, for square images of `size` pixels or, without, images of any size."""
    package = Path(importlib.util.find_spec("facenet_pytorch").origin).parent  # imported only if need be

    def build() -> Blueprint:
        import facenet_pytorch
        import torch

        example = torch.zeros(2, size or 64, size or 64, 3, dtype=torch.uint8)
        return Blueprint(from_pixels(getattr(facenet_pytorch, name)(), 127.5, 128), example, {})

    key = (package / "data" / f"{name.lower()}.pt").read_bytes()
    is_fast = name != "ONet"  # which has the last word on a few faces; the others only propose
    any_size = size is None
    return Engine(name.lower(), key, build, device, any_size=any_size, fast=is_fast, num_threads=num_threads)


def _pyramid(images: Sequence[np.ndarray], scale: float) -> tuple[list[float], list[np.ndarray]]:
    """Shrink N images of one size to `scale` and, step by step, down to PNet's window.

    A finer level comes first, from which RNet's crops of the smallest faces are cut.

    Returns:
        The levels' scales, descending, and the levels, uint8 (N, H, W, 3).
    """
    height, width = images[0].shape[:2]
    scales, levels = [min(scale * RNET_SIZE / PNET_WINDOW, 1.0)], []
    while min(height, width) * scale >= PNET_WINDOW:
        scales.append(scale)
        scale *= MTCNN_FACTOR
    for i, scale in enumerate(scales):
        size = (int(width * scale + 1), int(height * scale + 1)) if scale < 1 else (width, height)
        source = levels[max(i - 2, 0)] if i else images  # about twice as large
        levels.append(np.stack([_shrink(image, size) for image in source]))
    return scales, levels


@functools.cache
def _opencv() -> ModuleType | None:
    """Import OpenCV; None where it does not load, for want of a screen's libraries, and Pillow stands in."""
    try:
        import cv2
    except ImportError:
        return None
    cv2.setNumThreads(num_cores())  # with torchrun its share
    return cv2


def _shrink(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize pixels, uint8 (H, W, 3), to a width and height, filtered by a triangle or what is nearly one."""
    cv2 = _opencv()
    if not cv2:
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    while pixels.shape[1] >= 2 * size[0] and pixels.shape[0] >= 2 * size[1]:
        pixels = cv2.resize(pixels, (pixels.shape[1] // 2, pixels.shape[0] // 2))
    ratio = pixels.shape[1] / size[0]
    if ratio > 1:  # to the variance of the triangle, in pixels, the resizing adds a sixth
        pixels = cv2.GaussianBlur(pixels, (3, 3), ((ratio**2 - 1) / 6) ** 0.5)
    return cv2.resize(pixels, size)


def _cut(pixels: np.ndarray, region: Sequence[float], side: int) -> np.ndarray:
    """Cut a region, xyxy, out of pixels, uint8 (H, W, 3), which is about as large: (side, side, 3)."""
    left, top, right, bottom = region
    x, y = max(int(left) - 1, 0), max(int(top) - 1, 0)
    pixels = pixels[y : int(bottom) + 2, x : int(right) + 2]  # OpenCV takes no side of more than 32,766
    left, top, right, bottom = left - x, top - y, right - x, bottom - y
    cv2, size = _opencv(), (side, side)
    if not cv2:
        image = Image.fromarray(pixels)
        return np.asarray(image.resize(size, Image.Resampling.BILINEAR, (left, top, right, bottom)))
    dx, dy = (right - left) / side, (bottom - top) / side
    matrix = np.array([[dx, 0, left + dx / 2 - 0.5], [0, dy, top + dy / 2 - 0.5]])  # from the crop's pixels
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(pixels, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _peaks(probs: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find where probs (N, H, W) reach the threshold and no neighbour is higher: N, H, W indices.

    It stands in for suppressing non-maxima: all windows of a level have one size, so those that overlap most
    are neighbours.
    """
    n, y, x = np.nonzero(probs >= threshold)
    padded = np.pad(probs, ((0, 0), (1, 1), (1, 1)))
    around = [padded[n, y + down, x + right] for down, right in np.ndindex(3, 3)]
    is_peak = probs[n, y, x] == np.max(around, axis=0)
    return n[is_peak], y[is_peak], x[is_peak]


def _level_crops(
    levels: Sequence[np.ndarray], owners: np.ndarray, boxes: np.ndarray, image_size: np.ndarray
) -> np.ndarray:
    """Cut M boxes out of a pyramid, each where its side is nearest RNet's: uint8 (M, 24, 24, 3)."""
    regions = _inside(boxes, image_size)
    sides = (regions[:, 2:] - regions[:, :2]).max(1)
    scales = np.array([level.shape[2:0:-1] for level in levels]) / image_size  # (levels, 2)
    is_fine_enough = sides[:, None] * scales[:, 0] >= RNET_SIZE * MTCNN_FACTOR**0.5
    chosen = (is_fine_enough.sum(1) - 1).clip(0)
    regions = (regions * np.tile(scales[chosen], 2)).tolist()
    crops = np.empty((len(boxes), RNET_SIZE, RNET_SIZE, 3), np.uint8)
    for i, (level, owner) in enumerate(zip(chosen, owners, strict=True)):
        crops[i] = _cut(levels[level][owner], regions[i], RNET_SIZE)
    return crops


def _inside(boxes: np.ndarray, image_size: np.ndarray) -> np.ndarray:
    """Clip MTCNN's boxes (M, 4), whose pixels count from 1, to regions of the image at least a pixel wide."""
    starts = (boxes[:, :2] - 1).clip(0, image_size - 1)
    return np.hstack([starts, boxes[:, 2:].clip(starts + 1, image_size)]).astype(np.float32)


def _squares(boxes: np.ndarray) -> np.ndarray:
    """Widen or heighten boxes (M, 4) about their centres to squares."""
    centers, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).max(1, keepdims=True)
    return np.hstack([centers - sides / 2, centers + sides / 2]).astype(np.float32)


def _shifted(boxes: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Move the edges of boxes (M, 4) by RNet's or ONet's `shifts` (M, 4), shares of the sides."""
    return boxes + shifts * (boxes[:, 2:] - boxes[:, :2] + 1)[:, [0, 1, 0, 1]]


def _distinct(
    boxes: np.ndarray, probs: np.ndarray, owners: np.ndarray, of_smaller: bool = False
) -> np.ndarray:
    """Return the indices of those of M boxes that overlap no surer one of the same owner, surest first."""
    order = np.argsort(-probs, kind="stable")
    groups = [order[owners[order] == owner] for owner in np.unique(owners)]
    return np.concatenate([group[is_distinct(boxes[group], of_smaller)] for group in groups] or [order])


def is_distinct(boxes: np.ndarray, of_smaller: bool) -> np.ndarray:
    """Suppress non-maxima: return which of boxes (M, 4) overlap no kept one before them, (M,) bool.

    Two boxes overlap if they share more than SAME_FACE of their union, or of the smaller one.
    """
    left, top, right, bottom = np.ascontiguousarray(boxes.T)
    areas = (right - left) * (bottom - top)
    hidden, hiding = np.empty(0, int), np.empty(0, int)  # pairs of boxes, the second before the first
    for start in range(0, len(boxes), 256):  # the 17,000 candidates of a large crowd would take gigabytes
        block, end = slice(start, start + 256), start + 256
        common = np.minimum.outer(right[block], right[:end]) - np.maximum.outer(left[block], left[:end])
        heights = np.minimum.outer(bottom[block], bottom[:end]) - np.maximum.outer(top[block], top[:end])
        common = common.clip(0) * heights.clip(0)
        join = np.minimum.outer if of_smaller else np.add.outer
        whole = join(areas[block], areas[:end]) - (0 if of_smaller else common)
        rows, columns = np.nonzero(np.tril(common > SAME_FACE * whole, start - 1))
        hidden, hiding = np.append(hidden, rows + start), np.append(hiding, columns)
    kept, before = np.ones(len(boxes), bool), None
    while before is None or (kept != before).any():  # settles from the first down, in a few rounds
        before, kept = kept, np.ones(len(boxes), bool)
        kept[hidden[before[hiding]]] = False
    return kept


def crop_faces(image: Image.Image, boxes: np.ndarray, margin: float) -> list[Image.Image]:
    """Cut a square around each box; N boxes give N crops, in the image's mode.

    The square's side is the box's longer side times (1 + margin). It is moved, and if need be shrunk, until
    it lies inside the image, so a crop never has made-up pixels and its aspect ratio never changes.

    Args:
        boxes: (N, 4) xyxy in pixels, may reach over the image's edge.
        margin: share of the longer side, 0 or more.

    Raises:
        ValueError: a box does not overlap the image.
    """
    crops = []
    for left, top, right, bottom in boxes:
        if min(right, image.width) <= max(left, 0) or min(bottom, image.height) <= max(top, 0):
            raise ValueError(
                f"box {left, top, right, bottom} lies outside the {image.width}x{image.height} image"
            )
        side = max(right - left, bottom - top) * (1 + margin)
        side = int(min(max(round(side), 1), *image.size))
        x = int(min(max(round((left + right - side) / 2), 0), image.width - side))
        y = int(min(max(round((top + bottom - side) / 2), 0), image.height - side))
        crops.append(image.crop((x, y, x + side, y + side)))
    return crops


# --- network ---

# resnet50_v1 has the stride where the original paper has it, on the first 1x1 convolution of a stage
# (He et al. 2015; weights converted from Caffe want this). torchvision's resnet50 has it on the 3x3.
ARCHS = ("resnet18", "resnet34", "resnet50", "resnet50_v1")
PARTS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc")  # that have weights


def color_resnet(arch: str) -> nn.Module:
    """Build torchvision's ResNet for normalised RGB images, 1000 classes, with random weights."""
    if arch not in ARCHS:
        raise ValueError(f"unknown architecture {arch!r}, expected one of {', '.join(ARCHS)}")
    import torchvision

    net = torchvision.models.get_model(arch.removesuffix("_v1"), weights=None)
    if arch.endswith("_v1"):
        for stage in (net.layer2, net.layer3, net.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    return net


def gray_stem(out_channels: int) -> nn.Conv2d:
    """Build a one-channel first convolution that can equal a colour one exactly, up to the image's border.

    A normalised colour convolution is affine in the gray value; its constant part is smaller where the kernel
    overlaps the zero padding, so one bias a channel cannot express it. `offset` is that part as a kernel: it
    is convolved with an image of ones. Starts as torchvision's convolutions do, with an offset of 0.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    class GrayStem(nn.Conv2d):
        def __init__(self):
            super().__init__(1, out_channels, kernel_size=7, stride=2, padding=3, bias=False)
            self.offset = nn.Parameter(torch.zeros_like(self.weight))
            nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

        def forward(self, images: Tensor) -> Tensor:  # (N, 1, H, W) -> (N, out_channels, H/2, W/2)
            ones = torch.ones_like(images[:1])
            constant = F.conv2d(ones, self.offset, stride=self.stride, padding=self.padding)
            return super().forward(images) + constant

    return GrayStem()


def gray_resnet(arch: str, num_classes: int) -> nn.Module:
    """Build a ResNet for normalised gray images (N, 1, H, W), with random weights.

    With `num_classes` 0 it has no head: it maps images to embeddings (N, D), D being 2048 for resnet50 and
    512 for the smaller ones; else to logits (N, num_classes).
    """
    from torch import nn

    net = color_resnet(arch)
    net.conv1 = gray_stem(net.conv1.out_channels)
    net.fc = nn.Linear(net.fc.in_features, num_classes) if num_classes else nn.Identity()
    return net


def add_heads(net: nn.Module, count: int) -> None:
    """Put `count` copies of the head beside it: logits (N, C) become (N, (1 + count) * C)."""
    import torch
    from torch import nn

    with torch.no_grad():
        heads = nn.Linear(net.fc.in_features, net.fc.out_features * (1 + count))
        heads.weight.copy_(net.fc.weight.repeat(1 + count, 1))
        heads.bias.copy_(net.fc.bias.repeat(1 + count))
    net.fc = heads


def freeze_except(net: nn.Module, trained: Sequence[str]) -> None:
    """Let only the named children of `net` learn; `train_mode` keeps the rest's BatchNorm still as well.

    Raises:
        ValueError: the network has no child of that name, or none of the named has parameters.
    """
    children = dict(net.named_children())
    for name in trained:
        if name not in children:
            raise ValueError(f"the network has no part {name!r}, expected some of: {', '.join(children)}")
    for name, child in children.items():
        child.requires_grad_(name in trained)
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise ValueError(
            f"nothing in {' '.join(trained)} can learn; name other parts of {', '.join(children)}"
        )


def train_mode(net: nn.Module) -> None:
    """Put `net` into train mode, except its frozen children, which stay in eval mode."""
    net.train()
    for child in net.children():
        if not any(parameter.requires_grad for parameter in child.parameters()):
            child.eval()


# --- data ---


MAX_UNREADABLE = 0.01  # share of images that training does without, or else a single one; chosen here
MAX_NAMED = 5  # files of a kind that a message names; the others are counted
NUM_SAMPLED = 20  # images whose size is looked at


def list_images(folder: Path, limit: int | None = None) -> Sequence[Path]:
    """List the image files below `folder`, sorted, ValueError if there are none.

    With a limit, that many, evenly spread over the list. What macOS writes beside a picture on foreign disks,
    ._picture.jpg, is no picture.
    """
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in picture_suffixes() and not path.name.startswith("._") and path.is_file()
    )
    if not paths:
        raise ValueError(f"no images in {folder}; put some there, or make them by an earlier stage")
    return spread(paths, limit)


def spread(items: Sequence[Path], limit: int | None) -> Sequence[Path]:
    """Take `limit` items (None: all) evenly spaced, so that each class of a sorted list gets its share."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def check_pictures(folder: Path, paths: Sequence[Path]) -> None:
    """Raise ValueError unless a folder's images are two different ones at least."""
    if len(paths) < 2:
        raise ValueError(f"{folder} has 1 image, expected 2 or more: one to learn from, one to judge by")
    if all(filecmp.cmp(paths[0], path, shallow=False) for path in paths[1:]):
        raise ValueError(f"all {len(paths)} images in {folder} are one picture; add different ones")


def check_readable(errors: Sequence[object], total: int) -> None:
    """Raise ValueError if training cannot do without those of its `total` images that the `errors` name."""
    if len(errors) > min(max(1, MAX_UNREADABLE * total), total - 1):
        share = f"{len(errors)} of {total} images are not readable"
        limit = f"expected a single one or {MAX_UNREADABLE:.0%} at most"
        raise ValueError(f"{share}, {limit}; remove or replace them: {errors[0]}")


def load_images(
    paths: Sequence[Path], mode: str, size: int | None = None, max_size: int = MAX_IMAGE_SIZE
) -> tuple[Tensor, list[Path]]:
    """Read images into memory as one uint8 tensor (N, C, S, S); mode "L" has C = 1, "RGB" has 3.

    Images are cut to their central square and resized to `size` pixels; without `size`, to the largest side
    of a sample of them, at most `max_size`. Several threads read. A few that are not readable are named on
    stderr and left out, see `check_readable`.

    Returns:
        The images, and their N paths.
    """
    import torch

    def read(path: Path) -> np.ndarray | PictureError:
        try:
            image = open_picture(path, mode, draft=target)
        except PictureError as error:
            return error
        side = min(image.size)
        x, y = (image.width - side) // 2, (image.height - side) // 2
        if image.size != (target, target):  # enlarged as `normalize_faces` enlarges
            how = Image.Resampling.LANCZOS if side > target else Image.Resampling.BILINEAR
            image = image.resize((target, target), how, (x, y, x + side, y + side))
        return np.asarray(image).reshape(target, target, -1)

    sides = []
    for path in () if size else spread(paths, NUM_SAMPLED):
        with contextlib.suppress(PictureError):
            sides.append(min(open_picture(path).size))
    target = size or min(max(sides, default=max_size), max_size)
    bar = tqdm(_threads().map(read, paths), "reading", len(paths), unit="image", disable=None, leave=False)
    results = list(bar)
    errors = [result for result in results if isinstance(result, PictureError)]
    check_readable(errors, len(paths))
    for error in errors[:MAX_NAMED]:
        print(printable(f"left out: {error}"), file=sys.stderr)
    if errors:
        print(f"{len(errors)} of {len(paths)} images are not readable and left out", file=sys.stderr)
    kept = [i for i, result in enumerate(results) if not isinstance(result, PictureError)]
    images = torch.from_numpy(np.stack([results[i] for i in kept]))
    return images.permute(0, 3, 1, 2).contiguous(), [paths[i] for i in kept]


class Collection(NamedTuple):
    """A collection of faces."""

    folder: Path
    weight: float = 1.0  # how often its faces are drawn


def parse_collections(texts: Sequence[str]) -> dict[str, Collection]:
    """Parse each DIR or DIR=WEIGHT into a collection; return them by the folder's name.

    Raises:
        ValueError: a folder is not there, a weight is no number above 0, or two folders have one name.
    """
    collections = {}
    for text in texts:
        folder, equals, weight = text.rpartition("=")
        if not equals or Path(text).is_dir():
            folder, weight = text, "1"
        try:
            collection = Collection(Path(folder), float(weight))
        except ValueError:
            raise ValueError(
                f"{text} is no collection of faces, expected DIR or DIR=WEIGHT, a number"
            ) from None
        is_folder = folder and collection.folder.is_dir()  # without a name it would be the current one
        if not is_folder or not 0 < collection.weight < math.inf:
            raise ValueError(f"{text} is no collection of faces, expected a folder and a weight above 0")
        name = collection.folder.resolve().name
        if name in collections:
            raise ValueError(f"{folder} and {collections[name].folder} have one name; rename one of them")
        collections[name] = collection
    return collections


def find_classes(folder: Path) -> list[str]:
    """List the emotions that a collection has folders for, sorted, ValueError if these are fewer than two."""
    root = folder / "train" if (folder / "train").is_dir() else folder
    paths = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    classes = sorted(path.name for path in paths if not path.name.startswith("."))
    if len(classes) < 2:
        raise ValueError(f"{root} has {len(classes)} emotion folders, expected 2 or more, each with images")
    return classes


def check_collections(folders: Iterable[Path]) -> list[str]:
    """Return the classes that collections have together, sorted, ValueError if one cannot learn from them."""
    learned = set()
    for folder in folders:
        classes = find_classes(folder)
        root = folder / "train" if (folder / "train").is_dir() else folder
        for name in classes:
            check_pictures(root / name, list_images(root / name))
        learned.update(classes)
    check_classes(sorted(learned))
    return sorted(learned)


def list_split(folder: Path, split: str, classes: Sequence[str], limit: int | None = None) -> dict[Path, int]:
    """List a split's faces, from `folder`/<split>/<class>/* or, if it has no train/, from `folder`/<class>/*.

    Splits that a folder lacks are made by the content of its files, so that no run learns what another is
    judged by: one tenth is val and, without train/, another one test.

    Returns:
        Their labels, indices of `classes`, class by class; there may be no faces.
    """
    if not (folder / "train").is_dir():
        root, tenths = folder, {"train": range(2, 10), "val": range(1), "test": range(1, 2)}[split]
    elif split == "test" or (folder / "val").is_dir():
        root, tenths = folder / split, range(10)
    else:
        root, tenths = folder / "train", {"train": range(1, 10), "val": range(1)}[split]
    paths = [path for name in classes if (root / name).is_dir() for path in list_images(root / name)]
    if len(tenths) < 10:
        paths = [path for path in paths if int(file_digest(path), 16) % 10 in tenths]
    return {path: classes.index(path.relative_to(root).parts[0]) for path in spread(paths, limit)}


def load_faces(
    folder: Path,
    split: str,
    classes: Sequence[str],
    *,
    limit: int | None = None,
    size: int | None = None,
    max_size: int = MAX_IMAGE_SIZE,
) -> tuple[Tensor, Tensor, Sequence[Path]]:
    """Read a split's faces, see `list_split` and `load_images`, ValueError if there are none.

    Returns:
        Gray images (N, 1, S, S) uint8, labels (N,) int64, indices of `classes`, and the N paths.
    """
    import torch

    faces = list_split(folder, split, classes, limit)
    if not faces:
        raise ValueError(f"{folder} has no {split} faces of {' '.join(classes)}; add some, see the README")
    images, paths = load_images(list(faces), "L", size, max_size)
    return images, torch.tensor([faces[path] for path in paths]), paths


def vary_outline(images: Tensor) -> Tensor:
    """Return gray faces (N, 1, S, S) uint8 whose black surroundings, if they have some, vary.

    Some collections cut their faces out along the outline. So that a network does not learn the cut, a third
    of these stay black, a third get one level of gray, and a third go on as the pixels at their edge.
    """
    import torch
    from scipy import ndimage

    def vary(image: np.ndarray) -> np.ndarray:
        dark, _ = ndimage.label(np.pad(image, 1) <= 8)  # what the added frame is connected with
        outside = (dark == dark[0, 0])[1:-1, 1:-1]
        if not 0.05 < outside.mean() < 0.8:
            return image
        random = np.random.default_rng(zlib.crc32(image))
        how = random.integers(3)
        if how == 1:
            return np.where(outside, random.integers(256), image).astype(np.uint8)
        if how == 2:
            outside = ndimage.binary_dilation(outside, iterations=2)  # stored lossily, the edge is blurred
            rows, columns = ndimage.distance_transform_edt(
                outside, return_distances=False, return_indices=True
            )
            return image[rows, columns]
        return image

    return torch.from_numpy(np.stack(list(_threads().map(vary, images[:, 0].numpy()))))[:, None]


def count_labels(labels: Tensor, classes: Sequence[str]) -> str:
    """Return how many images there are, and of which class, in words."""
    counts = labels.bincount(minlength=len(classes)).tolist()
    each = ", ".join(f"{name} {count}" for name, count in zip(classes, counts, strict=True))
    return f"{len(labels)} images ({each})"


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Draw float32 values between `low` and `high`."""
    import torch

    return torch.rand(shape, generator=generator) * (high - low) + low


def warp(
    images: Tensor,
    size: int,
    generator: torch.Generator,
    *,
    degrees: float,
    shift: float,
    zoom: tuple[float, float],
) -> Tensor:
    """Mirror, turn, move and scale each image of a batch at random, in one resampling to `size` pixels.

    Args:
        images: (N, C, H, W) float, square.
        degrees: largest rotation to either side.
        shift: largest move along each axis, as a share of the side.
        zoom: least and largest scale; under 1 the border's pixels fill what lacks.
    """
    import torch
    import torch.nn.functional as F

    n = len(images)
    angle = torch.deg2rad(_uniform((n,), -degrees, degrees, generator))
    scale = _uniform((n,), *zoom, generator)
    mirror = torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1
    move = _uniform((n, 2), -2 * shift, 2 * shift, generator)  # the grid's unit is half a side
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    theta = torch.stack(  # (N, 2, 3), from output to input coordinates
        [torch.stack([cos * mirror, -sin, move[:, 0]], 1), torch.stack([sin * mirror, cos, move[:, 1]], 1)], 1
    ).to(images.device)
    grid = F.affine_grid(theta, [n, images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@functools.cache
def jpeg_table(quality: int) -> list[int]:
    """Return in what steps libjpeg stores the 8x8 frequencies of brightness at a quality, row by row."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        return image.quantization[0]


def compress(images: Tensor, quality: Tensor) -> Tensor:
    """Return gray images (N, 1, H, W), float in 0-255, as JPEG of a quality (N,), 1-100, shows them.

    It is what JPEG does with a gray image but for the lossless part, on any device. Qualities are whole.
    """
    import torch
    import torch.nn.functional as F

    n, _, height, width = images.shape
    device = images.device
    tables = torch.tensor(list(map(jpeg_table, quality.int().tolist())), device=device).view(n, 1, 1, 8, 8)
    steps = torch.arange(8, device=device)
    cosines = torch.cos((2 * steps + 1) * steps[:, None] * math.pi / 16) / 2  # the DCT, (8, 8)
    cosines[0] /= math.sqrt(2)
    padded = F.pad(images, (0, -width % 8, 0, -height % 8), mode="replicate")
    rows, columns = padded.shape[2] // 8, padded.shape[3] // 8
    blocks = padded.view(n, rows, 8, columns, 8).transpose(2, 3) - 128
    stored = (cosines @ blocks @ cosines.T / tables).round() * tables
    blocks = (cosines.T @ stored @ cosines + 128).round().clamp(0, 255)
    return blocks.transpose(2, 3).reshape(padded.shape)[:, :, :height, :width]


def augment_faces(
    images: Tensor, size: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Turn uint8 faces (N, 1, H, W) into varied, normalised input (N, 1, size, size) on a device.

    JPEG artefacts (a quarter of the images), coarsening (a quarter), mirroring, rotation, shift, scaling,
    contrast, brightness, light from one side, one level around the outline of the face (an eighth), and
    cutout of half the images (DeVries & Taylor 2017). The ranges, chosen here, cover how detectors crop.
    """
    import torch
    import torch.nn.functional as F

    n, images = len(images), images.to(device).float()
    stored = torch.rand(n, generator=generator) < 1 / 4
    if stored.any():
        quality = _uniform((n,), 15, 75, generator).round()
        images[stored] = compress(images[stored], quality[stored])
    images /= 255
    coarse = torch.rand(n, generator=generator) < 1 / 4
    if coarse.any():
        coarse_size = int(torch.randint(16, 40, (1,), generator=generator))
        small = F.interpolate(images[coarse], coarse_size, mode="bilinear", antialias=True)
        images[coarse] = F.interpolate(small, images.shape[-1], mode="bilinear", align_corners=False)
    images = warp(images, size, generator, degrees=15, shift=0.1, zoom=(0.7, 1.15))
    contrast = _uniform((n, 1, 1, 1), 0.65, 1.35, generator).to(device)
    brightness = _uniform((n, 1, 1, 1), -0.15, 0.15, generator).to(device)
    side = torch.linspace(0, 1, size, device=device)
    slopes = _uniform((n, 2, 1), -0.3, 0.3, generator).to(device) * (side - 0.5)  # (N, 2, size)
    light = (slopes[:, 0, :, None] + slopes[:, 1, None, :])[:, None]
    means = images.mean((1, 2, 3), keepdim=True)
    images = ((images - means) * contrast + means + brightness + light).clamp(0, 1)
    center = _uniform((n, 2, 1), 0.45, 0.55, generator).to(device)
    radius = _uniform((n, 2, 1), 0.38, 0.55, generator).to(device)
    distance = ((side - center) / radius).square()
    outside = (distance[:, 0, :, None] + distance[:, 1, None, :])[:, None] > 1
    outside &= (torch.rand((n, 1, 1, 1), generator=generator) < 1 / 8).to(device)
    level = _uniform((n, 1, 1, 1), -1, 1, generator).clamp(0, 1).to(device)  # black for half of them
    images = torch.where(outside, level, images)
    images = (images - GRAY_MEAN) / GRAY_STD
    center, half = _uniform((n, 2, 1), 0, 1, generator), _uniform((n, 2, 1), 0.1, 0.25, generator)
    half *= torch.rand((n, 1, 1), generator=generator) < 0.5  # the other half stays whole
    covers = (side - center.to(device)).abs() < half.to(device)  # (N, 2, size)
    hole = covers[:, 0, :, None] & covers[:, 1, None, :]
    return images.masked_fill(hole[:, None], 0)


def normalize_faces(images: Tensor, size: int) -> Tensor:
    """Turn uint8 faces (N, 1, H, W) into normalised network input (N, 1, size, size), without chance."""
    import torch.nn.functional as F

    images = F.interpolate(images.float() / 255, size, mode="bilinear", antialias=True)
    return (images - GRAY_MEAN) / GRAY_STD


def epoch_order(
    groups: Tensor, balance: float, generator: torch.Generator, weights: Tensor | None = None
) -> Tensor:
    """Draw an epoch's order, as many indices (N,) as group numbers, by systematic sampling.

    A group (a class, say) of n images is drawn in proportion to n ** (1 - balance): with 0 each image comes
    exactly once, with 1 all groups come equally often. Images of a group differ in their number of draws by 1
    at most. `weights` (N,) then make an image come more often or less.
    """
    import torch

    n = len(groups)
    shuffled = torch.randperm(n, generator=generator)
    counts = torch.bincount(groups).double()
    weights = counts[groups[shuffled]] ** -balance * (1 if weights is None else weights[shuffled])
    positions = (torch.arange(n) + 0.5) / n * weights.sum()
    drawn = torch.searchsorted(weights.cumsum(0), positions.double()).clamp(max=n - 1)
    return shuffled[drawn][torch.randperm(n, generator=generator)]


def split_batches(indices: Tensor, batch_size: int) -> list[Tensor]:
    """Split indices (N,) into batches; a last one of one image, no use to BatchNorm, joins the one before."""
    import torch

    batches = list(indices.split(batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1 < batch_size:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


@dataclass(eq=False)
class FaceBatches:
    """Labelled faces that stay in the device's memory as uint8 and are fed in augmented batches.

    What an epoch holds depends on `seed` and its number alone, so a resumed run sees what it would have seen.
    """

    images: Tensor  # (N, 1, S, S) uint8
    labels: Tensor  # (N,) int64
    batch_size: int
    image_size: int
    device: torch.device
    _: KW_ONLY
    targets: Tensor | None = None  # (N, ...) float32, shares of the classes; default: learn the labels
    balance: float = 0.0  # see `epoch_order`
    groups: Tensor | None = None  # (N,) int64, what is balanced; default: the labels
    weights: Tensor | None = None  # (N,) float, how often a face comes
    # With targets: blend a batch's images each with another, by shares from Beta(mixup, mixup); 0: do not.
    # Source: Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization".
    mixup: float = 0.0
    seed: int = 0

    def __post_init__(self):
        self.images = self.images.to(self.device)
        self.targets = (self.labels if self.targets is None else self.targets).to(self.device)
        self.groups = self.labels if self.groups is None else self.groups

    def __len__(self) -> int:
        return len(self.labels)

    def train(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch's batches: inputs (n, 1, image_size, image_size) and targets (n,) or (n, ...)."""
        import torch

        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        random = np.random.default_rng((self.seed, epoch))
        order = epoch_order(self.groups, self.balance, generator, self.weights)
        for indices in split_batches(order, self.batch_size):
            images = augment_faces(self.images[indices], self.image_size, generator, self.device)
            targets = self.targets[indices]
            if self.mixup:
                share = random.beta(self.mixup, self.mixup)
                images, targets = (share * part + (1 - share) * part.roll(1, 0) for part in (images, targets))
            yield images, targets

    def eval(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all faces once, in order, as they are: inputs and labels (n,)."""
        for images, labels in zip(
            self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True
        ):
            yield normalize_faces(images, self.image_size), labels


# --- judging ---

FIGURES = ("loss", "acc", "mean_recall", "ece")  # of `judge`, the single numbers
UNSURE_LEVELS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # least probabilities of a label that are reported
ENOUGH = 200  # faces to fit a temperature to; a handful gave 0.055 or 20


def among(logits: Tensor, labels: Tensor, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return logits (n, len(chosen)) and labels (n,) of the faces that are of the chosen classes alone."""
    import torch

    columns = torch.full((logits.shape[1],), -1)  # of the classes in what is returned
    columns[list(chosen)] = torch.arange(len(chosen))
    is_chosen = columns[labels] >= 0
    return logits[is_chosen][:, list(chosen)], columns[labels[is_chosen]]


def fit_temperature(sets: Iterable[tuple[Tensor, Tensor]], fallback: float) -> float:
    """Find the temperature that minimises the cross-entropy of logits divided by it, within 0.5-5.

    Args:
        sets: logits (N, C) and labels (N,) of each collection; all count alike, whatever their size.
        fallback: what is returned if there are under ENOUGH faces.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    import torch.nn.functional as F
    from scipy.optimize import minimize_scalar

    sets = [(logits, labels) for logits, labels in sets if len(labels)]
    if sum(len(labels) for _, labels in sets) < ENOUGH:
        return fallback

    def loss(log_temperature: float) -> float:
        scale = math.exp(-log_temperature)
        return sum(F.cross_entropy(logits * scale, labels).item() for logits, labels in sets)

    bounds = (math.log(0.5), math.log(5))
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4}).x)


def reliability(probs: Tensor, labels: Tensor, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Sort probs (N, C) into equally wide bins of confidence: each one's count, mean confidence and accuracy.

    Means over an empty bin are 0.
    """
    import torch

    confidence, predicted = probs.max(1)
    which = (confidence * bins).long().clamp(max=bins - 1)
    values = torch.stack([torch.ones_like(confidence), confidence, (predicted == labels).float()])
    counts, *sums = torch.zeros(3, bins).index_add(1, which, values)
    return counts, *(total / counts.clamp(min=1) for total in sums)


def calibration_error(probs: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Compute the expected calibration error, 0-1, of probs (N, C), over equally wide bins of confidence.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    counts, confidence, accuracy = reliability(probs, labels, bins)
    return (counts * (accuracy - confidence).abs()).sum().item() / len(labels)


def judge(logits: Tensor, labels: Tensor, temperature: float, classes: Sequence[str]) -> dict:
    """Return figures of how good logits (N, C) are.

    `n`; FIGURES: loss and calibration error at the temperature, accuracy, mean recall over the classes that
    occur; the `recall` by class; the `confusion` matrix, true class by row.
    """
    import torch.nn.functional as F

    predicted, num = logits.argmax(1), len(classes)
    matrix = (labels * num + predicted).bincount(minlength=num**2).reshape(num, num)
    counts = matrix.sum(1)
    recalls = matrix.diag() / counts.clamp(min=1)
    return {
        "n": len(labels),
        "loss": F.cross_entropy(logits / temperature, labels).item(),
        "acc": (predicted == labels).float().mean().item(),
        "mean_recall": recalls[counts > 0].mean().item(),
        "ece": calibration_error((logits / temperature).softmax(1), labels),
        "recall": dict(zip(classes, recalls.tolist(), strict=True)),
        "confusion": matrix.tolist(),
    }


def report(
    split: str,
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    classes: Sequence[str],
    out_dir: Path | None,
    subsets: dict[str, Tensor],
) -> None:
    """Print how good logits (N, C) are, also by class; write `split`.json, _confusion.png, _reliability.png.

    Args:
        out_dir: None to write nothing.
        subsets: masks (N,) bool of faces to be judged apart as well, by name; an empty one is left out.
    """
    record = judge(logits, labels, temperature, classes)
    record["subsets"] = {}
    counts = [sum(row) for row in record["confusion"]]
    majority = max(counts) / len(labels)

    def line(figures: dict) -> str:
        return (
            f"accuracy {figures['acc']:.2%} of {figures['n']}, mean recall {figures['mean_recall']:.2%}, "
            f"calibration error {figures['ece']:.3f}"
        )

    print(f"{split}: {line(record)} (always the commonest class: accuracy {majority:.2%})")
    probs = (logits / temperature).softmax(1)
    confidence, predicted = probs.max(1)
    labelled = {level: (predicted == labels)[confidence >= level].float() for level in UNSURE_LEVELS}
    parts = [
        f"{level} {right.sum() / max(len(right), 1):.1%} of {len(right) / len(labels):.1%}"
        for level, right in labelled.items()
    ]
    print(f"{split}: accuracy and share of the faces that --unsure P labels: {', '.join(parts)}")
    for name, count in zip(classes, counts, strict=True):
        print(f"{split}: recall {record['recall'][name]:7.2%} of {count:5} {name}")
    for name, mask in subsets.items():
        if mask.any():
            figures = judge(logits[mask], labels[mask], temperature, classes)
            record["subsets"][name] = {key: figures[key] for key in ("n", *FIGURES)}
            print(f"{split}, {name}: {line(figures)}")
    if not out_dir:
        return
    title = f"{split}: accuracy {record['acc']:.1%}, n = {len(labels)}"
    plot_confusion(record["confusion"], classes, title, out_dir / f"{split}_confusion.png")
    plot_reliability({split: (probs, labels)}, out_dir / f"{split}_reliability.png")
    save_json(out_dir / f"{split}.json", record)
    path = printable(out_dir / f"{split}.json")
    print(f"wrote {path}, {split}_confusion.png and {split}_reliability.png")


@functools.cache  # once for all plots
def _report_letters() -> None:
    """Print that class names are drawn with empty boxes."""
    remedy = "set font.family in a matplotlibrc to one that has them"
    print(f"the plots' font lacks letters of the classes' names; {remedy}", file=sys.stderr)


def _save_figure(figure: Figure, path: Path) -> None:  # noqa: F821
    """Write a figure as PNG."""
    with replacing(path) as temporary, warnings.catch_warnings(record=True) as caught:
        figure.savefig(temporary, format="png", dpi=150)
    if any("missing from font" in str(warning.message) for warning in caught):
        _report_letters()


def plot_history(history: list[dict], panels: dict[str, Sequence[str]], path: Path) -> None:
    """Draw the named figures over the epochs into a PNG, a panel for each entry of `panels`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    epochs = [record["epoch"] for record in history]
    for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in names:
            axes.plot(epochs, [record[name] for record in history], marker=".", label=name.replace("_", " "))
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    _save_figure(figure, path)


def plot_confusion(confusion: list[list[int]], classes: Sequence[str], title: str, path: Path) -> None:
    """Draw `judge`'s confusion matrix with counts and row shares, and each class's recall, into a PNG."""
    from matplotlib.figure import Figure

    matrix = np.array(confusion)
    shares = matrix / matrix.sum(1, keepdims=True).clip(1)
    names = [textwrap.fill(name, 20) for name in classes]
    is_long = max(len(line) for name in names for line in name.splitlines()) > 9  # of a column's width
    side = max(5, 1.5 + 0.7 * len(names))  # inches: each cell holds two lines of text
    figure = Figure(figsize=(1.2 * side + 5, side), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, width_ratios=(1.2 * side, 5), sharey=True)
    left.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*matrix.shape):
        share = shares[row, column]
        text, color = f"{share:.1%}\n{matrix[row, column]}", "white" if share > 0.5 else "black"
        left.text(column, row, text, ha="center", va="center", color=color)
    ticks = range(len(names))
    left.set(yticks=ticks, yticklabels=names, xlabel="predicted", ylabel="true")
    left.set_xticks(ticks, names, rotation=90 if is_long else 0)
    bars = right.barh(ticks, shares.diagonal())
    right.bar_label(bars, [f"{recall:.1%}" for recall in shares.diagonal()], padding=3)
    right.set(xlim=(0, 1.12), xlabel="recall")
    _save_figure(figure, path)


def plot_reliability(sets: dict[str, tuple[Tensor, Tensor]], path: Path) -> None:
    """Draw how often probs (N, C) are right at each level of confidence, over 15 bins, into a PNG.

    Args:
        sets: probs and labels (N,) by title; each has a column.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 4 * len(sets), 5.5), layout="constrained")
    columns = figure.subplots(2, len(sets), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1)).T
    for (title, (probs, labels)), (upper, lower) in zip(sets.items(), columns, strict=True):
        counts, confidence, accuracy = (part.numpy() for part in reliability(probs, labels))
        filled = counts > 0
        error = calibration_error(probs, labels)
        upper.set(
            title=f"{title}, n = {len(labels)}\ncalibration error {error:.3f}", ylim=(0, 1), xlim=(0, 1)
        )
        upper.plot([0, 1], [0, 1], color="gray", linestyle="dashed", label="perfectly calibrated")
        upper.plot(confidence[filled], accuracy[filled], marker="o", label="this model")
        edges = np.linspace(0, 1, len(counts) + 1)
        lower.bar(edges[:-1], counts / len(labels), width=1 / len(counts), align="edge", edgecolor="white")
        lower.set(xlabel="probability of the predicted class")
    columns[0][0].set(ylabel="share that is right")
    columns[0][0].legend()
    columns[0][1].set(ylabel="share of the faces")
    _save_figure(figure, path)


# --- checkpoints ---

FORMAT = 1
STAGES = ("gray", "fer", "emotion")
NEEDED = ("stage", "arch", "classes", "image_size", "crop_margin", "temperature", "model")
# Beyond what a run writes, last.pt of a resnet50 with averaged weights: 400 MB, 200 KB of it pickled.
MAX_CHECKPOINT_BYTES, MAX_PICKLE_BYTES = 2**29, 2**22
MAX_WEIGHTS = 2 * 25_600_000  # twice those of a resnet50
# What pickles of tensors name. PyTorch would also let bytearray pass, which makes any amount of memory.
HARMLESS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|"
    r"torch (Float|Half|BFloat16|Double|Long|Int|Short|Char|Byte|Bool)Storage"
)
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch.save began before PyTorch 1.6
ZIPPED = {  # a name in a zip archive, and what the archive is then
    "constants.pkl": "a TorchScript program",
    "model.weights.h5": "a model of Keras",
    "[Content_Types].xml": "an office document",
    ".npy": "arrays of NumPy",
}


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint, whole and on the disk; raises OSError as `replacing`."""
    import torch

    buffer = io.BytesIO()  # torch.save to a full disk raises RuntimeError, a plain write a telling OSError
    torch.save({"format": FORMAT, **checkpoint}, buffer)
    try:
        with replacing(path, sync=True) as temporary:
            temporary.write_bytes(buffer.getvalue())
    except OSError as error:
        kept = "the former one is kept; " if path.exists() else ""
        raise OSError(f"{error}; {kept}free some space and go on with --resume") from None


def load_tensors(path: Path, expected: str) -> object:
    """Return the tensors and plain values that torch.save wrote; nothing in the file is run.

    Args:
        expected: what the file should be, for the message.

    Raises:
        ValueError: it is something else, damaged, or says that it holds more than it does.
    """
    import torch

    size = path.stat().st_size
    if size > MAX_CHECKPOINT_BYTES:
        raise ValueError(f"{path} has {size >> 20} MB, too many for {expected}")
    try:
        what = _foreign(path)
        if not what:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if _num_bytes(content) <= size:
                return content
            what = "one whose tensors say that they are larger than the file"
    except Exception as error:  # zipfile, pickletools and torch raise a dozen types for a damaged file
        if isinstance(error, OSError) and error.filename:
            raise
        what = "cut off or damaged"
    raise ValueError(f"{path} is not {expected}: it is {what}") from None


def _foreign(path: Path) -> str:
    """Return in words what a file is, "" if torch.save wrote it, of tensors and plain values only."""
    with path.open("rb") as file:
        head = file.read(512)
        if head.startswith(LEGACY):
            file.seek(0)
            return next(filter(None, (_code_in(file) for _ in range(5))), "")  # of its five pickles
    if not head.startswith(b"PK"):
        return kind_of(head) or "text"
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        for ending, kind in ZIPPED.items():
            if any(entry.filename.endswith(ending) for entry in entries):
                return kind
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            return "a zip archive"
        claimed = sum(entry.file_size for entry in entries)  # torch.save packs nothing
        if claimed > path.stat().st_size or pickles[0].file_size > MAX_PICKLE_BYTES:
            return "a zip archive that says that it holds more than a checkpoint does"
        if archive.testzip():  # it compares checksums, which torch.load does not
            raise zipfile.BadZipFile
        return _code_in(io.BytesIO(archive.read(pickles[0])))


def _code_in(file: BinaryIO) -> str:
    """Read the next pickle of a file; return what it is, "" if it is of tensors and plain values."""
    for operation, argument, position in pickletools.genops(file):
        is_name = operation.name in {"GLOBAL", "STACK_GLOBAL", "INST"}
        if is_name and not HARMLESS.fullmatch(str(argument)):
            return f"a pickle with code in it ({str(argument or 'by name')[:50]}), which is not run"
        if position > MAX_PICKLE_BYTES:
            return f"a pickle of more than {MAX_PICKLE_BYTES >> 20} MB"
    return ""


def _num_bytes(content: object) -> int:
    """Return how much memory the tensors in dicts, lists and tuples say that they take."""
    import torch

    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list | tuple):
        return sum(map(_num_bytes, content))
    return content.nbytes if isinstance(content, torch.Tensor) else 0


def _foreign_content(content: object) -> str:
    """Return in words what a file holds that is no checkpoint of this project."""
    import torch

    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    if "format" in content:
        return f"one of format {str(content['format'])[:20]}"
    names = [str(name)[:20] for name in content]
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return f"a state dict, as torchvision's, weights alone ({', '.join(names[:2])}, ...)"
    return f"one of another program, with {', '.join(names[:5])}"


def check_classes(classes: object) -> None:
    """Raise ValueError, with what is wrong, if these are no names of classes, which name folders too."""
    if not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes):
        raise ValueError("classes that are no list of names")
    for name in classes:
        if not re.fullmatch(r"[^/\\]{1,100}", name) or name in {".", ".."} or printable(name) != name:
            raise ValueError(f"a class of the name {name[:50]!r}")
    for name, other in itertools.pairwise(sorted(classes, key=str.casefold)):
        if name.casefold() == other.casefold():
            raise ValueError(f"two classes of one name, {name} and {other}; rename one")


def _check_values(checkpoint: dict) -> None:
    """Raise ValueError, with what is wrong, if a checkpoint's names and numbers are of no use."""
    arch = checkpoint["arch"]
    for name in ("classes", "default_classes"):
        check_classes(checkpoint[name])
    if not set(checkpoint["default_classes"]) <= set(checkpoint["classes"]):
        raise ValueError("default_classes that are none of its classes")
    if arch not in ARCHS:
        raise ValueError(f"the architecture {str(arch)[:20]!r}, expected one of {', '.join(ARCHS)}")
    for name, kinds, low, high in (
        ("image_size", int, MIN_IMAGE_SIZE, MAX_IMAGE_SIZE),
        ("crop_margin", int | float, 0, 2),
        ("temperature", int | float, 0.01, 100),
        ("temperature_all", int | float, 0.01, 100),
    ):
        value = checkpoint[name]
        if not isinstance(value, kinds) or not low <= value <= high:
            raise ValueError(f"{name} {str(value)[:20]}, expected {low} to {high}")


def _check_weights(weights: object) -> None:
    """Raise ValueError, with what is wrong, if weights cannot be those of a trained network."""
    import torch

    if not isinstance(weights, dict) or not all(
        isinstance(value, torch.Tensor) for value in weights.values()
    ):
        raise ValueError("no weights")
    if sum(value.numel() for value in weights.values()) > MAX_WEIGHTS:
        raise ValueError("more weights than any network of this toolkit")
    for name, value in weights.items():
        if not value.isfinite().all() or (str(name).endswith("running_var") and (value < 0).any()):
            raise ValueError(f"weights that are not finite, in {name}, as diverged training leaves them")


def load_checkpoint(path: Path, stages: Sequence[str] = STAGES) -> dict:
    """Read a checkpoint onto the CPU; weights stored in half precision come back as float32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint of this project, or of none of the `stages`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}; an earlier stage writes it, see the README")
    expected = f"a checkpoint of this toolkit, format {FORMAT}"
    checkpoint = load_tensors(path, expected)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        what = _foreign_content(checkpoint)
        raise ValueError(f"{path} is not {expected}: it is {what}; train one, see the README")
    missing = [name for name in NEEDED if name not in checkpoint]
    if missing:
        raise ValueError(f"{path} is a checkpoint without {', '.join(missing)}; train one, see the README")
    if checkpoint["stage"] not in stages:
        expected = " or ".join(repr(stage) for stage in stages)
        raise ValueError(f"{path} has stage {str(checkpoint['stage'])[:20]!r}, expected {expected}")
    checkpoint.setdefault("default_classes", checkpoint["classes"])
    checkpoint.setdefault("temperature_all", checkpoint["temperature"])
    try:
        _check_values(checkpoint)
        _check_weights(checkpoint["model"])
    except ValueError as error:
        raise ValueError(f"{path} has {error}; train one, see the README") from None
    checkpoint["model"] = {
        name: value.float() if value.is_floating_point() else value
        for name, value in checkpoint["model"].items()
    }
    return checkpoint


def half_precision(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Store kernels and matrices as float16; BatchNorm and biases stay float32, they are small and touchy."""
    return {name: value.half() if value.ndim > 1 else value for name, value in weights.items()}


def load_network(checkpoint: dict, classes: Sequence[str] | None = None) -> nn.Module:
    """Build the network of a checkpoint, with its weights.

    Args:
        classes: what the head is to tell apart (default: the checkpoint's own). A class that the checkpoint
            knows keeps its row of the head, another one gets a random row.

    Raises:
        ValueError: the weights do not fit the architecture.
    """
    own = list(checkpoint["classes"])
    classes = own if classes is None else list(classes)
    net = gray_resnet(checkpoint["arch"], len(classes))
    weights = dict(checkpoint["model"])
    if classes != own:
        for name, value in net.fc.state_dict(prefix="fc.").items():
            weights[name] = value.clone()
            for row, emotion in enumerate(classes):
                if emotion in own:
                    weights[name][row] = checkpoint["model"][name][own.index(emotion)]
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:200]
        raise ValueError(
            f"the weights of the checkpoint do not fit a {checkpoint['arch']}: {reason}"
        ) from None
    return net


@dataclass(frozen=True)
class Run:
    """A training run: the folder that it writes, and what its checkpoints hold beside the weights.

    The folder gets the best checkpoint (to use, in half precision), last.pt (to resume from), log.jsonl (a
    line for each epoch) and config.json.
    """

    out_dir: Path
    stage: str
    arch: str
    classes: Sequence[str]  # that the network learns
    default_classes: Sequence[str]  # that it tells apart unless asked for more, some of `classes`
    image_size: int
    crop_margin: float
    config: dict  # the options, see `plain_config`
    best_name: str = "best.pt"

    def start(
        self, net: nn.Module, device: torch.device, data: dict[str, str], *, resume: dict | None
    ) -> None:
        """Make the folder and print on what, with what and how the run trains.

        Args:
            data: what there is to learn from, in words.
            resume: the checkpoint to go on from.

        Raises:
            ValueError: the folder holds another run, and this is not its resumption; or it lacks the best
                checkpoint of the run to resume, or that one learned other classes.
        """
        import torch

        last, best = self.out_dir / "last.pt", self.out_dir / self.best_name
        if resume and list(resume["classes"]) != list(self.classes):
            learned, there = ", ".join(resume["classes"]), ", ".join(self.classes)
            raise ValueError(
                f"the run to resume learned {learned}, but now there are {there}; name the folders as they "
                "were, or train anew"
            )
        if resume and not best.exists():
            raise ValueError(f"{best} is not there, the best epoch so far; put it back, or train anew")
        if last.exists() and not resume:
            raise ValueError(
                f"{self.out_dir} holds another run; go on with --resume {last}, choose another --out-dir, "
                "or delete it"
            )
        if place()[0] == 0:
            save_json(self.out_dir / "config.json", self.config)
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in net.parameters()]
        trained = sum(size for size, learns in sizes if learns)
        print(f"device: {device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
        for name, text in data.items():
            print(f"{name}: {text}")
        print(f"parameters: {trained:,} of {sum(size for size, _ in sizes):,} learn")
        print(printable("config: " + " ".join(f"{key}={value}" for key, value in self.config.items())))
        print(printable(f"if it stops, go on with --resume {last}, written after every epoch"), flush=True)

    def save_best(self, net: nn.Module, history: list[dict]) -> None:
        """Write the best checkpoint: of several heads, see `add_heads`, it keeps the first."""
        weights = dict(net.state_dict())
        for name in {"fc.weight", "fc.bias"} & weights.keys():
            weights[name] = weights[name][: len(self.classes)].clone()
        self._save(self.best_name, half_precision(weights), history)

    def save_last(self, net: nn.Module, history: list[dict], **training_state: dict) -> None:
        """Write log.jsonl and, last, last.pt, with the optimizer's state and what else `fit` goes on from."""
        with replacing(self.out_dir / "log.jsonl") as temporary:
            lines = [json.dumps(past, allow_nan=False) + "\n" for past in history]
            temporary.write_text("".join(lines), encoding="utf-8")
        job = os.environ.get("TORCHELASTIC_RUN_ID")
        self._save("last.pt", net.state_dict(), history, job=job, **training_state)

    def _save(self, name: str, weights: dict, history: list[dict], **training_state: dict) -> None:
        record = history[-1]
        checkpoint = {
            "stage": self.stage,
            "arch": self.arch,
            "classes": list(self.classes),
            "default_classes": list(self.default_classes),
            "image_size": self.image_size,
            "crop_margin": self.crop_margin,
            "config": self.config,
            "temperature": record.get("temperature", 1.0),
            "temperature_all": record.get("temperature_all", 1.0),
            "epoch": record["epoch"],
            "metrics": record,
            "history": history,
            "model": weights,
        }
        save_checkpoint(self.out_dir / name, checkpoint | training_state)


# --- training ---


LOSS_EVERY = 20  # steps between two looks at the loss
WARMUP = 0.05  # share of the run in which the learning rate rises


class Schedule(NamedTuple):
    """How a run trains."""

    epochs: int
    lr: float  # peak; it rises over WARMUP, then a cosine goes to 0
    weight_decay: float
    ema: float = 0.0  # decay of the exponential moving average of the weights per step, 0 for none


def evaluate(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Run `net` in eval mode over all batches; return its outputs and the targets, (N, ...), on the CPU.

    Several processes take the batches in turns; each gets the results of all.
    """
    import torch

    net.eval()
    rank, world = place()
    pairs = []
    with torch.inference_mode():
        for inputs, target in itertools.islice(batches, rank, None, world):
            outputs = net(inputs.contiguous(memory_format=torch.channels_last))
            pairs.append((outputs.cpu(), target.cpu()))
    pairs = [pair for turn in itertools.zip_longest(*gather(pairs)) for pair in turn if pair]
    outputs, targets = zip(*pairs, strict=True)
    return torch.cat(outputs), torch.cat(targets)


def autocast(device: torch.device) -> torch.autocast:
    """Mix in bfloat16 where the device is faster at it: GPUs and CPUs that have instructions for it."""
    import torch

    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)  # since Ampere
    else:
        able = torch.cpu.get_capabilities()
        fast = device.type == "cpu" and bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def learning_rate(progress: float, lr: float) -> float:
    """Cosine schedule with linear warm-up; `progress` is a share of the run, 0-1."""
    if progress < WARMUP:
        return lr * progress / WARMUP
    return lr * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))) / 2


def build_optimizer(net: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """Build AdamW over what trains; biases and BatchNorm do not decay."""
    import torch

    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, fused=trained[0].is_cuda)


def _load_moments(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Load the state of an earlier run's AdamW, but not its settings, which follow from the options.

    If it is damaged, or other parameters learned, it raises one of many types of errors.
    """
    own = optimizer.state_dict()
    for mine, theirs in zip(own["param_groups"], saved["param_groups"], strict=True):
        if mine["params"] != theirs["params"]:
            raise ValueError
    optimizer.load_state_dict(own | {"state": saved["state"]})
    for parameter, moments in optimizer.state.items():
        shapes = [moments[name].shape for name in ("exp_avg", "exp_avg_sq", "step")]
        if shapes != [parameter.shape, parameter.shape, ()]:
            raise ValueError


def average_weights(net: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of `net` that becomes the exponential moving average of its weights, BatchNorm's too.

    In the first steps it forgets faster, (1 + n) / (10 + n) after n of them, so that a short run's average is
    not what training began with. Source: the ramp of TensorFlow's ExponentialMovingAverage.
    """
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    def update(averages: list[Tensor], current: list[Tensor], _: Tensor) -> None:
        steps = int(averaged.n_averaged)  # stays on the CPU: to read it, a GPU need not stop
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(averages, current, averaged.n_averaged)

    averaged = AveragedModel(net, multi_avg_fn=update, use_buffers=True)
    return averaged


def share_of(batch: Tensor, rank: int, world: int) -> Tensor:
    """Return what one of `world` processes takes of a batch: no image, or two at least if there are two.

    One alone is of no use to BatchNorm.
    """
    sharers = min(world, max(len(batch) // 2, 1))
    return batch[rank::sharers] if rank < sharers else batch[:0]


def sum_gradients(net: nn.Module, loss: Tensor) -> Tensor:
    """Sum the gradients of all processes, in place, and return the sum of their losses."""
    import torch

    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    sums = torch.cat([part.reshape(-1) for part in (loss.detach(), *gradients)])
    torch.distributed.all_reduce(sums)
    total, *parts = sums.split([1, *(parameter.numel() for parameter in trained)])
    for parameter, gradient, part in zip(trained, gradients, parts, strict=True):
        parameter.grad = gradient.copy_(part.view_as(gradient))
    return total[0]


def copy_first(values: Iterable[Tensor]) -> None:
    """Set weights or BatchNorm's statistics, in place, to what they are in the first process."""
    import torch

    for value in values if place()[1] > 1 else ():
        torch.distributed.broadcast(value, src=0)


def train_epoch(
    net: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    data: FaceBatches,
    optimizer: torch.optim.Optimizer,
    averaged: AveragedModel | None,
    *,
    schedule: Schedule,
    epoch: int,
) -> dict[str, float]:
    """Train `net`, and `averaged`, for an epoch; return its number, last learning rate, mean loss and speed.

    Several processes share each batch, and make the step that one would make. Only BatchNorm that learns
    sees its own share alone; its statistics are then those of the first process.

    Raises:
        ValueError: the loss is not finite any more.
    """
    import torch

    train_mode(net)
    rank, world = place()
    start, seen, total_loss, total = time.perf_counter(), 0, 0.0, len(data)
    title = f"epoch {epoch}/{schedule.epochs}"
    with tqdm(total=total, desc=title, unit="image", disable=None, leave=False) as bar:
        for step, batch in enumerate(data.train(epoch), start=1):
            # The middle of this step, so that neither the first nor the last has a learning rate of 0.
            n = len(batch[0])
            progress = epoch - 1 + (seen + n / 2) / total
            lr = learning_rate(progress / schedule.epochs, schedule.lr)
            seen += n
            for group in optimizer.param_groups:
                group["lr"] = lr
            inputs, targets = (share_of(part, rank, world) for part in batch)
            loss = inputs.new_zeros(())
            if len(inputs):
                with autocast(inputs.device):
                    outputs = net(inputs.contiguous(memory_format=torch.channels_last))
                    loss = criterion(outputs, targets) * (len(inputs) / n)
                loss.backward()
            if world > 1:
                loss = sum_gradients(net, loss)
            optimizer.step()
            optimizer.zero_grad()
            if averaged:
                averaged.update_parameters(net)
            total_loss += loss.detach() * n
            bar.update(n)
            if step % LOSS_EVERY == 0:  # a GPU has to be waited for
                bar.set_postfix(loss=f"{float(total_loss) / seen:.4f}", refresh=False)
                if not math.isfinite(total_loss):
                    break
    mean_loss = float(total_loss) / seen
    if not math.isfinite(mean_loss):
        raise ValueError(f"the loss is {mean_loss} in epoch {epoch}; try a lower --lr than {schedule.lr}")
    speed = seen / (time.perf_counter() - start)
    return {"epoch": epoch, "lr": lr, "train_loss": mean_loss, "images_per_s": speed}


def fit(
    net: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    data: FaceBatches,
    validate: Callable[[nn.Module], dict[str, float]],
    *,
    score: Callable[[dict], float],
    run: Run,
    schedule: Schedule,
    resume: dict | None = None,
) -> list[dict]:
    """Train `net` in place; return one record an epoch: `train_epoch`'s figures and `validate`'s.

    Every stage runs this loop: they differ in data, criterion, `validate` and which parameters train.
    Several processes run it together; the first writes, and goes on alone when it is done.

    Args:
        criterion: (outputs, targets) -> scalar mean loss of a batch.
        data: has `train(epoch)` -> batches of inputs and targets, and a length in images.
        validate: returns figures by name; it gets the averaged weights when there are any.
        score: of an epoch's record, the higher the better; it picks the best epoch.
        resume: the checkpoint `last.pt` of a run with the same options.
    """
    optimizer = build_optimizer(net, schedule.weight_decay)
    averaged = average_weights(net, schedule.ema) if schedule.ema else None
    history = resume["history"] if resume else []
    if resume:
        try:
            net.load_state_dict(resume["model"])
            _load_moments(optimizer, resume["optimizer"])
            if averaged:
                averaged.load_state_dict(resume["averaged"])
            for epoch, record in enumerate(history, start=1):
                is_finite = math.isfinite(score(record)) and all(map(math.isfinite, record.values()))
                if not is_finite or record["epoch"] != epoch or record.keys() != history[0].keys():
                    raise ValueError("an epoch's figures are damaged")
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            raise ValueError(
                "the run to resume had another network, other parts that learn, or no averages, or its file "
                "is damaged; leave --arch, --unfreeze and --ema as they were"
            ) from None
    judged = averaged.module if averaged else net
    copy_first(net.state_dict().values())
    for epoch in range(len(history) + 1, schedule.epochs + 1):
        record = train_epoch(net, criterion, data, optimizer, averaged, schedule=schedule, epoch=epoch)
        copy_first([*net.buffers(), *judged.buffers()])
        record |= validate(judged)
        if not all(map(math.isfinite, record.values())):
            raise ValueError(f"figures of epoch {epoch} are not finite; try a lower --lr than {schedule.lr}")
        record["images_per_s"] = record.pop("images_per_s")  # the last column
        history.append(record)
        print("  ".join(f"{name} {value:.4g}" for name, value in record.items()), flush=True)
        if place()[0]:
            continue  # one writes
        if score(record) == max(map(score, history)):
            run.save_best(judged, history)
        state = {"averaged": averaged.state_dict()} if averaged else {}
        run.save_last(net, history, optimizer=optimizer.state_dict(), **state)
    leave_others()
    return history


def soft_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Return the mean cross-entropy of logits (n, H * C) of H heads and targets (n, H, C) or (n, C).

    A target's sum is how much its head matters, 0 for a head that does not learn from the face.
    `label_smoothing` is the share that is spread over all classes (Szegedy et al. 2016, arXiv:1512.00567).
    """
    weights = targets.sum(-1, keepdim=True)
    smooth = (1 - label_smoothing) * targets + label_smoothing / targets.shape[-1] * weights
    return -(smooth * logits.float().view(targets.shape).log_softmax(-1)).flatten(1).sum(1).mean()


def judge_collections(
    net: nn.Module, sets: dict[str, FaceBatches], run: Run, parent: dict
) -> dict[str, float]:
    """Judge the first head on each collection's val faces; return the means over these, and temperatures.

    Args:
        sets: by collection; labels are indices of `run.classes`.
        parent: the checkpoint that training began with, whose temperatures stay if faces are too few.
    """
    chosen = [run.classes.index(name) for name in run.default_classes]
    outputs = {name: evaluate(net, faces.eval()) for name, faces in sets.items()}
    outputs = {name: (logits[:, : len(run.classes)], labels) for name, (logits, labels) in outputs.items()}
    default = {name: among(logits, labels, chosen) for name, (logits, labels) in outputs.items()}
    temperature = fit_temperature(default.values(), parent["temperature"])
    judged = {
        name: judge(logits, labels, temperature, run.default_classes)
        for name, (logits, labels) in default.items()
        if len(labels)
    }
    record = {f"val_{name}": statistics.fmean(part[name] for part in judged.values()) for name in FIGURES}
    if len(sets) > 1:
        record |= {f"{name}_acc": figures["acc"] for name, figures in judged.items()}
    record["temperature"] = temperature
    record["temperature_all"] = fit_temperature(outputs.values(), parent["temperature_all"])
    return record


def fit_classifier(
    net: nn.Module,
    train: FaceBatches,
    val: dict[str, FaceBatches],
    *,
    run: Run,
    schedule: Schedule,
    label_smoothing: float,
    parent: dict,
    resume: dict | None = None,
) -> dict:
    """Train a classifier with `fit`, draw its curves, and return the best checkpoint.

    The best epoch has the lowest cross-entropy on val at its own temperature, as a mean over the collections:
    accuracy alone, of 2,479 faces, is too noisy.

    Args:
        train: its targets are shares of `run.classes`, (n, C), or (n, H, C) for H heads.
        val, parent: see `judge_collections`.
        label_smoothing: see `soft_cross_entropy`.

    Raises:
        ValueError: no val face is of a default class; or as `fit`.
    """
    held_out = {run.classes[label] for faces in val.values() for label in faces.labels.unique().tolist()}
    if held_out.isdisjoint(run.default_classes):
        wanted = " ".join(run.default_classes)
        raise ValueError(f"no val face is of {wanted}, to judge by; add some, or choose other --emotions")
    criterion = functools.partial(soft_cross_entropy, label_smoothing=label_smoothing)
    validate = functools.partial(judge_collections, sets=val, run=run, parent=parent)

    def score(record: dict) -> float:
        return -record["val_loss"]

    history = fit(net, criterion, train, validate, score=score, run=run, schedule=schedule, resume=resume)
    panels = {"loss": ["train_loss", "val_loss"], "validation": ["val_acc", "val_mean_recall"]}
    plot_history(history, panels, run.out_dir / "curves.png")
    return load_checkpoint(run.out_dir / run.best_name)


# --- inference ---


# What a converted network keeps of its checkpoint.
NOTES = ("arch", "classes", "default_classes", "image_size", "crop_margin", "temperature", "temperature_all")
EXPORTED = (".onnx", ".xml")  # suffixes; the second is OpenVINO's form, with its weights in a .bin beside it
LICENCE = "as the training faces allow; those of the shipped model: non-commercial research"


def read_trained(path: Path) -> Blueprint:
    """Return the blueprint of a checkpoint's classifier: gray faces (N, S, S, 1), 0-255, to logits (N, C)."""
    import torch

    checkpoint = load_checkpoint(path, stages=("fer", "emotion"))
    network = from_pixels(load_network(checkpoint), 255 * GRAY_MEAN, 255 * GRAY_STD)
    size = checkpoint["image_size"]
    return Blueprint(network, torch.zeros(2, size, size, 1), {name: checkpoint[name] for name in NOTES})


def export_network(path: Path, destination: Path, written_by: str = "") -> None:
    """Write a checkpoint's classifier as a file that programs run without torch, .onnx or .xml.

    It takes `faces`, gray (N, S, S, 1), float32 in 0-255, and returns `logits` (N, C) of all classes. Its
    metadata `emotion_detector` is JSON: what NOTES names, the licence, and `written_by`.
    """
    if destination.suffix not in EXPORTED:
        raise ValueError(f"cannot export to {destination}, expected a name that ends in .onnx or .xml")
    lacking = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if destination.suffix == ".onnx" and lacking:
        raise ValueError("to export ONNX takes two packages more; pip install onnx onnxscript")
    blueprint = read_trained(path)
    about = json.dumps({**blueprint.notes, "licence": LICENCE, "written_by": written_by})
    if destination.suffix == ".onnx":
        import torch

        program = torch.onnx.export(
            blueprint.network.eval(),
            (blueprint.example,),
            input_names=["faces"],
            output_names=["logits"],
            dynamic_shapes=[{0: torch.export.Dim("n")}],
            dynamo=True,
            verbose=False,
        )
        program.model.metadata_props["emotion_detector"] = about
        save = functools.partial(program.save, external_data=False)
    else:
        model = _convert(blueprint, any_size=False)
        model.set_rt_info(about, "emotion_detector")
        save = functools.partial(load_openvino().save_model, model, compress_to_fp16=False)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(destination.parent) as folder:
        try:
            save(folder / f"network{destination.suffix}")
        except (OSError, RuntimeError) as error:  # the latter of OpenVINO, which gives no reason
            reason = getattr(error, "strerror", None) or "the disk may be full"
            raise OSError(f"cannot write {destination}: {reason}") from None
        for made in sorted(folder.iterdir()):  # .bin before .xml
            with replacing(destination.with_suffix(made.suffix)) as temporary:
                shutil.move(made, temporary)


def read_exported(path: Path) -> Blueprint:
    """Return the blueprint of what `export_network` wrote, ValueError if it is something else."""
    openvino = load_openvino()
    try:
        model = openvino.Core().read_model(path)
        parents = ["framework"] if path.suffix == ".onnx" else []
        notes = json.loads(model.get_rt_info([*parents, "emotion_detector"]).value)
        notes = {name: notes[name] for name in NOTES}
        _check_values(notes)
        side, count = notes["image_size"], len(notes["classes"])
        shapes = [port.get_partial_shape() for port in (model.input(), model.output())]  # of one each
        if shapes != [openvino.PartialShape([-1, side, side, 1]), openvino.PartialShape([-1, count])]:
            raise ValueError("it takes or gives something else")
    except (RuntimeError, ValueError, LookupError, TypeError):
        what = "a network that this toolkit exported"
        raise ValueError(f"{path} is not {what}; make one by detect_emotions.py --export") from None
    return Blueprint(path, None, notes)


class Classifier:
    """A trained network, ready to classify faces.

    Attributes:
        classes: names that it tells apart, in the order of the probabilities.
        default_classes: those that it tells apart unless asked for others.
        image_size: side of the network's input, pixels.
        crop_margin: for `crop_faces`.
        temperature: of the softmax.
    """

    def __init__(
        self, path: Path, device: torch.device | str, emotions: Sequence[str] = (), num_threads: int = 1
    ):
        """Read a checkpoint of finetune_fer.py or finetune_emotion.py, or what `export_network` wrote.

        Args:
            emotions: which of the classes that it learned it is to tell apart, two or more; ("all",) for
                all of them, () for those that its training made the default.
            num_threads: see `Engine`.

        Raises:
            FileNotFoundError, ValueError: as `load_checkpoint`, or it has not learned one of `emotions`.
        """
        is_exported = path.suffix in EXPORTED and path.is_file()
        files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
        key = "".join(map(file_digest, filter(Path.is_file, files)))  # `read_trained` says what is missing
        build = functools.partial(read_exported if is_exported else read_trained, path)
        self._engine = Engine("classifier", key.encode(), build, device, fast=True, num_threads=num_threads)
        notes = self._engine.notes
        self._path, self._notes = path, notes
        self.default_classes = tuple(notes["default_classes"])
        self._choose(emotions)
        self.image_size, self.crop_margin = notes["image_size"], notes["crop_margin"]

    @classmethod
    def load(
        cls, path: Path | str, device: torch.device | str = "auto", emotions: Sequence[str] = ()
    ) -> Classifier:
        """Read a checkpoint, see the constructor; `device` may be "auto" too, see `pick_device`."""
        return cls(Path(path), find_device(device) if isinstance(device, str) else device, emotions)

    def _choose(self, emotions: Sequence[str]) -> None:
        """Set what depends on the classes to tell apart."""
        learned = self._notes["classes"]
        emotions = [emotions] if isinstance(emotions, str) else emotions
        emotions = learned if list(emotions) == ["all"] else sorted(set(emotions)) or self.default_classes
        if unknown := set(emotions) - set(learned):
            raise ValueError(
                f"{self._path} has not learned {', '.join(sorted(unknown))}; expected some of "
                f"{', '.join(learned)}, or all"
            )
        if len(emotions) < 2:
            raise ValueError(f"expected two or more of {', '.join(learned)}, got only {emotions[0]}")
        self.classes = tuple(emotions)
        self._columns = [learned.index(name) for name in emotions]
        is_default = set(emotions) == set(self.default_classes)
        self.temperature = self._notes["temperature" if is_default else "temperature_all"]

    def among(self, emotions: Sequence[str]) -> Classifier:
        """Return this classifier for other classes that it has learned; raises as the constructor."""
        other = copy.copy(self)
        other._choose(emotions)
        return other

    def predict(self, image: Image.Image, boxes: np.ndarray) -> np.ndarray:
        """Classify the faces in `boxes` (N, 4) in one batch; return probabilities (N, C) float32."""
        return self.predict_crops(crop_faces(image, boxes, self.crop_margin))

    def predict_all(self, images: Sequence[Image.Image], boxes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Classify the faces in each image's `boxes` (N, 4), all in one batch; return (N, C) for each."""
        crops = [crop_faces(image, own, self.crop_margin) for image, own in zip(images, boxes, strict=True)]
        probs = self.predict_crops(list(itertools.chain(*crops)))
        ends = np.cumsum([len(own) for own in crops])
        return [probs[end - len(own) : end] for own, end in zip(crops, ends, strict=True)]

    def predict_crops(self, crops: Sequence[Image.Image]) -> np.ndarray:
        """Classify N crops of any mode and size in one batch; return probabilities (N, C) float32."""
        size = self.image_size
        images = np.empty((len(crops), size, size, 1), np.float32)
        for i, crop in enumerate(crops):  # enlarged as normalize_faces, which trained it, does: not rounded
            gray = _in_mode(crop, "L").convert("F")
            images[i, :, :, 0] = gray.resize((size, size), Image.Resampling.BILINEAR)
        [logits] = self._engine(images)
        logits = logits[:, self._columns] / self.temperature
        if not np.isfinite(logits).all():
            raise ValueError("the model's weights are so large that it gives no probabilities; train it anew")
        weights = np.exp(logits - logits.max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True)


LANDMARKS = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")  # left and right as one sees them
UNSURE = "unsure"  # the label of a face whose likeliest class is not likely enough


def face_record(
    face: Sequence,
    probs: np.ndarray,
    classes: Sequence[str],
    image_size: Sequence[int],
    *,
    unsure: float = 0.0,
    emotion: int | None = None,
) -> dict:
    """Return what is known of a face as the plain object that detect_emotions.py --json prints.

    Args:
        face: box, detector's probability and landmarks, a row of `Faces`.
        probs: (C,) of the `classes`.
        image_size: width and height, which clip the box.
        unsure: probability, 0-1, below which the label is UNSURE.
        emotion: index of the class that labels the face (default: the likeliest).
    """
    box, face_prob, landmarks = (np.asarray(part, float) for part in face)
    probs = probs.astype(float).round(4).tolist()
    emotion = int(np.argmax(probs)) if emotion is None else emotion
    return {
        "box": box.clip(0, [*image_size, *image_size]).round(1).tolist(),
        "face_prob": round(float(face_prob), 4),
        "landmarks": dict(zip(LANDMARKS, landmarks.round(1).tolist(), strict=True)),
        "emotion": UNSURE if probs[emotion] < unsure else classes[emotion],
        "prob": probs[emotion],
        "probs": dict(zip(classes, probs, strict=True)),
    }


def label_faces(
    image: Image.Image, finder: FaceFinder, classifier: Classifier, unsure: float = 0.0
) -> list[dict]:
    """Find and classify an RGB image's faces; return a `face_record` of each, from left to right."""
    found = finder.find(image)
    probs = classifier.predict(image, found.boxes)
    records = [
        face_record(face, face_probs, classifier.classes, image.size, unsure=unsure)
        for face, face_probs in zip(zip(*found, strict=True), probs, strict=True)
    ]
    return sorted(records, key=lambda record: record["box"][:2])


def table_columns(classes: Sequence[str]) -> list[str]:
    """Name the columns of a table of faces: the file, the face's number in it, where in a video, the face."""
    face = ["x0", "y0", "x1", "y1", "face_prob", "emotion", "prob", *(f"prob_{name}" for name in classes)]
    points = [f"{name}_{axis}" for name in LANDMARKS for axis in "xy"]
    return ["file", "face", "frame", "time", "track", *face, *points]


def face_rows(record: dict, keep_empty: bool = False) -> list[list]:
    """Return the rows of a photo's or a frame's faces, with `table_columns`.

    Args:
        record: `file` and `faces`, of `face_record`; of a video `frame` and `time`, and each face's `track`.
        keep_empty: without faces, return one row that ends behind `track`.
    """
    when = [record.get("frame"), record.get("time")]
    if keep_empty and not record["faces"]:
        return [[record["file"], None, *when, None]]
    rows = []
    for number, face in enumerate(record["faces"], start=1):
        cells = [*face["box"], face["face_prob"], face["emotion"], face["prob"], *face["probs"].values()]
        points = itertools.chain(*face["landmarks"].values())
        rows.append([record["file"], number, *when, face.get("track"), *cells, *points])
    return rows


def load_photo(path: Path | str) -> Image.Image:
    """Read a photo as an RGB image, upright; raises `PictureError` or OSError, which name the file."""
    return open_picture(Path(path))


def as_image(image: Path | str | Image.Image | np.ndarray, *, bgr: bool = False) -> Image.Image:
    """Return an RGB image of a path, a PIL image, or an array.

    Args:
        image: an array is (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 in 0-255 or float in 0-1.
        bgr: its channels are blue, green, red, as OpenCV has them.

    Raises:
        ValueError: an array is none of these.
        PictureError, OSError: a file cannot be read.
    """
    if isinstance(image, str | Path):
        return load_photo(image)
    if isinstance(image, Image.Image):
        upright = image.copy()
        _turn(upright, image.getexif())
        return _in_mode(upright, "RGB")
    wanted = "expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 in 0-255 or float in 0-1"
    if not isinstance(image, np.ndarray):
        raise ValueError(f"got {type(image).__name__}, expected a path, a PIL image or an array")
    if image.ndim not in {2, 3} or (image.ndim == 3 and image.shape[2] not in {1, 3, 4}) or not image.size:
        raise ValueError(f"got an array of shape {image.shape}, {wanted}")
    if np.issubdtype(image.dtype, np.floating):
        low, high = image.min(), image.max()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"got floats from {low:.3g} to {high:.3g}, {wanted}")
        image = (image * 255).round().astype(np.uint8)
    if image.dtype != np.uint8:
        raise ValueError(f"got an array of {image.dtype}, {wanted}")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if bgr and image.ndim == 3:
        image = image[:, :, [2, 1, 0, *range(3, image.shape[2])]]
    return _in_mode(Image.fromarray(np.ascontiguousarray(image)), "RGB")


def read_faces(
    images: object, finder: FaceFinder, classifier: Classifier, *, bgr: bool = False, unsure: float = 0.0
) -> pd.DataFrame:
    """Find and classify the faces of one image or of several, a list, say, or what `Path.glob` gives.

    What an image may be, and `bgr`, see `as_image`; `unsure`, see `face_record`.

    Returns:
        A row for each face, from left to right, with the columns of detect_emotions.py --csv. `file` is the
        path, of other images their place among all; `frame`, `time` and `track` are empty.
    """
    import pandas as pd

    rows, kinds = [], (str, Path, Image.Image, np.ndarray)
    are_several = isinstance(images, Iterable) and not isinstance(images, kinds)
    for number, image in enumerate(images if are_several else [images]):
        file = str(image) if isinstance(image, str | Path) else number
        faces = label_faces(as_image(image, bgr=bgr), finder, classifier, unsure)
        rows += face_rows({"file": file, "faces": faces})
    return pd.DataFrame(rows, columns=table_columns(classifier.classes))


# --- command line ---


def _ready_streams() -> None:
    """Let stdout take names that its encoding lacks, stand in for closed streams, and quiet a package."""
    if sys.stdout is None:  # writing fails, as it does for other programs
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook has another one
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a home that it cannot write to


def _flush_stdout() -> None:
    """Write what stdout still holds; raise OSError here, not at the end of the process, where it fails."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise OSError(f"cannot write to standard output: {error.strerror}") from None


def lacks_memory(error: Exception) -> bool:
    """Return whether an error is that there is too little memory; torch and OpenCV have no type for it."""
    is_theirs = isinstance(error, RuntimeError) or type(error).__module__ == "cv2"
    said = re.search("out of memory|insufficient memory|bad_alloc|allocat", str(error), re.IGNORECASE)
    return isinstance(error, MemoryError) or (is_theirs and said is not None)


def one_line_errors(main: Callable) -> Callable:
    """Decorate a script's `main`: a user's mistake becomes one line on stderr, not a traceback.

    ValueError and OSError (their message names the thing, the expectation and the remedy) end with exit
    code 1, and so do too little memory, and a stdout that takes no more, silently if its reader has enough;
    Ctrl-C ends with 130. Of several processes that fail by one mistake, or by the end of another, the first
    is heard.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> None:
        _ready_streams()
        try:
            try:
                with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
                    main(argv)  # the warning's error, at twice the size, stays
            finally:
                _flush_stdout()
            _end_group()
        except SystemExit:
            _end_group()
            raise
        except BrokenPipeError:  # whoever reads stdout has enough
            sys.exit(1)
        except Exception as error:
            is_mistake, message = isinstance(error, ValueError | OSError), printable(error)
            if lacks_memory(error):
                remedy = "training takes less with a smaller --batch-size or --limit"
                is_mistake, message = True, f"this takes more memory than there is; {remedy}"
            rank, world = place()
            if rank or (world > 1 and not is_mistake):
                time.sleep(GRACE)  # torchrun ends this process, unless it is the first to fail
                sys.stderr = sys.__stderr__
            if not is_mistake:
                raise
            sys.exit(f"error: {message}")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapped


def number(kind: type, low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type: an int or float within [low, high]."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            expected = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected {expected}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is no number at all
    return parse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each option's default, and the description as it is."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is False or action.default in (None, (), []):  # the help says what happens then
            return action.help
        if isinstance(action.default, list | tuple):
            return f"{action.help} (default: {' '.join(action.default)})"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and raises OSError when its help cannot be written.

    argparse would print the usage too, which fills a screen, and exit with 0.
    """

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Read the command line; nothing in it may be empty, for an empty path is the current folder."""
        for text in sys.argv[1:] if args is None else args:
            if not text or re.fullmatch("--[a-z-]+=", text):
                self.error(f"{text or 'an argument'} is empty; is a variable of the shell unset?")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End with exit code 2, and a line on stderr."""
        self.exit(2, f"error: {printable(message)}; see --help\n")

    def print_help(self, file: TextIO | None = None) -> None:
        """Print the help, on stdout if no file is given."""
        print(self.format_help(), end="", file=file)


def build_parser(doc: str) -> Parser:
    """Return a parser whose help begins with a script's docstring and ends with its last part, Usage."""
    about, _, examples = doc.partition("Usage:\n")
    return Parser(description=about, epilog=f"examples:\n{examples}", formatter_class=HelpFormatter)


_SHARE, _COUNT, _NOT_NEGATIVE = number(float, 0, 1), number(int, 1), number(float, 0)
# What several scripts understand; the default is the script's own.
OPTIONS = {
    "data_dir": {"type": Path, "metavar": "DIR", "help": "folder of images"},
    "out_dir": {"type": Path, "metavar": "DIR", "help": "folder to write into"},
    "init": {
        "type": Path,
        "metavar": "CHECKPOINT",
        "help": "best.pt of an earlier stage or run to start from",
    },
    "resume": {
        "type": Path,
        "metavar": "CHECKPOINT",
        "help": "go on with an interrupted run from its last.pt, with its options; those given anew win",
    },
    "image_size": {
        "type": number(int, MIN_IMAGE_SIZE, MAX_IMAGE_SIZE),
        "metavar": "PX",
        "help": "side of the input, pixels",
    },
    "epochs": {"type": _COUNT, "metavar": "N", "help": "passes over the data"},
    "batch_size": {"type": _COUNT, "metavar": "N", "help": "images a step"},
    "lr": {"type": _NOT_NEGATIVE, "metavar": "X", "help": "peak learning rate of AdamW"},
    "weight_decay": {"type": _NOT_NEGATIVE, "metavar": "X", "help": "of AdamW"},
    "ema": {
        "type": _SHARE,
        "metavar": "DECAY",
        "help": "average the weights over the steps with this decay; 0: do not",
    },
    "unfreeze": {"nargs": "+", "metavar": "PART", "help": f"parts that learn, of {' '.join(PARTS)}"},
    "val_fraction": {"type": number(float, 0, 0.9), "metavar": "X", "help": "share of images held out"},
    "balance": {
        "type": _SHARE,
        "metavar": "X",
        "help": "0: each image once an epoch, 1: each class equally often",
    },
    "mixup": {
        "type": number(float, 0, 10),
        "metavar": "ALPHA",
        "help": "blend pairs of faces by shares from Beta(ALPHA, ALPHA); 0: do not",
    },
    "label_smoothing": {
        "type": number(float, 0, 0.9),
        "metavar": "X",
        "help": "share of the target that is spread over all classes",
    },
    "limit": {"type": _COUNT, "metavar": "N", "help": "use only N images, of each split if there are splits"},
    "seed": {"type": number(int, 0), "metavar": "N", "help": "of everything random"},
    "device": {
        "choices": ("auto", "cpu", "cuda", "mps"),
        "help": "where the networks run; auto takes the first there is of cuda, mps, cpu",
    },
}


def add_options(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """Add some of OPTIONS, each with a script's own default."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, **OPTIONS[name])


def parse_with_resume(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, stage: str, out_dir: Path | None = None
) -> tuple[argparse.Namespace, dict | None]:
    """Parse the command line; with --resume, the interrupted run's options become the defaults.

    A job that torchrun started again goes on by itself with the run that it began.

    Args:
        out_dir: what --out-dir means if it is not given and has no default.

    Returns:
        The options, and the checkpoint to go on from or None.

    Raises:
        ValueError: --resume names no last.pt of this stage, or its options cannot be.
    """
    args = parser.parse_args(argv)
    last, job = (args.out_dir or out_dir) / "last.pt", os.environ.get("TORCHELASTIC_RUN_ID")
    has_name = job not in {None, "none"}  # torchrun on one machine names each job anew
    if has_name and last.exists() and load_checkpoint(last).get("job") == job:
        args.resume = last
    if not args.resume:
        return args, None
    resumed = load_checkpoint(args.resume, stages=(stage,))
    needed = {"optimizer": dict, "config": dict, "history": list}
    if not all(isinstance(resumed.get(name), kind) for name, kind in needed.items()):
        raise ValueError(
            f"{args.resume} cannot be resumed from, it has no optimizer state; expected a last.pt"
        )
    try:
        with contextlib.redirect_stderr(io.StringIO()) as usage:  # options that are gone do not matter
            began_with, _ = parser.parse_known_args(list(_as_options(resumed["config"])))
    except SystemExit:
        reason = usage.getvalue().removeprefix("error: ").rpartition(";")[0]
        raise ValueError(f"{args.resume} is of a run with an option that cannot be: {reason}") from None
    parser.set_defaults(**vars(began_with))
    return parser.parse_args(argv), resumed


def _as_options(config: dict) -> Iterator[str]:
    """Write options, of `plain_config`, as on a command line, so that argparse checks them."""
    for name, value in config.items():
        option = f"--{str(name).replace('_', '-')}"
        if value == []:
            yield f"--no-{option[2:]}"  # where there is no such option, the default is empty
        elif isinstance(value, list):
            yield from (option, *map(str, value))
        elif value is True:
            yield option
        elif value is not None and value is not False:
            yield f"{option}={value}"


def plain_config(options: dict) -> dict:
    """Return a script's options as plain types, for checkpoints and config.json."""
    return json.loads(json.dumps({k: v for k, v in options.items() if k != "resume"}, default=str))
