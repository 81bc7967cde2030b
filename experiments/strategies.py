"""How a trained model is carried to another hospital system: which weights are trained, on whose patients, towards what."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from datamodules.module import ICUDataModule
from ehrmodels import ICUModule, load
from ehrmodels.alignment import Alignment, coral, mmd
from ehrmodels.calibration import METHODS, Method
from ehrmodels.trees import FittedAtOnce

STRATEGIES = ("zero_shot", "finetune", "head", "adapter", "retrain", "pooled", "coral", "mmd", "target_only")
ALIGNED = {"coral": coral, "mmd": mmd}  # those that draw both systems together, and by what distance
WITH_SOURCE = ("pooled", *ALIGNED)  # those that train on the source's patients, too
OF_TREES = ("zero_shot", "finetune", "pooled", "target_only")


@dataclass(frozen=True)
class Transfer:
    """How a model is transferred. Several strategies, sizes or draws are a queue of runs, with zero_shot among them, that
    ends in one table.

    Args:
        strategy: zero_shot, finetune, head, adapter, retrain, pooled, coral, mmd, target_only, or all.
            zero_shot trains nothing; finetune all weights, with a fifth of the source's learning rate; head those of the head;
            adapter those of the head, biases, and scales of normalisation and members; retrain all, with the source's learning
            rate; pooled all, on source and target together; coral and mmd the same, and what the head reads of both systems
            is drawn together by the distance of covariances or of means under kernels; target_only starts from nothing and
            fits variables and scaler of the target. Several are parted by commas. Trees can do zero_shot,
            finetune (more trees), pooled and target_only.
        sizes: Patients of the target for training and validation, such as 100,1000,all.
        draw: Which of them; another number draws others, and several, such as 0,1,2, draw so often.
        weight: Weight of the distance in the loss of coral and mmd.
        recalibrate: Then fit the probabilities to the target's outcomes: prevalence, temperature, platt or isotonic. Of the logit,
            prevalence is an intercept, temperature a slope, platt both; isotonic is any map that rises. Fitted on the target's
            validation patients or, with zero_shot, on all of --transfer.sizes.
        workers: Processes of this machine that share a queue; default: the number of GPUs, or 1.
    """

    strategy: str = "finetune"
    sizes: str = "all"
    draw: str = "0"
    weight: float = 1.0
    recalibrate: Method | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        wrong = sorted(set(_parts(self.strategy)) - {*STRATEGIES, "all"})
        if wrong or not self.strategy:
            raise ValueError(
                f"--transfer.strategy {self.strategy} is not known: choose among {', '.join(STRATEGIES)}, or all"
            )
        for size in _parts(self.sizes):
            if size != "all" and not (size.isdigit() and int(size) >= 2):
                raise ValueError(f"--transfer.sizes must be numbers of at least 2, or all, found {self.sizes}")
        if not all(draw.isdigit() for draw in _parts(self.draw)):
            raise ValueError(f"--transfer.draw must be numbers of at least 0, found {self.draw}")
        for name in ("strategy", "sizes", "draw"):
            if len(set(_parts(getattr(self, name)))) < len(_parts(getattr(self, name))):
                raise ValueError(f"--transfer.{name} {getattr(self, name)} names one twice")
        strategies = set(_parts(self.strategy))
        if strategies == {"zero_shot"} and (self.sizes, self.draw) != ("all", "0") and not self.recalibrate:
            raise ValueError(
                "--transfer.strategy zero_shot trains on nobody: leave --transfer.sizes and --transfer.draw out, or recalibrate "
                f"it with --transfer.recalibrate {', '.join(METHODS[:-1])} or {METHODS[-1]}"
            )
        if self.weight != 1.0 and not strategies & {*ALIGNED, "all"}:
            raise ValueError(f"--transfer.weight is of coral and mmd, and {self.strategy} is none: leave it out")
        if not self.weight >= 0:
            raise ValueError(f"--transfer.weight must be at least 0, found {self.weight}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--transfer.workers must be at least 1, found {self.workers}")

    def __str__(self) -> str:
        """As it is named in folders, such as finetune, coral-100-1 or, of several, transfer."""
        if self.strategy == "all" or any("," in text for text in (self.strategy, self.sizes, self.draw)):
            return "transfer"
        name = f"{self.strategy}-{self.recalibrate}" if self.recalibrate else self.strategy
        return name + ("" if (self.sizes, self.draw) == ("all", "0") else f"-{self.sizes}-{self.draw}")

    @property
    def label(self) -> str:
        """As tables name it: zero_shot is what has not seen the target in any way."""
        return f"{self.recalibrate} alone" if self.strategy == "zero_shot" and self.recalibrate else self.strategy

    @property
    def trains(self) -> bool:
        """Whether there is anything to fit, weights or a map of probabilities."""
        return self.strategy != "zero_shot" or self.recalibrate is not None

    @property
    def patients(self) -> int | None:
        """Of one; None: all."""
        return None if self.sizes == "all" else int(self.sizes)

    def runs(self, model: type[ICUModule]) -> "list[Transfer]":
        """One for each strategy, size and draw, the smallest sizes first; of several, the first is zero_shot.

        Args:
            model: class of the model.

        Raises:
            ValueError: the model cannot do one of them.
        """
        able = OF_TREES if issubclass(model, FittedAtOnce) else STRATEGIES
        wanted = able if self.strategy == "all" else _parts(self.strategy)
        unable = [strategy for strategy in wanted if strategy not in able]
        if unable:
            raise ValueError(
                f"--transfer.strategy {unable[0]} is for networks, and {model.__name__} is fitted at once: choose among "
                f"{', '.join(able)}"
            )
        sizes = sorted(_parts(self.sizes), key=lambda size: float("inf") if size == "all" else int(size))
        zero = Transfer("zero_shot")
        trained = [
            Transfer(strategy, size, draw, self.weight if strategy in ALIGNED else 1.0, self.recalibrate)
            for size, draw, strategy in product(sizes, _parts(self.draw), wanted)
            if strategy != "zero_shot" or self.recalibrate
        ]
        return trained if len(trained) == 1 and (self.recalibrate or "zero_shot" not in wanted) else [zero, *trained]

    def prepared(
        self, ckpt: Path, model: type[ICUModule], target: ICUDataModule, source: ICUDataModule | None, seed: int
    ) -> ICUModule:
        """The model that is to be trained on ``target``, and ``target`` made ready for it.

        Args:
            ckpt: the source's checkpoint.
            model: class of its model.
            target: set up as the checkpoint reads it.
            source: what the checkpoint was trained on, where the strategy trains on it, too.
            seed: of new weights.
        """
        network = load(ckpt, model)
        network.calibration = None  # of other weights, or of other patients
        if self.strategy == "target_only":
            torch.manual_seed(seed)
            fresh = type(network)(**dict(network.hparams))
            target.refit()
            assert target.spec is not None
            fresh.initialise(target.spec, target.positive_weight())
            return fresh
        if self.strategy == "finetune":
            network.learning_rate /= 5
        if self.strategy in ("head", "adapter"):
            kept = network.exempt if self.strategy == "adapter" else set()
            for name, weight in network.named_parameters():
                weight.requires_grad_(name.startswith("head.") or name in kept)
        if self.strategy in WITH_SOURCE:
            assert source is not None
            source.serve(network)
            source.adopt(network.spec, network.facts.get("trained_on"))
            source.prepare_data()
            source.setup()
            target.join(source)
            if isinstance(network, FittedAtOnce):
                network.fitted = ""  # grown anew on both
            elif self.strategy != "pooled":
                network.penalty = Alignment(network, ALIGNED[self.strategy], self.weight, len(target.samples))
        return network


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]
