"""log p(x) by importance sampling from the posterior: the importance-weighted bound, and how exact it is.

Source: Burda, Grosse and Salakhutdinov 2016, "Importance Weighted Autoencoders", section 3; the errors are
those of the delta method, as in Nowozin 2018, "Debiasing Evidence Approximations", section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models import VAE
from ..models.mlp import MLPDecoder
from ..models.model import Model, as_model, evaluating, likelihood_of, log_variance_of
from ..ops import reparameterize, sample_and_kl
from ..ops.pages import keep_pages
from .evaluate import Batch, inputs, with_places
from .flips import FlipWeigher
from .reach import TurnedWeigher
from .weigh import Weigher

_DRAWS_TO_TURN = 8  # for which it pays to turn x


class EvaluationError(ValueError):
    """A model or data that cannot be evaluated so; the message says what was got and what was expected."""


@dataclass(frozen=True)
class LogLikelihood:
    """ln p(x) of each datum, estimated by K draws z of its posterior with the weights w = p(x, z) / q(z|x).

    All tensors are float64 [N] on the CPU, in the order of the data, in nats where they have a unit.

    n_samples: K.
    features: D, the elements of one x.
    log_px: L_K = ln mean_k w_k, whose expectation is at most ln p(x) and rises with K to it.
    elbo: mean_k ln w_k, which is at most L_K, and whose expectation is the ELBO.
    kl: KL(q(z|x) || p(z)), in closed form.
    log_px_variance: Var(w) / (K mean(w)^2), the variance of L_K to first order; NaN for K = 1.
    elbo_variance: of the mean of ln w; NaN for K = 1.
    effective_samples: (sum w)^2 / sum w^2, from 1, where one draw has all the weight, to K.
    """

    n_samples: int
    features: int
    log_px: Tensor
    elbo: Tensor
    kl: Tensor
    log_px_variance: Tensor
    elbo_variance: Tensor
    effective_samples: Tensor

    @property
    def estimate(self) -> float:
        """L_K averaged over the data: the estimate of their mean ln p(x), a lower bound in expectation."""
        return self.log_px.mean().item()

    @property
    def monte_carlo_error(self) -> float:
        """The standard error of `estimate` that the draws of z make; these data are taken as given."""
        return _error_of_mean(self.log_px_variance)

    @property
    def data_error(self) -> float:
        """The standard error of `estimate` as that of all data of which these are a sample; NaN for one."""
        return _error_over_data(self.log_px)

    @property
    def bias(self) -> float:
        """How far `estimate` is expected to be from ln p(x), to first order: -Var(w) / (2 K mean(w)^2) <= 0.

        It is itself an estimate, and too small where few draws have all the weight.
        """
        return -0.5 * self.log_px_variance.mean().item()

    @property
    def gap(self) -> float:
        """ln p(x) - ELBO averaged over the data, at least 0: the KL of q(z|x) to the true posterior."""
        return (self.log_px - self.elbo).mean().item()

    @property
    def elbo_error(self) -> float:
        """The standard error of the mean ELBO that the draws of z make."""
        return _error_of_mean(self.elbo_variance)

    @property
    def elbo_data_error(self) -> float:
        """The standard error of the mean ELBO over data, as `data_error`."""
        return _error_over_data(self.elbo)

    def bits_per_dimension(self, levels: int | None = None) -> float:
        """-ln p(x) / (D ln 2) + log2 of `levels`: what a code by the model takes for one of the D values.

        levels: s for x = (k + u) / s with integers k and u uniform on [0, 1): 255 for pixels. The integers
            then take at most so many bits (Theis et al. 2016, section 3.1). None is for data that are
            integers themselves, and have probabilities: bits under "bernoulli".
        """
        bits = -self.estimate / (self.features * math.log(2))
        return bits if levels is None else bits + math.log2(levels)


@torch.no_grad()
def log_likelihood(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    n_samples: int = 100,
    seed: int = 0,
    logvar_clamp: tuple[float, float] | None = None,
) -> LogLikelihood:
    """ln p(x) of all data by importance sampling, in eval mode; in float64 where the model is.

    model: one with `encode` and `decode`, as VAE; "mse" is N(x_hat, I / 2), with its constant.
    batches: x [B, *item] or (x, y) each. Draw k of a datum depends on `seed`, on k and on the datum's place
        among the data, not on the batch size.
    n_samples: K, at least 1. Memory does not grow with it.
    logvar_clamp: bounds of the posterior's log variance, as in training.

    Raises ValueError for no data, ModelError for a model without encode and decode, EvaluationError where
    the model's numbers are not finite.
    """
    sampler = ImportanceSampler(model, n_samples, seed)
    for first_row, x, mu, logvar in posteriors(model, batches, logvar_clamp):
        sampler.update(x, mu, logvar, first_row)
    return sampler.result()


def posteriors(
    model: nn.Module,
    batches: Iterable[Batch],
    logvar_clamp: tuple[float, float] | None = None,
    prepare: Callable[[Tensor, int], Tensor] | None = None,
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(place of the first row, x, mu, logvar) of each batch, on the model's device; empty ones are left out.

    The model is in eval mode meanwhile. prepare: what is done to x first, from x and its place.
    """
    model = as_model(model)
    weight = next(model.parameters())
    device, dtype = weight.device, torch.float64 if weight.dtype == torch.float64 else torch.float32
    with evaluating(model), torch.autocast(device.type, enabled=False):
        for first_row, batch in with_places(batches):
            (x,) = inputs([batch], device, dtype)
            if len(x) == 0:
                continue
            x = x if prepare is None else prepare(x, first_row)
            mu, logvar = model.encode(x)
            yield first_row, x, mu, logvar if logvar_clamp is None else logvar.clamp(*logvar_clamp)


