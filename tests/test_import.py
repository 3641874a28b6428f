"""Importing sma_fast is quiet and cheap, and its names are the contract's."""

import ast
import inspect
import json
import subprocess
import sys

import sma_fast

CONTRACT = {  # parameters of the public functions; after "*" by name only
    "attention_scores": (
        "query, key, *, query_index=None, head_index=None, key_padding_mask=None, scale=None, "
        "head_reduce='mean'"
    ),
    "aggregate_attention": (
        "attention, *, query_index=None, head_index=None, head_reduce='mean', logits=False"
    ),
    "select_tokens": (
        "scores, *, mask_ratio=None, num_masked=None, max_masked=None, key_padding_mask=None, "
        "random_fraction=0.0, pool_ratio=None, noise=None, generator=None"
    ),
    "gather_tokens": "tokens, ids",
    "restore_tokens": "visible, ids_restore, fill",
    "self_guided_masking": (
        "query, key, *tokens, mask_ratio, num_queries=None, query_index=None, head_index=None, "
        "query_padding_mask=None, mask_queries=False, head_reduce='mean', key_padding_mask=None, "
        "random_fraction=0.0, pool_ratio=None, scale=None, generator=None"
    ),
    "draw_queries": (
        "num_queries, *, batch=None, num_candidates=None, padding_mask=None, generator=None, "
        "device=None"
    ),
    "random_masking": "tokens, mask_ratio, *, noise=None, generator=None",
    "use_backend": "name",
    "backends": "",
    "show_config": "",
    "bipartition": "embeddings, *, key_padding_mask=None, method='ncut', iterations=64, "
    "tol=0.0003, similarity='cosine'",
    "informed_scores": "embeddings, bipartition, *, cluster='object', key_padding_mask=None",
}
FIELDS = {
    "TokenSelection": "mask ids_visible ids_masked ids_restore num_visible num_masked",
    "SelfGuidedMasking": "selection scores visible query_index head_index",
    "Bipartition": "vector labels ids eigenvalue converged",
}


def parameters(function) -> str:
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return text[1:-1]


def test_names():
    assert set(sma_fast.__all__) == set(CONTRACT) | set(FIELDS)
    for name, expected in CONTRACT.items():
        assert parameters(getattr(sma_fast, name)) == expected
    for name, fields in FIELDS.items():
        assert getattr(sma_fast, name)._fields == tuple(fields.split())


def test_every_name_says_what_it_returns():
    for name in sma_fast.__all__:
        assert getattr(sma_fast, name).__doc__, f"{name} has no docstring"
    for name in set(CONTRACT) - {"use_backend", "backends", "show_config"}:
        for part in ("Returns", "Args:", "Raises:", "Source:"):
            assert part in getattr(sma_fast, name).__doc__, f"{name}: no {part}"


IMPORT = """
import json, sys, threading
import torch
before, threads = set(sys.modules), threading.active_count()
import sma_fast
new = sorted({name.split(".")[0] for name in set(sys.modules) - before})
json.dump({
    "new": new,
    "loaded": sorted(sys.modules),
    "cuda": torch.cuda.is_initialized(),
    "threads": threading.active_count() - threads,
    "deterministic": torch.are_deterministic_algorithms_enabled(),
}, sys.stderr)
"""


def test_import_is_quiet():
    result = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    found = json.loads(result.stderr)  # nothing else was printed there either
    assert set(found["new"]) - sys.stdlib_module_names == {"sma_fast"}
    unwanted = ("triton", "transformers", "matplotlib", "sklearn", "sma_fast.kernels")
    assert not set(unwanted) & set(found["loaded"])
    assert (found["cuda"], found["threads"], found["deterministic"]) == (False, 0, False)


def test_init_holds_names_only():
    tree = ast.parse(inspect.getsource(sma_fast))
    allowed = (ast.Expr, ast.ImportFrom, ast.Assign)
    assert all(isinstance(node, allowed) for node in tree.body)
