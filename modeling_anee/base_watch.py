"""What a base was when it was taken apart, and one cheap look at whether it still is.

A wrapped base is run by its parts. Some of its modules are *called*, some are *stood in for* (their weights are used
directly, where nothing of theirs would be missed), and what holds them (the causal LM itself, its decoder, the layers, their
attention) is *bypassed*: it never runs. Code that somebody put on a bypassed module would be lost, so it is refused.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn


LIBRARIES = ("torch.nn.", "transformers.")  # whose forwards we know
CAPTURING = "transformers.utils.output_capturing"  # its hooks only look on, while the base's own forward runs
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_is_trained, _version = attrgetter("requires_grad"), attrgetter("_version")


def foreign_code(module: nn.Module) -> str | None:
    """What would not run if others did the work of `module`; None where nothing would be missed."""
    hooks = chain.from_iterable(getattr(module, name).values() for name in HOOKS)
    if any(getattr(hook, "__module__", None) != CAPTURING for hook in hooks):
        return "a hook"
    own = vars(module)
    forward = own.get("forward")
    if "_hf_hook" in own:
        if not _only_aligns(own["_hf_hook"]):
            return f"accelerate's {type(own['_hf_hook']).__name__}"
        forward = own["_old_forward"]
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        return "a forward of its own"
    if not type(module).forward.__module__.startswith(LIBRARIES):
        return f"the class {type(module).__name__}, which is not of transformers,"
    return None


def _only_aligns(hook: Any) -> bool:
    """Whether a hook of accelerate does nothing but bring inputs to the device where a module runs."""
    if type(hook).__name__ == "SequentialHook":
        return all(_only_aligns(part) for part in hook.hooks)
    return type(hook).__name__ == "AlignDevicesHook" and not (hook.offload and hook.place_submodules)


def is_untouched(module: nn.Module) -> bool:
    """Whether `module` may be stood in for: nothing of it would be missed, and its weights stay where they are."""
    return "_hf_hook" not in vars(module) and foreign_code(module) is None


def bypassed_modules(module: nn.Module, called: Collection[nn.Module], path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`module` and what is inside it, by path, short of what is `called`."""
    if module in called:
        return
    yield path, module
    for name, child in module.named_children():
        yield from bypassed_modules(child, called, f"{path}.{name}" if path else name)


def check_bypassed(base: nn.Module, called: Collection[nn.Module]) -> list[nn.Module]:
    """The modules of `base` that never run, since only those in `called` do.

    Raises:
        ValueError: one of them has a hook, or a forward that its library does not know; names its path.
    """
    found = list(bypassed_modules(base, called))
    for path, module in found:
        if what := foreign_code(module):
            raise ValueError(
                f"the base has {what} at {path or 'its top'!r}, a module that is never called, since the parts inside it are "
                "run one by one: take it off, or put it on a projection, norm or feed-forward, which do run"
            )
    return [module for _, module in found]


class Watch:
    """A record of a base, made when it is taken apart.

    It holds what can become other: modules at their places, hooks and forwards that are put on them, parameters (which they
    are, where their numbers lie, whether they are trained) and the configuration. What happens inside a module that is called
    is its own affair.

    Args:
        base: the causal LM.
        bypassed: modules whose parts are run in their stead.
        parts: modules that are called or stood in for.
    """

    def __init__(self, base: Any, bypassed: Sequence[nn.Module], parts: Sequence[nn.Module]) -> None:
        self._base = base
        self._config, self._fields = base.config, dict(vars(base.config))
        modules = {id(module): module for module in chain(bypassed, parts)}.values()
        self._own = [vars(module) for module in modules]
        self._forwards = [own.get("forward") for own in self._own]
        self._hooks = [own[name] for own in self._own for name in HOOKS]
        self._hook_counts = list(map(len, self._hooks))
        # Parameters that accelerate keeps elsewhere come and go with every call.
        resident = [module._parameters for module in parts if "_hf_hook" not in vars(module)]
        self._places: list[dict] = [*(module._modules for module in bypassed), *resident]
        self._members = self._look()
        self._weights = [member for member in self._members if type(member) is nn.Parameter and member.layout == torch.strided]
        self._pointers = list(map(Tensor.data_ptr, self._weights))
        self._trained = list(map(_is_trained, self._weights))
        self._counted = [weight for weight in self._weights if not weight.is_inference()]  # those count how often they changed
        self._versions = list(map(_version, self._counted))

    def written(self) -> bool:
        """Whether the numbers of a weight were written over in place; what goes by its `data` is not seen."""
        return list(map(_version, self._counted)) != self._versions

    def _look(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._places)))

    def changed(self) -> bool:
        """Whether anything is other than it was. A tenth of a millisecond for 30 layers: all loops run in C."""
        members = self._look()
        return not (
            len(members) == len(self._members)
            and all(map(is_, members, self._members))
            and list(map(Tensor.data_ptr, self._weights)) == self._pointers
            and list(map(_is_trained, self._weights)) == self._trained
            and list(map(len, self._hooks)) == self._hook_counts
            and all(map(is_, map(dict.get, self._own, repeat("forward")), self._forwards))
            and self._base.config is self._config
            and vars(self._config) == self._fields
        )
