// Frozen layers in 8 bits, forward and backward: linear layers, one with residual and layer norm, and the feed-forward block.
//
// Rows are scaled to -127..127 each, rounded, and kept as q + 128 in uint8, as the processor's 8-bit dot product (vpdpbusd, VNNI)
// takes one unsigned factor. Weights are int8, scaled per column of the product, and laid out beforehand as
//
//     packed int8 [N / 64, K / 4, 64, 4], N and K filled up with zeros,
//
// in panels of 64 columns: a vector holds 4 successive k of 16 columns. 6 rows by 64 columns are summed up in registers and scaled back
// from there, so no integers are stored. A chunk of 48 rows passes through all of a block's steps before the next begins,
// so what lies between the steps stays in the second cache. Sums of integers are exact and all else happens row by row: results
// depend neither on the number of threads nor on how rows fall into chunks.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif

constexpr int W = 16, VECTORS = 4, PANEL = W * VECTORS, TILE = 6, CHUNK = 8 * TILE;

typedef int32_t ints __attribute__((vector_size(4 * W)));
typedef float floats __attribute__((vector_size(4 * W)));
typedef ints loose_ints __attribute__((aligned(4), may_alias));
typedef floats loose_floats __attribute__((aligned(4), may_alias));

struct Matrix {
  const int8_t* packed;
  const float* scale;   // [N]
  const int32_t* sums;  // [N], -128 times the sum of a column: takes off what the 128 in q + 128 adds
  const float* bias;    // [N]
  int64_t K, N;         // all of the above filled up to whole panels
};

struct Norm {
  const float* weight;  // [N]
  const float* bias;    // [N]
  float epsilon;
  uint16_t* normal;  // bf16 [M, N], the rows with mean 0 and variance 1; null where no gradient will be asked for
  float* inverse;    // [M], 1 / the standard deviation before; null likewise
};

static int64_t whole(int64_t length, int64_t unit) { return (length + unit - 1) / unit * unit; }

// Memory of this thread for `bytes` bytes, kept from call to call.
static char* scratch(int64_t bytes) {
  static thread_local std::unique_ptr<char, decltype(&std::free)> held(nullptr, std::free);
  static thread_local int64_t size = 0;
  if (size < bytes) {
    size = whole(bytes, 4096);
    held.reset((char*)std::aligned_alloc(4096, size));
  }
  return held.get();
}

template <typename Work>
static void for_chunks(int64_t M, const Work& work) {
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < M; first += CHUNK) work(first, (int)std::min<int64_t>(CHUNK, M - first));
}

// ---- Quantise

static inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// A chunk of rows in 8 bits, in memory that is given.
struct Rows {
  uint8_t* values;  // [CHUNK, pitch]
  float* scale;     // [CHUNK]
  int64_t pitch;

  static int64_t bytes(int64_t K) { return CHUNK * (whole(K, 64) + 64); }
  Rows(char* memory, int64_t K) : values((uint8_t*)memory + CHUNK * 64), scale((float*)memory), pitch(whole(K, 64)) {}

  void take(const float* from, int row, int64_t K) {
    uint32_t bits = as_bits(1e-30f);  // of the largest: without their signs, floats are ordered as their bits are
#pragma omp simd reduction(max : bits)
    for (int64_t k = 0; k < K; ++k) bits = std::max(bits, as_bits(from[k]) & 0x7fffffff);
    const float largest = as_float(bits), up = 127 / largest;
    uint8_t* to = values + row * pitch;
#pragma omp simd
    for (int64_t k = 0; k < K; ++k) to[k] = (uint8_t)as_bits(std::fma(from[k], up, 12582912.0f + 128));  // 1.5 * 2^23 + 128 rounds
    scale[row] = largest / 127;
  }
};

// ---- Product

// To 16 sums, those of 4 successive products each: one 4 bytes of a row with a vector of packed weights.
static inline ints dot(ints sum, const uint8_t* row, const int8_t* packed) {
#if defined(__AVX512VNNI__)
  int32_t four;
  std::memcpy(&four, row, 4);
  return (ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(four), _mm512_loadu_si512(packed));
#else
  for (int lane = 0; lane < W; ++lane)
    for (int i = 0; i < 4; ++i) sum[lane] += row[i] * packed[4 * lane + i];
  return sum;
#endif
}

