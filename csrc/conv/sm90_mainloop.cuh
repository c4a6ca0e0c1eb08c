// The main loop of a convolution for CUTLASS's persistent, warp-specialised GEMM kernels (ping-pong, cooperative,
// stream-K). CUTLASS's own SM90 convolution has one consumer warp group and no persistent schedule ("Persistent
// schedules not support for conv yet"); its GEMM kernels have both, and ask of a main loop nothing but tiles in shared
// memory. Here a producer thread fetches them: x through the tensor memory accelerator in im2col mode, weight in tiled
// mode, step by step as geometry.h's Reduction has it, the projection's segment last. To the kernel it is a GEMM of
// M = N*P*Q, N = K, K = steps * 64.

#pragma once

#include <cutlass/cutlass.h>

#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "geometry.h"

namespace fused_resnet::conv {

// CUTLASS's pipeline, but for who tells the producers of a cluster that a stage is free: the first threads of a warp
// group, each one block. CUTLASS spreads that over the group by a number that every thread keeps in a register, one
// more than 192 rows leave.
template <int Stages, int Blocks>
struct Sm90Pipeline : cutlass::PipelineTmaAsync<Stages> {
  using Base = cutlass::PipelineTmaAsync<Stages>;

  template <class Cluster>
  CUTLASS_DEVICE
  Sm90Pipeline(typename Base::SharedStorage& storage, const typename Base::Params& params, Cluster cluster)
      : Base(storage, params, cluster), empty(storage.empty_barrier_) {
    static_assert(cute::size(Cluster{}) == Blocks);
  }

  CUTLASS_DEVICE void consumer_release(const cutlass::PipelineState<Stages>& state) {
    if constexpr (Blocks == 1) {
      Base::consumer_release(state);
    } else {
      const uint32_t block = threadIdx.x % cutlass::NumThreadsPerWarpGroup;
      empty[state.index()].arrive(block, block < Blocks);
    }
  }

  typename Base::EmptyBarrier* empty;
};

template <int Stages_, class Element, class TileShape_, class ClusterShape_, class Schedule, class TiledMma_,
          class SmemAtom>
struct Sm90Mainloop {
  using DispatchPolicy = cutlass::gemm::MainloopSm90TmaGmmaWarpSpecialized<Stages_, ClusterShape_, Schedule>;
  using ArchTag = cutlass::arch::Sm90;
  using TileShape = TileShape_;
  using ClusterShape = ClusterShape_;
  using TiledMma = TiledMma_;
  using ElementA = Element;
  using ElementB = Element;
  using StrideA = cute::Stride<int64_t, cute::_1, int64_t>;
  using StrideB = StrideA;
  using ElementAccumulator = float;
  using MainloopPipeline = Sm90Pipeline<Stages_, cute::size(ClusterShape{})>;
  using PipelineParams = typename MainloopPipeline::Params;
  using PipelineState = cutlass::PipelineState<Stages_>;
  static constexpr int NumProducerThreadEvents = 1;

  static constexpr int kStages = Stages_;
  static constexpr int kTileM = cute::size<0>(TileShape{});
  static constexpr int kTileN = cute::size<1>(TileShape{});
  static constexpr int kTileK = cute::size<2>(TileShape{});
  static constexpr int kClusterM = cute::size<0>(ClusterShape{}), kClusterN = cute::size<1>(ClusterShape{});
  // That one block of a cluster fetches: of x for those of the same M, of weight for those of the same N.
  static constexpr int kRowsOfX = kTileM / kClusterN, kRowsOfWeight = kTileN / kClusterM;
  static_assert(sizeof(Element) == 2 && kTileK == 64, "a row of a tile is one swizzle of 128 bytes");
  static_assert((kClusterM == 1 || kClusterN == 1) && cute::size<2>(ClusterShape{}) == 1, "a share is for all or none");
  static_assert(kTileM <= 256 && kTileN <= 256 && kRowsOfX % 8 == 0 && kRowsOfWeight % 8 == 0, "whole swizzles");

  template <int Rows>
  using SmemLayout = decltype(cute::tile_to_shape(
      SmemAtom{}, cute::make_shape(cute::Int<Rows>{}, cute::Int<kTileK>{}, cute::Int<Stages_>{})));
  using SmemLayoutA = SmemLayout<kTileM>;
  using SmemLayoutB = SmemLayout<kTileN>;

  struct TensorStorage : cute::aligned_struct<1024, cute::_0> {
    cute::array_aligned<Element, kTileM * kTileK * Stages_, 1024> a;
    cute::array_aligned<Element, kTileN * kTileK * Stages_, 1024> b;
  };
  using PipelineStorage = typename MainloopPipeline::SharedStorage;
  static constexpr uint32_t kStageBytes = (kTileM + kTileN) * kTileK * sizeof(Element);

  struct Arguments {
    cute::TmaDescriptor x, weight, x2, weight2;
    Reduction reduction;
    Window window, second_window;
    int dilation_h, dilation_w;
  };
  struct Params : Arguments {
    uint32_t tma_transaction_bytes = kStageBytes;
  };

  template <class ProblemShape>
  static Params to_underlying_arguments(const ProblemShape&, const Arguments& arguments, void*) {
    return {arguments};
  }

  template <class ProblemShape>
  static bool can_implement(const ProblemShape&, const Arguments&) {
    return true;  // Instance::refuses was asked
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
    cute::prefetch_tma_descriptor(&params.x);
    cute::prefetch_tma_descriptor(&params.weight);
    if (params.reduction.c2) {
      cute::prefetch_tma_descriptor(&params.x2);
      cute::prefetch_tma_descriptor(&params.weight2);
    }
  }

