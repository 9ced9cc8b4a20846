r"""Plans a run for devices that need not be present.

    peft-jax plan --config=hybrid_405b.py --topology=v5p:4x4x8

This compiles the training step of the configuration, and reports its memory,
its time, and whether it fits. --search finds the smallest topology on which it
fits. Neither a TPU nor the checkpoint is needed: docs/planning.md.

Exit codes: 0 it fits; 1 failed; 2 rejected, the message says what would work;
4 it does not fit. docs/exit_codes.md has those of all commands.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from peft_jax.commands.config_flags import ConfigArguments
from peft_jax.runtime import exits
from peft_jax.runtime.errors import RefusedError

NAME = "peft_jax.plan"


@exits.command(NAME)
def main(argv: Sequence[str] | None = None) -> int:
    """Plans the configuration of the command line, and returns the exit code.

    Args:
      argv: The command line without the program's name; None: that of this process.
    """
    return plan_given(make_parser().parse_args(argv))


def make_parser() -> ConfigArguments:
    """Returns the parser of the command's flags."""
    parser = ConfigArguments(NAME, description=__doc__)
    add_plan_flags(parser.add_argument_group("planning"))
    return parser


def add_plan_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of planning."""
    group.add_argument(
        "--search",
        action="store_true",
        help="plan on larger and larger topologies of the kind in --topology, until the step fits",
    )
    group.add_argument(
        "--topology",
        default="",
        metavar="DEVICES",
        help="devices to plan for: v5p:4x4x8, v5e:16x16*2 (two slices), or cpu or gpu for those"
        " of this machine, which is the default; with --search only a kind of TPU, v5p",
    )
    group.add_argument("--json", action="store_true", help="print the plan as JSON")


def plan_given(given: argparse.Namespace) -> int:
    """Plans, prints the plan, and returns the exit code.

    Args:
      given: The flags of `add_plan_flags`, and the configuration.

    Raises:
      RefusedError: The configuration cannot be planned.
      ValueError: There is no such topology.
    """
    # Imported here, so that a mistyped flag is rejected at once and not after JAX has started.
    import jax

    from peft_jax.cost import find_topology
    from peft_jax.cost.topology import HERE
    from peft_jax.plan import describe, make_plan, search
    from peft_jax.training.config import from_config_dict

    config = from_config_dict(given.config.values)
    name = given.topology or _platform_here()
    if name not in HERE:
        # Planning does not need a TPU of this machine, which another process may use.
        jax.config.update("jax_platforms", "cpu")
    if given.search:
        plan, layout = search(config, name, say=_say)
        if layout is not None:
            _say(f"best layout: {layout.flags()}")
    else:
        plan = make_plan(config, find_topology(name))
    print(json.dumps(plan.to_mapping(), indent=2) if given.json else describe(plan))
    return exits.ExitCode.DONE if plan.fits else exits.ExitCode.DOES_NOT_FIT


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _platform_here() -> str:
    import jax

    from peft_jax.cost.topology import HERE, has_tpu, skip_tpu_discovery

    if not has_tpu():
        skip_tpu_discovery()
    platform = jax.default_backend()
    if platform not in HERE:
        raise RefusedError(
            f"--topology must be given on a machine with {platform!r} devices, for example"
            " --topology=v5p:4x4x8"
        )
    return platform


if __name__ == "__main__":
    sys.exit(main())
