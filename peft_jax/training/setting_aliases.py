"""Maps other tools' names of settings to the names here, for error messages."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

_SAME = {
    "train.learning_rate": "lr peak_lr max_lr base_lr step_size",
    "train.batch_size": (
        "bs batch batchsize micro_batch_size train_batch_size global_batch_size"
        " per_device_train_batch_size per_device_batch_size"
    ),
    "train.epochs": "n_epochs num_epochs num_train_epochs max_epochs total_epochs",
    "train.steps": "n_steps num_steps max_steps num_train_steps total_steps iters max_iters",
    "train.gradient_accumulation": (
        "grad_accum grad_acc grad_accumulation gradient_accumulation_steps accumulation_steps"
        " accumulate_grad_batches grad_accum_steps"
    ),
    "train.max_length": (
        "max_len max_seq_length max_seq_len seq_len seq_length sequence_length sequence_len"
        " cutoff_len context_length model_max_length max_tokens max_source_length"
    ),
    "model.path": (
        "model_name model_name_or_path model_path model_id base_model checkpoint"
        " pretrained_model_name_or_path"
    ),
    "model.dtype": "torch_dtype bf16 fp16 precision mixed_precision",
    "model.quantization": "load_in_4bit load_in_8bit quantize bits quantization_bit",
    "method.name": "peft_type adapter_type finetuning_type peft_method",
    "method.rank": "r lora_r lora_rank lora_dim",
    "method.alpha": "lora_alpha",
    "method.dropout": "lora_dropout",
    "method.rank_stabilized": "use_rslora rslora",
    "method.target_modules": "lora_target_modules lora_target target_module targets",
    "method.modules_to_save": "lora_modules_to_save additional_target",
    "data.path": "dataset dataset_name dataset_path data_path train_file train_data train_path",
    "data.eval_path": "validation_file eval_file test_file eval_dataset validation_path eval_data",
    "data.packing": "sample_packing pack",
    "data.completion_only": "train_on_inputs train_on_responses_only completion_only_loss",
    "data.recipe": "data_format dataset_format dataset_type task task_name",
    "optimizer.name": "optim optimizer_type optimizer_name",
    "optimizer.weight_decay": "wd decay",
    "optimizer.clip_norm": "max_grad_norm grad_clip gradient_clip gradient_clipping clip_grad_norm",
    "optimizer.schedule.name": "lr_scheduler lr_scheduler_type scheduler lr_schedule",
    "optimizer.schedule.warmup_steps": "warmup num_warmup_steps lr_warmup_steps",
    "evaluate.every": "eval_steps eval_every eval_interval eval_freq",
    "checkpoint.every": "save_steps save_every save_interval checkpoint_every",
    "checkpoint.keep": "save_total_limit max_to_keep keep_last",
    "logging.every": "logging_steps log_every log_interval",
    "logging.wandb_project": "report_to wandb",
    "execution.remat": "gradient_checkpointing use_gradient_checkpointing checkpoint_activations",
    "execution.attention": "attn_implementation flash_attention flash_attn use_flash_attention",
    "parallel.devices": "num_devices n_gpus num_gpus gpus",
    "parallel.expert": "ep expert_parallel expert_parallel_size ep_size expert_model_parallel_size",
    "parallel.tensor": "tp tensor_parallel tensor_parallel_size tp_size",
    "seed": "random_seed rng_seed",
    "--workdir": "output_dir out_dir save_dir workdir resume_from_checkpoint run_name",
}
OTHER_NAMES: Mapping[str, str] = MappingProxyType(
    {name: setting for setting, names in _SAME.items() for name in names.split()}
)
"""Settings by their names in Hugging Face's libraries, Axolotl, LLaMA-Factory and the like."""


def settings_called(name: str, known: Mapping[str, Any]) -> list[str]:
    """Returns the settings that a name may mean: in another tool or in another section.

    Args:
      name: Last part of the given name.
      known: Nested mappings of every setting.

    Example:
      >>> settings_called("lr", {"train": {"learning_rate": None}})
      ['train.learning_rate']
      >>> settings_called("rank", {"train": {}, "method": {"rank": 8}})
      ['method.rank']
    """
    found = [path for path in _paths(known) if path.rpartition(".")[2] == name]
    return [OTHER_NAMES[name]] if name in OTHER_NAMES and not found else found


def check_names(given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Rejects settings that have another name here or belong to another section.

    Other unknown settings are left to the conversion.

    Raises:
      ValueError: There is such a setting.
    """
    for path in _unknown(given, known):
        meant = settings_called(path.rpartition(".")[2], known)
        if meant:
            names = " or ".join(meant[:3])
            raise ValueError(f"{path} is not a setting; did you mean {names}?")


def _unknown(given: Mapping[str, Any], known: Mapping[str, Any], where: str = "") -> Iterator[str]:
    for key, value in given.items():
        path = f"{where}{key}"
        if key not in known:
            yield path
        elif isinstance(value, Mapping) and isinstance(known[key], Mapping) and known[key]:
            yield from _unknown(value, known[key], f"{path}.")


def _paths(known: Mapping[str, Any], where: str = "") -> Iterator[str]:
    for key, value in known.items():
        if isinstance(value, Mapping) and value:
            yield from _paths(value, f"{where}{key}.")
        else:
            yield f"{where}{key}"
