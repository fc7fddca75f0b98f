import csv
import gzip
import hashlib
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import FIVE, ROOT, file_size_limit
from PIL import Image

import model as shared
import unpack_fer_data
from unpack_fer_data import LABELS, main

SCRIPT = unpack_fer_data.__file__
TRAIN, VAL, TEST = "Training", "PublicTest", "PrivateTest"
HEADER = "emotion,pixels,Usage"
MIXED = [(0, TRAIN), (3, TRAIN), (6, TRAIN), (4, VAL), (2, VAL), (1, TEST), (5, TEST)]
MIXED_PATHS = [
    "train/angry/00000",
    "train/happy/00001",
    "val/sad/00003",
    "test/disgusted/00005",
    "test/surprised/00006",
]


def make_image(number):
    """Return image `number`, different from all others."""
    return np.random.default_rng(number).integers(0, 256, (48, 48), dtype=np.uint8)


def as_text(image):
    return " ".join(map(str, image.ravel().tolist()))


def csv_text(rows, header=HEADER):
    """Write (label, usage) rows with the images 0, 1, 2, ..., or (label, usage, image number) rows."""
    lines = [header]
    for index, (label, usage, *number) in enumerate(rows):
        fields = {"emotion": label, "Usage": usage, "pixels": as_text(make_image(*number or [index]))}
        lines.append(",".join(str(fields[name.strip()]) for name in header.split(",")))
    return "\n".join(lines) + "\n"


def write_csv(path, rows):
    path.write_text(csv_text(rows))
    return path


def list_pngs(folder):
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.png"))


def read_pngs(folder):
    return {name: np.asarray(Image.open(folder / f"{name}.png")) for name in list_pngs(folder)}


def snapshot(folder):
    """Return each file's time of change and content."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def read_table(text):
    """Return the table on stdout as {split: {emotion: number}}."""
    header, *lines = [line.split() for line in text.splitlines()[:4]]
    return {line[0]: dict(zip(header[1:], map(int, line[1:]), strict=True)) for line in lines}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "fer"


@pytest.fixture
def run(out, capsys):
    """Run the script into `out`; return exit code, stdout and stderr (sys.exit's message included)."""

    def run_main(*argv):
        code, message = 0, ""
        try:
            main(["--emotions", *FIVE, "--out-dir", str(out), *map(str, argv)])
        except SystemExit as error:
            code, message = (error.code, "") if isinstance(error.code, int) else (1, f"{error.code}\n")
        captured = capsys.readouterr()
        return code, captured.out, captured.err + message

    return run_main


def check_one_line_error(result, *words):
    """Check for exit code 1 and a single line that holds `words`."""
    code, stdout, stderr = result
    assert (code, stdout) == (1, "")
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert len(stderr) < 600
    for word in words:
        assert word in stderr


# --- what is written ---


def test_main_writes_the_rows_pixel_for_pixel_under_split_emotion_and_row_number(run, tmp_path, out):
    code, stdout, _ = run(write_csv(tmp_path / "fer2013.csv", MIXED))
    images = read_pngs(out)
    assert code == 0
    assert sorted(images) == sorted(MIXED_PATHS)
    for name, image in images.items():
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, make_image(int(name[-5:])))
    assert read_table(stdout)["test"] == {
        "angry": 0,
        "disgusted": 1,
        "happy": 0,
        "sad": 0,
        "surprised": 1,
        "total": 2,
    }
    assert stdout.splitlines()[-1] == f"images in {out}"


def test_main_writes_into_data_fer_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([str(write_csv(tmp_path / "fer2013.csv", MIXED))])
    assert list_pngs(tmp_path / "data" / "fer") == sorted(MIXED_PATHS)


def test_emotions_chooses_the_classes(run, tmp_path, out):
    _, stdout, _ = run(write_csv(tmp_path / "fer2013.csv", MIXED), "--emotions", "neutral", "fearful")
    assert list_pngs(out) == ["train/neutral/00002", "val/fearful/00004"]
    assert set(read_table(stdout)["val"]) == {"fearful", "neutral", "total"}


def test_no_folder_is_empty(run, tmp_path, out):
    """An empty one would pass for a class or a split."""
    table = write_csv(tmp_path / "fer2013.csv", MIXED)
    run(table)
    (out / "val" / "surprised").mkdir(exist_ok=True)  # as earlier versions left them
    run(table, "--limit", "1", "--overwrite")
    [image] = list_pngs(out)
    folders = {path.relative_to(out) for path in out.rglob("*") if path.is_dir()}
    assert folders == set(Path(image).parents) - {Path()}


def test_limit_reads_the_first_rows_only(run, tmp_path, out):
    _, _, stderr = run(write_csv(tmp_path / "fer2013.csv", MIXED), "--limit", "2")
    assert list_pngs(out) == MIXED_PATHS[:2]
    assert "2 rows, 0 of them bad" in stderr


