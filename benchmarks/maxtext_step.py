"""A training step with the layout of MaxText's decoder, for compiling only.

It states what decides MaxText's time at commit 92e59fdf: a scanned stack of Llama blocks with
float32 weights cast to bfloat16, sharded over "fsdp" along the embedding and over "tensor" along
heads and the MLP; splash attention; whole logits in float32; AdamW; and the named intermediate
results that a policy saves on the device or on the host.

    python -m benchmarks.maxtext_step FOLDER

compiles the case in FOLDER/task.json, and dumps the program there.
"""

import dataclasses
import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from peft_jax.cost import find_topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One of MaxText's configurations.

    Attributes:
      topology: Devices, as `find_topology` names them.
      fsdp: Devices along "fsdp", over all slices.
      tensor: Devices along "tensor", in rings of two by two chips if more than one.
      rows: Rows of a batch on each device.
      tokens: Tokens of a row.
      width: Embedding.
      layers: Number of blocks.
      heads: Query heads of 128 features each.
      kv_heads: Key and value heads.
      mlp: Width of the MLP.
      vocab: Size of the vocabulary.
      saved: Names of results that are saved on the device for the backward pass.
      offloaded: Names of results that are saved on the host.
      vocab_tiles: Parts of the tokens whose logits are computed one after the other.
      blocks: Splash attention's block sizes by argument; 512 by default.
      options: Options of the compiler; unknown ones are left away.
    """

    topology: str
    fsdp: int
    tensor: int
    rows: int
    tokens: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    vocab_tiles: int
    saved: tuple[str, ...]
    offloaded: tuple[str, ...]
    blocks: dict[str, int]
    options: dict[str, str]

    @property
    def batch(self) -> int:
        """Rows of a batch on all devices."""
        return self.rows * self.fsdp * self.tensor


def make_mesh(case: Case) -> Mesh:
    """Returns the mesh, ordered as MaxText does."""
    topology = find_topology(case.topology)
    slices = topology.slices
    shape = (case.fsdp // slices, case.tensor)
    parts = []
    for number in range(slices):
        devices = [d for d in topology.devices if getattr(d, "slice_index", 0) == number]
        if case.tensor == 4:
            square = mesh_utils.create_device_mesh((16, 16), devices)
            parts.append(_rings(square))
        else:
            parts.append(mesh_utils.create_device_mesh(shape, devices))
    return Mesh(np.concatenate(parts), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def _rings(square: np.ndarray) -> np.ndarray:
    """Returns 64 rings of 4 chips, MaxText's custom mesh "hybrid_ring_64x4"."""
    rings = [
        [square[i, j], square[i, j + 1], square[i + 1, j + 1], square[i + 1, j]]
        for i in range(0, 16, 2)
        for j in range(0, 16, 2)
    ]
    return np.array(rings)


