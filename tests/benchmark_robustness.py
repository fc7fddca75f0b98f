"""How accurate a model stays when faces are cut, turned, lit or stored badly.

A fixed sample of FER's test faces, evenly spread over the classes' lists, is harmed in one way at a time, and
classified by `Classifier.predict_crops` as detect_emotions.py does.

Usage:
    python tests/benchmark_robustness.py --data-dir data/fer
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import model as shared  # noqa: E402


def place(
    image: np.ndarray, zoom: float = 1, shift: tuple[float, float] = (0, 0), degrees: float = 0
) -> np.ndarray:
    """Scale, move (shares of the side) and turn a face; the border's pixels fill what lacks."""
    side = len(image)
    matrix = cv2.getRotationMatrix2D(((side - 1) / 2, (side - 1) / 2), degrees, zoom)
    matrix[:, 2] += np.multiply(shift, side)
    return cv2.warpAffine(
        image, matrix, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """Scale a face down, as if it stood small in a photo."""
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)


def as_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Store a face as JPEG and read it again."""
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)


def brighten(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiply the pixels, clipped to 0-255."""
    return (image * factor).clip(0, 255).astype(np.uint8)


HARMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": lambda image: image,
    **{
        f"margin {share:.0%}": lambda image, s=share: place(image, 1 / (1 + s))
        for share in (0.1, 0.2, 0.3, 0.4)
    },
    **{
        f"shift 10 % {name}": lambda image, s=shift: place(image, shift=s)
        for name, shift in {"left": (-0.1, 0), "right": (0.1, 0), "up": (0, -0.1), "down": (0, 0.1)}.items()
    },
    **{f"turned {angle:+d} degrees": lambda image, a=angle: place(image, degrees=a) for angle in (-15, 15)},
    **{f"{side} px": lambda image, s=side: shrink(image, s) for side in (32, 24)},
    "JPEG quality 30": lambda image: as_jpeg(image, 30),
    **{f"brightness {share:+.0%}": lambda image, s=share: brighten(image, 1 + s) for share in (-0.4, 0.4)},
}


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data/fer"), help="of unpack_fer_data.py")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--model", type=Path, default=shared.DEFAULT_MODEL)
    parser.add_argument("--limit", type=int, default=1000, help="faces of the sample")
    shared.add_options(parser, device="auto")
    return parser.parse_args()


def main() -> None:
    """Print a table of accuracies, and as the last line JSON."""
    args = parse_args()
    classifier = shared.Classifier(args.model, shared.pick_device(args.device))
    images, labels, _ = shared.load_faces(args.data_dir, args.split, classifier.classes, limit=args.limit)
    accuracies = {}
    for name, harm in HARMS.items():
        crops = [Image.fromarray(harm(image[0].numpy())) for image in images]
        probs = np.concatenate(
            [classifier.predict_crops(crops[i : i + 64]) for i in range(0, len(crops), 64)]
        )
        accuracies[name] = float((probs.argmax(1) == labels.numpy()).mean())
        print(
            f"{name:20} {accuracies[name]:7.2%}  {accuracies[name] - accuracies['as it is']:+7.2%}",
            flush=True,
        )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    about = {"n": len(labels), "split": args.split, "model": str(args.model), "torch": torch.__version__}
    print(json.dumps({**about, "cpu": platform.processor(), "commit": commit, "accuracy": accuracies}))


if __name__ == "__main__":
    main()
