"""Feed the scripts with damaged and hostile inputs, and kill them at random moments; count what goes wrong.

An input is a real one with some seeded changes: bytes, numbers, names, or fields of its format. The scripts'
`main` runs in a process that stays alive, with networks that are loaded once. With --kind kills a script runs
in a process of its own that gets SIGKILL at a random moment, and then once more to its end; what it leaves
should equal what an undisturbed run leaves. With --kind disks, for root alone, it gets a disk that is
read-only or too small instead of the signal.

Each case has a folder: `work`, where the script runs, `work/out`, the only part that may change, and beside
`work` a file that nobody may touch. The last line on stdout is a JSON object of counts by kind; what goes
wrong is also told on stderr, with its folder, which is kept.

Usage:
    python tests/mutate.py --kind photos tables --count 1000 --seed 7
"""

import argparse
import contextlib
import csv
import functools
import gzip
import importlib.util
import io
import json
import lzma
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402
import test_detect_video  # noqa: E402
import tiny_resnet  # noqa: E402
import torch  # noqa: E402
from image_server import serve, serve_pictures  # noqa: E402
from PIL import Image  # noqa: E402
from test_unpack_fer_data import csv_text  # noqa: E402
from tqdm import tqdm  # noqa: E402

import detect_emotions  # noqa: E402
import download_data  # noqa: E402
import finetune_emotion  # noqa: E402
import finetune_fer  # noqa: E402
import finetune_gray_imagenet  # noqa: E402
import model as shared  # noqa: E402
import unpack_fer_data  # noqa: E402

MODULES = (
    detect_emotions,
    download_data,
    finetune_emotion,
    finetune_fer,
    finetune_gray_imagenet,
    unpack_fer_data,
)
MAINS = {module.__name__: module.main for module in MODULES}
HANG_S = 300  # a busy machine may let one wait for a minute
MAX_ADDRESS_SPACE = 12 * 2**30  # bytes; what a bomb gets at most
BATCH = {"photos": 50, "videos": 5}  # inputs that one call gets, as a folder
CLASSES = ("angry", "happy")


# --- changes ---

NUMBERS = (0, 1, -1, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, -(2**63), 10**400)
NUMBERS += (0.5, -0.0, 1e308, 1e-320, math.nan, math.inf, -math.inf)
TEXTS = ("", " ", "../victim", "../../victim", "/victim", ".", "..", "a\0b", "a\nb", "\x1b[31mred", "\u202e")
TEXTS += ("=1+1", "@x", "x" * 300, "x" * 200_000, "CON", "é", "e\u0301", "9" * 5000, "NaN", "-1", "1e400")
TEXTS += ("😀", '"', "'", "\\", "{}", "[" * 100_000, "http://[", "http://a.invalid:99999/", "file:///victim")
VALUES = (None, True, False, [], {}, [[]], {"": None}, *NUMBERS, *TEXTS)
FIELDS = [struct.Struct(order + size) for order in "<>" for size in "BHIQ"]


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, overwrite, cut, double or shuffle bytes, most of all in the header, or set a format's field."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not data:
            break
        start = rng.randrange(min(len(data), rng.choice((32, 512, 2**40))))
        end = start + rng.choice((1, 4, 32, 1000))
        match rng.randrange(8):
            case 0:
                data[start] ^= 1 << rng.randrange(8)
            case 1:
                data[start:end] = rng.randbytes(end - start)
            case 2:
                del data[rng.choice((start, rng.randrange(len(data)))) :]
            case 3:
                del data[start:end]
            case 4:
                data[start:start] = data[start:end] * rng.choice((1, 1, 50))
            case 5:
                part = list(data[start:end])
                rng.shuffle(part)
                data[start:end] = bytes(part)
            case 6:
                set_field(rng, data, start)
            case _:  # many formats name their parts by four letters
                names = [match.end() for match in re.finditer(rb"[A-Za-z]{4}", data)]
                set_field(rng, data, rng.choice(names or [start]) + rng.randrange(24))
    if data.startswith(b"\x89PNG") and rng.random() < 0.8:
        repair_checksums(data)
    return bytes(data)


