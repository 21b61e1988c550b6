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

// The tokens of one head: row r starts at data + r * stride, its tokens are contiguous.
template <typename T>
struct Columns {
  T* data;
  int64_t stride;
};

#define VECTOR_BYTES 16
namespace baseline {
#include "vectors.h"
#include "kernels.h"
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
#define CALL(name, ...)                                       \
  do {                                                        \
    static const std::string set = instruction_set();         \
    if (set == "avx512") avx512::name<scalar_t>(__VA_ARGS__); \
    else if (set == "avx2") avx2::name<scalar_t>(__VA_ARGS__); \
    else baseline::name<scalar_t>(__VA_ARGS__);               \
  } while (false)
#else
#define CALL(name, ...) baseline::name<scalar_t>(__VA_ARGS__)
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

  Columns<T> operator()(int64_t n, int64_t token) const {
    return {data + n / heads * image_stride + n % heads * head_stride + token, stride};
  }
};

// Numbers (T, n, …) of each chunk and head; null where there are none.
template <typename T>
struct Heads {
  T* data;
  int64_t chunk_stride, stride;

  explicit Heads(const Tensor& x)
      : data(x.dim() > 1 ? x.data_ptr<T>() : nullptr), chunk_stride(data ? x.stride(0) : 0),
        stride(data ? x.stride(1) : 0) {}

  T* operator()(int64_t t, int64_t n) const { return data + t * chunk_stride + n * stride; }
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
    const Tokens<scalar_t> queries(x), reads(y);
    const Heads<scalar_t> weights(m);
    for_chunks(x, chunk_size, [&](int64_t t, int64_t n, int64_t start, int64_t count) {
      CALL(read, queries(n, start), count, weights(t, n), eps, reads(n, start));
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
    const Tokens<scalar_t> queries(x), grads(grad), outs(out);
    const Heads<scalar_t> weights(m), grad_weights(grad_memories);
    for_chunks(x, chunk_size, [&](int64_t t, int64_t n, int64_t start, int64_t count) {
      CALL(read_backward, grads(n, start), queries(n, start), count, weights(t, n), eps, outs(n, start),
           grad_weights(t, n));
    });
  });
  finish(out, grad_q);
  return grad_memories;
}

std::tuple<Tensor, Tensor, Tensor> surprise(const Tensor& k, const Tensor& v, const Tensor& memories,
                                            int64_t chunk_size, double eps, bool curvature) {
  const Tensor m = rows(memories, k, chunk_size), x = tokens(k, "k", k.sizes(), m), z = tokens(v, "v", k.sizes(), m);
  const std::vector<int64_t> each = {m.size(0), m.size(1)};
  const Tensor gradient = at::empty(m.sizes(), m.options()), errors = at::empty({each[0], each[1], D}, m.options());
  const Tensor bounds = at::empty(curvature ? each : std::vector<int64_t>{0}, m.options());
  AT_DISPATCH_FLOATING_TYPES(m.scalar_type(), "memory_surprise", [&] {
    const Tokens<scalar_t> keys(x), values(z);
    const Heads<scalar_t> weights(m), found(gradient), error(errors), bound(bounds);
    for_chunks(x, chunk_size, [&](int64_t t, int64_t n, int64_t start, int64_t count) {
      CALL(surprise, keys(n, start), values(n, start), count, weights(t, n), eps, found(t, n), error(t, n),
           bound(t, n));
    });
  });
  return {gradient, errors, bounds};
}

Tensor surprise_backward(const Tensor& grad_gradient, const Tensor& grad_errors, const Tensor& grad_curvature,
                         const Tensor& k, const Tensor& v, const Tensor& memories, int64_t chunk_size, double eps,
                         bool curvature, const Tensor& grad_k, const Tensor& grad_v) {
  const Tensor m = rows(memories, k, chunk_size), x = tokens(k, "k", k.sizes(), m), z = tokens(v, "v", k.sizes(), m);
  const std::vector<int64_t> each = {m.size(0), m.size(1)};
  const Tensor grad = checked(grad_gradient, "grad_gradient", m.sizes(), m);
  const Tensor errors = checked(grad_errors, "grad_errors", {each[0], each[1], D}, m);
  const Tensor bounds = checked(grad_curvature, "grad_curvature", curvature ? each : std::vector<int64_t>{0}, m);
  const Tensor out_k = target(grad_k, "grad_k", k.sizes(), m), out_v = target(grad_v, "grad_v", k.sizes(), m);
  const Tensor grad_memories = at::empty(m.sizes(), m.options());
  AT_DISPATCH_FLOATING_TYPES(m.scalar_type(), "memory_surprise_backward", [&] {
    const Tokens<scalar_t> keys(x), values(z), grad_keys(out_k), grad_values(out_v);
    const Heads<scalar_t> weights(m), given(grad), error(errors), bound(bounds), grad_weights(grad_memories);
    for_chunks(x, chunk_size, [&](int64_t t, int64_t n, int64_t start, int64_t count) {
      CALL(surprise_backward, given(t, n), error(t, n), bound(t, n), keys(n, start), values(n, start), count,
           weights(t, n), eps, grad_keys(n, start), grad_values(n, start), grad_weights(t, n));
    });
  });
  finish(out_k, grad_k);
  finish(out_v, grad_v);
  return grad_memories;
}

