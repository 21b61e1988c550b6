// The memory of heads with 16 channels and 8 hidden units, in explicit vectors of VECTOR_BYTES.
//
// memory.cpp includes this file several times, each time in another namespace and for other instructions, so it must
// neither include nor instantiate anything that the linker could take from one of them for another.
//
// Names follow pytorch.py. Tokens are columns: row r of a token tensor starts at pointer + r * stride, its tokens are
// contiguous. Rows of weights, cat(W1ᵀ, W2), are (2e, d), contiguous. A short last vector is filled with zeros: tokens
// that are zero have no error and no gradient, so sums over tokens may include them.

constexpr int D = 16, E = 8, R = 2 * E;  // channels of a head, hidden units, rows of its weights

template <typename T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t ints __attribute__((vector_size(VECTOR_BYTES)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(VECTOR_BYTES)));
};
template <typename T>
using Vec = typename Vector<T>::type;
template <typename T>
constexpr int LANES = VECTOR_BYTES / sizeof(T);

#define INLINE static inline __attribute__((always_inline))

template <typename T>
INLINE Vec<T> load(const T* source, int count) {
  Vec<T> x = {};
  if (count >= LANES<T>) {
    __builtin_memcpy(&x, source, sizeof(x));
  } else if (count > 0) {
    __builtin_memcpy(&x, source, count * sizeof(T));
  }
  return x;
}

template <typename T>
INLINE void store(T* target, Vec<T> x, int count) {
  if (count >= LANES<T>) {
    __builtin_memcpy(target, &x, sizeof(x));
  } else if (count > 0) {
    __builtin_memcpy(target, &x, count * sizeof(T));
  }
}

// A block of P vectors of tokens, N rows.
template <typename T, int N, int P>
struct Block {
  Vec<T> rows[N][P];
};

template <int N>
struct Size {
  static constexpr int value = N;
};

// Calls body(P, start, count) for blocks of `length` tokens. Sums over tokens go through the cache once a block, so
// blocks should be large, but all that is made of one should stay there.
template <typename T, typename Body>
INLINE void for_blocks(int length, Body body) {
  constexpr int large = 4 * LANES<T>;
  int start = 0;
  for (; start + large <= length; start += large) body(Size<4>(), start, large);
  for (; start < length; start += LANES<T>) body(Size<1>(), start, length - start);
}

// `count` tokens from `source`; rows `stride` apart.
template <typename T, int N, int P>
INLINE void load(Block<T, N, P>& block, const T* source, int64_t stride, int count) {
  for (int r = 0; r < N; r++)
    for (int p = 0; p < P; p++) block.rows[r][p] = load<T>(source + r * stride + p * LANES<T>, count - p * LANES<T>);
}

template <typename T, int N, int P>
INLINE void store(T* target, int64_t stride, int count, const Block<T, N, P>& block) {
  for (int r = 0; r < N; r++)
    for (int p = 0; p < P; p++) store<T>(target + r * stride + p * LANES<T>, block.rows[r][p], count - p * LANES<T>);
}

// out (+)= W·x for weights (E, D) and x of D rows.
template <bool ADD = false, typename T, int P>
INLINE void to_hidden(Block<T, E, P>& out, const T* weight, const Block<T, D, P>& x) {
  for (int p = 0; p < P; p++) {
    Vec<T> sum[E];
    for (int i = 0; i < E; i++) sum[i] = ADD ? out.rows[i][p] : Vec<T>{};
    for (int j = 0; j < D; j++) {
      const Vec<T> x_j = x.rows[j][p];
#pragma GCC unroll 8
      for (int i = 0; i < E; i++) sum[i] += weight[i * D + j] * x_j;
    }
    for (int i = 0; i < E; i++) out.rows[i][p] = sum[i];
  }
}

// out += Wᵀ·x for weights (E, D) and x of E rows.
template <typename T, int P>
INLINE void add_to_channels(Block<T, D, P>& out, const T* weight, const Block<T, E, P>& x) {
  for (int p = 0; p < P; p++) {
    Vec<T> sum[D];
    for (int j = 0; j < D; j++) sum[j] = out.rows[j][p];
    for (int i = 0; i < E; i++) {
      const Vec<T> x_i = x.rows[i][p];
#pragma GCC unroll 16
      for (int j = 0; j < D; j++) sum[j] += weight[i * D + j] * x_i;
    }
    for (int j = 0; j < D; j++) out.rows[j][p] = sum[j];
  }
}

// Sums over tokens of a·bᵀ, lane by lane: (E, D) vectors.
template <typename T>
struct Sums {
  Vec<T> of[E][D];
};

