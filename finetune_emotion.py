"""Fine-tune the FER network on photographs that were found by a search word.

MTCNN cuts each photo to its single face, gray, with the margin of the checkpoint; photos with no face or
several are left out and counted. The crops are kept beside an index, so a second run looks only at what is
new or changed. As in the original toolkit the early layers stay frozen, BatchNorm included: the ResNet's last
stage and the head learn. The held-out part has whole groups of near-duplicates.

A search word is a weak label. What FER's network and one cross-validated on the photos both doubt can be left
out (--drop-suspects) or looked at (--review writes a page, whose corrections.csv the next run obeys).

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

import argparse
import base64
import csv
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import imagehash
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree
from torch import Tensor, nn
from tqdm import tqdm

import model as shared

FACE_SIZE = 96  # pixels, side of the kept crops: half again the network's usual input
# Of 64 bits. In 2,239 scraped faces all 23 pairs looked at up to 4 bits apart are one picture, half of the 8
# at 6 bits, a few of 16 at 8, none of 16 at 10. A wrong pair only shares a side of the split.
DUPLICATE_BITS = 8
FOLDS = 5  # of the cross-validation, chosen here
HEAD_DECAY = 0.1  # L2 penalty of the cross-validated head: of 1e-4 to 0.1 in tens the best on scraped faces
# Shares of the way that training went, tried in turn. Half of it is what Wortsman et al. 2022 advise; of 422
# held-out photos it kept 5.5 of 6.9 points gained, and lost none of FER's val.
BLENDS = (0.5, 0.25)
REVIEW_PAGE = Path(__file__).parent / "resources" / "review.html"


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

    Returns what the index says of it, and the face: None if the photo is left out, for the given `reason`.
    """
    try:
        image = shared.load_photo(path)
    except ValueError:
        return {"reason": "not readable"}, None
    faces = finder.find(image)
    if len(faces.boxes) != 1 and not (largest_face and len(faces.boxes)):
        return {"reason": "several faces" if len(faces.boxes) else "no face", "size": image.size}, None
    largest = (faces.boxes[:, 2:] - faces.boxes[:, :2]).prod(1).argmax()
    [crop] = shared.crop_faces(image, faces.boxes[[largest]], margin)
    face = crop.convert("L").resize((FACE_SIZE, FACE_SIZE), Image.Resampling.LANCZOS)
    return {
        "reason": None,
        "size": image.size,
        "box": faces.boxes[largest].astype(float).round(1).tolist(),
        "landmarks": faces.landmarks[largest].astype(float).round(1).tolist(),
        "prob": round(float(faces.probs[largest]), 4),
        "blur": round(blur_measure(face), 1),
    }, face


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

    A photo is looked at again only if its content or a setting has changed since. The index has a line as
    soon as a photo is done, so an interrupted run goes on where it was; crops of photos that are gone go too.

    A record has `photo` (its path below data_dir, with slashes), `label`, `crop` (a PNG below faces_dir),
    `sha256` of the photo, the `settings`, and what `cut_photo` says.
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
    with index_path.open("a", encoding="utf-8") as index:
        for photo in tqdm(wanted, "finding faces", unit="photo", disable=None):
            record = {"photo": photo, "label": photo.split("/")[0], "crop": f"{photo}.png"}
            with paths[photo].open("rb") as file:
                record |= {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "settings": settings}
            crop_path, before = faces_dir / record["crop"], known.get(photo, {})
            if record.items() <= before.items() and (before["reason"] or crop_path.exists()):
                continue
            found, face = cut_photo(paths[photo], finder, margin, largest_face)
            if face:
                save_face(face, crop_path)
            else:
                crop_path.unlink(missing_ok=True)
            known[photo] = record | found
            index.write(json.dumps(known[photo]) + "\n")
            index.flush()
    write_index(index_path, known.values())
    return [known[photo] for photo in wanted]


def read_index(path: Path) -> dict[str, dict]:
    """Read the records of index.jsonl, by photo; a line that was cut short is as good as none."""
    records = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records[record["photo"]] = record
    return records


