"""Modules as Flax's examples and users write them, without a line for this library."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


class EncoderBlock(nn.Module):
    """Block of the encoder of Flax's WMT example: attention and a network, each after a norm."""

    heads: int = 2
    hidden: int = 24

    @nn.compact
    def __call__(self, x, mask=None):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(y, y, mask=mask)
        y = nn.LayerNorm()(x)
        y = nn.Dense(self.hidden)(y)
        y = nn.relu(y)
        return x + nn.Dense(x.shape[-1])(y)


class Encoder(nn.Module):
    """Encoder with its head tied to the embedding."""

    vocab: int = 13
    features: int = 8
    depth: int = 2

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.vocab, self.features, name="shared_embedding")
        positions = self.param("positions", nn.initializers.normal(0.02), (16, self.features))
        x = embed(tokens) + positions[None, : tokens.shape[1]]
        for index in range(self.depth):
            x = EncoderBlock(name=f"encoderblock_{index}")(x)
        return embed.attend(nn.LayerNorm(name="encoder_norm")(x))


class ScannedEncoder(nn.Module):
    """The same blocks under `nn.scan` and `nn.remat`, and an ensemble of heads under `nn.vmap`."""

    axis: int = 0

    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return EncoderBlock(name="block")(x), None

        scanned = nn.scan(
            nn.remat(Step),
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = scanned(name="layers")(x, None)
        heads = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=0,
            axis_size=2,
        )
        return heads(5, name="heads")(x)


class CNN(nn.Module):
    """Flax's MNIST example, with batch norm, a stride and dilation."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(features=6, kernel_size=(3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.avg_pool(nn.relu(x), window_shape=(2, 2), strides=(2, 2))
        x = nn.Conv(features=4, kernel_size=(3, 2), strides=(2, 1), padding="CIRCULAR")(x)
        x = nn.Conv(features=4, kernel_size=(2, 2), kernel_dilation=2, padding="VALID")(x)
        return nn.Dense(features=10)(x.reshape((x.shape[0], -1)))


class OwnProduct(nn.Module):
    """Multiplies by a kernel in its own code."""

    @nn.compact
    def __call__(self, x):
        return jnp.dot(x, self.param("kernel", nn.initializers.normal(), (x.shape[-1], 4)))


class Mixed(nn.Module):
    """A layer of Flax, and one that is none."""

    @nn.compact
    def __call__(self, x):
        return OwnProduct(name="project")(nn.Dense(6, name="hidden")(x))


class ReadsKernel(nn.Module):
    """Uses the kernel of a layer of Flax a second time, by itself."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(x.shape[-1], use_bias=False, name="twice")
        return dense(x) @ dense.variables["params"]["kernel"].T


class NNXBlock(nnx.Module):
    """Block of Flax's NNX transformer example."""

    def __init__(self, features, rngs):
        self.attention = nnx.MultiHeadAttention(2, features, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.up = nnx.Linear(features, 2 * features, rngs=rngs)
        self.down = nnx.LinearGeneral(2 * features, features, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.dropout(self.down(nnx.gelu(self.up(x))))


class NNXTransformer(nnx.Module):
    """Language model with a list of blocks, stacked layers under a scan, and a tied head."""

    def __init__(self, rngs, *, vocab=13, features=8):
        self.embed = nnx.Embed(vocab, features, rngs=rngs)
        self.layers = nnx.List([NNXBlock(features, rngs) for _ in range(2)])

        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def stack(rngs):
            return nnx.Linear(features, features, rngs=rngs)

        self.stack = stack(rngs)
        self.mix = nnx.Einsum("btd,hdk->bhtk", (2, features, 4), (2, 4), rngs=rngs)
        self.window = nnx.Conv(features, features, (3,), padding="CAUSAL", rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def go(x, layer):
            return x + nnx.tanh(layer(x))

        y = self.mix(go(x, self.stack))
        y = self.window(y.transpose(0, 2, 1, 3).reshape(x.shape))
        return self.embed.attend(y)


class OwnEinsum(nnx.Module):
    """An einsum of one's own, as large language models in NNX have it."""

    def __init__(self, equation, shape, rngs):
        self.equation = equation
        self.w = nnx.Param(nnx.initializers.normal()(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...])


class NNXOwn(nnx.Module):
    """Einsums of one's own, and a kernel that is used a second time, raw."""

    def __init__(self, rngs):
        self.q = OwnEinsum("btd,ndh->btnh", (2, 8, 4), rngs)
        self.o = OwnEinsum("btnh,nhd->btd", (2, 4, 8), rngs)
        self.tied = nnx.Linear(8, 8, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.tied(self.o(self.q(x))) @ self.tied.kernel[...].T


def moved(state, key=0, by=0.1):
    """Returns an adapter whose trainable arrays are moved away from their start."""
    leaves, tree = jax.tree.flatten(state.trainable)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    new = [x + by * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return state.replace(trainable=jax.tree.unflatten(tree, new))
