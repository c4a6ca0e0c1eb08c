#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace fused_resnet {

// int64 [4] on the CPU: number of the instruction set, whether this processor has it, floats in its vectors, columns of
// its packed panels. isa: 0 baseline, 1 AVX2 with FMA, 2 AVX-512; -1 the best this processor has.
torch::stable::Tensor program_isa(int64_t isa);

// Runs the steps of a program (int64, on the CPU; fused_resnet/engine/cpu_program.py writes it) over float32 buffers.
// times: float64 [steps], gets the seconds each step took.
void run_program(const torch::stable::Tensor& program, const std::vector<torch::stable::Tensor>& buffers,
                 const std::optional<torch::stable::Tensor>& times);

}  // namespace fused_resnet
