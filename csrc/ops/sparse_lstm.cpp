// sparse_lstm and its backward pass: checks, allocation, and the cells of each step.
#include "../cpu/sparse_lstm/sparse_lstm.h"

#include <tuple>

#include "recurrent_backward.h"

#define FORWARD(isa, dtype, suffix) SparseLstmKernel sparse_lstm_##dtype##_##suffix;
#define GRAD(isa, dtype, suffix) SparseLstmGradKernel sparse_lstm_grad_##dtype##_##suffix;
#include "../cpu/sparse_lstm/sparse_lstm.inc"

namespace {

using namespace recurrent;

SparseLstmKernel* cell_kernel(Dtype dtype) {
#define FORWARD(isa, type, suffix) {type == dtype ? isa : kIsaCount, sparse_lstm_##type##_##suffix},
  const Listed<SparseLstmKernel> list[] = {
#include "../cpu/sparse_lstm/sparse_lstm.inc"
  };
  return best_kernel(list);
}

SparseLstmGradKernel* grad_kernel(Dtype dtype) {
#define GRAD(isa, type, suffix) {type == dtype ? isa : kIsaCount, sparse_lstm_grad_##type##_##suffix},
  const Listed<SparseLstmGradKernel> list[] = {
#include "../cpu/sparse_lstm/sparse_lstm.inc"
  };
  return best_kernel(list);
}

// The units [begin, end) of B x H cells, as floats.
void load_cells(const void* c0, Dtype dtype, int64_t B, int64_t H, int64_t begin, int64_t end, float* cells) {
  for (int64_t m = 0; m < B; m++)
    for (int64_t unit = m * H + begin; unit < m * H + end; unit++)
      *cells++ = dtype == f32 ? read(static_cast<const float*>(c0)[unit]) : read(static_cast<const uint16_t*>(c0)[unit]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sparse_lstm(
    const Tensor& x_any, const std::optional<Tensor>& batch_sizes, const Tensors& crow, const Tensors& col,
    const Tensors& values, const Tensors& scales, const Tensors& biases_any, const Tensor& h0, const Tensor& c0,
    bool reverse, bool save) {
  const char* op = "sparse_lstm";
  const Dtype dtype = dtype_of(op, x_any);
  const Steps steps(op, x_any, batch_sizes);
  const Tensor x = as_contiguous(x_any);
  STD_TORCH_CHECK(h0.dim() == 3 && c0.dim() == 3, op, ": expected h0 (D, B, P) and c0 (D, B, H)");
  const int64_t D = h0.size(0), P = units_of(op, h0), H = units_of(op, c0), B = steps.batch, G = SparseLstm::kGates;
  const Matrices matrices(op, crow, col, values, scales, dtype, D, 2, 3);
  STD_TORCH_CHECK(matrices.each == 3 || P == H, op, ": expected h0 of the size of c0 without a projection");
  const Tensors biases = checked_biases(op, biases_any, dtype, D, G * H);
  Tensor h_n = copy_of(checked(op, h0, dtype, {D, B, P}, "h0")), c_n = copy_of(checked(op, c0, dtype, {D, B, H}, "c0"));

  std::vector<int64_t> sizes = sizes_of(x);
  const int64_t K = sizes.back(), item = bytes_of(dtype), saved = save ? steps.tokens : 0;
  sizes.back() = D * P;
  Tensor y = empty(sizes, x.scalar_type());
  Tensor gates = saved_tensor(save, {D, saved, G * H}), cells = saved_tensor(save, {D, saved, H});
  if (steps.tokens == 0) return {y, h_n, c_n, gates, cells};

  SparseLstmKernel* kernel = cell_kernel(dtype);
  std::vector<Direction> directions(D);
  const auto cell = [&](const CellStep& at) {
    const int64_t d = at.direction - directions.data(), first = d * steps.tokens + at.token;
    SparseLstm a{};
    for (int gate = 0; gate < G; gate++) {
      a.inputs[gate] = at.inputs.data + gate * at.inputs.gate;
      a.states[gate] = at.states.data + gate * at.states.gate;
    }
    a.bias = biases.empty() ? nullptr : biases[2 * d + 1].data_ptr();
    a.c = at.cells;
    a.c_n = bytes(c_n) + d * B * H * item;
    if (at.first) load_cells(a.c_n, dtype, B, H, at.begin, at.end, at.cells);
    a.h = at.h;
    a.y = at.y;
    a.h_n = at.h_n;
    a.gates = save ? floats(gates) + first * G * H : nullptr;
    a.cells = save ? floats(cells) + first * H : nullptr;
    a.M = at.M;
    a.H = H;
    a.inputs_stride = at.inputs.stride;
    a.states_stride = at.states.stride;
    a.y_stride = D * P;
    a.ended = at.ended;
    a.begin = at.begin;
    a.end = at.end;
    kernel(a);
  };
  for (int64_t d = 0; d < D; d++) {
    Direction& own = directions[d];
    const int64_t at = matrices.each * d;
    own.input = matrices.linear(at, G * H, K);
    own.input.bias = biases.empty() ? nullptr : biases[2 * d].data_ptr();
    own.recurrent = matrices.linear(at + 1, G * H, P);
    if (matrices.each == 3) own.projection = matrices.linear(at + 2, P, H);
    own.reverse = reverse != (d == 1);
    own.y = bytes(y) + d * P * item;
    own.h_n = bytes(h_n) + d * B * P * item;
  }
  Forward<decltype(cell)>{steps, directions, x.data_ptr(), dtype, matrices.weights(), G, H, P, cell}.run();
  return {y, h_n, c_n, gates, cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_lstm_backward(
    const Tensor& grad_y_any, const Tensor& grad_h, const Tensor& grad_c, const std::optional<Tensor>& batch_sizes,
    const Tensors& crow, const Tensors& col, const Tensors& values, const Tensor& gates, const Tensor& cells,
    const Tensor& c0_any, bool reverse) {
  const char* op = "sparse_lstm_backward";
  const Dtype dtype = dtype_of(op, grad_y_any);
  const Steps steps(op, grad_y_any, batch_sizes);
  STD_TORCH_CHECK(grad_h.dim() == 3 && grad_c.dim() == 3, op, ": expected grad_h (D, B, P) and grad_c (D, B, H)");
  const int64_t D = grad_h.size(0), P = units_of(op, grad_h), H = units_of(op, grad_c), B = steps.batch, G = SparseLstm::kGates;
  std::vector<int64_t> sizes = sizes_of(grad_y_any);
  sizes.back() = D * P;
  const Tensor grad_y = checked(op, grad_y_any, dtype, sizes, "grad_y");
  const Tensor c0 = checked(op, c0_any, dtype, {D, B, H}, "c0");
  check_saved(op, gates, {D, steps.tokens, G * H});
  check_saved(op, cells, {D, steps.tokens, H});
  const Matrices matrices(op, crow, col, values, {}, dtype, D, 2, 3);
  const bool projected = matrices.each == 3;
  STD_TORCH_CHECK(projected || P == H, op, ": expected grad_h of the size of grad_c without a projection");

  Tensor sums = empty({D, steps.tokens, G * H}, grad_y.scalar_type());
  Tensor outputs = empty({D, steps.tokens, P}, grad_y.scalar_type());
  Tensor dh = copy_of(checked(op, grad_h, dtype, {D, B, P}, "grad_h"));
  Tensor dc = copy_of(checked(op, grad_c, dtype, {D, B, H}, "grad_c"));
  if (steps.tokens == 0) return {sums, outputs, dh, dc};
  Tensor dc_wide = dtype == f32 ? dc : widened(dc);
  std::vector<BsrLinearGrad> recurrent, projection;
  for (int64_t d = 0; d < D; d++) {
    recurrent.push_back(matrices.gradient(matrices.each * d + 1, G * H, P));
    if (projected) projection.push_back(matrices.gradient(matrices.each * d + 2, P, H));
  }
  SparseLstmGradKernel* kernel = grad_kernel(dtype);
  const int64_t item = bytes_of(dtype);
  const auto step = [&](const BackwardStep& at, char* hidden, const auto& dgrad) {
    const int64_t first = at.d * steps.tokens + at.token, row = at.d * B + at.sequence;
    char* own = bytes(outputs) + first * P * item;
    char* grad_state = bytes(dh) + row * P * item;
    add_rows(dtype, bytes(grad_y) + (at.token * D + at.d) * P * item, D * P, grad_state, nullptr, at.M, P, own);
    if (projected) dgrad(projection[at.d], at.M, own, hidden);
    SparseLstmGrad a{};
    a.grad_outputs = projected ? hidden : own;
    a.gates = floats(gates) + first * G * H;
    a.cells = floats(cells) + first * H;
    a.cells_before = floats(cells) + (at.d * steps.tokens + at.token_before) * H;
    a.c0 = bytes(c0) + row * H * item;
    a.grad_c = floats(dc_wide) + row * H;
    a.grad_sums = bytes(sums) + first * G * H * item;
    a.M = at.M;
    a.H = H;
    a.known = at.known;
    a.end = H;
    kernel(a);
    dgrad(recurrent[at.d], at.M, a.grad_sums, grad_state);
  };
  Backward{steps, recurrent, projection, dtype, D, reverse}.run(projected ? H : 0, step);
  if (dtype == bf16) narrow(dc_wide, dc);
  return {sums, outputs, dh, dc};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsenlp, CPU, m) {
  m.impl("sparse_lstm", TORCH_BOX(&sparse_lstm));
  m.impl("sparse_lstm_backward", TORCH_BOX(&sparse_lstm_backward));
}
