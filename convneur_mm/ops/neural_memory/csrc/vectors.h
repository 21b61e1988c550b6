// Blocks of tokens in explicit vectors of VECTOR_BYTES: loads, stores, products, GELU, normalisation.
//
// memory.cpp includes this file several times, each time in another namespace and for other instructions, so it must
// neither include nor instantiate anything that the linker could take from one of them for another.

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

// `count` tokens from `start` on.
template <typename T, int P>
INLINE void load(Block<T, D, P>& block, Columns<T> x, int start, int count) {
  for (int r = 0; r < D; r++)
    for (int p = 0; p < P; p++)
      block.rows[r][p] = load<T>(x.data + r * x.stride + start + p * LANES<T>, count - p * LANES<T>);
}

template <typename T, int P>
INLINE void store(Columns<T> x, int start, int count, const Block<T, D, P>& block) {
  for (int r = 0; r < D; r++)
    for (int p = 0; p < P; p++)
      store<T>(x.data + r * x.stride + start + p * LANES<T>, block.rows[r][p], count - p * LANES<T>);
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

template <typename T>
INLINE void finish(T* out, const Sums<T>& sums, T scale = 1) {
  for (int i = 0; i < E; i++)
    for (int j = 0; j < D; j++) out[i * D + j] = scale * sum<T>(sums.of[i][j]);
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

// GELU and, unless they are null, its slope Φ(h) + h·φ(h) and the slope's slope (2 - h²)·φ(h).
template <typename T, int P>
INLINE void gelu(const Block<T, E, P>& hidden, Block<T, E, P>& active, Block<T, E, P>* slope = nullptr,
                 Block<T, E, P>* bend = nullptr) {
  for (int i = 0; i < E; i++)
    for (int p = 0; p < P; p++) {
      const Vec<T> h = hidden.rows[i][p];
      Vec<T> cumulative, density;
      normal(h, cumulative, density);
      active.rows[i][p] = h * cumulative;
      if (slope != nullptr) slope->rows[i][p] = cumulative + h * density;
      if (bend != nullptr) bend->rows[i][p] = density * (2 - h * h);
    }
}

template <typename T, int P>
INLINE void multiply(Block<T, E, P>& out, const Block<T, E, P>& a, const Block<T, E, P>& b) {
  for (int i = 0; i < E; i++)
    for (int p = 0; p < P; p++) out.rows[i][p] = a.rows[i][p] * b.rows[i][p];
}

// Squared lengths of tokens.
template <typename T, int P>
INLINE void square_lengths(Vec<T>* lengths, const Block<T, D, P>& x) {
  for (int p = 0; p < P; p++) {
    lengths[p] = Vec<T>{};
    for (int j = 0; j < D; j++) lengths[p] += x.rows[j][p] * x.rows[j][p];
  }
}

// Divides tokens by their lengths, or by `eps` where they are shorter; nothing if it is 0. `factor` is what multiplies
// them, negative where a token is short.
template <typename T, int P>
INLINE void normalize(Block<T, D, P>& x, T eps, Vec<T>* factor) {
  if (eps == 0) return;
  Vec<T> squares[P];
  square_lengths(squares, x);
  for (int p = 0; p < P; p++) {
    for (int l = 0; l < LANES<T>; l++) {
      const T root = (T)__builtin_sqrt(squares[p][l]);
      factor[p][l] = root < eps ? -1 / eps : 1 / root;
    }
    const Vec<T> size = factor[p] > 0 ? factor[p] : -factor[p];
    for (int j = 0; j < D; j++) x.rows[j][p] *= size;
  }
}

// What comes back to tokens before `normalize`, in the place of `grad`, which comes back to `unit`.
template <typename T, int P>
INLINE void normalize_backward(Block<T, D, P>& grad, const Block<T, D, P>& unit, T eps, const Vec<T>* factor) {
  if (eps == 0) return;
  for (int p = 0; p < P; p++) {
    Vec<T> along = {};
    for (int j = 0; j < D; j++) along += grad.rows[j][p] * unit.rows[j][p];
    along = factor[p] > 0 ? along : Vec<T>{};
    const Vec<T> size = factor[p] > 0 ? factor[p] : -factor[p];
    for (int j = 0; j < D; j++) grad.rows[j][p] = (grad.rows[j][p] - unit.rows[j][p] * along) * size;
  }
}
