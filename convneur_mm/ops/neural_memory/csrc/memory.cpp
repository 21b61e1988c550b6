// The memory's operators for CPUs, for heads of 16 channels with 8 hidden units: see cpu.py, which this is the module of.
//
// Loops over chunks and heads are here, what happens to one head in one chunk is in kernels.h, which is compiled for
// several instruction sets.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/extension.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#define VECTOR_BYTES 16
namespace baseline {
#include "vectors.h"
#include "kernels.h"
#include "rule.h"
}
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#undef INLINE
#undef VECTOR_BYTES
#define VECTOR_BYTES 32
namespace avx2 {
#include "vectors.h"
#include "kernels.h"
#include "rule.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")
#undef INLINE
#undef VECTOR_BYTES
#define VECTOR_BYTES 64
namespace avx512 {
#include "vectors.h"
#include "kernels.h"
#include "rule.h"
}
#pragma GCC pop_options
#endif

using at::Tensor;

namespace memory {

// The instructions that PyTorch itself uses: what the processor has, or less of it with ATEN_CPU_CAPABILITY.
std::string instruction_set() {
#ifdef HAS_X86
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return "avx512";
  if (capability == "AVX2") return "avx2";
#endif
  return "baseline";
}

// The function of that name for the instruction set, called with the arguments.
#ifdef HAS_X86
#define CALL(name, ...)                                           \
  do {                                                            \
    static const std::string set = instruction_set();             \
    if (set == "avx512") avx512::name<T>(__VA_ARGS__);            \
    else if (set == "avx2") avx2::name<T>(__VA_ARGS__);           \
    else baseline::name<T>(__VA_ARGS__);                          \
  } while (false)
#else
#define CALL(name, ...) baseline::name<T>(__VA_ARGS__)
#endif

constexpr int64_t D = baseline::D, E = baseline::E, R = baseline::R;

// Tokens (B, h, d, N), each row contiguous.
template <typename T>
struct Tokens {
  T* data;
  int64_t heads, image_stride, head_stride, stride;

  explicit Tokens(const Tensor& x)
      : data(x.data_ptr<T>()), heads(x.size(1)), image_stride(x.stride(0)), head_stride(x.stride(1)),
        stride(x.stride(2)) {}

  T* operator()(int64_t n, int64_t token) const {
    return data + n / heads * image_stride + n % heads * head_stride + token;
  }
};

// Every operator checks all of its arguments: what passes is read and written by plain pointers.
void check(const Tensor& x, const char* name, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(x.device().is_cpu() && x.sizes() == sizes, "expected ", name, " of sizes ", sizes,
                    " on a CPU, got ", x.sizes(), " on ", x.device());
}

// Numbers of `sizes` in the dtype of `like`, contiguous.
Tensor checked(const Tensor& x, const char* name, at::IntArrayRef sizes, const Tensor& like) {
  check(x, name, sizes);
  return x.to(like.scalar_type()).contiguous();
}

// Tokens in the dtype of `like` whose rows are contiguous.
Tensor tokens(const Tensor& x, const char* name, at::IntArrayRef sizes, const Tensor& like) {
  check(x, name, sizes);
  const Tensor y = x.to(like.scalar_type());
  return y.stride(3) == 1 ? y : y.contiguous();
}

// Where tokens are to be written: `x` itself, or a tensor that is copied to it afterwards.
Tensor target(const Tensor& x, const char* name, at::IntArrayRef sizes, const Tensor& like) {
  check(x, name, sizes);
  const bool fits = x.scalar_type() == like.scalar_type() && x.stride(3) == 1;
  return fits ? x : at::empty(sizes, like.options());
}

void finish(const Tensor& target, const Tensor& x) {
  if (!target.is_same(x)) x.copy_(target);
}

// Memories (T, n, 2e, d) of the chunks of tokens; those of all chunks may be one in memory.
Tensor rows(const Tensor& x, const Tensor& tokens, int64_t chunk_size) {
  TORCH_CHECK_VALUE(chunk_size >= 1, "expected a chunk_size of at least 1, got ", chunk_size);
  TORCH_CHECK_VALUE(tokens.dim() == 4 && tokens.size(2) == D, "expected tokens of sizes (B, h, ", D, ", N), got ",
                    tokens.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble,
                    "expected memories in float32 or float64, got ", x.scalar_type());
  const int64_t length = tokens.size(3), chunks = length / chunk_size + (length % chunk_size != 0);
  check(x, "memories", {chunks, tokens.size(0) * tokens.size(1), R, D});
  return chunks == 0 || x[0].is_contiguous() ? x : x.contiguous();
}

// Runs body(t, n, first token, tokens) for all chunks of all heads.
template <typename Body>
void for_chunks(const Tensor& tokens, int64_t chunk_size, const Body& body) {
  const int64_t length = tokens.size(3), chunks = length / chunk_size + (length % chunk_size != 0);
  at::parallel_for(0, chunks * tokens.size(0) * tokens.size(1), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t t = i % chunks;
      body(t, i / chunks, t * chunk_size, std::min(chunk_size, length - t * chunk_size));
    }
  });
}

