import csv
import fnmatch
import itertools
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FIVE, ROOT, address_space_limit, file_size_limit, write_checkpoint
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageColor, ImageDraw
from test_detect_video import OUTPUTS, write_video
from tiny_resnet import ARCH

import detect_emotions
import model as shared
from detect_emotions import (
    COLORS,
    MARK,
    MIN_FONT_SIZE,
    NUM_PLACES,
    SPARE_COLORS,
    class_colors,
    draw_faces,
    fit_font,
    label_size,
    overlaps,
    place_labels,
    text_color,
)

SAMPLE = shared.DEFAULT_MODEL.with_name("sample.jpg")  # 960x960, four portraits
# Marked by hand in `portrait`; the face from hairline to chin.
ASTRONAUT = {"eyes": ((99.5, 94.5), (140.5, 97)), "face": (77.5, 75, 165, 166.5)}

# Machado, Oliveira and Fernandes 2009, table 1, severity 1, for linear RGB.
COLOR_BLINDNESS = {
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
}


@pytest.fixture
def portrait():
    """The sample's astronaut at half the size: one face, not square."""
    with Image.open(SAMPLE) as image:
        return image.resize((220, 240), box=(0, 0, 440, 480))


@pytest.fixture
def read(run):
    """Run the script with --json and return its records."""

    def read(*args):
        code, out, err = run("--json", *args)
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines()]

    return read


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


# --- many photos ---


def test_photos_in_threads_come_in_order_and_few_are_ahead_of_the_reader(
    tmp_path, finder, classifier, monkeypatch
):
    label_photo, is_ahead = detect_emotions.label_photo, threading.Event()

    def label_and_tell(path, *args):
        found = label_photo(path, *args)
        if path.stem == "1":
            is_ahead.set()
        return found

    monkeypatch.setattr(detect_emotions, "label_photo", label_and_tell)
    Image.new("RGB", (48, 48)).save(tmp_path / "0.png")
    for i in range(1, 12):
        shutil.copy(tmp_path / "0.png", tmp_path / f"{i}.png")
    kit = detect_emotions.Kit(finder, classifier, class_colors(classifier.classes))
    copies = [tmp_path / f"copy{i}.png" for i in range(12)]
    sources = [detect_emotions.Source(tmp_path / f"{i}.png", "photo", tmp_path) for i in range(12)]
    plan = {source: {"copy": copy} for source, copy in zip(sources, copies, strict=True)}
    for i, (source, _, label) in enumerate(detect_emotions.label_ahead(plan, kit, 3)):
        assert is_ahead.wait(60)  # labelled while the first photo is in hand
        assert (source, label()[0]["file"]) == (sources[i], str(sources[i].path))
        assert sum(copy.exists() for copy in copies) <= i + 1 + 3


def test_a_photo_that_is_large_waits_for_its_turn(tmp_path, monkeypatch, finder, classifier):
    monkeypatch.setattr(detect_emotions, "LARGE", 100 * 100)
    Image.new("RGB", (101, 100)).save(tmp_path / "large.png")
    source = detect_emotions.Source(tmp_path / "large.png", "photo", tmp_path)
    kit = detect_emotions.Kit(finder, classifier, {})
    [(_, outputs, label)] = detect_emotions.label_ahead({source: {"copy": tmp_path / "copy.png"}}, kit, 1)
    assert not outputs["copy"].exists()
    label()
    assert outputs["copy"].exists()


def test_outputs_do_not_depend_on_the_number_of_threads(run, monkeypatch, real_data, tmp_path):
    written = []
    for num_cores in (1, 4):
        monkeypatch.setattr(shared, "num_cores", lambda num_cores=num_cores: num_cores)
        out_dir = tmp_path / str(num_cores)
        code, out, _ = run(*sorted((real_data / "photos").glob("[ag]*")), "--out-dir", out_dir, "--csv", "-")
        assert code == 0
        written.append([out, {path.name: path.read_bytes() for path in out_dir.iterdir()}])
    assert len(written[0][1]) > 8
    assert written[0] == written[1]


# --- what it tells ---


def test_main_prints_a_line_for_each_face_from_left_to_right(run, tmp_path):
    code, out, err = run(SAMPLE, "--out-dir", tmp_path)
    assert (code, err) == (0, "")
    rows = [line.split("\t") for line in out.splitlines()]
    boxes = [[int(value) for value in row[1].split(",")] for row in rows]
    assert len(rows) == 4
    assert boxes == sorted(boxes)
    assert all(0 <= x0 < x1 <= 960 and 0 <= y0 < y1 <= 960 for x0, y0, x1, y1 in boxes)
    for name, _, emotion, prob in rows:
        assert name == str(SAMPLE)
        assert emotion in FIVE
        assert 0.2 <= float(prob) <= 1  # the largest of five


def test_json_finds_the_face_where_a_person_marked_it(read, portrait, tmp_path):
    portrait.save(tmp_path / "portrait.png")
    (record,) = read(tmp_path / "portrait.png")
    (face,) = record["faces"]
    box, marked = np.array([face["box"]]), np.array([ASTRONAUT["face"]])
    union = np.prod(box[:, 2:] - box[:, :2]) + np.prod(marked[:, 2:] - marked[:, :2]) - overlaps(box, marked)
    assert overlaps(box, marked) / union > 0.6  # the two include different amounts of forehead
    eyes = [face["landmarks"]["left_eye"], face["landmarks"]["right_eye"]]
    np.testing.assert_allclose(eyes, ASTRONAUT["eyes"], atol=3)


def test_json_describes_the_image_and_each_face(read, tmp_path):
    (record,) = read(SAMPLE, "--out-dir", tmp_path)
    assert {key: record[key] for key in ("file", "width", "height")} == {
        "file": str(SAMPLE),
        "width": 960,
        "height": 960,
    }
    for face in record["faces"]:
        assert set(face) == {"box", "face_prob", "landmarks", "emotion", "prob", "probs"}
        assert 0.9 <= face["face_prob"] <= 1
        assert tuple(face["probs"]) == FIVE
        assert sum(face["probs"].values()) == pytest.approx(1, abs=0.001)
        assert face["prob"] == face["probs"][face["emotion"]] == max(face["probs"].values())
        x0, y0, x1, y1 = face["box"]
        points = face["landmarks"]
        assert all(x0 < x < x1 and y0 < y < y1 for x, y in points.values())
        assert points["left_eye"][0] < points["nose"][0] < points["right_eye"][0]
        assert points["nose"][1] < min(points["mouth_left"][1], points["mouth_right"][1])


def test_csv_holds_what_json_tells(read, tmp_path):
    table = tmp_path / "new folder" / "faces.csv"
    (record,) = read(SAMPLE, "--out-dir", tmp_path, "--csv", table)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["face"] for row in rows] == ["1", "2", "3", "4"]
    for row, face in zip(rows, record["faces"], strict=True):
        told = {"file": record["file"], "emotion": face["emotion"]}
        told |= dict(zip(("x0", "y0", "x1", "y1"), face["box"], strict=True))
        told |= {"face_prob": face["face_prob"], "prob": face["prob"]}
        told |= dict.fromkeys(("frame", "time", "track"), "")  # of a photo there are none
        told |= {f"prob_{name}": prob for name, prob in face["probs"].items()}
        for name, (x, y) in face["landmarks"].items():
            told |= {f"{name}_x": x, f"{name}_y": y}
        assert {key: value for key, value in row.items() if key != "face"} == {
            key: str(value) for key, value in told.items()
        }


def test_photo_without_a_face_is_a_result(run, tmp_path):
    photo = tmp_path / "wall.png"
    Image.effect_noise((120, 90), 40).save(photo)
    code, out, err = run(photo, "--csv", tmp_path / "faces.csv")
    assert (code, out) == (0, "")
    assert err == f"{photo}: no face found\n"
    np.testing.assert_array_equal(pixels(tmp_path / "wall_emotions.png"), pixels(photo))
    header, *rows = (tmp_path / "faces.csv").read_text().splitlines()
    assert header.startswith("file,face,frame,time,track,x0,y0,x1,y1,face_prob,emotion,prob,prob_angry,")
    assert rows == []


