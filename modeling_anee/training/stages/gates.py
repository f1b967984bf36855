"""Phase 2 of a `gated` controller: its exit gates, and the exit translators that tokens leave through; the routers stay.

Hidden states come from the stack as the routers run it at random capacities. At first, by supervision, translators that begin
in closed form learn to lose little (KL to the base) on the tokens that are likeliest to leave; then the logarithm of what each
still loses, and of what the tokens that stay lose by its leaving, is regressed on what its gate reads. From there on gates are
sampled: a token that leaves is charged what is lost and paid a price for the layers that it saves, and translators learn from
those that leave through them. The log has what is lost at some shares of leaving tokens, before gates are sampled and at the
end, and what others lose by each token that leaves.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...bridges import normalised
from ...evaluation.rollout import run as run_tokens
from ...modeling_anee import AneeForCausalLM
from ..gating import annealed, expectation, gumbel_sigmoid, logistic_noise, misfit, shares_of_exits, threshold
from ..leaving import missed_by_others
from ..losses import kl_divergence
from ..mixing import controller_of, run_routed
from ..optimise import batch_of, train
from ..recipe import Gates
from ..run import Run
from .closed_form import BATCH_WINDOWS, Moments, fill
from .flips import Regressions


NAME = "gates"
SHARE_OF_TOKENS = 0.25  # whose distributions are compared, at every exit
WEIGHT = 0.05  # of what gates predict: it has gradients of its own, but the norm is clipped over all
LEAVING = (0.05, 0.6)  # share of the tokens that would leave at the price of a step
MEASURED = (0.1, 0.2, 0.4)  # shares of leaving tokens whose loss the log has
WINDOWS = 4  # that it is measured on
SOLVED_WINDOWS = 160  # by which translators begin in closed form
RIDGE = 0.001
LIKELY = 2.0  # tokens count in the translators as the predicted loss to the power of minus this
MOST = 50.0  # tokens, that one counts as
GATE_WINDOWS = 48  # by which gates are solved for
CHECKED_WINDOWS = 16  # others, on which what they say is made the expected loss
GATE_RIDGE = 0.3  # relative to the variance of what they read


@dataclass(frozen=True)
class Exits:
    """What N tokens lose at E exits, and what is said of it.

    Args:
        read: what enters each exit's layer, [N, E, D].
        loss: KL to the base of leaving at each exit, what that makes others lose included, and of staying, float32 [N, E + 1].
        scores: predicted logarithms of those of leaving, float32 [N, E].
        saved: cost that leaving at each exit saves, float32 [E].
    """

    read: Tensor
    loss: Tensor
    scores: Tensor
    saved: Tensor

    def charged_with(self, others: Tensor) -> "Exits":
        """The same, charged with what others lose by each token that leaves at each exit, float32 [E]."""
        return replace(self, loss=self.loss + F.pad(others.to(self.loss), (0, 1)))

    def price(self, share: float) -> float:
        """Logarithm of the price of cost at which so many tokens would leave, by what is said of them."""
        return threshold((self.scores - self.saved.log()).amin(dim=-1), 1.0 - share)

    def logits(self, price: float) -> Tensor:
        """Logits of leaving [N, E]: above 0 where the loss is said to be worth what is saved."""
        return price + self.saved.log() - self.scores

    def outcome(self, leaves: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss, and mean cost saved, with gates [N, E]."""
        shares = shares_of_exits(leaves)
        return (shares * self.loss).sum(dim=-1).mean(), (shares[:, :-1] * self.saved).sum(dim=-1).mean()


