"""How long a plan takes by a profile: what its linear maps were measured to take, and everything else around them."""

from collections.abc import Callable
from dataclasses import dataclass

from .profile import Profile
from .workload import Kernel, LayerLoad, Workload


PARTS = ("attention maps", "feed-forward maps", "stand-ins", "head", "context", "layers' rest", "token")


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call by what takes them; the keys are `PARTS`, and none is left out."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.parts.values())


MapMs = Callable[[Kernel, float], float]  # a kernel and its rows -> milliseconds


@dataclass(frozen=True)
class Predicted:
    """Predictions by a profile.

    Args:
        profile: what was measured.
        map_ms: of a linear map; default: as its shape was measured, or else by its bytes.
    """

    profile: Profile
    map_ms: MapMs

    @classmethod
    def measured(cls, profile: Profile) -> "Predicted":
        """Linear maps as they were measured."""
        return cls(profile, profile.ms_of)

    def decode(self, load: Workload, batch: int, context: int) -> Times:
        """One token of every row.

        Args:
            load: what the plan runs.
            batch: rows.
            context: tokens before, of each row.
        """
        profile, attending = self.profile, sum(bool(layer.attention) for layer in load.layers)
        rest = sum(_rest(layer, lambda variant: profile.layer_ms(variant, batch)) for layer in load.layers)
        parts = self._maps(load, batch) | {"head": self.map_ms(load.head, batch), "layers' rest": rest}
        parts["context"] = attending * context * profile.context_ms(batch)
        return Times({name: (parts | {"token": profile.token_ms(batch)})[name] for name in PARTS})

    def prefill(self, load: Workload, batch: int, tokens: int) -> Times:
        """Prompts of so many tokens each, and the logits of their last ones."""
        profile, rows = self.profile, batch * tokens
        attending = sum(bool(layer.attention) for layer in load.layers)
        rest = sum(_rest(layer, lambda variant: profile.prompt_layer_ms(variant, rows)) for layer in load.layers)
        parts = self._maps(load, rows) | {"head": self.map_ms(load.head, batch), "layers' rest": rest}
        parts["context"] = attending * batch * profile.prompt_attention_ms(tokens)
        return Times({name: (parts | {"token": profile.forward_ms(rows)})[name] for name in PARTS})

    def _maps(self, load: Workload, rows: float) -> dict[str, float]:
        found = dict.fromkeys(PARTS[:3], 0.0)
        for layer in load.layers:
            for name, kernels in zip(PARTS, (layer.attention, layer.feed_forward, layer.stand_in), strict=False):
                found[name] += sum(self.map_ms(kernel, rows) for kernel in kernels)
        return found


def _rest(layer: LayerLoad, ms: Callable[[str], float]) -> float:
    """Of a layer besides its maps: half of it for each half that runs."""
    halves = [half[0].variant for half in (layer.attention, layer.feed_forward) if half]
    return sum(ms(variant) / 2 for variant in halves)
