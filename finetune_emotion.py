"""Fine-tune the FER network on photographs that were found by a search word.

MTCNN cuts each photo to its single face, gray, with the margin of the checkpoint; photos with no face or
several are left out and counted. The crops are kept, so a second run does not search again. As in the
original toolkit the early layers stay frozen, BatchNorm included: the ResNet's last stage and the head learn.

Usage:
    python finetune_emotion.py --data-dir data/google --init runs/fer/best.pt
    python finetune_emotion.py --data-dir my_photos --unfreeze fc --epochs 3
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import model as shared

FACE_SIZE = 96  # pixels, side of the kept crops: half again the network's usual input


def cut_face(photo: Path, finder: shared.FaceFinder, margin: float) -> Image.Image | str:
    """Cut a photo to its single face, gray, FACE_SIZE pixels; or say why not."""
    try:
        image = shared.load_photo(photo)
    except ValueError:
        return "not readable"
    faces = finder.find(image)
    if len(faces.boxes) != 1:
        return "several faces" if len(faces.boxes) else "no face"
    [crop] = shared.crop_faces(image, faces.boxes, margin)
    return crop.convert("L").resize((FACE_SIZE, FACE_SIZE), Image.Resampling.LANCZOS)


def cut_faces(
    data_dir: Path, faces_dir: Path, classes: Sequence[str], finder: shared.FaceFinder, margin: float
) -> None:
    """Cut photos data_dir/<class>/* into faces_dir/<class>/*.png, if not done yet; count what is left out."""
    photos = [path for name in classes for path in shared.list_images(data_dir / name)]
    counts = Counter()
    for photo in tqdm(photos, "finding faces", unit="photo", disable=None):
        target = (faces_dir / photo.relative_to(data_dir)).with_name(f"{photo.name}.png")
        if target.exists():
            counts["kept from before"] += 1
            continue
        face = cut_face(photo, finder, margin)
        if isinstance(face, str):
            counts[face] += 1
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".tmp")
        face.save(temporary, "PNG")
        temporary.replace(target)
        counts["cut"] += 1
    print(
        f"{len(photos)} photos: " + ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; with --resume the interrupted run's options are the defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--faces-dir",
        type=Path,
        default=Path("data/google_faces"),
        help="where the cut faces are kept (default: %(default)s)",
    )
    add(
        "--init",
        type=Path,
        default=Path("runs/fer/best.pt"),
        metavar="CHECKPOINT",
        help="start from this best.pt of finetune_fer.py (default: %(default)s)",
    )
    shared.add_training_options(
        parser,
        data_dir="data/google",
        out_dir="runs/emotion",
        epochs=5,
        batch_size=64,
        lr=1e-4,
        weight_decay=0.05,
        image_size=shared.IMAGE_SIZE,
    )
    shared.add_classifier_options(parser)
    shared.add_freezing_options(parser, unfreeze=["layer4", "fc"])
    return shared.parse_with_resume(parser, argv, stage="emotion")


@shared.one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Cut the faces, train, and report on the held-out faces before and after."""
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    device = shared.pick_device(args.device)
    start = shared.load_checkpoint(args.init, stages=("fer", "emotion"))
    classes = start["classes"]
    cut_faces(args.data_dir, args.faces_dir, classes, shared.FaceFinder(device), start["crop_margin"])
    images, labels = shared.load_faces(args.faces_dir, classes, args.limit)
    train, val = (
        shared.FaceBatches(
            images[i],
            labels[i],
            args.batch_size,
            args.image_size,
            device,
            balance=args.balance,
            seed=args.seed,
        )
        for i in shared.split_indices(len(images), args.val_fraction, args.seed)
    )
    net = shared.load_network(start).to(device, memory_format=torch.channels_last)
    shared.freeze_except(net, args.unfreeze)
    shared.start_run(args, net, device, {"train": train.describe(classes), "val": val.describe(classes)})
    before = shared.evaluate(shared.MirrorAveraged(net), val.eval())
    shared.report("before", *before, temperature=start["temperature"], classes=classes, out_dir=args.out_dir)
    about = {
        **{key: start[key] for key in ("arch", "classes", "crop_margin")},
        "stage": "emotion",
        "image_size": args.image_size,
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
    net = shared.MirrorAveraged(shared.load_network(best)).to(device, memory_format=torch.channels_last)
    after = shared.evaluate(net, val.eval())
    shared.report("val", *after, temperature=best["temperature"], classes=classes, out_dir=args.out_dir)
    print(f"best epoch {best['epoch']}; wrote {args.out_dir / 'best.pt'}")


if __name__ == "__main__":
    main()
