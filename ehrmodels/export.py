"""Models for programs without this package: torch.export and ONNX, with free batch and length.

Shape letters: B samples, T hours, N events, F variables, S static features.
"""

import copy
import json
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from datamodules.contract import STATISTICS, VIEWS, Spec
from ehrmodels.base import ICUModule
from ehrmodels.trees import Boosted, LightGBM

MOST_SAMPLES, MOST_EVENTS = 4096, 65536  # of a batch


class Scorer(nn.Module):
    """A model as a function of plain tensors, in the order of ``inputs``: gives what ``predict_step`` predicts, (B,) or (B, K)."""

    def __init__(self, model: ICUModule):
        super().__init__()
        self.model = model

    def forward(self, static: Tensor, *tensors: Tensor) -> Tensor:
        unknown = static.new_full(static.shape[:1], torch.nan)
        row = torch.zeros_like(unknown, dtype=torch.int64)
        fields = dict(zip(inputs(self.model)[1:], tensors, strict=True))
        fields.setdefault("summary", static.new_zeros(0))
        batch = VIEWS[self.model.view](static=static, target=unknown, row=row, **fields)
        return self.model.prediction(self.model(batch)).float()


def inputs(model: ICUModule) -> list[str]:
    """Names of the tensors that a model reads: the fields of its view but target, row, and a summary that it does not ask for."""
    unread = {"target", "row", *(() if model.summary or model.view == "summary" else ("summary",))}
    return [name for name in VIEWS[model.view]._fields if name not in unread]


def example(model: ICUModule, samples: int = 3, events: int = 7) -> tuple[Tensor, ...]:
    """Tensors of the shapes that a model reads, in the order of ``inputs``; the longest of the samples has ``events`` events."""
    spec: Spec = model.spec
    static = torch.randn(samples, len(spec.statics))
    summary = torch.randn(samples, len(spec.variables), len(STATISTICS))
    summary[torch.rand_like(summary) < 0.3] = torch.nan
    first = (static, summary) if "summary" in inputs(model) else (static,)
    if model.view == "summary":
        return first
    if model.view == "grid":
        shape = (samples, spec.window, len(spec.variables))
        mask = (torch.rand(shape) < 0.3).float()
        return *first, torch.randn(shape), mask, torch.rand(shape)
    length = torch.randint(1, events + 1, (samples,))
    length[0] = events
    real = torch.arange(events) < length[:, None]
    time = (torch.rand(samples, events) * 2 - 1).sort(1).values * real
    variable = torch.randint(1, len(spec.variables) + 1, (samples, events)) * real
    return *first, time, variable, torch.randn(samples, events) * real, length


def exported(model: ICUModule) -> torch.export.ExportedProgram:
    """The model in torch's exchange format, for any number of samples and, from triplets, of events.

    Args:
        model: with layers; nothing of it is changed.
    """
    tensors = example(model)
    batch = torch.export.Dim("samples", min=1, max=MOST_SAMPLES)
    events = torch.export.Dim("events", min=1, max=MOST_EVENTS)
    free: list[Any] = [
        {0: batch, 1: events} if model.view == "triplets" and t.ndim == 2 and name != "static" else {0: batch}
        for name, t in zip(inputs(model), tensors, strict=True)
    ]
    frozen = Scorer(copy.deepcopy(model).cpu().eval()).requires_grad_(False)
    with torch.no_grad():
        return torch.export.export(frozen, tensors, dynamic_shapes=(free[0], tuple(free[1:])))


def to_onnx(model: ICUModule, path: str) -> None:
    """Write the model as an ONNX file, with the inputs ``inputs(model)`` and the output ``prediction``."""
    if isinstance(model, Boosted):
        _trees_to_onnx(model, path)
        return
    names = {"input_names": inputs(model), "output_names": ["prediction"]}
    with torch.no_grad():
        torch.onnx.export(exported(model), (), path, dynamo=True, verbose=False, external_data=False, **names)


