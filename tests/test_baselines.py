"""The published baselines: one contract for all of them, and the equations of each paper written out once more."""

import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules import SyntheticMIMICIV
from datamodules.contract import STATISTICS, Batch, Grid, Spec, Triplets
from ehrmodels import GRUD, LSTM, TCN, BiLSTM, ICUModule, Mamba, STraTS, Transformer, baselines, load
from ehrmodels.export import Scorer, example, exported, inputs, to_onnx

BASELINES: dict[str, tuple[type[ICUModule], dict[str, Any]]] = {
    "LSTM": (LSTM, {"layers": 2}),
    "BiLSTM": (BiLSTM, {}),
    "GRUD": (GRUD, {}),
    "TCN": (TCN, {}),
    "Transformer": (Transformer, {"heads": 2}),
    "STraTS": (STraTS, {"heads": 2}),
    "Mamba": (Mamba, {"layers": 2, "state": 4}),
}
quiet = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec",
    "ignore:.*number of training batches",
    "ignore:.*no `val_dataloader`",
)


def spec(variables: int = 5, window: int = 12, statics: int = 3, **task: Any) -> Spec:
    ones, zeros = [1.0] * variables, [0.0] * variables
    about = {"name": "mortality_hospital", "hours": window, "window": window, "rolling": False, **task}
    names = [f"v{i}" for i in range(variables)]
    statics_ = [f"s{i}" for i in range(statics)]
    return Spec(names, ["mmHg"] * variables, statics_, zeros, ones, [0.0] * statics, [1.0] * statics, about)


def make(name: str, facts: Spec | None = None, **arguments: Any) -> ICUModule:
    kind, own = BASELINES[name]
    torch.manual_seed(0)
    model = kind(**{"width": 16, **own, **arguments})
    model.initialise(facts or spec(), 3.0)
    return model.eval()


def batch(model: ICUModule, lengths: list[int], seed: int = 0) -> Batch:
    """Random samples of the model's view, each of so many observations (of a grid: hours with any)."""
    rng = torch.Generator().manual_seed(seed)
    count, width, window = len(lengths), len(model.spec.variables), model.spec.window
    static, summary = torch.randn(count, len(model.spec.statics), generator=rng), torch.zeros(count, 0, len(STATISTICS))
    last = ((torch.arange(count) % 3 == 0).float(), torch.arange(count))
    length = torch.tensor(lengths)
    if model.view == "grid":
        mask = (torch.rand(count, window, width, generator=rng) < 0.4).float()
        mask = mask * (torch.arange(window) < length[:, None])[..., None]
        value, since = torch.zeros(mask.shape), torch.ones(mask.shape)
        fresh = torch.randn(mask.shape, generator=rng)
        for t in range(window):
            seen = mask[:, t] > 0
            value[:, t] = torch.where(seen, fresh[:, t], value[:, t - 1] if t else torch.zeros(()))
            later = (since[:, t - 1] + 1 / window).clamp(max=1) if t else torch.ones(())
            since[:, t] = torch.where(seen, torch.zeros(()), later)
        return Grid(static, summary, value, mask, since, *last)
    shape = (count, max(*lengths, 1))
    real = torch.arange(shape[1]) < length[:, None]
    time = (torch.rand(shape, generator=rng) * 2 - 1).sort(1).values * real
    variable = torch.randint(1, width + 1, shape, generator=rng) * real
    return Triplets(static, summary, time, variable, torch.randn(shape, generator=rng) * real, length, *last)


def alone(samples: Batch, i: int) -> Batch:
    """One sample without the padding that the others made."""
    one: Any = type(samples)(*(t[i : i + 1] for t in samples))
    if isinstance(one, Triplets):
        n = max(int(one.length), 1)
        one = one._replace(time=one.time[:, :n], variable=one.variable[:, :n], value=one.value[:, :n])
    return one


@pytest.fixture(params=BASELINES)
def model(request: pytest.FixtureRequest) -> ICUModule:
    return make(request.param)


# ---- one contract ---------------------------------------------------------------------------------------------------------