def test_real_photo_without_a_face_has_none(read, real_data, tmp_path):
    (record,) = read(real_data / "photos" / "no-faces.jpg", "--out-dir", tmp_path)
    assert record["faces"] == []


def test_min_face_size_leaves_out_small_faces(read, portrait, tmp_path):
    photo = portrait.resize((440, 480))
    photo.paste(portrait.resize((66, 72)), (370, 400))
    photo.save(tmp_path / "photo.png")
    (with_small,) = read(tmp_path / "photo.png", "--min-face-size", 20)
    (without,) = read(tmp_path / "photo.png", "--min-face-size", 150)
    widths = [face["box"][2] - face["box"][0] for face in with_small["faces"]]
    assert widths == [pytest.approx(170, abs=15), pytest.approx(26, abs=5)]
    assert len(without["faces"]) == 1
    assert without["faces"][0]["box"] == pytest.approx(with_small["faces"][0]["box"], abs=15)


def test_min_face_prob_leaves_out_unsure_faces(read, tmp_path):
    options = ("--out-dir", tmp_path, "--min-face-size", 300)  # at this size the detector's certainty varies
    (record,) = read(SAMPLE, *options)
    probs = sorted(face["face_prob"] for face in record["faces"])
    threshold = (probs[0] + probs[1]) / 2
    assert probs[0] < threshold < probs[1]
    (record,) = read(SAMPLE, *options, "--min-face-prob", threshold)
    assert sorted(face["face_prob"] for face in record["faces"]) == probs[1:]


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--min-face-prob=1.5", "argument --min-face-prob: 1.5 is out of range, expected 0 to 1"),
        ("--min-face-size=0", "argument --min-face-size: 0 is neither 12 pixels or more nor a share below 1"),
        ("--device=abacus", "argument --device: "),
        ("--csv=faces.xlsx", "--csv cannot write faces.xlsx; name a file that ends in .csv or .parquet"),
        ("--report=page.pdf", "--report cannot write page.pdf; name a file that ends in .html or .htm"),
        ("--export=net.onnx", "--export writes all of --model and labels nothing; leave INPUT"),
        ("--csv=", "--csv= is empty"),
        ("", "an argument is empty"),
    ],
)
def test_options_that_cannot_be_are_one_line(run, option, reason):
    code, out, err = run(SAMPLE, option)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {reason}")
    assert err.endswith("; see --help\n")


def test_classes_come_from_the_checkpoint(read, portrait, tmp_path):
    classes = ("bored", "fearful", "happy", "neutral")
    network = shared.gray_resnet(ARCH, len(classes))
    torch.nn.init.zeros_(network.fc.weight)
    network.fc.bias.data = torch.tensor([3.0, 0, 0, 0])
    about = {"stage": "fer", "arch": ARCH, "classes": classes, "image_size": 64, "crop_margin": 0.2}
    checkpoint = {**about, "temperature": 1.0, "model": network.state_dict()}
    shared.save_checkpoint(tmp_path / "best.pt", checkpoint)
    portrait.save(tmp_path / "photo.png")
    (record,) = read(tmp_path / "photo.png", "--model", tmp_path / "best.pt", "--csv", tmp_path / "faces.csv")
    assert tuple(record["faces"][0]["probs"]) == classes
    assert record["faces"][0]["emotion"] == "bored"
    header = (tmp_path / "faces.csv").read_text().splitlines()[0]
    assert ",prob,prob_bored,prob_fearful,prob_happy,prob_neutral,left_eye_x," in header


# --- what it reads ---


def test_exif_orientation_is_honoured(read, portrait, tmp_path):
    how_stored = {  # the inverse of what the tag asks the reader to do
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    for orientation, method in how_stored.items():
        stored = portrait if method is None else portrait.transpose(method)
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / f"{orientation}.png", exif=exif)
    records = read(*(tmp_path / f"{orientation}.png" for orientation in how_stored))
    assert len(records[0]["faces"]) == 1
    for orientation, record in zip(how_stored, records, strict=True):
        assert record == {**records[0], "file": str(tmp_path / f"{orientation}.png")}
        copy = pixels(tmp_path / f"{orientation}_emotions.png")
        np.testing.assert_array_equal(copy, pixels(tmp_path / "1_emotions.png"))


def test_images_of_every_mode_are_read(read, portrait, tmp_path):
    gray = portrait.convert("L")
    alpha = Image.new("L", portrait.size, 255)
    ImageDraw.Draw(alpha).rectangle((0, 200, 220, 240), fill=0)
    transparent = portrait.copy()
    transparent.putalpha(alpha)
    transparent_gray = gray.copy()
    transparent_gray.putalpha(alpha)
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    photos = {
        "rgb.png": portrait,
        "rgba.png": transparent,
        "la.png": transparent_gray,
        "palette.png": transparent.quantize(256),
        "gray.jpg": gray,
        "deep.png": deep,
        "deep.tif": deep,
        "float.tiff": Image.fromarray(np.asarray(gray, np.float32) / 255),
        "cmyk.jpg": portrait.convert("CMYK"),
        "animated.gif": portrait.quantize(256),
        "photo.webp": portrait,
        "photo.bmp": portrait,
    }
    for name, image in photos.items():
        frames = {"save_all": True, "append_images": [Image.new("P", image.size)]} if "gif" in name else {}
        image.save(tmp_path / name, **frames)
    records = read("--out-dir", tmp_path / "out", *(tmp_path / name for name in photos))

    boxes = [record["faces"][0]["box"] for record in records]
    np.testing.assert_allclose(
        boxes, [np.median(boxes, 0)] * len(boxes), atol=4
    )  # colour and losses move it a little
    copies = {path.name for path in (tmp_path / "out").iterdir()}
    kept = {name.replace(".", "_emotions.") for name in photos if name != "animated.gif"}
    assert copies == kept | {"animated_emotions.png"}
    brightness = pixels(tmp_path / "rgb.png").mean()
    for name in ("deep_emotions.png", "deep_emotions.tif", "float_emotions.tiff", "cmyk_emotions.jpg"):
        assert pixels(tmp_path / "out" / name).mean() == pytest.approx(brightness, abs=8)
    for name in ("rgba", "la", "palette"):
        assert pixels(tmp_path / "out" / f"{name}_emotions.png")[235, 110].tolist() == [255, 255, 255]


def test_bad_files_do_not_lose_the_good_one(run, portrait, tmp_path):
    good, missing, text, cut, bomb = (
        tmp_path / name for name in ("good.jpg", "missing.jpg", "text.jpg", "cut.jpg", "bomb.png")
    )
    portrait.save(good)
    text.write_text("not a photo")
    cut.write_bytes(good.read_bytes()[:5000])
    portrait.save(bomb)
    header = b"IHDR" + struct.pack(">II", 50_000, 50_000) + bytes([8, 2, 0, 0, 0])
    png = bomb.read_bytes()
    bomb.write_bytes(png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:])

    code, out, err = run(missing, text, good, cut, bomb, "--csv", tmp_path / "faces.csv")
    assert code == 1
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(good)]
    for path, reason in {
        missing: "No such file",
        text: "not an image",
        cut: "truncated",
        bomb: "million pixels",
    }.items():
        assert any(line.startswith(f"error: {path} ") and reason in line for line in err.splitlines()), err
    assert len(err.splitlines()) == 4
    assert len((tmp_path / "faces.csv").read_text().splitlines()) == 2
    written = {path.name for path in tmp_path.iterdir()} - {"good.jpg", "text.jpg", "cut.jpg", "bomb.png"}
    assert written == {"good_emotions.jpg", "faces.csv", ".faces.csv.journal"}


