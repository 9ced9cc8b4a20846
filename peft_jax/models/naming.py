"""Which Hugging Face tensor each leaf of the parameters is."""

import dataclasses

from peft_jax.core import STACKED, Path, is_stacked

LM_HEAD = "lm_head"
"""What the head of a causal language model is called."""

CLASSIFIER = "classifier"
"""What the head of a classifier is called."""

HEADS = (LM_HEAD, CLASSIFIER)
"""The modules that do not stand under a family's prefix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HFTensor:
    """A leaf's tensor, or one tensor a layer, in a Hugging Face checkpoint.

    Attributes:
      template: the tensor's name; stacked leaves have "{layer}" where the layer's number goes.
      transposed: whether the file has [out, in] where the leaf has [in, out].
    """

    template: str
    transposed: bool

    def name(self, layer: int | None = None) -> str:
        """The tensor's name, of one layer where the leaf is stacked."""
        return self.template.format(layer=layer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
    """How one family of checkpoints names its modules.

    Attributes:
      prefix: what everything but the head stands under: "model", "transformer", "bert".
      blocks: what the transformer blocks stand under: "layers", "h", "encoder.layer".

    Example:
      >>> naming = Naming(prefix="model", blocks="layers")
      >>> naming.module(("layers", "mlp", "up_proj", "kernel"), layer=3)
      'model.layers.3.mlp.up_proj'
      >>> naming.tensor(("lm_head", "kernel"))
      HFTensor(template='lm_head.weight', transposed=True)
    """

    prefix: str
    blocks: str

    def module(self, path: Path, layer: int | str | None = None) -> str:
        """The dotted name of the module that holds the leaf at `path`.

        Raises:
          ValueError: a stacked leaf without `layer`.
        """
        modules = path[:-1]
        if modules[0] in HEADS:
            return ".".join(modules)
        if not is_stacked(path):
            return ".".join((self.prefix, *modules))
        if layer is None:
            raise ValueError(
                f"{'.'.join(path)} is stacked over {STACKED}: say which layer is meant"
            )
        return ".".join((self.prefix, self.blocks, str(layer), *modules[1:]))

    def tensor(self, path: Path) -> HFTensor:
        """The tensor (or one a layer) of the leaf at `path`."""
        module = self.module(path, "{layer}" if is_stacked(path) else None)
        leaf = path[-1]
        suffix = "bias" if leaf == "bias" else "weight"
        return HFTensor(template=f"{module}.{suffix}", transposed=leaf == "kernel")
