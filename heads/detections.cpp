// From scored boxes to detections, greedily: the best scores of an image are sorted once and taken one after the other
// until it has its detections, so that of some hundred thousand scores a few hundred are looked at. detections.py
// compiles, loads and calls this (without contraction to fused multiply-adds: overlaps are torchvision's to the bit).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

namespace {

constexpr long FIRST = 1024;  // candidates that are sorted at first; four times as many when they do not suffice
constexpr long FEW = 1000;    // up to here torchvision moves the classes apart instead of taking them one by one

struct Limits {
    float threshold;
    long candidates;
    double iou;
    long detections;
};

struct Candidate {
    float score;
    int32_t label, anchor;
    bool operator<(const Candidate& other) const {
        if (score != other.score) return score > other.score;
        return label != other.label ? label < other.label : anchor < other.anchor;
    }
};

struct Box {
    float left, top, right, bottom;
    float area() const { return (right - left) * (bottom - top); }
};

bool overlap(const Box& one, const Box& other, double limit) {
    const float width = std::max(0.0f, std::min(one.right, other.right) - std::max(one.left, other.left));
    const float height = std::max(0.0f, std::min(one.bottom, other.bottom) - std::max(one.top, other.top));
    const float shared = width * height;
    return shared / (one.area() + other.area() - shared) > limit;
}

struct Scores {  // of an image: row a, column k
    const float* first;
    long A, K, step;
    const float* row(long a) const { return first + a * step; }
};

// How many scores of each class are above the threshold, and the highest score of each row.
void look(const Scores& scores, float threshold, std::vector<int32_t>& classes, std::vector<float>& highest) {
    int32_t* const above = classes.data();
    for (long a = 0; a < scores.A; a++) {
        const float* const row = scores.row(a);
        float most = 0;
#pragma omp simd reduction(max : most)
        for (long k = 0; k < scores.K; k++) most = row[k] > most ? row[k] : most;
        for (long k = 0; k < scores.K; k++) above[k] += row[k] > threshold;
        highest[a] = most;
    }
}

// The best `most` of the scores above the threshold, sorted, and all that equal the last of them.
std::vector<Candidate> best(const Scores& scores, float threshold, const std::vector<float>& highest, long most) {
    float floor = std::nextafter(threshold, 2.0f);
    if (most < scores.A) {  // at least as many scores as rows reach the floor of the rows' best: a cheap first cut
        std::vector<float> sorted = highest;
        std::nth_element(sorted.begin(), sorted.begin() + most - 1, sorted.end(), std::greater<float>());
        floor = std::max(floor, sorted[most - 1]);
    }
    std::vector<Candidate> pool(2 * most + scores.K);
    long size = 0;
    for (long a = 0; a < scores.A; a++) {
        if (highest[a] < floor) continue;
        if (long(pool.size()) < size + scores.K) pool.resize(2 * pool.size());
        const float* const row = scores.row(a);
        Candidate* next = pool.data() + size;
        for (long k = 0; k < scores.K; k++) {  // without a jump, which would be hard to foresee
            *next = {row[k], int32_t(k), int32_t(a)};
            next += row[k] >= floor;
        }
        size = next - pool.data();
    }
    pool.resize(size);
    if (size > most) {
        const auto edge = pool.begin() + most;
        std::nth_element(pool.begin(), edge - 1, pool.end());
        const float last = edge[-1].score;
        pool.erase(std::partition(edge, pool.end(), [&](const Candidate& c) { return c.score == last; }), pool.end());
    }
    std::sort(pool.begin(), pool.end());
    return pool;
}

// Leaves the best `candidates` of each class. Returns whether their order is clear: no two of a class are equal.
bool cut(std::vector<Candidate>& pool, long K, long candidates) {
    std::vector<long> taken(K, 0);
    std::vector<float> last(K, -1.0f);
    bool clear = true;
    auto left = pool.begin();
    for (const Candidate& each : pool) {
        clear &= last[each.label] != each.score;
        last[each.label] = each.score;
        if (++taken[each.label] <= candidates) *left++ = each;
    }
    pool.erase(left, pool.end());
    return clear;
}

struct Found {
    Box* boxes;
    float* scores;
    int64_t* labels;
};

// One image. Returns how many detections it has; `clear`: whether equal scores leave torchvision's order beyond doubt.
long detect_one(const Box* boxes, const Scores& scores, const Limits& limits, const Found& out, bool& clear) {
    std::vector<int32_t> classes(scores.K, 0);
    std::vector<float> highest(scores.A);
    look(scores, limits.threshold, classes, highest);
    long all = 0, left = 0;
    for (const long each : classes) all += each, left += std::min(each, limits.candidates);
    const bool few = left <= FEW;

    std::vector<std::vector<Box>> kept(scores.K);
    for (long most = few ? all : std::max(FIRST, 4 * limits.detections);; most *= 4) {
        std::vector<Candidate> pool = best(scores, limits.threshold, highest, most);
        const bool complete = long(pool.size()) == all;
        clear = cut(pool, scores.K, limits.candidates);
        float side = 0;  // by which the classes are moved apart
        if (few)
            for (const Candidate& each : pool) {
                const Box& box = boxes[each.anchor];
                side = std::max({side, box.left, box.top, box.right, box.bottom});
            }
        long count = 0;
        float last = -1;
        for (const Candidate& each : pool) {
            if (count >= limits.detections) {
                clear &= few || each.score != last;
                break;
            }
            Box box = boxes[each.anchor];
            if (few) {
                const float move = float(each.label + 1) * (side + 1);
                box = {box.left + move, box.top + move, box.right + move, box.bottom + move};
            }
            std::vector<Box>& better = kept[each.label];
            const auto covers = [&](const Box& other) { return overlap(other, box, limits.iou); };
            if (std::any_of(better.begin(), better.end(), covers)) continue;
            better.push_back(box);
            clear &= few || each.score != last;
            last = each.score;
            out.boxes[count] = boxes[each.anchor];
            out.scores[count] = each.score;
            out.labels[count++] = each.label;
        }
        if (complete || count >= limits.detections) return count;
        for (auto& each : kept) each.clear();
    }
}

}  // namespace

// boxes [B, A, 4]; scores, whose class k of anchor a of image b is at b * image_step + a * anchor_step + k; out: boxes
// [B, room, 4], scores and labels [B, room], counts [B], clear [B].
extern "C" void detect(const float* boxes, const float* scores, long B, long A, long K, long image_step,
                       long anchor_step, double threshold, long candidates, double iou, long detections, long room,
                       float* out_boxes, float* out_scores, int64_t* out_labels, int64_t* counts, bool* clear,
                       long threads) {
    const Limits limits{float(threshold), candidates, iou, detections};
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long b = 0; b < B; b++) {
        const Found out{reinterpret_cast<Box*>(out_boxes) + b * room, out_scores + b * room, out_labels + b * room};
        const Scores own{scores + b * image_step, A, K, anchor_step};
        counts[b] = detect_one(reinterpret_cast<const Box*>(boxes) + b * A, own, limits, out, clear[b]);
    }
}
