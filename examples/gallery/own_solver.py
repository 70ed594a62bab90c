"""An inner solver of one's own: scikit-learn's support vector machine, which nobody differentiates.

`BlackBox` needs a function from meta parameters to a result, and `ZerothOrder` takes differences of whole fits. It
tunes the two usual settings and a scale for each of 16 blocks of pixels. This is the wrong tool here, as the picture
shows: with as many fits, random search over the two usual settings alone ends lower. Take `ZerothOrder` where the outer
loss is smooth, many settings matter, and a good starting point is known.
"""

import numpy as np
import style
import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch.nn.functional import cross_entropy

import bilevel

pixels, targets = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(targets))
x, y = pixels[order] / 16, targets[order]
train, valid, test = slice(0, 150), slice(150, 500), slice(500, None)
fits = 0


def margins(log_settings, part):
    global fits
    fits += 1
    c, gamma, *scales = log_settings.exp().tolist()
    blocks = np.kron(np.reshape(scales or [1.0] * 16, (4, 4)), np.ones((2, 2))).flatten()
    machine = SVC(C=c, gamma=gamma, decision_function_shape="ovr").fit(x[train] * blocks, y[train])
    return torch.tensor(machine.decision_function(x[part] * blocks))


def loss(outputs, meta=None, batch=None):
    return cross_entropy(outputs, torch.tensor(y[valid]))


def accuracy(log_settings):
    return float((margins(log_settings, test).argmax(1).numpy() == y[test]).mean())


problem = bilevel.BlackBox(lambda meta: margins(meta, valid), loss)
start = torch.tensor([1.0, 0.02] + [1.0] * 16, dtype=torch.float64).log()
adam = bilevel.optimizer(torch.optim.Adam, lr=0.15)
learned = bilevel.fit(
    problem, start, estimator=bilevel.ZerothOrder(4, step_size=0.1), steps=30, optimizer=adam, progress=False
)
used = fits
generator = torch.Generator().manual_seed(0)
spread = torch.tensor([3.0, 3.0] + [1.0] * 16, dtype=torch.float64)


def random_search(size):
    tried = [start[:size] + spread[:size] * torch.randn(size, generator=generator) for _ in range(used)]
    losses = torch.stack([loss(margins(each, valid)) for each in tried])
    return tried[int(losses.argmin())], losses.cummin(0).values


results: dict[str, float] = {"fits of each method": used}
drawing, (left, right) = style.figure()
curves = {
    "ZerothOrder, 18": (learned.meta, [row["outer_loss"] for row in learned.history], style.OURS),
    "random, 18": (*random_search(18), style.GREY),
    "random, 2": (*random_search(2), style.OTHER),
}
for name, (settings, losses, color) in curves.items():
    left.plot(np.linspace(1, used, len(losses)), losses, label=name, color=color)
    results[f"validation loss, {name}"] = float(losses[-1])
    results[f"test accuracy, {name}"] = accuracy(settings)
left.set(xlabel="fits", ylabel="validation loss", ylim=(0.4, 1.0))
left.legend()
right.imshow(learned.meta[2:].exp().view(4, 4), cmap="Purples")
right.set(title="learned scales of the pixels", xticks=[], yticks=[])
style.finish(drawing, __file__, results)
