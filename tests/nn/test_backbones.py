import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paperworks.errors import UserError
from paperworks.nn.backbones import CifarResNet, ConvNet, mlp


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_mlp_takes_images_and_has_the_parameters_of_its_layers():
    model = mlp(64, (32, 16), 10)
    assert model(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    assert parameters(model) == 65 * 32 + 33 * 16 + 17 * 10
    assert parameters(mlp(64, (), 10)) == 65 * 10


def test_convnet_averages_maps_of_a_quarter_of_the_side():
    model = ConvNet(1, 10)
    images = torch.rand(3, 1, 8, 8)
    assert model.features(images).shape == (3, 64, 2, 2)
    assert model(images).shape == (3, 10)
    convolutions = 9 * (1 * 16 + 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64)
    assert parameters(model) == convolutions + 2 * (16 + 16 + 32 + 32 + 64) + 65 * 10


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (32, 464_154), (56, 853_018)])
def test_resnet_has_the_published_number_of_parameters(depth, count):
    assert parameters(CifarResNet(depth)) == count


@pytest.mark.parametrize(("model", "channels"), [(CifarResNet(8, 4, 2, 5), 16), (ConvNet(2, 5), 64)])
def test_logits_are_the_mean_of_the_class_activation_maps(model, channels):
    model.eval()
    images = torch.rand(2, 2, 16, 16)
    maps = model.features(images)
    assert maps.shape == (2, channels, 4, 4)
    activation = torch.einsum("bfhw,cf->bchw", maps, model.classifier.weight)
    torch.testing.assert_close(model(images), activation.mean((-2, -1)) + model.classifier.bias)


def test_a_block_without_residual_is_its_shortcut():
    model = CifarResNet(8, 4, num_classes=3).eval()
    first, second = model.body[3], model.body[4]
    for block in (first, second):
        nn.init.zeros_(block.residual[-1].weight)  # the last batch norm's scale
    x = torch.rand(2, 4, 8, 8)
    torch.testing.assert_close(first(x), x)
    torch.testing.assert_close(second(x)[:, :4], x[..., ::2, ::2])
    assert second(x)[:, 4:].abs().max() == 0


@pytest.mark.parametrize("model", [mlp(64, (32,), 4), ConvNet(1, 4), CifarResNet(8, 8, 1, 4)])
def test_every_backbone_learns_four_images_by_heart(model):
    torch.manual_seed(0)
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert F.cross_entropy(model(images), labels) < 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlp(0, (8,), 2), "in_features must be at least 1, got 0"),
        (lambda: mlp(4, (8, 0), 2), "hidden must be at least 1, got 0"),
        (lambda: ConvNet(1, 0), "num_classes must be at least 1"),
        (lambda: ConvNet(1, 2, (8, 8), (1,)), "strides must be as many as widths, got 1 and 2"),
        (lambda: ConvNet(1, 2, (), ()), "widths must be at least 1"),
        (lambda: CifarResNet(18), r"depth must be 6 n \+ 2"),
        (lambda: CifarResNet(2), r"depth must be 6 n \+ 2"),
    ],
)
def test_bad_sizes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
