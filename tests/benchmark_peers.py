"""Find faces with this project and with other packages, side by side: how fast, and how many.

Each finder runs in a process of its own, and those that want packages of their own have an environment in
--envs, made by the first run (3 GB). All have their own defaults, this project the smallest face of
facenet-pytorch. They look at one image after the other, each time in another order, so that a change of the
machine's mood meets all. The first turn warms up.

Two boxes are one face if their IoU is 0.3 or more. Nobody marked the faces in these images: a face counts if
finders of two families have it, so that a network and its copies have one vote. What one family alone has
is a mistake, or a face that only it can see.

OpenCV's YuNet needs its weights, which no package here ships: --yunet face_detection_yunet_2023mar.onnx.
libfacedetection is its authors' own program, with the weights compiled in.

Usage: python tests/benchmark_peers.py [--repeats 5] [--envs DIR] [--yunet FILE] [--photos DIR] [--videos DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
SMALL = 40  # pixels, the mean side of a small face's box
MIN_FACE_SIZE = 20  # pixels; facenet-pytorch's default
WITHOUT_FACE = ("no-faces.jpg", "no_face.mp4")

# What makes an input of an RGB array (H, W, 3), which is not timed, and what finds boxes (N, 4), xyxy, in it.
Steps = tuple[Callable[[np.ndarray], object], Callable[[object], object]]


def to_bgr(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image[:, :, ::-1])


def corners(boxes: np.ndarray) -> np.ndarray:
    """Turn boxes left, top, width, height (N, 4) into left, top, right, bottom."""
    boxes = np.array(boxes, float).reshape(-1, 4)
    return np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])


def ours() -> Steps:
    from PIL import Image

    sys.path.insert(0, str(ROOT))
    import model as shared

    finder = shared.FaceFinder("cpu", MIN_FACE_SIZE)
    return Image.fromarray, lambda image: finder.find(image).boxes


def facenet() -> Steps:
    from facenet_pytorch import MTCNN
    from PIL import Image

    finder = MTCNN(keep_all=True, min_face_size=MIN_FACE_SIZE)

    def find(image: Image.Image) -> np.ndarray:
        boxes, _ = finder.detect(image)
        return np.empty((0, 4)) if boxes is None else boxes

    return Image.fromarray, find


def mediapipe(model_selection: int) -> Steps:
    from mediapipe.python.solutions.face_detection import FaceDetection

    finder = FaceDetection(model_selection=model_selection)

    def find(image: np.ndarray) -> np.ndarray:
        found = finder.process(image).detections or ()
        boxes = [face.location_data.relative_bounding_box for face in found]
        height, width, _ = image.shape
        shares = np.array([(box.xmin, box.ymin, box.width, box.height) for box in boxes]).reshape(-1, 4)
        return corners(shares * (width, height, width, height))

    return lambda image: image, find


def libfacedetection() -> Steps:
    import yuface

    return to_bgr, lambda image: corners(yuface.detect(image)[1])


def fer() -> Steps:
    from fer.fer import FER

    finder = FER()
    return to_bgr, lambda image: corners(finder.find_faces(image))


def yunet(weights: str) -> Steps:
    import cv2

    finder = cv2.FaceDetectorYN.create(weights, "", (320, 320))

    def find(image: np.ndarray) -> np.ndarray:
        finder.setInputSize(image.shape[1::-1])
        faces = finder.detect(image)[1]
        return np.empty((0, 4)) if faces is None else corners(faces[:, :4])

    return to_bgr, find


class Finder(NamedTuple):
    """How to start a finder, and what it wants."""

    family: str  # finders of one family share networks
    start: Callable[..., Steps]
    options: tuple[object, ...] = ()
    packages: tuple[str, ...] = ("openvino", "torch")  # whose versions are shown
    env: str | None = None  # None: runs with the packages of this project


MEDIAPIPE = {"packages": ("mediapipe",), "env": "mediapipe"}
FINDERS = {
    "this project": Finder("MTCNN", ours),
    "facenet-pytorch": Finder("MTCNN", facenet, packages=("facenet-pytorch", "torch")),
    "MediaPipe, short range": Finder("BlazeFace", mediapipe, (0,), **MEDIAPIPE),
    "MediaPipe, full range": Finder("BlazeFace", mediapipe, (1,), **MEDIAPIPE),
    "libfacedetection": Finder("YuNet", libfacedetection, packages=("yuface",), env="yuface"),
    "fer": Finder("Haar", fer, packages=("fer", "opencv-contrib-python-headless"), env="fer"),
}
# Arguments of `pip install`, one call each.
INSTALLS = {
    "mediapipe": ["mediapipe==0.10.21"],  # 1.2.3 ships no networks
    "yuface": ["yuface==2023.5.1 numpy==2.4.6"],
    "fer": [  # its own list brings a torch of 2024 with CUDA, and an OpenCV without Haar's cascades
        "tensorflow-cpu==2.21.0 opencv-contrib-python-headless==4.14.0.94 requests==2.34.2 pillow==13.0.0 "
        "setuptools==80.9.0",
        "--no-deps fer==25.10.3",
    ],
}


def serve(finder: Finder) -> None:
    """Print the versions; then, for each path of an image on stdin, the time in ms and the boxes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some packages greet on stdout
    prepare, find = finder.start(*finder.options)
    print(json.dumps({name: version(name) for name in finder.packages}), file=answers, flush=True)
    for line in sys.stdin:
        image = prepare(np.load(line.rstrip("\n")))
        start = time.perf_counter()
        boxes = find(image)
        time_ms = 1e3 * (time.perf_counter() - start)
        print(json.dumps([time_ms, np.asarray(boxes, float).tolist()]), file=answers, flush=True)


