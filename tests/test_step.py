"""Training steps that are compiled, and steps in parts where memory is short: the gradients of plain ones."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from datamodules import SyntheticMIMICIV
from datamodules.contract import Batch, Triplets
from ehrmodels import (
    GRUD,
    LSTM,
    TCN,
    Fusion,
    HyMaTE,
    HyMaTEForecast,
    ICUModule,
    Mamba,
    RandomForest,
    STraTS,
    TabM,
    Transformer,
    load,
)
from ehrmodels.base import Mean
from ehrmodels.checkpoint import read
from ehrmodels.step import divided, in_parts, padded
from experiments import fit
from experiments.cli import main
from experiments.evaluate import predict_split
from tests.test_models import batch, spec

TINY: dict[str, Any] = {"width": 8, "heads": 2, "dropout": 0.0, "members": 2}


def made(kind: type[ICUModule], **arguments: Any) -> ICUModule:
    torch.manual_seed(0)
    model = kind(**TINY, **({} if kind is Fusion else {"layers": 1}), **arguments)
    model.initialise(spec(6, 8, 3), 3.0)
    return model.train()


def gradients(model: ICUModule, step: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.losses["train"] = Mean()
    step().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- compiled ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces and derives as always, but has no compiler make code of it, which takes minutes."""
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.usefixtures("without_code")
@pytest.mark.parametrize(
    ("kind", "arguments", "graphs"),
    [
        (HyMaTE, {"attention": "variable"}, 1),
        (HyMaTEForecast, {"attention": "token"}, 1),
        (Fusion, {"fusion": "gated"}, 5),  # torch.compile stops at an LSTM: what follows is compiled for two sizes
    ],
)
def test_compiled_steps_have_the_gradients_of_plain_ones_at_every_size(
    kind: type[ICUModule], arguments: dict[str, Any], graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(kind, compile="default", **arguments)
    drawn = [batch(model, count, seed) for count, seed in ((7, 0), (5, 1), (9, 2), (3, 3))]
    if kind is HyMaTEForecast:
        monkeypatch.setattr(torch, "rand", lambda count, **_: torch.linspace(0, 0.99, count))
    for samples in drawn:
        model.compile_mode = None
        expected = gradients(model, lambda: model.training_step(samples, 0))  # noqa: B023
        model.compile_mode = "default"
        compiled = gradients(model, lambda: model.training_step(samples, 0))  # noqa: B023
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == graphs
    model.eval()
    model.forward = lambda samples: "not compiled"  # type: ignore[method-assign,assignment]
    assert model.outputs(samples) == "not compiled"  # type: ignore[comparison-overlap]


def test_what_is_not_trained_by_steps_is_not_compiled(mimic: Path) -> None:
    fitting = lightning.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="RandomForest is not trained by steps that can be compiled"):
        fitting.fit(RandomForest(compile="default"), SyntheticMIMICIV(str(mimic)))


