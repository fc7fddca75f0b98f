"""What the stages share: faces, the gray network, data, training, inference, checkpoints, command line.

The parts stand in the order in which data flows through them. A script imports from here and from nowhere
else in the project.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

EMOTIONS = ("angry", "disgusted", "happy", "sad", "surprised")
DEFAULT_MODEL = Path(__file__).parent / "resources" / "emotion_resnet50.pt"

IMAGE_SIZE = 96  # pixels, side of the network's input, see the README's table; 64 costs half the time
# Share of a detector box's longer side that a crop adds. FER's faces are cut as with -0.04 (median of the 170
# faces that MTCNN finds in 200 of PublicTest, quartiles -0.12 and 0.03).
CROP_MARGIN = 0.0

# torchvision's statistics of ImageNet, channels R, G, B, for values in 0-1.
COLOR_MEAN, COLOR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GRAY_MEAN, GRAY_STD = 0.449, 0.226  # their means over the channels
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what Pillow's convert("L") uses


# --- photos ---

KEPT_INFO = ("icc_profile", "transparency")
# What Pillow raises for files that it cannot read; found by damaging files of a dozen formats at random.
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)


def load_photo(path: Path) -> Image.Image:
    """Read a photo, or an animation's first frame, upright and as RGB; `info` keeps an RGB colour profile.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            image.load()
            image.getexif()  # Pillow remembers it; taken out of `info`, it is not rewritten, which may fail
            image.info = {name: image.info[name] for name in KEPT_INFO if name in image.info}
            profile = image.info.get("icc_profile") or b""
            ImageOps.exif_transpose(image, in_place=True)  # a copy would take as long as reading
            photo = to_rgb(image)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that Pillow can read; convert it to JPEG or PNG") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise ValueError(f"{path} has more than {limit} million pixels; scale it down first") from None
    except PILLOW_ERRORS as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    photo.info = {"icc_profile": profile} if profile[16:20] == b"RGB " else {}  # its data colour space field
    return photo


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB, itself if it is that; transparent parts become white."""
    if image.mode.startswith(("I", "F")):  # 16 bits or more, which convert() would clip instead of scale
        values = np.asarray(image, np.float32)
        white = 65535 if image.mode.startswith("I") else max(values.max(), 1)
        image = Image.fromarray((values / white * 255).clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


# --- faces ---


class Faces(NamedTuple):
    """N faces of one image, N may be 0."""

    boxes: np.ndarray  # (N, 4) float32, left, top, right, bottom in pixels
    probs: np.ndarray  # (N,) float32, the detector's confidence, 0-1
    landmarks: np.ndarray  # (N, 5, 2) float32, x and y: left and right eye, nose, left and right mouth corner


NO_FACES = Faces(np.empty((0, 4), np.float32), np.empty(0, np.float32), np.empty((0, 5, 2), np.float32))
PNET_WINDOW, RNET_SIZE, ONET_SIZE = 12, 24, 48  # pixels, what each stage sees of a face

MTCNN_FACTOR = 0.709  # from one level of the pyramid to the next: half the pixels
# What the next stage gets to see of PNet, RNet and ONet. facenet-pytorch's first is 0.6, which finds the same
# 288 of its 290 surest faces in 32 photos and 200 frames of video; in 400 scraped photos, 381 faces, not 377.
MTCNN_THRESHOLDS = (0.8, 0.7, 0.7)
SAME_FACE = 0.7  # candidates that overlap more are one face; facenet-pytorch's number
MIN_FACE_SIZE = 0.025  # share of the shorter side; never less than MIN_FACE_PIXELS
MIN_FACE_PIXELS = 20  # facenet-pytorch's default


class FaceFinder:
    """MTCNN with facenet-pytorch's networks and weights, batched over candidates and images.

    PNet proposes 12-pixel windows at every level of an image pyramid, RNet sifts them at 24 pixels, ONet
    decides at 48 and places five landmarks. What differs from facenet-pytorch, all of it for speed:
    the pyramid is made of 8-bit pixels by a triangle filter, each level from one about twice as large,
    not by averaging areas of the whole image; of neighbouring windows of a level only the peak proposes;
    RNet's crops come from the level where the face is about 24 pixels wide; candidates that overlap are
    merged once they are corrected, so that ONet sees a face once or twice and not a dozen times.

    Source: Zhang et al. 2016, "Joint Face Detection and Alignment Using Multitask Cascaded Convolutional
    Networks", https://arxiv.org/abs/1604.02878.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        min_face_size: float = MIN_FACE_SIZE,
        min_prob: float = 0.9,
    ):
        """Load the networks.

        Args:
            device: where they run.
            min_face_size: the smallest face to look for, 12 pixels or more; or below 1, a share of the
                image's shorter side, which never means less than MIN_FACE_PIXELS.
            min_prob: how sure ONet must be of a face; it drops those below 0.7 anyway.

        Raises:
            ValueError: `min_face_size` is neither.
        """
        if not (0 < min_face_size < 1 or min_face_size >= PNET_WINDOW):
            raise ValueError(
                f"min_face_size {min_face_size} is neither {PNET_WINDOW} pixels or more nor a share below 1"
            )
        self.min_face_size = min_face_size
        self.min_prob = min_prob
        self._pnet, self._rnet, self._onet = (
            mtcnn_engine(name, size, torch.device(device))
            for name, size in (("PNet", None), ("RNet", RNET_SIZE), ("ONet", ONET_SIZE))
        )

    def find(self, image: Image.Image) -> Faces:
        """Find the faces of an RGB image that are at least `min_prob` sure, the surest first.

        A box may reach over the image's edge but not lie outside.
        """
        return self.find_all([image])[0]

    def find_all(self, images: Sequence[Image.Image]) -> list[Faces]:
        """Find the faces of several RGB images; those of one size are searched together."""
        found, groups = [NO_FACES] * len(images), {}
        for i, image in enumerate(images):
            groups.setdefault(image.size, []).append(i)
        for group in groups.values():
            for i, faces in zip(group, self._search([images[i] for i in group]), strict=True):
                found[i] = faces
        return found

    def refine(self, image: Image.Image, boxes: np.ndarray) -> Faces:
        """Look again at N known faces that may have moved a little, with ONet alone.

        Args:
            image: RGB.
            boxes: (N, 4), as found in the frame before, say; N may be 0.

        Returns:
            N entries in the order of `boxes`, none left out; `probs` say whether each is still a face.
        """
        owners = np.zeros(len(boxes), int)
        once = self._decide([image], owners, squared(boxes))
        # A second look costs half a millisecond a face; of boxes off by a fifth of their side, it takes the
        # overlap with the true ones from 0.89 to 0.94 (median of 81 faces).
        return self._decide([image], owners, squared(once.boxes))

    def _search(self, images: Sequence[Image.Image]) -> list[Faces]:
        """Find the faces of images of one size."""
        size = np.array(images[0].size)
        min_pixels = self.min_face_size
        if min_pixels < 1:
            min_pixels = max(min_pixels * size.min(), MIN_FACE_PIXELS)
        with one_torch_thread():
            scales, levels = pyramid(images, PNET_WINDOW / min_pixels)
        boxes, probs, owners = self._propose(scales[1:], levels[1:])
        kept = distinct(boxes, probs, owners)
        boxes, owners = boxes[kept], owners[kept]

        crops = sample_levels(levels, owners, boxes, size, RNET_SIZE)
        shifts, probs = self._rnet(crops)
        kept = np.flatnonzero(probs[:, 1] > MTCNN_THRESHOLDS[1])
        boxes, probs, owners = moved(boxes[kept], shifts[kept]), probs[kept, 1], owners[kept]
        boxes = squared(boxes)
        kept = distinct(boxes, probs, owners)

        faces, owners = self._decide(images, owners[kept], boxes[kept]), owners[kept]
        is_face = (faces.probs > MTCNN_THRESHOLDS[2]) & (faces.probs >= self.min_prob)
        is_face &= (faces.boxes[:, :2] < size).all(1) & (faces.boxes[:, 2:] > 0).all(1)
        kept = np.flatnonzero(is_face)
        kept = kept[distinct(faces.boxes[kept], faces.probs[kept], owners[kept], of_smaller=True)]
        return [Faces(*(part[kept[owners[kept] == i]] for part in faces)) for i in range(len(images))]

    def _propose(self, scales: Sequence[float], levels: Sequence[Tensor]) -> tuple[np.ndarray, ...]:
        """Run PNet over the levels; return M squared boxes (M, 4), their probs (M,) and images (M,)."""
        proposals = [(np.empty((0, 4), np.float32), np.empty(0, np.float32), np.empty(0, int))]
        for scale, level in zip(scales, levels, strict=True):
            shifts, probs = self._pnet(level.permute(0, 2, 3, 1).numpy())
            owners, y, x = find_peaks(probs[:, 1], MTCNN_THRESHOLDS[0])
            corners = 2 * np.stack([x, y], 1) + 1  # PNet's stride is 2
            windows = np.hstack([corners, corners + PNET_WINDOW - 1]) / scale
            windows = np.floor(windows).astype(np.float32)
            sides = (windows[:, 2:] - windows[:, :2])[:, [0, 1, 0, 1]]
            boxes = squared(windows + shifts[owners, :, y, x] * sides)
            proposals.append((boxes, probs[owners, 1, y, x], owners))
        return tuple(np.concatenate(parts) for parts in zip(*proposals, strict=True))

    def _decide(self, images: Sequence[Image.Image], owners: np.ndarray, boxes: np.ndarray) -> Faces:
        """Run ONet on M square boxes (M, 4) of the images `owners` (M,); return M entries."""
        regions = inside(boxes, np.array(images[0].size))
        crops = np.empty((len(boxes), ONET_SIZE, ONET_SIZE, 3), np.uint8)
        for i, region in enumerate(regions.tolist()):
            size, image = (ONET_SIZE, ONET_SIZE), images[owners[i]]
            crops[i] = image.resize(size, Image.Resampling.BILINEAR, region, reducing_gap=2)
        shifts, points, probs = self._onet(crops)
        points = points.reshape(-1, 2, 5).transpose(0, 2, 1)
        landmarks = points * (boxes[:, None, 2:] - boxes[:, None, :2] + 1) + boxes[:, None, :2] - 1
        return Faces(moved(boxes, shifts), probs[:, 1], landmarks)


