import io
import itertools
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FIVE, file_size_limit, make_faces, write_checkpoint
from PIL import Image
from tiny_resnet import ARCH, FEATURES, REAL_ARCHS

import finetune_emotion
import finetune_fer
import model as shared

# --- files ---


def test_replacing_gives_a_whole_file_or_what_was_there(tmp_path):
    path = tmp_path / "new folder" / "table.csv"
    with shared.replacing(path, sync=True) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == path.parent
        assert not path.exists()
    mode = path.stat().st_mode & 0o777
    (tmp_path / "plain").touch()
    assert mode == (tmp_path / "plain").stat().st_mode & 0o777  # not as private as a temporary file
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), shared.replacing(path) as temporary:
            temporary.write_text("half")
            raise error
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_replacing_puts_a_file_in_a_links_place_and_leaves_its_target_alone(tmp_path):
    target, link = tmp_path / "precious", tmp_path / "link"
    target.write_text("precious")
    link.symlink_to(target)
    with shared.replacing(link) as temporary:
        temporary.write_text("new")
    assert (target.read_text(), link.read_text(), link.is_symlink()) == ("precious", "new", False)


def test_replacing_names_what_it_cannot_write(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "a.json"
    with pytest.raises(OSError, match=re.escape(f"cannot write {path}: ")):
        shared.save_json(path, {})


# What a process does that stays in a block until its input ends, or it is killed.
STAY = """
import sys
from pathlib import Path
import model
with model.{block} as it:
    print(it or "in", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("block", ["only_run_in", "only_writer_of"])
def test_a_second_run_stops_and_names_the_first_and_a_killed_one_blocks_nobody(tmp_path, start, block):
    path, lock = tmp_path / "runs" / "fer", getattr(shared, block)
    first = start("-c", STAY.format(block=f"{block}(Path({str(path)!r}))"), stdin=subprocess.PIPE)
    assert first.stdout.readline() == "in\n"
    message = rf"{path} is in use by -c \(process {first.pid}\); wait for its end"
    with pytest.raises(BlockingIOError, match=message), lock(path):
        pytest.fail("two runs at once")
    first.kill()
    first.wait()
    with lock(path):
        pass
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_only_run_in_takes_a_folder_named_twice_and_leaves_none_that_stays_empty(tmp_path):
    with shared.only_run_in(tmp_path / "a" / "b", tmp_path / "a" / "c" / ".." / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with shared.only_run_in(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "result").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["result"]


def test_only_run_in_leaves_no_lock_on_a_full_disk(tmp_path):
    with file_size_limit(0), shared.only_run_in(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_only_run_in_follows_no_link(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".emotion.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=f"cannot write into {tmp_path}"), shared.only_run_in(tmp_path):
        pytest.fail("through a link")
    assert (tmp_path / "precious").read_text() == "precious"


def test_the_temporary_file_of_a_killed_run_is_removed_by_the_next_and_a_living_ones_is_not(tmp_path, start):
    path = tmp_path / "table.csv"
    (tmp_path / ".emotion-mine.tmp").touch()  # not named as this program names them
    first = start("-c", STAY.format(block=f"replacing(Path({str(path)!r}))"), stdin=subprocess.PIPE)
    temporary = Path(first.stdout.readline().strip())

    def save_in_a_process():
        other = start("-c", f"import model, pathlib; model.save_json(pathlib.Path({str(path)!r}), 1)")
        assert other.wait() == 0

    save_in_a_process()
    assert temporary.exists()
    first.kill()
    first.wait()
    save_in_a_process()
    assert {file.name for file in tmp_path.iterdir()} == {"table.csv", ".emotion-mine.tmp"}


def test_printable_is_one_line_without_side_effects():
    text = "a\x1b[2J\t\r\n\x85\u2028\u202e\udce9ü 😀\u200d"
    assert shared.printable(text) == r"a\x1b[2J\t\r\n\x85\u2028\u202e\udce9ü 😀" + "\u200d"


# --- pictures ---


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_open_picture_scales_16_bits_and_turns_upright(tmp_path, mode):
    steps = np.linspace(0, 65535, 60 * 40).reshape(40, 60).astype(np.uint16)
    Image.fromarray(steps).save(tmp_path / "deep.png")
    picture = shared.open_picture(tmp_path / "deep.png", mode)
    assert (picture.mode, picture.format) == (mode, "PNG")
    np.testing.assert_allclose(np.asarray(picture.convert("L"), float), steps / 257, atol=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    assert shared.open_picture(tmp_path / "turned.jpg", mode).size == (40, 60)


@pytest.mark.parametrize(
    ("content", "reason", "words"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unknown format", "convert it to JPEG or PNG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unknown format", "HEIC, which is not read; convert it"),
        (b"<html>", "unknown format", "not an image"),
        (None, "damaged", "No such file"),
    ],
)
def test_open_picture_names_what_it_does_not_read(tmp_path, content, reason, words):
    path = tmp_path / "photo.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(shared.PictureError, match=words) as error:
        shared.open_picture(path)
    assert error.value.reason == reason
    assert str(path) in str(error.value)


@pytest.mark.parametrize("tag", [0x0100, 0x011A, 0x0128])  # a width, a resolution and its unit, as text
def test_as_image_turns_an_open_picture_upright_whatever_else_its_exif_says(tmp_path, tag):
    entries = struct.pack("<HHHIHHHHI4s", 2, 0x0112, 3, 1, 6, 0, tag, 2, 4, b"abc\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + entries + bytes(4)
    picture = Image.radial_gradient("L").resize((60, 40), box=(0, 0, 200, 90)).convert("RGB")
    picture.save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as opened:
        upright = shared.as_image(opened)
        assert opened.info["exif"] == exif
        np.testing.assert_array_equal(np.asarray(opened.rotate(270, expand=True)), np.asarray(upright))
    assert upright.tobytes() == shared.as_image(tmp_path / "turned.jpg").tobytes()
    sound = Image.Exif()
    sound[0x0112] = 6
    picture.save(tmp_path / "turned.tif", exif=sound)  # the only format that keeps it elsewhere
    with Image.open(tmp_path / "turned.tif") as opened:
        assert shared.as_image(opened).size == (40, 60)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_open_picture_lays_what_is_half_transparent_on_white(tmp_path, mode):
    values, alphas = (Image.fromarray(part) for part in np.indices((256, 256)).astype(np.uint8))
    picture = Image.merge("LA", (values, alphas)).convert("RGBA")
    picture = picture.quantize(256) if mode == "P" else picture.convert(mode)
    picture.save(tmp_path / "photo.png")
    expected = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    assert shared.open_picture(tmp_path / "photo.png").tobytes() == expected.convert("RGB").tobytes()


def test_open_picture_refuses_more_pixels_than_it_may_before_it_decodes(tmp_path):
    Image.new("L", (300, 200)).save(tmp_path / "a.png")
    assert shared.open_picture(tmp_path / "a.png", max_pixels=60_000).size == (300, 200)
    with pytest.raises(shared.PictureError) as error:
        shared.open_picture(tmp_path / "a.png", max_pixels=59_999)
    assert error.value.reason == "too large"


# --- faces ---


def test_find_returns_empty_arrays_without_faces(finder):
    for size in ((300, 200), (19, 300), (1, 1)):
        faces = finder.find(Image.new("RGB", size, "gray"))
        assert [part.shape for part in faces] == [(0, 4), (0,), (0, 5, 2)]
        assert {part.dtype for part in faces} == {np.dtype(np.float32)}


def test_find_returns_the_surest_face_first_with_eyes_above_the_mouth(finder, sample_photo):
    with Image.open(sample_photo) as file:
        faces = finder.find(file.convert("RGB"))
    assert len(faces.boxes) == len(faces.probs) == len(faces.landmarks) == 4
    assert (np.diff(faces.probs) <= 0).all()
    assert faces.probs.min() >= 0.9
    for box, landmarks in zip(faces.boxes, faces.landmarks, strict=True):
        assert (landmarks[:2, 1] < landmarks[3:, 1]).all()
        assert (landmarks >= box[:2]).all()
        assert (landmarks <= box[2:]).all()


def test_find_obeys_its_thresholds(finder, sample_photo):
    with Image.open(sample_photo) as file:
        image = file.convert("RGB")
    probs = finder.find(image).probs
    middle = float(np.sort(probs)[1:3].mean())
    surer = shared.FaceFinder(min_face_size=20, min_prob=middle)
    assert len(surer.find(image).probs) == (probs >= middle).sum() < len(probs)
    assert len(shared.FaceFinder(min_face_size=900).find(image).probs) == 0


def test_crop_faces_cuts_squares_inside_the_image():
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 255, (90, 130, 3), np.uint8))
    corners = generator.uniform((-30, -30), (120, 80), (200, 2))
    boxes = np.hstack([corners, corners + generator.uniform(1, 100, (200, 2))])
    boxes = boxes[(boxes[:, 2] > 1) & (boxes[:, 3] > 1)]
    crops = shared.crop_faces(image, boxes, margin=0.2)
    assert len(crops) == len(boxes) > 100
    for box, crop in zip(boxes, crops, strict=True):
        longer = max(box[2] - box[0], box[3] - box[1])
        assert crop.width == crop.height == max(min(round(longer * 1.2), 90), 1)


def test_crop_faces_keeps_the_face_in_the_middle_where_there_is_room():
    image = Image.new("L", (100, 100))
    image.paste(255, (40, 50, 60, 80))
    [crop] = shared.crop_faces(image, np.array([[40, 50, 60, 80]], np.float32), margin=0.2)
    assert crop.size == (36, 36)
    assert crop.getbbox() == (8, 3, 28, 33)


def test_crop_faces_of_no_boxes_is_an_empty_list():
    assert shared.crop_faces(Image.new("L", (9, 9)), np.empty((0, 4), np.float32), 0.1) == []


def test_crop_faces_refuses_a_box_outside_the_image():
    with pytest.raises(ValueError, match="outside the 9x9 image"):
        shared.crop_faces(Image.new("L", (9, 9)), np.array([[20, 0, 30, 9]]), 0.1)


# --- network ---


@pytest.mark.parametrize("arch", REAL_ARCHS)
def test_gray_resnet_maps_images_to_logits_or_embeddings(arch):
    images = torch.zeros(2, 1, 64, 64)
    width = 2048 if arch.startswith("resnet50") else 512
    assert shared.gray_resnet(arch, 5).eval()(images).shape == (2, 5)
    assert shared.gray_resnet(arch, 0).eval()(images).shape == (2, width)


def test_freeze_except_keeps_the_rest_still_batchnorm_included():
    net = shared.gray_resnet(ARCH, 5)
    shared.freeze_except(net, ["layer4", "fc"])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = shared.build_optimizer(net, weight_decay=0.1)
    shared.train_mode(net)
    F.cross_entropy(net(torch.randn(4, 1, 64, 64)), torch.arange(4)).backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    changed = {name for name, value in net.state_dict().items() if not value.equal(before[name])}
    assert {name.split(".")[0] for name in changed} == {"layer4", "fc"}
    assert "layer4.0.bn1.running_mean" in changed


def test_freeze_except_names_the_parts_there_are():
    with pytest.raises(ValueError, match="no part 'layer9', expected some of: conv1, bn1"):
        shared.freeze_except(shared.gray_resnet(ARCH, 5), ["layer9"])


# --- data ---


def test_load_images_cuts_the_middle_square(tmp_path):
    image = Image.new("RGB", (60, 20))
    image.paste((255, 0, 0), (20, 0, 40, 20))
    image.save(tmp_path / "a.png")
    image.resize((120, 40)).save(tmp_path / "b.png")
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    assert shared.load_images(paths, "RGB", max_size=30)[0].shape == (2, 3, 30, 30)
    assert shared.load_images(paths, "RGB")[0].shape == (2, 3, 40, 40)  # as the larger one
    images, _ = shared.load_images(paths, "RGB", 20)
    assert images.shape == (2, 3, 20, 20)
    assert images.dtype == torch.uint8
    assert (images[0] == torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]).all()
    assert shared.load_images([tmp_path / "a.png"], "L", 10)[0].shape == (1, 1, 10, 10)


def test_load_images_names_and_leaves_out_a_few_that_are_not_readable(tmp_path, capsys):
    paths = [tmp_path / f"{i}.png" for i in range(100)]
    for i, path in enumerate(paths):
        Image.new("L", (9, 9), i).save(path)
    paths[0].write_text("<html>")
    images, kept = shared.load_images(paths, "L")
    assert kept == paths[1:]
    assert images[:, 0, 0, 0].tolist() == list(range(1, 100))
    *names, count = capsys.readouterr().err.splitlines()
    assert names == [f"left out: {paths[0]} is not an image that Pillow can read; convert it to JPEG or PNG"]
    assert count == "1 of 100 images are not readable and left out"
    paths[1].write_text("<html>")
    with pytest.raises(ValueError, match=f"2 of 100 images .*remove or replace them: {paths[0]}"):
        shared.load_images(paths, "L")


def test_load_images_sees_what_detection_sees(tmp_path):
    """16 bits are scaled, EXIF is obeyed, palettes and transparency are white where nothing is."""
    deep = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray((deep // 257).astype(np.uint8)).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    clear.quantize().save(tmp_path / "palette.png")
    paths = [tmp_path / name for name in ("deep.png", "turned.jpg", "clear.png", "palette.png")]
    images, _ = shared.load_images(paths, "L", 64)
    for path, image in zip(paths, images[:, 0].numpy(), strict=True):
        np.testing.assert_allclose(image, np.asarray(shared.open_picture(path, "L")), atol=1)
    means = images.float().mean((1, 2, 3))
    assert means[:2].sub(127.5).abs().max() < 2
    assert means[2:].tolist() == [255, 255]
    assert images[1, 0, :, 0].float().mean() > images[1, 0, :, -1].float().mean()  # it was dark above


def test_split_batches_leaves_no_batch_of_one():
    assert [len(part) for part in shared.split_batches(torch.arange(9), 4)] == [4, 5]
    assert [len(part) for part in shared.split_batches(torch.arange(10), 4)] == [4, 4, 2]
    assert [len(part) for part in shared.split_batches(torch.arange(1), 4)] == [1]


def test_load_faces_labels_by_folder_and_limits_evenly(fer_dir):
    images, labels, _ = shared.load_faces(fer_dir, "train", FIVE, limit=20)
    assert images.shape == (20, 1, 48, 48)
    assert torch.bincount(labels).tolist() == [4] * 5
    for image, label in zip(images, labels, strict=True):
        assert image[0].float().mean(1).reshape(-1, 3).mean(1)[:15].reshape(5, 3).mean(1).argmax() == label


def test_a_folder_without_splits_is_divided_by_content(tmp_path):
    make_faces(tmp_path / "flat", 60, ("angry", "happy"))
    parts = [shared.list_split(tmp_path / "flat", split, ("angry", "happy")) for split in shared.SPLITS]
    assert sum(map(len, parts)) == len({path for part in parts for path in part}) == 120
    assert all(4 <= len(part) <= 24 for part in parts[1:])
    shutil.copytree(tmp_path / "flat", tmp_path / "copy" / "train")  # with train alone only val is made
    renamed = next(iter(parts[1]))
    (tmp_path / "copy" / "train" / "angry" / renamed.name).rename(
        tmp_path / "copy" / "train" / "angry" / "x.png"
    )
    val = {path.name for path in shared.list_split(tmp_path / "copy", "val", ("angry", "happy"))}
    assert val == {path.name for path in parts[1]} - {renamed.name} | {"x.png"}
    assert not shared.list_split(tmp_path / "copy", "test", ("angry", "happy"))


def add_class(name):
    return lambda folder: make_faces(folder, 3, (name,))


def keep_one_picture(folder):
    for path in folder.glob("bored/*"):
        path.rename(folder / "bored" / "0.png")


def copy_one_picture(folder):
    for path in folder.glob("*/*"):
        path.write_bytes((folder / "calm" / "00000.png").read_bytes())


@pytest.mark.parametrize("script", [finetune_fer, finetune_emotion])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "empty").mkdir(), "no images in FOLDER/empty; put some there"),
        (lambda folder: shutil.rmtree(folder / "calm"), "FOLDER has 1 emotion folders, expected 2 or more"),
        (add_class("Bored"), "two classes of one name, Bored and bored; rename one"),
        (keep_one_picture, "FOLDER/bored has 1 image, expected 2 or more: one to learn from, one to judge"),
        (copy_one_picture, "all 3 images in FOLDER/bored are one picture; add different ones"),
    ],
)
def test_data_of_no_use_is_one_line_before_weights_are_loaded_or_folders_made(
    tmp_path, script, spoil, message
):
    mine = make_faces(tmp_path / "mine", 3, ("bored", "calm"))
    (mine / ".hidden").mkdir()  # no class
    spoil(mine)
    options = ["--data-dir", mine, "--init", tmp_path / "none.pt", "--out-dir", tmp_path / "run"]
    with pytest.raises(SystemExit) as stop:
        script.main([str(option) for option in options])
    assert stop.value.code.startswith(f"error: {message.replace('FOLDER', str(mine))}")
    assert "\n" not in stop.value.code
    assert list(tmp_path.iterdir()) == [mine]


def test_load_faces_names_a_split_without_faces(fer_dir):
    with pytest.raises(ValueError, match="has no val faces of fearful"):
        shared.load_faces(fer_dir, "val", ("fearful", "neutral"))


def test_warp_without_freedom_only_mirrors():
    images = torch.rand(32, 1, 24, 24)
    warped = shared.warp(images, 24, torch.Generator().manual_seed(0), degrees=0, shift=0, zoom=(1, 1))
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(warped, images, strict=True)]
    mirrored = [torch.allclose(a, b.flip(-1), atol=1e-5) for a, b in zip(warped, images, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 8 < sum(same) < 24


def test_warp_stays_within_its_ranges():
    images = torch.zeros(200, 1, 101, 101)
    images[:, :, 48:53, 48:53] = 1  # a dot in the middle: where it lands is the shift
    warped = shared.warp(
        images, 101, torch.Generator().manual_seed(0), degrees=30, shift=0.1, zoom=(0.8, 1.2)
    )
    pixels = torch.linspace(-0.5, 0.5, 101)
    mass = warped.sum((1, 2, 3))
    across = (warped.sum((1, 2)) * pixels).sum(1) / mass
    assert across.abs().max() < 0.1 * 1.42 / 0.8 + 0.01  # both axes' shifts, turned, seen in the nearest zoom
    assert across.abs().max() > 0.08
    assert 0.6 < mass.min() / 25 < 0.8  # the dot's area goes with the zoom squared, 0.64 to 1.44
    assert 1.2 < mass.max() / 25 < 1.5


def test_augment_faces_varies_but_keeps_type_and_range():
    faces = torch.randint(0, 256, (64, 1, 48, 48), dtype=torch.uint8)
    first = shared.augment_faces(faces, 64, torch.Generator().manual_seed(1))
    again = shared.augment_faces(faces, 64, torch.Generator().manual_seed(1))
    other = shared.augment_faces(faces, 64, torch.Generator().manual_seed(2))
    assert first.shape == (64, 1, 64, 64)
    assert first.dtype == torch.float32
    assert first.equal(again)
    assert not first.equal(other)
    low, high = (0 - shared.GRAY_MEAN) / shared.GRAY_STD, (1 - shared.GRAY_MEAN) / shared.GRAY_STD
    assert low - 1e-5 <= first.min() < first.max() <= high + 1e-5


@pytest.mark.parametrize("quality", [15, 50, 90])
@pytest.mark.parametrize("size", [(48, 48), (50, 61)])  # the last is no multiple of JPEG's 8 pixels
def test_compress_shows_images_as_pillow_stores_and_reads_them(quality, size, sample_photo):
    gray = np.asarray(Image.open(sample_photo).convert("L").resize(size))
    stored = io.BytesIO()
    Image.fromarray(gray).save(stored, "JPEG", quality=quality)
    expected = torch.from_numpy(np.array(Image.open(stored))).float()
    images = torch.from_numpy(gray.copy()).float()[None, None].repeat(2, 1, 1, 1)
    compressed = shared.compress(images, torch.tensor([quality, 95.0]))
    error = (compressed[0, 0] - expected).abs().mean()  # where rounding goes the other way
    assert error < (expected - images[0]).abs().mean() / 6
    assert not compressed[1].equal(compressed[0])


def test_epoch_order_without_balance_is_a_permutation():
    labels = torch.tensor([0] * 90 + [1] * 10)
    order = shared.epoch_order(labels, 0.0, torch.Generator().manual_seed(0))
    assert order.sort().values.equal(torch.arange(100))
    assert not order.equal(torch.arange(100))


def test_epoch_order_balances_and_treats_a_class_evenly():
    labels = torch.tensor([0] * 900 + [1] * 100)
    for balance, rare in ((0.5, 250), (1.0, 500)):  # 100 ** .5 : 900 ** .5 = 1 : 3; 1 : 1
        order = shared.epoch_order(labels, balance, torch.Generator().manual_seed(0))
        assert len(order) == 1000
        assert abs((labels[order] == 1).sum() - rare) <= 10  # 1 % of the epoch
        draws = torch.bincount(order, minlength=1000)
        assert all(draws[labels == c].max() - draws[labels == c].min() <= 1 for c in (0, 1))


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16"])
def test_a_cpu_with_bfloat16_instructions_trains_in_it(monkeypatch, name):
    a, device = torch.ones(2, 2), torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True})
    with shared.autocast(device):
        assert (a @ a).dtype == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with shared.autocast(device):
        assert (a @ a).dtype == torch.float32


# --- judging ---


def test_mixup_blends_images_and_targets_by_the_same_share():
    """A black and a white face: how gray a blend is tells its share, and so must its target."""
    images = torch.stack([torch.zeros(1, 48, 48), torch.full((1, 48, 48), 255.0)]).byte()
    labels = torch.tensor([0, 1])
    batches = shared.FaceBatches(images, labels, 2, 64, torch.device("cpu"), targets=torch.eye(2), mixup=1.0)
    blended = [target for epoch in range(1, 9) for _, targets in batches.train(epoch) for target in targets]
    assert all(target.sum().item() == pytest.approx(1) for target in blended)
    assert any(0.1 < target[0] < 0.9 for target in blended)
    for epoch in range(1, 9):
        [(inputs, targets)] = batches.train(epoch)
        brighter = inputs.mean((1, 2, 3)).argmax()
        assert targets[:, 1].argmax() == brighter
    assert next(target for _, target in batches.eval()).equal(labels)


def test_reliability_counts_by_confidence():
    probs = torch.tensor([[0.9, 0.1], [0.95, 0.05], [0.4, 0.6]])
    counts, confidence, accuracy = shared.reliability(probs, torch.tensor([0, 1, 1]), bins=5)
    assert counts.tolist() == [0, 0, 0, 1, 2]
    torch.testing.assert_close(confidence, torch.tensor([0, 0, 0, 0.6, 0.925]))
    assert accuracy.tolist() == [0, 0, 0, 1, 0.5]
    expected = (1 * 0.4 + 2 * 0.425) / 3
    assert shared.calibration_error(probs, torch.tensor([0, 1, 1]), bins=5) == pytest.approx(expected)


def test_judge_agrees_with_hand_counts():
    labels = torch.tensor([0, 0, 0, 1])
    logits = torch.tensor([[2.0, 0], [2, 0], [0, 2], [0, 2]])
    figures = shared.judge(logits, labels, 1.0, ("angry", "happy"))
    assert (figures["n"], figures["recall"]) == (4, {"angry": pytest.approx(2 / 3), "happy": 1.0})
    assert figures["acc"] == pytest.approx(3 / 4)
    assert figures["mean_recall"] == pytest.approx((2 / 3 + 1) / 2)
    assert figures["ece"] == pytest.approx(abs(torch.tensor(2.0).sigmoid().item() - 3 / 4), abs=1e-6)
    assert figures["confusion"] == [[2, 1], [0, 1]]


def test_fit_temperature_finds_the_scale_that_was_put_in():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 5, generator=generator) * 2
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert shared.fit_temperature([(logits, labels)], 2.0) == pytest.approx(1, abs=0.05)
    assert shared.fit_temperature([(logits * 3, labels)], 2.0) == pytest.approx(3, abs=0.15)
    small = (logits[:500] * 3, labels[:500])  # counts as much as the large one
    assert 1.5 < shared.fit_temperature([(logits, labels), small], 2.0) < 2.8
    right, wrong = (shared.judge(logits * 3, labels, by, FIVE)["ece"] for by in (3.0, 1.0))
    assert right < 0.01 < wrong


def test_fit_temperature_falls_back_if_there_are_too_few_faces():
    logits, labels = torch.eye(5).repeat(20, 1), torch.arange(5).repeat(20)
    assert shared.fit_temperature([(logits, labels)], 1.7) == 1.7
    assert shared.fit_temperature([(logits, labels)] * 3, 1.7) == pytest.approx(0.5, abs=0.01)  # the bound


def test_among_keeps_the_chosen_classes_alone():
    logits = torch.arange(12.0).reshape(4, 3)
    kept, labels = shared.among(logits, torch.tensor([0, 1, 2, 0]), [2, 0])
    assert kept.tolist() == [[2, 0], [8, 6], [11, 9]]
    assert labels.tolist() == [1, 0, 1]


def test_soft_cross_entropy_is_torchs_for_one_head():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator)
    targets = torch.rand(6, 5, generator=generator).softmax(1)
    expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(shared.soft_cross_entropy(logits, targets, 0.1), expected)


def test_a_head_without_a_target_does_not_learn():
    logits = torch.randn(3, 10, requires_grad=True)
    targets = torch.zeros(3, 2, 5)
    targets[:, 0, 2] = 1
    shared.soft_cross_entropy(logits, targets, 0.1).backward()
    assert logits.grad[:, :5].abs().min() > 0
    assert not logits.grad[:, 5:].any()


def test_a_confusion_matrix_grows_with_its_classes_and_says_once_which_letters_it_lacks(tmp_path, capsys):
    sizes = {}
    for names in (FIVE, [f"mildly-disappointed-but-polite 快乐 {n}" for n in range(12)]):
        path, counts = tmp_path / "plot.png", np.eye(len(names), dtype=int)
        shared.plot_confusion(counts, names, "test", path)
        with Image.open(path) as plot:
            sizes[len(names)] = plot.size
    assert sizes[5] == (1650, 750)
    assert sizes[12][1] > 12 * 90  # room for two lines of text in each cell, pixels
    assert capsys.readouterr().err.count("font.family") == 1


# --- checkpoints ---


def test_load_checkpoint_needs_no_trust_and_gives_back_what_was_saved(gray_checkpoint):
    raw = torch.load(gray_checkpoint, weights_only=True)
    loaded = shared.load_checkpoint(gray_checkpoint)
    assert raw["model"]["layer1.0.conv1.weight"].dtype == torch.float16
    assert loaded["model"]["layer1.0.conv1.weight"].dtype == torch.float32
    assert loaded["model"]["bn1.running_var"].dtype == torch.float32
    assert (loaded["stage"], loaded["arch"], loaded["image_size"]) == ("gray", ARCH, 64)


def test_load_checkpoint_refuses_with_one_line(tmp_path, gray_checkpoint):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        shared.load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="has stage 'gray', expected 'fer' or 'emotion'"):
        shared.load_checkpoint(gray_checkpoint, stages=("fer", "emotion"))


class Code:
    """Its pickle touches a file."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch PWNED",)


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def zipped(entries, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


STATE = {"conv1.weight": torch.ones(9)}
ENDLESS = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><title>Virus scan warning</title>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "is HDF5, as Keras"),
        (b"\x08\x07\x12\x07pytorch" + bytes(99), "is ONNX"),
        (b"\x10\0\0\0\0\0\0\0" + b'{"fc.bias": {}}', "is safetensors"),
        (b"just words", "is text"),
        (zipped({"model.weights.h5": ""}), "is a model of Keras"),
        (zipped({"net/constants.pkl": "", "net/data.pkl": ""}), "is a TorchScript program"),
        (zipped({"a.txt": ""}), "is a zip archive"),
        (saved(STATE), "is a state dict, as torchvision's, weights alone (conv1.weight"),
        (saved(STATE, _use_new_zipfile_serialization=False), "is a state dict"),
        (saved({"state_dict": STATE, "epoch": 3}), "of another program, with state_dict, epoch"),
        (saved([1, 2]), "is a list"),
        (saved({"format": 2}), "is one of format 2"),
        (saved(STATE)[:-200], "is cut off or damaged"),
        (saved({"format": 1, "history": ENDLESS}), "is cut off or damaged"),
        (saved({"w": torch.ones(9)}).replace(b"\0\0\x80?" * 9, b"\0\0\x80@" * 9), "is cut off or damaged"),
        (saved(Code()), "is a pickle with code in it (posix system), which is not run"),
        (saved(Code(), _use_new_zipfile_serialization=False), "is a pickle with code in it (posix system)"),
        (pickle.dumps(Code()), "is a pickle of Python"),
        (saved({"w": torch.zeros(1).expand(10**12)}), "tensors say that they are larger than the file"),
        (
            zipped({"a/data.pkl": b"\x80\x02(" + b"]" * 10**7 + b"l."}, zipfile.ZIP_DEFLATED),
            "holds more than",
        ),
        (zipped({"a/data.pkl": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."}), "code in it"),
    ],
    ids=itertools.count(),
)
def test_load_checkpoint_says_what_a_strangers_file_is_and_runs_nothing(
    tmp_path, monkeypatch, content, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign.pt").write_bytes(content)
    with pytest.raises(ValueError, match="not a checkpoint of this toolkit, format 1: it ") as error:
        shared.load_checkpoint(tmp_path / "foreign.pt")
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 0.0}, "temperature 0.0, expected 0.01 to 100"),
        ({"temperature": -1}, "temperature -1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": "warm"}, "temperature warm"),
        ({"temperature_all": math.nan}, "temperature_all nan"),
        ({"temperature_all": [1.0]}, "temperature_all [1.0]"),
        ({"default_classes": ["bored", "sad"]}, "default_classes that are none of its classes"),
        ({"default_classes": 2}, "classes that are no list"),
        ({"image_size": 10**9}, "image_size 1000000000, expected 32 to 512"),
        ({"image_size": 64.5}, "image_size 64.5"),
        ({"crop_margin": math.inf}, "crop_margin inf"),
        ({"classes": ["../happy", "sad"]}, "a class of the name '../happy'"),
        ({"classes": ["happy\x1b[2J", "sad"]}, "a class of the name 'happy\\x1b[2J'"),
        ({"classes": ["sad", "sad"]}, "two classes of one name"),
        ({"classes": 2}, "classes that are no list"),
        ({"arch": "resnet101"}, "the architecture 'resnet101'"),
        ({"model": [1]}, "no weights"),
        ({"model": {"fc.bias": torch.tensor([1.0, math.nan])}}, "weights that are not finite, in fc.bias"),
        ({"model": {"fc.bias": torch.tensor([1.0, math.inf])}}, "weights that are not finite"),
        ({"model": {"bn1.running_var": torch.tensor([-1.0])}}, "weights that are not finite"),
    ],
)
def test_load_checkpoint_refuses_values_of_no_use(tmp_path, gray_checkpoint, changes, words):
    torch.save({**torch.load(gray_checkpoint, weights_only=True), **changes}, tmp_path / "changed.pt")
    with pytest.raises(ValueError, match="train one") as error:
        shared.load_checkpoint(tmp_path / "changed.pt")
    assert words in str(error.value)


