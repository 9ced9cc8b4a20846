"""Maps each leaf of the parameters to its tensor in a Hugging Face checkpoint."""

import dataclasses

from peft_jax.core import STACKED, Path, is_stacked

LM_HEAD = "lm_head"
"""Name of a causal language model's head."""

CLASSIFIER = "classifier"
"""Name of a classifier's head."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HFTensor:
    """A leaf's tensor in a Hugging Face checkpoint; one tensor per layer if the leaf is stacked.

    Attributes:
      template: Name of the tensor, with "{layer}" in place of the layer's number if stacked.
      transposed: Whether the file stores [out, in] where the leaf is [in, out].
      first: First layer that has the tensor. The model does not use the leaf's rows before it.
    """

    template: str
    transposed: bool
    first: int = 0

    def name(self, layer: int | None = None) -> str:
        """Returns the tensor's name, for one layer if the leaf is stacked."""
        return self.template.format(layer=layer)

    def rows(self, layers: int) -> dict[int | None, str]:
        """Returns the names of the tensors of a model of `layers` layers, by row of the leaf.

        Example:
          >>> HFTensor(template="h.{layer}.ln.weight", transposed=False, first=1).rows(3)
          {1: 'h.1.ln.weight', 2: 'h.2.ln.weight'}
          >>> HFTensor(template="ln.weight", transposed=False).rows(3)
          {None: 'ln.weight'}
        """
        if "{layer}" not in self.template:
            return {None: self.name()}
        return {layer: self.name(layer) for layer in range(self.first, layers)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
    """Module names of one family of checkpoints.

    Attributes:
      prefix: Prefix of every module except the head: "model", "transformer", "bert".
      blocks: Name of the list of transformer blocks: "layers", "h", "encoder.layer".
      heads: Modules whose names do not begin with the prefix.
      later: Modules of a block that the first block lacks.
      conv1d: Whether the blocks' kernels are stored [in, out], as transformers' `Conv1D` has them.

    Example:
      >>> naming = Naming(prefix="model", blocks="layers")
      >>> naming.module(("layers", "mlp", "up_proj", "kernel"), layer=3)
      'model.layers.3.mlp.up_proj'
      >>> naming.tensor(("lm_head", "kernel"))
      HFTensor(template='lm_head.weight', transposed=True, first=0)
    """

    prefix: str
    blocks: str
    heads: tuple[str, ...] = (LM_HEAD, CLASSIFIER)
    later: tuple[str, ...] = ()
    conv1d: bool = False

    def module(self, path: Path, layer: int | str | None = None) -> str:
        """Returns the dotted name of the module that holds the leaf at `path`.

        Raises:
          ValueError: The leaf is stacked and `layer` is None.
        """
        modules = path[:-1]
        if modules[0] in self.heads:
            return ".".join(modules)
        if not is_stacked(path):
            return ".".join((self.prefix, *modules))
        if layer is None:
            raise ValueError(
                f"layer is None, but {'.'.join(path)} is stacked over {STACKED}: pass the layer's"
                " number"
            )
        return ".".join((self.prefix, self.blocks, str(layer), *modules[1:]))

    def tensor(self, path: Path) -> HFTensor:
        """Returns the tensor of the leaf at `path`."""
        module = self.module(path, "{layer}" if is_stacked(path) else None)
        leaf = path[-1]
        suffix = "bias" if leaf == "bias" else "weight"
        first = int(is_stacked(path) and path[1] in self.later)
        transposed = leaf == "kernel" and not (self.conv1d and is_stacked(path))
        return HFTensor(template=f"{module}.{suffix}", transposed=transposed, first=first)
