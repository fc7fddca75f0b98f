import hashlib
import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
import torchvision
from conftest import ROOT
from PIL import Image
from torchvision.transforms import functional as transforms

import finetune_gray_imagenet
import model as shared
from finetune_gray_imagenet import build_student, load_teacher


@pytest.fixture
def teacher_path(tmp_path):
    torch.manual_seed(1)
    path = tmp_path / "tiny_resnet.pth"
    teacher = shared.color_resnet("tiny_resnet").train()
    for _ in range(50):  # BatchNorm learns what is usual, else the embeddings are next to nothing
        teacher(torch.randn(8, 3, 64, 64))
    torch.save(teacher.state_dict(), path)
    return path


@pytest.fixture
def photos_dir(tmp_path):
    folder = tmp_path / "imagenet"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(10):
        coarse = torch.randint(0, 256, (5, 5, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(coarse.numpy()).resize((90, 70), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    return folder


def embed(teacher, images):
    return torch.nn.Sequential(*list(teacher.eval().children())[:-1])(images).flatten(1)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50_v1"])
@pytest.mark.parametrize("size", [64, 97])
def test_folded_student_equals_the_teacher_on_gray_images_up_to_the_border(arch, size):
    torch.manual_seed(0)
    teacher = shared.color_resnet(arch)
    student = build_student(arch, teacher, "folded").eval()
    gray = torch.rand(2, 1, size, size)
    colors = transforms.normalize(gray.expand(-1, 3, -1, -1), shared.COLOR_MEAN, shared.COLOR_STD)
    normalized = (gray - shared.GRAY_MEAN) / shared.GRAY_STD
    torch.testing.assert_close(student.conv1(normalized), teacher.conv1(colors), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(student(normalized), embed(teacher, colors), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_folded_student_equals_the_imagenet_teacher_on_real_photos_made_gray(real_data):
    teacher = load_teacher("resnet50_v1", real_data / "resnet50_imagenet.pth")
    student = build_student("resnet50_v1", teacher, "folded").eval()
    paths = shared.list_images(real_data / "imagenet-sample", limit=4)
    gray = shared.load_images(paths, "L", 224)[0].float() / 255
    colors = transforms.normalize(gray.expand(-1, 3, -1, -1), shared.COLOR_MEAN, shared.COLOR_STD)
    with torch.no_grad():
        expected = embed(teacher, colors)
        actual = student((gray - shared.GRAY_MEAN) / shared.GRAY_STD)
    assert expected.max() > 1
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_imagenet_teacher_knows_what_is_on_photos(real_data):
    names = json.loads((real_data / "imagenet_labels.json").read_text())
    paths = shared.list_images(real_data / "imagenet-sample", limit=20)
    labels = torch.tensor([names.index(path.parent.name.split("_", 1)[1]) for path in paths])
    images = shared.load_images(paths, "RGB", 224)[0].float() / 255
    images = transforms.normalize(images, shared.COLOR_MEAN, shared.COLOR_STD)
    with torch.no_grad():
        logits = load_teacher("resnet50_v1", real_data / "resnet50_imagenet.pth").eval()(images)
    assert (logits.argmax(1) == labels).sum() >= 14


def test_distilling_brings_the_student_closer_and_leaves_the_rest_alone(
    tmp_path, photos_dir, teacher_path, capsys
):
    out_dir = tmp_path / "gray"
    options = f"--data-dir {photos_dir} --out-dir {out_dir} --teacher-weights {teacher_path} --image-size 64"
    options += " --arch tiny_resnet --batch-size 4 --epochs 2 --lr 0.001 --stem-init kaiming"
    finetune_gray_imagenet.main(options.split())
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    before, after = (
        [float(word) for word in line[1:]] for line in table if line[:1] in (["kaiming"], ["distilled"])
    )
    assert after[0] < before[0]  # MSE
    assert after[1] > before[1]  # cosine
    checkpoint = shared.load_checkpoint(out_dir / "last.pt", stages=("gray",))
    teacher = torch.load(teacher_path, weights_only=True)
    weights = checkpoint["model"]
    changed = {name for name in weights if name not in teacher or not weights[name].equal(teacher[name])}
    assert changed == {"conv1.weight", "conv1.offset"}
    assert {path.name for path in out_dir.iterdir()} == {
        *("best.pt", "last.pt", "config.json", "log.jsonl", "curves.png")
    }


@pytest.mark.slow
@pytest.mark.parametrize("kill", [(3, "last.pt"), (4, "log.jsonl")])
def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(
    tmp_path, photos_dir, teacher_path, start, kill
):
    options = f"--data-dir {photos_dir} --teacher-weights {teacher_path} --image-size 64 --arch tiny_resnet"
    options = [*options.split(), "--batch-size", "4", "--epochs", "4", "--lr", "0.001", "--out-dir"]
    stop = [ROOT / "tests" / "stop_at.py", "SIGKILL", *kill, "finetune_gray_imagenet.py"]
    assert start(*stop, *options, tmp_path / "killed").wait() == -signal.SIGKILL
    last = tmp_path / "killed" / "last.pt"
    before = shared.load_checkpoint(last)
    finetune_gray_imagenet.main(["--resume", str(last)])
    finetune_gray_imagenet.main([*options, str(tmp_path / "whole")])
    for kept in ("last.pt", "best.pt"):
        one, other = (shared.load_checkpoint(tmp_path / run / kept) for run in ("killed", "whole"))
        assert (before["epoch"], one["epoch"]) == (kill[0] - 1, other["epoch"])
        assert all(value.equal(one["model"][key]) for key, value in other["model"].items())
    assert not one["model"]["conv1.weight"].equal(before["model"]["conv1.weight"])
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("killed", "whole")]
    losses, others = ([json.loads(line)["train_loss"] for line in log] for log in logs)
    assert losses == others


def test_the_teacher_is_found_where_torchvision_keeps_its_downloads(tmp_path, monkeypatch):
    weights = shared.color_resnet("resnet18").state_dict()
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    kept = tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1]
    kept.parent.mkdir(parents=True)
    torch.save(weights, kept)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    teacher = load_teacher("resnet18", None)
    assert teacher.fc.weight.equal(weights["fc.weight"])


def test_weights_that_torch_has_not_kept_are_downloaded_once(tmp_path, monkeypatch):
    got = tmp_path / "got.pth"
    torch.save(shared.color_resnet("resnet18").state_dict(), got)
    url = f"https://example.org/models/resnet18-{hashlib.sha256(got.read_bytes()).hexdigest()[:8]}.pth"
    weights = {"IMAGENET1K_V1": SimpleNamespace(url=url)}
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda arch: weights)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    urlopen, asked = torch.hub.urlopen, []
    monkeypatch.setattr(
        torch.hub, "urlopen", lambda request: asked.append(request.full_url) or urlopen(got.as_uri())
    )
    first, again = (load_teacher("resnet18", None) for _ in range(2))
    assert first.fc.weight.equal(again.fc.weight)
    assert asked == [url]


@pytest.mark.parametrize("broken", ["off", "empty", "page", "list", "other", "on its way"])
def test_a_broken_download_of_the_teacher_is_one_line(tmp_path, monkeypatch, broken):
    """What is there already is not looked at before it is loaded; what comes has to have the right hash."""
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    kept, got = tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1], tmp_path / "got.pth"
    kept.parent.mkdir(parents=True)
    path = got if broken == "on its way" else kept
    torch.save([1] if broken == "list" else {"fc.bias": torch.ones(1000)}, path)
    if broken in {"off", "empty"}:
        os.truncate(path, 500 if broken == "off" else 0)
    elif broken == "page":
        path.write_text("<html>\n")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    urlopen = torch.hub.urlopen
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: urlopen(got.as_uri()))
    says = rf"{kept} is not a state dict of torchvision's resnet18, .* \(delete it to download it again\): "
    if path == got:
        says = r"could not download the weights of resnet18 \(invalid hash value .*--teacher-weights FILE"
    with pytest.raises(ValueError, match=says):
        load_teacher("resnet18", None)
    assert kept.exists() == (path == kept)


