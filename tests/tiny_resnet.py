"""A ResNet of a few thousand weights, which the scripts take by the name tiny_resnet beside the real ones.

Training with it takes milliseconds and writes kilobytes. It is there in each process that imports this file.
"""

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import model as shared

REAL_ARCHS = shared.ARCHS
ARCH = "tiny_resnet"
WIDTHS = (4, 8, 8, 16)
FEATURES = WIDTHS[-1]  # inputs of fc


class TinyResNet(nn.Module):
    """torchvision's ResNet with the same children, a block a stage, and hardly any channels."""

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        for number, width in enumerate(WIDTHS, start=1):
            before, stride = (WIDTHS[number - 2], 2) if number > 1 else (WIDTHS[0], 1)
            shortcut = [nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)]
            block = BasicBlock(before, width, stride, nn.Sequential(*shortcut) if number > 1 else None)
            self.add_module(f"layer{number}", nn.Sequential(block))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(FEATURES, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, C, H, W)."""
        maps = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        return self.fc(torch.flatten(self.avgpool(maps), 1))


get_model = torchvision.models.get_model


def get_model_or_tiny(name: str, **config: object) -> nn.Module:
    """Build what torchvision has, or the tiny network, which has random weights only."""
    if name != ARCH:
        return get_model(name, **config)
    assert config.pop("weights", None) is None
    return TinyResNet(**config)


torchvision.models.get_model = get_model_or_tiny
shared.ARCHS = (*REAL_ARCHS, ARCH)
