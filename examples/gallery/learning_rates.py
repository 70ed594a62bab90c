"""A learning rate for each layer and each step, against random search with the same compute.

The inner loop is a `Problem` with its own step, because the rate depends on the step: a batch is its number.
One exact hypergradient costs about four inner loops, so random search may try four settings for each outer step.
Random search over a single rate is hard to beat: if one rate will do, search for it.
"""

import math

import style
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import bilevel

torch.manual_seed(0)
(pixels, targets), order = load_digits(return_X_y=True), torch.randperm(1797)
images, labels = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(targets)[order]
train, valid, test = slice(0, 300), slice(300, 900), slice(900, None)
start = [0.3 * torch.randn(64, 32), 0.3 * torch.randn(32, 32), 0.3 * torch.randn(32, 10)]
STEPS, OUTER = 20, 60


def loss(weights, part):
    hidden = torch.tanh(torch.tanh(images[part] @ weights[0]) @ weights[1])
    return cross_entropy(hidden @ weights[2], labels[part])


def step(weights, log_rates, t):
    gradients = torch.func.grad(loss)(weights, train)
    return [w - log_rates[t, layer].exp() * g for layer, (w, g) in enumerate(zip(weights, gradients, strict=True))]


problem = bilevel.Problem(lambda meta: start, step, lambda weights, meta, batch: loss(weights, valid))
adam = bilevel.optimizer(torch.optim.Adam, lr=0.1)
tried = [torch.full((STEPS, 3), math.log(0.3))]
learned = bilevel.fit(
    problem,
    tried[0],
    range(STEPS),
    estimator=bilevel.Reverse(),
    steps=OUTER,
    optimizer=adam,
    callbacks=[lambda outer: tried.append(outer.meta)],
    progress=False,
)


def trained(log_rates):
    weights = start
    for t in range(STEPS):
        weights = step(weights, log_rates, t)
    return weights


def best_of(settings, losses):  # every method keeps the best setting so far: large rates make the loss jump
    return settings[int(losses.argmin())], losses.cummin(0).values


def random(shape):  # rates between 0.01 and 10; the best so far after 4, 8, 12, ... inner loops
    settings = [(10 ** (3 * torch.rand(shape) - 2)).log().expand(STEPS, 3) for _ in range(4 * OUTER)]
    losses = torch.stack([loss(trained(rates), valid) for rates in settings]).nan_to_num(torch.inf)
    return best_of(settings, losses)


best = best_of(tried[:OUTER], torch.tensor([row["outer_loss"] for row in learned.history]))
drawing, (left, right) = style.figure()
curves = {
    "learned, 60 rates": (*best, 4, style.OURS),
    "random, 60 rates": (*random((STEPS, 3)), 1, style.GREY),
    "random, 1 rate": (*random((1, 1)), 1, style.OTHER),
}
results = {}
for name, (rates, losses, price, color) in curves.items():
    left.plot(range(price, 4 * OUTER + 1, price), losses, label=name, color=color)
    for part, there in (("validation", valid), ("test", test)):
        results[f"{part} loss, {name}"] = float(loss(trained(rates), there))
left.set(xlabel="inner loops", ylabel="validation loss", ylim=(0.3, 1.0))
left.legend()
right.plot(range(1, STEPS + 1), best[0].exp(), label=["layer 1", "layer 2", "layer 3"])
right.set(xlabel="inner step", ylabel="learned rate", yscale="log")
right.legend(fontsize=9, loc="lower left")
style.finish(drawing, __file__, results)
