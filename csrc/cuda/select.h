// Selects the tokens of one row: all threads of a block, or of the blocks that share the row, call
// SelectRow::run together. Once a threshold is known, one ordered sweep writes mask and ids.
#pragma once
#include "select_threshold.h"

namespace sma {
namespace cuda {

// What select_tokens writes of a row: the chosen are masked.
class MaskHighest {
 public:
  using Args = SelectTokensArgs;
  static constexpr float kSign = 1.0f;     // keys are made of the scores times this
  static constexpr bool kIsPlain = false;  // whether all rows are, see is_plain
  static constexpr int64_t kLeast = 0;     // tokens that are chosen of those that are valid
  // whether it writes ids_restore, where what blocks of a grid find lies until then
  static constexpr bool kWritesPlaces = true;

  // begin: from here on tokens count.
  __device__ MaskHighest(const Args& args, int64_t sample, unsigned begin)
      : a(args),
        b(sample),
        begin(begin),
        width_visible(static_cast<unsigned>(a.width_visible)),
        mask(hoisted(a.mask + b * a.tokens + begin)),
        restore(hoisted(a.ids_restore + b * a.tokens + begin)),
        masked(hoisted(a.ids_masked + b * a.width_masked)),
        visible(hoisted(a.ids_visible + b * a.width_visible)) {}

  // at: how many like it, chosen or not, are in front of a token.
  __device__ void token(unsigned i, bool is_valid, bool chosen, unsigned at) const {
    if (is_valid) (chosen ? masked : visible)[at] = begin + i;
    restore[i] = is_valid ? int64_t{at + (chosen ? width_visible : 0)} : -1;
    mask[i] = chosen;
  }

  // count: of the chosen, among `valid` tokens.
  __device__ void end(unsigned count, unsigned valid, const RowShare& share) const {
    const unsigned thread = share.rank * blockDim.x + threadIdx.x;
    const unsigned threads = share.blocks * blockDim.x;
    for (int64_t i = count + thread; i < a.width_masked; i += threads) masked[i] = -1;
    for (int64_t i = valid - count + thread; i < a.width_visible; i += threads) visible[i] = -1;
    if (thread == 0) {
      a.out_num_visible[b] = static_cast<int32_t>(valid - count);
      a.out_num_masked[b] = static_cast<int32_t>(count);
    }
  }

 private:
  const Args& a;
  const int64_t b;
  const unsigned begin, width_visible;
  uint8_t* const mask;
  int64_t *const restore, *const masked, *const visible;
};

// Output: what is written, as MaskHighest.
template <bool kHeld, bool kPlain, Search kSearch, class Output>
class SelectRow {
 public:
  using Args = typename Output::Args;

  // keys: as RowKeys takes them.
  __device__ SelectRow(const Args& args, int64_t sample, const RowShare& share,
                       SelectShared* shared, uint32_t* held)
      : keys(args, sample, share, shared, held),
        written({share.written.begin - keys.begin, share.written.end - keys.begin}),
        a(args),
        s(*shared) {}

  // dtype: of the scores. The blocks of a cluster that search together are done together.
  __device__ void run(int dtype) {
    keys.mark_tokens();
    unsigned competing = keys.read_keys(a.scores, dtype, Output::kSign);
    const unsigned valid = competing, count = masked_of(valid);
    if constexpr (kPlain) {
      finish(find(count, competing), count, valid);
    } else {
      // what the scores choose; noise may choose among these, or the rest
      const bool has_pool = a.pool_ratio >= 0, is_last = !has_pool && a.random_fraction == 0;
      unsigned wanted = count;
      if (has_pool) wanted = max(count, rounded(a.pool_ratio * valid));
      else if (!is_last) wanted = rounded((1.0 - a.random_fraction) * count);
#pragma unroll 1
      for (bool last = is_last;; last = true) {
        const Threshold t = find(wanted, competing);
        if (last) return finish(t, count, valid);
        settle(t, has_pool ? kCompetes : kTaken, has_pool ? kPassed : kCompetes);
        competing = keys.read_keys(a.noise, kFloat32, -1.0f);
        if (has_pool) wanted = count;
        else wanted = count - wanted;
      }
    }
  }

