"""Download labelled photos from Google Images: the search word is the label.

Two sets: photos of emotions for finetune_emotion.py, and a small "fake ImageNet", a handful of photos for
each ImageNet class, for finetune_gray_imagenet.py. The package google_images_download drives a Chrome or
Chromium that must be installed. What a search brings is only weakly labelled, and its copyright stays with
its owners: look through the folders, and train with them for research only.

Usage:
    python download_data.py --limit 100
    python download_data.py --imagenet --limit 5
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torchvision.models import ResNet50_Weights
from tqdm import tqdm

import model as shared


def download(query: str, folder: Path, limit: int) -> None:
    """Let google_images_download search for `query` and save what it finds into `folder`.

    Raises:
        ValueError: the package gave up, for example because there is no Chrome.
    """
    from google_images_download.google_images_download import googleimagesdownload  # noqa: PLC0415 (Selenium is slow)

    arguments = {
        "keywords": query,
        "limit": limit,
        "output_directory": str(folder.parent),
        "image_directory": folder.name,
        "silent_mode": True,
    }
    try:
        with contextlib.redirect_stdout(sys.stderr):
            googleimagesdownload().download(arguments)
    except (Exception, SystemExit) as error:  # the package lets through whatever Selenium and urllib raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"the search for {query!r} failed ({reason[0]}); it needs Chrome or Chromium and the internet"
        ) from None


def remove_unreadable(paths: Sequence[Path]) -> int:
    """Delete the files that Pillow cannot decode, such as a web page under an image's name; count them."""
    removed = 0
    for path in paths:
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, Image.DecompressionBombError):
            path.unlink()
            removed += 1
    return removed


def list_files(folder: Path) -> set[Path]:
    """List the files in `folder`, none if it does not exist."""
    return {path for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--emotions",
        nargs="+",
        default=list(shared.EMOTIONS),
        metavar="WORD",
        help=f"what to search for, one folder each (default: {' '.join(shared.EMOTIONS)})",
    )
    add("--imagenet", action="store_true", help="download the fake ImageNet instead, all 1000 classes")
    add(
        "--suffix",
        default="face",
        metavar="WORD",
        help="added to each emotion's query (default: %(default)s)",
    )
    add(
        "--out-dir",
        type=Path,
        metavar="DIR",
        help="where the folders go (default: data/google, or data/imagenet with --imagenet)",
    )
    add(
        "--limit",
        type=shared.number(int, 1),
        default=100,
        metavar="N",
        help="photos for each query (default: %(default)s)",
    )
    return parser.parse_args(argv)


@shared.one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Search, save, and throw out what is no picture."""
    args = parse_args(argv)
    if args.imagenet:
        queries = {name.replace(" ", "_"): name for name in ResNet50_Weights.IMAGENET1K_V1.meta["categories"]}
    else:
        queries = {name: f"{name} {args.suffix}".strip() for name in args.emotions}
    out_dir = args.out_dir or Path("data/imagenet" if args.imagenet else "data/google")
    for name, query in tqdm(queries.items(), "searching", unit="query", disable=None):
        folder = out_dir / name
        before = list_files(folder)
        download(query, folder, args.limit)
        new = sorted(list_files(folder) - before)
        removed = remove_unreadable(new)
        print(f"{folder}: {len(new) - removed} new photos, {removed} files thrown out that are none")


if __name__ == "__main__":
    main()