Tensor read(const Tensor& q, const Tensor& memories, int64_t chunk_size, double eps) {
  const Tensor m = rows(memories, q, chunk_size), x = tokens(q, "q", q.sizes(), m);
  const Tensor y = at::empty(q.sizes(), m.options());
  AT_DISPATCH_FLOATING_TYPES(m.scalar_type(), "memory_read", [&] {
    using T = scalar_t;
    const Tokens<T> queries(x), reads(y);
    const T* weights = m.data_ptr<T>();
    const int64_t step = m.stride(0);
    for_chunks(x, chunk_size, [&](int64_t t, int64_t n, int64_t start, int64_t count) {
      CALL(read, queries(n, start), queries.stride, count, weights + t * step + n * R * D, eps, reads(n, start),
           reads.stride);
    });
  });
  return y.to(q.scalar_type());
}

Tensor read_backward(const Tensor& grad_y, const Tensor& q, const Tensor& memories, int64_t chunk_size, double eps,
                     const Tensor& grad_q) {
  const Tensor m = rows(memories, q, chunk_size), x = tokens(q, "q", q.sizes(), m);
  const Tensor grad = tokens(grad_y, "grad_y", q.sizes(), m), out = target(grad_q, "grad_q", q.sizes(), m);
  const Tensor grad_memories = at::empty(m.sizes(), m.options());
  AT_DISPATCH_FLOATING_TYPES(m.scalar_type(), "memory_read_backward", [&] {
    using T = scalar_t;
    const Tokens<T> queries(x), grads(grad), outs(out);
    const T* weights = m.data_ptr<T>();
    T* grad_weights = grad_memories.data_ptr<T>();
    const int64_t step = m.stride(0), all = m.size(1);
    for_chunks(x, chunk_size, [&](int64_t t, int64_t n, int64_t start, int64_t count) {
      CALL(read_backward, grads(n, start), grads.stride, queries(n, start), queries.stride, count,
           weights + t * step + n * R * D, eps, outs(n, start), outs.stride, grad_weights + (t * all + n) * R * D);
    });
  });
  finish(out, grad_q);
  return grad_memories;
}

std::tuple<Tensor, Tensor, Tensor> surprise(const Tensor& k, const Tensor& v, const Tensor& memories,
                                            int64_t chunk_size, double eps, bool curvature) {
  const Tensor m = rows(memories, k, chunk_size), x = tokens(k, "k", k.sizes(), m), z = tokens(v, "v", k.sizes(), m);
  const int64_t chunks = m.size(0), all = m.size(1);
  const Tensor gradient = at::empty(m.sizes(), m.options()), errors = at::empty({chunks, all, D}, m.options());
  const Tensor bounds = at::empty(curvature ? std::vector<int64_t>{chunks, all} : std::vector<int64_t>{0}, m.options());
  AT_DISPATCH_FLOATING_TYPES(m.scalar_type(), "memory_surprise", [&] {
    using T = scalar_t;
    const Tokens<T> keys(x), values(z);
    const T* weights = m.data_ptr<T>();
    T *found = gradient.data_ptr<T>(), *error = errors.data_ptr<T>(), *bound = bounds.data_ptr<T>();
    const int64_t step = m.stride(0);
    for_chunks(x, chunk_size, [&](int64_t t, int64_t n, int64_t start, int64_t count) {
      const int64_t place = t * all + n;
      CALL(surprise, keys(n, start), keys.stride, values(n, start), values.stride, count,
           weights + t * step + n * R * D, eps, found + place * R * D, error + place * D,
           curvature ? bound + place : nullptr);
    });
  });
  return {gradient, errors, bounds};
}

