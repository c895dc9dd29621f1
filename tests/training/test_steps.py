from __future__ import annotations

import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

from ekd_lightning.errors import UserError
from ekd_lightning.settings import RecipeSettings
from ekd_lightning.training.steps import StepLog, lr_factor, make_optimizer

STEPS = 5


def curve(recipe: RecipeSettings, steps: int = STEPS) -> list[float]:
    factor = lr_factor(recipe, steps)
    return [factor(step) for step in range(recipe.epochs * steps + 1)]


def torch_curve(make, total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, found = make(optimizer), []
    for _ in range(total + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_cosine_is_that_of_torch():
    recipe = RecipeSettings(epochs=8, schedule="cosine")
    expected = torch_curve(lambda o: CosineAnnealingLR(o, T_max=8 * STEPS), 8 * STEPS)
    assert curve(recipe) == pytest.approx(expected, abs=1e-12)
    assert curve(recipe)[0] == 1.0
    assert curve(recipe)[-1] == pytest.approx(0.0, abs=1e-15)


def test_step_is_that_of_torch():
    recipe = RecipeSettings(epochs=8, schedule="step", milestones=[0.5, 0.75], gamma=0.1)
    expected = torch_curve(lambda o: MultiStepLR(o, [4 * STEPS, 6 * STEPS], gamma=0.1), 8 * STEPS)
    assert curve(recipe) == pytest.approx(expected, rel=1e-12)


def test_constant():
    assert set(curve(RecipeSettings(epochs=3, schedule="constant"))) == {1.0}


def test_warm_up_rises_linearly_and_the_rest_is_a_whole_cosine():
    recipe = RecipeSettings(epochs=6, schedule="cosine", warmup_epochs=1.0)
    found = curve(recipe)
    assert found[:STEPS] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert found[STEPS:] == pytest.approx(curve(RecipeSettings(epochs=5, schedule="cosine")))


def test_a_fraction_of_an_epoch_can_warm_up():
    assert curve(RecipeSettings(epochs=2, schedule="constant", warmup_epochs=0.4))[:3] == pytest.approx(
        [1 / 3, 2 / 3, 1.0]
    )


def test_the_factor_goes_on_after_the_end():
    factor = lr_factor(RecipeSettings(epochs=2, schedule="cosine"), STEPS)
    assert factor(1000) == pytest.approx(0.0, abs=1e-15)


def by_hand(weight, gradients, recipe, factor):
    """Sutskever et al. 2013 in PyTorch's form: v = m v + (g + d w); w -= lr (g + d w + m v)."""
    velocity = 0.0
    for step, gradient in enumerate(gradients):
        decayed = gradient + recipe.weight_decay * weight
        velocity = recipe.momentum * velocity + decayed
        weight = weight - recipe.lr * factor(step) * (decayed + recipe.momentum * velocity)
    return weight


@pytest.mark.parametrize("fused", [False, True])
def test_the_optimiser_takes_the_steps_of_the_formula(fused):
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(50, generator=generator, dtype=torch.float64)
    gradients = torch.randn(8, 50, generator=generator, dtype=torch.float64)
    recipe = RecipeSettings(epochs=2, lr=0.3, momentum=0.8, nesterov=True, weight_decay=0.01)
    weight = torch.nn.Parameter(start.clone())
    optimizer, schedule = make_optimizer([weight], recipe, STEPS, fused=fused)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        schedule.step()
    expected = by_hand(start, gradients, recipe, lr_factor(recipe, STEPS))
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["adamw", "Adam", "NAdam", "rmsprop", "ADADELTA", "Adafactor"])
def test_any_optimiser_of_torch_takes_its_own_steps(name):
    recipe = RecipeSettings(epochs=2, lr=0.01, optimizer=name, weight_decay=0.1, schedule="constant")
    (cls,) = (cls for cls in vars(torch.optim).values() if getattr(cls, "__name__", "").lower() == name.lower())
    gradients = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
    ends = []
    for make in (
        lambda weight: make_optimizer([weight], recipe, STEPS)[0],
        lambda weight: cls([weight], lr=0.01, weight_decay=0.1),
    ):
        weight = torch.nn.Parameter(torch.ones(4, 5))
        optimizer = make(weight)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        ends.append(weight.detach())
    assert type(optimizer) is cls
    assert torch.equal(*ends)


def test_options_of_an_optimiser_reach_it():
    recipe = RecipeSettings(optimizer="adamw", optimizer_options={"betas": [0.8, 0.9], "amsgrad": True})
    (group,) = make_optimizer([torch.nn.Parameter(torch.ones(3))], recipe, STEPS)[0].param_groups
    assert (group["betas"], group["amsgrad"], group["weight_decay"]) == ((0.8, 0.9), True, 5e-4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamv", {}, "unknown recipe.optimizer 'adamv'; did you mean 'adam"),
        ("torch.optim.SGD", {}, "unknown recipe.optimizer 'torch.optim.SGD'"),
        ("lr_scheduler", {}, "unknown recipe.optimizer 'lr_scheduler'"),
        ("Optimizer", {}, "recipe.optimizer=Optimizer: is the base"),
        ("lbfgs", {}, "recipe.optimizer=lbfgs: not supported, it computes the loss several times"),
        ("sparseadam", {}, "recipe.optimizer=sparseadam: not supported, it needs sparse"),
        ("adamw", {"beta": [0.9, 0.9]}, "unknown option of recipe.optimizer=adamw: 'beta'; did you mean 'betas'"),
        ("adamw", {"capturable": True}, "unknown option of recipe.optimizer=adamw: 'capturable'"),
        ("sgd", {"momentum": 0.5}, "unknown option of recipe.optimizer=sgd: 'momentum'"),
        ("adamw", {"betas": [0.9, 1.5]}, "recipe.optimizer=adamw: Invalid beta"),
        ("adamw", {"betas": "x"}, "recipe.optimizer=adamw: "),
        ("muon", {}, "recipe.optimizer=muon: .*2D"),
    ],
)
def test_what_is_no_optimiser_or_refuses_its_options_is_one_line(name, options, message):
    recipe = RecipeSettings(optimizer=name, optimizer_options=options)
    with pytest.raises(UserError, match=message) as caught:
        make_optimizer([torch.nn.Parameter(torch.ones(2, 2, 3))], recipe, STEPS)
    assert "\n" not in str(caught.value)


