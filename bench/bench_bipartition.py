"""bipartition against a batched eigh of the same similarities."""

import functools

import sma_fast
from bench import harness, peers, roofline, shapes


def set_up(settings: harness.Settings) -> harness.Case:
    shape = settings.shape("patches")
    embeddings = shapes.embeddings(shape, settings.device, settings.dtype)
    ours = functools.partial(sma_fast.bipartition, embeddings)
    wanted = harness.reference(ours)

    def check(answer, is_ours):
        labels = answer.labels if is_ours else answer
        assert (labels == wanted.labels).float().mean() >= 0.999, "not the reference's cut"
        assert not is_ours or answer.converged.float().mean() >= 0.99, "not converged"

    return harness.Case(
        op="bipartition",
        part="forward",
        shape=shape,
        ours=ours,
        peers={"eigh": functools.partial(peers.eigh_cut, embeddings)},
        check=check,
        stages=[roofline.similarity(embeddings)],
    )


def bench_bipartition(measure, settings):
    measure(set_up(settings))