Tensor surprise_backward(const Tensor& grad_gradient, const Tensor& grad_errors, const Tensor& grad_curvature,
                         const Tensor& k, const Tensor& v, const Tensor& memories, int64_t chunk_size, double eps,
                         bool curvature, const Tensor& grad_k, const Tensor& grad_v) {
  const Tensor m = rows(memories, k, chunk_size), x = tokens(k, "k", k.sizes(), m), z = tokens(v, "v", k.sizes(), m);
  const int64_t chunks = m.size(0), all = m.size(1);
  const Tensor grad = checked(grad_gradient, "grad_gradient", m.sizes(), m);
  const Tensor errors = checked(grad_errors, "grad_errors", {chunks, all, D}, m);
  const Tensor bounds = curvature ? checked(grad_curvature, "grad_curvature", {chunks, all}, m) : grad_curvature;
  const Tensor out_k = target(grad_k, "grad_k", k.sizes(), m), out_v = target(grad_v, "grad_v", k.sizes(), m);
  const Tensor grad_memories = at::empty(m.sizes(), m.options());
  AT_DISPATCH_FLOATING_TYPES(m.scalar_type(), "memory_surprise_backward", [&] {
    using T = scalar_t;
    const Tokens<T> keys(x), values(z), grad_keys(out_k), grad_values(out_v);
    const T *weights = m.data_ptr<T>(), *given = grad.data_ptr<T>(), *error = errors.data_ptr<T>();
    const T* bound = curvature ? bounds.data_ptr<T>() : nullptr;
    T* grad_weights = grad_memories.data_ptr<T>();
    const int64_t step = m.stride(0);
    for_chunks(x, chunk_size, [&](int64_t t, int64_t n, int64_t start, int64_t count) {
      const int64_t place = t * all + n;
      CALL(surprise_backward, given + place * R * D, error + place * D, curvature ? bound + place : nullptr,
           keys(n, start), keys.stride, values(n, start), values.stride, count, weights + t * step + n * R * D, eps,
           grad_keys(n, start), grad_keys.stride, grad_values(n, start), grad_values.stride,
           grad_weights + place * R * D);
    });
  });
  finish(out_k, grad_k);
  finish(out_v, grad_v);
  return grad_memories;
}

// What a step works on: memory and momentum (…, n, 2e, d), the gradient, and the generators' outputs (B, 3Cm).
struct Step {
  int64_t all, heads;
  Tensor m, p, g, o;

  Step(const Tensor& memory, const Tensor& momentum, const Tensor& gradient, const Tensor& outputs)
      : m(memory.contiguous()) {
    TORCH_CHECK_VALUE(m.dim() >= 3 && m.size(-2) == R && m.size(-1) == D, "expected a memory of sizes (n, ", R, ", ", D,
                      "), got ", m.sizes());
    TORCH_CHECK_VALUE(outputs.dim() == 2 && outputs.size(0) > 0 && outputs.numel() * R == 3 * m.numel(),
                      "expected outputs of sizes (B, 3Cm), got ", outputs.sizes());
    all = m.numel() / (R * D);
    heads = all / outputs.size(0);
    p = checked(momentum, "momentum", m.sizes(), m);
    g = checked(gradient, "gradient", m.sizes(), m);
    o = checked(outputs, "outputs", {all / heads, 3 * heads * D}, m).sigmoid();
  }

