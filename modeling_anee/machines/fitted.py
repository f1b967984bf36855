"""Predictions by a roofline that is fitted to a profile: each variant reaches a share of it, which depends on its rows.

The roofline of the machine is what was measured of it: its bandwidth, and for each variant the most arithmetic that any linear
map reached. Shapes that were not measured are predicted, too.
"""

from ..narrow import whole_of
from .analytic import Analytic
from .description import FLOAT32, PRECISIONS, Description, Sourced
from .prediction import Predicted
from .prices import variant_prices
from .profile import HEAD, MapTimes, Profile, interpolated
from .workload import Kernel


MEASURED = "measured, see its profile"


def described(profile: Profile, energy: Description) -> Description:
    """The description of a machine from its profile; what costs energy is taken from another's."""
    peaks = {name: Sourced(peak, MEASURED) for name, peak in peaks_of(profile).items()}
    per_op = {name: energy.op_pj[energy.precision_of(name, name)] for name in peaks}
    return Description(
        format=energy.format,
        name="this",
        about=f"{profile.machine}, {profile.base}; its energy as that of {energy.name}",
        bandwidth_gb_s=Sourced(profile.bandwidth / 1e6, MEASURED),
        memory_gb=energy.memory_gb,
        launch_us=Sourced(profile.launch_ms * 1e3, MEASURED),
        skip_us=Sourced(0.0, "a layer that is left out is not called"),
        peak_gops=peaks,
        byte_pj=energy.byte_pj,
        op_pj=per_op,
        idle_watts=energy.idle_watts,
    )


def peaks_of(profile: Profile) -> dict[str, float]:
    """The most arithmetic that a linear map reached, by precision, in units of 1e9 operations a second."""
    own = profile.base.rpartition(" ")[2]
    found: dict[str, float] = {}
    for one in profile.maps:
        name = one.variant if one.variant in PRECISIONS else own if own in PRECISIONS else FLOAT32
        reached = max(2.0 * one.outputs * one.inputs * rows / ms for rows, ms in zip(one.rows, one.ms, strict=True)) / 1e6
        found[name] = max(found.get(name, 0.0), reached)
    return found if FLOAT32 in found else found | {FLOAT32: max(found.values())}


def fitted(profile: Profile, machine: Description) -> Predicted:
    """Linear maps by the roofline of a machine and the shares of it that were reached; the rest as it was measured."""
    roof = Analytic(machine, profile.base.rpartition(" ")[2])
    shares = {(variant, head): _shares(profile, roof, variant, head) for variant in profile.variants for head in (False, True)}

    def map_ms(kernel: Kernel, rows: float) -> float:
        variant = whole_of(kernel.variant)
        variant = variant if (variant, False) in shares else profile.variants[0]
        launch, table = shares[variant, kernel.name == HEAD]
        reached = interpolated(list(table), list(table.values()), rows)
        return launch + roof_ms(roof, kernel, rows) / max(reached, 1e-6)

    return Predicted(profile, map_ms)


def roof_ms(roof: Analytic, kernel: Kernel, rows: float) -> float:
    """Of a linear map on the roofline, without its launch."""
    return max(roof.memory_ms(kernel, rows), roof.arithmetic_ms(kernel, rows))


def _shares(profile: Profile, roof: Analytic, variant: str, head: bool) -> tuple[float, dict[int, float]]:
    """The launch of a variant's linear maps, and the share of the roofline that they reach by rows."""
    maps = [one for one in profile.maps if one.variant == variant and (one.name == HEAD) == head]
    launch = min(variant_prices(profile, variant)["launch"], 0.5 * min(one.ms[0] for one in maps))
    table = {}
    for rows in maps[0].rows:
        ideal = sum(roof_ms(roof, _kernel(one), rows) for one in maps)
        table[rows] = ideal / sum(max(one.at(rows) - launch, 1e-9) for one in maps)
    return launch, table


def _kernel(one: MapTimes) -> Kernel:
    return Kernel(one.name, one.variant, one.outputs, one.inputs, one.weight_bytes, 2.0 * one.outputs * one.inputs)