def test_output_depends_on_its_sample_only(model: ICUModule) -> None:
    samples = batch(model, [9, 12, 0, 1, 4])
    together = model(samples)
    assert together.shape == (5,)
    assert torch.isfinite(together).all()
    for i in range(5):
        torch.testing.assert_close(model(alone(samples, i))[0], together[i], rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing(model: ICUModule) -> None:
    samples = batch(model, [9, 12, 0, 1, 4])
    if not isinstance(samples, Triplets):
        return  # a grid has no padding
    wider: Any = {"time": 0.7, "variable": 2, "value": -4.0}
    for name, fill in wider.items():
        column = torch.nn.functional.pad(getattr(samples, name), (0, 6))
        wider[name] = column.masked_fill(torch.arange(column.shape[1]) >= samples.length[:, None], fill)
    torch.testing.assert_close(model(samples._replace(**wider)), model(samples), rtol=1e-4, atol=1e-5)


def test_output_depends_on_every_input(model: ICUModule) -> None:
    samples = batch(model, [9, 12, 5])
    before = model(samples)
    for name in ("static", "value", "mask", "since") if model.view == "grid" else ("static", "value", "time"):
        changed = samples._replace(**{name: getattr(samples, name) * 0.5 + 0.25})
        assert not torch.allclose(model(changed), before, atol=1e-5), name


def test_gradients_reach_every_parameter(model: ICUModule) -> None:
    model.train()
    model._loss(batch(model, [12, 9, 10, 11, 12, 7]))[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize(
    ("task", "shape"), [({"kind": "regression"}, (4,)), ({"kind": "multilabel", "labels": ["a", "b", "c"]}, (4, 3))]
)
def test_every_kind_of_task(name: str, task: dict[str, Any], shape: tuple[int, ...]) -> None:
    model = make(name, spec(**task))
    samples = batch(model, [3, 12, 7, 5])
    assert model(samples).shape == shape
    target = torch.rand(shape).round()
    assert torch.isfinite(model.train()._loss(samples._replace(target=target))[0])


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 48, 0), (40, 3, 5)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
def test_any_number_of_variables_hours_and_statics(name: str, size: tuple[int, int, int]) -> None:
    made = make(name, spec(*size))
    assert torch.isfinite(made(batch(made, [1, 3]))).all()


@quiet
@pytest.mark.parametrize("name", BASELINES)
def test_learns_by_heart_and_its_checkpoint_says_the_same(name: str, tmp_path: Path) -> None:
    model = make(name, dropout=0.0, learning_rate=1e-2, weight_decay=0.0)
    samples = batch(model, [12, 9, 10, 11, 12, 7, 5, 8, 12, 11, 10, 6])
    plain: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=80, enable_checkpointing=False, **plain)
    trainer.fit(model.train(), DataLoader([samples], batch_size=None))  # type: ignore[arg-type]
    _, probability = model.eval().predict_step(samples, 0)
    assert (probability[samples.target == 1] > 0.8).all()
    assert (probability[samples.target == 0] < 0.2).all()
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    again = load(tmp_path / "model.ckpt")
    assert type(again) is type(model)
    torch.testing.assert_close(again.predict_step(samples, 0)[1], probability, rtol=0, atol=0)


@quiet
@pytest.mark.parametrize("name", BASELINES)
def test_trains_on_records(name: str, mimic: Path) -> None:
    kind, own = BASELINES[name]
    plain: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=1, enable_checkpointing=False, **plain)
    trainer.fit(kind(**{"width": 16, **own}), SyntheticMIMICIV(str(mimic), hours=12))
    assert math.isfinite(float(trainer.callback_metrics["train_loss"]))
    assert 0 <= float(trainer.callback_metrics["val_auroc"]) <= 1


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.filterwarnings("ignore")  # of torch, about its own use of what it has deprecated
def test_an_exported_model_gives_the_same(name: str) -> None:
    model = make(name)
    program = exported(model).module()
    sizes = [(1, 1), (4, 7), (2, 2050)] if model.view == "triplets" else [(1, 1), (5, 1)]
    for tensors in (example(model, *size) for size in sizes):
        with torch.no_grad():
            torch.testing.assert_close(program(*tensors), Scorer(model)(*tensors), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["Transformer", "STraTS"])
@pytest.mark.filterwarnings("ignore")
def test_onnx_gives_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install -e '.[dev]'")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[dev]'")
    model = make(name)
    to_onnx(model, str(tmp_path / "model.onnx"))
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for tensors in (example(model, *size) for size in ((1, 1), (4, 7))):
        (said,) = session.run(None, dict(zip(inputs(model), (t.numpy() for t in tensors), strict=True)))
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(said), Scorer(model)(*tensors), rtol=0, atol=1e-4)


