"""Tables of all inputs: --csv, --summary, --save-crops, their journals, and runs that go on after a stop."""

import csv
import io
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_detect_video import write_video

import detect_emotions
import model as shared
from detect_emotions import MARK, Table

SAMPLE = shared.DEFAULT_MODEL.with_name("sample.jpg")  # 960x960, four portraits
STOP = Path(__file__).with_name("stop_at.py")


@pytest.fixture(scope="module")
def people():
    with Image.open(SAMPLE) as image:
        return [image.crop((x, y, x + 480, y + 480)).resize((180, 180)) for x in (0, 480) for y in (0, 480)]


@pytest.fixture
def album(people, tmp_path):
    """A folder with two portraits, a wall, and a video in which one comes, goes and comes back."""
    folder = tmp_path / "album"
    folder.mkdir()
    people[0].save(folder / "a.png")
    people[1].save(folder / "b.png")
    Image.new("RGB", (90, 60), "gray").save(folder / "wall.png")
    frames = []
    for i in range(60):
        frames.append(Image.new("RGB", (320, 180), "gray"))
        if not 20 <= i < 40:
            frames[-1].paste(people[2], (70, 0))
    write_video(folder / "clip.mp4", frames)
    return folder


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def labelled(out):
    return [Path(line.split("\t")[0]).name for line in out.splitlines()]


# --- rows ---


def test_a_file_that_held_another_table_is_made_anew(run, album, tmp_path):
    table, expected = tmp_path / "table.csv", tmp_path / "expected.csv"
    assert run(album, "--no-copies", "--summary", table)[0] == 0
    for path in (table, expected):
        assert run(album, "--no-copies", "--csv", path)[0] == 0
    assert table.read_bytes() == expected.read_bytes()


def test_empty_rows_keep_photos_and_frames_without_faces_in_all_tables(run, album, tmp_path):
    table, summary = tmp_path / "t.csv", tmp_path / "s.csv"
    assert run(album, "--csv", table, "--summary", summary, "--empty-rows")[0] == 0
    rows = rows_of(table)
    of_clip = [row for row in rows if row["file"].endswith("clip.mp4")]
    assert [int(row["frame"]) for row in of_clip] == list(range(60))
    assert of_clip == rows_of(album / "clip_emotions.csv")  # the very same columns
    without = [row for row in rows if not row["face"]]
    assert without[-1] == {**dict.fromkeys(rows[0], ""), "file": str(album / "wall.png")}
    assert {int(row["frame"]) for row in without[:-1]} >= set(range(34, 40))
    assert all(row["time"] and not row["emotion"] for row in without[:-1])
    assert {"file": str(album / "wall.png"), "faces": "0"}.items() <= rows_of(summary)[-1].items()


def test_csv_on_standard_output_is_all_that_stands_there(run, album, tmp_path):
    code, out, err = run(album, "--csv", "-")
    assert code == 0
    assert err == f"{album / 'wall.png'}: no face found\n"
    rows = list(csv.DictReader(io.StringIO(out, newline="")))
    assert run(album, "--csv", tmp_path / "t.csv")[0] == 0
    assert rows == rows_of(tmp_path / "t.csv")
    assert {Path(row["file"]).name for row in rows} == {"a.png", "b.png", "clip.mp4"}


@pytest.mark.parametrize("options", [["--csv", "-", "--json"], ["--summary", "-"]])
def test_two_results_on_standard_output_are_refused(run, options):
    code, out, err = run(SAMPLE, *options)
    assert (code, out) == (2, "")
    assert "name a file" in err


def test_parquet_without_its_package_names_the_remedy_before_the_work(run, album, tmp_path, monkeypatch):
    monkeypatch.setattr(detect_emotions.importlib.util, "find_spec", lambda name: None)
    for option in ("--csv", "--summary"):
        code, out, err = run(album, option, tmp_path / "t.parquet")
        assert (code, out) == (1, "")
        table = tmp_path / "t.parquet"
        assert err == f"error: {table} needs pyarrow, which is not there; pip install pyarrow, or name a .csv"
    assert not list(album.glob("*_emotions*"))