template <typename T, int P>
INLINE void add_products(Sums<T>& sums, const Block<T, E, P>& a, const Block<T, D, P>& b) {
  for (int i = 0; i < E; i++)
    for (int half = 0; half < D; half += 8) {
      Vec<T> sum[8];
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) sum[j] = sums.of[i][half + j];
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) {
        const Vec<T> a_i = a.rows[i][p];
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) sum[j] += a_i * b.rows[half + j][p];
      }
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) sums.of[i][half + j] = sum[j];
    }
}

// The sum of the lanes of x, by halves.
template <typename T, int BYTES = VECTOR_BYTES, typename V>
INLINE T sum(const V& x) {
  if constexpr (BYTES == 2 * sizeof(T)) {
    return x[0] + x[1];
  } else {
    typedef T Half __attribute__((vector_size(BYTES / 2)));
    Half halves[2];
    __builtin_memcpy(halves, &x, sizeof(x));
    return sum<T, BYTES / 2>(halves[0] + halves[1]);
  }
}

template <typename T, bool ADD = false>
INLINE void finish(T* out, const Sums<T>& sums) {
  for (int i = 0; i < E; i++)
    for (int j = 0; j < D; j++) out[i * D + j] = (ADD ? out[i * D + j] : 0) + sum<T>(sums.of[i][j]);
}

// exp(x) for x <= 0.
INLINE Vec<float> exponential(Vec<float> x) {
  typedef Vector<float>::ints ints;
  const float round = 12582912;  // 1.5·2²³: adding it leaves the nearest integer in the lowest bits
  x = x < -87.f ? Vec<float>{} - 87.f : x;
  const Vec<float> shifted = x * 1.44269504f + round;
  const Vec<float> n = shifted - round;
  const Vec<float> f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n·ln 2, in two steps
  Vec<float> y = f * (1 / 5040.f) + 1 / 720.f;
  y = y * f + 1 / 120.f;
  y = y * f + 1 / 24.f;
  y = y * f + 1 / 6.f;
  y = y * f + 0.5f;
  y = y * f + 1;
  y = y * f + 1;
  return (Vec<float>)((ints)y + ((ints)shifted << 23));
}

// Φ(h) and φ(h) of the normal distribution.
INLINE void normal(Vec<float> h, Vec<float>& cumulative, Vec<float>& density) {
  const Vec<float> a = h < 0 ? -h : h;
  const Vec<float> e = exponential(h * h * -0.5f);
  // exp(a²/2)·erfc(a/√2) as a polynomial of 1 / (1 + 0.21·a), within 1.3e-8 of it relatively.
  const Vec<float> t = 1 / (1 + 0.21f * a);
  Vec<float> y = t * -0.14437901398246783f + 0.5724435279532826f;
  y = y * t - 0.6716268408433884f;
  y = y * t + 0.7118965766495945f;
  y = y * t - 0.19724347556367686f;
  y = y * t + 0.2539433107061803f;
  y = y * t + 0.13724409656852968f;
  y = y * t + 0.17030968582408457f;
  y = y * t + 0.1674121308659835f;
  const Vec<float> tail = y * t * e * 0.5f;
  cumulative = h < 0 ? tail : 1 - tail;
  density = e * 0.3989422804014327f;
}

INLINE void normal(Vec<double> h, Vec<double>& cumulative, Vec<double>& density) {
  for (int l = 0; l < LANES<double>; l++) {
    cumulative[l] = 0.5 * __builtin_erfc(h[l] * -0.7071067811865476);
    density[l] = 0.3989422804014327 * __builtin_exp(h[l] * h[l] * -0.5);
  }
}

template <typename T, int P>
INLINE void gelu(Block<T, E, P>& active, const Block<T, E, P>& hidden) {
  for (int i = 0; i < E; i++)
    for (int p = 0; p < P; p++) {
      Vec<T> cumulative, density;
      normal(hidden.rows[i][p], cumulative, density);
      active.rows[i][p] = hidden.rows[i][p] * cumulative;
    }
}

// GELU and its slope Φ(h) + h·φ(h).
template <typename T, int P>
INLINE void gelu(Block<T, E, P>& active, Block<T, E, P>& slope, const Block<T, E, P>& hidden) {
  for (int i = 0; i < E; i++)
    for (int p = 0; p < P; p++) {
      const Vec<T> h = hidden.rows[i][p];
      Vec<T> cumulative, density;
      normal(h, cumulative, density);
      active.rows[i][p] = h * cumulative;
      slope.rows[i][p] = cumulative + h * density;
    }
}