def test_a_class_that_somebody_put_into_torch_optim_is_not_found(monkeypatch):
    class Evil(torch.optim.SGD):
        pass

    monkeypatch.setattr(torch.optim, "Evil", Evil, raising=False)
    with pytest.raises(UserError, match=r"unknown recipe\.optimizer 'Evil'"):
        make_optimizer([torch.nn.Parameter(torch.ones(3))], RecipeSettings(optimizer="Evil"), STEPS)


def test_keys_of_stores_stay_what_they_were_before_there_were_optimisers():
    assert "optimizer" not in RecipeSettings().key()
    assert RecipeSettings(optimizer="adamw").key()["optimizer"] == "adamw"
    assert "optimizer_options" in RecipeSettings(optimizer="adamw", optimizer_options={"amsgrad": True}).key()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "gamma", "warmup_epochs"])
def test_what_is_no_number_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=rf"^recipe\.{name}={value}: must be"):
        RecipeSettings(**{name: value}).check("recipe")


NAMES = ("loss", "kd", "ce")


def log_of(*rows: tuple[float, ...]) -> StepLog:
    log = StepLog(NAMES)
    for row in rows:
        log.append([torch.tensor(value) for value in row])
    return log


def test_means_over_the_steps():
    means = log_of((1.0, 2.0, 4.0), (3.0, 2.0, 8.0)).means()
    assert {name: float(value) for name, value in means.items()} == {"loss": 2.0, "kd": 2.0, "ce": 6.0}


def test_an_empty_log_has_no_means():
    log = log_of((1.0, 1.0, 1.0))
    log.clear()
    assert log.means() == {}
    assert log.first_non_finite() is None


def test_values_carry_no_gradient():
    log = StepLog(NAMES)
    log.append([torch.ones((), requires_grad=True) * 2] * 3)
    assert not any(value.requires_grad for value in log.means().values())


def test_low_precision_is_summed_in_float32():
    log = StepLog(("x",))
    for _ in range(1000):
        log.append([torch.tensor(1.001, dtype=torch.bfloat16)])
    assert log.means()["x"].dtype == torch.float32
    assert float(log.means()["x"]) == 1.0  # what bfloat16 makes of 1.001


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(1.0, 1.0, 1.0)], None),
        ([(1.0, 1.0, 1.0), (math.inf, 1.0, math.inf)], (1, "ce", math.inf)),
        ([(-math.inf, -math.inf, 1.0), (math.inf, math.inf, 1.0)], (0, "kd", -math.inf)),
        ([(math.inf, 3e38, 3e38)], (0, "loss", math.inf)),  # only the sum overflowed
    ],
)
def test_the_first_value_that_is_not_finite(rows, expected):
    assert log_of(*rows).first_non_finite() == expected


def test_not_a_number_is_found():
    step, name, value = log_of((1.0, 1.0, 1.0), (math.nan, math.nan, 1.0)).first_non_finite()
    assert (step, name) == (1, "kd")
    assert math.isnan(value)


def test_the_newest_step_alone():
    log = log_of((math.nan, 1.0, 1.0))
    assert not log.last_is_finite()
    log.append([torch.ones(())] * 3)
    assert log.last_is_finite()
