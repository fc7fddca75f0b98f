"""Unpack FER2013's CSV into gray 48x48 images, `<out-dir>/{train,val,test}/<emotion>/<row>.png`.

FER2013 (Goodfellow et al. 2013, "Challenges in Representation Learning: A report on three machine learning
contests", arXiv:1307.0414; on Kaggle) keeps one face a row. Its column Usage is the official split: Training
is train, PublicTest val, PrivateTest test. `<row>` counts the CSV's data rows from 00000, so that every image
leads back to its row. Images keep their native 48 pixels; resizing belongs to the transform.

FER2013 repeats itself. --drop-duplicates cleans train and leaves val and test alone. It compares the pixels
and labels of all rows read, before classes are chosen, and drops a train row for the first reason that fits:
its image stands in val or test; its image has several labels (all its rows go); its image stood in train
before. Rows are written as they come and dropped at the end: one pass, and memory for a digest a row.

FER+ (Barsoum et al. 2016, arXiv:1608.01041; fer2013new.csv of github.com/microsoft/FERPlus) tells, row for
row, what ten people saw in each face. --ferplus writes their votes to `<out-dir>/votes.csv`.

Usage:
    python unpack_fer_data.py fer2013.csv
    python unpack_fer_data.py fer2013.csv.xz --drop-duplicates --ferplus fer2013new.csv --out-dir data/fer
"""

import argparse
import contextlib
import csv
import gzip
import hashlib
import io
import json
import lzma
import sys
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

LABELS = ("angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral")  # FER's 0 to 6
# The same as model.EMOTIONS; importing model brings torch, 670 MB and 4 s, several times this whole job.
EMOTIONS = tuple(label for label in LABELS if label not in {"fearful", "neutral"})
SPLITS = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}  # Usage: folder
# FER+'s column for each of them; its contempt, unknown and "no face" are left out.
VOTES = dict(
    zip(LABELS, ("anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral"), strict=True)
)
NATIVE_SIZE = 48  # pixels a side
DROP_REASONS = ("in val or test", "with several labels", "repeated in train")  # in order of precedence
MAX_HEADER_BYTES = 1000  # chosen here: FER's headers are shorter, and a binary file may have no line ends
BROKEN_STREAM = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile)
MANIFEST_FORMAT = "unpack_fer_data 1"


class Row(NamedTuple):
    """A sound row of the CSV."""

    index: int
    split: str
    emotion: str
    digest: bytes  # of the image
    image: np.ndarray | None  # (48, 48) uint8; None once written

    @property
    def path(self) -> Path:
        """Where the image goes, below the output folder."""
        return Path(self.split, self.emotion, f"{self.index:05d}.png")


# --- reading ---


def split_fields(line: bytes) -> list[bytes]:
    """Cut a line at its commas; FER's fields hold neither commas nor line ends, so quotes mean nothing."""
    return [field.strip(b' "\t\r\n') for field in line.split(b",")]


def read_header(file: BinaryIO) -> list[str]:
    """Take the header off a CSV and return the column names in lower case."""
    line = file.readline(MAX_HEADER_BYTES).removeprefix(b"\xef\xbb\xbf")
    return [name.decode("latin-1").lower() for name in split_fields(line)]


def open_zip(raw: BinaryIO) -> BinaryIO:
    """Open the FER table of a zip. Of several, fer2013.csv counts, else the only one that has Usage."""
    archive = zipfile.ZipFile(raw)
    names = [name for name in archive.namelist() if name.lower().endswith(".csv")]
    columns = {}
    for name in names:
        with archive.open(name) as file:
            columns[name] = set(read_header(file))
    fitting = [name for name in names if columns[name] >= {"emotion", "pixels"}]
    named = [name for name in fitting if PurePosixPath(name).name == "fer2013.csv"]
    with_usage = [name for name in fitting if "usage" in columns[name]]
    for choice in (named, with_usage, fitting):
        if len(choice) == 1:
            return archive.open(choice[0])
    found = ", ".join(fitting or names) or "no CSV"
    raise ValueError(f"{raw.name} holds {found}, expected one FER table; unzip it and pass that file")


