// Batch norm with its activation, and 1x1 and depthwise convolutions in front of it, forward and backward, in as few
// passes over memory as their data allow. kernels.py compiles, loads and calls this; what it computes is torch's, up to
// rounding.
//
// Maps are [N, H, W, C] float32 (torch's channels_last), C a multiple of 8. Threads share out rows or images in a fixed
// way, so that with one number of threads the same input always gives the same bits.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

template <int LANES> struct Vector {
    typedef float type __attribute__((vector_size(4 * LANES)));
    static constexpr int lanes = LANES;
    static type load(const float* from) {  // from anywhere: the compiler makes one unaligned load of it
        type value;
        std::memcpy(&value, from, sizeof value);
        return value;
    }
};

template <class V> void store(float* to, V value) { std::memcpy(to, &value, sizeof value); }

// Lanes of a register (of vectors that are wider compilers make slow code), and rows of the tiles of matrix products,
// whose ROWS x 3 sums stay in registers.
#if defined __AVX512F__
constexpr int WIDE = 16, ROWS = 8;
#elif defined __AVX__
constexpr int WIDE = 8, ROWS = 4;
#elif defined __aarch64__
constexpr int WIDE = 4, ROWS = 8;
#else
constexpr int WIDE = 4, ROWS = 4;
#endif

// Calls step(first channel, lanes) over all channels, a register at a time and eight channels at the end.
template <class Step> inline void over_channels(long C, Step step) {
    long c = 0;
    for (; c + WIDE <= C; c += WIDE) step(c, Vector<WIDE>{});
    if (c < C) step(c, Vector<8>{});
}

enum Activation { NONE, RELU, RELU6, HSWISH };

template <class V> V clip(V p) {  // to [0, 6]; NaN stays NaN
    p = p < 0 ? V{} : p;
    return p > 6 ? V{} + 6 : p;
}

template <int A, class V> V activate(V p) {
    if constexpr (A == RELU) return p < 0 ? V{} : p;
    if constexpr (A == RELU6) return clip(p);
    if constexpr (A == HSWISH) return p * clip(p + 3) * (1.0f / 6);
    return p;
}

template <int A, class V> V activation_gradient(V grad, V p) {  // the gradient of activate(p), given that of its result
    if constexpr (A == RELU) return p > 0 ? grad : V{};
    if constexpr (A == RELU6) {
        grad = p > 0 ? grad : V{};
        return p < 6 ? grad : V{};
    }
    if constexpr (A == HSWISH) {
        const V slope = p < -3 ? V{} : p * (1.0f / 3) + 0.5f;
        return grad * (p > 3 ? V{} + 1 : slope);
    }
    return grad;
}

// Calls work(std::integral_constant<int, A>) for the activation of that number.
template <class Work> void with(long activation, Work work) {
    switch (activation) {
        case RELU: work(std::integral_constant<int, RELU>{}); break;
        case RELU6: work(std::integral_constant<int, RELU6>{}); break;
        case HSWISH: work(std::integral_constant<int, HSWISH>{}); break;
        default: work(std::integral_constant<int, NONE>{});
    }
}

}  // namespace

extern "C" {
// A batch norm in training and what is behind it, as kernels.py lays them out: an activation, and unless they are
// null, gates [N, C] that scale its result. In the backward pass, spread [N, C] is what each pixel gets of the gradient
// of its channel's mean, which the gates are made of.
struct Norm {
    const float *gamma, *beta, *mean, *invstd;
    long activation;
    const float *gates, *spread;
};
}

namespace {

struct Gate {  // of one image, or none
    const float *gate = nullptr, *spread = nullptr;
    Gate() = default;
    Gate(const Norm& norm, long n, long C)
        : gate(norm.gates == nullptr ? nullptr : norm.gates + n * C),
          spread(norm.spread == nullptr ? nullptr : norm.spread + n * C) {}
    template <class V> typename V::type backward(typename V::type grad, long c) const {
        return gate == nullptr ? grad : grad * V::load(gate + c) + V::load(spread + c);
    }
};

struct Affine {  // p = x * scale + shift
    std::vector<float> scale, shift;
    Affine(const Norm& norm, long C) : scale(C), shift(C) {
        for (long c = 0; c < C; c++) {
            scale[c] = norm.gamma[c] * norm.invstd[c];
            shift[c] = norm.beta[c] - norm.mean[c] * scale[c];
        }
    }
};

// Mean and sum of squared deviations of each channel, merged from blocks of rows (Chan et al. 1979).
struct Moments {
    std::vector<double> mean, m2;
    double rows = 0;
    explicit Moments(long C) : mean(C, 0.0), m2(C, 0.0) {}