def test_parquet_has_the_numbers_of_the_csv_as_numbers(run, album, tmp_path):
    pytest.importorskip("pyarrow", reason="no Parquet; pip install pyarrow")
    for suffix in (".csv", ".parquet"):
        tables = ("--csv", tmp_path / f"t{suffix}", "--summary", tmp_path / f"s{suffix}", "--empty-rows")
        assert run(album, *tables, "--overwrite" if suffix == ".parquet" else "--json")[0] == 0
    for name in ("t", "s"):
        table, expected = pd.read_parquet(tmp_path / f"{name}.parquet"), pd.read_csv(tmp_path / f"{name}.csv")
        pd.testing.assert_frame_equal(table, expected, check_dtype=False)
        texts = {column for column in table if not pd.api.types.is_numeric_dtype(table[column])}
        assert texts == {"file", "emotion"}
    assert run(album, "--csv", tmp_path / "t.parquet")[0] == 0  # it says that it may be replaced


def test_table_that_would_replace_an_input_or_another_table_is_refused(run, album, tmp_path):
    before = {path: path.read_bytes() for path in album.iterdir()}
    same = ("--csv", tmp_path / "t.csv", "--summary", tmp_path / "t.csv")
    for options in (same, ("--summary", album / "a.png")):
        code, out, err = run(album, *options)
        assert (code, out) == (1, "")
        assert err.startswith(f"error: --summary {options[-1]} would overwrite ")
    assert {path: path.read_bytes() for path in album.iterdir()} == before


# --- the journal ---


def test_second_run_takes_what_is_done_from_the_journal(run, album, tmp_path):
    tables = ("--csv", tmp_path / "t.csv", "--summary", tmp_path / "s.csv")
    assert labelled(run(album, *tables)[1]) == ["a.png", "b.png", "clip.mp4"]
    made = {name: (tmp_path / name).read_bytes() for name in ("t.csv", "s.csv")}
    (tmp_path / "t.csv").unlink()
    code, out, err = run(album, *tables)
    assert (code, out) == (0, "")
    assert "finished before (--overwrite does it again) 4" in err
    assert {name: (tmp_path / name).read_bytes() for name in made} == made
    named = sorted(path for path in album.iterdir() if "_emotions" not in path.name)
    assert run(*named, *tables)[1] == ""  # the same inputs, each by its name
    assert {name: (tmp_path / name).read_bytes() for name in made} == made


@pytest.mark.slow
def test_changed_file_or_option_is_done_again(run, album, people, tmp_path):
    table = ("--csv", tmp_path / "t.csv")
    run(album, *table)
    people[3].save(album / "a.png")
    assert labelled(run(album, *table)[1]) == ["a.png"]
    (album / "b_emotions.png").unlink()
    assert labelled(run(album, *table)[1]) == ["b.png"]
    (album / "b.png").unlink()
    people[1].save(album / "c.png")
    assert labelled(run(album, *table)[1]) == ["c.png"]
    files = [Path(row["file"]).name for row in rows_of(tmp_path / "t.csv")]
    assert list(dict.fromkeys(files)) == ["a.png", "c.png", "clip.mp4"]
    for options in (["--every", 2], ["--every", 2, "--overwrite"], ["--every", 2, "--json"]):
        assert len(labelled(run(album, *table, *options)[1])) >= 3
    assert run(album, *table, "--every", 2)[1] == ""


def test_input_that_fails_leaves_no_rows(run, album, tmp_path):
    """One whose copy cannot be written after its rows are known."""
    (album / "b_emotions.png").mkdir()
    code, _, err = run(album, "--csv", tmp_path / "t.csv")
    assert (code, "failed, see above 1" in err) == (1, True)
    assert {Path(row["file"]).name for row in rows_of(tmp_path / "t.csv")} == {"a.png", "clip.mp4"}
    (album / "b_emotions.png").rmdir()
    assert labelled(run(album, "--csv", tmp_path / "t.csv")[1]) == ["b.png"]
    assert len({row["file"] for row in rows_of(tmp_path / "t.csv")}) == 3


