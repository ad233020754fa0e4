// The likeliest class of every pixel between logits. segmentation.py compiles, loads and calls this, and says how the
// same is done by torch's operators; what they round, this rounds alike (no contraction to fused multiply-adds).

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

struct Axis {  // the cells of one axis, between `size` logits and before the first and behind the last; `to` pixels
    long size;
    std::vector<long> first;   // pixel of each cell; one more than there are cells
    std::vector<float> share;  // of the way from the logit before a pixel to the one after it
    Axis(long size, long to) : size(size), first(size + 2, to), share(to) {
        const float scale = float(double(size) / double(to));
        long next = 0;
        for (long i = 0; i < to; i++) {
            const float place = (float(i) + 0.5f) * scale + 0.5f;
            const long cell = std::min(long(place), size);
            for (; next <= cell; next++) first[next] = i;
            share[i] = place - float(cell);
        }
    }
    long before(long cell) const { return std::max(cell - 1, 0L); }
    long after(long cell) const { return std::min(cell, size - 1); }
};

float between(float a, float b, float share) {  // torch.lerp
    return share < 0.5f ? a + share * (b - a) : b - (b - a) * (1 - share);
}

struct Cell {
    long top, bottom, left, right;  // pixels
    const float* corners[4];        // [K] logits: upper left, upper right, lower left, lower right
};

// The classes that can win in a cell: those that the best of the four's sum does not beat at all corners.
void can_win(const Cell& cell, long K, std::vector<int>& classes) {
    long middle = 0;
    float most = 0;
    for (long k = 0; k < K; k++) {
        const float sum = cell.corners[0][k] + cell.corners[1][k] + cell.corners[2][k] + cell.corners[3][k];
        if (k == 0 || sum > most) most = sum, middle = k;
    }
    classes.clear();
    for (long k = 0; k < K; k++)
        if (std::any_of(cell.corners, cell.corners + 4, [&](const float* c) { return c[k] >= c[middle]; }))
            classes.push_back(int(k));
}

void settle(const Cell& cell, const Axis& rows, const Axis& columns, const std::vector<int>& classes, uint8_t* map,
            long W, std::vector<float>& most) {
    for (long y = cell.top; y < cell.bottom; y++) {
        uint8_t* line = map + y * W;
        std::fill(most.begin(), most.begin() + (cell.right - cell.left), -__builtin_inff());
        for (const int k : classes) {
            const float left = between(cell.corners[0][k], cell.corners[2][k], rows.share[y]);
            const float right = between(cell.corners[1][k], cell.corners[3][k], rows.share[y]);
            for (long x = cell.left; x < cell.right; x++) {
                const float logit = between(left, right, columns.share[x]);
                if (logit > most[x - cell.left]) most[x - cell.left] = logit, line[x] = uint8_t(k);
            }
        }
    }
}

}  // namespace

// map [H, W] from logits, whose class k at row y and column x is at k * step_class + y * step_row + x * step_column.
extern "C" void class_map(const float* logits, long K, long h, long w, long step_class, long step_row, long step_column,
                          uint8_t* map, long H, long W, long threads) {
    std::vector<float> low(size_t(h) * w * K);
    std::vector<uint8_t> best(size_t(h) * w);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long y = 0; y < h; y++)
        for (long x = 0; x < w; x++) {
            float* to = &low[(y * w + x) * K];
            for (long k = 0; k < K; k++) to[k] = logits[k * step_class + y * step_row + x * step_column];
            best[y * w + x] = uint8_t(std::max_element(to, to + K) - to);
        }
    const Axis rows(h, H), columns(w, W);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row <= h; row++) {
        std::vector<int> classes;
        std::vector<float> most(W);
        const long above = rows.before(row) * w, below = rows.after(row) * w;
        for (long column = 0; column <= w; column++) {
            const long left = columns.before(column), right = columns.after(column);
            const long at[] = {above + left, above + right, below + left, below + right};
            Cell cell{rows.first[row], rows.first[row + 1], columns.first[column], columns.first[column + 1], {}};
            if (cell.top == cell.bottom || cell.left == cell.right) continue;
            for (int i = 0; i < 4; i++) cell.corners[i] = &low[at[i] * K];
            const uint8_t one = best[at[0]];
            if (one == best[at[1]] && one == best[at[2]] && one == best[at[3]]) {
                for (long y = cell.top; y < cell.bottom; y++)
                    std::fill(map + y * W + cell.left, map + y * W + cell.right, one);
                continue;
            }
            can_win(cell, K, classes);
            settle(cell, rows, columns, classes, map, W, most);
        }
    }
}