// ---- the rule, as rule.py has it under the same names

// Step, momentum and decay, (B·h, 1, d) each, of the generators' outputs (B, 3Cm) for a memory (…, B·h, 2e, d).
std::vector<Tensor> coefficients(const Tensor& outputs, const Tensor& memory) {
  TORCH_CHECK_VALUE(memory.dim() >= 3 && outputs.dim() == 2 && outputs.size(0) > 0 &&
                        outputs.numel() * memory.size(-2) == 3 * memory.numel(),
                    "expected outputs (B, 3Cm) for a memory of sizes ", memory.sizes(), ", got ", outputs.sizes());
  const int64_t d = memory.size(-1);
  return outputs.sigmoid().view({outputs.size(0), 3, -1, d}).transpose(0, 1).reshape({3, -1, 1, d}).unbind();
}

// The factor that keeps u, times `scale` in units of the bound, within the bound.
Tensor bound(const Tensor& u, double scale) {
  return (u * u).sum({-2, -1}, true).mul_(scale * scale).add_(1).rsqrt_();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> step(
    const Tensor& gradient, const Tensor& errors, const Tensor& memory, const Tensor& momentum, const Tensor& in_weight,
    const Tensor& in_bias, const Tensor& out_weight, const Tensor& out_bias, double inner_step, double max_write_norm) {
  const at::AutoDispatchBelowADInplaceOrView plain;
  for (const Tensor& x : {gradient, memory, momentum}) check(x, "rows", memory.sizes());
  for (const Tensor& x : {in_weight, in_bias, out_weight, out_bias}) check(x, "generators", x.sizes());
  const Tensor hidden = at::addmm(in_bias, errors.reshape({-1, in_weight.size(1)}), in_weight.t());
  const Tensor outputs = at::addmm(out_bias, at::gelu(hidden), out_weight.t());
  const auto c = coefficients(outputs, memory);
  const Tensor u = c[0] * gradient, factor = bound(u, inner_step / max_write_norm);
  const Tensor next_momentum = (c[1] * momentum).addcmul_(u, factor, -inner_step);
  return {(memory + next_momentum).addcmul_(memory, c[2], -1), next_momentum, hidden, outputs};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> step_backward(
    const Tensor& grad_memory, const Tensor& grad_momentum, const Tensor& gradient, const Tensor& hidden,
    const Tensor& outputs, const Tensor& memory, const Tensor& momentum, const Tensor& in_weight,
    const Tensor& out_weight, double inner_step, double max_write_norm) {
  const at::AutoDispatchBelowADInplaceOrView plain;
  for (const Tensor& x : {grad_memory, grad_momentum, gradient, memory, momentum}) check(x, "rows", memory.sizes());
  for (const Tensor& x : {in_weight, out_weight, hidden, outputs}) check(x, "generators", x.sizes());
  const auto c = coefficients(outputs, memory);
  const double scale = inner_step / max_write_norm;
  const Tensor u = c[0] * gradient, grad = grad_momentum + grad_memory, factor = bound(u, scale);
  const Tensor along = (grad * u).sum({-2, -1}, true).mul_(factor.pow(3)).mul_(scale * scale);
  const Tensor grad_u = (u * along).addcmul_(grad, factor, -1).mul_(inner_step);
  const auto slope = [&](const Tensor& grad, const Tensor& other, const Tensor& x) {
    return (grad * other).sum(-2, true).mul_(x).mul_(1 - x).view({outputs.size(0), -1});
  };
  const Tensor grad_outputs = at::stack({slope(grad_u, gradient, c[0]), slope(grad, momentum, c[1]),
                                         slope(grad_memory, memory, c[2]).neg_()}, 1).flatten(1);
  const Tensor grad_hidden = at::gelu_backward(at::mm(grad_outputs, out_weight), hidden);
  std::vector<int64_t> sizes = memory.sizes().vec();
  sizes.erase(sizes.end() - 2);
  return {c[0] * grad_u, at::mm(grad_hidden, in_weight).view(sizes),
          at::addcmul(grad_memory, grad_memory, c[2], -1), c[1] * grad, grad_hidden, grad_outputs};
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