    // A block's mean and m2 for some channels; all channels of a block must come before rows is raised.
    void merge(long c, int lanes, const float* block_mean, const float* block_m2, double block_rows) {
        const double share = block_rows / (rows + block_rows), weight = rows * share;
        for (int i = 0; i < lanes; i++) {
            const double delta = block_mean[i] - mean[c + i];
            mean[c + i] += delta * share;
            m2[c + i] += block_m2[i] + delta * delta * weight;
        }
    }

    // A block's channels c ..., whose sums are known.
    template <class V> void add(const float* x, long count, long stride, long c, typename V::type sum) {
        typename V::type square{};
        const typename V::type centre = sum / float(count);
        for (long r = 0; r < count; r++) {
            const typename V::type off = V::load(x + r * stride + c) - centre;
            square += off * off;
        }
        float means[V::lanes], squares[V::lanes];
        store(means, centre);
        store(squares, square);
        merge(c, V::lanes, means, squares, double(count));
    }
};

void finish(const std::vector<Moments>& parts, long C, double eps, double momentum, float* running_mean,
            float* running_var, float* mean, float* invstd) {
    Moments all(C);
    for (const Moments& part : parts) {
        if (part.rows == 0) continue;
        const double share = part.rows / (all.rows + part.rows), weight = all.rows * share;
        for (long c = 0; c < C; c++) {
            const double delta = part.mean[c] - all.mean[c];
            all.mean[c] += delta * share;
            all.m2[c] += part.m2[c] + delta * delta * weight;
        }
        all.rows += part.rows;
    }
    for (long c = 0; c < C; c++) {
        mean[c] = float(all.mean[c]);
        invstd[c] = float(1 / std::sqrt(all.m2[c] / all.rows + eps));
        if (running_mean == nullptr) continue;
        running_mean[c] += float(momentum * (all.mean[c] - running_mean[c]));
        running_var[c] += float(momentum * (all.m2[c] / (all.rows - 1) - running_var[c]));
    }
}

long block_rows(long C) { return std::max(4L, 4096 / C); }  // 16 KiB: half of the fastest cache

void add_rows(const float* x, long first, long end, long C, Moments& moments) {
    const long step = block_rows(C);
    std::vector<float> sums(C);
    for (long start = first; start < end; start += step) {
        const long count = std::min(step, end - start);
        const float* block = x + start * C;
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (long r = 0; r < count; r += 4)  // in memory's order, for it is fetched here
            over_channels(C, [&](long c, auto v) {
                using V = decltype(v);
                auto sum = V::load(&sums[c]);
                for (long i = r; i < std::min(r + 4, count); i++) sum += V::load(block + i * C + c);
                store(&sums[c], sum);
            });
        over_channels(C, [&](long c, auto v) {
            using V = decltype(v);
            moments.add<V>(block, count, C, c, V::load(&sums[c]));
        });
        moments.rows += double(count);
    }
}

struct Side {  // a norm on one side of a convolution, or none
    const Norm* norm;
    std::optional<Affine> affine;
    Side(const Norm* norm, long C) : norm(norm) {
        if (norm != nullptr) affine.emplace(*norm, C);
    }
};

template <class Work> void share_out(long count, long threads, Work work) {  // work(thread, first, end)
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (long t = 0; t < threads; t++) work(t, count * t / threads, count * (t + 1) / threads);
}

// The gradient of a batch norm's input: scale * (ga - mean(ga) - xhat * mean(ga * xhat)), as
// (ga - average) * scale + (x - mean) * slope.
struct NormGradient {
    const float* mean;
    std::vector<float> average, slope;
    NormGradient(const Norm& norm, const double* sums, const double* products, long C, double rows)
        : mean(norm.mean), average(C), slope(C) {
        for (long c = 0; c < C; c++) {
            const double invstd = norm.invstd[c];
            average[c] = float(sums[c] / rows);
            slope[c] = float(-norm.gamma[c] * invstd * invstd * invstd * products[c] / rows);
        }
    }
};

// Sums over rows of ga and of ga * (x - mean), where ga is the gradient before the activation.
template <int A> void reduce(const float* grad, const float* x, long first, long end, long C, const Affine& affine,
                             const float* mean, const Gate& gate, double* sums, double* products) {
    const long step = block_rows(C);
    std::vector<float> sum(C), product(C);
    for (long start = first; start < end; start += step) {
        const long stop = std::min(end, start + step);
        std::fill(sum.begin(), sum.end(), 0.0f);
        std::fill(product.begin(), product.end(), 0.0f);
        for (long r = start; r < stop; r++)
            over_channels(C, [&](long c, auto v) {
                using V = decltype(v);
                const auto value = V::load(x + r * C + c);
                const auto ga = activation_gradient<A>(gate.template backward<V>(V::load(grad + r * C + c), c),
                                           value * V::load(&affine.scale[c]) + V::load(&affine.shift[c]));
                store(&sum[c], V::load(&sum[c]) + ga);
                store(&product[c], V::load(&product[c]) + ga * (value - V::load(mean + c)));
            });
        for (long c = 0; c < C; c++) {
            sums[c] += sum[c];
            products[c] += product[c];
        }
    }
}

struct Sums {  // of all threads
    std::vector<std::vector<double>> sums, products;
    Sums(long threads, long C) : sums(threads, std::vector<double>(C)), products(threads, std::vector<double>(C)) {}
    void finish(const Norm& norm, long C, float* to_gamma, float* to_beta) {
        for (size_t t = 1; t < sums.size(); t++)
            for (long c = 0; c < C; c++) {
                sums[0][c] += sums[t][c];
                products[0][c] += products[t][c];
            }
        for (long c = 0; c < C; c++) {
            to_gamma[c] = float(products[0][c] * norm.invstd[c]);
            to_beta[c] = float(sums[0][c]);
        }
    }
};

// The gradients of a norm's weights, and what that of its input is made of.
template <int A> NormGradient norm_sums(const float* grad, const float* x, float* to_gamma, float* to_beta, long rows,
                                        long C, const Norm& norm, const Affine& affine, long threads) {
    Sums sums(threads, C);
    share_out(rows, threads, [&](long t, long first, long end) {
        reduce<A>(grad, x, first, end, C, affine, norm.mean, {}, sums.sums[t].data(), sums.products[t].data());
    });
    sums.finish(norm, C, to_gamma, to_beta);
    return NormGradient(norm, sums.sums[0].data(), sums.products[0].data(), C, double(rows));
}

template <int A> void norm_gradient(const float* grad, const float* x, float* to_x, long first, long end, long C,
                                    const Affine& affine, const NormGradient& g, const Gate& gate) {
    for (long r = first; r < end; r++)
        over_channels(C, [&](long c, auto v) {
            using V = decltype(v);
            const auto value = V::load(x + r * C + c), scale = V::load(&affine.scale[c]);
            const auto ga = activation_gradient<A>(gate.template backward<V>(V::load(grad + r * C + c), c),
                                       value * scale + V::load(&affine.shift[c]));
            store(to_x + r * C + c, (ga - V::load(&g.average[c])) * scale +
                                        (value - V::load(g.mean + c)) * V::load(&g.slope[c]));
        });
}

template <int A> void apply_rows(const float* x, float* y, long first, long end, long C, const Affine& affine,
                                 const float* gate) {
    for (long r = first; r < end; r++)
        over_channels(C, [&](long c, auto v) {
            using V = decltype(v);
            const auto z = activate<A>(V::load(x + r * C + c) * V::load(&affine.scale[c]) + V::load(&affine.shift[c]));
            store(y + r * C + c, gate == nullptr ? z : z * V::load(gate + c));
        });
}

// sums [C] over rows of the activations of x, times grad unless it is null.
template <int A>
void sum_rows(const float* grad, const float* x, long rows, long C, const Affine& affine, float* sums) {
    std::fill_n(sums, C, 0.0f);
    for (long r = 0; r < rows; r++)
        over_channels(C, [&](long c, auto v) {
            using V = decltype(v);
            const auto z = activate<A>(V::load(x + r * C + c) * V::load(&affine.scale[c]) + V::load(&affine.shift[c]));
            store(sums + c, V::load(sums + c) + (grad == nullptr ? z : z * V::load(grad + r * C + c)));
        });
}

// Calls step(first column, vectors, lanes) over all columns, three vectors at a time and what is left at the end.
template <class Step> inline void over_panels(long columns, Step step) {
    using Wide = Vector<WIDE>;
    long c = 0;
    for (; c + 3 * WIDE <= columns; c += 3 * WIDE) step(c, std::integral_constant<int, 3>{}, Wide{});
    if (c + 2 * WIDE <= columns) {
        step(c, std::integral_constant<int, 2>{}, Wide{});
        c += 2 * WIDE;
    } else if (c + WIDE <= columns) {
        step(c, std::integral_constant<int, 1>{}, Wide{});
        c += WIDE;
    }
    if (c < columns) step(c, std::integral_constant<int, 1>{}, Vector<8>{});
}

// A matrix [inner, columns], whose element (i, c) is at i * step_inner + c * step_column, laid out panel by panel.
struct Panels {
    long inner, columns;
    std::vector<float> data;
    Panels(const float* matrix, long inner, long columns, long step_inner, long step_column)
        : inner(inner), columns(columns), data(size_t(inner) * columns) {
        over_panels(columns, [&](long first, auto vectors, auto v) {
            const long width = vectors * decltype(v)::lanes;
            for (long i = 0; i < inner; i++)
                for (long c = 0; c < width; c++)
                    data[first * inner + i * width + c] = matrix[i * step_inner + (first + c) * step_column];
        });
    }
};

template <int R, int J, class V>
inline void product(const float* x, const float* panel, float* y, long inner, long columns) {
    typename V::type sum[R][J] = {};
    for (long i = 0; i < inner; i++) {
        typename V::type w[J];
        for (int j = 0; j < J; j++) w[j] = V::load(panel + (i * J + j) * V::lanes);
        for (int r = 0; r < R; r++)
            for (int j = 0; j < J; j++) sum[r][j] += x[r * inner + i] * w[j];
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < J; j++) store(y + r * columns + j * V::lanes, sum[r][j]);
}

// y [rows, columns] = x [rows, inner] * matrix
void multiply(const float* x, const Panels& matrix, float* y, long rows) {
    const long inner = matrix.inner, columns = matrix.columns;
    over_panels(columns, [&](long c, auto vectors, auto v) {
        using V = decltype(v);
        const float* panel = &matrix.data[c * inner];
        long r = 0;
        for (; r + ROWS <= rows; r += ROWS)
            product<ROWS, vectors, V>(x + r * inner, panel, y + r * columns + c, inner, columns);
        for (; r < rows; r++) product<1, vectors, V>(x + r * inner, panel, y + r * columns + c, inner, columns);
    });
}

template <int J, class V>
inline void correlate(const float* a, const float* b, float* to, long rows, long A, long B) {
    typename V::type sum[ROWS][J] = {};
    for (long r = 0; r < rows; r++) {
        typename V::type value[J];
        for (int j = 0; j < J; j++) value[j] = V::load(b + r * B + j * V::lanes);
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < J; j++) sum[i][j] += a[r * A + i] * value[j];
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < J; j++) {
            float* at = to + i * B + j * V::lanes;
            store(at, V::load(at) + sum[i][j]);
        }
}