def test_stderr_has_no_progress_bar_when_it_is_no_terminal(run, tmp_path):
    _, _, stderr = run(write_csv(tmp_path / "fer2013.csv", MIXED))
    assert stderr == "7 rows, 0 of them bad and skipped\n"


# --- packings ---


def write_zip(path, tables):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in tables.items():
            archive.writestr(name, text)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zip", ".XZ"])
def test_main_reads_plain_and_packed_files(run, tmp_path, out, suffix):
    path, text = tmp_path / f"fer2013.csv{suffix}", csv_text(MIXED)
    if suffix == ".zip":
        write_zip(path, {"readme.txt": "FER2013", "fer2013/fer2013.csv": text})
    else:
        pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix.lower()]
        path.write_bytes(pack(text.encode()))
    assert run(path)[0] == 0
    assert list_pngs(out) == sorted(MIXED_PATHS)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: text.removesuffix("\n"),
        lambda text: "\n".join(",".join(f'"{f}"' for f in line.split(",")) for line in text.splitlines()),
    ],
    ids=["windows line ends", "byte order mark", "no last line end", "quotes"],
)
def test_main_reads_the_csv_as_other_programs_save_it(run, tmp_path, out, change):
    path = tmp_path / "fer2013.csv"
    path.write_bytes(change(csv_text(MIXED)).encode())
    assert run(path, "--max-bad", "0")[0] == 0
    assert list_pngs(out) == sorted(MIXED_PATHS)
    np.testing.assert_array_equal(read_pngs(out)["test/surprised/00006"], make_image(6))


def test_main_reads_the_columns_of_icml_face_data(run, tmp_path, out):
    path = tmp_path / "icml_face_data.csv"
    path.write_text(csv_text(MIXED, "emotion, Usage, pixels"))
    assert run(path)[0] == 0
    assert list_pngs(out) == sorted(MIXED_PATHS)


@pytest.mark.parametrize("is_zipped", [False, True])
def test_rows_without_usage_all_go_to_train_and_stderr_says_so(run, tmp_path, out, is_zipped):
    path = tmp_path / "train.csv"
    path.write_text(csv_text(MIXED, "emotion,pixels"))
    if is_zipped:
        path = write_zip(tmp_path / "train.zip", {"train.csv": path.read_text()})
    code, stdout, stderr = run(path)
    assert code == 0
    assert [name.split("/")[0] for name in list_pngs(out)] == ["train"] * 5
    assert not (out / "val").exists()  # so that stage 4 takes a tenth of train
    assert read_table(stdout)["train"]["total"] == 5
    assert "no column Usage: all its rows go to train" in stderr


def test_a_zip_of_several_tables_yields_the_one_with_usage(run, tmp_path, out):
    tables = {
        "test.csv": csv_text(MIXED, "pixels"),
        "train.csv": csv_text(MIXED, "emotion,pixels"),
        "icml_face_data.csv": csv_text(MIXED, "emotion, Usage, pixels"),
        "__MACOSX/._icml_face_data.csv": "Mac OS X",
    }
    assert run(write_zip(tmp_path / "challenge.zip", tables))[0] == 0
    assert list_pngs(out) == sorted(MIXED_PATHS)


def test_a_zip_of_several_tables_yields_fer2013_if_it_is_there(run, tmp_path, out):
    tables = {"cut.csv": csv_text(MIXED[:1]), "fer2013.csv": csv_text(MIXED)}
    assert run(write_zip(tmp_path / "a.zip", tables))[0] == 0
    assert list_pngs(out) == sorted(MIXED_PATHS)


@pytest.mark.parametrize(
    ("tables", "word"),
    [
        ({}, "no CSV"),
        ({"test.csv": "pixels\n"}, "test.csv"),
        ({"a.csv": f"{HEADER}\n", "b.csv": f"{HEADER}\n"}, "a.csv, b.csv"),
    ],
)
def test_a_zip_without_exactly_one_fer_table_is_refused(run, tmp_path, tables, word):
    check_one_line_error(run(write_zip(tmp_path / "a.zip", tables)), "a.zip", word, "unzip it")


# --- malformed rows ---