// Rows that will be read or written soon: a product fetches them into the second cache, a line at a time so that nothing waits.
struct Soon {
  const char* at;
  int64_t bytes;

  template <typename T>
  Soon(const T* whole, int64_t row, int64_t N) : at((const char*)(whole + row * N)), bytes(whole ? CHUNK * N * (int64_t)sizeof(T) : 0) {}
};

// out [count, N] = rows [count, K] times a matrix, plus its bias, or plus what stands in `out`.
static void product(const Rows& rows, int count, const Matrix& matrix, float* out, bool add, const Soon& one, const Soon& two) {
  const int64_t quads = whole(matrix.K, 4) / 4, tiles = whole(count, TILE) / TILE, parts = whole(matrix.N, PANEL) / PANEL * tiles;
  const int64_t step_one = (one.bytes << 8) / (parts * quads), step_two = (two.bytes << 8) / (parts * quads);
  for (int64_t panel = 0; panel < matrix.N; panel += PANEL)
    for (int first = 0; first < count; first += TILE) {
      const int64_t tile = panel / PANEL * tiles + first / TILE;
      int64_t at_one = (one.bytes * tile / parts) << 8, at_two = (two.bytes * tile / parts) << 8;  // in 1/256 of a byte
      const int8_t* packed = matrix.packed + panel * quads * 4;
      const uint8_t* row = rows.values + first * rows.pitch;
      ints sum[TILE][VECTORS];
      for (int r = 0; r < TILE; ++r)
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = *(const loose_ints*)(matrix.sums + panel + v * W);
      for (int64_t quad = 0; quad < quads; ++quad, packed += PANEL * 4, row += 4) {
        __builtin_prefetch(one.at + ((at_one += step_one) >> 8), 0, 2);
        __builtin_prefetch(two.at + ((at_two += step_two) >> 8), 0, 2);
#pragma GCC unroll 6
        for (int r = 0; r < TILE; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; ++v) sum[r][v] = dot(sum[r][v], row + r * rows.pitch, packed + v * W * 4);
      }
      const int64_t columns = std::min<int64_t>(PANEL, matrix.N - panel);
#pragma GCC unroll 6
      for (int r = 0; r < TILE; ++r) {
        if (first + r >= count) break;
        float part[PANEL];  // of a panel that is not whole
        float* target = out + (first + r) * matrix.N + panel;
        float* to = columns == PANEL ? target : part;
        if (add && to == part) std::copy(target, target + columns, part);
        const float* plus = add ? to : matrix.bias + panel;
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
          floats scale = *(const loose_floats*)(matrix.scale + panel + v * W) * rows.scale[first + r];
          *(loose_floats*)(to + v * W) = __builtin_convertvector(sum[r][v], floats) * scale + *(const loose_floats*)(plus + v * W);
        }
        if (to == part) std::copy(part, part + columns, target);
      }
    }
}

// ---- What stands between products

// GELU's slope lies between -0.13 and 1.13: a byte holds it in steps of 1/200, finer than the gradient's own rounding; 0 and 1 are exact.
constexpr float SLOPE_STEPS = 200, SLOPE_ZERO = 26;

// Minimax polynomials of t = 2 (x / 5)^2 - 1, for |x| <= 5 and kept at their ends beyond: (Φ(x) - 1/2) / x, to 2e-6 of x Φ(x), and
// (Φ(x) + x φ(x) - 1/2) / x, to 7e-4 of the slope, an eighth of a step.
constexpr float SHARE[] = {-1.125194313e-03f, 3.251472611e-03f, -3.856542623e-03f, 5.010261952e-03f, -1.016078794e-02f, 1.697284171e-02f,
                           -2.363705140e-02f, 3.134187935e-02f, -4.038881539e-02f, 5.152655113e-02f, -7.029840959e-02f, 1.413637347e-01f};
constexpr float SLOPE[] = {1.015713443e-01f, -1.860184243e-01f, 5.624297802e-02f, 8.637360105e-03f, 7.977431364e-02f,
                           -9.680308650e-02f, 6.788472897e-02f, -7.336503917e-02f, 1.420817548e-01f};

template <int LAST, int N>
static inline float polynomial(const float (&factors)[N], float t) {
  if constexpr (LAST == 0) return factors[0];
  else return polynomial<LAST - 1>(factors, t) * t + factors[LAST];
}

