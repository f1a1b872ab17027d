// sparse_gru and its backward pass: checks, allocation, and the cells of each step.
#include "../cpu/sparse_gru/sparse_gru.h"

#include <tuple>

#include "recurrent_backward.h"

#define FORWARD(isa, dtype, suffix) SparseGruKernel sparse_gru_##dtype##_##suffix;
#define GRAD(isa, dtype, suffix) SparseGruGradKernel sparse_gru_grad_##dtype##_##suffix;
#include "../cpu/sparse_gru/sparse_gru.inc"

namespace {

using namespace recurrent;

SparseGruKernel* cell_kernel(Dtype dtype) {
#define FORWARD(isa, type, suffix) {type == dtype ? isa : kIsaCount, sparse_gru_##type##_##suffix},
  const Listed<SparseGruKernel> list[] = {
#include "../cpu/sparse_gru/sparse_gru.inc"
  };
  return best_kernel(list);
}

SparseGruGradKernel* grad_kernel(Dtype dtype) {
#define GRAD(isa, type, suffix) {type == dtype ? isa : kIsaCount, sparse_gru_grad_##type##_##suffix},
  const Listed<SparseGruGradKernel> list[] = {
#include "../cpu/sparse_gru/sparse_gru.inc"
  };
  return best_kernel(list);
}

std::tuple<Tensor, Tensor, Tensor> sparse_gru(
    const Tensor& x_any, const std::optional<Tensor>& batch_sizes, const Tensors& crow, const Tensors& col,
    const Tensors& values, const Tensors& scales, const Tensors& biases_any, const Tensor& h0, bool reverse,
    bool save) {
  const char* op = "sparse_gru";
  const Dtype dtype = dtype_of(op, x_any);
  const Steps steps(op, x_any, batch_sizes);
  const Tensor x = as_contiguous(x_any);
  STD_TORCH_CHECK(h0.dim() == 3, op, ": expected h0 (D, B, H)");
  const int64_t D = h0.size(0), H = units_of(op, h0), B = steps.batch, G = SparseGru::kGates;
  const Matrices matrices(op, crow, col, values, scales, dtype, D, 2, 2);
  const Tensors biases = checked_biases(op, biases_any, dtype, D, G * H);
  Tensor h_n = copy_of(checked(op, h0, dtype, {D, B, H}, "h0"));

  std::vector<int64_t> sizes = sizes_of(x);
  const int64_t K = sizes.back(), item = bytes_of(dtype);
  sizes.back() = D * H;
  Tensor y = empty(sizes, x.scalar_type());
  Tensor gates = saved_tensor(save, {D, steps.tokens, 4 * H});
  if (steps.tokens == 0) return {y, h_n, gates};

  SparseGruKernel* kernel = cell_kernel(dtype);
  std::vector<Direction> directions(D);
  const auto cell = [&](const CellStep& at) {
    const int64_t d = at.direction - directions.data();
    SparseGru a{};
    for (int gate = 0; gate < G; gate++) {
      a.inputs[gate] = at.inputs.data + gate * at.inputs.gate;
      a.states[gate] = at.states.data + gate * at.states.gate;
    }
    a.bias = biases.empty() ? nullptr : biases[2 * d + 1].data_ptr();
    a.h = at.h;
    a.y = at.y;
    a.h_n = at.h_n;
    a.gates = save ? floats(gates) + (d * steps.tokens + at.token) * 4 * H : nullptr;
    a.M = at.M;
    a.H = H;
    a.inputs_stride = at.inputs.stride;
    a.states_stride = at.states.stride;
    a.y_stride = D * H;
    a.ended = at.ended;
    a.begin = at.begin;
    a.end = at.end;
    kernel(a);
  };
  for (int64_t d = 0; d < D; d++) {
    Direction& own = directions[d];
    own.input = matrices.linear(2 * d, G * H, K);
    own.input.bias = biases.empty() ? nullptr : biases[2 * d].data_ptr();
    own.recurrent = matrices.linear(2 * d + 1, G * H, H);
    own.reverse = reverse != (d == 1);
    own.y = bytes(y) + d * H * item;
    own.h_n = bytes(h_n) + d * B * H * item;
  }
  Forward<decltype(cell)>{steps, directions, x.data_ptr(), dtype, matrices.weights(), G, H, H, cell}.run();
  return {y, h_n, gates};
}

std::tuple<Tensor, Tensor, Tensor> sparse_gru_backward(
    const Tensor& grad_y_any, const Tensor& grad_h, const std::optional<Tensor>& batch_sizes, const Tensors& crow,
    const Tensors& col, const Tensors& values, const Tensor& gates, const Tensor& y_any, const Tensor& h0_any,
    bool reverse) {
  const char* op = "sparse_gru_backward";
  const Dtype dtype = dtype_of(op, grad_y_any);
  const Steps steps(op, grad_y_any, batch_sizes);
  STD_TORCH_CHECK(grad_h.dim() == 3, op, ": expected grad_h (D, B, H)");
  const int64_t D = grad_h.size(0), H = units_of(op, grad_h), B = steps.batch, G = SparseGru::kGates;
  std::vector<int64_t> sizes = sizes_of(grad_y_any);
  sizes.back() = D * H;
  const Tensor grad_y = checked(op, grad_y_any, dtype, sizes, "grad_y"), y = checked(op, y_any, dtype, sizes, "y");
  const Tensor h0 = checked(op, h0_any, dtype, {D, B, H}, "h0");
  check_saved(op, gates, {D, steps.tokens, 4 * H});
  const Matrices matrices(op, crow, col, values, {}, dtype, D, 2, 2);

  Tensor inputs = empty({D, steps.tokens, G * H}, grad_y.scalar_type());
  Tensor states = empty({D, steps.tokens, G * H}, grad_y.scalar_type());
  Tensor dh = copy_of(checked(op, grad_h, dtype, {D, B, H}, "grad_h"));
  if (steps.tokens == 0) return {inputs, states, dh};
  std::vector<BsrLinearGrad> recurrent;
  for (int64_t d = 0; d < D; d++) recurrent.push_back(matrices.gradient(2 * d + 1, G * H, H));
  std::vector<float> past(D * B * H);  // of h before a step, what did not go through the weights
  SparseGruGradKernel* kernel = grad_kernel(dtype);
  const int64_t item = bytes_of(dtype);
  const auto step = [&](const BackwardStep& at, char* outputs, const auto& dgrad) {
    const int64_t first = at.d * steps.tokens + at.token, row = at.d * B + at.sequence;
    char* grad_state = bytes(dh) + row * H * item;
    float* own = past.data() + row * H;
    add_rows(dtype, bytes(grad_y) + (at.token * D + at.d) * H * item, D * H, grad_state, own, at.M, H, outputs);
    SparseGruGrad a{};
    a.grad_outputs = outputs;
    a.gates = floats(gates) + first * 4 * H;
    a.h_before = bytes(y) + (at.token_before * D + at.d) * H * item;
    a.h0 = bytes(h0) + row * H * item;
    a.grad_inputs = bytes(inputs) + first * G * H * item;
    a.grad_states = bytes(states) + first * G * H * item;
    a.grad_h = own;
    a.M = at.M;
    a.H = H;
    a.known = at.known;
    a.before_stride = D * H;
    a.end = H;
    kernel(a);
    dgrad(recurrent[at.d], at.M, a.grad_states, grad_state);
  };
  Backward{steps, recurrent, {}, dtype, D, reverse}.run(H, step);
  add_rows(dtype, dh.data_ptr(), H, nullptr, past.data(), D * B, H, dh.data_ptr());
  return {inputs, states, dh};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsenlp, CPU, m) {
  m.impl("sparse_gru", TORCH_BOX(&sparse_gru));
  m.impl("sparse_gru_backward", TORCH_BOX(&sparse_gru_backward));
}