NUMBERS = ["7"] * 2304


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"3,{' '.join(NUMBERS[:-1])},Training", "2303 pixels, expected 2304"),
        (f"3,{' '.join([*NUMBERS, '7'])},Training", "2305 pixels, expected 2304"),
        ("3,,Training", "0 pixels, expected 2304"),
        (f"3,{' '.join([*NUMBERS[1:], '256'])},Training", "pixel value 256, expected 0 to 255"),
        (f"3,{' '.join([*NUMBERS[1:], '9' * 30])},Training", "expected 0 to 255"),
        (f"3,{' '.join([*NUMBERS[1:], '-1'])},Training", "whole numbers from 0 to 255"),
        (f"3,{' '.join([*NUMBERS[1:], '7.5'])},Training", "whole numbers from 0 to 255"),
        (f"3,{' '.join([*NUMBERS[1:], 'x'])},Training", "whole numbers from 0 to 255"),
        (f"7,{' '.join(NUMBERS)},Training", "label '7', expected 0 to 6"),
        (f"-1,{' '.join(NUMBERS)},Training", "label '-1', expected 0 to 6"),
        (f"happy,{' '.join(NUMBERS)},Training", "label 'happy', expected 0 to 6"),
        (f",{' '.join(NUMBERS)},Training", "label '', expected 0 to 6"),
        (f"3,{' '.join(NUMBERS)},training", "Usage 'training', expected Training, PublicTest, PrivateTest"),
        (f"3,{' '.join(NUMBERS)},", "Usage '', expected Training, PublicTest, PrivateTest"),
        (f"3,{' '.join(NUMBERS)}", "2 columns, expected 3"),
        (f"3,{' '.join(NUMBERS)},Training,", "4 columns, expected 3"),
        ('"', "1 columns, expected 3"),
        (f"\xff,{' '.join(NUMBERS)},Training", "expected 0 to 6"),
    ],
)
def test_a_malformed_row_is_reported_with_its_line_and_skipped(run, tmp_path, out, line, reason):
    lines = csv_text(MIXED).splitlines()
    lines.insert(3, line)
    path = tmp_path / "fer2013.csv"
    path.write_bytes("\n".join(lines).encode("latin-1"))
    code, _, stderr = run(path, "--max-bad", "0.2")
    report, count = stderr.splitlines()
    assert code == 0
    assert report.startswith(f"{path}, line 4: ")
    assert reason in report
    assert count == "8 rows, 1 of them bad and skipped"
    # The rows behind it keep their place in the file.
    assert list_pngs(out) == sorted(
        [*MIXED_PATHS[:2], "val/sad/00004", "test/disgusted/00006", "test/surprised/00007"]
    )


def test_blank_lines_count_as_lines_but_not_as_rows(run, tmp_path, out):
    path = tmp_path / "fer2013.csv"
    path.write_text(csv_text(MIXED).replace("\n", "\n\n") + "3,1 2 3,Training\n")
    _, _, stderr = run(path, "--max-bad", "0.5")
    assert list_pngs(out) == sorted(MIXED_PATHS)
    assert "line 17: 3 pixels" in stderr


@pytest.mark.parametrize(("num_bad", "expected"), [(1, 0), (2, 1)])
def test_more_bad_rows_than_one_in_a_hundred_exit_with_1(run, tmp_path, num_bad, expected):
    path = tmp_path / "fer2013.csv"
    path.write_text(csv_text([(3, TRAIN)] * (100 - num_bad)) + "3,1 2 3,Training\n" * num_bad)
    code, stdout, stderr = run(path)
    assert code == expected
    assert bool(stdout) == (expected == 0)
    assert f"100 rows, {num_bad} of them bad" in stderr
    assert ("expected rows, at most 1.00% of them bad (--max-bad)" in stderr) == (expected == 1)


def test_too_many_bad_rows_write_nothing_until_they_are_accepted(run, tmp_path, out):
    path = write_csv(tmp_path / "fer2013.csv", [*MIXED, (9, TRAIN)])
    assert run(path)[0] == 1
    assert not out.exists()
    assert run(path, "--max-bad", "0.2")[0] == 0
    assert json.loads((out / "manifest.json").read_text())["complete"]
    assert run(path)[0] == 1


def test_many_bad_rows_are_a_few_lines_and_a_count(run, tmp_path):
    path = tmp_path / "fer2013.csv"
    path.write_text(csv_text([("happy", TRAIN)] * 40))
    _, _, stderr = run(path)
    lines = stderr.splitlines()
    assert lines[0] == f"{path}, line 2: label 'happy', expected 0 to 6; skipped"
    assert lines[5:7] == [f"{path}: 35 more such lines", "40 rows, 40 of them bad and skipped"]
    assert len(lines) == 8


def test_a_field_without_end_is_one_bad_row(run, tmp_path, out):
    lines = csv_text(MIXED).splitlines()
    lines.insert(3, f"3,{'1 ' * 10**6},{TRAIN}")
    path = tmp_path / "fer2013.csv"
    path.write_text("\n".join(lines))
    code, _, stderr = run(path, "--max-bad", "0.2")
    assert (code, stderr.count("\n")) == (0, 2)
    assert "line 4: 2 columns, expected 3" in stderr
    assert len(list_pngs(out)) == len(MIXED_PATHS)


