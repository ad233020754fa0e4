// Colour changes of an image as one affine map of its pixels; colour.py compiles, loads and calls this.

#include <algorithm>
#include <cstdint>

namespace {

constexpr long BLOCK = 1024;  // pixels at a time, as floats in the fastest cache

struct Image {  // channel c of pixel i is at c * step_channel + i * step_pixel
    const uint8_t* data;
    long pixels, step_channel, step_pixel;
    void read(long channel, long first, long count, float* to) const {
        const uint8_t* from = data + channel * step_channel + first * step_pixel;
        for (long i = 0; i < count; i++) to[i] = float(from[i * step_pixel]);
    }
};

}  // namespace

// sums [3] of an image's channels.
extern "C" void sums(const uint8_t* data, long pixels, long step_channel, long step_pixel, double* sums) {
    for (long c = 0; c < 3; c++) {
        const uint8_t* from = data + c * step_channel;
        uint64_t sum = 0;
        for (long i = 0; i < pixels; i++) sum += from[i * step_pixel];
        sums[c] = double(sum);
    }
}

// out [3, pixels] = matrix [3, 4] * (r, g, b, 1), rounded and held to 0 ... 255.
extern "C" void change(const uint8_t* data, long pixels, long step_channel, long step_pixel, const float* matrix,
                       uint8_t* out) {
    const Image image{data, pixels, step_channel, step_pixel};
    float in[3][BLOCK];
    for (long first = 0; first < pixels; first += BLOCK) {
        const long count = std::min(BLOCK, pixels - first);
        for (long c = 0; c < 3; c++) image.read(c, first, count, in[c]);
        for (long c = 0; c < 3; c++) {
            const float* m = matrix + 4 * c;
            uint8_t* to = out + c * pixels + first;
            for (long i = 0; i < count; i++) {
                const float value = m[0] * in[0][i] + m[1] * in[1][i] + m[2] * in[2][i] + m[3] + 0.5f;
                to[i] = uint8_t(int(std::min(255.0f, std::max(0.0f, value))));
            }
        }
    }
}
