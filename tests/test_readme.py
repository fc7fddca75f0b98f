"""Every command of the README runs, in order, as printed, with a tiny network and with the real one.

The commands build on each other. The long ones run on a small cut of the data.
"""

import io
import itertools
import lzma
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_resnet
import torch
import torchvision
from conftest import FIVE, ROOT, write_checkpoint
from PIL import Image
from test_detect_video import write_video

import download_data
import model as shared

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    for line in block.replace("\\\n", "").splitlines()
]
# Of the table of wishes too; they need what the blocks make.
COMMANDS += re.findall(r"`(python \w+\.py [^`]+)`", README)
INSTALLS = [command for command in COMMANDS if "venv" in command]
STAGES = [command for command in COMMANDS if command.startswith("python ")]
SCRIPTS = sorted({shlex.split(command)[1] for command in STAGES})
EXAMPLES = {
    script: re.findall(r"^    (python .*)$", (ROOT / script).read_text(), re.MULTILINE) for script in SCRIPTS
}
SHOWN = list(dict.fromkeys([*STAGES, *itertools.chain(*EXAMPLES.values())]))
DOWNLOADS = [command for command in SHOWN if "download_data.py" in command]  # these need the web

OWN_CLASSES = ("attentive", "bored", "confused")
SPLITS = ("Training", "PublicTest", "PrivateTest")
VOTES = "neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"

# What is added so that a stage takes seconds.
SMOKE = {
    "unpack_fer_data.py": [],
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


def make_fer(target, votes_target):
    """Write 20 rows of stand-ins for each label in each split, and FER+'s votes for them."""
    random, rows = np.random.default_rng(0), itertools.product(SPLITS, range(7), range(20))
    with target.open("w") as table, votes_target.open("w") as votes:
        table.write("emotion,pixels,Usage\n")
        votes.write(f"Usage,Image name,{VOTES}\n")
        for number, (split, label, _) in enumerate(rows):
            pixels = random.integers(0, 256, 48 * 48)
            table.write(f"{label},{' '.join(map(str, pixels))},{split}\n")
            counts = ["10" if i == label else "0" for i in range(10)]
            votes.write(f"{split},fer{number:07}.png,{','.join(counts)}\n")


def make_photos(folder):
    """Write noise for ImageNet, four people with each emotion's name, and a video of one of them."""
    random = np.random.default_rng(0)
    for number in range(6):
        (folder / "data" / "imagenet" / f"class {number}").mkdir(parents=True)
        noise = Image.fromarray(random.integers(0, 256, (5, 5, 3), np.uint8))
        noise.resize((90, 70)).save(folder / "data" / "imagenet" / f"class {number}" / "0.jpg")
    with Image.open(folder / "resources" / "sample.jpg") as montage:
        people = [montage.crop((x, y, x + 480, y + 480)) for x in (0, 480) for y in (0, 480)]
    for label, name in enumerate(FIVE):
        (folder / "data" / "google" / name).mkdir(parents=True)
        for number, person in enumerate(people):  # heads aslant: no face is another's near-duplicate
            person.rotate(12 * (label - 2)).save(folder / "data" / "google" / name / f"{number}.jpg")
    write_video(folder / "clip.mp4", [people[0]] * 5)


def copy_photos(folder, real_data):
    """Copy a few real photos of each kind, and a video."""
    for path in shared.list_images(real_data / "imagenet-sample", limit=6):
        (folder / "data" / "imagenet" / path.parent.name).mkdir(parents=True)
        shutil.copy(path, folder / "data" / "imagenet" / path.parent.name)
    for emotion in FIVE:
        (folder / "data" / "google" / emotion).mkdir(parents=True)
        for path in shared.list_images(real_data / "scraped" / emotion, limit=5):
            shutil.copy(path, folder / "data" / "google" / emotion)
    shutil.copy(real_data / "video" / "single_face.mp4", folder / "clip.mp4")


def copy_own_photos(folder):
    """Copy some of these photos to where the README's page on own classes has them."""
    for own, emotion in zip(OWN_CLASSES, FIVE, strict=False):
        for data_dir in ("mine", "mine_test"):
            shutil.copytree(folder / "data" / "google" / emotion, folder / "data" / data_dir / own)


@pytest.fixture(scope="module", params=["tiny", pytest.param("real", marks=pytest.mark.slow)])
def checkout(request, tmp_path_factory):
    """Lay out what a user brings: stand-ins and a tiny network, or real data and torchvision's download.

    Returns:
        The folder, and the options that choose the network of the first stage.
    """
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "resources", folder / "resources")
    (folder / "holiday" / "first day").mkdir(parents=True)
    shutil.copy(folder / "resources" / "sample.jpg", folder / "holiday" / "first day")
    tables = [folder / name for name in ("fer2013.csv", "fer2013new.csv")]
    if request.param == "tiny":
        make_photos(folder)
        copy_own_photos(folder)
        make_fer(*tables)
        net = shared.gray_resnet(tiny_resnet.ARCH, 5)
        write_checkpoint(folder / "resources" / "emotion_resnet50.pt", net, FIVE)
        torch.save(shared.color_resnet(tiny_resnet.ARCH).state_dict(), folder / "teacher.pth")
        return folder, ["--arch", tiny_resnet.ARCH, "--teacher-weights", "teacher.pth"]
    real_data = request.getfixturevalue("real_data")
    copy_photos(folder, real_data)
    copy_own_photos(folder)
    cut_fer(real_data / "fer2013.csv.xz", real_data / "ferplus.csv", *tables)
    kept = folder / "torch" / "hub" / "checkpoints"
    kept.mkdir(parents=True)
    name = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    torch.save(torch.load(real_data / "resnet50_imagenet.pth", weights_only=True), kept / name)
    return folder, []