def set_field(rng: random.Random, data: bytearray, start: int) -> None:
    """Write a number of 1 to 8 bytes, of either order: an extreme one, or near what was there."""
    field = rng.choice(FIELDS)
    if start + field.size <= len(data):
        highest = 256**field.size - 1
        (old,) = field.unpack_from(data, start)
        value = rng.choice(
            (0, 1, highest, highest // 2, highest // 2 + 1, old + 1, old * 2, rng.randrange(20_000))
        )
        field.pack_into(data, start, value & highest)


def repair_checksums(data: bytearray) -> None:
    """Make a PNG's checksums right, so that its readers look further."""
    start = 8
    while start + 12 <= len(data):
        end = start + 8 + int.from_bytes(data[start : start + 4])
        if end + 4 > len(data):
            return
        data[end : end + 4] = zlib.crc32(data[start + 4 : end]).to_bytes(4)
        start = end + 4


def change_value(rng: random.Random, value: object) -> object:
    """Replace, drop, double or wrap something at a random place in what JSON or a checkpoint holds."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key, changed = rng.choice(keys), value.copy()
        match rng.randrange(8):
            case 0:
                del changed[key]
            case 1 if isinstance(value, dict):
                changed[rng.choice(TEXTS)] = value[key]
            case 1:
                changed.append(value[key])
            case _:
                changed[key] = change_value(rng, value[key])
        return changed
    if isinstance(value, torch.Tensor):
        return change_tensor(rng, value)
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.6:
        return rng.choice((*NUMBERS, -value, value + 1, value * 10**6))
    return rng.choice(
        (*VALUES, [value], {"a": value}, str(value), functools.reduce(lambda x, _: [x], range(300), value))
    )


def change_tensor(rng: random.Random, tensor: torch.Tensor) -> object:
    """Change values, shape or type of a tensor."""
    if not tensor.ndim:
        return rng.choice((tensor - 1, tensor.float() * math.nan, None))
    flat = tensor.flatten().clone()
    changes = [
        flat,
        tensor[None],
        tensor[:0],
        tensor[..., :1],
        tensor.double(),
        tensor.to(torch.int8),
        tensor > 0,
    ]
    changes += [torch.zeros(()), torch.zeros(1).expand(10**6), tensor.tolist(), None]
    if len(flat) and tensor.is_floating_point():
        flat[rng.randrange(len(flat))] = rng.choice((math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0))
        changes += [flat.reshape(tensor.shape)] * 8 + [tensor * 1e6, -tensor, tensor.half()]
    return rng.choice(changes)


def change_text(rng: random.Random, text: str) -> bytes:
    """Change words, lines, bytes, the encoding or the packing of a text."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        lines = text.splitlines(keepends=True) or [""]
        line = rng.randrange(len(lines))
        match rng.randrange(6):
            case 0:
                lines[line : line + 1] = [lines[line]] * rng.choice((0, 2, 40))
            case 1:
                rng.shuffle(lines)
            case 2:
                lines.insert(line, rng.choice(TEXTS) + rng.choice(("", "\n", ",,,\n")))
            case _:
                words = [match.span() for match in re.finditer(r"-?[\d.]+|\w+|[^\w\s]", lines[line])]
                start, end = rng.choice(words or [(0, 0)])
                new = rng.choice((rng.choice(TEXTS), str(rng.choice(NUMBERS)), ""))
                lines[line] = lines[line][:start] + new + lines[line][end:]
        text = "".join(lines)
    data = text.encode(rng.choice(["utf-8"] * 8 + ["utf-8-sig", "utf-16"]), errors="replace")
    if rng.random() < 0.3:
        data = change_bytes(rng, data)
    return (
        rng.choice((gzip.compress, lzma.compress))(
            data,
        )
        if rng.random() < 0.05
        else data
    )


def change_json_lines(rng: random.Random, text: str) -> bytes:
    """Change values in lines of JSON, or as `change_text`."""
    if rng.random() < 0.3:
        return change_text(rng, text)
    values = [json.loads(line) for line in text.splitlines()]
    for _ in range(rng.choice((1, 1, 3))):
        number = rng.randrange(len(values))
        values[number] = change_value(rng, values[number])
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def change_checkpoint(rng: random.Random, path: Path) -> None:
    """Change the bytes of a checkpoint, or something in it."""
    if rng.random() < 0.25:
        path.write_bytes(change_bytes(rng, path.read_bytes()))
        return
    content = torch.load(path, weights_only=True)
    for _ in range(rng.choice((1, 1, 2, 4))):
        content = change_value(rng, content)
    torch.save(content, path)


# --- the undamaged ---


def quarters() -> list[Image.Image]:
    """Return four photos of one face each."""
    with Image.open(ROOT / "resources" / "sample.jpg") as photo:
        return [photo.crop((x, y, x + 480, y + 480)).resize((240, 240)) for y in (0, 480) for x in (0, 480)]


@functools.cache
def pictures() -> list[tuple[str, bytes]]:
    """Return photos as files of all formats, modes and depths: suffix and content."""
    face, other = quarters()[:2]
    exif = Image.Exif()
    exif[274], exif[305] = 6, "camera"
    many = {"save_all": True, "append_images": [other, face], "duration": 100}
    files = []
    for suffix, image, options in (
        (".jpg", face, {"exif": exif, "icc_profile": b"x" * 500, "comment": "c"}),
        (".jpg", face, {"progressive": True}),
        (".jpg", face.convert("CMYK"), {}),
        (".png", face, {"exif": exif}),
        (".png", face.convert("P"), {"transparency": 3}),
        (".png", face.convert("RGBA"), many),
        (".png", face.convert("I;16"), {}),
        (".webp", face, {"exif": exif}),
        (".webp", face, many),
        (".gif", face, many),
        (".tif", face, {"compression": "tiff_lzw", "exif": exif}),
        (".tif", face, {"compression": "jpeg"}),
        (".tif", face.convert("F"), {}),
        (".bmp", face.convert("P"), {}),
        (".ppm", face, {}),
        (".tga", face, {"compression": "tga_rle"}),
        (".ico", face, {"sizes": [(64, 64), (240, 240)]}),
        (".jp2", face, {}),
        (".avif", face, {}),
    ):
        file = io.BytesIO()
        image.save(file, Image.registered_extensions()[suffix], **options)
        files.append((suffix, file.getvalue()))
    return files


def clips(folder: Path) -> Path:
    """Write short videos with sound, of several formats."""
    folder.mkdir()
    images = [image.resize((160, 120)) for image in quarters() for _ in range(5)]
    for suffix, codec, sound in (
        (".mp4", "libx264", "aac"),
        (".mov", "mpeg4", "pcm_s16le"),
        (".mkv", "libx264", "pcm_s16le"),
        (".webm", "libvpx", None),
        (".avi", "mpeg4", "libmp3lame"),
        (".ts", "mpeg2video", "mp2"),
        (".mpg", "mpeg2video", "mp2"),
        (".flv", "flv", None),
    ):
        path = folder / f"clip{suffix}"
        test_detect_video.write_video(path, images, codec=codec, sound=sound)
    return folder


def make_seeds(folder: Path, worker: "Worker") -> Path:
    """Write what the cases copy and change: tables, data sets, runs with their checkpoints."""
    folder.mkdir()
    torch.manual_seed(0)
    usages = ["Training"] * 8 + ["PublicTest"] * 3 + ["PrivateTest"] * 3
    (folder / "fer2013.csv").write_text(csv_text([(i % 7, usage) for i, usage in enumerate(usages)]))
    with (folder / "fer2013new.csv").open("w", newline="") as file:
        table = csv.writer(file)
        names = (
            "Usage",
            "Image name",
            "neutral",
            "happiness",
            "surprise",
            "sadness",
            "anger",
            "disgust",
            "fear",
        )
        table.writerow([*names, *unpack_fer_data.OTHER_VOTES])
        table.writerows([usage, f"fer{i:07}.png", *[i % 5] * 7, 1, 0, 0] for i, usage in enumerate(usages))
    (folder / "emotions.json").write_text(json.dumps({name: [name, f"{name} face"] for name in CLASSES}))
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        conftest.make_faces(folder / "faces" / split, count, CLASSES)
    paths = sorted((folder / "faces").rglob("*.png"))
    for number, path in enumerate(paths):  # a row number of FER is an image's name
        path.rename(path.with_name(f"{number:05}.png"))
    votes = "".join(f"{number},{number % 3},2\r\n" for number in range(len(paths)))
    (folder / "faces" / "votes.csv").write_text(f"row,{','.join(CLASSES)}\r\n{votes}")
    corrections = ""
    for number, image in enumerate(quarters() * 2):
        path = folder / "google" / CLASSES[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.rotate(number // 4 * 8, fillcolor="gray").save(path)
        corrections += f"{path.parent.name}/{path.name},{CLASSES[number // 4]}\r\n"
    (folder / "corrections.csv").write_text(f"path,label\r\n{corrections}")
    (folder / "photos").mkdir()
    for number, image in enumerate(quarters()):
        image.save(folder / "photos" / f"{number}.jpg")
    shutil.copytree(folder / "photos", folder / "album")
    shutil.copy(clips(folder / "clips") / "clip.mkv", folder / "album")
    torch.save(shared.color_resnet(tiny_resnet.ARCH).state_dict(), folder / "teacher.pth")
    conftest.write_checkpoint(
        folder / "gray.pt", shared.gray_resnet(tiny_resnet.ARCH, 0), (), stage="gray", image_size=64
    )
    with serve(serve_pictures) as server:
        urls = "".join(f"{CLASSES[i % 2]} {server.url(f'/photo?n={i}')}\n" for i in range(6))
        (folder / "list.txt").write_text(urls)
        for name, options in RUNS.items():
            result = worker.run(name, options.replace("OUT", name).split(), folder)
            assert result.code == 0, (name, result.stderr)
    export = "--model finetune_emotion/best.pt --export network"
    for options in (JOURNALED.replace("OUT", "journals"), *(export + suffix for suffix in EXPORTS)):
        result = worker.run("detect_emotions", options.split(), folder)
        assert result.code == 0, (options, result.stderr)
    return folder


# What a script is run with to its end, in a folder like the seeds'; quick, and enough to be killed in.
TRAINING = "--image-size 32 --batch-size 4 --epochs 3 --device cpu --seed 3"
RUNS = {
    "unpack_fer_data": "fer2013.csv --out-dir OUT --ferplus fer2013new.csv --drop-duplicates",
    "finetune_gray_imagenet": f"--data-dir photos --arch {tiny_resnet.ARCH} --teacher-weights teacher.pth "
    f"--out-dir OUT {TRAINING}",
    "finetune_fer": f"--data-dir faces --emotions angry happy --init gray.pt --out-dir OUT {TRAINING}",
    "finetune_emotion": "--data-dir google --faces-dir OUT_faces --init finetune_fer/best.pt --no-mix "
    f"--out-dir OUT --val-fraction 0.5 {TRAINING}",
    "download_data": "imagenet --engine urls --list list.txt --out-dir OUT --allow-private --retries 0",
    "detect_emotions": "album --out-dir OUT",
}


# --- cases ---


class Case(NamedTuple):
    """A call of a script in a folder that `make` has filled."""

    script: str
    argv: list[str]
    num_inputs: int = 1
    expected: Path | None = None  # folder of the files that a run that ends well leaves in out/


def make_photos(rng: random.Random, work: Path, seeds: Path) -> Case:
    """Write a folder of changed photos under changed names."""
    return make_media(rng, work, pictures(), BATCH["photos"])


def make_videos(rng: random.Random, work: Path, seeds: Path) -> Case:
    """Write a folder of changed videos."""
    files = [(path.suffix, path.read_bytes()) for path in sorted((seeds / "clips").iterdir())]
    return make_media(rng, work, files, BATCH["videos"])


def make_media(rng: random.Random, work: Path, files: list[tuple[str, bytes]], count: int) -> Case:
    (work / "in").mkdir()
    marks = [
        "",
        "",
        "",
        " ",
        "\n",
        "\x1b[31m",
        "=1+1",
        "-",
        "é",
        "\u202e",
        "\udcff",
        "_emotions",
        "[a]",
        "%d",
        "'",
    ]
    for number in range(count):
        suffix, data = rng.choice(files)
        if rng.random() < 0.1:
            suffix = rng.choice(
                [".JPG", ".eps", ".txt", "", ".mp4", ".heic", *(suffix for suffix, _ in files)]
            )
        name = rng.choice(("", "._", "-", "=", "%")) if rng.random() < 0.1 else ""
        path = work / "in" / f"{name}{number}{rng.choice(marks)}{suffix}"
        path.write_bytes(change_bytes(rng, data))
    report = ["--no-copies", "--report", "out/report.html"]
    options = rng.choice(([], ["--csv", "out/faces.csv"], report, ["--blur", "all"], ["--every", "1"]))
    return Case("detect_emotions", ["in", "--out-dir", "out", "--json", *options], count)


def make_fer_table(rng: random.Random, work: Path, seeds: Path) -> Case:
    names = {name: (seeds / name).read_text() for name in ("fer2013.csv", "fer2013new.csv")}
    changed = rng.choice(list(names))
    for name, text in names.items():
        (work / name).write_bytes(change_text(rng, text) if name == changed else text.encode())
    path, table = work / "fer2013.csv", "fer2013.csv"
    if rng.random() < 0.2:
        table = rng.choice(("fer.csv.gz", "fer.csv.xz", "fer.csv.zip"))
        if table.endswith("zip"):
            with zipfile.ZipFile(work / table, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.write(path, rng.choice(("fer2013.csv", "../fer2013.csv", "/victim")))
        else:
            pack = gzip.compress if table.endswith("gz") else lzma.compress
            (work / table).write_bytes(pack(path.read_bytes()))
        (work / table).write_bytes(change_bytes(rng, (work / table).read_bytes()))
    options = [[], ["--drop-duplicates"], ["--ferplus", "fer2013new.csv"], ["--max-bad", "1"]]
    options = [
        *rng.choice(options),
        *(["--ferplus", "fer2013new.csv"] if changed == "fer2013new.csv" else []),
    ]
    return Case("unpack_fer_data", [table, "--out-dir", "out/fer", *options])


def make_unpacked(rng: random.Random, work: Path, seeds: Path) -> Case:
    shutil.copytree(seeds / "unpack_fer_data", work / "out" / "fer")
    manifest = work / "out" / "fer" / "manifest.json"
    manifest.write_bytes(change_json_lines(rng, json.dumps(json.loads(manifest.read_text()))))
    argv = RUNS["unpack_fer_data"].replace("OUT", "out/fer").split()
    for name in ("fer2013.csv", "fer2013new.csv"):
        shutil.copy(seeds / name, work)
    return Case("unpack_fer_data", [*argv, *rng.choice(([], ["--overwrite"]))])


def make_votes(rng: random.Random, work: Path, seeds: Path) -> Case:
    shutil.copytree(seeds / "faces", work / "in")
    votes = work / "in" / "votes.csv"
    votes.write_bytes(change_text(rng, votes.read_text()))
    return Case("finetune_fer", ["--data-dir", "in", "--evaluate", str(seeds / "finetune_fer" / "best.pt")])


def make_review(rng: random.Random, work: Path, seeds: Path) -> Case:
    """Change corrections.csv, or the index of the cut faces."""
    shutil.copytree(seeds / "finetune_emotion_faces", work / "out" / "faces")
    index, corrections = work / "out" / "faces" / "index.jsonl", (seeds / "corrections.csv").read_text()
    if rng.random() < 0.5:
        (work / "corrections.csv").write_bytes(change_text(rng, corrections))
    else:
        (work / "corrections.csv").write_text(corrections)
        index.write_bytes(change_json_lines(rng, index.read_text()))
    argv = f"--data-dir {seeds}/google --faces-dir out/faces --init {seeds}/finetune_fer/best.pt --no-mix "
    argv += "--out-dir out/run --val-fraction 0.5 --image-size 32 --corrections corrections.csv "
    argv += rng.choice(("--review", "--epochs 1"))
    return Case("finetune_emotion", argv.split())


def make_manifest(rng: random.Random, work: Path, seeds: Path) -> Case:
    shutil.copytree(seeds / "download_data", work / "out" / "set")
    manifest = work / "out" / "set" / "manifest.jsonl"
    records = [json.loads(line) for line in manifest.read_text().splitlines()]
    kept = [record for record in records if record["status"] == "kept"]
    manifest.write_bytes(change_json_lines(rng, manifest.read_text()))
    (work / "list.txt").write_text(f"angry {kept[0]['url']}\n")
    picture = rng.choice(kept)[rng.choice(("url", "sha256"))]
    argv = rng.choice((["--remove", picture], ["--engine", "urls", "--list", "list.txt"]))
    return Case("download_data", ["imagenet", "--out-dir", "out/set", *QUICK, *argv])


def make_list(rng: random.Random, work: Path, seeds: Path) -> Case:
    text = (seeds / "list.txt").read_text()
    if rng.random() < 0.5:
        (work / "list").write_bytes(change_text(rng, text))
    else:
        manifest = (seeds / "download_data" / "manifest.jsonl").read_text()
        (work / "list").write_bytes(change_json_lines(rng, manifest))
    return Case(
        "download_data", ["imagenet", "--out-dir", "out/set", *QUICK, "--engine", "urls", "--list", "list"]
    )


def make_emotions(rng: random.Random, work: Path, seeds: Path) -> Case:
    text = (seeds / "emotions.json").read_text()
    (work / "emotions.json").write_bytes(change_json_lines(rng, text))
    argv = ["emotions", "--out-dir", "out/set", *QUICK, "--emotions-file", "emotions.json", "--labels", "zzz"]
    return Case("download_data", argv)


def make_journal(rng: random.Random, work: Path, seeds: Path) -> Case:
    """Change what a stopped run leaves of a table; of a line that is whole, nothing that is plausible."""
    shutil.copytree(seeds / "journals", work / "out", dirs_exist_ok=True)
    shutil.copytree(seeds / "photos", work / "photos")
    journal = work / "out" / rng.choice((".faces.csv.journal", ".tracks.csv.journal"))
    data = journal.read_bytes()
    if rng.random() < 0.5:
        data = data[: rng.randrange(len(data))]
    else:
        lines = data.splitlines(keepends=True)
        junk = rng.choice((rng.randbytes(50), *(text.encode(errors="replace") for text in TEXTS)))
        lines.insert(rng.randrange(len(lines) + 1), junk + rng.choice((b"", b"\n")))
        data = b"".join(lines)
    journal.write_bytes(data)
    return Case("detect_emotions", JOURNALED.replace("OUT", "out").split(), expected=seeds / "journals")


JOURNALED = "photos --out-dir OUT --csv OUT/faces.csv --summary OUT/tracks.csv"
QUICK = ["--limit", "2", "--retries", "0", "--timeout", "1", "--delay", "0"]
TABLES = (make_fer_table, make_unpacked, make_votes, make_review, make_manifest, make_list, make_emotions)
TABLES += (make_journal,)


def make_tables(rng: random.Random, work: Path, seeds: Path) -> Case:
    """Change a table or JSON that a script reads."""
    return rng.choice(TABLES)(rng, work, seeds)


EXPORTS = [
    suffix for suffix in shared.EXPORTED if suffix != ".onnx" or importlib.util.find_spec("onnxscript")
]


def make_exports(rng: random.Random, work: Path, seeds: Path) -> Case:
    """Change an exported network, or the weights beside it."""
    suffix = rng.choice(EXPORTS)
    for path in seeds.glob("network.*"):
        shutil.copy(path, work)
    path = work / rng.choice([f"network{suffix}"] * 2 + (["network.bin"] if suffix == ".xml" else []))
    data = path.read_bytes()
    change = change_text if path.suffix == ".xml" and rng.random() < 0.7 else change_bytes
    path.write_bytes(change(rng, data.decode() if change is change_text else data))
    argv = f"{seeds}/photos/0.jpg --out-dir out --json --model {work}/network{suffix}"
    return Case("detect_emotions", argv.split())


def make_checkpoints(rng: random.Random, work: Path, seeds: Path) -> Case:
    """Change a checkpoint, of its own kind or of another, for each option that takes one."""
    use = rng.choice(("evaluate", "model", "init", "teacher", "resume", "resume"))
    if use == "resume":
        script = rng.choice(("finetune_gray_imagenet", "finetune_fer", "finetune_emotion"))
        shutil.copytree(seeds / script, work / "out" / "run")
        path = work / "out" / "run" / "last.pt"
        argv = f"--resume {path} --epochs 4"
        config = torch.load(path, weights_only=True)
        for name in ("data_dir", "teacher_weights", "init"):
            if config["config"].get(name):
                config["config"][name] = str(seeds / config["config"][name])
        config["config"] |= {"out_dir": "out/run"}
        if script == "finetune_emotion":
            config["config"]["faces_dir"] = "out/faces"
            shutil.copytree(seeds / "finetune_emotion_faces", work / "out" / "faces")
        torch.save(config, path)
    else:
        sources = {
            "evaluate": "finetune_fer/best.pt",
            "model": "finetune_emotion/best.pt",
            "init": "gray.pt",
            "teacher": "teacher.pth",
        }
        source = sources[use] if rng.random() < 0.9 else rng.choice(list(sources.values()))
        path = shutil.copy(seeds / source, work / "some.pt")
        script, argv = {
            "evaluate": ("finetune_fer", f"--data-dir {seeds}/faces --evaluate some.pt"),
            "model": ("detect_emotions", f"{seeds}/photos/0.jpg --out-dir out --json --model {path}"),
            "init": (
                "finetune_fer",
                RUNS["finetune_fer"].replace("gray.pt", "some.pt").replace("faces", f"{seeds}/faces"),
            ),
            "teacher": (
                "finetune_gray_imagenet",
                RUNS["finetune_gray_imagenet"]
                .replace("teacher.pth", "some.pt")
                .replace("photos", f"{seeds}/photos"),
            ),
        }[use]
        argv = argv.replace("OUT", "out/run").replace("--epochs 3", "--epochs 1")
    change_checkpoint(rng, Path(path))
    return Case(script, argv.split())


# --- running ---


class Result(NamedTuple):
    """How a call ended."""

    code: int | str  # exit code, or "crash", "hang" or "traceback"
    stdout: str
    stderr: str
    seconds: float
    peak: int  # bytes of memory that the process ever had


def call(script: str, argv: list[str], work: Path) -> int:
    """Run a script's main in this process, its output into the files stdout and stderr beside `work`."""
    os.chdir(work)
    streams = [
        os.open(work.parent / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND) for name in ("stdout", "stderr")
    ]
    for number, descriptor in enumerate(streams, start=1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.argv = [f"{script}.py", *argv]
    try:
        MAINS[script](argv)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:  # whatever escapes a script is what is looked for here: it counts as a traceback
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def prepare() -> None:
    """Make a fresh process quiet, and short of memory."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_SPACE, MAX_ADDRESS_SPACE))


def serve_calls(pipe: multiprocessing.connection.Connection) -> None:
    """Answer each job from a pipe; load each network once."""
    prepare()
    for kind, load in conftest.LOADED.items():
        kind.__init__ = conftest.load_once(load)
    while job := pipe.recv():
        code = call(*job)
        pipe.send((code, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def call_once(script: str, argv: list[str], work: Path) -> None:
    """Be a process that runs one script."""
    prepare()
    sys.exit(call(script, argv, work))


class Worker:
    """A process that runs scripts and is started anew when it dies."""

    def __init__(self, context: multiprocessing.context.BaseContext):
        self._context, self._process, self._is_busy = context, None, False

    def run(self, script: str, argv: list[str], work: Path) -> Result:
        """Run a script in a folder."""
        if self._process is None:
            self._pipe, theirs = self._context.Pipe()
            self._process = self._context.Process(target=serve_calls, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        started, peak = time.monotonic(), 0
        self._pipe.send((script, argv, work))
        self._is_busy = True
        try:
            code, peak = self._pipe.recv() if self._pipe.poll(HANG_S) else ("hang", 0)
        except (EOFError, ConnectionError):
            code = "crash"
        if isinstance(code, str):
            self.stop()
        self._is_busy = False
        seconds = time.monotonic() - started
        texts = [(work.parent / name).read_text(errors="replace") for name in ("stdout", "stderr")]
        if "Traceback (most recent call last)" in texts[1]:
            code = "traceback"
        return Result(code, *texts, seconds, peak)

    def stop(self) -> None:
        """End the process."""
        if self._process:
            if self._process.is_alive() and not self._is_busy:
                self._pipe.send(None)
                self._process.join(HANG_S)
            self._process.kill()
            self._process.join()
            self._process = None


# --- judging ---


def state(folder: Path, without: Path) -> dict[Path, tuple]:
    """Return what tells whether a file or folder below one was changed, but for those in `without`."""
    found = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(parent, name) != without]
        for name in (*folders, *names):
            status = Path(parent, name).lstat()
            is_file = name in names
            found[Path(parent, name)] = (status.st_mode, is_file and (status.st_mtime_ns, status.st_size))
    return found


def strays(folder: Path) -> list[Path]:
    """List the temporary files and locks that a run should have taken away."""
    return list(folder.rglob(".emotion*"))


def num_unaccounted(result: Result, case: Case) -> int:
    """Return how many inputs of a folder are neither in the JSON nor left out; all if it is no JSON."""
    if case.num_inputs == 1:
        return 0

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        files = {json.loads(line, parse_constant=refuse)["file"] for line in result.stdout.splitlines()}
    except ValueError:
        return case.num_inputs
    return max(0, case.num_inputs - len(files) - sum(left_out(result).values()))


def left_out(result: Result) -> Counter:
    """Return how many inputs of a folder were left out, by reason."""
    lines = re.findall("^left out: (.*)$", result.stderr, re.MULTILINE)
    return Counter(
        {
            reason: int(count)
            for line in lines
            for reason, count in re.findall(r"([^,]+(?:, see above)?) (\d+)(?:, |$)", line)
        }
    )


def equals(folder: Path, expected: Path) -> bool:
    """Return whether a folder has the tables of another, to the byte."""
    return all((folder / path.name).read_bytes() == path.read_bytes() for path in expected.glob("*.csv"))


MAKERS: dict[str, Callable[[random.Random, Path, Path], Case]] = {
    "photos": make_photos,
    "videos": make_videos,
    "tables": make_tables,
    "checkpoints": make_checkpoints,
    "exports": make_exports,
}
WRONG = ("traceback", "crash", "hang", "stray files", "changed outside", "unaccounted", "unequal")


def note(counts: Counter, what: str, number: int, folder: Path) -> None:
    """Count something wrong, and say where it is."""
    if number:
        counts[what] += number
        tqdm.write(f"{what}: {folder}", file=sys.stderr)


def try_kind(
    kind: str, count: int, seed: int, base: Path, context: multiprocessing.context.BaseContext
) -> Counter:
    """Run cases of a kind, each script's in a process of its own; return the counts."""
    workers = defaultdict(lambda: Worker(context))
    counts, size = Counter(dict.fromkeys(WRONG, 0)), BATCH.get(kind, 1)
    for number in tqdm(range(math.ceil(count / size)), kind, disable=None):
        rng = random.Random(f"{seed} {kind} {number}")
        folder = base / f"{kind}-{number}"
        work = folder / "work"
        (work / "out").mkdir(parents=True)
        for victim in (folder / "victim", folder / "victim.png", work / "victim"):
            victim.write_text("untouched")
        case = MAKERS[kind](rng, work, base / "seeds")
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        others = state(work, work / "out") | state(base, folder)
        result = workers[case.script].run(case.script, case.argv, work)
        after = state(work, work / "out") | state(base, folder)
        counts["inputs"] += case.num_inputs
        failed = left_out(result)["failed, see above"] if case.num_inputs > 1 else result.code == 1
        ended = {0: "exit 0", 1: "exit 1"}.get(result.code, result.code)
        is_wrong = ended not in ("exit 0", "exit 1")
        counts["exit 1"] += 0 if is_wrong else int(failed)
        counts["exit 0"] += 0 if is_wrong else case.num_inputs - int(failed)
        before = counts.total()
        note(counts, str(ended), int(is_wrong), folder)
        note(counts, "stray files", len(strays(folder)), folder)
        note(counts, "changed outside", len(others.items() ^ after.items()), folder)
        is_equal = not case.expected or result.code != 0 or equals(work / "out", case.expected)
        note(counts, "unequal", not is_equal, folder)
        note(counts, "unaccounted", num_unaccounted(result, case) if not is_wrong else 0, folder)
        if counts.total() == before:
            shutil.rmtree(folder)
        else:
            command = " ".join(map(str, (case.script, *case.argv)))
            (folder / "command").write_text(command)
        counts["peak MB"] = max(counts["peak MB"], result.peak >> 20)
        counts["slowest s"] = max(counts["slowest s"], round(result.seconds, 1))
    for worker in workers.values():
        worker.stop()
    return counts


# --- kills and full disks ---


def content(path: Path) -> object:
    """Return what a result holds, without times; fails if it is not whole."""
    if path.suffix == ".pt":
        return plain(torch.load(path, weights_only=True))
    if path.suffix in {".json", ".jsonl"}:
        return (
            [plain(json.loads(line)) for line in sorted(path.read_text().splitlines())]
            if path.suffix == ".jsonl"
            else plain(json.loads(path.read_text()))
        )
    if path.suffix in shared.picture_suffixes():
        return shared.open_picture(path).tobytes()
    if path.suffix == ".mp4":
        images, times, _ = test_detect_video.read_video(path)
        return [image.tobytes() for image in images], times
    return path.read_bytes()


def plain(value: object) -> object:
    """Return a value of JSON or a checkpoint such that equals compare equal, without times and speeds."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items() if key not in {"time", "images_per_s"}}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def results(folder: Path) -> dict[str, object]:
    """Return the content of each file that has its final name."""
    paths = [path for path in folder.rglob("*") if path.is_file() and ".incoming" not in path.parts]
    return {
        str(path.relative_to(folder)): content(path) for path in paths if not path.name.startswith(".emotion")
    }


def half_files(folder: Path) -> int:
    """Count files under a final name that are not whole; journals may end in half a line."""
    count = 0
    for path in folder.rglob("*"):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not is_hidden and path.name not in {"manifest.jsonl", "index.jsonl"}:
            try:
                content(path)
            except Exception:  # each reader has its own errors of a file that is not whole
                count += 1
    return count


def run_alone(
    context: multiprocessing.context.BaseContext, script: str, work: Path, kill_after: float | None
) -> tuple:
    """Run a script in a process of its own, kill it after a while if asked; return exit code and seconds."""
    argv = RUNS[script].replace("OUT", "out").split()
    if (work / "out" / "last.pt").exists():
        argv += ["--resume", "out/last.pt"]
    process = context.Process(target=call_once, args=(script, argv, work))
    started = time.monotonic()
    process.start()
    process.join(kill_after if kill_after is not None else HANG_S)
    process.kill()
    process.join()
    return process.exitcode, time.monotonic() - started


def copy_seeds(seeds: Path, work: Path) -> None:
    """Fill a folder with what RUNS read."""
    shutil.copytree(seeds, work, ignore=shutil.ignore_patterns("clips"), dirs_exist_ok=True)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[str], None]]:
    """Mount a disk while the block runs; give the function that sets its options, such as its size."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


def fill_disk(folder: Path, set_disk: Callable[[str], None], need: int, rng: random.Random) -> None:
    """Make a disk read-only, or leave room for some of the `need` bytes that a run writes."""
    used = (shutil.disk_usage(folder).used, rng.choice((0, rng.randrange(need))))
    set_disk(rng.choice(("ro", *[f"size={sum(used)}"] * 4)))


def try_faults(
    kind: str, count: int, seed: int, base: Path, context: multiprocessing.context.BaseContext
) -> Counter:
    """Kill each script `count` times, or fill its disk, and run it once more; return the counts."""
    wrong = ("half files", "stray files", "unequal", "not resumed", "traceback", "no line")
    counts, is_full = Counter(dict.fromkeys(wrong, 0)), kind == "disks"
    with serve(serve_pictures) as server:
        for script in tqdm(RUNS, "scripts", disable=None):
            urls = "".join(f"{CLASSES[i % 2]} {server.url(f'/photo?n={i}')}\n" for i in range(6))
            (base / "seeds" / "list.txt").write_text(urls)
            folder = base / f"{kind}-{script}"
            copy_seeds(base / "seeds", folder / "work")
            code, seconds = run_alone(context, script, folder / "work", None)
            assert code == 0, (folder / "stderr").read_text()
            expected = outputs(folder / "work")
            need = sum(path.stat().st_size + 4096 for path in (folder / "work").glob("out*/**/*"))
            shutil.rmtree(folder)
            for number in tqdm(range(count), script, disable=None, leave=False):
                folder = base / f"{kind}-{script}-{number}"
                work, rng = folder / "work", random.Random(f"{seed} {script} {number}")
                with small_disk(work) if is_full else contextlib.nullcontext() as set_disk:
                    copy_seeds(base / "seeds", work)
                    if is_full:
                        fill_disk(work, set_disk, need, rng)
                    kill_after = None if is_full else rng.uniform(0.1, 1) * seconds
                    code, _ = run_alone(context, script, work, kill_after)
                    before = counts.total()
                    if is_full:
                        told = re.findall("^error: ", (folder / "stderr").read_text(), re.MULTILINE)
                        note(counts, "no line", code != bool(told), folder)
                        note(counts, "stray files", len(strays(folder)), folder)
                        set_disk("rw,size=1g")
                    note(counts, "half files", sum(map(half_files, work.glob("out*"))), folder)
                    again, _ = run_alone(context, script, work, None)
                    note(counts, "not resumed", again != 0, folder)
                    note(counts, "traceback", "Traceback" in (folder / "stderr").read_text(), folder)
                    note(counts, "stray files", len(strays(folder)), folder)
                    note(counts, "unequal", outputs(work) != expected, folder)
                if counts.total() == before:
                    shutil.rmtree(folder)
                counts["inputs"] += 1
                counts[{0: "ended before", 1: "stopped"}.get(code, "killed")] += 1
    return counts


def outputs(work: Path) -> dict[str, object]:
    """Return the results of a run in a folder."""
    return {path.name: results(path) for path in work.glob("out*")}


# --- command line ---


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = (*MAKERS, "kills", "disks")
    parser.add_argument("--kind", nargs="+", choices=kinds, default=kinds, help="what to try (default: all)")
    parser.add_argument(
        "--count", type=int, default=100, help="inputs of each kind, a tenth as many faults of each script"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all changes")
    args = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="mutate-"))
    for name in ("tmp", "home"):
        (base / name).mkdir()
    cache = tempfile.TemporaryDirectory()  # goes with this process; all others use it
    closed = "http://127.0.0.1:9"  # no request leaves this machine
    os.environ |= {"XDG_CACHE_HOME": cache.name, "HOME": str(base / "home")}
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = str(ROOT / "tests")  # where the fork server looks for the next
    context.set_forkserver_preload(["mutate"])
    worker = Worker(context)
    make_seeds(base / "seeds", worker)
    worker.stop()
    os.environ |= {"http_proxy": closed, "https_proxy": closed, "no_proxy": ""}
    counts = {}
    for kind in args.kind:
        if kind in ("kills", "disks"):
            counts[kind] = try_faults(kind, math.ceil(args.count / 10), args.seed, base, context)
        else:
            counts[kind] = try_kind(kind, args.count, args.seed, base, context)
    if not list(base.glob("*-*")):
        shutil.rmtree(base)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
