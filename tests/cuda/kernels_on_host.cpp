// The launchers of csrc/cuda on the host, as C functions for test_cuda_kernels.py.
//
// Arguments come in one struct of int64 fields, pointers among them, in the order in which the test writes it down.

#include "cuda_on_host.h"

#include "cuda/pruning/prune_kernels.cuh"

namespace {

using namespace stamp::cuda;

struct Arguments {
  int64_t dtype;  // of hidden, or of importance where hidden is null: 0 float32, 1 float16, 2 bfloat16, 3 float64
  int64_t small_tiling;
  int64_t hidden, row_stride, row_bytes, element_bytes;
  int64_t centrality, centrality_is_double, norm_order, per_visible_query;
  int64_t importance;
  int64_t cu_seqlens, batch, total, max_seqlen;
  int64_t budget_kind, ratio_q32, keep_count, keep_counts, min_keep;
  int64_t protect, num_protected, codes_per_item, total_kept;
  int64_t positions, cu_seqlens_kept, indices, inverse, kept_positions;
};

// Limits so low that short sequences reach every path.
using SmallShortTiling = Tiling<64, 1, 8, 0>;
using SmallLongTiling = Tiling<64, 1, 8, 320>;

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

Scoring scoring_of(const Arguments& a) {
  Scoring scoring = {};
  scoring.hidden = pointer<const char>(a.hidden);
  scoring.row_stride = a.row_stride;
  scoring.row_bytes = a.row_bytes;
  scoring.access_bytes = widest_access(scoring, static_cast<int32_t>(a.element_bytes));
  scoring.lanes_per_row = lanes_for_row(a.row_bytes);
  scoring.centrality = pointer<const void>(a.centrality);
  scoring.cu_seqlens = pointer<const int32_t>(a.cu_seqlens);
  scoring.batch = a.batch;
  scoring.total = a.total;
  scoring.centrality_is_double = a.centrality_is_double != 0;
  scoring.per_visible_query = a.per_visible_query != 0;
  scoring.importance = pointer<void>(a.importance);
  return scoring;
}

SelectionProblem problem_of(const Arguments& a) {
  SelectionProblem problem = {};
  problem.cu_seqlens = pointer<const int32_t>(a.cu_seqlens);
  problem.batch = static_cast<int32_t>(a.batch);
  problem.total = a.total;
  problem.total_kept = a.total_kept;
  problem.codes_per_item = static_cast<int32_t>(a.codes_per_item);
  problem.budget = {
      static_cast<stamp::BudgetKind>(a.budget_kind), a.ratio_q32,  a.keep_count,
      pointer<const void>(a.keep_counts),            a.min_keep,   a.codes_per_item};
  problem.protect = pointer<const uint8_t>(a.protect);
  problem.num_protected = pointer<const int32_t>(a.num_protected);
  problem.cu_seqlens_kept = pointer<int32_t>(a.cu_seqlens_kept);
  problem.indices = pointer<int64_t>(a.indices);
  problem.inverse = pointer<int32_t>(a.inverse);
  return problem;
}

template <typename Run>
void with_dtype(int64_t dtype, const Run& run) {
  switch (dtype) {
    case 0:
      return run(float{});
    case 1:
      return run(Half{});
    case 2:
      return run(BFloat16{});
    default:
      return run(double{});
  }
}

void count_protected(const Arguments& a, const SelectionProblem& problem) {
  if (problem.protect != nullptr) {
    launch_count_protected(problem, a.max_seqlen, pointer<int32_t>(a.num_protected), cuda_on_host::Launch{});
  }
}

template <typename T>
void select_as(const Arguments& a) {
  const SelectionProblem problem = problem_of(a);
  const cuda_on_host::Launch launch;
  count_protected(a, problem);
  launch_kept_offsets(problem, launch);
  const T* importance = pointer<const T>(a.importance);
  if (a.small_tiling != 0) {
    launch_select_tokens<SmallShortTiling, SmallLongTiling>(problem, a.max_seqlen, importance, launch);
  } else {
    launch_select_tokens<ShortTiling<T>, LongTiling<T>>(problem, a.max_seqlen, importance, launch);
  }
}

template <typename T>
void prune_as(const Arguments& a, std::vector<stamp::Rows> copies) {
  SelectionProblem problem = problem_of(a);
  int32_t* kept_positions = pointer<int32_t>(a.kept_positions);
  if (a.positions != 0) {
    copies.push_back(rows_of_positions(pointer<const int32_t>(a.positions), kept_positions));
  } else {
    problem.index_in_sequence = kept_positions;
  }
  const cuda_on_host::Launch launch;
  count_protected(a, problem);
  launch_prune<SmallShortTiling, SmallLongTiling, T>(
      scoring_of(a), a.norm_order == 2, problem, a.max_seqlen, copies, launch);
}

}  // namespace

extern "C" {

void set_thread_order(int reverse) {
  cuda_on_host::reverse_threads = reverse != 0;
}

int64_t launches_so_far() {
  return cuda_on_host::num_launches;
}

void run_token_importance(const Arguments* a) {
  with_dtype(a->dtype, [&](auto tag) {
    launch_token_importance<decltype(tag)>(scoring_of(*a), a->norm_order == 2, cuda_on_host::Launch{});
  });
}

void run_select_tokens(const Arguments* a) {
  with_dtype(a->dtype, [&](auto tag) { select_as<decltype(tag)>(*a); });
}

// `copies`: source, destination, source_stride and row_bytes of each tensor.
void run_prune(const Arguments* a, const int64_t* copies, int64_t num_copies) {
  std::vector<stamp::Rows> rows;
  for (int64_t i = 0; i < num_copies; ++i, copies += 4) {
    rows.push_back({pointer<const char>(copies[0]), pointer<char>(copies[1]), copies[2], copies[3]});
  }
  with_dtype(a->dtype, [&](auto tag) { prune_as<decltype(tag)>(*a, rows); });
}
}
