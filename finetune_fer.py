"""Fine-tune the gray network on the faces of FER2013, and on other collections of faces beside it.

All layers learn, from the weights that finetune_gray_imagenet.py distilled. The faces stay in memory as uint8
and are augmented in batches. The network learns every emotion that it finds in train; --emotions are those
that it tells apart unless asked for more. If FER+'s votes were unpacked (Barsoum et al. 2016,
arXiv:1608.01041), a target is partly what ten people saw, partly FER's own label.

Collections mean different things by one word. With --mix, the network therefore has a common head, which
learns from all faces, and a head for each collection, which learns from its faces only. The best
checkpoint keeps the common one. With --teachers a target is partly the mean prediction of trained networks:
several that differ know more together than each alone, and one network can learn it (Hinton et al. 2015,
arXiv:1503.02531).

Validation (of FER it is PublicTest) picks the best epoch and the temperature of the softmax; all collections
count alike. The test faces (of FER PrivateTest) are looked at once, at the end.

Usage:
    python finetune_fer.py
    python finetune_fer.py --evaluate resources/emotion_resnet50.pt --out-dir runs/check
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

import model as shared

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

OUT_DIR = Path("runs/fer")
SURE_VOTES = 6  # of FER+'s ten; chosen here, a majority that no two other opinions can match
FEW_FACES = 1000  # chosen here: from 100 and 300 faces, stage 5 learned more
TEACHER_BATCH = 512  # faces at once, enough to fill a GPU
# Of a face's weight in the loss, for the common head; the collection's own head has the rest.
COMMON_SHARE = 0.5


class Split(NamedTuple):
    """N labelled faces of a collection and a split, of C classes."""

    images: Tensor  # (N, 1, S, S) uint8
    labels: Tensor  # (N,) int64
    votes: Tensor  # (N, C) float32, how many of FER+'s ten voters saw which class; all 0 if not known


def pick_classes(learned: Sequence[str], wanted: Sequence[str] | None) -> Sequence[str]:
    """List the learned emotions that are wanted, sorted; None: the usual ones, or all if one is not there.

    Raises:
        ValueError: there are fewer than two.
    """
    if wanted is None:
        return shared.EMOTIONS if set(shared.EMOTIONS) <= set(learned) else learned
    kept = sorted(set(learned) & set(wanted))
    if len(kept) < 2:
        raise ValueError(
            f"train has {' '.join(learned)}, expected two or more of {' '.join(wanted)}; see --emotions"
        )
    return kept


def load_votes(path: Path, faces: Sequence[Path], labels: Tensor, classes: Sequence[str]) -> Tensor:
    """Read FER+'s votes from unpack_fer_data.py's votes.csv, (N, C) float32; without a file they are 0.

    They are 0 too for a class that the file lacks, which nobody could vote for.

    Args:
        faces: N images, named after the rows of FER's table.
        labels: (N,), indices of the classes.

    Raises:
        ValueError: a face's row or class is not in the file, or a row is malformed.
    """
    import torch

    def parse(cells: dict[str, str]) -> tuple[int, list[float]]:
        counts = [float(cells.get(name, 0)) for name in classes]
        if not all(0 <= count < math.inf for count in counts):
            raise ValueError(f"row {cells['row'][:20]} has votes that are no numbers of people")
        return int(cells["row"]), counts

    if not path.exists():
        return torch.zeros(len(faces), len(classes))
    columns = {"row", *(classes[label] for label in labels.tolist())}
    rows = shared.read_table(path, columns, parse, "what unpack_fer_data.py writes of FER+'s votes")
    votes = dict(rows)
    missing = [face.stem for face in faces if not face.stem.isdecimal() or int(face.stem) not in votes]
    if missing or len(votes) < len(rows):
        reason = f"no votes for {missing[0]}" if missing else "two lines for a row"
        raise ValueError(f"{path} has {reason}; unpack anew, or remove the file")
    return torch.tensor([votes[int(face.stem)] for face in faces])


def load_split(
    folder: Path, split: str, classes: Sequence[str], *, limit: int | None, **sizes: int | None
) -> Split:
    """Read a split of a collection, and FER+'s votes if it has them; `sizes` as of `model.load_images`.

    Raises:
        ValueError: it has no images, or votes.csv does not fit.
    """
    images, labels, paths = shared.load_faces(folder, split, classes, limit=limit, **sizes)
    return Split(images, labels, load_votes(folder / "votes.csv", paths, labels, classes))


def mix_targets(labels: Tensor, votes: Tensor, weight: float) -> Tensor:
    """Mix labels (N,) with votes (N, C) into shares of the classes (N, C), `weight` of them from the votes.

    A face without votes for these classes has its label alone.
    """
    import torch
    import torch.nn.functional as F

    own, totals = F.one_hot(labels, votes.shape[1]).float(), votes.sum(1, keepdim=True)
    return torch.where(totals > 0, (1 - weight) * own + weight * votes / totals.clamp(min=1), own)


def ask_teachers(
    paths: Sequence[Path], images: Tensor, classes: Sequence[str], device: torch.device
) -> Tensor:
    """Return the mean of trained networks' probabilities for faces, float32 (N, C).

    Each network has its own temperature, and sees each face (N, 1, S, S), uint8, and its mirror image.

    Raises:
        FileNotFoundError, ValueError: one is no checkpoint of this stage or the next, or has not learned just
            these classes.
    """
    import torch

    total = torch.zeros(len(images), len(classes))
    for path in tqdm(paths, "asking teachers", disable=None, leave=False):
        teacher = shared.load_checkpoint(path, stages=("fer", "emotion"))
        if sorted(teacher["classes"]) != sorted(classes):
            raise ValueError(
                f"{path} has learned {' '.join(teacher['classes'])}, expected {' '.join(classes)}; "
                "see --emotions of unpack_fer_data.py"
            )
        order = [teacher["classes"].index(name) for name in classes]
        net = shared.load_network(teacher).to(device, memory_format=torch.channels_last)
        for view in (images, images.flip(-1)):
            faces = shared.FaceBatches(
                view, torch.zeros(len(view)), TEACHER_BATCH, teacher["image_size"], device
            )
            with shared.autocast(device):
                logits, _ = shared.evaluate(net, faces.eval())
            total += (logits.float() / teacher["temperature_all"]).softmax(1)[:, order]
    return total / (2 * len(paths))


def training_set(
    train: dict[str, Split],
    collections: dict[str, shared.Collection],
    classes: Sequence[str],
    device: torch.device,
    *,
    vote_weight: float,
    teachers: Sequence[Path],
    teacher_weight: float,
) -> dict[str, Tensor]:
    """Join the collections' train faces, each with its weight, into what `model.FaceBatches` takes.

    With several of them, targets (N, heads, C) are for the common head and each collection's own.
    """
    import torch

    splits = list(train.values())
    images = torch.cat([shared.vary_outline(split.images) for split in splits])
    labels = torch.cat([split.labels for split in splits])
    targets = mix_targets(labels, torch.cat([split.votes for split in splits]), vote_weight)
    if teachers:
        targets = targets.lerp(ask_teachers(teachers, images, classes, device), teacher_weight)
    sizes = torch.tensor([len(split.labels) for split in splits])
    of_collection = torch.arange(len(splits)).repeat_interleave(sizes)
    if len(splits) > 1:
        own = torch.nn.functional.one_hot(of_collection).float() * (1 - COMMON_SHARE)
        shares = torch.cat([torch.full((len(labels), 1), COMMON_SHARE), own], 1)  # (N, heads)
        targets = shares[:, :, None] * targets[:, None]
    groups = of_collection * len(classes) + labels
    weights = torch.tensor([collections[name].weight for name in train])[of_collection]
    return {"images": images, "labels": labels, "targets": targets, "groups": groups, "weights": weights}


def describe(
    train: dict[str, Split], val: dict[str, Split], classes: Sequence[str], parent: dict
) -> dict[str, str]:
    """Return what there is to learn from, in words."""
    lines = {}
    for kind, splits in (("train", train), ("val", val)):
        for name, split in splits.items():
            title = kind if len(train) == 1 else f"{name} {kind}"
            lines[title] = shared.count_labels(split.labels, classes)
    voted = sum(int((split.votes.sum(1) > 0).sum()) for split in train.values())
    lines["votes"] = f"known for {voted} images of train"
    if parent["stage"] != "gray" and sum(len(split.labels) for split in train.values()) < FEW_FACES:
        lines["hint"] = "these are few faces; finetune_emotion.py --cropped --no-mix learns more from them"
        lines["hint"] += " (--data-dir DIR/train if DIR has splits)"
    new = [name for name in classes if name not in parent["classes"]]
    return {**lines, "untrained in the head": ", ".join(new) or "none"}


def report_split(
    folder: Path,
    out_dir: Path | None,
    checkpoint: dict,
    split: str,
    *,
    title: str,
    batch_size: int,
    limit: int | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Report how good a checkpoint is on a split: its default classes, then all, if it learned more.

    Faces that stand in no other split, and those whose label is sure, are also judged apart.

    Returns:
        Of the default classes, C of them: probs (N, C) and labels (N,). If N is 0, they have no report.
    """
    import torch

    classes, size = checkpoint["classes"], checkpoint["image_size"]
    faces = load_split(folder, split, classes, limit=limit, max_size=size)
    side = faces.images.shape[-1]
    elsewhere = {
        image.numpy().tobytes()
        for other in shared.SPLITS
        if other != split and shared.list_split(folder, other, classes)
        for image in shared.load_faces(folder, other, shared.find_classes(folder), size=side)[0]
    }
    is_new = torch.tensor([image.numpy().tobytes() not in elsewhere for image in faces.images])
    subsets = {"not in another split": is_new} if elsewhere else {}
    votes = faces.votes.gather(1, faces.labels[:, None])[:, 0]
    subsets[f"with {SURE_VOTES} of FER+'s 10 votes"] = votes >= SURE_VOTES
    net = shared.load_network(checkpoint).to(device, memory_format=torch.channels_last)
    views = faces.images, faces.images.flip(-1)
    batches = [shared.FaceBatches(view, faces.labels, batch_size, size, device) for view in views]
    logits, mirrored = (shared.evaluate(net, own.eval())[0] for own in batches)
    default = [classes.index(name) for name in checkpoint["default_classes"]]
    sets = {title: ("temperature", default)}
    if len(default) < len(classes):
        sets[f"{title}_all"] = "temperature_all", list(range(len(classes)))
    for name, (temperature, chosen) in sets.items():
        shown, labels = shared.among(logits, faces.labels, chosen)
        if not len(labels):
            continue
        both, _ = shared.among(logits + mirrored, faces.labels, chosen)
        accuracy = (both.argmax(1) == labels).float().mean()
        print(f"{name}: accuracy {accuracy:.2%} averaged over mirror images, at twice the cost")
        is_shown = torch.isin(faces.labels, torch.tensor(chosen))
        shared.report(
            name,
            shown,
            labels,
            temperature=checkpoint[temperature],
            classes=[classes[column] for column in chosen],
            out_dir=out_dir,
            subsets={subset: mask[is_shown] for subset, mask in subsets.items()},
        )
    shown, labels = shared.among(logits, faces.labels, default)
    return (shown / checkpoint["temperature"]).softmax(1), labels


