// The neural memory on a CPU, for heads of 16 channels with 8 hidden units: see cpu.py, which this is the module of.
//
// Loops over chunks and heads are here, what happens to one head in one chunk is in kernels.h, which is compiled for
// several instruction sets.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/extension.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

// MemoryOptions of types.py.
struct Options {
  int64_t chunk_size;
  double inner_step, max_write_norm;
  bool sequential, final;

  Options() = default;
  explicit Options(const pybind11::handle& options)
      : chunk_size(options.attr("chunk_size").cast<int64_t>()),
        inner_step(options.attr("inner_step").cast<double>()),
        max_write_norm(options.attr("max_write_norm").cast<double>()),
        sequential(options.attr("update_rule").cast<std::string>() == "sequential"),
        final(options.attr("retrieve").cast<std::string>() == "final") {
    TORCH_CHECK_VALUE(chunk_size >= 1, "expected a chunk_size of at least 1, got ", chunk_size);
    TORCH_CHECK_VALUE(max_write_norm > 0, "expected a max_write_norm above 0, got ", max_write_norm);
  }
};

#define VECTOR_BYTES 16
namespace baseline {
#include "kernels.h"
}
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#undef VECTOR_BYTES
#define VECTOR_BYTES 32
namespace avx2 {
#include "kernels.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")
#undef VECTOR_BYTES
#define VECTOR_BYTES 64
namespace avx512 {
#include "kernels.h"
}
#pragma GCC pop_options
#endif

using at::Tensor;

namespace {

template <typename T>
struct Kernels {
  decltype(&baseline::surprise<T>) surprise;
  decltype(&baseline::surprise_backward<T>) surprise_backward;
  decltype(&baseline::read<T>) read;
  decltype(&baseline::read_backward<T>) read_backward;
  decltype(&baseline::write<T>) write;
  decltype(&baseline::write_backward<T>) write_backward;
  decltype(&baseline::activate<T>) activate;
  decltype(&baseline::activate_backward<T>) activate_backward;
  decltype(&baseline::normalize<T>) normalize;
  decltype(&baseline::normalize_backward<T>) normalize_backward;
};

#define KERNELS(set)                                                                                              \
  Kernels<T> {                                                                                                    \
    set::surprise<T>, set::surprise_backward<T>, set::read<T>, set::read_backward<T>, set::write<T>,              \
        set::write_backward<T>, set::activate<T>, set::activate_backward<T>, set::normalize<T>,                   \
        set::normalize_backward<T>                                                                                \
  }

// The instructions that PyTorch itself uses: what the processor has, or less of it with ATEN_CPU_CAPABILITY.
std::string instruction_set() {
#ifdef HAS_X86
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return "avx512";
  if (capability == "AVX2") return "avx2";
#endif
  return "baseline";
}

template <typename T>
const Kernels<T>& kernels() {
  static const Kernels<T> chosen = [] {
#ifdef HAS_X86
    const std::string set = instruction_set();
    if (set == "avx512") return KERNELS(avx512);
    if (set == "avx2") return KERNELS(avx2);
#endif
    return KERNELS(baseline);
  }();
  return chosen;
}

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

// Weights of n = image and head, after or before chunk t: (T, B, h, 2e, d), the last two contiguous.
template <typename T>
struct Rows {
  T* data;
  int64_t heads, chunk_stride, image_stride, head_stride;

  explicit Rows(const Tensor& x)
      : data(x.data_ptr<T>()), heads(x.size(2)), chunk_stride(x.stride(0)), image_stride(x.stride(1)),
        head_stride(x.stride(2)) {}

