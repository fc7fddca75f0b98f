"""Fine-tune the FER network on photographs that were found by a search word.

MTCNN cuts each photo to its single face, gray, with the margin of the checkpoint; photos with no face or
several are left out and counted. The crops are kept beside an index, so a second run looks only at what is
new or changed. As in the original toolkit the early layers stay frozen, BatchNorm included: the ResNet's last
stage and the head learn. The held-out part has whole groups of near-duplicates.

A search word is a weak label. --review writes a page that shows first what FER's network and one
cross-validated on the photos both doubt; the next run obeys the corrections.csv that it exports.

So that FER, and what else --mix names, is not forgotten, its faces are rehearsed in every batch; their
targets are what the network made of them before (Buzzega et al. 2020, "Dark Experience for General Continual
Learning: a Strong, Simple Baseline", arXiv:2004.07211). Then the weights are drawn back half of the way to
those that training began with, and further if too much is forgotten all the same (Wortsman et al. 2022,
"Robust fine-tuning of zero-shot models", arXiv:2109.01903). Photos that stand in the val or test of --mix,
which may have come from a search too, are not learned from.

The classes are the folders of --data-dir; with rehearsal the network keeps those of --init as well. For those
that --init has not learned, the head is fitted before the rest learns, so that a few photos and steps do.

Usage:
    python finetune_emotion.py
    python finetune_emotion.py --review
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import hashlib
import itertools
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import model as shared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor, nn

CUT, NO_FACE, SEVERAL, UNREADABLE = "one face cut", "no face", "several faces", "not readable"
OUTCOMES = (CUT, NO_FACE, SEVERAL, UNREADABLE)  # of a photo, in the table's order
HEAD_DECAY = 0.1  # L2 penalty of a fitted head: of 1e-4 to 0.1 in tens the best on scraped faces
SHEET_SIDE = 128  # pixels, of a face on the sheet of mistakes
FOLDS = 5  # of the cross-validation, chosen here
# Shares of the way that training went, tried in turn. Half of it is what Wortsman et al. 2022 advise; of 422
# held-out photos it kept 5.5 of 6.9 points gained, and lost none of FER's val.
BLENDS = (0.5, 0.25)
OUT_DIR = Path("runs/emotion")
FER_DIR = Path("data/fer")  # where unpack_fer_data.py writes
REVIEW_PAGE = shared.RESOURCES / "review.html"


# --- from photos to faces ---


def blur_measure(face: Image.Image) -> float:
    """Return the variance of the Laplacian of a gray face, the lower the more blurred.

    Source: Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy: a comparative study".
    """
    from scipy import ndimage

    return float(ndimage.laplace(np.asarray(face, float))[1:-1, 1:-1].var())


def cut_face(
    path: Path, finder: shared.FaceFinder | None, margin: float, largest_face: bool
) -> tuple[str, Image.Image | None]:
    """Return what a photo is, one of OUTCOMES, and the crop of its face, None if the photo is left out.

    Without a finder the photo is a face, of which the central square is taken.
    """
    try:
        image = shared.open_picture(path)
    except shared.PictureError:
        return UNREADABLE, None
    if finder is None:
        [crop] = shared.crop_faces(image, np.array([[0, 0, *image.size]]), 0)
        return CUT, crop
    boxes = finder.find(image).boxes
    if len(boxes) != 1 and not (largest_face and len(boxes)):
        return SEVERAL if len(boxes) else NO_FACE, None
    largest = (boxes[:, 2:] - boxes[:, :2]).prod(1).argmax()
    [crop] = shared.crop_faces(image, boxes[[largest]], margin)
    return CUT, crop


def cut_photos(
    data_dir: Path,
    faces_dir: Path,
    classes: Sequence[str],
    finder: shared.FaceFinder | None,
    *,
    margin: float,
    largest_face: bool,
    size: int,
    limit: int | None = None,
) -> list[dict]:
    """Cut photos data_dir/<class>/* into faces_dir; return a record for each, as in its index.jsonl.

    A photo is looked at again only if its content or a setting has changed since. The index is a journal: it
    has a line as soon as a photo is done, so an interrupted run goes on where it was. Crops of photos that
    are gone go too. Without a finder the photos are faces.

    A record has `photo` (its path below data_dir, with slashes), `label`, `crop` (a gray PNG of `size` pixels
    below faces_dir), `sha256` of the photo, the `settings`, the `reason` why it is left out or None, and
    the `blur` of the face.
    """
    settings = {"margin": margin, "largest_face": largest_face} if finder else {"cut": "central square"}
    settings |= {"min_face_size": finder.min_face_size, "min_prob": finder.min_prob} if finder else {}
    settings |= {"size": size} if size != shared.IMAGE_SIZE else {}
    found = itertools.chain.from_iterable(shared.list_images(data_dir / name) for name in classes)
    paths = {path.relative_to(data_dir).as_posix(): path for path in found}
    faces_dir.mkdir(parents=True, exist_ok=True)
    index_path = faces_dir / "index.jsonl"
    known = read_index(index_path)
    for photo in known.keys() - paths:
        del known[photo]
        with contextlib.suppress(ValueError):  # it leads out of the folder, so it is no crop of ours
            shared.inside(faces_dir, f"{photo}.png").unlink(missing_ok=True)
    wanted = shared.spread(list(paths), limit)
    with index_path.open("ab", buffering=0) as index:
        for photo in tqdm(wanted, "finding faces", unit="photo", disable=None):
            record = {"photo": photo, "label": photo.split("/")[0], "crop": f"{photo}.png"}
            record |= {"sha256": "", "settings": settings}
            with contextlib.suppress(OSError):  # `cut_face` finds that it is not readable
                record["sha256"] = shared.file_digest(paths[photo])
            crop_path, before = shared.inside(faces_dir, record["crop"]), known.get(photo, {})
            if record.items() <= before.items() and (before["reason"] or crop_path.exists()):
                continue
            outcome, crop = cut_face(paths[photo], finder, margin, largest_face)
            if crop:
                face = crop.convert("L").resize((size, size), Image.Resampling.LANCZOS)
                with shared.replacing(crop_path) as temporary:
                    face.save(temporary, "PNG")
                known[photo] = {**record, "reason": None, "blur": round(blur_measure(face), 1)}
            else:
                crop_path.unlink(missing_ok=True)
                known[photo] = {**record, "reason": outcome}
            try:
                index.write(f"\n{json.dumps(known[photo])}\n".encode())  # the line before may be cut short
            except OSError as error:
                raise OSError(f"cannot write {index_path}: {error.strerror}") from None
    with shared.replacing(index_path) as temporary:
        lines = (json.dumps(record) + "\n" for record in known.values())
        temporary.write_text("".join(lines), encoding="utf-8")
    return [known[photo] for photo in wanted]


def read_index(path: Path) -> dict[str, dict]:
    """Read the records of index.jsonl, by photo; a line that was cut short is as good as none."""
    records = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, ArithmeticError, LookupError, TypeError, RecursionError):
            record = json.loads(line)
            is_cut = record["reason"] is None
            if (is_cut and math.isfinite(record["blur"])) or record["reason"] in OUTCOMES:
                records[str(record["photo"])] = record
    return records


def report_photos(records: Sequence[dict], classes: Sequence[str], corrections: Iterable[str] = ()) -> None:
    """Print a table of the photos by class and by what they are, and the first that are not readable.

    Of the photos whose labels are corrected, print those that are not among them.
    """
    import pandas as pd

    table = pd.DataFrame(records)
    table["reason"] = table["reason"].fillna(CUT)
    counts = pd.crosstab(table["label"], table["reason"])
    counts = counts.reindex(index=list(classes), columns=OUTCOMES, fill_value=0)
    counts.loc["total"] = counts.sum()
    print(counts.rename_axis(index=None, columns="photos").to_string())
    if len(unreadable := table["photo"][table["reason"] == UNREADABLE]):
        print(shared.printable(f"not readable: {', '.join(unreadable[: shared.MAX_NAMED])}"), file=sys.stderr)
    if stray := sorted(set(corrections).difference(table["photo"])):
        first = ", ".join(stray[: shared.MAX_NAMED])
        print(shared.printable(f"corrections of no photo looked at ({len(stray)}): {first}"), file=sys.stderr)


# --- from faces to train and val ---


def hash_faces(images: Tensor) -> np.ndarray:
    """Return the perceptual hashes (N, 64), bool, of gray uint8 faces (N, 1, S, S).

    Source: imagehash.phash, after Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash
    Functions".
    """
    import imagehash

    return np.stack([imagehash.phash(Image.fromarray(face[0])).hash.ravel() for face in images.numpy()])


def group_duplicates(hashes: np.ndarray) -> Tensor:
    """Number the groups (N,) of faces that a chain of near-duplicates connects."""
    import torch
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import KDTree

    pairs = KDTree(hashes).query_pairs(shared.DUPLICATE_BITS, p=1, output_type="ndarray")
    links = coo_array((np.ones(len(pairs)), pairs.T), (len(hashes), len(hashes)))
    return torch.from_numpy(connected_components(links, directed=False)[1])


def have_duplicates(hashes: np.ndarray, others: np.ndarray) -> Tensor:
    """Return which faces (N,) have a near-duplicate among the others."""
    import torch
    from scipy.spatial import KDTree

    distances, _ = KDTree(others).query(hashes, p=1)
    return torch.from_numpy(distances <= shared.DUPLICATE_BITS)


def split_groups(
    labels: Tensor, groups: Tensor, names: Sequence[str], val_fraction: float, seed: int
) -> Tensor:
    """Choose which faces are held out, (N,) bool: whole groups, of each class its share.

    Which come first follows from `seed` and the faces' `names` alone: photos that come or go move hardly any
    others to the other side, and a run from an earlier one's model is judged by what neither has learned.
    """
    import torch

    lowest = {}
    for group, name in zip(groups.tolist(), names, strict=True):
        lowest[group] = min(name, lowest.get(group, name))
    order = sorted(lowest, key=lambda group: hashlib.sha256(f"{seed} {lowest[group]}".encode()).digest())
    missing = [round(count * val_fraction) for count in torch.bincount(labels).tolist()]
    is_val = torch.zeros(len(labels), dtype=torch.bool)
    for group in order:
        members = groups == group
        label = labels[members][0]
        if members.sum() <= missing[label]:
            is_val |= members
            missing[label] -= int(members.sum())
    return is_val


class LabelledFaces(NamedTuple):
    """The N faces to work with, without those that a correction leaves out."""

    records: list[dict]  # as in the index
    crops: list[Path]
    images: Tensor  # (N, 1, S, S) uint8
    labels: Tensor  # (N,) int64, indices of the classes, corrected
    groups: Tensor  # (N,) int64, numbers of groups of near-duplicates
    is_val: Tensor  # (N,) bool, held out
    is_corrected: Tensor  # (N,) bool, a person has judged the label


def load_labelled(
    records: Sequence[dict],
    faces_dir: Path,
    classes: Sequence[str],
    corrections: dict[str, str],
    *,
    val_fraction: float,
    seed: int,
) -> LabelledFaces:
    """Read the cut faces, split them and correct their labels; a correction moves no face to the other side.

    Raises:
        ValueError: there are too few faces, a class has none, or too many photos are not readable.
    """
    import torch

    found = {record["label"] for record in records}
    unreadable = [record["photo"] for record in records if record["reason"] == UNREADABLE]
    shared.check_readable(unreadable, len(records))
    records = [record for record in records if not record["reason"]]
    if not records:
        raise ValueError("no photo has a single face; add photos or try --largest-face")
    by_crop = {faces_dir / record["crop"]: record for record in records}
    images, crops = shared.load_images(list(by_crop), "L")
    records = [by_crop[crop] for crop in crops]
    groups = group_duplicates(hash_faces(images))
    found_by = torch.tensor([classes.index(record["label"]) for record in records])
    is_val = split_groups(found_by, groups, [record["sha256"] for record in records], val_fraction, seed)
    names = [corrections.get(record["photo"], record["label"]) for record in records]
    if lacking := found.difference(names):
        names = ", ".join(sorted(lacking))
        raise ValueError(f"{names}: no photo with a single face is left; add photos, or take the folder away")
    kept = torch.tensor([i for i, name in enumerate(names) if name], dtype=torch.int64)
    is_val = is_val[kept]
    if is_val.all() or not is_val.any():
        raise ValueError(f"{len(kept)} faces are too few to learn from and to judge by; add photos")
    return LabelledFaces(
        [records[i] for i in kept],
        [crops[i] for i in kept],
        images[kept],
        torch.tensor([classes.index(names[i]) for i in kept]),
        groups[kept],
        is_val,
        torch.tensor([records[i]["photo"] in corrections for i in kept]),
    )


# --- from faces to batches ---


class Rehearsed:
    """Photos' faces with others beside them in every batch: what `model.fit` asks of its data.

    The targets of both are shares of the classes (n, C).
    """

    def __init__(self, photos: shared.FaceBatches, others: shared.FaceBatches):
        self.photos, self.others = photos, others

    def __len__(self) -> int:
        import torch

        photos, others = (
            [len(batch) for batch in shared.split_batches(torch.arange(len(part)), part.batch_size)]
            for part in (self.photos, self.others)
        )
        return sum(photos) + sum(itertools.islice(itertools.cycle(others), len(photos)))

    def train(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch of the photos' batches, each with a batch of the other faces joined to it."""
        import torch

        others = itertools.chain.from_iterable(self.others.train(n) for n in itertools.count(epoch))
        for batches in zip(self.photos.train(epoch), others, strict=False):
            images, targets = zip(*batches, strict=True)
            yield torch.cat(images), torch.cat(targets)

    def eval(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the photos' faces and as many others as an epoch has, as they are: inputs and labels (n,)."""
        import torch

        others, generator = self.others, torch.Generator().manual_seed(self.others.seed)
        drawn = shared.epoch_order(others.groups, others.balance, generator, others.weights)
        drawn = drawn[: len(self) - len(self.photos)]
        parts = others.images[drawn], others.labels[drawn]
        yield from self.photos.eval()
        yield from shared.FaceBatches(*parts, others.batch_size, others.image_size, others.device).eval()


def find_collections(mix: Sequence[str] | None) -> dict[str, shared.Collection]:
    """Return the collections that --mix names; without --mix FER's faces, if they are there.

    Raises:
        ValueError: as `model.parse_collections`, or a collection is called photos.
    """
    if mix is None and not FER_DIR.is_dir():
        print(f"{FER_DIR} is not there, so no faces are rehearsed; see --mix", file=sys.stderr)
        return {}
    collections = shared.parse_collections([str(FER_DIR)] if mix is None else mix)
    if "photos" in collections:
        raise ValueError(
            f"{collections['photos'].folder} has the name that the report has for --data-dir; rename it"
        )
    return collections


def load_rehearsed(
    collections: dict[str, shared.Collection], classes: Sequence[str], size: int, limit: int | None
) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Read collections of faces: images (N, 1, size, size), and labels (N,), by split and collection.

    A collection may have no test.
    """
    faces = {split: {} for split in shared.SPLITS}
    for split, (name, collection) in itertools.product(shared.SPLITS, collections.items()):
        if split != "test" or shared.list_split(collection.folder, split, classes):
            images, labels, _ = shared.load_faces(collection.folder, split, classes, limit=limit, size=size)
            faces[split][name] = images, labels
    return faces


def training_data(
    net: nn.Module,
    faces: LabelledFaces,
    rehearsed: dict[str, dict[str, tuple[Tensor, Tensor]]],
    batches: Callable[..., shared.FaceBatches],
    *,
    collections: dict[str, shared.Collection],
    classes: Sequence[str],
    parent: dict,
    share: float,
) -> tuple[shared.FaceBatches | Rehearsed, dict[str, str]]:
    """Return what is learned from, and its size in words: the photos' train part, and the collections' faces.

    Args:
        rehearsed: see `load_rehearsed`; what stands in a val or test is not learned from.
        batches: `model.FaceBatches` with a run's options.
        parent: the checkpoint of `net`.
        share: the collections' faces for each photo's.
    """
    import torch
    import torch.nn.functional as F

    is_learned = ~faces.is_val
    if held_out := [images for split in ("val", "test") for images, _ in rehearsed[split].values()]:
        is_copy = have_duplicates(hash_faces(faces.images), hash_faces(torch.cat(held_out)))
        print(f"{int(is_copy.sum())} faces also stand in the val or test of --mix: not learned from")
        is_learned &= ~is_copy
    labels = faces.labels[is_learned]
    photos = batches(faces.images[is_learned], labels, targets=F.one_hot(labels, len(classes)).float())
    sizes = {"photos train": shared.count_labels(labels, classes)}
    parts = rehearsed["train"]
    if not (parts and share):
        return photos, sizes
    sizes |= {f"{name} train": shared.count_labels(labels, classes) for name, (_, labels) in parts.items()}
    images = torch.cat([shared.vary_outline(images) for images, _ in parts.values()])
    labels = torch.cat([labels for _, labels in parts.values()])
    of_collection = torch.arange(len(parts)).repeat_interleave(
        torch.tensor([len(own) for _, own in parts.values()])
    )
    with shared.autocast(photos.device):
        logits, _ = shared.evaluate(net, batches(images, labels).eval())
    logits = logits.float()
    targets = torch.zeros(len(logits), len(classes))
    known = [row for row, name in enumerate(classes) if name in parent["classes"]]
    targets[:, known] = logits[:, known].softmax(1)
    others = batches(
        images,
        labels,
        batch_size=max(round(photos.batch_size * share), 1),
        targets=targets,
        groups=of_collection * len(classes) + labels,
        weights=torch.tensor([collections[name].weight for name in parts])[of_collection],
    )
    return Rehearsed(photos, others), sizes


# --- a head for classes that are new ---


def embed(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the head gets to see of all batches, (N, D), its logits (N, C), and the labels (N,)."""
    import torch

    head, net.fc = net.fc, torch.nn.Identity()
    embeddings, labels = shared.evaluate(net, batches)
    net.fc = head
    embeddings = embeddings.clone()  # out of inference mode
    with torch.no_grad():
        logits = head(embeddings.to(head.weight.device)).cpu()
    return embeddings, logits, labels


def fit_head(embeddings: Tensor, labels: Tensor, logits: Tensor, new: Sequence[int]) -> nn.Linear:
    """Return a linear head of `new` classes alone that has learned from embeddings (N, D), by L-BFGS.

    Args:
        labels: (N,), of all C classes.
        logits: (N, C), what the other classes get; those of the new ones do not matter.
        new: indices of classes.
    """
    import torch
    import torch.nn.functional as F

    mean, std = embeddings.mean(0), embeddings.std(0).clamp(min=1e-6)
    embeddings, new = (embeddings - mean) / std, torch.tensor(new)
    head = torch.nn.Linear(embeddings.shape[1], len(new))
    torch.nn.init.zeros_(head.weight)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        head.zero_grad()
        value = F.cross_entropy(logits.index_copy(1, new, head(embeddings)), labels)
        value = value + HEAD_DECAY * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():  # it is to take embeddings as they are
        head.weight /= std
        head.bias -= head.weight @ mean
    return head


def fit_new_rows(
    net: nn.Module, train: shared.FaceBatches | Rehearsed, classes: Sequence[str], parent: dict
) -> dict:
    """Fit the head's rows of classes that are new, to the faces as they are; the others stay.

    Training then begins with a head that knows them as far as the embeddings allow; from random rows, its
    first steps would spoil these. Returns `parent`, the checkpoint of `net`, with temperatures of 1 if there
    are new classes: its own were another head's.

    Source: Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform
    Out-of-Distribution", arXiv:2202.10054.
    """
    import torch

    new = [row for row, name in enumerate(classes) if name not in parent["classes"]]
    if not new:
        return parent
    embeddings, logits, labels = embed(net, train.eval())
    rows = fit_head(embeddings, labels, logits, new).to(net.fc.weight.device)
    with torch.no_grad():
        net.fc.weight[new], net.fc.bias[new] = rows.weight, rows.bias
    return {**parent, "temperature": 1.0, "temperature_all": 1.0}


# --- doubts about labels ---


def cross_validate(embeddings: Tensor, labels: Tensor, groups: Tensor, num_classes: int) -> Tensor:
    """Return the probabilities (N, C) that a linear head gives to faces that it did not learn from.

    It learns from embeddings (N, D) of FOLDS - 1 folds; a group stays in one fold.
    """
    import torch

    folds = groups % FOLDS
    probs = torch.zeros(len(labels), num_classes)
    for fold in range(FOLDS):
        rest = folds != fold
        logits = torch.zeros(int(rest.sum()), num_classes)
        head = fit_head(embeddings[rest], labels[rest], logits, range(num_classes))
        with torch.no_grad():
            probs[~rest] = head(embeddings[~rest]).softmax(1)
    return probs


def second_opinion(
    net: nn.Module,
    faces: LabelledFaces,
    batches: Callable[..., shared.FaceBatches],
    classes: Sequence[str],
    parent: dict,
) -> Tensor:
    """Return the mean of the probabilities (N, C) of `net` and of the heads of `cross_validate`.

    If `parent`, its checkpoint, does not know all the faces' classes, those of the heads alone count.
    """
    embeddings, logits, labels = embed(net, batches(faces.images, faces.labels).eval())
    learned = cross_validate(embeddings, labels, faces.groups, len(classes))
    if not {classes[label] for label in labels} <= set(parent["classes"]):
        return learned
    return ((logits / parent["temperature_all"]).softmax(1) + learned) / 2


def doubt(probs: Tensor, labels: Tensor) -> Tensor:
    """Return how wrong labels (N,) look, -1 to 1: the likeliest other class's probability less the label's.

    Above 0 the label is not the likeliest class. It is the negated margin by which Northcutt et al. 2021,
    "Confident Learning: Estimating Uncertainty in Dataset Labels", rank label errors.
    """
    import torch.nn.functional as F

    own = F.one_hot(labels, probs.shape[1]).bool()
    return probs.masked_fill(own, 0).amax(1) - probs[own]


def read_corrections(path: Path, classes: Sequence[str]) -> dict[str, str]:
    """Read corrections.csv, a row of `path` and `label` for a photo: its label, empty to leave it out.

    Raises:
        ValueError: the columns are missing, a label is none of `classes`, or a path leads elsewhere.
    """

    def parse(cells: dict[str, str]) -> tuple[str, str]:
        photo, label = cells["path"], cells["label"]
        shared.inside(path.parent, photo)
        if label not in {"", *classes}:
            raise ValueError(f"it has the label {label[:50]!r}, expected empty or {', '.join(classes)}")
        return photo, label

    return dict(shared.read_table(path, {"path", "label"}, parse, "what the page of --review exports"))


def write_review(
    path: Path,
    faces: LabelledFaces,
    probs: Tensor,
    classes: Sequence[str],
    *,
    corrections: dict[str, str],
    corrections_path: Path,
) -> None:
    """Write the page on which a person judges the labels that look wrong.

    Args:
        probs: (N, C), of `second_opinion`.
        corrections: earlier judgements; they are not shown again, but exported again.
        corrections_path: where the page asks to save what it exports.
    """
    doubts = doubt(probs, faces.labels).masked_fill(faces.is_corrected, -1)
    shown = doubts.argsort(descending=True)[: int((doubts > 0).sum())].tolist()
    data = {
        "classes": classes,
        "target": str(corrections_path),
        "corrections": list(corrections.items()),
        "faces": [
            {
                "photo": faces.records[i]["photo"],
                "label": classes[faces.labels[i]],
                "part": "val" if faces.is_val[i] else "train",
                "blur": faces.records[i]["blur"],
                "probs": [round(prob, 3) for prob in probs[i].tolist()],
                "png": base64.b64encode(faces.crops[i].read_bytes()).decode(),
            }
            for i in shown
        ],
    }
    data["id"] = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
    with shared.filling_page(REVIEW_PAGE, path) as add:
        add(data)
    print(shared.printable(f"{len(shown)} of {len(faces.labels)} labels look wrong; wrote {path}"))


# --- before and after ---


def draw_back(
    trained: dict,
    start: dict,
    val: dict[str, shared.FaceBatches],
    *,
    run: shared.Run,
    parent: dict,
    lowest: dict[str, float],
) -> dict:
    """Go back from a `trained` checkpoint toward the weights `start` until no collection is below `lowest`.

    Args:
        val: the photos' faces, and each collection's, to which the temperatures are fitted anew.
        lowest: accuracy, 0-1, by collection.

    Raises:
        ValueError: none of BLENDS goes back far enough.
    """
    import torch

    device = val["photos"].device
    for blend in BLENDS:
        weights = {
            name: torch.lerp(start[name], value, blend) if value.is_floating_point() else value
            for name, value in trained["model"].items()
        }
        best = {**trained, "model": weights}
        net = shared.load_network(best).to(device, memory_format=torch.channels_last)
        record = shared.judge_collections(net, val, run, parent)
        reached = {name: record[f"{name}_acc"] for name in lowest}
        print(
            f"{blend:.0%} of the way: " + ", ".join(f"{name} val {acc:.2%}" for name, acc in reached.items())
        )
        if all(reached[name] >= lowest[name] for name in lowest):
            return best | {name: record[name] for name in ("temperature", "temperature_all")}
    raise ValueError(
        "too much is forgotten even a quarter of the way, so none is called best; try a lower --lr, "
        "or a higher --max-loss"
    )


def report_change(results: dict[str, dict[str, dict]], classes: Sequence[str], out_dir: Path) -> None:
    """Print results["before" and "after"][set] as a table; write emotion.json and the photos' confusion."""
    import pandas as pd

    width, rows = max(map(len, results["before"])) + 1, {}
    for name, when in itertools.product(results["before"], ("before", "after")):
        row = results[when][name]
        means = [f"{row[figure]:.1%}" for figure in ("acc", "mean_recall")]
        pairs = zip(row["recall"].values(), row["confusion"], strict=True)
        recalls = [f"{recall:.1%}" if any(counts) else "-" for recall, counts in pairs]
        rows[f"{name:{width}}{when:7}"] = [str(row["n"]), *means, *recalls]
    columns = ["n", "accuracy", "mean recall", *classes]
    print(pd.DataFrame.from_dict(rows, "index", columns=columns).to_string(col_space=11))
    shared.save_json(out_dir / "emotion.json", results)
    matrix = results["after"]["photos val"]["confusion"]
    shared.plot_confusion(matrix, classes, "held-out photos, after", out_dir / "photos_confusion.png")
    print(shared.printable(f"wrote {out_dir / 'emotion.json'} and {out_dir / 'photos_confusion.png'}"))


# --- how good a model is on photos ---


def draw_mistakes(faces: Sequence[tuple[Image.Image, str]], path: Path) -> None:
    """Draw faces, each with lines of text below it, into a PNG of 8 a row."""
    from matplotlib import font_manager

    font = ImageFont.truetype(font_manager.findfont(font_manager.FontProperties()), 11)  # as the plots'
    lines = [line for _, text in faces for line in text.splitlines()]
    side, below, columns = SHEET_SIDE, 34, 8
    width = max(side, math.ceil(max(map(font.getlength, lines))) + 8)
    sheet = Image.new("RGB", (width * columns, (side + below) * math.ceil(len(faces) / columns)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (face, text) in enumerate(faces):
        x, y = number % columns * width, number // columns * (side + below)
        sheet.paste(face.convert("RGB").resize((side, side)), (x, y))
        draw.multiline_text((x + 2, y + side + 1), text, "black", font)
    with shared.replacing(path) as temporary:
        sheet.save(temporary, "PNG")
    print(shared.printable(f"wrote {path}, the surest mistakes"))


def evaluate_photos(
    data_dir: Path,
    classifier: shared.Classifier,
    finder: shared.FaceFinder | None,
    *,
    largest_face: bool,
    limit: int | None,
    out_dir: Path | None,
    csv_path: Path | None,
) -> None:
    """Report how good a classifier is on photos data_dir/<class>/*, among its default classes and those.

    Figures, plots and a sheet of the surest mistakes go to `out_dir`, a row for each photo to `csv_path`.
    """
    import pandas as pd
    import torch
    from scipy.stats import binomtest

    folders = shared.find_classes(data_dir)
    found = [name for name in folders if name in classifier.classes]
    if not found:
        known = ", ".join(classifier.classes)
        raise ValueError(f"the model has learned none of the folders in {data_dir}; it knows {known}")
    if unknown := [name for name in folders if name not in found]:
        print(f"left out, not learned by the model: {', '.join(unknown)}", file=sys.stderr)
    classes = sorted({*classifier.default_classes, *found})
    classifier = classifier.among(classes)
    paths = [path for name in found for path in shared.list_images(data_dir / name)]
    rows, crops = [], []
    for path in tqdm(shared.spread(paths, limit), "classifying", unit="photo", disable=None):
        outcome, crop = cut_face(path, finder, classifier.crop_margin, largest_face)
        photo = path.relative_to(data_dir).as_posix()
        row = {"photo": photo, "label": photo.split("/")[0], "reason": outcome}
        if crop:
            [probs] = classifier.predict_crops([crop])
            row |= {"emotion": classes[probs.argmax()], "prob": probs.max()}
            row |= {f"prob_{name}": prob for name, prob in zip(classes, probs, strict=True)}
            crop.thumbnail((SHEET_SIDE, SHEET_SIDE))  # thousands of large ones would fill the memory
        rows.append(row)
        crops.append(crop)
    report_photos(rows, found)
    if not any(crops):
        raise ValueError(f"{data_dir} has no photo with a single face; see --largest-face and --cropped")
    table = pd.DataFrame(rows)
    if csv_path:
        with shared.replacing(csv_path) as temporary:
            table.to_csv(temporary, index=False)
        print(shared.printable(f"wrote {csv_path}"))
    judged = table[table["reason"] == CUT]
    labels = torch.tensor([classes.index(name) for name in judged["label"]])
    is_right = judged["label"] == judged["emotion"]
    low, high = binomtest(int(is_right.sum()), len(judged)).proportion_ci(method="wilson")
    print(f"photos: 95 % confidence interval of the accuracy {low:.1%} to {high:.1%}")
    logits = torch.tensor(judged.filter(like="prob_").to_numpy(np.float32)).log()
    shared.report("photos", logits, labels, temperature=1.0, classes=classes, out_dir=out_dir, subsets={})
    mistakes = judged[~is_right].sort_values("prob", ascending=False)[:48].itertuples()
    faces = [(crops[row.Index], f"{row.label}, said\n{row.emotion} {row.prob:.2f}") for row in mistakes]
    if out_dir and faces:
        draw_mistakes(faces, out_dir / "photos_mistakes.png")


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict | None]:
    """Return the options and, with --resume, the checkpoint to go on from; raises ValueError."""
    parser = shared.build_parser(__doc__)
    add, points = parser.add_argument, shared.number(float, 0, 100)
    shared.add_options(parser, data_dir="data/google", init=Path("runs/fer/best.pt"))
    add("--out-dir", type=Path, metavar="DIR", help=f"folder to write into (default: {OUT_DIR})")
    faces_help = "where the cut faces and their index are kept (default: --data-dir with _faces after it)"
    add("--faces-dir", type=Path, metavar="DIR", help=faces_help)
    add("--largest-face", action="store_true", help="of several faces cut the largest, do not leave them out")
    mix_help = "collections, as of finetune_fer.py, to learn again and judge on (default: data/fer, if there)"
    add("--mix", nargs="+", metavar="DIR[=WEIGHT]", help=mix_help)
    add("--no-mix", dest="mix", action="store_const", const=[], help="neither learn nor judge such faces")
    share_help = "such faces for each photo's, 0: only judge on them"
    add("--mix-share", type=points, default=2.0, metavar="X", help=share_help)
    size_help = f"{shared.OPTIONS['image_size']['help']} (default: that of --init)"
    add("--image-size", **(shared.OPTIONS["image_size"] | {"help": size_help}))
    loss_help = "of accuracy on each val of --mix that the best model may have lost"
    add("--max-loss", type=points, default=1.0, metavar="POINTS", help=loss_help)
    evaluate_help = "do not train, report how good this model is on --data-dir; files only with --out-dir"
    add("--evaluate", type=Path, metavar="CHECKPOINT", help=evaluate_help)
    add("--cropped", action="store_true", help="the photos are faces, cut already; find none in them")
    add("--csv", type=Path, metavar="FILE", help="with --evaluate: a table, a row for each photo")
    add("--review", action="store_true", help="do not train, write review.html: the labels that look wrong")
    corrections_help = "what the page of --review exported (default: corrections.csv in --data-dir, if there)"
    add("--corrections", type=Path, metavar="FILE", help=corrections_help)
    shared.add_options(
        parser,
        unfreeze=["layer4", "fc"],
        epochs=4,
        batch_size=64,
        lr=1e-4,
        weight_decay=0.05,
        ema=0.0,
        balance=1.0,  # a search brings few disgusted faces, and they are what FER lacks
        mixup=0.0,
        label_smoothing=0.1,
        val_fraction=0.2,
        limit=None,
        seed=0,
        resume=None,
        device="auto",
    )
    args, resumed = shared.parse_with_resume(parser, argv, stage="emotion", out_dir=OUT_DIR)
    if args.csv and not args.evaluate:
        parser.error("--csv is for --evaluate; leave it out")
    if args.csv and args.csv.suffix.lower() != ".csv":
        parser.error(f"--csv cannot write {args.csv}; name a file that ends in .csv")
    if args.evaluate and args.review:
        parser.error("--evaluate and --review are two tasks; ask for one")
    if args.data_dir.name in ("", ".."):
        args.data_dir = args.data_dir.resolve()  # the folder of the faces is named after it
    if (args.data_dir / "train").is_dir():
        raise ValueError(f"{args.data_dir} has splits; pass {args.data_dir / 'train'}, or another of them")
    if not args.evaluate:
        args.out_dir = args.out_dir or OUT_DIR
    return args, resumed


def train_on(
    net: nn.Module,
    train: shared.FaceBatches | Rehearsed,
    sizes: dict[str, str],
    faces: LabelledFaces,
    rehearsed: dict[str, dict[str, tuple[Tensor, Tensor]]],
    *,
    batches: Callable[..., shared.FaceBatches],
    run: shared.Run,
    parent: dict,
    resume: dict | None,
    schedule: shared.Schedule,
    label_smoothing: float,
    max_loss: float,
) -> None:
    """Train, draw the weights back if there are other collections, and report on all that is held out.

    Args:
        train, sizes: what is learned from, see `training_data`.
        max_loss: points of accuracy that each collection's val may lose.
    """
    import torch

    val = {"photos": batches(faces.images[faces.is_val], faces.labels[faces.is_val])}
    val |= {name: batches(*own) for name, own in rehearsed["val"].items()}
    sets = {f"{name} val": own for name, own in val.items()}
    sizes = sizes | {name: shared.count_labels(own.labels, run.classes) for name, own in sets.items()}
    sets |= {f"{name} test": batches(*own) for name, own in rehearsed["test"].items()}
    chosen = [run.classes.index(name) for name in run.default_classes]

    def judged(net: nn.Module, temperature: float) -> dict[str, dict]:
        """Return `model.judge`'s figures on each of the sets, for the run's default classes."""
        results = {}
        for name, own in sets.items():
            logits, labels = shared.among(*shared.evaluate(net, own.eval()), chosen)
            if len(labels):
                results[name] = shared.judge(logits, labels, temperature, run.default_classes)
        return results

    device = val["photos"].device
    run.start(net, device, sizes, resume=resume)
    start = {name: value.cpu().clone() for name, value in net.state_dict().items()}
    before = judged(net, parent["temperature"])
    how = {"schedule": schedule, "label_smoothing": label_smoothing, "parent": parent, "resume": resume}
    best = shared.fit_classifier(net, train, {"photos": val["photos"]}, run=run, **how)
    best_path = run.out_dir / "best.pt"
    if rehearsed["val"]:
        figures = {name: before.get(f"{name} val") for name in rehearsed["val"]}
        lowest = {name: own["acc"] - max_loss / 100 for name, own in figures.items() if own}
        best = draw_back(best, start, val, run=run, parent=parent, lowest=lowest)
        shared.save_checkpoint(best_path, {**best, "model": shared.half_precision(best["model"])})
    trained = shared.load_network(best).to(device, memory_format=torch.channels_last)
    results = {"before": before, "after": judged(trained, best["temperature"])}
    report_change(results, run.default_classes, run.out_dir)
    print(f"best epoch {best['epoch']}; wrote {best_path}")


@shared.one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Cut the faces, train, and report on the held-out faces before and after; or review or judge labels."""
    rank, _ = shared.join_others(is_quiet=True)
    args, resumed = parse_args(argv)
    import torch

    torch.manual_seed(args.seed)
    device = shared.pick_device(args.device)
    taken = {"largest_face": args.largest_face, "limit": args.limit}
    if args.evaluate or args.review:
        shared.leave_others()
    finder = None if args.cropped else shared.FaceFinder(device)
    if args.evaluate:
        model = shared.Classifier(args.evaluate, device, ["all"])
        evaluate_photos(args.data_dir, model, finder, out_dir=args.out_dir, csv_path=args.csv, **taken)
        return
    found = shared.check_collections([args.data_dir])
    faces_dir = args.faces_dir or args.data_dir.with_name(f"{args.data_dir.name}_faces")
    with shared.only_run_in(args.out_dir, faces_dir):
        parent = shared.load_checkpoint(args.init, stages=("fer", "emotion"))
        collections = find_collections(args.mix)
        learned = sorted({*found, *(parent["classes"] if collections else ())})
        shared.check_classes(learned)
        corrections, corrections_path = {}, args.corrections or args.data_dir / "corrections.csv"
        if args.corrections or corrections_path.exists():
            corrections = read_corrections(corrections_path, learned)
            print(shared.printable(f"{len(corrections)} corrections in {corrections_path}"))
        options = {"batch_size": args.batch_size, "balance": args.balance, "mixup": args.mixup}
        options |= {"image_size": args.image_size or parent["image_size"], "seed": args.seed}
        taken |= {"margin": parent["crop_margin"], "size": options["image_size"]}
        records = shared.gather(rank or cut_photos(args.data_dir, faces_dir, found, finder, **taken))[0]
        report_photos(records, found, corrections)
        split = {"val_fraction": args.val_fraction, "seed": args.seed}
        faces = load_labelled(records, faces_dir, learned, corrections, **split)
        net = shared.load_network(parent, learned).to(device, memory_format=torch.channels_last)
        batches = functools.partial(shared.FaceBatches, device=device, **options)
        if args.review:
            probs = second_opinion(net, faces, batches, learned, parent)
            earlier = {"corrections": corrections, "corrections_path": corrections_path}
            write_review(args.out_dir / "review.html", faces, probs, learned, **earlier)
            return
        rehearsed = load_rehearsed(collections, learned, options["image_size"], args.limit)
        mix = {"collections": collections, "classes": learned, "parent": parent, "share": args.mix_share}
        train, sizes = training_data(net, faces, rehearsed, batches, **mix)
        parent = fit_new_rows(net, train, learned, parent)
        shared.freeze_except(net, args.unfreeze)
        run = shared.Run(
            args.out_dir,
            stage="emotion",
            arch=parent["arch"],
            classes=learned,
            default_classes=found,
            image_size=options["image_size"],
            crop_margin=parent["crop_margin"],
            config=shared.plain_config(vars(args)),
            best_name="undrawn.pt" if collections else "best.pt",  # the best may have forgotten too much
        )
        how = {"label_smoothing": args.label_smoothing, "max_loss": args.max_loss, "resume": resumed}
        how["schedule"] = shared.Schedule(args.epochs, args.lr, args.weight_decay, args.ema)
        train_on(net, train, sizes, faces, rehearsed, batches=batches, run=run, parent=parent, **how)


if __name__ == "__main__":
    main()
