// decoder_layers: checks, the working memory, and the phases.
#include "../cpu/decoder_layers/decoder_layers.h"

#include "common.h"

#include <sched.h>

#define FORWARD(isa, dtype, suffix) BsrLinearKernel bsr_linear_##dtype##_##suffix;
#include "../cpu/bsr_linear/bsr_linear.inc"
#define FORWARD(isa, dtype, suffix) DecoderLayersKernel decoder_layers_##dtype##_##suffix;
#include "../cpu/decoder_layers/decoder_layers.inc"

namespace {

enum Dtype { f32, bf16, i8 };

BsrLinearKernel* linear_kernel(Dtype dtype) {
#define FORWARD(isa, type, suffix) {type == dtype ? isa : kIsaCount, bsr_linear_##type##_##suffix},
  const Listed<BsrLinearKernel> list[] = {
#include "../cpu/bsr_linear/bsr_linear.inc"
  };
  return best_kernel(list);
}

DecoderLayersKernel* layers_kernel(Dtype dtype) {
#define FORWARD(isa, type, suffix) {type == dtype ? isa : kIsaCount, decoder_layers_##type##_##suffix},
  const Listed<DecoderLayersKernel> list[] = {
#include "../cpu/decoder_layers/decoder_layers.inc"
  };
  return best_kernel(list);
}

// All phases in one parallel region, which costs a tenth of entering one for each. Threads take the parts of a
// phase as they come, and one that waits for a phase to end holds none: where another process has its core, the
// rest go on without it. Any number of threads, one included, may do any number of parts.
template <class Kernel, class Args>
void run_phases(Kernel* kernel, const Args& args, int64_t phases, int64_t parts, float* scratch, size_t scratch_words) {
  constexpr int kSpins = 4000;
  std::atomic<int64_t> next{0}, finished{0};
  auto shares = [&](int64_t, int64_t) {
    int spins = 0;
    for (int64_t at = next.load(); at < phases * parts; at = next.load(std::memory_order_relaxed)) {
      const int64_t phase = at / parts, part = at % parts;
      if (finished.load(std::memory_order_acquire) < phase * parts) {
        if (++spins > kSpins) sched_yield();
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        continue;
      }
      if (!next.compare_exchange_weak(at, at + 1, std::memory_order_relaxed)) continue;
      kernel(args, static_cast<int>(phase), static_cast<int>(part), static_cast<int>(parts), scratch + part * scratch_words);
      finished.fetch_add(1, std::memory_order_release);
      spins = 0;
    }
  };
  if (parts == 1) return shares(0, 1);
  torch::stable::parallel_for(0, parts, 1, shares);
}

// The projections as their tensors: lists with one entry for each, in the order of the layers.
struct Projections {
  const std::vector<Tensor>&crow, &col, &values, &biases, &scales;
  ScalarType dtype;
  int64_t multiply_adds = 0;
  size_t scratch = 0;

  // Indices of a dense weight: one block as wide as the weight in each block row.
  std::vector<int32_t> dense_rows, dense_columns;

  void index_dense_weights() {
    int64_t rows = 0;
    for (const Tensor& weight : values)
      if (weight.dim() == 2 && weight.is_contiguous() && weight.size(1) > 0 && weight.size(0) > rows) rows = weight.size(0);
    checked_size("decoder_layers", "N", rows);
    dense_columns.resize(rows);
    for (int64_t row = 0; row <= rows; row++) dense_rows.push_back(static_cast<int32_t>(row));
  }