  T* operator()(int64_t t, int64_t n) const {
    return data + t * chunk_stride + n / heads * image_stride + n % heads * head_stride;
  }
};

// Every function checks all of its arguments with these: what passes is read and written by plain pointers.
void check_type(const Tensor& x, const char* name, at::ScalarType type) {
  TORCH_CHECK_VALUE(x.device().is_cpu() && x.scalar_type() == type, "expected ", name, " of type ", type,
                    " on a CPU, got ", x.scalar_type(), " on ", x.device());
}

void check_sizes(const Tensor& x, const char* name, at::IntArrayRef sizes, const Tensor& like) {
  check_type(x, name, like.scalar_type());
  TORCH_CHECK_VALUE(x.sizes() == sizes, "expected ", name, " of sizes ", sizes, ", got ", x.sizes());
}

void check_contiguous(const Tensor& x, const char* name, at::IntArrayRef sizes, const Tensor& like) {
  check_sizes(x, name, sizes, like);
  TORCH_CHECK_VALUE(x.is_contiguous(), "expected ", name, " to be contiguous, got strides ", x.strides());
}

// Tokens (B, h, d, N), contiguous over N: the first argument of a function, which gives the rest their sizes and type.
void check_tokens(const Tensor& x, const char* name) {
  check_type(x, name, x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(2) == D, "expected ", name, " of sizes (B, h, ", D, ", N), got ", x.sizes());
  TORCH_CHECK_VALUE(x.stride(3) == 1 || x.size(3) < 2, "expected ", name, " to be contiguous over N, got strides ",
                    x.strides());
}

void check_tokens(const Tensor& x, const char* name, const Tensor& like) {
  check_sizes(x, name, like.sizes(), like);
  check_tokens(x, name);
}

// Tokens as `like`, also in the distance of their rows.
void check_rows_as_far(const Tensor& x, const char* name, const Tensor& like) {
  check_tokens(x, name, like);
  TORCH_CHECK_VALUE(x.stride(2) == like.stride(2), "expected ", name, " to have contiguous rows as far apart as those ",
                    "beside it, got strides ", x.strides(), " beside ", like.strides());
}

// Weights of `count` chunks at least, (T, B, h, 2e, d), the last two contiguous, for tokens `like`.
void check_rows(const Tensor& x, const char* name, int64_t count, const Tensor& like) {
  check_type(x, name, like.scalar_type());
  TORCH_CHECK_VALUE(x.dim() == 5 && x.size(0) >= count && x.size(1) == like.size(0) && x.size(2) == like.size(1) &&
                        x.size(3) == R && x.size(4) == D,
                    "expected ", name, " of sizes (", count, " or more, ", like.size(0), ", ", like.size(1), ", ", R,
                    ", ", D, "), got ", x.sizes());
  TORCH_CHECK_VALUE(x.stride(4) == 1 && x.stride(3) == D, "expected the last two dimensions of ", name,
                    " to be contiguous, got strides ", x.strides());
}

// How many chunks the tokens make.
int64_t count_chunks(const Tensor& tokens, const Options& options) {
  const int64_t length = tokens.size(3), chunk_size = options.chunk_size;
  return length / chunk_size + (length % chunk_size != 0);  // a sum before the division could overflow
}

// Runs body(t, n) for the chunks from `first` to `last` of `count` heads.
template <typename Body>
void for_chunks(int64_t first, int64_t last, int64_t count, const Body& body) {
  at::parallel_for(0, (last - first) * count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) body(first + i % (last - first), i / (last - first));
  });
}

// Step, momentum or decay of n = image and head: (B, 3·Cm).
template <typename T>
T* coefficient(T* coefficients, int64_t which, int64_t n, int64_t heads) {
  return coefficients + ((n / heads * 3 + which) * heads + n % heads) * D;
}

int64_t length_of(int64_t t, int64_t chunk_size, int64_t num_tokens) {
  return std::min(chunk_size, num_tokens - t * chunk_size);
}

// Step, momentum and decay (n, 3·Cm) from errors (n, Cm), and the hidden units before their GELU (n, 4·Cm).
template <typename T>
void generate(const Tensor& errors, const Tensor& in_weight, const Tensor& in_bias, const Tensor& out_weight,
              const Tensor& out_bias, Tensor pre_hidden, Tensor coefficients) {
  at::addmm_out(pre_hidden, in_bias, errors, in_weight.t());
  Tensor active = at::empty_like(pre_hidden);
  kernels<T>().activate(pre_hidden.data_ptr<T>(), pre_hidden.numel(), active.data_ptr<T>());
  at::addmm_out(coefficients, out_bias, active, out_weight.t());
  coefficients.sigmoid_();
}

