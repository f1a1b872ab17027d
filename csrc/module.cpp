// The Python module sparsenlp._C: which instruction sets run, and the machine's limits. The ops register
// themselves (register.cpp).
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <cstring>
#include <string>

#include "cpu/isa.h"
#include "cpu/limits/limits.h"

#define KERNEL(isa, suffix) FmaPeakKernel fma_peak_##suffix;
#include "cpu/limits/limits.inc"
#undef KERNEL

static PyObject* isas(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  for (int isa = kIsaCount - 1; list && isa >= 0; isa--) {
    if (!isa_supported(isa)) continue;
    PyObject* name = PyUnicode_FromString(isa_name(isa));
    if (!name || PyList_Append(list, name) < 0) Py_CLEAR(list);
    Py_XDECREF(name);
  }
  return list;
}

// {"op.dtype": [instruction sets with a kernel of its own that this machine runs, best first]}
static PyObject* kernels(PyObject*, PyObject*) {
  static const struct {
    int isa;
    const char* name;
  } list[] = {
#define FORWARD(isa, dtype, suffix) {isa, "bsr_linear." #dtype},
#include "cpu/bsr_linear/bsr_linear.inc"
#define FORWARD(isa, dtype, suffix) {isa, "nm_linear." #dtype},
#include "cpu/nm_linear/nm_linear.inc"
#define FORWARD(isa, dtype, suffix) {isa, "encoder_layer." #dtype},
#include "cpu/encoder_layer/encoder_layer.inc"
#define FORWARD(isa, dtype, suffix) {isa, "sparse_ffn." #dtype},
#include "cpu/sparse_ffn/sparse_ffn.inc"
#define FORWARD(isa, dtype, suffix) {isa, "dense_attention." #dtype},
#include "cpu/dense_attention/dense_attention.inc"
#define FORWARD(isa, dtype, suffix) {isa, "block_sparse_attention." #dtype},
#include "cpu/block_sparse_attention/block_sparse_attention.inc"
#define FORWARD(isa, dtype, suffix) {isa, "add_layer_norm." #dtype},
#include "cpu/add_layer_norm/add_layer_norm.inc"
#define FORWARD(isa, dtype, suffix) {isa, "embed_layer_norm." #dtype},
#include "cpu/embed_layer_norm/embed_layer_norm.inc"
#define FORWARD(isa, dtype, suffix) {isa, "decoder_layers." #dtype},
#include "cpu/decoder_layers/decoder_layers.inc"
#define FORWARD(isa, dtype, suffix) {isa, "sparse_lstm." #dtype},
#include "cpu/sparse_lstm/sparse_lstm.inc"
#define FORWARD(isa, dtype, suffix) {isa, "sparse_conv1d." #dtype},
#include "cpu/sparse_conv1d/sparse_conv1d.inc"
#define FORWARD(isa, dtype, suffix) {isa, "sparse_gru." #dtype},
#include "cpu/sparse_gru/sparse_gru.inc"
  };
  PyObject* all = PyDict_New();
  for (auto& kernel : list) {
    if (!all || !isa_supported(kernel.isa)) continue;
    PyObject* found = PyDict_GetItemString(all, kernel.name);
    PyObject* isas = found ? Py_NewRef(found) : PyList_New(0);
    PyObject* isa = PyUnicode_FromString(isa_name(kernel.isa));
    if (!isas || !isa || PyList_Append(isas, isa) < 0 || PyDict_SetItemString(all, kernel.name, isas) < 0)
      Py_CLEAR(all);
    Py_XDECREF(isa);
    Py_XDECREF(isas);
  }
  return all;
}

static PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(isa_name(isa_in_use())); }

static PyObject* set_cap(PyObject*, PyObject* arg) {
  if (arg == Py_None) {
    set_isa_cap(kIsaCount - 1);
    Py_RETURN_NONE;
  }
  PyObject* bytes = PyUnicode_AsUTF8String(arg);
  if (!bytes) return nullptr;
  int found = -1;
  for (int isa = 0; isa < kIsaCount; isa++)
    if (!std::strcmp(PyBytes_AsString(bytes), isa_name(isa))) found = isa;
  Py_DECREF(bytes);
  if (found < 0) {
    std::string names;
    for (int isa = 0; isa < kIsaCount; isa++) names += (isa ? ", " : "") + std::string(isa_name(isa));
    return PyErr_Format(
        PyExc_ValueError, "SPARSENLP_CPU_ISA: expected one of %s, got '%U'", names.c_str(), arg);
  }
  set_isa_cap(found);
  Py_RETURN_NONE;
}

static PyObject* fma_peak(PyObject*, PyObject* arg) {
  static const struct {
    int isa;
    FmaPeakKernel* kernel;
  } list[] = {
#define KERNEL(isa, suffix) {isa, fma_peak_##suffix},
#include "cpu/limits/limits.inc"
#undef KERNEL
  };
  const long long rounds = PyLong_AsLongLong(arg);
  if (rounds == -1 && PyErr_Occurred()) return nullptr;
  auto* best = list;
  while (best->isa > isa_in_use()) best++;
  int64_t operations = 0;
  Py_BEGIN_ALLOW_THREADS;
  operations = best->kernel(rounds);
  Py_END_ALLOW_THREADS;
  return PyLong_FromLongLong(operations);
}

static PyMethodDef methods[] = {
    {"isas", isas, METH_NOARGS, "Instruction sets this machine runs, best first."},
    {"kernels", kernels, METH_NOARGS, "Instruction sets that have a kernel of their own, by op and dtype."},
    {"isa", isa, METH_NOARGS, "The instruction set in use."},
    {"set_isa_cap", set_cap, METH_O, "Use none better than this one; None lifts the cap."},
    {"fma_peak", fma_peak, METH_O, "Run this many rounds of independent float32 FMAs; returns the operations done."},
    {nullptr, nullptr, 0, nullptr}};

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
