"""Quantized checkpoints load as independent code reads their formats, bit for bit."""

import json
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from peft_jax.core import dequantize, flatten
from peft_jax.hub import load_model, save_model
from peft_jax.models import build_model
from peft_jax.parallel import MeshSettings, make_mesh, sharding_tree

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
    "llm_int8_threshold": 6.0,
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [48, 32]}
LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def pack_nf4(name, shape, rng, *, doubly):
    """Returns random tensors of bitsandbytes, and the kernel [out, in] that they mean."""
    outputs, inputs = shape
    codes = rng.integers(0, 16, outputs * inputs)
    codes[::64] = rng.choice([0, 15], codes[::64].shape)  # Each block has its largest magnitude.
    blocks = len(codes) // 64
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
    tensors = {".quant_map": LEVELS}
    if doubly:
        steps, offset = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32), np.float32(0.7)
        which = rng.integers(0, 256, blocks).astype(np.uint8)
        largest = rng.uniform(0.1, 0.5, -(-blocks // 256)).astype(np.float32)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.7}
        tensors |= {".absmax": which, ".nested_absmax": largest, ".nested_quant_map": steps}
        scales = np.array(
            [steps[code] * largest[block // 256] + offset for block, code in enumerate(which)]
        )
    else:
        scales = rng.uniform(0.01, 1, blocks).astype(np.float32)
        tensors[".absmax"] = scales
    pairs = zip(codes[::2], codes[1::2], strict=True)
    tensors[""] = np.array([[16 * one + other] for one, other in pairs], np.uint8)
    written = json.dumps(state).encode()
    tensors[".quant_state.bitsandbytes__nf4"] = np.frombuffer(written, np.uint8)
    values = [LEVELS[code] * scales[at // 64] for at, code in enumerate(codes)]
    kernel = np.array(values, np.float32).reshape(shape)
    return {f"{name}.weight{end}": tensor for end, tensor in tensors.items()}, kernel


def pack_bits(codes, order=range(8)):
    """Packs eight codes along the last axis into a word each; `order` says whose are the lowest."""
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // 8), np.uint32)
    for place, which in enumerate(order):
        words |= codes[..., which::8].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


def pack_int4(name, shape, rng, *, method, size=32, first_version=True):
    """Returns random tensors of GPTQ or AWQ, and the kernel [out, in] that they mean."""
    outputs, inputs = shape
    groups = inputs // size
    codes = rng.integers(0, 16, (inputs, outputs))
    zeros = rng.integers(1, 16, (groups, outputs))
    scales = rng.uniform(0.01, 0.1, (groups, outputs)).astype(np.float16)
    kernel = np.empty(shape, np.float32)
    for one in range(inputs):
        group = one // size
        kernel[:, one] = np.float32(scales[group]) * (codes[one] - zeros[group])
    if method == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {"qweight": pack_bits(codes, order), "qzeros": pack_bits(zeros, order)}
    else:
        stored = zeros - 1 if first_version else zeros
        tensors = {
            "qweight": np.ascontiguousarray(pack_bits(codes.T).T),
            "qzeros": pack_bits(stored),
            "g_idx": np.arange(inputs, dtype=np.int32) // size,
        }
    tensors["scales"] = scales
    return {f"{name}.{end}": tensor for end, tensor in tensors.items()}, kernel


def pack_fp8(name, shape, rng):
    """Returns random tensors of DeepSeek's 8-bit floats, and the kernel that they mean."""
    values = rng.normal(0, 50, shape).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.001, 0.1, (-(-shape[0] // 48), -(-shape[1] // 32))).astype(np.float32)
    kernel = np.empty(shape, np.float32)
    for row in range(shape[0]):
        for column in range(shape[1]):
            kernel[row, column] = np.float32(values[row, column]) * scales[row // 48, column // 32]
    return {f"{name}.weight": values, f"{name}.weight_scale_inv": scales}, kernel


CASES = {
    "nf4": (NF4, lambda *one: pack_nf4(*one, doubly=False)),
    "nf4 doubly": (NF4, lambda *one: pack_nf4(*one, doubly=True)),
    "gptq": (GPTQ, lambda *one: pack_int4(*one, method="gptq")),
    "gptq second version": (
        GPTQ | {"checkpoint_format": "gptq_v2"},
        lambda *one: pack_int4(*one, method="gptq", first_version=False),
    ),
    "gptq one group": (
        GPTQ | {"group_size": -1},
        lambda name, shape, rng: pack_int4(name, shape, rng, method="gptq", size=shape[1]),
    ),
    "awq": (AWQ, lambda *one: pack_int4(*one, method="awq")),
    "fp8": (FP8, pack_fp8),
}


def write_packed(folder, case):
    """Writes a checkpoint with packed kernels; returns the kernels [layers, in, out] by path."""
    settings, pack = CASES[case]
    model = build_model(CONFIG)
    params = model.init_params(jax.random.key(0))
    save_model(folder, model, params)
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(0)
    expected = {}
    for path, leaf in flatten(params).items():
        if path[0] == "layers" and path[-1] == "kernel":
            kernels = []
            for layer in range(2):
                module = model.module_name(path, layer)
                shape = tensors.pop(f"{module}.weight").shape
                packed, kernel = pack(module, shape, rng)
                tensors |= packed
                kernels.append(kernel.T)
            expected[path] = np.stack(kernels)
        else:
            expected[path] = np.asarray(leaf)
    save_file(tensors, folder / "model.safetensors")
    config = {**CONFIG, "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize("case", CASES)
def test_packed_kernels_are_unpacked(case, tmp_path, caplog):
    expected = write_packed(tmp_path, case)
    with caplog.at_level(logging.WARNING):
        model, params = load_model(tmp_path)
    assert "are packed" in caplog.text
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=str(path))
    mesh = make_mesh(MeshSettings(data=1, fsdp=4, tensor=2))
    shardings = sharding_tree(model.logical_axes(), mesh, None, model.abstract_params())
    _, sharded = load_model(tmp_path, sharding=shardings)
    assert jax.tree.all(jax.tree.map(np.array_equal, sharded, params))
    save_model(tmp_path / "again", model, params)
    _, again = load_model(tmp_path / "again")
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


@pytest.mark.parametrize("case", ["nf4", "nf4 doubly"])
def test_nf4_of_bitsandbytes_loads_as_nf4_without_loss(case, tmp_path, caplog):
    """Blocks of 64 inputs are tiles of 64 rows, so that codes and scales stay as they are."""
    expected = write_packed(tmp_path, case)
    with caplog.at_level(logging.WARNING):
        _, params = load_model(tmp_path, quantization="nf4")
    assert "are packed" not in caplog.text
    for path, leaf in flatten(params).items():
        found = dequantize(leaf) if hasattr(leaf, "qvalue") else leaf
        np.testing.assert_array_equal(found, expected[path])


def change(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (NF4 | {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type = 'fp4'"),
        (NF4 | {"load_in_8bit": True}, "load_in_8bit = True"),
        (GPTQ | {"bits": 8}, "bits = 8"),
        (GPTQ | {"desc_act": True}, "desc_act = True"),
        (GPTQ | {"group_size": 0}, "group_size = 0"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
        (AWQ | {"version": "gemv"}, "version = 'gemv'"),
        ({"quant_method": "awq", "bits": 4}, "without group_size"),
        (FP8 | {"weight_block_size": 128}, "weight_block_size = 128"),
        ({"quant_method": "hqq"}, "quant_method = 'hqq'.*bitsandbytes, gptq, awq, fp8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_packings_are_rejected_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        build_model(CONFIG | {"quantization_config": settings})


def test_families_without_packed_kernels_say_so():
    config = CONFIG | {"model_type": "phi3", "quantization_config": AWQ}
    with pytest.raises(ValueError, match="quantization_config"):
        build_model(config)


def test_damaged_packings_are_named(tmp_path):
    write_packed(tmp_path, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    out_of_order = {**tensors, f"{name}.g_idx": tensors[f"{name}.g_idx"][::-1].copy()}
    save_file(out_of_order, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj\.g_idx .*desc_act"):
        load_model(tmp_path)
    save_file(
        {**tensors, f"{name}.qzeros": tensors[f"{name}.qzeros"] * 0 - 1},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(ValueError, match=r"up_proj\.qzeros .*gptq_v2"):
        load_model(tmp_path)
    del tensors[f"{name}.scales"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj\.qweight, but not .*up_proj\.scales"):
        load_model(tmp_path)
    change(tmp_path, group_size=64)
    with pytest.raises(ValueError, match=r"qzeros .* has the shape"):
        load_model(tmp_path)


@pytest.mark.slow
def test_a_packed_model_trains_an_adapter(tmp_path):
    from peft_jax.adapters import AdapterSpec, LoRA

    write_packed(tmp_path, "awq")
    model, params = load_model(tmp_path, dtype=jnp.float32, quantization="int8")
    spec = AdapterSpec(LoRA(rank=2))
    state = spec.init(jax.random.key(0), params)
    tokens = jnp.arange(12).reshape(2, 6)
    logits = model(spec.bind(params, state), tokens)
    assert bool(jnp.all(jnp.isfinite(logits)))