  // Where the step of a head is among the outputs.
  int64_t place(int64_t n) const { return (n / heads * 3 * heads + n % heads) * D; }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> step(
    const Tensor& gradient, const Tensor& errors, const Tensor& memory, const Tensor& momentum, const Tensor& in_weight,
    const Tensor& in_bias, const Tensor& out_weight, const Tensor& out_bias, double inner_step, double max_write_norm) {
  for (const Tensor& x : {in_weight, in_bias, out_weight, out_bias}) check(x, "generators", x.sizes());
  const Tensor hidden = at::addmm(in_bias, errors.reshape({-1, in_weight.size(1)}), in_weight.t());
  const Tensor outputs = at::addmm(out_bias, at::gelu(hidden), out_weight.t());
  const Step given(memory, momentum, gradient, outputs);
  const Tensor next = at::empty_like(given.m), next_momentum = at::empty_like(given.m);
  AT_DISPATCH_FLOATING_TYPES(given.m.scalar_type(), "memory_step", [&] {
    using T = scalar_t;
    at::parallel_for(0, given.all, 64, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        const int64_t at = n * R * D;
        CALL(write, given.g.data_ptr<T>() + at, given.o.data_ptr<T>() + given.place(n), given.heads * D,
             given.m.data_ptr<T>() + at, given.p.data_ptr<T>() + at, inner_step, max_write_norm,
             next.data_ptr<T>() + at, next_momentum.data_ptr<T>() + at);
      }
    });
  });
  return {next, next_momentum, hidden, outputs};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> step_backward(
    const Tensor& grad_memory, const Tensor& grad_momentum, const Tensor& gradient, const Tensor& hidden,
    const Tensor& outputs, const Tensor& memory, const Tensor& momentum, const Tensor& in_weight,
    const Tensor& out_weight, double inner_step, double max_write_norm) {
  for (const Tensor& x : {in_weight, out_weight}) check(x, "generators", x.sizes());
  const Step given(memory, momentum, gradient, outputs);
  const Tensor of_m = checked(grad_memory, "grad_memory", given.m.sizes(), given.m).clone();
  const Tensor of_p = checked(grad_momentum, "grad_momentum", given.m.sizes(), given.m).clone();
  const Tensor of_g = at::empty_like(given.m), of_o = at::empty_like(given.o);
  AT_DISPATCH_FLOATING_TYPES(given.m.scalar_type(), "memory_step_backward", [&] {
    using T = scalar_t;
    at::parallel_for(0, given.all, 64, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        const int64_t at = n * R * D;
        CALL(write_backward, of_m.data_ptr<T>() + at, of_p.data_ptr<T>() + at, given.g.data_ptr<T>() + at,
             given.o.data_ptr<T>() + given.place(n), given.heads * D, given.m.data_ptr<T>() + at,
             given.p.data_ptr<T>() + at, inner_step, max_write_norm, of_g.data_ptr<T>() + at,
             of_o.data_ptr<T>() + given.place(n));
      }
    });
  });
  const Tensor grad_hidden = at::gelu_backward(at::mm(of_o, out_weight), hidden);
  std::vector<int64_t> sizes = given.m.sizes().vec();
  sizes.erase(sizes.end() - 2);
  return {of_g, at::mm(grad_hidden, in_weight).view(sizes), of_m, of_p, grad_hidden, of_o};
}

}  // namespace memory

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("SOURCE") = SOURCE;
  m.attr("HEAD_DIM") = memory::D;
  m.attr("HIDDEN_DIM") = memory::E;
#ifdef HAS_X86
  m.attr("INSTRUCTION_SETS") = std::vector<std::string>{"baseline", "avx2", "avx512"};
#else
  m.attr("INSTRUCTION_SETS") = std::vector<std::string>{"baseline"};
#endif
  m.def("instruction_set", &memory::instruction_set);
  const pybind11::call_guard<pybind11::gil_scoped_release> without_gil;
  m.def("read", &memory::read, without_gil);
  m.def("read_backward", &memory::read_backward, without_gil);
  m.def("surprise", &memory::surprise, without_gil);
  m.def("surprise_backward", &memory::surprise_backward, without_gil);
  m.def("step", &memory::step, without_gil);
  m.def("step_backward", &memory::step_backward, without_gil);
}