@contextlib.contextmanager
def open_csv(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO, list[str]]]:
    """Open a FER table; yield it unpacked and past its header, the file as it is on disk, the column names.

    Raises:
        ValueError: the file is no FER table, or not packed as its suffix says.
    """
    unpackers = {".gz": gzip.open, ".xz": lzma.open, ".zip": open_zip}
    suffix = path.suffix.lower()
    with path.open("rb") as raw:
        try:
            file = unpackers[suffix](raw) if suffix in unpackers else raw
            columns = read_header(file)
        except BROKEN_STREAM as error:
            raise ValueError(
                f"{path} is no sound {suffix} file ({error}); get it anew or rename it"
            ) from None
        if not {"emotion", "pixels"} <= set(columns):
            raise ValueError(
                f"{path} starts with {','.join(columns)[:50]!r}, expected emotion, pixels and Usage; "
                "pass fer2013.csv, icml_face_data.csv or train.csv from Kaggle"
            )
        yield file, raw, columns


def parse_pixels(text: bytes) -> np.ndarray:
    """Return the (48, 48) uint8 image that is written as 2304 numbers, ValueError if it is not."""
    if text.translate(None, b"0123456789 "):
        raise ValueError("pixels are not all whole numbers from 0 to 255")
    pixels = np.fromstring(text, dtype=np.int64, sep=" ")
    if len(pixels) != NATIVE_SIZE**2:
        raise ValueError(f"{len(pixels)} pixels, expected {NATIVE_SIZE**2}")
    if pixels.max() > 255:
        raise ValueError(f"pixel value {pixels.max()}, expected 0 to 255")
    return pixels.astype(np.uint8).reshape(NATIVE_SIZE, NATIVE_SIZE)


def parse_row(line: bytes, index: int, columns: list[str]) -> Row:
    """Return the row that a line holds, ValueError if it is malformed."""
    values = split_fields(line)
    if len(values) != len(columns):
        raise ValueError(f"{len(values)} columns, expected {len(columns)}")
    fields = dict(zip(columns, values, strict=True))
    label, usage = fields["emotion"].decode("latin-1"), fields.get("usage", b"Training").decode("latin-1")
    if label not in {str(number) for number in range(len(LABELS))}:
        raise ValueError(f"label {label[:20]!r}, expected 0 to {len(LABELS) - 1}")
    if usage not in SPLITS:
        raise ValueError(f"Usage {usage[:20]!r}, expected {', '.join(SPLITS)}")
    image = parse_pixels(fields["pixels"])
    digest = hashlib.blake2b(image, digest_size=16).digest()
    return Row(index, SPLITS[usage], LABELS[int(label)], digest, image)


def read_rows(file: BinaryIO, columns: list[str], limit: int | None) -> Iterator[tuple[int, Row | str]]:
    """Yield line number and row, or what is wrong with it; blank lines do not count as rows."""
    number, index = 1, 0
    while limit is None or index < limit:
        number += 1
        try:
            line = file.readline()
        except BROKEN_STREAM as error:
            yield number, f"the file breaks off ({error}), all that follows is lost"
            return
        if not line:
            return
        if line.strip():
            try:
                yield number, parse_row(line, index, columns)
            except ValueError as error:
                yield number, str(error)
            index += 1


# --- writing ---


def find_duplicates(rows: list[Row]) -> dict[int, str]:
    """Return the index of each train row to drop and its reason, one of DROP_REASONS."""
    copies = defaultdict(list)
    for row in rows:
        copies[row.digest].append(row)
    reasons = {}
    for group in copies.values():
        train = [row.index for row in group if row.split == "train"]
        if len(train) < len(group):
            reasons |= dict.fromkeys(train, DROP_REASONS[0])
        elif len({row.emotion for row in group}) > 1:
            reasons |= dict.fromkeys(train, DROP_REASONS[1])
        else:
            reasons |= dict.fromkeys(train[1:], DROP_REASONS[2])
    return reasons


def write_png(path: Path, image: np.ndarray, size: int) -> None:
    """Write a gray image, `size` pixels a side, unless the file holds just that already."""
    picture, png = Image.fromarray(image), io.BytesIO()
    if size != NATIVE_SIZE:
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    picture.save(png, "PNG")
    if not path.exists() or path.read_bytes() != png.getvalue():
        path.write_bytes(png.getvalue())


def write_votes(ferplus: Path, path: Path, rows: list[Row]) -> None:
    """Write FER+'s votes for the rows as a CSV: `row`, and a column of counts for each of LABELS.

    Raises:
        ValueError: FER+'s table lacks a column, or its rows are not those of FER.
    """
    with ferplus.open(newline="", encoding="utf-8", errors="replace") as file:
        table = csv.DictReader(file)
        missing = {"Usage", *VOTES.values()} - set(table.fieldnames or ())
        if missing:
            raise ValueError(f"{ferplus} lacks {', '.join(sorted(missing))}, expected FER+'s fer2013new.csv")
        votes = list(table)
    if any(row.index >= len(votes) or SPLITS.get(votes[row.index]["Usage"]) != row.split for row in rows):
        raise ValueError(f"{ferplus} is not row for row with the faces; get both files anew")
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", *VOTES])
        writer.writerows([row.index, *(votes[row.index][name] for name in VOTES.values())] for row in rows)
    partial.replace(path)


