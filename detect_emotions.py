"""Find every face in photos, tell its emotion, and write labelled copies, called <name>_emotions.

MTCNN (Zhang et al. 2016, https://arxiv.org/abs/1604.02878) finds the faces, the trained gray ResNet tells
the emotion from a square crop of each. Faces are listed from left to right, in pixels of the upright photo: a
line each on stdout (file, box as x0,y0,x1,y1, emotion, confidence; tab-separated) or JSON Lines, and a CSV.
Labels take the place at their box where they hide least of other faces and labels, and drop the percentage
where space is short. The colours are Okabe and Ito's, which the colour-blind can tell apart too
(https://jfly.uni-koeln.de/color/).

Usage:
    python detect_emotions.py resources/sample.jpg
    python detect_emotions.py --out-dir labelled --csv labelled/faces.csv photos/*.jpg
"""

import argparse
import csv
import functools
import itertools
import json
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont
from tqdm import tqdm

import model as shared

Font = ImageFont.FreeTypeFont

# The five that the shipped model knows have those colours of the palette that the colour-blind confuse least.
COLORS = {
    "angry": "#D55E00",
    "disgusted": "#009E73",
    "happy": "#F0E442",
    "sad": "#0072B2",
    "surprised": "#56B4E9",
    "fearful": "#CC79A7",
    "neutral": "#E69F00",
    "contemptuous": "#000000",
}
LANDMARKS = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")  # left and right as one sees them
KEPT_FORMATS = ("AVIF", "BMP", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP")  # copies of all others are PNGs

# Chosen here by looking at portraits and at groups of up to 67 faces.
MIN_FONT_SIZE = 12  # pixels; smaller letters run together
LINE_WIDTH, PADDING, LABEL_HEIGHT = 1 / 7, 1 / 4, 5 / 4  # in font sizes
NUM_PLACES = 12  # for a label: above, below, inside its box at the top or bottom; flush left, right, centred
# What a place costs, in squares of the label's height: for each step down the list of places, and for each
# square of its own face and of other labels that it hides. A square of another face costs 1.
STEP_COST, OWN_FACE_COST, LABEL_COST = 0.02, 0.5, 4.0
NUM_SWEEPS = 4  # times that each label may look for a better place


def read_faces(image: Image.Image, finder: shared.FaceFinder, classifier: shared.Classifier) -> list[dict]:
    """Find and classify an RGB image's faces, from left to right, as the plain objects that --json prints."""
    found = finder.find(image)
    probs = classifier.predict(image, found.boxes).astype(float)
    boxes = found.boxes.astype(float).clip(0, [*image.size, *image.size]).round(1)
    landmarks = found.landmarks.astype(float).round(1)
    return [
        {
            "box": boxes[i].tolist(),
            "face_prob": round(float(found.probs[i]), 4),
            "landmarks": dict(zip(LANDMARKS, landmarks[i].tolist(), strict=True)),
            "emotion": classifier.classes[probs[i].argmax()],
            "prob": round(float(probs[i].max()), 4),
            "probs": dict(zip(classifier.classes, probs[i].round(4).tolist(), strict=True)),
        }
        for i in np.lexsort((boxes[:, 1], boxes[:, 0]))
    ]


def class_colors(classes: Sequence[str]) -> dict[str, str]:
    """Give each class its colour; one that has none gets one that no other class has, as far as they go."""
    free = [color for name, color in COLORS.items() if name not in classes] or list(COLORS.values())
    spare = itertools.cycle(free)
    return {name: COLORS.get(name) or next(spare) for name in classes}


def text_color(color: str) -> str:
    """Return "black" or "white", whichever has more contrast on `color`.

    Source: WCAG 2.1, relative luminance and contrast ratio.
    """
    values = np.array(ImageColor.getrgb(color)) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"


@functools.cache
def load_font(path: Path | None, size: int) -> Font:
    """Load a font file, or else the font that Pillow brings along, at a size in pixels."""
    try:
        return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)
    except OSError as error:
        raise ValueError(f"{path} is not a font ({error}); name a TrueType or OpenType file") from None


def label_size(text: str, font: Font) -> tuple[int, int]:
    """Width and height in pixels of a label with its padding."""
    width = font.getlength(text) + 2 * PADDING * font.size
    return int(np.ceil(width)), int(np.ceil(LABEL_HEIGHT * font.size))


def fit_font(path: Path | None, word: str, box: Sequence[float], image_size: Sequence[int]) -> Font:
    """Choose a face's font, readable unless a `word` of MIN_FONT_SIZE would not fit into the image."""
    face = min(box[2] - box[0], box[3] - box[1])
    suiting_both = (face / 6 * min(image_size) / 32) ** 0.5  # geometric mean: what suits the face, the image
    size = max(round(min(suiting_both, face / 3)), MIN_FONT_SIZE)
    while size > 1 and np.greater(label_size(word, load_font(path, size)), image_size).any():
        size -= 1
    return load_font(path, size)