// to [A, B] += a [rows, A] transposed * b [rows, B]
void add_products(const float* a, const float* b, float* to, long rows, long A, long B) {
    over_panels(B, [&](long c, auto vectors, auto v) {
        for (long i = 0; i < A; i += ROWS)
            correlate<vectors, decltype(v)>(a + i, b + c, to + i * B + c, rows, A, B);
    });
}

long rows_at_once(long C, long O) { return std::clamp(32768 / (C + O) / 8 * 8, 32L, 512L); }  // 128 KiB of both

}  // namespace

extern "C" {
// A 1x1 convolution from C channels of x to those of a norm, and where the gradients go; to_x may be null.
struct Pointwise {
    const float *x, *weight;
    float *to_x, *to_weight;
    long C;
};
}

namespace {

// The gradients of a 1x1 convolution whose result y [rows, O] went through a norm; what the norm's gradient is made of
// is known. Block by block, so that the gradient of y is never written out.
template <int A> void pointwise_gradient(const float* grad, const float* y, long rows, long O, const Affine& affine,
                                         const NormGradient& gradient, const Pointwise& conv, long threads) {
    const long C = conv.C;
    const bool wider = O > C;  // the wider side lies in vectors
    const Panels back(conv.weight, O, C, C, 1);
    std::vector<std::vector<float>> weights(threads, std::vector<float>(size_t(O) * C));
    share_out(rows, threads, [&](long t, long first, long end) {
        const long step = rows_at_once(C, O);
        std::vector<float> block(step * O);
        for (long start = first; start < end; start += step) {
            const long count = std::min(step, end - start);
            const float* x = conv.x + start * C;
            norm_gradient<A>(grad + start * O, y + start * O, block.data(), 0, count, O, affine, gradient, {});
            if (conv.to_x != nullptr) multiply(block.data(), back, conv.to_x + start * C, count);
            if (wider)
                add_products(x, block.data(), weights[t].data(), count, C, O);
            else
                add_products(block.data(), x, weights[t].data(), count, O, C);
        }
    });
    for (long o = 0; o < O; o++)
        for (long c = 0; c < C; c++) {
            float sum = 0;
            for (const auto& part : weights) sum += part[wider ? c * O + o : o * C + c];
            conv.to_weight[o * C + c] = sum;
        }
}

// The last K rows of a map, padded with zeros on both sides.
struct Ring {
    long width, pad, C, K;
    std::vector<float> data;
    Ring(long width, long pad, long C, long K)
        : width(width), pad(pad), C(C), K(K), data(size_t(K) * (width + 2 * pad) * C, 0.0f) {}
    long line() const { return (width + 2 * pad) * C; }
    float* row(long y) { return &data[size_t(((y % K) + K) % K) * line()]; }  // with its padding
    float* inside(long y) { return row(y) + pad * C; }
    void clear(long y) { std::fill_n(inside(y), width * C, 0.0f); }
};

struct Geometry {
    long N, H, W, C, K, stride, pad, OH, OW;
};

// U outputs next to each other of one row of a convolution over K rows: lines[ky] points at the first tap.
template <int K, int S, int U, class V>
inline void convolve(const float* const* lines, long shift, const float* weight, long C, long c, float* to) {
    typename V::type sum[U] = {};
    for (int ky = 0; ky < K; ky++) {
        const float* line = lines[ky] + shift + c;
        for (int kx = 0; kx < K; kx++) {
            const auto w = V::load(weight + (ky * K + kx) * C + c);
            for (int u = 0; u < U; u++) sum[u] += w * V::load(line + (u * S + kx) * C);
        }
    }
    for (int u = 0; u < U; u++) store(to + u * C + c, sum[u]);
}

template <int K, int S, class V>
inline void convolve_row(const float* const* lines, const float* weight, long C, long c, long width, float* to) {
    long x = 0;
    for (; width - x >= 8 || width - x == 4; x += 4) convolve<K, S, 4, V>(lines, x * S * C, weight, C, c, to + x * C);
    const long at = x * S * C;  // one to seven are left, or none: all at once, for a sum alone waits for itself
    switch (width - x) {
        case 1: return convolve<K, S, 1, V>(lines, at, weight, C, c, to + x * C);
        case 2: return convolve<K, S, 2, V>(lines, at, weight, C, c, to + x * C);
        case 3: return convolve<K, S, 3, V>(lines, at, weight, C, c, to + x * C);
        case 5: return convolve<K, S, 5, V>(lines, at, weight, C, c, to + x * C);
        case 6: return convolve<K, S, 6, V>(lines, at, weight, C, c, to + x * C);
        case 7: return convolve<K, S, 7, V>(lines, at, weight, C, c, to + x * C);
    }
}

void load_row(Ring& ring, long y, const float* image, long H, const Side& before) {
    if (y < 0 || y >= H) return ring.clear(y);
    const float* from = image + y * ring.width * ring.C;
    if (before.norm == nullptr)
        std::copy_n(from, ring.width * ring.C, ring.inside(y));
    else
        with(before.norm->activation, [&](auto a) {
            apply_rows<a>(from, ring.inside(y), 0, ring.width, ring.C, *before.affine, nullptr);
        });
}

template <int K, int S>
void depthwise_images(const float* x, const float* weight, float* y, const Geometry& g, long first, long end,
                      const Side& before, Moments& moments) {
    Ring ring(g.W, g.pad, g.C, K);
    const float* lines[K];
    for (long n = first; n < end; n++) {
        const float* image = x + n * g.H * g.W * g.C;
        for (long oy = 0, loaded = -g.pad; oy < g.OH; oy++) {
            for (; loaded < oy * S - g.pad + K; loaded++) load_row(ring, loaded, image, g.H, before);
            for (int ky = 0; ky < K; ky++) lines[ky] = ring.row(oy * S - g.pad + ky);
            float* to = y + (n * g.OH + oy) * g.OW * g.C;
            over_channels(g.C, [&](long c, auto v) {
                convolve_row<K, S, decltype(v)>(lines, weight, g.C, c, g.OW, to);
                using V = decltype(v);
                auto sum = V::load(to + c);
                for (long x = 1; x < g.OW; x++) sum += V::load(to + x * g.C + c);
                moments.add<V>(to, g.OW, g.C, c, sum);
            });
            moments.rows += double(g.OW);
        }
    }
}

// One row's part of the gradient of the weights.
template <int K, int S, class V>
inline void correlate_row(const float* const* lines, const float* grad, long C, long c, long width, float* to_weight) {
    typename V::type sum[K * K] = {};
    for (long x = 0; x < width; x++) {
        const auto g = V::load(grad + x * C + c);
#pragma GCC unroll 5
        for (int ky = 0; ky < K; ky++)
#pragma GCC unroll 5
            for (int kx = 0; kx < K; kx++) sum[ky * K + kx] += g * V::load(lines[ky] + (x * S + kx) * C + c);
    }
    for (int k = 0; k < K * K; k++) store(to_weight + k * C + c, V::load(to_weight + k * C + c) + sum[k]);
}

// Spreads one row of gradients over the rows it came from.
template <int K, int S, class V>
inline void spread_row(float* const* lines, const float* grad, const float* weight, long C, long c, long width) {
    for (int ky = 0; ky < K; ky++) {
        typename V::type w[K];
        for (int kx = 0; kx < K; kx++) w[kx] = V::load(weight + (ky * K + kx) * C + c);
        for (long x = 0; x < width; x++) {
            const auto g = V::load(grad + x * C + c);
            for (int kx = 0; kx < K; kx++) {
                float* to = lines[ky] + (x * S + kx) * C + c;
                store(to, V::load(to) + g * w[kx]);
            }
        }
    }
}

// A finished row of the input's gradient: through the activation before it, summed, written.
template <int A> void emit_row(const float* grad, const float* x, float* to, long width, long C, const Affine& affine,
                               const float* mean, double* sums, double* products) {
    over_channels(C, [&](long c, auto v) {
        using V = decltype(v);
        typename V::type sum{}, product{};
        const auto scale = V::load(&affine.scale[c]), shift = V::load(&affine.shift[c]), centre = V::load(mean + c);
        for (long i = 0; i < width; i++) {
            const auto value = V::load(x + i * C + c);
            const auto ga = activation_gradient<A>(V::load(grad + i * C + c), value * scale + shift);
            store(to + i * C + c, ga);
            sum += ga;
            product += ga * (value - centre);
        }
        for (int i = 0; i < V::lanes; i++) {
            sums[c + i] += sum[i];
            products[c + i] += product[i];
        }
    });
}

template <int K, int S>
void depthwise_backward_images(const float* grad, const float* x, const Side& before, const float* weight,
                               const float* turned, const float* y, const Side& after, const NormGradient& gradient,
                               float* to_x, float* to_weight, const Geometry& g, long first, long end, double* sums,
                               double* products) {
    const long C = g.C, behind = K - 1 - g.pad;
    Ring inputs(g.W, g.pad, C, K), grads(g.OW, S == 1 ? behind : 0, C, K), spread(g.W, g.pad, C, S == 1 ? 1 : K);
    const float* lines[K];
    float* targets[K];
    auto emit = [&](long n, long row_index, const float* row) {
        const long at = (n * g.H + row_index) * g.W * C;
        if (before.norm == nullptr)
            std::copy_n(row, g.W * C, to_x + at);
        else
            with(before.norm->activation, [&](auto a) {
                emit_row<a>(row, x + at, to_x + at, g.W, C, *before.affine, before.norm->mean, sums, products);
            });
    };
    for (long n = first; n < end; n++) {
        const float* image = x + n * g.H * g.W * C;
        const Gate gate(*after.norm, n, C);
        long loaded = -g.pad, emitted = 0;
        if (S != 1) std::fill(spread.data.begin(), spread.data.end(), 0.0f);
        for (long t = -(K - 1); t < 0; t++) grads.clear(t);
        const long last = S == 1 ? g.H + g.pad : g.OH;
        for (long oy = 0; oy < last; oy++) {
            if (oy < g.OH) {
                for (; loaded < oy * S - g.pad + K; loaded++)
                    load_row(inputs, loaded, image, g.H, before);
                const long at = (n * g.OH + oy) * g.OW * C;
                with(after.norm->activation, [&](auto a) {
                    norm_gradient<a>(grad + at, y + at, grads.inside(oy), 0, g.OW, C, *after.affine, gradient, gate);
                });
                for (int ky = 0; ky < K; ky++) lines[ky] = inputs.row(oy * S - g.pad + ky);
                over_channels(C, [&](long c, auto v) {
                    correlate_row<K, S, decltype(v)>(lines, grads.inside(oy), C, c, g.OW, to_weight);
                });
            } else {
                grads.clear(oy);
            }
            if constexpr (S == 1) {  // the forward pass with the kernel turned, over the last K rows of gradients
                if (oy < g.pad) continue;
                for (int ky = 0; ky < K; ky++) lines[ky] = grads.row(oy - (K - 1) + ky);
                over_channels(C, [&](long c, auto v) {
                    convolve_row<K, 1, decltype(v)>(lines, turned, C, c, g.W, spread.inside(0));
                });
                emit(n, oy - g.pad, spread.inside(0));
            } else {
                for (int ky = 0; ky < K; ky++) targets[ky] = spread.row(oy * S - g.pad + ky);
                over_channels(C, [&](long c, auto v) {
                    spread_row<K, S, decltype(v)>(targets, grads.inside(oy), weight, C, c, g.OW);
                });
                for (; emitted < std::min(g.H, (oy + 1) * S - g.pad); emitted++) {
                    emit(n, emitted, spread.inside(emitted));
                    std::fill_n(spread.row(emitted), spread.line(), 0.0f);
                }
                for (long above = oy * S - g.pad; above < std::min(0L, (oy + 1) * S - g.pad); above++)
                    std::fill_n(spread.row(above), spread.line(), 0.0f);
            }
        }
        if (S != 1)
            for (; emitted < g.H; emitted++) {
                emit(n, emitted, spread.inside(emitted));
                std::fill_n(spread.row(emitted), spread.line(), 0.0f);
            }
    }
}

// Calls work with kernel size and stride as constants.
template <class Work> void with_shape(const Geometry& g, Work work) {
    using One = std::integral_constant<int, 1>;
    using Two = std::integral_constant<int, 2>;
    using Three = std::integral_constant<int, 3>;
    using Five = std::integral_constant<int, 5>;
    if (g.K == 3 && g.stride == 1) work(Three{}, One{});
    if (g.K == 3 && g.stride == 2) work(Three{}, Two{});
    if (g.K == 5 && g.stride == 1) work(Five{}, One{});
    if (g.K == 5 && g.stride == 2) work(Five{}, Two{});
}

std::vector<float> taps_first(const float* weight, long C, long taps, bool turned) {  // [C, taps] to [taps, C]
    std::vector<float> to(size_t(C) * taps);
    for (long c = 0; c < C; c++)
        for (long k = 0; k < taps; k++) to[(turned ? taps - 1 - k : k) * C + c] = weight[c * taps + k];
    return to;
}

}  // namespace

