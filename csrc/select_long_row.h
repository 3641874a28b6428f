// Long rows, selected by several threads. They take a part each, block by block, so that keys stay
// in L1 and only those near the threshold are written down. Where that is, every so many keys tell,
// almost always.
#pragma once
#include "select_row.h"

namespace sma {
namespace SMA_ISA {

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

}  // namespace SMA_ISA
}  // namespace sma