// What comes back to the hidden units before their GELU, and to the errors, from `grad_out` before the sigmoid.
template <typename T>
void generate_backward(const Tensor& grad_out, const Tensor& in_weight, const Tensor& out_weight,
                       const Tensor& pre_hidden, Tensor grad_pre_hidden, Tensor grad_errors) {
  at::mm_out(grad_pre_hidden, grad_out, out_weight);
  kernels<T>().activate_backward(pre_hidden.data_ptr<T>(), pre_hidden.numel(), grad_pre_hidden.data_ptr<T>());
  at::mm_out(grad_errors, grad_pre_hidden, in_weight);
}

// States, surprises, hidden units and coefficients of Eqs. 3 and 4.
std::vector<Tensor> write_all(const Tensor& k, const Tensor& v, const Tensor& initial, const Tensor& in_weight,
                              const Tensor& in_bias, const Tensor& out_weight, const Tensor& out_bias,
                              const Tensor& rows, const Tensor& momentum, const Options& options) {
  check_tokens(k, "k");
  check_tokens(v, "v", k);
  const int64_t batch = k.size(0), heads = k.size(1), channels = heads * D, count = batch * heads;
  const int64_t chunks = count_chunks(k, options), num_tokens = k.size(3), chunk_size = options.chunk_size;
  const bool sequential = options.sequential;
  check_contiguous(initial, "initial", {heads, R, D}, k);
  check_sizes(in_weight, "in_weight", {4 * channels, channels}, k);
  check_sizes(in_bias, "in_bias", {4 * channels}, k);
  check_sizes(out_weight, "out_weight", {3 * channels, 4 * channels}, k);
  check_sizes(out_bias, "out_bias", {3 * channels}, k);
  check_sizes(rows, "rows", {batch, heads, R, D}, k);
  check_sizes(momentum, "momentum", {batch, heads, R, D}, k);
  Tensor states = at::empty({chunks + 1, 3, batch, heads, R, D}, k.options());
  states.select(0, 0).select(0, 1).copy_(momentum);
  states.select(0, 0).select(0, 2).copy_(rows);
  states.select(0, chunks).select(0, 0).zero_();
  Tensor surprises = at::empty({chunks, batch, channels}, k.options());
  Tensor pre_hidden = at::empty({chunks, batch, 4 * channels}, k.options());
  Tensor coefficients = at::empty({chunks, batch, 3 * channels}, k.options());
  // The weights that gradients are taken at.
  const Tensor points = sequential ? states.select(1, 2) : initial.expand({chunks, batch, heads, R, D});
  AT_DISPATCH_FLOATING_TYPES(k.scalar_type(), "memory_write_all", [&] {
    const Tokens<scalar_t> keys(k), values(v);
    const Rows<scalar_t> weights(points), gradients(states.select(1, 0)), momenta(states.select(1, 1)),
        memories(states.select(1, 2));
    const auto& call = kernels<scalar_t>();
    scalar_t *errors = surprises.data_ptr<scalar_t>(), *generated = coefficients.data_ptr<scalar_t>();
    const auto surprise = [&](int64_t t, int64_t n) {
      call.surprise(keys(n, t * chunk_size), keys.stride, values(n, t * chunk_size), values.stride,
                    length_of(t, chunk_size, num_tokens), weights(t, n), gradients(t, n), errors + (t * count + n) * D);
    };
    if (!sequential) {
      for_chunks(0, chunks, count, surprise);
      generate<scalar_t>(surprises.flatten(0, 1), in_weight, in_bias, out_weight, out_bias, pre_hidden.flatten(0, 1),
                         coefficients.flatten(0, 1));
    }
    for (int64_t t = 0; t < chunks; t++) {
      if (sequential) {
        for_chunks(t, t + 1, count, surprise);
        generate<scalar_t>(surprises[t], in_weight, in_bias, out_weight, out_bias, pre_hidden[t], coefficients[t]);
      }
      scalar_t* chunk = generated + t * 3 * count * D;
      at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; n++)
          call.write(gradients(t, n), momenta(t, n), memories(t, n), coefficient(chunk, 0, n, heads),
                     coefficient(chunk, 1, n, heads), coefficient(chunk, 2, n, heads), options,
                     momenta(t + 1, n), memories(t + 1, n));
      });
    }
  });
  return {states, surprises, pre_hidden, coefficients};
}