  // Projection `at`, from K to N features (any N if negative), M tokens.
  DecoderLinear linear(size_t at, int64_t M, int64_t N, int64_t K) {
    const Tensor& blocks = values[at];
    const bool quantized = blocks.scalar_type() == ScalarType::Char;
    STD_TORCH_CHECK(blocks.is_contiguous() && (quantized || blocks.scalar_type() == dtype),
                    "decoder_layers: expected contiguous values of the dtype of x, or int8");
    DecoderLinear result{};
    BsrLinear& a = result.args;
    a.M = M;
    a.K = K;
    if (blocks.dim() == 2 && !quantized) {
      STD_TORCH_CHECK(blocks.size(1) == K && K > 0, "decoder_layers: expected a dense weight with K = ", K, " columns");
      a.N = blocks.size(0);
      a.n = 1;
      a.k = checked_side("decoder_layers", K);
      a.crow = dense_rows.data();
      a.col = dense_columns.data();
    } else {
      index_sparse(a, crow[at], col[at], blocks);
    }
    STD_TORCH_CHECK(N < 0 || a.N == N, "decoder_layers: expected projection ", at, " to have N = ", N, " rows, got ", a.N);
    a.values = blocks.data_ptr();
    a.half = dtype == ScalarType::BFloat16;
    if (!biases.empty() && biases[at].size(0) > 0) {
      const Tensor& bias = biases[at];
      STD_TORCH_CHECK(bias.scalar_type() == dtype && bias.dim() == 1 && bias.size(0) == a.N && bias.is_contiguous(),
                      "decoder_layers: expected a contiguous bias of the dtype of x and shape (", a.N, ")");
      a.bias = bias.data_ptr();
    }
    if (quantized) {
      STD_TORCH_CHECK(a.k % 4 == 0, "decoder_layers: expected int8 blocks with k a multiple of 4, got ", a.k);
      STD_TORCH_CHECK(K <= kInt8Columns, "decoder_layers: expected at most ", kInt8Columns, " columns of int8, got ", K);
      STD_TORCH_CHECK(!scales.empty() && scales[at].scalar_type() == ScalarType::Float && scales[at].dim() == 1 &&
                          scales[at].size(0) == a.N && scales[at].is_contiguous(),
                      "decoder_layers: expected float32 scales of shape (", a.N, ") with int8 values");
      a.scales = static_cast<const float*>(scales[at].data_ptr());
    }
    result.run = linear_kernel(quantized ? i8 : a.half ? bf16 : f32);
    const int64_t work = work_of(M, static_cast<int64_t>(blocks.numel()) + a.N);
    multiply_adds += work < INT64_MAX - multiply_adds ? work : INT64_MAX - multiply_adds;
    scratch = a.scratch() > scratch ? a.scratch() : scratch;
    return result;
  }