def label_places(box: np.ndarray, sizes: Sequence, image_size: Sequence[int]) -> np.ndarray:
    """List a label's places at a box, inside the image, for T sizes, best first: (T * NUM_PLACES, 4)."""
    x0, y0, x1, y1 = box
    corners_and_sizes = [
        (min(max(x, 0), image_size[0] - width), min(max(y, 0), image_size[1] - height), width, height)
        for width, height in sizes
        for y in (y0 - height, y1, y0, y1 - height)
        for x in (x0, x1 - width, (x0 + x1 - width) // 2)
    ]
    corners, sizes = np.hsplit(np.array(corners_and_sizes, float), 2)
    return np.hstack([corners, corners + sizes])


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Areas that boxes (N, 4) share with others (M, 4): (N, M)."""
    starts = np.maximum(boxes[:, None, :2], others[None, :, :2])
    ends = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return (ends - starts).clip(0).prod(2)


def place_labels(boxes: np.ndarray, sizes: Sequence, image_size: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Choose each label's wording and place so that little of the faces and of the other labels is hidden.

    Each label in turn takes the place that costs least beside the others' present ones, several times over.

    Args:
        boxes: N faces, (N, 4) xyxy.
        sizes: width and height of each label's T wordings, (N, T, 2), the preferred wording first; the last
            must fit into the image.
        image_size: width and height.

    Returns:
        The wordings' indices (N,) and the labels (N, 4) xyxy, inside the image.
    """
    wordings, labels = np.zeros(len(boxes), int), np.zeros((len(boxes), 4))
    places = [label_places(box, size, image_size) for box, size in zip(boxes, sizes, strict=True)]
    for i in [*range(len(boxes))] * NUM_SWEEPS:
        labels[i] = 0
        face_costs = np.where(np.arange(len(boxes)) == i, OWN_FACE_COST, 1)
        hidden = overlaps(places[i], boxes) @ face_costs + LABEL_COST * overlaps(places[i], labels).sum(1)
        cost = hidden / sizes[i][0][1] ** 2 + STEP_COST * np.arange(len(places[i]))
        cost[(places[i] < 0).any(1)] = np.inf  # does not fit into the image
        labels[i], wordings[i] = places[i][cost.argmin()], cost.argmin() // NUM_PLACES
    return wordings, labels


def draw_faces(
    image: Image.Image, faces: Sequence[dict], colors: dict[str, str], font_path: Path | None = None
) -> Image.Image:
    """Return a copy of the image with a box and a label for each of the `faces` of `read_faces`."""
    boxes = np.array([face["box"] for face in faces]).reshape(-1, 4).round()
    texts = [(f"{face['emotion']} {face['prob']:.0%}", face["emotion"]) for face in faces]
    fonts = [fit_font(font_path, face["emotion"], face["box"], image.size) for face in faces]
    sizes = [[label_size(text, font) for text in pair] for pair, font in zip(texts, fonts, strict=True)]
    wordings, labels = place_labels(boxes, sizes, image.size)

    copy = image.copy()
    draw = ImageDraw.Draw(copy)
    fills = [colors[face["emotion"]] for face in faces]
    for (x0, y0, x1, y1), fill, font in zip(boxes, fills, fonts, strict=True):
        corners = (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1))  # Pillow's rectangles include their last pixel
        draw.rectangle(corners, outline=fill, width=max(1, round(LINE_WIDTH * font.size)))
    for i, (x0, y0, x1, y1) in enumerate(labels):
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fills[i], outline=text_color(fills[i]))
        center, text = ((x0 + x1) / 2, (y0 + y1) / 2), texts[i][wordings[i]]
        draw.text(center, text, text_color(fills[i]), fonts[i], anchor="mm")
    return copy


def csv_header(classes: Sequence[str]) -> list[str]:
    """Name the columns of `csv_row`."""
    points = [f"{name}_{axis}" for name in LANDMARKS for axis in "xy"]
    probs = [f"prob_{name}" for name in classes]
    return ["file", "face", "x0", "y0", "x1", "y1", "face_prob", "emotion", "prob", *probs, *points]


def csv_row(path: Path, number: int, face: dict) -> list:
    """Spread out what `read_faces` tells of a face; `number` counts a photo's faces from 1."""
    points = itertools.chain(*face["landmarks"].values())
    reading = (face["face_prob"], face["emotion"], face["prob"], *face["probs"].values())
    return [path, number, *face["box"], *reading, *points]


def text_line(path: Path, face: dict) -> str:
    """Sum up a face in four columns."""
    box = ",".join(str(round(value)) for value in face["box"])
    return f"{path}\t{box}\t{face['emotion']}\t{face['prob']:.2f}"


