"""Measure what an architecture and input size cost: ms a face when labelling, images/s when training.

Weights are random, for they cost the same. Labelling is `Classifier.predict_crops` on eight faces, as
detect_emotions.py runs it; training is forward, backward and optimizer step on batches of 64. What the
settings that were trained reach is in the README.

Usage: python tests/benchmark_classifier.py [--archs resnet18 resnet50] [--image-sizes 64 96] [--repeats 5]
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from benchmark_training import time_bare_steps
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import model as shared

NUM_FACES = 8


def median_time(run: Callable[[], object], repeats: int) -> float:
    """Time `run` after a warm-up; return the median in s."""
    times = []
    run()
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Print a line for each setting, then JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--archs", nargs="+", choices=shared.ARCHS, default=["resnet18", "resnet34", "resnet50"]
    )
    parser.add_argument("--image-sizes", nargs="+", type=int, default=[48, 64, 96, 112])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    shared.add_options(parser, device="auto")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = shared.pick_device(args.device)
    faces = [Image.effect_noise((100, 100), 50) for _ in range(NUM_FACES)]
    results = {}
    cache = tempfile.TemporaryDirectory()
    os.environ["XDG_CACHE_HOME"] = cache.name  # the user's has no use for networks of random weights
    for arch in args.archs:
        for size in args.image_sizes:
            net = shared.gray_resnet(arch, len(shared.EMOTIONS))
            run = shared.Run(Path(cache.name), "fer", arch, shared.EMOTIONS, shared.EMOTIONS, size, 0.0, {})
            run.save_best(net, [{"epoch": 1}])
            classifier = shared.Classifier(Path(cache.name) / "best.pt", device)
            seconds = median_time(partial(classifier.predict_crops, faces), args.repeats)
            net = net.to(device, memory_format=torch.channels_last)
            batch = torch.rand(64, 1, size, size, device=device), torch.arange(64, device=device) % 5
            time_bare_steps(net, *batch, steps=1)  # warm-up
            speed = statistics.median(time_bare_steps(net, *batch, args.steps) for _ in range(args.repeats))
            results[f"{arch} {size}"] = {"ms_a_face": 1e3 * seconds / NUM_FACES, "train_images_per_s": speed}
            print(
                f"{arch} {size} px: {1e3 * seconds / NUM_FACES:.2f} ms a face, training {speed:.0f} images/s",
                flush=True,
            )
    machine = {"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({**machine, "repeats": args.repeats, "results": results}))


if __name__ == "__main__":
    main()
