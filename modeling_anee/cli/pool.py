"""Verbs over several models: `anee pool make`, `measure`, `generate` and `rules`."""

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from transformers.utils import logging

from ..checks import check_budget
from ..data.progress import progress, waiting
from ..evaluation.energy import EnergyMeter
from ..machines.energy import EnergyModel
from ..timing import now
from .console import Output, check_file, check_picture, deliver, extra_libraries, say
from .generation import read_prompt
from .guard import guarded
from .model import check_device, check_dtype, energy_model
from .options import DeviceOption, DtypeOption, EnergyOption, FiguresOption
from .texts import check_text_option


if TYPE_CHECKING:
    from ..pool.examples import Example

pool = typer.Typer(no_args_is_help=True, help="Several models, of which a policy lets one serve each request.")
PoolArgument = Annotated[str, typer.Argument(metavar="POOL", help="Folder with an anee-pool.json, or a Hub name.")]
TextsOption = Annotated[
    list[Path],
    typer.Option("--text", help="Repeatable: lines of a text, or JSON lines of question and answer (.jsonl)."),
]
ExamplesOption = Annotated[int, typer.Option("--limit", min=2, help="So many examples of each text, evenly spread.")]


def make(
    folder: Annotated[Path, typer.Argument(help="Where anee-pool.json goes; made if it is not there.")],
    rung: Annotated[
        list[str],
        typer.Option(help="NAME=MODEL, NAME=MODEL@BUDGET, NAME=ARTIFACT@BUDGET! (no token above it), NAME=BASE@PLAN."),
    ],
    text: TextsOption,
    limit: ExamplesOption = 40,
    prices: Annotated[
        str, typer.Option(help="Loss that the dearest rung's work is worth: for each, learned and mixture are fitted.")
    ] = "0.05,0.1,0.2",
    glance: Annotated[str | None, typer.Option(help="Rung that looks at requests. Default: the cheapest.")] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
) -> None:
    """Measure rungs on texts, fit the policies to that, and write the pool's file."""
    with extra_libraries("pool", "anee pool"):
        import simpful  # noqa: F401
        import sklearn  # noqa: F401  # before the work that needs it

        from ..pool.loading import Loader
        from ..pool.making import make_config, parse_rung
        from ..pool.measuring import measure, summarise
    check_dtype(dtype)
    check_device(device)
    listed = parse_prices(prices)
    rungs = [parse_rung(one, folder, dtype) for one in rung]
    names = [one.name for one in rungs]
    if len(set(names)) < len(names):
        raise ValueError(f"--rung: two rungs have one name: {', '.join(names)}")
    if glance is not None and glance not in names:
        raise ValueError(f"--glance {glance} is not allowed: the rungs are {', '.join(names)}")
    examples = read_all(text, limit)
    logging.disable_progress_bar()
    loader = Loader(folder, device)
    with progress("measuring rungs", len(examples) * len(rungs)) as advance:
        samples = measure([partial(loader.load, one) for one in rungs], examples, advance)
    with waiting("fitting policies"):
        config = make_config(rungs, summarise(samples), samples, listed, glance)
    folder.mkdir(parents=True, exist_ok=True)
    path = config.save(folder)
    lines = [
        f"{name}: {one.bytes_per_token / 1e6:.1f} MB a token, at most {one.most_bytes_per_token / 1e6:.1f}; loss {one.loss:.4f}"
        for name, one in config.measured.items()
    ]
    say("\n".join([*lines, f"pool: {path}"]))


def measure(
    place: PoolArgument,
    text: TextsOption,
    limit: ExamplesOption = 30,
    output: FiguresOption = None,
    plot: Annotated[Path | None, typer.Option(help="Draw loss against cost: the picture to write.")] = None,
    device: DeviceOption = "cpu",
) -> None:
    """Compare the policies of a pool on texts: cost, bits per byte, and the gain over random choice at equal cost."""
    with extra_libraries("pool", "anee pool"):
        from ..pool.config import find_config, read_config
        from ..pool.loading import Loader
        from ..pool.measuring import measure
        from ..pool.table import Table, as_text
    from ..evaluation.report import write_report

    check_file("--output", output)
    check_picture("--plot", plot)
    check_device(device)
    path = find_config(place)
    config = read_config(path)
    examples = read_all(text, limit)
    logging.disable_progress_bar()
    loader = Loader(path.parent, device)
    with progress("running rungs", len(examples) * len(config.rungs)) as advance:
        samples = measure([partial(loader.load, one) for one in config.rungs], examples, advance)
    rows = Table(samples, config).rows()
    report = {"rows": [asdict(row) for row in rows], "samples": [without_text(asdict(sample)) for sample in samples]}

    def draw(file: Path) -> None:
        from ..pool.pictures import draw_points

        draw_points(rows, file)

    deliver(as_text(rows), Output("figures", output, partial(write_report, report)), Output("plot", plot, draw))


