import json
import shutil

import pytest
import torch
from PIL import Image

import finetune_emotion
import model as shared


@pytest.fixture
def photos_dir(tmp_path, sample_photo):
    """Two photos of one face for each of two emotions, and some that are of no use."""
    folder = tmp_path / "google"
    with Image.open(sample_photo) as montage:
        quarters = [montage.crop((x, y, x + 480, y + 480)) for y in (0, 480) for x in (0, 480)]
    for name, faces in (("angry", quarters[2:]), ("happy", quarters[:2])):
        (folder / name).mkdir(parents=True)
        for i, face in enumerate(faces):
            face.save(folder / name / f"{i}.jpg")
    (folder / "angry" / "more").mkdir()
    (folder / "angry" / "1.jpg").rename(folder / "angry" / "more" / "1.jpg")
    shutil.copy(sample_photo, folder / "angry" / "four_faces.jpg")
    Image.new("RGB", (200, 200), "gray").save(folder / "happy" / "empty.png")
    (folder / "happy" / "page.jpg").write_text("<html>")
    return folder


@pytest.fixture
def fer_checkpoint(tmp_path):
    torch.manual_seed(0)
    about = {
        "arch": "resnet18",
        "classes": ["angry", "happy"],
        "image_size": 32,
        "crop_margin": 0.1,
        "config": {},
    }
    save = shared.checkpoint_writer(tmp_path, stage="fer", **about)
    save("fer", shared.gray_resnet("resnet18", 2), [{"epoch": 1, "val_acc": 0.5, "temperature": 1.5}])
    return tmp_path / "fer.pt"


def test_single_faces_are_cut_and_the_last_stage_learns(tmp_path, photos_dir, fer_checkpoint, capsys):
    options = [
        "--data-dir",
        str(photos_dir),
        "--faces-dir",
        str(tmp_path / "faces"),
        "--init",
        str(fer_checkpoint),
    ]
    options += ["--image-size", "32", "--epochs", "2", "--val-fraction", "0.5", "--batch-size", "4"]
    finetune_emotion.main([*options, "--out-dir", str(tmp_path / "run")])
    assert "7 photos: 4 cut, 1 several faces, 1 no face, 1 not readable" in capsys.readouterr().out
    faces = sorted((tmp_path / "faces").rglob("*.png"))
    assert [str(path.relative_to(tmp_path / "faces")) for path in faces] == [
        *("angry/0.jpg.png", "angry/more/1.jpg.png", "happy/0.jpg.png", "happy/1.jpg.png")
    ]
    with Image.open(faces[0]) as face:
        assert (face.mode, face.size) == ("L", (96, 96))
    start, last = shared.load_checkpoint(fer_checkpoint), shared.load_checkpoint(tmp_path / "run" / "last.pt")
    changed = {
        name.split(".")[0] for name, value in last["model"].items() if not value.equal(start["model"][name])
    }
    assert changed == {"layer4", "fc"}
    assert last["classes"] == ["angry", "happy"]
    assert last["crop_margin"] == 0.1
    for report in ("before", "val"):
        assert json.loads((tmp_path / "run" / f"{report}.json").read_text())["n"] == 2
    shutil.rmtree(tmp_path / "run")
    finetune_emotion.main([*options, "--out-dir", str(tmp_path / "run")])
    assert "7 photos: 4 kept from before, " in capsys.readouterr().out


def test_a_missing_emotion_is_one_line(tmp_path, photos_dir, fer_checkpoint):
    shutil.rmtree(photos_dir / "happy")
    with pytest.raises(SystemExit) as stop:
        finetune_emotion.main(["--data-dir", str(photos_dir), "--init", str(fer_checkpoint)])
    assert f"no images in {photos_dir / 'happy'}" in stop.value.code
