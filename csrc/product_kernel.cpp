// The products of product.hpp. Compiled for AVX512_BF16, and called only where there is that.
#include "product.hpp"

#include <immintrin.h>

#include <cstring>

namespace fastvae {
namespace {

constexpr int lanes = 16;
// Of c, what is in registers while k is gone through: 24 sums, which hide the latency of the multiplications.
constexpr int block_rows = 8, block_vectors = 3;
constexpr std::int64_t pairs_of_sum = 256;

constexpr std::int64_t ceil_div(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }
constexpr std::int64_t larger(std::int64_t x, std::int64_t y) { return x > y ? x : y; }
constexpr std::int64_t smaller(std::int64_t x, std::int64_t y) { return x < y ? x : y; }

template <class Mask>
Mask first(std::int64_t n) {  // of a vector's lanes
    constexpr int bits = 8 * sizeof(Mask);
    return n >= bits ? static_cast<Mask>(~Mask{0}) : n <= 0 ? Mask{0} : static_cast<Mask>((Mask{1} << n) - 1);
}

// Where the pairs of the rows of a are: bytes from row to row and from pair to pair.
struct Rows {
    const char* data;
    std::int64_t row, pair;
};

__m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// The sums over `pairs` for R rows of a and V vectors of columns of b, [pairs, V, lanes].
template <int R, int V>
[[gnu::always_inline]] inline void add_up(Rows a, const Pair* b, std::int64_t pairs, __m512 (&sum)[R][V]) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
        for (int j = 0; j < V; ++j) sum[i][j] = _mm512_setzero_ps();
    for (; pairs > 0; --pairs) {
        __m512bh columns[V];
#pragma GCC unroll 3
        for (int j = 0; j < V; ++j) columns[j] = reinterpret_cast<__m512bh>(_mm512_load_si512(b + j * lanes));
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            int both;
            std::memcpy(&both, a.data + i * a.row, sizeof(both));
            const auto of_row = reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
#pragma GCC unroll 3
            for (int j = 0; j < V; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], of_row, columns[j]);
        }
        a.data += a.pair;
        b += V * lanes;
    }
}

// Write 16 sums to c, or the `mask` of them, with what is to be done to them before.
[[gnu::always_inline]] inline void put(
    Bf16* c, const Bf16* bias, bool relu, const Bf16* where, __mmask16 mask, __m512 sum) {
    const __m512 zero = _mm512_setzero_ps();
    if (bias) sum = _mm512_add_ps(sum, widened(_mm256_maskz_loadu_epi16(mask, bias)));
    if (relu) sum = _mm512_max_ps(zero, sum);  // a NaN stays one
    if (where) {
        const __m512 x = widened(_mm256_maskz_loadu_epi16(mask, where));
        sum = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, zero, _CMP_NLE_UQ), sum);
    }
    _mm256_mask_storeu_epi16(c, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
}