// Fills `grad_k` and `grad_v`; returns the gradients of M_0 (parallel rule only), coefficients before the sigmoid, hidden
// units, memory and momentum.
std::vector<Tensor> write_all_backward(const Tensor& k, const Tensor& v, const Tensor& initial,
                                       const Tensor& in_weight, const Tensor& out_weight, const Tensor& states,
                                       const Tensor& pre_hidden, const Tensor& coefficients,
                                       const Tensor& grad_memories, const std::optional<Tensor>& grad_momentum,
                                       const Tensor& grad_k, const Tensor& grad_v, const Options& options) {
  check_tokens(k, "k");
  check_tokens(v, "v", k);
  check_tokens(grad_k, "grad_k", k);
  check_rows_as_far(grad_v, "grad_v", grad_k);
  const int64_t batch = k.size(0), heads = k.size(1), channels = heads * D, count = batch * heads;
  const int64_t chunks = count_chunks(k, options), num_tokens = k.size(3), chunk_size = options.chunk_size;
  const bool sequential = options.sequential;
  check_contiguous(initial, "initial", {heads, R, D}, k);
  check_sizes(in_weight, "in_weight", {4 * channels, channels}, k);
  check_sizes(out_weight, "out_weight", {3 * channels, 4 * channels}, k);
  check_contiguous(states, "states", {chunks + 1, 3, batch, heads, R, D}, k);
  check_contiguous(pre_hidden, "pre_hidden", {chunks, batch, 4 * channels}, k);
  check_contiguous(coefficients, "coefficients", {chunks, batch, 3 * channels}, k);
  check_rows(grad_memories, "grad_memories", chunks + 1, k);
  if (grad_momentum) check_sizes(*grad_momentum, "grad_momentum", {batch, heads, R, D}, k);
  Tensor grad_m = grad_memories[chunks].clone(at::MemoryFormat::Contiguous);
  Tensor grad_p = grad_momentum ? grad_momentum->clone(at::MemoryFormat::Contiguous) : at::zeros_like(grad_m);
  Tensor grad_gradients = at::empty({sequential ? 1 : chunks, batch, heads, R, D}, k.options());
  Tensor grad_out = at::empty_like(coefficients), grad_pre_hidden = at::empty_like(pre_hidden);
  Tensor grad_errors = at::empty({sequential ? 1 : chunks, batch, heads * D}, k.options());
  const Tensor points = sequential ? states.select(1, 2) : initial.expand({chunks, batch, heads, R, D});
  // What comes back to the weights that gradients are taken at.
  const Tensor grad_points = sequential ? grad_m.unsqueeze(0) : at::zeros({chunks, batch, heads, R, D}, k.options());

  AT_DISPATCH_FLOATING_TYPES(k.scalar_type(), "memory_write_all_backward", [&] {
    const Tokens<scalar_t> keys(k), values(v), grad_keys(grad_k), grad_values(grad_v);
    const Rows<scalar_t> weights(points), gradients(states.select(1, 0)), momenta(states.select(1, 1)),
        memories(states.select(1, 2)), grad_reads(grad_memories), grads(grad_gradients), grad_weights(grad_points);
    const auto& call = kernels<scalar_t>();
    scalar_t *generated = coefficients.data_ptr<scalar_t>(), *grad_generated = grad_out.data_ptr<scalar_t>();
    scalar_t *errors = grad_errors.data_ptr<scalar_t>(), *p = grad_p.data_ptr<scalar_t>(),
             *m = grad_m.data_ptr<scalar_t>();
    // Under the sequential rule, what comes back to a chunk's gradients and errors is overwritten by the next.
    const auto surprise_backward = [&](int64_t t, int64_t n) {
      const int64_t slot = sequential ? 0 : t;
      call.surprise_backward(keys(n, t * chunk_size), keys.stride, values(n, t * chunk_size), values.stride,
                             length_of(t, chunk_size, num_tokens), weights(t, n), grads(slot, n),
                             errors + (slot * count + n) * D, grad_keys(n, t * chunk_size),
                             grad_values(n, t * chunk_size), grad_keys.stride, grad_weights(slot, n));
    };
    for (int64_t t = chunks - 1; t >= 0; t--) {
      scalar_t *chunk = generated + t * 3 * count * D, *grad_chunk = grad_generated + t * 3 * count * D;
      at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; n++)
          call.write_backward(gradients(t, n), momenta(t, n), memories(t, n), coefficient(chunk, 0, n, heads),
                              coefficient(chunk, 1, n, heads), coefficient(chunk, 2, n, heads), options,
                              grad_reads(t, n), p + n * R * D, m + n * R * D, grads(sequential ? 0 : t, n),
                              coefficient(grad_chunk, 0, n, heads), coefficient(grad_chunk, 1, n, heads),
                              coefficient(grad_chunk, 2, n, heads));
      });
      if (sequential) {
        generate_backward<scalar_t>(grad_out[t], in_weight, out_weight, pre_hidden[t], grad_pre_hidden[t],
                                    grad_errors[0]);
        for_chunks(t, t + 1, count, surprise_backward);
      }
    }
    if (!sequential) {
      generate_backward<scalar_t>(grad_out.flatten(0, 1), in_weight, out_weight, pre_hidden.flatten(0, 1),
                                  grad_pre_hidden.flatten(0, 1), grad_errors.flatten(0, 1));
      for_chunks(0, chunks, count, surprise_backward);
    }
  });
  const Tensor grad_initial = sequential ? Tensor() : grad_points.sum(at::IntArrayRef({0, 1}));
  return {grad_initial, grad_out, grad_pre_hidden, grad_m, grad_p};
}

