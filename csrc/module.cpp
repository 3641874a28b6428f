// The Python module: the only file that knows pybind11. Every function takes addresses (0: none),
// sizes and strides and where to run: on the CPU, with the instruction set that was picked, or on a
// CUDA device. It runs without the interpreter lock.
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "args.h"
#include "cpu/cache.h"
#include "cpu/dlpack.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace py = pybind11;
using namespace sma;

namespace {

using Address = uintptr_t;
using Four = std::array<int64_t, 4>;
using Scratch = std::array<int64_t, 2>;  // address and bytes
using Where = std::array<int64_t, 2>;    // a CUDA device and stream; or -1 and a number of threads

bool on_cpu(const Where& where) { return where[0] < 0; }
int threads_of(const Where& where) { return on_cpu(where) ? static_cast<int>(where[1]) : 0; }

#ifdef SMA_CUDA_ARCHS
#define SMA_CUDA(op) cuda::op
#else
#define SMA_CUDA(op) nullptr
#endif

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Instruction sets that were compiled and that this processor has, the best one last.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> sets = {&kernels_baseline()};
#ifdef SMA_HAVE_X86
  __builtin_cpu_init();
  // every processor with AVX2 has F16C; older compilers do not know its name here
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) sets.push_back(&kernels_avx2());
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    sets.push_back(&kernels_avx512());
#endif
  return sets;
}

std::vector<std::string> cpu_instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* k : runnable()) names.push_back(k->name);
  return names;
}

const Kernels* pick(const std::string& name) {
  std::string names;
  for (const Kernels* k : runnable()) {
    if (name == k->name) return k;
    names += names.empty() ? k->name : std::string(", ") + k->name;
  }
  throw py::value_error("SMA_FAST_CPU_ISA: got '" + name + "', allowed here is " + names);
}

const Kernels*& kernels() {
  static const Kernels* chosen = [] {
    const char* name = std::getenv("SMA_FAST_CPU_ISA");
    return name != nullptr && *name != 0 ? pick(name) : runnable().back();
  }();
  return chosen;
}

std::string set_cpu_isa(const std::string& name) {
  const std::string before = kernels()->name;
  kernels() = pick(name);
  return before;
}

void check_index(const char* name, const int64_t* index, int64_t count, int64_t low, int64_t high) {
  int64_t least = low, most = high - 1;
  for (int64_t i = 0; i < count; ++i) {
    least = index[i] < least ? index[i] : least;
    most = index[i] > most ? index[i] : most;
  }
  if (least >= low && most < high) return;
  throw py::value_error(std::string(name) + ": holds " +
                        std::to_string(least < low ? least : most) + ", allowed is " +
                        std::to_string(low) + " to " + std::to_string(high - 1));
}

void check_counts(const char* name, const int64_t* counts, int64_t count) {
  for (int64_t i = 0; counts != nullptr && i < count; ++i)
    if (counts[i] < 0)
      throw py::value_error(std::string(name) + ": holds " + std::to_string(counts[i]) +
                            ", allowed is at least 0");
}

// Ids of tokens are 32-bit integers inside the kernels, and so are the ends of blocks of them.
void check_length(const char* name, int64_t length) {
  if (length > INT32_MAX - 4096)
    throw py::value_error(std::string(name) + ": got " + std::to_string(length) +
                          " tokens, allowed is below 2^31 - 4096 on the native backend");
}

// Looks at the values of query_index and head_index; heads count only where a query is selected.
template <class Args>
void check_indices(const Args& a) {
  const int64_t *index = a.query_index, *heads = a.head_index;
  for (int64_t b = 0; index != nullptr && b < (a.index_stride == 0 ? 1 : a.batch); ++b)
    check_index("query_index", index + b * a.index_stride, a.selected, -1, a.queries);
  for (int64_t b = 0; heads != nullptr && b < a.batch; ++b)
    for (int64_t r = 0; r < a.selected; ++r)
      if (index == nullptr || index[b * a.index_stride + r] >= 0)
        check_index("head_index", heads + b * a.selected + r, 1, 0, a.heads);
}

