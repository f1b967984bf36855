"""Made-up machines: profiles as if linear maps took what bytes, arithmetic and calls cost."""

from modeling_anee.machines.profile import FORMAT, DecodeTimes, MapTimes, Profile, PromptTimes
from modeling_anee.machines.workload import Counter, attention_kernels, feed_forward_kernels


ROWS = [1, 2, 4, 8, 32]
BYTES, FLOPS, LAUNCH = 1e4, 1e6, 0.01  # in a millisecond; of a call
VARIANTS = ("full", "int8", "int4")


def map_ms(kernel, rows: float) -> float:
    """Milliseconds of a linear map on the made-up machine."""
    return LAUNCH + max(kernel.weight_bytes / BYTES, kernel.flops * rows / FLOPS)


def profile_of(model) -> Profile:
    """The profile of that machine for a model's base."""
    stack, maps = model.stack, []
    for variant in VARIANTS:
        block = stack.blocks_of(variant)[0]
        kernels = [
            *attention_kernels(block, variant),
            *feed_forward_kernels(block, variant),
            Counter(stack, None).head(variant),
        ]
        maps += [
            MapTimes(one.name, variant, one.outputs, one.inputs, one.weight_bytes, ROWS, [map_ms(one, rows) for rows in ROWS])
            for one in kernels
        ]
    rest = dict.fromkeys(VARIANTS, 0.02)
    return Profile(
        format=FORMAT,
        machine="made up",
        base="tiny",
        kv_bytes=float(stack.blocks[0].kv_bytes),
        made="2026-01-01",
        seconds=1.0,
        bandwidth=BYTES,
        launch_ms=LAUNCH,
        gathering_ms=0.001,
        maps=maps,
        decode=[DecodeTimes(batch, 0.5 + 0.1 * batch, 1e-4 * batch, rest) for batch in (1, 4)],
        prompts=[PromptTimes(tokens, 0.3, 1e-4 * tokens**2, rest) for tokens in (8, 32)],
    )
