r"""Compares estimated with published speeds of MaxText's training step.

    python -m benchmarks.maxtext --output=out/maxtext

It compiles a step with MaxText's layout (`benchmarks.maxtext_step`) for the devices of each
published run, adds up its time, and prints the table of docs/planning.md. Programs that exist as
`out/maxtext/NAME.txt` are not compiled again. The estimate's constants are those of every plan.

Sources, in the repository AI-Hypercomputer/maxtext: the figures are in
docs/reference/models/tiering.md; the configurations, at the commits that it names, in
benchmarks/maxtext_v5p_model_configs.py and benchmarks/maxtext_trillium_model_configs.py, with flags
in benchmarks/xla_flags_library.py. The last run is not in that list. It is in
AI-Hypercomputer/tpu-recipes at c8cfe2f, training/v5p/Llama3.1-405B-MaxText/README.md (131.474 s,
314.530 TFLOP/s and 124.618 tokens/s a device), with its configuration at maxtext's 3eb77db3.
"""

import dataclasses
import sys
import time
from pathlib import Path

from benchmarks.maxtext_step import Case, make_mesh
from peft_jax.cost import Timeline, estimate_program, find_topology, network_of, read_program
from peft_jax.plan.compiler import compile_task
from peft_jax.plan.text import table
from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

ASYNC_GATHERS = {
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_enable_instruction_fusion": "false",
    "xla_sc_disable_megacore_partitioning": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
    "xla_max_concurrent_async_all_gathers": "4",
    "xla_tpu_enable_concurrent_sparse_core_offloading": "true",
    "xla_tpu_sparse_core_all_gather_latency_multiplier": "2",
}
"""Options that make gathers asynchronous, as all of MaxText's configurations here do.

Their flags (CF_FOR_ALL_GATHER) do it by continuation fusions, which libtpu 0.0.52 refuses except on
v5e. So the SparseCore sends here. Other collectives stay synchronous, as with those flags.
"""
DATA_PARALLEL = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
HOST_OFFLOAD = {
    "xla_tpu_enable_all_experimental_scheduler_features": "true",
    "xla_tpu_enable_scheduler_memory_pressure_tracking": "true",
    "xla_tpu_host_transfer_overlap_limit": "24",
    "xla_tpu_aggressive_opt_barrier_removal": "ENABLED",
    "xla_lhs_prioritize_async_depth_over_stall": "ENABLED",
    "xla_tpu_enable_ag_backward_pipelining": "true",
    "xla_should_allow_loop_variant_parameter_in_chain": "ENABLED",
    "xla_should_add_loop_invariant_op_in_chain": "ENABLED",
    "xla_max_concurrent_host_send_recv": "100",
    "xla_tpu_scheduler_percent_shared_memory_limit": "100",
    "xla_latency_hiding_scheduler_rerun": "2",
}
BLOCKS = (
    "block_q",
    "block_kv",
    "block_kv_compute",
    "block_q_dkv",
    "block_kv_dkv",
    "block_kv_dkv_compute",
)
SCOPED_MEMORY = {"xla_tpu_scoped_vmem_limit_kib": "98304"}
LLAMA_70B = {"width": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "mlp": 28672}
LLAMA_405B = {"width": 16384, "layers": 126, "heads": 128, "kv_heads": 8, "mlp": 53248}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A published run.

    Attributes:
      name: Name of the file that keeps its program.
      model: Model and devices, as text.
      configuration: Name in MaxText's list of configurations.
      case: The step.
      utilization: Published utilization.
      tokens: Published tokens per second and chip.
      halved: Whether that utilization counts half of attention's pairs, as causal attention needs.
    """

    name: str
    model: str
    configuration: str
    case: Case
    utilization: float
    tokens: float
    halved: bool


RUNS = (
    Published(
        name="llama2-70b-v5p",
        model="Llama 2 70B on v5p-512 (256 chips)",
        configuration="llama2_70b_v5p_128",
        case=Case(
            topology="v5p:4x8x8",
            fsdp=256,
            tensor=1,
            rows=4,
            tokens=4096,
            **LLAMA_70B,
            vocab=32000,
            vocab_tiles=1,
            saved=("query_proj", "key_proj", "value_proj", "out_proj", "mlpwo"),
            offloaded=(),
            blocks={},
            options=ASYNC_GATHERS | DATA_PARALLEL,
        ),
        utilization=0.654,
        tokens=692,
        halved=True,
    ),
    Published(
        name="llama3.1-70b-v6e",
        model="Llama 3.1 70B on v6e-256",
        configuration="llama3_1_70b_8192",
        case=Case(
            topology="v6e:16x16",
            fsdp=256,
            tensor=1,
            rows=5,
            tokens=8192,
            **LLAMA_70B,
            vocab=128256,
            vocab_tiles=1,
            saved=(),
            offloaded=("decoder_layer_input", "query_proj", "key_proj", "value_proj"),
            blocks=dict.fromkeys(BLOCKS, 2048) | {"use_fused_bwd_kernel": 1},
            options=ASYNC_GATHERS | DATA_PARALLEL | HOST_OFFLOAD | SCOPED_MEMORY,
        ),
        utilization=0.5033,
        tokens=960,
        halved=False,
    ),
    Published(
        name="llama3.1-405b-v6e",
        model="Llama 3.1 405B on 2 x v6e-256",
        configuration="llama3_1_405b_8192_fsdp_dcn",
        case=Case(
            topology="v6e:16x16*2",
            fsdp=128,
            tensor=4,
            rows=1,
            tokens=8192,
            **LLAMA_405B,
            vocab=128256,
            vocab_tiles=1,
            saved=(),
            offloaded=("decoder_layer_input", "query_proj", "key_proj", "value_proj", "out_proj"),
            blocks={"block_q": 1024, "block_q_dkv": 2048, "block_q_dq": 2048},
            options=ASYNC_GATHERS | HOST_OFFLOAD | SCOPED_MEMORY,
        ),
        utilization=0.3855,
        tokens=123,
        halved=False,
    ),
    Published(
        name="llama3.1-405b-v5p",
        model="Llama 3.1 405B on v5p-1024 (512 chips)",
        configuration="llama3_1_405b_8192_v5p_1024",
        case=Case(
            topology="v5p:8x8x8",
            fsdp=512,
            tensor=1,
            rows=2,
            tokens=8192,
            **LLAMA_405B,
            vocab=128256,
            vocab_tiles=4,
            saved=(),  # A layer's input stays on the device in any case.
            offloaded=("context", "mlpwo"),
            blocks=dict.fromkeys((*BLOCKS, "block_q_dq", "block_kv_dq"), 2048),
            options=ASYNC_GATHERS | HOST_OFFLOAD | SCOPED_MEMORY,
        ),
        utilization=0.6853,
        tokens=124.6,
        halved=True,
    ),
)


def model_flops(case: Case, *, halved: bool) -> float:
    """Returns the model's operations a token, by MaxText's `calculate_tflops_training_per_device`.

    Six a parameter without the embedding, and attention's twelve a pair of tokens and feature, or
    half of them.
    """
    attention = case.width * (2 * case.heads + 2 * case.kv_heads) * 128
    parameters = case.layers * (attention + 3 * case.width * case.mlp) + case.width * case.vocab
    pairs = 12.0 * case.layers * case.heads * 128 * case.tokens
    return 6.0 * parameters + (pairs / 2 if halved else pairs)


def estimate(run: Published, folder: Path) -> Timeline | None:
    """Returns the estimated time of a run's step; None if the step does not fit."""
    file = folder / f"{run.name}.txt"
    if not file.is_file():
        started = time.perf_counter()
        report = compile_task("benchmarks.maxtext_step", dataclasses.asdict(run.case))
        seconds = time.perf_counter() - started
        print(f"{run.name}: compiled in {seconds:.0f} s. {report.out_of_memory}", file=sys.stderr)
        if not report.program:
            return None
        file.write_text(report.program, encoding="utf-8")
    topology, mesh = find_topology(run.case.topology), make_mesh(run.case)
    assert topology.chip is not None
    network = network_of(
        list(mesh.devices.flat),
        run.case.topology.partition(":")[0],
        topology.chip.per_chip,
        topology.slices,
    )
    program = read_program(file.read_text(encoding="utf-8"))
    return estimate_program(program, chip=topology.chip, network=network)