def report_collections(
    collections: dict[str, shared.Collection],
    out_dir: Path | None,
    checkpoint: dict,
    split: str,
    **options: object,
) -> None:
    """Report on the same split of each collection that has it; if none has a test, on val.

    The files and lines of all but the first have its name. Several also share a picture.
    """

    def having(split: str) -> list[str]:
        classes = checkpoint["classes"]
        return [name for name, own in collections.items() if shared.list_split(own.folder, split, classes)]

    names = having(split)
    if not names and (names := having("val")):
        print("there are no test faces: judged on val, which also picked the best epoch", file=sys.stderr)
        split = "val"
    judged = {}
    for name in names or collections:
        title = split if name == next(iter(collections)) else f"{split}_{name}"
        judged[f"{name} {split}"] = report_split(
            collections[name].folder, out_dir, checkpoint, split, title=title, **options
        )
    judged = {name: (probs, labels) for name, (probs, labels) in judged.items() if len(labels)}
    if out_dir and len(judged) > 1:
        path = out_dir / f"{split}_reliability_by_collection.png"
        shared.plot_reliability(judged, path)
        print(f"wrote {shared.printable(path)}")


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict | None]:
    """Return the options and, with --resume, the checkpoint to go on from."""
    parser = shared.build_parser(__doc__)
    add, share = parser.add_argument, shared.number(float, 0, 1)
    shared.add_options(parser, data_dir="data/fer", init=Path("runs/gray/best.pt"))
    out_help = f"folder to write into (default: {OUT_DIR}; with --evaluate nothing is written without it)"
    add("--out-dir", type=Path, metavar="DIR", help=out_help)
    mix_help = (
        "other collections: DIR/<emotion>/* or DIR/{train,val,test}/<emotion>/*, drawn WEIGHT times as often"
    )
    add("--mix", nargs="+", default=[], metavar="DIR[=WEIGHT]", help=mix_help)
    usual = f"default: {' '.join(shared.EMOTIONS)}; if it does not learn all these, what it learns"
    default_help = f"what the model tells apart, of all that it learns, unless asked for more ({usual})"
    add("--emotions", nargs="+", metavar="NAME", help=default_help)
    add("--evaluate", type=Path, metavar="CHECKPOINT", help="do not train, report how good this one is")
    add("--split", choices=("val", "test"), default="test", help="what --evaluate looks at")
    vote_help = "share of a target that comes from FER+'s votes, if they were unpacked"
    add("--vote-weight", type=share, default=0.25, metavar="X", help=vote_help)
    teachers_help = "learn also what these best.pt predict; they must have learned the same emotions"
    add("--teachers", nargs="+", type=Path, metavar="CHECKPOINT", help=teachers_help)
    weight_help = "share of a target that comes from --teachers, if there are any"
    add("--teacher-weight", type=share, default=0.5, metavar="X", help=weight_help)
    size_help = f"side of the input, pixels (default: that of --init, or {shared.IMAGE_SIZE} after stage 3)"
    add("--image-size", **(shared.OPTIONS["image_size"] | {"help": size_help}))
    shared.add_options(  # as the shipped model was trained
        parser,
        unfreeze=list(shared.PARTS),
        epochs=10,
        batch_size=64,
        lr=3e-4,
        weight_decay=0.05,
        ema=0.998,
        balance=0.5,
        mixup=0.2,
        label_smoothing=0.05,
        limit=None,
        seed=0,
        resume=None,
        device="auto",
    )
    args, resumed = shared.parse_with_resume(parser, argv, stage="fer", out_dir=OUT_DIR)
    if not args.evaluate:
        args.out_dir = args.out_dir or OUT_DIR
    return args, resumed


