// A convolution for sm_90a on CUTLASS's persistent GEMM kernels: one instance for every use. The epilogue is
// act((acc * scale + bias) + beta * residual) with scale a vector (live BN) or the number 1 (folded weights), beta 1 or
// 0 (then the residual is not read), act a maximum with 0 or -inf that lets NaN through.

#pragma once

#include <cutlass/kernel_hardware_info.hpp>  // first: others need it without including it

#include <cutlass/cutlass.h>
#include <cutlass/device_kernel.h>
#include <cutlass/epilogue/thread/activation.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include <limits>

#include "instance.h"
#include "sm90_mainloop.cuh"
#include "tensor_map.h"

namespace fused_resnet::conv {

enum class Schedule { pingpong, cooperative, stream_k };

template <class Element, int TileM, int TileN, int ClusterM, int ClusterN, Schedule kSchedule>
struct Sm90 {
  static constexpr bool kPingpong = kSchedule == Schedule::pingpong;
  static constexpr bool kStreamK = kSchedule == Schedule::stream_k;
  static constexpr int kTileK = 64;
  static constexpr int kItem = sizeof(Element);
  static constexpr CUtensorMapDataType kType =
      cute::is_same_v<Element, cutlass::half_t> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

  using Tile = cute::Shape<cute::Int<TileM>, cute::Int<TileN>, cute::Int<kTileK>>;
  using Clusters = cute::Shape<cute::Int<ClusterM>, cute::Int<ClusterN>, cute::_1>;
  using MainSchedule = cute::conditional_t<kPingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                           cutlass::gemm::KernelTmaWarpSpecializedCooperative>;

  template <template <class> class F, class... Nodes>
  using Node = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<F, float, float, cutlass::FloatRoundStyle::round_to_nearest>, Nodes...>;
  using Scale =
      cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float, float, cute::Stride<cute::_0, bool, int64_t>>;
  using Bias = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float>;
  using Scaled = Node<cutlass::homogeneous_multiply_add, Scale, cutlass::epilogue::fusion::Sm90AccFetch, Bias>;
  using Sum = Node<cutlass::homogeneous_multiply_add, cutlass::epilogue::fusion::Sm90ScalarBroadcast<float>,
                   cutlass::epilogue::fusion::Sm90SrcFetch<Element>, Scaled>;
  using Act = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::epilogue::thread::LowerBound, Element, float,
                                             cutlass::FloatRoundStyle::round_to_nearest>,
      Sum>;

  // Tiles of the residual come in several at a time, as many as the main loop leaves room for, and leave as tiles of y
  // from the same memory, two at a time.
  using EpilogueTile = cute::Shape<cute::Int<kPingpong ? 64 : 128>, cute::Int<32>>;
  static constexpr int kStagesC = TileN == 256 ? 3 : kPingpong ? 6 : 4, kStagesD = 2;
  static constexpr int kValuesOfThread = kPingpong ? 64 * 32 / 128 : 128 * 32 / 256;
  using Epilogue = typename cutlass::epilogue::collective::detail::Sm90TmaBuilderImpl<
      Tile, EpilogueTile, float, float, Element, cutlass::layout::RowMajor, 8, Element, cutlass::layout::RowMajor, 8,
      Act, cutlass::epilogue::Sm90TmaWarpSpecialized<kStagesC, kStagesD, kValuesOfThread, true, false>>::CollectiveOp;

  using Atom =
      decltype(cute::GMMA::ss_op_selector<Element, Element, float, Tile, cute::GMMA::Major::K, cute::GMMA::Major::K>());
  using TiledMma = decltype(cute::make_tiled_mma(
      Atom{}, cute::Layout<cute::Shape<cute::Int<kPingpong ? 1 : 2>, cute::_1, cute::_1>>{}));

  // All of the shared memory that the epilogue leaves, but for barriers and the scheduler.
  static constexpr int kStageBytes = (TileM + TileN) * kTileK * kItem;
  static constexpr int kRest = static_cast<int>(sizeof(typename Epilogue::SharedStorage)) + 1024;
  static constexpr int kFits = (cutlass::gemm::collective::detail::sm90_smem_capacity_bytes - kRest) / kStageBytes;
  static constexpr int kStages = kFits < 8 ? kFits : 8;

  using Mainloop =
      Sm90Mainloop<kStages, Element, Tile, Clusters, MainSchedule, TiledMma, cute::GMMA::Layout_K_SW128_Atom<Element>>;
  using Scheduler = cute::conditional_t<kStreamK, cutlass::gemm::StreamKScheduler, cutlass::gemm::PersistentScheduler>;
  // A name of its own, and a short one: profilers and disassemblers show it.
  struct Kernel : cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue, Scheduler> {
  };
  using Arguments = typename Kernel::Arguments;
  static_assert(Kernel::SharedStorageSize <= 227 << 10 && kStages >= 3);
#ifdef CUTLASS_ENABLE_GDC_FOR_SM90  // setup.py defines it for all but stream-K
  static constexpr bool kOverlaps = true;
#else
  static constexpr bool kOverlaps = false;  // the kernel does not wait for the one before by itself
#endif

