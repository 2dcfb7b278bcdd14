"""Made-up lengths to plan from."""

import numpy as np

from cosup_jax.data.blocks import Block, Lengths, PlanSettings

FIVE_BLOCKS = PlanSettings(block_examples=80, block_steps=1)  # an epoch of random_lengths


def lengths_from(examples, passages, identities=None):
    """`examples`: (tokens, evidence rows, hard-negative rows); `passages`: tokens."""
    ret_offsets = np.cumsum([0, *(len(evidence) for _, evidence, _ in examples)])
    negative_offsets = np.cumsum([0, *(len(negatives) for *_, negatives in examples)])
    identities = range(1, len(passages) + 1) if identities is None else identities
    return Lengths(
        examples=np.array([tokens for tokens, *_ in examples], np.int32),
        weights=np.ones(len(examples), np.float32),
        ret_offsets=ret_offsets,
        ret_passages=np.array([p for _, evidence, _ in examples for p in evidence], np.int32),
        negative_offsets=negative_offsets,
        negative_passages=np.array([p for *_, negs in examples for p in negs], np.int32),
        passages=np.array(passages),
        identities=np.array([(0, i) for i in identities], np.uint32).reshape(-1, 2),
        sources=np.arange(len(examples)) % 3,
    )


def random_lengths(seed, count=400, mean=16, corpus=60):
    rng = np.random.default_rng(seed)
    examples = [
        (
            int(np.clip(rng.gamma(4, mean / 4), 2, 64)),
            rng.integers(0, corpus, rng.choice([0, 1, 1, 1, 2])).tolist(),
            rng.integers(0, corpus, rng.choice([0, 0, 1])).tolist(),
        )
        for _ in range(count)
    ]
    return lengths_from(examples, rng.integers(3, 30, corpus), rng.integers(1, 50, corpus))


def assert_equal(left, right):
    """Two blocks are the same, array by array."""
    for name, a, b in zip(Block._fields, left, right, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