def test_few_lengths_are_graphs_and_say_the_same() -> None:
    model = made(HyMaTE).eval()
    samples = batch(model, 5)
    longer = padded(samples)
    assert isinstance(samples, Triplets) and isinstance(longer, Triplets)
    assert longer.time.shape[1] > samples.time.shape[1]
    torch.testing.assert_close(model(longer), model(samples))
    lengths = {padded(samples._replace(time=samples.time[:, :0])).time.shape[1]}
    for length in range(1, 2049):
        zeros = torch.zeros(1, length)
        rounded = padded(samples._replace(time=zeros, value=zeros, variable=zeros.long())).time.shape[1]  # type: ignore[union-attr]
        assert length <= rounded < 1.25 * length + 1
        lengths.add(rounded)
    assert len(lengths - set(range(9))) == 4 * 8  # from 8 to 2,048
    grid = batch(made(Fusion), 5)
    assert padded(grid) is grid


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("Fusion --model.compile reduce-overhead", "it needs one GPU and --trainer.accumulate_grad_batches 1"),
        ("Fusion --model.compile fast", "expected default, reduce-overhead, found fast"),
        (
            "LogisticRegression --model.compile default",
            "BiLSTM, GRUD, TCN, Transformer",
        ),
        ("TabM --model.compile default", "torch.compile cannot make the steps of this model here: no compiler; leave"),
    ],
)
def test_what_cannot_be_compiled_is_refused(
    flags: str,
    reason: str,
    mimic: Path,
    tmp_path: Path,
    refused: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_compiler(*_: Any, **__: Any) -> Any:
        return lambda samples: (_ for _ in ()).throw(TorchDynamoException("no compiler\nSet TORCHDYNAMO_VERBOSE=1"))

    monkeypatch.setattr(torch, "compile", without_compiler)
    run = f"train --model {flags} --data SyntheticMIMICIV --data.root {mimic} --runs {tmp_path} --name run"
    assert reason in refused(run)
    assert not (tmp_path / "run").exists()


# ---- in parts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Fusion, HyMaTE, HyMaTEForecast])
@pytest.mark.parametrize("parts", [2, 4, 20])
def test_parts_have_the_loss_and_gradients_of_the_whole(kind: type[ICUModule], parts: int) -> None:
    model = made(kind).double()
    samples = batch(model, 13)
    unknown = torch.arange(13) % 6 == 5  # in one part of 20 nothing is known
    target = samples.target.masked_fill(unknown, torch.nan)
    samples = type(samples)(*(t.double() if t.is_floating_point() else t for t in samples._replace(target=target)))
    place = torch.linspace(0, 0.99, 13).double()

    def objective(part: Batch) -> tuple[torch.Tensor, Any]:
        return model._error(part, place[part.row]) if isinstance(model, HyMaTEForecast) else model.objective(part)

    samples = samples._replace(row=torch.arange(13))
    expected = gradients(model, lambda: objective(samples)[0])
    loss, count = in_parts(model, objective, samples, parts)
    whole, values = objective(samples)
    torch.testing.assert_close((loss, torch.as_tensor(count)), (whole, torch.as_tensor(values)), rtol=1e-6, atol=0)
    # the gradient may be scaled, as for several processes or by accumulation, and is added to what is there
    computed = gradients(model, lambda: 0.5 * in_parts(model, objective, samples, parts)[0])
    assert computed.keys() == expected.keys()
    torch.testing.assert_close({n: 2 * g for n, g in computed.items()}, expected, rtol=1e-5, atol=1e-8)


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[int]]:
    """From an epoch on batches of more samples than a limit do not fit; gives the sizes that were tried."""

    def set_up(limit: int, epoch: int = 0) -> list[int]:
        sizes: list[int] = []
        plain = Fusion.forward

        def forward(model: Fusion, samples: Any) -> torch.Tensor:
            sizes.append(len(samples.row))
            if len(samples.row) > limit and (not model.training or model.current_epoch >= epoch):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return plain(model, samples)

        monkeypatch.setattr(Fusion, "forward", forward)
        return sizes

    return set_up


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read(run / "best.ckpt")["state_dict"]


