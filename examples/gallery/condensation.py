"""Ten images that teach a network the digits, one for each class.

The images are the meta parameters. Every outer step trains a new network on them and judges it on real digits. The
mean image of each class is the comparison that matters: it costs nothing.
"""

import style
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel

torch.manual_seed(0)
pixels, targets = load_digits(return_X_y=True)
order = torch.randperm(len(targets))
images, labels = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(targets)[order]
train, test = slice(0, 1200), slice(1200, None)
classes, STEPS = torch.arange(10), 30


def network(meta=None):
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def outer_loss(model, condensed, batch):
    return cross_entropy(model(images[batch]), labels[batch])


problem = bilevel.GradientDescent(
    inner_loss=lambda model, condensed, batch: cross_entropy(model(condensed), classes),
    outer_loss=outer_loss,
    params=network,  # a function: a new network for each estimate
    optimizer=bilevel.optimizer(torch.optim.SGD, lr=0.3, momentum=0.9),
)
means = torch.stack([images[train][labels[train] == c].mean(0) for c in classes])
examples = torch.stack([images[train][labels[train] == c][0] for c in classes])


def batch(k):
    return torch.randint(0, 1200, (256,), generator=torch.Generator().manual_seed(k))


learned = bilevel.fit(
    problem,
    examples,
    STEPS,
    batch,
    estimator=bilevel.Reverse(),
    steps=120,
    optimizer=bilevel.optimizer(torch.optim.Adam, lr=0.03),
    progress=False,
).meta


def accuracy(ten_images):  # the mean over five new networks
    hits = []
    for seed in range(1000, 1005):
        state = bilevel.HessianFree()(problem, ten_images, STEPS, torch.arange(1200), seed=seed).state
        hits.append((state.params(images[test]).argmax(1) == labels[test]).double().mean())
    return float(torch.stack(hits).mean())


sets = {"one example each": examples, "class means": means, "learned": learned}
results = {f"test accuracy, {name}": accuracy(ten) for name, ten in sets.items()}
drawing, axes = style.figure(3, height=2.0)
for plot, (name, ten) in zip(axes, sets.items(), strict=True):
    framed = torch.nn.functional.pad(ten.view(10, 8, 8), (1, 1, 1, 1), value=float(ten.max()))
    rows = torch.cat([torch.cat(list(framed[i : i + 5]), 1) for i in (0, 5)])
    plot.imshow(rows, cmap="gray")
    plot.set(title=f"{name}\n{100 * results[f'test accuracy, {name}']:.0f} %", xticks=[], yticks=[])
style.finish(drawing, __file__, results)
