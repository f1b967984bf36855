"""Linear maps of a frozen layer, applied with as few kernels as possible.

Projections that share an input run as one: their weights are moved into one storage, of which the base's own
parameters become views, so memory, values and `state_dict` stay the same. A module that must run itself
(quantised, offloaded, hooked, trained) is simply called. All this is settled when a map is made: calls check nothing.
"""

from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .actions import FULL
from .base_dropped import DroppedLinear
from .base_kernels import LinearKernel
from .base_packed import is_ordinary
from .base_variants import VARIANTS, LinearMap, Variant
from .base_watch import is_untouched


def is_plain(module: Any) -> bool:
    """Whether `module` is a linear map whose frozen weights are present and unhooked, so they may be used directly."""
    if not (type(module) in (nn.Linear, Conv1D) or _is_plain_falcon(module)) or not is_untouched(module):
        return False
    present = [weight for weight in (module.weight, module.bias) if weight is not None]
    return all(is_ordinary(weight) and not weight.is_meta and not weight.requires_grad for weight in present)


def _is_plain_falcon(module: nn.Module) -> bool:
    # With a bias, falcon's own linear class rounds twice in half precision, which one kernel would not.
    return type(module).__name__ == "FalconLinear" and module.bias is None


def out_features(module: Any) -> int:
    """Output width of a linear-like module.

    Raises:
        ValueError: it has none.
    """
    width = module.nf if isinstance(module, Conv1D) else getattr(module, "out_features", None)
    if width is None:
        raise ValueError(f"a projection of the class {type(module).__name__} is not supported: it says no out_features")
    return width


def readable_weight(module: Any, variant: Variant) -> torch.Tensor:
    """The weight [out, in] of a linear map of which a variant needs a part.

    Raises:
        ValueError: it may not be read.
    """
    if not is_plain(module):
        raise ValueError(f"variant {variant.name!r} is not possible: the weights of a {type(module).__name__} may not be read")
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