def test_save_json_writes_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        shared.save_json(tmp_path / "a.json", {"acc": math.nan})
    assert list(tmp_path.iterdir()) == []


def test_save_checkpoint_to_a_full_disk_leaves_the_old_file(tmp_path):
    """A file size limit makes the write itself fail, as a full disk does."""
    path = tmp_path / "last.pt"
    write_checkpoint(path, shared.gray_resnet(ARCH, 2), ("happy", "sad"))
    before = path.read_bytes()
    main = shared.one_line_errors(lambda _: shared.save_checkpoint(path, {"model": {"w": torch.ones(10**6)}}))
    with file_size_limit(1_000_000), pytest.raises(SystemExit) as stop:
        main()
    assert f"cannot write {path}" in stop.value.code
    assert "\n" not in stop.value.code
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_load_network_wants_every_weight_and_no_other():
    net = shared.gray_resnet(ARCH, 5)
    checkpoint = {"arch": ARCH, "classes": FIVE, "model": net.state_dict()}
    loaded = shared.load_network(checkpoint)
    assert all(value.equal(net.state_dict()[name]) for name, value in loaded.state_dict().items())
    for wrong in (
        shared.gray_resnet(ARCH, 0).state_dict(),
        {**net.state_dict(), "layer9.weight": torch.zeros(1)},
        shared.gray_resnet("resnet18", 5).state_dict(),
        shared.gray_resnet(ARCH, 6).state_dict(),
    ):
        with pytest.raises(ValueError, match="do not fit") as error:
            shared.load_network({**checkpoint, "model": wrong})
        assert "\n" not in str(error.value)


