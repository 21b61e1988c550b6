// The operators of one head in one chunk. Names and equations follow pytorch.py and operators.py.
//
// Rows of weights, cat(W1ᵀ, W2), are (2e, d), contiguous. A short last vector is filled with zeros: tokens that are zero have no
// error, no gradient and no curvature, so sums over tokens may include them.

// Squared norms of the rows of W2.
template <typename T>
INLINE void square_norms(T* norms, const T* w2) {
  for (int i = 0; i < E; i++) {
    norms[i] = 0;
    for (int j = 0; j < D; j++) norms[i] += w2[i * D + j] * w2[i * D + j];
  }
}

// The gradient of Eq. 3 at `weights`, (R, D), the mean squared errors, (D,), and the curvature bound unless it is null.
template <typename T>
void surprise(Columns<T> k, Columns<T> v, int length, const T* weights, T eps, T* gradient, T* errors, T* curvature) {
  const T *w1 = weights, *w2 = weights + E * D;
  Sums<T> first = {}, second = {};
  Vec<T> squares[D] = {}, bound = {};
  T norms[E];
  square_norms(norms, w2);
  for_blocks<T>(length, [&](auto size, int start, int count) __attribute__((always_inline)) {
    constexpr int P = decltype(size)::value;
    Block<T, D, P> key, error;
    Block<T, E, P> hidden, active, slope;
    Vec<T> factor[P], lengths[P];
    load(key, k, start, count);
    load(error, v, start, count);
    normalize(key, eps, factor);
    to_hidden(hidden, w1, key);
    gelu(hidden, active, &slope);
    for (int j = 0; j < D; j++)
      for (int p = 0; p < P; p++) error.rows[j][p] = key.rows[j][p] - error.rows[j][p];
    add_to_channels(error, w2, active);
    for (int j = 0; j < D; j++)
      for (int p = 0; p < P; p++) squares[j] += error.rows[j][p] * error.rows[j][p];
    add_products(second, active, error);
    to_hidden(hidden, w2, error);
    multiply(hidden, hidden, slope);
    add_products(first, hidden, key);
    if (curvature != nullptr) {
      square_lengths(lengths, key);
      for (int i = 0; i < E; i++)
        for (int p = 0; p < P; p++)
          bound += active.rows[i][p] * active.rows[i][p] +
                   slope.rows[i][p] * slope.rows[i][p] * norms[i] * lengths[p];
    }
  });
  finish<T>(gradient, first, T(2) / D);
  finish<T>(gradient + E * D, second, T(2) / D);
  for (int j = 0; j < D; j++) errors[j] = sum<T>(squares[j]) / length;
  if (curvature != nullptr) *curvature = sum<T>(bound) * 2 / D;
}