def run_stage(run: Run) -> dict:
    """Train gates and translators for `steps` steps of `batch_windows` windows.

    Raises:
        ValueError: the controller has no gates, or the model no exits or translators.
    """
    settings, model = run.settings(NAME), run.model
    controller = controller_of(model)
    if not controller.exit_layers or not len(model.bridges.exit):
        raise ValueError(
            f"exit_layers={model.config.exit_layers} with exit_translator_rank={model.config.exit_translator_rank} leaves "
            "nothing to train: the stage 'gates' needs layers, and a rank of at least 1"
        )
    trained = ("bridges.exit.", "controller.gates.")
    parameters = {name: p for name, p in run.own_parameters().items() if name.startswith(trained)}
    windows = run.windows("train")
    others = missed_by_others(run, windows[:WINDOWS].to(run.device))
    start(run, windows, others)
    supervised = round(settings.supervised * settings.steps)

    def loss_of_step(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        numbers = {}
        if step == supervised:
            solve_gates(run, windows, others)
            numbers = measured(run, others)
        low, high = settings.capacities
        capacity = low + (high - low) * float(torch.rand(1, generator=generator))
        ids = batch_of(windows, settings, step, run)
        seen = exits_of(model, ids, capacity, SHARE_OF_TOKENS, generator).charged_with(others)
        loss, parts = taught(seen) if step < supervised else sampled(seen, settings, step - supervised, generator)
        each = zip(controller.exit_layers, seen.loss.detach().mean(dim=0), strict=False)
        return loss, parts | {f"kl_{layer}": kl for layer, kl in each} | numbers

    train(run, NAME, parameters, loss_of_step)
    if supervised == settings.steps:
        solve_gates(run, windows, others)
    each = {f"others_{layer}": lost for layer, lost in zip(controller.exit_layers, others.tolist(), strict=True)}
    run.log(NAME, settings.steps, **{name: float(value) for name, value in measured(run, others).items()}, **each)
    return {}


def start(run: Run, windows: Tensor, others: Tensor) -> None:
    """Solve for translators and gates that nothing has trained: the tokens that those gates let go count more in the next."""
    controller = controller_of(run.model)
    if run.load(NAME) is not None or controller.gates.weight.any():
        return
    if run.recipe.stages.exits is None:
        start_translators(run, windows[:SOLVED_WINDOWS].to(run.device))
    solve_gates(run, windows, others)
    if run.recipe.stages.exits is None:
        start_translators(run, windows[:SOLVED_WINDOWS].to(run.device))


@torch.no_grad()
def start_translators(run: Run, windows: Tensor) -> None:
    """Solve for the translators: from the base's hidden states there to its last, on windows int64 [W, T].

    Tokens of which little loss is predicted count more, if the gates predict anything.
    """
    model, kept, controller = run.model, run.model.config.keep_first_tokens, controller_of(run.model)
    sums = {layer: Moments(model.config.text_config.hidden_size, run.device) for layer in model.bridges.exit}
    own = run.share(windows)
    for ids in own.split(BATCH_WINDOWS) if len(own) else ():
        entering: list[Tensor] = []
        final = run_tokens(model, ids, keep=entering)[:, kept:].flatten(0, 1)
        for layer, moments in sums.items():
            hidden = entering[int(layer)][:, kept:].flatten(0, 1)
            said = controller.exit_scores(int(layer), hidden)
            counts = (LIKELY * (said.mean() - said)).exp().clamp(max=MOST)
            moments.add(hidden, final - hidden, counts.unsqueeze(-1))
    for layer, moments in sums.items():
        moments.inputs, moments.outputs = run.sum(moments.inputs), run.sum(moments.outputs)
        fill(model.bridges.exit[layer], moments, RIDGE)


@torch.no_grad()
def solve_gates(run: Run, windows: Tensor, others: Tensor) -> None:
    """Set the gates to the regression of what leaving loses on what they read, on some of the windows int64 [W, T].

    In the stack with nothing left out: elsewhere, what routers lose would hide what exits do. On some further windows what is
    said is made the expected loss, with `others`, what others lose by each token that leaves, float32 [E].
    """
    model = run.model
    gates = controller_of(model).gates
    sums = Regressions.of(len(gates.bias), gates.weight.shape[1], 2, run.device)
    for number in run.share(torch.arange(min(GATE_WINDOWS, len(windows)))).tolist():
        seen = exits_of(model, windows[number].unsqueeze(0).to(run.device), 1.0, 1.0, run.generator(f"{NAME}/solved", number))
        for exit in range(len(gates.bias)):
            sums.add(exit, normalised(seen.read[:, exit]), seen.loss[:, exit])
            sums.add_flips(exit, seen.loss[None, :, exit])
    for value in vars(sums).values():
        value.copy_(run.sum(value))
    for exit in range(len(gates.bias)):
        weight, bias = sums.solve(exit, GATE_RIDGE)
        gates.weight[exit].copy_(weight)
        gates.bias[exit].copy_(bias)
    expect(run, windows[GATE_WINDOWS:][:CHECKED_WINDOWS] if len(windows) > GATE_WINDOWS else windows, others)


@torch.no_grad()
def expect(run: Run, windows: Tensor, others: Tensor) -> None:
    """Make what gates say the expected loss on windows int64 [W, T], which every process looks at."""
    gates, generator = controller_of(run.model).gates, run.generator(f"{NAME}/expected", 0)
    seen = [exits_of(run.model, ids.to(run.device), 1.0, 1.0, generator).charged_with(others) for ids in windows.split(1)]
    for exit in range(len(gates.bias)):
        said, lost = (torch.cat([getattr(one, name)[:, exit] for one in seen]) for name in ("scores", "loss"))
        scale, shift = expectation(said, lost)
        gates.weight[exit] *= scale
        gates.bias[exit] = gates.bias[exit] * scale + shift


def exits_of(model: AneeForCausalLM, ids: Tensor, capacity: float, share: float, generator: torch.Generator) -> Exits:
    """A random share of the tokens of ids int64 [B, T], by the routers at a capacity, at every exit."""
    controller, kept = controller_of(model), model.config.keep_first_tokens
    entering: list[Tensor] = []
    routed: list[Tensor] = []
    with torch.no_grad():
        final = run_tokens(model, ids, keep=entering)
        if capacity < 1.0:
            staying, _, _ = run_routed(model, ids, capacity, entering, routed)
        else:
            staying, routed = None, entering
    places = torch.randperm(final[:, kept:, 0].numel(), generator=generator)
    places = places[: max(1, round(share * len(places)))].to(final.device)

    def chosen(hidden: Tensor) -> Tensor:
        return hidden[:, kept:].flatten(0, 1)[places]

    with torch.no_grad():
        target = model.stack.logits(chosen(final))
        own = target if staying is None else model.stack.logits(chosen(staying))  # nothing left out: the base itself
        stays = kl_divergence(target, own)
    read, losses, scores = [], [], []
    for layer in controller.exit_layers:
        hidden = chosen(routed[layer])
        translator = model.bridges.of_exit(layer)
        assert translator is not None
        losses.append(kl_divergence(target, model.stack.logits(translator(hidden))))
        scores.append(controller.exit_scores(layer, hidden))
        read.append(hidden)
    return Exits(
        torch.stack(read, dim=1), torch.stack([*losses, stays], dim=-1), torch.stack(scores, dim=-1), saved_of(model).to(stays)
    )


def saved_of(model: AneeForCausalLM) -> Tensor:
    """Cost that leaving before each of the `exit_layers` saves, float64 [E]."""
    controller, costs = controller_of(model), model.costs.layers
    each = costs[:, int(controller.choices[0])] - costs[:, controller.leave]
    return torch.stack([each[layer:].sum() for layer in controller.exit_layers])


def taught(seen: Exits) -> tuple[Tensor, dict[str, Tensor]]:
    """Supervision of the translators: what every exit loses, of all the more weight the likelier a token is to leave there."""
    weight = (-seen.scores.detach()).softmax(dim=0)
    return (weight * seen.loss[:, :-1]).sum(), {}


def sampled(seen: Exits, settings: Gates, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """What sampled gates lose less what they save, at a random price, in a step of this part."""
    steps = settings.steps - round(settings.supervised * settings.steps)
    forward, backward = (annealed(step, steps, *pair) for pair in (settings.forward, settings.backward))
    low, high = LEAVING
    price = seen.price(low + (high - low) * float(torch.rand(1, generator=generator)))
    logits = seen.logits(price)
    noise = logistic_noise(tuple(logits.shape), generator).to(logits.device)
    loss, saved = seen.outcome(gumbel_sigmoid(logits, noise, forward, backward))
    said = misfit(seen.scores, seen.loss[:, :-1])
    return loss - float(torch.tensor(price).exp()) * saved + WEIGHT * said, {"kl": loss, "saved": saved, "misfit": said}


@torch.no_grad()
def measured(run: Run, others: Tensor) -> dict[str, Tensor]:
    """Mean loss and cost saved at some shares of leaving tokens, all feed-forwards run, on windows of the text to choose on.

    Processes share the windows. Returns `kl_leaving_0.1`, `saved_leaving_0.1` and so on.
    """
    own = run.share(run.windows("choose")[:WINDOWS].to(run.device))
    sums = torch.zeros(2 * len(MEASURED) + 1, dtype=torch.float64, device=run.device)
    for number, ids in enumerate(own.split(1) if len(own) else ()):
        seen = exits_of(run.model, ids, 1.0, 1.0, run.generator(NAME, -1 - number)).charged_with(others)
        for place, share in enumerate(MEASURED):
            outcome = seen.outcome((seen.logits(seen.price(share)) > 0).float())
            sums[2 * place : 2 * place + 2] += torch.stack(outcome).double()
        sums[-1] += 1.0
    sums = run.sum(sums)
    names = [f"{name}_leaving_{share:g}" for share in MEASURED for name in ("kl", "saved")]
    return dict(zip(names, sums[:-1] / sums[-1], strict=True))
