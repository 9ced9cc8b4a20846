"""Modules of version 0.1 under their old names, which one minor version keeps."""

from kernels_pallas import renamed

MOVED = {
    "configs.common": "peft_jax.training.config_files",
    "eval.mt_bench.budget": "eval.mt_bench.judge_budget",
    "eval.mt_bench.files": "eval.mt_bench.benchmark_files",
    "eval.progress": "peft_jax.runtime.progress",
    "peft_jax.adapters.plan": "peft_jax.adapters.targets",
    "peft_jax.arguments": "peft_jax.runtime.flags",
    "peft_jax.command_line": "peft_jax.commands.config_flags",
    "peft_jax.core.activations": "peft_jax.core.activation_axes",
    "peft_jax.core.checks": "peft_jax.core.validation",
    "peft_jax.core.convert": "peft_jax.core.typed_settings",
    "peft_jax.core.quantised": "peft_jax.core.quantized",
    "peft_jax.data.files": "peft_jax.data.data_files",
    "peft_jax.data.labelled": "peft_jax.data.labeled",
    "peft_jax.exits": "peft_jax.runtime.exits",
    "peft_jax.generation.buckets": "peft_jax.generation.padded_prompts",
    "peft_jax.hub.files": "peft_jax.runtime.files",
    "peft_jax.hub.leaves": "peft_jax.hub.leaf_sources",
    "peft_jax.hub.peft_forms": "peft_jax.adapters.peft_form",
    "peft_jax.hub.place": "peft_jax.hub.leaf_loading",
    "peft_jax.parallel.activations": "peft_jax.parallel.activation_sharding",
    "peft_jax.parallel.arithmetic": "peft_jax.cost.flops",
    "peft_jax.parallel.chips": "peft_jax.cost.chips",
    "peft_jax.parallel.collectives": "peft_jax.cost.collectives",
    "peft_jax.parallel.memory": "peft_jax.cost.memory",
    "peft_jax.parallel.running": "peft_jax.parallel.activation_sharding",
    "peft_jax.parallel.topology": "peft_jax.cost.topology",
    "peft_jax.plan.command": "peft_jax.commands.plan",
    "peft_jax.plan.memory": "peft_jax.plan.step_memory",
    "peft_jax.training.arithmetic": "peft_jax.training.step_flops",
    "peft_jax.training.classification": "peft_jax.training.classifier_evaluation",
    "peft_jax.training.clock": "peft_jax.runtime.clock",
    "peft_jax.training.config_flags": "peft_jax.commands.config_flags",
    "peft_jax.training.convert": "peft_jax.core.typed_settings",
    "peft_jax.training.cpu_memory": "peft_jax.runtime.cpu_allocator",
    "peft_jax.training.errors": "peft_jax.runtime.errors",
    "peft_jax.training.files": "peft_jax.runtime.files",
    "peft_jax.training.inbox": "peft_jax.runtime.pending",
    "peft_jax.training.inputs": "peft_jax.training.input_digests",
    "peft_jax.training.interruption": "peft_jax.runtime.interruption",
    "peft_jax.training.metrics": "peft_jax.training.report.metrics",
    "peft_jax.training.other_names": "peft_jax.training.setting_aliases",
    "peft_jax.training.plots": "peft_jax.training.report.plots",
    "peft_jax.training.processes": "peft_jax.runtime.processes",
    "peft_jax.training.progress": "peft_jax.runtime.progress",
    "peft_jax.training.summary": "peft_jax.training.report.summary",
}
"""Old name → new name. The old names will be removed in version 0.3."""


def install() -> None:
    """Lets modules be imported under their old names."""
    renamed.install(MOVED)
