// The driver as the rest of cuda/ calls it: the table of its functions, or an error that says why there is none, and
// the translation of its result codes into ng's errors.
#pragma once

#include "core/shim/cuda.hpp"
#include "narrowgauge/error.hpp"

namespace ng::cuda {

// The table. Throws CudaError with why_unavailable(), and in a child that was forked after CUDA had been started: the
// driver does not work there.
const Driver& require_driver();

// Throws unless `result` is success: OutOfMemory for that, else CudaError with `what`, the driver's name of the error
// and its description.
void check(Result result, const char* what);

}  // namespace ng::cuda

// Calls a function of the driver and checks its result: NG_CUDA(driver, cuStreamSynchronize(stream)).
#define NG_CUDA(driver, call) ::ng::cuda::check((driver).call, #call)
