#include "flips.hpp"

#include <vector>

namespace fastvae {
namespace {

template <class T>
struct alignas(64) Line {
    T lanes[64 / sizeof(T)];
};

// Pieces of a whole number of cache lines, one after another.
template <class T>
class Pieces {
public:
    explicit Pieces(std::int64_t n) : lines_(static_cast<std::size_t>(n) * sizeof(T) / sizeof(Line<T>)) {}
    T* take(std::int64_t n) {
        T* const piece = lines_.front().lanes + taken_;
        taken_ += n;
        return piece;
    }

private:
    std::vector<Line<T>> lines_;
    std::int64_t taken_ = 0;
};

}  // namespace

void run(const Flips& call, FlipsKernel kernel) {
    const std::int64_t rows = (call.latents + call.units) * call.width();
    const std::int64_t y = flip_draws * call.width(), delta = flip_draws * call.units, ends = delta / flip_columns;
    Pieces<float> reals(call.threads * (rows + y + delta));
    Pieces<std::int32_t> indices(call.threads * (delta + ends));
    std::vector<FlipScratch> by_thread;
    for (int i = 0; i < call.threads; ++i)
        by_thread.push_back(
            {reals.take(rows), reals.take(y), reals.take(delta), indices.take(delta), indices.take(ends)});
    kernel(call, by_thread.data());
}

}  // namespace fastvae