  static void index_sparse(BsrLinear& a, const Tensor& rows, const Tensor& columns, const Tensor& blocks) {
    STD_TORCH_CHECK(blocks.dim() == 3, "decoder_layers: expected values (nnzb, n, k), or dense (N, K)");
    a.n = checked_side("decoder_layers", blocks.size(1));
    a.k = checked_side("decoder_layers", blocks.size(2));
    a.N = check_pattern("decoder_layers", rows, columns, blocks.size(0), a.n, a.k, a.K);
    a.crow = ints(rows);
    a.col = ints(columns);
  }
};

void connect(DecoderLinear& linear, const void* x, void* y) {
  linear.args.x = x;
  linear.args.y = y;
  if (linear.args.N == 0) linear.run = nullptr;
}

Tensor decoder_layers(
    const Tensor& x_any, const Tensor& cache, int64_t past, const std::vector<Tensor>& crow,
    const std::vector<Tensor>& col, const std::vector<Tensor>& values, const std::vector<Tensor>& biases,
    const std::vector<Tensor>& scales, const std::vector<Tensor>& norm_weights, const std::vector<Tensor>& norm_biases,
    int64_t heads, double scale, const std::string& activation, double eps, const std::optional<Tensor>& rope,
    const std::optional<Tensor>& positions, const std::optional<Tensor>& mask) {
  const ScalarType dtype = x_any.scalar_type();
  STD_TORCH_CHECK(x_any.dim() == 3 && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
                  "decoder_layers: expected x (B, T, H) of dtype float32 or bfloat16");
  STD_TORCH_CHECK(cache.dim() == 6 && cache.size(0) == 2 && cache.scalar_type() == dtype && cache.is_contiguous(),
                  "decoder_layers: expected a contiguous cache (2, layers, B, kv_heads, capacity, head_dim) of the dtype of x");
  const Tensor x = as_contiguous(x_any);
  DecoderLayers a{};
  const auto size = [](const char* name, int64_t value) {
    return static_cast<int>(checked_size("decoder_layers", name, value));
  };
  a.batch = size("sequences", x.size(0));
  a.length = size("tokens", x.size(1));
  a.H = size("H", x.size(2));
  a.past = size("past", past);
  a.layer_count = size("layers", cache.size(1));
  a.kv_heads = size("key heads", cache.size(3));
  a.capacity = size("a capacity", cache.size(4));
  a.head_dim = size("a head dimension", cache.size(5));
  a.heads = size("heads", heads);
  a.scale = static_cast<float>(scale);
  a.eps = static_cast<float>(eps);
  a.activation = activation == "silu" ? static_cast<int>(kSilu) : activation_of("decoder_layers", activation);
  const int64_t M = a.tokens(), D = a.head_dim;
  STD_TORCH_CHECK(cache.size(2) == a.batch && past + a.length <= a.capacity,
                  "decoder_layers: expected a cache for ", a.batch, " sequences of ", past + a.length, " tokens");
  STD_TORCH_CHECK(a.kv_heads > 0 && heads > 0 && heads % a.kv_heads == 0 && D > 0,
                  "decoder_layers: expected heads to be a multiple of the ", a.kv_heads, " heads of the cache, got ", heads);
  const size_t layers = a.layer_count, each = layers ? crow.size() / layers : 4;
  STD_TORCH_CHECK(crow.size() == each * layers && each >= 4 && each <= 7,
                  "decoder_layers: expected 4 to 7 projections for each layer, got ", crow.size(), " for ", layers, " layers");
  STD_TORCH_CHECK(col.size() == crow.size() && values.size() == crow.size() &&
                      (biases.empty() || biases.size() == crow.size()) && (scales.empty() || scales.size() == crow.size()),
                  "decoder_layers: expected as many col, values, biases and scales as crow");
  const size_t inputs = each >= 6 ? 3 : 1;
  const bool gated = each % 2 == 1;
  STD_TORCH_CHECK(norm_weights.size() == 2 * layers + 1 && (norm_biases.empty() || norm_biases.size() == norm_weights.size()),
                  "decoder_layers: expected two norms for each layer and a last one");
  const auto norm = [&](size_t at) {
    const auto vector = [&](const Tensor& t) -> const void* {
      STD_TORCH_CHECK(t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == a.H && t.is_contiguous(),
                      "decoder_layers: expected norms of the dtype of x and shape (", a.H, ")");
      return t.data_ptr();
    };
    return DecoderNorm{vector(norm_weights[at]), norm_biases.empty() ? nullptr : vector(norm_biases[at])};
  };
  if (rope) {
    STD_TORCH_CHECK(rope->scalar_type() == ScalarType::Float && rope->dim() == 2 && rope->size(1) == D && D % 2 == 0 &&
                        rope->is_contiguous(),
                    "decoder_layers: expected contiguous float32 rope (positions, head_dim), head_dim even");
    STD_TORCH_CHECK(positions && positions->scalar_type() == ScalarType::Long && positions->is_contiguous() &&
                        sizes_of(*positions) == std::vector<int64_t>({a.batch, a.length}),
                    "decoder_layers: expected contiguous int64 positions (B, T) with rope");
    a.rope = static_cast<const float*>(rope->data_ptr());
    a.positions = static_cast<const int64_t*>(positions->data_ptr());
    for (int64_t m = 0; m < M; m++)
      STD_TORCH_CHECK(a.positions[m] >= 0 && a.positions[m] < rope->size(0), "decoder_layers: expected positions in [0, ",
                      rope->size(0), "), got ", a.positions[m]);
  }
  std::vector<float> mask_values;
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() &&
                        sizes_of(*mask) == std::vector<int64_t>({a.batch, past + a.length}),
                    "decoder_layers: expected a contiguous bool mask (B, past + T)");
    const bool* seen = static_cast<const bool*>(mask->data_ptr());
    mask_values.resize(a.batch * (past + a.length));
    for (size_t i = 0; i < mask_values.size(); i++) mask_values[i] = seen[i] ? 0.0f : -__builtin_inff();
    a.mask = mask_values.data();
  }

  Projections projections{crow, col, values, biases, scales, dtype};
  projections.index_dense_weights();
  std::vector<DecoderLayer> list(layers);
  const int64_t query_rows = size("rows of queries", heads * D), kv_rows = a.kv_heads * D;
  int64_t most_inner = 0;
  for (size_t i = 0; i < layers; i++) {
    DecoderLayer& layer = list[i];
    size_t at = i * each;
    layer.norm1 = norm(2 * i);
    layer.norm2 = norm(2 * i + 1);
    if (inputs == 3) {
      layer.inputs[0] = projections.linear(at++, M, query_rows, a.H);
      layer.inputs[1] = projections.linear(at++, M, kv_rows, a.H);
      layer.inputs[2] = projections.linear(at++, M, kv_rows, a.H);
    } else {
      layer.inputs[0] = projections.linear(at++, M, query_rows + 2 * kv_rows, a.H);
    }
    layer.output = projections.linear(at++, M, a.H, query_rows);
    if (gated) layer.gate = projections.linear(at++, M, -1, a.H);
    layer.up = projections.linear(at++, M, gated ? layer.gate.args.N : -1, a.H);
    layer.inner = layer.up.args.N;
    layer.down = projections.linear(at++, M, a.H, layer.inner);
    most_inner = layer.inner > most_inner ? layer.inner : most_inner;
  }
  a.layers = list.data();
  a.norm = norm(2 * layers);
  Tensor y = empty({a.batch, a.length, a.H}, dtype);
  a.x = x.data_ptr();
  a.y = y.data_ptr();
  a.cache = cache.data_ptr();
  if (M == 0 || a.H == 0) return y;

  product("decoder_layers", {M, query_rows + 2 * kv_rows + a.H + most_inner});
  constexpr int64_t kWorkPerThread = 1 << 15;  // of a phase, below which a second thread costs more than it saves
  int64_t parts = torch::stable::get_num_threads();
  const int64_t work = layers ? projections.multiply_adds / static_cast<int64_t>(4 * layers) : 0;
  if (work / kWorkPerThread < parts) parts = work / kWorkPerThread;
  if (parts < 1 || was_forked()) parts = 1;
  const size_t scratch_words = ((a.scratch() > projections.scratch ? a.scratch() : projections.scratch) + 15) / 16 * 16;
  float* scratch = nullptr;
  const auto lay_out = [&](Layout memory) {
    a.stream = memory.take(M * a.H);
    a.normed = memory.take(M * a.H);
    a.attended = memory.take(M * query_rows);
    a.projected = memory.take(M * a.H);
    a.gate = gated ? memory.take(M * most_inner) : nullptr;
    a.up = memory.take(M * most_inner);
    char* q = reinterpret_cast<char*>(memory.take(M * (query_rows + 2 * kv_rows)));
    const int64_t starts[] = {0, query_rows, query_rows + kv_rows}, rows[] = {query_rows, kv_rows, kv_rows};
    const int64_t item = dtype == ScalarType::BFloat16 ? 2 : 4;
    for (int i = 0; i < 3; i++) {
      a.qkv[i] = q + starts[i] * item * (inputs == 3 ? M : 1);
      a.qkv_stride[i] = inputs == 3 ? rows[i] : query_rows + 2 * kv_rows;
    }
    scratch = memory.take(parts * scratch_words);
    return memory.used();
  };
  static thread_local Scratch memory;
  lay_out(Layout(memory.at_least(lay_out(Layout(nullptr)))));
  for (DecoderLayer& layer : list) {
    for (size_t i = 0; i < inputs; i++) connect(layer.inputs[i], a.normed, a.qkv[i]);
    connect(layer.output, a.attended, a.projected);
    connect(layer.gate, a.normed, a.gate);
    connect(layer.up, a.normed, a.up);
    connect(layer.down, a.up, a.projected);
  }
  run_phases(layers_kernel(dtype == ScalarType::BFloat16 ? bf16 : f32), a, decoder_phases(a), parts, scratch, scratch_words);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsenlp, CPU, m) { m.impl("decoder_layers", TORCH_BOX(&decoder_layers)); }