def write_index(path: Path, records: Iterable[dict]) -> None:
    """Replace index.jsonl by the records."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    temporary.replace(path)


def save_face(face: Image.Image, path: Path) -> None:
    """Write a PNG that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    face.save(temporary, "PNG")
    temporary.replace(path)


def count_photos(records: Sequence[dict], classes: Sequence[str]) -> str:
    """Make a table of the photos by class, and by the reason why they are left out."""
    reasons = Counter((record["reason"] or "one face cut", record["label"]) for record in records)
    lines = [f"{'photos':14}" + "".join(f"{name:>11}" for name in (*classes, "total"))]
    for reason in ("one face cut", "no face", "several faces", "not readable"):
        counts = [reasons[reason, name] for name in classes]
        lines.append(f"{reason:14}" + "".join(f"{count:11}" for count in (*counts, sum(counts))))
    return "\n".join(lines)


# --- from faces to train and val ---


def hash_faces(images: Tensor) -> np.ndarray:
    """Return the perceptual hashes (N, 64), bool, of gray uint8 faces (N, 1, S, S).

    Source: imagehash.phash, after Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash
    Functions".
    """
    return np.stack([imagehash.phash(Image.fromarray(face[0])).hash.ravel() for face in images.numpy()])


def group_duplicates(hashes: np.ndarray) -> Tensor:
    """Number the groups (N,) of faces that a chain of near-duplicates connects."""
    pairs = KDTree(hashes.astype(float)).query_pairs(DUPLICATE_BITS, p=1, output_type="ndarray")
    links = coo_array((np.ones(len(pairs)), pairs.T), (len(hashes), len(hashes)))
    return torch.from_numpy(connected_components(links, directed=False)[1])


def stands_in(hashes: np.ndarray, others: np.ndarray) -> Tensor:
    """Return which faces (N,) have a near-duplicate among the others."""
    distances, _ = KDTree(others.astype(float)).query(hashes.astype(float), p=1)
    return torch.from_numpy(distances <= DUPLICATE_BITS)


def split_groups(
    labels: Tensor, groups: Tensor, names: Sequence[str], val_fraction: float, seed: int
) -> Tensor:
    """Choose which faces are held out, (N,) bool: whole groups, of each class its share.

    Which come first follows from `seed` and the faces' `names` alone: photos that come or go move hardly any
    others to the other side, and a run from an earlier one's model is judged by what neither has learned.
    """
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
    records = [record for record in records if not record["reason"]]
    if not records:
        raise ValueError("no photo has a single face; add photos or try --largest-face")
    images = shared.load_images([faces_dir / record["crop"] for record in records], "L")
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
        images[kept],
        torch.tensor([classes.index(names[i]) for i in kept]),
        groups[kept],
        is_val,
        torch.tensor([records[i]["photo"] in corrections for i in kept]),
    )


def find_copies(faces: LabelledFaces, judged: Tensor) -> Tensor:
    """Tell, and print the number of, the faces that stand among FER's judged ones too: (N,) bool."""
    is_copy = stands_in(hash_faces(faces.images), hash_faces(judged))
    print(f"{int(is_copy.sum())} faces also stand in FER's val or test: not learned from")
    return is_copy


