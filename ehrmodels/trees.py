"""Models that are fitted at once to the summary of the window: boosted trees, a forest, and a linear model.

References:
  [1] Ke et al. 2017 (LightGBM), https://lightgbm.readthedocs.io; [2] Chen & Guestrin 2016, arXiv:1603.02754 (XGBoost);
  [3] Breiman 2001 (random forests), grown by XGBoost as its documentation describes.

Shape letters: B samples, X features: the static ones, and 16 statistics of each variable.
"""

import json
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from datamodules.contract import Spec, Summary, unlabelled
from ehrmodels.base import ICUModule, in_range
from ehrmodels.kernels import exporting
from ehrmodels.layers import PiecewiseLinear, edges_of

Rows = tuple[np.ndarray, np.ndarray]  # features (N, X), targets (N,)


class FittedAtOnce(ICUModule):
    """Base of models without gradient steps: one epoch gathers the training split, at its end the model is fitted.

    A checkpoint holds the fitted model as its own text. Training that starts from such a checkpoint goes on from it.
    Probabilities need no weight of positives: ``pos_weight`` is 1.

    Args:
        seed: Of what is drawn at random.
        folds: Parts of the training split for a cross-validation inside it, by patient; its mean AUROC and AUPRC are logged as
            ``cv_auroc`` and ``cv_auprc``, and their sum can be monitored, as a sweep should. 0: none.
        kwargs: As in ``ICUModule``.
    """

    view = "summary"
    resumes_within = False  # what has been gathered is in no checkpoint

    def __init__(self, seed: int = 0, folds: int = 0, **kwargs: Any):
        super().__init__(**{"pos_weight": 1.0, **kwargs})
        if folds < 0 or folds == 1:
            raise ValueError(f"--model.folds must be 0 or at least 2, found {folds}")
        self.seed, self.folds, self.fitted = seed, folds, ""
        self.gathered: list[tuple[Tensor, Tensor, Tensor]] = []

    @abstractmethod
    def fit_rows(self, rows: Rows) -> str:
        """Fit to the training split; gives the model as text, and goes on from ``fitted`` where there is one."""

    @abstractmethod
    def output(self, features: np.ndarray) -> np.ndarray:
        """(N,) log odds, or values, from features (N, X)."""

    @abstractmethod
    def contributions(self, features: np.ndarray, empty: np.ndarray) -> np.ndarray:
        """(N, X) SHAP values: what of the log odds each feature accounts for, beside the mean, or beside ``empty`` features (N, X)."""

    def build(self, spec: Spec) -> None:
        if spec.kind == "multilabel":
            raise ValueError(f"{type(self).__name__} predicts one label: choose a network for a task of several")
        self.unused = nn.Parameter(torch.zeros(1))  # what Lightning's optimiser steps

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.trainer.world_size > 1:
            raise ValueError(f"{type(self).__name__} is fitted by one process: leave --trainer.devices at 1")
        self.gathered = []

    def get_extra_state(self) -> str:
        return self.fitted

    def set_extra_state(self, state: str) -> None:
        self.fitted = state

    def forward(self, batch: Summary) -> Tensor:
        """Log odds, or values, from a ``Summary``: (B,); 0 before anything was fitted."""
        if not self.fitted:
            return batch.static.new_zeros(len(batch.static))
        output = self.output(features_of(batch.static, batch.summary).cpu().numpy())
        return torch.as_tensor(output, dtype=torch.float32, device=batch.static.device)

    def training_step(self, batch: Summary, index: int) -> Tensor:  # type: ignore[override]
        features = features_of(batch.static, batch.summary)
        self.gathered.append((features.cpu(), batch.target.cpu(), batch.row.cpu()))
        nothing = 0 * self.unused.sum()  # Lightning steps an optimiser, and saves no checkpoint before it has
        if index + 1 < self.trainer.num_training_batches:
            return nothing
        features, target, row = (torch.cat(parts) for parts in zip(*self.gathered, strict=True))
        self.gathered = []
        labelled = ~unlabelled(target)
        features, target, row = features[labelled], target[labelled], row[labelled]
        if self.folds:
            self.log_dict(self._cross_validated((features.numpy(), target.numpy()), row.numpy()))
        self.fitted = self.fit_rows((features.numpy(), target.numpy()))
        output = torch.as_tensor(self.output(features.numpy()), dtype=torch.float32)
        self.losses["train"].add(self.kind.loss(output, target, 1.0).mean(), len(target))
        return nothing

    def _cross_validated(self, rows: Rows, row: np.ndarray) -> dict[str, Tensor]:
        """Mean over parts of the training split of what a model of the other parts scores on each."""
        patients = self.trainer.datamodule.samples["patient_id"].cast(str).gather(row)  # type: ignore[attr-defined]
        part = patients.rank("dense").to_numpy() - 1
        part = np.random.default_rng(self.seed).permutation(int(part.max()) + 1)[part] % self.folds
        before, scores = self.fitted, []
        for k in range(self.folds):
            self.fitted = before
            self.fitted = self.fit_rows((rows[0][part != k], rows[1][part != k]))
            output = torch.as_tensor(self.output(rows[0][part == k]), dtype=torch.float32)
            target = torch.from_numpy(rows[1][part == k]).long()
            scores.append(torch.stack([binary_auroc(output, target), binary_average_precision(output, target)]))
        self.fitted = before
        auroc, auprc = torch.stack(scores).mean(0)
        return {"cv_auroc": auroc, "cv_auprc": auprc, "cv_auroc_auprc": auroc + auprc}

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.trainer.should_stop = True  # another epoch would fit the same rows


