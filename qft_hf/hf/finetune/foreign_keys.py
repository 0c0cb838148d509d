"""Names of our keys in other tools: a config that was written for one gets the right suggestion.

The tools are axolotl, LLaMA-Factory, torchtune, TRL, unsloth and the example scripts of
transformers.
"""

# Our names, each with those of other tools.
_NAMES = """
    model_name_or_path: model model_name model_path base_model model_id
    model_revision: revision base_model_revision
    tokenizer_name_or_path: tokenizer tokenizer_name tokenizer_config
    chat_template: template chat_template_jinja conversation_template
    dtype: torch_dtype precision
    attn_implementation: flash_attention flash_attn use_flash_attention_2
    task: stage
    train_data: dataset datasets dataset_name dataset_path data_path train_file train_dataset
    train_split: dataset_train_split split
    train_config: dataset_config dataset_config_name
    eval_data: eval_dataset test_datasets validation_file eval_file val_data
    eval_split: dataset_test_split
    eval_fraction: val_size val_set_size test_size
    max_train_rows: max_samples max_train_samples
    max_eval_rows: max_eval_samples
    messages_field: field_messages conversation_column messages_column
    text_field: dataset_text_field text_column text_column_name
    label_field: label_column label_column_name
    max_length: cutoff_len sequence_len sequence_length max_seq_length max_seq_len
    max_length: model_max_length block_size
    packing: sample_packing packed dataset_packed
    preprocessing_workers: preprocessing_num_workers dataset_num_proc dataset_processes num_proc
    overwrite_output: overwrite_output_dir overwrite
    output_dir: output out_dir output_path save_path
    learning_rate: lr base_lr
    num_train_epochs: epochs num_epochs n_epochs max_epochs
    max_steps: total_steps num_steps iters
    per_device_train_batch_size: micro_batch_size batch_size train_batch_size
    per_device_eval_batch_size: eval_batch_size
    gradient_accumulation_steps: gradient_accumulation accumulation_steps
    optim: optimizer optimizer_name
    lr_scheduler_type: lr_scheduler scheduler
    max_grad_norm: gradient_clipping clip_grad_norm grad_clip
    warmup_steps: warmup num_warmup_steps warmup_ratio
    weight_decay: wd
    beta1: lion_beta1
    beta2: lion_beta2
    gradient_checkpointing: use_gradient_checkpointing
    report_to: wandb_project use_wandb logger
"""
_REMARKS = {
    "train_on_inputs": "'assistant_only_loss', which is its opposite",
    "train_on_prompt": "'assistant_only_loss', which is its opposite",
    "completion_only_loss": "'assistant_only_loss'",
    "validation_split_percentage": "'eval_fraction', which is a share: 0.05, not 5",
}
_NO_ADAPTERS = """
    adapter finetuning_type load_in_8bit load_in_4bit lora_alpha lora_dropout lora_r lora_rank
    lora_target lora_target_modules quantization_bit use_peft
""".split()

_ROWS = [row.split(":") for row in _NAMES.strip().splitlines()]
OURS = {name: repr(ours.strip()) for ours, names in _ROWS for name in names.split()} | _REMARKS


def suggestion(name: str) -> str | None:
    """Return what to do with a key of another tool, None for a key that none of them has."""
    if name in _NO_ADAPTERS:
        return (
            "Leave it out: every parameter is trained, in INT8, so there is no adapter. To train a "
            "small network on a frozen base, set method to qst; base says how the base is stored."
        )
    if name == "streaming":
        return "Leave it out: rows are kept on disk, not in memory, and all are read and counted."
    return f"Here it is called {OURS[name]}." if name in OURS else None