class Process:
    """A finder at work in another process."""

    def __init__(self, name: str, python: Path, options: list[str]):
        """Start it.

        Raises:
            RuntimeError: it does not work here.
        """
        self.story = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, open as long as it works
        command = [python, __file__, "--serve", name, *options]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.story}
        self.process = subprocess.Popen(command, text=True, bufsize=1, **pipes)
        self.versions = self.answer()

    def answer(self) -> object:
        """Read a line of JSON."""
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.story.seek(0)
        raise RuntimeError((self.story.read().strip() or "it says nothing").splitlines()[-1])

    def find(self, path: Path) -> tuple[float, np.ndarray]:
        """Return the time in ms and the boxes (N, 4)."""
        print(path, file=self.process.stdin, flush=True)
        time_ms, boxes = self.answer()
        return time_ms, np.array(boxes).reshape(-1, 4)


def install(env: Path) -> Path:
    """Make an environment, or complete it; return its Python.

    Raises:
        RuntimeError: it cannot be made.
    """
    python = env / "bin" / "python"
    commands = [[sys.executable, "-m", "venv", env]]
    commands += [[python, "-m", "pip", "install", "-q", *line.split()] for line in INSTALLS[env.name]]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    return python


def start_all(envs: Path, options: list[str]) -> dict[str, Process]:
    """Start the finders; say which cannot be had."""
    processes = {}
    for name, finder in FINDERS.items():
        try:
            python = install(envs.absolute() / finder.env) if finder.env else Path(sys.executable)
            processes[name] = Process(name, python, options)
            print(name, *(f"{key} {value}" for key, value in processes[name].versions.items()), sep=", ")
        except RuntimeError as error:
            print(f"{name} is left out: {error}", flush=True)
    return processes


def group_faces(found: dict[str, np.ndarray]) -> list[tuple[float, set[str]]]:
    """Join finders' boxes (N, 4) in one image; return the size of each face, and who found it."""
    from detect_emotions import match_boxes

    boxes, owners = np.empty((0, 4)), []
    for name, own in found.items():
        pairs = match_boxes(own, boxes)
        for old in pairs.values():
            owners[old].add(name)
        new = [i for i in range(len(own)) if i not in pairs]
        boxes = np.concatenate([boxes, own[new]])
        owners += [{name} for _ in new]
    sizes = (boxes[:, 2:] - boxes[:, :2]).mean(1)
    return list(zip(sizes.tolist(), owners, strict=True))