 private:
  using Keys = RowKeys<kHeld, kPlain, kSearch>;
  static constexpr bool kTogether = kSearch != kAlone;
  Keys keys;
  const Span written;
  const Args& a;
  SelectShared& s;

  static __device__ unsigned rounded(double x) { return static_cast<unsigned>(rint(x)); }

  __device__ Threshold find(unsigned wanted, unsigned competing) {
    return ThresholdSearch<Keys>(keys).find(wanted, competing);
  }

  __device__ unsigned masked_of(unsigned valid) const {
    int64_t count = a.num_masked;
    if (a.mask_ratio >= 0) count = rounded(a.mask_ratio * valid);
    else if (a.num_masked_rows != nullptr) count = a.num_masked_rows[keys.b];
    count = max(Output::kLeast, min(count, a.width_masked));
    return static_cast<unsigned>(min(count, static_cast<int64_t>(valid)));
  }

  // Adds what tokens are against the threshold.
  __device__ void count(Threshold t, unsigned first, unsigned last, unsigned step,
                        RowCounts& counts) const {
    const auto add = [&](uint32_t key) {
      counts.taken += key > t.key;
      counts.ties += key == t.key;
      if constexpr (!kPlain) counts.valid += key != kPadding;
    };
    unsigned i = first;
    for (; i + (kCounts - 1) * step < last; i += kCounts * step) {
      uint32_t key[kCounts];
#pragma unroll
      for (unsigned j = 0; j < kCounts; ++j) key[j] = keys.key_of(i + j * step);
#pragma unroll
      for (unsigned j = 0; j < kCounts; ++j) add(key[j]);
    }
#pragma unroll 1
    for (; i < last; i += step) add(keys.key_of(i));
  }

  // Calls body(i, key, chosen, chosen before, valid before) for the tokens of a span, a warp for 32
  // that follow each other, in order.
  template <class Body>
  __device__ void sweep(Threshold t, Span span, const Body& body) {
    const unsigned length = span.end - span.begin;
    const unsigned each = ceil_div(length, blockDim.x) * kWarp;
    const unsigned warp_begin = span.begin + min(length, same_in_warp(warp()) * each);
    const unsigned warp_end = min(span.end, warp_begin + each);
    RowCounts counts = {0, 0, 0}, front = {0, 0, 0};
    count(t, warp_begin + lane(), warp_end, kWarp, counts);
    if (!kTogether && span.begin > 0) count(t, threadIdx.x, span.begin, blockDim.x, front);
    counts = before_me(counts, front);
    unsigned ties = counts.ties, chosen = counts.taken + min(ties, t.ties);
    unsigned valid = kPlain ? keys.begin + warp_begin : counts.valid;
    const unsigned lower_lanes = (1u << lane()) - 1;
    const auto take = [&](unsigned i, bool inside) {
      const uint32_t key = inside ? keys.key_of(i) : kPadding;
      bool choose = key > t.key;
      const bool equal = key == t.key;
      const unsigned tied = __ballot_sync(kAllLanes, equal);
      if (tied != 0) {
        if (equal && ties + __popc(tied & lower_lanes) < t.ties) choose = true;
        ties += __popc(tied);
      }
      const unsigned all_chosen = __ballot_sync(kAllLanes, choose);
      unsigned valid_before = valid + lane(), all_valid = kWarp;
      if constexpr (!kPlain) {
        const unsigned valid_lanes = __ballot_sync(kAllLanes, key != kPadding);
        valid_before = valid + __popc(valid_lanes & lower_lanes);
        all_valid = __popc(valid_lanes);
      }
      if (inside) body(i, key, choose, chosen + __popc(all_chosen & lower_lanes), valid_before);
      chosen += __popc(all_chosen);
      valid += all_valid;
    };
    unsigned first = warp_begin;
#pragma unroll 2
    for (; first + kWarp <= warp_end; first += kWarp) take(first + lane(), true);
    if (first < warp_end) take(first + lane(), first + lane() < warp_end);
  }

