"""The operator in plain torch: the specification that the native and the Triton kernels are tested against.

Differentiable any number of times, on any device, in float32 or float64.

Sources: Kingma and Welling 2014, "Auto-Encoding Variational Bayes", equation 10 and appendix B; Salmon et
al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox4x32-10); Box and Muller 1958.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .limits import transform
from .types import Extents, Forward, Inputs, Spec, compute_dtype

_MASK = 0xFFFFFFFF
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)

# Minimax polynomials of the Cephes library (logf, sinf, cosf), highest power first. The three
# implementations share them, so that the same words give the same normals.
LOG_POLY = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
SIN_POLY = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS_POLY = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
LN2_HI, LN2_LO = 0.693359375, -2.12194440e-4

# 1 / (k + 2)!, highest power first: (exp(v) - 1 - v) / v^2
KL_SERIES = tuple(1.0 / math.factorial(k + 2) for k in reversed(range(10)))


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit counter words and two 32-bit key words to four 32-bit words.

    Words are int64 tensors that hold values in [0, 2^32); they broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap, but their 64 bits are those of the unsigned product
        p0, p1 = c0 * _PHILOX_M[0], c2 * _PHILOX_M[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _PHILOX_W[0]) & _MASK, (k1 + _PHILOX_W[1]) & _MASK
    return c0, c1, c2, c3


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals, float32, from two 32-bit words: (r cos, r sin) of r = sqrt(-2 ln u), 2 pi u'."""
    u = radius_word.to(torch.float32) * 2.0**-32 + 2.0**-33
    mantissa, exponent = torch.frexp(u)  # u = mantissa * 2^exponent, mantissa in [1/2, 1)
    low = mantissa < math.sqrt(0.5)
    f = torch.where(low, 2 * mantissa, mantissa) - 1
    e = (exponent - low.to(exponent.dtype)).to(torch.float32)
    f2 = f * f
    ln_u = f + (_horner(LOG_POLY, f) * f * f2 + e * LN2_LO - 0.5 * f2) + e * LN2_HI
    r = torch.sqrt(-2 * ln_u.clamp(max=0))

    # 2 pi (w + 1/2) / 2^32 = q pi/2 + t with t in [-pi/4, pi/4], from the integer, so that nothing is lost
    quarter = (angle_word + (1 << 29)) >> 30
    t = ((angle_word - (quarter << 30)).to(torch.float32) * 2.0**-32 + 2.0**-33) * (2 * math.pi)
    t2 = t * t
    sin_t = t + t * t2 * _horner(SIN_POLY, t2)
    cos_t = 1 - 0.5 * t2 + t2 * t2 * _horner(COS_POLY, t2)
    swap = (quarter & 1).bool()
    # the sign is 1 - 0 or 1 - 2; in float32 whatever torch's default
    cos = torch.where(swap, sin_t, cos_t) * (1 - ((quarter + 1) & 2).to(torch.float32))
    sin = torch.where(swap, cos_t, sin_t) * (1 - (quarter & 2).to(torch.float32))
    return r * cos, r * sin


