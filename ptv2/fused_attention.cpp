// Attention of a text to a prefix and to itself, forward and backward, float32: for short texts and small heads.
//
// What torch's fused attention needs and this does not: the prefix copied in front of every example's keys and values, a mask that
// is as wide as both, a pass over padding, and gradients of the text where only the prefix learns (the first layer).
// A head's keys and values are packed once; then 16 queries at a time see all of them, while the scores stay in the nearest cache.
// Softmax gradients as in Dao, "FlashAttention-2", ICLR 2024, section 2: from the log-sum-exp alone, scores are computed again.
//
// Layouts: query, key, value [B, H, S, D] by strides, D contiguous; prefix [H, P, D] or [B, H, P, D]; everything else as noted.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <tuple>
#include <utility>

#if defined(__AVX512F__)
constexpr int W = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int W = 8, REGISTERS = 16;
#else
constexpr int W = 4, REGISTERS = 32;
#endif
constexpr int ROWS = 16;             // queries at a time, a multiple of W
constexpr int SUMS = REGISTERS / 2;  // running sums that a product keeps in registers: enough to hide the latency of adding
constexpr int COLUMNS = SUMS / 4;    // vectors of columns at a time, where there are enough

typedef float vec __attribute__((vector_size(4 * W)));
typedef float loose_vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * W)));

static inline vec load(const float* from) { return *(const loose_vec*)from; }
static inline void store(float* to, vec value) { *(loose_vec*)to = value; }
static inline vec all(float value) { return value - vec{}; }
static inline vec larger(vec a, vec b) { return a > b ? a : b; }

// e^x to 2 units in the last place, and 0 below -87: what is smaller would soon be too small for a normal number, and those are
// slow to multiply. The polynomial is that of Cephes' expf.
static inline vec exponential(vec x) {
  const vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, which stands in the low bits
  vec rounded = x * 1.44269504f + magic;
  ints power = (ints)rounded - (ints)magic;
  vec n = rounded - magic;
  vec r = x - n * 0.693359375f - n * -2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return x > -87.0f ? (vec)((ints)(p * r * r + r + 1.0f) + (power << 23)) : vec{};
}

template <int STEP, bool SECOND, int... I>
static inline vec mixed(vec a, vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (SECOND ? ((I & STEP) ? W + I : I + STEP) : ((I & STEP) ? W + I - STEP : I))...);
}

template <int STEP>
static inline void exchange(vec (&rows)[W]) {  // bit STEP of the row's number against that of the lane's
  constexpr auto lanes = std::make_integer_sequence<int, W>{};
  for (int i = 0; i < W; i++) {
    if (i & STEP) continue;
    vec a = rows[i], b = rows[i + STEP];
    rows[i] = mixed<STEP, false>(a, b, lanes);
    rows[i + STEP] = mixed<STEP, true>(a, b, lanes);
  }
  if constexpr (STEP > 1) exchange<STEP / 2>(rows);
}

// What `join` makes of the W numbers of each of ROWS vectors, as ROWS numbers.
template <typename Join>
static inline void across(const vec (&rows)[ROWS], Join join, float* to) {
  for (int r = 0; r < ROWS; r += W) {
    vec turned[W];
    for (int i = 0; i < W; i++) turned[i] = rows[r + i];
    exchange<W / 2>(turned);
    vec joined = turned[0];
    for (int i = 1; i < W; i++) joined = join(joined, turned[i]);
    store(to + r, joined);
  }
}

static inline vec added(vec a, vec b) { return a + b; }

// [n, D] to [D, wide], n a multiple of W.
template <int D>
static void transpose(const float* from, int n, float* to, int wide) {
  for (int j = 0; j < n; j += W)
    for (int d = 0; d < D; d += W) {
      vec rows[W];
      for (int i = 0; i < W; i++) rows[i] = load(from + (j + i) * D + d);
      exchange<W / 2>(rows);
      for (int i = 0; i < W; i++) store(to + (d + i) * wide + j, rows[i]);
    }
}

