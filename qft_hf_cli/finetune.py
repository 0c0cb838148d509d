"""Train every parameter of a model in INT8, or a side network next to a frozen model.

    qft-hf finetune demo                          the name of a config that ships with qft_hf
    qft-hf finetune my.yaml --learning_rate 5e-5 --output_dir runs/second
    qft-hf finetune --model_name_or_path org/model --train_data chats.jsonl --output_dir runs/first

A config is a flat YAML file. Each of its keys is also a flag, and flags override the config.
`qft-hf check my.yaml` shows what a config would do, and trains nothing.

model     --model_name_or_path  --chat_template  --new_tokens  --dtype  --attn_implementation
data      --train_data  --train_weights  --eval_data or --eval_fraction  --max_train_rows
          --task chat | text | classification | regression | multi_label  --max_length  --packing
          --messages_field or --prompt_field and --answer_field  --assistant_only_loss
          --text_field  --text_pair_field  --label_field  --max_eval_rows  --on_bad_row stop | skip
method    --method full | qst  and with qst: --base nf4 | int8 | float  --side_r  --side_downsample
          --side_rank
INT8      --optim qft_lion | qft_adamw | qft_sgd  --gradient stack | release  --clipping
          --matmul dequantize | int8  --group_size  --outlier_fraction  --chunked_loss
          --modules_to_not_convert
training  --learning_rate  --num_train_epochs  --max_steps  --per_device_train_batch_size
          --gradient_accumulation_steps  --gradient_checkpointing  --warmup_steps  --weight_decay
          --lr_scheduler_type  --max_grad_norm  --bf16  --use_cpu  --seed  --report_to
output    --output_dir  --overwrite_output  --resume_from_checkpoint  --export_dtype
          --logging_steps  --eval_strategy  --eval_steps  --save_strategy  --save_total_limit

--json prints the summary as JSON. `--help-all` explains these flags and all others of transformers'
Trainer. Lion's learning rate is a third to a tenth of AdamW's.
"""

from dataclasses import asdict

from .command_line import output_for, show, show_help, take


def main(argv: list[str]) -> None:
    """Do the run that the command line describes, and print its summary."""
    if take(argv, "-h", "--help"):
        show_help(__doc__)
    as_json = take(argv, "--json")
    if take(argv, "--help-all"):
        argv = ["--help"]
    from qft_hf.hf.finetune import finetune, parse_arguments

    arguments = parse_arguments(argv)
    with output_for(as_json=as_json):
        summary = finetune(arguments)
    if arguments.training.process_index == 0:
        text = f"\n{summary}\n{'written to':<30}{arguments.training.output_dir}"
        show(asdict(summary), text, as_json=as_json)