def test_a_cut_off_last_line_is_reported_and_skipped(run, tmp_path, out):
    path = tmp_path / "fer2013.csv"
    path.write_text(csv_text(MIXED)[:-30])
    _, _, stderr = run(path, "--max-bad", "0.2")
    assert f"{path}, line 8: 2 columns, expected 3" in stderr
    assert list_pngs(out) == sorted(MIXED_PATHS[:4])


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_a_packed_file_that_breaks_off_is_reported_and_read_up_to_there(run, tmp_path, out, pack):
    rows = [(3, TRAIN)] * 60
    packed = pack(csv_text(rows).encode())
    path = tmp_path / f"fer2013.csv.{'gz' if pack is gzip.compress else 'xz'}"
    path.write_bytes(packed[: len(packed) // 2])
    code, _, stderr = run(path, "--max-bad", "0.1")
    num_images = len(list_pngs(out))
    assert code == 0
    assert 20 < num_images < 40
    assert f"{path}, line {num_images + 2}: the file breaks off" in stderr
    assert f"{num_images + 1} rows, 1 of them bad" in stderr


# --- no FER table ---

TAR = tarfile.TarInfo("fer2013/fer2013.csv").tobuf() + bytes(1024)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.csv", None, ["is missing or empty", "get it from Kaggle"]),
        ("empty.csv", b"", ["is missing or empty", "get it from Kaggle"]),
        (
            "ferplus.csv",
            b"Usage,Image name,neutral\n",
            ["'usage,image name,neutral'", "expected emotion, pixels and"],
        ),
        (
            "test.csv",
            b"pixels\n1 2\n",
            ["starts with 'pixels'", "expected emotion, pixels and Usage", "train.csv"],
        ),
        ("photo.csv", b"\x89PNG\r\n\x1a\n" + bytes(5000), ["expected emotion, pixels and Usage"]),
        (
            "gzip.csv",
            gzip.compress(b"emotion,pixels,Usage\n"),
            ["gzip.csv is packed by gzip, expected emotion"],
        ),
        ("fer2013.tar.gz", gzip.compress(TAR), ["fer2013.tar.gz is a tar archive, expected", "unpacked"]),
        (
            "utf16.csv",
            "emotion,pixels,Usage\n".encode("utf-16"),
            ["utf16.csv is text in UTF-16, not in UTF-8"],
        ),
        ("page.csv", b"\n\n<!DOCTYPE html><title>Kaggle</title>", ["page.csv is a web page, expected"]),
        ("plain.csv.gz", b"emotion,pixels,Usage\n", ["no sound .gz file", "rename it"]),
        ("plain.csv.xz", b"emotion,pixels,Usage\n", ["no sound .xz file", "rename it"]),
        ("plain.zip", b"emotion,pixels,Usage\n", ["no sound .zip file", "rename it"]),
        ("stub.csv.gz", gzip.compress(b"emotion,pixels,Usage\n")[:12], ["no sound .gz file", "get it anew"]),
    ],
)
def test_a_file_that_is_no_fer_table_is_refused_in_one_line(run, tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    check_one_line_error(run(tmp_path / name), name, *words)
    assert not (tmp_path / "fer").exists()


def test_a_folder_in_place_of_the_csv_is_refused(run, tmp_path):
    check_one_line_error(run(tmp_path), "is missing or empty")


def test_a_table_without_rows_is_refused(run, tmp_path):
    code, stdout, stderr = run(write_csv(tmp_path / "fer2013.csv", []))
    assert (code, stdout) == (1, "")
    assert "0 bad rows out of 0" in stderr


@pytest.mark.parametrize(
    "options",
    [["--emotions", "bored"], ["--limit", "0"], ["--max-bad", "2"], ["--max-bad", "nan"]],
)
def test_options_out_of_range_are_left_to_argparse(run, tmp_path, options):
    path = write_csv(tmp_path / "fer2013.csv", MIXED)
    code, stdout, stderr = run(path, *options)
    assert (code, stdout) == (2, "")
    assert options[0] in stderr


# --- second runs ---


def test_a_second_run_changes_no_file_reads_no_row_and_prints_the_same(run, tmp_path, out, monkeypatch):
    path = write_csv(tmp_path / "fer2013.csv", [*MIXED, (3, TRAIN, 0)])
    _, first, story = run(path, "--drop-duplicates")
    before = snapshot(out)
    monkeypatch.setattr(unpack_fer_data, "read_rows", None)
    code, second, stderr = run(path, "--drop-duplicates")
    assert (code, second) == (0, first)
    assert snapshot(out) == before
    assert stderr == f"{out} is complete already\n{story}"


def test_a_second_run_takes_away_the_lock_of_one_killed_at_its_end(run, tmp_path, out):
    path = write_csv(tmp_path / "fer2013.csv", MIXED)
    run(path)
    (out / ".emotion.lock").write_text("unpack_fer_data.py (process 1)")
    assert run(path)[0] == 0
    assert not (out / ".emotion.lock").exists()


def test_a_second_run_from_a_renamed_csv_finds_the_same_content(run, tmp_path, out):
    path = write_csv(tmp_path / "fer2013.csv", MIXED)
    run(path)
    before = snapshot(out)
    run(path.rename(tmp_path / "other.csv"))
    assert snapshot(out) == before


@pytest.mark.parametrize(
    "harm", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:100])], ids=["lost", "cut off"]
)
def test_a_second_run_restores_the_harmed_image_alone(run, tmp_path, out, harm):
    path = write_csv(tmp_path / "fer2013.csv", MIXED)
    run(path)
    before = snapshot(out)
    harmed = out / f"{MIXED_PATHS[2]}.png"
    harm(harmed)
    assert run(path)[0] == 0
    after = snapshot(out)
    assert {file: content for file, (_, content) in after.items()} == {
        file: content for file, (_, content) in before.items()
    }
    assert {file for file in after if after[file] != before[file]} == {harmed, out / "manifest.json"}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--emotions", "happy", "sad"], "(emotions)"),
        (["--drop-duplicates"], "(drop_duplicates)"),
        (["--limit", "3"], "(limit)"),
    ],
)
def test_other_options_over_the_same_folder_are_refused(run, tmp_path, out, options, word):
    path = write_csv(tmp_path / "fer2013.csv", MIXED)
    run(path)
    before = snapshot(out)
    check_one_line_error(run(path, *options), str(out), word, "--out-dir", "--overwrite")
    assert snapshot(out) == before


