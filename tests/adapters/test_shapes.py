"""Tests shapes and dtypes of every method on kernels of random sizes, by tracing alone."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_jax.adapters import (
    BOFT,
    EVA,
    HRA,
    IA3,
    OFT,
    AdaLoRA,
    AdapterSpec,
    DoRA,
    FourierFT,
    Full,
    GradientFactors,
    GraLoRA,
    HiRA,
    Hybrid,
    InputFactors,
    LoftQ,
    LoHa,
    LoKr,
    LoRA,
    LoRAFA,
    LoRAGA,
    LoRAOne,
    MiSS,
    OLoRA,
    PiSSA,
    RandLora,
    SHiRA,
    Unitary,
    VeRA,
)
from peft_jax.core import flatten

ranks = st.integers(1, 9)
blocks = st.integers(1, 5).map(lambda n: 2 * n)
factors = st.integers(1, 4)
METHODS = {
    "lora": (LoRA, {"rank": ranks, "rank_stabilized": st.booleans()}),
    "dora": (DoRA, {"rank": ranks}),
    "lora_ga": (LoRAGA, {"rank": ranks, "direction": st.sampled_from(["ArB2r", "random"])}),
    "lora_one": (LoRAOne, {"rank": ranks}),
    "eva": (EVA, {"rank": ranks}),
    "lora_fa": (LoRAFA, {"rank": ranks}),
    "vera": (VeRA, {"rank": ranks}),
    "randlora": (RandLora, {"rank": ranks, "hold_bases": st.booleans()}),
    "fourierft": (FourierFT, {"n_frequency": st.integers(1, 100)}),
    "adalora": (AdaLoRA, {"rank": ranks}),
    "pissa": (PiSSA, {"rank": ranks, "iterations": st.integers(0, 2)}),
    "olora": (OLoRA, {"rank": ranks}),
    "loftq": (LoftQ, {"rank": ranks}),
    "loha": (LoHa, {"rank": ranks}),
    "lokr": (LoKr, {"rank": st.just(1), "decompose_factor": st.sampled_from([-1, 2])}),
    "gralora": (GraLoRA, {"rank": ranks, "blocks": st.just(1), "hybrid_rank": st.integers(0, 2)}),
    "hira": (HiRA, {"rank": ranks}),
    "miss": (MiSS, {"rank": ranks}),
    "shira": (SHiRA, {"rank": ranks}),
    "ia3": (IA3, {"scales_input": st.booleans()}),
    "oft": (OFT, {"block_size": blocks, "share_blocks": st.booleans()}),
    "hra": (HRA, {"rank": ranks.map(lambda n: 2 * n)}),
    "boft": (BOFT, {"block_size": blocks, "n_butterfly_factors": factors}),
    "unitary": (Unitary, {}),
    "hybrid": (Hybrid, {"rank": ranks, "block_size": blocks, "n_butterfly_factors": factors}),
    "hybrid unitary": (Hybrid, {"rank": ranks, "rotation": st.just("unitary")}),
}


def struct(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", METHODS)
def test_shapes_and_dtypes_on_one_kernel(name, data):
    make, choices = METHODS[name]
    method = make(**data.draw(st.fixed_dictionaries(choices)))
    # Every method accepts multiples of its largest block that are at least twice the rank.
    rotation = getattr(method, "rotation_method", method)
    size = getattr(rotation, "composed_block_size", getattr(rotation, "block_size", 2))
    d_in = size * data.draw(st.integers(-(-18 // size), -(-18 // size) + 2))
    d_out = data.draw(st.integers(18, 23))
    batch = tuple(data.draw(st.lists(st.integers(1, 3), max_size=2)))
    dtype = data.draw(st.sampled_from([jnp.float32, jnp.bfloat16]))
    method.check_kernel("it", (d_in, d_out))

    def run(key, x, kernel, gradient, inputs):
        given = {"kernel": kernel.astype(jnp.float32)} if method.uses_kernel else {}
        if method.input_rank:
            given["inputs"] = inputs
        trainable, constant = method.init(key, (d_in, d_out), gradient, **given)
        arrays = method.prepare(trainable, constant, dropout_key=key)
        y = method.project(x, kernel, arrays, dropout_key=key)
        return trainable, constant, y, method.merge(kernel, arrays)

    k = max(method.start_rank, 1)
    trainable, constant, y, merged = jax.eval_shape(
        run,
        jax.eval_shape(lambda: jax.random.key(0)),
        struct(*batch, d_in, dtype=dtype),
        struct(d_in, d_out, dtype=dtype),
        GradientFactors(struct(d_in, k), struct(k), struct(d_out, k)),
        InputFactors(struct(d_in, k), struct(k), struct()),
    )
    assert (y.shape, y.dtype) == ((*batch, d_out), dtype)
    assert (merged.shape, merged.dtype) == ((d_in, d_out), jnp.float32)
    axes = method.axes("in", "out")
    for arrays, names in zip((trainable, constant), axes, strict=True):
        leaves, flat_names = flatten(arrays), flatten(names)
        assert leaves.keys() == flat_names.keys()
        for path, leaf in leaves.items():
            # Positions are constants.
            whole = arrays is constant and jnp.issubdtype(leaf.dtype, jnp.integer)
            assert leaf.dtype == (jnp.int32 if whole else jnp.float32)
            assert len(flat_names[path]) == leaf.ndim
            # An axis with the name of the kernel's output axis has its length.
            assert all(
                length == d_out
                for length, axis in zip(leaf.shape, flat_names[path], strict=True)
                if axis == "out"
            )


@pytest.mark.parametrize("method", [Full(), LoRA(rank=2), BOFT(block_size=2), Hybrid(rank=2)])
def test_arrays_of_stacked_kernels_have_a_leading_layer_axis(method):
    params = {
        "layers": {"q_proj": {"kernel": struct(5, 16, 8)}},
        "lm_head": {"kernel": struct(16, 8)},
    }
    spec = AdapterSpec(method=method, target_modules=("q_proj", "lm_head"))
    if isinstance(method, Hybrid):
        assert spec.abstract(params).constant
    for tree in (spec.abstract(params).trainable, spec.abstract(params).constant):
        stacked, single = (
            {} if part not in tree else flatten(tree[part]) for part in ("layers", "lm_head")
        )
        for path, leaf in stacked.items():
            assert leaf.shape == (5, *single[path[1:]].shape)
