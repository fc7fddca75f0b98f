"""Fine-tune the gray network on the faces of FER2013.

All layers learn, from the weights that finetune_gray_imagenet.py distilled. The faces stay in memory as uint8
and are augmented in batches. The network learns every emotion that was unpacked for train, and the best
checkpoint keeps those of --emotions: telling more apart teaches it more about faces. If FER+'s votes were
unpacked (Barsoum et al. 2016, arXiv:1608.01041), a target is partly what ten people saw, partly FER's own
label. With --teachers it is partly the mean prediction of trained networks: several that differ know more
together than each alone, and one network can learn it (Hinton et al. 2015, arXiv:1503.02531).

Validation (PublicTest) picks the best epoch and the temperature of the softmax; the test faces (PrivateTest)
are looked at once, at the end: all of them, and apart from that those that also stand in no other split, and
those of whose label six of FER+'s ten voters are sure.

Usage:
    python finetune_fer.py --data-dir data/fer --init runs/gray/best.pt
    python finetune_fer.py --data-dir data/fer --evaluate runs/fer/best.pt --out-dir runs/fer
    python finetune_fer.py --data-dir data/fer5 --init runs/a/best.pt --teachers runs/a/best.pt runs/b/best.pt
"""

from __future__ import annotations

import argparse
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image
from tqdm import tqdm

import model as shared

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

SURE_VOTES = 6  # of FER+'s ten; chosen here, a majority that no two other opinions can match


class FerSplit(NamedTuple):
    """N labelled faces of C classes."""

    images: Tensor  # (N, 1, S, S) uint8
    labels: Tensor  # (N,) int64
    votes: Tensor  # (N, C) float32, how many of FER+'s ten voters saw which class; all 0 if not known


def find_classes(folder: Path) -> list[str]:
    """List the emotions that `folder` has a folder for, sorted.

    Raises:
        ValueError: there are fewer than two.
    """
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if len(classes) < 2:
        raise ValueError(
            f"{folder} has {len(classes)} emotion folders, expected 2 or more; run unpack_fer_data.py"
        )
    return classes


