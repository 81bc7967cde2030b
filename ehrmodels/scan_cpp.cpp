// The selective scan on a CPU, in float32: scan_cpp.py builds and calls it, and says what the arguments are.
//
// A pair is one sample and one group. Of a pair, WIDE channels at a time walk through all steps with their states in the first
// cache; all loops over channels have WIDE turns, so that any compiler makes vectors of them.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr long WIDE = 64;

// 2^x within 2 units in the last place; 0 below the smallest normal number, infinite from 128 on.
inline float exp2_(float x) {
    float bound = x < -127.f ? -127.f : x;
    bound = bound > 128.f ? 128.f : bound;
    const float whole = std::rint(bound);
    const float f = bound - whole;
    float y = 1.5252734e-5f;
    y = y * f + 1.5403530e-4f;
    y = y * f + 1.3333558e-3f;
    y = y * f + 9.6181291e-3f;
    y = y * f + 5.5504109e-2f;
    y = y * f + 2.4022651e-1f;
    y = y * f + 6.9314718e-1f;
    y = y * f + 1.f;
    const std::int32_t bits = (static_cast<std::int32_t>(whole) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return y * scale;
}

// The `count` values from `from` on, and 0 for the rest of WIDE.
inline void take(float* to, const float* from, long count) {
    for (long i = 0; i < WIDE; ++i) to[i] = 0.f;
    std::memcpy(to, from, sizeof(float) * count);
}

// Rows of `count` values, `stride` apart, beside rows of WIDE.
inline void take_rows(float* to, const float* from, long rows, long stride, long count) {
    for (long n = 0; n < rows; ++n) take(to + n * WIDE, from + n * stride, count);
}

inline void put_rows(float* to, const float* from, long rows, long stride, long count) {
    for (long n = 0; n < rows; ++n) std::memcpy(to + n * stride, from + n * WIDE, sizeof(float) * count);
}

constexpr float LOG2E = 1.44269504088896341f;

}  // namespace

extern "C" void scan_forward(long first, long last, long steps, long pairs, long groups, long states, long width, long chunk,
                             const float* u, const float* delta, const float* A, const float* B, const float* C, float* y,
                             float* end, float* starts) {
    std::vector<float> rate(states * WIDE), h(states * WIDE);
    for (long pair = first; pair < last; ++pair)
        for (long w = 0; w < width; w += WIDE) {
            const long count = width - w < WIDE ? width - w : WIDE;
            take_rows(rate.data(), A + (pair % groups) * states * width + w, states, width, count);
            for (float& r : rate) r *= LOG2E;
            for (float& value : h) value = 0.f;
            for (long t = 0; t < steps; ++t) {
                if (starts && t % chunk == 0)
                    put_rows(starts + (t / chunk * pairs + pair) * states * width + w, h.data(), states, width, count);
                const long row = t * pairs + pair;
                float x[WIDE], step[WIDE], out[WIDE] = {};
                take(x, u + row * width + w, count);
                take(step, delta + row * width + w, count);
                for (long i = 0; i < WIDE; ++i) x[i] *= step[i];
                for (long n = 0; n < states; ++n) {
                    const float b = B[row * states + n], c = C[row * states + n];
                    const float* r = &rate[n * WIDE];
                    float* state = &h[n * WIDE];
                    for (long i = 0; i < WIDE; ++i) {
                        state[i] = exp2_(step[i] * r[i]) * state[i] + x[i] * b;
                        out[i] += state[i] * c;
                    }
                }
                std::memcpy(y + row * width + w, out, sizeof(float) * count);
            }
            put_rows(end + pair * states * width + w, h.data(), states, width, count);
        }
}

// With g_t the gradient of the state h_t: g_t = C_t dy_t + a_(t+1) g_(t+1), and w_t = g_t a_t h_(t-1) is that of delta_t A.
extern "C" void scan_backward(long first, long last, long steps, long pairs, long groups, long states, long width, long chunk,
                              const float* dy, const float* dend, const float* u, const float* delta, const float* A,
                              const float* B, const float* C, const float* starts, float* du, float* ddelta, float* dA,
                              float* dB, float* dC) {
    const long size = states * WIDE;
    std::vector<float> rate(size), of_rate(size), h(size), carried(size), a(chunk * size), kept(chunk * size);
    std::vector<float> x(chunk * WIDE), step(chunk * WIDE);
    for (long pair = first; pair < last; ++pair)
        for (long w = 0; w < width; w += WIDE) {
            const long count = width - w < WIDE ? width - w : WIDE;
            take_rows(rate.data(), A + (pair % groups) * states * width + w, states, width, count);
            take_rows(carried.data(), dend + pair * states * width + w, states, width, count);
            for (float& value : of_rate) value = 0.f;
            for (long number = (steps + chunk - 1) / chunk - 1; number >= 0; --number) {
                const long start = number * chunk, here = steps - start < chunk ? steps - start : chunk;
                take_rows(h.data(), starts + (number * pairs + pair) * states * width + w, states, width, count);
                for (long t = 0; t < here; ++t) {
                    const long row = (start + t) * pairs + pair;
                    float *moved = &x[t * WIDE], *now = &step[t * WIDE];
                    take(moved, u + row * width + w, count);
                    take(now, delta + row * width + w, count);
                    for (long i = 0; i < WIDE; ++i) moved[i] *= now[i];
                    for (long n = 0; n < states; ++n) {
                        const float b = B[row * states + n];
                        const float* r = &rate[n * WIDE];
                        float *state = &h[n * WIDE], *decay = &a[t * size + n * WIDE], *rest = &kept[t * size + n * WIDE];
                        for (long i = 0; i < WIDE; ++i) {
                            decay[i] = exp2_(now[i] * (r[i] * LOG2E));
                            rest[i] = decay[i] * state[i];
                            state[i] = rest[i] + moved[i] * b;
                        }
                    }
                }
                for (long t = here - 1; t >= 0; --t) {
                    const long row = (start + t) * pairs + pair;
                    const float *moved = &x[t * WIDE], *now = &step[t * WIDE];
                    float out[WIDE], of_moved[WIDE] = {}, of_step[WIDE] = {};
                    take(out, dy + row * width + w, count);
                    for (long n = 0; n < states; ++n) {
                        const float b = B[row * states + n], c = C[row * states + n];
                        const float *decay = &a[t * size + n * WIDE], *rest = &kept[t * size + n * WIDE], *r = &rate[n * WIDE];
                        float *next = &carried[n * WIDE], *of = &of_rate[n * WIDE];
                        float of_b = 0.f, of_c = 0.f;
                        for (long i = 0; i < WIDE; ++i) {
                            const float g = c * out[i] + next[i];
                            of_c += (rest[i] + moved[i] * b) * out[i];
                            of_b += g * moved[i];
                            of_moved[i] += g * b;
                            const float of_product = g * rest[i];
                            of[i] += of_product * now[i];
                            of_step[i] += of_product * r[i];
                            next[i] = g * decay[i];
                        }
                        dB[row * states + n] = of_b + (w ? dB[row * states + n] : 0.f);
                        dC[row * states + n] = of_c + (w ? dC[row * states + n] : 0.f);
                    }
                    const float* given = u + row * width + w;
                    for (long i = 0; i < count; ++i) {
                        du[row * width + w + i] = of_moved[i] * now[i];
                        ddelta[row * width + w + i] = of_step[i] + of_moved[i] * given[i];
                    }
                }
            }
            put_rows(dA + pair * states * width + w, of_rate.data(), states, width, count);
        }
}