def mtcnn_engine(name: str, size: int | None, device: torch.device) -> "Engine":
    """Load PNet, RNet or ONet, for square images of `size` pixels or, without, images of any size."""
    package = Path(importlib.util.find_spec("facenet_pytorch").origin).parent  # imported only if need be

    def build() -> nn.Module:
        import facenet_pytorch  # noqa: PLC0415 (seconds that a cached engine does not need)

        return ForPixels(getattr(facenet_pytorch, name)(), 127.5, 128)

    weights = (package / "data" / f"{name.lower()}.pt").read_bytes()
    like = torch.zeros(2, size or 64, size or 64, 3, dtype=torch.uint8)
    is_fast = name != "ONet"  # which has the last word on a few faces; the others only propose
    return Engine(name.lower(), build, weights, like, device, any_size=size is None, fast=is_fast)


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch's steps ahead of an OpenVINO engine take one thread.

    More would spin when they are done, on the cores that the engine then wants.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def pyramid(images: Sequence[Image.Image], scale: float) -> tuple[list[float], list[Tensor]]:
    """Shrink images of one size to `scale` and, step by step, down to PNet's window.

    A finer level comes first, from which RNet's crops of the smallest faces are cut.

    Returns:
        The levels' scales, descending, and the levels, each uint8 (N, 3, H, W), channels last.
    """
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    height, width = pixels.shape[2:]
    scales, levels = [min(scale * RNET_SIZE / PNET_WINDOW, 1.0)], []
    while min(height, width) * scale >= PNET_WINDOW:
        scales.append(scale)
        scale *= MTCNN_FACTOR
    for i, scale in enumerate(scales):
        size = (int(height * scale + 1), int(width * scale + 1)) if scale < 1 else (height, width)
        source = levels[max(i - 2, 0)] if i else pixels  # about twice as large
        is_same = source.shape[2:] == size
        levels.append(source if is_same else F.interpolate(source, size, mode="bilinear", antialias=True))
    return scales, levels


def find_peaks(probs: np.ndarray, threshold: float) -> tuple[np.ndarray, ...]:
    """Find where probs (N, H, W) reach the threshold and no neighbour is higher: N, H, W indices.

    It stands in for suppressing non-maxima: all windows of a level have one size, so those that overlap most
    are neighbours.
    """
    n, y, x = np.nonzero(probs >= threshold)
    rows, columns = (
        [(at + by).clip(0, length - 1) for by in (-1, 0, 1)]
        for at, length in zip((y, x), probs.shape[1:], strict=True)
    )
    around = [probs[n, row, column] for row in rows for column in columns]
    is_peak = probs[n, y, x] == np.max(around, axis=0)
    return n[is_peak], y[is_peak], x[is_peak]


def sample_levels(
    levels: Sequence[Tensor], owners: np.ndarray, boxes: np.ndarray, image_size: np.ndarray, size: int
) -> np.ndarray:
    """Cut M boxes out of a pyramid, each where its side is nearest `size`: uint8 (M, size, size, 3).

    Only the pixels that are wanted are looked at: making all of a level float takes longer than the rest.
    """
    regions = inside(boxes, image_size)
    sides = regions[:, 2:] - regions[:, :2]
    scales = np.array([level.shape[3] for level in levels]) / image_size[0]
    is_fine_enough = sides.max(1)[:, None] * scales >= size * MTCNN_FACTOR**0.5
    chosen = (is_fine_enough.sum(1) - 1).clip(0)
    steps = (np.arange(size, dtype=np.float32) + 0.5) / size
    points = regions[:, None, :2] + steps[:, None] * sides[:, None]  # (M, size, 2), x and y
    crops = np.empty((len(boxes), size, size, 3), np.uint8)
    for number in np.unique(chosen):
        those, level = chosen == number, levels[number].permute(0, 2, 3, 1).numpy()
        level_size = np.array(level.shape[2:0:-1])
        spots = (points[those] * (level_size / image_size) - 0.5).clip(0, level_size - 1).astype(np.float32)
        starts = spots.astype(np.int64)
        ends = (starts + 1).clip(0, level_size - 1)
        shares = (spots - starts).astype(np.float32)  # of the next pixels, (M, size, 2)
        right, down = shares[:, None, :, 0, None], shares[:, :, None, 1, None]
        first = owners[those][:, None] * level_size[1]  # rows of the images before
        rows = [(first + at[:, :, 1])[:, :, None] * level_size[0] for at in (starts, ends)]
        pixels = level.reshape(-1, 3)
        upper, lower = (
            (1 - right) * np.take(pixels, row + starts[:, None, :, 0], 0)
            + right * np.take(pixels, row + ends[:, None, :, 0], 0)
            for row in rows
        )
        crops[those] = (1 - down) * upper + down * lower + 0.5  # cut off to whole numbers, so rounded
    return crops