def test_arguments_out_of_range_are_refused() -> None:
    for wrong, said in (
        (lambda: BiLSTM(width=7), "must be even"),
        (lambda: Transformer(width=18), r"a multiple of --model\.heads \(4\), found 18"),
        (lambda: STraTS(width=18), r"a multiple of --model\.heads \(4\), found 18"),
        (lambda: TCN(kernel=1), r"--model\.kernel must be a finite number of at least 2, found 1"),
        (lambda: Mamba(state=0), r"--model\.state must be"),
        (lambda: LSTM(layers=0), r"--model\.layers must be"),
        (lambda: GRUD(dropout=2), r"--model\.dropout must be from 0 to 1, found 2"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()


# ---- as published ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LSTM", "BiLSTM"])
def test_lstm_reads_where_each_direction_ends(name: str) -> None:
    model = make(name, layers=2)
    samples: Any = batch(model, [12, 5])
    every, _ = model.lstm(baselines.hours(samples))  # type: ignore[operator]
    expected = every[:, -1] if name == "LSTM" else torch.cat([every[:, -1, :8], every[:, 0, 8:]], -1)
    torch.testing.assert_close(model.read(samples), expected)  # type: ignore[operator]


def equations(model: GRUD, samples: Grid) -> Tensor:
    """Equations 9 to 16 of Che et al. for one sample at a time, from what was charted in which hour alone."""
    window, width, d = model.spec.window, len(model.spec.variables), model.width
    W, V = model.inputs.weight[:, :width], model.inputs.weight[:, width:]
    states = []
    for x, m, opening in zip(samples.value, samples.mask, samples.since[:, 0], strict=True):
        h, last, s = torch.zeros(d), x[0], opening.clone()  # what was carried into the window, and how long ago it was
        for t in range(window):
            delta = opening if t == 0 else s
            gamma_x = torch.exp(-torch.clamp(model.value_decay * delta + model.value_decay_bias, min=0))
            gamma_h = torch.exp(-torch.clamp(model.state_decay.weight @ delta + model.state_decay.bias, min=0))
            last = torch.where(m[t] > 0, x[t], last)
            x_hat = m[t] * x[t] + (1 - m[t]) * (gamma_x * last + (1 - gamma_x) * 0)
            h = gamma_h * h
            a = W @ x_hat + V @ m[t] + model.inputs.bias
            r = torch.sigmoid(a[:d] + model.gates.weight[:d] @ h)
            z = torch.sigmoid(a[d : 2 * d] + model.gates.weight[d:] @ h)
            h = (1 - z) * h + z * torch.tanh(a[2 * d :] + model.candidate.weight @ (r * h))
            s = torch.where(m[t] > 0, torch.zeros(()), s if t == 0 else delta)
            s = (s + 1 / window).clamp(max=1)
        states.append(h)
    return torch.stack(states)


def test_grud_equals_its_equations() -> None:
    model: Any = make("GRUD")
    with torch.no_grad():  # decays that matter
        model.value_decay.uniform_(-1, 4)
        model.state_decay.weight.uniform_(-1, 2)
    samples: Any = batch(model, [12, 4, 0, 8])
    torch.testing.assert_close(model.read(samples), equations(model, samples), rtol=1e-5, atol=1e-6)


def test_grud_step_by_hand() -> None:
    """One variable, one channel, two hours: seen as 2 in the first, not in the second; half a window goes by."""
    model: Any = make("GRUD", spec(1, 2, 1), width=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.value_decay.fill_(2.0)  # exp(-2 / 2) of the value is left after half a window
        model.state_decay.weight.fill_(4.0)  # and exp(-4 / 2) of the state
        model.inputs.weight[2, 0] = 1.0  # candidate: tanh(value); gates: 1/2 at 0
    value, mask, since = torch.tensor([[[2.0], [2.0]]]), torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.0], [0.5]]])
    ones = torch.zeros(1, 1)
    samples = Grid(ones, torch.zeros(1, 0, 16), value, mask, since, torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    first = 0.5 * math.tanh(2)
    second = 0.5 * first * math.exp(-2) + 0.5 * math.tanh(2 * math.exp(-1))
    assert model.read(samples).item() == pytest.approx(second, rel=1e-6)


def test_grud_knows_the_gap_that_an_observation_ends() -> None:
    """Seen in hours 0 and 3 of 4: at hour 3 the state decays by three hours, though ``since`` is 0 there."""
    model: Any = make("GRUD", spec(1, 4, 1))
    since = torch.tensor([[[0.0], [0.25], [0.5], [0.0]]])
    assert model.elapsed(since).flatten().tolist() == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("window", "kernel", "levels"), [(1, 3, 1), (5, 3, 1), (6, 3, 2), (24, 3, 3), (48, 3, 4), (48, 2, 5)]
)
def test_tcn_sees_the_whole_window_and_no_more_levels_than_that(window: int, kernel: int, levels: int) -> None:
    model: Any = make("TCN", spec(2, window, 1), kernel=kernel)
    assert len(model.blocks) == levels
    for block in model.blocks:
        for convolution in (block.first, block.second):
            torch.nn.init.constant_(convolution.parametrizations.weight.original1, 0.1)  # no path is closed by a ReLU
            torch.nn.init.constant_(convolution.bias, 1.0)
    samples: Any = batch(model, [window])
    value = samples.value.clone().requires_grad_()
    model.read(samples._replace(value=value)).sum().backward()
    assert (value.grad[0].abs().sum(-1) > 0).all()