def find_images(out_dir: Path) -> list[Path]:
    """List the images that are named as this script names them."""
    folders = [out_dir / split / label for split in SPLITS.values() for label in LABELS]
    paths = [path for folder in folders for path in folder.glob("*.png")]
    return [path for path in paths if len(path.stem) >= 5 and path.stem.isdecimal()]


def survey(out_dir: Path) -> dict:
    """Return the `counts` of images on disk by split and emotion, and the `bytes` they take."""
    counts = {split: dict.fromkeys(LABELS, 0) for split in SPLITS.values()}
    paths = find_images(out_dir)
    for path in paths:
        counts[path.parts[-3]][path.parts[-2]] += 1
    return {"counts": counts, "bytes": sum(path.stat().st_size for path in paths)}


def read_manifest(out_dir: Path) -> dict:
    """Return the manifest of an output folder, {} if it has none, ValueError if it is of another kind."""
    path = out_dir / "manifest.json"
    if not path.exists():
        return {}
    with contextlib.suppress(ValueError):
        manifest = json.loads(path.read_bytes())
        if isinstance(manifest, dict) and manifest.get("format") == MANIFEST_FORMAT:
            return manifest
    raise ValueError(f"{path} is not this script's ({MANIFEST_FORMAT}); choose another --out-dir")


def write_manifest(out_dir: Path, manifest: dict) -> None:
    """Write the manifest in one step, so that it is never half there."""
    partial = out_dir / "manifest.json.partial"
    partial.write_text(json.dumps({"format": MANIFEST_FORMAT} | manifest, indent=1) + "\n", encoding="utf-8")
    partial.replace(out_dir / "manifest.json")


def claim_folder(out_dir: Path, source: dict, overwrite: bool) -> None:
    """Make the folder ready for the images of `source`, under a manifest that calls them incomplete.

    Raises:
        ValueError: it holds the images of another source, or none of this script's.
    """
    manifest, images = read_manifest(out_dir), find_images(out_dir)
    if images and not manifest:
        raise ValueError(f"{out_dir} holds images but no manifest.json; choose another --out-dir")
    if images and not overwrite and manifest["source"] != source:
        changed = ", ".join(key for key in source if manifest["source"].get(key) != source[key])
        raise ValueError(
            f"{out_dir} holds images made otherwise ({changed}); choose another --out-dir or add --overwrite"
        )
    if overwrite:
        for path in [*images, *out_dir.glob("votes.csv")]:
            path.unlink()
        for folder in {path.parent for path in images}:
            with contextlib.suppress(OSError):  # it holds other files too
                folder.rmdir()  # an empty folder would pass for a class
    for split in SPLITS.values():
        for emotion in source["emotions"]:
            (out_dir / split / emotion).mkdir(parents=True, exist_ok=True)
    write_manifest(out_dir, {"complete": False, "source": source})


def unpack(path: Path, out_dir: Path, source: dict, ferplus: Path | None, overwrite: bool) -> dict:
    """Write the images that `source` asks for; return the numbers of `rows`, `bad_rows` and `dropped`.

    Raises:
        ValueError: the CSV or the folder is not fit, or the folder holds images of unknown origin as well.
    """
    rows, bad, written, dropped = [], 0, 0, dict.fromkeys(DROP_REASONS, 0)
    with open_csv(path) as (file, raw, columns):
        claim_folder(out_dir, source, overwrite)
        if "usage" not in columns:
            print(f"{path} has no column Usage: all its rows go to train", file=sys.stderr)
        with tqdm(total=path.stat().st_size, unit="B", unit_scale=True, disable=None) as bar:
            for number, row in read_rows(file, columns, source["limit"]):
                bar.update(raw.tell() - bar.n)
                if isinstance(row, str):
                    bar.write(f"{path}, line {number}: {row}; skipped", file=sys.stderr)
                    bad += 1
                    continue
                rows.append(row._replace(image=None))
                if row.emotion in source["emotions"]:
                    write_png(out_dir / row.path, row.image, source["size"])
                    written += 1
    if ferplus:
        write_votes(ferplus, out_dir / "votes.csv", rows)
    reasons = find_duplicates(rows) if source["drop_duplicates"] else {}
    for row in rows:
        if row.index in reasons and row.emotion in source["emotions"]:
            (out_dir / row.path).unlink()
            dropped[reasons[row.index]] += 1
    unknown = len(find_images(out_dir)) - written + sum(dropped.values())
    if unknown:
        raise ValueError(f"{out_dir} holds {unknown} images that are not from {path}; move them elsewhere")
    return {"rows": len(rows) + bad, "bad_rows": bad, "dropped": dropped}