extern "C" {

// Mean and 1 / sqrt(variance + eps) of each channel of x [rows, C]; moves the running statistics unless they are null.
void moments(const float* x, long rows, long C, double eps, double momentum, float* running_mean, float* running_var,
             float* mean, float* invstd, long threads) {
    std::vector<Moments> parts(threads, Moments(C));
    share_out(rows, threads, [&](long t, long first, long end) { add_rows(x, first, end, C, parts[t]); });
    finish(parts, C, eps, momentum, running_mean, running_var, mean, invstd);
}

// y [rows, O] = x [rows, C] * weight [O, C] transposed; the moments of y as `moments` gives them.
void pointwise(const float* x, const float* weight, float* y, long rows, long C, long O, double eps, double momentum,
               float* running_mean, float* running_var, float* mean, float* invstd, long threads) {
    const Panels panels(weight, C, O, 1, C);
    std::vector<Moments> parts(threads, Moments(O));
    share_out(rows, threads, [&](long t, long first, long end) {
        const long step = rows_at_once(C, O);
        for (long start = first; start < end; start += step) {
            const long stop = std::min(end, start + step);
            multiply(x + start * C, panels, y + start * O, stop - start);
            add_rows(y, start, stop, O, parts[t]);
        }
    });
    finish(parts, O, eps, momentum, running_mean, running_var, mean, invstd);
}

// y = activation(norm(x)), scaled by the gates of each of the N images.
void apply(const float* x, float* y, long N, long rows, long C, const Norm* norm, long threads) {
    const Affine affine(*norm, C);
    if (norm->gates == nullptr) rows *= N, N = 1;
    share_out(N == 1 ? rows : N, threads, [&](long, long first, long end) {
        with(norm->activation, [&](auto a) {
            if (N == 1) return apply_rows<a>(x, y, first, end, C, affine, norm->gates);
            for (long n = first; n < end; n++)
                apply_rows<a>(x, y, n * rows, (n + 1) * rows, C, affine, norm->gates + n * C);
        });
    });
}

// sums [N, C] of activation(norm(x)) over the rows of each image; times grad unless it is null.
void sum_images(const float* grad, const float* x, float* sums, long N, long rows, long C, const Norm* norm,
                long threads) {
    const Affine affine(*norm, C);
    share_out(N, threads, [&](long, long first, long end) {
        with(norm->activation, [&](auto a) {
            for (long n = first; n < end; n++) {
                const long at = n * rows * C;
                sum_rows<a>(grad == nullptr ? nullptr : grad + at, x + at, rows, C, affine, sums + n * C);
            }
        });
    });
}

// The gradients of apply(x) without gates, the statistics' part included, given that of its result.
void apply_backward(const float* grad, const float* x, float* to_x, float* to_gamma, float* to_beta, long rows, long C,
                    const Norm* norm, long threads) {
    const Affine affine(*norm, C);
    with(norm->activation, [&](auto a) {
        const NormGradient gradient = norm_sums<a>(grad, x, to_gamma, to_beta, rows, C, *norm, affine, threads);
        share_out(rows, threads, [&](long, long first, long end) {
            norm_gradient<a>(grad, x, to_x, first, end, C, affine, gradient, {});
        });
    });
}

// The gradients of apply(pointwise(x)), given that of its result; y is what `pointwise` gave.
void pointwise_backward(const float* grad, const float* y, float* to_gamma, float* to_beta, long rows, long O,
                        const Norm* norm, const Pointwise* conv, long threads) {
    const Affine affine(*norm, O);
    with(norm->activation, [&](auto a) {
        const NormGradient gradient = norm_sums<a>(grad, y, to_gamma, to_beta, rows, O, *norm, affine, threads);
        pointwise_gradient<a>(grad, y, rows, O, affine, gradient, *conv, threads);
    });
}

// y = depthwise(apply(x)), or depthwise(x) without a norm; the moments of y as `moments` gives them.
void depthwise(const float* x, const Norm* norm, const float* weight, float* y, const Geometry* g, double eps,
               double momentum, float* running_mean, float* running_var, float* mean, float* invstd, long threads) {
    const std::vector<float> taps = taps_first(weight, g->C, g->K * g->K, false);
    const Side before(norm, g->C);
    std::vector<Moments> parts(threads, Moments(g->C));
    share_out(g->N, threads, [&](long t, long first, long end) {
        with_shape(*g, [&](auto k, auto s) {
            depthwise_images<k, s>(x, taps.data(), y, *g, first, end, before, parts[t]);
        });
    });
    finish(parts, g->C, eps, momentum, running_mean, running_var, mean, invstd);
}

// The gradients of apply(depthwise(apply(x))), given that of its result; y is what `depthwise` gave. Only the outer
// apply may have gates. Unless expand is null, x is what that 1x1 convolution gave: the gradients are its own, and to_x
// is scratch.
void depthwise_backward(const float* grad, const float* x, const Norm* in, const float* weight, const float* y,
                        const Norm* out, float* to_x, float* to_in_gamma, float* to_in_beta, float* to_weight,
                        float* to_out_gamma, float* to_out_beta, const Geometry* g, const Pointwise* expand,
                        long threads) {
    const long C = g->C, taps = g->K * g->K, in_rows = g->N * g->H * g->W, rows = g->OH * g->OW;
    const Side before(in, C), after(out, C);
    Sums in_sums(threads, C), out_sums(threads, C);
    share_out(g->N, threads, [&](long t, long first, long end) {
        with(out->activation, [&](auto a) {
            for (long n = first; n < end; n++)
                reduce<a>(grad, y, n * rows, (n + 1) * rows, C, *after.affine, out->mean, Gate(*out, n, C),
                          out_sums.sums[t].data(), out_sums.products[t].data());
        });
    });
    out_sums.finish(*out, C, to_out_gamma, to_out_beta);
    const NormGradient gradient(*out, out_sums.sums[0].data(), out_sums.products[0].data(), C, double(g->N * rows));
    const std::vector<float> straight = taps_first(weight, C, taps, false), turned = taps_first(weight, C, taps, true);
    std::vector<std::vector<float>> weights(threads, std::vector<float>(size_t(taps) * C));
    share_out(g->N, threads, [&](long t, long first, long end) {
        with_shape(*g, [&](auto k, auto s) {
            depthwise_backward_images<k, s>(grad, x, before, straight.data(), turned.data(), y, after, gradient, to_x,
                                            weights[t].data(), *g, first, end, in_sums.sums[t].data(),
                                            in_sums.products[t].data());
        });
    });
    for (long c = 0; c < C; c++)
        for (long k = 0; k < taps; k++) {
            float sum = 0;
            for (const auto& part : weights) sum += part[k * C + c];
            to_weight[c * taps + k] = sum;
        }
    if (in == nullptr) return;
    in_sums.finish(*in, C, to_in_gamma, to_in_beta);
    const NormGradient rest(*in, in_sums.sums[0].data(), in_sums.products[0].data(), C, double(in_rows));
    if (expand != nullptr)  // to_x is that before the activation already
        return pointwise_gradient<NONE>(to_x, x, in_rows, C, *before.affine, rest, *expand, threads);
    share_out(in_rows, threads, [&](long, long first, long end) {
        norm_gradient<NONE>(to_x, x, to_x, first, end, C, *before.affine, rest, {});
    });
}

}  // extern "C"
