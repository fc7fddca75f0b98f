"""Teach an ImageNet ResNet to see in gray: its embedding of a gray image is to equal the colour net's.

The colour net is the frozen teacher. The student is the same net with a one-channel stem, made by folding the
three colour kernels and the colour normalisation into one gray kernel: on an image that is gray already it
starts exactly right. What colour adds is then distilled: mean squared error between the student's
embedding of the gray image and the teacher's embedding of the colour image (Romero et al. 2015, "FitNets").
By default the stem alone learns, as in the original toolkit; the frozen rest keeps its BatchNorm statistics.

Usage:
    python finetune_gray_imagenet.py --data-dir data/imagenet
    python finetune_gray_imagenet.py --unfreeze conv1 bn1 layer1 --out-dir runs/gray_layer1
"""

from __future__ import annotations

import argparse
import operator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import model as shared
from model import COLOR_MEAN, COLOR_STD, GRAY_MEAN, GRAY_STD, LUMA

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import Tensor, nn


def download_weights(arch: str) -> Path:
    """Return the file of torchvision's ImageNet weights, which is downloaded unless torch has kept it.

    Raises:
        ValueError: there are none of this architecture, or they cannot be had.
    """
    import torch
    import torchvision

    if arch.endswith("_v1"):
        raise ValueError(f"torchvision has no weights for {arch}; give them with --teacher-weights FILE")
    url = torchvision.models.get_model_weights(arch)["IMAGENET1K_V1"].url
    path = Path(torch.hub.get_dir(), "checkpoints", PurePath(url).name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        sha_prefix = path.stem.rpartition("-")[2]
        try:
            torch.hub.download_url_to_file(url, str(path), sha_prefix)
        except (OSError, RuntimeError) as error:  # the second: of another hash
            raise ValueError(
                f"could not download the weights of {arch} ({error}); give them with --teacher-weights FILE"
            ) from None
    return path


def load_teacher(arch: str, weights_path: Path | None) -> nn.Module:
    """Build the colour ResNet with ImageNet weights: a local state dict, else torchvision's download.

    Raises:
        ValueError: the file does not fit the architecture, or there is nothing to download for it.
        FileNotFoundError: there is no such file.
    """
    expected = f"a state dict of torchvision's {arch}"
    if weights_path is None:
        weights_path = download_weights(arch)
        expected += ", as it was downloaded (delete it to download it again)"
    if not weights_path.is_file():
        raise FileNotFoundError(f"there is no weights file {weights_path}; expected a state dict of a {arch}")
    teacher, weights = shared.color_resnet(arch), shared.load_tensors(weights_path, expected)
    try:
        teacher.load_state_dict({name: value.float() for name, value in weights.items()})
    except (RuntimeError, AttributeError) as error:  # other names or shapes; no tensors
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{weights_path} is not {expected}: {reason}") from None
    return teacher


def fold_stem(color_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Fold a colour kernel (O, 3, k, k) and its normalisation into a gray weight and offset (O, 1, k, k).

    A gray value g enters the colour net as (g - mean_c) / std_c in each channel c and the gray net as
    x = (g - GRAY_MEAN) / GRAY_STD, so sum_c w_c (g - mean_c) / std_c = weight * x + offset.
    """
    mean, std = (color_weight.new_tensor(values).reshape(1, 3, 1, 1) for values in (COLOR_MEAN, COLOR_STD))
    weight = (color_weight * GRAY_STD / std).sum(1, keepdim=True)
    offset = (color_weight * (GRAY_MEAN - mean) / std).sum(1, keepdim=True)
    return weight, offset


def build_student(arch: str, teacher: nn.Module, stem_init: str) -> nn.Module:
    """Build the gray net without head; all but the stem is copied from the teacher."""
    student = shared.gray_resnet(arch, num_classes=0)
    weights = {
        name: value for name, value in teacher.state_dict().items() if not name.startswith(("conv1.", "fc."))
    }
    weights |= student.conv1.state_dict(prefix="conv1.")
    if stem_init == "folded":
        weights["conv1.weight"], weights["conv1.offset"] = fold_stem(teacher.conv1.weight.detach())
    student.load_state_dict(weights)
    return student


class ImagePairs:
    """Colour images in memory as uint8 (N, 3, S, S), fed as gray inputs and colour ones, both normalised.

    Like `model.FaceBatches`: what an epoch holds depends on `seed` and its number alone.
    """

    def __init__(self, images: Tensor, batch_size: int, device: torch.device, seed: int):
        self.images, self.device, self.batch_size, self.seed = images, device, batch_size, seed

    def __len__(self) -> int:
        return len(self.images)

    def train(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch's batches, mirrored, moved, scaled: (n, 1, S, S) and (n, 3, S, S)."""
        import torch

        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        for indices in shared.split_batches(torch.randperm(len(self), generator=generator), self.batch_size):
            images = self.images[indices].to(self.device).float() / 255
            size = images.shape[-1]
            yield self._pair(shared.warp(images, size, generator, degrees=0, shift=0.1, zoom=(0.75, 1.25)))

    def eval(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images once, in order, as they are."""
        for images in self.images.split(self.batch_size):
            yield self._pair(images.to(self.device).float() / 255)

    def _pair(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std, luma = (
            images.new_tensor(values).reshape(1, 3, 1, 1) for values in (COLOR_MEAN, COLOR_STD, LUMA)
        )
        gray = (images * luma).sum(1, keepdim=True)
        return (gray - GRAY_MEAN) / GRAY_STD, (images - mean) / std


def compare_embeddings(embeddings: Tensor, targets: Tensor, head: nn.Linear) -> dict[str, float]:
    """Compare embeddings (N, D) with the teacher's: MSE, mean cosine, share of equal top-1 classes."""
    import torch
    import torch.nn.functional as F

    with torch.no_grad():
        same = head(embeddings).argmax(1) == head(targets).argmax(1)
    return {
        "mse": F.mse_loss(embeddings, targets).item(),
        "cosine": F.cosine_similarity(embeddings, targets).mean().item(),
        "agreement": same.float().mean().item(),
    }


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict | None]:
    """Return the options and, with --resume, the checkpoint to go on from."""
    parser = shared.build_parser(__doc__)
    shared.add_options(parser, data_dir="data/imagenet", out_dir="runs/gray")
    add = parser.add_argument
    add("--arch", choices=shared.ARCHS, default="resnet50", help="network")
    weights_help = "local state dict, instead of torchvision's download"
    add("--teacher-weights", type=Path, metavar="FILE", help=weights_help)
    add("--stem-init", choices=("folded", "kaiming"), default="folded", help="how the gray stem starts")
    shared.add_options(
        parser,
        unfreeze=["conv1"],
        image_size=128,
        epochs=5,
        batch_size=16,
        lr=1e-2,
        weight_decay=0.0,
        ema=0.0,
        val_fraction=0.2,
        limit=None,
        seed=0,
        resume=None,
        device="auto",
    )
    return shared.parse_with_resume(parser, argv, stage="gray")


@shared.one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Distil, and print the held-out comparison before and after."""
    shared.join_others(is_quiet=True)
    args, resumed = parse_args(argv)
    import torch
    import torch.nn.functional as F

    torch.manual_seed(args.seed)
    device = shared.pick_device(args.device)
    paths = shared.list_images(args.data_dir, args.limit)
    shared.check_pictures(args.data_dir, paths)
    with shared.only_run_in(args.out_dir):
        teacher = load_teacher(args.arch, args.teacher_weights)
        images, _ = shared.load_images(paths, "RGB", args.image_size)
        student = build_student(args.arch, teacher, args.stem_init)
        student.to(device, memory_format=torch.channels_last)
        shared.freeze_except(student, args.unfreeze)
        head, teacher.fc = teacher.fc, torch.nn.Identity()
        teacher.eval().to(device, memory_format=torch.channels_last)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
        num_val = min(max(round(len(images) * args.val_fraction), 1), len(images) - 1)
        parts = order[num_val:], order[:num_val]
        train, val = (ImagePairs(images[part], args.batch_size, device, args.seed) for part in parts)
        targets, _ = shared.evaluate(teacher, ((colors, gray) for gray, colors in val.eval()))
        run = shared.Run(
            args.out_dir,
            stage="gray",
            arch=args.arch,
            classes=(),
            default_classes=(),
            image_size=args.image_size,
            crop_margin=0.0,
            config=shared.plain_config(vars(args)),
        )
        sizes = {"train": f"{len(train)} images", "val": f"{len(val)} images"}
        run.start(student, device, sizes, resume=resumed)

        def criterion(embeddings: Tensor, colors: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                wanted = teacher(colors.contiguous(memory_format=torch.channels_last))
            return F.mse_loss(embeddings, wanted)

        def validate(net: nn.Module) -> dict[str, float]:
            batches = zip((gray for gray, _ in val.eval()), targets.split(args.batch_size), strict=True)
            return compare_embeddings(*shared.evaluate(net, batches), head)

        score, before = operator.itemgetter("cosine"), validate(student)
        schedule = shared.Schedule(args.epochs, args.lr, args.weight_decay, args.ema)
        history = shared.fit(
            student, criterion, train, validate, score=score, run=run, schedule=schedule, resume=resumed
        )
        best = max(reversed(history), key=score)  # the last of equals, as saved
        print("".join(f"{name:>12}" for name in ("", *before)))
        for title, figures in ((args.stem_init, before), ("distilled", best)):
            print(f"{title:>12}" + "".join(f"{figures[name]:12.4f}" for name in before))
        panels = {"MSE": ["train_loss", "mse"], "agreement with the teacher": ["cosine", "agreement"]}
        shared.plot_history(history, panels, args.out_dir / "curves.png")
        line = f"best epoch {best['epoch']}: cosine {best['cosine']:.4f}; wrote {args.out_dir / 'best.pt'}"
        print(shared.printable(line))


if __name__ == "__main__":
    main()
