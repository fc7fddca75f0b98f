"""Measure what feeding the net costs, and what bfloat16 saves: images/s of training in three ways.

Whole is `model.fit` on faces in memory; bare is forward, backward and optimizer step on one fixed batch, as
the device does it best and in float32. They take turns, so that a change of the machine's mood meets all.

Usage: python tests/benchmark_training.py [--arch resnet50_v1] [--steps 12] [--repeats 5]
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import model as shared


def time_bare_steps(
    net: torch.nn.Module, inputs: Tensor, labels: Tensor, steps: int, *, in_float32: bool = False
) -> float:
    """Train on one batch again and again; return images/s."""
    optimizer = shared.build_optimizer(net, weight_decay=0.05)
    shared.train_mode(net)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    start = time.perf_counter()
    for _ in range(steps):
        with contextlib.nullcontext() if in_float32 else shared.autocast(inputs.device):
            loss = F.cross_entropy(net(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
    return steps * len(inputs) / (time.perf_counter() - start)


def time_whole_loop(net: torch.nn.Module, data: shared.FaceBatches) -> float:
    """Train an epoch with the loop of the stages; return images/s, without validation and saving."""
    with tempfile.TemporaryDirectory() as folder:
        [record] = shared.fit(
            net,
            F.cross_entropy,
            data,
            lambda net: {"val_acc": 0.0},
            score=lambda record: record["val_acc"],
            run=shared.Run(Path(folder), "fer", "", (), (), data.image_size, 0.0, {}),
            schedule=shared.Schedule(epochs=1, lr=3e-4, weight_decay=0.05),
        )
    return record["images_per_s"]


def main() -> None:
    """Print a line each repeat, medians, and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=shared.ARCHS, default="resnet50_v1")
    parser.add_argument("--image-size", type=int, default=shared.IMAGE_SIZE)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    shared.add_options(parser, device="auto")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = shared.pick_device(args.device)
    net = shared.gray_resnet(args.arch, 5).to(device, memory_format=torch.channels_last)
    faces = torch.randint(0, 256, (args.steps * args.batch_size, 1, 48, 48), dtype=torch.uint8)
    labels = torch.randint(0, 5, (len(faces),))
    data = shared.FaceBatches(faces, labels, args.batch_size, args.image_size, device)
    batch = next(data.train(0))
    time_bare_steps(net, *batch, steps=3)  # warm-up
    turns = []
    for _ in range(args.repeats):
        in_float32 = time_bare_steps(net, *batch, args.steps, in_float32=True)
        turns.append((time_bare_steps(net, *batch, args.steps), time_whole_loop(net, data), in_float32))
        print(
            "bare {:.1f} images/s, whole {:.1f} images/s, bare in float32 {:.1f} images/s".format(*turns[-1])
        )
    bare, whole, in_float32 = (statistics.median(side) for side in zip(*turns, strict=True))
    share = statistics.median(1 - whole / bare for bare, whole, _ in turns)
    ratio = statistics.median(bare / in_float32 for bare, _, in_float32 in turns)
    print(
        f"median: bare {bare:.1f}, whole {whole:.1f} images/s; feeding costs {share:.1%} of the loop; "
        f"float32 {in_float32:.1f} images/s, {ratio:.2f} times as slow"
    )
    machine = {"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(
        json.dumps(
            {
                **vars(args),
                **machine,
                "bare": bare,
                "whole": whole,
                "feeding_share": share,
                "float32": in_float32,
            }
        )
    )


if __name__ == "__main__":
    main()
