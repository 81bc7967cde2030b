"""Shared layers beside independent implementations: codes of quantiles, embeddings of values, layers with many members."""

import numpy as np
import pytest
import torch

from datamodules.contract import STATISTICS, Spec
from ehrmodels.layers import Head, Members, PiecewiseLinear, SummaryEmbedding, ValueEmbedding


def spec(kind: str = "binary", labels: int = 1) -> Spec:
    task = {"name": "x", "window": 24, "kind": kind, **({"labels": list("abcd"[:labels])} if labels > 1 else {})}
    edges = torch.randn(3 * len(STATISTICS), 5).sort(1).values.tolist()
    return Spec(["a", "b", "c"], [""] * 3, [], [], [], [], [], task, summary_quantiles=edges)


def test_codes_equal_those_of_rtdl_between_the_outermost_quantiles() -> None:
    theirs = pytest.importorskip("rtdl_num_embeddings", reason="rtdl_num_embeddings is not installed")
    torch.manual_seed(0)
    edges = torch.randn(6, 9).sort(1).values
    inside = edges[:, :1] + torch.rand(6, 50) * (edges[:, -1:] - edges[:, :1])
    expected = theirs.PiecewiseLinearEncoding(list(edges))(inside.T)
    torch.testing.assert_close(PiecewiseLinear(edges)(inside.T).flatten(1), expected, rtol=1e-4, atol=1e-5)


def test_codes_table() -> None:
    """Edges 0, 1, 1, 3: the second bin is a step. Outside, the code stays that of the outermost; no number has none."""
    encode = PiecewiseLinear(torch.tensor([[0.0, 1.0, 1.0, 3.0]]))
    value = torch.tensor([[-1.0], [0.5], [1.0], [1.5], [9.0], [torch.nan]])
    expected = [[0, 0, 0], [0.5, 0, 0], [1, 0, 0], [1, 1, 0.25], [1, 1, 1], [0, 0, 0]]
    assert encode(value).squeeze(1).tolist() == expected
    same = PiecewiseLinear(torch.zeros(1, 4))  # of a statistic that nobody has
    assert torch.isfinite(same(torch.tensor([[-5.0], [0.0], [5.0]]))).all()


def test_embedded_values_interpolate_between_points() -> None:
    torch.manual_seed(0)
    edges = torch.randn(3, 6).sort(1).values
    embed = ValueEmbedding(edges, width=4)
    value, variable = torch.randn(2, 40) * 2, torch.randint(1, 4, (2, 40))  # beyond the edges, too
    found = embed(value, variable).detach().numpy()
    points = embed.points.weight.detach().numpy().reshape(4, 6, 4)  # row 0 is padding
    for place in np.ndindex(2, 40):
        k = int(variable[place])
        for d in range(4):
            expected = np.interp(float(value[place]), edges[k - 1].numpy(), points[k, :, d])
            assert found[place][d] == pytest.approx(expected, abs=1e-5)


def test_embedded_values_at_equal_quantiles_are_numbers() -> None:
    embed = ValueEmbedding(torch.tensor([[0.0, 0.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]]), width=2)
    value = torch.tensor([[-1.0, 0.0, 1.0, 9.0, 0.0, 1.0, 2.0, 3.0]]).requires_grad_()
    found = embed(value, torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0]]))
    found.sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(value.grad).all()  # type: ignore[arg-type]
    torch.testing.assert_close(found[0, 2], (embed.points.weight[6] + embed.points.weight[7]) / 2)


@pytest.mark.parametrize("first", [True, False])
def test_members_equal_a_batch_ensemble_of_tabm(first: bool) -> None:
    theirs = pytest.importorskip("tabm", reason="tabm is not installed")
    torch.manual_seed(0)
    ours = Members(7, 5, members=4, first=first)
    with torch.no_grad():
        ours.out.normal_()
    layer = theirs.LinearBatchEnsemble(7, 5, k=4, scaling_init="random-signs")
    named = {"weight": ours.linear.weight, "r": ours.into, "s": ours.out, "bias": ours.bias}
    layer.load_state_dict({name: parameter.detach() for name, parameter in named.items()})
    x = torch.randn(6, 4, 7)
    torch.testing.assert_close(ours(x), layer(x))
    assert set(ours.into.abs().unique().tolist()) == {1.0}
    assert (ours.into < 0).any() == first


@pytest.mark.parametrize(("kind", "labels"), [("binary", 1), ("regression", 1), ("multilabel", 3)])
def test_head_equals_members_one_by_one(kind: str, labels: int) -> None:
    torch.manual_seed(0)
    head, x = Head(6, spec(kind, labels), 0.0, members=4, width=8), torch.randn(5, 6)
    single = []
    for m in range(4):
        h = x
        for layer in head.hidden:
            h = torch.relu((h * layer.into[m]) @ layer.linear.weight.T * layer.out[m] + layer.bias[m])
        single.append((h @ head.weight[m] + head.bias[m]).squeeze(-1))
    each = torch.stack(single, -1)
    assert each.shape == ((5, 4) if labels == 1 else (5, labels, 4))
    torch.testing.assert_close(head(x), each, rtol=1e-4, atol=1e-5)
    mean = each.mean(-1) if kind == "regression" else torch.logit(each.sigmoid().mean(-1))
    torch.testing.assert_close(head.eval()(x), mean, rtol=1e-4, atol=1e-5)


def test_head_equals_the_backbone_of_tabm() -> None:
    theirs = pytest.importorskip("tabm", reason="tabm is not installed")
    torch.manual_seed(0)
    head, x = Head(6, spec(), 0.0, members=4, width=8), torch.randn(5, 6)
    view = theirs.EnsembleView(k=4)(x)
    for layer in head.hidden:
        batch_ensemble = theirs.LinearBatchEnsemble(view.shape[-1], 8, k=4, scaling_init="ones")
        named = {"weight": layer.linear.weight, "r": layer.into, "s": layer.out, "bias": layer.bias}
        batch_ensemble.load_state_dict({name: parameter.detach() for name, parameter in named.items()})
        view = torch.relu(batch_ensemble(view))
    out = theirs.LinearEnsemble(8, 1, k=4)
    out.load_state_dict({"weight": head.weight.detach(), "bias": head.bias.detach()})
    torch.testing.assert_close(head(x), out(view).squeeze(-1), rtol=1e-4, atol=1e-5)


def test_summary_tells_what_is_missing_from_what_is_there() -> None:
    torch.manual_seed(0)
    embed = SummaryEmbedding(spec(), 0.0).eval()
    summary = torch.full((2, 3, len(STATISTICS)), torch.nan)
    summary[1, 0, 0] = -100.0  # below every quantile: its code is 0, as that of nothing
    nothing, low = embed(summary)
    assert nothing.shape == (embed.width,)
    assert not torch.allclose(nothing, low)
    embed(summary).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in embed.parameters() if p.grad is not None)
