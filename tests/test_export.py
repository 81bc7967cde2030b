"""Whole models exported and compiled give PyTorch's numbers at any number of samples and of events."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_models import batch, spec
from torch import Tensor

from ehrmodels import Fusion, HyMaTE, ICUModule
from ehrmodels.export import Scorer, example, exported, inputs, to_onnx
from experiments.cli import main

MAKE: dict[str, Any] = {
    **{f"fusion {f}": lambda f=f: Fusion(width=8, fusion=f) for f in ("gated", "concat", "cross_attention")},
    **{
        f"hymate {a}": lambda a=a: HyMaTE(width=8, layers=1, state=4, heads=2, attention=a)
        for a in ("token", "variable", "channel")
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


@pytest.mark.parametrize("name", MAKE)
def test_an_exported_model_gives_the_same(name: str) -> None:
    model = made(name)
    program = exported(model).module()
    for tensors in shapes(model):
        with torch.no_grad():
            torch.testing.assert_close(program(*tensors), Scorer(model)(*tensors), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["fusion gated", "hymate token"])
def test_onnx_gives_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install -e '.[dev]'")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[dev]'")
    model = made(name)
    to_onnx(model, str(tmp_path / "model.onnx"))
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == inputs(model)
    for tensors in shapes(model):
        (prediction,) = session.run(None, dict(zip(inputs(model), (t.numpy() for t in tensors), strict=True)))
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(prediction), Scorer(model)(*tensors), rtol=0, atol=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("name", ["fusion cross_attention", "hymate variable"])
def test_a_compiled_model_gives_the_same(name: str) -> None:
    model = made(name)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for count in (3, 8):
        samples = batch(model, count, seed=count)
        torch.testing.assert_close(compiled(samples), model(samples), rtol=1e-5, atol=1e-6)
    compiled(batch(model, 5)).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad and "to_" not in n)
    torch._dynamo.reset()


def test_the_verb_writes_the_file_and_what_it_means(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    from ehrmodels import load

    main(f"export --ckpt {trained / 'best.ckpt'} --out {tmp_path / 'm.pt2'}".split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json", "m.pt2"]
    model, meaning = load(trained / "best.ckpt"), json.loads((tmp_path / "m.json").read_text())
    assert meaning["variables"] == model.spec.variables and meaning["threshold"] == model.threshold
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
    from datamodules import SyntheticMIMICIV
    from ehrmodels import load
    from ehrmodels.calibration import fitted
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
    main(f"{line} --model LogisticRegression --name linear".split())
    with pytest.raises(SystemExit, match="2"):
        main(f"export --ckpt {tmp_path / 'linear' / 'best.ckpt'} --out {tmp_path / 'linear.onnx'}".split())
    assert "only LightGBM can be exported, as .onnx" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_a_recalibrated_network_is_exported_with_its_map(method: str) -> None:
    from ehrmodels.calibration import fitted

    model = made("fusion gated")
    rng = np.random.default_rng(0)
    risk = rng.random(300)
    model.calibration = fitted(method, risk, (rng.random(300) < risk**2).astype(float), 300)
    program = exported(model).module()
    for tensors in shapes(model):
        with torch.no_grad():
            torch.testing.assert_close(program(*tensors), Scorer(model)(*tensors), rtol=0, atol=1e-4)
