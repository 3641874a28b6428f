// select_tokens: which tokens of each row are masked, and where every token is found again.
//
// The k largest of a row are found without sorting: scores become integers in the same order, a
// bisection over the integers counts how many lie above the middle (kLanes at a time) and keeps
// only the candidates that are still in doubt. One ordered sweep over the row then writes the ids.
// Long rows are sampled first and shared among threads.
#pragma once
#include "cpu/vec.h"

namespace sma {
namespace SMA_ISA {

struct Bounds {
  int32_t low, high;
};

inline Bounds bounds(const int32_t* keys, int64_t count) {  // count > 0
  const int64_t whole = count / kLanes * kLanes;
  Bounds b = {keys[0], keys[0]};
  if (whole > 0) {
    Vi low = load<Vi>(keys), high = low;
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Vi k = load<Vi>(keys + i);
      low = k < low ? k : low;
      high = k > high ? k : high;
    }
    for (int j = 0; j < kLanes; ++j) {
      b.low = smaller<int32_t>(b.low, low[j]);
      b.high = larger<int32_t>(b.high, high[j]);
    }
  }
  for (int64_t i = whole; i < count; ++i) {
    b.low = smaller(b.low, keys[i]);
    b.high = larger(b.high, keys[i]);
  }
  return b;
}

inline int64_t count_above(const int32_t* keys, int64_t count, int32_t pivot) {
  const Vi p = splat(pivot);
  int64_t total = 0, i = 0;
  while (i + kLanes <= count) {
    const int64_t stop = smaller(count, i + (int64_t{1} << 24));  // a lane counts to 2^24 at most
    Vi sum{};
    for (; i + kLanes <= stop; i += kLanes) sum -= load<Vi>(keys + i) > p;
    for (int j = 0; j < kLanes; ++j) total += sum[j];
    if (stop == count) break;
  }
  for (; i < count; ++i) total += keys[i] > pivot;
  return total;
}

// Keeps the keys in the range, in any order; `out` may be `keys`. Returns how many, and adds to
// `above` how many lie higher.
inline int64_t keep_between(const int32_t* keys, int64_t count, Bounds range, int32_t* out,
                            int64_t* above) {
  int64_t kept = 0, i = 0, higher = 0;
#if defined(__AVX512F__)
  const __m512i lo = _mm512_set1_epi32(range.low), hi = _mm512_set1_epi32(range.high);
  for (; i + 16 <= count; i += 16) {
    const __m512i k = _mm512_loadu_si512(keys + i);
    const __mmask16 over = _mm512_cmpgt_epi32_mask(k, hi);
    const __mmask16 in = _mm512_cmpge_epi32_mask(k, lo) & static_cast<__mmask16>(~over);
    higher += __builtin_popcount(over);
    _mm512_storeu_si512(out + kept, _mm512_maskz_compress_epi32(in, k));
    kept += __builtin_popcount(in);
  }
#endif
  for (; i < count; ++i) {
    const int32_t k = keys[i];
    out[kept] = k;
    kept += (k >= range.low) & (k <= range.high);
    higher += k > range.high;
  }
  *above += higher;
  return kept;
}

// The k-th largest key, how many keys equal it, and how many of those belong to the k largest.
struct Threshold {
  int32_t key;
  int64_t equal, wanted;
};

// What bisection still has to look at: the k-th largest lies within `range`, `above` keys lie
// higher and `from_low` keys lie in it or higher. `keys` holds all of the range and perhaps others,
// but `left_out` of those above are not in it.
struct InDoubt {
  Bounds range;
  int64_t above, from_low;
  const int32_t* keys;
  int64_t count, left_out;
};

inline Threshold bisect(InDoubt d, int64_t k, int32_t* work) {
  while (d.range.low < d.range.high) {
    const int32_t middle =
        static_cast<int32_t>((static_cast<int64_t>(d.range.low) + d.range.high) >> 1);
    const int64_t higher = d.left_out + count_above(d.keys, d.count, middle);
    if (higher >= k) {
      d.range.low = middle + 1;
      d.from_low = higher;
    } else {
      d.range.high = middle;
      d.above = higher;
    }
    if (2 * (d.from_low - d.above) <= d.count) {
      int64_t dropped = 0;
      d.count = keep_between(d.keys, d.count, d.range, work, &dropped);
      d.keys = work;
      d.left_out = d.above;
    }
  }
  return {d.range.low, d.from_low - d.above, k - d.above};
}

// 0 < k <= count. `work` holds count + kLanes keys.
inline Threshold kth_largest(const int32_t* keys, int64_t count, int64_t k, int32_t* work) {
  return bisect({bounds(keys, count), 0, count, keys, count, 0}, k, work);
}

constexpr int64_t kRankedRow = 48;  // up to here comparing all pairs is faster than bisection

// The same as flag_largest, by counting for each key how many stand before it. `keys` and `flags`
// have room for kLanes more.
inline void flag_by_rank(int32_t* keys, int64_t count, int64_t k, uint8_t* flags) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vi mine = load<Vi>(keys + i), place = iota() + static_cast<int32_t>(i);
    Vi rank{};
    for (int64_t j = 0; j < i; ++j) rank -= splat(keys[j]) >= mine;
    for (int64_t j = i; j < smaller(i + kLanes, count); ++j)
      rank -= (splat(keys[j]) > mine) |
              ((splat(keys[j]) == mine) & (splat(static_cast<int32_t>(j)) < place));
    for (int64_t j = i + kLanes; j < count; ++j) rank -= splat(keys[j]) > mine;
    const Vi chosen = rank < splat(static_cast<int32_t>(k));
    for (int j = 0; j < kLanes; ++j) flags[i + j] = static_cast<uint8_t>(chosen[j] & 1);
  }
}