// c [ROWS, wide] = a [ROWS, D] * b [D, wide], COUNT * W columns of it from j on.
template <int D, int COUNT>
static inline void scores_at(const float* a, const float* b, int wide, int j, float* c) {
  constexpr int R = SUMS / COUNT;
  for (int r = 0; r < ROWS; r += R) {
    vec sums[R][COUNT] = {};
    for (int d = 0; d < D; d++)
#pragma GCC unroll 16
      for (int i = 0; i < R; i++)
#pragma GCC unroll 16
        for (int x = 0; x < COUNT; x++) sums[i][x] += a[(r + i) * D + d] * load(b + d * wide + j + x * W);
    for (int i = 0; i < R; i++)
      for (int x = 0; x < COUNT; x++) store(c + (r + i) * wide + j + x * W, sums[i][x]);
  }
}

template <int D>
static void scores(const float* a, const float* b, int wide, float* c) {
  int j = 0;
  for (; j + COLUMNS * W <= wide; j += COLUMNS * W) scores_at<D, COLUMNS>(a, b, wide, j, c);
  for (; j < wide; j += W) scores_at<D, 1>(a, b, wide, j, c);
}

// c [ROWS, D] = a [ROWS, wide] * b [wide, D].
template <int D>
static void weighted(const float* a, const float* b, int wide, float* c) {
  constexpr int V = D / W, R = SUMS / V;
  for (int r = 0; r < ROWS; r += R) {
    vec sums[R][V] = {};
    for (int j = 0; j < wide; j++)
#pragma GCC unroll 16
      for (int i = 0; i < R; i++)
#pragma GCC unroll 16
        for (int x = 0; x < V; x++) sums[i][x] += a[(r + i) * wide + j] * load(b + j * D + x * W);
    for (int i = 0; i < R; i++)
      for (int x = 0; x < V; x++) store(c + (r + i) * D + x * W, sums[i][x]);
  }
}

// c [wide, D] += a [ROWS, wide], transposed, * b [ROWS, D].
template <int D>
static void add_weighted(const float* a, const float* b, int wide, float* c) {
  constexpr int V = D / W, R = SUMS / V;
  for (int j = 0; j < wide; j += R) {
    vec sums[R][V];
    for (int i = 0; i < R; i++)
      for (int x = 0; x < V; x++) sums[i][x] = load(c + (j + i) * D + x * W);
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
      for (int i = 0; i < R; i++)
#pragma GCC unroll 16
        for (int x = 0; x < V; x++) sums[i][x] += a[r * wide + j + i] * load(b + r * D + x * W);
    for (int i = 0; i < R; i++)
      for (int x = 0; x < V; x++) store(c + (j + i) * D + x * W, sums[i][x]);
  }
}

struct Shape {
  int64_t B, H, S, P;
  float scale;
  const int64_t* strides;         // of query, key and value in turn, over B, H and S; in floats
  const int64_t *shown, *first, *last;  // [B]: places of the prefix that are seen, and the text's first and last + 1 that are
  bool shared;                    // one prefix for all examples
};

struct Inputs {
  const float *query, *key, *value, *prefix_key, *prefix_value;
};

// What one example's one head attends to: rows of the prefix, then of the text.
template <int D>
struct Head {
  const Shape& shape;
  int64_t b, h, n_prefix, n_text;
  int n, wide;  // keys, and keys filled up to a multiple of W

  Head(const Shape& shape, int64_t item, bool prefix_alone = false) : shape(shape), b(item / shape.H), h(item % shape.H) {
    n_prefix = shape.P ? shape.shown[b] : 0;
    n_text = prefix_alone ? 0 : shape.last[b] - shape.first[b];
    n = n_prefix + n_text;
    wide = (n + W - 1) / W * W;
  }
  const float* text(const float* tensor, int which, int64_t s) const {
    const int64_t* by = shape.strides + 3 * which;
    return tensor + b * by[0] + h * by[1] + s * by[2];
  }
  static void copy_row(const float* from, float* to) {  // in a call of its own, std::copy_n takes longer than this
    for (int d = 0; d < D; d += W) store(to + d, load(from + d));
  }
  int64_t prefix_row(int64_t example) const { return (example * shape.H + h) * shape.P * D; }
  int64_t row(int64_t s) const { return ((b * shape.S + s) * shape.H + h) * D; }  // in [B, S, H, D]