# --- what it writes ---


def test_copy_differs_from_the_photo_only_at_the_faces(read, portrait, tmp_path):
    photo = tmp_path / "photo_emotions.png"
    portrait.save(photo)
    (record,) = read(photo)
    x0, y0, x1, y1 = record["faces"][0]["box"]
    changed = np.argwhere((pixels(tmp_path / "photo_emotions_emotions.png") != pixels(photo)).any(2))
    top, left = changed.min(0)
    bottom, right = changed.max(0)
    assert left == pytest.approx(x0, abs=1)
    assert x1 - 2 < right < x1 + 60  # the label may be wider than the box
    assert bottom == pytest.approx(y1 - 1, abs=1)
    assert y0 - 30 < top < y0 - 10  # the label stands on the box
    np.testing.assert_array_equal(pixels(photo), np.asarray(portrait))


def test_rgb_color_profile_is_kept_and_others_are_not(read, portrait, tmp_path):
    rgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    cmyk = rgb[:16] + b"CMYK" + rgb[20:]
    for suffix in ("jpg", "png", "webp", "tif"):
        portrait.save(tmp_path / f"rgb.{suffix}", icc_profile=rgb)
    portrait.convert("CMYK").save(tmp_path / "cmyk.jpg", icc_profile=cmyk)
    photos = sorted(tmp_path.iterdir())
    read("--out-dir", tmp_path / "out", *photos)
    profiles = {}
    for path in (tmp_path / "out").iterdir():
        with Image.open(path) as image:
            profiles[path.name] = image.info.get("icc_profile")
    assert profiles.pop("cmyk_emotions.jpg") is None
    assert len(profiles) == 4
    assert all(profile == rgb for profile in profiles.values())


def test_copies_never_overwrite_inputs(run, portrait, tmp_path):
    a, marked = tmp_path / "photo.png", tmp_path / "photo_emotions.png"
    for path in (a, marked):
        portrait.save(path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    for args, named in (
        ((a, marked), (a, marked)),
        ((a, "--out-dir", tmp_path / "out", "--csv", a), (a,)),
        ((a, "--out-dir", tmp_path / "out", "--csv", tmp_path / "out/photo_emotions.png"), ()),
    ):
        code, out, err = run(*args)
        assert (code, out, err.count("\n")) == (1, "", 0)
        assert err.startswith("error: ")
        assert all(str(path) in err for path in named)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_photo_named_twice_is_labelled_once(read, portrait, tmp_path):
    portrait.save(tmp_path / "photo.png")
    assert len(read(tmp_path / "photo.png", tmp_path / "photo.png")) == 1


def test_impossible_output_is_one_line(run, portrait, tmp_path):
    portrait.save(tmp_path / "photo.png")
    code, out, err = run(tmp_path / "photo.png", "--out-dir", tmp_path / "photo.png")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: cannot write {tmp_path / 'photo.png' / 'photo_emotions.png'}")
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_an_opencv_without_its_system_libraries_does_no_harm(start, portrait, tmp_path):
    """facenet-pytorch imports OpenCV where there is one; on a bare container that import fails."""
    portrait.save(tmp_path / "portrait.png")
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = start(detect_emotions.__file__, tmp_path / "portrait.png", env=environment)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert len(out.splitlines()) == 1


def test_a_reader_that_has_enough_is_no_error(start, tmp_path):
    process = start(detect_emotions.__file__, SAMPLE, "--out-dir", tmp_path)
    process.stdout.close()  # as `head -0` does
    assert process.stderr.read() == ""
    assert process.wait() == 1


def test_font_option_changes_the_label(run, portrait, tmp_path):
    portrait.save(tmp_path / "photo.png")
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSerif.ttf"
    assert run(tmp_path / "photo.png", "--out-dir", tmp_path / "1")[0] == 0
    assert run(tmp_path / "photo.png", "--out-dir", tmp_path / "2", "--font", font)[0] == 0
    assert (pixels(tmp_path / "1/photo_emotions.png") != pixels(tmp_path / "2/photo_emotions.png")).any()
    code, out, err = run(tmp_path / "photo.png", "--font", SAMPLE)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {SAMPLE} is not a font")


def test_letters_that_the_font_lacks_are_named_once_with_the_remedy(run, portrait, tmp_path):
    portrait.save(tmp_path / "photo.png")
    torch.manual_seed(0)
    classes = ("calm", "drôle", "快乐")
    model = write_checkpoint(tmp_path / "best.pt", shared.gray_resnet(ARCH, 3), classes, stage="emotion")
    code, _, err = run(tmp_path / "photo.png", "--model", model)
    assert code == 0
    assert err == "the labels' font lacks ô乐快; name one that has them by --font\n"
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    assert "lacks 乐快;" in run(tmp_path / "photo.png", "--model", model, "--font", font)[2]


# --- folders ---


@pytest.fixture
def small(portrait):
    """The portrait as small as its face is still found."""
    return portrait.resize((110, 120))


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def table_rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def labelled(out):
    return [Path(line.split("\t")[0]).name for line in out.splitlines()]


def test_files_of_a_folder_that_are_not_taken_are_counted_by_reason(run, small, tmp_path):
    (tmp_path / "deeper").mkdir()
    for name in ("a.png", "b.png", "deeper/c.png"):
        small.save(tmp_path / name)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:5000])
    (tmp_path / "notes.txt").touch()
    (tmp_path / "no suffix").touch()
    (tmp_path / "._a.png").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X")  # as macOS makes it on USB sticks
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    code, out, err = run(tmp_path)
    assert (code, labelled(out)) == (1, ["a.png", "b.png"])
    error, left_out = err.splitlines()
    assert error.startswith(f"error: {tmp_path / 'cut.png'} cannot be read")
    assert left_out == (
        "left out: subfolder (see --recursive) 1, side file of macOS 1, not a regular file 2, "
        "unknown suffix 2, failed, see above 1"
    )
    _, out, err = run(tmp_path)
    assert out == ""
    assert "made by this program 2" in err
    assert "finished before (--overwrite does it again) 2" in err