class ImportanceSampler:
    """Gathers ln p(x) of all data, batch by batch on their device, as `log_likelihood` does.

    The model's weights are those that it has now. The first data are looked at for numbers that are not
    finite when they are taken in, and all at the end: each look waits for a GPU.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, n_samples: int = 100, seed: int = 0) -> None:
        if n_samples < 1:
            raise ValueError(f"n_samples: got {n_samples}, expected at least 1")
        self.model, self.n_samples, self.seed = as_model(model), n_samples, seed
        self._weigher = weigher_of(self.model, n_samples)
        keep_pages()
        self._features = 0
        self._places: list[Tensor] = []
        self._columns: list[tuple[Tensor, ...]] = []

    @torch.no_grad()
    def update(self, x: Tensor, mu: Tensor, logvar: Tensor, first_row: int) -> None:
        """Take in x [B, *item] with its posteriors, [B, *latents]; first_row: the place of x[0]."""
        self._features = math.prod(x.shape[1:])
        constant = 0.5 * self._features * math.log(math.pi) if likelihood_of(self.model) == "mse" else 0.0
        most_data, most_draws = self._weigher.tile(x)
        for first, n_data in _spans(len(x), most_data):
            rows, place = slice(first, first + n_data), first_row + first
            log_weights = self._weigher.near(x[rows], mu[rows], logvar[rows])
            weights, zeros = _Weights(), torch.zeros_like(mu[rows])
            for k, n in _spans(self.n_samples, max(1, round(most_draws / n_data))):
                eps = reparameterize(zeros, zeros, n_samples=n, seed=self.seed, offset=k, first_row=place)
                weights.update(log_weights(eps))
            _, kl = sample_and_kl(mu[rows], logvar[rows], seed=self.seed)
            log_px, mean, *others = weights.moments()
            self._places.append(torch.arange(place, place + n_data))
            self._columns.append((log_px - constant, mean - constant, kl.double(), *others))
            if len(self._columns) == 1:
                self._read()

    def result(self) -> LogLikelihood:
        """Of all that was taken in. Raises ValueError for no data."""
        if not self._columns:
            raise ValueError("batches: got no data to evaluate on, expected at least one batch")
        return LogLikelihood(self.n_samples, self._features, *self._read())

    def _read(self) -> list[Tensor]:
        """The columns, on the CPU. Raises EvaluationError where they are not finite."""
        columns = [torch.cat(column).cpu() for column in zip(*self._columns, strict=True)]
        bad = ~torch.stack(columns[:3]).isfinite().all(0)
        if bad.any():
            i = int(bad.nonzero()[0])
            log_px, elbo, kl = (column[i] for column in columns[:3])
            got = f"ln p(x) {log_px:g}, ELBO {elbo:g}, KL {kl:g} for datum {torch.cat(self._places)[i]}"
            hint = "its weights, or x, may hold some that are not"
            raise EvaluationError(f"model: got {got}, expected finite numbers; {hint}")
        return columns


def weigher_of(model: Model, n_samples: int) -> Weigher:
    """What finds ln w at the least cost, for so many draws a datum.

    Of a `VAE.mlp` under squared error or one variance, if it is as it was made, x_hat is not computed.
    """
    if type(model) is not VAE or type(model.decoder) is not MLPDecoder or "decode" in vars(model):
        return Weigher(model)
    *hidden, last = layers = model.decoder.layers
    single = torch.as_tensor(log_variance_of(model)).numel() == 1
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.decoder.modules())
    if type(last) is not nn.Linear or model.likelihood == "bernoulli" or not single or hooked:
        return Weigher(model)
    if last.in_features >= last.out_features or last.bias is None or n_samples < _DRAWS_TO_TURN:
        return Weigher(model)
    return FlipWeigher.of(model, hidden, last, n_samples) or TurnedWeigher(model, layers[:-1], last)


class _Weights:
    """The moments of w and of ln w over all draws, [B] each, from some draws at a time, stable in log space.

    Sums of w are relative to the largest w; ln w is merged as by Chan, Golub and LeVeque 1979.
    """

    def __init__(self) -> None:
        self.count = 0

    def update(self, log_w: Tensor) -> None:
        """Take in ln w of more draws, [n, B]."""
        n = len(log_w)
        variance, mean = torch.var_mean(log_w, 0, correction=0)
        largest = log_w.amax(0)
        w = torch.exp(log_w - largest)
        own = (largest, w.sum(0), w.square().sum(0), mean, variance * n)
        if self.count == 0:
            self.count, self._sums = n, own
            return
        total = self.count + n
        top = torch.maximum(self._sums[0], largest)
        old, new = torch.exp(self._sums[0] - top), torch.exp(largest - top)
        delta = mean - self._sums[3]
        self._sums = (
            top,
            self._sums[1] * old + own[1] * new,
            self._sums[2] * old.square() + own[2] * new.square(),
            self._sums[3] + delta * (n / total),
            self._sums[4] + own[4] + delta.square() * (self.count * n / total),
        )
        self.count = total

    def moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """ln mean w, mean ln w, the variance of the first to first order, that of the second, and the draws
        that count."""
        largest, total, squares, mean, deviations = self._sums
        n = self.count
        effective = total.square() / squares
        # sum of (w - mean)^2 / (n (n - 1) mean^2)
        unused = torch.full_like(total, math.nan) if n == 1 else (n / effective - 1).clamp(min=0) / (n - 1)
        elbo_variance = torch.full_like(total, math.nan) if n == 1 else deviations / (n * (n - 1))
        return largest + torch.log(total / n), mean, unused, elbo_variance, effective


def _spans(n: int, size: int) -> Iterator[tuple[int, int]]:
    """[0, n) in the fewest pieces of at most `size`, all about as long: where each begins, and its length."""
    pieces = max(1, -(-n // size))
    size = max(1, -(-n // pieces))
    for first in range(0, n, size):
        yield first, min(size, n - first)


def _error_of_mean(variances: Tensor) -> float:
    return variances.sum().sqrt().item() / len(variances)


def _error_over_data(values: Tensor) -> float:
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