# --- command line ---


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a user's mistake into one line and exit code 1, Ctrl-C into 130, as model.py's does."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def digest_of(path: Path) -> str:
    """Return the digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def positive_int(text: str) -> int:
    """Read a whole number above 0."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return int(text)


def share(text: str) -> float:
    """Read a number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("csv", type=Path, help="fer2013.csv, icml_face_data.csv or train.csv; plain, .gz, .xz or .zip")
    add("--out-dir", type=Path, default=Path("data/fer"), help="output root (default: %(default)s)")
    add("--emotions", nargs="+", choices=LABELS, default=EMOTIONS, help="classes (default: %(default)s)")
    add("--size", type=positive_int, default=NATIVE_SIZE, help="pixels a side (default: %(default)s)")
    add("--drop-duplicates", action="store_true", help="drop images from train, as described above")
    add("--ferplus", type=Path, metavar="FILE", help="FER+'s fer2013new.csv: write its votes to votes.csv")
    add("--max-bad", type=share, default=0.01, help="share of rows allowed to be bad (default: %(default)s)")
    add("--limit", type=positive_int, help="read only the first N rows (default: all)")
    add("--overwrite", action="store_true", help="replace the images of an earlier run, keep other files")
    return parser.parse_args(argv)


def format_counts(counts: dict[str, dict[str, int]], emotions: list[str]) -> str:
    """Lay out the images of each split and emotion as a table."""
    lines = [f"{'split':5}" + "".join(f"{name:>11}" for name in [*emotions, "total"])]
    for split, by_emotion in counts.items():
        numbers = [by_emotion[emotion] for emotion in emotions]
        lines.append(f"{split:5}" + "".join(f"{number:11}" for number in [*numbers, sum(numbers)]))
    return "\n".join(lines)


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    """Unpack a CSV, unless the folder shows that it has been done."""
    args = parse_args(argv)
    if not args.csv.is_file() or args.csv.stat().st_size == 0:
        raise ValueError(f"{args.csv} is missing or empty, expected FER2013's CSV; get it from Kaggle")
    if args.ferplus and not args.ferplus.is_file():
        raise ValueError(f"{args.ferplus} is missing, expected FER+'s fer2013new.csv; get it from GitHub")
    source = {
        "csv": digest_of(args.csv),
        "ferplus": digest_of(args.ferplus) if args.ferplus else None,
        "emotions": sorted(set(args.emotions)),
        "size": args.size,
        "drop_duplicates": args.drop_duplicates,
        "limit": args.limit,
    }

    manifest = read_manifest(args.out_dir)
    finished = {"complete": True, "source": source}
    is_done = not args.overwrite and manifest == manifest | finished | survey(args.out_dir)
    is_done &= not args.ferplus or (args.out_dir / "votes.csv").exists()
    if is_done:
        print(f"{args.out_dir} is complete already", file=sys.stderr)
    else:
        numbers = unpack(args.csv, args.out_dir, source, args.ferplus, args.overwrite)
        manifest = finished | numbers | survey(args.out_dir)
    rows, bad = manifest["rows"], manifest["bad_rows"]
    print(f"{rows} rows read, {bad} of them bad and skipped", file=sys.stderr)
    if rows == 0 or bad > args.max_bad * rows:
        wanted = f"rows, at most {args.max_bad:.2%} of them bad (--max-bad)"
        raise ValueError(f"{args.csv} has {bad} bad rows out of {rows}, expected {wanted}; get it anew")
    if args.drop_duplicates:
        dropped = ", ".join(f"{number} {reason}" for reason, number in manifest["dropped"].items())
        print(f"dropped from train: {dropped}", file=sys.stderr)
    if not is_done:
        write_manifest(args.out_dir, manifest)
    print(f"{format_counts(manifest['counts'], source['emotions'])}\nimages in {args.out_dir}")


if __name__ == "__main__":
    main()
