// What Python hands over for each op: addresses, sizes and strides, in elements unless the name
// says bytes. No torch here. Two-dimensional inputs (ids, masks, scores, noise) are contiguous, but
// where a stride of samples stands beside them, 0 where all have the same row.
#pragma once
#include <cstdint>

namespace sma {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
enum Reduce : int { kMean = 0, kSum = 1, kNone = 2 };

struct AttentionScoresArgs {
  const void* query;  // (B or 1, H, M, D)
  const void* key;    // (B, H_kv, N, D)
  int dtype;          // of both, not float64
  int64_t batch, heads, kv_heads, queries, tokens, selected, width;
  int64_t query_strides[4], key_strides[4];
  const int64_t* query_index;  // (B, R), or null: all M in order
  int64_t index_stride;        // of its samples
  const int64_t* head_index;   // (B, R), or null
  const uint8_t* padding;      // (B, N), or null
  float scale;
  int reduce;
  float* scores;  // (B, N), or (B, H, N) for kNone
  int threads;
  void* scratch;  // on a GPU, where neither a block nor a cluster of blocks takes a sample
  int64_t scratch_bytes;
};

struct AggregateAttentionArgs {
  const void* attention;  // (B, H, M, N)
  int dtype;
  int64_t batch, heads, queries, tokens, selected;
  int64_t strides[4];
  const int64_t* query_index;  // (B, R), or null: all M in order
  int64_t index_stride;        // of its samples
  const int64_t* head_index;   // (B, R), or null
  int reduce;
  bool logits;
  float* scores;  // (B, N), or (B, H, N) for kNone
  int threads;
};

// How many tokens each row masks: the ratio where it is not negative, else the row's own number,
// else num_masked.
struct SelectTokensArgs {
  const void* scores;      // (B, N)
  int dtype;               // of the scores: float32 on the CPU, not float64 on a GPU
  const uint8_t* padding;  // (B, N), or null
  const float* noise;      // (B, N), or null
  int64_t batch, tokens, width_visible, width_masked;
  double mask_ratio;
  const int64_t* num_masked_rows;  // (B,), or null
  int64_t num_masked;
  double random_fraction;
  double pool_ratio;     // negative: none
  const int64_t* drawn;  // (B, drawn_width): tokens masked before all others
  int64_t drawn_width, drawn_stride;
  uint8_t* mask;             // (B, N)
  int64_t* ids_visible;      // (B, V)
  int64_t* ids_masked;       // (B, K)
  int64_t* ids_restore;      // (B, N)
  int32_t* out_num_visible;  // (B,)
  int32_t* out_num_masked;   // (B,)
  int threads;
};

struct DrawQueriesArgs {
  const float* noise;               // (B, M)
  const uint8_t* padding;           // (B, M), or null
  const int64_t* num_queries_rows;  // (B,), or null
  int64_t batch, candidates, num_queries;
  int64_t* query_index;  // (B, num_queries)
  int threads;
};

struct GatherTokensArgs {
  const void* rows;                     // (B, N, C)
  int64_t batch_bytes, token_bytes;     // strides of the rows
  int64_t row_bytes;                    // of C elements
  int64_t element_bytes, stride_bytes;  // of an element, and from one to the next in its row
  int64_t batch, tokens, visible;
  const int64_t* ids;  // (B, V)
  void* out;           // (B, V, row)
  int threads;
};

struct GatherTokensBackwardArgs {
  const void* grad;  // (B, V, C), contiguous
  int dtype;
  int64_t batch, visible, tokens, width;
  const int64_t* ids;  // (B, V)
  void* out;           // (B, N, C)
  int threads;
};

struct RestoreTokensArgs {
  const void* visible_rows;  // (B, V, C), each row in one piece
  const void* fill_rows;     // (C,), or (B, K, C)
  int64_t visible_batch_bytes, visible_token_bytes;
  int64_t fill_batch_bytes, fill_token_bytes;  // 0, 0 for a (C,) fill
  int64_t row_bytes;
  int64_t batch, visible, fill, tokens;  // fill: how many ids mean fill
  const int64_t* ids_restore;            // (B, N)
  void* out;                             // (B, N, C)
  int threads;
};

struct RestoreTokensBackwardArgs {
  const void* grad;  // (B, N, C), contiguous
  int dtype;
  int64_t batch, tokens, visible, fill, width;
  bool shared_fill;            // the fill was (C,)
  const int64_t* ids_restore;  // (B, N)
  void* grad_visible;          // (B, V, C)
  void* grad_fill;             // (C,) or (B, K, C)
  int threads;
  void* scratch;  // on a GPU, for the sums of a shared fill
  int64_t scratch_bytes;
};

constexpr int kMaxTokenTensors = 16;

struct SelfGuidedMaskingArgs {
  AttentionScoresArgs attention;
  SelectTokensArgs select;
  int num_gathers;
  GatherTokensArgs gathers[kMaxTokenTensors];
};

struct RandomMaskingArgs {
  const float* noise;       // (B, N)
  GatherTokensArgs gather;  // its ids, on the CPU: a (B, V) buffer to be written here
  int64_t* ids_visible;     // the same buffer; null on a GPU
  float* mask;              // (B, N)
  int64_t* ids_restore;     // (B, N)
};

enum BipartitionMethod : int { kNcut = 0, kPca = 1 };

struct BipartitionArgs {
  const void* embeddings;  // (B, N, C)
  int dtype;
  int64_t batch, tokens, width;
  int64_t strides[3];
  const uint8_t* padding;  // (B, N), or null
  int method;
  int64_t iterations;
  double tol;
  float* vector;        // (B, N)
  uint8_t* labels;      // (B, N)
  int64_t* ids;         // (B, N)
  float* eigenvalue;    // (B,)
  uint8_t* converged;   // (B,)
  uint8_t* not_finite;  // set where an embedding is not
  int threads;
};

enum Cluster : int { kObject = 0, kBackground = 1, kSmaller = 2, kLarger = 3 };

struct InformedScoresArgs {
  const void* embeddings;  // (B, N, C), each row in one piece
  int dtype;
  int64_t batch, tokens, width;
  int64_t strides[2];
  const uint8_t* labels;   // (B, N)
  const uint8_t* padding;  // (B, N), or null
  int cluster;
  float* scores;        // (B, N)
  uint8_t* not_finite;  // set where an embedding is not
  int threads;
};

}  // namespace sma