def count_faces(names: list[str], found: list[dict[str, np.ndarray]]) -> tuple[dict, dict[str, dict]]:
    """Count the faces that two families have, and what each finder has of them and beside them.

    Args:
        names: of the file that each image is from.
        found: boxes (N, 4) by finder, for each image.
    """
    all_faces = {"large": 0, "small": 0}
    counts = {name: dict.fromkeys(("large", "small", "alone", "without"), 0) for name in found[0]}
    for file, boxes in zip(names, found, strict=True):
        for size, owners in group_faces(boxes):
            kind = "small" if size < SMALL else "large"
            if len({FINDERS[name].family for name in owners}) == 1:
                kind = "alone"
            else:
                all_faces[kind] += 1
            for name in owners:
                counts[name][kind] += 1
                counts[name]["without"] += file in WITHOUT_FACE
    return all_faces, counts


def measure(
    processes: dict[str, Process], images: list[tuple[str, object]], repeats: int
) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """Show all images to all finders; return ms (repeats, images, finders), and for each image the boxes."""
    times = np.empty((repeats, len(images), len(processes)))
    found = [{} for _ in images]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.npy" for i in range(len(images))]
        for path, (_, image) in zip(paths, images, strict=True):
            np.save(path, np.asarray(image))
        columns, shuffle = list(enumerate(processes.items())), random.Random(0).shuffle
        for turn in range(-1, repeats):
            print(f"turn {turn + 1} of {repeats}", file=sys.stderr, flush=True)
            for i, path in enumerate(paths):
                shuffle(columns)  # nobody always comes after the same
                for column, (name, process) in columns:
                    time_ms, boxes = process.find(path)
                    if turn < 0:
                        found[i][name] = boxes
                    else:
                        times[turn, i, column] = time_ms
    return times, [{name: boxes[name] for name in processes} for boxes in found]


def main() -> None:
    """Print a line for each finder, then JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = ROOT.parent / "shared" / "data"
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--photos", type=Path, default=data / "photos")
    parser.add_argument("--videos", type=Path, default=data / "video")
    parser.add_argument("--envs", type=Path, default=ROOT / "runs" / "peers", help="where packages go")
    parser.add_argument("--yunet", metavar="FILE", help="weights of OpenCV's YuNet, ONNX")
    parser.add_argument("--serve", choices=[*FINDERS, "OpenCV's YuNet"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.yunet:
        FINDERS["OpenCV's YuNet"] = Finder("YuNet", yunet, (args.yunet,), ("opencv-python",))
    if args.serve:
        serve(FINDERS[args.serve])
        return
    sys.path.insert(0, str(ROOT))
    from benchmark_faces import images_of

    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    report = {"commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()}
    report |= {"python": platform.python_version(), "cpus": os.cpu_count(), "repeats": args.repeats}
    images = list(images_of(args.photos, args.videos))
    names = [name for name, _ in images]
    is_frame = np.array([name.endswith(".mp4") for name in names])
    kinds = {kind: which for kind, which in {"photo": ~is_frame, "frame": is_frame}.items() if which.any()}
    report |= {f"{kind}s": int(which.sum()) for kind, which in kinds.items()}
    print(*(f"{key} {value}" for key, value in report.items()), sep=", ")
    processes = start_all(args.envs, ["--yunet", args.yunet] if args.yunet else [])
    if not args.yunet:
        print("OpenCV's YuNet is left out: no package ships its weights; see --yunet")
    times, found = measure(processes, images, args.repeats)
    faces, counts = count_faces(names, found)
    print("ms: median (min to max) of the turns, mean over the images; faces: those that two families have")
    for column, (name, process) in enumerate(processes.items()):
        report[name] = {**process.versions, **counts[name]}
        for kind, which in kinds.items():
            median, least, most = (
                np.quantile(times[:, which, column], (0.5, 0, 1), axis=0).mean(1).round(1).tolist()
            )
            report[name][f"ms a {kind}"] = {"median": median, "min": least, "max": most}
            print(f"{name:22} {median:7.1f} ms a {kind} ({least:.1f} to {most:.1f})")
        shares = ", ".join(f"{counts[name][kind]} of {faces[kind]} {kind} faces" for kind in faces)
        alone, without = counts[name]["alone"], counts[name]["without"]
        print(f"{name:22} {shares}, {alone} that no other family has, {without} where no face is")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