def _trees_to_onnx(model: Boosted, path: str) -> None:
    """Trees as the operator that ONNX has for them."""
    from onnx import TensorProto, checker, helper, save

    spec, trees = model.spec, _of_lightgbm(model) if isinstance(model, LightGBM) else _of_xgboost(model)
    steps: list[Any] = []
    numbers: list[Any] = []

    def step(kind: str, *of: str, **attributes: Any) -> str:
        name = f"x{len(steps)}"
        steps.append(helper.make_node(kind, list(of), [name], **attributes))
        return name

    def number(values: Any) -> str:
        array = np.atleast_1d(np.asarray(values, np.float32))
        numbers.append(helper.make_tensor(f"c{len(numbers)}", TensorProto.FLOAT, array.shape, array))
        return numbers[-1].name

    features = step("Concat", "static", step("Flatten", "summary", axis=1), axis=1)
    score = step("TreeEnsembleRegressor", features, domain="ai.onnx.ml", n_targets=1, aggregate_function="SUM", **trees)
    calibration = model.calibration
    if calibration is not None and calibration.method != "isotonic":
        score = step("Add", step("Mul", score, number(calibration.slope)), number(calibration.intercept))
    if model.kind.classes:
        score = step("Sigmoid", score)
    if calibration is not None and calibration.method == "isotonic":
        x, y = (np.asarray(part) for part in (calibration.knots, calibration.values))
        past = step("Min", step("Max", step("Sub", score, number(x[:-1])), number(0)), number(np.diff(x)))
        numbers.append(helper.make_tensor("last", TensorProto.INT64, [1], [1]))
        score = step(
            "Add",
            step("ReduceSum", step("Mul", past, number(np.diff(y) / np.diff(x))), "last", keepdims=1),
            number(y[0]),
        )
    steps.append(helper.make_node("Flatten", [score], ["flat"], axis=0))
    numbers.append(helper.make_tensor("all", TensorProto.INT64, [1], [-1]))
    steps.append(helper.make_node("Reshape", ["flat", "all"], ["prediction"]))
    wide: dict[str, list[Any]] = {
        "static": ["samples", len(spec.statics)],
        "summary": ["samples", len(spec.variables), len(STATISTICS)],
    }
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in wide.items()]
    told = [helper.make_tensor_value_info("prediction", TensorProto.FLOAT, ["samples"])]
    graph = helper.make_graph(steps, "trees", given, told, numbers)
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    made = helper.make_model(graph, opset_imports=versions, ir_version=9)
    checker.check_model(made)
    save(made, path)


class _Trees:
    """Attributes of ``TreeEnsembleRegressor``, filled node by node."""

    def __init__(self) -> None:
        names = ("treeids", "nodeids", "featureids", "values", "modes", "truenodeids", "falsenodeids")
        self.nodes: dict[str, list[Any]] = {f"nodes_{name}": [] for name in (*names, "missing_value_tracks_true")}
        self.leaves: dict[str, list[Any]] = {f"target_{name}": [] for name in ("treeids", "nodeids", "ids", "weights")}

    def branch(self, tree: int, node: int, feature: int, mode: str, value: float, missing: bool) -> int:
        """Add a node whose children ``goto`` tells; gives its place."""
        for column, entry in zip(
            self.nodes.values(), (tree, node, feature, value, mode, 0, 0, int(missing)), strict=True
        ):
            column.append(entry)
        return len(self.nodes["nodes_modes"]) - 1

    def leaf(self, tree: int, node: int, weight: float) -> None:
        self.branch(tree, node, 0, "LEAF", 0.0, False)
        for column, entry in zip(self.leaves.values(), (tree, node, 0, weight), strict=True):
            column.append(entry)

    def goto(self, place: int, yes: int, no: int) -> None:
        self.nodes["nodes_truenodeids"][place], self.nodes["nodes_falsenodeids"][place] = yes, no


def _of_lightgbm(model: LightGBM) -> dict[str, list[Any]]:
    trees = _Trees()

    def add(tree: int, node: dict[str, Any], free: list[int]) -> int:
        """Append a node and what is below it; gives its number."""
        number = free[0]
        free[0] += 1
        if "leaf_value" in node:
            trees.leaf(tree, number, float(node["leaf_value"]))
            return number
        assert node["decision_type"] == "<=" and node["missing_type"] in ("NaN", "None"), node
        threshold = np.float32(node["threshold"])
        if float(threshold) > node["threshold"]:  # of float32 features the same are at most the next one below
            threshold = np.nextafter(threshold, np.float32(-np.inf))
        # without missing values in training one is taken for 0
        left = node["default_left"] if node["missing_type"] == "NaN" else node["threshold"] >= 0
        place = trees.branch(tree, number, node["split_feature"], "BRANCH_LEQ", float(threshold), left)
        trees.goto(place, add(tree, node["left_child"], free), add(tree, node["right_child"], free))
        return number

    for tree in model.booster.dump_model(num_iteration=-1)["tree_info"]:
        add(tree["tree_index"], tree["tree_structure"], [0])
    return trees.nodes | trees.leaves


def _of_xgboost(model: Boosted) -> dict[str, list[Any]]:
    trees, learner = _Trees(), json.loads(model.fitted)["learner"]
    for number, tree in enumerate(learner["gradient_booster"]["model"]["trees"]):
        columns = ("left_children", "right_children", "split_indices", "split_conditions", "default_left")
        for node, (left, right, feature, value, missing) in enumerate(zip(*map(tree.get, columns), strict=True)):
            if left < 0:
                trees.leaf(number, node, value)
            else:
                trees.goto(trees.branch(number, node, feature, "BRANCH_LT", value, missing), left, right)
    start = float(learner["learner_model_param"]["base_score"].strip("[]"))
    if learner["objective"]["name"] == "binary:logistic":
        start = math.log(start) - math.log1p(-start)
    return trees.nodes | trees.leaves | {"base_values": [start]}
