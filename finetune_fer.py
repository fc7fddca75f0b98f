"""Fine-tune the gray network on the faces of FER2013.

All layers learn, from the weights that finetune_gray_imagenet.py distilled. The faces stay in memory as uint8
and are augmented in batches. The network learns every emotion that was unpacked for train, and in the end
keeps those of --emotions: telling more apart teaches it more about faces. If FER+'s votes were unpacked
(Barsoum et al. 2016, arXiv:1608.01041), a target is partly what ten people saw, partly FER's own label.
With --teachers it is partly what trained networks make of the face: several that differ know more together
than each alone, and one network can learn it (Hinton et al. 2015, arXiv:1503.02531).

Validation (PublicTest) picks the best epoch and the temperature of the softmax; the test faces (PrivateTest)
are looked at once, at the end: all of them, and apart from that those that also stand in no other split, and
those of whose label six of FER+'s ten voters are sure.

Usage:
    python finetune_fer.py --data-dir data/fer --init runs/gray/best.pt
    python finetune_fer.py --data-dir data/fer --evaluate runs/fer/best.pt --out-dir runs/fer
    python finetune_fer.py --data-dir data/fer5 --init runs/a/best.pt --teachers runs/a/best.pt runs/b/best.pt
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import model as shared

SPLITS = ("train", "val", "test")
SURE_VOTES = 6  # of FER+'s ten; chosen here, a majority that no two other opinions can match


class Faces(NamedTuple):
    """N labelled faces of C classes."""

    images: Tensor  # (N, 1, S, S) uint8
    labels: Tensor  # (N,) int64
    votes: Tensor  # (N, C) float32, how many of FER+'s ten voters saw which class; all 0 if not known


def find_classes(folder: Path) -> tuple[str, ...]:
    """Name the emotions that `folder` has a folder for, sorted.

    Raises:
        ValueError: there are fewer than two.
    """
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if len(classes) < 2:
        raise ValueError(
            f"{folder} has {len(classes)} emotion folders, expected 2 or more; run unpack_fer_data.py"
        )
    return tuple(classes)


def pick_classes(learned: Sequence[str], wanted: Sequence[str]) -> tuple[str, ...]:
    """Name the learned emotions that are wanted, sorted.

    Raises:
        ValueError: there are fewer than two.
    """
    kept = tuple(sorted(set(learned) & set(wanted)))
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
        ValueError: a row or a class is not in the file.
    """
    if not path.exists():
        return torch.zeros(len(faces), len(classes))
    with path.open(newline="", encoding="utf-8") as file:
        votes = {int(line["row"]): line for line in csv.DictReader(file)}
    try:
        rows = [votes[int(face.stem)] for face in faces]
        return torch.tensor([[float(row[name]) for name in classes] for row in rows])
    except KeyError as error:
        raise ValueError(f"{path} has no votes for {error}; unpack anew, or remove the file") from None


def load_split(folder: Path, classes: Sequence[str], limit: int | None) -> Faces:
    """Read a split of FER, and its votes from beside it.

    Raises:
        ValueError: a class has no images, or votes.csv does not fit.
    """
    images, labels = shared.load_faces(folder, classes, limit)
    faces = shared.list_faces(folder, classes, limit)
    return Faces(images, labels, load_votes(folder.parent / "votes.csv", faces, classes))


def mix_targets(labels: Tensor, votes: Tensor, weight: float) -> Tensor:
    """Mix labels (N,) with votes (N, C) into shares of the classes (N, C), `weight` of them from the votes.

    A face without votes for these classes has its label alone.
    """
    own, totals = F.one_hot(labels, votes.shape[1]).float(), votes.sum(1, keepdim=True)
    return torch.where(totals > 0, (1 - weight) * own + weight * votes / totals.clamp(min=1), own)


def load_teachers(
    paths: Sequence[Path | str], classes: Sequence[str], device: torch.device
) -> list[shared.Classifier]:
    """Read the checkpoints, of this stage or the next, of networks that tell just `classes` apart.

    Raises:
        FileNotFoundError, ValueError: one is none, or has other classes.
    """
    teachers = [
        shared.Classifier.load(Path(path), device) for path in paths
    ]  # a resumed run's paths are text
    for path, teacher in zip(paths, teachers, strict=True):
        if sorted(teacher.classes) != sorted(classes):
            raise ValueError(
                f"{path} knows {' '.join(teacher.classes)}, expected what was unpacked, {' '.join(classes)}; "
                "unpack a folder with what it knows, see --emotions of unpack_fer_data.py"
            )
    return teachers


def ask_teachers(teachers: Sequence[shared.Classifier], images: Tensor, classes: Sequence[str]) -> Tensor:
    """Return what trained networks make of faces: the mean of their probabilities, float32 (N, C).

    Each speaks at its own temperature, and sees each face (N, 1, S, S), uint8, and its mirror image.
    """
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


def find_copies(images: Tensor, others: Tensor) -> Tensor:
    """Tell which of the images (N, 1, S, S) stand among the others, pixel for pixel: (N,) bool."""
    seen = {image.numpy().tobytes() for image in others}
    return torch.tensor([image.numpy().tobytes() in seen for image in images])


