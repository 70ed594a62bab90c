"""Which training digits made a network answer as it does, and do the scores predict a retraining without some of them?

python examples/attribution.py [FOLDER]: writes a picture, a page and the scores into the folder.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.attribution import WeightedTraining, metasmoothness

torch.manual_seed(0)
folder = sys.argv[1] if len(sys.argv) > 1 else "attribution"
pixels, targets = load_digits(return_X_y=True)
order = torch.randperm(len(targets))
x, y = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(targets)[order]

training = WeightedTraining.of(
    model=nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)),
    dataset=(x[:500], y[:500]),
    loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1], reduction="none"),
)
found = bilevel.attribute(training, queries=(x[500:520], y[500:520]))
found.save(folder)
found.page(f"{folder}/page.html")
found.plot(queries=5).savefig(f"{folder}/examples.png", dpi=80, bbox_inches="tight")
print(f"metasmoothness: {metasmoothness(training):.2f}")
for name, score in found.lds(subsets=30, baselines=["gradient cosine"], progress=False).items():
    print(f"linear datamodeling score, {name}: {score}")