  // The kernel asks these for the numbers of tiles only: (BLK_M, BLK_K, m, k, l) and (BLK_N, BLK_K, n, k, l).
  template <class ProblemShape>
  CUTLASS_DEVICE auto load_init(const ProblemShape& problem, const Params&) const {
    using namespace cute;
    const auto [m, n, k, l] = problem;
    return make_tuple(
        local_tile(make_identity_tensor(make_shape(m, k, l)), TileShape{}, make_coord(_, _, _), Step<_1, X, _1>{}),
        local_tile(make_identity_tensor(make_shape(n, k, l)), TileShape{}, make_coord(_, _, _), Step<X, _1, _1>{}));
  }

  template <class Inputs, class BlockCoord, class KTileIterator>
  CUTLASS_DEVICE void load(const Params& params, MainloopPipeline pipeline, PipelineState state, const Inputs&,
                           const BlockCoord& block, KTileIterator first, int steps, int, uint32_t rank,
                           TensorStorage& shared) {
    if (!cute::elect_one_sync()) return;
    const int share_of_x = rank % kClusterN * kRowsOfX, share_of_weight = rank % kClusterM * kRowsOfWeight;
    const int64_t row = int64_t{kTileM} * cute::get<0>(block) + share_of_x;
    const int column = kTileN * cute::get<1>(block) + share_of_weight;
    const Pixel pixel = params.window.at(row), second = params.second_window.at(row);
    Part at = params.reduction.at(cute::get<0>(cute::flatten(cute::make_tuple(*first))));

    CUTLASS_PRAGMA_NO_UNROLL
    for (; steps > 0; --steps, ++state, params.reduction.advance(at)) {
      pipeline.producer_acquire(state);
      uint64_t* barrier = pipeline.producer_get_barrier(state);
      Element* a = shared.a.data() + (state.index() * kTileM + share_of_x) * kTileK;
      Element* b = shared.b.data() + (state.index() * kTileN + share_of_weight) * kTileK;
      const auto* x = at.second ? &params.x2 : &params.x;
      const auto* weight = at.second ? &params.weight2 : &params.weight;
      const Pixel& from = at.second ? second : pixel;
      const int tap = at.r * params.reduction.columns + at.s;
      const auto dx = static_cast<uint16_t>(at.s * params.dilation_w);
      const auto dy = static_cast<uint16_t>(at.r * params.dilation_h);
      constexpr uint16_t everyone = (1 << kClusterM * kClusterN) - 1;
      if constexpr (kClusterN > 1) {
        cute::SM90_TMA_LOAD_IM2COL_MULTICAST_4D::copy(x, barrier, everyone, a, at.c, from.w, from.h, from.n, dx, dy);
      } else {
        cute::SM90_TMA_LOAD_IM2COL_4D::copy(x, barrier, a, at.c, from.w, from.h, from.n, dx, dy);
      }
      constexpr auto keep = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);  // all the tiles of M read it
      if constexpr (kClusterM > 1) {
        cute::SM90_TMA_LOAD_MULTICAST_3D::copy(weight, barrier, everyone, keep, b, at.c, tap, column);
      } else {
        cute::SM90_TMA_LOAD_3D::copy(weight, barrier, keep, b, at.c, tap, column);
      }
    }
  }

  // No block of a cluster leaves before the others have read what it sent them.
  CUTLASS_DEVICE void load_tail(MainloopPipeline pipeline, PipelineState state) {
    if (cute::elect_one_sync()) pipeline.producer_tail(state);
  }

  template <class Accumulator>
  CUTLASS_DEVICE void mma(MainloopPipeline pipeline, PipelineState state, Accumulator& accumulator, int steps,
                          int thread, TensorStorage& shared, const Params&) {
    using namespace cute;
    Tensor a = make_tensor(make_smem_ptr(shared.a.data()), SmemLayoutA{});
    Tensor b = make_tensor(make_smem_ptr(shared.b.data()), SmemLayoutB{});
    TiledMma mma;
    // Descriptors are of a whole warp group: its first thread's, known to be the same for all.
    const int group = __shfl_sync(0xffffffff, thread / cutlass::NumThreadsPerWarpGroup, 0);
    auto slice = mma.get_slice(group * cutlass::NumThreadsPerWarpGroup);
    Tensor from_a = slice.make_fragment_A(slice.partition_A(a));  // (MMA, MMA_M, MMA_K, PIPE)
    Tensor from_b = slice.make_fragment_B(slice.partition_B(b));  // (MMA, MMA_N, MMA_K, PIPE)

    PipelineState done = state;
    const auto issue = [&] {
      pipeline.consumer_wait(state);
      warpgroup_arrive();
      CUTLASS_PRAGMA_UNROLL
      for (int k = 0; k < size<2>(from_a); ++k) {
        cute::gemm(mma, from_a(_, _, k, state.index()), from_b(_, _, k, state.index()), accumulator);
        mma.accumulate_ = GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
      ++state;
    };

    mma.accumulate_ = GMMA::ScaleOut::Zero;
    warpgroup_fence_operand(accumulator);
    if (steps > 0) issue();
    warpgroup_fence_operand(accumulator);
    // One step stays in flight: the stage before it is free.
    CUTLASS_PRAGMA_NO_UNROLL
    for (--steps; steps > 0; --steps) {
      warpgroup_fence_operand(accumulator);
      issue();
      warpgroup_wait<1>();
      warpgroup_fence_operand(accumulator);
      pipeline.consumer_release(done);
      ++done;
    }
    warpgroup_fence_operand(accumulator);
  }

  CUTLASS_DEVICE void mma_tail(MainloopPipeline pipeline, PipelineState done, int steps) {
    cute::warpgroup_wait<0>();
    if (steps <= 0) return;
    done.advance(steps - 1);
    pipeline.consumer_release(done);
  }
};

}  // namespace fused_resnet::conv
