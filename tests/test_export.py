"""Whole models exported and compiled give PyTorch's numbers at any number of samples and of events."""

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from test_models import batch, spec
from torch import Tensor

from datamodules import SyntheticMIMICIV
from ehrmodels import Fusion, HyMaTE, ICUModule, load
from ehrmodels.calibration import fitted
from ehrmodels.export import Scorer, example, exported, inputs, to_onnx
from experiments.cli import main

MAKE: dict[str, Any] = {
    **{f"fusion {f}": lambda f=f: Fusion(width=8, fusion=f) for f in ("gated", "concat", "cross_attention")},
    **{
        f"hymate {a}": lambda a=a: HyMaTE(width=8, layers=1, state=4, heads=2, attention=a)
        for a in ("variable", "channel")
    },
}
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, about its own use of what it has deprecated


def made(name: str) -> ICUModule:
    torch.manual_seed(0)
    model: ICUModule = MAKE[name]()
    model.initialise(spec(9, 24, 3), 3.0)
    return model.eval()


def shapes(model: ICUModule) -> list[tuple[Tensor, ...]]:
    """Inputs of many sizes; of one sample of several nothing was observed."""
    lengths = (
        [(1, 1), (2, 7), (64, 40), (1, 2050), (2, 3000)] if model.view == "triplets" else [(1, 1), (2, 1), (64, 1)]
    )
    tensors = [example(model, samples, events) for samples, events in lengths]
    if model.view == "triplets":
        *first, time, variable, value, length = tensors[1]
        length[1] = 0
        tensors[1] = (
            *first,
            *(torch.where(torch.arange(7) < length[:, None], t, 0) for t in (time, variable, value)),
            length,
        )
    return tensors


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("fusion gated", "platt"),
        ("fusion concat", "isotonic"),
        ("fusion cross_attention", None),
        ("hymate variable", None),
        ("hymate channel", None),  # token as ONNX, below
    ],
)
def test_an_exported_model_gives_the_same_and_one_that_is_recalibrated_has_its_map(
    name: str, method: str | None
) -> None:
    model = made(name)
    if method is not None:
        rng = np.random.default_rng(0)
        risk = rng.random(300)
        model.calibration = fitted(method, risk, (rng.random(300) < risk**2).astype(float), 300)
    program = exported(model).module()
    for tensors in shapes(model):
        with torch.no_grad():
            torch.testing.assert_close(program(*tensors), Scorer(model)(*tensors), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["fusion cross_attention", "hymate variable"])
def test_a_compiled_model_gives_the_same(name: str) -> None:
    """Every operation of a model is one that can be traced; what becomes of our own operators then is tested with them."""
    model = made(name)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    for count in (3, 8):
        samples = batch(model, count, seed=count)
        torch.testing.assert_close(compiled(samples), model(samples), rtol=1e-5, atol=1e-6)
    compiled(batch(model, 5)).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad and "to_" not in n)
    torch._dynamo.reset()