def test_pipes_devices_and_addresses_are_refused(run, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name in (tmp_path / "pipe.png", "/dev/zero", "https://example.org/a.jpg", "rtsp://10.0.0.1/stream"):
        code, out, err = run(SAMPLE, name, "--out-dir", tmp_path / "out")
        assert (code, out) == (1, "")
        kind = "a pipe or a device; save what it gives"
        if "://" in str(name):
            kind = "an address; name a file, or label a stream with --camera ADDRESS"
        assert err.startswith(f"error: {name} is {kind}")
    assert names(tmp_path) == ["pipe.png"]


def test_links_to_folders_are_not_followed_but_counted(run, small, tmp_path):
    (tmp_path / "deeper").mkdir()
    small.save(tmp_path / "deeper" / "a.png")
    (tmp_path / "deeper" / "loop").symlink_to(tmp_path)
    code, out, err = run(tmp_path, "--recursive")
    assert (code, labelled(out), err) == (0, ["a.png"], "left out: linked folder 1\n")


@pytest.fixture
def unreadable(tmp_path, monkeypatch):
    """A folder whose path is longer than the system takes, which not even root may read."""
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        for _ in range(17):
            Path("d" * 250).mkdir()
            os.chdir("d" * 250)
    parts = ["d" * 250] * math.ceil((4096 - len(str(tmp_path))) / 251)
    return tmp_path.joinpath(*parts)


@pytest.mark.parametrize("has_photo", [True, False])
def test_subfolder_that_cannot_be_read_is_named_and_the_rest_labelled(
    run, small, tmp_path, unreadable, has_photo
):
    if has_photo:
        small.save(tmp_path / "a.png")
    code, out, err = run(tmp_path, "--recursive")
    assert (code, labelled(out)) == (1, ["a.png"] * has_photo)
    error, left_out = err.splitlines()
    assert error == f"error: {unreadable} cannot be read: File name too long"
    assert left_out == "left out: failed, see above 1"


def test_folder_of_other_files_is_named_with_what_it_has(run, tmp_path):
    (tmp_path / "notes.txt").touch()
    code, out, err = run(tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith(
        f"error: {tmp_path} has no photos or videos (left out: unknown suffix 1); name files"
    )


def test_brackets_in_a_folders_name_are_no_pattern(run, small, tmp_path):
    folder = tmp_path / "hol[2019]"
    folder.mkdir()
    small.save(folder / "a.png")
    assert labelled(run(folder)[1]) == ["a.png"]
    assert labelled(run(folder / "*.png", "--overwrite")[1]) == ["a.png"]
    assert labelled(run(folder / "[ab].png", "--overwrite")[1]) == ["a.png"]
    _, _, err = run(folder / "missing.png")
    assert err == f"error: {folder / 'missing.png'} cannot be read: No such file or directory\n"


def test_names_that_are_no_utf8_or_act_on_a_terminal_reach_the_table(run, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (b"caf\xe9.png", "日本.png".encode(), b"a\tb\n\x1b[2J.png", b"=1+1.png", b"-x.png"):
        small.save(os.fsdecode(name))
    code, out, err = run("*.png", "--csv", "t.csv")
    assert (code, err) == (0, "")
    written = ["-x.png", "=1+1.png", r"a\tb\n\x1b[2J.png", r"caf\udce9.png", "日本.png"]
    assert [line.split("\t")[0] for line in out.splitlines()] == written
    assert [row["file"] for row in table_rows(Path("t.csv"))] == ["'-x.png", "'=1+1.png", *written[2:]]


def test_photo_that_needs_more_memory_than_there_is_does_not_stop_the_rest(run, small, tmp_path):
    small.save(tmp_path / "a.png")
    Image.new("1", (12_000, 12_000)).save(tmp_path / "b.png")  # 20 kB, 576 MB in memory
    small.save(tmp_path / "c.png")
    assert run(tmp_path / "a.png")[0] == 0  # so the networks are loaded
    with address_space_limit(300 * 2**20):
        code, out, err = run(tmp_path, "--overwrite")
    assert (code, labelled(out)) == (1, ["a.png", "c.png"])
    assert err.startswith(f"error: {tmp_path / 'b.png'} needs more memory than there is\nleft out: ")


# --- names and marks of outputs ---


COPIES = ("avif", "bmp", "jpg", "jp2", "png", "tif", "webp")


def test_folder_labelled_twice_does_not_take_its_own_copies(run, small, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    large = profile + np.random.default_rng(0).bytes(10**6)  # stands before the mark of a PNG
    for suffix in COPIES:
        small.save(tmp_path / f"{suffix}.{suffix}", icc_profile=large if suffix == "png" else profile)
    assert run(tmp_path)[0] == 0
    made = names(tmp_path)
    assert made == sorted(
        f"{name}.{name.split('_')[0]}" for each in COPIES for name in (each, f"{each}_emotions")
    )
    assert run(tmp_path)[:2] == (0, "")
    assert run(tmp_path, "--overwrite")[0] == 0
    assert run(*(tmp_path / name for name in made))[0] == 0  # as *.* of a shell
    assert names(tmp_path) == made


def test_own_file_with_the_name_of_a_copy_is_replaced_only_by_overwrite(run, small, tmp_path):
    photo, own = tmp_path / "x.png", tmp_path / "x_emotions.png"
    for path in (photo, own, tmp_path / "y.png"):
        small.save(path)
    before = own.read_bytes()
    for args, others in (([photo], []), ([tmp_path], ["y.png"]), ([photo, "--json"], [])):
        code, out, err = run(*args)
        assert (code, labelled(out)) == (1, others)
        assert err.startswith(
            f"error: {own} does not say that this program wrote it; --overwrite replaces it"
        )
    assert (names(tmp_path), own.read_bytes()) == (["x.png", own.name, "y.png", "y_emotions.png"], before)
    assert run(own, "--out-dir", tmp_path / "out")[0] == 0
    assert names(tmp_path / "out") == ["x_emotions_emotions.png"]
    code, out, err = run(tmp_path, "--overwrite")
    assert (code, labelled(out)) == (0, ["x.png", "y.png"])
    assert own.read_bytes() != before
    assert labelled(run(photo)[1]) == ["x.png"]  # the copy is marked now


def test_own_file_named_as_a_copy_is_an_input_of_its_folder(run, small, tmp_path):
    small.save(tmp_path / "mixed_emotions.png")
    assert labelled(run(tmp_path)[1]) == ["mixed_emotions.png"]
    assert run(tmp_path)[1] == ""
    assert names(tmp_path) == ["mixed_emotions.png", "mixed_emotions_emotions.png"]


def test_copy_of_a_video_of_a_whole_day_is_known_by_its_mark(tmp_path):
    """Before the mark stands the index of its frames, 1 MB for 20 minutes, and behind it what they show."""
    copy = tmp_path / "day_emotions.mp4"
    with copy.open("wb") as file:
        for place, text in ((4, "ftyp"), (72 * 10**6, MARK), (90 * 10**6, "end")):
            file.seek(place)
            file.write(text.encode())
    assert detect_emotions.is_own(copy)


def test_table_is_replaced_only_by_its_like_or_by_overwrite(run, small, tmp_path):
    photo, table = tmp_path / "x.png", tmp_path / "faces.csv"
    small.save(photo)
    table.write_text("name,phone\nAda,1\n")
    code, out, err = run(photo, "--csv", table)
    assert (code, out, table.read_text()) == (1, "", "name,phone\nAda,1\n")
    assert err.startswith(f"error: {table} does not say that this program wrote it; --overwrite replaces it")
    for options in (["--overwrite"], []):
        assert run(photo, "--csv", table, *options)[0] == 0
        assert [row["face"] for row in table_rows(table)] == ["1"]


@pytest.mark.parametrize("option", ["--csv", "--out-dir"])
def test_output_that_cannot_be_written_is_found_before_the_first_photo(run, small, tmp_path, option):
    small.save(tmp_path / "x.png")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere/else")
    places = {"file/below": "Not a directory", "link/below": "No such file or directory"}
    places |= {"folder": "Is a directory", "/dev/null": "Not a regular file"} if option == "--csv" else {}
    for place, reason in places.items():
        code, out, err = run(tmp_path / "x.png", option, tmp_path / place)
        path = tmp_path / place / ("" if option == "--csv" else "x_emotions.png")
        assert (code, out, err) == (1, "", f"error: cannot write {path}: {reason}")
    assert names(tmp_path) == ["file", "link", "x.png"]


@pytest.mark.parametrize(
    ("photos", "copies"),
    [
        (["a.gif", "a.png"], ["a.gif_emotions.png", "a.png_emotions.png"]),
        (["one/b.png", "two/b.png"], ["one_b.png_emotions.png", "two_b.png_emotions.png"]),
        (["one/x/b.png", "two/x/b.png"], ["one_x_b.png_emotions.png", "two_x_b.png_emotions.png"]),
        (["c.png", "C.png", "d.png"], ["C.png_*_emotions.png", "c.png_*_emotions.png", "d_emotions.png"]),
        (["e.PNG", "e.png"], ["e.PNG_*_emotions.PNG", "e.png_*_emotions.png"]),
        (["fé.png", "fe\u0301.png"], ["fe\u0301.png_*_emotions.png", "fé.png_*_emotions.png"]),
        (
            ["a/b.png", "b.png", "a_b.png.png"],
            ["a_b.png.png_*_emotions.png", "a_b.png_*_emotions.png", "b.png_emotions.png"],
        ),
    ],
)
def test_names_that_collide_are_told_apart_whatever_the_order(run, small, tmp_path, photos, copies):
    for name in photos:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        small.save(tmp_path / name)
    paths, found = [tmp_path / name for name in photos], []
    for out, inputs in (("out", paths), ("back", paths[::-1]), ("out", paths)):
        code, _, err = run(*inputs, "--out-dir", tmp_path / out)
        assert (code, err) == (0, "")
        found.append(names(tmp_path / out))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == len(photos)
    assert all(map(fnmatch.fnmatchcase, found[0], copies)), found[0]


def test_copy_carries_the_colour_profile_and_the_mark_and_nothing_private(run, small, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = exif[ExifTags.Base.Software] = "private"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSMapDatum] = "private"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.MakerNote] = b"private"
    options = {
        "exif": exif,
        "xmp": b"<x:xmpmeta>private</x:xmpmeta>",
        "comment": "private",
        "icc_profile": profile,
    }
    for suffix in ("avif", "jpg", "jp2", "png", "tif", "webp"):
        photo, copy = tmp_path / f"x.{suffix}", tmp_path / f"x_emotions.{suffix}"
        small.save(photo, **options)
        assert b"private" in photo.read_bytes()
        assert run(photo)[0] == 0
        assert b"private" not in copy.read_bytes()
        with Image.open(copy) as image:
            assert image.info.get("icc_profile") == (None if suffix == "jp2" else profile)
            kept = dict(image.getexif()).items()
            assert {value for tag, value in kept if tag > 0x0120 and isinstance(value, str)} <= {MARK}


def test_copy_of_a_video_carries_the_mark_and_nothing_private(run, small, tmp_path):
    clip = write_video(tmp_path / "clip.mp4", [small.resize((320, 180))] * 3, sound="aac")
    photo_app = {"movflags": "use_metadata_tags"}
    with av.open(str(clip)) as source, av.open(str(tmp_path / "x.mov"), "w", options=photo_app) as output:
        output.metadata.update({"com.apple.quicktime.location.ISO6709": "private", "comment": "private"})
        streams = [output.add_stream_from_template(stream) for stream in source.streams]
        for stream in streams:
            stream.metadata["handler_name"] = "private"
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                output.mux(packet)
    assert (tmp_path / "x.mov").read_bytes().count(b"private") == 4
    assert run(tmp_path / "x.mov")[0] == 0
    copy = (tmp_path / "x_emotions.mp4").read_bytes()
    assert (copy.count(b"private"), copy.count(MARK.encode())) == (0, 1)


@pytest.mark.slow
def test_killed_run_leaves_nothing_half_and_the_next_one_clears_up(run, start, small, tmp_path):
    write_video(tmp_path / "clip.mp4", [small.resize((320, 180))] * 5)
    small.save(tmp_path / "x.png")
    stop = Path(__file__).with_name("stop_at.py")
    for name in ("x_emotions.png", "clip_emotions_timeline.png"):  # a photo does not wait for a video
        process = start(stop, "SIGKILL", 1, name, detect_emotions.__file__, tmp_path)
        assert process.wait() == -signal.SIGKILL
        assert any(path.suffix == ".tmp" for path in tmp_path.iterdir())
        assert not (tmp_path / name).exists()
    assert run(tmp_path)[0] == 0
    assert names(tmp_path) == ["clip.mp4", *sorted(OUTPUTS), "x.png", "x_emotions.png"]


@pytest.mark.slow
def test_two_runs_over_one_folder_both_end_whole(run, start, small, tmp_path):
    write_video(tmp_path / "clip.mp4", [small.resize((320, 180))] * 5)
    small.save(tmp_path / "x.png")
    stop = Path(__file__).with_name("stop_at.py")
    first = start(stop, "SIGSTOP", 1, "clip_emotions.mp4", detect_emotions.__file__, tmp_path)
    os.waitid(os.P_PID, first.pid, os.WSTOPPED)  # with all outputs of the video in the making
    assert run(tmp_path)[0] == 0
    made = {name: (tmp_path / name).read_bytes() for name in names(tmp_path) if not name.endswith(".tmp")}
    first.send_signal(signal.SIGCONT)
    assert (first.communicate()[1], first.returncode) == ("", 0)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == made


def test_table_of_videos_has_their_faces_frame_by_frame(run, small, tmp_path):
    clip = Image.new("RGB", (320, 180))
    clip.paste(small)
    write_video(tmp_path / "clip.mp4", [clip] * 3)
    table = tmp_path / "out" / "t.csv"
    assert run(tmp_path, "--out-dir", table.parent, "--csv", table)[0] == 0
    rows = table_rows(table)
    assert [(row["face"], row["frame"], row["track"]) for row in rows] == [
        ("1", str(i), "1") for i in range(3)
    ]
    for row, of_video in zip(rows, table_rows(table.parent / "clip_emotions.csv"), strict=True):
        assert row == {**of_video, "file": str(tmp_path / "clip.mp4")}
    small.save(tmp_path / "a.png")
    assert run(tmp_path, "--out-dir", table.parent, "--csv", table)[0] == 0
    photo, *others = table_rows(table)
    assert (photo["file"], photo["face"], photo["frame"]) == (str(tmp_path / "a.png"), "1", "")
    assert others == rows


# --- what is not to reach the reader ---


def write_model(path, classes, scale=1.0):
    """Write a tiny model that always says the first of its classes, its inner values times `scale`."""
    network = shared.gray_resnet(ARCH, len(classes))
    torch.nn.init.constant_(network.bn1.weight, scale)
    torch.nn.init.constant_(network.fc.weight, scale)
    network.fc.bias.data = torch.tensor([3.0, *[0.0] * (len(classes) - 1)])
    about = {"stage": "fer", "arch": ARCH, "classes": classes, "image_size": 64, "crop_margin": 0.0}
    shared.save_checkpoint(path, {**about, "temperature": 1.0, "model": network.state_dict()})
    return path


def test_classes_that_look_like_formulas_are_text_in_tables_and_control_characters_are_refused(
    run, small, tmp_path
):
    small.save(tmp_path / "x.png")
    write_video(tmp_path / "clip.mp4", [small.resize((320, 180))] * 3)
    model, table = write_model(tmp_path / "best.pt", ("=1+1", "happy")), tmp_path / "t.csv"
    code, out, _ = run(tmp_path, "--model", model, "--csv", table)
    assert (code, [line.split("\t")[2] for line in out.splitlines()]) == (0, ["=1+1", "=1+1"])
    for path in (table, tmp_path / "clip_emotions.csv", tmp_path / "clip_emotions_tracks.csv"):
        assert {row["emotion"] for row in table_rows(path)} == {"'=1+1"}
    code, out, err = run(tmp_path, "--model", write_model(tmp_path / "bad.pt", ("a\x1b[2J\nb", "happy")))
    assert (code, out, err.isprintable()) == (1, "", True)


def test_model_that_gives_nan_is_an_error_not_a_label(run, small, tmp_path):
    small.save(tmp_path / "x.png")
    model = write_model(tmp_path / "best.pt", FIVE, scale=1e38)  # finite, what it computes is not
    for options in ([], ["--json"]):
        code, out, err = run(tmp_path / "x.png", "--model", model, *options)
        assert (code, out) == (1, "")
        assert (err.startswith("error: the model's weights are so large"), err.count("\n")) == (True, 1)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_full_stdout_ends_the_run_with_one_line(start, tmp_path, options):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        process = start(
            detect_emotions.__file__, SAMPLE, SAMPLE, "--out-dir", tmp_path, *options, stdout=full
        )
    assert process.stderr.read() == "error: cannot write standard output: No space left on device\n"
    assert process.wait() == 1


@pytest.mark.parametrize("suffix", [".jpg", ".bmp", ".tif", ".jp2", ".png"])
def test_a_full_disk_is_an_error_and_leaves_the_earlier_copy(run, tmp_path, suffix):
    path, copy = tmp_path / f"x{suffix}", tmp_path / f"x_emotions{suffix}"
    Image.effect_noise((300, 300), 50).convert("RGB").save(path)
    copy.write_bytes(b"earlier")
    with file_size_limit(8192):
        code, out, err = run(path, "--overwrite")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == f"error: cannot write {copy}: File too large"
    assert names(tmp_path) == [path.name, copy.name]
    assert copy.read_bytes() == b"earlier"


def test_table_on_a_full_disk_ends_the_run_with_one_line(run, small, tmp_path):
    small.save(tmp_path / "x.png")
    with file_size_limit(100):
        code, out, err = run(tmp_path / "x.png", "--csv", tmp_path / "t.csv")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == f"error: cannot write {tmp_path / '.t.csv.journal'}: File too large"
    assert names(tmp_path) == ["x.png"]


def test_version_names_what_labels_without_loading_it(start):
    code = "import sys, detect_emotions\n"
    code += "try: detect_emotions.main(['--version'])\nfinally: print('torch' in sys.modules)"
    out, err = start("-c", code).communicate()
    torch_version, openvino, model, is_loaded = out.splitlines()[-4:]  # before them, in a clone, the commit
    assert (torch_version[:7], is_loaded, err) == ("torch 2", "False", "")
    assert openvino.startswith("openvino 20")
    assert model == f"{shared.DEFAULT_MODEL.name} sha256:{shared.file_digest(shared.DEFAULT_MODEL)}"


# --- labels ---


def crowd(rng, num_faces, image_size):
    """Random boxes (N, 4) inside an image, their fonts, and the sizes of two wordings for each."""
    short = min(image_size)
    sides = rng.integers(max(8, short // 40), max(9, short // 3), num_faces)
    left_top = rng.uniform(0, np.array(image_size) - sides[:, None])
    boxes = np.hstack([left_top, left_top + sides[:, None]]).round()
    words = rng.choice(FIVE, num_faces)
    fonts = [fit_font(None, word, box, image_size) for word, box in zip(words, boxes, strict=True)]
    pairs = zip(words, fonts, strict=True)
    sizes = [(label_size(f"{word} 97%", font), label_size(word, font)) for word, font in pairs]
    return boxes, words, fonts, sizes


@pytest.mark.parametrize("image_size", [(24, 24), (60, 40), (40, 600), (640, 480), (8000, 6000)])
def test_labels_stay_inside_the_image(image_size):
    rng = np.random.default_rng(sum(image_size))
    for num_faces in (1, 2, 5, 30):
        boxes, _, _, sizes = crowd(rng, num_faces, image_size)
        chosen, labels = place_labels(boxes, sizes, image_size)
        assert labels.min() >= 0
        assert (labels[:, 2:] <= image_size).all()
        chosen_sizes = [size[i // NUM_PLACES] for size, i in zip(sizes, chosen, strict=True)]
        np.testing.assert_array_equal(labels[:, 2:] - labels[:, :2], chosen_sizes)


def test_place_labels_without_faces_gives_empty_arrays():
    chosen, labels = place_labels(np.empty((0, 4)), [], (640, 480))
    assert chosen.shape == (0,)
    assert labels.shape == (0, 4)


@pytest.mark.parametrize(
    ("box", "label"),
    [
        ((100, 100, 160, 180), (100, 80, 190, 100)),  # above, flush left
        ((500, 100, 560, 180), (470, 80, 560, 100)),  # flush right at the right edge
        ((100, 10, 160, 90), (100, 90, 190, 110)),  # below where the top edge is near
        ((100, 0, 160, 400), (100, 0, 190, 20)),  # inside where there is neither
    ],
)
def test_label_goes_above_its_box_else_below_else_inside(box, label):
    chosen, labels = place_labels(np.array([box]), [[(90, 20), (90, 20)]], (560, 400))
    assert chosen < NUM_PLACES  # the preferred wording
    np.testing.assert_array_equal(labels, [label])


def test_label_avoids_a_face_above():
    boxes = np.array([(100, 100, 160, 180), (100, 200, 160, 280)])
    _, labels = place_labels(boxes, [[(90, 30), (60, 30)]] * 2, (600, 400))
    assert overlaps(labels, boxes).sum() == 0
    assert overlaps(labels, labels).sum() == 2 * 90 * 30  # each only with itself


def test_labels_of_a_dense_row_drop_their_percentage_rather_than_overlap():
    boxes = np.array([(x, 30, x + 38, 70) for x in range(0, 400, 40)])
    wide_apart = np.array([(x, 30, x + 38, 70) for x in range(0, 4000, 400)])
    sizes = [[(78, 16), (40, 16)]] * 10
    chosen, labels = place_labels(boxes, sizes, (400, 100))
    areas = np.prod(labels[:, 2:] - labels[:, :2], axis=1)
    assert (chosen >= NUM_PLACES).any()
    assert overlaps(labels, labels).sum() == areas.sum()
    assert overlaps(labels, boxes).sum() == 0
    assert (place_labels(wide_apart, sizes, (4000, 100))[0] < NUM_PLACES).all()


def test_labels_hide_less_than_labels_that_all_stand_above_their_box():
    rng = np.random.default_rng(0)
    for _ in range(5):
        boxes, _, _, sizes = crowd(rng, 30, (1024, 768))
        _, labels = place_labels(boxes, sizes, (1024, 768))
        size = np.array([size[0] for size in sizes])
        start = (boxes[:, :2] - size * (0, 1)).clip(0, np.array((1024, 768)) - size)
        above = np.hstack([start, start + size])

        def hidden(labels, boxes=boxes):
            return np.triu(overlaps(labels, labels), 1).sum() + overlaps(labels, boxes).sum()

        assert hidden(labels) < 0.7 * hidden(above)


def test_labels_of_a_real_group_do_not_overlap(read, real_data, tmp_path):
    (record,) = read(real_data / "photos" / "18f_roth-selfie.jpg", "--out-dir", tmp_path)
    faces = record["faces"]
    assert len(faces) >= 34
    size = (record["width"], record["height"])
    boxes = np.array([face["box"] for face in faces]).round()
    fonts = [fit_font(None, "disgusted", box, size) for box in boxes]
    sizes = [[label_size(text, font) for text in ("disgusted 100%", "disgusted")] for font in fonts]
    _, labels = place_labels(boxes, sizes, size)  # the longest words, so the hardest case
    shared = np.triu(overlaps(labels, labels), 1).sum()
    assert shared < 0.02 * np.prod(labels[:, 2:] - labels[:, :2], axis=1).sum()
    others = overlaps(labels, boxes)
    np.fill_diagonal(others, 0)
    assert others.sum() < 0.05 * np.prod(boxes[:, 2:] - boxes[:, :2], axis=1).sum()


@pytest.mark.parametrize("image_size", [(60, 80), (320, 240), (1024, 768), (8000, 6000)])
def test_font_is_readable_and_fits_the_image(image_size):
    rng = np.random.default_rng(1)
    _, words, fonts, _ = crowd(rng, 40, image_size)
    for word, font in zip(words, fonts, strict=True):
        assert (np.array(label_size(word, font)) <= image_size).all()
        one_larger = label_size(word, font.font_variant(size=font.size + 1))
        assert font.size >= MIN_FONT_SIZE or one_larger[0] > image_size[0]
    assert MIN_FONT_SIZE >= 10


def test_font_and_line_grow_with_the_image(portrait):
    face = {"box": (150, 115, 325, 325), "emotion": "happy", "prob": 0.97}
    colors = class_colors(FIVE)
    marked_parts = []
    for scale in (1, 10):
        image = portrait.resize((440 * scale, 480 * scale))
        box = tuple(value * scale for value in face["box"])
        marked = draw_faces(image, [{**face, "box": box}], colors)
        marked_parts.append(np.mean(np.asarray(marked) == ImageColor.getrgb(COLORS["happy"])))
    assert marked_parts[1] == pytest.approx(marked_parts[0], rel=0.15)


def test_draw_faces_leaves_the_image_alone(portrait):
    before = portrait.copy()
    face = {"box": (-0.4, 0.0, 220.0, 240.0), "emotion": "sad", "prob": 0.5}
    marked = draw_faces(portrait, [face], class_colors(FIVE))
    assert ImageChops.difference(portrait, before).getbbox() is None
    for corner in ((0, 239), (219, 239), (219, 0)):  # the box is visible along the image's edges
        assert marked.getpixel(corner) == ImageColor.getrgb(COLORS["sad"])


# --- colours ---


def linear_rgb(color):
    values = np.array(ImageColor.getrgb(color)) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(linear):
    """CIELAB, white point D65."""
    to_xyz = np.array([(0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505)])
    ratios = to_xyz @ linear.clip(0, 1) / to_xyz.sum(1)
    x, y, z = np.where(ratios > (6 / 29) ** 3, np.cbrt(ratios), ratios * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", [None, *COLOR_BLINDNESS])
def test_emotions_have_colors_that_the_color_blind_can_tell_apart(vision):
    matrix = np.array(COLOR_BLINDNESS[vision]) if vision else np.eye(3)
    colors = COLORS | {color: color for color in SPARE_COLORS}
    seen = {name: lab(matrix @ linear_rgb(color)) for name, color in colors.items()}
    for pair in itertools.combinations(colors, 2):
        distance = np.linalg.norm(seen[pair[0]] - seen[pair[1]])
        # 2.3 is just noticeable side by side; here colours are far apart and around thin lines.
        assert distance > (24 if set(pair) <= set(shared.EMOTIONS) else 15), pair


def test_every_class_has_a_color_of_its_own():
    for classes in (
        shared.EMOTIONS,
        (*FIVE, "fearful", "neutral"),
        (*FIVE, "bored", "calm"),
        ("anger", "contempt", "disgust", "fear", "happiness", "neutral", "sadness", "surprise"),
        tuple(f"class {number}" for number in range(12)),
    ):
        colors = class_colors(classes)
        assert tuple(colors) == classes
        assert len(set(colors.values())) == len(classes)
    assert len(class_colors(range(20))) == 20  # more than there are colours


@pytest.mark.parametrize("color", [*COLORS.values(), *SPARE_COLORS])
def test_text_contrasts_with_its_label(color):
    def luminance(color):
        return linear_rgb(color) @ (0.2126, 0.7152, 0.0722)

    darker, lighter = sorted((luminance(color), luminance(text_color(color))))
    assert (lighter + 0.05) / (darker + 0.05) >= 4.5  # WCAG 2.1, level AA


# --- which emotions ---


@pytest.fixture
def calm_model(tmp_path):
    """A network of three classes that has not learned anything, and says two of them unless asked."""
    torch.manual_seed(0)
    net = shared.gray_resnet(ARCH, 3)
    net.fc.bias.data[1] = 5.0  # surely neutral
    path = write_checkpoint(tmp_path / "calm.pt", net, ("happy", "neutral", "sad"))
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | {"default_classes": ["happy", "sad"], "temperature_all": 2.0}, path)
    return path


def test_emotions_are_those_asked_for_and_their_probabilities_sum_to_1(
    run, calm_model, sample_photo, tmp_path
):
    def probs(*options):
        code, out, _ = run(sample_photo, "--model", calm_model, "--out-dir", tmp_path, "--json", *options)
        assert code == 0
        return [face["probs"] for face in json.loads(out)["faces"]]

    default, every, two = probs(), probs("--emotions", "all"), probs("--emotions", "neutral", "happy")
    assert {tuple(face) for face in default} == {("happy", "sad")}
    assert {tuple(face) for face in every} == {("happy", "neutral", "sad")}
    assert {tuple(face) for face in two} == {("happy", "neutral")}
    for face, pair in zip(every, two, strict=True):
        assert sum(face.values()) == pytest.approx(1, abs=1e-3)
        odds = face["neutral"] / face["happy"]  # at the temperature of all, as the other two are
        assert pair["neutral"] / pair["happy"] == pytest.approx(odds, rel=0.05)


@pytest.mark.parametrize(
    ("emotions", "message"),
    [
        (["happy", "bored"], "has not learned bored; expected some of happy, neutral, sad, or all"),
        (["happy"], "expected two or more of happy, neutral, sad"),
        (["happy", "sad", "PHOTO"], "is no emotion, of happy, neutral, sad; put INPUT before --emotions"),
    ],
)
def test_emotions_that_are_none_are_one_line(run, calm_model, sample_photo, emotions, message):
    emotions = [str(sample_photo) if name == "PHOTO" else name for name in emotions]
    code, out, err = run(sample_photo, "--model", calm_model, "--emotions", *emotions)
    assert (code, out) == (1, "")
    assert message in err
    assert "\n" not in err.strip()


def test_folder_that_is_called_like_an_emotion_does_no_harm(run, calm_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("happy", "all"):
        Path(name).mkdir()
    for emotions in (("happy", "sad"), ("all",)):
        assert run(SAMPLE, "--model", calm_model, "--out-dir", "out", "--emotions", *emotions)[0] == 0


def test_unsure_faces_are_called_so_everywhere(run, calm_model, sample_photo, tmp_path):
    options = ("--model", calm_model, "--out-dir", tmp_path, "--csv", tmp_path / "t.csv", "--overwrite")
    _, out, _ = run(sample_photo, *options, "--unsure", "1")
    assert {line.split("\t")[2] for line in out.splitlines()} == {"unsure"}
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["emotion"] for row in rows} == {"unsure"}
    assert all(float(row["prob"]) == max(float(row["prob_happy"]), float(row["prob_sad"])) for row in rows)


# --- from Python ---


def test_read_faces_gives_the_rows_of_the_table(run, classifier, sample_photo, tmp_path):
    run(sample_photo, "--csv", tmp_path / "t.csv", "--out-dir", tmp_path)
    expected = pd.read_csv(tmp_path / "t.csv")
    table = shared.read_faces(sample_photo, shared.FaceFinder("cpu"), classifier)
    assert list(table.columns) == list(expected.columns)
    numbers = [name for name in table.columns if name not in {"file", "emotion", "frame", "time", "track"}]
    assert np.array_equal(table[numbers].astype(float), expected[numbers].astype(float))
    assert table["emotion"].tolist() == expected["emotion"].tolist()


def test_all_emotions_are_chosen_by_one_word():
    classifier = shared.Classifier.load(shared.DEFAULT_MODEL, device="cpu", emotions="all")
    assert {"fearful", "neutral"} < set(classifier.classes)


def test_read_faces_in_two_threads_gives_what_one_thread_gives(finder, classifier, sample_photo):
    with Image.open(sample_photo) as montage:
        photos = [montage.crop((0, 0, 960, 960 - 40 * i)) for i in range(8)]

    def read(photo):
        return shared.read_faces(photo, finder, classifier)

    with ThreadPoolExecutor(2) as threads:
        for one, two in zip(map(read, photos), threads.map(read, photos), strict=True):
            pd.testing.assert_frame_equal(one, two)


NOTEBOOK = """
import logging, sys, warnings
import cv2, PIL.Image, torch

def state():
    root, filters = logging.getLogger(), list(map(str, warnings.filters))
    threads = torch.get_num_threads(), cv2.getNumThreads()
    return threads, filters, PIL.Image.MAX_IMAGE_PIXELS, root.level, root.handlers

before = state()
from model import Classifier, FaceFinder, read_faces
faces = read_faces(sys.argv[1], FaceFinder(min_face_size=20), Classifier.load(sys.argv[2]))
assert state() == before
print(len(faces))
"""


def test_a_notebook_stays_as_it_was_and_nothing_is_printed(start, finder, classifier, sample_photo):
    """The networks are compiled: converting them imports packages that add filters of warnings."""
    notebook = start("-c", NOTEBOOK, sample_photo, shared.DEFAULT_MODEL)
    assert notebook.communicate() == ("4\n", "")
    assert notebook.returncode == 0


def test_read_faces_takes_images_in_each_form(finder, classifier, sample_photo):
    image = shared.load_photo(sample_photo)
    pixels = np.asarray(image)
    forms = [
        image,
        pixels,
        pixels[:, :, ::-1] / 255.0,
        np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)]),
    ]
    tables = [
        shared.read_faces(form, finder, classifier, bgr=i == 2).drop(columns="file")
        for i, form in enumerate(forms)
    ]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0])
    gray = np.asarray(image.convert("L"))
    assert len(shared.read_faces([gray, gray[:, :, None]], finder, classifier)) == 2 * len(tables[0])
    found = shared.read_faces(sample_photo.parent.glob(sample_photo.name), finder, classifier)
    assert found["file"].tolist() == [str(sample_photo)] * len(tables[0])
    empty = shared.read_faces([np.zeros((100, 100), np.uint8), str(sample_photo)], finder, classifier)
    assert set(empty["file"]) == {str(sample_photo)}
    none = shared.read_faces(np.zeros((100, 100), np.uint8), finder, classifier)
    assert (len(none), list(none.columns)) == (0, list(empty.columns))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\), expected \(H, W\)"),
        (np.zeros((4, 4), np.int64), "int64, expected"),
        (np.full((4, 4), 7.0), "floats from 7 to 7"),
        (np.full((4, 4), np.nan), "floats from nan to nan"),
        (3, "got int, expected a path"),
    ],
)
def test_as_image_says_what_came_and_what_is_wanted(image, message):
    with pytest.raises(ValueError, match=message):
        shared.as_image(image)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A checkpoint of a tiny network with a margin and a temperature of its own."""
    torch.manual_seed(0)
    folder, classes = tmp_path_factory.mktemp("small"), ["angry", "happy", "sad"]
    net = shared.gray_resnet(ARCH, len(classes))
    return write_checkpoint(folder / "best.pt", net, classes, crop_margin=0.1, temperature=0.5)


@pytest.mark.parametrize("suffix", [pytest.param(".onnx", marks=pytest.mark.slow), ".xml"])
def test_an_exported_model_gives_the_probabilities_of_its_checkpoint(tmp_path, capsys, small_model, suffix):
    if suffix == ".onnx":
        pytest.importorskip("onnxscript", reason="no ONNX; pip install onnx onnxscript onnxruntime")
    path = tmp_path / "new" / f"small{suffix}"
    detect_emotions.main(["--model", str(small_model), "--export", str(path)])
    assert capsys.readouterr().out == f"wrote {path}\n"
    crops = [
        Image.fromarray(face) for face in np.random.default_rng(0).integers(0, 256, (3, 40, 40), np.uint8)
    ]
    own, exported = (shared.Classifier(model, "cpu") for model in (small_model, path))
    assert (own.classes, own.crop_margin, own.image_size) == (
        exported.classes,
        exported.crop_margin,
        exported.image_size,
    )
    # Both engines round to bfloat16 on CPUs that are fast at it, each where its graph has it.
    assert exported.predict_crops(crops) == pytest.approx(own.predict_crops(crops), abs=2e-3)
    with pytest.raises(ValueError, match="--device cpu"):
        shared.Classifier(path, "meta")
    detect_emotions.main(["--model", str(small_model), "--export", str(path)])  # in the place of its own
    path.write_bytes(b"a network of somebody")
    with pytest.raises(SystemExit, match="does not say that this program wrote it; --overwrite replaces it"):
        detect_emotions.main(["--model", str(small_model), "--export", str(path)])
    assert path.read_bytes() == b"a network of somebody"


def test_export_replaces_no_weights_of_another_program(tmp_path, small_model):
    export = ["--model", str(small_model), "--export", str(tmp_path / "small.xml")]
    weights = tmp_path / "small.bin"
    weights.write_bytes(b"weights of somebody")
    with pytest.raises(SystemExit, match=r"small\.bin does not say that this program wrote it; --overwrite"):
        detect_emotions.main(export)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"weights of somebody"]
    detect_emotions.main([*export, "--overwrite"])
    detect_emotions.main(export)  # in the place of its own
    assert weights.stat().st_size > 1000


@pytest.mark.slow
def test_the_example_without_torch_gives_the_probabilities_of_the_checkpoint(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="no ONNX; pip install onnx onnxscript onnxruntime")
    story = (ROOT / "resources" / "EXPERIMENTS.md").read_text(encoding="utf-8")
    [example] = re.findall(
        r"^```python\n(.*?)^```", story.partition("#### Without torch")[2], re.DOTALL | re.MULTILINE
    )
    monkeypatch.chdir(tmp_path)
    shared.export_network(shared.DEFAULT_MODEL, Path("runs/emotion.onnx"))
    crops = [
        Image.open(ROOT / "resources" / "sample.jpg").crop(box)
        for box in ((128, 620, 365, 910), (156, 119, 315, 324))
    ]
    for number, crop in enumerate(crops):
        crop.save(f"{number}.png")
    code = f"import sys\nsys.modules['torch'] = None\n{example}"
    command = [sys.executable, "-c", code, "0.png", "1.png"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    checkpoint = shared.load_checkpoint(shared.DEFAULT_MODEL)
    network = shared.load_network(checkpoint).eval()
    pixels = [
        np.asarray(crop.convert("L").convert("F").resize((96, 96), Image.Resampling.BILINEAR))
        for crop in crops
    ]
    faces = (torch.from_numpy(np.stack(pixels))[:, None] / 255 - shared.GRAY_MEAN) / shared.GRAY_STD
    with torch.inference_mode():
        probs = (network(faces) / checkpoint["temperature_all"]).softmax(1)
    for line, (prob, label) in zip(lines, zip(*probs.max(1), strict=True), strict=True):
        _, name, shown = line.split()
        assert name == checkpoint["classes"][label]
        assert float(shown) == pytest.approx(float(prob), abs=1.5e-4)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("other.onnx", b"\x08\x09", "not a network that this toolkit exported"),
        ("other.xml", b"<net/>", "not a network that this toolkit exported"),
    ],
)
def test_a_network_of_another_program_is_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=said):
        detect_emotions.main(
            [
                str(ROOT / "resources" / "sample.jpg"),
                "--out-dir",
                str(tmp_path),
                "--model",
                str(tmp_path / name),
            ]
        )


def test_an_exported_network_that_takes_something_else_is_refused(tmp_path, small_model):
    from openvino import Model, opset8, save_model

    faces = opset8.parameter([-1, 4])
    model = Model([opset8.relu(faces)], [faces])
    model.set_rt_info(json.dumps(shared.read_trained(small_model).notes), "emotion_detector")
    save_model(model, tmp_path / "other.xml")
    with pytest.raises(ValueError, match="not a network that this toolkit exported"):
        shared.Classifier(tmp_path / "other.xml", "cpu")


def test_an_export_on_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, small_model):
    with file_size_limit(1000), pytest.raises(SystemExit) as stop:
        detect_emotions.main(["--model", str(small_model), "--export", str(tmp_path / "a.xml")])
    assert stop.value.code == f"error: cannot write {tmp_path / 'a.xml'}: the disk may be full"
    assert not list(tmp_path.iterdir())


def test_export_wants_a_name_of_a_known_format(tmp_path, small_model):
    with pytest.raises(SystemExit, match=r"ends in \.onnx or \.xml"):
        detect_emotions.main(["--model", str(small_model), "--export", str(tmp_path / "a.tflite")])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_export_reports_nothing_to_openvino(tmp_path):
    code = (
        "import sys, model; from pathlib import Path; model.export_network(*map(Path, sys.argv[1:]))\n"
        "assert 'openvino' in sys.modules and sys.modules['openvino_telemetry'] is None"
    )
    command = [sys.executable, "-c", code, str(shared.DEFAULT_MODEL), str(tmp_path / "emotion.xml")]
    subprocess.run(command, check=True, cwd=ROOT)
