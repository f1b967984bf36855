"""A fingerprint of a base's weights, to notice a base that the controllers were not made for.

It samples one weight of each of many tensors, so it takes milliseconds for a base of any size. Weights are compared as
bfloat16: most must be equal and all within one unit, so the same weights in another floating dtype have the same
fingerprint, while a fine-tuned copy has not.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .base_packed import is_ordinary, is_packed, shape


SAMPLED_TENSORS = 96
EQUAL_SHARE = 0.75  # of the samples; a cast by way of another dtype changes hardly any
TOLERANCE = 2.0**-7  # one unit in the last place of bfloat16, relative
UNDERFLOW = 2.0**-14  # smallest normal number of float16
MISSING = "none"  # a weight that is not in memory, or can't be read as a number


def fingerprint(base: nn.Module) -> str:
    """`"<hash of names and shapes>-<sampled weights, four hex digits each>"`."""
    weights = list(_weights(base))
    shapes = [(name, size) for name, size, _ in weights]
    digest = hashlib.sha256(repr([type(base).__name__, shapes]).encode()).hexdigest()[:16]
    count = min(SAMPLED_TENSORS, len(weights))
    sampled = [weights[i * (len(weights) - 1) // max(count - 1, 1)][2] for i in range(count)]
    samples = "".join(_sample(weight, number) for number, weight in enumerate(sampled))
    return f"{digest}-{samples}"


def same_base(first: str, second: str) -> bool:
    """Whether two fingerprints can be of the same weights."""
    if not first or not second:
        return True
    (digest, samples), (other_digest, other_samples) = first.split("-"), second.split("-")
    if digest != other_digest or len(samples) != len(other_samples):
        return False
    words = zip(_words(samples), _words(other_samples), strict=True)
    pairs = torch.tensor([[_value(a), _value(b)] for a, b in words if MISSING not in (a, b)], device="cpu").reshape(-1, 2)
    size, difference = pairs.abs().amax(dim=1), (pairs[:, 0] - pairs[:, 1]).abs()
    equal = (difference == 0) | (size < UNDERFLOW)
    close = difference <= TOLERANCE * size + UNDERFLOW
    return bool(close.all()) and int(equal.sum()) >= EQUAL_SHARE * len(pairs)


def short(value: str) -> str:
    """A fingerprint for people: eight digits that stand for names and shapes, eight that stand for weights."""
    digest, _, samples = value.partition("-")
    return f"{digest[:8]}-{hashlib.sha256(samples.encode()).hexdigest()[:8]}"


def difference(first: str, second: str) -> str:
    """What two fingerprints of different bases differ in, in words."""
    (digest, _, samples), (other_digest, _, other_samples) = first.partition("-"), second.partition("-")
    if digest != other_digest or len(samples) != len(other_samples):
        return "names or shapes of weights differ"
    words = list(zip(_words(samples), _words(other_samples), strict=True))
    return f"{sum(a != b for a, b in words)} of {len(words)} sampled weights differ"


def _weights(base: nn.Module) -> Iterator[tuple[str, tuple[int, ...], Tensor | None]]:
    """Name and shape of every weight, and the weight, if it can be read; a packed linear map counts as what it was made of."""
    seen: set[int] = set()
    tied = getattr(base, "all_tied_weights_keys", {})  # a head that was packed is no longer the embeddings
    for path, module in base.named_modules():
        if id(module) in seen:
            continue
        if is_packed(module):
            seen.update(map(id, module.modules()))
            if f"{path}.weight" not in tied:
                yield f"{path}.weight", shape(module), None
            if _has_bias(module):
                yield f"{path}.bias", shape(module)[:1], None
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{name}".removeprefix("."), tuple(parameter.shape), parameter


def _has_bias(module: nn.Module) -> bool:
    bias = getattr(module, "bias", None)  # torch's own quantised layers have a method of that name
    return (bias() if callable(bias) else bias) is not None


def _sample(weight: Tensor | None, number: int) -> str:
    """One weight, from a place that differs between tensors, as four hex digits of bfloat16."""
    if weight is None or weight.is_meta or not is_ordinary(weight):
        return MISSING
    place = [(size * (2 * number + 1) // (2 * SAMPLED_TENSORS)) % size for size in weight.shape]
    value = weight.detach()[tuple(place)].to("cpu", torch.bfloat16)
    return f"{int(value.view(torch.int16)) & 0xFFFF:04x}"


def _words(samples: str) -> list[str]:
    return [samples[i : i + 4] for i in range(0, len(samples), 4)]


def _value(word: str) -> float:
    return float(torch.tensor(int(word, 16), dtype=torch.uint16, device="cpu").view(torch.bfloat16))
