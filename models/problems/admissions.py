"""The paper's graduate admissions: predicts the chance of admission from seven features.

Data: M. S. Acharya, A. Armaan, A. S. Antony, A comparison of regression models for prediction of
graduate admissions, ICCIDS 2019; version 1.1, 500 students. It is not part of this project: give
its path. arXiv 2110.14813 speaks of 9 parameters. Nine is the number of the file's columns, but one
is a serial number and one is the target. So seven are used here.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from aadl_hvd import AndersonConfig
from models.errors import UserError
from models.problems.base import Supervised, make_optimizer, mlp, seeded

FEATURES = ("GRE Score", "TOEFL Score", "University Rating", "SOP", "LOR", "CGPA", "Research")
HEADER = ("Serial No.", *FEATURES, "Chance of Admit")
ROWS = 500
TRAINING_PART = 0.8


def read_admissions(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads the file as it was published.

    Blanks around the names of columns do not matter: copies differ in them.

    Returns:
        Features [500, 7] and chance of admission [500], float64.

    Raises:
        UserError: the file cannot be read, or does not hold the published data.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"the admissions data cannot be read: {error}") from error
    found = tuple(name.strip() for name in lines[0]) if lines else ()
    if found != HEADER:
        wrong = [name for name in HEADER if name not in found]
        what = f"no column {', '.join(wrong)}" if wrong else "another order or more columns"
        raise UserError(
            f"{path}: the header is {', '.join(found) or 'missing'}; must be "
            f"{', '.join(HEADER)} ({what})"
        )
    if len(lines) - 1 != ROWS:
        raise UserError(
            f"{path}: {len(lines) - 1} students, must be {ROWS} (version 1.1 of the data; version "
            "1.0 has 400)"
        )
    table = np.empty((ROWS, len(HEADER)))
    for number, line in enumerate(lines[1:], start=2):
        try:
            table[number - 2] = [float(field) for field in line]
        except ValueError:
            raise UserError(
                f"{path}, line {number}: must be {len(HEADER)} numbers, is {','.join(line)}"
            ) from None
    if not np.isfinite(table).all():
        raise UserError(f"{path}: there are numbers that are not finite")
    return table[:, 1:-1], table[:, -1]


class Admissions(Supervised):
    """The paper's MLP: 3 hidden layers of 64 ReLU, Adam 0.02, batch 40, mean squared error.

    The learning rate falls to 4e-3 after 1,000 epochs of 10 steps. The paper does not say how many
    epochs there are. The seed draws 400 students for training and 100 for validation. Features are
    standardised by the training part.

    Args:
        csv: path of the data, see `read_admissions`.
        epochs: passes over the training set.
        steps: stop after so many steps; None: train all epochs.
        seed: see `Problem`.
        rank: see `Problem`.
        ranks: see `Problem`.
    """

    paper: ClassVar[AndersonConfig] = AndersonConfig.paper("admissions")

    def __init__(
        self,
        *,
        csv: str | Path,
        epochs: int = 1200,
        steps: int | None = None,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        features, chances = read_admissions(csv)
        order = np.random.default_rng(seed).permutation(ROWS)
        count = round(TRAINING_PART * ROWS)
        train, validation = order[:count], order[count:]
        mean, deviation = features[train].mean(axis=0), features[train].std(axis=0)

        def part(chosen: np.ndarray) -> tuple[Tensor, Tensor]:
            scaled = torch.from_numpy((features[chosen] - mean) / deviation).float()
            return scaled, torch.from_numpy(chances[chosen]).float()

        super().__init__(part(train), part(validation), batch=40, seed=seed, rank=rank, ranks=ranks)
        self._epoch_steps = count // self.batch
        self.steps = epochs * self._epoch_steps if steps is None else steps

    def make_model(self) -> nn.Module:
        with seeded(self.seed):
            return mlp([len(FEATURES), 64, 64, 64, 1], nn.ReLU)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer("adam", model, self.learning_rate(0))

    def learning_rate(self, step: int) -> float:
        return 0.02 if step < 1000 * self._epoch_steps else 4e-3

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.squeeze(1) - targets).square()
