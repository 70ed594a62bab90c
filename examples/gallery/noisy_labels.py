"""Find the wrong labels of a training set, with a few examples that can be trusted.

Every training example has a weight, and the weights are trained so that a network trained with them does well on the
trusted examples. They give the best test accuracy. If you only want a list of suspects, no hypergradient is needed: the
loss of each example in a network trained on the trusted ones alone ranks the wrong labels better.
"""

import style
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch.nn.functional import cross_entropy

import bilevel

torch.manual_seed(0)
pixels, targets = load_digits(return_X_y=True)
order = torch.randperm(len(targets))
images = torch.tensor(pixels / 16, dtype=torch.float32)[order]
right = torch.tensor(targets)[order]
train, trusted, test = slice(0, 600), slice(600, 700), slice(700, None)
wrong = torch.rand(600) < 0.4
labels = torch.where(wrong, (right[train] + torch.randint(1, 10, (600,))) % 10, right[train])
net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
STEPS = 60


def inner_loss(model, meta, batch):
    return (meta.sigmoid() * cross_entropy(model(images[train]), labels, reduction="none")).mean()


def outer_loss(model, meta, batch):
    return cross_entropy(model(images[trusted]), right[trusted])


problem = bilevel.GradientDescent(inner_loss, outer_loss, net, bilevel.optimizer(torch.optim.Adam, lr=0.01))
adam = bilevel.optimizer(torch.optim.Adam, lr=0.3)
result = bilevel.fit(
    problem, torch.zeros(600), STEPS, estimator=bilevel.Reverse(), steps=40, optimizer=adam, progress=False
)


def trained(weights, x, y):  # the same network, by plain PyTorch
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    model.load_state_dict(net.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (weights * cross_entropy(model(x), y, reduction="none")).mean().backward()
        optimizer.step()
    return model.requires_grad_(False)


models = {
    "learned weights": trained(result.meta.sigmoid(), images[train], labels),
    "all examples": trained(torch.ones(600), images[train], labels),
    "trusted alone": trained(torch.ones(100), images[trusted], right[trusted]),
}
losses = {name: cross_entropy(model(images[train]), labels, reduction="none") for name, model in models.items()}
scores = {**losses, "learned weights": -result.meta}
results = {f"area under ROC, {name}": float(roc_auc_score(wrong, score)) for name, score in scores.items()}
for name, model in models.items():
    results[f"test accuracy, {name}"] = (model(images[test]).argmax(1) == right[test]).double().mean().item()
drawing, (left, middle) = style.figure()
left.hist([result.meta.sigmoid()[~wrong], result.meta.sigmoid()[wrong]], 20, color=[style.OURS, style.OTHER])
left.legend(["right labels", "wrong labels"])
left.set(xlabel="learned weight", ylabel="examples")
for shift, kind in ((-0.2, "area under ROC"), (0.2, "test accuracy")):
    heights = [results[f"{kind}, {name}"] for name in models]
    middle.bar([i + shift for i in range(3)], heights, 0.38, label=kind, color=style.OURS if shift < 0 else style.OTHER)
middle.set(xticks=range(3), xticklabels=[name.replace(" ", "\n") for name in models], ylim=(0.5, 1.15))
middle.legend(loc="upper center", ncols=2, fontsize=9)
style.finish(drawing, __file__, results)