def test_tcn_is_causal_and_its_first_hour_is_the_farthest() -> None:
    model: Any = make("TCN", spec(2, 40, 1), layers=2)
    x = torch.randn(1, 6, 40, requires_grad=True)
    for block in model.blocks:
        for convolution in (block.first, block.second):
            torch.nn.init.constant_(convolution.parametrizations.weight.original1, 0.1)
            torch.nn.init.constant_(convolution.bias, 9.0)
    model.blocks(x)[..., 30].sum().backward()
    reached = x.grad.abs().sum((0, 1)) > 0  # type: ignore[union-attr]
    assert reached.nonzero().flatten().tolist() == list(range(18, 31))  # 1 + 2 * 2 * (2 ** 2 - 1) = 13 hours


def test_transformer_hours_attend_to_none_that_follow() -> None:
    model: Any = make("Transformer")
    samples: Any = batch(model, [12, 7])
    x = model.embed(baselines.hours(samples)) + model.position
    whole = model.encoder(x, mask=model.causal, is_causal=True)
    changed = x.clone()
    changed[:, 6:] += 1
    after = model.encoder(changed, mask=model.causal, is_causal=True)
    torch.testing.assert_close(after[:, :6], whole[:, :6])
    assert not torch.allclose(after[:, 6:], whole[:, 6:])
    angle = torch.tensor([3.0, 3.0 / 10_000 ** (2 / 16)])
    waves = torch.stack([angle.sin(), angle.cos()], -1).flatten()
    torch.testing.assert_close(model.position[3, :4], waves)


def test_strats_equals_its_formulas() -> None:
    """Embedding, one attention layer and fusion pooling of one sample, written out."""
    model: Any = make("STraTS", layers=1)
    samples: Any = batch(model, [7, 3])
    for i in range(2):
        n = int(samples.length[i])
        time, variable, value = (t[i, :n] for t in (samples.time, samples.variable, samples.value))
        e = model.embed.variable.weight[variable]
        for number, ffn in ((value, model.embed.value), (time, model.embed.time)):
            assert ffn[0].weight.shape == (4, 1)  # the square root of the width
            hidden = torch.tanh(number[:, None] * ffn[0].weight[:, 0] + ffn[0].bias)
            e = e + hidden @ ffn[2].weight.T + ffn[2].bias
        layer = model.encoder.layers[0]
        q, k, v = (e @ layer.self_attn.in_proj_weight.T + layer.self_attn.in_proj_bias).chunk(3, -1)
        heads = []
        for h in (slice(0, 8), slice(8, 16)):
            heads.append(torch.softmax(q[:, h] @ k[:, h].T / math.sqrt(8), -1) @ v[:, h])
        c = layer.norm1(e + layer.self_attn.out_proj(torch.cat(heads, -1)))
        c = layer.norm2(c + layer.linear2(torch.relu(layer.linear1(c))))
        a = torch.softmax(torch.tanh(c @ model.pool[0].weight.T + model.pool[0].bias) @ model.pool[2].weight[0], 0)
        torch.testing.assert_close(model.read(samples)[i], a @ c, rtol=1e-4, atol=1e-5)


def test_strats_reads_the_latest_of_very_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "MOST", 8)
    model: Any = make("STraTS")
    samples: Any = batch(model, [20, 5, 8, 11])
    for i, said in enumerate(model(samples)):
        n = int(samples.length[i])
        kept = slice(max(n - 8, 0), n)
        one = samples._replace(
            **{name: getattr(samples, name)[i : i + 1] for name in ("static", "summary", "target", "row")},
            **{name: getattr(samples, name)[i : i + 1, kept] for name in ("time", "variable", "value")},
            length=torch.tensor([min(n, 8)]),
        )
        torch.testing.assert_close(model(one)[0], said, rtol=1e-4, atol=1e-5)


def test_mamba_is_residual_blocks_and_the_mean_of_what_is_there() -> None:
    model: Any = make("Mamba")
    samples: Any = batch(model, [7, 3])
    for i in range(2):
        x = model.embed(alone(samples, i))
        states = [block.start(1) for block in model.blocks]
        steps = []
        for t in range(x.shape[1]):  # observation by observation
            now = x[:, t : t + 1]
            for k, (block, norm) in enumerate(zip(model.blocks, model.norms, strict=False)):
                out, *states[k] = block.step(norm(now), *states[k])
                now = now + out
            steps.append(model.norms[-1](now))
        expected = torch.cat(steps, 1).mean(1)[0]
        torch.testing.assert_close(model.read(samples)[i], expected, rtol=1e-4, atol=1e-5)