void copy(const Four& from, int64_t* to) {
  for (int i = 0; i < 4; ++i) to[i] = from[i];
}

// An uninitialised output as a DLPack capsule; code and bits as DLPack counts types.
struct Output {
  DLManagedTensor managed;
  size_t size;
  std::vector<int64_t> shape;
};

void free_output(DLManagedTensor* managed) {
  Output* output = static_cast<Output*>(managed->manager_ctx);
  give_block(managed->dl_tensor.data, output->size);
  delete output;
}

py::capsule empty_output(const std::vector<int64_t>& shape, int code, int bits) {
  size_t bytes = static_cast<size_t>(bits) / 8;
  for (const int64_t n : shape) bytes *= static_cast<size_t>(n);
  auto output = std::make_unique<Output>(Output{{}, 0, shape});
  DLTensor& t = output->managed.dl_tensor;
  t.data = take_block(bytes, &output->size);
  t.device = {kDLCPU, 0};
  t.ndim = static_cast<int32_t>(shape.size());
  t.dtype = {static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
  t.shape = output->shape.data();
  output->managed.manager_ctx = output.get();
  output->managed.deleter = free_output;
  return py::capsule(&output.release()->managed, "dltensor", [](PyObject* capsule) {
    // a consumer renames the capsule; one nobody took is freed here
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    free_output(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor")));
  });
}

std::string shape(const std::vector<int64_t>& sizes) {
  std::string text;
  for (const int64_t n : sizes) text += (text.empty() ? "(" : ", ") + std::to_string(n);
  return text + ")";
}
std::string shapes(const AttentionScoresArgs& a) {
  return "query " + shape({a.batch, a.heads, a.queries, a.width}) + ", key " +
         shape({a.batch, a.kv_heads, a.tokens, a.width}) + ", of which " +
         std::to_string(a.selected) + " queries are selected";
}
std::string shapes(const SelectTokensArgs& a) { return "scores " + shape({a.batch, a.tokens}); }
std::string shapes(const DrawQueriesArgs& a) {
  return "noise " + shape({a.batch, a.candidates}) + ", of which " + std::to_string(a.num_queries) +
         " are drawn";
}
std::string shapes(const GatherTokensArgs& a) {
  return "tokens " + shape({a.batch, a.tokens}) + " of " + std::to_string(a.row_bytes) +
         " bytes, ids " + shape({a.batch, a.visible});
}
std::string shapes(const GatherTokensBackwardArgs& a) {
  return "grad " + shape({a.batch, a.visible, a.width}) + ", of " + std::to_string(a.tokens) +
         " tokens";
}
std::string shapes(const RestoreTokensArgs& a) {
  return "visible " + shape({a.batch, a.visible}) + " of " + std::to_string(a.row_bytes) +
         " bytes, ids_restore " + shape({a.batch, a.tokens});
}
std::string shapes(const RestoreTokensBackwardArgs& a) {
  return "grad " + shape({a.batch, a.tokens, a.width}) + ", of " + std::to_string(a.visible) +
         " visible tokens";
}
std::string shapes(const SelfGuidedMaskingArgs& a) {
  return shapes(a.attention) + ", " + std::to_string(a.num_gathers) + " tensors of tokens";
}
std::string shapes(const RandomMaskingArgs& a) {
  return "tokens " + shape({a.gather.batch, a.gather.tokens}) + " of " +
         std::to_string(a.gather.row_bytes) + " bytes, of which " +
         std::to_string(a.gather.visible) + " stay";
}
std::string shapes(const BipartitionArgs& a) {
  return "embeddings " + shape({a.batch, a.tokens, a.width});
}

// Runs an op, on a GPU where it has a kernel there, without the interpreter lock.
template <class Args>
struct Op {
  using OnGpu = int (*)(const Args&, const cuda::Place&);
};
template <class Args>
void run(const char* op, void (*on_processor)(const Args&), typename Op<Args>::OnGpu on_gpu,
         const Args& a, const Where& where) {
  int error = 0;
  {
    py::gil_scoped_release release;
    if (on_cpu(where)) return on_processor(a);
    error = on_gpu(a, {static_cast<int>(where[0]), at<void>(static_cast<Address>(where[1]))});
  }
#ifdef SMA_CUDA_ARCHS
  if (error != 0)
    throw std::runtime_error(std::string("sma_fast.") + op + " on CUDA device " +
                             std::to_string(where[0]) + ", " + shapes(a) + ": " +
                             cuda::error_text(error));
#endif
}
template <class Args>
void run(void (*on_processor)(const Args&), const Args& a) {
  py::gil_scoped_release release;
  on_processor(a);
}

std::vector<std::string> cuda_ops() {
#ifdef SMA_CUDA_ARCHS
  return {
      "attention_scores",        "select_tokens",       "draw_queries",           "gather_tokens",
      "restore_tokens",          "self_guided_masking", "gather_tokens_backward", "random_masking",
      "restore_tokens_backward", "bipartition"};
#else
  return {};
#endif
}

AttentionScoresArgs attention_args(Address query, Address key, int dtype, int64_t batch,
                                   int64_t heads, int64_t kv_heads, int64_t queries, int64_t tokens,
                                   int64_t selected, int64_t width, const Four& query_strides,
                                   const Four& key_strides, Address query_index,
                                   int64_t index_stride, Address head_index, Address padding,
                                   double scale, int reduce, Address scores, const Scratch& scratch,
                                   const Where& where) {
  AttentionScoresArgs a = {};
  a.query = at<void>(query);
  a.key = at<void>(key);
  a.dtype = dtype;
  a.batch = batch;
  a.heads = heads;
  a.kv_heads = kv_heads;
  a.queries = queries;
  a.tokens = tokens;
  a.selected = selected;
  a.width = width;
  copy(query_strides, a.query_strides);
  copy(key_strides, a.key_strides);
  a.query_index = at<int64_t>(query_index);
  a.index_stride = index_stride;
  a.head_index = at<int64_t>(head_index);
  a.padding = at<uint8_t>(padding);
  a.scale = static_cast<float>(scale);
  a.reduce = reduce;
  a.scores = at<float>(scores);
  a.scratch = at<void>(static_cast<Address>(scratch[0]));
  a.scratch_bytes = scratch[1];
  a.threads = threads_of(where);
  check_length("key", tokens);
  if (on_cpu(where)) check_indices(a);
  return a;
}

SelectTokensArgs select_args(Address scores, int dtype, Address padding, Address noise,
                             int64_t batch, int64_t tokens, int64_t width_visible,
                             int64_t width_masked, double mask_ratio, Address num_masked_rows,
                             int64_t num_masked, double random_fraction, double pool_ratio,
                             Address mask, Address ids_visible, Address ids_masked,
                             Address ids_restore, Address out_num_visible, Address out_num_masked,
                             const Where& where) {
  SelectTokensArgs a = {};
  a.scores = at<void>(scores);
  a.dtype = dtype;
  a.padding = at<uint8_t>(padding);
  a.noise = at<float>(noise);
  a.batch = batch;
  a.tokens = tokens;
  a.width_visible = width_visible;
  a.width_masked = width_masked;
  a.mask_ratio = mask_ratio;
  a.num_masked_rows = at<int64_t>(num_masked_rows);
  a.num_masked = num_masked;
  a.random_fraction = random_fraction;
  a.pool_ratio = pool_ratio;
  a.mask = at<uint8_t>(mask);
  a.ids_visible = at<int64_t>(ids_visible);
  a.ids_masked = at<int64_t>(ids_masked);
  a.ids_restore = at<int64_t>(ids_restore);
  a.out_num_visible = at<int32_t>(out_num_visible);
  a.out_num_masked = at<int32_t>(out_num_masked);
  a.threads = threads_of(where);
  check_length("scores", tokens);
  if (on_cpu(where)) check_counts("num_masked", a.num_masked_rows, batch);
  if (batch * tokens > 0 && a.noise == nullptr && (random_fraction > 0 || pool_ratio >= 0))
    throw py::value_error("noise: got None, allowed is a tensor where tokens are drawn");
  return a;
}

// One tensor to gather: address; bytes from sample to sample, token to token, of a row, of an
// element and from one element to the next; the output's address.
using Gather = std::array<int64_t, 7>;

GatherTokensArgs gather_args(const Gather& g, int64_t batch, int64_t tokens, int64_t visible,
                             Address ids, const Where& where) {
  GatherTokensArgs a = {};
  a.rows = at<void>(static_cast<Address>(g[0]));
  a.batch_bytes = g[1];
  a.token_bytes = g[2];
  a.row_bytes = g[3];
  a.element_bytes = g[4];
  a.stride_bytes = g[5];
  a.out = at<void>(static_cast<Address>(g[6]));
  a.batch = batch;
  a.tokens = tokens;
  a.visible = visible;
  a.ids = at<int64_t>(ids);
  a.threads = threads_of(where);
  return a;
}

void attention_scores(Address query, Address key, int dtype, int64_t batch, int64_t heads,
                      int64_t kv_heads, int64_t queries, int64_t tokens, int64_t selected,
                      int64_t width, const Four& query_strides, const Four& key_strides,
                      Address query_index, int64_t index_stride, Address head_index,
                      Address padding, double scale, int reduce, Address scores,
                      const Scratch& scratch, const Where& where) {
  const AttentionScoresArgs a =
      attention_args(query, key, dtype, batch, heads, kv_heads, queries, tokens, selected, width,
                     query_strides, key_strides, query_index, index_stride, head_index, padding,
                     scale, reduce, scores, scratch, where);
  run("attention_scores", kernels()->attention_scores, SMA_CUDA(attention_scores), a, where);
}

void aggregate_attention(Address attention, int dtype, int64_t batch, int64_t heads,
                         int64_t queries, int64_t tokens, int64_t selected, const Four& strides,
                         Address query_index, int64_t index_stride, Address head_index, int reduce,
                         bool logits, Address scores, const Where& where) {
  AggregateAttentionArgs a = {};
  a.attention = at<void>(attention);
  a.dtype = dtype;
  a.batch = batch;
  a.heads = heads;
  a.queries = queries;
  a.tokens = tokens;
  a.selected = selected;
  copy(strides, a.strides);
  a.query_index = at<int64_t>(query_index);
  a.index_stride = index_stride;
  a.head_index = at<int64_t>(head_index);
  a.reduce = reduce;
  a.logits = logits;
  a.scores = at<float>(scores);
  a.threads = threads_of(where);
  check_indices(a);
  run(kernels()->aggregate_attention, a);
}

void select_tokens(Address scores, int dtype, Address padding, Address noise, int64_t batch,
                   int64_t tokens, int64_t width_visible, int64_t width_masked, double mask_ratio,
                   Address num_masked_rows, int64_t num_masked, double random_fraction,
                   double pool_ratio, Address mask, Address ids_visible, Address ids_masked,
                   Address ids_restore, Address out_num_visible, Address out_num_masked,
                   const Where& where) {
  const SelectTokensArgs a =
      select_args(scores, dtype, padding, noise, batch, tokens, width_visible, width_masked,
                  mask_ratio, num_masked_rows, num_masked, random_fraction, pool_ratio, mask,
                  ids_visible, ids_masked, ids_restore, out_num_visible, out_num_masked, where);
  run("select_tokens", kernels()->select_tokens, SMA_CUDA(select_tokens), a, where);
}

void draw_queries(Address noise, Address padding, Address num_queries_rows, int64_t batch,
                  int64_t candidates, int64_t num_queries, Address query_index,
                  const Where& where) {
  DrawQueriesArgs a = {};
  a.noise = at<float>(noise);
  a.padding = at<uint8_t>(padding);
  a.num_queries_rows = at<int64_t>(num_queries_rows);
  a.batch = batch;
  a.candidates = candidates;
  a.num_queries = num_queries;
  a.query_index = at<int64_t>(query_index);
  a.threads = threads_of(where);
  check_length("noise", candidates);
  if (on_cpu(where)) check_counts("num_queries", a.num_queries_rows, batch);
  run("draw_queries", kernels()->draw_queries, SMA_CUDA(draw_queries), a, where);
}

void gather_tokens(const Gather& gather, int64_t batch, int64_t tokens, int64_t visible,
                   Address ids, const Where& where) {
  const GatherTokensArgs a = gather_args(gather, batch, tokens, visible, ids, where);
  if (on_cpu(where)) check_index("ids", a.ids, batch * visible, -1, tokens);
  else check_length("tokens", tokens > visible ? tokens : visible);
  run("gather_tokens", kernels()->gather_tokens, SMA_CUDA(gather_tokens), a, where);
}

void gather_tokens_backward(Address grad, int dtype, int64_t batch, int64_t visible, int64_t tokens,
                            int64_t width, Address ids, Address out, const Where& where) {
  GatherTokensBackwardArgs a = {};
  a.grad = at<void>(grad);
  a.dtype = dtype;
  a.batch = batch;
  a.visible = visible;
  a.tokens = tokens;
  a.width = width;
  a.ids = at<int64_t>(ids);
  a.out = at<void>(out);
  a.threads = threads_of(where);
  check_length("grad", tokens > visible ? tokens : visible);
  if (on_cpu(where)) check_index("ids", a.ids, batch * visible, -1, tokens);
  run("gather_tokens_backward", kernels()->gather_tokens_backward, SMA_CUDA(gather_tokens_backward),
      a, where);
}

void restore_tokens(Address visible, int64_t visible_batch_bytes, int64_t visible_token_bytes,
                    Address fill, int64_t fill_batch_bytes, int64_t fill_token_bytes,
                    int64_t row_bytes, int64_t batch, int64_t visible_count, int64_t fill_count,
                    int64_t tokens, Address ids_restore, Address out, const Where& where) {
  RestoreTokensArgs a = {};
  a.visible_rows = at<void>(visible);
  a.fill_rows = at<void>(fill);
  a.visible_batch_bytes = visible_batch_bytes;
  a.visible_token_bytes = visible_token_bytes;
  a.fill_batch_bytes = fill_batch_bytes;
  a.fill_token_bytes = fill_token_bytes;
  a.row_bytes = row_bytes;
  a.batch = batch;
  a.visible = visible_count;
  a.fill = fill_count;
  a.tokens = tokens;
  a.ids_restore = at<int64_t>(ids_restore);
  a.out = at<void>(out);
  a.threads = threads_of(where);
  if (on_cpu(where))
    check_index("ids_restore", a.ids_restore, batch * tokens, -1, visible_count + fill_count);
  else
    check_length("visible, fill",
                 tokens > visible_count + fill_count ? tokens : visible_count + fill_count);
  run("restore_tokens", kernels()->restore_tokens, SMA_CUDA(restore_tokens), a, where);
}

void restore_tokens_backward(Address grad, int dtype, int64_t batch, int64_t tokens,
                             int64_t visible_count, int64_t fill_count, int64_t width,
                             bool shared_fill, Address ids_restore, Address grad_visible,
                             Address grad_fill, const Scratch& scratch, const Where& where) {
  RestoreTokensBackwardArgs a = {};
  a.grad = at<void>(grad);
  a.dtype = dtype;
  a.batch = batch;
  a.tokens = tokens;
  a.visible = visible_count;
  a.fill = fill_count;
  a.width = width;
  a.shared_fill = shared_fill;
  a.ids_restore = at<int64_t>(ids_restore);
  a.grad_visible = at<void>(grad_visible);
  a.grad_fill = at<void>(grad_fill);
  a.scratch = at<void>(static_cast<Address>(scratch[0]));
  a.scratch_bytes = scratch[1];
  a.threads = threads_of(where);
  check_length("grad", tokens > visible_count + fill_count ? tokens : visible_count + fill_count);
  if (on_cpu(where))
    check_index("ids_restore", a.ids_restore, batch * tokens, -1, visible_count + fill_count);
  run("restore_tokens_backward", kernels()->restore_tokens_backward,
      SMA_CUDA(restore_tokens_backward), a, where);
}

void self_guided_masking(Address query, Address key, int dtype, int64_t batch, int64_t heads,
                         int64_t kv_heads, int64_t queries, int64_t tokens, int64_t selected,
                         int64_t width, const Four& query_strides, const Four& key_strides,
                         Address query_index, int64_t index_stride, Address head_index,
                         Address padding, double scale, int reduce, Address scores,
                         const Scratch& scratch, Address noise, int64_t width_visible,
                         int64_t width_masked, double mask_ratio, bool mask_queries,
                         double random_fraction, double pool_ratio, Address mask,
                         Address ids_visible, Address ids_masked, Address ids_restore,
                         Address out_num_visible, Address out_num_masked,
                         const std::vector<Gather>& gathers, const Where& where) {
  SelfGuidedMaskingArgs a = {};
  a.attention = attention_args(query, key, dtype, batch, heads, kv_heads, queries, tokens, selected,
                               width, query_strides, key_strides, query_index, index_stride,
                               head_index, padding, scale, reduce, scores, scratch, where);
  a.select =
      select_args(scores, kFloat32, padding, noise, batch, tokens, width_visible, width_masked,
                  mask_ratio, 0, 0, random_fraction, pool_ratio, mask, ids_visible, ids_masked,
                  ids_restore, out_num_visible, out_num_masked, where);
  if (reduce == kNone) throw py::value_error("head_reduce: got 'none', allowed is 'mean' or 'sum'");
  if (mask_queries) {
    if (queries != tokens)
      throw py::value_error("mask_queries: got True, allowed where queries and keys are as many");
    a.select.drawn = a.attention.query_index;
    a.select.drawn_width = selected;
    a.select.drawn_stride = index_stride;
  }
  if (gathers.size() > kMaxTokenTensors)
    throw py::value_error("tokens: got " + std::to_string(gathers.size()) +
                          " tensors, allowed is at most " + std::to_string(kMaxTokenTensors));
  a.num_gathers = static_cast<int>(gathers.size());
  for (int i = 0; i < a.num_gathers; ++i)
    a.gathers[i] = gather_args(gathers[i], batch, tokens, width_visible, ids_visible, where);
  run("self_guided_masking", kernels()->self_guided_masking, SMA_CUDA(self_guided_masking), a,
      where);
}

void random_masking(const Gather& gather, Address noise, int64_t batch, int64_t tokens,
                    int64_t visible, Address ids_visible, Address mask, Address ids_restore,
                    const Where& where) {
  RandomMaskingArgs a = {};
  a.gather = gather_args(gather, batch, tokens, visible, ids_visible, where);
  a.noise = at<float>(noise);
  a.ids_visible = at<int64_t>(ids_visible);
  a.mask = at<float>(mask);
  a.ids_restore = at<int64_t>(ids_restore);
  check_length("tokens", tokens);
  run("random_masking", kernels()->random_masking, SMA_CUDA(random_masking), a, where);
}

void bipartition(Address embeddings, int dtype, int64_t batch, int64_t tokens, int64_t width,
                 const std::array<int64_t, 3>& strides, Address padding, int method,
                 int64_t iterations, double tol, Address vector, Address labels, Address ids,
                 Address eigenvalue, Address converged, const Where& where) {
  BipartitionArgs a = {};
  a.embeddings = at<void>(embeddings);
  a.dtype = dtype;
  a.batch = batch;
  a.tokens = tokens;
  a.width = width;
  for (int i = 0; i < 3; ++i) a.strides[i] = strides[i];
  a.padding = at<uint8_t>(padding);
  a.method = method;
  a.iterations = iterations;
  a.tol = tol;
  a.vector = at<float>(vector);
  a.labels = at<uint8_t>(labels);
  a.ids = at<int64_t>(ids);
  a.eigenvalue = at<float>(eigenvalue);
  a.converged = at<uint8_t>(converged);
  a.threads = threads_of(where);
  uint8_t not_finite = 0;
  a.not_finite = &not_finite;
  check_length("embeddings", tokens);
  run("bipartition", kernels()->bipartition, SMA_CUDA(bipartition), a, where);
  if (not_finite)
    throw py::value_error("embeddings: holds NaN or infinity, allowed are finite numbers");
}

void informed_scores(Address embeddings, int dtype, int64_t batch, int64_t tokens, int64_t width,
                     const std::array<int64_t, 2>& strides, Address labels, Address padding,
                     int cluster, Address scores, const Where& where) {
  InformedScoresArgs a = {};
  a.embeddings = at<void>(embeddings);
  a.dtype = dtype;
  a.batch = batch;
  a.tokens = tokens;
  a.width = width;
  for (int i = 0; i < 2; ++i) a.strides[i] = strides[i];
  a.labels = at<uint8_t>(labels);
  a.padding = at<uint8_t>(padding);
  a.cluster = cluster;
  a.scores = at<float>(scores);
  a.threads = threads_of(where);
  uint8_t not_finite = 0;
  a.not_finite = &not_finite;
  run(kernels()->informed_scores, a);
  if (not_finite)
    throw py::value_error("embeddings: holds NaN or infinity, allowed are finite numbers");
}

py::dict build_info() {
  py::dict info;
  info["CPU instruction set"] = kernels()->name;
  std::string names;
  for (const Kernels* k : runnable()) names += (names.empty() ? "" : ", ") + std::string(k->name);
  info["CPU instruction sets here"] = names;
#ifdef SMA_CUDA_ARCHS
  info["CUDA architectures built"] = SMA_CUDA_ARCHS;
#else
  info["CUDA architectures built"] = "none";
#endif
#ifdef _OPENMP
  info["OpenMP"] = _OPENMP;
#else
  info["OpenMP"] = "not built in";
#endif
  info["output cache"] = std::to_string(cache_limit() >> 20) + " MiB";
  return info;
}

void read_cache_limit() {
  const char* text = std::getenv("SMA_FAST_CACHE_MB");
  if (text == nullptr || *text == 0) return;
  const std::string given = text;
  if (given.size() > 7 || given.find_first_not_of("0123456789") != std::string::npos)
    throw py::value_error("SMA_FAST_CACHE_MB: got '" + given + "', allowed is a number of MiB");
  set_cache_limit(std::stoull(given) << 20);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of sma_fast; called through sma_fast._native.";
  kernels();  // an SMA_FAST_CPU_ISA that cannot run here is an error at import
  read_cache_limit();
  m.def("build_info", &build_info);
  m.def("cpu_instruction_sets", &cpu_instruction_sets);
  m.def("set_cpu_isa", &set_cpu_isa);
  m.def("empty_output", &empty_output);
  m.attr("most_gathers") = kMaxTokenTensors;
  m.def("attention_scores", &attention_scores);
  m.def("aggregate_attention", &aggregate_attention);
  m.def("select_tokens", &select_tokens);
  m.def("draw_queries", &draw_queries);
  m.def("gather_tokens", &gather_tokens);
  m.def("gather_tokens_backward", &gather_tokens_backward);
  m.def("restore_tokens", &restore_tokens);
  m.def("restore_tokens_backward", &restore_tokens_backward);
  m.def("self_guided_masking", &self_guided_masking);
  m.def("random_masking", &random_masking);
  m.def("bipartition", &bipartition);
  m.def("informed_scores", &informed_scores);
  m.attr("cuda_ops") = cuda_ops();
}