// What comes back to k, v and the weights from `grad_gradient` (R, D), `grad_errors` (D,) and, unless it is null,
// `grad_curvature`, as surprise_backward of pytorch.py has it.
template <typename T>
void surprise_backward(const T* grad_gradient, const T* grad_errors, const T* grad_curvature, Columns<T> k,
                       Columns<T> v, int length, const T* weights, T eps, Columns<T> grad_k, Columns<T> grad_v,
                       T* grad_weights) {
  const T *w1 = weights, *w2 = weights + E * D;
  const T scale = grad_curvature == nullptr ? 0 : *grad_curvature * 4 / D;
  T g1[E * D], g2[E * D], norms[E];
  for (int i = 0; i < E * D; i++) {
    g1[i] = grad_gradient[i] * 2 / D;
    g2[i] = grad_gradient[E * D + i] * 2 / D;
  }
  square_norms(norms, w2);
  Sums<T> first = {}, second = {};
  Vec<T> of_norms[E] = {};
  for_blocks<T>(length, [&](auto size, int start, int count) __attribute__((always_inline)) {
    constexpr int P = decltype(size)::value;
    Block<T, D, P> key, error, grad_error;
    Block<T, E, P> hidden, active, slope, bend, back, grad_slopes, grad_back, grad_active;
    Vec<T> factor[P], lengths[P];
    load(key, k, start, count);
    load(error, v, start, count);
    normalize(key, eps, factor);
    to_hidden(hidden, w1, key);
    to_hidden(grad_slopes, g1, key);
    gelu(hidden, active, &slope, &bend);
    for (int j = 0; j < D; j++)
      for (int p = 0; p < P; p++) error.rows[j][p] = key.rows[j][p] - error.rows[j][p];
    add_to_channels(error, w2, active);
    to_hidden(back, w2, error);
    to_hidden(grad_active, g2, error);
    multiply(grad_back, grad_slopes, slope);
    for (int j = 0; j < D; j++)
      for (int p = 0; p < P; p++) grad_error.rows[j][p] = error.rows[j][p] * (grad_errors[j] * 2 / length);
    add_to_channels(grad_error, w2, grad_back);
    add_to_channels(grad_error, g2, active);
    to_hidden<true>(grad_active, w2, grad_error);
    add_products(second, grad_back, error);
    add_products(second, active, grad_error);
    for (int j = 0; j < D; j++)
      for (int p = 0; p < P; p++) error.rows[j][p] = -grad_error.rows[j][p];
    store(grad_v, start, count, error);
    multiply(grad_slopes, grad_slopes, bend);
    multiply(grad_slopes, grad_slopes, back);
    multiply(back, back, slope);
    add_to_channels(grad_error, g1, back);
    if (grad_curvature != nullptr) {
      square_lengths(lengths, key);
      for (int p = 0; p < P; p++) {
        Vec<T> of_length = {};
        for (int i = 0; i < E; i++) {
          const Vec<T> square = scale * slope.rows[i][p] * slope.rows[i][p];
          grad_active.rows[i][p] += scale * active.rows[i][p];
          grad_slopes.rows[i][p] += scale * slope.rows[i][p] * bend.rows[i][p] * norms[i] * lengths[p];
          of_norms[i] += square * lengths[p];
          of_length += square * norms[i];
        }
        for (int j = 0; j < D; j++) grad_error.rows[j][p] += key.rows[j][p] * of_length;
      }
    }
    for (int i = 0; i < E; i++)  // what comes back to the hidden units
      for (int p = 0; p < P; p++) grad_slopes.rows[i][p] += grad_active.rows[i][p] * slope.rows[i][p];
    add_products(first, grad_slopes, key);
    add_to_channels(grad_error, w1, grad_slopes);
    normalize_backward(grad_error, key, eps, factor);
    store(grad_k, start, count, grad_error);
  });
  finish<T>(grad_weights, first);
  finish<T>(grad_weights + E * D, second);
  if (grad_curvature != nullptr)
    for (int i = 0; i < E; i++)
      for (int j = 0; j < D; j++) grad_weights[(E + i) * D + j] += w2[i * D + j] * sum<T>(of_norms[i]);
}

// Eq. 2: y = q + W2ᵀ·GELU(W1ᵀ·q).
template <typename T>
void read(Columns<T> q, int length, const T* weights, T eps, Columns<T> y) {
  for_blocks<T>(length, [&](auto size, int start, int count) __attribute__((always_inline)) {
    constexpr int P = decltype(size)::value;
    Block<T, D, P> x;
    Block<T, E, P> hidden;
    Vec<T> factor[P];
    load(x, q, start, count);
    normalize(x, eps, factor);
    to_hidden(hidden, weights, x);
    gelu(hidden, hidden);
    add_to_channels(x, weights + E * D, hidden);
    store(y, start, count, x);
  });
}

// What comes back to q and the weights from `grad_y`.
template <typename T>
void read_backward(Columns<T> grad_y, Columns<T> q, int length, const T* weights, T eps, Columns<T> grad_q,
                   T* grad_weights) {
  const T *w1 = weights, *w2 = weights + E * D;
  Sums<T> first = {}, second = {};
  for_blocks<T>(length, [&](auto size, int start, int count) __attribute__((always_inline)) {
    constexpr int P = decltype(size)::value;
    Block<T, D, P> x, grad;
    Block<T, E, P> hidden, active, slope;
    Vec<T> factor[P];
    load(x, q, start, count);
    load(grad, grad_y, start, count);
    normalize(x, eps, factor);
    to_hidden(hidden, w1, x);
    gelu(hidden, active, &slope);
    add_products(second, active, grad);
    to_hidden(hidden, w2, grad);
    multiply(hidden, hidden, slope);
    add_products(first, hidden, x);
    add_to_channels(grad, w1, hidden);
    normalize_backward(grad, x, eps, factor);
    store(grad_q, start, count, grad);
  });
  finish<T>(grad_weights, first);
  finish<T>(grad_weights + E * D, second);
}
