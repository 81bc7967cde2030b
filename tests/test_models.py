"""One contract for all models: every test runs over every model and every form of it."""

import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.contract import Batch, Grid, Spec, Summary, Triplets
from ehrmodels.base import ICUModule
from ehrmodels.checkpoint import load, read
from ehrmodels.fusion import Fusion
from ehrmodels.hymate import HyMaTE
from experiments.files import save

MODELS: dict[str, tuple[type[ICUModule], dict[str, Any]]] = {
    "fusion gated": (Fusion, {"fusion": "gated"}),
    "fusion concat": (Fusion, {"fusion": "concat", "piecewise": True}),
    "fusion cross_attention": (Fusion, {"fusion": "cross_attention"}),
    "hymate token": (HyMaTE, {"attention": "token"}),
    "hymate variable": (HyMaTE, {"attention": "variable"}),
    "hymate channel": (HyMaTE, {"attention": "channel"}),
}
# Lightning's advice on loaders, and torch's on Lightning's own use of it
quiet = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec",
    "ignore:.*number of training batches",
    "ignore:.*no `val_dataloader`",
)
SMALL = {"width": 16, "heads": 2}


def spec(variables: int = 65, hours: int = 24, statics: int = 10) -> Spec:
    names = [f"v{i}" for i in range(variables)]
    task = {"name": "mortality_hospital", "hours": hours, "window": hours, "rolling": False}
    ones, zeros = [1.0] * variables, [0.0] * variables
    return Spec(
        names,
        ["mmHg"] * variables,
        [f"s{i}" for i in range(statics)],
        zeros,
        ones,
        [0.0] * statics,
        [1.0] * statics,
        task,
        quantiles=[torch.linspace(-2, 2, 9).tolist()] * variables,
        summary_quantiles=[torch.linspace(-2, 2, 9).tolist()] * (16 * variables),
    )


def batch(model: ICUModule, count: int, seed: int = 0, charted: float = 0.3) -> Batch:
    """Random samples of the view that the model asks for; ``charted`` is the share of cells with a value."""
    facts, rng = model.spec, torch.Generator().manual_seed(seed)
    width, hours = len(facts.variables), facts.window
    static = torch.randn(count, len(facts.statics), generator=rng)
    target = (torch.arange(count) % 3 == 0).float()
    row = torch.arange(count)
    mask = (torch.rand(count, hours, width, generator=rng) < charted).float()
    summary = torch.randn(count, width, 16, generator=rng)
    summary[torch.rand(summary.shape, generator=rng) >= charted] = torch.nan
    if not (model.summary or model.view == "summary"):
        summary = summary[:, :0]
    if model.view == "summary":
        return Summary(static, summary, target, row)
    if model.view == "grid":
        seen = mask.cummax(1).values
        value = torch.randn(count, hours, width, generator=rng).clamp(-5, 5) * seen
        return Grid(
            static,
            summary,
            value,
            mask,
            torch.where(seen > 0, torch.rand(count, hours, width, generator=rng), 1.0),
            target,
            row,
        )
    length = torch.randint(1, 60, (count,), generator=rng) if charted else torch.zeros(count, dtype=torch.int64)
    shape = (count, max(int(length.max()), 1))
    real = torch.arange(shape[1]) < length[:, None]
    time = (torch.rand(shape, generator=rng) * 2 - 1).sort(1).values * real
    return Triplets(
        static,
        summary,
        time,
        torch.randint(1, width + 1, shape, generator=rng) * real,
        torch.randn(shape, generator=rng) * real,
        length,
        target,
        row,
    )


def some(samples: Batch, rows: list[int]) -> Batch:
    return type(samples)(*(t[rows] for t in samples))


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> ICUModule:
    """Each model at its defaults, started and in evaluation mode."""
    return make(request.param).eval()


def make(name: str, weight: float = 4.0, facts: Spec | None = None, **arguments: Any) -> ICUModule:
    kind, own = MODELS[name]
    torch.manual_seed(0)
    made = kind(**{**own, **arguments})
    made.initialise(facts or spec(), weight)
    return made


# ---- forward --------------------------------------------------------------------------------------------------------------