def test_load_network_keeps_the_rows_of_classes_that_it_knows():
    torch.manual_seed(0)
    net = shared.gray_resnet(ARCH, 2)
    checkpoint = {"arch": ARCH, "classes": ["angry", "happy"], "model": net.state_dict()}
    wider = shared.load_network(checkpoint, ("angry", "disgusted", "happy")).fc
    assert wider.weight[[0, 2]].equal(net.fc.weight)
    assert wider.bias[[0, 2]].equal(net.fc.bias)
    assert not torch.isin(wider.weight[1], net.fc.weight).any()
    embedding = {"arch": ARCH, "classes": [], "model": shared.gray_resnet(ARCH, 0).state_dict()}
    assert shared.load_network(embedding, ("angry", "happy")).fc.weight.shape == net.fc.weight.shape


def test_the_best_checkpoint_keeps_all_classes_and_the_first_head(tmp_path):
    net = shared.gray_resnet(ARCH, 3)
    shared.add_heads(net, 2)
    torch.nn.init.normal_(net.fc.bias)
    run = shared.Run(tmp_path, "fer", ARCH, ("angry", "happy", "sad"), ("angry", "sad"), 32, 0.0, {})
    run.save_best(net, [{"epoch": 1}])
    best = shared.load_checkpoint(tmp_path / "best.pt")
    assert best["classes"] == ["angry", "happy", "sad"]
    assert best["default_classes"] == ["angry", "sad"]
    assert best["model"]["fc.weight"].equal(net.fc.weight[:3].half().float())
    assert best["model"]["fc.bias"].equal(net.fc.bias[:3])
    assert best["model"]["bn1.bias"].equal(net.bn1.bias)