// flags[i] = 1 for the keys above the threshold and for the first `wanted` that equal it, less
// which `wanted` is left.
inline void flag_above(const int32_t* keys, int64_t count, const Threshold& t, int64_t* wanted,
                       uint8_t* flags) {
  if (t.equal == t.wanted) {  // no key that equals it is left out
    for (int64_t i = 0; i < count; ++i) flags[i] = keys[i] >= t.key;
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const bool tie = keys[i] == t.key && *wanted > 0;
    *wanted -= tie;
    flags[i] = (keys[i] > t.key) | tie;
  }
}

// flags[i] = 1 for the k largest keys, ties to the lowest index, else 0. Arrays have room for
// kLanes more.
inline void flag_largest(int32_t* keys, int64_t count, int64_t k, int32_t* work, uint8_t* flags) {
  if (k <= 0 || k >= count) {
    memset(flags, k <= 0 ? 0 : 1, count);
    return;
  }
  if (count <= kRankedRow) return flag_by_rank(keys, count, k, flags);
  const Threshold t = kth_largest(keys, count, k, work);
  int64_t wanted = t.wanted;
  flag_above(keys, count, t, &wanted, flags);
}

inline void ordered_keys(const float* values, const int32_t* index, Range range, float sign,
                         int32_t* keys) {
  int64_t i = range.begin;
  if (index == nullptr)
    for (; i + kLanes <= range.end; i += kLanes)
      store(keys + i, ordered(load<Vf>(values + i) * sign));
  for (; i < range.end; ++i) keys[i] = ordered(values[index == nullptr ? i : index[i]] * sign);
}

inline int64_t round_half_even(double x) { return static_cast<int64_t>(__builtin_rint(x)); }

// A row in work: which tokens count, how many of them are masked. Of a long row also between which
// keys the threshold is looked for, and what it is: key 0 of 0 wanted until it is found.
struct SelectRow {
  int64_t valid, masked;
  const int32_t* index;  // of the valid tokens, or null: the first ones
  Bounds near;
  Threshold threshold;
};

// Scratch for rows of `tokens`: the row, keys, work, indices, two rows of flags.
struct SelectScratch {
  SelectRow* row;
  int32_t *keys, *work, *index, *rest;
  uint8_t *flags, *more;

  static_assert(sizeof(SelectRow) <= 16 * sizeof(int32_t), "the row must fit before the keys");
  static int64_t size(int64_t tokens) { return 16 + 5 * (tokens + 2 * kLanes); }
  SelectScratch(int32_t* base, int64_t tokens) {
    const int64_t step = tokens + 2 * kLanes;
    row = reinterpret_cast<SelectRow*>(base);
    keys = base + 16;
    work = keys + step;
    index = work + step;
    rest = index + step;
    flags = reinterpret_cast<uint8_t*>(rest + step);
    more = flags + step;
  }
};

// Second choice: among the tokens whose flag is `from`, the `count` of lowest noise become masked;
// a token keeps flag 1 if it had it and `from` is 0. index: as in select_row.
inline void flag_drawn(const float* noise, const int32_t* index, int64_t valid, uint8_t from,
                       int64_t count, const SelectScratch& s) {
  int64_t eligible = 0;
  for (int64_t i = 0; i < valid; ++i) {
    s.rest[eligible] = static_cast<int32_t>(i);
    s.keys[eligible] = ordered(-noise[index == nullptr ? i : index[i]]);
    eligible += s.flags[i] == from;
  }
  flag_largest(s.keys, eligible, count, s.work, s.more);
  for (int64_t i = 0; i < eligible; ++i) s.flags[s.rest[i]] = s.more[i];
}

