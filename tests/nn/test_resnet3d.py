from functools import partial

import pytest
import torch
from torchvision.models.video.resnet import BasicBlock, BasicStem, Bottleneck, Conv3DSimple, VideoResNet

from paperworks.errors import UserError
from paperworks.nn.resnet3d import resnet3d, thin


@pytest.mark.parametrize(("depth", "block", "layers"), [(18, BasicBlock, [2, 2, 2, 2]), (50, Bottleneck, [3, 4, 6, 3])])
def test_the_full_width_is_torchvisions_network(depth, block, layers):
    ours = resnet3d(depth, num_classes=7)
    theirs = VideoResNet(block, [Conv3DSimple] * 4, layers, BasicStem, num_classes=7)
    weights = list(theirs.state_dict().values())
    ours.load_state_dict(dict(zip(ours.state_dict(), weights, strict=True)))
    clips = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(ours.eval()(clips), theirs.eval()(clips), atol=1e-5)


@pytest.mark.parametrize("depth", [10, 34, 101])
def test_width_and_channels(depth):
    network = resnet3d(depth, 4, 5, in_channels=1).eval()
    with torch.no_grad():
        assert network(torch.zeros(2, 1, 6, 12, 12)).shape == (2, 5)


def test_gradients_reach_every_weight():
    network = resnet3d(10, 4, 5, in_channels=1)
    network(torch.randn(4, 1, 6, 12, 12)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_thin_keeps_a_share_of_the_channels():
    quarter = thin(partial(resnet3d, 50))(num_classes=3)
    assert quarter.stem[0].out_channels == 16
    assert quarter.head[-1].in_features == 16 * 8 * 4
    assert thin(partial(resnet3d, 10, width=8), 0.01)(num_classes=3).stem[0].out_channels == 1
    weights = sum(p.numel() for p in quarter.parameters())
    assert weights < sum(p.numel() for p in resnet3d(50, num_classes=3).parameters()) / 14


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resnet3d(20), "depth must be one of 10, 18, 34, 50, 101, 152, got 20"),
        (lambda: resnet3d(18, 0), "width must be at least 1, got 0"),
        (lambda: resnet3d(18, num_classes=0), "num_classes must be at least 1"),
        (lambda: thin(resnet3d, 0.0), "width must be positive"),
        (lambda: thin(lambda num_classes: None), "width with a default"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(UserError, match=message):
        make()
