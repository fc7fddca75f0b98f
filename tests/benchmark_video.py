"""Measure videos: frames/s of the whole job, and whether memory grows with the length.

The whole job is a process of its own: decoding, finding, following, classifying, smoothing, drawing,
encoding and writing; its start-up, measured on one frame, is taken off. The clip is a portrait of the sample
photo that sways in a 640x360 video, or a video of yours. Memory is the process's peak over a clip of ten
seconds and over one of ten minutes, the packets of the former repeated.

Usage: python tests/benchmark_video.py [--video clip.mp4] [--repeats 5] [--no-memory]
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
RATE, SECONDS, REPEATS_OF_CLIP = 25, 10, 60
MODES = {
    "followed": [],
    "each frame searched and classified": ["--every", "1", "--search-every", "0"],
}


def write_clip(path: Path) -> None:
    """Write ten seconds of a portrait that sways over a gray wall, 640x360, H.264."""
    with Image.open(ROOT / "resources" / "sample.jpg") as image:
        portrait = image.crop((0, 0, 440, 480)).resize((275, 300))
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=RATE, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for i in range(SECONDS * RATE):
            frame = Image.new("RGB", (640, 360), "gray")
            frame.paste(portrait, (round(180 + 100 * math.sin(i / 20)), 40))
            output.mux(stream.encode(av.VideoFrame.from_image(frame)))
        output.mux(stream.encode(None))


def repeat_clip(source: Path, path: Path, times: int) -> None:
    """Write a video's pictures several times over, without encoding them anew."""
    with av.open(str(path), "w") as output, av.open(str(source)) as first:
        video = first.streams.video[0]
        stream = output.add_stream_from_template(video)
        for turn in range(times):
            with av.open(str(source)) as container:
                for packet in container.demux(container.streams.video[0]):
                    if packet.size:
                        packet.pts += turn * video.duration
                        packet.dts += turn * video.duration
                        packet.stream = stream
                        output.mux(packet)


def label(video: Path, *options: str) -> tuple[float, float]:
    """Label a video in a process of its own; return the time it takes, s, and its peak memory, MB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "detect_emotions.py", video, "--out-dir", folder, *options]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1000  # Linux counts KiB


def main() -> None:
    """Print a line each repeat, medians, and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--video", type=Path, help="to measure the speed on (default: made from the sample)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="leave out the ten minutes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        write_clip(clip)
        video = args.video or clip
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            num_frames, size = stream.frames, f"{stream.width}x{stream.height}"
        figures = {}
        for mode, options in MODES.items():
            rates = []
            for _ in range(args.repeats):
                start_up, _ = label(video, "--end", "0.001", *options)
                whole, _ = label(video, *options)
                rates.append((num_frames - 1) / (whole - start_up))
                print(f"{mode}: {rates[-1]:.1f} frames/s, start-up {start_up:.1f} s", flush=True)
            figures[mode] = statistics.median(rates)
        if not args.no_memory:
            long = Path(folder) / "long.mp4"
            repeat_clip(clip, long, REPEATS_OF_CLIP)
            peaks = {"10 s": label(clip)[1], "10 min": label(long)[1]}
            print("peak memory: " + ", ".join(f"{peak:.0f} MB for {name}" for name, peak in peaks.items()))
            figures |= {f"peak MB of {name}": peak for name, peak in peaks.items()}
    for mode in MODES:
        print(f"median of {args.repeats}, {size}, {num_frames} frames, {mode}: {figures[mode]:.1f} frames/s")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "av": av.__version__}
    print(json.dumps({**versions, "cpus": os.cpu_count(), "size": size, "frames": num_frames, **figures}))


if __name__ == "__main__":
    main()
