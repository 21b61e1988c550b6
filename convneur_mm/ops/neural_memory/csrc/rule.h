// Eq. 4 for one head, as rule.py has it. Step, momentum and decay, behind their sigmoid, are rows of (D,) `apart`
// numbers from each other; all else is (R, D).

// The factor that keeps a write within its bound, from its squared norm.
template <typename T>
INLINE T bound(T square, T max_norm) {
  return 1 / (T)__builtin_sqrt(1 + square / (max_norm * max_norm));
}

template <typename T>
void write(const T* gradient, const T* step, int64_t apart, const T* memory, const T* momentum, T inner_step,
           T max_norm, T* next, T* next_momentum) {
  const T *eta = step + apart, *alpha = eta + apart;
  T squares[D] = {}, square = 0;
  for (int r = 0; r < R; r++)
    for (int j = 0; j < D; j++) {
      const int i = r * D + j;
      next_momentum[i] = inner_step * step[j] * gradient[i];
      squares[j] += next_momentum[i] * next_momentum[i];
    }
  for (int j = 0; j < D; j++) square += squares[j];
  const T factor = bound(square, max_norm);
  for (int r = 0; r < R; r++)
    for (int j = 0; j < D; j++) {
      const int i = r * D + j;
      next_momentum[i] = eta[j] * momentum[i] - factor * next_momentum[i];
      next[i] = (1 - alpha[j]) * memory[i] + next_momentum[i];
    }
}

// `grad_memory` and `grad_momentum` are what comes back to memory and momentum after the chunk, and become what comes
// back to those before it; `grad_step` is laid out as `step`, before the sigmoid.
template <typename T>
void write_backward(T* grad_memory, T* grad_momentum, const T* gradient, const T* step, int64_t apart, const T* memory,
                    const T* momentum, T inner_step, T max_norm, T* grad_gradient, T* grad_step) {
  const T *eta = step + apart, *alpha = eta + apart;
  T squares[D] = {}, products[D] = {}, of_step[D] = {}, of_eta[D] = {}, of_alpha[D] = {}, square = 0, along = 0;
  for (int r = 0; r < R; r++)
    for (int j = 0; j < D; j++) {
      const int i = r * D + j;
      const T write = inner_step * step[j] * gradient[i];
      grad_momentum[i] += grad_memory[i];
      squares[j] += write * write;
      products[j] += write * grad_momentum[i];
    }
  for (int j = 0; j < D; j++) {
    square += squares[j];
    along += products[j];
  }
  const T factor = bound(square, max_norm), curb = along * factor * (factor / max_norm) * (factor / max_norm);
  for (int r = 0; r < R; r++)
    for (int j = 0; j < D; j++) {
      const int i = r * D + j;
      const T grad_write = inner_step * (inner_step * step[j] * gradient[i] * curb - factor * grad_momentum[i]);
      of_step[j] += grad_write * gradient[i];
      of_eta[j] += grad_momentum[i] * momentum[i];
      of_alpha[j] -= grad_memory[i] * memory[i];
      grad_gradient[i] = grad_write * step[j];
      grad_momentum[i] *= eta[j];
      grad_memory[i] *= 1 - alpha[j];
    }
  for (int j = 0; j < D; j++) {
    grad_step[j] = of_step[j] * step[j] * (1 - step[j]);
    grad_step[apart + j] = of_eta[j] * eta[j] * (1 - eta[j]);
    grad_step[2 * apart + j] = of_alpha[j] * alpha[j] * (1 - alpha[j]);
  }
}