#if defined(__AVX512F__)
// Sixteen tokens of the ordered sweep: the ids of each kind go behind those before, in order.
inline void sweep_16(const uint8_t* flags, int64_t first, uint8_t* mask, int64_t* restore,
                     int64_t** to, int64_t* place) {
  const __m128i flag = _mm_loadu_si128(reinterpret_cast<const __m128i*>(flags));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(mask), flag);
  const unsigned masked = _mm_test_epi8_mask(flag, flag);
  const __m512i step = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  for (int half = 0; half < 2; ++half) {
    const __mmask8 is_masked = static_cast<__mmask8>(masked >> (8 * half));
    const __mmask8 kind[2] = {static_cast<__mmask8>(~is_masked), is_masked};
    const __m512i token = _mm512_add_epi64(_mm512_set1_epi64(first + 8 * half), step);
    __m512i where = _mm512_setzero_si512();
    for (int i = 0; i < 2; ++i) {
      const int count = __builtin_popcount(kind[i]);
      const __mmask8 front = static_cast<__mmask8>((1u << count) - 1);
      _mm512_mask_storeu_epi64(to[i], front, _mm512_maskz_compress_epi64(kind[i], token));
      const __m512i places = _mm512_add_epi64(_mm512_set1_epi64(place[i]), step);
      where = _mm512_mask_expand_epi64(where, kind[i], places);
      to[i] += count;
      place[i] += count;
    }
    _mm512_storeu_si512(restore + 8 * half, where);
  }
}
#endif

inline void prepare_row(const SelectTokensArgs& a, int64_t b, const SelectScratch& s) {
  const ValidTokens tokens(a.padding == nullptr ? nullptr : a.padding + b * a.tokens, a.tokens,
                           s.index);
  int64_t k = a.num_masked;
  if (a.mask_ratio >= 0)  // a ratio just below 1 could leave a short row more visible than V
    k = larger(round_half_even(a.mask_ratio * static_cast<double>(tokens.count)),
               tokens.count - a.width_visible);
  else if (a.num_masked_rows != nullptr) k = smaller(a.num_masked_rows[b], a.width_masked);
  *s.row = {tokens.count, smaller(k, tokens.count), tokens.index, {}, {}};
  for (int64_t n = tokens.index == nullptr ? tokens.count : 0; n < a.tokens; ++n) {  // padding
    a.mask[b * a.tokens + n] = 0;
    a.ids_restore[b * a.tokens + n] = -1;
  }
}

// Sets the row's flags from its keys.
inline void choose_row(const SelectTokensArgs& a, int64_t b, const SelectScratch& s) {
  const float* noise = a.noise == nullptr ? nullptr : a.noise + b * a.tokens;
  const int64_t valid = s.row->valid, k = s.row->masked;
  const int32_t* index = s.row->index;
  if (a.drawn != nullptr) {
    // masked before all others: their keys become that of +inf
    uint8_t* first = s.flags;  // over all tokens
    memset(first, 0, a.tokens);
    const int64_t* drawn = a.drawn + b * a.drawn_width;
    for (int64_t r = 0; r < a.drawn_width; ++r)
      if (drawn[r] >= 0) first[drawn[r]] = 1;
    const int32_t top = ordered(kInfinity);
    for (int64_t i = 0; i < valid; ++i)
      if (first[index == nullptr ? i : index[i]]) s.keys[i] = top;
  }
  if (a.pool_ratio >= 0) {
    const int64_t pool = larger(k, round_half_even(a.pool_ratio * static_cast<double>(valid)));
    flag_largest(s.keys, valid, pool, s.work, s.flags);
    flag_drawn(noise, index, valid, 1, k, s);
  } else if (a.random_fraction > 0) {
    const int64_t top = round_half_even((1.0 - a.random_fraction) * static_cast<double>(k));
    flag_largest(s.keys, valid, top, s.work, s.flags);
    flag_drawn(noise, index, valid, 0, k - top, s);
  } else {
    flag_largest(s.keys, valid, k, s.work, s.flags);
  }
}