def normal(
    samples: int,
    batch: int,
    latents: int,
    seed: int | Tensor,
    *,
    offset: int = 0,
    first_row: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normals, float32 [samples, batch, latents], a pure function of (seed, offset, place).

    Element (k, b, j) is normal i = (first_row + b) * latents + j of the stream (seed, offset + k): word
    i % 4 of the Philox block with counter (i // 4, offset + k).
    """
    seed = _tensor(seed, torch.int64, device)
    i = torch.arange(batch * latents, dtype=torch.int64, device=device) + first_row * latents
    stream = torch.arange(samples, dtype=torch.int64, device=device)[:, None] + offset
    group = i >> 2
    words = philox(
        (group & _MASK, (group >> 32) & _MASK, stream & _MASK, (stream >> 32) & _MASK),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    n0, n1 = box_muller(words[0], words[1])
    n2, n3 = box_muller(words[2], words[3])
    lane = i & 3
    eps = torch.where(lane < 2, torch.where(lane == 0, n0, n1), torch.where(lane == 2, n2, n3))
    return eps.reshape(samples, batch, latents)


def exp_minus_1_minus(v: Tensor) -> Tensor:
    """f(v) = exp(v) - 1 - v, without cancellation where |v| is small; never negative."""
    near = v.abs() < (1.0 if v.dtype == torch.float32 else 1 / 16)
    v_near = torch.where(near, v, torch.zeros_like(v))
    v_far = torch.where(near, torch.ones_like(v), v)
    return torch.where(near, v_near * v_near * _horner(KL_SERIES, v_near), torch.expm1(v_far) - v_far)


def kl_elements(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) by element, in nats: mu^2 / 2 + f(logvar) / 2."""
    return 0.5 * mu * mu + 0.5 * exp_minus_1_minus(logvar)


def recon_elements(x_hat: Tensor, x: Tensor, log_scale: Tensor | float, spec: Spec) -> Tensor:
    """-log p(x | z) by element, in nats ("mse": the squared error, or half of it under `half`)."""
    if spec.likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(x_hat, x.expand_as(x_hat), reduction="none")
    if spec.likelihood == "probabilities":
        return _cross_entropy(x_hat, x)
    if spec.likelihood in ("gaussian", "laplace"):
        s = _tensor(log_scale, x_hat.dtype, x_hat.device)
        power = 0.5 if spec.likelihood == "gaussian" else 1.0
        # a scale below the smallest number must not make 0 * inf of an error of 0
        scaled = (x_hat - x) * torch.exp(-power * s).clamp(max=torch.finfo(x_hat.dtype).max)
        if spec.likelihood == "gaussian":
            return 0.5 * (scaled.square() + s) + spec.constant
        return scaled.abs() + s + spec.constant
    error = (x_hat - x).square()
    return 0.5 * error if spec.half else error


def _cross_entropy(x_hat: Tensor, x: Tensor) -> Tensor:
    """The Bernoulli's -log p(x | z) by element, from probabilities.

    Raises ValueError for values outside [0, 1] on a CPU, where torch looks; on a GPU nobody waits for them.
    """
    try:
        with torch.autocast(x_hat.device.type, enabled=False):  # which forbids it, for fear of float16
            return F.binary_cross_entropy(x_hat, x.expand_as(x_hat), reduction="none")
    except RuntimeError as error:
        expected = {
            "x_hat": "probabilities, in [0, 1], with from_logits=False; True, the default, takes logits",
            "x": "data in [0, 1]; divide pixels by 255, or give them as uint8",
        }
        for name, values in (("x_hat", x_hat), ("x", x)):
            if values.device.type == "cpu" and not bool(((values >= 0) & (values <= 1)).all()):
                low, high = (float(bound) for bound in values.detach().aminmax())
                got = f"values from {low:g} to {high:g}"
                raise ValueError(f"{name}: got {got}, expected {expected[name]}") from error
        raise


def clamp_logvar(logvar: Tensor, spec: Spec) -> Tensor:
    """logvar within `spec.logvar_clamp`, as `clamped` has it."""
    return logvar if spec.logvar_clamp is None else clamped(logvar, *spec.logvar_clamp)


def clamped(logvar: Tensor, low: float, high: float) -> Tensor:
    """logvar within [low, high]; NaN stays NaN, and the gradient outside is zero.

    The bounds are inside, with every version of torch, whose own clamp has no gradient there since 2.15.
    """
    inside = (logvar >= low) & (logvar <= high)
    return torch.where(inside, logvar, logvar.detach().clamp(low, high))


def forward(inputs: Inputs, spec: Spec, extents: Extents) -> Forward:
    """The stages that `spec` asks for."""
    loss = recon = kl = z = kl_rows = None
    if spec.likelihood:
        loss, recon, kl = elbo(inputs, spec, extents)
    if spec.sample:
        z, kl_rows = sample_and_kl(inputs, spec, extents)
    return Forward(loss, recon, kl, z, kl_rows)


def backward(
    inputs: Inputs, spec: Spec, extents: Extents, upstream: Forward, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the first eight inputs that are needed, differentiable again where grad is enabled.

    upstream: the gradients for the fields of Forward; None is zero.
    """
    create_graph = torch.is_grad_enabled()
    given: list[Any] = list(inputs)
    wanted = [i for i, needed in enumerate(needs) if needed]
    with torch.enable_grad():
        for i in wanted:
            # an alias, since x_hat may itself depend on mu: partial derivatives are asked for
            given[i] = given[i].view_as(given[i])
        outputs = forward(Inputs(*given), spec, extents)
        pairs = [
            (o, g.reshape(o.shape))
            for o, g in zip(outputs, upstream, strict=True)
            if o is not None and g is not None and o.requires_grad
        ]
        gradients: list[Tensor | None] = [None] * len(needs)
        if pairs:
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [given[i] for i in wanted],
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
            for i, g in zip(wanted, found, strict=True):
                gradients[i] = g
    return gradients


def sample_and_kl(inputs: Inputs, spec: Spec, extents: Extents) -> tuple[Tensor, Tensor]:
    """z = mu + sigma eps as [K, B, Z] in mu's dtype, and the KL of each datum as [B]."""
    mu, logvar, seed = inputs.mu, inputs.logvar, inputs.seed
    assert mu is not None
    assert logvar is not None
    assert seed is not None
    dtype = compute_dtype(mu, logvar)
    m = mu.reshape(extents.batch, extents.latents).to(dtype)
    v = clamp_logvar(logvar.reshape(extents.batch, extents.latents).to(dtype), spec)
    eps = normal(
        extents.samples,
        extents.batch,
        extents.latents,
        seed,
        offset=spec.offset,
        first_row=spec.first_row,
        device=mu.device,
    )
    z = m + torch.exp(0.5 * v) * eps.to(dtype)
    return z.to(mu.dtype), kl_elements(m, v).sum(1)


def elbo(inputs: Inputs, spec: Spec, extents: Extents) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, recon, kl) of x_hat [K, B, D], x [B, D] and either mu and logvar [B, Z] or kl [B]."""
    x_hat, x, mu, logvar, kl, weight, beta, log_scale, _ = inputs
    assert x_hat is not None
    assert x is not None
    dtype = inputs.compute_dtype
    target = x.reshape(extents.batch, extents.features).to(dtype)
    if x.dtype == torch.uint8:
        target = target / 255
    output = x_hat.reshape(extents.samples, extents.batch, extents.features).to(dtype)
    w = torch.ones((), dtype=dtype, device=x.device) if weight is None else weight.to(dtype)[:, None]

    def recon_of(output: Tensor, target: Tensor, scale: float | Tensor = log_scale) -> Tensor:
        return recon_elements(output, target, scale, spec).sum((0, 2))

    def kl_of(*parts: Tensor) -> Tensor:
        return parts[0] if len(parts) == 1 else kl_elements(*parts)

    def dropped(rows_of: Callable[..., Tensor], *parts: Tensor) -> Tensor:
        # [B, 1]: rows without weight leave before anything is computed, so that no 0 * inf comes back; but a
        # weight that may have a gradient has that of its row, if the row is finite
        if weight is None or not (weight.requires_grad or transform()):
            return w == 0
        return (w == 0) & ~rows_of(*parts).isfinite()[:, None]

    data: tuple[Tensor, ...] = (output, target)
    if isinstance(log_scale, Tensor):
        data = (*data, log_scale.to(dtype).reshape(spec.scale_shape(extents)))
    no_recon = dropped(recon_of, *data)
    data = _without(no_recon, *data)
    if spec.best_variance:
        output, target, best = data
        data = (output, target, _through_best(best, output, target, w, extents))
    recon_rows = recon_of(*data)

    latents: tuple[Tensor, ...]
    if kl is not None:
        latents = (kl.to(dtype)[:, None],)
    elif mu is None or logvar is None:
        latents = (recon_rows.new_zeros(extents.batch, 1),)
    else:
        v = clamp_logvar(logvar.reshape(extents.batch, extents.latents).to(dtype), spec)
        latents = (mu.reshape(extents.batch, extents.latents).to(dtype), v)
    no_kl = dropped(lambda *parts: kl_of(*parts).sum(1), *latents)
    latents = _without(no_kl, *latents)

    def floored(elements: Tensor) -> Tensor:
        # at and below the floor without a gradient; NaN stays
        if spec.free_bits is None:
            return elements
        return torch.where(elements <= spec.free_bits, torch.full_like(elements, spec.free_bits), elements)

    elements = kl_of(*latents)
    counted = floored(elements)
    factor = _tensor(beta, dtype, x.device).reshape(-1)
    # what is finite stays where beta is 0: it adds 0 to the loss, and the KL to the gradient of that beta
    no_beta = (factor == 0) & ~counted.isfinite()
    weighted = torch.where(no_beta, 0.0, factor * floored(kl_of(*_without(no_beta, *latents))))

    def reduce(rows: Tensor, no_rows: Tensor, scale: float) -> Tensor:
        rows = rows if weight is None else torch.where(no_rows[:, 0], 0.0, w[:, 0] * rows)
        return (rows if spec.per_sample else rows.sum()) * scale

    recon = reduce(recon_rows, no_recon, spec.recon_scale(extents))
    kl_scale = spec.kl_scale(extents)
    kl_term = reduce(elements.sum(1), no_kl, kl_scale)
    return recon + reduce(weighted.sum(1), no_kl, kl_scale), recon, kl_term


def _through_best(
    log_variance: Tensor, output: Tensor, target: Tensor, w: Tensor, extents: Extents
) -> Tensor:
    """`log_variance`, the batch's optimum, with the derivatives of ln of the mean squared error."""
    elements = (w.sum() if w.ndim else w * extents.batch) * (extents.samples * extents.features)
    mean = (w * (output - target) ** 2).sum() / torch.where(elements == 0, 1, elements)
    best = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
    return log_variance + (best - best.detach())


def latent_kl_sums(inputs: Inputs, spec: Spec, extents: Extents) -> Tensor:
    """The KL of each latent, [Z], summed over the batch with its weights."""
    mu, logvar, weight = inputs.mu, inputs.logvar, inputs.weight
    assert mu is not None
    assert logvar is not None
    dtype = compute_dtype(mu, logvar)
    m = mu.reshape(extents.batch, extents.latents).to(dtype)
    v = clamp_logvar(logvar.reshape(extents.batch, extents.latents).to(dtype), spec)
    if weight is None:
        return kl_elements(m, v).sum(0)
    w = weight.to(dtype)[:, None]
    return (w * kl_elements(*_without(w == 0, m, v))).sum(0)


def _without(dropped: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with zeros where something is dropped, so that no 0 * inf comes of it."""
    return tuple(torch.where(dropped, torch.zeros_like(t), t) for t in tensors)


def _tensor(value: float | Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """`torch.as_tensor`, which torch.jit.trace takes for a constant of a tensor too."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.as_tensor(value, dtype=dtype, device=device)


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    result = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        result = result * x + c
    return result
