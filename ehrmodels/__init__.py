"""Networks for ICU records as LightningModules: ``from ehrmodels import Fusion, HyMaTE``."""  # part of ehr: start.py looks for these words

from ehrmodels.base import ICUModule
from ehrmodels.checkpoint import load
from ehrmodels.fusion import Fusion
from ehrmodels.hymate import HyMaTE, HyMaTEForecast
from ehrmodels.tabm import TabM
from ehrmodels.trees import LightGBM, LogisticRegression, RandomForest, XGBoost

__all__ = [
    "Fusion",
    "HyMaTE",
    "HyMaTEForecast",
    "ICUModule",
    "LightGBM",
    "LogisticRegression",
    "RandomForest",
    "TabM",
    "XGBoost",
    "load",
]
