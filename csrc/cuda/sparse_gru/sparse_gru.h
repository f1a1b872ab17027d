// The steps of one direction of sparse_gru: what Python calls through the C ABI.
#pragma once

#include "../recurrent.h"

// Launch `kernel` of RecurrentKernel on `stream` of the current device. Returns a code of cudaError_t, 0 for success:
// cudaErrorCooperativeLaunchTooLarge where not all blocks can run at once, cudaErrorInvalidConfiguration where no
// division of the units among blocks fits.
SPARSENLP_EXPORT int sparsenlp_sparse_gru(const RecurrentCuda* arguments, int kernel, void* stream);

// What that would launch where there are so many multiprocessors, and so many bytes of shared memory for a block; no
// blocks where it cannot. Needs no GPU. Returns 0 unless there is no such kernel.
SPARSENLP_EXPORT int sparsenlp_sparse_gru_plan(
    const RecurrentCuda* arguments, int kernel, int processors, int shared_bytes, RecurrentLaunch* launch);