def abstract_params(case: Case, mesh: Mesh) -> dict[str, Any]:
    """Returns the parameters' shapes and shardings, in float32."""

    def array(*shape: int, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    L, D, F = case.layers, case.width, case.mlp
    q, kv = case.heads * 128, case.kv_heads * 128
    into, out = P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp")
    return {
        "embedding": array(case.vocab, D, spec=P("tensor", "fsdp")),
        "head": array(D, case.vocab, spec=P("fsdp", "tensor")),
        "norm": array(D, spec=P("tensor")),
        "layers": {
            "attention_norm": array(L, D, spec=P(None, "tensor")),
            "mlp_norm": array(L, D, spec=P(None, "tensor")),
            "query": array(L, D, q, spec=into),
            "key": array(L, D, kv, spec=into),
            "value": array(L, D, kv, spec=into),
            "out": array(L, q, D, spec=out),
            "wi_0": array(L, D, F, spec=into),
            "wi_1": array(L, D, F, spec=into),
            "wo": array(L, F, D, spec=out),
        },
    }


def loss(case: Case, mesh: Mesh, params: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy."""

    def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("fsdp", *axes)))

    def block(x: jax.Array, layer: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        x = checkpoint_name(constrain(x, None, "tensor"), "decoder_layer_input")
        w = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layer)
        with jax.named_scope("attention"):
            y = _norm(x, layer["attention_norm"])
            heads = (("query", case.heads), ("key", case.kv_heads), ("value", case.kv_heads))
            q, k, v = (
                checkpoint_name((y @ w[name]).reshape(*y.shape[:2], n, 128), f"{name}_proj")
                for name, n in heads
            )
            q, k = _rotate(q) * 128**-0.5, _rotate(k)
            with jax.named_scope("scores"):
                context = _attention(case, mesh, q, k, v)
            y = checkpoint_name(context.reshape(*y.shape[:2], -1) @ w["out"], "out_proj")
            x = x + constrain(y, None, "tensor")
        with jax.named_scope("mlp"):
            y = _norm(x, layer["mlp_norm"])
            gate, up = (checkpoint_name(y @ w[n], f"mlp{n}") for n in ("wi_0", "wi_1"))
            y = checkpoint_name((jax.nn.silu(gate) * up) @ w["wo"], "mlpwo")
            x = x + constrain(y, None, "tensor")
        return x, None

    policy = jax.checkpoint_policies.save_only_these_names(*case.saved)
    if case.offloaded:
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(case.saved),
            names_which_can_be_offloaded=list(case.offloaded),
            offload_src="device",
            offload_dst="pinned_host",
        )
    with jax.named_scope("embedding"):
        one_hot = jax.nn.one_hot(tokens, case.vocab, dtype=jnp.bfloat16)
        x = constrain(one_hot @ params["embedding"].astype(jnp.bfloat16), None, "tensor")
    x, _ = jax.lax.scan(
        jax.checkpoint(block, policy=policy, prevent_cse=False), x, params["layers"]
    )
    with jax.named_scope("loss"):
        x = _norm(x, params["norm"])

        def one_tile(part: tuple[jax.Array, jax.Array]) -> jax.Array:
            hidden, right = part
            logits = (hidden @ params["head"].astype(jnp.bfloat16)).astype(jnp.float32)
            logits = constrain(logits, None, "tensor")
            return optax.softmax_cross_entropy(logits, jax.nn.one_hot(right, case.vocab))

        if case.vocab_tiles == 1:
            return jnp.mean(one_tile((x, targets)))
        tiled = (case.batch, case.vocab_tiles, case.tokens // case.vocab_tiles)
        parts = [jnp.moveaxis(a.reshape(*tiled, *a.shape[2:]), 1, 0) for a in (x, targets)]
        return jnp.mean(jax.lax.map(jax.checkpoint(one_tile), tuple(parts)))


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-5)
    return wide.astype(jnp.bfloat16) * scale.astype(jnp.bfloat16)


def _rotate(x: jax.Array) -> jax.Array:
    """Applies rotary positions to [rows, tokens, heads, 128]."""
    angles = jnp.arange(x.shape[1])[:, None] * 500_000 ** (-jnp.arange(64) / 64)
    sin, cos = (f(angles)[None, :, None] for f in (jnp.sin, jnp.cos))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    both = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return both.astype(x.dtype)


def _attention(case: Case, mesh: Mesh, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    mask = splash_attention_mask.CausalMask((case.tokens, case.tokens))
    fused = case.blocks.get("use_fused_bwd_kernel", 0) == 1
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")
    sizes: dict[str, Any] = {
        name: case.blocks.get(name, 512) for name in (*names, "block_kv_dkv_compute")
    }
    for name in ("block_q_dq", "block_kv_dq"):
        sizes[name] = None if fused else case.blocks.get(name, 512)
    kernel = splash.make_splash_mha(
        mask=splash_attention_mask.MultiHeadMask([mask] * (case.heads // case.tensor)),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(**sizes, use_fused_bwd_kernel=fused),
        residual_checkpoint_name="context",
    )
    spec = P("fsdp", "tensor", None, None)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
    )
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.vmap(kernel)(q, k, v)

    by_head = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return jnp.swapaxes(attend(*by_head), 1, 2)


def lower(case: Case) -> jax.stages.Lowered:
    """Lowers the training step."""
    mesh = make_mesh(case)
    params = abstract_params(case, mesh)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(3e-5, b2=0.95, weight_decay=0.1)
    )

    def step(params: Any, state: Any, tokens: jax.Array, targets: jax.Array) -> Any:
        value, gradients = jax.value_and_grad(lambda p: loss(case, mesh, p, tokens, targets))(
            params
        )
        with jax.named_scope("optimizer"):
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, value

    shapes = jax.eval_shape(optimizer.init, params)
    replicated = NamedSharding(mesh, P())
    shardings = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        shapes,
        jax.tree.map(lambda leaf: leaf.sharding, params),
        transform_non_params=lambda _: replicated,
    )
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    rows = jax.ShapeDtypeStruct(
        (case.batch, case.tokens), jnp.int32, sharding=NamedSharding(mesh, P("fsdp"))
    )
    outputs = (jax.tree.map(lambda leaf: leaf.sharding, params), shardings, replicated)
    step_ = jax.jit(step, donate_argnums=(0, 1), out_shardings=outputs)
    return step_.lower(params, state, rows, rows)


def main(folder: str) -> None:
    """Compiles the folder's case, and dumps the compiler's reports there."""
    task = json.loads((Path(folder) / "task.json").read_text(encoding="utf-8"))
    lowered = lower(Case(**task))
    options: dict[str, Any] = dict(task["options"])
    dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    while True:
        try:
            lowered.compile(compiler_options=options | dump)
            return
        except (RuntimeError, ValueError) as error:
            unknown = re.search(r"No such compile option: '(\w+)'", str(error))
            if unknown is None or options.pop(unknown[1], None) is None:
                raise
            print(f"the compiler does not know the option {unknown[1]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
