"""Unpack FER2013's CSV into gray 48x48 images, `<out-dir>/{train,val,test}/<emotion>/<row>.png`.

FER2013 (Goodfellow et al. 2013, "Challenges in Representation Learning: A report on three machine learning
contests", arXiv:1307.0414; on Kaggle) keeps one face a row. Its column Usage is the official split: Training
is train, PublicTest val, PrivateTest test. `<row>` counts the CSV's data rows from 00000, so that every image
leads back to its row. Images keep their native 48 pixels; resizing belongs to the transform.

FER2013 repeats itself. --drop-duplicates cleans train and leaves val and test alone. It compares the pixels
and labels of all rows read, before classes are chosen, and drops a train row for the first reason that fits:
its image stands in val or test; its image has several labels (all its rows go); its image stood in train
before. Images are written beside their place as rows come, and moved to it when all rows are read and sound:
one pass, memory for a digest a row, and an old set stays whole until the new one is.

FER+ (Barsoum et al. 2016, arXiv:1608.01041; fer2013new.csv of github.com/microsoft/FERPlus) holds, row for
row, what ten people saw in each face. --ferplus writes their votes to `<out-dir>/votes.csv`.

Usage:
    python unpack_fer_data.py fer2013.csv --out-dir data/fer_all
    python unpack_fer_data.py fer2013.csv --drop-duplicates --ferplus fer2013new.csv --out-dir data/fer_clean
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import lzma
import re
import sys
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

import model as shared

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd

LABELS = ("angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral")  # FER's 0 to 6
USAGES = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}  # Usage: folder
FERPLUS = "FER+'s fer2013new.csv"
# FER+'s column for each of LABELS; its others, of which NF means "no face", are left out.
VOTES = ("anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral")
OTHER_VOTES = ("contempt", "unknown", "NF")
SIZE = 48  # pixels a side
DROP_REASONS = ("in val or test", "with several labels", "repeated in train")  # in order of precedence
# Chosen here: FER's headers and rows are shorter, and a binary file may have no line ends.
MAX_HEADER_BYTES, MAX_ROW_BYTES = 1000, 100_000
MAX_MISPLACED = 0.01  # of FER+'s images, chosen here; known tables of 35,710 faces misplace two
MAX_REPORTED = 5  # bad rows that are named; the others are counted
BROKEN_STREAM = (EOFError, RuntimeError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile)
MANIFEST_FORMAT = "unpack_fer_data 1"


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
    archive, columns = zipfile.ZipFile(raw), {}
    for name in archive.namelist():
        if name.lower().endswith(".csv"):
            with archive.open(name) as file:
                columns[name] = read_header(file)
    tables = [name for name in columns if {"emotion", "pixels"} <= set(columns[name])]
    named = [name for name in tables if PurePosixPath(name).name == "fer2013.csv"]
    with_usage = [name for name in tables if "usage" in columns[name]]
    for choice in (named, with_usage, tables):
        if len(choice) == 1:
            return archive.open(choice[0])
    found = ", ".join(tables or columns) or "no CSV"
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
            kind = shared.kind_of(file.peek(512))
            columns = read_header(file)
        except BROKEN_STREAM as error:
            raise ValueError(
                f"{path} is no sound {suffix} file ({error}); get it anew or rename it"
            ) from None
        if not {"emotion", "pixels"} <= set(columns):
            what = f"is {kind}" if kind else f"starts with {','.join(columns)[:50]!r}"
            raise ValueError(
                f"{path} {what}, expected emotion, pixels and Usage; "
                "pass fer2013.csv, icml_face_data.csv or train.csv, unpacked, from Kaggle"
            )
        yield file, raw, columns


def parse_pixels(text: bytes) -> np.ndarray:
    """Return the (48, 48) uint8 image that is written as 2304 numbers, ValueError if it is not."""
    if text.translate(None, b"0123456789 "):
        raise ValueError("pixels are not all whole numbers from 0 to 255")
    pixels = np.fromstring(text, dtype=np.int64, sep=" ")
    if len(pixels) != SIZE**2:
        raise ValueError(f"{len(pixels)} pixels, expected {SIZE**2}")
    if pixels.max() > 255:
        raise ValueError(f"pixel value {pixels.max()}, expected 0 to 255")
    return pixels.astype(np.uint8).reshape(SIZE, SIZE)


class Row(NamedTuple):
    """A sound row of the CSV."""

    index: int
    split: str
    emotion: str
    image: np.ndarray  # (48, 48) uint8


def parse_row(line: bytes, index: int, columns: list[str]) -> Row:
    """Return the row that a line holds, ValueError if it is malformed."""
    values = split_fields(line)
    if len(values) != len(columns):
        raise ValueError(f"{len(values)} columns, expected {len(columns)}")
    fields = dict(zip(columns, values, strict=True))
    label, usage = fields["emotion"].decode("latin-1"), fields.get("usage", b"Training").decode("latin-1")
    if label not in map(str, range(len(LABELS))):
        raise ValueError(f"label {label[:20]!r}, expected 0 to {len(LABELS) - 1}")
    if usage not in USAGES:
        raise ValueError(f"Usage {usage[:20]!r}, expected {', '.join(USAGES)}")
    return Row(index, USAGES[usage], LABELS[int(label)], parse_pixels(fields["pixels"]))


def read_rows(file: BinaryIO, columns: list[str], limit: int | None) -> Iterator[tuple[int, Row | str]]:
    """Yield line number and row, or what is wrong with it; blank lines do not count as rows."""
    number, index = 1, 0
    while limit is None or index < limit:
        number += 1
        try:
            if not (line := file.readline(MAX_ROW_BYTES)):
                return
            part = line
            while len(part) == MAX_ROW_BYTES and not part.endswith(b"\n"):
                part = file.readline(MAX_ROW_BYTES)
            if not line.strip():
                continue
            row = parse_row(line, index, columns)
        except BROKEN_STREAM as error:
            yield number, f"the file breaks off ({error}), all that follows is lost"
            return
        except ValueError as error:
            row = str(error)
        yield number, row
        index += 1


# --- writing ---


def write_png(path: Path, staging: Path, image: np.ndarray) -> None:
    """Write a gray image into the folder `staging`, unless the file `path` holds just that already."""
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    if not path.exists() or path.read_bytes() != png.getvalue():
        try:
            (staging / path.name).write_bytes(png.getvalue())
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror}") from None


def find_duplicates(rows: pd.DataFrame) -> pd.Series:
    """Return the reason to drop each train row that is to go, one of DROP_REASONS.

    Args:
        rows: columns split, emotion and digest (of the image); indexed by the row's number, as the result.
    """
    import pandas as pd

    in_train = rows["split"] == "train"
    held_out = (~in_train).groupby(rows["digest"]).transform("any")
    several = rows.groupby("digest")["emotion"].transform("nunique") > 1
    reasons = np.select([held_out, several, rows.duplicated("digest")], DROP_REASONS, "")
    return pd.Series(reasons, rows.index)[in_train & (reasons != "")]


def parse_votes(cells: dict[str, str]) -> list:
    """Return Usage, image name and VOTES of a row of FER+, cells by column; ValueError if it is malformed."""
    counts = {name: text.strip() for name, text in cells.items() if name in {*VOTES, *OTHER_VOTES}}
    for name, text in counts.items():
        if not re.fullmatch("[0-9]{1,3}", text):
            raise ValueError(f"{text[:20]!r} votes for {name}, expected a whole number")
    if not any(map(int, counts.values())):
        raise ValueError("nobody voted")
    return [cells["Usage"], cells.get("Image name", ""), *(int(counts[name]) for name in VOTES)]


def match_votes(found: list[list], rows: pd.DataFrame, num_rows: int, is_whole: bool) -> pd.DataFrame:
    """Return the votes for the faces of `rows`, under the names of LABELS.

    Args:
        found: FER+'s rows, of `parse_votes`.
        num_rows: of the table of faces, bad ones included.
        is_whole: all its rows were read.

    Raises:
        ValueError: the two tables are not row for row.
    """
    import pandas as pd

    votes = pd.DataFrame(found, columns=["Usage", "Image name", *VOTES])
    names, splits = votes["Image name"].loc[lambda names: names != ""], votes["Usage"].map(USAGES)
    if is_whole and len(votes) != num_rows:
        reason = f"it has {len(votes)} rows and they {num_rows}"
    elif (differs := splits.reindex(rows.index) != rows["split"]).any():
        reason = f"row {differs.idxmax()} is not of the same split"
    elif names.duplicated().any():
        reason = f"it names {names[names.duplicated()].iloc[0]!r} twice"
    elif (names < names.shift(fill_value="")).mean() > MAX_MISPLACED:
        reason = "its images stand in another order"
    else:
        return votes.loc[rows.index, list(VOTES)].set_axis(LABELS, axis="columns")
    raise ValueError(f"FER+ is not row for row with the faces: {reason}; get both files anew")


def find_images(out_dir: Path) -> list[Path]:
    """List the images that are named as this script names them."""
    folders = [out_dir / split / label for split in USAGES.values() for label in LABELS]
    paths = [path for folder in folders for path in folder.glob("*.png")]
    return [path for path in paths if len(path.stem) >= 5 and path.stem.isdecimal()]


def count_images(out_dir: Path) -> dict:
    """Return the `counts` of images on disk by split and emotion, and the `bytes` they take."""
    counts = {split: dict.fromkeys(LABELS, 0) for split in USAGES.values()}
    paths = find_images(out_dir)
    for path in paths:
        counts[path.parts[-3]][path.parts[-2]] += 1
    return {"counts": counts, "bytes": sum(path.stat().st_size for path in paths)}


def read_manifest(out_dir: Path) -> dict:
    """Return the manifest of an output folder, {} if it has none, ValueError if it is of another kind."""
    path = out_dir / "manifest.json"
    if not path.exists():
        return {}
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
        manifest = json.loads(path.read_bytes())
        numbers = manifest if manifest["complete"] else {"rows": 0, "bad_rows": 0, "dropped": {}}
        has_numbers = sys.maxsize >= numbers["rows"] >= numbers["bad_rows"] >= 0
        has_numbers &= isinstance(numbers["dropped"], dict)
        if manifest["format"] == MANIFEST_FORMAT and isinstance(manifest["source"], dict) and has_numbers:
            return manifest
    raise ValueError(f"{path} is not this script's ({MANIFEST_FORMAT}); choose another --out-dir")


def check_folder(out_dir: Path, source: dict, overwrite: bool) -> None:
    """Check that the folder may get the images of `source`.

    Raises:
        ValueError: it holds the images of another source, none of this script's, or links to elsewhere.
    """
    for split, label in itertools.product(USAGES.values(), LABELS):
        shared.inside(out_dir, f"{split}/{label}/0.png")
    manifest, images = read_manifest(out_dir), find_images(out_dir)
    if images and not manifest:
        raise ValueError(f"{out_dir} holds images but no manifest.json; choose another --out-dir")
    if images and not overwrite and manifest["source"] != source:
        changed = ", ".join(key for key in source if manifest["source"].get(key) != source[key])
        raise ValueError(
            f"{out_dir} holds images made otherwise ({changed}); choose another --out-dir or add --overwrite"
        )


def check_rows(path: Path, numbers: dict, max_bad: float) -> None:
    """Print how many rows there are, by this run or an earlier one; raise ValueError if too many are bad."""
    rows, bad = numbers["rows"], numbers["bad_rows"]
    print(f"{rows} rows, {bad} of them bad and skipped", file=sys.stderr)
    if rows == 0 or bad > max_bad * rows:
        wanted = f"rows, at most {max_bad:.2%} of them bad (--max-bad)"
        raise ValueError(f"{path} has {bad} bad rows out of {rows}, expected {wanted}; get it anew")


def publish(staging: Path, kept: Sequence[Path], out_dir: Path, source: dict) -> None:
    """Move the images of `staging` to their place, the paths `kept`, and remove all else of this script.

    The manifest calls the folder incomplete from here until `main` writes it anew.
    """
    if read_manifest(out_dir).get("source", {}).get("ferplus"):
        (out_dir / "votes.csv").unlink(missing_ok=True)
    claim = {"format": MANIFEST_FORMAT, "complete": False, "source": source}
    shared.save_json(out_dir / "manifest.json", claim)
    folders = {path.parent for path in kept}  # an empty one would pass for a class, or for a split
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for path in kept:
        with contextlib.suppress(FileNotFoundError):  # it is in its place already
            (staging / path.name).replace(path)
    others = set(find_images(out_dir)) - set(kept)
    for path in others:
        path.unlink()
    for folder in {out_dir / split / label for split in USAGES.values() for label in LABELS} - folders:
        with contextlib.suppress(OSError):  # it is not there, or holds other files
            folder.rmdir()
            folder.parent.rmdir()


def unpack(
    path: Path, out_dir: Path, source: dict, *, ferplus: Path | None, overwrite: bool, max_bad: float
) -> dict:
    """Write the images that `source` asks for; return the numbers of `rows`, `bad_rows` and `dropped`.

    What the folder holds is touched only when all of the new is there and sound.

    Raises:
        ValueError: a table or the folder is not fit, or the folder holds images of unknown origin as well.
    """
    import pandas as pd

    found, num_bad, written, dropped = [], 0, {}, dict.fromkeys(DROP_REASONS, 0)
    with open_csv(path) as (file, raw, columns), shared.temporary_folder(out_dir) as staging:
        votes = shared.read_table(ferplus, {"Usage", *VOTES}, parse_votes, FERPLUS) if ferplus else None
        check_folder(out_dir, source, overwrite)
        if "usage" not in columns:
            print(shared.printable(f"{path} has no column Usage: all its rows go to train"), file=sys.stderr)
        with tqdm(total=path.stat().st_size, unit="B", unit_scale=True, disable=None) as bar:
            for number, row in read_rows(file, columns, source["limit"]):
                bar.update(raw.tell() - bar.n)
                if isinstance(row, str):
                    num_bad += 1
                    if num_bad <= MAX_REPORTED:
                        bar.write(shared.printable(f"{path}, line {number}: {row}; skipped"), file=sys.stderr)
                    continue
                digest = hashlib.blake2b(row.image, digest_size=16).digest()
                found.append((row.index, row.split, row.emotion, digest))
                if row.emotion in source["emotions"]:
                    written[row.index] = out_dir / row.split / row.emotion / f"{row.index:05d}.png"
                    write_png(written[row.index], staging, row.image)
        if num_bad > MAX_REPORTED:
            print(shared.printable(f"{path}: {num_bad - MAX_REPORTED} more such lines"), file=sys.stderr)
        rows = pd.DataFrame(found, columns=["row", "split", "emotion", "digest"]).set_index("row")
        if ferplus:
            votes = match_votes(votes, rows, len(rows) + num_bad, is_whole=source["limit"] is None)
        strangers = set(find_images(out_dir)) - set(written.values())
        if strangers and not overwrite:
            num = len(strangers)
            raise ValueError(f"{out_dir} holds {num} images that are not from {path}; move them elsewhere")
        if source["drop_duplicates"]:
            for index, reason in find_duplicates(rows).items():
                dropped[reason] += written.pop(index, None) is not None
        numbers = {"rows": len(rows) + num_bad, "bad_rows": num_bad, "dropped": dropped}
        check_rows(path, numbers, max_bad)
        publish(staging, list(written.values()), out_dir, source)
    if ferplus:
        with shared.replacing(out_dir / "votes.csv") as temporary:
            votes.to_csv(temporary, index_label="row", lineterminator="\r\n")
    return numbers


# --- command line ---


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = shared.build_parser(__doc__)
    add = parser.add_argument
    add("csv", type=Path, help="fer2013.csv, icml_face_data.csv or train.csv; plain, .gz, .xz or .zip")
    shared.add_options(parser, out_dir=Path("data/fer"))
    add("--emotions", nargs="+", choices=LABELS, default=shared.EMOTIONS, help="classes")
    add("--drop-duplicates", action="store_true", help="drop images from train, as described above")
    add("--ferplus", type=Path, metavar="FILE", help="FER+'s fer2013new.csv: write its votes to votes.csv")
    share, count = shared.number(float, 0, 1), shared.number(int, 1)
    add("--max-bad", type=share, metavar="X", default=0.01, help="share of rows that may be bad")
    add("--limit", type=count, metavar="N", help="read only the first N rows (default: all)")
    add("--overwrite", action="store_true", help="replace the images of an earlier run, keep other files")
    return parser.parse_args(argv)


@shared.one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Unpack a CSV, unless the folder shows that it has been done."""
    args = parse_args(argv)
    if not args.csv.is_file() or args.csv.stat().st_size == 0:
        raise ValueError(f"{args.csv} is missing or empty, expected FER2013's CSV; get it from Kaggle")
    if args.ferplus and not args.ferplus.is_file():
        raise ValueError(f"{args.ferplus} is missing, expected {FERPLUS}; get it from GitHub")
    source = {  # all that decides what the folder will hold
        "csv": shared.file_digest(args.csv, "blake2b"),
        "ferplus": shared.file_digest(args.ferplus, "blake2b") if args.ferplus else None,
        "emotions": sorted(set(args.emotions)),
        "size": SIZE,  # which was an option once
        "drop_duplicates": args.drop_duplicates,
        "limit": args.limit,
    }

    manifest = read_manifest(args.out_dir)
    finished = {"format": MANIFEST_FORMAT, "complete": True, "source": source}
    is_done = not args.overwrite and manifest == manifest | finished | count_images(args.out_dir)
    is_done &= not args.ferplus or (args.out_dir / "votes.csv").exists()
    if is_done:
        print(shared.printable(f"{args.out_dir} is complete already"), file=sys.stderr)
        check_rows(args.csv, manifest, args.max_bad)
        with contextlib.suppress(OSError), shared.only_run_in(args.out_dir):
            pass  # takes away the lock of a run that was killed when all was there
    else:
        options = {"ferplus": args.ferplus, "overwrite": args.overwrite, "max_bad": args.max_bad}
        with shared.only_run_in(args.out_dir):
            numbers = unpack(args.csv, args.out_dir, source, **options)
            manifest = finished | numbers | count_images(args.out_dir)
            shared.save_json(args.out_dir / "manifest.json", manifest)
    if args.drop_duplicates:
        dropped = ", ".join(f"{number} {reason}" for reason, number in manifest["dropped"].items())
        print(shared.printable(f"dropped from train: {dropped}"), file=sys.stderr)

    import pandas as pd  # here, for --help does without

    table = pd.DataFrame(manifest["counts"]).T[source["emotions"]].rename_axis(columns="split")
    table["total"] = table.sum(axis="columns")
    print(table.to_string(col_space=dict.fromkeys(table, 10)))
    print(shared.printable(f"images in {args.out_dir}"))


if __name__ == "__main__":
    main()