  // Keys (which = 1) or values (2) as [wide, D], zeros at the end.
  void pack(const float* prefix, const float* tensor, int which, float* to) const {
    if (n_prefix) std::copy_n(prefix + prefix_row(shape.shared ? 0 : b), n_prefix * D, to);
    for (int64_t s = 0; s < n_text; s++) copy_row(text(tensor, which, shape.first[b] + s), to + (n_prefix + s) * D);
    std::fill(to + (int64_t)n * D, to + (int64_t)wide * D, 0.0f);
  }
  // ROWS queries from s on, scaled, as [ROWS, D], zeros after the last.
  void queries(const float* query, int64_t s, int rows, float* to) const {
    for (int r = 0; r < rows; r++)
      for (int d = 0; d < D; d += W) store(to + r * D + d, load(text(query, 0, s + r) + d) * shape.scale);
    std::fill(to + rows * D, to + ROWS * D, 0.0f);
  }
  // What keeps the keys that only fill up out of the softmax: added to the last W scores.
  vec at_end() const {
    vec bias;
    for (int i = 0; i < W; i++) bias[i] = wide - W + i < n ? 0.0f : -1e30f;
    return bias;
  }
};

static std::unique_ptr<float, decltype(&std::free)> workspace(int64_t floats) {
  return {(float*)std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64), std::free};
}

// output [B, S, H, D]; log_sums [B, H, S], or null where no gradient is wanted.
template <int D>
static void forward(const Shape& shape, const Inputs& in, float* output, float* log_sums) {
  const int64_t widest = shape.P + shape.S + W;
#pragma omp parallel
  {
    auto space = workspace(widest * (2 * D + ROWS) + widest * D + 2 * ROWS * D);
    float *keys = space.get(), *keys_t = keys + widest * D, *values = keys_t + widest * D;
    float *p = values + widest * D, *queries = p + widest * ROWS, *out = queries + ROWS * D;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < shape.B * shape.H; item++) {
      const Head<D> head(shape, item);
      const int wide = head.wide;
      head.pack(in.prefix_key, in.key, 1, keys);
      transpose<D>(keys, wide, keys_t, wide);
      head.pack(in.prefix_value, in.value, 2, values);
      const vec at_end = head.at_end();
      for (int64_t s = 0; s < shape.S; s += ROWS) {
        const int rows = std::min<int64_t>(ROWS, shape.S - s);
        head.queries(in.query, s, rows, queries);
        scores<D>(queries, keys_t, wide, p);
        vec parts[ROWS];
        alignas(64) float top[ROWS], whole[ROWS];
        for (int r = 0; r < ROWS; r++) {
          float* row = p + r * wide;
          store(row + wide - W, load(row + wide - W) + at_end);
          parts[r] = load(row);
          for (int j = W; j < wide; j += W) parts[r] = larger(parts[r], load(row + j));
        }
        across(parts, larger, top);
        for (int r = 0; r < ROWS; r++) {
          float* row = p + r * wide;
          parts[r] = vec{};
          for (int j = 0; j < wide; j += W) {
            const vec e = exponential(load(row + j) - top[r]);
            store(row + j, e);
            parts[r] += e;
          }
        }
        across(parts, added, whole);
        weighted<D>(p, values, wide, out);
        for (int r = 0; r < rows; r++) {
          for (int d = 0; d < D; d += W) store(output + head.row(s + r) + d, load(out + r * D + d) / whole[r]);
          if (log_sums) log_sums[item * shape.S + s + r] = top[r] + std::log(whole[r]);
        }
      }
    }
  }
}