HEAD = (
    "run",
    "s a step",
    "products",
    "memory",
    "transfers",
    "hidden",
    "tokens/s a chip",
    "published",
    "ratio",
    "if none were hidden",
    "utilization",
    "published",
)
"""Columns of the table; four of them are seconds. "transfers" are those that are not hidden."""


def rows_of(folder: Path) -> list[list[str]]:
    """Returns the table's rows."""
    rows = [list(HEAD)]
    for run in RUNS:
        found = estimate(run, folder)
        if found is None:
            blank = [""] * (len(HEAD) - 2)
            rows.append([run.model, "does not fit", *blank])
            continue
        chip = find_topology(run.case.topology).chip
        assert chip is not None
        speed = run.case.rows * run.case.tokens / found.total
        exposed = run.case.rows * run.case.tokens / (found.total + found.hidden())
        share = speed * model_flops(run.case, halved=run.halved) / chip.flops
        kinds = found.by_kind()
        rows.append(
            [
                run.model,
                f"{found.total:.1f}",
                f"{kinds['products']:.1f}",
                f"{kinds['memory'] + kinds['elementwise']:.1f}",
                f"{found.unhidden():.1f}",
                f"{found.hidden():.1f}",
                f"{speed:.0f}",
                f"{run.tokens:.0f}",
                f"{speed / run.tokens:.2f}",
                f"{exposed / run.tokens:.2f}",
                f"{share:.1%}",
                f"{run.utilization:.1%}",
            ]
        )
    return rows


@exits.command("benchmarks.maxtext")
def main() -> None:
    """Compiles missing programs, and prints the table."""
    parser = Arguments("benchmarks.maxtext", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("out/maxtext"), help="folder of the results"
    )
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    print(table(rows_of(folder)))


if __name__ == "__main__":
    sys.exit(main())
