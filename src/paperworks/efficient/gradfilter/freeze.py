"""Fine-tuning some layers only."""

from collections.abc import Callable, Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from paperworks.errors import UserError, unknown


def freeze_except(model: nn.Module, names: Iterable[str], *, norm_statistics: bool = False) -> Callable[[], None]:
    """Let only the named modules learn, and keep batch norms in evaluation mode (paper, section 4).

    Below the first module that learns, autograd has nothing to do. Batch norms, those in the named modules too, use
    and keep their running statistics from now on, whatever ``model.train()`` says, unless ``norm_statistics``.

    Args:
        model: The model.
        names: Modules whose parameters learn, with all inside them.
        norm_statistics: Let batch norms go on with the statistics of each batch while the model is in training.

    Returns:
        A function that undoes all of it.

    Raises:
        UserError: If a name is no module of the model, or one without parameters.
    """
    modules = dict(model.named_modules())
    learning = set()
    for name in [names] if isinstance(names, str) else names:
        if name not in modules:
            raise unknown("module", name, [known for known in modules if known])
        parameters = list(modules[name].parameters())
        if not parameters:
            raise UserError(f"module {name!r} has no parameters that could learn")
        learning.update(parameters)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(parameter in learning)
    norms = [norm for norm in modules.values() if isinstance(norm, _BatchNorm) and not norm_statistics]
    hooks = [norm.register_forward_pre_hook(_evaluate) for norm in norms]
    for norm in norms:
        norm.eval()

    def undo() -> None:
        for parameter, learned in before:
            parameter.requires_grad_(learned)
        for hook in hooks:
            hook.remove()
        for norm in norms:
            norm.train(model.training)

    return undo


def _evaluate(norm: nn.Module, _: object) -> None:
    norm.eval()
