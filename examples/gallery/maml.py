"""MAML and Meta-SGD: an initialisation from which a few gradient steps fit a sine wave from ten points.

The meta parameters are the initial weights and, for Meta-SGD, a learning rate for each of them. The inner loop adapts
25 tasks at once: every weight has a leading dimension for the task. For comparison, one network learns all tasks.
"""

import math

import style
import torch

import bilevel

STEPS, SHOTS, WIDTH = 5, 10, 40
SHAPES = {"w1": (1, WIDTH), "b1": (1, WIDTH), "w2": (WIDTH, WIDTH), "b2": (1, WIDTH), "w3": (WIDTH, 1), "b3": (1, 1)}


def sines(number, count=25):
    generator = torch.Generator().manual_seed(number)
    heights = 0.1 + 4.9 * torch.rand(count, 1, 1, generator=generator)
    x = 10 * torch.rand(count, 2 * SHOTS, 1, generator=generator) - 5
    y = heights * torch.sin(x + math.pi * torch.rand(count, 1, 1, generator=generator))
    return (x[:, :SHOTS], y[:, :SHOTS]), (x[:, SHOTS:], y[:, SHOTS:])  # to adapt to, and to judge


def loss(theta, meta, batch):
    hidden = torch.tanh(batch[0] @ theta["w1"] + theta["b1"])
    output = torch.tanh(hidden @ theta["w2"] + theta["b2"]) @ theta["w3"] + theta["b3"]
    return (output - batch[1]).square().mean((1, 2)).sum()  # a sum over tasks, so each adapts by itself


def for_each_task(tensors):
    return {name: tensor.expand(25, *tensor.shape) for name, tensor in tensors.items()}


generator = torch.Generator().manual_seed(0)
scales = {name: 0 if name[0] == "b" else (1 / shape[0]) ** 0.5 for name, shape in SHAPES.items()}
weights = {name: scales[name] * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
rates = {name: torch.full(shape, math.log(0.01)) for name, shape in SHAPES.items()}
support, query = sines(10**6)


def problem(rate):
    start = lambda meta: for_each_task(meta["weights"])  # noqa: E731
    return bilevel.GradientDescent(loss, loss, start, bilevel.optimizer(torch.optim.SGD, lr=rate))


def learned_rates(meta):
    return for_each_task({name: log_rate.exp() for name, log_rate in meta["log_rates"].items()})


drawing, axes = style.figure(1)
results = {}
for method, meta, training_rate, rate, color in [
    ("one network for all tasks", {"weights": weights}, 0.0, 0.01, style.GREY),  # no adaptation while it trains
    ("MAML", {"weights": weights}, 0.01, 0.01, style.OTHER),
    ("Meta-SGD", {"weights": weights, "log_rates": rates}, learned_rates, learned_rates, style.OURS),
]:
    adam = bilevel.optimizer(torch.optim.Adam, lr=1e-2)
    outer = {"estimator": bilevel.Reverse("graph"), "steps": 300, "optimizer": adam, "progress": False}
    batches = (lambda k: [sines(k)[0]] * STEPS), (lambda k: sines(k)[1])
    meta = bilevel.fit(problem(training_rate), meta, *batches, **outer).meta
    judge = [bilevel.Reverse("graph")(problem(rate), meta, [support] * steps, query) for steps in range(1, 11)]
    errors = [float(estimate.value) / len(query[0]) for estimate in judge]
    axes.plot(range(1, 11), errors, label=method, color=color)
    results[f"squared error after {STEPS} steps, {method}"] = errors[STEPS - 1]
axes.set(xlabel="gradient steps on ten points", ylabel="squared error", ylim=(0, None))
axes.legend()
style.finish(drawing, __file__, results)
