"""The mathematics of one element, in float32: exp and its relatives, KL, the likelihoods and their slopes.

exp, expm1 and log1p are written out because Triton's exp loses digits as its argument grows, it has neither
of the others, and libdevice does not run in the interpreter. The polynomials are those of the Cephes library.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from .rng import SQRT_HALF_BITS, log_near_one

# of float32
LARGEST = tl.constexpr(3.4028234663852886e38)
# 1.5 * 2^23: adding it rounds a float32 to an integer, which then stands in the low bits
ROUNDING = tl.constexpr(12582912.0)
ROUNDING_BITS = tl.constexpr(0x4B400000)


@triton.jit
def times(factor, term):
    """factor * term, where a factor of exactly 0 drops even an infinite term."""
    return tl.where(factor == 0.0, 0.0, factor * term)


@triton.jit
def clamp(b, low, high):
    """b within [low, high]; NaN stays NaN, which Triton's own clamp would drop."""
    b = tl.where(b < low, low, b)
    return tl.where(b > high, high, b)


@triton.jit
def exp(b):
    """e^b within 2 units in the last place: inf where it overflows, 0 where it underflows, NaN of NaN."""
    b = clamp(b, -104.0, 89.0)
    b_rounded = b * 1.4426950408889634 + ROUNDING
    b_n = b_rounded.to(tl.int32, bitcast=True) - ROUNDING_BITS
    b_whole = b_rounded - ROUNDING
    # ln 2 in two parts: the first has so few bits that its product with b_whole is exact
    b_rest = b - b_whole * 0.693359375 - b_whole * -2.12194440e-4
    p = 1.9875691500e-4
    p = p * b_rest + 1.3981999507e-3
    p = p * b_rest + 8.3334519073e-3
    p = p * b_rest + 4.1665795894e-2
    p = p * b_rest + 1.6666665459e-1
    p = p * b_rest + 5.0000001201e-1
    p = p * b_rest * b_rest + b_rest + 1.0
    # 2^n in two factors, each a normal number, so that subnormal results and overflow come out right
    b_half = b_n >> 1
    p *= ((b_half + 127) << 23).to(tl.float32, bitcast=True)
    return p * ((b_n - b_half + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def kl_series(v):
    """exp(v) - 1 - v for |v| < 1: v^2 times the sum of v^k / (k + 2)!."""
    p = 1.0 / 39916800
    p = p * v + 1.0 / 3628800
    p = p * v + 1.0 / 362880
    p = p * v + 1.0 / 40320
    p = p * v + 1.0 / 5040
    p = p * v + 1.0 / 720
    p = p * v + 1.0 / 120
    p = p * v + 1.0 / 24
    p = p * v + 1.0 / 6
    p = p * v + 0.5
    return v * v * p


@triton.jit
def exp_minus_1_minus(v):
    """f(v) = exp(v) - 1 - v without cancellation where |v| is small; never negative."""
    return tl.where(tl.abs(v) < 1.0, kl_series(v), exp(v) - 1.0 - v)


@triton.jit
def expm1(v):
    """exp(v) - 1, which is the slope of f."""
    return tl.where(tl.abs(v) < 1.0, v + kl_series(v), exp(v) - 1.0)


@triton.jit
def log1p(t):
    """ln(1 + t) for t in [0, 1], relative to t accurate however small t is."""
    # beyond sqrt(2) the mantissa of 1 + t is (1 + t) / 2, and (t - 1) / 2 is exact
    high = t > 0.41421356
    return log_near_one(tl.where(high, 0.5 * t - 0.5, t), tl.where(high, 1.0, 0.0))


@triton.jit
def load_target(p, b_mask):
    """x in float32, where uint8 means x / 255."""
    b_x = tl.load(p, mask=b_mask, other=0).to(tl.float32)
    if p.dtype.element_ty == tl.uint8:
        # 1 / 255 in two parts: the first product is exact, so that the sum is a quotient rounded once
        b_x = b_x * (257.0 / 65536) + b_x * (1.0 / 255 - 257.0 / 65536)
    return b_x


@triton.jit
def ln(p):
    """ln p, also where p is subnormal; -inf of 0, NaN below."""
    low = p < 1e-36
    p_normal = tl.where(low, p * 16777216.0, p)
    bits = p_normal.to(tl.int32, bitcast=True)
    e = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    b_ln = log_near_one(f, (tl.where(low, e - 24, e)).to(tl.float32))
    b_ln = tl.where(p == 0.0, float("-inf"), b_ln)
    return tl.where(p >= 0.0, b_ln, float("nan"))


@triton.jit
def ln_of_complement(p):
    """ln(1 - p) for p in [0, 1], relative to p accurate where p is small."""
    # up to 1 - sqrt(1/2) no power of 2 is taken out; beyond, 1 - p has lost nothing that counts
    near = p < 0.29289321
    return tl.where(near, log_near_one(-tl.where(near, p, 0.0), 0.0), ln(1.0 - p))


@triton.jit
def inverse_scale(b_log_scale, LIKELIHOOD: tl.constexpr):
    """1 / standard deviation of the Gaussian, 1 / scale of the Laplace; finite, so that 0 times it is 0."""
    b_inverse = exp(-0.5 * b_log_scale) if LIKELIHOOD == "gaussian" else exp(-b_log_scale)
    return tl.where(b_inverse > LARGEST, LARGEST, b_inverse)


@triton.jit
def recon_element(b_x_hat, b_x, b_log_scale, b_inverse, constant, LIKELIHOOD: tl.constexpr):
    """-log p(x | z) of an element, in nats; for "mse" the squared error."""
    if LIKELIHOOD == "bernoulli":
        # (softplus(l) - x l), where l (step(l) - x) loses nothing as x nears 1
        b_step = tl.where(b_x_hat > 0.0, 1.0, 0.0)
        return b_x_hat * (b_step - b_x) + log1p(exp(-tl.abs(b_x_hat)))
    elif LIKELIHOOD == "probabilities":
        b_ln, b_ln_other = ln(b_x_hat), ln_of_complement(b_x_hat)
        b_ln = tl.where(b_ln < -100.0, -100.0, b_ln)
        b_ln_other = tl.where(b_ln_other < -100.0, -100.0, b_ln_other)
        return (b_x - 1.0) * b_ln_other - b_x * b_ln
    elif LIKELIHOOD == "gaussian":
        b_scaled = (b_x_hat - b_x) * b_inverse
        return 0.5 * (b_scaled * b_scaled + b_log_scale) + constant
    elif LIKELIHOOD == "laplace":
        return tl.abs(b_x_hat - b_x) * b_inverse + b_log_scale + constant
    else:
        return (b_x_hat - b_x) * (b_x_hat - b_x)


@triton.jit
def recon_slope(b_x_hat, b_x, b_inverse, LIKELIHOOD: tl.constexpr):
    """d recon_element / d x_hat."""
    if LIKELIHOOD == "bernoulli":
        # sigmoid(l) - x from the smaller of sigmoid(l) and 1 - sigmoid(l)
        b_t = exp(-tl.abs(b_x_hat))
        b_small = b_t / (1.0 + b_t)
        return tl.where(b_x_hat > 0.0, (1.0 - b_x) - b_small, b_small - b_x)
    elif LIKELIHOOD == "probabilities":
        # bounded as F.binary_cross_entropy bounds it
        b_spread = (1.0 - b_x_hat) * b_x_hat
        return (b_x_hat - b_x) / tl.where(b_spread < 1e-12, 1e-12, b_spread)
    elif LIKELIHOOD == "gaussian":
        return (b_x_hat - b_x) * b_inverse * b_inverse
    elif LIKELIHOOD == "laplace":
        b_d = b_x_hat - b_x
        b_sign = tl.where(b_d > 0.0, b_inverse, tl.where(b_d < 0.0, -b_inverse, 0.0))
        return tl.where(b_d == b_d, b_sign, b_d)  # NaN stays
    else:
        return 2.0 * (b_x_hat - b_x)


@triton.jit
def scale_slope(b_x_hat, b_x, b_inverse, LIKELIHOOD: tl.constexpr):
    """d recon_element / d log_scale."""
    b_scaled = (b_x_hat - b_x) * b_inverse
    if LIKELIHOOD == "gaussian":
        return 0.5 - 0.5 * b_scaled * b_scaled
    else:
        return 1.0 - tl.abs(b_scaled)
