"""Measure how many queries a minute download_data.py makes, the polite delay off, pictures included.

A real Chromium searches an imitation of Google on this machine; each query brings pictures of 800x600 pixels
that are downloaded, decoded, compared and written. Faces are not looked for: that is another measurement.
With --records, measure only how the time to look for copies grows with the number of pictures.

Usage:
    python tests/benchmark_download.py --queries 20 --limit 20
    python tests/benchmark_download.py --records 20000
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from image_server import FakeGoogle, chromium_script, picture, serve

import download_data
import model as shared


def time_copies(num_records: int) -> float:
    """Return the seconds that it takes to compare random pictures, each with those before it."""
    generator, finder = random.Random(0), download_data.CopyFinder()
    began = time.perf_counter()
    for _ in range(num_records):
        mark = {"sha256": generator.randbytes(32).hex(), "phash": generator.randbytes(8).hex()}
        assert not finder.find(**mark)
        finder.add(mark)
    return time.perf_counter() - began


def main() -> None:
    """Download, and print the rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shared.HelpFormatter)
    parser.add_argument("--queries", type=int, default=20, metavar="N", help="searches")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="pictures a search")
    parser.add_argument("--records", type=int, metavar="N", help="look for copies among so many, do no more")
    args = parser.parse_args()
    if args.records:
        for num_records in args.records // 4, args.records // 2, args.records:
            print(f"copies among {num_records} pictures: {time_copies(num_records):.2f} s")
        return
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