// x Φ(x) in place of each x, and the slope.
static void gelu(float* row, uint8_t* slope, int64_t length) {
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) {
    const float above = row[i] < -5 ? -5 : row[i], x = above > 5 ? 5 : above, t = x * x * 0.08f - 1;
    row[i] *= polynomial<11>(SHARE, t) * x + 0.5f;
    slope[i] = (uint8_t)(int32_t)(polynomial<8>(SLOPE, t) * x * SLOPE_STEPS + (SLOPE_STEPS / 2 + SLOPE_ZERO + 0.5f));
  }
}

static void times_slope(float* row, const uint8_t* slope, int64_t length) {
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) row[i] *= ((float)slope[i] - SLOPE_ZERO) * (1 / SLOPE_STEPS);
}

// out = layer norm of (out + residual), one row.
static void norm(float* out, const float* residual, const Norm& norm, int64_t row, int64_t N) {
  float total = 0, squares = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < N; ++i) total += out[i] += residual[i];
  const float mean = total / N;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < N; ++i) squares += (out[i] - mean) * (out[i] - mean);
  const float inverse = 1 / std::sqrt(squares / N + norm.epsilon);
  if (norm.normal) {
    uint16_t* normal = norm.normal + row * N;
    norm.inverse[row] = inverse;
#pragma omp simd
    for (int64_t i = 0; i < N; ++i) normal[i] = (uint16_t)((as_bits((out[i] - mean) * inverse) + 0x8000) >> 16);
  }
#pragma omp simd
  for (int64_t i = 0; i < N; ++i) out[i] = (out[i] - mean) * inverse * norm.weight[i] + norm.bias[i];
}

// The gradient before a layer norm from the one behind it, one row.
static void norm_backward(const float* gradient, float* out, const Norm& norm, int64_t row, int64_t N) {
  const uint16_t* normal = norm.normal + row * N;
  float total = 0, along = 0;
#pragma omp simd reduction(+ : total, along)
  for (int64_t i = 0; i < N; ++i) {
    const float weighted = gradient[i] * norm.weight[i];
    total += weighted;
    along += weighted * as_float((uint32_t)normal[i] << 16);
  }
  total /= N, along /= N;
  const float inverse = norm.inverse[row];
#pragma omp simd
  for (int64_t i = 0; i < N; ++i)
    out[i] = inverse * (gradient[i] * norm.weight[i] - total - along * as_float((uint32_t)normal[i] << 16));
}

// ---- Entry points. Gradients that are null are not asked for, or are zero.