class Boosted(FittedAtOnce):
    """Base of trees of a library, which are read from their text once."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._booster: tuple[str, Any] = ("", None)

    @property
    def booster(self) -> Any:
        """The library's own object of ``fitted``."""
        if self._booster[0] != self.fitted:
            self._booster = (self.fitted, self.loaded(self.fitted))
        return self._booster[1]

    @abstractmethod
    def loaded(self, text: str) -> Any:
        """The library's object from its text."""


class LightGBM(Boosted):
    """Gradient-boosted trees [1] on the summary. The default settings are the best of three by cross-validation inside
    the training split of PhysioNet 2012; ``sweep_lightgbm.yaml`` tunes them.

    Args:
        rounds: Trees.
        learning_rate: Weight of each tree.
        leaves: Most leaves of a tree.
        min_samples: Fewest training samples of a leaf.
        features: Share of the features that each tree may use.
        rows: Share of the samples that each tree is grown on.
        l2: Penalty of the squared weight of a leaf.
        bins: Most values that a feature is rounded to.
        seed: Of features and rows.
        kwargs: ``folds``: parts of the training split for a cross-validation inside it, logged as cv_auroc and cv_auprc; 0: none.
            And as in ``ICUModule``, of which those of the optimiser and the average are not used.
    """

    def __init__(
        self,
        rounds: int = 650,
        learning_rate: float = 0.02,
        leaves: int = 18,
        min_samples: int = 40,
        features: float = 0.1,
        rows: float = 1.0,
        l2: float = 10.0,
        bins: int = 63,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(seed=seed, learning_rate=learning_rate, **kwargs)
        in_range(1, None, rounds=rounds, min_samples=min_samples)
        in_range(2, None, leaves=leaves, bins=bins)
        in_range(0, 1, features=features, rows=rows)
        in_range(0, None, l2=l2)
        self.rounds, self.leaves, self.min_samples, self.l2, self.bins = rounds, leaves, min_samples, l2, bins
        self.features, self.rows = features, rows

    def fit_rows(self, rows: Rows) -> str:
        lightgbm = _imported("lightgbm")
        binary = self.spec.kind != "regression"
        parameters = {
            "objective": ("cross_entropy" if ((rows[1] > 0) & (rows[1] < 1)).any() else "binary") if binary else "regression",
            "learning_rate": self.learning_rate, "num_leaves": self.leaves, "min_data_in_leaf": self.min_samples,
            "feature_fraction": self.features, "bagging_fraction": self.rows, "bagging_freq": int(self.rows < 1),
            "lambda_l2": self.l2, "max_bin": self.bins, "seed": self.seed, "deterministic": True,
            "force_row_wise": True, "verbose": -1, "num_threads": torch.get_num_threads(),
        }  # fmt: skip
        data = lightgbm.Dataset(rows[0], rows[1], free_raw_data=False)
        before = self.loaded(self.fitted) if self.fitted else None
        return str(lightgbm.train(parameters, data, self.rounds, init_model=before).model_to_string(num_iteration=-1))

    def output(self, features: np.ndarray) -> np.ndarray:
        return self.booster.predict(features, raw_score=True, num_threads=torch.get_num_threads())

    def contributions(self, features: np.ndarray, empty: np.ndarray) -> np.ndarray:
        return self.booster.predict(features, pred_contrib=True, num_threads=torch.get_num_threads())[:, :-1]

    def loaded(self, text: str) -> Any:
        return _imported("lightgbm").Booster(model_str=text)


class XGBoost(Boosted):
    """Gradient-boosted trees [2] on the summary; settings near those of ``LightGBM``, not tuned by themselves.

    Args:
        rounds: Rounds of boosting.
        learning_rate: Weight of each tree.
        depth: Most splits from the root to a leaf.
        min_weight: Least summed second derivative of the loss in a leaf.
        features: Share of the features that each tree may use.
        rows: Share of the samples that each tree is grown on.
        l2: Penalty of the squared weight of a leaf.
        seed: Of features and rows.
        kwargs: ``folds``: parts of the training split for a cross-validation inside it, logged as cv_auroc and cv_auprc; 0: none.
            And as in ``ICUModule``, of which those of the optimiser and the average are not used.
    """

    trees = 1  # of a round

    def __init__(
        self,
        rounds: int = 650,
        learning_rate: float = 0.02,
        depth: int = 4,
        min_weight: float = 5.0,
        features: float = 0.1,
        rows: float = 0.7,
        l2: float = 10.0,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(seed=seed, learning_rate=learning_rate, **kwargs)
        in_range(1, None, rounds=rounds, depth=depth)
        in_range(0, None, min_weight=min_weight, l2=l2)
        in_range(0, 1, features=features, rows=rows)
        self.rounds, self.depth, self.min_weight, self.l2 = rounds, depth, min_weight, l2
        self.features, self.rows = features, rows

    def fit_rows(self, rows: Rows) -> str:
        xgboost = _imported("xgboost")
        binary = self.spec.kind != "regression"
        parameters = {
            "objective": "binary:logistic" if binary else "reg:squarederror", "eta": self.learning_rate,
            "max_depth": self.depth, "min_child_weight": self.min_weight, "lambda": self.l2, "subsample": self.rows,
            "colsample_bynode" if self.trees > 1 else "colsample_bytree": self.features, "tree_method": "hist",
            "num_parallel_tree": self.trees, "seed": self.seed, "nthread": torch.get_num_threads(), "verbosity": 0,
        }  # fmt: skip
        before = self.loaded(self.fitted) if self.fitted else None
        booster = xgboost.train(parameters, xgboost.DMatrix(*rows), self.rounds, xgb_model=before)
        return bytes(booster.save_raw("json")).decode()

    def output(self, features: np.ndarray) -> np.ndarray:
        return self.booster.inplace_predict(features, predict_type="margin")

    def contributions(self, features: np.ndarray, empty: np.ndarray) -> np.ndarray:
        return self.booster.predict(_imported("xgboost").DMatrix(features), pred_contribs=True)[:, :-1]

    def loaded(self, text: str) -> Any:
        booster = _imported("xgboost").Booster()
        booster.load_model(bytearray(text.encode()))
        return booster


class RandomForest(XGBoost):
    """A random forest [3] on the summary: 500 deep trees, each split among a tenth of the features; not tuned.

    Args:
        depth: Most splits from the root to a leaf.
        min_weight: Least summed second derivative of the loss in a leaf.
        features: Share of the features that each split may use.
        rows: Share of the samples that each tree is grown on.
        l2: Penalty of the squared weight of a leaf.
        seed: Of features and rows.
        kwargs: ``folds``: parts of the training split for a cross-validation inside it, logged as cv_auroc and cv_auprc; 0: none.
            And as in ``ICUModule``, of which those of the optimiser and the average are not used.
    """

    trees = 500

    def __init__(
        self,
        depth: int = 14,
        min_weight: float = 1.0,
        features: float = 0.1,
        rows: float = 0.63,
        l2: float = 1e-5,
        seed: int = 0,
        **kwargs: Any,
    ):
        own = {"rounds": 1, "learning_rate": 1.0, "depth": depth, "min_weight": min_weight}
        super().__init__(**{**own, "features": features, "rows": rows, "l2": l2, "seed": seed, **kwargs})


class LogisticRegression(FittedAtOnce):
    """Logistic regression (linear, for a value) on the summary: each feature as its quantile and whether it is missing.

    Args:
        l2: Penalty of the squared coefficients, per sample.
        kwargs: ``folds``: parts of the training split for a cross-validation inside it, logged as cv_auroc and cv_auprc; 0: none.
            And as in ``ICUModule``, of which those of the optimiser and the average are not used.
    """

    def __init__(self, l2: float = 0.003, **kwargs: Any):
        super().__init__(**kwargs)
        in_range(0, None, l2=l2)
        self.l2 = l2

    def build(self, spec: Spec) -> None:
        super().build(spec)
        self.encode = PiecewiseLinear(edges_of(spec.summary_quantiles))
        self.linear = nn.Linear(len(spec.statics) + 2 * len(spec.summary_quantiles), 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def fit_rows(self, rows: Rows) -> str:
        device = self.linear.weight.device
        x, y = self._inputs(torch.from_numpy(rows[0]).to(device)), torch.from_numpy(rows[1]).to(device)
        optimiser = torch.optim.LBFGS(
            self.linear.parameters(), max_iter=200, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-6
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = self.kind.loss(self.linear(x).squeeze(-1), y, 1.0).mean()
            loss = loss + self.l2 / 2 * self.linear.weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimiser.step(closure)
        return json.dumps({"samples": len(y)})

    def forward(self, batch: Summary) -> Tensor:
        """As the others, but on the device of the batch, so that it can be exported as a network."""
        if not self.fitted:
            return super().forward(batch)
        return self.linear(self._inputs(features_of(batch.static, batch.summary))).squeeze(-1)

    def output(self, features: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            x = torch.from_numpy(features).to(self.linear.weight.device)
            return self.linear(self._inputs(x)).squeeze(-1).cpu().numpy()

    def contributions(self, features: np.ndarray, empty: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            x, nothing = (self._inputs(torch.from_numpy(each)) for each in (features, empty))
            static, score, there = (self.linear.weight.cpu() * (x - nothing)).split(
                [len(self.spec.statics), *2 * [len(self.spec.summary_quantiles)]], 1
            )
            return torch.cat([static, score + there], 1).numpy()

    def _inputs(self, features: Tensor) -> Tensor:
        static, value = features.split([len(self.spec.statics), len(self.spec.summary_quantiles)], 1)
        there = (~torch.isnan(value)).float()
        pieces = [value] if exporting() else value.split(1024)  # the codes are as many numbers again for each bin
        score = torch.cat([self.encode(piece).mean(-1) for piece in pieces])
        return torch.cat([static, (2 * score - 1) * there, there], 1)


def features_of(static: Tensor, summary: Tensor) -> Tensor:
    """(B, X) from static features (B, S) and statistics (B, F, 16)."""
    return torch.cat([static, summary.flatten(1)], 1)


def _imported(package: str) -> Any:
    """lightgbm or xgboost.

    Raises:
        ValueError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{package} is not installed: pip install {package}") from error