// The ordered sweep: writes mask and ids of tokens in order, of which `first` valid ones and
// `masked` of those come before.
class Sweep {
 public:
  Sweep(const SelectTokensArgs& a, int64_t b, int64_t first, int64_t masked)
      : a(a),
        b(b),
        to{a.ids_visible + b * a.width_visible + (first - masked),
           a.ids_masked + b * a.width_masked + masked},
        place{first - masked, a.width_visible + masked} {}

  // Valid tokens of the range; `flags` begins with the first of them. index: as in SelectRow.
  void write(const uint8_t* flags, const int32_t* index, Range range) {
    uint8_t* mask = a.mask + b * a.tokens;
    int64_t* restore = a.ids_restore + b * a.tokens;
    int64_t i = range.begin;
#if defined(__AVX512F__)
    if (index == nullptr)
      for (; i + 16 <= range.end; i += 16)
        sweep_16(flags + (i - range.begin), i, mask + i, restore + i, to, place);
#endif
    for (; i < range.end; ++i) {
      const int64_t n = index == nullptr ? i : index[i];
      const int flag = flags[i - range.begin];
      mask[n] = static_cast<uint8_t>(flag);
      restore[n] = place[flag]++;
      *to[flag]++ = n;
    }
  }

  // After the row's last token: its numbers, and -1 behind its ids.
  void finish() {
    int64_t* const visible = a.ids_visible + b * a.width_visible;
    int64_t* const masked = a.ids_masked + b * a.width_masked;
    a.out_num_visible[b] = static_cast<int32_t>(to[0] - visible);
    a.out_num_masked[b] = static_cast<int32_t>(to[1] - masked);
    for (; to[0] < visible + a.width_visible; ++to[0]) *to[0] = -1;
    for (; to[1] < masked + a.width_masked; ++to[1]) *to[1] = -1;
  }

 private:
  const SelectTokensArgs& a;
  const int64_t b;
  int64_t* to[2];    // the next visible and the next masked id
  int64_t place[2];  // their places in cat([visible, masked])
};

// Long rows. Their threads take a part each, block by block, so that keys stay in L1 and only those
// near the threshold are written down. Where that is, every so many keys tell, almost always.
constexpr int64_t kSample = 4096;
constexpr int64_t kMargin = 128;  // four standard deviations of a rank in the sample
constexpr int64_t kLongRow = 4 * kSample;
constexpr int64_t kKeyBlock = 1024;

// What a thread found in its part: keys above `near`, keys in it, keys above and at the threshold.
struct LongPart {
  int64_t above, kept, higher, equal;
};

inline bool is_long(const SelectTokensArgs& a, const SelectRow& row) {
  return row.index == nullptr && row.valid >= kLongRow && row.masked > 0 &&
         row.masked < row.valid && a.drawn == nullptr && a.pool_ratio < 0 && a.random_fraction <= 0;
}

// Calls body(keys, range) for blocks of the range.
template <class Body>
void for_key_blocks(const float* scores, Range range, const Body& body) {
  int32_t keys[kKeyBlock];
  for (int64_t begin = range.begin; begin < range.end; begin += kKeyBlock) {
    const Range block = {begin, smaller(begin + kKeyBlock, range.end)};
    ordered_keys(scores + begin, nullptr, {0, block.end - begin}, 1.0f, keys);
    body(keys, block);
  }
}

// Keys between which the threshold is, almost always: the first thread finds the upper one, the
// last thread the lower one.
inline void guess_bounds(const float* scores, const SelectScratch& s, const Team& team) {
  const int64_t valid = s.row->valid, middle = s.row->masked * kSample / valid;
  const auto sampled = [&](int64_t rank, int32_t* sample) {
    for (int64_t i = 0; i < kSample; ++i) sample[i] = ordered(scores[i * valid / kSample]);
    return kth_largest(sample, kSample, rank, sample + kSample).key;
  };
  if (team.id == 0)
    s.row->near.high = middle > kMargin ? sampled(middle - kMargin, s.keys) : INT32_MAX;
  if (team.id == team.size - 1)
    s.row->near.low = middle + kMargin <= kSample ? sampled(middle + kMargin, s.work) : INT32_MIN;
}

// Finds the threshold among the keys that the threads kept; where it is none of them, all are
// looked at next.
inline void join_parts(const LongPart* parts, const SelectScratch& s, const Team& team) {
  SelectRow* row = s.row;
  int64_t above = 0, kept = 0;
  for (int t = 0; t < team.size; ++t) {
    const Range part = share(row->valid, {t, team.size});
    memcpy(s.rest + kept, s.keys + 2 * part.begin, parts[t].kept * sizeof(int32_t));
    above += parts[t].above;
    kept += parts[t].kept;
  }
  if (above < row->masked && row->masked <= above + kept)
    row->threshold =
        bisect({row->near, above, above + kept, s.rest, kept, above}, row->masked, s.rest);
  else row->near = {INT32_MIN, INT32_MAX};
}