def test_the_manifest_is_that_of_earlier_versions_so_that_their_folders_count_as_complete(run, tmp_path, out):
    path = write_csv(tmp_path / "fer2013.csv", [*MIXED, (3, TRAIN, 0), (3, TRAIN, 1)])
    run(path, "--drop-duplicates")
    counts = {split: dict.fromkeys(LABELS, 0) for split in ("train", "val", "test")}
    counts["train"]["happy"] = counts["val"]["sad"] = 1
    counts["test"] |= {"disgusted": 1, "surprised": 1}
    assert json.loads((out / "manifest.json").read_text()) == {
        "format": "unpack_fer_data 1",
        "complete": True,
        "source": {
            "csv": hashlib.blake2b(path.read_bytes()).hexdigest(),
            "ferplus": None,
            "emotions": sorted(FIVE),
            "size": 48,
            "drop_duplicates": True,
            "limit": None,
        },
        "rows": 9,
        "bad_rows": 0,
        "dropped": {"in val or test": 0, "with several labels": 2, "repeated in train": 1},
        "counts": counts,
        "bytes": sum(png.stat().st_size for png in out.rglob("*.png")),
    }


def test_images_of_another_size_by_an_earlier_version_are_refused(run, tmp_path, out):
    path = write_csv(tmp_path / "fer2013.csv", MIXED)
    run(path)
    manifest = out / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"size": 48', '"size": 64'))
    before = snapshot(out)
    check_one_line_error(run(path), str(out), "(size)", "--out-dir", "--overwrite")
    assert snapshot(out) == before


def test_another_csv_over_the_same_folder_is_refused(run, tmp_path, out):
    run(write_csv(tmp_path / "fer2013.csv", MIXED))
    before = snapshot(out)
    check_one_line_error(run(write_csv(tmp_path / "b.csv", MIXED[:3])), "(csv)", "--out-dir", "--overwrite")
    assert snapshot(out) == before


def test_overwrite_leaves_only_the_new_images_and_the_users_files(run, tmp_path, out):
    path = write_csv(tmp_path / "fer2013.csv", MIXED)
    run(path, "--emotions", *LABELS)
    kept = [out / "train" / "happy" / "mine.png", out / "notes.txt"]
    for file in kept:
        file.write_text("mine")
    assert run(path, "--overwrite")[0] == 0
    images = {path for path in out.rglob("*.png") if path not in kept}
    assert images == {out / f"{name}.png" for name in MIXED_PATHS}
    assert [file.read_text() for file in kept] == ["mine", "mine"]
    assert not (out / "train" / "neutral").exists()


def test_overwrite_from_a_file_that_is_no_fer_table_deletes_nothing(run, tmp_path, out):
    run(write_csv(tmp_path / "fer2013.csv", MIXED))
    before = snapshot(out)
    (tmp_path / "b.csv").write_text("name\n")
    check_one_line_error(run(tmp_path / "b.csv", "--overwrite"), "b.csv")
    assert snapshot(out) == before