// The gradients of query, key and value [B, S, H, D], null where only the prefix learns; of the prefix [B, H, P, D], an example each.
template <int D>
static void backward(const Shape& shape, const Inputs& in, const float* output, const float* log_sums, const float* gradient,
                     float* to_query, float* to_key, float* to_value, float* to_prefix_key, float* to_prefix_value) {
  const int64_t widest = shape.P + shape.S + W;
#pragma omp parallel
  {
    auto space = workspace(widest * (6 * D + 2 * ROWS) + 3 * ROWS * D);
    float *keys = space.get(), *keys_t = keys + widest * D, *values = keys_t + widest * D, *values_t = values + widest * D;
    float *to_keys = values_t + widest * D, *to_values = to_keys + widest * D;
    float *p = to_values + widest * D, *ds = p + widest * ROWS;
    float *queries = ds + widest * ROWS, *d_out = queries + ROWS * D, *d_queries = d_out + ROWS * D;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < shape.B * shape.H; item++) {
      const Head<D> head(shape, item, !to_query);
      const int wide = head.wide;
      head.pack(in.prefix_key, in.key, 1, keys);
      transpose<D>(keys, wide, keys_t, wide);
      head.pack(in.prefix_value, in.value, 2, values);
      transpose<D>(values, wide, values_t, wide);
      std::fill_n(to_keys, 2 * widest * D, 0.0f);
      const vec at_end = head.at_end();
      for (int64_t s = 0; s < shape.S; s += ROWS) {
        const int rows = std::min<int64_t>(ROWS, shape.S - s);
        head.queries(in.query, s, rows, queries);
        vec parts[ROWS] = {};
        alignas(64) float log_sum[ROWS] = {}, share[ROWS];  // share: what the softmax takes off, the gradient times the output
        std::fill(d_out + rows * D, d_out + ROWS * D, 0.0f);
        for (int r = 0; r < rows; r++) {
          log_sum[r] = log_sums[item * shape.S + s + r];
          for (int d = 0; d < D; d += W) {
            const vec g = load(gradient + head.row(s + r) + d);
            store(d_out + r * D + d, g);
            parts[r] += g * load(output + head.row(s + r) + d);
          }
        }
        across(parts, added, share);
        scores<D>(queries, keys_t, wide, p);
        scores<D>(d_out, values_t, wide, ds);
        for (int r = 0; r < ROWS; r++) {
          float *row = p + r * wide, *d_row = ds + r * wide;
          store(row + wide - W, load(row + wide - W) + at_end);
          for (int j = 0; j < wide; j += W) {
            const vec e = exponential(load(row + j) - log_sum[r]);
            store(row + j, e);
            store(d_row + j, e * (load(d_row + j) - share[r]));
          }
        }
        add_weighted<D>(ds, queries, wide, to_keys);
        add_weighted<D>(p, d_out, wide, to_values);
        if (!to_query) continue;
        weighted<D>(ds, keys, wide, d_queries);
        for (int r = 0; r < rows; r++)
          for (int d = 0; d < D; d += W) store(to_query + head.row(s + r) + d, load(d_queries + r * D + d) * shape.scale);
      }
      for (auto [from, prefix, text] : {std::tuple{to_keys, to_prefix_key, to_key}, std::tuple{to_values, to_prefix_value, to_value}}) {
        if (shape.P) {
          float* to = prefix + head.prefix_row(head.b);
          std::copy_n(from, head.n_prefix * D, to);
          std::fill(to + head.n_prefix * D, to + shape.P * D, 0.0f);
        }
        for (int64_t s = 0; s < shape.S && text; s++) {
          const bool seen = shape.first[head.b] <= s && s < shape.last[head.b];
          if (seen) head.copy_row(from + (head.n_prefix + s - shape.first[head.b]) * D, text + head.row(s));
          else std::fill_n(text + head.row(s), D, 0.0f);
        }
      }
    }
  }
}

extern "C" {

// D must be 32 or 64.
void attention_forward(int64_t D, int64_t B, int64_t H, int64_t S, int64_t P, float scale, const int64_t* strides,
                       const int64_t* shown, const int64_t* first, const int64_t* last, bool shared, const float* query,
                       const float* key, const float* value, const float* prefix_key, const float* prefix_value, float* output,
                       float* log_sums) {
  const Shape shape{B, H, S, P, scale, strides, shown, first, last, shared};
  const Inputs in{query, key, value, prefix_key, prefix_value};
  (D == 32 ? forward<32> : forward<64>)(shape, in, output, log_sums);
}

void attention_backward(int64_t D, int64_t B, int64_t H, int64_t S, int64_t P, float scale, const int64_t* strides,
                        const int64_t* shown, const int64_t* first, const int64_t* last, bool shared, const float* query,
                        const float* key, const float* value, const float* prefix_key, const float* prefix_value,
                        const float* output, const float* log_sums, const float* gradient, float* to_query, float* to_key,
                        float* to_value, float* to_prefix_key, float* to_prefix_value) {
  const Shape shape{B, H, S, P, scale, strides, shown, first, last, shared};
  const Inputs in{query, key, value, prefix_key, prefix_value};
  (D == 32 ? backward<32> : backward<64>)(shape, in, output, log_sums, gradient, to_query, to_key, to_value, to_prefix_key,
                                          to_prefix_value);
}
}