def test_training_goes_on_in_parts_where_memory_is_short(
    mimic: Path,
    tmp_path: Path,
    small_memory: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = f"train --model Fusion --model.width 8 --data SyntheticMIMICIV --data.root {mimic} --runs {tmp_path}"
    run += " --trainer.max_epochs 3 --data.batch_size 32"
    fitted = fit._fitted
    with monkeypatch.context() as planned:
        planned.setattr(
            fit, "_fitted", lambda folder, model, *rest: setattr(model, "parts", 4) or fitted(folder, model, *rest)
        )
        main([*run.split(), "--name", "planned"])
    capsys.readouterr()
    sizes = small_memory(10)
    main([*run.split(), "--name", "short"])
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("out of memory: training goes on from its last checkpoint") == 2
    assert "each batch of up to 32 samples in 4 parts whose gradients are summed" in printed
    assert max(size for size in sizes if size <= 10) == 8
    torch.testing.assert_close(weights(tmp_path / "short"), weights(tmp_path / "planned"), rtol=0, atol=0)
    tables = [(tmp_path / name / "metrics.csv").read_text() for name in ("short", "planned")]
    assert tables[0] == tables[1]
    assert "on cpu in 32-true, batches in 4 parts; memory: at most " in (tmp_path / "short" / "run.log").read_text()


def test_what_was_trained_is_kept_and_a_resumed_run_knows_the_parts(
    mimic: Path, tmp_path: Path, small_memory: Callable[..., list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = (
        f"train --model Fusion --model.width 8 --data SyntheticMIMICIV --data.root {mimic} --runs {tmp_path} --name run"
    )
    sizes = small_memory(16, epoch=1)
    main([*run.split(), "--trainer.max_epochs", "2", "--data.batch_size", "32", "--trainer.limit_train_batches", "3"])
    printed = capsys.readouterr().out
    assert [printed.count(f"epoch   {k}  train_loss") for k in (0, 1)] == [1, 1]
    assert read(tmp_path / "run" / "last.ckpt")["callbacks"]["_Epochs"]["parts"] == 2
    for name in ("metrics.json", "predictions.parquet"):
        (tmp_path / "run" / name).unlink()
    sizes.clear()
    main(
        [
            *run.split(),
            *["--trainer.max_epochs", "2", "--data.batch_size", "32", "--trainer.limit_train_batches", "3", "--resume"],
        ]
    )
    assert "out of memory" not in capsys.readouterr().out


def test_one_sample_that_does_not_fit_ends_in_one_line(
    mimic: Path, tmp_path: Path, small_memory: Callable[..., list[int]], refused: Callable[[str], str]
) -> None:
    small_memory(0)
    said = refused(
        f"train --model Fusion --model.width 8 --data SyntheticMIMICIV --data.root {mimic} --runs {tmp_path} --data.batch_size 4"
    )
    assert said.splitlines() == [
        "ehr: out of memory: lower --data.batch_size (and raise --trainer.accumulate_grad_batches, to train alike)"
    ]


def test_scoring_halves_what_does_not_fit(trained: Path, mimic: Path, small_memory: Callable[..., list[int]]) -> None:
    data, model = SyntheticMIMICIV(str(mimic)), load(trained / "best.ckpt")
    data.adopt(model.spec)
    expected = predict_split(model, data, "val", "cpu")
    sizes = small_memory(9)
    scored = predict_split(model, data, "val", "cpu")
    assert scored.drop("probability").equals(expected.drop("probability"))
    assert scored["probability"].to_list() == pytest.approx(expected["probability"].to_list(), abs=1e-6)
    assert 0 < min(sizes) <= 9 < max(sizes)


def test_a_batch_is_divided_evenly() -> None:
    samples = batch(made(HyMaTE), 10)
    assert [len(part.row) for part in divided(samples, 4)] == [3, 3, 2, 2]
    assert len(divided(samples, 64)) == 10


# ---- on a GPU ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        Fusion,
        partial(Fusion, fusion="cross_attention"),
        *(partial(HyMaTE, attention=attention) for attention in ("token", "variable", "channel")),
        *(GRUD, LSTM, Mamba, STraTS, TabM, TCN, Transformer),
    ],
)
def test_no_step_waits_for_what_a_gpu_computes(make: Callable[..., ICUModule]) -> None:
    """Tensors without values raise an error where Python asks for one, which would let a GPU run empty."""
    model = make()
    model.initialise(spec(6, 8, 3), 3.0)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    samples = batch(model.train(), 7)
    samples = type(samples)(*map(mode.from_tensor, samples))
    with mode:
        model.training_step(samples, 0).backward()
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            model._score("val", samples)  # which may ask: its metrics leave out what is unknown