def test_overwrite_leaves_the_earlier_set_until_the_new_one_is_whole(run, tmp_path, out):
    run(write_csv(tmp_path / "fer2013.csv", MIXED))
    before = snapshot(out)
    path = write_csv(tmp_path / "b.csv", [*MIXED, *[(3, TRAIN)] * 20])
    with file_size_limit(1000):  # a PNG of 48x48 random pixels has 2,400 bytes
        check_one_line_error(
            run(path, "--overwrite"), f"cannot write {out / 'train' / 'happy' / '00007.png'}"
        )
    path.write_text(path.read_text() + "3,1 2 3,Training\n" * 9)
    assert run(path, "--overwrite")[0] == 1
    assert snapshot(out) == before


def test_two_runs_into_one_folder_are_refused(run, tmp_path, out):
    path = write_csv(tmp_path / "fer2013.csv", MIXED)
    with shared.only_run_in(out):
        check_one_line_error(run(path), f"{out} is in use by", f"(process {os.getpid()})")
    assert run(path)[0] == 0


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_images_without_a_manifest_are_refused_and_kept(run, tmp_path, out, options):
    (out / "train" / "happy").mkdir(parents=True)
    (out / "train" / "happy" / "00001.png").write_text("mine")
    before = snapshot(out)
    result = run(write_csv(tmp_path / "fer2013.csv", MIXED), *options)
    check_one_line_error(result, "holds images but no manifest.json", "choose another --out-dir")
    assert snapshot(out) == before


@pytest.mark.parametrize(
    "text",
    [
        *('{"name": "somebody\'s"}', "[]", "no json", "[" * 100_000, '{"format": "unpack_fer_data 1"}'),
        '{"format": "unpack_fer_data 1", "source": {}, "complete": true, "rows": "many"}',
        '{"format": "unpack_fer_data 1", "source": {}, "complete": true, "dropped": {}, "bad_rows": 0, '
        f'"rows": 1{400 * "0"}}}',
    ],
)
def test_a_manifest_of_another_kind_is_refused_and_kept(run, tmp_path, out, text):
    out.mkdir()
    (out / "manifest.json").write_text(text)
    result = run(write_csv(tmp_path / "fer2013.csv", MIXED), "--overwrite")
    check_one_line_error(result, "manifest.json is not this script's", "choose another --out-dir")
    assert (out / "manifest.json").read_text() == text


def test_a_linked_folder_is_refused_and_what_it_links_to_kept(run, tmp_path, out):
    path = write_csv(tmp_path / "fer2013.csv", MIXED)
    run(path)
    photos = tmp_path / "photos"
    (out / "train" / "happy").rename(photos)
    (out / "train" / "happy").symlink_to(photos)
    before = snapshot(photos)
    check_one_line_error(run(path, "--overwrite"), f"leads out of {out}")
    assert snapshot(photos) == before


def test_images_of_unknown_origin_are_named_and_kept(run, tmp_path, out):
    path = write_csv(tmp_path / "fer2013.csv", MIXED)
    run(path)
    stranger = out / "train" / "happy" / "99999.png"
    stranger.write_text("mine")
    check_one_line_error(run(path), "holds 1 images that are not from", "move them elsewhere")
    assert stranger.read_text() == "mine"
    stranger.unlink()
    assert run(path)[0] == 0


def test_ctrl_c_exits_with_130_and_the_next_run_completes(run, tmp_path, out, monkeypatch):
    path = write_csv(tmp_path / "fer2013.csv", MIXED)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(unpack_fer_data, "write_png", interrupt)
        assert run(path) == (130, "", "interrupted\n")
    assert run(path)[0] == 0
    assert list_pngs(out) == sorted(MIXED_PATHS)