inline void select_long_row(const SelectTokensArgs& a, int64_t b, const float* scores,
                            const SelectScratch& s, const Team& team) {
  SelectRow* row = s.row;
  const Range mine = share(row->valid, team);
  int32_t* const kept = s.keys + 2 * mine.begin;  // keys and work lie one behind the other
  LongPart* const parts = reinterpret_cast<LongPart*>(s.index);  // not needed for indices
  LongPart part;
  guess_bounds(scores, s, team);
  team.wait();
  for (const Threshold* t = &row->threshold; t->wanted == 0;) {
    part = {};
    for_key_blocks(scores, mine, [&](const int32_t* keys, Range block) {
      part.kept +=
          keep_between(keys, block.end - block.begin, row->near, kept + part.kept, &part.above);
    });
    parts[team.id] = part;
    team.wait();
    if (team.id == 0) join_parts(parts, s, team);
    team.wait();
  }
  const Threshold t = row->threshold;
  part.higher = part.above + count_above(kept, part.kept, t.key);
  part.equal = part.above + count_above(kept, part.kept, t.key - 1) - part.higher;
  parts[team.id] = part;
  team.wait();
  int64_t masked = 0, equal = 0;
  for (int other = 0; other < team.id; ++other) {
    masked += parts[other].higher;
    equal += parts[other].equal;
  }
  int64_t wanted = larger<int64_t>(0, t.wanted - equal);
  Sweep sweep(a, b, mine.begin, masked + t.wanted - wanted);
  for_key_blocks(scores, mine, [&](const int32_t* keys, Range block) {
    uint8_t flags[kKeyBlock];
    flag_above(keys, block.end - block.begin, t, &wanted, flags);
    sweep.write(flags, nullptr, block);
  });
  if (team.id == team.size - 1) sweep.finish();
}

inline void select_short_row(const SelectTokensArgs& a, int64_t b, const float* scores,
                             const SelectScratch& s, const Team& team) {
  const SelectRow& row = *s.row;
  const Range mine = share(row.valid, team);
  ordered_keys(scores, row.index, mine, 1.0f, s.keys);
  team.wait();
  if (team.id == 0) choose_row(a, b, s);
  team.wait();
  int64_t masked = 0;
  for (int64_t i = 0; i < mine.begin; ++i) masked += s.flags[i];
  Sweep sweep(a, b, mine.begin, masked);
  sweep.write(s.flags + mine.begin, row.index, mine);
  if (team.id == team.size - 1) sweep.finish();
}

// Selects row b from `scores`. Every thread of the team calls it, with the same scratch.
inline void select_row(const SelectTokensArgs& a, int64_t b, const float* scores,
                       const SelectScratch& s, const Team& team) {
  if (team.id == 0) prepare_row(a, b, s);
  team.wait();
  if (is_long(a, *s.row)) select_long_row(a, b, scores, s, team);
  else select_short_row(a, b, scores, s, team);
  team.wait();
}

constexpr int64_t kSharedRow = int64_t{1} << 18;  // work of a row from which threads share it

// Calls body(b, scratch, team) for every row of `tokens`: a row for each thread, or all threads on
// one row where there are fewer rows than threads and a row is long.
template <class Body>
void for_each_row(int64_t batch, int64_t tokens, int64_t work, int threads, const Body& body) {
  threads = threads_for(work, threads);
  const bool together = threads > 1 && batch < threads && work >= batch * kSharedRow;
  const int64_t size = round_up(SelectScratch::size(tokens), 16);
  const Scratch<int32_t> scratch(size * (together ? 1 : threads));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int id = omp_get_thread_num();
    const SelectScratch s(scratch.get() + (together ? 0 : id * size), tokens);
    if (together) {
      for (int64_t b = 0; b < batch; ++b) body(b, s, Team{id, omp_get_num_threads()});
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t b = 0; b < batch; ++b) body(b, s, Team{0, 1});
    }
    fence();
  }
}

inline void select_tokens(const SelectTokensArgs& a) {
  for_each_row(a.batch, a.tokens, a.batch * a.tokens * 4, a.threads,
               [&](int64_t b, const SelectScratch& s, const Team& team) {
                 select_row(a, b, a.scores + b * a.tokens, s, team);
               });
}

}  // namespace SMA_ISA
}  // namespace sma