def test_two_unreadable_pictures_stop_a_small_run_and_what_macos_writes_does_not(
    tmp_path, photos_dir, teacher_path, capsys
):
    options = f"--data-dir {photos_dir} --teacher-weights {teacher_path} --arch tiny_resnet --image-size 32"
    options = [*options.split(), "--batch-size", "7", "--epochs", "1", "--out-dir"]
    (photos_dir / "._0.jpg").write_bytes(b"\0\x05\x16\x07\0\x02\0\0Mac OS X")
    os.mkfifo(photos_dir / "pipe.jpg")
    finetune_gray_imagenet.main([*options, str(tmp_path / "gray")])  # 8 to learn from: a batch of 7, one of 1
    for name in ("0.jpg", "1.jpg"):
        (photos_dir / name).write_bytes(b"BM" + bytes(100))
    with pytest.raises(SystemExit) as stop:
        finetune_gray_imagenet.main([*options, str(tmp_path / "other")])
    assert stop.value.code.startswith("error: 2 of 10 images are not readable, expected a single one or 1%")
    assert str(photos_dir / "0.jpg") in stop.value.code


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--arch", "resnet50_v1"],
            "torchvision has no weights for resnet50_v1; give them with --teacher-weights",
        ),
        (["--teacher-weights", "none.pth"], "no weights file none.pth"),
        (["--teacher-weights", __file__], "is not a state dict of torchvision's resnet50"),
        (["--device", "mps"], "no mps device"),
        (["--resume", "none.pt"], "no checkpoint none.pt"),
        (["--unfreeze", "layer7"], "no part 'layer7'"),
        (["--unfreeze", "fc"], "nothing in fc can learn"),
        (["--data-dir", "nowhere"], "no images in nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(tmp_path, photos_dir, teacher_path, options, message):
    if "mps" in options and torch.backends.mps.is_available():
        pytest.skip("this machine has mps")
    right = ["--data-dir", str(photos_dir), "--out-dir", str(tmp_path / "gray"), "--image-size", "32"]
    if not any("arch" in option or "weights" in option for option in options):
        right += ["--arch", "tiny_resnet", "--teacher-weights", str(teacher_path)]
    with pytest.raises(SystemExit) as stop:
        finetune_gray_imagenet.main([*right, *options])
    assert message in stop.value.code
    assert "\n" not in stop.value.code


@pytest.mark.parametrize(("number", "message"), [(1, "has 1 image, expected 2"), (3, "are one picture; add")])
def test_photos_of_no_use_are_one_line_before_weights_are_loaded(tmp_path, number, message):
    (tmp_path / "photos").mkdir()
    for name in range(number):
        Image.new("RGB", (64, 64)).save(tmp_path / "photos" / f"{name}.png")
    options = f"--data-dir {tmp_path}/photos --teacher-weights none.pt --out-dir {tmp_path}/run"
    with pytest.raises(SystemExit, match=message):
        finetune_gray_imagenet.main(options.split())
    assert list(tmp_path.iterdir()) == [tmp_path / "photos"]
