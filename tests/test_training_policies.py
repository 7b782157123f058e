"""Policies of masks on a small student that is its own teacher: exact sparsity, zeros that stay, resume, errors."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from nmcompile import sparsity as sp
from nmcompile.errors import PassError
from nmcompile.prune.plan import Goal
from nmcompile.training import projection
from nmcompile.training.policies import POLICIES, Layer, Policy, make
from nmcompile.training.policies.base import keep_of

Tensor = torch.Tensor
K, HIDDEN, N = 24, 46, 10  # 46 outputs and 10 are no multiples of 4
PATTERNS = ["2x4", "1x4", "4x1", "2:4", "unstructured"]
GLOBAL = {"criterion": "magnitude", "scope": "global", "schedule": "exp", "start": 0.2, "begin": 0.1}
CASES: list[tuple[str, dict[str, object]]] = [
    ("fixed", {}),
    ("gradual", {"criterion": "magnitude"}),
    ("gradual", {}),
    ("gradual", {"criterion": "movement"}),
    ("gradual", {"masked": "through"}),
    ("gradual", GLOBAL),
    ("admm", {}),
    ("admm", {"weighting": "none", "every": 3}),
    ("lasso", {}),
    ("srste", {}),
    ("srste", {"every": 3}),
]
IDS = [" ".join([name, *(str(value) for value in options.values())]) for name, options in CASES]
EACH = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)


def goal_of(pattern: str) -> Goal:
    kind = sp.parse_pattern(pattern)
    return Goal(kind, 1 - kind.n / kind.m if isinstance(kind, sp.NM) else 0.7)


def adamw(weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, 5e-3, (0.9, 0.98), weight_decay=0.1)


def sgd(weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, 1e-2, momentum=0.9, weight_decay=0.01, nesterov=True)


@dataclass
class Toy:
    """relu(x a) b, taught by itself as it was before pruning; weights of different sizes, inputs correlated."""

    name: str
    options: Mapping[str, object]
    steps: int
    pattern: str = "2x4"
    warm: bool = False
    seed: int = 0
    optimizers: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] = adamw
    weights: dict[str, torch.nn.Parameter] = field(init=False)
    policy: Policy[Any] = field(init=False)

    def __post_init__(self) -> None:
        rng = torch.Generator().manual_seed(self.seed)

        def drawn(rows: int, cols: int) -> Tensor:
            sizes = torch.exp(0.7 * torch.randn(rows, cols, generator=rng)) / rows**0.5
            weight: Tensor = torch.randn(rows, cols, generator=rng) * sizes
            return weight

        self.teacher = {"a": drawn(K, HIDDEN), "b": drawn(HIDDEN, N)}
        self.mix = 0.3 * torch.randn(K, K, generator=rng) + torch.eye(K)
        self.weights = {name: torch.nn.Parameter(weight.clone()) for name, weight in self.teacher.items()}
        self.policy = make(self.name, self.layers(), self.steps, self.options)
        self.optimizer = self.optimizers(list(self.weights.values()))

    def layers(self) -> dict[str, Layer]:
        goal, layers = goal_of(self.pattern), {}
        for name, weight in self.weights.items():
            sparse = self.warm or self.name == "fixed"
            mask = keep_of(weight.abs(), goal) if sparse else torch.ones_like(weight, dtype=torch.bool)
            if self.warm:
                with torch.no_grad():
                    weight.masked_fill_(~mask, 0)
            layers[name] = Layer(weight, goal, mask)
        return layers

    def gives(self, feeds: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        given: Tensor = torch.relu(feeds @ weights["a"]) @ weights["b"]
        return given

    def student(self, feeds: Tensor) -> Tensor:
        return self.gives(feeds, {name: self.policy.effective(name, item) for name, item in self.weights.items()})

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            rng = torch.Generator().manual_seed(1000 + step)
            feeds = torch.randn(32, K, generator=rng) @ self.mix
            for group in self.optimizer.param_groups:
                group["lr"] = group.setdefault("initial", group["lr"]) * (1 - step / max(self.steps, last))
            loss = (self.student(feeds) - self.gives(feeds, self.teacher)).square().mean()
            extra = self.policy.penalty()
            self.optimizer.zero_grad()
            (loss if extra is None else loss + extra).backward()
            self.policy.after_backward(step)
            self.optimizer.step()
            self.policy.after_step(step, self.optimizer)

    @torch.no_grad()
    def error(self) -> float:
        """Relative square error on inputs of their own."""
        feeds = torch.randn(1000, K, generator=torch.Generator().manual_seed(5)) @ self.mix
        wanted = self.gives(feeds, self.teacher)
        return float((self.student(feeds) - wanted).square().sum() / wanted.square().sum())


def gone(mask: Tensor, pattern: sp.Pattern) -> int:
    """Units that a mask [K, N] leaves out, which must be whole."""
    units = projection.unit_sums(mask.T.float(), pattern)
    assert torch.equal(projection.spread(units > 0, pattern, mask.T.shape).T, mask)
    return int((units == 0).sum())


def assert_exact(toy: Toy, masks: Mapping[str, Tensor]) -> None:
    """As many units are gone as keep_mask takes, and weights are zero outside of masks."""
    goal = goal_of(toy.pattern)
    wanted = {name: gone(torch.from_numpy(sp.keep_mask(weight.T.numpy(), goal.pattern, goal.sparsity)).T, goal.pattern)
              for name, weight in toy.teacher.items()}  # fmt: skip
    found = {name: gone(mask, goal.pattern) for name, mask in masks.items()}
    if toy.options.get("scope") == "global" and not isinstance(goal.pattern, sp.NM):
        units = sum(projection.unit_sums(mask.T.float(), goal.pattern).numel() for mask in masks.values())
        assert sum(found.values()) == int(goal.sparsity * units + 0.5)
    else:
        assert found == wanted
    for name, weight in toy.weights.items():
        assert not weight[~masks[name]].any()


@EACH
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsity_is_exact_and_nothing_frozen_comes_back(
    name: str, options: dict[str, object], pattern: str
) -> None:
    toy = Toy(name, options, 40, pattern)
    toy.train(0, toy.policy.until)
    assert toy.policy.frozen
    frozen = {key: mask.clone() for key, mask in toy.policy.masks.items()}
    toy.train(toy.policy.until, toy.policy.until + 100)
    assert_exact(toy, frozen)
    masks = toy.policy.finish(toy.optimizer)
    assert all(torch.equal(masks[key], frozen[key]) for key in frozen)
    assert toy.policy.realised() == {key: float((item == 0).double().mean()) for key, item in toy.weights.items()}


@EACH
def test_zeros_stay_zero_by_themselves(name: str, options: dict[str, object]) -> None:
    """Gradients and moments are masked, so that nothing is left for the masking behind the step to undo."""
    toy = Toy(name, options, 30)
    toy.train(0, 30)
    toy.policy.after_step = lambda step, optimizer: None  # type: ignore[method-assign]
    toy.train(30, 60)
    for key, mask in toy.policy.masks.items():
        assert not toy.weights[key][~mask].any()
        state = toy.optimizer.state[toy.weights[key]]
        assert not state["exp_avg"][~mask].any() and not state["exp_avg_sq"][~mask].any()


@EACH
def test_momentum_and_decay_of_sgd_revive_nothing(name: str, options: dict[str, object]) -> None:
    toy = Toy(name, options, 40, optimizers=sgd)
    toy.train(0, 140)
    assert_exact(toy, toy.policy.finish(toy.optimizer))


@EACH
@pytest.mark.parametrize("at", [1, 11, 23, 35])
def test_resuming_gives_the_same_bits(name: str, options: dict[str, object], at: int) -> None:
    whole, part, rest = (Toy(name, options, 40) for _ in range(3))
    whole.train(0, 40)
    part.train(0, at)
    file = io.BytesIO()
    torch.save([part.policy.state_dict(), part.weights, part.optimizer.state_dict()], file)
    part.train(at, 40)  # what goes on does not touch what was saved
    file.seek(0)
    policy, weights, optimizer = torch.load(file, weights_only=True)
    with torch.no_grad():
        for key, weight in rest.weights.items():
            weight.copy_(weights[key])
    rest.optimizer.load_state_dict(optimizer)
    rest.policy.load_state_dict(policy)
    rest.train(at, 40)
    for key in whole.weights:
        assert torch.equal(whole.weights[key], rest.weights[key])
        assert torch.equal(whole.policy.masks[key], rest.policy.masks[key])


@EACH
@pytest.mark.parametrize("warm", [False, True])
def test_an_early_end_is_exact(name: str, options: dict[str, object], warm: bool) -> None:
    toy = Toy(name, options, 100, warm=warm)
    toy.train(0, 7)
    assert_exact(toy, toy.policy.finish(toy.optimizer))


@pytest.mark.parametrize("pattern", ["2x4", "2:4", "unstructured"])
def test_training_pays_and_moving_masks_pay_more(pattern: str) -> None:
    start = Toy("fixed", {}, 300, pattern).error()
    errors = {}
    for name in POLICIES:
        toy = Toy(name, {}, 300, pattern)
        toy.train(0, 300)
        toy.policy.finish(toy.optimizer)
        errors[name] = toy.error()
    assert max(errors.values()) < 0.6 * start, errors
    for name in ("admm", "srste") if pattern == "2:4" else ("admm", "srste", "gradual"):
        assert errors[name] < 0.95 * errors["fixed"], errors


@pytest.mark.parametrize("name", ["admm", "srste"])
def test_a_sparse_start_is_bettered(name: str) -> None:
    fixed, toy = (Toy(kind, {}, 300, warm=True) for kind in ("fixed", name))
    assert toy.error() == fixed.error()
    for each in (fixed, toy):
        each.train(0, 300)
        each.policy.finish(each.optimizer)
    assert toy.error() < fixed.error()


@EACH
def test_a_start_at_the_goal_is_taken_as_it_is(name: str, options: dict[str, object]) -> None:
    toy = Toy(name, options, 1000, warm=True)
    before = {key: weight.detach().clone() for key, weight in toy.weights.items()}
    for key, weight in toy.weights.items():
        assert torch.equal(toy.policy.effective(key, weight), before[key])
        weight.grad = torch.zeros_like(weight)  # the loss pulls nowhere: so does the policy
    still = torch.optim.SGD(toy.weights.values(), 0.0 if name == "lasso" else 0.1)  # but lasso goes on shrinking
    for step in range(300):
        toy.policy.after_backward(step)
        still.step()
        toy.policy.after_step(step, still)
    for key, weight in toy.weights.items():
        assert torch.equal(toy.policy.effective(key, weight), before[key])


def test_a_start_at_the_goal_keeps_its_mask_where_nothing_can_come_back() -> None:
    for options in ({"criterion": "magnitude"}, {}, {"criterion": "movement"}):
        toy = Toy("gradual", options, 40, warm=True)
        before = {key: mask.clone() for key, mask in toy.policy.masks.items()}
        toy.train(0, 40)
        assert all(torch.equal(before[key], mask) for key, mask in toy.policy.finish(toy.optimizer).items())


def test_sparsity_grows_on_schedule() -> None:
    options = {"criterion": "magnitude", "every": 5, "begin": 0.25, "end": 0.75}
    toy, seen = Toy("gradual", options, 40, "unstructured"), []
    for step in range(40):
        toy.train(step, step + 1)
        seen.append(toy.policy.realised()["a"])
    assert not any(seen[:14]) and seen == sorted(seen)
    for done in (15, 20, 25):  # renewals, counted from the tenth step
        assert seen[done - 1] == pytest.approx(0.7 - 0.7 * (1 - (done - 10) / 20) ** 3, abs=1e-3)
    assert seen[29:] == [pytest.approx(0.7, abs=1e-3)] * 11


def test_masked_weights_are_held_and_their_movement_counts() -> None:
    toy = Toy("gradual", {"criterion": "movement", "every": 10}, 100)
    toy.train(0, 20)
    mask, before = toy.policy.masks["a"].clone(), toy.weights["a"].detach().clone()
    scores = toy.policy.held["scores"]["a"].clone()
    assert before[~mask].all() and not toy.policy.effective("a", toy.weights["a"])[~mask].any()
    toy.train(20, 29)
    assert torch.equal(toy.policy.masks["a"], mask)
    assert torch.equal(toy.weights["a"][~mask], before[~mask]) and not torch.equal(toy.weights["a"], before)
    assert (toy.policy.held["scores"]["a"] != scores)[~mask].double().mean() > 0.5


def test_straight_through_gradients_are_those_of_the_masked_weight() -> None:
    toy = Toy("srste", {}, 100, warm=True)
    weight, mask = toy.weights["a"], toy.policy.masks["a"]
    with torch.no_grad():
        weight.add_(1)
    out = toy.policy.effective("a", weight)
    assert torch.equal(out, weight.detach() * mask)
    (out * torch.arange(weight.numel()).reshape(weight.shape)).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad.flatten(), torch.arange(weight.numel()).float())


def one_layer(name: str, options: dict[str, object], weight: Tensor, rate: float) -> tuple[Policy[Any], Tensor, Any]:
    """A policy of one unstructured layer at half its weights, and an optimizer that moves nothing."""
    parameter = torch.nn.Parameter(weight.clone())
    layer = Layer(parameter, Goal(sp.Unstructured(), 0.5), torch.ones_like(weight, dtype=torch.bool))
    return make(name, {"w": layer}, 1000, options), parameter, torch.optim.SGD([parameter], rate)


def test_admm_goes_by_its_equations() -> None:
    weight, rate = torch.tensor([[1.0, -3.0], [2.0, 0.5]]), 0.1
    policy, moved, still = one_layer("admm", {"first": 2.0, "last": 8.0, "every": 2, "weighting": "none"}, weight, rate)
    w, z, multiplier = weight.clone(), weight.clone(), torch.zeros(2, 2)
    size = float(weight.square().mean().sqrt())
    for step in range(9):
        rho = 2.0 * 4 ** (step // 2 * 2 / policy.until)
        w = w - rate / size * (rho * (w - z) + multiplier)
        if step % 2:
            z = projection.project((w + multiplier / rho).T, sp.Unstructured(), 0.5).T
            multiplier = multiplier + rho * (w - z)
        policy.after_step(step, still)
        torch.testing.assert_close(moved.detach(), w)
    assert (z == 0).sum() == 2 and moved.detach()[z == 0].abs().max() < 0.7


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"criterion": "magnitude"}, [[False, False], [True, True]]),
        ({"criterion": "movement"}, [[True, False], [False, True]]),  # away from zero is what counts
        ({"criterion": "snip-momentum"}, [[True, False], [True, False]]),
        ({"criterion": "snip-momentum", "momentum": 0.0}, [[False, True], [False, True]]),  # the last step only
    ],
)
def test_criteria_rank_weights(options: dict[str, object], kept: list[list[bool]]) -> None:
    policy, weight, still = one_layer("gradual", options, torch.tensor([[1.0, -1.0], [2.0, -2.0]]), 0.0)
    for gradient in (torch.tensor([[-9.0, -1.0], [4.0, 1.0]]), torch.tensor([[-0.1, -0.3], [0.1, 0.2]])):
        weight.grad = gradient
        policy.after_backward(0)
    assert torch.equal(policy.finish(still)["w"], torch.tensor(kept))


def test_lasso_shrinks_weak_groups_by_the_most() -> None:
    weight, rate = torch.tensor([[1.0, -3.0], [2.0, 0.01]]), 0.1
    policy, moved, still = one_layer("lasso", {"strength": 1.0, "floor": 0.5}, weight, rate)
    pull = 1 / (weight.square() / weight.square().mean() + 0.5)
    policy.after_step(0, still)
    torch.testing.assert_close(moved.detach(), weight.sign() * (weight.abs() - rate * pull).clamp_min(0))
    assert moved.detach()[1, 1] == 0
    policy.after_step(1, still)  # the same pulls for a quarter of the way, and no division by the zero
    torch.testing.assert_close(moved.detach(), weight.sign() * (weight.abs() - 2 * rate * pull).clamp_min(0))


def test_states_are_of_their_own() -> None:
    toy = Toy("gradual", {}, 40)
    state = toy.policy.state_dict()
    before = {kind: {key: item.clone() for key, item in table.items()} for kind, table in state["held"].items()}
    toy.train(0, 40)
    assert all(torch.equal(state["held"][kind][key], item) for kind in before for key, item in before[kind].items())
    other = Toy("fixed", {}, 40).policy
    del state["held"]["masks"]["a"]
    with pytest.raises(PassError, match="other layers"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sr-ste", {}, "masks=sr-ste is not known; choose one of fixed, gradual, admm, lasso, srste"),
        ("admm", {"rho": 1.0}, "masks=admm does not know rho; its options are first, last, every, until, weighting"),
        ("fixed", {"every": 1}, "masks=fixed does not know every; it has no options"),
        ("srste", {"every": 1.5}, "masks=srste, every=1.5 is not a whole number; 1 is usual"),
        ("srste", {"every": True}, "masks=srste, every=True is not a whole number; 1 is usual"),
        ("lasso", {"strength": "much"}, "masks=lasso, strength=much is not a number; 0.7 is usual"),
        ("lasso", {"floor": 0}, "floor above 0"),
        ("gradual", {"criterion": "size"}, "criterion=size is not known; choose one of magnitude, movement, snip"),
        ("gradual", {"criterion": "movement", "masked": "zero"}, "choose one of held, through"),
        ("gradual", {"begin": 0.9}, "give begin up to end"),
        ("admm", {"until": 60}, "until=60 is not a share between 0 and 1"),
        ("admm", {"first": 20.0}, "give 0 < first <= last"),
    ],
)
def test_errors_name_the_choices(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(PassError, match=message) as caught:
        Toy(name, options, 10)
    assert "\n" not in str(caught.value)


def test_layers_that_do_not_fit_are_refused() -> None:
    weight, goal = torch.nn.Parameter(torch.ones(4, 4)), Goal(sp.Unstructured(), 0.5)
    layer = Layer(weight, goal, torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(PassError, match="layers x and y share one weight"):
        make("fixed", {"x": layer, "y": layer}, 10, {})
    with pytest.raises(PassError, match="layer x: a mask"):
        make("fixed", {"x": Layer(weight, goal, torch.ones(4, 5, dtype=torch.bool))}, 10, {})
    with pytest.raises(PassError, match="0 steps"):
        make("fixed", {"x": layer}, 0, {})