  static const char* refuses(const Shape& s) {
    if (ceil_div(s.k, TileN) % ClusterN != 0) return "an odd number of tiles of output channels";
    return tma_refuses(s);
  }

  // All but the tensor maps.
  static Arguments arguments(const Shape& s, int multiprocessors) {
    Arguments a;
    a.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    a.mainloop.reduction = reduction_of(s, kTileK);
    a.mainloop.window = window_of(s);
    a.mainloop.second_window = second_window_of(s);
    a.mainloop.dilation_h = s.dilation_h;
    a.mainloop.dilation_w = s.dilation_w;
    a.problem_shape = {static_cast<int>(s.m()), s.k, a.mainloop.reduction.steps() * kTileK, 1};
    a.epilogue.dC = {int64_t{s.k}, cute::_1{}, int64_t{0}};
    a.epilogue.dD = a.epilogue.dC;
    a.hw_info.sm_count = multiprocessors;
    return a;
  }

  static size_t workspace(const Shape& s, int multiprocessors) {
    return Kernel::get_workspace_size(arguments(s, multiprocessors));
  }

  static cudaError_t run(const Problem& problem, int multiprocessors, void* workspace, cudaStream_t stream) {
    const Shape& s = problem.shape;
    Arguments a = arguments(s, multiprocessors);
    auto& main = a.mainloop;
    constexpr int pixels = Mainloop::kRowsOfX, rows = Mainloop::kRowsOfWeight;
    cudaError_t error = encode(main.x, problem.x, im2col_of(s, kTileK, pixels, kItem), kType);
    const auto then = [&](auto&&... arguments) {
      if (error == cudaSuccess) error = encode(arguments...);
    };
    then(main.weight, problem.weight, tiled_of(s.k, s.r * s.s, s.c, kTileK, rows, kItem), kType);
    if (s.c2) {
      then(main.x2, problem.x2, second_im2col_of(s, kTileK, pixels, kItem), kType);
      then(main.weight2, problem.weight2, tiled_of(s.k, 1, s.c2, kTileK, rows, kItem), kType);
    }
    if (error != cudaSuccess) return error;

    auto& sum = a.epilogue.thread.op_0;
    auto& scaled = sum.op_2;
    sum.op_0.scalars[0] = problem.residual ? 1.0f : 0.0f;
    scaled.op_0.ptr_row = problem.scale;
    scaled.op_0.null_default = 1.0f;
    scaled.op_0.dRow = {cute::_0{}, true, 0};
    scaled.op_2.ptr_row = problem.bias;
    a.epilogue.thread.op_1.lower_bound = problem.relu ? 0.0f : -std::numeric_limits<float>::infinity();
    a.epilogue.ptr_C = static_cast<const Element*>(problem.residual);
    a.epilogue.ptr_D = static_cast<Element*>(problem.y);
    if (!problem.residual) a.epilogue.ptr_C = a.epilogue.ptr_D;  // for a tensor map that nothing uses

    if (!Kernel::can_implement(a)) return cudaErrorInvalidValue;
    // It has cleared the error that it met.
    if (Kernel::initialize_workspace(a, workspace, stream) != cutlass::Status::kSuccess) return cudaErrorUnknown;
    const typename Kernel::Params params = Kernel::to_underlying_arguments(a, workspace);
    const auto kernel = cutlass::device_kernel<Kernel>;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = ClusterM;
    attributes[0].val.clusterDim.y = ClusterN;
    attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = Kernel::get_grid_shape(params);
    config.blockDim = Kernel::get_block_shape();
    config.dynamicSmemBytes = Kernel::SharedStorageSize;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = kOverlaps ? 2 : 1;
    return cudaLaunchKernelEx(&config, kernel, params);
  }

  static constexpr Instance instance(const char* name) {
    return {name,
            90,
            cute::is_same_v<Element, cutlass::half_t> ? Dtype::half : Dtype::bfloat16,
            TileM,
            TileN,
            kTileK,
            ClusterM,
            ClusterN,
            kStages,
            static_cast<int>(Kernel::MaxThreadsPerBlock),
            static_cast<int>(Kernel::SharedStorageSize),
            kStreamK,
            0,
            &refuses,
            &workspace,
            &run};
  }
};

}  // namespace fused_resnet::conv
