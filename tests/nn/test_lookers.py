"""What leaves a model as it was, however the look at it ends."""

import pytest
import torch
from torch import nn

from paperworks.nn import keeping_modes, removing


def test_frozen_parts_stay_frozen_and_hooks_go():
    model, seen = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 3)), []
    model[1].eval()
    hooks = [part.register_forward_hook(lambda part, *_: seen.append(part)) for part in model]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), removing(hooks), keeping_modes(model):
        model.eval()(torch.ones(1, 9))
    assert [part.training for part in (model, *model)] == [True, True, False]
    model(torch.ones(1, 2))
    assert seen == [model[0]]  # the layer after it refused its input
