"""Find the proportions of three sources for which a model does best on a target, where the answer is known.

python examples/mixture.py [FOLDER]: writes a picture into the folder.
"""

import sys
from pathlib import Path

import torch

import bilevel
from bilevel.tasks.mixture.pictures import path_figure

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "mixture")
folder.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
a, b = torch.distributions.Dirichlet(torch.full((2, 8, 8), 0.3)).sample()  # chances of the next of 8 tokens
sources = torch.stack([a, (a + b) / 2, torch.full((8, 8), 1 / 8)])  # "own", "half useful", "noise"
target = 0.8 * a + 0.2 * b  # exactly 0.6 own + 0.4 half useful

problem = bilevel.GradientDescent(
    inner_loss=lambda logits, phi, batch: -(phi.softmax(0) @ (sources * logits.log_softmax(1)).sum((1, 2))) / 8,
    outer_loss=lambda logits, phi, batch: -(target * logits.log_softmax(1)).sum() / 8,
    params=torch.zeros(8, 8),
    optimizer=bilevel.optimizer(torch.optim.SGD, lr=8.0, momentum=0.9),
)
path, adam = [[1 / 3] * 3], bilevel.optimizer(torch.optim.Adam, lr=0.3)
record = [lambda step: path.append(step.meta.softmax(0).tolist())]
bilevel.fit(problem, torch.zeros(3), 60, estimator=bilevel.Reverse(), steps=60, optimizer=adam, callbacks=record)
print(f"own {path[-1][0]:.3f}, half useful {path[-1][1]:.3f}, noise {path[-1][2]:.3f}")
names = ["own", "half useful", "noise"]
figure = path_figure(path, names, dict(zip(names, (0.6, 0.4, 0.0), strict=True)))
figure.savefig(folder / "examples.png", dpi=80, bbox_inches="tight")