def copy_path(path: Path, out_dir: Path | None) -> Path:
    """Name a photo's labelled copy: a PNG if the photo's format is not kept, or holds CMYK colours."""
    is_kept = Image.registered_extensions().get(path.suffix.lower()) in KEPT_FORMATS
    try:
        with Image.open(path) as image:
            is_kept &= image.mode != "CMYK"
    except shared.PILLOW_ERRORS:
        pass  # reported when the photo's turn comes
    return (out_dir or path.parent) / f"{path.stem}_emotions{path.suffix if is_kept else '.png'}"


def plan_copies(paths: Sequence[Path], out_dir: Path | None, csv_path: Path | None) -> dict[Path, Path]:
    """Map each photo to its labelled copy.

    Raises:
        ValueError: a copy or the CSV would overwrite a photo or another copy.
    """
    copies = {path: copy_path(path, out_dir) for path in paths}
    sources, owners = {path.resolve() for path in paths}, {}
    for path, copy in copies.items():
        if copy.resolve() in sources:
            raise ValueError(f"the copy of {path} would overwrite {copy}, an input too; leave that one out")
        other = owners.setdefault(copy.resolve(), path)
        if other != path:
            raise ValueError(f"{other} and {path} would both become {copy}; label them into two folders")
    if csv_path and csv_path.resolve() in sources | owners.keys():
        raise ValueError(f"--csv {csv_path} would overwrite a photo; name another file")
    return copies


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path that becomes `path` once all went well, so that `path` is never half written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image in the format that the path's extension says, with its colour profile."""
    image_format = Image.registered_extensions()[path.suffix.lower()]
    options = {"quality": 95, "subsampling": "4:4:4", "icc_profile": image.info.get("icc_profile")}
    with replacing(path) as temporary:
        image.save(temporary, image_format, **options)


def face_size(text: str) -> float:
    """Read --min-face-size, pixels or a share."""
    value = float(text)
    if not (0 < value < 1 or 12 <= value < math.inf):
        raise argparse.ArgumentTypeError(f"{text} is neither 12 pixels or more nor a share below 1")
    return value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    share = shared.number(float, 0, 1)
    add = parser.add_argument
    add("photos", nargs="+", type=Path, metavar="PHOTO", help="image file, in any format that Pillow reads")
    add("--out-dir", type=Path, metavar="DIR", help="folder for the copies (default: beside each photo)")
    add("--json", action="store_true", help="print an object for each photo, not a line for each face")
    add("--csv", type=Path, metavar="FILE", help="also write a table with a row for each face")
    sure = "how sure the detector must be of a face, 0.7-1; it drops those below 0.7 (default: %(default)s)"
    add("--min-face-prob", type=share, default=0.9, metavar="P", help=sure)
    small = (
        "smallest face to look for, pixels (12 or more), or a share of the image's shorter side (below 1), "
        "which means 20 pixels or more; smaller ones take longer (default: %(default)s)"
    )
    add("--min-face-size", type=face_size, default=shared.MIN_FACE_SIZE, metavar="X", help=small)
    shipped = shared.DEFAULT_MODEL
    add("--model", type=Path, default=shipped, metavar="FILE", help="checkpoint (default: %(default)s)")
    add("--font", type=Path, metavar="FILE", help="TrueType or OpenType (default: the one in Pillow)")
    shared.add_device_option(parser)
    return parser.parse_args(argv)


@shared.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Label the photos named on the command line; exit with 1 if one of them could not be."""
    args = parse_args(argv)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the error, at twice the size, stays
    copies = plan_copies(args.photos, args.out_dir, args.csv)
    load_font(args.font, MIN_FONT_SIZE)  # a wrong one is told before the work
    device = shared.pick_device(args.device)
    finder = shared.FaceFinder(device, args.min_face_size, args.min_face_prob)
    classifier = shared.Classifier.load(args.model, device)
    colors = class_colors(classifier.classes)

    rows, num_failed = [csv_header(classifier.classes)], 0
    for path, copy in tqdm(copies.items(), unit="photo", disable=None if len(copies) > 1 else True):
        try:
            image = shared.load_photo(path)
            faces = read_faces(image, finder, classifier)
            save_image(draw_faces(image, faces, colors, args.font), copy)
        except (ValueError, OSError) as error:  # the other photos are still worth labelling
            tqdm.write(f"error: {error}", file=sys.stderr)
            num_failed += 1
            continue
        if not faces:
            tqdm.write(f"{path}: no face found", file=sys.stderr)
        record = {"file": str(path), "width": image.width, "height": image.height, "faces": faces}
        for line in [json.dumps(record)] if args.json else [text_line(path, face) for face in faces]:
            tqdm.write(line)
        rows += [csv_row(path, number, face) for number, face in enumerate(faces, start=1)]
    if args.csv:
        with replacing(args.csv) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    if num_failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
