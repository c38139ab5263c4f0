"""Philox4x32-10 words to standard normals: the same words, polynomials and order as `ops.reference.normal`.

Written without `tl.rand`, `tl.cos` and `tl.sin`: those bring float64 and a stack frame, and other normals.

Sources: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Box and Muller 1958; the
polynomials are those of the Cephes library (logf, sinf, cosf).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

PHILOX_M0 = tl.constexpr(0xD2511F53)
PHILOX_M1 = tl.constexpr(0xCD9E8D57)
PHILOX_W0 = tl.constexpr(0x9E3779B9)
PHILOX_W1 = tl.constexpr(0xBB67AE85)
TWO_PI = tl.constexpr(6.283185307179586)
# the bits of sqrt(1/2) in float32: mantissas are taken from [sqrt(1/2), sqrt(2))
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four words of counter and two of key, all uint32, to four random words."""
    for _ in tl.static_range(10):
        # one widening multiplication gives the high and the low half together
        p0 = c0.to(tl.uint64) * PHILOX_M0
        p1 = c2.to(tl.uint64) * PHILOX_M1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        # the key wraps on purpose, which Triton's debug mode would report
        k0 = tl.add(k0, PHILOX_W0, sanitize_overflow=False)
        k1 = tl.add(k1, PHILOX_W1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def words_at(group, stream, seed):
    """The four words of block `group` of noise stream `stream`; all three arguments are int64."""
    return philox(
        group.to(tl.uint32), (group >> 32).to(tl.uint32),
        tl.zeros_like(group).to(tl.uint32) + stream.to(tl.uint32),
        tl.zeros_like(group).to(tl.uint32) + (stream >> 32).to(tl.uint32),
        seed.to(tl.uint32), (seed >> 32).to(tl.uint32),
    )  # fmt: skip


@triton.jit
def log_near_one(f, e):
    """ln((1 + f) 2^e) for 1 + f in [sqrt(1/2), sqrt(2)); relative to f accurate where e is 0."""
    p = 7.0376836292e-2
    p = p * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    f2 = f * f
    return f + (p * f * f2 + e * -2.12194440e-4 - 0.5 * f2) + e * 0.693359375


@triton.jit
def box_muller(radius_word, angle_word):
    """Two standard normals from two words: (r cos, r sin) with r = sqrt(-2 ln u) and an angle 2 pi u'."""
    u = radius_word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    r = tl.sqrt(-2.0 * tl.minimum(log_near_one(f, e.to(tl.float32)), 0.0))

    # The angle is quarter pi/2 + t with t in [-pi/4, pi/4], taken from the integer, so that nothing is lost:
    # the low 30 bits with their sign are what is left of the nearest quarter.
    quarter = ((angle_word >> 29) + 1) >> 1
    rest = (angle_word << 2).to(tl.int32, bitcast=True) >> 2
    t = (rest.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10) * TWO_PI
    t2 = t * t
    sin_t = t + t * t2 * ((-1.9515295891e-4 * t2 + 8.3321608736e-3) * t2 - 1.6666654611e-1)
    cos_p = (2.443315711809948e-5 * t2 - 1.388731625493765e-3) * t2 + 4.166664568298827e-2
    cos_t = 1.0 - 0.5 * t2 + t2 * t2 * cos_p
    swap = (quarter & 1) != 0
    cos = tl.where(swap, sin_t, cos_t)
    sin = tl.where(swap, cos_t, sin_t)
    cos = tl.where(((quarter + 1) & 2) != 0, -cos, cos)
    sin = tl.where((quarter & 2) != 0, -sin, sin)
    return r * cos, r * sin


@triton.jit
def normals_of_groups(group, stream, seed):
    """The normals 4 group .. 4 group + 3, side by side: [..., G] int64 to [..., 4 G]."""
    w0, w1, w2, w3 = words_at(group, stream, seed)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def normals_at(place, stream, seed):
    """Normal number `place` of the stream, for each element of an int64 block."""
    w0, w1, w2, w3 = words_at(place >> 2, stream, seed)
    # choosing the pair of words first leaves one Box-Muller transform an element
    second = (place & 2) != 0
    cos, sin = box_muller(tl.where(second, w2, w0), tl.where(second, w3, w1))
    return tl.where((place & 1) != 0, sin, cos)