  static __device__ RowCounts sum_of(RowCounts x) {
    return {__reduce_add_sync(kAllLanes, x.taken), __reduce_add_sync(kAllLanes, x.ties),
            kPlain ? 0 : __reduce_add_sync(kAllLanes, x.valid)};
  }
  static __device__ RowCounts sum_of(RowCounts x, RowCounts y) {
    return {x.taken + y.taken, x.ties + y.ties, x.valid + y.valid};
  }

  // Sums of what each lane counted over all that stands in front of this warp in the row: what the
  // warps before it counted, and what all found in front of the span.
  __device__ RowCounts before_me(RowCounts own, RowCounts front) {
    constexpr RowCounts kNone = {0, 0, 0};
    own = sum_of(own);
    if constexpr (!kTogether) front = sum_of(front);
    if (lane() == 0) {
      s.counts_of[warp()] = own;
      if constexpr (!kTogether) s.front_of[warp()] = front;
    }
    __syncthreads();
    RowCounts other = lane() < warp() ? s.counts_of[lane()] : kNone;
    if constexpr (!kTogether)
      if (lane() < warps()) other = sum_of(other, s.front_of[lane()]);
    RowCounts sum = sum_of(other);
    if constexpr (kTogether) {
      if (threadIdx.x == blockDim.x - kWarp) s.part = sum_of(sum, own);  // of the last warp
      keys.publish();
      other = lane() < keys.share.rank ? *keys.there(&s.part, lane()) : kNone;
      sum = sum_of(sum, sum_of(other));
      if constexpr (kSearch == kGrid) grid_sync();  // outputs are written where `there` is
    }
    return sum;
  }

  // A choice that another one follows: what becomes of the chosen, and of the others.
  __device__ void settle(Threshold t, uint32_t chosen, uint32_t other) {
    sweep(t, {0, keys.size}, [&](unsigned i, uint32_t key, bool choose, unsigned, unsigned) {
      if (key != kPadding) keys.set_mark(i, choose ? chosen : other);
    });
    keys.done_reading();
  }

  __device__ void finish(Threshold t, unsigned count, unsigned valid) {
    const Output out(a, keys.b, keys.begin);
    sweep(t, written,
          [&](unsigned i, uint32_t key, bool choose, unsigned chosen, unsigned valid_before) {
            out.token(i, kPlain || key != kPadding, choose,
                      choose ? chosen : valid_before - chosen);
          });
    out.end(count, valid, keys.share);
    if constexpr (kSearch == kCluster) cluster_sync();  // others may still read this block's memory
  }
};

// Whether every token competes, in one choice.
__host__ __device__ inline bool is_plain(const SelectTokensArgs& a) {
  return a.padding == nullptr && a.drawn == nullptr && a.random_fraction == 0 && a.pool_ratio < 0;
}

// What select_sample wants of shared memory.
inline size_t select_sample_bytes(int64_t tokens) {
  return sizeof(SelectShared) + held_bytes(tokens);
}

// The blocks of a cluster select the tokens of a sample by float32 scores: each searches all of
// them, and writes its part. So they wait for each other only once, at the end.
template <class Output>
__device__ inline void select_sample(const typename Output::Args& a, int64_t sample, char* memory) {
  const auto tokens = static_cast<unsigned>(a.tokens);
  const unsigned part = ceil_div(tokens, cluster_size());
  auto* const shared = reinterpret_cast<SelectShared*>(memory);
  auto* const keys = reinterpret_cast<uint32_t*>(shared + 1);
  const RowShare share = {
      cluster_rank(), cluster_size(), {0, tokens}, part_of_row(tokens, part, cluster_rank())};
  SelectRow<true, Output::kIsPlain, kAlone, Output>(a, sample, share, shared, keys).run(kFloat32);
  cluster_sync();  // what was written can now be read
}

}  // namespace cuda
}  // namespace sma