def test_output_has_one_finite_logit_a_sample(model: ICUModule) -> None:
    for count in (1, 7):
        logit = model(batch(model, count))
        assert logit.shape == (count,)
        assert logit.dtype == torch.float32
        assert torch.isfinite(logit).all()


def test_output_does_not_depend_on_the_other_samples(model: ICUModule) -> None:
    samples = batch(model, 9)
    together = model(samples)
    for i in range(9):
        torch.testing.assert_close(model(some(samples, [i]))[0], together[i], rtol=1e-4, atol=1e-5)
    order = [5, 2, 8, 0, 1, 7, 3, 4, 6]
    torch.testing.assert_close(model(some(samples, order)), together[order], rtol=1e-4, atol=1e-5)


def test_output_depends_on_every_input(model: ICUModule) -> None:
    samples = batch(model, 4)
    before = model(samples)
    for name in ("static", "value", "mask", "since") if model.view == "grid" else ("static", "value", "time"):
        changed = samples._replace(**{name: getattr(samples, name) * 0.5 + 0.25})
        assert not torch.allclose(model(changed), before, atol=1e-5), name


def test_nothing_charted_gives_a_finite_probability_and_gradient(model: ICUModule) -> None:
    empty = batch(model, 5, charted=0.0)
    model.train()
    model._loss(empty)[0].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.eval()
    _, probability = model.predict_step(empty, 0)
    assert ((probability > 0) & (probability < 1)).all()


def test_gradients_reach_every_parameter(model: ICUModule) -> None:
    model._loss(batch(model, 12))[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_default_size(model: ICUModule) -> None:
    of_summary = sum(p.numel() for p in model.summarised.parameters())  # grows with the number of variables
    assert 50_000 <= sum(p.numel() for p in model.parameters()) - of_summary <= 500_000
    assert of_summary <= 2_500_000


@pytest.mark.parametrize(("variables", "hours", "statics"), [(1, 1, 1), (3, 48, 0), (120, 72, 12)])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings(
    "ignore:Initializing zero-element tensors is a no-op:UserWarning"
)  # torch, of a layer without inputs
def test_any_number_of_variables_hours_and_statics(name: str, variables: int, hours: int, statics: int) -> None:
    made = make(name, facts=spec(variables, hours, statics), **SMALL).eval()
    assert torch.isfinite(made(batch(made, 3))).all()


def test_bfloat16_autocast_runs_and_is_near(model: ICUModule) -> None:
    samples = batch(model, 8)
    _, exact = model.predict_step(samples, 0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model._loss(samples)[0]
        _, rough = model.predict_step(samples, 0)
    assert loss.dtype == torch.float32
    loss.backward()
    assert torch.isfinite(loss)
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.02)


def test_width_must_suit_heads() -> None:
    with pytest.raises(ValueError, match=r"--model\.width must be a multiple of twice --model\.heads \(8\), found 20"):
        Fusion(width=20)
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"--model\.learning_rate must be a finite number of at least 0"):
            Fusion(learning_rate=wrong)


# ---- loss and probabilities -----------------------------------------------------------------------------------------------


def test_loss_weights_positives_and_skips_unknown_outcomes(model: ICUModule) -> None:
    samples = batch(model, 10)
    logit, y = model(samples).double(), samples.target.double()
    p = torch.sigmoid(logit)
    expected = -(4.0 * y * p.log() + (1 - y) * (1 - p).log())
    assert model._loss(samples)[0].item() == pytest.approx(expected.mean().item(), rel=1e-5)
    unknown = samples.target.clone()
    unknown[[0, 4]] = math.nan
    kept = [i for i in range(10) if i not in (0, 4)]
    loss, count = model.objective(samples._replace(target=unknown))
    assert loss.item() == pytest.approx(expected[kept].mean().item(), rel=1e-5)
    assert count == 8


def test_weight_of_the_user_goes_before_that_of_the_data() -> None:
    assert make("fusion gated", 7.0).pos_weight == 7.0
    assert make("fusion gated", 7.0, pos_weight=2.0).pos_weight == 2.0