def generate(
    place: PoolArgument,
    prompt: Annotated[list[str], typer.Option(help="Text to go on from; - is the standard input; repeatable.")],
    energy_budget: Annotated[
        float | None,
        typer.Option(help="Bytes that a token may cost, as a share of the dearest rung's. Default: no limit."),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="energy, complexity, learned, cascade or mixture. Default: the pool's.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of learned and mixture: which fit. Default: the pool's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 100,
    chat: Annotated[
        bool, typer.Option(help="Put the prompt into the chat template of the rung; without one it does not serve.")
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Print all that the policy saw.")] = False,
    energy_of: EnergyOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Let a policy choose a rung for each prompt, and say on stderr which one served, and why."""
    with extra_libraries("pool", "anee pool"):
        from ..pool import AneePool
    if energy_budget is not None:
        check_budget(energy_budget, "--energy-budget")
    check_device(device)
    energy, texts = energy_model(energy_of), [read_prompt(one) for one in prompt]
    logging.disable_progress_bar()
    loaded = AneePool.from_pretrained(place, device)
    requests: list[Any] = [[{"role": "user", "content": text}] for text in texts] if chat else list(texts)
    for request in requests:
        with waiting("generating"), EnergyMeter([torch.device(device)]) as meter:
            begin = now()
            output = loaded.generate([request], energy_budget, policy, price, max_new_tokens=max_new_tokens, do_sample=False)
            seconds = now() - begin
        say(output.texts[0])
        tell(output.decisions[0], explain)
        tell_joules(loaded, output, meter, energy, seconds)


def rules(
    place: PoolArgument,
    output: Annotated[Path, typer.Option(help="Picture to write.")] = Path("anee_pool_rules.png"),
) -> None:
    """Draw the levels of a pool's fuzzy rules, and print the rules."""
    check_picture("--output", output)
    with extra_libraries("pool", "anee pool"):
        from ..pool.config import find_config, read_config
        from ..pool.pictures import draw_rules
    path = find_config(place)
    fuzzy = read_config(path).fuzzy
    if fuzzy is None:
        raise ValueError(f"{path} has no fuzzy rules")
    deliver("\n".join(fuzzy.rules), Output("picture", output, partial(draw_rules, fuzzy)))


def parse_prices(text: str) -> list[float]:
    """Prices of a list like `0.1,1`.

    Raises:
        ValueError: something that is not a number from 0 on.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= price < float("inf") for price in found):
        raise ValueError(f"--prices {text} is not allowed: it must be numbers from 0 on, with commas between them")
    return sorted(set(found))


def read_all(texts: list[Path], limit: int) -> "list[Example]":
    """Examples of all texts; what can't be read is noticed before other work. Raises as `read_examples`."""
    from ..pool.examples import read_examples

    for one in texts:
        check_text_option(one)
    return [example for one in texts for example in read_examples(one, limit)]


def without_text(sample: dict[str, Any]) -> dict[str, Any]:
    """Figures of a sample alone: texts are not ours to write."""
    return {name: value for name, value in sample.items() if name != "text"}


def tell(decision: Any, explain: bool) -> None:
    """Say on stderr which rung served and why."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    console.print(decision.summary())
    if explain:
        for name, value in decision.figures.items():
            lines = value.items() if isinstance(value, dict) else [(name, value)]
            console.print(f"{name}:" if isinstance(value, dict) else f"{name}: {value}")
            if isinstance(value, dict):
                for key, number in lines:
                    console.print(f"  {number:.3f}  {key}")


def tell_joules(loaded: Any, output: Any, meter: EnergyMeter, energy: EnergyModel | None, seconds: float) -> None:
    """Say on stderr how many joules a request took, where that is known; modelled ones are of the rung that served."""
    trace, prompt, model = output.executions[0], output.prompts[0], loaded.rung(output.decisions[0].rung).model
    modelled = None if energy is None else partial(energy.of_trace, model, trace, prompt, seconds)
    if modelled is not None or not meter.reason:
        told = meter.describe(trace.actions.shape[1] - prompt + 1, modelled, "" if energy is None else energy.machine.name)
        print(told, file=sys.stderr)


for verb in (make, measure, generate, rules):
    pool.command()(guarded(verb))