def inside(boxes: np.ndarray, image_size: np.ndarray) -> np.ndarray:
    """Clip MTCNN's boxes (M, 4), whose pixels count from 1, to regions of the image at least a pixel wide."""
    starts = (boxes[:, :2] - 1).clip(0, image_size - 1)
    return np.hstack([starts, boxes[:, 2:].clip(starts + 1, image_size)]).astype(np.float32)


def squared(boxes: np.ndarray) -> np.ndarray:
    """Widen or heighten boxes (M, 4) about their centres to squares."""
    centers, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).max(1, keepdims=True)
    return np.hstack([centers - sides / 2, centers + sides / 2]).astype(np.float32)


def moved(boxes: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Move the edges of boxes (M, 4) by RNet's or ONet's `shifts` (M, 4), shares of the sides."""
    return boxes + shifts * (boxes[:, 2:] - boxes[:, :2] + 1)[:, [0, 1, 0, 1]]


def distinct(
    boxes: np.ndarray, probs: np.ndarray, owners: np.ndarray, of_smaller: bool = False
) -> np.ndarray:
    """Suppress non-maxima: return the indices of those of M boxes that overlap no surer one, surest first.

    The overlap, of boxes of one owner alone, is the shared area's share of the union, or of the smaller box.
    """
    order = np.argsort(-probs, kind="stable")
    groups = [order[owners[order] == owner] for owner in np.unique(owners)]
    return np.concatenate([group[is_distinct(boxes[group], of_smaller)] for group in groups] or [order])


def is_distinct(boxes: np.ndarray, of_smaller: bool) -> np.ndarray:
    """Tell which of boxes (M, 4), surest first, overlap none of those before them that is kept itself."""
    left, top, right, bottom = np.ascontiguousarray(boxes.T)
    areas = (right - left) * (bottom - top)
    shared = (np.minimum.outer(right, right) - np.maximum.outer(left, left)).clip(0)
    shared *= (np.minimum.outer(bottom, bottom) - np.maximum.outer(top, top)).clip(0)
    whole = np.minimum.outer(areas, areas) if of_smaller else np.add.outer(areas, areas) - shared
    hides = np.tril(shared > SAME_FACE * whole, -1)
    kept, before = np.ones(len(boxes), bool), None
    while before is None or (kept != before).any():  # settles from the surest down, in a few rounds
        before, kept = kept, ~(hides & kept).any(1)
    return kept


def crop_faces(image: Image.Image, boxes: np.ndarray, margin: float) -> list[Image.Image]:
    """Cut a square around each box; N boxes give N crops, in the image's mode.

    The square's side is the box's longer side times (1 + margin). It is moved, and if need be shrunk, until
    it lies inside the image, so a crop never has made-up pixels and its aspect ratio never changes.

    Args:
        boxes: (N, 4) xyxy in pixels, may reach over the image's edge.
        margin: share of the longer side, 0 or more.

    Raises:
        ValueError: a box does not overlap the image.
    """
    crops = []
    for left, top, right, bottom in boxes:
        if min(right, image.width) <= max(left, 0) or min(bottom, image.height) <= max(top, 0):
            raise ValueError(
                f"box {left, top, right, bottom} lies outside the {image.width}x{image.height} image"
            )
        side = max(right - left, bottom - top) * (1 + margin)
        side = int(min(max(round(side), 1), *image.size))
        x = int(min(max(round((left + right - side) / 2), 0), image.width - side))
        y = int(min(max(round((top + bottom - side) / 2), 0), image.height - side))
        crops.append(image.crop((x, y, x + side, y + side)))
    return crops


# --- network ---

# resnet50_v1 has the stride where the original paper has it, on the first 1x1 convolution of a stage
# (He et al. 2015; weights converted from Caffe want this). torchvision's resnet50 has it on the 3x3.
ARCHS = ("resnet18", "resnet34", "resnet50", "resnet50_v1")
PARTS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc")  # that have weights


class GrayStem(nn.Conv2d):
    """One-channel first convolution that can equal a colour one exactly, up to the image's border.

    A normalised colour convolution is affine in the gray value; its constant part is smaller where the kernel
    overlaps the zero padding, so one bias a channel cannot express it. `offset` is that part as a kernel: it
    is convolved with an image of ones.
    """

    def __init__(self, out_channels: int):
        super().__init__(1, out_channels, kernel_size=7, stride=2, padding=3, bias=False)
        self.offset = nn.Parameter(torch.zeros_like(self.weight))

    def forward(self, images: Tensor) -> Tensor:  # (N, 1, H, W) -> (N, out_channels, H/2, W/2)
        """Convolve the images and add the constant part."""
        constant = F.conv2d(
            torch.ones_like(images[:1]), self.offset, stride=self.stride, padding=self.padding
        )
        return super().forward(images) + constant


def color_resnet(arch: str) -> nn.Module:
    """Build torchvision's ResNet for normalised RGB images, 1000 classes, with random weights."""
    if arch not in ARCHS:
        raise ValueError(f"unknown architecture {arch!r}, expected one of {', '.join(ARCHS)}")
    import torchvision  # noqa: PLC0415 (a second that finding faces and a cached classifier do not need)

    model = torchvision.models.get_model(arch.removesuffix("_v1"), weights=None)
    if arch.endswith("_v1"):
        for stage in (model.layer2, model.layer3, model.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    return model


def gray_resnet(arch: str, num_classes: int) -> nn.Module:
    """Build a ResNet for normalised gray images (N, 1, H, W), with random weights.

    With `num_classes` 0 it has no head: it maps images to embeddings (N, D), D being 2048 for resnet50 and
    512 for the smaller ones; else to logits (N, num_classes).
    """
    model = color_resnet(arch)
    model.conv1 = GrayStem(model.conv1.out_channels)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    model.fc = nn.Linear(model.fc.in_features, num_classes) if num_classes else nn.Identity()
    return model


def freeze_except(model: nn.Module, trained: Sequence[str]) -> None:
    """Let only the named children of `model` learn; `train_mode` keeps the rest's BatchNorm still as well.

    Raises:
        ValueError: the model has no child of that name, or none of the named has parameters.
    """
    children = dict(model.named_children())
    for name in trained:
        if name not in children:
            raise ValueError(f"the network has no part {name!r}, expected some of: {', '.join(children)}")
    for name, child in children.items():
        child.requires_grad_(name in trained)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"nothing in {' '.join(trained)} can learn; name other parts of {', '.join(children)}"
        )


def train_mode(model: nn.Module) -> None:
    """Put `model` into train mode, except its frozen children, which stay in eval mode."""
    model.train()
    for child in model.children():
        if not any(parameter.requires_grad for parameter in child.parameters()):
            child.eval()


# --- data ---


def list_images(folder: Path, limit: int | None = None) -> list[Path]:
    """List the image files below `folder`, sorted; with a limit, that many, evenly spread over the list.

    Raises:
        ValueError: there are none.
    """
    extensions = set(Image.registered_extensions())
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in extensions)
    if not paths:
        raise ValueError(f"no images in {folder}; it is made by an earlier stage, see the README")
    return spread(paths, limit)