@pytest.mark.parametrize("weight", [1.0, 13.3, 0.5])
def test_probabilities_are_calibrated_whatever_the_weight(model: ICUModule, weight: float) -> None:
    """Of samples of which 7 in 100 are positive, the logit with the least loss must come out as the probability 0.07."""
    model.pos_weight = weight
    samples = batch(model, 100)._replace(target=(torch.arange(100) < 7).float())
    logit = torch.zeros(1, requires_grad=True)
    model.forward = lambda _: logit.expand(100)  # type: ignore[method-assign, assignment]
    best = torch.optim.LBFGS([logit], max_iter=50)

    def step() -> Tensor:
        best.zero_grad()
        loss = model._loss(samples)[0]
        loss.backward()
        return loss

    best.step(step)  # type: ignore[arg-type]
    row, probability = model.predict_step(samples, 0)
    assert row.tolist() == list(range(100))
    assert probability.dtype == torch.float64
    assert probability.tolist() == pytest.approx([0.07] * 100, rel=1e-3)


# ---- optimiser ------------------------------------------------------------------------------------------------------------


class Steps:
    """Stands in for the trainer, of which ``configure_optimizers`` asks one number."""

    def __init__(self, steps: float):
        self.estimated_stepping_batches = steps


def optimiser(model: ICUModule, steps: float) -> tuple[torch.optim.Optimizer, Any]:
    model._trainer = Steps(steps)  # type: ignore[assignment]
    made = model.configure_optimizers()
    assert made["lr_scheduler"]["interval"] == "step"
    return made["optimizer"], made["lr_scheduler"]["scheduler"]


def test_learning_rate_rises_then_falls_along_a_cosine(model: ICUModule) -> None:
    made, schedule = optimiser(model, 200)
    rates = []
    for _ in range(200):
        rates.append(made.param_groups[0]["lr"])
        made.step()
        schedule.step()
    peak = model.learning_rate
    assert rates[:10] == pytest.approx([peak * (i + 1) / 10 for i in range(10)])  # warm-up: 5 % of the steps
    assert rates[9] == max(rates) == pytest.approx(peak)
    for i in range(10, 200):
        assert rates[i] == pytest.approx(peak * 0.5 * (1 + math.cos(math.pi * (i - 10) / 190)), abs=1e-12)
    assert made.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    schedule.step()
    assert made.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)  # never up again


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_schedule_of_hardly_any_steps(steps: int) -> None:
    made, schedule = optimiser(make("fusion gated", **SMALL), steps)
    for _ in range(3):
        assert 0 <= made.param_groups[0]["lr"] <= 1e-3
        made.step()
        schedule.step()


def test_weight_decay_spares_biases_and_normalisation(model: ICUModule) -> None:
    made, _ = optimiser(model, 10)
    decayed, exempt = made.param_groups
    assert decayed["weight_decay"] == model.weight_decay > 0  # type: ignore[attr-defined]
    assert exempt["weight_decay"] == 0
    spared = {id(p) for p in exempt["params"]}
    assert sum(len(g["params"]) for g in made.param_groups) == len(list(model.parameters()))
    assert not spared & {id(p) for p in decayed["params"]}
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert all(id(p) in spared for p in module.parameters())
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1].startswith(("bias", "in_proj_bias")):
            assert id(parameter) in spared, name


# ---- training and checkpoints ---------------------------------------------------------------------------------------------


def trainer(**arguments: Any) -> lightning.Trainer:
    plain = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(accelerator="cpu", **{**plain, **arguments})


@quiet
@pytest.mark.parametrize("name", MODELS)
def test_learns_32_samples_by_heart(name: str) -> None:
    facts = spec(12, 8, 3)
    made = make(name, 2.0, facts, **SMALL, dropout=0.0, learning_rate=1e-2, weight_decay=0.0)
    samples = batch(made, 32)
    loader: DataLoader = DataLoader([samples], batch_size=None)
    trainer(max_epochs=60).fit(made, loader)
    _, probability = made.eval().predict_step(samples, 0)
    assert (probability[samples.target == 1] > 0.9).all()
    assert (probability[samples.target == 0] < 0.1).all()