def test_ci_runs_the_two_commands_as_printed_and_the_slow_tests():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    one, other = [command for command in INSTALLS if "requirements.txt" in command]
    assert one.endswith("detect_emotions.py resources/sample.jpg --out-dir runs/labelled")
    assert other.endswith("-m pytest")
    assert {one, f"{other} --all"} <= set(ci)


def test_the_readme_shows_every_script():
    assert set(SCRIPTS) == {*SMOKE, "download_data.py"}
    assert len(README.splitlines()) <= 250


@pytest.fixture
def run_script(monkeypatch):
    """Run a script as Python does, but in this process; return its exit code or what it dies of."""

    def run_script(name, *args):
        monkeypatch.setattr(sys, "argv", [name, *args])
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as stop:
            return stop.code or 0
        return 0

    return run_script


@pytest.mark.parametrize("command", [command for command in SHOWN if command not in DOWNLOADS])
def test_a_command_of_the_readme_or_of_a_scripts_help_runs(
    checkout, command, run_script, monkeypatch, capsys
):
    folder, network = checkout
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    _, script, *options = shlex.split(command)
    added = SMOKE[script] + (network if script == "finetune_gray_imagenet.py" else [])
    assert run_script(script, *options, *added) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert "Traceback" not in err


@pytest.mark.parametrize("command", DOWNLOADS)
def test_a_download_of_the_readme_or_of_its_help_has_right_options(command):
    assert download_data.parse_args(shlex.split(command)[2:]).set in download_data.SETS


@pytest.mark.slow
def test_the_stages_follow_each_other_by_their_defaults(run_script, tmp_path, monkeypatch, capsys):
    """From an empty folder; photos lie where stage 2 puts them. Who sets a size sets it for what follows."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "resources", "resources", ignore=shutil.ignore_patterns("*.pt"))
    make_photos(tmp_path)
    make_fer(tmp_path / "fer2013.csv", tmp_path / "fer2013new.csv")
    torch.save(shared.color_resnet(tiny_resnet.ARCH).state_dict(), "teacher.pth")
    network = ["--arch", tiny_resnet.ARCH, "--teacher-weights", "teacher.pth"]
    for script, *options in (
        ["unpack_fer_data.py", "fer2013.csv"],
        ["finetune_gray_imagenet.py", *network, "--epochs", "1", "--image-size", "32"],
        ["finetune_fer.py", "--epochs", "1", "--image-size", "48"],
        ["finetune_emotion.py", "--epochs", "1", "--max-loss", "100"],
        ["detect_emotions.py", "clip.mp4", "--model", "runs/emotion/best.pt"],
    ):
        assert run_script(script, *options) == 0
    sizes = [
        shared.load_checkpoint(Path("runs", stage, "best.pt"))["image_size"] for stage in ("fer", "emotion")
    ]
    assert sizes == [48, 48]
    assert {"clip_emotions.mp4", "data", "runs"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("script", [*SMOKE, "download_data.py emotions", "download_data.py imagenet"])
def test_help_explains_every_option(script, run_script, capsys):
    assert run_script(*script.split(), "--help") == 0
    options = re.findall(r"^  (--[\w-]+)(.*?)(?=^  --|\Z)", capsys.readouterr().out, re.MULTILINE | re.DOTALL)
    assert options
    for name, text in options:
        assert len(text.split()) > 3, f"{name} is not explained"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_ends_with_two_examples(script, run_script, capsys):
    assert run_script(script, "--help") == 0
    *_, title, first, second = capsys.readouterr().out.rstrip().splitlines()
    assert title == "examples:"
    assert [first.strip(), second.strip()] == EXAMPLES[script]


@pytest.mark.parametrize(
    ("kind", "line"),
    [("full", "error: cannot write to standard output: No space left on device\n"), ("without reader", "")],
)
def test_help_that_cannot_be_written_is_one_line_and_exit_code_1(kind, line, start):
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full, open(writing, "w") as pipe:  # noqa: PTH123
        stdout = full if kind == "full" else pipe
        process = start(
            "detect_emotions.py", "--help", stdout=stdout, env={**os.environ, "PYTHONUNBUFFERED": ""}
        )
    assert (process.stderr.read(), process.wait()) == (line, 1)


def test_the_python_of_the_readme_gives_the_numbers_of_csv(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code, of_summary = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    names = {}
    exec(code, names)
    csv_path, summary_path = tmp_path / "faces.csv", tmp_path / "summary.csv"
    tables = ("--csv", csv_path, "--summary", summary_path)
    assert run("resources/sample.jpg", "--out-dir", tmp_path, *tables)[0] == 0
    capsys.readouterr()
    exec(of_summary.replace("runs/holiday/summary.csv", str(summary_path)), {"pandas": pd})
    assert "resources/sample.jpg    0.5" in capsys.readouterr().out
    table = pd.read_csv(csv_path)
    drawn = names["faces"].to_csv(index=False)
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(drawn)), table)
    columns = [f"prob_{name}" for name in names["classifier"].classes]
    probs = sorted(map(tuple, names["probs"].round(4).tolist()))
    assert np.allclose(probs, sorted(map(tuple, table[columns].to_numpy())), atol=1e-4)


def test_every_image_of_the_readme_is_there():
    images = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert images
    assert all((ROOT / image).is_file() for image in images)


def test_help_waits_for_no_large_package():
    """It is imported by the functions that use it: importing all scripts loads none of them."""
    scripts = ", ".join(sorted(path.stem for path in ROOT.glob("*.py")))
    large = ("torch", "torchvision", "openvino", "av", "cv2", "pandas", "matplotlib", "selenium", "scipy")
    code = f"import sys, {scripts}; print(*[name for name in {large} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "\n"
