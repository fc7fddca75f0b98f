"""Every command of the README runs, in order, as printed; the long ones on a small cut of real data."""

import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torchvision
from conftest import ROOT

import model as shared

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    for line in block.replace("\\\n", "").splitlines()
]
INSTALLS = [command for command in COMMANDS if "venv" in command]
STAGES = [command for command in COMMANDS if command.startswith("python ")]

# What is added so that a stage takes seconds. A download asks only whether its options are right.
SMOKE = {
    "unpack_fer_data.py": [],
    "download_data.py": ["--help"],
    "finetune_gray_imagenet.py": ["--limit", "4", "--epochs", "1", "--image-size", "32"],
    "finetune_fer.py": ["--limit", "20", "--epochs", "1", "--image-size", "32"],
    "finetune_emotion.py": ["--epochs", "1", "--image-size", "32", "--max-loss", "100"],
    "detect_emotions.py": [],
}


def cut_fer(source, votes_source, target, votes_target):
    """Keep the first 20 rows of each label in each split, and FER+'s for them."""
    kept = Counter()
    with lzma.open(source, "rt") as rows, votes_source.open() as votes:
        pairs = list(zip(rows, votes, strict=True))
    with target.open("w") as cut, votes_target.open("w") as cut_votes:
        for row, vote in pairs:
            kind = (row[0], row.rstrip().rsplit(",", 1)[1])
            kept[kind] += 1
            if kept[kind] <= 20:
                cut.write(row)
                cut_votes.write(vote)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, real_data):
    """Lay out a fresh checkout with what a user brings, and torchvision's weights in its download folder."""
    folder = tmp_path_factory.mktemp("checkout")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    shutil.copytree(ROOT / "resources", folder / "resources")
    tables = ("fer2013.csv", "fer2013new.csv")
    cut_fer(real_data / "fer2013.csv.xz", real_data / "ferplus.csv", *(folder / name for name in tables))
    (folder / "holiday" / "first day").mkdir(parents=True)
    shutil.copy(folder / "resources" / "sample.jpg", folder / "holiday" / "first day")
    shutil.copy(real_data / "video" / "single_face.mp4", folder / "clip.mp4")
    for path in shared.list_images(real_data / "imagenet-sample", limit=6):
        shutil.copy(path, folder)
        (folder / "data" / "imagenet" / path.parent.name).mkdir(parents=True)
        shutil.move(folder / path.name, folder / "data" / "imagenet" / path.parent.name)
    for emotion in shared.EMOTIONS:
        (folder / "data" / "google" / emotion).mkdir(parents=True)
        for path in shared.list_images(real_data / "scraped" / emotion, limit=5):
            shutil.copy(path, folder / "data" / "google" / emotion)
    kept = folder / "torch" / "hub" / "checkpoints"
    kept.mkdir(parents=True)
    name = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    torch.save(torch.load(real_data / "resnet50_imagenet.pth", weights_only=True), kept / name)
    return folder


def test_ci_runs_the_two_commands_as_printed():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    one, other = [command for command in INSTALLS if "requirements.txt" in command]
    assert one.endswith("detect_emotions.py resources/sample.jpg")
    assert other.endswith("-m pytest")
    assert {one, other} <= set(ci)


def test_the_readme_shows_every_script():
    assert {shlex.split(command)[1] for command in STAGES} == set(SMOKE)


@pytest.mark.parametrize("command", STAGES)
def test_a_command_of_the_readme_runs(checkout, command):
    _, script, *options = shlex.split(command)
    run = subprocess.run(
        [sys.executable, script, *options, *SMOKE[script]],
        cwd=checkout,
        env={**os.environ, "TORCH_HOME": str(checkout / "torch")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "script",
    sorted({*SMOKE, "download_data.py emotions", "download_data.py imagenet"} - {"download_data.py"}),
)
def test_help_explains_every_option(script):
    run = subprocess.run(
        [sys.executable, *script.split(), "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0
    options = re.findall(r"^  (--[\w-]+)(.*?)(?=^  --|\Z)", run.stdout, re.MULTILINE | re.DOTALL)
    assert options
    for name, text in options:
        assert len(text.split()) > 3, f"{name} is not explained"


def test_every_image_of_the_readme_is_there():
    images = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert images
    assert all((ROOT / image).is_file() for image in images)
