"""Defines programs that are tested in another process."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TestedProgram:
    """Program that defines a function, and a test that the program cannot access.

    Program and test run in separate processes. In the test, the function is a proxy: it sends its
    arguments to the program's process and returns the values from there. The program therefore
    cannot see the test or its names, and tampering with its own interpreter does not affect the
    process that compares values and reports the result.

    Attributes:
      source: Python source that defines the function.
      function: Name of the function.
      given: Python source that the test's process runs first, to define further names.
      test: Python source that passes if it completes. It may use `function`.
    """

    __test__ = False  # Keeps pytest from collecting the class.

    source: str
    function: str
    given: str = ""
    test: str
