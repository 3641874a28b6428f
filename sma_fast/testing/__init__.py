"""Cases, comparisons and memory guards: for the tests; the benchmarks and the demo compare by them.

Imports torch and sma_fast only. `CASES[op]` lists named inputs of an op; `call` runs the public
function on them; `guarded` lays them out as views into sentinel-filled buffers; the ``assert_``
functions compare what an implementation returned with what it should have.
"""

from sma_fast.testing.behaviour import (
    assert_compiles_once,
    assert_gradients,
    assert_reproducible,
    gradients,
)
from sma_fast.testing.calls import (
    DTYPES,
    NATIVE_DTYPES,
    OPS,
    Case,
    call,
    device_of,
    to_device,
)
from sma_fast.testing.cases import (
    CASES,
)
from sma_fast.testing.comparisons import (
    SCORE_TOLERANCE,
    assert_close,
    assert_consistent,
    assert_mask_up_to_near_ties,
    assert_same,
    assert_same_selection,
    assert_scores_close,
    assert_selection_up_to_near_ties,
    bits,
    chi_square,
    error_bound,
    score_bound,
)
from sma_fast.testing.guards import (
    LAYOUTS,
    guarded,
)
from sma_fast.testing.inputs import (
    MANY_TOKENS,
    PADDINGS,
    SCORES,
    aggregate_inputs,
    attention_inputs,
    cut_inputs,
    draw_inputs,
    gather_inputs,
    guided_inputs,
    informed_inputs,
    make_scores,
    padding_mask,
    random_inputs,
    restore_inputs,
    select_inputs,
)
from sma_fast.testing.plain import (
    plain_aggregate_attention,
    plain_attention_scores,
)

__all__ = [
    "CASES",
    "Case",
    "DTYPES",
    "LAYOUTS",
    "MANY_TOKENS",
    "NATIVE_DTYPES",
    "OPS",
    "PADDINGS",
    "SCORES",
    "SCORE_TOLERANCE",
    "aggregate_inputs",
    "assert_close",
    "assert_compiles_once",
    "assert_consistent",
    "assert_gradients",
    "assert_mask_up_to_near_ties",
    "assert_reproducible",
    "assert_same",
    "assert_same_selection",
    "assert_scores_close",
    "assert_selection_up_to_near_ties",
    "attention_inputs",
    "cut_inputs",
    "bits",
    "call",
    "chi_square",
    "device_of",
    "draw_inputs",
    "error_bound",
    "gather_inputs",
    "gradients",
    "guarded",
    "guided_inputs",
    "informed_inputs",
    "make_scores",
    "padding_mask",
    "plain_aggregate_attention",
    "plain_attention_scores",
    "random_inputs",
    "restore_inputs",
    "score_bound",
    "select_inputs",
    "to_device",
]