template <typename T, int P>
INLINE void multiply(Block<T, E, P>& out, const Block<T, E, P>& a, const Block<T, E, P>& b) {
  for (int i = 0; i < E; i++)
    for (int p = 0; p < P; p++) out.rows[i][p] = a.rows[i][p] * b.rows[i][p];
}

// Eq. 3 over one chunk of one head: the inner gradient over 2/d, (R, D), and the mean squared errors, (D,).
template <typename T>
void surprise(const T* k, int64_t k_stride, const T* v, int64_t v_stride, int length, const T* weights, T* gradient,
              T* errors) {
  const T *w1 = weights, *w2 = weights + E * D;
  Sums<T> first = {}, second = {};
  Vec<T> squares[D] = {};
  for_blocks<T>(length, [&](auto size, int start, int count) __attribute__((always_inline)) {
    constexpr int P = decltype(size)::value;
    Block<T, D, P> key, error;
    Block<T, E, P> hidden, active, slope;
    load(key, k + start, k_stride, count);
    load(error, v + start, v_stride, count);
    to_hidden(hidden, w1, key);
    gelu(active, slope, hidden);
    for (int j = 0; j < D; j++)
      for (int p = 0; p < P; p++) error.rows[j][p] = key.rows[j][p] - error.rows[j][p];
    add_to_channels(error, w2, active);
    for (int j = 0; j < D; j++)
      for (int p = 0; p < P; p++) squares[j] += error.rows[j][p] * error.rows[j][p];
    add_products(second, active, error);
    to_hidden(hidden, w2, error);
    multiply(hidden, hidden, slope);
    add_products(first, hidden, key);
  });
  finish<T>(gradient, first);
  finish<T>(gradient + E * D, second);
  for (int j = 0; j < D; j++) errors[j] = sum<T>(squares[j]) / length;
}

// What comes back to k, v and the weights from `grad_gradient` (R, D) and `grad_errors` (D,), as _surprise_backward of
// pytorch.py has it. `grad_weights` (R, D) is added to.
template <typename T>
void surprise_backward(const T* k, int64_t k_stride, const T* v, int64_t v_stride, int length, const T* weights,
                       const T* grad_gradient, const T* grad_errors, T* grad_k, T* grad_v, int64_t grad_stride,
                       T* grad_weights) {
  const T *w1 = weights, *w2 = weights + E * D, *g1 = grad_gradient, *g2 = grad_gradient + E * D;
  Sums<T> first = {}, second = {};
  for_blocks<T>(length, [&](auto size, int start, int count) __attribute__((always_inline)) {
    constexpr int P = decltype(size)::value;
    Block<T, D, P> key, error, grad_error;
    Block<T, E, P> hidden, active, slope, curvature, u, grad_b, grad_u, grad_active, b;
    load(key, k + start, k_stride, count);
    load(error, v + start, v_stride, count);
    to_hidden(hidden, w1, key);
    to_hidden(grad_b, g1, key);
    for (int i = 0; i < E; i++)
      for (int p = 0; p < P; p++) {
        const Vec<T> h = hidden.rows[i][p];
        Vec<T> cumulative, density;
        normal(h, cumulative, density);
        active.rows[i][p] = h * cumulative;
        slope.rows[i][p] = cumulative + h * density;
        curvature.rows[i][p] = density * (2 - h * h);
      }
    for (int j = 0; j < D; j++)
      for (int p = 0; p < P; p++) error.rows[j][p] = key.rows[j][p] - error.rows[j][p];
    add_to_channels(error, w2, active);
    to_hidden(u, w2, error);
    to_hidden(grad_active, g2, error);
    multiply(grad_u, grad_b, slope);
    for (int j = 0; j < D; j++)
      for (int p = 0; p < P; p++) grad_error.rows[j][p] = error.rows[j][p] * (grad_errors[j] * 2 / length);
    add_to_channels(grad_error, w2, grad_u);
    add_to_channels(grad_error, g2, active);
    to_hidden<true>(grad_active, w2, grad_error);
    add_products(second, grad_u, error);
    add_products(second, active, grad_error);
    multiply(b, u, slope);
    for (int i = 0; i < E; i++)  // what comes back to the hidden units, in the place of grad_b
      for (int p = 0; p < P; p++)
        grad_b.rows[i][p] =
            grad_active.rows[i][p] * slope.rows[i][p] + grad_b.rows[i][p] * curvature.rows[i][p] * u.rows[i][p];
    add_products(first, grad_b, key);
    for (int j = 0; j < D; j++)
      for (int p = 0; p < P; p++) error.rows[j][p] = -grad_error.rows[j][p];
    store(grad_v + start, grad_stride, count, error);
    add_to_channels(grad_error, w1, grad_b);
    add_to_channels(grad_error, g1, b);
    store(grad_k + start, grad_stride, count, grad_error);
  });
  finish<T, true>(grad_weights, first);
  finish<T, true>(grad_weights + E * D, second);
}