def build_model(checkpoint: dict, classes: Sequence[str]) -> nn.Module:
    """Build an earlier run's network with its weights; classes that it did not know start untrained."""
    net = shared.gray_resnet(checkpoint["arch"], len(classes))
    head = {name: value.clone() for name, value in net.fc.state_dict(prefix="fc.").items()}
    known = [name for name in classes if name in checkpoint["classes"]]
    if known:
        kept = shared.keep_classes(checkpoint, known)["model"]
        for name, value in head.items():
            value[[classes.index(emotion) for emotion in known]] = kept[name]
    shared.init_from(net, {**checkpoint["model"], **head})
    if len(known) < len(classes):
        print(f"new, untrained: what fc makes of {', '.join(name for name in classes if name not in known)}")
    return net


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; with --resume the interrupted run's options are the defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--init",
        type=Path,
        default=Path("runs/gray/best.pt"),
        metavar="CHECKPOINT",
        help="start from this best.pt, of finetune_gray_imagenet.py or an earlier run (default: %(default)s)",
    )
    add("--evaluate", type=Path, metavar="CHECKPOINT", help="do not train, report how good this one is")
    add(
        "--split",
        choices=("val", "test"),
        default="test",
        help="what --evaluate looks at (default: %(default)s)",
    )
    add(
        "--emotions",
        nargs="+",
        default=list(shared.EMOTIONS),
        metavar="NAME",
        help=f"what the model keeps of all that it learns (default: {' '.join(shared.EMOTIONS)})",
    )
    add(
        "--vote-weight",
        type=shared.number(float, 0, 1),
        default=0.25,
        metavar="X",
        help="share of a target that comes from FER+'s votes, if they were unpacked (default: %(default)s)",
    )
    add(
        "--teachers",
        nargs="+",
        type=Path,
        metavar="CHECKPOINT",
        help="learn also what these best.pt make of the faces; they must know just the unpacked emotions",
    )
    add(
        "--teacher-weight",
        type=shared.number(float, 0, 1),
        default=0.5,
        metavar="X",
        help="share of a target that comes from --teachers, if there are any (default: %(default)s)",
    )
    shared.add_training_options(
        parser,
        data_dir="data/fer",
        out_dir="runs/fer",
        epochs=10,
        batch_size=64,
        lr=3e-4,
        weight_decay=0.05,
        image_size=shared.IMAGE_SIZE,
    )
    shared.add_classifier_options(parser)
    shared.add_freezing_option(parser, unfreeze=shared.PARTS)
    # As the shipped model was trained.
    parser.set_defaults(balance=0.5, ema=0.998, mixup=0.2, label_smoothing=0.05)
    return shared.parse_with_resume(parser, argv, stage="fer")


@shared.one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Train, then report on the test faces; with --evaluate only report."""
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    device = shared.pick_device(args.device)

    def feed(faces: Faces, image_size: int) -> shared.FaceBatches:
        targets = mix_targets(faces.labels, faces.votes, args.vote_weight)
        options = {"balance": args.balance, "mixup": args.mixup, "seed": args.seed}
        return shared.FaceBatches(
            faces.images, faces.labels, args.batch_size, image_size, device, targets=targets, **options
        )

    if args.evaluate:
        split, best = args.split, shared.load_checkpoint(args.evaluate, stages=("fer", "emotion"))
    else:
        learned = find_classes(args.data_dir / "train")
        classes = pick_classes(learned, args.emotions)
        train_faces = load_split(args.data_dir / "train", learned, args.limit)
        train = feed(train_faces, args.image_size)
        teachers = load_teachers(args.teachers or [], learned, device)
        val = feed(load_split(args.data_dir / "val", classes, args.limit), args.image_size)
        print(f"starting from {args.init}")
        start = shared.load_checkpoint(args.init)
        net = build_model(start, learned).to(device, memory_format=torch.channels_last)
        shared.freeze_except(net, args.unfreeze)
        data = {
            "train": train.describe(learned),
            "val": val.describe(classes),
            "votes": f"known for {int((train_faces.votes.sum(1) > 0).sum())} images of train",
        }
        shared.start_run(args, net, device, data)
        if teachers:
            answers = ask_teachers(teachers, train_faces.images, learned)
            train.targets = train.targets.lerp(answers, args.teacher_weight)
        about = {
            "stage": "fer",
            "arch": start["arch"],
            "classes": list(learned),
            "image_size": args.image_size,
            "crop_margin": shared.CROP_MARGIN,
            "config": shared.plain_config(args),
        }
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
        print(
            f"best epoch {best['epoch']}: val accuracy {best['metrics']['val_acc']:.2%}; "
            f"wrote {args.out_dir / 'best.pt'}"
        )
        split = "test"

    classes = best["classes"]
    faces = load_split(args.data_dir / split, classes, args.limit)
    folders = [args.data_dir / other for other in SPLITS if other != split]
    others = torch.cat([shared.load_faces(folder, find_classes(folder))[0] for folder in folders])
    sure = faces.votes.gather(1, faces.labels[:, None])[:, 0] >= SURE_VOTES
    subsets = {
        "not in another split": ~find_copies(faces.images, others),
        f"with {SURE_VOTES} of FER+'s 10 votes": sure,
    }
    net = shared.load_network(best).to(device, memory_format=torch.channels_last)
    batches = feed(faces, best["image_size"])
    logits, labels = shared.evaluate(net, batches.eval())
    batches.images = batches.images.flip(-1)
    averaged = (logits + shared.evaluate(net, batches.eval())[0]) / 2
    accuracy = shared.judge(averaged, labels)["acc"]
    print(f"{split}: accuracy {accuracy:.2%} averaged over mirror images, at twice the cost")
    shared.report(
        split,
        logits,
        labels,
        temperature=best["temperature"],
        classes=classes,
        out_dir=args.out_dir,
        subsets=subsets,
    )


if __name__ == "__main__":
    main()
