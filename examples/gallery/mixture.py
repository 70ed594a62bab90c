"""The proportions of a data mixture: how much to learn from each of eight sources.

The labels of source k are wrong with probability k/7, and nobody says which source is which. The proportions are
trained so that a network trained on the mixture does well on 200 examples of the target. Random search over
proportions gets as many inner loops. The learned mixture has the lowest loss on the 200 examples, and not the best test
accuracy: with eight sources and so few examples of the target, random search does well too.
"""

import style
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import bilevel

torch.manual_seed(0)
pixels, targets = load_digits(return_X_y=True)
order = torch.randperm(len(targets))
images, labels = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(targets)[order]
SOURCES, STEPS, OUTER = 8, 40, 40
valid, test = slice(800, 1000), slice(1000, None)
x = images[:800].view(SOURCES, 100, 64)
wrong = torch.rand(SOURCES, 100) < torch.arange(SOURCES)[:, None] / (SOURCES - 1)
y = torch.where(
    wrong,
    (labels[:800].view(SOURCES, 100) + torch.randint(1, 10, (SOURCES, 100))) % 10,
    labels[:800].view(SOURCES, 100),
)


def inner_loss(model, meta, rows):  # the same rows of each source, weighted by its proportion
    losses = cross_entropy(model(x[:, rows]).flatten(0, 1), y[:, rows].flatten(), reduction="none")
    return meta.softmax(0) @ losses.view(SOURCES, -1).mean(1)


def outer_loss(model, meta, batch):
    return cross_entropy(model(images[valid]), labels[valid])


net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
sgd = bilevel.optimizer(torch.optim.SGD, lr=0.3, momentum=0.9)
problem = bilevel.GradientDescent(inner_loss, outer_loss, net, sgd)
batches = bilevel.batches(lambda t: torch.randperm(100)[:32], STEPS)  # random numbers are functions of seed and t
adam = bilevel.optimizer(torch.optim.Adam, lr=0.1)
arguments = {"estimator": bilevel.Reverse(), "steps": OUTER, "optimizer": adam, "progress": False}
learned = bilevel.fit(problem, torch.zeros(SOURCES), batches, **arguments)


def judged(logits):
    estimate = bilevel.HessianFree()(problem, logits, batches)
    return float(estimate.value), float((estimate.state.params(images[test]).argmax(1) == labels[test]).double().mean())


tried = [torch.distributions.Dirichlet(torch.full((SOURCES,), 0.5)).sample().log() for _ in range(4 * OUTER)]
best = min(tried, key=lambda logits: judged(logits)[0])
mixtures = {"uniform": torch.zeros(SOURCES), "random search": best, "learned": learned.meta}
results = {}
for name, logits in mixtures.items():
    results[f"target loss, {name}"], results[f"test accuracy, {name}"] = judged(logits)
drawing, (left, right) = style.figure()
left.bar(torch.arange(SOURCES) - 0.2, best.softmax(0), 0.38, color=style.OTHER, label="random search")
left.bar(torch.arange(SOURCES) + 0.2, learned.meta.softmax(0), 0.38, color=style.OURS, label="learned")
left.set(xlabel="source (wrong labels: k/7)", ylabel="proportion")
left.legend()
right.bar(
    [name.replace(" ", "\n") for name in mixtures],
    [results[f"test accuracy, {name}"] for name in mixtures],
    color=[style.GREY, style.OTHER, style.OURS],
)
right.set(ylabel="test accuracy", ylim=(0.5, 1))
style.finish(drawing, __file__, results)
