"""Real data, and small checkpoints of the real kinds, for all tests."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import detect_emotions
import model as shared

ROOT = Path(__file__).parent.parent
# FER2013, ImageNet and photos are too big or not free to ship; a checkout that has them has them here.
REAL_DATA = ROOT.parent / "shared" / "data"

# The networks here are so small that threads wait more than they work, most of all beside other processes.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# What the tests compile is of no use to the user; it goes when they end.
CACHE = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = CACHE.name


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real data in {REAL_DATA}")
    return REAL_DATA


@pytest.fixture(scope="session")
def sample_photo() -> Path:
    return ROOT / "resources" / "sample.jpg"


@pytest.fixture
def gray_checkpoint(tmp_path: Path) -> Path:
    """Write a gray checkpoint as stage 1 does, of a resnet18 with random weights."""
    torch.manual_seed(0)
    path = tmp_path / "gray" / "best.pt"
    path.parent.mkdir()
    save = shared.checkpoint_writer(
        path.parent, stage="gray", arch="resnet18", classes=[], image_size=64, crop_margin=0.0, config={}
    )
    save("best", shared.gray_resnet("resnet18", 0), [{"epoch": 1, "cosine": 1.0}])
    return path


def make_faces(folder: Path, per_class: int, classes: tuple[str, ...] = shared.EMOTIONS) -> Path:
    """Write learnable stand-ins for faces: 48 px gray, each class with its own bright bar on noise."""
    generator = torch.Generator().manual_seed(len(folder.parts) + per_class)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = torch.randint(0, 100, (48, 48), generator=generator, dtype=torch.uint8)
            pixels[label * 9 : label * 9 + 9] += 150
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i:05}.png")
    return folder


@pytest.fixture
def fer_dir(tmp_path: Path) -> Path:
    """Write train, val and test as unpack_fer_data.py does, with stand-ins for faces."""
    for split, per_class in (("train", 16), ("val", 5), ("test", 6)):
        make_faces(tmp_path / "fer" / split, per_class)
    return tmp_path / "fer"


@pytest.fixture
def run(capsys):
    """Run detect_emotions.py and return its exit code, stdout and stderr."""

    def run(*args):
        code, message = 0, ""
        try:
            detect_emotions.main([str(arg) for arg in args])
        except SystemExit as stop:
            code, message = (1, stop.code) if isinstance(stop.code, str) else (stop.code, "")
        captured = capsys.readouterr()
        return code, captured.out, captured.err + message

    return run