def test_journal_that_is_cut_short_or_damaged_costs_only_what_is_lost(run, album, tmp_path):
    table, journal = tmp_path / "t.csv", tmp_path / ".t.csv.journal"
    run(album, "--csv", table)
    whole, expected = journal.read_bytes(), table.read_bytes()
    notes = [json.loads(line) for line in whole.splitlines() if line.startswith(b"{")]
    assert (notes[0]["written_by"], notes[0]["every"]) == (MARK, 3)
    assert [Path(note["file"]).name for note in notes[1:]] == ["a.png", "b.png", "clip.mp4", "wall.png"]
    head, *rest = whole.splitlines(keepends=True)
    damaged = [b"".join([head, *rest[:2], junk, *rest[2:]]) for junk in (b"7\n", b"NaN", b"[" * 10**5, b"\n")]
    for content in (whole[:-10], whole[: len(whole) // 2], whole + b'{"file": "x', *damaged):
        journal.write_bytes(content)
        assert run(album, "--csv", table)[0] == 0
        assert (table.read_bytes(), journal.read_bytes()) == (expected, whole)
    journal.write_text("my notes\n")
    code, _, err = run(album, "--csv", table)
    assert (code, journal.read_text()) == (1, "my notes\n")
    assert err.startswith(f"error: {journal} does not say that this program wrote it; ")


def test_journal_with_other_columns_is_begun_anew(run, album, tmp_path):
    photo, table, journal = album / "a.png", tmp_path / "t.csv", tmp_path / ".t.csv.journal"
    run(photo, "--csv", table)
    expected = journal.read_bytes()
    journal.write_bytes(expected.replace(b'"x0", ', b"", 1))
    assert labelled(run(photo, "--csv", table)[1]) == ["a.png"]
    assert journal.read_bytes() == expected


def test_rows_that_were_made_anew_are_not_replaced_by_those_of_an_earlier_process(run, album, tmp_path):
    photo, table, journal = album / "a.png", tmp_path / "t.csv", tmp_path / ".t.csv.journal"
    run(photo, "--csv", table)
    others, backup = tmp_path / ".t.csv.journal-1", tmp_path / ".t.csv.journal-of-mine"
    head, row, end = journal.read_bytes().splitlines(keepends=True)
    others.write_bytes(b"".join([head, row, row, end]))  # of torchrun's second process, with another version
    backup.write_bytes(b"mine")
    assert labelled(run(photo, "--csv", table, "--overwrite")[1]) == ["a.png"]
    expected = table.read_bytes()
    assert run(photo, "--csv", table)[1] == ""
    assert (table.read_bytes(), others.exists(), backup.read_bytes()) == (expected, False, b"mine")


def test_two_runs_do_not_write_one_table(album, run, tmp_path):
    other = Table(tmp_path / "t.csv", {}, [], False)
    with other.writing(["file"], []):
        code, out, err = run(album, "--csv", tmp_path / "t.csv")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {tmp_path / 't.csv'} is in use by ")


@pytest.mark.slow
def test_killed_run_goes_on_and_all_equals_an_undisturbed_one(run, start, album, tmp_path):
    def command(out):
        tables = ["--csv", out / "t.csv", "--summary", out / "s.csv", "--save-crops", out / "crops"]
        return [album, "--out-dir", out, *tables, "--empty-rows"]

    def content(out):
        files = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in files.items() if not name.endswith(".journal")}

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(*command(whole))[0] == 0
    for name in ("b_emotions.png", "clip_emotions_timeline.png", "wall_emotions.png", "t.csv"):
        process = start(STOP, "SIGKILL", 1, name, detect_emotions.__file__, *command(broken))
        assert process.wait() == -signal.SIGKILL
        assert not (broken / "t.csv").exists()
    code, out, _ = run(*command(broken))
    assert (code, out) == (0, "")  # only the tables were left to do
    assert content(broken) == content(whole)
    assert len([name for name in content(whole) if name.startswith("crops/")]) >= 4


@pytest.mark.slow
def test_interrupted_run_goes_on(run, start, album, tmp_path):
    command = [album, "--csv", tmp_path / "t.csv"]
    process = start(STOP, "SIGINT", 1, "clip_emotions_timeline.png", detect_emotions.__file__, *command)
    assert (process.communicate()[1], process.returncode) == ("interrupted\n", 130)
    assert not (tmp_path / "t.csv").exists()
    assert labelled(run(*command)[1]) == ["clip.mp4"]
    assert run(album, "--csv", tmp_path / "u.csv", "--json")[0] == 0
    assert (tmp_path / "t.csv").read_bytes() == (tmp_path / "u.csv").read_bytes()


# --- summary ---


def test_summary_has_a_row_for_each_photo_and_track(run, album, tmp_path):
    assert run(SAMPLE, album, "--summary", tmp_path / "s.csv", "--out-dir", tmp_path)[0] == 0
    sample, a, _, clip, wall = rows_of(tmp_path / "s.csv")
    assert (sample["faces"], sample["track"], sample["emotion"], sample["changes"]) == ("4", "", "happy", "")
    assert (float(sample["share_happy"]), float(sample["share_sad"])) == (0.5, 0.5)
    assert (a["faces"], float(a[f"share_{a['emotion']}"]), a["first"]) == ("1", 1, "")
    assert (clip["track"], clip["changes"]) == ("1", "0")  # it came back
    assert int(clip["faces"]) / 25 == pytest.approx(float(clip["seconds"])) == pytest.approx(1.6, abs=0.25)
    assert (float(clip["first"]), float(clip["last"])) == (0, 2.4)
    assert (wall["faces"], wall["emotion"]) == ("0", "")
    [track] = rows_of(tmp_path / "clip_emotions_tracks.csv")
    assert track == clip
    probs = [float(row["prob"]) for row in rows_of(tmp_path / "clip_emotions.csv")]
    assert float(clip["prob"]) == pytest.approx(np.mean(probs), abs=1e-4)


# --- crops ---


def crops_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def test_crops_are_what_the_classifier_sees_in_folders_by_emotion(run, album, classifier, tmp_path):
    assert run(album, "--save-crops", tmp_path / "crops", "--csv", tmp_path / "t.csv")[0] == 0
    listed = rows_of(tmp_path / "crops" / "crops.csv")
    assert sorted(row["crop"] for row in listed) == crops_in(tmp_path / "crops")
    rows = {(row["file"], row["frame"]): row for row in rows_of(tmp_path / "t.csv")}
    for crop in listed:
        frame = crop["frame"] if crop["file"].endswith("mp4") else ""
        row = rows[crop["file"], frame]
        path = tmp_path / "crops" / crop["crop"]
        name = f"{Path(crop['file']).stem}_{crop['frame']}_{crop['track']}.png"
        assert (path.name, path.parent.name) == (name, row["emotion"])
        with Image.open(path) as image:
            assert (image.mode, image.width) == ("RGB", image.height)
            probs = classifier.predict_crops([image.convert("RGB")])[0]
        if not frame:  # of a video they are smoothed
            expected = [float(row[f"prob_{name}"]) for name in classifier.classes]
            np.testing.assert_allclose(probs, expected, atol=0.03)


def test_crops_of_a_video_come_at_most_once_a_second_and_not_twice_alike(run, people, tmp_path):
    frames = []
    for i in range(75):
        frames.append(Image.new("RGB", (320, 180), "gray"))
        frames[-1].paste(people[i // 25].rotate(0 if i < 50 else 20), (70, 0))
    write_video(tmp_path / "clip.mp4", [*frames, *frames[:25]])
    shutil.copy(tmp_path / "clip.mp4", tmp_path / "same.mp4")
    assert run(tmp_path, "--save-crops", tmp_path / "crops", "--no-video")[0] == 0
    numbers = [row["frame"] for row in rows_of(tmp_path / "crops" / "crops.csv")]
    assert len(numbers) == 3
    assert all(row["file"].endswith("clip.mp4") for row in rows_of(tmp_path / "crops" / "crops.csv"))


def test_crops_in_an_input_folder_do_not_become_inputs(run, album):
    options = ("--recursive", "--save-crops", album / "crops")
    run(album, *options)
    made = crops_in(album / "crops")
    code, out, err = run(album, *options)
    assert (code, out, "made by this program" in err) == (0, "", True)
    assert crops_in(album / "crops") == made
    assert "finished before (--overwrite does it again) 4" in err


def test_crops_of_inputs_of_one_name_are_kept_apart(run, people, tmp_path):
    for name, person in (("one/x.png", 0), ("two/x.png", 1), ("two/x.bmp", 2)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        people[person].save(tmp_path / name)
    run(tmp_path / "one", tmp_path / "two", "--save-crops", tmp_path / "crops")
    names = {Path(name).name for name in crops_in(tmp_path / "crops")}
    assert names == {"one_x.png_0_1.png", "two_x.bmp_0_1.png", "two_x.png_0_1.png"}


def test_crop_that_would_replace_a_file_of_others_needs_overwrite(run, people, tmp_path):
    photo, crops = tmp_path / "x.png", tmp_path / "crops"
    people[0].save(photo)
    run(photo, "--save-crops", crops)
    [name] = crops_in(crops)
    people[1].save(crops / name)
    before = (crops / name).read_bytes()
    photo.touch()
    code, _, err = run(photo, "--save-crops", crops)
    assert (code, (crops / name).read_bytes()) == (1, before)
    assert err.startswith(f"error: {crops / name} does not say that this program wrote it; --overwrite ")
    assert run(photo, "--save-crops", crops, "--overwrite")[0] == 0
    assert (crops / name).read_bytes() != before


def test_crop_of_a_face_whose_label_changed_goes(run, people, tmp_path):
    crops = tmp_path / "crops"
    for number in (0, 1):
        people[number].save(tmp_path / f"{number}.png")
    run(tmp_path, "--save-crops", crops, "--emotions", "happy", "surprised")
    before = crops_in(crops)
    people[0].save(crops / "happy" / "mine.png")
    run(tmp_path, "--save-crops", crops, "--emotions", "angry", "sad", "--overwrite")
    after = crops_in(crops)
    assert sorted(Path(name).name for name in after) == sorted([*(Path(n).name for n in before), "mine.png"])
    assert {name.partition("/")[0] for name in after if "mine" not in name} <= {"angry", "sad"}


def test_crops_that_cannot_be_written_are_found_before_the_work(run, album, tmp_path):
    (tmp_path / "crops").touch()
    code, out, err = run(album, "--save-crops", tmp_path / "crops")
    assert (code, out) == (1, "")
    assert err == f"error: cannot write {tmp_path / 'crops' / 'crops.csv'}: Not a directory"
    assert not list(album.glob("*_emotions*"))


def test_list_of_crops_of_another_program_is_replaced_only_by_overwrite(run, people, tmp_path):
    photo, crops = tmp_path / "x.png", tmp_path / "crops"
    people[0].save(photo)
    crops.mkdir()
    for others in ("name,phone\nAda,1\n", "file,person\na,1\n"):
        (crops / "crops.csv").write_text(others)
        code, out, err = run(photo, "--save-crops", crops)
        assert (code, out, (crops / "crops.csv").read_text()) == (1, "", others)
        assert err.startswith(f"error: {crops / 'crops.csv'} does not say that this program wrote it; ")
    assert run(photo, "--save-crops", crops, "--overwrite")[0] == 0
    assert [row["file"] for row in rows_of(crops / "crops.csv")] == [str(photo)]


def test_faceless_photos_do_not_have_the_crops_read_again_and_again(run, tmp_path, monkeypatch):
    for number in range(5):
        Image.new("RGB", (90, 60), "gray").save(tmp_path / f"{number}.png")
    read, rows = [], Table.rows
    monkeypatch.setattr(Table, "rows", lambda table: read.append(table) or rows(table))
    assert run(tmp_path, "--save-crops", tmp_path / "crops")[0] == 0
    assert len(read) == 2  # before the first photo, and for the table


def test_unsure_faces_give_no_crops(run, album, tmp_path):
    run(album, "--save-crops", tmp_path / "crops", "--unsure", 1)
    assert crops_in(tmp_path / "crops") == []
    assert rows_of(tmp_path / "crops" / "crops.csv") == []


def test_camera_has_rows_a_summary_and_crops(run, album, tmp_path):
    tables = (
        "--csv",
        tmp_path / "t.csv",
        "--summary",
        tmp_path / "s.csv",
        "--save-crops",
        tmp_path / "crops",
    )
    options = ("--camera", album / "clip.mp4", *tables)
    for again in ((), ("--overwrite",)):
        assert run(*options, "--out-dir", tmp_path / "out", *again)[0] == 0
        stem = detect_emotions.camera_name(str(album / "clip.mp4"))
        assert {row["file"] for row in rows_of(tmp_path / "t.csv")} == {stem}
        assert len(rows_of(tmp_path / "s.csv")) == 1
        assert crops_in(tmp_path / "crops")[0].split("/")[1].startswith(f"{stem}_0_1")


def test_recording_of_a_camera_is_replaced_only_by_overwrite(run, album, tmp_path):
    camera = ("--camera", album / "clip.mp4", "--end", 0.5)
    recording, table = ("--out-dir", tmp_path / "out"), ("--json", "--csv", tmp_path / "t.csv")
    for options in (recording, table):
        assert run(*camera, *options)[0] == 0
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
        code, out, err = run(*camera, *options)
        assert (code, out) == (1, "")
        assert err.endswith(" does not come again; --overwrite replaces it, or name another place")
        assert {path: path.read_bytes() for path in before} == before
        assert run(*camera, *options, "--overwrite")[0] == 0
