"""The face finder beside facenet-pytorch's, and both networks' engines beside torch."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from facenet_pytorch import MTCNN
from PIL import Image

import model as shared

NO_OPENVINO = "no OpenVINO; pip install -r requirements.txt"


def overlap_shares(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (N, 4) and others (M, 4): (N, M)."""
    starts = np.maximum(boxes[:, None, :2], others[None, :, :2])
    common = (np.minimum(boxes[:, None, 2:], others[None, :, 2:]) - starts).clip(0).prod(2)
    areas, other_areas = ((part[:, 2:] - part[:, :2]).prod(1) for part in (boxes, others))
    return common / (areas[:, None] + other_areas - common)


def load(path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


@pytest.fixture(scope="module")
def sample(sample_photo) -> Image.Image:
    return load(sample_photo)


@pytest.fixture(scope="module")
def faces(finder, sample) -> shared.Faces:
    return finder.find(sample)


@pytest.fixture
def cache(load_networks_anew, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "emotion-detector"


def assert_same(ours: shared.Faces, others: shared.Faces, pixels: float = 0.1, prob: float = 1e-3) -> None:
    """Compare faces, from left to right: two may be about as sure."""
    assert len(ours.boxes) == len(others.boxes)
    ours, others = (
        shared.Faces(*(part[np.argsort(found.boxes[:, 0])] for part in found)) for found in (ours, others)
    )
    np.testing.assert_allclose(ours.boxes, others.boxes, atol=pixels)
    np.testing.assert_allclose(ours.landmarks, others.landmarks, atol=pixels)
    np.testing.assert_allclose(ours.probs, others.probs, atol=prob)


# --- faces ---


def compare_with_facenet(finder, photos):
    """Count facenet-pytorch's sure faces, those of them that `finder` finds, and its own sure ones."""
    reference = MTCNN(keep_all=True, min_face_size=20)
    num_sure = num_found = num_ours = 0
    for photo in photos:
        boxes, probs, landmarks = reference.detect(photo, landmarks=True)
        if boxes is None:
            boxes, probs, landmarks = np.empty((0, 4)), np.empty(0), np.empty((0, 5, 2))
        is_sure = np.asarray(probs, float) >= 0.95
        found = finder.find(photo)
        num_ours += (found.probs >= 0.95).sum()
        for box, points in zip(boxes[is_sure], landmarks[is_sure], strict=True):
            num_sure += 1
            shares = overlap_shares(box[None], found.boxes)[0]
            if shares.max(initial=0) >= 0.7:
                num_found += 1
                off = np.abs(found.landmarks[shares.argmax()] - points).max()
                assert off < 0.25 * max(box[2] - box[0], box[3] - box[1])
    return num_sure, num_found, num_ours


def test_finds_facenets_faces_on_the_sample(finder, sample):
    assert compare_with_facenet(finder, [sample]) == (4, 4, 4)


@pytest.mark.slow
def test_finds_facenets_faces_on_real_photos(finder, real_data):
    """The bars of tests/benchmark_faces.py, which takes all photos and frames of video."""
    names = ("18f_pif-group.jpg", "18f_roth-selfie.jpg", "astronaut.png", "grace_hopper.jpg", "no-faces.jpg")
    num_sure, num_found, num_ours = compare_with_facenet(
        finder, [load(real_data / "photos" / name) for name in names]
    )
    assert num_sure > 100
    assert num_found >= 0.98 * num_sure
    assert num_ours <= 1.02 * num_sure


@pytest.mark.slow
def test_a_face_at_the_end_of_a_long_panorama_is_found(finder, sample, faces):
    """OpenCV cuts nothing out of an image with a side of 32,767 pixels or more."""
    panorama = Image.new("RGB", (40_000, sample.height))
    panorama.paste(sample, (40_000 - sample.width, 0))
    shares = overlap_shares(faces.boxes + [40_000 - sample.width, 0] * 2, finder.find(panorama).boxes)
    assert (shares.max(1) > 0.8).all()


def test_default_size_finds_the_small_faces_of_groups(real_data):
    finder = shared.FaceFinder()
    assert len(finder.find(load(real_data / "photos" / "18f_roth-selfie.jpg")).boxes) >= 34
    assert len(finder.find(load(real_data / "photos" / "18f_pif-group.jpg")).boxes) >= 64


def test_torch_finds_the_same_faces(faces, sample, monkeypatch, load_networks_anew):
    """Where the first two networks run in bfloat16, faces of 200 pixels differ by one to three."""
    engine = shared.Engine
    monkeypatch.setattr(shared, "Engine", lambda *args, **how: engine(*args, **{**how, "fast": False}))
    in_float32 = shared.FaceFinder(min_face_size=20).find(sample)
    monkeypatch.setitem(sys.modules, "openvino", None)
    by_torch = shared.FaceFinder(min_face_size=20).find(sample)
    assert_same(by_torch, in_float32)
    assert_same(by_torch, faces, pixels=3, prob=3e-3)


@pytest.mark.slow
def test_without_opencv_the_same_faces_are_found(faces, sample_photo):
    """As on a server that lacks the libraries of a screen, which OpenCV wants; Pillow shrinks otherwise."""
    code = f"""
import json, sys
sys.modules["cv2"] = None
import model
found = model.FaceFinder(min_face_size=20).find(model.load_photo({str(sample_photo)!r}))
print(json.dumps(found.boxes.tolist()))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    shares = overlap_shares(faces.boxes, np.array(json.loads(run.stdout)))
    assert shares.shape == (4, 4)
    assert (shares.max(1) > 0.85).all()


def test_find_all_finds_what_find_does_whatever_the_sizes(finder, sample):
    images = [
        sample,
        sample.crop((0, 0, 480, 960)),
        sample.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        Image.new("RGB", (3, 5)),
        sample.crop((480, 0, 960, 960)),
        sample,
    ]
    together = finder.find_all(images)
    assert [len(found.boxes) for found in together] == [4, 2, 4, 0, 2, 4]
    for image, found in zip(images, together, strict=True):
        assert_same(found, finder.find(image))
    assert finder.find_all([]) == []


def test_min_face_size_as_a_share_is_of_the_shorter_side_and_has_a_floor(sample):
    tall = sample.crop((0, 0, 480, 960))  # its faces are about 170 and 250 pixels wide
    by_pixels, by_share = (shared.FaceFinder(min_face_size=size).find(tall) for size in (240, 0.5))
    assert_same(by_pixels, by_share)
    small = sample.resize((120, 120))
    assert_same(
        *(shared.FaceFinder(min_face_size=size).find(small) for size in (shared.MIN_FACE_PIXELS, 0.001))
    )


@pytest.mark.parametrize("of_smaller", [False, True])
@pytest.mark.parametrize("count", [0, 1, 600])
def test_is_distinct_keeps_what_looking_at_one_box_after_another_keeps(count, of_smaller):
    random = np.random.default_rng(0)
    starts, sides = random.random((count, 2)) * 100, 10 + random.random((count, 1)) * 30
    boxes = np.hstack([starts, starts + sides])
    areas, kept = (sides**2).ravel(), []
    for i, box in enumerate(boxes):
        others = boxes[kept]
        common = (np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])).clip(0).prod(1)
        whole = np.minimum(areas[i], areas[kept]) if of_smaller else areas[i] + areas[kept] - common
        if not (common > shared.SAME_FACE * whole).any():
            kept.append(i)
    assert np.flatnonzero(shared.is_distinct(boxes, of_smaller)).tolist() == kept
    assert count < 2 or len(kept) < count


@pytest.mark.parametrize("size", [0, -1, 1, 11])
def test_min_face_size_below_the_window_is_refused(size):
    with pytest.raises(ValueError, match="12 pixels or more nor a share below 1"):
        shared.FaceFinder(min_face_size=size)


def test_min_prob_is_obeyed_below_the_cascades_own_threshold(sample):
    turned = sample.rotate(70)  # of the faces that lie on their side it is less sure
    low, high = (
        shared.FaceFinder(min_face_size=40, min_prob=least).find(turned).probs for least in (0.3, 0.7)
    )
    assert 0.3 <= min(low) < 0.7 <= min(high)
    assert len(high) < len(low)


def test_refine_answers_each_box_in_order(finder, faces, sample):
    wall = np.array([[450, 5, 520, 75]], np.float32)
    boxes = np.concatenate([faces.boxes[[2]], wall, faces.boxes[[0, 0]]])
    refined = finder.refine(sample, boxes)
    assert [part.shape for part in refined] == [(4, 4), (4,), (4, 5, 2)]
    assert {part.dtype for part in refined} == {np.dtype(np.float32)}
    assert (overlap_shares(refined.boxes, faces.boxes)[[0, 2, 3], [2, 0, 0]] > 0.75).all()
    assert (refined.probs[[0, 2, 3]] > 0.9).all()
    assert refined.probs[1] < 0.5
    assert [len(part) for part in finder.refine(sample, boxes[:0])] == [0, 0, 0]


@pytest.mark.parametrize("direction", [(1, 0), (-1, 0), (0, 1), (0, -1)])
def test_refine_follows_a_face_that_moved_by_a_sixth(finder, faces, sample, direction):
    sides = (faces.boxes[:, 2:] - faces.boxes[:, :2]).max(1, keepdims=True)
    moved = faces.boxes + np.tile(direction, 2) * sides / 6
    refined = finder.refine(sample, moved)
    shares = np.diag(overlap_shares(refined.boxes, faces.boxes))
    assert (shares > 0.75).all()
    assert (refined.probs > 0.9).all()


def test_refine_takes_boxes_that_left_the_image(finder, sample):
    refined = finder.refine(sample, np.array([[-90, -90, -10, -10], [950, 950, 1100, 1100]], np.float32))
    assert np.isfinite(refined.boxes).all()
    assert (refined.probs < 0.9).all()


# --- inference ---


def test_predict_agrees_with_torch(faces, sample, monkeypatch, load_networks_anew):
    probs = shared.Classifier(shared.DEFAULT_MODEL, "cpu").predict(sample, faces.boxes)
    monkeypatch.setitem(sys.modules, "openvino", None)
    expected = shared.Classifier(shared.DEFAULT_MODEL, "cpu").predict(sample, faces.boxes)
    # Up to 0.03 of 2,479 faces where the CPU computes in bfloat16, else 1e-6.
    np.testing.assert_allclose(probs, expected, atol=0.05)

    checkpoint = shared.load_checkpoint(shared.DEFAULT_MODEL)
    network = shared.load_network(checkpoint).eval()
    crops = shared.crop_faces(sample, faces.boxes, checkpoint["crop_margin"])
    grays = [torch.tensor(np.asarray(crop.convert("L")))[None, None] for crop in crops]
    with torch.inference_mode():
        logits = network(
            torch.cat([shared.normalize_faces(gray, checkpoint["image_size"]) for gray in grays])
        )
    default = [checkpoint["classes"].index(name) for name in checkpoint["default_classes"]]
    probs = (logits[:, default] / checkpoint["temperature"]).softmax(1)
    np.testing.assert_allclose(expected, probs, atol=1e-3)


def test_predict_all_splits_one_batch_by_image(faces, sample, classifier):
    mirrored = sample.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    boxes = [faces.boxes, faces.boxes[:0], faces.boxes[1:3]]
    probs = classifier.predict_all([sample, sample, mirrored], boxes)
    assert [part.shape for part in probs] == [(4, 5), (0, 5), (2, 5)]
    np.testing.assert_allclose(probs[0], classifier.predict(sample, boxes[0]), atol=0.01)
    np.testing.assert_allclose(probs[2], classifier.predict(mirrored, boxes[2]), atol=0.01)
    assert classifier.predict_all([], []) == []


class Small(torch.nn.Module):
    """A network of two outputs, as the finder's have."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 2)

    def forward(self, images):
        features = self.conv(images.permute(0, 3, 1, 2).float() / 255).mean((2, 3))
        return features, self.fc(features).softmax(1)


def test_engine_runs_more_than_a_batch_and_none():
    torch.manual_seed(0)
    example = torch.zeros(2, 24, 24, 3, dtype=torch.uint8)
    engine = shared.Engine(
        "small", b"seed 0", lambda: shared.Blueprint(Small(), example, {"name": "small"}), "cpu"
    )
    assert engine.notes["name"] == "small"
    crops = np.random.default_rng(0).integers(0, 256, (2 * shared.BATCH_SIZES[-1] + 5, 24, 24, 3), np.uint8)
    shifts, probs = engine(crops)
    one_by_one = [engine(crop[None]) for crop in crops]
    np.testing.assert_allclose(shifts, np.concatenate([shift for shift, _ in one_by_one]), atol=1e-5)
    np.testing.assert_allclose(probs, np.concatenate([prob for _, prob in one_by_one]), atol=1e-5)
    assert [part.shape for part in engine(crops[:0])] == [(0, 4), (0, 2)]


def test_cached_engines_answer_as_fresh_ones_without_converting(faces, sample, cache, monkeypatch):
    openvino = pytest.importorskip("openvino", reason=NO_OPENVINO)
    assert_same(shared.FaceFinder(min_face_size=20).find(sample), faces)
    fresh = shared.Classifier(shared.DEFAULT_MODEL, "cpu").predict(sample, faces.boxes)
    assert len(list(cache.iterdir())) == 4
    monkeypatch.delattr(openvino, "convert_model")
    assert_same(shared.FaceFinder(min_face_size=20).find(sample), faces)
    again = shared.Classifier(shared.DEFAULT_MODEL, "cpu").predict(sample, faces.boxes)
    np.testing.assert_allclose(again, fresh, atol=1e-5)


@pytest.mark.slow
def test_detection_with_cached_engines_loads_neither_torch_nor_telemetry(
    faces, sample, sample_photo, tmp_path
):
    pytest.importorskip("openvino", reason=NO_OPENVINO)
    shared.Classifier(shared.DEFAULT_MODEL, "cpu")
    code = f"""
import sys, detect_emotions
detect_emotions.main([{str(sample_photo)!r}, "--out-dir", {str(tmp_path)!r}])
unwanted = ("torch", "torchvision", "facenet_pytorch", "openvino_telemetry")
print(*(name for name in unwanted if sys.modules.get(name)), file=sys.stderr)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "\n")
    assert run.stdout.count("\n") == 4


@pytest.mark.parametrize("pattern", ["*.xml", "*.blob"])
@pytest.mark.parametrize(
    "damage", [lambda blob: b"", lambda blob: blob[:-9], lambda blob: blob[:99] + b"x" * 9]
)
def test_damaged_cache_is_made_again(faces, sample, cache, pattern, damage):
    pytest.importorskip("openvino", reason=NO_OPENVINO)
    shared.FaceFinder(min_face_size=20)
    paths = list(cache.rglob(pattern))
    assert len(paths) == 3
    for path in paths:
        path.chmod(0o644)
        path.write_bytes(damage(path.read_bytes()))
    assert_same(shared.FaceFinder(min_face_size=20).find(sample), faces)
    assert_same(shared.FaceFinder(min_face_size=20).find(sample), faces)


def test_cache_forgets_its_own_that_were_not_used_for_long(cache):
    pytest.importorskip("openvino", reason=NO_OPENVINO)
    shared.FaceFinder(min_face_size=20)
    [pnet] = cache.glob("pnet-*")
    old, earlier, foreign = (
        cache / "pnet-0123456789abcdef",
        cache / "onet-0123456789abcdef.bin",
        cache / "mine.bin",
    )
    old.mkdir()
    for path in (old / "network.xml", earlier, foreign):
        path.touch()
    for path in (pnet, old, earlier, foreign):
        os.utime(path, (0, 0))
    shared.FaceFinder(min_face_size=20)  # uses what is kept
    shutil.rmtree(next(cache.glob("rnet-*")))
    shared.FaceFinder(min_face_size=20)  # keeps one more
    assert pnet.is_dir()
    assert foreign.exists()
    assert not old.exists()
    assert not earlier.exists()


def test_cache_keeps_the_networks_of_the_four_models_that_were_used_last(cache):
    pytest.importorskip("openvino", reason=NO_OPENVINO)
    for age, number in enumerate("654321"):
        for name in ("classifier", "pnet"):
            (cache / f"{name}-{number * 16}").mkdir(parents=True)
            os.utime(cache / f"{name}-{number * 16}", (time.time() - 60 * age, time.time() - 60 * age))
    shared.FaceFinder(min_face_size=20)  # keeps one of PNet, and none of the classifier
    assert {path.name[-1] for path in cache.glob("classifier-*")} == set("6543")
    assert len(list(cache.glob("pnet-*"))) == 4
    assert not (cache / f"pnet-{16 * str(3)}").exists()


def test_cache_that_cannot_be_written_is_one_line_and_no_error(faces, sample, cache, capsys):
    pytest.importorskip("openvino", reason=NO_OPENVINO)
    cache.write_text("a file where the folder belongs")
    assert_same(shared.FaceFinder(min_face_size=20).find(sample), faces)
    assert cache.is_file()
    line = f"networks cannot be kept in {cache} (File exists), so each start takes some seconds more\n"
    assert capsys.readouterr().err == line


def test_what_another_process_keeps_meanwhile_is_left_and_no_error(cache, capsys):
    pytest.importorskip("openvino", reason=NO_OPENVINO)
    kept = []

    def build():
        return shared.Blueprint(Small(), torch.zeros(2, 24, 24, 3, dtype=torch.uint8), {})

    def build_slowly():
        shared.Engine("small", b"", build, "cpu")  # as the other does
        kept.extend((path, path.stat().st_ino) for path in cache.glob("small-*"))
        return build()

    shared.Engine("small", b"", build_slowly, "cpu")
    assert [(path, path.stat().st_ino) for path in cache.iterdir()] == kept
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_user_without_a_home_can_detect(start, sample_photo, tmp_path):
    pytest.importorskip("openvino", reason=NO_OPENVINO)
    code = (
        "import os; os.environ.pop('HOME'); os.getuid = lambda: 2**31; import detect_emotions as d; d.main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    process = start("-c", code, sample_photo, "--out-dir", tmp_path, env=environment)
    out, err = process.communicate()
    assert (process.returncode, out.count("\n"), err.count("\n")) == (0, 4, 1)
    assert "networks cannot be kept" in err


@pytest.mark.parametrize("pattern", ["emotion-detector", "*/small-*", "*/small-*/network.bin"])
def test_what_other_users_could_have_written_is_not_loaded_but_made_again(cache, pattern):
    pytest.importorskip("openvino", reason=NO_OPENVINO)
    built = []

    def build():
        built.append("once more")
        return shared.Blueprint(Small(), torch.zeros(2, 24, 24, 3, dtype=torch.uint8), {})

    shared.Engine("small", b"", build, "cpu")
    shared.Engine("small", b"", build, "cpu")
    assert len(built) == 1
    [path] = cache.parent.glob(pattern)
    path.chmod(0o777)
    shared.Engine("small", b"", build, "cpu")
    shared.Engine("small", b"", build, "cpu")
    assert len(built) == 2
    assert {path.stat().st_mode & 0o077 for path in (cache, *cache.rglob("*"))} == {0}
