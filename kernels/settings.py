"""Triton's launch settings, for each op and, where it matters, each class of size: plain data.

An entry is a tuple of classes: the first whose "up_to" reaches the size at hand is taken, and the
last where none does. DEFAULT is set by hand. MEASURED, by architecture, comes before it there and
is written by `python -m bench.tune --write` on that GPU; MEASURED_ON says when and with what.
Nothing is tuned in a user's program.
"""

# by the tokens of a row, which one program holds in registers: more warps sort sooner, but wait
# longer for each other; longer rows than the last class go to the op's ".long"
_IN_REGISTERS = (
    {"up_to": 256, "num_warps": 1},
    {"up_to": 512, "num_warps": 2},
    {"up_to": 1024, "num_warps": 4},
    {"up_to": 2048, "num_warps": 8},
    {"up_to": 4096, "num_warps": 16},
)

# by the bytes of a number: more elements in a program keep more loads in flight, fewer spread small
# inputs over more multiprocessors; `width` is the most columns, the rest of the elements are rows
_COPIED = (
    {"up_to": 2, "elements": 2048, "width": 1024, "num_warps": 4},
    {"up_to": 8, "elements": 2048, "width": 1024, "num_warps": 4},
)

DEFAULT = {
    # a longer block has fewer programs to start, a shorter one has more of them at work
    "aggregate_attention": ({"up_to": None, "block": 1024, "num_warps": 4},),
    # by the tokens of a row of logits, whose softmax is taken in registers: as _IN_REGISTERS
    "aggregate_attention.logits": (
        {"up_to": 1024, "num_warps": 4},
        {"up_to": 2048, "num_warps": 8},
        {"up_to": 4096, "num_warps": 16},
    ),
    # longer rows of logits, read three times: a block's maximum and sum cost less where it is long
    "aggregate_attention.long": ({"up_to": None, "block": 1024, "num_warps": 4},),
    # by the keys of a head, read once: more rows of queries at a time reuse the keys more, and take
    # registers; of more bytes of keys than `most_bytes` fewer blocks fit than hide the loads
    "attention_scores": (
        {"up_to": 512, "rows": 16, "most_bytes": 65536, "num_warps": 4, "num_stages": 1},
        {"up_to": 1024, "rows": 16, "most_bytes": 65536, "num_warps": 8, "num_stages": 3},
    ),
    # more keys are read in parts; by the blocks that a key's features are read in: larger blocks of
    # keys and rows read less and take registers and shared memory; a stage more hides more of the
    # loads and takes as much again
    "attention_scores.row_statistics": (
        {"up_to": 1, "tokens": 64, "rows": 64, "num_warps": 8, "num_stages": 3},
        {"up_to": None, "tokens": 32, "rows": 16, "num_warps": 8, "num_stages": 3},
    ),
    "attention_scores.column_sums": (
        {"up_to": 1, "tokens": 64, "rows": 32, "num_warps": 8, "num_stages": 2},
        {"up_to": None, "tokens": 32, "rows": 32, "num_warps": 8, "num_stages": 2},
    ),
    # with so many keys in each, up to so many programs share a row's statistics
    "attention_scores.splits": ({"up_to": None, "tokens": 8192, "splits": 16},),
    # by the bytes of a number: the tensor cores take a float32 as two. Up to `kept` features of a
    # head are read once, `width` of wider ones at a time, again for every few rows
    "attention_scores.features": (
        {"up_to": 2, "kept": 128, "width": 32},
        {"up_to": 4, "kept": 32, "width": 32},
    ),
    # features that cannot come 16 bytes at a time: of each a register has the address
    "attention_scores.unaligned": (
        {"up_to": 2, "kept": 32, "width": 32},
        {"up_to": 4, "kept": 16, "width": 16},
    ),
    # the heads of a sample have programs of their own where else fewer than these would start, at
    # the price of another launch, in blocks of tokens, that adds them up
    "sum_heads": ({"up_to": None, "programs": 264, "block": 1024, "num_warps": 4},),
    "select_tokens": _IN_REGISTERS,
    # one program a row, a block at a time: longer blocks meet less often, and take registers
    "select_tokens.long": ({"up_to": None, "block": 2048, "num_warps": 8},),
    # fewer rows than `rows`, of `tokens` at least, have several programs each, about `programs` in
    # all: at the price of more launches, which are worth it where a row has many blocks
    "select_tokens.few": (
        {
            "up_to": None,
            "rows": 128,
            "tokens": 32768,
            "programs": 264,
            "block": 2048,
            "num_warps": 8,
        },
    ),
    "draw_queries": _IN_REGISTERS,
    "draw_queries.long": ({"up_to": None, "block": 2048, "num_warps": 8},),
    "random_masking": _IN_REGISTERS,
    "random_masking.long": ({"up_to": None, "block": 2048, "num_warps": 8},),
    "random_masking.rows": _COPIED,
    "gather_tokens": _COPIED,
    "restore_tokens": _COPIED,
    # by the columns of a row: a program has all of them, `width` at a time, and looks once at where
    # its rows come from
    "gather_tokens_backward": (
        {"up_to": 64, "elements": 1024, "width": 64, "num_warps": 4},
        {"up_to": None, "elements": 4096, "width": 256, "num_warps": 4},
    ),
    "gather_tokens_backward.notes": ({"up_to": None, "block": 256, "num_warps": 2},),
    # of blocks with a token of several ids, one program takes those of so many flags
    "gather_tokens_backward.several": (
        {"up_to": None, "flags": 16, "ids": 512, "width": 128, "num_warps": 4},
    ),
    # by the bytes of a number; more `rows` in a slice of a sample leave fewer sums to add up, fewer
    # start more programs; `parts_width` columns of these sums have a program
    "restore_tokens_backward": (
        {
            "up_to": 2,
            "elements": 4096,
            "width": 256,
            "rows": 64,
            "parts_width": 32,
            "num_warps": 4,
        },
        {
            "up_to": 8,
            "elements": 2048,
            "width": 128,
            "rows": 64,
            "parts_width": 32,
            "num_warps": 4,
        },
    ),
    "self_guided_masking": ({"up_to": None, "block": 1024, "num_warps": 4},),
    # by the tokens of a sample, of which a block has all: so many `bytes` of features in each
    # thread's registers are read at once, beside the vectors; longer samples have no kernel
    "bipartition": (
        {"up_to": 128, "bytes": 64, "num_warps": 4},
        {"up_to": 256, "bytes": 64, "num_warps": 8},
        {"up_to": 2048, "bytes": 64, "num_warps": 16},
    ),
    # more elements are more rows at a time, which wait for each other less often, in more registers
    "informed_scores": ({"up_to": None, "elements": 8192, "num_warps": 8},),
}

# ---- from here on written by bench.tune ----
# sm_80: never measured, DEFAULT holds
# sm_90: never measured, DEFAULT holds
# sm_100: never measured, DEFAULT holds
MEASURED = {}
MEASURED_ON = {}