def pick_classes(learned: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """List the learned emotions that are wanted, sorted.

    Raises:
        ValueError: there are fewer than two.
    """
    kept = sorted(set(learned) & set(wanted))
    if len(kept) < 2:
        raise ValueError(
            f"train has {' '.join(learned)}, expected two or more of {' '.join(wanted)}; see --emotions"
        )
    return kept


def load_votes(path: Path, faces: Sequence[Path], classes: Sequence[str]) -> Tensor:
    """Read FER+'s votes from unpack_fer_data.py's votes.csv, (N, C) float32; without a file they are 0.

    Args:
        faces: N images, named after the rows of FER's table.

    Raises:
        ValueError: a row or a class is not in the file, or a row is malformed.
    """
    import torch

    def parse(cells: dict[str, str]) -> tuple[int, list[float]]:
        counts = [float(cells[name]) for name in classes]
        if not all(0 <= count < math.inf for count in counts):
            raise ValueError(f"row {cells['row'][:20]} has votes that are no numbers of people")
        return int(cells["row"]), counts

    if not path.exists():
        return torch.zeros(len(faces), len(classes))
    rows = shared.read_table(path, {"row", *classes}, parse, "what unpack_fer_data.py writes of FER+'s votes")
    votes = dict(rows)
    missing = [face.stem for face in faces if not face.stem.isdecimal() or int(face.stem) not in votes]
    if missing or len(votes) < len(rows):
        reason = f"no votes for {missing[0]}" if missing else "two lines for a row"
        raise ValueError(f"{path} has {reason}; unpack anew, or remove the file")
    return torch.tensor([votes[int(face.stem)] for face in faces])


def load_split(folder: Path, classes: Sequence[str], limit: int | None) -> FerSplit:
    """Read a split of FER, and its votes from beside it.

    Raises:
        ValueError: a class has no images, or votes.csv does not fit.
    """
    images, labels, paths = shared.load_faces(folder, classes, limit)
    return FerSplit(images, labels, load_votes(folder.parent / "votes.csv", paths, classes))


def mix_targets(labels: Tensor, votes: Tensor, weight: float) -> Tensor:
    """Mix labels (N,) with votes (N, C) into shares of the classes (N, C), `weight` of them from the votes.

    A face without votes for these classes has its label alone.
    """
    import torch
    import torch.nn.functional as F

    own, totals = F.one_hot(labels, votes.shape[1]).float(), votes.sum(1, keepdim=True)
    return torch.where(totals > 0, (1 - weight) * own + weight * votes / totals.clamp(min=1), own)


def load_teachers(
    paths: Sequence[Path], classes: Sequence[str], device: torch.device
) -> list[shared.Classifier]:
    """Read the checkpoints, of this stage or the next, of networks that know just `classes`.

    Raises:
        FileNotFoundError, ValueError: one is none, or has other classes.
    """
    teachers = [shared.Classifier(path, device) for path in paths]
    for path, teacher in zip(paths, teachers, strict=True):
        if sorted(teacher.classes) != sorted(classes):
            raise ValueError(
                f"{path} knows {' '.join(teacher.classes)}, expected what was unpacked, {' '.join(classes)}; "
                "unpack a folder with what it knows, see --emotions of unpack_fer_data.py"
            )
    return teachers


def ask_teachers(teachers: Sequence[shared.Classifier], images: Tensor, classes: Sequence[str]) -> Tensor:
    """Return the mean of trained networks' probabilities for faces, float32 (N, C).

    Each network has its own temperature, and sees each face (N, 1, S, S), uint8, and its mirror image.
    """
    import torch

    crops = [Image.fromarray(image) for image in torch.cat([images, images.flip(-1)])[:, 0].numpy()]
    total = torch.zeros(len(crops), len(classes))
    for number, teacher in enumerate(teachers, 1):
        order = [teacher.classes.index(name) for name in classes]
        name = f"asking teacher {number}/{len(teachers)}"
        with tqdm(total=len(crops), desc=name, unit="image", disable=None, leave=False) as bar:
            for start in range(0, len(crops), shared.MAX_BATCH):
                part = slice(start, start + shared.MAX_BATCH)
                total[part] += torch.from_numpy(teacher.predict_crops(crops[part]))[:, order]
                bar.update(len(crops[part]))
    return (total[: len(images)] + total[len(images) :]) / (2 * len(teachers))


def stands_elsewhere(images: Tensor, others: Tensor) -> Tensor:
    """Return which of the images (N, 1, S, S) stand among the others, pixel for pixel: (N,) bool."""
    import torch

    seen = {image.numpy().tobytes() for image in others}
    return torch.tensor([image.numpy().tobytes() in seen for image in images])


def report_split(
    data_dir: Path,
    out_dir: Path,
    checkpoint: dict,
    split: str,
    *,
    batch_size: int,
    limit: int | None,
    device: torch.device,
) -> None:
    """Report how good a checkpoint is on a split: all of it, and apart from that its clean faces."""
    import torch

    classes, image_size = checkpoint["classes"], checkpoint["image_size"]
    faces = load_split(data_dir / split, classes, limit)
    folders = [data_dir / other for other in shared.SPLITS if other != split]
    others = torch.cat([shared.load_faces(folder, find_classes(folder))[0] for folder in folders])
    sure = faces.votes.gather(1, faces.labels[:, None])[:, 0] >= SURE_VOTES
    subsets = {
        "not in another split": ~stands_elsewhere(faces.images, others),
        f"with {SURE_VOTES} of FER+'s 10 votes": sure,
    }
    net = shared.load_network(checkpoint).to(device, memory_format=torch.channels_last)
    logits, mirrored = (
        shared.evaluate(net, shared.FaceBatches(images, faces.labels, batch_size, image_size, device).eval())[
            0
        ]
        for images in (faces.images, faces.images.flip(-1))
    )
    accuracy = ((logits + mirrored).argmax(1) == faces.labels).float().mean()
    print(f"{split}: accuracy {accuracy:.2%} averaged over mirror images, at twice the cost")
    shared.report(
        split,
        logits,
        faces.labels,
        temperature=checkpoint["temperature"],
        classes=classes,
        out_dir=out_dir,
        subsets=subsets,
    )


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict | None]:
    """Return the options and, with --resume, the checkpoint to go on from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shared.HelpFormatter)
    add, share = parser.add_argument, shared.number(float, 0, 1)
    shared.add_options(
        parser,
        data_dir="data/fer",
        out_dir="runs/fer",
        init=Path("runs/gray/best.pt"),
    )
    kept_help = "what the model keeps of all that it learns"
    add("--emotions", nargs="+", default=shared.EMOTIONS, metavar="NAME", help=kept_help)
    add("--evaluate", type=Path, metavar="CHECKPOINT", help="do not train, report how good this one is")
    add("--split", choices=("val", "test"), default="test", help="what --evaluate looks at")
    vote_help = "share of a target that comes from FER+'s votes, if they were unpacked"
    add("--vote-weight", type=share, default=0.25, metavar="X", help=vote_help)
    teachers_help = "learn also what these best.pt predict; they must know just the unpacked emotions"
    add("--teachers", nargs="+", type=Path, metavar="CHECKPOINT", help=teachers_help)
    weight_help = "share of a target that comes from --teachers, if there are any"
    add("--teacher-weight", type=share, default=0.5, metavar="X", help=weight_help)
    shared.add_options(  # as the shipped model was trained
        parser,
        unfreeze=list(shared.PARTS),
        image_size=shared.IMAGE_SIZE,
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
    return shared.parse_with_resume(parser, argv, stage="fer")


@shared.one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Train, then report on the test faces; with --evaluate only report."""
    args, resumed = parse_args(argv)
    import torch

    torch.manual_seed(args.seed)
    device = shared.pick_device(args.device)
    report_on = functools.partial(
        report_split, args.data_dir, args.out_dir, batch_size=args.batch_size, limit=args.limit, device=device
    )
    with shared.only_run_in(args.out_dir):
        if args.evaluate:
            report_on(shared.load_checkpoint(args.evaluate, stages=("fer", "emotion")), args.split)
            return
        learned = find_classes(args.data_dir / "train")
        kept = pick_classes(learned, args.emotions)
        faces = load_split(args.data_dir / "train", learned, args.limit)
        val_faces = load_split(args.data_dir / "val", kept, args.limit)
        teachers = load_teachers([Path(path) for path in args.teachers or []], learned, device)
        start = shared.load_checkpoint(args.init)
        net = shared.load_network(start, learned).to(device, memory_format=torch.channels_last)
        shared.freeze_except(net, args.unfreeze)
        run = shared.Run(
            args.out_dir,
            stage="fer",
            arch=start["arch"],
            classes=learned,
            kept=kept,
            image_size=args.image_size,
            crop_margin=shared.CROP_MARGIN,
            config=shared.plain_config(vars(args)),
        )
        data = {
            "train": shared.count_labels(faces.labels, learned),
            "val": shared.count_labels(val_faces.labels, kept),
            "votes": f"known for {int((faces.votes.sum(1) > 0).sum())} images of train",
            "untrained in the head": ", ".join(name for name in learned if name not in start["classes"])
            or "none",
        }
        run.start(net, device, data, is_resumed=resumed is not None)
        targets = mix_targets(faces.labels, faces.votes, args.vote_weight)
        if teachers:
            targets = targets.lerp(ask_teachers(teachers, faces.images, learned), args.teacher_weight)
        batches = functools.partial(
            shared.FaceBatches, batch_size=args.batch_size, image_size=args.image_size, device=device
        )
        best = shared.fit_classifier(
            net,
            batches(
                faces.images,
                faces.labels,
                targets=targets,
                balance=args.balance,
                mixup=args.mixup,
                seed=args.seed,
            ),
            batches(val_faces.images, val_faces.labels),
            run=run,
            schedule=shared.Schedule(args.epochs, args.lr, args.weight_decay, args.ema),
            label_smoothing=args.label_smoothing,
            resume=resumed,
        )
        accuracy = best["metrics"]["val_acc"]
        print(f"best epoch {best['epoch']}: val accuracy {accuracy:.2%}; wrote {args.out_dir / 'best.pt'}")
        report_on(best, "test")


if __name__ == "__main__":
    main()