// Eq. 2: y = q + W2ᵀ·GELU(W1ᵀ·q).
template <typename T>
void read(const T* q, int64_t q_stride, int length, const T* weights, T* y, int64_t y_stride) {
  for_blocks<T>(length, [&](auto size, int start, int count) __attribute__((always_inline)) {
    constexpr int P = decltype(size)::value;
    Block<T, D, P> x;
    Block<T, E, P> hidden;
    load(x, q + start, q_stride, count);
    to_hidden(hidden, weights, x);
    gelu(hidden, hidden);
    add_to_channels(x, weights + E * D, hidden);
    store(y + start, y_stride, count, x);
  });
}

// `grad_weights` is added to; `y`, if it is not null, is what `read` returns.
template <typename T>
void read_backward(const T* q, int64_t q_stride, const T* grad_y, int64_t grad_y_stride, int length, const T* weights,
                   T* grad_q, T* y, int64_t stride, T* grad_weights) {
  const T *w1 = weights, *w2 = weights + E * D;
  Sums<T> first = {}, second = {};
  for_blocks<T>(length, [&](auto size, int start, int count) __attribute__((always_inline)) {
    constexpr int P = decltype(size)::value;
    Block<T, D, P> x, grad;
    Block<T, E, P> hidden, active, slope;
    load(x, q + start, q_stride, count);
    load(grad, grad_y + start, grad_y_stride, count);
    to_hidden(hidden, w1, x);
    gelu(active, slope, hidden);
    add_products(second, active, grad);
    to_hidden(hidden, w2, grad);
    multiply(hidden, hidden, slope);
    add_products(first, hidden, x);
    add_to_channels(grad, w1, hidden);
    store(grad_q + start, stride, count, grad);
    if (y != nullptr) {
      add_to_channels(x, w2, active);
      store(y + start, stride, count, x);
    }
  });
  finish<T, true>(grad_weights, first);
  finish<T, true>(grad_weights + E * D, second);
}

// The factor that keeps a write within its bound, from its squared norm over that of the bound.
template <typename T>
INLINE T bound(T relative) {
  return 1 / (T)__builtin_sqrt(1 + relative);
}

// Twice the derivative of `bound`.
template <typename T>
INLINE T bound_slope(T relative) {
  const T factor = bound(relative);
  return -factor * factor * factor;
}

// Eq. 4 for one head; `step`, `eta` and `alpha` are (D,), the rest (R, D).
template <typename T>
void write(const T* gradient, const T* momentum, const T* memory, const T* step, const T* eta, const T* alpha,
           const Options& options, T* next_momentum, T* next_memory) {
  const T scale = options.inner_step * 2 / D, bound_scale = scale / options.max_write_norm;
  T squares[D] = {};
  for (int r = 0; r < R; r++)
    for (int j = 0; j < D; j++) {
      const T value = step[j] * gradient[r * D + j];
      squares[j] += value * value;
    }
  T norm = 0;
  for (int j = 0; j < D; j++) norm += squares[j];
  const T factor = bound(norm * bound_scale * bound_scale);
  for (int r = 0; r < R; r++)
    for (int j = 0; j < D; j++) {
      const int i = r * D + j;
      next_momentum[i] = eta[j] * momentum[i] - scale * factor * (step[j] * gradient[i]);
      next_memory[i] = next_momentum[i] + (1 - alpha[j]) * memory[i];
    }
}