class JointLinear:
    """Linear modules that share an input: [..., in] -> [..., sum of their outputs].

    Made anew after the base was moved, cast or otherwise changed.

    Args:
        modules: of the base.
        variant: what they run in.
        directions: of the inputs, [rank, in], along which what the variant loses is added again.
        outputs: places of those that are computed, int64 [n]; None: all.
        inputs: places of those that are given, int64 [n]; None: all.

    Raises:
        ValueError: a part is asked of modules whose weights may not be read.
    """

    def __init__(
        self,
        modules: list[Any],
        variant: Variant = VARIANTS[FULL],
        directions: torch.Tensor | None = None,
        outputs: torch.Tensor | None = None,
        inputs: torch.Tensor | None = None,
    ) -> None:
        self.modules, self.variant, self.inputs = modules, variant, inputs
        self._ends = list(accumulate(out_features(module) for module in modules))
        joined = self._join()
        self._part_bytes: int | None = None  # of a part of the modules' own weights
        self.kept = 1.0  # share of the weights
        if joined is None and not (outputs is None and inputs is None):
            raise ValueError(f"variant {variant.name!r} is not possible: weights of this base may not be read")
        # None: the modules run themselves.
        self._whole: LinearMap | None = None if joined is None else self._made(*joined, directions, outputs, inputs)
        self._parts: dict[tuple[int, int | None], LinearMap] = {}
        if short := getattr(self._whole, "row", None):
            self.row = short  # type: ignore[method-assign]

    @property
    def out_features(self) -> int:
        """Width of all outputs."""
        return self._ends[-1]

    @property
    def runs_modules(self) -> bool:
        """Whether the modules are called, not stood in for."""
        return self._whole is None

    @property
    def maps(self) -> list[LinearMap]:
        """What was made: the whole map and parts of it."""
        return [] if self._whole is None else [self._whole, *self._parts.values()]

    def __call__(self, x: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Outputs `start:stop` of all; only those are computed, where the modules allow it."""
        if self._whole is None:
            return self._call_modules(x, start, self._ends[-1] if stop is None else stop)
        if start == 0 and stop is None:
            return self._whole(x)
        return self._part(self._whole, start, stop)(x)

    def row(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs [out] of one row [in], a new tensor; without gradients."""
        return self(x.unsqueeze(0)).view(-1)

    def share(self, start: int, stop: int | None = None) -> float:
        """Share of all work that outputs `start:stop` need: a module that runs itself runs whole."""
        stop = self._ends[-1] if stop is None else stop
        needed, begin = 0, 0
        for end in self._ends:
            overlap = max(min(stop, end) - max(start, begin), 0)
            needed += (end - begin) * (overlap > 0) if self.runs_modules else overlap
            begin = end
        return needed / self._ends[-1]

    def forget(self) -> None:
        """Let what was made go; what it cost stays known."""
        if self._whole is not None:
            gone = DroppedLinear(self._whole.weight_bytes)
            self._whole, self._parts, self.row = gone, {}, gone.row  # type: ignore[method-assign]

    @property
    def weight_bytes(self) -> int | None:
        """Bytes of weights that one call reads; None: those of the modules' own parameters."""
        own = None if self._whole is None else self._whole.weight_bytes
        if own is None and self._part_bytes is not None:
            return self._part_bytes + getattr(self._whole, "extra_bytes", 0)
        return own

    @property
    def extra_flops(self) -> float:
        """Floating point operations of one call besides those of the modules."""
        return getattr(self._whole, "extra_flops", 0.0)

    def _part(self, whole: LinearMap, start: int, stop: int | None) -> LinearMap:
        """The map to outputs `start:stop`."""
        if (start, stop) not in self._parts:
            self._parts[start, stop] = whole.rows(start, stop)
        return self._parts[start, stop]

    def _call_modules(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        outputs, begin = [], 0
        for module, end in zip(self.modules, self._ends, strict=True):
            if begin < stop and end > start:
                outputs.append(module(x)[..., max(start - begin, 0) : min(stop, end) - begin])
            begin = end
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _made(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        directions: torch.Tensor | None,
        outputs: torch.Tensor | None,
        inputs: torch.Tensor | None,
    ) -> LinearMap:
        """The map of a weight [out, in] and a bias [out], or of a part of them."""
        if outputs is None and inputs is None:
            return self.variant.map_of(weight, bias, directions)
        size = weight.numel()
        if outputs is not None:
            weight, bias, self._ends = weight[outputs], None if bias is None else bias[outputs], [len(outputs)]
        self.kept = weight.numel() / size if inputs is None else len(weight) * len(inputs) / size
        self._part_bytes = weight.element_size() * round(self.kept * size) + (0 if bias is None else bias.nbytes)
        if inputs is None:
            return self.variant.map_of(weight, bias, directions)
        return self.variant.map_of_part(weight, bias, inputs, directions)

    @torch.inference_mode(False)  # else joining in inference mode would make the base's parameters unfit for training
    @torch.no_grad()
    def _join(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Weight [out, in] and bias [out] of all modules, None when they run themselves."""
        first = self.modules[0]
        if len(self.modules) == 1 and is_plain(first):
            return readable_weight(first, self.variant), first.bias
        if not self._can_join():
            return None
        weight = _share_storage([module.weight for module in self.modules])
        return weight, None if first.bias is None else _share_storage([module.bias for module in self.modules])

    def _can_join(self) -> bool:
        first = self.modules[0]
        return all(
            is_plain(module)
            and not isinstance(module, Conv1D)
            and module.weight.dtype == first.weight.dtype
            and module.weight.device == first.weight.device
            and (module.bias is None) == (first.bias is None)
            for module in self.modules
        )


class GroupedLinear(JointLinear):
    """One linear module whose outputs come in groups: [..., in] -> [..., groups, outputs of a group]."""

    def __init__(
        self, module: nn.Module, groups: int, variant: Variant = VARIANTS[FULL], directions: torch.Tensor | None = None
    ) -> None:
        super().__init__([module], variant, directions)
        self.groups = groups

    def __call__(self, x: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Outputs `start:stop` of every group; only those are computed, where the module allows it."""
        whole = self._whole
        if not isinstance(whole, LinearKernel) or (start == 0 and stop is None):
            return super().__call__(x).unflatten(-1, (self.groups, -1))[..., start:stop]
        # A strided view of the weight, one matrix per group: nothing is copied.
        weight = whole.weight.unflatten(0, (self.groups, -1))[:, start:stop].mT  # [groups, in, outputs]
        inputs = x.reshape(1, -1, x.shape[-1]).expand(self.groups, -1, -1)  # [groups, N, in]
        if whole.bias is None:
            out = torch.bmm(inputs, weight)
        else:
            out = torch.baddbmm(whole.bias.unflatten(0, (self.groups, 1, -1))[..., start:stop], inputs, weight)
        return out.transpose(0, 1).unflatten(0, x.shape[:-1])

    def share(self, start: int, stop: int | None = None) -> float:
        """Share of all work that outputs `start:stop` of every group need."""
        size = self.out_features // self.groups
        return 1.0 if self.runs_modules else (min(size if stop is None else stop, size) - start) / size


def _share_storage(parameters: list[nn.Parameter]) -> torch.Tensor:
    """Move parameters of shape [out_i, ...] into one tensor [sum of out_i, ...]; they become views of it.

    Where they are that already, since another wrapper holds the same base, nothing is moved.
    """
    first = parameters[0].data
    total = sum(len(parameter) for parameter in parameters)
    if _are_adjacent(parameters):
        return first.as_strided((total, *first.shape[1:]), first.stride())
    joint = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, joint.split([len(p) for p in parameters]), strict=True):
        parameter.data = part
    return joint


def _are_adjacent(parameters: list[nn.Parameter]) -> bool:
    """Whether parameters follow each other in one storage."""
    storage, place = parameters[0].untyped_storage().data_ptr(), parameters[0].data_ptr()
    for parameter in parameters:
        if not parameter.is_contiguous() or parameter.untyped_storage().data_ptr() != storage or parameter.data_ptr() != place:
            return False
        place += parameter.numel() * parameter.element_size()
    return True
