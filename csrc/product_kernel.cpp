// The products of product.hpp. Compiled for each kind of elements, as FASTVAE_MULTIPLY, and called only where there is
// AVX512, and AVX512_BF16 for those.
#include <cstring>

#include "product_elements.hpp"

namespace fastvae {
namespace {

using Element = Elements::Element;
constexpr int per_unit = Elements::per_unit;
// Of c, what is in registers while k is gone through: 24 sums, which hide the latency of the multiplications.
constexpr int block_rows = 8, block_vectors = 3;
constexpr std::int64_t units_of_sum = 512 / per_unit;

constexpr std::int64_t ceil_div(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }
constexpr std::int64_t larger(std::int64_t x, std::int64_t y) { return x > y ? x : y; }
constexpr std::int64_t smaller(std::int64_t x, std::int64_t y) { return x < y ? x : y; }

std::int64_t row_blocks(const Product& p) { return ceil_div(p.m, block_rows); }
std::int64_t vectors(const Product& p) { return ceil_div(p.n, lanes); }
std::int64_t units(const Product& p) { return ceil_div(p.k, per_unit); }

// Where the units of the rows of a are: bytes from row to row and from unit to unit.
struct Rows {
    const char* data;
    std::int64_t row, unit;
};

// The sums over `count` units for R rows of a and V vectors of columns of b, [count, V, lanes].
template <int R, int V>
[[gnu::always_inline]] inline void add_up(Rows a, const Unit* b, std::int64_t count, __m512 (&sum)[R][V]) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
        for (int j = 0; j < V; ++j) sum[i][j] = _mm512_setzero_ps();
    for (; count > 0; --count) {
        __m512i columns[V];
#pragma GCC unroll 3
        for (int j = 0; j < V; ++j) columns[j] = _mm512_load_si512(b + j * lanes);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            int of_row;
            std::memcpy(&of_row, a.data + i * a.row, sizeof(of_row));
            const __m512i row = _mm512_set1_epi32(of_row);
#pragma GCC unroll 3
            for (int j = 0; j < V; ++j) sum[i][j] = Elements::add_product(sum[i][j], row, columns[j]);
        }
        a.data += a.unit;
        b += V * lanes;
    }
}

// Write a vector of sums to c, or the `mask` of it, with what is to be done to them before.
[[gnu::always_inline]] inline void put(
    Element* c, const Element* bias, bool relu, const Element* where, __mmask16 mask, __m512 sum) {
    const __m512 zero = _mm512_setzero_ps();
    if (bias) sum = _mm512_add_ps(sum, Elements::load(mask, bias));
    if (relu) sum = _mm512_max_ps(zero, sum);  // a NaN stays one
    if (where)
        sum = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(Elements::load(mask, where), zero, _CMP_NLE_UQ), sum);
    Elements::store(mask, c, sum);
}

// c in R rows and V vectors of columns, from there on.
template <int R, int V>
void block(const Product& p, const Rows& rows, const Unit* b, std::int64_t row, std::int64_t column) {
    const Rows a = rows;
    const std::int64_t n = p.n, count = units(p);
    __m512 sum[R][V];
    add_up(a, b, smaller(count, units_of_sum), sum);
    for (std::int64_t unit = units_of_sum; unit < count; unit += units_of_sum) {
        alignas(64) float before[R][V][lanes];
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
            for (int j = 0; j < V; ++j) _mm512_store_ps(before[i][j], sum[i][j]);
        add_up({a.data + unit * a.unit, a.row, a.unit}, b + unit * V * lanes, smaller(count - unit, units_of_sum), sum);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
            for (int j = 0; j < V; ++j) sum[i][j] = _mm512_add_ps(sum[i][j], _mm512_load_ps(before[i][j]));
    }
    Element* const c = static_cast<Element*>(p.c) + row * n + column;
    const Element* const bias = p.bias ? static_cast<const Element*>(p.bias) + column : nullptr;
    const Element* const where = p.where ? static_cast<const Element*>(p.where) + row * n + column : nullptr;
    const bool relu = p.relu;
    const auto all = first<__mmask16>(lanes), last = first<__mmask16>(n - column - (V - 1) * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
        for (int j = 0; j < V; ++j) {
            const std::int64_t at = i * n + j * lanes;
            put(c + at, bias ? bias + j * lanes : nullptr, relu, where ? where + at : nullptr,
                j < V - 1 ? all : last, sum[i][j]);
        }
}

using Block = void (*)(const Product&, const Rows&, const Unit*, std::int64_t, std::int64_t);

template <int R>
constexpr Block blocks_of_rows[block_vectors] = {block<R, 1>, block<R, 2>, block<R, 3>};

constexpr const Block* blocks[block_rows] = {
    blocks_of_rows<1>, blocks_of_rows<2>, blocks_of_rows<3>, blocks_of_rows<4>,
    blocks_of_rows<5>, blocks_of_rows<6>, blocks_of_rows<7>, blocks_of_rows<8>};

// Transpose 16 x 16 units.
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

[[gnu::noinline]] void pack_along(Lines<Element> from, std::int64_t k, std::int64_t width, Packed to) {
    const std::int64_t count = ceil_div(k, per_unit);
    const auto [data, n, line, along] = from;
    for (std::int64_t at = 0; at < width; at += lanes)
        for (std::int64_t unit = 0; unit < count; unit += lanes) {
            const std::int64_t done = per_unit * unit;
            const Element* const begin = data + at * line + done;
            __m512i r[lanes];
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i)
                r[i] = at + i < n ? Elements::load_along(begin + i * line, k - done) : _mm512_setzero_si512();
            transpose(r);
            const std::int64_t there = smaller(lanes, count - unit);
            Unit* const out = to.at(unit, at);
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i)
                if (i < there) _mm512_store_si512(out + i * to.unit, r[i]);
        }
}

