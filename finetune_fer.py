"""Fine-tune the gray network on the faces of FER2013.

All layers learn, from the weights that finetune_gray_imagenet.py distilled. The faces stay in memory as uint8
and are augmented in batches. Validation (PublicTest) picks the best epoch and the temperature of the softmax;
the test faces (PrivateTest) are looked at once, at the end.

Usage:
    python finetune_fer.py --data-dir data/fer --init runs/gray/best.pt
    python finetune_fer.py --data-dir data/fer --evaluate runs/fer/best.pt --out-dir runs/fer
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import model as shared


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


def build_model(checkpoint: dict, classes: Sequence[str]) -> nn.Module:
    """Build an earlier run's network with its weights; its head is kept only if it told `classes` apart."""
    net = shared.gray_resnet(checkpoint["arch"], len(classes))
    new_head = tuple(checkpoint["classes"]) != tuple(classes)
    shared.init_from(net, checkpoint["model"], new_head)
    if new_head:
        print("new, untrained: fc.weight, fc.bias")
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
    shared.add_training_options(
        parser,
        data_dir="data/fer",
        out_dir="runs/fer",
        epochs=12,
        batch_size=64,
        lr=3e-4,
        weight_decay=0.05,
        image_size=shared.IMAGE_SIZE,
    )
    shared.add_classifier_options(parser)
    return shared.parse_with_resume(parser, argv, stage="fer")


@shared.one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Train, then report on the test faces; with --evaluate only report."""
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    device = shared.pick_device(args.device)

    def load(split: str, classes: Sequence[str], image_size: int) -> shared.FaceBatches:
        images, labels = shared.load_faces(args.data_dir / split, classes, args.limit)
        return shared.FaceBatches(
            images, labels, args.batch_size, image_size, device, balance=args.balance, seed=args.seed
        )

    if args.evaluate:
        split, best = args.split, shared.load_checkpoint(args.evaluate, stages=("fer", "emotion"))
    else:
        classes = find_classes(args.data_dir / "train")
        train, val = (load(split, classes, args.image_size) for split in ("train", "val"))
        print(f"starting from {args.init}")
        start = shared.load_checkpoint(args.init, stages=("gray", "fer"))
        net = build_model(start, classes).to(device, memory_format=torch.channels_last)
        shared.start_run(args, net, device, {"train": train.describe(classes), "val": val.describe(classes)})
        about = {
            "stage": "fer",
            "arch": start["arch"],
            "classes": list(classes),
            "image_size": args.image_size,
            "crop_margin": shared.CROP_MARGIN,
            "config": shared.plain_config(args),
        }
        best = shared.fit_classifier(
            net,
            train,
            val,
            args.out_dir,
            label_smoothing=args.label_smoothing,
            about=about,
            **shared.fit_options(args),
        )
        print(
            f"best epoch {best['epoch']}: val accuracy {best['metrics']['val_acc']:.2%}; "
            f"wrote {args.out_dir / 'best.pt'}"
        )
        split = "test"
    data = load(split, best["classes"], best["image_size"])
    net = shared.MirrorAveraged(shared.load_network(best)).to(device, memory_format=torch.channels_last)
    logits, labels = shared.evaluate(net, data.eval())
    shared.report(
        split, logits, labels, temperature=best["temperature"], classes=best["classes"], out_dir=args.out_dir
    )


if __name__ == "__main__":
    main()