def spread(items: Sequence[Path], limit: int | None) -> Sequence[Path]:
    """Take `limit` items (None: all) evenly spaced, so that each class of a sorted list gets its share."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def load_images(paths: Sequence[Path], mode: str, size: int | None = None) -> Tensor:
    """Read images into memory as one uint8 tensor (N, C, S, S); mode "L" has C = 1, "RGB" has 3.

    Images are cut to their central square and resized to `size` pixels; without `size`, to the first one's
    own. Several threads read.

    Raises:
        ValueError: a file is not a readable image.
    """

    def read(path: Path) -> np.ndarray:
        try:
            with Image.open(path) as file:
                if size:
                    file.draft(mode, (size, size))  # JPEG: decode no more pixels than needed
                image = file.convert(mode)
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} is not a readable image ({error}); remove or replace it") from None
        side = min(image.size)
        x, y = (image.width - side) // 2, (image.height - side) // 2
        target = size or side_of_first
        if image.size != (target, target):
            image = image.resize((target, target), Image.Resampling.LANCZOS, (x, y, x + side, y + side))
        return np.asarray(image).reshape(target, target, -1)

    with Image.open(paths[0]) as first:
        side_of_first = min(first.size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        arrays = list(
            tqdm(pool.map(read, paths), "reading", len(paths), unit="image", disable=None, leave=False)
        )
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def list_faces(folder: Path, classes: Sequence[str], limit: int | None = None) -> Sequence[Path]:
    """List `folder`/<class>/* class by class, as `list_images` does."""
    return spread([path for name in classes for path in list_images(folder / name)], limit)


def load_faces(folder: Path, classes: Sequence[str], limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Read `folder`/<class>/* as uint8 gray images (N, 1, S, S) and int64 labels (N,), indices of `classes`.

    Raises:
        ValueError: a class has no images.
    """
    paths = list_faces(folder, classes, limit)
    labels = torch.tensor([classes.index(path.relative_to(folder).parts[0]) for path in paths])
    return load_images(paths, "L"), labels


def split_indices(n: int, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split range(n) at random into train and val; both get at least one."""
    if n < 2:
        raise ValueError(f"found {n} image, expected at least 2: one to learn from, one to judge by")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    num_val = min(max(round(n * val_fraction), 1), n - 1)
    return order[num_val:], order[:num_val]


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Draw float32 values between `low` and `high`."""
    return torch.rand(shape, generator=generator) * (high - low) + low


def warp(
    images: Tensor,
    size: int,
    generator: torch.Generator,
    *,
    degrees: float,
    shift: float,
    zoom: tuple[float, float],
) -> Tensor:
    """Mirror, turn, move and scale each image of a batch at random, in one resampling to `size` pixels.

    Args:
        images: (N, C, H, W) float, square.
        degrees: largest rotation to either side.
        shift: largest move along each axis, as a share of the side.
        zoom: least and largest scale; under 1 the border's pixels fill what lacks.
    """
    n = len(images)
    angle = torch.deg2rad(uniform((n,), -degrees, degrees, generator))
    scale = uniform((n,), *zoom, generator)
    mirror = torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1
    move = uniform((n, 2), -2 * shift, 2 * shift, generator)  # the grid's unit is half a side
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    theta = torch.stack(  # (N, 2, 3), from output to input coordinates
        [torch.stack([cos * mirror, -sin, move[:, 0]], 1), torch.stack([sin * mirror, cos, move[:, 1]], 1)], 1
    ).to(images.device)
    grid = F.affine_grid(theta, [n, images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def compress(images: Tensor, quality: int) -> Tensor:
    """Store uint8 images (N, 1, H, W) as JPEG and read them again."""
    stored = []
    for image in images[:, 0].cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        stored.append(np.asarray(Image.open(buffer)))
    return torch.from_numpy(np.stack(stored))[:, None].to(images.device)


def augment_faces(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Turn uint8 faces (N, 1, H, W) into varied, normalised network input (N, 1, size, size).

    JPEG artefacts (a quarter of the images), coarsening (a quarter), mirroring, rotation, shift, scaling,
    contrast, brightness, and cutout of half the images (DeVries & Taylor 2017). The ranges, chosen here,
    cover how detectors crop.
    """
    n, device = len(images), images.device
    stored = torch.rand(n, generator=generator) < 1 / 4
    if stored.any():
        images = images.clone()
        images[stored] = compress(images[stored], int(torch.randint(15, 75, (1,), generator=generator)))
    images = images.float() / 255
    coarse = torch.rand(n, generator=generator) < 1 / 4
    if coarse.any():
        coarse_size = int(torch.randint(16, 40, (1,), generator=generator))
        small = F.interpolate(images[coarse], coarse_size, mode="bilinear", antialias=True)
        images[coarse] = F.interpolate(small, images.shape[-1], mode="bilinear", align_corners=False)
    images = warp(images, size, generator, degrees=15, shift=0.1, zoom=(0.7, 1.15))
    contrast = uniform((n, 1, 1, 1), 0.65, 1.35, generator).to(device)
    brightness = uniform((n, 1, 1, 1), -0.15, 0.15, generator).to(device)
    means = images.mean((1, 2, 3), keepdim=True)
    images = ((images - means) * contrast + means + brightness).clamp(0, 1)
    images = (images - GRAY_MEAN) / GRAY_STD
    center, half = uniform((n, 2, 1), 0, 1, generator), uniform((n, 2, 1), 0.1, 0.25, generator)
    half *= torch.rand((n, 1, 1), generator=generator) < 0.5  # the other half stays whole
    inside = (torch.linspace(0, 1, size) - center).abs() < half  # (N, 2, size)
    hole = inside[:, 0, :, None] & inside[:, 1, None, :]
    return images.masked_fill(hole[:, None].to(device), 0)


def normalize_faces(images: Tensor, size: int) -> Tensor:
    """Turn uint8 faces (N, 1, H, W) into normalised network input (N, 1, size, size), without chance."""
    images = F.interpolate(images.float() / 255, size, mode="bilinear", antialias=True)
    return (images - GRAY_MEAN) / GRAY_STD


def epoch_order(labels: Tensor, balance: float, generator: torch.Generator) -> Tensor:
    """Draw an epoch's order, as many indices (N,) as labels, by systematic sampling.

    A class of n images is drawn in proportion to n ** (1 - balance): with 0 each image comes exactly once,
    with 1 all classes come equally often. Images of a class differ in their number of draws by 1 at most.
    """
    n = len(labels)
    shuffled = torch.randperm(n, generator=generator)
    counts = torch.bincount(labels).double()
    weights = counts[labels[shuffled]] ** -balance
    positions = (torch.arange(n) + 0.5) / n * weights.sum()
    drawn = torch.searchsorted(weights.cumsum(0), positions.double()).clamp(max=n - 1)
    return shuffled[drawn][torch.randperm(n, generator=generator)]


class FaceBatches:
    """Labelled faces that stay in memory as uint8 and are fed in augmented batches.

    What an epoch holds depends on `seed` and its number alone, so a resumed run sees what it would have seen.
    `targets`, (N, C) float32 shares of the classes, are learned in the labels' place. `mixup`, 0 for none,
    needs them: it blends a batch's images each with another, by shares from Beta(mixup, mixup).
    Source: Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization".
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        image_size: int,
        device: torch.device,
        *,
        targets: Tensor | None = None,
        balance: float = 0.0,
        mixup: float = 0.0,
        seed: int = 0,
    ):
        self.images, self.labels, self.device = images, labels, device
        self.targets = labels if targets is None else targets
        self.batch_size, self.image_size, self.seed = batch_size, image_size, seed
        self.balance, self.mixup = balance, mixup

    def __len__(self) -> int:
        return len(self.labels)

    def describe(self, classes: Sequence[str]) -> str:
        """Say how many images there are, and of which class."""
        counts = torch.bincount(self.labels, minlength=len(classes)).tolist()
        each = ", ".join(f"{name} {count}" for name, count in zip(classes, counts, strict=True))
        return f"{len(self)} images ({each})"

    def train(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch's batches: inputs (n, 1, image_size, image_size) and targets (n,) or (n, C)."""
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        random = np.random.default_rng((self.seed, epoch))
        for indices in epoch_order(self.labels, self.balance, generator).split(self.batch_size):
            images = augment_faces(self.images[indices].to(self.device), self.image_size, generator)
            targets = self.targets[indices].to(self.device)
            if self.mixup:
                share = random.beta(self.mixup, self.mixup)
                images, targets = (share * part + (1 - share) * part.roll(1, 0) for part in (images, targets))
            yield images, targets

    def eval(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all faces once, in order, as they are."""
        for images, labels in zip(
            self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True
        ):
            yield normalize_faces(images.to(self.device), self.image_size), labels.to(self.device)


# --- training ---


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Run `model` in eval mode over all batches; return its outputs and the targets, (N, ...), on the CPU."""
    model.eval()
    outputs, targets = [], []
    for inputs, target in batches:
        outputs.append(model(inputs.contiguous(memory_format=torch.channels_last)).cpu())
        targets.append(target.cpu())
    return torch.cat(outputs), torch.cat(targets)


def autocast(device: torch.device) -> torch.autocast:
    """Mix in bfloat16 where the device is faster at it: CUDA, and CPUs that have instructions for it."""
    able = torch.cpu.get_capabilities()
    fast = device.type == "cuda" or (
        device.type == "cpu" and bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    )
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def learning_rate(progress: float, lr: float, warmup: float) -> float:
    """Cosine schedule with linear warm-up; `progress` and `warmup` are shares of the run, 0-1."""
    if progress < warmup:
        return lr * progress / warmup
    return lr * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def build_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """Build AdamW over what trains; biases and BatchNorm do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
    )


def fit(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    data: FaceBatches,
    validate: Callable[[nn.Module], dict[str, float]],
    *,
    score: Callable[[dict], float],
    save: Callable[..., None],
    epochs: int,
    lr: float,
    weight_decay: float,
    ema: float = 0.0,
    resume: dict | None = None,
) -> list[dict]:
    """Train `model` in place; return one record an epoch: epoch, lr, train_loss, `validate`'s, images_per_s.

    Every stage runs this loop: they differ in data, criterion, `validate` and which parameters train.

    Args:
        criterion: (outputs, targets) -> scalar mean loss of a batch.
        data: has `train(epoch)` -> batches of inputs and targets, and a length in images.
        validate: returns figures by name; it gets the averaged weights when `ema` is on.
        score: of an epoch's record, the higher the better; it picks the best epoch.
        save: `save(name, model, history, **training_state)` writes a checkpoint.
        lr: peak; the first twentieth of the run warms up, then a cosine goes to 0.
        ema: decay of the exponential moving average of the weights per step, 0 for none.
        resume: the checkpoint `last` of a run with the same options.

    Raises:
        ValueError: the loss is not finite any more.
    """
    optimizer = build_optimizer(model, weight_decay)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True) if ema else None
    history = []
    if resume:
        history = resume["history"]
        optimizer.load_state_dict(resume["optimizer"])
        model.load_state_dict(resume["model"])
        if averaged:
            averaged.load_state_dict(resume["averaged"])
    for epoch in range(len(history) + 1, epochs + 1):
        train_mode(model)
        start, seen, total_loss = time.perf_counter(), 0, 0.0
        bar = tqdm(total=len(data), desc=f"epoch {epoch}/{epochs}", unit="image", disable=None, leave=False)
        for inputs, targets in data.train(epoch):
            current_lr = learning_rate((epoch - 1 + seen / len(data)) / epochs, lr, warmup=0.05)
            for group in optimizer.param_groups:
                group["lr"] = current_lr
            with autocast(inputs.device):
                loss = criterion(model(inputs.contiguous(memory_format=torch.channels_last)), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if averaged:
                averaged.update_parameters(model)
            total_loss += loss.item() * len(inputs)
            if not math.isfinite(total_loss):
                raise ValueError(f"the loss is {loss.item()} in epoch {epoch}; try a lower --lr than {lr}")
            seen += len(inputs)
            bar.update(len(inputs))
            bar.set_postfix(loss=f"{total_loss / seen:.4f}", refresh=False)
        bar.close()
        speed = seen / (time.perf_counter() - start)
        judged = averaged.module if averaged else model
        figures = validate(judged)
        record = {"epoch": epoch, "lr": current_lr, "train_loss": total_loss / seen, **figures}
        history.append({**record, "images_per_s": speed})
        print("  ".join(f"{name} {value:.4g}" for name, value in history[-1].items()), flush=True)
        if score(record) == max(map(score, history)):
            save("best", judged, history)
        state = {"averaged": averaged.state_dict()} if averaged else {}
        save("last", model, history, optimizer=optimizer.state_dict(), **state)
    return history


def fit_classifier(
    model: nn.Module,
    train: FaceBatches,
    val: FaceBatches,
    out_dir: Path,
    *,
    classes: Sequence[str],
    label_smoothing: float,
    about: dict,
    **options: object,
) -> dict:
    """Train a classifier with `fit`, draw its curves, and return the best checkpoint.

    The best epoch has the lowest cross-entropy on val at its own temperature: of 2,479 faces, accuracy alone
    is too noisy.

    Args:
        val: its labels are indices of `classes`.
        classes: what the best checkpoint tells apart. The run may learn more, named in about["classes"].
        label_smoothing: share of the target that is spread over all classes (Szegedy et al. 2016).
        about: what the checkpoint says of itself, see `checkpoint_writer`.
        options: epochs, lr, weight_decay, ema and resume of `fit`.
    """
    kept = [about["classes"].index(name) for name in classes]

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)

    def validate(net: nn.Module) -> dict[str, float]:
        logits, labels = evaluate(net, val.eval())
        logits = logits[:, kept]
        temperature = fit_temperature(logits, labels)
        figures = judge(logits, labels, temperature)
        return {**{f"val_{name}": value for name, value in figures.items()}, "temperature": temperature}

    def score(record: dict) -> float:
        return -record["val_loss"]

    save = checkpoint_writer(out_dir, **about)
    history = fit(model, criterion, train, validate, score=score, save=save, **options)
    panels = {"loss": ["train_loss", "val_loss"], "validation": ["val_acc", "val_mean_recall"]}
    plot_history(history, panels, out_dir / "curves.png")
    best = keep_classes(load_checkpoint(out_dir / "best.pt"), classes)
    save_checkpoint(out_dir / "best.pt", {**best, "model": half_precision(best["model"])})
    return best


# --- judging a classifier ---


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Count (num_classes, num_classes) int64, true class by row and predicted class by column."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, -1)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Find the temperature that minimises the cross-entropy of logits (N, C) divided by it, within 0.05-20.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    log_low, log_high = math.log(0.05), math.log(20)
    for _ in range(30):  # ternary search: the loss has one minimum in the temperature
        third = (log_high - log_low) / 3
        low, high = log_low + third, log_high - third
        if F.cross_entropy(logits / math.exp(low), labels) < F.cross_entropy(logits / math.exp(high), labels):
            log_high = high
        else:
            log_low = low
    return math.exp((log_low + log_high) / 2)


def reliability(probs: Tensor, labels: Tensor, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Sort probs (N, C) into equally wide bins of confidence: each one's count, mean confidence and accuracy.

    Means over an empty bin are 0.
    """
    confidence, predicted = probs.max(1)
    which = (confidence * bins).long().clamp(max=bins - 1)
    values = torch.stack([torch.ones_like(confidence), confidence, (predicted == labels).float()])
    counts, *sums = torch.zeros(3, bins).index_add(1, which, values)
    return counts, *(total / counts.clamp(min=1) for total in sums)


def calibration_error(probs: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Compute the expected calibration error, 0-1, of probs (N, C), over equally wide bins of confidence.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    counts, confidence, accuracy = reliability(probs, labels, bins)
    return (counts * (accuracy - confidence).abs()).sum().item() / len(labels)


def judge(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> dict[str, float]:
    """Summarise logits (N, C): loss, accuracy, mean recall over the classes that occur, calibration error."""
    matrix = confusion_matrix(logits.argmax(1), labels, logits.shape[1])
    occurs = matrix.sum(1) > 0
    recalls = matrix.diag()[occurs] / matrix.sum(1)[occurs]
    return {
        "loss": F.cross_entropy(logits / temperature, labels).item(),
        "acc": (logits.argmax(1) == labels).float().mean().item(),
        "mean_recall": recalls.mean().item(),
        "ece": calibration_error((logits / temperature).softmax(1), labels),
    }


def summarize(logits: Tensor, labels: Tensor, temperature: float, classes: Sequence[str]) -> dict:
    """Return `n`, what `judge` says of logits (N, C), the `recall` by class, and the `confusion` matrix."""
    matrix = confusion_matrix(logits.argmax(1), labels, len(classes))
    recalls = dict(zip(classes, (matrix.diag() / matrix.sum(1).clamp(min=1)).tolist(), strict=True))
    figures = judge(logits, labels, temperature)
    return {"n": len(labels), **figures, "recall": recalls, "confusion": matrix.tolist()}


def report(
    split: str,
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    classes: Sequence[str],
    out_dir: Path,
    subsets: dict[str, Tensor] | None = None,
) -> None:
    """Print how good logits (N, C) are, also by class; write `split`.json, _confusion.png, _reliability.png.

    Args:
        subsets: masks (N,) bool of faces to be judged apart as well, by name; an empty one is left out.
    """
    figures = summarize(logits, labels, temperature, classes)
    matrix = torch.tensor(figures["confusion"])
    record = {**figures, "subsets": {}}
    majority = matrix.sum(1).max().item() / len(labels)

    def line(figures: dict[str, float], n: int) -> str:
        return (
            f"accuracy {figures['acc']:.2%} of {n}, mean recall {figures['mean_recall']:.2%}, "
            f"calibration error {figures['ece']:.3f}"
        )

    print(f"{split}: {line(figures, len(labels))} (always the commonest class: accuracy {majority:.2%})")
    for name, count in zip(classes, matrix.sum(1).tolist(), strict=True):
        print(f"{split}: recall {figures['recall'][name]:7.2%} of {count:5} {name}")
    for name, mask in (subsets or {}).items():
        if mask.any():
            record["subsets"][name] = judge(logits[mask], labels[mask], temperature) | {"n": int(mask.sum())}
            print(f"{split}, {name}: {line(record['subsets'][name], int(mask.sum()))}")
    out_dir.mkdir(parents=True, exist_ok=True)
    title = f"{split}: accuracy {figures['acc']:.1%}, n = {len(labels)}"
    plot_confusion(matrix, classes, title, out_dir / f"{split}_confusion.png")
    plot_reliability((logits / temperature).softmax(1), labels, split, out_dir / f"{split}_reliability.png")
    (out_dir / f"{split}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {out_dir / f'{split}.json'}, {split}_confusion.png and {split}_reliability.png")


def plot_history(history: list[dict], panels: dict[str, Sequence[str]], path: Path) -> None:
    """Draw the named figures over the epochs into a PNG, a panel for each entry of `panels`."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (labelling faces does not need it)

    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    epochs = [record["epoch"] for record in history]
    for axes, (title, names) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name in names:
            axes.plot(epochs, [record[name] for record in history], marker=".", label=name.replace("_", " "))
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def plot_confusion(matrix: Tensor, classes: Sequence[str], title: str, path: Path) -> None:
    """Draw a confusion matrix with counts and row shares, and each class's recall beside it, into a PNG."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    shares = (matrix / matrix.sum(1, keepdim=True).clamp(min=1)).numpy()
    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    left.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*matrix.shape):
        share = shares[row, column]
        left.text(
            *(column, row, f"{share:.1%}\n{matrix[row, column]}"),
            **{"ha": "center", "va": "center", "color": "white" if share > 0.5 else "black"},
        )
    ticks = range(len(classes))
    left.set(
        xticks=ticks,
        yticks=ticks,
        xticklabels=classes,
        yticklabels=classes,
        xlabel="predicted",
        ylabel="true",
    )
    bars = right.barh(ticks, shares.diagonal())
    right.bar_label(bars, [f"{recall:.1%}" for recall in shares.diagonal()], padding=3)
    right.set(yticks=ticks, yticklabels=classes, xlim=(0, 1.12), xlabel="recall")
    right.invert_yaxis()
    figure.savefig(path, dpi=150)


def plot_reliability(probs: Tensor, labels: Tensor, title: str, path: Path) -> None:
    """Draw how often probs (N, C) are right when they say how sure they are, over 15 bins, into a PNG."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    counts, confidence, accuracy = (part.numpy() for part in reliability(probs, labels))
    filled = counts > 0
    figure = Figure(figsize=(5, 5.5), layout="constrained")
    figure.suptitle(f"{title}: calibration error {calibration_error(probs, labels):.3f}, n = {len(labels)}")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="gray", linestyle="dashed", label="perfectly calibrated")
    upper.plot(confidence[filled], accuracy[filled], marker="o", label="this model")
    upper.set(ylabel="share that is right", ylim=(0, 1), xlim=(0, 1))
    upper.legend()
    edges = np.linspace(0, 1, len(counts) + 1)
    lower.bar(edges[:-1], counts, width=1 / len(counts), align="edge", edgecolor="white")
    lower.set(xlabel="probability of the predicted class", ylabel="faces")
    figure.savefig(path, dpi=150)


# --- checkpoints ---

FORMAT = 1
STAGES = ("gray", "fer", "emotion")


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint that is whole or not there: to a temporary file, flushed, then renamed over `path`.

    Raises:
        OSError: it could not be written; what stood at `path` is untouched.
    """
    buffer = io.BytesIO()  # torch.save to a full disk raises RuntimeError, a plain write a telling OSError
    torch.save({"format": FORMAT, **checkpoint}, buffer)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"could not write {path}: {error.strerror}; free some space and go on with --resume"
        ) from None


def load_checkpoint(path: Path, stages: Sequence[str] = STAGES) -> dict:
    """Read a checkpoint onto the CPU; weights stored in half precision come back as float32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint of this project, or of none of the `stages`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}; an earlier stage writes it, see the README")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a damaged file
        raise ValueError(f"{path} is not a readable checkpoint ({str(error).splitlines()[0]})") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a checkpoint of this toolkit, format {FORMAT}; train one, see the README"
        )
    if checkpoint["stage"] not in stages:
        expected = " or ".join(repr(stage) for stage in stages)
        raise ValueError(f"{path} has stage {checkpoint['stage']!r}, expected {expected}")
    checkpoint["model"] = {
        name: value.float() if value.is_floating_point() else value
        for name, value in checkpoint["model"].items()
    }
    return checkpoint


def half_precision(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Store kernels and matrices as float16; BatchNorm and biases stay float32, they are small and touchy."""
    return {name: value.half() if value.ndim > 1 else value for name, value in weights.items()}


def checkpoint_writer(out_dir: Path, **about: object) -> Callable[..., None]:
    """Make the function with which `fit` saves: `best.pt` to use, `last.pt` to resume from, `log.jsonl`.

    Args:
        about: what the checkpoint says of itself: stage, arch, classes, image_size, crop_margin, config.
    """

    def save(name: str, model: nn.Module, history: list[dict], **training_state: dict) -> None:
        record = history[-1]
        weights = model.state_dict()
        save_checkpoint(
            out_dir / f"{name}.pt",
            {
                **about,
                "normalization": {"mean": GRAY_MEAN, "std": GRAY_STD},
                "temperature": record.get("temperature", 1.0),
                "epoch": record["epoch"],
                "metrics": record,
                "history": history,
                "model": weights if training_state else half_precision(weights),
                **training_state,
            },
        )
        if training_state:
            lines = "".join(json.dumps(past) + "\n" for past in history)
            (out_dir / "log.jsonl").write_text(lines, encoding="utf-8")

    return save


def init_from(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load an earlier stage's weights in place.

    Raises:
        ValueError: names or shapes differ, for example because the architecture does.
    """
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"the initial weights do not fit: {str(error).splitlines()[1].strip()}") from None
    if missing or unexpected:
        raise ValueError(
            f"the initial weights do not fit: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )


def keep_classes(checkpoint: dict, classes: Sequence[str]) -> dict:
    """Return a checkpoint whose head tells only `classes`, some of its own, apart."""
    rows = [checkpoint["classes"].index(name) for name in classes]
    head = {name: checkpoint["model"][name][rows] for name in ("fc.weight", "fc.bias")}
    return {**checkpoint, "classes": list(classes), "model": {**checkpoint["model"], **head}}


def load_network(checkpoint: dict) -> nn.Module:
    """Build the network of a trained checkpoint."""
    model = gray_resnet(checkpoint["arch"], len(checkpoint["classes"]))
    model.load_state_dict(checkpoint["model"])
    return model


# --- inference ---


class ForPixels(nn.Module):
    """A network that takes images (N, H, W, C), values 0-255, as they come and normalises them itself."""

    def __init__(self, model: nn.Module, mean: float, std: float):
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the network on (images - mean) / std, float32 (N, C, H, W)."""
        return self.model((images.permute(0, 3, 1, 2).float() - self.mean) / self.std)


MAX_BATCH = 32  # images that an engine takes at once; larger batches are no faster on two cores


class Engine:
    """A network ready to run: compiled by OpenVINO for a CPU, else as it is by torch.

    What OpenVINO compiled is kept in the user's cache folder, for converting takes seconds. A file there is
    good for one set of weights, of versions and kind of CPU; a missing or damaged one is made again.
    Not to be called by two threads at once.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], nn.Module],
        weights: bytes,
        like: Tensor,
        device: torch.device,
        *,
        any_size: bool = False,
        fast: bool = False,
    ):
        """Compile a network, or find it compiled.

        Args:
            name: of its file in the cache.
            build: makes the network, called only if it must be.
            weights: stands for all on which the network depends, beside this file.
            like: a batch of images (2, H, W, C), as the network takes them.
            device: where it runs.
            any_size: H and W may vary from call to call.
            fast: use bfloat16 on a CPU that is fast at it.
        """
        self._pads = not any_size
        self._infer = None
        if device.type == "cpu":
            self._infer = openvino_infer(name, build, weights, like, any_size, fast)
        if self._infer is None:
            self._infer = torch_infer(build().eval(), device)

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """Run images (N, H, W, C); return the network's outputs, float32 (N, ...)."""
        if not self._pads:
            return self._infer(images)
        parts = []
        for start in range(0, max(len(images), 1), MAX_BATCH):
            batch = images[start : start + MAX_BATCH]
            # OpenVINO prepares for each shape that it meets, so there are few: 1, 2, 4 ... MAX_BATCH.
            length = 1 << max(len(batch) - 1, 0).bit_length()
            padding = np.zeros((length - len(batch), *batch.shape[1:]), batch.dtype)
            parts.append([output[: len(batch)] for output in self._infer(np.concatenate([batch, padding]))])
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def torch_infer(network: nn.Module, device: torch.device) -> Callable[[np.ndarray], list[np.ndarray]]:
    """Make the function that runs a network by torch."""
    network = network.to(device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def infer(images: np.ndarray) -> list[np.ndarray]:
        outputs = network(torch.from_numpy(images).to(device))
        return [output.cpu().numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]

    return infer


def openvino_infer(
    name: str, build: Callable[[], nn.Module], weights: bytes, like: Tensor, *how: bool
) -> Callable[[np.ndarray], list[np.ndarray]] | None:
    """Make the function that runs a network by OpenVINO, None where that is not installed; as `Engine`."""
    sys.modules.setdefault("openvino_telemetry", None)  # it would report each import to Google Analytics
    try:
        import openvino  # noqa: PLC0415 (not there on every machine)
    except ImportError:
        return None
    any_size, fast = how
    core = openvino.Core()
    fast = fast and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16" if fast else "f32"}
    shape = (-1, -1, -1, like.shape[3]) if any_size else (-1, *like.shape[1:])
    cpu = core.get_property("CPU", "FULL_DEVICE_NAME")
    key = repr((openvino.__version__, torch.__version__, cpu, shape, like.dtype, options)).encode()
    digest = hashlib.sha256(key + Path(__file__).read_bytes() + weights).hexdigest()
    path = cache_dir() / f"{name}-{digest[:16]}.bin"
    blob = read_cache(path)
    if blob:
        compiled = core.import_model(blob, "CPU", options)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that tracing will go some day
            network = openvino.convert_model(
                build().eval(), example_input=like, input=[openvino.PartialShape(shape)]
            )
        compiled = core.compile_model(network, "CPU", options)
        write_cache(path, compiled.export_model().getvalue())
    request = compiled.create_infer_request()

    def infer(images: np.ndarray) -> list[np.ndarray]:
        return list(request.infer([np.ascontiguousarray(images)], share_inputs=True).values())

    return infer


def cache_dir() -> Path:
    """Name the folder for what can be made again; see the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emotion-detector"


CACHE_DAYS = 30  # chosen here; each change of weights or versions leaves 100 MB behind


def read_cache(path: Path) -> bytes | None:
    """Read what `write_cache` wrote; None if it is missing, unreadable or not whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    with contextlib.suppress(OSError):
        path.touch()  # it is in use
    digest, blob = content[:32], content[32:]
    return blob if hashlib.sha256(blob).digest() == digest else None


def write_cache(path: Path, blob: bytes) -> None:
    """Keep `blob` for `read_cache`, and nothing that was not used for CACHE_DAYS.

    Where nothing can be kept, it is made again each time.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(hashlib.sha256(blob).digest() + blob)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        for other in path.parent.glob("*.bin"):
            if time.time() - other.stat().st_mtime > CACHE_DAYS * 24 * 3600:
                other.unlink()


class Classifier:
    """A trained network, ready to tell the emotions of faces.

    Attributes:
        classes: names, in the order of the probabilities.
        checkpoint: all that the file says of itself, weights excepted.
    """

    def __init__(self, checkpoint: dict, device: torch.device):
        self.classes = tuple(checkpoint["classes"])
        self.checkpoint = {key: value for key, value in checkpoint.items() if key != "model"}

        def build() -> nn.Module:
            return ForPixels(load_network(checkpoint), 255 * GRAY_MEAN, 255 * GRAY_STD)

        weights = b"".join(tensor.numpy().tobytes() for tensor in checkpoint["model"].values())
        weights += repr((checkpoint["arch"], self.classes)).encode()
        like = torch.zeros(2, checkpoint["image_size"], checkpoint["image_size"], 1)
        self._engine = Engine("classifier", build, weights, like, device, fast=True)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "Classifier":
        """Read a checkpoint of finetune_fer.py or finetune_emotion.py; raises as `load_checkpoint`."""
        return cls(load_checkpoint(path, stages=("fer", "emotion")), device)

    def predict(self, image: Image.Image, boxes: np.ndarray) -> np.ndarray:
        """Classify the faces in `boxes` (N, 4) in one batch; return probabilities (N, C) float32."""
        return self.predict_crops(crop_faces(image, boxes, self.checkpoint["crop_margin"]))

    def predict_all(self, images: Sequence[Image.Image], boxes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Classify the faces in each image's `boxes` (N, 4), all in one batch; return (N, C) for each."""
        margin = self.checkpoint["crop_margin"]
        crops = [crop_faces(image, own, margin) for image, own in zip(images, boxes, strict=True)]
        probs = self.predict_crops(list(itertools.chain(*crops)))
        ends = np.cumsum([len(own) for own in crops])
        return [probs[end - len(own) : end] for own, end in zip(crops, ends, strict=True)]

    def predict_crops(self, crops: Sequence[Image.Image]) -> np.ndarray:
        """Classify N crops of any mode and size in one batch; return probabilities (N, C) float32."""
        size = self.checkpoint["image_size"]
        images = np.empty((len(crops), size, size, 1), np.float32)
        for i, crop in enumerate(crops):  # as normalize_faces, which trained it, resizes: not rounded
            gray = crop.convert("L").convert("F")
            images[i, :, :, 0] = gray.resize((size, size), Image.Resampling.BILINEAR)
        [logits] = self._engine(images)
        logits = torch.from_numpy(logits) / self.checkpoint["temperature"]
        return logits.softmax(1).numpy()


# --- command line ---


def one_line_errors(main: Callable) -> Callable:
    """Decorate a script's `main`: a user's mistake becomes one line on stderr, not a traceback.

    ValueError and OSError (their message names the thing, the expectation and the remedy) end with exit
    code 1, and so does a closed stdout, silently; Ctrl-C ends with 130.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except BrokenPipeError:  # whoever reads stdout has enough; the rest must not raise again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapped


def number(kind: type, low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    """Make an argparse type: an int or float within [low, high]."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is no number at all
    return parse


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add --device; `pick_device` reads it."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="where the networks run; auto takes the first there is of cuda, mps, cpu (default: %(default)s)",
    )


def pick_device(name: str) -> torch.device:
    """Turn --device into a torch device.

    Raises:
        ValueError: this machine has none of that kind.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise ValueError(f"this machine has no {name} device that PyTorch can use; try --device auto")
    return torch.device(name)


def add_training_options(
    parser: argparse.ArgumentParser,
    *,
    data_dir: str,
    out_dir: str,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    image_size: int | None = None,
) -> None:
    """Add what all finetune_*.py scripts understand, with a stage's own defaults."""
    add = parser.add_argument
    add("--data-dir", type=Path, default=data_dir, help="folder of images (default: %(default)s)")
    add("--out-dir", type=Path, default=out_dir, help="for checkpoints and plots (default: %(default)s)")
    add(
        "--image-size",
        type=number(int, 32, 512),
        default=image_size,
        metavar="PX",
        help=f"input side, pixels (default: {image_size or 'that of --init'})",
    )
    add(
        "--epochs",
        type=number(int, 1),
        default=epochs,
        metavar="N",
        help="passes over the data (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=number(int, 1),
        default=batch_size,
        metavar="N",
        help="images a step (default: %(default)s)",
    )
    add(
        "--lr",
        type=number(float, 0),
        default=lr,
        metavar="X",
        help="peak learning rate of AdamW (default: %(default)s)",
    )
    add(
        "--weight-decay",
        type=number(float, 0),
        default=weight_decay,
        metavar="X",
        help="of AdamW (default: %(default)s)",
    )
    add(
        "--ema",
        type=number(float, 0, 1),
        default=0.0,
        metavar="DECAY",
        help="average the weights over the steps with this decay; 0: do not (default: %(default)s)",
    )
    add(
        "--limit",
        type=number(int, 1),
        metavar="N",
        help="use only N images, of each split if there are splits",
    )
    add(
        "--seed",
        type=number(int, 0),
        default=0,
        metavar="N",
        help="of everything random (default: %(default)s)",
    )
    add(
        "--resume",
        type=Path,
        metavar="CHECKPOINT",
        help="go on with an interrupted run from its last.pt, with its options; those given anew win",
    )
    add_device_option(parser)


def add_freezing_option(parser: argparse.ArgumentParser, unfreeze: Sequence[str]) -> None:
    """Add what lets only parts of the network learn."""
    parser.add_argument(
        "--unfreeze",
        nargs="+",
        default=list(unfreeze),
        metavar="PART",
        help=f"parts that learn, of {' '.join(PARTS)} (default: {' '.join(unfreeze)})",
    )


def add_split_option(parser: argparse.ArgumentParser) -> None:
    """Add what the stages understand that split their own data."""
    parser.add_argument(
        "--val-fraction",
        type=number(float, 0, 0.9),
        default=0.2,
        metavar="X",
        help="share of images held out (default: %(default)s)",
    )


def add_classifier_options(parser: argparse.ArgumentParser) -> None:
    """Add what the stages understand that tell emotions apart."""
    parser.add_argument(
        "--balance",
        type=number(float, 0, 1),
        default=0.0,
        metavar="X",
        help="0: each image once an epoch, 1: each class equally often (default: %(default)s)",
    )
    parser.add_argument(
        "--mixup",
        type=number(float, 0, 10),
        default=0.0,
        metavar="ALPHA",
        help="blend pairs of faces by shares from Beta(ALPHA, ALPHA); 0: do not (default: %(default)s)",
    )
    parser.add_argument(
        "--label-smoothing",
        type=number(float, 0, 0.9),
        default=0.1,
        metavar="X",
        help="share of the target that is spread over all classes (default: %(default)s)",
    )


def parse_with_resume(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, stage: str
) -> argparse.Namespace:
    """Parse the command line; with --resume, the interrupted run's options become the defaults.

    `args.resumed` is the checkpoint to go on from, or None.

    Raises:
        ValueError: --resume names no last.pt of this stage.
    """
    args = parser.parse_args(argv)
    args.resumed = None
    if args.resume:
        resumed = load_checkpoint(args.resume, stages=(stage,))
        if "optimizer" not in resumed:
            raise ValueError(
                f"{args.resume} cannot be resumed from, it has no optimizer state; expected a last.pt"
            )
        parser.set_defaults(**resumed["config"])  # argparse turns text into paths as it does its own defaults
        args = parser.parse_args(argv)
        args.resumed = resumed
    return args


def start_run(args: argparse.Namespace, model: nn.Module, device: torch.device, data: dict[str, str]) -> None:
    """Make the output folder, write config.json into it, and say on what, with what and how a run will train.

    Raises:
        ValueError: the folder holds another run's checkpoint, and this is not its resumption.
    """
    if (args.out_dir / "last.pt").exists() and not args.resume:
        raise ValueError(
            f"{args.out_dir} holds another run; go on with --resume {args.out_dir / 'last.pt'}, "
            "choose another --out-dir, or delete it"
        )
    args.out_dir.mkdir(parents=True, exist_ok=True)
    config = plain_config(args)
    (args.out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained = sum(size for size, learns in sizes if learns)
    print(f"device: {device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, text in data.items():
        print(f"{name}: {text}")
    print(f"parameters: {trained:,} of {sum(size for size, _ in sizes):,} learn")
    print("config: " + " ".join(f"{key}={value}" for key, value in config.items()))
    print(
        f"if it stops, go on with --resume {args.out_dir / 'last.pt'}, written after every epoch", flush=True
    )


def fit_options(args: argparse.Namespace) -> dict:
    """Return those of the options that `fit` takes."""
    names = ("epochs", "lr", "weight_decay", "ema")
    return {**{name: getattr(args, name) for name in names}, "resume": args.resumed}


def plain_config(args: argparse.Namespace) -> dict:
    """Return the options as plain types, for checkpoints and config.json."""
    options = {key: value for key, value in vars(args).items() if key not in ("resume", "resumed")}
    return json.loads(json.dumps(options, default=str))  # paths become text, in lists too
