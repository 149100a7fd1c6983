"""Networks against the published numbers of parameters."""

from __future__ import annotations

import pytest
import torch

from benchmarks.paper.models import FLAT, MODELS, ModelSpec, make
from benchmarks.paper.models.densenet import DenseNet
from benchmarks.paper.models.resnet import CIFARResNet


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters"),
    [
        ("resnet20", 10, 0.27e6),  # He et al. (2016), table 6
        ("resnet56", 10, 0.85e6),
        ("resnet18-imagenet", 1000, 11_689_512),  # torchvision's
        ("resnet34-imagenet", 1000, 21_797_672),  # torchvision's
        ("densenet100", 10, 769_162),  # Huang et al. (2017), table 2: 0.8 million; exactly, in the authors' repository
        ("resnet18", 10, 11_173_962),  # the usual variant for CIFAR of the ImageNet network
        ("resnet34", 100, 21_328_292),
    ],
)
def test_published_numbers_of_parameters(name, num_classes, parameters):
    model = make(ModelSpec(name), num_classes, 3)
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(parameters, rel=0.01 if parameters < 1e6 and parameters % 1000 == 0 else 0)


@pytest.mark.parametrize("name", MODELS)
def test_channels_and_width_are_options(name):
    torch.manual_seed(0)
    model = make(ModelSpec(name, width=4), 7, 1)
    size = 64 if name.endswith("imagenet") else 16
    logits = model(torch.randn(2, 1, size, 2 * size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", FLAT)
def test_networks_of_one_dimension_are_the_others_on_images_of_height_1(name):
    torch.manual_seed(0)
    flat, model = make(ModelSpec(name, 4), 5, 3, flat=True).eval(), make(ModelSpec(name, 4), 5, 3).eval()
    middle = {
        key: value[:, :, 1:2] if value.shape[2:] == (3, 3) else value for key, value in model.state_dict().items()
    }
    flat.load_state_dict(middle)
    images = torch.randn(2, 3, 1, 12)
    torch.testing.assert_close(flat(images), model(images))


def test_depths_are_checked():
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 2 .*got 18"):
        CIFARResNet(18, 10)
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 4 .*got 99"):
        DenseNet(99, 10)
    with pytest.raises(ValueError, match="stem for ImageNet is not for images of height 1"):
        make(ModelSpec("resnet18-imagenet", 4), 10, 3, flat=True)