@shared.one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Train, then report on the test faces; with --evaluate only report."""
    shared.join_others(is_quiet=True)
    args, resumed = parse_args(argv)
    import torch

    torch.manual_seed(args.seed)
    device = shared.pick_device(args.device)
    collections = shared.parse_collections([str(args.data_dir), *args.mix])
    report = functools.partial(report_collections, collections, args.out_dir)
    report = functools.partial(report, batch_size=args.batch_size, limit=args.limit, device=device)
    if args.evaluate:
        shared.leave_others()
        report(shared.load_checkpoint(args.evaluate, stages=("fer", "emotion")), args.split)
        return
    learned = shared.check_collections(own.folder for own in collections.values())
    default = pick_classes(learned, args.emotions)
    with shared.only_run_in(args.out_dir):
        parent = shared.load_checkpoint(args.init)
        usual_size = shared.IMAGE_SIZE if parent["stage"] == "gray" else parent["image_size"]
        args.image_size = args.image_size or usual_size
        load = functools.partial(load_split, classes=learned, limit=args.limit, max_size=args.image_size)
        size = args.image_size if args.mix else None  # FER alone stays as small as it is
        train = {name: load(own.folder, "train", size=size) for name, own in collections.items()}
        val = {name: load(own.folder, "val") for name, own in collections.items()}
        net = shared.load_network(parent, learned)
        if args.mix:
            shared.add_heads(net, len(collections))
        net.to(device, memory_format=torch.channels_last)
        shared.freeze_except(net, args.unfreeze)
        run = shared.Run(
            args.out_dir,
            stage="fer",
            arch=parent["arch"],
            classes=learned,
            default_classes=default,
            image_size=args.image_size,
            crop_margin=shared.CROP_MARGIN,
            config=shared.plain_config(vars(args)),
        )
        shares = {"vote_weight": args.vote_weight, "teacher_weight": args.teacher_weight}
        faces = training_set(train, collections, learned, device, teachers=args.teachers or (), **shares)
        run.start(net, device, describe(train, val, learned, parent), resume=resumed)
        options = {"batch_size": args.batch_size, "image_size": args.image_size, "device": device}
        best = shared.fit_classifier(
            net,
            shared.FaceBatches(**faces, **options, balance=args.balance, mixup=args.mixup, seed=args.seed),
            {name: shared.FaceBatches(split.images, split.labels, **options) for name, split in val.items()},
            run=run,
            schedule=shared.Schedule(args.epochs, args.lr, args.weight_decay, args.ema),
            label_smoothing=args.label_smoothing,
            parent=parent,
            resume=resumed,
        )
        accuracy = best["metrics"]["val_acc"]
        print(f"best epoch {best['epoch']}: val accuracy {accuracy:.2%}; wrote {args.out_dir / 'best.pt'}")
        report(best, "test")


if __name__ == "__main__":
    main()