[[gnu::noinline]] void pack_across(Lines<Element> from, std::int64_t k, std::int64_t width, Packed to) {
    for (std::int64_t unit = 0; per_unit * unit < k; ++unit) Elements::pack_across(from, k, width, unit, to);
}

// Put the units of k of `width` lines together, those beyond n as zeros.
void pack(Lines<Element> from, std::int64_t k, std::int64_t width, Packed to) {
    from.along == 1 ? pack_along(from, k, width, to) : pack_across(from, k, width, to);
}

// Whether the units of a can be read where they lie.
bool has_units(const Product& p) { return p.a.column == 1 && p.k % per_unit == 0; }

// Part i of n things in `parts`.
std::int64_t begin(std::int64_t n, std::int64_t parts, std::int64_t i) { return n * i / parts; }

// These rows of c, a multiple of block_rows from the first, and vectors of columns.
void multiply_part(
    const Product& p, std::int64_t row, std::int64_t rows, std::int64_t vector, std::int64_t wide_of_part, Unit* memory) {
    if (rows <= 0 || wide_of_part == 0) return;
    const std::int64_t count = units(p);
    Unit* const columns = memory;
    Unit* const packed = columns + count * block_vectors * lanes;
    const Element* const a = static_cast<const Element*>(p.a.data) + row * p.a.row;
    const Element* const b = static_cast<const Element*>(p.b.data);
    if (!has_units(p))  // [rows / lanes, count, lanes]
        pack({a, rows, p.a.row, p.a.column}, p.k, rows, {packed, lanes, count});
    const std::int64_t panels = ceil_div(wide_of_part, block_vectors);
    for (std::int64_t panel = 0; panel < panels; ++panel) {
        const std::int64_t from = vector + begin(wide_of_part, panels, panel);
        const std::int64_t wide = vector + begin(wide_of_part, panels, panel + 1) - from, column = from * lanes;
        pack({b + column * p.b.column, p.n - column, p.b.column, p.b.row}, p.k, wide * lanes, {columns, wide * lanes, 1});
        for (std::int64_t at = 0; at < rows; at += block_rows) {
            constexpr std::int64_t size = sizeof(Element), of_unit = sizeof(Unit);
            const auto there = has_units(p)
                ? Rows{reinterpret_cast<const char*>(a + at * p.a.row), p.a.row * size, p.a.column * of_unit}
                : Rows{reinterpret_cast<const char*>(packed + at / lanes * lanes * count + at % lanes), of_unit, lanes * of_unit};
            blocks[smaller(block_rows, rows - at) - 1][wide - 1](p, there, columns, row + at, column);
        }
    }
}

// Rows and columns of c are cut into so many parts, each for one thread.
struct Cut {
    int rows = 1, columns = 1;
};

// So that the largest part takes the least time: in cycles for a unit of k, roughly, with that for packing.
Cut cut_product(const Product& p) {
    Cut best;
    std::int64_t least = 0;
    for (int columns = p.threads; columns >= 1; --columns) {
        const int rows = p.threads / columns;
        const std::int64_t high = ceil_div(row_blocks(p), rows), wide = ceil_div(vectors(p), columns);
        constexpr std::int64_t latency = 6;
        const std::int64_t cycles = high * larger(wide * block_rows / 2, latency) + (has_units(p) ? 0 : 3 * high)
            + wide * (p.b.row == 1 ? 9 : 6);
        if (least == 0 || cycles < least) {
            least = cycles;
            best = {rows, columns};
        }
    }
    return best;
}

std::size_t units_of_part(const Product& p, const Cut& cut) {
    const std::int64_t rows = has_units(p) ? 0 : (ceil_div(row_blocks(p), cut.rows) + 1) * block_rows;
    return static_cast<std::size_t>(ceil_div(units(p) * (rows + block_vectors * lanes), lanes) * lanes);
}

}  // namespace

void FASTVAE_MULTIPLY(const Product& p, ProductMemory& memory) {
    const Cut cut = cut_product(p);
    const int parts = cut.rows * cut.columns;
    const std::size_t of_part = units_of_part(p, cut);
    Unit* const begins = memory.at_least(static_cast<std::size_t>(parts) * of_part);
#pragma omp parallel for num_threads(parts) schedule(static)
    for (int part = 0; part < parts; ++part) {
        const int i = part / cut.columns, j = part % cut.columns;
        const std::int64_t row = begin(row_blocks(p), cut.rows, i) * block_rows;
        const std::int64_t end = smaller(begin(row_blocks(p), cut.rows, i + 1) * block_rows, p.m);
        const std::int64_t vector = begin(vectors(p), cut.columns, j);
        const std::int64_t wide = begin(vectors(p), cut.columns, j + 1) - vector;
        multiply_part(p, row, end - row, vector, wide, begins + static_cast<std::size_t>(part) * of_part);
    }
}

}  // namespace fastvae
