// The launchers of csrc/cuda on the CPU, as C functions for test_cuda_kernels.py.
//
// Arguments come in one struct of int64 fields, pointers included, in the order of FIELDS in the test.

#include "cuda_on_host.h"

#include "cuda/pruning/prune_kernels.cuh"

namespace {

using namespace stamp;
using namespace stamp::cuda;

struct Arguments {
  int64_t dtype;  // of hidden, or of importance where hidden is null: 0 float32, 1 float16, 2 bfloat16, 3 float64
  int64_t small_tiling;
  int64_t hidden, row_stride, row_bytes, element_bytes;
  int64_t centrality, centrality_is_double, norm_order, per_visible_query;
  int64_t importance;
  int64_t cu_seqlens, num_sequences, total, max_seqlen;
  int64_t budget_kind, ratio_q32, keep_count, keep_counts, min_keep;
  int64_t protect, num_protected, codes_per_item, total_kept;
  int64_t positions, cu_seqlens_kept, indices, inverse, kept_positions;
};

// Limits that are low enough for short sequences to reach every path.
using SmallShortTiling = Tiling<64, 1, 8, 0>;
using SmallLongTiling = Tiling<64, 1, 8, 320>;

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

ImportanceProblem importance_problem_of(const Arguments& a) {
  ImportanceProblem problem = {};
  problem.hidden = pointer<const char>(a.hidden);
  problem.row_stride = a.row_stride;
  problem.row_bytes = a.row_bytes;
  problem.access_bytes = widest_access(problem, static_cast<int32_t>(a.element_bytes));
  problem.lanes_per_row = lanes_for_row(a.row_bytes);
  problem.centrality = pointer<const void>(a.centrality);
  problem.cu_seqlens = pointer<const int32_t>(a.cu_seqlens);
  problem.num_sequences = a.num_sequences;
  problem.total = a.total;
  problem.centrality_is_double = a.centrality_is_double != 0;
  problem.per_visible_query = a.per_visible_query != 0;
  problem.importance = pointer<void>(a.importance);
  return problem;
}

SelectionProblem selection_problem_of(const Arguments& a) {
  SelectionProblem problem = {};
  problem.cu_seqlens = pointer<const int32_t>(a.cu_seqlens);
  problem.num_sequences = static_cast<int32_t>(a.num_sequences);
  problem.total = a.total;
  problem.total_kept = a.total_kept;
  problem.codes_per_item = static_cast<int32_t>(a.codes_per_item);
  problem.budget.kind = static_cast<BudgetKind>(a.budget_kind);
  problem.budget.ratio_q32 = a.ratio_q32;
  problem.budget.keep_count = a.keep_count;
  problem.budget.keep_counts = pointer<const void>(a.keep_counts);
  problem.budget.min_keep = a.min_keep;
  problem.budget.codes_per_item = a.codes_per_item;
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
  const SelectionProblem problem = selection_problem_of(a);
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
void prune_as(const Arguments& a, std::vector<Rows> copies) {
  SelectionProblem problem = selection_problem_of(a);
  int32_t* kept_positions = pointer<int32_t>(a.kept_positions);
  if (a.positions != 0) {
    copies.push_back(rows_of_positions(pointer<const int32_t>(a.positions), kept_positions));
  } else {
    problem.index_in_sequence = kept_positions;
  }
  const cuda_on_host::Launch launch;
  count_protected(a, problem);
  launch_prune<SmallShortTiling, SmallLongTiling, T>(
      importance_problem_of(a), a.norm_order == 2, problem, a.max_seqlen, copies, launch);
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
    launch_token_importance<decltype(tag)>(importance_problem_of(*a), a->norm_order == 2, cuda_on_host::Launch{});
  });
}

void run_select_tokens(const Arguments* a) {
  with_dtype(a->dtype, [&](auto tag) { select_as<decltype(tag)>(*a); });
}

// `copies` has the source, destination, source_stride and row_bytes of each tensor.
void run_prune(const Arguments* a, const int64_t* copies, int64_t num_copies) {
  std::vector<Rows> rows;
  for (int64_t i = 0; i < num_copies; ++i, copies += 4) {
    Rows copy;
    copy.source = pointer<const char>(copies[0]);
    copy.destination = pointer<char>(copies[1]);
    copy.source_stride = copies[2];
    copy.row_bytes = copies[3];
    rows.push_back(copy);
  }
  with_dtype(a->dtype, [&](auto tag) { prune_as<decltype(tag)>(*a, rows); });
}
}
