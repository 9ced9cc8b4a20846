"""Maps each leaf of the parameters to its tensor in a Hugging Face checkpoint."""

import dataclasses
from collections.abc import Sequence

from peft_jax.core import STACKED, UNTRAINED, Path, is_experts, is_stacked

LM_HEAD = "lm_head"
"""Name of a causal language model's head."""

CLASSIFIER = "classifier"
"""Name of a classifier's head."""


Index = tuple[int | slice, ...]
"""Part of a leaf, along its leading axes."""

_OWN_NAMES = ("bias", "sinks", *UNTRAINED)
"""Leaves whose tensors have their name; those of others are called "weight"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HFTensor:
    """A leaf's parameter in transformers; one tensor per layer if the leaf is stacked.

    Attributes:
      template: Name of the tensor, with "{layer}" in place of the layer's number if stacked.
      transposed: Whether transformers has [out, in] where the leaf is [in, out].
      first: First layer that has the tensor. The model does not use the leaf's rows before it.
      layers: Layers that the leaf has rows for; () for all.
      stored: Names of the tensors in checkpoints, where these differ: with "{expert}" in place of
        an expert's number if each expert has its own. The outputs of several are joined.
    """

    template: str
    transposed: bool
    first: int = 0
    layers: tuple[int, ...] = ()
    stored: tuple[str, ...] = ()

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
        numbers = self.numbers(layers)
        return {row: self.name(numbers[row]) for row in range(self.first, len(numbers))}

    def numbers(self, layers: int) -> Sequence[int]:
        """Returns the layer of each row of a stacked leaf, in a model of `layers` layers.

        Example:
          >>> HFTensor(template="{layer}.up", transposed=True, layers=(2, 5)).rows(6)
          {0: '2.up', 1: '5.up'}
        """
        return self.layers or range(layers)

    def stored_names(self, shape: tuple[int, ...]) -> list[tuple[Index, str]]:
        """Returns pairs of a part of the leaf and the name of its tensor in a checkpoint.

        Args:
          shape: Shape of the leaf.

        Example:
          >>> HFTensor(template="ln.{layer}", transposed=False).stored_names((2, 8))
          [((0,), 'ln.0'), ((1,), 'ln.1')]
          >>> names = ("{layer}.{expert}.gate", "{layer}.{expert}.up")
          >>> up = HFTensor(template="", transposed=True, stored=names)
          >>> for index, name in up.stored_names((1, 2, 8, 6)):
          ...     print(name, "has expert", index[1], "and outputs from", index[3].start)
          0.0.gate has expert 0 and outputs from 0
          0.0.up has expert 0 and outputs from 3
          0.1.gate has expert 1 and outputs from 0
          0.1.up has expert 1 and outputs from 3
        """
        if not self.stored:
            rows = self.rows(shape[0] if shape else 0)
            return [(() if layer is None else (layer,), name) for layer, name in rows.items()]
        if "{expert}" not in self.stored[0]:
            (name,) = self.stored
            return [
                ((row,), name.format(layer=layer))
                for row, layer in enumerate(self.numbers(shape[0]))
            ]
        width = shape[-1] // len(self.stored)
        return [
            (
                (row, expert, slice(None), slice(at * width, (at + 1) * width)),
                name.format(layer=layer, expert=expert),
            )
            for row, layer in enumerate(self.numbers(shape[0]))
            for expert in range(shape[1])
            for at, name in enumerate(self.stored)
        ]

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of each tensor in a checkpoint, for a leaf of this shape."""
        index, _ = self.stored_names(shape)[0]
        whole = shape[sum(isinstance(one, int) for one in index) :]
        parts = len(self.stored) if len(index) > 1 else 1
        d_out = whole[-1:] and (whole[-1] // parts,)
        one = (*whole[:-1], *d_out)
        return (*one[:-2], one[-1], one[-2]) if self.transposed else one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
    """Module names of one family of checkpoints.

    Attributes:
      prefix: Prefix of every module except the head: "model", "transformer", "bert".
      blocks: Name of the list of transformer blocks: "layers", "h", "encoder.layer".
      heads: Modules whose names do not begin with the prefix.
      renamed: Pairs of a module of a block and its name in checkpoints, where blocks of several
        forms have modules of one name but of different shapes.
      later: Modules of a block that the first block lacks.
      conv1d: Whether the blocks' kernels are stored [in, out], as transformers' `Conv1D` has them.
      experts_conv1d: Whether those of experts are.
      experts_swapped: Whether PEFT takes the inputs of experts' kernels for their outputs.
      stored: Pairs of a module in a block and the tensors of its kernel in checkpoints, where these
        differ from the parameter in transformers; see `HFTensor`.

    Example:
      >>> naming = Naming(prefix="model", blocks="layers")
      >>> naming.module(("layers", "mlp", "up_proj", "kernel"), layer=3)
      'model.layers.3.mlp.up_proj'
      >>> naming.tensor(("lm_head", "kernel"))
      HFTensor(template='lm_head.weight', transposed=True, first=0, layers=(), stored=())
    """

    prefix: str
    blocks: str
    heads: tuple[str, ...] = (LM_HEAD, CLASSIFIER)
    renamed: tuple[tuple[str, str], ...] = ()
    later: tuple[str, ...] = ()
    conv1d: bool = False
    experts_conv1d: bool = False
    experts_swapped: bool = False
    stored: tuple[tuple[str, tuple[str, ...]], ...] = ()

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
        names = dict(self.renamed)
        own = (names.get(name, name) for name in modules[1:])
        return ".".join((self.prefix, self.blocks, str(layer), *own))

    def tensor(self, path: Path) -> HFTensor:
        """Returns the tensor of the leaf at `path`."""
        module = self.module(path, "{layer}" if is_stacked(path) else None)
        leaf = path[-1]
        first = int(is_stacked(path) and path[1] in self.later)
        as_stored = self.experts_conv1d if is_experts(path) else self.conv1d and is_stacked(path)
        if is_experts(path):
            # The modules of experts are parameters of one module in transformers.
            name = module if leaf == "kernel" else f"{module}_{leaf}"
        else:
            name = f"{module}.{leaf if leaf in _OWN_NAMES else 'weight'}"
        stored = dict(self.stored).get(".".join(path[1:-1]), ()) if leaf == "kernel" else ()
        block = f"{self.prefix}.{self.blocks}.{{layer}}"
        return HFTensor(
            template=name,
            transposed=leaf == "kernel" and not as_stored,
            first=first,
            stored=tuple(f"{block}.{one}" for one in stored),
        )