// The memory that each of `chunks` reads: with retrieve='final' all of them the last one.
Tensor readable(const Tensor& memories, int64_t chunks, const Options& options) {
  if (!options.final) return memories;
  return memories.narrow(0, memories.size(0) - 1, 1).expand({chunks, -1, -1, -1, -1});
}

// Eq. 2 for all tokens; `y` may be `q`.
void read_all(const Tensor& q, const Tensor& memories, const Tensor& y, const Options& options) {
  check_tokens(q, "q");
  check_tokens(y, "y", q);
  const int64_t num_tokens = q.size(3), chunks = count_chunks(q, options), chunk_size = options.chunk_size;
  check_rows(memories, "memories", options.final ? 1 : chunks, q);
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "memory_read_all", [&] {
    const Tokens<scalar_t> queries(q), reads(y);
    const Rows<scalar_t> weights(readable(memories, chunks, options));
    const auto& call = kernels<scalar_t>();
    for_chunks(0, chunks, q.size(0) * q.size(1), [&](int64_t t, int64_t n) {
      call.read(queries(n, t * chunk_size), queries.stride, length_of(t, chunk_size, num_tokens), weights(t, n),
                reads(n, t * chunk_size), reads.stride);
    });
  });
}

// Fills `grad_q`, adds to `grad_memories` and fills `y` with what read_all does, if there is one.
void read_all_backward(const Tensor& q, const Tensor& memories, const Tensor& grad_y, const Tensor& grad_memories,
                       const Tensor& grad_q, const std::optional<Tensor>& y, const Options& options) {
  check_tokens(q, "q");
  check_tokens(grad_y, "grad_y", q);
  check_tokens(grad_q, "grad_q", q);
  if (y) check_rows_as_far(*y, "y", grad_q);
  const int64_t num_tokens = q.size(3), chunks = count_chunks(q, options), chunk_size = options.chunk_size;
  const int64_t count = q.size(0) * q.size(1);
  check_rows(memories, "memories", options.final ? 1 : chunks, q);
  check_rows(grad_memories, "grad_memories", options.final ? 1 : chunks, q);
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "memory_read_all_backward", [&] {
    const Tokens<scalar_t> queries(q), grad_reads(grad_y), grad_queries(grad_q), reads(y ? *y : grad_q);
    const Rows<scalar_t> weights(readable(memories, chunks, options)),
        grad_weights(readable(grad_memories, chunks, options));
    const auto& call = kernels<scalar_t>();
    const auto body = [&](int64_t t, int64_t n) {
      call.read_backward(queries(n, t * chunk_size), queries.stride, grad_reads(n, t * chunk_size), grad_reads.stride,
                         length_of(t, chunk_size, num_tokens), weights(t, n), grad_queries(n, t * chunk_size),
                         y ? reads(n, t * chunk_size) : nullptr, grad_queries.stride, grad_weights(t, n));
    };
    if (!options.final) {
      for_chunks(0, chunks, count, body);
    } else {  // all chunks read, and add to, the same memory
      at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; n++)
          for (int64_t t = 0; t < chunks; t++) body(t, n);
      });
    }
  });
}