# --- inference ---


def test_predict_is_one_answer_a_face_whatever_the_batch(finder, classifier, sample_photo):
    with Image.open(sample_photo) as file:
        image = file.convert("RGB")
    boxes = finder.find(image).boxes
    probs = classifier.predict(image, boxes)
    assert probs.shape == (4, len(classifier.classes))
    assert probs.dtype == np.float32
    assert np.allclose(probs.sum(1), 1, atol=1e-5)
    assert np.allclose(classifier.predict(image, boxes[2:3]), probs[2:3], atol=0.01)  # bfloat16 on some CPUs
    assert classifier.predict(image, boxes[:0]).shape == (0, 5)


def test_predict_crops_takes_any_mode(classifier, sample_photo):
    """Each is the same gray face. 16 bits are scaled, not clipped."""
    with Image.open(sample_photo) as file:
        face = file.convert("L").crop((60, 60, 400, 400))
    deep = np.asarray(face).astype(np.uint16) * 257
    crops = [face, *(face.convert(mode) for mode in ("RGB", "RGBA", "LA", "CMYK", "YCbCr"))]
    crops += [Image.fromarray(deep), Image.fromarray(deep.astype(np.int32))]
    assert {crop.mode for crop in crops} >= {"I;16", "I"}
    probs = classifier.predict_crops(crops)
    assert np.abs(probs - probs[0]).max() < 0.02  # bfloat16 on some CPUs; a clipped face is white