@quiet
@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_gives_the_same_model(name: str, tmp_path: Path) -> None:
    made = make(name, 3.0, spec(12, 8, 3), **SMALL)
    made.facts = {"data": {"class": "EICU", "arguments": {"root": "x", "window": None}}, "split_hash": "ab", "seed": 0}
    samples = batch(made, 16)
    fitted = trainer(max_epochs=1)
    fitted.fit(made, DataLoader([samples], batch_size=None), DataLoader([samples], batch_size=None))
    assert set(fitted.callback_metrics) == {"train_loss", "val_loss", "val_auroc", "val_auprc", "val_auroc_auprc"}
    path = tmp_path / "model.ckpt"
    fitted.save_checkpoint(path)
    torch.load(path, weights_only=True)  # plain types and tensors only
    again = load(path)
    assert type(again) is type(made)
    assert not again.training
    assert again.spec == made.spec
    trained = [{"population": "EICU", "seed": 0, "split_by": "patient"}]  # what older checkpoints do not say
    assert again.facts == {**made.facts, "trained_on": trained}
    assert again.threshold == made.threshold is not None
    assert again.hparams == made.hparams
    torch.testing.assert_close(
        again.predict_step(samples, 0)[1], made.eval().predict_step(samples, 0)[1], rtol=0, atol=0
    )


@quiet
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_validation_of_one_class_reports_chance(target: float) -> None:
    made = make("fusion gated", 3.0, spec(12, 8, 3), **SMALL)
    samples = batch(made, 16)
    one = samples._replace(target=torch.full((16,), target))
    fitted = trainer(max_epochs=1)
    said = fitted.validate(made, DataLoader([one], batch_size=None), verbose=False)[0]
    assert said["val_auroc"] == 0.5
    assert said["val_auprc"] == target


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    made = make("fusion gated", 3.0, spec(12, 8, 3), **SMALL)
    content: dict[str, Any] = {"state_dict": made.state_dict()}
    made.on_save_checkpoint(content)
    save(content, tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


def test_damaged_checkpoints_are_refused(checkpoint: Path) -> None:
    load(checkpoint)
    whole = checkpoint.read_bytes()
    for content in (b"", b"no checkpoint", whole[:100], whole[: len(whole) // 2], whole[:-50]):
        checkpoint.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or not a checkpoint"):
            load(checkpoint)
    checkpoint.unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"no checkpoint .*model\.ckpt: expected a file such as runs/NAME/best\.ckpt; set --ckpt",
    ):
        load(checkpoint)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load(checkpoint.parent)


def change(checkpoint: Path, **entries: Any) -> None:
    content = read(checkpoint)
    content["ehr"] |= entries
    save(content, checkpoint)


def test_checkpoints_of_others_are_refused(checkpoint: Path) -> None:
    whole = read(checkpoint)
    for content in ({"state_dict": {}}, {"ehr": {}}, {"ehr": {}, "state_dict": {}}, [1, 2], torch.zeros(3)):
        torch.save(content, checkpoint)
        with pytest.raises(ValueError, match="not a checkpoint of this framework"):
            load(checkpoint)
    torch.save({"model": torch.nn.Linear(2, 2)}, checkpoint)  # pickled code is never run
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        load(checkpoint)
    for name, said in (
        ("os.system", "not one of this package"),
        ("ehrmodels.fusion.Gone", "not one of this package"),
        ("ehrmodels.kernels._imported", "not one of this package"),
    ):
        save(whole, checkpoint)
        change(checkpoint, model=name)
        with pytest.raises(ValueError, match=said):
            load(checkpoint)


def test_weights_of_another_list_of_variables_are_refused(checkpoint: Path) -> None:
    change(checkpoint, spec=spec(11, 8, 3)._asdict())
    with pytest.raises(ValueError, match="the weights do not fit the 11 variables that the checkpoint names"):
        load(checkpoint)


@pytest.mark.parametrize("missing", ["model", "arguments", "spec", "pos_weight"])
def test_checkpoint_that_lacks_an_entry_is_refused(checkpoint: Path, missing: str) -> None:
    content = read(checkpoint)
    del content["ehr"][missing]
    save(content, checkpoint)
    with pytest.raises(ValueError, match=f"lacks .*{missing}"):
        load(checkpoint)