// Pieces of tokens that one thread works on, long enough for its start to cost nothing.
constexpr int64_t PIECE = 1024;

Tensor normalize_(const Tensor& z, double eps) {
  check_tokens(z, "z");
  TORCH_CHECK_VALUE(eps > 0, "expected an eps above 0, got ", eps);
  Tensor scale = at::empty({z.size(0), z.size(1), 1, z.size(3)}, z.options());
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "memory_normalize", [&] {
    const Tokens<scalar_t> tokens(z), scales(scale);
    for_chunks(0, (z.size(3) + PIECE - 1) / PIECE, z.size(0) * z.size(1), [&](int64_t t, int64_t n) {
      kernels<scalar_t>().normalize(tokens(n, t * PIECE), tokens.stride, length_of(t, PIECE, z.size(3)), eps,
                                    scales(n, t * PIECE));
    });
  });
  return scale;
}

void normalize_backward_(const Tensor& unit, const Tensor& scale, const Tensor& grad) {
  check_tokens(unit, "unit");
  check_contiguous(scale, "scale", {unit.size(0), unit.size(1), 1, unit.size(3)}, unit);
  check_rows_as_far(grad, "grad", unit);
  AT_DISPATCH_FLOATING_TYPES(unit.scalar_type(), "memory_normalize_backward", [&] {
    const Tokens<scalar_t> tokens(unit), scales(scale), grads(grad);
    for_chunks(0, (unit.size(3) + PIECE - 1) / PIECE, unit.size(0) * unit.size(1), [&](int64_t t, int64_t n) {
      kernels<scalar_t>().normalize_backward(tokens(n, t * PIECE), scales(n, t * PIECE), grads(n, t * PIECE),
                                             tokens.stride, length_of(t, PIECE, unit.size(3)));
    });
  });
}

}  // namespace

namespace pybind11::detail {
template <>
struct type_caster<Options> {
  PYBIND11_TYPE_CASTER(Options, const_name("MemoryOptions"));
  bool load(handle source, bool) {
    value = Options(source);
    return true;
  }
};
}  // namespace pybind11::detail

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("SOURCE") = SOURCE;
  m.attr("HEAD_DIM") = D;
  m.attr("HIDDEN_DIM") = E;
#ifdef HAS_X86
  m.attr("INSTRUCTION_SETS") = std::vector<std::string>{"baseline", "avx2", "avx512"};
#else
  m.attr("INSTRUCTION_SETS") = std::vector<std::string>{"baseline"};
#endif
  m.def("instruction_set", &instruction_set);
  m.def("write_all", &write_all, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("write_all_backward", &write_all_backward, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("read_all", &read_all, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("read_all_backward", &read_all_backward, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("normalize_", &normalize_, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("normalize_backward_", &normalize_backward_, pybind11::call_guard<pybind11::gil_scoped_release>());
}