// One step back through Eq. 4. `grad_p` and `grad_m` (R, D) are what comes back to momentum and memory after the chunk,
// and then, but for the surprise's part, before it; `grad_read` is what the chunk's own reads return. `grad_gradient` (R, D)
// and `grad_step`, `grad_eta`, `grad_alpha` (D,), before the sigmoid, are filled.
template <typename T>
void write_backward(const T* gradient, const T* momentum, const T* memory, const T* step, const T* eta, const T* alpha,
                    const Options& options, const T* grad_read, T* grad_p, T* grad_m, T* grad_gradient, T* grad_step,
                    T* grad_eta, T* grad_alpha) {
  const T scale = options.inner_step * 2 / D, bound_scale = scale / options.max_write_norm;
  T squares[D] = {}, products[D] = {}, of_step[D] = {}, of_eta[D] = {}, of_alpha[D] = {};
  for (int r = 0; r < R; r++)
    for (int j = 0; j < D; j++) {
      const int i = r * D + j;
      const T value = step[j] * gradient[i];
      grad_p[i] += grad_m[i];
      squares[j] += value * value;
      products[j] += value * grad_p[i];
    }
  T norm = 0, inner = 0;
  for (int j = 0; j < D; j++) {
    norm += squares[j];
    inner += products[j];
  }
  const T relative = norm * bound_scale * bound_scale, factor = bound(relative);
  const T curb = inner * bound_slope(relative) * bound_scale * bound_scale;
  for (int r = 0; r < R; r++)
    for (int j = 0; j < D; j++) {
      const int i = r * D + j;
      const T grad_write = -scale * (grad_p[i] * factor + step[j] * gradient[i] * curb);
      of_step[j] += grad_write * gradient[i];
      of_eta[j] += grad_p[i] * momentum[i];
      of_alpha[j] -= grad_m[i] * memory[i];
      grad_gradient[i] = grad_write * step[j];
      grad_p[i] *= eta[j];
      grad_m[i] = grad_m[i] * (1 - alpha[j]) + grad_read[i];
    }
  for (int j = 0; j < D; j++) {
    grad_step[j] = of_step[j] * step[j] * (1 - step[j]);
    grad_eta[j] = of_eta[j] * eta[j] * (1 - eta[j]);
    grad_alpha[j] = of_alpha[j] * alpha[j] * (1 - alpha[j]);
  }
}

// The generators' GELU, of contiguous numbers.
template <typename T>
void activate(const T* hidden, int64_t count, T* active) {
  for (int64_t i = 0; i < count; i += LANES<T>) {
    const int rest = count - i < LANES<T> ? count - i : LANES<T>;
    const Vec<T> h = load<T>(hidden + i, rest);
    Vec<T> cumulative, density;
    normal(h, cumulative, density);
    store<T>(active + i, h * cumulative, rest);
  }
}

// Multiplies `grad` with the slope of that GELU.
template <typename T>
void activate_backward(const T* hidden, int64_t count, T* grad) {
  for (int64_t i = 0; i < count; i += LANES<T>) {
    const int rest = count - i < LANES<T> ? count - i : LANES<T>;
    const Vec<T> h = load<T>(hidden + i, rest);
    Vec<T> cumulative, density;
    normal(h, cumulative, density);
    store<T>(grad + i, load<T>(grad + i, rest) * (cumulative + h * density), rest);
  }
}

// Divides tokens z (D rows) by their lengths, at least `eps`. `scale` (one row) is the factor, negative for short ones.
template <typename T>
void normalize(T* z, int64_t stride, int64_t length, T eps, T* scale) {
  for (int64_t start = 0; start < length; start += LANES<T>) {
    const int count = length - start < LANES<T> ? length - start : LANES<T>;
    Vec<T> square = {}, rows[D];
    for (int j = 0; j < D; j++) {
      rows[j] = load<T>(z + j * stride + start, count);
      square += rows[j] * rows[j];
    }
    Vec<T> factor, sign;
    for (int l = 0; l < LANES<T>; l++) {
      const T root = (T)__builtin_sqrt(square[l]);
      factor[l] = 1 / (root < eps ? eps : root);
      sign[l] = root < eps ? -1 : 1;
    }
    for (int j = 0; j < D; j++) store<T>(z + j * stride + start, rows[j] * factor, count);
    store<T>(scale + start, factor * sign, count);
  }
}

// What comes back to tokens before `normalize`, in the place of `grad`, from what comes back behind it.
template <typename T>
void normalize_backward(const T* unit, const T* scale, T* grad, int64_t stride, int64_t length) {
  for (int64_t start = 0; start < length; start += LANES<T>) {
    const int count = length - start < LANES<T> ? length - start : LANES<T>;
    Vec<T> along = {}, grads[D], units[D];
    const Vec<T> factor = load<T>(scale + start, count);
    for (int j = 0; j < D; j++) {
      grads[j] = load<T>(grad + j * stride + start, count);
      units[j] = load<T>(unit + j * stride + start, count);
      along += grads[j] * units[j];
    }
    along = factor > 0 ? along : Vec<T>{};
    const Vec<T> size = factor > 0 ? factor : -factor;
    for (int j = 0; j < D; j++) store<T>(grad + j * stride + start, (grads[j] - units[j] * along) * size, count);
  }
}

#undef INLINE
