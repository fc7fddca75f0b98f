"""Measure how many queries a minute download_data.py makes, the polite delay off, pictures included.

A real Chromium searches an imitation of Google on this machine; each query brings pictures of 800x600 pixels
that are downloaded, decoded, compared and written. Faces are not looked for: that is another measurement.

Usage:
    python tests/benchmark_download.py --queries 20 --limit 20
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from image_server import FakeGoogle, chromium_script, picture, serve

import download_data
import model as shared


def main() -> None:
    """Download, and print the rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shared.HelpFormatter)
    parser.add_argument("--queries", type=int, default=20, metavar="N", help="searches")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="pictures a search")
    args = parser.parse_args()
    labels = list(download_data.read_imagenet_labels())[: args.queries]
    made = {}  # pictures by path, made before the clock starts

    with tempfile.TemporaryDirectory() as folder, serve(lambda h: h.answer(made[h.path])) as pictures:
        fake = FakeGoogle(pictures.url("/photo"))
        for i, label in enumerate(labels):
            for n in range(args.limit):
                url = fake.original(label.replace("_", " "), n)
                made[url.removeprefix(pictures.url(""))] = picture([i, n], (800, 600))
        with serve(fake, tls=True) as google:
            chromium_script(Path(folder, "chromium"), shutil.which("chromium"), google)
            os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
            began = time.perf_counter()
            options = ["--out-dir", f"{folder}/set", "--allow-private", "--delay", "0"]
            download_data.main(["imagenet", *options, "--limit", str(args.limit), "--labels", *labels])
            time_s = time.perf_counter() - began
    assert sum(pictures.hits.values()) == args.queries * args.limit
    print(
        f"{args.queries} queries of {args.limit} pictures in {time_s:.1f} s, start of the browser and "
        f"contact sheets included: {args.queries / time_s * 60:.1f} queries a minute"
    )


if __name__ == "__main__":
    main()