class Rehearsed:
    """Photos' faces with FER's beside them in every batch: what `fit` asks of its data.

    Targets are shares of the classes (n, C): the photos' own, and what `net` makes of FER's faces now.
    """

    def __init__(self, photos: shared.FaceBatches, fer: shared.FaceBatches, net: nn.Module):
        logits, _ = shared.evaluate(net, fer.eval())
        fer.targets = logits.softmax(1)
        self.photos, self.fer = photos, fer

    def __len__(self) -> int:
        return len(self.photos) + math.ceil(len(self.photos) / self.photos.batch_size) * self.fer.batch_size

    def train(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch of the photos' batches, each with a batch of FER's faces joined to it."""
        fer = itertools.chain.from_iterable(self.fer.train(n) for n in itertools.count(epoch))
        for batches in zip(self.photos.train(epoch), fer, strict=False):
            images, targets = zip(*batches, strict=True)
            yield torch.cat(images), torch.cat(targets)


# --- doubts about labels ---


def cross_validate(embeddings: Tensor, labels: Tensor, groups: Tensor, num_classes: int) -> Tensor:
    """Return the probabilities (N, C) that a linear head gives to faces that it did not learn from.

    It learns from embeddings (N, D) of FOLDS - 1 folds, by L-BFGS; a group stays in one fold.
    """
    embeddings = (embeddings - embeddings.mean(0)) / embeddings.std(0).clamp(min=1e-6)
    folds = groups % FOLDS
    probs = torch.zeros(len(labels), num_classes)
    for fold in range(FOLDS):
        rest = folds != fold
        head = nn.Linear(embeddings.shape[1], num_classes)
        nn.init.zeros_(head.weight)
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


def second_opinions(
    net: nn.Module, faces: shared.FaceBatches, groups: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return what `net` and the heads of `cross_validate` make of the faces, (N, C) probabilities each."""
    head, net.fc = net.fc, nn.Identity()
    embeddings, labels = shared.evaluate(net, faces.eval())
    net.fc = head
    with torch.inference_mode():
        logits = head(embeddings.to(faces.device)).cpu()
    learned = cross_validate(embeddings.clone(), labels, groups, logits.shape[1])
    return (logits / temperature).softmax(1), learned


def doubt(probs: Tensor, labels: Tensor) -> Tensor:
    """Return how wrong labels (N,) look, -1 to 1: the likeliest other class's probability less the label's.

    Above 0 the label is not the likeliest class. It is the negated margin by which Northcutt et al. 2021,
    "Confident Learning: Estimating Uncertainty in Dataset Labels", rank label errors.
    """
    own = F.one_hot(labels, probs.shape[1]).bool()
    return probs.masked_fill(own, 0).amax(1) - probs[own]


def read_corrections(path: Path, classes: Sequence[str]) -> dict[str, str]:
    """Read corrections.csv, a row of `path` and `label` for a photo: its label, empty to leave it out.

    Raises:
        OSError: it cannot be read.
        ValueError: the columns are missing, or a label is none of `classes`.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        if not {"path", "label"} <= set(table.fieldnames or ()):
            raise ValueError(
                f"{path} has no columns path and label; export it anew from the page of --review"
            )
        corrections = {row["path"]: row["label"] or "" for row in table}
    unknown = set(corrections.values()) - {"", *classes}
    if unknown:
        raise ValueError(f"{path} has the label {min(unknown)!r}, expected empty or {', '.join(classes)}")
    return corrections


def write_review(
    path: Path,
    faces: LabelledFaces,
    probs: Tensor,
    *,
    faces_dir: Path,
    classes: Sequence[str],
    corrections: dict[str, str],
    corrections_path: Path,
) -> int:
    """Write the page on which a person judges the labels that look wrong; return how many there are.

    Labels judged before are not shown again, but exported again.

    Args:
        probs: (N, C), what the networks make of the faces.
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
                "png": base64.b64encode((faces_dir / faces.records[i]["crop"]).read_bytes()).decode(),
            }
            for i in shown
        ],
    }
    data["id"] = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
    text = json.dumps(data).replace("<", "\\u003c")  # a photo's name must not end the script element
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(REVIEW_PAGE.read_text(encoding="utf-8").replace("__DATA__", text), encoding="utf-8")
    return len(shown)


# --- before and after ---


def report_change(results: dict[str, dict[str, dict]], classes: Sequence[str], out_dir: Path) -> None:
    """Print results["before" and "after"][set] as a table; write emotion.json and the photos' confusion."""
    print(f"{'':10}{'':7}" + "".join(f"{name:>12}" for name in ("n", "accuracy", "mean recall", *classes)))
    for name, when in itertools.product(results["before"], ("before", "after")):
        row = results[when][name]
        shares = (row["acc"], row["mean_recall"], *row["recall"].values())
        print(f"{name:10}{when:7}{row['n']:12}" + "".join(f"{share:12.1%}" for share in shares))
    path = out_dir / "emotion.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    matrix = torch.tensor(results["after"]["photos"]["confusion"])
    shared.plot_confusion(matrix, classes, "held-out photos, after", out_dir / "photos_confusion.png")
    print(f"wrote {path} and {out_dir / 'photos_confusion.png'}")


