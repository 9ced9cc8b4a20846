"""Reads einsum equations of an input and a kernel as products with a matrix."""

import dataclasses
import string


@dataclasses.dataclass(frozen=True, kw_only=True)
class Equation:
    """An equation such as "BTD,NDH->BTNH".

    Attributes:
      x: Letters of the input; "..." for axes that only the input and the result have.
      kernel: Letters of the kernel.
      result: Letters of the result.

    Example:
      >>> equation = Equation.parse("...D,NDH->...NH").expand(3)
      >>> equation.inputs, equation.outputs, equation.contracted
      ((1,), (0, 2), (2,))
    """

    x: str
    kernel: str
    result: str

    @classmethod
    def parse(cls, text: str) -> "Equation":
        """Returns the equation of a text.

        Raises:
          ValueError: It is not the product of an input and a kernel that is a matrix.
        """
        operands, arrow, result = text.replace(" ", "").partition("->")
        x, comma, kernel = operands.partition(",")
        if not (arrow and comma) or "," in kernel or "." in kernel:
            raise ValueError(
                f"its equation is {text!r}, but must have an input, a kernel without an ellipsis,"
                " and a result"
            )
        equation = cls(x=x, kernel=kernel, result=result)
        letters = [part.replace("...", "") for part in (x, kernel, result)]
        summed = [c for c in letters[0] if c not in letters[1] + letters[2]]
        summed += [c for c in letters[1] if c not in letters[0] + letters[2]]
        if any(len(set(part)) != len(part) for part in letters) or summed:
            raise ValueError(
                f"its equation {text!r} is no product with a matrix, because a letter is twice in"
                " one operand, or is summed over one operand alone"
            )
        return equation

    def expand(self, ndim: int) -> "Equation":
        """Returns the equation with letters for the ellipsis of an input of `ndim` axes."""
        missing = ndim - len(self.x.replace("...", ""))
        free = [c for c in string.ascii_letters if c not in self.x + self.kernel + self.result]
        letters = "".join(free[:missing])
        return dataclasses.replace(
            self, x=self.x.replace("...", letters), result=self.result.replace("...", letters)
        )

    @property
    def inputs(self) -> tuple[int, ...]:
        """Axes of the kernel that are contracted."""
        return tuple(axis for axis, c in enumerate(self.kernel) if c not in self.result)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Axes of the kernel that the input does not have."""
        return tuple(axis for axis, c in enumerate(self.kernel) if c not in self.x)

    @property
    def batch(self) -> tuple[int, ...]:
        """Axes of the kernel that input and result have too."""
        both = set(self.x) & set(self.result)
        return tuple(axis for axis, c in enumerate(self.kernel) if c in both)

    @property
    def contracted(self) -> tuple[int, ...]:
        """Axes of the input that are contracted, in the order of `inputs`."""
        return tuple(self.x.index(self.kernel[axis]) for axis in self.inputs)

    @property
    def batched(self) -> tuple[int, ...]:
        """Axes of the input that belong to `batch`, in its order."""
        return tuple(self.x.index(self.kernel[axis]) for axis in self.batch)

    @property
    def order(self) -> tuple[int, ...]:
        """Axes of [*batch, *free, *outputs] in the order of the result."""
        free = [c for c in self.x if c not in self.kernel]
        ordered = [*(self.kernel[axis] for axis in self.batch), *free]
        ordered += [self.kernel[axis] for axis in self.outputs]
        return tuple(ordered.index(c) for c in self.result)
