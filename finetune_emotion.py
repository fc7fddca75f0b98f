"""Fine-tune the FER network on photographs that were found by a search word.

MTCNN cuts each photo to its single face, gray, with the margin of the checkpoint; photos with no face or
several are left out and counted. The crops are kept beside an index, so a second run looks only at what is
new or changed. As in the original toolkit the early layers stay frozen, BatchNorm included: the ResNet's last
stage and the head learn. The held-out part has whole groups of near-duplicates.

A search word is a weak label. --review writes a page that shows first what FER's network and one
cross-validated on the photos both doubt; the next run obeys the corrections.csv that it exports.

So that FER is not forgotten, its faces are rehearsed in every batch; their targets are what the network made
of them before (Buzzega et al. 2020, "Dark Experience for General Continual Learning: a Strong, Simple
Baseline", arXiv:2004.07211). Then the weights are drawn back half of the way to those that training began
with, and further if too much is forgotten all the same (Wortsman et al. 2022, "Robust fine-tuning of
zero-shot models", arXiv:2109.01903). Photos that stand in FER's val or test, which came from a search too,
are not learned from.

Usage:
    python finetune_emotion.py --data-dir data/google --init runs/fer/best.pt --mix data/fer
    python finetune_emotion.py --data-dir data/google --review
    python finetune_emotion.py --data-dir my_photos --no-mix --unfreeze fc --epochs 3
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
from PIL import Image
from tqdm import tqdm

import model as shared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

FACE_SIZE = 96  # pixels, side of the kept crops: the network's usual input
OUTCOMES = ("one face cut", "no face", "several faces", "not readable")  # of a photo, in the table's order
# Of 64 bits. In 2,239 scraped faces all 23 pairs looked at up to 4 bits apart are one picture, half of the 8
# at 6 bits, a few of 16 at 8, none of 16 at 10. A wrong pair only shares a side of the split.
DUPLICATE_BITS = 8
FOLDS = 5  # of the cross-validation, chosen here
HEAD_DECAY = 0.1  # L2 penalty of the cross-validated head: of 1e-4 to 0.1 in tens the best on scraped faces
# Shares of the way that training went, tried in turn. Half of it is what Wortsman et al. 2022 advise; of 422
# held-out photos it kept 5.5 of 6.9 points gained, and lost none of FER's val.
BLENDS = (0.5, 0.25)
REVIEW_PAGE = shared.RESOURCES / "review.html"


# --- from photos to faces ---


def blur_measure(face: Image.Image) -> float:
    """Return the variance of the Laplacian of a gray face, the lower the more blurred.

    Source: Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy: a comparative study".
    """
    pixels = np.asarray(face, float)
    center = pixels[1:-1, 1:-1]
    laplacian = pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:] - 4 * center
    return float(laplacian.var())


def cut_photo(
    path: Path, finder: shared.FaceFinder, margin: float, largest_face: bool
) -> tuple[dict, Image.Image | None]:
    """Cut a photo to its face, gray, FACE_SIZE pixels.

    Returns:
        What the index keeps, and the face: None if the photo is left out, for the given `reason`.
    """
    try:
        image = shared.open_picture(path)
    except shared.PictureError:
        return {"reason": "not readable"}, None
    faces = finder.find(image)
    if len(faces.boxes) != 1 and not (largest_face and len(faces.boxes)):
        return {"reason": "several faces" if len(faces.boxes) else "no face"}, None
    largest = (faces.boxes[:, 2:] - faces.boxes[:, :2]).prod(1).argmax()
    [crop] = shared.crop_faces(image, faces.boxes[[largest]], margin)
    face = crop.convert("L").resize((FACE_SIZE, FACE_SIZE), Image.Resampling.LANCZOS)
    return {"reason": None, "blur": round(blur_measure(face), 1)}, face


def cut_photos(
    data_dir: Path,
    faces_dir: Path,
    classes: Sequence[str],
    finder: shared.FaceFinder,
    *,
    margin: float,
    largest_face: bool,
    limit: int | None = None,
) -> list[dict]:
    """Cut photos data_dir/<class>/* into faces_dir; return a record for each, as in its index.jsonl.

    A photo is looked at again only if its content or a setting has changed since. The index is a journal: it
    has a line as soon as a photo is done, so an interrupted run goes on where it was. Crops of photos that
    are gone go too.

    A record has `photo` (its path below data_dir, with slashes), `label`, `crop` (a PNG below faces_dir),
    `sha256` of the photo, the `settings`, and what `cut_photo` returns.
    """
    settings = {
        "margin": margin,
        "largest_face": largest_face,
        "min_face_size": finder.min_face_size,
        "min_prob": finder.min_prob,
    }
    paths = {
        path.relative_to(data_dir).as_posix(): path
        for name in classes
        for path in shared.list_images(data_dir / name)
    }
    faces_dir.mkdir(parents=True, exist_ok=True)
    index_path = faces_dir / "index.jsonl"
    known = read_index(index_path)
    for photo in known.keys() - paths:
        (faces_dir / known.pop(photo)["crop"]).unlink(missing_ok=True)
    wanted = shared.spread(list(paths), limit)
    with index_path.open("ab", buffering=0) as index:
        for photo in tqdm(wanted, "finding faces", unit="photo", disable=None):
            record = {"photo": photo, "label": photo.split("/")[0], "crop": f"{photo}.png"}
            record |= {"sha256": shared.file_digest(paths[photo]), "settings": settings}
            crop_path, before = shared.inside(faces_dir, record["crop"]), known.get(photo, {})
            if record.items() <= before.items() and (before["reason"] or crop_path.exists()):
                continue
            found, face = cut_photo(paths[photo], finder, margin, largest_face)
            if face:
                with shared.replacing(crop_path) as temporary:
                    face.save(temporary, "PNG")
            else:
                crop_path.unlink(missing_ok=True)
            known[photo] = record | found
            try:
                index.write(f"\n{json.dumps(known[photo])}\n".encode())  # the line before may be cut short
            except OSError as error:
                raise OSError(f"cannot write {index_path}: {error.strerror}") from None
    with shared.replacing(index_path) as temporary:
        temporary.write_text(
            "".join(json.dumps(record) + "\n" for record in known.values()), encoding="utf-8"
        )
    return [known[photo] for photo in wanted]


def read_index(path: Path) -> dict[str, dict]:
    """Read the records of index.jsonl, by photo; a line that was cut short is as good as none.

    Raises:
        ValueError: a line names a crop outside the index's folder.
    """
    records = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            record = json.loads(line)
            is_cut = record["reason"] is None
            if (is_cut and math.isfinite(record["blur"])) or record["reason"] in OUTCOMES:
                records[str(record["photo"])] = {**record, "crop": str(record["crop"])}
    for record in records.values():
        try:
            shared.inside(path.parent, record["crop"])
        except ValueError as error:
            raise ValueError(f"{path} names a crop: {error}; delete it, it is made anew") from None
    return records


def count_photos(records: Sequence[dict], classes: Sequence[str]) -> str:
    """Return a table of the photos by class, and by the reason why they are left out."""
    import pandas as pd

    table = pd.DataFrame(records)
    table = pd.crosstab(table["reason"].fillna(OUTCOMES[0]), table["label"])
    table = table.reindex(index=OUTCOMES, columns=list(classes), fill_value=0)
    table["total"] = table.sum(axis=1)
    return table.rename_axis(index=None, columns="photos").to_string()


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

    pairs = KDTree(hashes.astype(float)).query_pairs(DUPLICATE_BITS, p=1, output_type="ndarray")
    links = coo_array((np.ones(len(pairs)), pairs.T), (len(hashes), len(hashes)))
    return torch.from_numpy(connected_components(links, directed=False)[1])


def have_duplicates(hashes: np.ndarray, others: np.ndarray) -> Tensor:
    """Return which faces (N,) have a near-duplicate among the others."""
    import torch
    from scipy.spatial import KDTree

    distances, _ = KDTree(others.astype(float)).query(hashes.astype(float), p=1)
    return torch.from_numpy(distances <= DUPLICATE_BITS)


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
    images: Tensor  # (N, 1, FACE_SIZE, FACE_SIZE) uint8
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
        ValueError: there are too few faces.
    """
    import torch

    records = [record for record in records if not record["reason"]]
    if not records:
        raise ValueError("no photo has a single face; add photos or try --largest-face")
    crops = [faces_dir / record["crop"] for record in records]
    images, readable = shared.load_images(crops, "L")
    records = [record for record, crop in zip(records, crops, strict=True) if crop in set(readable)]
    crops = readable
    groups = group_duplicates(hash_faces(images))
    found_by = torch.tensor([classes.index(record["label"]) for record in records])
    is_val = split_groups(found_by, groups, [record["sha256"] for record in records], val_fraction, seed)
    names = [corrections.get(record["photo"], record["label"]) for record in records]
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


class Rehearsed:
    """Photos' faces with FER's beside them in every batch: what `model.fit` asks of its data.

    The targets of both are shares of the classes (n, C).
    """

    def __init__(self, photos: shared.FaceBatches, fer: shared.FaceBatches):
        self.photos, self.fer = photos, fer

    def __len__(self) -> int:
        return len(self.photos) + math.ceil(len(self.photos) / self.photos.batch_size) * self.fer.batch_size

    def train(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch of the photos' batches, each with a batch of FER's faces joined to it."""
        import torch

        fer = itertools.chain.from_iterable(self.fer.train(n) for n in itertools.count(epoch))
        for batches in zip(self.photos.train(epoch), fer, strict=False):
            images, targets = zip(*batches, strict=True)
            yield torch.cat(images), torch.cat(targets)


def training_data(
    net: nn.Module,
    faces: LabelledFaces,
    fer: dict[str, tuple[Tensor, Tensor]],
    batches: Callable[..., shared.FaceBatches],
    *,
    classes: Sequence[str],
    mix_share: float,
) -> tuple[shared.FaceBatches | Rehearsed, dict[str, str]]:
    """Return what is learned from, and its size in words: the photos' train part, and FER's faces beside it.

    Args:
        fer: images and labels by split, or nothing; what stands in its val or test is not learned from.
        batches: `model.FaceBatches` with a run's options.
        mix_share: FER's faces for each photo's.
    """
    import torch
    import torch.nn.functional as F

    is_learned = ~faces.is_val
    if fer:
        judged = torch.cat([fer["val"][0], fer["test"][0]])
        is_copy = have_duplicates(hash_faces(faces.images), hash_faces(judged))
        print(f"{int(is_copy.sum())} faces also stand in FER's val or test: not learned from")
        is_learned &= ~is_copy
    labels = faces.labels[is_learned]
    photos = batches(faces.images[is_learned], labels, targets=F.one_hot(labels, len(classes)).float())
    sizes = {"train": shared.count_labels(labels, classes)}
    if not (fer and mix_share):
        return photos, sizes
    images, labels = fer["train"]
    logits, _ = shared.evaluate(net, batches(images, labels).eval())
    size = max(round(photos.batch_size * mix_share), 1)
    sizes["FER"] = shared.count_labels(labels, classes)
    return Rehearsed(photos, batches(images, labels, batch_size=size, targets=logits.softmax(1))), sizes


# --- doubts about labels ---


def cross_validate(embeddings: Tensor, labels: Tensor, groups: Tensor, num_classes: int) -> Tensor:
    """Return the probabilities (N, C) that a linear head gives to faces that it did not learn from.

    It learns from embeddings (N, D) of FOLDS - 1 folds, by L-BFGS; a group stays in one fold.
    """
    import torch
    import torch.nn.functional as F

    embeddings = (embeddings - embeddings.mean(0)) / embeddings.std(0).clamp(min=1e-6)
    folds = groups % FOLDS
    probs = torch.zeros(len(labels), num_classes)
    for fold in range(FOLDS):
        rest = folds != fold
        head = torch.nn.Linear(embeddings.shape[1], num_classes)
        torch.nn.init.zeros_(head.weight)
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50, line_search_fn="strong_wolfe")

        def loss(head: nn.Linear = head, rest: Tensor = rest) -> Tensor:
            head.zero_grad()
            decay = HEAD_DECAY * head.weight.square().sum()
            value = F.cross_entropy(head(embeddings[rest]), labels[rest]) + decay
            value.backward()
            return value

        optimizer.step(loss)
        with torch.no_grad():
            probs[~rest] = head(embeddings[~rest]).softmax(1)
    return probs


def second_opinion(net: nn.Module, faces: shared.FaceBatches, groups: Tensor, temperature: float) -> Tensor:
    """Return the mean of the probabilities (N, C) of `net` and of the heads of `cross_validate`."""
    import torch

    head, net.fc = net.fc, torch.nn.Identity()
    embeddings, labels = shared.evaluate(net, faces.eval())
    net.fc = head
    with torch.inference_mode():
        logits = head(embeddings.to(faces.device)).cpu()
    learned = cross_validate(embeddings.clone(), labels, groups, logits.shape[1])
    return ((logits / temperature).softmax(1) + learned) / 2


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
        OSError: it cannot be read.
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
    text = json.dumps(data).replace("<", "\\u003c")  # a photo's name must not end the script element
    with shared.replacing(path) as temporary:
        page = REVIEW_PAGE.read_text(encoding="utf-8").replace("__DATA__", text)
        temporary.write_text(page, encoding="utf-8")
    print(shared.printable(f"{len(shown)} of {len(faces.labels)} labels look wrong; wrote {path}"))


# --- before and after ---


def judge_sets(
    net: nn.Module, sets: dict[str, shared.FaceBatches], temperature: float, classes: Sequence[str]
) -> dict[str, dict]:
    """Return `model.judge`'s figures of a network on each of the sets."""
    return {
        name: shared.judge(*shared.evaluate(net, faces.eval()), temperature, classes)
        for name, faces in sets.items()
    }


def draw_back(
    trained: dict, start: dict, val: shared.FaceBatches, fer_val: shared.FaceBatches, lowest: float
) -> dict:
    """Go back toward the weights of `start` until accuracy on `fer_val` is at least `lowest`, 0-1.

    Args:
        trained, start: checkpoints.
        val: the photos' faces to which the temperature is fitted anew.
        fer_val: FER's.

    Raises:
        ValueError: none of BLENDS goes back far enough.
    """
    import torch

    for blend in BLENDS:
        weights = {
            name: torch.lerp(start["model"][name], value, blend) if value.is_floating_point() else value
            for name, value in trained["model"].items()
        }
        best = {**trained, "model": weights}
        net = shared.load_network(best).to(val.device, memory_format=torch.channels_last)
        logits, labels = shared.evaluate(net, fer_val.eval())
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        print(f"{blend:.0%} of the way: FER val {accuracy:.2%}, expected {lowest:.2%} or more")
        if accuracy >= lowest:
            return {**best, "temperature": shared.fit_temperature(*shared.evaluate(net, val.eval()))}
    raise ValueError("FER is forgotten even a quarter of the way, so none is called best; try a lower --lr")


def report_change(results: dict[str, dict[str, dict]], classes: Sequence[str], out_dir: Path) -> None:
    """Print results["before" and "after"][set] as a table; write emotion.json and the photos' confusion."""
    import torch

    print(f"{'':10}{'':7}" + "".join(f"{name:>12}" for name in ("n", "accuracy", "mean recall", *classes)))
    for name, when in itertools.product(results["before"], ("before", "after")):
        row = results[when][name]
        shares = (row["acc"], row["mean_recall"], *row["recall"].values())
        print(f"{name:10}{when:7}{row['n']:12}" + "".join(f"{share:12.1%}" for share in shares))
    shared.save_json(out_dir / "emotion.json", results)
    matrix = torch.tensor(results["after"]["photos"]["confusion"])
    shared.plot_confusion(matrix, classes, "held-out photos, after", out_dir / "photos_confusion.png")
    print(shared.printable(f"wrote {out_dir / 'emotion.json'} and {out_dir / 'photos_confusion.png'}"))


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict | None]:
    """Return the options and, with --resume, the checkpoint to go on from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shared.HelpFormatter)
    add, points = parser.add_argument, shared.number(float, 0, 100)
    shared.add_options(parser, data_dir="data/google", out_dir="runs/emotion", init=Path("runs/fer/best.pt"))
    faces_help = "where the cut faces and their index are kept"
    add("--faces-dir", type=Path, default="data/google_faces", metavar="DIR", help=faces_help)
    add("--largest-face", action="store_true", help="of several faces cut the largest, do not leave them out")
    mix_help = "FER's faces, from unpack_fer_data.py: learned again, and judged on"
    add("--mix", type=Path, default="data/fer", metavar="DIR", help=mix_help)
    add("--no-mix", dest="mix", action="store_const", const=None, help="neither learn nor judge FER's faces")
    share_help = "FER's faces for each photo's, 0: only judge on them"
    add("--mix-share", type=points, default=2.0, metavar="X", help=share_help)
    size_help = f"{shared.OPTIONS['image_size']['help']} (default: that of --init)"
    add("--image-size", **(shared.OPTIONS["image_size"] | {"help": size_help}))
    loss_help = "of accuracy on FER's val that the best model may have lost"
    add("--max-loss", type=points, default=1.0, metavar="POINTS", help=loss_help)
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
    return shared.parse_with_resume(parser, argv, stage="emotion")


@shared.one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Cut the faces, train, and report on the held-out faces before and after; or write the review page."""
    args, resumed = parse_args(argv)
    import torch

    torch.manual_seed(args.seed)
    device = shared.pick_device(args.device)
    with shared.only_run_in(args.out_dir, args.faces_dir):
        start = shared.load_checkpoint(args.init, stages=("fer", "emotion"))
        classes, image_size = start["classes"], args.image_size or start["image_size"]
        corrections, corrections_path = {}, args.corrections or args.data_dir / "corrections.csv"
        if args.corrections or corrections_path.exists():
            corrections = read_corrections(corrections_path, classes)
        finder = shared.FaceFinder(device)
        cut = functools.partial(cut_photos, margin=start["crop_margin"], largest_face=args.largest_face)
        records = cut(args.data_dir, args.faces_dir, classes, finder, limit=args.limit)
        print(count_photos(records, classes))
        if unreadable := [record["photo"] for record in records if record["reason"] == OUTCOMES[3]]:
            names = ", ".join(unreadable[: shared.MAX_NAMED])
            print(shared.printable(f"not readable: {names}"), file=sys.stderr)
        if corrections:
            print(shared.printable(f"{len(corrections)} corrections in {corrections_path}"))
        faces = load_labelled(
            records, args.faces_dir, classes, corrections, val_fraction=args.val_fraction, seed=args.seed
        )
        net = shared.load_network(start).to(device, memory_format=torch.channels_last)
        options = {"batch_size": args.batch_size, "image_size": image_size, "device": device}
        options |= {"balance": args.balance, "mixup": args.mixup, "seed": args.seed}
        batches = functools.partial(shared.FaceBatches, **options)
        if args.review:
            probs = second_opinion(
                net, batches(faces.images, faces.labels), faces.groups, start["temperature"]
            )
            write_review(
                args.out_dir / "review.html",
                faces,
                probs,
                classes,
                corrections=corrections,
                corrections_path=corrections_path,
            )
            return

        fer = {
            name: shared.load_faces(args.mix / name, classes, args.limit)[:2]
            for name in shared.SPLITS
            if args.mix
        }
        train, sizes = training_data(net, faces, fer, batches, classes=classes, mix_share=args.mix_share)
        val = batches(faces.images[faces.is_val], faces.labels[faces.is_val])
        sizes["val"] = shared.count_labels(val.labels, classes)
        sets = {"photos": val} | {f"FER {name}": batches(*fer[name]) for name in fer if name != "train"}
        shared.freeze_except(net, args.unfreeze)
        run = shared.Run(
            args.out_dir,
            stage="emotion",
            arch=start["arch"],
            classes=classes,
            kept=classes,
            image_size=image_size,
            crop_margin=start["crop_margin"],
            config=shared.plain_config(vars(args)),
            best_name="undrawn.pt" if fer else "best.pt",  # of what forgot too much none is called best
        )
        run.start(net, device, sizes, is_resumed=resumed is not None)
        results = {"before": judge_sets(net, sets, start["temperature"], classes)}
        schedule = shared.Schedule(args.epochs, args.lr, args.weight_decay, args.ema)
        smoothing = args.label_smoothing
        best = shared.fit_classifier(
            net, train, val, run=run, schedule=schedule, label_smoothing=smoothing, resume=resumed
        )
        best_path = args.out_dir / "best.pt"
        if fer:
            lowest = results["before"]["FER val"]["acc"] - args.max_loss / 100
            best = draw_back(best, start, val, sets["FER val"], lowest)
            shared.save_checkpoint(best_path, {**best, "model": shared.half_precision(best["model"])})
        trained = shared.load_network(best).to(device, memory_format=torch.channels_last)
        results["after"] = judge_sets(trained, sets, best["temperature"], classes)
        report_change(results, classes, args.out_dir)
        print(shared.printable(f"best epoch {best['epoch']}; wrote {best_path}"))


if __name__ == "__main__":
    main()