def judge_sets(
    net: nn.Module, sets: dict[str, shared.FaceBatches], temperature: float, classes: Sequence[str]
) -> dict[str, dict]:
    """Judge a network on each of the sets."""
    return {
        name: shared.summarize(*shared.evaluate(net, faces.eval()), temperature, classes)
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
    for blend in BLENDS:
        weights = {
            name: torch.lerp(start["model"][name], value, blend) if value.is_floating_point() else value
            for name, value in trained["model"].items()
        }
        best = {**trained, "model": weights}
        net = shared.load_network(best).to(val.device, memory_format=torch.channels_last)
        accuracy = judge_sets(net, {"FER val": fer_val}, 1.0, trained["classes"])["FER val"]["acc"]
        print(f"{blend:.0%} of the way: FER val {accuracy:.2%}, expected {lowest:.2%} or more")
        if accuracy >= lowest:
            temperature = shared.fit_temperature(*shared.evaluate(net, val.eval()))
            return {**best, "temperature": temperature}
    raise ValueError("FER is forgotten even a quarter of the way, so none is called best; try a lower --lr")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; with --resume the interrupted run's options are the defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--faces-dir",
        type=Path,
        default="data/google_faces",
        help="where the cut faces and their index are kept (default: %(default)s)",
    )
    add(
        "--init",
        type=Path,
        default="runs/fer/best.pt",
        metavar="CHECKPOINT",
        help="start from this best.pt of finetune_fer.py (default: %(default)s)",
    )
    add("--largest-face", action="store_true", help="of several faces cut the largest, do not leave them out")
    add(
        "--mix",
        type=Path,
        default="data/fer",
        metavar="DIR",
        help="FER's faces, from unpack_fer_data.py: learned again, and judged on (default: %(default)s)",
    )
    add("--no-mix", dest="mix", action="store_const", const=None, help="neither learn nor judge FER's faces")
    add(
        "--mix-share",
        type=shared.number(float, 0, 100),
        default=2.0,
        metavar="X",
        help="FER's faces for each photo's, 0: only judge on them (default: %(default)s)",
    )
    add(
        "--max-loss",
        type=shared.number(float, 0, 100),
        default=1.0,
        metavar="POINTS",
        help="of accuracy on FER's val that the best model may have lost (default: %(default)s)",
    )
    add(
        "--drop-suspects", action="store_true", help="do not learn from faces whose label both networks doubt"
    )
    add("--review", action="store_true", help="do not train, write review.html: the labels that look wrong")
    add(
        "--corrections",
        type=Path,
        metavar="FILE",
        help="what the page of --review exported (default: corrections.csv in --data-dir, if there)",
    )
    shared.add_training_options(
        parser,
        data_dir="data/google",
        out_dir="runs/emotion",
        epochs=4,
        batch_size=64,
        lr=1e-4,
        weight_decay=0.05,
    )
    shared.add_classifier_options(parser)
    shared.add_freezing_option(parser, unfreeze=["layer4", "fc"])
    shared.add_split_option(parser)
    parser.set_defaults(balance=1.0)  # a search brings few disgusted faces, and they are what FER lacks
    return shared.parse_with_resume(parser, argv, stage="emotion")


