"""Checkpoints load with their values, or raise ValueError naming what does not fit."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from peft_jax.core import flatten
from peft_jax.hub import load_model, read_config, save_model
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.models import build_model

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WEIGHTS = "model.safetensors"
TINY_WORLD = Path(__file__).parents[2] / "assets" / "tiny_world"


def random_tensors(rng, **config):
    """Returns the tensors of a Llama checkpoint, named independently of the package."""
    d, f, v, kv = 16, 24, 40, 8
    tensors = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = (v, d)
    for layer in range(3):
        block = f"model.layers.{layer}"
        tensors |= {
            f"{block}.input_layernorm.weight": (d,),
            f"{block}.post_attention_layernorm.weight": (d,),
            f"{block}.self_attn.q_proj.weight": (d, d),
            f"{block}.self_attn.k_proj.weight": (kv, d),
            f"{block}.self_attn.v_proj.weight": (kv, d),
            f"{block}.self_attn.o_proj.weight": (d, d),
            f"{block}.mlp.gate_proj.weight": (f, d),
            f"{block}.mlp.up_proj.weight": (f, d),
            f"{block}.mlp.down_proj.weight": (d, f),
        }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in tensors.items()}


@pytest.fixture
def tensors():
    return random_tensors(np.random.default_rng(0))


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes a checkpoint of one file and returns its folder."""

    def write(tensors, **config):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | config))
        safetensors.numpy.save_file(tensors, tmp_path / WEIGHTS)
        return tmp_path

    return write


