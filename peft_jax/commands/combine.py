r"""Combines several adapters over one base into one LoRA adapter.

    peft-jax combine --adapter=runs/sql/adapter --weight=0.7 \
        --adapter=runs/chat/adapter --weight=0.3 --output=out
    peft-jax combine --adapter=one --weight=1 --adapter=two --weight=-0.5 \
        --type=ties --density=0.5 --output=out

The types are those of PEFT's add_weighted_adapter. cat is exact, with the sum of
the ranks. linear, ties, dare_linear, dare_ties and magnitude_prune merge the
factors of LoRA adapters of one rank. svd, and the same names with _svd, merge
what adapters of any method change, and truncate it to --rank.

The result is written with the tokenizer of the first adapter, for peft_jax, PEFT
and vLLM. The base model is the first adapter's own, unless --model names another.

Exit codes: 0 done; 1 failed; 2 rejected. docs/exit_codes.md has those of all
commands.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

NAME = "peft_jax.combine"
_TYPES = (
    *("cat", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"),
    *("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"),
)


@exits.command(NAME)
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit code.

    Args:
      argv: The command line without the program's name; None: that of this process.
    """
    given = make_parser().parse_args(argv)
    if len(given.adapter) != len(given.weight):
        raise ValueError(
            f"there are {len(given.adapter)} of --adapter but {len(given.weight)} of --weight; give"
            " one weight for each adapter, in the same order"
        )
    weights = dict(zip(given.adapter, given.weight, strict=True))
    if len(weights) < len(given.adapter):
        raise ValueError("an adapter is given twice; give each once, with its whole weight")
    # Imported here, so that a mistyped flag is rejected at once and not after JAX has started.
    from peft_jax.adapters import combine_adapters
    from peft_jax.generation.loading import base_of
    from peft_jax.hub import find_folder, load_adapter, load_params, read_config, save_adapter
    from peft_jax.hub.adapter_base import check_same_base, recorded_quantization
    from peft_jax.hub.tokenizer import load_tokenizer
    from peft_jax.models import build_model
    from peft_jax.runtime.files import atomic_folder
    from peft_jax.training.adapter_formats import check_output

    folders = {name: find_folder(name) for name in given.adapter}
    first = next(iter(folders.values()))
    check_output(given.output, first)
    if given.model is None:
        check_same_base(folders)
    name = given.model or base_of(first)
    base = find_folder(name)
    model = dataclasses.replace(build_model(read_config(base)), origin=str(base))
    params = load_params(base, model)
    adapters = {name: load_adapter(folder, model, params) for name, folder in folders.items()}
    spec, state = combine_adapters(
        params,
        adapters,
        weights,
        given.type,
        svd_rank=given.rank,
        density=given.density,
        majority_sign_method=given.majority_sign_method,
        seed=given.seed,
    )
    with atomic_folder(given.output) as temporary:
        quantization = recorded_quantization(first)
        save_adapter(temporary, model, spec, state, name, quantization=quantization)
        own = (first / "tokenizer_config.json").is_file()
        load_tokenizer(first if own else base).save_pretrained(temporary)
    print(f"wrote a LoRA adapter of rank {spec.method.rank} to {given.output}")  # type: ignore[attr-defined]
    return exits.ExitCode.DONE


def make_parser() -> Arguments:
    """Returns the parser of the command's flags."""
    parser = Arguments(NAME, description=__doc__)
    add = parser.add_argument
    add(
        "--adapter",
        action="append",
        required=True,
        help="folder of an adapter, or its name on the hub; given once for each adapter",
    )
    add(
        "--weight",
        action="append",
        required=True,
        type=float,
        help="weight of an adapter, in the order of --adapter; a negative one subtracts it",
    )
    add("--type", choices=_TYPES, default="svd", metavar="TYPE", help="combination type, as above")
    add(
        "--rank", type=int, help="rank of the result for the types with svd; by default the largest"
    )
    add(
        "--density",
        type=float,
        help="share of entries that pruning keeps, for the types that prune",
    )
    add(
        "--majority_sign_method",
        choices=("total", "frequency"),
        default="total",
        help="election of signs for the types with ties: by the sum, or by the number of adapters",
    )
    add("--seed", type=int, default=0, help="seed of the types with dare")
    add(
        "--model",
        help="folder of the base model, or its name on the hub; by default the first adapter's own",
    )
    add("--output", type=Path, required=True, help="folder to write to, which must be empty")
    return parser


if __name__ == "__main__":
    sys.exit(main())