def test_the_verb_writes_the_file_and_what_it_means(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(f"export --ckpt {trained / 'best.ckpt'} --out {tmp_path / 'm.pt2'}".split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json", "m.pt2"]
    model, meaning = load(trained / "best.ckpt"), json.loads((tmp_path / "m.json").read_text())
    assert [v["name"] for v in meaning["variables"]] == model.spec.variables and meaning["threshold"] == model.threshold
    assert list(meaning["inputs"]) == inputs(model) and meaning["calibration"] is None
    tensors = example(model, 5)
    with torch.no_grad():
        program = torch.export.load(tmp_path / "m.pt2").module()
        torch.testing.assert_close(program(*tensors), Scorer(model)(*tensors), rtol=0, atol=1e-4)
    with pytest.raises(SystemExit, match="2"):
        main(f"export --ckpt {trained / 'best.ckpt'} --out {tmp_path / 'm.txt'}".split())
    assert "expected a file that ends in .onnx or .pt2" in capsys.readouterr().err


def test_trees_in_onnx_give_the_same_on_real_stays_with_missing_values_and_recalibrated(
    mimic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[dev]'")
    from experiments.evaluate import predict_split

    line = f"train --data SyntheticMIMICIV --data.root {mimic} --runs {tmp_path}"
    main(f"{line} --model LightGBM --model.rounds 60 --model.min_samples 5 --name trees".split())
    ckpt = tmp_path / "trees" / "best.ckpt"
    main(f"export --ckpt {ckpt} --out {tmp_path / 'trees.onnx'}".split())
    model, data = load(ckpt), SyntheticMIMICIV(str(mimic))
    data.adopt(model.spec)
    expected = predict_split(model, data, "all")
    rows = data.samples.with_row_index("row").sort("stay_id", "minute")["row"].to_numpy()
    batch = data.batch(rows)
    given = {"static": batch.static.numpy(), "summary": batch.summary.numpy()}
    assert torch.isnan(batch.summary).any()

    def told(path: Path) -> Any:
        (prediction,) = runtime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, given)
        return torch.from_numpy(prediction)

    risk = expected["probability"].to_torch()
    torch.testing.assert_close(told(tmp_path / "trees.onnx").double(), risk, rtol=0, atol=1e-5)
    target = expected["target"].to_numpy()
    for method in ("platt", "isotonic"):
        model.calibration = fitted(method, expected["probability"].to_numpy(), target, 300)
        to_onnx(model, str(tmp_path / "again.onnx"))
        torch.testing.assert_close(told(tmp_path / "again.onnx").double(), model.calibration(risk), rtol=0, atol=1e-4)
    for other in ("XGBoost --model.rounds 40", "RandomForest --model.depth 4", "LogisticRegression"):
        name = other.split()[0]
        main(f"{line} --model {other} --name {name}".split())
        main(f"export --ckpt {tmp_path / name / 'best.ckpt'} --out {tmp_path / name}.onnx".split())
        risk = predict_split(load(tmp_path / name / "best.ckpt"), data, "all")["probability"]
        assert risk.n_unique() > 10
        torch.testing.assert_close(told(tmp_path / f"{name}.onnx").double(), risk.to_torch(), rtol=0, atol=1e-5)
    with pytest.raises(SystemExit, match="2"):
        main(f"export --ckpt {tmp_path / 'XGBoost' / 'best.ckpt'} --out {tmp_path / 'XGBoost.pt2'}".split())
    assert "trees can be exported as .onnx" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tables(mimic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stays and events as CSV, as ``ehr prepare --out`` writes them as Parquet."""
    folder, store = tmp_path_factory.mktemp("tables"), SyntheticMIMICIV(str(mimic)).store
    events = store.frame(0, len(store.stays))
    for name, table in (("stays", store.stays), ("events", events)):
        table.filter(pl.col("stay_id") % 8 == 0).write_csv(folder / f"{name}.csv")
    return folder


@pytest.mark.parametrize("name", ["Fusion", "HyMaTE --model.layers 1 --model.state 4", "LightGBM --model.rounds 20"])
def test_the_example_of_another_program_gives_what_predict_gives(
    name: str, mimic: Path, tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install -e '.[dev]'")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[dev]'")
    small = "" if "LightGBM" in name else "--model.width 8 --model.members 2 --trainer.max_epochs 1"
    data = f"--data SyntheticMIMICIV --data.root {mimic}"
    main(f"train --model {name} {small} {data} --data.hours 12 --data.window 6 --runs {tmp_path} --name run".split())
    ckpt = tmp_path / "run" / "best.ckpt"
    (tmp_path / "onnx").mkdir()
    onnx = tmp_path / "onnx" / "m.onnx"
    main(f"export --ckpt {ckpt} --out {onnx}".split())
    assert {p.name for p in onnx.parent.iterdir()} == {"m.onnx", "m.json"}
    if "LightGBM" not in name:
        session, model = runtime.InferenceSession(onnx, providers=["CPUExecutionProvider"]), load(ckpt)
        assert [i.name for i in session.get_inputs()] == inputs(model)
        for tensors in shapes(model):
            (prediction,) = session.run(None, dict(zip(inputs(model), (t.numpy() for t in tensors), strict=True)))
            with torch.no_grad():
                torch.testing.assert_close(torch.from_numpy(prediction), Scorer(model)(*tensors), rtol=0, atol=1e-4)
    main(f"predict --ckpt {ckpt} {data} --out {tmp_path / 'risk.csv'}".split())
    capsys.readouterr()
    example = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "onnx_example.py"))
    example["main"](onnx, tables / "stays.csv", tables / "events.csv")
    said = pl.read_csv(capsys.readouterr().out.encode(), has_header=False, new_columns=["stay_id", "said"])
    both = pl.read_csv(tmp_path / "risk.csv").join(said, on="stay_id")
    assert len(both) > 20 and both["said"].n_unique() > 10
    assert (both["said"] - both["probability"]).abs().max() < 1e-4
    pressors = pl.read_csv(tables / "events.csv").filter(pl.col("concept") == "norepinephrine", pl.col("minute") < 360)
    assert pressors["stay_id"].is_in(both["stay_id"].implode()).any()  # set before the window opens
    meaning = json.loads(onnx.with_suffix(".json").read_text())
    meaning["statics"][0] = {"name": "hours in the ICU", "definition": "hours from ICU admission to the prediction"}
    onnx.with_suffix(".json").write_text(json.dumps(meaning))
    with pytest.raises(SystemExit, match="does not compute hours in the ICU"):
        example["main"](onnx, tables / "stays.csv", tables / "events.csv")