// c in R rows and V vectors of columns, from there on.
template <int R, int V>
void block(const Product& p, const Rows& rows, const Pair* b, std::int64_t row, std::int64_t column) {
    const Rows a = rows;
    const std::int64_t n = p.n, pairs = ceil_div(p.k, 2);
    __m512 sum[R][V];
    add_up(a, b, smaller(pairs, pairs_of_sum), sum);
    for (std::int64_t pair = pairs_of_sum; pair < pairs; pair += pairs_of_sum) {
        alignas(64) float before[R][V][lanes];
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
            for (int j = 0; j < V; ++j) _mm512_store_ps(before[i][j], sum[i][j]);
        add_up(
            {a.data + pair * a.pair, a.row, a.pair}, b + pair * V * lanes, smaller(pairs - pair, pairs_of_sum), sum);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
            for (int j = 0; j < V; ++j) sum[i][j] = _mm512_add_ps(sum[i][j], _mm512_load_ps(before[i][j]));
    }
    Bf16* const c = p.c + row * n + column;
    const Bf16* const bias = p.bias ? p.bias + column : nullptr;
    const Bf16* const where = p.where ? p.where + row * n + column : nullptr;
    const bool relu = p.relu;
    const auto all = first<__mmask16>(lanes), last = first<__mmask16>(n - column - (V - 1) * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
        for (int j = 0; j < V; ++j) {
            const std::int64_t at = i * n + j * lanes;
            put(c + at, bias ? bias + j * lanes : nullptr, relu, where ? where + at : nullptr, j < V - 1 ? all : last,
                sum[i][j]);
        }
}

using Block = void (*)(const Product&, const Rows&, const Pair*, std::int64_t, std::int64_t);

template <int R>
constexpr Block blocks_of_rows[block_vectors] = {block<R, 1>, block<R, 2>, block<R, 3>};

constexpr const Block* blocks[block_rows] = {
    blocks_of_rows<1>, blocks_of_rows<2>, blocks_of_rows<3>, blocks_of_rows<4>,
    blocks_of_rows<5>, blocks_of_rows<6>, blocks_of_rows<7>, blocks_of_rows<8>};

// Transpose 16 x 16 pairs.
void transpose(__m512i (&r)[lanes]) {
    __m512i t[lanes];
#pragma GCC unroll 8
    for (int i = 0; i < lanes; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < lanes; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
        for (int half = 0; half < lanes; half += 8) {
            t[half + i] = _mm512_shuffle_i32x4(r[half + i], r[half + i + 4], 0x88);
            t[half + i + 4] = _mm512_shuffle_i32x4(r[half + i], r[half + i + 4], 0xdd);
        }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// Lines of which k is one dimension: the columns of b or the rows of a. Strides from line to line and along k.
struct Lines {
    const Bf16* data;
    std::int64_t n, line, along;
};

// Where the pairs of lines go: 16 lines together at a time, and so far from pair to pair and from line to line.
struct Packed {
    Pair* data;
    std::int64_t pair, line;

    Pair* at(std::int64_t i, std::int64_t j) const { return data + i * pair + j * line; }
};

[[gnu::noinline]] void pack_along(Lines from, std::int64_t k, std::int64_t width, Packed to) {
    const std::int64_t pairs = ceil_div(k, 2);
    const auto [data, n, line, along] = from;
    for (std::int64_t at = 0; at < width; at += lanes)
        for (std::int64_t pair = 0; pair < pairs; pair += lanes) {
            const auto mask = first<__mmask32>(k - 2 * pair);
            const Bf16* const begin = data + at * line + 2 * pair;
            __m512i r[lanes];
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i)
                r[i] = at + i < n ? _mm512_maskz_loadu_epi16(mask, begin + i * line) : _mm512_setzero_si512();
            transpose(r);
            const std::int64_t there = smaller(lanes, pairs - pair);
            Pair* const out = to.at(pair, at);
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i)
                if (i < there) _mm512_store_si512(out + i * to.pair, r[i]);
        }
}

[[gnu::noinline]] void pack_across(Lines from, std::int64_t k, std::int64_t width, Packed to) {
    alignas(64) static constexpr Bf16 low[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                                 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i lows = _mm512_load_si512(low), highs = _mm512_add_epi16(lows, _mm512_set1_epi16(lanes));
    const auto [data, n, line, along] = from;
    for (std::int64_t pair = 0; 2 * pair < k; ++pair) {
        const Bf16* const even = data + 2 * pair * along;
        const bool has_odd = 2 * pair + 1 < k;
        for (std::int64_t at = 0; at < width; at += 2 * lanes) {
            const auto mask = first<__mmask32>(n - at);
            const __m512i x = _mm512_maskz_loadu_epi16(mask, even + at);
            const __m512i y = has_odd ? _mm512_maskz_loadu_epi16(mask, even + along + at) : _mm512_setzero_si512();
            _mm512_store_si512(to.at(pair, at), _mm512_permutex2var_epi16(x, lows, y));
            if (at + lanes < width) _mm512_store_si512(to.at(pair, at + lanes), _mm512_permutex2var_epi16(x, highs, y));
        }
    }
}

// Put the pairs of k of `width` lines together, those beyond n as zeros.
void pack(Lines from, std::int64_t k, std::int64_t width, Packed to) {
    from.along == 1 ? pack_along(from, k, width, to) : pack_across(from, k, width, to);
}

// Whether the pairs of a can be read where they lie.
bool has_pairs(const Product& p) { return p.a.column == 1 && p.k % 2 == 0; }

// Part i of n things in `parts`.
std::int64_t begin(std::int64_t n, std::int64_t parts, std::int64_t i) { return n * i / parts; }

// These rows of c, a multiple of block_rows from the first, and vectors of columns.
void multiply_part(
    const Product& p, std::int64_t row, std::int64_t rows, std::int64_t vector, std::int64_t vectors, Pair* memory) {
    if (rows <= 0 || vectors == 0) return;
    const std::int64_t pairs = ceil_div(p.k, 2), row_blocks = ceil_div(rows, block_rows);
    Pair* const columns = memory;
    Pair* const packed = columns + pairs * block_vectors * lanes;
    if (!has_pairs(p))  // [rows / lanes, pairs, lanes]
        pack({p.a.data + row * p.a.row, rows, p.a.row, p.a.column}, p.k, rows, {packed, lanes, pairs});
    const std::int64_t panels = ceil_div(vectors, block_vectors);
    for (std::int64_t panel = 0; panel < panels; ++panel) {
        const std::int64_t from = vector + begin(vectors, panels, panel);
        const std::int64_t wide = vector + begin(vectors, panels, panel + 1) - from, column = from * lanes;
        pack({p.b.data + column * p.b.column, p.n - column, p.b.column, p.b.row}, p.k, wide * lanes, {columns, wide * lanes, 1});
        for (std::int64_t i = 0; i < row_blocks; ++i) {
            const std::int64_t at = i * block_rows, high = smaller(block_rows, rows - at);
            const auto there = has_pairs(p)
                ? Rows{reinterpret_cast<const char*>(p.a.data + (row + at) * p.a.row), 2 * p.a.row, sizeof(Pair)}
                : Rows{reinterpret_cast<const char*>(packed + at / lanes * lanes * pairs + at % lanes), sizeof(Pair), lanes * sizeof(Pair)};
            blocks[high - 1][wide - 1](p, there, columns, row + at, column);
        }
    }
}

std::int64_t row_blocks(const Product& p) { return ceil_div(p.m, block_rows); }
std::int64_t vectors(const Product& p) { return ceil_div(p.n, lanes); }

}  // namespace

// So that the largest part takes the least time: in cycles for a pair of k, roughly, with that for packing.
Cut cut_product(const Product& p) {
    Cut best;
    std::int64_t least = 0;
    for (int columns = p.threads; columns >= 1; --columns) {
        const int rows = p.threads / columns;
        const std::int64_t blocks = ceil_div(row_blocks(p), rows), wide = ceil_div(vectors(p), columns);
        constexpr std::int64_t latency = 6;
        const std::int64_t cycles = blocks * larger(wide * block_rows / 2, latency) + (has_pairs(p) ? 0 : 3 * blocks)
            + wide * (p.b.row == 1 ? 9 : 6);
        if (least == 0 || cycles < least) {
            least = cycles;
            best = {rows, columns};
        }
    }
    return best;
}

std::size_t pairs_of_part(const Product& p, const Cut& cut) {
    const std::int64_t rows = has_pairs(p) ? 0 : (ceil_div(row_blocks(p), cut.rows) + 1) * block_rows;
    return static_cast<std::size_t>(ceil_div(ceil_div(p.k, 2) * (rows + block_vectors * lanes), lanes) * lanes);
}

void multiply_parts(const Product& p, const Cut& cut, Pair* memory) {
    const int parts = cut.rows * cut.columns;
    const std::size_t pairs = pairs_of_part(p, cut);
#pragma omp parallel for num_threads(parts) schedule(static)
    for (int part = 0; part < parts; ++part) {
        const int i = part / cut.columns, j = part % cut.columns;
        const std::int64_t row = begin(row_blocks(p), cut.rows, i) * block_rows;
        const std::int64_t end = smaller(begin(row_blocks(p), cut.rows, i + 1) * block_rows, p.m);
        const std::int64_t vector = begin(vectors(p), cut.columns, j);
        const std::int64_t wide = begin(vectors(p), cut.columns, j + 1) - vector;
        multiply_part(p, row, end - row, vector, wide, memory + static_cast<std::size_t>(part) * pairs);
    }
}

}  // namespace fastvae
