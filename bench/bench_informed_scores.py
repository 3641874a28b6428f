"""informed_scores against its formula in plain PyTorch."""

import functools

import torch

import sma_fast
from bench import harness, peers, roofline, shapes


def set_up(settings: harness.Settings) -> harness.Case:
    shape = settings.shape("patches")
    embeddings = shapes.embeddings(shape, settings.device, settings.dtype)
    cut = sma_fast.bipartition(embeddings)
    ours = functools.partial(sma_fast.informed_scores, embeddings, cut)
    eager = functools.partial(peers.cluster_similarity, embeddings, cut.labels)
    wanted = peers.cluster_similarity(embeddings.double(), cut.labels)

    def check(answer, is_ours):
        exact = is_ours or settings.dtype == torch.float32
        torch.testing.assert_close(answer.double(), wanted, atol=1e-5 if exact else 2e-2, rtol=0)

    return harness.Case(
        op="informed_scores",
        part="forward",
        shape=shape,
        ours=ours,
        peers={
            "eager": eager,
            "compiled": harness.compiled(
                settings, peers.cluster_similarity, embeddings, cut.labels
            ),
        },
        check=check,
        stages=[roofline.cluster_similarity(embeddings)],
    )


def bench_informed_scores(measure, settings):
    measure(set_up(settings))