@pytest.mark.parametrize("num_left", [0, 19])
def test_a_killed_run_leaves_whole_images_or_none_and_the_next_completes(run, start, tmp_path, out, num_left):
    """It is killed while it writes 200 images, each twice, or when it moves 100 of them to their place."""
    path = write_csv(tmp_path / "fer2013.csv", [(3, TRAIN, row // 2) for row in range(200)])
    options = [str(path), "--drop-duplicates", "--emotions", *FIVE, "--out-dir"]
    script = ["unpack_fer_data.py", *options, out]
    number = 200 + num_left + 1 if num_left else 20
    process = start(ROOT / "tests" / "stop_at.py", "SIGKILL", number, ".png", *script)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    main([*options, str(tmp_path / "fresh")])
    fresh = {
        file.relative_to(tmp_path / "fresh"): file.read_bytes() for file in (tmp_path / "fresh").rglob("*.*")
    }
    left = [file.relative_to(out) for file in out.glob("*/*/*.png")]
    assert len(left) == num_left
    assert all((out / name).read_bytes() == fresh[name] for name in left)
    assert run(path, "--drop-duplicates")[0] == 0
    assert {file.relative_to(out): file.read_bytes() for file in out.rglob("*.*")} == fresh


# --- duplicates ---

REPEATS = [  # (label, usage, image)
    (0, TRAIN, 10),  # 0 stays
    (0, TRAIN, 10),  # 1 repeat
    (0, TRAIN, 10),  # 2 repeat
    (3, TRAIN, 11),  # 3 stands in val, under the same label
    (3, VAL, 11),
    (3, VAL, 11),  # 5 val keeps its repeats
    (4, TRAIN, 12),  # 6 stands in test, under another label
    (5, TEST, 12),
    (4, TRAIN, 13),  # 8 and 9: two labels
    (5, TRAIN, 13),
    (1, TRAIN, 14),  # 10: its other label is none of the five
    (6, TRAIN, 14),
    (1, TRAIN, 15),  # 12: its twin in test is none of the five
    (2, TEST, 15),
    (5, TRAIN, 16),  # 14 stays
    (3, TRAIN, 11),  # 15 stands in val
    (3, TEST, 11),  # 16 test keeps what stands in val
]


def test_drop_duplicates_cleans_train_alone_and_counts_by_reason(run, tmp_path, out):
    code, stdout, stderr = run(write_csv(tmp_path / "fer2013.csv", REPEATS), "--drop-duplicates")
    assert code == 0
    assert "dropped from train: 4 in val or test, 3 with several labels, 2 repeated in train\n" in stderr
    held_out = ["test/happy/00016", "test/surprised/00007", "val/happy/00004", "val/happy/00005"]
    assert list_pngs(out) == [*held_out[:2], "train/angry/00000", "train/surprised/00014", *held_out[2:]]
    assert read_table(stdout)["train"]["total"] == 2


def test_without_drop_duplicates_all_rows_stay(run, tmp_path, out):
    code, _, stderr = run(write_csv(tmp_path / "fer2013.csv", REPEATS))
    assert code == 0
    assert len(list_pngs(out)) == sum(label not in {2, 6} for label, *_ in REPEATS)
    assert "dropped" not in stderr


# --- the real file ---


FERPLUS = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF\n"


@pytest.fixture
def ferplus(tmp_path):
    """Write votes for MIXED as FER+ does; row i has i votes for happiness and the rest for neutral."""
    path = tmp_path / "fer2013new.csv"
    lines = [f"{usage},fer{i:07}.png,{10 - i},{i},0,0,0,0,0,0,0,0\n" for i, (_, usage) in enumerate(MIXED)]
    path.write_text(FERPLUS + "".join(lines))
    return path


def test_ferplus_writes_the_votes_by_row_under_the_names_of_this_toolkit(run, tmp_path, out, ferplus):
    run(write_csv(tmp_path / "fer2013.csv", MIXED), "--ferplus", ferplus)
    with (out / "votes.csv").open(newline="") as file:
        votes = list(csv.DictReader(file))
    assert [line["row"] for line in votes] == [str(i) for i in range(len(MIXED))]
    assert set(votes[0]) == {"row", *LABELS}
    assert [(line["happy"], line["neutral"], line["sad"]) for line in votes] == [
        (str(i), str(10 - i), "0") for i in range(len(MIXED))
    ]


def test_a_second_run_restores_lost_votes_and_overwrite_without_ferplus_removes_them(
    run, tmp_path, out, ferplus
):
    table = write_csv(tmp_path / "fer2013.csv", MIXED)
    run(table, "--ferplus", ferplus)
    before = (out / "votes.csv").read_bytes()
    (out / "votes.csv").unlink()
    run(table, "--ferplus", ferplus)
    assert (out / "votes.csv").read_bytes() == before
    run(table, "--overwrite")
    assert not (out / "votes.csv").exists()


def test_votes_do_not_stay_for_images_of_another_table(run, tmp_path, out, ferplus):
    run(write_csv(tmp_path / "fer2013.csv", MIXED), "--ferplus", ferplus)
    for split in ("train", "val", "test"):
        shutil.rmtree(out / split)
    run(write_csv(tmp_path / "other.csv", MIXED[::-1]))
    assert not (out / "votes.csv").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is missing"),
        ("emotion,pixels,Usage\n", "lacks"),
        (FERPLUS + f"{TRAIN},fer0000000.png,10,0,0,0,0,0,0,0,0,0\n", "not row for row"),
        (FERPLUS + f"{TEST},fer0000000.png,10,0,0,0,0,0,0,0,0,0\n" * len(MIXED), "not row for row"),
        ("", "is empty, expected FER+'s fer2013new.csv"),
        ("\0\x89PNG\r\n\x1a\n" * 100, "is of an unknown kind, not text"),
        (FERPLUS + f"{TEST},fer0000000.png,10\n", "is not FER+'s fer2013new.csv"),
        (FERPLUS + f"{TEST},fer0000000.png,many,0,0,0,0,0,0,0,0,0\n", "is not FER+'s fer2013new.csv"),
        (FERPLUS + f"{TEST},fer0000000.png,{'9' * 30},0,0,0,0,0,0,0,0,0\n", "is not FER+'s fer2013new.csv"),
        (FERPLUS + f"{TEST}\n{TEST}{',0' * 20}\n", "is not FER+'s fer2013new.csv"),
        (FERPLUS + f"{TEST},fer0000000.png,9,0,-1,0,0,0,0,0,0,0\n", "line 2: '-1' votes for surprise"),
        (FERPLUS + f"{TEST},fer0000000.png,9,0,,0,0,0,0,0,0,0\n", "line 2: '' votes for surprise"),
        (FERPLUS + f"{TEST},fer0000000.png,0,0,0,0,0,0,0,0,0,0\n", "line 2: nobody voted"),
        (
            FERPLUS + "".join(f"{usage},,9,0,0,0,0,0,0,0,0,0\n" for _, usage in [*MIXED, MIXED[-1]]),
            "8 rows and",
        ),
        (FERPLUS + "".join(f"{usage},,9,0,0,0,0,0,0,0,0,0\n" for _, usage in MIXED[::-1]), "row 0 is not of"),
        (FERPLUS + f"{TEST},{'x' * 10**6},9\n", "field larger than field limit"),
        (
            FERPLUS
            + "".join(f"{usage},fer{9 - i}.png,9,0,0,0,0,0,0,0,0,0\n" for i, (_, usage) in enumerate(MIXED)),
            "another order",
        ),
        (gzip.compress(b"Usage"), "is packed by gzip"),
    ],
)
def test_votes_that_do_not_fit_are_refused_in_one_line(run, tmp_path, out, content, words):
    path = tmp_path / "fer2013new.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    check_one_line_error(run(write_csv(tmp_path / "fer2013.csv", MIXED), "--ferplus", path), words)
    assert not (out / "votes.csv").exists()


def test_overwrite_with_a_table_that_is_not_ferplus_deletes_nothing(run, tmp_path, out):
    path = write_csv(tmp_path / "fer2013.csv", MIXED)
    run(path)
    before = snapshot(out)
    check_one_line_error(run(path, "--ferplus", path, "--overwrite"), "it lacks anger")
    assert snapshot(out) == before


def test_main_unpacks_real_rows_pixel_for_pixel(run, out, real_data):
    code, _, _ = run(real_data / "fer2013.csv.xz", "--limit", "200", "--emotions", *LABELS)
    images = read_pngs(out)
    with lzma.open(real_data / "fer2013.csv.xz", "rt") as file:
        for row, record in zip(range(200), csv.DictReader(file), strict=False):
            image = images.pop(f"train/{LABELS[int(record['emotion'])]}/{row:05d}")
            np.testing.assert_array_equal(image.ravel(), np.array(record["pixels"].split(), int))
    assert code == 0
    assert images == {}


MEASURE = """
import resource, subprocess, sys
code = subprocess.run([sys.executable, *sys.argv[1:]]).returncode
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(code, usage.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2))
"""


@pytest.mark.slow
def test_the_whole_file_takes_less_than_600_megabytes_and_a_second_run_changes_nothing(out, real_data):
    # A process of its own measures: RUSAGE_CHILDREN covers all that this process has ever started.
    command = [sys.executable, "-c", MEASURE, SCRIPT, real_data / "fer2013.csv.xz", "--out-dir", out]
    command += ["--emotions", *FIVE]
    stdouts, changes = [], []
    for _ in range(2):
        stdouts.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        changes.append({path: path.stat().st_mtime_ns for path in out.rglob("*.png")})
    assert changes[0] == changes[1]
    assert read_table(stdouts[0]) == {
        split: dict(zip([*FIVE, "total"], [*counts, sum(counts)], strict=True))
        for split, counts in {
            "train": [3969, 435, 7186, 4795, 3161],
            "val": [466, 56, 891, 652, 414],
            "test": [489, 55, 876, 588, 415],
        }.items()
    }
    assert len(list_pngs(out)) == 19546 + 2479 + 2423
    assert read_table(stdouts[1]) == read_table(stdouts[0])
    for text in stdouts:
        code, megabytes = map(float, text.splitlines()[-1].split())
        assert code == 0
        assert megabytes < 600
    shutil.rmtree(out)  # pytest would keep these 24,448 files of three sessions
