// Registration of the compiled ops. The schemas of the CUDA ops are there in every build, their kernels when nvcc was.

#include <torch/csrc/stable/library.h>

#include "bn_act.h"
#include "chain.h"
#include "conv_bn_act.h"
#include "cpu/bn_act.h"
#include "cpu/engine/program.h"
#include "cpu/fingerprint.h"
#include "pool.h"
#include "stem.h"

STABLE_TORCH_LIBRARY(fused_resnet_cpu, m) {
  m.def("fingerprint(Tensor[] tensors) -> Tensor");
  m.def("unchanged(Tensor[] tensors, Tensor proof) -> bool");
  m.def("program_isa(int isa) -> Tensor");
  m.def("run_program(Tensor program, Tensor(a!)[] buffers, Tensor(b!)? times) -> ()");
  m.def("bn_stats(Tensor x, int isa=-1) -> (Tensor, Tensor)");
  m.def(
      "bn_act(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, Tensor? residual, bool relu, "
      "int isa=-1) -> Tensor");
  m.def(
      "bn_act_out(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, Tensor? residual, "
      "bool relu, Tensor(a!) out, int isa=-1) -> ()");
  m.def(
      "bn_act_bwd(Tensor grad, Tensor? y, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
      "bool relu, bool batch_stats, bool need_x, bool need_sums, bool need_g, int isa=-1) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "bn_act_bwd_out(Tensor grad, Tensor? y, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
      "float eps, bool relu, bool batch_stats, bool need_sums, Tensor(a!)? dx, Tensor(b!)? g, int isa=-1) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpu, CPU, m) {
  m.impl("fingerprint", TORCH_BOX(&fused_resnet::fingerprint));
  m.impl("run_program", TORCH_BOX(&fused_resnet::run_program));
  m.impl("bn_stats", TORCH_BOX(&fused_resnet::cpu::bn_stats));
  m.impl("bn_act", TORCH_BOX(&fused_resnet::cpu::bn_act));
  m.impl("bn_act_out", TORCH_BOX(&fused_resnet::cpu::bn_act_out));
  m.impl("bn_act_bwd", TORCH_BOX(&fused_resnet::cpu::bn_act_bwd));
  m.impl("bn_act_bwd_out", TORCH_BOX(&fused_resnet::cpu::bn_act_bwd_out));
}

// On any device, to answer "no" where the tensors are not on the CPU.
STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpu, CompositeExplicitAutograd, m) {
  m.impl("unchanged", TORCH_BOX(&fused_resnet::unchanged));
  m.impl("program_isa", TORCH_BOX(&fused_resnet::program_isa));
}

STABLE_TORCH_LIBRARY(fused_resnet_cuda, m) {
  m.def("bn_stats(Tensor x) -> (Tensor, Tensor)");
  m.def(
      "bn_act(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, Tensor? residual, bool relu) "
      "-> Tensor");
  m.def(
      "bn_act_bwd(Tensor grad, Tensor? y, Tensor x, Tensor mean, Tensor var, Tensor? weight, float eps, bool "
      "batch_stats, "
      "bool need_x, bool need_sums, bool need_g) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "bn_relu_bwd(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
      "bool need_x) -> (Tensor, Tensor, Tensor)");
  m.def(
      "bn_act_bwd_input(Tensor grad, Tensor? y, Tensor x, Tensor mean, Tensor scale, Tensor mean_g, Tensor slope) -> "
      "Tensor");
  m.def("relu_bwd_sum(Tensor grad, Tensor y) -> (Tensor, Tensor)");
  m.def(
      "bn_act_pool(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)");
  m.def(
      "bn_act_pool_bwd(Tensor grad, Tensor x, Tensor winner, Tensor mean, Tensor var, Tensor? weight, float eps, "
      "bool need_x) -> (Tensor, Tensor, Tensor)");
  m.def("chain_instances() -> Tensor");
  m.def(
      "chain_out(int instance, Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor? residual, "
      "Tensor? x2, Tensor? projection, int stride2, Tensor? weight3, Tensor? bias3, bool relu, bool quarter, "
      "Tensor(a!) y, Tensor(b!)? z, bool constant_weights=False) -> ()");
  m.def("conv_instances() -> Tensor");
  m.def("conv_plan(int instance, int[] shape, int multiprocessors) -> Tensor");
  m.def(
      "conv_bias_act(int instance, Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? residual, Tensor? x2, "
      "Tensor? weight2, int stride2, int[] stride, int[] padding, int[] dilation, bool relu) -> Tensor");
  m.def(
      "conv_bias_act_out(int instance, Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? residual, "
      "Tensor? x2, Tensor? weight2, int stride2, int[] stride, int[] padding, int[] dilation, bool relu, "
      "Tensor(b!)? workspace, Tensor(a!) out, bool constant_weights=False) -> ()");
  m.def(
      "conv_bn_act(int instance, Tensor x, Tensor weight, Tensor? bn_weight, Tensor? bn_bias, Tensor? mean, "
      "Tensor? var, float eps, Tensor? residual, int[] stride, int[] padding, int[] dilation, bool relu) -> Tensor");
  m.def("avg_pool_out(Tensor x, Tensor(a!) y) -> ()");
  m.def("stem_out(Tensor x, Tensor weight, Tensor bias, int rows, Tensor(a!) y) -> ()");
  m.def("stem_conv(Tensor x, Tensor weight, int rows) -> Tensor");
  m.def("stem_conv_weight_shares(Tensor grad, Tensor x, int rows) -> Tensor");
}

#ifdef FUSED_RESNET_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cuda, CUDA, m) {
  m.impl("bn_stats", TORCH_BOX(&fused_resnet::bn_stats));
  m.impl("bn_act", TORCH_BOX(&fused_resnet::bn_act));
  m.impl("bn_act_bwd", TORCH_BOX(&fused_resnet::bn_act_bwd));
  m.impl("bn_relu_bwd", TORCH_BOX(&fused_resnet::bn_relu_bwd));
  m.impl("bn_act_bwd_input", TORCH_BOX(&fused_resnet::bn_act_bwd_input));
  m.impl("relu_bwd_sum", TORCH_BOX(&fused_resnet::relu_bwd_sum));
  m.impl("bn_act_pool", TORCH_BOX(&fused_resnet::bn_act_pool));
  m.impl("bn_act_pool_bwd", TORCH_BOX(&fused_resnet::bn_act_pool_bwd));
  m.impl("chain_out", TORCH_BOX(&fused_resnet::chain_out));
  m.impl("conv_bias_act", TORCH_BOX(&fused_resnet::conv_bias_act));
  m.impl("conv_bias_act_out", TORCH_BOX(&fused_resnet::conv_bias_act_out));
  m.impl("conv_bn_act", TORCH_BOX(&fused_resnet::conv_bn_act));
  m.impl("avg_pool_out", TORCH_BOX(&fused_resnet::avg_pool_out));
  m.impl("stem_out", TORCH_BOX(&fused_resnet::stem_out));
  m.impl("stem_conv", TORCH_BOX(&fused_resnet::stem_conv));
  m.impl("stem_conv_weight_shares", TORCH_BOX(&fused_resnet::stem_conv_weight_shares));
}

// What needs no device.
STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cuda, CompositeExplicitAutograd, m) {
  m.impl("chain_instances", TORCH_BOX(&fused_resnet::chain_instances));
  m.impl("conv_instances", TORCH_BOX(&fused_resnet::conv_instances));
  m.impl("conv_plan", TORCH_BOX(&fused_resnet::conv_plan));
}
#endif
