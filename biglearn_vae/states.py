"""Networks and tokenizers as tensors and plain values: what makes another one, and its weights."""

from typing import Any, TypeVar

import torch
from torch import nn

Part = TypeVar("Part", bound=nn.Module)


def of(part: nn.Module) -> dict[str, Any]:
    """For `rebuilt`: a module's `sizes`, the arguments that make another one, and its weights, copied to the CPU."""
    return {"sizes": part.sizes, "weights": weights_of(part)}


def weights_of(part: nn.Module) -> dict[str, torch.Tensor]:
    """A module's weights, copied to the CPU."""
    return {name: value.detach().cpu().clone() for name, value in part.state_dict().items()}


def rebuilt(kind: type[Part], state: dict[str, Any], **sizes: Any) -> Part:
    """Make the module that `of` described, frozen, in evaluation mode, with weights of the same precision.

    Args:
        kind: the class of the module.
        sizes: arguments in which it is to differ.

    Raises:
        ValueError: if `state` is not such a description.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced
            part = kind(**state["sizes"] | sizes)
        part.load_state_dict(state["weights"], assign=True)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:  # the third if weights are not a dictionary
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"expected the state of a {kind.__name__}, sizes and weights: {reason}") from None
    return part.requires_grad_(False).eval()
