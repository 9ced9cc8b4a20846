"""Programs whose end is not theirs to report."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TestedProgram:
    """A program that defines a function, and a test of it that the program cannot reach.

    The two run in processes of their own. The test's function is a stand-in: it sends its arguments
    to the program's process, and gives back the values that come from there. So the program sees
    neither the test nor the names it uses, and what it does to its own interpreter changes nothing
    in the process that compares values and reports the end.

    Attributes:
      source: Python source that defines the function.
      function: The function's name.
      given: Python source that the test's process runs first: names that the test needs besides.
      test: Python source that passes if it comes to its end. It may use `function`.
    """

    __test__ = False  # Not a class of tests, whatever its name.

    source: str
    function: str
    given: str = ""
    test: str