def shard(folder, tensors, files=3):
    """Splits a checkpoint's file into several with an index."""
    (folder / WEIGHTS).unlink()
    weight_map = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::files]}
        safetensors.numpy.save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def assert_params(params, tensors, dtype=np.float32):
    """Asserts that every leaf holds its tensors, stacked, and kernels transposed."""
    leaves = flatten(params)
    assert all(leaf.dtype == dtype for leaf in leaves.values())
    for path, leaf in leaves.items():
        stacked = path[0] == "layers"
        for layer in range(3) if stacked else (None,):
            prefix = [] if path[0] == "lm_head" else ["model"]
            parts = ["layers", str(layer), *path[1:-1]] if stacked else path[:-1]
            expected = tensors[".".join([*prefix, *parts, "weight"])].astype(dtype)
            expected = expected.T if path[-1] == "kernel" else expected
            np.testing.assert_array_equal(leaf[layer] if stacked else leaf, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_file_loads_in_the_requested_dtype(write, tensors, dtype):
    model, params = load_model(write(tensors), dtype=dtype)
    assert_params(params, tensors, jnp.dtype(dtype))
    assert len(flatten(params)) == len(flatten(model.abstract_params())) == 12


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float64"])
def test_stored_dtypes_are_converted(write, tensors, stored):
    stored_tensors = {name: value.astype(jnp.dtype(stored)) for name, value in tensors.items()}
    _, params = load_model(write(stored_tensors))
    assert_params(params, stored_tensors)


def test_sharded_files_load(write, tensors):
    folder = write(tensors)
    shard(folder, tensors)
    assert_params(load_model(folder)[1], tensors)


def test_arrays_have_the_requested_sharding(write, tensors):
    mesh = jax.make_mesh((2, 4), ("data", "model"))

    spec = PartitionSpec(None, "data", "model")

    def shardings(model):
        return jax.tree.map(
            lambda leaf: NamedSharding(mesh, spec if leaf.ndim == 3 else PartitionSpec()),
            model.abstract_params(),
        )

    _, params = load_model(write(tensors), sharding=shardings)
    assert_params(params, tensors)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.spec == spec
    assert kernel.addressable_shards[0].data.shape == (3, 8, 6)


def test_large_tensors_are_read_in_pieces(write, tensors, monkeypatch):
    monkeypatch.setattr("peft_jax.hub.tensors._PIECE", 5 * 16 * 4)
    assert_params(load_model(write(tensors))[1], tensors)


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_a_tied_embedding_may_be_stored_under_either_name(write, tensors, stored):
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding
    if stored != "both":
        for name in {"model.embed_tokens.weight", "lm_head.weight"} - {stored}:
            del tensors[name]
    model, params = load_model(write(tensors, tie_word_embeddings=True))
    np.testing.assert_array_equal(params["embed_tokens"]["embedding"], embedding)
    assert "lm_head" not in params
    np.testing.assert_array_equal(model.head_kernel(params), embedding.T)


def test_a_tied_head_that_differs_is_rejected(write, tensors):
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        load_model(write(tensors, tie_word_embeddings=True))


def test_names_without_the_prefix_load(write, tensors):
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    assert_params(load_model(write(bare))[1], tensors)


def test_derived_tensors_of_old_checkpoints_are_ignored(write, tensors):
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    assert_params(load_model(write(tensors))[1], tensors)


def test_an_error_names_missing_unexpected_and_wrongly_shaped_tensors(write, tensors):
    norm = tensors.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"lacks model\.norm\.weight"):
        load_model(write(tensors))
    tensors["model.norm.weight"] = norm
    tensors["model.layers.1.self_attn.q_proj.bias"] = norm
    with pytest.raises(ValueError, match=r"has model\.layers\.1\.self_attn\.q_proj\.bias"):
        load_model(write(tensors))
    del tensors["model.layers.1.self_attn.q_proj.bias"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((16, 24), np.float32)
    message = r"up_proj\.weight has \[16, 24\], .*\[24, 16\]"
    with pytest.raises(ValueError, match=message):
        load_model(write(tensors))


def test_an_error_for_a_missing_head_names_tie_word_embeddings(write, tensors):
    del tensors["lm_head.weight"]
    with pytest.raises(ValueError, match=r"lm_head\.weight \(tie_word_embeddings"):
        load_model(write(tensors))


def test_quantized_tensors_are_rejected(write, tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.int8)
    with pytest.raises(ValueError, match=r"up_proj\.weight in .* dtype I8"):
        load_model(write(tensors))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_rejected_with_a_conversion_command(write, tensors, name):
    folder = write(tensors)
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(ValueError, match=rf"{name}(.|\n)*save_pretrained"):
        load_model(folder)


@pytest.mark.parametrize("left", ["pytorch_model.bin.index.json", "generation_config.json"])
def test_pickles_on_the_hub_are_rejected_with_a_conversion_command(
    write, tensors, tmp_path_factory, left
):
    # huggingface_hub leaves such a folder if the pickles are not fetched.
    folder = tmp_path_factory.mktemp("hub") / "models--org--old-model" / "snapshots" / "1a2b"
    folder.parent.mkdir(parents=True)
    write(tensors).rename(folder)
    (folder / WEIGHTS).unlink()
    (folder / left).write_text("{}")
    convert = r"source, target = 'org/old-model', 'old-model'(.|\n)*AutoTokenizer"
    with pytest.raises(ValueError, match=rf"pickle(.|\n)*{convert}"):
        load_model(folder)


def test_the_conversion_command_for_pickles_writes_a_loadable_checkpoint(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    pickled = tmp_path / "pickled"
    shutil.copytree(TINY_WORLD, pickled)
    module = transformers.AutoModelForCausalLM.from_pretrained(pickled)
    torch.save(module.state_dict(), pickled / "pytorch_model.bin")
    (pickled / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="pickle") as error:
        load_model(pickled)
    (program,) = re.findall(r'python -c "(.*)"$', str(error.value))
    exec(program)
    converted = tmp_path / "pickled-safetensors"
    assert (converted / "tokenizer.json").is_file()
    _, params = load_model(converted)
    _, wanted = load_model(TINY_WORLD)
    jax.tree.map(np.testing.assert_array_equal, params, wanted)


def test_a_folder_without_weights_or_configuration_is_rejected(write, tensors):
    folder = write(tensors)
    (folder / WEIGHTS).rename(folder / "consolidated.safetensors")
    with pytest.raises(ValueError, match=r"consolidated\.safetensors"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="an adapter, not a model"):
        load_model(folder)


def test_damaged_files_are_rejected(write, tensors):
    folder = write(tensors)
    whole = (folder / WEIGHTS).read_bytes()
    for damaged in (whole[:-1], whole[:100], whole[:4], b"", b"\x08" + bytes(7) + b"not json"):
        (folder / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"truncated|not a safetensors file"):
            load_model(folder)


def test_an_index_that_disagrees_with_its_files_is_rejected(write, tensors):
    folder = write(tensors)
    weight_map = shard(folder, tensors)
    index = folder / f"{WEIGHTS}.index.json"

    def with_map(**changes):
        index.write_text(json.dumps({"weight_map": weight_map | changes}))

    first, second = sorted(set(weight_map.values()))[:2]
    with_map(**{"model.norm.weight": second if weight_map["model.norm.weight"] == first else first})
    with pytest.raises(ValueError, match=r"maps model\.norm\.weight to"):
        load_model(folder)
    with_map(other="../elsewhere.safetensors")
    with pytest.raises(ValueError, match=r"elsewhere\.safetensors"):
        load_model(folder)
    with_map()
    shutil.copy(folder / first, folder / "copy.safetensors")
    with_map(other="copy.safetensors")
    with pytest.raises(ValueError, match="is in both"):
        load_model(folder)
    with_map()
    (folder / second).unlink()
    with pytest.raises(ValueError, match=rf"lacks {second}"):
        load_model(folder)
    index.write_text("[1]")
    with pytest.raises(ValueError, match="not a JSON object"):
        load_model(folder)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 4000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_model_loads_again_bit_for_bit(tmp_path, key, dtype, max_shard_bytes):
    model = build_model(CONFIG | {"eos_token_id": 7})
    params = model.init_params(key, dtype)
    save_model(tmp_path, model, params, max_shard_bytes=max_shard_bytes)
    shards = len(list(tmp_path.glob("*.safetensors")))
    assert shards == 1 if max_shard_bytes > 10**6 else shards > 3
    again, loaded = load_model(tmp_path, dtype=dtype)
    assert again == model
    assert read_config(tmp_path) == CONFIG | {"eos_token_id": 7, "dtype": dtype}
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert not [file for file in tmp_path.iterdir() if file.name.endswith(".tmp")]


@pytest.mark.parametrize("model_type", ["llama", "bloom"])
def test_transformers_loads_a_saved_model(tmp_path, key, model_type):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    bloom = {"model_type": "bloom", "vocab_size": 40, "hidden_size": 16, "n_head": 4, "n_layer": 2}
    model = build_model(CONFIG if model_type == "llama" else bloom)
    params = jax.tree.map(
        lambda leaf: (
            leaf + 0.1 * np.sin(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape)
        ),
        model.init_params(key),
    )
    save_model(tmp_path, model, params, max_shard_bytes=5000)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = np.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    found = jax.jit(model)(params, jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_a_failed_save_leaves_nothing_loadable(tmp_path, key, monkeypatch):
    model = build_model(CONFIG)
    params = model.init_params(key)
    save_model(tmp_path, model, params)

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr("peft_jax.hub.tensors._as_bytes", fail)
    with pytest.raises(OSError, match="no space left"):
        save_model(tmp_path, model, params)
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [WEIGHTS]


def test_a_tokenizer_with_only_a_sentencepiece_model_is_read(tmp_path):
    # Llama 1, Llama 2 and Vicuna have tokenizer.model, but no tokenizer.json.
    import sentencepiece

    words = ["the fox ran", "a fox and a dog", "the dog ran to the fox", "and then they slept"]
    text = tmp_path / "text"
    text.write_text("\n".join(words * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(tmp_path)
    for line in ("the dog and the fox slept", "größe"):
        assert tokenizer(line)["input_ids"] == [own.bos_id(), *own.encode(line)]