@shared.one_line_errors
def main(argv: Sequence[str] | None = None) -> None:  # noqa: PLR0915 (one step after the other)
    """Cut the faces, train, and report on the held-out faces before and after; or write the review page."""
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    device = shared.pick_device(args.device)
    start = shared.load_checkpoint(args.init, stages=("fer", "emotion"))
    classes, image_size = start["classes"], args.image_size or start["image_size"]
    records = cut_photos(
        args.data_dir,
        args.faces_dir,
        classes,
        shared.FaceFinder(device),
        margin=start["crop_margin"],
        largest_face=args.largest_face,
        limit=args.limit,
    )
    print(count_photos(records, classes))
    corrections_path = args.corrections or args.data_dir / "corrections.csv"
    corrections = {}
    if args.corrections or corrections_path.exists():
        corrections = read_corrections(corrections_path, classes)
        print(f"{len(corrections)} corrections in {corrections_path}")
    faces = load_labelled(
        records, args.faces_dir, classes, corrections, val_fraction=args.val_fraction, seed=args.seed
    )

    def batches(images: Tensor, labels: Tensor, batch_size: int = args.batch_size) -> shared.FaceBatches:
        options = {"balance": args.balance, "mixup": args.mixup, "seed": args.seed}
        return shared.FaceBatches(images, labels, batch_size, image_size, device, **options)

    net = shared.load_network(start).to(device, memory_format=torch.channels_last)
    is_learned = ~faces.is_val
    if args.review or args.drop_suspects:
        opinions = second_opinions(
            net, batches(faces.images, faces.labels), faces.groups, start["temperature"]
        )
        doubts = torch.stack([doubt(probs, faces.labels) for probs in opinions])
        is_learned &= (doubts <= 0).any(0) | faces.is_corrected
    if args.review:
        number = write_review(
            args.out_dir / "review.html",
            faces,
            sum(opinions) / 2,
            faces_dir=args.faces_dir,
            classes=classes,
            corrections=corrections,
            corrections_path=corrections_path,
        )
        print(f"{number} of {len(faces.labels)} labels look wrong; wrote {args.out_dir / 'review.html'}")
        return

    val = batches(faces.images[faces.is_val], faces.labels[faces.is_val])
    sets = {"photos": val}
    if args.mix:
        fer = {
            split: shared.load_faces(args.mix / split, classes, args.limit)
            for split in ("train", "val", "test")
        }
        sets |= {f"FER {split}": batches(*fer[split]) for split in ("val", "test")}
        is_learned &= ~find_copies(faces, torch.cat([fer["val"][0], fer["test"][0]]))
    train = batches(faces.images[is_learned], faces.labels[is_learned])
    train.targets = F.one_hot(train.labels, len(classes)).float()
    sizes = {"train": train.describe(classes), "val": val.describe(classes)}
    if args.mix and args.mix_share:
        replay = batches(*fer["train"], batch_size=max(round(args.batch_size * args.mix_share), 1))
        sizes["FER"] = replay.describe(classes)
        train = Rehearsed(train, replay, net)
    shared.freeze_except(net, args.unfreeze)
    shared.start_run(args, net, device, sizes)
    results = {"before": judge_sets(net, sets, start["temperature"], classes)}
    about = {
        **{key: start[key] for key in ("arch", "classes", "crop_margin")},
        "stage": "emotion",
        "image_size": image_size,
        "config": shared.plain_config(args),
    }
    best_path, undrawn_path = args.out_dir / "best.pt", args.out_dir / "undrawn.pt"
    if args.resumed and undrawn_path.exists():
        undrawn_path.replace(best_path)
    best = shared.fit_classifier(
        net,
        train,
        val,
        args.out_dir,
        classes=classes,
        label_smoothing=args.label_smoothing,
        about=about,
        **shared.fit_options(args),
    )
    if args.mix:
        best_path.replace(undrawn_path)  # what forgot too much must not be taken for the best
        best = draw_back(
            best, start, val, sets["FER val"], results["before"]["FER val"]["acc"] - args.max_loss / 100
        )
        shared.save_checkpoint(best_path, {**best, "model": shared.half_precision(best["model"])})
    trained = shared.load_network(best).to(device, memory_format=torch.channels_last)
    results["after"] = judge_sets(trained, sets, best["temperature"], classes)
    report_change(results, classes, args.out_dir)
    print(f"best epoch {best['epoch']}; wrote {best_path}")


if __name__ == "__main__":
    main()