extern "C" {

// outs[n] [M, N of n] = in [M, K] times matrix n each.
void fan_out(const float* in, int64_t M, const Matrix* matrices, int count, float* const* outs) {
  const int64_t K = matrices[0].K;
  for_chunks(M, [&](int64_t first, int rows) {
    Rows quantised(scratch(Rows::bytes(K)), K);
    for (int r = 0; r < rows; ++r) quantised.take(in + (first + r) * K, r, K);
    for (int n = 0; n < count; ++n) {
      const int64_t next = n + 1 < count ? n + 1 : 0, row = next ? first : first + CHUNK;
      product(quantised, rows, matrices[n], outs[n] + first * matrices[n].N, false,
              {next ? nullptr : in, first + CHUNK, K}, {outs[next], row, matrices[next].N});
    }
  });
}

// out [M, N] = the sum over n of ins[n] [M, K of n] times matrix n, of those that are not null; at least one is not.
void fan_in(const float* const* ins, int64_t M, const Matrix* matrices, int count, float* out) {
  int64_t widest = 0;
  for (int n = 0; n < count; ++n) widest = std::max(widest, matrices[n].K);
  for_chunks(M, [&](int64_t first, int rows) {
    bool add = false;
    for (int n = 0; n < count; ++n) {
      if (!ins[n]) continue;
      const int64_t K = matrices[n].K;
      Rows quantised(scratch(Rows::bytes(widest)), K);
      for (int r = 0; r < rows; ++r) quantised.take(ins[n] + (first + r) * K, r, K);
      const int64_t next = n + 1 < count ? n + 1 : 0, row = next ? first : first + CHUNK;
      product(quantised, rows, matrices[n], out + first * matrices[n].N, add,
              {ins[next], row, matrices[next].K}, {next ? nullptr : out, row, matrices[n].N});
      add = true;
    }
  });
}

// out [M, N] = layer norm of (in [M, K] times a matrix + residual [M, N]).
void residual_norm(const float* in, const float* residual, int64_t M, const Matrix* matrix, const Norm* after, float* out) {
  const int64_t K = matrix->K, N = matrix->N;
  for_chunks(M, [&](int64_t first, int rows) {
    Rows quantised(scratch(Rows::bytes(K)), K);
    for (int r = 0; r < rows; ++r) quantised.take(in + (first + r) * K, r, K);
    product(quantised, rows, *matrix, out + first * N, false,
            {in, first + CHUNK, K}, {residual, first, N});
    for (int64_t row = first; row < first + rows; ++row) norm(out + row * N, residual + row * N, *after, row, N);
  });
}

// From the gradient [M, N] of `out` above, those of `in` [M, K] and of `residual` [M, N]; `back` is the matrix transposed.
void residual_norm_backward(const float* gradient, int64_t M, const Matrix* back, const Norm* after, float* in, float* residual) {
  const int64_t N = back->K, K = back->N;
  for_chunks(M, [&](int64_t first, int rows) {
    char* memory = scratch(Rows::bytes(N) + CHUNK * N * 4);
    Rows quantised(memory, N);
    float* sum = residual ? residual + first * N : (float*)(memory + Rows::bytes(N));
    for (int r = 0; r < rows; ++r) {
      norm_backward(gradient + (first + r) * N, sum + r * N, *after, first + r, N);
      if (in) quantised.take(sum + r * N, r, N);
    }
    if (!in) return;
    const int64_t next = first + CHUNK;
    product(quantised, rows, *back, in + first * K, false,
            {gradient, next, N}, {after->normal, next, N});
  });
}

// out [M, E] = layer norm of (gelu(in [M, E] times `up` [E, I]) times `down` [I, E] + in). slope uint8 [M, I]: GELU's; null as in Norm.
void feed_forward(const float* in, int64_t M, const Matrix* up, const Matrix* down, const Norm* after, float* out, uint8_t* slope) {
  const int64_t E = up->K, I = up->N, narrow = Rows::bytes(E), wide = Rows::bytes(I);
  for_chunks(M, [&](int64_t first, int rows) {
    char* memory = scratch(narrow + wide + CHUNK * I * 4 + I);
    Rows outer(memory, E), inner(memory + narrow, I);
    float* hidden = (float*)(memory + narrow + wide);
    for (int r = 0; r < rows; ++r) outer.take(in + (first + r) * E, r, E);
    product(outer, rows, *up, hidden, false, {slope, first, I}, {out, first, E});
    for (int r = 0; r < rows; ++r) {
      gelu(hidden + r * I, slope ? slope + (first + r) * I : (uint8_t*)(hidden + CHUNK * I), I);
      inner.take(hidden + r * I, r, I);
    }
    product(inner, rows, *down, out + first * E, false, {after->normal, first, E}, {in, first + CHUNK, E});
    for (int64_t row = first; row < first + rows; ++row) norm(out + row * E, in + row * E, *after, row, E);
  });
}

// From the gradient [M, E] of `out` above that of `in` [M, E]; the matrices are the two transposed, in the order in which they act.
void feed_forward_backward(
    const float* gradient, int64_t M, const Matrix* down, const Matrix* up, const Norm* after, const uint8_t* slope, float* in) {
  const int64_t E = down->K, I = down->N, narrow = Rows::bytes(E), wide = Rows::bytes(I);
  for_chunks(M, [&](int64_t first, int rows) {
    char* memory = scratch(narrow + wide + CHUNK * I * 4);
    Rows outer(memory, E), inner(memory + narrow, I);
    float* hidden = (float*)(memory + narrow + wide);
    for (int64_t row = first; row < first + rows; ++row) {
      norm_backward(gradient + row * E, in + row * E, *after, row, E);
      outer.take(in + row * E, (int)(row - first), E);
    }
    product(outer, rows, *down, hidden, false, {slope, first, I}, {gradient, first + CHUNK, E});
    for (int r = 0; r < rows; ++r) {
      times_slope(hidden + r * I, slope + (first + r) * I, I);
      inner.take(hidden + r * I, r, I);
    }
    product(inner, rows, *up, in + first * E, true, {after->normal, first + CHUNK, E}, {in, first + CHUNK, E});
  });
}
}
