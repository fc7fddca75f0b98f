"""Measure finding and classifying faces beside the original way: facenet-pytorch, a 224-pixel ResNet-50.

Both sides take turns, so that a change of the machine's mood meets both; times are medians, ratios are
medians over the turns. Photos and videos that are not there are left out.

Usage: python tests/benchmark_faces.py [--repeats 7] [--photos DIR] [--videos DIR] [--skip-same-faces]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torchvision
from facenet_pytorch import MTCNN
from PIL import Image

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
import model as shared  # noqa: E402
from detect_emotions import overlaps  # noqa: E402

MIN_FACE_SIZE = 20  # facenet-pytorch's default, for both sides
PHOTOS = (
    "18f_roth-selfie.jpg",
    "montage4_registry_only.jpg",
    "18f_renata.jpg",
)  # 1024, 960, 1999 pixels wide
NUM_FRAMES = 200


def take_turns(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Time the sides in turns after a warm-up each; return medians in ms and the ratio of first to last."""
    times = {name: [] for name in sides}
    for run in sides.values():
        run()
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    turns = list(zip(*times.values(), strict=True))
    ratio = statistics.median(turn[0] / turn[-1] for turn in turns)
    return {**{name: statistics.median(values) for name, values in times.items()}, "ratio": ratio}


def original_way(path: Path, mtcnn: MTCNN, network: torch.nn.Module) -> list[int]:
    """Read a photo, find its faces and classify them one by one at 224 pixels."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    boxes, _ = mtcnn.detect(image)
    answers = []
    for box in boxes if boxes is not None else ():
        crop = image.crop(tuple(box)).convert("L").resize((224, 224))
        with torch.no_grad():
            inputs = torch.from_numpy(np.asarray(crop)[None, None] / np.float32(255))
            answers.append(int(network(inputs).argmax()))
    return answers


def our_way(path: Path, finder: shared.FaceFinder, classifier: shared.Classifier) -> np.ndarray:
    """Do the same with this project."""
    image = shared.open_picture(path)
    return classifier.predict(image, finder.find(image).boxes)


def images_of(photos: Path, videos: Path) -> Iterator[tuple[str, Image.Image]]:
    """Give all photos, and NUM_FRAMES frames evenly spread over the videos, each with its file's name."""
    for path in sorted(photos.glob("*.[jp][pn]g")):
        yield path.name, shared.open_picture(path)
    clips = sorted(videos.glob("*.mp4"))
    if not clips:
        return
    import av

    for path in clips:
        with av.open(str(path)) as clip:
            frames = [frame.to_image() for frame in clip.decode(video=0)]
        yield from ((path.name, frame) for frame in shared.spread(frames, NUM_FRAMES // len(clips)))


def compare_faces(
    images: Iterator[tuple[str, Image.Image]], mtcnn: MTCNN, finder: shared.FaceFinder
) -> dict[str, float]:
    """Count facenet-pytorch's faces of probability 0.95 and more, those found again, and this project's."""
    counts = {"images": 0, "reference": 0, "found": 0, "ours": 0}
    for _, image in images:
        boxes, probs = mtcnn.detect(image)
        boxes = np.empty((0, 4)) if boxes is None else boxes[probs >= 0.95].astype(float)
        ours = finder.find(image)
        common = overlaps(boxes, ours.boxes)
        areas, own_areas = ((part[:, 2:] - part[:, :2]).prod(1) for part in (boxes, ours.boxes))
        shares = (common / (areas[:, None] + own_areas - common)).max(1, initial=0)
        new = (len(boxes), (shares >= 0.7).sum(), (ours.probs >= 0.95).sum())
        for name, count in zip(counts, (1, *new), strict=True):
            counts[name] += int(count)
    return {
        **counts,
        "recall": counts["found"] / counts["reference"],
        "excess": counts["ours"] / counts["reference"] - 1,
    }


def start_to_first_photo() -> float:
    """Time detect_emotions.py on the sample, the whole process, in s."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "detect_emotions.py", "resources/sample.jpg", "--out-dir", folder]
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return time.perf_counter() - start


def main() -> None:
    """Print a line for each part, then JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--photos", type=Path, default=DATA / "photos")
    parser.add_argument("--videos", type=Path, default=DATA / "video")
    parser.add_argument("--skip-same-faces", action="store_true", help="leave out the longest part")
    args = parser.parse_args()
    packages = ("torch", "openvino", "facenet-pytorch", "pillow", "numpy")
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    report = {"commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()}
    report |= {"threads": torch.get_num_threads(), **{name: version(name) for name in packages}}
    print(*(f"{key} {value}" for key, value in report.items()), sep=", ")

    cpu = torch.device("cpu")
    mtcnn = MTCNN(keep_all=True, min_face_size=MIN_FACE_SIZE)
    network = torchvision.models.resnet50(weights=None).eval()
    network.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    finder, by_default = shared.FaceFinder(cpu, MIN_FACE_SIZE), shared.FaceFinder(cpu)
    classifier = shared.Classifier(shared.DEFAULT_MODEL, cpu)
    by_torch = shared.load_network(shared.load_checkpoint(shared.DEFAULT_MODEL)).eval()

    paths = [ROOT / "resources" / "sample.jpg", *(args.photos / name for name in PHOTOS)]
    for path in filter(Path.exists, paths):
        image = shared.open_picture(path)
        sides = {
            "mtcnn": lambda image=image: mtcnn.detect(image),
            "ours": lambda image=image: finder.find(image),
        }
        timing = take_turns(sides, args.repeats)
        report[f"find {path.name}"] = timing
        print(
            f"find {path.name}: {timing['mtcnn']:.0f} -> {timing['ours']:.0f} ms, {timing['ratio']:.2f} times"
        )
        sides = {
            "original": lambda path=path: original_way(path, mtcnn, network),
            "ours": lambda path=path: our_way(path, by_default, classifier),
        }
        timing = take_turns(sides, args.repeats)
        report[f"pipeline {path.name}"] = timing
        before, after, ratio = timing["original"], timing["ours"], timing["ratio"]
        print(f"pipeline {path.name}: {before:.0f} -> {after:.0f} ms, {ratio:.2f} times")

    sample = shared.open_picture(paths[0])
    box = finder.find(sample).boxes[:1]
    report["refine one face, ms"] = take_turns({"ours": lambda: finder.refine(sample, box)}, 9)["ours"]
    print(f"refine one face: {report['refine one face, ms']:.2f} ms")

    crops = 2 * shared.crop_faces(sample, finder.find(sample).boxes, 0.0)
    grays = torch.zeros(len(crops), 1, shared.IMAGE_SIZE, shared.IMAGE_SIZE)

    @torch.inference_mode()
    def run_torch() -> None:
        by_torch(grays)

    timing = take_turns({"torch": run_torch, "ours": lambda: classifier.predict_crops(crops)}, args.repeats)
    report["classify 8 faces"] = timing
    print(f"classify, ms a face at batch 8: torch {timing['torch'] / 8:.2f}, ours {timing['ours'] / 8:.2f}")

    start_to_first_photo()
    report["start, s"] = statistics.median(start_to_first_photo() for _ in range(5))
    print(f"start to first labelled photo, second run: {report['start, s']:.2f} s")

    if args.photos.is_dir() and not args.skip_same_faces:
        same = compare_faces(images_of(args.photos, args.videos), mtcnn, finder)
        report["same faces"] = same
        print(
            f"same faces: {same['found']} of {same['reference']} found ({same['recall']:.2%}), "
            f"{same['ours']} by us ({same['excess']:+.2%}), in {same['images']} images"
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
