"""Measure a folder of photos: how long it takes from start to end, and how many cores are busy.

The whole job is a process of its own: start, reading, finding, classifying, drawing and writing. Without a
folder of yours it is the sample photo, several times over. With --against another checkout of this project
labels the same photos in turn with this one, and the ratio is that of the medians. The first run of each, in
which networks are converted, does not count.

Usage: python tests/benchmark_folder.py [--photos DIR] [--count 140] [--repeats 5] [--against CHECKOUT]
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import model as shared  # noqa: E402


def label(checkout: Path, photos: Path) -> tuple[float, float, float]:
    """Label a folder in a process of its own; return its time, s, busy cores, and peak memory, MB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, checkout / "detect_emotions.py", photos, "--out-dir", folder]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{command} failed")
    return seconds, (usage.ru_utime + usage.ru_stime) / seconds, usage.ru_maxrss / 1000  # Linux counts KiB


def main() -> None:
    """Print a line each run, medians, and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, default=ROOT / "resources" / "sample.jpg", help="folder")
    parser.add_argument("--count", type=int, default=140, help="photos, those of the folder in turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    args = parser.parse_args()
    found = [args.photos] if args.photos.is_file() else sorted(args.photos.iterdir())
    found = [path for path in found if path.suffix.lower() in shared.picture_suffixes()]
    checkouts = {"this": ROOT, **({"other": args.against} if args.against else {})}
    runs = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.count):
            shutil.copy(found[i % len(found)], Path(folder, f"{i:05}{found[i % len(found)].suffix}"))
        for turn in range(args.repeats + 1):
            for name, checkout in checkouts.items():
                figures = label(checkout, Path(folder))
                if turn:
                    runs[name].append(figures)
                    print("{}: {:.2f} s, {:.2f} cores busy, {:.0f} MB".format(name, *figures), flush=True)
    medians = {name: [statistics.median(each) for each in zip(*runs[name], strict=True)] for name in runs}
    for name, (seconds, busy, memory) in medians.items():
        print(
            f"median of {args.repeats}, {args.count} photos, {name}: {seconds:.2f} s, {busy:.2f} cores busy, "
            f"{memory:.0f} MB"
        )
    if args.against:
        print(f"other / this: {medians['other'][0] / medians['this'][0]:.2f}")
    versions = {"python": platform.python_version(), "openvino": version("openvino")}
    print(json.dumps({**versions, "cpus": os.cpu_count(), "photos": args.count, "medians": medians}))


if __name__ == "__main__":
    main()