def test_weights_too_large_for_a_probability_are_one_line(tmp_path, load_networks_anew):
    path = write_checkpoint(tmp_path / "huge.pt", shared.gray_resnet(ARCH, 2), ("happy", "sad"))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model"]["layer4.0.bn2.bias"] = torch.full((FEATURES,), 1e30)
    checkpoint["model"]["fc.weight"] = torch.full((2, FEATURES), 1e30)
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="so large that it gives no probabilities"):
        shared.Classifier(path, "cpu").predict_crops([Image.new("L", (48, 48), "white")])


# --- command line ---


@pytest.mark.parametrize("kind", [TypeError, RuntimeError])
def test_one_line_errors_lets_bugs_through(kind):
    def bug(argv):
        raise kind("a bug")

    with pytest.raises(kind):
        shared.one_line_errors(bug)()


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (cv2.error("(-4:Insufficient memory) Failed to allocate 9 bytes in function"), True),
        (RuntimeError("ncclSystemError: System call (e.g. socket, malloc) or external library call"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_too_little_memory_is_told_from_other_errors(error, is_memory):
    assert shared.lacks_memory(error) == is_memory


@pytest.mark.parametrize("take", [torch.empty, np.empty, bytearray])
def test_too_little_memory_is_one_line_with_a_remedy(take):
    with pytest.raises(SystemExit, match=r"^error: .* more memory than there is; .* --batch-size"):
        shared.one_line_errors(lambda _: take(2**50))()


PRINT = """
import sys
import model
@model.one_line_errors
def main(argv):
    sys.stdin.read()
    print(*sys.argv[1:])
    if sys.argv[2:]:
        raise ValueError("a mistake\\nin two lines")
main()
"""


@pytest.mark.parametrize("words", [["x"], ["x" * 10**5], ["x", "y"]])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [("full", "No space left on device"), ("closed", "Bad file descriptor"), ("without reader", "")],
)
def test_a_stdout_that_takes_no_more_is_one_line_and_exit_code_1(start, words, kind, reason):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        stdout = full if kind == "full" else subprocess.PIPE
        close = (lambda: os.close(1)) if kind == "closed" else None
        process = start("-c", PRINT, *words, stdin=subprocess.PIPE, stdout=stdout, preexec_fn=close)
    if kind == "without reader":
        process.stdout.close()
    process.stdin.close()
    err = process.stderr.read()
    assert process.wait() == 1
    assert err.count("\n") == bool(reason)
    assert reason in err


def test_an_error_is_one_line_and_names_reach_a_terminal_that_lacks_their_letters(start):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    process = start("-c", PRINT, "\udce9ü", "y", env=environment, stdin=subprocess.DEVNULL)
    assert process.communicate() == ("\\udce9\\xfc y\n", "error: a mistake\\nin two lines\n")


def test_pick_device_refuses_what_is_not_there():
    missing = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(ValueError, match=f"no {missing} device"):
        shared.pick_device(missing)
